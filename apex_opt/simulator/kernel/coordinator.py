"""Front ends and coordinator of data-parallel ranks: `reference.coordinator` over rings of messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.group_state import AFTER as GROUP_AFTER
from apex_opt.simulator.kernel.group_state import (
    ARRIVED,
    ASIDE,
    BALANCED,
    CHANGED,
    CHANGED_MS,
    CLOCK,
    COMING,
    CONTROL_NS,
    COUNT,
    COUNTS,
    CROWDED,
    DUE,
    ENDS,
    EVENT_ENDS,
    EVENT_EXCLUDED,
    EVENT_GROUP,
    EVENT_SIZE,
    EVENT_TIME,
    EVENT_WAVE,
    EVENTS,
    EXCLUDED,
    FIRST_AT,
    FIRST_FOR,
    FIRST_MESSAGE,
    FIRST_RANK,
    FIRST_RANK_,
    FIRST_TIME,
    FIRST_WAVE,
    FIRSTS_AT,
    FIRSTS_IN,
    FIRSTS_OUT,
    FRONT_DUE,
    FRONT_ENDS,
    FRONT_SIZE,
    FRONTS_AT,
    HEARD_AT,
    HEARD_IN,
    HEARD_MESSAGE,
    HEARD_OUT,
    HEARD_TIME,
    HEARS,
    IN_STEP,
    ITS_RUNNING,
    ITS_WAITING,
    KIND,
    KNOWN_WAVE,
    LEAST_WAIT_MS,
    LIVE_AT,
    LOAD_GROUP,
    LOAD_SIZE,
    LOAD_TIME,
    LOADS,
    LOADS_WIDTH,
    MASK,
    MEMBER_SIZE,
    MESSAGES,
    MOST_EVENTS,
    MOST_LOADS,
    NEWEST_STEP,
    NEWEST_WAVE,
    NEWS_AT,
    NEWS_IN,
    NEWS_MESSAGE,
    NEWS_OUT,
    NEWS_RUNS,
    NEWS_TIME,
    NEWS_WAVE,
    NS_PER_MS,
    OF_RANK,
    OF_STEP,
    OF_WAVE,
    ORDER,
    PUBLISHED_MS,
    SCANS_FROM,
    SEND_NS,
    SERVED_BY,
    SERVED_IN,
    STAMP,
    START_MESSAGE,
    START_ORDER,
    START_TIME,
    START_WAVE,
    STARTS_AT,
    STARTS_IN,
    STARTS_OUT,
    STATE,
    THINKS_RUNS,
    TOLD_DUE,
    UNCHANGED_MS,
    UNHEARD,
    WAVE,
    WAVE_RUNS,
    WITH_LOADS,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import (
    FOLLOWING,
    HEAD,
    LOGGED,
    NEVER,
    NONE,
    REPLICA_SIZE,
    SIZE,
    TAIL,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.group_state import Group
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def link_nb(run: Run, group: Group, column: int) -> I64:
    """A column of the requests that belongs to ranks."""
    return at(group.links, column * run.control[SIZE])


@inner
def front_nb(group: Group, g: I64, index: int) -> I64:
    """A front end."""
    return at(group.fronts, g[FRONTS_AT] + index * (FRONT_SIZE + 2 * g[COUNT]))


@inner
def news_nb(group: Group, g: I64, number: int) -> I64:
    """A message from the coordinator to the front ends."""
    return at(group.memory, g[NEWS_AT] + (number & g[MASK]) * (NEWS_MESSAGE + 2 * g[COUNT]))


@inner
def start_nb(group: Group, g: I64, number: int) -> I64:
    """A message from the coordinator to the ranks."""
    return at(group.memory, g[STARTS_AT] + (number & g[MASK]) * START_MESSAGE)


@inner
def first_nb(group: Group, g: I64, number: int) -> I64:
    """A message from a front end to the coordinator."""
    return at(group.memory, g[FIRSTS_AT] + (number & g[MASK]) * FIRST_MESSAGE)


@inner
def heard_nb(group: Group, g: I64, number: int) -> I64:
    """A message from a rank to the coordinator."""
    return at(group.memory, g[HEARD_AT] + (number & g[MASK]) * HEARD_MESSAGE)


@inner
def tell_nb(group: Group, g: I64, kind: int, rank: int, wave: int, step: int, waiting: int, running: int) -> None:
    """A rank tells the coordinator something."""
    if g[HEARD_IN] - g[HEARD_OUT] > g[MASK]:
        group.told[CROWDED] = 1
        return
    message = heard_nb(group, g, g[HEARD_IN])
    message[HEARD_TIME] = g[CLOCK] + g[CONTROL_NS]
    message[KIND], message[OF_RANK], message[OF_WAVE], message[OF_STEP] = kind, rank, wave, step
    message[ITS_WAITING], message[ITS_RUNNING] = waiting, running
    g[HEARD_IN] += 1
    g[TOLD_DUE] = min(g[TOLD_DUE], message[HEARD_TIME])


@inner
def event_nb(run: Run, group: Group, place: int, time: int, wave: int, excluded: int, ends: int) -> None:
    """Log that a wave starts or ends."""
    if run.control[LOGGED] == 0:
        return
    row = group.told[EVENTS]
    if row < group.told[MOST_EVENTS]:
        event = at(group.events, row * EVENT_SIZE)
        event[EVENT_GROUP], event[EVENT_TIME], event[EVENT_WAVE] = place, time, wave
        event[EVENT_EXCLUDED], event[EVENT_ENDS] = excluded, ends
    group.told[EVENTS] = row + 1


@inner
def arrive_nb(run: Run, group: Group, g: I64, place: int) -> None:
    """The next request arrives at the front end whose turn it is, which sends it to a rank."""
    count, i = g[COUNT], g[COMING]
    g[COMING] = link_nb(run, group, GROUP_AFTER)[i]
    f = front_nb(group, g, g[ARRIVED] % g[FRONT_ENDS])
    if g[BALANCED] == 1:
        loads = at(f, FRONT_SIZE)
        best, least, rank = 0, NEVER, f[SCANS_FROM]
        for _ in range(count):
            load = 4 * loads[2 * rank] + loads[2 * rank + 1]
            if load < least:
                best, least = rank, load
            rank = rank + 1 if rank + 1 < count else 0
        loads[2 * best] += g[FRONT_ENDS]
    else:
        best = g[ARRIVED] % count
    g[ARRIVED] += 1
    link_nb(run, group, STAMP)[i] = f[KNOWN_WAVE]
    link_nb(run, group, ORDER)[i] = g[MESSAGES]
    link_nb(run, group, SERVED_BY)[i], link_nb(run, group, SERVED_IN)[i] = best, place + 1
    g[MESSAGES] += 1
    r = at(run.replicas, (g[FIRST_RANK] + best) * REPLICA_SIZE)
    m = at(group.members, (g[FIRST_RANK] + best) * MEMBER_SIZE)
    following = column_nb(run, FOLLOWING)
    following[i] = NONE
    if r[HEAD] == NONE:
        r[HEAD] = i
    else:
        following[r[TAIL]] = i
    r[TAIL] = i
    if m[UNHEARD] == NONE:
        m[UNHEARD] = i
    if m[STATE] == HEARS:
        m[DUE] = min(m[DUE], g[CLOCK] + g[SEND_NS])
    if f[THINKS_RUNS] == 0:
        f[FIRST_AT], f[FIRST_FOR] = g[CLOCK], best
        f[FRONT_DUE] = min(f[FRONT_DUE], g[CLOCK])


@inner
def front_acts_nb(group: Group, g: I64, f: I64) -> None:
    """A front end handles what has been delivered: of publications the last."""
    now, count = g[CLOCK], g[COUNT]
    while True:
        news = f[NEWS_OUT] < g[NEWS_IN] and news_nb(group, g, f[NEWS_OUT])[NEWS_TIME] <= now
        if not news and f[FIRST_AT] == NEVER:
            break
        if f[FIRST_AT] != NEVER and (f[THINKS_RUNS] == 0 or not news):
            f[FIRST_AT] = NEVER
            f[THINKS_RUNS] = 1
            if g[FIRSTS_IN] - g[FIRSTS_OUT] > g[MASK]:
                group.told[CROWDED] = 1
                return
            message = first_nb(group, g, g[FIRSTS_IN])
            message[FIRST_TIME] = now + g[CONTROL_NS]
            message[FIRST_RANK_], message[FIRST_WAVE] = f[FIRST_FOR], f[KNOWN_WAVE]
            g[FIRSTS_IN] += 1
            g[TOLD_DUE] = min(g[TOLD_DUE], message[FIRST_TIME])
        last = NONE
        while f[NEWS_OUT] < g[NEWS_IN] and news_nb(group, g, f[NEWS_OUT])[NEWS_TIME] <= now:
            last = f[NEWS_OUT]
            f[NEWS_OUT] += 1
        if last != NONE:
            known = news_nb(group, g, last)
            f[KNOWN_WAVE], f[THINKS_RUNS] = known[NEWS_WAVE], known[NEWS_RUNS]
            if known[WITH_LOADS] == 1:
                for entry in range(2 * count):
                    f[FRONT_SIZE + entry] = known[NEWS_MESSAGE + entry]
    f[FRONT_DUE] = news_nb(group, g, f[NEWS_OUT])[NEWS_TIME] if f[NEWS_OUT] < g[NEWS_IN] else NEVER


@inner
def coordinator_acts_nb(run: Run, group: Group, g: I64, place: int) -> None:
    """Go on until the next wait: publish at the deadline, take in what has been delivered."""
    now = g[CLOCK]
    ready = ready_nb(group, g)
    if not ready:
        publish_loads_nb(run, group, g, place)
        g[PUBLISHED_MS] = now // NS_PER_MS
    while ready:
        if hear_nb(run, group, g, place):
            publish_nb(group, g, 0, 0)
        ready = ready_nb(group, g)
    wait = 0 if g[ASIDE] == 1 else LEAST_WAIT_MS
    if g[PUBLISHED_MS] != NONE:
        interval = CHANGED_MS if g[CHANGED] == 1 else UNCHANGED_MS
        wait = max(wait, interval - (now // NS_PER_MS - g[PUBLISHED_MS]))
    due = now + wait * NS_PER_MS
    if g[FIRSTS_OUT] < g[FIRSTS_IN]:
        due = min(due, first_nb(group, g, g[FIRSTS_OUT])[FIRST_TIME])
    if g[HEARD_OUT] < g[HEARD_IN]:
        due = min(due, heard_nb(group, g, g[HEARD_OUT])[HEARD_TIME])
    g[TOLD_DUE] = due


@inner
def publications_logged_nb(run: Run, group: Group) -> bool:
    """Whether what is published is logged; there are a great many where hours lie between requests."""
    return run.control[LOGGED] == 1 and group.told[MOST_LOADS] != NONE


@inner
def pass_silence_nb(run: Run, group: Group, g: I64, until: int) -> None:
    """Where no rank acts before a time, go to the last deadline before it: those until then publish the same again."""
    quiet = g[CHANGED] == 0 and g[ASIDE] == 0 and g[PUBLISHED_MS] == g[CLOCK] // NS_PER_MS
    quiet = quiet and g[FIRSTS_OUT] == g[FIRSTS_IN] and g[HEARD_OUT] == g[HEARD_IN]
    quiet = quiet and g[CONTROL_NS] < UNCHANGED_MS * NS_PER_MS and not publications_logged_nb(run, group)
    for index in range(g[FRONT_ENDS]):
        quiet = quiet and front_nb(group, g, index)[FIRST_AT] == NEVER
    skipped = (until - g[TOLD_DUE]) // (UNCHANGED_MS * NS_PER_MS)
    if quiet and skipped > 0 and until < NEVER:
        g[PUBLISHED_MS] += skipped * UNCHANGED_MS
        g[TOLD_DUE] += skipped * UNCHANGED_MS * NS_PER_MS


@inner
def ready_nb(group: Group, g: I64) -> bool:
    """Whether the coordinator has a message."""
    now = g[CLOCK]
    if g[FIRSTS_OUT] < g[FIRSTS_IN] and first_nb(group, g, g[FIRSTS_OUT])[FIRST_TIME] <= now:
        return True
    return g[HEARD_OUT] < g[HEARD_IN] and heard_nb(group, g, g[HEARD_OUT])[HEARD_TIME] <= now


@inner
def hear_nb(run: Run, group: Group, g: I64, place: int) -> bool:
    """Take in one message from the front ends and one from the ranks; whether wave or running changed."""
    now, changed = g[CLOCK], False
    if g[FIRSTS_OUT] < g[FIRSTS_IN] and first_nb(group, g, g[FIRSTS_OUT])[FIRST_TIME] <= now:
        first = first_nb(group, g, g[FIRSTS_OUT])
        g[FIRSTS_OUT] += 1
        if g[IN_STEP] == 1 and g[WAVE_RUNS] == 0:
            excluded = NONE if first[FIRST_WAVE] < g[WAVE] else first[FIRST_RANK_]
            start_wave_nb(run, group, g, place, g[WAVE], excluded)
            changed = True
    if g[HEARD_OUT] < g[HEARD_IN] and heard_nb(group, g, g[HEARD_OUT])[HEARD_TIME] <= now:
        message = heard_nb(group, g, g[HEARD_OUT])
        g[HEARD_OUT] += 1
        wave = message[OF_WAVE]
        if message[KIND] == COUNTS:
            store_nb(group, g, message)
        elif message[KIND] == ENDS:
            if g[WAVE] <= wave:
                g[WAVE], g[WAVE_RUNS] = wave + 1, 0
                changed = True
        elif wave > g[WAVE] or (wave == g[WAVE] and g[WAVE_RUNS] == 0):
            start_wave_nb(run, group, g, place, wave, message[OF_RANK])
            changed = True
    return changed


@inner
def store_nb(group: Group, g: I64, message: I64) -> None:
    """Loads of a rank; those of the step before are set aside when the first of a later step come."""
    live, wave, step = at(group.memory, g[LIVE_AT]), message[OF_WAVE], message[OF_STEP]
    if wave > g[NEWEST_WAVE] or (wave == g[NEWEST_WAVE] and step > g[NEWEST_STEP]):
        if g[CHANGED] == 1:
            g[ASIDE] = 1
            for entry in range(2 * g[COUNT]):
                live[2 * g[COUNT] + entry] = live[entry]
        g[NEWEST_WAVE], g[NEWEST_STEP] = wave, step
    rank = message[OF_RANK]
    live[2 * rank], live[2 * rank + 1] = message[ITS_WAITING], message[ITS_RUNNING]
    g[CHANGED] = 1


@inner
def start_wave_nb(run: Run, group: Group, g: I64, place: int, wave: int, excluded: int) -> None:
    """The ranks start a wave, all but one that starts by itself."""
    g[WAVE], g[WAVE_RUNS] = wave, 1
    event_nb(run, group, place, g[CLOCK], wave, excluded, 0)
    oldest = g[STARTS_IN]
    for rank in range(g[COUNT]):
        oldest = min(oldest, at(group.members, (g[FIRST_RANK] + rank) * MEMBER_SIZE)[STARTS_OUT])
    if g[STARTS_IN] - oldest > g[MASK]:
        group.told[CROWDED] = 1
        return
    message = start_nb(group, g, g[STARTS_IN])
    message[START_TIME], message[START_WAVE] = g[CLOCK] + g[CONTROL_NS], wave
    message[EXCLUDED], message[START_ORDER] = excluded, g[MESSAGES]
    g[MESSAGES] += 1
    g[STARTS_IN] += 1
    for rank in range(g[COUNT]):
        m = at(group.members, (g[FIRST_RANK] + rank) * MEMBER_SIZE)
        if m[STATE] == HEARS:
            m[DUE] = min(m[DUE], message[START_TIME])


@inner
def publish_loads_nb(run: Run, group: Group, g: I64, place: int) -> None:
    """Publish the loads set aside, or else the live ones."""
    entries = 2 * g[COUNT]
    shift = entries * g[ASIDE]
    if g[ASIDE] == 0:
        g[CHANGED] = 0
    g[ASIDE] = 0
    publish_nb(group, g, 1, shift)
    if not publications_logged_nb(run, group):
        return
    row = group.told[LOADS]
    if row < group.told[MOST_LOADS]:
        told, live = at(group.loads, row * group.told[LOADS_WIDTH]), at(group.memory, g[LIVE_AT] + shift)
        told[LOAD_GROUP], told[LOAD_TIME] = place, g[CLOCK]
        for entry in range(entries):
            told[LOAD_SIZE + entry] = live[entry]
    group.told[LOADS] = row + 1


@inner
def publish_nb(group: Group, g: I64, with_loads: int, shift: int) -> None:
    """Tell the front ends wave and running, and the loads from a place on."""
    oldest = g[NEWS_IN]
    for index in range(g[FRONT_ENDS]):
        oldest = min(oldest, front_nb(group, g, index)[NEWS_OUT])
    if g[NEWS_IN] - oldest > g[MASK]:
        group.told[CROWDED] = 1
        return
    message = news_nb(group, g, g[NEWS_IN])
    message[NEWS_TIME], message[WITH_LOADS] = g[CLOCK] + g[CONTROL_NS], with_loads
    message[NEWS_WAVE], message[NEWS_RUNS] = g[WAVE], g[WAVE_RUNS]
    if with_loads == 1:
        live = at(group.memory, g[LIVE_AT] + shift)
        for entry in range(2 * g[COUNT]):
            message[NEWS_MESSAGE + entry] = live[entry]
    g[NEWS_IN] += 1
    for index in range(g[FRONT_ENDS]):
        f = front_nb(group, g, index)
        f[FRONT_DUE] = min(f[FRONT_DUE], message[NEWS_TIME])
