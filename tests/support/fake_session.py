"""A session without a model: the start-up of test_launch.py and the faults of test_omni_faults.py.

The model's name is a script for the start, a prompt one for `generate`, each with words such as "kill:1": on rank 1,
kill this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from PIL import Image

from shardit.diffusion.output.output import Output
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.pipeline_signature import PipelineSignature
from shardit.engine.process.channel import Channel
from shardit.engine.process.messages import Progress, RequestFinished
from shardit.errors import InputError, UnsupportedError

PRELOAD = ()  # neither torch nor diffusers: these tests start many processes

SIGNATURE = PipelineSignature("FakePipeline", ("prompt", "num_inference_steps", "note"))


def check(spec: Any) -> None:
    act(spec.model, "check")


class Session:
    def __init__(self, spec: Any, *, rank: int, world_size: int, init_method: str):
        self.rank = rank
        self.leads = rank == 0
        self.world_size = world_size
        self.info = ModelInfo(SIGNATURE, notes=(init_method,))
        act(spec.model, "start", rank)

    def serve(self, channel: Channel) -> None:
        """One request after the other. An InputError is as one that cannot be loaded."""
        while True:
            begin = channel.recv()

            def report(_: int, step: int, total: int, key: int = begin.key) -> None:
                if self.leads:
                    channel.send(Progress(key, step, total))

            try:
                output = self.generate([begin.load()], report)
            except InputError as error:
                channel.send(RequestFinished(begin.key, None, error=str(error), rejected=True))
            else:
                channel.send(
                    RequestFinished(begin.key, "start", output=next(iter(output.values()), None), peak_bytes=1)
                )

    def generate(self, requests: list[Any], on_progress: Any) -> dict[int, Any]:
        outputs = {}
        for request in requests:
            steps = request.kwargs.get("num_inference_steps", 2)
            for step in range(steps):
                on_progress(request.index, step + 1, steps)
            begin = time.monotonic()
            act(request.prompt, "run", self.rank)
            metrics = {
                "pid": os.getpid(),
                "span": (begin, time.monotonic()),
                "main": sorted(vars(sys.modules["__main__"])),
                "threads": os.environ["OMP_NUM_THREADS"],
            }
            output = Output(request.prompt, request.seed, pictures(request.prompt), metrics=metrics)
            outputs[request.index] = output
        return outputs if self.rank == 0 else {}

    def close(self) -> None:
        pass


def pictures(prompt: str) -> list[Image.Image]:
    count = int(prompt.partition("pictures:")[2] or 0)
    return [Image.effect_noise((1024, 1024), 50).convert("RGB") for _ in range(count)]


def act(script: str, when: str, rank: int = 0) -> None:
    """Run the words of `script`; skip those that begin with the name of another moment."""
    for word in script.split():
        moment, _, deed = word.rpartition(".")
        name, _, argument = deed.partition(":")
        if (moment or "run") == when and (name == "sleep" or argument in ("", str(rank))):
            DEEDS.get(name, lambda _: None)(argument)


def kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(_: str) -> None:
    time.sleep(0.2)  # after its peers, which see a connection go
    raise KeyError("no such block")


def peer(_: str) -> None:
    raise RuntimeError("[/pytorch/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:33333")


def refuse(_: str) -> None:
    raise InputError("more stages than blocks")


def unsupported(_: str) -> None:
    raise UnsupportedError("a model of another kind")


def orphan(_: str) -> None:
    subprocess.Popen(["sleep", "1000"])


def hang(_: str) -> None:
    time.sleep(1000)


DEEDS = {
    "kill": kill,
    "stop": stop,
    "fail": fail,
    "peer": peer,
    "refuse": refuse,
    "unsupported": unsupported,
    "orphan": orphan,
    "abort": lambda _: os.abort(),
    "exit": lambda _: os._exit(3),
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "hang": hang,
}
