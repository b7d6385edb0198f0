"""Providers that fail, throttle, hang or break off: the caller gets the complete answer anyway.

Each case has an account with candidates of its own, and all their jobs run side by side from the
start: most of their time is waiting for what does not come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from typing import Any
from uuid import UUID

import pytest

from sluicegate import Completed, Result
from sluicegate.shared.events import Delta, Event, Reset, Started
from sluicegate.workers.local.sandbox_answers import prose
from tests.candidates import Candidate, add_candidates, other
from tests.harness import Rig

POOLS = ("openai", "anthropic")
WAIT_S = 60
#: Of jobs, in seconds: much longer than any of them takes.
DEADLINE_S = 40
TOKENS = 120
#: What the second candidate says, so that it cannot be mistaken for the first one's answer.
SECOND = "The second candidate said this from its first word to its very last one. " * 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What befalls the first candidate, and what may come of it."""

    fault: str
    args: dict[str, Any] = field(default_factory=dict)
    #: The error class of a call there that is streamed, and of one that is not.
    streamed: str
    whole: str
    most_calls: int = 1
    #: See `Case`.
    recovers: bool | None = False
    #: A part of the answer is read before a stream breaks.
    begins: bool = False


def _refused(status: int, error_class: str, **more: Any) -> Trouble:
    return Trouble(fault=f"http_{status}", streamed=error_class, whole=error_class, **more)


def _broken(fault: str, streamed: str, whole: str, **args: Any) -> Trouble:
    return Trouble(fault=fault, args=args, streamed=streamed, whole=whole, begins=True)


TROUBLES = {
    "throttled-2s": _refused(
        429, "rate_limited", args={"retry_after_s": 2, "times": 1}, most_calls=2, recovers=None
    ),
    "throttled": _refused(429, "rate_limited", most_calls=6),
    "error-once": _refused(500, "server", args={"times": 1}, most_calls=2, recovers=True),
    "error": _refused(500, "server", most_calls=2),
    "unavailable": _refused(503, "overloaded"),
    "overloaded": _refused(529, "overloaded"),
    "reset": Trouble(
        fault="reset_before_headers", streamed="connect", whole="connect", most_calls=2
    ),
    "silent": Trouble(fault="hang", streamed="timeout", whole="timeout"),
    "late": Trouble(
        fault="slow_first_token",
        args={"first_token_ms": 20_000},
        streamed="timeout",
        whole="timeout",
    ),
    "cut": _broken("cut_stream", "stream_broken", "stream_broken", fraction=0.67),
    "stalled": _broken("stall", "timeout", "timeout", fraction=0.67),
    "malformed": _broken("malformed_chunk", "stream_broken", "garbage"),
    "error-event": _broken("error_event", "stream_broken", "garbage"),
    "unmarked-billed": _broken("missing_terminal", "truncated", "truncated", then="hold"),
    "unmarked": _broken("missing_terminal", "truncated", "truncated", usage=False),
    "unmarked-held": _broken(
        "missing_terminal", "truncated", "truncated", usage=False, then="hold"
    ),
}

#: What one candidate alone gets over: there is nobody else to ask.
ALONE = {
    "throttled-2s": TROUBLES["throttled-2s"],
    "error-once": TROUBLES["error-once"],
    "silent-once": Trouble(
        fault="hang",
        args={"times": 1},
        streamed="timeout",
        whole="timeout",
        most_calls=2,
        recovers=True,
    ),
    "cut-twice": Trouble(
        fault="cut_stream",
        args={"times": 2},
        streamed="stream_broken",
        whole="stream_broken",
        most_calls=3,
        recovers=True,
        begins=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A trouble at the first candidate of a pool, and where the next one is."""

    trouble: str
    pool: str
    stream: bool
    #: `alone`, `within` the same pool or `across` to the other.
    reach: str

    @property
    def name(self) -> str:
        """Its account's name."""
        how = "streamed" if self.stream else "whole"
        return f"{self.trouble}-{self.pool}-{how}-{self.reach}"

    @property
    def of_trouble(self) -> Trouble:
        return (ALONE if self.reach == "alone" else TROUBLES)[self.trouble]

    @property
    def pools(self) -> list[str]:
        """Those of its candidates."""
        others = {"alone": [], "within": [self.pool], "across": [other(self.pool)]}
        return [self.pool, *others[self.reach]]

    @property
    def error_class(self) -> str:
        trouble = self.of_trouble
        if self.trouble == "error-event" and self.stream and self.pool == "anthropic":
            return "overloaded"  # it says so
        return trouble.streamed if self.stream else trouble.whole

    @property
    def recovers(self) -> bool | None:
        """Whether the first candidate answers in the end; None: either may."""
        if self.trouble == "unmarked-billed" and self.stream and self.pool == "openai":
            return True  # finish reason and usage have come: the answer is whole without `[DONE]`
        return self.of_trouble.recovers


CASES = [
    Case(*one)
    for troubles, reaches in ((TROUBLES, ("within", "across")), (ALONE, ("alone",)))
    for one in product(troubles, POOLS, (False, True), reaches)
]


@dataclass(frozen=True, slots=True)
class Run:
    """A case's job, as the test finds it."""

    case: Case
    candidates: list[Candidate]
    job_id: UUID


@pytest.fixture(scope="module")
def runs(module_rig: Rig) -> Iterator[dict[Case, Run]]:
    """Start the fleet, then the jobs of all cases."""
    rig = module_rig
    rig.settings = rig.settings.model_copy(
        update={"first_token_deadline_s": 2.0, "response_deadline_s": 3.0, "idle_deadline_s": 2.0}
    )
    sandbox = rig.sandbox
    usual = sandbox.settings()
    sandbox.reset()
    # Slow enough for a reader to see a part of each stream before it breaks.
    sandbox.settings(tokens_per_s=400)
    found = add_candidates(rig, accounts={case.name: case.pools for case in CASES})
    for case in CASES:
        _trouble(rig, case, found[case.name])
    workers = [rig.begin_worker(pool, ["general"]) for pool in POOLS]
    rig.start_sweep()
    for worker in workers:
        rig.await_worker(worker)
    yield {case: Run(case, found[case.name], _submit(rig, case)) for case in CASES}
    sandbox.reset()
    sandbox.settings(**usual)


def _trouble(rig: Rig, case: Case, candidates: list[Candidate]) -> None:
    first, *others = candidates
    trouble = case.of_trouble
    rig.sandbox.add_fault(trouble.fault, model=first.model, **trouble.args)
    for second in others:
        rig.sandbox.add_fault("answer_text", model=second.model, text=SECOND)


def _submit(rig: Rig, case: Case) -> UUID:
    (job_id,) = rig.submit(
        "general",
        1,
        text=f"Summarise the call.\nTOKENS: {TOKENS}",
        account=case.name,
        stream=case.stream,
        deadline=DEADLINE_S,
    )
    return job_id


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_caller_gets_the_complete_answer(
    module_rig: Rig, runs: dict[Case, Run], case: Case
) -> None:
    rig, run = module_rig, runs[case]
    result = rig.client.handle(run.job_id).result(WAIT_S)
    answered = next(one for one in run.candidates if one.name == result.provider)
    first = run.candidates[0]
    if case.recovers is not None:
        assert (answered is first) == case.recovers
    assert result.model == answered.model
    texts = {one.name: SECOND for one in run.candidates} | {first.name: _first_text(rig, run)}
    assert result.text == texts[answered.name]
    assert result.finished_at is not None
    assert result.finished_at <= rig.client.get(run.job_id).deadline_at
    _check_calls(rig, run, answered)
    _check_reader(rig, run, answered, result)
    _check_books(rig, run, result)


def test_a_reader_is_told_to_discard_what_it_has_seen(
    module_rig: Rig, runs: dict[Case, Run]
) -> None:
    """What is shown of a stream before it breaks is a matter of moments; here some was."""
    broken = [run for case, run in runs.items() if case.stream and case.of_trouble.begins]
    shown = 0
    for run in broken:
        events = list(module_rig.client.handle(run.job_id).events(timeout=WAIT_S))
        *discarded, _ = _seen(events)
        shown += any(text for _, text in discarded)
    assert shown >= len(broken) // 4


def _first_text(rig: Rig, run: Run) -> str:
    (row,) = rig.rows(
        "SELECT request -> 'messages' -> 0 -> 'content' -> 0 ->> 'text' AS prompt"
        " FROM job_bodies WHERE job_id = %(id)s",
        id=run.job_id,
    )
    return prose(sha256(row.prompt.encode()).digest(), tokens=TOKENS)


def _check_calls(rig: Rig, run: Run, answered: Candidate) -> None:
    """The first candidate was called as often as is allowed; each call is one line of history."""
    case, first = run.case, run.candidates[0]
    calls = rig.calls([run.job_id])[run.job_id]
    began = [call["started_at"] for call in calls if call["model"] == first.model]
    assert 1 <= len(began) <= case.of_trouble.most_calls, calls
    assert sum(at <= began[0] + 3 for at in began) <= 4
    if case.trouble == "throttled-2s":
        assert all(at >= began[0] + 1.8 for at in began[1:])
    # Who was called for is asked in the end, and was so once.
    wanted = [first.model] * len(began)
    assert [call["model"] for call in calls] == wanted + [answered.model] * (answered is not first)

    attempts = sorted(rig.attempts([run.job_id])[run.job_id], key=lambda attempt: attempt.id)
    assert [attempt.model for attempt in attempts] == [call["model"] for call in calls]
    failed = [case.error_class] * (len(attempts) - 1)
    assert [attempt.error_class for attempt in attempts] == [*failed, None]
    assert [attempt.state for attempt in attempts] == ["failed"] * len(failed) + ["succeeded"]
    for attempt, call in zip(attempts, calls, strict=True):
        # Not all that failed came so far as to be given an id.
        assert attempt.request_id in (call["request_id"], None)
    workers = {attempt.worker_id for attempt in attempts}
    assert len(workers) == 1 + (answered.pool != first.pool)


def _check_reader(rig: Rig, run: Run, answered: Candidate, result: Result) -> None:
    """A reader sees one attempt's text after the other, and never two as if they were one."""
    case = run.case
    events = list(rig.client.handle(run.job_id).events(timeout=WAIT_S))
    seen = _seen(events)
    assert seen[-1] == (answered.model, result.text if case.stream else "")
    last = events[-1].payload
    assert isinstance(last, Completed)
    assert last.result == result
    for model, text in seen[:-1]:
        assert model == run.candidates[0].model
        assert _first_text(rig, run).startswith(text)
        assert not text or (case.stream and case.of_trouble.begins)


def _seen(events: list[Event]) -> list[tuple[str, str]]:
    """What a reader has of each attempt: its model, and all its text."""
    seen: list[tuple[str, str]] = []
    for event in events:
        match event.payload:
            case Started(model=model):
                assert not any(text for _, text in seen), "what came before is to be discarded"
                seen.append((model, ""))
            case Reset(model=model):
                seen.append((model, ""))
            case Delta(text=text):
                model, before = seen.pop()
                seen.append((model, before + text))
            case _:
                assert event is events[-1]
    return seen


def _check_books(rig: Rig, run: Run, result: Result) -> None:
    """Each call is booked, what was answered as it was billed, and the job costs their sum."""
    rig.check_books([run.job_id])
    view = rig.client.get(run.job_id)
    costs = [attempt.cost_nano_usd or 0 for attempt in view.history]
    assert result.cost_nano_usd == view.cost_nano_usd == sum(costs)
    assert rig.booked_nano_usd([run.job_id]) == result.cost_nano_usd
    *_, last = rig.calls([run.job_id])[run.job_id]
    (paid,) = [attempt for attempt in view.history if attempt.state == "succeeded"]
    assert paid.cost_nano_usd == last["billed_nano_usd"] > 0
    if run.case.error_class in ("rate_limited", "server", "overloaded") and not (
        run.case.of_trouble.begins
    ):
        # What was refused with a status costs nothing, and a 429 is no attempt.
        assert result.cost_nano_usd == paid.cost_nano_usd
    is_free = run.case.error_class == "rate_limited"
    assert view.attempts == (1 if is_free else len(view.history))
