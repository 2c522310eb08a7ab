"""Results of a study in a folder of Parquet files: a part for each time that some came, whole or not at all.

A run that ends writes all parts anew as one; one that is killed leaves the parts that it had written. Every file bears
the digest of its study, so that no other goes on in its folder.
"""

from __future__ import annotations

import os
import uuid
from time import time_ns
from typing import TYPE_CHECKING, Final, Self

from apex_opt.errors import InputError, UsageError
from apex_opt.grids.points import figures
from apex_opt.outputs import check_folder, taken_alone, write_whole
from apex_opt.report.study import option_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from apex_opt.grids.points import Outcome
    from apex_opt.grids.study import Options, Study

_STUDY: Final = b"apex_opt.study"


class Store:
    """The folder of a study, taken by one run at a time.

    Parameters
    ----------
    folder : Path    made where there is none
    study : Study

    Raises
    ------
    UsageError    without the package pyarrow
    InputError    a folder that cannot be written, is taken by a run, or holds what is not of this study
    """

    def __init__(self, folder: Path, study: Study) -> None:
        try:
            import pyarrow as pa
        except ImportError:
            raise UsageError("study needs the package pyarrow: pip install 'apex-opt[study]'") from None
        self._folder, self._axes = folder, tuple(study.axes)
        self._digest = study.digest.encode()
        numbers = [("point", pa.int32()), ("row", pa.int32()), ("same_as", pa.int32())]
        axes = [(f"options.{name}", pa.string()) for name in self._axes]
        told = [("status", pa.string()), ("exit_code", pa.int32()), ("error", pa.string()), ("seconds", pa.float64())]
        plan = [("plan", pa.string()), ("gpus", pa.int64()), *((f"figures.{name}", pa.float64()) for name in figures())]
        last = [("key", pa.string()), ("document", pa.string())]
        self._schema = pa.schema(numbers + axes + told + plan + last, metadata={_STUDY: self._digest})

    def __enter__(self) -> Self:
        check_folder(self._folder, "target")
        self._folder, self._lock = taken_alone(self._folder, "target")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def _parts(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("*.parquet") if not path.name.startswith("."))

    def rows(self, *, documents: bool = False) -> list[Options]:
        """What there is of the study, by point and row.

        Raises
        ------
        InputError    a file that is not of this study, or damaged
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        found: dict[tuple[int, int], Options] = {}
        columns = [name for name in self._schema.names if documents or name != "document"]
        for path in self._parts():
            try:
                file = pq.ParquetFile(path)
                if (file.schema_arrow.metadata or {}).get(_STUDY) != self._digest:
                    raise InputError(
                        f"{path}: is of another study or of another release of apex_opt; name another --target"
                    )
                part = file.read(columns=columns).to_pylist()
            except (pa.ArrowException, OSError) as error:
                text = " ".join(str(error).split())
                way_out = "remove it, or name another --target"
                raise InputError(f"{path}: cannot be read as Parquet ({text:.200}); {way_out}") from None
                # A run that was killed while it made one of all parts leaves some twice; of what was answered anew the
            # later counts.
            found |= {(row["point"], row["row"]): row for row in part}
        return [found[place] for place in sorted(found)]

    def add(self, found: Iterable[tuple[int, int | None, Options, str, Outcome]]) -> None:
        """Write what became of points: number, that of the one it is the same as, options, key, outcome."""
        rows: list[Options] = []
        for point, same_as, options, key, outcome in found:
            for number, row in enumerate(outcome.rows):
                rows.append(
                    {
                        "point": point,
                        "row": number,
                        "same_as": same_as,
                        **{f"options.{name}": option_text(options[name]) for name in self._axes},
                        **{each: getattr(outcome, each) for each in ("status", "exit_code", "error", "seconds")},
                        "plan": row.get("plan"),
                        "gpus": row.get("gpus"),
                        **{f"figures.{name}": value for name, value in row.get("figures", {}).items()},
                        "key": key,
                        "document": outcome.document if number == 0 and same_as is None else "",
                    }
                )
        self._write(rows)

    def _write(self, rows: Sequence[Options]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(list(rows), self._schema), sink, compression="zstd")
        write_whole(
            self._folder / f"part-{time_ns():020}-{uuid.uuid4().hex[:8]}.parquet",
            sink.getvalue().to_pybytes(),
            "target",
        )

    def close_up(self) -> None:
        """Make one part of all."""
        if len(parts := self._parts()) > 1:
            self._write(self.rows(documents=True))
            for path in parts:
                path.unlink(missing_ok=True)
