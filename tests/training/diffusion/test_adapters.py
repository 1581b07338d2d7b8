"""Adapters: which modules get one, what a pattern that matches nothing says, and adapters in late blocks alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardit import InputError
from shardit.training.diffusion.adapters import targets
from tests.support import survey_models
from tests.support.ranks import run_ranks
from tests.training.diffusion.folders import recipe_of
from tests.training.diffusion.runs import late

FLUX = "FluxTransformer2DModel"


def model(name: str) -> Any:
    with torch.device("meta"):
        return survey_models.entry(name).build()


def test_a_pattern_that_matches_nothing_names_its_nearest() -> None:
    with pytest.raises(InputError, match=r"'to_add_out\.0' matches no layer of Flux.*nearest names are to_add_out"):
        targets(model(FLUX), ["to_q", "to_add_out.0"])
    with pytest.raises(InputError, match=r"'attn1\.to_q' matches no layer of Flux.*nearest names are attn\.to_q"):
        targets(model(FLUX), ["attn1.to_q"])
    with pytest.raises(InputError, match="'norm_q' matches no layer"):  # a norm, which can have none
        targets(model(FLUX), ["norm_q"])
    with pytest.raises(InputError, match=r"'to_\(q' is no regular expression"):
        targets(model(FLUX), ["to_(q"])


def test_patterns_are_ends_of_names_or_expressions() -> None:
    flux = model(FLUX)
    every = [name for name, _ in flux.named_modules()]
    assert targets(flux, ["to_q"])[0] == [name for name in every if name.endswith(".to_q")]
    assert targets(flux, ["attn.to_q"])[0] == targets(flux, ["to_q"])[0]
    assert targets(flux, ["o_q", r".*\.to_q"][1:])[0] == targets(flux, ["to_q"])[0]
    assert targets(flux, [r"transformer_blocks\.0\.attn\.to_[qk]"])[0] == [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
    ]
    with pytest.raises(InputError, match="'o_q' matches no layer"):  # not the end of a word
        targets(flux, ["o_q"])


def test_a_model_without_known_projections_asks_for_names() -> None:
    with pytest.raises(InputError, match="name modules in lora_targets, such as 0"):
        targets(torch.nn.Sequential(torch.nn.Linear(2, 2)), [])


def test_notes_tell_how_much_is_adapted(tmp_path: Path) -> None:
    made = recipe_of("flux", tmp_path, lora_targets=("to_q", r"transformer_blocks\.[01]\.attn\.to_k"), lora_alpha=8.0)
    adapted = [name for name, part in made.models["transformer"].named_modules() if hasattr(part, "lora_A")]
    assert len(adapted) == 14
    share = next(note for note in made.notes if note.startswith("transformer: "))
    assert "on 14 of 114 layers (12%): to_q, transformer_blocks" in share
    weights = sum(p.numel() for p in made.models["transformer"].parameters() if p.requires_grad)
    assert f"{weights:,} weights" in share


def test_weights_start_alike_and_leave_generators(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = recipe_of("flux", tmp_path)
    assert torch.equal(torch.rand(3), expected)
    other = recipe_of("flux", tmp_path)
    third = recipe_of("flux", tmp_path, seed=1)
    first, second, seeded = (dict(made.models["transformer"].named_parameters()) for made in (one, other, third))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], seeded[name]) for name in first if "lora_A" in name)


def test_adapters_of_a_half_model_are_float32(tmp_path: Path) -> None:
    made = recipe_of("flux", tmp_path, dtype="bfloat16")
    kinds = {(p.dtype, p.requires_grad) for p in made.models["transformer"].parameters()}
    assert kinds == {(torch.float32, True), (torch.bfloat16, False)}
    batch = made.micro_batches(0, 0, 1)[0]
    made.loss(made.models["transformer"], batch.data).backward()
    grads = [p.grad for n, p in made.models["transformer"].named_parameters() if "lora_B" in n and p.grad is not None]
    assert len(grads) > 0
    assert all(float(grad.abs().max()) > 0 for grad in grads)


@pytest.mark.parametrize("size", [2, 4])
def test_adapters_in_late_blocks_alone(size: int) -> None:
    """With checkpointing or without, with dropout or without: as one rank, none is zero; stages in front have none."""
    cases = [(checkpointing, dropout) for checkpointing in (False, True) for dropout in (0.0, 0.3)]
    of_ranks = run_ranks(size, late, cases, timeout=200)
    for number in range(len(cases)):
        found = [rank[number] for rank in of_ranks]
        assert [one["trained"] for one in found[: size // 2]] == [0] * (size // 2)
        assert sum(one["trained"] for one in found) == 4
        for one in found:
            assert one["worst"] < 2e-6
            assert one["only"] == []
            assert one["compared"] == one["trained"]
            assert one["zero"] == 0
    losses = [of_ranks[0][number]["loss"] for number in range(len(cases))]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-5  # dropout drops
