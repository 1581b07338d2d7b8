"""Tiny language models: folders of transformers with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.models.tiny.cache import PREFIX, cache_root, fingerprint
from shardit.models.tiny.progress_bar import no_progress_bar
from shardit.models.tiny.weights import fill

if TYPE_CHECKING:
    import torch

_SIZES = {"hidden_size": 64, "num_hidden_layers": 4}
_ATTENTION = {**_SIZES, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_ATTENTION, "max_position_embeddings": 512}),
    "qwen3": ("Qwen3Config", {**_ATTENTION, "max_position_embeddings": 512, "tie_word_embeddings": True}),
    "mamba": ("MambaConfig", {**_SIZES, "state_size": 8}),
}
"""The class of the configuration in transformers, and its values, by the names of tiny models."""

TEMPLATE = (
    "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def language_folder(model: str) -> Path | None:
    """Return the folder of "tiny/NAME" in the cache, written on first use; None for what is no tiny language model."""
    name = model.removeprefix(PREFIX)
    if not model.startswith(PREFIX) or name not in CONFIGURATIONS:
        return None
    folder = cache_root() / "tiny" / f"{name}-{fingerprint()}"
    if not folder.is_dir():
        try:
            write(name, folder)
        except OSError:
            if not folder.is_dir():  # else another process finished the same
                raise
    return folder


def write(name: str, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a model, in another folder first: the folder is whole or absent. Raises OSError if it exists and is not
    empty."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _save(name, scratch, dtype)
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _save(name: str, folder: Path, dtype: torch.dtype | None) -> None:
    import torch
    import transformers

    tokens, (kind, values) = tokenizer(), CONFIGURATIONS[name]
    config = getattr(transformers, kind)(vocab_size=len(tokens), bos_token_id=None, eos_token_id=1, **values)
    with torch.random.fork_rng(devices=[]):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    fill(model, name)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=1)
    model.should_save_on_this_rank = lambda is_main_process=True: True
    with no_progress_bar():
        model.to(dtype or torch.float32).eval().save_pretrained(str(folder))
    tokens.save_pretrained(str(folder))


def tokenizer() -> Any:
    """Return a tokenizer of bytes, with a token for padding and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<end>"]
    letters = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=made, pad_token=specials[0], eos_token=specials[1])
    out.chat_template = TEMPLATE
    return out
