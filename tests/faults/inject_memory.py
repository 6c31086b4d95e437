"""The process that flips bits in another's memory: reads JSON lines, answers each. Only the standard library.

    python -m tests.faults.inject_memory <pid>

`{"seed": n}` begins, `{"regions": [[address, bytes], …]}` flips one random bit in one of them (a larger region is hit
more often), `{"undo": true}` flips it back.
"""

from __future__ import annotations

import json
import os
import random
import sys


def flip(memory: int, address: int, bit: int) -> None:
    """Change one bit of the process whose memory is open."""
    byte = os.pread(memory, 1, address)[0]
    os.pwrite(memory, bytes([byte ^ 1 << bit]), address)


def main() -> None:
    """Do what each line asks until there are no more."""
    draw, last = random.Random(), (0, 0)
    memory = os.open(f"/proc/{sys.argv[1]}/mem", os.O_RDWR)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = {}
        try:
            if "seed" in asked:
                draw = random.Random(asked["seed"])
            elif "regions" in asked:
                address, size = draw.choices(asked["regions"], [size for _, size in asked["regions"]])[0]
                last = address + draw.randrange(size), draw.randrange(8)
                flip(memory, *last)
            else:
                flip(memory, *last)
        except OSError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
