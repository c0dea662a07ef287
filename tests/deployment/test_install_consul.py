"""install_consul.sh: takes the first source that works, and never a file with a wrong checksum."""

import hashlib
import os
import platform
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.deployment.conftest import SCRIPTS

FAKE = "#!/bin/sh\necho 'Consul v9.9.9'\necho 'more'\n"


def install(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / "install_consul.sh"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | settings,
    )


def write_program(path: Path, text: str = FAKE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_one_on_path_is_linked_and_kept(tmp_path: Path) -> None:
    program = write_program(tmp_path / "elsewhere" / "consul")
    path = f"{program.parent}:{os.environ['PATH']}"
    target = tmp_path / "bin"
    first = install("--to", str(target), PATH=path)
    assert first.returncode == 0, first.stderr
    assert (target / "consul").resolve() == program
    assert "Consul v9.9.9 on PATH" in first.stdout
    again = install("--to", str(target), PATH=f"{target}:{path}")
    assert "already there" in again.stdout


def test_one_that_does_not_run_is_not_taken(tmp_path: Path) -> None:
    program = write_program(tmp_path / "elsewhere" / "consul", "#!/bin/sh\nexit 1\n")
    failed = install("--from", "path", "--to", str(tmp_path / "bin"), PATH=f"{program.parent}:/usr/bin:/bin")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: no consul program could be installed")
    assert not (tmp_path / "bin" / "consul").exists()


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A release archive on loopback with version 9.9.9, and its checksum file."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    folder = tmp_path / "archive" / "consul" / "9.9.9"
    folder.mkdir(parents=True)
    name = f"consul_9.9.9_{platform.system().lower()}_{machine}.zip"
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr("consul", FAKE)
    sums = folder / "consul_9.9.9_SHA256SUMS"
    sums.write_text(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n{'0' * 64}  other.zip\n")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "archive")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", sums
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_release_archive_is_used_when_its_checksum_holds(tmp_path: Path, archive: tuple[str, Path]) -> None:
    address, sums = archive
    settings = {"CONSUL_RELEASES_URL": address, "CONSUL_VERSION": "9.9.9", "no_proxy": "127.0.0.1"}
    arguments = ("--from", "release", "--to", str(tmp_path / "bin"))
    done = install(*arguments, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "bin" / "consul").read_text() == FAKE

    sums.write_text(sums.read_text().replace(sums.read_text()[:8], "00000000"))
    refused = install(*arguments, "--force", **settings)
    assert refused.returncode == 1
    assert "does not have the checksum" in refused.stdout


def test_wrong_arguments_are_one_line() -> None:
    for arguments in (("--from", "nowhere"), ("--to",), ("what",)):
        failed = install(*arguments)
        assert failed.returncode == 1
        assert failed.stderr.count("\n") == 1
    assert install("--help").returncode == 0
