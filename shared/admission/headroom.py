"""What a provider says is left of its limits, as the headers of an answer tell it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """What is left of each limit when an answer begins; None where the provider does not say."""

    requests: int | None = None
    #: Input and output together.
    tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    #: Seconds until the limit that is used up is back, None as long as none is.
    reset_s: float | None = None
