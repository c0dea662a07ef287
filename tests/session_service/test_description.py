"""Calls made up from the service's own description: every answer is one that it describes, none is a fault."""

import subprocess
import sys
from pathlib import Path

from tests.processes import Process

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# A file of lines is nothing that could be made up from a description; it has tests of its own.
NOT_MADE_UP = "/api/v1/sessions/import"


def test_every_answer_is_described(session_service: Process, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    arguments = ["--checks", CHECKS, "--max-examples", "4", "--exclude-path", NOT_MADE_UP]
    run = subprocess.run(
        [
            str(program),
            "run",
            f"{session_service.url}/openapi.json",
            *arguments,
            "--phases",
            "coverage,fuzzing,stateful",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    assert " generated, " in run.stdout
