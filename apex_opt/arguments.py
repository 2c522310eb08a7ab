"""What can be asked: the arguments of every command, as dataclasses.

Their fields and what the docstrings say of them are all there is to an option; `apex_opt.gate` reads their values.
"""

# The gate reads annotations as they are evaluated here: no `from __future__ import annotations`.

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final, Literal

from apex_opt.gate import Arguments, Param

if TYPE_CHECKING:
    from pandas import DataFrame as Frame

    from apex_opt.cluster import Cluster, Composition
    from apex_opt.ir import Model
    from apex_opt.workload import Trace
else:

    class Loaded:
        """Stands for the types of what names stand for, which are loaded only where they are used."""

    Model = Cluster = Composition = Trace = Frame = Loaded

LARGEST_SEARCH: Final = 1024
"""GPUs of the largest plan searched for: their space is enumerated in 5 to 10 s, and grows faster than n**2."""

LARGEST_BATCH: Final = 262_144
"""Tokens in one batch. Times are tabulated per token count and plan: this many take some 200 MB a plan."""

Several = Annotated[int | tuple[int, ...] | None, Param(1, 65_536)]
Seconds = Annotated[float | None, Param(0.001, 1e6)]
Top = Annotated[int, Param(1, 10_000)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup(Arguments):
    """What a single batch depends on: the model, the GPUs, the formats, the engine.

    Parameters
    ----------
    model : Name in the registry (listed by: solve.py models), Hugging Face id in the local hub cache, or path of a
        config.json or its folder.
    cluster : GPUs as COUNTxGPU (8xh100-sxm) or NODESxCOUNTxGPU (4x8xh200-sxm), GPU types listed by: solve.py clusters;
        a preset such as dgx-h100 or 4xdgx-h100; or path of a TOML file. Several, 8xh100-sxm,8xl40s, are compared by
        plan, energy and capacity. On GPUs of several types, 8xh100-sxm+8xl40s or a file, the best is one type alone, a
        plan on each of several side by side, or a pipeline over two.
    busy : GPUs that are in use, such as node0:0-3,node2:1, or node1 for all of a node.
    down : GPUs that are out of order, listed as those of --busy.
    weights : Weight formats to choose from, such as bf16,fp8; known: bf16, fp16, fp8, w8a8, w8a16, w8a16g64, w8a16g32,
        w4a16, w4a16g64, w4a16g32, mxfp4, mxfp8, nvfp4. By default the model's own, in the 16-bit type the GPU has.
    kv : KV cache format: bf16, fp16 or fp8; by default the model's own, else 16 bit.
    clock : {clocks} By default the highest.
    expert_routing : How tokens fall on the experts of a mixture: uniform at random, or skewed as measured power laws
        are.
    profiles : Measured tables to use: shipped; silicon, all rows of aiconfigurator-core, of which those shipped are a
        part (needs apex-opt[silicon]); or a folder as profile import and profile collect write it, used before those
        shipped.
    engine : Serving engine, for its scheduler, its own time, its kernels, its defaults and what it can run: vllm,
        sglang, trtllm; vllm-0.6, vllm-0.12, sglang-0.5.9, sglang-0.5.9-drafts, sglang-eager, trtllm-1.0, trtllm-1.1,
        trtllm-1.2; or, for comparison, orca (whole prompts, memory reserved for the whole answer) and static (a batch
        is answered before the next one is formed); or the path of a file that calibrate wrote, which ends in .toml.
    runnable : Whose rules plans must keep to: those of vllm, sglang or trtllm, so that it can start them; or any, for
        plans that no engine need be able to run. By default those of --engine.
    engine_settings : Settings that only the engine has, such as long_prefill_token_threshold=512 of vllm; several with
        commas between them.
    max_num_seqs : Sequences running at once in one replica; several to choose from, such as 64,256,1024. By default the
        engine's.
    max_num_batched_tokens : Tokens in one batch; several to choose from, such as 2048,8192; where prompts are not split
        at least max_model_len. By default the engine's.
    max_model_len : Longest prompt and output together; given, the KV cache must hold one request of that length, as
        engines ask for to start. By default the model's limit, or what the trace needs where prompts are not split.
    block_size : Tokens in one KV block; by default the engine's.
    async_scheduling : Whether the next batch is formed while the last one runs (on one stage): true or false; by
        default the engine's.
    gpu_memory_utilization : Share of a GPU's memory the engine may fill; by default the engine's.
    """

    model: str | Model = "llama-3.1-70b"
    cluster: str | Cluster | Composition = "8xh100-sxm"
    busy: str | None = None
    down: str | None = None
    weights: str | None = None
    kv: str | None = None
    clock: str | None = None
    expert_routing: Literal["uniform", "skewed"] = "uniform"
    profiles: str = "shipped"
    engine: str = "vllm"
    runnable: Literal["vllm", "sglang", "trtllm", "any"] | None = None
    engine_settings: str | None = None
    max_num_seqs: Several = None
    max_num_batched_tokens: Annotated[int | tuple[int, ...] | None, Param(1, LARGEST_BATCH)] = None
    max_model_len: Annotated[int | None, Param(2, 10_000_000)] = None
    block_size: Annotated[int | None, Param(1, 1024)] = None
    async_scheduling: bool | None = None
    gpu_memory_utilization: Annotated[float | None, Param(0.01, 1)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask(Setup):
    """What a problem is made of: a setup, the traffic, the goals, and what is to be made best.

    Parameters
    ----------
    gpus : Most GPUs a plan may take; by default all of the cluster.
    trace : Shipped trace (listed by: solve.py traces); path of a CSV, JSONL or JSON file in one of the layouts of
        traces/README.md, as it is or in gzip; or a description:
        "poisson:rate=2,n=500,prompt=lognormal(512,1.0),output=128",
        "closed:concurrency=32,n=500,prompt=512,output=128", "static:n=100,prompt=1024,output=128"; by default
        n=1000, prompt=512 and output=128 tokens, lognormal(MEAN,SIGMA,MAX).
    trace_unit : Unit of the arrivals in a trace file that does not tell: s, ms, us or ns.
    trace_block : Prompt tokens that one of a trace file's hash_ids stands for; by default as its layout or name says.
    rate : Requests per second at which the trace comes, repeated to 20,000 requests or more, which shows whether that
        lasts: lengths in their order, arrivals drawn anew by its law, looped where recorded, Poisson where it has none.
        By default the trace as it is.
    objective : What to make best: {aims}. Of several, as in energy,e2e_p95, the later ones decide between plans equal
        by those before; with energy~2%,e2e_p95 all within 2% of the least energy count as equal. Where only costs and
        energies are named, e2e_mean comes after them.
    slo : Goals that must all hold, such as {goals}.
    price : $ per GPU and hour; by default that of the cluster's file, in the catalogue an assumed one.
    routing : Which router stands before the replicas: round_robin, least_loaded, vllm_dp, power_of_two, cache_aware (of
        SGLang), dynamo, llm_d, llm_d_kv, session or pull, a shared queue (docs/routing.md); several to choose from, as
        round_robin,cache_aware. Before prefill and before decode instances with a / between them: pull/least_loaded.
    serving : What may be deployed: aggregated, replicas that compute prompts and answer them; pools, one of instances
        that compute prompts (prefill) and one of those that answer them (decode); shared, replicas that do both side by
        side on the same GPUs; or several, as aggregated,pools.
    shares : What prompts and answers may have of each GPU where it is shared, several with commas: 80/100 in per cent,
        pdmux for SGLang's multiplexing, pdmux:72/60 for one division of it, in multiprocessors. By default what
        --runnable can start, or with any a few of each (docs/phases.md).
    overlap : What plans overlap: none, two_batches, which splits a forward of attention copies into two halves, one
        of which computes while the other sends tokens to their experts (vLLM's DBO, SGLang's TBO), nano_batches, with
        which arithmetic, memory and links work at one time (NanoFlow's, with --runnable=any alone), or several with
        commas between them to choose from. Only plans that overlap in one of these ways are looked at: two_batches
        alone leaves out those that overlap nothing, none,two_batches looks at both (docs/overlap.md).
    handover : What it takes to hand a prompt from one pool to another, such as proxy_us=2000,rate_share=0.5; also
        notice_us, post_us and descriptor_us. By default as published for the engine.
    chunked_prefill : Whether a prompt may be split over batches: true or false; by default the engine's.
    speculation : How drafts are made that are verified with every token: none, eagle:3, mtp:1, ngram:5 or draft:MODEL:3
        with so many drafts, eagle:0-5 for a choice of their number, or several with commas.
    acceptance : How many drafts are right: the tokens of a row (one request in one batch) in the mean, the free one
        included, such as 2.9, with the most drafts to choose from; shares of rows in which at least one draft is right,
        two, ..., such as 0.8/0.6/0.4; or a JSON file of counts by position in the output. By default as published for
        the model.
    prefix_caching : Whether prompts that begin alike share their KV blocks, for traces that say what prompts contain:
        true or false; by default false, though it is the engines' own default.
    seed : Seed of described traces.
    emit : Print the commands that start the plan on the engine of --engine, and what they cannot say.
    """

    gpus: Annotated[int | None, Param(1, 65_536)] = None
    trace: str | Trace | Frame = "chat"
    trace_unit: Literal["s", "ms", "us", "ns"] | None = None
    trace_block: Annotated[int | None, Param(1, 65_536)] = None
    rate: Annotated[float | None, Param(1e-6, 1e6)] = None
    objective: str = "e2e_mean"
    slo: str | None = None
    price: Annotated[float | None, Param(1e-6, 1e6)] = None
    routing: str = "round_robin"
    serving: str = "aggregated"
    shares: str | None = None
    overlap: str = "none"
    handover: str | None = None
    chunked_prefill: bool | None = None
    speculation: str = "none"
    acceptance: str | None = None
    prefix_caching: bool | None = None
    seed: Annotated[int, Param(0, 2**32 - 1)] = 0
    emit: Annotated[bool, Param(hint="it takes the engine of --engine")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadAsk(Ask):
    """A problem whose search may be spread over workers, which changes nothing in the answer.

    Parameters
    ----------
    workers : Processes to bound and simulate plans at once, or with --ray=local CPUs that Ray may take. By default this
        process alone, whose simulations run side by side.
    ray : Where to bound and simulate plans by tasks of Ray: local, or HOST:PORT of the head of a cluster; needs
        apex-opt[ray].
    """

    workers: Annotated[int | None, Param(1, 1024)] = None
    ray: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAsk(SpreadAsk):
    """The best plan.

    Parameters
    ----------
    top : Candidates to show, best first.
    time_limit : Seconds after which no further plan is simulated; the answer then shows its gap. By default none. Where
        nothing fits, seconds to find out what would; by default 10.
    check : Replay the certificate: count the space again in plain Python and simulate every feasible plan to its end.
    robust : Find out how far times may be off, those of all plans alike and those of one, before another plan wins, and
        which plans are nearer to the best than the expected error; takes some 20 to 50 searches.
    """

    top: Top = 5
    time_limit: Seconds = None
    check: bool = False
    robust: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyAsk(PlanAsk):
    """The plan with the least energy.

    Parameters
    ----------
    clock : {clocks}
    max_num_seqs : Sequences running at once in one replica, of which the best number is found; plans name theirs, as in
        seqs=64, also where it is the one that the engine has by itself (1024 of vllm).
    latency : Latency whose best plan, at the highest clock, is shown beside: {latencies}.
    """

    objective: str = field(default="energy", init=False)
    clock: str = "all"
    max_num_seqs: Several = (64, 256, 1024)
    latency: str = "e2e_mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoAsk(SpreadAsk):
    """Every plan that no other beats.

    Parameters
    ----------
    objective : Two or three figures to make best: {aims}.
    clock : {clocks}
    robust : Find out how far times may be off, those of all plans alike and those of one, before other plans are on the
        front; takes some 30 searches, and one for every plan on it.
    """

    objective: str = "e2e_mean,energy"
    clock: str = "all"
    robust: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainAsk(SpreadAsk):
    """Why nothing fits, or why a plan loses.

    Parameters
    ----------
    plan : Plan to compare with the best. {plan} {pools}
    time_limit : Seconds after which no further plan is simulated; the answer then shows its gap. By default none. Where
        nothing fits, seconds to find out what would; by default 10.
    """

    emit: bool = field(default=False, init=False)
    plan: str | None = None
    time_limit: Seconds = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateAsk(Ask):
    """Plans that are given.

    Parameters
    ----------
    plan : {plan} {pools} Given several times, the plans are compared.
    objective : Figure to show first, or several: {aims}.
    slo : Goals to judge by, such as {goals}.
    weights : Weight format where the plan names none: bf16, fp16, fp8, w8a8, w8a16, w8a16g64, w8a16g32, w4a16,
        w4a16g64, w4a16g32, mxfp4, mxfp8 or nvfp4; by default the model's own.
    clock : GPU clock in MHz where the plan names none (clock=1200 in its text); by default the highest.
    kv : KV cache format where the plan names none: bf16, fp16 or fp8; by default the model's own, else 16 bit.
    rescheduling : How requests move between replicas while they decode: llumnix, or with numbers of its rules
        llumnix:out_below=3,headroom=400 (docs/rescheduling.md); it deals them too, in place of a router. By default
        they stay where they are.
    """

    plan: str | tuple[str, ...] = field(kw_only=False)
    rescheduling: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceAsk(Setup):
    """A plan to be placed.

    Parameters
    ----------
    plan : {plan} On several types of GPU TYPE: PLAN puts it on that one; without it lies where it is quickest.
    weights : Weight format where the plan names none: bf16, fp16, fp8, w8a8, w8a16, w8a16g64, w8a16g32, w4a16,
        w4a16g64, w4a16g32, mxfp4, mxfp8 or nvfp4; by default the model's own.
    clock : GPU clock in MHz where the plan names none (clock=1200 in its text); by default the highest.
    kv : KV cache format where the plan names none: bf16, fp16 or fp8; by default the model's own, else 16 bit.
    max_num_seqs : Sequences in the batch that is sent.
    max_num_batched_tokens : Tokens in the batch that is sent.
    max_model_len : Longest request that the KV cache must hold; by default any.
    within : List where a replica fits into one switch (NVLink domain, or PCIe switch where there is none), socket, node
        or leaf switch, and for how many there is room.
    lose : GPUs that the cluster loses once the plan is placed, listed as those of --busy: where the plan goes then, and
        the fewest weights that move.
    at : Where the plan lies by now, to be judged beside the best placement and to lose GPUs from: a rank file, or what
        place printed with --format=json. By default the best placement.
    time_limit : Seconds to choose among placements that are as good; that none is better is proven in any case. By
        default none.
    """

    plan: str = field(kw_only=False)
    max_num_seqs: Annotated[int, Param(1, 65_536)] = 1024
    max_num_batched_tokens: Annotated[int, Param(1, LARGEST_BATCH)] = 8192
    within: Literal["switch", "socket", "node", "leaf"] | None = None
    lose: str | None = None
    at: str | None = None
    time_limit: Seconds = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityAsk(SpreadAsk):
    """The highest rate, or the fewest GPUs for one.

    Parameters
    ----------
    slo : Goals that must all hold, on latencies or cost, such as "ttft_p95<=500ms,tpot_p95<=50ms", "ttft<=1s@99%" (of
        the requests) or "itl_p99<=80ms".
    rate : Requests per second to find the fewest GPUs for; by default the highest rate is searched for.
    objective : With --rate, what makes a plan best among those on the fewest GPUs, or several in turn: {aims}.
    plan : The only plan to ask about, such as tp8; by default all are searched. {pools}
    resolution : Step of the rates that are searched, as a share of the rate.
    top : Candidates to show, best first.
    time_limit : Seconds after which no further run is simulated, but for those of the first plan where none was found
        by then; the answer tells what is left. By default none.
    robust : Find out how far times may be off, those of all plans alike and those of one, before another plan is
        answered; takes some 20 to 50 searches.
    """

    slo: str
    plan: str | None = None
    resolution: Annotated[float, Param(0.001, 1)] = 0.02
    top: Top = 5
    time_limit: Seconds = None
    robust: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyAsk(Arguments):
    """A grid of questions.

    Parameters
    ----------
    study : TOML file with the command to ask (plan, energy, capacity or pareto), its options that are [fixed], and
        lists of the others along [axes] (docs/studies.md).
    target : Folder of the results, which are written as they come; one that has some is gone on with. By default that
        of the study's file, without its ending.
    workers : Processes to work at once, or with --ray=local CPUs that Ray may take; by default one for each core.
    ray : Where to work by tasks of Ray: local, or HOST:PORT of the head of a cluster; needs apex-opt[ray]. By default
        processes of this machine do.
    dry_run : List the points, and answer none.
    retry : Answer points that failed before anew.
    """

    study: str = field(kw_only=False)
    target: str | None = None
    workers: Annotated[int | None, Param(1, 1024)] = None
    ray: str | None = None
    dry_run: bool = False
    retry: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateAsk(Setup):
    """Measured runs.

    Parameters
    ----------
    measured : File of measured runs, or a folder with such files in it or below: vLLM runs with the engine's log
        (.json.gz), means of closed loops (.csv), APEX's runs (.csv with the served requests beside it), or what a
        benchmark client saved (docs/calibrate.md). By default the runs that ship with apex_opt.
    plan : Plan that ran while a benchmark client measured, as simulate takes it; its model, cluster, engine and their
        settings are asked for likewise. Other files tell what ran.
    """

    measured: str | None = field(default=None, kw_only=False)
    plan: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateAsk(Setup):
    """Measured runs to fit an engine's times on.

    Parameters
    ----------
    measured : File of measured runs, or a folder, as validate takes it; several times for several. By default the runs
        that ship with apex_opt.
    plan : Plan that ran while a benchmark client measured, as simulate takes it; its model, cluster, engine and their
        settings are asked for likewise. Other files tell what ran.
    hold : Runs, by name, that are not fitted on but only judged by, such as llama-3.1-8b/conv,lmsys; a name stands for
        all that end in it.
    out : TOML file to write the engine to, which every command takes as --engine; one that is there is left alone. By
        default nothing is written.
    """

    measured: str | tuple[str, ...] | None = field(default=None, kw_only=False)
    plan: str | None = None
    hold: str | None = None
    out: Annotated[str | None, Param(suffix=".toml")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileShowAsk(Arguments):
    """Measured tables that there are.

    Parameters
    ----------
    gpu : Accelerator to show in full: a folder's name or one listed by: solve.py clusters.
    profiles : Folder of profiles; by default the one that ships.
    """

    gpu: str | None = None
    profiles: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileDistillAsk(Arguments):
    """Tables to be distilled.

    Parameters
    ----------
    source : Folder the package is unpacked in; by default the one installed.
    target : Folder to write to; by default the checkout's own profiles, or ./profiles where there is none.
    gpu : One accelerator only, such as h100-sxm; by default all of them.
    """

    source: str | None = None
    target: str | None = None
    gpu: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileImportAsk(Arguments):
    """Tables of others.

    Parameters
    ----------
    kind : Whose files: apex or vidur.
    source : Its repository, or a folder or file of its profiles.
    gpu : Accelerator they were measured on: one listed by solve.py clusters, or path of a cluster file.
    target : Folder to write to; <accelerator>/<source> in it is replaced.
    """

    kind: Literal["apex", "vidur"]
    source: str
    gpu: str
    target: str = "profiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileCollectAsk(Arguments):
    """Tables to be measured.

    Parameters
    ----------
    ops : Operations to measure, all of these unless told otherwise: gemm, moe, attention, window (attention over
        windows), state (recurrences and convolutions that keep a state), memory, collective.
    gpu : What the GPU is, where its name does not say it: one listed by solve.py clusters, or path of a cluster file.
    quick : Measure a few points of every table, and no energy.
    target : Folder to write to; <accelerator>/<source> in it is replaced.
    """

    ops: str = "gemm,moe,attention,window,state,memory,collective"
    gpu: str | None = None
    quick: bool = False
    target: str = "profiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFitAsk(Arguments):
    """Runs to fit an engine on.

    Parameters
    ----------
    measured : File of measured runs, or a folder with such files in it or below: vLLM runs with the engine's log
        (.json.gz), means of closed loops (.csv), APEX's runs (.csv with the served requests beside it).
    engine : Engine whose runs are fitted, as plan takes it.
    """

    measured: str = field(kw_only=False)
    engine: str = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterShowAsk(Arguments):
    """A cluster to be shown.

    Parameters
    ----------
    cluster : Cluster as plan takes it: COUNTxGPU, NODESxCOUNTxGPU, a preset such as dgx-h100 or 4xdgx-h100, or path of
        a TOML file; its nodes may differ.
    busy : GPUs that are in use, such as node0:0-3,node2:1, or node1 for all of a node.
    down : GPUs that are out of order, listed as those of --busy.
    """

    cluster: str | Cluster | Composition = "8xh100-sxm"
    busy: str | None = None
    down: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterImportAsk(Arguments):
    """A matrix or list to make a cluster file of.

    Parameters
    ----------
    source : File with the matrix or the list.
    gpu : What the GPUs of a matrix are: one listed by solve.py clusters, a preset, or a TOML file with a [gpu].
    target : TOML file to write; by default it is printed.
    """

    source: str
    gpu: str | None = None
    target: Annotated[str | None, Param(suffix=".toml")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsAsk(Arguments):
    """The models there are.

    Parameters
    ----------
    supports : A config.json, its folder or a name, of which to tell whether it is read, and what is missing.
    """

    supports: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClustersAsk(Arguments):
    """The accelerators there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracesAsk(Arguments):
    """The traces there are."""
