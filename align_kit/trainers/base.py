"""What every trainer shares: sums and counts instead of means, one loss per row of the registry.

A method computes the *sum* of its loss over its items (tokens or pairs); the trainer divides by the number of items
in the whole optimizer step, over all ranks and accumulated micro-batches. So the gradient does not depend on how a
global batch is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from align_kit.frozen import Frozen
from align_kit.models.load import disable_dropout


@dataclass
class BatchLoss:
    """One micro-batch: the loss summed over its items, their number, and what to report as (sum, count) by name."""

    total: Tensor
    items: Tensor | float
    tallies: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


class Tallies:
    """Sums and counts by name, added up over micro-batches and, when read, over ranks."""

    def __init__(self) -> None:
        self._entries: dict[str, list[float]] = {}

    def add(self, tallies: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        for name, (total, count) in tallies.items():
            entry = self._entries.setdefault(name, [0.0, 0.0])
            entry[0] += float(total)
            entry[1] += float(count)

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Return total / count by name over all ranks and begin anew; all ranks call it with the same names."""
        names = sorted(self._entries)
        if not names:
            return {}
        table = torch.tensor([self._entries[name] for name in names], dtype=torch.float64, device=accelerator.device)
        rows = accelerator.reduce(table, "sum").tolist()
        self._entries.clear()
        means = [total / count if count else float("nan") for total, count in rows]
        return dict(zip(names, means, strict=True))


class PhaseTrainer(Trainer):
    """transformers' Trainer with exact normalisation, tallied metrics and plain evaluation.

    A subclass gives `collator`, `batch_loss` and `counts`; `frozen` are the run's frozen models by role.
    """

    args: Any  # the phase's own config class, such as trl's DPOConfig
    model: Any
    model_wrapped: Any
    train_dataset: Any
    headline: tuple[str, ...] = ("loss", "eval_loss")  # what the footer of a run shows

    def __init__(
        self, *, model: Any, args: Any, processing_class: Any, frozen: Mapping[str, Frozen] | None = None, **kw: Any
    ) -> None:
        collate = self.collator(processing_class, args)
        if getattr(args, "disable_dropout", False):
            disable_dropout(model)
        super().__init__(model=model, args=args, processing_class=processing_class, data_collator=collate, **kw)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole optimizer step
        self.frozen = dict(frozen or {})
        self.tallies = Tallies()
        self.tokens_computed = 0.0
        self.gates_passed = False
        self._epoch_iterator: Any = None
        self._batches_drawn = 0
        self.prepare()

    # --- what a method fills in ---

    @staticmethod
    def collator(tokenizer: Any, args: Any) -> Callable[[Any], dict[str, Tensor]]:
        """Return what makes a batch of tokenised rows."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Read and check what the method needs of `self.args`, once, before any batch."""

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        """Return the loss of one micro-batch; `step` holds `counts` summed over the whole optimizer step."""
        raise NotImplementedError

    def counts(self, batch: Mapping[str, Any]) -> list[int]:
        """Return what the step is normalised by; the first is the number of items (trained tokens, or pairs)."""
        raise NotImplementedError

    def before_first_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Check what must hold before any update; called once with the first micro-batch, on all ranks."""

    # --- training ---

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self.gates_passed:
            self.gates_passed = True
            for frozen in self.frozen.values():
                frozen.watch(self.accelerator.unwrap_model(model))
            if self.state.global_step == 0:
                self.before_first_step(model, self._prepare_inputs(inputs))
        self.tokens_computed += float(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outcome = self.batch_loss(model, inputs, num_items_in_batch)
        self.tallies.add(outcome.tallies)
        # The engine averages gradients over ranks; times world size makes that the sum the normaliser expects.
        loss = outcome.total * (self.accelerator.num_processes / num_items_in_batch[0])
        return (loss, None) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of one optimizer step, repeats marked, and its `counts` over all ranks."""
        if epoch_iterator is not self._epoch_iterator:
            self._epoch_iterator, self._batches_drawn = epoch_iterator, self._batches_skipped()
        batches = []
        for batch in itertools.islice(epoch_iterator, num_batches):
            size = self.args.per_device_train_batch_size
            batches.append(self._marked(batch, self._batches_drawn, size, len(self.train_dataset)))
            self._batches_drawn += 1
        mine = torch.tensor([self.counts(batch) for batch in batches], dtype=torch.float32, device=device).sum(0)
        return batches, self.accelerator.reduce(mine, "sum").clamp(min=1)

    def _batches_skipped(self) -> int:
        """Return how many of this rank's batches of the epoch were trained on before: none, unless a run goes on."""
        accumulation = self.args.gradient_accumulation_steps
        batches: Any = self.callback_handler.train_dataloader
        steps_per_epoch = -(-len(batches) // accumulation)
        return self.state.global_step % max(1, steps_per_epoch) * accumulation

    def _marked(self, batch: dict[str, Any], index: int, per_rank: int, items: int) -> dict[str, Any]:
        """Return this rank's batch number `index` of a pass over `items`, with "keep": how many of its first count.

        accelerate fills the last round up with repeats so that every rank has a batch: they must run, because ZeRO-3
        gathers together, but must not count.
        """
        first = (index * self.accelerator.num_processes + self.accelerator.process_index) * per_rank
        return {**batch, "keep": max(0, min(per_rank, items - first))}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics tallied since the last log, over all ranks, to a training line."""
        if "loss" in logs:
            share = self.accelerator.num_processes  # a mean over ranks times their number is their sum
            self.tallies.add({"tokens": (self.tokens_computed * share, 1)})
            self.tokens_computed = 0.0
            logs.update(self.tallies.drain(self.accelerator))
        super().log(logs, start_time)

    def check_frozen(self, when: str) -> None:
        """Compare every frozen model with its first fingerprint; see `Frozen.check`."""
        for frozen in self.frozen.values():
            frozen.check(self.accelerator.unwrap_model(self.model_wrapped), when)

    # --- evaluation ---

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the loss and metrics over the whole evaluation set, exact whatever the batches: sums over counts."""
        model, tallies = self.model_wrapped, Tallies()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for index, batch in enumerate(dataloader):
                batch = self._marked(batch, index, self.args.per_device_eval_batch_size, len(dataloader.dataset))
                outcome = self.batch_loss(model, self._prepare_inputs(batch), None)
                tallies.add({"loss": (outcome.total, outcome.items), **outcome.tallies})
        model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in tallies.drain(self.accelerator).items()}
        nothing = cast(Any, None)  # predictions stay where they were made
        return EvalLoopOutput(nothing, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))
