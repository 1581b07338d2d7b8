"""A pipeline loaded by shardit with everything owned is the one that diffusers loads, in every tensor and setting."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from shardit.loading.dtypes import as_dtype
from shardit.loading.safetensors_file import Reads
from shardit.models import tiny
from shardit.models.processor import build_processor, is_needed
from tests.support.loading import loaded

DTYPES = [torch.float32, torch.bfloat16, None]


def reference(folder: Path, dtype, cls=DiffusionPipeline):
    index = json.loads((folder / "model_index.json").read_text())
    named = {key: value[1] for key, value in index.items() if isinstance(value, list)}
    extra = {key: build_processor(folder / key, kind) for key, kind in named.items() if is_needed(kind or "")}
    return cls.from_pretrained(str(folder), torch_dtype=dtype, **extra)


def plain_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that modules keep as ordinary attributes (rotary tables)."""
    found = {}
    for name, part in module.named_modules():
        found.update({f"{name}.{k}": v for k, v in vars(part).items() if isinstance(v, torch.Tensor)})
    return found


def assert_same_tensors(ours: dict, theirs: dict) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        mine = ours[name]
        assert (mine.dtype, mine.device, mine.requires_grad) == (tensor.dtype, tensor.device, tensor.requires_grad), (
            name
        )
        assert mine.stride() == tensor.stride(), name
        assert torch.equal(mine, tensor), name


def assert_same_module(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    assert type(ours) is type(theirs)
    assert_same_tensors(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert_same_tensors(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert_same_tensors(plain_tensors(ours), plain_tensors(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.dtype == theirs.dtype
    assert all(a.training == b.training for a, b in zip(ours.modules(), theirs.modules(), strict=True))
    config = [c if isinstance(c, dict) else c.to_dict() for c in (ours.config, theirs.config)]
    assert dict(config[0]) == dict(config[1])


def assert_same_pipeline(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    assert dict(ours.config) == dict(theirs.config)
    assert list(ours.components) == list(theirs.components)
    for name, component in theirs.components.items():
        mine = ours.components[name]
        assert type(mine) is type(component), name
        if isinstance(component, torch.nn.Module):
            assert_same_module(mine, component)
        elif hasattr(component, "config"):
            assert dict(mine.config) == dict(component.config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", tiny.names())
def test_equal_to_from_pretrained(name, dtype):
    folder = tiny.resolve(f"tiny/{name}")
    reads = Reads()
    ours = loaded(f"tiny/{name}", dtype=dtype, reads=reads)
    assert_same_pipeline(ours, reference(folder, dtype))
    weights = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    assert 0.9 * weights < reads.bytes <= weights


def test_float16_keeps_what_the_class_keeps_in_float32():
    folder = tiny.resolve("tiny/wan2.2-t2v")
    ours = loaded(folder, dtype="float16")
    assert_same_pipeline(ours, reference(folder, torch.float16))
    assert {p.dtype for p in ours.transformer.parameters()} == {torch.float16, torch.float32}


BY_COMPONENT = [
    {"transformer": "bfloat16", "transformer_2": torch.float16, "vae": "fp32"},
    {"vae": torch.float32, "default": torch.bfloat16},
]


@pytest.mark.parametrize("dtype", BY_COMPONENT, ids=["named", "default"])
def test_a_dtype_for_each_component(dtype):
    """The rest is float32, as in diffusers, unless there is a default."""
    ours = loaded("tiny/wan2.2-t2v", dtype=dtype)
    assert_same_pipeline(
        ours,
        reference(tiny.resolve("tiny/wan2.2-t2v"), {name: as_dtype(value) for name, value in dtype.items()}),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unowned_modules_answer_like_loaded_ones(dtype):
    for name in ("tiny/wan2.2-t2v", "tiny/sd3.5", "tiny/qwen-image"):
        theirs = reference(tiny.resolve(name), dtype)
        ours = loaded(name, owned=lambda modules: {m: lambda _: False for m in modules}, dtype=dtype)
        assert dict(ours.config) == dict(theirs.config)
        for key, module in ours.components.items():
            if isinstance(module, torch.nn.Module):
                want = getattr(theirs, key)
                assert module.dtype == want.dtype
                assert all(p.is_meta for p in module.parameters())
                held = {n: (p.dtype, p.shape) for n, p in want.named_parameters()}
                assert {n: (p.dtype, p.shape) for n, p in module.named_parameters()} == held
                persistent = set(module.state_dict())
                for buffer, tensor in module.named_buffers():
                    if buffer not in persistent:
                        assert torch.equal(tensor, want.get_buffer(buffer)), buffer
                config = [c if isinstance(c, dict) else c.to_dict() for c in (module.config, want.config)]
                assert dict(config[0]) == dict(config[1])


def test_absent_component(tmp_path):
    folder = shutil.copytree(tiny.resolve("tiny/wan2.2-t2v"), tmp_path / "one")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer_2"], index["boundary_ratio"] = [None, None], None
    (folder / "model_index.json").write_text(json.dumps(index))
    ours = loaded(folder)
    assert ours.transformer_2 is None
    assert_same_pipeline(ours, reference(folder, None))


def test_quick():
    def seconds() -> float:
        start = time.perf_counter()
        loaded("tiny/qwen-image")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.0


def test_importing_loads_no_torch():
    code = "import sys, shardit.loading; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
