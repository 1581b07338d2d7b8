"""`make gpu`: the tests marked gpu, then transformers of real size with random weights on one GPU, with a result file.

Each transformer runs alone, in bfloat16: plain, through shardit on one rank, and with its blocks compiled. Without a
GPU this says so and ends. `--device cpu --small` shows that the measurement works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import shardit
from bench import machine

RESULTS = Path(__file__).parent / "results"
BYTES_PER_WEIGHT = 2
SPARE = 1.4
"""How much more memory than the weights a forward may need."""


def flux(small: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """FLUX.1-dev at 1024 x 1024: class, configuration and arguments."""
    from diffusers import FluxTransformer2DModel

    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2} if small else {}
    tokens = 64 if small else 64 * 64
    arguments = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.ones(1),
    }
    return FluxTransformer2DModel, {"guidance_embeds": True, **config}, arguments


def wan(small: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Wan2.2-TI2V-5B at 704 x 1280, 81 frames."""
    from diffusers import WanTransformer3DModel

    config = {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
    size = (21, 44, 80)
    if small:
        config, size = {**config, "num_attention_heads": 2, "ffn_dim": 64, "num_layers": 2}, (2, 4, 4)
    arguments = {
        "hidden_states": torch.randn(1, 48, *size),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
    }
    return WanTransformer3DModel, config, arguments


def qwen_image(small: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Qwen-Image at 1328 x 1328."""
    from diffusers import QwenImageTransformer2DModel

    side = 8 if small else 83
    arguments = {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, 256, 3584),
        "encoder_hidden_states_mask": torch.ones(1, 256, dtype=torch.int64),
        "timestep": torch.ones(1),
        "img_shapes": [[(1, side, side)]],
    }
    return QwenImageTransformer2DModel, {"num_layers": 2, "num_attention_heads": 2} if small else {}, arguments


CASES = {"flux 1024x1024": flux, "wan2.2-ti2v-5b 704x1280x81": wan, "qwen-image 1328x1328": qwen_image}


def measure(case: Callable[[bool], Any], device: torch.device, small: bool, runs: int) -> dict[str, Any]:
    """Return seconds, host seconds and peak memory of a forward: plain, by shardit, and with compiled blocks."""
    cls, config, given = case(small)
    with torch.device("meta"):
        weights = sum(p.numel() for p in cls(**config).parameters()) * BYTES_PER_WEIGHT
    found: dict[str, Any] = {"weight_bytes": weights}
    if device.type == "cuda" and weights * SPARE > torch.cuda.mem_get_info()[0]:
        return {**found, "skipped": "does not fit the memory of this GPU"}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = cls(**config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    arguments = {name: _moved(value, device) for name, value in given.items()}
    found["plain"], expected = _timed(model, arguments, device, runs)
    found["shardit"], made = _timed(shardit.parallelize(model), arguments, device, runs)
    found["equal"] = torch.equal(expected, made)
    model.compile_repeated_blocks()
    found["compiled"], made = _timed(model, arguments, device, runs)
    found["compiled_distance"] = float((made - expected).float().norm() / expected.float().norm())
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, torch.bfloat16 if value.is_floating_point() else value.dtype)


def _timed(
    model: Any, arguments: dict[str, Any], device: torch.device, runs: int
) -> tuple[dict[str, float], torch.Tensor]:
    """Return medians of a forward, and its result. host_s: until the call returns, with the GPU still computing."""
    seconds, host, out = [], [], torch.empty(0)
    on_gpu = device.type == "cuda"
    with torch.no_grad():
        for run in range(runs + 2):
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            out = model(**arguments, return_dict=False)[0]
            returned = time.perf_counter()
            if on_gpu:
                torch.cuda.synchronize()
            if run >= 2:
                seconds.append(time.perf_counter() - start)
                host.append(returned - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"seconds": statistics.median(seconds), "host_s": statistics.median(host), "peak_bytes": peak}, out


def main() -> int:
    """Run the tests and the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny transformers; writes no result file")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: nothing to test or to measure here")
        return 0
    if not options.small:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py"], check=False)
        if tests.returncode:
            return tests.returncode
    document: dict[str, Any] = {"machine": machine.describe(["gpu"])}
    card = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    document["machine"]["card"] = card
    for name, case in CASES.items():
        document[name] = measure(case, torch.device(options.device), options.small, options.runs)
        print(name, json.dumps(document[name]), flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if not options.small:
        words = "-".join(card.lower().split())
        target = RESULTS / f"{document['machine']['date'][:10]}-{words}-{document['machine']['commit']}.json"
        target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"written: {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
