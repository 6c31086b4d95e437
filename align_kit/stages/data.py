"""The data of a run, tokenised."""

from __future__ import annotations

import os
from typing import Any

from align_kit import run_folder
from align_kit.config import Config
from align_kit.data import labels
from align_kit.data.prepare import Prepared, Wanted, prepare, reopen
from align_kit.data.report import TokeniseOptions
from align_kit.registry import Recipe
from align_kit.stages.alone import stops_of
from align_kit.stages.beginning import Start
from align_kit.telemetry import spent

COUNTED = 20_000  # rows that the header's account of labels looks at


@spent.during("data")
def rows(recipe: Recipe, config: Config, start: Start, words: Any, args: Any) -> Prepared:
    """Load, render and tokenise the data: the first rank of each machine works, the others open what it stored."""
    import torch.distributed as dist

    asked = wanted(recipe, config, args)
    mine = prepare(asked, words) if args.local_process_index == 0 else None
    accounts = [mine.accounts() if mine else None]
    dist.broadcast_object_list(accounts, src=0)
    prepared = mine or reopen(accounts[0] or {}, asked.cache)
    for split in filter(None, (prepared.train, prepared.eval)):
        split.rows = recipe.trainer_class().complete(split.rows, args)
    if args.process_index == 0:
        means = labels.Words.of(words, stops_of(start.source))
        counted = labels.measure(prepared.train.rows, prepared.train.account["kind"], means, most=COUNTED)
        prepared.labels = labels.sentence(counted, words, scored=recipe.head == "score")
    return prepared


def wanted(recipe: Recipe, config: Config, args: Any) -> Wanted:
    """Return what data a run asks for; `args` are its training arguments, or what has their names."""
    return Wanted(
        phase=recipe.name,
        train=[entry.spec() for entry in config.data.datasets],
        eval=[entry.spec() for entry in config.data.eval_datasets],
        test_split_size=config.data.test_split_size,
        test_split_seed=config.data.test_split_seed,
        evaluate=args.eval_strategy != "no",
        seed=args.seed if args.data_seed is None else args.data_seed,
        options=token_options(recipe, config),
        cache=run_folder.cache_folder(os.environ),
        temperature=config.data.mixture_temperature,
        limits=config.data.data_limits or {},
    )


def token_options(recipe: Recipe, config: Config) -> TokeniseOptions:
    """Return how rows become tokens."""
    given = {"max_length": config.value("max_length"), "control_tokens": config.data.control_tokens}
    if recipe.writes and given["max_length"] is not None:  # what is written needs room behind the prompt
        given["max_length"] -= config.value(recipe.writes) - 1
    for name in ("truncation_mode", "completion_only_loss", "assistant_only_loss"):
        if name in config.training:
            given[name] = config.training[name]
    if recipe.head == "score":
        given["truncation_mode"] = "drop"  # as TRL: a completion without its end is not what was judged
    return TokeniseOptions(**given, packing=recipe.packed)
