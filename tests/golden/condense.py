"""Condense recorded batches into `recorded.json.gz`: everything but the batches themselves, whose hash stays.

Of another kind than plain engines, which lies in a folder of its name, into `recorded_KIND.json.gz`.

    python tests/golden/condense.py ../shared/scheduler-golden [KIND]

The output is the same byte for byte each time. See README.md in this folder.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "recorded.json.gz"


def target(kind: str) -> Path:
    """The condensed file of a kind."""
    return TARGET if kind == "plain" else TARGET.with_name(f"recorded_{kind}.json.gz")


def read_condensed(kind: str) -> dict[str, dict[str, Any]]:
    """The condensed cases of a kind by name."""
    cases: dict[str, dict[str, Any]] = json.loads(gzip.decompress(target(kind).read_bytes()))
    return cases


def digest(steps: list[Any]) -> str:
    """The hash by which batches are compared, as the recording defines it."""
    return hashlib.sha256(json.dumps(steps, separators=(",", ":")).encode()).hexdigest()


def read_recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """Every recorded case by name, batches included; the random ones are `random-000`, `random-001`, ..."""
    cases: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json.gz")):
        name = path.name.removesuffix(".json.gz")
        with gzip.open(path, "rt") as file:
            content = json.load(file)
        cases |= {f"{name}-{i:03}": c for i, c in enumerate(content)} if isinstance(content, list) else {name: content}
    return cases


def main(folder: Path, kind: str = "plain") -> None:
    """Check every case against its own hash and write the condensed file."""
    cases = read_recorded(folder if kind == "plain" else folder / kind)
    for name, case in cases.items():
        if digest(case["steps"]) != case["batches_sha256"]:
            raise SystemExit(f"{name}: the batches do not match their hash; fetch the recording again")
    kept = {name: {key: value for key, value in case.items() if key != "steps"} for name, case in cases.items()}
    text = json.dumps(kept, separators=(",", ":"))
    file = target(kind)
    file.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{file.name}: {len(kept)} cases, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
