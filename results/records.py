"""Read the records of runs into one table, with a row for each score, loss and probed layer.

Our own records are JSON files written by alignfreeze.py. Published scores are CSV files such as
paper.csv, which holds the scores that the authors published with their code (MIT; Bakos et al.,
"AlignFreeze", NAACL 2025, arXiv 2502.12959). A file that cannot be read is left out and named on
stderr.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

PAPER = Path(__file__).resolve().parent / "paper.csv"
ROW = ["model", "task", "schedule", "aligner", "settings"]  # equal for all runs of a row
VALUE = ["kind", "name", "language", "x", "value"]  # x: step of a loss, or layer of the probe
NAMES = [*ROW[:4], "strategy", "name", "language"]
STRATEGIES = ["baseline", "full", "front", "back"]  # the order in all tables; others follow
# What the report calls the fields of a record.
TASKS = {"udpos": "PoS", "wikiann": "NER", "xnli": "NLI", "xquad": "QA"}
TASKS |= {"massive": "MASSIVE", "xsid": "xSID", "uner": "UNER"}
BEFORE = "before training"
SCORES = {"f1": "F1", "f1_strict": "strict F1", "em": "EM", "bleu": "BLEU", "chrf": "chrF"}
SCORES |= {"f1_authors": "F1 of the authors", "em_authors": "EM of the authors"}
STAGES = {"before": BEFORE, "realigned": "after alignment", "finetuned": "after fine-tuning"}
KINDS = {"loss": "Loss", "retrieval": "Retrieval by cosine", "margin": "Retrieval by margin"}
KINDS |= {"drift": "Change of weights", "validation": "Validation loss"}
LOSSES = ["loss", "validation"]  # the kinds that are no percentages, and whose x is a step
# Settings of alignment, which do not change the scores of a baseline.
PROBED = """unit layer temperature pool_first limit_links realign_languages realign_steps
realign_batch_size realign_max_length realign_lr realign_decay""".split()
LIMITS = ["limit_train", "limit_test", "validate"]  # which are not set in some runs
# Settings that records of earlier revisions lack, as those revisions had them.
EARLIER = {"method": "alignfreeze", "unit": "word", "train_languages": ["en"], "accumulate": 1}
EARLIER |= {"warmup": 0.1, "decay": "linear", "realign_decay": "constant", "limit_links": 100_000}
EARLIER |= {"pool_first": True}
# Settings that do not distinguish the rows of a table.
IGNORED = "seed languages data_dir probe fingerprint checkpointing".split()


def printable(text: str) -> str:
    """Replace control characters by escapes such as \\x1b, which terminals and tables can show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def warn(message: str) -> None:
    """Print a message on stderr, in one line."""
    print(printable(message), file=sys.stderr)


def loss_steps(record: dict, name: str, means: int) -> list[int]:
    """Return the last step of each mean of 20 losses. A step is a batch of the task or of pairs."""
    is_realigned = name == "align" and record["schedule"] == "before"
    stage = "realign" if is_realigned or name == "realign" else "finetune"  # of older records
    updates = record.get("steps", {}).get(stage, 40 * means)
    steps = updates * record.get("config", {}).get("accumulate", 1)
    if record["schedule"] == "alternate":  # half of the batches are of the task
        steps //= 2
    return [min(20 * i, steps) for i in range(1, means + 1)]


def validation_steps(record: dict, checks: int) -> list[int]:
    """Return how many batches of the task went before each check of the validation loss."""
    config = record["config"]
    batches = config["validate"] * config.get("accumulate", 1)
    if record["schedule"] == "alternate":
        batches //= 2
    return [batches * i for i in range(1, checks + 1)]


def parse(record: dict) -> pd.DataFrame:
    """Return one row per value of a record.

    The columns are the fields of the run and those of VALUE; `settings`, a set of (flag, value);
    and `off`, the set of flags that are 0, false or empty, or limits that are not set. The setting
    `validate` becomes a number of batches of the task, of which an alternating run has half as many
    as updates.
    """
    settings, values = set(), []
    if "config" in record:
        record = record | {"config": EARLIER | record["config"]}
        first = record["config"]["pool_first"]  # "yes" or "no" in records of earlier revisions
        record["config"]["pool_first"] = {"yes": True, "no": False}.get(first, first)
    for key, content in pd.json_normalize(record, sep="\t").to_dict("records")[0].items():
        match key.split("\t"):
            case ["config", flag] if content and flag not in [*NAMES, *IGNORED]:
                parts = content if isinstance(content, list) else [content]
                parts = validation_steps(record, 1) if flag == "validate" else parts
                settings.add((flag, " ".join(map(str, parts))))
            case ["scores", language, metric]:
                values.append(("score", metric, language, 0, content))
            case ["losses", stage]:
                steps = loss_steps(record, stage, len(content))
                values += [("loss", stage, "", *pair) for pair in zip(steps, content)]
            case ["validation", "losses"]:
                steps = validation_steps(record, len(content))
                values += [("validation", "validation", "", *pair) for pair in zip(steps, content)]
            case ["probe", "drift", stage, layer]:
                index = 0 if layer == "emb" else int(layer) + 1
                values.append(("drift", stage, "", index, content))
            case ["probe", kind, stage, language]:
                values += [(kind, stage, language, layer, v) for layer, v in enumerate(content)]
    run = {field: record[field] for field in [*NAMES[:5], "seed"]}
    run["settings"] = [frozenset(settings)] * len(values)
    config = record.get("config", {})
    off = {flag for flag in config if config[flag] in (0, []) or flag in LIMITS}
    off -= {flag for flag, _ in settings}
    run["off"] = [frozenset(off)] * len(values)
    return pd.DataFrame(values, columns=VALUE).assign(**run)


def read_file(file: Path) -> pd.DataFrame:
    """Return the values of a record or a CSV file, as `parse` does. Raises an error if invalid."""
    if file.suffix == ".csv":
        data = pd.read_csv(file, keep_default_na=False).rename(columns={"metric": "name"})
        data = data.assign(kind="score", x=0, settings=[frozenset()] * len(data))
        data["off"] = data.settings
    else:
        data = parse(json.loads(file.read_text("utf-8")))
    highest = np.where(data.kind.isin([*LOSSES, "drift"]), np.inf, 1)
    if data.value.dtype.kind not in "fi" or data.seed.dtype.kind != "i":
        raise ValueError("a score or the seed is missing or not a number")
    if not data.value.between(0, highest).all():
        raise ValueError("a score is not between 0 and 1")
    data[NAMES] = data[NAMES].map(printable)
    settings = frozenset((printable(flag), printable(value)) for flag, value in data.settings[0])
    return data.assign(settings=[settings] * len(data), file=str(file))


def read(path: Path) -> list[pd.DataFrame]:
    """Return the values of each valid file: the path itself, or all *.json below a folder."""
    tables = []
    if not path.exists():
        warn(f"{path} does not exist; name a folder of records, written by --out")
        return tables
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        try:
            tables.append(read_file(file))
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            reason = f"not a readable record ({type(error).__name__}: {error})"
            warn(f"left out {file}: {reason}; repair or remove it")
    if not tables:
        warn(f"no records in {path}; give a folder written by --out")
    return tables


def shared(data: pd.DataFrame) -> frozenset:
    """Return the settings that all runs have in common; published scores have no settings."""
    settings = [one for one in data.settings.unique() if one]
    return settings[0].intersection(*settings) if settings else frozenset()


def describe(head: str, settings: frozenset) -> str:
    """Return a sentence that lists settings after a head, or "" if there are none."""
    return f"{head}: {', '.join(sorted(map(' '.join, settings)))}." if settings else ""


def labels(rows: pd.DataFrame) -> pd.Series:
    """Label rows of one schedule and aligner by these and by the settings that differ."""
    place, common = [*rows[ROW[:4]].iloc[0]], shared(rows)
    different = [settings - common for settings in rows.settings]
    flags = sorted({flag for settings in different for flag, _ in settings})
    if flags:
        runs, names = ", ".join(place), ", ".join(flags)
        warn(f"runs of {runs} differ in {names}: they are separate rows")
    start = ", ".join(part for part in place[2:] if part != "none") or "baseline"
    start += ", sentences" if start in ("before", "during") else ""  # no aligner of words
    texts = []
    for i, settings in enumerate(different, 1):
        text = ", ".join([start, *sorted(map(" ".join, settings))])
        texts.append(text if len(text) <= 48 or not flags else f"{start}, settings {i}")
    return pd.Series(texts, rows.index)


def group(settings: frozenset, language: str) -> str:
    """Return the average in which a language counts; "source" counts in none.

    The first method has one average over target languages, and another if some are not aligned.
    The second has three: "supervised", "aligned" and "other transfer".
    """
    flags = dict(settings)
    code = re.sub("^en-|-en$", "", language)  # in a direction of translation, the other language
    trained = {code, language} & {*flags.get("train_languages", "en").split()}
    if flags.get("method") != "mid-align":
        aligned = code in flags.get("realign_languages", code).split()
        return "source" if trained else "average" if aligned else "not aligned"
    aligned = code in flags.get("realign_languages", "").split()
    return "supervised" if trained else "aligned" if aligned else "other transfer"


def frame(data: pd.DataFrame) -> pd.DataFrame:
    """Return the values with two more columns, `row` and `group`.

    `row` is the label of the table row: a model, task, schedule, aligner and settings. A baseline
    appears in each row whose settings include its own; its scores and losses do not depend on what
    was probed. `group` is the average in which the language counts.
    """

    def fits(baseline: frozenset, off: frozenset, row: frozenset, kind: str) -> bool:
        ignored = PROBED if kind in ["score", *LOSSES] else []
        if "validate" in dict(baseline) and "validate" in dict(row):
            ignored = [*ignored, "validate"]  # how often each looks for its best weights
        own = {(flag, value) for flag, value in baseline if flag not in ignored}
        return own <= row and not off.difference(ignored) & dict(row).keys()

    rows = data.loc[data.strategy != "baseline", ROW].drop_duplicates()
    base = data[data.strategy == "baseline"].reset_index()
    served = base.merge(rows, on=["model", "task"], suffixes=["_own", ""])
    fitting = map(fits, served.settings_own, served.off, served.settings, served.kind)
    served = served.loc[[*fitting]]
    data = pd.concat([data.drop(served["index"].unique()), served], ignore_index=True)
    place = [*ROW, "strategy", "seed", *VALUE[:4]]
    conflicts = data.duplicated(place) & ~data.duplicated([*place, "value"])
    conflicting = data.file[conflicts].unique()
    for file in conflicting:
        reason = "its scores differ from those of another record of the same run"
        warn(f"left out {file}: {reason}; remove one of the two")
    data = data[~data.file.isin(conflicting)].drop_duplicates(place)
    rows = data[ROW].drop_duplicates()
    rows["row"] = pd.concat([labels(part) for _, part in rows.groupby(ROW[:4])])
    data["group"] = [group(*pair) for pair in zip(data.settings, data.language)]
    return data.merge(rows)


def reached_by_all(data: pd.DataFrame) -> pd.DataFrame:
    """Leave out losses at steps that not all seeds reached, where their mean would jump."""
    curve = ["model", "task", "row", "strategy", "kind", "name"]
    seeds = data.groupby(curve, observed=True).seed.transform("nunique")
    here = data.groupby([*curve, "x"], observed=True).seed.transform("nunique")
    return data[~data.kind.isin(LOSSES) | (here == seeds)]


def load(files: list[pd.DataFrame], published: bool) -> pd.DataFrame:
    """Combine the values of a folder's files.

    With `published`, the published scores of the same runs and languages are added as more rows.
    """
    data = frame(pd.concat(files, ignore_index=True))
    if published:
        paper = frame(read(PAPER)[0]).merge(data[[*ROW[:4], "language"]].drop_duplicates())
        paper["name"] += np.where(paper.task == "xquad", "_authors", "")  # their own F1 and EM
        data = pd.concat([data, paper.assign(row=paper.row + ", published")], ignore_index=True)
    scores = data.kind == "score"
    data["name"] = np.where(scores, data.name.replace(SCORES), data.name.replace(STAGES))
    data["task"] = data.task.replace(TASKS)
    others = sorted({*data.strategy} - {*STRATEGIES})
    data["strategy"] = pd.Categorical(data.strategy, [*STRATEGIES, *others])
    return reached_by_all(data)
