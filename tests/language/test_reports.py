"""What people ran into with language models on several ranks: tied weights, neighbours in a batch, seeds, ends of
`generate`, wide vocabularies. Stages and tensor ranks give the tokens of plain transformers on one rank."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import shardit
from shardit import LLM, DiffusionParallelConfig, InputError, SamplingParams
from shardit.cli import main
from shardit.core.comm.mesh import axis_sizes, coordinates, init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.engine.inspect_language import inspect_decoder
from shardit.engine.process.memory import limit_bytes
from shardit.language.loading.prepared import PreparedDecoder
from shardit.language.loading.source import decoder_source
from shardit.language.request.prompts import rows_of
from shardit.language.request.rows import PromptRow
from shardit.language.sharding import lay_out_decoder, shard_decoder
from shardit.loading.safetensors_file import Reads
from tests.language import families
from tests.language.batched import continued
from tests.language.cases import CASES, compare, errors_of
from tests.language.folders import tokenizer
from tests.language.test_loading import write
from tests.language.test_stages import Clock
from tests.support.ranks import run_ranks

STAGES, TENSOR = "pipeline_parallel_size", "tensor_parallel_size"
AXES = ((STAGES, 2), (STAGES, 3), (TENSOR, 2))
TIED = [(name, head) for name in ("llama", "qwen3") for head in (False, True)]
"""Families, and whether the file has the tied weight also under the name of the head."""

LENGTHS = (1, 2, 3, 5, 9, 17, 33, 40)
LIMIT, NEW = 256, 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
PADDED = ("llama", "gpt2", "mamba2")
"""Rotary positions, learned positions, and states that must not read padding."""


def test_a_folder_of_configurations_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = decoder_source("tiny/llama").folder
    for name in ("config.json", "generation_config.json"):
        shutil.copy(folder / name, tmp_path)
    shown = []
    for model in (str(folder), str(tmp_path)):
        assert main(["inspect", model, "--json", "--dtype=float32", "--pipeline-parallel-size=2"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "the folder has no weights: bytes are those of float32" in capsys.readouterr().out


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(7)
    return [tuple(torch.randint(3, families.VOCABULARY, (n,), generator=generator).tolist()) for n in LENGTHS]


def alone(plain: Any, prompt: tuple[int, ...]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    return tuple(out[0, len(prompt) :].tolist())


def compare_rows(runtime: Runtime, plain: Any, model: Any) -> dict[str, bool]:
    """Compare arrangements of prompts with each prompt alone on plain transformers."""
    expected = [alone(plain, prompt) for prompt in prompts()]
    rows = [rows_of(number, prompt, GREEDY, LIMIT, None)[0] for number, prompt in enumerate(prompts())]
    swapped = [rows[1], rows[0], *rows[2:]]
    return {
        "together": continued(model, rows, runtime) == expected,
        "one by one": [continued(model, [row], runtime)[0] for row in rows] == expected,
        "reversed": continued(model, rows[::-1], runtime) == expected[::-1],
        "two groups": continued(model, rows, runtime, groups=2) == expected,
        "three groups": continued(model, rows, runtime, groups=3) == expected,
        "control": continued(model, swapped, runtime) != expected and len(set(expected)) == len(expected),
    }


def compare_seeds(runtime: Runtime, plain: Any, model: Any) -> list[bool]:
    """Compare a prompt with a seed beside others without one, with itself alone on one rank; the others differ."""
    seeded = SamplingParams(temperature=0.9, seed=42, max_tokens=12, ignore_eos=True)
    expected = continued(plain, rows_of(0, (5, 6, 7), seeded, LIMIT, None))[0]
    found = []
    for repeat in range(4):
        free = SamplingParams(temperature=0.9, max_tokens=12 + repeat, ignore_eos=True)
        # Ranks get rows whose seeds have been drawn; here each rank would draw its own.
        others = [PromptRow((9,) * (8 + repeat), free, seed=100 * repeat + copy) for copy in range(2)]
        one, two = (rows_of(number, (5, 6, 7), seeded, LIMIT, None)[0] for number in range(2))
        made = continued(model, [others[0], one, others[1], two], runtime)
        found += [made[1] == expected, made[3] == expected, made[0] != made[2]]
    drawn = [rows_of(number, (5,), SamplingParams(), LIMIT, None)[0].seed for number in range(2)]
    return [*found, drawn[0] != drawn[1]]


class WallClock(StoppingCriteria):
    """Stops after a time."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), time.monotonic() > self.end)


class RowCounter(StoppingCriteria):
    """Stops each row at another step, which depends on the rank."""

    def __init__(self, rank: int):
        self.calls = rank

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return torch.arange(input_ids.shape[0]) + 4 <= self.calls


def texts_of_streamers(model: Any, ids: torch.Tensor) -> list[str]:
    """Return what streamers of transformers print, and what they give to another thread."""
    printed, held = io.StringIO(), TextIteratorStreamer(tokenizer(), timeout=0.1)  # pyright: ignore
    with redirect_stdout(printed):
        model.generate(ids, streamer=TextStreamer(tokenizer()), do_sample=False, max_new_tokens=9)  # pyright: ignore
    model.generate(ids, streamer=held, do_sample=False, max_new_tokens=9)
    return [printed.getvalue(), "".join(list(held.text_queue.queue)[:-1])]


def use_endings(rank: int, plain: Any, model: Any) -> dict[str, Any]:
    """Use ends of `generate` that depend on the rank. Ids are compared between ranks by the caller."""
    ids = torch.arange(10, 24).reshape(2, 7)
    call: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    ends = {"eos_token_id": [3, 50, 51, 52, 53, 100, 101, 102, 200], "max_new_tokens": 60}
    words = {"stop_strings": list("abcdefghijkXYZ"), "tokenizer": tokenizer(), "max_new_tokens": 60}

    def counted(start: int, of: Callable[[int], StoppingCriteria] = RowCounter) -> dict[str, Any]:
        return {"stopping_criteria": StoppingCriteriaList([of(start)]), "max_new_tokens": 12}

    timed = {
        "max_time": {"max_time": 0.05},
        "wall clock": {"stopping_criteria": StoppingCriteriaList([WallClock(0.05 + 0.1 * rank)])},
        "beams": {"max_time": 0.05, "num_beams": 3},
    }
    found: dict[str, Any] = {"seconds": {}, "ids": {}, "same": {}}
    longest = plain.generate(ids, max_new_tokens=200, **call)
    for name, options in timed.items():
        began = time.monotonic()
        out = found["ids"][name] = model.generate(ids, max_new_tokens=200, **call, **options)
        found["seconds"][name] = time.monotonic() - began
        found["same"][name] = name == "beams" or torch.equal(out, longest[:, : out.shape[1]])
    for name, (own, first) in {
        "counter": (counted(1 + 2 * rank, Clock), counted(1, Clock)),
        "counter by row": (counted(rank), counted(0)),
        "end tokens": (ends, ends),
        "stop strings": (words, words),
    }.items():
        out = found["ids"][name] = model.generate(ids, **call, **own)
        found["same"][name] = torch.equal(out, plain.generate(ids, **call, **first)) and out.shape[1] < 67
    found["texts"] = texts_of_streamers(model, ids[:1])
    found["plain texts"] = texts_of_streamers(plain, ids[:1])
    only_first = counted(0) if rank == 0 else {"max_new_tokens": 12}
    found["errors"] = errors_of(
        {
            "max_time": lambda: model.generate(ids, max_time=0.05 + rank, max_new_tokens=12, **call),
            "eos_token_id": lambda: model.generate(ids, eos_token_id=[3, 4 + rank], max_new_tokens=12, **call),
            "stop_strings": lambda: model.generate(ids, **{**words, "stop_strings": ["ab"[rank % 2]]}, **call),
            "stopping_criteria": lambda: model.generate(ids, **only_first, **call),
        }
    )
    found["same"]["right after errors"] = torch.equal(
        plain.generate(ids, max_new_tokens=12, **call), model.generate(ids, max_new_tokens=12, **call)
    )
    return found


def compare_tied(folder: Path, config: DiffusionParallelConfig, rank: int) -> list[Any]:
    """Compare a loaded model with plain transformers. Return also the numbers of tensors as wide as the vocabulary in
    memory, of bytes held, and of bytes read."""
    close = 1e-5 if config.tensor_parallel_size > 1 else 0.0
    model: Any = shardit.load(folder, config, device="cpu", timeout_s=60)
    how = compare(AutoModelForCausalLM.from_pretrained(folder).eval(), model, CASES[0], close)
    held = {p.data_ptr(): p for p in model.parameters() if not p.is_meta}
    wide = sum(families.VOCABULARY in p.shape for p in held.values())
    prepared, reads = PreparedDecoder(decoder_source(folder)), Reads()
    prepared.load(lay_out_decoder(prepared.module, config), coordinates(axis_sizes(config), rank), "cpu", reads)
    return [how, wide, sum(p.nbytes for p in held.values()), reads.bytes]


def check_reports(rank: int, count: int, method: str, axis: str, folder: Path) -> dict[str, Any]:
    """Check everything on one set of ranks."""
    axes: dict[str, Any] = {axis: count}
    config = DiffusionParallelConfig(**axes)
    runtime = Runtime.of(init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method), 1, False)

    def pair(name: str, **changes: Any) -> tuple[Any, Any]:
        plain, model = (families.make(name, **changes) for _ in range(2))
        shard_decoder(model, runtime, lay_out_decoder(model, config), config)
        return plain, model

    names = PADDED if (axis, count) == AXES[0] else PADDED[:1]
    return {
        "rows": {name: compare_rows(runtime, *pair(name)) for name in names},
        "seeds": compare_seeds(runtime, *pair("llama")),
        "endings": use_endings(rank, *pair("llama", vocab_size=len(tokenizer()))),
        "tied": {f"{name} {head}": compare_tied(folder / f"{name} {head}", config, rank) for name, head in TIED},
    }


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    for name, head in TIED:
        (folder / f"{name} {head}").mkdir()
        write(folder / f"{name} {head}", name, True, head)
    return folder


@pytest.fixture(scope="module", params=AXES, ids=lambda axis: f"{axis[0]}={axis[1]}")
def of_ranks(request: pytest.FixtureRequest, tied: Path) -> list[dict[str, Any]]:
    axis, count = request.param
    return run_ranks(count, check_reports, axis, tied)


def test_a_row_does_not_depend_on_its_neighbours(of_ranks: list[dict[str, Any]]) -> None:
    for found in of_ranks:
        for name, results in found["rows"].items():
            assert all(results.values()), (name, results)


def test_seeds_belong_to_a_request(of_ranks: list[dict[str, Any]]) -> None:
    for found in of_ranks:
        assert found["seeds"] == [True] * 13


def test_ranks_agree_about_the_end(of_ranks: list[dict[str, Any]]) -> None:
    first = of_ranks[0]["endings"]
    assert first["texts"] == first["plain texts"]
    assert all(first["texts"])
    for number, found in enumerate(one["endings"] for one in of_ranks):
        for name, ids in found["ids"].items():
            assert torch.equal(ids, first["ids"][name]), name
        assert all(found["same"].values()), found["same"]
        assert all(seconds < 5 for seconds in found["seconds"].values()), found["seconds"]
        assert number == 0 or found["texts"] == ["", ""]
        for name, text in found["errors"].items():
            assert f"ranks differ in {name} of LlamaForCausalLM.generate" in str(text)


def test_tied_weights_are_held_and_read_once(of_ranks: list[dict[str, Any]], tied: Path) -> None:
    for found in of_ranks:
        for name, (how, wide, held, read) in found["tied"].items():
            assert how == "right", name
            middle = len(of_ranks) == 3 and found is of_ranks[1]
            assert wide == (0 if middle else 1), name
            assert read == held, name


@pytest.mark.parametrize(("name", "head"), TIED)
def test_tied_weights_on_one_rank(tied: Path, name: str, head: bool) -> None:
    how, wide, *_ = compare_tied(tied / f"{name} {head}", DiffusionParallelConfig(), 0)
    assert (how, wide) == ("right", 1)


VOCABULARY_BYTES = 50_000 * 64 * 4


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of 8 layers of width 64 with a vocabulary of 50,000."""
    folder = tmp_path_factory.mktemp("wide")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    config = LlamaConfig(vocab_size=50_000, num_attention_heads=4, max_position_embeddings=2048, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stages", [2, 4])
def test_inspect_shows_the_vocabulary(wide: Path, stages: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_decoder(decoder_source(wide), DiffusionParallelConfig(pipeline_parallel_size=stages))
    parts = [{name: part["bytes"] for name, part in one["components"].items()} for one in found["ranks"]]
    assert [part.get("embedding") for part in parts] == [VOCABULARY_BYTES, *[None] * (stages - 1)]
    assert [part.get("head") for part in parts] == [*[None] * (stages - 1), VOCABULARY_BYTES]
    whole = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(wide).parameters())
    assert found["bytes"] == whole
    assert sum(part.get("layers", 0) for part in parts) == whole - 2 * VOCABULARY_BYTES - 64 * 4
    capsys.readouterr()
    assert main(["inspect", str(wide), "--pipeline-parallel-size", str(stages)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("embedding") == shown.count("head") == 1


@pytest.mark.parametrize("axis", [STAGES, TENSOR])
def test_a_bound_too_small_for_one_request_states_its_bytes(wide: Path, axis: str) -> None:
    """Half of the cache of 1000 tokens on each of two ranks: 8 layers, 64 wide, keys and values."""
    options: dict[str, Any] = {axis: 2, "gpu_memory_utilization": 10_000_000 / (limit_bytes(2) or 1)}
    says = r"rank \d needs 1[34],\d{3},\d{3} bytes for weights and 2,048,000 for the cache of one request of max_model"
    with pytest.raises(InputError, match=says + r"_len=1000, .* of its memory is (10,000|9,999),\d{3}; lower max_m"):
        LLM(wide, device="cpu", timeout_s=60, max_model_len=1000, **options)
