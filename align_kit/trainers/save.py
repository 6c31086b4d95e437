"""The final model: gathered, stored in Hugging Face form, re-opened and compared with the live one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_kit.errors import UserError
from align_kit.models import load, quantised, source
from align_kit.trainers.base import PhaseTrainer
from align_kit.trainers.gather import gathered

# Greatest allowed difference of a logit between the live and the re-opened model; a kernel may sum in another order.
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


@dataclass(frozen=True)
class Saved:
    """A stored and verified model: its folder, content digest, size in bytes, and the greatest logit difference."""

    folder: Path
    digest: str
    size: int
    logit_gap: float


def save_final(trainer: PhaseTrainer, folder: Path, probe: Mapping[str, Tensor]) -> Saved | None:
    """Store the trained model in `folder` and prove that what was stored is what was trained.

    All ranks call it: weights are gathered and `probe` (a small batch, the same on every rank) runs through the
    engine. Rank 0 writes into a temporary folder, checks every tensor, runs the re-opened model on the probe, and
    only then moves the files in place. Returns `None` on the other ranks. Raises `UserError` where a check fails.
    """
    weights = gathered(trainer)
    live = live_logits(trainer, probe)
    saved = None
    if trainer.args.should_save:
        staging = folder / ".saving"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            trainer.store_model(staging, weights)
            _check_tensors(staging, weights, _expected(trainer), _as_stored(trainer, weights))
            trusted = getattr(trainer.args, "trust_remote_code", False)
            bits = quantised.settings_of(trainer.model) if trainer.is_lora else None
            dtype = next(trainer.model.parameters()).dtype
            reopened = reopen(staging, dtype, trust_remote_code=trusted, base_bits=bits)
            gap = _compare(reopened, probe, live)
            for file in staging.iterdir():
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        saved = Saved(folder, source.digest(source.resolve(str(folder))), size, gap)
    trainer.accelerator.wait_for_everyone()
    return saved


def live_logits(trainer: PhaseTrainer, probe: Mapping[str, Tensor]) -> Tensor:
    """Return what the engine gives for a batch that all ranks have, computed the plain way, in fp32 on the CPU."""
    engine = trainer.model_wrapped
    engine.eval()
    with torch.no_grad():
        batch = {name: probe[name].to(trainer.args.device) for name in ("input_ids", "attention_mask")}
        return engine(**batch, use_cache=False).logits.float().cpu()


def _expected(trainer: PhaseTrainer) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter that must be stored: all, or those LoRA trains."""
    named = trainer.model.named_parameters()
    wanted = {name: p for name, p in named if p.requires_grad or not trainer.is_lora}
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trainer.stored_names(wanted).items()}


def _as_stored(trainer: PhaseTrainer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gathered weights named and cut as transformers stores them: stacked experts one by one, for instance."""
    from transformers.core_model_loading import revert_weight_conversion

    return weights if trainer.is_lora else dict(revert_weight_conversion(trainer.stored_model, dict(weights)))


def _check_tensors(
    folder: Path,
    weights: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    as_stored: Mapping[str, Tensor],
) -> None:
    """Compare what was gathered with what the model has, and every stored tensor with the gathered one."""
    from safetensors import safe_open

    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            stored |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    empty = [name for name, tensor in stored.items() if tensor.numel() == 0]
    broken = [name for name, tensor in stored.items() if not torch.isfinite(tensor).all()]
    absent = [name for name, shape in expected.items() if name not in weights or weights[name].shape != shape]
    missing = [name for name, tensor in as_stored.items() if not _is_stored(tensor, name, stored)]
    for what, names in (("no tensors at all", [] if stored else ["*"]), ("empty", empty), ("not finite", broken),
                        ("not gathered whole", absent), ("missing or different", missing)):  # fmt: skip
        if names:
            raise UserError(
                f"the final model did not verify: {len(names)} tensors {what} ({', '.join(names[:3])}); the last "
                "checkpoint stands, go on from it with --resume"
            )


def _is_stored(tensor: Tensor, name: str, stored: Mapping[str, Tensor]) -> bool:
    """Tell whether `tensor` was stored: under its name (PEFT's without the adapter's), or tied to one that was."""
    found = stored.get(name, stored.get(name.replace(".modules_to_save.default.", ".").replace(".default.", ".")))
    if found is not None:
        return found.shape == tensor.shape and torch.equal(found.to(tensor.dtype), tensor.cpu())
    return any(other.shape == tensor.shape and torch.equal(other.to(tensor.dtype), tensor) for other in stored.values())


def _compare(reopened: Any, probe: Mapping[str, Tensor], live: Tensor) -> float:
    """Return the greatest difference of a logit between the re-opened model and the live one, within tolerance."""
    first = next(reopened.parameters())
    dtype, device = first.dtype, first.device  # a base in 4 bits opens on the accelerator, where there is one
    with torch.no_grad():
        batch = {name: probe[name].to(device) for name in ("input_ids", "attention_mask")}
        logits = reopened(**batch).logits.float().cpu()
    gaps = (logits - live).abs()
    if gaps.dim() == 3:  # a language model's B, T, V: what stands on padding means nothing; a score is one for a row
        gaps = gaps[probe["attention_mask"].bool()]
    gap = float(gaps.max())
    if not gap <= LOGIT_TOLERANCE[dtype]:
        raise UserError(
            f"the final model did not verify: re-opened, its logits differ by up to {gap:.3g} from the trained "
            f"model's (allowed {LOGIT_TOLERANCE[dtype]}); the last checkpoint stands, go on from it with --resume"
        )
    return gap


def reopen(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False, base_bits: Any = None) -> Any:
    """Return the model in `folder` as plain transformers (and PEFT) load it, on the CPU.

    `base_bits` is how the base of an adapter was quantised while it was trained (`quantised.settings_of`).
    """
    where = source.resolve(str(folder))
    labels: dict[str, Any] = {"num_labels": 1} if where.head == "score" else {}
    if base_bits is not None:
        labels["quantization_config"] = base_bits
    with load.plain_transformers():
        model: Any = load.auto_class(where.head).from_pretrained(
            str(where.weights.folder), dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **labels
        )
        quantised.keep_layout(model)
        if where.is_adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
            if where.head == "score":  # its base is a language model, which may never have needed padding
                load.set_padding(model, load.load_tokenizer(where).pad_token_id)
    return model.eval()
