"""One curve as an SVG: requests a second on the left, the server's CPU time a request on the right.

The same data give the same bytes, so that a drawing changes in the repository when its numbers do:
no date, no random ids, text as text. Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

if TYPE_CHECKING:
    from plots import Curve

# It measures text with the first font, and need not warn that it has not every other.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

COLOURS = {"nbdkit": "#d95f02", "pynbdkit": "#1f6fb4"}
DASHES = {
    "read": "-",
    "write": "--",
    "coroutines": "-",
    "16 threads": "--",
    "64 threads": ":",
}
MARKERS = {"nbdkit": "s", "pynbdkit": "o"}
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pynbdkit",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],  # the second is for who looks at it
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size(nbytes: float) -> str:
    """Return a size as people say it: 4096 is "4 KiB", and 2⁶³ - 512 "8 EiB"."""
    for unit in UNITS:
        if round(nbytes) < 1024 or unit == UNITS[-1]:
            break
        nbytes /= 1024
    return f"{nbytes:.3g} {unit}"


def number(value: float) -> str:
    """Return a number short enough for an axis: 20000 is "20k"."""
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def footer(facts: Mapping[str, str]) -> str:
    """Return what was measured on, in one line."""
    keys = ("machine", "kernel", "versions", "runs", "date")
    return "; ".join(facts[key] for key in keys if key in facts)


def svg(curve: Curve, data: Mapping[str, Any]) -> str:
    """Return the drawing of a curve's data, as plots.py writes them."""
    text = io.StringIO()
    with mpl.rc_context(SETTINGS):
        _figure(curve, data).savefig(text, format="svg", metadata=NO_METADATA)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _figure(curve: Curve, data: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(9.6, 4.2))
    figure.suptitle(f"{curve.title[0].upper()}{curve.title[1:]}", fontsize=11)
    left, right = figure.subplots(1, 2)
    for axes, column, title in (
        (left, 1, "requests a second"),
        (right, 2, "server CPU a request, µs"),
    ):
        for line in data["lines"]:
            axes.plot(
                [point[0] for point in line["points"]],
                [point[column] for point in line["points"]],
                DASHES.get(line["what"], "-"),
                color=COLOURS[line["server"]],
                marker=MARKERS[line["server"]],
                label=f"{line['server']}, {line['what']}",
            )
        _axes(axes, curve, data)
        axes.set_title(title, fontsize=10)
    left.legend(frameon=False, fontsize=8)
    figure.text(0.5, 0.012, footer(data["facts"]), ha="center", fontsize=6, color="#666666")
    figure.subplots_adjust(left=0.07, right=0.985, top=0.85, bottom=0.18, wspace=0.16)
    return figure


def _axes(axes: Any, curve: Curve, data: Mapping[str, Any]) -> None:
    values = sorted({point[0] for line in data["lines"] for point in line["points"]})
    if curve.log[0]:
        axes.set_xscale("log", base=2)
    if curve.log[1]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(curve.x)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    show = size if curve.sizes else number
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
