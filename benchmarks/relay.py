"""The relay: what it adds to upstream's own time, and how much it does, every turn stored."""

import statistics
import sys
from itertools import chain
from typing import Any

from benchmarks.figures import Findings, added, alone, at_least, at_most, curve, percentile, share
from benchmarks.stack import Stack, memory_bytes
from benchmarks.ways import shared

RATES = (50, 100, 200)
_CLOSED_CONNECTIONS = 16
_LONG_STREAM_EVENTS = 60
_EVENT_DELAY_MS = 20
_STREAMS_A_SECOND = 7
_HELD_EVENT_DELAY_MS = 500


def added_latency(stack: Stack) -> Findings:
    """Whole answers in an open loop, then streams: what comes on top of upstream's own time."""
    found = Findings()
    ways = shared(stack)
    ways.warm()
    for rate in RATES:
        ours: list[list[float]] = []
        theirs: list[list[float]] = []
        for _ in range(stack.pace.rounds):
            plan = {"workers": 64, "seconds": stack.pace.seconds, "rate": rate}
            ours.append(ways.stored("plain", **plan).ms)
            theirs.append(ways.direct("plain", **plan).ms)
        p50 = at_most(4)
        p99 = at_most(25) if rate == max(RATES) else None
        for name, place, target in (("p50", 0.50, p50), ("p99", 0.99, p99)):
            values = [percentile(each, place) for each in ours]
            yardstick = [percentile(each, place) for each in theirs]
            found.add(added(f"relay, plain, {rate}/s, {name}", "ms", values, "direct", yardstick, target))
        found.curves[f"relay at {rate}/s"] = curve(list(chain(*ours)))
        found.curves[f"direct at {rate}/s"] = curve(list(chain(*theirs)))
    return found


def streams(stack: Stack) -> Findings:
    """Streams of 60 events, one every 20 ms: when the first one comes, and how late each of them is."""
    found = Findings()
    ways = shared(stack)
    ways.warm()
    ways.upstream.script(_paced("long-stream", _EVENT_DELAY_MS))
    plan: dict[str, Any] = {"workers": 64, "seconds": stack.pace.seconds, "rate": _STREAMS_A_SECOND}
    plan |= {"events": _LONG_STREAM_EVENTS, "model": "long-stream"}
    ours, theirs = [], []
    for _ in range(stack.pace.rounds):
        ours.append(ways.stored("stream", **plan).extra)
        theirs.append(ways.direct("stream", **plan).extra)
    for kind, what, middle, limit in (
        ("first_text_ms", "relay, stream, first text, p50", statistics.median, 4.0),
        ("event_delay_ms", "relay, stream, delay of an event, mean", statistics.fmean, 0.5),
    ):
        values, yardstick = ([middle(each[kind]) for each in side] for side in (ours, theirs))
        found.add(added(what, "ms", values, "direct", yardstick, at_most(limit)))
    for name, side in (("event through the relay", ours), ("event, direct", theirs)):
        found.curves[name] = curve(list(chain(*(each["event_delay_ms"] for each in side))))
    return found


def _paced(model: str, event_delay_ms: float) -> dict[str, Any]:
    """Upstream's script for streams of this model: events one by one, each with the time when it was sent."""
    match = {"stream": True, "model": model}
    return {"match": match, "repeat": -1, "event_delay_ms": event_delay_ms, "stamped": True}


def closed_loop(stack: Stack) -> Findings:
    """As much as 16 connections get, beside a bare pass-through."""
    found = Findings()
    ways = shared(stack)
    ways.warm()
    plan = {"workers": _CLOSED_CONNECTIONS, "seconds": stack.pace.seconds}
    for work, what, limit, more in (
        ("plain", "relay, plain, 16 connections", 0.35, {}),
        ("stream", "relay, streams of 20 events, 16 connections", 0.30, {"events": 20}),
    ):
        ours, theirs = [], []
        for _ in range(stack.pace.rounds):
            ours.append(ways.stored(work, **plan, **more).rate)
            theirs.append(ways.passed(work, **plan, **more).rate)
        found.add(share(what, "/s", ours, "bare pass-through", theirs, at_least(limit)))
    return found


def held_streams(stack: Stack) -> Findings:
    """Many streams open at once on one relay process: what each takes, and how late events are."""
    found = Findings()
    ways = shared(stack)
    ways.warm()
    ways.upstream.script(_paced("held-stream", _HELD_EVENT_DELAY_MS))
    plan = {
        "workers": stack.pace.streams,
        "count": stack.pace.streams,
        "seconds": 120,
        "model": "held-stream",
        "events": stack.pace.held_events,
        "watched_pid": ways.relay.pid,
    }
    before = memory_bytes(ways.relay)
    held = ways.stored("stream", **plan)
    direct = ways.direct("stream", **plan)
    if "memory_bytes" not in held.extra or not held.extra["event_delay_ms"]:
        # Nothing fails by a time: a machine that is this busy has no such figure.
        print("held: the first streams ended before the last ones had begun", file=sys.stderr)
        return found
    kib = (held.extra["memory_bytes"] - before) / stack.pace.streams / 1024
    found.add(alone(f"relay, {stack.pace.streams:,} open streams, memory of each", "KiB", kib, at_most(64)))
    ours, theirs = (percentile(each.extra["event_delay_ms"], 0.99) for each in (held, direct))
    what = f"relay, {stack.pace.streams:,} open streams, delay of an event, p99"
    figure = added(what, "ms", [ours], "direct", [theirs])
    figure.sign, figure.compared, figure.target = "", ours, at_most(50)
    found.add(figure)
    found.curves[f"event, {stack.pace.streams:,} streams, relay"] = curve(held.extra["event_delay_ms"])
    found.curves[f"event, {stack.pace.streams:,} streams, direct"] = curve(direct.extra["event_delay_ms"])
    return found
