"""The records of runs as one table, a line for each score, loss and layer of the probe.

Own records are the JSON files of alignfreeze.py. Published scores are CSV files like paper.csv, which
are those that the authors published with their code (MIT; Bakos et al., "AlignFreeze", NAACL 2025,
arXiv 2502.12959). What cannot be read is named on stderr and left out.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

PAPER = Path(__file__).resolve().parent / "paper.csv"
ROW = ["model", "task", "schedule", "aligner", "settings"]  # what the runs of a row have in common
VALUE = ["kind", "name", "language", "x", "value"]  # x: step of a loss, layer of the probe
NAMES = [*ROW[:4], "strategy", "name", "language"]
STRATEGIES = ["baseline", "full", "front", "back"]  # in this order everywhere, others after them
PROBED = (
    "unit",
    "layer",
    "pool_first",
    "realign_max_length",
    "limit_links",
)  # of a baseline, by --probe
ELSEWHERE = "seed languages data_dir probe realign_cache out device overwrite fingerprint".split()


def parse(record: dict) -> pd.DataFrame:
    """All that a record measured, a line each: the run, VALUE, its `settings` {(flag, value)}, its `known` flags."""
    settings, values = set(), []
    for key, found in pd.json_normalize(record, sep="\t").to_dict("records")[0].items():
        match key.split("\t"):
            case ["config", flag] if found and flag not in [*NAMES, *ELSEWHERE]:
                parts = found if isinstance(found, list) else [found]
                settings.add((flag, " ".join(map(str, parts))))
            case ["scores", language, metric]:
                values.append(("score", metric, language, 0, found))
            case ["losses", stage]:
                values += [("loss", stage, "", 20 * i, loss) for i, loss in enumerate(found, 1)]
            case ["probe", "drift", stage, layer]:
                values.append(("drift", stage, "", 0 if layer == "emb" else int(layer) + 1, found))
            case ["probe", kind, stage, language]:
                values += [(kind, stage, language, layer, v) for layer, v in enumerate(found)]
    run = {field: record[field] for field in [*NAMES[:5], "seed"]}
    run["settings"] = [frozenset(settings)] * len(values)
    run["known"] = [frozenset(record.get("config", ()))] * len(values)
    return pd.DataFrame(values, columns=VALUE).assign(**run)


def read_file(file: Path) -> pd.DataFrame:
    """The values of a record or a CSV file as parse() gives them, and the file; else an error."""
    if file.suffix == ".csv":
        data = pd.read_csv(file, keep_default_na=False).rename(columns={"metric": "name"})
        data = data.assign(kind="score", x=0, settings=[frozenset()] * len(data))
        data["known"] = data.settings
    else:
        data = parse(json.loads(file.read_text("utf-8")))
    highest = np.where(data.kind.isin(["loss", "drift"]), np.inf, 1)
    if data.value.dtype.kind not in "fi" or data.seed.dtype.kind != "i":
        raise ValueError("no scores, or one or a seed that is no number")
    if not data.value.between(0, highest).all():
        raise ValueError("a score out of range")
    words = "".join({*data[NAMES].to_numpy().flat}.union(*data.settings[0]))
    if not words.isprintable() or {*words} & {"|", "\\"}:
        raise ValueError("a name that no table can show")
    return data.assign(file=str(file))


def read(path: Path) -> list[pd.DataFrame]:
    """The values of a folder, a record or a CSV file, by file; what has none is left out."""
    found = []
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        try:
            found.append(read_file(file))
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            why = f"no record of a run ({type(error).__name__}: {error})"
            print(f"left out {file}: {why}", file=sys.stderr)
    if path.exists() and not found:
        print(f"no records in {path}", file=sys.stderr)
    return found


def shared(data: pd.DataFrame) -> frozenset:
    """The settings that all runs have, but for the published ones, which have none."""
    settings = [one for one in data.settings.unique() if one]
    return settings[0].intersection(*settings) if settings else frozenset()


def named(head: str, settings: frozenset) -> str:
    """A sentence that names settings after a head, or nothing."""
    return f"{head}: {', '.join(sorted(map(' '.join, settings)))}." if settings else ""


def labels(rows: pd.DataFrame) -> pd.Series:
    """Labels of rows of one schedule and aligner: these, and settings that differ."""
    place, common = [*rows[ROW[:4]].iloc[0]], shared(rows)
    different = [settings - common for settings in rows.settings]
    mixed = sorted({flag for settings in different for flag, _ in settings})
    if mixed:
        print(f"settings mixed: {', '.join(place + mixed)}", file=sys.stderr)
    start = ", ".join(part for part in place[2:] if part != "none") or "baseline"
    texts = [", ".join([start, *sorted(map(" ".join, settings))]) for settings in different]
    short = [text if len(text) <= 40 else f"{text[:33]}... {i}" for i, text in enumerate(texts, 1)]
    return pd.Series(short, rows.index)


def group(settings: frozenset, language: str) -> str:
    """The average that a language counts in, three in the second method; `source`: none."""
    flags = dict(settings)
    code = re.sub("^en-|-en$", "", language)  # of a direction of translation, the other language
    trained = {code, language} & {*flags.get("train_languages", "en").split()}
    if flags.get("method") != "mid-align":
        return "source" if trained else "average"
    aligned = code in flags.get("realign_languages", "").split()
    return "supervised" if trained else "aligned" if aligned else "other transfer"


def comparable(data: pd.DataFrame) -> pd.DataFrame:
    """The values without settings of one value whose flag some runs lack: earlier revisions had no other.

    Where others have sentences, the runs that lack `unit` have words. Only of the first method; all
    revisions that knew the second one have its flags.
    """
    first = [("method", "mid-align") not in settings for settings in data.settings]
    if not any(first):
        return data
    known, values = data.known[first], {}
    for flag, value in frozenset().union(*data.settings[first]):
        values.setdefault(flag, []).append((flag, value))
    lacking = frozenset().union(*known) - frozenset.intersection(*known)
    unheard = {values[flag][0] for flag in lacking & values.keys() if len(values[flag]) == 1}
    settings = []
    for old, own, flags, strategy in zip(first, data.settings, data.known, data.strategy):
        if old and len(values.get("unit", [])) > 1 and "unit" not in flags and strategy != "baseline":
            own = own | {("unit", "word")}
        settings.append(own - unheard if old else own)
    return data.assign(settings=settings)


def frame(data: pd.DataFrame) -> pd.DataFrame:
    """The values with the label of their `row` and the average (`group`) of their language.

    A row is of one model, task, schedule, aligner and settings; a baseline is in all that have its own,
    where its scores and losses do not depend on what was probed.
    """

    def serves(own: frozenset, row: frozenset, kind: str) -> bool:
        return {one for one in own if kind not in ("score", "loss") or one[0] not in PROBED} <= row

    rows = data.loc[data.strategy != "baseline", ROW].drop_duplicates()
    base = data[data.strategy == "baseline"].reset_index()
    served = base.merge(rows, on=["model", "task"], suffixes=["_own", ""])
    served = served.loc[[*map(serves, served.settings_own, served.settings, served.kind)]]
    data = pd.concat([data.drop(served["index"].unique()), served], ignore_index=True)
    place = [*ROW, "strategy", "seed", *VALUE[:4]]
    twice = data.file[data.duplicated(place) & ~data.duplicated([*place, "value"])].unique()
    for file in twice:
        print(f"left out {file}: other scores of a run already read", file=sys.stderr)
    data = data[~data.file.isin(twice)].drop_duplicates(place)
    rows = data[ROW].drop_duplicates()
    rows["row"] = pd.concat([labels(part) for _, part in rows.groupby(ROW[:4])])
    data["group"] = [group(*pair) for pair in zip(data.settings, data.language)]
    return data.merge(rows)


def load(files: list[pd.DataFrame], published: bool) -> pd.DataFrame:
    """The values of a folder's files, and as more rows the published of the same languages."""
    data = frame(comparable(pd.concat(files, ignore_index=True)))
    if published:
        paper = frame(read(PAPER)[0]).merge(data[[*ROW[:4], "language"]].drop_duplicates())
        paper["name"] += np.where(paper.task == "xquad", "_authors", "")  # their F1 and EM
        data = pd.concat([data, paper.assign(row=paper.row + ", published")], ignore_index=True)
    others = sorted({*data.strategy} - {*STRATEGIES})
    data["strategy"] = pd.Categorical(data.strategy, [*STRATEGIES, *others])
    return data
