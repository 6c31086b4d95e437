"""Harm that guards must find, done from inside a run on its last rank: to losses, gradients, memory and manners.

Each function is handed the trainer before training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.rank_work import at_step

STEP = 4  # the step that is harmed
FLIPS = 200  # of each kind of memory
LATE = 20  # the step that is harmed where a history has to come first


def _is_last(trainer: Any) -> bool:
    return bool(trainer.args.process_index == trainer.args.world_size - 1)


def _change_loss(trainer: Any, change: Callable[[Any], Any], steps: tuple[int, ...], everywhere: bool = False) -> None:
    """Let `change` act on the summed loss of each micro-batch of `steps`."""
    plain = trainer.batch_loss

    def changed(*args: Any, **kwargs: Any) -> Any:
        outcome = plain(*args, **kwargs)
        if trainer.model.training and trainer.state.global_step + 1 in steps:
            outcome.total = change(outcome.total)
        return outcome

    if everywhere or _is_last(trainer):
        trainer.batch_loss = changed


def nan_loss(trainer: Any) -> None:
    """Add NaN to the loss: the gradient stays finite."""
    _change_loss(trainer, lambda total: total + float("nan"), (STEP,))


def nan_gradient(trainer: Any) -> None:
    """Leave the loss as it is and make its gradient NaN, once."""
    _change_loss(trainer, _without_slope, (STEP,))


def nan_gradients(trainer: Any) -> None:
    """Do so from now on."""
    _change_loss(trainer, _without_slope, tuple(range(STEP, 100)))


def _without_slope(total: Any) -> Any:
    return total + (total * 0).abs().sqrt()


def high_loss(trainer: Any) -> None:
    """Make the loss of one rank a thousand higher, with the same gradient."""
    _change_loss(trainer, lambda total: total + 1000.0 * float(total.detach()), (LATE,))


def steep_loss(trainer: Any) -> None:
    """Leave the loss as it is and make its gradient a thousand times as long."""
    _change_loss(trainer, lambda total: 1000 * total - (999 * total).detach(), (LATE,), everywhere=True)


def high_losses(trainer: Any) -> None:
    """Make the loss a thousand higher for good."""
    _change_loss(trainer, lambda total: total + 1000.0 * float(total.detach()), tuple(range(LATE, 100)))


def poisoned_batch(trainer: Any) -> None:
    """Let the batch of the harmed step raise an error on every rank, should anything be computed on it."""

    def fail(total: Any) -> Any:
        raise RuntimeError("this batch was not to be computed")

    _change_loss(trainer, fail, (STEP,), everywhere=True)


# --- memory -----------------------------------------------------------------------------------------------


def _at_rest(trainer: Any, act: Callable[[Any], None]) -> None:
    """Call `act` on the engine between two updates, on the last rank."""
    if _is_last(trainer):
        at_step(trainer, STEP, lambda: act(trainer.model_wrapped))


def nan_weight(trainer: Any) -> None:
    """Put NaN into one element of one sharded weight."""

    def put(engine: Any) -> None:
        name, parameter = next((n, p) for n, p in engine.module.named_parameters() if "up_proj" in n)
        parameter.ds_tensor.data.view(-1)[5] = float("nan")

    _at_rest(trainer, put)


def _flip(tensor: Any, place: int = 7) -> None:
    """Flip the lowest bit of an element."""
    import torch

    words = tensor.detach().view(-1)
    words.view({2: torch.int16, 4: torch.int32}[words.element_size()])[place] ^= 1


def flip_in_weights(trainer: Any) -> None:
    """Flip a bit of a stored weight: in bf16 its master is another number."""
    _at_rest(trainer, lambda engine: _flip(_trained(engine).ds_tensor))


def flip_in_moments_of_zero2(trainer: Any) -> None:
    """Flip a bit of a second moment of Adam under ZeRO-2."""

    def flip(engine: Any) -> None:
        master = engine.optimizer.single_partition_of_fp32_groups[0]
        _flip(engine.optimizer.optimizer.state[master]["exp_avg_sq"])

    _at_rest(trainer, flip)


def flip_in_gathered(trainer: Any) -> None:
    """Flip a bit of the whole copy of a small parameter that stays on every rank."""

    def flip(engine: Any) -> None:
        parameter = _trained(engine)
        assert parameter.numel() == parameter.ds_numel, "it is not gathered"
        _flip(parameter.data)

    _at_rest(trainer, flip)


def flip_in_base(trainer: Any) -> None:
    """Flip a bit of the base beneath an adapter."""

    def flip(engine: Any) -> None:
        _flip(next(p for n, p in engine.module.named_parameters() if n.endswith("base_layer.weight")).ds_tensor)

    _at_rest(trainer, flip)


def _trained(engine: Any) -> Any:
    return next(parameter for parameter in engine.module.parameters() if parameter.requires_grad)


def flip_many(trainer: Any) -> None:
    """Flip bits at random, one at a time, and write for each kind of memory how many were flipped and found."""
    import random

    from align_kit.trainers.holdings import holdings

    draw, counts = random.Random(0), {}

    def flip_each(engine: Any) -> None:
        held = holdings(engine)
        for kind in ("weights", "masters", "exp_avg", "exp_avg_sq", "the gathered copy", "the frozen"):
            names = [name for name in held if name.startswith(f"{kind} ")]
            found = 0
            for _ in range(FLIPS):
                name = draw.choice(names)
                place = draw.randrange(held[name].tensor.numel())
                _flip(held[name].tensor, place)
                changed = trainer.guard.rest.changed(lambda: held)
                found += [piece.name for piece in changed] == [name]
                _flip(held[name].tensor, place)
            counts[kind] = [FLIPS, found]
        Path(f"{trainer.args.output_dir}.json").write_text(json.dumps(counts))

    _at_rest(trainer, flip_each)


# --- manners ----------------------------------------------------------------------------------------------


def drop_a_micro_batch(trainer: Any) -> None:
    """Draw one micro-batch less for one step."""
    draw = trainer.get_batch_samples

    def fewer(iterator: Any, count: int, device: Any) -> Any:
        return draw(iterator, count - (trainer.state.global_step + 1 == STEP), device)

    if _is_last(trainer):
        trainer.get_batch_samples = fewer


def _after_step(trainer: Any, name: str) -> None:
    from transformers import TrainerCallback

    class Wish(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEP - 1:
                setattr(control, name, True)

    if _is_last(trainer):
        trainer.add_callback(Wish())


def evaluate_alone(trainer: Any) -> None:
    """Begin an evaluation on one rank."""
    _after_step(trainer, "should_evaluate")


def save_alone(trainer: Any) -> None:
    """Begin a save on one rank."""
    _after_step(trainer, "should_save")


def stop_alone(trainer: Any) -> None:
    """End training on one rank."""
    _after_step(trainer, "should_training_stop")


# --- records ----------------------------------------------------------------------------------------------


def keep_decisions(trainer: Any) -> None:
    """Write what each rank decided at each step, its learning rate and a sum of its weights, beside the run."""
    import torch
    from transformers import TrainerCallback

    said: list[Any] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            decision = trainer.guard.decision
            weights = sum(int(p.ds_tensor.view(torch.int32).sum()) for p in trainer.model.parameters())
            rate = trainer.lr_scheduler.get_last_lr()[0]
            said.append({"what": decision and decision.what, "rate": rate, "weights": weights})
            Path(f"{args.output_dir}.{args.process_index}.json").write_text(json.dumps(said))

    trainer.add_callback(Keep())


def high_loss_kept(trainer: Any) -> None:
    """Make one loss high and keep the decisions."""
    high_loss(trainer)
    keep_decisions(trainer)


def poisoned_kept(trainer: Any) -> None:
    """Poison a batch and keep the decisions."""
    poisoned_batch(trainer)
    keep_decisions(trainer)
