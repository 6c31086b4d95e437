"""How runs in tests are watched and harmed where batches are computed: `rank_work.observed` knows these by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any


def keep_doors(trainer: Any) -> None:
    """After the last step, write how many forwards of each model were walked and how many were not: a file a rank."""
    from transformers import TrainerCallback

    from align_kit.forward.door import door_of

    class Keep(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            models = {"policy": trainer.model, **{role: held.model for role, held in trainer.frozen.items()}}
            doors = {role: vars(door_of(model)) for role, model in models.items() if model is not None}
            Path(f"{args.output_dir}.{args.process_index}.json").write_text(json.dumps(doors))

    trainer.add_callback(Keep())


def forget_prefixes(trainer: Any) -> None:
    """Let the policy attend as if nothing were shared: a completion without its prompt, values of the right shape."""
    from align_kit.forward.choose import walkable
    from align_kit.forward.segments import Segment, Segments

    def cut(pack: Any) -> Any:
        alone = tuple(Segment(part.start, part.length, part.start, 0) for part in pack.segments.items)
        return replace(pack, segments=Segments(alone))

    def harm(policy: Any) -> None:
        walk = policy.forward
        policy.forward = lambda *args, pack=None, **how: walk(*args, pack=pack and cut(pack), **how)

    for part in walkable(trainer.model):
        harm(part)
    keep_doors(trainer)


def drop_segments(trainer: Any) -> None:
    """Let the last layer not hand the segments on to its attention: found in the middle of a forward."""
    keep_doors(trainer)
    layers = [module for name, module in trainer.model.named_modules() if name.endswith("layers.1")]
    for layer in layers:
        layer.forward = _without_segments(layer.forward)


def _without_segments(forward: Any) -> Any:
    return lambda *args, segments=None, **kwargs: forward(*args, **kwargs)
