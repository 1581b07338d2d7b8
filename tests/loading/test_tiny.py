"""The built-in tiny checkpoints: complete, deterministic, plain diffusers folders in which every block matters."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from shardit.errors import InputError
from shardit.models import tiny
from shardit.models.processor import build_processor
from shardit.models.tiny import language
from shardit.models.tiny.language import language_folder

BLOCK_LISTS = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "noise_refiner",
    "context_refiner",
)
DOUBLE_AND_SINGLE = {"transformer_blocks": 4, "single_transformer_blocks": 8}
BLOCKS = {
    "flux": DOUBLE_AND_SINGLE,
    "longcat-image": DOUBLE_AND_SINGLE,
    "longcat-image-edit": DOUBLE_AND_SINGLE,
    "ovis-image": DOUBLE_AND_SINGLE,
    "qwen-image": {"transformer_blocks": 8},
    "qwen-image-edit": {"transformer_blocks": 8},
    "qwen-image-edit-2509": {"transformer_blocks": 8},
    "qwen-image-layered": {"transformer_blocks": 8},
    "sd3.5": {"transformer_blocks": 8},
    "shapes": {"blocks": 8},
    "wan2.2-i2v": {"blocks": 8},
    "wan2.2-t2v": {"blocks": 8},
    "wan2.2-ti2v": {"blocks": 8},
    "z-image": {"layers": 8, "noise_refiner": 2, "context_refiner": 2},
}
HEADS = {"wan2.2-i2v": 3, "z-image": 5}
OTHER_PROMPTS = {"shapes": "a yellow circle moves up on a green ground"}
TILED = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
TILED |= {"tile_sample_stride_height": 48, "tile_sample_stride_width": 48}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=sorted(BLOCKS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(name, tmp_path_factory.mktemp("tiny") / "some" / name)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    loaded = tiny.load_plain(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def picture(number: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = [3 * x + 40 * number, 5 * y + 90 * number, 2 * (x + y), 2 * x + y]
    return Image.fromarray(np.stack(planes[: len(mode)], axis=-1).astype(np.uint8), mode)


def call(pipe: Any, name: str, prompt: str = "", seed: int = 0, first: int = 0, **kw: Any) -> Any:
    """One run at the defaults as a float array; `first` numbers the input pictures."""
    arguments = {**tiny.defaults(name), **kw}
    prompt = prompt or tiny.example_prompt(name) or "a red fox on a hill"
    size = (arguments.get("width", 160), arguments.get("height", 160))
    mode = "RGBA" if name == "qwen-image-layered" else "RGB"
    given = [picture(first + i, *size, mode) for i in range(tiny.images(name))]
    if given:
        arguments["image"] = given if len(given) > 1 else given[0]
    generator = torch.Generator().manual_seed(seed)
    result = pipe(prompt=prompt, generator=generator, output_type="np", **arguments)
    return np.asarray(result.frames if hasattr(result, "frames") else result.images)


def expected_shape(name: str) -> tuple[int, ...]:
    arguments = tiny.defaults(name)
    if name == "qwen-image-layered":
        return (1, arguments["layers"], 640, 640, 4)
    if name == "longcat-image-edit":
        return (1, 1024, 1024, 3)
    size = (arguments["height"], arguments["width"], 3)
    return (1, arguments["num_frames"], *size) if "num_frames" in arguments else (1, *size)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_names_are_sorted_and_complete() -> None:
    assert tiny.names() == tuple(sorted(BLOCKS))


def test_import_is_light() -> None:
    code = (
        "import sys; from shardit.models import tiny; tiny.names(); tiny.defaults('flux');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_name_lists_the_valid_ones(tmp_path: Path) -> None:
    for attempt in (
        lambda: tiny.write("sd9", tmp_path / "x"),
        lambda: tiny.resolve("tiny/sd9"),
        lambda: tiny.images(""),
    ):
        with pytest.raises(InputError, match=r"flux, .*z-image; language models: llama, mamba, qwen3"):
            attempt()


def test_tiny_language_models_are_written_where_the_user_wants_them(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    written = tiny.write("llama", tmp_path / "llama")
    assert digest(written) == digest(cast(Path, language_folder("tiny/llama")))
    with pytest.raises(InputError, match="is not an empty folder"):
        tiny.write("llama", written)


def test_two_processes_may_write_the_same_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes second finds the folder there when its own is complete."""
    monkeypatch.setenv("SHARDIT_CACHE", str(tmp_path))
    save = language._save

    def save_second(name: str, folder: Path, dtype: torch.dtype | None) -> None:
        monkeypatch.setattr(language, "_save", save)
        language_folder(f"tiny/{name}")
        save(name, folder, dtype)

    monkeypatch.setattr(language, "_save", save_second)
    assert (cast(Path, language_folder("tiny/llama")) / "config.json").is_file()


def test_write_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="exists"):
            tiny.write("flux", target)
    with pytest.raises(InputError, match="dtype"):
        tiny.write("flux", tmp_path / "new", dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resolve_in_two_processes_at_once(tmp_path: Path) -> None:
    code = """
import os, sys
import diffusers, transformers
from shardit.models import tiny

diffusers.FluxPipeline, transformers.T5EncoderModel, transformers.CLIPTextModel
other = os.fork()  # after the imports, so that both write at the same time
os.write(1, f"{tiny.resolve('tiny/flux')}\\n".encode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0)
"""
    env = {**os.environ, "SHARDIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    job = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, timeout=120)
    assert job.returncode == 0
    lines = job.stdout.splitlines()
    paths = set(lines)
    assert (len(lines), len(paths)) == (2, 1)
    written = Path(paths.pop())
    assert written.is_relative_to(tmp_path / "cache")
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    # Another process, with other hash seeds: the very same bytes.
    assert digest(tiny.write("flux", tmp_path / "again")) == digest(written)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/new \(.*\); choose another folder"):
        tiny.write("flux", tmp_path / "file" / "new")
    monkeypatch.setenv("SHARDIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write to the cache .*file \(.*name another folder in SHARDIT_CACHE"):
        tiny.resolve("tiny/flux")


def test_resolve_leaves_other_models_alone() -> None:
    assert tiny.resolve("Qwen/Qwen-Image") is None


def test_write_is_deterministic(name: str, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    again = tiny.write(name, tmp_path / "again")
    drawn = (torch.rand(1).item(), np.random.rand())
    torch.manual_seed(7)
    np.random.seed(7)
    assert drawn == (torch.rand(1).item(), np.random.rand()), "the global generators were used"
    assert digest(again) == digest(folder)


def test_folder_is_complete_and_sharded(name: str, folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    named = {key for key, value in index.items() if isinstance(value, list) and value[0] is not None}
    assert named == {path.name for path in folder.iterdir() if path.is_dir()}
    indices = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("*.safetensors.index.json")}
    assert {"transformer", "transformer_2"} & named <= set(indices)
    assert any(component.startswith("text_encoder") for component in indices)
    for component, content in indices.items():
        shards = set(content["weight_map"].values())
        assert len(shards) >= 3
        assert all((folder / component / shard).is_file() for shard in shards)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 16e6


def test_blocks_and_heads(name: str, pipe: Any) -> None:
    model = pipe.transformer
    assert {key: len(getattr(model, key)) for key in BLOCK_LISTS if hasattr(model, key)} == BLOCKS[name]
    heads = model.config.get("num_attention_heads") or model.config["n_heads"]
    assert heads == HEADS.get(name, 4)
    depths = [_text_layers(m) for key, m in pipe.components.items() if key.startswith("text_encoder")]
    assert max(depths) >= 8


def _text_layers(encoder: torch.nn.Module) -> int:
    config = getattr(encoder.config, "text_config", encoder.config)
    return getattr(config, "num_hidden_layers", None) or config.num_layers


def test_run(name: str, pipe: Any) -> None:
    json.dumps(tiny.defaults(name))
    first = call(pipe, name)
    assert first.shape == expected_shape(name)
    assert np.isfinite(first).all()
    assert first.std() > 0.05
    assert ((first > 0) & (first < 1)).mean() > 0.8, "mostly clipped"
    other_prompt = call(pipe, name, prompt=OTHER_PROMPTS.get(name, "two blue boats at night"))
    other_seed = call(pipe, name, seed=1)
    assert np.abs(first - other_prompt).mean() > 0.004
    trained = bool(tiny.example_prompt(name))  # it draws the same thing, a little elsewhere
    assert np.abs(first - other_seed).mean() > (0.004 if trained else 0.01)
    if tiny.images(name):
        assert np.abs(first - call(pipe, name, first=3)).mean() > 0.004


def test_every_block_matters(name: str, pipe: Any) -> None:
    """Each block in turn with all weights zero, on the inputs of a real run: the model's output changes visibly."""
    for component in ("transformer", "transformer_2"):
        model = getattr(pipe, component, None)
        if model is None:
            continue
        inputs = _first_inputs(pipe, name, model)
        reference = _output(model, inputs)
        for key, count in BLOCKS[name].items():
            for i in range(count):
                block = getattr(model, key)[i]
                change = (_output_without(model, block, inputs) - reference).std() / reference.std()
                assert change > 0.02, f"{component}.{key}.{i}: {change}"
        assert torch.equal(_output(model, inputs), reference)


class _Captured(Exception):
    pass


def _first_inputs(pipe: Any, name: str, model: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first call of `model` in a run; the run ends there."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Captured

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with pytest.raises(_Captured):
            call(pipe, name)
    finally:
        handle.remove()
    return seen[0]


def _output(model: torch.nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> torch.Tensor:
    with torch.no_grad():
        output = model(*inputs[0], **inputs[1])[0]
    return torch.stack(list(output)) if isinstance(output, (list, tuple)) else output


def _output_without(model: torch.nn.Module, block: torch.nn.Module, inputs: Any) -> torch.Tensor:
    saved = {key: value.clone() for key, value in block.state_dict().items()}
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    try:
        return _output(model, inputs)
    finally:
        block.load_state_dict(saved)


@pytest.mark.parametrize("name", ["qwen-image", "sd3.5", "wan2.2-ti2v"], scope="module", indirect=True)
def test_decoding_in_tiles(name: str, pipe: Any) -> None:
    calls = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[-2:]))
    pipe.vae.enable_tiling(**({} if name == "sd3.5" else TILED))
    try:
        assert call(pipe, name).shape == expected_shape(name)
    finally:
        pipe.vae.disable_tiling()
        handle.remove()
    frames = 3 if name.startswith("wan") else 1
    assert len(calls) >= 4 * frames


@pytest.mark.parametrize("name", ["wan2.2-ti2v"], scope="module", indirect=True)
def test_ti2v_takes_an_image(name: str, pipe: Any) -> None:
    import diffusers

    by_image = diffusers.WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    by_image.set_progress_bar_config(disable=True)
    size = (tiny.defaults(name)["width"], tiny.defaults(name)["height"])
    one, two = (call(by_image, name, image=picture(i, *size)) for i in range(2))
    assert one.shape == expected_shape(name)
    assert np.abs(one - two).mean() > 0.004


@pytest.mark.parametrize("name", ["qwen-image-edit"], scope="module", indirect=True)
def test_processor(name: str, folder: Path) -> None:
    import transformers

    processor = build_processor(folder / "processor")
    assert type(processor) is transformers.Qwen2VLProcessor
    text = [processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)]
    batch = processor(text=text, images=picture(0, 224, 112), padding=True, return_tensors="pt")
    tokens = int(batch["image_grid_thw"].prod()) // 4
    assert tokens > 1
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == tokens
    assert batch["pixel_values"].shape[0] == 4 * tokens
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True)[0].startswith("system")


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-edit"], scope="module", indirect=True)
def test_template_has_the_tokens_that_the_pipeline_drops(name: str, pipe: Any) -> None:
    """As with the real tokenizer: the dropped tokens are the template up to the user's turn, and no more."""
    before = pipe.prompt_template_encode.split("<|vision_start|>")[0].split("{}")[0]
    assert len(pipe.tokenizer(before).input_ids) == pipe.prompt_template_encode_start_idx


def test_bfloat16(tmp_path: Path) -> None:
    pipe = tiny.load_plain(tiny.write("z-image", tmp_path / "z", dtype="bfloat16"), dtype="bfloat16")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    assert np.isfinite(call(pipe, "z-image")).all()
