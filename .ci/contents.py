"""Check that an sdist or a wheel holds every file of the checkout that it should, as it is there, and no other.

Usage: python3 .ci/contents.py FILE...    each an apex_opt-*.tar.gz or an apex_opt-*.whl

What git tracks, or would, is what an sdist holds. A wheel has the rooms that pyproject.toml names for it, where it
says; its contents are printed room by room.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"}


def of_the_checkout() -> dict[str, bytes]:
    """Every file that git tracks or would track, by its path."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}


def promised(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those that pyproject.toml puts into the wheel, by their path there."""
    wheel = tomllib.loads(files["pyproject.toml"].decode())["tool"]["hatch"]["build"]["targets"]["wheel"]
    return {
        wheel["sources"].get(room, room) + name.removeprefix(room): content
        for room in wheel["only-include"]
        for name, content in files.items()
        if name.startswith(f"{room}/")
    }


def of_the_sdist(path: Path) -> dict[str, bytes]:
    """Files by their path below the folder that all lie in."""
    with tarfile.open(path) as archive:
        held = {each.name.partition("/")[2]: archive.extractfile(each) for each in archive if not each.isdir()}
        return {name: file.read() for name, file in held.items() if file is not None and name != "PKG-INFO"}


def of_the_wheel(path: Path) -> dict[str, bytes]:
    """Files by their path where they are installed, without what tells of the wheel itself."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    told = {name.partition(".dist-info/")[2] for name in held if ".dist-info/" in name}
    if told != METADATA:
        raise SystemExit(f"{path.name}: tells {sorted(told)} of itself, not {sorted(METADATA)}")
    return {name: content for name, content in held.items() if ".dist-info/" not in name}


def compared(name: str, held: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """End with the first files that are missing, strange or other than in the checkout."""
    faults = {
        "lacks": sorted(wanted.keys() - held.keys()),
        "holds besides": sorted(held.keys() - wanted.keys()),
        "holds otherwise than the checkout": sorted(
            each for each in held.keys() & wanted.keys() if held[each] != wanted[each]
        ),
    }
    if said := [
        f"{name} {fault}: {', '.join(each[:5])} ({len(each)} in all)" for fault, each in faults.items() if each
    ]:
        raise SystemExit("\n".join(said))


def room_of(name: str) -> str:
    """The room that a file of the wheel is told under."""
    parts = name.split("/")[:-1]
    return "/".join(parts[: 3 if "_data" in parts else 2])


def main(paths: list[Path]) -> None:
    """Check each."""
    files = of_the_checkout()
    for path in paths:
        if path.suffix != ".whl":
            compared(path.name, held := of_the_sdist(path), files)
            print(f"{path.name}: {len(held)} files, {path.stat().st_size / 1e6:.1f} MB, as the checkout has them")
            continue
        compared(path.name, held := of_the_wheel(path), promised(files))
        print(f"{path.name}: {len(held)} files, {path.stat().st_size / 1e6:.1f} MB, as the checkout has them")
        count, size = Counter(map(room_of, held)), Counter[str]()
        for name, content in held.items():
            size[room_of(name)] += len(content)
        for room in sorted(count):
            print(f"  {room:<28}{count[room]:>5} files{size[room] / 1e3:>10,.0f} kB")


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    main([Path(word) for word in sys.argv[1:]])
