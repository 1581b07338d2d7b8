"""Models of transformers without a head for tokens: rewards, embeddings, classes of tokens, encoders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import shardit
from shardit import DiffusionParallelConfig, InputError, UnsupportedError
from shardit.core.comm.mesh import init_mesh
from shardit.language.loading.prepared import class_of
from shardit.language.loading.source import decoder_source
from tests.pipelines.entry import entries
from tests.support.ranks import run_ranks

IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [0, 0, 3, 4, 5, 2]])
NEXT = torch.tensor([[3], [4]])
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
STAGES = DiffusionParallelConfig(pipeline_parallel_size=2)
LLAMA = ("LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForQuestionAnswering")
OTHERS = ("MambaModel", "BertModel", "BertForMaskedLM", "ModernBertModel", "CLIPTextModel")


def make(name: str) -> Any:
    torch.manual_seed(0)
    cls: Any = getattr(transformers, name)
    return cls(cls.config_class(**SIZES, num_hidden_layers=4, eos_token_id=2)).eval()


def pictures_and_text() -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of two encoders, which has no embedding of its own, and its inputs."""
    text = {**SIZES, "num_hidden_layers": 4, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    return model, {"input_ids": IDS, "pixel_values": torch.randn(2, 3, 32, 32)}


def same(got: Any, expected: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def check_stages(rank: int, count: int, method: str, names: tuple[str, ...]) -> None:
    init_mesh(STAGES, device="cpu", init_method=method, rank=rank)
    mask = (IDS != 0).long()
    for name in names:
        plain = make(name)
        model = shardit.parallelize(copy.deepcopy(plain), STAGES)
        assert sum(p.is_meta for p in model.parameters()) > 4, name
        for options in ({}, {"output_hidden_states": True}):
            with torch.no_grad():
                expected = plain(input_ids=IDS, attention_mask=mask, **options)
            got = model(input_ids=IDS, attention_mask=mask, **options)
            assert torch.equal(got[0], expected[0]), (name, options)
            assert same(got.hidden_states or (), expected.hidden_states or ()), name
        if name in ("LlamaModel", "LlamaForSequenceClassification"):  # the cache of a call continues it
            longer = torch.cat([mask, torch.ones_like(NEXT)], 1)
            with torch.no_grad():
                expected = plain(input_ids=NEXT, attention_mask=longer, cache=expected.past_key_values)
            got = model(input_ids=NEXT, attention_mask=longer, cache=got.past_key_values)
            assert torch.equal(got[0], expected[0]), name


def check_two_encoders(rank: int, count: int, method: str) -> None:
    init_mesh(STAGES, device="cpu", init_method=method, rank=rank)
    plain, inputs = pictures_and_text()
    model = shardit.parallelize(copy.deepcopy(plain), STAGES)
    with torch.no_grad():
        expected = plain(**inputs)
    for _ in range(2):
        assert torch.equal(model(**inputs).logits_per_image, expected.logits_per_image)


def check_parts_of_a_pipeline(rank: int, count: int, method: str) -> None:
    init_mesh(STAGES, device="cpu", init_method=method, rank=rank)
    pipe = entries()["StableDiffusionPipeline"].build()
    with torch.no_grad():
        expected = pipe.text_encoder(IDS)[0]
    shardit.parallelize(pipe, STAGES)
    encoder = pipe.text_encoder
    assert shardit.parallelize(encoder, STAGES) is encoder  # it keeps its place in the pipeline
    assert not hasattr(encoder, "shardit_decoder")
    pipe = entries()["StableDiffusionPipeline"].build()
    assert torch.equal(shardit.parallelize(pipe.text_encoder, STAGES)(IDS)[0], expected)
    with pytest.raises(UnsupportedError, match="text_encoder is sharded by itself: load it again, and give only the"):
        shardit.parallelize(pipe, STAGES)


def check_loaded(rank: int, count: int, method: str, folder: Path) -> None:
    init_mesh(STAGES, device="cpu", init_method=method, rank=rank)
    model: Any = shardit.load(folder, STAGES)
    with torch.no_grad():
        expected = make(folder.name)(input_ids=IDS).logits
    assert type(model).__name__ == folder.name
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("names", [LLAMA, OTHERS], ids=["llama", "others"])
def test_over_stages_all_results_have_the_bits_of_one_rank(names: tuple[str, ...]) -> None:
    run_ranks(2, check_stages, names)


def test_a_model_of_two_encoders() -> None:
    run_ranks(2, check_two_encoders)


def test_an_encoder_before_and_after_its_pipeline() -> None:
    run_ranks(2, check_parts_of_a_pipeline)


def test_a_folder_loads_as_the_class_that_its_configuration_names(tmp_path: Path) -> None:
    folder = tmp_path / "LlamaForSequenceClassification"
    make(folder.name).save_pretrained(folder)
    run_ranks(2, check_loaded, folder)
    with pytest.raises(InputError, match=r"which generates no text: load it with shardit\.load"):
        class_of(decoder_source(folder))


def test_an_encoder_with_a_decoder_is_for_parallelize(tmp_path: Path) -> None:
    config = transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=64)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="an encoder and a decoder, which only parallelize takes"):
        shardit.load(tmp_path, STAGES)


def test_the_configuration_of_a_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json holds no weights: give a \.safetensors file, or the folder"):
        shardit.load(tmp_path / "config.json", STAGES)
