"""Files that do harm where they are trusted: each would create a file, as it might do anything else."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Runs:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Opens(Runs):
    """An object whose pickle opens a file for writing when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


def zipped(state: Any, place: Path) -> None:
    """Store as torch does."""
    import torch

    torch.save(state, place)


def legacy(state: Any, place: Path) -> None:
    """Store as torch before 1.6 did."""
    import torch

    torch.save(state, place, _use_new_zipfile_serialization=False)


def newer(state: Any, place: Path) -> None:
    """Store with opcodes that torch's own pickles do not have."""
    import torch

    torch.save(state, place, pickle_protocol=4)


def bare(state: Any, place: Path) -> None:
    """Store as a plain pickle, as old trainers did their arguments."""
    place.write_bytes(pickle.dumps(state))


FORMATS: dict[str, Callable[[Any, Path], None]] = {"zip": zipped, "legacy": legacy, "newer": newer, "bare": bare}


def in_shard(place: Path, harm: Any, write: Callable[[Any, Path], None]) -> None:
    """Put `harm` into a file of a checkpoint, beside what it holds."""
    import torch

    state = torch.load(place, weights_only=False) if place.exists() else {}
    write({**state, "harm": harm} if isinstance(state, dict) else [state, harm], place)


def change_after_vetting(trainer: Any) -> None:
    """On rank 1, put harm into the shard that it is about to load."""
    if trainer.args.process_index == 1:
        run = Path(trainer.args.output_dir)
        shard = run / "checkpoint-1" / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        in_shard(shard, Runs(run.parent / "harmed"), zipped)


def finish_tracking(trainer: Any) -> None:
    """Have the tracker write what it holds when training ends: a forked rank ends without its exit handlers."""
    from transformers import TrainerCallback

    class Finish(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            import wandb

            wandb.finish()

    trainer.add_callback(Finish())


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = {kind!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""


def with_code(model: Path, mark: Path, *, kind: str = "llama") -> Path:
    """Let the model in a folder come with code of its own, for configuration, model and tokenizer."""
    (model / "own.py").write_text(CODE.format(mark=str(mark), kind=kind))
    autos = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    _change(model / "config.json", model_type=kind, auto_map=autos)
    _change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Words"]}, tokenizer_class="Words")
    return model


def _change(place: Path, **entries: Any) -> None:
    place.write_text(json.dumps({**json.loads(place.read_text()), **entries}))
