"""From names and numbers to a problem: defaults, formats, plans, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apex_opt.arguments import LARGEST_BATCH, Ask, PlaceAsk, PlanAsk, SimulateAsk
from apex_opt.cluster.tree import place_of
from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError
from apex_opt.planned import resolve_place, resolve_plan
from apex_opt.resolve import resolve

CASES = Path(__file__).parent / "cases" / "traces"
CHEAP = {"model": "llama-3.1-8b", "trace": "static:n=2,prompt=8,output=4"}


def options(**given: Any) -> Ask:
    """What `plan` would be asked with these, a small model and trace otherwise."""
    return Ask(**CHEAP | given)


def test_a_problem_holds_what_was_asked() -> None:
    problem = resolve(options(cluster="2x8xh100-sxm", gpus=12, slo="tpot_p95<=9ms", seed=3, max_num_seqs=99))
    assert problem.model.name == "llama-3.1-8b"
    assert (problem.cluster.nodes, problem.cluster.size, problem.max_devices) == (2, 16, 12)
    assert problem.slos[0].text == "tpot_p95<=9ms"
    assert problem.settings.max_num_seqs == 99
    assert problem.settings.max_model_len == problem.model.max_position
    assert len(problem.trace) == 2


def test_all_gpus_are_offered_unless_fewer_are_asked_for() -> None:
    assert resolve(options()).max_devices == 8


MIXED = "".join(f'[[nodes]]\npreset = "{preset}"\n' for preset in ("server-4xv100", "dgx-h100", "server-4xv100"))


def test_gpus_of_several_types_make_an_offer_each_with_what_follows_from_the_gpu(tmp_path: Path) -> None:
    (file := tmp_path / "mixed.toml").write_text(MIXED)
    problem = resolve(options(cluster=str(file), gpus=10))
    old, new = problem.offers
    assert (problem.types, problem.max_devices) == (("v100-pcie-16gb", "h100-sxm-80gb"), 10)
    assert [(offer.cluster.nodes, offer.cluster.size, offer.free) for offer in (old, new)] == [(2, 8, 8), (1, 8, 8)]
    assert [offer.weight_formats for offer in (old, new)] == [("fp16",), ("bf16",)]
    assert problem.between is not None
    assert old.tree is not None
    assert new.tree is not None
    assert {place_of(gpu)[0] for gpu in old.tree.gpus} == {0, 2}
    assert {place_of(gpu)[0] for gpu in new.tree.gpus} == {1}
    assert [problem.alone(place).max_devices for place in (0, 1)] == [8, 8]
    (one,) = resolve(options()).offers
    assert one.tree is None
    assert resolve(options()).between is None


def test_gpus_of_several_types_have_no_one_price(tmp_path: Path) -> None:
    (file := tmp_path / "mixed.toml").write_text(MIXED)
    with pytest.raises(UsageError, match=r"--price: mixed has GPUs of several types.*gpu\.price_per_h"):
        resolve(options(cluster=str(file), price=2.0))
    with pytest.raises(UsageError, match="--gpus: 17 is not between 1 and the 16 GPUs of mixed"):
        resolve(options(cluster=str(file), gpus=17))
    with pytest.raises(UsageError, match="the limit is 8"):
        resolve(options(cluster=str(file)), most_gpus=8)


def test_gpus_taken_out_are_not_offered_and_a_type_without_any_makes_no_problem(tmp_path: Path) -> None:
    (file := tmp_path / "mixed.toml").write_text(MIXED)
    left = resolve(options(cluster=str(file), busy="node0", down="node2,node1:3"))
    assert (left.types, left.max_devices, left.offer.free) == (("h100-sxm-80gb",), 7, 7)
    one = resolve(options(cluster="8xh100-sxm", busy="node0:0-2"))
    assert (one.max_devices, one.tree and one.tree.gpus[0]) == (5, "node0:3")
    with pytest.raises(UsageError, match="--gpus: 6 is not between 1 and the 5 free GPUs of 8xh100-sxm"):
        resolve(options(cluster="8xh100-sxm", busy="node0:0-2", gpus=6))
    with pytest.raises(UsageError, match="'8xh100-sxm-80gb': no GPU is free; take fewer out"):
        resolve(options(cluster="8xh100-sxm", busy="node0"))
    with pytest.raises(UsageError, match="--down: node0:8: node0 has GPUs 0 to 7"):
        resolve(options(cluster="8xh100-sxm", down="node0:8"))


def test_a_plan_with_stages_on_several_types_is_for_no_one_cluster() -> None:
    for types, message in (("h100-sxm-80gb:1+a100-sxm-80gb:1", "unknown type of GPU"), ("h100-sxm-80gb:2", "leave it")):
        with pytest.raises(ApexError, match=message):
            resolve_plan(f"pp2 bf16 on={types}", options(cluster="2xh100-sxm"))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("attn(dp2,tp2) ffn(dp2,tp2)", "dp2 attn(tp2) ffn(tp2) bf16"),
        ("dp2 attn(dp4) ffn(dp2,tp2)", "dp4 attn(dp2) ffn(tp2) bf16"),
    ],
)
def test_copies_of_the_whole_are_written_as_the_replicas_that_the_search_knows(text: str, written: str) -> None:
    # Their figures are of copies that share their limits, so that one could be better than what is called the best.
    with pytest.raises(
        UsageError, match=rf"are 2 copies of the whole, which are replicas; write {re.escape(written)}$"
    ):
        resolve_plan(text, options(cluster="8xh100-sxm"))
    assert str(resolve_plan(written, options(cluster="8xh100-sxm", routing="round_robin"))[1]).startswith(written)
    # A measurement is of what ran.
    assert resolve_plan(text, options(cluster="8xh100-sxm"), ran=True)[1].plan.devices


def test_a_price_that_is_given_stands_in_place_of_the_catalogues() -> None:
    gpu = resolve(options(cluster="2xh100-sxm")).cluster.gpu
    priced = resolve(options(cluster="2xh100-sxm", price=2.25)).cluster.gpu
    assert (gpu.price_per_h, priced.price_per_h) == (3.0, 2.25)
    assert dict(gpu.sources)["price_per_h"].startswith("assumed")
    assert dict(priced.sources)["price_per_h"] == "given: --price"
    assert replace(priced, price_per_h=gpu.price_per_h, sources=gpu.sources) == gpu


def test_a_cost_of_gpus_without_a_price_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'nodes = 1\ngpus_per_node = 1\n[gpu]\nname = "mine"\nmemory_gib = 80\nmemory_gb_per_s = 3000\n'
        "tflops = { bf16 = 900 }\ntdp_w = 700\n"
    )
    assert resolve(options(cluster=str(file))).cluster.gpu.price_per_h is None
    for asked in ({"objective": "cost"}, {"objective": "energy,cost_per_mtoken"}, {"slo": "cost<=3$/h"}):
        with pytest.raises(UsageError, match=r"no price is stated for mine.*--price, or gpu\.price_per_h"):
            resolve(options(cluster=str(file), **asked))
        assert resolve(options(cluster=str(file), price=2.0, **asked)).cluster.gpu.price_per_h == 2.0
    file.write_text(file.read_text() + "price_per_h = 1.5\n")
    gpu = resolve(options(cluster=str(file), objective="cost")).cluster.gpu
    assert (gpu.price_per_h, dict(gpu.sources)["price_per_h"]) == (1.5, "stated in mine.toml")


def test_several_objectives_are_asked_in_their_order() -> None:
    problem = resolve(options(objective="energy~2%,e2e_p99.9,cost", slo="ttft_p12.5<=1s,tpot<=1s@99%"))
    assert [(part.name, part.tolerance) for part in problem.objectives] == [
        ("energy", 0.02),
        ("e2e_p99.9", 0.0),
        ("cost", 0.0),
    ]
    assert problem.percentiles == ("p12.5", "p99.9")
    assert [part.figure.name for part in problem.asked] == ["energy", "e2e", "cost", "ttft", "tpot"]
    assert not problem.asks_gaps
    assert resolve(options(slo="itl<=1s@99%")).asks_gaps


def test_the_seed_reaches_described_traces() -> None:
    spec = "poisson:rate=1,n=50"
    first, again, other = (resolve(options(trace=spec, seed=seed)).trace for seed in (1, 1, 2))
    assert (first.arrival_ns == again.arrival_ns).all()
    assert (first.arrival_ns != other.arrival_ns).any()


@pytest.mark.parametrize(
    ("cluster", "weights", "expected"),
    [
        ("8xh100-sxm", None, (("bf16",), ("bf16",))),
        ("8xv100-pcie", None, (("fp16",), ("fp16",))),
        ("8xh100-sxm", "fp8, w4a16", (("fp8", "w4a16"), ("bf16", "bf16"))),
        ("8xh100-sxm", "FP8", (("fp8",), ("bf16",))),
        ("8xv100-pcie", "bf16", (("bf16",), ("bf16",))),
    ],
)
def test_formats_are_those_named_or_the_models_own_as_the_gpu_has_it(
    cluster: str, weights: str | None, expected: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    problem = resolve(options(cluster=cluster, weights=weights))
    assert (problem.offer.weight_formats, problem.offer.kv_formats) == expected


def test_a_kv_format_goes_with_every_weight_format() -> None:
    assert resolve(options(weights="bf16,fp8", kv="FP8")).offer.kv_formats == ("fp8", "fp8")


def test_without_chunking_a_batch_takes_the_longest_prompt() -> None:
    assert resolve(options(chunked_prefill=False, max_model_len=20_000)).settings.max_num_batched_tokens == 20_000
    assert resolve(options(chunked_prefill=False, max_model_len=500)).settings.max_num_batched_tokens == 8192
    assert resolve(options(max_model_len=20_000)).settings.max_num_batched_tokens == 8192


def test_a_router_of_a_plan_that_deals_by_caches_which_are_off_is_told_as_one_that_is_asked_for() -> None:
    def told(text: str, **given: Any) -> list[str]:
        notes = resolve_plan(text, SimulateAsk(**CHEAP | given, plan=text))[0].notes
        return [note for note in notes if "deals by what caches hold" in note]

    (note,) = told("dp2", routing="llm_d_kv")
    assert told("dp2 route=llm_d_kv") == told("dp2 route=llm_d_kv", routing="llm_d_kv") == [note]
    assert told("dp2 route=least_loaded") == told("dp2 route=llm_d_kv", prefix_caching=True) == []


def test_seats_of_drafts_that_do_nothing_are_told() -> None:
    given: dict[str, Any] = {"engine": "sglang", "engine_settings": "drafting_seats=4"}
    drafts = {"speculation": "eagle:3", "acceptance": "0.7/0.5/0.3"}

    def told(**more: Any) -> list[str]:
        return [note for note in resolve(options(**given | more)).notes if "drafting_seats" in note]

    (note,) = told()
    assert "drafting_seats has no effect where no drafts are made" in note
    (note,) = told(**drafts, max_num_seqs=16)
    assert "drafting_seats has no effect beside --max_num_seqs" in note
    assert told(**drafts) == told(engine_settings=None) == []


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm", "orca", "static"])
def test_a_limit_of_a_batch_that_was_asked_for_is_kept_or_refused_when_prompts_are_whole(engine: str) -> None:
    given = {"engine": engine, "chunked_prefill": False, "trace": "static:n=2,prompt=512,output=128", "max_num_seqs": 8}
    with pytest.raises(
        UsageError, match=r"--max_num_batched_tokens: 100 has no room for the (512|640) tokens"
    ) as refused:
        resolve(options(**given, max_num_batched_tokens=100))
    assert ("--chunked_prefill" in str(refused.value)) == (engine not in ("orca", "static"))
    with pytest.raises(UsageError, match="--max_num_batched_tokens: 100 has no room"):
        resolve(options(**given, max_num_batched_tokens=(4096, 100)))
    assert resolve(options(**given, max_num_batched_tokens=640)).settings.max_num_batched_tokens == 640


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "e2e"}, "unknown objective 'e2e'; did you mean"),
        ({"objective": "latency"}, "unknown objective 'latency'"),
        ({"objective": "ttft_q95"}, "unknown objective: statistic of ttft 'q95'; did you mean p95"),
        ({"objective": "energy,energy"}, "--objective: 'energy,energy' names energy twice"),
        ({"objective": "energy~2%"}, "has a tolerance and nothing after it"),
        ({"objective": "goodput"}, "goodput counts requests within their latency goals, and there are none"),
        ({"objective": "goodput", "slo": "ttft_mean<=1s,itl_p95<=1s"}, "give percentiles or shares of ttft"),
        ({"slo": "goodput>=5"}, "goodput counts requests"),
        ({"slo": "tpot"}, "SLO 'tpot': expected METRIC_STATISTIC<=LIMIT"),
        ({"slo": "tpot_p95<=0ms"}, "the limit must be above 0"),
        ({"slo": "tpot_p95<=nanms"}, "the limit must be a number and a unit"),
        ({"slo": "tpot_p95<=1e999ms"}, "the limit must be above 0 and finite"),
        ({"slo": "tpot_p95<=1ms,tpot_p95<=2ms"}, "limited twice"),
        (
            {"engine": "zzz"},
            "unknown engine 'zzz'; known: orca, sglang, sglang-0.5.9, sglang-0.5.9-drafts, sglang-eager, static, "
            "trtllm, trtllm-1.0, trtllm-1.1, trtllm-1.2, vllm, vllm-0.12, vllm-0.6",
        ),
        (
            {"engine": "orca", "emit": True},
            "--emit: no command starts orca; of these there are some: --engine=sglang, ",
        ),
        (
            {"engine": "sglang-0.5.9-drafts"},
            "its times are of plans that verify drafts, and there are plans without here; give --speculation such as "
            "mtp:3, or --engine=sglang-0.5.9",
        ),
        (
            {"engine": "sglang-0.5.9-drafts", "speculation": "none,eagle:3", "acceptance": "2"},
            "and there are plans without here",
        ),
        (
            {
                "engine": "sglang-0.5.9-drafts",
                "speculation": "eagle:3",
                "acceptance": "2",
                "async_scheduling": True,
            },
            "--async_scheduling=true: the times of sglang-0.5.9-drafts are without overlap; leave it out, or give "
            "--engine=sglang-0.5.9",
        ),
        ({"engine_settings": "mixed=1"}, "unknown setting of vllm 'mixed'"),
        ({"serving": "pools", "engine": "static"}, "how static hands prompts over to another pool is not modelled"),
        (
            {"serving": "pools", "engine": "vllm-0.6"},
            "vllm-0.6 has idle_sleep_us=0 here; give --engine_settings=idle_s",
        ),
        (
            {"serving": "pools", "engine_settings": "idle_sleep_us=0"},
            "vllm has idle_sleep_us=0 here; give --engine_set",
        ),
        ({"engine": "orca", "prefix_caching": True}, "prefix_caching goes with the engines vllm, "),
        ({"model": "llama-9"}, "unknown model 'llama-9'"),
        ({"cluster": "8xh101"}, "unknown GPU 'h101'"),
        ({"cluster": "16xh100-sxm"}, "one node of h100-sxm-80gb holds 8 GPUs, asked for 16; write 2x8x"),
        ({"cluster": "0xh100-sxm"}, "'0' must be a whole number from 1"),
        ({"trace": "chatt"}, "unknown trace 'chatt'; did you mean chat"),
        ({"trace": "poisson:rate=nan"}, "rate must be a number"),
        ({"trace": "poisson:rate=0"}, "rate must be a number"),
        ({"trace": "static:n=0"}, "n must be a whole number from 1"),
        ({"trace": "static:n=1,prompt=-5"}, "prompt must be a whole number from 1"),
        ({"trace": "closed:n=5"}, "concurrency= is missing"),
        ({"weights": "fp4"}, "unknown number format 'fp4'"),
        ({"weights": ","}, "unknown number format ''"),
        ({"weights": "bf16,BF16"}, "names a format twice"),
        ({"weights": "bf16,w4a16+fp8"}, "--weights: w4a16+fp8 is a mix that only its own checkpoint has"),
        ({"kv": "int3"}, "unknown KV format 'int3'"),
        ({"kv": "bf16,fp8"}, "--kv: 'bf16,fp8' names several formats, and it takes one of bf16, fp16, fp8; ask once"),
        ({"gpus": 9}, "--gpus: 9 is not between 1 and the 8 GPUs of 8xh100-sxm"),
        ({"max_model_len": 200_000}, "--max_model_len: 200000 is beyond the 131072 positions llama-3.1-8b is made for"),
        ({"max_num_seqs": 100, "max_num_batched_tokens": 99}, "max_num_batched_tokens 99 is below max_num_seqs 100:"),
        (
            {"engine": "trtllm", "max_num_batched_tokens": 300},
            "is below max_num_seqs 2048, the default of trtllm: every running sequence may want a token in one batch; "
            "give --max_num_seqs=300 or less",
        ),
        (
            {"engine": "trtllm", "max_num_seqs": 9000},
            "max_num_batched_tokens 8192, the default of trtllm, is below max_num_seqs 9000",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_asked_is_named_with_the_way_out(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ApexError) as caught:
        resolve(options(**given))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_search_over_too_many_gpus_is_refused_with_the_limit() -> None:
    with pytest.raises(UsageError, match="plans of 65536 GPUs are too many to enumerate, the limit is 512"):
        resolve(options(cluster="8192x8xh100-sxm"), most_gpus=512)
    assert resolve(options(cluster="8192x8xh100-sxm", gpus=16), most_gpus=512).max_devices == 16
    assert resolve(options(cluster="8192x8xh100-sxm")).max_devices == 65_536


def test_a_prompt_too_long_to_tabulate_whole_is_refused_with_the_limit(tmp_path: Any) -> None:
    from apex_opt.ir.registry import CONFIG_FOLDER

    text = (CONFIG_FOLDER / "llama-3.1-8b.json").read_text()
    assert '"max_position_embeddings": 131072' in text
    path = tmp_path / "config.json"
    path.write_text(text.replace('"max_position_embeddings": 131072', '"max_position_embeddings": 1048576'))
    assert resolve(options(model=str(path))).settings.max_model_len == 1_048_576
    with pytest.raises(UsageError, match=rf"1048576 tokens whole, the limit is {LARGEST_BATCH}; pass --max_model_len"):
        resolve(options(model=str(path), chunked_prefill=False, max_model_len=1_048_576))


@pytest.mark.parametrize("given", [{"chunked_prefill": False}, {"engine": "orca"}, {"engine": "static"}])
def test_where_prompts_are_whole_the_default_length_is_what_the_trace_needs(given: dict[str, Any]) -> None:
    problem = resolve(options(trace="static:n=2,prompt=9000,output=7", **given))
    assert problem.settings.max_model_len == 9007
    assert problem.settings.max_num_batched_tokens == 9007


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("tp8", {}, "attn(tp8) ffn(tp8) bf16"),
        ("tp8 FP8", {}, "attn(tp8) ffn(tp8) fp8"),
        ("tp8 fp8", {"kv": "fp8"}, "attn(tp8) ffn(tp8) fp8 kv=fp8"),
        ("tp8", {"weights": "w4a16"}, "attn(tp8) ffn(tp8) w4a16"),
        ("tp8", {"cluster": "8xv100-pcie"}, "attn(tp8) ffn(tp8) fp16"),
        ("tp8 bf16", {"weights": "w4a16"}, "attn(tp8) ffn(tp8) bf16"),
        ("tp8 kv=fp8", {"kv": "bf16"}, "attn(tp8) ffn(tp8) bf16 kv=fp8"),
        ("dp2 pp2 attn(tp2) ffn(tp2)", {}, "dp2 pp2 attn(tp2) ffn(tp2) bf16"),
    ],
)
def test_a_plan_takes_formats_it_does_not_name_from_the_options(
    text: str, given: dict[str, Any], expected: str
) -> None:
    problem, plan = resolve_plan(text, options(**given))
    assert str(plan) == expected
    # What is reported about the problem must be about this plan.
    assert (problem.offer.weight_formats, problem.offer.kv_formats) == (
        (plan.plan.weight_format,),
        (plan.plan.kv_format,),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp8 bogus", "unknown weight format 'bogus'"),
        ("tp0", "tp: 0 is not a whole number"),
        ("dp99999999 tp8", "above the limit"),
        ("attn(tp8)", "give both"),
        ("attn(tp8) ffn(tp4)", "both cells of a stage live on the same GPUs"),
        ("tp8 tp4", "given twice"),
        ("pp33", "32 layers make 1 to 32 stages"),
        ("pp2[1,2]", "add up to the 32 layers"),
        ("(", "cannot read"),
        ("tp8; rm", "cannot read"),
        ("-", "cannot read"),
    ],
)
def test_a_plan_that_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_plan(text, options())


def test_a_plan_to_be_placed_may_name_the_type_it_goes_on() -> None:
    mixed = {"model": "llama-3.1-8b", "cluster": "2xh100-sxm+2xl40s", "weights": "fp8"}
    both = resolve_place(PlaceAsk(plan="tp2", **mixed))
    assert [problem.types for problem, _ in both] == [("h100-sxm-80gb",), ("l40s-48gb",)]
    for text, found in (("h100: tp2", both[0]), ("l40s-48gb: tp2", both[1])):
        ((problem, plan),) = resolve_place(PlaceAsk(plan=text, **mixed))
        assert (problem.types, plan) == (found[0].types, found[1])
    for text in ("h100: tp2 + l40s: tp1", "pp2 tp1 on=h100:1+l40s:1"):
        with pytest.raises(UsageError, match="place takes a plan on one; place each of h100-sxm-80gb and l40s-48gb"):
            resolve_place(PlaceAsk(plan=text, **mixed))
    with pytest.raises(UnknownNameError, match="type of GPU 'b200'"):
        resolve_place(PlaceAsk(plan="b200: tp2", **mixed))


@pytest.mark.parametrize(
    ("choice", "text", "unnamed"),
    [
        ({"weights": "bf16,fp8"}, "tp8 fp8", "--weights=bf16,fp8 is a choice.*as bf16"),
        ({"clock": "1200,1600"}, "tp8 clock=1600", "--clock=1200,1600 is a choice.*as clock=1200"),
        ({"max_num_seqs": (64, 256)}, "tp8 seqs=256", "--max_num_seqs=64,256 is a choice.*as seqs=64"),
        (
            {"max_num_batched_tokens": (2048, 8192)},
            "tp8 tokens=2048",
            "--max_num_batched_tokens=2048,8192 is a choice.*as tokens=2048",
        ),
        (
            {"max_num_seqs": (64, 256), "max_num_batched_tokens": (2048, 8192)},
            "tp8 seqs=64 tokens=8192",
            "--max_num_seqs=64,256 is a choice",
        ),
    ],
)
def test_a_plan_says_which_of_several_choices_is_its_own(choice: dict[str, Any], text: str, unnamed: str) -> None:
    """Options of `plan` can be asked with again, and its answer is then the same deployment."""
    problem, deployment = resolve_plan(text, options(**choice))
    alone, same = resolve_plan(text, options())
    assert deployment == same
    assert (problem.batch_limits, problem.offer.weight_formats) == (alone.batch_limits, alone.offer.weight_formats)
    with pytest.raises(UsageError, match=unnamed):
        resolve_plan("tp8", options(**choice))


def test_a_plan_without_a_clock_has_the_highest_where_that_is_among_the_choices() -> None:
    assert resolve_plan("tp8", options(clock="all"))[1].plan.clock_mhz is None
    assert resolve_plan("tp8", options(clock="1200"))[1].plan.clock_mhz == 1200


@pytest.mark.parametrize("option", ["model", "cluster", "trace"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00\x01\x02\xff" * 50, b"{", b"[[[", b"a,b\n1", b"\xff\xfe", b"= 1", b"[]"]
)
def test_unusable_files_are_named(tmp_path: Any, option: str, content: bytes) -> None:
    suffix = {"model": ".json", "cluster": ".toml", "trace": ".jsonl"}[option]
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        resolve(options(**{option: str(path)}))
    assert str(path) in str(caught.value) or path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["model", "cluster", "trace"])
def test_missing_files_and_folders_are_named(tmp_path: Any, option: str) -> None:
    for path in (f"{tmp_path}/none.toml", f"{tmp_path}/", f"{tmp_path}/a\nb/", "/dev/null/x.toml", "/" + "x" * 3000):
        with pytest.raises(ApexError) as caught:
            resolve(options(**{option: path}))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,-5,10", "prompt -5 is outside"),
        ("0,nan,10", "is not a whole number"),
        ("nan,5,10", "is not a finite number"),
        ("inf,5,10", "is not a finite number"),
        ("0,5,0", "output 0 is outside"),
        ("-1,5,10", "is outside"),
        ("0,99999999999999999999,10", "is outside"),
        ("0,5", "line 2"),
    ],
)
def test_trace_rows_out_of_range_are_named(tmp_path: Any, row: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"arrival_s,prompt,output\n{row}\n")
    with pytest.raises(InputError, match=message):
        resolve(options(trace=str(path)))


def test_prefix_caching_says_where_a_trace_tells_nothing_of_its_prompts() -> None:
    told = resolve(options(prefix_caching=True)).remarks
    assert len(told) == 1 and "says nothing of what its prompts contain, so none is found in the cache" in told[0]
    assert resolve(options()).remarks == ()
    assert resolve(options(prefix_caching=True, trace="static:n=2,prompt=64,prefix=(32,1)")).remarks == ()


def test_prefix_caching_is_refused_where_what_prompts_contain_cannot_be_used() -> None:
    path = str(CASES / "aiperf-doc-mooncake.jsonl")
    assert len(resolve(options(trace=path)).trace) == 2
    with pytest.raises(InputError, match=r"line 1: hash_ids are 3 for .* give the tokens of an id as --trace_block"):
        resolve(options(trace=path, prefix_caching=True))
    problem = resolve(options(trace=path, prefix_caching=True, trace_block=256))
    assert (problem.trace.content_tokens, problem.remarks) == (256, ())


def test_the_unit_of_arrivals_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("time,prompt,output\n5,10,1\n")
    with pytest.raises(UsageError, match="nothing tells the unit of column time"):
        resolve(options(trace=str(path)))
    assert resolve(options(trace=str(path), trace_unit="ms")).trace.arrival_ns.tolist() == [5_000_000]


def test_lengths_alone_ask_for_a_rate() -> None:
    with pytest.raises(UsageError, match="has lengths but no arrivals; give the requests per second as --rate"):
        resolve(options(trace=str(CASES / "vidur-len.csv")))


@pytest.mark.parametrize(
    ("cluster", "weights", "said"),
    [
        (
            "1xa100",
            "fp8",
            "has no fp8 arithmetic: weights in fp8 are expanded to bf16, and cost as w8a16",
        ),
        ("1xh100", "fp8,nvfp4", "has no fp4 arithmetic: weights in nvfp4 are expanded to bf16, and cost as w4a16g32"),
        ("1xb200", "fp8,nvfp4", ""),
        ("1xa100", "w4a16", ""),
    ],
)
def test_weights_that_a_gpu_expands_are_told(cluster: str, weights: str, said: str) -> None:
    problem = resolve(options(model="llama-3.1-8b", cluster=cluster, weights=weights))
    notes = [note for note in problem.remarks if "arithmetic" in note]
    assert len(notes) == bool(said)
    assert said in " ".join(notes)


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({}, "vllm"),
        ({"engine": "sglang-eager"}, "sglang"),
        ({"engine": "trtllm", "emit": True}, "trtllm"),
        ({"engine": "static"}, "vllm"),
        ({"runnable": "sglang", "engine": "trtllm"}, "sglang"),
        ({"runnable": "any"}, None),
    ],
)
def test_plans_are_for_the_engine_named_else_the_one_whose_figures_they_are(
    changes: dict[str, Any], engine: str | None
) -> None:
    rules = resolve(options(**changes)).settings.runnable
    assert (None if rules is None else rules.name) == engine


def test_a_model_that_the_release_has_no_class_for_is_planned_and_told() -> None:
    codegen = str(Path(__file__).parent / "cases" / "models" / "codegen-16b.json")
    (note,) = [note for note in resolve(options(model=codegen)).notes if note.startswith("runnable: ")]
    assert "as of vLLM 0.20 there is no class of its own for codegen models" in note
    for changes in ({"model": codegen, "runnable": "any"}, {}):
        assert not [note for note in resolve(options(**changes)).notes if note.startswith("runnable: ")]


@pytest.mark.parametrize(
    ("model", "engine", "tokens"),
    [
        ("llama-3.1-8b", "vllm", 16),
        ("deepseek-v3.2", "vllm", 64),
        ("deepseek-v4-flash", "vllm", 256),
        ("deepseek-v3.2", "sglang", 64),
        ("deepseek-v3", "vllm", 32),
        ("deepseek-v3", "sglang", 64),
    ],
)
def test_blocks_are_those_that_the_attention_of_the_model_takes(model: str, engine: str, tokens: int) -> None:
    assert resolve(options(model=model, engine=engine, cluster="8xb200")).settings.block_size == tokens


def test_blocks_that_fall_back_to_a_slower_kernel_are_told() -> None:
    blackwell: dict[str, Any] = {"cluster": "8xb200"}
    for changes, size, said in (
        ({}, 3, "falls back to FlexAttention"),
        ({}, 16, ""),
        ({}, 48, ""),
        (blackwell | {"model": "deepseek-v3"}, 16, "take multiples of 32 tokens; of others vllm takes slower"),
        (blackwell | {"model": "deepseek-v3"}, 64, ""),
        ({"model": "deepseek-v3"}, 1, ""),  # no plan starts, which is said of each
        (blackwell | {"engine": "sglang"}, 1, "take multiples of 64 tokens; of others sglang takes slower"),
        ({"engine": "sglang"}, 1, ""),
    ):
        told = [note for note in resolve(options(**changes, block_size=size)).notes if note.startswith("--block_size=")]
        assert len(told) == bool(said)
        assert said in "".join(told)


def test_a_length_asked_for_is_one_that_the_cache_must_hold() -> None:
    asked = resolve(options(cluster="2xh100", max_model_len=30_000))
    assert asked.instance().longest_tokens == 30_000
    assert "a request of max_model_len" in asked.instance().longest
    assert resolve(options(cluster="2xh100")).instance().longest_tokens < 30_000


def test_drafts_are_a_choice_of_the_problem_and_a_plan_names_its_own() -> None:
    problem = resolve(options(speculation="eagle:0-2", acceptance="2.2"))
    assert [str(drafter) for drafter in problem.drafters] == ["None", "eagle:1", "eagle:2"]
    assert [its.draft_tokens for its in problem.settings.drafting] == [1, 2]
    plan = "tp8 spec=ngram:4"
    own, deployment = resolve_plan(plan, SimulateAsk(**CHEAP, plan=plan, acceptance="1.5"))
    assert str(deployment.plan.speculation) == "ngram:4"
    assert own.settings_for(deployment.plan).speculation is not None
    _, asked = resolve_plan("tp8", options(speculation="eagle:2"))
    assert str(asked.plan.speculation) == "eagle:2"
    with pytest.raises(UsageError, match="one plan makes drafts in one way: name it as spec=eagle:1, or as spec=none"):
        resolve_plan("tp8", options(speculation="eagle:1-2"))


def test_a_plan_without_drafts_is_read_under_the_question_that_it_answers() -> None:
    for plan, speculation in (("tp8", "eagle:0-2"), ("tp8 spec=none", "eagle:2"), ("tp8 spec=none", "none")):
        own, deployment = resolve_plan(plan, options(speculation=speculation))
        assert deployment.plan.speculation is None and own.settings.drafting == ()
        assert not any("tokens a row" in note for note in own.notes)


def test_drafts_of_a_plan_are_as_right_as_in_the_choice_that_has_them() -> None:
    choice = options(speculation="eagle:0-3", acceptance="2.5")
    own, _ = resolve_plan("tp8 spec=eagle:1", choice)
    assert own.settings.drafting == resolve(choice).settings.drafting[:1]
    with pytest.raises(UsageError, match="spec=eagle:3 is not among --speculation=eagle:1, "):
        resolve_plan("tp8 spec=eagle:3", options(speculation="eagle:1", acceptance="1.8"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"speculation": "eagle:3", "engine": "orca"},
            "drafts are modelled for vLLM, SGLang and TensorRT-LLM, not for orca",
        ),
        (
            {"speculation": "eagle:3", "engine": "trtllm", "runnable": "vllm"},
            "drafts are modelled as trtllm makes them, and --runnable=vllm asks for plans that another engine",
        ),
        ({"speculation": "draft:mistral-7b:3", "acceptance": "2"}, "a draft model has that of the model"),
        ({"speculation": "eagle:3", "runnable": "sglang"}, "--runnable=sglang asks for plans that another engine"),
        ({"speculation": "mtp:1", "acceptance": "1.5"}, "llama-3.1-8b states no layers of multi-token prediction"),
    ],
)
def test_drafts_that_no_engine_makes_are_refused_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve(options(**given))
    assert "\n" not in str(caught.value)


def test_acceptance_is_read_and_has_no_effect_where_no_drafts_are_made() -> None:
    """A study asks with drafts and without, and with one acceptance."""
    plain, told = resolve(options()), resolve(options(speculation="none", acceptance="2.5"))
    assert told.settings == plain.settings and told.drafters == plain.drafters
    assert set(told.notes) - set(plain.notes) == {
        "--acceptance has no effect where no drafts are made; --speculation=eagle:3 would make some"
    }
    for text, message in (("many", "cannot read 'many'"), ("10", "brings 1 to 9 tokens"), ("0.5/0.6", "above the one")):
        with pytest.raises(UsageError, match=message):
            resolve(options(acceptance=text))
    with pytest.raises(ApexError, match=r"nowhere\.json"):
        resolve(options(acceptance="nowhere.json"))


def test_drafts_of_pools_that_hand_over_are_refused_with_the_plan_that_asks_for_them() -> None:
    plan = "prefill{tp1 spec=ngram:2} + decode{tp1}"
    with pytest.raises(UsageError, match="drafts are not simulated where prompts are handed over; leave spec= out"):
        resolve_plan(plan, SimulateAsk(**CHEAP, plan=plan, acceptance="1.5"))


def test_a_plan_that_does_both_phases_is_not_asked_for_as_pools() -> None:
    with pytest.raises(UsageError, match=r"--serving=pools: plan 'tp1' is none; write prefill\{...\} \+ decode"):
        resolve_plan("tp1", SimulateAsk(**CHEAP, plan="tp1", serving="pools"))


def test_that_prompts_stay_whole_where_chunks_were_asked_for_is_told() -> None:
    whole = "--chunked_prefill=true: orca computes prompts whole all the same"
    assert whole in resolve(options(engine="orca", chunked_prefill=True)).notes
    assert not any("whole" in note for note in resolve(options(engine="orca")).notes)
    assert not any("whole" in note for note in resolve(options(chunked_prefill=True)).notes)


@pytest.mark.parametrize(
    ("settings", "chunked", "told"),
    [
        ("context_chunking_policy=EQUAL_PROGRESS", False, ["context_chunking_policy=EQUAL_PROGRESS has no effect"]),
        ("context_chunking_policy=EQUAL_PROGRESS", True, []),
        (
            "context_chunking_policy=FORCE_CHUNK",
            True,
            ["context_chunking_policy=FORCE_CHUNK is of no use for a model without"],
        ),
        ("batch_wait_timeout_iters=5", False, ["batch_wait_timeout_iters has no effect"]),
        ("batch_wait_max_tokens_ratio=0.5", False, ["batch_wait_max_tokens_ratio has no effect"]),
        ("batch_wait_timeout_iters=5,batch_wait_max_tokens_ratio=0.5", False, []),
        ("adp_timeout_iters=3", False, ["adp_timeout_iters has no effect without adp_balance=true"]),
        ("adp_timeout_iters=3,adp_balance=true", False, []),
        ("batch_wait_timeout_ms=4", False, ["batch_wait_timeout_ms=4: every turn waits up to"]),
        ("capacity_policy=MAX_UTILIZATION", False, []),
    ],
)
def test_settings_of_trtllm_that_do_nothing_and_waits_are_told(settings: str, chunked: bool, told: list[str]) -> None:
    notes = resolve(options(engine="trtllm", engine_settings=settings, chunked_prefill=chunked)).notes
    own = [note.removeprefix("--engine_settings: ") for note in notes if note.startswith("--engine_settings: ")]
    assert len(own) == len(told) and all(note.startswith(text) for note, text in zip(own, told, strict=True))


def test_trtllm_reuses_blocks_of_models_with_states_where_these_are_kept_as_well() -> None:
    kept = "context_chunking_policy=FORCE_CHUNK,snapshot_interval=64"
    asked = {"engine": "trtllm", "prefix_caching": True, "trace": "static:n=2,prompt=64,prefix=(32,1)"}
    hybrid = asked | {"model": "nemotron-3-nano-30b-a3b"}
    for own, chunked in ((None, True), (kept, False), ("snapshot_interval=64", True)):
        with pytest.raises(UsageError, match=r"nemotron-3-nano-30b-a3b has states, without which trtllm reuses no bl"):
            resolve(options(**hybrid, engine_settings=own, chunked_prefill=chunked))
    assert resolve(options(**hybrid, engine_settings=kept, chunked_prefill=True)).settings.prefix_caching
    for every in (64, 65):  # no other multiple would do
        with pytest.raises(UsageError, match=r"snapshot_interval is of models with states, which llama-3\.1-8b has"):
            resolve(options(**asked, engine_settings=kept.replace("64", f"{every}"), chunked_prefill=True))
    notes = resolve(
        options(**hybrid | {"prefix_caching": False}, engine_settings="snapshot_interval=64", chunked_prefill=True)
    ).notes
    assert any("snapshot_interval has no effect without context_chunking_policy=FORCE" in note for note in notes)
    forced = hybrid | {"prefix_caching": False, "engine_settings": "context_chunking_policy=FORCE_CHUNK"}
    notes = resolve(options(**forced, chunked_prefill=True)).notes
    assert any("FORCE_CHUNK is FIRST_COME_FIRST_SERVED without snapshot_interval" in note for note in notes)
    unread = hybrid | {"prefix_caching": False, "engine_settings": kept, "chunked_prefill": True}
    assert any(
        "FIRST_COME_FIRST_SERVED without --prefix_caching=true" in note for note in resolve(options(**unread)).notes
    )


def test_trtllm_reuses_nothing_of_models_with_states_alone() -> None:
    falcon = str(Path(__file__).parent / "cases" / "models" / "falcon-mamba-7b.json")
    asked = {
        "engine": "trtllm",
        "model": falcon,
        "trace": "static:n=2,prompt=64,prefix=(32,1)",
        "engine_settings": "context_chunking_policy=FORCE_CHUNK,snapshot_interval=64",
        "chunked_prefill": True,
    }
    with pytest.raises(UsageError, match="falcon-mamba-7b has states alone; those that trtllm keeps"):
        resolve(options(**asked, prefix_caching=True))
    assert not resolve(options(**asked, prefix_caching=False)).settings.prefix_caching


@pytest.mark.parametrize("speculation", ["ngram:4", "none,ngram:2"])
def test_that_no_batch_is_formed_ahead_of_drafts_made_between_batches_is_told(speculation: str) -> None:
    asked = {"speculation": speculation, "acceptance": "1.5"}
    assert any("ngram makes" in note for note in resolve(options(**asked, async_scheduling=True)).notes)
    assert not any("ngram makes" in note for note in resolve(options(**asked)).notes)
    plan = "tp8 spec=ngram:4"
    own, _ = resolve_plan(plan, SimulateAsk(**CHEAP, plan=plan, acceptance="1.5", async_scheduling=True))
    assert any("ngram makes" in note for note in own.notes)


def test_a_plan_that_makes_drafts_is_placed_whatever_comes_of_them() -> None:
    ((problem, plan),) = resolve_place(PlaceAsk(model="llama-3.1-8b", plan="tp8 spec=ngram:4"))
    assert str(plan.speculation) == "ngram:4"
    assert problem.settings_for(plan).speculation is not None
    assert not any("ngram" in note for note in problem.notes)


MODELS = Path(__file__).parent / "cases" / "models"


def media(model: str, **changes: Any) -> Any:
    given = {"cluster": "1xh100-sxm", "trace": "static:n=2,prompt=4,output=4"} | changes
    return resolve(Ask(model=str(MODELS / f"{model}.json"), **given))


def test_an_encoder_sees_prompts_whole_and_engines_switch_off_what_splits_them() -> None:
    problem = media("whisper-large-v3", trace="static:n=2,prompt=4,output=4,audio_s=30")
    assert not problem.settings.chunked_prefill and not problem.settings.prefix_caching
    assert problem.settings.max_num_batched_tokens >= problem.settings.max_model_len
    for option in ("chunked_prefill", "prefix_caching"):
        with pytest.raises(UsageError, match=f"--{option}=true: whisper-large-v3 is an encoder, or has one"):
            media("whisper-large-v3", **{option: True})


def test_recordings_longer_than_a_model_reads_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match=r"recordings of up to 31 s; whisper-large-v3 reads 30 s at once"):
        media("whisper-large-v3", trace="static:n=2,prompt=4,output=4,audio_s=31")
    with pytest.raises(UsageError, match=r"has recordings .* which gpt2 does not read"):
        media("gpt2", trace="static:n=2,prompt=4,output=4,audio_s=3")


def test_images_have_their_tower_served_and_are_told_of() -> None:
    seen = media("qwen2.5-vl-7b", trace="static:n=2,prompt=100,image_tokens=300,output=4")
    plain = media("qwen2.5-vl-7b", trace="static:n=2,prompt=400,output=4")
    assert seen.model.images == (300.0, 0.75) and plain.model.images is None
    assert seen.settings.chunked_prefill
    assert any("images: 75% of the tokens of prompts" in note for note in seen.notes)
    with pytest.raises(UsageError, match=r"has images .* but gpt2 reads no images; leave image_tokens out"):
        media("gpt2", trace="static:n=2,prompt=100,image_tokens=300,output=4")


def test_models_that_answer_with_a_vector_generate_one_token_at_most() -> None:
    assert media("bert-large-uncased", trace="static:n=2,prompt=60,output=1").model.pools
    with pytest.raises(UsageError, match="answers with a vector; give an output of 1"):
        media("bert-large-uncased")


def test_encoder_decoders_are_planned_for_the_engine_that_serves_them() -> None:
    with pytest.raises(UsageError, match="encoder-decoders such as whisper-large-v3 are planned for vllm"):
        media("whisper-large-v3", engine="sglang")


def test_pools_are_placed_one_by_one() -> None:
    with pytest.raises(UsageError, match="place is of one plan; place that of each pool by itself"):
        resolve_place(PlaceAsk(model="llama-3.1-8b", plan="prefill{tp1} + decode{tp1}"))


FOUR = "poisson:rate=2,n=4,prompt=8,output=4"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"routing": "pull"}, "--rescheduling deals requests by its own rules; leave --routing and route= out"),
        ({"plan": "dp2 tp4 route=pull"}, "leave --routing and route= out"),
        ({"plan": "tp4"}, "'tp4' is not one plan of several"),
        ({"plan": "prefill{tp4} + decode{tp4}"}, "is of replicas whose batches hold both phases of requests"),
        ({"plan": "dp2 tp4 share=50/50", "runnable": "any"}, "is of replicas whose batches hold both phases"),
        ({"trace": "closed:concurrency=2,n=4"}, "not in a closed loop of clients; give a trace with arrivals"),
        ({"rescheduling": "lumnix"}, "unknown rescheduling 'lumnix'; did you mean llumnix"),
        ({"engine": "sglang"}, "how requests of sglang move is not modelled; use vllm"),
    ],
)
def test_requests_that_cannot_move_are_refused_in_one_line(given: dict[str, Any], told: str) -> None:
    asked = {"plan": "dp2 tp4", "trace": FOUR, "rescheduling": "llumnix", "model": "llama-3.1-8b"} | given
    with pytest.raises(ApexError) as caught:
        resolve_plan(asked["plan"], SimulateAsk(**asked))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "priorities: no engine and no router here heeds them"),
        ({"rescheduling": "llumnix"}, "priorities: without a headroom they only keep requests from being moved"),
        ({"rescheduling": "llumnix:headroom=4"}, None),
    ],
)
def test_priorities_without_effect_are_told(given: dict[str, Any], told: str | None) -> None:
    asked = {"plan": "dp2 tp4", "trace": f"{FOUR},priority=1", "model": "llama-3.1-8b"} | given
    problem, _ = resolve_plan(asked["plan"], SimulateAsk(**asked))
    assert [note.startswith(told or "") for note in problem.notes if "priorit" in note] == ([True] if told else [])


def test_routers_of_pools_are_those_of_either_side() -> None:
    pair = "prefill{dp2 tp1} + decode{dp2 tp1}"
    for routing, sides in (
        ("pull", (("pull",), ("pull",))),
        ("pull/least_loaded,session", (("pull",), ("least_loaded", "session"))),
    ):
        problem = resolve(PlanAsk(**CHEAP, serving="pools", routing=routing))
        assert problem.sides == sides
        assert [problem.side(role, 0).routing for role in ("prefill", "decode")] == [names[0] for names in sides]
        assert problem.side("decode", 0).routings == (sides[1] if len(sides[1]) > 1 else ())
    asked = SimulateAsk(**CHEAP, plan=f"{pair} route=pull/session")
    _, deployment = resolve_plan(str(asked.plan), asked)
    assert [pool.plan.route for pool in deployment.pools] == ["pull", "session"]
    with pytest.raises(UsageError, match=r"'pull,session' is a choice; one plan has one router"):
        resolve_plan(pair, SimulateAsk(**CHEAP, plan=pair, routing="pull,session"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"routing": "pull/session"}, "give --serving=pools, or a router without a /"),
        ({"routing": "pull/session", "serving": "aggregated,pools"}, "give --serving=pools, or routers without a /"),
        (
            {"routing": "round_robin/pull", "serving": "pools", "engine": "sglang"},
            "which pull does not; use one of round_robin, least_loaded, power_of_two, ",
        ),
        ({"routing": "pull/vllm_dp", "serving": "pools"}, "vllm_dp is of requests as they come"),
        ({"routing": "pull/pull/pull", "serving": "pools"}, "routing 'pull/pull/pull' is not of two sides"),
        ({"plan": "prefill{dp2 tp1 route=pull} + decode{tp1}"}, "routers of pools stand behind these"),
        ({"plan": "prefill{tp1} + decode{tp1} route=pull"}, "either pool has one; leave it out"),
        ({"plan": "dp2 tp1 route=foo"}, "plan 'dp2 tp1 route=foo': unknown router 'foo'; known: round_robin"),
        ({"plan": "tp1 share=80/100", "serving": "pools"}, "share= computes both phases on one pool"),
        ({"plan": "prefill{tp1} + decode{tp1}", "serving": "shared"}, "prompts are handed over between two pools"),
    ],
)
def test_routers_and_ways_to_serve_that_do_not_go_with_a_plan_are_refused(given: dict[str, Any], told: str) -> None:
    ask = SimulateAsk(**(CHEAP | given)) if "plan" in given else PlanAsk(**(CHEAP | given))
    with pytest.raises(ApexError, match=re.escape(told)) as caught:
        resolve_plan(str(given["plan"]), ask) if "plan" in given else resolve(ask)
    assert "\n" not in str(caught.value)
