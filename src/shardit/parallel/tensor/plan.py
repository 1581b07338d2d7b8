"""The cut of a model over the ranks of the tensor axis, as data, and the builder of this plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from shardit.core.placement.slices import Parts, Shards, even
from shardit.errors import UnsupportedError
from shardit.parallel.tensor import rules as rules
from shardit.parallel.tensor.heads import Heads, has_hooks, join, owner_of, runs_as
from shardit.parallel.tensor.module_sizes import number_at

PLAIN = "_shardit_plain"
"""The attribute of classes made for a role, or for an adapter: the original class."""

WHOLE = "shardit_whole"
"""The attribute of modules that were cut and are whole again."""

_IS_WHOLE = " is whole on every rank: "

Kind = Literal["rows", "gathered", "vocabulary", "norm", "gated_norm", "sum", "first", "channels", "heads"]


@dataclass(frozen=True)
class Role:
    """The communication of a module around its slice; `shards` is the cut of its weight.

    rows: sums its output; channels: the same for a convolution. gathered: gathers it. vocabulary: looks up its own
    rows, then sums. norm: sums the squares; gated_norm: the same after a product with gates. sum: sums the results of
    its own code; only the first rank uses the parameters in `once`. first: is whole, and every rank takes the result of
    the first rank. heads: has its own code, and gets of the arguments `tables`, which differ by head, the part for its
    heads of `head` channels; alone: heads that it returns pass no linear, and are gathered.
    Linears cut by columns need no role: their outputs are cut.
    """

    kind: Kind
    shards: Shards
    once: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    head: int = 0
    alone: bool = False


@dataclass(frozen=True)
class NormPair:
    """Two norms across all heads of one attention, and the linear before the second: their sums of squares are sent
    together. All are module names."""

    query_norm: str
    key_linear: str
    key_norm: str


@dataclass
class TensorPlan:
    """The cut of one model over `size` ranks, for all of them.

    cuts: by parameter name (every name of tied weights); all others are whole on every rank. roles: by module name.
    pairs: norms that reduce together. attributes: by module name, numbers to set on it, one for each rank; totals: by
    module name and attribute, numbers of the whole module that are not the sum of these. units: names of modules with
    code between their cut linears, which is assumed to work on slices as on the whole: attention, feed-forward and
    similar. borrowers: attention over keys of another layer, which has no whole keys to compare with. notes: modules
    that are unexpectedly whole, and why. family: the rules for classes of the model's library.
    """

    size: int
    family: rules.Family = field(default_factory=rules.Family, repr=False)
    cuts: dict[str, Shards] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    pairs: list[NormPair] = field(default_factory=list)
    attributes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    totals: dict[tuple[str, str], int] = field(default_factory=dict)
    units: list[str] = field(default_factory=list)
    borrowers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def forget(self, module: str) -> None:
        """Remove everything in a module from the plan."""
        inside = f"{module}." if module else ""
        for found in (self.cuts, self.roles, self.attributes):
            for name in [name for name in found if f"{name}.".startswith(inside)]:
                del found[name]
        self.pairs[:] = [pair for pair in self.pairs if not pair.query_norm.startswith(inside)]


class Cutter:
    """Builds a plan for one model; its methods are the steps of rules.

    parts: number of slices, or their relative sizes; size: number of slices. done: names of modules covered by a rule
    for a module above them. whole: names of modules that stay whole, and whether a trial may still find how to cut
    them. attentions: number of cut ones. too_few: the heads of attentions with fewer heads than
    ranks.
    """

    def __init__(self, model: nn.Module, parts: Parts, family: rules.Family):
        self.model, self.parts = model, parts
        self.size = parts if isinstance(parts, int) else len(parts)
        self.family = family
        self.plan = TensorPlan(self.size, family)
        self.done: set[str] = set()
        self.whole: dict[str, bool] = {}
        self.attentions = 0
        self.too_few: list[Heads] = []

    def columns(self, name: str, linear: Any, cut: Shards) -> None:
        """Cut a linear by its outputs."""
        self.tensors(name, linear, cut)
        self.set_numbers(name, linear, {"out_features": cut.total}, cut.lengths)

    def rows(self, name: str, linear: Any, cut: Shards) -> None:
        """Cut a linear by its inputs; its bias stays whole."""
        by_rows = Shards(1, cut.total, cut.ranks)
        self.plan.cuts[join(name, "weight")] = by_rows
        self.set_numbers(name, linear, {"in_features": cut.total}, cut.lengths)
        self.plan.roles[name] = Role("rows", by_rows)
        self.done.add(name)

    def gathered(self, name: str, linear: Any) -> None:
        """Cut a linear by its outputs, which are gathered."""
        if linear.out_features >= self.size:
            cut = even(linear.out_features, self.parts)
            self.tensors(name, linear, cut)
            self.plan.roles[name] = Role("gathered", cut)

    def tensors(self, name: str, module: Any, cut: Shards) -> None:
        """Cut all parameters of a module along their first dimension."""
        for part, _ in module.named_parameters(recurse=False):
            self.plan.cuts[join(name, part)] = cut
        self.done.add(name)

    def set_numbers(self, name: str, module: nn.Module, full: dict[str, int], lengths: Sequence[int]) -> None:
        """Record the attributes of a module with the full numbers, to be set to a rank's own."""
        found = {key: tuple(lengths) for key, number in full.items() if number_at(module, key) == number}
        if found:
            self.plan.attributes.setdefault(name, {}).update(found)
        if found and sum(lengths) != next(iter(full.values())):
            self.plan.totals.update({(name, key): full[key] for key in found})

    def left_whole(self, name: str, why: str, tried: bool = False) -> bool:
        """Record that a module is unexpectedly whole; it counts as covered. tried: unless a trial finds how to cut
        it."""
        self.plan.notes.append(f"{name}{_IS_WHOLE}{why}")
        self.whole[name] = tried
        return True

    def stays_whole(self, name: str) -> bool:
        """Return whether a module, or one that it is in, was left whole for good."""
        return any(
            not tried and f"{name}.".startswith(f"{whole}." if whole else "") for whole, tried in self.whole.items()
        )

    def forget_notes(self, name: str) -> None:
        """Forget that a module, or one in it, was left whole: it is cut after all."""
        inside = f"{name}." if name else ""
        for whole in [whole for whole in self.whole if f"{whole}.".startswith(inside)]:
            del self.whole[whole]
            self.plan.notes[:] = [note for note in self.plan.notes if not note.startswith(f"{whole}{_IS_WHOLE}")]

    def has_too_few(self, name: str, heads: Heads) -> bool:
        """Do the same for attention with fewer heads than ranks."""
        self.too_few.append(heads)
        number = heads.queries if heads.replicates else heads.keys
        return self.left_whole(name, f"{number} heads cannot be divided among {self.size} ranks")

    def check_borrowers(self) -> None:
        """Raise UnsupportedError if some layers are cut and others whole in a model whose layers share keys."""
        kinds = {type(self.model.get_submodule(name)) for name in self.plan.borrowers}
        alike = [name for name, module in self.model.named_modules() if type(module) in kinds]
        whole = [name for name in alike if name in self.whole]
        if whole and len(whole) < len(alike):
            raise UnsupportedError(
                f"tensor_parallel_size={self.size}: {whole[0]} cannot be cut as other layers, which share its keys; "
                "use pipeline_parallel_size"
            )

    def vocabulary(self, name: str, table: Any) -> None:
        """Cut a large table by rows, so that a rank reads one contiguous run of the file."""
        if table.num_embeddings < max(rules.VOCABULARY, self.size):
            return
        if not runs_as(table, rules.EMBEDDING):
            self.left_whole(name, f"{type(table).__name__} has a forward of its own")
        elif has_hooks(table):
            self.left_whole(name, "it has hooks")
        elif table.max_norm is not None:
            self.left_whole(name, "it changes the rows that it looks up (max_norm)")
        elif not table.sparse:
            cut = even(table.num_embeddings, self.parts)
            self.tensors(name, table, cut)
            self.plan.roles[name] = Role("vocabulary", cut)

    def agree_on_tied(self) -> None:
        """Cut shared modules once, and weights tied between two modules only if both are cut alike.

        Raises UnsupportedError if a module cannot be left whole separately.
        """
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for tied in names.values():
            owners = {id(self.model.get_submodule(owner_of(name))): name for name in reversed(tied)}
            cuts = {self.plan.cuts.get(name) for name in owners.values()}
            if len(cuts) > 1:
                self._keep_whole(list(owners.values()))
            elif (cut := cuts.pop()) is not None:
                self.plan.cuts.update(dict.fromkeys(tied, cut))

    def _keep_whole(self, tied: list[str]) -> None:
        for name in tied:
            role = self.plan.roles.get(owner_of(name))
            if name in self.plan.cuts and (role is None or role.kind not in ("gathered", "vocabulary")):
                raise UnsupportedError(
                    f"tensor_parallel_size={self.size} does not fit {type(self.model).__name__}: {name} is tied to "
                    f"{next(other for other in tied if other != name)}, which is used in another way; use 1"
                )
            self.plan.forget(owner_of(name))
            self.left_whole(name, "it is tied to a weight that is used in another way")


def describe_slices(plan: TensorPlan | None) -> str:
    """Describe the slices of a component's tensors."""
    return repr(sorted(plan.cuts.items(), key=lambda cut: cut[0])) if plan is not None else ""
