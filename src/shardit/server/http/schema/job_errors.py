"""Errors of jobs as clients see them."""

from __future__ import annotations

import re

from pydantic import BaseModel, Field

from shardit.server.jobs.job import Job

_CLIENTS_FAULT = ("invalid_request", "generation_failed", "out_of_memory")
"""Codes of job errors that a different request would avoid."""


class JobError(BaseModel):
    """Reason of a job without result."""

    code: str
    message: str
    param: str | None = Field(description="The field of the request that must change, if it is known.")


def job_error(job: Job) -> JobError | None:
    """Return why a job has ended without a result; None if it has not."""
    if job.state == "cancelled":
        return JobError(code="cancelled", message="the job was cancelled", param=None)
    if job.state != "failed":
        return None
    error = job.error or {}
    code, reason = str(error.get("code", "failed")), str(error.get("message", "no reason is known"))
    return JobError(code=code, message=reason, param=_field_named(job, reason) if is_clients_fault(code) else None)


def is_clients_fault(code: str) -> bool:
    """Return whether a different request would avoid an error."""
    return code in _CLIENTS_FAULT


def _field_named(job: Job, reason: str) -> str | None:
    """Return the only field of a request that the reason of its failure names; None if there is no such one. Advice
    (`diffusion/request/advice.py`) decides if there is one. Names that are also plain words must be quoted."""
    _, advice, said = reason.rpartition("; perhaps ")
    shown_as = {"width": "size", "height": "size", "num_outputs_per_prompt": "n"}
    shown_as["image"] = job.view.get("image_field", "image")
    given = {**job.request, **job.request.get("extra_args", {}), **({"image": ""} if job.inputs else {})}
    plain = [name for name in given if "_" in name or advice]
    named = {shown_as.get(one, one) for one in plain if re.search(rf"\b{one}\b", said)}
    named |= {shown_as.get(one, one) for one in given if re.search(rf"[`'\"]{one}\b", said)}
    return named.pop() if len(named) == 1 else None
