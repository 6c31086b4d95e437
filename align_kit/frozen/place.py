"""Put a frozen model in its place: load it from its source, then shard it, offload it or make it small."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align_kit import log, zero
from align_kit.data.prepare import Split
from align_kit.data.tokenise import tokenizer_digest
from align_kit.errors import UserError
from align_kit.forward import choose, door
from align_kit.forward.agree import settle, with_relatives
from align_kit.forward.logprobs import token_logps
from align_kit.forward.scores import sequence_scores
from align_kit.frozen.choice import Room, measure
from align_kit.frozen.columns import DatasetRows, columns_for, completions_batch
from align_kit.frozen.hold import Frozen, RewardModel, SharedReward, freeze
from align_kit.frozen.identity import Identity
from align_kit.frozen.store import Row
from align_kit.models import load, moe, source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

REFERENCE_ADAPTER = "reference"
PROBE_ROWS = 32
CHECKED_ROWS = 4  # computed both ways where a frozen model is opened


@dataclass(frozen=True)
class Site:
    """What the frozen models of a run are put beside.

    `engine` is the policy's engine configuration; `loading` goes to `models.load.load_policy`; `policy` is loaded and
    not yet in an engine; `splits` are the run's tokenised rows, in tokens of `tokenizer`. `forward` is how batches are
    asked to be computed (`forward.door`).
    """

    engine: Mapping[str, Any]
    loading: Mapping[str, Any]
    policy: Any
    tokenizer: Any
    splits: Sequence[Split]
    forward: str = choose.PLAIN

    @property
    def stage(self) -> int:
        return int(self.engine.get("zero_optimization", {}).get("stage", 0))

    @property
    def hidden_size(self) -> int | None:
        return getattr(self.policy.config, "hidden_size", None)

    def room(self) -> Room:
        """Return what is left of the device's memory at the moment; all ranks call it."""
        return measure(self.policy, self.engine, self.loading["dtype"])

    def probe(self) -> list[dict[str, Tensor]]:
        """Return some of the run's own rows, each a batch on this rank's device: what an int8 copy is measured on."""
        sequences = self._sequences()
        last = len(sequences) - 1
        places = sorted({place * last // (PROBE_ROWS - 1) for place in range(PROBE_ROWS)})
        return [self._batch([sequences[place]]) for place in places]

    def walked(self, model: Any, place: Callable[[], nn.Module], words: Any) -> nn.Module:
        """Open `model` for the run's way of computing batches, `place` it, and check the way on a few of its rows.

        `words` is the tokenizer the model reads. What cannot be computed as the run's other batches are is computed
        plain, and a line says why.
        """
        if self.forward == choose.PLAIN:
            door.open_door(model, choose.PLAIN)
            return place()
        choice = choose.choose(model, trains=False)
        packs = self.forward == choose.PACKED and choice.mode == choose.SHARED
        door.open_door(model, choose.PACKED if packs else choice.mode)
        placed, why = place(), choice.why if choice.mode == choose.PLAIN else None
        if why is None:
            batch = with_relatives(_reworded(self.first_rows(), self.tokenizer, words))
            answer = sequence_scores if model.get_output_embeddings() is None else _logps
            why = settle(placed, lambda some: answer(placed, some), batch)
        if why is not None:
            log.warn(f"a frozen model ({type(model).__name__}) is computed plain: {why}")
        return placed

    def first_rows(self) -> dict[str, Tensor]:
        """Return the first of the run's sequences as one batch on this rank's device."""
        sequences = self._sequences()
        first = [sequences[place] for place in range(min(CHECKED_ROWS, len(sequences)))]
        return self._batch(first)

    def _sequences(self) -> DatasetRows | _Prompts:
        """Return the sequences of the training rows: prompt and completion each, or prompts alone."""
        rows = self.splits[0].rows
        columns = columns_for(rows)
        return DatasetRows(rows, columns) if columns else _Prompts(rows)

    def _batch(self, sequences: Sequence[Row]) -> dict[str, Tensor]:
        batch = completions_batch(sequences, self.tokenizer.pad_token_id)
        return {name: tensor.to(_device()) for name, tensor in batch.items()}


class _Prompts:
    """Prompts without completions as rows: every token but the first is predicted."""

    def __init__(self, rows: Any) -> None:
        self._ids = rows["prompt_ids"]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int, /) -> Row:
        return Row(self._ids[index][:1], self._ids[index][1:])


def load_reference(start: source.Source, identity: Identity, site: Site, *, policy_is_adapter: bool) -> Frozen:
    """Return the reference in its place: any but `cached`, which `cached.cached_reference` makes."""
    if identity.placement == "adapter":
        return Frozen(identity, None, adapter=REFERENCE_ADAPTER if policy_is_adapter else None)
    if identity.placement == "quantised":
        model, error = _quantised(start, site, _logps, site.probe())
        walked = site.walked(model, lambda: model, site.tokenizer)
        return Frozen(_with_error(identity, error, "token's log-probability (nats)"), walked)
    return Frozen(identity, engine_of(start, site, offload=identity.placement == "offloaded"))


def load_reward(start: source.Source, identity: Identity, site: Site) -> RewardModel | SharedReward:
    """Return a reward model in its place, with its own tokenizer.

    Raises `UserError` where it is no sequence classifier with one label, or has no tokenizer beside it.
    """
    source.check_scores(start, "reward_model_name_or_path")
    words = load.load_tokenizer(start, trust_remote_code=bool(site.loading.get("trust_remote_code")))
    if identity.placement == "shared":
        site.policy.hold_reward(identity.role, start, words.pad_token_id)
        return SharedReward(identity, words)
    ending = {"head": "score", "pad_token_id": words.pad_token_id}
    if identity.placement == "quantised":
        probe = [_reworded(batch, site.tokenizer, words) for batch in site.probe()]
        model, error = _quantised(start, site, sequence_scores, probe, **ending)
        walked = site.walked(model, lambda: model, words)
        return RewardModel(_with_error(identity, error, "score"), walked, words)
    offload = identity.placement == "offloaded"
    return RewardModel(identity, engine_of(start, site, offload=offload, words=words, **ending), words)


# --- sharded, offloaded -----------------------------------------------------------------------------------


def engine_of(
    start: source.Source, site: Site, *, offload: bool = False, words: Any = None, **loading: Any
) -> nn.Module:
    """Return the frozen model of `start`: a ZeRO-3 inference engine, or below stage 3 the model on this rank's device.

    `offload` keeps its shards in CPU memory; each layer is brought to the device as it computes. `loading` is laid
    over the site's. `words` is its own tokenizer, where that is not the policy's.
    """
    config = zero.frozen_config(site.engine, site.hidden_size, offload=offload)
    with _built_under(config):
        model = freeze(load.load_policy(start, **{**site.loading, **loading}))
    zero.set_leaf_modules(model, moe.sparse_blocks, config)
    return site.walked(model, lambda: _sharded(model, config), words or site.tokenizer)


@contextmanager
def _built_under(config: Mapping[str, Any]) -> Iterator[None]:
    """Let transformers shard models as `config` says meanwhile, not as the policy's configuration does."""
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    alive = integration.HfDeepSpeedConfig(dict(config)) if _is_zero3(config) else None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before
        del alive


def _is_zero3(config: Mapping[str, Any]) -> bool:
    return bool(config["zero_optimization"].get("stage") == 3)


def _sharded(model: Any, config: Mapping[str, Any]) -> nn.Module:
    """Return a ZeRO-3 inference engine around `model`; below stage 3 the model itself, on this rank's device."""
    if not _is_zero3(config):
        return model.to(_device())  # type: ignore[no-any-return]
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=dict(config))
    engine.eval()
    return engine


def _device() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# --- quantised --------------------------------------------------------------------------------------------


def _quantised(
    start: source.Source,
    site: Site,
    answers: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    probe: Sequence[Mapping[str, Tensor]],
    **loading: Any,
) -> tuple[nn.Module, dict[str, float]]:
    """Return the int8 copy of `start`, whole on this rank, and the mean and worst error of its answers on `probe`.

    While it is made, the rank holds the copy in the precision of the run.
    """
    import torch

    from align_kit.models.int8 import quantise_

    with load.plain_transformers():
        model = freeze(load.load_policy(start, **{**site.loading, **loading})).to(_device())
    with torch.no_grad():
        before = [answers(model, batch) for batch in probe]
        if not quantise_(model):
            raise UserError(
                f"{start.name} has no linear layers to store in int8; use the placement sharded or offloaded"
            )
        after = [answers(model, batch) for batch in probe]
    error = (torch.cat(after) - torch.cat(before)).abs()
    return model, {"mean": float(error.mean()), "worst": float(error.max())}


def _reworded(batch: dict[str, Tensor], tokenizer: Any, words: Any) -> Mapping[str, Tensor]:
    """Return the same texts in tokens of `words`: a reward model need not know the policy's."""
    if tokenizer_digest(tokenizer) == tokenizer_digest(words):
        return batch
    lengths = batch["attention_mask"].sum(1).tolist()
    texts = [tokenizer.decode(ids[:length]) for ids, length in zip(batch["input_ids"], lengths, strict=True)]
    encoded = words(texts, padding=True, padding_side="right", return_tensors="pt")
    return {name: encoded[name].to(_device()) for name in ("input_ids", "attention_mask")}


def _logps(model: nn.Module, probe: Mapping[str, Tensor]) -> Tensor:
    found = token_logps(model, probe)
    return found.logps_BT[found.mask_BT]


def _with_error(identity: Identity, error: Mapping[str, float], what: str) -> Identity:
    words = f"int8 moves a {what} by {error['mean']:.2g} on average, {error['worst']:.2g} at most"
    return identity.found(words, int8_error_mean=error["mean"], int8_error_worst=error["worst"])
