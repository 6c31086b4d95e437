"""The configuration classes of the phases that TRL's stable trainers do not cover, with TRL's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from align_kit.errors import UserError


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """Declare one field: its default, the line `--help` prints, and the words allowed."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class PhaseArguments(TrainingArguments):
    """What both classes share with TRL's: logging, checkpointing and precision defaults, the words, the dropout."""

    logging_steps: float = option(10, "log every so many steps, or at this share of all steps under 1")
    gradient_checkpointing: bool = option(True, "recompute activations instead of keeping them")
    bf16: bool | None = option(  # type: ignore[assignment]
        None, "train in bfloat16; the hardware decides where nothing is said"
    )
    learning_rate: float = option(1e-6, "initial learning rate")
    max_length: int | None = option(1024, "longest prompt and completion together, in tokens")
    disable_dropout: bool = option(True, "train without dropout")
    trust_remote_code: bool = option(False, "run code that a model's folder brings")
    chat_template_path: str | None = option(None, "file with a chat template, or a tokenizer that has one")
    eos_token: str | None = option(None, "token that ends a completion")
    pad_token: str | None = option(None, "token that fills up a batch")

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()


@dataclass
class ORPOConfig(PhaseArguments):
    """Odds ratio preference optimisation (Hong 2024, arXiv 2403.07691)."""

    beta: float = option(0.1, "weight of the odds-ratio term, lambda in the paper")
    truncation_mode: str = option(
        "keep_start", "what is kept of a row that is too long", choices=("keep_start", "keep_end", "drop")
    )


@dataclass
class PPOConfig(PhaseArguments):
    """Proximal policy optimisation from human feedback (Schulman 2017; Ziegler 2019; Huang 2024, arXiv 2403.17031).

    An iteration writes `num_mini_batches` global batches of completions, then trains `num_ppo_epochs` times on them.
    """

    # what is written
    num_generations: int = option(4, "completions written to each prompt")
    response_length: int = option(128, "longest completion, in tokens")
    temperature: float = option(1.0, "sampling temperature; log-probabilities are of the tempered distribution")
    rollout_placement: str = option(
        "auto",
        "where completions are written: the policy gathered once an iteration, or an unsharded copy kept beside it",
        choices=("auto", "gathered", "copied"),
    )
    rollout_batch_size: int = option(64, "completions a rank writes at a time")
    score_batch_size: int | None = option(
        None, "completions a rank scores at a time; per_device_train_batch_size where none, which fits"
    )

    # what it is worth
    reward_model_name_or_path: list[str] | str | None = option(
        None, "reward model, or several; the finished reward run beside output_dir where there is no reward at all"
    )
    reward_funcs: list[str] | str | None = option(
        None, "reward functions by dotted path, or 'checker' for the checker that the data's card names"
    )
    reward_placement: str = option(
        "auto",
        "where reward models live: an adapter on the policy's base, or a model of their own",
        choices=("auto", "shared", "sharded", "offloaded", "quantised"),
    )
    reward_weights: list[float] | None = option(None, "weight of each reward, models first; 1 each")
    normalise_rewards: bool = option(False, "measure rewards from their running mean, in running standard deviations")
    missing_eos_penalty: float | None = option(None, "taken off the score of a completion that does not end")
    kl_coef: float = option(0.05, "weight of the KL divergence to the reference in the reward")
    kl_estimator: str = option("k1", "estimator of the KL divergence (Schulman 2020)", choices=("k1", "k3"))
    kl_target: float | None = option(None, "nats per completion that an adaptive kl_coef steers to (Ziegler 2019)")
    kl_horizon: int = option(10000, "completions over which an adaptive kl_coef moves")
    whiten_rewards: bool = option(False, "whiten the per-token rewards before advantages are estimated")

    # how it is learnt from
    num_ppo_epochs: int = option(4, "passes over the completions of an iteration")
    num_mini_batches: int = option(1, "optimizer steps in each pass")
    cliprange: float = option(0.2, "clip range of the probability ratio")
    cliprange_value: float | None = option(0.2, "clip range of the value; null for none")
    vf_coef: float = option(0.1, "weight of the value loss")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    gamma: float = option(1.0, "discount factor")
    lam: float = option(0.95, "lambda of the generalised advantage estimate")
    whiten_advantages: bool = option(True, "whiten advantages over all completions of the iteration")
    value_learning_rate: float | None = option(None, "learning rate of the value model; the policy's where none")
    value_model_name_or_path: str | None = option(None, "start of the value model; the policy's own start where none")
    early_stop_kl: float | None = option(None, "end an iteration's updates at this KL to the policy that wrote it")
    num_sample_completions: int = option(2, "completions shown in each iteration's entry of samples.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reward_model_name_or_path", "reward_funcs"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.max_length is not None and self.response_length >= self.max_length:
            raise UserError(
                f"response_length {self.response_length} leaves no room for a prompt in max_length {self.max_length}; "
                "raise max_length or lower response_length"
            )
