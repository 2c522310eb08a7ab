"""Traces from a description: `poisson:rate=2,n=500,prompt=lognormal(mean=512,sigma=1,max=8192),output=128`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from apex_opt.errors import UnknownNameError, UsageError, shown
from apex_opt.units import NS_PER_MS, NS_PER_S
from apex_opt.workload.columns import MAX_ARRIVAL_NS, MAX_REQUESTS, MAX_TOKENS, Ints
from apex_opt.workload.trace import RECORDED, Arrivals, Trace, make_trace, media_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

Floats: TypeAlias = npt.NDArray[np.float64]
_Range: TypeAlias = tuple[float, float]

EXAMPLES: Final = {
    "poisson": "poisson:rate=2,n=500,prompt=lognormal(mean=512,sigma=1,max=8192),output=128",
    "gamma": "gamma:rate=2,cv=3,n=500,prompt=512,output=exponential(mean=128,max=1024)",
    "uniform": "uniform:rate=2,n=500,prompt=uniform(100,900),output=128",
    "static": "static:n=500,prompt=512,output=normal(mean=128,std=30)",
    "closed": "closed:concurrency=16,n=500,prompt=512,output=128",
}
"""Every kind of description, with one that works."""

_OWN_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "poisson": ("rate",),
    "gamma": ("rate", "cv"),
    "uniform": ("rate",),
    "static": (),
    "closed": ("concurrency",),
}
_DEFAULTS: Final = {"n": "1000", "prompt": "512", "output": "128"}

_PIECE: Final = 16  # tokens of a content id: the block size engines use
_RATE: Final[_Range] = (1e-9, 1e9)
_CV: Final[_Range] = (0.01, 100.0)
_MAX_SEED: Final = (1 << 63) - 1

_NUMBER: Final = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE: Final = re.compile(r"[+-]?\d{1,40}", re.ASCII)
_LAW: Final = re.compile(r"(?P<name>[^()]*)\((?P<inside>[^()]*)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Law:
    """A law of lengths: required parameters with their range, those that are whole numbers, and its draw."""

    needs: Mapping[str, _Range]
    whole: tuple[str, ...] = ("max",)
    cut: bool = True
    draw: Callable[[np.random.Generator, int, Mapping[str, float]], Floats]


def _lognormal(rng: np.random.Generator, n: int, p: Mapping[str, float]) -> Floats:
    """E[X] = exp(mu + sigma**2 / 2), so that `mean` is the mean of the uncut law."""
    mu = np.log(p["mean"]) - p["sigma"] ** 2 / 2
    draws: Floats = np.exp(mu + p["sigma"] * rng.standard_normal(n))
    return draws


_TOKENS: Final[_Range] = (1, MAX_TOKENS)
_LAWS: Final = {
    "uniform": _Law(
        needs={"lo": _TOKENS, "hi": _TOKENS},
        whole=("lo", "hi"),
        cut=False,
        draw=lambda rng, n, p: rng.integers(int(p["lo"]), int(p["hi"]), n, endpoint=True).astype(np.float64),
    ),
    # Beyond sigma = 10 nearly every draw is below one token or beyond any context.
    "lognormal": _Law(needs={"mean": _TOKENS, "sigma": (0, 10)}, draw=_lognormal),
    "normal": _Law(
        needs={"mean": _TOKENS, "std": (0, MAX_TOKENS)},
        draw=lambda rng, n, p: p["mean"] + p["std"] * rng.standard_normal(n),
    ),
    "exponential": _Law(needs={"mean": _TOKENS}, draw=lambda rng, n, p: p["mean"] * rng.standard_exponential(n)),
}


_OPTIONAL: Final = ("max_new_tokens", "image_tokens", "audio_s", "prefix", "priority", "turns", "delay_ms", "seed")


def describe_trace(spec: str, seed: int = 0, changed: dict[str, str] | None = None) -> Trace:
    """The trace a description stands for; the same description and seed give the same trace.

    ========== ======================= ====================================================
    kind       required                arrivals
    ========== ======================= ====================================================
    poisson:   rate                    Poisson process, requests per second
    gamma:     rate, cv                gamma gaps with coefficient of variation cv (1 = Poisson)
    uniform:   rate                    equal gaps, the first request at 0
    static:                            all at 0
    closed:    concurrency             that many clients, each waiting for its answer
    ========== ======================= ====================================================

    Optional: n (1000), prompt (512), output (128), max_new_tokens, image_tokens (of every request, beside its prompt),
    audio_s (seconds of its recording), seed (overrides the argument). max_new_tokens is
    what the client states as the most tokens it takes, where outputs are cut; without it the output. Lengths are a
    whole number or a law: uniform(lo,hi), lognormal(mean,sigma[,max]), normal(mean,std[,max]),
    exponential(mean[,max]), with values in that order or by name. `mean` is that of the law before cutting; draws are
    rounded and cut to 1..max (10,000,000).

    prefix=(tokens,groups) makes prompts begin alike: each request belongs to one of so many groups, drawn uniformly,
    and the first tokens of its prompt (rounded down to whole pieces of 16, and at most all but one of it) are those of
    its group.

    priority is the share of requests that are of high priority, drawn for each.

    turns (a whole number or a law) makes sessions of so many requests: the arrivals are those of their first ones, each
    later one comes delay_ms (a whole number or a law, 0) after the answer before, and its prompt is all that was said
    before and prompt tokens more. The last session may end early, so that there are n requests.

    `changed` takes the place of keys of the description, such as {"rate": "20"}.

    Arrivals, prompts and outputs have their own random streams: the same seed at another rate gives the same
    requests, closer together, so that two rates can be compared without sampling noise.

    Parameters
    ----------
    spec : str                   the description
    seed : int                   of what is drawn
    changed : mapping or None    parts of the description that are replaced

    Raises
    ------
    UsageError                     form, number or range, with a description that works
    UnknownNameError               kind, key or law not known, with suggestions
    """
    if not isinstance(spec, str):
        raise UsageError(f"trace: expected a description such as {EXAMPLES['poisson']}, got {shown(spec)}")
    kind, colon, body = spec.strip().partition(":")
    if kind not in EXAMPLES:
        raise UnknownNameError("trace description", kind[:40], EXAMPLES, f"e.g. {EXAMPLES['poisson']}")
    ask = _Asker(spec=spec.strip(), kind=kind)
    if not colon:
        ask.refuse("a colon must follow the kind")
    needs = _OWN_KEYS[kind]
    given = ask.arguments(body, (*needs, *_DEFAULTS, *_OPTIONAL), "key", positional=False)
    for key in needs:
        if key not in given:
            ask.refuse(f"{key}= is missing")
    values = _DEFAULTS | given | (changed or {})
    n = int(ask.number("n", values["n"], (1, MAX_REQUESTS), whole=True))
    seed_text = values.get("seed", shown(seed))
    used_seed = int(ask.number("seed", seed_text, (0, _MAX_SEED), whole=True))
    streams = [np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(used_seed).spawn(8)]
    *streams, own, urgent, talk = streams
    concurrency, arrivals = None, RECORDED
    arrival = np.zeros(n, dtype=np.int64)
    if kind == "closed":
        concurrency = int(ask.number("concurrency", values["concurrency"], (1, MAX_REQUESTS), whole=True))
    elif kind != "static":
        arrival = _arrivals(ask, values, n, streams[0])
        cv = ask.number("cv", values["cv"], _CV) if kind == "gamma" else 1.0
        arrivals = Arrivals(kind=kind, cv=cv, law=ask.spec, seed=used_seed)  # type: ignore[arg-type]
    prompt = _lengths(ask, "prompt", values["prompt"], n, streams[1])
    images, audio_s = np.zeros_like(prompt), 0.0
    if "image_tokens" in values:
        images = _lengths(ask, "image_tokens", values["image_tokens"], n, own)
        prompt = prompt + images
    if "audio_s" in values:
        audio_s = ask.number("audio_s", values["audio_s"], (0.0, 86_400.0))
    output, stated = _lengths(ask, "output", values["output"], n, streams[2]), None
    if "max_new_tokens" in values:
        stated = _lengths(ask, "max_new_tokens", values["max_new_tokens"], n, streams[4])
        output = np.minimum(output, stated)
    if "turns" in values:
        return _sessions(ask, values, (arrival, prompt, output, stated), talk, used_seed)
    if "delay_ms" in values:
        ask.refuse("delay_ms= is of later turns: give turns= too")
    content = _shared_beginnings(ask, values["prefix"], prompt, streams[3]) if "prefix" in values else None
    priority = None
    if "priority" in values:
        share = ask.number("priority", values["priority"], (0.0, 1.0))
        priority = (urgent.random(n) < share).astype(np.int64)
    return make_trace(
        name=ask.spec,
        arrival_ns=arrival,
        prompt=prompt,
        output=output,
        max_new_tokens=stated,
        concurrency=concurrency,
        content=content,
        content_tokens=_PIECE if content is not None else 0,
        source=f"generated: {ask.spec}, seed {used_seed}",
        arrivals=arrivals,
        media=media_of(prompt, images, audio_s),
        priority=priority,
    )


def _sessions(
    ask: _Asker,
    values: Mapping[str, str],
    drawn: tuple[Ints, Ints, Ints, Ints | None],
    rng: np.random.Generator,
    seed: int,
) -> Trace:
    """Requests in sessions, of which each begins with all that was said before.

    Parameters
    ----------
    ask, values
    drawn : int64[n] each    arrivals of sessions, as many as there may be; tokens that each request adds, and of each
                             answer, and the most of it that its client states, or None
    rng, seed : of the sessions, and of all
    """
    if ask.kind == "closed" or {"prefix", "image_tokens", "audio_s", "priority"} & values.keys():
        ask.refuse("turns= goes with arrivals, and without prefix=, image_tokens=, audio_s= and priority=")
    arrival, said, output, stated = drawn
    n = len(said)
    session = np.repeat(np.arange(n), _lengths(ask, "turns", values["turns"], n, rng))[:n]
    delay_ms = np.zeros(n, np.int64)
    if values.get("delay_ms", "0") != "0":
        delay_ms = _lengths(ask, "delay_ms", values["delay_ms"], n, rng)
    later = np.concatenate(([False], session[1:] == session[:-1]))
    first = np.maximum.accumulate(np.where(later, 0, np.arange(n)))
    ends = np.cumsum(said + output)
    prompt = ends - output - (ends - said - output)[first]
    if int(prompt.max()) > MAX_TOKENS:
        ask.refuse(f"a session comes to {prompt.max():,} tokens, {MAX_TOKENS:,} is the limit: give fewer turns")
    delay_ns = np.where(later, delay_ms * NS_PER_MS, -1)
    waited = np.cumsum(np.maximum(delay_ns, 0))
    times = arrival[session] + waited - waited[first]
    _check_span(ask, float(times.max()))
    # Even numbers for the whole pieces of a session, an odd one for what a prompt leaves over.
    whole = prompt // _PIECE
    starts = np.concatenate(([0], np.cumsum(whole + 1)))
    content = [
        np.array([*range(2 * begin, 2 * (begin + count), 2), *([2 * row + 1] if rest else [])], np.int64)
        for row, (begin, count, rest) in enumerate(
            zip(starts[first].tolist(), whole.tolist(), (prompt % _PIECE).tolist(), strict=True)
        )
    ]
    return make_trace(
        name=ask.spec,
        arrival_ns=times,
        prompt=prompt,
        output=output,
        max_new_tokens=stated,
        content=content,
        content_tokens=_PIECE,
        source=f"generated: {ask.spec}, seed {seed}",
        session=session,
        delay_ns=delay_ns,
    )


def _shared_beginnings(ask: _Asker, text: str, prompt: Ints, rng: np.random.Generator) -> list[Ints]:
    """Content ids of prompts that begin like others of their group and go on by themselves."""
    match = re.fullmatch(r"\((\d{1,9}),(\d{1,9})\)", text)
    if match is None:
        ask.refuse(f"prefix={text[:40]} must be prefix=(TOKENS,GROUPS), such as prefix=(512,10)")
    tokens = int(ask.number("prefix tokens", match[1], _TOKENS, whole=True))
    groups = int(ask.number("prefix groups", match[2], (1, MAX_REQUESTS), whole=True))
    pieces = -(-prompt // _PIECE)
    shared = np.minimum(tokens, prompt - 1) // _PIECE
    group = rng.integers(0, groups, prompt.size)
    own = groups * (tokens // _PIECE) + np.concatenate(([0], np.cumsum(pieces)))
    return [
        np.concatenate((g * (tokens // _PIECE) + np.arange(s), o + np.arange(s, p)))
        for g, s, o, p in zip(group.tolist(), shared.tolist(), own.tolist(), pieces.tolist(), strict=False)
    ]


def _arrivals(ask: _Asker, values: Mapping[str, str], n: int, rng: np.random.Generator) -> Ints:
    """Arrival times in whole nanoseconds."""
    rate = ask.number("rate", values["rate"], _RATE)
    mean_gap_ns = NS_PER_S / rate
    if ask.kind == "uniform":
        # Not a sum of rounded gaps: the rate would drift.
        times: Floats = np.rint(np.arange(n) * mean_gap_ns)
        _check_span(ask, float(times[-1]))
        return times.astype(np.int64)
    if ask.kind == "poisson":
        gaps = rng.standard_exponential(n)
    else:
        cv = ask.number("cv", values["cv"], _CV)
        gaps = rng.standard_gamma(cv**-2, n) * cv**2
    gaps_ns = np.rint(gaps * mean_gap_ns)
    _check_span(ask, float(gaps_ns.sum()))
    times_ns: Ints = np.cumsum(gaps_ns.astype(np.int64))
    return times_ns


def _check_span(ask: _Asker, last_ns: float) -> None:
    """Refuse arrivals that a trace cannot hold; a little early, as the sum is in floating point."""
    if last_ns > MAX_ARRIVAL_NS * 0.999:
        last_s, limit_s = last_ns / NS_PER_S, MAX_ARRIVAL_NS / NS_PER_S
        ask.refuse(f"the last request would arrive after {last_s:.3g} s (limit {limit_s:.3g} s): raise rate or lower n")


def _lengths(ask: _Asker, key: str, text: str, n: int, rng: np.random.Generator) -> Ints:
    """Lengths in tokens by a fixed number or a law."""
    if "(" not in text and ")" not in text:
        if text in _LAWS:
            ask.refuse(f"{key}={text} needs parameters in parentheses: {_signature(text)}")
        return np.full(n, int(ask.number(key, text, _TOKENS, whole=True)), dtype=np.int64)
    match = _LAW.fullmatch(text)
    if match is None:
        ask.refuse(f"{key}={text} is not of the form law(parameters)")
    name = match["name"].strip()
    if name not in _LAWS:
        raise UnknownNameError("law of lengths", name[:40], _LAWS, f"e.g. {EXAMPLES[ask.kind]}")
    law = _LAWS[name]
    keys = (*law.needs, "max") if law.cut else tuple(law.needs)
    given = ask.arguments(match["inside"], keys, f"parameter of {name}", positional=True)
    for need in law.needs:
        if need not in given:
            ask.refuse(f"{key}={text} lacks {need}: {_signature(name)}")
    values = {
        part: ask.number(f"{key} {part}", value, law.needs.get(part, _TOKENS), whole=part in law.whole)
        for part, value in given.items()
    }
    most = values.get("max", MAX_TOKENS)
    if values.get("lo", 1) > values.get("hi", most) or values.get("mean", 1) > most:
        ask.refuse(f"{key}={text} is empty: lo must not exceed hi, nor mean max")
    return np.clip(np.rint(law.draw(rng, n, values)), 1, most).astype(np.int64)


def _signature(name: str) -> str:
    """How a law is written."""
    return f"{name}({','.join(_LAWS[name].needs)}{'[,max]' if _LAWS[name].cut else ''})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asker:
    """Reads parts of one description and refuses them in one voice."""

    spec: str
    kind: str

    def refuse(self, why: str) -> NoReturn:
        """Raise the usage error for this description."""
        raise UsageError(f"trace {_short(self.spec)!r}: {_short(why, 200)}; e.g. {EXAMPLES[self.kind]}")

    def arguments(self, text: str, keys: tuple[str, ...], what: str, *, positional: bool) -> dict[str, str]:
        """`key=value` pairs, or values in the order of `keys` before the first pair."""
        found: dict[str, str] = {}
        named = not positional
        for index, part in enumerate(self._split(text)):
            key, sign, value = (piece.strip() for piece in part.partition("="))
            if "(" in key or not sign:
                if named:
                    self.refuse(f"{part.strip()!r} is not of the form {what.split()[0]}=value")
                if index >= len(keys):
                    self.refuse(f"more than {len(keys)} parameters in {text!r}")
                key, value = keys[index], part.strip()
            else:
                named = True
            if key not in keys:
                raise UnknownNameError(what, key[:40], keys, f"e.g. {EXAMPLES[self.kind]}")
            if key in found:
                self.refuse(f"{key} is given twice")
            if not value:
                self.refuse(f"{key} has no value")
            found[key] = value
        return found

    def _split(self, text: str) -> Iterable[str]:
        """Parts between the commas that are outside parentheses."""
        depth = 0
        parts = [""]
        for char in text:
            depth += {"(": 1, ")": -1}.get(char, 0)
            if depth < 0:
                self.refuse("a parenthesis closes that was not opened")
            if char == "," and not depth:
                parts.append("")
            else:
                parts[-1] += char
        if depth:
            self.refuse("a parenthesis is not closed")
        if not text.strip():
            return []
        if any(not part.strip() for part in parts):
            self.refuse("nothing stands between two commas or at an end")
        return parts

    def number(self, label: str, text: str, allowed: _Range, *, whole: bool = False) -> float:
        """A number in a closed range; text such as nan, inf, 1_000 or 1k is refused."""
        low, high = allowed
        if (_WHOLE if whole else _NUMBER).fullmatch(text) is None or not low <= (int if whole else float)(text) <= high:
            limits = f"{low:,} to {high:,}" if whole else f"{low:g} to {high:g}"
            self.refuse(f"{label} must be a {'whole ' if whole else ''}number from {limits}, got {_short(text, 40)}")
        return int(text) if whole else float(text)


def _short(text: str, most: int = 100) -> str:
    """Text cut for one line of a message."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."
