"""A PPO trainer whose iterations come in pairs: one walked as asked, one plain, with the same prompts and draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks._caught import in_place_of_training

PLAIN = "plain"
Iteration = dict[str, Any]


def iterations(argv: list[str], report: str, **asked: Any) -> int:
    """Run `align-kit argv…` up to its training, measure in that one's place, and write what was found."""
    from align_kit.trainers.base import PhaseTrainer

    train = PhaseTrainer.train
    return in_place_of_training(argv, report, lambda trainer: Pairs(trainer, train, **asked).run())


class Pairs:
    """Lets a PPO trainer run its own loop, every other iteration plain, and notes what each took on this rank."""

    def __init__(self, trainer: Any, train: Callable[[Any], Any], model: str, forward: str, threads: int) -> None:
        import torch

        from align_kit.forward.door import door_of

        torch.set_num_threads(threads)
        self.trainer, self.train, self.forward = trainer, train, forward
        held = {name: one.model for name, one in trainer.frozen.items()}
        self.doors = {name: door_of(one) for name, one in {"policy": trainer.model, **held}.items()}
        self.unsharded = unsharded(model)
        self.found: list[Iteration] = []

    def run(self) -> list[Iteration]:
        """Train, and return an entry for each iteration."""
        trainer = self.trainer
        collect, assess, step = trainer._collect, trainer._assess, trainer.training_step

        def begun() -> Any:
            self._end()
            self._begin()
            trainer.iteration = (len(self.found) - 1) // 2  # a pair has the same prompts, draws and order of rows
            return collect()

        def noted(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            self.found[-1]["losses"].append(float(loss))
            return loss

        def assessed(prompts: Sequence[Any], *args: Any) -> Any:
            self.found[-1]["generate"] = self._generate(prompts)
            columns, texts = assess(prompts, *args)
            self.found[-1]["written"] = int(columns["loss_mask"].sum(1).max())
            return columns, texts

        trainer._collect, trainer._assess, trainer.training_step = begun, assessed, noted
        self.train(trainer)
        self._end()
        return self.found

    def _begin(self) -> None:
        pair, second = divmod(len(self.found), 2)
        mode = PLAIN if (pair + second) % 2 else self.forward  # which of a pair comes first changes from pair to pair
        for door in self.doors.values():
            door.mode = mode
        self.found.append({"mode": mode, "losses": [], **self._counts()})

    def _end(self) -> None:
        """Turn the counts at the begin of the iteration that is over into what it added."""
        if not self.found:
            return
        last, now = self.found[-1], self._counts()
        for name, value in now["seconds"].items():
            last["seconds"][name] = value - last["seconds"][name]
        for name, counts in now["doors"].items():
            last["doors"][name] = {what: count - last["doors"][name][what] for what, count in counts.items()}

    def _counts(self) -> dict[str, Any]:
        doors = {name: asdict(door) for name, door in self.doors.items()}
        for counts in doors.values():
            del counts["mode"]
        return {"seconds": dict(self.trainer.seconds), "doors": doors}

    def _generate(self, rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
        """Return the seconds that plain `generate` takes for the same prompts, and the tokens of its longest row."""
        import torch
        import torch.distributed as dist

        how = self.trainer.writer.sampling
        longest = max(len(row["prompt_ids"]) for row in rows)
        left = [longest - len(row["prompt_ids"]) for row in rows]
        ids_BT = torch.tensor([[how.pad] * pad + row["prompt_ids"] for pad, row in zip(left, rows, strict=True)])
        attention_BT = (torch.arange(longest) >= torch.tensor(left)[:, None]).long()
        dist.barrier()
        began = time.perf_counter()
        with torch.no_grad():
            written_BT = self.unsharded.generate(
                input_ids=ids_BT, attention_mask=attention_BT, max_new_tokens=how.length, do_sample=True, top_k=0,
                temperature=how.temperature, eos_token_id=list(how.ends), pad_token_id=how.pad,
            )  # fmt: skip
        seconds = time.perf_counter() - began
        dist.barrier()
        return seconds, int(written_BT.shape[1]) - longest


def unsharded(place: str) -> Any:
    """Return the stored model as plain transformers loads it, whole on each rank."""
    from transformers import AutoModelForCausalLM

    from align_kit.models.load import plain_transformers

    with plain_transformers():
        return AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval()
