"""The command line, run in this process: what a warm one takes seconds for takes a tenth here."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


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
