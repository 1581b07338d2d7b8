"""Reading safetensors files, finding checkpoints, and the errors for damaged ones."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardit.diffusion.loading.description import describe
from shardit.errors import InputError, UnsupportedError
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.dtypes import as_dtype, check_components, dtype_of, setting
from shardit.loading.index import components, pipeline_class
from shardit.loading.safetensors_file import Header, Reads, read_into, read_tensor
from shardit.loading.source import locate
from shardit.loading.weight_names import choose
from shardit.models import tiny

ALL_DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(24.0).view(6, 4), "n": torch.tensor(7)}, path, metadata={"format": "pt"})
    return path


def test_header_and_tensors(tmp_path):
    made = {name: (torch.rand(3, 5) * 9).to(getattr(torch, name)) for name in [*ALL_DTYPES, "float8_e4m3fn"]}
    made |= {"number": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    path = tmp_path / "all.safetensors"
    save_file(made, path, metadata={"a": "b"})
    header = Header.read(path)
    assert header.metadata == {"a": "b"}
    assert set(header.entries) == set(made)
    for name, tensor in made.items():
        got = read_tensor(path, header.entries[name])
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert got.float().equal(tensor.float())


@pytest.mark.parametrize("rows", [slice(None), slice(0, 2), slice(2, 5), slice(4, None), slice(-2, None), slice(3, 3)])
def test_rows_read_their_bytes_only(file, rows):
    reads = Reads()
    got = read_tensor(file, Header.read(file).entries["w"], rows, reads)
    want = torch.arange(24.0).view(6, 4)[rows]
    assert got.equal(want)
    assert reads.bytes == want.numel() * 4


def test_read_into_fills_the_given_memory(file):
    entry = Header.read(file).entries["w"]
    whole = torch.zeros(8, 4)
    address = whole.data_ptr()
    with open(file, "rb") as opened:
        read_into(opened.fileno(), [(entry.start, whole[1:7])])
    assert whole.data_ptr() == address
    assert whole[1:7].equal(torch.arange(24.0).view(6, 4))
    assert not whole[0].any()
    with pytest.raises(ValueError, match="contiguous"):
        read_into(file, [(entry.start, whole.t())])


def test_a_system_call_may_return_less(file, monkeypatch):
    import os

    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: real(fd, [into[0][:5]], at))
    assert read_tensor(file, Header.read(file).entries["w"]).equal(torch.arange(24.0).view(6, 4))


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "seven bytes":
        path.write_bytes(data[:7])
    elif how == "in the header":
        path.write_bytes(data[: 8 + n // 2])
    elif how == "in the data":
        path.write_bytes(data[:-10])
    elif how == "no json":
        path.write_bytes(data[:8] + b"x" * n + data[8 + n :])
    elif how == "wrong size":
        path.write_bytes(data.replace(b"[6,4]", b"[6,5]"))
    elif how == "not safetensors":
        path.write_bytes(b"\x80\x02}q\x00(X\x05\x00\x00\x00abc")
    elif how == "lfs":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "No such file"),
        ("empty", "is empty"),
        ("seven bytes", "cut short"),
        ("in the header", "cut short inside its header"),
        ("in the data", "cut short"),
        ("no json", "damaged"),
        ("wrong size", "damaged safetensors header (tensor w)"),
        ("not safetensors", "not a safetensors file"),
        ("lfs", "git lfs pull"),
    ],
)
def test_damaged_file(file, how, says):
    damaged(file, how)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        Header.read(file)
    assert str(file) in one_line(error)


def test_file_cut_after_its_header_was_read(file):
    entry = Header.read(file).entries["w"]
    damaged(file, "in the data")
    file.write_bytes(file.read_bytes()[: entry.start + 8])
    with pytest.raises(InputError, match="cut short") as error:
        read_tensor(file, entry)
    assert str(file) in one_line(error)


def sharded(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    table = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def test_checkpoint_single_and_sharded(tmp_path, file):
    file.rename(file.with_name("diffusion_pytorch_model.safetensors"))
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    single = Checkpoint.open(tmp_path)
    assert not single.sharded
    assert set(single.files) == {"w", "n"}
    assert single.nbytes == 24 * 4 + 8
    (tmp_path / "x").mkdir()
    many = Checkpoint.open(sharded(tmp_path / "x"))
    assert many.sharded
    assert many.names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert many.entry("b").shape == (3,)


def test_checkpoint_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Checkpoint.open(tmp_path / "none")
    index = sharded(tmp_path) / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "kept")
    opened = Checkpoint.open(tmp_path)
    for act in (lambda: opened.entry("b"), lambda: opened.ensure({opened.files["b"]})):
        with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is missing"):
            act()
    (tmp_path / "kept").rename(tmp_path / "model-00002-of-00002.safetensors")

    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "c": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(InputError, match=r"says that c is in model-00001-of-00002\.safetensors, but it is not"):
        Checkpoint.open(tmp_path).entry("c")
    for text, says in (("{", "no readable weight_map"), ("{}", "no readable weight_map")):
        index.write_text(text)
        with pytest.raises(InputError, match=says):
            Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="not a safetensors file in its folder"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("names", "kind", "says"),
    [
        (["config.json"], InputError, "has no weights"),
        (["pytorch_model.bin"], UnsupportedError, "convert them to safetensors"),
        (["diffusion_pytorch_model.bin", "config.json"], UnsupportedError, "convert them to safetensors"),
        (["model.fp16.safetensors", "model.bin"], InputError, "only the weight variant fp16"),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], InputError, "variant fp16"),
    ],
)
def test_no_usable_weights(names, kind, says):
    with pytest.raises(kind, match=says) as error:
        choose(names, "here")
    one_line(error)


def test_default_weights_win_over_variants():
    both = ["model.fp16.safetensors", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.fp16.json"]
    assert choose(both, "").name == "model.safetensors"


def write_index(folder: Path, **table) -> Path:
    (folder / "model_index.json").write_text(json.dumps(table))
    return folder


def test_index(tmp_path):
    (tmp_path / "vae").mkdir()
    folder = write_index(
        tmp_path,
        _class_name="WanPipeline",
        _diffusers_version="0.42.1",
        vae=["diffusers", "AutoencoderKLWan"],
        transformer_2=[None, None],
        boundary_ratio=0.9,
    )
    found = components(folder)
    assert list(found) == ["vae", "transformer_2"]
    assert found["vae"].folder == tmp_path / "vae"
    assert found["transformer_2"].absent
    assert pipeline_class(folder).__name__ == "WanPipeline"
    assert pipeline_class(folder, "FluxPipeline").__name__ == "FluxPipeline"
    with pytest.raises(InputError, match="did you mean FluxPipeline") as error:
        pipeline_class(folder, "FluksPipeline")
    one_line(error)
    write_index(tmp_path, _class_name=["my_pipeline", "Mine"])
    with pytest.raises(UnsupportedError, match="its own pipeline code"):
        pipeline_class(folder)


def test_component_classes(tmp_path):
    from shardit.loading.index import component_class

    def cls(library, name):
        return component_class(components(write_index(tmp_path, _class_name="X", c=[library, name]))["c"])

    assert cls("diffusers", "AutoencoderKL").__name__ == "AutoencoderKL"
    assert cls("transformers", "T5TokenizerFast").__name__.startswith("T5Tokenizer")
    assert "ImageProcessor" in cls("transformers", "CLIPFeatureExtractor").__name__
    assert cls("stable_diffusion", "StableDiffusionSafetyChecker").__name__ == "StableDiffusionSafetyChecker"
    for library, name, says in (
        ("transformer_custom", "Mine", "which is not run"),
        ("os", "system", "which is not run"),
        ("transformers", "NoSuchModel", "no class NoSuchModel"),
        ("diffusers", "OnnxRuntimeModel", "needs onnx"),
    ):
        with pytest.raises(UnsupportedError, match=says) as error:
            cls(library, name)
        one_line(error)


def test_folders_that_are_not_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.safetensors").write_bytes(b"")
    for model, says in (
        ("empty", "not a diffusers folder"),
        (tmp_path / "empty", "not a diffusers folder"),
        ("./none", "there is no folder"),
        ("/no/such/folder", "there is no folder"),
        (Path("none"), "there is no folder"),
        ("file.safetensors", "single file"),
        ("tiny/none", "tiny model"),
        ("", "no model given"),
    ):
        with pytest.raises(InputError, match=says) as error:
            locate(model)
        one_line(error)
    assert locate(write_index(tmp_path, _class_name="X")).folder == tmp_path


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("model_index.json", "[" * 100_000, "cannot read {}/model_index.json"),
        ("model_index.json", '{"_class_name": "FluxPipeline", "vae": "AutoencoderKL"}', "has 'AutoencoderKL' for vae"),
        ("model_index.json", '{"_class_name": 5}', "model_index.json names no pipeline class (_class_name)"),
        ("transformer/config.json", "[]", "config.json in {}/transformer is no JSON object"),
        ("tokenizer/", "", "{}/tokenizer is empty"),
    ],
)
def test_damaged_folders(tmp_path, path, text, says):
    folder = shutil.copytree(tiny.resolve("tiny/flux"), tmp_path / "model")
    if path.endswith("/"):
        shutil.rmtree(folder / path)
        (folder / path).mkdir()
    else:
        (folder / path).write_text(text)
    with pytest.raises(InputError, match=re.escape(says.format(folder))) as error:
        describe(folder)
    one_line(error)


def test_dtypes():
    assert as_dtype("bfloat16") is torch.bfloat16
    assert as_dtype(torch.float16) is torch.float16
    assert as_dtype(None) is None
    for wrong in ("int8", "float8_e4m3fn", torch.int32, "auto"):
        with pytest.raises(InputError, match="use float32"):
            as_dtype(wrong)


def test_dtypes_by_component():
    chosen = setting("transformer=bf16, vae=float32")
    assert (
        chosen
        == {"transformer": "bfloat16", "vae": "float32"}
        == setting({"transformer": torch.bfloat16, "vae": "fp32"})
    )
    assert [dtype_of(chosen, name) for name in ("transformer", "vae", "text_encoder")] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,  # as in diffusers
    ]
    assert dtype_of(setting("default=bf16,vae=fp32"), "text_encoder") == torch.bfloat16
    assert (setting(None), setting("fp16"), setting(torch.float64)) == (None, "float16", "float64")
    assert dtype_of(None, "vae") is None
    check_components(chosen, ["transformer", "vae"])
    with pytest.raises(InputError, match="no component 'vae' with weights; it has unet, text_encoder, default"):
        check_components({"vae": "float32"}, ["unet", "text_encoder"])
    for wrong, says in [
        ("transformer=int8", "--dtype['transformer'] 'int8' is not known"),
        ("transformer=", "--dtype must be as in bfloat16 or transformer=bfloat16,vae=float32"),
        ("vae=fp32,vae=fp16", "each component once"),
        ({}, "must name components"),
        ({1: "fp32"}, "must name components"),
        ({"vae": None}, "'None' is not known"),
        (torch.int8, "use float32, bfloat16, float16 or float64"),
    ]:
        with pytest.raises(InputError, match=re.escape(says)) as error:
            setting(wrong, "--dtype")
        one_line(error)
