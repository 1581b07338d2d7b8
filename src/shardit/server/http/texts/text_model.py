"""The tokenizer of the served language model, and the facts that checks of requests need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from shardit.errors import InputError
from shardit.logs import logger
from shardit.server.http.schema.errors import busy
from shardit.server.http.texts.tokenizer import load_tokenizer
from shardit.settings.lora import Lora

T = TypeVar("T")
_LOG = logger("api")


class TextModel:
    """Loads the tokenizer in a thread, which is also the only one to encode: tokenizers are not made for several. Texts
    are decoded anywhere."""

    def __init__(self, model: str, loras: Sequence[Lora] = ()):
        self._read = partial(load_tokenizer, model, loras)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._loading: asyncio.Future[Any] | None = None

    def load(self) -> asyncio.Future[Any]:
        """Begin to load; to be called in the event loop."""
        if self._loading is None or (self._loading.done() and self._loading.exception() is not None):
            self._loading = asyncio.get_running_loop().run_in_executor(self._thread, self._read)
            self._loading.add_done_callback(_report)
        return self._loading

    async def tokenizer(self) -> Any:
        """Return the tokenizer. Raises ApiError if it cannot be read."""
        try:
            return await asyncio.shield(self.load())
        except (InputError, OSError) as error:
            raise busy(f"the tokenizer of the model cannot be read: {error}", 10, "loading") from error

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run work with the tokenizer in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


def _report(loading: asyncio.Future[Any]) -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        _LOG.error("tokenizer_failed", error=str(error))
