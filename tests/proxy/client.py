"""The test proxy as tests use it: started, told to fail, read, stopped.

Its one invariant: a process started here never outlives the one that started it.
"""

import http.client
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self
from urllib.parse import quote, urlsplit

_ROOT = Path(__file__).parents[2]
_START_SECONDS = 20
_STOP_SECONDS = 5


class TestProxy:
    """A running test proxy; `url` holds the credentials that it asks for. Not for several threads at once."""

    __test__: ClassVar[bool] = False  # not a test class, whatever its name

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self.url = url
        self.port = urlsplit(url).port
        self._process = process
        self._control = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    @classmethod
    def started(cls, port: int = 0, *, user: str = "", password: str = "", socks: bool = False) -> Self:
        """Starts one on `port`, or on a free one; raises RuntimeError when it does not come up."""
        command = [sys.executable, "-m", "tests.proxy", "--port", str(port), "--exit-with-stdin"]
        command += ["--user", user, "--password", password] if user else []
        command += ["--socks"] if socks else []
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
        assert process.stdout is not None
        watchdog = threading.Timer(_START_SECONDS, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        if " on " not in line:
            process.kill()
            process.communicate()
            raise RuntimeError(f"the test proxy did not start: {line!r}")
        scheme, _, address = line.rpartition(" ")[2].strip().partition("://")
        credentials = f"{quote(user, safe='')}:{quote(password, safe='')}@" if user else ""
        return cls(f"{scheme}://{credentials}{address}", process)

    def stop(self) -> None:
        """Ends the process. A second call does nothing."""
        self._control.close()
        if self._process.poll() is None:
            self._process.terminate()
            self._process.communicate(timeout=_STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def log(self) -> list[dict[str, Any]]:
        """What came in, oldest first: protocol, method, target, credentials, outcome."""
        entries: list[dict[str, Any]] = self._call("GET", "/control/log")["log"]
        return entries

    def fail(
        self, kind: Literal["refuse", "hang", "reset"], *, after_bytes: int | None = None, repeat: int = 1
    ) -> None:
        """Makes the next requests fail, -1: all; with `after_bytes` when so much of the answer has passed."""
        self._call("POST", "/control/fault", {"kind": kind, "after_bytes": after_bytes, "repeat": repeat})

    def reset(self) -> None:
        """Forgets log and faults."""
        self._call("POST", "/control/reset")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        self._control.request(method, path, None if body is None else json.dumps(body))
        answer = self._control.getresponse()
        value = json.loads(answer.read())
        if answer.status != 200:
            raise ValueError(value["error"])
        return value
