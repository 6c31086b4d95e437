"""How `tiny/` was made: a Llama of 0.9 million parameters and its tokenizer, trained on the embedded text.

Run `python -m align_kit.data.embedded.tiny_model` to make the folder again; the files come out byte for byte the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from align_kit.data.embedded import TINY, rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 1024
POSITIONS = 512
END, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END, PAD, TURN_START, TURN_END]

# Embeddings are tied: the usual 0.02 starts a model this narrow three times too small, and it learns later for it.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "bos_token_id": None,
    "eos_token_id": SPECIAL.index(END),
    "pad_token_id": SPECIAL.index(PAD),
    "dtype": "float32",
}

# ChatML; tools as JSON in the system turn, calls in <tool_call> tags, results in the tool's own turn. What the
# assistant says, its end of turn included, stands between the generation markers and is trained.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{% endif %}
    {{- '<tools>\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}
    {{- '</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
            {{- '<tool_call>\\n{"name": ' + call.name | tojson + ', "arguments": ' + arguments + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE of 1,024 tokens in which every digit and every newline is a token of its own.

    It is trained on the frozen documentation sample and the problems (train splits), so it does not depend on the
    Python that makes it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\n|\d"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def write(folder: Path = TINY) -> None:
    """Write config, generation config, tokenizer and chat template into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(folder / "config.json", CONFIG)
    ends = [SPECIAL.index(END), SPECIAL.index(TURN_END)]
    _write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": SPECIAL.index(PAD)})
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
    })


def _texts() -> Iterator[str]:
    # Problems repeat themselves: 2,000 are enough to make their words tokens, and leave the rest to the language.
    yield from (row["text"] for row in rows("cpython_docs_sample", "train"))
    yield from (row["prompt"] + row["completion"] for row in rows("sums_sft", "train")[:2000])


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write()
