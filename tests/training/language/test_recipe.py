"""Training of tiny language models by the recipe: over stages and replicas, files, samples, held-out rows."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardit import InputError, training
from shardit.models.tiny.language import tokenizer
from shardit.training.evaluation import evaluation_mode
from shardit.training.language.recipe import language_recipe
from shardit.training.language.samples import continuation, prompt_tokens
from shardit.training.settings import TrainSettings
from tests.language import families
from tests.support.ranks import run_ranks
from tests.training.models import worst
from tests.training.runs import join

CLOSE = 2e-6
ROWS = ["red apple", "blue sky", "green", "a cat", "two dogs", "one", "sun and rain", "up"]


def written(folder: Path, *rows: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": row} if isinstance(row, str) else row) + "\n" for row in rows))
    return str(file)


def memorised(rank: int, size: int, method: str, data: str, folder: str) -> tuple[list[float], list[list[int]]]:
    """Train all weights on eight rows until the loss is small; return the losses, and continuations of beginnings."""
    join(rank, size, method)
    settings = TrainSettings(model="tiny/llama", data=data, full=True, batch_size=4, accumulation=2)
    recipe = language_recipe(settings, replicas=1)
    staged = training.stages(recipe.models["model"], recipe.loss, pipeline_parallel_size=size, timeout_s=30)
    optimizer = torch.optim.AdamW(staged.parameters(), lr=1e-2)
    losses: list[float] = []
    while len(losses) < 80 and (not losses or losses[-1] > 0.02):
        batches = recipe.micro_batches(len(losses), 0, 1)
        weights = [one.weight for one in batches]
        losses.append(float(staged.step([one.data for one in batches], weights)))
        optimizer.step()
        optimizer.zero_grad()
    recipe.save({"model": staged}, Path(folder))
    tokens = tokenizer()
    prompts = [prompt_tokens(tokens, row[:2], chat=False) for row in ROWS]
    return losses, [continuation(staged.model, ids, {tokens.eos_token_id}, most=20) for ids in prompts]


def test_the_end_token_is_learnt(tmp_path: Path) -> None:
    data, folder = written(tmp_path, *ROWS), tmp_path / "model"
    of_ranks = run_ranks(2, memorised, data, str(folder), timeout=120)
    assert of_ranks[0] == of_ranks[1]
    losses, found = of_ranks[0]
    print(len(losses), losses[::8])
    assert losses[-1] < 0.05
    tokens: Any = AutoTokenizer.from_pretrained(folder)
    assert [tokens.decode(one) for one in found] == [row[2:] + tokens.eos_token for row in ROWS]
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(**tokens("tw", return_tensors="pt"), do_sample=False, max_new_tokens=20)
    assert tokens.decode(made[0]) == "two dogs" + tokens.eos_token


def averaged(
    rank: int, size: int, method: str, data: str, stages: int, batch_size: int, accumulation: int
) -> list[float]:
    """One step over two texts with 3 and 13 labels; return how far loss and gradients are from the sum over 16 tokens
    divided by 16."""
    join(rank, size, method)
    replicas = size // stages
    settings = TrainSettings(model="tiny/llama", data=data, full=True, batch_size=batch_size, accumulation=accumulation)
    recipe, plain = (language_recipe(settings, replicas) for _ in range(2))
    model: Any = plain.models["model"]
    sums = []
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer()(text)["input_ids"], tokenizer().eos_token_id]])
        sums.append(model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1))
    expected = sum(sums) / 16
    expected.backward()
    staged = training.stages(
        recipe.models["model"], recipe.loss, data_parallel_size=replicas, pipeline_parallel_size=stages, timeout_s=30
    )
    batches = recipe.micro_batches(0, rank // stages, replicas)
    value = staged.step([one.data for one in batches], [one.weight for one in batches])
    largest, compared, only = worst(staged.named_parameters(), model)
    assert compared
    assert not only
    return [abs(float(value) / float(expected) - 1), largest]


TEXTS = ("abc", "a text of 13 ")


@pytest.mark.parametrize(
    ("ranks", "stages", "batch_size", "accumulation"),
    [(1, 1, 2, 1), (1, 1, 1, 2), (2, 2, 2, 1), (2, 2, 1, 2), (2, 1, 1, 1), (4, 2, 1, 1)],
)
def test_the_mean_is_over_tokens(tmp_path: Path, ranks: int, stages: int, batch_size: int, accumulation: int) -> None:
    data = written(tmp_path, *TEXTS)
    run = functools.partial(averaged, data=data, stages=stages, batch_size=batch_size, accumulation=accumulation)
    for found in run_ranks(ranks, run, timeout=90):
        assert max(found) < CLOSE, found


def test_the_mean_over_texts_would_be_another(tmp_path: Path) -> None:
    """The negative control."""
    settings = TrainSettings(model="tiny/llama", data=written(tmp_path, *TEXTS), full=True, accumulation=2)
    recipe = language_recipe(settings, 1)
    batches = recipe.micro_batches(0, 0, 1)
    assert sorted(one.weight for one in batches) == [3, 13]
    values = [float(recipe.loss(recipe.models["model"], one.data)) for one in batches]
    over_tokens = sum(value * one.weight for value, one in zip(values, batches, strict=True)) / 16
    assert abs(sum(values) / 2 / over_tokens - 1) > 1e-3


def adapted(rank: int, size: int, method: str, data: str, folder: str) -> dict[str, Any]:
    """Train a LoRA on conversations; return losses, samples, and what samples and held-out rows leave."""
    join(rank, size, method)
    settings = TrainSettings(
        model="tiny/qwen3",
        data=data,
        lora_rank=4,
        lora_dropout=0.1,
        batch_size=4,
        gradient_checkpointing=True,
        sample_prompts=("hi", "red"),
        validation_data=data,
    )
    recipe = language_recipe(settings, replicas=1)
    staged = training.stages(recipe.models["model"], recipe.loss, pipeline_parallel_size=size, timeout_s=30)
    optimizer = torch.optim.AdamW([one for one in staged.parameters() if one.requires_grad], lr=2e-2)
    losses = []
    for step in range(12):
        batches = recipe.micro_batches(step, 0, 1)
        losses.append(float(staged.step([one.data for one in batches], [one.weight for one in batches])))
        optimizer.step()
        optimizer.zero_grad()
    assert recipe.sample is not None
    assert recipe.held_out is not None
    generator, modes = torch.get_rng_state(), [module.training for module in staged.model.modules()]
    with evaluation_mode({"model": staged.model}, torch.device("cpu")):
        files = recipe.sample({"model": staged.model}, Path(folder) / "samples")
        checked = [float(recipe.loss(staged.model, one.data)) for one in recipe.held_out() for _ in range(2)]
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in staged.model.modules()]
    assert any(modes)
    recipe.save({"model": staged}, Path(folder) / "adapter")
    return {"losses": losses, "files": [str(one) for one in files], "held out": checked, "notes": recipe.notes}


def test_a_lora_on_conversations(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": one[0]}, {"role": "assistant", "content": one}]} for one in ROWS]
    of_ranks = run_ranks(2, adapted, written(tmp_path, *rows, "", {"messages": []}), str(tmp_path), timeout=120)
    found = of_ranks[0]
    assert found == of_ranks[1]
    assert found["losses"][-1] < 0.8 * found["losses"][0]
    assert Path(found["files"][1]).read_text().startswith("red\n\n")
    notes = "\n".join(found["notes"])
    for part in ("0 texts, 8 conversations", "2 rows are empty", "does not mark answers", "in 28 modules", "end token"):
        assert part in notes, notes
    _loads_in_plain_peft(tmp_path)


def _loads_in_plain_peft(folder: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    loaded: Any = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    tokens: Any = AutoTokenizer.from_pretrained(folder / "adapter")
    ids = tokens("red", return_tensors="pt")["input_ids"]
    with torch.no_grad(), loaded.disable_adapter():
        base = loaded(ids).logits
    with torch.no_grad():
        assert (loaded(ids).logits - base).abs().max() > 1e-3


def test_settings_and_data_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    data = written(tmp_path, *ROWS)
    for changes, part in (
        ({"num_frames": 5}, "num_frames: tiny/llama is a language model"),
        ({"caption_dropout": 0.1}, "caption_dropout"),
        ({"data": ""}, "data is missing"),
        ({"data": "shapes:moving"}, "there is no file or folder shapes:moving"),
        ({"validation_data": str(tmp_path / "absent")}, "validation_data: there is no file"),
        ({"lora_targets": ("to_q",)}, "nearest names are"),
        ({"model": "tiny/wan2.2-t2v"}, "pipeline of diffusers"),
        ({"sample_prompts": ("red", "")}, "sample_prompts: '' has no tokens"),
    ):
        settings: Any = TrainSettings(**{"model": "tiny/llama", "data": data, **changes})
        with pytest.raises(InputError) as error:
            language_recipe(settings, replicas=1)
        assert part in str(error.value)


def test_the_identity_tells_what_decides_the_micro_batches(tmp_path: Path) -> None:
    def identity(*rows: Any, **changes: Any) -> Any:
        settings: Any = {"model": "tiny/llama", "data": written(tmp_path, *rows), **changes}
        return language_recipe(TrainSettings(**settings), replicas=1).identity

    first = identity(*ROWS)
    assert first == identity(*ROWS)
    assert first["data"] != identity(*ROWS[1:])["data"]
    assert first["data"] != identity(*ROWS[::-1])["data"]
    assert {name for name, one in identity(*ROWS, batch_size=2, seed=4).items() if one != first[name]} == {
        "batch_size",
        "seed",
    }


def test_half_precision_in_files_is_trained_in_float32(tmp_path: Path) -> None:
    from shardit.models.tiny.language import language_folder

    folder = tmp_path / "model"
    source = language_folder("tiny/llama")
    for dtype, kept, said in ((torch.float16, torch.float32, True), (torch.bfloat16, torch.bfloat16, False)):
        model: Any = AutoModelForCausalLM.from_pretrained(source).to(dtype)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(str(folder))
        settings = TrainSettings(model=str(folder), data=written(tmp_path, *ROWS))
        recipe = language_recipe(settings, replicas=1)
        base = [one for one in recipe.models["model"].parameters() if not one.requires_grad]
        assert {one.dtype for one in base} == {kept}
        assert any("trained in float32" in note for note in recipe.notes) == said


@pytest.mark.parametrize("asked", [True, False])
def test_a_balancing_loss_that_the_folder_asks_for_is_said_to_be_left_out(asked: bool, tmp_path: Path) -> None:
    model: Any = families.make("mixtral", output_router_logits=asked, vocab_size=512)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer().save_pretrained(str(folder))
    recipe = language_recipe(TrainSettings(model=str(folder), data=written(tmp_path, *ROWS)), replicas=1)
    assert any("balances experts" in note for note in recipe.notes) == asked


def saved(rank: int, size: int, method: str, data: str, folder: str) -> torch.Tensor:
    """Train a model whose embedding is tied to its head for a step, save it; return logits over the stages."""
    join(rank, size, method)
    settings = TrainSettings(model="tiny/qwen3", data=data, full=True, batch_size=8)
    recipe = language_recipe(settings, replicas=1)
    staged = training.stages(recipe.models["model"], recipe.loss, pipeline_parallel_size=size, timeout_s=30)
    batches = recipe.micro_batches(0, 0, 1)
    staged.step([one.data for one in batches], [one.weight for one in batches])
    torch.optim.AdamW(staged.parameters(), lr=1e-2).step()
    recipe.save({"model": staged}, Path(folder))
    with torch.no_grad():
        return staged.model(input_ids=torch.tensor([[5, 6, 7]])).logits


def test_a_model_with_a_tied_head_is_saved_as_it_is(tmp_path: Path) -> None:
    first, second = run_ranks(2, saved, written(tmp_path, *ROWS), str(tmp_path / "model"), timeout=60)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        expected = loaded(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_samples_stop_where_the_model_has_no_more_positions() -> None:
    model = families.make("gpt2", n_positions=20)
    assert len(continuation(model, [5] * 10, {300}, room=20)) == 10
    assert len(continuation(model, [5] * 10, {300}, most=4, room=20)) == 4
    assert continuation(model, [5] * 20, {300}, room=20) == []
