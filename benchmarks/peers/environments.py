"""An environment of its own for each peer, filled from the registry that pip or uv is set up with."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(".data/peers")


@dataclass(frozen=True, slots=True)
class Peer:
    """`requirements` as its documentation names them; `packages` are those whose versions are told."""

    name: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]

    @property
    def python(self) -> Path:
        return (FOLDER / self.name / "bin" / "python").absolute()

    def versions(self) -> str:
        each = f"', '.join(f'{{name}} {{version(name)}}' for name in {self.packages})"
        asked = f"from importlib.metadata import version; print({each})"
        return subprocess.run([self.python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


LITELLM = Peer("litellm", ("litellm[proxy]",), ("litellm",))
STORES = {
    "google_adk": Peer("google_adk", ("google-adk[db]", "asyncpg"), ("google-adk", "sqlalchemy", "asyncpg")),
    "openai_agents": Peer(
        "openai_agents", ("openai-agents[sqlalchemy]", "asyncpg"), ("openai-agents", "sqlalchemy", "asyncpg")
    ),
    "langgraph": Peer(
        "langgraph",
        ("langgraph", "langgraph-checkpoint-postgres", "psycopg[binary,pool]"),
        ("langgraph", "langgraph-checkpoint-postgres", "psycopg"),
    ),
}


def make(peer: Peer) -> None:
    """Makes the peer's environment; one that is there already stays as it is."""
    folder = FOLDER / peer.name
    if (folder / ".complete").exists():
        return
    sys.stderr.write(f"installing {peer.name}\n")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    if uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--quiet", "--python", str(peer.python)]
    else:
        command = [str(peer.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *peer.requirements], check=True)
    (folder / ".complete").touch()
