"""The card of a profile folder: what its tables were measured on, with what, and the figures they are taken against."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apex_opt.cluster.toml_reader import TomlTable, read_toml
from apex_opt.cluster.uniform import MEMORY_GB_PER_S, TFLOPS, WATTS
from apex_opt.errors import join_faults
from apex_opt.profiles.power import PowerFit
from apex_opt.profiles.schema import PEAK_DTYPES, SCHEMAS, TABLE_ENGINES
from apex_opt.units import GB, TERA

if TYPE_CHECKING:
    from pathlib import Path

CARD_USES: Final = ("times", "energies")
"""What a folder serves: look-ups, or only the fit of a power model on a sample of rows."""

CARD_TEXTS: Final = ("hardware", "software", "method", "origin", "derived", "not_measured", "dropped")
"""What a card tells people: on what, with what and how its tables were measured, and what became of them since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A folder's card: the datasheet figures its efficiencies are taken against, and its tables.

    Attributes
    ----------
    use : str                   of `CARD_USES`
    engine : str or None        engine whose kernels were measured, of `TABLE_ENGINES`; None serves every engine
    date : str                  when the tables were measured or published; empty where not stated
    flops_per_s : tuple of (dtype, float)       by the formats of `PEAK_DTYPES`
    tables : tuple of (kind, file, sha256)      sha256 may be empty
    power : PowerFit or None    coefficients of a power model fitted on this accelerator
    texts : tuple of (field, text)      what people are told: `CARD_TEXTS` that are there
    """

    name: str
    licence: str
    use: str
    engine: str | None
    date: str
    gpu: str
    memory_bytes_per_s: float
    flops_per_s: tuple[tuple[str, float], ...]
    tdp_w: float
    idle_w: float
    tables: tuple[tuple[str, str, str], ...]
    power: PowerFit | None = None
    texts: tuple[tuple[str, str], ...] = ()


def read_card(folder: Path) -> Card:
    """The card of a profile folder.

    Raises
    ------
    InputError      missing or faulty card, all faults in one line
    """
    path = folder / "card.toml"
    root = TomlTable(read_toml(path, "profile card"), "", faults := [])
    name, licence = root.text("name"), root.text("licence")
    use = root.text("use", choices=CARD_USES, required=False)
    engine = root.text("engine", choices=TABLE_ENGINES, required=False)
    date = root.text("date", required=False)
    texts = tuple((field, text) for field in CARD_TEXTS if (text := root.text(field, required=False)))
    gpu_name = memory = tdp_w = idle_w = None
    flops: list[tuple[str, float]] = []
    if (gpu := root.table("gpu")) is not None:
        gpu_name = gpu.text("name")
        memory = gpu.within("memory_gb_per_s", MEMORY_GB_PER_S)
        tdp_w = gpu.within("tdp_w", WATTS)
        idle_w = gpu.number("idle_w", high=WATTS[1])
        gpu.text("source", required=False)
        if (peaks := gpu.table("tflops")) is not None:
            for dtype in PEAK_DTYPES:
                if (tflops := peaks.within(dtype, TFLOPS, required=False)) is not None:
                    flops.append((dtype, tflops * TERA))
            if not {"bf16", "fp16"} & {dtype for dtype, _ in flops}:
                faults.append("gpu.tflops needs bf16 or fp16")
            peaks.close()
        gpu.close()
    power = None
    if (entry := root.table("power", required=False)) is not None:
        power = _read_power(entry)
    tables: list[tuple[str, str, str]] = []
    if (listed := root.table("tables")) is not None:
        for schema in SCHEMAS:
            if (entry := listed.table(schema.name, required=False)) is not None:
                file, digest = entry.text("file"), entry.text("sha256", required=False)
                for field in ("about", "dropped", "lookup"):
                    entry.text(field, required=False)
                entry.close()
                if file is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+\.(csv|npz)", file):
                    faults.append(
                        f"tables.{schema.name}.file = {file[:40]!r} must name a .csv or .npz file beside the card"
                    )
                tables.append((schema.name, file or "", digest or ""))
        listed.close()
    root.close()
    if faults or not (name and licence and gpu_name and memory and tdp_w and idle_w):
        raise join_faults(f"profile card {path}", faults)
    return Card(
        name=name,
        licence=licence,
        use=use or CARD_USES[0],
        engine=engine,
        date=date or "",
        gpu=gpu_name,
        memory_bytes_per_s=memory * GB,
        flops_per_s=tuple(flops),
        tdp_w=tdp_w,
        idle_w=idle_w,
        tables=tuple(tables),
        power=power,
        texts=texts,
    )


def _read_power(entry: TomlTable) -> PowerFit | None:
    """Coefficients of a power model, or None after noting their faults."""
    names = ("active_w", "pj_per_flop", "pj_per_narrow_flop", "pj_per_byte")
    values = [entry.within(name, (0, 1e6)) for name in names]
    spin_w, source = entry.within("spin_w", (0, 1e6), required=False), entry.text("source")
    entry.close()
    if source is None or any(value is None for value in values):
        return None
    active_w, half, narrow, byte = (max(value or 0.0, 0.0) for value in values)
    return PowerFit(
        active_w=active_w,
        joule_per_flop_half=half * 1e-12,
        joule_per_flop_narrow=narrow * 1e-12,
        joule_per_byte=byte * 1e-12,
        source=source,
        spin_w=spin_w,
    )
