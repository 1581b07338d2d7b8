"""Owned components used in any other way than by a call: parts, methods, tensors, hooks, replaced methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.api import load_parallel
from shardit.core.comm.mesh import init_mesh
from shardit.core.comm.p2p import Comm
from shardit.core.components.layerwise import cut_layerwise
from shardit.core.components.owned import make_owned
from shardit.core.modules.hooks import add_libraries
from shardit.core.modules.small_tensors import SMALL_BYTES, small_tensors
from shardit.core.modules.units import find_units
from shardit.core.runtime.pending import PendingTensor
from shardit.diffusion.family import FAMILY, LIBRARIES
from shardit.engine.inspect import inspect_model
from shardit.loading.safetensors_file import Reads
from tests.pipelines.entry import entries
from tests.pipelines.runs import distance, run
from tests.support import brought
from tests.support.ranks import run_ranks

STAGES = DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False)

PIPELINES = ("LTXPipeline", "Flux2Pipeline", "StableUnCLIPPipeline")
"""They read a buffer of a VAE, running statistics of a layer in it, and call a method of a normaliser."""


def join(rank: int, size: int, method: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=size)


def comm() -> Comm:
    mesh = init_mesh(DiffusionParallelConfig(cfg_parallel_size=2), device="cpu", timeout_s=60)
    return Comm(mesh.replica)


IDS = torch.arange(14).view(2, 7) + 5


def _vae(pipe: Any) -> Any:
    """The VAE, with the attributes that pipelines read."""
    _marking(pipe.vae)
    torch.manual_seed(5)
    pipe.vae.register_buffer("means", torch.randn(16))
    pipe.vae.register_buffer("table", torch.randn(SMALL_BYTES // 4 + 1))
    pipe.vae.bn = nn.BatchNorm2d(16, affine=False)
    pipe.vae.bn.running_mean.normal_()
    pipe.vae.remembering = Remembering()
    return pipe.vae


def _noise(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def _picture() -> torch.Tensor:
    return _noise(1, 3, 16, 16)


def _blocks(vae: Any) -> torch.Tensor:
    hidden = vae.encoder.conv_in(_picture())
    for block in vae.encoder.down_blocks:
        hidden = block(hidden)
    return vae.encoder.mid_block.attentions[0](hidden)


def _hooked(model: Any, part: Callable[[Any], Any], call: Callable[[], Any]) -> Any:
    seen: list[torch.Tensor] = []
    handle = part(model).register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    try:
        out = call()
    finally:
        handle.remove()
    return [*seen, out]


def _writes(vae: Any) -> Any:
    x = _picture()
    vae.encoder.conv_act.inplace = True
    hidden = vae.encoder.conv_act(x)
    return [x, hidden]


def _patched(vae: Any) -> Any:
    return vae.decode(_noise(1, 16, 4, 4)).sample


def _trains(vae: Any) -> Any:
    """A call that moves running statistics, which every rank has."""
    vae.bn.train()
    out = vae.bn(_noise(2, 16, 4, 4))
    vae.bn.eval()
    return [out, vae.bn.running_mean.clone(), vae.bn(_noise(1, 16, 2, 2))]


def _marking(vae: Any) -> Any:
    """A VAE whose calls leave attributes: one that was there, and new ones."""
    plain: Any = type(vae)

    class Marking(plain):
        calls = 0

        def decode(self, *args: Any, given: Any = (), **kwargs: Any) -> Any:
            out = plain.decode(self, *args, **kwargs)
            for holder, other in [given] if given else []:
                out[0].mul_(torch.rand((), generator=holder.generator) + other.random())
            self.calls, self.last, self.sizes = self.calls + 1, out[0].mean(), [list(out[0].shape)]
            return out

    vae.__class__ = Marking
    return vae


def _marks(vae: Any) -> Any:
    for _ in range(2):
        vae.decode(_noise(1, 16, 4, 4))
    return [torch.tensor([vae.calls, *vae.sizes[0]]), vae.last]


def _other_generators(vae: Any) -> Any:
    """Generators that are no leaves of the arguments, or none of torch's."""
    holder, others = SimpleNamespace(generator=torch.Generator().manual_seed(4)), np.random.default_rng(5)
    out = vae.decode(_noise(1, 16, 4, 4), given=(holder, others))[0]
    return [out, torch.rand(2, generator=holder.generator), torch.tensor(others.random(2))]


class Remembering(nn.Module):
    """Keeps what it has seen in a list and a dict that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, seen: list[Any], more: dict[str, Any]) -> torch.Tensor:
        out = self.linear(x) + sum(seen[1:])
        seen[0] += 1
        seen.append(out)
        if seen[0] == 3:
            del seen[1:3]
        more.setdefault("first", [x]).append(more.pop("last", None))
        more["last"] = out * 2
        return out


def _remembers(vae: Any) -> Any:
    """A part that changes what is in its arguments, and needs it in the next call."""
    seen, more = [0], {}
    outs = [vae.remembering(_noise(2, 4), seen, more) for _ in range(4)]
    assert more["first"][1] is None
    return [*outs, torch.tensor(seen[:1]), *seen[1:], more["last"], *more["first"][2:]]


def _scaled(vae: Any) -> torch.Tensor:
    """All weights of a part are written to, as averages of weights are put into a model."""
    vae.decoder.requires_grad_(False)
    for parameter in vae.decoder.parameters():
        parameter.requires_grad_(False)
        parameter.data.mul_(1.1)
        parameter.mul_(1.1)
    return vae.decode(_noise(1, 16, 4, 4)).sample


USES: dict[str, Callable[[Any], Any]] = {
    "small buffer": lambda vae: vae.means.view(1, -1) * 2,
    "buffer of a part": lambda vae: vae.bn.running_var + vae.bn.running_mean,
    "large buffer": lambda vae: vae.table[:7] + 1,
    "weight": lambda vae: vae.decoder.conv_in.weight.abs().sum(),
    "weight by name": lambda vae: vae.get_parameter("decoder.conv_in.bias") + 1,
    "part": lambda vae: vae.encoder(_picture()),
    "private method": lambda vae: vae._encode(_picture()),
    "parts of parts": _blocks,
    "embedded sample": lambda vae: vae.encode(_picture()).latent_dist.sample(torch.Generator().manual_seed(2)),
    "replaced methods": _patched,
    "forward": lambda vae: vae.forward(_picture()).sample,
    "hook": lambda vae: _hooked(vae, lambda v: v.decoder.mid_block.resnets[0], lambda: _patched(vae)),
    "hooks by modules()": lambda vae: _hooked(
        vae, lambda v: [m for m in v.modules() if isinstance(m, nn.GroupNorm)][-1], lambda: _patched(vae)
    ),
    "argument in place": _writes,
    "statistics": _trains,
    "attributes": lambda vae: _marks(vae),
    "generators": _other_generators,
    "lists": _remembers,
    "state dict": lambda vae: vae.state_dict()["decoder.conv_in.weight"] * 2,
    "parameters": lambda vae: [next(vae.parameters()).sum(), sum(p.abs().sum() for p in vae.decoder.parameters())],
    "named parameters": lambda vae: dict(vae.named_parameters(prefix="vae"))["vae.decoder.conv_in.weight"] * 2,
    "weights of modules()": lambda vae: [m.weight.sum() for m in vae.modules() if isinstance(m, nn.GroupNorm)],
    "a vector": lambda vae: nn.utils.parameters_to_vector(vae.decoder.conv_out.parameters()),
    "writes": lambda vae: _scaled(vae),
    "upcast": lambda vae: vae.decoder.conv_in.to(torch.float64)(_noise(1, 16, 4, 4).double()),
}

ENCODER_USES: dict[str, Callable[[Any], Any]] = {
    "embeddings": lambda e: e.get_input_embeddings()(IDS),
    "embedding weight": lambda e: e.get_input_embeddings().weight[3:5] * 2,
    "last norm": lambda e: _last_norm(e),
    "layer in a layer": lambda e: _layers(e)[0].mlp(_noise(1, 3, e.config.hidden_size)),
    "forward by layers": lambda e: [_layers(e)[1](_noise(1, 3, e.config.hidden_size), attention_mask=None)],
    "hook on a layer": lambda e: _hooked(e, lambda e: _layers(e)[1], lambda: e(IDS).last_hidden_state),
    "hidden states": lambda e: e(IDS, output_hidden_states=True).hidden_states,
}


def _text(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder)


def _layers(encoder: Any) -> Any:
    return _text(encoder).encoder.layers


def _last_norm(encoder: Any) -> torch.Tensor:
    return _text(encoder).final_layer_norm(encoder(IDS, output_hidden_states=True).hidden_states[-2])


def same(expected: Any, got: Any, what: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(expected, got), what
    else:
        assert len(expected) == len(got), what
        for a, b in zip(expected, got, strict=True):
            same(a, b, what)


def replace_methods(vae: Any) -> None:
    """Methods as users replace them before they shard a pipeline."""
    plain = vae.decode
    vae.decode = functools.partial(lambda factor, z, **more: plain(z * factor, **more), 2)
    vae.encoder.forward = torch.compile(vae.encoder.forward, backend="eager")


def uses(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    add_libraries(FAMILY.libraries)
    torch.set_grad_enabled(False)
    load, ranks = functools.partial(brought.pipeline, "flux"), comm()
    plain, vae = _vae(load()), _vae(load())
    for one in (plain, vae):
        replace_methods(one)
    make_owned(vae, ranks, 1, small_tensors(vae))
    vae.shardit_boundary.libraries = LIBRARIES.own
    assert rank == 1 or vae.table.shape == plain.table.shape  # no message for that
    assert isinstance(vae.table, PendingTensor)
    assert not isinstance(vae.means, PendingTensor)
    assert vae.decoder.conv_in.weight.device.type == "cpu"
    assert isinstance(vae.decoder.conv_in.weight, nn.Parameter)
    for name, use in USES.items():
        same(use(plain), use(vae), name)
    with pytest.raises(UnsupportedError, match=r"assigning to \.data .* has no effect: write into it"):
        vae.decoder.conv_in.weight.data = vae.decoder.conv_in.weight.data * 2
    first, second = vae.decoder.conv_in, vae.decoder.conv_out
    with pytest.raises(UnsupportedError, match=r"decoder.conv_out.bias cannot become another parameter"):
        second.bias = first.bias
    with pytest.raises(UnsupportedError, match=r"one rank owns cannot become another nn.Parameter: change the"):
        nn.utils.parametrizations.weight_norm(first)
    with torch.enable_grad(), pytest.raises(UnsupportedError, match="is called for its gradients"):
        vae.decode(_noise(1, 16, 4, 4).requires_grad_())
    vae.encoder.down_blocks[0].resnets[0].conv1.to(torch.float32)
    assert (rank == 1) != vae.decoder.conv_in._parameters["weight"].is_meta
    for shard in (
        lambda e: make_owned(e, ranks, 0),
        lambda e: cut_layerwise(e, ranks, [n for u in find_units(e) for n in u.names], alternating(e)),
    ):
        expected, encoder = load().text_encoder, load().text_encoder
        shard(encoder)
        encoder.tie_weights()
        for name, use in ENCODER_USES.items():
            same(use(expected), use(encoder), name)
    with pytest.raises(UnsupportedError, match=r"mlp.fc1 of CLIPTextModel has a hook, and runs on one rank: put it on"):
        _hooked(encoder, lambda e: _layers(e)[0].mlp.fc1, lambda: encoder(IDS))
    with pytest.raises(RuntimeError, match="expected input"):  # raised by its owner, on all ranks
        vae.encoder.conv_in(torch.zeros(1, 5, 16, 16))
    whole = load().text_encoder
    make_owned(
        whole, ranks, 0, cut=["text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"]
    )
    with pytest.raises(UnsupportedError, match=r"reads .*token_embedding.weight, which is cut over tensor ranks"):
        whole.get_input_embeddings().weight.sum()


def used_on_one_rank(rank: int, count: int, method: str) -> list[torch.Tensor]:
    """A program that calls a VAE and a text encoder itself; only one rank uses their results."""
    join(rank, count, method)
    torch.set_grad_enabled(False)
    pipe = shardit.parallelize(brought.pipeline("flux"), STAGES, timeout_s=10)
    picture = pipe.vae.decode(_noise(1, 16, 4, 4)).sample
    words = pipe.text_encoder(IDS).last_hidden_state
    return [picture * 2, words * 2] if rank == 1 else []


def test_results_that_one_rank_uses() -> None:
    plain = brought.pipeline("flux")
    with torch.no_grad():
        expected = [plain.vae.decode(_noise(1, 16, 4, 4)).sample * 2, plain.text_encoder(IDS).last_hidden_state * 2]
    _, got = run_ranks(2, used_on_one_rank)
    same(expected, got, "results")


def hooked_with_a_cache(rank: int, count: int, method: str) -> None:
    """Hooks on the decoder of a VAE, which is called several times with a cache that it fills, and inside of it."""
    join(rank, count, method)
    plain, pipe = brought.pipeline("wan2.2-ti2v"), brought.pipeline("wan2.2-ti2v")
    shardit.parallelize(pipe, STAGES, timeout_s=60)
    outs = []
    for one in (plain, pipe):
        call = functools.partial(brought.run, one, "wan2.2-ti2v", output_type="pt")
        outs.append([call()])
        handle = one.vae.decoder.register_forward_hook(lambda module, args, output: output * 0.9)
        outs[-1].append(call())
        handle.remove()
        one.vae.decoder.mid_block.register_forward_pre_hook(lambda module, args: (args[0] * 0.9, *args[1:]))
        outs[-1].append(call())
    same(outs[0], outs[1], "hooked")
    assert not any(torch.equal(outs[0][0], one) for one in outs[0][1:])


def test_hooks_on_a_decoder_with_a_cache() -> None:
    run_ranks(2, hooked_with_a_cache)


def alternating(encoder: Any) -> list[int]:
    return [i % 2 for i, _ in enumerate(n for u in find_units(encoder) for n in u.names)]


def test_every_kind_of_use() -> None:
    run_ranks(2, uses)


def whole_pipelines(rank: int, count: int, method: str, names: tuple[str, ...], folder: str) -> tuple[int, Any]:
    """Real pipelines over two stages; then one from its files: the bytes that this rank has read, and that it holds."""
    join(rank, count, method)
    for name in names:
        entry = entries()[name]
        sharded = shardit.parallelize(entry.build(), STAGES, timeout_s=60)
        assert distance(run(entry.build(), entry), run(sharded, entry)) == 0.0, name
    entry, reads = entries()["LTXPipeline"], Reads()
    mesh = init_mesh(STAGES, device="cpu", timeout_s=60)
    pipe, assignment, _ = load_parallel(folder, STAGES, mesh, pipeline_class="LTXPipeline", reads=reads)
    assert {"latents_mean", "latents_std"} <= assignment.small["vae"]
    assert torch.equal(pipe.vae.latents_mean, plain_mean())
    held = {name: held_bytes(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return reads.bytes, held


def held_bytes(module: nn.Module) -> int:
    held = {id(t): t for t in module.state_dict(keep_vars=True).values() if not t.is_meta}
    return sum(t.nbytes for t in held.values())


def ltx() -> Any:
    """LTX with a VAE whose means differ from those of a new one."""
    pipe = entries()["LTXPipeline"].build()
    pipe.vae.latents_mean.copy_(plain_mean())
    return pipe


def plain_mean() -> torch.Tensor:
    return torch.linspace(-1, 1, entries()["LTXPipeline"].build().vae.config.latent_channels)


def test_whole_pipelines_and_files(tmp_path: Any) -> None:
    ltx().save_pretrained(tmp_path)
    found = run_ranks(2, whole_pipelines, PIPELINES, str(tmp_path))
    told = inspect_model(tmp_path, STAGES)["ranks"]
    for (read, held), rank in zip(found, told, strict=True):
        assert read == sum(held.values())
        assert held == {name: part["bytes"] for name, part in rank["components"].items()}
    assert 0 < min(held["vae"] for _, held in found) < 1000  # one rank has the means alone


def test_small_tensors() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.token = nn.Parameter(torch.zeros(3))
    module.register_buffer("large", torch.zeros(SMALL_BYTES // 4), persistent=False)
    found = small_tensors(module)
    assert found == {"token", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
