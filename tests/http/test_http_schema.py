"""The OpenAPI document against the API process: requests that follow it and requests that do not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.support.http_fake import IMAGE, VIDEO, Served, serving
from tests.support.text_fake import served_texts

# What the model at hand takes is more than a schema can say.
_NOT_CHECKED = [positive_data_acceptance]
_KINDS = {"image": IMAGE, "video": VIDEO}


@pytest.mark.parametrize("kind", ["image", "video", "text"])
def test_answers_are_as_documented(kind: str, tmp_path: Path) -> None:
    assert _try_out(kind, tmp_path, examples=12) >= 250  # of each kind


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["image", "video", "text"])
def test_many_answers_are_as_documented(kind: str, tmp_path: Path) -> None:
    assert _try_out(kind, tmp_path, examples=200) >= 5000


def _try_out(kind: str, folder: Path, examples: int) -> int:
    """Number of requests; every answer is checked."""
    serve = served_texts if kind == "text" else functools.partial(serving, info=_KINDS[kind])
    with serve(folder, queue_size=10**6) as served:
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        session = requests.Session()
        count = 0
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.NEGATIVE and not _can_be_wrong(operation):
                    continue
                count += _try_operation(served, operation, mode, examples, session)
        assert served.process.poll() is None
        return count


def _can_be_wrong(operation: Any) -> bool:
    # Any text is an id, if not one of a job.
    return bool(operation.body) or any(not item.name.endswith("_id") for item in operation.iter_parameters())


def _try_operation(
    served: Served, operation: Any, mode: GenerationMode, examples: int, session: requests.Session
) -> int:
    count = 0
    ids = [job.id for kind in ("image", "video") for job in served.store.page(kind, owner=None, limit=5)[0]]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        nonlocal count
        count += 1
        if "job_id" in case.path_parameters and ids and count % 3 and mode is GenerationMode.POSITIVE:
            case.path_parameters["job_id"] = ids[count % len(ids)]  # one that exists
        response = case.call(session=session)
        try:
            case.validate_response(response, excluded_checks=_NOT_CHECKED)
        except FailureGroup as failures:
            raise AssertionError("\n".join(str(failure) for failure in failures.exceptions)) from None

    check()
    return count
