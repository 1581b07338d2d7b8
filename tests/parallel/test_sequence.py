"""Sequence parallelism of whole tiny pipelines and of transformers alone, against plain diffusers."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, RankError, UnsupportedError
from shardit.core.comm.collectives import Collectives
from shardit.core.runtime.pending import materialize
from shardit.diffusion.loading.variants import image_pipeline
from shardit.diffusion.request.pipeline_signature import signature_of
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import Session
from shardit.models import tiny
from shardit.parallel.attention import hook
from tests.diffusion.test_parallelize import join, quiet, write_lora
from tests.support import brought
from tests.support.ranks import run_ranks
from tests.support.whole_pipelines import Case, make_requests
from tests.support.whole_pipelines import plain as plain_pipeline

ULYSSES, RING = {"ulysses_degree": 2}, {"ring_degree": 2}
FAST = ("flux", "sd3.5", "wan2.2-ti2v", "z-image")
CLOSE = 1e-5


def run(pipe: Any, name: str, **call: Any) -> torch.Tensor:
    """Latents of one request (pixels where the pipeline cannot give latents)."""
    other = image_pipeline(pipe)
    call = {"output_type": "np" if "layered" in name else "latent", **call}
    signatures = [None if p is None else signature_of(type(p), dict(p.config)) for p in (pipe, other)]
    request = make_requests(Case(name, call=call), *signatures)[0]
    chosen = pipe if request.pipeline == type(pipe).__name__ else other
    out = quiet(chosen)(**request.call_arguments(), generator=torch.Generator("cpu").manual_seed(1))
    out = out.frames if hasattr(out, "frames") else out.images
    return out if isinstance(out, torch.Tensor) else torch.tensor(np.stack([np.asarray(o) for o in out]))


def distance(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Relative L2 distance."""
    assert expected.shape == got.shape
    assert type(got) is torch.Tensor
    return float((expected.double() - got.double()).norm() / expected.double().norm())


def pipelines(rank: int, count: int, method: str, names: list[str], ways: list[dict], call: dict) -> None:
    join(rank, count, method)
    for name in names:
        expected = None
        for way in ways:
            pipe = brought.pipeline(name)
            if expected is None:
                expected = run(pipe, name, **call)
            assert shardit.parallelize(pipe, DiffusionParallelConfig(**way), timeout_s=60) is pipe
            for _ in range(2):  # the first call of a kind is checked, later ones are not
                error = distance(expected, run(pipe, name, **call))
                assert error <= CLOSE, (name, way, error)
            assert pipe.transformer.shardit_sequence.attention.sent_bytes > 0
            assert any(p is not None for plans in pipe.transformer.shardit_sequence._plans.values() for p, _ in plans)


def compare(
    count: int, names: list[str] | tuple[str, ...], ways: list[dict], timeout: float = 200, **call: Any
) -> None:
    for name in names:
        tiny.resolve(f"tiny/{name}")
    run_ranks(count, pipelines, list(names), ways, call, timeout=timeout)


@pytest.mark.parametrize("name", FAST)
def test_pipelines(name: str) -> None:
    compare(2, [name], [ULYSSES, RING])


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in tiny.names() if name not in FAST])
def test_other_pipelines(name: str) -> None:
    compare(2, [name], [ULYSSES, RING], timeout=300)


def test_three_ranks_and_odd_lengths() -> None:
    compare(3, ["flux"], [{"ulysses_degree": 3}, {"ring_degree": 3}], height=80, width=112)


def test_ring_of_ulysses() -> None:
    compare(4, ["sd3.5"], [{"ulysses_degree": 2, "ring_degree": 2}])


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["flux", "sd3.5", "z-image", "qwen-image"])
def test_stages_of_other_models(name: str) -> None:
    ways = [{"pipeline_parallel_size": 2, way: 2} for way in ("ulysses_degree", "ring_degree")]
    compare(4, [name], ways, timeout=300)


def session(rank: int, count: int, method: str, case: Case, degrees: dict) -> list[np.ndarray]:
    config = DiffusionParallelConfig(**degrees)
    spec = SessionSpec(f"tiny/{case.name}", config, None, "cpu", case.in_flight, timeout_s=60)
    running = Session(spec, rank=rank, world_size=count, init_method=method)
    requests = make_requests(case, running.info.signature, running.info.signature_with_image)
    outputs = [output for _, output in sorted(running.generate(requests, lambda *_: None).items())]
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [np.asarray(output.latents) for output in outputs]


@pytest.mark.parametrize(
    "degrees",
    [
        pytest.param(ULYSSES, id="ulysses"),
        pytest.param({"pipeline_parallel_size": 2, "ring_degree": 2}, id="stages-ring", marks=pytest.mark.full),
    ],
)
def test_several_requests_in_flight(degrees: dict) -> None:
    """As `Omni` runs them on each rank, with the model loaded from files."""
    case = Case("wan2.2-t2v", in_flight=2, requests=3)
    expected = plain_pipeline(case)
    got = run_ranks(2 * degrees.get("pipeline_parallel_size", 1), session, case, degrees, timeout=200)[0]
    assert len(got) == 3
    for e, g in zip(expected, got, strict=True):
        assert distance(torch.from_numpy(e), torch.from_numpy(g)) <= CLOSE


# Transformers alone: sizes that coincide, masks, and what must not pass.


def alone(name: str, way: dict) -> tuple[nn.Module, nn.Module]:
    """A tiny transformer, plain and over ranks."""
    plain, other = (brought.pipeline(name).transformer for _ in range(2))
    return plain, shardit.parallelize(other, DiffusionParallelConfig(**way), timeout_s=60)


def both(plain: Any, other: Any, **arguments: Any) -> float:
    with torch.no_grad():
        expected = plain(**arguments, return_dict=False)[0]
        first, second = (other(**arguments, return_dict=False)[0] for _ in range(2))
    assert torch.equal(first, second)
    return distance(expected, second)


def wan(rank: int, count: int, method: str, way: dict) -> int:
    join(rank, count, method)
    plain, other = alone("wan2.2-t2v", way)
    torch.manual_seed(0)
    text_dim, channels = plain.config.text_dim, plain.config.in_channels
    # Tokens of video: 24. Text as long as a shard, as the whole, as both, shorter than the ranks; then odd lengths.
    for text in (12, 24, 48, 1, 8, 7):
        video = torch.randn(1, channels, 3, 4, 8)
        words = torch.randn(1, text, text_dim)
        assert both(plain, other, hidden_states=video, timestep=torch.tensor([3]), encoder_hidden_states=words) <= CLOSE
    for height, width, batch in ((6, 6, 1), (2, 2, 1), (6, 10, 2)):  # 27 tokens, 3, 45 (of two samples)
        video = torch.randn(batch, channels, 3, height, width)
        words = torch.randn(batch, 5, text_dim)
        steps = torch.tensor([3] * batch)
        assert both(plain, other, hidden_states=video, timestep=steps, encoder_hidden_states=words) <= CLOSE
    with torch.inference_mode():
        assert both(plain, other, hidden_states=video, timestep=steps, encoder_hidden_states=words) <= CLOSE
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        arguments = {"hidden_states": video, "timestep": steps, "encoder_hidden_states": words, "return_dict": False}
        assert distance(plain(**arguments)[0], other(**arguments)[0]) <= 2e-2
    return other.shardit_sequence.checked


@pytest.mark.parametrize("way", [ULYSSES, RING], ids=["ulysses", "ring"])
def test_lengths_that_coincide(way: dict) -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    assert len(set(run_ranks(2, wan, way))) == 1


def masked(rank: int, count: int, method: str, way: dict) -> None:
    join(rank, count, method)
    plain, other = alone("qwen-image", way)
    torch.manual_seed(0)
    hidden = torch.randn(2, 24, plain.config.in_channels)
    words = torch.randn(2, 9, plain.config.joint_attention_dim)
    shapes = [[(1, 4, 6)]] * 2
    for lengths in ((9, 9), (9, 4), (3, 9), (1, 2)):
        mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
        arguments = {"hidden_states": hidden, "encoder_hidden_states": words, "encoder_hidden_states_mask": mask}
        assert both(plain, other, **arguments, timestep=torch.tensor([0.3, 0.3]), img_shapes=shapes) <= CLOSE
    assert masks_met(other)


@pytest.mark.parametrize("way", [ULYSSES, RING], ids=["ulysses", "ring"])
def test_masks_of_joint_attention(way: dict) -> None:
    tiny.resolve("tiny/qwen-image")
    run_ranks(2, masked, way)


def masks_met(model: Any) -> bool:
    """Return whether some attention call had a mask with only the columns of each rank's own keys."""
    steps = model.shardit_sequence._steps.values()
    return any(layout.mask_columns for step in steps for layout in step.layouts or ())


def ragged(rank: int, count: int, method: str, way: dict) -> None:
    """Z-Image takes lists: pictures and prompts of several lengths are padded and masked."""
    join(rank, count, method)
    plain, other = alone("z-image", way)
    torch.manual_seed(0)
    for sizes in (((8, 8), (16, 8)), ((8, 12), (8, 8))):
        pictures = [torch.randn(plain.config.in_channels, 1, *size) for size in sizes]
        words = [torch.randn(n, plain.config.cap_feat_dim) for n in (5, 40)]
        with torch.no_grad():
            expected, got = (m(pictures, torch.tensor([0.4, 0.4]), words, return_dict=False)[0] for m in (plain, other))
        assert all(distance(e, g) <= CLOSE for e, g in zip(expected, got, strict=True))
    assert masks_met(other)


@pytest.mark.parametrize("way", [ULYSSES, RING], ids=["ulysses", "ring"])
def test_lists_of_tensors(way: dict) -> None:
    tiny.resolve("tiny/z-image")
    run_ranks(2, ragged, way)


def other_back_end(rank: int, count: int, method: str, way: dict) -> None:
    join(rank, count, method)
    plain, other = alone("wan2.2-t2v", way)
    for model in (plain, other):
        model.set_attention_backend("flex")  # type: ignore[operator]
    torch.manual_seed(0)
    words = torch.randn(1, 5, plain.config.text_dim)
    video = torch.randn(1, plain.config.in_channels, 3, 4, 8)
    arguments = {"hidden_states": video, "timestep": torch.tensor([3]), "encoder_hidden_states": words}
    if way == ULYSSES:
        assert both(plain, other, **arguments) <= CLOSE
        return
    with pytest.raises(UnsupportedError, match="ring_degree=2 does not work with the attention back end 'flex'"):
        other(**arguments)


@pytest.mark.parametrize("way", [ULYSSES, RING], ids=["ulysses", "ring"])
def test_other_attention_back_ends(way: dict) -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    run_ranks(2, other_back_end, way)


def with_lora(rank: int, count: int, method: str, folder: str, way: dict) -> None:
    """Adapters that are loaded after the model was made parallel, and their scale."""
    join(rank, count, method)
    plain, pipe = (quiet(brought.pipeline("flux")) for _ in range(2))
    without = run(plain, "flux")
    plain.load_lora_weights(folder)
    expected = run(plain, "flux")
    assert distance(without, expected) > 1e-2
    shardit.parallelize(pipe, DiffusionParallelConfig(**way), timeout_s=60)
    assert distance(without, run(pipe, "flux")) <= CLOSE
    pipe.load_lora_weights(folder)
    assert distance(expected, run(pipe, "flux")) <= CLOSE


def test_lora(tmp_path: Path) -> None:
    write_lora(tmp_path)
    run_ranks(2, with_lora, str(tmp_path), ULYSSES)


class Block(nn.Module):
    """A block that cannot be sharded: a mean over tokens, or a change of its argument."""

    def __init__(self, fault: str):
        super().__init__()
        self.linear, self.fault = nn.Linear(8, 8), fault

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fault == "mean":
            return hidden_states + self.linear(hidden_states.mean(1, keepdim=True))
        if self.fault == "one rank" and hidden_states.shape[1] == 3:
            raise ValueError("three tokens are too few")
        if self.fault == "one rank":  # nothing of it can be partitioned
            return hidden_states + self.linear(hidden_states[:, :1])
        if self.fault == "writes":
            hidden_states.mul_(2)
        return self.linear(hidden_states)


class Model(nn.Module):
    def __init__(self, fault: str):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(fault) for _ in range(2)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states) + 1  # the glue looks at all of it
        return hidden_states


def wrong(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    config = DiffusionParallelConfig(ulysses_degree=count)
    tokens = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0))
    right = Model("none")
    with torch.no_grad():
        expected = right(tokens)
        assert distance(expected, shardit.parallelize(right, config, timeout_s=30)(tokens)) <= CLOSE
    for fault, said in (
        ("mean", "no way was found"),
        ("one rank", "no way was found"),
        ("writes", "writes to its arg"),
    ):
        model = shardit.parallelize(Model(fault), config, timeout_s=30)
        with pytest.raises(UnsupportedError, match=rf"(?s)Block \(Model.blocks.0\).*{said}|{said}.*Block \(Model.bl"):
            model(tokens)
    with pytest.raises(UnsupportedError, match="no block lists"):
        shardit.parallelize(nn.Linear(2, 2), config)


def test_blocks_that_cannot_be_sharded_are_refused() -> None:
    run_ranks(2, wrong)


STEP = [1]
"""A number of which neither arguments nor modules tell."""


class Joined(nn.Module):
    """Attends to its tokens and to some of the text, of each sample on its own, whose number follows from values.

    how: where that number comes from. "tokens first": the batch is the second dimension, and there is no text.
    """

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        if self.how == "tokens first":
            out = self.attend(hidden_states.transpose(0, 1), hidden_states.transpose(0, 1), valid[:, None, None])
            return hidden_states + out.transpose(0, 1)
        outs = []
        for own, words, marks in zip(hidden_states.split(1), text.split(1), valid, strict=True):
            if self.how == "nonzero":
                words = words[:, marks.nonzero().flatten()]
            elif self.how == "outside":
                words = words[:, :: STEP[0]]
            else:
                words = words[:, [n for n, mark in enumerate(marks.tolist()) if mark]]
            if self.how == "fails" and not marks.any():
                raise ValueError("no text")
            outs.append(self.attend(own, torch.cat([own, words], 1), None))
        return hidden_states + torch.cat(outs)

    def attend(self, own: torch.Tensor, joined: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q = self.qkv(own).chunk(3, -1)[0]
        _, k, v = self.qkv(joined).chunk(3, -1)
        q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class JoinedModel(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Joined(how) for _ in range(2)])

    def forward(self, hidden_states: torch.Tensor, text: Any, valid: Any, return_dict: bool = False) -> Any:
        for block in self.blocks:
            hidden_states = block(hidden_states, text, valid)
        return (hidden_states,)


def joined(how: str, way: dict) -> tuple[nn.Module, Any]:
    other = shardit.parallelize(JoinedModel(how), DiffusionParallelConfig(**way), timeout_s=30)
    return JoinedModel(how), other


def texts(*lengths: int) -> dict[str, torch.Tensor]:
    """Arguments of a batch of texts of these lengths."""
    torch.manual_seed(1)
    tokens, text = torch.randn(len(lengths), 7, 8), torch.randn(len(lengths), 12, 8)
    return {"hidden_states": tokens, "text": text, "valid": torch.arange(12)[None] < torch.tensor(lengths)[:, None]}


def lengths_of_values(rank: int, count: int, method: str, way: dict) -> None:
    """They are read off each call, in batches of all sizes; a rank that fails ends the call on all."""
    join(rank, count, method)
    for how in ("nonzero", "tolist"):
        plain, other = joined(how, way)
        for lengths in ((9,), (3,), (12,), (4, 11), (8, 1), (5,)):
            assert both(plain, other, **texts(*lengths)) <= CLOSE, (how, lengths)
        assert not other.shardit_sequence.partitioned
    plain, other = joined("fails", way)
    assert both(plain, other, **texts(8)) <= CLOSE
    elsewhere = r"Joined \(JoinedModel.blocks.0\) fails on another rank"
    with pytest.raises(ValueError if rank else UnsupportedError, match="no text" if rank else elsewhere):
        other(**texts(3))
    assert both(plain, other, **texts(9)) <= CLOSE


def lengths_of_nothing(rank: int, count: int, method: str, way: dict) -> None:
    """The known lengths do not fit any more, and no exchange would notice: an error on all ranks."""
    join(rank, count, method)
    plain, other = joined("outside", way)
    assert both(plain, other, **texts(9)) <= CLOSE
    STEP[0] = 2
    with pytest.raises(RankError, match=r"lengths \[\d, \d, \d\], but an earlier call of the same shapes had"):
        other(**texts(9))


@pytest.mark.parametrize("way", [ULYSSES, RING], ids=["ulysses", "ring"])
def test_lengths_that_do_not_follow_from_shapes(way: dict) -> None:
    run_ranks(2, lengths_of_values, way)
    run_ranks(2, lengths_of_nothing, way)


def tokens_first(rank: int, count: int, method: str, way: dict) -> None:
    """The batch is tried as tokens; the ranks have other numbers of samples then, of tensors that are exchanged."""
    join(rank, count, method)
    plain, other = joined("tokens first", way)
    for lengths in ((5, 3, 7, 2), (5,), (5, 3, 7)):
        given = texts(*lengths)
        given |= {"hidden_states": given["text"].transpose(0, 1), "text": given["text"][:, :1]}
        assert both(plain, other, **given) <= CLOSE


@pytest.mark.parametrize("way", [{"ulysses_degree": 3}, {"ring_degree": 3}], ids=["ulysses", "ring"])
def test_ways_of_other_sizes_on_each_rank(way: dict) -> None:
    run_ranks(3, tokens_first, way)


def silent(rank: int, count: int, method: str, way: dict) -> None:
    """Without communication the result must differ, or the other tests would show nothing; and the check sees it."""
    join(rank, count, method)
    name = "wan2.2-t2v"
    plain, other = alone(name, way)
    torch.manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, plain.config.in_channels, 3, 4, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, plain.config.text_dim),
    }
    assert both(plain, other, **arguments) <= CLOSE
    exchange, rotate = Collectives.all_to_all, Collectives.rotate
    Collectives.all_to_all = lambda self, sends, receives: [r.zero_() for r in receives]  # type: ignore[assignment]
    Collectives.rotate = lambda self, send, receive: lambda: receive.zero_()  # type: ignore[assignment]
    assert both(plain, other, **arguments) > 1e-3
    fresh: Any = alone(name, way)[1]
    assert (
        both(plain, fresh, **arguments) <= CLOSE
    )  # the check sees it: operations are partitioned, which needs neither
    assert fresh.shardit_sequence.partitioned
    assert not other.shardit_sequence.partitioned
    Collectives.all_to_all, Collectives.rotate = exchange, rotate
    assert both(plain, other, **arguments) <= CLOSE


@pytest.mark.parametrize("way", [ULYSSES, RING], ids=["ulysses", "ring"])
def test_without_communication_it_differs(way: dict) -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    run_ranks(2, silent, way)


def gathers(rank: int, count: int, method: str) -> list[int]:
    """Messages of one forward: two exchanges per self-attention, and one gather at the end."""
    join(rank, count, method)
    _, other = alone("wan2.2-t2v", ULYSSES)
    sequence: Any = other.shardit_sequence
    video = torch.randn(1, other.config.in_channels, 3, 4, 8)
    arguments = (video, torch.tensor([3]), torch.randn(1, 5, other.config.text_dim))
    with torch.no_grad():
        other(*arguments)
        before = sequence.attention.sp.messages, sequence.attention.ulysses.comm.messages
        materialize(other(*arguments))
    after = sequence.attention.sp.messages, sequence.attention.ulysses.comm.messages
    return [after[0] - before[0], after[1] - before[1], len(sequence.blocks)]


def test_only_attention_and_one_gather_communicate() -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    for gathered, exchanged, blocks in run_ranks(2, gathers):
        assert gathered == 1
        assert exchanged == 2 * blocks


def watched(rank: int, count: int, method: str, way: dict) -> tuple[set[int], set[tuple[int, ...]]]:
    """Tokens that this rank's linears saw, and (heads, queries, keys) of its attention."""
    join(rank, count, method)
    _, other = alone("wan2.2-t2v", way)
    video = torch.randn(1, other.config.in_channels, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    arguments = (video, torch.tensor([3]), torch.ones(1, 5, other.config.text_dim))
    rows, attended, plain = set(), set(), torch.nn.functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attended.add((query.shape[1], query.shape[2], key.shape[2]))
        return plain(query, key, *args, **kwargs)

    with torch.no_grad():
        for block in other.blocks:
            block.ffn.register_forward_pre_hook(lambda module, args: rows.add(args[0].shape[1]))
        materialize(other(*arguments))  # looked at and checked
        rows.clear()
        hook.BuiltinFunctionType = types.FunctionType  # Ring would refuse another function than torch's
        torch.nn.functional.scaled_dot_product_attention = noted
        materialize(other(*arguments))
    return rows, attended


@pytest.mark.parametrize("way", [ULYSSES, RING, {"tensor_parallel_size": 2}], ids=["ulysses", "ring", "slices"])
def test_no_rank_runs_heads_or_tokens_of_another(way: dict) -> None:
    """24 tokens of video, 5 of text; Ring attends without the function that is watched, and refuses another one."""
    config = brought.pipeline("wan2.2-t2v").transformer.config
    found, heads = run_ranks(2, watched, way), config.num_attention_heads
    whole, by_tokens = heads - heads // 2, "tensor_parallel_size" not in way
    for (rows, attended), own in zip(found, (whole, heads - whole), strict=True):
        assert rows == ({12} if by_tokens else {24})
        over_text = (heads, 12, 5) if by_tokens else (own, 24, 5)
        assert attended == ({over_text} if way == RING else {(own, 24, 24), over_text})
