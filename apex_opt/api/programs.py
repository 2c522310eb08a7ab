"""The programs of `formulations`: the only door to them."""

from __future__ import annotations

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = Path(__file__).resolve().parents[1]


def formulation(name: str) -> Any:
    """A room of `formulations`, which lie inside the package where it is installed, and beside it in a checkout."""
    if (PACKAGE / "formulations").is_dir():
        return importlib.import_module(f"apex_opt.formulations.{name}")
    if "formulations" not in sys.modules:
        # By its place: another folder of that name may come first on the path.
        beside = PACKAGE.parent / "formulations"
        found = spec_from_file_location(beside.name, beside / "__init__.py", submodule_search_locations=[str(beside)])
        assert found is not None and found.loader is not None
        sys.modules[beside.name] = module = module_from_spec(found)
        found.loader.exec_module(module)
    return importlib.import_module(f"formulations.{name}")
