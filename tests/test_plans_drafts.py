"""apex_opt.plans.drafts: what lies beside a model to make its drafts, held to what was published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import SMALL, make_gpu

from apex_opt.ir import load_model
from apex_opt.plans.drafts import draft_of
from apex_opt.plans.memory import stage_memory
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.speculation import Drafter, Speculation

LLAMA, DEEPSEEK = load_model("llama-3.3-70b"), load_model("deepseek-v3")


def test_the_mtp_layer_of_deepseek_has_the_parameters_that_were_published() -> None:
    """11.5 B beside the shared embedding and head (README_WEIGHTS.md of DeepSeek-V3)."""
    draft = draft_of(DEEPSEEK, Drafter(method="mtp", draft_tokens=1))
    assert draft is not None
    (run,) = draft.runs
    assert run.block.parameters + draft.hidden * draft.joined == pytest.approx(11.5e9, rel=0.01)
    assert draft.tables == 0


def test_the_mtp_layer_of_a_hybrid_model_has_full_attention_and_experts() -> None:
    """Qwen3-Next's mtp.* has 1,650,471,424 parameters, of which 3 x 2,048 in norms around the joined vectors."""
    models = Path(__file__).parent / "cases" / "models"
    for name, published in (("qwen3-next-80b-a3b", 1_650_471_424), ("nemotron-3-super-120b-a12b", None)):
        model = load_model(str(models / f"{name}.json"))
        draft = draft_of(model, Drafter(method="mtp", draft_tokens=1))
        assert draft is not None
        (run,) = draft.runs
        assert any(kept.token_bytes(2) for kept in run.block.attention.cache())
        assert (run.block.is_moe, run.block.norm_count) == (True, 2)
        if published is not None:
            assert run.block.parameters + draft.hidden * draft.joined == published - 3 * 2048


def test_eagle_is_a_dense_layer_with_a_head_of_its_own() -> None:
    draft = draft_of(LLAMA, Drafter(method="eagle", draft_tokens=3))
    assert draft is not None
    hidden, columns = 8192, 28_672
    queries, keys = 8192, 1024
    layer = 2 * hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * columns
    weights = layer + 3 * hidden * hidden + 32_000 * hidden + 2 * hidden
    beside = draft.beside_bytes(1)
    assert beside + 2 * draft.runs[0].block.parameters - 2 * draft.runs[0].block.own_parameters == 2 * weights


def test_a_draft_model_lies_there_whole_and_n_grams_take_nothing() -> None:
    small = load_model("llama-3.1-8b")
    draft = draft_of(LLAMA, Drafter(method="draft", draft_tokens=3, model="llama-3.1-8b"))
    assert draft is not None
    assert sum(run.count for run in draft.runs) == small.layers
    assert draft.tables * draft.vocab * draft.hidden == 2 * small.vocab * small.hidden
    assert draft_of(LLAMA, Drafter(method="ngram", draft_tokens=5)) is None


@pytest.mark.parametrize("text", ["eagle:3", "mtp:1", "draft:llama-3.1-8b:3", "ngram:5"])
def test_drafts_take_their_weights_their_cache_and_their_logits(text: str) -> None:
    """By the difference to the same plan without them."""
    plan = parse_plan(f"tp8 spec={text}", LLAMA)
    assert plan.speculation is not None and str(parse_plan(str(plan), LLAMA)) == str(plan)
    plain = replace(plan, speculation=None)
    gpu = make_gpu(memory_bytes=80 * 10**9)
    settings = replace(SMALL, max_num_seqs=16, max_num_batched_tokens=8192)
    (ours,), (theirs,) = (stage_memory(LLAMA, gpu, one, settings) for one in (plan, plain))
    more = plan.speculation.draft_tokens
    assert ours.workspace_bytes - theirs.workspace_bytes == 4 * 16 * more * LLAMA.vocab
    draft = draft_of(LLAMA, plan.speculation)
    layers = 0 if draft is None else sum(run.count for run in draft.runs)
    assert (ours.weights_bytes > theirs.weights_bytes) is (draft is not None)
    # One KV head of 128 elements on each of 8 GPUs, as the model's own layers have it.
    assert ours.kv_block_bytes - theirs.kv_block_bytes == layers * SMALL.block_size * 2 * 128 * 2


def test_a_plan_with_drafts_reads_and_asks_what_comes_of_them() -> None:
    from apex_opt.errors import UsageError
    from apex_opt.plans.engine import limited

    plan = parse_plan("tp8 spec=ngram:5", LLAMA)
    known = Speculation(method="ngram", draft_tokens=5, accepted=((1,),))
    settings = limited(replace(SMALL, async_scheduling=True, drafting=(known,)), plan)
    assert settings.speculation == known
    assert not settings.async_scheduling  # vLLM looks n-grams up once a batch is done
    with pytest.raises(UsageError, match="spec=ngram:5: nothing is known of how many drafts are accepted"):
        limited(SMALL, plan)
