"""Where the policy of a run starts, with which words, and the folder the run lives in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_kit import frozen as frozen_models
from align_kit import log, machine, run_folder, supervised
from align_kit.checkpoint.reading import reading_all
from align_kit.config import Config
from align_kit.errors import UserError
from align_kit.models import load, source
from align_kit.models.source import Source
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder
from align_kit.stages.contract import keep_frozen, keep_length, keep_policy
from align_kit.stages.other_world import WORLD_SIZE, cut_for

PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]  # to compare templates by


@dataclass
class Start:
    """The policy's start: its source and digest, and a sentence that says why this one."""

    source: Source
    digest: str
    why: str
    tokenizer: Source


def starting_point(recipe: Recipe, config: Config, home: RunFolder) -> Start:
    """Find what the policy starts from: what is named, else the newest finished run of the phase before, else random.

    A resumed run starts from what its manifest names, or from the same content elsewhere.
    """
    model = config.model
    home.check_cut(cut_for(home), machine.world_size(), may_cut=config.may_change(WORLD_SIZE))
    if home.resume_from is not None and "policy" in home.manifest:
        return _recorded_start(home, config)
    if model.config_name:
        where, why = source.resolve(model.config_name, random=True, option="config_name"), "random weights"
    elif model.model_name_or_path:
        where = source.resolve(model.model_name_or_path, revision=model.model_revision)
        why = _why_named(where)
        owner = run_folder.read_manifest(frozen_models.of_run(where.folder))
        if recipe.needs and not config.run.reference_model_name_or_path:
            frozen_models.refuse_checkpoint_of(recipe.name, where, owner)
    else:
        where, why = previous_phase(recipe, config)
    return _start(where, why, config)


def _start(where: Source, why: str, config: Config) -> Start:
    tokenizer = config.model.tokenizer_name
    words = source.resolve(tokenizer, random=True, option="tokenizer_name") if tokenizer else where
    digest = source.digest(where, seed=config.value("seed"))
    refuse_changed(where, digest)
    return Start(where, digest, why, words)


def refuse_changed(where: Source, digest: str) -> None:
    """Raise `UserError` for a model of a run of ours whose weights are no longer what the run saved and verified."""
    manifest = {} if where.random else run_folder.read_manifest(where.folder) or {}
    saved = manifest.get("result", {}).get("digest", digest)
    if manifest.get("status") == run_folder.FINISHED and saved != digest:
        raise UserError(
            f"{where.name} was changed or damaged since its run saved it (digest {digest[:12]}, saved {saved[:12]}); "
            "train it again, or copy the model without manifest.json to use it as it is"
        )


def _recorded_start(home: RunFolder, config: Config) -> Start:
    keep_length(config, home)
    policy, named = home.manifest["policy"], config.model.model_name_or_path
    if named and Path(named).expanduser().resolve().is_relative_to(home.path.resolve()):
        log.warn(f"model_name_or_path {named} is not read: it is of the run that goes on, from {home.resume_from}")
        named = None
    where = source.resolve(
        named or policy["name"],
        revision=config.model.model_revision,
        random=policy["random"],
        option="model_name_or_path" if named else "the policy this run started from:",
    )
    start = _start(where, "the start of the run that goes on", config)
    keep_policy(config, home, where, start.digest)
    keep_frozen(config, home, where, start.digest)
    return start


def _why_named(where: Source) -> str:
    manifest = run_folder.read_manifest(frozen_models.of_run(where.folder))
    return f"{manifest['phase']} run" if manifest else "as configured"


def previous_phase(recipe: Recipe, config: Config) -> tuple[Source, str]:
    """Return where a policy starts that names no model, and why there; `starts_from` may name a phase or a folder."""
    output, asked = Path(config.value("output_dir")), config.run.starts_from
    if asked and Path(asked).is_dir():
        return source.resolve(asked, option="starts_from"), _why_named(source.resolve(asked))
    found = run_folder.predecessor(output, (asked,) if asked else recipe.starts_from)
    if found:
        return source.resolve(str(found[0])), f"the finished {found[1]} run"
    if asked:
        raise UserError(
            f"starts_from {asked!r}: no finished {asked} run beside {output}; run it first, or name a folder"
        )
    log.warn(
        f"no model_name_or_path and no finished {' or '.join(recipe.starts_from)} run beside {output}: starting the "
        "embedded model from random weights, which shows that things run, not that they help"
    )
    return source.resolve("builtin:tiny", random=True), "random weights"


def tokenizer(start: Start, config: Config) -> Any:
    """Return the tokenizer of the run, with the tokens and the chat template the configuration names."""
    chosen = load.load_tokenizer(start.tokenizer, trust_remote_code=config.value("trust_remote_code"))
    names = {"eos_token": config.training.get("eos_token"), "pad_token": config.training.get("pad_token")}
    for kind, token in names.items():
        if token is not None:
            if token not in chosen.get_vocab():
                raise UserError(
                    f"{kind} {token!r} is not in the vocabulary of {start.tokenizer.name}; name a token that is"
                )
            setattr(chosen, kind, token)
    if template := config.training.get("chat_template_path"):
        chosen.chat_template = _replaced(chosen, _chat_template(template), start)
    else:
        load.check_one_template(start.tokenizer)
    return chosen


def _replaced(tokenizer: Any, template: str, start: Start) -> str:
    """Return the template that replaces the tokenizer's own, and warn where a conversation reads otherwise in it."""
    if tokenizer.chat_template and not start.source.random and _differ(tokenizer, template):
        log.warn(
            f"chat_template_path writes conversations otherwise than the template of {start.tokenizer.name}, which "
            "the model may have learnt; keep to one through all phases, and give it to whoever uses the model"
        )
    return template


def _differ(tokenizer: Any, template: str) -> bool:
    """Tell whether a template writes a short conversation otherwise than the tokenizer's own, where both take it."""
    from align_kit.data.render import Renderer

    try:
        own, other = (Renderer(tokenizer, one).rendered(PROBE, {}) for one in (None, template))
    except UserError:  # which rows it takes, and which not, is told when they are rendered
        return False
    return own != other


def _chat_template(place: str) -> str:
    path = Path(place).expanduser()
    if path.is_file():
        return path.read_text()
    other = load.load_tokenizer(source.resolve(place, random=True, option="chat_template_path"))
    if not other.chat_template:
        raise UserError(f"chat_template_path {place!r}: its tokenizer has no chat template; give a .jinja file")
    return str(other.chat_template)


# --- the folder of the run --------------------------------------------------------------------------------------------


def _used(config: Config, start: Start, args: Any) -> list[tuple[str, str | Path | None]]:
    """Return what the run is made from: what it is used as, and where it lies."""
    used: list[tuple[str, str | Path | None]] = [
        ("model", start.source.folder),
        ("base model", start.source.weights.folder),
    ]
    used += [("tokenizer", start.tokenizer.folder), ("reference", config.run.reference_model_name_or_path)]
    used += [("value model", getattr(args, "value_model_name_or_path", None))]
    used += [("reward model", place) for place in getattr(args, "reward_model_name_or_path", None) or []]
    used += [("data", entry.path) for entry in [*config.data.datasets, *config.data.eval_datasets]]
    return used


def reading_sources(config: Config, start: Start, args: Any) -> AbstractContextManager[None]:
    """Keep the checkpoints that this run is made from from being deleted by the runs they belong to."""
    return reading_all(Path(place).expanduser() for _, place in _used(config, start, args) if place)


def clear_home(home: RunFolder, config: Config, start: Start, args: Any) -> None:
    """Remove the run that is replaced, now that everything the new one needs has been found; rank 0 does it.

    From here on what lies in the folder is of this run: a launcher may start it again from there, and not before, when
    it would delete or go on with the run that stood there.
    """
    for option, place in _used(config, start, args):
        home.refuse_inside(option, place)
    with args.main_process_first(local=False, desc="clearing the output folder"):
        if args.process_index == 0:
            home.clear()
    if args.local_process_index == 0:  # each machine's launcher hears its own ranks
        supervised.tell_output(str(home.path))
