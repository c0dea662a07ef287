"""The test upstream as tests and benchmarks use it: started, scripted, read, stopped.

Its one invariant: a process started here never outlives the one that started it.
"""

import asyncio
import base64
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

_ROOT = Path(__file__).parents[2]
_START_SECONDS = 20
_STOP_SECONDS = 5


class TestUpstream:
    """A running test upstream. Its control calls block for a millisecond or so: it is another process.

    Not for several threads at once.
    """

    __test__: ClassVar[bool] = False  # not a test class, whatever its name

    def __init__(self, url: str, process: subprocess.Popen[str] | None = None) -> None:
        self.url = url
        self._process = process
        self._control = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)

    @classmethod
    def started(cls, port: int = 0, *, log_limit: int = 10_000) -> Self:
        """Starts one on `port`, or on a free one; raises RuntimeError when it does not come up."""
        numbers = ["--port", str(port), "--log-limit", str(log_limit)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.upstream", *numbers, "--exit-with-stdin"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )
        assert process.stdout is not None
        watchdog = threading.Timer(_START_SECONDS, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        if " on " not in line:
            process.kill()
            process.wait()
            raise RuntimeError(f"the test upstream did not start: {line!r}")
        return cls(line.rpartition(" ")[2].strip(), process)

    def stop(self) -> None:
        """Ends the process, if this object started it. A second call does nothing."""
        self._control.close()
        if self._process is not None:
            process, self._process = self._process, None
            process.terminate()
            process.communicate(timeout=_STOP_SECONDS)

    def kill(self) -> None:
        """Ends the process as a crash would."""
        if self._process is not None:
            self._process.kill()
        self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def script(self, *steps: dict[str, Any]) -> None:
        """Adds steps to the script; raises ValueError for a step that is not understood."""
        self._call("POST", "/control/script", list(steps))

    def requests(self, path: str | None = None) -> list[dict[str, Any]]:
        """The received requests, oldest first, with the body's exact bytes as `body`; all, or those of a path."""
        entries: list[dict[str, Any]] = self._call("GET", "/control/requests")["requests"]
        for entry in entries:
            entry["body"] = base64.b64decode(entry.pop("body_base64"))
            entry["headers"] = dict(entry["headers"])
        return [entry for entry in entries if path in {None, entry["path"]}]

    def state(self) -> dict[str, Any]:
        """`connections` and `running` answers now, `requests` so far, `steps` left."""
        return dict(self._call("GET", "/control/state"))

    def reset(self) -> None:
        """Forgets script and log, ends what is under way."""
        self._call("POST", "/control/reset")

    async def until(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 5) -> dict[str, Any]:
        """Waits until the state satisfies the condition and gives it; raises TimeoutError with the last one."""
        deadline = time.monotonic() + seconds
        while not condition(state := self.state()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the test upstream's state is still {state}")
            await asyncio.sleep(0.01)
        return state

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        self._control.request(method, path, None if body is None else json.dumps(body))
        answer = self._control.getresponse()
        value = json.loads(answer.read())
        if answer.status != 200:
            raise ValueError(value["error"])
        return value
