"""Events of a training stage in, its logged figures and their curves out: SVG for a page, PNG and CSV for people."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.events import read_events

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Logged = dict[str, float]
"""All figures that were logged at one step, `step` among them."""

SPEED = "tokens_per_second"
CLOCK = re.compile(r"time\Z|_per_second\Z|runtime\Z|preparation_time\Z")  # differs from run to run
LOSSES = re.compile(r"loss\Z|eval_(.+_)?loss\Z")
HELD = "held out "
CURVES = (  # title, names of what is in it
    ("loss", LOSSES),
    ("rewards", re.compile(r"(eval_)?rewards/(chosen|rejected|margins)\Z")),
    ("reward accuracy", re.compile(r"(eval_)?rewards/accuracies\Z")),
    ("learning rate", re.compile(r"learning_rate\Z")),
    ("gradient norm", re.compile(r"grad_norm\Z")),
    ("tokens per second", re.compile(SPEED + r"\Z")),
)
# Colours that the page replaces by its own, which follow light and dark.
INK, GRID, SERIES = "#010101", "#020202", ("#030101", "#030202", "#030303", "#030404", "#030505", "#030606")
PRINTED = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by all eyes


def history(folder: Path) -> list[Logged]:
    """The logged figures by step; without what a stopped stage did again after its checkpoint."""
    rows: dict[int, Logged] = {}
    before: tuple[float, float] | None = None  # tokens and time of the log before
    for event in read_events(folder):
        if event["kind"] == "total":
            rows = {step: row for step, row in rows.items() if step <= event["step"]}
            before = None
        elif event["kind"] == "log":
            figures = {key: value for key, value in event.items() if isinstance(value, int | float)}
            row = rows.setdefault(event["step"], {})
            row |= figures
            if "loss" in event and "num_tokens" in event:
                tokens, time = event["num_tokens"], event["time"]
                if before is not None and tokens > before[0] and time > before[1]:
                    row[SPEED] = (tokens - before[0]) / (time - before[1])
                before = tokens, time
    return [rows[step] for step in sorted(rows)]


def table(rows: Sequence[Logged]) -> str:
    """The figures as CSV, a line for each step, without what a clock says."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if not CLOCK.search(name)]
    names.sort(key=lambda name: (name != "step", name != "epoch"))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def curves(rows: Sequence[Logged]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title → name → points, for each curve that has a point."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, pattern in CURVES:
        for name in dict.fromkeys(name for row in rows for name in row if pattern.match(name)):
            points = [(row["step"], row[name]) for row in rows if name in row]
            found.setdefault(title, {})[_said(name)] = points
    return found


def _said(name: str) -> str:
    held = name.startswith("eval_")
    word = name.removeprefix("eval_").removeprefix("rewards/").replace("_", " ")
    return HELD + word if held else word


def svg(title: str, series: Mapping[str, Sequence[tuple[float, float]]], key: str, along: str = "step") -> str:
    """A curve as an SVG element for a page; `key` keeps its ids apart from those of other curves."""
    text = io.StringIO()
    with _style(INK, GRID, **{"svg.fonttype": "none", "svg.hashsalt": key}):
        _draw(title, series, SERIES, (3.9, 2.5), along).savefig(
            text, format="svg", transparent=True, metadata={"Date": None}
        )
    found = text.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", found[found.index("<svg") :], flags=re.DOTALL)
    found = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', found)
    found = found.replace("xlink:href", "href")
    found = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", found)
    found = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", found)
    found = found.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for number, colour in enumerate(SERIES, 1):
        found = found.replace(colour, f"var(--c{number})")
    return found


def png(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """A curve as a picture, the same bytes for the same figures."""
    picture = io.BytesIO()
    with _style("#222222", "#dddddd"):
        _draw(title, series, PRINTED, (8, 4.5), "step").savefig(
            picture, format="png", dpi=120, metadata={"Software": None}
        )
    return picture.getvalue()


def _style(ink: str, grid: str, **more: Any) -> Any:
    import matplotlib

    inked = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "text.color")
    plain = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
    sizes = {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False}
    return matplotlib.rc_context({**dict.fromkeys(inked, ink), "grid.color": grid, **plain, **sizes, **more})


def _draw(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    colours: Sequence[str],
    size: tuple[float, float],
    along: str,
) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(name.removeprefix(HELD) for name in series))
    for number, (name, points) in enumerate(series.items()):
        held = name.startswith(HELD)
        place = kinds.index(name.removeprefix(HELD)) if len(kinds) > 1 else number  # one colour a kind, held out dashed
        colour = colours[place % len(colours)]
        steps, values = zip(*points, strict=True)
        mark = "o" if held or len(points) < 12 else ""
        axes.plot(steps, values, "--" if held else "-", marker=mark, markersize=3, color=colour, label=name)
    axes.set_title(title)
    axes.set_xlabel(along)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(series), 3), fontsize=8, columnspacing=1)
    return figure
