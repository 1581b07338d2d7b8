"""Real `Omni`s of tiny models for tests, and the result of plain diffusers for the same call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shardit import DiffusionParallelConfig, Omni
from shardit.models import tiny
from tests.support.fork_servers import kept_fork_server


@contextlib.contextmanager
def started(name: str, ranks: int = 2, **options: Any) -> Iterator[Omni]:
    """An Omni whose ranks run tests/support/real_session.py."""
    config = DiffusionParallelConfig(pipeline_parallel_size=ranks)
    with kept_fork_server():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Omni, "_session", "real_session:Session")
            made = Omni(f"tiny/{name}", parallel_config=config, **{"timeout_s": 60, **options})
        with made as omni, pytest.MonkeyPatch.context() as patch:
            patch.setenv("SHARDIT_PROGRESS", "0")
            yield omni


@functools.lru_cache(maxsize=4)
def plain(name: str, dtype: str | None = None) -> Any:
    """The plain pipeline."""
    pipe = tiny.load_plain(tiny.resolve(f"tiny/{name}"), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_diffusers(name: str, seed: int, *, dtype: str | None = None, **call: Any) -> list[Image.Image]:
    """Pictures, or the frames of the first video, of one call of plain diffusers."""
    known = all(isinstance(value, (str, int, float)) for value in call.values())
    made = _made_once(name, seed, dtype, tuple(sorted(call.items()))) if known else _made(name, seed, dtype, call)
    return list(made)


@functools.lru_cache(maxsize=100)
def _made_once(name: str, seed: int, dtype: str | None, call: tuple[tuple[str, Any], ...]) -> list[Image.Image]:
    return _made(name, seed, dtype, dict(call))


def _made(name: str, seed: int, dtype: str | None, call: dict[str, Any]) -> list[Image.Image]:
    pipe = plain(name, dtype)
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipe(generator=generator, output_type="pil", **{**tiny.defaults(name), **call})
    return made.frames[0] if hasattr(made, "frames") else made.images


def same(expected: list[Image.Image], got: Any) -> bool:
    """Whether two lists of pictures are equal bit by bit."""
    pairs = list(zip(expected, got, strict=True))
    return bool(pairs) and all(a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
