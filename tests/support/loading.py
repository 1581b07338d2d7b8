"""Models loaded in part or whole, without ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shardit.core.placement.slices import Owned
from shardit.diffusion.loading.pipeline import load_pipeline, prepare
from shardit.loading.dtypes import setting
from shardit.loading.safetensors_file import Reads
from shardit.settings.model_options import NO_OPTIONS, ModelOptions


def loaded(
    model: Any,
    owned: Callable[[dict[str, Any]], Mapping[str, Owned]] = lambda modules: {},
    *,
    dtype: Any = None,
    reads: Reads | None = None,
    options: ModelOptions = NO_OPTIONS,
) -> Any:
    """Return the pipeline of a model with the tensors that `owned` selects for its modules on meta: whole by
    default."""
    prepared = prepare(model, None, setting(dtype), options)
    return load_pipeline(prepared, owned(prepared.modules), reads=reads)
