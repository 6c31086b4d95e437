"""Pages in a real browser: its console stays silent, every plot is drawn whole, light and dark are readable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from align_kit.report import plots
from align_kit.report.page import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
DARK = "--blink-settings=preferredColorScheme=0"
# Runs in a copy of the page that lets scripts run: what the browser has made of every plot.
PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const look = e => getComputedStyle(e);
top.document.body.dataset.probe = JSON.stringify({
  inner: innerWidth, wide: document.documentElement.scrollWidth,
  page: look(document.body).backgroundColor, ink: look(document.body).color,
  dim: look(document.querySelector("dt")).color,
  link: look(document.querySelector("nav a")).color, card: look(document.querySelector("dl div")).backgroundColor,
  figures: [...document.querySelectorAll("figure svg")].map(svg => ({
    box: box(svg),
    texts: [...svg.querySelectorAll("text")].map(t => [t.textContent, box(t), look(t).fill]),
    drawn: [...svg.querySelectorAll("path, use")].filter(p => p.getBBox().width + p.getBBox().height > 0).length,
    strokes: [...svg.querySelectorAll("[style*='var(--s']")].map(p => [look(p).stroke, look(p).fill]),
  })),
});
</script>"""


def browse(page: Path, *more: str, width: int = 1280, height: int = 2000) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = page.with_suffix(".profile")
    words = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}", *more, page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return done


def probed(page: Path, *more: str, width: int = 1280) -> dict[str, Any]:
    """Return what the probe saw of a page in a frame of this width: a window cannot be as narrow as a telephone."""
    open_to_scripts = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = page.with_name("probed.html")
    inside = escape(open_to_scripts.replace("</body>", f"{PROBE}</body>"))
    copy.write_text(f'<!DOCTYPE html><body><iframe width="{width}" height="900" srcdoc="{inside}"></iframe></body>')
    dom = browse(copy, "--dump-dom", *more, width=width + 50).stdout
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, dom[:500]
    return dict(json.loads(unescape(found[1])))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of thing in it, its names long and its numbers large."""
    made = Page("DPO of a model with a name that is rather long: " + "x" * 60, "two ranks")
    made.facts({"loss": "0.6931 → 0.4044", "tokens/s": 123456})
    for title in ("How it went", "Memory", "Answers"):
        made.section(title)
        many = {f"runs/arm-{arm}/seed-{arm}": [(s, arm + 1 / s) for s in range(1, 40)] for arm in range(plots.HUES)}
        made.figure(plots.lines(many, x="step", y="loss", title="Loss of many runs"), "A caption that says what it is.")
        jagged = {"a": [(s, 5e-7 + 1e-8 * (s * s % 11)) for s in range(500)]}
        made.figure(plots.lines(jagged, x="step", y="learning rate", title="Learning rate"), "")
        made.figure(plots.lines({"a": [(1, 0.3), (9, 1e4)]}, x="step", y="norm", title="Norm", log_y=True), "")
        parts = {name: 10.0 + place for place, name in enumerate(("parameters", "moments", "activations", "gathered"))}
        stacks = {"ZeRO-3, offloaded to the host": parts, "ZeRO-1": {"parameters": 140.25}}
        made.figure(plots.bars(stacks, unit="GiB", title="Memory of a rank", limit=141.0), "")
        made.figure(plots.intervals({"full": (0.9, 0.8, 0.97), "LoRA": (0.5, 0.1, 0.6)}, x="accuracy"), "")
    made.table(["arm", "loss", "a long column"], [["full", 0.5, "word " * 60], ["x" * 90, 12345.6, "unbroken" * 30]])
    made.blocks({"prompt": "a prompt", "before": "text " * 100, "after": "y" * 300})
    made.code("key: " + "value " * 60)
    return made.write(tmp_path_factory.mktemp("page") / "page.html")


def test_the_console_is_silent_and_colours_are_on_the_screen(page: Path) -> None:
    import numpy as np
    from PIL import Image

    for name, more, hue in (("light", (), (0x00, 0x67, 0xA5)), ("dark", (DARK,), (0x5F, 0xB0, 0xF2))):
        shot = page.with_name(f"{name}.png")
        done = browse(page, f"--screenshot={shot}", *more)
        assert "CONSOLE" not in done.stderr, done.stderr
        seen = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
        assert (seen == hue).all(1).sum() > 1000, f"{name}: the first series is not on the screen"


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_every_plot_is_drawn_whole_whatever_the_width(page: Path, width: int) -> None:
    found = probed(page, width=width)
    assert found["inner"] == width and found["wide"] <= width, "the page is wider than the screen"
    assert len(found["figures"]) == 15
    for figure in found["figures"]:
        left, top, right, bottom = figure["box"]
        assert right - left > 0.4 * min(width, 900) and figure["drawn"] > 8, figure["texts"]
        for text, (begin, above, end, below), _ in figure["texts"]:
            inside = begin >= left - 1 and end <= right + 1 and above >= top - 1 and below <= bottom + 1
            assert inside, f"{text!r} is cut off at {width}: {(begin, end)} of {(left, right)}"


def test_words_of_a_plot_do_not_lie_over_each_other(page: Path) -> None:
    for figure in probed(page)["figures"]:
        texts = [(text, box) for text, box, _ in figure["texts"] if text.strip()]
        for place, (one, (l1, t1, r1, b1)) in enumerate(texts):
            for other, (l2, t2, r2, b2) in texts[place + 1 :]:
                apart = min(r1, r2) - max(l1, l2) <= 2 or min(b1, b2) - max(t1, t2) <= 2
                assert apart, f"{one!r} and {other!r}"


@pytest.mark.parametrize("more", [(), (DARK,)], ids=["light", "dark"])
def test_colours_stand_out(page: Path, more: tuple[str, ...]) -> None:
    """WCAG 2.2: 4.5 to 1 for text (1.4.3), 3 to 1 for what is drawn (1.4.11)."""
    found = probed(page, *more)
    paper = found["page"]
    assert (luminance(paper) < 0.1) == bool(more), "the wrong set of colours"
    for name in ("ink", "dim", "link"):
        assert contrast(found[name], paper) >= 4.5, name
    assert contrast(found["ink"], found["card"]) >= 4.5 and contrast(found["dim"], found["card"]) >= 4.5
    colours = {colour for figure in found["figures"] for pair in figure["strokes"] for colour in pair}
    series = {colour for colour in colours if colour.startswith("rgb")} - {"rgb(0, 0, 0)"}
    assert len(series) == plots.HUES
    assert all(contrast(colour, paper) >= 3 for colour in series), {c: contrast(c, paper) for c in series}
    assert all(contrast(fill, paper) >= 4.5 for figure in found["figures"] for _, _, fill in figure["texts"])


def luminance(colour: str) -> float:
    """Return the relative luminance of `rgb(…)` (WCAG 2.2)."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
