"""Numbers of tensor ranks that the attention heads of a model allow; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from shardit.errors import UnsupportedError


def check_heads(tp_size: int, class_name: str, most: int) -> None:
    """Raise UnsupportedError if a model has attention of `most` heads, which are fewer than there are ranks."""
    if most < tp_size:
        raise UnsupportedError(
            f"tensor_parallel_size={tp_size} does not fit {class_name}: its attention has {most} heads "
            f"to divide; use 1{f' to {most}' if most > 1 else ''}"
        )


def heads_fit(tp_size: int, queries: int, keys: int) -> bool:
    """Return whether each rank gets key heads, or query heads with copies of their key heads, if no rank has twice as
    many query heads as another."""
    return tp_size <= keys or -(-queries // tp_size) < 2 * (queries // tp_size)


def check_query_heads(
    tp_size: int, class_name: str, queries: int, keys: int, others: Iterable[tuple[int, int]] = ()
) -> None:
    """Raise UnsupportedError with the possible numbers of ranks if the query and key heads of a model, whose key heads
    ranks may have copies of, do not fit. others: numbers of heads of its other attentions."""
    every = [(queries, keys), *others]
    if not all(heads_fit(tp_size, *one) for one in every):
        sizes = [str(n) for n in range(1, queries + 1) if all(heads_fit(n, *one) for one in every)]
        raise UnsupportedError(
            f"tensor_parallel_size={tp_size} does not fit {class_name} with num_attention_heads={queries} and "
            f"num_key_value_heads={keys}; use {' or '.join(filter(None, [', '.join(sizes[:-1]), sizes[-1]]))}"
        )
