"""What went wrong in a call: HTTP statuses, error events and exceptions as our error classes.

Pure: the adapters hand in what they met. The tables were made from the SDKs' own exception classes
(`anthropic/_error_classes.py`, `openai/_exceptions.py`), the providers' documentation of error
codes, and what compatible servers send.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any, Final

import aiohttp
import httpx2

from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.errors import ErrorClass
from sluicegate.shared.jobs import JobSpec
from sluicegate.shared.messages import TextPart, ToolResultPart
from sluicegate.shared.secrets import Secret
from sluicegate.workers.providers.decoding import load_json
from sluicegate.workers.providers.rate_headers import headroom

#: What may escape from the SDKs' HTTP client besides the SDKs' own exceptions.
TRANSPORT_ERRORS: Final = (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError)

_BY_CODE: Final = {
    # Needs money or a new limit.
    "insufficient_quota": ErrorClass.QUOTA,
    "billing_hard_limit_reached": ErrorClass.QUOTA,
    "billing_not_active": ErrorClass.QUOTA,
    "billing_error": ErrorClass.QUOTA,
    "contract_spend_limit_reached": ErrorClass.QUOTA,
    "enforced_spend_limit_reached": ErrorClass.QUOTA,
    "linked_organization_spend_limit_reached": ErrorClass.QUOTA,
    "credit_balance_too_low": ErrorClass.QUOTA,
    "credit_balance_exhausted": ErrorClass.QUOTA,
    "organization_spend_limit_exceeded": ErrorClass.QUOTA,
    "organization_usage_limit_exceeded": ErrorClass.QUOTA,
    "project_spend_limit_exceeded": ErrorClass.QUOTA,
    # Passes by itself: a cap on how fast usage may grow.
    "ramp_limit_exceeded": ErrorClass.RATE_LIMITED,
    "context_length_exceeded": ErrorClass.CONTEXT_TOO_LONG,
    "model_context_window_exceeded": ErrorClass.CONTEXT_TOO_LONG,
    "exceed_context_size_error": ErrorClass.CONTEXT_TOO_LONG,
    "string_above_max_length": ErrorClass.CONTEXT_TOO_LONG,
    "content_filter": ErrorClass.CONTENT_FILTER,
    "content_policy_violation": ErrorClass.CONTENT_FILTER,
    "image_content_policy_violation": ErrorClass.CONTENT_FILTER,
    "model_not_found": ErrorClass.NOT_FOUND,
    "invalid_api_key": ErrorClass.AUTH,
    "overloaded_error": ErrorClass.OVERLOADED,
}

#: Refusals that carry no code of their own; matched in lower case.
_BY_WORDS: Final = (
    ("prompt is too long", ErrorClass.CONTEXT_TOO_LONG),
    ("maximum context length", ErrorClass.CONTEXT_TOO_LONG),
    # OpenAI's 429 for a request above the whole limit a minute: waiting never helps it.
    ("request too large for", ErrorClass.CONTEXT_TOO_LONG),
    ("credit balance is too low", ErrorClass.QUOTA),
    # Anthropic's 400 for a spend limit that the organization has set itself.
    ("reached your specified api usage limits", ErrorClass.QUOTA),
    ("blocked by content filtering", ErrorClass.CONTENT_FILTER),
    ("content management policy", ErrorClass.CONTENT_FILTER),
    ("flagged as potentially violating", ErrorClass.CONTENT_FILTER),
    ("rejected as a result of our safety system", ErrorClass.CONTENT_FILTER),
)

#: What counts only where neither a finer code nor the words say more.
_BY_BROAD_CODE: Final = {
    "rate_limit_error": ErrorClass.RATE_LIMITED,
    "rate_limit_exceeded": ErrorClass.RATE_LIMITED,
}

_BY_STATUS: Final = {
    401: ErrorClass.AUTH,
    402: ErrorClass.QUOTA,
    403: ErrorClass.AUTH,
    404: ErrorClass.NOT_FOUND,
    405: ErrorClass.NOT_FOUND,
    # Both SDKs retry 408 ("request timeouts") and 409 ("lock timeouts"), and no other 4xx but 429.
    408: ErrorClass.TIMEOUT,
    409: ErrorClass.SERVER,
    413: ErrorClass.CONTEXT_TOO_LONG,
    429: ErrorClass.RATE_LIMITED,
    503: ErrorClass.OVERLOADED,
    529: ErrorClass.OVERLOADED,
}

#: (what was raised, class, our sentence, whether the call may have left), first match counts.
_BY_EXCEPTION: Final[tuple[tuple[tuple[type[BaseException], ...], ErrorClass, str, bool], ...]] = (
    (
        (aiohttp.ClientSSLError,),
        ErrorClass.CONNECT,
        "no connection to {provider}, whose certificate or TLS is not accepted",
        False,
    ),
    (
        # Refused, unreachable, no such name, no proxy.
        (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError),
        ErrorClass.CONNECT,
        "no connection to {provider}",
        False,
    ),
    (
        (aiohttp.ConnectionTimeoutError,),
        ErrorClass.CONNECT,
        "no connection to {provider} within the connect deadline",
        False,
    ),
    (
        (aiohttp.InvalidURL, httpx2.UnsupportedProtocol, httpx2.InvalidURL),
        ErrorClass.NOT_FOUND,
        "the base_url of {provider} cannot be used",
        False,
    ),
    ((aiohttp.SocketTimeoutError,), ErrorClass.TIMEOUT, "{provider} fell silent", True),
    (
        (aiohttp.ClientResponseError, httpx2.DecodingError),
        ErrorClass.GARBAGE,
        "{provider} sent something that is not HTTP",
        True,
    ),
)

_MAX_WORDS: Final = 300
_KEY_LIKE = re.compile(r"\b(?:sk|pk|rk|key)-[\w*.-]{6,}")
_ECHO_LENGTH: Final = 24


class Fault(Exception):
    """Why a call failed, before the provider's own words were checked for what must not be told.

    `what` is our sentence, without a full stop; `words` are the provider's.
    """

    def __init__(
        self,
        error_class: ErrorClass,
        what: str,
        *,
        words: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        sent: bool = True,
        headroom: Headroom | None = None,
    ) -> None:
        super().__init__(what)
        self.error_class = error_class
        self.what = what
        self.words = words
        self.status = status
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.sent = sent
        self.headroom = headroom


def fault_of_status(
    provider: str,
    status: int,
    headers: httpx2.Headers,
    body: bytes,
    *,
    now: datetime | None = None,
) -> Fault:
    """Classify a response that is not a 2xx."""
    try:
        error = error_object(load_json(body))
    except ValueError:  # a web page, or nothing
        error = {}
    by_status = _BY_STATUS.get(status)
    if by_status is None:
        if status >= 500:
            by_status = ErrorClass.SERVER
        else:  # a 3xx means that base_url points at the wrong place: redirects are not followed
            by_status = ErrorClass.NOT_FOUND if status < 400 else ErrorClass.BAD_REQUEST
    # A server that is down may say anything; its words decide only what it refuses on purpose.
    named = _named_class(error) if status < 500 else None
    left = headroom(headers.raw, now=now)
    wait_s = retry_after_s(headers, now=now)
    if wait_s is None and status == 429 and left is not None:
        wait_s = left.reset_s
    return Fault(
        named or by_status,
        f"{provider} answered {status}",
        words=_words(error),
        status=status,
        retry_after_s=wait_s,
        request_id=request_id(headers),
        headroom=left,
    )


def fault_of_error(
    provider: str, error: Mapping[str, Any], *, otherwise: ErrorClass, status: int = 200
) -> Fault:
    """Classify an error object inside a 200: a stream's error event, or a body that is one.

    Only what names an overload, a filter, a limit of money or length is that; any other error of a
    provider that had already said 200 is `otherwise`. One that has begun and names a limit of rate
    cannot bear its load: a 429 is refused before anything is generated, and costs nothing.
    """
    named = _named_class(error)
    return Fault(
        ErrorClass.OVERLOADED if named is ErrorClass.RATE_LIMITED else named or otherwise,
        f"{provider} reported an error after it had begun to answer",
        words=_words(error),
        status=status,
    )


def fault_of_exception(provider: str, error: BaseException, *, answering: bool) -> Fault:
    """Classify a failure of the connection; `answering` tells whether a 2xx had arrived.

    The SDKs' aiohttp transport maps several causes to one httpx exception (a server that hangs up
    becomes a connect timeout), so the cause itself decides.
    """
    for cause in _causes(error):
        for types, error_class, what, sent in _BY_EXCEPTION:
            if isinstance(cause, types):
                return Fault(
                    error_class,
                    what.format(provider=provider),
                    words=getattr(cause, "strerror", None),
                    sent=sent,
                )
    if answering:
        return Fault(
            ErrorClass.STREAM_BROKEN,
            f"the connection to {provider} broke in the middle of the answer",
        )
    return Fault(ErrorClass.CONNECT, f"the connection to {provider} broke before an answer began")


def error_object(body: Any) -> dict[str, Any]:
    """Return the error inside a decoded body; anything of another shape gives an empty one."""
    error = body.get("error", body) if isinstance(body, dict) else None
    if isinstance(error, str):  # some compatible servers send no object
        return {"message": error}
    return error if isinstance(error, dict) else {}


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the provider's id of the request: OpenAI's header, or Anthropic's."""
    return headers.get("x-request-id") or headers.get("request-id")


def retry_after_s(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """Return how long the provider asks us to wait: milliseconds, seconds, or until a date."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait_s = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if isfinite(wait_s) and wait_s >= 0:
            return wait_s
    try:
        until = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, OverflowError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


def sentence(fault: Fault, spec: JobSpec, api_key: Secret) -> str:
    """Say what happened in one sentence that may be stored, logged and shown.

    The provider's own words are added unless they repeat a piece of the request; whatever looks
    like a key is taken out. Only their first sentence is kept, but for a filter's: all of them are
    its reason.
    """
    what = fault.what[0].upper() + fault.what[1:]
    words = " ".join((fault.words or "").split())
    if len(api_key) > 7:
        words = words.replace(api_key.get_secret_value(), "[key]")
    words = _KEY_LIKE.sub("[key]", words)
    if fault.error_class is not ErrorClass.CONTENT_FILTER:
        words = words.split(". ")[0]
    words = words.rstrip(".")
    if not words:
        return f"{what} ({fault.error_class.replace('_', ' ')})."
    if _echoes(words, spec):
        return f"{what}, in words that repeat the request ({fault.error_class.replace('_', ' ')})."
    if len(words) > _MAX_WORDS:
        words = words[:_MAX_WORDS].rstrip() + "…"
    return f"{what}: {words}."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):  # a chain may be a circle
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _named_class(error: Mapping[str, Any]) -> ErrorClass | None:
    details = error.get("details")
    codes = (
        error.get("code"),
        details.get("error_code") if isinstance(details, dict) else None,
        error.get("type"),
    )
    for code in codes:
        if isinstance(code, str) and code in _BY_CODE:
            return _BY_CODE[code]
    message = (_words(error) or "").lower()
    for words, named in _BY_WORDS:
        if words in message:
            return named
    for code in codes:
        if isinstance(code, str) and code in _BY_BROAD_CODE:
            return _BY_BROAD_CODE[code]
    return None


def _words(error: Mapping[str, Any]) -> str | None:
    message = error.get("message") or error.get("detail")
    return message if isinstance(message, str) else None


def _echoes(words: str, spec: JobSpec) -> bool:
    """Whether `words` repeat a piece of the request.

    Every piece of 24 characters and more is found, because one that long covers one of the blocks
    of 12 that are looked for; a text that is shorter itself is looked for as a whole.
    """
    said = [spec.system or ""]
    for message in spec.messages:
        for part in message.content:
            if isinstance(part, TextPart):
                said.append(part.text)
            elif isinstance(part, ToolResultPart):
                said.append(part.content)
    texts = [" ".join(text.split()) for text in said]
    step = _ECHO_LENGTH // 2
    blocks = [words[start : start + step] for start in range(0, len(words) - step + 1, step)]
    return any(
        (8 <= len(text) < _ECHO_LENGTH and text in words) or any(block in text for block in blocks)
        for text in texts
        if text
    )
