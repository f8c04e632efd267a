"""Tables and figures from the records of runs, own and published.

    python results/report.py                                the records under results/runs
    python results/report.py results/paper.csv              the published numbers
    python results/report.py results/e5-* --write FILE.md   also as a file, with figures beside it

Reads folders (every *.json below them), records of alignfreeze.py, and CSV files like paper.csv.
Prints Markdown. What cannot be read is named on stderr and left out; exit code 2 if an argument has
no record.
"""

import argparse
import importlib.util
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from records import PAPER, load, named, read, shared

LEGEND = """Percent, mean ± sample deviation over seeds; change against the baseline, ▲ ▼ if by more than
one standard deviation (the larger of the two), · if by less; languages up/down by as much. Averages
leave out the source language and those that a run of the row lacks. Layer 0 is the embeddings.

Paired: difference of runs of the same seed, its 95% interval by bootstrap over seeds and languages,
languages up/down by paired t-tests at 5% with Holm's correction. It can disagree with the rule of one
deviation: pairing removes what a seed does to both runs, but Holm asks more of each of many languages."""


def summarise(part: pd.DataFrame) -> SimpleNamespace:
    """One metric of one row, in points of 100.

    `points`: (strategy, seed) by languages and averages; `mean`, `change` (of seeds that the baseline
    has too), `bar` (the larger deviation) and `cells` (text): strategy by these; `groups`: {average: languages}.
    """
    points = 100 * part.pivot(index=["strategy", "seed"], columns="language", values="value")
    order = part.assign(other=part.group != "source").sort_values(["other", "language"])
    points, groups = points[order.language.unique()], {}
    for average, some in order[order.other].groupby("group"):
        complete = points[some.language.unique()].dropna(axis=1)
        if not complete.empty:
            groups[average] = [*complete]
            points[average] = complete.mean(axis=1)
    runs = points.groupby("strategy", observed=False)
    mean, sd = runs.mean(), runs.std()
    base = points[points.index.get_level_values("strategy") == "baseline"].droplevel("strategy")
    same_seed = points - base.reindex(points.index.get_level_values("seed")).to_numpy()
    change = (
        same_seed.drop("baseline", errors="ignore")
        .groupby("strategy", observed=False)
        .mean()
        .reindex(mean.index)
    )
    bar = np.maximum(sd, sd.loc[["baseline"]].to_numpy())
    beyond = np.sign(change) * (change.abs() > bar)
    cells = mean.map("{:.1f}".format) + sd.map(" ± {:.1f}".format) + change.map(" {:+.1f}".format)
    cells += beyond.where(bar.notna()).map({0: " ·", 1: " ▲", -1: " ▼"}.get).fillna("")
    cells = cells.replace({" . nan| .nan": "", " -0.0": " +0.0", "^nan.*": "-"}, regex=True)
    for average, languages in groups.items():
        up, down = ((beyond[languages] == sign).sum(axis=1).astype(str) for sign in (1, -1))
        marked = cells[average].str.contains("[·▲▼]")
        cells[average] += (" " + up + "/" + down).where(marked, "")
    return SimpleNamespace(points=points, groups=groups, mean=mean, change=change, bar=bar, cells=cells)


def t_tail(t: np.ndarray, freedom: int) -> np.ndarray:
    """Two-sided p of Student's t = sqrt(freedom) / tan(a): a has the density sin(a) ** (freedom - 1)."""
    middle = (np.arange(2000) + 0.5) / 2000  # of 2,000 steps from 0 to a, and to a right angle
    angle = np.arctan2(np.sqrt(freedom), np.abs(t))
    tail = angle * (np.sin(np.outer(angle, middle)) ** (freedom - 1)).mean(axis=1)
    return tail / (np.pi / 2 * (np.sin(np.pi / 2 * middle) ** (freedom - 1)).mean())


def sure(points: pd.DataFrame, one: str, other: str) -> str:
    """`+0.8 [+0.5, +1.1] 9/1`: difference paired by seed, interval, languages up/down; or `-`."""
    runs = [points.query("strategy == @name").droplevel(0) for name in (one, other)]
    pairs = (runs[0] - runs[1]).dropna().to_numpy()
    seeds, width = pairs.shape
    if seeds < 2:
        return "-"
    draw = np.random.default_rng(0).multinomial
    of_seeds, of_languages = (draw(n, np.full(n, 1 / n), 10_000) / n for n in pairs.shape)
    low, high = np.quantile((of_seeds @ pairs * of_languages).sum(axis=1), [0.025, 0.975])
    mean, error = pairs.mean(axis=0), pairs.std(axis=0, ddof=1) / np.sqrt(seeds)
    t = np.divide(mean, error, out=np.where(mean == 0, 0, np.inf), where=error > 0)
    p = t_tail(t, seeds - 1)
    order = np.argsort(p)
    holm = np.maximum.accumulate(p[order] * np.arange(width, 0, -1))  # the smallest p times n, ...
    found = mean[order][holm < 0.05]
    counts = f"{(found > 0).sum()}/{(found < 0).sum()}"
    return f"{mean.mean():+.1f} [{low:+.1f}, {high:+.1f}] {counts}".replace("-0.0 [", "+0.0 [")


def table(rows: pd.DataFrame) -> str:
    """Markdown of rows of text, padded for terminals, of those columns that hold anything."""
    rows = rows.loc[:, (rows != "-").any()]
    widths = [max(map(len, [head, *rows[head]])) for head in rows]
    lines = [[*rows], ["-" * width for width in widths], *rows.to_numpy()]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def curves(part: pd.DataFrame) -> pd.DataFrame:
    """The first and the last loss of each stage, or all its layers: strategy by strategy."""
    losses = {*part.kind} == {"loss"}
    part = part.assign(stage=pd.Categorical(part.name, part.name.unique()))  # in their order
    lines = part.pivot_table("value", ["stage", "x"], "strategy", observed=True)
    lines = lines.groupby(level=0, observed=True).nth([0, -1]) if losses else 100 * lines
    text = lines.map("{:.3g}".format).replace("nan", "-")
    text.insert(0, "step" if losses else "layer", [f"{stage} {x}" for stage, x in lines.index])
    return text


def averages(summaries: dict[tuple[str, str], SimpleNamespace]) -> list[str]:
    """The tables of a metric from {(model, row): summary}: by the rule of one deviation, paired."""
    rows, pairs = [], []
    for (model, row), found in summaries.items():
        strategies = [*found.mean.index]
        sides = {one: (one, "baseline") for one in strategies[1:]}
        sides["front - full"] = ("front", "full")
        seeds = found.points.index.unique("seed").size
        for average, languages in found.groups.items():
            size = f"{len(languages)} {average}".removesuffix(" average")
            line = {"model": model, "runs": row, "seeds": str(seeds), "languages": size}
            ups = found.cells[average].str.extract(r" (\d+)/")[0].astype(float)
            lead = f"{ups['front'] - ups['full']:+.0f}".replace("+nan", "-")
            rows.append(line | found.cells[average].to_dict() | {"up, front - full": lead})
            paired = {head: sure(found.points[languages], *pair) for head, pair in sides.items()}
            pairs.append(line | paired)
    text = [table(pd.DataFrame(rows))] if rows else []
    if any("[" in pair[head] for pair in pairs for head in sides):
        text += ["Paired by seed:", table(pd.DataFrame(pairs))]
    return text


def report(name: str, data: pd.DataFrame, figures: dict[str, str]) -> str:
    """The Markdown of a folder, with the figures {title: link}; the averages are at its beginning."""
    text, details = [f"## {name}", named("All runs", shared(data))], []
    for (task, metric), part in data[data.kind == "score"].groupby(["task", "name"], sort=False):
        summaries = {}
        for (model, row), some in part.groupby(["model", "row"]):
            title, found = f"{task} {metric}, {model}, {row}", summarise(some)
            here = named("Here", some.settings.iloc[0] - shared(part))
            cells = found.cells.T.rename_axis("language").reset_index()
            details += [f"### {title}", here, table(cells), figures.get(title)]
            summaries[model, row] = found
        common = named("All runs here", shared(part) - shared(data))
        text += [f"### {task}: {metric}", common, *averages(summaries)]
    others = data[data.kind != "score"]
    for (model, task, row, kind), part in others.groupby(["model", "task", "row", "kind"]):
        title = f"{kind} of {task}, {model}, {row}"
        details += [f"### {title}", table(curves(part)), figures.get(title)]
    return "\n\n".join(filter(None, text + details))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 if an argument has no record."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    runs = PAPER.parent / "runs"
    parser.add_argument("paths", nargs="*", type=Path, default=[runs], metavar="FOLDER or FILE")
    write = "write this Markdown file, with figures beside it"
    parser.add_argument("--write", type=Path, metavar="FILE", help=write)
    args = parser.parse_args(argv)
    figures, links, made, folders, texts = None, {}, {}, {}, [LEGEND]
    if args.write and importlib.util.find_spec("matplotlib"):
        import figures
    elif args.write:
        print("no figures without matplotlib: pip install matplotlib", file=sys.stderr)
    found = [read(path) for path in args.paths]
    for path, files in zip(args.paths, found):
        folder = path if path.is_dir() or path.suffix == ".csv" else path.parent
        folders[folder] = folders.get(folder, []) + files
    for folder, files in folders.items():
        if files:
            data = load(files, published=folder.suffix != ".csv")
            if figures:
                links = figures.draw(str(folder), data, summarise, made)
            texts.append(report(str(folder), data, links))
    text = "\n\n".join(texts)
    if any(found):
        print(text)
    if any(found) and args.write:
        try:
            heading = f"# Made by `python {' '.join(sys.argv)}`, do not edit"
            args.write.write_text(f"{heading}\n\n{text}\n", "utf-8", "replace")
            if figures:
                figures.save(args.write, made)
        except OSError as error:
            parser.error(f"cannot write {error.filename}: {error.strerror}")
    return 0 if all(found) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main())
