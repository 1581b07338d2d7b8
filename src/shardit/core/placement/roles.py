"""The purpose of each component of a model, which decides its placement; defined by the task that runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ALONE = ""
"""The name of a module that is parallelized without a pipeline."""


@dataclass(frozen=True)
class Roles:
    """The components of a task, by name.

    title: the pipeline, in messages. stepped: called in every step of a request, so cut into blocks over the stages,
    and their linears over tensor ranks. encoders: called once in a request; large ones are split by layers, their
    linears over tensor ranks. whole: encoders that must not be split, with the reason. vaes: those that decode; tiled:
    those among them that support tiling. no_tiles: why there are none. branches: micro-batches that one request can
    have in flight.
    """

    title: str
    stepped: frozenset[str]
    encoders: frozenset[str] = frozenset()
    whole: Mapping[str, str] = field(default_factory=dict)
    vaes: frozenset[str] = frozenset()
    tiled: tuple[str, ...] = ()
    no_tiles: str = ""
    branches: int = 1
