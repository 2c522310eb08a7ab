"""Attention ranks of TensorRT-LLM: `reference.trtllm_ranks`, ranks that take their turns together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import (
    batch_ns_nb,
    chunk_ns_nb,
    column_nb,
    count_batch_nb,
    law_nb,
    log_taken_nb,
    log_together_nb,
)
from apex_opt.simulator.kernel.coordinator import link_nb
from apex_opt.simulator.kernel.forwards import end_nb, submit_nb
from apex_opt.simulator.kernel.group_state import (
    ADP_BALANCE,
    ADP_BATCHING,
    ADP_TIMEOUT,
    AFTER,
    CLOCK,
    COMING,
    COUNT,
    DECODING,
    DUMMIES,
    FIRST_RANK,
    GROUP_SIZE,
    MEMBER_SIZE,
    OWN_AT,
    PROMPTS,
    SERVED_BY,
    SERVED_IN,
    WAITED_FOR_SOME,
    WAITED_ON,
    Group,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.reuse import empty_reuse_nb
from apex_opt.simulator.kernel.speculative import drafted_ns_nb
from apex_opt.simulator.kernel.stages import launching_nb, newest_nb, queued_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ASKING_SIZE,
    BATCH_DECODES,
    BATCH_LOST,
    BATCH_ROWS,
    COMPUTED,
    DEPTH,
    DRAFTS,
    ENTERING_AT,
    ERROR,
    ERROR_STUCK,
    GETS,
    LOST,
    MAX_SEQS,
    NEVER,
    NONE,
    NOW,
    PASSED,
    PLACE,
    PREEMPTIONS,
    PROMPT,
    PROMPTS_AT,
    QUEUE_AT,
    QUEUE_HEAD,
    QUEUED,
    REPLICA_SIZE,
    RUNNING,
    RUNNING_AT,
    RUNS,
    STAGES,
    Run,
)
from apex_opt.simulator.kernel.together import follow_nb, serving
from apex_opt.simulator.kernel.trtllm import (
    activate_nb,
    enter_all_nb,
    fetched_nb,
    take_in_nb,
    wait_on_nb,
)
from apex_opt.simulator.kernel.trtllm_choose import choose_nb

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Cache


@inner
def rank_nb(run: Run, rank: int) -> I64:
    """The row of a rank."""
    return at(run.replicas, rank * REPLICA_SIZE)


@inner
def tokens_nb(run: Run, r: I64) -> int:
    """Prompt tokens of the active requests of a rank."""
    running, prompt, tokens = at(run.scratch, r[RUNNING_AT]), column_nb(run, PROMPT), 0
    for index in range(r[RUNNING]):
        tokens += prompt[running[index]]
    return tokens


@inner
def deal_nb(run: Run, group: Group, g: I64, place: int) -> None:
    """Longest prompts first, each to the rank with the fewest prompt tokens of those below the mean load."""
    arrival, prompt, places = column_nb(run, ARRIVAL), column_nb(run, PROMPT), column_nb(run, PLACE)
    after, first, count = link_nb(run, group, AFTER), g[FIRST_RANK], g[COUNT]
    lead, active, taken, i = rank_nb(run, first), 0, 0, g[COMING]
    for rank in range(first, first + count):
        active += rank_nb(run, rank)[RUNNING]
    seats = lead[MAX_SEQS] * lead[STAGES] * count
    while i != NONE and arrival[i] <= g[CLOCK] and active + taken < seats:
        taken += 1
        i = after[i]
    mean = (active + taken + count - 1) // count
    for _ in range(taken):
        longest, chosen, i = -1, NONE, g[COMING]
        for _ in range(taken):
            if places[i] != RUNS and prompt[i] > longest:
                longest, chosen = prompt[i], i
            i = after[i]
        best, fewest, least = NONE, NEVER, NEVER
        for rank in range(first, first + count):
            r = rank_nb(run, rank)
            if r[RUNNING] >= mean:
                continue
            tokens = tokens_nb(run, r)
            if tokens < fewest or (tokens == fewest and r[RUNNING] < least):
                best, fewest, least = rank, tokens, r[RUNNING]
        activate_nb(run, rank_nb(run, best), chosen)
        link_nb(run, group, SERVED_BY)[chosen], link_nb(run, group, SERVED_IN)[chosen] = best - first, place + 1
    for _ in range(taken):
        g[COMING] = after[g[COMING]]


@inner
def all_wait_nb(run: Run, group: Group, g: I64) -> bool:
    """Whether prompts are held back, by how many decode and how many prompts there are on each rank."""
    all_decode, all_have = True, True
    for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
        m, r = at(group.members, rank * MEMBER_SIZE), rank_nb(run, rank)
        waiting, prompts = at(run.scratch, r[PROMPTS_AT]), 0
        for place in range(m[PROMPTS]):
            prompts += waiting[ASKING_SIZE * place + GETS] > 0
        all_decode = all_decode and m[DECODING] > 0
        all_have = all_have and m[DECODING] < r[MAX_SEQS] and prompts > 0
    if all_have:
        g[WAITED_FOR_SOME] = 0
        if not all_decode:
            return False
        if g[WAITED_ON] < g[ADP_BATCHING]:
            g[WAITED_ON] += 1
            return True
        g[WAITED_ON] = 0
        return False
    g[WAITED_FOR_SOME] += 1
    if g[WAITED_FOR_SOME] >= g[ADP_TIMEOUT] or not all_decode:
        g[WAITED_FOR_SOME] = 0
        return False
    return True


@inner
def form_together_nb(run: Run, cache: Cache | None, group: Group, g: I64) -> int:
    """Form the batch of each rank; rows of all of them and requests that gave way."""
    first, count, work = g[FIRST_RANK], g[COUNT], 0
    for rank in range(first, first + count):
        m, r = at(group.members, rank * MEMBER_SIZE), rank_nb(run, rank)
        r[NOW] = g[CLOCK]
        m[DECODING], m[PROMPTS] = choose_nb(run, cache, r)
    held = g[ADP_BALANCE] == 1 and all_wait_nb(run, group, g)
    for rank in range(first, first + count):
        m, r = at(group.members, rank * MEMBER_SIZE), rank_nb(run, rank)
        enter_all_nb(run, cache, r, m[DECODING], 0 if held else m[PROMPTS])
        r[PREEMPTIONS] += r[BATCH_LOST]
        work += r[BATCH_ROWS] + r[BATCH_LOST]
    return work


@inner
def own_nb(run: Run, group: Group, r: I64, m: I64) -> None:
    """What the batch of a rank takes of its own time on each stage; it is counted."""
    if r[DRAFTS] > 0:
        group.memory[m[OWN_AT]] = drafted_ns_nb(run, r)
        return
    count_batch_nb(run, r)
    batch, tokens = queued_nb(run, r, newest_nb(r)), at(run.scratch, r[ENTERING_AT])
    computed = column_nb(run, COMPUTED)
    for s in range(r[STAGES]):
        law, chunks_ns = law_nb(run, r, s), 0
        if r[BATCH_DECODES] < r[BATCH_ROWS]:
            for row in range(r[BATCH_ROWS]):
                if tokens[row] > 1:
                    chunks_ns += chunk_ns_nb(law, r, tokens[row], computed[batch[row] >> 1])
        group.memory[m[OWN_AT] + s] = batch_ns_nb(law, r, chunks_ns)


@inner
def run_together_nb(run: Run, group: Group, g: I64) -> int:
    """Run what the ranks have formed as one forward, where any has a batch; how many rows."""
    first, count, rows, lost_at = g[FIRST_RANK], g[COUNT], 0, run.control[LOST]
    for rank in range(first, first + count):
        rows += rank_nb(run, rank)[BATCH_ROWS]
        lost_at -= rank_nb(run, rank)[BATCH_LOST]
    end, number, launching = g[CLOCK], NONE, 0
    if rows > 0:
        for rank in range(first, first + count):
            m, r = at(group.members, rank * MEMBER_SIZE), rank_nb(run, rank)
            if r[BATCH_ROWS] > 0:
                own_nb(run, group, r, m)
                number = submit_nb(run, group, None, g, r, m, 0)
            else:
                number = submit_nb(run, group, None, g, r, m, 1)
                m[DUMMIES] += 1
        end = end_nb(group, g, rank_nb(run, first), at(group.members, first * MEMBER_SIZE), number)
    for rank in range(first, first + count):
        r = rank_nb(run, rank)
        lost_at = log_together_nb(run, r, rank, g[CLOCK], number, lost_at)
        newest = newest_nb(r)
        run.scratch[r[QUEUE_AT] + newest] = end
        run.scratch[r[QUEUE_AT] + r[DEPTH] + newest] = r[BATCH_ROWS]
        r[QUEUED] += 1
        launching = max(launching, launching_nb(r))
    g[CLOCK] += launching
    return rows


@inner
def take_in_together_nb(run: Run, cache: Cache | None, group: Group, g: I64) -> None:
    """The oldest batches finish."""
    clock = g[CLOCK]
    for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
        r = rank_nb(run, rank)
        r[NOW] = g[CLOCK]
        oldest = r[QUEUE_HEAD]
        if run.scratch[r[QUEUE_AT] + r[DEPTH] + oldest] > 0:
            log_taken_nb(run, rank, max(g[CLOCK], run.scratch[r[QUEUE_AT] + oldest]))
        take_in_nb(run, cache, r)
        clock = max(clock, r[NOW])
    g[CLOCK] = clock
    follow_nb(run, group, g)


@inner
def turns_nb(run: Run, group: Group, halves: None, cache: Cache | None, place: int, until: int) -> None:
    """Take every turn of a group that starts before `until`."""
    g, arrival = at(group.groups, place * GROUP_SIZE), column_nb(run, ARRIVAL)
    lead = rank_nb(run, g[FIRST_RANK])
    while True:
        coming, active = g[COMING], 0
        for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
            active += rank_nb(run, rank)[RUNNING]
        idle = active == 0 and (coming == NONE or arrival[coming] > g[CLOCK])
        if idle and lead[QUEUED] == 0:
            if coming == NONE or arrival[coming] >= NEVER:
                break
            g[CLOCK] = arrival[coming]
            idle = False
        start = g[CLOCK] if idle else fetched_nb(arrival, link_nb(run, group, AFTER), lead, coming, g[CLOCK])
        if start >= until:
            break
        if not idle:
            g[CLOCK] = start
            deal_nb(run, group, g, place)
            wait_on_nb(arrival, link_nb(run, group, AFTER), lead, g[COMING], start)
            if form_together_nb(run, cache, group, g) == 0 and lead[QUEUED] == 0:
                lead[ERROR] = ERROR_STUCK
                break
            rows = run_together_nb(run, group, g)
            if rows > 0 and lead[QUEUED] < lead[DEPTH]:
                continue
        take_in_together_nb(run, cache, group, g)
        if run.control[PASSED] == 1:
            break


@inner
def empty_nb(run: Run, cache: Cache | None, g: I64) -> None:
    """All blocks of all ranks free."""
    if cache is not None:
        for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
            empty_reuse_nb(cache, rank_nb(run, rank))


by_trtllm_nb = serving(turns_nb, empty_nb)
