"""Files that users let us write: whole or not at all, never over what is read, never through a name one can foresee."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from apex_opt import outputs
from apex_opt.errors import InputError
from apex_opt.launch.saved import check_new
from apex_opt.outputs import (
    check_folder,
    check_outputs,
    check_replaced,
    fresh_folder,
    taken_alone,
    write_whole,
    written,
)
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_gets_the_usual_permissions_and_keeps_those_it_has(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a.csv"
    write_whole(path, b"one", "requests")
    assert mode(path) == 0o666 & ~umask
    path.chmod(0o604)
    write_whole(path, b"two", "requests")
    assert (mode(path), path.read_bytes()) == (0o604, b"two")
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_link_is_followed_and_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(f"there/{name}.csv")
    (tmp_path / "there/old.csv").write_text("before")
    for name in ("old", "new"):
        write_whole(tmp_path / name, b"after", "requests")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / f"there/{name}.csv").read_text() == "after"


def test_what_is_no_file_and_what_is_protected_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "full").symlink_to("/dev/full")
    for name, said in (
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
        ("full", "not a regular file"),
        ("loop", "symbolic links"),
        ("gone/a", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "a name with a null character"),
    ):
        with pytest.raises(InputError, match=rf"^plot .*: cannot be written \(.*{said}.*\); name a file in a folder"):
            write_whole(tmp_path / name, b"", "plot")
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="write-protected"):
        write_whole(tmp_path / "mine", b"", "plot")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), ZeroDivisionError(), KeyboardInterrupt()])
def test_a_file_that_is_not_finished_leaves_nothing(tmp_path: Path, fault: BaseException) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with pytest.raises(InputError if isinstance(fault, OSError) else type(fault)), written(path, "requests") as file:
        file.write(b"half")
        raise fault
    assert os.listdir(tmp_path) == ["a.csv"]
    assert path.read_text() == "before"


def test_a_name_that_others_lay_out_is_neither_followed_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    for name in (".a.csv.part", "a.csv.part", ".a.csv.tmp"):
        (tmp_path / name).symlink_to("victim")
    write_whole(tmp_path / "a.csv", b"new", "requests")
    assert (tmp_path / "victim").read_text() == "mine"
    names = set()
    for _ in range(2):
        with written(tmp_path / "a.csv", "requests"):
            (name,) = {path.name for path in tmp_path.iterdir() if path.is_file() and not path.is_symlink()} - {
                "a.csv",
                "victim",
            }
            assert mode(tmp_path / name) & 0o077 == 0
            names.add(name)
    assert len(names) == 2


def test_an_ending_program_removes_what_is_half_written(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="No such file"),
        written(tmp_path / "a.csv", "requests"),
        fresh_folder(tmp_path / "b", lambda: None) as new,
    ):
        (new / "file").write_text("half")
        assert len(os.listdir(tmp_path)) == 2
        outputs.drop_unfinished()
        outputs.moving.release()
        assert os.listdir(tmp_path) == []
        new.rmdir()


# ---- before the work ---------------------------------------------------------------------------------------------


def checked(option: str, path: Path, **inputs: Path) -> str:
    with pytest.raises(InputError) as caught:
        check_outputs({option: path}, inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_output_is_none_of_the_inputs_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("mine")
    (tmp_path / "hard.csv").hardlink_to(trace)
    (tmp_path / "soft.csv").symlink_to("trace.csv")
    (tmp_path / "to").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("trace.csv", "hard.csv", "soft.csv", "to/trace.csv", "./trace.csv"):
        assert "is what --trace is read from; name another file" in checked("requests", Path(name), trace=trace)
        assert "is what --trace is read from" in checked("requests", trace, trace=Path(name))
    check_outputs({"requests": tmp_path / "other.csv"}, {"trace": trace})
    assert sorted(os.listdir(tmp_path)) == ["hard.csv", "soft.csv", "to", "trace.csv"]


def test_an_output_is_no_file_of_a_folder_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/gemm.csv").write_text("mine")
    assert "is what --profiles is read from" in checked("requests", tmp_path / "a/b/gemm.csv", profiles=tmp_path)
    check_outputs({"requests": tmp_path / "a/b/new.csv"}, {"profiles": tmp_path})


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").hardlink_to(tmp_path / "a.csv")
    (tmp_path / "c.csv").symlink_to("new.csv")
    for first, second in (("a.csv", "a.csv"), ("a.csv", "b.csv"), ("new.csv", "c.csv"), ("new.csv", "new.csv")):
        with pytest.raises(InputError, match="is the file of --requests too; name two files"):
            check_outputs({"requests": tmp_path / first, "timeline": tmp_path / second}, {})


def test_what_comes_with_the_program_is_not_overwritten() -> None:
    for name in ("apex_opt/ir/configs/llama-1t.json", "traces/chat.toml", "profiles/collectives.toml"):
        assert "is a part of apex_opt; name another file" in checked("timeline", DATA_ROOT / name)


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot be written (No such file or directory)" in checked("plot", tmp_path / "gone/a.png")
    assert "cannot be written (not a regular file)" in checked("plot", Path("/dev/full"))
    with pytest.raises(InputError, match=r"target .*: cannot be written"):
        check_folder(Path("/proc/nowhere/profiles"), "target")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        check_folder(tmp_path / "file/below", "target")
    check_folder(tmp_path / "new/below", "target")
    assert os.listdir(tmp_path) == ["file"]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "cannot be written (Read-only file system)" in checked("plot", tmp_path / "a.png")


# ---- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path: Path, umask: int) -> None:
    place = tmp_path / "h100/apex"
    for content in ("one", "two"):
        with fresh_folder(place, lambda: None) as new:
            (new / "a").write_text(content)
        assert (place / "a").read_text() == content
    assert mode(place) == 0o777 & ~umask
    with pytest.raises(ZeroDivisionError), fresh_folder(place, lambda: None) as new:
        (new / "a").write_text("three")
        raise ZeroDivisionError
    assert (place / "a").read_text() == "two"
    assert os.listdir(place.parent) == ["apex"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine").write_text("mine")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(OSError, match="a link to a folder"), fresh_folder(tmp_path / "link", lambda: None):
        pass
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".part" in self.name:
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Permission denied"), fresh_folder(tmp_path / "a", lambda: None):
        pass
    assert sorted(os.listdir(tmp_path)) == ["a", "link"]
    assert (tmp_path / "a/mine").read_text() == "mine"


def test_a_way_through_a_folder_that_is_missing_leads_where_it_says(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    around, found = tmp_path / "missing/../new", []
    with fresh_folder(around, lambda: found.append(os.listdir(tmp_path))) as new:
        (new / "a").write_text("a")
    assert "missing" not in {name for listed in found for name in listed}
    assert os.listdir(tmp_path) == ["new"] and os.listdir(tmp_path / "new") == ["a"]
    place, lock = taken_alone(around, "target")
    os.close(lock)
    assert place == tmp_path / "new" and os.listdir(tmp_path) == ["new"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file is not a folder"):
        check_folder(tmp_path / "missing/../file", "target")


def test_what_comes_into_a_folder_while_another_is_written_stays(tmp_path: Path) -> None:
    place = tmp_path / "new"
    with pytest.raises(InputError, match="not empty"), fresh_folder(place, lambda: check_new(place)) as new:
        (new / "a").write_text("a")
        place.mkdir()
        (place / "mine").write_text("mine")
    assert os.listdir(tmp_path) == ["new"] and os.listdir(place) == ["mine"]


def test_a_folder_with_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "profiles/h100/apex").mkdir(parents=True)
    source = tmp_path / "profiles/h100/apex/gemm.csv"
    source.write_text("")
    (tmp_path / "link.csv").symlink_to(source)
    for path in (source, tmp_path / "link.csv"):
        with pytest.raises(InputError, match=r"would be replaced, and .* is read; name another --target"):
            check_replaced(tmp_path / "profiles/h100/apex", [path])
    check_replaced(tmp_path / "profiles/h100/vidur", [source])


def test_an_ending_program_lets_a_move_through_first() -> None:
    with outputs.moving:
        ending = threading.Thread(target=outputs.drop_unfinished)
        ending.start()
        ending.join(0.05)
        assert ending.is_alive()
    ending.join(30)
    assert not ending.is_alive()
    outputs.moving.release()
