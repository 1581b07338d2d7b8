"""The configurations of the components of a pipeline, which all ranks must have alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from shardit.core.runtime.digests import digests, short_hash


class Configurations:
    """Hashes of configurations. diffusers makes a new object for each change of one, so only new ones are hashed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, type, bytes]] = {}

    def __call__(self, pipe: Any) -> dict[str, bytes]:
        """Return the hashes of the configurations of a pipeline's components, its scheduler too, and of the number
        formats of their weights, by names for messages."""
        found = getattr(pipe, "components", None)
        parts = found if isinstance(found, dict) else vars(pipe)
        configs = {name: (getattr(part, "config", None), type(part)) for name, part in parts.items()}
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        formats = {name: next((p.dtype for p in nn.Module.parameters(part)), None) for name, part in modules.items()}
        return {
            **{
                f"configuration of {name}": self._hash(name, config, cls)
                for name, (config, cls) in configs.items()
                if isinstance(config, Mapping)
            },
            **{f"number format of {name}": short_hash(str(dtype).encode()) for name, dtype in formats.items()},
        }

    def _hash(self, name: str, config: Mapping[str, Any], cls: type) -> bytes:
        known = self._known.get(name)
        if known is not None and known[0] is config and known[1] is cls:
            return known[2]
        # Private entries list the items of sets, in any order.
        public = {key: value for key, value in config.items() if not key.startswith("_")}
        made = short_hash(cls.__qualname__.encode(), *digests({"": public}).values())
        self._known[name] = config, cls, made
        return made
