"""Tables and figures from the records of runs, own and published.

    python results/report.py                                the records under results/runs, as Markdown
    python results/report.py results/paper.csv              the published numbers
    python results/report.py results/e5-* --write FILE.md   also as a file, with figures in figures/ beside it

Reads folders (every *.json below them), records of alignfreeze.py, and CSV files like paper.csv: raw scores that
the authors published with their code (MIT; Bakos et al., "AlignFreeze", NAACL 2025, arXiv 2502.12959).
What cannot be read is named on stderr and left out; exit code 2 if an argument has no record."""

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
deviation (the larger of the two), · if by less; languages up/down by as much. The source language is in no average,
nor is a language that a run of the row lacks. Layer 0 is the embeddings.

*Paired*: difference of runs of the same seed, its 95% interval by bootstrap over seeds and languages, languages
up/down by paired t-tests at 5% with Holm's correction. It can disagree with one standard deviation: pairing removes
what a seed does to both runs, and Holm asks for more, the more languages are tested."""


def parse(record: dict) -> dict:
    """The run of a record: RUN's fields, its settings, all it measured as `values`; ValueError or such if it is none."""
    settings, values = {}, []
    for key, found in pd.json_normalize(record, sep="\t").iloc[0].items():
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
    run = {field: record[field] for field in RUN} | {"settings": settings}
    names = json.dumps([run, [value[:4] for value in values]], ensure_ascii=False)
    if [type(run[field]) for field in RUN] != [str] * 5 + [int] or not values:
        raise ValueError("a field of the wrong type, or no scores")
    if not names.isprintable() or re.search(r"[|\\]", names):
        raise ValueError("a name that no table can show")
    if not all(0 <= value[4] <= (np.inf if value[0] in ("loss", "drift") else 1) for value in values):
        raise ValueError("a value out of range")
    return run | {"values": values}


def read(path: Path) -> list[dict]:
    """The runs of a folder, a record or a CSV file; a file that is no such thing is named on stderr and left out."""
    runs = []
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        try:
            if file.suffix == ".csv":
                records = []
                lines = pd.read_csv(file, dtype={"seed": int, "value": float}, keep_default_na=False)
                for key, part in lines.groupby(RUN):
                    records.append(dict(zip(RUN, [*key[:5], int(key[5])])) | {"scores": {}})
                    for line in part.itertuples():
                        records[-1]["scores"].setdefault(line.language, {})[line.metric] = line.value
            else:
                records = [json.loads(file.read_text("utf-8"))]
            runs += [parse(record) | {"file": str(file)} for record in records]
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            print(f"left out {file}: no record of a run ({type(error).__name__}: {error})", file=sys.stderr)
    if path.exists() and not runs:
        print(f"no records in {path}", file=sys.stderr)
    return runs


def label(rows: pd.DataFrame) -> list[str]:
    """For each row of one schedule and aligner these, and the settings that differ, in at most 40 characters."""
    flags = sorted(set().union(*rows.settings))
    mixed = [flag for flag in flags if len({about.get(flag) for about in rows.settings}) > 1]
    if mixed:
        print(f"settings mixed: {', '.join([*rows[RUN[:4]].iloc[0], *mixed])}", file=sys.stderr)
    labels = []
    for about in rows.settings:
        parts = [part for part in rows[RUN[2:4]].iloc[0] if part != "none"] or ["baseline"]
        text = ", ".join(parts + [f"{flag} {about.get(flag, 'none')}" for flag in mixed])
        labels.append(text if len(text) <= 40 else f"{text[:33]}... {len(labels) + 1}")
    return labels


def group(about: dict, language: str) -> str:
    """The average that a language counts in: `average`, in the second method one of three, or none: `source`."""
    sources, aligned = (about.get(f"{what}_languages", "en").split() for what in ("train", "realign"))
    if about.get("method") != "mid-align":
        return "source" if language in sources else "average"
    code = re.sub("^en-|-en$", "", language)  # of a direction of translation, the other language
    return "supervised" if {code, language} & {*sources} else "aligned" if code in aligned else "other transfer"


def frame(runs: list[dict]) -> pd.DataFrame:
    """A line for each value: RUN, VALUE, `row` (its label), `about` (the row's settings), `group` (its average).

    A row holds the strategies of one model, task, schedule, aligner and settings; a baseline is in all rows with
    its settings.
    """
    data = pd.DataFrame(runs)
    data["strategy"] = pd.Categorical(data.strategy, [*COLORS, *sorted({*data.strategy} - {*COLORS})])
    data["key"] = data[RUN[:4]].agg(str, axis=1) + data.settings.map(str)
    base = data.strategy == "baseline"
    rows = data[~base].drop_duplicates("key")[["model", "task", "key", "settings"]]
    served = data[base].drop(columns="key").reset_index().merge(rows, on=["model", "task"], suffixes=["", "_of_row"])
    served = served.loc[[own.items() <= row.items() for own, row in zip(served.settings, served.settings_of_row)]]
    others = data[~data.index.isin(served["index"])]
    data = pd.concat([others.assign(about=others.settings), served.rename(columns={"settings_of_row": "about"})])
    labels = {}
    for _, part in others.drop_duplicates("key").groupby(RUN[:4]):
        labels |= dict(zip(part.key, label(part)))
    data = data.assign(row=data.key.map(labels)).explode("values", ignore_index=True)
    data = data.join(pd.DataFrame(data["values"].tolist(), columns=VALUE))
    cell = ["model", "task", "row", "strategy", "seed", *VALUE[:4]]
    twice = data[data.duplicated(cell) & ~data.duplicated([*cell, "value"])].file.unique()
    for file in twice:
        print(f"left out {file}: other scores of a run already read", file=sys.stderr)
    data = data[~data.file.isin(twice)].drop_duplicates(cell)
    return data.assign(group=[group(*pair) for pair in zip(data.about, data.language)])


def add_published(data: pd.DataFrame) -> pd.DataFrame:
    """The values and, in rows of their own, those of the paper for the same models, tasks, rows and languages."""
    paper, own, keys = frame(read(PAPER)), data[data.aligner != "none"], ["model", "task", "row", "language"]
    paper["name"] += np.where(paper.task == "xquad", "_authors", "")  # the authors' variants of F1 and EM
    own = own.assign(row=own.schedule + ", " + own.aligner)[keys].drop_duplicates()
    return pd.concat([data, paper.merge(own, on=keys).assign(row=paper.row + ", published")], ignore_index=True)


def summarise(part: pd.DataFrame) -> argparse.Namespace:
    """One metric of one row, in points of 100.

    `points`: (strategy, seed) by languages and averages. Strategy by these: `change`, `bar`, the larger deviation,
    `sign` (1 up, -1 down, 0 within it), `text`, as in `81.7 ± 0.2 +0.8 ▲ 16/0`. `groups`: {average: languages}.
    """
    points, groups = 100 * part.pivot(index=["strategy", "seed"], columns="language", values="value"), {}
    group_of = dict(sorted(zip(part.language, part.group), key=lambda pair: (pair[1] != "source", pair)))
    points = points[[*group_of]]
    for language in points.columns[points.notna().all()]:
        groups.setdefault(group_of[language], []).append(language)
    groups.pop("source", None)
    for name, languages in groups.items():
        points[name] = points[languages].mean(axis=1)
    mean, sd = points.groupby("strategy").mean(), points.groupby("strategy").std()
    change = mean - mean.reindex(["baseline"]).iloc[0]
    bar = np.maximum(sd, sd.reindex(["baseline"]).to_numpy())  # NaN if one of them is
    sign = np.sign(change).where(change.abs() > bar, 0).where(bar.notna())
    text = mean.map("{:.1f}".format) + sd.map(" ± {:.1f}".format)
    for strategy in text.index.drop("baseline", errors="ignore"):
        text.loc[strategy] += (change.loc[strategy].round(1) + 0.0).map(" {:+.1f}".format)
        text.loc[strategy] += sign.loc[strategy].map({1: " ▲", -1: " ▼", 0: " ·"}).fillna("")
        for name, languages in groups.items():
            up, down = ((sign.loc[strategy, languages] == way).sum() for way in (1, -1))
            text.loc[strategy, name] += f" {up}/{down}" if sign.loc[strategy, languages].notna().all() else ""
    text = text.replace(r" ± nan| \+nan", "", regex=True).replace("nan", "-")
    return argparse.Namespace(points=points, change=change, bar=bar, sign=sign, text=text, groups=groups)


def t_tail(t: np.ndarray, freedom: int) -> np.ndarray:
    """Two-sided p of Student's t: as t = sqrt(freedom) / tan(a), its density is sin(a) ** (freedom - 1), scaled."""
    middle, angle = (np.arange(2000) + 0.5) / 2000, np.arctan2(np.sqrt(freedom), np.abs(t))
    tail = angle * (np.sin(np.outer(angle, middle)) ** (freedom - 1)).mean(1)
    return tail / (np.pi / 2 * (np.sin(np.pi / 2 * middle) ** (freedom - 1)).mean())


def sure(found: argparse.Namespace, one: str, other: str, languages: list[str]) -> str:
    """`+0.8 [+0.5, +1.1] 9/1`: difference paired by seed, 95% interval, languages up/down; `-` under two pairs."""
    if not {one, other} <= {*found.text.index}:
        return "-"
    pairs = (found.points.loc[one] - found.points.loc[other])[languages].dropna().to_numpy()
    seeds, width = pairs.shape
    if seeds < 2:
        return "-"
    draw = np.random.default_rng(0).multinomial
    of_seeds, of_languages = (draw(n, np.full(n, 1 / n), 10_000) / n for n in (seeds, width))
    low, high = np.quantile(((of_seeds @ pairs) * of_languages).sum(1), [0.025, 0.975])
    mean, error = pairs.mean(0), pairs.std(0, ddof=1) / np.sqrt(seeds)
    t = np.divide(mean, error, out=np.where(mean == 0, 0, np.inf), where=error > 0)
    p = t_tail(t, seeds - 1)
    order = np.argsort(p)
    clear = np.maximum.accumulate(p[order] * np.arange(width, 0, -1)) < 0.05  # Holm: the smallest p times n
    signs = np.sign(mean[order]) * clear
    return f"{mean.mean():+.1f} [{low:+.1f}, {high:+.1f}] {(signs > 0).sum()}/{(signs < 0).sum()}"


def table(rows: list[dict], columns: list[str]) -> str:
    """Markdown of rows {column: text}, padded for terminals."""
    lines = [columns, *([row.get(column, "-") for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def figure(made: dict | None, name: str, title: str, panels: dict, bars=None, mark=None, **options) -> list[str]:
    """Draw panels {title: frame of x by line} into made {file: figure}; the Markdown that shows it.

    bars: deviations, for points instead of lines. mark: an x to mark. options: of axes.
    """
    if made is None or not panels:
        return []
    import matplotlib.figure

    slug = re.sub(r"\W+", "-", name).strip("-")
    slug = f"{slug[:52]}-{len(made)}" if len(slug) > 56 or f"{slug}.svg" in made else slug
    shape, equal = (-(-len(panels) // 3), min(3, len(panels))), "loss" not in options.values()
    made[f"{slug}.svg"] = drawing = matplotlib.figure.Figure((4 * shape[1] + 3, 3 * shape[0] + 1), layout="constrained")
    drawing.suptitle(title)
    grid = drawing.subplots(*shape, squeeze=False, sharex=equal, sharey=equal)
    for axes, (head, panel) in zip(grid.flat, panels.items()):
        for i, line in enumerate(panel):
            look = {"color": COLORS.get(line), "linewidth": 3 if line == "mean" else 1.2, "label": line}
            if bars is None:
                axes.plot(panel.index, panel[line], **look)
            else:
                x = np.arange(len(panel)) + 0.2 * (i - (panel.shape[1] - 1) / 2)
                axes.errorbar(x, panel[line], bars[line], fmt="o", markersize=4, **look)
        axes.set(title=head, **options)
        axes.grid(axis="y", color="#dddddd")
        axes.legend(frameon=False, fontsize="small")
        if mark is not None:
            axes.axvline(mark, color="#666666", linestyle="--")
    return [f"![{title}](figures/{slug}.svg)"]


def curves(part: pd.DataFrame, title: str, name: str, made: dict | None) -> list[str]:
    """Markdown of the losses and the probe of one row: tables, and figures with a line for each strategy.

    Of sentences the figure has a panel for each strategy and stage, with a line for each language or group.
    """
    text, about = [], part.about.iloc[0]
    for kind, found in part[part.kind != "score"].groupby("kind"):
        rows, panels, axis = [], {}, "step" if kind == "loss" else "layer"
        by = "language" if found.language.nunique() <= 8 else "group"
        for stage, staged in found.groupby("name", sort=False):
            lines = staged.pivot_table("value", "x", "strategy") * (1 if kind == "loss" else 100)
            for x, row in lines.iloc[[0, -1] if kind == "loss" else slice(None)].iterrows():
                rows.append({axis: f"{stage} {x}"} | {one: f"{value:.3g}" for one, value in row.items()})
            if about.get("unit") != "sentence" or kind in ("loss", "drift"):
                panels[stage] = lines
                continue
            for strategy, one in staged.groupby("strategy"):
                panel = 100 * one.pivot_table("value", "x", by)
                panels[f"{strategy}, {stage}"] = panel.assign(mean=100 * one.groupby("x").value.mean())
        head, mark, unit = f"{kind} of {title}", None, "loss" if kind == "loss" else "%"
        if kind in ("retrieval", "margin") and "layer" in about:
            head, mark = f"{head} (dashed: the aligned layer)", int(about["layer"]) % (found.x.max() + 1)
        text += [f"### {head}", table(rows, [axis, *found.strategy.sort_values().unique()])]
        text += figure(made, f"{name}-{kind}", head, panels, mark=mark, xlabel=axis, ylabel=unit)
    return text


def by_language(found: argparse.Namespace, title: str, name: str, made: dict | None, order: list[str]) -> list[str]:
    """Markdown of one metric of one row, language by language, and a figure of the changes in languages of `order`."""
    rows = [{"language": language} | column.to_dict() for language, column in found.text.items()]
    text = [f"### {title}", table(rows, ["language", *found.text.index])]
    languages = [language for language in order if any(language in group for group in found.groups.values())]
    change = found.change.drop("baseline", errors="ignore")[languages].T.dropna(axis=1, how="all")
    if change.empty:
        return text
    start = found.points.loc["baseline"][languages].mean()
    ticks = [f"{language}\n{score:.0f}" for language, score in start.items()]
    head = f"{title}: change of {', '.join(change)} against the baseline (below a language)"
    head += ", bars: the larger standard deviation" if found.bar[languages].notna().any(axis=None) else ""
    look = {"xticks": range(len(ticks)), "xticklabels": ticks, "ylabel": "points"}
    return text + figure(made, name, head, {"": change}, bars=found.bar[languages].T, **look)


def report(name: str, data: pd.DataFrame, made: dict | None) -> str:
    """The Markdown of a folder: settings, averages, how sure, language by language, losses, layer by layer."""
    abouts = [*data.drop_duplicates(["model", "task", "row"]).about]
    common = {flag: value for flag, value in abouts[0].items() if all(one.get(flag) == value for one in abouts)}
    text = [f"## {name}"] + ([f"All runs: {', '.join(map(' '.join, common.items()))}."] if common else [])
    scores, details, short = data[data.kind == "score"], [], Path(name).stem
    order = [*scores.groupby("language").value.mean().sort_values().index]  # the same in all figures
    for (task, metric), part in scores.groupby(["task", "name"], sort=False):
        averages, pairs, notes = [], [], []
        strategies = [*part.strategy.sort_values().unique()]
        for (model, row), some in part.groupby(["model", "row"]):
            found, seeds = summarise(some), some.seed.nunique()
            for average, languages in found.groups.items():
                start = {"model": model, "runs": row, "seeds": f"{seeds}", "languages": f"{len(languages)} {average}"}
                averages.append(start | found.text[average].to_dict())
                paired = {one: sure(found, one, "baseline", languages) for one in strategies if one != "baseline"}
                pairs.append(start | paired | {"front - full": sure(found, "front", "full", languages)})
            own = {flag: value for flag, value in some.about.iloc[0].items() if flag not in common}
            notes += [f"- {model}, {row}: {', '.join(map(' '.join, own.items()))}"] if own else []
            label = f"{short}-{model}-{task}-{row}-{metric}"
            details += by_language(found, f"{task} {metric}, {model}, {row}", label, made, order)
        head = ["model", "runs", "seeds", "languages"]
        text += [f"### {task}: {metric}", table(averages, head + strategies), *notes]
        if any("[" in cell for line in pairs for cell in line.values()):
            text += ["*Paired*:", table(pairs, [*head, *[s for s in strategies if s != "baseline"], "front - full"])]
    for (model, task, row), part in data.groupby(["model", "task", "row"]):
        details += curves(part, f"{task}, {model}, {row}", f"{short}-{model}-{task}-{row}", made)
    return "\n\n".join(text + details)


def write(file: Path, text: str, made: dict) -> None:
    """Write the Markdown and its figures; remove figures of earlier reports that no Markdown beside shows."""
    file.write_text(f"# Made by `python {' '.join(sys.argv)}`, do not edit\n\n{text}\n", "utf-8", "replace")
    folder = file.parent / "figures"
    for name, drawing in made.items():
        import matplotlib

        folder.mkdir(exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": name}):  # the same bytes each time
            drawing.savefig(folder / name, metadata={"Date": None, "Creator": "results/report.py"})
    linked = "".join(page.read_text("utf-8", "replace") for page in {file, *file.parent.glob("*.md")})
    for old in folder.glob("*.svg"):
        if f"figures/{old.name}" not in linked and "results/report.py" in old.read_text("utf-8", "replace"):
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
        if runs:
            folders.setdefault(path if path.is_dir() or path.suffix == ".csv" else path.parent, []).extend(runs)
    texts = [LEGEND]
    for path, runs in folders.items():
        data = frame(runs)
        texts.append(report(str(path), data if path.suffix == ".csv" else add_published(data), made))
    text = "\n\n".join(texts)
    if folders:
        print(text)
    try:
        if folders and args.write:
            write(args.write, text, made or {})
    except OSError as error:
        parser.error(f"cannot write {error.filename}: {error.strerror}")
    return 0 if all(found) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)  # so that `| head` ends it quietly
    sys.exit(main())
