"""How long prompts really are: characters and a factor for each model, learned from its bills.

Only limits are held to these estimates, which are meant to be right on average. Money is reserved
by the careful upper estimate itself (`shared/pricing.estimate_prompt_tokens`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

#: A factor outside of these says more about an odd prompt than about a model.
_MIN_FACTOR: Final = 0.25
_MAX_FACTOR: Final = 4.0
#: The part of the newest call in the factor, once some have been seen.
_WEIGHT: Final = 0.05
#: Below it a prompt is mostly the frame that providers put around it.
_MIN_TOKENS: Final = 50


@dataclass(slots=True)
class _Learned:
    factor: float = 1.0
    #: What the factor rests on; the careful estimate that it begins with counts as one call.
    calls: int = 1


class TokenEstimates:
    """What this process has learned; of `max_models` models, those that were asked for last.

    Estimates, in and out, are those of `Needs.prompt_tokens`.
    """

    def __init__(self, *, max_models: int = 256) -> None:
        self._max_models = max_models
        self._models: OrderedDict[str, _Learned] = OrderedDict()

    def input_tokens(self, model: str, estimated: int, *, has_attachments: bool = False) -> int:
        """Return how many tokens a prompt probably has, for which the careful estimate is known.

        An estimate that stands for attachments more than for text is returned as it is.
        """
        if has_attachments or model not in self._models:
            return estimated
        self._models.move_to_end(model)
        return math.ceil(estimated * self._models[model].factor)

    def learn(
        self, model: str, estimated: int, actual_total_input: int, *, has_attachments: bool = False
    ) -> None:
        """Take what a provider has counted, tokens from and into a cache included."""
        if has_attachments or min(estimated, actual_total_input) < _MIN_TOKENS:
            return
        ratio = min(max(actual_total_input / estimated, _MIN_FACTOR), _MAX_FACTOR)
        learned = self._models.setdefault(model, _Learned())
        self._models.move_to_end(model)
        learned.calls += 1
        # The first calls count for more, as a mean has it: the factor is right after a few.
        learned.factor += max(_WEIGHT, 1 / learned.calls) * (ratio - learned.factor)
        if len(self._models) > self._max_models:
            self._models.popitem(last=False)
