"""What the start script does with an environment that it finds: filled where it is not, anew where that broke off."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.deployment.conftest import ROOT, SCRIPTS

INTERRUPTED, OLDER = None, "requirements.lock of an older version"
STUB = """#!/bin/sh
echo "$*" >>"$(dirname "$0")/calls"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The scripts and lock files, with an environment whose Python only notes what it is asked."""
    copy = tmp_path / "a project"
    (copy / "deployment").mkdir(parents=True)
    (copy / "deployment" / "scripts").symlink_to(SCRIPTS)
    for each in ROOT.glob("*.lock"):
        (copy / each.name).symlink_to(each)
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    return copy


def ensure(project: Path) -> list[str]:
    """Fills the environment; what its pip was asked to install."""
    calls = project / ".venv" / "bin" / "calls"
    calls.write_text("")
    script = 'ROOT=$1; for each in common setup; do . "$ROOT/deployment/scripts/lib/$each.sh"; done; ensure_venv "$2"'
    subprocess.run(
        ["bash", "-uc", script, "-", str(project), "requirements.lock"],
        check=True,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": os.environ.get("TMPDIR", "/tmp")},
    )
    return [call for call in calls.read_text().splitlines() if "pip install" in call]


@pytest.mark.parametrize("found", [INTERRUPTED, OLDER])
def test_what_an_installation_that_broke_off_has_left_is_not_trusted(project: Path, found: str | None) -> None:
    if found:
        (project / ".venv" / ".installed").write_text(found)
    (call,) = ensure(project)
    assert ("--force-reinstall" in call) == (found is INTERRUPTED)
    assert ensure(project) == []  # it is noted what lies there now
