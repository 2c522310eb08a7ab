"""Data-parallel ranks of one engine: `reference.group`, whoever is due first acting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel import general, speculative, steady
from apex_opt.simulator.kernel.batch import (
    batch_ns_nb,
    chunk_ns_nb,
    column_nb,
    count_batch_nb,
    law_nb,
    log_step_nb,
    log_taken_nb,
)
from apex_opt.simulator.kernel.blocks import empty_cache_nb
from apex_opt.simulator.kernel.coordinator import (
    arrive_nb,
    coordinator_acts_nb,
    event_nb,
    front_acts_nb,
    front_nb,
    link_nb,
    pass_silence_nb,
    start_nb,
    tell_nb,
)
from apex_opt.simulator.kernel.forwards import end_nb, returns_nb, submit_nb
from apex_opt.simulator.kernel.group_state import (
    AFTER,
    ANSWERED,
    CLOCK,
    CLOSED,
    COMING,
    COUNT,
    COUNTS,
    CROWDED,
    DUE,
    DUMMIES,
    ENDED_BEFORE,
    ENDS,
    EXCLUDED,
    EXECUTED,
    FIRST_RANK,
    FLYING,
    FLYING_AT,
    FLYING_HEAD,
    FRONT_DUE,
    FRONT_ENDS,
    GIVEN,
    GOES_ON,
    GROUP_SIZE,
    HEARD,
    HEARD_NS,
    HEARS,
    IN_STEP,
    LAST_COMING,
    MEMBER_SIZE,
    NUMBER,
    ORDER,
    OWN_AT,
    OWN_WAVE,
    RETURNS,
    RUNS_ON,
    SEND_NS,
    SLEEPS,
    STAMP,
    START_ORDER,
    START_TIME,
    START_WAVE,
    STARTS_IN,
    STARTS_OUT,
    STATE,
    STEP,
    TAKES,
    TOLD_DUE,
    TOLD_RUNNING,
    TOLD_WAITING,
    UNFINISHED,
    UNHEARD,
    VOTE,
    VOTED_ON,
    VOTES,
    VOTES_ON,
    WAITING_CLIENT,
    WANTS,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_groups import begin_nb, empty_groups_nb
from apex_opt.simulator.kernel.stages import newest_nb, queued_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    BATCH_CHUNKS_NS,
    BATCH_COMING,
    BATCH_DECODES,
    BATCH_LOST,
    BATCH_ROWS,
    BATCHES,
    COMPUTED,
    DEPTH,
    ENDED,
    ENTERED,
    ENTERING_AT,
    FLIGHT,
    FOLLOWING,
    NEVER,
    NONE,
    NOW,
    PASSED,
    PAUSE_NS,
    PREEMPTIONS,
    QUEUE_AT,
    QUEUE_HEAD,
    QUEUED,
    REPLICA_SIZE,
    RUNNING,
    SEATED,
    SIDE,
    SLEEP_NS,
    STAGES,
    UNREPORTED,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.group_state import Group, Halves
    from apex_opt.simulator.kernel.kv_state import Groups
    from apex_opt.simulator.kernel.state import I64, Cache, Run


# What the engines of one scheduler are asked for.


@inner
def form_steady_nb(run: Run, groups: Groups | None, r: I64, own: I64) -> None:
    """Form a batch, by the engine of one stage; what it takes of a rank's own time."""
    steady.give_way_nb(run, groups, r)
    steady.admit_nb(run, groups, r)
    if r[BATCH_ROWS] > 0:
        own[0] = batch_ns_nb(law_nb(run, r, 0), r, r[BATCH_CHUNKS_NS])
        count_batch_nb(run, r)
        steady.formed_nb(run, groups, r)


@inner
def keep_steady_nb(r: I64) -> None:
    """The batch that was formed stays in flight while the next one is formed."""
    r[FLIGHT] = 1
    r[SIDE] = 1 - r[SIDE]
    r[ENTERED] = r[BATCH_COMING]


@inner
def take_steady_nb(run: Run, groups: Groups | None, r: I64, end: int, empty: int) -> None:
    """Take in the oldest batch; an empty one leaves nothing to do."""
    if empty == 1:
        if r[BATCH_ROWS] > 0 and r[FLIGHT] == 0:
            keep_steady_nb(r)  # formed while an empty one was before it
        return
    ahead = 1 if r[FLIGHT] == 1 and r[BATCH_ROWS] > 0 else 0
    if r[FLIGHT] == 0:
        r[SIDE] = 1 - r[SIDE]
        r[ENTERED] = r[BATCH_COMING]
    steady.take_in_nb(run, groups, r, r[BATCHES] - ahead, end)
    r[ENTERED] = 0
    if ahead == 1:
        keep_steady_nb(r)
    else:
        r[FLIGHT] = 0


@inner
def runs_steady_nb(r: I64) -> int:
    """Requests that run."""
    running: int = r[SEATED]
    return running


@inner
def form_general_nb(run: Run, cache: Cache | None, r: I64, own: I64) -> None:
    """Form a batch, by the engine that walks the running sequences; what each stage takes of a rank's own time."""
    general.running_nb(run, cache, None, r)
    if r[BATCH_LOST] == 0:
        general.waiting_nb(run, cache, None, r)
    launch_general_nb(run, r, own, r[STAGES])


@inner
def form_halved_nb(run: Run, cache: Cache | None, r: I64, own: I64) -> None:
    """`form_general_nb`, with what each stage would take of a rank's own time in two halves behind that."""
    general.running_nb(run, cache, None, r)
    if r[BATCH_LOST] == 0:
        general.waiting_nb(run, cache, None, r)
    launch_general_nb(run, r, own, 2 * r[STAGES])


@inner
def form_grouped_nb(run: Run, groups: Groups, r: I64, own: I64) -> None:
    """`form_general_nb` over groups of layers."""
    begin_nb(groups, r)
    general.running_nb(run, None, groups, r)
    if r[BATCH_LOST] == 0:
        general.waiting_nb(run, None, groups, r)
    launch_general_nb(run, r, own, r[STAGES])


@inner
def launch_general_nb(run: Run, r: I64, own: I64, laws: int) -> None:
    """Put a batch in the queue; what it takes of a rank's own time by each of so many laws."""
    r[PREEMPTIONS] += r[BATCH_LOST]
    newest = newest_nb(r)
    run.scratch[r[QUEUE_AT] + r[DEPTH] + newest] = r[BATCH_ROWS]
    if r[BATCH_ROWS] > 0:
        batch, batch_tokens = queued_nb(run, r, newest), at(run.scratch, r[ENTERING_AT])
        computed = column_nb(run, COMPUTED)
        for s in range(laws):
            law, chunks_ns = law_nb(run, r, s), 0
            if r[BATCH_DECODES] < r[BATCH_ROWS]:
                for row in range(r[BATCH_ROWS]):
                    if batch_tokens[row] > 1:
                        chunks_ns += chunk_ns_nb(law, r, batch_tokens[row], computed[batch[row] >> 1])
            own[s] = batch_ns_nb(law, r, chunks_ns)
        count_batch_nb(run, r)
    r[QUEUED] += 1


@inner
def keep_general_nb(r: I64) -> None:
    """The batch that was formed stays in flight."""


@inner
def take_general_nb(run: Run, cache: Cache | None, r: I64, end: int, empty: int) -> None:
    """Take in the oldest batch."""
    run.scratch[r[QUEUE_AT] + r[QUEUE_HEAD]] = end
    general.take_in_nb(run, cache, None, r)


@inner
def take_grouped_nb(run: Run, groups: Groups, r: I64, end: int, empty: int) -> None:
    """`take_general_nb` over groups of layers."""
    run.scratch[r[QUEUE_AT] + r[QUEUE_HEAD]] = end
    general.take_in_nb(run, None, groups, r)


@inner
def form_drafting_nb(run: Run, cache: Cache | None, r: I64, own: I64) -> None:
    """Form a batch, by the engine that verifies drafts; what it takes of a rank's own time."""
    speculative.form_nb(run, cache, None, r, own)


@inner
def form_drafting_groups_nb(run: Run, groups: Groups, r: I64, own: I64) -> None:
    """`form_drafting_nb` over groups of layers."""
    speculative.form_nb(run, None, groups, r, own)


@inner
def take_drafting_nb(run: Run, cache: Cache | None, r: I64, end: int, empty: int) -> None:
    """Take in the oldest batch."""
    speculative.finish_nb(run, cache, None, r, end)


@inner
def take_drafting_groups_nb(run: Run, groups: Groups, r: I64, end: int, empty: int) -> None:
    """`take_drafting_nb` over groups of layers."""
    speculative.finish_nb(run, None, groups, r, end)


@inner
def runs_general_nb(r: I64) -> int:
    """Requests that run."""
    running: int = r[RUNNING]
    return running


# What all ranks do.


@inner
def hear_one_nb(run: Run, group: Group, g: I64, m: I64, rank: int) -> bool:
    """Take in the next message that has been delivered, a request or that a wave starts; whether there was one."""
    now, i = g[CLOCK], m[UNHEARD]
    request = NEVER
    if i != NONE:
        request = column_nb(run, ARRIVAL)[i] + g[SEND_NS]
    start, known = NEVER, start_nb(group, g, m[STARTS_OUT])
    if m[STARTS_OUT] < g[STARTS_IN]:
        start = known[START_TIME]
    if min(request, start) > now:
        m[DUE] = min(request, start)
        return False
    if request < start or (request == start and link_nb(run, group, ORDER)[i] < known[START_ORDER]):
        m[UNHEARD] = column_nb(run, FOLLOWING)[i]
        m[HEARD] += 1
        if g[IN_STEP] == 1:
            wave = link_nb(run, group, STAMP)[i]
            if wave > m[OWN_WAVE]:
                m[OWN_WAVE] = wave
            elif wave < m[OWN_WAVE] and m[RUNS_ON] == 0:
                m[RUNS_ON] = 1
                tell_nb(group, g, WANTS, rank, m[OWN_WAVE], 0, 0, 0)
        return True
    m[STARTS_OUT] += 1
    if known[EXCLUDED] != rank and known[START_WAVE] >= m[OWN_WAVE]:
        m[OWN_WAVE], m[RUNS_ON] = known[START_WAVE], 1
    return True


@inner
def follow_nb(run: Run, group: Group, g: I64, r: I64, m: I64) -> bool:
    """Requests were answered: in a closed loop as many clients send their next ones, before the rank goes on."""
    answered = r[ENDED] - m[ENDED_BEFORE]
    if answered == 0:
        return False
    m[ENDED_BEFORE] = r[ENDED]
    r[UNREPORTED] = 1
    g[ANSWERED] += answered
    for _ in range(answered):
        i = g[WAITING_CLIENT]
        if i != NONE:
            column_nb(run, ARRIVAL)[i] = g[CLOCK] + run.control[PAUSE_NS]
            g[WAITING_CLIENT] = link_nb(run, group, AFTER)[i]
            g[GIVEN] += 1
    return g[CLOSED] == 1


def acting(form_nb: Any, keep_nb: Any, take_nb: Any, runs_nb: Any, empty_nb: Any = empty_cache_nb) -> Any:
    """`group_nb` by an engine, given as the functions that form a batch, keep it in flight and take it in."""

    @inner
    def turn_nb(
        run: Run, cache: Cache | None, group: Group, halves: Halves | None, g: I64, r: I64, m: I64, rank: int
    ) -> int:
        """Form a batch and, unless there is room for another in flight, take in the oldest; in which state."""
        now, flying = g[CLOCK], at(group.memory, m[FLYING_AT])
        m[EXECUTED] = 0
        if m[HEARD] > r[ENDED] or r[UNREPORTED] == 1:
            r[UNREPORTED] = 0
            r[NOW] = m[HEARD_NS]
            form_nb(run, cache, r, at(group.memory, m[OWN_AT]))
            number = NONE
            if r[BATCH_ROWS] > 0:
                number = submit_nb(run, group, halves, g, r, m, 0)
                m[EXECUTED] = 1
            log_step_nb(run, r, g[FIRST_RANK] + rank, now, number)
            place = m[FLYING_HEAD] + m[FLYING]
            flying[place - r[DEPTH] if place >= r[DEPTH] else place] = number
            m[FLYING] += 1
            if m[EXECUTED] == 1 and m[FLYING] < r[DEPTH]:
                oldest = flying[m[FLYING_HEAD]]
                if oldest != NONE and end_nb(group, g, r, m, oldest) > now:
                    keep_nb(r)
                    return GOES_ON
        elif m[FLYING] == 0:
            return GOES_ON
        m[NUMBER] = flying[m[FLYING_HEAD]]
        m[FLYING_HEAD] = m[FLYING_HEAD] + 1 if m[FLYING_HEAD] + 1 < r[DEPTH] else 0
        m[FLYING] -= 1
        if m[NUMBER] == NONE:
            r[NOW] = now
            take_nb(run, cache, r, now, 1)
            return GOES_ON
        m[DUE] = end_nb(group, g, r, m, m[NUMBER])
        return TAKES

    @inner
    def in_step_nb(run: Run, group: Group, halves: Halves | None, g: I64, r: I64, m: I64, rank: int) -> int:
        """Tell the loads, and run a dummy batch where there is none of its own; in which state."""
        running = runs_nb(r)
        waiting = m[HEARD] - r[ENDED] - running
        if running != m[TOLD_RUNNING] or waiting != m[TOLD_WAITING]:
            m[TOLD_RUNNING], m[TOLD_WAITING] = running, waiting
            tell_nb(group, g, COUNTS, rank, m[OWN_WAVE], m[STEP], waiting, running)
        m[UNFINISHED] = 1 if m[HEARD] > r[ENDED] else 0
        if m[EXECUTED] == 1:
            return RETURNS
        if m[UNFINISHED] == 0 and m[RUNS_ON] == 0:
            return HEARS
        m[NUMBER] = submit_nb(run, group, halves, g, r, m, 1)
        m[DUMMIES] += 1
        m[DUE] = returns_nb(group, g, r, m, m[NUMBER])
        return RETURNS

    @inner
    def vote_nb(group: Group, g: I64, m: I64) -> None:
        """Say whether there are requests left; the last to say so lets the others go on."""
        g[VOTES] += 1
        g[VOTED_ON] = max(g[VOTED_ON], m[UNFINISHED])
        m[DUE] = NEVER
        if g[VOTES] < g[COUNT]:
            return
        m[RUNS_ON] = g[VOTED_ON]
        for other in range(g[COUNT]):
            its = at(group.members, (g[FIRST_RANK] + other) * MEMBER_SIZE)
            if its[STATE] == VOTES_ON:
                its[DUE] = g[CLOCK]
            its[RUNS_ON] = g[VOTED_ON]  # nobody reads it before it goes on
        g[VOTES], g[VOTED_ON] = 0, 0

    @inner
    def voted_nb(run: Run, group: Group, g: I64, m: I64, place: int, rank: int) -> None:
        """All have voted: where none has requests left the wave ends."""
        if m[RUNS_ON] == 1:
            return
        if rank == 0:
            event_nb(run, group, place, g[CLOCK], m[OWN_WAVE], NONE, 1)
            tell_nb(group, g, ENDS, rank, m[OWN_WAVE], 0, 0, 0)
        m[OWN_WAVE] += 1
        m[STEP] = 0

    @inner
    def rank_acts_nb(
        run: Run, cache: Cache | None, group: Group, halves: Halves | None, g: I64, place: int, rank: int
    ) -> None:
        """A rank goes on until it has to wait."""
        r = at(run.replicas, (g[FIRST_RANK] + rank) * REPLICA_SIZE)
        m = at(group.members, (g[FIRST_RANK] + rank) * MEMBER_SIZE)
        now, state = g[CLOCK], m[STATE]
        while True:
            if state == HEARS:
                while not (m[RUNS_ON] == 1 or m[HEARD] > r[ENDED] or r[UNREPORTED] == 1 or m[FLYING] > 0):
                    if not hear_one_nb(run, group, g, m, rank):
                        m[STATE] = HEARS
                        return
                while hear_one_nb(run, group, g, m, rank):
                    pass
                m[HEARD_NS] = now - g[SEND_NS]
                state = turn_nb(run, cache, group, halves, g, r, m, rank)
                m[STATE] = state
                if state == TAKES and m[DUE] > now:
                    return
            if state == TAKES:
                r[NOW] = now
                log_taken_nb(run, g[FIRST_RANK] + rank, now)
                take_nb(run, cache, r, now, 0)
                state = GOES_ON
                if follow_nb(run, group, g, r, m):
                    m[STATE], m[DUE] = GOES_ON, now
                    return
            if state == GOES_ON:
                state = SLEEPS
                if m[EXECUTED] == 0 and m[HEARD] > r[ENDED] and r[SLEEP_NS] > 0:
                    m[STATE], m[DUE] = SLEEPS, now + r[SLEEP_NS]
                    return
            if state == SLEEPS:
                state = HEARS
                if g[IN_STEP] == 1:
                    state = in_step_nb(run, group, halves, g, r, m, rank)
                    if state == RETURNS and m[EXECUTED] == 0 and m[DUE] > now:
                        m[STATE] = RETURNS
                        return
            if state == RETURNS:
                m[STEP] += 1
                m[RUNS_ON] = 1
                state = HEARS
                if m[STEP] % VOTE == 0:
                    m[STATE] = RETURNS
                    vote_nb(group, g, m)
                    if g[VOTES] > 0:
                        m[STATE] = VOTES_ON
                        return
                    state = VOTES_ON
            if state == VOTES_ON:
                voted_nb(run, group, g, m, place, rank)
                state = HEARS

    @inner
    def group_nb(run: Run, cache: Cache | None, group: Group, halves: Halves | None, place: int, until: int) -> None:
        """Let whoever is due first act, as long as that is before `until`."""
        g = at(group.groups, place * GROUP_SIZE)
        arrival, count = column_nb(run, ARRIVAL), g[COUNT]
        while True:
            coming = arrival[g[COMING]] if g[COMING] != NONE else NEVER
            if coming >= NEVER and g[ANSWERED] == g[GIVEN] and idle_nb(group, g):
                return
            due, actor = NEVER, NONE
            if count > 1:
                due, actor = g[TOLD_DUE], 0
            for index in range(g[FRONT_ENDS]):
                its = front_nb(group, g, index)[FRONT_DUE]
                if its < due:
                    due, actor = its, 1 + index
            if coming < due:
                due, actor = coming, 1 + g[FRONT_ENDS]
            members = at(group.members, g[FIRST_RANK] * MEMBER_SIZE)
            for rank in range(count):
                its = members[rank * MEMBER_SIZE + DUE]
                if its < due:
                    due, actor = its, 2 + g[FRONT_ENDS] + rank
            due = max(due, g[CLOCK])
            if due >= until or actor == NONE:
                return
            g[CLOCK] = due
            if actor > 1 + g[FRONT_ENDS]:
                rank_acts_nb(run, cache, group, halves, g, place, actor - 2 - g[FRONT_ENDS])
            elif actor == 1 + g[FRONT_ENDS]:
                arrive_nb(run, group, g, place)
            elif actor == 0:
                coordinator_acts_nb(run, group, g, place)
                if idle_nb(group, g):
                    pass_silence_nb(run, group, g, min(coming, until))
            else:
                front_acts_nb(group, g, front_nb(group, g, actor - 1))
            if run.control[PASSED] == 1 or group.told[CROWDED] == 1:
                return

    @inner
    def serve_nb(
        run: Run,
        cache: Cache | None,
        group: Group,
        halves: Halves | None,
        first: int,
        last: int,
        routed: I64,
        turns: int,
    ) -> None:
        """Run groups `first` to `last` - 1; requests as for `deployment.serving`."""
        arrival, after = column_nb(run, ARRIVAL), link_nb(run, group, AFTER)
        for turn in range(turns + 1):
            until = arrival[routed[turn]] if turn < turns else NEVER
            best, least = first, NEVER
            for place in range(first, last):
                g = at(group.groups, place * GROUP_SIZE)
                if cache is not None and turn == 0:
                    for rank in range(g[COUNT]):
                        empty_nb(cache, at(run.replicas, (g[FIRST_RANK] + rank) * REPLICA_SIZE))
                group_nb(run, cache, group, halves, place, until)
                if run.control[PASSED] == 1:
                    return
                if g[GIVEN] - g[ANSWERED] < least:
                    best, least = place, g[GIVEN] - g[ANSWERED]
            if turn < turns:
                g = at(group.groups, best * GROUP_SIZE)
                if g[COMING] == NONE:
                    g[COMING] = routed[turn]
                else:
                    after[g[LAST_COMING]] = routed[turn]
                g[LAST_COMING] = routed[turn]
                g[GIVEN] += 1

    return serve_nb


@inner
def idle_nb(group: Group, g: I64) -> bool:
    """Whether every rank waits for a message and none is on its way to one."""
    for rank in range(g[COUNT]):
        m = at(group.members, (g[FIRST_RANK] + rank) * MEMBER_SIZE)
        if m[STATE] != HEARS or m[DUE] < NEVER:
            return False
    return True


by_steady_nb = acting(form_steady_nb, keep_steady_nb, take_steady_nb, runs_steady_nb)
by_general_nb = acting(form_general_nb, keep_general_nb, take_general_nb, runs_general_nb)
by_halves_nb = acting(form_halved_nb, keep_general_nb, take_general_nb, runs_general_nb)
by_steady_groups_nb = acting(form_steady_nb, keep_steady_nb, take_steady_nb, runs_steady_nb, empty_groups_nb)
by_speculative_nb = acting(form_drafting_nb, keep_general_nb, take_drafting_nb, runs_general_nb)
by_speculative_groups_nb = acting(
    form_drafting_groups_nb, keep_general_nb, take_drafting_groups_nb, runs_general_nb, empty_groups_nb
)
by_general_groups_nb = acting(form_grouped_nb, keep_general_nb, take_grouped_nb, runs_general_nb, empty_groups_nb)
