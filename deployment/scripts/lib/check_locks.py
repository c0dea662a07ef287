"""Checks the lock files against pyproject.toml, offline. Exit code 1 and a line for each fault.

All must name no address and give hashes, hold every direct requirement in a version that it allows, hold
nothing that was once a direct requirement and is no longer, and agree with each other.
"""

import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
LOCKS = {
    "requirements.lock": ["embedded"],
    "requirements-dev.lock": ["embedded", "dev"],
    "requirements-bench.lock": ["embedded", "dev", "bench"],
}
ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ;\\]+)(?P<rest>.*(?:\n[ ]+.*)*)", re.MULTILINE)


def entries(text: str) -> dict[str, tuple[str, str]]:
    """Name -> version, and the rest of its entry: hashes, and on whose behalf it is there."""
    return {canonicalize_name(m["name"]): (m["version"], m["rest"]) for m in ENTRY.finditer(text)}


def faults_of(lock: str, text: str, wanted: list[Requirement]) -> list[str]:
    faults = []
    if "://" in text:
        faults.append(f"{lock} names an address")
    found = entries(text)
    direct = {canonicalize_name(requirement.name) for requirement in wanted}
    for requirement in wanted:
        version, _ = found.get(canonicalize_name(requirement.name), (None, ""))
        if version is None:
            faults.append(f"{lock} lacks {requirement.name}")
        elif not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{lock} has {requirement.name} {version}, pyproject.toml wants {requirement.specifier}")
    for name, (_, rest) in found.items():
        if "--hash=sha256:" not in rest:
            faults.append(f"{lock} has no hash of {name}")
        if "(pyproject.toml)" in rest and name not in direct:
            faults.append(f"{lock} holds {name} for pyproject.toml, which no longer names it")
    return faults


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    faults = []
    versions: dict[str, str] = {}
    for lock, extras in LOCKS.items():
        text = (ROOT / lock).read_text()
        lines = [*project["dependencies"]]
        for extra in extras:
            lines += project["optional-dependencies"][extra]
        faults += faults_of(lock, text, [Requirement(line) for line in lines])
        for name, (version, _) in entries(text).items():
            if versions.setdefault(name, version) != version:
                faults.append(f"the lock files differ in {name}: {versions[name]} and {version}")
    for fault in faults:
        print(f"{fault}: run 'make lock'")  # noqa: T201
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
