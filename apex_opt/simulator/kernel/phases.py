"""Two loops over one pool of blocks: `reference.phases` for one replica, whose batches nobody asks to be told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.phases_state import (
    ALONE,
    ANSWERED,
    ARRIVAL,
    ATTEND_NS,
    BACK,
    BATCHES,
    BESIDE,
    BLOCK_SIZE,
    BLOCKS,
    BUSY,
    CHUNK_CONTEXT_RATE,
    CHUNK_NS,
    CHUNKED,
    COME,
    COMPUTED,
    CONTEXT_RATE,
    DECODE_NS,
    END,
    ENTERED,
    FACTOR,
    FIRST,
    FREE,
    GAPS_AT,
    GOT,
    HEAD,
    HELD,
    LAST,
    LEFT,
    MIXED_NS,
    MOST_BLOCKS,
    N_ATTEND,
    N_ATTEND_CONTEXT,
    N_CHUNK,
    N_CHUNK_CONTEXT,
    N_CHUNK_PAIRS,
    N_DECODE,
    N_DECODE_CONTEXT,
    N_MIXED,
    N_SEQUENCES,
    PAIR_RATE,
    PREEMPTIONS,
    PROMPT,
    REQUESTS,
    ROWS,
    SCALE,
    SEATS,
    SEQUENCE_NS,
    SINCE,
    STARTED,
    TOKENS,
    WANTED,
    Replica,
)
from apex_opt.simulator.kernel.state import NEVER, RATE_BITS

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64


@inner
def column_nb(p: Replica, column: int) -> I64:
    """A column of the requests."""
    return at(p.requests, column * p.facts[REQUESTS])


@inner
def by_tokens_nb(p: Replica, tables: I64, before: int, table: int) -> I64:
    """One of the tables that go by tokens, after so many by sequences."""
    return at(tables, before * (p.facts[SEATS] + 1) + table * (p.facts[TOKENS] + 1))


@inner
def by_sequences_nb(p: Replica, tables: I64, table: int) -> I64:
    """One of those that go by sequences."""
    return at(tables, table * (p.facts[SEATS] + 1))


@inner
def take_nb(p: Replica, i: int, tokens: int) -> bool:
    """Blocks for so many tokens, where they are free."""
    f, held = p.facts, column_nb(p, HELD)
    more = (tokens + f[BLOCK_SIZE] - 1) // f[BLOCK_SIZE] - held[i]
    if more > f[FREE]:
        return False
    f[FREE] -= more
    held[i] += more
    f[MOST_BLOCKS] = max(f[MOST_BLOCKS], f[BLOCKS] - f[FREE])
    return True


@inner
def token_nb(p: Replica, i: int, now: int) -> None:
    """A request has a token more; after its last one its blocks are free."""
    got, last, held = column_nb(p, GOT), column_nb(p, LAST), column_nb(p, HELD)
    if got[i] == 0:
        column_nb(p, FIRST)[i] = now
    else:
        p.gaps[column_nb(p, GAPS_AT)[i] + got[i] - 1] = now - last[i]
    got[i] += 1
    last[i] = now
    if got[i] == column_nb(p, WANTED)[i]:
        p.facts[FREE] += held[i]
        held[i] = 0


@inner
def end_answers_nb(p: Replica, now: int) -> None:
    """Take in the tokens of a step."""
    f, a, held, kept = p.facts, p.answers, column_nb(p, HELD), 0
    for row in range(a[ROWS]):
        token_nb(p, p.answered[row], now)
    for row in range(f[ANSWERED]):
        if held[p.answered[row]] > 0:
            p.answered[kept] = p.answered[row]
            kept += 1
    f[ANSWERED] = kept
    a[BUSY] += now - a[STARTED]
    a[BATCHES] += 1
    a[ROWS] = 0


@inner
def end_prompts_nb(p: Replica, now: int) -> None:
    """Take in what a batch of prompts computed; those that are done go over to the answers."""
    f, b, kept = p.facts, p.prompts, 0
    computed, prompt, got, held = column_nb(p, COMPUTED), column_nb(p, PROMPT), column_nb(p, GOT), column_nb(p, HELD)
    for row in range(f[ENTERED]):
        i = p.entered[row]
        if computed[i] < prompt[i] + got[i]:
            p.entered[kept] = i
            kept += 1
            continue
        token_nb(p, i, now)
        if held[i] > 0:
            p.answered[f[ANSWERED]] = i
            f[ANSWERED] += 1
    f[ENTERED] = kept
    b[BUSY] += now - b[STARTED]
    b[BATCHES] += 1
    b[ROWS] = 0


@inner
def start_nb(loop: I64, rows: int, whole_ns: int, now: int) -> None:
    """A batch that the whole GPU would compute in so long."""
    loop[ROWS], loop[STARTED], loop[SINCE], loop[LEFT] = rows, now, now, whole_ns
    loop[FACTOR] = loop[ALONE]
    loop[END] = now + (whole_ns * loop[FACTOR] + SCALE - 1) // SCALE


@inner
def pace_nb(loop: I64, factor: int, now: int) -> None:
    """From now on the batch goes at another pace."""
    if loop[ROWS] == 0 or factor == loop[FACTOR]:
        return
    loop[LEFT] -= (now - loop[SINCE]) * SCALE // loop[FACTOR]
    loop[SINCE], loop[FACTOR] = now, factor
    loop[END] = now + (loop[LEFT] * factor + SCALE - 1) // SCALE


@inner
def answer_nb(p: Replica, now: int) -> None:
    """A token of every request that is answered; the last that came gives way where blocks run out."""
    f, rows, read = p.facts, 0, 0
    computed, held = column_nb(p, COMPUTED), column_nb(p, HELD)
    while rows < f[ANSWERED]:
        i = p.answered[rows]
        if take_nb(p, i, computed[i] + 1):
            rows += 1
            continue
        f[ANSWERED] -= 1
        victim = p.answered[f[ANSWERED]]
        f[FREE] += held[victim]
        held[victim], computed[victim] = 0, 0
        p.back[f[BACK]] = victim
        f[BACK] += 1
        f[PREEMPTIONS] += 1
    if rows == 0:
        return
    for row in range(rows):
        i = p.answered[row]
        computed[i] += 1
        read += computed[i]
    by_sequences_nb(p, p.counts, N_DECODE)[rows] += 1
    by_sequences_nb(p, p.counts, N_DECODE_CONTEXT)[rows] += read
    rate = by_sequences_nb(p, p.law, CONTEXT_RATE)[rows]
    start_nb(p.answers, rows, by_sequences_nb(p, p.law, DECODE_NS)[rows] + (rate * read >> RATE_BITS), now)


@inner
def prompt_nb(p: Replica, now: int) -> None:
    """Prompts in the order in which they came, as many as there are tokens, seats and blocks for."""
    f, left = p.facts, p.facts[TOKENS]
    computed, prompt, got = column_nb(p, COMPUTED), column_nb(p, PROMPT), column_nb(p, GOT)
    for row in range(f[ENTERED]):
        i = p.entered[row]
        p.chunk[row] = min(left, prompt[i] + got[i] - computed[i])
        left -= p.chunk[row]
    while f[BACK] + f[COME] > f[HEAD] and left > 0 and f[ENTERED] + f[ANSWERED] < f[SEATS]:
        i = p.back[f[BACK] - 1] if f[BACK] > 0 else f[HEAD]
        known = prompt[i] + got[i]
        if (f[CHUNKED] == 0 and known > left) or not take_nb(p, i, known):
            break
        if f[BACK] > 0:
            f[BACK] -= 1
        else:
            f[HEAD] += 1
        row = f[ENTERED]
        p.entered[row], p.chunk[row] = i, min(left, known)
        left -= p.chunk[row]
        f[ENTERED] += 1
    if f[ENTERED] > 0:
        start_nb(p.prompts, f[ENTERED], prompts_ns_nb(p), now)


@inner
def prompts_ns_nb(p: Replica) -> int:
    """Count the batch of prompts, and say what it takes on the whole GPU."""
    f, computed = p.facts, column_nb(p, COMPUTED)
    rows, tokens, decodes, read, chunks_ns = f[ENTERED], 0, 0, 0, 0
    for row in range(rows):
        i, c = p.entered[row], p.chunk[row]
        computed[i] += c
        tokens += c
        if c <= 1:
            decodes += 1
            read += computed[i]
            continue
        pairs = c * computed[i] - c * (c - 1) // 2
        rates = by_tokens_nb(p, p.law, 4, PAIR_RATE)[c] * pairs
        rates += by_tokens_nb(p, p.law, 4, CHUNK_CONTEXT_RATE)[c] * computed[i]
        chunks_ns += by_tokens_nb(p, p.law, 4, CHUNK_NS)[c] + (rates >> RATE_BITS)
    total: int = by_sequences_nb(p, p.law, CONTEXT_RATE)[decodes] * read >> RATE_BITS
    if decodes == rows:
        by_sequences_nb(p, p.counts, N_DECODE)[rows] += 1
        by_sequences_nb(p, p.counts, N_DECODE_CONTEXT)[rows] += read
        return total + by_sequences_nb(p, p.law, DECODE_NS)[rows]
    by_sequences_nb(p, p.counts, N_SEQUENCES)[rows] += 1
    by_sequences_nb(p, p.counts, N_ATTEND)[decodes] += 1
    by_sequences_nb(p, p.counts, N_ATTEND_CONTEXT)[decodes] += read
    by_tokens_nb(p, p.counts, 5, N_MIXED)[tokens] += 1
    for row in range(rows):
        i, c = p.entered[row], p.chunk[row]
        if c > 1:
            by_tokens_nb(p, p.counts, 5, N_CHUNK)[c] += 1
            by_tokens_nb(p, p.counts, 5, N_CHUNK_PAIRS)[c] += c * computed[i] - c * (c - 1) // 2
            by_tokens_nb(p, p.counts, 5, N_CHUNK_CONTEXT)[c] += computed[i]
    total += by_tokens_nb(p, p.law, 4, MIXED_NS)[tokens] + by_sequences_nb(p, p.law, SEQUENCE_NS)[rows]
    return total + by_sequences_nb(p, p.law, ATTEND_NS)[decodes] + chunks_ns


@inner
def act_nb(p: Replica, now: int) -> None:
    """What happens at one time: batches that end, then arrivals, then new batches."""
    f, a, b, arrival = p.facts, p.answers, p.prompts, column_nb(p, ARRIVAL)
    if a[ROWS] > 0 and a[END] == now:
        end_answers_nb(p, now)
    if b[ROWS] > 0 and b[END] == now:
        end_prompts_nb(p, now)
    while f[COME] < f[REQUESTS] and arrival[f[COME]] == now:
        f[COME] += 1
    if a[ROWS] == 0:
        answer_nb(p, now)
    if b[ROWS] == 0:
        prompt_nb(p, now)
    both = a[ROWS] > 0 and b[ROWS] > 0
    pace_nb(a, a[BESIDE] if both else a[ALONE], now)
    pace_nb(b, b[BESIDE] if both else b[ALONE], now)


@inner
def serve_phases_nb(p: Replica) -> None:
    """Act at every end of a batch and every arrival until all is answered."""
    facts, prompts, answers, arrival = p.facts, p.prompts, p.answers, column_nb(p, ARRIVAL)
    while True:
        now = NEVER
        if answers[ROWS] > 0:
            now = min(now, answers[END])
        if prompts[ROWS] > 0:
            now = min(now, prompts[END])
        if facts[COME] < facts[REQUESTS]:
            now = min(now, arrival[facts[COME]])
        if now >= NEVER:
            return
        act_nb(p, now)
