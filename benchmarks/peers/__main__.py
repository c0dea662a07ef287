"""python -m benchmarks.peers: our services beside what users would otherwise pick, in turn, on one Postgres."""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.conditions import conditions_of
from benchmarks.figures import number, percentile
from benchmarks.load import ROOT, WrongAnswer, run
from benchmarks.peers.environments import LITELLM, STORES, Peer, make
from benchmarks.stack import NORMAL, QUICK, Stack, memory_bytes, stack_of
from benchmarks.ways import shared
from tests.processes import Process, free_port, running
from tests.relay.calls import UPSTREAM_KEY

LENGTHS = (20, 1_000, 10_000)
_TIMES = 20
_LITELLM_KEY = "sk-bench"
_RATE = 20
_CONNECTIONS = 16
_STREAMS = 100


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a table: what was done, and each one's figure by name."""

    what: str
    unit: str
    values: dict[str, float]


class Store:
    """A peer's driver process."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    def do(self, **command: Any) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WrongAnswer(f"{self.name} ended while it was asked to {command}: {self._log.read_text()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WrongAnswer(f"{self.name}: {answer['error']}")
        taken: list[float] = answer.get("ms", [])
        return taken


@contextmanager
def _driver(name: str, python: Path | str, url: str, log: Path) -> Iterator[Store]:
    command = [str(python), "-m", f"benchmarks.peers.{name}", url]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield Store(name, process, log)
        finally:
            process.kill()
            process.wait()


def stores(stack: Stack, rounds: int, lengths: tuple[int, ...]) -> list[Line]:
    """Appending one message, and loading the last 20, in sessions of these lengths."""
    lines = []
    with ExitStack() as started:
        service = shared(stack).store
        own = _driver("session_relay", sys.executable, service.url, stack.folder / "session_relay.log")
        drivers = [started.enter_context(own)]
        for name, peer in STORES.items():
            url = stack.empty_database()
            drivers.append(started.enter_context(_driver(name, peer.python, url, stack.folder / f"{name}.log")))
        for length in lengths:
            taken: dict[str, dict[str, list[float]]] = {
                each: {d.name: [] for d in drivers} for each in ("append", "last")
            }
            for driver in drivers:
                driver.do(do="fill", session=f"s{length}", count=length)
                for what in taken:
                    driver.do(do=what, session=f"s{length}", times=_TIMES // 2)  # warm
            for _ in range(rounds):
                for what, by_name in taken.items():
                    for driver in drivers:
                        by_name[driver.name] += driver.do(do=what, session=f"s{length}", times=_TIMES)
            for what, told in (("append", "append one message"), ("last", "load the last 20")):
                medians = {name: statistics.median(ms) for name, ms in taken[what].items()}
                lines.append(Line(f"{told}, {length:,} messages, p50", "ms", medians))
    return lines


@contextmanager
def _litellm(stack: Stack, upstream_url: str) -> Iterator[Process]:
    """The proxy with one model, as in its quick start; one worker process, no database."""
    config = {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {"model": f"anthropic/{name}", "api_base": upstream_url, "api_key": UPSTREAM_KEY},
            }
            for name in ("test-model", "held-stream")
        ],
        "general_settings": {"master_key": _LITELLM_KEY},
    }
    path = stack.folder / "litellm.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    command = [
        str(LITELLM.python.with_name("litellm")),
        "--config",
        str(path),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    environment = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    with running(command, port, stack.folder / "litellm.log", environment) as process:
        process.wait_until("/health/liveliness", seconds=120)
        yield process


def proxies(stack: Stack, rounds: int) -> list[Line]:
    """The relay, every turn stored, beside the LiteLLM proxy, which stores nothing."""
    ways = shared(stack)
    ways.warm()
    ways.upstream.script(
        {"match": {"stream": True, "model": "held-stream"}, "repeat": -1, "event_delay_ms": 500, "stamped": True}
    )
    with _litellm(stack, ways.upstream.url) as proxy:

        def litellm(work: str, **plan: Any) -> Any:
            return run(work, proxy.url, api_key=_LITELLM_KEY, **plan)

        sides = {"session_relay": ways.stored, "litellm": litellm, "direct": ways.direct}
        litellm("plain", workers=8, seconds=60, count=100)
        added: dict[str, list[float]] = {name: [] for name in sides}
        rates: dict[str, dict[str, list[float]]] = {w: {name: [] for name in sides} for w in ("plain", "stream")}
        for _ in range(rounds):
            for name, ask in sides.items():
                paced = ask("plain", workers=64, seconds=stack.pace.seconds_long, rate=_RATE)
                added[name].append(percentile(paced.ms, 0.5))
                for work, by_name in rates.items():
                    events = {"events": 20} if work == "stream" else {}
                    by_name[name].append(ask(work, workers=_CONNECTIONS, seconds=stack.pace.seconds, **events).rate)
        medians = {name: statistics.median(found) for name, found in added.items()}
        over = {name: found - medians["direct"] for name, found in medians.items() if name != "direct"}
        lines = [Line(f"latency added, whole answers at {_RATE}/s, open loop, p50", "ms", over)]
        for work, told in (("plain", "whole answers"), ("stream", "streams of 20 events")):
            found = {name: statistics.median(each) for name, each in rates[work].items() if name != "direct"}
            lines.append(Line(f"{told}, {_CONNECTIONS} connections, closed loop", "/s", found))
        held = {}
        for name, process in (("session_relay", ways.relay), ("litellm", proxy)):
            before = memory_bytes(process)
            plan = {"workers": _STREAMS, "count": _STREAMS, "seconds": 120, "events": 60, "model": "held-stream"}
            during = sides[name]("stream", watched_pid=process.pid, **plan).extra.get("memory_bytes", math.nan)
            held[name] = (during - before) / _STREAMS / 1024
        lines.append(Line(f"memory of each of {_STREAMS} open streams", "KiB", held))
    return lines


def table(lines: list[Line]) -> str:
    names = list(lines[0].values)
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[line.what, *(f"{number(line.values[name])} {line.unit}" for name in names)] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round; 1,000 messages at most")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder of results (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the result on the page docs/comparison.md")
    arguments = parser.parse_args()
    peers: list[Peer] = [*STORES.values(), LITELLM]
    for peer in peers:
        make(peer)
    pace = QUICK if arguments.quick else NORMAL
    with stack_of(pace) as stack:
        conditions = conditions_of(pace, stack.run_sql("SHOW server_version"))
        conditions["peers"] = [peer.versions() for peer in peers]
        of_stores = stores(stack, pace.rounds, LENGTHS[:2] if arguments.quick else LENGTHS)
        of_proxies = proxies(stack, pace.rounds)
    told = f"{table(of_stores)}\n\n{table(of_proxies)}\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [asdict(line) for line in [*of_stores, *of_proxies]]
    result = {"conditions": conditions, "lines": lines}
    (arguments.out / "peers.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (arguments.out / "peers.md").write_text(told)
    if arguments.write:
        pages.write("comparison.md", told, conditions)
    print(told)
    print("; ".join(conditions["peers"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
