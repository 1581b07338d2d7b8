"""Options for loading a model: variants, schedulers, LoRA, VAEs in tiles, against plain diffusers; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardit
from shardit.cli import main
from shardit.config import DiffusionParallelConfig
from shardit.diffusion.loading.schedulers import changed_scheduler
from shardit.diffusion.loading.start_options import load_loras
from shardit.diffusion.loading.timesteps import arguments_in
from shardit.engine.inspect import inspect_model
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import check
from shardit.errors import InputError
from shardit.loading.weight_names import choose
from shardit.settings.lora import Lora, parse_lora
from shardit.settings.model_options import (
    OPTION_NAMES,
    WHOLE,
    described,
    model_options,
    split_model,
)
from tests.pipelines.entry import entries
from tests.support.brought import TARGETS, mapped, pipeline, run, write_lora
from tests.support.loading import loaded
from tests.support.ranks import run_ranks
from tests.support.real_omni import started

KARRAS = {"use_karras_sigmas": True, "shift": 2.0, "use_dynamic_shifting": False}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lo:ras")
    for seed in (5, 6):
        write_lora("flux", folder / f"flux-{seed}", seed)
    ask_for_dropout(folder / "flux-6" / "pytorch_lora_weights.safetensors")
    fits = load_file(folder / "flux-5" / "pytorch_lora_weights.safetensors")
    save_file({key: torch.cat([one, one], 1) for key, one in fits.items()}, folder / "flux-5" / "wide.safetensors")
    return [str(folder / "flux-5" / "pytorch_lora_weights.safetensors"), str(folder / "flux-6")]


def ask_for_dropout(file: Path) -> None:
    """Describe the adapter as its trainer had it: diffusers then leaves dropout on when it loads the file."""
    described = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.lora_dropout": 0.3}
    described["transformer.target_modules"] = TARGETS["flux"][:2]
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": json.dumps(described)})


def plain_with_loras(loras: list[str]) -> Any:
    pipe = mapped("flux")
    for number, path in enumerate(loras):
        pipe.load_lora_weights(path, adapter_name=f"lora_{number}")
    pipe.set_adapters(["lora_0", "lora_1"], [0.5, 1.0])
    assert any(isinstance(part, torch.nn.Dropout) and part.training for part in pipe.transformer.modules())
    pipe.transformer.eval()
    return pipe


def two_ranks(rank: int, count: int, method: str, loras: list[str]) -> list[torch.Tensor]:
    import os

    import torch.distributed as dist

    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    os.environ.update(WORLD_SIZE=str(count), RANK=str(rank))
    made = []
    for degrees in ({"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}):
        pipe = shardit.load("tiny/flux", dtype="float32", lora=[f"{loras[0]}:0.5", loras[1]], **degrees)
        made.append(run(pipe, "flux"))
        for bad in ({"scheduler": "EulerDiscreteScheduler"}, {"lora": loras[0] + ":x"}):
            with pytest.raises(InputError):
                shardit.load("tiny/flux", **degrees, **bad)
        wide = str(Path(loras[0]).with_name("wide.safetensors"))
        with pytest.raises(InputError, match=r"wide\.safetensors cannot be loaded into FluxPipeline: .* size mismatch"):
            shardit.load("tiny/flux", dtype="float32", lora=wide, **degrees)
    return made


def test_lora_over_stages_and_tensor_ranks(loras: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    expected = run(plain_with_loras(loras), "flux")
    assert not torch.equal(expected, run(pipeline("flux"), "flux"))
    for stages, slices in run_ranks(2, two_ranks, loras):
        assert torch.equal(stages, expected)
        assert (slices - expected).norm() / expected.norm() <= 1e-5
    assert "size mismatch" not in capfd.readouterr().err  # diffusers logs a line for each tensor that does not fit


def test_a_lora_of_a_text_encoder_draws_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_lora("sd3.5", tmp_path, 5, encoder=True)
    pipe = pipeline("sd3.5")
    capfd.readouterr()
    load_loras(pipe, (Lora(str(tmp_path)),))
    assert "Loading weights" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def of_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `shardit train` writes it for two experts."""
    folder = tmp_path_factory.mktemp("experts")
    write_lora("wan2.2-t2v", folder, 5)
    write_lora("wan2.2-t2v", folder / "transformer_2", 6)
    return folder


def with_experts(rank: int, count: int, method: str, folder: Path) -> list[torch.Tensor]:
    """Videos with the folder, with its parts named alone, and with those of the second expert alone."""
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    file = folder / "pytorch_lora_weights.safetensors"
    second = folder / "transformer_2" / "pytorch_lora_weights.safetensors"
    made = []
    for lora in (str(folder), [str(file), f"transformer_2={second}"], str(second.parent)):
        pipe = shardit.load("tiny/wan2.2-t2v", dtype="float32", lora=lora, pipeline_parallel_size=2)
        made.append(run(pipe, "wan2.2-t2v"))
    with pytest.raises(InputError, match="has weights for transformer_2, which this WanPipeline does not have"):
        shardit.load("tiny/wan2.2-ti2v", dtype="float32", lora=str(folder), pipeline_parallel_size=2)
    return made


def test_a_lora_of_two_experts(of_experts: Path) -> None:
    pipe = mapped("wan2.2-t2v")
    pipe.load_lora_weights(str(of_experts / "transformer_2"), adapter_name="x", load_into_transformer_2=True)
    alone = run(pipe, "wan2.2-t2v")
    pipe.load_lora_weights(str(of_experts), weight_name="pytorch_lora_weights.safetensors", adapter_name="x")
    both = run(pipe, "wan2.2-t2v")
    assert not torch.equal(alone, both)
    for made in run_ranks(2, with_experts, of_experts):
        assert [torch.equal(one, expected) for one, expected in zip(made, (both, both, alone), strict=True)] == [
            True
        ] * 3


def test_all_options_of_omni(loras: list[str], tmp_path: Path) -> None:
    pipe = plain_with_loras(loras)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **KARRAS)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    expected = run(pipe, "flux", output_type="pt", num_images_per_prompt=2)
    chosen = {"scheduler": "FlowMatchEulerDiscreteScheduler", "flow_shift": 2.0, "vae_tiling": True}
    arguments = {"use_karras_sigmas": True, "use_dynamic_shifting": False}
    adapters = [(loras[0], 0.5), loras[1]]
    with started(
        "flux", dtype="float32", scheduler_args=arguments, lora=adapters, vae_slicing=True, **chosen, max_in_flight=2
    ) as omni:
        call = {"output_type": "pt", "num_outputs_per_prompt": 2, **shardit.models.tiny.defaults("flux")}
        outputs = omni.generate(["a cat on a mat"] * 2, seed=3, **call)
    for output in outputs:
        assert output.error is None
        assert torch.equal(output.latents, expected)
    told = outputs[0].record()  # of which --from-file makes it again
    assert {name: told[name] for name in chosen} == chosen
    assert [(one["path"], one["scale"]) for one in told["lora"]] == [(loras[0], 0.5), (loras[1], 1.0)]
    assert (told["scheduler_args"], told["vae_slicing"], told["output_type"]) == (arguments, True, "pt")


def test_a_folder_with_a_variant_only(tmp_path: Path) -> None:
    pipe = pipeline("sd3.5", "float16")
    pipe.save_pretrained(str(tmp_path / "m"), variant="fp16", max_shard_size="300KB")
    names = {path.name for path in (tmp_path / "m").rglob("*fp16*")}
    assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
    assert "model.fp16.safetensors" in names
    with pytest.raises(InputError, match=r"holds only the weight variant fp16: give variant='fp16' \(--variant fp16"):
        shardit.load(tmp_path / "m")
    with pytest.raises(InputError, match="holds only the weight variant fp16"):
        check(SessionSpec(str(tmp_path / "m"), DiffusionParallelConfig(), options=model_options(variant="bf16")))
    with pytest.raises(InputError, match="variant 'fp16'; leave variant out"):
        shardit.load("tiny/flux", variant="fp16")
    assert inspect_model(tmp_path / "m", DiffusionParallelConfig(), variant="fp16")["bytes"] > 0
    ours = shardit.load(tmp_path / "m", variant="fp16", dtype="float32")
    assert torch.equal(run(ours, "sd3.5"), run(pipe.to(torch.float32), "sd3.5"))
    spec = SessionSpec(str(tmp_path / "m"), DiffusionParallelConfig(), options=model_options(variant="fp16"))
    check(spec)


@pytest.mark.parametrize("value", [0, -1.0, "3", float("inf"), float("nan"), True])
def test_a_shift_is_checked_in_both_places(value: Any) -> None:
    said = []
    for given in (
        {"flow_shift": value},
        {"scheduler_args": {"shift": value}},
        {"scheduler_args": {"flow_shift": value}},
    ):
        with pytest.raises(InputError) as caught:
            model_options(**given)
        said.append(str(caught.value).partition(" must be ")[2])
    assert len(set(said)) == 1, said
    assert model_options(scheduler_args={"shift": 2.0, "flow_shift": None}).scheduler_args["shift"] == 2.0


def test_arguments_with_which_no_step_is_a_number() -> None:
    own, cls = diffusers.EulerDiscreteScheduler(), diffusers.StableDiffusionPipeline
    said = "^scheduler_args: EulerDiscreteScheduler cannot make steps with"
    with pytest.raises(InputError, match=f"{said} beta_end=3.0: its sigmas are not finite numbers"):
        changed_scheduler(own, model_options(scheduler_args={"beta_end": 3.0}), cls)
    with pytest.raises(InputError, match=f"{said} num_train_timesteps=0"):
        changed_scheduler(own, model_options(scheduler_args={"num_train_timesteps": 0}), cls)
    assert changed_scheduler(own, model_options(scheduler_args={"beta_end": 0.02}), cls)


def test_the_file_of_a_variant() -> None:
    both = ["model.safetensors", "model.fp16.safetensors", "diffusion_pytorch_model.bf16-00001-of-00002.safetensors"]
    assert choose(both, "x", "fp16").name == "model.fp16.safetensors"
    assert choose(both, "x").name == choose(both, "x", "bf16").name == "model.safetensors"
    assert choose([*both, "model.safetensors.index.bf16.json"], "x", "bf16").sharded


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheduler": "NoScheduler"}, "diffusers has no scheduler 'NoScheduler'.*FlowMatchEulerDiscreteScheduler"),
        ({"scheduler": "FluxPipeline"}, "has no scheduler 'FluxPipeline'"),
        ({"scheduler": "DDPMScheduler"}, "DDPMScheduler cannot take the place of FlowMatchEulerDiscreteScheduler"),
        ({"scheduler_args": {"shfit": 1}}, r"takes no 'shfit' \(did you mean 'shift'\?\)"),
        ({"scheduler_args": {"use_karras_sigmas": "yes"}}, "use_karras_sigmas must be true or false"),
        ({"scheduler_args": {"shift": "3"}}, "shift must be a finite number"),
        ({"flow_shift": 3.0}, "add use_dynamic_shifting=false"),
        ({"lora": "tiny-nothing/x.safetensors"}, "lora tiny-nothing/x.safetensors does not exist"),
        ({"lora": "tiny nothing/x"}, "lora tiny nothing/x does not exist"),
        ({"lora": ("a/b", "much")}, "lora"),
        ({"scheduler_args": [1]}, "scheduler_args must be a dict"),
        ({"flow_shift": 0}, "flow_shift must be"),
        ({"vae_tiling": 1}, "vae_tiling must be True or False"),
        ({"variant": 5}, "variant must be a name"),
    ],
)
def test_refused_before_ranks_start(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        check(SessionSpec("tiny/flux", DiffusionParallelConfig(), options=model_options(**options)))
    assert "\n" not in str(caught.value)


def test_flow_matching_schedulers_are_interchangeable() -> None:
    own = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    euler = changed_scheduler(own, model_options(scheduler="FlowMatchEulerDiscreteScheduler"))
    assert euler.config.shift == 5.0
    back = changed_scheduler(euler, model_options(scheduler="UniPCMultistepScheduler", flow_shift=3.0))
    assert (back.config.flow_shift, back.config.use_flow_sigmas) == (3.0, True)
    assert back.config.prediction_type == "flow_prediction"
    with pytest.raises(InputError, match="needs flow matching"):
        changed_scheduler(own, model_options(scheduler_args={"use_flow_sigmas": False, "prediction_type": "epsilon"}))


def test_schedulers_without_arguments_of_the_pipeline() -> None:
    """Flux gives sigmas and a shift for the size, Wan only the number of steps."""
    euler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for name in ("FlowMatchHeunDiscreteScheduler", "SASolverScheduler", "HeliosScheduler", "DDIMScheduler", "Nope"):
        with pytest.raises(InputError, match=name) as refused:
            changed_scheduler(euler, model_options(scheduler=name), diffusers.FluxPipeline)
        proposed = str(refused.value).rpartition("choose among ")[2].split(", ")
        assert {"FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"} <= set(proposed)
        assert not {name, "HeliosDMDScheduler"} & set(proposed)
        assert "did you mean" not in str(refused.value)
    for name in proposed:
        made = changed_scheduler(euler, model_options(scheduler=name), diffusers.FluxPipeline)
        sigmas = {} if made.config.get("use_flow_sigmas") else {"sigmas": [1.0, 0.5]}
        made.set_timesteps(**(sigmas or {"num_inference_steps": 2}), mu=0.7)
    own = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    changed_scheduler(own, model_options(scheduler="FlowMatchHeunDiscreteScheduler"), diffusers.WanPipeline)
    changed_scheduler(euler, model_options(scheduler="UniPCMultistepScheduler"), diffusers.QwenImagePipeline)
    with pytest.raises(InputError, match="HeliosScheduler cannot take the place"):
        changed_scheduler(own, model_options(scheduler="HeliosScheduler"), diffusers.WanPipeline)
    inverse = "DPMSolverMultistepInverseScheduler"  # without set_begin_index, which WanPipeline calls
    with pytest.raises(InputError, match=f"{inverse} cannot take the place") as refused:
        changed_scheduler(own, model_options(scheduler=inverse), diffusers.WanPipeline)
    assert inverse not in str(refused.value).rpartition("choose among ")[2]
    changed_scheduler(own, model_options(scheduler=inverse), diffusers.SanaVideoPipeline)


def test_methods_of_a_scheduler_that_every_call_uses() -> None:
    source = """
def __call__(self):
    retrieve_timesteps(self.scheduler)
    if self.scheduler.may():
        self.scheduler.sometimes()
    hasattr(self.scheduler, "x") and self.scheduler.x()
    with self.bar():
        for t in self.scheduler.timesteps:
            a = self.scheduler.step(self.scheduler.scaled(t))[0]
    other.scheduler.not_ours()
"""
    assert arguments_in(source).methods == ("scaled", "step")


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_schedulers_of_recipes_as_in_diffusers(name: str, tmp_path: Path) -> None:
    """diffusers does not list them as compatible with any other."""
    torch.manual_seed(0)
    entry = entries()["StableDiffusionPipeline"]
    entry.build().save_pretrained(tmp_path)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(str(tmp_path))
    plain.scheduler = getattr(diffusers, name).from_config(plain.scheduler.config)
    pipe = loaded(tmp_path, options=model_options(scheduler=name))
    assert (type(pipe.scheduler), pipe.scheduler.config) == (type(plain.scheduler), plain.scheduler.config)
    call = {**entry.call(), "output_type": "np"}
    mine, theirs = (one(**call, generator=torch.Generator().manual_seed(5)).images for one in (pipe, plain))
    assert (mine == theirs).all()


@pytest.mark.parametrize(
    "name",
    ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
     "RePaintScheduler", "UnCLIPScheduler", "DDPMWuerstchenScheduler", "FlowMatchLCMScheduler"],
)  # fmt: skip
def test_schedulers_of_other_noise_or_direction_are_refused(name: str) -> None:
    # Few time steps: to name what can be chosen, every class is tried, and some compute long for each of them.
    own = diffusers.DDIMScheduler(num_train_timesteps=100, beta_schedule="scaled_linear", beta_end=0.012)
    with pytest.raises(InputError, match=f"{name} cannot take the place of DDIMScheduler"):
        changed_scheduler(own, model_options(scheduler=name), diffusers.StableDiffusionPipeline)


def test_schedulers_of_other_steps_are_refused() -> None:
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(InputError, match="TCDScheduler cannot take the place of DDPMScheduler"):
        changed_scheduler(learned, model_options(scheduler="TCDScheduler"), diffusers.StableDiffusionPipeline)
    with pytest.raises(InputError, match="LCMScheduler cannot take the place of RePaintScheduler"):
        changed_scheduler(diffusers.RePaintScheduler(), model_options(scheduler="LCMScheduler"))


def test_schedulers_of_noise_models() -> None:
    own = diffusers.DDIMScheduler(num_train_timesteps=100, beta_end=0.5)
    made = changed_scheduler(own, model_options(scheduler="EulerDiscreteScheduler", scheduler_args={"beta_start": 0.1}))
    assert (type(made).__name__, made.config.beta_end, made.config.beta_start) == ("EulerDiscreteScheduler", 0.5, 0.1)
    for name in ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteSchedulr"):
        with pytest.raises(InputError, match=r"choose among.*DDIMScheduler"):
            changed_scheduler(own, model_options(scheduler=name))
    with pytest.raises(InputError, match=r"has no shift|no effect"):
        changed_scheduler(own, model_options(flow_shift=2.0))
    with pytest.raises(InputError, match="has no scheduler"):
        changed_scheduler(None, model_options(scheduler="EulerDiscreteScheduler"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", ("a/b", 1.0)),
        ("a/b:0.5", ("a/b", 0.5)),
        ("a:b/c", ("a:b/c", 1.0)),
        ("a:b/c:-2", ("a:b/c", -2.0)),
        ("c:/x.safetensors", ("c:/x.safetensors", 1.0)),
    ],
)
def test_path_and_scale_of_a_lora(text: str, expected: tuple[str, float]) -> None:
    assert parse_lora(text) == expected


def test_a_lora_of_another_model_is_refused(loras: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(InputError, match=r"lora .*other\.safetensors"):
        shardit.load("tiny/flux", lora=tmp_path / "other.safetensors")
    lora = load_file(loras[0])
    first = next(name for name in lora if "lora_B" in name)
    save_file({**lora, first: lora[first][:-1].contiguous()}, str(tmp_path / "shape.safetensors"))
    with pytest.raises(InputError, match=r"lora .*shape\.safetensors .*FluxTransformer2DModel: size mismatch for "):
        shardit.load("tiny/flux", lora=tmp_path / "shape.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"lora .*empty\.safetensors"):
        shardit.load("tiny/flux", lora=tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="takes no LoRA"):
        check(SessionSpec("tiny/longcat-image-edit", DiffusionParallelConfig(), options=model_options(lora=loras[0])))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        model_options(lora=tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["flow_shift", "shift"])
def test_a_shift_that_is_given_twice(name: str) -> None:
    with pytest.raises(InputError, match=f"as flow_shift 3 and in scheduler_args as {name} 4; give one"):
        model_options(flow_shift=3, scheduler_args={name: 4})
    assert model_options(flow_shift=3, scheduler_args={name: 3.0}).flow_shift == 3


def test_a_file_of_the_model_that_is_given_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").touch()
    options = model_options(single_files={WHOLE: tmp_path / "one.safetensors"})
    with pytest.raises(
        InputError, match=r"as model .*two\.safetensors and in single_files as .*one\.safetensors; give one"
    ):
        split_model(tmp_path / "two.safetensors", "tiny/flux", options)
    assert split_model(tmp_path / "one.safetensors", "tiny/flux", options) == ("tiny/flux", options)


@pytest.mark.parametrize("more", [{}, {"weight_name": "x.safetensors"}])
def test_a_lora_of_a_hub_that_is_away(monkeypatch: pytest.MonkeyPatch, more: dict[str, str]) -> None:
    """One line of ours, whatever the client of huggingface_hub raises and diffusers makes of it."""
    from huggingface_hub import constants, errors

    def away(*_: Any, **__: Any) -> Any:
        raise errors.LocalEntryNotFoundError("nothing") if more else ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("diffusers.loaders.lora_base.model_info", away)
    monkeypatch.setattr("diffusers.utils.hub_utils.hf_hub_download", away)
    text = f"cannot reach {constants.ENDPOINT} for lora foo/bar: check the network"
    with pytest.raises(InputError, match=text):
        shardit.load("tiny/flux", lora={"path": "foo/bar", **more})


def test_options_of_the_command_line_and_the_server(loras: list[str], capsys: pytest.CaptureFixture) -> None:
    from shardit.flags import GenerateFlags
    from shardit.server.flags import ServeFlags
    from shardit.server.placement.torchrun_env import flags_of

    flags: dict[str, Any] = {
        "scheduler": "X", "scheduler_arg": ["use_karras_sigmas=true"], "flow_shift": 3.0, "variant": "fp16",
        "lora": [f"{loras[0]}:0.5", loras[1]], "vae_tiling": True,
    }  # fmt: skip
    arguments = GenerateFlags(model="m", prompt="p", **flags).omni_arguments()
    served = ServeFlags(model="m", **flags).options()
    assert served.loading.lora == arguments["lora"] == (Lora(loras[0], 0.5), Lora(loras[1]))
    assert served.loading.scheduler_args == arguments["scheduler_args"] == {"use_karras_sigmas": True}
    assert (arguments["variant"], arguments["vae_tiling"], arguments["flow_shift"]) == ("fp16", True, 3.0)
    assert flags_of(served)["scheduler"] == "X"
    assert described(served.loading).startswith("variant=fp16, scheduler=X")
    assert described(model_options()) == ""
    assert model_options(**{name: arguments[name] for name in OPTION_NAMES if name in arguments}) == served.loading
    assert main(["generate", "--model=tiny/flux", "--prompt=a", "--scheduler-arg=shift"]) == 2
    assert "--scheduler-arg must be name=value" in capsys.readouterr().err


def test_the_output_is_no_file_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Numbers of images are written as safetensors, too, and would replace the weights that they were made with."""
    file = tmp_path / "weights.safetensors"
    file.touch()
    base = ["generate", "--model=tiny/flux", "--prompt=a", f"--output={file}"]
    for flag in (f"--lora={file}:0.5", f"--single-file=transformer={file}"):
        assert main([*base, flag]) == 2
        assert "weights.safetensors is a file of the model or a LoRA; choose another name" in capsys.readouterr().err
    assert main(["generate", f"--model={file}", "--config=tiny/flux", *base[2:]]) == 2
    assert "is a file of the model or a LoRA" in capsys.readouterr().err
