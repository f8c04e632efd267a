"""Make tables and figures from our own records and from published scores.

    python results/report.py                                the records below results/runs
    python results/report.py results/paper.csv              the published scores
    python results/report.py results/e5-* --write FILE.md   also write a file, with figures

An argument is a folder (every *.json below it is read), a record of alignfreeze.py, or a CSV file
such as paper.csv. The report is printed as Markdown. A file that cannot be read is left out and
named on stderr; the exit code is 2 if an argument has no records.
"""

import argparse
import functools
import importlib.util
import itertools
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from records import KINDS, LOSSES, NAMES, PAPER, describe, load, printable, read, shared, warn

MARKER = "# Made by `python "  # how a written report begins; other files are not overwritten
LEGEND = """Scores are percentages: mean ± sample standard deviation over seeds, then the change
against the baseline. ▲ and ▼ mark changes larger than one standard deviation (the larger of the
two), · marks smaller ones. "5/1" counts the languages marked ▲ and ▼. Averages leave out the source
language and languages that some run of the row lacks. Layer 0 is the embeddings. A loss is the
mean of 20 steps; a step is one batch of the task or of sentence pairs. "2-5" seeds: one strategy
has 2, another 5; a change is over the seeds of both.

Paired tables compare runs of the same seed: the mean difference, its 95% bootstrap interval over
seeds and languages, and the number of languages that are up and down by paired t-tests at 5% with
Holm's correction. They can disagree with the marks: pairing removes what a seed does to both runs,
but Holm's correction asks more of each language when there are many."""


def summarise(part: pd.DataFrame) -> SimpleNamespace:
    """Summarise one metric of one row, in percentage points.

    Returns tables whose columns are languages and averages. `points` has a line for each (strategy,
    seed). The others have one for each strategy: `mean`; `change` against the baseline, over the
    seeds of both; `bar`, the larger of the two standard deviations; and `cells`, the printed text.
    `groups` is {average: languages}.
    """
    points = 100 * part.pivot(index=["strategy", "seed"], columns="language", values="value")
    order = part.assign(target=part.group != "source").sort_values(["target", "language"])
    points, groups = points[order.language.unique()], {}
    for average, targets in order[order.target].groupby("group"):
        complete = points[targets.language.unique()].dropna(axis=1)
        if not complete.empty:
            groups[average] = [*complete]
            points[average] = complete.mean(axis=1)
    runs = points.groupby("strategy", observed=False)
    mean, sd = runs.mean(), runs.std()
    base = points[points.index.get_level_values("strategy") == "baseline"].droplevel("strategy")
    difference = points - base.reindex(points.index.get_level_values("seed")).to_numpy()
    difference = difference.drop("baseline", errors="ignore")
    change = difference.groupby("strategy", observed=False).mean().reindex(mean.index)
    bar = np.maximum(sd, sd.loc[["baseline"]].to_numpy())
    beyond = np.sign(change) * (change.abs() > bar)
    cells = mean.map("{:.1f}".format) + sd.map(" ± {:.1f}".format) + change.map(" {:+.1f}".format)
    cells += beyond.where(bar.notna()).map({0: " ·", 1: " ▲", -1: " ▼"}.get).fillna("")
    cells = cells.replace({" . nan| .nan": "", " -0.0": " +0.0", "^nan.*": "-"}, regex=True)
    for average, languages in groups.items():
        up, down = ((beyond[languages] == sign).sum(axis=1).astype(str) for sign in (1, -1))
        marked = cells[average].str.contains("[·▲▼]")
        cells[average] += (" " + up + "/" + down).where(marked, "")
    tables = {"points": points, "mean": mean, "change": change, "bar": bar, "cells": cells}
    return SimpleNamespace(groups=groups, **tables)


def t_tail(t: np.ndarray, freedom: int) -> np.ndarray:
    """Return the two-sided p-value of Student's t.

    With t = sqrt(freedom) / tan(angle), the density of the angle is sin(angle) ** (freedom - 1). It
    is integrated in 2,000 steps from 0 to the angle, and to a right angle to normalise it.
    """
    middle = (np.arange(2000) + 0.5) / 2000
    angle = np.arctan2(np.sqrt(freedom), np.abs(t))
    tail = angle * (np.sin(np.outer(angle, middle)) ** (freedom - 1)).mean(axis=1)
    return tail / (np.pi / 2 * (np.sin(np.pi / 2 * middle) ** (freedom - 1)).mean())


def seed_resamples(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often a bootstrap resample draws each seed, and the probability of the resample.

    The shapes are (R, seeds) and (R,). With up to 6 seeds these are all resamples, with more seeds
    1,000 random ones.
    """
    if seeds > 6:
        draw = np.random.default_rng(0).multinomial
        return draw(seeds, np.full(seeds, 1 / seeds), 1000), np.full(1000, 1 / 1000)
    counts, ways = [], []
    for resample in itertools.combinations_with_replacement(range(seeds), seeds):
        counts.append(np.bincount(resample, minlength=seeds))
        orders = math.factorial(seeds)
        for count in counts[-1]:
            orders //= math.factorial(count)
        ways.append(orders)
    return np.array(counts), np.array(ways) / seeds**seeds


def bootstrap_interval(pairs: np.ndarray, size: int = 2**13) -> list[float]:
    """Return the 95% bootstrap interval of the mean of `pairs`, (seeds, languages).

    The bootstrap draws seeds and languages with replacement. This is its limit for infinitely many
    draws (of seeds, up to 6 of them), so no digit depends on chance. For each resample of the
    seeds, the sum over the drawn languages is a sum of independent terms. Its distribution is a
    convolution, which is a power after a Fourier transform. The values lie on a grid on which the
    sum has `size` points.
    """
    counts, probability = seed_resamples(len(pairs))
    width = pairs.shape[1]
    values = counts / len(pairs) @ pairs  # (R, languages)
    low, high = values.min(), values.max()
    if low == high:
        return [low, high]
    last = size // width - 2  # the grid has the points 0, 1, ..., last + 1
    position = (values - low) / (high - low) * last
    point = position.astype(int)
    row = np.arange(len(values))[:, None]
    histogram = np.zeros((len(values), last + 2))
    # A value between two points counts for both, in proportion, which keeps the mean.
    np.add.at(histogram, (row, point), (1 - position + point) / width)
    np.add.at(histogram, (row, point + 1), (position - point) / width)
    spectrum = probability @ np.fft.rfft(histogram, size) ** width
    cumulative = np.fft.irfft(spectrum, size).cumsum()
    # Each point stands for the interval of half a step around it.
    limits = np.interp([0.025, 0.975], cumulative, np.arange(size) + 0.5)
    return [*(low + limits / (last * width) * (high - low))]


def paired_difference(points: pd.DataFrame, one: str, other: str) -> str:
    """Compare two strategies by seed: difference, 95% interval, languages up/down.

    Returns text such as `+0.8 [+0.5, +1.1] 9/1`, or `-` if they share fewer than two seeds.
    """
    runs = [points.query("strategy == @name").droplevel(0) for name in (one, other)]
    pairs = (runs[0] - runs[1]).dropna().to_numpy()
    seeds, width = pairs.shape
    if seeds < 2:
        return "-"
    low, high = bootstrap_interval(pairs)
    mean, error = pairs.mean(axis=0), pairs.std(axis=0, ddof=1) / np.sqrt(seeds)
    t = np.divide(mean, error, out=np.where(mean == 0, 0, np.inf), where=error > 0)
    p = t_tail(t, seeds - 1)
    order = np.argsort(p)
    # Holm multiplies the smallest p by the number of languages, the next by one less, and so on.
    holm = np.maximum.accumulate(p[order] * np.arange(width, 0, -1))
    significant = mean[order][holm < 0.05]
    counts = f"{(significant > 0).sum()}/{(significant < 0).sum()}"
    return f"{mean.mean():+.1f} [{low:+.1f}, {high:+.1f}] {counts}".replace("-0.0 [", "+0.0 [")


def table(rows: pd.DataFrame) -> str:
    """Return rows of text as a Markdown table, padded for terminals, without empty columns."""
    rows = rows.loc[:, (rows != "-").any()]
    widths = [max(map(len, [head, *rows[head]])) for head in rows]
    lines = [[*rows], ["-" * width for width in widths], *rows.to_numpy()]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def curves(part: pd.DataFrame) -> pd.DataFrame:
    """Return the first and last training loss of each stage, or all other values, by strategy."""
    kind = part.kind.iloc[0]
    part = part.assign(stage=pd.Categorical(part.name, part.name.unique()))  # keeps their order
    lines = part.pivot_table("value", ["stage", "x"], "strategy", observed=True)
    lines = lines.groupby(level=0, observed=True).nth([0, -1]) if kind == "loss" else lines
    lines = lines if kind in LOSSES else 100 * lines
    text = lines.map("{:.3g}".format).replace("nan", "-")
    unit = "step" if kind in LOSSES else "layer"
    text.insert(0, "stage", [f"{stage}, {unit} {x}" for stage, x in lines.index])
    return text


def averages(summaries: dict[tuple[str, str], SimpleNamespace]) -> list[str]:
    """Return the tables of a metric from {(model, row): summary}: marked changes, then paired."""
    rows, pairs = [], []
    for (model, row), summary in summaries.items():
        strategies = [*summary.mean.index]
        compared = {one: (one, "baseline") for one in strategies[1:]}
        compared["front - full"] = ("front", "full")
        runs = summary.points.groupby("strategy", observed=True).size()
        seeds = "-".join(map(str, sorted({runs.min(), runs.max()})))
        for average, languages in summary.groups.items():
            size = f"{len(languages)} {average}".removesuffix(" average")
            line = {"model": model, "runs": row, "seeds": seeds, "languages": size}
            ups = summary.cells[average].str.extract(r" (\d+)/")[0].astype(float)
            lead = f"{ups['front'] - ups['full']:+.0f}".replace("+nan", "-")
            rows.append(line | summary.cells[average].to_dict() | {"up, front - full": lead})
            points = summary.points[languages]
            cells = {head: paired_difference(points, *two) for head, two in compared.items()}
            pairs.append(line | cells)
    text = [table(pd.DataFrame(rows))] if rows else []
    if any("[" in pair[head] for pair in pairs for head in compared):
        text += ["Paired by seed:", table(pd.DataFrame(pairs))]
    return text


@functools.cache
def markdown(text: str) -> str:
    """Escape the characters that Markdown or HTML would interpret."""
    return re.sub(r"[\\`*\[\]<>|&~#$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def escape(data: pd.DataFrame) -> pd.DataFrame:
    """Return the values with all text from the records escaped for Markdown."""
    text = {column: data[column].map(markdown) for column in [*NAMES, "row"]}
    text["strategy"] = data.strategy.cat.rename_categories(markdown)
    settings = {}
    for original in data.settings.unique():
        settings[original] = frozenset((markdown(flag), markdown(v)) for flag, v in original)
    return data.assign(**text, settings=data.settings.map(settings))


def report(name: str, data: pd.DataFrame, figures: dict[str, str]) -> str:
    """Return the Markdown of a folder, averages first. `figures` is {title: Markdown link}."""
    data, name, details = escape(data), markdown(printable(name)), []
    common = shared(data)
    text = [f"## {name}", describe("Settings of all runs", common)]
    for settings, runs in data.groupby("settings", sort=False):
        head = "; ".join(", ".join(runs[field].unique()) for field in ("model", "task", "row"))
        named = {*head.split(", ")}  # settings in the label of the row
        others = frozenset(pair for pair in settings - common if " ".join(pair) not in named)
        text.append(describe(f"* {head}", others))
    for (task, metric), part in data[data.kind == "score"].groupby(["task", "name"], sort=False):
        summaries = {}
        for (model, row), runs in part.groupby(["model", "row"]):
            title, summary = f"{task} {metric}, {model}, {row}", summarise(runs)
            cells = summary.cells.T.rename_axis("language").reset_index()
            details += [f"### {title}", table(cells), figures.get(title)]
            summaries[model, row] = summary
        text += [f"### {task} {metric}", *averages(summaries)]
    others = data[data.kind != "score"]
    for (model, task, row, kind), part in others.groupby(["model", "task", "row", "kind"]):
        title = f"{KINDS[kind]}, {task}, {model}, {row}"
        details += [f"### {title}", table(curves(part)), figures.get(title)]
    return "\n\n".join(filter(None, text + details))


def may_write(page: Path) -> bool:
    """Return whether a file does not exist or is an earlier report."""
    if not page.exists():
        return True
    return page.is_file() and page.read_bytes().startswith(MARKER.encode())


def write_page(page: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is complete or unchanged."""
    part = page.with_name(f".{page.name}.{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8", "replace")
        part.replace(page)
    finally:
        part.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 if an argument has no records."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    runs = PAPER.parent / "runs"
    parser.add_argument("paths", nargs="*", type=Path, default=[runs], metavar="PATH")
    write = "also write the report to this file, and figures to a folder `figures` beside it"
    parser.add_argument("--write", type=Path, metavar="FILE", help=write)
    args = parser.parse_args(argv)
    if args.write and not may_write(args.write):
        warn(f"cannot write {args.write}: it was not written by this script; change --write")
        return 2
    figures, links, made, folders, texts = None, {}, {}, {}, [LEGEND]
    if args.write and importlib.util.find_spec("matplotlib"):
        import figures
    tables = [read(path) for path in args.paths]
    for path, files in zip(args.paths, tables):
        folder = path if path.is_dir() or path.suffix == ".csv" else path.parent
        folders[folder] = folders.get(folder, []) + files
    for folder, files in folders.items():
        if files:
            data = load(files, published=folder.suffix != ".csv")
            if figures:
                links = figures.draw(str(folder), data, summarise, markdown, made)
            texts.append(report(str(folder), data, links))
    text = "\n\n".join(texts)
    if any(tables):
        print(text)
    if any(tables) and args.write:
        try:
            if figures:
                figures.save(args.write.parent / "figures", made)
            command = printable(shlex.join(sys.argv)).replace("`", "'")
            write_page(args.write, f"{MARKER}{command}`, do not edit\n\n{text}\n")
            if figures:
                figures.remove_unused(args.write.parent)
            else:
                warn("the report has no figures: install matplotlib (pip install matplotlib)")
        except OSError as error:
            warn(f"cannot write {error.filename}: {error.strerror}; change --write")
            return 2
    return 0 if all(tables) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    if hasattr(signal, "SIGPIPE"):  # `report.py | head` ends without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
