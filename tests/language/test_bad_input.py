"""Mistakes of users of `LLM`, and Ctrl-C: one line with the remedy, at once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shardit import LLM, DiffusionParallelConfig, EngineArgs, InputError, Omni, OmniDiffusionSamplingParams
from shardit import SamplingParams as Params
from shardit.language.request.messages import chat_tokens
from tests.language.folders import tokenizer, write


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(write(tmp_path_factory.mktemp("llama")), device="cpu", timeout_s=60) as one:
        yield one


def refused(says: str, act: Callable[..., object], *args: Any, **options: Any) -> None:
    with pytest.raises(InputError, match=says) as caught:
        act(*args, **options)
    assert "\n" not in str(caught.value)


def test_prompts(llm: LLM) -> None:
    for prompts, says in (
        ({"prompt": "a", "max_tokens": 3}, r"a prompt takes no 'max_tokens': it is a field of SamplingParams"),
        ({"promt": "a"}, r"a prompt takes no 'promt' \(did you mean 'prompt'\?\); it takes: prompt, prompt_token_ids"),
        ([], "the list of prompts is empty"),
        (b"abc", "prompts must be a text, a dict, ids or a list of them, got b'abc'"),
        ([b"abc"], 'a prompt is a text, {"prompt": text}'),
        ([[True, False]], 'a prompt is a text, {"prompt": text}'),
    ):
        refused(says, llm.generate, prompts)
        refused(says, lambda given: next(llm.stream(given)), prompts)


def test_sampling_params(llm: LLM) -> None:
    for params in (OmniDiffusionSamplingParams(), [], {}, "", 0):
        refused(
            "sampling_params must be one SamplingParams, or one for each of the 1 prompts", llm.generate, "a", params
        )


def test_arguments(llm: LLM) -> None:
    field = r"LLM\.{} takes no 'max_tokens': it is a field of SamplingParams, give SamplingParams\(max_tokens=2\)"
    for method in (llm.generate, llm.stream, llm.chat):
        refused(field.format(method.__name__), method, "a", max_tokens=2)
    refused(r"takes no 'use_tqmd' \(did you mean 'use_tqdm'\?\); it takes: prompts, ", llm.generate, "a", use_tqmd=True)
    refused(r"takes 2 arguments without a name \(prompts, sampling_params\), got 3", llm.generate, "a", Params(), True)
    refused("LLM.generate: missing a required argument: 'prompts'", llm.generate)
    refused("chat_prompt takes no 'tool'", llm.chat_prompt, [], tool=[])
    refused("takes 1 argument without a name.* such as parallel_config=", Omni, "tiny/flux", DiffusionParallelConfig())
    refused("takes 1 argument without a name.* such as parallel_config=", LLM, "tiny/llama", DiffusionParallelConfig())
    refused("EngineArgs takes no 'enforce_eager'; it takes: model, pipe", EngineArgs, enforce_eager=True)


def test_names_that_are_proposed() -> None:
    """Each once, and none that is refused."""
    with pytest.raises(InputError, match="LLM takes no 'enforce_eager'; it takes: ") as caught:
        LLM("tiny/llama", enforce_eager=True)
    names = str(caught.value).partition("it takes: ")[2].split(", ")
    assert sorted(names) == sorted(["parallel_config", *EngineArgs.names()])
    refused("cfg_parallel_size=2: a language model runs over", LLM, "tiny/llama", cfg_parallel_size=2)


def test_messages(llm: LLM) -> None:
    user = {"role": "user", "content": "x"}
    for messages, says in (
        ([], "the list of messages is empty"),
        ([[]], "a conversation must be a list of messages that is not empty"),
        (["x"], "a conversation must be a list of messages"),
        ([user, "x"], r"messages\[1\] must be"),
        ([{**user, "rol": "user"}], r"messages\[0\] has 'rol' \(did you mean 'role'\?\); keys: role, content, "),
        ([{**user, "contents": "y"}], r"messages\[0\] has 'contents' \(did you mean 'content'\?\)"),
        ([user, {"content": "x"}], r"messages\[1\] has no role"),
        ([{"role": "", "content": "x"}], "has no role"),
        ([{"role": "user"}], "must have content that is a text, got None"),
        ([{"role": "user", "content": 5}], "must have content that is a text, got 5"),
    ):
        refused(says, llm.chat, messages)
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert llm.chat_prompt([user, calls, {"role": "tool", "content": "3", "tool_call_id": "a", "name": "f"}])


KNOWN_ROLES = (
    "{% for one in messages %}{% if one.role in ('user', 'system') %}<{{ one.role }}>{{ one.content }}{{ one.mood }}"
    "{% endif %}{% endfor %}"
)


def test_roles_and_keys_that_the_template_does_not_know() -> None:
    def made(*messages: dict[str, Any]) -> list[int]:
        return chat_tokens(tokenizer(), messages, KNOWN_ROLES, None, False)

    user = {"role": "user", "content": "x"}
    refused("the chat template drops messages with the role 'usr'", made, {"role": "usr", "content": "x"}, user)
    assert made({"role": "system", "content": "be short"}, user)
    assert len(made({**user, "mood": "good"})) == len(made(user)) + 4  # the template asks for it
    refused("has 'mod'", made, {**user, "mod": "good"})


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
