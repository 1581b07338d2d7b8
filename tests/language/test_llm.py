"""`LLM`: prompts are grouped over stages, and each gets the same text as alone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardit import LLM, EngineArgs, InputError, SamplingParams
from tests.language.folders import TURN, tokenizer, write

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["x" * length + "y" for length in (1, 2, 3, 5, 9, 17, 33, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llama"), eos_token_id=[1, 2])


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[LLM]:
    with LLM(folder, pipeline_parallel_size=2, device="cpu", timeout_s=60) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[tuple[int, ...]]:
    """The tokens with which transformers continues each prompt alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in PROMPTS:
        ids = tokenizer()(prompt, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=12, eos_token_id=None)
        found.append(tuple(out[0, ids["input_ids"].shape[1] :].tolist()))
    return found


def tokens(llm: LLM, prompts: list[str], params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    return [one.outputs[0].token_ids for one in llm.generate(prompts, params)]


def test_a_row_does_not_depend_on_its_neighbours(two: LLM, plain: list[tuple[int, ...]]) -> None:
    assert tokens(two, PROMPTS) == plain
    assert tokens(two, PROMPTS[::-1]) == plain[::-1]
    assert [tokens(two, [prompt])[0] for prompt in PROMPTS] == plain
    assert len(set(plain)) > 4  # control: swapped rows would be detected


@pytest.mark.parametrize("stages", [1, 3])
def test_number_of_stages(folder: Path, two: LLM, plain: list[tuple[int, ...]], stages: int) -> None:
    seeded = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=42, max_tokens=10, ignore_eos=True)
    expected = tokens(two, PROMPTS[:3], seeded)
    args = EngineArgs(str(folder), pipeline_parallel_size=stages, device="cpu", max_num_seqs=3, timeout_s=60)
    with LLM(**args.as_kwargs()) as llm:
        assert tokens(llm, PROMPTS) == plain
        assert tokens(llm, PROMPTS[:3], seeded) == expected


@pytest.mark.parametrize(
    "axes",
    [
        {"data_parallel_size": 2},
        {"data_parallel_size": 2, "pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
)
def test_copies_and_tensor_ranks(folder: Path, plain: list[tuple[int, ...]], axes: dict[str, int]) -> None:
    with LLM(folder, device="cpu", timeout_s=60, **axes) as llm:
        assert tokens(llm, PROMPTS) == plain
        assert tokens(llm, PROMPTS[:1]) == plain[:1]


UNDER_TORCHRUN = """
import os, sys
from shardit import LLM, SamplingParams

with LLM(sys.argv[1], pipeline_parallel_size=2, device="cpu", timeout_s=60) as llm:
    made = llm.generate(["xy", "xxy"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
sys.stdout.write(f"{os.environ['RANK']} {[one.outputs[0].token_ids for one in made]}\\n")
"""


@pytest.mark.full
def test_under_torchrun(folder: Path, plain: list[tuple[int, ...]], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(UNDER_TORCHRUN)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "program.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"0 {plain[:2]}", "1 []"]


def test_seeds_belong_to_a_request(two: LLM) -> None:
    seeded = SamplingParams(temperature=0.9, seed=42, max_tokens=10, ignore_eos=True)
    free = SamplingParams(temperature=0.9, max_tokens=10, ignore_eos=True)
    alone = tokens(two, ["ab"], seeded)[0]
    for _ in range(2):
        outputs = two.generate(["cd", "ab", "cd", "ab"], [free, seeded, free, seeded])
        made = [one.outputs[0].token_ids for one in outputs]
        assert made[1] == made[3] == alone
        assert made[0] != made[2]
    several = two.generate("ab", SamplingParams(temperature=0.9, seed=42, max_tokens=10, n=3, ignore_eos=True))[0]
    assert [one.index for one in several.outputs] == [0, 1, 2]
    assert several.outputs[0].token_ids == alone
    assert len({one.token_ids for one in several.outputs}) == 3


def test_texts_of_one_call_have_seeds_of_their_own() -> None:
    wanted = SamplingParams(temperature=0.9, n=2, max_tokens=10, ignore_eos=True)
    with LLM("tiny/llama", device="cpu", timeout_s=60, seed=5) as llm:
        outputs = llm.generate(["ab", "ab"], wanted)
        assert len({text.token_ids for one in outputs for text in one.outputs}) == 4
        assert [[text.token_ids for text in one.outputs] for one in llm.generate(["ab", "ab"], wanted)] == [
            [text.token_ids for text in one.outputs] for one in outputs
        ]


def test_stop_strings_and_tokens(two: LLM) -> None:
    free = two.generate("xxy", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))[0].outputs[0]
    assert free.finish_reason == "length"
    text = free.text
    assert len(text) > 8
    stop = text[4:6]
    cut = two.generate("xxy", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=[stop, "never"]))
    first = text.index(stop)
    assert (cut[0].outputs[0].text, cut[0].outputs[0].finish_reason, cut[0].outputs[0].stop_reason) == (
        text[:first],
        "stop",
        stop,
    )
    token = free.token_ids[3]
    ended = two.generate("xxy", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[token]))
    assert ended[0].outputs[0].stop_reason == token
    assert ended[0].outputs[0].token_ids == free.token_ids[: free.token_ids.index(token) + 1]


def test_stop_strings_before_the_minimum(two: LLM) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    free = two.generate("xxy", SamplingParams(**options))[0].outputs[0]
    early = next(one for one in free.text[:5] if one.strip())
    least = next(n for n in range(1, 30) if early in free.text[:n]) + 4
    asked = SamplingParams(**options, stop=[early], min_tokens=least)
    found = two.generate("xxy", asked)[0].outputs[0]
    assert len(found.token_ids) >= least
    assert early in found.text
    place = free.text.find(early, len(tokenizer().decode(list(free.token_ids[:least]))))
    assert found.text == (free.text if place < 0 else free.text[:place])
    assert "".join(one.text for one in two.stream("xxy", asked)) == found.text


def test_temperatures_near_zero_are_greedy(two: LLM) -> None:
    greedy = two.generate("xxy", GREEDY)[0].outputs[0].token_ids
    for temperature in (1e-9, 1e-38, 1e-45):
        asked = SamplingParams(temperature=temperature, max_tokens=12, ignore_eos=True, seed=1)
        assert two.generate("xxy", asked)[0].outputs[0].token_ids == greedy
    for name, value in (("repetition_penalty", 1e-39), ("logit_bias", {20: 1e38})):
        with pytest.raises(InputError, match=name):
            SamplingParams(**{name: value})


def test_end_tokens_of_tokenizer_and_generation_config(two: LLM) -> None:
    """The temperature is so high that all tokens occur."""

    def made(**changes: Any) -> Any:
        return two.generate("x", SamplingParams(**{"temperature": 50.0, "seed": 0, "n": 16, **changes}))[0].outputs

    outputs = made(max_tokens=120)
    ended = [one for one in outputs if one.finish_reason == "stop"]
    assert {one.token_ids[-1] for one in ended} == {1, 2}
    assert all(one.stop_reason is None and TURN not in one.text for one in ended)
    assert all(one.finish_reason == "length" for one in made(max_tokens=60, ignore_eos=True))
    assert all(len(one.token_ids) > 50 for one in made(max_tokens=60, min_tokens=50))


def test_logprobs(two: LLM, folder: Path) -> None:
    output = two.generate("xy", SamplingParams(temperature=0, max_tokens=3, logprobs=2, ignore_eos=True))[0].outputs[0]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer()("xy", return_tensors="pt")["input_ids"]
    assert output.logprobs is not None
    for token, found in zip(output.token_ids, output.logprobs, strict=True):
        with torch.no_grad():
            likely = torch.log_softmax(model(ids).logits[0, -1], -1)
        best = likely.topk(2).indices.tolist()
        assert set(found) == {token, *best}
        assert all(abs(float(likely[one]) - value) < 1e-4 for one, value in found.items())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_stream(two: LLM) -> None:
    params = [GREEDY, SamplingParams(temperature=0.9, seed=3, max_tokens=30, n=2), SamplingParams(max_tokens=1)]
    prompts = ["xy", "z" * 30, "ab"]
    whole = {
        (number, text.index): text
        for number, one in enumerate(two.generate(prompts, params))
        for text in one.outputs
        if number < 2
    }
    chunks = list(two.stream(prompts, params))
    assert sum(1 for one in chunks if one.text and one.prompt_index == 0) > 3
    for (number, index), text in whole.items():
        own = [one for one in chunks if (one.prompt_index, one.index) == (number, index)]
        assert "".join(one.text for one in own) == text.text
        assert tuple(token for one in own for token in one.token_ids) == text.token_ids
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [text.finish_reason]
    stop = whole[0, 0].text[5:8]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)
    assert "".join(one.text for one in two.stream("xy", params)) == two.generate("xy", params)[0].outputs[0].text
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        next(two.stream(""))


def pids_of(llm: LLM) -> list[int]:
    return list(llm._ranks.placement.fork_server.pids)


@pytest.mark.parametrize("stages", [1, 2])
def test_closing_a_stream_stops_generation(
    folder: Path, two: LLM, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts end with their present step, and the ranks keep running: later prompts are answered soon."""
    with LLM(folder, device="cpu", timeout_s=60) if stages == 1 else contextlib.nullcontext(two) as llm:
        expected = tokens(llm, ["xy"])
        ranks = pids_of(llm)
        long = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
        stream = llm.stream(["x"] * stages, long)
        steps: list[Any] = []
        take = llm._ranks._on_message
        monkeypatch.setattr(llm._ranks._group, "_on_message", lambda *message: (steps.append(message), take(*message)))
        next(stream)
        stream.close()
        assert 0 < len(steps) < 200
        assert tokens(llm, ["xy"]) == expected
        assert pids_of(llm) == ranks


def test_chat(two: LLM) -> None:
    message = {"role": "user", "content": "hi"}
    answer = two.chat([message], GREEDY)[0]
    assert answer.prompt is None
    assert tokenizer().decode(list(answer.prompt_token_ids)) == "<user>hi<assistant>"
    assert two.generate("<user>hi<assistant>", GREEDY)[0].outputs == answer.outputs
    with pytest.raises(InputError, match="the chat template refuses the messages: roles must alternate"):
        two.chat([message, message], GREEDY)


def test_tools_that_the_template_does_not_show(two: LLM, caplog: pytest.LogCaptureFixture) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    message = {"role": "user", "content": "hi"}
    assert two.chat_prompt([message], tools=tools) == two.chat_prompt([message])
    assert caplog.messages == ["the chat template of the model shows no tools: they are left out"]


def test_invalid_arguments(two: LLM, folder: Path) -> None:
    with pytest.raises(InputError, match="prompt 0 has 300 tokens, and the model has room for 256"):
        two.generate("x" * 300)
    assert len(two.generate("x" * 250, SamplingParams(max_tokens=100, ignore_eos=True))[0].outputs[0].token_ids) == 6
    with pytest.raises(InputError, match="one for each of the 2 prompts"):
        two.generate(["a", "b"], [GREEDY])
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        two.generate("")
    with pytest.raises(InputError, match="top_p must be at most 1"):
        SamplingParams(top_p=2)
    with pytest.raises(InputError, match="max_token"):
        SamplingParams(max_token=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InputError, match=r"min_tokens=9 is more than max_tokens=3"):
        SamplingParams(min_tokens=9, max_tokens=3)
    for name, value in {"max_num_seqs": 0, "max_model_len": -1, "seed": "a", "timeout_s": 0, "device": 3}.items():
        with pytest.raises(InputError, match=name):
            LLM(folder, **{name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="there is no folder or GGUF file nowhere/at/all: check the path"):
        LLM("nowhere/at/all")
    with pytest.raises(InputError, match=r"prompt_token_ids must be from 0 to \d+, got 3 to 9999"):
        two.generate([[3, 9999]])
    with pytest.raises(InputError, match="pipeline_parallel_size=9 is more than the 4 blocks"):
        LLM(folder, pipeline_parallel_size=9, device="cpu")


def test_prompts_and_messages_are_checked_whole(two: LLM, folder: Path) -> None:
    for wrong, says in (
        (5, "prompts must be a text"),
        (None, "prompts must be a text"),
        ({"prompt": "a", "max_tokens": 3}, "a prompt takes no 'max_tokens'"),
        ({"prompt": "a", "prompt_token_ids": [3]}, "a prompt is given twice"),
        ("caf\udce9", "prompt must be valid text in UTF-8"),
    ):
        with pytest.raises(InputError, match=says):
            two.generate(wrong)  # pyright: ignore[reportArgumentType]
    for values, says in (
        ({"logprobs": 1000}, "logprobs=1000 is more than"),
        ({"stop_token_ids": [10**9]}, "stop_token"),
    ):
        with pytest.raises(InputError, match=says):
            two.generate("a", SamplingParams(**values))
    with pytest.raises(InputError, match="sampling_params must be one"):
        two.generate("a", 5)  # pyright: ignore[reportArgumentType]
    for message in ({"rol": "user", "content": "x"}, {"role": "user", "contents": "x"}):
        with pytest.raises(InputError, match="did you mean"):
            two.chat([message])
    with pytest.raises(InputError, match="messages must be valid text"):
        two.chat([{"role": "user", "content": "caf\udce9"}])
    with pytest.raises(InputError, match="messages must be a list"):
        two.chat("hello")
    with pytest.raises(InputError, match="device 'gpu' is not supported"):
        LLM(folder, device="gpu")
    with pytest.raises(InputError, match="max_model_len=257 is more than the 256 tokens"):
        LLM(folder, max_model_len=257)


def test_defaults_of_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, do_sample=True, temperature=0.5, top_k=7, repetition_penalty=1.3, eos_token_id=1)
    with LLM(folder, device="cpu", timeout_s=60) as llm:
        found = llm.get_default_sampling_params()
        assert (found.temperature, found.top_k, found.repetition_penalty) == (0.5, 7, 1.3)
        free = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = tokenizer()("xy", return_tensors="pt")
        expected = model.generate(**ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=6, eos_token_id=None)
        assert tokens(llm, ["xy"], free)[0] == tuple(expected[0, 2:].tolist())
