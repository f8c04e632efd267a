"""Tables and figures from the records of runs, own and published.

    python results/report.py                                the records under results/runs
    python results/report.py results/paper.csv              the published numbers
    python results/report.py results/e5-* --write FILE.md   also as a file, with figures beside it

Reads folders (every *.json below them), records of alignfreeze.py, and CSV files like paper.csv:
the raw scores that the authors published with their code (MIT; Bakos et al., "AlignFreeze", NAACL
2025, arXiv 2502.12959). Prints Markdown. What cannot be read is named on stderr and left out; exit
code 2 if an argument has no record.
"""

import argparse
import importlib.util
import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

PAPER = Path(__file__).resolve().parent / "paper.csv"
RUN = ["model", "task", "schedule", "aligner", "strategy", "seed"]  # what names a run
VALUE = ["kind", "name", "language", "x", "value"]  # x: step of a loss, layer of the probe
ROW = ["model", "task", "row"]
COLORS = {
    "baseline": "#222222",
    "full": "#0072B2",
    "front": "#D55E00",
    "back": "#009E73",
    "mean": "black",
}
ELSEWHERE = (
    "languages data_dir probe realign_cache out device overwrite fingerprint".split()
)  # no settings
LEGEND = """Percent, mean ± sample deviation over seeds; change against the baseline, ▲ ▼ if by more than
one standard deviation (the larger of the two), · if by less; languages up/down by as much. Averages
leave out the source language and those that a run of the row lacks. Layer 0 is the embeddings.

Paired: difference of runs of the same seed, its 95% interval by bootstrap over seeds and languages,
languages up/down by paired t-tests at 5% with Holm's correction. It can disagree with the rule of one
deviation: pairing removes what a seed does to both runs, but Holm asks more of each of many languages."""


def parse(record: dict) -> dict:
    """The run of a record: RUN's fields, `settings`, all it measured as `values`; else an error."""
    settings, values = {}, []
    for key, found in pd.json_normalize(record, sep="\t").to_dict("records")[0].items():
        match key.split("\t"):
            case ["config", flag] if flag not in [*RUN, *ELSEWHERE] and found not in (
                None,
                False,
                "",
                [],
            ):
                parts = found if isinstance(found, list) else [found]
                settings[flag] = " ".join(map(str, parts))
            case ["scores", language, metric]:
                values.append(("score", metric, language, 0, found))
            case ["losses", stage]:
                values += [("loss", stage, "", 20 * i, loss) for i, loss in enumerate(found, 1)]
            case ["probe", "drift", stage, layer]:
                values.append(("drift", stage, "", 0 if layer == "emb" else int(layer) + 1, found))
            case ["probe", kind, stage, language]:
                values += [(kind, stage, language, layer, v) for layer, v in enumerate(found)]
    run = {field: record[field] for field in RUN} | {"settings": settings, "values": values}
    text = json.dumps(run, ensure_ascii=False)
    if not values or [type(run[field]) for field in RUN] != [str] * 5 + [int]:
        raise ValueError("no scores, or a field of the wrong type")
    if not text.isprintable() or re.search(r"[|\\]", text):
        raise ValueError("a name that no table can show")
    for kind, *_, value in values:
        top = np.inf if kind in ("loss", "drift") else 1
        if isinstance(value, bool) or not 0 <= value <= top:
            raise ValueError(f"{value!r} is out of range")
    return run


def read(path: Path) -> list[dict]:
    """The runs of a folder, a record or a CSV file; what is none is named on stderr and left out."""
    runs = []
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        try:
            if file.suffix == ".csv":
                types = {"seed": int, "value": float}
                lines = pd.read_csv(file, dtype=types, keep_default_na=False)
                lines["key"] = "scores\t" + lines.language + "\t" + lines.metric
                records = []
                for run, part in lines.groupby(RUN):
                    records.append(dict(zip(RUN, run)) | dict(zip(part.key, part.value)))
            else:
                records = [json.loads(file.read_text("utf-8"))]
            runs += [parse(record) | {"file": str(file)} for record in records]
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            why = f"no record of a run ({type(error).__name__}: {error})"
            print(f"left out {file}: {why}", file=sys.stderr)
    if path.exists() and not runs:
        print(f"no records in {path}", file=sys.stderr)
    return runs


def label(rows: pd.DataFrame) -> dict[str, str]:
    """{key: label of 40 characters} of rows of a schedule and an aligner: these, and what differs."""
    flags, labels = sorted(set().union(*rows.settings)), {}
    mixed = [flag for flag in flags if len({settings.get(flag) for settings in rows.settings}) > 1]
    if mixed:
        print(f"settings mixed: {', '.join([*rows[RUN[:4]].iloc[0], *mixed])}", file=sys.stderr)
    for row in rows.itertuples():
        parts = [part for part in (row.schedule, row.aligner) if part != "none"] or ["baseline"]
        text = ", ".join(parts + [f"{flag} {row.settings.get(flag, 'none')}" for flag in mixed])
        labels[row.key] = text if len(text) <= 40 else f"{text[:33]}... {len(labels) + 1}"
    return labels


def group(settings: dict, language: str) -> str:
    """The average that a language counts in, three in the second method; `source`: none."""
    sources = settings.get("train_languages", "en").split()
    code = re.sub("^en-|-en$", "", language)  # of a direction of translation, the other language
    if settings.get("method") != "mid-align":
        return "source" if language in sources else "average"
    if {code, language} & {*sources}:
        return "supervised"
    return "aligned" if code in settings.get("realign_languages", "").split() else "other transfer"


def frame(runs: list[dict]) -> pd.DataFrame:
    """A line for each value: RUN, VALUE, the `row` (a label) with its `settings`, the average (`group`).

    A row has one model, task, schedule, aligner and settings; a baseline is in all that share its own.
    """
    data = pd.DataFrame(runs)
    strategies = [*COLORS, *sorted({*data.strategy} - {*COLORS})]
    data["strategy"] = pd.Categorical(data.strategy, strategies)  # their order everywhere
    data["key"] = [str([run[field] for field in [*RUN[:4], "settings"]]) for run in runs]
    base = data.strategy == "baseline"
    rows = data[~base].drop_duplicates("key")[["model", "task", "key", "settings"]]
    served = data[base].drop(columns="key").reset_index()
    served = served.merge(rows, on=["model", "task"], suffixes=["_own", ""])
    fits = [own.items() <= row.items() for own, row in zip(served.settings_own, served.settings)]
    served = served.loc[fits]
    data = data[~data.index.isin(served["index"])]
    labels = {}
    for _, part in data.drop_duplicates("key").groupby(RUN[:4]):
        labels |= label(part)
    data = pd.concat([data, served]).explode("values", ignore_index=True)
    data[VALUE] = pd.DataFrame(data["values"].tolist())
    data["row"] = data.key.map(labels)
    cell = [*ROW, "strategy", "seed", *VALUE[:4]]
    twice = data[data.duplicated(cell) & ~data.duplicated([*cell, "value"])].file.unique()
    for file in twice:
        print(f"left out {file}: other scores of a run already read", file=sys.stderr)
    data = data[~data.file.isin(twice)].drop_duplicates(cell)
    return data.assign(group=[group(*pair) for pair in zip(data.settings, data.language)])


def add_published(data: pd.DataFrame) -> pd.DataFrame:
    """The values, and as rows of their own the paper's for the same rows and languages."""
    if not {*data.model} & {*pd.read_csv(PAPER, usecols=["model"]).model}:
        return data
    paper, own = frame(read(PAPER)), data[data.aligner != "none"]
    paper["name"] += np.where(paper.task == "xquad", "_authors", "")  # their variants of F1 and EM
    own = own.assign(row=own.schedule + ", " + own.aligner)[[*ROW, "language"]].drop_duplicates()
    paper = paper.merge(own, on=[*ROW, "language"])
    return pd.concat([data, paper.assign(row=paper.row + ", published")], ignore_index=True)


def summarise(part: pd.DataFrame) -> SimpleNamespace:
    """One metric of one row, in points of 100.

    `points`: (strategy, seed) by languages and averages. `mean`, `sd`, `change` against the baseline, `bar`
    (the larger deviation, NaN without two): strategy by these. `groups`: {average: languages}.
    """
    points = 100 * part.pivot(index=["strategy", "seed"], columns="language", values="value")
    sources, groups = {*part.language[part.group == "source"]}, {}
    points = points[sorted(points, key=lambda language: (language not in sources, language))]
    for name, some in part[part.group != "source"].groupby("group"):
        languages = [one for one in sorted({*some.language}) if points[one].notna().all()]
        if languages:
            groups[name] = languages
            points[name] = points[languages].mean(axis=1)
    mean, sd = points.groupby("strategy").mean(), points.groupby("strategy").std()
    change = mean - mean.reindex(["baseline"]).iloc[0]
    bar = np.maximum(sd, sd.reindex(["baseline"]).to_numpy())
    return SimpleNamespace(points=points, groups=groups, mean=mean, sd=sd, change=change, bar=bar)


def show(found: SimpleNamespace, strategy: str, column: str) -> str:
    """`81.7 ± 0.2 +0.8 ▲`, of an average with languages up/down, `16/0`; of one seed `81.7 +0.8`."""
    mean, sd = found.mean.loc[strategy, column], found.sd.loc[strategy, column]
    change, bar = found.change.loc[strategy, column], found.bar.loc[strategy, column]
    text = "-" if np.isnan(mean) else f"{mean:.1f}" if np.isnan(sd) else f"{mean:.1f} ± {sd:.1f}"
    if strategy == "baseline" or np.isnan(change):
        return text
    text += f" {round(change, 1) + 0.0:+.1f}"
    if np.isnan(bar):
        return text
    text += " ·" if abs(change) <= bar else " ▲" if change > 0 else " ▼"
    if column in found.groups:
        marks = "".join(show(found, strategy, language)[-1] for language in found.groups[column])
        text += f" {marks.count('▲')}/{marks.count('▼')}"
    return text


def show_all(found: SimpleNamespace, column: str) -> dict[str, str]:
    """{strategy: cell} of one language or average."""
    return {strategy: show(found, strategy, column) for strategy in found.mean.index}


def t_tail(t: np.ndarray, freedom: int) -> np.ndarray:
    """Two-sided p of Student's t = sqrt(freedom) / tan(a): a has the density sin(a) ** (freedom - 1)."""
    middle = (np.arange(2000) + 0.5) / 2000  # of 2,000 steps from 0 to a, and to a right angle
    angle = np.arctan2(np.sqrt(freedom), np.abs(t))
    tail = angle * (np.sin(np.outer(angle, middle)) ** (freedom - 1)).mean(axis=1)
    return tail / (np.pi / 2 * (np.sin(np.pi / 2 * middle) ** (freedom - 1)).mean())


def sure(found: SimpleNamespace, one: str, other: str, languages: list[str]) -> str:
    """`+0.8 [+0.5, +1.1] 9/1`: difference paired by seed, 95% interval, languages up/down; or `-`."""
    if not {one, other} <= {*found.mean.index}:
        return "-"
    pairs = (found.points.loc[one] - found.points.loc[other])[languages].dropna().to_numpy()
    seeds, width = pairs.shape
    if seeds < 2:
        return "-"
    draw = np.random.default_rng(0).multinomial
    of_seeds = draw(seeds, np.full(seeds, 1 / seeds), 10_000) / seeds
    of_languages = draw(width, np.full(width, 1 / width), 10_000) / width
    low, high = np.quantile((of_seeds @ pairs * of_languages).sum(axis=1), [0.025, 0.975])
    mean, error = pairs.mean(axis=0), pairs.std(axis=0, ddof=1) / np.sqrt(seeds)
    t = np.divide(mean, error, out=np.where(mean == 0, 0, np.inf), where=error > 0)
    p = t_tail(t, seeds - 1)
    order = np.argsort(p)
    holm = np.maximum.accumulate(p[order] * np.arange(width, 0, -1))  # the smallest p times n, ...
    signs = np.sign(mean[order]) * (holm < 0.05)
    counts = f"{(signs > 0).sum()}/{(signs < 0).sum()}"
    return f"{round(mean.mean(), 1) + 0.0:+.1f} [{low:+.1f}, {high:+.1f}] {counts}"


def table(rows: list[dict], columns: list[str]) -> str:
    """Markdown of rows {column: text}, padded for terminals, of those columns that hold anything."""
    columns = [one for one in columns if any(row.get(one, "-") != "-" for row in rows)]
    lines = [columns, *([row.get(column, "-") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def figure(made: dict | None, name: str, title: str, panels: dict, bars=None, **look) -> list[str]:
    """Draw panels {title: frame of x by line} into made {file: figure}; the Markdown that shows it.

    bars: deviations, around points instead of lines. look: an x to `mark`, and options of axes.
    """
    if made is None:
        return []
    import matplotlib.figure

    file = re.sub(r"\W+", "-", name).strip("-")
    if len(file) > 56 or f"{file}.svg" in made:
        file = f"{file[:52]}-{len(made)}"
    mark, equal = look.pop("mark", None), look["ylabel"] != "loss"
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawing = matplotlib.figure.Figure((max(10, 5 * columns), 3 * rows + 1), layout="constrained")
    grid = drawing.subplots(rows, columns, squeeze=False, sharex=equal, sharey=equal)
    lines = {}
    for axes, (head, panel) in zip(grid.flat, panels.items()):
        for i, line in enumerate(panel):
            style = {"color": COLORS.get(line, f"C{i}"), "linewidth": 3 if line == "mean" else 1.2}
            if bars is None:
                (lines[line],) = axes.plot(panel.index, panel[line], **style)
                continue
            x = panel.index + 0.2 * (i - (panel.shape[1] - 1) / 2)
            error = bars[line] if bars[line].notna().any() else None  # none of one seed
            lines[line] = axes.errorbar(x, panel[line], error, fmt="o", markersize=4, **style)
        if mark is not None:
            axes.axvline(mark, color="#666666", linestyle="--")
        axes.set(title=head, **look)
        axes.tick_params(labelbottom=True)
        axes.grid(axis="y", color="#dddddd")
    for spare in grid.flat[len(panels) :]:
        spare.remove()
    drawing.suptitle(title, wrap=True)
    drawing.legend(lines.values(), lines, loc="outside lower center", ncols=9, frameon=False)
    made[f"{file}.svg"] = drawing
    return [f"![{title}](figures/{file}.svg)"]


def changes(found: SimpleNamespace, title: str, name: str, order: list, made: dict | None) -> list[str]:
    """The figure of a metric's changes against the baseline, languages in this order; Markdown."""
    languages = [one for one in order if any(one in members for members in found.groups.values())]
    change = found.change.drop("baseline", errors="ignore")[languages].T.dropna(axis=1, how="all")
    if change.empty:
        return []
    score, bars = found.mean.loc["baseline", languages], found.bar[languages].T
    title += f": {', '.join(change)} against the baseline (its score below the language)"
    if bars.notna().any(axis=None):
        title += "; bars: the larger of the two standard deviations"
    ticks = [f"{language}\n{score[language]:.0f}" for language in languages]
    look = {"xticks": range(len(ticks)), "xticklabels": ticks, "ylabel": "points"}
    return figure(made, name, title, {"": change.reset_index(drop=True)}, bars, **look)


def curves(part: pd.DataFrame, title: str, name: str, made: dict | None) -> list[str]:
    """Losses and probe of one row: tables, and figures with a line for each strategy; Markdown.

    Of sentences it has a panel for each strategy and stage, and a line for each language or group.
    """
    text, settings = [], part.settings.iloc[0]
    for kind, found in part[part.kind != "score"].groupby("kind"):
        rows, panels, of_layers = [], {}, kind != "loss"
        axis, unit = ("layer", "%") if of_layers else ("step", "loss")
        look = {"xlabel": axis, "ylabel": unit}
        if of_layers:
            look["xticks"] = range(0, found.x.max() + 1, 2)
        by = "language" if found.language.nunique() <= 8 else "group"
        for stage, staged in found.groupby("name", sort=False):
            lines = staged.pivot_table("value", "x", "strategy") * (100 if of_layers else 1)
            for x, row in lines.iloc[slice(None) if of_layers else [0, -1]].iterrows():
                rows.append({axis: f"{stage} {x}"} | row.map("{:.3g}".format).to_dict())
            if kind in ("loss", "drift") or settings.get("unit") != "sentence":
                panels[stage] = lines
                continue
            for strategy, one in staged.groupby("strategy"):
                panel = 100 * one.pivot_table("value", "x", by)
                panel["mean"] = 100 * one.groupby("x").value.mean()
                panels[f"{strategy}, {stage}"] = panel
        strategies = [*found.strategy.sort_values().unique()]
        text += [f"### {kind} of {title}", table(rows, [axis, *strategies])]
        head = f"{kind} of {title}: {', '.join(strategies)}"
        if kind in ("retrieval", "margin") and "layer" in settings:
            look["mark"] = int(settings["layer"]) % (found.x.max() + 1)
            head += "; dashed: the aligned layer"
        text += figure(made, f"{name}-{kind}", head, panels, **look)
    return text


def shared(settings: list[dict], known: dict) -> dict[str, str]:
    """{flag: its value in all of these settings, or its values with ` or `}, but for known flags."""
    flags = sorted(set().union(*settings) - {*known})
    values = [sorted({one.get(flag, "none") for one in settings}) for flag in flags]
    return dict(zip(flags, map(" or ".join, values)))


def lead(cells: dict) -> str:
    """How many more languages are up with front-freezing than with full realignment; {strategy: cell}."""
    ups = [re.search(r" (\d+)/\d+$", cells.get(strategy, "")) for strategy in ("front", "full")]
    return f"{int(ups[0][1]) - int(ups[1][1]):+d}" if all(ups) else "-"


def listed(title: str, settings: dict[str, str]) -> list[str]:
    """A line that names settings, if there are any."""
    return [f"{title}: {', '.join(map(' '.join, settings.items()))}."] if settings else []


def report(name: str, data: pd.DataFrame, made: dict | None) -> str:
    """The Markdown of a folder: settings, averages, pairs, languages, losses and layers."""
    own = data[data.settings.map(bool)].drop_duplicates(ROW)
    every = shared([*own.settings], {})
    common = {flag: value for flag, value in every.items() if " or " not in value}
    text, details = [f"## {name}", *listed("All runs", common)], []
    scores, stems = data[data.kind == "score"], {}  # stems: how figures' names begin
    for model in data.model.unique():
        several = f"-{model.split('-base')[0]}" if data.model.nunique() > 1 else ""
        stems[model] = Path(name).resolve().stem + several
    order = [*scores.groupby("language").value.mean().sort_values().index]
    head = ["model", "runs", "seeds", "languages"]
    for (task, metric), part in scores.groupby(["task", "name"], sort=False):
        averages, pairs, strategies = [], [], [*part.strategy.sort_values().unique()]
        others = [strategy for strategy in strategies if strategy != "baseline"]
        for (model, row), some in part.groupby(["model", "row"]):
            found, title = summarise(some), f"{task} {metric}, {model}, {row}"
            for average, languages in found.groups.items():
                size = f"{len(languages)} {average}".removesuffix(" average")
                line = dict(zip(head, [model, row, str(some.seed.nunique()), size]))
                averages.append(line | show_all(found, average))
                averages[-1]["up, front - full"] = lead(averages[-1])
                pairs.append({one: sure(found, one, "baseline", languages) for one in others} | line)
                pairs[-1]["front - full"] = sure(found, "front", "full", languages)
            rows = [{"language": language} | show_all(found, language) for language in found.points]
            details += [f"### {title}", table(rows, ["language", *found.mean.index])]
            details += changes(found, title, f"{stems[model]}-{task}-{row}-{metric}", order, made)
        text += [f"### {task}: {metric}", table(averages, [*head, *strategies, "up, front - full"])]
        text += listed("Here", shared([*own[own.task == task].settings], common))
        if any("[" in cell for line in pairs for cell in line.values()):
            text += ["Paired by seed:", table(pairs, [*head, *others, "front - full"])]
    for (model, task, row), part in data.groupby(ROW):
        details += curves(part, f"{task}, {model}, {row}", f"{stems[model]}-{task}-{row}", made)
    return "\n\n".join(text + details)


def write(file: Path, text: str, made: dict) -> None:
    """Write the Markdown and its figures; remove our figures that no Markdown beside shows any more."""
    title = f"# Made by `python {' '.join(sys.argv)}`, do not edit"
    file.write_text(f"{title}\n\n{text}\n", "utf-8", "replace")
    folder, mark = file.parent / "figures", "results/report.py"
    for name, drawing in made.items():
        import matplotlib

        folder.mkdir(exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same bytes each time
            drawing.savefig(folder / name, metadata={"Date": None, "Creator": mark})
    pages = [page.read_text("utf-8", "replace") for page in {file, *file.parent.glob("*.md")}]
    for old in folder.glob("*.svg"):
        shown = any(f"(figures/{old.name})" in page for page in pages)
        if not shown and mark in old.read_text("utf-8", "replace"):
            old.unlink()


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 if an argument has no record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[PAPER.parent / "runs"], metavar="FOLDER or FILE"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write this Markdown file, with figures beside it"
    )
    args = parser.parse_args(argv)
    made = {} if args.write and importlib.util.find_spec("matplotlib") else None
    if args.write and made is None:
        print("no figures without matplotlib: pip install matplotlib", file=sys.stderr)
    folders, found = {}, [read(path) for path in args.paths]
    for path, runs in zip(args.paths, found):
        folder = path if path.is_dir() or path.suffix == ".csv" else path.parent
        folders[folder] = folders.get(folder, []) + runs
    texts = [LEGEND]
    for folder, runs in folders.items():
        if runs:
            data = frame(runs)
            texts.append(
                report(str(folder), data if folder.suffix == ".csv" else add_published(data), made)
            )
    if any(found):
        print("\n\n".join(texts))
    try:
        if any(found) and args.write:
            write(args.write, "\n\n".join(texts), made or {})
    except OSError as error:
        parser.error(f"cannot write {error.filename}: {error.strerror}")
    return 0 if all(found) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    signal.signal(
        getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL
    )  # so that `| head` ends it quietly
    sys.exit(main())
