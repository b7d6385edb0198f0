"""How one call goes at the sandbox provider: its clock, its faults, its bill."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sluicegate.workers.local.sandbox_answers import Answer, Ask, answer
from sluicegate.workers.local.sandbox_faults import REFUSALS, Fault, FaultArgs, Strike
from sluicegate.workers.local.sandbox_http import Exchange
from sluicegate.workers.local.sandbox_limits import Meter, Shortage
from sluicegate.workers.local.sandbox_log import Call, CallLog
from sluicegate.workers.local.sandbox_prices import Usage
from sluicegate.workers.local.sandbox_wire import Reply, Script, Wire

#: Between the last bytes and a reset, so that the client has read them.
RESET_DELAY_S = 0.02
GARBAGE = b"<html><body><h1>502 Bad Gateway</h1><p>A proxy spoke out of turn.</p></body></html>"

#: What the model says that does not keep to a schema.
BAD_JSON = '{"sandbox": ["this is not what was asked for"]}'

#: What the model says that declines.
DECLINES = "I'm sorry, but I cannot help with that."

#: Calls with these never get as far as the model, nor count against a limit.
_TURNED_AWAY = REFUSALS | {Fault.RESET_BEFORE_HEADERS}
_BREAKS = frozenset({Fault.STALL, Fault.CUT_STREAM, Fault.TRUNCATED_STREAM, Fault.ERROR_EVENT})
_NO_ARGS = FaultArgs()

HeaderText = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]+$", max_length=1_000)]
Milliseconds = Annotated[float, Field(ge=0, le=3_600_000)]


class Pace(BaseModel):
    """How fast the provider answers; can be changed while it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Until an answer that is not streamed.
    latency_ms: Milliseconds = 300
    #: Up to this much is added to both waits, by the hash of the prompt.
    latency_jitter_ms: Milliseconds = 0
    #: Until the first token of a stream.
    first_token_ms: Milliseconds = 100
    #: Speed of a stream; 0 sends everything with the first token.
    tokens_per_s: Annotated[float, Field(ge=0)] = 100
    #: Headers added to every answer or put in place of the usual ones.
    headers: Annotated[dict[HeaderText, HeaderText], Field(max_length=100)] = {}


class Wheel:
    """Timers rounded up to a tick, so that a thousand streams share one wake-up."""

    TICK_S = 0.002

    def __init__(self) -> None:
        self._due: dict[int, list[Callable[[], None]]] = {}

    def at(self, when_s: float, callback: Callable[[], None]) -> None:
        """Run a callback at a time of the event loop's clock, never before it."""
        tick = math.ceil(when_s / self.TICK_S)
        if tick in self._due:
            self._due[tick].append(callback)
        else:
            self._due[tick] = [callback]
            asyncio.get_running_loop().call_at(tick * self.TICK_S, self._run, tick)

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Run a callback after a delay, or at once if there is none."""
        if delay_s <= 0:
            callback()
        else:
            self.at(asyncio.get_running_loop().time() + delay_s, callback)

    def _run(self, tick: int) -> None:
        for callback in self._due.pop(tick):
            callback()


class RunningCall:
    """One call from arrival to its end."""

    __slots__ = (
        "_answer",
        "_args",
        "_ask",
        "_call",
        "_digest",
        "_exchange",
        "_fault",
        "_first_token_at_s",
        "_headers",
        "_limit",
        "_log",
        "_meter",
        "_pace",
        "_script",
        "_sent",
        "_started",
        "_wheel",
        "_wire",
    )

    def __init__(
        self,
        *,
        wire: Wire,
        ask: Ask,
        digest: bytes,
        strike: Strike | None,
        call: Call,
        exchange: Exchange,
        pace: Pace,
        log: CallLog,
        wheel: Wheel,
    ) -> None:
        self._wire = wire
        self._ask = ask
        self._digest = digest
        self._call = call
        self._exchange = exchange
        self._headers = b""
        self._pace = pace
        self._log = log
        self._wheel = wheel
        self._meter: Meter | None = None
        self._fault = strike.fault if strike else None
        self._args = strike.args if strike else _NO_ARGS
        self._answer = self._make_answer()
        self._script: Script | None = None
        self._first_token_at_s = 0.0
        self._limit = 0  # tokens after which the stream ends, or breaks
        self._sent = 0  # tokens sent so far, reasoning included
        self._started = False

    def enter(self, meter: Meter) -> Shortage | None:
        """Count against the limits, or say which of them stands in the way."""
        if self._fault in _TURNED_AWAY:
            return None
        shortage = meter.enter(self._answer.usage, asyncio.get_running_loop().time())
        if shortage is None:
            self._meter = meter
        return shortage

    def start(self, headers: bytes, shortage: Shortage | None = None) -> None:
        """Answer as the request, the pace, the fault and the limits have it.

        `headers` are complete lines.
        """
        self._headers = headers
        self._exchange.on_gone = self._on_gone
        if shortage is not None:
            self._turn_away(shortage)
            return
        match self._fault:
            case Fault.HANG:
                self._bill(None)
            case Fault.RESET_BEFORE_HEADERS:
                self._wheel.after(self._args.delay_ms / 1000, self._reset_unanswered)
            case fault if fault in REFUSALS:
                self._wheel.after(self._args.delay_ms / 1000, self._refuse)
            case Fault.GARBAGE_BODY:
                self._wheel.after(self._args.delay_ms / 1000, self._send_garbage)
            case _ if self._ask.stream:
                self._start_stream()
            case _:
                self._wheel.after(self._whole_delay_s(), self._send_whole)

    # the answer

    def _make_answer(self) -> Answer:
        text = None
        if self._fault is Fault.ANSWER_TEXT:
            text = self._args.text
        elif self._fault is Fault.BAD_JSON:
            text = BAD_JSON
        if self._fault is Fault.REFUSAL:
            made = answer(self._ask, self._digest, text=DECLINES)
            made.stop = "refusal"
            return made
        made = answer(self._ask, self._digest, text=text)
        if self._fault is Fault.CONTENT_FILTER:
            kept = int(made.usage.output * self._args.fraction)
            usage = made.usage.cut(kept)
            pieces = made.pieces()[: usage.output - usage.reasoning]
            made = Answer(text="".join(pieces), stop="filter", usage=usage)
        return made

    def _reply(self) -> Reply:
        return Reply(
            ask=self._ask,
            answer=self._answer,
            answer_id=self._call.request_id.removeprefix("req_"),
            created=int(time.time()),
            usage=self._fault is not Fault.NO_USAGE and self._args.usage,
            terminal=self._fault is not Fault.MISSING_TERMINAL,
        )

    # the clock

    def _jitter_ms(self) -> float:
        return self._digest[8] / 255 * self._pace.latency_jitter_ms

    def _tokens_per_s(self) -> float:
        if self._fault is Fault.SLOW_DRIP:
            return self._args.tokens_per_s
        return self._pace.tokens_per_s

    def _first_token_delay_s(self) -> float:
        if self._fault is Fault.SLOW_FIRST_TOKEN:
            return self._args.first_token_ms / 1000
        return (self._pace.first_token_ms + self._jitter_ms()) / 1000

    def _whole_delay_s(self) -> float:
        if self._fault is Fault.SLOW_FIRST_TOKEN:
            return self._args.first_token_ms / 1000
        if self._fault is Fault.SLOW_DRIP:
            return self._answer.usage.output / self._args.tokens_per_s
        return (self._pace.latency_ms + self._jitter_ms()) / 1000

    # answers that are not streamed

    def _send_whole(self) -> None:
        self._call.status = 200
        if self._fault is Fault.ERROR_EVENT:
            body = self._wire.trouble(Fault.HTTP_500, self._call.request_id, self._args.message)[1]
            self._end(None)
            self._exchange.respond(200, body, headers=self._headers)
            return
        body = self._wire.whole(self._reply())
        part = body[: int(len(body) * self._args.fraction)]
        match self._fault:
            case Fault.STALL | Fault.CUT_STREAM | Fault.RESET_AFTER_HEADERS:
                self._exchange.start(200, headers=self._headers, length=len(body))
                if self._fault is not Fault.RESET_AFTER_HEADERS:
                    self._exchange.write(part)
                if self._fault is Fault.STALL and not self._exchange.gone:
                    self._bill(self._answer.usage)
                else:
                    self._reset(self._answer.usage)
                return
            case Fault.TRUNCATED_STREAM:
                body = part
            case Fault.MALFORMED_CHUNK:
                body = part + b"\x00{" + body[len(part) :]
        self._end(self._answer.usage)
        self._exchange.respond(200, body, headers=self._headers)

    def _send_garbage(self) -> None:
        self._call.status = 200
        self._end(self._answer.usage)
        self._exchange.respond(200, GARBAGE, content_type=b"text/html", headers=self._headers)

    def _turn_away(self, shortage: Shortage) -> None:
        """Answer 429 for a limit."""
        self._log.limit(self._call, shortage.dimension)
        said = self._wire.shortage(self._ask.model, shortage)
        self._call.status, body = self._wire.trouble(Fault.HTTP_429, self._call.request_id, said)
        headers = self._headers
        if shortage.retry_after_s is not None:
            named = self._wire.retry_after(shortage.retry_after_s)
            headers += "".join(f"{name}: {value}\r\n" for name, value in named.items()).encode()
        self._log.finish(self._call)
        self._exchange.respond(self._call.status, body, headers=headers)

    def _refuse(self) -> None:
        assert self._fault is not None
        status, body = self._wire.trouble(self._fault, self._call.request_id, self._args.message)
        headers = self._headers
        if self._args.retry_after_s is not None:
            headers += b"retry-after: %b\r\n" % f"{self._args.retry_after_s:g}".encode()
        if self._args.retry_after_ms is not None:
            headers += b"retry-after-ms: %b\r\n" % f"{self._args.retry_after_ms:g}".encode()
        self._call.status = status
        self._end(None)
        self._exchange.respond(status, body, headers=headers)

    # streams

    def _start_stream(self) -> None:
        script = self._script = self._wire.script(self._reply())
        tokens = self._answer.usage.output
        if self._fault is Fault.MALFORMED_CHUNK and script.frames:
            last = len(script.frames) - 1
            script.frames[int(last * self._args.fraction)] = self._wire.malformed_frame
        self._limit = int(tokens * self._args.fraction) if self._fault in _BREAKS else tokens
        if script.prelude or self._fault is Fault.RESET_AFTER_HEADERS:
            self._send_head()
        if self._fault is Fault.RESET_AFTER_HEADERS:
            self._reset(self._answer.usage.cut(0))
            return
        if script.prelude:
            self._exchange.write_chunk(script.prelude)
        delay_s = self._first_token_delay_s()
        self._first_token_at_s = asyncio.get_running_loop().time() + delay_s
        self._wheel.after(delay_s, self._pump)

    def _send_head(self) -> None:
        self._started = True
        self._call.status = 200
        content_type = b"text/event-stream; charset=utf-8"
        self._exchange.start(200, content_type=content_type, headers=self._headers)

    def _tokens_due(self) -> int:
        """How many tokens of the stream have been generated by now."""
        age_s = asyncio.get_running_loop().time() - self._first_token_at_s
        # A microsecond of grace: the next token is due at exactly the time the wheel was given.
        age_s += 1e-6
        if age_s < 0:
            return 0
        speed = self._tokens_per_s()
        due = 1 + int(age_s * speed) if speed else self._limit
        return min(due, self._limit)

    def _pump(self) -> None:
        """Send every token that is due, then sleep until the next one is."""
        script = self._script
        if script is None or self._call.finished_at is not None or self._exchange.gone:
            return
        if self._exchange.slow_reader:
            self._wheel.after(0.01, self._pump)
            return
        hidden = self._answer.usage.reasoning
        due = self._tokens_due()
        out = script.frames[max(0, self._sent - hidden) : max(0, due - hidden)]
        if self._sent == 0:
            out.insert(0, script.opening)
            if not self._started:
                self._send_head()
        self._sent = due
        if due >= self._limit:
            self._end_stream(b"".join(out), script)
            return
        if out:
            self._exchange.write_chunk(b"".join(out))
        next_at_s = self._first_token_at_s + due / self._tokens_per_s()
        self._wheel.at(next_at_s, self._pump)

    def _end_stream(self, out: bytes, script: Script) -> None:
        so_far = self._answer.usage.cut(self._sent)
        match self._fault:
            case Fault.STALL:
                self._write_last(out)
                self._bill(so_far)
            case Fault.CUT_STREAM:
                self._write_last(out)
                self._reset(so_far)
            case Fault.TRUNCATED_STREAM:
                self._write_last(out)
                self._end(so_far)
                self._exchange.end_chunks()
            case Fault.ERROR_EVENT:
                event = self._wire.error_event(self._call.request_id, self._args.message)
                self._write_last(out + event)
                self._end(so_far)
                self._exchange.end_chunks()
            case Fault.MISSING_TERMINAL if self._args.then == "hold":
                self._write_last(out + script.ending)
                self._bill(so_far)
            case Fault.MISSING_TERMINAL if self._args.then == "close":
                self._write_last(out + script.ending)
                self._end(so_far)
                self._exchange.close()
            case _:
                self._write_last(out + script.ending)
                self._end(so_far)
                self._exchange.end_chunks()

    def _write_last(self, out: bytes) -> None:
        if out:  # an empty chunk would end the body
            self._exchange.write_chunk(out)

    # the end

    def _bill(self, usage: Usage | None) -> None:
        """Bill what was generated, unless the fault says what to bill."""
        if self._args.billed is not None:
            usage = self._answer.usage if self._args.billed else None
        if usage is not None:
            self._log.bill(self._call, usage)

    def _end(self, usage: Usage | None) -> None:
        self._bill(usage)
        self._log.finish(self._call)
        if self._meter is not None:
            self._meter.leave()
            self._meter = None

    def _reset(self, usage: Usage | None) -> None:
        self._end(usage)
        self._wheel.after(RESET_DELAY_S, self._exchange.reset)

    def _reset_unanswered(self) -> None:
        self._end(None)
        self._exchange.reset()

    def _on_gone(self) -> None:
        """Take note that the client left: a stream ends there, a whole answer is made anyway."""
        if self._call.finished_at is not None:
            return  # it was we who ended it
        self._call.client_gone = True
        if self._script is not None:
            self._end(self._answer.usage.cut(self._tokens_due()))
        elif self._fault is Fault.HANG or self._call.status is not None:
            self._end(None)
