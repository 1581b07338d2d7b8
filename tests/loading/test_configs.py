"""Real models laid out over four ranks, without a weight: the share of the fullest rank."""

from __future__ import annotations

import functools
import json
import re
import shutil
from typing import Any

import pytest
import torch

import shardit.engine.inspect
from shardit.cli import main
from shardit.config import DiffusionParallelConfig
from shardit.diffusion.loading.description import describe_configs
from shardit.diffusion.loading.shipped import FOLDER, HUB_IDS, names, shipped
from shardit.engine.inspect import inspect_model
from shardit.errors import InputError
from shardit.models import tiny
from tests.support.paths import DOCS

WHOLE = {
    "Wan2.2-T2V-A14B": {"transformer": 14.29, "transformer_2": 14.29, "text_encoder": 5.68, "vae": 0.127},
    "Wan2.2-I2V-A14B": {"transformer": 14.29, "transformer_2": 14.29, "text_encoder": 5.68, "vae": 0.127},
    "Wan2.2-TI2V-5B": {"transformer": 5.00, "text_encoder": 5.68, "vae": 0.705},
    "Qwen-Image": {"transformer": 20.43, "text_encoder": 8.29, "vae": 0.127},
    "FLUX.1-dev": {"transformer": 11.90, "text_encoder": 0.123, "text_encoder_2": 4.76, "vae": 0.0838},
    "SD3.5-large": {
        "transformer": 8.06 + 192 * 192 * 2432 / 1e9,  # and a table of positions, which is no parameter
        "text_encoder": 0.1237,
        "text_encoder_2": 0.695,
        "text_encoder_3": 4.76,
        "vae": 0.0838,
    },
}
"""Parameters in billions, as published."""


@pytest.fixture(autouse=True)
def each_is_built_once(monkeypatch):
    monkeypatch.setattr(shardit.engine.inspect, "describe_configs", described)


@functools.cache
def described(folder: Any) -> Any:
    return describe_configs(folder)


def totals(document: dict) -> list[int]:
    return [sum(part["bytes"] for part in rank["components"].values()) for rank in document["ranks"]]


@pytest.mark.parametrize("axis", ["pipeline_parallel_size", "tensor_parallel_size"])
@pytest.mark.parametrize("name", names())
def test_the_fullest_rank_holds_little_more_than_its_share(name, axis):
    document = inspect_model(name, DiffusionParallelConfig(**{axis: 4}))
    uneven = 10 / 9.5 if (name, axis) == ("SD3.5-large", "tensor_parallel_size") else 1  # 38 heads on 4 ranks
    assert max(totals(document)) <= 1.05 * uneven * document["bytes"] / 4
    assert sum(totals(document)) >= document["bytes"]  # nothing was lost


@pytest.mark.parametrize("name", names())
def test_sizes_are_those_published(name):
    whole = inspect_model(name, DiffusionParallelConfig())["ranks"][0]["components"]
    assert {n: pytest.approx(part["parameters"] / 1e9, rel=0.01) for n, part in whole.items()} == WHOLE[name]


def test_stages_stay_balanced_by_compute():
    for rank in inspect_model("Wan2.2-T2V-A14B", DiffusionParallelConfig(pipeline_parallel_size=4))["ranks"]:
        assert len(rank["components"]["transformer"]["blocks"]) == 10
        assert len(rank["components"]["transformer_2"]["blocks"]) == 10


def test_command_line(capsys, tmp_path, monkeypatch):
    assert main(["inspect", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "--pipeline-parallel-size", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ranks"]) == 4
    assert main(["inspect", "Wan2.2-TI2V-5B", "--pipeline-parallel-size=4", "--dtype=float32"]) == 0
    assert "fullest rank: " in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen-Image").mkdir()  # a folder of that name is meant first
    assert main(["inspect", "Qwen-Image"]) == 2
    assert "model_index.json" in capsys.readouterr().err
    assert main(["inspect"]) == 2
    assert "name one model: " in capsys.readouterr().err


def test_bytes_of_files_that_are_loaded_in_another_format(tmp_path):
    """Without dtype, bytes are those of the files, but diffusers loads in float32."""
    pipe = tiny.load_plain(tiny.resolve("tiny/flux"))
    pipe.transformer.to(torch.bfloat16).save_pretrained(tmp_path / "mine" / "transformer")
    shutil.copytree(tiny.resolve("tiny/flux"), tmp_path / "mine", ignore=lambda *_: ["transformer"], dirs_exist_ok=True)
    document = inspect_model(tmp_path / "mine", DiffusionParallelConfig())
    loaded = inspect_model(tmp_path / "mine", DiffusionParallelConfig(), dtype="float32")["bytes"]
    assert document["bytes"] < loaded
    assert document["notes"][-1] == (
        "bytes are those of the files; without dtype (--dtype) weights are loaded in float32: "
        f"{loaded / 2**20:,.1f} MiB in all"
    )
    assert inspect_model("tiny/flux", DiffusionParallelConfig())["notes"] == []
    assert "bytes are those of bfloat16; " in inspect_model("Qwen-Image", DiffusionParallelConfig())["notes"][-1]


def test_a_folder_without_weights(tmp_path):
    shutil.copytree(FOLDER / "Wan2.2-TI2V-5B", tmp_path / "mine")
    document = inspect_model(tmp_path / "mine", DiffusionParallelConfig(), dtype="float32")
    assert document["bytes"] == 2 * inspect_model("Wan2.2-TI2V-5B", DiffusionParallelConfig())["bytes"]
    assert "no weights" in inspect_model(tmp_path / "mine", DiffusionParallelConfig())["notes"][-1]
    with pytest.raises(InputError, match=r"no weight files of .*mine here; leave variant out"):
        inspect_model(tmp_path / "mine", DiffusionParallelConfig(), variant="fp16")


def test_unknown_names_list_the_valid_ones(capsys):
    for words in ([], ["Qwen-Imag"]):
        assert main(["inspect", *words]) == 2
        assert "Wan2.2-TI2V-5B" in capsys.readouterr().err


def test_every_configuration_is_complete():
    assert sorted(path.name for path in FOLDER.iterdir()) == names() == sorted(WHOLE)
    assert all(shipped(hub_id) == FOLDER / name for hub_id, name in HUB_IDS.items())
    assert shipped("Wan2.2") is None


def test_the_docs_name_them_all():
    page = (DOCS / "parallelism.md").read_text("utf-8")
    [sentence] = re.findall(r"`shardit inspect` shows the share of each rank, of\s(.*?) even", page, re.DOTALL)
    assert re.findall(r"`([^`]+)`", sentence) == names()


def test_a_folder_that_names_no_component(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, match="names no component that has weights"):
        inspect_model(tmp_path, DiffusionParallelConfig())
