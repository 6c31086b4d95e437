"""What tests of traces share: rows of them, what a chat template makes of one, and what a rank is given to train."""

from __future__ import annotations

import json
from typing import Any

from align_kit.data.render import Renderer
from tests.data_rows import assistant, chat_tokenizer, user
from tests.small import WORDS

Row = dict[str, Any]
SOLUTION = "{reasoning}\n#### {answer}"  # as in gsm8k
MARK = "trained: "
# A chat template that knows no chain of thought.
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def said(draw: int) -> str:
    """Return three words."""
    return " ".join(WORDS[(draw + step) % len(WORDS)] for step in range(3))


TRACES = [{"prompt": f"{said(n)}\n", "reasoning": f"{said(n + 1)} {n}", "answer": f"{n}!"} for n in range(8)]
PAIRS = [
    {"prompt": row["prompt"], "chosen_reasoning": row["reasoning"], "chosen": row["answer"],
     "rejected_reasoning": f"{said(n + 5)} {n}", "rejected": f"{n + 1}?"}
    for n, row in enumerate(TRACES)
]  # fmt: skip
CHATS = [{**row, "prompt": [user(row["prompt"])]} for row in TRACES]


def renderer(template: str) -> Renderer:
    """Return a renderer of a small tokenizer with a chat template."""
    return Renderer(chat_tokenizer(template))


def thought(answer: str, chain: str, name: str = "reasoning_content") -> Row:
    """Return an assistant's message with the chain of thought that led to it."""
    return {**assistant(answer), name: chain}


def answer_of(template: str, message: Row, **row: Any) -> str:
    """Return what a chat template makes of an assistant's message behind a user's."""
    text = renderer(template).rendered([user("hi"), message], row)
    return text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")


def tell_trained(trainer: Any) -> None:
    """Print what the trained tokens of each sequence say whenever a loss is computed of them."""
    compute_loss, tokenizer = trainer.compute_loss, trainer.processing_class

    def told(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for ids, mask in zip(inputs["input_ids"], inputs["loss_mask"], strict=True):
            print(MARK + json.dumps(tokenizer.decode(ids[mask.bool()])), flush=True)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = told


def trained(output: str) -> list[str]:
    """Return what a rank printed of its trained tokens, in order."""
    return [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]
