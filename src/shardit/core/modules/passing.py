"""Changes that a forward makes to its own modules and takes back: no other call may see them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from shardit.core.modules.fingerprint import Fingerprint
from shardit.core.modules.state.module_state import State, differences

LOOKS = 4
"""How often attributes are compared in one call, which takes longer than comparing modules."""


class Passing:
    """The modules of a model and their attributes during one call. state: takes the attributes. before: those when it
    began."""

    def __init__(self, state: Callable[[], State], model: nn.Module, before: State):
        self._state, self._before, self._modules = state, before, Fingerprint(model)
        self._states: list[State] = []
        self._other_modules = False

    def look(self) -> None:
        """Compare the model with the beginning of the call. Called in the middle of it."""
        self._other_modules = self._other_modules or self._modules.changed()
        if len(self._states) < LOOKS:
            self._states.append(self._state())

    def found(self, after: State) -> list[str]:
        """Return the names of attributes that were others in the middle of the call only, as far as they are known.
        after: the attributes at its end."""
        names = [
            name
            for state in self._states
            for outside in (False, True)
            for name in {*differences(self._before, state, outside)} & {*differences(state, after, outside)}
        ]
        return sorted({*names}) + (["its modules"] if self._other_modules and not self._modules.changed() else [])
