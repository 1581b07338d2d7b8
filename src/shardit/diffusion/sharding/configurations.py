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
        hashes: dict[str, bytes] = {}
        for name, part in parts.items():
            if isinstance(config := getattr(part, "config", None), Mapping):
                hashes[f"configuration of {name}"] = self._hash(name, config, type(part))
            if isinstance(part, nn.Module):
                dtype = next((parameter.dtype for parameter in part.parameters()), None)
                hashes[f"number format of {name}"] = short_hash(str(dtype).encode())
        return hashes

    def _hash(self, name: str, config: Mapping[str, Any], cls: type) -> bytes:
        known = self._known.get(name)
        if known is not None and known[0] is config and known[1] is cls:
            return known[2]
        # Private entries list the items of sets, in any order.
        public = {key: value for key, value in config.items() if not key.startswith("_")}
        made = short_hash(cls.__qualname__.encode(), *digests({"": public}).values())
        self._known[name] = config, cls, made
        return made
