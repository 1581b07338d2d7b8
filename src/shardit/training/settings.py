"""`TrainSettings`: all options of `shardit train`, from flags or from the keys of a TOML file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shardit.config import TIMEOUT_S
from shardit.engine.process.messages import TIMEOUT
from shardit.settings.checks import NAME, ValueCheck, matching, number, whole
from shardit.settings.declare import Flag, declare
from shardit.training.limits import SCHEDULES

STEPS = 1000
"""Optimizer steps if neither steps nor epochs are given."""

OPTIMIZERS = ("adamw", "adamw8bit", "sgd", "prodigy", "adafactor")
RATES = ("constant", "cosine", "linear")
"""The courses of the learning rate."""


def _one_of(*names: str) -> ValueCheck:
    return matching(f"one of {', '.join(names)}", lambda value: value in names)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One run of training."""

    model: str = declare("", "Hub id, folder or tiny/NAME: a diffusers pipeline or a causal language model.")
    data: str = declare(
        "", "Folder, JSONL file, hf:NAME, shapes:moving, shapes:centred, shapes:diagonal or shapes:still."
    )
    output: Path | None = declare(None, "Folder of the run: checkpoints, metrics, samples and the result.")

    # what is trained
    full: bool = declare(False, "Train all weights, in place of a LoRA.")
    lora_rank: int = declare(16, "Rank of the LoRA.", whole(1))
    lora_alpha: float | None = declare(None, "Scale of the LoRA. [default: its rank]", number(above=0))
    lora_targets: tuple[str, ...] = declare(
        (), "Module that gets an adapter, by the end of its name or a regular expression.", flag=Flag(each=str)
    )
    lora_rslora: bool = declare(False, "Divide alpha by the square root of the rank (rsLoRA).")
    lora_dropout: float = declare(0.0, "Dropout in front of the adapters.", number(0, 0.99))
    train_text_encoder: bool = declare(False, "Put a LoRA into the text encoders, too.")

    # how long, how much at once
    steps: int | None = declare(None, "Optimizer steps. [default: 1000, or as --epochs says]", whole(1))
    epochs: int | None = declare(None, "Passes over the data, in place of --steps.", whole(1))
    batch_size: int = declare(1, "Samples in a micro-batch.", whole(1))
    accumulation: int = declare(1, "Micro-batches of a replica in an optimizer step.", whole(1))
    schedule: str = declare("1f1b", f"Pipeline schedule: {', '.join(SCHEDULES)}.", _one_of(*SCHEDULES))
    gradient_checkpointing: bool = declare(False, "Compute activations again in the backward.")
    dtype: str | None = declare(None, "Type of the weights. [default: bfloat16 if the folder has it]", NAME)

    # the optimizer
    optimizer: str = declare("adamw", "Optimizer: adamw, adamw8bit, sgd, prodigy or adafactor.", _one_of(*OPTIMIZERS))
    optimizer_args: dict[str, object] = declare(
        dict, "Argument of the optimizer.", flag=Flag(example="--optimizer-args eps=1e-7")
    )
    shard_optimizer: bool = declare(False, "Share the state of the optimizer out over the replicas.")
    learning_rate: float = declare(1e-4, "Learning rate after the warm-up.", number(above=0))
    weight_decay: float = declare(0.01, "Weight decay.", number(0))
    lr_schedule: str = declare("constant", "Course of the learning rate: constant, cosine or linear.", _one_of(*RATES))
    warmup_steps: int = declare(0, "Optimizer steps over which the rate rises from 0.", whole(0))
    max_grad_norm: float = declare(1.0, "Limit of the gradients' norm; 0: none.", number(0))
    ema_decay: float | None = declare(None, "Keep an average of the weights with this decay.", number(0, 0.999999))
    seed: int = declare(0, "Seed of all random numbers.", whole(0, 2**63 - 1))

    # the data
    resolution: str = declare(
        "",
        "Size as WIDTHxHEIGHT, or one number: buckets with about that area. [default: the model's own]",
        matching(
            "WIDTHxHEIGHT or one number, such as 832x480 or 512",
            lambda value: isinstance(value, str) and re.fullmatch(r"([1-9]\d*(x[1-9]\d*)?)?", value) is not None,
        ),
    )
    num_frames: int | None = declare(None, "Frames of a clip. [default: the model's own]", whole(1))
    fps: float | None = declare(None, "Frames per second that clips are read at. [default: their own]", number(above=0))
    repeats: int = declare(1, "Times that an epoch repeats the data.", whole(1))
    caption_dropout: float = declare(0.0, "Share of samples that are trained with an empty caption.", number(0, 1))
    background: str = declare("white", "Colour behind transparent pixels.", NAME)
    cache: Path | None = declare(None, "Folder for latents and prompt embeddings. [default: OUTPUT/cache]")
    max_length: int = declare(1024, "Tokens of a text; longer ones are cut.", whole(2))

    # diffusion
    timesteps: str | None = declare(
        None,
        "Distribution of timesteps: uniform, logit-normal or shifted. [default: logit-normal for flow matching, "
        "shifted with two experts, else uniform]",
        _one_of("uniform", "logit-normal", "shifted"),
    )
    shift: float | None = declare(
        None, "Shift towards noise for --timesteps shifted. [default: the scheduler's]", number(above=0)
    )

    # looking on
    save_every: int = declare(0, "Steps between checkpoints; 0: only at the end.", whole(0))
    keep: int = declare(2, "Checkpoints that are kept.", whole(1))
    resume: bool = declare(False, "Go on at the last checkpoint of --output.")
    sample_every: int = declare(0, "Steps between samples; 0: none.", whole(0))
    sample_prompts: tuple[str, ...] = declare((), "Prompt of a sample.", flag=Flag(each=str))
    validation_data: str = declare("", "Held-out data, as for --data.")
    validate_every: int = declare(0, "Steps between losses on held-out data; 0: none.", whole(0))
    tensorboard: bool = declare(False, "Write events for TensorBoard as well.")
    timeout_s: float = declare(
        TIMEOUT_S, "Timeout for a message of another rank, in seconds.", TIMEOUT, flag=Flag("timeout")
    )
