"""Condense recorded batches into `recorded.json.gz`: everything but the batches themselves, whose hash stays.

    python tests/golden/condense.py ../shared/scheduler-golden

The output is the same byte for byte each time. See README.md in this folder.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

KEPT = ("config", "trace", "first_token_us", "finish_us", "preemptions", "batches", "batches_sha256")
TARGET = Path(__file__).parent / "recorded.json.gz"


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


def main(folder: Path) -> None:
    """Check every case against its own hash and write the condensed file."""
    cases = read_recorded(folder)
    for name, case in cases.items():
        if digest(case["steps"]) != case["batches_sha256"]:
            raise SystemExit(f"{name}: the batches do not match their hash; fetch the recording again")
    kept = {name: {key: case[key] for key in KEPT} for name, case in cases.items()}
    text = json.dumps(kept, separators=(",", ":"))
    TARGET.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{TARGET.name}: {len(kept)} cases, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
