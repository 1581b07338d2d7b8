"""Unmodified diffusers pipelines and language models on many devices, with the same result.

Names are imported when they are first used: importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardit.api import load as load
    from shardit.api import parallelize as parallelize
    from shardit.config import DiffusionParallelConfig as DiffusionParallelConfig
    from shardit.config import ParallelConfig as ParallelConfig
    from shardit.config import get_pp_indices as get_pp_indices
    from shardit.core.modules.hints import Plan as Plan
    from shardit.diffusion.output.output import Output as Output
    from shardit.engine.llm import LLM as LLM
    from shardit.engine.llm import EngineArgs as EngineArgs
    from shardit.engine.omni import Omni as Omni
    from shardit.errors import InputError as InputError
    from shardit.errors import RankError as RankError
    from shardit.errors import UnsupportedError as UnsupportedError
    from shardit.language.request.outputs import CompletionOutput as CompletionOutput
    from shardit.language.request.outputs import RequestOutput as RequestOutput
    from shardit.language.request.sampling_params import SamplingParams as SamplingParams
    from shardit.language.request.structured_outputs import StructuredOutputsParams as StructuredOutputsParams
    from shardit.params import OmniDiffusionSamplingParams as OmniDiffusionSamplingParams

__version__ = "0.1.0"

_PLACES = {
    "CompletionOutput": "shardit.language.request.outputs",
    "EngineArgs": "shardit.engine.llm",
    "LLM": "shardit.engine.llm",
    "RequestOutput": "shardit.language.request.outputs",
    "SamplingParams": "shardit.language.request.sampling_params",
    "StructuredOutputsParams": "shardit.language.request.structured_outputs",
    "DiffusionParallelConfig": "shardit.config",
    "InputError": "shardit.errors",
    "Omni": "shardit.engine.omni",
    "OmniDiffusionSamplingParams": "shardit.params",
    "Output": "shardit.diffusion.output.output",
    "ParallelConfig": "shardit.config",
    "Plan": "shardit.core.modules.hints",
    "RankError": "shardit.errors",
    "UnsupportedError": "shardit.errors",
    "get_pp_indices": "shardit.config",
    "load": "shardit.api",
    "parallelize": "shardit.api",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "DiffusionParallelConfig",
    "EngineArgs",
    "InputError",
    "Omni",
    "OmniDiffusionSamplingParams",
    "Output",
    "ParallelConfig",
    "Plan",
    "RankError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnsupportedError",
    "__version__",
    "get_pp_indices",
    "load",
    "parallelize",
]


def __getattr__(name: str) -> Any:
    if name == "training":
        return importlib.import_module(f"{__name__}.training")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        from shardit.loading.missing_packages import missing_package

        if (error.name or "").partition(".")[0] == __name__:
            raise
        raise missing_package(error) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
