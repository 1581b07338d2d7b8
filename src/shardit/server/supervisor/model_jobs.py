"""Jobs by the kind of the model: how they become requests for the ranks, and how much work they are."""

from __future__ import annotations

from dataclasses import dataclass

from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.request import Request
from shardit.language.info import LanguageInfo
from shardit.language.request.rows import PromptGroup
from shardit.server.estimate import NO_WORK, Work, work_of
from shardit.server.jobs.job import Job
from shardit.server.supervisor.prefetch import Prefetcher
from shardit.server.supervisor.texts import Texts


@dataclass(frozen=True)
class PipelineJobs:
    """Jobs of a pipeline. Their files are read before they begin."""

    info: ModelInfo
    prefetcher: Prefetcher
    batched = False

    def ready(self, job: Job) -> bool:
        """Return whether a job can begin; if not, its files are being read."""
        return self.prefetcher.ready(job, self.info)

    def request(self, job: Job) -> Request:
        """Return the request of a job that is ready."""
        return self.prefetcher.take(job, self.info)

    def work(self, job: Job) -> Work:
        """Return an estimate of its work."""
        return work_of(job.request, self.info.signature)


@dataclass(frozen=True)
class TextJobs:
    """Jobs of a language model: texts, which run in batches."""

    texts: Texts
    batched = True

    def ready(self, job: Job) -> bool:
        """Return whether a job can begin: always."""
        return True

    def request(self, job: Job) -> PromptGroup:
        """Return the request of a job, with the tokens that it has already."""
        return self.texts.request(job)

    def work(self, job: Job) -> Work:
        """Return an estimate of its work, of which nothing is known."""
        return NO_WORK


def jobs_of_model(info: ModelInfo | LanguageInfo, prefetcher: Prefetcher, texts: Texts) -> PipelineJobs | TextJobs:
    """Return the kind of the jobs of a model."""
    return TextJobs(texts) if isinstance(info, LanguageInfo) else PipelineJobs(info, prefetcher)
