"""Profile folders for the tests of tables, laws and operations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.cluster import load_cluster
from apex_opt.profiles import Profile, load_profile
from apex_opt.profiles.card import read_card
from apex_opt.profiles.laws import Source
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.surface import Surface

ROOT = DATA_ROOT / "profiles"
H200 = load_cluster("h200-sxm").gpu

CARD = """
name = "{name}"
licence = "Apache-2.0"
{engine}

[gpu]
name = "h200-sxm-141gb"
memory_gb_per_s = 4800
tflops = {{ bf16 = 989, fp16 = 989, fp8 = 1979 }}
tdp_w = 700
idle_w = 125

[tables]
"""


def write_source(root: Path, name: str, tables: dict[str, str], engine: str | None = None) -> Path:
    """A profile folder below `root`, with tables given as CSV text; on the figures of an H200."""
    folder = root / name
    folder.mkdir(parents=True)
    card = CARD.format(name=name, engine=f'engine = "{engine}"' if engine else "")
    for kind, text in tables.items():
        (folder / f"{kind}.csv").write_text(text)
        card += f'[tables.{kind}]\nfile = "{kind}.csv"\n'
    (folder / "card.toml").write_text(card)
    return folder


def read_source(folder: Path) -> Source:
    """A source nobody else holds."""
    return Source(folder, read_card(folder))


def profile_of(root: Path, gpu: str, engine: str = "vllm") -> Profile:
    """An H200 whose own tables are those of `root`/`gpu`."""
    return load_profile(mine(gpu), engine, root)


def mine(name: str) -> Gpu:
    """An H200 by another name, and with tables of that name."""
    return replace(H200, name=name, profile=name)


def leave_one_out(surface: Surface) -> NDArray[np.float64]:
    """Relative error of the time at every measured point, its whole shape being left out of the table."""
    errors, counts = [], np.diff(surface.starts)
    for index in range(len(surface.features)):
        kept = np.arange(len(surface.features)) != index
        points = np.repeat(kept, counts)
        rest = replace(
            surface,
            features=surface.features[kept],
            starts=np.concatenate([[0], np.cumsum(counts[kept])]),
            knots=surface.knots[points],
            values=surface.values[points],
        )
        knots, values = surface.shape(index)
        errors.append(np.exp(values) / rest.ratio(tuple(surface.features[index]), knots) - 1)
    return np.concatenate(errors)
