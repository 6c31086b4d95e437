"""How fast `align-kit data clean` is, by the side of what others offer, and how it grows with the rows.

    OMP_NUM_THREADS=1 python -m benchmarks.clean_speed [--documents 10000] [--growth 10000 300000] [--rounds 3]
        [--datasketch-python P] [--datatrove-python P]

Documents of about a hundred words are put together of sentences of real text, the folder of real data where there is
one, else CPython's documentation; one in ten is a near copy of an earlier one, one in fifty an exact copy. All arms
read the same file, one process each, and what counts is their processor time, start and imports left out:

    clean       the whole default chain, from the file to the written set
    datasketch  MinHash signatures and LSH of the same 5-word runs, and no more (its own loop, no filters)
    datatrove   its Gopher, C4 and FineWeb filters and its MinHash signatures, with its own readers and no writer

A baseline that this python lacks is run by the python named for it, and said to be absent otherwise. Growth is that of
time and of the peak of memory of the cleaning process, from the first to the last number of rows, as ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORDS = 100  # of a document, about
NEAR, EXACT = 0.10, 0.02  # shares of copies
CHANGED = 0.02  # of the words of a near copy
RATE = 2000  # documents a second and core that the whole chain is to reach
ARMS = ("clean", "datasketch", "datatrove")


# --- the documents ------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """Return the sentences of real text that documents are made of."""
    home = Path(os.environ.get("ALIGN_KIT_DATA") or ROOT.parent / "shared" / "data")
    file = home / "llamafactory_pretrain" / "c4_demo.jsonl"
    if file.is_file():
        texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    else:
        from align_kit.data import embedded

        texts = [row["text"] for row in embedded.rows("cpython_docs", "train")]
    found = (part.strip() for text in texts for part in re.split(r"(?<=[.!?])\s+|\n", text))
    return list(dict.fromkeys(part for part in found if 5 <= len(part.split()) <= 40))


def documents(number: int, seed: int = 0) -> Iterator[str]:
    """Yield documents of about a hundred words, copies among them."""
    drawn, pool, recent = random.Random(seed), sentences(), [""]
    for _ in range(number):
        kind = drawn.random()
        if kind < EXACT + NEAR and len(recent) > 100:
            words = recent[drawn.randrange(1, len(recent))].split(" ")
            if kind >= EXACT:
                words = [drawn.choice(words) if drawn.random() < CHANGED else word for word in words]
            yield " ".join(words)
            continue
        text = ""
        while text.count(" ") < WORDS - 10:
            text += drawn.choice(pool) + drawn.choice((" ", "\n"))
        recent.append(text.strip())
        del recent[1 : len(recent) - 5000]
        yield recent[-1]


def write_documents(file: Path, number: int) -> None:
    """Write documents as JSON lines."""
    with file.open("w", encoding="utf-8") as stream:
        for text in documents(number):
            stream.write(json.dumps({"text": text}) + "\n")


# --- the arms: each in a process of its own, which prints its seconds of processor time as JSON -------------------

SOURCES = {
    "clean": """
import contextlib, io, json, resource, sys, time
from pathlib import Path
import numpy, yaml, xxhash, pydantic
from align_kit.clean import command, chain, cleaning
began = time.process_time()
with contextlib.redirect_stdout(io.StringIO()) as said:
    command.clean([sys.argv[1], "--output", sys.argv[2], "--workers", "1"])
seconds = time.process_time() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "said": said.getvalue()}))
""",
    "datasketch": """
import json, re, sys, time
from datasketch import MinHash, MinHashLSH
began = time.process_time()
index, kept = MinHashLSH(threshold=0.8, num_perm=128), 0
for number, line in enumerate(open(sys.argv[1], encoding="utf-8")):
    words = re.findall(r"\\w+", json.loads(line)["text"].lower())
    signature = MinHash(num_perm=128)
    signature.update_batch([" ".join(run).encode() for run in zip(*(words[place:] for place in range(5)))])
    if not index.query(signature):
        index.insert(number, signature)
        kept += 1
print(json.dumps({"seconds": time.process_time() - began, "said": f"{kept} rows kept"}))
""",
    "datatrove": """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters import (C4QualityFilter, FineWebQualityFilter, GopherQualityFilter,
                                        GopherRepetitionFilter)
filters = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False),
           FineWebQualityFilter()]
signature = MinhashDedupSignature("unused", config=MinhashConfig(n_grams=5))
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
for step in filters:  # models of words are loaded with the first text
    step.filter(Document(texts[0], "0"))
began, kept = time.process_time(), 0
for number, line in enumerate(open(sys.argv[1], encoding="utf-8")):
    document = Document(json.loads(line)["text"], str(number))
    if all(step.filter(document) is True for step in filters):
        shingles = signature.get_shingles(document.text)
        if shingles.size:
            signature.get_signature(shingles)
            kept += 1
print(json.dumps({"seconds": time.process_time() - began, "said": f"{kept} rows signed"}))
""",
}


def timed(arm: str, file: Path, python: str, scratch: Path) -> dict[str, Any] | str:
    """Return what one run of an arm measured, or why it could not run."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        words = [python, "-c", SOURCES[arm], str(file), f"{folder}/out"]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=alone)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no word"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(asked: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Print documents a second of each arm and their ratios; return the medians by arm."""
    file = scratch / "documents.jsonl"
    write_documents(file, asked.documents)
    pythons = {"clean": sys.executable, "datasketch": asked.datasketch_python, "datatrove": asked.datatrove_python}
    rates: dict[str, list[float]] = {}
    for number in range(asked.rounds):
        for arm in ARMS:  # arms take turns, so that a busy machine is busy for all
            found = timed(arm, file, pythons[arm], scratch)
            if isinstance(found, str):
                if not number:
                    print(f"{arm}: not measured ({found}); name a python that has it with --{arm}-python")
                continue
            rates.setdefault(arm, []).append(asked.documents / found["seconds"])
            if not number:
                print(f"{arm}: {found['said'].strip()}")
    medians = {arm: statistics.median(values) for arm, values in rates.items()}
    for arm, rate in medians.items():
        spread = f"{min(rates[arm]):,.0f} to {max(rates[arm]):,.0f}"
        ratio = "" if arm == "clean" else f"; clean does {medians['clean'] / rate:.2f} times as many"
        print(f"{arm:<10} {rate:8,.0f} documents/s/core ({spread}){ratio}")
    reached = "reached" if medians["clean"] >= RATE else "NOT reached"
    print(f"asked for: {RATE:,} documents/s/core, {reached}: {medians['clean'] / RATE:.2f} times that")
    return medians


def grown(numbers: list[int], scratch: Path) -> dict[str, float]:
    """Print how time and memory grow with the rows; return the ratios of the last to the first."""
    runs = []
    for number in numbers:
        file = scratch / f"{number}.jsonl"
        write_documents(file, number)
        found = timed("clean", file, sys.executable, scratch)
        if isinstance(found, str):
            raise SystemExit(f"clean: {found}")
        runs.append(found)
        print(f"{number:,} rows: {found['seconds']:.1f} s of processor time, peak {found['peak'] / 2**20:,.0f} MiB, "
              f"file {file.stat().st_size / 2**20:,.0f} MiB")  # fmt: skip
        file.unlink()
    ratios = {what: runs[-1][what] / runs[0][what] for what in ("seconds", "peak")}
    rows = numbers[-1] / numbers[0]
    each = (runs[-1]["peak"] - runs[0]["peak"]) / (numbers[-1] - numbers[0])
    print(f"{rows:.0f} times the rows take {ratios['seconds']:.1f} times the time and {ratios['peak']:.2f} times the "
          f"memory, {each:,.0f} bytes more for each row more")  # fmt: skip
    return ratios


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--growth", type=int, nargs="*", default=[], metavar="ROWS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datasketch-python", default=sys.executable)
    parser.add_argument("--datatrove-python", default=sys.executable)
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if asked.documents:
            compared(asked, Path(folder))
        if asked.growth:
            grown(asked.growth, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
