"""Streams that are closed, full or left, and real signals at several moments, in real processes."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from apex_opt import process
from apex_opt.errors import InputError
from apex_opt.process import open_streams, put
from apex_opt.units import DATA_ROOT

LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal is gone"}


def heed_signals() -> None:
    """Undo what the tests may have been started with: signals that are ignored stay so in what a process starts."""
    for number in LINES:
        signal.signal(number, signal.SIG_DFL)


def started(*words: str, code: str = "") -> subprocess.Popen[str]:
    """A process of ours, or of a script that ends on signals and then does what it says."""
    begin = "from apex_opt.process import end_on_signals; end_on_signals()\n"
    what = ["-c", begin + textwrap.dedent(code)] if code else ["solve.py", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NUMBA_DISABLE_JIT": "0"}
    return subprocess.Popen(
        [sys.executable, *what],
        cwd=DATA_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )


def ended(running: subprocess.Popen[str], number: signal.Signals = signal.SIGINT) -> None:
    """Send a signal to a process that has begun; it ends by it, in a line."""
    running.send_signal(number)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert error.endswith(f"error: {LINES[number]}\n")
    assert "Traceback" not in error


def until(running: subprocess.Popen[str], text: str) -> None:
    """Read what a process says until it says this."""
    assert running.stderr is not None
    for line in running.stderr:
        if text in line:
            return
    raise AssertionError(f"never said {text!r}")


# ---- signals -----------------------------------------------------------------------------------------------------

BUSY = {
    "an import that lets nothing through": """
        import sys, time
        def load():
            while True:
                try:
                    print("begun", file=sys.stderr, flush=True)
                    time.sleep(60)
                except BaseException:
                    pass
        load()
        """,
    "the solver": """
        import random, sys
        from ortools.sat.python import cp_model
        from formulations.solver import new_solver
        model, draw = cp_model.CpModel(), random.Random(1)
        rows = [[draw.randint(100, 999) for _ in range(60)] for _ in range(8)]
        chosen = [model.new_bool_var("") for _ in range(60)]
        for row in rows:
            model.add(sum(w * c for w, c in zip(row, chosen)) == sum(row) // 2)
        solver = new_solver()
        solver.parameters.log_search_progress = False
        print("begun", file=sys.stderr, flush=True)
        while True:
            solver.solve(model)
        """,
    "after the solver": """
        import sys, time
        from ortools.sat.python import cp_model
        from formulations.solver import new_solver
        model = cp_model.CpModel()
        model.add(model.new_bool_var("a") == 1)
        new_solver().solve(model)
        print("begun", file=sys.stderr, flush=True)
        time.sleep(60)
        """,
    "a pool of threads": """
        import sys, time
        from concurrent.futures import ThreadPoolExecutor
        with ThreadPoolExecutor() as pool:
            pool.submit(time.sleep, 60)
            print("begun", file=sys.stderr, flush=True)
        """,
    "the end of the program": """
        import atexit, sys, time
        atexit.register(time.sleep, 60)
        atexit.register(print, "begun", file=sys.stderr, flush=True)
        """,
}


@pytest.mark.parametrize("where", BUSY)
def test_an_interruption_ends_the_program_wherever_it_is(where: str) -> None:
    running = started(code=BUSY[where])
    until(running, "begun")
    ended(running)


def test_an_interruption_ends_workers_too_and_in_one_line() -> None:
    running = started(
        code="""
        import sys, time
        from apex_opt.grids.workers import Processes
        workers = Processes(1)
        workers.put(abs, 1)
        workers.take()
        workers.put(time.sleep, 600)
        print("begun", file=sys.stderr, flush=True)
        workers.take()
        """
    )
    until(running, "begun")
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=300)  # a worker that sleeps on would hold on to the stream for longer
    assert (running.returncode, error) == (130, "error: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_the_program_too(number: signal.Signals) -> None:
    running = started(code=BUSY["a pool of threads"])
    until(running, "begun")
    ended(running, number)


def test_an_answer_that_is_out_keeps_its_exit_code() -> None:
    running = started(
        code="""
        import atexit, sys, time
        from apex_opt.process import end_undisturbed
        atexit.register(time.sleep, 0.5)
        atexit.register(print, "begun", file=sys.stderr, flush=True)
        end_undisturbed()
        sys.exit(3)
        """
    )
    until(running, "begun")
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert (running.returncode, error) == (3, "")


def test_a_signal_that_was_ignored_from_the_start_stays_so() -> None:
    code = """
        import signal, sys
        print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
        """
    running = subprocess.run(
        [
            "sh",
            "-c",
            'trap "" HUP; exec "$@"',
            "sh",
            sys.executable,
            "-c",
            textwrap.dedent(f"from apex_opt.process import end_on_signals; end_on_signals()\n{textwrap.dedent(code)}"),
        ],
        cwd=DATA_ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=heed_signals,
    )
    assert running.stdout == "True False\n"


def test_what_is_half_written_is_gone_after_a_signal(tmp_path: Path) -> None:
    running = started(
        code=f"""
        import sys, time
        from pathlib import Path
        from apex_opt.outputs import written
        with written(Path({str(tmp_path / "a.csv")!r}), "requests") as file:
            file.write(b"half")
            print("begun", file=sys.stderr, flush=True)
            time.sleep(60)
        """
    )
    until(running, "begun")
    assert len(os.listdir(tmp_path)) == 1
    ended(running, signal.SIGTERM)
    assert os.listdir(tmp_path) == []


LARGE = ("plan", "--cluster=64x8xh200-sxm", "--model=llama-1t")
LONG = "poisson:rate=900,n=2000000,prompt=lognormal(512,1.0),output=lognormal(mean=300,sigma=1)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "moment"),
    [
        (LARGE, "enumerating plans"),
        (LARGE, "bounding plans"),
        (("simulate", "--plan=dp8 tp1", "--model=llama-3.1-8b", f"--trace={LONG}"), "simulating the plan"),
    ],
)
def test_an_interruption_ends_a_search_and_a_simulation(words: tuple[str, ...], moment: str) -> None:
    running = started(*words)
    until(running, moment)
    ended(running)


def test_a_terminal_gets_its_cursor_back() -> None:
    pty = pytest.importorskip("pty")
    child, terminal = pty.fork()
    if child == 0:
        heed_signals()
        os.chdir(DATA_ROOT)
        os.execve(sys.executable, [sys.executable, "solve.py", *LARGE], {**os.environ, "TERM": "xterm"})
    output = b""
    try:
        while b"\x1b[?25l" not in output or b"enumerating" not in output:
            output += os.read(terminal, 65536)
        os.write(terminal, b"\x03")  # as the key does: the terminal sends the signal
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
            while chunk := os.read(terminal, 65536):
                output += chunk
    finally:
        _, status = os.waitpid(child, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")
    assert output.endswith(b"error: interrupted\r\n")
    assert b"Traceback" not in output


# ---- streams -----------------------------------------------------------------------------------------------------


def shell(words: str) -> tuple[int, str, str]:
    """Exit code of the program alone, whatever reads its output, and what came out of both streams."""
    script = f"{{ {sys.executable} solve.py {words}; }} 4>&1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(
        ["bash", "-c", script], cwd=DATA_ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    return ran.returncode, ran.stdout, ran.stderr


INFEASIBLE = "simulate --plan=tp1 --model=llama-3.1-70b --trace=static:n=1,prompt=8,output=2"
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("clusters >&-", 0),
        ("clusters 2>&-", 0),
        ("clusters >&- 2>&- <&-", 0),
        ("nonsense >&- 2>&- <&-", 2),
        (f"{INFEASIBLE} >&-", 3),
        (f"{INFEASIBLE} 2>&-", 3),
        (f"{INFEASIBLE} | head -c 1", 3),
        (f"{INFEASIBLE} 2>&1 | head -c 1", 3),
        ("clusters | head -1", 0),
        ("clusters | true", 0),
        ("--help | true", 0),
        pytest.param("nonsense 2>/dev/full", 2, marks=FULL),
        pytest.param(f"{INFEASIBLE} 2>/dev/full", 3, marks=FULL),
        pytest.param("clusters 2>/dev/full", 0, marks=FULL),
        pytest.param("clusters >/dev/full", 2, marks=FULL),
        pytest.param("--help >/dev/full", 2, marks=FULL),
        pytest.param(f"{INFEASIBLE} >/dev/full 2>/dev/full", 2, marks=FULL),
    ],
)
def test_streams_change_no_answer_and_show_no_traceback(words: str, code: int) -> None:
    found, _, error = shell(words)
    assert found == code
    assert not {"Traceback", "Broken", "Exception"} & set(error.replace(":", " ").split())
    if words.endswith(">/dev/full") and "2>" not in words:
        assert error == "error: standard output cannot be written (No space left on device); write to another place\n"


def test_a_file_opened_later_is_not_taken_for_a_closed_stream() -> None:
    code = "from apex_opt.process import open_streams; open_streams(); assert open('LICENSE').fileno() > 2"
    ran = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" >&- 2>&- <&-'], cwd=DATA_ROOT, check=False)
    assert ran.returncode == 0


def test_an_answer_that_cannot_be_written_is_an_error_and_a_reader_that_left_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stream(io.StringIO):
        def __init__(self, error: OSError) -> None:
            super().__init__()
            self._error = error

        def flush(self) -> None:
            raise self._error

    monkeypatch.setattr(sys, "stdout", Stream(BrokenPipeError()))
    put("answer")
    monkeypatch.setattr(sys, "stdout", Stream(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"^standard output cannot be written \(No space left on device\)"):
        put("answer")
    monkeypatch.setattr(sys, "stderr", Stream(OSError(28, "No space left on device")))
    open_streams()
    print("progress", file=sys.stderr, flush=True)
    assert isinstance(sys.stderr, process.Accompaniment)
