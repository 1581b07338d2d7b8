"""The commands and programs of README.md, docs/serving.md and examples/online_serving, as they are written."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
import typer
from PIL import Image

from shardit.cli import _app
from shardit.server.http.state.metrics import HttpMetrics
from shardit.server.supervisor.metrics import SupervisorMetrics
from tests.support.code_blocks import blocks, commands
from tests.support.http_fake import WAIT_S, Served, picture
from tests.support.paths import ROOT

OF_README, OF_SERVING, OF_TEXTS = (
    block.text for block in blocks() if block.language == "python" and "OpenAI(" in block.text
)
CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on the PATH")


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done
    return done.stdout


def test_the_table_of_settings_has_every_flag() -> None:
    command: Any = typer.main.get_command(_app())
    options = [one for one in command.commands["serve"].params if one.param_type_name == "option"]
    flags = [one.opts[0] for one in options if one.name != "help"]
    table = (ROOT / "docs/serving.md").read_text("utf-8").partition("### Settings")[2].partition("\n### ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    assert sorted(re.findall(r"`(--[a-z-]+)", " ".join(rows))) == sorted(flags)


@CURL
@pytest.mark.parametrize("line", commands("curl"))
def test_commands_of_the_docs(line: str, images: Served, videos: Served, texts: Served, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(picture())
    served = images if "/v1/images" in line else texts if "complet" in line or "tokenize" in line else videos
    line = line.replace("localhost:8091", f"localhost:{served.port}")
    if "video_..." in line:
        line = line.replace("video_...", videos.call("POST", "/v1/videos", {"prompt": "a cat"})[1]["id"])
    said = run(["sh", "-c", line.replace("curl ", "curl -sS ")], tmp_path)
    assert not said.startswith('{"error"')
    if "-o cat.mp4" in line:
        av.open(str(tmp_path / "cat.mp4")).close()
    else:
        assert any(f'"{name}"' in said for name in ("b64_json", "status", "choices", "tokens"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of OpenAI's own service
def test_the_program_of_the_docs(
    images: Served, videos: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head, of_images, of_videos = re.split(r"# From .*\n", OF_SERVING)
    for served, rest in ((images, of_images), (videos, of_videos)):
        exec(head.replace("localhost:8091", f"localhost:{served.port}") + rest, {})
    Image.open("cat.png").close()
    av.open("cat.mp4").close()
    Path("cat.mp4").unlink()
    exec(OF_README.replace("localhost:8091", f"localhost:{videos.port}"), {})
    av.open("cat.mp4").close()


def test_the_program_with_texts(texts: Served, capsys: pytest.CaptureFixture[str]) -> None:
    exec(OF_TEXTS.replace("localhost:8091", f"localhost:{texts.port}"), {})
    assert capsys.readouterr().out == "<user>Name three\n<user>Name three"


@CURL
def test_the_script_with_curl(images: Served, tmp_path: Path) -> None:
    said = run(["sh", str(ROOT / "examples/online_serving/curl.sh"), images.url], tmp_path)
    assert "event: finished" in said
    for name in ("cat.png", "dog.png"):
        Image.open(tmp_path / name).close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_program_with_openai(
    images: Served, videos: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(served: Served, *flags: Any) -> None:
        arguments = ["openai_client.py", "--base-url", f"{served.url}/v1", "--prompt", "a cat", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / "examples/online_serving/openai_client.py"), run_name="__main__")

    main(images, "--output", tmp_path / "cat.png", "--seed", 3)
    Image.open(tmp_path / "cat.png").close()
    main(videos, "--output", tmp_path / "cat.mp4", "--seconds", 1)
    av.open(str(tmp_path / "cat.mp4")).close()
    with pytest.raises(SystemExit, match="this server makes videos"):
        main(videos, "--output", tmp_path / "cat.png")


def test_the_list_of_metrics() -> None:
    text = (SupervisorMetrics().text() + HttpMetrics().text()).decode()
    families = re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)
    section = (ROOT / "docs/serving.md").read_text().split("## Observe")[1].split("\n## ")[0]
    assert sorted(re.findall(r"`(shardit_\w+)", section)) == sorted(families)
