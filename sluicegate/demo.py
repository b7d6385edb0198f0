"""`sluice demo`: 60 CRM jobs through a whole fleet on this machine, with nothing left behind."""

# What takes long to import is imported once the command runs.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import chdir, contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from pydantic import SecretStr
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sluicegate.demo_tally import Group, Tally
from sluicegate.shared.errors import SettingsError, SluiceError
from sluicegate.shared.settings import Settings, load_settings

if TYPE_CHECKING:
    from sluicegate.producers.client import Sluice
    from sluicegate.producers.handles import JobHandle
    from sluicegate.shared.jobs import Result
    from sluicegate.workers.local.fleet import Fleet

app = typer.Typer(pretty_exceptions_enable=False)

#: One entry of the data set: what `Sluice.submit_many` takes for one job.
Job = dict[str, Any]

#: Every job has ended by then, so that the demo does.
_DEADLINE_S = 300.0
_ANSWER_MARGIN_S = 30.0
_POLL_S = 0.1
_PLAIN_STEP_JOBS = 10
_PLAIN_WIDTH = 100

#: The sandbox answers as a quick provider would.
_SANDBOX_PACE = (
    *("--latency-ms", "500", "--latency-jitter-ms", "700"),
    *("--first-token-ms", "250", "--tokens-per-s", "80"),
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_KILL_ROUNDS = 3
_KILL_S = 5.0


@app.command(epilog="Example: sluice demo --json")
def demo(
    *,
    real: Annotated[
        bool, typer.Option("--real", help="Use the real providers, with your keys and money.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep its data and logs.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")
    ] = False,
) -> None:
    """Run 60 CRM jobs over all six use cases on embedded servers, and show what they cost."""
    screen = _Screen(Console(stderr=as_json, highlight=False))
    tally, is_right = _run(screen, real=real, keep=keep)
    if as_json:
        typer.echo(json.dumps(tally.as_dict()))
    raise typer.Exit(int(tally.failed > 0 or not is_right))


def load_jobs() -> list[Job]:
    """Return the data set that ships: invented notes, e-mails and calls of invented companies."""
    text = files("sluicegate").joinpath("data", "crm.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.strip().split("\n")]


def _run(screen: _Screen, *, real: bool, keep: bool) -> tuple[Tally, bool]:
    """Return what became of the jobs, and whether the books and the process table are in order."""
    given = load_settings()
    if real:
        _check_keys(given)
    began = time.monotonic()
    with _folder(screen, keep=keep) as folder, chdir(folder):
        from sluicegate.workers.local.fleet import Fleet

        _leave_own_servers_alone(given, screen)
        fleet = Fleet(
            data_dir=folder,
            sandbox=not real,
            fsync=False,  # thrown away at the end
            sandbox_options=_SANDBOX_PACE,
        )
        providers = "OpenAI and Anthropic, with your keys" if real else "the sandbox provider"
        with screen.waiting(f"Starting PostgreSQL, Valkey, workers and sweep, for {providers}"):
            fleet.start()
        try:
            started_s = time.monotonic() - began
            tally = _run_jobs(fleet, load_jobs(), screen)
            screen.show(tally, baseline_model=fleet.settings.baseline_model)
            is_right = real or _bill_agrees(fleet, tally, screen)
        finally:
            fleet.stop()
    set_up_s = float(os.environ.get("SLUICE_DEV_SETUP_S", "0"))
    screen.say(
        f"Set-up took {set_up_s:.1f} s, starting the fleet {started_s:.1f} s, "
        f"the {len(tally.results)} jobs {tally.elapsed_s:.1f} s."
    )
    left = psutil.Process().children(recursive=True)
    if left:
        screen.say(f"These processes are left, end them: {', '.join(str(one.pid) for one in left)}")
    else:
        screen.say("Everything has been stopped; no process is left.")
    return tally, is_right and not left


def _check_keys(settings: Settings) -> None:
    keys = {
        "OPENAI_API_KEY": settings.openai_api_key,
        "ANTHROPIC_API_KEY": settings.anthropic_api_key,
    }
    missing = [name for name, key in keys.items() if key is None]
    if missing:
        raise SettingsError(
            f"--real needs {' and '.join(missing)}: set it in the environment or in .env, "
            "or leave --real away to use the sandbox provider"
        )


def _leave_own_servers_alone(settings: Settings, screen: _Screen) -> None:
    """Bring the settings of `.env` into the environment, without the addresses of servers.

    The sandbox must never answer jobs that wait on somebody's real servers.
    """
    for name in settings.model_fields_set:
        field = Settings.model_fields[name]
        variable = str(field.validation_alias or f"SLUICE_{name.upper()}")
        if name in ("database_url", "redis_url"):
            os.environ.pop(variable, None)
            screen.say(f"{variable} is left alone: the demo brings its own servers.")
            continue
        value = getattr(settings, name)
        os.environ[variable] = (
            value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        )


@contextmanager
def _folder(screen: _Screen, *, keep: bool) -> Iterator[Path]:
    """Yield a folder for everything the demo writes, gone at the end, whichever that is."""
    folder = Path(tempfile.mkdtemp(prefix="sluice-demo-")).resolve()
    with _ended_by_signals(screen, None if keep else folder):
        try:
            yield folder
        finally:
            if keep:
                screen.say(f"Data and logs are in {folder}")
            else:
                shutil.rmtree(folder)


@contextmanager
def _ended_by_signals(screen: _Screen, folder: Path | None) -> Iterator[None]:
    """End the demo when a signal comes; `folder` is removed then.

    From within the handler: an exception raised there is swallowed by some of the code that it may
    interrupt, such as the hooks around a fork, which then leave a lock held for ever. Nothing is
    worth a drain either, because the data goes anyway.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        _kill_children()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        screen.leave(f"sluice: the demo was stopped by {signal.Signals(number).name}\n")
        os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_children() -> None:
    """Kill all that this process has started, and what was started meanwhile."""
    for _ in range(_KILL_ROUNDS):
        children = psutil.Process().children(recursive=True)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=_KILL_S)


def _run_jobs(fleet: Fleet, jobs: Sequence[Job], screen: _Screen) -> Tally:
    """Run all jobs at once but the one to be streamed, and then that one."""
    from sluicegate.producers.client import Sluice

    whole = [job for job in jobs if not job.get("stream")]
    streamed = [job for job in jobs if job.get("stream")]
    began = time.monotonic()
    # The client is closed first, which ends the wait of every thread.
    with ThreadPoolExecutor(len(whole)) as pool, Sluice(fleet.settings) as sluice:
        handles = sluice.submit_many(None, whole, deadline=_DEADLINE_S)
        lanes = Counter(job.get("lane", "interactive") for job in whole)
        screen.say(
            f"{len(handles)} jobs are stored: {lanes['interactive']} interactive, "
            f"{lanes['bulk']} in the bulk lane."
        )
        waits = [pool.submit(_end_of, handle) for handle in handles]
        with screen.progress(Counter(str(job["use_case"]) for job in whole)) as advance:
            pending = set(waits)
            while pending:
                done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                for one in done:
                    advance(one.result().use_case)
                fleet.supervisor.poll()
        results = [one.result() for one in waits]
        results += [_stream(sluice, job, screen) for job in streamed]
    return Tally(results=tuple(results), elapsed_s=time.monotonic() - began)


def _end_of(handle: JobHandle) -> Result:
    """Wait for a job's end, whichever it is: a failed job has a cost, too."""
    from sluicegate.shared.events import Completed, Failed

    for event in handle.events(timeout=_DEADLINE_S + _ANSWER_MARGIN_S):
        if isinstance(event.payload, Completed | Failed):
            return event.payload.result
    raise SluiceError(f"job {handle.id} has no last event; run `sluice demo --keep`, see its logs")


def _stream(sluice: Sluice, job: Job, screen: _Screen) -> Result:
    from sluicegate.shared.events import Completed, Delta, Failed, Reset

    use_case = str(job["use_case"])
    screen.say(f"One more {use_case}, its reply shown as it arrives:")
    handle = sluice.submit_many(None, [job], deadline=_DEADLINE_S)[0]
    shown = ""
    for event in handle.events(timeout=_DEADLINE_S + _ANSWER_MARGIN_S):
        match event.payload:
            case Delta(text=text):
                screen.write(text)
                shown += text
            case Reset():
                screen.write("\n(a new attempt starts again)\n")
                shown = ""
            case Completed(result=result) | Failed(result=result):
                # The last words come with the whole answer instead of a delta of their own.
                screen.write(f"{result.text.removeprefix(shown)}\n")
                return result
    raise SluiceError(f"job {handle.id} has no last event; run `sluice demo --keep`, see its logs")


def _bill_agrees(fleet: Fleet, tally: Tally, screen: _Screen) -> bool:
    """Compare results, cost entries and the sandbox's own bill; say how they compare."""
    from sqlalchemy import func, select

    from sluicegate.shared.database import make_engine
    from sluicegate.shared.tables import cost_entries
    from sluicegate.workers.local.sandbox_control import SandboxControl

    engine = make_engine(fleet.settings, application_name="sluice demo", pool_size=1)
    try:
        with engine.connect() as connection:
            amounts = select(func.coalesce(func.sum(cost_entries.c.amount_nano_usd), 0))
            booked = int(connection.execute(amounts).scalar_one())
    finally:
        engine.dispose()
    billed = int(SandboxControl(fleet.sandbox_url).bill()["billed_nano_usd"])
    results = tally.total.cost_nano_usd
    if booked == billed == results:
        screen.say(
            f"The cost entries add up to the sandbox's own bill, to the nano-dollar: "
            f"{billed:,} nano-dollars ({_dollars(billed)})."
        )
        return True
    screen.say(
        f"The books disagree, in nano-dollars: the sandbox billed {billed:,}, "
        f"the cost entries say {booked:,}, the results {results:,}."
    )
    return False


class _Screen:
    """What a person sees: live on a terminal, plain lines anywhere else."""

    def __init__(self, console: Console) -> None:
        self._console = console
        if not console.is_terminal:
            console.width = _PLAIN_WIDTH

    def say(self, sentence: str) -> None:
        self._console.print(Text(sentence), soft_wrap=True)

    def leave(self, sentence: str) -> None:
        """Say the last sentence, on stderr, from within a signal handler: past every buffer."""
        with suppress(OSError, ValueError):
            if self._console.is_interactive:
                os.write(self._console.file.fileno(), b"\x1b[?25h\n")  # show the cursor again
            os.write(sys.stderr.fileno(), sentence.encode())

    def write(self, text: str) -> None:
        """Go on with the line that was begun, at once."""
        self._console.file.write(text)
        self._console.file.flush()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        if not self._console.is_interactive:
            self.say(f"{what} ...")
            yield
            return
        with self._console.status(Text(what)):
            yield

    @contextmanager
    def progress(self, jobs: Mapping[str, int]) -> Iterator[Callable[[str], None]]:
        """Yield what is to be called with the use case of each job that has ended."""
        if not self._console.is_interactive:
            yield self._count(sum(jobs.values()))
            return
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as bars:
            tasks = {use_case: bars.add_task(use_case, total=jobs[use_case]) for use_case in jobs}
            yield lambda use_case: bars.advance(tasks[use_case])

    def _count(self, total: int) -> Callable[[str], None]:
        ended = 0

        def count(_use_case: str) -> None:
            nonlocal ended
            ended += 1
            if ended % _PLAIN_STEP_JOBS == 0 or ended == total:
                self.say(f"{ended} of {total} jobs have ended.")

        return count

    def show(self, tally: Tally, *, baseline_model: str) -> None:
        """Print the table, and why jobs failed."""
        self.say("")
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
        table.add_column("use case", no_wrap=True)
        table.add_column("model", no_wrap=True)
        for heading in (
            "jobs",
            "median\nlatency",
            "tokens",
            "cost",
            f"cost on\n{baseline_model}",
            "saving",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        for group in tally.groups(by_model=True):
            table.add_row(group.use_case, group.model, *_figures(group))
        table.add_section()
        table.add_row("all", "", *_figures(tally.total))
        self._console.print(table)
        self.say("")
        for result in tally.results:
            if result.error is not None:
                self.say(
                    f"{result.use_case} job {result.job_id} {result.state}: {result.error.message}"
                )


def _figures(group: Group) -> tuple[str, ...]:
    baseline = group.baseline_nano_usd
    saving = f"{1 - group.cost_nano_usd / baseline:.1%}" if baseline else ""
    return (
        str(len(group.results)),
        f"{group.median_latency_s:.2f} s",
        f"{group.input_tokens + group.output_tokens:,}",
        _dollars(group.cost_nano_usd),
        _dollars(baseline),
        saving,
    )


def _dollars(nano_usd: int) -> str:
    return f"${nano_usd / 1e9:.6f}"
