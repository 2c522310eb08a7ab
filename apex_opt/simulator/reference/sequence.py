"""A request on its way through an engine, and the batches it is in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apex_opt.simulator.reference.tree import Node


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through the engine."""

    id: int
    prompt: int
    output: int
    limit: int  # tokens it will generate: its output, or fewer where the model's length ends it
    stated: int = 0  # tokens it says it may generate
    context: int = 0  # tokens that it computes before it decodes, once it has begun; of TensorRT-LLM
    computed: int = 0
    generated: int = 0
    in_flight: int = 0  # tokens to come from batches that have not finished, drafts included
    proposed: int = 0  # drafts to be scheduled with its next token
    blocks: int = 0
    finished: bool = False
    admitted: bool = False  # it has been in a batch, though it may have been preempted since
    keys: list[int] = field(default_factory=list)  # content of its full blocks, prefix included; for prefix caching
    group_keys: list[list[int]] = field(default_factory=list)  # the same for each group of layers
    table: list[int] = field(default_factory=list)  # the blocks themselves
    registered: int = 0  # blocks whose content can be found by others
    beginning: int = 0  # content of its first tokens, in which SGLang looks for requests that begin alike
    node: Node | None = None  # of SGLang's tree, the end of what it holds there
    held: int = 0  # blocks of its own that are in the tree
    seated: bool = False
    coming: Row | None = None  # in the batch that its next token comes from
    arrival_ns: int = 0
    token_ns: list[int] = field(default_factory=list)  # when each of its tokens came
    answered_ns: int | None = None

    @property
    def known(self) -> int:
        """Tokens that exist: the prompt and what has been generated."""
        return self.prompt + self.generated


@dataclass(slots=True)
class Row:
    """One sequence's share of a batch."""

    sequence: Sequence
    tokens: int
    computed_after: int
    yields: bool
    drafts: int = 0  # the last of its tokens, right or not
    got: int = 0  # tokens that it brought
    comes: int = 0  # tokens that it brings unless the sequence ends: SGLang's device knows before its scheduler does
    prompt: bool = False  # tokens known from the start, or from before a retraction


@dataclass(slots=True)
class Batch:
    """Sequences that compute together, and those that gave way to them."""

    budget: int  # tokens there is room for
    rows: list[Row] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    free: int = 0  # blocks left
    used: tuple[int, ...] = ()  # different blocks in the tables of each group of layers
