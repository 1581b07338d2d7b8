"""Text jobs of the fake supervisor: the text repeats the prompt, token by token."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from shardit.language.info import LanguageInfo
from shardit.language.request.outputs import GroupOutput, RowResult
from shardit.language.request.rows import PromptRow
from shardit.models.tiny.language import tokenizer
from shardit.server.jobs.job import Job
from shardit.server.jobs.text_request import group_of, stored_results
from shardit.server.messages import Tokens
from shardit.server.options import LANGUAGE
from tests.support.http_fake import FakeSupervisor, Served, serving

END = 1
LIMIT = 64
_POLL_INTERVAL_S = 0.03
INFO = LanguageInfo(LIMIT, 258, {"eos_token_id": END})


@functools.cache
def _tokenizer() -> Any:
    return tokenizer()


def ids(text: str) -> list[int]:
    """The tokens of a text, which are its bytes."""
    return _tokenizer()(text)["input_ids"]


def text_of(tokens: Any) -> str:
    return _tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def served_texts(folder: Path, **options: Any) -> Any:
    """As `serving`, with a language model that has room for LIMIT tokens."""
    return serving(folder, INFO, **{"model": "tiny/llama", "task": LANGUAGE, **options})  # type: ignore[arg-type]


def repeated(row: PromptRow) -> RowResult:
    """The result of a row: its prompt again and again, until an end token, a stop string or its length."""
    made: list[int] = []
    reason, stop = "", None
    while not reason:
        made.append(row.prompt[len(made) % len(row.prompt)])
        stops = [(text_of(made).find(one), one) for one in row.params.stops if one in text_of(made)]
        if made[-1] == END or stops:
            reason, stop = "stop", min(stops)[1] if stops else None
        elif len(made) == row.params.max_tokens:
            reason = "length"
    values = [{one: -0.5, **({END: -2.0} if row.params.logprobs else {})} for one in made]
    return tuple(made), reason, stop, values if row.params.logprobs is not None else None


def run_text(supervisor: FakeSupervisor, job: Job, wait_s: Any) -> None:
    """Run a text job. A prompt with "slow" takes 50 ms for each token, one with "fail" fails after two tokens."""
    rows = group_of(job.request).rows
    results = [repeated(row) for row in rows]
    prompt = text_of(rows[0].prompt)
    shown = [tokens[:-1] if reason == "stop" and stop is None else tokens for tokens, reason, stop, _ in results]
    wait_s(_POLL_INTERVAL_S)  # in which the server has looked into the store
    for step in range(max(map(len, shown))):
        wait_s(0.05 if "slow" in prompt else 0)
        supervisor.tell(Tokens(job.id, tuple(row[step] if step < len(row) else None for row in shown)))
        if job.id in supervisor.store.to_cancel():
            supervisor.store.finish(job.id, "cancelled")
            return
        if "fail" in prompt and step == 1:
            supervisor.store.finish(job.id, "failed", error={"code": "ranks_died", "message": "a rank died"})
            return
    wait_s(_POLL_INTERVAL_S)
    supervisor.store.finish(job.id, "completed", details=stored_results(GroupOutput(results)))


def ask(served: Served, path: str = "chat/completions", **body: Any) -> tuple[int, Any]:
    """Status and answer of a request; a text in `prompt` is the only message of a chat."""
    if path.startswith("chat") and "prompt" in body:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    return served.call("POST", f"/v1/{path}", body)[:2]


def chunks(answer: bytes) -> list[Any]:
    """The chunks of a stream, without the mark at its end, which has to be there."""
    blocks = [block for block in answer.decode().split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]", answer
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def joined(found: list[Any], index: int = 0) -> tuple[str, str | None]:
    """The text of a stream, and its finish reason."""
    text, reason = "", None
    for chunk in found:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                assert reason is None, "a chunk after the last"
                text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
                reason = choice["finish_reason"]
    return text, reason
