"""Files in the formats of their authors: as diffusers' from_single_file, and only owned tensors are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel, ZImageTransformer2DModel
from safetensors.torch import load_file, save_file

from shardit.config import DiffusionParallelConfig
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import check
from shardit.errors import InputError
from shardit.flags import GenerateFlags
from shardit.loading.safetensors_file import Reads
from shardit.models import tiny
from shardit.settings.model_options import model_options, split_model
from tests.support.loading import loaded

WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn", "attn2": "cross_attn", ".to_out.0.": ".o.", ".to_q.": ".q.", ".to_k.": ".k.",
    ".to_v.": ".v.", "proj_out": "head.head", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm__",
    "norm3": "norm2", "norm__": "norm3",
}  # fmt: skip


def folder_of(name: str) -> Path:
    return Path(str(tiny.resolve(f"tiny/{name}")))


def weights_of(name: str) -> dict[str, torch.Tensor]:
    files = sorted((folder_of(name) / "transformer").glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Transformers in the formats of Wan (other names) and of Z-Image (one matrix for queries, keys and values)."""
    folder = tmp_path_factory.mktemp("files")
    wan: dict[str, torch.Tensor] = {}
    for key, tensor in weights_of("wan2.2-ti2v").items():
        for ours, theirs in WAN.items():
            key = key.replace(ours, theirs)
        key = "head.modulation" if key == "scale_shift_table" else key.replace("scale_shift_table", "modulation")
        wan[f"model.diffusion_model.{key}"] = tensor
    fused: dict[str, torch.Tensor] = {}
    z_image = weights_of("z-image")
    for key, tensor in z_image.items():
        if ".attention.to_q.weight" in key:
            parts = [z_image[key.replace("to_q", f"to_{one}")] for one in "qkv"]
            fused[key.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in key and ".attention.to_v." not in key:
            key = key.replace(".to_out.0.", ".out.").replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")
            key = key.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
            fused[key] = tensor
    for name, tensors in (("wan2.2-ti2v", wan), ("z-image", fused)):
        save_file(tensors, str(folder / f"{name}.safetensors"))
    return {name: folder / f"{name}.safetensors" for name in ("wan2.2-ti2v", "z-image")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "cls"), [("wan2.2-ti2v", WanTransformer3DModel), ("z-image", ZImageTransformer2DModel)]
)
def test_a_transformer_from_a_single_file(files: dict[str, Path], name: str, cls: Any, dtype: str) -> None:
    folder = folder_of(name)
    options = model_options(single_files={"transformer": files[name]})
    pipe: Any = loaded(folder, dtype=dtype, options=options)
    plain = cls.from_single_file(
        str(files[name]), config=str(folder), subfolder="transformer", torch_dtype=getattr(torch, dtype)
    )
    ours, theirs = pipe.transformer.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].stride()) == (tensor.dtype, tensor.stride()), key
        assert torch.equal(ours[key], tensor), key
    for (key, buffer), (_, other) in zip(pipe.transformer.named_buffers(), plain.named_buffers(), strict=True):
        assert buffer.dtype == other.dtype, key
        assert torch.equal(buffer, other), key


def test_only_owned_tensors_are_read(files: dict[str, Path]) -> None:
    folder, reads, owned = folder_of("z-image"), Reads(), "layers.0.attention."
    options = model_options(single_files={"transformer": files["z-image"]})

    def owned_part(modules: Any) -> Any:
        nothing = dict.fromkeys(modules, lambda key: False)
        return {**nothing, "transformer": lambda key: key.startswith(owned)}

    pipe: Any = loaded(folder, owned=owned_part, reads=reads, options=options)
    held = {key: one for key, one in pipe.transformer.named_parameters() if not one.is_meta}
    assert held
    assert all(key.startswith(owned) for key in held)
    data = sum(one.numel() * 4 for one in held.values())
    assert data <= reads.bytes < data + 200_000  # the headers, too


def test_a_model_that_is_one_file(files: dict[str, Path]) -> None:
    path, folder = files["wan2.2-ti2v"], folder_of("wan2.2-ti2v")
    with pytest.raises(InputError, match=r"is a single file: .*model_config=, --config"):
        split_model(path, None, model_options())
    with pytest.raises(InputError, match="does not exist"):
        split_model("nothing.safetensors", folder, model_options())
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        split_model(__file__, folder, model_options())
    with pytest.raises(InputError, match=r"model_config \(--config\) is for a model that is one file"):
        split_model("tiny/flux", folder, model_options())
    arguments = GenerateFlags(model=str(path), prompt="p", config=str(folder)).omni_arguments()
    model, options = split_model(arguments["model"], arguments["model_config"], model_options())
    check(SessionSpec(str(model), arguments["parallel_config"], options=options))
    pipe: Any = loaded(model, dtype="float32", options=options)
    expected = weights_of("wan2.2-ti2v")
    assert all(torch.equal(one, expected[key]) for key, one in pipe.transformer.state_dict().items())
    assert not any(one.is_meta for one in pipe.vae.parameters())  # which the file has not: it is the folder's


@pytest.mark.parametrize(
    ("model", "file", "words"),
    [
        ("wan2.2-ti2v", "z-image", r"does not hold transformer \(WanTransformer3DModel\) of WanPipeline"),
        ("wan2.2-t2v", "wan2.2-ti2v", "is one model, but WanPipeline has transformer and transformer_2"),
    ],
)
def test_one_file_has_to_be_the_model_that_denoises(files: dict[str, Path], model: str, file: str, words: str) -> None:
    name, options = split_model(files[file], f"tiny/{model}", model_options())
    with pytest.raises(InputError, match=words):
        check(SessionSpec(name, DiffusionParallelConfig(), options=options))


def test_files_that_do_not_fit(files: dict[str, Path]) -> None:
    for single, words in (
        ({"transformer": files["z-image"]}, "does not hold|has no tensor"),
        ({"transformr": files["wan2.2-ti2v"]}, "has no model 'transformr'"),
        ({"text_encoder": files["wan2.2-ti2v"]}, "does not hold UMT5EncoderModel"),
    ):
        with pytest.raises(InputError, match=words):
            check(
                SessionSpec("tiny/wan2.2-ti2v", DiffusionParallelConfig(), options=model_options(single_files=single))
            )
