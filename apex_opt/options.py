"""Commands and options of the command line: one table, and the one gate between texts and typed values.

The table is what `--help` shows, what names are known, and what every value is checked against: strictly, never
repairing silently. Nothing heavy is imported here, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.figures.registry import goals_help, latencies_help, objectives_help
from apex_opt.files import expanded, there

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

REQUIRED: Final[Any] = inspect.Parameter.empty
"""Default of an option that must be given."""

CONFIG_FILES: Final = ("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""What is read of a model's folder."""

LONGEST_TEXT: Final = 4096
"""Characters of one value: as long as a path may be."""

LARGEST_SEARCH: Final = 1024
"""GPUs of the largest plan searched for: their space is enumerated in 5 to 10 s, and grows faster than n**2."""

LARGEST_BATCH: Final = 262_144
"""Tokens in one batch. Times are tabulated per token count and plan: this many take some 200 MB a plan."""

_WHOLE: Final = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SWITCH: Final = {"true": True, "false": False}
_EXAMPLES: Final = {str: "TEXT", int: "8", float: "0.9", bool: "true"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option.

    Parameters
    ----------
    name : str             without the dashes
    kind : type            str, int, float or bool
    default : its value where it is not given; None where that follows from other options; `REQUIRED`
    least, most : number   range of an int or float, both ends included
    choices : tuple        the only texts allowed; any where empty
    suffix : str           how the name of a file to write must end, so that no other text is taken for one; ".a or .b"
                           for two ways
    many : bool            several values may be given, with commas between them: a tuple where there are more than one
    again : bool           it may be given several times: a tuple where it is
    text : str             what `--help` says
    """

    name: str
    kind: type[Any] = str
    default: Any = None
    least: float = 0
    most: float = 0
    choices: tuple[str, ...] = ()
    suffix: str = ""
    many: bool = False
    again: bool = False
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: what it does in a line, more on it with examples, its options."""

    summary: str
    text: str = ""
    options: tuple[Option, ...]

    def option(self, name: str) -> Option:
        """The option of this name."""
        return next(option for option in self.options if option.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Commands that share their first word: what they are about in a line, more on it with examples."""

    summary: str
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """A command and its options in their types, not yet run."""

    command: str
    options: dict[str, Any]


_READ: Final = ("model", "cluster", "gpu", "trace", "profiles", "at", "source", "measured")
"""Options that may name a file or a folder to read."""

_GENERAL: Final = (
    Option(name="format", default="table", choices=("table", "json"), text="Form of the answer: table or json."),
    Option(name="debug", kind=bool, default=False, text="Show the traceback of an error."),
)

_SOURCES: Final = Option(
    name="sources",
    kind=bool,
    default=False,
    text="Tell of every figure where it comes from, not only which are measured, derived or assumed; json always does.",
)

_PROFILES: Final = Option(
    name="profiles",
    default="shipped",
    text="Measured tables to use: shipped; silicon, all rows of aiconfigurator-core, of which those shipped are a part "
    "(needs apex-opt[silicon]); or a folder as profile import and profile collect write it, used before those shipped.",
)

_CLOCKS: Final = (
    "GPU clocks to choose from, in MHz, such as 1200,1600,1980, or all: six from half to the highest. Times and power "
    "at others than the highest follow published laws."
)
_AIMS: Final = objectives_help()
_GOALS: Final = goals_help()

_TAKEN: Final = (
    Option(name="busy", text="GPUs that are in use, such as node0:0-3,node2:1, or node1 for all of a node."),
    Option(name="down", text="GPUs that are out of order, listed as those of --busy."),
)

_QUESTION: Final = (
    Option(
        name="model",
        default="llama-3.1-70b",
        text="Name in the registry (listed by: solve.py models), Hugging Face id in the local hub cache, or path of a "
        "config.json or its folder.",
    ),
    Option(
        name="cluster",
        default="8xh100-sxm",
        text="GPUs as COUNTxGPU (8xh100-sxm) or NODESxCOUNTxGPU (4x8xh200-sxm), GPU types listed by: solve.py "
        "clusters; a preset such as dgx-h100 or 4xdgx-h100; or path of a TOML file. Several, 8xh100-sxm,8xl40s, are "
        "compared by plan, energy and capacity. Of GPUs of several types, 8xh100-sxm+8xl40s or a file, plan and energy "
        "find the best fleet: a plan for each type, side by side.",
    ),
    *_TAKEN,
    Option(
        name="gpus",
        kind=int,
        least=1,
        most=65_536,
        text="Most GPUs a plan may take; by default all of the cluster.",
    ),
    Option(
        name="trace",
        default="chat",
        text="Shipped trace (listed by: solve.py traces); path of a CSV, JSONL or JSON file in one of the layouts of "
        "traces/README.md, as it is or in gzip; or a description: "
        '"poisson:rate=2,n=500,prompt=lognormal(512,1.0),output=128", '
        '"closed:concurrency=32,n=500,prompt=512,output=128", "static:n=100,prompt=1024,output=128".',
    ),
    Option(
        name="trace_unit",
        choices=("s", "ms", "us", "ns"),
        text="Unit of the arrivals in a trace file that does not tell: s, ms, us or ns.",
    ),
    Option(
        name="trace_block",
        kind=int,
        least=1,
        most=65_536,
        text="Prompt tokens that one of a trace file's hash_ids stands for; by default as its layout or name says.",
    ),
    Option(
        name="rate",
        kind=float,
        least=1e-6,
        most=1e6,
        text="Requests per second at which the trace comes, repeated to 20,000 requests or more, which shows whether "
        "that lasts: lengths in their order, arrivals drawn anew by its law, looped where recorded, Poisson where it "
        "has none. By default the trace as it is.",
    ),
    Option(
        name="objective",
        default="e2e_mean",
        text=f"What to make best: {_AIMS}. Of several, as in energy,e2e_p95, the later ones decide between plans equal "
        "by those before; with energy~2%,e2e_p95 all within 2% of the least energy count as equal. Where only costs "
        "and energies are named, e2e_mean comes after them.",
    ),
    Option(
        name="slo",
        text=f"Goals that must all hold, such as {_GOALS}.",
    ),
    Option(
        name="price",
        kind=float,
        least=1e-6,
        most=1e6,
        text="$ per GPU and hour; by default that of the cluster's file, in the catalogue an assumed one.",
    ),
    Option(
        name="weights",
        text="Weight formats to choose from, such as bf16,fp8; known: bf16, fp16, fp8, w8a8, w8a16, w8a16g64, "
        "w8a16g32, w4a16, w4a16g64, w4a16g32, mxfp4, nvfp4. By default the model's own, in the 16-bit type the GPU "
        "has.",
    ),
    Option(name="kv", text="KV cache format: bf16, fp16 or fp8; by default the model's own, else 16 bit."),
    Option(
        name="clock",
        text=f"{_CLOCKS} By default the highest.",
    ),
    Option(
        name="routing",
        default="round_robin",
        choices=("round_robin", "least_loaded"),
        text="How requests are dealt to replicas: round_robin or least_loaded.",
    ),
    Option(
        name="expert_routing",
        default="uniform",
        choices=("uniform", "skewed"),
        text="How tokens fall on the experts of a mixture: uniform at random, or skewed as measured power laws are.",
    ),
    _PROFILES,
    Option(
        name="engine",
        default="vllm",
        text="Serving engine, for its kernels and its own time: vllm, sglang, trtllm; or vllm-0.6, sglang-eager.",
    ),
    Option(
        name="runnable",
        choices=("vllm", "sglang", "trtllm", "any"),
        text="Whose rules plans must keep to: those of vllm, sglang or trtllm, so that it can start them; or any, for "
        "plans that no engine need be able to run. By default the engine of --emit, else of --engine.",
    ),
    Option(
        name="max_num_seqs",
        kind=int,
        default=1024,
        least=1,
        most=65_536,
        many=True,
        text="Sequences running at once in one replica; several to choose from, such as 64,256,1024.",
    ),
    Option(
        name="max_num_batched_tokens",
        kind=int,
        default=8192,
        least=1,
        most=LARGEST_BATCH,
        many=True,
        text="Tokens in one batch; several to choose from, such as 2048,8192; where prompts are not split at least "
        "max_model_len.",
    ),
    Option(
        name="max_model_len",
        kind=int,
        least=2,
        most=10_000_000,
        text="Longest prompt and output together; given, the KV cache must hold one request of that length, as engines "
        "ask for to start. By default the model's limit, or what the trace needs where prompts are not split.",
    ),
    Option(name="block_size", kind=int, default=16, least=1, most=1024, text="Tokens in one KV block."),
    Option(
        name="chunked_prefill",
        kind=bool,
        default=True,
        text="Whether a prompt may be split over batches: true or false.",
    ),
    Option(
        name="policy",
        default="vllm",
        choices=("vllm", "orca", "static"),
        text="How batches are formed: vllm (chunks, preemption), orca (whole prompts, memory reserved for the whole "
        "answer) or static (a batch is answered before the next one is formed).",
    ),
    Option(
        name="prefix_caching",
        kind=bool,
        default=False,
        text="Whether prompts that begin alike share their KV blocks, for traces that say what prompts contain: true "
        "or false.",
    ),
    Option(
        name="async_scheduling",
        kind=bool,
        default=True,
        text="Whether the next batch is formed while the last one runs (on one stage): true or false.",
    ),
    Option(
        name="gpu_memory_utilization",
        kind=float,
        default=0.9,
        least=0.01,
        most=1,
        text="Share of a GPU's memory the engine may fill.",
    ),
    Option(name="seed", kind=int, default=0, least=0, most=2**32 - 1, text="Seed of described traces."),
)

_TOP: Final = Option(name="top", kind=int, default=5, least=1, most=10_000, text="Candidates to show, best first.")
_TIME_LIMIT: Final = Option(
    name="time_limit",
    kind=float,
    least=0.001,
    most=1e6,
    text="Seconds after which no further plan is simulated; the answer then shows its gap. By default none. Where "
    "nothing fits, seconds to find out what would; by default 10.",
)
_CHECK: Final = Option(
    name="check",
    kind=bool,
    default=False,
    text="Replay the certificate: count the space again in plain Python and simulate every feasible plan to its end.",
)
_LATENCY: Final = Option(
    name="latency",
    default="e2e_mean",
    text=f"Latency whose best plan, at the highest clock, is shown beside: {latencies_help()}.",
)
_REQUESTS: Final = Option(name="requests", suffix=".csv", text="CSV file to write the latencies of every request to.")
_TIMELINE: Final = Option(
    name="timeline",
    suffix=".json",
    text="JSON file to write every batch to, as a timeline for ui.perfetto.dev or chrome://tracing.",
)
_PLAN: Final = Option(
    name="plan",
    default=REQUIRED,
    text='Replicas, pipeline stages, cut of attention, cut of FFN, number formats: "dp2 pp2 attn(tp2) ffn(tp2) bf16", '
    '"attn(dp4,tp2) ffn(ep8) fp8 kv=fp8"; "tp8" alone cuts both cells; "pp2[41,39]" sets the layers of each stage.',
)
_RESOLUTION: Final = Option(
    name="resolution",
    kind=float,
    default=0.02,
    least=0.001,
    most=1,
    text="Step of the rates that are searched, as a share of the rate.",
)
_EMIT: Final = Option(
    name="emit",
    choices=("vllm", "sglang", "trtllm"),
    text="Print the commands that start the plan on this engine, vllm, sglang or trtllm, and what they cannot say.",
)
_PLACE: Final = (
    Option(
        name="within",
        choices=("switch", "socket", "node", "leaf"),
        text="List where a replica fits into one switch (NVLink domain, or PCIe switch where there is none), socket, "
        "node or leaf switch, and for how many there is room.",
    ),
    Option(
        name="lose",
        text="GPUs that the cluster loses once the plan is placed, listed as those of --busy: where the plan goes "
        "then, and the fewest weights that move.",
    ),
    Option(
        name="at",
        text="Where the plan lies by now, to be judged beside the best placement and to lose GPUs from: a rank file, "
        "or what place printed with --format=json. By default the best placement.",
    ),
    Option(
        name="rankfile",
        suffix=".txt",
        text="Text file to write a line per rank to, such as rank 0=node0 slot=3: Open MPI's form, the slot being the "
        "GPU; replica by replica, ranks numbered through.",
    ),
)
_MEASURED: Final = Option(
    name="measured",
    default=REQUIRED,
    text="File of measured runs, or a folder with such files in it or below: vLLM runs with the engine's log "
    "(.json.gz), means of closed loops (.csv), APEX's runs (.csv with the served requests beside it).",
)
_PLOT: Final = Option(
    name="plot", suffix=".png", text="PNG file to draw predicted against measured into; needs apex-opt[plot]."
)
_LIMIT: Final = Option(
    name="limit",
    kind=int,
    default=30,
    least=1,
    most=100_000,
    text="Runs to show in the table, of more those with the largest errors; json has all.",
)
_SHOWN_PROFILES: Final = Option(name="profiles", text="Folder of profiles; by default the one that ships.")
_TARGET: Final = Option(
    name="target", default="profiles", text="Folder to write to; <accelerator>/<source> in it is replaced."
)
_ELSEWHERE: Final = {
    "objective": f"Figure to show first, or several: {_AIMS}.",
    "slo": f"Goals to judge by, such as {_GOALS}.",
    "weights": "Weight format where the plan names none: bf16, fp16, fp8, w8a8, w8a16, w8a16g64, w8a16g32, "
    "w4a16, w4a16g64, w4a16g32, mxfp4 or nvfp4; by default the model's own.",
    "clock": "GPU clock in MHz where the plan names none (clock=1200 in its text); by default the highest.",
    "kv": "KV cache format where the plan names none: bf16, fp16 or fp8; by default the model's own, else 16 bit.",
}
_BY_RATE: Final[Mapping[str, Mapping[str, Any]]] = {
    "rate": {"text": "Requests per second to find the fewest GPUs for; by default the highest rate is searched for."},
    "slo": {
        "default": REQUIRED,
        "text": 'Goals that must all hold, on latencies or cost, such as "ttft_p95<=500ms,tpot_p95<=50ms", '
        '"ttft<=1s@99%" (of the requests) or "itl_p99<=80ms".',
    },
    "objective": {
        "text": f"With --rate, what makes a plan best among those on the fewest GPUs, or several in turn: {_AIMS}."
    },
}

_OF_A_STEP: Final = (
    "model",
    "cluster",
    "busy",
    "down",
    "weights",
    "kv",
    "clock",
    "expert_routing",
    "profiles",
    "engine",
    "runnable",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "block_size",
    "async_scheduling",
    "gpu_memory_utilization",
)
"""Options of a question that a single batch depends on."""

_PLACED: Final[Mapping[str, Mapping[str, Any]]] = {
    "max_num_seqs": {"many": False, "text": "Sequences in the batch that is sent."},
    "max_num_batched_tokens": {"many": False, "text": "Tokens in the batch that is sent."},
    "max_model_len": {"text": "Longest request that the KV cache must hold; by default any."},
}

_FRONT: Final[Mapping[str, Mapping[str, Any]]] = {
    "objective": {
        "default": "e2e_mean,energy",
        "text": f"Two or three figures to make best: {_AIMS}.",
    },
    "clock": {"default": "all", "text": _CLOCKS},
}

_ENERGY: Final[Mapping[str, Mapping[str, Any]]] = {
    "clock": {"default": "all", "text": _CLOCKS},
    "max_num_seqs": {"default": (64, 256, 1024)},
}

COMMANDS: Final[Mapping[str, Command]] = {
    "plan": Command(
        summary="Find the plan that serves a trace best, and prove it.",
        text="For example:\n\n"
        "  solve.py plan --model=llama-3.1-70b --cluster=8xh100-sxm --trace=chat\n"
        '  solve.py plan --slo="ttft_p95<=500ms,tpot_p95<=50ms" --objective=energy\n'
        "  solve.py plan --model=./config.json --weights=bf16,fp8 --format=json\n\n"
        "Exit code: 0 with a plan, 3 where none is feasible, 2 for bad input.",
        options=(*_QUESTION, _TOP, _TIME_LIMIT, _CHECK, _EMIT, _SOURCES, *_GENERAL),
    ),
    "energy": Command(
        summary="Find the plan that needs the least energy within the goals.",
        text="Over plans, numbers of GPUs, formats, limits of a batch and clocks; the plan with the best latency "
        "within the same goals is shown beside it. For example:\n\n"
        '  solve.py energy --slo="ttft_p95<=500ms,tpot_p95<=50ms" --weights=bf16,fp8\n'
        '  solve.py energy --slo="e2e_p95<=30s" --clock=1200,1600,1980\n\n'
        "Exit code: 0 with a plan, 3 where none is feasible, 2 for bad input.",
        options=(
            *(replace(option, **_ENERGY.get(option.name, {})) for option in _QUESTION if option.name != "objective"),
            _LATENCY,
            _TOP,
            _TIME_LIMIT,
            _CHECK,
            _EMIT,
            _SOURCES,
            *_GENERAL,
        ),
    ),
    "pareto": Command(
        summary="Find every plan that no other beats in all of two or three objectives.",
        text="For example:\n\n"
        "  solve.py pareto --objective=e2e_mean,energy\n"
        '  solve.py pareto --objective=ttft_p95,tpot_p95,energy --slo="e2e_p95<=30s" --plot=front.png\n\n'
        "The front is exact: a plan is left out only where another is proved to beat it. Exit code: 0 with a front, 3 "
        "where no plan is feasible, 2 for bad input.",
        options=(
            *(replace(option, **_FRONT.get(option.name, {})) for option in _QUESTION),
            replace(_PLOT, text="PNG file to draw the front into; needs apex-opt[plot]."),
            _EMIT,
            _SOURCES,
            *_GENERAL,
        ),
    ),
    "explain": Command(
        summary="Say why no plan fits and what would, or why a plan loses to the best.",
        text="For example:\n\n"
        "  solve.py explain --model=llama-3.1-70b --cluster=1xh100-sxm\n"
        '  solve.py explain --slo="ttft_p95<=60ms"\n'
        '  solve.py explain --plan="dp2 tp4"\n\n'
        "Where nothing fits: the fewest constraints that clash, with numbers, and the cheapest changes that were "
        "solved and found feasible. Exit code: 0 where a plan fits, 3 where none does, 2 for bad input.",
        options=(
            *_QUESTION,
            replace(_PLAN, default=None, text=f"Plan to compare with the best. {_PLAN.text}"),
            _TIME_LIMIT,
            _SOURCES,
            *_GENERAL,
        ),
    ),
    "simulate": Command(
        summary="Score a given plan batch by batch, or several side by side.",
        text="For example:\n\n"
        '  solve.py simulate --plan=tp8 --trace="poisson:rate=8,n=2000"\n'
        '  solve.py simulate --plan="dp2 attn(tp4) ffn(tp4) fp8" --slo="tpot_p95<=30ms"\n'
        '  solve.py simulate --plan=tp8 --plan="dp2 tp4"\n\n'
        "Of several plans it says where time, energy and memory differ. Exit code: 0 with the figures, goals met or "
        "not; 3 where no plan can run; 2 for bad input.",
        options=(
            replace(_PLAN, again=True, text=f"{_PLAN.text} Given several times, the plans are compared."),
            *(replace(option, text=_ELSEWHERE.get(option.name, option.text)) for option in _QUESTION),
            _REQUESTS,
            _TIMELINE,
            _EMIT,
            _SOURCES,
            *_GENERAL,
        ),
    ),
    "place": Command(
        summary="Place one given plan on the GPUs that are free, and say what losing some costs.",
        text="For example:\n\n"
        '  solve.py place --plan="dp2 tp8" --cluster=4xdgx-h100 --busy="node0:0-3,node1:5"\n'
        "  solve.py place --plan=tp4 --cluster=server-8xl40s --model=llama-3.1-8b --within=socket\n"
        '  solve.py place --plan="dp2 tp4" --lose=node0:3 --rankfile=ranks.txt\n\n'
        "No other placement is better, which is proven. Exit code: 0 with a placement, 3 where the plan does not fit, "
        "2 for bad input.",
        options=(
            _PLAN,
            *(
                replace(option, **{"text": _ELSEWHERE.get(option.name, option.text), **_PLACED.get(option.name, {})})
                for option in _QUESTION
                if option.name in _OF_A_STEP
            ),
            *_PLACE,
            replace(_PLOT, suffix=".png or .svg", text="PNG or SVG file to draw it into; needs apex-opt[plot]."),
            replace(
                _TIME_LIMIT,
                text="Seconds to choose among placements that are as good; that none is better is proven in any case. "
                "By default none.",
            ),
            _SOURCES,
            *_GENERAL,
        ),
    ),
    "capacity": Command(
        summary="Find the highest request rate within the goals, or the fewest GPUs for a rate.",
        text="For example:\n\n"
        '  solve.py capacity --slo="ttft_p95<=500ms,tpot_p95<=50ms"\n'
        '  solve.py capacity --slo="ttft_p95<=500ms,tpot_p95<=50ms" --rate=4\n'
        '  solve.py capacity --plan=tp8 --slo="tpot<=50ms@99%" --resolution=0.01\n\n'
        "A rate is judged by the trace repeated, until the answer no longer depends on how long it runs: lengths in "
        "their order, arrivals drawn anew (looped where recorded). Exit code: 0 with a rate or a plan, 3 where no plan "
        "meets the goals, 2 for bad input.",
        options=(
            *(replace(option, **_BY_RATE.get(option.name, {})) for option in _QUESTION),
            replace(_PLAN, default=None, text="The only plan to ask about, such as tp8; by default all are searched."),
            _RESOLUTION,
            _TOP,
            _EMIT,
            _SOURCES,
            *_GENERAL,
        ),
    ),
    "validate": Command(
        summary="Compare measured serving runs with their simulation.",
        text="For example:\n\n"
        "  solve.py validate --measured=runs/llama-3.1-8b.json.gz\n"
        "  solve.py validate --measured=runs --format=json\n"
        "  solve.py validate --measured=runs --plot=errors.png\n\n"
        "Exit code: 0 where a run was predicted, 3 where none could be, 2 for bad input.",
        options=(_MEASURED, _PROFILES, _PLOT, _LIMIT, _SOURCES, *_GENERAL),
    ),
    "profile show": Command(
        summary="List the measured tables there are, and where they come from.",
        text="For example:\n\n"
        "  solve.py profile show\n"
        "  solve.py profile show --gpu=h200-sxm\n\n"
        "Every table is read and checked. Exit code: 0, or 2 where one is faulty.",
        options=(
            Option(
                name="gpu", text="Accelerator to show in full: a folder's name or one listed by: solve.py clusters."
            ),
            _SHOWN_PROFILES,
            *_GENERAL,
        ),
    ),
    "profile distill": Command(
        summary="Make the shipped tables anew from the package aiconfigurator-core.",
        text="For example:\n\n"
        "  pip install 'apex-opt[distill]'\n"
        "  solve.py profile distill --target=profiles\n\n"
        "Rows that cannot be believed are dropped, those that follow from their neighbours left out; both are counted, "
        "with the error that makes. Equal input gives equal files. Exit code: 0, or 2 without the package or pyarrow.",
        options=(
            Option(name="source", text="Folder the package is unpacked in; by default the one installed."),
            replace(
                _TARGET,
                default=None,
                text="Folder to write to; by default the checkout's own profiles, or ./profiles where there is none.",
            ),
            Option(name="gpu", text="One accelerator only, such as h100-sxm; by default all of them."),
            *_GENERAL,
        ),
    ),
    "profile import": Command(
        summary="Read the profile CSV files of APEX+ or Vidur.",
        text="For example:\n\n"
        "  solve.py profile import --kind=apex --source=apex_plus --gpu=h100-sxm\n"
        "  solve.py profile import --kind=vidur --source=vidur/data/profiling --gpu=a100-sxm\n"
        "  solve.py plan --profiles=profiles --cluster=8xa100-sxm\n\n"
        "Exit code: 0 with a folder written, 2 for files that are no such tables.",
        options=(
            Option(name="kind", default=REQUIRED, choices=("apex", "vidur"), text="Whose files: apex or vidur."),
            Option(name="source", default=REQUIRED, text="Its repository, or a folder or file of its profiles."),
            Option(
                name="gpu",
                default=REQUIRED,
                text="Accelerator they were measured on: one listed by solve.py clusters, or path of a cluster file.",
            ),
            _TARGET,
            *_GENERAL,
        ),
    ),
    "profile collect": Command(
        summary="Measure the GPU of this machine.",
        text="For example:\n\n"
        "  solve.py profile collect --quick\n"
        "  solve.py profile collect --ops=gemm,attention --target=profiles\n"
        "  solve.py plan --profiles=profiles\n\n"
        "Needs torch with CUDA; takes vLLM's kernels where vllm is installed, else torch's own, and reads the energy "
        "counter where pynvml is. Estimated to take half an hour, with --quick two minutes. Exit code: 0 with a folder "
        "written, 2 without a GPU or torch.",
        options=(
            Option(
                name="ops",
                default="gemm,moe,attention,memory,collective",
                text="Operations to measure: gemm, moe, attention, memory, collective.",
            ),
            Option(
                name="gpu",
                text="What the GPU is, where its name does not say it: one listed by solve.py clusters, or path of a "
                "cluster file.",
            ),
            Option(name="quick", kind=bool, default=False, text="Measure a few points of every table, and no energy."),
            _TARGET,
            *_GENERAL,
        ),
    ),
    "profile fit": Command(
        summary="Fit an engine's own time and the power of GPUs on measured runs.",
        text="For example:\n\n"
        "  solve.py profile fit --measured=runs\n"
        "  solve.py profile fit --measured=runs/sglang.csv --engine=sglang --format=json\n\n"
        "Prints the engine's section for profiles/engines.toml with the errors before and after, and the power table "
        "for the card of each GPU whose runs have energies. Writes no file. Every run is simulated some sixty times. "
        "Exit code: 0, or 2 where no run of the engine can be predicted.",
        options=(
            _MEASURED,
            Option(name="engine", default="vllm", text="Engine of profiles/engines.toml whose runs are fitted."),
            *_GENERAL,
        ),
    ),
    "cluster show": Command(
        summary="Show the GPUs of a cluster, how they are wired, and which are free.",
        text="For example:\n\n"
        "  solve.py cluster show --cluster=2xdgx-h100\n"
        '  solve.py cluster show --cluster=mine.toml --busy="node0:0-3,node2:1" --down=node1\n'
        "  solve.py cluster show --cluster=server-8xl40s --plot=wiring.svg\n\n"
        "Presets: cloud-8xa100, cloud-8xh100, cloud-8xl40s, dgx-a100, dgx-b200, dgx-b300, dgx-h100, dgx-h200, "
        "nvl72-gb200, server-4xv100, server-8xl40s. Exit code: 0, or 2 for bad input.",
        options=(
            Option(
                name="cluster",
                default="8xh100-sxm",
                text="Cluster as plan takes it: COUNTxGPU, NODESxCOUNTxGPU, a preset such as dgx-h100 or 4xdgx-h100, "
                "or path of a TOML file; its nodes may differ.",
            ),
            *_TAKEN,
            replace(_PLOT, suffix=".png or .svg", text="PNG or SVG file to draw it into; needs apex-opt[plot]."),
            *_GENERAL,
        ),
    ),
    "cluster import": Command(
        summary="Make a cluster file of what nvidia-smi topo -m printed, or of a list of nodes.",
        text="For example:\n\n"
        "  nvidia-smi topo -m > topo.txt\n"
        "  solve.py cluster import --source=topo.txt --gpu=h100-sxm --target=mine.toml\n"
        "  solve.py cluster show --cluster=mine.toml\n\n"
        "A list has a line NAME GPUS TYPE for every node, as in 'worker-1 8 dgx-h100'; the type is a GPU or a preset. "
        "Exit code: 0, or 2 for bad input.",
        options=(
            Option(name="source", default=REQUIRED, text="File with the matrix or the list."),
            Option(
                name="gpu",
                text="What the GPUs of a matrix are: one listed by solve.py clusters, a preset, or a TOML file with a "
                "[gpu].",
            ),
            Option(name="target", suffix=".toml", text="TOML file to write; by default it is printed."),
            *_GENERAL,
        ),
    ),
    "models": Command(summary="List the models that can be named.", options=_GENERAL),
    "clusters": Command(summary="List the accelerators that can be named, and a node of each.", options=_GENERAL),
    "traces": Command(summary="List the traces that ship with apex_opt.", options=_GENERAL),
}

GROUPS: Final[Mapping[str, Group]] = {
    "cluster": Group(
        summary="Single GPUs of a cluster and their wiring: show, import.",
        text="A cluster is more than so many GPUs: what a transfer crosses depends\n"
        "on which two they are, and some may be taken. These commands show it:\n\n"
        "  solve.py cluster show --cluster=2xdgx-h100\n"
        "  solve.py cluster import --source=topo.txt --gpu=h100-sxm\n\n"
        "Every command has its own help: solve.py cluster show --help",
    ),
    "profile": Group(
        summary="Measured tables of accelerators: show, distill, import, collect, fit.",
        text="Times come from tables of single operations measured on an\n"
        "accelerator. These commands list those that ship and make more:\n\n"
        "  solve.py profile show\n"
        "  solve.py profile collect --target=profiles\n"
        "  solve.py plan --profiles=profiles\n\n"
        "Every command has its own help: solve.py profile show --help",
    ),
}
"""First words of the commands of two words."""


def method(name: str) -> Callable[..., Request]:
    """A command as a method with keyword-only parameters and a docstring: what fire reads to dispatch and to help."""
    command = COMMANDS[name]

    def ask(self: object, **given: Any) -> Request:
        defaults = {option.name: option.default for option in command.options}
        if unknown := [key for key in given if key not in defaults]:
            raise UnknownNameError(f"option of {name}", unknown[0], defaults)
        if missing := [key for key, value in (defaults | given).items() if value is REQUIRED]:
            raise UsageError(f"{name}: needs --{missing[0]}; see solve.py {name} --help")
        return Request(name, {key: checked(command.option(key), value) for key, value in (defaults | given).items()})

    keyword = inspect.Parameter.KEYWORD_ONLY
    ask.__name__ = ask.__qualname__ = name.split()[-1]
    ask.__doc__ = _docstring(command)
    ask.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(inspect.Parameter(o.name, keyword, default=o.default, annotation=o.kind) for o in command.options),
        ]
    )
    return ask


def group(name: str) -> object:
    """The commands that share a first word, as an object with a method for each."""
    members = {command.split()[1]: method(command) for command in COMMANDS if command.startswith(f"{name} ")}
    return type(name, (), {"__doc__": f"{GROUPS[name].summary}\n\n{GROUPS[name].text}", **members})()


def files_of(request: Request) -> tuple[dict[str, Path], dict[str, Path]]:
    """Files that a request is to write, and files and folders that it reads, each by option."""
    given = {option.name: request.options[option.name] for option in COMMANDS[request.command].options}
    suffixed = [option.name for option in COMMANDS[request.command].options if option.suffix]
    writes = {name: expanded(given[name]) for name in suffixed if given[name] is not None}
    reads: dict[str, Path] = {}
    for name in (name for name in _READ if writes and isinstance(given.get(name), str)):
        # Of several clusters each may be a file.
        for part in (given[name], *(re.split("[,+]", given[name]) if name == "cluster" else ())):
            if there(path := expanded(part.strip())):
                read = [path]
                if name == "model":
                    # A configuration is read with what lies beside it.
                    first = path / CONFIG_FILES[0] if path.is_dir() else path
                    read = [first, *(first.with_name(file) for file in CONFIG_FILES[1:])]
                reads |= {f"{name} {file}": file for file in read}
    return writes, reads


def _docstring(command: Command) -> str:
    """Summary, text and one line per option."""
    # Not broken into lines: fire takes a line that looks like "word:" for another option.
    arguments = "\n".join(f"    {option.name}: {option.text}" for option in command.options)
    return "\n\n".join(filter(None, (command.summary, command.text, f"Args:\n{arguments}")))


def wrapped(text: str, width: int = 80) -> str:
    """Help with its long lines broken, each at its own indentation."""
    lines = []
    for line in text.splitlines():
        if line.lstrip().startswith("solve.py ") and "--" in line:
            lines.append(line)  # a command to copy
            continue
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def arranged(words: Sequence[str]) -> list[str]:
    """Words of a command line as fire should see them, each option once and as `--name='value'`.

    fire runs a command before it has looked at all its words, takes `1.10` for a number and `--` for its own flags. So
    names are checked first, and values are quoted: fire unquotes them and changes nothing else.

    Parameters
    ----------
    words : a command of one word or two, then `--name=value`, `--name value` or, where no other option starts with
        that letter, `-n value`; a switch alone is true; `--help` anywhere asks for help

    Raises
    ------
    UnknownNameError    a command or an option that there is not, with suggestions
    UsageError          a word without option, an option given twice or without value, a required one left out
    """
    asks = any(word in ("-h", "--help") for word in words) or list(words[:1]) == ["help"]
    named = [word for word in words if word not in ("-h", "--help", "help")]
    if not named or (named[0] in GROUPS and len(named) == 1):
        return [*named, "--", "--help"]
    name = _command(named, words)
    parts = name.split()
    if asks:
        return [*parts, "--", "--help"]
    values = _values(name, words[len(parts) :])
    missing = [o.name for o in COMMANDS[name].options if o.default is REQUIRED and o.name not in values]
    if missing:
        raise UsageError(f"{name}: needs --{missing[0]}; see solve.py {name} --help")
    return [*parts, *(f"--{name}={value!r}" for name, value in values.items())]


def _command(named: Sequence[str], words: Sequence[str]) -> str:
    """The command that the first words name, the second too where the first is a group's."""
    group = f"{named[0]} " if named[0] in GROUPS else ""
    word = named[1 if group else 0]
    known = dict.fromkeys(command.removeprefix(group).split()[0] for command in COMMANDS if command.startswith(group))
    if word.startswith("-") and (given := [word for word in words if word in known]):
        raise UsageError(f"{word!r:.60} stands before the command; write solve.py {group}{given[0]} --name=value")
    if word not in known:
        kind = f"command of {named[0]}" if group else "command"
        raise UnknownNameError(kind, word[:60], known, f"see solve.py {group}--help")
    return group + word


def _values(command: str, words: Sequence[str]) -> dict[str, str | tuple[str, ...]]:
    """Option names and the texts given for them."""
    values: dict[str, str | tuple[str, ...]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or _is_value(word):
            raise UsageError(f"{command}: {word!r:.60} belongs to no option; options are given as --name=value")
        if word == "--":
            raise UsageError(f"{command}: '--' has no meaning here; options are given as --name=value")
        spelling, equals, value = word.partition("=")
        option = _option(command, spelling)
        if option.name in values and not option.again:
            raise UsageError(f"--{option.name}: given twice; give it once")
        if not equals:
            if rest and _is_value(rest[0]):
                value = rest.pop(0)
            elif option.kind is bool:
                value = "true"
            else:
                raise UsageError(f"--{option.name}: needs a value, such as --{option.name}={_EXAMPLES[option.kind]}")
        before = values.get(option.name, ())
        values[option.name] = (*((before,) if isinstance(before, str) else before), value) if before else value
    return values


def _option(command: str, spelling: str) -> Option:
    """The option meant by `--name`, `--na-me` or, where only one starts with it, `-n`."""
    options = COMMANDS[command].options
    name = spelling.removeprefix("--").replace("-", "_")
    found = [option for option in options if spelling.startswith("--") and option.name == name]
    if re.fullmatch("-[a-z]", spelling):
        found = [option for option in options if option.name.startswith(spelling[1])]
    elsewhere = [other for other, one in COMMANDS.items() if any(option.name == name for option in one.options)]
    if not found and elsewhere and spelling.startswith("--"):
        who = f"{', '.join(elsewhere[:4])}{' and others' if len(elsewhere) > 4 else ''}"
        has = "has" if len(elsewhere) == 1 else "have"
        raise UsageError(f"--{name}: {command} has no such option, {who} {has}; see solve.py {command} --help")
    if len(found) != 1:
        raise UnknownNameError(
            f"option of {command}",
            spelling[:60],
            [f"--{o.name}" for o in found or options],
            f"see solve.py {command} --help",
        )
    return found[0]


def _is_value(word: str) -> bool:
    """Whether a word is a value rather than an option: a negative number is."""
    return not word.startswith("-") or word[1:2].isdigit() or word[1:2] == "."


def checked(option: Option, value: Any) -> Any:
    """The value of an option in its type and range, from a text as typed or from a value that has its type.

    Raises
    ------
    UsageError, UnknownNameError    naming the option, the value and what is allowed
    """
    if value is option.default:
        return value
    if option.again and isinstance(value, tuple):
        return tuple(checked(replace(option, again=False, default=None), part) for part in value)
    if option.many and isinstance(value, str | tuple) and len(parts := _parts(value)) > 1:
        values = tuple(checked(replace(option, default=None), part) for part in parts)
        if len(set(values)) < len(values):
            raise UsageError(f"--{option.name}: {value!r:.60} names a value twice")
        return values
    label = f"--{option.name}"
    if option.kind is not str and isinstance(value, str):
        value = _read(option, label, value)
    if type(value) is not option.kind and not (option.kind is float and type(value) is int):
        raise UsageError(f"{label}: expected {option.kind.__name__}, got {value!r:.60}")
    if option.kind in (int, float) and not option.least <= value <= option.most:
        shown = _short(f"{value}")
        raise UsageError(f"{label}: {shown} is not between {option.least:.10g} and {option.most:.10g}")
    if option.kind is str:
        if not value.strip():
            raise UsageError(f"{label}: needs a value, got an empty text")
        if len(value) > LONGEST_TEXT:
            raise UsageError(f"{label}: {len(value):,} characters are more than the {LONGEST_TEXT:,} allowed")
        if option.choices and value not in option.choices:
            several = all(one.strip() in option.choices for one in str(value).split(","))
            raise UnknownNameError(label, value[:60], option.choices, "one at a time" if several else "")
        suffixes = tuple(option.suffix.split(" or "))
        if not value.endswith(suffixes) or (value and value in suffixes):
            raise UsageError(f"{label}: expected a file name that ends in {option.suffix}, got {value!r:.60}")
    return value


def _parts(value: str | tuple[Any, ...]) -> Sequence[Any]:
    """Several values, as a text with commas between them or as a tuple."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _read(option: Option, label: str, text: str) -> Any:
    """A text as the int, float or bool it spells exactly."""
    if option.kind is bool:
        if text.lower() not in _SWITCH:
            raise UsageError(f"{label}: expected true or false, got {text!r:.60}")
        return _SWITCH[text.lower()]
    pattern, expected = (_WHOLE, "a whole number") if option.kind is int else (_NUMBER, "a number")
    if not pattern.fullmatch(text):
        raise UsageError(
            f"{label}: expected {expected} between {option.least:.10g} and {option.most:.10g}, got {text!r:.60}"
        )
    if len(text) > 40:
        raise UsageError(
            f"{label}: {_short(text)} has {len(text)} digits; it must be between {option.least:.10g} "
            f"and {option.most:.10g}"
        )
    return option.kind(text)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}..."
