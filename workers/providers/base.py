"""What a provider's adapter is asked, what it answers, and how it fails: the same for each wire."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, Protocol, TypedDict
from urllib.parse import urlsplit

from sluicegate.shared.addresses import is_loopback
from sluicegate.shared.admission.headroom import Headroom
from sluicegate.shared.errors import ErrorClass, SluiceError
from sluicegate.shared.jobs import JobSpec
from sluicegate.shared.messages import ToolCallPart, Usage
from sluicegate.shared.provider_keys import KEY_VARIABLES, is_sendable
from sluicegate.shared.secrets import Secret

ProviderKind = Literal["openai", "anthropic"]

#: Sent where no key is set and the provider is on this machine.
SANDBOX_KEY: Final = Secret("sandbox")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long each part of a call may take; whichever passes first ends it."""

    #: To a connection, TLS and name lookup included.
    connect_s: float
    #: From the start to the first piece of the answer; streamed calls only.
    first_token_s: float
    #: From the start to the whole answer of a call that is not streamed.
    response_s: float
    #: Between two reads of a stream that has begun.
    idle_s: float
    #: The whole call.
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One paid request to one model."""

    spec: JobSpec
    #: The provider's own name for the model.
    model: str
    max_tokens: int
    #: Whether the provider is to be streamed; `on_delta` is called only then.
    stream: bool
    deadlines: Deadlines


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said, complete: a call that did not reach its proper end is never one."""

    text: str
    tool_calls: tuple[ToolCallPart, ...]
    #: `stop`, `length` or `tool_calls`; a word of the provider's that has no counterpart is passed
    #: through as it is (Anthropic's `pause_turn`). A filtered answer is a ProviderError.
    finish_reason: str
    #: The model that the provider says has answered.
    model: str
    #: None: the provider sent none, which is not the same as zero.
    usage: Usage | None
    #: The provider's own usage object.
    raw_usage: dict[str, Any] | None
    request_id: str | None
    #: None when not streamed, and when nothing but the end was streamed.
    first_token_ms: int | None
    duration_ms: int
    service_tier: str | None
    #: What the provider's headers say is left of its limits; None: they say nothing.
    headroom: Headroom | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """What had arrived when a call failed: the ground for its cost."""

    text: str = ""
    usage: Usage | None = None
    raw_usage: dict[str, Any] | None = None
    #: True: `usage` is the provider's final count. False: it is a lower bound.
    exact: bool = False
    #: The model that the provider named, and how it says the call was served, if it came that far.
    model: str | None = None
    service_tier: str | None = None


class ProviderError(SluiceError):
    """The call brought no answer.

    The message is one sentence for people and holds neither a key nor a piece of the prompt.
    `sent` is False only if the call certainly never left: then it costs nothing.
    `retry_after_s` is what the provider asked for; where a 429 does not say, until the limit that
    its headers show as used up is back. `headroom` is what they say is left, None if the call
    brought no answer with any. `partial` says what had arrived.
    """

    def __init__(
        self,
        message: str,
        *,
        error_class: ErrorClass,
        status: int | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        sent: bool = True,
        partial: Partial | None = None,
        headroom: Headroom | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.error_class = error_class
        self.status = status
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.sent = sent
        self.partial = partial or Partial()
        self.headroom = headroom


class ToolCallFragment(TypedDict, total=False):
    """More of a tool call, in the shape of `events.ToolCallDelta`; `index` is always there."""

    index: int
    id: str
    name: str
    arguments: str


#: Gets each new piece of a streamed answer, text and fragments; it must be quick and not block.
DeltaSink = Callable[[str, tuple[ToolCallFragment, ...]], None]


class Adapter(Protocol):
    """Speaks one wire format to one endpoint with one key, within one event loop."""

    @property
    def in_flight(self) -> int:
        """Calls that run now."""
        ...

    async def call(self, call: Call, on_delta: DeltaSink | None = None) -> Answer:
        """Make one call, once: nothing is retried here.

        Raises ProviderError. A cancellation passes through, and the connection is given up.
        """
        ...

    async def close(self) -> None:
        """Close all connections; the adapter cannot be used again."""
        ...


#: Wire, endpoint and key.
_Identity = tuple[ProviderKind, str | None, Secret]


class Adapters:
    """The adapters of a process: one for each endpoint and key, made when first used.

    max_connections: how many calls one adapter makes at once; more wait up to the connect deadline
    and then fail as `pool_timeout`, so keep it above the limit of jobs in flight.
    max_adapters: beyond it the adapter idle for longest is closed, because keys come and go.

    Belongs to one event loop, which must run in `get`. Close it there.
    """

    def __init__(self, *, max_connections: int, max_adapters: int = 256) -> None:
        self._max_connections = max_connections
        self._max_adapters = max_adapters
        self._adapters: OrderedDict[_Identity, Adapter] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, provider: ProviderKind, base_url: str | None, api_key: Secret | None) -> Adapter:
        """Return the adapter for this endpoint; `base_url` None is the provider's official one.

        Raises ProviderError, never sent: `auth` when there is no usable key (one is not needed on
        this machine's own addresses), `not_found` when `base_url` is no URL.
        """
        local = base_url is not None and _is_local(base_url)
        key = Secret(api_key.get_secret_value().strip() if api_key else "")
        if local and not key:
            key = SANDBOX_KEY
        identity = (provider, base_url, key)
        adapter = self._adapters.get(identity)
        if adapter is None:
            _check_url(provider, base_url)
            _check_key(provider, key)
            adapter = self._adapters[identity] = self._make(provider, base_url, key, local=local)
            self._close_surplus()
        self._adapters.move_to_end(identity)
        return adapter

    async def close(self) -> None:
        """Close every adapter."""
        adapters = [*self._adapters.values()]
        self._adapters.clear()
        await asyncio.gather(*(adapter.close() for adapter in adapters), *self._closing)

    def _make(
        self, provider: ProviderKind, base_url: str | None, key: Secret, *, local: bool
    ) -> Adapter:
        # Imported here because an SDK takes a second to import, and a pool needs only its own.
        if provider == "openai":
            from sluicegate.workers.providers.openai import OpenAIAdapter  # noqa: PLC0415

            return OpenAIAdapter(
                base_url=base_url,
                api_key=key,
                max_connections=self._max_connections,
                use_proxy=not local,
            )
        from sluicegate.workers.providers.anthropic import AnthropicAdapter  # noqa: PLC0415

        return AnthropicAdapter(
            base_url=base_url,
            api_key=key,
            max_connections=self._max_connections,
            use_proxy=not local,
        )

    def _close_surplus(self) -> None:
        for identity, adapter in [*self._adapters.items()][:-1]:
            if len(self._adapters) <= self._max_adapters:
                return
            if not adapter.in_flight:
                del self._adapters[identity]
                task = asyncio.get_running_loop().create_task(adapter.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)


@lru_cache(maxsize=256)  # asked for at every call
def _is_local(base_url: str) -> bool:
    try:
        return is_loopback(urlsplit(base_url).hostname or "")
    except ValueError:  # no URL at all
        return False


def _check_url(provider: ProviderKind, base_url: str | None) -> None:
    if base_url is None:
        return
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ProviderError(
            f"The base_url of this {provider} provider must look like https://host/path.",
            error_class=ErrorClass.NOT_FOUND,
            sent=False,
        )


def _check_key(provider: ProviderKind, key: Secret) -> None:
    if not key:
        raise ProviderError(
            f"There is no {provider} key: set {KEY_VARIABLES[provider]}, or run "
            f"`sluice secrets set {provider}`; a provider with a base_url needs a key of its own.",
            error_class=ErrorClass.AUTH,
            sent=False,
        )
    if not is_sendable(key):
        raise ProviderError(
            f"The {provider} key holds characters that cannot be sent: check "
            f"{KEY_VARIABLES[provider]}, or run `sluice secrets set {provider}` again.",
            error_class=ErrorClass.AUTH,
            sent=False,
        )
