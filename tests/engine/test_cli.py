"""The command line, with a stand-in for `Omni`: its requests, output, files and exit codes."""

import dataclasses
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer
from PIL import Image

import shardit
from shardit.cli import check_kind, main, run_app
from shardit.commands import table
from shardit.config import DiffusionParallelConfig
from shardit.diffusion.output.output import Output
from shardit.diffusion.request.images import read_image
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.engine.streaming import in_background
from shardit.errors import InputError, RankError
from shardit.flags import GenerateFlags
from shardit.params import OmniDiffusionSamplingParams
from tests.support.paths import EXAMPLES

OFFLINE = EXAMPLES / "offline_inference"


class FakeOmni:
    """Records its arguments; returns one picture for each requested output."""

    def __init__(self, **arguments):
        self.arguments = arguments
        self.closed = False
        self.takes = PipelineSignature("P", ("prompt",))
        self.make = lambda params: Output(
            prompt="a",
            seed=7,
            images=[Image.new("RGB", (8, 8))] * params.num_outputs_per_prompt,
            seconds=1.25,
            peak_bytes=[2**30, 2**29],
        )
        FakeOmni.last = self
        FakeOmni.prepare(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def generate(self, prompts, params):
        self.prompts, self.params = prompts, params
        made = self.make(params)
        return [made] if isinstance(made, Output) else made


@pytest.fixture
def omni(monkeypatch, tmp_path):
    """Stands in for the real module; returns a function that sets how the next one behaves."""
    FakeOmni.last = None
    FakeOmni.prepare = staticmethod(lambda made: None)
    monkeypatch.setitem(sys.modules, "shardit.engine.omni", types.SimpleNamespace(Omni=FakeOmni))
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SHARDIT_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def prepare(change):
        FakeOmni.prepare = staticmethod(change)

    return prepare


def generate(*flags):
    return main(["generate", "--model", "m", "--prompt", "a", *flags])


def test_generate_prints_and_writes(omni, capsys, tmp_path):
    assert generate("--output", "cat.png") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == ["seed 7; 1.2 s; peak memory: rank 0 1.00 GiB, rank 1 0.50 GiB", "cat.png"]
    assert Image.open(tmp_path / "cat.png").size == (8, 8)
    assert FakeOmni.last.closed


def test_every_flag_arrives(omni, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "in.png")
    flags = (
        "--negative-prompt=b --image in.png --image=in.png --output=cat.png --width=64 --height 32 --num-frames=5 "
        "--fps=12 --num-inference-steps=3 --guidance-scale=1.5 --guidance-scale-2=2.5 --true-cfg-scale=3.5 --seed=4 "
        "--num-outputs-per-prompt=2 --dtype=bfloat16 --pipeline-parallel-size=2 --pipeline-chunks=2 "
        "--layer-partition 1,2,3,4 --tensor-parallel-size=2 --usp 3 --ring=2 --cfg-parallel-size=2 "
        "--data-parallel-size=2 --timeout=30 --attention-backend=native"
    )
    assert generate(*flags.split()) == 0
    made = FakeOmni.last
    config = DiffusionParallelConfig(
        pipeline_parallel_size=2,
        tensor_parallel_size=2,
        ulysses_degree=3,
        ring_degree=2,
        cfg_parallel_size=2,
        data_parallel_size=2,
        pipeline_chunks=2,
        layer_partition=(1, 2, 3, 4),
    )
    rest = {"dtype": "bfloat16", "timeout_s": 30.0, "attention_backend": "native"}
    assert made.arguments == {"model": "m", "parallel_config": config, **rest}
    assert made.prompts == {"prompt": "a", "negative_prompt": "b", "pil_image": [read_image("in.png")] * 2}
    assert made.params == OmniDiffusionSamplingParams(
        width=64,
        height=32,
        num_frames=5,
        fps=12,
        num_inference_steps=3,
        guidance_scale=1.5,
        guidance_scale_2=2.5,
        true_cfg_scale=3.5,
        seed=4,
        num_outputs_per_prompt=2,
    )
    assert (tmp_path / "cat-1.png").exists()


def test_defaults_are_the_pipelines(omni, tmp_path):
    assert generate() == 0
    made = FakeOmni.last
    assert made.params == OmniDiffusionSamplingParams()
    assert made.prompts == {"prompt": "a"}
    assert made.arguments["dtype"] is None
    assert generate("--dtype=transformer=bfloat16,vae=fp32") == 0
    assert FakeOmni.last.arguments["dtype"] == {"transformer": "bfloat16", "vae": "float32"}
    assert (tmp_path / "output.png").exists()


def test_a_wav_needs_a_sample_rate():
    takes = PipelineSignature("P", ("prompt",), outputs=("audios",))
    flags = GenerateFlags(model="m", prompt="a", output=Path("a.wav"))
    check_kind(types.SimpleNamespace(takes=dataclasses.replace(takes, sample_rate=16000)), flags)
    with pytest.raises(InputError, match=r"a\.wav: the model does not define its sample rate; use \.safetensors"):
        check_kind(types.SimpleNamespace(takes=takes), flags)


def test_video_goes_to_mp4_by_default(omni, tmp_path):
    clip = Output(prompt="a", seed=1, frames=[[Image.new("RGB", (16, 16))] * 3], fps=16)
    omni(lambda made: setattr(made, "make", lambda params: clip))
    assert generate() == 0
    assert (tmp_path / "output.mp4").exists()


def test_tiny_models_run_at_their_size(omni, capsys):
    pytest.importorskip("shardit.models.tiny")
    assert main(["generate", "--model=tiny/flux", "--prompt=a", "--width=64"]) == 0
    assert FakeOmni.last.params.width == 64
    assert FakeOmni.last.params.height == 128
    assert FakeOmni.last.params.negative_prompt is None
    note = capsys.readouterr().out.splitlines()[0]
    assert note.startswith("note: a tiny model, run with height=128")
    assert "width" not in note


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output=none/cat.png"], "output folder none does not exist"),
        (["--output=cat.doc"], "does not fit"),
        (["--image=none.png"], "image none.png does not exist"),
        (["--num-inference-steps=-1"], "num_inference_steps must be"),
        (["--guidance-scale=nan"], "guidance_scale must be a finite number"),
        (["--seed=-2"], "seed must be"),
        (["--fps=0"], "fps must be at least 0.01"),
        (["--pipeline-parallel-size=0"], "pipeline_parallel_size must be"),
        (["--layer-partition=8,a"], "--layer-partition='8,a'"),
        (["--layer-partition=8,8"], "layer_partition has 2 entries"),
        (["--timeout=0"], "--timeout must be more than 0"),
        (["--timeout=nan"], "--timeout must be more than 0"),
        (["--dtype=int8"], "--dtype"),
        (["--width=wide"], "--width"),
        (["--widht=8"], "--width"),
        (["--cfg-normalize=true"], "give it as --extra cfg_normalize=VALUE"),
        (["extra"], "extra"),
        (["--seed=1", "--width=8", "--seed=1"], "--seed is given twice; give it once"),
        (["--vae-tiling", "--vae-tiling"], "--vae-tiling is given twice"),
        (["--output="], "'--output': it is empty; name a file or a folder"),
        (["--image=a.png", "--image="], "'--image': it is empty"),
    ],
)
def test_mistakes_are_found_before_anything_starts(omni, capsys, flags, message):
    assert generate(*flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert FakeOmni.last is None


def test_missing_flags_and_commands(omni, capsys):
    assert main(["generate", "--prompt=a"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["generat"]) == 2
    assert capsys.readouterr().err.startswith("error: No such command")
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"shardit {shardit.__version__}\n"


def fail(error):
    def make(params):
        raise error

    return lambda made: setattr(made, "make", make)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("height is odd"), 2, "error: height is odd\n"),
        (RankError(1, "killed by SIGKILL"), 1, "error: rank 1 failed: killed by SIGKILL\n"),
        (RankError(1, "boom\nTraceback"), 1, "error: rank 1 failed: boom (SHARDIT_DEBUG=1 shows all of it)\n"),
        (RuntimeError("odd"), 1, "error: RuntimeError: odd\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(omni, capsys, error, code, line):
    omni(fail(error))
    assert generate() == code
    assert capsys.readouterr().err == line
    assert FakeOmni.last.closed


def test_traceback_on_request(omni, capsys, monkeypatch):
    monkeypatch.setenv("SHARDIT_DEBUG", "1")
    omni(fail(RuntimeError("odd")))
    assert generate() == 1
    assert "Traceback" in capsys.readouterr().err


def test_failed_request_is_reported(omni, capsys, tmp_path):
    bad = Output(prompt="a", seed=1, error="height must be divisible by 16")
    omni(lambda made: setattr(made, "make", lambda params: bad))
    assert generate() == 2
    assert "height must be divisible by 16" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_output_is_compared_with_the_pipeline_before_it_runs(omni, capsys):
    takes = PipelineSignature("P", ("prompt", "num_frames"))
    omni(lambda made: (setattr(made, "takes", takes), fail(AssertionError("ran"))(made)))
    assert generate("--output=cat.png") == 2
    assert "does not fit a video" in capsys.readouterr().err


def test_other_ranks_are_silent(omni, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("shardit.engine.process.exit_code.OTHER_RANKS_DELAY_S", 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    omni(lambda made: setattr(made, "make", lambda params: []))
    assert generate("--output=folder/of/rank/0/cat.png") == 0
    omni(fail(InputError("everywhere the same")))
    assert generate() == 2
    assert capsys.readouterr() == ("", "")
    omni(fail(RankError(0, "died")))
    assert generate() == 1
    assert capsys.readouterr().err == "error: rank 0 failed: died\n"
    assert list(tmp_path.iterdir()) == []


DOCUMENT = {
    "ranks": [
        {
            "rank": rank,
            "coords": {"pp": rank},
            "components": {
                "transformer": {"blocks": [rank, 2, 3], "parameters": 1234567, "bytes": 2**21},
                "vae": {"blocks": [], "parameters": 5, "bytes": 20},
            },
        }
        for rank in range(2)
    ],
    "chunks": 2,
    "bytes": 2**22,
    "notes": ["looped"],
}


def test_inspect(monkeypatch, capsys):
    seen = []

    def inspect_model(model, config, dtype=None, variant=None):
        seen.append((model, config, dtype))
        return DOCUMENT

    monkeypatch.setitem(sys.modules, "shardit.engine.inspect", types.SimpleNamespace(inspect_model=inspect_model))
    flags = ["inspect", "--model=tiny/flux", "--pipeline-parallel-size=2", "--dtype=float16"]
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == DOCUMENT
    assert seen == [("tiny/flux", DiffusionParallelConfig(pipeline_parallel_size=2), "float16")]
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line.rstrip() for line in table(DOCUMENT).splitlines()]
    assert lines[1].split() == ["0", "transformer", "0,", "2-3", "1,234,567", "2.0"]
    assert lines[-2:] == ["chunks per rank: 2", "looped"]


def test_tiny(monkeypatch, capsys, tmp_path):
    def write(name, folder):
        if name != "flux":
            raise InputError("no such tiny model")
        return folder

    monkeypatch.setattr("shardit.models.tiny.write", write)
    assert main(["tiny", "flux", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
    assert main(["tiny", "fluxx", str(tmp_path)]) == 2
    assert main(["tiny", "flux"]) == 2


@pytest.mark.parametrize("name", ["text_to_image", "text_to_video", "image_to_video"])
def test_examples_take_the_same_flags(omni, monkeypatch, capsys, tmp_path, name):
    path = OFFLINE / name / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(path.read_text().splitlines()) < 30
    monkeypatch.setattr(sys, "argv", [str(path), "--model=m", "--prompt=a", "--output=cat.png", "--seed=3"])
    assert module.run_script(module.main, output="output.png") == 0
    assert capsys.readouterr().out == "cat.png\n"
    assert FakeOmni.last.params.seed == 3
    monkeypatch.setattr(sys, "argv", [str(path), "--model=m", "--prompt=a", "--seed=-3"])
    assert module.run_script(module.main, output="output.png") == 2


CONTRACT_FLAGS = """
--model --prompt --negative-prompt --image --output --width --height --num-frames --fps --num-inference-steps
--guidance-scale --guidance-scale-2 --true-cfg-scale --seed --num-outputs-per-prompt --dtype
--pipeline-parallel-size --pipeline-chunks --layer-partition --timeout --tensor-parallel-size --usp --ulysses-degree
--ring --ring-degree --cfg-parallel-size --data-parallel-size --vae-patch-parallel-size --attention-backend
"""


def test_flags_of_the_contract(capsys):
    main(["generate", "--help"])
    text = capsys.readouterr().out
    shown = text.replace(",", " ").split()
    assert [flag for flag in CONTRACT_FLAGS.split() if flag not in shown] == []


def test_further_arguments_of_the_pipeline(omni):
    flags = ("use_resolution_binning=false", "strength=0.4", "caption=a b", "sizes=[1, 2]", "empty=")
    assert generate(*(word for flag in flags for word in ("--extra", flag))) == 0
    params = FakeOmni.last.params
    assert params.strength == 0.4  # a field, though it has no flag
    assert params.extra_args == {"use_resolution_binning": False, "caption": "a b", "sizes": [1, 2], "empty": ""}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--extra", "x"], "--extra must be name=value"),
        (["--extra", "x=False"], "write x=false"),
        (["--extra", "x=1", "--extra", "x=2"], "x is given twice"),
        (["--extra", "width=64", "--width", "32"], "width is given twice"),
        (["--extra", "strength=2"], "strength must be at most 1"),
    ],
)
def test_wrong_further_arguments(omni, capsys, flags, text):
    assert generate(*flags) == 2
    assert text in capsys.readouterr().err
    assert FakeOmni.last is None


def test_an_interrupted_import_is_no_missing_package(capsys):
    def interrupted():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:  # as the lazy modules of libraries do
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    app = typer.Typer()
    app.command()(interrupted)
    assert run_app(app, [], "x") == 130
    assert capsys.readouterr().err == ""


def test_what_runs_in_the_background_keeps_no_program():
    code = "import time; from shardit.engine.streaming import in_background as run; run(lambda: time.sleep(60))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
    assert in_background(lambda: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 / 0).result()


def test_the_demo_prints_commands_that_can_be_pasted(monkeypatch, capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    spec.loader.exec_module(demo := importlib.util.module_from_spec(spec))
    ran = []
    done = types.SimpleNamespace(returncode=0, stdout="")
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: ran.append(command) or done)
    demo.generate(tmp_path / "a.mp4", stages=2)
    [line, *_] = capsys.readouterr().out.splitlines()
    shown = shlex.split(line)
    assert shown[:2] == ["$", "shardit"]
    assert shown[2:] == [part if part != str(tmp_path / "a.mp4") else "a.mp4" for part in ran[0][3:]]


def as_runtime_error() -> None:
    """What Python until 3.11 makes of Ctrl-C in `__set_name__`, and what transformers makes of that."""
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error
    except RuntimeError as error:
        raise ModuleNotFoundError("Could not import module 'AutoConfig'") from error


def as_it_is() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [as_it_is, as_runtime_error])
def test_interrupted_while_it_is_imported(monkeypatch, capsys, interrupt):
    import shardit.__main__ as entry

    class Interrupts:
        def find_spec(self, name, *_):
            if name == "shardit.cli":
                interrupt()

    ended = []
    monkeypatch.setattr(entry, "end_process", ended.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its handler
    monkeypatch.delitem(sys.modules, "shardit.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert entry.main() == 130
    assert ended == [130]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("interrupt", [as_it_is, as_runtime_error])
def test_interrupted_while_libraries_are_imported(monkeypatch, capsys, interrupt):
    monkeypatch.setattr("shardit.language.loading.source.known_decoder", lambda *_: interrupt())
    assert main(["inspect", "tiny/flux"]) == 130
    assert capsys.readouterr().err == ""


def test_ctrl_c_that_an_import_loses():
    """numpy fails in a later import, torch goes on without it, and transformers fails for that."""
    code = """
import os, signal, sys
class Pressed:
    done = False
    def find_spec(self, name, path=None, target=None):
        if name == "numpy.linalg" and not Pressed.done:
            Pressed.done = True
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressed())
from shardit.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "inspect", "tiny/llama"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert (done.returncode, done.stderr) == (130, "")
