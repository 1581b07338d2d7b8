"""Running whole tiny pipelines, plain and over stages, for tests that compare the two bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from shardit.config import DiffusionParallelConfig
from shardit.diffusion.loading.variants import image_pipeline
from shardit.diffusion.request.build import build_requests
from shardit.diffusion.request.pipeline_signature import signature_of
from shardit.diffusion.request.request import Request
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import Session
from shardit.models import tiny

PROMPTS = ("a cat on a mat", "two dogs and a bird", "snowy mountains", "a red car")


@dataclass(frozen=True)
class Case:
    """One comparison: a tiny model, the stages it is cut into, and how it is called."""

    name: str
    pp: int = 2
    chunks: int | None = None
    dtype: str | None = None
    in_flight: int = 1
    requests: int = 1
    split_batch: bool = False
    with_image: bool = False
    partition: tuple[int, ...] | None = None
    call: dict[str, Any] = field(default_factory=dict, hash=False)
    scheduler: str | None = None
    axes: dict[str, int] = field(default_factory=dict, hash=False)
    tiling: dict[str, int] | None = field(default=None, hash=False)  # arguments of `enable_tiling`
    prompts: tuple[str, ...] = PROMPTS

    def config(self) -> DiffusionParallelConfig:
        """How it is sharded."""
        return DiffusionParallelConfig(
            pipeline_parallel_size=self.pp,
            pipeline_chunks=self.chunks,
            layer_partition=self.partition,
            split_batch=self.split_batch,
            **self.axes,
        )


def pictures(count: int, mode: str = "RGB") -> list[Image.Image]:
    """Input pictures with something to see in them, the same every time."""
    size = (96, 64, len(mode))
    noise = [np.random.RandomState(i).randint(0, 255, size, dtype=np.uint8) for i in range(count)]
    return [Image.fromarray(a, mode).resize((128, 128)) for a in noise]


def make_requests(case: Case, takes: Any, takes_with_image: Any = None) -> list[Request]:
    """The requests of a case; every one has a prompt and a seed of its own."""
    call = {**tiny.defaults(case.name), "output_type": "np", **case.call}
    count = 1 if case.with_image else tiny.images(case.name)
    if count:
        images = pictures(count, "RGBA" if "layered" in case.name else "RGB")
        call["pil_image"] = images if count > 1 else images[0]
    prompts = [{"prompt": case.prompts[i], "seed": i + 1} for i in range(case.requests)]
    return build_requests(
        prompts,
        None,
        prompt=None,
        negative_prompt=None,
        pil_image=None,
        overrides=call,
        takes=takes,
        takes_with_image=takes_with_image,
    )


def plain(case: Case) -> list[np.ndarray]:
    """What plain diffusers makes of the requests of a case, one after the other."""
    pipe = tiny.load_plain(tiny.resolve(f"tiny/{case.name}"), dtype=case.dtype)
    pipe.set_progress_bar_config(disable=True)
    switch_tiling(pipe, case)
    other = image_pipeline(pipe)
    pipes = {type(p).__name__: p for p in (pipe, other) if p is not None}
    for p in pipes.values():
        p.set_progress_bar_config(disable=True)
        change_scheduler(p, case.scheduler)
    signatures = [None if p is None else signature_of(type(p), dict(p.config)) for p in (pipe, other)]
    outs = []
    for request in make_requests(case, *signatures):
        torch.manual_seed(request.seed)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        outs.append(array_of(pipes[request.pipeline](**request.call_arguments(), generator=generator)))
    return outs


def switch_tiling(pipe: Any, case: Case) -> None:
    """Have the VAE of a pipeline work in tiles, where a case asks for it."""
    if case.tiling is not None:
        pipe.vae.enable_tiling(**case.tiling)


def change_scheduler(pipe: Any, name: str | None) -> None:
    """Give a pipeline another scheduler class, with the options that make it stochastic."""
    if name is not None:
        import diffusers

        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, stochastic_sampling=True)


def array_of(result: Any) -> np.ndarray:
    """The pixels of a pipeline's result."""
    made = getattr(result, "frames", None)
    made = result.images if made is None else made
    if isinstance(made, (list, tuple)):
        made = np.stack([np.asarray(m) for m in made])
    return np.asarray(made.float() if isinstance(made, torch.Tensor) else made)


def staged(rank: int, count: int, method: str, cases: list[Case]) -> list[dict[str, Any]]:
    """On every rank: run the cases over the stages; rank 0 returns what they made, each rank what it did."""
    return [run_case(rank, count, method, case) for case in cases]


def run_case(rank: int, count: int, method: str, case: Case) -> dict[str, Any]:
    """One case on this rank."""
    spec = SessionSpec(f"tiny/{case.name}", case.config(), case.dtype, "cpu", case.in_flight, timeout_s=60)
    session = Session(spec, rank=rank, world_size=count, init_method=method)
    for pipe in session.model.variants.values():
        change_scheduler(pipe, case.scheduler)
    switch_tiling(session.model.pipe, case)
    requests = make_requests(case, session.info.signature, session.info.signature_with_image)
    outputs = session.generate(requests, lambda *_: None)
    parts = {name: getattr(session.model.pipe, name) for name in session.model.assignment.cut}
    stages = {name: part.shardit_stages for name, part in parts.items() if hasattr(part, "shardit_stages")}
    cuts, stage = {name: s.cut for name, s in stages.items()}, session.mesh.pp_rank
    sequences = [
        one.shardit_sequence for one in session.model.pipe.components.values() if hasattr(one, "shardit_sequence")
    ]
    tiles = getattr(session.model.pipe.vae, "shardit_tiles", None)
    return {
        "tiles": {} if tiles is None else dict(tiles.ran),
        "errors": {index: output.error for index, output in outputs.items()},
        "arrays": {index: np.asarray(output.latents) for index, output in outputs.items() if output.error is None},
        "strangers": [(name, block) for name, cut in cuts.items() for block in cut.ran if cut.owners[block] != stage],
        "calls": {name: cut.ran.total() for name, cut in cuts.items()},
        "ran": {name: len(cut.ran) for name, cut in cuts.items()},
        "in_flight": max((s.runtime.schedule.most_in_flight for s in stages.values()), default=0),
        "splits": [dict(s._split._known) for s in stages.values()],
        "exchanged": sum(one.attention.sent_bytes for one in sequences),
    }


def joined(of_ranks: list[dict[str, Any]], what: str) -> list[Any]:
    """What the ranks returned of the requests, in the order of the requests."""
    found = {index: value for of_rank in of_ranks for index, value in of_rank[what].items()}
    return [found[index] for index in sorted(found)]


def difference(expected: np.ndarray, got: np.ndarray) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(expected.astype(np.float64) - got) / np.linalg.norm(expected))
