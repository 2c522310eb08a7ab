"""Names of models as measurements write them, and as the registry does."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UnknownNameError
from apex_opt.ir import load_model
from apex_opt.ir.huggingface import read_json_object
from apex_opt.ir.registry import CONFIG_FOLDER

if TYPE_CHECKING:
    from apex_opt.ir.model import Model

_ENDINGS: Final = re.compile(
    r"(-(instruct|chat|it|hf|base|nvfp4|mxfp4|fp4|fp8|bf16|int4|int8|awq|gptq|\d{4}|v0\.\d))+$"
)


@lru_cache(maxsize=256)
def find_model(text: str) -> Model:
    """The model that a measurement names.

    Looked for as it is written (a name, a path, a Hugging Face id), then by its plain name, which is what the ids of
    the registry are compared by as well.

    Raises
    ------
    UnknownNameError    not known in either way
    InputError          found, but not usable
    """
    try:
        return load_model(text)
    except UnknownNameError:
        if plain_name(text) not in (known := _plain_names()):
            raise
        return load_model(known[plain_name(text)])


def plain_name(text: str) -> str:
    """The last component of an id or path in lower case, without a leading `Meta-` and without the endings that say
    how a model was trained further, dated or stored: `-Instruct`, `-2407`, `-FP8`."""
    last = text.strip().rstrip("/").rpartition("/")[2].lower()
    return _ENDINGS.sub("", last.removeprefix("meta-"))


@lru_cache(maxsize=1)
def _plain_names() -> dict[str, str]:
    """Registry name by plain name of every name and alias; of several the first."""
    known: dict[str, str] = {}
    for name, entry in read_json_object(CONFIG_FOLDER / "index.json").items():
        for spelling in (name, *entry["aliases"]):
            known.setdefault(plain_name(spelling), name)
    return known
