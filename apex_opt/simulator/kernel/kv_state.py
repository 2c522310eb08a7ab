"""Where the blocks of groups of layers are: their arrays, and the columns of their rows, each named once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I32, I64

FULL, WINDOW, STATE, KEPT, CHUNK = range(5)  # kinds of groups; a state is kept at ends of blocks or not

# Columns of `Groups.rows`. MOST: entries counted at most where it is looked whether a whole prompt fits; TOGETHER: the
# next group that searches with this one; CONTENT_AT: where its contents begin among those of all groups; TIMES: groups
# that are alike, where blocks are only counted.
KIND, SIZE, SEEN, MOST, TOGETHER, CONTENT_AT, TIMES, GROUP_SIZE = range(8)
# Columns of `Groups.spans`, which are sizes of blocks: tokens; blocks that so many tokens more take, in all groups;
# where their counts stand in a steady engine. The counts: a phase; of each phase the blocks that are taken, then those
# that are given back; in a ring of batches those that are given back from then on.
SPAN_TOKENS, SPAN_TIMES, SPAN_AT, SPAN_SIZE = range(4)
DUE = 1

# Columns of a table: entries; those whose content was made findable, or that have none; whether blocks were taken
# beyond those found; of states the entry with the running one before the latest growth; then the entries.
LENGTH, REGISTERED, GROWN, BEFORE, ENTRIES = range(5)
# What is found is kept in one more table: of the groups that search together the entries, and the first with a block.
FOUND, FIRST_FOUND, SEARCHED, DROPPED = range(4)
# Registers of a replica in `Groups.registers`, then the blocks in use of each group.
STEP, SLOTS_LEFT, LAID, REGISTERS = range(4)

# Columns of `Groups.block`: free blocks stand in a circle from BEHIND to BEHIND, the row after the last being both
# ends; blocks of equal content in a line from OLDER to NEWER, whose ends are in `Groups.holder`.
USERS, CONTENT, BEHIND, AHEAD, OLDER, NEWER, MARK, BLOCK_WIDTH = range(8)
OLDEST, NEWEST, HOLDER_WIDTH = range(3)


class Groups(NamedTuple):
    """The groups, and the blocks of all replicas."""

    number: int  # of groups
    sets: int  # of groups that search together
    multiple: int  # of tokens that are found
    caching: int
    splits: int  # whether chunks of prompts end where states are kept
    requests: int
    counting: int  # whether blocks are only counted
    sizes: int  # of blocks
    rows: I64
    spans: I64
    order: I64  # the first group of each set, in the order in which they search
    keys_at: I64  # where the contents of a request's blocks stand, by group and request
    keys: I32
    slot: I64  # of each request, its tables
    slots: I64  # tables not in use, a stack
    registers: I64
    used: I64  # blocks in use of each group after each batch of the log
    table: I32
    block: I32
    holder: I32
