"""What a run is given: engine configurations, data, the hub's cache, trackers."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from align_kit import cards, zero
from align_kit.doctor import versions
from align_kit.doctor.finding import BAD, NOTE, WARN, Finding, ok
from align_kit.errors import UserError, first_line, unknown

ON_GPU_ONLY = ("zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights")
WANDB_URL = "https://api.wandb.ai"


def engine_configs(place: Path, *, gpu: bool) -> Finding:
    """Does DeepSpeed read every key of every configuration in a folder, and can this machine do what they ask?"""
    files = sorted(path for path in place.glob("*") if path.suffix in (".json", ".yaml", ".yml"))
    count = f"{len(files)} {'file' if len(files) == 1 else 'files'}"
    wrong, beyond = [], []
    for file in files:
        try:
            beyond += [f"{file.name} {said}" for said in _beyond(_checked(file), gpu=gpu)]
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        return Finding(BAD, f"{place}: {'; '.join(wrong)}")
    if beyond:
        return Finding(NOTE, f"{count} in {place}, every key is read; {'; '.join(beyond)}", "no matter unless used")
    return ok(f"{count} in {place}, every key is read")


def _checked(file: Path) -> dict[str, Any]:
    """Return an engine's configuration, or nothing for a launch file; raises UserError for what is wrong in either."""
    if file.suffix == ".json":
        return zero.load(str(file))
    _check_launch(file)
    return {}


def _check_launch(file: Path) -> None:
    """Raise UserError for a launch file that accelerate refuses, or a key in it that nobody would read."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    try:
        launch = ClusterConfig.from_yaml_file(str(file))
    except (OSError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file.name}: accelerate refuses it ({first_line(error)})") from None
    if launch.distributed_type != "DEEPSPEED":
        kind = getattr(launch.distributed_type, "value", launch.distributed_type)
        raise UserError(f"{file.name} asks for distributed_type {kind}; align_kit runs on DEEPSPEED")
    options = vars(launch_command_parser().parse_args(["script"]))
    strange = next((key for key in launch.deepspeed_config if key not in options), None)
    if strange is not None:
        raise unknown(f"key in deepspeed_config of {file.name}", strange, options, show=0)


def _beyond(config: Mapping[str, Any], *, gpu: bool) -> Iterator[str]:
    """Yield what a configuration asks for that this machine cannot do."""
    try:
        zero.check_buildable(config, "it")
    except UserError as error:
        yield f"cannot run here: {error}"
    if gpu:
        return
    stage = config.get("zero_optimization", {})
    asked = [key for key in ON_GPU_ONLY if stage.get(key)]
    if (config.get("fp16") or {}).get("enabled") is True:
        asked.append("fp16")
    if asked:
        yield f"asks for {', '.join(asked)}, which no CPU does"


def data(environ: Mapping[str, str]) -> Finding:
    """Can every data card be read, and are the files here that they speak of?"""
    try:
        home = cards.data_home(environ.get("ALIGN_KIT_DATA"))
    except UserError as error:
        return Finding(BAD, str(error), "let it name the folder that holds one folder per data set, or unset it")
    here, away, wrong = 0, 0, []
    for name in cards.card_names():
        try:
            found = _is_here(cards.load_card(name), home)
        except UserError as error:
            wrong.append(str(error))
            continue
        here, away = here + found, away + (not found)
    if wrong:
        return Finding(BAD, "; ".join(wrong), "`align-kit cards check` says all that is wrong with a card")
    what = f"{here} of {here + away} cards have their data here"
    if away and home is None:
        what = f"{what}, and ALIGN_KIT_DATA names no folder"
        return Finding(NOTE, what, "the others are fetched when they are asked for")
    return ok(f"{what} ({home or 'all built in'})")


def _is_here(card: cards.Card, home: Path | None) -> bool:
    splits = card.block.splits
    return card.block.source.kind == "builtin" or all(cards.find_file(card, split, home) for split in splits)


def hub() -> Finding:
    """May models and data be fetched from the hub, and where are those that were? Nobody is asked."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    held = len([path for path in cache.glob("*--*") if path.is_dir()])
    token = "a token is set" if get_token() else "no token: only what is open to all"
    what = f"{held} models and data sets in {cache}"
    if constants.HF_HUB_OFFLINE:
        if held:
            return ok(f"offline by HF_HUB_OFFLINE, {what}")
        return Finding(NOTE, f"offline by HF_HUB_OFFLINE, and {what}", "name models by their folders, or unset it")
    return ok(f"{what}, {token}")


def wandb(environ: Mapping[str, str], home: Path | None = None) -> Finding:
    """Would `report_to: wandb` find a key? The key itself is not looked at more than needed, and never said."""
    if versions.version("wandb") is None:
        return ok("not installed; `report_to: wandb` would say so")
    mode = environ.get("WANDB_MODE", "online")
    if mode in ("offline", "disabled", "dryrun"):
        return ok(f"{mode} by WANDB_MODE")
    if named := next((name for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE") if environ.get(name)), None):
        return ok(f"logged in by {named}")
    file = Path(environ["NETRC"]) if environ.get("NETRC") else (home or Path.home()) / ".netrc"
    host = urlsplit(environ.get("WANDB_BASE_URL", WANDB_URL)).netloc.rpartition("@")[2]
    if not file.is_file():
        return Finding(NOTE, "not logged in", "only `report_to: wandb` needs it: wandb login, or WANDB_MODE=offline")
    try:
        known = netrc.netrc(file).authenticators(host)
    except (netrc.NetrcParseError, OSError) as error:
        return Finding(WARN, f"{file} cannot be read ({type(error).__name__})", "wandb login writes it anew")
    if known is None:
        return Finding(NOTE, f"not logged in at {host}", "only `report_to: wandb` needs it: wandb login")
    if os.stat(file).st_mode & 0o077:
        return Finding(WARN, f"logged in by {file}, which others may read", f"chmod 600 {file}")
    return ok(f"logged in by {file}")
