"""Measure what freezing does to languages that full realignment lowers, and to those it raises.

    python results/damping.py      the scores that the authors published, and those of e5-small

The languages are sorted by their change through full realignment in four of the five seeds. The
fifth seed measures: for each row, what full realignment and freezing change there. So a language
that full realignment lowers by chance in some seeds does not look protected. Each of the five seeds
measures once, and a row holds the means of all. A case is a language with one model and one aligner
(and one task); the cases of a row are counted in each of the five sortings, and averaged. The rows
`all` need no sorting.

p is computed by exchanging full and front within seeds, as in swap.py: it is the share of exchanges
after which front - full in that row, or from the languages that are lowered to those that are
raised most, is at least as large in size. As the languages are sorted anew, it is at least 1/32 =
0.03 with one model (1/8 with three seeds); in a row `all`, it is at least 0.06.
"""

import numpy as np
import pandas as pd
from records import PAPER, read
from swap import FIVE_SEEDS, MODELS, OTHERS, exchanged, p_text, select

EDGES = (0, 3)  # points
ROWS = ("lowered", "raised by 0 to 3", "raised by more", "all")
TASKS = {"PoS": ["udpos"], "NER, NLI, QA": OTHERS}
TASKS |= {"NER": ["wikiann"], "NLI": ["xnli"], "QA": ["xquad"]}


def sums(part: pd.DataFrame, other: str) -> np.ndarray:
    """Return sums over the cases of a model, for all exchanges: (3, 2 ** seeds, rows).

    They are the number of cases, and their change by full and by the other strategy.
    """
    numbers, total = np.arange(len(ROWS)), 0
    for baseline, full, frozen in exchanged(part, other):
        seeds = baseline.shape[1]
        changes = 100 * np.stack([full - baseline, frozen - baseline])  # (2, 2 ** seeds, L, seeds)
        for seed in range(seeds):
            by_full = np.delete(changes[0], seed, axis=-1).mean(-1)
            row = np.digitize(by_full, EDGES, right=True)
            is_in = (row[..., None] == numbers) | (numbers == 3)  # (2 ** seeds, languages, rows)
            measured = changes[..., seed, None] * is_in
            total = total + np.concatenate([is_in[None], measured]).sum(2) / seeds
    return total


def compare(data: pd.DataFrame, other: str = "front") -> tuple[np.ndarray, np.ndarray, float]:
    """Return (cases, change by full, by the other strategy) of each row, (3, rows), and p.

    p: (rows,) of the difference in each row, and of its change from the first to the third row.
    """
    total = np.zeros((3, 1, len(ROWS)))
    for _, part in data.groupby("model"):
        total = (total[:, :, None] + sums(part, other)[:, None]).reshape(3, -1, len(ROWS))
    cases, full, frozen = total
    cases = np.where(cases == 0, np.inf, cases)  # an exchange can leave a row empty
    difference = (frozen - full) / cases
    trend = difference[:, 2] - difference[:, 0]
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


def cells_of(data: pd.DataFrame) -> list[list[str]]:
    """Return, for each row, the cells: cases, full, front, front - full, p, back - full."""
    (cases, full, front), p, _ = compare(data)
    (_, _, back), *_ = compare(data, "back")
    rows = []
    for k in range(len(ROWS)):
        changes = [f"{change[k]:+.1f}" for change in (full, front, front - full, back - full)]
        cells = [*changes[:3], p_text(p[k]), changes[3]]
        rows.append([f"{cases[k]:.0f}", *(cells if cases[k] >= 0.5 else "-----")])
    return rows


def main() -> None:
    (scores,) = read(PAPER)
    scores = select(scores, name=["accuracy", "f1"])
    parts = {task: scores[scores.task.isin(names)] for task, names in TASKS.items()}
    e5_small = {"PoS, e5-small": select(pd.concat(read(FIVE_SEEDS)))}
    e5_small["PoS, e5-small, 1,965 steps"] = longer_realignment()
    print("| scores, by full realignment | cases | full | front | front - full | p | back - full |")
    print("|---|---|---|---|---|---|---|")
    pooled = {name: parts[name] for name in ("PoS", "NER, NLI, QA")}
    for name, data in (pooled | e5_small).items():
        for row, cells in zip(ROWS, cells_of(data)):
            print(f"| {name}: {row} |", " | ".join(cells), "|")
    groups = {}
    for task in ("PoS", "NER", "NLI", "QA"):
        groups[f"{task}, 3 models"] = parts[task]
        for name, model in MODELS.items():
            groups[f"{task}, {name}"] = parts[task][parts[task].model == model]
    of_xlm_r = groups["PoS, XLM-R"]
    groups["PoS, XLM-R, dictionary"] = of_xlm_r[of_xlm_r.aligner.isin(["none", "dictionary"])]
    columns = "full | front - full | p | back - full"
    print(f"\n| scores | lowered: cases | {columns} | all: cases | {columns} |")
    print("|---" * 11 + "|")
    for name, data in groups.items():
        lowered, *_, everything = cells_of(data)
        print(f"| {name} |", " | ".join(lowered[:2] + lowered[3:]), "|", end=" ")
        print(" | ".join(everything[:2] + everything[3:]), "|")
    print("\nfront - full, from the languages lowered to those raised most:")
    for name, data in pooled.items():
        print(f"{name}: p = {compare(data)[2]:.5f}")


if __name__ == "__main__":
    main()
