"""What forked ranks do in tests beside plain runs: watch a run from inside, harm it, or run stock TRL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def observed(argv: list[str], live: str, harm: str = "") -> int:
    """Run `align-kit argv…`; keep the trained model's logits on `probe_ids()` in `live` before it is saved.

    `harm` names a function of this module that is handed the trainer before training.
    """
    from align_kit.cli import main
    from align_kit.trainers.base import PhaseTrainer

    train = PhaseTrainer.train

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if harm:
            globals()[harm](trainer)
        outcome = train(trainer, *args, **kwargs)
        keep_logits(trainer, Path(live))
        return outcome

    PhaseTrainer.train = watched  # type: ignore[method-assign]
    return int(main(argv) or 0)


def probe_ids() -> Any:
    """Return two rows of token ids that no data set holds, all in the small model's vocabulary."""
    import torch

    return torch.arange(40).reshape(2, 20) * 7 % 300 + 4


def keep_logits(trainer: Any, path: Path) -> None:
    """Store the live model's logits on the probe; every rank computes, rank 0 writes."""
    import torch

    engine = trainer.model_wrapped
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=probe_ids().to(trainer.args.device), use_cache=False).logits.float().cpu()
    if trainer.args.process_index == 0:
        torch.save(logits, path)


# --- harm -------------------------------------------------------------------------------------------------


def at_step(trainer: Any, step: int, act: Callable[[], None]) -> None:
    """Call `act` before optimizer step number `step`."""
    from transformers import TrainerCallback

    class Act(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                act()

    trainer.add_callback(Act())


def flip_one_bit_of_reference(trainer: Any) -> None:
    """Flip the lowest bit of one stored weight of the reference before step 2, on the last rank only."""
    import torch

    def flip() -> None:
        held = trainer.frozen["reference"]
        if held.model is not None:
            parameter = next(held.model.parameters())
        else:
            parameter = next(p for n, p in trainer.model.named_parameters() if n.endswith("base_layer.weight"))
        shard = getattr(parameter, "ds_tensor", parameter).detach().view(-1)
        shard.view(torch.int32)[3] ^= 1

    if trainer.args.process_index == trainer.args.world_size - 1:
        at_step(trainer, 2, flip)


def shift_reference(trainer: Any) -> None:
    """Shift the weights of the reference before training, so that it is not what the policy starts from."""
    import torch

    with torch.no_grad():
        for parameter in trainer.frozen["reference"].model.parameters():
            getattr(parameter, "ds_tensor", parameter).add_(0.01)


def _tamper(change: Callable[[dict[str, Any]], None]) -> None:
    """Change the gathered weights between the engine and the files, as a broken gather would."""
    from align_kit.trainers import save

    gathered = save._gathered

    def tampered(trainer: Any) -> dict[str, Any]:
        weights = {name: tensor.clone() for name, tensor in gathered(trainer).items()}
        if weights:
            change(weights)
        return weights

    save._gathered = tampered


def _a_weight(weights: dict[str, Any]) -> str:
    """Return a matrix in the middle of the model, or of the adapter."""
    matrices = sorted(name for name in weights if "proj" in name)
    return matrices[len(matrices) // 2]


def empty_a_tensor(trainer: Any) -> None:
    """Hand an empty tensor over, as a gather that was forgotten leaves it."""
    import torch

    _tamper(lambda weights: weights.update({_a_weight(weights): torch.empty(0)}))


def put_nan(trainer: Any) -> None:
    """Hand a tensor with one NaN over."""
    def put(weights: dict[str, Any]) -> None:
        weights[_a_weight(weights)].view(-1)[5] = float("nan")

    _tamper(put)


def drop_a_tensor(trainer: Any) -> None:
    """Hand one tensor less over."""
    _tamper(lambda weights: weights.__delitem__(_a_weight(weights)))


def stale_weights(trainer: Any) -> None:
    """Hand other values of the right shape over, as a gather of last step's weights would."""
    _tamper(lambda weights: weights.update({_a_weight(weights): weights[_a_weight(weights)] + 0.5}))


def count_elements(trainer: Any) -> None:
    """Write how many elements of policy and reference this rank stores, beside the run."""

    def count() -> None:
        models = {"policy": trainer.model, "reference": trainer.frozen["reference"].model}
        kept = {name: sum(p.ds_tensor.numel() for p in model.parameters()) for name, model in models.items()}
        Path(f"{trainer.args.output_dir}.{trainer.args.process_index}.json").write_text(json.dumps(kept))

    at_step(trainer, 1, count)


# --- the oracle -------------------------------------------------------------------------------------------


def stock_step(phase: str, model: str, data: str, place: str, **options: Any) -> int:
    """Take one step with TRL's own trainer for `phase`, without DeepSpeed; save the model and the loss in `place`."""
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"sft": ("SFTConfig", "SFTTrainer"), "dpo": ("DPOConfig", "DPOTrainer")}
    config, trainer = (getattr(trl, name) for name in names[phase])
    rows = load_dataset("json", data_files=data, split="train", cache_dir=f"{place}/cache")
    args = config(
        output_dir=place, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        save_strategy="no", logging_steps=1, **options,
    )  # fmt: skip
    stock = trainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    stock.train()
    stock.model.save_pretrained(place)
    losses = [line["loss"] for line in stock.state.log_history if "loss" in line]
    Path(place, "losses.json").write_text(json.dumps(losses))
    return 0
