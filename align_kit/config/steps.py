"""Steps as people list them: `17,18` or `120-180`."""

from __future__ import annotations

from align_kit.errors import UserError


def parse_steps(text: str) -> frozenset[int]:
    """Return the steps that `17,18` or `120-180,300` name; step 1 is the first.

    Raises `UserError` where it names none, or runs backwards.
    """
    found: set[int] = set()
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        numbers = [word.strip() for word in (first, last if dash else first)]
        if not all(word.isdigit() for word in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
            raise UserError(f"skip_steps {str(text)!r}: {part.strip()!r} names no steps; write 17,18 or 120-180")
        found.update(range(int(numbers[0]), int(numbers[1]) + 1))
    return frozenset(found)
