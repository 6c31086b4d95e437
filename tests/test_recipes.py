"""One harness over the registry: every recipe on real ranks, every pair of options, full and LoRA.

All runs of a recipe see the same 8 rows per step, however they are cut into ranks, micro-batches and shards, so they
must all give the digits in `LOSSES`. To store digits anew after a change that is meant to change them: run
`pytest tests/test_recipes.py -k digits`; a failure prints the lines to paste.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from align_kit.losses import BATCH_COUPLED
from align_kit.registry import RECIPES, Recipe, names
from tests.harness import Ranks
from tests.rank_work import probe_ids
from tests.small import ADDED, GLOBAL_BATCH, Lab, Run, lab_of, make_rows, read_weights, relative_gap, write_model

pytestmark = pytest.mark.slow

STEPS, SAVED_AT = 6, 3
FORMS = ("full", "lora")
DIGITS = 1e-5  # relative; the ways of cutting a batch differ by up to 5e-7 on one machine


class Cut(NamedTuple):
    """One way to run a recipe: each field is an option of the product that is covered pairwise."""

    form: str
    world_size: int
    accumulation: int
    checkpointing: bool
    evaluation: bool
    sharded: bool  # persistence threshold 0: every parameter is split, however small


COVER = (
    Cut("full", 1, 1, False, False, False),
    Cut("full", 2, 4, True, True, True),
    Cut("lora", 2, 1, False, True, True),
    Cut("lora", 1, 4, True, False, True),
    Cut("lora", 2, 4, False, False, False),
    Cut("lora", 1, 1, True, True, False),
)

LOSSES: dict[tuple[str, str], list[float]] = {
    ("pretrain", "full"): [5.9501352, 5.6716633, 5.5369182, 5.3917785, 5.2796998, 5.229712],
    ("pretrain", "lora"): [5.9501352, 5.8299384, 5.7262864, 5.6802306, 5.6271024, 5.617867],
    ("sft", "full"): [5.9872966, 5.8759613, 5.7257628, 5.7354379, 5.6507244, 5.4144411],
    ("sft", "lora"): [5.9872966, 5.9091005, 5.8357229, 5.9750357, 5.9499555, 5.7596393],
    ("reward", "full"): [0.69314718, 0.69146985, 0.69744325, 0.69336325, 0.68181345, 0.68569422],
    ("reward", "lora"): [0.69314718, 0.69146985, 0.697846, 0.69558105, 0.68142521, 0.68606785],
    ("dpo", "full"): [0.69314718, 0.66506243, 0.69794214, 0.65318638, 0.69274712, 0.70182395],
    ("dpo", "lora"): [0.69314718, 0.68539661, 0.69550735, 0.67689443, 0.70303136, 0.68994182],
    ("orpo", "full"): [6.0037417, 5.9091163, 5.5814691, 5.6062789, 5.6980057, 5.5016246],
    ("orpo", "lora"): [6.0037417, 6.0451512, 5.7643275, 5.886467, 5.9857726, 5.7687407],
    ("kto", "full"): [0.57142854, 0.57386225, 0.58062422, 0.58038473, 0.55328327, 0.59946376],
    ("kto", "lora"): [0.57142854, 0.55968195, 0.57293254, 0.57785839, 0.55179125, 0.58301514],
    ("ppo", "full"): [0.0067762821, -0.13426304, -0.15087256, 0.0059398729, -0.082074247, -0.11795603],
    ("ppo", "lora"): [0.0067762807, -0.11067816, -0.13665791, 0.007175833, -0.032017365, -0.062392056],
}  # fmt: skip


def kto_at_identity(done: Run, rows: list[dict[str, Any]]) -> float:
    """Return KTO's loss where log-ratios and baseline are 0: a value of 1/2 for each row, times its class's weight."""
    weight = {True: 1.0, False: 1.0}
    for name, (value, _) in done.manifest["derived"].items():
        weight[name == "desirable_weight"] = value
    assert set(weight.values()) != {1.0}
    return sum(weight[row["label"]] * 0.5 for row in rows) / len(rows)


# What the loss over rows is while the policy is its reference, by recipe that has one.
STEP_0: dict[str, Callable[[Run, list[dict[str, Any]]], float]] = {
    "dpo": lambda done, rows: math.log(2),
    "kto": kto_at_identity,
}


@pytest.fixture(scope="module")
def lab(ranks: Ranks) -> Lab:
    return lab_of(ranks)


def options(lab: Lab, recipe: Recipe, cut: Cut) -> dict[str, Any]:
    """Return the options of a cut; runs on two ranks also save half way, for the test of resuming."""
    return {
        "max_steps": STEPS,
        "use_peft": cut.form == "lora" or None,
        "per_device_train_batch_size": GLOBAL_BATCH // (cut.world_size * cut.accumulation),
        "gradient_accumulation_steps": cut.accumulation,
        "gradient_checkpointing": cut.checkpointing,
        "deepspeed": lab.sharded if cut.sharded else None,
        **(evaluation(lab, recipe, batch=cut.world_size) if cut.evaluation else {}),
        **({"save_strategy": "steps", "save_steps": SAVED_AT} if cut.world_size == 2 else {}),
    }


def evaluation(lab: Lab, recipe: Recipe, *, batch: int) -> dict[str, Any]:
    """Return the options that evaluate on 7 rows before the first step and every third one."""
    return {
        "eval_strategy": "steps",
        "eval_steps": SAVED_AT,
        "eval_on_start": True,
        "per_device_eval_batch_size": batch,
        "eval_datasets": [{"path": lab.held_out[lab.kind(recipe.name)]}],
    }


def run(lab: Lab, recipe: Recipe, cut: Cut) -> Run:
    return lab.train(recipe.name, cut.world_size, **options(lab, recipe, cut))


def sharded_cut(form: str) -> Cut:
    """Return the cut of `form` with two ranks and every parameter sharded."""
    return next(cut for cut in COVER if cut.form == form and cut.world_size == 2 and cut.sharded)


each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=names())
each_form = pytest.mark.parametrize("form", FORMS)


def test_cuts_cover_every_pair_of_options() -> None:
    for one, other in itertools.combinations(range(len(Cut._fields)), 2):
        values = itertools.product({cut[one] for cut in COVER}, {cut[other] for cut in COVER})
        assert set(values) == {(cut[one], cut[other]) for cut in COVER}


@each_recipe
@pytest.mark.parametrize("cut", COVER, ids=lambda cut: "-".join(map(str, cut)))
def test_loss_digits(lab: Lab, recipe: Recipe, cut: Cut) -> None:
    losses = run(lab, recipe, cut).losses
    line = f'("{recipe.name}", "{cut.form}"): {[float(f"{loss:.8g}") for loss in losses]},'
    stored = LOSSES.get((recipe.name, cut.form), [])
    assert losses == pytest.approx(stored, rel=DIGITS, abs=1e-7), f"to store:\n    {line}"


@each_recipe
@each_form
def test_step_0_identity(lab: Lab, recipe: Recipe, form: str) -> None:
    """Before any update the policy is its reference: placed apart and sharded, or in the policy's own base."""
    if "reference" not in recipe.needs:
        pytest.skip(f"{recipe.name} has no reference")
    done = run(lab, recipe, sharded_cut(form))
    assert done.manifest["frozen"]["reference"]["placement"] == {"full": "sharded", "lora": "adapter"}[form]
    if recipe.writes:
        assert [done.logged(name)[0] for name in ("kl", "eval_kl")] == pytest.approx([0, 0], abs=1e-5)
        assert done.logged("policy/ratio")[0] == pytest.approx(1, abs=1e-6)
        return
    expected, kind = STEP_0[recipe.name], lab.kind(recipe.name)
    # KTO draws rows in their order; the loss of the others is the same whatever the rows
    assert done.losses[0] == pytest.approx(expected(done, make_rows(kind, GLOBAL_BATCH)), abs=1e-6)
    assert done.logged("eval_loss")[0] == pytest.approx(expected(done, make_rows(kind, 7, seed=1)), abs=1e-6)
    assert done.logged("rewards/margins")[0] == pytest.approx(0, abs=1e-6)


@each_recipe
@each_form
def test_saved_is_live(lab: Lab, recipe: Recipe, form: str) -> None:
    """What plain transformers (and PEFT) read from the folder gives the logits the trained engine gave."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    done = run(lab, recipe, sharded_cut(form))
    folder = lab.model if form == "lora" else done.folder
    model: Any = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        if recipe.head == "score"
        else AutoModelForCausalLM.from_pretrained(folder)
    )
    before = model(probe_ids()).logits
    if form == "lora":
        model = PeftModel.from_pretrained(model, str(done.folder))
    with torch.no_grad():
        logits = model.eval()(probe_ids()).logits
    torch.testing.assert_close(logits, done.live_logits, rtol=1e-5, atol=1e-5)
    assert form == "full" or (logits - before).abs().max() > 0.01, "the adapter does nothing"


@each_recipe
@each_form
def test_words_survive(lab: Lab, recipe: Recipe, form: str) -> None:
    """EOS, pad, chat template, added tokens and generation config load in plain transformers as they were."""
    from transformers import AutoTokenizer, GenerationConfig

    done = run(lab, recipe, sharded_cut(form))
    before, after = AutoTokenizer.from_pretrained(lab.model), AutoTokenizer.from_pretrained(done.folder)
    assert (after.eos_token, after.pad_token, after.chat_template) == (
        before.eos_token, before.pad_token, before.chat_template,
    )  # fmt: skip
    assert after.get_vocab() == before.get_vocab() and ADDED in after.get_added_vocab()
    if form == "full":
        if recipe.head == "lm":
            kept = GenerationConfig.from_pretrained(done.folder)
            assert (kept.eos_token_id, kept.max_new_tokens) == ([0, 3], 17)
        config = json.loads((done.folder / "config.json").read_text())
        assert config.get("use_cache", True) is True and config["eos_token_id"] == 0


@each_recipe
@each_form
def test_eval_loss_is_exact(lab: Lab, recipe: Recipe, form: str) -> None:
    """7 rows on two ranks in batches of two: the loss over them is the one rank's with batches of one."""
    alone = next(cut for cut in COVER if cut.world_size == 1 and cut.evaluation)
    metric = "eval_reward" if recipe.writes else "eval_loss"
    exact = run(lab, recipe, alone).logged(metric)
    shared = run(lab, recipe, sharded_cut(form)).logged(metric)
    assert len(shared) == 1 + STEPS // SAVED_AT
    assert shared[0] == pytest.approx(exact[0], rel=1e-6)  # before the first step both forms are the same model
    if form == alone.form:
        assert shared == pytest.approx(exact, rel=1e-6)


@each_recipe
@each_form
def test_resume_is_bitwise(lab: Lab, recipe: Recipe, form: str, tmp_path: Path) -> None:
    """A run that stopped after its checkpoint and goes on ends in the same bits as one that never stopped."""
    cut = sharded_cut(form)
    done = run(lab, recipe, cut)
    cut_short = interrupted(done.folder, tmp_path / "again")
    again = lab.start(recipe.name, cut_short, cut.world_size, resume="auto", **options(lab, recipe, cut))
    again.result.ok()
    assert again.weights.keys() == done.weights.keys()
    assert all((again.weights[name] == tensor).all() for name, tensor in done.weights.items())
    assert again.losses[-(STEPS - SAVED_AT) :] == done.losses[SAVED_AT:]
    assert again.manifest["frozen"] == done.manifest["frozen"]
    assert again.manifest["policy"]["digest"] == done.manifest["policy"]["digest"]


def interrupted(run_folder: Path, copy: Path) -> Path:
    """Copy a run as it stood right after its checkpoint half way."""
    shutil.copytree(run_folder, copy, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}"))
    for file in copy.glob("*.safetensors"):
        file.unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    for key in ("finished", "result", "steps", "seconds"):
        manifest.pop(key)
    (copy / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    return copy


# --- the gradient of a step does not depend on how its batch is cut -----------------------------------------


@cache
def other_model(lab: Lab) -> Path:
    """Return a model to be a reference that is not the policy's start, so that every margin counts."""
    return write_model(lab.home / "other", seed=1)


def gradient_start(lab: Lab, recipe: Recipe) -> Path:
    """Return the model gradients are taken at: a scalar head that is not fresh, or nothing below it has a gradient."""
    return lab.scorer if recipe.head == "score" else lab.model


def gradient(lab: Lab, recipe: Recipe, world_size: int, batch: int, accumulation: int, **changes: Any) -> Run:
    changes["model_name_or_path"] = gradient_start(lab, recipe)
    if "reference" in recipe.needs:
        changes |= {"reference_model_name_or_path": other_model(lab), "reference_differs": True}
    if world_size > 1:
        changes |= {"deepspeed": lab.sharded}
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return lab.step(recipe.name, world_size, **sizes, **changes)


CUTS = {"1x8": (1, 1, 8), "2x2-on-2-ranks": (2, 2, 2)}


@each_recipe
@pytest.mark.parametrize("cut", CUTS)
def test_gradient_of_any_cut(lab: Lab, recipe: Recipe, cut: str) -> None:
    """8 micro-batches of 1, or ZeRO-3 on two ranks, give the gradient of one batch of 8."""
    whole, parts = gradient(lab, recipe, 1, 8, 1), gradient(lab, recipe, *CUTS[cut])
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6, abs=1e-7)  # PPO's first loss is all but 0
    assert relative_gap(parts.weights, whole.weights, read_weights(gradient_start(lab, recipe))) < 1e-5


@each_recipe
def test_rows_that_fill_up_the_last_batch_do_not_count(lab: Lab, recipe: Recipe) -> None:
    """Where rows do not divide, accelerate repeats some so that every rank has a batch; an epoch is an epoch."""
    data = lab.options(recipe.name)["datasets"][0]
    few = {"datasets": [{**data, "max_samples": 5}], "max_steps": 2, "optim": "sgd"}
    rows = gradient(lab, recipe, 1, 64, 1, **few)  # the whole epoch in one step, twice
    ranks = gradient(lab, recipe, 2, 2, 16, **few)
    assert ranks.losses == pytest.approx(rows.losses, rel=5e-6, abs=1e-7)
    assert relative_gap(ranks.weights, rows.weights, read_weights(gradient_start(lab, recipe))) < 1e-5


@pytest.mark.parametrize("loss_type", BATCH_COUPLED)
def test_batch_coupled_losses_at_equal_micro_batches(lab: Lab, loss_type: str) -> None:
    """Losses that look at a whole micro-batch: two of 4 on one rank are one of 4 on each of two ranks.

    One batch of 8 is another loss for those that sort; `sft` is told the tokens of the whole step and is the same.
    """
    dpo = next(recipe for recipe in RECIPES if recipe.name == "dpo")
    settings = {"loss_type": [loss_type], "beta": 1.0}  # a weak loss is all but linear: sorting would not show
    in_turn, side_by_side = gradient(lab, dpo, 1, 4, 2, **settings), gradient(lab, dpo, 2, 4, 1, **settings)
    assert side_by_side.losses == pytest.approx(in_turn.losses, rel=1e-6)
    start = read_weights(lab.model)
    assert relative_gap(side_by_side.weights, in_turn.weights, start) < 1e-5
    whole = relative_gap(gradient(lab, dpo, 1, 8, 1, **settings).weights, in_turn.weights, start)
    if loss_type != "aot":  # the gaps of these pairs come in the same order under both models: sorting moves nothing
        assert whole < 1e-5 if loss_type == "sft" else whole > 1e-3
