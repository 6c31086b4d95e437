"""Scores of completions by a reward model: a folder of a finished `reward` run, or any classifier with one label."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from align_kit import log, machine
from align_kit.data.shapes import Row

if TYPE_CHECKING:
    import torch

    from align_kit.models.source import Source

CHUNK_ROWS = 256  # rendered together, and sorted by length among themselves
BATCH_TOKENS = 16_384  # of a batch, padding included
OPTION = "--reward-model"


def scoring_source(name: str) -> Source:
    """Return where the weights of a reward model are; raises `UserError` for what is none."""
    from align_kit.models import source

    found = source.resolve(name, option=OPTION)
    source.check_scores(found, OPTION)
    return found


class Scorer:
    """A reward model with its own tokenizer, on the accelerator where there is one."""

    def __init__(self, name: str) -> None:
        log.quiet()
        machine.choose_accelerator(os.environ)
        import torch

        from align_kit.data.render import Renderer
        from align_kit.models import load, source

        found = scoring_source(name)
        words = load.load_tokenizer(found)
        assert isinstance(words.pad_token_id, int)
        self.digest = source.digest(found)
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model: Any = load.load_policy(found, dtype=dtype, seed=0, head="score", pad_token_id=words.pad_token_id)
        load.check_vocabulary(model, words, name)
        self.model = model.eval().to(self.device)
        self.padding = words.pad_token_id
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.renderer = Renderer(words)

    def scores(self, rows: Iterable[Row], sides: Sequence[str]) -> Iterator[tuple[float, ...]]:
        """Yield the score of each of `sides` of each canonical row; NaN for one that is longer than the model reads."""
        rows = iter(rows)
        while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
            splits = self.renderer.completions(chunk, sides)
            flat = iter(self._sequences([[*one.prompt, *ids] for one in splits for ids in one.completions]))
            for _ in chunk:
                yield tuple(itertools.islice(flat, len(sides)))

    def _sequences(self, sequences: Sequence[list[int]]) -> list[float]:
        """Return the scores of sequences of tokens, those of about one length computed together."""
        found = [math.nan] * len(sequences)
        fitting = [place for place, ids in enumerate(sequences) if 0 < len(ids) <= self.longest]
        batch: list[int] = []
        for place in sorted(fitting, key=lambda place: len(sequences[place])):
            if batch and (len(batch) + 1) * len(sequences[place]) > BATCH_TOKENS:
                self._score(batch, sequences, found)
                batch = []
            batch.append(place)
        if batch:
            self._score(batch, sequences, found)
        return found

    def _score(self, places: Sequence[int], sequences: Sequence[list[int]], found: list[float]) -> None:
        import torch

        from align_kit.forward.scores import sequence_scores

        with torch.no_grad():
            scores = sequence_scores(self.model, self._batch([sequences[place] for place in places]))
        for place, score in zip(places, scores.tolist(), strict=True):
            found[place] = score

    def _batch(self, sequences: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        import torch

        width = max(map(len, sequences))
        ids_BT = torch.tensor([[*ids, *[self.padding] * (width - len(ids))] for ids in sequences], device=self.device)
        lengths_B = torch.tensor([len(ids) for ids in sequences], device=self.device)
        mask_BT = (torch.arange(width, device=self.device) < lengths_B[:, None]).long()
        return {"input_ids": ids_BT, "attention_mask": mask_BT}
