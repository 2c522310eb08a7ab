"""Documents are what their schemas say, and the schemas published are those of the types.

`python tests/test_schema.py` writes `docs/schema` anew.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import field, fields, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest

from apex_opt.report import listed, studied, types
from apex_opt.schema import Described, json_schema, lines_of, of, to_plain
from apex_opt.search import answer

if TYPE_CHECKING:
    from types import ModuleType

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schema"


def documents() -> dict[str, type[types.Document]]:
    """Every type of document by the name of its schema."""
    found = [each for module in (types, studied, listed) for each in vars(module).values() if hasattr(each, "schema")]
    return {each.schema: each for each in found if each not in (studied.ScoredPlan, studied.ScoredMixed)}


def path_of(name: str) -> Path:
    """Where a schema is published."""
    return FOLDER / f"{name.partition('.')[2].replace('/', '-')}.json"


def text_of(name: str) -> str:
    """A schema as it is published, a line for each field."""
    schema = {"$id": name, **json_schema(documents()[name])}
    defined = schema.pop("$defs")
    blocks = {key: _lines(value, 2) for key, value in defined.items()}
    inner = ",\n".join(f"{json.dumps(key)}: {block}" for key, block in blocks.items())
    return _lines(schema, 2).removesuffix("\n}") + f',\n"$defs": {{\n{inner}\n}}\n}}\n'


def _lines(value: Any, depth: int) -> str:
    """JSON with so many levels of keys on lines of their own."""
    if not isinstance(value, dict) or not value or not depth:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(item, depth - 1)}" for key, item in value.items()) + "\n}"


@pytest.mark.parametrize("name", documents())
def test_the_schema_published_is_that_of_the_type(name: str) -> None:
    assert path_of(name).read_text(encoding="utf-8") == text_of(name), "python tests/test_schema.py writes them anew"


def index_of(kinds: dict[str, type[types.Document]]) -> str:
    """The page that lists the schemas."""
    rows = [
        f"| [`{name}`]({path_of(name).name}) | {json_schema(kind)['description']} |" for name, kind in kinds.items()
    ]
    head = "# JSON Schemas\n\nEvery JSON document names its own as `schema`, with a version.\n"
    return "\n".join([head, "| schema | of |", "|---|---|", *sorted(rows), ""])


def test_nothing_else_is_published() -> None:
    assert sorted(FOLDER.glob("*.json")) == sorted(map(path_of, documents()))
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == index_of(documents())


@pytest.mark.parametrize("name", documents())
def test_a_schema_is_valid_names_its_version_and_says_what_a_document_is(name: str) -> None:
    validators = pytest.importorskip("jsonschema")
    schema = json.loads(text_of(name))
    validators.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"] == {"const": name}
    assert {"schema", "version", "status"} <= set(schema["required"])
    for described in (schema, *schema["$defs"].values()):
        assert described["description"].endswith(".")


@pytest.mark.parametrize("module", [types, studied, listed])
def test_what_a_docstring_describes_is_a_field(module: ModuleType) -> None:
    for each in (one for one in vars(module).values() if isinstance(one, type) and issubclass(one, Described)):
        told = set(lines_of(each)) - {"notes"}  # of most documents, and told of all
        assert each is Described or told <= {field.name for field in fields(each)}, each


@pytest.mark.parametrize("name", documents())
def test_every_document_has_a_page_and_rows(name: str) -> None:
    of = documents()[name]
    module, _, function = of.PAGE.partition(":")
    assert callable(getattr(import_module(module), function))
    assert of.ROWS in json_schema(of)["properties"] or of is studied.Unplaced


class Inner(Described):
    """A part.

    Parameters
    ----------
    size_bytes : how much it takes
    """

    size_bytes: int | None
    kind: Literal["a", "b"]


class Outer(Described):
    """A whole."""

    from_: tuple[Inner, ...]
    found: dict[str, float | None]
    either: Inner | str
    extra: int | None = None


def test_documents_are_written_as_plain_data_with_what_is_undefined_as_none() -> None:
    rows: Any = [Inner(size_bytes=3, kind="a"), Inner(size_bytes=None, kind="b")]
    made = Outer(from_=rows, found={"x": 1.5, "y": math.nan, "z": math.inf}, either="text")
    assert made.from_ == tuple(rows)
    assert made.found == {"x": 1.5, "y": None, "z": None}
    rows_plain = [{"size_bytes": 3, "kind": "a"}, {"size_bytes": None, "kind": "b"}]
    plain = {"from": rows_plain, "found": made.found, "either": "text"}
    assert to_plain(made) == plain
    assert to_plain(replace(made, extra=7)) == plain | {"extra": 7}


def test_a_document_is_of_objects_that_have_its_fields_and_of_what_is_named() -> None:
    first, second = SimpleNamespace(size_bytes=3, other=1), SimpleNamespace(size_bytes=4, kind="a")
    assert of(Inner, first, second) == Inner(size_bytes=3, kind="a")
    assert of(Inner, first, second, size_bytes=None) == Inner(size_bytes=None, kind="a")
    with pytest.raises(TypeError, match="kind"):
        of(Inner, first)
    with pytest.raises(TypeError, match="more"):
        of(Inner, first, second, more=1)


def test_every_way_that_a_search_ends_is_one_that_documents_tell() -> None:
    assert get_args(types.Status) == get_args(answer.Status)


def test_a_schema_says_types_units_and_meanings() -> None:
    schema = json_schema(Outer)
    assert schema["required"] == ["from", "found", "either"]
    assert schema["properties"]["extra"] == {"type": "integer"}
    assert schema["properties"]["either"] == {"anyOf": [{"$ref": "#/$defs/Inner"}, {"type": "string"}]}
    inner = schema["$defs"]["Inner"]["properties"]
    assert inner["size_bytes"] == {"type": ["integer", "null"], "unit": "bytes", "description": "how much it takes"}
    assert inner["kind"] == {"enum": ["a", "b"]}


class Open(Described):
    """A document that takes more than it names."""

    named: int
    further: dict[str, float | dict[str, float]] = field(default_factory=dict)


def test_what_a_document_holds_under_further_names_is_written_and_described() -> None:
    more: Any = {"x": 2.0, "y": {"p95": 3.0}}
    assert to_plain(Open(named=1, further=more)) == {"named": 1, **more}
    assert to_plain(Open(named=1)) == {"named": 1}
    schema = json_schema(Open)
    assert list(schema["properties"]) == schema["required"] == ["named"]
    assert schema["additionalProperties"]["anyOf"][0] == {"type": "number"}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for schema_name in documents():
        path_of(schema_name).write_text(text_of(schema_name), encoding="utf-8")
        print(path_of(schema_name), file=sys.stderr)
    (FOLDER / "README.md").write_text(index_of(documents()), encoding="utf-8")


def test_what_optimal_and_nearest_mean_is_told() -> None:
    parts = json_schema(types.Answer)["$defs"]
    assert "a space of one plan" in parts["LedgerPart"]["properties"]["optimal"]["description"]
    assert "false where" in parts["ExpectedFigure"]["properties"]["nearest"]["description"]
