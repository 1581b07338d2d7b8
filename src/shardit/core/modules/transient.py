"""Changes that a forward makes to its own modules and reverts before it returns: no other call may see them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from shardit.core.modules.fingerprint import Fingerprint
from shardit.core.modules.state.module_state import State, differences

MAX_SAMPLES = 4
"""Maximum number of attribute comparisons in one call; they take longer than comparisons of modules."""


class TransientChanges:
    """Modules of a model and their attributes during one call. state: returns the present attributes. before: the
    attributes at the start of the call."""

    def __init__(self, state: Callable[[], State], model: nn.Module, before: State):
        self._state, self._before, self._modules = state, before, Fingerprint(model)
        self._states: list[State] = []
        self._other_modules = False

    def sample(self) -> None:
        """Compare the model with its state at the start of the call. Called during the call."""
        self._other_modules = self._other_modules or self._modules.changed()
        if len(self._states) < MAX_SAMPLES:
            self._states.append(self._state())

    def found(self, after: State) -> list[str]:
        """Return the names of attributes that differed only during the call, as far as they are known. after: the
        attributes at its end."""
        names = [
            name
            for state in self._states
            for outside in (False, True)
            for name in {*differences(self._before, state, outside)} & {*differences(state, after, outside)}
        ]
        return sorted({*names}) + (["its modules"] if self._other_modules and not self._modules.changed() else [])
