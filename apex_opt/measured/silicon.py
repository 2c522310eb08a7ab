"""Mean TTFT and TPOT of closed loops, a CSV row per deployment and load: the layout of aiconfigurator's table.

A row names the model, the system, the engine, how the GPUs share the model and the number formats. How the engine was
started, what the client sent, and which rows are not what they say, is told by the tables of `facts`. A measurement
that stands in several rows is one run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.engines import ENGINES
from apex_opt.errors import ApexError
from apex_opt.ir.formats import FORMATS
from apex_opt.measured.deployments import cluster_of, kv_format, started, weight_format
from apex_opt.measured.facts import LARGEST, Degrees, Load, labelled, read_facts, trained_on
from apex_opt.measured.files import read_rows
from apex_opt.measured.names import find_model
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.plans.acceptance import speculations
from apex_opt.plans.speculation import Drafter
from apex_opt.workload.columns import MAX_TOKENS
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.ir.model import Model
    from apex_opt.measured.deployments import Started
    from apex_opt.measured.facts import Aside, Facts, Family
    from apex_opt.measured.files import Row
    from apex_opt.measured.runs import Run
    from apex_opt.workload.trace import Trace

KIND: Final = "silicon"
NEEDED: Final = (
    "id",
    "backend",
    "model_path",
    "system",
    "isl",
    "osl",
    "gemm_quant_mode",
    "moe_quant_mode",
    "batch_size",
    "tp_size",
    "pp_size",
    "attention_dp_size",
    "moe_tp_size",
    "moe_ep_size",
    "silicon_ttft_ms",
    "silicon_tpot_ms",
)

SHORTEST_SHARE: Final = 0.8
"""Lengths of InferenceX's requests, uniform from this share to all of the nominal one (--random-range-ratio)."""
SPECULATIVE: Final = "speculative"
"""What a row is set aside for whose engine made drafts."""
RANDOM_ACCEPTANCE: Final = "0.6/0.36/0.216"
"""Shares of rows in which at least one draft of an MTP layer is right, two, three, where prompts are random tokens.

Of the rates 0.5, 0.55 ... 0.75 of every draft the one with the least median error of TPOT over the 24 measurements of
DeepSeek-R1 with TensorRT-LLM that may be fitted on (`runs.judged_by`).
"""
LARGEST_POOL: Final = 8
"""GPUs of InferenceX's largest deployment in one piece; on more, prefill and decode have pools of their own."""

_CLIENTS: Final = re.compile(r"silicon_concurrency=(\d+)")
_RELEASE: Final = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_IN_IMAGE: Final = re.compile(r"(?:sglang:v|release:)(\d+)\.(\d+)\.(\d+)")
_LAST_BLOCKING: Final = (0, 12)
"""Release of vLLM up to which batches are formed one after another unless asked for otherwise."""
_SLOW_EXPERTS: Final = (0, 5, 9)
"""Release of SGLang up to which experts in fp8 have the older kernels."""
_OLD_TRTLLM: Final = ((1, 0), (1, 1), (1, 2))
"""Releases of TensorRT-LLM that are kinds of their own."""
_MTP: Final = (
    re.compile(r"MTP, ([1-3]) draft tokens?(?: \(([1-3]) with attention DP\))?"),
    re.compile(r"EAGLE/MTP, ([1-3]) steps?, [2-4] draft tokens, top-k 1()"),
)
"""Drafts of TensorRT-LLM and SGLang as the table of deployments has them, as many as `RANDOM_ACCEPTANCE` tells of.

SGLang counts the token that they follow among its draft tokens; a step makes one.
"""


class _Odd(Exception):
    """A row that cannot be simulated: the sort of reason, and its figures."""

    def __init__(self, reason: str, detail: str, model: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_silicon(path: Path) -> list[Run]:
    """Every measurement of the file, with the tables that lie beside it.

    Raises
    ------
    InputError    missing columns; figures that are no numbers or negative, with their line; faults in tables beside it
    """
    facts = read_facts(path)
    found: dict[object, Run] = {}
    for row in read_rows(path, NEEDED):
        run, key = _run(row, facts), _measurement(row)
        # Of several rows one that is not what it says tells for all, else the first that can be simulated.
        if (before := found.get(key)) is not None:
            run = replace(min((before, run), key=_rank), rows=before.rows + 1)
        found[key] = run
    return list(found.values())


def _measurement(row: Row) -> object:
    """What rows of the same measurement have in common: the same figures on the same system; some lists round them."""
    ttft, tpot = row.number("silicon_ttft_ms"), row.number("silicon_tpot_ms")
    if not (ttft and tpot):
        return row.line
    return (*(row.cells[c] for c in ("backend", "system", "isl", "osl")), round(ttft, 1), round(tpot, 1))


def _rank(run: Run) -> int:
    if isinstance(run, MeasuredRun):
        return 1
    return 0 if run.aside else 2


def _run(row: Row, facts: Facts) -> Run:
    cell = {name: text.strip() for name, text in row.cells.items()}
    name, model = cell["id"] or f"line {row.line}", cell["model_path"]

    def unusable(reason: str, detail: str, *, aside: bool = False) -> UnusableRun:
        return UnusableRun(
            name=name, origin=row.where, kind=KIND, model=model, reason=reason, detail=detail, aside=aside
        )

    said = facts.aside.get(cell["id"])
    if said is not None and said.metric == "both" and said.reason != SPECULATIVE:
        return unusable(f"set aside: {said.reason}", said.detail, aside=True)
    try:
        return _measured(row, cell, name, facts, said)
    except _Aside as odd:
        return unusable(odd.reason, odd.detail, aside=True)
    except _Odd as odd:
        return unusable(odd.reason, odd.detail)


class _Aside(_Odd):
    """A row that is not what it says."""


def _measured(row: Row, cell: dict[str, str], name: str, facts: Facts, said: Aside | None) -> MeasuredRun:
    figures = {"ttft_mean": row.number("silicon_ttft_ms"), "tpot_mean": row.number("silicon_tpot_ms")}
    measured = {metric: value / 1e3 for metric, value in figures.items() if value}
    if not measured:
        raise _Odd("nothing measured", "TTFT and TPOT are blank or zero")
    prompt, output = _count(row, "isl", MAX_TOKENS), _count(row, "osl", MAX_TOKENS)
    labels = labelled(cell)
    degrees, clients = _degrees(row, cell, facts, inferencex=labels.scripted)
    try:
        model = find_model(cell["model_path"])
    except ApexError as error:
        raise _Odd("model not described", str(error)) from None
    backend = cell["backend"]
    if backend not in ENGINES:
        raise _Odd("engine not described", f"backend {backend!r:.40}")
    load = Load(clients, prompt, output, degrees.tp, degrees.copies, groups=degrees.moe_ep)
    family = facts.family(cell["id"], labels, load)
    if family is not None and name not in facts.relabelled:
        degrees = degrees.as_ran(family)
        load = load._replace(tp=degrees.tp, copies=degrees.copies, groups=degrees.moe_ep)
    drafter = _drafter(family, said, degrees.copies)
    if drafter is not None:
        load = load._replace(drafts=drafter.draft_tokens)
    drawn = labels.scripted
    if drawn and degrees.gpus > LARGEST_POOL:
        raise _Aside("set aside: prefill and decode pools added up", f"{degrees.gpus} GPUs")
    cluster = cluster_of(cell["system"], degrees.gpus)
    if cluster is None:
        raise _Odd("GPU not in the catalogue", f"system {cell['system']!r:.40}")
    weights = _weights(cell, model)
    kv = kv_format(family, weights)
    kind = kind_of(backend, cell.get("backend_version", ""), family, drafts=drafter is not None)
    how = started(family, kind, cluster, load)
    plan = f"{degrees.plan(model.is_moe)} {weights}"
    settings, taken = how.settings, _assumptions(how, kv, drawn, family)
    if drafter is not None:
        try:
            drafting, _ = speculations(model, (drafter,), RANDOM_ACCEPTANCE)
            settings = replace(settings, drafting=drafting)
        except ApexError as error:
            raise _Odd("drafts that the model cannot make", str(error)) from None
        plan, taken = f"{plan} spec={drafter}", (*taken, f"{RANDOM_ACCEPTANCE} of the drafts right, fitted")
    aside = {} if said is None or drafter else {f"{said.metric}_mean": f"{said.reason}: {said.detail}"}
    return MeasuredRun(
        name=name,
        origin=row.where,
        kind=KIND,
        model=cell["model_path"],
        cluster=cluster,
        plan=f"{plan} kv={kv}",
        engine=kind,
        settings=settings,
        trace=closed_loop(clients, prompt, output, how.requests_per_client, drawn),
        share_of=how.share_of,
        captured_tokens=how.captured_tokens,
        sweep=f"{trained_on(model.name)} {cell['system']} {backend} {plan} {prompt}+{output}",
        measured=measured,
        set_aside=aside,
        assumptions=taken,
    )


def _drafter(family: Family | None, said: Aside | None, copies: int) -> Drafter | None:
    """How a row's engine made drafts, and None where it made none.

    Raises
    ------
    _Aside    drafts that are not told in full, or made in a way that is not simulated
    """
    told = "" if family is None else family.speculative
    if not told and (said is None or said.reason != SPECULATIVE):
        return None
    match = next(filter(None, (form.fullmatch(told) for form in _MTP)), None)
    if match is None:
        detail = said.detail if said is not None else told
        raise _Aside(f"set aside: {SPECULATIVE}", f"{family.name}: {detail}" if family else detail)
    return Drafter(method="mtp", draft_tokens=int(match[2] if copies > 1 and match[2] else match[1]))


def _assumptions(how: Started, kv: str, drawn: bool, family: Family | None) -> tuple[str, ...]:
    """What is taken to be so, and from where."""
    lengths = f"drawn from {SHORTEST_SHARE:g} to 1 of those given" if drawn else "as given"
    settings = how.settings
    polls = getattr(settings.scheduler, "scheduler_recv_interval", 1)
    return (
        f"deployment: {family.name}, {family.text('certainty')}" if family else "deployment: the engine's defaults",
        f"{how.requests_per_client} requests per client, lengths {lengths}",
        f"KV cache in {kv}, batches of up to {settings.max_num_batched_tokens} tokens, "
        f"{settings.gpu_memory_utilization:g} of the memory ({how.share_of})",
        *((f"new requests are looked for every {polls} batches",) if polls > 1 else ()),
    )


def kind_of(backend: str, version: str, family: Family | None = None, *, drafts: bool = False) -> str:
    """The engine kind of a release; of rows that name none the one of the image, or of the days, of their family.

    Parameters
    ----------
    backend : str     as rows name engines
    version : str     of the engine; blank says nothing
    family : Family or None
    drafts : bool     whether it verifies some
    """
    image = "" if family is None else family.text("image")
    release = _RELEASE.match(version) or _IN_IMAGE.search(image)
    numbers = tuple(map(int, release.groups())) if release is not None else ()
    if backend == "trtllm" and numbers[:2] in _OLD_TRTLLM:
        return f"trtllm-{numbers[0]}.{numbers[1]}"
    if backend == "sglang" and () < numbers <= _SLOW_EXPERTS:
        return "sglang-0.5.9-drafts" if drafts else "sglang-0.5.9"
    if backend != "vllm":
        return backend
    if numbers:
        return "vllm-0.12" if numbers[:2] <= _LAST_BLOCKING else "vllm"
    return "vllm-0.12" if family is not None and family.text("date_to") < "2026" else "vllm"


def _degrees(row: Row, cell: dict[str, str], facts: Facts, *, inferencex: bool) -> tuple[_Degrees, int]:
    """Degrees that ran, and clients."""
    degrees = _Degrees.of(row)
    if (known := facts.relabelled.get(cell["id"])) is not None:
        return _Degrees.ran(known, degrees.stages), known.clients
    # The column counts those of one attention copy.
    clients = _count(row, "batch_size", LARGEST) * degrees.copies
    if match := _CLIENTS.search(cell.get("silicon_data_source", "")):
        # Where the source counts more than the column, it counts those of several instances, of which a row has one.
        clients = min(max(int(match[1]), 1), clients)
    return (degrees.over_the_same_gpus() if inferencex else degrees), clients


def _count(row: Row, column: str, most: int) -> int:
    value = row.whole(column)
    if value is None or not 1 <= value <= most:
        raise _Odd("row is incomplete", f"{column} is {row.cells[column]!r:.20}, expected 1 to {most:,}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Degrees:
    """How GPUs share a model: copies and shards of attention, shards and groups of experts, pipeline stages.

    A row has a column for each; blank and 0 mean 1.
    """

    copies: int
    tp: int
    moe_tp: int
    moe_ep: int
    stages: int

    @classmethod
    def of(cls, row: Row) -> _Degrees:
        columns = ("attention_dp_size", "moe_tp_size", "moe_ep_size", "pp_size")
        copies, moe_tp, moe_ep, stages = (_count(row, c, LARGEST) if row.whole(c) else 1 for c in columns)
        tp = _count(row, "tp_size", LARGEST)
        return cls(copies=copies, tp=tp, moe_tp=moe_tp, moe_ep=moe_ep, stages=stages)

    @classmethod
    def ran(cls, known: Degrees, stages: int) -> _Degrees:
        """Degrees that a table tells."""
        return cls(copies=known.copies, tp=known.tp, moe_tp=known.moe_tp, moe_ep=known.moe_ep, stages=stages)

    def as_ran(self, family: Family) -> _Degrees:
        """The degrees where the script of a family is known to have taken others than the row says."""
        experts, copies = family.text("ep_real"), family.text("dp_attention_real")
        gpus = self.copies * self.tp
        found = self
        if copies in ("yes", "no"):
            found = replace(found, copies=gpus if copies == "yes" else 1, tp=1 if copies == "yes" else gpus)
        groups = gpus if experts == "= TP" else int(experts) if experts.isdigit() else 0
        if groups and gpus % groups == 0:
            found = replace(found, moe_ep=groups, moe_tp=gpus // groups)
        return found

    @property
    def gpus(self) -> int:
        return self.copies * self.tp * self.stages

    def over_the_same_gpus(self) -> _Degrees:
        """The degrees of an InferenceX row.

        There TP and EP are degrees over the same GPUs, and so is data parallelism of attention. Some rows hold their
        product instead, as the same measurements show that stand in the table both ways: 8 GPUs with TP 8 and EP 8 as
        tp 64, moe 8 x 8 and as tp 8, moe 1 x 8; 4 GPUs with TP 4 and EP 4 as tp 4, dp 4, moe 1 x 16 with a fourth of
        the clients and as tp 4, moe 1 x 4.
        """
        if self.copies * self.tp != self.moe_tp * self.moe_ep:
            return self
        if self.moe_tp > 1 and self.moe_ep > 1 and self.moe_tp % self.moe_ep == 0:
            copies = self.moe_tp if self.copies > 1 else 1
            return replace(self, copies=copies, tp=self.moe_tp // copies, moe_tp=self.moe_tp // self.moe_ep)
        if self.copies > 1 and self.tp > 1 and self.moe_ep % self.copies == 0:
            return replace(self, copies=1, moe_ep=self.moe_ep // self.copies)
        return self

    def plan(self, moe: bool) -> str:
        """The text form.

        Raises
        ------
        _Odd    cells over different numbers of GPUs
        """
        stages = f"pp{self.stages} " if self.stages > 1 else ""
        if not moe:
            # A dense model leaves the columns of the experts at whatever they were.
            if self.copies > 1:
                raise _Odd("plan is contradictory", f"{self.copies} attention copies before a dense FFN")
            return f"{stages}attn(tp{self.tp}) ffn(tp{self.tp})"
        if self.moe_tp * self.moe_ep != self.copies * self.tp:
            detail = f"experts over {self.moe_tp} x {self.moe_ep} GPUs, attention over {self.copies} x {self.tp}"
            raise _Odd("plan is contradictory", detail)
        return f"{stages}attn(dp{self.copies},tp{self.tp}) ffn(tp{self.moe_tp},ep{self.moe_ep})"


def _weights(cell: dict[str, str], model: Model) -> str:
    """Weight format of the blocks: one for all of them."""
    modes = {cell["gemm_quant_mode"], *((cell["moe_quant_mode"],) if model.is_moe else ())}
    formats = {weight_format(mode, model.weight_format) for mode in modes}
    found = formats.pop()
    if formats or found not in FORMATS:
        raise _Odd("number formats not described", f"quantisation mode {' and '.join(sorted(modes))!r:.60}")
    assert found is not None  # None is no format
    return found


@lru_cache(maxsize=1024)
def closed_loop(clients: int, prompt: int, output: int, per_client: int, drawn: bool) -> Trace:
    """The requests that InferenceX's client sends; drawn lengths as its generator draws them, all prompts first.

    Parameters
    ----------
    clients : int
    prompt, output : int    nominal lengths
    per_client : int        requests of each
    drawn : bool            whether lengths are drawn from `SHORTEST_SHARE` of these on; else they are these
    """
    n = per_client * clients
    # The client draws with numpy's old generator, seeded with 0.
    random = np.random.RandomState(0)

    def lengths(most: int) -> Any:
        return random.randint(max(int(SHORTEST_SHARE * most), 1), most + 1, n) if drawn else np.full(n, most)

    return make_trace(
        name=f"{clients} clients, {prompt} + {output} tokens",
        arrival_ns=np.zeros(n, np.int64),
        prompt=lengths(prompt).astype(np.int64),
        output=lengths(output).astype(np.int64),
        concurrency=clients,
        source=f"closed loop, lengths {'drawn, seed 0' if drawn else 'fixed'}",
    )
