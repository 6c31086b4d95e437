"""Configurations for the planner to be judged on: drawn at random, written to disk, and watched while they run."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align_kit.cards import PHASE_KINDS
from align_kit.plan import peak
from align_kit.plan.batches import micro_of
from align_kit.plan.facts import Micro, Run
from align_kit.plan.state import persistent
from align_kit.resources import folder
from tests.small import SETTINGS, make_tokenizer, sentence, write_rows

STEPS = 4  # without rollouts; the first is left out of traffic
ITERATIONS = 3  # with
ROWS = 48  # whole steps an epoch, whatever the batch; of text as many as fill blocks for all steps
RANKS = 2
FEWEST_WORDS = 10  # of a text, times the case's scale; each is a token or more
OF_A_MICRO_BATCH = ("forward", "head", "reference", "backward", "reduce")  # moments of the planner
CHOICES = ("forward", "reference_placement", "rollout_placement")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Case:
    """One configuration: the model's own numbers, how long its rows are, and the options of the run."""

    phase: str
    family: str
    model: Mapping[str, Any]
    scale: int  # of the rows' lengths
    options: Mapping[str, Any]
    scorer: bool = False  # whether a reward model judges

    @property
    def words(self) -> str:
        """What of it a reader of the table tells it by."""
        options, engine = self.options, self.options["deepspeed"]["zero_optimization"]
        parts = [
            f"{self.phase} {self.family} {self.model['hidden_size']}x{self.model['num_hidden_layers']}",
            f"V{self.model['vocab_size']}",
            f"zero{engine['stage']}",
            f"lora{options['lora_r']}" if options.get("use_peft") else "full",
            "bf16" if options.get("bf16") else "fp32",
            f"{options['per_device_train_batch_size']}x{options['gradient_accumulation_steps']}",
            *(["checkpointing"] if options["gradient_checkpointing"] else []),
            *(str(options[name]) for name in CHOICES if name in options),
            *([f"evaluates {options['per_device_eval_batch_size']}"] if "eval_strategy" in options else []),
        ]
        return " ".join([*parts, *(["reward model"] if self.scorer else [])])


# --- drawn --------------------------------------------------------------------------------------------------------


def drawn(draw: random.Random) -> Case:
    """Return a configuration, every part of it at random; contradictions are not drawn."""
    phase = draw.choice(["pretrain", "sft", "sft", "reward", "dpo", "dpo", "orpo", "kto", "ppo", "ppo"])
    family = draw.choice(["llama", "llama", *FAMILIES])
    engine = _engine(draw)
    options: dict[str, Any] = {
        "max_length": draw.choice([48, 96, 192]),
        "data_limits": {"dropped": 1, "cut": 1},  # rows are drawn as long as they come
        "per_device_train_batch_size": draw.choice([1, 2, 4]),
        "gradient_accumulation_steps": draw.choice([1, 1, 2, 3]),
        "gradient_checkpointing": draw.random() < 0.4,
        "bf16": draw.random() < 0.25,
        "deepspeed": engine,
    }
    if phase != "pretrain" and draw.random() < 0.3:
        options["forward"] = draw.choice(["plain", "packed"])
    if phase != "pretrain" and draw.random() < 0.4:
        options |= {"use_peft": True, "lora_r": draw.choice([2, 4, 16]), "lora_dropout": 0.0}
    if phase in ("dpo", "kto") and draw.random() < 0.6:
        options["reference_placement"] = draw.choice(["sharded", "quantised", "cached"])
        if family == "gpt2" and options["reference_placement"] == "quantised":
            options["reference_placement"] = "sharded"  # its layers are none of torch's, and none is stored in int8
    scorer = phase == "ppo" and draw.random() < 0.5
    options |= _online(draw, options) if phase == "ppo" else {"max_steps": STEPS, **_evaluation(options)}
    return Case(phase, family, _model(draw, family), draw.choice([1, 2, 4]), options, scorer)


def _evaluation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return how some of the runs evaluate, drawn from what is known of them.

    After the last step: ZeRO-3 may keep weights whole that an evaluation has gathered, and the step after sends less.
    """
    draw = random.Random(repr(options))
    rows = draw.choice([0, 0, 0, 2, 8, 32])
    return {"eval_strategy": "steps", "eval_steps": STEPS, "per_device_eval_batch_size": rows} if rows else {}


def _engine(draw: random.Random) -> dict[str, Any]:
    stage = draw.choice([1, 2, 3, 3])
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": draw.choice(["auto", 20_000, 300_000])}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = draw.choice(["auto", 0, 1000])
        zero["stage3_prefetch_bucket_size"] = draw.choice(["auto", 50_000])
    shipped = json.loads((folder("ds_configs") / "zero2.json").read_text())
    return {**shipped, "zero_optimization": zero}


def _model(draw: random.Random, family: str) -> dict[str, Any]:
    heads = draw.choice([2, 4])
    hidden = heads * draw.choice([16, 32])
    return {
        "vocab_size": draw.choice([336, 1024, 4096]),
        "hidden_size": hidden,
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, heads]),
        "intermediate_size": hidden * draw.choice([2, 3]),
        "tie_word_embeddings": draw.random() < 0.5,
        **FAMILIES[family],
    }


def _online(draw: random.Random, options: Mapping[str, Any]) -> dict[str, Any]:
    epochs, parts = draw.choice([1, 2]), draw.choice([1, 2])
    return {
        "num_ppo_epochs": epochs,
        "num_mini_batches": parts,
        "num_generations": 2,
        "per_device_train_batch_size": max(2, options["per_device_train_batch_size"]),
        "response_length": draw.choice([8, 24]),
        "rollout_placement": draw.choice(["gathered", "copied"]),
        "max_steps": ITERATIONS * epochs * parts,
    }


# --- written ------------------------------------------------------------------------------------------------------


def written(case: Case, home: Path) -> dict[str, Any]:
    """Write the model and the rows of a case into `home`; return the options of its run."""
    home.mkdir()
    rows = [_row(case, random.Random(f"{place}")) for place in range(_count(case))]
    options = {
        **SETTINGS,
        "config": home / "nothing.yaml",
        "model_name_or_path": _write_model(case, home / "model", "AutoModelForCausalLM"),
        "datasets": [{"path": write_rows(home / "rows.jsonl", rows)}],
        "output_dir": home / "out",
        **case.options,
    }
    if "eval_strategy" in options:
        held_out = [_row(case, random.Random(f"held out {place}")) for place in range(ROWS)]
        options["eval_datasets"] = [{"path": write_rows(home / "held_out.jsonl", held_out), "split": "train"}]
    (home / "nothing.yaml").write_text("{}\n")
    if case.scorer:
        options["reward_model_name_or_path"] = _write_model(
            case, home / "scorer", "AutoModelForSequenceClassification", num_labels=1
        )
    elif case.phase == "ppo":
        options["reward_funcs"] = ["tests.rank_work:odd_tokens"]
    return options


def _write_model(case: Case, place: Path, kind: str, **changes: Any) -> Path:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(
        case.family, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=1,
        **{**case.model, **changes},
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, kind).from_config(config).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


def _count(case: Case) -> int:
    """Return how many rows are written: no step of the run is cut short by the end of an epoch."""
    if PHASE_KINDS[case.phase][0] != "text":
        return ROWS
    step = case.options["per_device_train_batch_size"] * case.options["gradient_accumulation_steps"] * RANKS
    return max(ROWS, STEPS * step * case.options["max_length"] // (FEWEST_WORDS * case.scale) + 1)


def _row(case: Case, draw: random.Random) -> dict[str, Any]:
    """Return a row of what the phase takes, as long as the case has it."""
    some: Callable[[int], str] = lambda most: sentence(draw, 1, most * case.scale)  # noqa: E731
    kind = PHASE_KINDS[case.phase][0]
    if kind == "text":
        return {"text": sentence(draw, FEWEST_WORDS * case.scale, 2 * FEWEST_WORDS * case.scale)}
    row = {"prompt": some(6)}
    answers = {"prompt_completion": ["completion"], "preference": ["chosen", "rejected"], "binary": ["completion"]}
    row |= {name: " " + some(6) for name in answers.get(kind, [])}
    if kind == "binary":
        return {**row, "label": draw.random() < 0.5}
    return {**row, "answer": some(1)} if kind == "prompt" else row


# --- watched ------------------------------------------------------------------------------------------------------


def watched(argv: list[str], report: str) -> int:
    """Run `align-kit argv…` and write to `report`.<rank> what its allocator did and what it held in the end.

    "drawn" is what the planner says of the micro-batches and prompts this rank really had: bytes by moment.
    """
    from benchmarks._allocator import run_watched

    with noting():
        return run_watched(argv, report, "benchmarks._planned:held")


@dataclass
class Had:
    """What a rank had to compute: the run as it was planned, its micro-batches, of evaluations too, its longest prompt.

    Each micro-batch stands with the optimizer step it was of: before the first the optimizer has no moments, and in
    the first few ZeRO-3 has not learnt the order of the modules.
    """

    run: Run | None = None
    micros: set[tuple[int, Micro]] = field(default_factory=set)
    evaluated: set[Micro] = field(default_factory=set)
    state: dict[str, int] | None = None  # what was held before an evaluation, in bytes by component
    longest_prompt: int = 0

    def moments(self) -> dict[str, int]:
        """Return what the planner says of it: bytes beside the state, by moment."""
        assert self.run is not None
        run = self.run
        if run.rollout is not None:
            run = replace(run, rollout=replace(run.rollout, longest_prompt=self.longest_prompt))
        lacking = persistent(run).get("moments", 0)
        most: dict[str, int] = {}
        for step, micro in self.micros:
            begun = step // (run.rollout.steps if run.rollout else 1)
            for name, parts in peak.moments(replace(run, worst=micro, evaluated=None), begun=begun).items():
                size = sum(parts.values()) - (lacking if step == 0 and name in OF_A_MICRO_BATCH else 0)
                most[name] = max(most.get(name, size), size)
        for micro in self.evaluated:
            parts = peak.moments(replace(run, evaluated=micro), begun=STEPS)["evaluation"]
            most["evaluation"] = max(most.get("evaluation", 0), sum(parts.values()))
        return most


had = Had()


@contextmanager
def noting() -> Iterator[None]:
    """Note in `had` what this rank has to compute."""
    from align_kit import stages
    from align_kit.trainers.base import PhaseTrainer
    from align_kit.trainers.measured import state_bytes
    from align_kit.trainers.rollout import LocalWriter

    plan, step, write = stages.planned, PhaseTrainer.training_step, LocalWriter.write
    batches = PhaseTrainer._evaluation_batches
    vars(had).update(vars(Had()))

    def planned(*args: Any, **kwargs: Any) -> Any:
        made = plan(*args, **kwargs)
        had.run = made.plan.run
        return made

    def training_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert had.run is not None
        micro = micro_of(inputs, had.run.forward, had.run.policy.head == "score")
        had.micros.add((trainer.state.global_step, micro))
        return step(trainer, model, inputs, *args, **kwargs)

    def evaluation_batches(trainer: Any, loader: Any) -> Iterator[dict[str, Any]]:
        had.state = had.state or state_bytes(trainer)
        for batch in batches(trainer, loader):
            if had.run is not None and had.run.evaluated:
                had.evaluated.add(micro_of(batch, had.run.forward, had.run.policy.head == "score"))
            yield batch

    def written(writer: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        had.longest_prompt = max(had.longest_prompt, *map(len, prompts))
        return write(writer, prompts, *args, **kwargs)

    stages.planned, PhaseTrainer.training_step, LocalWriter.write = planned, training_step, written  # type: ignore
    PhaseTrainer._evaluation_batches = evaluation_batches  # type: ignore[method-assign]
    try:
        yield
    finally:
        stages.planned, PhaseTrainer.training_step, LocalWriter.write = plan, step, write  # type: ignore
        PhaseTrainer._evaluation_batches = batches  # type: ignore[method-assign]


def held(trainer: Any) -> dict[str, Any]:
    """Return the bytes that a rank holds between two steps, by component, and those of all other tensors."""
    import torch

    from align_kit.trainers.measured import state_bytes

    state = had.state or state_bytes(trainer)
    writer = getattr(trainer, "writer", None)
    own = [mine for mine, _ in getattr(writer, "_pairs", ())]  # empty but for a copy
    if copied := sum(tensor.numel() * tensor.element_size() for tensor in own):
        state["rollout copy"] = copied
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return {"state": state, "other": sum(storages.values()) - sum(state.values()), "drawn": had.moments()}
