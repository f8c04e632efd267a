"""Test whether chance explains why full and front help, or harm, different numbers of languages.

    python results/swap.py      the published scores, and e5-small with five seeds

If freezing changed nothing, the run with full realignment and the run with front-freezing of one
seed could be exchanged. This is done for every subset of the seeds, and the languages are counted
again (an exact permutation test). p is the share of exchanges whose two counts differ by at least
as much as the observed ones. All tasks, aligners and languages of a model are exchanged together,
its seeds and the models independently. With one model of five seeds, p is at least 2/32 = 0.06.
"""

import itertools
import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd
from records import PAPER, read

FIVE_SEEDS = PAPER.parent / "e5-small-five-seeds"
MODELS = {"XLM-R": "xlm-roberta-base", "mBERT": "bert-base-multilingual-cased"}
MODELS |= {"distilmBERT": "distilbert-base-multilingual-cased"}
OTHERS = ["wikiann", "xnli", "xquad"]


def marked(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return how many languages are up and down by the paper's rule, (..., 2).

    scores: (..., languages, seeds), of a strategy; base: the same of the baseline.
    """
    change = scores.mean(-1) - base.mean(-1)
    bar = np.maximum(scores.std(-1, ddof=1), base.std(-1, ddof=1))
    return np.stack([(change > bar).sum(-1), (change < -bar).sum(-1)], -1)


def exchanged(part: pd.DataFrame, other: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (baseline, full, other) for each task, metric and aligner of a model.

    The scores of `full` and of the other strategy, (2 ** seeds, languages, seeds), are those of all
    exchanges, the first of which exchanges nothing. baseline: (languages, seeds).
    """
    index = ["task", "name", "aligner", "strategy", "language"]
    tables = part.pivot(index=index, columns="seed", values="value")
    seeds = tables.shape[1]
    if tables.isna().any(axis=None):
        raise SystemExit(f"{sys.argv[0]}: a run of one of the seeds {[*tables]} is missing")
    is_exchanged = np.array([*itertools.product([False, True], repeat=seeds)])[:, None]
    aligned = part[part.strategy == "full"]
    for task, name, aligner in aligned.groupby(["task", "name", "aligner"]).groups:
        baseline = tables.loc[task, name, "none", "baseline"]
        one, two = (tables.loc[task, name, aligner, strategy] for strategy in ("full", other))
        assert (one.index == baseline.index).all() and (two.index == baseline.index).all()
        full, frozen = np.where(is_exchanged, two, one), np.where(is_exchanged, one, two)
        yield baseline.to_numpy(), full, frozen


def exchanges(part: pd.DataFrame) -> np.ndarray:
    """Return the counts of a model for all exchanges: (2 ** seeds, full and front, up and down)."""
    total = 0
    for baseline, full, front in exchanged(part, "front"):
        total = total + np.stack([marked(full, baseline), marked(front, baseline)], 1)
    return total


def compare(name: str, data: pd.DataFrame, direction: str) -> str:
    """Return a line of the table: the counts of full and of front, and p."""
    column, counts, differences = ["helped", "harmed"].index(direction), 0, np.zeros(1)
    for _, part in data.groupby("model"):
        of_model = exchanges(part)[:, :, column]
        counts = counts + of_model[0]
        differences = np.add.outer(differences, of_model[:, 1] - of_model[:, 0]).ravel()
    p = (abs(differences) >= abs(differences[0])).mean()
    total = len(data[data.strategy == "full"]) // data.seed.nunique()
    return f"| {name} | {direction} | {total} | {counts[0]} | {counts[1]} | {p_text(p)} |"


def p_text(p: float) -> str:
    """Return p as the tables show it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.01 else f"{p:.2f}"


def harmed_by_chance(seeds: int, draws: int = 400_000) -> float:
    """Return the share of languages that the rule marks as down if nothing changes.

    Scores are drawn from one normal distribution.
    """
    scores, base = np.random.default_rng(0).normal(size=(2, draws, seeds))
    return marked(scores, base)[1] / draws


def select(data: pd.DataFrame, **values) -> pd.DataFrame:
    """Return the scores that have one of the given values in each column, without English."""
    data = data[(data.language != "en") & (data.schedule != "during") & (data.kind == "score")]
    data = data[data.strategy.isin(["baseline", "full", "front", "back"])]
    for column, allowed in values.items():
        data = data[data[column].isin(allowed)]
    return data


def main() -> None:
    (published,), ours = read(PAPER), pd.concat(read(FIVE_SEEDS))
    pos = select(published, task=["udpos"])
    others = select(published, task=OTHERS, name=["f1", "accuracy"])
    by_em = select(published, task=OTHERS, name=["f1", "accuracy", "em"])
    by_em = by_em[(by_em.task != "xquad") | (by_em.name == "em")]
    dictionary = pos[pos.aligner.isin(["none", "dictionary"])]
    rows = [("PoS, XLM-R, dictionary", dictionary[dictionary.model == MODELS["XLM-R"]])]
    rows += [("PoS, 3 models, 3 aligners", pos)]
    rows += [("NER, NLI, QA (F1), 3 models", others), ("NER, NLI, QA (EM), 3 models", by_em)]
    rows += [("NER, NLI, QA (F1), mBERT", others[others.model == MODELS["mBERT"]])]
    rows += [("PoS, e5-small, dictionary", select(ours))]
    print("| scores | counted | of | full | front | p |\n|---|---|---|---|---|---|")
    for name, data in rows:
        print(compare(name, data, "helped"), compare(name, data, "harmed"), sep="\n")
    print("\nDown by chance, if nothing changes (simulated):")
    for seeds in (3, 5):
        print(f"{seeds} seeds: {harmed_by_chance(seeds):.1%} of languages")


if __name__ == "__main__":
    main()
