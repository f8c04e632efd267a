"""Measure what freezing does to languages that full realignment lowers, and to those it raises.

    python results/damping.py      the scores that the authors published, and those of e5-small

The languages are sorted by their change through full realignment in four of the five seeds. The
fifth seed measures: for each row, what full realignment and freezing change there. So a language
that full realignment lowers by chance in some seeds does not look protected. Each of the five seeds
measures once, and a row holds the means of all. A case is a language with one model and one
aligner (and one task); the cases of a row are counted in each of the five sortings, and averaged.

p is computed by exchanging full and front within seeds, as in swap.py: it is the share of exchanges
after which front - full in that row, or from the first to the last row, is at least as large in
size. As the languages are sorted anew, it is at least 1/32 = 0.03 with one model (1/8 with three
seeds).
"""

import numpy as np
import pandas as pd
from records import PAPER, read
from swap import FIVE_SEEDS, MODELS, OTHERS, exchanged, p_text, select

EDGES = (0, 3)  # points
ROWS = ("lowered", "raised by 0 to 3", "raised by more")
TASKS = {"PoS": ["udpos"], "NER, NLI, QA": OTHERS}
TASKS |= {"NER": ["wikiann"], "NLI": ["xnli"], "QA": ["xquad"]}
IN_ALL_ROWS = ("PoS", "NER, NLI, QA", "PoS, e5-small")  # the others: lowered languages alone


def sums(part: pd.DataFrame, other: str) -> np.ndarray:
    """Return sums over the cases of a model, for all exchanges: (3, 2 ** seeds, rows).

    They are the number of cases, and their change by full and by the other strategy.
    """
    total = 0
    for baseline, full, frozen in exchanged(part, other):
        seeds = baseline.shape[1]
        changes = 100 * np.stack([full - baseline, frozen - baseline])  # (2, 2 ** seeds, L, seeds)
        for seed in range(seeds):
            by_full = np.delete(changes[0], seed, axis=-1).mean(-1)
            row = np.digitize(by_full, EDGES, right=True)
            is_in = row[..., None] == np.arange(len(ROWS))  # (2 ** seeds, languages, rows)
            measured = changes[..., seed, None] * is_in
            total = total + np.concatenate([is_in[None], measured]).sum(2) / seeds
    return total


def compare(data: pd.DataFrame, other: str = "front") -> tuple[np.ndarray, np.ndarray, float]:
    """Return (cases, change by full, by the other strategy) of each row, (3, rows), and p.

    p: (rows,) of the difference in each row, and of its change from the first to the last row.
    """
    total = np.zeros((3, 1, len(ROWS)))
    for _, part in data.groupby("model"):
        total = (total[:, :, None] + sums(part, other)[:, None]).reshape(3, -1, len(ROWS))
    cases, full, frozen = total
    cases = np.where(cases == 0, np.inf, cases)  # an exchange can leave a row empty
    difference = (frozen - full) / cases
    trend = difference[:, -1] - difference[:, 0]
    rows = [total[0, 0], full[0] / cases[0], frozen[0] / cases[0]]
    return np.array(rows), extreme(difference), extreme(trend)


def extreme(values: np.ndarray) -> np.ndarray:
    """Return the share of exchanges whose value is at least as large in size as the first one."""
    return (abs(values) >= abs(values[0]) - 1e-9).mean(0)


def longer_realignment() -> pd.DataFrame:
    """Return the scores of e5-small after 1,965 steps of realignment, and of its baselines."""
    data = select(pd.concat(read(PAPER.parent / "e5-small-34-languages")))
    is_baseline = data.strategy == "baseline"
    data["aligner"] = data.aligner.mask(is_baseline, "none")  # one of them has a probe by links
    is_long = data.settings.map(lambda settings: ("realign_steps", "1965") in settings)
    return data[is_long | is_baseline]


def main() -> None:
    (scores,) = read(PAPER)
    scores = select(scores, name=["accuracy", "f1"])
    parts = {task: scores[scores.task.isin(names)] for task, names in TASKS.items()}
    for task in ("PoS", "NER, NLI, QA", "QA"):
        for name, model in MODELS.items():
            parts[f"{task}, {name}"] = parts[task][parts[task].model == model]
    parts["PoS, e5-small"] = select(pd.concat(read(FIVE_SEEDS)))
    parts["PoS, e5-small, 1,965 steps"] = longer_realignment()
    print("| scores, by full realignment | cases | full | front | front - full | p | back - full |")
    print("|---|---|---|---|---|---|---|")
    trends = []
    for name, data in parts.items():
        (cases, full, front), p, p_trend = compare(data)
        (_, _, back), *_ = compare(data, "back")
        trends.append(f"{name}: p = {p_trend:.5f}")
        for k, row in enumerate(ROWS if name in IN_ALL_ROWS else ROWS[:1]):
            changes = [full[k], front[k], front[k] - full[k]]
            cells = [f"{name}: {row}", f"{cases[k]:.0f}", *(f"{change:+.1f}" for change in changes)]
            print("|", " | ".join([*cells, p_text(p[k]), f"{back[k] - full[k]:+.1f}"]), "|")
    print("\nfront - full, from the first to the last row:", *trends[:2], sep="\n")


if __name__ == "__main__":
    main()
