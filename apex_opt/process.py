"""What surrounds a run: streams that are closed, full or left by their reader, and signals that end it.

- Standard output that cannot be written is an error; one that its reader has left, or that was closed from the start,
  is none: the answer's exit code stands. Standard error only accompanies the answer: what cannot be written is dropped.
- Ctrl-C, a request to end and a hang-up end the program in one line and with 128 plus the signal's number, wherever it
  is: in the solver, in compiled code, in the middle of an import. A thread of its own waits for them, as Python itself
  looks at signals only between two steps of the main thread, and may be deep in other code then.
"""

from __future__ import annotations

# Loaded before all else, so that an interruption of that ends in a line too: nothing that takes time is imported here,
# and of `signal` only its core, as the names it gives to numbers take longer than all the rest.
import _signal as signal  # type: ignore[import-not-found]
import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

_ENDINGS: Final[dict[int, str]] = {
    number: text
    for name, text in (("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "the terminal is gone"))
    if (number := getattr(signal, name, None)) is not None
}
_ending: Final = _thread.allocate_lock()
_CLEAR_LINE_AND_SHOW_CURSOR: Final = b"\r\x1b[2K\x1b[?25h"


class Accompaniment:
    """A stream that goes on when it cannot be written: what it is given from then on is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            _drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _drop(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_streams() -> None:
    """Make the standard streams fit to use, closed ones included, whatever characters a file name holds."""
    # A file opened later must not become the standard output that a library prints to.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number, inheritable=True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, Accompaniment):
        sys.stderr = Accompaniment(sys.stderr)


def put(text: str) -> None:
    """Print an answer on standard output, all of it; a reader that has seen enough may leave.

    Raises
    ------
    InputError         standard output cannot be written
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
    except OSError as error:
        from apex_opt.errors import InputError

        _drop(sys.stdout)
        raise InputError(f"standard output cannot be written ({error.strerror}); write to another place") from error


def end_on_signals() -> None:
    """From now on end the program at once when it is told to; signals that it was started to ignore are ignored."""
    taken = [n for n in _ENDINGS if signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler)]
    if not taken:
        return
    for number in taken:
        signal.signal(number, _at_once)
    import threading

    try:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_wait, args=(reader, taken), name="signals", daemon=True).start()
    except (OSError, RuntimeError, ValueError, AttributeError):
        return  # no more files or threads, or a system without: signals then wait for the step in hand
    for number in taken:
        signal.signal(number, _noted)


def end_undisturbed() -> None:
    """From now on ignore them: all is said, and while Python ends they would kill the program without a line."""
    for number in _ENDINGS:
        if signal.getsignal(number) in (_noted, _at_once):
            signal.signal(number, signal.SIG_IGN)


def _at_once(number: int, frame: object) -> None:
    """Until the thread waits: the little that is run by then is Python's own code."""
    _end(number)


def _noted(number: int, frame: object) -> None:
    """Python's own part: that there is a handler makes the waiting thread hear of the signal."""


def _wait(reader: int, taken: list[int]) -> None:
    while heard := os.read(reader, 1):
        if heard[0] in taken:
            _end(heard[0])


def _end(number: int) -> None:
    """End here and now: other threads may be in code that nothing stops."""
    if not _ending.acquire(blocking=False):
        return
    outputs = sys.modules.get("apex_opt.outputs")
    if outputs is not None and hasattr(outputs, "drop_unfinished"):
        outputs.drop_unfinished()
    line = f"error: {_ENDINGS[number]}\n".encode()
    try:
        os.write(2, (_CLEAR_LINE_AND_SHOW_CURSOR if os.isatty(2) else b"") + line)
    finally:
        os._exit(128 + number)


def _drop(stream: Any) -> None:
    """Send what a stream holds and will be given nowhere: Python tries again at its end, and complains."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError, AttributeError):
        return
