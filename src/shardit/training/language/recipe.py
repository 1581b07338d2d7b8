"""The recipe of a causal language model: `recipe`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import Mesh
from shardit.core.runtime.randomness import generators_kept
from shardit.errors import InputError
from shardit.language.limits import POSITION_LIMITS
from shardit.language.loading.prepared import PreparedDecoder
from shardit.language.loading.source import ALIASES, DecoderSource, decoder_source
from shardit.loading.dtypes import setting
from shardit.training.language.adapters import add_lora, old_names, train_all
from shardit.training.language.batches import MODEL, LanguageBatches
from shardit.training.language.examples import Encoder, Example, begin_conversations
from shardit.training.language.loss import causal_loss
from shardit.training.language.notes import row_notes
from shardit.training.language.only_diffusion import check_settings
from shardit.training.language.rows import TrainingRow, TrainingRows, read_rows
from shardit.training.language.samples import Writer, prompt_tokens
from shardit.training.own_share import Share, everything, share_of, whole_note
from shardit.training.recipe import TrainingRecipe
from shardit.training.settings import TrainSettings

if TYPE_CHECKING:
    from shardit.training.staged import Stages


def recipe(settings: TrainSettings, mesh: Mesh, config: DiffusionParallelConfig | None = None) -> TrainingRecipe:
    """Return the recipe for the ranks of a run; see `language_recipe`. config: None: each rank loads all."""
    return language_recipe(settings, mesh.sizes["dp"], mesh.device, share_of(config, settings.schedule, mesh))


def language_recipe(
    settings: TrainSettings, replicas: int, device: torch.device | str = "cpu", share: Share = everything
) -> TrainingRecipe:
    """Return what a run of training needs of a causal language model.

    replicas: their number in the run. share: of the weights that this rank loads. Every rank calls this and gets the
    same, but for the weights. Raises InputError for settings, rows and names of modules that do not fit.
    """
    check_settings(settings)
    source = decoder_source(settings.model)
    data = read_rows("data", settings.data)
    held_out = read_rows("validation_data", settings.validation_data) if settings.validation_data else None
    tokenizer = source.tokenizer()
    notes = _chat_notes(tokenizer, data.rows)
    model, loaded = _model(source, settings, device, share)
    maker = _Maker(settings, tokenizer, model, _ends(model, tokenizer))
    batches = maker.batches("data", data, notes)
    checked = maker.batches("validation_data", held_out, notes) if held_out is not None else None
    trained, line = _trained(model, source, settings)
    steps = batches.per_epoch / (replicas * settings.accumulation)
    return TrainingRecipe(
        models={MODEL: trained},
        loss=causal_loss,
        micro_batches=lambda step, replica, of: batches.of_step(step, replica, of, settings.accumulation),
        steps_per_epoch=steps,
        identity=_identity(settings, batches),
        save=_saver(tokenizer),
        held_out=checked.all_once if checked is not None else None,
        sample=_sampler(settings, maker, chat=data.rows[0].messages is not None),
        unit="tokens",
        notes=(*notes, *loaded, line),
    )


def _chat_notes(tokenizer: Any, rows: Sequence[TrainingRow]) -> list[str]:
    """Settle the chat template on the first conversation; return lines for the user."""
    first = next((row for row in rows if row.messages is not None), None)
    if first is None:
        return []
    notes = []
    if tokenizer.chat_template and begin_conversations(tokenizer, first):
        notes.append(f"conversations begin with {tokenizer.bos_token}, which the chat template leaves out")
    if not Encoder(tokenizer, 2).marks_answers:
        notes.append("the chat template does not mark answers with {% generation %}: whole conversations are learnt")
    return notes


def _model(
    source: DecoderSource, settings: TrainSettings, device: torch.device | str, share: Share
) -> tuple[Any, list[str]]:
    """Return the model in the type of its training, with the weights of this rank, and lines for the user."""
    chosen: Any = setting(settings.dtype)
    prepared, notes = PreparedDecoder(source, chosen), []
    stored = next(prepared.module.parameters()).dtype
    if chosen is None and stored not in (torch.bfloat16, torch.float32):
        prepared = PreparedDecoder(source, "float32")
        notes.append(f"the weights are {str(stored).removeprefix('torch.')} in the files; they are trained in float32")
    if source.gguf is not None:
        result = "the result has them in that type" if settings.full else "the adapter is trained on these"
        notes.append(f"{source.gguf}: its quantised weights are read as {_type_of(prepared.module)}; {result}")
    if getattr(prepared.module.config.get_text_config(decoder=True), "output_router_logits", False):
        notes.append("output_router_logits: the loss that balances experts is left out; only tokens are learnt")
    prepared.module.requires_grad_(settings.full)  # what is trained decides where blocks are placed
    model: Any = prepared.load_owned(share(prepared.module), device).train()
    notes += whole_note(MODEL, model, share)
    if settings.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise InputError(f"gradient_checkpointing: {type(model).__name__} of transformers has none; leave it out")
        with old_names():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, notes


def _type_of(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _trained(model: nn.Module, source: DecoderSource, settings: TrainSettings) -> tuple[nn.Module, str]:
    """Return the model of which the chosen weights are trained, the same on every rank, and a line for the user."""
    if settings.full:
        return model, train_all(model)
    base = ALIASES[settings.model].hub_id if settings.model in ALIASES else settings.model
    if settings.model.startswith("tiny/"):
        base = str(source.folder)
    with generators_kept(next(one.device for one in model.parameters() if not one.is_meta)):
        torch.manual_seed(settings.seed)
        made, line = add_lora(model, settings, base)
    return made.train(), line


def positions(model: Any) -> int | None:
    """Return the most tokens that a model takes, if its configuration has the number."""
    return next((found for one in POSITION_LIMITS if isinstance(found := getattr(model.config, one, None), int)), None)


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens at which the model ends a text."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or [])
    return frozenset([*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])


@dataclass(frozen=True)
class _Maker:
    """Makes micro-batches of rows for one model."""

    settings: TrainSettings
    tokenizer: Any
    model: Any
    ends: frozenset[int]

    def batches(self, name: str, rows: TrainingRows, notes: list[str]) -> LanguageBatches:
        """Return the micro-batches of rows; add lines for the user to `notes`."""
        encoder = Encoder(self.tokenizer, self._limit, self.ends)
        examples = encoder.examples(rows.rows)
        notes += row_notes(name, rows, encoder, examples)
        if not examples:
            raise InputError(f"{name}: no row has a token to learn: raise max_length={self._limit}, or give other rows")
        self._check(name, examples)
        settings, padding = self.settings, self.tokenizer.pad_token_id
        repeats = settings.repeats if name == "data" else 1
        return LanguageBatches(examples, settings.batch_size, repeats, settings.seed, self._limit, padding or 0)

    @property
    def _limit(self) -> int:
        """Return the most tokens of an example: no more than the model has positions."""
        return min(self.settings.max_length, positions(self.model) or self.settings.max_length)

    def _check(self, name: str, examples: Sequence[Example]) -> None:
        """Raise InputError if the tokenizer knows tokens that the model does not."""
        known = int(self.model.get_input_embeddings().weight.shape[0])
        wrong = next((one for one in examples if int(one.ids.max()) >= known), None)
        if wrong is not None:
            raise InputError(
                f"{name}: {wrong.name} has token {int(wrong.ids.max())}, but the model knows {known}: its tokenizer "
                "belongs to another model"
            )


def _identity(settings: TrainSettings, batches: LanguageBatches) -> dict[str, Any]:
    """Return what decides the micro-batches."""
    digest = hashlib.sha256()
    for one in batches.examples:
        digest.update(f"{one.name} {len(one.ids)}\n".encode())
        digest.update(one.ids.numpy().tobytes())
        digest.update(one.learnt.numpy().tobytes())
    names = ("seed", "batch_size", "repeats", "max_length")
    return {"data": digest.hexdigest(), **{name: getattr(settings, name) for name in names}}


def _saver(tokenizer: Any) -> Any:
    def save(stages: Mapping[str, Stages], folder: Path) -> None:
        """Write the folder of transformers or of peft, with the tokenizer in it."""
        stages[MODEL].save_pretrained(folder, also=lambda partial: tokenizer.save_pretrained(str(partial)))

    return save


def _sampler(settings: TrainSettings, maker: _Maker, chat: bool) -> Any:
    if not settings.sample_prompts:
        return None
    prompts = [prompt_tokens(maker.tokenizer, prompt, chat) for prompt in settings.sample_prompts]
    writer = Writer(maker.tokenizer, maker.ends, positions(maker.model))
    named = list(zip(settings.sample_prompts, prompts, strict=True))
    return lambda models, folder: writer.write(models[MODEL], named, folder)
