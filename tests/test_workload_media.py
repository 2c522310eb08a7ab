"""Images and recordings that come with requests."""

from pathlib import Path

import pytest

from apex_opt.errors import InputError, UsageError
from apex_opt.workload import load_trace
from apex_opt.workload.trace import TEXT


def write(tmp_path: Path, *rows: str) -> str:
    file = tmp_path / "media.csv"
    file.write_text("\n".join(("arrival_s,prompt,output,image_tokens,audio_s", *rows)) + "\n")
    return str(file)


def test_tokens_of_images_count_in_prompts(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, "0,100,5,400,", "1,100,5,,", "2,50,5,200,", "3,150,5,0,"))
    assert trace.prompt.tolist() == [500, 100, 250, 150]
    assert trace.media.image_tokens == 300
    assert trace.media.image_share == 0.6
    assert trace.media.audio_s == 0


def test_the_longest_recording_is_known(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, "0,4,5,,12.5", "1,4,5,,29", "2,4,5,,"))
    assert trace.media.audio_s == 29
    assert trace.media.image_share == 0


@pytest.mark.parametrize("cell", ["-1", "long", "nan", "1e9"])
def test_a_recording_of_no_length_is_a_fault_of_its_row(tmp_path: Path, cell: str) -> None:
    with pytest.raises(InputError, match=r"audio_s .* is not 0 to 86,400 seconds"):
        load_trace(write(tmp_path, f"0,4,5,,{cell}"))


def test_images_that_are_no_count_are_a_fault_of_their_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image_tokens"):
        load_trace(write(tmp_path, "0,4,5,many,"))


def test_descriptions_have_images_and_recordings_too() -> None:
    trace = load_trace("poisson:rate=1,n=50,prompt=100,image_tokens=uniform(100,300),output=5")
    plain = load_trace("poisson:rate=1,n=50,prompt=100,output=5")
    assert (trace.prompt >= 200).all() and trace.media.image_share > 0.5
    assert (trace.arrival_ns == plain.arrival_ns).all() and plain.media == TEXT
    assert load_trace("static:n=5,prompt=4,output=5,audio_s=20").media.audio_s == 20
    with pytest.raises(UsageError, match="audio_s"):
        load_trace("static:n=5,audio_s=-1")


def test_parts_of_a_trace_keep_what_comes_with_requests() -> None:
    trace = load_trace("poisson:rate=1,n=50,prompt=100,image_tokens=300,output=5")
    assert trace.head(5).media == trace.stretched(2).media == trace.media
