"""Hub ids, against a stand-in hub on this machine: only needed files are asked for, and errors are one line."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardit.models import tiny
from tests.language.adapters import plain_peft, write_adapter
from tests.language.folders import tokenizer, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by id (a folder, or an error status) and the received requests, as (method, path) pairs."""

    repos: dict[str, Path | str]
    asked: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    sent: dict[str, int] = field(default_factory=dict)
    endpoint: str = ""

    def files(self, method: str) -> set[str]:
        """The files that were asked for with a method since the log was cleared."""
        found = (re.match(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path) for kind, path in self.asked if kind == method)
        return {match[1] for match in found if match}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *_):
        pass

    def reply(self, status: int, data: bytes = b"", body: bool = True, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        if self.command == "HEAD" or "/api/models/" in path:
            self.hub.tokens.add(self.headers.get("Authorization"))
        api = re.match(r"/api/models/([^/]+/[^/]+)(?:/(tree|revision)/([^/]+))?$", path)
        file = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path)
        match = api or file
        repo = self.hub.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self.reply(404, body=body, X_Error_Code="RepoNotFound")
        if repo == "gated":
            return self.reply(403, body=body, X_Error_Code="GatedRepo")
        if isinstance(repo, str):
            return self.reply(int(repo), body=body)
        return self.tree(repo, api[2]) if api else self.file(repo, match[3], body)

    def tree(self, repo: Path, kind: str | None) -> None:
        paths = sorted(p for p in repo.rglob("*") if p.is_file())
        listed = [{"type": "file", "path": p.relative_to(repo).as_posix(), "size": p.stat().st_size} for p in paths]
        for each in listed:
            each["oid"] = sha1(each["path"].encode()).hexdigest()
        info = {"id": "x/y", "sha": COMMIT, "siblings": [{"rfilename": each["path"]} for each in listed]}
        self.reply(200, json.dumps(listed if kind == "tree" else info).encode(), Content_Type="application/json")

    def file(self, repo: Path, name: str, body: bool) -> None:
        if not (repo / name).is_file():
            return self.reply(404, body=body, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        data = (repo / name).read_bytes()
        etag = f'"{sha1(data).hexdigest()}"'
        common = {"ETag": etag, "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            common["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if body:
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(data)
        return self.reply(status, data, body=body, **common)


@pytest.fixture
def hub(tmp_path):
    """A hub with wan2.2-t2v, whose repository also holds everything that must not be downloaded."""
    repo = shutil.copytree(tiny.resolve("tiny/wan2.2-t2v"), tmp_path / "repo")
    extra = """README.md wan-single.safetensors old.ckpt .gitattributes onnx/model.onnx assets/a.json lora/a.safetensors
        transformer/diffusion_pytorch_model.fp16.safetensors transformer/diffusion_pytorch_model.bin
        transformer/diffusion_pytorch_model.safetensors.index.fp16.json vae/model.onnx text_encoder/pytorch_model.bin
        text_encoder/pytorch_model.bin.index.json text_encoder/flax_model.msgpack text_encoder/code.py"""
    for name in extra.split():
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(b"x" * 100)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    made = Hub({"us/wan": repo, "us/gated": "gated", "us/broken": "500", "us/plain": empty, "us/denied": "403"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": made}))
    made.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


IMPORTS = "from shardit.loading.hub import HubRemote, Path\nfrom shardit.loading.source import locate"


def client(hub: Hub, home: Path, code: str, **env: str) -> list[str]:
    """Run code in a process of its own that sees the stand-in hub; returns the lines it printed."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{IMPORTS}\n{code}"],
        env={**kept, **settings, **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def needed(repo: Path, weights: bool) -> set[str]:
    original = tiny.resolve("tiny/wan2.2-t2v")
    files = {p.relative_to(original).as_posix() for p in original.rglob("*") if p.is_file()}
    folders = {name for name, value in json.loads((repo / "model_index.json").read_text()).items() if name[0] != "_"}
    files = {f for f in files if f == "model_index.json" or ("/" in f and f.split("/")[0] in folders)}
    return files if weights else {f for f in files if not f.endswith(".safetensors")}


def test_only_needed_files(hub, tmp_path):
    home = tmp_path / "home"
    folder = Path(client(hub, home, "print(locate('us/wan', weights=False).folder)", HF_TOKEN="hf_secret")[0])
    repo = hub.repos["us/wan"]
    # GET is left out for files whose content came under another name, as transformer_2's config did.
    assert hub.files("HEAD") == needed(repo, weights=False)
    assert hub.files("GET") <= hub.files("HEAD")
    assert hub.tokens == {"Bearer hf_secret"}
    assert folder.name == COMMIT
    hub.asked.clear()

    file = next(f for f in sorted(needed(repo, weights=True)) if f.startswith("transformer/") and "safetensors" in f)
    client(hub, home, f"HubRemote('us/wan', Path({str(folder)!r})).fetch([{file!r}])")
    assert hub.files("HEAD") == {file}
    assert (folder / file).read_bytes() == (repo / file).read_bytes()
    hub.asked.clear()

    assert client(hub, home, "print(locate('us/wan').folder)") == [str(folder)]
    held = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert held == needed(repo, weights=True)
    assert file not in hub.files("GET") | hub.files("HEAD")
    hub.asked.clear()

    assert client(hub, home, "print(locate('us/wan').folder)", HF_HUB_OFFLINE="1") == [str(folder)]
    assert not hub.asked
    hub.repos["us/wan"] = "500"  # the hub is down: the cache is used
    assert client(hub, home, "print(locate('us/wan').folder)") == [str(folder)]


PIPELINE = """
from pathlib import Path
from shardit.diffusion.loading.description import describe
from shardit.diffusion.loading.pipeline import load_pipeline, prepare
found = describe('us/wan')
def held():
    return sorted({p.parent.name for p in found.folder.rglob('*.safetensors')})
print(found.nbytes, held())
prepared = prepare('us/wan')
owned = {name: lambda n: False for name in prepared.modules}
owned |= {'transformer': lambda n: n.split('.')[0] != 'blocks', 'vae': lambda n: True}
pipe = load_pipeline(prepared, owned)
print(pipe.config._name_or_path, held())
import diffusers
want = diffusers.DiffusionPipeline.from_pretrained('us/wan')
assert dict(pipe.config) == dict(want.config)
pairs = list(zip(pipe.transformer.parameters(), want.transformer.parameters(), strict=True))
assert all(p.is_meta or p.equal(q) for p, q in pairs)
print(sum(not p.is_meta for p, _ in pairs))
"""


def test_a_pipeline_from_the_hub_downloads_its_part(hub, tmp_path):
    described, loaded, owned = client(hub, tmp_path / "home", PIPELINE)
    weights = sum((hub.repos["us/wan"] / f).stat().st_size for f in needed(hub.repos["us/wan"], True) if "safeten" in f)
    size, _, held = described.partition(" ")
    assert 0.9 * weights < int(size) <= weights
    assert held == "[]"
    assert loaded == "us/wan ['transformer', 'vae']"
    assert int(owned) > 0


ERRORS = """
from shardit.errors import InputError
for model in {models!r}:
    try:
        print('no error', locate(model))
    except InputError as error:
        print(str(error).replace('\\n', 'NEWLINE'))
"""


def test_errors(hub, tmp_path):
    asked = {
        "us/none": "there is no model 'us/none'",
        "us/gated": "is gated: accept its terms",
        "us/plain": "is not a diffusers pipeline (no model_index.json)",
        "us/broken": "answered 500",
        "us/denied": "",
        "bad--id!/x": "there is no folder bad--id!/x",
    }
    lines = client(hub, tmp_path / "home", ERRORS.format(models=list(asked)))
    assert len(lines) == len(asked)
    for line, (model, says) in zip(lines, asked.items(), strict=True):
        assert says in line, line
        assert model in line
        assert "NEWLINE" not in line
    (line,) = client(hub, tmp_path / "home", ERRORS.format(models=["us/wan"]), HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in line
    (line,) = client(hub, tmp_path / "home", ERRORS.format(models=["us/wan"]), HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot reach http://127.0.0.1:9" in line


EARLY = """
from shardit.diffusion.preflight import preflight
from shardit.config import DiffusionParallelConfig
from shardit.settings.model_options import model_options
def check(**dtype):
    try:
        preflight.check("us/wan", DiffusionParallelConfig(), model_options(), dtype=dtype)
        print("left to the ranks")
    except ValueError as error:
        print(error)
check(transformer="float32")
check(nope="float32")
"""


def test_names_are_known_before_anything_else_is_fetched(hub, tmp_path):
    """Only of an index that is sure to be that of the commit that will be loaded."""
    first = client(hub, tmp_path / "home", EARLY.replace('check(transformer="float32")', ""))
    assert "has no component 'nope'" in first[0]
    assert hub.files("GET") == {"model_index.json"}
    hub.asked.clear()
    assert client(hub, tmp_path / "home", EARLY) == ["left to the ranks"] * 2
    said = client(hub, tmp_path / "home", EARLY, HF_HUB_OFFLINE="1")
    assert said[0] == "left to the ranks"
    assert "has no component 'nope'" in said[1]
    assert not hub.asked


def test_weights_that_cannot_be_used(hub, tmp_path):
    repo = hub.repos["us/wan"]
    for path in (repo / "vae").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    (line,) = client(hub, tmp_path / "home", ERRORS.format(models=["us/wan"]))
    assert "us/wan/vae holds only pickled weights" in line


DECODER = """
from pathlib import Path
import shardit, torch
from shardit import DiffusionParallelConfig
from shardit.language.loading.prepared import PreparedDecoder
from shardit.language.loading.source import decoder_source, named_decoder
from shardit.language.sharding import lay_out_decoder
assert named_decoder('us/wan') is None and named_decoder('us/nowhere') is None
source = named_decoder('us/decoder')
def weights():
    return sorted(p.name for p in source.folder.glob('*.safetensors'))
print(weights())
prepared = PreparedDecoder(decoder_source('us/decoder'))
print(weights())
layout = lay_out_decoder(prepared.module, DiffusionParallelConfig(pipeline_parallel_size=2))
half = prepared.load(layout, {'pp': 0, 'tp': 0}, 'cpu')
print(weights())
assert any(p.is_meta for p in half.parameters()) and not all(p.is_meta for p in half.parameters())
print(source.tokenizer()('abc').input_ids)
model = shardit.load('us/decoder')
print(weights())
print(model.generate(torch.tensor([[70, 71]]), max_new_tokens=4, do_sample=False).tolist())
"""


def test_language_models(hub, tmp_path):
    """A stage fetches the weight files that it needs; the cache serves where the hub cannot be asked."""
    tokens, home = tokenizer(), tmp_path / "home"
    (tmp_path / "decoder").mkdir()
    repo = write(tmp_path / "decoder", eos_token_id=1)
    plain = AutoModelForCausalLM.from_pretrained(repo).eval()
    (repo / "model.safetensors").unlink()
    plain.save_pretrained(repo, max_shard_size="40KB")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "README.md", "original/model.safetensors"):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_bytes(b"x" * 100)
    hub.repos["us/decoder"] = repo
    files = sorted(path.name for path in repo.glob("*.safetensors"))
    assert len(files) > 3
    expected = plain.generate(torch.tensor([[70, 71]]), max_new_tokens=4, do_sample=False).tolist()

    before, built, half, ids, after, made = map(ast.literal_eval, client(hub, home, DECODER))
    assert before == built == []
    assert 0 < len(half) < len(files)
    assert ids == tokens("abc")["input_ids"]
    assert after == files
    assert made == expected
    taken = hub.files("HEAD") | hub.files("GET")
    assert "README.md" not in taken
    assert not any(name.startswith(("pytorch_model", "original/")) for name in taken)
    assert client(
        hub, home, "import shardit; print(type(shardit.load('us/decoder')).__name__)", HF_HUB_OFFLINE="1"
    ) == ["LlamaForCausalLM"]
    wrong = "import shardit\ntry:\n    shardit.LLM({!r})\nexcept shardit.InputError as error:\n    print(error)"
    assert "is not a model of transformers (no config.json)" in client(hub, home, wrong.format("us/wan"))[0]
    assert "there is no model 'us/nowhere'" in client(hub, home, wrong.format("us/nowhere"))[0]


ADAPTED = """
import shardit, torch
model = shardit.load({model!r}, lora={lora!r})
print(model.generate(torch.tensor([[70, 71]]), max_new_tokens=4, do_sample=False).tolist())
"""


def test_adapters_of_language_models(hub, tmp_path):
    """The two files of an adapter are fetched by its hub id, and the cache serves afterwards."""
    (tmp_path / "decoder").mkdir()
    base, repo, home = write(tmp_path / "decoder", eos_token_id=1), tmp_path / "adapter", tmp_path / "home"
    write_adapter(repo, base, target_modules=["q_proj", "v_proj", "lm_head"])
    (repo / "optimizer.pt").write_bytes(b"x" * 100)
    hub.repos.update({"us/decoder": base, "us/adapter": repo})
    ids = torch.tensor([[70, 71]])
    (expected, plain) = (
        plain_peft(base, *adapters).generate(ids, max_new_tokens=4, do_sample=False).tolist()
        for adapters in ([(repo, 0.5)], [])
    )
    assert expected != plain
    code = ADAPTED.format(model="us/decoder", lora="us/adapter:0.5")
    assert ast.literal_eval(client(hub, home, code)[0]) == expected
    assert "optimizer.pt" not in hub.files("GET")
    assert ast.literal_eval(client(hub, home, code, HF_HUB_OFFLINE="1")[0]) == expected
    call = "shardit.LLM('us/decoder', lora={!r})"
    wrong = f"import shardit\ntry:\n    {call}\nexcept shardit.InputError as error:\n    print(error)"
    error = "us/decoder is not an adapter of peft (no adapter_config.json): choose a repository that has one"
    assert client(hub, home, wrong.format("us/decoder")) == [error]
    assert "there is no model 'us/nowhere'" in client(hub, home, wrong.format("us/nowhere"))[0]
