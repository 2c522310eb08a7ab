"""A trace: when each request arrives, how long its prompt is and how many tokens it generates."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from apex_opt.errors import InputError, UsageError, join_faults, shown
from apex_opt.units import NS_PER_S
from apex_opt.workload.columns import (
    LABELS,
    MAX_ARRIVAL_NS,
    MAX_PAUSE_NS,
    MAX_REQUESTS,
    MAX_TOKENS,
    Ints,
    check_count,
    check_layout,
    check_pieces,
    check_sizes,
    row_faults,
    to_int64,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

PRIORITIES: Final = ("normal", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How the requests of a trace come, so that more of them can be made (`apex_opt.workload.steady`).

    Parameters
    ----------
    kind : "recorded" (times as they are), "poisson", "gamma", "uniform" (drawn), or "unknown": the trace has lengths
        alone, and its times mean nothing
    cv : float             coefficient of variation of gamma gaps
    law : str or None      description that requests of the same kind can be drawn from (`describe_trace`)
    seed : int             what the trace was drawn with; more of it is drawn with others
    """

    kind: Literal["recorded", "poisson", "gamma", "uniform", "unknown"] = "recorded"
    cv: float = 1.0
    law: str | None = None
    seed: int = 0


class Media(NamedTuple):
    """What requests hold beside text.

    Parameters
    ----------
    image_tokens : float    mean tokens of images of the requests that have some; they are counted in the prompts
    image_share : float     share that these have of the tokens of all prompts
    audio_s : float         seconds of the longest recording
    """

    image_tokens: float = 0.0
    image_share: float = 0.0
    audio_s: float = 0.0


TEXT: Final = Media()
RECORDED: Final = Arrivals()
UNKNOWN: Final = Arrivals(kind="unknown")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in order of arrival; `make_trace` sorts and freezes the arrays.

    Parameters
    ----------
    name : str                     what reports call it
    arrival_ns : int64[n]          non-decreasing, 0 to 2**61 ns (`MAX_ARRIVAL_NS`); the first may be later than 0
    prompt : int64[n]              tokens, 1 to 10,000,000
    output : int64[n]              tokens generated, the first included, 1 to 10,000,000
    max_new_tokens : int64[n] or None    tokens that the client states as the most it takes, output to 10,000,000, which
                                   some engines reserve room for; None: the output
    concurrency : int or None      closed loop: this many clients, each sending its next request once the last is
                                   answered; arrivals are then all 0 and ignored. None: requests come on their own.
    pause_ns : int                 from an answer to the next request of the same client, in a closed loop
    content : int64[total] or None what the prompts say: an id per piece of `content_tokens` tokens, equal ids for equal
                                   pieces; the last piece of a prompt may be cut short. None: nothing is shared.
    content_starts : int64[n + 1] or None    request i has the pieces from content_starts[i] to content_starts[i + 1]
    content_tokens : int           tokens in a piece; 0 without content
    source : str                   "file ..." or "generated: law, seed"
    arrivals : Arrivals            how they come
    notes : tuple of str           what an answer on it has to tell, such as rows that were left out; a sentence each,
                                   without the full stop
    media : Media                  images and recordings that come with the prompts
    session : int64[n] or None     the conversation that each request is of, as a number; None: not told
    priority : int64[n] or None    `PRIORITIES` of the requests, by their place; None: all are normal
    delay_ns : int64[n] or None    from the last answer of its session to a request that waits for it, whose arrival is
                                   then the earliest that there can be; -1 of those that come on their own
    content_fault : str            why what the prompts say could not be read, as an error says it; "" where it could,
                                   or where there is nothing to read
    unread : tuple of str          columns of its file from which nothing is read, of a trace without arrivals

    Raises
    ------
    InputError                     no requests, arrays of another type, values out of range or content that does not
                                   fit the prompts (with their rows)
    """

    name: str
    arrival_ns: Ints
    prompt: Ints
    output: Ints
    max_new_tokens: Ints | None = None
    concurrency: int | None = None
    pause_ns: int = 0
    content: Ints | None = None
    content_starts: Ints | None = None
    content_tokens: int = 0
    source: str = ""
    notes: tuple[str, ...] = ()
    arrivals: Arrivals = RECORDED
    media: Media = TEXT
    session: Ints | None = None
    priority: Ints | None = None
    delay_ns: Ints | None = None
    content_fault: str = ""
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a trace needs a name as text, got {shown(self.name)}")
        columns = [self.arrival_ns, self.prompt, self.output]
        if self.max_new_tokens is not None:
            columns.append(self.max_new_tokens)
        for label, column in zip(LABELS, columns, strict=False):
            check_layout(f"trace {self.name}", label, column)
        check_sizes(self.name, columns)
        if faults := row_faults(columns):
            raise join_faults(f"trace {self.name}", faults)
        self._check_content()
        for label, its in (("session", self.session), ("priority", self.priority), ("delay_ns", self.delay_ns)):
            if its is not None:
                check_layout(f"trace {self.name}", label, its)
                if its.size != len(self):
                    raise InputError(f"trace {self.name}: {its.size} {label} values for {len(self)} requests")
        if self.priority is not None and not np.isin(self.priority, range(len(PRIORITIES))).all():
            raise InputError(f"trace {self.name}: priorities are 0 (normal) and 1 (high)")
        if self.delay_ns is not None:
            self._check_delays()
        later = np.flatnonzero(np.diff(self.arrival_ns) < 0)
        if later.size:
            raise InputError(f"trace {self.name}: row {later[0] + 2} arrives before row {later[0] + 1}; use make_trace")
        if self.pause_ns and (self.concurrency is None or not 0 <= self.pause_ns <= MAX_PAUSE_NS):
            raise InputError(
                f"trace {self.name}: a pause of {self.pause_ns} ns is not from 0 to {MAX_PAUSE_NS} in a closed loop"
            )
        if self.concurrency is not None:
            check_count("concurrency", self.concurrency, MAX_REQUESTS, f"trace {self.name}")
            if self.arrival_ns.any():
                raise InputError(f"trace {self.name}: a closed loop has arrival times of 0; use make_trace")

    def _check_delays(self) -> None:
        """A request before it for each that waits, and arrivals that are not to be waited for as well."""
        assert self.delay_ns is not None
        if self.concurrency is not None:
            raise InputError(f"trace {self.name}: requests wait for answers of their sessions or of clients, not both")
        if (self.delay_ns < -1).any() or (self.delay_ns > MAX_ARRIVAL_NS).any():
            raise InputError(
                f"trace {self.name}: delays are from 0 to {MAX_ARRIVAL_NS // 1_000_000:,} ms, or -1 where there is none"
            )
        if self.session is None:
            raise InputError(f"trace {self.name}: delays are after answers of a session; add a column session")
        if (self.before[self.delay_ns >= 0] < 0).any():
            row = int(np.flatnonzero((self.delay_ns >= 0) & (self.before < 0))[0])
            raise InputError(f"trace {self.name}: row {row + 1} waits for an answer and is the first of its session")
        if len(late := np.flatnonzero((self.delay_ns >= 0) & (self.arrival_ns > self._soonest_ns))):
            row, soonest_ns = int(late[0]), int(self._soonest_ns[late[0]])
            raise InputError(
                f"trace {self.name}: row {row + 1} waits for an answer and arrives at {self.arrival_ns[row]} ns, later "
                f"than at {soonest_ns} ns if that came at once; give the earliest arrival that there can be"
            )

    @property
    def _soonest_ns(self) -> Ints:
        """When requests that wait arrive if the answers before them come at once."""
        assert self.delay_ns is not None
        return np.asarray(self.arrival_ns[self.before] + self.delay_ns)

    @property
    def before(self) -> Ints:
        """The request before each in its session; -1 of the first, and where sessions are not told."""
        found = np.full(len(self), -1, np.int64)
        if self.session is not None:
            order = np.argsort(self.session, kind="stable")
            same = self.session[order][1:] == self.session[order][:-1]
            found[order[1:][same]] = order[:-1][same]
        return found

    def _check_content(self) -> None:
        """Pieces for every token of every prompt, or none at all."""
        where, ids, starts = f"trace {self.name}", self.content, self.content_starts
        if ids is None or starts is None:
            if ids is not None or starts is not None or self.content_tokens != 0:
                raise InputError(f"{where}: content, content_starts and content_tokens go together; use make_trace")
            return
        check_count("content_tokens", self.content_tokens, MAX_TOKENS, where)
        for label, column in (("content", ids), ("content_starts", starts)):
            check_layout(where, label, column)
        if starts.size != len(self) + 1 or starts[0] != 0 or starts[-1] != ids.size:
            raise InputError(
                f"{where}: content_starts must lead from 0 to {ids.size} over all requests; use make_trace"
            )
        check_pieces(where, np.diff(starts), self.prompt, self.content_tokens)

    @property
    def timed(self) -> bool:
        """Whether it has arrivals, or clients that send the requests."""
        return self.arrivals.kind != "unknown" or self.concurrency is not None

    def __len__(self) -> int:
        return self.prompt.size

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return int(self.prompt.sum())

    @property
    def output_tokens(self) -> int:
        """Generated tokens of all requests."""
        return int(self.output.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output together: what a KV cache must be able to hold."""
        return int((self.prompt + self.output).max())

    def generated(self, max_model_len: int) -> Ints:
        """Tokens that each request generates before it is at the length the model allows."""
        return np.minimum(self.output, max_model_len - self.prompt)

    def stated(self, max_model_len: int) -> Ints:
        """Tokens that each request says it may generate, cut to the length the model allows."""
        most = self.output if self.max_new_tokens is None else self.max_new_tokens
        return np.minimum(most, max_model_len - self.prompt)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return int(self.arrival_ns[-1] - self.arrival_ns[0]) / NS_PER_S

    @property
    def rate_per_s(self) -> float | None:
        """Arrivals per second, (n - 1) / duration; None where arrivals span no time (closed loop, all at once)."""
        return (len(self) - 1) / self.duration_s if self.duration_s > 0 else None

    @property
    def burstiness(self) -> float | None:
        """Coefficient of variation of the gaps: 0 even, 1 Poisson, more in bursts; None where there is no rate."""
        gaps = np.diff(self.arrival_ns)
        return float(gaps.std() / gaps.mean()) if gaps.any() else None

    def summary(self) -> dict[str, int | float | str | None]:
        """Statistics for a report; percentiles by nearest rank, so each is a length that occurs."""
        lengths: dict[str, int | float] = {}
        for label, column in (("prompt", self.prompt), ("output", self.output)):
            lengths[f"{label}_mean"] = float(column.mean())
            lengths[f"{label}_p50"] = int(np.percentile(column, 50, method="inverted_cdf"))
            lengths[f"{label}_p95"] = int(np.percentile(column, 95, method="inverted_cdf"))
            lengths[f"{label}_max"] = int(column.max())
        return {
            "name": self.name,
            "source": self.source,
            "requests": len(self),
            "concurrency": self.concurrency,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            **lengths,
            "longest": self.longest,
            "duration_s": self.duration_s,
            "rate_per_s": self.rate_per_s,
            "burstiness": self.burstiness,
            **({} if self.delay_ns is None else {"waiting": int((self.delay_ns >= 0).sum())}),
        }

    def stretched(self, factor: float) -> Trace:
        """The same requests with every arrival time multiplied by `factor`: 2 halves the rate, 0.5 doubles it.

        Rounded to the nearest nanosecond, exact for arrivals within 2**53 ns (104 days).

        Raises
        ------
        UsageError                     factor not above 0, a result beyond 2**61 ns, or a closed loop
        """
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= sys.float_info.max:
            raise UsageError(f"trace {self.name}: factor must be a finite number above 0, got {shown(factor)}")
        if self.concurrency is not None:
            raise UsageError(
                f"trace {self.name}: a closed loop has no arrival times to stretch; change its concurrency"
            )
        if not self.timed:
            raise UsageError(f"trace {self.name}: has no arrival times to stretch; give it a rate")
        with np.errstate(over="ignore"):
            arrival = np.rint(self.arrival_ns * float(factor))
        if arrival[-1] > MAX_ARRIVAL_NS:
            raise UsageError(
                f"trace {self.name}: stretched by {factor:.4g}, arrivals pass 2**61 ns (73 years); lower the factor"
            )
        arrival_ns, delay_ns = arrival.astype(np.int64), None
        if self.delay_ns is not None:
            delay_ns, before = _scaled(self.delay_ns, float(factor)), self.before
            for row in np.flatnonzero(delay_ns >= 0).tolist():  # each rounded, waits may come to less in all
                arrival_ns[row] = min(arrival_ns[row], arrival_ns[before[row]] + delay_ns[row])
        return make_trace(
            name=f"{self.name}*{factor:g}",
            arrival_ns=arrival_ns,
            prompt=self.prompt,
            output=self.output,
            max_new_tokens=self.max_new_tokens,
            content=self._pieces() if self.content is not None else None,
            content_tokens=self.content_tokens,
            source=f"{self.source}; arrivals times {factor!r}",
            notes=self.notes,
            arrivals=self.arrivals,
            media=self.media,
            session=self.session,
            priority=self.priority,
            delay_ns=delay_ns,
        )

    def head(self, n: int) -> Trace:
        """The first `n` requests.

        Raises
        ------
        UsageError                     n not a whole number from 1 to the number of requests
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(self):
            raise UsageError(f"trace {self.name} has {len(self):,} requests; cannot take the first {shown(n)}")
        first = self.picked(np.arange(n), self.concurrency)
        if self.delay_ns is not None:  # what they wait for comes before them
            first = replace(first, delay_ns=self.delay_ns[:n])
        return replace(first, source=f"{self.source}; first {n} of {len(self)}")

    def arriving(self, arrival_ns: Ints) -> tuple[Trace, Ints]:
        """The requests as they come at other times, in order of these, and the row here of each; none waits."""
        order = np.argsort(arrival_ns, kind="stable")
        times = np.ascontiguousarray(arrival_ns[order])
        times.flags.writeable = False
        return self._rows(order, times), order

    def picked(self, rows: Ints, concurrency: int | None = None) -> Trace:
        """The requests in some rows, arriving as they do here, whatever they wait for.

        Parameters
        ----------
        rows : int64[m]                at least one, in rising order
        concurrency : int or None      clients that send them, in a closed loop
        """
        times = self.arrival_ns[rows]
        times.flags.writeable = False
        found = self._rows(rows, times)
        return replace(
            found,
            concurrency=concurrency,
            pause_ns=self.pause_ns if concurrency is not None else 0,
            source=f"{self.source}; {rows.size} of {len(self)}",
        )

    def _rows(self, rows: Ints, times: Ints) -> Trace:
        """The requests in some rows, coming on their own at some times."""
        ids = starts = None
        if self.content is not None and self.content_starts is not None:
            ids, starts = gathered(self.content, self.content_starts, rows)
        columns = [times, self.prompt[rows], self.output[rows]]
        some = (self.max_new_tokens, self.session, self.priority)
        stated, session, priority = (None if its is None else its[rows] for its in some)
        for column in (*columns, *(its for its in (stated, session, priority) if its is not None)):
            column.flags.writeable = False
        return replace(
            self,
            arrival_ns=columns[0],
            prompt=columns[1],
            output=columns[2],
            max_new_tokens=stated,
            concurrency=None,
            pause_ns=0,
            content=ids,
            content_starts=starts,
            session=session,
            priority=priority,
            delay_ns=None,
        )

    def _pieces(self) -> list[Ints]:
        """Content of each request."""
        assert self.content is not None and self.content_starts is not None
        return np.split(self.content, self.content_starts[1:-1])


def _scaled(delay_ns: Ints, factor: float) -> Ints:
    """Delays times a factor; requests that do not wait go on not to."""
    return np.where(delay_ns < 0, -1, np.rint(delay_ns * factor)).astype(np.int64)


def gathered(ids: Ints, starts: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Content ids of some rows, in this order, and where those of each begin; read-only, as a trace has them.

    Parameters
    ----------
    ids : Ints       pieces, one request after the other
    starts : Ints    where each request's begin
    rows : Ints      the requests that are wanted
    """
    counts = np.diff(starts)[rows]
    begin = np.concatenate(([0], np.cumsum(counts)))
    found = ids[np.arange(begin[-1]) + np.repeat(starts[rows] - begin[:-1], counts)]
    for column in (found, begin):
        column.flags.writeable = False
    return found, begin


def make_trace(
    *,
    name: str,
    arrival_ns: Sequence[int] | npt.NDArray[Any],
    prompt: Sequence[int] | npt.NDArray[Any],
    output: Sequence[int] | npt.NDArray[Any],
    max_new_tokens: Sequence[int] | npt.NDArray[Any] | None = None,
    concurrency: int | None = None,
    pause_ns: int = 0,
    content: Sequence[Sequence[int] | npt.NDArray[Any]] | None = None,
    content_tokens: int = 0,
    source: str = "",
    notes: tuple[str, ...] = (),
    arrivals: Arrivals = RECORDED,
    media: Media = TEXT,
    session: Sequence[int] | npt.NDArray[Any] | None = None,
    priority: Sequence[int] | npt.NDArray[Any] | None = None,
    delay_ns: Sequence[int] | npt.NDArray[Any] | None = None,
) -> Trace:
    """A `Trace` from whole numbers in any order: copied, sorted by arrival (ties keep their order), read-only.

    With a `concurrency` the order is kept and the arrival times are set to 0. `content` gives the content ids of each
    prompt, one per `content_tokens` tokens, the last for what is left.

    Parameters
    ----------
    name : str                            of the trace
    arrival_ns : sequence of int or array    of each request, in order
    prompt : sequence of int or array     tokens of each prompt
    output : sequence of int or array     tokens of each answer
    max_new_tokens : sequence of int, array or None    the most tokens of each answer, as its client states it
    concurrency : int or None             clients of a closed loop
    pause_ns : int                        from an answer to the next request of the same client
    content : sequence or None            what each prompt says, as ids of pieces
    content_tokens : int                  tokens of a piece
    source : str                          where it comes from
    notes : tuple of str                  what the reader has to know
    arrivals : Arrivals                   how they come about
    media : Media                         images, counted in the prompts, and recordings
    session : sequence of int, array or None    numbers of the conversations that requests are of
    priority : sequence of int, array or None    0 of normal, 1 of high priority
    delay_ns : sequence of int, array or None    from the last answer of its session to a request, -1: it does not wait

    Raises
    ------
    InputError                     as `Trace`; also fractions, NaN, bool and numbers outside int64, with their rows
    """
    given = (arrival_ns, prompt, output, *(() if max_new_tokens is None else (max_new_tokens,)))
    columns = [to_int64(name, label, values) for label, values in zip(LABELS, given, strict=False)]
    check_sizes(name, columns)
    # Before sorting, so that rows are counted as they were given.
    if faults := row_faults(columns):
        raise join_faults(f"trace {name}", faults)
    pieces = _content(name, content, columns[1], content_tokens) if content is not None else None
    if concurrency is not None:
        columns[0] = np.zeros_like(columns[0])
    order = np.argsort(columns[0], kind="stable")
    frozen = [np.ascontiguousarray(column[order]) for column in columns]
    beside: list[Ints | None] = []
    for label, values in (("session", session), ("priority", priority), ("delay_ns", delay_ns)):
        found = None if values is None else to_int64(name, label, values)
        if found is not None and found.shape != order.shape:
            raise InputError(f"trace {name}: {found.size} {label} values for {order.size} requests")
        beside.append(None if found is None else np.ascontiguousarray(found[order]))
    for column in (*frozen, *(its for its in beside if its is not None)):
        column.flags.writeable = False
    ids = starts = None
    if pieces is not None:
        ids = np.concatenate([pieces[i] for i in order])
        starts = np.concatenate(([0], np.cumsum([pieces[i].size for i in order])))
        for column in (ids, starts):
            column.flags.writeable = False
    return Trace(
        name=name,
        arrival_ns=frozen[0],
        prompt=frozen[1],
        output=frozen[2],
        max_new_tokens=frozen[3] if max_new_tokens is not None else None,
        concurrency=concurrency,
        pause_ns=pause_ns,
        content=ids,
        content_starts=starts,
        content_tokens=content_tokens if content is not None else 0,
        source=source,
        notes=notes,
        arrivals=arrivals,
        media=media,
        session=beside[0],
        priority=beside[1],
        delay_ns=beside[2],
    )


def media_of(prompt: Ints, image_tokens: Ints, audio_s: float) -> Media:
    """What requests hold beside text.

    Parameters
    ----------
    prompt : int64[n]          tokens, those of images included
    image_tokens : int64[n]    of these
    audio_s : float            seconds of the longest recording
    """
    some = image_tokens[image_tokens > 0]
    mean = float(some.mean()) if some.size else 0.0
    return Media(image_tokens=mean, image_share=float(image_tokens.sum() / prompt.sum()), audio_s=audio_s)


def _content(name: str, content: Sequence[Sequence[int] | npt.NDArray[Any]], prompt: Ints, tokens: int) -> list[Ints]:
    """Content ids of every request."""
    check_count("content_tokens", tokens, MAX_TOKENS, f"trace {name}")
    if not hasattr(content, "__len__") or len(content) != prompt.size:
        raise InputError(f"trace {name}: content must be a list of ids for each of {prompt.size} requests")
    columns = [to_int64(f"{name}, content of row {i}", "id", ids, "piece") for i, ids in enumerate(content, 1)]
    check_pieces(f"trace {name}", np.array([column.size for column in columns]), prompt, tokens)
    return columns
