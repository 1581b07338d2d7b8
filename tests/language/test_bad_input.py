"""Mistakes of users of `LLM`, and Ctrl-C: one line with the remedy, at once."""

from __future__ import annotations

import subprocess
import sys
import time

INTERRUPTED = """
import sys, time
import shardit.engine.llm as llm
from shardit.language.loading.source import DecoderSource

def interrupt(*_):
    raise KeyboardInterrupt

DecoderSource.tokenizer = lambda self: time.sleep(60)
llm.start_ranks = interrupt
try:
    llm.LLM("tiny/llama")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupted_start_does_not_wait_for_the_tokenizer() -> None:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)
    assert time.monotonic() - begin < 30
