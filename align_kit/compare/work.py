"""What is measured on a finished model, in a process of its own: answers, forgetting, update, merged adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from align_kit import cards, run_folder
from align_kit.compare.judges import Problems, Text
from align_kit.models import generate, load, lora, quantised, source

ANSWER_TOKENS = 48
MATRICES = 32  # of a model whose update's rank is taken: all of a small one, some of every depth of a large one
PROBE_ROWS, PROBE_TOKENS = 8, 64


@dataclass(frozen=True)
class Task:
    """A model to measure: its folder, the model it started from (`None` for the start itself), what it is judged by."""

    folder: Path
    start: Path | None
    problems: Problems | None
    texts: tuple[Text, ...]
    threads: int


def work(task: Task) -> dict[str, Any]:
    """Return what was found: "exact" by problem, "texts" (nats a token by name), "update", "merge_gap"."""
    torch.set_num_threads(task.threads)
    where = source.resolve(str(task.folder))
    found: dict[str, Any] = {"digest": source.digest(where)}
    if where.head == "lm":
        model, tokenizer = generate.open_model(task.folder)
        if task.problems is not None:
            found["exact"] = answers(model, tokenizer, task.problems)
        found["texts"] = {text.name: text_loss(model, text) for text in task.texts}
    elif task.start is not None:
        model = _scorer(task.folder)
    if task.start is not None:
        before = generate.open_model(task.start)[0] if where.head == "lm" else _scorer(task.start)
        found["update"] = update(model, before)
    if where.is_adapter:
        found["merge_gap"] = merge_gap(where, task)
    return found


def _scorer(folder: Path) -> nn.Module:
    """Return the model of `folder` as one that scores, as a language model starts in a reward phase."""
    return load.load_policy(source.resolve(str(folder)), dtype=torch.float32, seed=0, head="score").eval()


@torch.inference_mode()
def text_loss(model: Any, text: Text, *, batch_size: int = 32) -> float:
    """Return the mean loss of a model on rows of text, in nats a token."""
    total, count = 0.0, 0
    for at in range(0, len(text.rows), batch_size):
        ids_BT = torch.tensor(text.rows[at : at + batch_size], device=model.device)
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"))
        count += ids_BT[:, 1:].numel()
    return total / count


def answers(model: Any, tokenizer: Any, asked: Problems) -> list[float]:
    """Return for each problem whether the model's greedy answer is right: 1 or 0."""
    check = cards.checker(cards.load_card(asked.card))
    given = generate.complete(model, tokenizer, asked.prompts, max_new_tokens=ANSWER_TOKENS)
    return [
        float(check(prompt, texts[0], answer).exact)
        for prompt, texts, answer in zip(asked.prompts, given, asked.answers, strict=True)
    ]


# --- the update -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def update(after: nn.Module, before: nn.Module) -> dict[str, float]:
    """Return how large and of what rank the change of the matrices is, merged where an adapter made it.

    "relative" is the Frobenius norm of the change over that of the weights; "stable_rank" is |D|_F^2 / |D|_2^2 and
    "effective_rank" exp of the entropy of D's singular values (Roy and Vetterli 2007), both means over matrices;
    "matrices" is how many. Embeddings and heads are left out: an adapter leaves them alone.
    """
    pairs = list(_spread(list(_matrices(after, before))))
    changed, weights, ranks = 0.0, 0.0, []
    for new, old in pairs:
        difference = (new.float() - old.float()).double().cpu()
        changed, weights = changed + float(difference.square().sum()), weights + float(old.double().square().sum())
        if difference.any():
            ranks.append(rank_of(difference))
    stable, effective = (sum(column) / len(ranks) for column in zip(*ranks, strict=True)) if ranks else (0.0, 0.0)
    relative = math.sqrt(changed / weights)
    return {"relative": relative, "stable_rank": stable, "effective_rank": effective, "matrices": len(pairs)}


def rank_of(difference: Tensor) -> tuple[float, float]:
    """Return the stable and the effective rank of a matrix."""
    small = difference @ difference.T if difference.shape[0] < difference.shape[1] else difference.T @ difference
    energies = torch.linalg.eigvalsh(small).clamp_min(0)  # squared singular values
    stable = float(energies.sum() / energies.max())
    shares = energies.sqrt() / energies.sqrt().sum()
    return stable, math.exp(float(torch.special.entr(shares).sum()))


def _matrices(after: nn.Module, before: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each trained matrix with what it was, but for embeddings and the head."""
    old = dict(before.named_parameters())
    ends = [module.weight for module in after.modules() if isinstance(module, nn.Embedding)]
    head = after.get_output_embeddings()  # type: ignore[operator]
    left_out = {id(weight) for weight in [*ends, *([head.weight] if head is not None else [])]}
    for name, new in after.named_parameters():
        if id(new) in left_out or name not in old or min(new.shape, default=1) == 1:
            continue
        if new.dim() == 2:
            yield new, old[name]
        elif new.dim() == 3:  # experts, stacked
            yield from zip(new, old[name], strict=True)


def _spread(pairs: Sequence[Any]) -> Sequence[Any]:
    """Return at most `MATRICES` of them, evenly spread."""
    if len(pairs) <= MATRICES:
        return pairs
    return [pairs[round(place * (len(pairs) - 1) / (MATRICES - 1))] for place in range(MATRICES)]


# --- the merged adapter ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def merge_gap(where: source.Source, task: Task) -> dict[str, float]:
    """Return the greatest difference of a logit between base + adapter and the model merged in fp32.

    "largest" in logits, "spread" the standard deviation of the logits it is to be seen against. A base that was
    in 4 bits in training is so here; what the adapter is merged into is in fp32 always.
    """
    words = load.load_tokenizer(where)
    options = {"dtype": torch.float32, "seed": 0, "head": where.head, "pad_token_id": words.pad_token_id}
    base = load.load_policy(where.weights, **options, quantised=_quantised(task.folder))
    ids_BT = probe(task, len(words))
    at = next(base.parameters()).device  # bitsandbytes puts a base in 4 bits on the accelerator, where there is one
    apart = lora.load_adapter(base, where, head=where.head).to(at).eval()(input_ids=ids_BT.to(at)).logits.float().cpu()
    merged = load.load_policy(where, **options).eval()(input_ids=ids_BT).logits.float()
    return {"largest": float((merged - apart).abs().max()), "spread": float(apart.std())}


def _quantised(folder: Path) -> Any:
    """Return the configuration of a base in fewer bits, where the run in `folder` had one."""
    manifest = run_folder.read_manifest(folder)
    return quantised.settings(SimpleNamespace(**manifest["config"]), torch.float32) if manifest else None


def probe(task: Task, vocabulary: int) -> Tensor:
    """Return a few rows of tokens: text where there is some, else drawn from a seed."""
    if task.texts:
        return torch.tensor([row[:PROBE_TOKENS] for row in task.texts[0].rows[:PROBE_ROWS]])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (PROBE_ROWS, PROBE_TOKENS), generator=generator)
