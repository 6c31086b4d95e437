"""What a run lays on the disk: a checkpoint, all that are kept, and the final model.

Tensors are counted; the tokenizer and the small files beside them (about 100 kB and 30 kB a rank) are not.
"""

from __future__ import annotations

from align_kit.plan.facts import Run
from align_kit.plan.state import FP32, moments_bytes, owned_elements, stored_weights


def checkpoint_bytes(run: Run) -> int:
    """Return the bytes of one checkpoint: the model, the engine's states, and what else a run goes on from.

    Below ZeRO-3, DeepSpeed stores the weights once more beside the model; PPO's engine those of its frozen base too.
    """
    usual, stage = run.engine.element_bytes, run.engine.stage
    masters = FP32 * owned_elements(run) if stage or run.engine.precision != "fp32" else 0
    ranks = run.world_size if stage else 1
    return final_bytes(run) + _module_bytes(run) * usual + (masters + moments_bytes(run)) * ranks


def _module_bytes(run: Run) -> int:
    """Return the elements in DeepSpeed's own files of the weights that compute."""
    adapts_in_place = run.use_peft and run.rollout is None  # a PEFT model, whose frozen base transformers leaves out
    kept = (weight for weight in run.policy.weights if weight.trained or not adapts_in_place)
    if run.engine.stage == 3:
        return sum(weight.size for weight in kept if not weight.trained)
    return sum(weight.size for weight in kept) + run.policy.tied


def final_bytes(run: Run) -> int:
    """Return the bytes of the final model: all weights, or the adapter of a LoRA run."""
    return stored_weights(run) * run.engine.element_bytes


def disk_bytes(run: Run) -> int:
    """Return the bytes that lie on the disk at most: checkpoints by the retention rule, and the final model.

    A new checkpoint is whole before an old one goes; under ZeRO-3 the shards of its weights lie there meanwhile. The
    last one that stands is never given up, whatever bytes they may take together.
    """
    made, one = run.checkpoints_made, checkpoint_bytes(run)
    kept = made if run.checkpoints_kept is None else min(run.checkpoints_kept + run.checkpoints_lasting + 1, made)
    held = kept * one
    if kept and run.checkpoints_limit is not None:
        held = min(held, max(run.checkpoints_limit, one) + one)
    passing = final_bytes(run) if made and run.engine.stage == 3 and not run.use_peft else 0
    return held + max(final_bytes(run), passing)
