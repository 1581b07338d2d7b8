"""Lines for the user about rows: their number, their tokens, and left-out ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardit.errors import listed
from shardit.training.language.examples import Encoder, Example
from shardit.training.language.rows import TrainingRows


def row_notes(name: str, rows: TrainingRows, encoder: Encoder, examples: Sequence[Example]) -> Iterator[str]:
    """Yield the lines about the rows of one setting. encoder: has encoded them."""
    counts, labels = encoder.counts, sum(one.labels for one in examples)
    tokens = sum(len(one.ids) for one in examples)
    yield (
        f"{name}: {counts['texts']} texts, {counts['conversations']} conversations; {labels:,} of {tokens:,} tokens "
        "are learnt"
    )
    if rows.others:
        yield f"{name}: {len(rows.others)} files are not read: {listed(rows.others)}"
    if rows.empty:
        yield f"{name}: {len(rows.empty)} rows are empty and left out: {listed(rows.empty)}"
    if counts["cut"]:
        yield f"{name}: {counts['cut']} rows are cut to {encoder.max_length} tokens (max_length)"
    if encoder.unlearnt:
        yield f"{name}: {len(encoder.unlearnt)} rows have nothing to learn and are left out: {listed(encoder.unlearnt)}"
    if counts["ended"]:
        yield f"{name}: {counts['ended']} conversations get an end token, which the chat template leaves out"
