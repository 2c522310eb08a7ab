"""The commands as the command line has them: how their answers are shown, and what their help says with examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apex_opt import api, commands
from apex_opt.arguments import StudyAsk
from apex_opt.gate import Arguments, Option, options_of
from apex_opt.shown import Drawn, Front, General, Judged, Placed, Scored, Sourced, Started

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXTS: Final[Mapping[str, tuple[type[General], str]]] = {
    "plan": (
        Started,
        "For example:\n\n"
        "  solve.py plan --model=llama-3.1-70b --cluster=8xh100-sxm --trace=chat\n"
        '  solve.py plan --slo="ttft_p95<=500ms,tpot_p95<=50ms" --objective=energy\n'
        "  solve.py plan --model=./config.json --weights=bf16,fp8 --format=json\n\n"
        "Exit code: 0 with a plan, 3 where none is feasible, 2 for bad input.",
    ),
    "energy": (
        Started,
        "Over plans, numbers of GPUs, formats, limits of a batch and clocks; the plan with the best latency "
        "within the same goals is shown beside it. For example:\n\n"
        '  solve.py energy --slo="ttft_p95<=500ms,tpot_p95<=50ms" --weights=bf16,fp8\n'
        '  solve.py energy --slo="e2e_p95<=30s" --clock=1200,1600,1980\n\n'
        "Exit code: 0 with a plan, 3 where none is feasible, 2 for bad input.",
    ),
    "pareto": (
        Front,
        "For example:\n\n"
        "  solve.py pareto --objective=e2e_mean,energy\n"
        '  solve.py pareto --objective=ttft_p95,tpot_p95,energy --slo="e2e_p95<=30s" --plot=front.png\n\n'
        "The front is exact: a plan is left out only where another is proved to beat it. Exit code: 0 with a front, 3 "
        "where no plan is feasible, 2 for bad input.",
    ),
    "explain": (
        Sourced,
        "For example:\n\n"
        "  solve.py explain --model=llama-3.1-70b --cluster=1xh100-sxm\n"
        '  solve.py explain --slo="ttft_p95<=60ms"\n'
        '  solve.py explain --plan="dp2 tp4"\n\n'
        "Where nothing fits: the fewest constraints that clash, with numbers, and the cheapest changes that were "
        "solved and found feasible. Exit code: 0 where a plan fits, 3 where none does, 2 for bad input.",
    ),
    "simulate": (
        Scored,
        "For example:\n\n"
        '  solve.py simulate --plan=tp8 --trace="poisson:rate=8,n=2000"\n'
        '  solve.py simulate --plan="dp2 attn(tp4) ffn(tp4) fp8" --slo="tpot_p95<=30ms"\n'
        '  solve.py simulate --plan=tp8 --plan="dp2 tp4"\n\n'
        "Of several plans it says where time, energy and memory differ. Exit code: 0 with the figures, goals met or "
        "not; 3 where no plan can run; 2 for bad input.",
    ),
    "place": (
        Placed,
        "For example:\n\n"
        '  solve.py place --plan="dp2 tp8" --cluster=4xdgx-h100 --busy="node0:0-3,node1:5"\n'
        "  solve.py place --plan=tp4 --cluster=server-8xl40s --model=llama-3.1-8b --within=socket\n"
        '  solve.py place --plan="dp2 tp4" --lose=node0:3 --rankfile=ranks.txt\n\n'
        "No other placement is better, which is proven. Exit code: 0 with a placement, 3 where the plan does not fit, "
        "2 for bad input.",
    ),
    "capacity": (
        Started,
        "For example:\n\n"
        '  solve.py capacity --slo="ttft_p95<=500ms,tpot_p95<=50ms"\n'
        '  solve.py capacity --slo="ttft_p95<=500ms,tpot_p95<=50ms" --rate=4\n'
        '  solve.py capacity --plan=tp8 --slo="tpot<=50ms@99%" --resolution=0.01\n\n'
        "A rate is judged by the trace repeated, until the answer no longer depends on how long it runs: lengths in "
        "their order, arrivals drawn anew (looped where recorded). Exit code: 0 with a rate or a plan, 3 where no plan "
        "meets the goals, 2 for bad input.",
    ),
    "study": (
        General,
        "For example:\n\n"
        "  solve.py study study.toml --dry_run\n"
        "  solve.py study study.toml --workers=8\n"
        "  solve.py study study.toml --ray=10.0.0.1:6379 --target=results --format=csv\n\n"
        "The same command again goes on where it was. Exit code: 0 with an answer at any point, 3 where none has one, "
        "2 for bad input.",
    ),
    "validate": (
        Judged,
        "For example:\n\n"
        "  solve.py validate --measured=runs/llama-3.1-8b.json.gz\n"
        "  solve.py validate --measured=runs --format=json\n"
        "  solve.py validate --measured=runs --plot=errors.png\n"
        "  solve.py validate --measured=result.json --plan=tp1 --model=llama-3.1-8b --cluster=1xh200-sxm\n\n"
        "Exit code: 0 where a run was predicted, 3 where none could be, 2 for bad input.",
    ),
    "calibrate": (
        General,
        "For example:\n\n"
        "  solve.py calibrate --measured=a.json --model=llama-3.1-8b --cluster=1xh200-sxm --plan=tp1 --out=m.toml\n"
        "  solve.py plan --engine=m.toml\n"
        "  solve.py calibrate --hold=conv,lmsys\n\n"
        "Takes what vllm bench serve, sglang.bench_serving, guidellm and aiperf save, one load or better several. "
        "Times that the runs cannot tell stay as they were, with the reason. Exit code: 0 with times that are nearer, "
        "3 where a fit brings nothing and nothing is written, 2 for bad input.",
    ),
    "profile show": (
        General,
        "For example:\n\n"
        "  solve.py profile show\n"
        "  solve.py profile show --gpu=h200-sxm\n\n"
        "Every table is read and checked. Exit code: 0, or 2 where one is faulty.",
    ),
    "profile distill": (
        General,
        "For example:\n\n"
        "  pip install 'apex-opt[distill]'\n"
        "  solve.py profile distill --target=profiles\n\n"
        "Rows that cannot be believed are dropped, those that follow from their neighbours left out; both are counted, "
        "with the error that makes. Equal input gives equal files. Exit code: 0, or 2 without the package or pyarrow.",
    ),
    "profile import": (
        General,
        "For example:\n\n"
        "  solve.py profile import --kind=apex --source=apex_plus --gpu=h100-sxm\n"
        "  solve.py profile import --kind=vidur --source=vidur/data/profiling --gpu=a100-sxm\n"
        "  solve.py plan --profiles=profiles --cluster=8xa100-sxm\n\n"
        "Exit code: 0 with a folder written, 2 for files that are no such tables.",
    ),
    "profile collect": (
        General,
        "For example:\n\n"
        "  solve.py profile collect --quick\n"
        "  solve.py profile collect --ops=gemm,attention --target=profiles\n"
        "  solve.py plan --profiles=profiles\n\n"
        "Needs torch with CUDA; takes vLLM's kernels where vllm is installed, else torch's own, and reads the energy "
        "counter where pynvml is. Experts, windows and states need vllm, and are named where it is missing. Estimated "
        "to take an hour, with --quick five minutes, much of it compiling. Exit code: 0 with a folder "
        "written, 2 without a GPU or torch.",
    ),
    "profile fit": (
        General,
        "For example:\n\n"
        "  solve.py profile fit --measured=runs\n"
        "  solve.py profile fit --measured=runs/sglang.csv --engine=sglang --format=json\n\n"
        "Prints the engine's own time for its file with the errors before and after, and the power table for the card "
        "of each GPU whose runs have energies. Writes no file. Every run is simulated some sixty times. "
        "Exit code: 0, or 2 where no run of the engine can be predicted.",
    ),
    "cluster show": (
        Drawn,
        "For example:\n\n"
        "  solve.py cluster show --cluster=2xdgx-h100\n"
        '  solve.py cluster show --cluster=mine.toml --busy="node0:0-3,node2:1" --down=node1\n'
        "  solve.py cluster show --cluster=server-8xl40s --plot=wiring.svg\n\n"
        "Presets: cloud-8xa100, cloud-8xh100, cloud-8xl40s, dgx-a100, dgx-b200, dgx-b300, dgx-h100, dgx-h200, "
        "nvl72-gb200, server-4xv100, server-8xl40s. Exit code: 0, or 2 for bad input.",
    ),
    "cluster import": (
        General,
        "For example:\n\n"
        "  nvidia-smi topo -m > topo.txt\n"
        "  solve.py cluster import --source=topo.txt --gpu=h100-sxm --target=mine.toml\n"
        "  solve.py cluster show --cluster=mine.toml\n\n"
        "A list has a line NAME GPUS TYPE for every node, as in 'worker-1 8 dgx-h100'; the type is a GPU or a preset. "
        "Exit code: 0, or 2 for bad input.",
    ),
    "models": (
        General,
        "For example:\n\n"
        "  solve.py models\n"
        "  solve.py models --supports=checkpoints/mine/config.json\n\n"
        "Exit code: 0, or 3 for a configuration that is not read.",
    ),
    "clusters": (General, ""),
    "traces": (General, ""),
}
"""Of every command how its answer is shown, and what its help says with examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command: what it does in a line, more on it with examples, its arguments and how its answer is shown."""

    summary: str
    text: str
    asks: type[Arguments]
    shown: type[General]

    @property
    def options(self) -> tuple[Option, ...]:
        """All that may be given."""
        return *options_of(self.asks), *options_of(self.shown)

    @property
    def place(self) -> str | None:
        """The option whose value may be given alone, as in `study study.toml`."""
        return "study" if self.asks is StudyAsk else None

    def option(self, name: str) -> Option:
        """The option of this name."""
        return next(option for option in self.options if option.name == name)


COMMANDS: Final[Mapping[str, Command]] = {
    name: Command(
        summary=(getattr(api, name.replace(" ", "_")).__doc__ or "").partition("\n")[0],
        text=text,
        asks=commands.COMMANDS[name].asks,
        shown=shown,
    )
    for name, (shown, text) in _TEXTS.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Commands that share their first word: what they are about in a line, more on it with examples."""

    summary: str
    text: str


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
