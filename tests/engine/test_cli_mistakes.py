"""Mistakes that the command line answers by itself, with one line and before torch is imported."""

import io
import os
import re
import subprocess
import sys

import pytest

from shardit.cli import main
from shardit.errors import did_you_mean
from shardit.flags import ChatFlags
from shardit.language.request.sampling_params import SamplingParams
from shardit.language_commands import Conversation
from shardit.settings.environment import KNOWN, check_environment, switch
from tests.support.paths import ROOT

LONG = "a" * 300
LATIN = "caf\udce9"  # what Python makes of Latin-1 bytes on a command line
GENERATE = ["generate", "--model", "tiny/flux", "--prompt", "x"]
NOT_UTF8 = "must be valid text in UTF-8"


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shardit.engine.start.StartedRanks", lambda *_: pytest.fail("ranks were made"))


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_paths_of_flags_have_homes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "nothing"))
    err = refused(capsys, "generate", "--from-file=~/x.png")
    assert f"{tmp_path}/nothing/x.png" in err


@pytest.mark.parametrize(
    "flags",
    [
        [*GENERATE, "--output", f"{LONG}.png"],
        [*GENERATE, "--from-file", f"{LONG}.png"],
        [*GENERATE, "--lora", f"{LONG}.safetensors"],
        [*GENERATE, "--lora", f"{LONG}:0.5"],
        [*GENERATE, "--single-file", f"transformer={LONG}.safetensors"],
        [*GENERATE, "--image", f"{LONG}.png"],
        ["generate", "--prompt", "x", "--model", LONG],
        ["generate", "--prompt", "x", "--model", f"{LONG}.safetensors", "--config", "tiny/flux"],
        ["serve", LONG],
        ["serve", "tiny/flux", "--data-dir", LONG],
        ["inspect", LONG],
        ["tiny", "flux", LONG],
        ["complete", LONG, "--prompt", "x"],
        ["chat", f"{LONG}.gguf"],
    ],
)
def test_paths_that_are_too_long(flags, capsys):
    err = refused(capsys, *flags)
    assert "is too long" in err
    assert "choose a shorter one" in err
    assert len(err) < 200


def test_homes_of_unknown_users(capsys):
    for flags in (
        ["generate", "--prompt", "x", "--model", "~nobody-here/x"],
        ["complete", "~nobody-here", "--prompt=x"],
        ["generate", "--prompt=x", "--output=~nobody-here/x.png"],
        ["serve", "tiny/flux", "--data-dir=~nobody-here/x"],
    ):
        assert "no user of that name" in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([*GENERATE[:3], "--prompt", LATIN], "--prompt"),
        (["generate", "--model", "of/hub", "--prompt", LATIN], "--prompt"),
        ([*GENERATE, "--negative-prompt", LATIN], "--negative-prompt"),
        ([*GENERATE, "--extra", f"prompt_2={LATIN}"], "prompt_2"),
        (["complete", "tiny/llama", "--prompt", LATIN], "--prompt"),
        (["complete", "tiny/llama", "--prompt", "a", "--stop", LATIN], "--stop"),
        (["chat", "tiny/llama", "--system", LATIN], "--system"),
    ],
)
def test_texts_that_are_not_utf8(flags, named, capsys):
    err = refused(capsys, *flags)
    assert named in err
    assert NOT_UTF8 in err


def test_standard_input_that_is_not_utf8_or_empty(monkeypatch, capsys):
    for data, says in ((b"caf\xe9\n", NOT_UTF8), (b"", "standard input is empty"), (b"\n", "standard input is empty")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert says in refused(capsys, "complete", "tiny/llama")
    assert "--prompt is empty" in refused(capsys, "complete", "tiny/llama", "--prompt", "")


@pytest.mark.parametrize(
    ("output", "size", "says"),
    [
        ("a.webp", ["--width", "16400", "--height", "16"], ".webp has at most 16383 pixels in width, got 16400"),
        ("a.jpg", ["--width", "16", "--height", "65504"], ".jpg has at most 65500 pixels in height, got 65504"),
        (f"{'a' * 250}.png", ["--num-outputs-per-prompt", "11"], "is too long (a name of 257 bytes)"),
    ],
)
def test_files_that_cannot_hold_the_result(output, size, says, capsys):
    assert says in refused(capsys, *GENERATE, "--output", output, *size)


def test_more_results_than_the_limit_are_refused_before_their_files_are_named(capsys, monkeypatch):
    monkeypatch.setattr("shardit.flags.numbered", lambda *_: pytest.fail("a million names take seconds"))
    assert "the limit is 10000" in refused(capsys, *GENERATE, "--num-outputs-per-prompt", "1000000")


def test_a_range_is_named_whole(capsys):
    assert "--top-p must be above 0 and at most 1" in refused(capsys, "complete", "m", "--prompt", "x", "--top-p", "2")
    said = refused(capsys, "complete", "m", "--prompt", "x", "--timeout", "0")
    assert "--timeout must be more than 0 and at most 1000000 seconds, got 0" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chat", "--model", "x"], "give it without the flag: shardit chat MODEL"),
        (["serve", "--model", "x"], "give it without the flag: shardit serve MODEL"),
        (["generate", "tiny/flux"], "the model is given as --model"),
        (["generate", "--model", "tiny/flux", "a cat"], "the prompt is given as --prompt"),
        (["chat", "tiny/llama", "--prompt", "x"], "--prompt; it is an option of generate, complete"),
        (["serve", "tiny/flux", "--prompt", "x"], "--prompt; it is an option of generate, complete"),
        ([*GENERATE, "--port", "1"], "it is an option of serve; if port is an argument of the pipeline, give"),
        ([*GENERATE, "--max-tokens", "1"], "it is an option of chat, complete"),
        ([*GENERATE, "--eta", "1"], "; if eta is an argument of the pipeline, give it as --extra eta=VALUE"),
        ([*GENERATE, "--steps", "1"], "(did you mean --num-inference-steps?)"),
        (["chat", "--sed", "1"], "--sed (did you mean --seed?)\n"),
        (["generate", "--seed"], "Option '--seed' requires an argument."),
    ],
)
def test_a_flag_of_another_command(arguments, says, capsys):
    assert says in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--pipeline-parallel-size=9", "pipeline_parallel_size=9 is more than the 4 blocks"),
        ("--max-model-len=513", "max_model_len=513 is more than the 512 tokens"),
    ],
)
def test_more_than_a_language_model_has(flag, says, capsys):
    assert says in refused(capsys, "complete", "tiny/llama", "--prompt=x", flag)


def test_a_file_that_is_no_gguf(capsys, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"<html>")
    for command in (["complete", "a.gguf", "--prompt", "x"], ["inspect", "a.gguf"]):
        assert "does not begin with GGUF" in refused(capsys, *command)


def test_an_adapter_that_is_not_there(capsys):
    err = refused(capsys, *GENERATE, "--extra", "ip_adapter_image=cat.png")
    assert "ip_adapter_image cannot be given; the model has no IP-Adapter" in err


def test_a_component_is_no_language_model(capsys, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert "give the folder that holds it" in refused(capsys, "generate", "--prompt=x", "--model", "transformer")
    assert "component of a pipeline" in refused(capsys, "complete", "transformer", "--prompt", "x")
    assert "model_index.json" in refused(capsys, "inspect", "transformer")


def test_names_of_files_may_have_any_bytes(tmp_path):
    code = (
        f"import sys; from shardit.cli import run_app, _new_app, Path; app = _new_app(); "
        f"app.command()(lambda: print({LATIN!r})); sys.exit(run_app(app, [], 'x'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"caf\xe9\n"


@pytest.mark.parametrize(
    "command",
    [
        ["chat", "nope"],
        ["complete", "nope", "--prompt=x"],
        ["generate", "--prompt=x", "--model=nope"],
        ["serve", "nope"],
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_names_that_the_hub_cannot_be_asked_for(command, offline, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: away())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    err = refused(capsys, *command)
    assert err.endswith(" or give a folder or tiny/NAME\n")
    assert "nope" in err


def away():
    raise ConnectionError("no network")


def test_names_that_are_none(capsys):
    err = refused(capsys, "inspect", "nope")
    assert "there is no model 'nope'; give a hub id, a folder or tiny/NAME, or one of FLUX.1-dev, " in err
    err = refused(capsys, "complete", "tiny/flux", "--prompt=x")
    assert "tiny/flux is a pipeline of diffusers: use Omni or shardit generate" in err
    assert "there are llama" in refused(capsys, "complete", "tiny/nope", "--prompt=x")
    err = refused(capsys, "foo")
    assert err == "error: No such command 'foo'. Commands: generate, serve, chat, complete, train, inspect, tiny.\n"


@pytest.mark.parametrize(
    "command", [GENERATE, ["serve", "tiny/flux"], ["complete", "tiny/llama", "--prompt=x"], ["chat", "tiny/llama"]]
)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SHARDIT_DEBUG", "maybe", "SHARDIT_DEBUG must be 0 or 1 (or false, true, no, yes), got 'maybe'"),
        ("SHARDIT_PROGRESS", "2", "SHARDIT_PROGRESS must be 0 or 1"),
        ("OMP_NUM_THREADS", "abc", "OMP_NUM_THREADS must be a whole number of at least 1, got 'abc'"),
        (
            "SHARDIT_API_KEYS",
            "secret",
            "SHARDIT_API_KEYS in the environment is not known; did you mean SHARDIT_API_KEY?",
        ),
    ],
)
def test_variables_of_the_environment(command, name, value, says, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("shardit.flags.LanguageFlags.check", lambda _: pytest.fail("it went on"))
    assert says in refused(capsys, *command)


def test_variables_of_a_cluster_are_no_misspelt_ones(monkeypatch):
    for name in ("SHARDIT_SERVICE_HOST", "SHARDIT_SERVICE_PORT", "SHARDIT_PORT_8000_TCP", "SHARDIT_IMAGE"):
        monkeypatch.setenv(name, "x")
    check_environment()


def test_every_variable_in_the_sources_is_known():
    sources = (ROOT / "src").rglob("*.py")
    named = {name for file in sources for name in re.findall(r"SHARDIT_[A-Z_]*[A-Z]", file.read_text("utf-8"))}
    assert named - {"SHARDIT_SERVICE_HOST"} == set(KNOWN)


def test_a_last_word_of_a_name_goes_before_a_like_name():
    known = ["timesteps", "num_inference_steps", "prompt", "height"]
    assert "'num_inference_steps'" in did_you_mean("steps", known)
    assert "'prompt'" in did_you_mean("promt", known)
    assert "'max_tokens'" in did_you_mean("max_completion_tokens", ["min_tokens", "max_tokens", "stop"])
    assert "'mask_image'" in did_you_mean("mask", ["masked_image_latents", "mask_image", "sigmas"])
    assert did_you_mean("qqq", known) == ""


def test_variables_are_checked_before_torch_is_imported():
    code = "import sys; from shardit.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", f"{code}; sys.exit(code)", "complete", "tiny/llama", "--prompt=x"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "abc"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_switches():
    for text, is_on in (("", None), ("0", False), (" 1", True), ("No", False), ("TRUE", True), ("yes", True)):
        for default in (False, True):
            assert switch("A", {"A": text}, default) == (default if is_on is None else is_on)
    assert switch("A", {}, default=True)


def test_unknown_commands_of_a_chat_are_not_said_to_the_model(monkeypatch, capsys):
    said = []

    class Model:
        def get_default_sampling_params(self):
            return SamplingParams()

        def chat_prompt(self, messages):
            said.append(messages[-1]["content"])

        def stream(self, prompt, params):
            return []

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/help\n/\n/a/b is a path\n/reset\n/exit\nbye\n"))
    Conversation(Model(), ChatFlags(model="m")).run()  # pyright: ignore[reportArgumentType]
    assert said == ["hello", "/a/b is a path"]
    assert [line.split("; ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "there is no /help",
        "there is no /",
    ]


def test_a_language_model_has_no_variant(capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, "inspect", "tiny/llama", "--variant", "fp16")
    assert err == "error: variant: tiny/llama holds a language model, which takes none; leave it out\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_standard_streams(closed: str) -> None:
    command = f"{sys.executable} -m shardit.cli complete tiny/llama --max-tokens 2 --prompt hi"
    command = command.removesuffix(" --prompt hi") if closed == "<&-" else command
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    expected = (2, "error: standard input is empty; send a text to continue, or give --prompt\n")
    assert (done.returncode, done.stderr) == expected if closed == "<&-" else done.returncode == 0
