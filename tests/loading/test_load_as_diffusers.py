"""Folders as diffusers' own save_pretrained writes them, with more or less than one folder for each component."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from shardit import Omni
from shardit.config import DiffusionParallelConfig
from shardit.diffusion.loading.description import describe
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import check
from shardit.errors import InputError
from shardit.loading.hub import HubRemote, weight_files
from shardit.loading.model_lists import folders_of
from shardit.loading.safetensors_file import Reads
from shardit.settings.model_options import model_options
from tests.pipelines.entry import entries
from tests.pipelines.runs import arrays_of
from tests.support.fork_servers import kept_fork_server
from tests.support.loading import loaded

SOUND, NETS = "LongCatAudioDiTPipeline", "StableDiffusionControlNetInpaintPipeline"
"""A pipeline whose class creates its scheduler, without a folder for it; one with two ControlNets."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in (SOUND, NETS)}
    for name, folder in found.items():
        torch.manual_seed(0)
        entries()[name].build().save_pretrained(folder)
    return found


def expected(name: str, folder: Path) -> list[Any]:
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    call = {**entries()[name].call(), "output_type": "np"}
    return arrays_of(pipe(**call, generator=torch.Generator().manual_seed(5)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [SOUND, NETS])
def test_two_stages(name: str, folders: dict[str, Path]) -> None:
    call = {**entries()[name].call(), "output_type": "np"}
    pictures = {"pil_image": call.pop("image")} if "image" in call else {}
    config = {"pipeline_parallel_size": 2, "split_batch": False, "timeout_s": 100}
    with kept_fork_server(), Omni(str(folders[name]), **config) as omni:
        (output,) = omni.generate(call.pop("prompt", None), seed=5, **pictures, **call)
    assert output.error is None
    got = output.latents if output.latents is not None else output.audio
    (array,) = expected(name, folders[name])
    assert np.array_equal(np.asarray(got).reshape(array.shape), array)


def test_a_class_that_makes_its_scheduler_can_have_another(folders: dict[str, Path]) -> None:
    options = model_options(scheduler="FlowMatchLCMScheduler")
    assert "scheduler" not in describe(folders[SOUND]).components
    check(SessionSpec(model=str(folders[SOUND]), config=DiffusionParallelConfig(), options=options))
    pipe = loaded(folders[SOUND], options=options)
    assert type(pipe.scheduler).__name__ == "FlowMatchLCMScheduler"


def test_other_components_without_a_folder_are_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[NETS], tmp_path / "m")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(InputError, match="scheduler is missing"):
        describe(folder)


def test_several_nets_are_read_as_far_as_they_are_owned(folders: dict[str, Path]) -> None:
    folder, reads = folders[NETS], Reads()
    theirs = DiffusionPipeline.from_pretrained(str(folder)).controlnet
    whole = loaded(folder).controlnet
    assert [type(net) for net in whole.nets] == [type(net) for net in theirs.nets]
    assert [net.config for net in whole.nets] == [net.config for net in theirs.nets]
    assert whole.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in theirs.state_dict().items())

    def second(modules: dict[str, nn.Module]) -> dict[str, Any]:
        return {**dict.fromkeys(modules, lambda _: False), "controlnet": lambda name: name.startswith("nets.1.")}

    part = loaded(folder, owned=second, reads=reads).controlnet
    assert {name.split(".")[1] for name, one in part.named_parameters() if not one.is_meta} == {"1"}
    held = sum(one.nbytes for one in part.nets[1].parameters())
    assert reads.bytes == held
    assert sum(describe(folder).sizes["controlnet"].values()) == sum(one.nbytes for one in whole.parameters())


def test_mistakes_in_several_nets_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[NETS], tmp_path / "m")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert [one.name for one in folders_of(folder / "controlnet")] == ["controlnet", "controlnet_1"]
    with pytest.raises(InputError, match="controlnet is several models"):
        describe(folder, options=model_options(single_files={"controlnet": str(file)}))
    (folder / "controlnet_1" / "config.json").write_text(json.dumps({"_class_name": "Nonsense"}))
    with pytest.raises(InputError, match=r"controlnet_1/config\.json names no class of diffusers"):
        describe(folder)
    (folder / "controlnet_1" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(folder / "controlnet" / "config.json", folder / "controlnet_1")
    with pytest.raises(InputError, match="controlnet_1"):
        describe(folder)


def test_further_nets_are_fetched_from_the_hub(folders: dict[str, Path]) -> None:
    folder = folders[NETS]
    listing = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    remote = HubRemote("some/model", folder, [*listing, "other_1/config.json", "unet_x/config.json"])
    weights = weight_files(remote)
    assert {file.split("/")[0] for file in weights} == {"controlnet", "controlnet_1", "text_encoder", "unet", "vae"}
