"""The events of a training stage in, its logged figures and their curves out: SVG for a page, PNG and CSV files."""

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
"""All figures that were logged at one step, including `step`."""

SPEED = "tokens_per_second"
CLOCK = re.compile(r"time\Z|_per_second\Z|runtime\Z|preparation_time\Z")  # these differ from run to run
LOSSES = re.compile(r"loss\Z|eval_(.+_)?loss\Z")
HELD_OUT = "held out "
CURVES = (  # title of a chart, names of the figures in it
    ("loss", LOSSES),
    ("rewards", re.compile(r"(eval_)?rewards/(chosen|rejected|margins)\Z")),
    ("reward accuracy", re.compile(r"(eval_)?rewards/accuracies\Z")),
    ("learning rate", re.compile(r"learning_rate\Z")),
    ("gradient norm", re.compile(r"grad_norm\Z")),
    ("tokens per second", re.compile(SPEED + r"\Z")),
)
# Placeholder colours; `svg` replaces them by CSS colours that follow the light or dark mode of the page.
INK, GRID, SERIES = "#010101", "#020202", ("#030101", "#030202", "#030303", "#030404", "#030505", "#030606")
PRINTED = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito's palette


def history(folder: Path) -> list[Logged]:
    """The logged figures, ordered by step. Steps that were repeated after a resume count once, as repeated."""
    rows: dict[int, Logged] = {}
    before: tuple[float, float] | None = None  # tokens and time of the previous log
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


def as_csv(rows: Sequence[Logged]) -> str:
    """The figures as CSV, a line for each step, without times and speeds."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if not CLOCK.search(name)]
    names.sort(key=lambda name: (name != "step", name != "epoch"))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def curves(rows: Sequence[Logged]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of a chart → name of a series → its (step, value) points, for each chart that has a point."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, pattern in CURVES:
        for name in dict.fromkeys(name for row in rows for name in row if pattern.match(name)):
            points = [(row["step"], row[name]) for row in rows if name in row]
            charts.setdefault(title, {})[_series_name(name)] = points
    return charts


def _series_name(name: str) -> str:
    words = name.removeprefix("eval_").removeprefix("rewards/").replace("_", " ")
    return HELD_OUT + words if name.startswith("eval_") else words


def svg(title: str, series: Mapping[str, Sequence[tuple[float, float]]], key: str, along: str = "step") -> str:
    """A chart as an SVG element for a page; `key` makes its ids unique there, `along` names the horizontal axis."""
    text = io.StringIO()
    with _style(INK, GRID, **{"svg.fonttype": "none", "svg.hashsalt": key}):
        _draw(title, series, SERIES, (3.9, 2.5), along).savefig(
            text, format="svg", transparent=True, metadata={"Date": None}
        )
    markup = text.getvalue()
    markup = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", markup[markup.index("<svg") :], flags=re.DOTALL)
    markup = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', markup
    )
    markup = markup.replace("xlink:href", "href")
    markup = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", markup)
    markup = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--font)", markup)
    markup = markup.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for number, colour in enumerate(SERIES, 1):
        markup = markup.replace(colour, f"var(--c{number})")
    return markup


def png(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """A chart as a PNG picture, the same bytes for the same figures."""
    picture = io.BytesIO()
    with _style("#222222", "#dddddd"):
        _draw(title, series, PRINTED, (8, 4.5), "step").savefig(
            picture, format="png", dpi=120, metadata={"Software": None}
        )
    return picture.getvalue()


def _style(ink: str, grid: str, **more: Any) -> Any:
    """Matplotlib's settings for a chart, as a context manager."""
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
    kinds = list(dict.fromkeys(name.removeprefix(HELD_OUT) for name in series))
    for number, (name, points) in enumerate(series.items()):
        held_out = name.startswith(HELD_OUT)
        place = kinds.index(name.removeprefix(HELD_OUT)) if len(kinds) > 1 else number  # one colour for each kind
        colour = colours[place % len(colours)]
        steps, values = zip(*points, strict=True)
        mark = "o" if held_out or len(points) < 12 else ""
        axes.plot(steps, values, "--" if held_out else "-", marker=mark, markersize=3, color=colour, label=name)
    axes.set_title(title)
    axes.set_xlabel(along)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(series), 3), fontsize=8, columnspacing=1)
    return figure
