"""Bytes sent for each step, by the counters of the communication layer, against the formulas of docs/parallelism.md.
(Attention: test_attention.py; sums of slices: test_tensor.py; tiles: test_tiles.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig
from shardit.models import tiny
from tests.diffusion.test_parallelize import join, quiet
from tests.support import brought
from tests.support.ranks import run_ranks

NAME, TOKENS, TEXT = "wan2.2-t2v", 144, 5
VIDEO = (3, 12, 16)  # latent frames, height, width: patches of 1 x 2 x 2 make 144 tokens


def sent(rank: int, count: int, method: str, axes: dict[str, int]) -> dict[str, Any]:
    """Return the bytes that this rank sends in a step with two branches: hops of its chain, results to others."""
    join(rank, count, method)
    pipe = quiet(brought.pipeline(NAME))
    model = pipe.transformer
    config = DiffusionParallelConfig(**axes, pipeline_chunks=1)
    shardit.parallelize(model, config, timeout_s=60)
    runtime = model.shardit_stages.runtime
    torch.manual_seed(0)
    video, text = torch.randn(1, model.config.in_channels, *VIDEO), torch.randn(2, 1, TEXT, model.config.text_dim)

    def step() -> list[torch.Tensor]:
        with torch.no_grad():
            branches = [model(video, torch.tensor([3]), words, return_dict=False)[0] for words in text]
            outs = [branch * 1 for branch in branches]
        runtime.flush()
        return outs

    step()
    comms = runtime.comm, runtime.replica
    before = [(comm.sent_bytes, comm.messages) for comm in comms]
    out = step()[0]
    (hops, hop_messages), (results, result_messages) = (
        (comm.sent_bytes - b, comm.messages - m) for comm, (b, m) in zip(comms, before, strict=True)
    )
    if comms[0] is comms[1]:  # one chain: both go through the same counters
        hops, hop_messages = results, result_messages
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return {
        "bytes": hops,
        "messages": hop_messages,
        "results": results,
        "stage": runtime.mesh.pp_rank,
        "hidden": TOKENS * width * 4,
        "result": out.numel() * 4,
        "ran": model.shardit_stages.cut.ran.total(),
    }


def test_stages_send_hidden_states_and_results() -> None:
    """One cut: the first stage sends the hidden states of each branch, the last one its result."""
    tiny.resolve(f"tiny/{NAME}")
    first, last = run_ranks(2, sent, {"pipeline_parallel_size": 2})
    assert (first["bytes"], first["messages"]) == (2 * first["hidden"], 2)
    assert (last["bytes"], last["messages"]) == (2 * last["result"], 2)


@pytest.mark.timeout(200)
def test_guidance_ranks_halve_what_a_chain_sends() -> None:
    """Both branches on one chain move twice what each of two chains moves."""
    tiny.resolve(f"tiny/{NAME}")
    both = run_ranks(2, sent, {"pipeline_parallel_size": 2})
    of_ranks = run_ranks(4, sent, {"pipeline_parallel_size": 2, "cfg_parallel_size": 2})
    assert [r["bytes"] for r in of_ranks if r["stage"] == 0] == [both[0]["bytes"] // 2] * 2
    # The last stage of each chain sends its branch's result to all three others.
    assert [r["results"] for r in of_ranks if r["stage"] == 1] == [3 * both[1]["result"]] * 2
