"""Where the ranks of a plan go: every GPU in one command, degrees that multiply to the GPUs listed."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from launch_cases import CHECKPOINT, DENSE, MOE, asked, emitted, has, placed, servers, value
from plan_cases import dense, make_model

import apex_opt
from apex_opt.cluster.tree import place_of
from apex_opt.ir import Model, load_model
from apex_opt.launch import ENGINES, Command, launch
from apex_opt.plans.plan import Plan, Template, even_split, parse_plan
from apex_opt.plans.speculation import Speculation
from apex_opt.simulator.rescheduling import Rescheduling

DEGREES = {
    "vllm": ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size"),
    "sglang": ("--tp-size", "--pp-size"),
    "trtllm": ("--tp_size", "--pp_size"),
}
MODELS = Path(__file__).parent / "cases" / "models"
MIXTURE = load_model(MOE)
SHALLOW = make_model((dense(heads=16, kv=16), 16))


def degrees(command: Command, engine: str) -> int:
    """GPUs that an engine takes for its degrees. SGLang counts attention copies within tp, whole copies beside it."""
    flags = DEGREES[engine]
    if engine == "sglang" and "--enable-dp-attention" not in command.argv:
        flags = (*flags, "--dp-size")
    return math.prod(int(value(command, flag) or 1) for flag in flags)


def listed_gpus(command: Command) -> list[tuple[int, int]]:
    """GPUs that a command shows its processes, by node and number: mpirun has them host by host."""
    if command.argv[0] != "mpirun":
        shown = [(command.node, dict(command.env)["CUDA_VISIBLE_DEVICES"])]
    else:
        words = list(enumerate(command.argv))
        nodes = [int(command.argv[at + 1].partition(":")[0].removeprefix("NODE")) for at, w in words if w == "-host"]
        gpus = [w.partition("=")[2] for _, w in words if w.startswith("CUDA_VISIBLE_DEVICES=")]
        shown = list(zip(nodes, gpus, strict=True))
    return [(node, int(gpu)) for node, listed in shown for gpu in listed.split(",")]


@given(
    engine=st.sampled_from(sorted(ENGINES)),
    nodes=st.integers(1, 4),
    gpus=st.integers(1, 8),
    replicas=st.integers(1, 4),
    stages=st.integers(1, 4),
    attention=st.builds(Template, dp=st.sampled_from([1, 2, 4]), tp=st.integers(1, 8)),
    cut=st.sampled_from(["tp", "ep", "both", "copies"]),
    model=st.sampled_from([SHALLOW, MIXTURE]),
)
def test_every_gpu_is_in_one_command_and_the_degrees_multiply_to_them(
    engine: str, nodes: int, gpus: int, replicas: int, stages: int, attention: Template, cut: str, model: Model
) -> None:
    devices = attention.devices
    assume(replicas * stages * devices <= nodes * gpus)
    assume(cut != "both" or devices % 2 == 0)
    ffn = {
        "tp": Template(tp=devices),
        "ep": Template(ep=devices),
        "both": Template(tp=2, ep=max(devices // 2, 1)),
        "copies": Template(dp=attention.dp, tp=attention.tp),
    }[cut]
    problem = asked(model, nodes, gpus)
    plan = Plan(
        replicas=replicas,
        layers=even_split(problem.model.layers, stages),
        attention=attention,
        ffn=ffn,
        weight_format="bf16",
        kv_format="bf16",
        clock_mhz=1200,
    )
    assignment = placed(problem, plan)
    found = launch(problem, plan, engine, CHECKPOINT, assignment)
    if not found.commands:
        assert found.notes[0].startswith("no command")
        assert len(found.notes) > 1
        return
    wanted = Counter(place_of(gpu) for replica in assignment for stage in replica for gpu in stage)
    listed: Counter[tuple[int, int]] = Counter()
    of_replica: Counter[int] = Counter()
    for command in servers(found):
        assert command.replica is not None
        mine = listed_gpus(command)
        listed.update(mine)
        of_replica[command.replica] += len(mine)
        assert degrees(command, engine) == plan.stages * plan.stage_devices
    assert listed == wanted
    assert set(wanted.values()) == {1}
    assert of_replica == dict.fromkeys(range(replicas), plan.stages * plan.stage_devices)
    held = {
        (command.node, int(gpu))
        for command in found.commands
        if command.replica is None
        for gpu in command.argv[2].split(",")
    }
    assert held == set(wanted)
    ports = [(command.node, value(command, "--port")) for command in servers(found)]
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_replica_over_nodes_has_a_command_on_each(engine: str) -> None:
    found = servers(emitted(engine, DENSE, "dp2 pp2[41,39] tp2", 4, 2))
    assert [(command.replica, command.node) for command in found] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [value(command, "--node-rank") for command in found] == ["0", "1", "0", "1"]
    assert all(value(command, "--nnodes") == "2" for command in found)


@pytest.mark.parametrize(
    ("engine", "name"), [("sglang", "SGLANG_PP_LAYER_PARTITION"), ("vllm", "VLLM_PP_LAYER_PARTITION")]
)
def test_the_layers_of_stages_are_told_where_they_differ(engine: str, name: str) -> None:
    (command,) = emitted(engine, DENSE, "pp2[41,39] tp2", 1, 4).commands
    assert dict(command.env)[name] == "41,39"
    # 80 layers on three stages: larger ones first with us, last with SGLang, in the middle with vLLM.
    (command,) = emitted(engine, DENSE, "pp3 tp2", 1, 8).commands
    assert dict(command.env)[name] == "27,27,26"
    (command,) = emitted(engine, DENSE, "pp2 tp2", 1, 4).commands
    assert name not in dict(command.env)
    # Of LongCat-Flash two of our layers are one of the engine's.
    (command,) = emitted(engine, replace(load_model(DENSE), together=2), "pp2[42,38] tp2", 1, 4).commands
    assert dict(command.env)[name] == "21,19"


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_gpus_without_cuda_are_told_of_and_no_tool_of_cuda_is_called(engine: str) -> None:
    foreign = {"cuda": False, "capability": None}
    found = emitted(engine, DENSE, "dp2 tp3 clock=1200", 2, 4, gpu=foreign)
    if engine == "trtllm":
        assert not found.commands and has(found, "does not run CUDA", "TensorRT-LLM 1 needs")
        return
    assert len(servers(found)) == len(found.commands) == 2
    assert has(found, "clock: hold the GPUs at 1,200 MHz") and not has(found, "-lgc")
    assert has(found, "test-gpu", "does not run CUDA", "check")
    assert not has(emitted(engine, DENSE, "tp4", 1, 4), "CUDA")


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_clock_is_set_on_the_gpus_of_the_plan(engine: str) -> None:
    found = emitted(engine, DENSE, "dp2 tp3 clock=1200", 2, 4)
    clocks = [command.text for command in found.commands if command.replica is None]
    assert clocks == ["nvidia-smi -i 0,1,2 -lgc 1200"] * 2
    assert has(found, "nvidia-smi -lgc", "root")


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_replicas_stand_behind_a_router_that_deals_as_asked(engine: str) -> None:
    found = emitted(engine, DENSE, "dp2 tp4", 1, 8, routing="least_loaded")
    assert has(found, "router", "2 servers", "least_loaded")
    assert len({value(command, "--port") for command in found.commands}) == 2
    assert not has(emitted(engine, DENSE, "tp4", 1, 8), "router")


def test_the_router_that_a_plan_names_is_started_before_its_servers() -> None:
    found = emitted("vllm", DENSE, "dp2 tp4 route=cache_aware", 1, 8)
    assert has(found, "router", "2 servers", "cache_aware")
    *servers, router = found.commands
    ports = [value(command, "--port") for command in servers]
    assert router.replica is None
    assert value(router, "--policy") == "cache_aware"
    assert router.argv[-2:] == tuple(f"http://NODE0:{port}" for port in ports)
    assert value(router, "--port") not in ports
    assert [command.replica for command in emitted("vllm", DENSE, "dp2 tp4", 1, 8).commands] == [0, 1]


@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("weights", ["w4a16", "w8a16", "mxfp4"])
def test_a_format_that_is_not_made_while_loading_needs_its_checkpoint(engine: str, weights: str) -> None:
    found = emitted(engine, DENSE, f"tp8 {weights}", 1, 8)
    assert has(found, "needs a checkpoint in this format", weights)
    assert CHECKPOINT not in found.commands[0].argv
    assert f"CHECKPOINT_IN_{weights.upper()}" in found.commands[0].argv
    assert "--quantization" not in found.commands[0].argv


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_fp8_is_made_of_16_bits_and_taken_from_fp8(engine: str) -> None:
    made = emitted(engine, DENSE, "tp8 fp8", 1, 8)
    assert value(made.commands[0], "--quantization") == "fp8"
    assert CHECKPOINT in made.commands[0].argv
    taken = emitted(engine, "deepseek-v3", "attn(dp8) ffn(ep8) fp8", 1, 8)
    assert "--quantization" not in taken.commands[0].argv
    wider = emitted(engine, "deepseek-v3", "attn(dp8) ffn(ep8) bf16", 1, 8)
    assert has(wider, "needs a checkpoint", "bf16")


def test_figures_of_another_engine_are_said_to_be() -> None:
    assert has(emitted("sglang", DENSE, "tp8", 1, 8), "the figures are of test", "--engine=sglang")


def test_text_is_what_a_shell_reads_as_the_words() -> None:
    command = Command(node=0, replica=0, env=(("A", "1,2"), ("B", "x y")), argv=("vllm", "serve", "a folder/it's"))
    assert shlex.split(command.text) == ["A=1,2", "B=x y", "vllm", "serve", "a folder/it's"]


def test_gpus_that_do_not_run_cuda_are_told_to_take_another_build() -> None:
    foreign = {"cuda": False, "capability": None, "name": "mi300x-192gb"}
    told = "GPUs: mi300x-192gb takes a build for ROCm, against which none of these rules was held"
    assert told in emitted("vllm", DENSE, "tp8", 1, 8, gpu=foreign).notes
    assert not any("ROCm" in note for note in emitted("vllm", DENSE, "tp8", 1, 8).notes)


def test_what_moves_requests_is_said_to_be_started_by_no_command() -> None:
    assert not has(emitted("vllm", DENSE, "dp2 tp4", 1, 8), "rescheduling")
    moved = emitted("vllm", DENSE, "dp2 tp4", 1, 8, rescheduling=Rescheduling())
    assert has(moved, "rescheduling: no command here moves requests", "deal round_robin", "do not hold for them")


def test_longer_requests_than_the_longest_of_the_trace_are_said_to_be_refused() -> None:
    told = ("of at most 8,192 tokens", "longer ones are refused", "--max_model_len")
    assert has(emitted("sglang", DENSE, "tp8", 1, 8), *told)
    assert not has(emitted("sglang", DENSE, "tp8", 1, 8, holds_longest=True), *told)
    longest = load_model(DENSE).max_position
    assert not has(
        emitted("sglang", DENSE, "tp8", 1, 8, settings={"max_model_len": longest}), "longer ones are refused"
    )


@pytest.mark.parametrize(("name", "trusted"), [("baichuan2-13b", True), ("dbrx", False)])
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_models_that_bring_their_code_are_trusted_in_words(engine: str, name: str, trusted: bool) -> None:
    found = emitted(engine, load_model(str(MODELS / f"{name}.json")), "tp4", 1, 4)
    flag = "--trust_remote_code" if engine == "trtllm" else "--trust-remote-code"
    assert (flag in found.commands[0].argv) == trusted
    assert has(found, f"{flag}: baichuan models bring Python code of their own") == trusted


def test_a_model_that_the_engine_has_no_class_for_is_told_beside_its_commands() -> None:
    codegen = load_model(str(MODELS / "codegen-16b.json"))
    told = "model: as of vLLM 0.20 there is no class of its own for codegen models"
    assert has(emitted("vllm", codegen, "tp4", 1, 4), told)
    assert not has(emitted("vllm", DENSE, "tp4", 1, 4), "no class of its own")
    assert not has(emitted("sglang", codegen, "tp4", 1, 4), "no class of its own")


def test_a_name_that_stands_for_weights_is_to_be_replaced() -> None:
    codegen = load_model(str(MODELS / "codegen-16b.json"))
    problem = asked(codegen, 1, 4)
    plan = parse_plan("tp4", problem.model)

    def told(checkpoint: str, where: str = codegen.source) -> bool:
        known = replace(problem, model=replace(codegen, source=where))
        return has(
            launch(known, plan, "vllm", checkpoint, placed(problem, plan)),
            f"model: put the folder or the Hugging Face id of its weights in place of {checkpoint}",
        )

    assert told("codegen-16b")
    assert not told("Salesforce/codegen-16B-nl")
    assert not told("/models/codegen")
    assert not told("codegen", "/hub/models--codegen/snapshots/1/config.json")


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_draft_model_of_ones_own_is_named_by_its_folder(engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    config = Path(apex_opt.__file__).parent / "ir" / "configs" / "llama-3.1-8b.json"
    (folder / "config.json").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    known = Speculation(method="draft", draft_tokens=2, model=str(folder), accepted=((1,),))
    found = emitted(engine, DENSE, f"tp8 spec=draft:{folder}:2", 1, 8, settings={"drafting": (known,)})
    assert str(folder) in found.commands[0].text
    assert has(found, f"draft model: your folder {folder}; it must hold weights and tokenizer")
