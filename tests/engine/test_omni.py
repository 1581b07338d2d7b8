"""End to end: the real `Omni`, command line and scripts on tiny models, against plain diffusers."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import av
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from bench.served import children
from shardit import InputError, Omni, OmniDiffusionSamplingParams, RankError
from shardit.cli import main
from shardit.diffusion.output.collect import NOT_NUMBERS
from shardit.models import tiny
from tests.engine.test_launch import assert_gone, family
from tests.support.paths import EXAMPLES
from tests.support.real_omni import by_diffusers, plain, same, started

FLUX = tiny.defaults("flux")
OFFLINE = EXAMPLES / "offline_inference"


@pytest.fixture(scope="module")
def flux():
    with started("flux", max_in_flight=3) as omni:
        yield omni


def params(**chosen) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(**{**FLUX, **chosen})


def test_one_dict_and_params(tmp_path):
    call = tiny.defaults("wan2.2-t2v")
    with started("wan2.2-t2v") as omni:
        outputs = omni.generate(
            {"prompt": "A cinematic drone shot over snowy mountains", "seed": -1},
            sampling_params_list=[OmniDiffusionSamplingParams(**call)],
        )
    (output,) = outputs
    assert output.error is None
    assert not output.images
    assert len(output.frames) == 1
    expected = by_diffusers("wan2.2-t2v", output.seed, prompt="A cinematic drone shot over snowy mountains")
    assert same(expected, output.frames[0])
    assert len(output.peak_bytes) == 2
    assert min(output.peak_bytes) > 2**20
    (path,) = output.save(tmp_path / "mountains.mp4")
    with av.open(str(path)) as video:
        record = json.loads(video.metadata["comment"])
        assert sum(1 for _ in video.decode(video=0)) == len(expected)
    assert (record["seed"], record["num_frames"]) == (output.seed, call["num_frames"])


def test_keyword_form(flux, tmp_path):
    (output,) = flux.generate(prompt="a cat reading a book", **{**FLUX, "width": 96, "height": 96})
    assert same(by_diffusers("flux", output.seed, prompt="a cat reading a book", width=96, height=96), output.images)
    (path,) = output.save(tmp_path / "cat.png")
    (again,) = flux.generate(prompt="a cat reading a book", seed=output.seed, **{**FLUX, "width": 96, "height": 96})
    assert same(list(output.images), again.images)
    text = " ".join(str(value) for value in Image.open(path).info.values())
    assert str(output.seed) in text
    assert "a cat reading a book" in text


def test_image_and_negative_prompt():
    call = tiny.defaults("qwen-image-edit")
    image = Image.effect_noise((128, 128), 60).convert("RGB")
    words = {"prompt": "turn this cat to a dog", "negative_prompt": "blurry", "true_cfg_scale": 4.0}
    with started("qwen-image-edit") as omni:
        (output,) = omni.generate(**words, pil_image=image, **{k: v for k, v in call.items() if k not in words})
    assert output.error is None
    assert same(by_diffusers("qwen-image-edit", output.seed, image=image, **words), output.images)


def test_several_requests_with_seeds_and_overrides(flux):
    prompts = [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2, "width": 96, "num_inference_steps": 2}, "c"]
    outputs = flux.generate([*prompts, {"prompt": "d", "num_outputs_per_prompt": 2}], params(seed=7))
    assert [output.seed for output in outputs] == [1, 2, 7, 7]
    assert [output.prompt for output in outputs] == ["a", "b", "c", "d"]
    assert same(by_diffusers("flux", 1, prompt="a"), outputs[0].images)
    assert same(by_diffusers("flux", 2, prompt="b", width=96, num_inference_steps=2), outputs[1].images)
    assert same(by_diffusers("flux", 7, prompt="c"), outputs[2].images)
    close = np.stack([np.asarray(i, float) for i in by_diffusers("flux", 7, prompt="d", num_images_per_prompt=2)])
    # A batch is split by sample, which may round otherwise.
    assert np.abs(close - np.stack([np.asarray(i, float) for i in outputs[3].images])).max() <= 1


def test_pictures_of_no_numbers_are_noted(flux):
    changes = {"negative_prompt": "x", "true_cfg_scale": 3e38}
    broken, good = flux.generate([{"prompt": "a", **changes}, {"prompt": "a"}], params(seed=1))
    assert broken.notes == [NOT_NUMBERS]
    assert good.notes == []


def test_arguments_without_effect_are_noted(flux):
    (output,) = flux.generate("a", params(seed=1, true_cfg_scale=3.0, joint_attention_kwargs={"scale": 0.5}))
    assert output.notes == [
        "true_cfg_scale has no effect without negative_prompt",
        "joint_attention_kwargs: scale has no effect without a LoRA",
    ]


def test_several_params(flux):
    outputs = flux.generate(["a", "b"], [params(seed=1), params(seed=2, guidance_scale=1.0)])
    assert same(by_diffusers("flux", 1, prompt="a"), outputs[0].images)
    assert same(by_diffusers("flux", 2, prompt="b", guidance_scale=1.0), outputs[1].images)


def test_a_dtype_for_each_component():
    chosen = {"transformer": torch.bfloat16, "transformer_2": torch.bfloat16, "default": torch.float32}
    plain = WanPipeline.from_pretrained(str(tiny.resolve("tiny/wan2.2-t2v")), torch_dtype=chosen)
    call = {**tiny.defaults("wan2.2-t2v"), "prompt": "a", "num_inference_steps": 2, "output_type": "pil"}
    with started("wan2.2-t2v", dtype=chosen) as omni:
        (output,) = omni.generate({**call, "seed": 1})
    frames = plain(**call, generator=torch.Generator("cpu").manual_seed(1)).frames[0]
    assert output.frames is not None
    assert same(frames, output.frames[0])


def test_a_dtype_of_no_component():
    text = "no component 'unet' with weights; it has text_encoder, "
    with pytest.raises(InputError, match=text):
        Omni("tiny/flux", dtype={"unet": "bfloat16"})


@pytest.mark.full
def test_bfloat16_four_in_flight():
    calls = [
        {"prompt": "a", "seed": 1},
        {"prompt": "b", "seed": 2, "width": 96, "num_inference_steps": 2},
        {"prompt": "c", "seed": 3, "guidance_scale": 1.0, "num_inference_steps": 4},
        {"prompt": "d", "seed": 4, "negative_prompt": "blurry", "true_cfg_scale": 2.0},
        {"prompt": "e", "seed": 5, "height": 64},
    ]
    with started("flux", dtype="bfloat16", max_in_flight=4) as omni:
        outputs = omni.generate(calls, params())
    for call, output in zip(calls, outputs, strict=True):
        assert output.error is None
        assert same(by_diffusers("flux", dtype="bfloat16", **call), output.images)


@pytest.mark.parametrize("prompt", ["kill:1:0", "kill:0:2", "kill:1:3", "raise:1:2", "raise:0:0"])
def test_fault_on_one_rank(flux, prompt):
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        flux.generate([{"prompt": "a", "seed": 1}, {"prompt": prompt, "seed": 2}], params())
    assert time.monotonic() - begin < 10 + 5  # five for a busy machine
    assert caught.value.rank == int(prompt.split(":")[1])
    assert ("SIGKILL" in caught.value.reason) == prompt.startswith("kill")
    if prompt.startswith("raise"):
        assert "on one rank only" in caught.value.reason
    (output,) = flux.generate({"prompt": "a", "seed": 1}, params())
    assert same(by_diffusers("flux", 1, prompt="a"), output.images)


def test_killed_from_outside(flux):
    flux.generate("a", params())
    ranks = flux._ranks.placement.fork_server.pids
    threading.Timer(0.2, os.kill, (ranks[1], signal.SIGKILL)).start()
    with pytest.raises(RankError, match="SIGKILL"):
        flux.generate([{"prompt": "a", "seed": 1}] * 12, params(num_inference_steps=20))
    (output,) = flux.generate({"prompt": "a", "seed": 1}, params())
    assert same(by_diffusers("flux", 1, prompt="a"), output.images)


def sizes(count: int) -> list[dict]:
    """Requests of changing size."""
    grid = [(32 + 16 * (i % 5), 32 + 16 * (i // 5 % 4)) for i in range(count)]
    return [{"prompt": f"{i} plans?", "seed": i, "width": w, "height": h} for i, (w, h) in enumerate(grid)]


def plans_of(output) -> int:
    """How many plans the session keeps, see real_session.py."""
    return int(output.metrics["warnings"][-1].split()[1])


def changing(omni, count: int) -> tuple[list, list[int]]:
    """Outputs of many requests, and the largest resident memory of a rank in each call of 20."""
    outputs, memory = [], []
    for first in range(0, count, 20):
        made = omni.generate(sizes(count)[first : first + 20], params(num_inference_steps=1))
        outputs += made
        memory.append(max(made[0].peak_bytes))
    return outputs, memory


def test_more_sizes_than_are_kept(flux):
    (before,) = flux.generate("plans?", params(num_inference_steps=1, width=32, height=32))
    requests = [{**size, "prompt": "plans? keep:4"} for size in sizes(12)]
    outputs = flux.generate([*requests, requests[0]], params(num_inference_steps=1))
    assert [output.error for output in outputs] == [None] * 13
    assert plans_of(outputs[-1]) <= max(4, plans_of(before))
    for request, output in list(zip([*requests, requests[0]], outputs, strict=True))[::6]:
        assert same(by_diffusers("flux", num_inference_steps=1, **request), output.images)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_hundred_requests_of_changing_size():
    with started("flux", max_in_flight=2) as omni:
        outputs, memory = changing(omni, 200)
    assert [output.error for output in outputs] == [None] * 200
    assert max(plans_of(output) for output in outputs) <= 64
    assert memory[-1] < memory[1] + 40 * 2**20, memory


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "generate --model tiny/wan2.2-t2v --prompt=two_cats --output out.mp4 --pipeline-parallel-size 2 --seed=3"
    assert main([*flags.split(), "--num-inference-steps=2", "--num-frames", "6"]) == 0
    out, err = capsys.readouterr()
    assert "error" not in err
    assert "note: num_frames: asked for 6, the pipeline made 5" in out
    assert re.search(r"seed 3; .* peak memory: rank 0 \S+ GiB, rank 1 \S+ GiB", out)
    assert out.splitlines()[-1] == "out.mp4"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_tiny_and_inspect(tmp_path, capsys):
    assert main(["tiny", "flux", str(tmp_path / "flux")]) == 0
    capsys.readouterr()
    assert main(["inspect", f"--model={tmp_path / 'flux'}", "--pipeline-parallel-size", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1, 2, 3]
    assert {*document} == {"ranks", "chunks", "bytes", "notes"}
    held = [rank["components"]["transformer"]["blocks"] for rank in document["ranks"]]
    assert sorted(block for blocks in held for block in blocks) == list(range(12))
    total = sum(part["parameters"] for rank in document["ranks"] for part in rank["components"].values())
    modules = (plain("flux").transformer, plain("flux").vae, plain("flux").text_encoder, plain("flux").text_encoder_2)
    assert total >= sum(p.numel() for module in modules for p in module.parameters())


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SHARDIT_PROGRESS": "0"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment, **options
    )


@pytest.mark.parametrize(
    ("script", "model"),
    [
        pytest.param("text_to_image", "qwen-image", marks=pytest.mark.full),
        ("text_to_video", "wan2.2-ti2v"),
        pytest.param("image_to_video", "wan2.2-i2v", marks=pytest.mark.full),
    ],
)
def test_example_scripts(tmp_path, script, model):
    flags = [f"--model=tiny/{model}", "--width=64", "--height=64", "--num-inference-steps=2", "--prompt=a cat"]
    flags += [
        "--pipeline-parallel-size=2",
        f"--output={tmp_path / 'out'}{'.png' if 'image' in script[-5:] else '.mp4'}",
    ]
    if script == "image_to_video":
        Image.effect_noise((64, 64), 50).save(tmp_path / "in.png")
        flags.append(f"--image={tmp_path / 'in.png'}")
    done = run([str(OFFLINE / script / f"{script}.py"), *flags])
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.splitlines()[-1]).stat().st_size > 100


def test_interrupted_command_line(tmp_path):
    command = "-m shardit generate --model tiny/flux --prompt x --pipeline-parallel-size 2 --num-inference-steps 5000"
    process = subprocess.Popen(
        [sys.executable, *command.split(), f"--output={tmp_path / 'o.png'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "SHARDIT_PROGRESS": "1"},
    )
    assert process.stderr is not None
    seen = ""
    while "1/5000" not in seen:  # it runs
        seen += process.stderr.read(1)
        assert process.poll() is None
    members = [member for fork_server in children(process.pid) for member in family(fork_server)]
    assert len(members) >= 3  # a fork server and two ranks
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "error" not in err
    assert "Traceback" not in err
    assert_gone(members)
    assert list(tmp_path.iterdir()) == []


UNDER_TORCHRUN = """
import os, sys
import numpy as np, torch
import shardit
from shardit import DiffusionParallelConfig, InputError, Omni, OmniDiffusionSamplingParams
from shardit.models import tiny
rank, folder = int(os.environ["RANK"]), sys.argv[1]
config, call = DiffusionParallelConfig(pipeline_parallel_size=2), tiny.defaults("flux")
pipe = shardit.load("tiny/flux", config)
loaded = pipe("a", generator=torch.Generator("cpu").manual_seed(1), **call).images[0]
pipe = shardit.parallelize(tiny.load_plain(tiny.resolve("tiny/flux")), config)
cut = pipe("a", generator=torch.Generator("cpu").manual_seed(1), **call).images[0]
assert np.array_equal(np.asarray(loaded), np.asarray(cut))
loaded.save(f"{folder}/load-{rank}.png")
params = OmniDiffusionSamplingParams(**call)


class Unread:
    def __getattribute__(self, name):
        raise KeyError("cannot be read")


with Omni("tiny/flux", parallel_config=config, max_in_flight=2) as omni:
    try:
        omni.generate("a", nonsense=1) if rank == 0 else omni.generate("a")  # what rank 0 says counts
    except InputError as error:
        assert "takes no 'nonsense'" in str(error), error
    else:
        raise AssertionError("not refused")
    try:
        omni.generate({"prompt": "a", "image": Unread()})
    except shardit.RankError as error:
        assert "rank 0 failed: KeyError: 'cannot be read'" in str(error), error
    else:
        raise AssertionError("not refused")
    outputs = omni.generate([{"prompt": "a", "seed": 1}, "b"], params)
if rank == 0:
    assert [output.error for output in outputs] == [None, None]
    assert len(outputs[0].peak_bytes) == 2
    outputs[0].save(f"{folder}/omni-0.png")
else:
    assert outputs == []
"""


def torchrun(count: int, *command: str) -> subprocess.CompletedProcess:
    return run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *command])


def test_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(UNDER_TORCHRUN)
    done = torchrun(2, str(tmp_path / "script.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = by_diffusers("flux", 1, prompt="a")
    for name in ("load-0", "load-1", "omni-0"):
        assert same(expected, [Image.open(tmp_path / f"{name}.png")])


@pytest.mark.full
def test_command_line_under_torchrun(tmp_path):
    flags = ["--model=tiny/flux", "--prompt=a", "--seed=1", "--pipeline-parallel-size=2", f"--output={tmp_path}/a.png"]
    done = torchrun(2, "-m", "shardit", "generate", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 1;") == 1
    assert same(by_diffusers("flux", 1, prompt="a"), [Image.open(tmp_path / "a.png")])
    done = torchrun(3, "-m", "shardit", "generate", *flags)
    assert done.returncode != 0
    assert done.stderr.count("error: torchrun has started 3 ranks, but parallel_config needs 2") == 1


COPIES = """
import os

from shardit import DiffusionParallelConfig, Omni

config = DiffusionParallelConfig(data_parallel_size=2)
with Omni("tiny/flux", parallel_config=config) as omni:
    call = {"height": 128, "width": 128, "num_inference_steps": 2, "max_sequence_length": 32}
    outputs = omni.generate([{"prompt": text, "seed": 1} for text in ("a", "b", "a")], **call)
found = [(output.prompt, output.error) for output in outputs]
assert found == ([("a", None), ("b", None), ("a", None)] if os.environ["RANK"] == "0" else []), found
"""


@pytest.mark.full
def test_copies_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(COPIES)
    done = torchrun(2, str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stderr
