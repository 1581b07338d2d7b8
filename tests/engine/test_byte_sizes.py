"""Numbers of bytes as people write them."""

from __future__ import annotations

import pytest

from shardit import EngineArgs, InputError
from shardit.settings.byte_sizes import byte_size


def test_units() -> None:
    for text, count in {"2GiB": 2 << 30, "500MB": 500_000_000, "1.5k": 1500, "64 KiB": 65536, "7": 7, "9b": 9}.items():
        assert byte_size(text) == count
    assert byte_size(12) == 12
    assert byte_size(None) == byte_size(1.5) == byte_size(True) == 0


@pytest.mark.parametrize("text", ["", "0", "GiB", "-1", "2TiB", "two", "1e3"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(InputError, match="kv_cache_memory must be a number of bytes, as in 2GiB"):
        EngineArgs("tiny/llama", kv_cache_memory=text)
