"""`.env.example` documents every setting there is, with its default, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from sluicegate.shared.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = (ROOT / ".env.example").read_text()
VARIABLE = re.compile(r"^#?([A-Z][A-Z0-9_]*)=(.*)$")


def variable_of(name: str, field: FieldInfo) -> str:
    return str(field.validation_alias or f"SLUICE_{name.upper()}")


FIELDS = {variable_of(name, field): name for name, field in Settings.model_fields.items()}


def documented() -> dict[str, tuple[str, str]]:
    """Value and description by variable; variables in one block share its description."""
    found: dict[str, tuple[str, str]] = {}
    description = ""
    in_text = False
    for line in EXAMPLE.splitlines():
        if variable := VARIABLE.match(line):
            name, value = variable.groups()
            assert name not in found, f"{name} stands there twice"
            found[name] = (value, description)
            in_text = False
        elif line.startswith("# "):
            description = f"{description} {line[2:]}" if in_text else line[2:]
            in_text = True
        else:
            in_text = False
            description = "" if not line else description
    return found


DOCUMENTED = documented()
FOR_COMPOSE = set(DOCUMENTED) - set(FIELDS)


def test_every_setting_is_documented_and_only_settings_are() -> None:
    assert set(FIELDS) - set(DOCUMENTED) == set()
    compose = (ROOT / "docker-compose.yml").read_text()
    assert {name for name in FOR_COMPOSE if f"${{{name}:" not in compose} == set()
    assert not [name for name in FOR_COMPOSE if name.startswith("SLUICE_")]


def test_every_variable_of_the_compose_file_is_documented() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", compose))
    assert used - set(DOCUMENTED) == set()


@pytest.mark.parametrize("variable", sorted(FIELDS))
def test_a_documented_default_is_the_default(variable: str) -> None:
    value, description = DOCUMENTED[variable]
    name = FIELDS[variable]
    default = Settings.model_fields[name].default
    plain = default.get_secret_value() if isinstance(default, SecretStr) else default
    if plain is None:
        assert value == ""
        assert "No default" in description
    else:
        given = Settings(_env_file=None, **{name: value})  # type: ignore[arg-type]  # text, as in a file
        assert getattr(given, name) == default
        assert value == value.strip()


@pytest.mark.parametrize("variable", sorted(FIELDS))
def test_descriptions_say_the_unit(variable: str) -> None:
    _, description = DOCUMENTED[variable]
    assert len(description) > 20
    assert ("second" in description) == variable.endswith("_S")


def test_it_can_be_used_as_it_is(tmp_path: Path) -> None:
    copied = tmp_path / ".env"
    copied.write_text(EXAMPLE)
    assert Settings(_env_file=copied) == Settings(_env_file=None)
    copied.write_text("\n".join(VARIABLE.sub(r"\1=\2", line) for line in EXAMPLE.splitlines()))
    assert Settings(_env_file=copied) == Settings(_env_file=None)
