"""Which modules get an adapter, and patterns that match none."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from shardit import InputError
from shardit.core.modules.blocks import find_blocks
from shardit.training.language.adapters import add_lora, targets
from shardit.training.lora import shortened
from shardit.training.settings import TrainSettings
from tests.language import families

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def chosen(model: nn.Module, *patterns: str) -> list[str]:
    return targets(model, [name for name, _ in find_blocks(model)], patterns)


def test_patterns_are_ends_of_names_or_regular_expressions() -> None:
    model = families.make("llama")
    assert len(chosen(model)) == 4 * 7
    assert chosen(model, "q_proj") == [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]
    assert chosen(model, "self_attn.q_proj", "3.mlp.up_proj", "lm_head") == [
        *(f"model.layers.{n}.self_attn.q_proj" for n in range(4)),
        "model.layers.3.mlp.up_proj",
        "lm_head",
    ]
    assert chosen(model, r".*layers\.[23]\..*v_proj") == [f"model.layers.{n}.self_attn.v_proj" for n in (2, 3)]
    assert chosen(model, "embed_tokens") == ["model.embed_tokens"]
    assert len(chosen(families.make("gpt2"))) == 4 * 4  # its linears are of a class of their own


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("q_prj", "nearest names are q_proj"),
        ("self_attn.to_q", "self_attn.q_proj"),
        ("self_attn", "it is a module of other modules: name one of q_proj, k_proj"),
        ("q_pro", "q_proj"),
        ("(", "is no regular expression"),
        ("4.q_proj", "nearest names"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str, part: str) -> None:
    with pytest.raises(InputError, match=re.escape(part)) as error:
        chosen(families.make("llama"), "v_proj", pattern)
    assert repr(pattern) in str(error.value)


def test_the_names_for_peft_stand_for_what_was_chosen() -> None:
    able = ["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k"]
    assert shortened(["layers.0.q", "layers.1.q"], able) == ["q"]
    assert shortened(["layers.1.q"], able) == ["layers.1.q"]


@pytest.mark.parametrize("patterns", [(), ("q_proj", "3.mlp.up_proj"), (r".*\.0\..*",)])
def test_exactly_the_chosen_modules_are_trained(patterns: tuple[str, ...]) -> None:
    model: Any = families.make("llama")
    names = chosen(model, *patterns)
    made, line = add_lora(model, TrainSettings(lora_rank=3, lora_targets=patterns, lora_rslora=True), "base")
    trained = {name for name, one in made.named_parameters() if one.requires_grad}
    assert trained == {f"base_model.model.{name}.lora_{half}.default.weight" for name in names for half in "AB"}
    assert f"in {len(names)} modules" in line
    config: Any = made.peft_config["default"]  # pyright: ignore
    assert (config.r, config.lora_alpha, config.use_rslora, config.base_model_name_or_path) == (3, 3, True, "base")
    if not patterns:
        assert sorted(config.target_modules) == ALL
        assert "4 of 4 blocks" in line
