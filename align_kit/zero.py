"""DeepSpeed configurations: find, check, agree with the launch file, derive a frozen model's.

Who wins: a launch file says *where* ranks run; the run's configuration says *what* they do. `deepspeed:` in
the run's configuration is used as it is; where it is absent the launch file's engine settings are used, and
`zero3` where there are none. Both given and different in what they ask of the engine is refused.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from align_kit.errors import UserError, unknown
from align_kit.resources import folder

DEFAULT = "zero3"
START_TIMEOUT = 1800.0  # s
SMALLEST_BUCKET = 1 << 22
SMALLEST_PERSISTENCE = 100_000
LAUNCH_PREFIXES = (
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_CPU",  # accelerate would leave the engine out; the arguments say use_cpu
)

# Free-form sections: their keys go to a constructor that refuses unknown ones itself.
FREE_FORM = ("optimizer.params", "scheduler.params")
# Read by the engine outside its configuration parser (named in DeepSpeed 0.19's source).
READ_ELSEWHERE = ("sequence_parallel_size", "vocabulary_size", "zero_optimization", "elasticity", "nebula")


def known_configs() -> list[str]:
    """Return the names of the shipped DeepSpeed configurations."""
    return sorted(path.stem for path in folder("ds_configs").glob("*.json"))


def load(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed configuration behind a shipped name, a JSON file or a mapping, keys checked.

    Raises `UserError` for an unknown name, unreadable JSON, a key DeepSpeed does not read, or a value it refuses.
    """
    if isinstance(source, Mapping):
        config, where = copy.deepcopy(dict(source)), "`deepspeed:`"
    else:
        path = _find(str(source))
        config, where = _read_json(path), path.name
    config = _expand(config)
    dotted = next((key for key in config if "." in key), None)
    if dotted is not None:
        raise UserError(f"{where}: DeepSpeed does not read dotted keys such as {dotted!r}; nest it as an object")
    check_keys(config, where)
    return config


def _find(source: str) -> Path:
    shipped = folder("ds_configs") / f"{source}.json"
    if shipped.is_file():
        return shipped
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix == ".json" and (folder("ds_configs") / path.name).is_file():
        return folder("ds_configs") / path.name
    raise unknown("ds_config", source, known_configs())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the DeepSpeed configuration {path}: {error}; it must be a JSON object") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a JSON {type(config).__name__}; a DeepSpeed configuration is a JSON object")
    return config


def _expand(value: Any) -> Any:
    """Replace `${VAR:-default}` in every string of a configuration."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda m: os.environ.get(m[1], m[2] or ""), value)
    return value


# --- keys -------------------------------------------------------------------------------------------------


class _Recorder(dict):  # type: ignore[type-arg]
    """A mapping that remembers which of its keys were asked for, so DeepSpeed's parser tells what it reads."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: _Recorder(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __copy__(self) -> _Recorder:
        return self  # DeepSpeed parses a copy; the questions must reach this one

    def unread(self, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
        """Yield (dotted key, keys that were asked beside it) for every key nobody asked for."""
        for key, value in self.items():
            dotted = f"{prefix}{key}"
            if key not in self.asked and dotted not in READ_ELSEWHERE:
                yield dotted, self.asked
            elif isinstance(value, _Recorder) and dotted not in FREE_FORM and not _refuses_strangers(dotted):
                yield from value.unread(f"{dotted}.")


def _refuses_strangers(dotted: str) -> bool:
    """Tell whether DeepSpeed checks the keys of this section itself, by handing it an impossible one."""
    section: dict[str, Any] = {"no_such_key_anywhere": 1}
    for part in reversed(dotted.split(".")):
        section = {part: section}
    try:
        _parse(section)
    except Exception:
        return True
    return False


def _parse(config: Mapping[str, Any]) -> None:
    """Let DeepSpeed's parser read `config`, with a batch size in case it has none."""
    from deepspeed.runtime.config import DeepSpeedConfig

    if "train_micro_batch_size_per_gpu" not in config:
        config = {**config, "train_micro_batch_size_per_gpu": 1}
    DeepSpeedConfig(config)


def check_keys(config: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` for each key of `config` that DeepSpeed's own parser does not read.

    DeepSpeed ignores unknown top-level keys in silence. `where` names the source in the message.
    """
    recorder = _Recorder(_sample_values(config))
    with _plain_deepspeed_logs():
        try:
            _parse(recorder)
        except Exception as error:
            first = _first_problem(error)
            raise UserError(f"DeepSpeed refuses {where}: {first}; ds_configs/zero3.json is one that works") from None
        for dotted, asked in recorder.unread():
            raise unknown(f"DeepSpeed key in {where}", dotted, _siblings(dotted, asked), show=0)


def _siblings(dotted: str, asked: set[str]) -> list[str]:
    head = dotted.rpartition(".")[0]
    return [f"{head}.{name}" if head else name for name in asked]


def _first_problem(error: Exception) -> str:
    details = getattr(error, "errors", None)
    if callable(details):
        problem = details()[0]
        return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']} (saw {problem.get('input')!r})"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _sample_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` as DeepSpeed's parser can read it: without "auto", and with batch sizes that fit each other.

    The real batch sizes are derived when the run starts.
    """
    filled = _without_auto(config)
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        filled.pop(key, None)
    filled["train_micro_batch_size_per_gpu"] = 1
    return filled


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


class _plain_deepspeed_logs:
    """Silence DeepSpeed's logger while its parser is asked questions."""

    def __enter__(self) -> None:
        import logging

        self.logger = logging.getLogger("DeepSpeed")
        self.level = self.logger.level
        self.logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


# --- the launch file --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What a launch file asked of the engine: its stage, or a whole configuration file; `None` where it is silent."""

    stage: int | None = None
    config_file: str | None = None
    mixed_precision: str | None = None
    offload: tuple[tuple[str, str], ...] = ()  # (offload_optimizer or offload_param, device)


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Return what `accelerate launch` says about the engine in `environ`."""
    if environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError("the launch file asks for FSDP, align_kit runs on DeepSpeed; use ds_configs/launch_zero3.yaml")
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return Launch()
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return Launch(
        stage=int(stage) if stage and stage != "None" else None,
        config_file=file if file and file != "None" else None,
        mixed_precision=environ.get("ACCELERATE_MIXED_PRECISION"),
        offload=tuple(
            (part, device)
            for part in ("offload_optimizer", "offload_param")
            if (device := environ.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE", "none")) not in ("none", "None")
        ),
    )


def choose(given: str | Mapping[str, Any] | None, launch: Launch) -> tuple[dict[str, Any], str]:
    """Return the engine configuration of a run and one sentence that says where it came from.

    `given` is the run's `deepspeed:` (`None` where it says nothing). Raises `UserError` where the run and the
    launch file ask for different things.
    """
    if given is None and launch.config_file:
        return _storing_whole(load(launch.config_file)), f"{launch.config_file} (from the launch file)"
    if given is None and (launch.stage is not None or launch.offload):
        return _storing_whole(_asked_by(launch)), f"stage {launch.stage}, from the launch file"
    name = given if given is not None else DEFAULT
    config = _storing_whole(load(name))
    label = name if isinstance(name, str) else "given inline"
    if launch.config_file and _storing_whole(load(launch.config_file)) != config:
        raise UserError(
            f"the launch file names the DeepSpeed configuration {launch.config_file} and the run's `deepspeed:` names "
            f"{label}, which differs; drop one of them"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if launch.stage is not None and not launch.config_file and launch.stage != stage:
        raise UserError(
            f"the launch file asks for ZeRO stage {launch.stage} and the run's configuration ({label}) for stage "
            f"{stage}; give the run `--deepspeed zero{launch.stage}` or change `zero_stage` in the launch file"
        )
    here = config.get("zero_optimization", {})
    for part, device in () if launch.config_file else launch.offload:
        if here.get(part, {}).get("device", "none") != device:
            raise UserError(
                f"the launch file asks for {part} on {device} and the run's configuration ({label}) does not; drop it "
                "there, or give the run --deepspeed zero3_offload"
            )
    return config, label


def _asked_by(launch: Launch) -> dict[str, Any]:
    """Return the shipped configuration of the stage a launch file asks for, with the offload it asks for."""
    stage = 3 if launch.stage is None else launch.stage
    config = load("zero3" if stage == 3 else "zero2")
    config["zero_optimization"]["stage"] = stage
    for part, device in launch.offload:
        config["zero_optimization"][part] = {"device": device, "pin_memory": True}
    if launch.offload:
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW: nothing to compile
    return config


def _storing_whole(config: dict[str, Any]) -> dict[str, Any]:
    """Let a ZeRO-3 engine gather its weights for the final model; refuse a configuration that forbids it."""
    zero, key = config.get("zero_optimization", {}), "stage3_gather_16bit_weights_on_model_save"
    if zero.get("stage") == 3 and zero.setdefault(key, True) is False:
        raise UserError(f"zero_optimization.{key} is false, but the final model is stored whole; drop the key")
    return config


def check_precision(precision: str, launch: Launch) -> None:
    """Refuse a launch file's half precision the run does not train in."""
    asked = launch.mixed_precision
    if asked in ("bf16", "fp16") and asked != precision:
        raise UserError(
            f"the launch file asks for mixed_precision {asked} and this run trains in {precision}; "
            f'give the run `--{asked} true` or set `mixed_precision: "no"` in the launch file'
        )


# --- frozen models ----------------------------------------------------------------------------------------

TRAINING_ONLY = ("optimizer", "scheduler", "gradient_clipping", "activation_checkpointing", "aio", "checkpoint")


def frozen_config(
    policy: Mapping[str, Any], hidden_size: int | None = None, *, offload: bool = False
) -> dict[str, Any]:
    """Derive the engine configuration of a frozen model from the policy's.

    Parameters stay sharded as the policy's are (ZeRO-3); what only training needs (optimizer, its offload,
    gradients, clipping) is dropped, "auto" sizes follow from `hidden_size` as the policy's do, other "auto" entries
    fall back to DeepSpeed's defaults. `offload` keeps the parameters in CPU memory, where the policy's are not moved
    out already. Below stage 3 nothing of a frozen model can be sharded: stage 0.
    """
    config = {key: copy.deepcopy(value) for key, value in policy.items() if key not in TRAINING_ONLY}
    if config.get("zero_optimization", {}).get("stage") != 3:
        config["zero_optimization"] = {"stage": 0}
        return _without_auto(config)
    fill_sizes(config, hidden_size)
    config = _without_auto(config)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if offload and (zero.get("offload_param") or {}).get("device", "none") == "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if zero.get("offload_param", {}).get("device") == "nvme":
        config["aio"] = copy.deepcopy(policy.get("aio", {}))
    return config


def filled(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with its "auto" entries replaced by `values` (dotted names), to show what a run will use."""
    shown = copy.deepcopy(dict(config))
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        node = shown
        for part in path:
            node = node.get(part, {})
        if node.get(last) == "auto":
            node[last] = value
    return shown


def sizes(hidden_size: int) -> dict[str, int]:
    """Return the bucket and persistence sizes (in elements) for what is "auto".

    transformers takes hidden_size squared, which suits thousands; below it would make a collective of each
    parameter, so there is a floor of 4 Mi elements (16 MB in fp32) and, for persistence, DeepSpeed's own default.
    """
    square = hidden_size * hidden_size
    return {
        "reduce_bucket_size": max(square, SMALLEST_BUCKET),
        "stage3_prefetch_bucket_size": max(int(0.9 * square), SMALLEST_BUCKET),
        "stage3_param_persistence_threshold": max(10 * hidden_size, SMALLEST_PERSISTENCE),
    }


def fill_sizes(config: Mapping[str, Any], hidden_size: int | None) -> None:
    """Fill the "auto" bucket and persistence sizes of a live engine configuration in place."""
    zero = config.get("zero_optimization", {})
    for key, size in sizes(hidden_size).items() if hidden_size else ():
        if zero.get(key) == "auto":
            zero[key] = size


def set_leaf_modules(model: Any, find: Callable[[Any], Sequence[Any]], config: Mapping[str, Any]) -> None:
    """Make ZeRO-3 gather each module that `find(model)` returns as a whole; call it before the engine is made.

    Nothing is looked for below stage 3, and where the configuration names modules of its own
    (`zero_optimization.leaf_module`) those are taken, by DeepSpeed.
    """
    from deepspeed.utils import set_z3_leaf_module

    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and "leaf_module" not in zero:
        for module in find(model):
            set_z3_leaf_module(module, True)


# --- the start of an engine -------------------------------------------------------------------------------


def forget_launch(environ: MutableMapping[str, str]) -> None:
    """Remove the launch file's engine settings from `environ`: they have been read and agreed on."""
    for name in [name for name in environ if name.startswith(LAUNCH_PREFIXES)]:
        del environ[name]


def join_ranks(timeout: float = 0) -> None:
    """Join the ranks through DeepSpeed, which otherwise takes every rank for a world of its own.

    Until the engine stands a collective may take `timeout` seconds, or half an hour where that is more: a rank may
    tokenise or load for all.

    DeepSpeed's CPU start-up would first compile its shared-memory operator (minutes when cold), which only its
    inference all-reduce uses: it is left out.
    """
    import importlib

    import deepspeed
    import torch

    # The attribute deepspeed.comm.torch is torch itself; the module of that name has to be asked for.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    name = "nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=max(timeout, START_TIMEOUT))
    deepspeed.init_distributed(dist_backend=name, auto_mpi_discovery=False, verbose=False, timeout=limit)


def limit_waiting(seconds: float) -> None:
    """Make every collective of every process group that there is give up after `seconds`.

    DeepSpeed makes its groups without a timeout, so that ZeRO's collectives would wait torch's default for a rank
    that hangs: half an hour with gloo.
    """
    from torch.distributed import distributed_c10d as groups

    for group in list(groups._world.pg_map):
        groups._set_pg_timeout(timedelta(seconds=seconds), group)


def needs_build(config: Mapping[str, Any]) -> list[str]:
    """Return the DeepSpeed operators that `config` makes the engine compile on first use."""
    zero = config.get("zero_optimization", {})
    devices = {zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")}
    needs = []
    if zero.get("offload_optimizer", {}).get("device") in ("cpu", "nvme") and config.get(
        "zero_force_ds_cpu_optimizer", True
    ):
        needs.append("cpu_adam")
    if "nvme" in devices:
        needs.append("async_io")
    return needs


def check_buildable(config: Mapping[str, Any], label: str) -> None:
    """Raise `UserError` where `config` offloads to NVMe and this machine cannot: found before the model loads."""
    zero = config.get("zero_optimization", {})
    parts = [zero.get(name, {}) for name in ("offload_optimizer", "offload_param")]
    for place in {str(part.get("nvme_path")) for part in parts if part.get("device") == "nvme"}:
        if not _can_be_made(Path(place)):
            raise UserError(f"{label} offloads to {place}, which cannot be written; let ALIGN_KIT_NVME name a folder")
    if "async_io" in needs_build(config) and not _has_async_io():
        raise UserError(
            f"{label} offloads to NVMe by DeepSpeed's async_io, which cannot be built here: libaio or its headers are "
            "missing; install libaio-dev (libaio-devel), or use --deepspeed zero3_offload"
        )


def _can_be_made(path: Path) -> bool:
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _has_async_io() -> bool:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import installed_ops

    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    return bool(installed_ops.get("async_io") or builder.is_compatible(verbose=False))


# --- weights ----------------------------------------------------------------------------------------------


def fill_with_zeros(parameters: Sequence[Any]) -> None:
    """Set whole parameters to 0, gathered meanwhile where ZeRO-3 has split them; all ranks call it together."""
    import torch

    with torch.no_grad(), _gathered(parameters):
        for parameter in parameters:
            parameter.zero_()


def _gathered(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)  # type: ignore[no-any-return]
