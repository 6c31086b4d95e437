"""What a completion is, and how it is drawn; without the imports that drawing takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn: `samples` of each prompt, at most `length` tokens each; temperature 0 is greedy.

    `top_k` (0: all tokens) and `top_p` (Holtzman et al. 2020; 1: all) cut the distribution after the temperature.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    length: int = 64
    seed: int = 0


class Completion(NamedTuple):
    """One completion: its text, how many tokens it took, whether it came to an end, whether it spells a control token.

    The text is what follows the prompt up to the token that ends it, special tokens included.
    """

    text: str
    tokens: int
    ended: bool
    control: bool = False
