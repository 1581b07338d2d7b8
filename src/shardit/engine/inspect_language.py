"""The share of each rank in a language model, without reading weights."""

from __future__ import annotations

import math
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import axis_sizes, coordinates
from shardit.core.modules.blocks import find_blocks
from shardit.core.placement.slices import Owned, Slice
from shardit.language.cache_size import request_tokens
from shardit.language.loading.prepared import PreparedDecoder
from shardit.language.loading.source import DecoderSource
from shardit.language.sharding import blocks_of, cache_of_stages, lay_out_decoder
from shardit.loading.dtypes import Setting

EVERYWHERE = "outside of blocks"
"""The component of parameters that every stage holds."""


def inspect_decoder(source: DecoderSource, config: DiffusionParallelConfig, dtype: Setting = None) -> dict[str, Any]:
    """As `inspect_model`, with embedding, layers and head as components. Bytes are those in memory."""
    prepared = PreparedDecoder(source, dtype, generates=False, weights=source.has_weights)
    sizes, layout = axis_sizes(config), lay_out_decoder(prepared.module, config)
    ranks = []
    for rank in range(config.world_size):
        coords = coordinates(sizes, rank)
        owned = prepared.owned(layout, coords)
        components = _components(prepared.module, owned, first=coords["pp"] == layout.owners[0])
        ranks.append({"rank": rank, "coords": coords, "components": components})
    whole = sum(part["bytes"] for part in _components(prepared.module, lambda _: True, first=True).values())
    stored = str(next(prepared.module.parameters()).dtype).removeprefix("torch.")
    told = source.has_weights or dtype is not None
    notes = [] if told else [f"the folder has no weights: bytes are those of {stored}; dtype (--dtype) says another"]
    return {
        "ranks": ranks,
        "chunks": 1,
        "bytes": whole,
        "notes": [_cache_note(prepared.module, layout.owners, config), *layout.notes, *notes],
    }


def _components(module: Any, owned: Owned, first: bool) -> dict[str, Any]:
    """Numbers of layers, parameters and bytes of each component. first: whether the stage has the embedding. A head
    that is tied to the embedding counts there, and as the head in other stages."""
    layers = {name: number for number, (name, _) in enumerate(find_blocks(module))}
    ends = [name for name, _ in blocks_of(module) if name not in layers]
    found: dict[str, Any] = {}
    for name, tensor in module.named_parameters():
        part = owned(name)
        if not part:
            continue
        block = next((one for one in (*layers, *ends) if name.startswith(f"{one}.")), None)
        kind = EVERYWHERE if block is None else "layers" if block in layers else _end(block == ends[0] and first)
        count = math.prod(part.shape(tensor.shape)) if isinstance(part, Slice) else tensor.numel()
        entry = found.setdefault(kind, {"blocks": [], "parameters": 0, "bytes": 0})
        entry["parameters"] += count
        entry["bytes"] += count * tensor.element_size()
        if block in layers and layers[block] not in entry["blocks"]:
            entry["blocks"].append(layers[block])
    return found


def _end(is_first: bool) -> str:
    return "embedding" if is_first else "head"


def _cache_note(module: Any, owners: list[int], config: DiffusionParallelConfig) -> str:
    """Return the memory of the cache of the longest request."""
    tokens = request_tokens(module.config, None)
    most = max(cache_of_stages(module, owners, tokens, config.tensor_parallel_size).values())
    return f"cache of one request of {tokens:,} tokens: up to {most / 1024**2:,.1f} MiB on a rank"
