"""The chunked head gives what the definition gives, in values and gradients, and never holds more than two chunks."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from align_kit.forward import head
from align_kit.forward.head import Answer, Ask, Scaling, read_tokens

P, H, V = 13, 6, 29
PLAIN = Scaling()


class Case(NamedTuple):
    """A head, hidden states before it, the tokens asked about, and weights that make a scalar of the answers."""

    head: nn.Linear
    hidden_PH: Tensor
    targets_P: Tensor
    by_logps_P: Tensor
    by_entropy_P: Tensor


def case(
    *, rows: int = P, bias: bool = False, dtype: torch.dtype = torch.float32, scale: float = 1.0, words: int = V
) -> Case:
    torch.manual_seed(0)
    head = nn.Linear(H, words, bias=bias).to(dtype)
    hidden_PH = (torch.randn(rows, H) * scale).to(dtype).requires_grad_()
    return Case(head, hidden_PH, torch.randint(words, (rows,)), torch.randn(rows), torch.randn(rows))


def definition(
    logits_PV: Tensor, targets_P: Tensor, scaling: Scaling = PLAIN, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log p of the targets, entropy, whether they are most probable, and log of the sum of p squared."""
    z_PV = logits_PV.double() * scaling.factor
    if scaling.cap is not None:
        z_PV = scaling.cap * torch.tanh(z_PV / scaling.cap)
    logp_PV = (z_PV / temperature).log_softmax(-1)
    p_PV = logp_PV.exp()
    entropy_P = -(p_PV * logp_PV.masked_fill(p_PV == 0, 0.0)).sum(-1)
    logps_P = logp_PV[torch.arange(len(targets_P)), targets_P]
    return logps_P, entropy_P, logps_P == logp_PV.amax(-1), p_PV.square().sum(-1).log()


def total(found: Case, logps_P: Tensor, entropy_P: Tensor | None) -> Tensor:
    """Return one number of which every answer's gradient differs."""
    loss = (logps_P * found.by_logps_P.to(logps_P.dtype)).sum()
    return loss if entropy_P is None else loss + (entropy_P * found.by_entropy_P.to(entropy_P.dtype)).sum()


def leaves(found: Case) -> list[Tensor]:
    return [found.hidden_PH, *found.head.parameters()]


def expected(found: Case, scaling: Scaling = PLAIN, temperature: float = 1.0, entropy: bool = True) -> Any:
    """Return the definition's values, and its gradients by autograd, in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves(found)]
    logits_PV = nn.functional.linear(*wide)
    values = definition(logits_PV, found.targets_P, scaling, temperature)
    loss = total(found, values[0], values[1] if entropy else None)
    return values, torch.autograd.grad(loss, wide)


def assert_as_defined(
    found: Case, *, chunk: int | None, scaling: Scaling = PLAIN, temperature: float = 1.0, entropy: bool = True,
    rtol: float = 2e-5, atol: float = 2e-5,
) -> Answer:  # fmt: skip
    """Assert values and gradients; a log-softmax over tens of fp32 numbers, and its slope, round to some 1e-6."""
    ask = Ask(found.targets_P, temperature=temperature, entropy=entropy, log_sum_sq=True)
    answer = read_tokens(found.head, found.hidden_PH, ask, scaling, chunk)
    (logps_P, entropy_P, top1_P, squares_P), theirs = expected(found, scaling, temperature, entropy)
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(answer.logps_P.double(), logps_P, **close)
    assert answer.log_sum_sq_P is not None and (answer.entropy_P is not None) == entropy
    torch.testing.assert_close(answer.log_sum_sq_P.double(), squares_P, **close)
    if answer.entropy_P is not None:
        torch.testing.assert_close(answer.entropy_P.double(), entropy_P, **close)
    assert torch.equal(answer.top1_P, top1_P)
    ours = torch.autograd.grad(total(found, answer.logps_P, answer.entropy_P), leaves(found))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == found.head.weight.dtype
        torch.testing.assert_close(mine.double(), other, **close)
    return answer


CHUNKS = {"1 row": V, "less than a row": 1, "3 rows": 3 * V + 2, "all but 1": (P - 1) * V, "all": P * V, "more": None}


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_chunks_of_any_size(chunk: int | None, bias: bool, entropy: bool) -> None:
    assert_as_defined(case(bias=bias), chunk=chunk, entropy=entropy)


SCALINGS = {
    "factor": Scaling(factor=0.3),
    "cap": Scaling(cap=1.7),
    "factor and cap": Scaling(factor=2.5, cap=1.1),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("entropy", [False, True])
def test_scaled_capped_and_tempered(scaling: Scaling, temperature: float, entropy: bool) -> None:
    found = case(bias=True, scale=2.0)
    assert_as_defined(found, chunk=4 * V, scaling=scaling, temperature=temperature, entropy=entropy)


@settings(max_examples=60)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 400), st.booleans(), st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([None, 0.9]), st.sampled_from([0.2, 1.0, 4.0]),
)  # fmt: skip
def test_any_head(
    rows: int, vocabulary: int, chunk: int, bias: bool, factor: float, cap: float | None, temperature: float
) -> None:
    """A vocabulary of one word too, whose log-probability is 0 and entropy nothing.

    What logits are multiplied by, their rounding is, and the slope of probabilities once more.
    """
    found, times = case(rows=rows, words=vocabulary, bias=bias), max(1.0, factor / temperature)
    how: Any = {"scaling": Scaling(factor, cap), "temperature": temperature, "atol": 1e-5 * times**2}
    assert_as_defined(found, chunk=chunk, **how)


@pytest.mark.parametrize("scaling", [PLAIN, Scaling(0.4, 1.7)], ids=["plain", "scaled"])
def test_a_head_of_another_kind_is_called_as_it_is(scaling: Scaling) -> None:
    """As one that an adapter stands in: the same answers, by autograd."""
    found = case(bias=True)

    class Adapted(nn.Linear):
        pass

    other = Adapted(H, V)
    other.load_state_dict(found.head.state_dict())
    assert_as_defined(found._replace(head=other), chunk=None, scaling=scaling, temperature=1.4)


# --- extremes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, type("Adapted", (nn.Linear,), {})], ids=["chunked", "whole"])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_give_numbers(kind: type[nn.Linear], size: float) -> None:
    """Logits of +-1e4: probabilities of exactly 0 and 1, log-probabilities of -2e4, and no NaN anywhere."""
    head, hidden_PH = kind(1, 3, bias=False), torch.tensor([[size], [-size], [size]], requires_grad=True)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-1.0], [0.5]]))
    targets_P = torch.tensor([0, 0, 1])
    answer = read_tokens(head, hidden_PH, Ask(targets_P, entropy=True, log_sum_sq=True), PLAIN, 3)
    assert answer.logps_P.tolist() == [0.0, -2 * size, -2 * size]
    assert answer.entropy_P is not None and answer.entropy_P.tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert answer.log_sum_sq_P is not None and answer.log_sum_sq_P.tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    (answer.logps_P.sum() + answer.entropy_P.sum()).backward()
    assert hidden_PH.grad is not None and head.weight.grad is not None
    assert hidden_PH.grad.flatten().tolist() == pytest.approx([0.0, 2.0, -2.0], abs=1e-6)
    assert head.weight.grad.isfinite().all()


def test_words_that_cannot_be() -> None:
    """A bias of minus infinity forbids a word: it counts neither for the entropy nor for any gradient."""
    found = case(bias=True)
    with torch.no_grad():
        found.head.bias[3] = -1e30
    targets_P = found.targets_P.masked_fill(found.targets_P == 3, 4)
    assert_as_defined(found._replace(targets_P=targets_P), chunk=2 * V)


@pytest.mark.parametrize("entropy", [False, True])
def test_nothing_predicted_is_a_gradient_of_zero(entropy: bool) -> None:
    """Not none at all: under ZeRO-3 every rank must have a gradient for every parameter."""
    found = case(rows=0, bias=True)
    answer = read_tokens(found.head, found.hidden_PH, Ask(found.targets_P, entropy=entropy), PLAIN)
    assert answer.logps_P.shape == answer.top1_P.shape == (0,)
    total(found, answer.logps_P, answer.entropy_P).backward()
    assert found.hidden_PH.grad is not None and found.hidden_PH.grad.shape == (0, H)
    for parameter in found.head.parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_of_equals_the_first_is_most_probable() -> None:
    """As for argmax, by which padded logits are read: a head of zeros finds every word equally probable."""
    head = nn.Linear(H, V, bias=False)
    nn.init.zeros_(head.weight)
    answer = read_tokens(head, torch.randn(4, H), Ask(torch.arange(4)), PLAIN)
    assert answer.top1_P.tolist() == [True, False, False, False]
    torch.testing.assert_close(answer.logps_P, torch.full((4,), -torch.tensor(float(V)).log().item()))


# --- what is trained, what is not -----------------------------------------------------------------------------


def test_a_frozen_head_has_no_gradient() -> None:
    """Under LoRA: the adapter below gets the same gradient, the head none, and none is computed for it."""
    found = case(bias=True)
    _, (into_hidden, *_) = expected(found)
    found.head.requires_grad_(False)
    answer = read_tokens(found.head, found.hidden_PH, Ask(found.targets_P, entropy=True), PLAIN, 3 * V)
    total(found, answer.logps_P, answer.entropy_P).backward()
    assert all(parameter.grad is None for parameter in found.head.parameters())
    assert found.hidden_PH.grad is not None
    torch.testing.assert_close(found.hidden_PH.grad.double(), into_hidden, rtol=1e-5, atol=1e-5)


def test_hidden_states_without_gradient_train_the_head_alone() -> None:
    found = case(bias=True)
    _, (_, into_weight, into_bias) = expected(found, entropy=False)
    answer = read_tokens(found.head, found.hidden_PH.detach(), Ask(found.targets_P), PLAIN, 3 * V)
    total(found, answer.logps_P, None).backward()
    assert found.head.weight.grad is not None and found.head.bias.grad is not None
    torch.testing.assert_close(found.head.weight.grad.double(), into_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.head.bias.grad.double(), into_bias, rtol=1e-5, atol=1e-5)


def test_without_gradients_nothing_is_kept() -> None:
    found = case()
    with torch.no_grad():
        answer = read_tokens(found.head, found.hidden_PH, Ask(found.targets_P), PLAIN, 3 * V)
    assert answer.logps_P.grad_fn is None and not answer.logps_P.requires_grad


def test_a_gradient_taken_twice_is_the_same() -> None:
    """The last chunk's logits are kept for the first backward only; the second computes them again."""
    found = case(bias=True)
    answer = read_tokens(found.head, found.hidden_PH, Ask(found.targets_P, entropy=True), PLAIN, 3 * V)
    loss = total(found, answer.logps_P, answer.entropy_P)
    first = torch.autograd.grad(loss, leaves(found), retain_graph=True)
    second = torch.autograd.grad(loss, leaves(found))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    """It would be wrong: the first one is computed in place."""
    found = case()
    answer = read_tokens(found.head, found.hidden_PH, Ask(found.targets_P), PLAIN, 3 * V)
    (into_hidden,) = torch.autograd.grad(answer.logps_P.sum(), [found.hidden_PH], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        into_hidden.square().sum().backward()


def test_bf16_is_within_its_own_noise() -> None:
    """Logits are rounded to 8 bits by the product, as plain transformers has them; all else is fp32.

    So values are as far from float64 as those of rounded logits, and gradients as those of a bf16 linear layer.
    """
    found = case(rows=64, bias=True, dtype=torch.bfloat16, scale=2.0)
    ask = Ask(found.targets_P, entropy=True, log_sum_sq=True)
    answer = read_tokens(found.head, found.hidden_PH, ask, PLAIN, 5 * V)
    rounded = definition(found.head(found.hidden_PH), found.targets_P)
    assert answer.logps_P.dtype == torch.float32
    assert answer.entropy_P is not None and answer.log_sum_sq_P is not None
    for mine, other in zip((answer.logps_P, answer.entropy_P, answer.log_sum_sq_P), (0, 1, 3), strict=True):
        torch.testing.assert_close(mine.double(), rounded[other], rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(total(found, answer.logps_P, answer.entropy_P), leaves(found))
    plain = torch.autograd.grad(total(found, rounded[0], rounded[1]), leaves(found))
    _, exact = expected(found)
    for mine, other, truth in zip(ours, plain, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - truth).norm() <= 1.5 * (other.double() - truth).norm() + 1e-3 * truth.norm()


# --- memory ---------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes alive in storages of at least `least` bytes that operations made."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.alive, self.most = least, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.watch(tensor.untyped_storage())
        return out

    def watch(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if size < self.least or address in self.known:
            return
        self.known.add(address)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("scaling", [PLAIN, Scaling(0.5, 2.0)], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_more_than_two_chunks_of_logits(scaling: Scaling, entropy: bool, dtype: torch.dtype) -> None:
    """Forward and backward over 10 chunks: beside the logits of one there is at most one thing of its size.

    A soft-cap's slope beside the entropy's is a third. In bf16 what the product gives is half a chunk more.
    """
    rows, vocabulary, chunk = 160, 500, 16
    found = case(rows=rows, words=vocabulary, dtype=dtype)
    size = chunk * vocabulary * 4
    rounded = 0 if dtype == torch.float32 else size // 2
    with Peak(least=size // 2 if rounded else size) as peak:
        ask = Ask(found.targets_P, entropy=entropy, log_sum_sq=entropy, temperature=1.3)
        answer = read_tokens(found.head, found.hidden_PH, ask, scaling, chunk * vocabulary)
        forward, kept = peak.most, peak.alive
        total(found, answer.logps_P, answer.entropy_P).backward()
    assert size <= forward <= 2 * size + rounded and kept <= size
    assert peak.most <= (2 + (entropy and scaling.cap is not None)) * size + rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_is_gone_before_the_next_comes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a row at a time, as a CPU does with a large vocabulary, nothing of a chunk's size is there beside it.

    But for what the product gives in bf16, and for what that is narrowed to again in the backward.
    """
    rows, vocabulary, chunk = 160, 500, 16
    monkeypatch.setattr(head, "NEAR", vocabulary)
    found = case(rows=rows, words=vocabulary, dtype=dtype)
    size = chunk * vocabulary * 4
    rounded = 0 if dtype == torch.float32 else size // 2
    with Peak(least=size // 2) as peak:
        answer = read_tokens(found.head, found.hidden_PH, Ask(found.targets_P), PLAIN, chunk * vocabulary)
        assert peak.most == size + rounded and peak.alive == size
        total(found, answer.logps_P, None).backward()
    assert peak.most == size + rounded
