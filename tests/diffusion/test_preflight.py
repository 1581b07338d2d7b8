"""Mistakes that do not depend on the weights are found before torch is imported."""

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shardit.config import DiffusionParallelConfig
from shardit.core.modules.block_names import count_blocks
from shardit.core.modules.blocks import find_blocks
from shardit.diffusion.loading import diffusers_source
from shardit.diffusion.loading.attention_backends import backend_names, package_of
from shardit.diffusion.loading.diffusers_source import refused_without
from shardit.diffusion.loading.required_packages import missing, missing_by_name
from shardit.diffusion.preflight import preflight
from shardit.diffusion.preflight.static_signature import static_signature, static_signatures_of_model
from shardit.diffusion.request.build import build_requests
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.size_multiples import least_sides, size_multiples
from shardit.errors import InputError
from shardit.loading.index import component_class, components, pipeline_class
from shardit.models import tiny
from shardit.server.http.schema.errors import ApiError
from shardit.server.http.submit.resolve import arguments, pipeline_names
from shardit.server.options import ServeOptions
from shardit.settings.model_options import model_options
from tests.support.light import light_commands

GENERATE = ["generate", "--prompt", "a", "--model"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([*GENERATE, "tiny/flux", "--output", "x.gif"], "use an extension among"),
        ([*GENERATE, "tiny/flux", "--output", "x.mp4"], "does not fit an image"),
        ([*GENERATE, "tiny/flux", "--output", "nowhere/x.png"], "does not exist"),
        ([*GENERATE, "tiny/flux", "--num-frames", "9"], "takes no num_frames"),
        ([*GENERATE, "tiny/flux", "--extra", "sed=1"], "takes no 'sed' (did you mean 'seed'?)"),
        ([*GENERATE, "tiny/flux", "--extra", "latents=x.pt"], "latents must be a tensor, got 'x.pt'"),
        ([*GENERATE, "tiny/flux", "--height", "0"], "height must be a whole number"),
        ([*GENERATE, "tiny/wan2.2-i2v"], "needs an image"),
        ([*GENERATE, "tiny/wan2.2-t2v", "--extra", "num_frames=1000000"], "num_frames is 1000000 frames, the limit is"),
        ([*GENERATE, "tiny/flux", "--width=100000", "--height=9999"], "width x height is 999900000 pixels, the limit"),
        ([*GENERATE, "tiny/flux", "--num-inference-steps=1000000"], "num_inference_steps is 1000000 steps, the limit"),
        (
            [*GENERATE, "tiny/flux", "--flow-shift=3", "--scheduler-arg=shift=4"],
            "as flow_shift 3.0 and in scheduler_args",
        ),
        ([*GENERATE, "tiny/fluxx"], "no tiny model 'fluxx'"),
        ([*GENERATE, "tiny/wan2.2-t2v", "--width=100"], "width must be a multiple of 16, got 100; use 96 or 112"),
        ([*GENERATE, "tiny/qwen-image", "--width=8"], "width must be at least 16, got 8"),
        ([*GENERATE, "./nowhere"], "there is no folder"),
        (["serve", "./nowhere"], "there is no folder"),
        (["serve", "tiny/fluxx"], "no tiny model 'fluxx'"),
        (["inspect", "tiny/flux", "--dtype=nope=float32"], "has no component 'nope' with weights"),
        (["inspect", "Qwen-Image", "--dtype=nope=float32"], "has no component 'nope' with weights"),
        (["inspect", "Qwen-Image", "--variant=fp16"], "there are no weight files of Qwen-Image here"),
        ([*GENERATE, "no model"], "there is no folder no model: check the path"),
        (["serve", "no model"], "there is no folder no model: check the path"),
        (["inspect", "no-model"], "there is no model 'no-model'"),
        (["inspect", "no model"], "there is no model 'no model'"),
        (["inspect", "/nope"], "there is no folder /nope: check the path"),
        (["inspect", "./nope"], "there is no folder ./nope: check the path"),
        (["inspect", "nope/"], "there is no folder nope/: check the path"),
        (["inspect", "a/b/c"], "there is no folder a/b/c: check the path"),
        (["inspect", "--model=a/b c"], "there is no folder a/b c: check the path"),
        (["inspect", ""], "no model given"),
    ],
)
def test_mistakes_are_found_without_torch(commands, tmp_path, words, text):
    done = commands.run(words, tmp_path)
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


SHADOW = "import os; open(os.environ['SHADOW'], 'w').close(); raise ModuleNotFoundError('torch', name='torch')"
"""A torch that notes that it was imported, by whatever process."""

NAMES = [
    ("SHARDIT_PP_LAYER_PARTITION=a,b", "", "'a' is not a number"),
    ("VLLM_PP_LAYER_PARTITION=1,2,3", "--pipeline-parallel-size=2", "VLLM_PP_LAYER_PARTITION has 3 entries"),
    ("OMP_NUM_THREADS=abc", "", "OMP_NUM_THREADS must be a whole number of at least 1, got 'abc'"),
    ("OMP_NUM_THREADS=0", "", "OMP_NUM_THREADS must be a whole number of at least 1, got '0'"),
    ("SHARDIT_CACHE=x.safetensors", "", "cannot write to the cache x.safetensors"),
    ("", "--attention-backend=nope", "there is no attention back end 'nope'"),
    ("", "--scheduler=Nope", "no scheduler 'Nope'; choose among DEIS"),
    ("", "--scheduler-arg=shft=1", "takes no 'shft' (did you mean 'shift'?)"),
    ("", "--scheduler=DDIMScheduler --flow-shift=3", "DDIMScheduler has no shift"),
    ("", "--scheduler=EulerDiscreteScheduler", "EulerDiscreteScheduler cannot take the place of FlowMatchEuler"),
    ("", "--flow-shift=3", "shifts by the size of the image; add use_dynamic_shifting=false"),
    ("", "--dtype=transformer=bfloat16,nope=float32", "has no component 'nope' with weights"),
    ("", "--single-file=transfomer=x.safetensors", "no model 'transfomer' (did you mean 'transformer'?)"),
    ("", "--variant=fp16", "no component of the model has weights of variant 'fp16'"),
    ("", "--lora=x.safetensors", "lora needs peft"),
    ("", "--lora=empty", "empty has no .safetensors file: correct the path"),
    ("", "--attention-backend=flash", "'flash' needs flash_attn, which is not installed: pip install flash_attn"),
    ("", "--attention-backend=Sage_Hub", "'Sage_Hub' needs kernels, which is not installed: pip install kernels"),
    ("", "MODEL=model --pipeline-parallel-size=13", "is more than the 12 blocks of the model; use at most 12"),
    ("", "MODEL=model --pipeline-parallel-size=2 --layer-partition=3,4", "adds up to 7, but the transformer has 12"),
    ("SHARDIT_PP_LAYER_PARTITION=11", "MODEL=model", "SHARDIT_PP_LAYER_PARTITION 11 adds up to 11"),
    ("", "MODEL=model --tensor-parallel-size=5", "its attention has 4 heads to divide; use 1 to 4"),
    ("HF_HUB_OFFLINE=1", "MODEL=no/where", "no/where is not (wholly) in the cache and HF_HUB_OFFLINE is set"),
    ("HF_HUB_OFFLINE=1", "MODEL=x.safetensors --config=nowhere", "nowhere is not (wholly) in the cache"),
    ("HF_ENDPOINT=http://127.0.0.1:9", "HF_HUB_OFFLINE=0 MODEL=no/where", "cannot reach http://127.0.0.1:9"),
    ("", "MODEL=no-vae", "no-vae/vae is missing: download"),
    ("", "MODEL=no-shard", "00002-of-00004.safetensors is missing: download"),
    ("", "MODEL=no-weights", "no-weights/text_encoder has no weights"),
    ("", "MODEL=no-config", "no-config/vae/config.json is damaged: download or copy it again"),
    ("", "MODEL=no-steps", "no-steps/scheduler/scheduler_config.json is damaged: download or copy it again"),
    ("", "MODEL=no-entry", "has no transformer, which FluxPipeline needs"),
    ("", "MODEL=tiny/longcat-image-edit --image=a.png --lora=x.safetensors", "takes no LoRA"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and damaged copies of it, a picture, and a torch that notes that it was imported."""
    from PIL import Image

    home = tmp_path_factory.mktemp("place")
    tiny.write("flux", home / "model")
    for name in ("no-vae", "no-shard", "no-weights", "no-entry", "no-config", "no-steps"):
        shutil.copytree(home / "model", home / name)
    shutil.rmtree(home / "no-vae" / "vae")
    (home / "no-config" / "vae" / "config.json").write_text("{")
    (home / "no-steps" / "scheduler" / "scheduler_config.json").write_text("{")
    (home / "empty").mkdir()
    next((home / "no-shard" / "transformer").glob("*-00002-*")).unlink()
    (home / "no-weights" / "text_encoder" / "model.safetensors").unlink()
    index = json.loads((home / "no-entry" / "model_index.json").read_text())
    index.pop("transformer")
    (home / "no-entry" / "model_index.json").write_text(json.dumps(index))
    (home / "x.safetensors").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(home / "a.png")
    (home / "shadow" / "torch").mkdir(parents=True)
    (home / "shadow" / "torch" / "__init__.py").write_text(SHADOW)
    return home


@pytest.fixture(scope="module")
def commands_with_shadow(place):
    with light_commands(place / "shadow") as made:
        yield made


@pytest.mark.parametrize("command", ["generate", "serve"])
@pytest.mark.parametrize(("setting", "flags", "text"), NAMES)
def test_names_are_checked_before_torch_is_imported(
    commands_with_shadow, place, tmp_path, command, setting, flags, text
):
    env = dict(pair.split("=", 1) for pair in (setting, *flags.split()) if pair and not pair.startswith("-"))
    model = env.pop("MODEL", "model" if "variant" in flags else "tiny/flux")
    words = (
        [*GENERATE, model] if command == "generate" else ["serve", model, "--port=0", f"--data-dir={tmp_path / 'd'}"]
    )
    words += [flag for flag in flags.split() if flag.startswith("-") and (command, flag[:7]) != ("serve", "--image")]
    env = {**os.environ, "SHADOW": str(tmp_path / "imported"), "HF_HOME": str(tmp_path), **env}
    done = commands_with_shadow.run(words, place, env, lacks=["peft"])
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2
    assert "serving" not in done.stdout
    assert list(tmp_path.iterdir()) == []  # torch was not imported, and the server has begun nothing


@pytest.mark.parametrize("name", tiny.names())
def test_valid_arguments_pass(name):
    folder = tiny.resolve(f"tiny/{name}")
    for model in (f"tiny/{name}", folder):
        preflight.check(model, DiffusionParallelConfig(), model_options(), dtype={"default": "fp16"})


def test_files_of_other_machines_are_not_checked(monkeypatch):
    monkeypatch.setattr(preflight, "check_cached", None)
    options = model_options(lora="no/where", scheduler="OfANewerDiffusers")
    for model in ("no/where", "tiny/flux"):
        preflight.check(
            model, DiffusionParallelConfig(), options, attention_backend="newer", files=False, packages=False
        )


@pytest.mark.parametrize("scheduler", ["Nope", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("name", tiny.names())
def test_schedulers_from_the_source(name, scheduler):
    """The suggested schedulers, for an unknown or unsuitable one, are those that work when tried."""
    from shardit.diffusion.loading.schedulers import changed_scheduler
    from shardit.diffusion.preflight.static_scheduler import check_scheduler_names

    folder, options = tiny.resolve(f"tiny/{name}"), model_options(scheduler=scheduler)
    part = components(folder)["scheduler"]
    cls = pipeline_class(folder)
    with pytest.raises(InputError) as tried:
        changed_scheduler(component_class(part).from_pretrained(str(part.folder)), options, cls)
    config = json.loads((part.folder / "scheduler_config.json").read_text())
    with pytest.raises(InputError) as read:
        check_scheduler_names(options, str(part.class_name), config, cls.__name__)
    assert str(read.value) == str(tried.value)


@pytest.mark.parametrize("name", tiny.names())
def test_sizes_and_blocks_from_files(name):
    """Sizes and blocks read from files equal those of the loaded model."""
    folder = tiny.resolve(f"tiny/{name}")
    pipe = tiny.load_plain(folder)
    for model in (f"tiny/{name}", folder):
        found, _ = static_signatures_of_model(model)
        assert (found.multiples, found.least) == (size_multiples(pipe), least_sides(pipe))
    for model in (part for key, part in pipe.components.items() if part and key.startswith("transformer")):
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        assert count_blocks(shapes) in (None, len(find_blocks(model)))
        assert (count_blocks(shapes) is None) == (name == "z-image")  # it has a sequence that names take for a list


def test_blocks_that_names_do_not_tell():
    assert count_blocks({"a.0.x.weight": (4,), "a.1.x.weight": (4,), "b.0.y.w": (2,), "out.weight": (3,)}) == 3
    assert count_blocks({"a.0.x.weight": (400,), "a.1.x.weight": (400,), "b.0.y.w": (2,)}) == 2  # b is too small
    assert count_blocks({"a.0.x.weight": (4,), "a.0.table": (4,)}) == 1
    assert count_blocks({"a.0.x.weight": (4,), "a.2.x.weight": (4,)}) is None
    assert count_blocks({"a.0.x.weight": (4,), "a.1.weight": (4,)}) is None
    assert count_blocks({"a.0.0.x.weight": (4,)}) is None
    assert count_blocks({"out.weight": (4,)}) == 0


def test_packages_of_attention_back_ends():
    assert [package_of(name) for name in ("flash", "xformers", "sage", "flash_hub", "native", "nope")] == [
        *("flash_attn", "xformers", "sageattention", "kernels", None, None)
    ]


def test_attention_back_ends_from_the_source():
    from diffusers.models.attention_dispatch import AttentionBackendName

    assert backend_names() == [member.value for member in AttentionBackendName]


def test_a_folder_that_names_an_unknown_class_is_left_to_the_ranks(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    assert static_signatures_of_model(tmp_path) == (None, None)


@pytest.mark.parametrize("name", tiny.names())
def test_signatures_from_the_source(name):
    import diffusers

    from shardit.diffusion.request.pipeline_signature import signature_of
    from shardit.models.tiny.recipes.catalog import recipe

    found, with_image = static_signatures_of_model(f"tiny/{name}")
    cls = getattr(diffusers, recipe(name).pipeline)
    assert found is not None
    # The folder tells these, not the class.
    without_sizes = dataclasses.replace(found, multiples={}, least={}, most={}, lacks_adapter=False)
    lacking = ["guidance_scale_2"] if name in ("shapes", "wan2.2-ti2v") else []
    assert without_sizes == signature_of(cls, recipe(name).config).without(lacking)
    assert (with_image is not None) == (name == "wan2.2-ti2v")


def test_limits_from_the_source():
    found, _ = static_signatures_of_model("tiny/flux")
    assert found is not None
    assert (found.most, found.lacks_adapter) == ({"max_sequence_length": 512}, True)
    assert "ip_adapter_image" not in found.choices
    for extra, says in {
        "max_sequence_length": (513, "max_sequence_length must be at most 512, got 513"),
        "output_type": ("mesh", "FluxPipeline makes no output_type 'mesh'"),
        "ip_adapter_image": ("a.png", "the model has no IP-Adapter"),
    }.items():
        value, message = says
        with pytest.raises(InputError, match=message):
            build_requests({"prompt": "a", extra: value}, None, takes=found)
    found, _ = static_signatures_of_model("tiny/wan2.2-t2v")
    assert found is not None
    assert (found.most, found.lacks_adapter) == ({}, False)


def test_arguments_that_the_configuration_of_a_pipeline_rules_out():
    assert refused_without("WanPipeline", {"boundary_ratio": 0.9}) == []
    assert refused_without("WanPipeline", {}) == ["guidance_scale_2"]
    for found in static_signatures_of_model("tiny/wan2.2-ti2v"):
        assert found is not None
        assert "guidance_scale_2" not in found.choices
        assert "guidance_scale_2" not in pipeline_names(ModelInfo(found))
        with pytest.raises(ApiError, match="takes no guidance_scale_2") as caught:
            arguments({"prompt": "a", "guidance_scale_2": 2.0}, found, ServeOptions(model="m", data_dir=Path("data")))
        assert caught.value.param == "guidance_scale_2"


@pytest.mark.full
def test_names_of_all_pipelines_from_the_source():
    import diffusers

    from shardit.diffusion.request.pipeline_signature import signature_of

    found = [getattr(diffusers, name, None) for name in dir(diffusers) if name.endswith("Pipeline")]
    classes = [
        cls
        for cls in found
        if inspect.isclass(cls)
        and cls.__module__.startswith("diffusers.pipelines.")
        and "__call__" in dir(cls)
        and cls.__name__ != "DiffusionPipeline"
    ]
    assert len(classes) > 200
    for cls in classes:
        parsed = static_signature(cls.__name__)
        assert parsed is not None, cls
        assert (parsed.names, parsed.required) == (signature_of(cls).names, signature_of(cls).required)
        made = inspect.signature(cls.__init__).parameters
        read = diffusers_source.init_parameters(cls.__name__)
        assert [(x.name, x.kind, x.default is x.empty) for x in read.values()] == [
            (x.name, x.kind, x.default is x.empty) for x in made.values()
        ], cls
        optional = diffusers_source.optional_components(cls.__name__)
        assert optional in (None, list(cls._optional_components)), cls
        assert diffusers_source.has_method(cls.__name__, "load_lora_weights") == hasattr(cls, "load_lora_weights"), cls
        assert missing_by_name(cls.__name__) == missing(cls), cls


@pytest.mark.parametrize(
    ("module", "words"),
    [("torch", ["serve", "tiny/flux", "--port=0", "--data-dir=data"]), ("diffusers", [*GENERATE, "tiny/flux"])],
)
def test_a_missing_package_is_told_once_with_the_way_to_install_it(tmp_path, module, words):
    package = tmp_path / "shadow" / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise ModuleNotFoundError('No module named', name={module!r})")
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "shardit", *words]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert f"pip install {module}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [{}, {"weight_name": "two.safetensors"}, {"subfolder": "sub"}])
def test_damaged_adapters_and_single_files(more, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "check_lora_support", lambda *_: None)
    folder = tmp_path / str(more.get("subfolder", ""))
    folder.mkdir(exist_ok=True)
    file = folder / more.get("weight_name", "one.safetensors")
    file.write_bytes(b"")
    with pytest.raises(InputError, match=f"^lora {file} is empty"):
        preflight.check("tiny/flux", DiffusionParallelConfig(), model_options(lora={"path": tmp_path, **more}))
    for options, text in (({"lora": file}, "lora "), ({"single_files": {"transformer": file}}, "")):
        with pytest.raises(InputError, match=f"^{text}{file} is empty"):
            preflight.check("tiny/flux", DiffusionParallelConfig(), model_options(**options))


def test_a_folder_of_adapters_of_which_one_is_damaged(tmp_path, monkeypatch):
    """Which one is read, diffusers decides."""
    monkeypatch.setattr(preflight, "check_lora_support", lambda *_: None)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    preflight.check("tiny/flux", DiffusionParallelConfig(), model_options(lora=tmp_path))


def test_a_folder_without_permission(tmp_path, monkeypatch, capsys):
    from shardit.cli import main

    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    for command in ("inspect", "serve"):
        assert main([command, str(tmp_path)]) == 2
        assert f"error: model {tmp_path} cannot be used: Permission denied; choose another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "package"),
    [
        ("DPMSolverSDEScheduler", {}, "torchsde"),
        ("CosineDPMSolverMultistepScheduler", {}, "torchsde"),
        ("LMSDiscreteScheduler", {}, "scipy"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "scipy"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, None),
    ],
)
def test_schedulers_whose_packages_are_missing(name, arguments, package, monkeypatch):
    from shardit.diffusion.preflight import static_scheduler

    options = model_options(scheduler=name, scheduler_args=arguments)
    monkeypatch.setattr(static_scheduler, "is_missing", lambda one: one == package)
    if package is None:
        static_scheduler.check_scheduler_packages(options, "DDIMScheduler")
        return
    shown = f"scheduler: {name}{' with use_beta_sigmas' if arguments else ''} needs {package}"
    with pytest.raises(InputError, match=f"{shown}, which is not installed: pip install {package}"):
        static_scheduler.check_scheduler_packages(options, "DDIMScheduler")
    monkeypatch.setattr(static_scheduler, "is_missing", lambda one: False)
    static_scheduler.check_scheduler_packages(options, "DDIMScheduler")
