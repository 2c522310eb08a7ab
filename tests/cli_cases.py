"""The command line, run in this process: what a warm one takes seconds for takes a tenth here."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
CHEAP = ("--model=llama-3.1-8b", "--cluster=2xh200-sxm", "--trace=static:n=6,prompt=64,output=8")


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


class _Stream(io.StringIO):
    """What a pipe to a program is: what is drawn with lines has them."""

    encoding = "utf-8"


def run(*words: str, cwd: Path | None = None) -> Ran:
    """Run a command in this process, in a folder where one is given."""
    from apex_opt import cli

    out, err = _Stream(), _Stream()
    code: int | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        try:
            cli.main(list(words))
        except SystemExit as ended:
            code = int(ended.code or 0)
    assert code is not None, f"{words}: the command returned where it should have ended the program"
    return Ran(code, out.getvalue(), err.getvalue())


class Once:
    """Commands that answer a question once, however many forms of the answer are asked for.

    Parameters
    ----------
    most : int    answers that are kept, those asked for last: one may hold 100 MB of what was computed for it
    """

    def __init__(self, most: int = 4) -> None:
        self._most = most
        self._known: dict[Any, Any] = {}

    def run(self, *words: str, cwd: Path | None = None) -> Ran:
        """Run a command; the answer to a question asked before is shown anew without the work."""
        from apex_opt import api
        from apex_opt.commands import COMMANDS

        assert api, "it fills the table of commands"
        kept = {name: command._replace(run=self._kept(command.run)) for name, command in COMMANDS.items()}
        with patch.dict(COMMANDS, kept):
            return run(*words, cwd=cwd)

    def _kept(self, answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def kept(asked: Any) -> Any:
            key = answer, asked, Path.cwd()
            found = self._known.pop(key) if key in self._known else answer(asked)
            self._known[key] = found
            if len(self._known) > self._most:
                del self._known[next(iter(self._known))]
            return found

        return kept


def both(*words: str) -> tuple[Ran, Ran]:
    """A question answered once, as JSON and as tables."""
    once = Once()
    return once.run(*words, "--format=json"), once.run(*words)
