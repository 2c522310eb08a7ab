"""The client's command sends the traffic that was asked about: same lengths, same arrivals, and says what is not so."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from cli_cases import Once
from launch_cases import CHECKPOINT, DENSE, asked, emitted

from apex_opt.engines.schedulers import SCHEDULINGS
from apex_opt.ir import load_model
from apex_opt.launch import ENGINES, Command, Launch
from apex_opt.launch.bench import DATASET, PIECE, Bench, bench, dataset, lasting
from apex_opt.plans.speculation import Drafter
from apex_opt.workload import Trace, load_trace, make_trace

if TYPE_CHECKING:
    from pathlib import Path

ONCE = Once()
CHEAP = ("--model=llama-3.1-8b", "--cluster=1xh200-sxm")
OPTIONS = {
    "vllm": {
        *("--backend", "--base-url", "--model", "--dataset-name", "--dataset-path", "--random-range-ratio"),
        *("--random-input-len", "--random-output-len", "--num-prompts", "--request-rate", "--burstiness", "--seed"),
        *("--max-concurrency", "--ignore-eos", "--save-result", "--save-detailed", "--result-filename", "--self-timed"),
        *("--timed-trace-chunk-hash-size", "--trust-remote-code"),
    },
    "python": {
        *(
            "--backend",
            "--base-url",
            "--model",
            "--dataset-name",
            "--random-range-ratio",
            "--random-input-len",
            "--seed",
        ),
        *("--random-output-len", "--num-prompts", "--request-rate", "--max-concurrency", "--output-file"),
        *("--output-details", "-m"),
    },
}
"""Options that the clients have, by the first word of their commands, as their documentation lists them."""


def made(
    trace: Trace,
    engine: str = "vllm",
    *,
    model: Any = DENSE,
    commands: Any = None,
    routing: Any = "round_robin",
    pools: int = 1,
    **changes: Any,
) -> Bench:
    """The command for a trace, where a plan on one node is served."""
    problem = replace(asked(model, 1, 8, settings={"scheduler": SCHEDULINGS[engine]()}), **changes)
    started = commands or emitted(engine, DENSE, "tp8", 1, 8).commands
    launch = Launch(engine=engine, commands=tuple(started), notes=(), served=CHECKPOINT, routing=routing)
    found = bench(problem, trace, launch, 3, pools=pools)
    if found.argv:
        assert {word for word in found.argv if word.startswith("-")} <= OPTIONS[found.argv[0]]
        assert shlex.split(found.text) == list(found.argv)
    return found


def value(found: Bench, flag: str) -> str | None:
    return found.argv[found.argv.index(flag) + 1] if flag in found.argv else None


def noted(found: Bench, word: str) -> bool:
    return any(note.startswith(word) for note in found.notes)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_requests_that_are_alike_are_made_by_options(engine: str) -> None:
    trace = load_trace("poisson:rate=5,n=400,prompt=700,output=60")
    found = made(trace, engine)
    own = engine == "sglang"
    assert found.argv[:3] == (("python", "-m", "sglang.bench_serving") if own else ("vllm", "bench", "serve"))
    flags = ("--random-input-len", "--random-output-len", "--num-prompts", "--seed", "--model", "--max-concurrency")
    assert [value(found, flag) for flag in flags] == ["700", "60", "400", "3", CHECKPOINT, None]
    assert value(found, "--random-range-ratio") == ("1" if own else "0")  # of SGLang the least over the most
    assert float(value(found, "--request-rate") or 0) == pytest.approx(trace.rate_per_s, rel=1e-5)
    assert (found.dataset, found.result) == (None, "bench.jsonl" if own else "bench.json")
    assert noted(found, "arrivals: drawn by the client")
    assert noted(found, "client: that of vLLM") == (engine == "trtllm")
    assert ("--ignore-eos" in found.argv) is not own  # SGLang's does by itself


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_clients_that_wait_are_as_many_and_send_at_no_rate(engine: str) -> None:
    trace = load_trace("closed:concurrency=16,n=64,prompt=512,output=8")
    found = made(trace, engine)
    assert (value(found, "--max-concurrency"), value(found, "--request-rate")) == ("16", None)
    assert not noted(found, "arrivals") and not noted(found, "clients")
    assert noted(made(replace(trace, pause_ns=2_000_000), engine), "clients: the pause of 2 ms")


def test_requests_that_come_at_once_are_sent_at_once() -> None:
    found = made(load_trace("static:n=64,prompt=512,output=8"))
    assert not {"--max-concurrency", "--request-rate", "--self-timed"} & set(found.argv)
    assert value(found, "--dataset-name") == "random"
    assert not noted(found, "arrivals")
    various = made(load_trace("static:n=64,prompt=uniform(5,90),output=8"))
    assert not {"--max-concurrency", "--request-rate", "--self-timed"} & set(various.argv)
    assert value(various, "--dataset-name") == "timed_trace"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_bursts_go_by_the_shape_of_their_gamma_law_which_the_client_of_vllm_alone_has(engine: str) -> None:
    found = made(load_trace("gamma:rate=5,cv=2,n=50,prompt=512,output=8"), engine)
    assert found.argv[0] == "vllm"
    assert value(found, "--burstiness") == "0.25"


VARIOUS = (
    "poisson:rate=5,n=50,prompt=lognormal(300,1,max=4000),output=8",
    "uniform:rate=5,n=50,prompt=512,output=8",
    "poisson:rate=5,n=50,prompt=512,output=8,prefix=(128,4)",
    "chat",
)


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("spec", VARIOUS)
def test_other_traffic_is_replayed_from_a_file_at_its_own_times(spec: str, engine: str) -> None:
    trace = load_trace(spec)
    found = made(trace, engine)
    assert found.argv[:3] == ("vllm", "bench", "serve")
    assert (value(found, "--dataset-name"), value(found, "--dataset-path")) == ("timed_trace", DATASET)
    assert found.dataset == DATASET
    assert "--self-timed" in found.argv and value(found, "--request-rate") is None
    assert value(found, "--num-prompts") == str(len(trace))
    assert value(found, "--timed-trace-chunk-hash-size") == str(trace.content_tokens or PIECE)
    assert noted(found, "client: vllm bench serve of vLLM 0.23 or later")


def test_clients_that_wait_send_requests_of_a_file_at_no_times() -> None:
    found = made(load_trace("closed:concurrency=4,n=20,prompt=uniform(10,900),output=8"))
    assert value(found, "--max-concurrency") == "4"
    assert "--self-timed" not in found.argv


@pytest.mark.parametrize("spec", [*VARIOUS, "closed:concurrency=4,n=20,prompt=uniform(10,9000),output=8"])
def test_the_file_is_the_trace(spec: str, tmp_path: Path) -> None:
    trace = load_trace(spec)
    path = tmp_path / DATASET
    path.write_text("".join(dataset(trace, 100_000)))
    again = load_trace(str(path), unit="s", block=trace.content_tokens or PIECE)
    assert (again.prompt.tolist(), again.output.tolist()) == (trace.prompt.tolist(), trace.output.tolist())
    assert again.arrival_ns.tolist() == pytest.approx((trace.arrival_ns - trace.arrival_ns[0]).tolist(), abs=1)
    assert again.content is not None
    if trace.content is not None:
        same = [column[:, None] == column for column in (trace.content, again.content)]
        assert np.array_equal(*same)
    else:
        assert len(set(again.content.tolist())) == len(again.content)  # nothing that two prompts share


def test_answers_end_where_the_model_does() -> None:
    trace = make_trace(name="long", arrival_ns=[5, 6], prompt=[90, 10], output=[50, 50])
    rows = [json.loads(line) for line in dataset(trace, 100)]
    assert [row["output_length"] for row in rows] == [10, 50]
    assert [row["timestamp"] for row in rows] == [0, 1e-9]


def test_requests_go_to_the_server_or_to_what_stands_before_several() -> None:
    trace = load_trace("static:n=4,prompt=5,output=8")
    server = Command(node=0, replica=0, argv=("serve", "--port", "8010"))
    other = replace(server, node=1, replica=1)
    before = Command(node=0, replica=None, argv=("python", "toy_proxy_server.py", "--port", "8192"))
    clock = Command(node=0, replica=None, argv=("nvidia-smi", "-lgc", "1200"))
    for commands, url in (
        ((clock, server), "http://127.0.0.1:8010"),
        ((server, replace(server, node=1)), "http://NODE0:8010"),
        ((other,), "http://NODE1:8010"),
        ((server, other), "http://127.0.0.1:8080"),
        ((server, replace(other, node=0), before), "http://127.0.0.1:8192"),
        ((server, other, before), "http://NODE0:8192"),
    ):
        found = made(trace, commands=commands)
        assert value(found, "--base-url") == url
        assert noted(found, "requests go to the router") == url.endswith(":8080")


def test_a_router_that_save_does_not_write_is_ones_own_to_provide() -> None:
    trace = load_trace("static:n=4,prompt=5,output=8")
    heads = [Command(node=at, replica=at, argv=("serve", "--port", "8000")) for at in range(2)]
    found = made(trace, commands=heads, routing="session")
    assert noted(found, "router: yours to provide at port 8080; --save writes none for session")
    assert value(found, "--base-url") == "http://127.0.0.1:8080"
    spread = [*heads, *(Command(node=at + 2, replica=at, argv=("serve", "--headless")) for at in range(2))]
    assert noted(made(trace, commands=spread), "router: yours to provide at port 8080; --save writes none for replicas")


def test_what_cannot_be_calibrated_is_not_said_to_be() -> None:
    trace = load_trace("static:n=4,prompt=5,output=8")
    (alone,) = [note for note in made(trace).notes if note.startswith("result")]
    assert "solve.py calibrate and validate take as --measured" in alone
    (plain,) = [note for note in made(trace, serving=("aggregated", "pools")).notes if note.startswith("result")]
    assert plain == alone  # replicas won over pools
    (pools,) = [note for note in made(trace, serving=("pools",), pools=2).notes if note.startswith("result")]
    assert "not of several pools" in pools and "--measured" not in pools


def test_the_client_trusts_the_code_that_a_checkpoint_brings_where_it_has_to_be_told() -> None:
    own = replace(load_model(DENSE), family="baichuan")
    alike, others = (
        load_trace("static:n=4,prompt=50,output=8"),
        load_trace("poisson:rate=1,n=9,prompt=lognormal(mean=50,sigma=1,max=90),output=8"),
    )
    for trace in (alike, others):
        assert "--trust-remote-code" in made(trace, model=own).argv
        assert "--trust-remote-code" not in made(trace).argv
    assert made(alike, "sglang", model=own).argv[0] == "python"
    assert "--trust-remote-code" not in made(alike, "sglang", model=own).argv  # which is no option of it


def test_what_no_client_sends_is_said() -> None:
    plain = make_trace(name="x", arrival_ns=[0, 5], prompt=[9, 9], output=[5, 5])
    assert [note.partition(":")[0] for note in made(plain).notes] == ["client", "result"]
    stated = make_trace(
        name="x", arrival_ns=[0, 5], prompt=[9, 9], output=[5, 5], max_new_tokens=[5, 6], session=[1, 1]
    )
    assert noted(made(stated), "max_new_tokens") and noted(made(stated), "sessions")
    assert noted(made(load_trace("static:n=4,prompt=50,output=8,image_tokens=20")), "images")
    assert noted(made(plain, drafters=(None, Drafter(method="eagle", draft_tokens=2))), "drafts")
    audio = made(load_trace("static:n=4,prompt=50,output=8,audio_s=20"))
    assert audio.argv == () and "recordings" in audio.notes[0]
    vectors = made(plain, model=replace(load_model(DENSE), pools=True))
    assert vectors.argv == () and "answers with a vector" in vectors.notes[0]


def test_a_folder_has_the_command_as_a_script_with_its_file_and_says_how_to_calibrate(tmp_path: Path) -> None:
    target = tmp_path / "start"
    trace = "poisson:rate=20,n=30,prompt=uniform(20,90),output=8"
    words = ("plan", *CHEAP, f"--trace={trace}", f"--save={target}", "--format=json")
    launch = json.loads(ONCE.run(*words).out)["launch"]
    script = (target / "bench.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert shlex.split(script.splitlines()[-1]) == launch["bench"]["argv"]
    assert (target / "bench.sh").stat().st_mode & 0o111
    assert (target / DATASET).read_text() == "".join(dataset(load_trace(trace), 131072))
    (line,) = [
        line for line in (target / "README.md").read_text().splitlines() if line.startswith("solve.py calibrate")
    ]
    assert shlex.split(line)[2:] == [
        "--measured=bench.json",
        "--model=llama-3.1-8b",
        "--cluster=1xh200-sxm-141gb",
        "--engine=vllm",
        "--plan=attn(tp1) ffn(tp1) bf16",
        "--out=mine.toml",
    ]


def test_addresses_in_the_script_are_variables_that_must_be_set(tmp_path: Path) -> None:
    target = tmp_path / "start"
    words = ("simulate", "--plan=tp16", "--cluster=2x8xh100-sxm", "--trace=static:n=4,prompt=64,output=4")
    assert ONCE.run(*words, f"--save={target}").code == 0
    script = (target / "bench.sh").read_text()
    assert '"$NODE0"' in script
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={"PATH": "/bin"}, check=False)
    assert done.returncode != 0 and "set NODE0" in done.stderr
    assert not (target / DATASET).exists()


def test_capacity_is_measured_at_the_rate_that_was_found() -> None:
    words = ("capacity", *CHEAP, "--slo=ttft_p95<=500ms", "--plan=tp1", "--emit", "--format=json")
    trace = "--trace=poisson:rate=1,n=300,prompt=300,output=20"
    document = json.loads(ONCE.run(*words, trace, "--resolution=0.2").out)
    argv = document["launch"]["bench"]["argv"]
    rate = float(argv[argv.index("--request-rate") + 1])
    assert rate == pytest.approx(document["best"]["rate_per_s"], rel=1e-4)
    assert 120 * rate <= int(argv[argv.index("--num-prompts") + 1]) < 120 * rate + 300
    page = ONCE.run(*words[:-1], trace, "--resolution=0.2").out
    assert document["launch"]["bench"]["text"] in page.splitlines()


def test_a_rate_is_measured_for_long_with_the_requests_of_the_trace_over_and_over() -> None:
    trace = load_trace("chat")
    found = lasting(trace, 20.0)
    assert found.rate_per_s == pytest.approx(20, rel=0.01)
    assert found.duration_s >= 119
    assert found.prompt[: len(trace)].tolist() == found.prompt[len(trace) : 2 * len(trace)].tolist()
    assert len(lasting(trace, 1e5)) == 20_000
    assert len(lasting(trace, 0.01)) == len(trace)


def test_a_replayed_run_is_read_with_the_arrivals_it_had(tmp_path: Path) -> None:
    trace = load_trace("poisson:rate=5,n=20,prompt=uniform(20,90),output=8")
    starts = (1e9 + (trace.arrival_ns - trace.arrival_ns[0]) / 1e9).tolist()
    result = {"request_rate": "inf", "max_concurrency": None, "completed": 20, "burstiness": 1.0, "start_times": starts}
    result |= {"input_lens": trace.prompt.tolist(), "output_lens": trace.output.tolist()}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    again = load_trace(str(path))
    assert again.arrival_ns.tolist() == pytest.approx((trace.arrival_ns - trace.arrival_ns[0]).tolist(), abs=1000)
    assert again.concurrency is None
