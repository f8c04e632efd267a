"""Tables and figures from the records of runs, own and published.

    python results/report.py                                the records under results/runs, as Markdown
    python results/report.py results/paper.csv              the published numbers
    python results/report.py results/e5-* --write FILE.md   also as a file, with figures in figures/ beside it

Reads folders (every *.json below them), records of alignfreeze.py, and CSV files like paper.csv: raw scores that
the authors published with their code (MIT; Bakos et al., "AlignFreeze", NAACL 2025, arXiv 2502.12959).
What cannot be read is named on stderr and left out; exit code 2 if an argument has no record.
"""

import argparse
import importlib.util
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd

PAPER = Path(__file__).resolve().parent / "paper.csv"
RUN = ["model", "task", "schedule", "aligner", "strategy", "seed"]  # what names a run
VALUE = ["kind", "name", "language", "x", "value"]  # score; loss by stage and step; retrieval, margin, drift by layer
COLORS = {"baseline": "#222222", "full": "#0072B2", "front": "#D55E00", "back": "#009E73", "mean": "black"}
NO_SETTING = {*RUN, *"languages data_dir probe realign_cache out device overwrite fingerprint".split()}
LEGEND = """Percent, mean ± sample deviation over seeds; change against the baseline, ▲ ▼ if by more than one standard
deviation (the larger of the two), · if by less; languages up/down by as much. Averages leave out the source
language and those that a run of the row lacks. Layer 0 is the embeddings.

Paired: difference of runs of the same seed, its 95% interval by bootstrap over seeds and languages, languages up/down
by paired t-tests at 5% with Holm's correction. It can disagree with the rule of one standard deviation: pairing
removes what a seed does to both runs, and Holm asks for more, the more languages are tested."""


def parse(record: dict) -> dict:
    """The run of a record: RUN's fields, its settings, what it measured as `values`; an error if it is none."""
    settings, values = {}, []
    for key, found in pd.json_normalize(record, sep="\t").to_dict("records")[0].items():
        match key.split("\t"):
            case ["config", flag] if flag not in NO_SETTING and found not in (None, False, "", []):
                settings[flag] = " ".join(map(str, found)) if isinstance(found, list) else str(found)
            case ["scores", language, metric]:
                values.append(("score", metric, language, 0, found))
            case ["losses", stage]:
                values += [("loss", stage, "", 20 * i, loss) for i, loss in enumerate(found, 1)]
            case ["probe", "drift", stage, layer]:
                values.append(("drift", stage, "", 0 if layer == "emb" else int(layer) + 1, found))
            case ["probe", kind, stage, language]:
                values += [(kind, stage, language, layer, share) for layer, share in enumerate(found)]
    run = {field: record[field] for field in RUN} | {"settings": settings, "values": values}
    text = json.dumps(run, ensure_ascii=False)
    typed = values and [type(run[field]) for field in RUN] == [str] * 5 + [int]
    if not typed or not text.isprintable() or re.search(r"[|\\]", text):
        raise ValueError("no scores, a field of the wrong type, or a name that no table can show")
    if not all(0 <= value[4] <= (np.inf if value[0] in ("loss", "drift") else 1) for value in values):
        raise ValueError("a value out of range")
    return run


def read(path: Path) -> list[dict]:
    """The runs of a folder, a record or a CSV file; a file that is no such thing is named on stderr and left out."""
    runs = []
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        try:
            records = [] if file.suffix == ".csv" else [json.loads(file.read_text("utf-8"))]
            if file.suffix == ".csv":
                lines = pd.read_csv(file, dtype={"seed": int, "value": float}, keep_default_na=False)
                for key, part in lines.groupby(RUN):
                    records.append(dict(zip(RUN, [*key[:5], int(key[5])])) | {"scores": {}})
                    for line in part.itertuples():
                        records[-1]["scores"].setdefault(line.language, {})[line.metric] = line.value
            runs += [parse(record) | {"file": str(file)} for record in records]
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            print(f"left out {file}: no record of a run ({type(error).__name__}: {error})", file=sys.stderr)
    if path.exists() and not runs:
        print(f"no records in {path}", file=sys.stderr)
    return runs


def label(rows: pd.DataFrame) -> dict[str, str]:
    """{key: label} of the rows of one schedule and aligner: these and the settings that differ, 40 characters."""
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
    """The average that a language counts in: `average`, in the second method one of three, or none: `source`."""
    sources, aligned = (settings.get(f"{what}_languages", "en").split() for what in ("train", "realign"))
    if settings.get("method") != "mid-align":
        return "source" if language in sources else "average"
    code = re.sub("^en-|-en$", "", language)  # of a direction of translation, the other language
    return "supervised" if {code, language} & {*sources} else "aligned" if code in aligned else "other transfer"


def frame(runs: list[dict]) -> pd.DataFrame:
    """A line for each value: RUN, VALUE, `row`, a label, `settings` of the row, `group`, the average.

    A row has one model, task, schedule, aligner and settings; a baseline is in all rows that share its settings.
    """
    data = pd.DataFrame(runs)
    data["strategy"] = pd.Categorical(data.strategy, [*COLORS, *sorted({*data.strategy} - {*COLORS})])
    data["key"] = [str([*run, settings]) for *run, settings in data[[*RUN[:4], "settings"]].itertuples(index=False)]
    base = data.strategy == "baseline"
    rows = data[~base].drop_duplicates("key")[["model", "task", "key", "settings"]]
    served = data[base].drop(columns="key").reset_index().merge(rows, on=["model", "task"], suffixes=["_own", ""])
    served = served.loc[[own.items() <= row.items() for own, row in zip(served.settings_own, served.settings)]]
    data = data[~data.index.isin(served["index"])]
    labels = {}
    for _, part in data.drop_duplicates("key").groupby(RUN[:4]):
        labels |= label(part)
    data = pd.concat([data, served]).explode("values", ignore_index=True)
    data = data.assign(row=data.key.map(labels)).join(pd.DataFrame(data["values"].tolist(), columns=VALUE))
    cell = ["model", "task", "row", "strategy", "seed", *VALUE[:4]]
    twice = data[data.duplicated(cell) & ~data.duplicated([*cell, "value"])].file.unique()
    for file in twice:
        print(f"left out {file}: other scores of a run already read", file=sys.stderr)
    data = data[~data.file.isin(twice)].drop_duplicates(cell)
    return data.assign(group=[group(*pair) for pair in zip(data.settings, data.language)])


def add_published(data: pd.DataFrame) -> pd.DataFrame:
    """The values and, in rows of their own, those of the paper for the same models, tasks, rows and languages."""
    paper, own, keys = frame(read(PAPER)), data[data.aligner != "none"], ["model", "task", "row", "language"]
    paper["name"] += np.where(paper.task == "xquad", "_authors", "")  # the authors' variants of F1 and EM
    own = own.assign(row=own.schedule + ", " + own.aligner)[keys].drop_duplicates()
    paper = paper.merge(own, on=keys).assign(row=lambda rows: rows.row + ", published")
    return pd.concat([data, paper], ignore_index=True)


def show(mean: float, sd: float, change: float, bar: float) -> str:
    """`81.7 ± 0.2 +0.8 ▲`; what is NaN is left out."""
    text = f"{mean:.1f}" if mean == mean else "-"
    if sd == sd:
        text += f" ± {sd:.1f}"
    if change == change:
        text += f" {round(change, 1) + 0.0:+.1f}"
    if change == change and bar == bar:
        text += " ·" if abs(change) <= bar else " ▲" if change > 0 else " ▼"
    return text


def summarise(part: pd.DataFrame) -> argparse.Namespace:
    """One metric of one row, in points of 100: `points`, (strategy, seed) by languages and averages; `groups`,
    {average: languages}; `change` from the baseline and `bar`, the larger deviation, strategy by the same, without
    the baseline; `text`, {language or average: {strategy: cell}}; `up`, {(strategy, average): languages}."""
    points, groups = 100 * part.pivot(index=["strategy", "seed"], columns="language", values="value"), {}
    group_of = dict(sorted(zip(part.language, part.group), key=lambda pair: (pair[1] != "source", pair)))
    for language in group_of:
        if group_of[language] != "source" and points[language].notna().all():
            groups.setdefault(group_of[language], []).append(language)
    points = points[[*group_of]].assign(**{name: points[languages].mean(axis=1) for name, languages in groups.items()})
    mean, sd = points.groupby("strategy").mean(), points.groupby("strategy").std()
    change = mean - mean.reindex(["baseline"]).iloc[0]
    bar = np.maximum(sd, sd.reindex(["baseline"]).to_numpy())  # NaN if one of them is
    change.loc[change.index == "baseline"] = np.nan
    text, up = {column: {} for column in points}, {}
    for strategy in mean.index:
        for column in points:
            numbers = (frame.loc[strategy, column] for frame in (mean, sd, change, bar))
            text[column][strategy] = show(*numbers)
        for name, languages in groups.items():
            marks = "".join(text[language][strategy][-1] for language in languages)
            if re.fullmatch("[▲▼·]+", marks):
                up[strategy, name] = marks.count("▲")
                text[name][strategy] += f" {marks.count('▲')}/{marks.count('▼')}"
    return argparse.Namespace(points=points, groups=groups, change=change, bar=bar, text=text, up=up)


def t_tail(t: np.ndarray, freedom: int) -> np.ndarray:
    """Two-sided p of Student's t: if t = sqrt(freedom) / tan(a), a has the density sin(a) ** (freedom - 1)."""
    middle = (np.arange(2000) + 0.5) / 2000  # of 2,000 steps from 0 to a, and to a right angle
    angle = np.arctan2(np.sqrt(freedom), np.abs(t))
    tail = angle * (np.sin(np.outer(angle, middle)) ** (freedom - 1)).mean(axis=1)
    return tail / (np.pi / 2 * (np.sin(np.pi / 2 * middle) ** (freedom - 1)).mean())


def sure(found: argparse.Namespace, one: str, other: str, languages: list[str]) -> str:
    """`+0.8 [+0.5, +1.1] 9/1`: difference paired by seed, 95% interval, languages up/down; or `-`."""
    if not {one, other} <= {*found.change.index}:
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
    clear = np.maximum.accumulate(p[order] * np.arange(width, 0, -1)) < 0.05  # Holm: smallest p times n
    signs = np.sign(mean[order]) * clear
    counts = f"{(signs > 0).sum()}/{(signs < 0).sum()}"
    return f"{round(mean.mean(), 1) + 0.0:+.1f} [{low:+.1f}, {high:+.1f}] {counts}"


def table(rows: list[dict], columns: list[str]) -> str:
    """Markdown of rows {column: text}, padded for terminals."""
    lines = [columns, *([row.get(column, "-") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def figure(made: dict | None, name: str, title: str, panels: dict, bars=None, mark=None, **options) -> list[str]:
    """Draw panels {title: frame of x by line} into made {file: figure}; the Markdown that shows it.

    bars: a frame of deviations, for points instead of lines. mark: an x to mark. options: of axes.
    """
    if made is None:
        return []
    import matplotlib.figure

    file = re.sub(r"\W+", "-", name).strip("-")
    file = (f"{file[:52]}-{len(made)}" if len(file) > 56 or f"{file}.svg" in made else file) + ".svg"
    columns, equal = min(3, len(panels)), mark is not None or options["ylabel"] != "loss"
    rows = -(-len(panels) // columns)
    size = (5 * columns if len(panels) > 1 else 10, 3.2 * rows + 1)
    made[file] = matplotlib.figure.Figure(size, layout="constrained")
    made[file].suptitle(title, wrap=True)
    grid = made[file].subplots(rows, columns, squeeze=False, sharex=equal, sharey=equal)
    for axes, (head, panel) in zip(grid.flat, panels.items()):
        for i, line in enumerate(panel):
            look = {"color": COLORS.get(line), "linewidth": 3 if line == "mean" else 1.2, "label": line}
            if bars is None:
                axes.plot(panel.index, panel[line], **look)
            else:
                x = np.arange(len(panel)) + 0.2 * (i - (panel.shape[1] - 1) / 2)
                axes.errorbar(x, panel[line], bars[line], fmt="o", markersize=4, **look)
                axes.axhline(0, color="#666666", linewidth=0.8)
        if mark is not None:
            axes.axvline(mark, color="#666666", linestyle="--")
        axes.set(title=head, **options)
        axes.grid(axis="y", color="#dddddd")
        axes.legend(frameon=False, fontsize="small", ncols=2)
    return [f"![{title}](figures/{file})"]


def by_language(found: argparse.Namespace, title: str, name: str, order: list, made: dict | None) -> list[str]:
    """Markdown of one metric of one row, language by language; a figure of the changes, languages in this order."""
    rows = [{"language": language} | cells for language, cells in found.text.items()]
    text = [f"### {title}", table(rows, ["language", *found.change.index])]
    languages = [one for one in order if any(one in members for members in found.groups.values())]
    change, bars = found.change[languages].T.dropna(axis=1, how="all"), found.bar[languages].T
    if change.empty:
        return text
    scores = found.points.loc["baseline"][languages].mean()
    ticks = [f"{language}\n{score:.0f}" for language, score in scores.items()]
    head = f"{title}: {', '.join(change)} against the baseline (its score below the language)"
    head += "; bars: the larger of the two standard deviations" if bars.notna().any(axis=None) else ""
    look = {"xticks": range(len(ticks)), "xticklabels": ticks, "ylabel": "points"}
    return text + figure(made, name, head, {"": change}, bars, **look)


def curves(part: pd.DataFrame, title: str, name: str, made: dict | None) -> list[str]:
    """Markdown of the losses and the probe of one row: tables, and figures with a line for each strategy.

    Of sentences the figure has a panel for each strategy and stage, with a line for each language or group.
    """
    text, settings = [], part.settings.iloc[0]
    for kind, found in part[part.kind != "score"].groupby("kind"):
        rows, panels, mark = [], {}, None
        axis, unit = ("step", "loss") if kind == "loss" else ("layer", "%")
        by = "language" if found.language.nunique() <= 8 else "group"
        for stage, staged in found.groupby("name", sort=False):
            lines = staged.pivot_table("value", "x", "strategy") * (1 if kind == "loss" else 100)
            for x, row in lines.iloc[[0, -1] if kind == "loss" else slice(None)].iterrows():
                rows.append({axis: f"{stage} {x}"} | row.map("{:.3g}".format).to_dict())
            if kind in ("loss", "drift") or settings.get("unit") != "sentence":
                panels[stage] = lines
                continue
            for strategy, one in staged.groupby("strategy"):
                panel = 100 * one.pivot_table("value", "x", by)
                panels[f"{strategy}, {stage}"] = panel.assign(mean=100 * one.groupby("x").value.mean())
        head = f"{kind} of {title}"
        text += [f"### {head}", table(rows, [axis, *found.strategy.sort_values().unique()])]
        if kind in ("retrieval", "margin") and "layer" in settings:
            mark = int(settings["layer"]) % (found.x.max() + 1)
            head += "; dashed: the aligned layer"
        text += figure(made, f"{name}-{kind}", head, panels, mark=mark, xlabel=axis, ylabel=unit)
    return text


def shared(settings: list[dict], known: dict) -> dict[str, str]:
    """{flag: its value in all of these settings, or its values, ` or ` between them}, without the known flags."""
    flags = sorted(set().union(*settings) - {*known})
    return {flag: " or ".join(sorted({one.get(flag, "none") for one in settings})) for flag in flags}


def report(name: str, data: pd.DataFrame, made: dict | None) -> str:
    """The Markdown of a folder: settings, averages, pairs, language by language, losses, layer by layer."""
    own = data[data.settings.map(bool)].drop_duplicates(["model", "task", "row"])
    common = {flag: value for flag, value in shared([*own.settings], {}).items() if " or " not in value}
    text = [f"## {name}"] + ([f"All runs: {', '.join(map(' '.join, common.items()))}."] if common else [])
    scores, details, models = data[data.kind == "score"], [], data.model.unique()
    names = {model: [Path(name).stem, model.split("-base")[0]][: len(models)] for model in models}  # of figures
    order = [*scores.groupby("language").value.mean().sort_values().index]
    head = ["model", "runs", "seeds", "languages"]
    for (task, metric), part in scores.groupby(["task", "name"], sort=False):
        averages, pairs, strategies = [], [], [*part.strategy.sort_values().unique()]
        for (model, row), some in part.groupby(["model", "row"]):
            found = summarise(some)
            for average, languages in found.groups.items():
                cells = [model, row, str(some.seed.nunique()), f"{len(languages)} {average}"]
                start = dict(zip(head, cells))
                averages.append(start | found.text[average])
                if {("front", average), ("full", average)} <= {*found.up}:
                    more = found.up["front", average] - found.up["full", average]
                    averages[-1]["up, front - full"] = f"{more:+d}"
                paired = {
                    one: sure(found, one, "baseline", languages) for one in found.change.index if one != "baseline"
                }
                pairs.append(start | paired | {"front - full": sure(found, "front", "full", languages)})
            file = "-".join([*names[model], task, row, metric])
            details += by_language(found, f"{task} {metric}, {model}, {row}", file, order, made)
        lead = ["up, front - full"] if any("up, front - full" in line for line in averages) else []
        text += [f"### {task}: {metric}", table(averages, [*head, *strategies, *lead])]
        here = shared([*own[own.task == task].settings], common)
        text += [f"Here: {', '.join(map(' '.join, here.items()))}."] if here else []
        if any("[" in cell for line in pairs for cell in line.values()):
            columns = [*head, *(one for one in strategies if one != "baseline"), "front - full"]
            text += ["Paired by seed:", table(pairs, columns)]
    for (model, task, row), part in data.groupby(["model", "task", "row"]):
        file = "-".join([*names[model], task, row])
        details += curves(part, f"{task}, {model}, {row}", file, made)
    return "\n\n".join(text + details)


def write(file: Path, text: str, made: dict) -> None:
    """Write the Markdown and its figures; remove such figures beside it that no Markdown there shows any more."""
    file.write_text(f"# Made by `python {' '.join(sys.argv)}`, do not edit\n\n{text}\n", "utf-8", "replace")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[PAPER.parent / "runs"], metavar="FOLDER or FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write this Markdown file, with figures beside it")
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
            texts.append(report(str(folder), data if folder.suffix == ".csv" else add_published(data), made))
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
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)  # so that `| head` ends it quietly
    sys.exit(main())
