"""What forked ranks do in tests beside plain runs: watch a run from inside, harm it, or run stock TRL."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forward_work import drop_segments, forget_prefixes, keep_doors  # noqa: F401  # harm by name
from tests.world_work import keep_rows, lose_moments, spoil_weights  # noqa: F401


def observed(argv: list[str], live: str, harm: str = "") -> int:
    """Run `align-kit argv…`; keep the trained model's logits on `probe_ids()` in `live` before it is saved.

    `harm` names a function of this module, or of `module:function`, that is handed the trainer before training.
    """
    from align_kit.cli import main
    from align_kit.trainers.base import PhaseTrainer

    train = PhaseTrainer.train

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if harm:
            module, _, name = harm.rpartition(":")
            (getattr(importlib.import_module(module), name) if module else globals()[name])(trainer)
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


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward the share of tokens with an odd id: what the small model can learn within a few steps."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def shuffled_odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Deal the rewards of `odd_tokens` out at random: as many of each, for no merit."""
    import random

    scores = odd_tokens(completion_ids)
    random.Random(str(completion_ids)).shuffle(scores)
    return scores


def length(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward each token by a quarter."""
    return [len(ids) / 4 for ids in completion_ids]


def nan_on_the_last_rank(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Give a reward that is no number, on one rank only."""
    import os

    broken = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    return [float("nan") if broken else 0.0 for _ in completion_ids]


# --- harm -------------------------------------------------------------------------------------------------


def at_step(trainer: Any, step: int, act: Callable[[], None]) -> None:
    """Call `act` before optimizer step number `step`."""
    from transformers import TrainerCallback

    class Act(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                act()

    trainer.add_callback(Act())


def tell_groups(trainer: Any) -> None:
    """Print what the optimizer works by before step 4."""

    def tell() -> None:
        (group, *_) = trainer.optimizer.param_groups
        print("step 4 by:", *(f"{name} {group[name]}" for name in ("lr", "betas", "eps", "weight_decay")), flush=True)

    at_step(trainer, 4, tell)


def flip_one_bit_of_reference(trainer: Any, role: str = "reference") -> None:
    """Flip the lowest bit of one stored weight of the reference before step 2, on the last rank only."""
    import torch

    def flip() -> None:
        held = trainer.frozen[role]
        if held.model is not None:
            parameter = next(held.model.parameters())
        else:
            parameter = next(p for n, p in trainer.model.named_parameters() if n.endswith("base_layer.weight"))
        shard = getattr(parameter, "ds_tensor", parameter).detach().view(-1)
        shard.view(torch.int32)[3] ^= 1

    if trainer.args.process_index == trainer.args.world_size - 1:
        at_step(trainer, 2, flip)


def flip_one_bit_of_reward(trainer: Any) -> None:
    """Do so to the second reward model."""
    flip_one_bit_of_reference(trainer, "reward_1")


def flip_one_gathered_bit(trainer: Any) -> None:
    """Flip one bit of the gathered copy of a small parameter of the reference before step 2, its shards untouched."""
    import torch

    def flip() -> None:
        parameter = next(trainer.frozen["reference"].model.parameters())
        assert parameter.numel() == parameter.ds_numel, "it is not gathered"
        parameter.data.view(-1).view(torch.int32)[3] ^= 1

    if trainer.args.process_index == trainer.args.world_size - 1:
        at_step(trainer, 2, flip)


def shift_reference(trainer: Any) -> None:
    """Shift the weights of the reference before training, so that it is not what the policy starts from."""
    import torch

    with torch.no_grad():
        for parameter in trainer.frozen["reference"].model.parameters():
            getattr(parameter, "ds_tensor", parameter).add_(0.01)


def unsettle_head(trainer: Any) -> None:
    """Give the fresh scalar head weights before training."""
    import torch

    with torch.no_grad():
        head = trainer.model.score.weight
        getattr(head, "ds_tensor", head).add_(0.01)


def _tamper(change: Callable[[dict[str, Any]], None]) -> None:
    """Change the gathered weights between the engine and the files, as a broken gather would."""
    from align_kit.trainers import save

    gathered = save.gathered

    def tampered(trainer: Any) -> dict[str, Any]:
        weights = {name: tensor.clone() for name, tensor in gathered(trainer).items()}
        if weights:
            change(weights)
        return weights

    save.gathered = tampered


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


def keep_lengths(trainer: Any) -> None:
    """Write the tokens of each pair of each micro-batch, its prompt counted once, by step: a file a rank."""
    steps: list[list[list[int]]] = []
    get = trainer.get_batch_samples

    def watched(*args: Any) -> Any:
        batches, counts = get(*args)
        steps.append([_pair_lengths(batch) for batch in batches])
        Path(f"{trainer.args.output_dir}.{trainer.args.process_index}.json").write_text(json.dumps(steps))
        return batches, counts

    trainer.get_batch_samples = watched


def _pair_lengths(batch: Any) -> list[int]:
    both = batch["attention_mask"].sum(1).view(2, -1).sum(0) - batch["prompt_lengths"]
    return [int(length) for length in both]


def count_elements(trainer: Any) -> None:
    """Write how many elements of each model, and of whatever else is alive, this rank stores, beside the run."""

    def count() -> None:
        models = {"policy": trainer.model, **{role: held.model for role, held in trainer.frozen.items()}}
        kept = {name: _elements(model.parameters()) for name, model in models.items() if model is not None}
        mine = {id(parameter) for parameter in trainer.model.parameters()}
        kept["beside"] = _elements(p for p in _alive() if id(p) not in mine)
        Path(f"{trainer.args.output_dir}.{trainer.args.process_index}.json").write_text(json.dumps(kept))

    at_step(trainer, 1, count)


def _elements(parameters: Any) -> int:
    return sum(getattr(p, "ds_tensor", p).numel() for p in parameters)


def _alive() -> list[Any]:
    """Return every parameter that anything in this process still holds."""
    import gc

    import torch

    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, torch.nn.Parameter)]


def keep_reference_logps(trainer: Any) -> None:
    """Keep the reference's log-probabilities of the first 6 training rows beside the run; every rank computes."""
    import torch

    def keep() -> None:
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in range(6)]))
        logps_BT = trainer.frozen["reference"].token_logps(trainer.model_wrapped, batch).logps_BT.cpu()
        if trainer.args.process_index == 0:
            torch.save(logps_BT, f"{trainer.args.output_dir}.logps")

    at_step(trainer, 1, keep)


def measure_roles(trainer: Any) -> None:
    """After the last step, write how much every role stores and how far it is from a model of its own."""
    from transformers import TrainerCallback

    class Measure(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found = {**_stored(trainer), **_gaps(trainer)}
            Path(f"{args.output_dir}.{args.process_index}.json").write_text(json.dumps(found))

    trainer.add_callback(Measure())


def _stored(trainer: Any) -> dict[str, int]:
    """Return the bytes this rank stores of all roles, and the bytes of the whole base and of all adapters."""
    models = [trainer.model, *(held.model for held in trainer.frozen.values() if held.model is not None)]
    named = [pair for model in models for pair in model.named_parameters()]
    policy = [(name, p) for name, p in trainer.model.named_parameters()]
    added = ("lora_", "head")
    return {
        "stored": sum(p.ds_tensor.numel() * p.element_size() for _, p in named),
        "whole_base": sum(p.ds_numel * p.element_size() for name, p in policy if not any(a in name for a in added)),
        "adapters": sum(p.ds_numel * p.element_size() for name, p in policy if any(a in name for a in added)),
    }


def _gaps(trainer: Any) -> dict[str, float]:
    """Return each role's greatest difference from a model of its own with the same weights, by the largest value."""
    import deepspeed
    import torch

    from align_kit.models import load, source

    engine, ids = trainer.model_wrapped, probe_ids()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    engine.eval()
    with torch.no_grad():
        both = engine(**batch, role="both")
        reference = trainer.frozen["reference"].token_logps(engine, {**batch, "loss_mask": torch.ones_like(ids)})
        reward = trainer.frozen["reward"].scores(engine, batch) if "reward" in trainer.frozen else None
    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    base = source.resolve(trainer.frozen["reference"].identity.name)
    with load.plain_transformers(), torch.no_grad():
        plain = load.load_policy(base, dtype=torch.float32, seed=0).eval()
        at_start = plain(**batch).logits
        policy = _merged(plain, weights, "default")(**batch).logits
        trunk = _merged(load.load_policy(base, dtype=torch.float32, seed=0).eval(), weights, "value")
        value = trunk.model(**batch).last_hidden_state @ weights["value_head.weight"].T
        selected = at_start[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        gaps = {
            "policy": (policy, both.logits),
            "value": (value.squeeze(-1), both.values),
            "reference": (selected, reference.logps_BT),
            "moved": (at_start, both.logits),
        }
        if reward is not None:
            where = source.resolve(trainer.frozen["reward"].identity.name)
            scorer = load.load_policy(where, dtype=torch.float32, seed=0, head="score", pad_token_id=1).eval()
            gaps |= {"reward": (scorer(**batch).logits.squeeze(-1), reward), "reward_spread": (reward[:1], reward[1:])}
    return {name: float((ours - theirs).abs().max() / ours.abs().max()) for name, (ours, theirs) in gaps.items()}


def _merged(model: Any, weights: dict[str, Any], adapter: str) -> Any:
    """Return `model` with an adapter's low-rank products added to its weights by hand; alpha / r is 32 here."""
    for name, parameter in model.named_parameters():
        place = f"policy.base_model.model.{name.removesuffix('.weight')}"
        if (down := weights.get(f"{place}.lora_A.{adapter}.weight")) is not None:
            parameter += 32 * weights[f"{place}.lora_B.{adapter}.weight"] @ down
    return model


# --- the oracle -------------------------------------------------------------------------------------------


def stock_step(phase: str, model: str, data: str, place: str, reference: str = "", **options: Any) -> int:
    """Take one step with TRL's own trainer for `phase`, without DeepSpeed; save model, loss and metrics in `place`."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    config, trainer = _stock(phase)
    kind: Any = AutoModelForSequenceClassification if phase == "reward" else AutoModelForCausalLM
    rows = load_dataset("json", data_files=data, split="train", cache_dir=f"{place}/cache")
    args = config(
        output_dir=place, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        save_strategy="no", logging_steps=1, **options,
    )  # fmt: skip
    stock = trainer(
        model=kind.from_pretrained(model),
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
        **({"ref_model": kind.from_pretrained(reference)} if reference else {}),
    )
    stock.train()
    stock.model.save_pretrained(place)
    lines = [line for line in stock.state.log_history if "loss" in line]
    Path(place, "losses.json").write_text(json.dumps([line["loss"] for line in lines]))
    Path(place, "metrics.json").write_text(json.dumps(lines))
    return 0


def _stock(phase: str) -> tuple[Any, Any]:
    """Return TRL's configuration and trainer classes; ORPO's are experimental and warn where they are imported."""
    import os

    if phase == "orpo":
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOConfig, ORPOTrainer
    import trl

    name = "Reward" if phase == "reward" else phase.upper()
    return getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
