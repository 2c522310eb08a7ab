"""Lists of modules as quantisation sections name them: literally, with `*` for any text, or as a regular expression.

A name stands for the module with all that it holds, wherever the checkpoint wraps its decoder. Literal names are looked
up, so that a checkpoint which lists every module of every layer costs no more than one that lists a few.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from apex_opt.ir.patterns import Effort, Matcher, PatternError, expression, glob

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

EXPRESSION: Final = "re:"
"""What stands before a regular expression in a list of names."""

_WRAPPERS: Final = ("model.", "backbone.", "language_model.", "text_model.", "transformer.", "thinker.", "llm.")
_MOST_WRAPPED: Final = 4
_ONE_LAYER: Final = re.compile(r"layers\.(\d{1,9})(?:\.|$)")
_ROOTS: Final = ("model.", "backbone.", "language_model.model.", "model.language_model.")
"""What may stand before `layers.0` in the name of a module: multimodal checkpoints wrap their decoder."""
_FUSED: Final = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}
"""Matrices that engines hold as one, by the name they have then: a rule may be written for either."""
_HEAD: Final = "lm_head"
_EXPERT: Final = re.compile(r"experts\\?\.(\d{1,6})(?!\d)")
_LOOKUP_STEPS, _ENTRY_STEPS = 8, 4
"""Steps that looking up a name, and that keeping one, counts as."""


@dataclass(slots=True)
class _Collected:
    """Entries of a list, sorted by how they are matched."""

    literal: set[str] = field(default_factory=set)
    by_layer: dict[int, list[Matcher]] = field(default_factory=dict)
    anywhere: list[Matcher] = field(default_factory=list)
    expressions: list[tuple[Matcher, tuple[str, ...]]] = field(default_factory=list)
    experts: set[int] = field(default_factory=set)
    head: bool = False

    def add(self, entry: str, effort: Effort) -> None:
        self.experts.update(map(int, _EXPERT.findall(entry)))
        self.head = self.head or _HEAD in entry
        if entry.startswith(EXPRESSION):
            source = entry.removeprefix(EXPRESSION)
            # Where any text may stand first, it makes no difference which.
            roots = _ROOTS[:1] if source.startswith((".*", "^.*")) else _ROOTS
            self.expressions.append((expression(source, effort), roots))
            return
        name = _unwrapped(f"{entry}.").strip(".")
        if is_literal(name):
            effort.spend(_ENTRY_STEPS)
            self.literal.add(name)
            return
        layer = _ONE_LAYER.match(name)
        (self.by_layer.setdefault(int(layer[1]), []) if layer else self.anywhere).append(glob(name, effort))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNames:
    """A list of modules, each with all that it holds.

    `experts` are the numbers of those that it tells from others; `head` is whether it names the LM head.
    """

    effort: Effort
    literal: frozenset[str]
    by_layer: Mapping[int, tuple[Matcher, ...]]
    anywhere: tuple[Matcher, ...]
    expressions: tuple[tuple[Matcher, tuple[str, ...]], ...]
    experts: frozenset[int]
    head: bool

    @classmethod
    def parse(cls, entries: Iterable[str], effort: Effort) -> ModuleNames:
        """The modules that entries name.

        Raises
        ------
        PatternError    an entry behind `re:` that is no expression, or one that cannot be matched here
        """
        found = _Collected()
        for entry in dict.fromkeys(entries):
            try:
                found.add(entry, effort)
            except PatternError as error:
                error.entry = entry
                raise
        return cls(
            effort=effort,
            literal=frozenset(found.literal),
            by_layer={layer: tuple(globs) for layer, globs in found.by_layer.items()},
            anywhere=tuple(found.anywhere),
            expressions=tuple(found.expressions),
            experts=frozenset(found.experts),
            head=found.head,
        )

    def hold(self, layer: int, module: str) -> bool:
        """Whether a module of a layer, such as `mlp.down_proj`, is among them.

        Raises
        ------
        PatternError    matching takes more steps than a file may cost
        """
        within, _, last = module.rpartition(".")
        names = [f"layers.{layer}.{module}"]
        if fused := _FUSED.get(last):
            names.append(f"layers.{layer}.{within}.{fused}")
        return any(self._hold(layer, name) for name in names)

    def _hold(self, layer: int, name: str) -> bool:
        if self.literal:
            self.effort.spend(_LOOKUP_STEPS)
            parts = name.split(".")
            ends = range(1, len(parts) + 1)
            if any(".".join(parts[start:end]) in self.literal for end in ends for start in range(end)):
                return True
        globs = (*self.by_layer.get(layer, ()), *self.anywhere)
        if globs:
            text = self.effort.text(name)
            dots = text.at.get(".", 0)
            if any(matcher(text, 1 | dots << 1) & (dots | 1 << text.length) for matcher in globs):
                return True
        return any(matcher(self.effort.text(root + name), 1) for matcher, roots in self.expressions for root in roots)


def is_literal(entry: str) -> bool:
    """Whether an entry names a module as it is."""
    return not entry.startswith(EXPRESSION) and not any(sign in entry for sign in "*?[")


def _unwrapped(entry: str) -> str:
    """A name without what wraps the decoder, where it names layers."""
    name = entry
    for _ in range(_MOST_WRAPPED):
        if name.startswith("layers."):
            return name
        name = name.removeprefix(next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""))
    return entry
