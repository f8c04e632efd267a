"""Figures of the report: changes of scores by language, curves of losses, layers of the probe.

report.py asks for them with --write: draw() makes those of a folder, save() writes them and removes
those of earlier reports that no file shows any more. Needs matplotlib.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

COLORS = {"baseline": "#222222", "full": "#0072B2", "front": "#D55E00", "back": "#009E73", "mean": "k"}
UNITS = {
    "loss": "loss, means of 20 steps",
    "retrieval": "nearest by cosine is right, %",
    "margin": "nearest by margin is right, %",
    "drift": "change of weights, %",
}
MARK = "results/report.py"  # in the metadata of every figure: it is ours


def grid(title: str, panels: list[str], unit: str, equal: bool) -> tuple[Figure, list]:
    """A figure with a title, and the axes of its panels; equal: all with the same limits."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((max(10, 5 * columns), 3 * rows + 1), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, sharex=equal, sharey=equal).flatten()
    for spare in places[len(panels) :]:
        spare.remove()
    for axes, name in zip(places, panels):
        axes.set_title(name)
        axes.tick_params(labelbottom=True)
        axes.grid(axis="y", color="#dddddd")
        axes.set_ylabel(unit if axes.get_subplotspec().is_first_col() else "")
    figure.suptitle(title.replace(": ", ":\n", 1), fontsize=10, wrap=True)
    return figure, [*places[: len(panels)]]


def add_legend(figure: Figure) -> None:
    """One legend below all panels, with each line once, the baseline first."""
    lines = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        lines |= dict(zip(names, handles))
    names = sorted(lines, key=lambda name: name != "baseline")
    handles = [lines[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=9, frameon=False)


def changes(title: str, found: SimpleNamespace, order: list[str]) -> Figure | None:
    """The changes of a summary against the baseline, languages in this order; None of none."""
    averaged = set().union(*found.groups.values())
    languages = [language for language in order if language in averaged]
    change = found.change[languages].dropna(how="all")
    if change.empty:
        return None
    bar, score = found.bar.loc[change.index, languages], found.mean.loc["baseline"]
    title += f": {', '.join(change.index)} against the baseline (its score below the language)"
    if bar.notna().any(axis=None):
        title += "; bars: the larger of the two standard deviations"
    figure, (axes,) = grid(title, [""], "change in points", equal=True)
    axes.axhline(0, color="#666666", linewidth=1)
    apart = min(0.2, 0.012 * len(languages))  # of the strategies of a language
    for i, strategy in enumerate(change.index):
        x = np.arange(len(languages)) + apart * (i - (len(change) - 1) / 2)
        error = bar.loc[strategy] if bar.loc[strategy].notna().any() else None  # none of one seed
        look = {"color": COLORS.get(strategy, f"C{i}"), "markersize": 4, "linewidth": 1.2}
        axes.errorbar(x, change.loc[strategy], error, fmt="o", label=strategy, **look)
    ticks = [f"{language}\n{score[language]:.0f}" for language in languages]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.6, len(ticks) - 0.4)
    add_legend(figure)
    return figure


def panels_of(part: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{title of a panel: x by line}: a panel for each stage, with a line for each strategy.

    Of sentences a panel for each strategy and stage, with lines for languages or groups and their mean,
    unless there are many languages of one group.
    """
    panels = {}
    sentences = dict(part.settings.iloc[0]).get("unit") == "sentence"
    many = part.language.nunique() > 8
    apart = sentences and (part.group.nunique() > 1 or not many)
    for stage, staged in part.groupby("name", sort=False):
        if not apart or part.kind.iloc[0] in ("loss", "drift"):
            panels[stage] = staged.pivot_table("value", "x", "strategy", observed=True)
            continue
        for strategy, one in staged.groupby("strategy", observed=True):
            lines = one.pivot_table("value", "x", "group" if many else "language")
            panels[f"{strategy}, {stage}"] = lines.assign(mean=one.groupby("x").value.mean())
    return panels


def curves(title: str, part: pd.DataFrame) -> Figure:
    """The losses of one row by step, or what the probe measured by layer, with equal axes."""
    kind, layer = part.kind.iloc[0], dict(part.settings.iloc[0]).get("layer")
    layers, top = kind != "loss", part.x.max()
    if "task" in {*part.name}:  # in turn with alignment; the baseline has it alone
        part = part.replace({"name": {"finetune": "task"}})
    panels = panels_of(part.assign(value=part.value * (100 if layers else 1)))
    lines = [*dict.fromkeys(line for panel in panels.values() for line in panel)]
    strategies = [*part.strategy.sort_values().unique()]
    title += f": {', '.join(strategies)}"
    counts = {"languages": "mean" not in lines and part.language.nunique(), "seeds": part.seed.nunique()}
    means = ", ".join(f"{count} {what}" for what, count in counts.items() if count > 1)
    title += f"; means of {means}" if means else ""
    mark = kind in ("retrieval", "margin") and strategies != ["baseline"] and layer
    title += "; dashed: the aligned layer" if mark else ""
    figure, places = grid(title, [*panels], UNITS.get(kind, kind), equal=layers)
    for axes, panel in zip(places, panels.values()):
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


def draw(name: str, data: pd.DataFrame, summarise: Callable, made: dict[str, Figure]) -> dict[str, str]:
    """Add the figures of a folder to those made {file: figure}; returns {heading: Markdown}."""
    drawn = {}  # {(heading, model, task, row, metric or kind): figure}
    order = [*data[data.kind == "score"].groupby("language").value.mean().sort_values().index]
    for (kind, model, task, row), part in data.groupby(["kind", "model", "task", "row"], sort=False):
        if kind != "score":
            title = f"{kind} of {task}, {model}, {row}"
            drawn[title, model, task, row, kind] = curves(title, part)
            continue
        for metric, some in part.groupby("name", sort=False):
            title = f"{task} {metric}, {model}, {row}"
            drawn[title, model, task, row, metric] = changes(title, summarise(some), order)
    links, several = {}, data.model.nunique() > 1
    for (title, model, *rest), figure in drawn.items():
        if figure:
            parts = [Path(name).resolve().stem, *[model.split("-base")[0]] * several, *rest]
            file = re.sub(r"\W+", "-", "-".join(parts)).strip("-")
            if len(file) > 56 or f"{file}.svg" in made:
                file = f"{file[:52]}-{len(made)}"
            made[f"{file}.svg"] = figure
            links[title] = f"![{' '.join(figure.get_suptitle().split())}](figures/{file}.svg)"
    return links


def save(page: Path, made: dict[str, Figure]) -> None:
    """Write figures beside a Markdown file; remove our own that no such file shows any more."""
    folder = page.parent / "figures"
    for name, figure in made.items():
        folder.mkdir(exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same bytes each time
            figure.savefig(folder / name, metadata={"Date": None, "Creator": MARK})
    pages = [one.read_text("utf-8", "replace") for one in {page, *page.parent.glob("*.md")}]
    for old in folder.glob("*.svg"):
        shown = any(f"(figures/{old.name})" in text for text in pages)
        if not shown and MARK in old.read_text("utf-8", "replace"):
            old.unlink()
