"""Parses multipart forms that are complete and unambiguous."""

from __future__ import annotations

from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser

_PLAIN = (b"7bit", b"8bit", b"binary")


class WholeForm(MultiPartParser):
    """starlette's parser with errors for two cases: it would drop an incomplete last part, and guess the meaning of
    text in an unknown encoding. Here these raise MultiPartException."""

    _ended = False

    def on_headers_finished(self) -> None:
        """Check the headers of a part."""
        for name, value in self._current_part.item_headers:
            if name == b"content-transfer-encoding" and value.strip().lower() not in _PLAIN:
                raise MultiPartException(f"a part is sent as {value.decode('latin-1')}; send it as it is.")
        super().on_headers_finished()

    def on_part_end(self) -> None:
        """Check a complete part."""
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode(self._charset)
            except UnicodeDecodeError:
                raise MultiPartException(f"{part.field_name} is not {self._charset} text; send it as UTF-8.") from None
        super().on_part_end()

    def on_end(self) -> None:
        """Note the last boundary."""
        self._ended = True

    async def parse(self) -> FormData:
        """Return all parts. Raises MultiPartException."""
        form = await super().parse()
        if not self._ended:
            await form.close()
            raise MultiPartException("it ends before its last boundary.")
        return form
