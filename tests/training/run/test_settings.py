"""Flags and TOML files of `shardit train`: what is unknown, misplaced, missing or contradictory is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shardit import InputError, cli
from shardit.config import DiffusionParallelConfig
from shardit.training.data.shapes import KINDS
from shardit.training.run.options import toml
from shardit.training.run.options.check import check, check_paths
from shardit.training.run.options.flags import TrainFlags
from shardit.training.settings import TrainSettings


def write(folder: Path, text: str) -> Path:
    path = folder / "train.toml"
    path.write_text(text, "utf-8")
    return path


WHOLE = """
model = "tiny/wan2.2-ti2v"
data = "shapes:moving"
output = "run"
steps = 3
learning_rate = 1
resolution = 64
lora_targets = ["to_q", "to_k"]
pipeline_parallel_size = 2
layer_partition = [1, 3]
timeout = 50
[optimizer_args]
eps = 1e-7
betas = [0.9, 0.95]
"""


def test_every_flag_is_a_key_and_flags_override(tmp_path: Path) -> None:
    settings, config = TrainFlags(config=write(tmp_path, WHOLE), epochs=2, lora_rank=8).settings()
    assert settings == TrainSettings(
        model="tiny/wan2.2-ti2v",
        data="shapes:moving",
        output=Path("run"),
        epochs=2,
        learning_rate=1.0,
        resolution="64",
        lora_targets=("to_q", "to_k"),
        lora_rank=8,
        timeout_s=50.0,
        optimizer_args={"eps": 1e-7, "betas": [0.9, 0.95]},
    )
    assert isinstance(settings.learning_rate, float)
    assert config == DiffusionParallelConfig(pipeline_parallel_size=2, layer_partition=(1, 3))


def test_a_flag_switches_off_what_the_file_switches_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, 'model = "tiny/flux"\ndata = "shapes:still"\noutput = "run"\nfull = true\nresume = true\n')
    seen: list[TrainSettings] = []
    monkeypatch.setattr("shardit.training.run.options.check.check", lambda settings, _: seen.append(settings) or stop())

    def stop() -> None:
        raise InputError("enough")

    words = ["train", "--config", str(file)]
    assert [cli.main([*words, *more]) for more in ((), ("--no-full", "--no-resume", "--lora-rank", "3"))] == [2, 2]
    assert [(one.full, one.resume) for one in seen] == [(True, True), (False, False)]
    assert seen[1].lora_rank == 3


def test_flags_and_keys_are_the_same() -> None:
    names = {name for name in TrainFlags.__dataclass_fields__ if name != "config"}
    assert names == set(toml.fields())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning-rate = 1e-4", ("'learning-rate'", "did you mean 'learning_rate'")),
        ("lerning_rate = 1e-4", ("did you mean 'learning_rate'",)),
        ("gradient_accumulation_steps = 4", ("did you mean 'accumulation'",)),
        ("[train]\nsteps = 4", ("train.steps belongs at the top", "steps = ...")),
        ("[optimizer]\ntype = 'adamw'", ("optimizer is one value, not a table", "[optimizer_args]")),
        ("[optimizer_args]\nsteps = 3", ("optimizer_args.steps", "above the line [optimizer_args]")),
        ("[optimizer_args]\nlr = 3", ("optimizer_args.lr belongs above", "learning_rate")),
        ("betas = [0.9, 0.99]", ("betas is an argument of the optimizer", "[optimizer_args]")),
        ("optimizer_args = 3", ("optimizer_args is a table",)),
        ("[[directory]]\npath = 'x'", ("there is no key 'directory'",)),
        ("[model_settings]\nx = 1", ("there is no table [model_settings]",)),
        ("steps = 0", ("steps must be a whole number of at least 1", "got 0")),
        ("steps = true", ("steps must be a whole number", "got True")),
        ("steps = '5'", ("steps must be a whole number", "got '5'")),
        ("full = 1", ("full must be true or false",)),
        ("lora_targets = 'to_q'", ("lora_targets must be a list of texts",)),
        ("lora_targets = []", ("lora_targets is an empty list: leave it out",)),
        ("model = ['a']", ("model",)),
        ("resolution = '12by3'", ("resolution must be WIDTHxHEIGHT",)),
        ("optimizer = 'adam'", ("optimizer must be one of adamw",)),
        ("steps = 3\nsteps = 4\nfull = true", ("is no TOML", "line 2")),
        ("steps = ", ("is no TOML",)),
        ("steps = 3\nepochs = 4", ("steps and epochs are given",)),
        ("full = true\nlora_rank = 4", ("lora_rank is about a LoRA",)),
        ("shift = 3.0\ntimesteps = 'uniform'", ("shift has an effect with timesteps=shifted alone",)),
        ("sample_every = 3", ("needs prompts", "--sample-prompts")),
        ("validation_data = 'x'", ("--validate-every N",)),
        ("ulysses_degree = 2", ("there is no key 'ulysses_degree'",)),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        TrainFlags(config=path).settings()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for content, part in ((b"\xff\xfe", "is no TOML"), (None, "cannot be read")):
        path = tmp_path / "train.toml"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=part):
            TrainFlags(config=path).settings()
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbfsteps = 3")
    assert TrainFlags(config=tmp_path / "bom.toml").settings()[0].steps == 3


def train(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a command."""
    assert cli.main(["train", *words]) == 2
    found = capsys.readouterr().err
    assert found.count("\n") == 1
    return found


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    base = ("--model", "tiny/wan2.2-ti2v", "--data", "shapes:moving", "--output", str(tmp_path / "new"))

    def refused(*words: str) -> str:
        return train(capsys, *base, *words)

    assert "must be one of shapes:still" in train(capsys, *base[:2], "--data", "shapes:movin", *base[4:])
    assert "number of items" in train(capsys, *base[:2], "--data", "shapes:still:0", *base[4:])
    assert "--data is missing" in train(capsys, "--model", "tiny/wan2.2-ti2v", "--output", "x")
    assert "none does not exist; give a folder" in train(capsys, *base[:2], "--data", str(tmp_path / "none"), *base[4:])
    assert "--output" in train(capsys, *base[:4], "--output", str(tmp_path / "file"))
    assert "has a run already: add --resume" in train(capsys, *base[:4], "--output", str(tmp_path / "run"))
    assert "--batch-size must be at least 1" in refused("--batch-size", "0")
    assert "No such option: --lr" in refused("--lr", "3")
    assert "prodigy estimates one step size" in refused("--optimizer", "prodigy", "--pipeline-parallel-size", "2")
    assert "pip install prodigyopt" in refused("--optimizer", "prodigy")
    assert "pip install bitsandbytes" in refused("--optimizer", "adamw8bit")
    assert "shard_optimizer has an effect with several replicas" in refused("--shard-optimizer")
    assert "pip install tensorboard" in refused("--tensorboard")
    assert "pipeline_chunks=3" in refused("--pipeline-chunks", "3")
    assert "warmup_steps=9 is more than steps=3" in refused("--warmup-steps", "9", "--steps", "3")
    assert "warmup_steps=5000 is more than steps=1000" in refused("--warmup-steps", "5000")
    assert "--model" in train(capsys, "--data", "shapes:moving", "--output", "x")
    assert "is given twice" in refused("--steps", "1", "--steps", "2")
    assert "--full is given twice" in refused("--full", "--no-full")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["model_index.json", "config.json", "adapter_config.json", "one.safetensors", "a.gguf"]
)
def test_the_folder_of_a_model_is_no_output(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    """The result of a run has files of these names, and would replace those of the model."""
    (tmp_path / name).touch()
    words = ("--model", "tiny/llama", "--data", "shapes:still", "--output", str(tmp_path))
    assert f"--output {tmp_path} holds a model ({name}), which a run replaces: name" in train(capsys, *words)
    (tmp_path / "metrics.jsonl").touch()  # of a run that has made the model
    check_paths(TrainSettings(model="tiny/llama", data="shapes:still", output=tmp_path, resume=True))


def test_settings_of_diffusion_are_refused_for_texts(tmp_path: Path) -> None:
    """Before torch is imported: the check of a run finds them."""
    given: tuple[dict[str, Any], ...] = ({"num_frames": 5}, {"resolution": "64x64"}, {"background": "black"})
    for words in given:
        settings = TrainSettings(model="tiny/llama", data="shapes:still", output=tmp_path / "out", **words)
        with pytest.raises(InputError, match=f"{next(iter(words))}: tiny/llama is a language model, which takes none"):
            check(settings, DiffusionParallelConfig())


def test_named_pipes_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Reading one waits for ever if nobody writes to it."""
    os.mkfifo(tmp_path / "pipe.toml")
    assert "pipe.toml is a named pipe, not a regular file; choose another" in train(
        capsys, "--config", f"{tmp_path}/pipe.toml"
    )
    words = ("--model", "tiny/llama", "--output", f"{tmp_path}/out", "--data", f"{tmp_path}/pipe.toml")
    assert "pipe.toml is a named pipe, not a regular file; choose another" in train(capsys, *words)


def test_the_help_names_all_data_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(one in text for one in ("hf:NAME", *(f"shapes:{kind}" for kind in KINDS)))


def test_the_output_is_outside_of_the_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A resumed run would read its own samples."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "clips")
    (tmp_path / "clips" / "rows.jsonl").write_text('{"text": "a"}\n')
    clips, base = str(tmp_path / "clips"), ("--model", "tiny/flux")

    def told(data: str, output: str, *more: str) -> str:
        return train(capsys, *base, "--data", data, "--output", output, *more)

    error = told(clips, f"{clips}/out")
    assert f"--output {clips}/out lies in --data {clips}, and would be read as data when the run goes on: name" in error
    assert "lies in --data" in told(clips, clips)
    assert "lies in --data" in told(str(tmp_path / "link"), f"{clips}/out/deeper")
    held_out = ("--validation-data", clips, "--validate-every", "1")
    assert f"lies in --validation-data {clips}" in told("shapes:still", f"{clips}/out", *held_out)
    for data, output in ((clips, f"{clips}-out"), (f"{clips}/rows.jsonl", f"{clips}/out"), (clips, str(tmp_path))):
        check_paths(TrainSettings(model="tiny/flux", data=data, output=Path(output)))  # refuses nothing


def test_a_repeated_flag_takes_several_values(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("shardit.training.run.command.TrainFlags.settings", lambda self: seen.append(self) or stop())

    def stop() -> None:
        raise InputError("enough")

    words = ["train", "--lora-targets", "to_q", "to_out.0", "--optimizer-args", "eps=1", "--lora-targets=ff", "b"]
    assert cli.main(words) == 2
    assert seen[0].lora_targets == ["to_q", "to_out.0", "ff", "b"]
    assert seen[0].optimizer_args == ["eps=1"]


def test_the_kind_of_model_decides_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    shapes, texts, output = "shapes:moving", str(tmp_path / "rows.jsonl"), tmp_path / "out"
    config = DiffusionParallelConfig()
    assert check(TrainSettings(model="tiny/wan2.2-ti2v", data=shapes, output=output), config).endswith(
        "diffusion.recipe"
    )
    assert check(TrainSettings(model="tiny/llama", data=texts, output=output), config).endswith("language.recipe")
    with pytest.raises(InputError, match="no-such-model"):
        check(TrainSettings(model="tiny/no-such-model", data=shapes, output=output), config)


@pytest.mark.parametrize(
    ("model", "row", "told"),
    [
        ("tiny/llama", '{"texts": "a"}', "rows.jsonl:1 has neither text nor messages"),
        ("tiny/flux", '{"file": "none.png", "caption": "a"}', "none.png does not exist"),
        ("tiny/flux", "", "pip install datasets"),
    ],
)
def test_wrong_rows_are_found_before_torch_is_imported(model: str, row: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    data = str(tmp_path / "rows.jsonl") if row else "hf:somebody/pictures"
    words = ["train", "--model", model, "--output", str(tmp_path / "out"), "--data", data]
    code = f"import sys; from shardit import cli; assert cli.main({words!r}) == 2; assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told in ran.stderr


def test_data_of_another_kind_is_refused_for_texts(tmp_path: Path) -> None:
    """Before torch is imported, as for files."""
    with pytest.raises(InputError, match="data: there is no file or folder shapes:moving: give one with"):
        check(
            TrainSettings(model="tiny/llama", data="shapes:moving", output=tmp_path / "out"), DiffusionParallelConfig()
        )


def test_mistakes_are_found_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from shardit import cli; "
        f"code = cli.main(['train', '--model', 'tiny/flux', '--data', 'shapes:moving', '--output', {str(tmp_path)!r}, "
        "'--optimizer', 'prodigy']); assert code == 2; assert 'torch' not in sys.modules"
    )
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.monotonic() - begin < 10  # two seconds on an idle machine
