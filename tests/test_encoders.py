"""Encoders cut into units over ranks, against plain transformers, bit by bit."""

from __future__ import annotations

from typing import Any

import torch

import shardit
from shardit import DiffusionParallelConfig
from shardit.models import tiny
from tests.ranks import run_ranks


def loaded(rank: int, count: int, method: str, name: str) -> Any:
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    return shardit.load(f"tiny/{name}", DiffusionParallelConfig(pipeline_parallel_size=count))


def thin(rank: int, count: int, method: str) -> None:
    pipe = loaded(rank, count, method, "wan2.2-t2v")
    plain = tiny.load_plain(tiny.resolve("tiny/wan2.2-t2v")).text_encoder
    encoder = pipe.text_encoder
    print(encoder.shardit_relay.owners)
    for length in (7, 12, 7):
        ids = torch.arange(length)[None] + 5
        mask = torch.ones_like(ids)
        mask[:, length - 2 :] = 0
        with torch.no_grad():
            expected = plain(ids, mask, output_hidden_states=True)
            out = encoder(ids, mask, output_hidden_states=True)
        assert len(expected.hidden_states) == len(out.hidden_states) == 9
        assert torch.equal(out.hidden_states[-2], expected.hidden_states[-2])
        assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
        for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(a, b)


def test_thin() -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    run_ranks(2, thin)
