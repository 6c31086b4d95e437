"""Sampling and scoring on all cores: the prompts are split over processes forked from one that has torch imported."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Completions of `prompts` by the model in `folder`; with `references` also how well it predicts those."""

    folder: str
    prompts: tuple[str, ...]
    places: tuple[int, ...]  # of the prompts among all: what is drawn depends on them, not on who draws it
    samples: int
    temperature: float
    seed: int
    max_new_tokens: int
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a job gave: completions by prompt, and the negative log-likelihood of the references with their tokens."""

    completions: list[list[str]]
    nll: float = 0.0
    tokens: int = 0


def work(job: Job) -> Answer:
    """Do one job in this process, on one thread."""
    import torch

    from align_kit.models import generate

    torch.set_num_threads(1)
    model, tokenizer = generate.open_model(job.folder)
    completions = generate.complete(
        model,
        tokenizer,
        job.prompts,
        keys=job.places,
        samples=job.samples,
        temperature=job.temperature,
        max_new_tokens=job.max_new_tokens,
        seed=job.seed,
    )
    nll, tokens = generate.nll(model, tokenizer, job.prompts, job.references) if job.references else (0.0, 0)
    return Answer(completions, nll, tokens)


def spread(folder: Path, prompts: Sequence[str], processes: int, **options: Any) -> Answer:
    """Do one job with its prompts split over `processes`; the result does not depend on their number."""
    references = options.pop("references", ())
    jobs = [
        Job(
            str(folder),
            tuple(prompts[i::processes]),
            tuple(range(len(prompts))[i::processes]),
            references=tuple(references[i::processes]),
            **options,
        )
        for i in range(processes)
    ]
    import torch  # noqa: F401 - imported once here, so that the forks have it
    import transformers  # noqa: F401

    with multiprocessing.get_context("fork").Pool(processes) as pool:
        parts = pool.map(work, jobs, chunksize=1)
    completions: list[list[str]] = [[] for _ in prompts]
    for i, part in enumerate(parts):
        completions[i::processes] = part.completions
    return Answer(completions, sum(part.nll for part in parts), sum(part.tokens for part in parts))
