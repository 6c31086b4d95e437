"""Plots of a page: curves, stacked bars and intervals, in colours that the page's style sheet decides.

Every colour is a stand-in that `svg` turns into a CSS variable, so one drawing is readable in light and in dark; text
stays text. matplotlib is imported where something is drawn, and nothing of it opens a window.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align_kit import run_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HUES = 8  # colours of series that the style sheet names; beyond them they come again, dashed or paler
INK, RULE = "#010000", "#010001"  # stand-ins: text and axes, grid
WIDTH, HEIGHT = 5.2, 2.9  # of one plot, in inches: as wide as a narrow screen shows it without shrinking
ROW = 0.36  # inches that one bar or interval takes
POINTS = 700  # of all curves of a plot together: some 15 kB
FEWEST = 60  # points that a curve keeps, however many share the plot
LONG, WINDOWS = 100, 40  # a longer curve that is jagged gets a running mean, over the 40th part of it
JAGGED = 6.0  # the way up and down is so many times the distance between lowest and highest
STYLE: Any = {  # names of matplotlib's settings
    "svg.fonttype": "none",
    "svg.hashsalt": "align_kit",
    "text.parse_math": False,  # a run may be named "$1"
    "font.size": 9,
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0.02,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}
SUFFIXES = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from, size, mark


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Draw in our style, with matplotlib's font list in our own cache and its remarks on building it unsaid."""
    given = os.environ.get("MPLCONFIGDIR")
    if given is None:
        home = run_folder.cache_folder(os.environ) / "matplotlib"
        run_folder.make_private(home)
        os.environ["MPLCONFIGDIR"] = str(home)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        import matplotlib
        import matplotlib.font_manager  # reads or builds the list of fonts as it is imported

        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # Text stays text: the reader's browser draws what this machine's font lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            yield
    finally:
        if given is None:
            del os.environ["MPLCONFIGDIR"]


def hue(index: int) -> str:
    """Return the stand-in for the colour of series number `index`."""
    return f"#0200{index % HUES:02x}"


def _plot(height: float = HEIGHT) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(length=0)
    return figure, axes


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return what stands beside the ticks of an axis: no digit more than tells them apart, 20k for 20,000."""
    finite = [value for value in values if math.isfinite(value)]
    largest = max(map(abs, finite), default=0.0)
    steps = [abs(after - before) for before, after in itertools.pairwise(finite) if after != before]
    scale, suffix = next(((size, mark) for least, size, mark in SUFFIXES if largest >= least), (1.0, ""))
    if 0 < largest < 1e-3:
        power = math.floor(math.log10(largest))
        scale, suffix = 10.0**power, f"e{power}"
    step = min(steps, default=largest) / scale
    digits = 0
    while step and digits < 6 and abs(round(step, digits) - step) > 1e-3 * step:
        digits += 1
    return [f"{'−' * int(value < 0)}{abs(value) / scale:.{digits}f}{suffix}" if value else "0" for value in values]


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import Formatter

    class Together(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return tick_labels([x])[0]

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return tick_labels(values)

    axis.set_major_formatter(Together())


def _log_ticks(axis: Any) -> None:
    """Label powers of ten, and where few are in sight what lies between them, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    if high < 10 * low:
        axis.set_major_locator(MaxNLocator(5))
    elif high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()


# --- curves -----------------------------------------------------------------------------------------------------------


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most about `most` of the points, ends and extremes kept: a spike of one step stays seen."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) * 2 / most)
    kept = [points[0]]
    for first in range(0, len(points), size):
        bucket = points[first : first + size]
        finite = [point for point in bucket if math.isfinite(point[1])]
        ends = (min(finite, key=_height), max(finite, key=_height)) if finite else bucket[:1]
        kept.extend(sorted(set(ends)))
    return [*dict.fromkeys([*kept, points[-1]])]


def _height(point: tuple[float, float]) -> float:
    return point[1]


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, title: str = "", log_y: bool = False
) -> Figure:
    """Return curves of (x, y) points by name; values that are not finite leave a gap, and long ones are thinned.

    A long and jagged curve is drawn pale, with its running mean over it; the label of x then says over how many values.
    """
    with _drawing():
        from matplotlib.ticker import MaxNLocator

        figure, axes = _plot()
        most = max(FEWEST, POINTS // max(1, len(series)))
        spans = {name: len(points) // WINDOWS for name, points in series.items() if _is_jagged(points)}
        for index, (name, points) in enumerate(series.items()):
            if name in spans:
                _curve(axes, "", thinned(points, most), index, pale=True)
                points = running_mean(points, spans[name])
            _curve(axes, name, thinned(points, most), index)
        if log_y and any(value > 0 for points in series.values() for _, value in points):
            axes.set_yscale("log")
        _plain_ticks(axes.xaxis)
        if all(at == int(at) for points in series.values() for at, _ in points):
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))  # no step is 2.5
        _log_ticks(axes.yaxis) if axes.get_yscale() == "log" else _plain_ticks(axes.yaxis)
        axes.set_xlabel(f"{x} (strong: mean of {max(spans.values())} values)" if spans else x)
        axes.set_ylabel(y)
        return _headed(figure, axes, title, legend=len(series) > 1 and any(series.values()))


def _is_jagged(points: Sequence[tuple[float, float]]) -> bool:
    heights = [value for _, value in points if math.isfinite(value)]
    if len(heights) <= LONG:
        return False
    way = sum(abs(after - before) for before, after in itertools.pairwise(heights))
    return way > JAGGED * (max(heights) - min(heights)) > 0


def running_mean(points: Sequence[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """Return the mean of `span` neighbouring finite values at their mean place, for each place that has as many."""
    finite = [point for point in points if math.isfinite(point[1])]
    sums = [list(itertools.accumulate(column, initial=0.0)) for column in zip(*finite, strict=True)]
    ends = range(span, len(finite) + 1)
    means = [[(total[end] - total[end - span]) / span for end in ends] for total in sums]
    return list(zip(*means, strict=True))


def _curve(
    axes: Axes, name: str, points: Sequence[tuple[float, float]], index: int, *, pale: bool = False
) -> None:
    finite = [(at, value) if math.isfinite(value) else (at, math.nan) for at, value in points]
    axes.plot(
        [at for at, _ in finite],
        [value for _, value in finite],
        color=hue(index),
        label=name if name and points else None,  # one without points keeps its colour for other plots
        alpha=0.35 if pale else 1.0,
        linewidth=0.8 if pale else 1.5,
        linestyle="-" if index < HUES else "--",
        marker="o" if len(finite) <= 12 else "",  # few points, or one alone, would hardly be seen as a line
        markersize=3.5,
    )


def _headed(figure: Figure, axes: Axes, title: str, *, legend: bool) -> Figure:
    """Return the figure with its title over it, and under that, outside the axes, the legend where there is one."""
    if not legend:
        figure.suptitle(title, x=0.01, horizontalalignment="left")
        return figure
    handles, labels = axes.get_legend_handles_labels()
    size = 8.5  # points; a letter is some 0.58 of it wide, the line before a name and the gap behind it 4.5
    entry = size * (0.58 * max(map(len, labels)) + 4.5)
    columns = max(1, min(len(labels), int(72 * WIDTH // entry)))
    figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(labels) / columns))
    figure.legend(
        handles,
        labels,
        title=title or None,
        alignment="left",
        loc="outside upper left",
        ncols=columns,
        fontsize=size,
        title_fontproperties={"size": 10, "weight": "bold"},
        handlelength=1.2,
        borderpad=0.1,
        borderaxespad=0.1,
    )
    return figure


# --- bars and intervals -----------------------------------------------------------------------------------------------


def bars(
    stacks: Mapping[str, Mapping[str, float]], *, unit: str, title: str = "", limit: float | None = None
) -> Figure:
    """Return one stacked horizontal bar per name, its total beside it; `limit` is drawn as a line across them."""
    parts = list(dict.fromkeys(part for stack in stacks.values() for part in stack))
    with _drawing():
        figure, axes = _plot(0.9 + ROW * len(stacks))
        for row, stack in enumerate(stacks.values()):
            left = 0.0
            for part, value in stack.items():
                index = parts.index(part)
                label = part if not any(part in before for before in list(stacks.values())[:row]) else None
                axes.barh(row, value, left=left, color=hue(index), alpha=1.0 if index < HUES else 0.45, label=label)
                left += value
            axes.annotate(f"{left:,.4g}", (left, row), (3, 0), textcoords="offset points", va="center", fontsize=8.5)
        if limit is not None:
            axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label=f"limit {limit:,.4g} {unit}")
        _rows(axes, list(stacks), unit)
        most = max([sum(stack.values()) for stack in stacks.values()] + ([limit] if limit else []), default=1.0)
        axes.set_xlim(0, 1.12 * most or 1.0)
        return _headed(figure, axes, title, legend=len(parts) > 1 or limit is not None)


def intervals(points: Mapping[str, tuple[float, float, float]], *, x: str, title: str = "") -> Figure:
    """Return a mean with its interval, (mean, low, high), per name, one below the other."""
    with _drawing():
        figure, axes = _plot(0.8 + ROW * len(points))
        for row, (mean, low, high) in enumerate(points.values()):
            axes.plot([low, high], [row, row], color=hue(row), linewidth=2.2, solid_capstyle="round")
            axes.plot([mean], [row], color=hue(row), marker="o", markersize=6)
            axes.annotate(f"{mean:.4g}", (mean, row), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
        _rows(axes, list(points), x)
        axes.margins(x=0.08)
        return _headed(figure, axes, title, legend=False)


def _rows(axes: Axes, names: Sequence[str], x: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(x)
    _plain_ticks(axes.xaxis)


# --- drawn ------------------------------------------------------------------------------------------------------------

_TAG = re.compile(r"<[^>]+>")
_LONG = re.compile(r"(\d+\.\d\d)\d+")
_FONT = re.compile(r"font-family: [^;\"]*;? ?")
_UNTURNED = re.compile(r" transform=\"rotate\(-?0 [^)]*\)\"")
_ID = re.compile(r" id=\"([^\"]+)\"")
_COLOUR = re.compile(r"#(?:0100(00|01)|0200(\d\d))\b")


def svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an `<svg>` element to stand in a page: colours from CSS, its ids beginning with `prefix`."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _drawing():
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    whole = stream.getvalue()
    used = set(re.findall(r"#([\w-]+)", "".join(re.findall(r"url\(#[\w-]+\)|href=\"#[\w-]+\"", whole))))
    drawn = _TAG.sub(lambda tag: _tag(tag[0], used, prefix), whole[whole.index("<svg") :])
    drawn = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>[^<]*</style>", "", drawn, flags=re.DOTALL)
    return re.sub(r">\s+<", "><", drawn).strip()


def _tag(tag: str, used: set[str], prefix: str) -> str:
    """Return one tag of matplotlib's with fewer digits, the page's fonts and colours, and ids of this plot alone."""
    if tag.startswith("<svg"):
        tag = re.sub(r" (width|height)=\"[\d.]+pt\"", "", tag)
    tag = _ID.sub(lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", tag)
    tag = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}", tag)
    tag = _UNTURNED.sub("", _FONT.sub("", tag))
    return _LONG.sub(r"\1", _COLOUR.sub(_variable, tag)).replace("\n", "")


def _variable(found: re.Match[str]) -> str:
    if found[2] is not None:
        return f"var(--s{int(found[2], 16)})"
    return "var(--ink)" if found[1] == "00" else "var(--rule)"
