"""The curves of a run and the spread of data, as pictures for a light and for a dark page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data_report import Histogram
from alignkit.facts import Series, series, show

_INK = "#7d838c"
_COLORS = ("#3f86d9", "#e07b39", "#3aa387", "#b065c9", "#c9a227", "#d3566b")
_SMOOTH_FROM = 30
"""Curves of at least so many points get a running mean on top."""
_MOST = 24
"""Panels at most; what is left out stays in metrics.jsonl, and the report says so."""


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
        title: of the panel.
        file: its file name.
        png: the bytes.
        alt: what it shows, in words.
    """

    title: str
    file: str
    png: bytes
    alt: str


_PANELS: Mapping[str, tuple[str, ...]] = {
    "Loss": ("loss",),
    "Implicit rewards": ("rewards/chosen", "rewards/rejected"),
    "Reward margin": ("rewards/margins",),
    "Reward accuracy": ("rewards/accuracies",),
    "Accuracy by timestep": ("accuracy/",),
    "Loss by timestep": ("loss/",),
    "Log-ratio to the reference": ("log_ratio/chosen", "log_ratio/rejected"),
    "Denoising error above the reference's": ("error/chosen", "error/rejected"),
    "Scores": ("objective/scores",),
    "Scores and rewards by part": ("objective/scores/",),
    "KL to the reference, nats per answer": ("objective/kl",),
    "Strength of the KL": ("objective/kl_coef",),
    "Entropy per token": ("policy/entropy",),
    "Share of clipped ratios": ("policy/clipfrac",),
    "KL of the update, per token": ("policy/approxkl",),
    "Explained variance of the critic": ("critic/explained_variance",),
    "Length of answers in tokens": ("answers/length",),
    "Share of answers that ended": ("answers/ended",),
    "Length of samples in tokens": (
        "samples/tokens_median",
        "samples/tokens_p95",
        "samples/tokens_max",
    ),
    "Samples cut by the limit": ("samples/cut",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("learning_rate",),
}
"""Panels that come first, and their metrics; evaluation curves of the same names join them. A name
that ends in a slash is a family's."""


def draw_plots(records: Sequence[Mapping[str, Any]]) -> tuple[list[Plot], list[str]]:
    """A picture per panel, and the names of metrics that found no place."""
    curves = series(records)
    panels = _arrange(curves)
    left_out = [name for names in list(panels.values())[_MOST:] for name in names]
    plots: list[Plot] = []
    for title, names in list(panels.items())[:_MOST]:
        chosen = {name: curves[name] for name in names}
        slug = _slug(title)
        taken = {plot.file for plot in plots}
        file = f"{slug}.png" if f"{slug}.png" not in taken else f"{slug}-{len(plots)}.png"
        plots.append(Plot(title, file, _draw(chosen), _words(title, chosen)))
    return plots, left_out


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "plot"


def _arrange(curves: Series) -> dict[str, list[str]]:
    """Panel title -> metric names, each metric in exactly one panel."""
    home = {name: title for title, names in _PANELS.items() for name in names}
    panels: dict[str, list[str]] = {title: [] for title in _PANELS}
    for name in sorted(curves, key=lambda name: (name.startswith("eval/"), name)):
        base = name.removeprefix("eval/")
        # A named evaluation set stands between: eval/<set>/loss.
        places = (title for metric, title in home.items() if _is_of(base, metric))
        title = next(places, base)
        panels.setdefault(title, []).append(name)
    for title, names in panels.items():
        order = _PANELS.get(title, ())
        names.sort(key=lambda name: (order.index(name) if name in order else len(order), name))
    return {title: names for title, names in panels.items() if names}


def _is_of(name: str, metric: str) -> bool:
    """Whether a curve is of a panel's metric or of its family, of whichever evaluation set."""
    if metric.endswith("/"):
        return f"/{name}".rpartition("/")[0].endswith(f"/{metric[:-1]}")
    return f"/{name}".endswith(f"/{metric}")


def _draw(curves: Series) -> bytes:
    def fill(axes: Any) -> None:
        for index, (name, points) in enumerate(curves.items()):
            _draw_curve(axes, name, points, _COLORS[index % len(_COLORS)])
        if all("accurac" in name for name in curves):
            axes.set_ylim(-0.03, 1.03)
            axes.axhline(0.5, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.margins(x=0.02)
        axes.set_xlabel("optimizer step")
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=10)

    return _png(fill)


def draw_histogram(histogram: Histogram) -> Plot:
    """How values are spread, as outlines over common bins, up to the 99.5th percentile."""
    import numpy as np

    series = {name: np.asarray(values) for name, values in histogram.series.items() if len(values)}
    together = np.concatenate(list(series.values()))
    edges = np.histogram_bin_edges(np.clip(together, None, np.percentile(together, 99.5)), 40)
    shown = {name: mark for name, mark in histogram.marks.items() if mark <= edges[-1]}

    def fill(axes: Any) -> None:
        for index, (name, values) in enumerate(series.items()):
            axes.stairs(
                np.histogram(np.clip(values, None, edges[-1]), edges)[0],
                edges,
                color=_COLORS[index % len(_COLORS)],
                linewidth=1.7,
                label=name,
            )
        for name, mark in shown.items():
            axes.axvline(mark, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), label=name)
        axes.set_xlabel(histogram.unit)
        axes.set_ylabel("rows")
        axes.set_ylim(bottom=0)
        if len(series) + len(shown) > 1:
            axes.legend(frameon=False, fontsize=10)

    words = "; ".join(
        f"{name} has median {show(float(np.median(values)))}, and 90 % are up to "
        f"{show(float(np.percentile(values, 90)))} {histogram.unit}"
        for name, values in series.items()
    )
    title = histogram.title
    return Plot(title, f"{_slug(title)}.png", _png(fill), f"{title}: {words}.")


def _png(fill: Callable[[Any], None]) -> bytes:
    """A picture of one panel, which `fill` draws."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "text.parse_math": False,  # metric names are not formulas
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure = Figure(figsize=(4.4, 2.8), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(color=_INK, alpha=0.2, linewidth=0.6)
        axes.locator_params(nbins=5)
        fill(axes)
        out = io.BytesIO()
        figure.savefig(out, format="png", transparent=True, metadata={"Software": None})
    return out.getvalue()


def _draw_curve(axes: Any, name: str, points: Sequence[tuple[float, float]], color: str) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    few = name.startswith("eval/") or len(points) < 3
    if len(points) < _SMOOTH_FROM or name == "learning_rate":
        marker = {"marker": "o", "markersize": 4.5} if few else {}
        axes.plot(steps, values, color=color, linewidth=1.7, label=name, **marker)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, _running_mean(values), color=color, linewidth=1.8, label=name)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the curve, centred, narrower at the ends."""
    half = max(1, len(values) // 40)
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(total[high] - total[low]) / (high - low) for low, high in ends]


def _words(title: str, curves: Series) -> str:
    parts = [
        f"{name} goes from {show(points[0][1])} at step {show(points[0][0])} "
        f"to {show(points[-1][1])} at step {show(points[-1][0])}"
        for name, points in curves.items()
    ]
    return f"{title}: {'; '.join(parts)}."
