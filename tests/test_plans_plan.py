"""Plans say what they are, and are read back from it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import dense, make_model

from apex_opt.engines.overlap import OVERLAPS
from apex_opt.errors import ApexError, UsageError
from apex_opt.ir import FORMATS, KV_BYTES, load_model
from apex_opt.plans.plan import LARGEST_DEGREE, Plan, Template, default_kv_format, even_split, parse_plan
from apex_opt.plans.routing import ROUTINGS

degrees = st.integers(1, 12)
MIX = "w4a16+w8a16g32"
LIMITS = st.one_of(st.none(), st.integers(1, LARGEST_DEGREE))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan: uneven splits, cells cut differently over the same devices, every pair of formats."""
    tp, dp, more = draw(degrees), draw(degrees), draw(degrees)
    ways = [Template(dp=dp * more, tp=tp), Template(dp=dp, tp=tp * more)]
    cuts = [*ways, Template(dp=dp, tp=tp, ep=more), Template(ep=dp * tp * more), Template(dp=tp, tp=more, ep=dp)]
    replicas = draw(st.one_of(st.just(1), st.integers(1, LARGEST_DEGREE)))
    return Plan(
        replicas=replicas,
        layers=tuple(draw(st.lists(st.integers(1, 200), min_size=1, max_size=9))),
        attention=draw(st.sampled_from(ways)),
        ffn=draw(st.sampled_from(cuts)),
        weight_format=draw(st.sampled_from([*sorted(FORMATS), MIX])),
        kv_format=draw(st.sampled_from(sorted(KV_BYTES))),
        clock_mhz=draw(LIMITS),
        max_num_seqs=draw(LIMITS),
        max_num_batched_tokens=draw(LIMITS),
        overlap=draw(st.sampled_from((None, *OVERLAPS))),
        route=draw(st.sampled_from((None, *ROUTINGS))) if replicas > 1 else None,
    )


@given(plan=plans(), kv=st.sampled_from((None, *KV_BYTES)), data=st.data())
def test_the_text_of_a_plan_gives_it_back_in_any_order_of_words_whatever_the_checkpoint_asks_for(
    plan: Plan, kv: str | None, data: st.DataObject
) -> None:
    model = make_model((dense(), sum(plan.layers)), kv_format=kv, weight_format=MIX)
    assert parse_plan(str(plan), model) == plan
    assert parse_plan(" ".join(data.draw(st.permutations(str(plan).split()))), model) == plan


@given(plan=plans())
def test_an_even_split_is_left_out_of_the_text_and_an_uneven_one_is_told(plan: Plan) -> None:
    even = plan.layers == even_split(sum(plan.layers), plan.stages)
    assert ("[" in str(plan)) == (not even)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("tp8", "attn(tp8) ffn(tp8) bf16"),
        ("ep8", "attn(tp8) ffn(ep8) bf16"),
        ("dp2 tp4 fp8", "dp2 attn(tp4) ffn(tp4) fp8"),
        ("pp2[41, 39] tp4", "pp2[41,39] attn(tp4) ffn(tp4) bf16"),
        ("pp2[40,40] tp4", "pp2 attn(tp4) ffn(tp4) bf16"),
        ("attn(dp2, tp4) ffn(tp8) FP8 kv=FP8", "attn(dp2,tp4) ffn(tp8) fp8 kv=fp8"),
        ("  fp16   ffn(tp1)  attn() ", "attn(tp1) ffn(tp1) fp16"),
        ("", "attn(tp1) ffn(tp1) bf16"),
        ("w4a16 kv=fp16", "attn(tp1) ffn(tp1) w4a16 kv=fp16"),
        ("tp1 kv=fp8", "attn(tp1) ffn(tp1) bf16 kv=fp8"),
        ("attn(tp2,dp3) ffn(dp2,ep3)", "attn(dp3,tp2) ffn(dp2,ep3) bf16"),
        ("clock=1200 tp2", "attn(tp2) ffn(tp2) bf16 clock=1200"),
        ("clock=01200 tokens=2048 seqs=64 tp2", "attn(tp2) ffn(tp2) bf16 seqs=64 tokens=2048 clock=1200"),
    ],
)
def test_short_forms_stand_for_whole_plans(text: str, meant: str) -> None:
    assert str(parse_plan(text, load_model("llama-3.1-70b"))) == meant


def test_formats_left_out_are_those_of_the_checkpoint_and_kv_follows_weights_that_are_named() -> None:
    model = make_model((dense(), 4), weight_format="fp8", kv_format="fp8")
    assert (parse_plan("tp2", model).weight_format, parse_plan("tp2", model).kv_format) == ("fp8", "fp8")
    assert parse_plan("tp2 fp8", model).kv_format == "bf16"
    assert parse_plan("tp2 fp16", model).kv_format == "fp16"
    assert default_kv_format("fp16") == "fp16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("garbage", "unknown weight format 'garbage'; known: bf16"),
        ("bf17", "unknown weight format 'bf17'"),
        ("tp2 kv=int4", "unknown KV format 'int4'"),
        ("tp4 tp4", "attn is given twice"),
        ("tp4 attn(tp4)", "attn is given twice"),
        ("attn(tp2) attn(tp2) ffn(tp2)", "attn is given twice"),
        ("dp2 dp2", "dp is given twice"),
        ("pp2 pp2", "pp is given twice"),
        ("bf16 fp8", "format is given twice"),
        ("kv=fp8 kv=fp8", "kv is given twice"),
        ("attn(tp4)", "give both attn(...) and ffn(...)"),
        ("ffn(tp4)", "give both attn(...) and ffn(...)"),
        ("attn(tp2,tp2) ffn(tp4)", "cannot read 'tp2'"),
        ("attn(tp2 ffn(tp2)", "cannot read 'attn(tp2'"),
        ("attn(pp2) ffn(tp2)", "cannot read 'pp2'"),
        ("attn(ep4) ffn(tp4)", "only an FFN has experts"),
        ("attn(tp4) ffn(tp8)", "takes 4 GPUs of a stage and ffn(tp8) 8"),
        ("dp0 tp2", "0 replicas is not a whole number from 1"),
        ("tp0", "tp: 0 is not a whole number from 1"),
        ("attn(dp0) ffn(dp0)", "dp: 0 is not a whole number from 1"),
        ("pp0", "pp0: 80 layers make 1 to 80 stages"),
        ("pp81", "pp81: 80 layers make 1 to 80 stages"),
        ("pp2[41,41]", "add up to the 80 layers"),
        ("pp3[40,40]", "pp3[...] needs 3 numbers"),
        ("pp2[80,0]", "every stage needs at least one layer"),
        ("pp2[40,,40]", "cannot read"),
        ("pp2[]", "cannot read"),
        ("pp2[-1,81]", "cannot read"),
        ("dp-2", "cannot read 'dp-2'"),
        ("dp\u0662 tp1", "cannot read 'dp\u0662'"),
        ("dp2 tp\uff11", "cannot read 'tp\uff11'"),
        ("dp2 attn(tp\uff11) ffn(tp1)", "cannot read 'tp\uff11'"),
        ("tp4.5", "cannot read 'tp4.5'"),
        ("dp99999999999999999999999999", "above the limit"),
        ("tp" + "9" * 5000, "above the limit"),
        ("dp1048577", "not a whole number from 1 to 1048576"),
        ("pp2[" + "1" * 50 + ",1]", "above the limit"),
        ("{}", "cannot read"),
        ("tp4\x00", "cannot read"),
        ("(((", "cannot read"),
        ("kv=", "cannot read"),
        ("clock=0", "clock: 0 is not a whole number from 1"),
        ("seqs=0", "seqs: 0 is not a whole number from 1"),
        ("tokens=1048577", "tokens: 1048577 is not a whole number from 1 to 1048576"),
        ("tokens=99999999", "99999999 is above the limit of 1048576"),
        ("clock=900 clock=1200", "clock is given twice"),
        ("seqs=4 seqs=4", "seqs is given twice"),
        ("tokens=4 tokens=4", "tokens is given twice"),
        ("clock=1.2", "cannot read 'clock=1.2'"),
        ("clock=", "cannot read 'clock='"),
        ("clock1200", "unknown weight format 'clock1200'"),
        ("seqs=-4", "cannot read 'seqs=-4'"),
        ("dp2 route=fastest", "unknown router 'fastest'; known: round_robin"),
        ("dp2 route=pull route=pull", "route is given twice"),
        ("tp4 route=pull", "route=pull is of several replicas, and the plan has one"),
        ("dp2 route=", "cannot read 'route='"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused_in_one_line_that_says_why(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_plan(text, load_model("llama-3.1-70b"))
    message = str(caught.value)
    assert said in message
    assert "\n" not in message


@given(text=st.text(max_size=40) | st.text(alphabet="dptpea tn()[],0123456789kv=bf", max_size=40))
def test_no_text_gets_past_the_reader_as_anything_but_a_plan_or_a_plain_error(text: str) -> None:
    model = load_model("llama-3.1-8b")
    try:
        plan = parse_plan(text, model)
    except ApexError as error:
        assert str(error)
    else:
        assert sum(plan.layers) == model.layers
        assert parse_plan(str(plan), model) == plan


@pytest.mark.parametrize(
    "fault",
    [
        {"replicas": 0},
        {"replicas": True},
        {"replicas": 1.5},
        {"replicas": "2"},
        {"layers": ()},
        {"layers": (0,)},
        {"layers": (True, 3)},
        {"layers": (2.0,)},
        {"layers": (10**30,)},
        {"attention": Template(ep=2), "ffn": Template(tp=2)},
        {"ffn": Template(tp=2)},
        {"weight_format": "int3"},
        {"kv_format": "int4"},
    ],
)
def test_a_plan_refuses_fields_that_make_no_sense(fault: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "replicas": 1,
        "layers": (4,),
        "attention": Template(),
        "ffn": Template(),
        "weight_format": "bf16",
        "kv_format": "bf16",
    }
    Plan(**good)
    with pytest.raises(UsageError):
        Plan(**(good | fault))


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "2", None, LARGEST_DEGREE + 1])
def test_a_template_refuses_degrees_that_are_not_counts(value: Any) -> None:
    for name in ("dp", "tp", "ep"):
        with pytest.raises(UsageError, match=name):
            Template(**{name: 10**6000})  # more digits than Python prints
        with pytest.raises(UsageError, match=name):
            Template(**{name: value})


def test_devices_multiply() -> None:
    plan = parse_plan("dp3 pp4 attn(dp2,tp5) ffn(tp2,ep5)", make_model((dense(), 8)))
    assert (plan.stage_devices, plan.stages, plan.devices) == (10, 4, 120)


@given(layers=st.integers(1, 500), stages=st.integers(1, 500))
def test_an_even_split_uses_every_layer_and_differs_by_one_with_larger_stages_first(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(UsageError, match="stages"):
            even_split(layers, stages)
        return
    split = even_split(layers, stages)
    assert (len(split), sum(split)) == (stages, layers)
    assert split[0] - split[-1] <= 1
    assert list(split) == sorted(split, reverse=True)


def test_stages_on_several_types_of_gpu_are_read_as_they_are_written() -> None:
    model = make_model((dense(), 8))
    text = "dp2 pp3 attn(tp2) ffn(tp2) bf16 on=fast:2+slow.x-40gb:1"
    plan = parse_plan(text, model)
    assert plan.on == (("fast", 2), ("slow.x-40gb", 1))
    assert str(plan) == text
    assert plan.cut != replace(plan, on=()).cut
    with pytest.raises(UsageError, match=r"on: 1 \+ 1 stages on types of GPU, and the plan has 3"):
        parse_plan("pp3 on=fast:1+slow:1", model)
    with pytest.raises(UsageError, match="cannot read 'on=fast'"):
        parse_plan("pp3 on=fast", model)


def test_a_mix_of_formats_is_that_of_its_own_checkpoint_alone() -> None:
    mixed = make_model((dense(), 4), weight_format=MIX)
    assert parse_plan("tp2", mixed).weight_format == parse_plan(f"tp2 {MIX.upper()}", mixed).weight_format == MIX
    assert parse_plan("tp2 fp8", mixed).weight_format == "fp8"
    for name in (MIX, "w8a16g32+w4a16"):
        with pytest.raises(UsageError, match=r"is a mix that only its own checkpoint has; .* is in"):
            parse_plan(f"tp2 {name}", make_model((dense(), 4)))
    with pytest.raises(UsageError, match="unknown weight format 'fp8\\+fp7'"):
        parse_plan("tp2 fp8+fp7", mixed)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tensor 8", "cannot read 'tensor', which is neither a degree, as tp8, nor a format"),
        ("bf16 8", "cannot read '8', which is neither"),
        ("tp8 ep2", "tp8 alone cuts both cells already, so ep2 cannot stand beside it; say what cuts which"),
        ("prefill 1 x tp1, decode 1 x tp1", "prefill has its plan in braces; such as: prefill{"),
        ("fp8 bf16", "format is given twice"),
    ],
)
def test_the_word_that_cannot_stand_is_named(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        parse_plan(text, make_model((dense(), 8)))
