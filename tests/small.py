"""A small world for tests: a random Llama of 29,344 parameters, a few dozen rows for each phase, and real runs on them.

A run is made once for each set of options and serves every assertion that asks for it. Nothing here depends on the
version of Python, the embedded data or the recipes' own settings, so that stored loss digits stand.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_kit.cards import PHASE_KINDS
from align_kit.data.embedded import TINY
from align_kit.resources import folder
from tests.harness import Ranks, Result

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

WORDS = (
    "amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron",
    "inlet", "jetty", "kelp", "lagoon", "marsh", "north", "ocean", "pearl",
)  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
GLOBAL_BATCH = 8
ADDED = "<note>"  # a token of the model's own beside the tokenizer's

# Everything a result depends on, named, so that no default and no recipe's file decides it.
SETTINGS: dict[str, Any] = {
    "max_length": 48,
    "max_steps": 1,
    "per_device_train_batch_size": GLOBAL_BATCH,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report": False,  # it takes most of a second; tests/test_report_runs.py has it
    "sample_prompts": 0,
}

# What a phase needs beside: PPO writes 4 prompts' completions, then takes three steps on them.
MORE: dict[str, dict[str, Any]] = {
    "ppo": {
        "response_length": 12,
        "num_generations": 2,
        "num_ppo_epochs": 3,
        "reward_funcs": ["tests.rank_work:odd_tokens"],
    },
}

SIZES: dict[str, Any] = {
    "vocab_size": 336,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # 0.02 leaves so small a model without gradients worth comparing
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def write_model(place: Path, *, seed: int = 0, shard_size: str = "5GB", **changes: Any) -> Path:
    """Save the small Llama (random weights from `seed`) with its tokenizer in `place`."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))
    model.generation_config = GenerationConfig(eos_token_id=[0, 3], pad_token_id=1, max_new_tokens=17)
    model.save_pretrained(place, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(place)
    return place


def write_scorer(place: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a small sequence classifier (one label, random weights from `seed`) with its tokenizer in `place`."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    LlamaForSequenceClassification(LlamaConfig(**{**SIZES, "num_labels": 1, **changes})).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


def make_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE of `vocab_size` tokens that knows `WORDS`, one added token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    end, pad, *turns = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=end, pad_token=pad, additional_special_tokens=turns
    )
    tokenizer.chat_template = (TINY / "chat_template.jinja").read_text()
    tokenizer.add_tokens([ADDED])
    return tokenizer


# --- data -------------------------------------------------------------------------------------------------


def sentence(draw: random.Random, low: int, high: int) -> str:
    """Return between `low` and `high` words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def _text(draw: random.Random) -> dict[str, Any]:
    return {"text": sentence(draw, 12, 30)}


def _completion(draw: random.Random) -> dict[str, Any]:
    return {"prompt": sentence(draw, 1, 12), "completion": " " + sentence(draw, 1, 9)}


def _pair(draw: random.Random) -> dict[str, Any]:
    row = _completion(draw)
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " " + sentence(draw, 1, 9)}


def _labelled(draw: random.Random) -> dict[str, Any]:
    return {**_completion(draw), "label": draw.random() < 0.4}


def _prompt(draw: random.Random) -> dict[str, Any]:
    return {"prompt": sentence(draw, 1, 12), "answer": sentence(draw, 1, 1)}


MAKERS = {"text": _text, "prompt_completion": _completion, "preference": _pair, "binary": _labelled, "prompt": _prompt}


def make_rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` canonical rows of `kind`, prompts and completions of different lengths."""
    draw = random.Random(f"{kind} {seed}")
    return [MAKERS[kind](draw) for _ in range(count)]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- runs -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one run left: its folder, and what its ranks printed."""

    folder: Path
    result: Result

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "manifest.json").read_text()))

    def logged(self, name: str) -> list[float]:
        """Return the values of one metric, in the order they were logged."""
        return [line[name] for line in self.metrics if name in line]

    @property
    def losses(self) -> list[float]:
        return self.logged("loss")

    @cached_property
    def live_logits(self) -> Tensor:
        """The logits that the trained model gave inside the run, on `rank_work.probe_ids()`."""
        import torch

        return torch.load(self.folder.with_suffix(".live"))  # type: ignore[no-any-return]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The stored tensors: the whole model's, or the adapter's."""
        return read_weights(self.folder)


def read_weights(place: Path) -> dict[str, Tensor]:
    """Return every tensor of the safetensors files in `place`."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(place.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def relative_gap(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of the difference of two updates from `start` over the norm of the second (0: the same)."""
    assert ours.keys() == theirs.keys()
    zero = {name: start.get(name, 0.0) for name in ours}
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    moved = sum(float((theirs[name].double() - zero[name]).square().sum()) for name in ours)
    assert moved > 0, "nothing was trained"
    return (apart / moved) ** 0.5


class Lab:
    """The small model, the small data, and the runs on them, each made once."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.home = ranks, ranks.home / "lab"
        self.home.mkdir()
        self.model = write_model(self.home / "model")
        # 6 steps within one epoch: at its end rows are repeated to fill the last batch, more of them on more ranks
        counts = {"text": 120, "prompt_completion": 48, "preference": 48, "binary": 48, "prompt": 12}
        self.data = {kind: write_rows(self.home / f"{kind}.jsonl", make_rows(kind, n)) for kind, n in counts.items()}
        # 7 rows: no multiple of any world size or batch used here
        self.held_out = {kind: write_rows(self.home / f"{kind}-7.jsonl", make_rows(kind, 7, seed=1)) for kind in MAKERS}
        sharded = json.loads((folder("ds_configs") / "zero3.json").read_text())
        sharded["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        self.sharded = self.home / "sharded.json"  # every parameter is split between the ranks, however small
        self.sharded.write_text(json.dumps(sharded))
        self.blank = self.home / "blank.yaml"
        self.blank.write_text("logging_first_step: true\n")
        self._runs: dict[str, Run] = {}

    @cached_property
    def scorer(self) -> Path:
        """A sequence classifier whose head is not fresh, so that every margin counts."""
        return write_scorer(self.home / "scorer")

    def kind(self, phase: str) -> str:
        """Return the kind of rows that `phase` was made for."""
        return PHASE_KINDS[phase][0]

    def options(self, phase: str, **changes: Any) -> dict[str, Any]:
        """Return the options of a short run of `phase` from the small model; `None` in `changes` leaves one out."""
        given = {
            **SETTINGS,
            "config": self.blank,
            "model_name_or_path": self.model,
            "datasets": [{"path": self.data[self.kind(phase)]}],
            **MORE.get(phase, {}),
            **changes,
        }
        if given.get("use_peft"):
            given = {"lora_r": 4, "lora_dropout": 0.0, **given}
        return {name: value for name, value in given.items() if value is not None}

    def train(self, phase: str, world_size: int = 2, **changes: Any) -> Run:
        """Return the finished run of `phase` with these options, made now or before."""
        key = json.dumps([phase, world_size, changes], sort_keys=True, default=str)
        if key not in self._runs:
            place = self.home / f"{phase}-{len(self._runs)}"
            self._runs[key] = self.start(phase, place, world_size, **changes)
            self._runs[key].result.ok()
        return self._runs[key]

    def start(
        self,
        phase: str,
        place: Path,
        world_size: int = 2,
        env: dict[str, str] | None = None,
        harm: str = "",
        **changes: Any,
    ) -> Run:
        """Run `phase` into `place`, whatever becomes of it; `harm` names a function of `tests.rank_work`."""
        argv = [phase, *words(self.options(phase, output_dir=place, **changes))]
        result = self.ranks.run(
            world_size=world_size, env=env, cwd=self.home, function="tests.rank_work:observed",
            argv=argv, live=str(place.with_suffix(".live")), harm=harm,
        )  # fmt: skip
        return Run(place, result)

    def step(self, phase: str, world_size: int = 1, **changes: Any) -> Run:
        """Return a run of one step of plain gradient descent: what its weights moved by is the gradient, times 10."""
        descent = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        return self.train(phase, world_size, **{**descent, **changes})


def words(options: Mapping[str, Any]) -> list[str]:
    """Return `options` as the words of a command line."""
    line: list[str] = []
    for name, value in options.items():
        plain = isinstance(value, str | Path)
        line += [f"--{name}", str(value) if plain else json.dumps(value, default=str)]
    return line


@cache
def lab_of(ranks: Ranks) -> Lab:
    """Return the one lab of the session."""
    return Lab(ranks)
