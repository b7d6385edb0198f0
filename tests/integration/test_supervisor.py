"""The supervisor with real processes: restarts, order of stopping, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sluicegate.workers.local.supervisor import Child, ChildFailedError, Supervisor
from tests.polling import eventually

SLEEP = "import time; time.sleep(60)"
# Notes when it stops; `patience` is what it does about SIGTERM.
NOTES_ITS_STOP = """
import signal, sys, time
name, journal = sys.argv[1:]
def stop(*_):
    time.sleep(0.2)
    with open(journal, "a") as file:
        file.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    time.sleep(60)
"""
IGNORES_SIGTERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
while True:
    time.sleep(60)
"""
# A launcher as `sluice up` is one. Says its children's pids as soon as it watches them, when it
# handles signals, and its exit code is the supervisor's.
LAUNCHER = """
import sys
from pathlib import Path
from sluicegate.workers.local.supervisor import Child, Supervisor
log_dir = Path(sys.argv[1])
class Telling(Supervisor):
    told = False
    def poll(self):
        super().poll()
        if not self.told:
            print(*self.pids.values(), flush=True)
            self.told = True
def deaf(name):
    log = log_dir / (name + ".log")
    return lambda: log.exists() and "deaf" in log.read_text()
children = [
    Child(name=name, argv=[sys.executable, "-c", sys.argv[2]], ready=deaf(name))
    for name in ("one", "two")
]
with Telling(children, grace_s=float(sys.argv[3]), log_dir=log_dir) as supervisor:
    sys.exit(supervisor.run_until_stopped())
"""


def python(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def said(log_dir: Path, name: str, words: str) -> Callable[[], bool]:
    log = log_dir / f"{name}.log"
    return lambda: log.exists() and words in log.read_text()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def launch(log_dir: Path, grace_s: float) -> tuple[subprocess.Popen[str], list[int]]:
    launcher = subprocess.Popen(
        python(LAUNCHER, log_dir, IGNORES_SIGTERM, grace_s), stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    with launcher.stdout as says:
        return launcher, [int(pid) for pid in says.readline().split()]


def test_crashed_child_is_started_again(tmp_path: Path) -> None:
    child = Child(name="one", argv=python(SLEEP))
    with Supervisor([child], grace_s=5, log_dir=tmp_path, restart_base_s=0.05) as supervisor:
        first = supervisor.pids["one"]
        psutil.Process(first).kill()

        def restarted() -> bool:
            supervisor.poll()
            return supervisor.pids.get("one", first) != first

        eventually(restarted)
        second = supervisor.pids["one"]
    assert gone(second)
    log = tmp_path / "one.log"
    assert f"-- ended by SIGKILL (log: {log}); starting again in 0.05 s" in log.read_text()


def test_who_is_told_that_it_runs_may_stop_it_at_once(tmp_path: Path) -> None:
    supervisor = Supervisor([Child(name="one", argv=python(SLEEP))], grace_s=5, log_dir=tmp_path)
    supervisor.start()
    child = supervisor.pids["one"]
    assert supervisor.run_until_stopped(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    assert gone(child)


def test_waits_double_up_to_their_cap_and_then_it_gives_up(tmp_path: Path) -> None:
    fails = "import sys; sys.exit('the reason')"
    supervisor = Supervisor(
        [Child(name="bad", argv=python(fails)), Child(name="good", argv=python(SLEEP))],
        grace_s=5,
        log_dir=tmp_path,
        restart_base_s=0.02,
        restart_cap_s=0.04,
        max_quick_failures=4,
    )
    supervisor.start()
    good = supervisor.pids["good"]
    with pytest.raises(ChildFailedError, match="bad failed 4 times in a row") as told:
        supervisor.run_until_stopped()
    assert told.value.exit_code == 1
    assert "exited with code 1" in str(told.value)
    assert f"the reason (log: {tmp_path / 'bad.log'})." in str(told.value)
    assert "\n" not in str(told.value)
    assert gone(good)
    waits = [
        line.rsplit(" in ")[1]
        for line in (tmp_path / "bad.log").read_text().splitlines()
        if line.startswith("--")
    ]
    assert waits == ["0.02 s", "0.04 s", "0.04 s"]


def test_child_that_dies_while_starting_fails_the_start_with_its_exit_code(tmp_path: Path) -> None:
    children = [
        Child(name="good", argv=python(SLEEP)),
        Child(name="bad", argv=python("import sys; sys.exit(3)"), ready=lambda: False),
    ]
    supervisor = Supervisor(children, grace_s=5)
    with pytest.raises(ChildFailedError, match="bad stopped while starting") as told:
        supervisor.start()
    assert told.value.exit_code == 3
    assert supervisor.pids == {}


def test_program_that_does_not_exist_is_one_clear_sentence(tmp_path: Path) -> None:
    missing = Child(name="none", argv=[str(tmp_path / "missing")])
    with pytest.raises(ChildFailedError, match=r"none cannot be started: .*No such file") as told:
        Supervisor([missing], grace_s=5).start()
    assert told.value.exit_code == 127


def test_child_that_is_never_ready_fails_the_start() -> None:
    child = Child(name="slow", argv=python(SLEEP), ready=lambda: False)
    supervisor = Supervisor([child], grace_s=5, ready_timeout_s=0.2)
    with pytest.raises(ChildFailedError, match=r"slow was not ready after 0\.2 s"):
        supervisor.start()
    assert supervisor.pids == {}


def test_stages_start_in_order_and_stop_in_reverse(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    started = []

    def child(name: str, stage: int) -> Child:
        said_ready = said(tmp_path, name, "ready")

        def ready() -> bool:
            if said_ready():
                started.append(name)
                return True
            return False

        return Child(
            name=name, argv=python(NOTES_ITS_STOP, name, journal), ready=ready, stage=stage
        )

    children = [child("worker", 2), child("provider", 0), child("sweep", 1)]
    with Supervisor(children, grace_s=5, log_dir=tmp_path):
        assert started == ["provider", "sweep", "worker"]
    assert journal.read_text().split() == ["worker", "sweep", "provider"]


def test_stop_is_bounded_by_the_grace(tmp_path: Path) -> None:
    deaf = Child(name="deaf", argv=python(IGNORES_SIGTERM), ready=said(tmp_path, "deaf", "deaf"))
    with Supervisor([deaf], grace_s=0.2, log_dir=tmp_path) as supervisor:
        pid = supervisor.pids["deaf"]
        began = time.monotonic()
    assert gone(pid)
    assert 0.2 <= time.monotonic() - began < 5


def test_a_child_may_have_a_shorter_grace_than_the_others(tmp_path: Path) -> None:
    children = [
        Child(name="polite", argv=python(SLEEP)),
        Child(
            name="deaf",
            argv=python(IGNORES_SIGTERM),
            ready=said(tmp_path, "deaf", "deaf"),
            grace_s=0.1,
        ),
    ]
    with Supervisor(children, grace_s=120, log_dir=tmp_path) as supervisor:
        pids = supervisor.pids.values()
    assert all(gone(pid) for pid in pids)


def test_a_child_that_is_not_vital_fails_alone(tmp_path: Path) -> None:
    children = [
        Child(name="good", argv=python(SLEEP)),
        Child(name="bad", argv=python("import sys; sys.exit('the reason')"), vital=False),
    ]
    with Supervisor(
        children,
        grace_s=5,
        log_dir=tmp_path,
        restart_base_s=0.01,
        restart_cap_s=0.01,
        max_quick_failures=2,
    ) as supervisor:

        def failed_often() -> bool:
            supervisor.poll()
            log = tmp_path / "bad.log"
            return log.exists() and log.read_text().count("starting again") > 3

        eventually(failed_often)
        assert "good" in supervisor.pids


def test_lines_are_echoed_with_the_name_and_the_environment_is_passed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hello = "import os; print('\\nhush: x\\nhello', os.environ['WHO'], flush=True); " + SLEEP
    heard = ""

    def ready() -> bool:
        nonlocal heard
        heard += capsys.readouterr().err
        return "hello you" in heard

    child = Child(
        name="one", argv=python(hello), env={"WHO": "you"}, ready=ready, not_echoed=("hush",)
    )
    with Supervisor([child], grace_s=5, echo=True):
        assert heard == "one | hello you\n"


def test_sigkill_of_the_launcher_leaves_no_child(tmp_path: Path) -> None:
    launcher, pids = launch(tmp_path, grace_s=30)
    assert len(pids) == 2
    launcher.kill()
    launcher.wait()
    if sys.platform == "linux":  # only Linux tells children of their parent's death
        eventually(lambda: all(gone(pid) for pid in pids))
    else:
        for pid in pids:
            psutil.Process(pid).kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_in_order_and_exits_with_zero(
    tmp_path: Path, signum: signal.Signals
) -> None:
    launcher, pids = launch(tmp_path, grace_s=0.2)
    launcher.send_signal(signum)
    assert launcher.wait(10) == 0
    assert all(gone(pid) for pid in pids)


def test_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    launcher, pids = launch(tmp_path, grace_s=60)
    # Standard signals do not queue: repeat until it has seen two.
    began = time.monotonic()
    while launcher.poll() is None:
        assert time.monotonic() - began < 20
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert launcher.returncode == 128 + signal.SIGINT
    assert all(gone(pid) for pid in pids)


def test_start_off_the_main_thread_is_refused() -> None:
    from concurrent.futures import ThreadPoolExecutor

    supervisor = Supervisor([Child(name="one", argv=python(SLEEP))], grace_s=5)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(supervisor.start).result()
