"""Loads a tokenizer of transformers into the API process, which has no torch."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from shardit.engine.process.process import command
from shardit.errors import InputError
from shardit.language.loading.adapter import use_chat_template
from shardit.language.loading.source import DecoderSource, decoder_source
from shardit.settings.lora import Lora

_LOAD_TIMEOUT_S = 300.0


def load_tokenizer(model: str, loras: Sequence[Lora] = ()) -> Any:
    """Return the tokenizer of a model, with the chat template of its adapters. From then on torch cannot be imported.
    Raises InputError."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about torch
    # transformers finds no torch then. Its tokenizers do not need it, and it would take seconds and memory.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    source = decoder_source(model)
    tokenizer = source.tokenizer() if source.gguf is None else _of_gguf(source)
    use_chat_template(tokenizer, loras)
    tokenizer("a")  # sets its own state now, while no other thread uses it
    return tokenizer


def _of_gguf(source: DecoderSource) -> Any:
    """Return the tokenizer of a GGUF file. transformers reads these with torch only, so another process does it."""
    path = str(source.folder / str(source.gguf))
    done = subprocess.run(command(__name__), input=path.encode(), capture_output=True, timeout=_LOAD_TIMEOUT_S)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"the tokenizer of {path} cannot be read: {lines[-1]}")
    return pickle.loads(done.stdout)


def main() -> None:
    """Write the tokenizer of the GGUF file whose path is on standard input to standard output, pickled."""
    path = sys.stdin.buffer.read().decode()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come in between
    with out:
        pickle.dump(decoder_source(path).tokenizer(), out)
