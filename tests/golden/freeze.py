"""Freeze the answers of the commands in `answers/commands.txt`, as the referee of changes that must not move them.

    python -m tests.golden.freeze GROUP ...             record these groups of commands anew
    python -m tests.golden.freeze all                   record all groups anew
    python -m tests.golden.freeze --search GROUP ...    record only how searches went (`search.json`)
    python -m tests.golden.freeze --show "plan --top=3" print the whole answer of one command, to compare by hand

Record only what is meant to move: look at what `pytest tests/test_frozen.py` lists first, and say in the commit what
moved and why.

`answers/GROUP.json` maps a command to its exit code, its error line if it has one, and its answer. What shows how the
search went (`SEARCH`: counts of plans bounded and simulated, and what hangs on their order) is in `answers/search.json`
alone, as it may change with the order of a search while the answers, the size of the space and what is infeasible may
not. Long parts are kept as hashes (`HASHED`). Nothing here knows of the package but
`cli_cases`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from tests import cli_cases

ANSWERS = Path(__file__).parent / "answers"
RENAMED: dict[str, str] = {}
"""Keys that documents have renamed since, to the names that are frozen; empty once all is recorded anew."""
AT_NIGHT = "at night: "
"""What commands begin with that tests ask at night only."""
VOLATILE = {"version", "schema", "root", "expected"}
SEARCH = re.compile(
    r"(.*\.)?(certificate|certificates\[\d+\]|pipelines\[\d+\]|check)(\.before\[\d+\])*\.(bounded|simulated|cut_short|missed"
    r"|repeated|left|out_of_reach|least_bound|incumbent|ruled_out|found|larger|simulations)|beaten"
)
HASHED = re.compile(
    r"candidates\[0\]|candidates\[\d+\]\.(metrics|memory|parts)|plans\[[1-9]\d*\]\.(metrics|memory)|front\[\d+\]\.(metrics|memory)"
    r"|(models|clusters)\[\d+\]|(.*\.)?(provenance|operations_s)|beaten"
)


def commands() -> dict[str, list[str]]:
    """The commands of every group, with their parts put in."""
    groups: dict[str, list[str]] = {}
    parts: dict[str, str] = {}
    for line in (ANSWERS / "commands.txt").read_text().splitlines():
        if line.startswith("["):
            group = groups.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            if named := re.fullmatch(r"(\w+) = (.*)", line):
                parts[named[1]] = named[2]
            else:
                group.append(re.sub(r"\$(\w+)", lambda found: parts[found[1]], line.removeprefix(AT_NIGHT)))
    return groups


def at_night() -> set[str]:
    """Commands that tests ask at night only."""
    lines = (ANSWERS / "commands.txt").read_text().splitlines()
    return {line.removeprefix(AT_NIGHT) for line in lines if line.startswith(AT_NIGHT)}


ONCE = cli_cases.Once()
"""Pages are of questions that others ask as JSON."""


def run(command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is frozen of a command: the answer, and how its search went by the path of each count."""
    words = shlex.split(command)
    whole = any(word.startswith("--format") for word in words)
    code, out, err = ONCE.run(*words, *(() if whole else ("--format=json",)), cwd=cli_cases.ROOT)
    kept: dict[str, Any] = {"exit": code}
    if errors := [line for line in err.splitlines() if line.startswith("error: ")]:
        kept["error"] = errors
    search: dict[str, Any] = {}
    if whole:
        # Expected errors are those of the measurements that there are.
        told = [text for text in out.split("\n\n") if not text.startswith("Expected error")]
        kept["page"] = "\n\n".join(text for text in told if not text.startswith("Certificate")).splitlines()
        search = {f"page.{i}": text for i, text in enumerate(told) if text.startswith("Certificate")}
    elif out:
        document = json.loads(out)
        if said := fault(document):
            kept["schema"] = said
        kept["answer"] = condensed(document, "", search)
    return kept, search


def fault(document: dict[str, Any]) -> str | None:
    """What the schema published for a document does not allow in it."""
    import jsonschema

    name = document["schema"].partition(".")[2].replace("/", "-")
    schema = json.loads((cli_cases.ROOT / "docs" / "schema" / f"{name}.json").read_text())
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return next((f"{error.json_path}: {error.message[:200]}" for error in errors), None)


def condensed(value: Any, path: str, search: dict[str, Any]) -> Any:
    """The value without what is volatile, with hashes of its long parts; what is of the search goes to `search`."""
    if isinstance(value, dict):
        found = {}
        for given, item in value.items():
            key = RENAMED.get(given, given)
            inner = f"{path}.{key}" if path else key
            if SEARCH.fullmatch(inner):
                search[inner] = condensed(item, inner, search)
            elif key not in VOLATILE:
                found[key] = condensed(item, inner, search)
        value = found
    elif isinstance(value, list):
        value = [condensed(item, f"{path}[{index}]", search) for index, item in enumerate(value)]
    return hashed(value) if value and HASHED.fullmatch(path) else value


def hashed(value: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf by its path."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()}
    if isinstance(value, list) and value:
        return {k: v for index, item in enumerate(value) for k, v in flat(item, f"{path}[{index}]").items()}
    return {path: value}


def difference(old: Any, new: Any) -> list[str]:
    """What moved, a line each; equality is exact, of floats too, and of the order of keys is not asked."""
    before, after, gone = flat(old), flat(new), "(nothing)"
    moved = [path for path in [*before, *(path for path in after if path not in before)]
             if repr(before.get(path, gone)) != repr(after.get(path, gone))]  # fmt: skip
    return [f"{path}: {before.get(path, gone)} -> {after.get(path, gone)}" for path in moved]


def read(name: str) -> dict[str, Any]:
    path = ANSWERS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, content: dict[str, dict[str, Any]]) -> None:
    """A block for each command and a line for each key of its answer, so that versions can be compared."""
    blocks = [f"{json.dumps(command)}: {lines(kept, 2)}" for command, kept in content.items()]
    (ANSWERS / f"{name}.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def lines(value: Any, depth: int) -> str:
    """JSON with so many levels of keys on lines of their own."""
    if not isinstance(value, dict) or not value or not depth:
        return json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {lines(item, depth - 1)}" for key, item in value.items()) + "\n}"


def main(words: list[str]) -> None:
    os.environ["COLUMNS"] = "120"
    groups = ", ".join(commands())
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden.freeze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"all, or any of {groups}")
    parser.add_argument("--search", action="store_true", help="record only how searches went")
    parser.add_argument("--show", metavar="COMMAND", help="print the whole answer of a command and record nothing")
    asked = parser.parse_args(words)
    if asked.show:
        print(cli_cases.run(*shlex.split(asked.show), "--format=json", cwd=cli_cases.ROOT).out, end="")
        return
    if not asked.groups:
        parser.error(f"say which groups to record anew: all, or any of {groups}")
    if unknown := [group for group in asked.groups if group not in (*commands(), "all")]:
        parser.error(f"there is no group {unknown[0]!r}; say all, or any of {groups}")
    searches_only = asked.search
    chosen = list(commands()) if "all" in asked.groups else asked.groups
    searches = read("search")
    for group in chosen:
        kept = {}
        for command in commands()[group]:
            kept[command], searches[command] = run(command)
        if not searches_only:
            write(group, kept)
    known = {command for group in commands().values() for command in group}
    write("search", {command: found for command, found in searches.items() if command in known and found})


if __name__ == "__main__":
    main(sys.argv[1:])
