"""The settings files: every name in them is a setting, and the example shows the defaults."""

import re
from pathlib import Path

import pytest

from services.relay.settings import RelaySettings
from services.session_service.settings import SessionServiceSettings
from tests.deployment.conftest import ROOT

ENVIRONMENTS = ROOT / "deployment" / "environments"
FIELDS = SessionServiceSettings.model_fields | RelaySettings.model_fields
CHOSEN_FOR_PRODUCTION = {"DB_SCHEMA", "GRACEFUL_STOP_SECONDS"}


def settings_in(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", path.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("name", ["dev.env", "test.env", "production.env.example"])
def test_every_name_is_a_setting(name: str) -> None:
    assert [key for key in settings_in(ENVIRONMENTS / name) if key.lower() not in FIELDS] == []


def test_the_example_shows_the_defaults() -> None:
    for key, value in settings_in(ENVIRONMENTS / "production.env.example").items():
        if value and key not in CHOSEN_FOR_PRODUCTION:
            assert str(FIELDS[key.lower()].default).lower() == value.lower(), key
