"""Packages that a pipeline needs are found before its ranks start, with the line that installs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import venv

import diffusers
import pytest

from shardit.diffusion.loading import required_packages as packages
from shardit.diffusion.output.collect import one_line
from shardit.diffusion.request.build import build_requests
from shardit.diffusion.request.pipeline_signature import signature_of
from shardit.errors import InputError, UnsupportedError
from shardit.loading import index
from shardit.loading.index import Component
from tests.support.paths import ROOT


@pytest.fixture
def lacking(monkeypatch):
    """Makes packages look as if they were not installed."""
    there = packages.is_missing
    names: set[str] = set()
    monkeypatch.setattr(packages, "is_missing", lambda name: name in names or there(name))
    return names


def test_unchecked_imports_of_pipelines(lacking):
    assert packages.needs(diffusers.WanImageToVideoPipeline) == {"ftfy": ()}
    assert packages.needs(diffusers.WanPipeline) == {}  # asks before it cleans
    assert packages.needs(diffusers.PixArtAlphaPipeline) == {}  # goes on without, and says so
    assert packages.needs(diffusers.FluxPipeline) == {}  # torch_xla: asks a flag
    assert packages.needs(diffusers.Cosmos3OmniPipeline) == {}  # has a stand-in, which says so
    assert packages.needs(diffusers.Cosmos2_5_PredictBasePipeline) == {"torchvision": ("image",)}
    assert packages.missing(diffusers.WanVACEPipeline) == {}
    lacking.add("ftfy")
    assert packages.missing(diffusers.WanVACEPipeline) == {"ftfy": ()}
    with pytest.raises(InputError, match="P needs ftfy, which is not installed: pip install ftfy"):
        packages.check_packages("P", {"ftfy": ()})


CODE = """
if is_bs4_available():
    from bs4 import BeautifulSoup
if is_opencv_available():
    import cv2
if is_xyz_available():
    import xyz
    XYZ = True
else:
    XYZ = False
class Pipe:
    def __call__(self, prompt, image=None, video=None):
        if image is not None:
            image = helper(cv2.resize(image))
        if video is not None:
            cv2.read(video)
        {more}
        return self.clean(prompt)
    def clean(self, text):
        if XYZ:
            xyz.mark()
        return text
    def unused(self):
        return BeautifulSoup()
def helper(x):
    return x
"""


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ("pass", {"cv2": ("image", "video")}),
        ("cv2.wait()", {"cv2": ()}),
        ("self.unused()", {"bs4": (), "cv2": ("image", "video")}),
        ("xyz.mark()", {"cv2": ("image", "video"), "xyz": ()}),
    ],
)
def test_the_kind_of_request_decides(more, found):
    assert dict(packages._needs(CODE.replace("{more}", more), "Pipe")) == found


def test_a_request_is_refused_and_others_run():
    takes = signature_of(diffusers.FluxKontextPipeline)
    takes = type(takes)(**{**vars(takes), "missing": {"cv2": ("image",)}})

    def build(**chosen):
        more = {"prompt": None, "negative_prompt": None, "pil_image": None, "overrides": chosen, "takes": takes}
        return build_requests("a", None, **more)

    build()
    with pytest.raises(InputError, match=r"FluxKontextPipeline needs cv2, .* pip install opencv-python"):
        build(image=(ROOT / "tests" / "none.png"))


class Tokenizer:
    text = ""

    @classmethod
    def from_pretrained(cls, folder):
        raise ValueError(cls.text)


def test_tokenizers_that_cannot_be_made(monkeypatch, tmp_path, lacking):
    monkeypatch.setattr(packages, "component_class", lambda part: Tokenizer)
    part = Component("tokenizer", "transformers", "SlowTokenizer", tmp_path)
    lacking.add("sentencepiece")
    for Tokenizer.text in ("needs the SentencePiece library", "`tokenizers` or `sentencepiece` has to be installed"):
        with pytest.raises(InputError, match=r"SlowTokenizer \(tokenizer\) needs sentencepiece, .* pip install sente"):
            packages.check_processors([part])
    Tokenizer.text = "the file is broken"
    packages.check_processors([part])  # the loading of the pipeline will say so better


def test_late_import_errors_name_the_install_command(lacking):
    lacking.add("ftfy")
    assert one_line(NameError("name 'ftfy' is not defined")).startswith(
        "NameError: name 'ftfy' is not defined; pip install ftfy"
    )
    assert "pip" not in one_line(NameError("name 'fancy' is not defined"))
    lacking.add("librosa")
    dummy = type("DummyObject", (type,), {})("AudioThing", (), {"_backends": ["torch", "librosa"]})
    with pytest.raises(UnsupportedError, match=r"AudioThing needs librosa, .* pip install librosa"):
        index._refuse_dummy(dummy, "AudioThing")


HIDE = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "ftfy":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
there = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "ftfy" else there(name, *rest)
import importlib.metadata
version = importlib.metadata.version
def hidden_version(name):
    if name == "ftfy":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden_version
"""


def test_omni_without_ftfy(tmp_path):
    """At the start, before ranks are there, and not in the middle of a request."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    code = """
    import shardit
    try:
        shardit.Omni("tiny/wan2.2-i2v", timeout_s=60)
    except shardit.InputError as error:
        print(error)
    with shardit.Omni("tiny/wan2.2-ti2v", timeout_s=60) as omni:
        try:
            omni.generate(prompt="a", pil_image=b"", num_inference_steps=1)
        except shardit.InputError as error:
            print(error)
    """
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environ, capture_output=True, text=True, timeout=120
    )
    line = "WanImageToVideoPipeline needs ftfy, which is not installed: pip install ftfy"
    assert ran.stdout.splitlines() == [line, line], ran.stderr


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_the_readme_from_its_install_lines(tmp_path):
    """An empty environment, exactly the README's install lines, and every example of it."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".venv", ".git", "build", "__pycache__", ".*cache"))
    venv.create(tmp_path / "venv", with_pip=True)
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environ |= {"PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environ |= {"SHARDIT_CACHE": str(tmp_path / "cache"), "SHARDIT_PROGRESS": "0"}

    def run(line: str) -> None:
        ran = subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environ, capture_output=True, text=True, timeout=1500
        )
        assert ran.returncode == 0, f"{line}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"

    text = (ROOT / "README.md").read_text()
    (folder / "rows.jsonl").write_text('{"text": "Once upon a time"}\n', "utf-8")
    for line in (line for block in _blocks(text, "sh") for line in block if line.startswith("pip install")):
        run(line.split("#")[0])
    run("python examples/demo.py")
    served = next(block for block in _blocks(text, "sh") if any(line.startswith("shardit serve") for line in block))
    for number, block in enumerate(_blocks(text, "python")):
        script = folder / f"readme_{number}.py"
        script.write_text("\n".join(block))
        parallel = "shardit.load(" in script.read_text() or "shardit.parallelize(" in script.read_text()
        runs = "torchrun --nproc-per-node 2" if parallel else "python"
        with_server = "openai" in script.read_text()
        run(_served(served, f"python {script.name}") if with_server else f"{runs} {script.name}")
    for block in _blocks(text, "sh"):
        for line in block:
            if line.startswith(
                ("shardit train", "shardit generate", "shardit inspect", "shardit tiny", "python examples/")
            ):
                run(line)
            elif line.startswith("curl"):
                run(_served(served, line))


def _served(server: list[str], client: str) -> str:
    """A command line that runs a client while the server runs."""
    ready = "for i in $(seq 120); do curl -sf localhost:8091/ready && break; sleep 1; done"
    return f"{server[0]} & {ready}; {client}; code=$?; kill $!; wait $!; exit $code"


def _blocks(text: str, language: str) -> list[list[str]]:
    """The code blocks of a language, with lines that go on joined."""
    found, inside = [], None
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            if inside is None:
                inside = (line[3:].strip(), [])
            else:
                if inside[0] == language:
                    found.append(inside[1])
                inside = None
        elif inside is not None:
            inside[1].append(line)
    return found
