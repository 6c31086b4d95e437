"""The losses against stock TRL: its own trainers, its own collated batches, the same weights; value and gradient.

TRL's side runs its fused head through `compute_loss`; ours is a plain forward of a copy of the model and `losses`.
The policy differs from the reference, else every log-ratio were zero and most formulas alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from align_kit.losses import (
    BATCH_COUPLED,
    DPO_LOSSES,
    F_DIVERGENCES,
    LANGUAGE_LOSSES,
    Pairs,
    PreferenceOutput,
    dpo_loss,
    log_sum_sq_probs,
    preference_metrics,
)
from align_kit.losses.pairwise import TAKES_DIVERGENCE

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RELATIVE = 1e-5
WORDS = [f"w{i}" for i in range(60)]
TRL_CANNOT_WEIGH = BATCH_COUPLED.keys() | {"hinge"}  # see the tests of what stock TRL gets wrong
DEFAULTS: dict[str, Any] = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "beta": 0.1,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "ld_alpha": None,
    "use_weighting": False,
}


def cases() -> Iterator[dict[str, Any]]:
    """Every loss under every option that it takes, and mixtures."""
    for name in DPO_LOSSES:
        base = {"loss_type": [name], "label_smoothing": 0.1}  # exo_pair needs some, and most ignore it
        yield base
        yield base | {"beta": 0.5, "label_smoothing": 0.3}
        yield base | {"ld_alpha": 0.3}
        if name not in TRL_CANNOT_WEIGH:
            yield base | {"use_weighting": True, "ld_alpha": 0.0}
        if name in TAKES_DIVERGENCE:
            yield from (base | {"f_divergence_type": divergence} for divergence in F_DIVERGENCES)
    for alpha in (-0.5, 0.0, 1.0, 1.0000001, 2.0):
        yield {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    yield {"loss_type": ["discopop"], "discopop_tau": 1.5, "beta": 1.0}
    yield {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}  # MPO
    yield {"loss_type": ["sigmoid", "ipo"], "use_weighting": True}
    yield {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.05], "f_divergence_type": "js_divergence"}


def name_of(case: dict[str, Any]) -> str:
    return "-".join("+".join(map(str, v)) if isinstance(v, list) else f"{k}={v}" for k, v in case.items())


# ---- stock TRL


@pytest.fixture(scope="module", autouse=True)
def no_telemetry() -> Iterator[None]:
    """TRL reports home when a trainer is built; `CI` stops it when called, the others when the hub is imported."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("CI", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
            patch.setenv(variable, "1")
        yield


def tiny_model(seed: int) -> nn.Module:
    """A random two-layer Llama, drawn so wide that two seeds disagree by nats on a completion, and no wider.

    The exponentials of a divergence turn fp32's rounding of a log-ratio, which grows with it, into relative error.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.08,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<none>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sentences(count: int, *, seed: int, most: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(60, (n,), generator=generator).tolist()) for n in lengths]


def common_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 6,
        "max_length": None,
        "activation_checkpointing": False,
    }


@pytest.fixture(scope="module")
def preference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor], nn.Module, nn.Module]:
    """A stock DPO trainer, one batch of its own, and unpatched copies of its policy and its reference."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    columns = {"prompt": (1, 5), "chosen": (2, 9), "rejected": (3, 12)}
    rows = {name: sentences(6, seed=seed, most=most) for name, (seed, most) in columns.items()}
    for side in ("chosen", "rejected"):
        rows[side] = [" " + text for text in rows[side]]
    policy, reference = tiny_model(0), tiny_model(1)
    copies = copy.deepcopy(policy), copy.deepcopy(reference)
    # use_weighting at construction, because it decides what TRL's fused head returns; the tests switch it
    arguments = DPOConfig(**common_arguments(tmp_path_factory.mktemp("dpo")), use_weighting=True)
    trainer = DPOTrainer(
        policy, reference, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer()
    )
    return trainer, next(iter(trainer.get_train_dataloader())), *copies


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor], nn.Module]:
    """A stock SFT trainer, one batch of its own, and an unpatched copy of its model."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = {"prompt": sentences(6, seed=5, most=5), "completion": [" " + s for s in sentences(6, seed=6, most=9)]}
    model = tiny_model(2)
    duplicate = copy.deepcopy(model)
    arguments = SFTConfig(**common_arguments(tmp_path_factory.mktemp("sft")))
    trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer())
    return trainer, next(iter(trainer.get_train_dataloader())), duplicate


def set_options(trainer: Any, options: dict[str, Any]) -> None:
    """Switch what TRL's `_compute_loss` reads; it keeps its options as attributes, and one in `args`."""
    values = dict(options)
    trainer.args.discopop_tau = values.pop("discopop_tau")
    trainer.loss_types = values.pop("loss_type")
    trainer.loss_weights = values.pop("loss_weights") or [1.0] * len(trainer.loss_types)
    for name, value in values.items():
        assert hasattr(trainer, name)
        setattr(trainer, name, value)


# ---- ours


def plain_logps(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of each next token (B, T - 1) and the logits it came from."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["input_ids"][:, 1:, None]
    return logits.log_softmax(-1).gather(-1, targets).squeeze(-1), logits


def our_dpo(policy: nn.Module, reference: nn.Module, batch: dict[str, Tensor], **options: Any) -> PreferenceOutput:
    logps, logits = plain_logps(policy, batch)
    with torch.no_grad():
        reference_logps, _ = plain_logps(reference, batch)
    mask = batch["completion_mask"][:, 1:]
    halves = [side for tensor in (logps, reference_logps, mask) for side in tensor.chunk(2)]  # [chosen; rejected]
    return dpo_loss(Pairs(*halves, *log_sum_sq_probs(logits).chunk(2)), **options)


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def assert_same(loss: Tensor, grad: Tensor, stock_loss: Tensor, stock_grad: Tensor) -> None:
    assert stock_loss.isfinite() and stock_grad.norm() > 0, "a case that cannot fail proves nothing"
    assert loss.item() == pytest.approx(stock_loss.item(), rel=RELATIVE)
    assert (grad - stock_grad).norm() / stock_grad.norm() < RELATIVE


# ---- the comparison


def test_policy_and_reference_disagree_and_lengths_differ(preference: Any) -> None:
    _, batch, policy, reference = preference
    output = our_dpo(policy, reference, batch, beta=1.0)
    rewards = torch.cat([output.chosen_rewards_B, output.rejected_rewards_B])
    assert (rewards.abs() > 0.1).all() and rewards.min() < 0 < rewards.max()
    assert len(set(batch["completion_mask"].sum(dim=1).tolist())) > 4


def test_the_tables_hold_all_that_trl_knows(preference: Any) -> None:
    trainer, batch, *_ = preference
    for options in ({"loss_type": ["?"]}, {"f_divergence_type": "?"}):
        set_options(trainer, DEFAULTS | options)
        with pytest.raises(ValueError, match="Unknown") as stock:
            trainer.compute_loss(trainer.model, batch)
        if "loss_type" in options:
            listed = str(stock.value).partition("one of ")[2]
            assert set(listed.strip("[]").replace("'", "").split(", ")) == DPO_LOSSES.keys()


@pytest.mark.parametrize("case", [pytest.param(case, id=name_of(case)) for case in cases()])
def test_dpo_loss_and_gradient_are_those_of_trl(preference: Any, case: dict[str, Any]) -> None:
    trainer, batch, policy, reference = preference
    options = DEFAULTS | case
    set_options(trainer, options)
    stock_loss = trainer.compute_loss(trainer.model, batch)
    stock_grad = gradient(stock_loss, trainer.model)
    loss = our_dpo(policy, reference, batch, **options).loss_B.mean()
    assert_same(loss, gradient(loss, policy), stock_loss, stock_grad)


@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "ld_alpha": 0.3}, {"f_divergence_type": "forward_kl"}])
def test_metrics_are_those_of_trl(preference: Any, options: dict[str, Any]) -> None:
    trainer, batch, policy, reference = preference
    set_options(trainer, DEFAULTS | options)
    trainer._metrics["train"].clear()
    trainer.compute_loss(trainer.model, batch)
    for name, tally in preference_metrics(our_dpo(policy, reference, batch, **options)).items():
        (stock,) = trainer._metrics["train"][name]
        assert tally.mean.item() == pytest.approx(stock, rel=RELATIVE), name


@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("name", ["nll", "dft"])
def test_language_loss_and_gradient_are_those_of_trl(language: Any, name: str, items: int | None) -> None:
    trainer, batch, model = language
    trainer.args.loss_type = name
    count = None if items is None else torch.tensor(items)
    stock_loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
    stock_grad = gradient(stock_loss, trainer.model)
    logps, _ = plain_logps(model, batch)
    tally = LANGUAGE_LOSSES[name](logps, batch["labels"][:, 1:] != -100)
    loss = tally.mean if items is None else tally.total / items
    assert 0 < tally.items < logps.numel()  # the prompt and the padding are masked
    assert_same(loss, gradient(loss, model), stock_loss, stock_grad)


def test_language_table_holds_all_that_trl_knows() -> None:
    from dataclasses import fields

    from trl import SFTConfig

    (field,) = [field for field in fields(SFTConfig) if field.name == "loss_type"]
    assert set(field.metadata["choices"]) == LANGUAGE_LOSSES.keys()


# ---- what stock TRL gets wrong, and why ours differs there; a release that mends it fails here


def test_trl_cannot_weigh_sft_which_is_refused(preference: Any) -> None:
    trainer, batch, *_ = preference
    set_options(trainer, DEFAULTS | {"loss_type": ["sft"], "use_weighting": True})
    with pytest.raises(RuntimeError, match="single memory location"):
        trainer.compute_loss(trainer.model, batch)


def test_trl_cannot_differentiate_weighed_hinge_which_ours_can(preference: Any) -> None:
    trainer, batch, policy, reference = preference
    options = DEFAULTS | {"loss_type": ["hinge"], "use_weighting": True}
    set_options(trainer, options)
    stock_loss = trainer.compute_loss(trainer.model, batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(stock_loss, trainer.model)
    loss = our_dpo(policy, reference, batch, **options).loss_B.mean()
    assert loss.item() == pytest.approx(stock_loss.item(), rel=RELATIVE)
    assert gradient(loss, policy).norm() > 0


def test_trl_discopop_is_nan_at_a_large_wrong_margin_and_ours_is_not(preference: Any) -> None:
    trainer, batch, policy, reference = preference
    options = DEFAULTS | {"loss_type": ["discopop"], "beta": 50.0}
    set_options(trainer, options)
    assert trainer.compute_loss(trainer.model, batch).isnan()
    loss = our_dpo(policy, reference, batch, **options).loss_B.mean()
    assert loss.isfinite() and gradient(loss, policy).isfinite().all()
