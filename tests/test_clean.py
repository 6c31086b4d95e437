"""Cleaning as its users see it: what is dropped and why, what is written, and that nothing half-made stays."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align_kit import cards
from align_kit.clean.command import clean, stats
from align_kit.data.load import load
from align_kit.errors import UserError
from tests.namespaces import apart

WORDS = [f"word{number}" for number in range(400)]


def prose(seed: int, words: int = 60) -> str:
    """Return a text of its own that breaks no rule of quality."""
    drawn = random.Random(seed)
    chosen = drawn.sample(WORDS, words)
    return ". ".join(f"The {' '.join(chosen[at : at + 10])} of that" for at in range(0, words, 10)) + "."


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(path: Path, *found: str) -> str:
    return written(path, [{"text": text} for text in found])


def cleaned(folder: Path, *words: str) -> list[dict[str, object]]:
    """Clean as the command line would, and return the rows that were written."""
    assert clean([*words, "--output", str(folder)]) == 0
    return read(folder / "train.jsonl")


def read(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def reasons(folder: Path) -> list[tuple[str, str]]:
    return [(row["reason"], row["rule"]) for row in read(folder / "dropped.jsonl")]


# --- one step at a time -------------------------------------------------------------------------------------------


def test_exact_duplicates_are_whole_rows_and_the_first_is_kept(tmp_path: Path) -> None:
    rows = [
        {"prompt": "How many?", "completion": "Three of them."},
        {"prompt": "How many?", "completion": "Four of them."},  # a prompt shared is no duplicate
        {"prompt": "How  many?", "completion": "Three of\nthem."},  # white space is nothing
        {"prompt": "How many?", "completion": "Three  of them.", "note": "another column"},
    ]
    kept = cleaned(tmp_path / "out", written(tmp_path / "a.jsonl", rows), "--keep-dropped")
    assert kept == rows[:2]
    assert reasons(tmp_path / "out") == [("duplicates", "exact duplicate")] * 2


def test_near_duplicates_need_every_part_alike_and_one_label(tmp_path: Path) -> None:
    prompt, answer = prose(0), prose(1)
    other = answer.replace("word", "Word ", 1)
    rows = [
        {"prompt": prompt, "completion": answer, "label": True},
        {"prompt": prompt, "completion": other, "label": True},  # nearly the same
        {"prompt": prompt, "completion": other, "label": False},  # and yet the opposite
        {"prompt": prompt, "completion": prose(2), "label": True},  # a long prompt shared
    ]
    kept = cleaned(tmp_path / "out", written(tmp_path / "a.jsonl", rows), "--keep-dropped")
    assert [rows.index(row) for row in kept] == [0, 2, 3]
    (dropped,) = read(tmp_path / "out" / "dropped.jsonl")
    assert dropped["rule"] == "near duplicate" and "line 1, Jaccard 0.9" in dropped["seen"]
    assert dropped["where"].endswith("line 2") and dropped["row"] == rows[1]


def test_sums_that_differ_in_a_sign_are_no_twins(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is 2 {sign} 2?", "completion": "That depends on it."} for sign in "+-*"]
    assert cleaned(tmp_path / "out", written(tmp_path / "a.jsonl", rows)) == rows


def test_a_long_system_prompt_makes_no_twins(tmp_path: Path) -> None:
    system = {"role": "system", "content": prose(7)}
    rows = [
        {"messages": [system, {"role": "user", "content": ask}, {"role": "assistant", "content": said}]}
        for ask, said in (("Who was it?", "It was she."), ("When was it?", "It was noon."))
    ]
    assert cleaned(tmp_path / "out", written(tmp_path / "a.jsonl", rows)) == rows
    prompts = [{"prompt": row["messages"][:2]} for row in rows]
    assert cleaned(tmp_path / "prompts", written(tmp_path / "b.jsonl", prompts)) == prompts


def test_texts_that_only_go_on_saying_the_same_are_twins(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", "yes " * 9, "yes " * 900)
    assert cleaned(tmp_path / "out", source, "--filters", "none") == [{"text": "yes " * 9}]


def test_pairs_that_are_one_are_dropped(tmp_path: Path) -> None:
    long = prose(3, 200)
    rows = [
        {"prompt": "Say it.", "chosen": "So it is.", "rejected": "so it is."},
        {"prompt": "Say it at length.", "chosen": long, "rejected": long.replace("word", "Word ", 1)},
        {"prompt": "Say another.", "chosen": "So it is.", "rejected": "So it is not."},
    ]
    assert cleaned(tmp_path / "out", written(tmp_path / "a.jsonl", rows), "--keep-dropped") == rows[2:]
    assert reasons(tmp_path / "out") == [("pair", "chosen is rejected"), ("pair", "chosen nearly rejected")]


def test_what_an_evaluation_holds_is_dropped(tmp_path: Path) -> None:
    question = "A farmer has twelve hens and each of them lays five eggs in every week of spring"
    evaluation = written(
        tmp_path / "test.jsonl",
        [{"prompt": question, "completion": "60"}, {"prompt": "Who is that?", "completion": "yes"}],
    )
    rows = [
        {"prompt": f"Think: {question.upper()}, how many eggs?", "completion": "Sixty."},  # a run of 13, in any case
        {"prompt": "who is that?", "completion": "Nobody knows."},  # a short question, whole
        {"prompt": "Who is that man?", "completion": "Yes"},  # a short answer tells nothing
        {"prompt": "A farmer has twelve hens and each of them lays five eggs", "completion": "So?"},  # only 12 words
    ]
    source = written(tmp_path / "a.jsonl", rows)
    assert cleaned(tmp_path / "out", source, "--against", evaluation, "--keep-dropped") == rows[2:]
    first, second = read(tmp_path / "out" / "dropped.jsonl")
    assert f"{evaluation}, line 1: {' '.join(question.lower().split()[:13])}" == first["seen"]
    assert f"{evaluation}, line 2" in second["seen"]
    (fact,) = cards.read_card(tmp_path / "out" / "out.md").block.decontamination
    assert (fact.against, fact.n, fact.dropped) == (evaluation, 13, 2)


def test_phrases_are_found_inside_longer_texts(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("# a comment\nbuild a bomb\n")
    source = texts(tmp_path / "a.jsonl", f"{prose(0)} How to Build a bomb.", f"{prose(1)} Build a bombastic pose.")
    kept = cleaned(tmp_path / "out", source, "--harmful", str(tmp_path / "bad.txt"))
    assert len(kept) == 1 and "bombastic" in str(kept[0])
    (tmp_path / "bad.csv").write_text("goal\nbuild a bomb\n")
    assert cleaned(tmp_path / "again", source, "--harmful", str(tmp_path / "bad.csv")) == kept


def test_rows_are_screened_by_what_they_say_of_their_origin(tmp_path: Path) -> None:
    (tmp_path / "blocked.txt").write_text("bad.example\n")
    origins = [
        {"license": "MIT", "url": "https://good.example/a"},
        {"license": "GPL-3.0", "url": "https://good.example/b"},
        {"url": "https://good.example/c"},
        {"license": ["mit", "apache 2.0"], "url": "https://www.bad.example:80/d"},
        {"license": "mit", "meta": {"url": "https://notbad.example/e"}},
        {"license": "mit"},
    ]
    rows = [{"text": prose(number), **origin} for number, origin in enumerate(origins)]
    rows[-1]["text"] = f"{prose(9)} Copyright (c) 2019 by the Press."
    words = ["--licences", "mit,apache-2.0", "--blocklist", str(tmp_path / "blocked.txt"), "--copyright", "drop"]
    source = written(tmp_path / "a.jsonl", rows)
    kept = cleaned(tmp_path / "out", source, *words, "--keep-columns", "url", "--keep-dropped")
    assert kept == [{"text": prose(0), "url": "https://good.example/a"}, {"text": prose(4)}]
    assert [rule for _, rule in reasons(tmp_path / "out")] == [
        "licence", "licence", "blocked source", "copyright notice",
    ]  # fmt: skip


def test_personal_data_is_masked_in_what_is_written(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Write to anna.b+c@mail.example.org or +44 20 7946 0958."},
        {"role": "assistant", "content": "From 8.8.8.8, not 192.168.1.1, and v8.8.8.8? Or ghp_" + "a1B2" * 9},
    ]
    (row,) = cleaned(tmp_path / "out", written(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert [message["content"] for message in row["messages"]] == [
        "Write to <email> or <phone>.",
        "From <ip>, not 192.168.1.1, and v8.8.8.8? Or <key>",
    ]
    assert cards.read_card(tmp_path / "out" / "out.md").block.pii == {"email": 1, "ip": 1, "key": 1, "phone": 1}
    (row,) = cleaned(tmp_path / "kept", str(tmp_path / "a.jsonl"), "--pii", "keep")
    assert row == {"messages": messages}


def test_rules_are_data_and_a_file_changes_them(tmp_path: Path) -> None:
    short = texts(tmp_path / "a.jsonl", prose(0, 30), prose(1))
    other = texts(tmp_path / "b.jsonl", prose(2, 30))
    assert len(cleaned(tmp_path / "out", short, other)) == 1
    own = tmp_path / "rules.yaml"
    own.write_text(f"for: {{'{short}': {{gopher: {{words: {{min: 10}}}}}}}}")
    assert len(cleaned(tmp_path / "one", short, other, "--rules", str(own))) == 2
    own.write_text("{gopher: {words: null}}")
    assert len(cleaned(tmp_path / "both", short, other, "--rules", str(own))) == 3
    own.write_text("{mine: {shouts: {measure: holds, of: word1, max: 0}}}")
    with pytest.raises(UserError, match="no row is left"):
        clean([short, "--rules", str(own), "--filters", "mine", "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_lines_are_cut_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    menu = "Home | About | Contact"
    page, wrapped = prose(0).replace(". ", ".\n"), prose(1).replace(". ", ".\n")
    source = texts(tmp_path / "a.jsonl", f"{menu}\n{page}\n{menu}", f"{menu}\n{wrapped}", "\n".join([menu] * 60))
    as_it_is = cleaned(tmp_path / "plain", source, "--filters", "c4")
    assert [str(row["text"])[:22] for row in as_it_is] == [menu, menu], "nothing is cut that nobody asked for"
    capsys.readouterr()
    kept = cleaned(tmp_path / "cut", source, "--filters", "c4_lines,c4", "--keep-dropped", "--dedup", "none")
    assert kept == [{"text": page}, {"text": wrapped}]
    assert reasons(tmp_path / "cut") == [("quality", "no line left")]
    assert "lines cut out of texts: 63 by c4_lines.terminal_mark" in capsys.readouterr().out
    card = cards.read_card(tmp_path / "cut" / "cut.md")
    cut, left = card.block.filters
    assert (cut.rule, cut.cut, cut.dropped, left.dropped) == ("c4_lines.terminal_mark", 63, 0, 1)
    assert "63 lines cut out" in (tmp_path / "cut" / "cut.md").read_text()
    assert stats([source, "--filters", "c4_lines,c4", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["would_cut"] == {"c4_lines.terminal_mark": 63}
    assert [one["rule"] for one in figures["would_drop"]] == ["c4.sentences"], "a survey changes nothing"
    rules = tmp_path / "own.yaml"
    rules.write_text("{c4_lines: {terminal_mark: null, words: {min: 3}}}")
    words = ["--filters", "c4_lines", "--rules", str(rules)]
    assert len(cleaned(tmp_path / "own", source, *words)) == 3, "rules for lines are laid over as others are"
    pairs = written(tmp_path / "p.jsonl", [{"prompt": "p", "completion": menu}])
    capsys.readouterr()
    cleaned(tmp_path / "pairs", pairs, "--filters", "c4_lines")
    assert "rules that cut lines out are for texts: none was applied to rows of prompt_completion" in (
        capsys.readouterr().out
    )


# --- the whole ----------------------------------------------------------------------------------------------------


def test_the_result_is_a_set_that_loads_with_a_card_that_is_true(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = texts(tmp_path / "a.jsonl", prose(0), "too short", prose(1))
    second = texts(tmp_path / "b.jsonl", prose(1), prose(2), "")
    kept = cleaned(tmp_path / "out", first, second)
    assert kept == [{"text": prose(0)}, {"text": prose(1)}, {"text": prose(2)}]
    said = capsys.readouterr().out
    assert "1 of the duplicates repeat a row of another source" in said
    table = [line.split() for line in said.splitlines()[1:5]]
    assert [(line[0], *line[-3:]) for line in table[:3]] == [
        ("empty", "6", "1", "16.67%"),
        ("quality", "5", "1", "16.67%"),
        ("duplicates", "4", "1", "16.67%"),
    ]
    assert table[3] == ["kept", "3", "50.00%"]
    loaded = load([{"path": str(tmp_path / "out" / "out.md")}], phase="pretrain")
    assert loaded.dataset.to_list() == kept
    block = cards.read_card(tmp_path / "out" / "out.md").block
    assert block.stats["rows_read"] == 6 == 3 + sum(one.dropped for one in block.filters)
    assert [(one.file, one.rows) for one in block.made.sources] == [(first, 3), (second, 3)]


def test_the_result_depends_on_no_number_of_workers(tmp_path: Path) -> None:
    drawn = random.Random(0)
    base = [prose(number) for number in range(300)]
    copies = [" ".join(word if drawn.random() > 0.01 else "x" for word in text.split()) for text in base]
    source = texts(tmp_path / "a.jsonl", *base, *copies, *base[:50])
    one = cleaned(tmp_path / "one", source, "--workers", "1")
    two = cleaned(tmp_path / "two", source, "--workers", "2")
    assert one == two and 300 < len(one) < 400


def test_cleaning_twice_changes_nothing(tmp_path: Path) -> None:
    drawn = random.Random(1)
    base = [prose(number) for number in range(100)]
    noisy = [
        " ".join(word if drawn.random() > share else "x" for word in text.split())
        for text in base
        for share in (0.01, 0.03, 0.05)
    ]  # fmt: skip
    once = cleaned(tmp_path / "once", texts(tmp_path / "a.jsonl", *base, *noisy))
    again = cleaned(tmp_path / "again", str(tmp_path / "once" / "once.md"))
    assert again == once and len(once) < 400


MISTAKES = [
    (b'{"text": "a"}\n{"text": "b', [], r"a.jsonl, line 2: not JSON: Unterminated string.*--bad-rows drop"),
    (b'{"text": "a"}\n\n{"text": "\xff"}\n', [], r"a.jsonl, line 3: not UTF-8 \(byte 0xff\)"),
    (b'{"text": "a"}\n{"text": null}\n', [], r"a.jsonl, line 2: text must be a string, got None"),
    (b'{"text": "a"}\n{"txt": "b"}\n', [], r"a.jsonl, line 2: no column 'text'.*did you mean 'txt'"),
    (b"", [], r"no rows"),
    (b'{"q": "a"}\n', [], r"cannot recognise rows with the columns q"),
    (b'{"text": "a"}\n', ["--filters", "gofer"], r"unknown set of rules 'gofer'.*did you mean 'gopher'"),
    (b'{"text": "a"}\n', ["--dedup", "fuzzy"], r"unknown word of --dedup 'fuzzy'"),
    (b'{"text": "a"}\n', ["--threshold", "8"], r"--threshold 8.0 must be from 0.3 to 1"),
    (b'{"text": "a"}\n', ["--workers", "0"], r"--workers 0 must be at least 1"),
    (b'{"text": "a"}\n', ["--against", "card:gsm9k"], r"unknown card 'gsm9k'"),
    (b'{"text": "a"}\n', ["--rules", "none.yaml"], r"cannot read the rules none.yaml"),
    (b'{"text": "a"}\n', ["--speed", "2"], r"unrecognized arguments: --speed 2; see"),
    (b'{"text": "a"}\n', ["--columns", "text"], r"write name=column"),
]


@pytest.mark.parametrize("content, words, said", MISTAKES, ids=[said[:28] for *_, said in MISTAKES])
def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, content: bytes, words: list[str], said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        clean([str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), *words])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_files_of_every_kind_give_the_same(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": prose(number % 5)} for number in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
    written(tmp_path / "a.jsonl", rows)
    sources = [str(tmp_path / f"a.{kind}") for kind in ("jsonl", "parquet", "json", "csv")]
    for place, source in enumerate(sources):
        assert cleaned(tmp_path / f"out{place}", source) == rows[:5]
        assert cleaned(tmp_path / f"cut{place}", f"{source}[-4:]") == [rows[4], rows[0], rows[1], rows[2]]


def test_a_worker_tells_of_a_bad_line_too(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", *(prose(number) for number in range(600)))
    with open(source, "ab") as stream:
        stream.write(b'{"text": \n')
    with pytest.raises(UserError, match="line 601: not JSON"):
        clean([source, "--output", str(tmp_path / "out"), "--workers", "2"])
    assert len(cleaned(tmp_path / "out", source, "--bad-rows", "drop", "--workers", "2", "--keep-dropped")) == 600
    assert reasons(tmp_path / "out") == [("reading", "cannot be read")]


def test_the_output_may_not_be_where_the_input_is(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", prose(0))
    with pytest.raises(UserError, match="not empty"):
        clean([source, "--output", str(tmp_path)])
    cleaned(tmp_path / "out", source)
    with pytest.raises(UserError, match="lies in the output folder"):
        clean([str(tmp_path / "out" / "out.md"), "--output", str(tmp_path / "out"), "--overwrite"])


def test_sources_of_two_kinds_and_sources_named_twice_are_refused(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", prose(0))
    other = written(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    for words, said in (([source, other], "clean them one by one"), ([source, source], "is named twice")):
        with pytest.raises(UserError, match=said):
            clean([*words, "--output", str(tmp_path / "out")])


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", *(prose(number, 300) for number in range(300)))
    place = tmp_path / "small"
    place.mkdir()
    command = f"{sys.executable} -m align_kit data clean {source} --output {place}/out --filters none --workers 1"
    said = apart(
        f"mount -t tmpfs -o size=256k tmpfs {place}; code=0; {command} 2>&1 || code=$?; echo code $code; ls -A {place}"
    ).splitlines()
    assert said[-1] == "code 2", said  # and nothing is listed after it
    assert f"the disk of {place} is full; nothing was written" in said[-2]


def test_only_one_language_is_kept(tmp_path: Path) -> None:
    german = "Der Hafen war still, und die Fischer flickten ihre Netze, bevor die Flut wieder hereinkam."
    french = "Le port était calme, et les pêcheurs réparaient leurs filets avant que la marée ne revienne."
    source = texts(tmp_path / "a.jsonl", prose(0), german, french)
    words = [source, "--language", "de", "--filters", "none", "--keep-dropped", "--output", str(tmp_path / "out")]
    assert clean([*words, "--workers", "1"]) == 0
    assert [row["text"] for row in read(tmp_path / "out" / "train.jsonl")] == [german]
    assert [row["seen"] for row in read(tmp_path / "out" / "dropped.jsonl")][1] == "fr"


def test_language_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from align_kit.clean import language

    monkeypatch.setitem(sys.modules, "py3langid", None)  # as where it is not installed
    monkeypatch.setattr(language, "_classifier", language._classifier.__wrapped__)
    source = texts(tmp_path / "a.jsonl", prose(0))
    with pytest.raises(UserError, match=r"pip install 'align-kit\[language\]'"):
        clean([source, "--language", "de", "--output", str(tmp_path / "out"), "--workers", "1"])


def test_one_cluster_of_all_rows_leaves_one(tmp_path: Path) -> None:
    base = prose(0, 200)
    source = texts(tmp_path / "a.jsonl", *(f"{base} Number {number}." for number in range(600)))
    began = time.monotonic()
    assert cleaned(tmp_path / "out", source) == [{"text": f"{base} Number 0."}]
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_in_the_middle_leaves_nothing(tmp_path: Path, kill: signal.Signals) -> None:
    rows = [prose(number) for number in range(200)]
    source = texts(tmp_path / "a.jsonl", *(f"{text} {time}" for time in range(100) for text in rows))
    words = [sys.executable, "-m", "align_kit", "data", "clean", source, "--workers", "2", "--output"]
    work = tmp_path / "work"
    work.mkdir()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*words, str(work / "out")], start_new_session=True, **quiet)
    children = waited_for_children(process.pid)
    os.kill(process.pid, kill)
    process.wait(timeout=30)
    assert process.returncode == (-kill if kill == signal.SIGKILL else 130) and list(work.iterdir()) == []
    deadline = time.monotonic() + 20
    while any(is_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if is_alive(child)]


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def waited_for_children(pid: int) -> list[int]:
    """Return the processes that `pid` has started, once there are workers among them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = Path(f"/proc/{pid}/task/{pid}/children")
        children = [int(word) for word in found.read_text().split()] if found.exists() else []
        if len(children) >= 3:  # two workers and the keeper of shared resources
            time.sleep(0.3)
            return children
        time.sleep(0.05)
    raise AssertionError("no workers were started")


def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", *(f"{prose(number % 50)} {number}" for number in range(20000)))
    words = [sys.executable, "-m", "align_kit", "data", "clean", source, "--workers", "2", "--output"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*words, str(tmp_path / "out")], start_new_session=True, text=True, **pipes)
    os.kill(waited_for_children(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and said.startswith("error: a worker was killed") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_stats_tell_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = texts(tmp_path / "a.jsonl", prose(0), prose(0), "mail me: a@b.example.org", prose(1, 100))
    assert stats([source, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 4 and found["personal_data"] == {"email": 1}
    assert found["lengths"]["text"]["words"]["1"] == len(prose(1, 100).split())
    by_rule = {one["rule"]: one["share"] for one in found["would_drop"]}
    assert by_rule["exact duplicate"] == by_rule["gopher.words"] == by_rule["c4.sentences"] == 0.25
    assert found["longest"][0] == {"row": f"{source}, line 4", "characters": len(prose(1, 100))}
    assert stats([source]) == 0
    assert "| duplicates | exact duplicate |" in capsys.readouterr().out


# --- real data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def at_home(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_KIT_DATA", str(real_data))
    return real_data


def test_problems_of_gsm8k_copied_into_training_are_found(tmp_path: Path, at_home: Path) -> None:
    train = at_home / "gsm8k" / "train.jsonl"
    leak = (at_home / "gsm8k" / "test.jsonl").read_text().splitlines()[:50]
    (tmp_path / "a.jsonl").write_text("\n".join([*train.read_text().splitlines()[:500], *leak]) + "\n")
    cleaned(tmp_path / "out", str(tmp_path / "a.jsonl"), "--against", "card:gsm8k", "--keep-dropped")
    found = [row["where"] for row in read(tmp_path / "out" / "dropped.jsonl") if row["reason"] == "decontamination"]
    assert [f"{tmp_path / 'a.jsonl'}, line {number}" for number in range(501, 551)] == found[-50:]
    assert len(found) < 55  # a few problems of the two splits are told in the same words


def test_all_of_an_evaluation_set_against_itself(tmp_path: Path, at_home: Path) -> None:
    with pytest.raises(UserError, match="no row is left of 1,319"):
        clean(["card:gsm8k[test]", "--against", "card:gsm8k", "--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_web_text_is_filtered_as_by_hand(tmp_path: Path, at_home: Path) -> None:
    cleaned(tmp_path / "out", "card:llamafactory_c4_demo", "--keep-dropped")
    dropped = {row["where"].split()[-1]: row for row in read(tmp_path / "out" / "dropped.jsonl")}
    assert {row["rule"].split(".")[0] for row in dropped.values()} == {"gopher", "c4"}
    assert 30 <= len(dropped) <= 50
    shown = "\n".join(str(row["row"]) for row in dropped.values())
    assert "Access All Records Of <phone> Now!" in shown and "Inserisci l indirizzo email" in shown


def test_no_line_of_c4_itself_is_cut(at_home: Path, capsys: pytest.CaptureFixture) -> None:
    """Its pages have been through the published rules: what those kept ours keep, all 2,676 lines."""
    assert stats(["card:llamafactory_c4_demo", "--filters", "c4_lines,c4", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["would_cut"] == {} and figures["rows"] == 300
    dropped = {one["rule"]: one["rows"] for one in figures["would_drop"] if one["step"] == "quality"}
    assert dropped == {"c4.sentences": 2}, "two pages whose sentences NLTK parts otherwise"


def test_shards_cleaned_alone_and_compared_at_last_give_the_same(tmp_path: Path) -> None:
    """Above one machine: everything but the duplicates by shard, then the duplicates of all that is left."""
    mail = " Mail a.b@c.example.org."
    first = texts(tmp_path / "a.jsonl", prose(0), "short", prose(1) + mail, prose(2))
    second = texts(tmp_path / "b.jsonl", prose(2) + " Also.", prose(3), prose(1) + mail.replace("a.b", "x"))
    whole = cleaned(tmp_path / "whole", first, second)
    for shard, source in (("one", first), ("two", second)):
        cleaned(tmp_path / shard, source, "--dedup", "none")
    cards_ = [str(tmp_path / shard / f"{shard}.md") for shard in ("one", "two")]
    assert cleaned(tmp_path / "joined", *cards_, "--filters", "none", "--pii", "keep") == whole
    assert len(whole) == 4


def test_rows_with_half_a_character_and_rows_that_cannot_be_read_are_kept_aside(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    good = json.dumps({"text": prose(0)}).encode()
    source.write_bytes(b'{"text": "half \\ud83d a pair"}\n\xff a@b.example.org\n' + good)
    assert cleaned(tmp_path / "out", str(source), "--bad-rows", "drop", "--keep-dropped") == [{"text": prose(0)}]
    rows = [(row["reason"], row["row"]) for row in read(tmp_path / "out" / "dropped.jsonl")]
    assert rows == [("reading", '{"text": "half \\ud83d a pair"}'), ("reading", "\ufffd <email>")]
