"""Mistakes of users with the real engine: one line with the remedy, early, and no process left."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import resource
import shutil
import signal
from collections.abc import Callable

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from shardit import DiffusionParallelConfig, InputError, OmniDiffusionSamplingParams
from shardit.cli import main
from shardit.diffusion.output.from_file import read_record
from shardit.diffusion.run.processors import check_in_flight
from shardit.engine.process.fork_client import FORK_SERVER
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import check
from shardit.flags import GenerateFlags
from shardit.loading.dtypes import setting
from shardit.models import tiny
from tests.support.loading import loaded
from tests.support.real_omni import by_diffusers, same, started

FLUX = tiny.defaults("flux")


def spec(model: object = "tiny/flux", ranks: int = 1, **options) -> SessionSpec:
    partition = options.pop("layer_partition", None)
    config = DiffusionParallelConfig(pipeline_parallel_size=ranks, layer_partition=partition)
    return SessionSpec(str(model), config, **options)


def refused(says: str, act: Callable[..., object], *args, **options) -> None:
    with pytest.raises(InputError, match=says) as caught:
        act(*args, **options)
    assert "\n" not in str(caught.value)


# Before ranks start.


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("tiny/nope", "no tiny model 'nope'; there are: flux"),
        ("/no/such/folder", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("", "no model given"),
    ],
)
def test_unknown_model(model, says):
    refused(says, check, spec(model))


def first_shard(folder: pathlib.Path) -> pathlib.Path:
    return sorted((folder / "transformer").glob("*.safetensors"))[0]


def edit(path: pathlib.Path, change: Callable[[dict], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def pickle_only(folder: pathlib.Path) -> None:
    for path in [*(folder / "transformer").glob("*.safetensors")]:
        path.rename(path.with_suffix(".bin"))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()


def wrong_shape(folder: pathlib.Path) -> None:
    tensors = load_file(first_shard(folder))
    tensors["context_embedder.bias"] = torch.ones(3)
    save_file(tensors, first_shard(folder))


def no_entry(folder: pathlib.Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    edit(path, lambda table: table["weight_map"].pop("context_embedder.bias"))


def index(change: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
    return lambda folder: edit(folder / "model_index.json", change)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "model_index.json").unlink(), r"no model_index\.json"),
        (index(lambda t: t.update(_class_name="FluxPipelin")), "did you mean FluxPipeline"),
        (index(lambda t: t.pop("vae")), r"model_index\.json has no vae, which FluxPipeline needs"),
        (index(lambda t: t.update(transformer=[None, None])), "has no transformer"),
        (index(lambda t: t.update(transformer=["diffusers", "NoModel"])), "has no class NoModel"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer is missing"),
        (lambda f: shutil.rmtree(f / "transformer"), "transformer is missing"),
        (lambda f: first_shard(f).unlink(), "is missing"),
        (lambda f: first_shard(f).write_bytes(b""), "is empty"),
        (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-9]), "is cut short"),
        (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:20]), "is cut short inside its header"),
        (no_entry, r"has no tensor context_embedder\.bias"),
        (wrong_shape, r"context_embedder\.bias has shape \[3\]"),
        (pickle_only, "only pickled weights"),
    ],
)
def test_damaged_folder(tmp_path, damage, says):
    folder = shutil.copytree(tiny.resolve("tiny/flux"), tmp_path / "flux")
    damage(folder)
    refused(says, check, spec(folder, 2))


def test_damaged_text_encoder(tmp_path):
    """transformers would fill missing tensors with random numbers, and would not name a tensor of the wrong size."""
    folder = shutil.copytree(tiny.resolve("tiny/flux"), tmp_path / "flux")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, weights, metadata={"format": "pt"})
    refused(r"text_encoder has no tensor \S+ for CLIPTextModel", loaded, folder)
    save_file({**tensors, name: torch.ones(3)}, weights, metadata={"format": "pt"})
    refused(r"has shape \[3\], but CLIPTextModel needs", loaded, folder)


def test_damaged_tokenizer_is_named(tmp_path):
    folder = shutil.copytree(tiny.resolve("tiny/flux"), tmp_path / "flux")
    (folder / "tokenizer_2" / "tokenizer.json").write_text('{"a')
    refused(r"tokenizer_2/tokenizer\.json is damaged", loaded, folder)


def test_pipelines_that_change_the_model_take_one_request_at_a_time():
    changing = diffusers.StableDiffusionPAGPipeline
    refused("max_in_flight=2: StableDiffusionPAGPipeline sets attention processors", check_in_flight, changing, 2)
    check_in_flight(changing, 1)
    for other in (diffusers.StableDiffusionPipeline, diffusers.FluxPipeline):
        check_in_flight(other, 2)


def test_stages_and_partition(monkeypatch):
    refused("more than the 12 blocks", check, spec(ranks=13))
    refused(
        "layer_partition 3,4 adds up to 7, but the transformer has 12", check, spec(ranks=2, layer_partition=(3, 4))
    )
    for wrong in [(1,), (0, 12), (-1, 13), (1, 2, 3), ("a", 2)]:
        refused("layer_partition", lambda wrong=wrong: spec(ranks=2, layer_partition=wrong))
    for variable in ("VLLM_PP_LAYER_PARTITION", "SHARDIT_PP_LAYER_PARTITION"):
        for wrong in ("a,b", "12", "0,12", "13,-1", "3,4", "1,2,9", "6;6"):
            monkeypatch.setenv(variable, wrong)
            refused(variable, check, spec(ranks=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_device_and_dtype():
    refused("more ranks than cuda devices.* 0 visible; leave device out, or use cpu", check, spec(device="cuda"))
    refused("device 'meta' is not supported", check, spec(device="meta"))
    refused("dtype 'float8' is not known", setting, "float8")


# In the user's process and in the ranks: one Omni for all of these.


@pytest.fixture(scope="module")
def flux():
    with started("flux", max_in_flight=3) as omni:
        yield omni


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([], {}, "the list of prompts is empty"),
        ("a", {"prompt": "b"}, "given twice"),
        (["a", "b"], {"params": [OmniDiffusionSamplingParams()]}, "params has 1 entries for 2 prompts"),
        ("a", {"num_frames": 5}, "FluxPipeline takes no num_frames; it takes: prompt,"),
        ("a", {"guidence_scale": 5}, "did you mean 'guidance_scale'.*; it takes:"),
        ("a", {"num_inference_steps": -1}, "num_inference_steps must be a whole number"),
        ("a", {"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ("a", {"seed": -2}, "seed must be a whole number from"),
        ("a", {"seed": 2**63}, "seed must be a whole number from"),
        (["a", {"prompt": "b", "height": 0}], {}, r"prompts\[1\]: height must be"),
        ("a", {"pil_image": "no.png"}, "takes no image"),
        ("a", {"height": 1, "width": 1}, "width must be at least 16"),
    ],
)
def test_refused_before_it_is_sent(flux, prompts, options, says):
    refused(says, flux.generate, prompts, **options)


BAD = {
    "first block": {"prompt_embeds": torch.zeros(1, 48, 7), "pooled_prompt_embeds": torch.zeros(1, 64)},
    "prologue": {"prompt_embeds": torch.zeros(1, 48, 64), "pooled_prompt_embeds": torch.zeros(1, 7)},
    "latents": {"prompt": "x", "latents": torch.zeros(1, 3, 3)},
    "second branch": {
        "prompt": "x",
        "true_cfg_scale": 2.0,
        "negative_prompt_embeds": torch.zeros(1, 48, 7),
        "negative_pooled_prompt_embeds": torch.zeros(1, 64),
    },
    "check of the pipeline": {
        "prompt": "x",
        "prompt_embeds": torch.zeros(1, 48, 64),
        "pooled_prompt_embeds": torch.zeros(1, 64),
    },
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_bad_request_among_good_ones(flux, bad, place):
    """All three are in flight together; the bad one fails in both of two calls, the others are as if alone."""
    goods = [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2, "width": 96}]
    requests = [*goods[:place], {**BAD[bad], "seed": 3}, *goods[place:]]
    ranks = flux._ranks.placement.fork_server.pids
    outputs = flux.generate(requests, OmniDiffusionSamplingParams(**FLUX))
    failed = outputs.pop(place)
    assert failed.error
    assert "\n" not in failed.error
    given = {name: tuple(value.shape) for name, value in BAD[bad].items() if isinstance(value, torch.Tensor)}
    assert all(f"{name} {shape}" in failed.error for name, shape in given.items())
    assert (failed.seed, list(failed.images)) == (3, [])
    for good, output in zip(goods, outputs, strict=True):
        assert output.error is None
        assert same(by_diffusers("flux", **good), output.images)
    assert flux._ranks.placement.fork_server.pids == ranks


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_a_file_says_enough_to_make_it_again(flux, tmp_path, suffix):
    (output,) = flux.generate("a cat", seed=7, width=96, height=64, num_inference_steps=2, max_sequence_length=48)
    (path,) = output.save(tmp_path / f"cat{suffix}")
    flags = GenerateFlags(from_file=path).completed()
    assert (flags.model, flags.seed, flags.num_inference_steps) == ("tiny/flux", 7, 2)
    assert "guidance_scale" in read_record(path)  # a default
    (again,) = flux.generate(flags.prompts(), flags.sampling_params())
    assert same(again.images, output.images)
    other = GenerateFlags(from_file=path, seed=8, extra=["max_sequence_length=40"]).completed()
    assert (other.seed, other.sampling_params().max_sequence_length) == (8, 40)


def test_rounded_sizes_are_noted(flux):
    (output,) = flux.generate("a", width=100, height=65, seed=1, num_inference_steps=1, max_sequence_length=48)
    assert output.notes[:2] == [
        "width: asked for 100, the pipeline made 96",
        "height: asked for 65, the pipeline made 64",
    ]
    call = {"width": 100, "height": 65, "num_inference_steps": 1}
    assert same(by_diffusers("flux", 1, prompt="a", **call), output.images)


def test_output_that_cannot_be_saved(flux, tmp_path):
    (output,) = flux.generate("a", OmniDiffusionSamplingParams(**FLUX))
    refused("does not exist", output.save, tmp_path / "missing" / "a.png")
    refused("does not fit an image", output.save, tmp_path / "a.mp4")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        refused("cannot be written.*; free space", output.save, tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


# On the command line.


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--model=tiny/nope --output=a.png", "no tiny model 'nope'"),
        ("--model=tiny/flux --output=a.png --num-inference-steps=-1", "num_inference_steps must be"),
        ("--model=tiny/flux --output=a.png --guidance-scale=nan", "guidance_scale must be a finite number"),
        ("--model=tiny/flux --output=missing/a.png", "output folder missing does not exist"),
        ("--model=tiny/flux --output=a.txt", "does not fit an image"),
        ("--model=tiny/qwen-image-edit --output=a.png --image=/dev/null", "image /dev/null cannot be read"),
        ("--model=tiny/flux --output=a.png --layer-partition=a", "'a' is not a number"),
        ("--model=tiny/flux --output=a.png --pipeline-parallel-size=13", "more than the 12 blocks"),
        ("--model=tiny/flux --output=a.mp4", "does not fit an image"),
    ],
)
def test_command_line(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = fork_servers()
    steps = [] if "--num-inference-steps" in flags else ["--num-inference-steps=1"]
    assert main(["generate", "--prompt=x", *steps, *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []
    assert fork_servers() == before


def test_fork_servers_are_found(flux):
    assert fork_servers()  # that none is left says nothing unless one is found while it runs


def fork_servers() -> set[str]:
    """Children of this process that start ranks."""
    found = set()
    for pid in pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            if FORK_SERVER.encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def test_request_that_fails_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SHARDIT_PROGRESS", "0")
    flags = ["--model=tiny/wan2.2-t2v", "--prompt=x", "--width=100", f"--output={tmp_path / 'a.mp4'}"]
    assert main(["generate", *flags]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: width must be a multiple of 16, got 100; use 96 or 112"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "P"])
def test_pictures_of_any_mode(mode, tmp_path):
    """The picture reaches the pipeline upright and in RGB."""
    from shardit.diffusion.request.build import build_requests
    from shardit.diffusion.request.pipeline_signature import PipelineSignature

    picture = Image.effect_noise((40, 20), 50).convert("RGB").convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "L") else "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    picture.save(path, exif=exif)
    takes = PipelineSignature("ImageToVideoPipeline", ("prompt", "image"))
    (request,) = build_requests(
        "a", None, prompt=None, negative_prompt=None, pil_image=str(path), overrides={}, takes=takes
    )
    assert request.images[0].mode == "RGB"
    assert request.images[0].size == (20, 40)
