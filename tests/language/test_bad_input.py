"""Mistakes of users of `LLM`, and Ctrl-C: one line with the remedy, at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import shardit
from shardit import LLM, DiffusionParallelConfig, EngineArgs, InputError, Omni, OmniDiffusionSamplingParams
from shardit import SamplingParams as Params
from shardit.cli import main
from shardit.language.loading.gguf_header import read_values
from shardit.language.loading.source import DecoderSource
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


def test_a_text_for_which_there_is_no_room(llm: LLM, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("shardit.language_commands._opened", lambda _: nullcontext(llm))
    long = ["--prompt", "x" * 250, "--ignore-eos", "--max-tokens"]
    note = "note: the model had room for 6 of --max-tokens 100\n"
    for flags, says in (
        ([*long, "100"], note),
        ([*long, "100", "--prompt", "a"], note),
        ([*long, "100", "--json"], note),
        ([*long, "6"], ""),
        (["--prompt", "x" * 250, "--ignore-eos"], ""),
    ):
        assert main(["complete", "tiny/llama", "--temperature=0", *flags]) == 0
        said = capsys.readouterr().err
        assert said.endswith(says) if says else "note:" not in said, said


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pipeline_parallel_size": "2"}, "pipeline_parallel_size must be a whole number of at least 1, got '2'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be"),
        ({"data_parallel_size": 1.5}, "data_parallel_size must be"),
        ({"layer_partition": [2, 0]}, "layer_partition"),
        ({"seed": "x"}, "seed must be a whole number"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number"),
        ({"max_num_seqs": None}, "max_num_seqs must be a whole number"),
        ({"max_model_len": 0}, "max_model_len must be"),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization must be at most 1"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"distributed_executor_backend": "spark"}, "distributed_executor_backend must be \"mp\" .*, got 'spark'"),
        ({"num_nodes": 0}, "num_nodes must be a whole number of at least 1, got 0"),
        ({"num_nodes": 2}, 'num_nodes needs distributed_executor_backend="ray"'),
        (
            {"num_nodes": 2, "pipeline_parallel_size": 3, "distributed_executor_backend": "ray"},
            "num_nodes=2: 3 ranks cannot be distributed evenly",
        ),
    ],
)
def test_values_are_checked_by_engine_args_as_by_llm(arguments: dict[str, Any], says: str) -> None:
    for callee in (EngineArgs, LLM):
        refused(says, callee, "tiny/llama", **arguments)


def test_engine_args_in_place_of_arguments() -> None:
    refused(r"give LLM\(\*\*args.as_kwargs\(\)\)", LLM, EngineArgs("tiny/llama"))
    code = "import sys, shardit; shardit.EngineArgs('a', max_num_seqs=3); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


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
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}]
    assert made({"role": "user", "content": parts}) == made({"role": "user", "content": "be short"})
    refused(r"messages\[0\]\.content\[0\] must be .* takes text only", made, {"role": "user", "content": ["x"]})


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


WITHOUT_TORCH = """
import json, sys
from shardit import LLM, InputError
from shardit.cli import main

for model, arguments, says in json.loads(sys.argv[1]):
    try:
        LLM(model, **arguments)
    except InputError as error:
        assert says in str(error), (says, str(error))
    else:
        raise AssertionError(says)
assert main(["inspect", json.loads(sys.argv[1])[0][0], "--cfg-parallel-size", "2"]) == 2
assert "torch" not in sys.modules
"""


def written_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("general.tags", ["one", "two"])
    writer.add_block_count(6)
    writer.add_context_length(64)
    writer.add_head_count(9)
    writer.add_head_count_kv(3)
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_sizes_are_refused_before_torch_is_imported(llm: LLM, tmp_path: Path) -> None:
    folder, file, other = llm._ranks.spec.model, written_gguf(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    other.write_bytes(b"PK" * 40)
    cases = [
        (folder, {"cfg_parallel_size": 2}, "cfg_parallel_size=2: a language model runs over"),
        (folder, {"pipeline_parallel_size": 9}, "pipeline_parallel_size=9 is more than the 4 blocks"),
        (folder, {"tensor_parallel_size": 3}, "num_attention_heads=4 and num_key_value_heads=2; use 1, 2 or 4"),
        (folder, {"pipeline_parallel_size": 2, "layer_partition": [1, 2]}, "layer_partition 1,2 adds up to 3"),
        (folder, {"max_model_len": 10**9}, "max_model_len=1000000000 is more than the 256 tokens"),
        (folder, {"device": "gpu"}, "device 'gpu' is not supported (use cpu or cuda)"),
        (str(file), {"ulysses_degree": 2}, "ulysses_degree=2: a language model runs over"),
        (str(file), {"pipeline_parallel_size": 7}, "pipeline_parallel_size=7 is more than the 6 blocks"),
        (
            str(file),
            {"tensor_parallel_size": 5},
            "num_key_value_heads=3; use 1, 2, 3, 4 or 9",
        ),
        (str(file), {"max_model_len": 65}, "max_model_len=65 is more than the 64 tokens"),
        (str(other), {}, "is no GGUF file"),
    ]
    if not torch.cuda.is_available():
        cases.append((folder, {"device": "cuda"}, "device 'cuda': this machine has no driver of a GPU"))
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_damaged_config(tmp_path: Path) -> None:
    for text, says in (("{", "is damaged: download"), ("[]", "is damaged, it is no dict")):
        (tmp_path / "config.json").write_text(text)
        refused(says, LLM, tmp_path)


def test_a_damaged_gguf_header(tmp_path: Path) -> None:
    whole = written_gguf(tmp_path / "a.gguf").read_bytes()
    read = read_values(tmp_path / "a.gguf")
    assert read["llama.block_count"] == 6
    assert read["general.tags"] == ["one", "two"]
    assert not any(name.startswith("tokenizer.") for name in read)
    for count in (0, 3, 9, 40, len(whole) // 2):
        (cut := tmp_path / "b.gguf").write_bytes(whole[:count])
        assert read_values(cut).items() <= read.items() or count > 40


def test_load_and_omni_name_the_devices() -> None:
    refused(r"device 'gpu' is not supported \(use cpu or cuda\)", Omni, "tiny/flux", device="gpu")
    for model in ("tiny/llama", "tiny/flux"):
        refused(r"device 'gpu' is not supported \(use cpu or cuda\)", shardit.load, model, device="gpu")
        if not torch.cuda.is_available():
            refused("0 visible; leave device out, or use cpu", shardit.load, model, device="cuda")


def test_a_tokenizer_that_cannot_be_read_ends_the_ranks(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr("shardit.engine.llm.start_ranks", lambda *_: (llm._ranks, lambda: closed.append(True)))
    monkeypatch.setattr(DecoderSource, "tokenizer", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LLM(llm._ranks.spec.model)
    assert closed


def test_a_chat_template_in_a_file(llm: LLM, tmp_path: Path) -> None:
    user = [{"role": "user", "content": "x"}]
    (path := tmp_path / "template.jinja").write_text(KNOWN_ROLES)
    expected = llm.chat_prompt(user, chat_template=KNOWN_ROLES)
    assert llm.chat_prompt(user, chat_template=path) == llm.chat_prompt(user, chat_template=str(path)) == expected
    refused(
        "chat_template is no template, and no file", llm.chat_prompt, user, chat_template=str(tmp_path / "no.jinja")
    )
    refused("drops messages with the role 'user'", llm.chat_prompt, user, chat_template="{{ 'be kind' }}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"has no tokenizer \(tokenizer.json\): download or copy the model again"),
        ("version https://git-lfs.github.com/spec/v1", "tokenizer.json is a git-lfs pointer: run `git lfs pull`"),
        ("{", "tokenizer.json is damaged: download or copy it again"),
        ("{}", "cannot read the tokenizer of .*: download or copy the model again"),
    ],
)
def test_a_damaged_tokenizer(tmp_path: Path, text: str | None, says: str) -> None:
    write(tmp_path)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    refused(says, DecoderSource(tmp_path).tokenizer)


def test_a_text_with_a_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokens = tokenizer()
    write(tmp_path, eos_token_id=[1, len(tokens) + 5])
    tokens.add_tokens(["<new>"])
    tokens.save_pretrained(tmp_path)
    with LLM(tmp_path, device="cpu", timeout_s=60) as llm:
        refused("prompt has '<new>', token 259, and the model knows those from 0 to 258", llm.generate, ["a", "b<new>"])
        made = llm.generate("a", Params(max_tokens=3, min_tokens=2, temperature=0))  # an end token beyond it, too
        assert len(made[0].outputs[0].token_ids) >= 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "generation_config.json is damaged"),
        ("[1]", "generation_config.json is damaged"),
        ('{"eos_token_id": "<end>"}', "generation_config.json: eos_token_id must be a token id or a list of these"),
    ],
)
def test_a_damaged_generation_config(tmp_path: Path, text: str, says: str) -> None:
    (write(tmp_path) / "generation_config.json").write_text(text)
    refused(says, shardit.load, tmp_path)


def test_an_adapter_beside_the_model(tmp_path: Path) -> None:
    (write(tmp_path) / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    refused("holds an adapter besides the model: give it as lora=", shardit.load, tmp_path)
    refused("has no adapter_model.safetensors", shardit.load, tmp_path, lora=str(tmp_path))


def test_values_of_the_generation_config_that_are_not_applied(tmp_path: Path, capsys: Any) -> None:
    note = "generation_config.json asks for no_repeat_ngram_size, which is not applied"
    with LLM(write(tmp_path, no_repeat_ngram_size=2), device="cpu", timeout_s=60) as llm:
        assert llm.notes == [note]
    assert main(["complete", str(tmp_path), "--prompt=a", "--max-tokens=1"]) == 0
    assert f"note: {note}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_attention_heads": "4"}, "'num_attention_heads': TypeError: Field 'num_attention_heads' expected int"),
        ({"num_attention_heads": 7}, "hidden size .* is not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "division by zero|modulo by zero"),
    ],
)
def test_a_configuration_that_transformers_refuses(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    config = write(tmp_path) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    refused(f"cannot build the model of .* from its configuration: .*({says})", shardit.load, tmp_path)


def test_a_model_that_is_no_name() -> None:
    for model in (5, ["tiny/llama"]):
        refused("model must be a folder, a hub id or tiny/NAME, got ", shardit.load, model)
