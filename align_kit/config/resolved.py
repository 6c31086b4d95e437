"""The resolved configuration of a run: flat where a user writes it, grouped where code reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_kit.config.fields import DataFields, DatasetFields, ModelFields, RunFields
from align_kit.config.schema import namespace, resolve
from align_kit.errors import UserError
from align_kit.scrub import scrubbed

# TRL's classes warn about these values; they are kept out of the constructor and set on the instance after.
QUIETLY: dict[str, tuple[Any, ...]] = {"truncation_mode": ("keep_end",), "pad_token": ()}
# Places in `origin` that are not a user's word.
OUR_DEFAULT = "align_kit's default"
ALWAYS_SO = "align_kit, always"
# What trackers are sent as it stands; of the engine's configuration that is a copy.
FOR_TRACKERS = ("deepspeed", "run_name", "project")
# What a run needs whatever a YAML says: batches are ours, and so is the progress bar.
ALWAYS: dict[str, Any] = {"remove_unused_columns": False, "disable_tqdm": True}


def our_defaults(phase: str) -> dict[str, Any]:
    """Return what align_kit lays under the YAML, over TRL's defaults."""
    return {
        "output_dir": str(Path(os.environ.get("ALIGN_KIT_RUNS") or "runs") / phase),
        "report_to": "none",
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # the filter shows a NaN loss as a normal one
        "save_total_limit": 2,
    }


@dataclass
class Config:
    """Everything a run was told, with the place where each key was told.

    `training` holds what YAML, command line and align_kit's defaults say for the phase's TRL config class; `origin`
    maps each key that was set to `recipes/dpo.yaml:12`, `command line`, `OUR_DEFAULT` or the key it follows from.
    """

    phase: str
    config_class: str  # dotted, such as trl:DPOConfig
    model: ModelFields = field(default_factory=ModelFields)
    data: DataFields = field(default_factory=DataFields)
    run: RunFields = field(default_factory=RunFields)
    training: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)  # set in this process by `env:` in YAML

    def value(self, name: str) -> Any:
        """Return the resolved value of any key of the phase, the class's default where nobody set it.

        Raises `KeyError` for a name the phase does not have: that is a bug in the caller, not a user's mistake.
        """
        key = namespace(self.config_class)[name]
        if key.group == "training":
            return self.training.get(name, key.default)
        return getattr(getattr(self, key.group), name)

    def may_change(self, name: str) -> bool:
        """Return whether `allow_change` names what may differ when the run goes on."""
        return name in (word.strip() for word in (self.run.allow_change or "").split(","))

    def given(self, name: str) -> bool:
        """Return whether a YAML file or the command line set the key."""
        return self.origin.get(name) not in (None, OUR_DEFAULT, ALWAYS_SO)

    def as_dict(self) -> dict[str, Any]:
        """Return every key of the phase with its resolved value, flat and JSON-ready, for the manifest.

        Secrets are hidden (see `scrub`).
        """
        flat: dict[str, Any] = {"phase": self.phase}
        flat |= {name: _json_ready(self.value(name)) for name in sorted(namespace(self.config_class))}
        hidden: dict[str, Any] = scrubbed(flat | ({"env": self.env} if self.env else {}))
        return hidden

    def training_arguments(self, **overrides: Any) -> Any:
        """Return an instance of the phase's config class, a `transformers.TrainingArguments`.

        `overrides` win over the configuration: what a run derives (the DeepSpeed dict, accumulation, precision).
        Where nobody says otherwise, `use_cpu` and `bf16` follow from the hardware. Raises `UserError` with the
        class's own words where it refuses a value.
        """
        given = _hardware({**self.training, **overrides})
        given = _checkpointing(given, self.value("gradient_checkpointing"))
        later = {name: given.pop(name) for name, loud in QUIETLY.items() if name in given and _loud(given[name], loud)}
        try:
            arguments = resolve(self.config_class)(**given)
        except ValueError as error:
            raise UserError(f"the {self.phase} configuration was refused: {error}") from None
        for name, value in later.items():
            setattr(arguments, name, value)
        for name in FOR_TRACKERS:
            setattr(arguments, name, scrubbed(getattr(arguments, name)))
        return arguments


def _loud(value: Any, loud: tuple[Any, ...]) -> bool:
    """Return whether the class warns about the value: those named, or any but None where none are."""
    return value in loud if loud else value is not None


def _hardware(given: dict[str, Any]) -> dict[str, Any]:
    """Fill in `use_cpu` and `bf16` from the machine: bf16 where an accelerator computes it natively."""
    import torch

    use_cpu = given.get("use_cpu") or not torch.accelerator.is_available()
    bf16 = given.get("bf16")
    if bf16 is None:
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = not use_cpu and native and not given.get("fp16", False)
    return {**given, "use_cpu": use_cpu, "bf16": bf16}


def _checkpointing(given: dict[str, Any], default: bool | None) -> dict[str, Any]:
    """Say `gradient_checkpointing` in transformers' new name, so that its deprecation stays out of a run's output."""
    given = dict(given)
    on = given.pop("gradient_checkpointing", default)
    kwargs = given.pop("gradient_checkpointing_kwargs", None)
    if given.get("activation_checkpointing") is None:
        given["activation_checkpointing"] = bool(on)
    if given.get("activation_checkpointing_kwargs") is None and kwargs is not None:
        given["activation_checkpointing_kwargs"] = kwargs
    return given


def _json_ready(value: Any) -> Any:
    if isinstance(value, DatasetFields):
        return value.spec()
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return value
