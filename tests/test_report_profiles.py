"""What the commands of `profile` print: documents that hold everything, and tables with the same figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from apex_opt.profiles.card import Card
from apex_opt.profiles.folder import TableReport
from apex_opt.profiles.inventory import Holding
from apex_opt.report.profile_tables import profile_page
from apex_opt.report.profiles import inventory_document, tables_document
from apex_opt.schema import to_plain


def card(**changed: Any) -> Card:
    fields: dict[str, Any] = {
        "name": "h200-sxm/ops",
        "licence": "Apache-2.0",
        "use": "times",
        "engine": None,
        "date": "",
        "gpu": "h200-sxm-141gb",
        "memory_bytes_per_s": 4.8e12,
        "flops_per_s": (("bf16", 989e12),),
        "tdp_w": 700.0,
        "idle_w": 125.0,
        "tables": (("gemm", "gemm.npz", ""),),
        "texts": (("hardware", "one [bold] board"), ("software", "kernels")),
    }
    return Card(**fields | changed)


def holding(accelerator: str = "h200-sxm", source: str = "ops", **changed: Any) -> Holding:
    tables = (("gemm", 1882, 55_400), ("memory", 36, 600))
    return Holding(accelerator=accelerator, source=source, card=card(**changed), tables=tables, card_bytes=2_000)


REPORTS = (
    TableReport(
        folder="h200-sxm/vllm",
        kind="gemm",
        source_rows=107_188,
        screened_rows=64_414,
        rows=31_428,
        file_bytes=72_500,
        dropped=(("lone", 591), ("k below 128", 6_479)),
        error=(0.001, 0.034, 0.002, 0.05),
    ),
    TableReport(
        folder="h200-sxm/vllm",
        kind="moe",
        source_rows=1,
        screened_rows=1,
        rows=1,
        file_bytes=1_234_567,
        dropped=(),
        error=None,
    ),
)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_inventory_holds_cards_and_sums() -> None:
    derived = (("derived", "screened"), ("hardware", "an L40S"))
    found = [holding(), holding("l40s", "vllm", engine="vllm", date="2026", use="energies", texts=derived)]
    document = to_plain(inventory_document(Path("/somewhere"), found))
    json.dumps(document, allow_nan=False)
    assert (document["command"], document["root"], document["tables"]) == ("profile show", "/somewhere", 4)
    assert (document["rows"], document["bytes"]) == (2 * 1918, 2 * 58_000)
    first, second = document["profiles"]
    assert (first["engine"], first["date"], first["hardware"]) == (None, None, "one [bold] board")
    assert first["tables"] == [
        {"table": "gemm", "rows": 1882, "bytes": 55_400},
        {"table": "memory", "rows": 36, "bytes": 600},
    ]
    assert (second["engine"], second["use"], second["derived"]) == ("vllm", "energies", "screened")
    text = flat(profile_page(document))
    assert "h200-sxm/ops any 2 1,918 58.0 kB measured times Apache-2.0 -" in text
    assert "l40s/vllm vllm 2 1,918 58.0 kB measured, screened energies Apache-2.0 2026" in text
    assert "2 folders of /somewhere, 4 tables, 3,836 rows, 116.0 kB" in text
    assert "board" not in text, "cards are for one accelerator at a time"


def test_one_accelerator_is_shown_in_full() -> None:
    text = flat(profile_page(to_plain(inventory_document(Path("p"), [holding()]))))
    assert "hardware one [bold] board" in text
    assert "gemm 1,882 rows, 55.4 kB" in text
    assert "1 folder of p, 2 tables" in text


def test_tables_that_were_made_are_told_with_what_they_lost() -> None:
    document = to_plain(tables_document("profile distill", Path("out"), REPORTS, [("a.csv", "no [table] of ours")]))
    assert (document["source_rows"], document["rows"], document["bytes"]) == (107_189, 31_429, 1_307_067)
    assert document["tables"][0]["dropped"] == {"lone": 591, "k below 128": 6_479}
    assert document["tables"][0]["lookup_error"] == {
        "median": 0.001,
        "p95": 0.034,
        "with_lone_median": 0.002,
        "with_lone_p95": 0.05,
    }
    assert document["tables"][1]["lookup_error"] is None
    text = flat(profile_page(document))
    assert "h200-sxm/vllm gemm 107,188 31,428 0.1% 3.4% 72.5 kB lone: 591; k below 128: 6,479" in text
    assert "h200-sxm/vllm moe 1 1 - - 1.2 MB" in text
    assert "passed over: a.csv: no [table] of ours" in text
    assert "2 tables written to out: 31,429 of 107,189 rows, 1.3 MB" in text


def test_tables_that_were_not_thinned_have_no_column_for_its_error() -> None:
    text = profile_page(to_plain(tables_document("profile import", Path("out"), REPORTS[1:])))
    assert "error" not in text
    assert "passed over" not in text
