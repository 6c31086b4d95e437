"""What every trainer shares: sums and counts instead of means, one loss per row of the registry.

A method computes the *sum* of its loss over its items (tokens or pairs); the trainer divides by the number of items
in the whole optimizer step, over all ranks and accumulated micro-batches. So the gradient does not depend on how a
global batch is cut.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from align_kit import log
from align_kit.data.balance import balance, row_tokens
from align_kit.data.collate import SourcedCollator
from align_kit.data.origins import COLUMN as SOURCE_PARTS
from align_kit.data.weights import mean_weight, summed
from align_kit.forward.logprobs import TokenLogps, token_logps
from align_kit.frozen import Frozen
from align_kit.models.load import disable_dropout
from align_kit.run_folder import MACHINE
from align_kit.telemetry import spent
from align_kit.telemetry.heartbeat import Beats, Heart, WaitingLimit
from align_kit.telemetry.meters import Meters
from align_kit.telemetry.roll_call import RollCall
from align_kit.trainers.guard import Guard
from align_kit.trainers.measured import Measure
from align_kit.trainers.resumed import ResumedTrainer
from align_kit.trainers.routers import charged, router_coefficient
from align_kit.trainers.settle import SettleForward


@dataclass
class BatchLoss:
    """One micro-batch: the loss summed over its items, their number, and what to report as (sum, count) by name."""

    total: Tensor
    items: Tensor | float
    tallies: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What options may follow from, before any model but the policy is loaded.

    `rows` are the tokenised training rows; `given(name)` tells whether the user set an option; `checker` is the
    dotted path of the checker that a card of the data names; `finished(phase)` is the folder of that phase's newest
    finished run beside this one.
    """

    rows: Any
    policy: Any
    given: Callable[[str], bool]
    checker: str | None
    finished: Callable[[str], Path | None]


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


class PhaseTrainer(ResumedTrainer):
    """transformers' Trainer with exact normalisation, tallied metrics and plain evaluation.

    A subclass gives `collator`, `batch_loss` and `counts`; `frozen` are the run's frozen models by role.
    """

    train_dataset: Any
    headline: tuple[str, ...] = ("loss", "eval_loss")  # what the footer of a run shows
    resumable: bool = True  # whether a run could go on from the step that has just ended
    stopped_early: str | None = None  # why, where a run was asked to save and stop
    flops_per_token: float | None = None  # of training, where the planner has said; and what a rank's device can do
    peak_flops: float | None = None  # in a second

    def __init__(
        self, *, model: Any, args: Any, processing_class: Any, frozen: Mapping[str, Frozen] | None = None, **kw: Any
    ) -> None:
        collate = SourcedCollator(self.collator(processing_class, args))
        if getattr(args, "disable_dropout", False):
            disable_dropout(model)
        super().__init__(model=model, args=args, processing_class=processing_class, data_collator=collate, **kw)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the items of the whole optimizer step
        self.frozen = dict(frozen or {})
        self.tallies = Tallies()
        rows = self.train_dataset
        self.mean_weight = None if rows is None else mean_weight(rows)  # of rows that have a weight
        self.source_names: Sequence[str] = ()  # of a mixture, in the order of its rows' `source_parts`
        self.router_coefficient = router_coefficient(args, self.model)
        self._router_loss: Tensor | None = None  # of the micro-batch at hand
        self.tokens_computed = 0.0
        self.gates_passed = False
        self.gates: list[str] = []  # what was checked and held, for the report
        self.frozen_checks = 0
        self.forward_is_ours = True  # whether the way of computing batches was ours to choose
        self.note: Callable[..., None] = lambda **entries: None  # lays entries over the run's manifest
        self.roll_call = RollCall.of_all_ranks()
        self.guard = Guard(self)
        self.add_callback(self.guard)
        self.heart = Heart.of(os.environ)
        self.add_callback(Beats(self.heart))
        self.add_callback(WaitingLimit())
        self.add_callback(SettleForward(self))
        self.measure = Measure(args)
        self.add_callback(self.measure)
        self.meters = Meters()
        self.add_callback(self.meters)
        self._epoch_iterator: Any = None
        self._batches_drawn = 0
        self.prepare_saving()
        self.prepare()

    # --- what a method fills in ---

    @property
    def cut_is_free(self) -> bool:
        """Whether the loss of a step is the same whichever of its rows share a micro-batch."""
        return True

    @classmethod
    def complete(cls, rows: Any, args: Any) -> Any:
        """Return the tokenised rows with what else the method reads of them; on all ranks, before any model."""
        return rows

    @classmethod
    def derive(cls, args: Any, known: Known) -> dict[str, tuple[Any, str]]:
        """Return the options that follow from the data or the machine: name -> (value, why); called by all ranks.

        What comes back is set in `args`, printed, recorded in the manifest, and taken from there when the run goes on.
        """
        return {}

    @staticmethod
    def collator(tokenizer: Any, args: Any) -> Callable[[Any], dict[str, Tensor]]:
        """Return what makes a batch of tokenised rows."""
        raise NotImplementedError

    @classmethod
    def check(cls, args: Any) -> None:
        """Raise `UserError` for options of the method that mean nothing; on all ranks, before anything is loaded."""

    def prepare(self) -> None:
        """Read what the method needs of `self.args`, once, before any batch."""

    def batch_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        """Return the loss of one micro-batch; `step` holds `counts` summed over the whole optimizer step."""
        raise NotImplementedError

    def token_logps(self, model: nn.Module, batch: Mapping[str, Tensor], **asked: Any) -> TokenLogps:
        """Return `token_logps` of the model that is trained, for `batch_loss`; what its routers owe is charged."""
        return self.charging(token_logps(model, batch, routers=self.router_coefficient != 0, **asked))

    def weighed(self, loss_B: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the losses of a batch's first rows summed, each counting by its row's weight where it has one."""
        return summed(loss_B, batch, self.mean_weight)

    def charging(self, tokens: TokenLogps) -> TokenLogps:
        """Let what the routers owe for these tokens be charged to the micro-batch at hand."""
        self._router_loss = tokens.router_loss
        return tokens

    def counts(self, batch: Mapping[str, Any]) -> Sequence[float]:
        """Return what the step is normalised by; the first is the number of items (trained tokens, or pairs)."""
        raise NotImplementedError

    def step_sums(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return what `batch_loss` is told as `step`, for this rank's micro-batches of one step: `counts`, added up.

        A method whose loss reads more of the whole step (KTO's baseline) appends it; the trainer adds up the ranks.
        """
        return torch.tensor([self.counts(batch) for batch in batches], dtype=torch.float32).sum(0)

    def evaluation_sums(self, batches: Iterable[Mapping[str, Any]]) -> Tensor | None:
        """Return what `batch_loss` is told as `step` in an evaluation over `batches`, None where it reads nothing."""
        return None

    def finish_metrics(self, metrics: dict[str, float]) -> None:
        """Change the metrics of a training line or an evaluation in place, once all sums are known."""

    def closing_lines(self) -> list[str]:
        """Return what the method has to say at the end of a run, a line each."""
        return []

    def answers(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the method reads of a batch, as numbers that two ways of computing it must agree on."""
        return token_logps(model, batch).logps_BT

    def before_first_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Check what must hold before any update; called once with the first micro-batch, on all ranks."""

    def passed(self, text: str, *, said: bool = True) -> None:
        """Say, and note in the run's manifest, what was checked before it went on, and held."""
        if said:
            log.say(f"  gate       {text}")
        self.gates.append(text)
        self.note(gates=self.gates)

    # --- training ---

    def get_train_dataloader(self) -> Any:
        """Return the training batches; the rows of a step are dealt so that all its micro-batches are as much work."""
        loader, args = super().get_train_dataloader(), self.args
        if self.cut_is_free and not self.router_coefficient:
            size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
            balance(loader, row_tokens(self.train_dataset), size, self.accelerator.num_processes, accumulation)
        return loader

    def _prepare_input(self, data: Any) -> Any:
        """Bring a batch to the device in the precision it has: its numbers are log-probabilities and advantages.

        transformers would round them to what the model computes in.
        """
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.guard.passes_over:
            return self.guard.pass_over(model, last=self.accelerator.sync_gradients)
        if not self.gates_passed:
            self.gates_passed = True
            for frozen in self.frozen.values():
                frozen.watch(self.accelerator.unwrap_model(model))
            if self.state.global_step == 0:
                self.before_first_step(model, self._prepare_inputs(inputs))
        self.tokens_computed += float(inputs["attention_mask"].sum())
        if SOURCE_PARTS in inputs:
            self.tally_sources(inputs[SOURCE_PARTS][: inputs["keep"]])
        return super().training_step(model, inputs, num_items_in_batch)

    def tally_sources(self, parts_BS: Tensor) -> None:
        """Count what was trained on of each source: its share of rows, of packed rows of tokens, goes into the log."""
        sums = parts_BS.sum(0).tolist()
        named = zip(self.source_names, sums, strict=True)
        self.tallies.add({f"source/{name}": (mine, sum(sums)) for name, mine in named})

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outcome = self._charged_loss(model, inputs, num_items_in_batch)
        self.tallies.add(outcome.tallies)
        # The engine averages gradients over ranks; times world size makes that the sum the normaliser expects.
        loss = outcome.total * (self.accelerator.num_processes / num_items_in_batch[0].clamp(min=1))
        self.guard.saw(loss)
        return (loss, None) if return_outputs else loss

    def _charged_loss(self, model: nn.Module, batch: Mapping[str, Any], step: Tensor | None) -> BatchLoss:
        """Return `batch_loss` with what the routers of a mixture of experts owe."""
        self._router_loss = None
        outcome = self.batch_loss(model, batch, step)
        if self._router_loss is None:
            return outcome
        return cast(BatchLoss, charged(outcome, self._router_loss, self.router_coefficient))

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
        mine = torch.zeros(1) if self.guard.passes_over else self.step_sums(batches).to(device)
        tokens = 0 if self.guard.passes_over else sum(int(batch["attention_mask"].sum()) for batch in batches)
        brought = torch.cat([mine.double(), mine.new_tensor([tokens], dtype=torch.float64)])
        step = self.roll_call.summed("step", self.state.global_step + 1, len(batches), brought)
        self.tokens_seen += int(step[-1])
        return batches, step[:-1].to(mine)

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
        self.guard.correct(logs)
        if "loss" in logs:
            share = self.accelerator.num_processes  # a mean over ranks times their number is their sum
            self.tallies.add({"tokens": (self.tokens_computed * share, 1)})
            self.tokens_computed = 0.0
            found = self.tallies.drain(self.accelerator)
            self.finish_metrics(found)
            logs.update(found | self._metered(found["tokens"]))
        super().log(logs, start_time)
        history = self.state.log_history[-1]  # goes into checkpoints, which are the same whenever a run is repeated
        self.state.log_history[-1] = {name: value for name, value in history.items() if not name.startswith(MACHINE)}

    def _metered(self, tokens: float) -> dict[str, float]:
        """Return what the training line took on this machine; `tokens` are those of all ranks since the last one."""
        known = self.flops_per_token and self.peak_flops
        share = self.flops_per_token / (self.peak_flops * self.args.world_size) if known else None
        return self.meters.read(
            step=self.state.global_step,
            tokens=tokens,
            peak_bytes=max(0, self.measure.peak - getattr(self.args, "resident_before", 0)),
            utilisation=share,
        )

    def check_frozen(self, when: str) -> None:
        """Compare every frozen model with its first fingerprint; see `Frozen.check`."""
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        for frozen in self.frozen.values():
            self.guard.together(functools.partial(frozen.check, policy, when))
        self.frozen_checks += bool(self.frozen)

    def move_frozen(self, step: int) -> None:
        """Let the frozen models that move follow the policy, now that `step` optimizer steps are done."""
        for frozen in self.frozen.values():
            frozen.after_step(self.accelerator.unwrap_model(self.model_wrapped), step)

    # --- evaluation ---

    @spent.during("evaluation")
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation, once all ranks are about to run as many."""
        loader = super().get_eval_dataloader(eval_dataset)
        self.roll_call("evaluation", self.state.global_step, len(loader))
        return loader

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
            step = self.evaluation_sums(self._evaluation_batches(dataloader))
            for batch in self._evaluation_batches(dataloader):
                outcome = self._charged_loss(model, batch, step)
                tallies.add({"loss": (outcome.total, outcome.items), **outcome.tallies})
        model.train(was_training)
        found = tallies.drain(self.accelerator)
        self.finish_metrics(found)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        nothing = cast(Any, None)  # predictions stay where they were made
        return EvalLoopOutput(nothing, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    def _evaluation_batches(self, dataloader: Any) -> Iterator[dict[str, Any]]:
        """Yield this rank's batches of an evaluation on its device, repeats marked."""
        for index, batch in enumerate(dataloader):
            self.heart.beat("evaluate")
            marked = self._marked(batch, index, self.args.per_device_eval_batch_size, len(dataloader.dataset))
            yield cast("dict[str, Any]", self._prepare_inputs(marked))
