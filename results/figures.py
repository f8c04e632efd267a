"""Draw the figures of the report: score changes by language, loss curves, probed layers.

report.py uses them with --write: `draw` makes the figures of a folder, `save` writes them, and
`remove_unused` removes those of earlier reports. Needs matplotlib.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

COLORS = {"baseline": "#222222", "full": "#0072B2", "front": "#D55E00", "back": "#009E73"}
COLORS["mean"] = "k"
UNITS = {
    "loss": "loss, means of 20 steps",
    "retrieval": "nearest by cosine is right, %",
    "margin": "nearest by margin is right, %",
    "drift": "change of weights, %",
}
MARK = "results/report.py"  # metadata of every figure; only figures that have it are removed


def grid(title: str, panels: list[str], unit: str, equal: bool) -> tuple[Figure, list]:
    """Return a figure and the axes of its panels, which have the same limits if `equal`."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure((max(10, 5 * columns), 3 * rows + 1), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False, sharex=equal, sharey=equal).flatten()
    for empty in cells[len(panels) :]:
        empty.remove()
    for axes, name in zip(cells, panels):
        axes.set_title(name)
        axes.tick_params(labelbottom=True)
        axes.grid(axis="y", color="#dddddd")
        axes.set_ylabel(unit if axes.get_subplotspec().is_first_col() else "")
    figure.suptitle(title.replace(": ", ":\n", 1), fontsize=10, wrap=True)
    return figure, [*cells[: len(panels)]]


def add_legend(figure: Figure) -> None:
    """Add one legend below all panels that names each line once, the baseline first."""
    lines = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        lines |= dict(zip(names, handles))
    names = sorted(lines, key=lambda name: name != "baseline")
    handles = [lines[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=9, frameon=False)


def changes(title: str, summary: SimpleNamespace, order: list[str]) -> Figure | None:
    """Draw the changes against the baseline, by language. Returns None if there are none."""
    averaged = set().union(*summary.groups.values())
    languages = [language for language in order if language in averaged]
    change = summary.change[languages].dropna(how="all")
    if change.empty:
        return None
    bar, score = summary.bar.loc[change.index, languages], summary.mean.loc["baseline"]
    title += f": {', '.join(change.index)} against the baseline (its score below the language)"
    if bar.notna().any(axis=None):
        title += "; bars: the larger of the two standard deviations"
    figure, (axes,) = grid(title, [""], "change in points", equal=True)
    axes.axhline(0, color="#666666", linewidth=1)
    distance = min(0.2, 0.012 * len(languages))  # between the strategies of a language
    for i, strategy in enumerate(change.index):
        x = np.arange(len(languages)) + distance * (i - (len(change) - 1) / 2)
        # a single seed has no standard deviation
        error = bar.loc[strategy] if bar.loc[strategy].notna().any() else None
        style = {"color": COLORS.get(strategy, f"C{i}"), "markersize": 4, "linewidth": 1.2}
        axes.errorbar(x, change.loc[strategy], error, fmt="o", label=strategy, **style)
    ticks = [f"{language}\n{score[language]:.0f}" for language in languages]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.6, len(ticks) - 0.4)
    add_legend(figure)
    return figure


def panels_of(part: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return {panel title: table of x by line}.

    There is a panel for each stage with a line for each strategy. Probed sentences have a panel for
    each strategy and stage instead, with a line for each language and their mean; more than eight
    languages are shown as groups.
    """
    panels = {}
    sentences = dict(part.settings.iloc[0]).get("unit") == "sentence"
    many = part.language.nunique() > 8
    by_language = sentences and (part.group.nunique() > 1 or not many)
    for stage, values in part.groupby("name", sort=False):
        if not by_language or part.kind.iloc[0] in ("loss", "drift"):
            panels[stage] = values.pivot_table("value", "x", "strategy", observed=True)
            continue
        for strategy, runs in values.groupby("strategy", observed=True):
            lines = runs.pivot_table("value", "x", "group" if many else "language")
            panels[f"{strategy}, {stage}"] = lines.assign(mean=runs.groupby("x").value.mean())
    return panels


def curves(title: str, part: pd.DataFrame) -> Figure:
    """Draw the losses of one row by step, or its probed values by layer."""
    kind, layer = part.kind.iloc[0], dict(part.settings.iloc[0]).get("layer")
    layers, top = kind != "loss", part.x.max()
    if "task" in {*part.name}:  # put the baseline's only stage beside the alternating task loss
        part = part.replace({"name": {"finetune": "task"}})
    panels = panels_of(part.assign(value=part.value * (100 if layers else 1)))
    lines = [*dict.fromkeys(line for panel in panels.values() for line in panel)]
    strategies = [*part.strategy.sort_values().unique()]
    title += f": {', '.join(strategies)}"
    languages, seeds = part.language.nunique(), part.seed.nunique()
    averaged = [f"{languages} languages"] if languages > 1 and "mean" not in lines else []
    averaged += [f"{seeds} seeds"] if seeds > 1 else []
    title += f"; means of {', '.join(averaged)}" if averaged else ""
    mark = kind in ("retrieval", "margin") and strategies != ["baseline"] and layer
    title += "; dashed: the aligned layer" if mark else ""
    figure, all_axes = grid(title, [*panels], UNITS.get(kind, kind), equal=layers)
    for axes, panel in zip(all_axes, panels.values()):
        for line in panel:
            color = COLORS.get(line, f"C{lines.index(line)}")
            dashes = {"linestyle": (0, (5, 2)), "zorder": 3} if line == "baseline" else {}
            width = 3 if line == "mean" else 1.2
            axes.plot(panel.index, panel[line], label=line, color=color, linewidth=width, **dashes)
        axes.set_xlabel("layer" if layers else "step")
        if mark:
            axes.axvline(int(mark) % (top + 1), color="#666666", linestyle="--")
        if layers:
            high = max(1, *axes.get_ylim()) if kind == "drift" else 100
            axes.set_ylim(-0.02 * high, 1.02 * high)
            axes.set_xticks(range(0, top + 1, 2 if top <= 36 else 4))
    add_legend(figure)
    return figure


@matplotlib.rc_context({"text.parse_math": False})  # a "$" in a name is not a formula
def draw(
    name: str, data: pd.DataFrame, summarise: Callable, escape: Callable, made: dict
) -> dict[str, str]:
    """Draw the figures of a folder and add them to `made`, {file name: figure}.

    Returns {title: Markdown link}, both escaped for Markdown by `escape`.
    """
    drawn = {}  # (title, model, task, row, metric or kind): figure
    order = [*data[data.kind == "score"].groupby("language").value.mean().sort_values().index]
    keys = ["kind", "model", "task", "row"]
    for (kind, model, task, row), part in data.groupby(keys, sort=False):
        if kind != "score":
            title = f"{kind} of {task}, {model}, {row}"
            drawn[title, model, task, row, kind] = curves(title, part)
            continue
        for metric, scores in part.groupby("name", sort=False):
            title = f"{task} {metric}, {model}, {row}"
            drawn[title, model, task, row, metric] = changes(title, summarise(scores), order)
    links, several = {}, data.model.nunique() > 1
    for (title, model, *rest), figure in drawn.items():
        if figure:
            models = [model.split("-base")[0]] if several else []
            parts = [Path(name).resolve().stem, *models, *rest]
            file = re.sub(r"\W+", "-", "-".join(parts)).strip("-")
            if len(file) > 56 or f"{file}.svg" in made:
                file = f"{file[:52]}-{len(made)}"
            made[f"{file}.svg"] = figure
            description = escape(" ".join(figure.get_suptitle().split()))
            links[escape(title)] = f"![{description}](figures/{file}.svg)"
    return links


def save(folder: Path, made: dict[str, Figure]) -> None:
    """Write the figures, {file name: figure}, to a folder."""
    for name, figure in made.items():
        folder.mkdir(exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": name}):  # repeatable bytes
            figure.savefig(folder / name, metadata={"Date": None, "Creator": MARK})


def remove_unused(folder: Path) -> None:
    """Remove figures of earlier reports that no Markdown file in the folder shows any more."""
    pages = [page.read_text("utf-8", "replace") for page in folder.glob("*.md")]
    for old in (folder / "figures").glob("*.svg"):
        shown = any(f"(figures/{old.name})" in text for text in pages)
        if not shown and MARK in old.read_text("utf-8", "replace"):
            old.unlink()
