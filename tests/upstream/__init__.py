"""A scripted test upstream: a real process on loopback that speaks the Claude Messages protocol, well or badly.

    $ python -m tests.upstream --port 8100
    test upstream on http://127.0.0.1:8100

It serves `POST /v1/messages` (plain and streamed), `POST /v1/messages/count_tokens` and `GET /v1/models`,
also under any path before `/v1`. Without a script the answer depends on the request alone ("You said: hello.
I see 1 messages."; a tool call when `tool_choice` forces one; a signed thinking block when thinking is
enabled), and a request is refused as the real API would refuse it: the rules are in `rules.py`, one pure
function that property tests may use alone.

What goes wrong, and when, is scripted. A step is used up by the next request that matches it:

    POST /control/script     one step, or a list of steps; an unknown field is refused
        {"status": 429, "headers": {"retry-after": "7"}}
        {"match": {"api_key": "key-2", "stream": true}, "cut_after_events": 3, "cut": "reset"}
        {"repeat": -1, "event_delay_ms": 20}
        {"blocks": [{"type": "tool_use", "id": "toolu_1", "name": "clock", "input": {"zone": "UTC"}}]}
        {"hang_seconds": 30}                             not a byte; with "after_events": in mid-stream
        {"error_event": {"type": "error", "error": {"type": "overloaded_error", "message": "…"}}}
        {"malformed_event": true}  {"huge_event_bytes": 9000000}  {"huge_answer_bytes": 70000000}
        {"garbage": "not HTTP"}  {"redirect": "http://…"}  {"close": true}  {"usage": null}
        {"raw_events": ["event: ping\\ndata: {}\\n\\n", {"base64": "/w=="}], "chunk_bytes": 1}
    GET  /control/requests   what came in: headers, exact bytes, JSON, and how the answer ended
    GET  /control/state      open connections, answers under way, steps left
    POST /control/reset      forgets script and log, ends what is under way

All fields of a step are in `script.py`, with a word on each. In Python tests use `client.TestUpstream`:

    with TestUpstream.started() as upstream:
        upstream.script({"status": 529}, {"text": "second try"})
        ...
        assert [entry["status"] for entry in upstream.requests()] == [529, 200]

Its one invariant: it does nothing by chance. The same script and the same requests give the same bytes,
except for the ids of messages.
"""
