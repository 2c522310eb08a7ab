"""Attention ranks of SGLang: `reference.sglang_ranks`, ranks that take their turns together.

What verifies drafts is told by `drafting`, None where nothing does, so that what the other needs is not compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import (
    by_sequences_nb,
    by_tokens_nb,
    column_nb,
    count_batch_nb,
    law_nb,
    log_taken_nb,
    log_together_nb,
)
from apex_opt.simulator.kernel.coordinator import link_nb
from apex_opt.simulator.kernel.forwards import halves_ns_nb
from apex_opt.simulator.kernel.group_state import (
    AFTER,
    ALL,
    ARRIVED,
    BALANCED,
    CLOCK,
    COMING,
    COUNT,
    FIRST_RANK,
    FORWARD_END,
    FORWARD_LANE,
    FORWARD_MODE,
    FORWARD_ROWS,
    FORWARD_SIZE,
    FORWARD_START,
    FORWARDS,
    GROUP_SIZE,
    HALVES_COUNTED_AT,
    HEARD,
    LANE_DONE,
    LEAST_DECODE,
    LEAST_PROMPT,
    MEMBER_SIZE,
    MOST_FORWARDS,
    OF_DRAFTS,
    PER,
    SERVED_BY,
    SERVED_IN,
    TABLES_AT,
    TOGETHER_AT,
    WIDE,
    Group,
    Halves,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.sglang import (
    begin_nb,
    choose_nb,
    engine_nb,
    flight_nb,
    looks_nb,
    own_ns_nb,
    pass_nb,
    receive_nb,
    slot_nb,
)
from apex_opt.simulator.kernel.sglang_drafts import choose_nb as choose_drafting_nb
from apex_opt.simulator.kernel.sglang_drafts import receive_nb as receive_drafts_nb
from apex_opt.simulator.kernel.sglang_state import (
    ERROR_NODES,
    F_END,
    F_PROMPTS,
    F_ROWS,
    G_BEGUN,
    G_CHUNKED,
    G_IDLE,
    G_NODES_A_TURN,
    G_SLOTS,
    G_SPARE_NODES,
    G_TURNS,
    G_WAIT_AT,
    G_WAIT_HEAD,
    G_WAIT_MASK,
    G_WAIT_TAIL,
    NOTHING,
    R_RATIO,
    R_START,
    S_LAST,
    S_LEFT,
    S_RUNNING,
    Engine,
    Sglang,
    Tree,
)
from apex_opt.simulator.kernel.speculative import drafted_ns_nb
from apex_opt.simulator.kernel.stages import launching_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    BATCH_DECODES,
    BATCH_MADE,
    BATCH_ROWS,
    BATCH_TOKENS,
    DECODE_NS,
    DEPTH,
    ENDED,
    ERROR,
    FIRST_STAGE,
    LOGGED,
    LOST,
    MAX_SEQS,
    MAX_TOKENS,
    MIXED_NS,
    NEVER,
    NONE,
    NOW,
    PASSED,
    REPLICA_SIZE,
    STAGE_BUSY,
    STAGE_FREE,
    STAGE_SIZE,
    STAGES,
    TRANSFER_NS,
    Run,
)
from apex_opt.simulator.kernel.together import follow_nb, serving

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64


@inner
def deal_nb(run: Run, group: Group, own: Sglang, g: I64, place: int) -> None:
    """Hand those that have come over to ranks: in turn, or to the one that has the fewest."""
    arrival, count = column_nb(run, ARRIVAL), g[COUNT]
    while g[COMING] != NONE and arrival[g[COMING]] <= g[CLOCK]:
        i, rank = g[COMING], g[ARRIVED] % g[COUNT]
        if g[BALANCED] == 1:
            least = NEVER
            for other in range(count):
                row = g[FIRST_RANK] + other
                has = group.members[row * MEMBER_SIZE + HEARD] - run.replicas[row * REPLICA_SIZE + ENDED]
                if has < least:
                    rank, least = other, has
        row = g[FIRST_RANK] + rank
        e = engine_nb(run, own, row)
        run.scratch[e.g[G_WAIT_AT] + (e.g[G_WAIT_TAIL] & e.g[G_WAIT_MASK])] = i
        e.g[G_WAIT_TAIL] += 1
        group.members[row * MEMBER_SIZE + HEARD] += 1
        link_nb(run, group, SERVED_BY)[i], link_nb(run, group, SERVED_IN)[i] = rank, place + 1
        g[ARRIVED] += 1
        g[COMING] = link_nb(run, group, AFTER)[i]


@inner
def rank_ns_nb(run: Run, e: Engine, s: int, drafting: int | None) -> int:
    """What the batch that a rank has formed, or none, takes of its own on a stage; one with drafts is counted."""
    law = law_nb(run, e.r, s)
    if drafting is None:
        return own_ns_nb(e, flight_nb(e, e.g[G_TURNS]), law)
    if e.r[BATCH_ROWS] > 0:
        return drafted_ns_nb(run, e.r)
    nothing: int = by_sequences_nb(law, e.r, DECODE_NS)[0] + at(by_tokens_nb(law, e.r, MIXED_NS, 9), 1)[0]
    return nothing


@inner
def forward_nb(run: Run, group: Group, halves: Halves | None, own: Sglang, g: I64, drafting: int | None) -> int:
    """Run the batches that the ranks have formed as one forward; when that ends."""
    first, count, tables = g[FIRST_RANK], g[COUNT], at(group.tables, g[TABLES_AT])
    r0 = at(run.replicas, first * REPLICA_SIZE)
    entries = r0[MAX_TOKENS] + 1
    sequences = r0[MAX_SEQS] + 1 if drafting is None else entries  # batches of drafts are padded by their tokens
    mode, most, longest, tokens, mixed, drafted, makes = 3, 0, 0, 0, 0, 0, 0
    split = 0
    if halves is not None:
        split = vote_nb(run, g)
    for rank in range(first, first + count):
        r = at(run.replicas, rank * REPLICA_SIZE)
        if drafting is not None:
            drafted, makes = drafted + r[BATCH_ROWS], max(makes, r[BATCH_MADE])
        if r[BATCH_DECODES] == r[BATCH_ROWS]:
            alone = r[BATCH_ROWS] if drafting is None else r[BATCH_TOKENS]
            its, rows = tables[alone], tables[sequences + alone]
        else:
            entry = 2 * sequences + r[BATCH_TOKENS]
            its, rows, mixed = tables[entry], tables[entry + entries], 1
        mode, most = min(mode, its), max(most, rows)
        tokens, longest = tokens + r[BATCH_TOKENS], max(longest, r[BATCH_TOKENS])
    law = at(tables, 2 * (sequences + entries))
    padded = tokens if mode == 0 else most * count
    widest = longest if mode == 0 else most
    entry, drafted = (padded + g[PER] - 1) // g[PER], (drafted + g[PER] - 1) // g[PER]
    makes = makes if g[OF_DRAFTS] > 0 else 0
    began, end = 0, g[CLOCK]
    for s in range(r0[STAGES]):
        table = at(law, s * (g[WIDE] + 3 * g[ALL] + 3 + g[OF_DRAFTS]))
        together, slowest = at(table, g[WIDE] + mixed * g[ALL]), 0
        for rank in range(first, first + count):
            e = engine_nb(run, own, rank)
            mine = rank_ns_nb(run, e, s, drafting)
            slowest = max(slowest, mine + table[e.r[BATCH_TOKENS] if mode == 0 else most])
        duration = at(table, g[WIDE] + 3 * g[ALL])[mode] + together[entry] + slowest
        if mixed == 1 and mode == 0:
            duration += together[g[ALL] + entry]
        if makes == 1:
            duration += table[g[WIDE] + 3 * g[ALL] + 3 + drafted]
        if halves is not None:  # noqa: SIM102  # it is left out of what is compiled where there are none
            if split == 1:
                duration = at(table, g[WIDE] + 3 * g[ALL])[mode]
                duration += halved_nb(run, halves, own, g, s, entry, mixed)
        stage = at(run.stages, (r0[FIRST_STAGE] + s) * STAGE_SIZE)
        start = max(end, stage[STAGE_FREE])
        if s == 0:
            began = start
        end = start + duration
        stage[STAGE_FREE] = end
        stage[STAGE_BUSY] += duration
        if s + 1 < r0[STAGES]:
            end += by_tokens_nb(law_nb(run, r0, s), r0, MIXED_NS, TRANSFER_NS)[min(widest, r0[MAX_TOKENS])]
    counts = at(group.together, g[TOGETHER_AT] + mixed * g[ALL])
    counts[entry] += 1
    if mixed == 1 and mode == 0 and split == 0:
        counts[g[ALL] + entry] += 1
    if makes == 1:
        group.together[g[TOGETHER_AT] + 3 * g[ALL] + drafted] += 1
    if halves is not None:
        halves.counts[g[HALVES_COUNTED_AT] + mixed * g[ALL] + entry] += split
    tell_forward_nb(run, group, g, began, end, mode, padded)
    return end


@inner
def vote_nb(run: Run, g: I64) -> int:
    """Whether the forward is split: where all ranks that have a batch either decode or compute prompts."""
    decode, prompts, unwilling = 0, 0, 0
    for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
        r = at(run.replicas, rank * REPLICA_SIZE)
        if r[BATCH_ROWS] == 0:
            continue
        least = g[LEAST_DECODE]
        if r[BATCH_DECODES] == r[BATCH_ROWS]:
            decode = 1
        else:
            prompts, least = 1, g[LEAST_PROMPT]
        if r[BATCH_TOKENS] < least:
            unwilling = 1
    return 1 if decode + prompts == 1 and unwilling == 0 else 0


@inner
def halved_nb(run: Run, halves: Halves, own: Sglang, g: I64, stage: int, entry: int, mixed: int) -> int:
    """What a stage takes of a forward in two halves."""
    most, rows = 0, 0
    for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
        e = engine_nb(run, own, rank)
        law = law_nb(run, e.r, e.r[STAGES] + stage)
        most, rows = max(most, own_ns_nb(e, flight_nb(e, e.g[G_TURNS]), law)), max(rows, e.r[BATCH_ROWS])
    return halves_ns_nb(halves, g, at(run.replicas, g[FIRST_RANK] * REPLICA_SIZE), stage, entry, mixed, rows, most)


@inner
def tell_forward_nb(run: Run, group: Group, g: I64, began: int, end: int, mode: int, padded: int) -> None:
    """Log a forward, where batches are logged."""
    if run.control[LOGGED] == 0:
        return
    place = group.told[FORWARDS]
    if place < group.told[MOST_FORWARDS]:
        told = at(group.forwards, place * FORWARD_SIZE)
        told[FORWARD_LANE], told[FORWARD_START], told[FORWARD_END] = g[FIRST_RANK], began, end
        told[FORWARD_MODE], told[FORWARD_ROWS] = mode, padded
    group.told[FORWARDS] = place + 1


@inner
def form_together_nb(
    run: Run, group: Group, halves: Halves | None, own: Sglang, tree: Tree | None, g: I64, drafting: int | None
) -> None:
    """Form the batch of each rank, and run them where any has one."""
    first, count = g[FIRST_RANK], g[COUNT]
    rows, prompts, launching, lost_at = 0, 0, 0, run.control[LOST]
    for rank in range(first, first + count):
        e = engine_nb(run, own, rank)
        e.r[NOW] = g[CLOCK]
        if drafting is None:
            choose_nb(e, own, tree)
        else:
            choose_drafting_nb(e, own, tree)
        rows += e.r[BATCH_ROWS]
    end = g[CLOCK]
    if rows > 0:
        end = forward_nb(run, group, halves, own, g, drafting)
    lane = at(group.members, first * MEMBER_SIZE)
    for rank in range(first, first + count):
        e = engine_nb(run, own, rank)
        flight_nb(e, e.g[G_TURNS])[F_END] = end
        if drafting is None and e.r[BATCH_ROWS] > 0:
            count_batch_nb(run, e.r)
        lost_at = log_together_nb(run, e.r, rank, g[CLOCK], lane[LANE_DONE], lost_at)
        launching = max(launching, launching_nb(e.r))
        prompts += flight_nb(e, e.g[G_TURNS])[F_PROMPTS]
        e.g[G_TURNS] += 1
    g[CLOCK] += launching
    pass_nb(engine_nb(run, own, first).g, prompts)
    if rows > 0:
        lane[LANE_DONE] += 1
        engine_nb(run, own, first).g[G_IDLE] = 0


@inner
def rows_nb(run: Run, own: Sglang, g: I64, turn: int) -> int:
    """Rows of all batches that were formed in a turn."""
    rows = 0
    for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
        rows += flight_nb(engine_nb(run, own, rank), turn)[F_ROWS]
    return rows


@inner
def rest_nb(e: Engine, own: Sglang) -> None:
    """There is nothing to run and nothing in flight: a rank where nobody waits keeps as much room as at first."""
    g = e.g
    if g[G_WAIT_HEAD] != g[G_WAIT_TAIL] or g[G_CHUNKED] != NONE:
        return
    for slot in range(g[G_SLOTS]):
        s = slot_nb(own, g, slot)
        if s[S_RUNNING] > s[S_LEFT] or s[S_LAST] != NOTHING:
            return
    e.ratio[R_RATIO] = e.ratio[R_START]


@inner
def take_in_together_nb(run: Run, group: Group, own: Sglang, tree: Tree | None, g: I64, drafting: int | None) -> None:
    """Take in the oldest batches in flight, if the turn that formed them formed any."""
    first, count = g[FIRST_RANK], g[COUNT]
    lead = engine_nb(run, own, first)
    turn = lead.g[G_TURNS] - lead.r[DEPTH]
    if rows_nb(run, own, g, turn) == 0:
        idle = 1
        for later in range(turn + 1, lead.g[G_TURNS]):
            if rows_nb(run, own, g, later) > 0:
                idle = 0
        lead.g[G_IDLE] = idle
        if idle == 1:
            for rank in range(first, first + count):
                rest_nb(engine_nb(run, own, rank), own)
        return
    end = flight_nb(lead, turn)[F_END]
    for rank in range(first, first + count):
        e = engine_nb(run, own, rank)
        e.r[NOW] = max(end, g[CLOCK])
        f = flight_nb(e, turn)
        if f[F_ROWS] > 0:
            log_taken_nb(run, rank, e.r[NOW])
        if drafting is None:
            receive_nb(e, tree, slot_nb(own, e.g, turn % e.g[G_SLOTS]), f)
        else:
            receive_drafts_nb(e, tree, slot_nb(own, e.g, 0), f)
    g[CLOCK] = max(end, g[CLOCK])
    follow_nb(run, group, g)


@inner
def turns_nb(
    run: Run,
    group: Group,
    halves: Halves | None,
    own: Sglang,
    tree: Tree | None,
    place: int,
    until: int,
    drafting: int | None,
) -> None:
    """Take every turn of a group that starts before `until`."""
    g, arrival = at(group.groups, place * GROUP_SIZE), column_nb(run, ARRIVAL)
    first, count = g[FIRST_RANK], g[COUNT]
    lead = engine_nb(run, own, first)
    if lead.g[G_BEGUN] == 0:
        for rank in range(first, first + count):
            begin_nb(engine_nb(run, own, rank), own, tree)
    while lead.r[ERROR] == 0:
        if lead.g[G_IDLE] == 1:
            coming = g[COMING]
            if coming == NONE or arrival[coming] >= NEVER:
                break
            g[CLOCK] = max(g[CLOCK], arrival[coming])
        if g[CLOCK] >= until:
            break
        for rank in range(first, first + count):
            e = engine_nb(run, own, rank)
            if e.g[G_SPARE_NODES] < e.g[G_NODES_A_TURN]:
                lead.r[ERROR] = ERROR_NODES
                return
        if looks_nb(lead.g) == 1:
            deal_nb(run, group, own, g, place)
        form_together_nb(run, group, halves, own, tree, g, drafting)
        if lead.g[G_TURNS] >= lead.r[DEPTH]:
            take_in_together_nb(run, group, own, tree, g, drafting)
        if run.control[PASSED] == 1:
            break


@inner
def plain_turns_nb(
    run: Run, group: Group, halves: Halves | None, its: tuple[Sglang, Tree | None], place: int, until: int
) -> None:
    """Take the turns of ranks that verify no drafts."""
    own, tree = its
    turns_nb(run, group, halves, own, tree, place, until, None)


@inner
def drafting_turns_nb(
    run: Run, group: Group, halves: Halves | None, its: tuple[Sglang, Tree | None], place: int, until: int
) -> None:
    """Take the turns of ranks that verify drafts."""
    own, tree = its
    turns_nb(run, group, None, own, tree, place, until, 1)


by_sglang_nb, by_drafts_nb = serving(plain_turns_nb), serving(drafting_turns_nb)
