"""Print what the runs of `./run_all.sh toy` show: a table and two sentences for each method.

    python results/toy_tables.py results/toy/runs

The sentences are computed from the records. Changes are against the baseline of the same seed.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from records import read, warn

GROUPS = {  # model: (name of a group of languages, the languages)
    "bert": (("close (qaa qab)", ["qaa", "qab"]), ("distant (qac)", ["qac"])),
    "llama": (("with labels (en qaa)", ["en", "qaa"]), ("without (qab qac)", ["qab", "qac"])),
}
TASKS = {"bert": "udpos", "llama": "xsid"}
HEADS = {
    "bert": "Words aligned before fine-tuning on English. PoS accuracy in percent:",
    "llama": "Sentences aligned while a task is learned. Slot F1 in percent:",
}


def changes(data: pd.DataFrame, model: str) -> pd.DataFrame:
    """Return the scores of each seed, averaged over groups of languages, in percent.

    The rows are (strategy, seed), the columns the groups. All rows but those of the baseline are
    changes against it. Seeds that lack a strategy are left out.
    """
    table = data.pivot(index=["strategy", "seed"], columns="language", values="value") * 100
    table = table[table.groupby("seed").transform("size") == data.strategy.nunique()]
    if table.empty:
        return table
    scores = pd.DataFrame({name: table[codes].mean(axis=1) for name, codes in GROUPS[model]})
    base = scores.loc["baseline"]
    order = [name for name in ("baseline", "full", "front", "back") if name in table.index]
    parts = {}
    for strategy in order:
        part = scores.loc[strategy]
        parts[strategy] = part if strategy == "baseline" else part - base.loc[part.index]
    return pd.concat(parts, names=["strategy", "seed"])


def cell(values: pd.Series, signed: bool) -> str:
    """Return the mean and the standard deviation of the seeds."""
    return f"{values.mean():{'+' * signed}.1f} ± {values.std():.1f}"


def print_table(table: pd.DataFrame, model: str) -> None:
    """Print a row for each strategy."""
    print("".join(f"  {text:22}" for text in ("", *table.columns)).rstrip())
    for strategy, rows in table.groupby(level="strategy", sort=False):
        cells = [cell(rows[column], strategy != "baseline") for column in table]
        name = "aligned" if model == "llama" and strategy == "full" else strategy
        name += "" if strategy == "baseline" else ", change"
        print("".join(f"  {text:22}" for text in (name, *cells)).rstrip())


def words_say(table: pd.DataFrame) -> str:
    """Return what the table of word alignment shows."""
    close, distant = (table[column].unstack("seed").mean(axis=1) for column in table)
    gain, harm = close["full"], distant["full"]
    if gain <= 0:
        return "Realignment does not help the close languages here, so freezing cannot be judged."
    first = f"Full realignment helps the close languages ({gain:+.1f})"
    if harm >= 0:
        return f"{first} and does not harm the distant one ({harm:+.1f}): nothing to protect."
    kept, left = close["front"] / gain, distant["front"] / harm
    is_seen = kept >= 0.75 and left <= 0.5
    second = f"Front-freezing keeps {kept:.0%} of the gain and {max(left, 0):.0%} of the harm"
    verdict = "the pattern" if is_seen else "NOT the pattern"
    first += f" and harms the distant one ({harm:+.1f})."
    return f"{first}\n{second}: {verdict} that the paper reports."


def sentences_say(table: pd.DataFrame) -> str:
    """Return what the table of sentence alignment shows."""
    labelled, others = (table[column].loc["full"] for column in table)
    better, total = (others > 0).sum(), len(others)
    verb = "helps" if others.mean() > 0 else "does NOT help"
    first = f"Alignment {verb} the languages without labels ({others.mean():+.1f} F1);"
    first += f" they gain in {better} of {total} seeds."
    return f"{first}\nThe languages with labels change by {labelled.mean():+.1f}."


def print_summary(data: pd.DataFrame, model: str) -> None:
    """Print the table of a model and what it shows; data: the scores of its runs."""
    needed = {"bert": {"baseline", "full", "front"}, "llama": {"baseline", "full"}}[model]
    missing = sorted(needed - set(data.strategy))
    if missing:
        print(f"\n{model}: there are no records of {', '.join(missing)}; run it again.")
        return
    table = changes(data, model)
    if table.empty:
        print(f"\n{model}: no seed has runs of all strategies; run it again.")
        return
    print(f"\n{HEADS[model]} mean ± deviation of {len(table.loc['full'])} seeds")
    print_table(table, model)
    print(words_say(table) if model == "bert" else sentences_say(table))


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return 0, or 2 if the records cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the records")
    folder = parser.parse_args(argv).folder
    tables = read(folder)
    if not tables:
        return 2  # `read` said why
    data = pd.concat(tables, ignore_index=True)
    data = data[(data.kind == "score") & data.name.isin(["accuracy", "f1"])]
    same = data.duplicated(["model", "task", "strategy", "seed", "language"])
    if same.any():
        warn(f"{data.file[same].iloc[0]}: another record has the same seed; remove one of the two")
        return 2
    for model in GROUPS:
        print_summary(data[(data.model == model) & (data.task == TASKS[model])], model)
    print(f"\nAll scores: python results/report.py {folder}")
    print("This world was made to show the effect; it proves nothing about real languages.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
