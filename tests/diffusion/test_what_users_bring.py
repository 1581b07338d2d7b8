"""What users bring (`brought.py`: adapters, ControlNets, caches, callbacks ...) on every axis, against plain diffusers.

`TABLE` says what is refused and where; all else must give what plain diffusers gives. docs/parallelism.md has it, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.diffusion.sharding.components import CACHES
from tests.diffusion.test_parallelize import join
from tests.support import brought
from tests.support.paths import DOCS
from tests.support.ranks import run_ranks

COLUMNS: dict[str, dict[str, int]] = {
    "stages": {"pipeline_parallel_size": 2, "pipeline_chunks": 1},
    "looped": {"pipeline_parallel_size": 2, "pipeline_chunks": 2},
    "guidance": {"cfg_parallel_size": 2},
    "copies": {"data_parallel_size": 2},
    "slices": {"tensor_parallel_size": 2},
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
}
BITWISE = ("stages", "looped", "guidance", "copies")
CLOSE, CLOSE_BFLOAT16 = 1e-5, 2e-2
STAGED = ("stages", "looped", "guidance")
TOKENS = ("ulysses", "ring")


@dataclass(frozen=True)
class Row:
    """One extension: its name, the function that applies it, its model, and where it is refused."""

    title: str
    act: Callable[..., list[torch.Tensor]]
    model: str = "flux"
    refused: dict[tuple[str, ...], str] = field(default_factory=dict)
    bound: float = CLOSE
    fast: bool = False

    def refusal(self, column: str) -> str | None:
        """The pattern of the error in a column."""
        return next((text for columns, text in self.refused.items() if column in columns), None)


ADAPTER_MODELS = ("sd3.5", "wan2.2-ti2v", "qwen-image", "z-image")
CACHED: dict[tuple[str, ...], str] = {
    ("stages", "looped"): "a step cache does not work over stages",
    ("guidance",): "a step cache does not work over guidance ranks",
    TOKENS: "a step cache does not work over sharded tokens",
}
SPLIT = (*STAGED, "slices", *TOKENS)
CACHE_BOUND = {"TaylorSeerCacheConfig": 1e-3}
"""It extrapolates from the difference of two steps, which makes rounding larger."""
OFFLOADED = {SPLIT: "offload"}
GROUPED: dict[tuple[str, ...], str] = {("stages", "looped"): "group offloading cannot be combined"}
QUANTIZED = {SPLIT: "has quantized weights"}

TABLE = [
    Row("LoRA loaded after", brought.lora_after, fast=True),
    Row("LoRA loaded before", brought.lora_before),
    *(Row("LoRA loaded before", brought.lora_before, name) for name in ADAPTER_MODELS),
    *(Row("LoRA loaded after", brought.lora_after, name) for name in ADAPTER_MODELS),
    Row("LoRA weights, several adapters", brought.lora_scale),
    Row("LoRA scale of a call", brought.lora_call_scale),
    Row("LoRA off, on, deleted, unloaded", brought.lora_unload),
    Row("LoRA fused and unfused", brought.lora_fused),
    Row("LoRA fused before", brought.lora_fused_before),
    Row("LoRA of a text encoder", brought.lora_of_encoder),
    Row("LoRA of a text encoder", brought.lora_of_encoder_before),
    *(Row("ControlNet", brought.controlnet, name) for name in ("flux", "sd3.5", "qwen-image")),
    Row("prompt_embeds", brought.prompt_embeds),
    Row("latents", brought.given_latents),
    Row("output_type latent, np, pt, pil", brought.output_types),
    Row("several images per prompt", brought.batch),
    Row("other schedulers, stochastic ones", brought.schedulers),
    Row("callback that changes latents", brought.callback, fast=True),
    Row("interrupt by any rank", brought.interrupt, fast=True),
    Row("bfloat16", brought.bfloat16, bound=CLOSE_BFLOAT16),
    Row("attributes set on modules", brought.attributes),
    Row("compile_repeated_blocks", brought.compiled),
    Row("compile_repeated_blocks", brought.compiled_after),
    Row("set_attention_backend", brought.back_end),
    Row("fuse_qkv_projections before", brought.fused_projections),
    Row("fuse_qkv_projections after", brought.fused_projections_after),
    Row("VAE tiling and slicing", brought.tiling),
    *(
        Row("step caches", brought.cache(kind, before), refused=CACHED, bound=CACHE_BOUND.get(kind, CLOSE))
        for kind in CACHES
        for before in (True, False)
    ),
    Row("layerwise casting before", brought.layerwise_casting, refused={("slices",): "enable it after parallelize"}),
    Row("layerwise casting after", brought.layerwise_casting_after),
    Row("quantized weights", brought.dynamic_quantisation, refused=QUANTIZED),
    Row("CPU offload, group offload", brought.offload("enable_group_offload", True), refused=OFFLOADED),
    Row("CPU offload, group offload", brought.offload("enable_group_offload", False), refused=OFFLOADED),
    Row("CPU offload, group offload", brought.offload("cpu_offload", True), refused=OFFLOADED),
    Row("apply_group_offloading after", brought.offload("apply_group_offloading", False), refused=GROUPED, fast=True),
]


def expected(row: Row, folder: str) -> Any:
    """Return the result of plain diffusers."""
    with torch.random.fork_rng():
        return row.act(brought.pipeline(row.model), row.model, lambda pipe: pipe, folder)


def on_ranks(rank: int, count: int, method: str, column: str, rows: list[int], plain: list[Any], folder: str) -> Any:
    """The outcome of each row: differences from plain diffusers, or the error."""
    join(rank, count, method)
    config = DiffusionParallelConfig(**COLUMNS[column], split_batch=False)
    brought.together = column != "copies"
    outcomes = []
    for number, outs in zip(rows, plain, strict=True):
        row = TABLE[number]
        try:
            got = row.act(
                brought.pipeline(row.model),
                row.model,
                lambda pipe: shardit.parallelize(pipe, config, timeout_s=30),
                folder,
            )
            outcomes.append([difference(a, b) for a, b in zip(outs, got, strict=True)])
        except UnsupportedError as error:
            outcomes.append(str(error))
    return outcomes


def difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Relative L2 distance; 0 for the same bits alone. Pixels of eight bits may come to lie on the other side of a
    half, and are then off by one."""
    assert type(got) is torch.Tensor
    assert got.shape == expected.shape
    assert torch.isfinite(expected.double()).all()
    if torch.equal(expected, got):
        return 0.0
    if got.dtype is torch.uint8:
        assert int((expected.int() - got.int()).abs().max()) == 1
        return 1e-30
    return max(float((expected.double() - got.double()).norm() / expected.double().norm()), 1e-30)


def holds(row: Row, column: str, outcome: Any) -> bool:
    """Return whether an outcome equals that in the table."""
    refusal = row.refusal(column)
    if refusal is not None or isinstance(outcome, str):
        return refusal is not None and isinstance(outcome, str) and re.search(refusal, outcome) is not None
    return max(outcome) <= (0 if column in BITWISE else row.bound)


def check(column: str, rows: list[Row], folder: str) -> None:
    """All rows in one group of ranks."""
    write_adapters(rows, folder)
    plain = [expected(row, folder) if row.refusal(column) is None else [] for row in rows]
    numbers = [TABLE.index(row) for row in rows]
    results = run_ranks(2, on_ranks, column, numbers, plain, folder, timeout=280)
    wrong = [
        f"{row.title} ({row.model}, {row.act.__name__}): {outcomes}"
        for row, *outcomes in zip(rows, *results, strict=True)
        if not all(holds(row, column, outcome) for outcome in outcomes)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("adapters"))


def write_adapters(rows: list[Row], folder: str) -> None:
    """The adapters of the models of some rows, once."""
    for name in {row.model for row in rows if "LoRA" in row.title}:
        files = {f"{name}-5": (5, False), f"{name}-6": (6, False)}
        if name == "flux":
            files["flux-encoder"] = (5, True)
        for file, (seed, encoder) in files.items():
            if not Path(folder, file).exists():
                brought.write_lora(name, Path(folder, file), seed, encoder)


@pytest.mark.parametrize("column", ["looped", "slices"])
def test_a_few_rows(column: str, folder: str) -> None:
    check(column, [row for row in TABLE if row.fast], folder)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("column", COLUMNS)
def test_all_rows(column: str, part: int, folder: str) -> None:
    check(column, TABLE[part::4], folder)


def markdown() -> str:
    """The table for docs/parallelism.md."""
    refused: dict[str, set[str]] = {}
    for row in TABLE:
        refused.setdefault(row.title, set()).update(column for column in COLUMNS if row.refusal(column))
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {title} | {' | '.join('no' if c in no else 'yes' for c in COLUMNS)} |" for title, no in refused.items()
    ]
    return "\n".join(lines)


def test_the_page_has_the_table() -> None:
    page = DOCS / "parallelism.md"
    assert markdown() in page.read_text(encoding="utf-8"), markdown()
