"""Pages and plots from plain numbers: what they hold, what they refuse, and that they need nothing but themselves."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_kit.cli import main
from align_kit.report import overlay, plots, reading, run_page
from align_kit.report.curves import FIRST, MACHINE_CURVES, beside, labels
from align_kit.report.page import Page, shown
from tests.harness import ROOT
from tests.test_floors import loaded_after


def drawn(figure: Any, prefix: str = "f-") -> ElementTree.Element:
    return ElementTree.fromstring(plots.svg(figure, prefix))


def texts(figure: Any) -> list[str]:
    return [element.text or "" for element in drawn(figure).iter() if element.tag.endswith("text")]


# --- plots ------------------------------------------------------------------------------------------------------------


def test_a_plot_has_its_words_as_text_and_its_colours_from_css() -> None:
    series = {"full": [(1, 2.0), (2, 3.0)], "LoRA": [(1, 1.0)]}
    figure = plots.lines(series, x="step", y="loss", title="Loss of $1 & <b>")
    markup = plots.svg(figure, "a-")
    assert {"Loss of $1 & <b>", "full", "LoRA", "step", "loss"} <= set(texts(figure))
    assert {"var(--s0)", "var(--s1)", "var(--ink)", "var(--rule)"} <= set(re.findall(r"var\([^)]*\)", markup))
    assert not re.findall(r"#[0-9a-f]{6}\b|font-family|<style|<metadata|<script", markup), "a colour or font of its own"


def test_plots_are_the_same_every_time_and_share_no_ids() -> None:
    make = lambda: plots.lines({"a": [(1, 2), (2, 3)]}, x="step", y="loss")  # noqa: E731
    assert plots.svg(make(), "a-") == plots.svg(make(), "a-")
    page = Page("two")
    for _ in range(2):
        page.figure(make(), "the same")
    ids = re.findall(r' id="([^"]+)"', page.markup())
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', page.markup()))
    assert {one or other for one, other in used} <= set(ids), "a clip or a marker is nowhere"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(4, 20))
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = plots.thinned(points, most)
    heights = [height for _, height in kept]
    assert len(kept) <= most + 2 and kept == sorted(set(kept)) and set(kept) <= set(points)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (min(heights), max(heights)) == (min(values), max(values))


def test_a_long_run_stays_small_and_its_spike_is_seen() -> None:
    points = [(float(step), math.sin(step)) for step in range(50_000)]
    points[31_234] = (31_234.0, 40.0)
    figure = plots.lines({"loss": points}, x="step", y="loss")
    assert "40" in texts(figure) and len(plots.svg(figure, "a")) < 40_000


def test_a_jagged_curve_has_its_running_mean_and_says_so() -> None:
    jagged = [(float(step), float(step % 2)) for step in range(400)]
    figure = plots.lines({"loss": jagged, "rate": [(s, s) for s, _ in jagged]}, x="step", y="")
    assert "step (strong: mean of 10 values)" in texts(figure)
    assert "loss" in texts(figure) and plots.svg(figure, "a").count("opacity: 0.35") == 1
    assert {height for _, height in plots.running_mean(jagged, 10)} == {0.5}
    assert plots.running_mean([(1, 1), (2, math.nan), (3, 5), (5, 3)], 2) == [(2, 3), (4, 4)]
    assert "step" in texts(plots.lines({"loss": jagged[:90]}, x="step", y="")), "short enough to be seen"


def test_what_is_no_number_leaves_a_gap() -> None:
    points = [(1.0, 1.0), (2.0, math.nan), (3.0, math.inf), (4.0, 2.0)]
    line = plots.svg(plots.lines({"loss": points, "none": [], "nan": [(1.0, math.nan)]}, x="step", y=""), "a")
    assert "nan" not in re.sub(r">nan<", "", line.lower()) and "inf" not in line.lower()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1000, 2000], ["0", "1000", "2000"]),
        ([0, 10_000, 20_000], ["0", "10k", "20k"]),
        ([1.2e4, 1.25e4], ["12.0k", "12.5k"]),
        ([0.0, 0.5, 1.0], ["0", "0.5", "1.0"]),
        ([-0.25, 0.0, 0.25], ["−0.25", "0", "0.25"]),
        ([0.69314, 0.69316], ["0.69314", "0.69316"]),
        ([0, 2e-7, 4e-7], ["0", "2e-7", "4e-7"]),
        ([2.5e6, 5e6], ["2.5M", "5.0M"]),
    ],
)
def test_ticks_have_no_digit_too_many_or_too_few(values: list[float], expected: list[str]) -> None:
    assert plots.tick_labels(values) == expected


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 9))
def test_different_ticks_read_differently(first: float, step: float, count: int) -> None:
    values = [first + step * place for place in range(count)]
    if len(set(values)) == count and step > 1e-5 * abs(first):
        assert len(set(plots.tick_labels(values))) >= count - 1


def test_bars_stack_to_their_total_beside_the_limit() -> None:
    stacks = {"ZeRO-2": {"parameters": 3.0, "moments": 4.5}, "ZeRO-3": {"moments": 1.25}}
    words = texts(plots.bars(stacks, unit="GiB", title="Memory", limit=24.0))
    assert {"7.5", "1.25", "parameters", "moments", "limit 24 GiB", "GiB", "ZeRO-2", "Memory"} <= set(words)
    assert words.count("moments") == 1, "once in the legend"


def test_intervals_show_mean_and_both_ends() -> None:
    figure = plots.intervals({"full": (0.5, 0.25, 0.75), "LoRA": (0.4, 0.4, 0.4)}, x="accuracy")
    assert {"0.5", "0.4", "full", "LoRA", "accuracy"} <= set(texts(figure))


@pytest.mark.parametrize("small", [1e-3, 0.5, 3.0, 400.0])
def test_a_logarithmic_axis_is_labelled_in_plain_numbers(small: float) -> None:
    figure = plots.lines({"norm": [(1, small), (2, small * 1.4), (3, small * 40)]}, x="step", y="norm", log_y=True)
    labels = [word for word in texts(figure) if re.fullmatch(r"[\d.e-]+", word)]
    assert len(labels) >= 5 and not [word for word in texts(figure) if "$" in word]


# --- pages ------------------------------------------------------------------------------------------------------------


def test_a_page_shows_text_as_it_is() -> None:
    evil = "</pre><script>alert(1)</script> & \x11"
    page = Page(evil, evil)
    page.section(evil)
    page.text(evil)
    page.table([evil], [[evil]], evil)
    page.code(evil, summary=evil)
    page.blocks({evil: evil})
    page.points([evil])
    page.facts({evil: evil})
    page.figure(plots.lines({evil: [(1, 1)], "b": []}, x=evil, y=evil, title=evil), evil)
    markup = page.markup()
    assert "<script" not in markup and "\x11" not in markup
    assert markup.count("&lt;script&gt;alert(1)") >= 14


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = Page("alone")
    page.figure(plots.bars({"a": {"b": 1}}, unit="GiB"), "")
    text = page.write(tmp_path / "page.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:,)[^"]*"|@import|url\((?!#)', text)
    assert "default-src 'none'" in text and list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_cells_read_as_one_would_write_them() -> None:
    values = (None, True, 1234567, 0.123456, 123456.7, float("nan"), "as it is")
    assert [shown(value) for value in values] == ["–", "yes", "1,234,567", "0.1235", "123,457", "nan", "as it is"]


def test_numbers_stand_to_the_right() -> None:
    page = Page("t")
    page.table(["arm", "loss", "note"], [["full", 0.5, "3 of 4"], ["LoRA", None, "none"]])
    assert re.findall(r"<td( class=\"n\")?>", page.markup()) == ["", ' class="n"', ""] * 2


def test_matplotlib_comes_late_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert "matplotlib" not in loaded_after("import align_kit.run, align_kit.report.overlay", tmp_path)
    env = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    env |= {"HOME": str(tmp_path / "home"), "ALIGN_KIT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    (tmp_path / "home").mkdir()
    code = """
import os
from align_kit.report import plots
plots.svg(plots.lines({"损失": []}, x="", y=""), "a")
print(os.environ.get("MPLCONFIGDIR"))
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "cache"} and not list((tmp_path / "home").iterdir())
    assert list((tmp_path / "cache" / "matplotlib").glob("fontlist*.json"))


# --- runs from files --------------------------------------------------------------------------------------------------


def a_run(place: Path, *, seed: int = 0, **manifest: Any) -> Path:
    """Write what a short DPO run leaves, by hand."""
    place.mkdir(parents=True)
    written = {
        "phase": "dpo",
        "status": "finished",
        "config": {"learning_rate": 1e-6 * (1 + seed), "beta": 0.1, "output_dir": str(place)},
        "origin": {"learning_rate": "command line"},
        "policy": {"name": "some/model", "digest": "d" * 32, "why": "as configured"},
        "spent": {"training/update": 12.0, "start": 3.0},
        **manifest,
    }
    (place / "manifest.json").write_text(json.dumps(written))
    lines = [{"step": step, "loss": 0.7 - 0.1 * step + seed, "machine/tokens_per_second": 10.0} for step in (1, 2, 3)]
    lines += [{"step": 3, "eval_loss": 0.6}, {"step": 3, "train_runtime": 9.0, "train_loss": 123.0}]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    return place


def test_a_record_leaves_out_what_was_not_written_whole(tmp_path: Path) -> None:
    record = reading.read(a_run(tmp_path / "run"))
    assert record.series("loss") == [(1, 0.6), (2, pytest.approx(0.5)), (3, pytest.approx(0.4))]
    assert record.names() == ["loss", "machine/tokens_per_second", "eval_loss"] and record.last("nothing") is None


def test_a_step_that_was_logged_again_counts_once(tmp_path: Path) -> None:
    place = a_run(tmp_path / "run")
    with (place / "metrics.jsonl").open("a") as stream:
        stream.write('\n{"step": 2, "loss": 9.0}\n')
    assert reading.read(place).series("loss")[1] == (2, 9.0)


def test_the_page_of_a_run_says_how_it_ended(tmp_path: Path) -> None:
    failed = run_page.write(a_run(tmp_path / "a", status="failed", failure="loss <nan> at step 4")).read_text()
    assert "The run failed: loss &lt;nan&gt; at step 4" in failed
    stopped = run_page.write(a_run(tmp_path / "b", status="stopped", stopped={"step": 3, "why": "SIGTERM"})).read_text()
    assert "stopped at step 3: SIGTERM" in stopped
    assert "0.6 → 0.4" in failed and "15 s" in failed


def test_plan_and_measurement_stand_side_by_side(tmp_path: Path) -> None:
    plan = {
        "state_bytes": {"parameters": 2**30, "moments": 2**31}, "persistent_bytes": 3 * 2**30,
        "peak_bytes": 2**32, "peak_at": "backward", "link_bytes": 2**20, "seconds": 0.5,
        "moment_bytes": {"backward": {"activations": 2**29, "parameters": 2**29}, "step": {"optimizer": 1}},
    }  # fmt: skip
    measured = {"state_bytes": {"parameters": 2**30}, "peak_bytes": 2**31, "peak_how": "resident size"}
    text = run_page.write(a_run(tmp_path / "run", plan=plan, measured=measured)).read_text()
    words = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert {"parameters", "parameters, in flight", "activations", "moments"} <= set(words) and "optimizer" not in words
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    row = cells.index("at the peak")
    assert cells[row : row + 4] == ["at the peak", "4 GiB", "2 GiB", "2.000"]
    row = cells.index("on the wire, a rank and step")
    assert cells[row : row + 4] == ["on the wire, a rank and step", "1 MiB", "–", "–"]


def test_every_number_is_shown_once() -> None:
    logged = ["loss", "eval_loss", "rewards/chosen", "kl", "policy/ratio", "eval_policy/ratio", "epoch", "machine/mfu"]
    curves = [*FIRST, *MACHINE_CURVES, *beside(logged)]
    counted = [name for curve in curves for name in labels(curve, logged)]
    assert sorted(counted) == sorted(set(logged) - {"epoch"})


def test_runs_lie_over_each_other_and_what_differs_is_named(tmp_path: Path) -> None:
    folders = [a_run(tmp_path / name / "dpo", seed=seed) for seed, name in enumerate(("a", "b"))]
    page = tmp_path / "both.html"
    assert main(["report", *map(str, folders), "--output", str(page)]) == 0
    text = page.read_text()
    assert "2 runs" in text and text.count("a/dpo</text>") >= 4
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", text)
    assert cells[cells.index("learning_rate") :][:3] == ["learning_rate", "1e-06", "2e-06"]
    assert "beta" not in cells and "output_dir" not in cells


def test_a_folder_of_runs_is_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        a_run(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs"]) == 0
    assert "3 runs" in (tmp_path / "report.html").read_text()
    assert main(["report", "runs/two"]) == 0
    assert "dpo: two" in (tmp_path / "runs" / "two" / "report.html").read_text()


def test_runs_of_a_comparison_are_found_and_folders_without_one_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "compared"
    for place in ("pretrain", "full/lr1-seed1", "lora/lr1-seed1"):
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        a_run(home / place)
    for place in ("logs", "measures", "lora/lr1-seed2"):
        (home / place).mkdir()
    (home / "lora" / "lr1-seed2" / "manifest.json").write_text('{"phase": "sft", ')
    (home / "pretrain" / "checkpoint-4").mkdir()
    (home / "pretrain" / "checkpoint-4" / "manifest.json").write_text("{}")
    page = tmp_path / "page.html"
    assert main(["report", str(home), "--output", str(page)]) == 0
    said = capsys.readouterr().out
    assert "(3 runs)" in said and "left out, for they hold no run: " in said
    assert f"{home}/lora/lr1-seed2\n" in said and "checkpoint" not in said
    one_by_one = [str(place) for place in home.iterdir()]
    assert main(["report", *one_by_one, "--output", str(page)]) == 0
    said = capsys.readouterr().out
    assert "(3 runs)" in said and str(home / "logs") in said and str(home / "measures") in said


def refusals(tmp_path: Path) -> Iterator[tuple[list[str], str]]:
    run = a_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"files": 3}')
    yield [str(tmp_path / "empty")], "holds no run"
    yield [str(tmp_path / "nowhere")], "holds no run"
    yield [str(tmp_path / "other")], "holds no run"
    odd = a_run(tmp_path / "odd", data={"train": {}})
    yield [str(odd)], "not as a run writes it (KeyError"
    yield [str(run), str(run)], "named twice"
    yield [str(run), "--output", str(tmp_path / "no" / "page.html")], "there is no folder"


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, why in refusals(tmp_path):
        assert main(["report", *words]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1, said
    assert not list(tmp_path.rglob("*.html"))


def test_overlay_counts_ranks_and_digests_among_what_differs(tmp_path: Path) -> None:
    records = {
        name: reading.read(a_run(tmp_path / name, world_size=ranks, engine={"zero": {"stage": ranks}}))
        for name, ranks in (("one", 1), ("two", 2))
    }
    markup = overlay.overlay(records).markup()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", markup)
    assert cells[cells.index("ranks") :][:3] == ["ranks", "1", "2"]
    assert cells[cells.index("DeepSpeed: zero.stage") :][:3] == ["DeepSpeed: zero.stage", "1", "2"]


def test_a_named_plot_is_a_picture_of_its_own_too(tmp_path: Path) -> None:
    page = Page("a page")
    page.figure(plots.lines({"one": [(0, 1), (1, 2)]}, x="x", y="y"), "what it shows", "curve")
    page.write(tmp_path / "page.html")
    drawn = (tmp_path / "curve.svg").read_text()
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    used = set(re.findall(r"var\((--\w+)\)", drawn))
    assert "prefers-color-scheme:dark" in drawn and used and all(f"{name}:" in drawn for name in used)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["curve.svg", "page.html"]
