"""Stands between a step's gradient and its update: what is not right is not trained on, and all ranks decide alike.

accelerate calls the engine's `step` inside the last `backward`, so that the Trainer's own hooks come when the weights
have changed. Here the engine's step is wrapped, and in it the one place where the gradient norm is known and nothing
has changed yet. A step that is held back looks to the engine like an overflow of fp16: gradients are cleared and
counters go on; the learning rate goes on too, so that it depends on the step alone.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from align_kit import log, supervised
from align_kit.config import RunFields
from align_kit.config.steps import parse_steps
from align_kit.errors import Fault, UserError
from align_kit.frozen.hold import bare
from align_kit.telemetry.at_rest import SHARE, AtRest
from align_kit.telemetry.guards import PATIENCE, SCALING_PATIENCE, SKIP, STOP, WARN, Decision, Judge
from align_kit.telemetry.roll_call import named
from align_kit.trainers.holdings import described, first_not_finite, holdings

STANDS = "the last checkpoint stands: go on with --resume"


class Guard(TrainerCallback):  # type: ignore[misc]
    """Watches losses, gradient norms, memory and what the ranks do, for one trainer; `follow` tells it what is asked.

    Raises `Fault` on all ranks at the same step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.judge = Judge()
        self.rest: AtRest | None = None
        self.to_skip: frozenset[int] = frozenset()
        self.decision: Decision | None = None  # of the step at hand
        self._losses: list[Tensor] = []  # of the step's micro-batches
        self._changed = ""  # what of this rank's memory changed at rest
        self._norm: float | None = None
        self._steps, self._passed = 0, 0  # since the last log, and those of them that were passed over

    def follow(self, options: RunFields, noted: Iterable[int] = ()) -> None:
        """Take up the options of a run; `noted` are the steps that it passed over before."""
        patience = SCALING_PATIENCE if self.trainer.args.fp16 else PATIENCE
        self.judge = Judge(options.spike_policy, options.spike_deviations, patience)
        shares = {"off": None, "full": AtRest(), "sampled": AtRest(SHARE)}
        self.rest = shares[options.memory_check]
        asked = [parse_steps(text) for text in (options.skip_steps, os.environ.get(supervised.SKIP_STEPS)) if text]
        self.to_skip = frozenset(noted).union(*asked)
        if self.to_skip:
            self.trainer.note(skip_steps=sorted(self.to_skip))

    # --- what a checkpoint keeps ---

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know to decide as this one would: plain JSON, the same on all ranks."""
        return self.judge.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.judge.load_state_dict(state)

    # --- the way of a step ---

    @property
    def step(self) -> int:
        """The optimizer step at hand; the first is 1."""
        return int(self.trainer.state.global_step) + 1

    @property
    def passes_over(self) -> bool:
        """Whether the step at hand is not to be trained on."""
        return self.step in self.to_skip

    def pass_over(self, engine: Any, *, last: bool) -> Tensor:
        """Let a micro-batch go by as if it had been trained on, and return a loss of 0; `last` ends its step."""
        engine.micro_steps += 1
        if last:
            engine.global_steps += 1
            engine.skipped_steps += 1
            engine.global_samples += engine.train_batch_size()
            engine._global_grad_norm = 0.0
            self._passed += 1
            log.say(f"  step {self.step}: passed over, as skip_steps asks")
        return torch.zeros((), device=self.trainer.args.device)

    def saw(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch, as it is."""
        self._losses.append(loss.detach())

    def correct(self, logs: dict[str, float]) -> None:
        """Let a logged loss be the mean over the steps that were trained on; leave it out where none was."""
        if "loss" not in logs:  # an evaluation
            return
        if self._passed and self._passed == self._steps:
            del logs["loss"]
            logs.pop("grad_norm", None)
        elif self._passed:
            logs["loss"] *= self._steps / (self._steps - self._passed)
        self._steps, self._passed = 0, 0

    # --- where it stands ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        engine = self.trainer.model_wrapped
        self.trainer.roll_call("start", self.step, _signature(engine, self.to_skip))
        self.stand_in(engine)
        if self.rest is not None:
            self.rest.forget()
            self.rest.remember(lambda: holdings(engine))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._steps += 1

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.roll_call("end" if control.should_training_stop else "epoch", state.global_step)

    def stand_in(self, engine: Any) -> None:
        """Take the place between gradient and update of `engine`, which is called at the end of each step."""
        take, watched = engine.step, hold_back(engine, lambda norm: self._decides(engine, norm))
        if not watched and self.judge.policy == SKIP:
            raise UserError(
                f"spike_policy skip: the engine's {type(engine.optimizer).__name__} cannot hold an update back; use "
                "spike_policy rollback, or --deepspeed zero2 or zero3"
            )

        def step(*args: Any, **kwargs: Any) -> None:
            self.decision, self._norm = None, None
            self._changed = self._changed_at_rest(engine)
            if not watched:
                self._decides(engine, None)
            take(*args, **kwargs)
            scaled = self.decision is None and engine.fp16_enabled()  # an overflow as fp16's scale has now and then
            if self.decision is None:  # the engine found it before it took a norm, and made no update
                self._decides(engine, None if scaled else math.inf, overflowed=scaled)
            if self.decision is not None and self.decision.what == SKIP and not scaled:
                self._go_on(engine)
            if self.rest is not None:
                self.rest.remember(lambda: holdings(engine))

        engine.step = step

    def _go_on(self, engine: Any) -> None:
        """Let what follows a step that was held back be as after any other, the schedule of the learning rate too."""
        engine.optimizer.overflow = False
        engine._global_grad_norm = self._norm
        if engine.lr_scheduler is not None and not engine._step_applied:
            engine.lr_scheduler.step()

    def _changed_at_rest(self, engine: Any) -> str:
        pieces = self.rest.changed(lambda: holdings(engine)) if self.rest is not None else []
        return described(engine, pieces[0]) if pieces else ""

    # --- the decision ---

    def together(self, check: Callable[[], None]) -> None:
        """Make a check that may raise `Fault` on one rank; where it does it is raised on all."""
        said = ""
        try:
            check()
        except Fault as fault:
            said = str(fault)
        rows = self.trainer.roll_call("check", self.trainer.state.global_step, 0, (float(bool(said)),))
        if any(found for (found,) in rows):
            raise Fault(next(filter(None, self.trainer.roll_call.words(said))))

    def _decides(self, engine: Any, norm: float | None, overflowed: bool = False) -> bool:
        """Tell whether the update is to be made, the same on all ranks; raise `Fault` where the run has to end."""
        losses = torch.stack(self._losses).float().tolist()
        self._losses.clear()
        mine = (sum(losses), float(bool(self._changed)), 0.0 if norm is None else norm)
        rows = self.trainer.roll_call("update", self.step, len(losses), mine)
        norm = self._norm = None if norm is None else rows[0][2]  # one number for all, that all may decide alike
        if any(changed for _, changed, _ in rows):
            raise self._memory_fault()
        sums = [total for total, _, _ in rows]
        if not all(map(math.isfinite, [*sums, *([] if norm is None else [norm])])):
            self._check_weights(engine)
        self.decision = self.judge.decide(self.step, sums, norm, overflowed)
        return self._acted(self.decision)

    def _acted(self, decision: Decision) -> bool:
        line = f"step {self.step}: {decision.why}"
        if decision.what == STOP:
            without = f" --skip_steps {','.join(map(str, decision.skip_steps))}" if decision.skip_steps else ""
            raise Fault(f"{line}; {STANDS}{without}", decision.skip_steps)
        if decision.what == SKIP:
            log.warn(f"{line}; no update is made ({self.judge.in_a_row} in a row, {self.judge.patience} end the run)")
        elif decision.what == WARN:
            log.warn(f"{line}; spike_policy: skip or rollback would not train on it")
        return decision.what != SKIP

    def _check_weights(self, engine: Any) -> None:
        """Raise `Fault` where a number that is not finite comes from a weight that is not."""
        if said := self._said(first_not_finite(engine) or ""):
            rank, words = next(iter(said.items()))
            raise Fault(f"step {self.step}: rank {rank} holds a weight that is not finite, {words}; {STANDS}")

    def _said(self, mine: str) -> dict[int, str]:
        """Return what ranks have to say, by rank, where it is anything."""
        return {rank: words for rank, words in enumerate(self.trainer.roll_call.words(mine)) if words}

    def _memory_fault(self) -> Fault:
        said = self._said(self._changed)
        rank, words = next(iter(said.items()))
        others = f" (and so on {named(list(said)[1:])})" if len(said) > 1 else ""
        return Fault(
            f"step {self.step}: memory of rank {rank} changed since the last update, where nothing writes{others}: "
            f"{words}; check that machine's memory; {STANDS}"
        )


def hold_back(engine: Any, decides: Callable[[float | None], bool]) -> bool:
    """Let `decides(norm)` say, when the gradient norm is known, whether an update is made; False where none can be.

    ZeRO takes a norm before each update, in a method that is wrapped here; an overflow that is seen there makes the
    engine clear the gradients and leave the weights. A plain optimizer (stage 0) is not called.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3
        _wrap_norm(optimizer, "_get_norm_groups", decides)
    elif hasattr(optimizer, "scaled_global_norm") and getattr(optimizer, "compute_grad_norm", True):  # ZeRO 1 and 2
        _wrap_norm(optimizer, "scaled_global_norm", decides)
    elif isinstance(optimizer, torch.optim.Optimizer):
        _wrap_plain(engine, decides)
    else:
        return False
    return True


def _wrap_plain(engine: Any, decides: Callable[[float | None], bool]) -> None:
    take, update = engine._take_model_step, engine.optimizer.step

    def norm_and_decision(*args: Any, **kwargs: Any) -> None:
        groups = engine.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        made = decides(float(torch.nn.utils.get_total_norm(gradients)))
        engine.optimizer.step = update if made else _nothing
        take(*args, **kwargs)

    engine._take_model_step = norm_and_decision


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _wrap_norm(optimizer: Any, name: str, decides: Callable[[float | None], bool]) -> None:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    take: Callable[[], Any] = getattr(optimizer, name)

    def norm_and_decision() -> Any:
        found = take()
        whole = combine_grad_norm_groups(found) if isinstance(found, list) else found
        if not decides(float(whole) / float(optimizer.loss_scale)):
            optimizer.overflow = True
        return found

    setattr(optimizer, name, norm_and_decision)


def _signature(engine: Any, to_skip: frozenset[int]) -> int:
    """Return a number that tells models of other shapes, or trained in other parts, apart."""
    shapes = [(n, tuple(getattr(p, "ds_shape", p.shape)), p.requires_grad) for n, p in bare(engine).named_parameters()]
    return int(hashlib.blake2b(repr((shapes, sorted(to_skip))).encode(), digest_size=6).hexdigest(), 16)
