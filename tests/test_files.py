"""Files that users name: what is read, and what is refused before it can do harm."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest

from apex_opt import files
from apex_opt.errors import InputError
from apex_opt.files import expanded, files_below, read_bytes, read_json, read_text, there

LIMIT = 4 << 20


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, *, limit: int = LIMIT) -> str:
    with pytest.raises(InputError) as caught:
        read_text(path, limit=limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tilde_is_the_home_folder_and_a_folder_of_that_name_can_still_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a.csv") == tmp_path / "a.csv"
    assert expanded("~nobody-of-this-name/a") == Path("~nobody-of-this-name/a")
    assert expanded("/a/~") == Path("/a/~")


def test_text_comes_without_a_byte_order_mark_packed_or_not(tmp_path: Path) -> None:
    for content in (b"\xef\xbb\xbfa,\xc3\xa9", gzip.compress(b"\xef\xbb\xbfa,\xc3\xa9")):
        assert read_text(write(tmp_path / "a", content), limit=LIMIT) == "a,é"


def test_links_and_descriptors_lead_to_the_file_they_name(tmp_path: Path) -> None:
    write(tmp_path / "a", "text")
    (tmp_path / "link").symlink_to("a")
    assert read_text(tmp_path / "link", limit=LIMIT) == "text"
    with (tmp_path / "a").open() as file:
        assert read_text(Path(f"/proc/self/fd/{file.fileno()}"), limit=LIMIT) == "text"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        assert refused(path).endswith("not a regular file but a pipe")
    assert "but a folder" in refused(tmp_path)
    for device in ("/dev/zero", "/dev/full", "/dev/tty"):
        if Path(device).exists():
            assert "but a device" in refused(Path(device))


def test_a_socket_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")
        assert "but a socket" in refused(Path(folder) / "s")


def test_standard_input_is_read_where_it_is_a_file_and_refused_where_it_is_a_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        assert "but a pipe" in refused(Path(f"/proc/self/fd/{reader}"))
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")
def test_files_of_the_kernel_are_refused_by_any_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self/environ")
    for path in (Path("/proc/self/environ"), tmp_path / "link", Path("/proc/self/root/proc/self/environ")):
        assert "one of the kernel" in refused(path)
    with pytest.raises(InputError, match="a folder of the kernel"):
        files_below(Path("/proc"))


def test_a_file_that_becomes_a_pipe_between_the_look_and_the_opening_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = write(tmp_path / "a", "text"), os.open

    def swapped(name: Path, flags: int, *rest: int) -> int:
        if name == path:
            path.unlink()
            os.mkfifo(path)
        return opened(name, flags, *rest)

    monkeypatch.setattr(os, "open", swapped)
    # A reader that waits for the other end would hang here.
    done = threading.Thread(target=lambda: refused(path), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive()
    assert "but a pipe" in refused(path)


def test_a_file_is_held_to_its_limit_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert refused(path) == f"{path}: 1,099,511,627,776 bytes, above the limit of 4,194,304"
    assert read_bytes(write(tmp_path / "a", "1234"), limit=4) == b"1234"
    with pytest.raises(InputError, match="5 bytes, above the limit of 4; shorten it"):
        read_bytes(write(tmp_path / "a", "12345"), limit=4, want="shorten it")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(bytes(3 << 20)), "unpacks to more than 200 times its"),
        (gzip.compress(os.urandom(LIMIT - 5000) + bytes(1 << 20)), "unpacks to more than the limit of 4,194,304 bytes"),
        (gzip.compress(os.urandom(9999))[:5000], "not a whole gzip file"),
        (gzip.compress(b"x")[:-1], "not a whole gzip file"),
        (gzip.compress(b"x")[:-8] + b"12345678", "not a whole gzip file"),
        (gzip.compress(b"x") + b"and more", "not a whole gzip file"),
        (b"\x1f\x8b", "not a whole gzip file"),
        (gzip.compress(b"") * 10_001, "more than 10,000 gzip files in one"),
        (gzip.compress(gzip.compress(b"x")), "is a binary file"),
    ],
    ids=range(9),  # archives tell the time they were made
)
def test_archives_are_held_to_their_size_and_ratio(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(write(tmp_path / "a.gz", content))


def test_an_archive_of_several_is_read_whole(tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "a.gz", gzip.compress(b"x") * 9_999), limit=LIMIT) == "x" * 9_999


def test_a_small_archive_may_unpack_well(tmp_path: Path) -> None:
    text = "0,100,100\n" * 50_000
    assert read_text(write(tmp_path / "a.gz", gzip.compress(text.encode())), limit=LIMIT) == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\n\xff\n", "line 2 is not UTF-8 text"),
        (b"a\0b", "is a binary file"),
        ("a,b".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    ],
)
def test_text_in_another_form_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(write(tmp_path / "a", content))


def test_names_that_lead_nowhere_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    write(tmp_path / "a", "text")
    for name, said in (
        ("no", "no such file"),
        ("gone", "a link to nowhere, which leads to no file"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
        ("a/b", "cannot be read (Not a directory)"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("a\0b", "cannot be read (a name with a null character"),
    ):
        assert said in refused(tmp_path / name)
        assert not there(tmp_path / name)


def test_an_unreadable_file_is_there_and_said_to_be_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", "text")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert refused(path) == f"{path}: cannot be read (Permission denied)"
    monkeypatch.setattr(Path, "stat", refuse)
    assert there(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ('{"a": 1,\n "b" 2}', "not JSON at line 2 column 6"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 10_000, "too many digits"),
        ('{"a": NaN}', "holds NaN, which is no JSON number"),
    ],
)
def test_json_with_faults_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_json(write(tmp_path / "a.json", text), limit=LIMIT, finite=True)


def test_python_s_own_numbers_are_read_where_they_are_not_refused(tmp_path: Path) -> None:
    assert read_json(write(tmp_path / "a.json", "[0.0, Infinity]"), limit=LIMIT) == [0.0, float("inf")]


def test_json_of_very_many_values_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_VALUES", 1000)
    path = write(tmp_path / "a.json", json.dumps([{}] * 400))
    assert len(read_json(path, limit=LIMIT)) == 400
    for many in ([{}] * 501, [[]] * 501, [0] * 1001):
        with pytest.raises(InputError, match="more than 1,000 values"):
            read_json(write(path, json.dumps(many)), limit=LIMIT)


def test_files_below_are_found_by_name_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("b/2.CSV", "a.csv", "c.json", ".hidden/x.csv", ".y.csv"):
        write(tmp_path / name, "")
    assert files_below(tmp_path, (".csv",)) == [tmp_path / "a.csv", tmp_path / "b/2.CSV"]
    assert files_below(tmp_path) == [tmp_path / "a.csv", tmp_path / "b/2.CSV", tmp_path / "c.json"]
    monkeypatch.setattr(files, "MOST_FILES", 3)
    with pytest.raises(InputError, match="more than 3 files and folders in it"):
        files_below(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        files_below(tmp_path / "gone")
