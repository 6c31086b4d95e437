"""The completions of one PPO iteration, known whole to every rank, and the mini-batches drawn from them.

Ranks write and score their own rows, then share them: N rows of some ids and floats, next to nothing beside a model.
So advantages are whitened over all tokens, mini-batches are drawn from all rows, and neither depends on the number of
ranks. Shapes: N completions over all ranks, T tokens of prompt and completion, padded on the right; per-token columns
have T - 1 entries, the one at t speaks of token t + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align_kit.data.balance import Group, deal
from align_kit.losses import explained_variance, gae, shaped_rewards, token_kl, whiten

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Shaping:
    """How scores become advantages; names are those of `PPOConfig`."""

    gamma: float
    lam: float
    kl_estimator: str
    whiten_rewards: bool
    whiten_advantages: bool


def share(mine: Columns, accelerator: Any) -> Columns:
    """Return the rows of all ranks, rank by rank: columns are padded with 0 to the longest row anywhere."""
    longest = torch.tensor([mine["input_ids"].shape[1]], device=accelerator.device)
    columns = int(accelerator.gather(longest).max())
    widths = dict.fromkeys(SEQUENCES, columns) | dict.fromkeys(PER_TOKEN, columns - 1)
    padded = {name: widened(values, widths.get(name)) for name, values in mine.items()}
    return {name: accelerator.gather(padded[name].contiguous()) for name in sorted(padded)}


SEQUENCES = ("input_ids", "attention_mask", "loss_mask")
PER_TOKEN = ("logps", "writer_logps", "reference_logps", "values")


def stacked(parts: Sequence[Columns]) -> Columns:
    """Join the columns of several batches; rows are padded with 0 to the longest of their column."""
    widths = {name: max(part[name].shape[1] for part in parts) for name in (*SEQUENCES, *PER_TOKEN)}
    names = parts[0]
    return {name: torch.cat([widened(part[name], widths.get(name)) for part in parts]) for name in names}


def widened(values: Tensor, columns: int | None) -> Tensor:
    """Return `values` with 0 on the right up to `columns`; None leaves them as they are."""
    return values if columns is None else torch.nn.functional.pad(values, (0, columns - values.shape[1]))


def learn_from(rows: Columns, scores_N: Tensor, kl_coef: float, shaping: Shaping) -> dict[str, float]:
    """Add the columns "kl", "advantages" and "returns" to `rows`; return explained variance and mean KL.

    KL (nats, summed over a completion's tokens) is that of the sampled tokens to the reference.
    """
    mask_BT = rows["loss_mask"][:, 1:]
    rows["kl"] = token_kl(rows["logps"], rows["reference_logps"], shaping.kl_estimator) * mask_BT
    rewards_BT = shaped_rewards(scores_N, rows["kl"], mask_BT, kl_coef)
    if shaping.whiten_rewards:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False)
    advantages_BT, rows["returns"] = gae(rewards_BT, rows["values"], mask_BT, shaping.gamma, shaping.lam)
    rows["advantages"] = whiten(advantages_BT, mask_BT) if shaping.whiten_advantages else advantages_BT
    return {
        "kl": float(rows["kl"].sum(1).mean()),
        "value/explained_variance": float(explained_variance(rows["values"], rows["returns"], mask_BT)),
    }


def distinct_share(rows: Columns, per_prompt: int) -> float:
    """Return the mean share of different completions among the `per_prompt` ones that follow one another."""
    ids_NT = rows["input_ids"] * rows["attention_mask"]
    groups = ids_NT.reshape(-1, per_prompt, ids_NT.shape[1])
    return float(sum(len(group.unique(dim=0)) for group in groups)) / (len(groups) * per_prompt)


def order(rows: int, *, seed: int, iteration: int, epoch: int) -> list[int]:
    """Return the order in which an epoch of an iteration goes through its rows: a function of these numbers alone."""
    return [int(row) for row in np.random.default_rng((seed, iteration, epoch)).permutation(rows)]


def micro_batches(
    rows: Columns, places: Sequence[int], per_prompt: int, per_rank: int, rank: int, world_size: int
) -> list[list[int]]:
    """Return this rank's rows of the mini-batch at `places`, `per_rank` at a time: near-equal work for all.

    Completions of one prompt, `per_prompt` rows that follow one another, meet in a micro-batch where they can, so that
    their prompt is computed once.
    """
    completions_N = rows["loss_mask"].sum(1)
    prompts: list[int] = (rows["attention_mask"].sum(1) - completions_N).tolist()
    completions: list[int] = completions_N.tolist()
    of_prompt: dict[int, list[int]] = {}
    for item, place in enumerate(places):
        of_prompt.setdefault(place // per_prompt, []).append(item)
    groups = [Group(items, prompts[places[items[0]]]) for items in of_prompt.values()]
    dealt = deal([completions[place] for place in places], per_rank, world_size, groups)
    return [sorted(places[item] for item in items) for items in dealt[rank::world_size]]


def select(rows: Mapping[str, Tensor], places: Sequence[int]) -> dict[str, Any]:
    """Return the rows at `places` as a batch, no longer than its longest row."""
    chosen = torch.tensor(places, device=rows["input_ids"].device)
    longest = int(rows["attention_mask"][chosen].sum(1).max())
    batch: dict[str, Any] = {}
    for name in ("input_ids", "attention_mask", "loss_mask"):
        batch[name] = rows[name][chosen, :longest]
    for name in ("logps", "reference_logps", "values", "advantages", "returns"):
        batch[name] = rows[name][chosen, : longest - 1]
    return {**batch, "keep": len(places)}
