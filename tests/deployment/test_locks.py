"""The lock files: checked without a network, and their faults named."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.deployment.conftest import ROOT


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "deployment/scripts/lib/check_locks.py"
    return subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)


def test_the_lock_files_match_the_project() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stdout


def test_each_fault_is_named(tmp_path: Path) -> None:
    script = Path("deployment/scripts/lib/check_locks.py")
    (tmp_path / script.parent).mkdir(parents=True)
    shutil.copy(ROOT / script, tmp_path / script)
    project = (ROOT / "pyproject.toml").read_text()
    runtime = (ROOT / "requirements.lock").read_text()
    start = runtime.index("asyncpg==")
    end = runtime.index("\nattrs==")
    (tmp_path / "pyproject.toml").write_text(project.replace('"fastapi>=', '"fastapi>=9').replace('"uvloop', '"orjson'))
    (tmp_path / "requirements.lock").write_text("--index-url https://example.org\n" + runtime[:start] + runtime[end:])
    for other in ("requirements-dev.lock", "requirements-bench.lock"):
        shutil.copy(ROOT / other, tmp_path)
    done = check(tmp_path)
    assert done.returncode == 1
    for fault in (
        "requirements.lock names an address",
        "requirements.lock lacks asyncpg",
        "pyproject.toml wants >=9",
        "holds uvloop for pyproject.toml, which no longer names it",
    ):
        assert fault in done.stdout
