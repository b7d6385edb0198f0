"""How long prompts and answers really are, learned from what providers have billed.

A prompt is characters and a factor for each model; an answer is as long as those that the model
gave for the same use case. Only limits are held to these estimates, which are meant to be right on
average. Money is reserved by the careful upper estimate itself
(`shared/pricing.estimate_prompt_tokens`) and the longest answer that is allowed.
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
#: An answer's part of the longest that is allowed, as long as nothing is known.
_ANSWER_SHARE: Final = 0.25


@dataclass(slots=True)
class _Learned:
    factor: float = 1.0
    #: What the factor rests on; the careful estimate that it begins with counts as one call.
    calls: int = 1


@dataclass(slots=True)
class _Answers:
    mean: float = 0.0
    calls: int = 0


class TokenEstimates:
    """What this process has learned; of `max_models` models, those that were asked for last.

    Estimates of prompts, in and out, are those of `Needs.prompt_tokens`.
    """

    def __init__(self, *, max_models: int = 256) -> None:
        self._max_models = max_models
        self._models: OrderedDict[str, _Learned] = OrderedDict()
        self._answers: OrderedDict[tuple[str, str], _Answers] = OrderedDict()

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

    def output_tokens(self, model: str, use_case: str, max_tokens: int) -> int:
        """Return how many tokens an answer probably has that may have `max_tokens`."""
        if (known := self._answers.get((model, use_case))) is None:
            return math.ceil(max_tokens * _ANSWER_SHARE)
        self._answers.move_to_end((model, use_case))
        return max(1, min(max_tokens, round(known.mean)))

    def learn_output(self, model: str, use_case: str, actual_output: int) -> None:
        """Take what a provider has counted of a whole answer, reasoning included."""
        learned = self._answers.setdefault((model, use_case), _Answers())
        self._answers.move_to_end((model, use_case))
        learned.calls += 1
        learned.mean += max(_WEIGHT, 1 / learned.calls) * (actual_output - learned.mean)
        if len(self._answers) > self._max_models:
            self._answers.popitem(last=False)
