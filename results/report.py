"""Tables and figures from the records of runs, own and published.

    python results/report.py                                      records under results/runs, as Markdown on the screen
    python results/report.py results/paper.csv                    the published numbers
    python results/report.py results --write results/README.md    also as a file, with SVG figures in results/figures

Reads folders (every *.json below them), records of alignfreeze.py, and CSV files with the columns of paper.csv: the raw
scores that the authors published with their code (MIT; Bakos et al., "AlignFreeze", NAACL 2025, arXiv 2502.12959). What
cannot be read is named on stderr and left out; exit code 2 if an argument has no record or the file cannot be written.

A run's average is the mean over its target languages (not `en`); mean and sample deviation (n - 1) are then over seeds.
Averages and counts use the languages that all runs of a table have. Other settings, other table; a baseline joins all
tables of its fine-tuning. Published QA scores are the authors' variant: own f1_authors, em_authors compare with them.
"""

import argparse
import csv
import importlib.util
import json
import re
import signal
import sys
from pathlib import Path
from statistics import mean, stdev

PAPER = Path(__file__).resolve().parent / "paper.csv"
RUN = ("model", "task", "strategy", "schedule", "aligner", "seed")  # what names a run
STRATEGIES = ("baseline", "full", "front", "back")  # the paper's, in its order; other freezing specs follow
PROBES = [f"{what} {stage}" for what in ("retrieval", "drift") for stage in ("before", "realigned", "finetuned")]
REALIGNING = ("realign_", "aligner_", "layer", "temperature")  # how such flags begin, idle for a baseline
NOT_SETTINGS = {*RUN, *"languages data_dir probe realign_cache out device overwrite".split()}  # they change no score
LEGEND = """Percent, mean ± sample deviation over seeds; change against the baseline, ▲ ▼ if by more than one standard
deviation (the larger of the two), · if by less; languages up/down by as much. `en` is the source, in no average."""
STYLES = [{"fmt": f, "color": c} for f, c in zip("os^D", ("#222222", "#0072B2", "#E69F00", "#999999"))]  # also by grey


def check(run: dict) -> dict:
    """Return the run, {RUN's fields, config, scores {(language, metric): fraction}}; ValueError if it is none."""
    fits = [0 <= value <= 1 or (value > 1 and metric[:5] == "drift") for (_, metric), value in run["scores"].items()]
    if [type(run[f]) for f in (*RUN, "config")] != [str] * 5 + [int, dict] or not fits or not all(fits):
        raise ValueError("wrong type of a field, or a score not between 0 and 1")
    return run


def read_json(file: Path) -> list[dict]:
    """The run of a record; its probe becomes metrics `retrieval STAGE LAYER`, and `drift STAGE LAYER` of `en`."""
    record = json.loads(file.read_text("utf-8"))
    probe = record.get("probe") or {}
    scores = {(lang, metric): value for lang, by in record["scores"].items() for metric, value in by.items()}
    for stage, by_language in probe.get("retrieval", {}).items():
        for lang, layers in by_language.items():  # of hidden_states: the embeddings first
            scores |= {(lang, f"retrieval {stage} {i - 1 if i else 'emb'}"): v for i, v in enumerate(layers)}
    for stage, layers in probe.get("drift", {}).items():
        scores |= {("en", f"drift {stage} {layer}"): value for layer, value in layers.items()}
    run = {field: record[field] for field in RUN} | {"config": record.get("config", {}), "scores": scores}
    return [check(run | {"source": "records", "file": file})]


def read_csv(file: Path) -> list[dict]:
    """A run for each line of a CSV file, with its one score; ValueError names the first bad line."""
    runs, rows = [], csv.DictReader(file.read_text("utf-8-sig").splitlines())
    try:
        for row in rows:
            value = float("too many fields" if None in row else row["value"] or "no value")
            run = {field: row[field] or "none" for field in RUN} | {"seed": int(row["seed"]), "config": {}}
            run |= {"source": file.name, "file": f"line {rows.line_num} of {file}"}
            runs += [check(run | {"scores": {(row["language"], row["metric"]): value}})]
    except (KeyError, ValueError, csv.Error) as error:
        raise ValueError(f"line {rows.line_num}: {error!r}") from None
    return runs


def read(path: Path) -> list[dict]:
    """The runs of a folder, a record or a CSV file; a file that is no such thing is named on stderr and left out."""
    runs = []
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        try:
            runs += read_csv(file) if file.suffix == ".csv" else read_json(file)
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            print(f"left out {file}: no record of a run ({type(error).__name__}: {error})", file=sys.stderr)
    if path.exists() and not runs:
        print(f"no records in {path}", file=sys.stderr)
    return runs


def settings(run: dict, strategy: str) -> dict[str, str]:
    """The flags that can change the scores of a run, seed and strategy apart; for `baseline` those of fine-tuning."""
    idle = REALIGNING if strategy == "baseline" else () if run["aligner"] == "awesome" else ("aligner_",)
    flags = {f: str(v) for f, v in sorted(run["config"].items()) if f not in NOT_SETTINGS and not f.startswith(idle)}
    return {"source": run["source"]} | {flag: v for flag, v in flags.items() if v not in ("None", "False")}


def group(runs: list[dict]) -> list[dict]:
    """Tables to make: {name, label, settings, cells {(strategy, seed, language, metric): value}}, baseline included."""
    groups = {}
    for run in sorted(runs, key=lambda run: run["strategy"] == "baseline"):  # which comes last, to join all its tables
        name, flags = tuple(run[f] for f in ("model", "task", "schedule", "aligner")), settings(run, run["strategy"])
        new = {"name": name, "settings": flags, "tuning": (*name[:2], settings(run, "baseline")), "cells": {}}
        same = [one for one in groups.values() if one["tuning"] == new["tuning"] and run["strategy"] == "baseline"]
        same = same or [groups.setdefault((name, *flags.items()), new)]
        scores = {(run["strategy"], run["seed"], *cell): value for cell, value in run["scores"].items()}
        if any(same[0]["cells"].get(cell, value) != value for cell, value in scores.items()):
            print(f"left out {run['file']}: other scores of a run already read", file=sys.stderr)
            continue
        for one in same:
            one["cells"] |= scores
    for one in groups.values():  # the label says the settings by which tables of a model and task differ
        family = [other["settings"] for other in groups.values() if other["name"][:2] == one["name"][:2]]
        varied = [flag for flag in one["settings"] if len({flags.get(flag) for flags in family}) > 1]
        one["label"] = ", ".join([*dict.fromkeys(one["name"][2:]), *(f"{f} {one['settings'][f]}" for f in varied)])
    return [groups[key] for key in sorted(groups)]


def mark(score: tuple, base: tuple) -> str:
    """▲ ▼ if the means of (mean, deviation) differ by more than the larger deviation, else ·; "" if there is none."""
    change, deviations = score[0] - base[0], (score[1], base[1])
    return "" if None in deviations else "·" if abs(change) <= max(deviations) else "▲" if change > 0 else "▼"


def summarise(cells: dict, metric: str, like: dict | None = None) -> dict:
    """stats {strategy: {language: (mean, deviation or None)}}, counts {strategy: (up, down)} of what `like` has."""
    runs = {}  # {strategy: {seed: {language: points}}}
    for strategy, seed, lang, name in sorted(cells, key=lambda c: ((*STRATEGIES, c[0]).index(c[0]), *c[:2])):
        if name == metric and (not like or (strategy in like["stats"] and lang in ("en", *like["common"]))):
            runs.setdefault(strategy, {}).setdefault(seed, {})[lang] = 100 * cells[strategy, seed, lang, name]
    every = [scores for seeds in runs.values() for scores in seeds.values()]
    languages = sorted(set().union(*every) - {"en"})
    common = [lang for lang in languages if all(lang in scores for scores in every)]
    stats, counts = {strategy: {} for strategy in runs}, {}
    for strategy, seeds in runs.items():
        for scores in seeds.values() if common else ():
            scores["average"] = mean(scores[lang] for lang in common)
        for lang in ("en", *languages, "average"):
            values = [scores[lang] for scores in seeds.values() if lang in scores]
            stats[strategy][lang] = (mean(values), stdev(values) if len(values) > 1 else None) if values else None
        marks = [mark(stats[strategy][lang], stats["baseline"][lang]) for lang in common if "baseline" in stats]
        if strategy != "baseline" and marks and "" not in marks:
            counts[strategy] = (marks.count("▲"), marks.count("▼"))
    return {"runs": runs, "languages": languages, "common": common, "stats": stats, "counts": counts}


def remark(found: dict) -> str:
    """What to know about a table: its size, what its grid lacks, single seeds, and the headline, front against full."""
    runs, counts, languages = found["runs"], found["counts"], found["languages"]
    seeds = sorted(set().union(*runs.values()))
    notes = [f"seeds {' '.join(map(str, seeds))}, {len(found['common'])} of {len(languages)} languages in all runs"]
    for strategy, by_seed in runs.items():
        if count := sum(lang not in by_seed.get(seed, ()) for seed in seeds for lang in languages):
            notes += [f"{strategy} lacks {count} of {len(seeds) * len(languages)} scores"]
    notes += [f"no runs of {strategy}" for strategy in STRATEGIES if strategy not in runs]
    notes += ["1 seed: no deviation, no languages counted"] * (1 in map(len, runs.values()))
    if {"front", "full"} <= {*counts}:
        notes += [f"languages up, front against full: {counts['front'][0] - counts['full'][0]:+d}"]
    return "; ".join(notes)


def grid(table: dict[str, dict[str, str]]) -> str:
    """Markdown of {row: {column: text}}, padded for terminals; more than four columns go on in further tables."""
    columns, parts = [*dict.fromkeys(column for row in table.values() for column in row)], []
    for i in range(1, max(2, len(columns)), 3):
        shown = [*columns[:1], *columns[i : i + 3]]
        lines = [["", *shown], *([name, *(row.get(column, "-") for column in shown)] for name, row in table.items())]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        parts += ["\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)]
    return "\n\n".join(parts)


def show(score: tuple | None, base: tuple | None = None, counts: tuple[int, int] | None = None) -> str:
    """`81.7 ± 0.2`; with a base the change and its mark, `81.7 ± 0.2  +0.8 ▲`; with counts `81.7 ± 0.2  +0.8 ▲ 16/0`"""
    text = "-" if score is None else f"{score[0]:.1f}" + (f" ± {score[1]:.1f}" if score[1] is not None else "")
    if score and base and score is not base:
        text += f" {round(score[0] - base[0], 1) + 0.0:+5.1f} {mark(score, base)}".rstrip()
    return text + (f" {counts[0]}/{counts[1]}" if counts else "")


def scores(rows: dict[str, tuple[dict, str]]) -> str:
    """A table of {row: (summary, language)}: score of each strategy, change, mark; for averages, languages up/down."""
    table = {}
    for row, (found, lang) in rows.items():
        stats, counts = found["stats"], found["counts"] if lang == "average" else {}
        table[row] = {s: show(stats[s][lang], stats.get("baseline", {}).get(lang), counts.get(s)) for s in stats}
    return grid(table)


def compare(cells: dict, mine: str, paper: dict, metric: str) -> str:
    """Own scores, their difference from the published in points and published deviations; does the conclusion hold?"""
    own = summarise(cells, mine, like=summarise(paper, metric))
    published = summarise(paper, metric, like=own)
    if not own["common"]:
        return f"No {mine} in the own records for languages of the paper."
    table = {lang: {} for lang in ["en", *own["common"], "average"]}
    for lang, strategy in [(lang, strategy) for lang in table for strategy in own["stats"]]:
        if score := own["stats"][strategy][lang]:
            base, sd = published["stats"][strategy][lang]
            table[lang][strategy] = f"{score[0]:.1f} {score[0] - base:+5.1f} ({(score[0] - base) / sd:+.1f} sd)"
    best = [max(f["stats"], key=lambda s, f=f: f["stats"][s]["average"][0]) for f in (published, own)]
    lines = [f"- best average: {best[0]} in the paper, {best[1]} here ({'same' if best[0] == best[1] else 'differs'})"]
    for strategy, counts in own["counts"].items():
        theirs = published["counts"][strategy]
        same = "same" if (theirs[0] > theirs[1]) == (counts[0] > counts[1]) else "differs"
        lines += ["- {}: {} up {} down in the paper, {} up {} down here ({})".format(strategy, *theirs, *counts, same)]
    return "\n".join([grid(table), "", *lines])


def changes(found: dict) -> dict:
    """Panel for `figure`: changes against the baseline ± the larger deviation, languages sorted by the baseline."""
    stats, panel = {**found["stats"]}, {}
    base = stats.pop("baseline", {})
    for lang in sorted(found["common"] if base and stats else [], key=base.get):
        (start, sd), tick = base[lang], f"{lang}\n{base[lang][0]:.0f}"
        panel[tick] = {s: (by[lang][0] - start, max(by[lang][1] or 0, sd or 0)) for s, by in stats.items()}
    return {"change in points ± larger standard deviation (below a language: its baseline)": panel} if panel else {}


def layers(cells: dict) -> dict:
    """Panels for `figure` of the probe, {what and when: {layer: {strategy: score}}}; retrieval averaged."""
    metrics, panels = sorted({cell[3] for cell in cells}, key=lambda name: (name[-3:] != "emb", len(name), name)), {}
    for probe, metric in [(p, m) for p in PROBES for m in metrics if m.rpartition(" ")[0] == p]:
        stats, key = summarise(cells, metric)["stats"], "en" if probe[:5] == "drift" else "average"
        panels.setdefault(f"{probe}, %", {})[metric.split()[-1]] = {s: by[key] for s, by in stats.items() if by[key]}
    return panels


def figure(folder: Path | None, name: str, panels: dict[str, dict[str, dict[str, tuple]]]) -> list[str]:
    """Write the SVG of panels {title: {tick: {series: score}}}, the same bytes each time; Markdown that shows it."""
    if not folder or not panels:
        return []
    import matplotlib.figure

    file = re.sub(r"\W+", "-", name).strip("-") + ".svg"
    drawing = matplotlib.figure.Figure(figsize=(10, 3 * len(panels)), layout="constrained")
    for axes, (title, panel) in zip(drawing.subplots(len(panels), squeeze=False).flat, panels.items()):
        series = [*dict.fromkeys(one for stats in panel.values() for one in stats)]
        for i, one in enumerate(series):
            at = [x + 0.7 * ((i + 0.5) / len(series) - 0.5) for x in range(len(panel))]
            means, sds = zip(*((y, sd or 0) for y, sd in (by.get(one, (float("nan"), 0)) for by in panel.values())))
            axes.errorbar(at, means, sds, label=one, markersize=4, **STYLES[[*STRATEGIES, *series].index(one) % 4 - 1])
        axes.set(xticks=range(len(panel)), xticklabels=[*panel], xlim=(-0.6, len(panel) - 0.4), title=title)
        if title[:9] != "retrieval":  # changes and drift are from zero
            axes.axhline(0, color="#666666", linewidth=0.8)
        axes.grid(axis="y", color="#dddddd")
        axes.legend(ncols=len(series), frameon=False)
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": file}):
        drawing.savefig(folder / file, metadata={"Date": None})
    return [f"![{name}](figures/{file})"]


def report(groups: list[dict], figures: Path | None) -> str:
    """The Markdown: averages, language by language, beside the published numbers, layer by layer."""
    paper = {one["name"]: one["cells"] for one in group(read(PAPER))}
    averages, head, details, beside, probes = {}, [LEGEND], [], [], []
    for one in groups:
        model, task, *_ = one["name"]
        for metric in dict.fromkeys(cell[3] for cell in one["cells"] if not re.search(r" |_authors$", cell[3])):
            found, title = summarise(one["cells"], metric), f"{model}, {task}, {one['label']}: {metric}"
            averages.setdefault(f"### {model}, {task}: {metric}", {})[one["label"]] = found
            rows = {lang: (found, lang) for lang in ("en", *found["languages"], "average")}
            details += [f"### {title}", scores(rows), *figure(figures, title, changes(found))]
            if one["name"] in paper and one["settings"]["source"] != PAPER.name:
                mine = metric + "_authors" * (task == "xquad")
                beside += [f"### {title}", compare(one["cells"], mine, paper[one["name"]], metric)]
        title, panels = f"{model}, {task}, {one['label']}: layers", layers(one["cells"])
        for probe, panel in panels.items():
            texts = {layer: {s: f"{stat[0]:.3g}" for s, stat in row.items()} for layer, row in panel.items()}
            probes += [f"### {title}, {probe}", grid(texts)]
        probes += figure(figures, title, panels)
    for title, tables in averages.items():
        head += [title, scores({label: (found, "average") for label, found in tables.items()})]
        head += ["\n".join(f"- {label}: {remark(found)}" for label, found in tables.items())]
    parts = {"Averages": head, "Language by language": details, "Own and published": beside, "Layer by layer": probes}
    return "\n\n".join(text for name, part in parts.items() if part for text in (f"## {name}", *part))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 if an argument has no record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[PAPER.parent / "runs"], metavar="FOLDER or FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write this Markdown file, with figures beside it")
    args = parser.parse_args(argv)
    figures = args.write.parent / "figures" if args.write and importlib.util.find_spec("matplotlib") else None
    if args.write and not figures:
        print("no figures without matplotlib: pip install matplotlib", file=sys.stderr)
    found = [read(path) for path in args.paths]
    try:
        if any(found):
            print(text := report(group([run for runs in found for run in runs]), figures))
        if any(found) and args.write:
            args.write.write_text(f"# Made by `python {' '.join(sys.argv)}`, do not edit\n\n{text}\n", "utf-8")
    except OSError as error:
        parser.error(f"cannot write {error.filename}: {error.strerror}")
    return 0 if all(found) else 2


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)  # so that `| head` ends it quietly
    sys.exit(main())
