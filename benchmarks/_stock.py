"""TRL's own trainer beside one of ours: the same rows, model, reference, engine and options."""

from __future__ import annotations

import copy
from typing import Any

# Options that both take from the same words; everything else of the step is TRL's own affair.
SAME = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "optim", "weight_decay", "max_grad_norm", "seed", "max_length", "train_sampling_strategy",
    "gradient_checkpointing", "logging_strategy", "save_strategy", "bf16", "fp16", "use_cpu",
)  # fmt: skip


def stock_trainer(ours: Any, rows: str, model: str, reference: str, *, cached: bool, place: str) -> Any:
    """Return TRL's DPOTrainer or SFTTrainer for the JSON lines in `rows`, with the options and engine of `ours`.

    `reference` is "" for SFT. Padding-free batches are off: TRL allows them with flash attention only.
    """
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    options = {name: getattr(ours.args, name) for name in SAME}
    engine = copy.deepcopy(ours.args.hf_deepspeed_config.config)
    options |= {"deepspeed": engine, "output_dir": place, "report_to": "none", "disable_tqdm": True}
    if reference:
        options |= {"beta": ours.args.beta, "loss_type": ours.args.loss_type, "precompute_ref_log_probs": cached}
    args = (trl.DPOConfig if reference else trl.SFTConfig)(**options)
    allow_a_second_engine()
    load = AutoModelForCausalLM.from_pretrained
    given = {
        "model": load(model, dtype="float32"),
        "args": args,
        "train_dataset": load_dataset("json", data_files=rows, split="train", cache_dir=f"{place}/cache"),
        "processing_class": ours.processing_class,
    }
    if not reference:
        return trl.SFTTrainer(**given)
    stock = trl.DPOTrainer(**given, ref_model=load(reference, dtype="float32"))
    if cached:
        stock.ref_model = None  # it has computed all it is needed for
    return stock


def allow_a_second_engine() -> None:
    """Let accelerate make a second engine in this process; it remembers the first one's plugin otherwise."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def check_same_rows(ours: Any, stock: Any) -> None:
    """Raise where the two trainers' tokenised rows differ."""
    names = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in ours.train_dataset.column_names]
    for name in names or ["input_ids"]:
        if list(map(list, ours.train_dataset[name])) != list(map(list, stock.train_dataset[name])):
            raise RuntimeError(f"{name} differ between the trainers: they would not do the same work")
