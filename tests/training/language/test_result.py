"""The adapter of a run of `shardit train` runs with the model again: in the terminal, over stages, over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardit import LLM, EngineArgs, SamplingParams
from shardit.cli import main
from shardit.language.loading.source import decoder_source
from tests.language.adapters import plain_peft
from tests.support.real_server import real_server

MODEL, PROMPT, COUNT = "tiny/llama", "the cat", 12
TALK = [{"role": "user", "content": "hi"}]
STAGES = ("--pipeline-parallel-size", "2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 4)
    flags = ["--steps", "8", "--learning-rate", "2e-2", "--lora-rank", "4"]
    output = folder / "out"
    assert main(["train", "--model", MODEL, "--data", str(folder / "rows.jsonl"), "--output", str(output), *flags]) == 0
    (output / "chat_template.jinja").write_text("{% for one in messages %}[{{ one.content }}]{% endfor %}")
    return output


@pytest.fixture(scope="module")
def expected(trained: Path) -> list[int]:
    """The tokens of plain transformers with the adapter that plain peft merges."""
    source = decoder_source(MODEL)
    model: Any = plain_peft(source.folder, (trained, 1.0))
    ids = source.tokenizer()(PROMPT, return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=COUNT, eos_token_id=None)
    return out[0, ids["input_ids"].shape[1] :].tolist()


def completed(capsys: pytest.CaptureFixture[str], *flags: str) -> list[int]:
    capsys.readouterr()
    greedy = ["--temperature", "0", "--max-tokens", str(COUNT), "--ignore-eos"]
    assert main(["complete", MODEL, "--prompt", PROMPT, "--json", *greedy, *flags]) == 0
    return json.loads(capsys.readouterr().out)[0]["outputs"][0]["token_ids"]


def test_in_the_terminal(trained: Path, expected: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert completed(capsys, *STAGES, "--lora", str(trained)) == expected
    assert completed(capsys, *STAGES, "--lora", f"{trained}:0") != expected  # control: the adapter changes tokens


def test_llm_and_the_chat_template_of_the_adapter(trained: Path, expected: list[int]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    args = EngineArgs(MODEL, pipeline_parallel_size=2, lora=[(trained, 1.0)], device="cpu", timeout_s=60)
    with LLM(**args.as_kwargs()) as llm:
        assert list(llm.generate(PROMPT, greedy)[0].outputs[0].token_ids) == expected
        (prompt,) = llm.chat_prompt(TALK).values()
        assert llm.get_tokenizer().decode(prompt) == "[hi]"


def test_over_http(trained: Path, expected: list[int], tmp_path: Path) -> None:
    with real_server("llama", tmp_path / "data", *STAGES, "--lora", str(trained), "--log-format", "json") as server:
        body = {"model": MODEL, "temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
        status, answer = server.patiently("POST", "/v1/completions", {**body, "prompt": PROMPT})
        assert status == 200, answer
        assert answer["choices"][0]["text"] == decoder_source(MODEL).tokenizer().decode(
            expected, skip_special_tokens=True
        )
        status, answer = server.patiently("POST", "/v1/chat/completions", {**body, "messages": TALK})
        assert status == 200, answer
        assert answer["usage"]["prompt_tokens"] == len(decoder_source(MODEL).tokenizer()("[hi]").input_ids)


MISTAKES = {
    "complete {out} --prompt x": "{out} holds an adapter, no model: give the model that it was trained on ({base}), "
    "and this folder as lora (--lora {out})",
    "serve {out}": "{out} holds an adapter, no model",
    "inspect {out}": "{out} holds an adapter, no model",
    "generate --model {out} --prompt x": "{out} holds an adapter, no model",
    "train --model {out} --data {out} --output x": "--model {out} holds an adapter, no model: give the model that "
    "it was trained on ({base}); its run goes on with --output {out} --resume",
    "generate --model tiny/flux --lora {out} --prompt x": "lora {out} is an adapter of a language model (task_type "
    "CAUSAL_LM in adapter_config.json): give it to shardit complete, chat or serve with the model that it was trained "
    "on ({base})",
    "complete tiny/qwen3 --prompt x --lora {out}": "lora {out} does not fit: it was trained on {base}, which is llama, "
    "and the model is qwen3",
    "complete tiny/llama --prompt x --lora {out}:nan": "lora {out}: the scale must be a finite number, got nan",
    "serve tiny/llama --lora {out} --lora nothing": "lora nothing does not exist: correct the path",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes(command: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"out": str(trained), "base": str(decoder_source(MODEL).folder)}
    capsys.readouterr()
    assert main(command.format(**values).split()) == 2
    err = capsys.readouterr().err
    assert MISTAKES[command].format(**values) in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_diffusers_do_not_read_it(trained: Path) -> None:
    """Neither through `load`, whose checks come with the pipeline."""
    import shardit

    with pytest.raises(shardit.InputError, match=r"is an adapter of a language model"):
        shardit.load("tiny/flux", lora=str(trained), device="cpu", dtype=torch.float32)
