"""Memory of a router: its registers, and where its parts lie; without the compiler."""

from __future__ import annotations

POWER_OF_TWO, CACHE_AWARE, DYNAMO, LLM_D, PULL, LEAST_LOADED, IN_TURN, DEALT = range(8)  # values of RULE

# Registers: the rule, tokens of a piece and of a block, whether the engine caches prefixes, how many pieces there are;
# where the first pieces of requests, their pieces, the drawn pairs or dealt places, what is known of pieces, rows of
# replicas and those of requests begin; numbers of the rules, and the KV blocks of a
# replica; the first and the last request that waits for a replica;
# whether the replicas compute prompts.
(
    RULE,
    TOKENS,
    BLOCK,
    CACHES,
    KNOWN,
    STARTS_AT,
    PIECES_AT,
    PAIRS_AT,
    HELD_AT,
    REPLICAS_AT,
    REQUESTS_AT,
    IMBALANCE,
    OVER,
    UNDER_RATIO,
    PART,
    WHOLE,
    PREFIX_WEIGHT,
    QUEUE_WEIGHT,
    FREE_WEIGHT,
    POOL,
    FIRST_WAITS,
    LAST_WAITS,
    COMPUTES,
    ROUTER_SIZE,
) = range(24)

# Of a replica: requests unanswered and waiting, the first of its active ones, tokens of theirs before their first
# token, and different blocks of theirs; KV blocks that nobody holds.
LOAD, WAITING, ACTIVE, PREFILL, BLOCKS, UNHELD, ROUTED_SIZE = range(7)

# Of a request: the next active one of its replica; tokens to compute until its first token, then NONE.
NEXT, OWED, ASKED_SIZE = range(3)

# Of a piece: active requests with it, and whether it was sent or cached, replica by replica; of `CACHE_AWARE` one more
# than the replica that it was first sent to.
USERS, HELD, HELD_SIZE = range(3)
