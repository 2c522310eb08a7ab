"""Routers that go by loads or prefixes: the rules of `reference.router`, before replicas with one scheduler.

All memory of a router is one array: registers, then the parts that they say where to find.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.blocks import empty_cache_nb
from apex_opt.simulator.kernel.general import by_groups_nb, plain_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_groups import empty_groups_nb
from apex_opt.simulator.kernel.reuse import empty_reuse_nb
from apex_opt.simulator.kernel.router_state import (
    ACTIVE,
    ASKED_SIZE,
    BLOCK,
    BLOCKS,
    CACHES,
    COMPUTES,
    DEALT,
    DYNAMO,
    FIRST_WAITS,
    FREE_WEIGHT,
    HELD,
    HELD_AT,
    HELD_SIZE,
    IMBALANCE,
    IN_TURN,
    KNOWN,
    LAST_WAITS,
    LEAST_LOADED,
    LLM_D,
    LOAD,
    NEXT,
    OVER,
    OWED,
    PAIRS_AT,
    PART,
    PIECES_AT,
    POOL,
    POWER_OF_TWO,
    PREFILL,
    PREFIX_WEIGHT,
    PULL,
    QUEUE_WEIGHT,
    REPLICAS_AT,
    REQUESTS_AT,
    ROUTED_SIZE,
    RULE,
    STARTS_AT,
    TOKENS,
    UNDER_RATIO,
    UNHELD,
    USERS,
    WAITING,
    WHOLE,
)
from apex_opt.simulator.kernel.speculative import drafting_nb, grouped_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ENDED,
    FINISH,
    FIRST,
    FOLLOWING,
    FREE,
    HEAD,
    LAST_ENDED,
    LAST_ENDED_NS,
    MAX_SEQS,
    NEVER,
    NONE,
    NOW,
    PASSED,
    PROMPT,
    REPLICA_SIZE,
    RUNNING,
    SEATED,
    SENT,
    TAIL,
    Cache,
    Run,
)
from apex_opt.simulator.kernel.steady import steady_nb
from apex_opt.simulator.kernel.trtllm import trtllm_nb

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64


@inner
def waiting_nb(run: Run, its: Any, replica: int) -> int:
    """Requests of a replica that do not run."""
    r = at(run.replicas, replica * REPLICA_SIZE)
    waiting: int = r[SENT] - r[ENDED] - r[SEATED] - r[RUNNING]
    return waiting


def routing(turns_nb: Any, empty_nb: Any = empty_cache_nb, waiting_nb: Any = waiting_nb) -> Any:
    """`serve_nb` by an engine before which a router stands.

    Parameters
    ----------
    turns_nb, empty_nb, waiting_nb : take its turns, empty its blocks, and count those of its requests that do not run
    """

    @inner
    def hand_out_nb(run: Run, cache: Cache | None, router: I64, first: int, last: int, until: int) -> None:
        """Let replicas take waiting requests as they have seats, in order of time."""
        while router[FIRST_WAITS] != NONE:
            best, soonest, fewest = NONE, NEVER, NEVER
            for replica in range(first, last):
                r = at(run.replicas, replica * REPLICA_SIZE)
                unanswered = r[SENT] - r[ENDED]
                if unanswered >= r[MAX_SEQS]:
                    unanswered = NEVER
                if r[NOW] < soonest or (r[NOW] == soonest and unanswered < fewest):
                    best, soonest, fewest = replica, r[NOW], unanswered
            if best == NONE or soonest > until or (soonest == until and fewest == NEVER):
                return
            if fewest < NEVER:
                i = router[FIRST_WAITS]
                router[FIRST_WAITS] = column_nb(run, FOLLOWING)[i]
                column_nb(run, FOLLOWING)[i] = NONE
                send_nb(run, at(run.replicas, best * REPLICA_SIZE), i)
            else:
                turns_nb(run, cache, best, soonest + 1)
                if run.control[PASSED] == 1:
                    return

    @inner
    def serve_nb(run: Run, cache: Cache | None, router: I64, first: int, last: int, routed: I64, turns: int) -> None:
        """Run replicas `first` to `last` - 1 on requests that are routed; all advance to each arrival."""
        arrival = column_nb(run, ARRIVAL)
        for turn in range(turns + 1):
            until = arrival[routed[turn]] if turn < turns else NEVER
            if router[RULE] == PULL:
                hand_out_nb(run, cache, router, first, last, until)
                if run.control[PASSED] == 1:
                    return
            for replica in range(first, last):
                r = at(run.replicas, replica * REPLICA_SIZE)
                if cache is not None and turn == 0:
                    empty_nb(cache, r)
                turns_nb(run, cache, replica, until)
                if run.control[PASSED] == 1:
                    return
                p = at(router, router[REPLICAS_AT] + (replica - first) * ROUTED_SIZE)
                unanswered = r[SENT] - r[ENDED]
                p[WAITING], p[UNHELD] = waiting_nb(run, cache, replica), r[FREE]
                p[LOAD] = unanswered
                if r[LAST_ENDED_NS] > until:
                    p[LOAD] += r[LAST_ENDED]
                if router[RULE] == PULL and p[LOAD] >= r[MAX_SEQS]:
                    p[LOAD] = NEVER
            if turn < turns:
                i = routed[turn]
                place = choose_nb(run, router, last - first, i, turn, until)
                if place != NONE:
                    send_nb(run, at(run.replicas, (first + place) * REPLICA_SIZE), i)
                elif router[FIRST_WAITS] == NONE:
                    router[FIRST_WAITS] = router[LAST_WAITS] = i
                else:
                    column_nb(run, FOLLOWING)[router[LAST_WAITS]] = i
                    router[LAST_WAITS] = i

    return serve_nb


@inner
def send_nb(run: Run, r: I64, i: int) -> None:
    """Send request i to a replica."""
    if r[HEAD] == NONE:
        r[HEAD] = i
    else:
        column_nb(run, FOLLOWING)[r[TAIL]] = i
    r[TAIL] = i
    r[SENT] += 1


@inner
def choose_nb(run: Run, router: I64, count: int, i: int, turn: int, now: int) -> int:
    """The replica that request i goes to, counted from the first; NONE: it waits for one."""
    rule = router[RULE]
    if rule == IN_TURN:
        return turn % count
    if rule == DEALT:
        return router[router[PAIRS_AT] + i]
    if rule == POWER_OF_TWO:
        two = at(router, router[PAIRS_AT] + 2 * turn)
        loads = at(router, router[REPLICAS_AT])
        return two[1] if loads[two[1] * ROUTED_SIZE + LOAD] < loads[two[0] * ROUTED_SIZE + LOAD] else two[0]
    if rule == DYNAMO:
        return by_tokens_nb(run, router, count, i, now)
    if rule == LLM_D:
        return by_scores_nb(run, router, count, i)
    least, most, place = NEVER, NONE, NONE
    for replica in range(count):
        load = router[router[REPLICAS_AT] + replica * ROUTED_SIZE + LOAD]
        if load < least:
            least, place = load, replica
        most = max(most, load)
    if rule == LEAST_LOADED:
        return place
    if rule == PULL:
        return place if router[FIRST_WAITS] == NONE else NONE
    return by_text_nb(run, router, i, least, most, place)


@inner
def by_text_nb(run: Run, router: I64, i: int, least: int, most: int, place: int) -> int:
    """`reference.router.CacheAware`, where the least load is at a place."""
    starts, pieces, held = (
        at(router, router[STARTS_AT]),
        at(router, router[PIECES_AT]),
        at(router, router[HELD_AT]),
    )
    seen, end, prompt = starts[i], starts[i + 1], column_nb(run, PROMPT)[i]
    while seen < end and held[pieces[seen]] > 0:
        seen += 1
    matched = min((seen - starts[i]) * router[TOKENS], prompt)
    uneven = most - least > router[IMBALANCE] and router[UNDER_RATIO] * most > router[OVER] * least
    if not uneven and matched * router[WHOLE] > prompt * router[PART]:
        place = held[pieces[seen - 1]] - 1
    for piece in range(seen, end):
        held[pieces[piece]] = place + 1
    return place


@inner
def whole_nb(run: Run, router: I64, i: int) -> int:
    """Whole pieces of a prompt."""
    starts = at(router, router[STARTS_AT])
    return min(starts[i + 1] - starts[i], column_nb(run, PROMPT)[i] // router[TOKENS])


@inner
def leading_nb(router: I64, replica: int, i: int, whole: int) -> int:
    """How many of the first whole pieces of a prompt a replica has."""
    pieces = at(router, router[PIECES_AT] + router[router[STARTS_AT] + i])
    held = at(router, router[HELD_AT] + replica * router[KNOWN] * HELD_SIZE)
    found = 0
    while found < whole and held[pieces[found] * HELD_SIZE + HELD] == 1:
        found += 1
    return found


@inner
def by_scores_nb(run: Run, router: I64, count: int, i: int) -> int:
    """`reference.router.LlmD`."""
    least, most = NEVER, NONE
    for replica in range(count):
        waiting = router[router[REPLICAS_AT] + replica * ROUTED_SIZE + WAITING]
        least, most = min(least, waiting), max(most, waiting)
    span, whole = most - least, whole_nb(run, router, i)
    blocks = max(1, column_nb(run, PROMPT)[i] // router[BLOCK])
    chosen, best = 0, NONE
    for replica in range(count):
        waiting = router[router[REPLICAS_AT] + replica * ROUTED_SIZE + WAITING]
        short = most - waiting if span > 0 else 1
        matched = leading_nb(router, replica, i, whole) * router[TOKENS] // router[BLOCK]
        score = router[QUEUE_WEIGHT] * short * blocks + router[PREFIX_WEIGHT] * matched * max(1, span)
        if router[FREE_WEIGHT] > 0:
            free = router[router[REPLICAS_AT] + replica * ROUTED_SIZE + UNHELD]
            score = score * router[POOL] + router[FREE_WEIGHT] * free * blocks * max(1, span)
        if score > best:
            chosen, best = replica, score
    pieces = at(router, router[PIECES_AT] + router[router[STARTS_AT] + i])
    held = at(router, router[HELD_AT] + chosen * router[KNOWN] * HELD_SIZE)
    for piece in range(whole):
        held[pieces[piece] * HELD_SIZE + HELD] = 1
    return chosen


@inner
def by_tokens_nb(run: Run, router: I64, count: int, i: int, now: int) -> int:
    """`reference.router.Dynamo`."""
    whole, prompt = whole_nb(run, router, i), column_nb(run, PROMPT)[i]
    per = router[TOKENS] // router[BLOCK]
    rest = prompt // router[BLOCK] - whole * per
    pieces = at(router, router[PIECES_AT] + router[router[STARTS_AT] + i])
    chosen, least, owed = 0, NEVER, 0
    for replica in range(count):
        p = at(router, router[REPLICAS_AT] + replica * ROUTED_SIZE)
        held = at(router, router[HELD_AT] + replica * router[KNOWN] * HELD_SIZE)
        forget_nb(run, router, p, held, now)
        blocks = p[BLOCKS] + rest
        for piece in range(whole):
            if held[pieces[piece] * HELD_SIZE + USERS] == 0:
                blocks += per
        own = (prompt - leading_nb(router, replica, i, whole) * router[TOKENS]) * router[COMPUTES]
        cost = max(0, p[PREFILL] + own) + router[BLOCK] * blocks
        if cost < least:
            chosen, least, owed = replica, cost, own
    p = at(router, router[REPLICAS_AT] + chosen * ROUTED_SIZE)
    held = at(router, router[HELD_AT] + chosen * router[KNOWN] * HELD_SIZE)
    asked = at(router, router[REQUESTS_AT] + i * ASKED_SIZE)
    asked[NEXT], asked[OWED] = p[ACTIVE], owed
    p[ACTIVE] = i
    p[PREFILL] += owed
    p[BLOCKS] += rest
    for piece in range(whole):
        if held[pieces[piece] * HELD_SIZE + USERS] == 0:
            p[BLOCKS] += per
        held[pieces[piece] * HELD_SIZE + USERS] += 1
    return chosen


@inner
def forget_nb(run: Run, router: I64, p: I64, held: I64, now: int) -> None:
    """What has its first token is cached and not to be computed any more; what is answered is not active."""
    requests, first, finish = at(router, router[REQUESTS_AT]), column_nb(run, FIRST), column_nb(run, FINISH)
    per = router[TOKENS] // router[BLOCK]
    i, before = p[ACTIVE], NONE
    while i != NONE:
        following, owed = requests[i * ASKED_SIZE + NEXT], requests[i * ASKED_SIZE + OWED]
        pieces, whole = at(router, router[PIECES_AT] + router[router[STARTS_AT] + i]), whole_nb(run, router, i)
        if owed != NONE and first[i] <= now:
            p[PREFILL] -= owed
            requests[i * ASKED_SIZE + OWED] = NONE
            if router[CACHES] == 1:
                for piece in range(whole):
                    held[pieces[piece] * HELD_SIZE + HELD] = 1
        if finish[i] <= now:
            if before == NONE:
                p[ACTIVE] = following
            else:
                requests[before * ASKED_SIZE + NEXT] = following
            p[BLOCKS] -= column_nb(run, PROMPT)[i] // router[BLOCK] - whole * per
            for piece in range(whole):
                held[pieces[piece] * HELD_SIZE + USERS] -= 1
                if held[pieces[piece] * HELD_SIZE + USERS] == 0:
                    p[BLOCKS] -= per
        else:
            before = i
        i = following


by_steady_nb, by_general_nb = routing(steady_nb), routing(plain_nb)
by_trtllm_nb, by_speculative_nb = routing(trtllm_nb, empty_reuse_nb), routing(drafting_nb)
by_steady_groups_nb, by_general_groups_nb = routing(steady_nb, empty_groups_nb), routing(by_groups_nb, empty_groups_nb)
by_grouped_nb = routing(grouped_nb, empty_groups_nb)
