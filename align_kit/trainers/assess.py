"""What policy, value function, reference and rewards make of completions that were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from align_kit.data.collate import LanguageCollator
from align_kit.forward.logprobs import tokens_and_values
from align_kit.frozen import Frozen
from align_kit.models.load import evaluating
from align_kit.trainers import experience
from align_kit.trainers.experience import Columns
from align_kit.trainers.rewards import Judged, Rewards
from align_kit.trainers.rollout import Written

Prompt = Mapping[str, Any]  # a row of prompts: "prompt_ids", "prompt" as the data has it, "answer"


@dataclass(frozen=True)
class Assessor:
    """Turns completions into the columns that PPO learns from; `batch_size` of them at a time."""

    tokenizer: Any
    reference: Frozen
    rewards: Rewards
    temperature: float
    batch_size: int
    device: torch.device

    def __call__(self, engine: nn.Module, prompts: Sequence[Prompt], written: Sequence[Written]) -> Columns:
        """Return the columns of all completions, without gradient; every rank calls it with as many rows.

        One role computes after the other, over all batches: under ZeRO-3 each change of role costs a new trace of
        the order in which modules run.
        """
        cuts = [slice(at, at + self.batch_size) for at in range(0, len(written), self.batch_size)]
        batches = [self._batch(prompts[cut], written[cut]) for cut in cuts]
        with evaluating(engine):
            own = [self._own(engine, batch) for batch in batches]
            reference = [self._reference(engine, batch) for batch in batches]
            rewards = [
                self._rewards(engine, prompts[cut], written[cut], batch)
                for cut, batch in zip(cuts, batches, strict=True)
            ]
        parts = zip(batches, own, reference, rewards, strict=True)
        return experience.stacked([{**a, **b, **c, **d} for a, b, c, d in parts])

    def _batch(self, prompts: Sequence[Prompt], written: Sequence[Written]) -> Columns:
        """Return prompt and completion as one row each, padded on the right, with the writer's log-probabilities."""
        rows = [(row["prompt_ids"], one) for row, one in zip(prompts, written, strict=True)]
        collated = LanguageCollator(self.tokenizer.pad_token_id)(
            [
                {"input_ids": [*prompt, *one.ids], "loss_mask": [0] * len(prompt) + [1] * len(one.ids)}
                for prompt, one in rows
            ]
        )
        writer = [[0.0] * (len(prompt) - 1) + one.logps for prompt, one in rows]
        longest = collated["input_ids"].shape[1] - 1
        collated["writer_logps"] = torch.tensor([row + [0.0] * (longest - len(row)) for row in writer])
        collated["ended"] = torch.tensor([one.ended for one in written])
        return {name: values.to(self.device) for name, values in collated.items()}

    def _own(self, engine: nn.Module, batch: Columns) -> Columns:
        policy, values_BT = tokens_and_values(engine, batch, temperature=self.temperature, entropy=True)
        assert policy.entropy_BT is not None
        return {"logps": policy.logps_BT, "entropy": policy.entropy_BT.sum(1), "values": values_BT}

    def _reference(self, engine: nn.Module, batch: Columns) -> Columns:
        return {"reference_logps": self.reference.token_logps(engine, batch, temperature=self.temperature).logps_BT}

    def _rewards(
        self, engine: nn.Module, prompts: Sequence[Prompt], written: Sequence[Written], batch: Columns
    ) -> Columns:
        judged = Judged(
            prompts=[self._prompt(row) for row in prompts],
            completions=self.texts(written),
            completion_ids=[one.ids for one in written],
            answers=[row.get("answer") for row in prompts],
            ended=[one.ended for one in written],
            batch=batch,
        )
        total_B, each_BJ = self.rewards(engine, judged)
        return {"scores": total_B, "each_score": each_BJ}

    def _prompt(self, row: Prompt) -> Any:
        """Return a prompt as the data had it, or what its tokens say."""
        return row["prompt"] if row.get("prompt") is not None else self.tokenizer.decode(row["prompt_ids"])

    def texts(self, written: Sequence[Written]) -> list[str]:
        """Return the completions as text."""
        return list(self.tokenizer.batch_decode([one.ids for one in written], skip_special_tokens=True))
