"""The pages say what is there: every setting and its default, files that exist, the same commands in both languages."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from services.relay.settings import RelaySettings
from services.session_service.settings import SessionServiceSettings

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EMPTY = "—"

_ROW = re.compile(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \| ([^|]*) \|", re.MULTILINE)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
_PATH = re.compile(r"(?<![\w./~])((?:\.ci|deployment|docs|migrations|services|shared|tests)/[\w./-]*\w)")
_MODULE = re.compile(r"-m ((?:services|shared|tests)(?:\.\w+)+)")
_TARGET = re.compile(r"^make ([a-z]+)", re.MULTILINE)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[tuple[str, str]]:
    return _BLOCK.findall(text_of(page))


def shown(default: Any) -> str:
    """A default as the tables write it."""
    value = default.get_secret_value() if isinstance(default, SecretStr) else default
    if value is None or value in ("", ()):
        return EMPTY
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def settings_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and defaults, those of nested settings too."""
    for name, field in kind.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from settings_of(type(field.default), f"{prefix}{name.upper()}__")
        else:
            yield f"{prefix}{name.upper()}", shown(field.default)


SETTINGS = dict([*settings_of(SessionServiceSettings), *settings_of(RelaySettings)])


def tables_of(page: str) -> dict[str, str]:
    """What stands in the second column beside the names of settings in the first."""
    return {name: second for names, second in _ROW.findall(text_of(page)) for name in re.findall(r"[A-Z_]+", names)}


def test_every_setting_is_on_the_page_with_its_default() -> None:
    on_page = tables_of("docs/settings.md")
    assert {name: on_page.get(name) for name in SETTINGS} == SETTINGS


def test_every_other_name_on_the_page_is_read_by_a_script() -> None:
    scripts = "".join(
        path.read_text() for path in [ROOT / ".ci" / "run", *(ROOT / "deployment/scripts").rglob("*.sh")]
    ) + text_of("tests/conftest.py")
    assert [name for name in tables_of("docs/settings.md") if name not in SETTINGS and name not in scripts] == []


@pytest.mark.parametrize("readme", READMES)
def test_the_settings_in_the_readme_are_true(readme: str) -> None:
    in_readme = tables_of(readme)
    assert in_readme.keys() >= {"DATABASE_URL", "RELAY_UPSTREAM_URL"}
    assert in_readme == {name: SETTINGS.get(name) for name in in_readme}


def test_both_readmes_show_the_same_settings_commands_and_links() -> None:
    english, chinese = READMES
    assert list(tables_of(english)) == list(tables_of(chinese))
    assert blocks_of(english) == blocks_of(chinese)
    elsewhere = [[link for link in _LINK.findall(text_of(page)) if link[0] not in READMES] for page in READMES]
    assert [path for path, _ in elsewhere[0]] == [path for path, _ in elsewhere[1]]


@pytest.mark.parametrize("readme", READMES)
def test_the_first_start_installs_as_many_packages_as_is_shown(readme: str) -> None:
    packages = len(re.findall("^[a-z].*==", text_of("requirements.lock"), flags=re.MULTILINE))
    assert f"installing {packages} Python packages from requirements.lock" in text_of(readme)


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_commands_exist(page: str) -> None:
    commands = "".join(body for language, body in blocks_of(page) if language in {"sh", "python", "text"})
    named = set(_PATH.findall(commands)) | {module.replace(".", "/") for module in _MODULE.findall(commands)}
    missing = [path for path in sorted(named) if not any((ROOT / f"{path}{end}").exists() for end in ("", ".py"))]
    # What a command copies from an example is not there before.
    assert [path for path in missing if not (ROOT / f"{path}.example").exists()] == []
    targets = re.findall(r"^([a-z]+):", text_of("Makefile"), re.MULTILINE)
    assert [target for target in _TARGET.findall(commands) if target not in targets] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    here = (ROOT / page).parent
    assert [path for path, _ in _LINK.findall(text_of(page)) if path and not (here / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_read(page: str) -> None:
    for language, body in blocks_of(page):
        if language == "python":
            compile(body, page, "exec")
        elif language == "sh":
            subprocess.run(["bash", "-n"], input=body, text=True, check=True, timeout=10)


def test_every_metric_on_the_pages_is_there() -> None:
    served = "".join(text_of(f"services/{name}/metrics.py") for name in ("relay", "session_service"))
    named = set(
        re.findall(r"\b((?:relay|sessions)_[a-z_]+)(?:_bucket|_count)?\b[{\[` ]", text_of("docs/operations.md"))
    )
    assert len(named) > 8
    assert {
        name for name in named if f'"{name}' not in served and f'"{name.rpartition("_")[0]}"' not in served
    } == set()
