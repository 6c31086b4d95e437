"""How a trainer's state gets into a checkpoint and back: transformers' layout, DeepSpeed's shards, our commit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_callback import ExportableState

from align_kit import log
from align_kit.checkpoint import commit, manifest, universal
from align_kit.checkpoint.assemble import Shards
from align_kit.checkpoint.saver import Saver
from align_kit.checkpoint.snapshot import SnapshotEngine, safetensors_handed_over
from align_kit.errors import UserError
from align_kit.models.lora import TRAINED
from align_kit.telemetry import spent
from align_kit.telemetry.heartbeat import Heart
from align_kit.telemetry.roll_call import RollCall
from align_kit.trainers.gather import gathered, joins_later, shards_of

EXTRA_STATE = "align_kit_state.json"
TRAINER_STATE = "trainer_state.json"


def _numbers(parameter: Any) -> int:
    """Return how many numbers a parameter has over all ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class CheckpointedTrainer(Trainer):
    """transformers' Trainer whose checkpoints are committed in one piece, in the background, and loaded as data."""

    args: Any  # the phase's own config class, such as trl's DPOConfig
    model: Any
    model_wrapped: Any
    deepspeed: Any
    frozen: dict[str, Any]
    tokens_seen: int
    guard: Any  # `guard.Guard`: what it remembers goes with the checkpoint
    roll_call: RollCall
    heart: Heart

    def prepare_saving(self) -> None:
        """Take up what a run without other wishes saves with; the run lays its own over it."""
        args = self.args
        self.saver = Saver(Path(args.output_dir), args.process_index, args.world_size)
        self.saver.patience = float(args.ddp_timeout)
        self.facts: Callable[[], Mapping[str, Any]] = dict  # what the manifest of a checkpoint says of the run
        self.record: Callable[[], Mapping[str, Any]] = dict  # the manifest of the run: what a resume is compared with
        self.trust_checkpoint = False

    # --- what is stored ---

    @functools.cached_property
    def joins_later(self) -> bool:
        """Whether checkpoints hold whole weights that are joined from all ranks' shards behind the training."""
        return joins_later(self)

    @property
    def stored_model(self) -> Any:
        """The part of the model that a finished run leaves behind."""
        return self.model

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained, not the weights themselves."""
        return hasattr(self.stored_model, "peft_config")

    def stored_names(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Return of what `named` names in the trained module the stored model's part, by the names it has there."""
        place = next(name for name, module in self.model.named_modules() if module is self.stored_model)
        prefix = f"{place}." if place else ""
        mine = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
        return {name: value for name, value in mine.items() if not self.is_lora or f".{TRAINED}." in name}

    def store_model(self, folder: Path, weights: Mapping[str, Any]) -> None:
        """Store `weights` (of `gathered`) and what else makes them a model in `folder`, in Hugging Face form.

        Of several adapters that is the trained one: the others' folders would hold its weights under their names.
        """
        model = self.stored_model
        adapters = {"selected_adapters": [TRAINED]} if self.is_lora else {}
        cached, model.config.use_cache = model.config.use_cache, True
        try:
            # A copy: transformers empties the mapping it is given, and the tensors may be compared afterwards.
            model.save_pretrained(str(folder), state_dict=dict(weights), **adapters)
        finally:
            model.config.use_cache = cached
        self.processing_class.save_pretrained(str(folder))  # type: ignore[union-attr]

    # --- what a checkpoint holds beside transformers' own ---

    def extra_state(self) -> dict[str, Any]:
        """Return what a resumed run must know beside weights, optimizer and step: plain JSON, the same on all ranks."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    # --- into a checkpoint ---

    @spent.during("saves")
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Hold the loop for a copy of everything in memory; the rest is written and committed behind it."""
        self.roll_call("save", self.state.global_step)
        self.heart.beat("save")
        self.store_flos()
        step = self.state.global_step
        if not self.saver.has_room(step, self._estimated_bytes(), lambda mine: gather_object([mine])):
            return
        with self.saver.saving(step, self._facts) as folder:
            self.accelerator.wait_for_everyone()  # the folder is there
            for frozen in self.frozen.values():
                frozen.save(folder)
            self._note_best(step)  # on all ranks: together they load it in the end
            self._hand_weights_over(folder)
            if self.args.should_save:
                state = {**self.extra_state(), "guard": self.guard.state_dict()}
                (folder / EXTRA_STATE).write_text(json.dumps(state))
                (folder / manifest.RUN).write_text(json.dumps(self.record()))
                self._save_trainer_state(folder)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.accelerator.wait_for_everyone()  # small files are written; what is copied is handed over

    def _estimated_bytes(self) -> int:
        """Return about what a checkpoint takes while it is written: weights, the shards they are joined from, and of
        what is trained fp32 masters and two moments.
        """
        named = dict(self.model.named_parameters())
        stored = sum(_numbers(p) * p.element_size() for p in self.stored_names(named).values())
        passing = stored if self.joins_later else 0
        return stored + passing + 12 * sum(_numbers(p) for p in named.values() if p.requires_grad)

    def _hand_weights_over(self, folder: Path) -> None:
        """Have the model stored in Hugging Face form: from the ranks' shards later, or from a gather now."""
        saver = self.saver
        if not self.joins_later:
            weights = gathered(self, copy=True)
            if self.args.should_save:
                with safetensors_handed_over(saver.hand_over):
                    self.store_model(folder, weights)
            return
        shards = shards_of(self)
        shards.hand_over(folder, self.args.process_index, saver.hand_over, self.model_wrapped.checkpoint_engine.copies)
        if self.args.should_save:
            with safetensors_handed_over(functools.partial(self._fill_first, shards, folder)):
                self.store_model(folder, shards.hollow())

    def _fill_first(self, shards: Shards, folder: Path, path: Path, write: Callable[[Path], None]) -> None:
        """Have a file of whole weights written when all shards are, and the weights have been joined from them."""

        def joined(place: Path) -> None:
            shards.fill(folder, self.args.world_size)
            write(place)

        self.saver.hand_over_last(path, joined)

    def _facts(self) -> dict[str, Any]:
        counted = {"step": self.state.global_step, "tokens": self.tokens_seen, "world_size": self.args.world_size}
        return {**counted, **self.facts()}

    def _note_best(self, step: int) -> None:
        """Name the checkpoint of the best evaluation: this one, which is about to be, or one that stands."""
        best = self.state.best_global_step
        if best:
            place = commit.final(self.saver.run, best)
            if best == step or place.exists():
                self.state.best_model_checkpoint = str(place)

    def _save_trainer_state(self, folder: Path) -> None:
        """Write transformers' `trainer_state.json`, with the state of callbacks that have one."""
        states: dict[str, list[Any]] = {}
        for holder in [*self.callback_handler.callbacks, self.control]:
            if isinstance(holder, ExportableState):
                states.setdefault(type(holder).__name__, []).append(holder.state())
        kept: Any = self.state.stateful_callbacks
        kept.update({name: found[0] if len(found) == 1 else found for name, found in states.items()})
        self.state.save_to_json(str(folder / TRAINER_STATE))

    # --- and back ---

    @spent.during("engine")
    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Let the engine be made, give it our way to load and save, and only then load."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = self.model_wrapped
        engine.checkpoint_engine = SnapshotEngine(self.saver.hand_over, trust=self.trust_checkpoint)
        if resume_from_checkpoint is not None:
            deepspeed_load_checkpoint(engine, resume_from_checkpoint, load_module_strict=not self.is_lora)
            if engine.load_universal_checkpoint():
                universal.mend(engine, Path(resume_from_checkpoint))
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_callback_state(self) -> None:
        """Read our own state where transformers reads its callbacks': once, when a run goes on."""
        super()._load_callback_state()
        self._restore_callbacks()
        place = commit.final(self.saver.run, self.state.global_step) / EXTRA_STATE
        try:
            state = json.loads(place.read_text())
            self.load_extra_state(state)
            self.guard.load_state_dict(state["guard"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{place} cannot be read ({error}); go on from an older checkpoint with --resume") from None

    def _restore_callbacks(self) -> None:
        """Let callbacks with a state go on from it: early stopping counts evaluations without a better one."""
        kept: Any = self.state.stateful_callbacks
        for holder in self.callback_handler.callbacks:
            if isinstance(holder, ExportableState) and isinstance(state := kept.get(type(holder).__name__), dict):
                vars(holder).update(state.get("attributes", {}))

    @spent.during(spent.TRAINING)
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what is being saved when it ends, well or badly, is saved before this returns."""
        try:
            done = super().train(*args, **kwargs)
            with spent.during("saves"):
                self.saver.join()
            return done
        except BaseException:
            self.heart.beat("save")  # the launcher has more patience with it than with a step
            raise
        finally:
            self.saver.leave()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Tell whether a save is due after an evaluation; one that was asked for is not forgotten over it."""
        return bool(super()._determine_best_metric(metrics, trial)) or bool(self.control.should_save)

    def _load_best_model(self) -> None:
        """Load the best model once its checkpoint stands, on all ranks; where it does not, keep the last weights."""
        self.heart.beat("save")
        self.saver.join()
        self.accelerator.wait_for_everyone()
        best = commit.final(self.saver.run, self.state.best_global_step or 0)
        if manifest.read(best) is None:
            log.warn(f"{best.name}, of the best evaluation, was never committed: the final model is of the last step")
            return
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()
