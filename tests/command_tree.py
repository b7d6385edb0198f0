"""Every command there is, with the words that call it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sluicegate import cli


def _below(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if not children:
        yield " ".join(path), command
        return
    for name, child in children.items():
        yield from _below(child, (*path, name))


#: Such as `sluice job list`, in the order of the help pages.
COMMANDS: dict[str, Any] = dict(
    one for name in cli.COMMANDS for one in _below(cli.find_command(name), ("sluice", name))
)
