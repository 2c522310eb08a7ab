"""A document on stdout, in the form asked for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from apex_opt.errors import InputError

if TYPE_CHECKING:
    from apex_opt.report.document import Document


def show(document: Document, form: str) -> None:
    """Print a document, whole, as "json" or as a "table".

    Raises
    ------
    InputError         stdout cannot be written
    BrokenPipeError    its reader is gone
    """
    if form == "json":
        import json

        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    else:
        from apex_opt.report.tables import rendered

        text = rendered(document)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"standard output cannot be written ({error.strerror}); write to another place") from error
