"""Draw the figures of the report: score changes by language, loss curves, probed layers.

report.py uses them with --write: `draw` makes the figures of a folder, `save` writes them, and
`remove_unused` removes those of earlier reports. Needs matplotlib.

    python results/figures.py       write the figure of the top README to results/figures
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
from records import BEFORE, KINDS, LOSSES, PAPER, load, read

# The lines and markers can be told apart without colour.
COLORS = {"baseline": "#222222", "full": "#0072B2", "front": "#D55E00", "back": "#009E73"}
COLORS |= {"mean": "k", BEFORE: "#777777"}
DASHES = {"baseline": (0, (5, 2)), "front": (0, (5, 1, 1, 1)), "back": (0, (3, 1)), BEFORE: ":"}
MARKERS = {"full": {"marker": "o", "mfc": "white"}, "front": {"marker": "D"}}
SCHEDULES = {
    "before": "realigned before fine-tuning",
    "during": "realigned during fine-tuning",
    "alternate": "task and alignment in turn",
}
UNITS = {"loss": "loss, mean of 20 steps", "drift": "change of the weights, %"}
UNITS |= {"validation": "loss of all validation examples"}
WIDTH = 8.85  # inches: 850 pixels, the width of a README on GitHub
STYLE = {"font.size": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8}
STYLE |= {"legend.handlelength": 3, "text.parse_math": False}  # a "$" in a name is no formula
MARK = "results/report.py"  # metadata of every figure; only figures that have it are removed


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


def spelled_out(row: str) -> str:
    """Return the label of a table row with its schedule, the first word, as a phrase."""
    return re.sub(r"^\w+", lambda word: SCHEDULES.get(word[0], word[0]), row)


def grid(title: str, panels: list[str], unit: str, equal: bool) -> tuple[Figure, list]:
    """Return a figure and the axes of its panels, which have the same limits if `equal`."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure((WIDTH, 2.5 * rows + 1.1), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False, sharex=equal, sharey=equal).flatten()
    for empty in cells[len(panels) :]:
        empty.remove()
    for axes, name in zip(cells, panels):
        axes.set_title(name)
        axes.tick_params(labelbottom=True)
        axes.grid(axis="y", color="#dddddd")
        axes.set_ylabel(unit if axes.get_subplotspec().is_first_col() else "")
    figure.suptitle(title, fontsize=10, wrap=True)
    return figure, [*cells[: len(panels)]]


def add_legend(figure: Figure) -> None:
    """Add one legend below all panels that names each line once, the baseline first."""
    lines = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        lines |= dict(zip(names, handles))
    names = sorted(lines, key=lambda name: name != "baseline")
    handles = [lines[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=8, frameon=False)


def changes(title: str, row: str, summary: SimpleNamespace) -> Figure | None:
    """Draw the changes against the baseline, by language. Returns None if there are none.

    The languages of a group are ordered by the baseline's score; the group's mean follows.
    """
    score, places = summary.mean.loc["baseline"], {}  # {language or average: x}
    for average, languages in summary.groups.items():
        left = max(places.values(), default=-1) + 1
        ordered = score[languages].sort_values().index
        places |= {language: left + i for i, language in enumerate(ordered)}
        if len(languages) > 1:
            places[average] = left + len(languages) + 0.4
    columns = [*places]
    change = summary.change[columns].dropna(how="all")
    if change.empty:
        return None
    bar = summary.bar.loc[change.index, columns]
    noun = "alignment" if row.startswith("alternate") else "realignment"
    title += f": change by {noun}, {count(summary.points.index.unique('seed').size, 'seed')}\n"
    title += f"{spelled_out(row)}; below: the baseline's score"
    title += "; bars: the larger standard deviation" if bar.notna().any(axis=None) else ""
    figure, (axes,) = grid(title, [""], "change in points", equal=True)
    axes.axhline(0, color="#666666", linewidth=1)
    distance = min(0.22, 0.012 * len(columns))  # between the strategies of a language
    for i, strategy in enumerate(change.index):
        x = np.array([*places.values()]) + distance * (i - (len(change) - 1) / 2)
        # a single seed has no standard deviation
        error = bar.loc[strategy] if bar.loc[strategy].notna().any() else None
        style = {"color": COLORS.get(strategy, f"C{i}"), "markersize": 4, "linewidth": 1}
        style |= MARKERS.get(strategy, {"marker": "^"})
        axes.errorbar(x, change.loc[strategy], error, linestyle="", label=strategy, **style)
    name_columns(axes, summary, places)
    add_legend(figure)
    return figure


def name_columns(axes, summary: SimpleNamespace, places: dict[str, float]) -> None:
    """Write the languages below the axes, and above it their groups if there are several."""
    ticks, groups = [], summary.groups
    for column in places:
        name = "mean" if column in groups else column
        ticks.append(f"{name}\n{summary.mean.loc['baseline', column]:.0f}")
    axes.set_xticks([*places.values()], ticks)
    for label, column in zip(axes.get_xticklabels(), places):
        label.set_fontweight("bold" if column in groups else "normal")
    axes.set_xlim(-0.7, max(places.values()) + 0.7)
    for average, languages in groups.items() if len(groups) > 1 else ():
        x = [places[column] for column in [*languages, average] if column in places]
        anchor = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        axes.annotate(average, ((min(x) + max(x)) / 2, 1.01), **anchor)
        if max(x) < max(places.values()):
            axes.axvline(max(x) + 0.5, color="#aaaaaa", linewidth=1)


def panels_of(part: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return {panel title: table of x by line}.

    There is a panel for each stage with a line for each strategy. Probed sentences have a panel for
    each strategy and stage instead, with a line for each language and their mean; more than eight
    languages are shown as groups. What was probed before training is the same for all strategies:
    it is a dotted line in the other panels.
    """
    panels, groups = {}, part.group.nunique()
    many, sentences = part.language.nunique() > 8, ("unit", "sentence") in part.settings.iloc[0]
    by_language = sentences and (groups > 1 or not many) and part.language.any()
    if groups > 1:  # tell aligned languages from others
        part = part.assign(language=part.group if many else part.language + ", " + part.group)
    before = part[part.name == BEFORE].groupby("x").value.mean()
    for stage, values in part.groupby("name", sort=False):
        if stage != BEFORE and values.groupby("x").value.mean().equals(before):
            continue  # nothing was trained
        by_strategy = values.groupby("strategy", observed=True)
        if not by_language:
            panels[stage] = values.pivot_table("value", "x", "strategy", observed=True)
            continue
        for title, runs in [(stage, values)] if stage == BEFORE else by_strategy:
            title = stage if stage == BEFORE else f"{title}, {stage}"
            lines = runs.pivot_table("value", "x", "language")
            panels[title] = lines.assign(mean=runs.groupby("x").value.mean())
    if len(panels) > 1 and len(before):
        if not by_language:
            del panels[BEFORE]
        for title, panel in panels.items():
            panels[title] = panel if title == BEFORE else panel.assign(**{BEFORE: before})
    return panels


def curves(title: str, row: str, part: pd.DataFrame) -> Figure | None:
    """Draw the losses of one row by step, or its probed values by layer. None without a change."""
    if not part.value.any() or part.x.nunique() == 1:
        return None
    kind, layer = part.kind.iloc[0], dict(part.settings.iloc[0]).get("layer")
    layers, top = kind not in LOSSES, part.x.max()
    if "task" in {*part.name}:  # put the baseline's only stage beside the alternating task loss
        part = part.replace({"name": {"finetune": "task"}})
    panels = panels_of(part.assign(value=part.value * (100 if layers else 1)))
    lines = [*dict.fromkeys(line for panel in panels.values() for line in panel)]
    strategies = [*part.strategy.unique()]
    languages = part.language.nunique()
    title += f", {count(languages, 'language')}" if languages > 1 else ""
    title += f", {count(part.seed.nunique(), 'seed')}\n{spelled_out(row)}"
    mark = kind in ("retrieval", "margin") and strategies != ["baseline"] and layer
    title += "; vertical line: the aligned layer" if mark else ""
    unit = UNITS.get(kind, "translations retrieved, %")
    figure, all_axes = grid(title, [*panels], unit, equal=layers)
    for axes, panel in zip(all_axes, panels.values()):
        for line in panel:
            color = COLORS.get(line, f"C{lines.index(line)}")
            style = {"linestyle": DASHES.get(line, "-"), "linewidth": 3 if line == "mean" else 1.4}
            axes.plot(panel.index, panel[line], label=line, color=color, **style)
        axes.set_xlabel("layer" if layers else "step")
        if mark:
            axes.axvline(int(mark) % (top + 1), color="#aaaaaa", zorder=0)
        if layers:
            high = 100 if kind != "drift" else max(1, *part.value * 100)
            axes.set_ylim(-0.02 * high, 1.02 * high)
            axes.set_xticks(range(0, top + 1, 2 if top <= 36 else 4))
    add_legend(figure)
    return figure


@matplotlib.rc_context(STYLE)
def draw(
    name: str, data: pd.DataFrame, summarise: Callable, escape: Callable, made: dict
) -> dict[str, str]:
    """Draw the figures of a folder and add them to `made`, {file name: figure}.

    Returns {title: Markdown link}, both escaped for Markdown by `escape`.
    """
    links, folder, several = {}, Path(name).resolve().stem, data.model.nunique() > 1
    data = data.assign(what=data.name.where(data.kind == "score", data.kind))
    groups = data.groupby(["kind", "model", "task", "row", "what"], sort=False)
    for (kind, model, task, row, what), part in groups:
        if kind == "score":
            title = f"{task} {what}, {model}"
            figure = changes(title, row, summarise(part))
        else:
            title = f"{KINDS[kind]}, {task}, {model}"
            figure = curves(title, row, part)
        if figure:
            parts = [folder, *[model.split("-base")[0]] * several, task, row, what]
            file = re.sub(r"\W+", "-", "-".join(parts)).strip("-").lower()
            file += f"-{len(made)}" * (f"{file}.svg" in made)
            made[f"{file}.svg"] = figure
            description = escape(" ".join(figure.get_suptitle().split()))
            links[escape(f"{title}, {row}")] = f"![{description}](figures/{file}.svg)"
    return links


def save(folder: Path, made: dict[str, Figure], mark: str = MARK) -> None:
    """Write the figures, {file name: figure}, to a folder."""
    for name, figure in made.items():
        folder.mkdir(exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": name}):  # repeatable bytes
            figure.savefig(folder / name, metadata={"Date": None, "Creator": mark})


def remove_unused(folder: Path) -> None:
    """Remove figures of earlier reports that no Markdown file in the folder shows any more."""
    pages = [page.read_text("utf-8", "replace") for page in folder.glob("*.md")]
    for old in (folder / "figures").glob("*.svg"):
        shown = any(f"(figures/{old.name})" in text for text in pages)
        if not shown and MARK in old.read_text("utf-8", "replace"):
            old.unlink()


def front_against_full(summary: SimpleNamespace) -> Figure:
    """Draw two changes by language, joined by a line: of full realignment and front-freezing."""
    (languages,) = summary.groups.values()
    change = summary.change[languages].sort_values("full", axis=1)
    x = [*range(len(languages)), len(languages) + 1]  # the mean stands apart
    full, front = ([*change.loc[one], change.loc[one].mean()] for one in ("full", "front"))
    title = "PoS accuracy, XLM-R, published scores: change by full realignment and front-freezing\n"
    title += f"{len(languages)} languages, ordered by the change with full realignment; "
    title += f"means of {summary.points.index.unique('seed').size} seeds"
    figure, (axes,) = grid(title, [""], "change in points", equal=True)
    axes.axhline(0, color="#222222", linewidth=1)
    axes.axhspan(-9, 0, color="#eeeeee", zorder=0)
    axes.vlines(x, full, front, color="#999999", linewidth=1.5, zorder=1)
    strategies = {"full": ("full realignment", full), "front": ("front-freezing", front)}
    for strategy, (name, y) in strategies.items():
        counts = summary.cells.loc[strategy, "average"].split()[-1]
        label = "{}: {} up, {} down".format(name, *counts.split("/"))
        style = {"linestyle": "", "markersize": 5.5, **MARKERS[strategy]}
        axes.plot(x, y, color=COLORS[strategy], label=label, **style)
        axes.annotate(f" {y[-1]:+.1f}", (x[-1] + 0.3, y[-1]), va="center")
    axes.set_xticks(x, [*change, "mean"])
    axes.get_xticklabels()[-1].set_fontweight("bold")
    axes.set_xlim(-0.7, x[-1] + 2.2)
    axes.set_ylim(min(full + front) - 0.4, max(full + front) + 0.4)
    axes.text(x[-1] + 2, -0.1, "below the baseline", ha="right", va="top", color="#444444")
    heading = "Languages that change by more than one standard deviation"
    axes.legend(loc="upper left", title=heading, alignment="left")
    return figure


@matplotlib.rc_context(STYLE)
def main() -> None:
    """Draw the published scores of XLM-R for the top README."""
    from report import summarise

    scores = load(read(PAPER), published=False)
    scores = scores.query("model == 'xlm-roberta-base' and task == 'PoS'")
    figure = front_against_full(summarise(scores[scores.row == "before, dictionary"]))
    save(PAPER.parent / "figures", {"xlm-r-front-against-full.svg": figure}, Path(__file__).name)


if __name__ == "__main__":
    main()
