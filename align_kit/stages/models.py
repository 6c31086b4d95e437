"""The policy and the frozen models of a run."""

from __future__ import annotations

from typing import Any

from align_kit import frozen as frozen_models
from align_kit import log, run_folder, zero
from align_kit.config import Config
from align_kit.data.prepare import Prepared
from align_kit.errors import UserError
from align_kit.forward.choose import CannotWalk, Choice, choose
from align_kit.forward.door import open_door
from align_kit.models import load, lora, moe, policy_and_value, quantised, source
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder
from align_kit.stages.beginning import Start
from align_kit.telemetry import spent


@spent.during("policy")
def policy(recipe: Recipe, start: Start, words: Any, config: Config, args: Any) -> Any:
    """Load the policy, sharded as it is built under ZeRO-3, with LoRA where that is asked for.

    What is "auto" in the engine's configuration and follows from the model's size is filled in.
    """
    from align_kit.trainers import measured

    measured.begin(args)
    loaded = _policy(recipe, start, words, config, args)
    if recipe.values:
        loaded = _with_values(loaded, start, words, config, args)
    load.check_vocabulary(loaded, words, start.tokenizer.name)
    zero.set_leaf_modules(loaded, moe.sparse_blocks, args.hf_deepspeed_config.config)
    zero.fill_sizes(args.hf_deepspeed_config.config, getattr(loaded.config, "hidden_size", None))
    return loaded


def _policy(recipe: Recipe, start: Start, words: Any, config: Config, args: Any) -> Any:
    fields = config.model
    if fields.use_peft and start.source.weights.random:
        raise UserError(
            "use_peft needs a model to adapt, and this run would start from random weights that nobody keeps; give "
            "model_name_or_path, or run the phase before"
        )
    if start.source.is_adapter:
        _warn_of_bits(start, in_4bit=fields.use_peft and fields.load_in_4bit)
    overrides = fields.config_overrides if isinstance(fields.config_overrides, dict) else None
    ending = {"head": recipe.head, "pad_token_id": words.pad_token_id}
    loading = {**_loading(config, args), **ending, "overrides": overrides}
    if not fields.use_peft:
        return load.load_policy(start.source, **loading)
    base = load.load_policy(
        start.source.weights, quantised=quantised.settings(fields, loading["dtype"]), **loading
    )
    if start.source.is_adapter:
        copy = frozen_models.REFERENCE_ADAPTER if "reference" in recipe.needs else None
        return lora.load_adapter(base, start.source, head=recipe.head, frozen_copy=copy)
    return lora.add_lora(base, fields, head=recipe.head)


def _warn_of_bits(start: Start, *, in_4bit: bool) -> None:
    """Say so where an adapter goes on upon its base in another form than the one it was trained on."""
    owner = run_folder.read_manifest(frozen_models.of_run(start.source.folder))
    if owner is None or bool(owner.get("config", {}).get("load_in_4bit")) == in_4bit:
        return
    forms = ("in full precision", "in 4 bits")
    then, now = forms[not in_4bit], forms[in_4bit]
    log.warn(
        f"the adapter {start.source.name} was trained on its base {then}, which is {now} in this run: its outputs "
        "begin a little off those it was trained to; load_in_4bit with use_peft says which"
    )


def _with_values(policy: Any, start: Start, words: Any, config: Config, args: Any) -> Any:
    """Return the policy with its value function: an adapter on one base under LoRA, else a model of its own."""
    if config.model.use_peft:
        return policy_and_value.shared(policy, copy_start=start.source.is_adapter)
    named = args.value_model_name_or_path
    where = source.resolve(named, option="value_model_name_or_path") if named else start.source
    made = policy_and_value.separate(policy, where, pad_token_id=words.pad_token_id, **_loading(config, args))
    load.check_vocabulary(made.value, words, start.tokenizer.name)  # it reads the policy's tokens
    return made


def _loading(config: Config, args: Any) -> dict[str, Any]:
    import torch

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return {
        "dtype": dtype,
        "seed": args.seed,
        "attn_implementation": config.model.attn_implementation,
        "trust_remote_code": config.value("trust_remote_code"),
    }


def forward(policy: Any, config: Config, args: Any, home: RunFolder) -> Choice:
    """Decide how batches are computed, and open the policy for it; a run that goes on does as it did."""
    recorded = home.manifest.get("forward") if home.resume_from and not home.has_changed("forward") else None
    asked = recorded["mode"] if recorded else config.run.forward
    trains, noise = not getattr(args, "disable_dropout", False), args.neftune_noise_alpha
    try:
        choice = choose(policy, trains=trains, asked=asked, noise=noise)
    except CannotWalk as reason:
        raise UserError(f"forward: {asked} is not for this model: {reason}; use auto, or plain") from None
    open_door(policy, choice.mode)
    return Choice(**recorded) if recorded else choice


@spent.during("frozen models")
def frozen(
    recipe: Recipe,
    start: Start,
    policy: Any,
    words: Any,
    rows: Prepared,
    forward: Choice,
    config: Config,
    args: Any,
    home: RunFolder,
) -> dict[str, frozen_models.Frozen]:
    """Resolve and load the frozen models the recipe needs, each from its own source.

    A `cached` reference lays its log-probabilities beside `rows`.
    """
    splits = [rows.train, *([rows.eval] if rows.eval else [])]
    engine = args.hf_deepspeed_config.config
    site = frozen_models.Site(engine, _loading(config, args), policy, words, splits, forward.asked)
    recorded = home.manifest.get("frozen", {}) if home.resume_from else {}
    held: dict[str, frozen_models.Frozen] = {}
    if "reference" in recipe.needs:
        held["reference"] = frozen_models.reference(
            config, args, start.source, start.digest, site, recorded, home.resume_from
        )
    if "reward" in recipe.needs:
        base = start.source.weights if config.model.use_peft else None
        held |= frozen_models.rewards(args, site, recorded, base=base)
    return held
