"""What became of the demo's jobs, added up. Every figure comes from the jobs' results."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sluicegate.shared.jobs import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The jobs of one use case that one model answered, or that none did."""

    use_case: str
    model: str
    results: tuple[Result, ...]

    @property
    def succeeded(self) -> int:
        """How many have an answer."""
        return sum(result.state == "succeeded" for result in self.results)

    @property
    def median_latency_s(self) -> float:
        """From submit to answer, the wait in queues included."""
        return statistics.median(result.latency_s or 0.0 for result in self.results)

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts, cached or not."""
        return sum(result.usage.total_input for result in self.results)

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(result.usage.output for result in self.results)

    @property
    def cost_nano_usd(self) -> int:
        """What all attempts have cost."""
        return sum(result.cost_nano_usd for result in self.results)

    @property
    def baseline_nano_usd(self) -> int:
        """What the same tokens cost on the baseline model."""
        return sum(result.baseline_nano_usd for result in self.results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What became of the jobs. elapsed_s: from the first submit to the last answer."""

    results: tuple[Result, ...]
    elapsed_s: float

    @property
    def total(self) -> Group:
        """All jobs."""
        return Group(use_case="", model="", results=self.results)

    @property
    def failed(self) -> int:
        """How many ended without an answer."""
        return len(self.results) - self.total.succeeded

    def groups(self, *, by_model: bool) -> list[Group]:
        """Return the jobs by use case, in the order of their first job."""
        found: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            model = (result.model or "none") if by_model else ""
            found.setdefault((result.use_case, model), []).append(result)
        return [
            Group(use_case=use_case, model=model, results=tuple(results))
            for (use_case, model), results in found.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        by_use_case = {
            group.use_case: {
                "jobs": len(group.results),
                "succeeded": group.succeeded,
                "failed": len(group.results) - group.succeeded,
                "models": sorted({one.model for one in group.results if one.model}),
                "median_latency_s": round(group.median_latency_s, 3),
                "input_tokens": group.input_tokens,
                "output_tokens": group.output_tokens,
                "cost_nano_usd": group.cost_nano_usd,
                "baseline_nano_usd": group.baseline_nano_usd,
            }
            for group in self.groups(by_model=False)
        }
        return {
            "jobs": len(self.results),
            "succeeded": self.total.succeeded,
            "failed": self.failed,
            "cost_nano_usd": self.total.cost_nano_usd,
            "baseline_nano_usd": self.total.baseline_nano_usd,
            "by_use_case": by_use_case,
            "elapsed_s": round(self.elapsed_s, 3),
        }
