"""Every contradiction and every impossible number of a configuration, in one place, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from align_kit.config import places
from align_kit.config.merge import ALTERNATIVES
from align_kit.config.quantities import parse_bytes, parse_duration
from align_kit.config.resolved import Config
from align_kit.config.steps import parse_steps
from align_kit.config.suspicions import SUSPICIONS
from align_kit.config.values import Misfit
from align_kit.errors import UserError, unknown


class Range(NamedTuple):
    """The values a number may have: from `low` (itself excluded where `above`) to `most`, or to under `under`."""

    low: float
    above: bool = False
    under: float | None = None
    most: float | None = None

    def holds(self, number: float) -> bool:
        """Return whether `number` lies inside."""
        over_low = number > self.low if self.above else number >= self.low
        below = (self.under is None or number < self.under) and (self.most is None or number <= self.most)
        return over_low and below

    def words(self) -> str:
        """Return the range for a message: `above 0` or `0 or more, under 1`."""
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        low = low if self.most is None else f"{low}, at most {self.most:g}"
        return low if self.under is None else f"{low}, under {self.under:g}"


POSITIVE = Range(0, above=True)
AT_LEAST_ONE = Range(1)
NOT_NEGATIVE = Range(0)
UP_TO_ONE = Range(0, above=True, most=1)

RANGES: dict[str, Range] = {
    "beta": POSITIVE,
    "label_smoothing": Range(0, under=0.5),
    "desirable_weight": POSITIVE,
    "undesirable_weight": POSITIVE,
    "center_rewards_coefficient": NOT_NEGATIVE,
    "max_length": Range(2),
    "num_generations": AT_LEAST_ONE,
    "response_length": AT_LEAST_ONE,
    "temperature": POSITIVE,
    "rollout_batch_size": AT_LEAST_ONE,
    "score_batch_size": AT_LEAST_ONE,
    "kl_coef": NOT_NEGATIVE,
    "kl_target": POSITIVE,
    "kl_horizon": AT_LEAST_ONE,
    "num_ppo_epochs": AT_LEAST_ONE,
    "num_mini_batches": AT_LEAST_ONE,
    "cliprange": POSITIVE,
    "cliprange_value": POSITIVE,
    "vf_coef": NOT_NEGATIVE,
    "entropy_coef": NOT_NEGATIVE,
    "missing_eos_penalty": NOT_NEGATIVE,
    "gamma": Range(0, most=1),
    "lam": Range(0, most=1),
    "value_learning_rate": NOT_NEGATIVE,
    "early_stop_kl": POSITIVE,
    "num_sample_completions": NOT_NEGATIVE,
    "seed": NOT_NEGATIVE,
    "data_seed": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "save_minutes": POSITIVE,
    "save_milestone_steps": AT_LEAST_ONE,
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "global_batch_size": AT_LEAST_ONE,
    "max_grad_norm": NOT_NEGATIVE,
    "save_total_limit": AT_LEAST_ONE,
    "dataset_num_proc": AT_LEAST_ONE,
    "lora_r": AT_LEAST_ONE,
    "lora_alpha": AT_LEAST_ONE,
    "lora_dropout": Range(0, under=1),
    "fingerprint_steps": NOT_NEGATIVE,
    "spike_deviations": POSITIVE,
    "early_stopping_patience": AT_LEAST_ONE,
    "test_split_size": POSITIVE,
    "test_split_seed": NOT_NEGATIVE,
    "mixture_temperature": POSITIVE,
    "precompute_ref_batch_size": AT_LEAST_ONE,
    "ref_model_mixup_alpha": UP_TO_ONE,
    "ref_model_sync_steps": AT_LEAST_ONE,
}
ENTRY_RANGES: dict[str, Range] = {
    **{"fraction": POSITIVE, "weight": POSITIVE, "epochs": POSITIVE},
    **{"max_samples": AT_LEAST_ONE, "max_share": UP_TO_ONE},
}


def contradictions(config: Config) -> list[str]:
    """Return one line for each thing the configuration says that cannot be, or cannot be together."""
    return [line for rule in RULES for line in rule(config)]


def _numbers(config: Config) -> Iterator[str]:
    """A number outside its range."""
    for name, allowed in RANGES.items():
        if name in config.origin and not _in(config.value(name), allowed):
            yield f"{name} ({config.origin[name]}) is {config.value(name)}; expected {allowed.words()}"
    for group in ("datasets", "eval_datasets"):
        for position, entry in enumerate(config.value(group)):
            for name, allowed in ENTRY_RANGES.items():
                if not _in(getattr(entry, name), allowed):
                    yield f"{group}[{position}].{name} is {getattr(entry, name)}; expected {allowed.words()}"


def _in(value: Any, allowed: Range) -> bool:
    return not isinstance(value, int | float) or allowed.holds(value)


def _both(config: Config, *names: str) -> str | None:
    """Return the two keys and their places where both were given a value that asks for something."""
    if all(config.given(name) and config.value(name) not in (None, False, []) for name in names):
        return " and ".join(f"{name} ({config.origin[name]})" for name in names)
    return None


def _exclusive(config: Config) -> Iterator[str]:
    """Two ways of saying one thing."""
    for names, advice in EXCLUSIVE.items():
        if both := _both(config, *names):
            yield f"{both} were both given; {advice}"


EXCLUSIVE: dict[tuple[str, str], str] = {
    **ALTERNATIVES,
    ("resume", "overwrite"): "drop one: continue what is in output_dir, or replace it",
    ("resume_from_checkpoint", "overwrite"): "drop one: continue what is in output_dir, or replace it",
    ("resume", "resume_from_checkpoint"): "drop resume_from_checkpoint",
}


def _adapters(config: Config) -> Iterator[str]:
    """Adapter settings without an adapter, and an adapter with a reference that it makes needless."""
    model, run = config.model, config.run
    names = [name for name in config.origin if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    lora = [name for name in names if config.value(name) not in (None, False)]
    if lora and not config.given("use_peft"):
        yield f"{', '.join(lora)} given without use_peft; add use_peft: true, or use_peft: false to train all weights"
    if model.use_peft and run.reference_model_name_or_path and _placement(config) in ("auto", "adapter"):
        yield (
            "use_peft and reference_model_name_or_path were both given; drop one (the policy without its adapter is "
            "the reference), or ask for both with reference_placement: sharded"
        )
    if run.reference_placement == "adapter" and run.reference_model_name_or_path:
        yield "reference_placement: adapter has no place for reference_model_name_or_path; drop one"
    if run.reference_placement == "adapter" and config.given("use_peft") and not model.use_peft:
        yield "reference_placement: adapter needs an adapter, but use_peft is false; drop one"


def _fewer_bits(config: Config) -> Iterator[str]:
    """A base in 4 bits that would be trained itself, or numbers of one that is not."""
    if config.model.load_in_4bit and config.given("load_in_4bit") and not config.model.use_peft:
        yield "load_in_4bit stores a base that is not trained; add use_peft: true, or drop it"
    for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
        if config.given(name) and config.value(name) not in (None, False) and not config.model.load_in_4bit:
            yield f"{name} ({config.origin[name]}) was given without load_in_4bit; add load_in_4bit: true, or drop it"


def _placement(config: Config) -> str:
    """Return where the reference is asked to live; TRL's `precompute_ref_log_probs` is another word for cached."""
    return "cached" if config.training.get("precompute_ref_log_probs") else config.run.reference_placement


def _task_type(config: Config) -> Iterator[str]:
    """A LoRA task type that is not the phase's."""
    fits = "SEQ_CLS" if config.phase == "reward" else "CAUSAL_LM"
    if config.given("lora_task_type") and config.model.lora_task_type != fits:
        yield f"lora_task_type is {config.model.lora_task_type!r}, but {config.phase} trains {fits}; drop it"


def _references(config: Config) -> Iterator[str]:
    """A reference asked of a phase that has none."""
    if config.phase not in ("pretrain", "sft", "orpo", "reward"):
        return
    for name in ("reference_model_name_or_path", "reference_placement", "reference_differs"):
        if config.given(name) and config.value(name) not in (None, "auto", False):
            yield f"{name} ({config.origin[name]}) was given, but {config.phase} has no reference; drop it"


def _stored_reference(config: Config) -> Iterator[str]:
    """Stored log-probabilities beside another placement, or in a phase that writes its own completions."""
    training, placement = config.training, config.run.reference_placement
    if training.get("precompute_ref_log_probs") and placement not in ("auto", "cached"):
        yield f"precompute_ref_log_probs means reference_placement: cached, and {placement} was given; drop one"
    if training.get("precompute_ref_batch_size") is not None and _placement(config) != "cached":
        yield "precompute_ref_batch_size was given, but nothing is computed before; add reference_placement: cached"
    if placement == "cached" and config.phase == "ppo":
        yield "reference_placement: cached needs completions that stand in the data, and ppo writes its own; drop it"


def _moving_reference(config: Config) -> Iterator[str]:
    """A reference that follows the policy where it cannot, or numbers of one that does not."""
    if not config.training.get("sync_ref_model"):
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if config.given(name):
                yield f"{name} ({config.origin[name]}) was given without sync_ref_model; add sync_ref_model: true"
        return
    if _placement(config) not in ("auto", "sharded"):
        yield f"sync_ref_model moves a sharded reference, and {_placement(config)} was given; drop one"
    if config.model.use_peft:
        yield "sync_ref_model moves whole weights, and use_peft trains an adapter; drop one"


def _online(config: Config) -> Iterator[str]:
    """What does not fit a phase that writes its own completions."""
    if config.phase != "ppo":
        return
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if config.value(name) == "epoch":
            yield f"{name} ({config.origin[name]}) is epoch, and ppo goes by iterations, not by epochs; use steps"
    if config.given("kl_horizon") and config.value("kl_target") is None:
        yield f"kl_horizon ({config.origin['kl_horizon']}) was given, but kl_coef is fixed; add kl_target, or drop it"
    if config.value("kl_target") is not None and not config.value("kl_coef"):
        yield "kl_target moves kl_coef by a factor, and kl_coef is 0; give it a number above 0, or drop kl_target"
    if config.value("reward_placement") == "shared" and not config.model.use_peft:
        yield "reward_placement: shared needs the policy's base unchanged; add use_peft: true, or use sharded"
    if config.value("value_model_name_or_path") and config.model.use_peft:
        yield "value_model_name_or_path and use_peft were both given: the value function is an adapter then; drop one"


def _model_start(config: Config) -> Iterator[str]:
    """Changes to a configuration that is not the start."""
    if config.model.config_overrides and not config.model.config_name:
        yield "config_overrides was given without config_name; a trained model's configuration cannot be changed"


def _loss(config: Config) -> Iterator[str]:
    """Weights that do not match the losses they weigh; of losses that there are not, that is said first."""
    weights, losses = config.training.get("loss_weights"), config.training.get("loss_type", ["sigmoid"])
    if weights is None or not isinstance(losses, list) or len(weights) == len(losses):
        return
    strangers = [name for name in losses if name not in PAIR_LOSSES]
    yield from (str(unknown("loss_type", name, PAIR_LOSSES)) for name in strangers)
    yield (
        f"loss_weights has {len(weights)} numbers for {len(losses)} losses ({', '.join(losses)}); give one each "
        f"(loss_weights: {config.origin['loss_weights']}, loss_type: {config.origin.get('loss_type', 'the default')})"
    )


PAIR_LOSSES = (  # those of `losses.pairwise`, which needs torch
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


def _limits(config: Config) -> Iterator[str]:
    """Limits of suspicions that there are not, or that are no share."""
    for name, share in (config.data.data_limits or {}).items():
        if name not in SUSPICIONS:
            yield str(unknown("key of data_limits", name, SUSPICIONS))
        elif not 0 <= share <= 1:
            yield f"data_limits: {name} is {share:g}; give a share of the rows from 0 to 1, which is never"


def _precision(config: Config) -> Iterator[str]:
    """A weight dtype that the mixed precision cannot train."""
    for flag, other in (("bf16", "float16"), ("fp16", "bfloat16")):
        if config.training.get(flag) and config.model.dtype == other:
            yield f"{flag}: true and dtype: {other} were both given; drop one"


def _evaluation(config: Config) -> Iterator[str]:
    """What needs evaluation, without it."""
    if config.value("eval_strategy") != "no":
        return
    patience = config.run.early_stopping_patience
    if patience is not None:
        yield f"early_stopping_patience={patience} needs evaluation; set eval_strategy: steps or epoch"
    for name in ("test_split_size", "eval_datasets"):
        if getattr(config.data, name):
            yield f"{name} ({config.origin[name]}) needs evaluation; set eval_strategy: steps or epoch"
    for name in ("load_best_model_at_end", "do_eval"):
        if config.training.get(name):
            yield f"{name} ({config.origin[name]}) needs evaluation; set eval_strategy: steps or epoch"


def _saving(config: Config) -> Iterator[str]:
    """A cadence of checkpoints, said on the command line, where a file says that none are made."""
    said, where = config.origin.get("save_steps"), config.origin.get("save_strategy")
    if said == "command line" and where != said and config.value("save_strategy") == "no":
        yield f"save_steps was given, but save_strategy ({where}) is no; add --save_strategy steps"


def _packing(config: Config) -> Iterator[str]:
    """Unpacked pretraining."""
    if config.phase == "pretrain" and config.given("packing") and not config.training.get("packing"):
        yield f"packing ({config.origin['packing']}) is false, but pretrain always packs; drop it or use phase sft"


def _checkpointing(config: Config) -> Iterator[str]:
    """transformers' two names of one switch, set to different values."""
    for suffix in ("", "_kwargs"):
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        given = config.given(old) and config.given(new)
        if given and config.value(old) != config.value(new):
            yield f"{old} and {new} are two names of one setting and were given different values; drop {old}"


def _quantities(config: Config) -> Iterator[str]:
    """A size or a time that cannot be read as one."""
    for name, parse in QUANTITIES.items():
        try:
            parse(config.value(name) or "1")
        except Misfit as misfit:
            yield f"{name} ({config.origin[name]}) {misfit}"


QUANTITIES: dict[str, Callable[[str], float]] = {"save_bytes_limit": parse_bytes, "save_before": parse_duration}


def _second_place(config: Config) -> Iterator[str]:
    """A place for copies of checkpoints that nothing opens, or that goes when the first one goes."""
    url = config.run.save_copy_to
    if url and (problem := places.problem(url, config.value("output_dir"))):
        yield f"save_copy_to ({config.origin['save_copy_to']}) {problem}"


def _skip_steps(config: Config) -> Iterator[str]:
    """A list of steps that cannot be read."""
    try:
        parse_steps(config.run.skip_steps or "1")
    except UserError as error:
        yield str(error)


def _fractions(config: Config) -> Iterator[str]:
    """TRL's shares, given to some entries only."""
    shares = [entry.fraction is not None for entry in config.data.datasets]
    if any(shares) and not all(shares):
        yield "fraction must be given to all entries of datasets or to none"


RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    _numbers,
    _exclusive,
    _adapters,
    _fewer_bits,
    _task_type,
    _references,
    _stored_reference,
    _moving_reference,
    _online,
    _model_start,
    _loss,
    _precision,
    _evaluation,
    _saving,
    _packing,
    _checkpointing,
    _quantities,
    _second_place,
    _fractions,
    _skip_steps,
    _limits,
)
