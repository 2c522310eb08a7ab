"""Batches of prompts as SGLang forms them: `reference.sglang`, from the order of the queue to the pages of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import column_nb, count_chunk_nb, log_row_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.sglang_state import (
    ADMITTED,
    ALIKE,
    CHUNKS,
    CLIP,
    COMPUTED,
    F_PROMPTS,
    F_SIZE,
    G_CHUNKED,
    G_EVICTABLE,
    G_IGNORE_EOS,
    G_LPM,
    G_MAX_PREFILL,
    G_MIXES,
    G_MOST_RUNNING,
    G_PASSES,
    G_SEATS,
    G_SORT_AT,
    G_WAIT_AT,
    G_WAIT_HEAD,
    G_WAIT_MASK,
    G_WAIT_TAIL,
    HELD,
    NODE,
    OFFSET,
    P_CHUNK,
    P_CUT,
    P_FUTURES,
    P_INPUTS,
    P_NOW,
    P_ROWS,
    P_SEATED,
    P_TOKENS,
    PAGES,
    PLACE,
    R_RATIO,
    R_TAKEN,
    REFRESHED_EVERY,
    ROOT,
    S_COMING,
    S_FULL,
    S_RUNNING,
    S_RUNNING_AT,
    S_STEPS,
    SORTED_UP_TO,
    STATED,
)
from apex_opt.simulator.kernel.sglang_tree import drop_nb, hold_nb, known_pages_nb, let_go_nb, match_nb, number_nb
from apex_opt.simulator.kernel.state import (
    BATCH_DECODES,
    BATCH_READ,
    BATCH_ROWS,
    BATCH_TOKENS,
    BLOCK_SIZE,
    CACHED,
    CHUNKED,
    DRAFTS,
    ENTERING_AT,
    FREE,
    GENERATED,
    LIMIT,
    LOGGED,
    MAX_SEQS,
    MAX_TOKENS,
    NONE,
    PROMPT,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import Engine, Tree
    from apex_opt.simulator.kernel.state import I64

TAKEN, NO_MEMORY, NO_TOKENS = range(3)


@inner
def room_nb(e: Engine) -> int:
    """Tokens of pages that are free or would be."""
    return (e.r[FREE] + e.g[G_EVICTABLE]) * e.r[BLOCK_SIZE]


@inner
def make_room_nb(e: Engine, tree: Tree | None, tokens: int) -> None:
    """Drop what is cached until there are free pages of so many tokens, or nothing more to drop."""
    if tree is not None:
        missing = blocks_nb(tokens, e.r[BLOCK_SIZE]) - e.r[FREE]
        if missing > 0:
            drop_nb(e, tree, missing)


@inner
def waiting_nb(e: Engine, place: int) -> int:
    """The request at a place of the queue."""
    g = e.g
    return e.run.scratch[g[G_WAIT_AT] + ((g[G_WAIT_HEAD] + place) & g[G_WAIT_MASK])]


@inner
def sort_nb(e: Engine, n: int) -> None:
    """Sort n keys, and of equal ones the values; the gaps are those of Sedgewick (1986)."""
    keys, values = at(e.run.scratch, e.g[G_SORT_AT]), at(e.run.scratch, e.g[G_SORT_AT] + e.r[MAX_SEQS])
    power = 1
    while 4 * power * power < n:
        power *= 2
    while power > 0:
        gap = 4 * power * power + 3 * power + 1 if power > 1 else 1
        for place in range(gap, n):
            key, value = keys[place], values[place]
            there = place - gap
            while there >= 0 and (keys[there] > key or (keys[there] == key and values[there] > value)):
                keys[there + gap], values[there + gap] = keys[there], values[there]
                there -= gap
            keys[there + gap], values[there + gap] = key, value
        power //= 2


@inner
def prompts_nb(e: Engine, tree: Tree | None, s: I64, f: I64) -> None:
    """Form a batch of prompts in the batch f, if there can be one."""
    g, r = e.g, e.r
    g[P_ROWS] = 0
    if g[G_CHUNKED] == NONE:
        if g[G_WAIT_HEAD] == g[G_WAIT_TAIL] or s[S_FULL] == 1:
            return
        if min(g[G_MOST_RUNNING] - s[S_RUNNING], g[G_SEATS]) <= 0:
            s[S_FULL] = 1
            return
    if tree is not None:
        order_nb(e, tree)
    budgets_nb(e, s)
    if g[G_CHUNKED] != NONE and not go_on_nb(e, f):
        return
    chosen = 0
    while chosen < g[G_WAIT_TAIL] - g[G_WAIT_HEAD]:
        before = g[P_ROWS]
        goes_on = admit_nb(e, tree, s, f, waiting_nb(e, chosen))
        chosen += g[P_ROWS] - before
        if not goes_on:
            break
    if g[P_ROWS] == 0:
        return
    g[G_WAIT_HEAD] += chosen
    if g[P_CUT] != NONE:
        g[G_CHUNKED] = g[P_CUT]
    f[F_PROMPTS] = g[P_ROWS]
    make_room_nb(e, tree, g[P_TOKENS] + (g[P_ROWS] * r[BLOCK_SIZE] if r[BLOCK_SIZE] > 1 else 0))
    for row in range(g[P_ROWS]):
        enter_nb(e, f, row)


@inner
def budgets_nb(e: Engine, s: I64) -> None:
    """What there is for a batch of prompts."""
    g, running = e.g, at(e.run.scratch, s[S_RUNNING_AT])
    stated, offset = column_nb(e.run, STATED), column_nb(e.run, OFFSET)
    n, steps, coming = s[S_RUNNING], s[S_STEPS], s[S_COMING]
    mixed = n if g[G_MIXES] == 1 else 0
    if g[G_IGNORE_EOS] == 1:
        whole = 0
        for place in range(n):
            i = running[place]
            whole += min(stated[i] - offset[i] - steps + (1 if place >= coming else 0), CLIP)
        kept = float(whole)
    else:
        kept = 0.0
        ratio = e.ratio[R_RATIO]
        for place in range(n):  # one after the other, as sums of fractions depend on it
            i = running[place]
            kept += min(stated[i] - offset[i] - steps + (1 if place >= coming else 0), CLIP) * ratio
    e.ratio[R_TAKEN] = mixed + kept
    g[P_NOW] = mixed
    g[P_CHUNK] = e.r[MAX_TOKENS] - mixed
    g[P_INPUTS] = g[G_MAX_PREFILL] - mixed
    g[P_ROWS], g[P_SEATED], g[P_CUT], g[P_FUTURES], g[P_TOKENS] = 0, 0, NONE, 0, 0


@inner
def choose_nb(e: Engine, f: I64, i: int, want: int, most: int) -> None:
    """Take a request with so many tokens of what it wants; with all of them room is kept for its output."""
    g, page = e.g, e.r[BLOCK_SIZE]
    tokens = min(want, most)
    row = g[P_ROWS]
    at(f, F_SIZE)[row] = 2 * i + (1 if tokens == want else 0)
    e.run.scratch[e.r[ENTERING_AT] + row] = tokens
    kept = 0
    if tokens < want:
        g[P_CUT] = i
    else:
        kept = min(column_nb(e.run, STATED)[i], CLIP)
    whole = blocks_nb(tokens, page) * page
    e.ratio[R_TAKEN] += whole + page + kept
    g[P_NOW] += whole + page
    g[P_INPUTS] -= whole
    g[P_CHUNK] -= whole
    g[P_TOKENS] += tokens
    g[P_ROWS] += 1


@inner
def go_on_nb(e: Engine, f: I64) -> bool:
    """The one in the middle of its chunks gets the next; not where others took its room meanwhile."""
    g, page = e.g, e.r[BLOCK_SIZE]
    i = g[G_CHUNKED]
    most = min(g[P_CHUNK], int(room_nb(e) - e.ratio[R_TAKEN]))
    if most <= 0:
        most = g[P_CHUNK]
    computed = column_nb(e.run, COMPUTED)[i]
    want = column_nb(e.run, PROMPT)[i] + column_nb(e.run, GENERATED)[i] - computed
    pages = blocks_nb(computed + min(want, most), page) - column_nb(e.run, PAGES)[i]
    if pages * page > room_nb(e):
        return False
    choose_nb(e, f, i, want, most)
    g[G_CHUNKED], g[P_CUT] = g[P_CUT], NONE
    g[P_SEATED] = 1
    return True


@inner
def has_room_nb(e: Engine) -> bool:
    room = room_nb(e)
    return room - e.ratio[R_TAKEN] > 0 and room - e.g[P_NOW] > 0


@inner
def spent_nb(e: Engine) -> bool:
    """Whether tokens of the batch are used up."""
    return e.g[P_INPUTS] <= 0 or (e.r[CHUNKED] == 1 and e.g[P_CHUNK] <= 0)


@inner
def admit_nb(e: Engine, tree: Tree | None, s: I64, f: I64, i: int) -> bool:
    """Choose a waiting request if it can be; whether others may be after it."""
    g = e.g
    if has_room_nb(e) and spent_nb(e):
        return False
    if g[P_ROWS] >= min(g[G_MOST_RUNNING] - s[S_RUNNING], g[G_SEATS] + g[P_SEATED]):
        s[S_FULL] = 1
        return False
    known, pages, page = column_nb(e.run, PROMPT)[i] + column_nb(e.run, GENERATED)[i], 0, e.r[BLOCK_SIZE]
    if tree is not None:
        node, pages = match_nb(e, tree, i, known_pages_nb(e, known - 1))
        column_nb(e.run, NODE)[i] = node
        hold_nb(e, tree, node)
    refused = refused_nb(e, tree, s, f, i, known, known - pages * page)
    if refused == TAKEN:
        column_nb(e.run, HELD)[i] = pages
        column_nb(e.run, PAGES)[i] = pages
        column_nb(e.run, COMPUTED)[i] = pages * page
        if column_nb(e.run, ADMITTED)[i] == 0:
            column_nb(e.run, ADMITTED)[i] = 1
            e.r[CACHED] += pages * page
        if not has_room_nb(e):
            refused = NO_MEMORY
    elif tree is not None:
        let_go_nb(e, tree, column_nb(e.run, NODE)[i])
        column_nb(e.run, NODE)[i] = ROOT
    if refused == NO_MEMORY:
        s[S_FULL] = 1 if g[P_ROWS] > 0 or s[S_RUNNING] > 0 else 0
    return refused == TAKEN and not spent_nb(e)


@inner
def refused_nb(e: Engine, tree: Tree | None, s: I64, f: I64, i: int, known: int, want: int) -> int:
    """Choose a waiting request that has so many tokens to compute; or why not."""
    g, page = e.g, e.r[BLOCK_SIZE]
    whole, chunk, cuts = blocks_nb(want, page) * page, g[P_CHUNK], e.r[CHUNKED] == 1
    left = column_nb(e.run, STATED)[i] - column_nb(e.run, GENERATED)[i]
    if tree is None and g[G_IGNORE_EOS] == 1:
        if not simulated_nb(e, s, f, left, known, whole):
            return NO_MEMORY
        if cuts and chunk <= 0 and want > chunk:
            return NO_TOKENS
        choose_nb(e, f, i, want, chunk if cuts else want)
        return TAKEN
    if want + min(left, CLIP) + page >= room_nb(e) - e.ratio[R_TAKEN]:
        return NO_MEMORY
    if not cuts or whole <= chunk:
        if not cuts and g[P_ROWS] > 0 and whole >= g[P_INPUTS]:
            return NO_TOKENS
        choose_nb(e, f, i, want, want)
        return TAKEN
    if chunk < page:
        return NO_TOKENS
    choose_nb(e, f, i, want, chunk // page * page)
    return TAKEN


@inner
def simulated_nb(e: Engine, s: I64, f: I64, left: int, known: int, whole: int) -> bool:
    """Whether all could run to their end, in order of what is left."""
    g, page, room = e.g, e.r[BLOCK_SIZE], room_nb(e)
    if whole + page > min(room - g[P_NOW], room - e.ratio[R_TAKEN]):
        return False
    lefts = at(e.run.scratch, g[G_SORT_AT])
    helds = at(e.run.scratch, g[G_SORT_AT] + e.r[MAX_SEQS])
    n = g[P_FUTURES]
    if n == 0:
        n = futures_nb(e, s, f, left, known)
    else:
        place = n - 1
        for other in range(n):
            if left <= lefts[other]:
                place = other
                break
        for other in range(n, place, -1):
            lefts[other], helds[other] = lefts[other - 1], helds[other - 1]
        lefts[place], helds[place] = left, known
        n += 1
    g[P_FUTURES] = n
    there = room - g[P_NOW] - whole - page
    for place in range(n):
        together = n - place
        if there - lefts[place] * together <= together:
            return False
        there += helds[place]
    return True


@inner
def futures_nb(e: Engine, s: I64, f: I64, left: int, known: int) -> int:
    """What is left of all that run and were chosen, and of one more, in order; how many they are."""
    run, g = e.run, e.g
    lefts, helds = at(run.scratch, g[G_SORT_AT]), at(run.scratch, g[G_SORT_AT] + e.r[MAX_SEQS])
    stated, offset, prompt = column_nb(run, STATED), column_nb(run, OFFSET), column_nb(run, PROMPT)
    generated, running = column_nb(run, GENERATED), at(run.scratch, s[S_RUNNING_AT])
    lefts[0], helds[0] = left, known
    n = 1
    for place in range(s[S_RUNNING]):
        i = running[place]
        made = offset[i] + s[S_STEPS] - (1 if place >= s[S_COMING] else 0)
        lefts[n], helds[n] = stated[i] - made, prompt[i] + made
        n += 1
    for row in range(g[P_ROWS]):
        i = at(f, F_SIZE)[row] >> 1
        lefts[n], helds[n] = stated[i] - generated[i], prompt[i] + generated[i]
        n += 1
    sort_nb(e, n)
    return n


@inner
def enter_nb(e: Engine, f: I64, row: int) -> None:
    """Give a chosen request its seat and its pages, and enter it into the batch."""
    run, r, g = e.run, e.r, e.g
    i, tokens = at(f, F_SIZE)[row] >> 1, run.scratch[r[ENTERING_AT] + row]
    computed, pages, place = column_nb(run, COMPUTED), column_nb(run, PAGES), column_nb(run, PLACE)
    if place[i] != CHUNKS:
        place[i] = CHUNKS
        g[G_SEATS] -= 1
    computed[i] += tokens
    held = computed[i]
    needed = blocks_nb(held, r[BLOCK_SIZE]) - pages[i]
    r[FREE] -= needed
    pages[i] += needed
    r[BATCH_ROWS] += 1
    r[BATCH_TOKENS] += tokens
    if tokens <= 1 + r[DRAFTS]:
        r[BATCH_DECODES] += 1
        r[BATCH_READ] += held
    else:
        count_chunk_nb(run, r, tokens, held)
    if run.control[LOGGED] == 1:
        log_row_nb(run, i, at(f, F_SIZE)[row] & 1, tokens, held)


@inner
def order_nb(e: Engine, tree: Tree) -> None:
    """Put the queue in order, and keep prefixes in the cache that will be needed."""
    g, page = e.g, e.r[BLOCK_SIZE]
    prompt, generated, limit = column_nb(e.run, PROMPT), column_nb(e.run, GENERATED), column_nb(e.run, LIMIT)
    n = g[G_WAIT_TAIL] - g[G_WAIT_HEAD]
    if g[G_LPM] == 0 or n > SORTED_UP_TO:
        if g[G_PASSES] % REFRESHED_EVERY == 0:
            for place in range(min(n, SORTED_UP_TO) - 1, -1, -1):
                i = waiting_nb(e, place)
                match_nb(e, tree, i, known_pages_nb(e, prompt[i] + generated[i]))
        g[G_PASSES] += 1
        return
    # After the room for sorting by `sort_nb`: of each in the queue, its rank, and how it begins where that counts.
    base = g[G_SORT_AT] + 4 * e.r[MAX_SEQS]
    ranks, begins, sorted_ = (
        at(e.run.scratch, base),
        at(e.run.scratch, base + SORTED_UP_TO),
        at(e.run.scratch, base + 2 * SORTED_UP_TO),
    )
    for place in range(n):
        i = waiting_nb(e, place)
        known = prompt[i] + generated[i]
        found = match_nb(e, tree, i, known_pages_nb(e, known))[1] * page
        rank, begin = -min(found, known - 1), NONE
        if found <= ALIKE and known >= ALIKE and prompt[i] + limit[i] >= ALIKE:
            begin = number_nb(e, tree, i, ALIKE - 1)
            for other in range(place):
                if begins[other] == begin:
                    rank = 1
        begins[place] = begin
        ranks[place] = rank
        # Stands behind all of its rank or less.
        there = place
        while there > 0 and ranks[sorted_[there - 1]] > rank:
            sorted_[there] = sorted_[there - 1]
            there -= 1
        sorted_[there] = place
    for place in range(n):
        begins[place] = waiting_nb(e, sorted_[place])
    for place in range(n):
        e.run.scratch[g[G_WAIT_AT] + ((g[G_WAIT_HEAD] + place) & g[G_WAIT_MASK])] = begins[place]
