"""What a run will take, worked out before its policy loads; a run that cannot fit is refused here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast

from align_kit import log, machine, run_folder, zero
from align_kit.config import BatchPlan, Config
from align_kit.data.prepare import Prepared
from align_kit.errors import UserError, first_line
from align_kit.frozen.choice import STATE_BYTES, Room, place_apart, place_reference
from align_kit.frozen.place import REFERENCE_ADAPTER
from align_kit.models import lora, source
from align_kit.models.source import Source
from align_kit.plan import describe, hardware, show
from align_kit.plan.choose import Choice, Limits, Space, choose
from align_kit.plan.choose import Engine as ChosenEngine
from align_kit.plan.describe import Described
from align_kit.plan.facts import Held, Placement, Precision, Run
from align_kit.plan.hardware import Hardware
from align_kit.plan.plan import Plan
from align_kit.plan.plan import plan as plan_of
from align_kit.registry import Recipe
from align_kit.run_folder import RunFolder
from align_kit.scrub import scrubbed
from align_kit.stages import disk, sampled
from align_kit.stages.beginning import Start
from align_kit.stages.engine import Engine, precision_of
from align_kit.stages.resume import gather

ENGINES = ("zero2", "zero3", "zero3_offload_optimizer", "zero3_offload")  # shipped, that a planner may choose
CONTEXT = 1 << 30  # bytes assumed for what a CUDA process takes beside tensors: kernels, workspaces, NCCL's buffers
Find = Callable[[str, str], Source]  # from a name and its option to where the model is


@dataclass(frozen=True)
class Role:
    """A frozen model a run asks for: where it comes from, where it was put, and what it ends in."""

    name: str
    source: Source
    placement: str
    head: Literal["lm", "score"] = "lm"
    separate: bool = False  # another model than the policy's start

    def shared(self, config: Config) -> bool:
        """Tell whether it is an adapter on the policy's own base."""
        asks = self.placement == "shared" or (self.placement == "auto" and self.source.is_adapter)
        return self.head == "score" and config.model.use_peft and asks


# --- the run described ------------------------------------------------------------------------------------------------


def described(
    recipe: Recipe,
    config: Config,
    start: Source,
    data: describe.Data,
    site: describe.Site,
    *,
    find: Find,
    free: int | None,
    recorded: Mapping[str, Any] | None = None,
    resumed: bool = False,
) -> Described:
    """Return the run that `config` asks for with its frozen models, each where the run would put it.

    `free` is what there is of each rank's device in bytes, None where weights lie in the host's memory anyway;
    `recorded` are the frozen models of a run that goes on.
    """
    frozen = _roles(recipe, config, start, find, recorded or {})
    value = describe.asked(config, "value_model_name_or_path")
    bare = describe.describe(
        recipe, config, start, data, site,
        value_source=find(value, "value_model_name_or_path") if value else None,
        frozen_copy=REFERENCE_ADAPTER if "reference" in recipe.needs else None,
        rewards={role.name: role.source for role in frozen if role.shared(config)},
    )  # fmt: skip
    held: list[Held] = []
    for role in frozen:
        held.append(_placed(role, config, replace(bare.run, frozen=tuple(held)), site, free))
    gated = bare.run.gated and not any(role.separate for role in frozen)
    return replace(bare, run=replace(bare.run, frozen=tuple(held), gated=gated, resumed=resumed))


def _roles(
    recipe: Recipe, config: Config, start: Source, find: Find, recorded: Mapping[str, Mapping[str, Any]]
) -> list[Role]:
    roles = []
    if "reference" in recipe.needs:
        before = recorded.get("reference", {})
        named = before.get("name") or config.run.reference_model_name_or_path
        where = start if named in (None, start.name) else find(named, "reference_model_name_or_path")
        stored = describe.asked(config, "precompute_ref_log_probs", False)
        asked = "cached" if stored else config.run.reference_placement
        roles.append(Role("reference", where, _decided(asked, before), separate=where is not start))
    if "reward" in recipe.needs:
        for number, named in enumerate(_reward_names(config, recorded)):
            role = f"reward_{number}" if number else "reward"
            asked = _decided(config.value("reward_placement"), recorded.get(role, {}))
            roles.append(Role(role, find(named, "reward_model_name_or_path"), asked, head="score"))
    return roles


def _decided(asked: str, before: Mapping[str, Any]) -> str:
    return str(before.get("placement", asked)) if asked == "auto" else asked


def _reward_names(config: Config, recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the reward models that are named, or that the run would find beside it where no reward is named."""
    if before := [str(one["name"]) for role, one in recorded.items() if role.partition("_")[0] == "reward"]:
        return before
    named = config.value("reward_model_name_or_path")
    if named or config.value("reward_funcs"):
        return [named] if isinstance(named, str) else list(named or [])
    found = run_folder.predecessor(Path(config.value("output_dir")), ("reward",))
    return [str(found[0])] if found else []


def _placed(role: Role, config: Config, run: Run, site: describe.Site, free: int | None) -> Held:
    """Return a frozen model where the run would put it beside the policy and the models before it."""
    if role.shared(config):
        return Held(role.name, "shared")
    alone = describe.held(config, role.source, role.name, "sharded", precision=site.precision, head=role.head)
    assert alone.shape is not None
    room = _room(run, free, alone.shape.size)
    # Sizes are known from the configuration: no file is asked for them.
    where = replace(role.source, random=True, base=None)
    if role.name == "reference":
        placement, _ = place_reference(
            role.placement,
            where,
            use_peft=config.model.use_peft,
            separate=role.separate,
            whole_modules=bool(config.model.lora_modules_to_save) or lora.trains_whole_modules(role.source),
            stage=run.engine.stage,
            moves=bool(describe.asked(config, "sync_ref_model", False)),
            room=room,
        )
    else:
        asked = "auto" if role.placement == "shared" else role.placement
        placement, _ = place_apart(asked, where, option="reward_placement", stage=run.engine.stage, room=room)
    if placement == "sharded":
        return alone
    where_to = cast(Placement, placement)
    return describe.held(config, role.source, role.name, where_to, precision=site.precision, head=role.head)


def _room(run: Run, free: int | None, elements: int) -> Room:
    """Return what `auto` compares for a model of so many elements, once the policy and the models before it are there.

    See `frozen.choice.measure`, which looks at the device itself.
    """
    engine, world = run.engine, run.world_size
    taken = [run.policy, *(held.shape for held in run.frozen if held.placement == "sharded" and held.shape)]
    left = None
    if free is not None and engine.offload_param == "none":
        left = free - sum(shape.size for shape in taken) * engine.element_bytes // (world if engine.stage == 3 else 1)
    trained = 0 if engine.offload_optimizer != "none" else run.policy.trained_size
    return Room(left, trained * STATE_BYTES // world, engine.element_bytes, world, elements)


# --- what there is, and the ways that fit -----------------------------------------------------------------------------


def precision_on(config: Config, device: Hardware) -> Precision:
    """Return what the run would train in on `device`."""
    return cast(Precision, precision_of(config, "fp32" if device.kind == hardware.CPU else "bf16"))


def limits_of(device: Hardware, ranks_per_node: int) -> Limits:
    """Return the memory that ranks of `device` have, nothing else running there."""
    if device.kind == hardware.CPU:
        return Limits(device.memory, ranks_per_node * device.memory, one=True)
    return Limits(device.memory - CONTEXT, ranks_per_node * device.host_memory)


def choice(
    recipe: Recipe, config: Config, described: Described, site: describe.Site, device: Hardware, limits: Limits
) -> Choice:
    """Return the ways to carry out the run on `device` that fit within `limits`."""
    hidden, sized = described.run.policy.hidden, cache(described.batches.sized)
    engines = [
        ChosenEngine(name, describe.engine_facts(zero.load(name), site.precision, hidden))
        for name in ENGINES
        if not (limits.one and "offload" in name)  # a CPU's memory is the host's
    ]
    space = Space(
        run=described.run,
        engines=engines,
        sized=lambda run, size, accumulation: describe.with_batch(run, sized(size, accumulation), size, accumulation),
        evaluated=cache(described.batches.evaluated),
        cut_is_free=describe.cut_is_free(config),
        by_global_batch=config.run.global_batch_size is not None,
        cached="reference" in recipe.needs and not recipe.writes and not describe.asked(config, "sync_ref_model"),
        passes=_passes(described.run, site.batch),
    )
    return choose(space, device, limits)


def _passes(run: Run, batch: BatchPlan) -> float:
    """Return how often the run goes through its rows."""
    return run.steps * batch.global_batch / batch.rows if batch.rows else 1.0


# --- in a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """What the run will take (`None` where that could not be worked out, and why), what there is, and on what."""

    plan: Plan | None
    limits: Limits
    device: Hardware
    unknown: str = ""

    @property
    def fits(self) -> bool:
        """Whether what it takes is there; what could not be worked out is not known to be too much."""
        return self.plan is None or self.limits.fits(self.plan.run, self.plan.memory)

    def line(self) -> str:
        """Return the line of the run's header."""
        return f"not known: {self.unknown}" if self.plan is None else show.line(self.plan, self.limits)

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest keeps: plain numbers."""
        found = {"unknown": self.unknown} if self.plan is None else self.plan.as_dict()
        return {**found, "free_bytes": self.limits.device}


Weigh = Callable[[Hardware], tuple[Planned, str | None]]


def planned(
    recipe: Recipe,
    config: Config,
    engine: Engine,
    start: Start,
    words: Any,
    rows: Prepared,
    batch: BatchPlan,
    home: RunFolder,
) -> Planned:
    """Return what the run will take; raise `UserError` where that is not there, unless the run is forced.

    All ranks call it; rank 0 works it out for all, by what the fullest of them has left.
    """
    limits = _free()
    nodes = -(-batch.world_size // machine.local_world_size())
    site = describe.Site(engine.config, cast(Precision, engine.precision), batch, nodes, settled=True)

    def weigh(device: Hardware) -> tuple[Planned, str | None]:
        recorded = home.manifest.get("frozen", {}) if home.resume_from else {}
        held_out = rows.eval.rows if rows.eval else None
        data = sampled.known(recipe, config, rows.train.rows, words, batch.global_batch, held_out)
        tell = partial(
            described, recipe, config, start.source, data,
            find=lambda name, option: source.resolve(name, option=option),
            free=None if limits.one else limits.device, recorded=recorded, resumed=bool(home.resume_from),
        )  # fmt: skip
        plan = plan_of(tell(site).run, device)
        made = Planned(plan, limits, device)
        if config.run.force:
            return made, None
        if made.fits:
            return made, disk.without_room(plan.run, config, start.source.name)
        free_to_choose = replace(site, settled=False)  # another way may take another stage
        ways = choice(recipe, config, tell(free_to_choose), free_to_choose, device, limits)
        return made, show.refusal(ways, limits, start.source.name)

    made, refused = gather(_attempted(weigh, limits) if log.rank() == 0 else None)[0]
    if refused:
        raise UserError(refused)
    return cast(Planned, made)


def _attempted(weigh: Weigh, limits: Limits) -> tuple[Planned, str | None]:
    """Return what the run will take, and why it is refused where it is.

    A model that the planner cannot weigh may train all the same: the run goes on without a plan, and says so.
    """
    device = hardware.here()
    try:
        return weigh(device)
    except UserError as error:  # for all ranks to end by together
        return Planned(None, limits, device), str(error)
    except Exception as error:
        return Planned(None, limits, device, f"{type(error).__name__}: {first_line(error, scrubbed)}"), None


def _free() -> Limits:
    """Return what is free now on the rank that has least, and on the node that has least."""
    import torch

    host = machine.memory().left
    if torch.cuda.is_available():
        devices, hosts = zip(*gather((torch.cuda.mem_get_info()[0], host)), strict=True)
        return Limits(min(devices), min(hosts))
    return Limits(min(gather(host // machine.local_world_size())), host, one=True)


def tell_meters(trainer: Any, planned: Planned) -> None:
    """Give the trainer what its meters read utilisation by: operations a token, and this rank's peak rate.

    A token counts as the trainer counts it: every copy of a shared prefix, computed or not, and no padding.
    """
    if planned.plan is None:
        return
    run = planned.plan.run
    trainer.flops_per_token = planned.plan.work.model_flops / (run.accumulation * run.mean.given)
    trainer.peak_flops = planned.device.flops[run.engine.precision]
