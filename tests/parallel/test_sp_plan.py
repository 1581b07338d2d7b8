"""Declared sequence plans: every rule and every error, and whole forwards against one device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, InputError, UnsupportedError, parallel_state
from shardit.core.comm.collectives import Collectives, even_sizes
from shardit.diffusion.roles import denoises
from shardit.models import tiny
from shardit.parallel.sequence.declared.model import PlannedSequence
from shardit.parallel.sequence.declared.rules import read_plan
from shardit.parallel.sequence.declared.token_rows import partitioned_rows, runs_of
from shardit.sp_plan import SequenceParallelInput, SequenceParallelOutput
from shardit.sp_sharding import sp_gather, sp_shard
from tests.diffusion.test_parallelize import join
from tests.parallel.test_sequence import CLOSE, RING, ULYSSES, distance, run
from tests.support import brought
from tests.support.plan_models import (
    GATHER,
    PADDED,
    PADDED_MASK,
    SPLIT_MASK,
    WIDTH,
    ByHand,
    Joint,
    Model,
    Pipeline,
    Single,
    split,
)
from tests.support.ranks import run_ranks

WAYS = {
    "ulysses 2": ULYSSES,
    "ring 2": RING,
    "ulysses 3": {"ulysses_degree": 3},
    "ring 3": {"ring_degree": 3},
    "ulysses 2 x ring 2": {"ulysses_degree": 2, "ring_degree": 2},
}


def size_of(way: dict[str, int]) -> int:
    size = 1
    for degree in way.values():
        size *= degree
    return size


def over(model: nn.Module, way: dict[str, int]) -> Any:
    return shardit.parallelize(model, DiffusionParallelConfig(**way), timeout_s=30)


def tokens(count: int, width: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))


def words(count: int) -> torch.Tensor:
    return tokens(count, WIDTH, 2)


def agrees(plain: nn.Module, other: nn.Module, *arguments: Any, **named: Any) -> None:
    """The same as on one device, in the first call and in a later one."""
    with torch.no_grad():
        expected, first, second = plain(*arguments, **named), other(*arguments, **named), other(*arguments, **named)
    wholes = list(expected.values()) if isinstance(expected, dict) else [expected]
    for n, whole in enumerate(wholes):
        one, two = (list(o.values())[n] if isinstance(o, dict) else o for o in (first, second))
        assert torch.equal(one, two)
        assert distance(whole, two) <= CLOSE


# What a plan may say.


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SequenceParallelInput("1"), "split_dim must be a whole number, got '1'"),  # type: ignore[arg-type]
        (lambda: SequenceParallelInput(3, 3), "split_dim=3 does not exist in a tensor of 3 dimensions"),
        (lambda: SequenceParallelOutput(1, 0), "expected_dims must be"),
        (lambda: SequenceParallelOutput(True), "gather_dim must be a whole number, got True"),
    ],
)
def test_values_of_entries(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        make()


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([], "Model._sp_plan must be a dict of module names, got list"),
        ({1: GATHER}, '1 is no module name; "" is the model itself'),
        ({"block.0": {}}, "there is no 'block' in Model (did you mean 'blocks'?); it has positions, embed, blocks"),
        ({"blocks.4": {}}, "there is no '4' in blocks (ModuleList)"),
        ({"outputs.*": GATHER}, "'*' stands for the elements of a ModuleList, not outputs (ModuleDict)"),
        ({"outputs.man": GATHER}, "there is no 'man' in outputs (ModuleDict) (did you mean 'main'?)"),
        ({"blocks.0": {"hiden": split()}}, "Block takes no 'hiden' (did you mean 'hidden'?); it takes hidden, text"),
        ({"": {"y": split()}}, "Model takes no 'y'; it takes x, text, mask"),
        ({"blocks.0": {"hidden": split(output=True)}}, "'hidden' is a parameter, but has split_output=True"),
        ({"positions": {0: split()}}, "0 is the number of an output, so it needs split_output=True"),
        ({"positions": {-1: split(output=True)}}, "outputs are counted from 0, got -1"),
        ({"positions": {0: GATHER}}, "0 needs a SequenceParallelInput, got SequenceParallelOutput"),
        ({"blocks.0": {"hidden": None}}, "'hidden' needs a SequenceParallelInput, got None"),
        ({"blocks.0": {1.5: split()}}, "1.5 is neither a parameter name nor the number of an output"),
        ({"outputs.main": split()}, "must be a dict of inputs, or SequenceParallelOutput"),
        ({"blocks.0": {"hidden": split(pad=True)}}, "auto_pad (Model._sp_plan: hidden of blocks.0) works with Ulysses"),
    ],
)
def test_plans_that_do_not_fit(plan: Any, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        read_plan(Model(plan), "_sp_plan", padding=False)


def test_what_a_plan_names() -> None:
    plan = {
        "": {"x": split()},
        "blocks.*": {"text": split(), "table": [split(), split()]},
        "blocks.1": [GATHER, None],
        "outputs.main": GATHER,
    }
    rules = {r.title: r for r in read_plan(Model(plan), "_sp_plan", padding=True)}
    assert list(rules) == ["Model", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "outputs.main"]
    assert rules["Model"].positions == {"x": 0, "text": 1, "mask": 2}
    assert set(rules["blocks.1"].inputs) == {"text", "table"}  # two keys that name one module
    assert [gather is None for gather in rules["blocks.1"].gathers or ()] == [False, True]


def test_plans_of_diffusers_name_more_blocks_than_there_are() -> None:
    model = Model({"blocks.3": GATHER, "blocks.40": GATHER})
    model._cp_plan = model._sp_plan
    assert [rules.title for rules in read_plan(model, "_cp_plan", padding=True)] == ["blocks.3"]
    with pytest.raises(InputError, match="there is no '40' in blocks"):  # an author's own plan has to fit
        read_plan(model, "_sp_plan", padding=True)
    model._cp_plan = {"bocks.40": GATHER}
    with pytest.raises(InputError, match="there is no 'bocks'"):
        read_plan(model, "_cp_plan", padding=True)


def test_rows_of_a_rank() -> None:
    """Two tokens in front are on both ranks; rank 1 has four of its own and one that is padding."""
    rows = partitioned_rows(7, 11, [0, 1, 2, 3, 4, 5], (7, 6), (2, 0), 1)
    assert rows.lens == (6, 5)
    assert rows.own == ((1, 5),)
    assert [rows.natural(rank) for rank in (0, 1)] == [[0, 2, 3, 4, 5, 6], [1, 7, 8, 9, 10]]
    assert runs_of([3, 4, 5, 8]) == ((3, 3), (8, 1))


# Whole forwards.


def models(rank: int, count: int, method: str, way: dict[str, int]) -> None:
    join(rank, count, method)
    plain, other = Model(), over(Model(), way)
    assert isinstance(other.shardit_sequence, PlannedSequence)
    for length, text in ((12, 4), (13, 13), (7, 1)):  # text as long as the image, lengths that do not divide
        agrees(plain, other, tokens(length), words(text))
    hidden = torch.rand(2, 1, 1, 13, generator=torch.Generator().manual_seed(3)) > 0.3
    hidden[..., 0] = True
    agrees(plain, other, tokens(13), words(4), mask=hidden)  # over all keys
    agrees(plain, other, tokens(13), words(4), mask=torch.randn(2, 1, 13, 13))  # and over all queries
    agrees(Model(), over(Model(SPLIT_MASK), way), tokens(13), words(4), mask=hidden)
    for first, split_text in ((True, False), (False, False), (True, True)):
        plain, other = Joint(first, split_text), over(Joint(first, split_text), way)
        for length, text in ((12, 6), (11, 4), (9, 2)):
            agrees(plain, other, tokens(length, WIDTH), words(text))
    agrees(plain, other, x=tokens(4, WIDTH), text=words(1))  # fewer words than ranks
    seen = torch.rand(2, 1, 1, 15, generator=torch.Generator().manual_seed(3)) > 0.3
    agrees(Joint(True, False), over(Joint(True, False), way), tokens(11, WIDTH), words(4), mask=seen)
    agrees(Single(), over(Single(), way), tokens(11, WIDTH), words(4))
    with torch.inference_mode():
        agrees(plain, other, tokens(12, WIDTH), words(6))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] if "3" in n else []) for n in WAYS])
def test_models_over_ranks(name: str) -> None:
    run_ranks(size_of(WAYS[name]), models, WAYS[name], timeout=150)


def padded(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    way = {"ulysses_degree": count}
    hidden = torch.rand(2, 1, 1, 13, generator=torch.Generator().manual_seed(3)) > 0.3
    hidden[..., 0] = True
    other = over(Model(PADDED), way)
    shards: list[int] = []
    other.blocks[1].register_forward_pre_hook(lambda module, args: shards.append(args[0].shape[1]))
    for length in (13, 12, 2, 1):
        shards.clear()
        agrees(Model(), other, tokens(length), words(4))
        assert shards[-1] == -(-length // count)  # every rank has as many
    agrees(Model(), other, tokens(13), words(4), mask=hidden)
    agrees(Model(), over(Model(PADDED_MASK), way), tokens(13), words(4), mask=hidden)
    agrees(Model(), over(Model(PADDED_MASK), way), tokens(13), words(4))
    for split_text in (False, True):  # padding in the middle of what a rank has
        other = over(Joint(True, split_text, pad=True), way)
        agrees(Joint(True, split_text), other, tokens(13, WIDTH), words(5))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        x, text = tokens(13), words(4)
        assert distance(Model()(x, text), over(Model(PADDED), way)(x, text)) <= 2e-2


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
def test_padding(count: int) -> None:
    run_ranks(count, padded)


# Errors of the first call.


class Faulty(Model):
    """Breaks the assumptions of its plan."""

    def __init__(self, fault: str, plan: Any = None) -> None:
        super().__init__(plan)
        self.fault = fault

    def forward(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        hidden = self.blocks[0](self.embed(x), text)
        if self.fault == "drops":
            hidden = hidden + self.blocks[1].own(hidden, hidden[:, 1:])
        if self.fault == "mean":
            hidden = hidden - hidden.mean(1, keepdim=True)
        if self.fault == "one rank" and hidden.shape[1] == 3:
            raise ValueError("three tokens are too few")
        if self.fault == "writes":
            x.mul_(2)
        for block in self.blocks[1:]:
            hidden = block(hidden, text)
        return self.outputs["main"](hidden)


ONLY_HIDDEN: Any = {"blocks.0": {"hidden": split()}, "outputs.main": GATHER}

WRONG = (
    ("", {"blocks.0": {"hidden": split(dims=4)}}, "hidden of blocks.0 has 3 dimensions, but expected_dims=4"),
    ("", {"blocks.0": {"hidden": split(-4, None)}}, "so it cannot be cut at dimension -4"),
    (
        "",
        {"blocks.0": {"hidden": split()}},
        r"output 0 has the shape \[2, [34], 5\] instead of \[2, 7, 5\]",
    ),
    (
        "",
        {"blocks.0": {0: split(output=True), 1: split(output=True)}},
        "there is no output 1 of blocks.0, it returns 1",
    ),
    ("", {"blocks.0": [GATHER, GATHER]}, "blocks.0 returns 1 outputs, not 2"),
    ("", {"blocks.*": {"hidden": split()}, "outputs.main": GATHER}, "hidden of blocks.1 has . tokens .* split already"),
    ("", {"outputs.main": GATHER}, r"cannot be gathered: the ranks have \[7, 7\] of 7 tokens; it is not split here"),
    ("", {"": {"text": [split(), split()]}}, r"text\[0\] of Faulty: its plan is for a list of 2 tensors"),
    ("drops", ONLY_HIDDEN, "attention over 6 tokens cannot be put together from .3, 2. on the ranks"),
    ("mean", ONLY_HIDDEN, "as _sp_plan says: output 0 differs from that of the whole model by"),
    ("one rank", ONLY_HIDDEN, "as _sp_plan says: (it fails .ValueError: three tokens are too few|another rank fails)"),
    ("writes", ONLY_HIDDEN, "as _sp_plan says: it writes to its arguments"),
)


def refused(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    for fault, plan, said in WRONG:
        model = over(Faulty(fault, plan), ULYSSES)
        for _ in range(2):  # it stays refused
            with pytest.raises(InputError, match=said):
                model(tokens(7), words(4))
    with pytest.raises(InputError, match=r"Model\._sp_plan: .* there is no 'rope' in Model"):
        over(Model({"rope": {0: split(output=True)}}), ULYSSES)
    with pytest.raises(InputError, match="works with Ulysses only: set ring_degree=1, or leave auto_pad out"):
        over(Model(PADDED), RING)
    with pytest.raises(UnsupportedError, match="the other tokens have met padding"):
        over(Faulty("mean", {"blocks.0": {"hidden": split(pad=True)}, "outputs.main": GATHER}), ULYSSES)(
            tokens(7), words(4)
        )
    forgotten = {name: said for name, said in Model._sp_plan.items() if name != "positions"}
    with pytest.raises(UnsupportedError, match=r"as _sp_plan says: it fails .*must match the size"):
        over(Model(forgotten), ULYSSES)(tokens(7), words(4))


def test_refusals_of_the_first_call() -> None:
    run_ranks(2, refused)


def silent(rank: int, count: int, method: str) -> None:
    """Without communication the first call is refused, and a later one would be wrong: so the other tests show
    something."""
    join(rank, count, method)
    plain, other = Model(), over(Model(), ULYSSES)
    arguments = tokens(12), words(4)
    agrees(plain, other, *arguments)
    exchange = Collectives.all_to_all
    Collectives.all_to_all = lambda self, sends, receives: [r.zero_() for r in receives]  # type: ignore[assignment]
    with torch.no_grad():
        assert distance(plain(*arguments), other(*arguments) * 1) > 1e-3
    with pytest.raises(UnsupportedError, match="differs from that of the whole model"):
        over(Model(), ULYSSES)(*arguments)
    Collectives.all_to_all = exchange
    agrees(plain, other, *arguments)


def test_without_communication_it_differs() -> None:
    run_ranks(2, silent)


# Splitting by hand.


def by_hand(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    parallel_state.initialize_model_parallel(ulysses_degree=count, timeout_s=30)
    for length in (7, count - 1, 12):
        for dim in (1, -1, 0):
            x = torch.arange(2.0 * length).reshape(2, length).movedim(1, dim).contiguous()
            mine = sp_shard(x, dim)
            assert mine.shape[dim] == even_sizes(length, count)[rank]
            assert torch.equal(sp_gather(mine, dim), x)
            assert torch.equal(sp_gather(mine, dim, total=length), x)
    odd = torch.full((rank + 1, 2), float(rank))  # shards of any length
    assert sp_gather(odd, 0).tolist() == [[float(r)] * 2 for r in range(count) for _ in range(r + 1)]
    with pytest.raises(InputError, match="are not this rank's part of total=99"):
        sp_gather(odd, 0, total=99)
    with pytest.raises(InputError, match="sp_shard: dim=2 does not exist in a tensor of 2 dimensions"):
        sp_shard(odd, 2)
    parallel_state.destroy_model_parallel()
    assert sp_shard(odd, 0) is odd

    plain, other = ByHand(), over(ByHand(), {"ulysses_degree": count})
    assert sp_shard(odd, 0) is odd  # outside of the model
    plain.asks = False
    for seed in (1, 2, 3):  # as many tokens stay as there happen to be: the same shapes come with other steps
        agrees(plain, other, tokens(20, WIDTH, seed), words(4))
    comm = other.shardit_sequence.attention.sp
    x, text = tokens(20, WIDTH, 3), words(4)
    kept = int((x[0, :, 0] > 0).sum())
    before = comm.sent_bytes, comm.messages
    with torch.no_grad():
        other(x, text)
    shard = even_sizes(kept, count)[rank]
    assert comm.sent_bytes - before[0] == 2 * (count - 1) * 2 * shard * WIDTH * 4  # two gathers, nothing else
    assert comm.messages - before[1] == 2 * (count - 1)

    class Unsaid(ByHand):
        _sp_plan = None

    with pytest.raises(UnsupportedError, match=r"sp_(shard|gather) inside a model .* `_sp_plan = {}`"):
        over(Unsaid(), {"ulysses_degree": count})(x, text)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.full)])
def test_by_hand(count: int) -> None:
    run_ranks(count, by_hand)


def test_by_hand_on_one_device() -> None:
    x = tokens(5)
    assert sp_shard(x, 1) is x
    assert sp_gather(x, 1) is x
    model = ByHand()
    shardit.parallelize(model, DiffusionParallelConfig())
    assert model.parallel_config == DiffusionParallelConfig()
    assert parallel_state.get_sp_world_size() == 1
    kept = int((tokens(9, WIDTH)[0, :, 0] > 0).sum())
    assert model(tokens(9, WIDTH), words(3)).shape == (2, kept, WIDTH)
    parallel_state.destroy_model_parallel()


# Pipelines of one's own, and other axes.


def own_pipeline(rank: int, count: int, method: str, way: dict[str, int]) -> Any:
    join(rank, count, method)
    arguments = tokens(11), words(4), words(3)
    plain, pipe = Pipeline(Model()), Pipeline(Model())
    expected = plain(*arguments)
    assert shardit.parallelize(pipe, DiffusionParallelConfig(**way), timeout_s=30) is pipe
    for _ in range(2):
        assert distance(expected, pipe(*arguments)) <= CLOSE
    assert pipe.transformer.parallel_config == DiffusionParallelConfig(**way)
    assert parallel_state.get_sp_world_size() == way.get("ulysses_degree", 1) * way.get("ring_degree", 1)
    return [p.is_meta for p in pipe.transformer.blocks.parameters()]


@pytest.mark.parametrize(
    "way",
    [
        ULYSSES,
        {"pipeline_parallel_size": 2, "ulysses_degree": 2},
        {"cfg_parallel_size": 2, "ring_degree": 2},
        {"pipeline_parallel_size": 2},
        pytest.param({"pipeline_parallel_size": 2, "ring_degree": 2}, marks=pytest.mark.full),
        pytest.param({"cfg_parallel_size": 2, "ulysses_degree": 2}, marks=pytest.mark.full),
    ],
    ids=lambda way: " ".join(f"{name[:4]}{size}" for name, size in way.items()),
)
def test_own_pipeline(way: dict[str, int]) -> None:
    meta = run_ranks(size_of(way), own_pipeline, way)
    assert any(meta[0]) == (way.get("pipeline_parallel_size", 1) > 1)


def staged_refusals(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    way = {"pipeline_parallel_size": 2, "ulysses_degree": 2}
    for fault, said in (("mean", "differs from that of the whole model by"), ("one rank", "")):
        with pytest.raises(InputError, match=said):
            over(Faulty(fault, ONLY_HIDDEN), way)(tokens(7), words(4))
    agrees(Joint(True, False, pad=True), over(Joint(True, False, pad=True), way), tokens(13, WIDTH), words(5))
    with pytest.raises(UnsupportedError, match=r"which stages cannot follow|makes a shape from values"):
        over(ByHand(), way)(tokens(20, WIDTH), words(4))


def test_stages_with_padding_and_refusals() -> None:
    run_ranks(4, staged_refusals)


# Plans of diffusers.


def of_diffusers(rank: int, count: int, method: str, name: str, ways: list[dict[str, int]], call: dict) -> None:
    join(rank, count, method)
    expected = run(brought.pipeline(name), name, **call)
    for way in ways:
        pipe = brought.pipeline(name)
        for part in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if part is not None:
                part._sp_plan = part._cp_plan  # asked for
        shardit.parallelize(pipe, DiffusionParallelConfig(**way), timeout_s=60)
        assert isinstance(pipe.transformer.shardit_sequence, PlannedSequence)
        for _ in range(2):
            assert distance(expected, run(pipe, name, **call)) <= CLOSE, (name, way)
        assert pipe.transformer.shardit_sequence.attention.sent_bytes > 0


def compare(count: int, name: str, ways: list[dict[str, int]], **call: Any) -> None:
    tiny.resolve(f"tiny/{name}")
    run_ranks(count, of_diffusers, name, ways, call, timeout=250)


@pytest.mark.parametrize("name", ["wan2.2-ti2v", "qwen-image"])
def test_plans_of_diffusers(name: str) -> None:
    compare(2, name, [ULYSSES])


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [n for n in tiny.names() if n.startswith(("wan", "qwen", "flux"))])
def test_more_plans_of_diffusers(name: str) -> None:
    compare(2, name, [RING, ULYSSES])


@pytest.mark.full
@pytest.mark.parametrize("name", ["flux", "wan2.2-t2v"])
def test_plans_of_diffusers_over_three_ranks_and_odd_lengths(name: str) -> None:
    compare(3, name, [{"ulysses_degree": 3}, {"ring_degree": 3}], height=80, width=112)


class Taken(Faulty):
    """The automatic way refuses it, since a block takes a mean over tokens; diffusers' plan gathers before."""

    _sp_plan = None

    def __init__(self) -> None:
        from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

        super().__init__("")
        self.blocks[3] = Mean()
        self._cp_plan = {
            "blocks.0": {"hidden": ContextParallelInput(split_dim=1, expected_dims=3)},
            "blocks.2": ContextParallelOutput(gather_dim=1, expected_dims=3),
            "": {"text": ContextParallelInput(split_dim=1, expected_dims=2)},  # has three, and is left alone
        }


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return hidden + self.linear(hidden.mean(1, keepdim=True))


FLUX: Any = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}


class OwnFlux(FluxTransformer2DModel):
    """Text stays on every rank, in front of the split tokens."""

    _sp_plan: Any = {"": {"hidden_states": split(), "img_ids": split(0, 2)}, "proj_out": GATHER}


def taken_over(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    plain, other = Taken(), over(Taken(), ULYSSES)
    assert not isinstance(other.shardit_sequence, PlannedSequence)  # what is found comes first
    agrees(plain, other, tokens(7), words(4))
    assert isinstance(other.shardit_sequence, PlannedSequence)
    own = OwnFlux(**FLUX).eval()  # declared on a class derived from one of diffusers
    assert denoises("own", own)
    ids = torch.zeros(13, 3), torch.arange(39.0).view(13, 3)
    arguments = (tokens(13, 4), tokens(13, 12, 2), tokens(1, 8, 4)[:, 0], torch.tensor([0.5, 0.5]), *reversed(ids))
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    call = dict(zip(names, arguments, strict=True), return_dict=False)
    with torch.no_grad():
        expected = own(**call)[0]
        assert distance(expected, over(own, ULYSSES)(**call)[0]) <= CLOSE
    assert isinstance(own.shardit_sequence, PlannedSequence)
    without: Any = Taken()
    del without._cp_plan
    agrees(plain, over(without, ULYSSES), tokens(7), words(4))
    assert without.shardit_sequence.partitioned


def test_plan_of_diffusers_takes_over() -> None:
    run_ranks(2, taken_over)


# What authors can ask, in a session.


def told(rank: int, count: int, method: str) -> list[Any]:
    from shardit.engine.process.messages import SessionSpec
    from shardit.engine.session import Session

    spec = SessionSpec("tiny/wan2.2-ti2v", DiffusionParallelConfig(ulysses_degree=2), None, "cpu", 1, timeout_s=60)
    running = Session(spec, rank=rank, world_size=count, init_method=method)
    found = [parallel_state.get_sp_rank(), running.model.pipe.transformer.parallel_config.ulysses_degree]
    running.close()
    return [*found, parallel_state.model_parallel_is_initialized()]


def test_degrees_in_a_session() -> None:
    tiny.resolve("tiny/wan2.2-ti2v")
    assert run_ranks(2, told) == [[0, 2, False], [1, 2, False]]
