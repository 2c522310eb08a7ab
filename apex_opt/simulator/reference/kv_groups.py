"""KV blocks of models whose layers keep different things: one pool, and a table of blocks per group of layers.

Source: `KVCacheManager`, `HybridKVCacheCoordinator`, `FullAttentionManager`, `SlidingWindowManager`,
`ChunkedLocalAttentionManager` and `MambaManager` of vLLM 0.20.2, in our own words; recorded batches over several groups
settle it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Final

from apex_opt.plans.kv_groups import sets_of
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from collections.abc import Sequence as Seq

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.kv_groups import KvGroup
    from apex_opt.simulator.reference.sequence import Sequence

NOTHING: Final = None
"""An entry of a table without a block: what it would hold is out of sight, or only later states are kept."""


@dataclass(slots=True)
class Table:
    """The blocks that one sequence has in one group; entry j is for tokens j * block_size and on."""

    entries: list[int | None] = field(default_factory=list)
    registered: int = 0  # entries whose content was made findable, or that have none
    grown: bool = False  # blocks were taken, beyond those found
    before: int | None = None  # of states: the entry with the running state before the latest growth


@dataclass(frozen=True, slots=True)
class Need:
    """What a row asks room for: so many tokens, and with those of drafts to come so many."""

    tokens: int
    ahead: int


class FullKind:
    """Keys and values of all tokens."""

    drops = True  # where the drafter recomputes it, the last found block is dropped

    def __init__(self, group: KvGroup, settings: EngineSettings, drafts: int) -> None:
        self.group = group
        self.size = group.block_size
        self.settings = settings
        self.drafts = drafts

    def shed(self, table: Table, computed: int) -> list[int]:
        """Entries that a sequence with so many computed tokens gives back before a row, in that order."""
        return []

    def entries(self, need: Need) -> int:
        """Entries that a table has after a row."""
        return ceil_div(need.ahead, self.size)

    def most(self) -> int | None:
        """Entries that are counted at most where it is looked whether a whole prompt fits."""
        return None

    def lacking(self, table: Table, need: Need, found: int, *, whole: bool = False) -> int:
        """Blocks to be taken for a row.

        Parameters
        ----------
        table : Table    of the sequence
        need : Need      of the row
        found : int      entries found in the cache, not in the table yet
        whole : bool     it is looked whether a whole prompt fits
        """
        entries, most = self.entries(need), self.most()
        if whole and most is not None:
            entries = min(entries, most)
        return max(0, entries - len(table.entries) - found)

    def grow(self, table: Table, need: Need, take: Callable[[int], list[int]]) -> None:
        """Enter the blocks that a row takes.

        Parameters
        ----------
        table : Table    of the sequence
        need : Need      of the row
        take : callable  takes so many blocks from the pool
        """
        table.entries += take(self.lacking(table, need, 0))

    def search(self, has: Seq[bool], multiple: int, *, drop: bool) -> list[bool]:
        """The longest beginning that need not be computed: of each entry whether its block is used.

        Parameters
        ----------
        has : sequence of bool    whether the block of each entry can be found
        multiple : int            what the tokens of a beginning are a multiple of
        drop : bool               the last block of a beginning is dropped
        """
        run = next((place for place, there in enumerate(has) if not there), len(has))
        return [True] * self.cut(run - (drop and run > 0), multiple)

    def cut(self, entries: int, multiple: int) -> int:
        """So many entries or fewer, whose tokens are such a multiple."""
        return entries * self.size // multiple * multiple // self.size


class WindowKind(FullKind):
    """Keys and values of the last tokens, as many as a query sees."""

    def shed(self, table: Table, computed: int) -> list[int]:
        return list(_back_from(table, max(0, computed - self.group.window + 1) // self.size))

    def most(self) -> int:
        return self.group.seen_entries(self.settings.max_num_batched_tokens, self.settings.max_model_len)

    def search(self, has: Seq[bool], multiple: int, *, drop: bool) -> list[bool]:
        wanted, run = max(1, ceil_div(self.group.window - 1, self.size) + drop), 0
        for place in reversed(range(len(has))):
            if not has[place]:
                run = 0
            elif run or (place + 1 - drop) * self.size % multiple == 0:
                run += 1
                if run == wanted:
                    return [False] * place + [True] * (run - drop)
        run = self.cut(run, multiple)
        return [True] * self.cut(run - (drop and run > 0), multiple)


class ChunkKind(WindowKind):
    """Keys and values of the tokens since the last multiple of so many."""

    def shed(self, table: Table, computed: int) -> list[int]:
        return list(_back_from(table, computed // self.group.window * self.group.window // self.size))

    def search(self, has: Seq[bool], multiple: int, *, drop: bool) -> list[bool]:
        begun = len(has) * self.size // self.group.window * self.group.window // self.size
        run = next((place for place, there in enumerate(has[begun:]) if not there), len(has) - begun)
        return [False] * begun + [True] * run


class StateKind(FullKind):
    """One state per sequence, whatever its length, and one for each draft; nothing is found again."""

    drops = False

    def entries(self, need: Need) -> int:
        return 1 + self.drafts

    def search(self, has: Seq[bool], multiple: int, *, drop: bool) -> list[bool]:
        return []


class KeptStateKind(StateKind):
    """A state per block boundary that can be found again: the running one, the last before, and one for each draft."""

    def entries(self, need: Need) -> int:
        return ceil_div(need.tokens, self.size) + self.drafts

    def lacking(self, table: Table, need: Need, found: int, *, whole: bool = False) -> int:
        if self.entries(need) <= len(table.entries) + found:
            return 0
        return 1 if table.grown else 1 + self.drafts

    def grow(self, table: Table, need: Need, take: Callable[[int], list[int]]) -> None:
        held, entries = len(table.entries), self.entries(need)
        if entries <= held:
            return
        running = entries - self.drafts - 1
        if table.grown:
            table.before = held - 1 - self.drafts
        elif held:
            table.before = held - 1
        table.entries += [NOTHING] * (running - held)
        if table.grown:
            for place in range(held - self.drafts, min(held, running)):
                table.entries.append(table.entries[place])
                table.entries[place] = NOTHING
        table.entries += take(entries - len(table.entries))
        table.grown = True

    def shed(self, table: Table, computed: int) -> list[int]:
        sure = max(0, computed - self.drafts)
        gone = list(_back_from(table, (sure - 1) // self.size))
        before = table.before
        if before is not None and before < ceil_div(sure, self.size) - 1 and table.entries[before] is not NOTHING:
            gone += [before] * (before not in gone)
        return gone

    def search(self, has: Seq[bool], multiple: int, *, drop: bool) -> list[bool]:
        for place in reversed(range(len(has))):
            if has[place] and (place + 1) * self.size % multiple == 0:
                return [False] * place + [True]
        return []


def _back_from(table: Table, entries: int) -> Iterable[int]:
    """Of the first entries the last, and so on back until a nothing is met."""
    for place in reversed(range(min(entries, len(table.entries)))):
        if table.entries[place] is NOTHING:
            return
        yield place


_KINDS: Final[Mapping[tuple[str, str], type[FullKind]]] = {
    ("full", "none"): FullKind,
    ("window", "none"): WindowKind,
    ("chunk", "none"): ChunkKind,
    ("state", "none"): StateKind,
    ("state", "align"): KeptStateKind,
}


@dataclass(frozen=True, slots=True)
class Hit:
    """What of a waiting sequence need not be computed: so many tokens, and the entries of each group."""

    tokens: int
    tables: tuple[tuple[int | None, ...], ...]


class GroupedBlocks:
    """One pool of blocks over groups; a block belongs to one group at a time.

    Free blocks queue up in the order they were freed, the front one is handed out next and then no longer found.
    """

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        groups = settings.groups
        speculation = settings.speculation
        drafts = speculation.draft_tokens if speculation else 0
        self.kinds = [_KINDS[group.kind, group.mode](group, settings, drafts) for group in groups]
        self.caching = settings.prefix_caching
        self.recomputes = speculation is not None and speculation.rules.recomputes
        self.together = sets_of(groups)
        self.multiple = lcm(*(group.block_size for group in groups))
        self._queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._users = [0] * blocks
        self._content: list[tuple[int, int] | None] = [None] * blocks  # group, and key of what it holds
        self._holders: dict[tuple[int, int], OrderedDict[int, None]] = {}
        self._tables: dict[int, list[Table]] = {}
        self._new: set[int] = set()  # blocks of states that became findable in this step

    @property
    def free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._queue)

    @property
    def used(self) -> list[int]:
        """Different blocks in the tables of each group."""
        return [
            len({block for tables in self._tables.values() for block in tables[g].entries if block is not NOTHING})
            for g in range(len(self.kinds))
        ]

    def begin(self) -> None:
        """A batch is begun."""
        self._new.clear()

    def tables(self, sequence: Sequence) -> list[Table]:
        """The tables of a sequence, by group."""
        return self._tables.setdefault(sequence.id, [Table() for _ in self.kinds])

    def shed(self, sequence: Sequence) -> None:
        """Give back what a running sequence will not look at again."""
        for kind, table in zip(self.kinds, self.tables(sequence), strict=True):
            for place in kind.shed(table, sequence.computed):
                self._give_back(table.entries[place])
                table.entries[place] = NOTHING

    def lacking(self, sequence: Sequence, need: Need, hit: Hit | None = None, *, whole: bool = False) -> int:
        """Free blocks that a row takes.

        Parameters
        ----------
        sequence : Sequence    the request
        need : Need            of its row
        hit : Hit or None      what was found of a waiting one
        whole : bool           it is looked whether a whole prompt fits
        """
        count = 0
        for group, (kind, table) in enumerate(zip(self.kinds, self.tables(sequence), strict=True)):
            found = hit.tables[group] if hit else ()
            count += kind.lacking(table, need, len(found), whole=whole)
            count += sum(block is not NOTHING and self._users[block] == 0 for block in found)  # they leave the queue
        return count

    def just_kept(self, hit: Hit) -> bool:
        """Whether a state that was found became findable in this very step: it is not there yet."""
        return any(found and found[-1] in self._new for found in hit.tables)

    def take(self, sequence: Sequence, need: Need, hit: Hit | None = None) -> None:
        """Hand out the blocks of a row.

        Parameters
        ----------
        sequence : Sequence    the request
        need : Need            of its row
        hit : Hit or None      what was found of a waiting one
        """
        tables = self.tables(sequence)
        for table, found in zip(tables, hit.tables if hit else ((),) * len(tables), strict=True):
            for block in found:
                if block is not NOTHING:
                    self._queue.pop(block, None)
                    self._users[block] += 1
            table.entries += found
            table.registered += len(found)
        for kind, table in zip(self.kinds, tables, strict=True):
            kind.grow(table, need, self._hand_out)

    def register(self, sequence: Sequence, tokens: int) -> None:
        """Note that the sequence's first `tokens` tokens can be found by others from now on."""
        if not self.caching:
            return
        for group, (kind, table) in enumerate(zip(self.kinds, self.tables(sequence), strict=True)):
            full = tokens // kind.size
            for place in range(table.registered, full):
                block = table.entries[place]
                if block is NOTHING:
                    continue
                key = group, sequence.group_keys[group][place]
                self._content[block] = key
                self._holders.setdefault(key, OrderedDict())[block] = None
                if isinstance(kind, KeptStateKind):
                    self._new.add(block)
            table.registered = max(table.registered, full)

    def release(self, sequence: Sequence) -> None:
        """Give all blocks of a sequence back, group by group, each last entry first."""
        for table in self._tables.pop(sequence.id, ()):
            for block in reversed(table.entries):
                self._give_back(block)

    def find(self, sequence: Sequence) -> Hit:
        """The longest beginning of a waiting sequence that every group holds; its last token is always computed."""
        if not self.caching:
            return Hit(0, ((),) * len(self.kinds))
        most = length = sequence.known - 1
        found: dict[tuple[int, ...], list[bool]] = {}
        dropped: set[tuple[int, ...]] = set()
        while True:
            left = length
            for groups in self.together:
                kind = self.kinds[groups[0]]
                if type(kind) is FullKind and groups in found:
                    left = left // kind.size * kind.size
                    continue
                drop = self.recomputes and groups not in dropped
                reach = min(left + kind.size, most) if drop else left
                has = [self._held(groups, sequence, place) for place in range(reach // kind.size)]
                found[groups] = kind.search(has, self.multiple, drop=drop and kind.drops)
                reached = len(found[groups]) * kind.size
                if drop:
                    dropped.add(groups)
                elif reached < left:
                    dropped.clear()
                left = reached
            if left >= length:
                break
            length = left
            if len(self.together) == 1 or (
                len(self.together) == 2 and type(self.kinds[self.together[0][0]]) is FullKind
            ):
                break
        tables: list[tuple[int | None, ...]] = [()] * len(self.kinds)
        for groups, uses in found.items():
            for group in groups:
                entries = uses[: length // self.kinds[group].size]
                tables[group] = tuple(
                    self._first(group, sequence, place) if use else NOTHING for place, use in enumerate(entries)
                )
        return Hit(length, tuple(tables))

    def _held(self, groups: Iterable[int], sequence: Sequence, place: int) -> bool:
        return all((group, sequence.group_keys[group][place]) in self._holders for group in groups)

    def _first(self, group: int, sequence: Sequence, place: int) -> int:
        """Of blocks with equal content the one that became findable first."""
        return next(iter(self._holders[group, sequence.group_keys[group][place]]))

    def _hand_out(self, count: int) -> list[int]:
        """So many blocks from the front of the queue, whose content is forgotten."""
        taken = []
        for _ in range(count):
            block, _ = self._queue.popitem(last=False)
            if (key := self._content[block]) is not None:
                del self._holders[key][block]
                if not self._holders[key]:
                    del self._holders[key]
                self._content[block] = None
            self._users[block] = 1
            taken.append(block)
        return taken

    def _give_back(self, block: int | None) -> None:
        if block is NOTHING:
            return
        self._users[block] -= 1
        if self._users[block] == 0:
            self._queue[block] = None
