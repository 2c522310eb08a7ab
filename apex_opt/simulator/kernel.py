"""All compiled code: the batching of `reference.py`, event for event, without touching sequences that only decode.

Two engines share one interface, *take every turn that starts before `until`*:

`advance_single_nb`
    one stage without a prefill threshold, asynchronous or not. In a stretch where nobody arrives, ends or needs
    preemption, every running sequence gains one token per batch. So completions wait in a ring indexed by batch number
    (each slot an intrusive doubly linked list), the blocks the next batch needs are a count by residue of the context
    modulo the block size, the context is one running sum, and a batch costs a few table look-ups. At most one partial
    prefill exists and it is last in running order; preempted requests form a stack before the arrivals.
`advance_queued_nb`
    pipelines, thresholds, prefix caching and other policies: walks the running sequences each batch.

Numba's cache sees no edits in other files and does not rebind globals (numba issue 8359), hence one file, and nothing
imported that is used inside. Integers only, so equality with the reference is exact. `pack.py` is the only caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from apex_opt.simulator.kernel_cache import compiled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    I64 = NDArray[np.int64]

RATE_BITS = 20  # equals law.RATE_BITS; pack.py checks it
NEVER = 1 << 62
NONE = -1
EVICTED = -2

# Scalars of one replica, as columns of `Work.state`: common to both engines, then one engine's own.
NOW, BATCHES, FREE, STACK, NEXT, TAIL, BACKLOG = 0, 1, 2, 3, 4, 5, 6
PREEMPTIONS, SENT, ENDED, LAST_ENDED, ERROR = 7, 8, 9, 10, 11
DECODING, CONTEXT, FIRST_RUN, LAST_RUN, SEATED, PARTIAL, PARTIAL_DONE = 12, 13, 14, 15, 16, 17, 18
FLIGHT, FLIGHT_END, SIDE, ENTERED, HOLLOW = 19, 20, 21, 22, 23
QUEUE_HEAD, QUEUE_LENGTH, RUNNING, UNREPORTED, COMPLETE, CACHED = 24, 25, 26, 27, 28, 29
STATE_SIZE = 30

ERROR_STUCK = 1  # a turn with work that scheduled nothing: a request larger than the pool slipped through


class Limits(NamedTuple):
    """Engine settings."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    chunked: int
    threshold: int
    block_size: int
    asynchronous: int
    depth: int
    stages: int
    policy: int  # VLLM, ORCA or STATIC


class Laws(NamedTuple):
    """`law.BatchLaw`, a row per stage."""

    decode_ns: I64
    sequence_ns: I64
    attend_ns: I64
    context_rate: I64
    mixed_ns: I64
    chunk_ns: I64
    pair_rate: I64
    chunk_context_rate: I64
    transfer_ns: I64
    copies: I64  # [stages, 1]


class Requests(NamedTuple):
    """A column per field, a row per request; `following` chains the requests of one replica."""

    arrival: I64
    prompt: I64
    output: I64
    limit: I64
    following: I64
    first: I64
    finish: I64


class Work(NamedTuple):
    """Scratch memory: per request, then per replica."""

    generated: I64  # tokens; for a decoding sequence of the single-stage engine, those before batch `joined`
    joined: I64
    offset: I64  # tokens computed once batch k is done are offset + k
    run_before: I64
    run_after: I64
    slot_before: I64
    slot_after: I64
    under: I64  # preempted requests, a stack
    computed: I64
    in_flight: I64
    blocks: I64
    place: I64  # WAITS, RUNS or DONE
    state: I64  # [replicas, STATE_SIZE]
    ring: I64  # [lanes, power of two above the longest output]; replicas that run in turn share a lane
    residue: I64  # [lanes, block_size]
    running: I64  # [lanes, max_num_seqs]
    queue_end: I64  # [lanes, depth]
    queue_size: I64  # [lanes, depth]
    queue_rows: I64  # [lanes, depth, max_num_seqs]: 2 * request + yields
    stage_free: I64  # [replicas, stages]
    busy: I64  # [replicas, stages]
    entering: I64  # [lanes, 2, max_num_seqs]: first tokens that a batch brings; or tokens of each row


class Counts(NamedTuple):
    """`outcome.BatchCounts`."""

    decode: I64
    decode_context: I64
    sequences: I64
    attend: I64
    attend_context: I64
    mixed: I64
    chunk: I64
    chunk_pairs: I64
    chunk_context: I64


class Log(NamedTuple):
    """Every batch, where asked for. Positions run on past the capacity, so that a second run can be given enough."""

    on: int
    at: I64  # [3]: steps, rows, preempted
    steps: I64  # [_, 5]: replica, start, end, rows, preempted
    rows: I64  # [_, 3]: 2 * request + yields, tokens, computed after
    preempted: I64


class Cache(NamedTuple):
    """`pool.PrefixCachingPool`: lists of blocks as links in columns; one row per lane. Empty where caching is off."""

    on: int
    piece_blocks: int
    pieces: I64  # `content.BlockContent`
    starts: I64
    own: I64
    shared_blocks: I64
    slot: I64  # [requests]: row of `table`
    registered: I64  # [requests]
    slots: I64  # [lanes, max_num_seqs]: rows of `table` not in use, a stack
    table: I64  # [lanes, max_num_seqs, blocks of the longest request]
    block: I64  # [lanes, blocks + 1, 8]: what is known of each block, side by side as it is used together
    holder: I64  # [lanes, keys, 2]: oldest and newest block of each content
    memo: I64  # [lanes, 4]: what was found last, so that a request that waits in front is not looked up again


class Stops(NamedTuple):
    """`stop.Stop`, a row each: when passed, the run is cut short."""

    metric: I64  # TTFT, TPOT, E2E or MAKESPAN
    adds: I64  # 1: latencies beyond the floors add up in `used`; 0: `used` counts those above the limit
    limit: I64
    most: I64
    used: I64
    floors: I64  # [4, requests]: least value of each metric
    origin: int  # first arrival
    passed: I64  # [1]


VLLM, ORCA, STATIC = 0, 1, 2
TTFT, TPOT, E2E, MAKESPAN = 0, 1, 2, 3
# Columns of `Cache.block`. Free blocks stand in a circle from BEHIND to BEHIND, its last row being both ends; blocks of
# equal content in a line from OLDER to NEWER; MARK is the stamp of those found for the request in `memo`, PLACE which.
USERS, CONTENT, BEHIND, AHEAD, OLDER, NEWER, MARK, PLACE = 0, 1, 2, 3, 4, 5, 6, 7
OLDEST, NEWEST = 0, 1
MEMO_REQUEST, MEMO_FOUND, MEMO_UNUSED, MEMO_STAMP = 0, 1, 2, 3
WAITS, RUNS, DONE = 0, 1, 2


@compiled
def log_row_nb(log: Log, request: int, yields: int, tokens: int, computed: int) -> None:
    at = log.at[1]
    if at < log.rows.shape[0]:
        log.rows[at, 0] = 2 * request + yields
        log.rows[at, 1] = tokens
        log.rows[at, 2] = computed
    log.at[1] = at + 1


@compiled
def log_preempted_nb(log: Log, request: int) -> None:
    at = log.at[2]
    if at < log.preempted.shape[0]:
        log.preempted[at] = request
    log.at[2] = at + 1


@compiled
def log_step_nb(log: Log, replica: int, start: int, end: int, rows: int, preempted: int) -> None:
    at = log.at[0]
    if at < log.steps.shape[0]:
        log.steps[at, 0] = replica
        log.steps[at, 1] = start
        log.steps[at, 2] = end
        log.steps[at, 3] = rows
        log.steps[at, 4] = preempted
    log.at[0] = at + 1


@compiled
def chunk_time_nb(laws: Laws, stage: int, c: int, held: int) -> int:
    pairs = c * held - c * (c - 1) // 2
    rates = laws.pair_rate[stage, c] * pairs + laws.chunk_context_rate[stage, c] * held
    time_ns: int = laws.chunk_ns[stage, c] + (rates >> RATE_BITS)
    return time_ns


@compiled
def count_chunk_nb(counts: Counts, c: int, held: int) -> None:
    counts.chunk[c] += 1
    counts.chunk_pairs[c] += c * held - c * (c - 1) // 2
    counts.chunk_context[c] += held


@compiled
def answer_nb(requests: Requests, state: I64, stops: Stops, i: int, now: int) -> None:
    """Request i is answered: in a closed loop its client sends the next one; the run may be over."""
    requests.finish[i] = now
    state[ENDED] += 1
    state[LAST_ENDED] += 1
    coming = state[BACKLOG]
    if coming != NONE:
        requests.arrival[coming] = now
        state[BACKLOG] = requests.following[coming]
        state[SENT] += 1
    for row in range(stops.metric.shape[0]):
        metric = stops.metric[row]
        value = now - stops.origin
        if metric == TTFT:
            value = requests.first[i] - requests.arrival[i]
        elif metric == TPOT:
            value = (now - requests.first[i]) // (requests.limit[i] - 1) if requests.limit[i] > 1 else 0
        elif metric == E2E:
            value = now - requests.arrival[i]
        if stops.adds[row] == 1:
            stops.used[row] += value - stops.floors[metric, i]
            over = stops.used[row] > stops.limit[row]
        else:
            stops.used[row] += value > stops.limit[row]
            over = stops.used[row] >= stops.most[row]
        if over:
            stops.passed[0] = 1


@compiled
def empty_cache_nb(cache: Cache, lane: int) -> None:
    """All blocks free, in order, and nothing known."""
    block, holder = cache.block[lane], cache.holder[lane]
    ends = block.shape[0] - 1
    for b in range(ends + 1):
        block[b, USERS] = 0
        block[b, CONTENT] = NONE
        block[b, BEHIND] = b + 1 if b < ends else 0
        block[b, AHEAD] = b - 1 if b > 0 else ends
        block[b, MARK] = 0
    for key in range(holder.shape[0]):
        holder[key, OLDEST] = NONE
        holder[key, NEWEST] = NONE
    for row in range(cache.slots.shape[1]):
        cache.slots[lane, row] = row
    cache.memo[lane, MEMO_REQUEST] = NONE


@compiled
def number_pieces_nb(starts: I64, content: I64, pieces: I64, previous: I64, slots: I64) -> int:
    """Number content ids so that two are equal exactly where all before them are equal too, in order of appearance.

    `slots` is an open-addressing table of positions in `content`, NONE where free, a power of two above twice their
    number; `previous` is scratch. Returns how many numbers there are.
    """
    mask = slots.shape[0] - 1
    count = 0
    for i in range(starts.shape[0] - 1):
        before = NONE
        for at in range(starts[i], starts[i + 1]):
            h = ((before * 0x9E3779B1 + content[at]) * 0x85EBCA77) & 0x3FFFFFFFFFFFFFFF
            place = (h ^ (h >> 29)) & mask
            while True:
                other = slots[place]
                if other == NONE:
                    slots[place] = at
                    previous[at] = before
                    pieces[at] = count
                    count += 1
                    break
                if content[other] == content[at] and previous[other] == before:
                    pieces[at] = pieces[other]
                    break
                place = (place + 1) & mask
            before = pieces[at]
    return count


@compiled
def key_nb(pieces: I64, per: int, start: int, shared: int, own: int, j: int) -> int:
    """Content of a request's j-th block; takes the request's own figures, as passing `Cache` costs more than this."""
    key: int = own + j - shared
    if j < shared:
        key = pieces[start + j // per] * per + j % per
    return key


@compiled
def found_nb(cache: Cache, lane: int, i: int, most: int) -> tuple[int, int]:
    """Blocks that hold the beginning of request i, at most so many, and those of them that nobody uses."""
    block, holder, memo = cache.block[lane], cache.holder[lane], cache.memo[lane]
    if memo[MEMO_REQUEST] != i:
        memo[MEMO_REQUEST] = i
        memo[MEMO_FOUND] = 0
        memo[MEMO_UNUSED] = 0
        memo[MEMO_STAMP] += 1
    pieces, per = cache.pieces, cache.piece_blocks
    start, shared, own = cache.starts[i], cache.shared_blocks[i], cache.own[i]
    stamp = memo[MEMO_STAMP]
    found = memo[MEMO_FOUND]
    unused = memo[MEMO_UNUSED]
    while found < most:
        b = holder[key_nb(pieces, per, start, shared, own, found), OLDEST]
        if b == NONE:
            break
        if block[b, USERS] == 0:
            unused += 1
        block[b, MARK] = stamp
        block[b, PLACE] = found
        found += 1
    memo[MEMO_FOUND] = found
    memo[MEMO_UNUSED] = unused
    return found, unused


@compiled
def take_nb(cache: Cache, lane: int, i: int, held: int, found: int, total: int) -> None:
    """Give request i its found blocks, then fresh ones from the front of the queue, up to a total."""
    block, holder, memo = cache.block[lane], cache.holder[lane], cache.memo[lane]
    table = cache.table[lane, cache.slot[i]]
    pieces, per = cache.pieces, cache.piece_blocks
    start, shared, own = cache.starts[i], cache.shared_blocks[i], cache.own[i]
    stamp = memo[MEMO_STAMP]
    ends = block.shape[0] - 1
    for j in range(held, total):
        b = holder[key_nb(pieces, per, start, shared, own, j), OLDEST] if j < found else block[ends, BEHIND]
        if block[b, USERS] == 0:
            block[block[b, AHEAD], BEHIND] = block[b, BEHIND]
            block[block[b, BEHIND], AHEAD] = block[b, AHEAD]
            if block[b, MARK] == stamp:
                memo[MEMO_UNUSED] -= 1
        key = block[b, CONTENT]
        if j >= found and key != NONE:
            if block[b, MARK] == stamp and memo[MEMO_REQUEST] != NONE:
                # What was found ends before this block now.
                waits = memo[MEMO_REQUEST]
                its_start, its_shared, its_own = cache.starts[waits], cache.shared_blocks[waits], cache.own[waits]
                kept = block[b, PLACE]
                for later in range(kept + 1, memo[MEMO_FOUND]):
                    lost = holder[key_nb(pieces, per, its_start, its_shared, its_own, later), OLDEST]
                    memo[MEMO_UNUSED] -= block[lost, USERS] == 0
                    block[lost, MARK] = 0
                memo[MEMO_FOUND] = kept
                block[b, MARK] = 0
            block[b, CONTENT] = NONE
            older, newer = block[b, OLDER], block[b, NEWER]
            if older == NONE:
                holder[key, OLDEST] = newer
            else:
                block[older, NEWER] = newer
            if newer == NONE:
                holder[key, NEWEST] = older
            else:
                block[newer, OLDER] = older
        block[b, USERS] += 1
        table[j] = b


@compiled
def register_nb(cache: Cache, lane: int, i: int, full: int) -> None:
    """The first `full` blocks of request i can be found from now on."""
    block, holder = cache.block[lane], cache.holder[lane]
    table = cache.table[lane, cache.slot[i]]
    pieces, per = cache.pieces, cache.piece_blocks
    start, shared, own = cache.starts[i], cache.shared_blocks[i], cache.own[i]
    for j in range(cache.registered[i], full):
        b = table[j]
        key = key_nb(pieces, per, start, shared, own, j)
        block[b, CONTENT] = key
        last = holder[key, NEWEST]
        block[b, OLDER] = last
        block[b, NEWER] = NONE
        if last == NONE:
            holder[key, OLDEST] = b
        else:
            block[last, NEWER] = b
        holder[key, NEWEST] = b
    if full > cache.registered[i]:
        cache.registered[i] = full


@compiled
def release_nb(cache: Cache, lane: int, i: int, held: int) -> int:
    """Give all blocks of request i back, the last one first; how many of them are free now."""
    block, memo = cache.block[lane], cache.memo[lane]
    table = cache.table[lane, cache.slot[i]]
    stamp = memo[MEMO_STAMP]
    ends = block.shape[0] - 1
    freed = 0
    for j in range(held - 1, -1, -1):
        b = table[j]
        block[b, USERS] -= 1
        if block[b, USERS] == 0:
            last = block[ends, AHEAD]
            block[last, BEHIND] = b
            block[b, AHEAD] = last
            block[b, BEHIND] = ends
            block[ends, AHEAD] = b
            freed += 1
            if block[b, MARK] == stamp:
                memo[MEMO_UNUSED] += 1
    cache.registered[i] = 0
    return freed


@compiled
def advance_single_nb(
    replica: int,
    until: int,
    limits: Limits,
    laws: Laws,
    requests: Requests,
    work: Work,
    stops: Stops,
    counts: Counts,
    log: Log,
) -> None:
    """One stage without a prefill threshold: take every turn that starts before `until`.

    A turn forms batch k + 1 and takes in the oldest batch: that very batch, or with asynchronous scheduling batch k,
    which was running meanwhile. A batch without sequences only matters as it keeps its place in the queue (`hollow`).
    A sequence joins the decoding ones when its prompt's last tokens are scheduled, and leaves them when the batch after
    its last one is formed; it keeps its seat and blocks until its last batch is taken in.
    """
    arrival, prompt, limit, following = requests.arrival, requests.prompt, requests.limit, requests.following
    generated, joined, offset = work.generated, work.joined, work.offset
    before, after, slot_before, slot_after = work.run_before, work.run_after, work.slot_before, work.slot_after
    under = work.under
    lane = replica % work.ring.shape[0]
    state, ring, residue, entering = work.state[replica], work.ring[lane], work.residue[lane], work.entering[lane]
    decode_ns, context_rate = laws.decode_ns[0], laws.context_rate[0]
    mask = ring.shape[0] - 1
    bs = limits.block_size
    max_seqs = limits.max_num_seqs
    max_tokens = limits.max_num_batched_tokens
    asynchronous = limits.asynchronous == 1
    lag = 0 if asynchronous else 1

    now, k, free, n, context = state[NOW], state[BATCHES], state[FREE], state[DECODING], state[CONTEXT]
    first_run, last_run, seated = state[FIRST_RUN], state[LAST_RUN], state[SEATED]
    partial, partial_done = state[PARTIAL], state[PARTIAL_DONE]
    stack, head = state[STACK], state[NEXT]
    flight, end, side, entered, hollow = state[FLIGHT], state[FLIGHT_END], state[SIDE], state[ENTERED], state[HOLLOW]
    busy = work.busy[replica, 0]
    phase = k % bs  # residue class that needs a block in batch k + 1

    while True:
        if seated == 0 and flight == 0 and stack == NONE:
            if head == NONE or arrival[head] >= NEVER:
                break
            if arrival[head] > now:
                now = arrival[head]
                hollow = 0
        if now >= until:
            break

        # A stretch of pure decoding in which nothing can happen but the passing of tokens.
        if partial == NONE and n > 0 and entered == 0 and (flight == 1 or not asynchronous):
            wake = until
            blocked = True
            if stack != NONE or (head != NONE and arrival[head] <= now):
                candidate = stack if stack != NONE else head
                known = prompt[candidate] + generated[candidate]
                blocked = seated >= max_seqs or n >= max_tokens or (known + bs - 1) // bs > free
                if limits.chunked == 0 and known > max_tokens - n:
                    blocked = True
            elif head != NONE and seated < max_seqs and arrival[head] < wake:
                wake = arrival[head]
            if blocked:
                base_ns = decode_ns[n]
                rate = context_rate[n]
                first_batch = k
                first_turn = now
                if not asynchronous:
                    end = now
                began = end
                total = 0
                while now < wake and ring[(k + lag) & mask] == NONE:
                    need = residue[phase]
                    if need > free:
                        break
                    free -= need
                    k += 1
                    phase += 1
                    if phase == bs:
                        phase = 0
                    context += n
                    total += context
                    turn = now
                    now = end
                    end += base_ns + ((rate * context) >> RATE_BITS)
                    if not asynchronous:
                        now = end
                    if log.on:
                        i = first_run
                        while i != NONE:
                            log_row_nb(log, i, 1, 1, offset[i] + k)
                            i = after[i]
                        log_step_nb(log, replica, turn, end, n, 0)
                counts.decode[n] += k - first_batch
                counts.decode_context[n] += total
                busy += end - began
                if now > first_turn:
                    state[LAST_ENDED] = 0
                if now >= until:
                    break

        # One batch, by the rules. Sequences whose last token is on its way want nothing more.
        if flight == 1:
            i = ring[k & mask]
            while i != NONE:
                residue[(-offset[i]) % bs] -= 1
                context -= offset[i] + k
                n -= 1
                i = slot_after[i]
        need = residue[phase]
        chunk = 0
        partial_blocks = 0
        if partial != NONE:
            chunk = min(prompt[partial] + generated[partial] - partial_done, max_tokens - n)
            partial_blocks = (partial_done + chunk + bs - 1) // bs - (partial_done + bs - 1) // bs
        preempted = 0
        while need + partial_blocks > free:
            # The tail goes first, until what those before it need is free: as one by one, in order, would have it.
            if partial != NONE:
                victim = partial
                free += (partial_done + bs - 1) // bs
                partial = NONE
                partial_blocks = 0
                chunk = 0
                under[victim] = stack
                stack = victim
            else:
                victim = last_run
                done = offset[victim] + k
                free += (done + bs - 1) // bs
                last_run = before[victim]
                if last_run == NONE:
                    first_run = NONE
                else:
                    after[last_run] = NONE
                last_batch = joined[victim] + limit[victim] - generated[victim] - 1
                if flight == 1 and last_batch == k:
                    before[victim] = EVICTED  # its last token arrives all the same
                else:
                    if done % bs == 0:
                        need -= 1
                    residue[(-offset[victim]) % bs] -= 1
                    context -= done
                    n -= 1
                    slot = last_batch & mask
                    if slot_before[victim] == NONE:
                        ring[slot] = slot_after[victim]
                    else:
                        slot_after[slot_before[victim]] = slot_after[victim]
                    if slot_after[victim] != NONE:
                        slot_before[slot_after[victim]] = slot_before[victim]
                    generated[victim] += k - joined[victim] + 1  # with the one on its way
                    under[victim] = stack
                    stack = victim
            seated -= 1
            preempted += 1
            if log.on:
                log_preempted_nb(log, victim)
        state[PREEMPTIONS] += preempted
        free -= need + partial_blocks
        context += n
        budget = max_tokens - n - chunk
        d = n  # sequences of one token: decoding, or a prompt's chunk of one, which the hardware cannot tell apart
        read = context
        rows = n
        tokens = n + chunk
        chunks_ns = 0
        coming = 0  # first tokens this batch brings
        if log.on:
            i = first_run
            while i != NONE:
                if flight == 0 or joined[i] + limit[i] - generated[i] - 1 != k:
                    log_row_nb(log, i, 1, 1, offset[i] + k + 1)
                i = after[i]
        joining = NONE
        if chunk > 0:
            partial_done += chunk
            rows += 1
            if chunk == 1:
                d += 1
                read += partial_done
            else:
                chunks_ns += chunk_time_nb(laws, 0, chunk, partial_done)
                count_chunk_nb(counts, chunk, partial_done)
            if log.on:
                whole = 1 if partial_done == prompt[partial] + generated[partial] else 0
                log_row_nb(log, partial, whole, chunk, partial_done)
            if partial_done == prompt[partial] + generated[partial]:
                joining = partial
                partial = NONE
        while True:
            if joining != NONE:
                i = joining
                joining = NONE
                known = prompt[i] + generated[i]
                joined[i] = k + 1
                offset[i] = known - (k + 1)
                residue[(-offset[i]) % bs] += 1
                context += known
                n += 1
                before[i] = last_run
                after[i] = NONE
                if last_run == NONE:
                    first_run = i
                else:
                    after[last_run] = i
                last_run = i
                slot = (k + limit[i] - generated[i]) & mask
                slot_before[i] = NONE
                slot_after[i] = ring[slot]
                if ring[slot] != NONE:
                    slot_before[ring[slot]] = i
                ring[slot] = i
                if generated[i] == 0:
                    entering[1 - side, coming] = i
                    coming += 1
            if preempted > 0 or budget <= 0 or seated >= max_seqs:
                break
            if stack != NONE:
                i = stack
            elif head != NONE and arrival[head] <= now:
                i = head
            else:
                break
            known = prompt[i] + generated[i]
            if (known + bs - 1) // bs > free:
                break
            c = known
            if c > budget:
                if limits.chunked == 0:
                    break
                c = budget
            if i == stack:
                stack = under[i]
            else:
                head = following[i]
            free -= (c + bs - 1) // bs
            budget -= c
            tokens += c
            rows += 1
            seated += 1
            if c == 1:
                d += 1
                read += c
            else:
                chunks_ns += chunk_time_nb(laws, 0, c, c)
                count_chunk_nb(counts, c, c)
            if log.on:
                log_row_nb(log, i, 1 if c == known else 0, c, c)
            if c == known:
                joining = i
            else:
                partial = i
                partial_done = c

        popped_end = end
        popped = k
        if rows > 0:
            if d == rows:
                duration = decode_ns[d] + ((context_rate[d] * read) >> RATE_BITS)
                counts.decode[d] += 1
                counts.decode_context[d] += read
            else:
                duration = laws.mixed_ns[0, tokens] + laws.sequence_ns[0, rows] + laws.attend_ns[0, d]
                duration += chunks_ns // min(laws.copies[0, 0], rows - d)
                duration += (context_rate[d] * read) >> RATE_BITS
                counts.sequences[rows] += 1
                counts.attend[d] += 1
                counts.attend_context[d] += read
                counts.mixed[tokens] += 1
            busy += duration
            end = (end if flight == 1 else now) + duration
            if log.on:
                log_step_nb(log, replica, now, end, rows, preempted)
            k += 1
            phase += 1
            if phase == bs:
                phase = 0
            if flight == 0:
                if asynchronous and (duration > 0 or hollow == 1):
                    flight = 1
                    hollow = 0
                    side = 1 - side
                    entered = coming
                    continue
                popped_end = end
                popped = k
        elif flight == 0:
            state[ERROR] = ERROR_STUCK
            break
        else:
            log.at[2] -= preempted  # an empty batch leaves no record

        # The oldest batch is taken in: the one in flight, or the one just formed.
        if popped_end > now:
            now = popped_end
            state[LAST_ENDED] = 0
        if flight == 0:
            side = 1 - side
            entered = coming
        for e in range(entered):
            requests.first[entering[side, e]] = now
        i = ring[popped & mask]
        ring[popped & mask] = NONE
        while i != NONE:
            if before[i] != EVICTED:
                done = offset[i] + popped
                free += (done + bs - 1) // bs
                seated -= 1
                if before[i] == NONE:
                    first_run = after[i]
                else:
                    after[before[i]] = after[i]
                if after[i] == NONE:
                    last_run = before[i]
                else:
                    before[after[i]] = before[i]
                if flight == 0:
                    residue[(-offset[i]) % bs] -= 1
                    context -= done
                    n -= 1
            answer_nb(requests, state, stops, i, now)
            i = slot_after[i]
        if stops.passed[0] == 1:
            break
        entered = 0
        if flight == 1:
            if rows > 0:
                side = 1 - side
                entered = coming
            else:
                flight = 0
                hollow = 1

    state[NOW], state[BATCHES], state[FREE], state[DECODING], state[CONTEXT] = now, k, free, n, context
    state[FIRST_RUN], state[LAST_RUN], state[SEATED] = first_run, last_run, seated
    state[PARTIAL], state[PARTIAL_DONE] = partial, partial_done
    state[STACK], state[NEXT] = stack, head
    state[FLIGHT], state[FLIGHT_END], state[SIDE], state[ENTERED] = flight, end, side, entered
    state[HOLLOW] = hollow
    work.busy[replica, 0] = busy


@compiled
def advance_queued_nb(
    replica: int,
    until: int,
    limits: Limits,
    laws: Laws,
    requests: Requests,
    work: Work,
    cache: Cache,
    stops: Stops,
    counts: Counts,
    log: Log,
) -> None:
    """Stages, a prefill threshold, prefix caching or another policy: take every turn that starts before `until`."""
    arrival, prompt, output, limit = requests.arrival, requests.prompt, requests.output, requests.limit
    generated, computed, in_flight, blocks = work.generated, work.computed, work.in_flight, work.blocks
    under, place = work.under, work.place
    lane = replica % work.ring.shape[0]
    state, running, row_tokens = work.state[replica], work.running[lane], work.entering[lane, 0]
    queue_end, queue_size, queue_rows = work.queue_end[lane], work.queue_size[lane], work.queue_rows[lane]
    stage_free, busy = work.stage_free[replica], work.busy[replica]
    bs = limits.block_size
    depth = limits.depth
    caching = cache.on == 1
    spare = cache.slots[lane]  # rows of the block table: the first `n` are in use

    now, free, n = state[NOW], state[FREE], state[RUNNING]
    stack, head = state[STACK], state[NEXT]
    oldest, queued = state[QUEUE_HEAD], state[QUEUE_LENGTH]

    while True:
        while stack != NONE and place[stack] == DONE:  # ended by a token that was in flight when it was preempted
            stack = under[stack]
        idle = n == 0 and stack == NONE and (head == NONE or arrival[head] > now)
        if idle and queued == 0:
            if head == NONE or arrival[head] >= NEVER:
                break
            now = arrival[head]
            idle = False
        if now >= until:
            break

        if not idle or (queued > 0 and state[UNREPORTED] == 1):
            state[UNREPORTED] = 0
            # Running sequences, in order.
            newest = oldest + queued
            if newest >= depth:
                newest -= depth
            row = queue_rows[newest]
            budget = limits.max_num_batched_tokens
            rows = 0
            tokens = 0
            d = 0
            read = 0
            preempted = 0
            cut = False
            index = 0
            while index < n and budget > 0:
                i = running[index]
                if limits.policy == STATIC and generated[i] == limit[i]:  # done, but its batch is not
                    row[rows] = 2 * i
                    row_tokens[rows] = 1
                    rows += 1
                    tokens += 1
                    budget -= 1
                    d += 1
                    read += computed[i]
                    if log.on:
                        log_row_nb(log, i, 0, 1, computed[i])
                    index += 1
                    continue
                coming = in_flight[i]
                if coming > 0 and computed[i] + 2 - coming >= prompt[i] + output[i]:
                    index += 1
                    continue
                c = prompt[i] + generated[i] + coming - computed[i]
                if limits.threshold > 0:
                    c = min(c, limits.threshold)
                c = min(c, budget, limits.max_model_len - 1 - computed[i])
                if limits.policy != VLLM:
                    c = min(c, prompt[i] + limit[i] - 1 - computed[i])
                if c <= 0:
                    index += 1
                    continue
                need = max(0, (computed[i] + c + bs - 1) // bs - blocks[i])
                while need > free:
                    n -= 1
                    victim = running[n]
                    if caching:
                        free += release_nb(cache, lane, victim, blocks[victim])
                        spare[n] = cache.slot[victim]
                    else:
                        free += blocks[victim]
                    blocks[victim] = 0
                    computed[victim] = 0
                    place[victim] = WAITS
                    under[victim] = stack
                    stack = victim
                    preempted += 1
                    if log.on:
                        log_preempted_nb(log, victim)
                    if victim == i:
                        cut = True
                        break
                if cut:
                    break
                free -= need
                if caching and need > 0:
                    take_nb(cache, lane, i, blocks[i], 0, blocks[i] + need)
                blocks[i] += need
                computed[i] += c
                if caching:
                    filled = min(computed[i], prompt[i] + generated[i])
                    if filled >= (cache.registered[i] + 1) * bs:
                        register_nb(cache, lane, i, filled // bs)
                yields = 1 if computed[i] >= prompt[i] + generated[i] + coming else 0
                if yields and limits.asynchronous:
                    in_flight[i] += 1
                row[rows] = 2 * i + yields
                rows += 1
                tokens += c
                budget -= c
                if c == 1:
                    d += 1
                    read += computed[i]
                else:
                    count_chunk_nb(counts, c, computed[i])
                row_tokens[rows - 1] = c
                if log.on:
                    log_row_nb(log, i, yields, c, computed[i])
                index += 1

            # Waiting sequences, in order, where nobody had to give way.
            if preempted == 0 and (limits.policy != STATIC or n == 0):
                while budget > 0 and n < limits.max_num_seqs:
                    while stack != NONE and place[stack] == DONE:
                        stack = under[stack]
                    if stack != NONE:
                        i = stack
                    elif head != NONE and arrival[head] <= now:
                        i = head
                    else:
                        break
                    known = prompt[i] + generated[i]
                    found = 0
                    unused = 0
                    if caching:
                        found, unused = found_nb(cache, lane, i, (known - 1) // bs)
                    reserved = known if limits.policy == VLLM else prompt[i] + limit[i] - 1
                    if (reserved + bs - 1) // bs - found + unused > free:
                        break
                    c = known - found * bs
                    if limits.threshold > 0 and limits.policy == VLLM:
                        c = min(c, limits.threshold)
                    if c > budget:
                        if limits.chunked == 0 or limits.policy != VLLM:
                            break
                        c = budget
                    if i == stack:
                        stack = under[i]
                    else:
                        head = requests.following[i]
                        state[CACHED] += found * bs
                    computed[i] = found * bs + c
                    blocks[i] = ((computed[i] if limits.policy == VLLM else reserved) + bs - 1) // bs
                    free -= blocks[i] - found + unused
                    if caching:
                        cache.slot[i] = spare[n]
                        cache.registered[i] = found
                        take_nb(cache, lane, i, 0, found, blocks[i])
                        register_nb(cache, lane, i, computed[i] // bs)
                    running[n] = i
                    n += 1
                    place[i] = RUNS
                    yields = 1 if computed[i] >= known + in_flight[i] else 0
                    if yields and limits.asynchronous:
                        in_flight[i] += 1
                    row[rows] = 2 * i + yields
                    rows += 1
                    tokens += c
                    budget -= c
                    if c == 1:
                        d += 1
                        read += computed[i]
                    else:
                        count_chunk_nb(counts, c, computed[i])
                    row_tokens[rows - 1] = c
                    if log.on:
                        log_row_nb(log, i, yields, c, computed[i])
            state[PREEMPTIONS] += preempted

            # Through the stages.
            end = now
            if rows > 0:
                for s in range(limits.stages):
                    duration = (laws.context_rate[s, d] * read) >> RATE_BITS
                    if d == rows:
                        duration += laws.decode_ns[s, d]
                    else:
                        duration += laws.mixed_ns[s, tokens] + laws.sequence_ns[s, rows] + laws.attend_ns[s, d]
                        chunks_ns = 0
                        for r in range(rows):
                            c = row_tokens[r]
                            if c > 1:
                                chunks_ns += chunk_time_nb(laws, s, c, computed[row[r] >> 1])
                        duration += chunks_ns // min(laws.copies[s, 0], rows - d)
                    if stage_free[s] > end:
                        end = stage_free[s]
                    end += duration
                    stage_free[s] = end
                    busy[s] += duration
                    if s + 1 < limits.stages:
                        end += laws.transfer_ns[s, tokens]
                if d == rows:
                    counts.decode[d] += 1
                    counts.decode_context[d] += read
                else:
                    counts.sequences[rows] += 1
                    counts.attend[d] += 1
                    counts.attend_context[d] += read
                    counts.mixed[tokens] += 1
                state[BATCHES] += 1
                if log.on:
                    log_step_nb(log, replica, now, end, rows, preempted)
            elif log.on:
                log.at[2] -= preempted  # an empty batch leaves no record
            if rows == 0 and queued == 0 and preempted == 0:
                state[ERROR] = ERROR_STUCK
                break
            queue_end[newest] = end
            queue_size[newest] = rows
            queued += 1
            if rows > 0 and queued < depth and queue_end[oldest] > now:
                continue

        # The oldest batch finishes.
        if queue_end[oldest] > now:
            now = queue_end[oldest]
            state[LAST_ENDED] = 0
        row = queue_rows[oldest]
        gone = 0
        done = state[COMPLETE]
        for r in range(queue_size[oldest]):
            i = row[r] >> 1
            if row[r] & 1 == 0 or place[i] == DONE:
                continue
            if limits.asynchronous:
                in_flight[i] -= 1
            if generated[i] == 0:
                requests.first[i] = now
            generated[i] += 1
            if caching and limits.asynchronous and place[i] == RUNS:
                filled = computed[i] - in_flight[i]
                if filled >= (cache.registered[i] + 1) * bs:
                    register_nb(cache, lane, i, filled // bs)
            if generated[i] == limit[i]:
                if limits.policy == STATIC:
                    done += 1
                    continue
                if caching:
                    free += release_nb(cache, lane, i, blocks[i])
                else:
                    free += blocks[i]
                blocks[i] = 0
                if place[i] == RUNS:
                    gone += 1
                place[i] = DONE
                state[UNREPORTED] = 1  # the workers learn of it with the next batch, even an empty one
                answer_nb(requests, state, stops, i, now)
        if limits.policy == STATIC and done == n:
            for index in range(n):
                i = running[index]
                free += blocks[i]
                blocks[i] = 0
                place[i] = DONE
                state[UNREPORTED] = 1
                answer_nb(requests, state, stops, i, now)
            n = 0
            done = 0
        state[COMPLETE] = done
        if stops.passed[0] == 1:
            break
        if gone > 0:
            kept = 0
            for index in range(n):
                i = running[index]
                if place[i] == RUNS:
                    running[kept] = i
                    kept += 1
                elif caching:
                    gone -= 1
                    spare[n - 1 - gone] = cache.slot[i]
            n = kept
        oldest += 1
        if oldest == depth:
            oldest = 0
        queued -= 1

    state[NOW], state[FREE], state[RUNNING] = now, free, n
    state[STACK], state[NEXT] = stack, head
    state[QUEUE_HEAD], state[QUEUE_LENGTH] = oldest, queued


@compiled
def simulate_nb(
    general: int | None,
    routed: int,
    replicas: int,
    clients: int,
    limits: Limits,
    laws: Laws,
    requests: Requests,
    work: Work,
    cache: Cache,
    stops: Stops,
    counts: Counts,
    log: Log,
) -> None:
    """Run all replicas.

    Dealt: request i goes to replica i mod R, so the replicas run one after the other; with clients, each keeps to
    its replica. Routed: each request goes to the replica with the fewest unanswered ones when it arrives (ties: the
    lowest), so all replicas advance from arrival to arrival.

    `general` is None where the single-stage engine can run it, else 1. Compiled for None, the branch that calls the
    other engine is dropped, so that only engines in use are built, which takes seconds each.
    """
    arrivals = requests.arrival.shape[0] if routed else 0
    for turn in range(arrivals + 1):
        until = requests.arrival[turn] if turn < arrivals else NEVER
        best = 0
        least = NEVER
        for replica in range(replicas):
            state = work.state[replica]
            if cache.on == 1 and turn == 0:
                empty_cache_nb(cache, replica % work.ring.shape[0])
            if not routed:
                state[NEXT] = replica
                if clients > 0:
                    i = replica
                    while i != NONE and i < clients:
                        i = requests.following[i]
                    state[BACKLOG] = i
            if general is None:
                advance_single_nb(replica, until, limits, laws, requests, work, stops, counts, log)
            else:
                advance_queued_nb(replica, until, limits, laws, requests, work, cache, stops, counts, log)
            if stops.passed[0] == 1:
                return
            outstanding = state[SENT] - state[ENDED]
            if state[NOW] > until:
                outstanding += state[LAST_ENDED]  # answered only once the clock gets there
            if outstanding < least:
                least = outstanding
                best = replica
        if turn < arrivals:
            state = work.state[best]
            if state[NEXT] == NONE:
                state[NEXT] = turn
            else:
                requests.following[state[TAIL]] = turn
            state[TAIL] = turn
            state[SENT] += 1
