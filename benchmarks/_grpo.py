"""TRL's GRPO trainer on stored completions: its own update, and the same with log-probabilities by our forward.

Both are `trl.GRPOTrainer` with its own loop, loss and engine. Where it would write and score completions it is handed
stored ones, laid out as it lays them out: prompts padded on the left, completions on the right. The second trainer
differs in one method: where TRL runs the model on all rows, it asks `forward.logprobs` for the same numbers.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from align_kit.forward.door import door_of, open_door
from align_kit.forward.logprobs import token_logps
from benchmarks._caught import in_place_of_training
from benchmarks._duel import duel
from benchmarks._stock import SAME, allow_a_second_engine
from benchmarks._world import Shape

Row = tuple[list[int], list[int], float]  # prompt, completion and advantage
SAME_LOSS = 1e-5


def rollout(
    lengths: Iterator[int], decay: float, longest: int, generations: int, vocab_size: int, draw: random.Random
) -> Iterator[Row]:
    """Yield random completions to random prompts of `lengths`: geometric, ending with probability decay / longest."""
    for length in lengths:
        prompt = [draw.randrange(2, vocab_size) for _ in range(length)]
        for _ in range(generations):
            count = min(longest, 1 + int(draw.expovariate(decay / longest)))
            yield prompt, [draw.randrange(2, vocab_size) for _ in range(count)], draw.gauss(0, 1)


class Stock(trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer, its completions given: `steps` are this rank's rows of each step."""

    steps: Sequence[Sequence[Row]]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        prompts, completions, advantages = zip(*self.steps[self.state.global_step], strict=True)
        prompt_ids, prompt_mask = _padded(prompts, self.processing_class.pad_token_id, "left")
        completion_ids, completion_mask = _padded(completions, self.processing_class.pad_token_id, "right")
        return {
            "prompt_ids": prompt_ids, "prompt_mask": prompt_mask,
            "completion_ids": completion_ids, "completion_mask": completion_mask,
            "advantages": torch.tensor(advantages),
            # Of a policy to which all tokens are alike: the loss then depends on every log-probability of ours.
            "old_per_token_logps": torch.full(completion_ids.shape, -math.log(self.model.config.vocab_size)),
            "num_items_in_batch": self.accelerator.gather(completion_mask.sum()).sum(),
        }  # fmt: skip


class Walked(Stock):
    """The same with log-probabilities and entropies by our forward."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        lengths_B = attention_mask.sum(1)
        left_B = attention_mask.argmax(1)  # where the prompt begins
        columns_T = torch.arange(input_ids.shape[1])
        ids_BT = input_ids.gather(1, (columns_T + left_B[:, None]).clamp(max=input_ids.shape[1] - 1))
        prompts_B = input_ids.shape[1] - logits_to_keep - left_B
        within_BT = columns_T < lengths_B[:, None]
        batch = {
            "input_ids": ids_BT,
            "attention_mask": within_BT.long(),
            "loss_mask": (within_BT & (columns_T >= prompts_B[:, None])).long(),
        }
        tokens = token_logps(model, batch, entropy=True, temperature=self.temperature)
        # Column t speaks of token t + 1: a completion's first column is the one before its first token.
        back_BT = torch.arange(logits_to_keep) + (prompts_B - 1)[:, None]
        back_BT = back_BT.clamp(max=tokens.logps_BT.shape[1] - 1)
        assert tokens.entropy_BT is not None
        return tokens.logps_BT.gather(1, back_BT), tokens.entropy_BT.gather(1, back_BT), None


def _padded(rows: Sequence[Sequence[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    ids = [torch.tensor(row) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side),
        pad_sequence(masks, batch_first=True, padding_side=side),
    )


def trainer(kind: type[Stock], ours: Any, model: str, steps: Sequence[Sequence[Row]], forward: str, place: str) -> Any:
    """Return TRL's trainer, or ours, with the options and the engine of the run `ours`."""
    options = {name: getattr(ours.args, name) for name in SAME if name != "max_length"}
    options |= {"deepspeed": copy.deepcopy(ours.args.hf_deepspeed_config.config), "output_dir": place}
    options |= {"report_to": "none", "disable_tqdm": True, "beta": 0.0, "max_steps": len(steps)}
    allow_a_second_engine()
    made = kind(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=trl.GRPOConfig(num_generations=ours.args.num_generations, **options),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),  # TRL wants one; nothing is scored here
        train_dataset=Dataset.from_dict({"prompt": [" t2"] * 4096}),  # nor is this read
        processing_class=ours.processing_class,
    )
    made.steps = steps
    if kind is Walked:
        open_door(made.model, forward)
    return made


def updates(argv: list[str], report: str, steps: list[list[list[Row]]], model: str, forward: str, **how: Any) -> int:
    """Run `align-kit argv…` up to its training, let both of TRL's trainers take that place, and write what they did.

    `steps` are the rows of each rank at each step.
    """
    def dueled(ours: Any) -> dict[str, Any]:
        rank = ours.args.process_index
        mine = [ranks[rank] for ranks in steps]
        kinds = {"stock": Stock, "ours": Walked}
        both = {name: trainer(kind, ours, model, mine, forward, f"{report}-{name}") for name, kind in kinds.items()}
        tracks = duel(both, ["time"] * len(mine), Shape(**how["shape"]), how["threads"])
        found = {name: asdict(track) for name, track in tracks.items()}
        return {**found, "door": asdict(door_of(both["ours"].model))}

    return in_place_of_training(argv, report, dueled)


def seconds_of(found: Sequence[dict[str, Any]], warm: int) -> tuple[list[float], list[float]]:
    """Return the seconds of TRL's steps and of ours after the first `warm`, on the slowest rank of each.

    Exits where losses differ or a forward of ours was plain.
    """
    for rank in found:
        if rank["door"]["plain"] or rank["door"]["walked"] != len(rank["ours"]["seconds"]):
            raise SystemExit(f"not every forward of ours was walked: {rank['door']}")
    for pair in zip(*(_mean_losses(found, who) for who in ("stock", "ours")), strict=True):
        if not abs(pair[0] - pair[1]) <= SAME_LOSS * max(1.0, abs(pair[0])):
            raise SystemExit(f"TRL's loss is {pair[0]:.8f} and ours {pair[1]:.8f}")
    stock, ours = (
        [max(each) for each in zip(*(rank[who]["seconds"] for rank in found), strict=True)][warm:]
        for who in ("stock", "ours")
    )
    return stock, ours


def _mean_losses(found: Sequence[dict[str, Any]], who: str) -> list[float]:
    return [statistics.fmean(each) for each in zip(*(rank[who]["losses"] for rank in found), strict=True)]
