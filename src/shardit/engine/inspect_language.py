"""What each rank would hold of a language model, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import axis_sizes, coordinates
from shardit.core.modules.blocks import find_blocks
from shardit.language.loading.prepared import PreparedDecoder
from shardit.language.loading.source import DecoderSource
from shardit.language.sharding import DecoderLayout, blocks_of, lay_out_decoder
from shardit.loading.dtypes import Setting

EVERYWHERE = "outside of blocks"
"""The component of parameters that every rank holds."""


def inspect_decoder(source: DecoderSource, config: DiffusionParallelConfig, dtype: Setting = None) -> dict[str, Any]:
    """As `inspect_model`, with embedding, layers and head as components. Bytes are those in memory."""
    module = PreparedDecoder(source, dtype).module
    sizes, layout = axis_sizes(config), lay_out_decoder(module, config)
    ranks = []
    for rank in range(config.world_size):
        coords = coordinates(sizes, rank)
        held = [
            (kind, number, part)
            for (kind, number, part), stage in zip(_parts(module), layout.owners, strict=True)
            if stage == coords["pp"]
        ]
        ranks.append({"rank": rank, "coords": coords, "components": _components(module, held, layout, coords["tp"])})
    return {"ranks": ranks, "chunks": 1, "bytes": _bytes(module), "notes": list(layout.notes)}


def _parts(module: Any) -> Iterator[tuple[str, int, nn.Module]]:
    """Kind, number among the layers, and module of each block, in the order of `blocks_of`."""
    layers = [name for name, _ in find_blocks(module)]
    first = True
    for name, block in blocks_of(module):
        if name in layers:
            yield "layers", layers.index(name), block
            first = False
        else:
            yield "embedding" if first else "head", 0, block


def _components(
    module: nn.Module, held: list[tuple[str, int, nn.Module]], layout: DecoderLayout, rank: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cuts = layout.slices.cuts if layout.slices is not None else {}
    numels = {
        id(p): p.numel() // cuts[name].total * cuts[name].lengths[rank] if name in cuts else p.numel()
        for name, p in module.named_parameters()
    }
    seen: set[int] = set()
    for kind, number, block in held:
        part = found.setdefault(kind, {"blocks": [], "parameters": 0, "bytes": 0})
        part["blocks"] += [number] if kind == "layers" else []
        _count(part, block, seen, numels)
    inside = {id(p) for _, block in blocks_of(module) for p in block.parameters()}
    rest = {"blocks": [], "parameters": 0, "bytes": 0}
    _count(rest, module, seen | inside, numels)
    return {**found, EVERYWHERE: rest} if rest["parameters"] else found


def _count(part: dict[str, Any], module: nn.Module, seen: set[int], numels: dict[int, int]) -> None:
    """Add what a rank holds of the parameters of a module that are not in `seen`: tied ones count once."""
    for parameter in module.parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part["parameters"] += numels[id(parameter)]
            part["bytes"] += numels[id(parameter)] * parameter.element_size()


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
