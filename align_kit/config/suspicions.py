"""What is suspicious about data that can be read: in words, what to do about it, and from which share it is an error.

A name is a key of `data_limits`: `--data_limits '{"dropped": 0.9}'` moves one limit, 1 switches it off.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suspicion:
    """What a share of the rows is, how to mend it, and the share above which a run is refused (1: never).

    Above `said` it is a warning; a smaller share stands in the header's account of the data alone.
    """

    what: str
    remedy: str
    limit: float = 0.5
    said: float = 0.05


SUSPICIONS: dict[str, Suspicion] = {  # the one that explains others first
    "unrendered": Suspicion(
        "lose what their last message says in the chat template", "give another one in chat_template_path", said=0.0
    ),
    "forgotten": Suspicion(
        "lose a turn's chain of thought in the chat template, so that it is not trained",
        "give one that keeps it in chat_template_path, or let each row end at a turn whose chain is to be learnt",
        limit=1.0,  # models are made to forget: their templates show the chain before the last answer only
        said=0.0,
    ),
    "dropped": Suspicion("are dropped", "raise max_length, or mend the rows"),
    "cut": Suspicion(
        "lose the end of their completion to max_length, and with it where to stop",
        "raise max_length, or leave such rows out",
        limit=0.95,  # long data is cut on purpose; where none of it has its end there is nothing to stop at
        said=0.01,
    ),
    "unended": Suspicion(
        "train no end token, so that the model would not learn to stop",
        "let the chat template end the assistant's turn with the tokenizer's EOS or an end-of-turn token",
        said=0.01,  # at least 99 % of the rows are to end
    ),
    "empty": Suspicion("have an empty completion", "remove them"),
    "identical": Suspicion("have chosen = rejected, from which nothing is learnt", "remove them"),
    "repeated": Suspicion("stand in the data before", "remove them with align-kit data clean", limit=1.0),
    "contradicted": Suspicion(
        "say the opposite of a row before them", "decide which is right, or drop both with align-kit data preferences"
    ),
    "misordered": Suspicion(
        "do not go from a user's turn to an assistant's", "are the roles swapped? mend the rows, or drop them"
    ),
}
