"""The worker without gates: its calls leave unasked, so that what the gates cost can be told."""

from __future__ import annotations

from sluicegate.shared.admission.gate import Ask, Probe, Report, Verdict
from sluicegate.workers import gates


class Ungated(gates.Gates):
    """Lets every call through, and hears of none."""

    async def admit(self, ask: Ask) -> Verdict:
        return gates.UNASKED

    async def report_now(self, report: Report) -> None:
        return

    def report(self, report: Report) -> None:
        return

    def probed(self, probe: Probe) -> None:
        return


# Before anything imports it by its name.
gates.Gates = Ungated  # type: ignore[misc]

from sluicegate.workers.app import app  # noqa: E402

__all__ = ["app"]
