"""Where `sluice` begins: Ctrl-C is quiet even while the command line is still being imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that the process was started with."""
    try:
        from sluicegate.cli import main as run  # noqa: PLC0415 - this is what may be interrupted

        run()
    except KeyboardInterrupt:
        sys.exit(130)
