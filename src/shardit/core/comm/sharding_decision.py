"""Comparison of the sharding decisions of all ranks, before anything is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from shardit.core.comm.p2p import Comm
from shardit.core.runtime.digests import short_hash
from shardit.errors import InputError

T = TypeVar("T")


def collective_decision(
    ranks: Comm, name: str, decide: Callable[[], T], describe: Callable[[T], dict[str, str]] = lambda _: {}
) -> T:
    """Return the result of `decide`, which must be equal on every rank. Collective, one small message.

    name: of the model or pipeline, for messages. describe: returns the parts of the decision as text, by their names in
    messages. Raises InputError on all ranks if they differ, or if any of them refuses: a rank that raised alone would
    leave the others waiting.
    """
    found, refusal, words = None, None, {}
    try:
        found = decide()
        words = describe(found)
    except InputError as error:
        refusal = error
    encoded = [repr(item).encode() for item in (str(refusal), *words.items())]
    if len(set(ranks.group.gather_bytes(short_hash(*encoded)))) > 1:
        everything = ranks.group.gather_objects((None if refusal is None else str(refusal), words))
        if refusal is None:
            raise InputError(_difference(name, everything))
    if refusal is not None:
        raise refusal
    return found  # pyright: ignore[reportReturnType]


def _difference(title: str, everything: list[tuple[str | None, dict[str, str]]]) -> str:
    """Return one line about the parts on which ranks have decided differently."""
    for rank, (refusal, _) in enumerate(everything):
        if refusal is not None:
            return f"rank {rank} refuses, others do not: {refusal}"
    decisions = [words for _, words in everything]
    names = dict.fromkeys(name for words in decisions for name in words)
    wrong = [name for name in names if len({words.get(name) for words in decisions}) > 1]
    return (
        f"ranks would shard {', '.join(wrong) or 'the components'} of {title} in different ways: give every rank the "
        "same components, in the same dtype, and the same arguments"
    )
