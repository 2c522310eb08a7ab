"""A parallel execution plan, and its text form.

``dp2 pp2 attn(tp4) ffn(ep4) fp8 kv=fp8`` reads: two replicas of the whole model; each a pipeline of two stages; in
each stage attention is cut over 4 GPUs by heads, the FFN over the same 4 by experts; weights in fp8, KV cache in fp8.
Factors of one are left out (`attn(tp1)` stands for an uncut cell), layers are split as evenly as can be with the
larger stages first unless `pp2[41,39]` says otherwise, and the KV format is left out where it is the default. GPUs run
at their highest clock unless `clock=1200` says at how many MHz; `seqs=256` and `tokens=2048` limit the sequences and
the tokens of a batch where they are not the engine's; `spec=eagle:3` verifies three drafts of EAGLE with every token,
`spec=none` none;
`share=80/100` computes prompts and answers side by side, on so many per cent of each GPU; `overlap=two_batches` splits
a forward into two halves, one of which computes while the other sends; `route=least_loaded` says which router stands
before several replicas.
`on=h100-sxm-80gb:3+a100-sxm-80gb:1` puts the first three of four stages on one type of GPU and the last on another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from apex_opt.engines.overlap import OVERLAPS
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.ir.checks import shown
from apex_opt.ir.formats import FORMATS, KV_BYTES, get_format, is_format
from apex_opt.plans.routing import ROUTINGS
from apex_opt.plans.shares import Shares, parse_shares
from apex_opt.plans.speculation import Drafter, parse_drafter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.engines.overlap import Overlap
    from apex_opt.ir.model import Model
    from apex_opt.plans.routing import Routing

LARGEST_DEGREE: Final = 1 << 20


def _is_degree(value: object) -> bool:
    """A whole number that a degree of parallelism or a stage's layers can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_DEGREE


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Template:
    """How one cell is cut over the devices of a stage.

    `dp` copies of the cell, each serving its share of the sequences; within a copy the experts go to `ep` groups, and
    every head group, FFN or expert is cut into `tp` shards. A dense FFN beside experts, in another layer or shared, is
    cut over both.
    """

    dp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "ep"):
            value = getattr(self, name)
            if not _is_degree(value):
                raise UsageError(f"{name}: {shown(value)} is not a whole number from 1 to {LARGEST_DEGREE}")

    @property
    def devices(self) -> int:
        """Devices one stage needs for this cell."""
        return self.dp * self.tp * self.ep

    def __str__(self) -> str:
        factors = [f"{name}{getattr(self, name)}" for name in ("dp", "tp", "ep") if getattr(self, name) > 1]
        return ",".join(factors) or "tp1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Replicas x pipeline stages x a template per cell x number formats.

    Parameters
    ----------
    replicas : int                 engines with their own scheduler and a whole copy of the model
    layers : tuple of int          layers of each pipeline stage, all >= 1
    attention, ffn : Template      both over the same devices of a stage; attention has no ep
    weight_format : str            name of a number format
    kv_format : str                key of `KV_BYTES`
    clock_mhz : int or None        clock the GPUs are held at; None leaves them at the highest
    max_num_seqs, max_num_batched_tokens : int or None      limits of a batch; None leaves them to the engine's settings
    speculation : Drafter or None  how drafts are made; None: none are
    route : Routing or None        router in front of several replicas; None leaves it to what is asked
    shares : Shares or None        what prompts and answers have of each GPU, side by side; None: batches hold both
    overlap : str or None          what one GPU does at a time, of `OVERLAPS`; None: one thing after the other
    on : tuple of (str, int)       types of GPU of consecutive stages, each with how many; () where all are of one type

    Raises
    ------
    UsageError    degrees out of range, cells over different numbers of devices, unknown formats
    """

    replicas: int
    layers: tuple[int, ...]
    attention: Template
    ffn: Template
    weight_format: str
    kv_format: str
    clock_mhz: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    speculation: Drafter | None = None
    route: Routing | None = None
    shares: Shares | None = None
    overlap: Overlap | None = None
    on: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not _is_degree(self.replicas):
            raise UsageError(f"dp: {shown(self.replicas)} replicas is not a whole number from 1 to {LARGEST_DEGREE}")
        if not self.layers or not all(map(_is_degree, set(self.layers))):
            raise UsageError(f"pp: every stage needs at least one layer, got {shown(list(self.layers))}")
        if self.attention.ep != 1:
            raise UsageError(f"attn: ep{self.attention.ep} makes no sense; only an FFN has experts")
        if self.attention.devices != self.ffn.devices:
            raise UsageError(
                f"attn({self.attention}) takes {self.attention.devices} GPUs of a stage and ffn({self.ffn}) "
                f"{self.ffn.devices}; both cells of a stage live on the same GPUs"
            )
        if not is_format(self.weight_format):
            raise UsageError(_unknown_format(self.weight_format))
        if self.kv_format not in KV_BYTES:
            raise UsageError(f"unknown KV format {self.kv_format!r}; known: {', '.join(KV_BYTES)}")
        if self.route is not None and self.route not in ROUTINGS:
            raise UsageError(f"unknown router {self.route!r:.60}; known: {', '.join(ROUTINGS)}")
        if self.overlap is not None and self.overlap not in OVERLAPS:
            raise UnknownNameError("overlap", str(self.overlap)[:60], ("none", *OVERLAPS), alike=False)
        limits = (("clock", self.clock_mhz), ("seqs", self.max_num_seqs), ("tokens", self.max_num_batched_tokens))
        for name, value in limits:
            if value is not None and not _is_degree(value):
                raise UsageError(f"{name}: {shown(value)} is not a whole number from 1 to {LARGEST_DEGREE}")

        if self.on and sum(stages for _, stages in self.on) != self.stages:
            counts = " + ".join(str(stages) for _, stages in self.on)
            raise UsageError(f"on: {counts} stages on types of GPU, and the plan has {self.stages}")

    @property
    def stages(self) -> int:
        return len(self.layers)

    @property
    def stage_devices(self) -> int:
        """GPUs of one stage of one replica."""
        return self.attention.devices

    @property
    def devices(self) -> int:
        """GPUs the whole plan takes."""
        return self.replicas * self.stages * self.stage_devices

    @property
    def cut(self) -> tuple[int | str, ...]:
        """Of stages all but layers: cells, formats, clock and limits (0: None), drafts, shares, overlap, GPUs."""
        attention, ffn = self.attention, self.ffn
        cells = attention.dp, attention.tp, ffn.dp, ffn.tp, ffn.ep
        limits = self.clock_mhz or 0, self.max_num_seqs or 0, self.max_num_batched_tokens or 0
        drafts = () if self.speculation is None else (str(self.speculation),)
        shares = () if self.shares is None else (str(self.shares),)
        types = (part for own in self.on for part in own)
        overlap = () if self.overlap is None else (self.overlap,)
        return *cells, self.weight_format, self.kv_format, *limits, *drafts, *shares, *overlap, *types

    def times(self, replicas: int) -> Plan:
        """The same with another number of replicas."""
        return self if replicas == self.replicas else replace(self, replicas=replicas)

    @property
    def even(self) -> bool:
        """Whether layers are split as evenly as can be."""
        return self.layers == even_split(sum(self.layers), self.stages)

    def __str__(self) -> str:
        words = []
        if self.replicas > 1:
            words.append(f"dp{self.replicas}")
        if self.stages > 1:
            words.append(f"pp{self.stages}" + ("" if self.even else f"[{','.join(map(str, self.layers))}]"))
        words += [f"attn({self.attention})", f"ffn({self.ffn})", self.weight_format]
        if self.kv_format != default_kv_format(self.weight_format):
            words.append(f"kv={self.kv_format}")
        limits = (("seqs", self.max_num_seqs), ("tokens", self.max_num_batched_tokens), ("clock", self.clock_mhz))
        words += [f"{name}={value}" for name, value in limits if value is not None]
        if self.speculation is not None:
            words.append(f"spec={self.speculation}")
        if self.shares is not None:
            words.append(f"share={self.shares}")
        if self.overlap is not None:
            words.append(f"overlap={self.overlap}")
        if self.route is not None and self.replicas > 1:
            words.append(f"route={self.route}")
        if self.on:
            words.append("on=" + "+".join(f"{name}:{stages}" for name, stages in self.on))
        return " ".join(words)


def repeated(cut: Plan, most: int, routings: Sequence[Routing]) -> list[tuple[Plan, range]]:
    """The numbers of replicas of a cut that find room, with each router that there is to choose from.

    Parameters
    ----------
    cut : Plan    of one replica
    most : int    replicas that find room
    routings : routers to choose from, of which one replica needs none; none where there is no choice

    Returns
    -------
    list of (Plan, range)    the cut, which names its router, and the numbers of replicas
    """
    if not routings:
        return [(cut, range(1, most + 1))] if most else []
    alone = [(cut, range(1, 2))] if most else []
    several = [(replace(cut, route=name), range(2, most + 1)) for name in routings] if most > 1 else []
    return alone + several


def even_split(layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as can be, larger stages first: the last one also holds the LM head.

    Raises
    ------
    UsageError    more stages than layers
    """
    if not 1 <= stages <= layers:
        raise UsageError(f"pp{stages}: {layers} layers make 1 to {layers} stages")
    base, more = divmod(layers, stages)
    return (base + 1,) * more + (base,) * (stages - more)


def default_kv_format(weight_format: str) -> str:
    """KV format where nothing else is asked for: 16 bit, of the kind the weights are computed in."""
    return "fp16" if weight_format == "fp16" else "bf16"


def foreign_mix(weight_format: str, model: Model) -> str | None:
    """Why a model cannot be held in a mix of formats: only its own checkpoint says which matrices are in which."""
    if not is_format(weight_format) or not get_format(weight_format).mixed or weight_format == model.weight_format:
        return None
    return f"{weight_format} is a mix that only its own checkpoint has; {model.name} is in {model.weight_format}"


_WORD: Final = re.compile(
    r"(?P<dp>dp(?P<dp_n>\d+))"
    r"|pp(?P<pp_n>\d+)(?:\[(?P<split>\d+(?:,\d+)*)\])?"
    r"|(?P<cell>attn|ffn)\((?P<inside>[^()]*)\)"
    r"|kv=(?P<kv>\w+)"
    r"|on=(?P<on>[A-Za-z0-9](?u:[\w.-])*:\d{1,7}(?:\+[A-Za-z0-9](?u:[\w.-])*:\d{1,7})*)"
    r"|spec=(?P<spec>[^\s=]+)"
    r"|route=(?P<route>[^\s=]+)"
    r"|share=(?P<share>[^\s=]+)"
    r"|overlap=(?P<overlap>[^\s=]+)"
    r"|(?P<limit>clock|seqs|tokens)=(?P<limit_n>\d+)"
    r"|(?P<short>(?:tp|ep)\d+)"
    r"|(?P<format>\w+(?:\+\w+)*)",
    re.ASCII,
)
_FACTOR: Final = re.compile(r"(dp|tp|ep)(\d+)", re.ASCII)
EXAMPLE: Final = "dp2 pp2 attn(tp4) ffn(tp4) bf16"


def parse_plan(text: str, model: Model, example: str = EXAMPLE) -> Plan:
    """Read the text form of a plan.

    Parameters
    ----------
    text : words in any order; `tp4` alone cuts both cells, `ep4` alone cuts attention by heads and the FFN by
        experts; weights and KV default to the model's own formats, KV beside named weights to that of the weights
    model : Model     its layers are split over the stages
    example : str     what a refusal shows: of a deployment, where the plan is a part of one

    Raises
    ------
    UsageError    anything unreadable, contradictory or out of range, with an example
    """
    found: dict[str, str] = {}
    cells: dict[str, Template] = {}
    for word in text.replace(", ", ",").split():
        match = _WORD.fullmatch(word)
        if match is None:
            raise UsageError(f"plan {text!r}: cannot read {word!r}; an example: {example}")
        kind = match.lastgroup
        if kind == "dp" or match["dp_n"]:
            _once(found, "dp", match["dp_n"], text)
        elif match["pp_n"]:
            _once(found, "pp", match["pp_n"], text)
            if match["split"] is not None:
                found["split"] = match["split"]
        elif match["cell"]:
            _once(found, match["cell"], match["inside"], text)
            cells[match["cell"]] = _template(match["inside"], text, example)
        elif kind in ("kv", "on", "spec", "share", "overlap", "route"):
            _once(found, kind, match[kind], text)
        elif match["limit"]:
            _once(found, match["limit"], match["limit_n"], text)
        elif match["short"]:
            degree = _template(match["short"], text, example)
            if "short" in found and found["short"][:2] != word[:2]:
                raise UsageError(
                    f"plan {text!r:.100}: {found['short']} alone cuts both cells already, so {word} cannot stand "
                    "beside it; say what cuts which, such as: attn(tp8) ffn(tp4,ep2)"
                )
            _once(found, "attn", word, text)
            _once(found, "ffn", word, text)
            found["short"] = word
            cells = {"attn": Template(tp=degree.tp * degree.ep), "ffn": degree}
        else:
            _check_word(word, found.get("format"), text, example)
            _once(found, "format", match["format"].lower(), text)
    weight_format = found.get("format", model.weight_format)
    if not is_format(weight_format):
        raise UsageError(f"plan {text!r}: {_unknown_format(weight_format)}; an example: {example}")
    if fault := foreign_mix(weight_format, model):
        raise UsageError(f"plan {text!r}: {fault}")
    kv_format = default_kv_format(weight_format)
    if "format" not in found:
        kv_format = model.kv_format or kv_format
    attention = cells.get("attn")
    ffn = cells.get("ffn")
    if attention is None or ffn is None:
        both = attention or ffn
        if both is not None:
            raise UsageError(f"plan {text!r}: give both attn(...) and ffn(...); an example: {example}")
        attention = ffn = Template()
    return Plan(
        replicas=_number(found.get("dp", "1"), text),
        layers=_layers(found, model, text),
        attention=attention,
        ffn=ffn,
        weight_format=weight_format,
        kv_format=found.get("kv", kv_format).lower(),
        clock_mhz=_limit(found, "clock", text),
        max_num_seqs=_limit(found, "seqs", text),
        max_num_batched_tokens=_limit(found, "tokens", text),
        speculation=None if found.get("spec", "none").lower() == "none" else parse_drafter(found["spec"]),
        route=_router(found, text) if "route" in found else None,
        shares=parse_shares(found["share"]) if "share" in found else None,
        overlap=_overlap(found.get("overlap", "none")),
        on=tuple((name, int(n)) for name, n in (part.split(":") for part in found.get("on", "").split("+") if part)),
    )


def _unknown_format(name: str) -> str:
    return f"unknown weight format {name!r}; known: {', '.join(FORMATS)}"


def _check_word(word: str, before: str | None, text: str, example: str) -> None:
    """Whether a word may be a format; where there are several, which cannot be one.

    Parameters
    ----------
    word : str
    before : str or None    the format that was read before
    text, example : str     of the plan, and of another

    Raises
    ------
    UsageError
    """
    if word.lower() in ("prefill", "decode"):
        such = "prefill{dp2 tp2 bf16} + decode{tp4 bf16}"
        raise UsageError(f"plan {text!r:.100}: {word} has its plan in braces; such as: {such}")
    wrong = [one for one in (before, word.lower()) if one is not None and not is_format(one)]
    if before is not None and wrong:
        raise UsageError(
            f"plan {text!r:.100}: cannot read {wrong[0]!r:.60}, which is neither a degree, as tp8, nor a format; an "
            f"example: {example}"
        )


def _once(found: dict[str, str], key: str, value: str, text: str) -> None:
    if key in found:
        raise UsageError(f"plan {text!r}: {key} is given twice")
    found[key] = value


def _number(digits: str, text: str) -> int:
    if len(digits) > 7:
        raise UsageError(f"plan {text!r}: {digits} is above the limit of {LARGEST_DEGREE}")
    return int(digits)


def _limit(found: dict[str, str], name: str, text: str) -> int | None:
    return _number(found[name], text) if name in found else None


def _overlap(name: str) -> Overlap | None:
    return None if name.lower() == "none" else name.lower()  # type: ignore[return-value]  # the plan looks at it


def _router(found: dict[str, str], text: str) -> Routing:
    if "/" in found["route"]:
        raise UsageError(
            f"plan {text!r:.100}: route={found['route']:.60} is of prefill and decode instances, behind the braces of "
            "prefill{...} + decode{...}; give one router"
        )
    if _number(found.get("dp", "1"), text) == 1:
        raise UsageError(
            f"plan {text!r}: route={found['route']} is of several replicas, and the plan has one; leave it out"
        )
    if (name := found["route"].lower()) not in ROUTINGS:
        raise UsageError(f"plan {text!r:.100}: unknown router {name!r:.60}; known: {', '.join(ROUTINGS)}")
    return name


def _template(inside: str, text: str, example: str) -> Template:
    factors: dict[str, int] = {}
    for part in filter(None, re.split(r"[,\s]+", inside)):
        match = _FACTOR.fullmatch(part)
        if match is None or match[1] in factors:
            raise UsageError(f"plan {text!r}: cannot read {part!r} in ({inside}); an example: {example}")
        factors[match[1]] = _number(match[2], text)
    return Template(**factors)


def _layers(found: dict[str, str], model: Model, text: str) -> tuple[int, ...]:
    stages = _number(found.get("pp", "1"), text)
    if "split" not in found:
        return even_split(model.layers, stages)
    layers = tuple(_number(n, text) for n in found["split"].split(","))
    if len(layers) != stages or sum(layers) != model.layers:
        raise UsageError(
            f"plan {text!r}: pp{stages}[...] needs {stages} numbers that add up to the {model.layers} layers of "
            f"{model.name}, got {list(layers)}"
        )
    return layers
