"""Declared sequence plans: a model declares the places at which its tensors are split over ranks and gathered.

A model class has an attribute `_sp_plan`, a dict. Its keys name modules: "" is the model, "blocks.0" one of its
modules, "blocks.*" every element of a ModuleList, "outputs.main" an entry of a ModuleDict. Its values are a dict
of parameter names (inputs, split before the module's forward) and output numbers (split after it), or one or several
SequenceParallelOutput for outputs, which are gathered after it:

    _sp_plan = {
        "rope": {0: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True)},
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    }

"Sequence parallel" here is what diffusers calls context parallel. See docs/sequence-plans.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardit.errors import InputError


@dataclass(frozen=True)
class SequenceParallelInput:
    """Split one tensor over the sequence ranks. None in place of the tensor stays None. Raises InputError for wrong
    values."""

    split_dim: int
    """Dimension of the tokens; a negative number counts from the end. Error: outside of `expected_dims`."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have; None for any. Error at the split: another number."""
    split_output: bool = False
    """False splits a parameter of the module's forward: the key is its name. True splits an output: the key is its
    number, 0 for a module that returns one tensor."""
    auto_pad: bool = False
    """True pads with zeros until all ranks have equally many tokens, and keeps the padding out of attention and results
    (Ulysses only). False gives some ranks one token less."""

    def __post_init__(self) -> None:
        _check(type(self).__name__, "split_dim", self.split_dim, self.expected_dims)


@dataclass(frozen=True)
class SequenceParallelOutput:
    """Gather an output of a module. A module with several outputs has a list, with None for each that stays as it is.
    Raises InputError for wrong values."""

    gather_dim: int
    """Dimension of the tokens; a negative number counts from the end. Error: outside of `expected_dims`."""
    expected_dims: int | None = None
    """Number of dimensions that the output must have; None for any. Error when it is gathered: another number."""

    def __post_init__(self) -> None:
        _check(type(self).__name__, "gather_dim", self.gather_dim, self.expected_dims)


def _check(kind: str, name: str, dim: object, expected: object) -> None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise InputError(f"{kind}: {name} must be a whole number, got {dim!r}")
    if expected is None:
        return
    if not isinstance(expected, int) or isinstance(expected, bool) or expected < 1:
        raise InputError(f"{kind}: expected_dims must be a whole number of at least 1 or None, got {expected!r}")
    if not -expected <= dim < expected:
        raise InputError(f"{kind}: {name}={dim} does not exist in a tensor of {expected} dimensions")


ModulePlan = (
    Mapping[str | int, SequenceParallelInput | Sequence[SequenceParallelInput]]
    | SequenceParallelOutput
    | Sequence[SequenceParallelOutput | None]
)
"""The split or gather at one module. A parameter that is a list of tensors takes a list."""

SequencePlan = Mapping[str, ModulePlan]
"""The type of `_sp_plan`: plans by names of modules."""
