"""A few prompts answered by the model a run started from and by the one it left, both as they lie on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align_kit import log, run_folder
from align_kit.config import Config
from align_kit.data.prepare import Prepared
from align_kit.errors import first_line
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder
from align_kit.stages.beginning import Start
from align_kit.telemetry import spent

ANSWER_TOKENS = 48
PROMPT_TOKENS = 512  # of a longer prompt the last ones are shown
OPENING = 16  # tokens of a text without a prompt that stand for one
LIMIT = 2_000_000_000  # bytes of weights of both models: they answer on the CPU, while the other ranks wait


@spent.during("samples")
def before_and_after(
    recipe: Recipe, config: Config, start: Start, rows: Prepared, trainer: Any, home: RunFolder
) -> None:
    """Write `samples_before_after.jsonl` into the run's folder, on rank 0; the manifest says why where there is none.

    Each line holds "prompt", "before" (null where the run started from random weights) and "after", greedy and no
    longer than `ANSWER_TOKENS`. The run is saved by now: what goes wrong here is a warning.
    """
    count = config.run.sample_prompts
    if trainer.args.process_index != 0 or count == 0:
        return
    why = _why_none(recipe, start, trainer, home)
    if why is None:
        try:
            _write(config, start, rows, trainer, home, count)
        except Exception as error:
            why = f"they could not be made ({type(error).__name__}: {first_line(error)})"
            log.warn(f"no samples before and after: {why}")
    home.manifest["samples"] = {"why": why}


def _why_none(recipe: Recipe, start: Start, trainer: Any, home: RunFolder) -> str | None:
    if recipe.head == "score":
        return "a reward model gives scores, not words"
    folders = {home.path, start.source.weights.folder, start.source.folder}
    size = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    if size > LIMIT:
        return f"both models take {size / 1e9:.1f} GB, and up to {LIMIT / 1e9:.0f} GB are opened again for samples"
    return None


def _write(config: Config, start: Start, rows: Prepared, trainer: Any, home: RunFolder, count: int) -> None:
    tokenizer = trainer.processing_class
    prompts = [_prompt(row) for row in _spread((rows.eval or rows.train).rows, count)]
    before: Sequence[str | None] = [None] * len(prompts)
    if not start.source.random:
        before = _answers(_start(config, start, trainer), tokenizer, prompts)
    after = _answers(_end(trainer, home), tokenizer, prompts)
    with (home.path / run_folder.ANSWERS).open("w", encoding="utf-8") as stream:
        for prompt, old, new in zip(prompts, before, after, strict=True):
            line = {"prompt": tokenizer.decode(prompt), "before": old, "after": new}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _spread(rows: Any, count: int) -> list[Mapping[str, Any]]:
    """Return up to `count` rows from all over the data, no prompt twice."""
    found: dict[tuple[int, ...], Mapping[str, Any]] = {}
    for place in range(0, len(rows), max(1, len(rows) // (4 * count))):
        found.setdefault(tuple(_prompt(rows[place])), rows[place])
    apart = max(1, len(found) // count)
    return list(found.values())[::apart][:count]


def _prompt(row: Mapping[str, Any]) -> list[int]:
    """Return the tokens before the first that is trained, or the opening of a text that is trained whole."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])[-PROMPT_TOKENS:]
    ids, mask = list(row["input_ids"]), list(row["loss_mask"])
    begins = mask.index(1) if 1 in mask else 0
    return ids[:begins][-PROMPT_TOKENS:] if begins > 1 else ids[: min(OPENING, max(1, len(ids) // 2))]


def _start(config: Config, start: Start, trainer: Any) -> Any:
    from align_kit.models import load

    bits = None if start.source.is_adapter else _bits(trainer)  # an adapter is merged in full precision
    trusted = config.value("trust_remote_code")
    with load.plain_transformers():
        return load.load_policy(
            start.source, dtype=_dtype(trainer), seed=trainer.args.seed, trust_remote_code=trusted, quantised=bits
        ).eval()


def _end(trainer: Any, home: RunFolder) -> Any:
    from align_kit.trainers.save import reopen

    trusted = getattr(trainer.args, "trust_remote_code", False)
    return reopen(home.path, _dtype(trainer), trust_remote_code=trusted, base_bits=_bits(trainer))


def _bits(trainer: Any) -> Any:
    from align_kit.models import quantised

    return quantised.settings_of(trainer.model) if trainer.is_lora else None


def _dtype(trainer: Any) -> Any:
    return next(trainer.stored_model.parameters()).dtype


def _answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Return the greedy answers of a model, wherever it lies, to prompts of tokens."""
    import torch
    from transformers import GenerationConfig

    from align_kit.models import generate, load, moe
    from align_kit.models.quantiles import ends_of

    encoded = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    ends, pad = list(ends_of(model, tokenizer)), tokenizer.pad_token_id
    asked = GenerationConfig(
        do_sample=False, max_new_tokens=ANSWER_TOKENS, eos_token_id=ends, pad_token_id=pad, use_cache=True
    )
    # Under ZeRO-3 `generate` would wait for the other ranks, which answer nothing.
    with load.plain_transformers(), generate.own_settings_aside(model), torch.inference_mode():
        ids_BT = model.generate(
            **{name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")},
            generation_config=asked,
            **moe.generating(model),
        )
    return list(tokenizer.batch_decode(ids_BT[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
