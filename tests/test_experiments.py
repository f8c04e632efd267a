"""The numbers in results/README.md, and some in README.md, are recomputed from the records."""

import csv
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import correlation, mean, stdev

import numpy as np
import pandas as pd
import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
sys.path.insert(0, str(RESULTS))
import damping
import swap
from report import bootstrap_interval

TEXT = (RESULTS / "README.md").read_text("utf-8")
README = " ".join((RESULTS.parent / "README.md").read_text("utf-8").split())
PUBLISHED = "paper.csv"
FOLDERS = sorted(path.name for path in RESULTS.iterdir() if [*path.glob("*.json")])
E5, GEMMA, FIVE_SEEDS = "e5-small-34-languages", "gemma3-270m-xsid", "e5-small-five-seeds"
RISING, LONGER = "e5-small-rising-rate", "Longer realignment on that encoder"
LONG_WARMUP = "e5-small-long-warmup"
WORDS_OR_SENTENCES = "Words against sentences on that encoder"
STAGES_ON_E5 = "What the stages do to the layers (`e5-small-probe`)"
SHORT = "Short runs, which only show that the code runs"
SHORT_RUNS = ("e5-small-udpos", "e5-small-udpos-fp32", "e5-small-200-steps", "gemma3-270m-tasks")
STRATEGIES = ("baseline", "full", "front", "back")
# Of xSID: languages aligned with English, other languages without labels, those with labels.
GROUPS = ("tr da ja lt no", "de-ba de-muc gsw id nl", "en de it zh ar")


def section(title: str) -> str:
    """Return the section that names a folder in a heading, or has this heading, in one line."""
    matches = []
    for part in TEXT.split("\n## "):
        headings = [part.splitlines()[0], *re.findall("^### (.*)", part, re.M)]
        if any(f"`{title}`" in heading or heading == title for heading in headings):
            matches.append(part)
    (match,) = matches
    return " ".join(match.split())


@functools.cache
def records(folder: str) -> list[dict]:
    paths = sorted((RESULTS / folder).glob("*.json"))
    return [json.loads(path.read_text("utf-8")) for path in paths]


def runs(folder: str, longer=False, other_layer=False, **values: str | int) -> list[dict]:
    """Return the records of a folder that have these values.

    longer: of those with 1,965 steps. other_layer: of those of e5-small that align words at the
    layer where sentences are aligned otherwise, or sentences at that of words.
    """
    selected = []
    for run in records(folder):
        is_longer = run["steps"].get("realign") == 1965
        where = run["config"].get("unit", "word"), run["config"].get("layer")
        is_other = folder == E5 and where in [("word", 7), ("sentence", -2)]
        is_kind = (is_longer, is_other) == (longer, other_layer)
        if is_kind and all(run[key] == value for key, value in values.items()):
            selected.append(run)
    return selected


def by_strategy(folder: str, longer=False, other_layer=False, **values: str | int) -> dict:
    """Return {strategy: {seed: record}}."""
    selected = defaultdict(dict)
    for run in runs(folder, longer, other_layer, **values):
        selected[run["strategy"]][run["seed"]] = run
    return selected


def points(run: dict, languages: list[str] | None = None) -> dict[str, float]:
    """Return {language: main metric in percent}, by default of the languages without labels."""
    labelled = run["config"].get("train_languages") or ["en"]
    main = {code: 100 * next(iter(metrics.values())) for code, metrics in run["scores"].items()}
    return {code: main[code] for code in languages or set(main) - set(labelled)}


def average(run: dict, languages: list[str] | None = None) -> float:
    return mean(points(run, languages).values())


def ups_and_downs(run: dict, base: dict) -> tuple[int, int]:
    """Return how many languages of a run are above and below another run."""
    scores, start = points(run), points(base)
    up = sum(scores[code] > start[code] for code in scores)
    down = sum(scores[code] < start[code] for code in scores)
    return up, down


@functools.cache
def report(folder: str) -> str:
    command = [sys.executable, RESULTS / "report.py", RESULTS / folder]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "left out" not in result.stderr
    return result.stdout


def row_of(table: str, start: str) -> str:
    (row,) = (line for line in table.splitlines() if line.startswith(start))
    return row


def line(*cells: str) -> str:
    """Return a line of a table of results/README.md."""
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def intervals_of(table: str, start: str) -> list[str]:
    """Return the paired intervals in the row of a table that begins with `start`."""
    return re.findall(r"[-+]\d+\.\d \[[-+]\d+\.\d, [-+]\d+\.\d\]", row_of(table, start))


def counts_in(row: str) -> list[tuple[int, int]]:
    """Return the (up, down) of each strategy in a row of a table."""
    return [(int(up), int(down)) for up, down in re.findall(r"(\d+)/(\d+)", row)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_of_records_has_a_section_and_the_report_reads_it(folder):
    assert section(SHORT if folder in SHORT_RUNS else folder)
    assert report(folder)


# ---- AlignFreeze on e5-small ---------------------------------------------------------------------


def test_rates_of_fine_tuning_that_never_decay():
    text = section(RISING)
    for name, folder, start in (
        ("as the paper says", E5, "| e5-small | before, dictionary, layer -2 "),
        ("rising to the end", RISING, "| e5-small | before, dictionary "),
        ("80% warm-up, constant", LONG_WARMUP, "| e5-small | before, dictionary "),
    ):
        by_deviation, paired = report(folder).split("### PoS accuracy\n")[1].split("Paired by")[:2]
        row = row_of(by_deviation, start)
        assert sorted(by_strategy(folder)["baseline"]) == [31, 42, 66]
        baseline = row.split("|")[5].strip()
        full, front, back, *_, difference = intervals_of(paired.split("###")[0], start)
        assert line(name, baseline, full, front, back, difference) in text
        counts = [f"{up}/{down}" for up, down in counts_in(row)[:3]]
        assert line(name, *counts) in text
        if folder == LONG_WARMUP:  # "neither harms a language"
            assert [count.split("/")[1] for count in counts] == ["0", "0", "1"]
            assert f"back-freezing gains {back.split()[0]} and harms German by 0.2." in text


def by_language(folder: str, strategy: str) -> dict[str, float]:
    """Return the mean accuracy over seeds of realignment with the dictionary, by language."""
    selected = by_strategy(folder)[strategy]
    if folder == E5 and strategy != "baseline":
        selected = by_strategy(folder, aligner="dictionary")[strategy]
    assert set(selected) == {31, 42, 66}
    scores = [points(run, [*run["scores"]]) for run in selected.values()]
    return {code: mean(run[code] for run in scores) for code in scores[0]}


def correlation_of_other_seeds(strategy: str) -> float:
    """Return r of the gain by realignment, and by training, which is measured in other seeds."""
    low, usual = by_strategy(RISING), by_strategy(E5, strategy="baseline")["baseline"]
    results = []
    for seed in usual:
        start = points(low["baseline"][seed])
        gain = {code: value - start[code] for code, value in points(low[strategy][seed]).items()}
        training = {
            code: mean(
                points(usual[other])[code] - points(low["baseline"][other])[code]
                for other in usual
                if other != seed
            )
            for code in gain
        }
        results.append(correlation(training.values(), [gain[code] for code in training]))
    return mean(results)


def test_what_the_rising_rate_does_to_korean_and_english():
    text, base = section(RISING), by_language(RISING, "baseline")
    english, korean, more_than_english, correlations, lowered = [], [], [], [], []
    usual = by_language(E5, "baseline")
    training = {code: usual[code] - base[code] for code in base}
    for strategy in ("full", "front", "back"):
        scores = by_language(RISING, strategy)
        change = {code: scores[code] - base[code] for code in base}
        english.append(change.pop("en"))
        lowered.append({code for code, value in change.items() if value < 0})
        korean.append(change["ko"])
        more_than_english.append([code for code in change if change[code] > english[-1]])
        pairs = [(training[code], change[code]) for code in change]
        correlations.append(correlation(*zip(*pairs)))
    assert lowered == [{"ko"}, {"ko"}, {"ko", "ja"}]
    assert f"back-freezing also lowers Japanese by {-change['ja']:.1f}, within" in text
    harm = "({1:+.1f}; full realignment {0:+.1f}, back-freezing {2:+.1f})".format(*korean)
    assert f"all three harm Korean, front-freezing most {harm};" in text
    gains = "({:+.1f} by full, {:+.1f} by front-freezing, {:+.1f} by back-freezing)"
    assert gains.format(*english) in text
    assert more_than_english == [["sk"], [], ["sk"]]
    assert "except Slovak by full realignment and back-freezing" in text
    assert "r = {:.2f} for full and {:.2f} for front-freezing".format(*correlations) in text
    assert f"lowers Korean (by {-training['ko']:.1f})" in text
    other_seeds = [f"{correlation_of_other_seeds(strategy):.2f}" for strategy in ("full", "front")]
    assert "with different seeds in the two terms, r is {} and {}.".format(*other_seeds) in text
    levels = [
        mean(points(run, ["en"])["en"] for run in by_strategy(folder)["baseline"].values())
        for folder in (RISING, E5)
    ]
    assert "have {:.1f}% in English instead of {:.1f}%".format(*levels) in text


def test_the_published_scores_of_xlm_r():
    text = section(PUBLISHED)
    by_deviation, paired = report(PUBLISHED).split("### PoS accuracy\n")[1].split("Paired by")[:2]
    paired = paired.split("###")[0]
    start = "| xlm-roberta-base                   | before, dictionary "
    counts = [f"{up}/{down}" for up, down in counts_in(row_of(by_deviation, start))]
    *holm, (better, worse) = counts_in(row_of(paired, start))
    *changes, difference = intervals_of(paired, start)
    assert line("change of the average", *changes) in text
    assert line("up/down, one standard deviation", *counts) in text
    assert line("up/down, paired t-tests with Holm", *(f"{u}/{d}" for u, d in holm)) in text
    full, front, _ = (count.split("/")[0] for count in counts)
    assert f"{front} languages gain with front-freezing and {full} with full" in text
    assert f"better by {difference}; after Holm's correction it is better in {better}" in text
    assert worse == 0


def test_786_steps():
    text = section(E5)
    bases = by_strategy(E5, strategy="baseline")["baseline"]
    selected = by_strategy(E5, schedule="before", aligner="dictionary")
    for seed, base in bases.items():
        cells = [str(seed), f"{average(base):.1f}"]
        for strategy in STRATEGIES[1:]:
            run = selected[strategy][seed]
            assert (run["steps"]["finetune"], run["steps"]["realign"]) == (786, 786)
            assert run["config"]["layer"] == -2
            up, down = ups_and_downs(run, base)
            cells.append(f"{average(run):.1f} ({up}, {down})")
        assert line(*cells) in text


def test_languages_up_and_down_by_one_standard_deviation():
    table = report(E5).split("Paired by seed:")[0]
    words = counts_in(row_of(table, "| e5-small | before, dictionary, layer -2 "))
    cells = [f"{up}/{down}" for up, down in words[:3]]
    assert line("up/down, one standard deviation", "", *cells) in section(E5)
    assert not any(down for _, down in words)


def test_longer_realignment():
    """1,965 steps of realignment instead of 786, compared with the same baselines."""
    text = section(LONGER)
    bases, long = by_strategy(E5, strategy="baseline")["baseline"], by_strategy(E5, longer=True)
    assert {*long} == {*STRATEGIES[1:]}
    assert all(sorted(part) == [31, 42, 66] for part in long.values())
    for seed in sorted(long["full"]):
        cells = [str(seed), f"{average(bases[seed]):.1f}"]
        for strategy in STRATEGIES[1:]:
            run = long[strategy][seed]
            up, down = ups_and_downs(run, bases[seed])
            cells.append(f"{average(run):.1f} ({up}, {down})")
            pairs = run["pairs"].values()
            assert {counts["sentences"] for counts in pairs} <= {924, 925}
            assert sum(counts["sentences"] for counts in pairs) == 31_440
            assert run["pairs"] == long["full"][seed]["pairs"]
        assert line(*cells) in text
    start = "| e5-small | before, dictionary, layer -2, realign_steps 1965 "
    by_deviation, paired = report(E5).split("### PoS accuracy\n")[1].split("Paired by seed:")
    *changes, difference = intervals_of(paired.split("###")[0], start)
    assert line("change, paired", "", *changes) in text
    counts = [f"{up}/{down}" for up, down in counts_in(row_of(by_deviation, start))]
    assert line("up/down, one standard deviation", "", *counts) in text
    row = row_of(paired.split("###")[0], "| e5-small | before, dictionary, layer -2 ")
    *changes, _, usual = intervals_of(row, "")  # without `emb,front`
    assert line("change at 786 steps, paired", "", *changes) in text
    assert f"front - full is {difference} (at 786 steps: {usual})" in text
    assert [count.split("/")[1] for count in counts] == ["0"] * 3
    lower = {}
    for code in points(bases[31]):
        changes = [points(run)[code] - points(bases[k])[code] for k, run in long["full"].items()]
        if max(changes) < 0:
            lower[code] = mean(changes)
    assert [*lower] == ["fa"] and f"lowers it in every seed ({lower['fa']:+.1f} on average)" in text
    raised = [points(run)["fa"] - points(bases[k])["fa"] for k, run in long["front"].items()]
    assert min(raised) > 0 and f"raises it in every seed ({mean(raised):+.1f})" in text
    persian = [[points(run)["fa"] for run in part.values()] for part in (long["full"], bases)]
    fall = mean(persian[1]) - mean(persian[0])
    assert 0 < fall < max(map(stdev, persian)) and "within one standard deviation" in text
    five = by_strategy(FIVE_SEEDS)
    persian = [[points(run)["fa"] for run in five[name].values()] for name in ("full", "baseline")]
    rise = mean(persian[0]) - mean(persian[1])
    assert f"at 786 steps, full realignment raises it by {rise:.1f}" in text
    assert cell("PoS: front - full > 0, 1,965 steps; rising rate").startswith(
        f"e5-small {difference}; "
    )


def test_averages_of_five_seeds_on_a_gpu():
    text, selected = section(FIVE_SEEDS), by_strategy(FIVE_SEEDS)
    averages, differences, by_code = [], [], []
    for strategy in STRATEGIES:
        seeds = selected[strategy]
        values = [average(run) for run in seeds.values()]
        assert set(seeds) == {31, 42, 66, 23, 17}
        for run in seeds.values():
            assert (run["device"], run["steps"]["finetune"]) == ("NVIDIA H200", 786)
        averages.append(f"{mean(values):.1f} ± {stdev(values):.1f}")
        for run in runs(E5, strategy=strategy):  # on a CPU
            if run["config"]["layer"] in (None, -2):
                differences.append(abs(average(run) - average(seeds[run["seed"]])))
                same = points(seeds[run["seed"]])
                by_code += [abs(value - same[code]) for code, value in points(run).items()]
    assert line("accuracy", *averages) in text
    assert f"The {len(differences)} averages" in text
    assert f"at most {max(differences):.2f}, and by {mean(differences):.2f} on average" in text
    assert f"single languages differ by up to {max(by_code):.1f}" in text


def test_languages_up_and_down_with_five_seeds_on_a_gpu():
    text = section(FIVE_SEEDS)
    by_deviation, paired = report(FIVE_SEEDS).split("Paired by seed:")
    counts = counts_in(row_of(by_deviation, "| e5-small | before, dict"))
    *gains, (above, below) = counts_in(row_of(paired, "| e5-small | before, dict"))
    cells = [f"{up}/{down}" for up, down in counts]
    assert line("up/down, one standard deviation", "", *cells) in text
    assert not any(down for _, down in counts)
    cells = [f"{up}/{down}" for up, down in gains]
    assert line("up/down, paired t-tests with Holm", "", *cells) in text
    assert f"front is below full in {below} languages" in text and above == 0


CELLS = {  # rows of the table: how the report calls them
    ("words", -2): "before, dictionary, layer -2",
    ("words", 7): "before, dictionary, layer 7",
    ("sentences", -2): "before, sentences, layer -2",
    ("sentences", 7): "before, sentences, layer 7",
}


def named_cells(table: str, row: str) -> dict[str, str]:
    """Return {heading: cell} of a row of a table of the report."""
    head = next(line for line in table.splitlines() if line.startswith("| model"))
    names = [name.strip() for name in head.split("|")]
    return dict(zip(names, [text.strip() for text in row_of(table, row).split("|")]))


def test_the_table_of_units_layers_and_strategies():
    text = section(WORDS_OR_SENTENCES)
    by_deviation, paired = report(E5).split("### PoS accuracy\n")[1].split("Paired by seed:")
    for (unit, layer), name in CELLS.items():
        start, cells = f"| e5-small | {name} ", [f"{unit}, {layer}"]
        changes = named_cells(paired.split("###")[0], start)
        counts = named_cells(by_deviation, start)
        for strategy in ("full", "front", "back", "emb,front"):
            if counts.get(strategy, "-") == "-":
                cells.append("")
                continue
            interval = changes[strategy].rpartition(" ")[0]
            cells.append(f"{interval}, {counts[strategy].split()[-1]}")
        assert line(*cells) in text


def changes_of(unit: str, layer: int) -> dict[int, dict[str, float]]:
    """Return {seed: {language: change by full realignment}} of a row of that table."""
    aligner = {"words": "dictionary", "sentences": "none"}[unit]
    other_layer = (unit, layer) in [("words", 7), ("sentences", -2)]
    selected = by_strategy(E5, other_layer=other_layer, strategy="full", aligner=aligner)["full"]
    bases = by_strategy(E5, strategy="baseline")["baseline"]
    changes = {}
    for seed, run in selected.items():
        assert run["config"]["layer"] == layer and run["steps"]["realign"] == 786
        start = points(bases[seed])
        changes[seed] = {code: value - start[code] for code, value in points(run).items()}
    return changes


def test_the_answer_about_units_and_layers():
    text = section(WORDS_OR_SENTENCES)
    changes = {key: changes_of(*key) for key in CELLS}
    by_seed = {
        key: {seed: mean(values.values()) for seed, values in seeds.items()}
        for key, seeds in changes.items()
    }
    for layer in (-2, 7):  # "at both layers, in every seed"
        words, sentences = by_seed["words", layer], by_seed["sentences", layer]
        assert all(words[seed] > sentences[seed] for seed in words) and len(words) == 3
    own, same, other = [], [], []
    for one, two in itertools.combinations_with_replacement(CELLS, 2):
        values = []
        for seed, another in itertools.permutations((31, 42, 66), 2):
            start, end = changes[one][seed], changes[two][another]
            values.append(correlation(start.values(), [end[code] for code in start]))
        kind = own if one == two else same if one[0] == two[0] else other
        kind.append(mean(values))
    assert "(words: r = {:.2f}; sentences: {:.2f})".format(*same) in text
    assert f"within one row of the table ({min(own):.2f} to {max(own):.2f})" in text
    assert f"between {min(other):.2f} and {max(other):.2f}" in text
    over_seeds = {
        key: {code: mean(values[code] for values in seeds.values()) for code in seeds[31]}
        for key, seeds in changes.items()
    }
    for code, name in (("he", "Hebrew changes by"), ("ar", "Arabic by")):
        values = [over_seeds[key][code] for key in CELLS]
        sentence = f"{name} {values[0]:+.1f} and {values[1]:+.1f} with words, "
        assert sentence + f"{values[2]:+.1f} and {values[3]:+.1f} with sentences" in text
    table = report(E5).split("Paired by seed:")[0]
    counts = counts_in(row_of(table, "| e5-small | before, sentences, layer 7 "))
    full_down, front_down = counts[0][1], counts[1][1]
    assert f"{front_down} languages fall, against {full_down} with full realignment." in text
    chance = swap.harmed_by_chance(3) * 34
    assert f"{counts[2][1]} languages fall (chance alone: {chance:.0f})" in text
    words = counts_in(row_of(table, "| e5-small | before, dictionary, layer 7 "))
    assert words[0][1] == 2 and f"where chance alone would mark {chance:.0f} languages" in text
    both = "({fa:+.1f} and {fi:+.1f})".format(**over_seeds["words", 7])
    assert f"Words at layer 7 harm Persian and Finnish {both}," in text
    bases = by_strategy(E5, strategy="baseline")["baseline"]
    words = by_strategy(E5, schedule="before", aligner="dictionary")
    sentences = by_strategy(E5, schedule="before", aligner="none")
    for seed in bases:  # "in every seed"
        assert average(words["emb,front"][seed]) < average(words["front"][seed])
        assert average(sentences["back"][seed]) < average(sentences["full"][seed])
    order = [mean(map(average, sentences[name].values())) for name in ("front", "full", "back")]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(
    "aligner, trained", [("none", ["emb", "6"]), ("dictionary", ["emb", "6", "7", "8", "9", "10"])]
)
def test_how_many_layers_front_freezing_trains(aligner, trained):
    text = section(WORDS_OR_SENTENCES)
    assert "one layer of twelve (and the embeddings); up to layer -2, it trains five." in text
    selected = [run for run in runs(E5, strategy="front", aligner=aligner) if "probe" in run]
    assert selected
    for run in selected:
        drift = run["probe"]["drift"]["realigned"]
        assert [layer for layer, change in drift.items() if change] == trained


@pytest.mark.parametrize(
    "folder, precision", [("e5-small-udpos", "bf16"), ("e5-small-udpos-fp32", "float32")]
)
def test_300_steps(folder, precision):
    selected, cells = by_strategy(folder), []
    for strategy in STRATEGIES:
        values = [average(run) for run in selected[strategy].values()]
        assert len(values) in (0, 3)
        cells.append(f"{mean(values):.1f} ± {stdev(values):.1f}" if values else "-")
    assert f"`{folder}`" in section(SHORT) and line(precision, *cells) in section(SHORT)


def test_bf16_against_float32_at_300_steps():
    for strategy in ("baseline", "full"):
        folders = ("e5-small-udpos", "e5-small-udpos-fp32")
        scores = [[average(run) for run in runs(one, strategy=strategy)] for one in folders]
        difference = abs(mean(scores[0]) - mean(scores[1]))
        assert difference < 0.5 * max(map(stdev, scores))
    assert "differ by less than half of a standard deviation" in section(SHORT)


@pytest.mark.parametrize(
    "task, name, aligner, schedule",
    [
        ("udpos", "PoS | fast_align, before", "fastalign", "before"),
        ("udpos", "PoS | awesome, before", "awesome", "before"),
        ("udpos", "PoS | dictionary, during", "dictionary", "during"),
        ("wikiann", "NER | dictionary, before", "dictionary", "before"),
        ("xnli", "NLI | dictionary, before", "dictionary", "before"),
    ],
)
def test_200_steps(task, name, aligner, schedule):
    selected = by_strategy("e5-small-200-steps", task=task, aligner=aligner, schedule=schedule)
    selected |= by_strategy("e5-small-200-steps", task=task, strategy="baseline")
    averages = []
    for strategy in STRATEGIES:
        (run,) = selected[strategy].values()
        averages.append(f"{average(run):.1f}")
    assert "`e5-small-200-steps`" in section(SHORT) and line(name, *averages) in section(SHORT)


# ---- Middle-layer alignment on Gemma 3 270M ------------------------------------------------------


def heads(layers: tuple[int, ...]) -> str:
    """Return the end of the heading of a table with these layers."""
    return f"| layer {' | '.join(map(str, layers))} |"


def in_groups(run: dict) -> list[str]:
    return [f"{average(run, group.split()):.1f}" for group in GROUPS]


def test_xsid():
    for run in runs(GEMMA):
        name = "baseline"
        if run["strategy"] == "full":
            layer, accumulate = run["config"]["layer"], run["config"]["accumulate"]
            name = "alternating" if layer == 11 else f"alternating, layer {layer}"
            name = name if accumulate == 1 else "both losses in an update (`--accumulate 2`)"
        assert line(str(run["seed"]), name, *in_groups(run)) in section(GEMMA)


SHARED = "gemma3-270m-xsid-accumulate"  # updates that hold batches of both losses


def test_xsid_with_both_losses_in_an_update():
    text, scores = section(SHARED), {}
    for run in runs(SHARED):
        align, accumulate = run["losses"].get("align"), run["config"]["accumulate"]
        batches, updates = 250 * run["config"]["epochs"], run["steps"]["finetune"]
        in_all = 2 * batches if align else batches
        assert updates == -(-in_all // accumulate)
        loss = f"{align[0]:.2f} to {align[-1]:.2f}" if align else ""
        name = "alternating" if align else "baseline"
        cells = str(batches), str(run["seed"]), name, str(accumulate), str(updates), loss
        assert line(*cells, *in_groups(run)) in text
        languages = [[*points(run, group.split()).values()] for group in GROUPS]
        scores[batches, run["seed"], name, accumulate] = np.array(languages)
    assert len(scores) == 9

    def changes(batches: int, seed: int, accumulate: int) -> np.ndarray:
        """Return what alternating changes against a baseline: (groups, languages)."""
        baseline = scores[batches, seed, "baseline", accumulate]
        return scores[batches, seed, "alternating", 4] - baseline

    for accumulate in (4, 2):
        means = [f"{change:+.1f}" for change in changes(250, 1, accumulate).mean(1)]
        assert "{}, {} and {}".format(*means) in text
    paired = np.stack([changes(500, seed, 2) for seed in (1, 2, 3)], axis=1)  # (groups, seeds, ...)
    intervals = []
    for group in paired:
        interval = "[{:+.1f}, {:+.1f}]".format(*bootstrap_interval(group))
        intervals.append(f"{group.mean():+.1f} {interval}")
    assert line("both losses, 500 batches", "3", *intervals) in text
    by_seed = "{:+.1f}, {:+.1f} and {:+.1f} F1".format(*paired[0].mean(1))
    assert f"the aligned languages by {by_seed} in the three seeds." in text
    assert f"both losses, {intervals[0]};" in README
    assert (paired[0].mean(1) < 0).all()
    answer = row_of(TEXT, "| And with both losses in")
    assert "no: F1 falls at 500 batches; longer, the seeds disagree" in answer


def texts(task: str, language: str, split: str) -> list[str]:
    """Return the texts of a file of real data in small letters."""
    path = Path(os.environ["ALIGNFREEZE_DATA"], task, language, f"{split}.jsonl")
    return [json.loads(line)["text"].lower() for line in path.read_text("utf-8").splitlines()]


@pytest.mark.skipif("ALIGNFREEZE_DATA" not in os.environ, reason="needs real data")
def test_sentences_that_are_trained_on_and_tested():
    counts = []
    for task, split, codes in (("xsid", "valid", "de it zh ar"), ("massive", "train", "fa en")):
        for code in codes.split():
            seen = set(texts(task, code, split))
            counts.append(sum(text in seen for text in texts(task, code, "test")[:100]))
    sentence = "first 100 test sentences in de, it, zh and ar, {}, {}, {} and {} also"
    assert sentence.format(*counts[:4]) in section(GEMMA)
    text = section("gemma3-270m-massive")
    assert f"in Persian, {counts[4]} also stand in the training file" in text
    assert f"In English it is {counts[5]} of 100." in text


def types_in(task: str, language: str, split: str, limit: int | None = None) -> int:
    """Return how many types of slots the first lines of a file have."""
    path = Path(os.environ["ALIGNFREEZE_DATA"], task, language, f"{split}.jsonl")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:limit]]
    return len({slot["type"] for row in rows for slot in row["slots"]})


@pytest.mark.skipif("ALIGNFREEZE_DATA" not in os.environ, reason="needs real data")
def test_the_first_lines_of_a_file_have_few_types_of_slots():
    different = len({*texts("xsid", "en", "train")[:300]})
    english = [types_in("xsid", "en", "train", limit) for limit in (300, None)]
    (others,) = {types_in("xsid", code, "valid") for code in "de it zh ar".split()}
    sentence = (
        "the 300 English training sentences are {} different ones with {} of {} types of slots "
    )
    sentence += "(de, it, zh and ar have {} types)"
    assert sentence.format(different, *english, others) in section(GEMMA)
    codes = [code for group in GROUPS for code in group.split()]
    first = {code: types_in("xsid", code, "test", 100) for code in codes}
    norwegian = first.pop("no")
    (few,), most = {*first.values()}, max(types_in("xsid", code, "test") for code in codes)
    assert f"100 test sentences have {few} of {most} types (Norwegian: {norwegian})" in section(
        GEMMA
    )
    training = [types_in("massive", "en", "train", limit) for limit in (1500, None)]
    (test,) = {
        (types_in("massive", code, "test", 100), types_in("massive", code, "test"))
        for code in ("en", "fa")
    }
    sentence = (
        "training sentences have {} of {} types of slots, the first 100 test sentences {} of {}."
    )
    assert sentence.format(*training, *test) in section("gemma3-270m-massive")


def test_the_baselines_of_xsid_differ_by_seed():
    differences = []
    for group in GROUPS:
        scores = [average(run, group.split()) for run in runs(GEMMA, strategy="baseline")]
        differences.append(f"{max(scores) - min(scores):.1f}")
    assert "differ by up to {}, {} and {} points".format(*differences) in section(GEMMA)


def test_paired_intervals_of_xsid():
    paired = report(GEMMA).split("Paired by seed:")[1]
    start = "| gemma3-270m | alternate, accumulate 1, layer 11 | 3     | 5 {}"
    cells = [
        intervals_of(paired.split("###")[0], start.format(group))[0]
        for group in ("aligned", "other transfer", "supervised")
    ]
    assert line("one loss an update, 250 batches", "3", *cells) in section(GEMMA)
    assert f"aligned languages: {cells[0]};" in README


MERGED = "gemma3-270m-merged"


def weights_of(run: dict) -> str:
    """Return the weights of the adapters of task and alignment."""
    weights = [float(adapter.split("=")[1]) for adapter in run["config"]["adapter"]]
    return " + ".join(f"{weight:.1f}" for weight in weights) or "1.0 + 0.0"


@pytest.mark.parametrize(
    "folder, sentences",
    [
        (MERGED, "test"),
        (f"{MERGED}-validation", "validation"),
        (f"{MERGED}-float32", "test, float32"),
    ],
)
def test_merged_adapters(folder, sentences):
    text = section(MERGED)
    for run in runs(folder) + runs(GEMMA, strategy="baseline", seed=1) * (folder == MERGED):
        head = (sentences, str(run["seed"]), weights_of(run))
        if run["strategy"] == "full" or weights_of(run) == "0.3 + 0.7":
            assert run["strategy"] == "baseline" or run["config"]["limit_test"] == 10
            sentence = "with 0.3 + 0.7 or with the adapter of alignment alone (10 test sentences a"
            assert f"{sentence} language) no slot is right." in text
            assert in_groups(run) == ["0.0"] * 3
            continue
        assert line(*head, *in_groups(run)) in text
        if head == ("test", "1", "0.5 + 0.5"):
            malformed = run["malformed"].values()
            assert f"{min(malformed)} to {max(malformed)} of 100 outputs" in text


def test_what_rounding_to_bfloat16_changes():
    (exact,) = runs(f"{MERGED}-float32")
    (rounded,) = [run for run in runs(MERGED, seed=2) if weights_of(run) == weights_of(exact)]
    assert (exact["config"]["precision"], rounded["config"]["precision"]) == ("fp32", "bf16")
    values = [average(exact, g.split()) - average(rounded, g.split()) for g in GROUPS]
    sentence = "scores of seed 2 change by {:+.1f}, {:+.1f} and {:+.1f}.".format(*values)
    assert sentence in section(MERGED)


def test_what_merging_with_a_small_weight_changes():
    text, changes = section(MERGED), []
    alone = {run["seed"]: run for run in runs(MERGED, strategy="baseline")
             if not run["config"]["adapter"]}  # fmt: skip
    (alone[1],) = runs(GEMMA, strategy="baseline", seed=1)
    merged = {run["seed"]: run for run in runs(MERGED) if weights_of(run) == "0.9 + 0.1"}
    for seed in (1, 2, 3):
        by_weights = {}
        for run in runs(f"{MERGED}-validation", seed=seed):
            by_weights[weights_of(run)] = average(run)  # of the languages without labels
        assert max(by_weights, key=by_weights.get) == "0.9 + 0.1"
        pair = merged[seed], alone[seed]
        changes.append([average(pair[0], g.split()) - average(pair[1], g.split()) for g in GROUPS])
    for name, values in zip(("aligned", "other transfer", "supervised"), zip(*changes)):
        numbers = "{:+.1f}, {:+.1f} and {:+.1f}".format(*values)
        assert f"{name} languages change by {numbers} ({mean(values):+.1f} on average)" in text
    assert alone[2]["config"]["adapter"] == []
    (again,) = runs(GEMMA, strategy="baseline", seed=2)
    first, second = ("{}, {} and {}".format(*in_groups(run)) for run in (alone[2], again))
    assert f"differ as much: {first} here, {second} in `{GEMMA}`" in text
    means = sorted(mean(values) for values in zip(*changes))
    row = row_of(TEXT, "| Can adapters of task and alignment be merged? ")
    assert f"{means[0]:+.1f} to {means[-1]:+.1f}, perhaps chance" in row


def test_massive():
    folder = "gemma3-270m-massive"
    text, selected, changes = section(folder), by_strategy(folder), []
    for seed in (1, 2, 3):
        cells = []
        for code in ("fa", "en"):
            for strategy in ("baseline", "full"):
                cells.append(f"{average(selected[strategy][seed], [code]):.1f}")
        assert line(str(seed), *cells) in text
        base, full = (average(selected[one][seed], ["fa"]) for one in ("baseline", "full"))
        changes.append(f"{full - base:+.1f}")
    assert "{}, {} and {} F1 in the three seeds".format(*changes) in text
    paired = report(folder).split("Paired by seed:")[1].split("###")[0]
    start = "| gemma3-270m | alternate | 3     | 1 {}"
    persian, english = (intervals_of(paired, start.format(g))[0] for g in ("aligned", "supervised"))
    assert line("change, paired", "", persian, "", english) in text
    strict = [" ".join(pair) for pair in strict_intervals_of_massive()]
    assert line("change of strict F1, paired", "", strict[0], "", strict[1]) in text
    changes = []
    for seed in (1, 2, 3):
        base, full = (selected[one][seed]["scores"]["fa"] for one in ("baseline", "full"))
        changes.append(f"{100 * (full['f1_strict'] - base['f1_strict']):+.1f}")
    assert "{}, {} and {} strict F1".format(*changes) in text


def test_xsid_until_the_validation_loss_stops_falling():
    folder, groups = "gemma3-270m-xsid-validated", (GROUPS[0], "id nl gsw", GROUPS[2])
    text, selected, hours, changes = section(folder), by_strategy(folder), [], []
    assert sorted(selected["baseline"]) == sorted(selected["full"]) == [1, 2, 3]
    loss = defaultdict(list)
    for seed, base in sorted(selected["baseline"].items()):
        full = selected["full"][seed]
        for run, name, share in ((base, "baseline", 1), (full, "alternating", 2)):
            best, every = run["validation"], run["config"]["validate"] // share
            batches = f"{best['step'] // share} of {every * len(best['losses'])}"
            cells = [f"{average(run, group.split()):.1f}" for group in groups]
            loss[name].append(best["loss"])
            row = line(str(seed), name, batches, f"{best['loss']:.3f}", *cells)
            assert row in text
        changes.append({code: points(full, [code])[code] - points(base, [code])[code]
                        for code in base["scores"]})  # fmt: skip
        hours.append(sum(sum(run["seconds"].values()) for run in (base, full)) / 3600)
    intervals = []
    for row, group in zip(paired_rows(folder, "| gemma3"), ("aligned", "other", "supervised")):
        assert group in row
        intervals += intervals_of(row, "")
    assert line("one loss, until the validation loss stops falling", "3", *intervals) in text
    aligned = [mean(change[code] for code in GROUPS[0].split()) for change in changes]
    assert min(aligned) < 0 < max(aligned) and "the seeds disagree on the aligned" in text
    higher = [one - base for one, base in zip(loss["alternating"], loss["baseline"])]
    assert [round(value, 2) for value in sorted(higher)] == [-0.0, 0.02, 0.02]
    assert "lowest validation loss of alternating is higher in two seeds, and about the" in text
    assert f"A pair of runs takes {min(hours):.1f} to {max(hours):.1f} hours" in text
    assert f"longer, {intervals[0]} and" in README


def test_both_losses_until_the_validation_loss_stops_falling():
    folder = "gemma3-270m-xsid-accumulate-validated"
    text, groups = section(folder), [g.split() for g in (GROUPS[0], "id nl gsw", GROUPS[2])]
    selected, changes, hours, loss, falls = by_strategy(folder), [], [], defaultdict(list), []
    assert sorted(selected["baseline"]) == sorted(selected["full"]) == [1, 2, 3]
    for seed, base in sorted(selected["baseline"].items()):
        full = selected["full"][seed]
        for run, name, accumulate in ((base, "baseline", 2), (full, "alternating", 4)):
            assert run["config"]["accumulate"] == accumulate
            assert run["config"]["precision"] == ("bf16" if seed == 1 else "fp32")
            best = run["validation"]
            kept = f"{best['step']} of {run['steps']['finetune']}"
            align = run["losses"].get("align", [])
            fall = f"{align[0]:.2f} to {align[-1]:.2f}" if align else ""
            cells = [f"{average(run, group):.1f}" for group in groups]
            assert line(str(seed), name, kept, f"{best['loss']:.3f}", fall, *cells) in text
            assert min(best["losses"]) < best["losses"][-1]  # it stopped falling
            loss[name].append(best["loss"])
        falls.append(align[-1])
        change = []
        for group in groups:
            before, after = points(base, group), points(full, group)
            change.append([after[code] - before[code] for code in group])
        changes.append(change)
        hours.append(sum(sum(run["seconds"].values()) for run in (base, full)) / 3600)
    assert "fell from 2.75 to {:.2f}, {:.2f} and {:.2f}".format(*falls) in text
    intervals, means = [], []
    for group in zip(*changes):
        means.append(np.mean(group, axis=1))  # of each seed
        interval = "[{:+.1f}, {:+.1f}]".format(*bootstrap_interval(np.array(group)))
        intervals.append(f"{np.mean(group):+.1f} {interval}")
    assert line("both losses, until it stops falling", "3", *intervals) in text
    assert f"[-3.8, +3.5] and {intervals[0]}." in README
    assert min(means[0]) < 0 < max(means[0])  # "longer, the seeds disagree"
    by_seed = "Longer runs change them by {:+.1f}, {:+.1f} and {:+.1f}.".format(*means[0])
    assert by_seed in text
    assert all(group[2] > 0 for group in means)  # "In seed 3, better in all three groups"
    assert all(map(float.__gt__, loss["alternating"], loss["baseline"]))
    assert "In all seeds, the lowest validation loss of alternating is higher" in text
    assert "took {:.1f}, {:.1f} and {:.1f} hours".format(*hours) in text


def test_what_the_digits_of_records_stand_for():
    names = defaultdict(set)
    for path in (RESULTS / E5).glob("*.json"):
        run = json.loads(path.read_bytes())
        settings = run["config"]
        unit = "sentences" if settings.get("unit") == "sentence" else "words"
        layer = settings.get("layer") or -2  # early records of baselines do not name it
        steps = run["steps"].get("realign", 786)
        length = f", {steps:,} steps" if (unit, layer) == ("words", -2) else ""
        names[f"{unit} at layer {layer}{length}"].add((path.stem[-6:], "probe" in run))
    text = " ".join(TEXT[TEXT.index("## Provenance") :].split())
    assert len(names) == 5
    for name, digits in names.items():
        with_probe = {number for number, is_probed in digits if is_probed}
        (usual,) = {number for number, is_probed in digits if not is_probed}
        note = f" (with the probe `{with_probe.pop()}`)" if with_probe else ""
        assert f"{name} `{usual}`{note}" in text and not with_probe


def strict_intervals_of_massive() -> list[tuple[str, str]]:
    """Return (change, interval) of Persian and of English."""
    table = report("gemma3-270m-massive").split("### MASSIVE strict F1\n")[1]
    paired = table.split("Paired by seed:")[1].split("###")[0]
    start = "| gemma3-270m | alternate | 3     | 1 {}"
    groups = ("aligned", "supervised")
    return [tuple(intervals_of(paired, start.format(g))[0].split(" ", 1)) for g in groups]


def test_tasks_with_one_run():
    scores = {}
    for run in runs("gemma3-270m-tasks"):
        metric = next(iter(next(iter(run["scores"].values()))))
        task = run["task"] if run["task"] == "translation" else run["task"].upper()
        scores[task] = f"{average(run):.1f} {metric.upper()}"
    sentence = "have {MASSIVE} on MASSIVE, {UNER} on UNER and {translation} in translation."
    assert sentence.format(**scores) in section(SHORT)


# ---- The probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder, kind, starts, layers",
    [
        (
            "gemma3-270m-probe",
            "retrieval",
            {"no": "left out of the mean", "yes": "counted"},
            (0, 9, 11, 12, 18),
        )
    ],
)
def test_probes_before_training(folder, kind, starts, layers):
    for run in runs(folder):
        languages = run["probe"][kind]["before"].values()
        shares = [f"{100 * mean(share[k] for share in languages):.0f}%" for k in layers]
        assert line(starts[run["config"]["pool_first"]], *shares) in section(folder)
        assert heads(layers) in section(folder)


def test_the_probe_of_e5_small_before_training():
    (run,) = runs("e5-small-probe")
    shares = []
    for kind in ("retrieval", "margin"):
        languages = run["probe"][kind]["before"].values()
        shares += [f"{100 * mean(share[k] for share in languages):.0f}%" for k in (7, 9, 12)]
    sentence = "(by cosine {} at layer 7, {} at 9, {} at 12; by margin {}, {} and {})."
    assert sentence.format(*shares) in section(STAGES_ON_E5)


def test_retrieval_at_layer_11_depends_on_the_languages():
    (run,) = runs(GEMMA, strategy="full", seed=2)
    (share,) = retrieval([run], "before", (11,))
    assert [*run["probe"]["retrieval"]["before"]] == GROUPS[0].split()
    assert f"aligned on xSID have {share}% at layer 11" in section("gemma3-270m-probe")


def test_the_layer_where_translations_are_closest():
    for folder, setting, highest in (
        ("gemma3-270m-probe", "no", 11),
        ("e5-small-probe", "yes", 12),
    ):
        (run,) = [run for run in runs(folder) if run["config"]["pool_first"] == setting]
        by_layer = [*zip(*run["probe"]["retrieval"]["before"].values())]
        assert max(range(len(by_layer)), key=lambda layer: mean(by_layer[layer])) == highest
        if folder == "e5-small-probe":  # "a small local peak at layer 7"
            assert mean(by_layer[6]) < mean(by_layer[7]) > mean(by_layer[8])
    assert len(by_layer) == 13  # of e5-small
    (run,) = [run for run in runs("gemma3-270m-probe") if run["config"]["pool_first"] == "yes"]
    by_margin = [*zip(*run["probe"]["margin"]["before"].values())]
    highest = max(range(len(by_margin)), key=lambda layer: mean(by_margin[layer]))
    text = section("gemma3-270m-probe")
    assert "by cosine at layer 11 of 18" in text
    assert f"(by margin with the token counted at layer {highest})" in text
    assert "rises to the last layer" in section(STAGES_ON_E5)


STAGES = {"before": "before training", "realigned": "after realignment"}
STAGES |= {"finetuned": "after fine-tuning"}


def retrieved(selected: list[dict], stage: str, layers: tuple[int, ...]) -> list[float]:
    """Return the mean over runs and languages at each of the layers, in percent."""
    shares = [one for run in selected for one in run["probe"]["retrieval"][stage].values()]
    return [100 * mean(share[k] for share in shares) for k in layers]


def retrieval(selected: list[dict], stage: str, layers: tuple[int, ...]) -> list[str]:
    """Return what `retrieved` returns, rounded."""
    return [f"{share:.0f}" for share in retrieved(selected, stage, layers)]


@pytest.mark.parametrize("unit, aligner", [("words", "dictionary"), ("sentences", "none")])
@pytest.mark.parametrize("strategy", ["baseline", "full", "front"])
def test_probes_after_each_stage_on_e5(strategy, unit, aligner):
    values = {"strategy": strategy}
    if strategy != "baseline":
        values["aligner"] = aligner
    selected = [run for run in runs(E5, **values) if "probe" in run]
    if (strategy, unit) == ("baseline", "sentences"):
        assert len(selected) == 1 and selected[0]["config"]["unit"] == "word"  # was not probed
        return
    assert len(selected) == (1 if unit == "words" else 3)
    text = section(STAGES_ON_E5)
    assert heads((0, 4, 7, 11, 12)) in text
    for stage in selected[0]["probe"]["retrieval"]:
        name = "all" if stage == "before" else strategy
        cells = retrieval(selected, stage, (0, 4, 7, 11, 12))
        assert line(unit, STAGES[stage], name, *cells) in text


def test_what_is_left_of_the_lead_of_realignment_after_fine_tuning():
    """At the last layer, by words. The baseline before fine-tuning is the untrained model."""
    last = {}
    for strategy in ("baseline", "full", "front"):
        aligner = {} if strategy == "baseline" else {"aligner": "dictionary"}
        selected = [run for run in runs(E5, strategy=strategy, **aligner) if "probe" in run]
        first = "before" if strategy == "baseline" else "realigned"
        last[strategy] = [*(retrieved(selected, one, (12,))[0] for one in (first, "finetuned"))]
    text = section(STAGES_ON_E5)
    (full, full_after), (front, front_after) = (
        [one - base for one, base in zip(last[strategy], last["baseline"])]
        for strategy in ("full", "front")
    )
    assert f"({full:+.1f} points before fine-tuning, {full_after:+.1f} after it)" in text
    assert f"half of its lead ({front:+.1f}, {front_after:+.1f})" in text
    answer = "in retrieval, full keeps its lead, front keeps half"
    assert answer in row_of(TEXT, "| Does alignment survive fine-tuning? ")
    assert full_after >= full and 0.4 < front_after / front < 0.6
    base, full = (
        next(run for run in runs(E5, strategy=strategy, seed=66) if "retrieval" in run["probe"])
        for strategy in ("baseline", "full")
    )
    kept, gain = [], []
    for code, score in points(full).items():
        ends = (run["probe"]["retrieval"]["finetuned"][code][12] for run in (full, base))
        kept.append(next(ends) - next(ends))
        gain.append(score - points(base)[code])
    assert f"(full, {len(gain)} languages: r = {correlation(kept, gain):.2f})" in text


@pytest.mark.parametrize("strategy, name", [("baseline", "baseline"), ("full", "alternating")])
def test_probes_after_each_stage_on_gemma(strategy, name):
    selected = runs(GEMMA, strategy=strategy, seed=2)
    text = section("What alternation does to the layers of Gemma 3")
    assert heads((0, 9, 11, 12, 18)) in text
    for stage in ("before", "finetuned"):
        cells = retrieval(selected, stage, (0, 9, 11, 12, 18))
        assert line("both" if stage == "before" else name, STAGES[stage], *cells) in text
    if strategy == "full":
        layers = (9, *range(11, 19))
        ends = zip(*(retrieved(selected, stage, layers) for stage in ("before", "finetuned")))
        at_9, at_11, *above = (after - before for before, after in ends)
        assert f"raises retrieval by {at_11:.0f} points at the aligned layer" in text
        assert f"by {min(above):.0f} to {max(above):.0f} above it" in text
        assert f"by {at_9:.0f} at layer 9" in text


# ---- README.md: was it reproduced? ---------------------------------------------------------------


def cell(claim: str, column: str = "trained here") -> str:
    """Return what a column of the README's table says of a claim."""
    (row,) = re.findall(rf"\| {re.escape(claim)} \|([^|]*\|[^|]*\|[^|]*)\|", README)
    columns = ("published", "authors' scores", "trained here")
    return row.split("|")[columns.index(column)].strip()


@functools.cache
def published() -> dict[tuple, dict[str, list[float]]]:
    """Return the published scores, {(task, metric, model, aligner, strategy): {language: [...]}}.

    Realignment is before fine-tuning.
    """
    scores = defaultdict(lambda: defaultdict(list))
    with open(RESULTS / "paper.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["schedule"] != "during" and row["language"] != "en":
                key = [row[name] for name in ("task", "metric", "model", "aligner", "strategy")]
                scores[tuple(key)][row["language"]].append(float(row["value"]))
    return scores


def published_ups_and_downs(key: tuple) -> Counter:
    """Return how many languages change by more than the larger standard deviation."""
    task, metric, model, *_ = key
    counts = Counter(up=0, down=0)
    baseline = published()[task, metric, model, "none", "baseline"]
    for code, values in published()[key].items():
        change = mean(values) - mean(baseline[code])
        if abs(change) > max(stdev(values), stdev(baseline[code])):
            counts["up" if change > 0 else "down"] += 1
    return counts


def sum_over(tasks: dict[str, str], strategy: str) -> Counter:
    """Return the counts of all models and aligners. tasks: {task: metric}."""
    total = Counter()
    for key in [*published()]:
        if tasks.get(key[0]) == key[1] and key[-1] == strategy:
            total += published_ups_and_downs(key)
    return total


def test_the_first_claim_from_the_published_scores():
    key = ("udpos", "accuracy", "xlm-roberta-base", "dictionary")
    full, front = (published_ups_and_downs((*key, name))["up"] for name in ("full", "front"))
    claim = "PoS: front helps more languages"
    p = swapped("PoS, XLM-R, dictionary", "helped")
    assert cell(claim, "authors' scores") == f"XLM-R {front} vs {full} ({p})"
    assert front - full == 7 and cell(claim, "published") == "7 more"  # as the paper says
    _, _, _, _, full, front, p, _ = row_of(
        swap_table(), "| PoS, e5-small, dictionary | helped |"
    ).split("|")
    assert cell(claim) == f"e5-small {front.strip()} vs {full.strip()} (p = {p.strip()})"


def test_the_answer_about_the_published_scores():
    total = Counter()
    for key in [*published()]:
        if key[0] == "udpos" and key[-1] in ("full", "front"):
            total[key[-1]] += published_ups_and_downs(key)["down"]
            total["of"] += len(published()[key]) * (key[-1] == "full")
    chance = swap.harmed_by_chance(5) * total["of"]
    counts = "full realignment harms {full} of {of} cases and front-freezing {front}."
    text = section(PUBLISHED)
    alone = f" The difference exceeds chance (p < 0.001). The {total['full']} alone do not:"
    assert counts.format(**total) + alone in text and chance > total["full"]
    assert f"if realignment changed nothing, the rule would mark {chance:.0f}." in text
    assert swapped("PoS, 3 models, 3 aligners", "harmed") == "p < 0.001"  # "beyond chance"
    harmed = row_of(swap_table(), "| NER, NLI, QA (F1), 3 models | harmed |").split("|")
    p = swapped("NER, NLI, QA (F1), 3 models", "harmed")
    by_exact_match = swapped("NER, NLI, QA (EM), 3 models", "harmed")
    more = int(harmed[4]) - int(harmed[5])
    sentence = f"full realignment harms {more} more, all of them with mBERT ({p}; with exact match"
    assert f"{sentence} for QA, {by_exact_match})" in text
    (scores,) = swap.read(swap.PAPER)
    others = swap.select(scores, task=swap.OTHERS, name=["f1", "accuracy"])
    for name in ("XLM-R", "distilmBERT"):
        of_model = others[others.model == swap.MODELS[name]]
        row = swap.compare(name, of_model, "harmed").split("|")
        assert row[4] == row[5]  # full and front


def test_harm_by_realignment_during_fine_tuning():
    (scores,) = swap.read(swap.PAPER)
    scores = scores[(scores.model == "xlm-roberta-base") & (scores.language != "en")]
    during = scores[scores.schedule == "during"]
    assert {*during.strategy} == {"full"} and {*during.task} == {"udpos"}
    scores = scores[(scores.task == "udpos") & (scores.kind == "score")]
    base = scores[scores.strategy == "baseline"].pivot(
        index="language", columns="seed", values="value"
    )
    exchange = np.array([*itertools.product([False, True], repeat=5)])[:, None]
    harmed = 0
    for _, part in during.groupby("aligner"):
        full = part.pivot(index="language", columns="seed", values="value").loc[base.index]
        pair = np.where(exchange, base, full), np.where(exchange, full, base)
        harmed = harmed + swap.marked(*pair)[:, 1]
    total, p = len(base) * during.aligner.nunique(), (harmed >= harmed[0]).mean()
    sentence = f"there it harms {harmed[0]} of {total} (p = {p:.2f}, one-sided,"
    assert sentence in section(PUBLISHED)


@functools.cache
def swap_table() -> str:
    command = [sys.executable, RESULTS / "swap.py"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def swapped(name: str, counted: str) -> str:
    """Return p of a row that results/swap.py prints, such as `p = 0.06` or `p < 0.001`."""
    p = row_of(swap_table(), f"| {name} | {counted} |").split("|")[-2].strip()
    return f"p {p}" if p.startswith("<") else f"p = {p}"


def test_the_table_of_exchanged_runs():
    table, _, chance = swap_table().partition("\n\n")
    assert table in TEXT
    three, five = re.findall(r"[\d.]+%", chance)
    text = section(PUBLISHED)
    assert f"marks {five} of languages as harmed with five seeds and {three} with three" in text


def test_exchanged_runs_of_xlm_r_by_a_slow_loop():
    key = ("udpos", "accuracy", "xlm-roberta-base")
    base = published()[*key, "none", "baseline"]
    full, front = (published()[*key, "dictionary", strategy] for strategy in ("full", "front"))
    differences = []
    for exchanged in range(2**5):  # bit k: exchange the runs of seed k
        ups = []
        for one, other in ((full, front), (front, full)):
            ups.append(0)
            for code, start in base.items():
                pairs = enumerate(zip(one[code], other[code]))
                values = [pair[exchanged >> seed & 1] for seed, pair in pairs]
                deviation = max(stdev(values), stdev(start))
                ups[-1] += mean(values) - mean(start) > deviation
        differences.append(ups[1] - ups[0])
    as_extreme = sum(abs(one) >= abs(differences[0]) for one in differences)
    assert differences[0] == 7 and as_extreme == 2
    assert swapped("PoS, XLM-R, dictionary", "helped") == f"p = {as_extreme / 32:.2f}"


def test_exchanges_of_two_models_that_gain_by_opposite_strategies():
    rows = []
    for model, better in (("a", "front"), ("b", "full")):
        for seed, noise in ((1, 0.0), (2, 0.01)):
            for strategy in ("baseline", "full", "front"):
                aligner = "none" if strategy == "baseline" else "dictionary"
                score = noise + (0.9 if strategy == better else 0.5)
                rows.append((model, "udpos", "f1", aligner, strategy, "de", seed, score))
    columns = "model task name aligner strategy language seed value".split()
    data = pd.DataFrame(rows, columns=columns)
    only_a = data[data.model == "a"]
    # With one seed exchanged, both strategies differ by 0.4 between the seeds: neither is up.
    assert swap.exchanges(only_a)[:, :, 0].tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]
    assert swap.compare("one", only_a, "helped") == "| one | helped | 1 | 0 | 1 | 0.50 |"
    assert swap.compare("two", data, "helped") == "| two | helped | 2 | 1 | 1 | 1.00 |"


PROTECTION = "Which languages does front-freezing protect?"


@functools.cache
def damping_table() -> str:
    command = [sys.executable, RESULTS / "damping.py"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cells_of_damping(name: str) -> list[str]:
    """Return cases, full, front, front - full, p and back - full."""
    row = row_of(damping_table(), f"| {name} |")
    return [text.strip() for text in row.split("|")[2:-1]]


def by_model(name: str) -> dict[str, str]:
    """Return a row of the second table: {"lowered" or "lowered, full" or "all, p" ...: cell}."""
    names = ["", "full", "front - full", "p", "back - full"]
    names = [f"{part}, {name}" if name else part for part in ("lowered", "all") for name in names]
    return dict(zip(names, cells_of_damping(name), strict=True))


def test_the_tables_of_protection():
    rows, models, trends = damping_table().split("\n\n")
    assert rows in TEXT and models in TEXT
    text = section(PROTECTION)
    low, _, high, _ = (cells_of_damping(f"PoS: {row}") for row in damping.ROWS)
    assert float(low[1]) < 0 < float(low[2])  # "they end above the baseline"
    harm, _, others, _ = (cells_of_damping(f"NER, NLI, QA: {row}") for row in damping.ROWS)
    assert 0.4 < float(harm[2]) / float(harm[1]) < 0.6  # "about half of the loss remains"
    assert f"helps most ({high[3]} and {others[3]})" in text
    p = [float(value) for value in re.findall(r"p = (\S+)", trends)]
    assert len(p) == 2 and max(p) < 0.001 and "beyond chance in both (p < 0.001)" in text
    tasks = {task: by_model(f"{task}, 3 models") for task in ("PoS", "NER", "NLI", "QA")}
    gain, p = (tasks["NLI"][f"all, {name}"] for name in ("front - full", "p"))
    assert f"beyond chance in NLI alone ({gain}, p = {p})" in text
    assert float(gain) > 0 and float(p) < 0.01
    assert min(float(tasks[task]["all, p"]) for task in ("PoS", "NER", "QA")) > 0.3
    assert max(float(row["lowered, back - full"]) for row in tasks.values()) < 0
    few, _, _, lost, *_ = cells_of_damping("PoS, e5-small: lowered")
    more, _, _, gained, p, _ = cells_of_damping("PoS, e5-small, 1,965 steps: lowered")
    assert f"({lost} in {few} cases; after 1,965 steps {gained} in {more}; both" in text
    assert float(p) > 0.2  # "may be chance"


def test_protection_by_model():
    text = section(PROTECTION)
    rows = {}
    for task, name in itertools.product(("PoS", "NER", "NLI", "QA"), swap.MODELS):
        rows[task, name] = by_model(f"{task}, {name}")
    in_pos = {name: float(rows["PoS", name]["all, front - full"]) for name in swap.MODELS}
    assert [name for name, gain in in_pos.items() if gain > 0] == ["XLM-R"]
    cases = rows["PoS", "XLM-R"]["lowered"], by_model("PoS, 3 models")["lowered"]
    assert "which has {} of the {} lowered cases".format(*cases) in text
    in_ner = rows["NER", "XLM-R"]
    assert f"on average with XLM-R ({in_ner['all, front - full']})" in text
    assert f"that are lowered there ({in_ner['lowered, front - full']})" in text
    in_qa = {name: float(rows["QA", name]["lowered, front - full"]) for name in swap.MODELS}
    assert [name for name, gain in in_qa.items() if gain > 0] == ["mBERT"]
    assert f"lowered languages of mBERT alone ({in_qa['mBERT']:+.1f})" in text
    by_back = {key: row["lowered, back - full"] for key, row in rows.items()}
    by_back = {key: float(gain) for key, gain in by_back.items() if gain != "-"}
    best = max(by_back, key=by_back.get)
    assert best == ("QA", "mBERT") and f"by at most {by_back[best]:+.1f} (QA with mBERT)" in text
    paper = by_model("PoS, XLM-R, dictionary")
    assert f"gives the lowered languages {paper['lowered, front - full']}," in text
    assert f"with {paper['lowered']} cases and five seeds" in text
    assert f"chance (p = {paper['lowered, p']})" in text


def test_the_means_over_all_languages_need_no_sorting():
    """`front - full` over all cases, computed from the published scores alone."""
    for task, metric, model in (
        ("udpos", "accuracy", "xlm-roberta-base"), ("wikiann", "f1", "xlm-roberta-base"),
    ):  # fmt: skip
        differences = []
        for aligner in ("dictionary", "fastalign", "awesome"):
            key = (task, metric, model, aligner)
            if (*key, "full") in published():
                full, front = (published()[*key, strategy] for strategy in ("full", "front"))
                differences += [100 * (mean(front[code]) - mean(full[code])) for code in full]
        row = by_model(f"{'PoS' if task == 'udpos' else 'NER'}, XLM-R")
        assert row["all"] == str(len(differences))
        assert row["all, front - full"] == f"{mean(differences):+.1f}"


@pytest.mark.parametrize(
    "claim, name",
    [
        ("PoS: front protects what full lowers", "PoS"),
        ("NER, NLI, QA: front protects what full lowers", "NER, NLI, QA"),
    ],
)
def test_the_claim_of_protection(claim, name):
    cases, _, _, difference, p, _ = cells_of_damping(f"{name}: lowered")
    p = f"p {p}" if p.startswith("<") else f"p = {p}"
    assert cell(claim, "authors' scores") == f"{difference}, {cases} cases ({p})"
    if name == "PoS":
        _, _, _, difference, p, _ = cells_of_damping("PoS, e5-small: lowered")
        assert cell(claim) == f"e5-small {difference} (p = {p})"


def test_the_claim_of_the_other_tasks():
    rows = [by_model(f"{task}, 3 models") for task in ("NER", "NLI", "QA")]
    parts = [f"{row['all, front - full']} (p = {row['all, p']})" for row in rows]
    assert cell("NER, NLI, QA: front - full > 0", "authors' scores") == ", ".join(parts)


def test_protection_of_xlm_r_by_a_slow_loop():
    key = ("udpos", "accuracy", "xlm-roberta-base")
    base, seeds, expected = published()[*key, "none", "baseline"], range(5), []
    for exchanged in range(2**5):  # bit k: exchange the runs of seed k
        rows = {name: [] for name in damping.ROWS}
        for aligner in ("dictionary", "fastalign", "awesome"):
            full, front = (published()[*key, aligner, strategy] for strategy in ("full", "front"))
            for code, start in base.items():
                pairs = [*zip(full[code], front[code])]
                for k in seeds:
                    pairs[k] = pairs[k][::-1] if exchanged >> k & 1 else pairs[k]
                for measuring in seeds:
                    change = mean(100 * (pairs[k][0] - start[k]) for k in seeds if k != measuring)
                    row = damping.ROWS[(change > 0) + (change > 3)]
                    rows[row].append(100 * (pairs[measuring][1] - pairs[measuring][0]))
        rows["all"] = [value for values in rows.values() for value in values]
        expected.append([mean(values) if values else 0 for values in rows.values()])
        if not exchanged:
            cases = [len(values) / 5 for values in rows.values()]
    (scores,) = swap.read(swap.PAPER)
    scores = swap.select(scores, task=["udpos"], model=["xlm-roberta-base"])
    (found, by_full, by_front), p, p_trend = damping.compare(scores)
    assert found == pytest.approx(cases)
    assert by_front - by_full == pytest.approx(expected[0])
    for row, share in enumerate(p):
        sizes = [abs(values[row]) for values in expected]
        assert share == mean(size >= sizes[0] - 1e-9 for size in sizes)
    trends = [abs(values[2] - values[0]) for values in expected]
    assert p_trend == mean(size >= trends[0] - 1e-9 for size in trends)


def paired_rows(folder: str, start: str) -> list[str]:
    """Return the rows with this start in the first table of paired differences."""
    table = report(folder).split("Paired by seed:")[1].split("###")[0]
    return [line for line in table.splitlines() if line.startswith(start)]


def test_front_against_full_in_the_published_scores_paired_by_seed():
    differences = {}
    for model in ("xlm-roberta-base", "bert-base-multilingual", "distilbert-base"):
        (row,) = [row for row in paired_rows("paper.csv", f"| {model}") if "before, dict" in row]
        differences[model] = re.findall(r"[-+]\d+\.\d \[.*?\]", row)[-1]
    text, (xlm_r, mbert, distilmbert) = section(PUBLISHED), differences.values()
    assert f"front-freezing is better by {xlm_r};" in text
    assert f"front - full is {mbert} and {distilmbert}." in text
    claim = "PoS: front - full > 0"
    changes = [interval.split()[0] for interval in (xlm_r, mbert, distilmbert)]
    assert cell(claim, "authors' scores") == "XLM-R {}, mBERT {}, distilmBERT {}".format(*changes)


def test_front_against_full_on_e5_small():
    differences = []
    for folder in (FIVE_SEEDS, RISING):
        row = paired_rows(folder, "| e5-small")[0]
        differences.append(re.findall(r"[-+]\d+\.\d \[.*?\]", row)[-1])
    assert cell("PoS: front - full > 0") == f"e5-small {differences[0]}"
    slow = cell("PoS: front - full > 0, 1,965 steps; rising rate")
    assert slow.endswith(f"; {differences[1]}")
    seeds = [len(by_strategy(folder)["front"]) for folder in (FIVE_SEEDS, RISING)]
    assert "{} seeds (row 6: {}).".format(*seeds) in README


def test_the_layer_of_the_table():
    for run in runs("gemma3-270m-probe"):
        languages = run["probe"]["retrieval"]["before"].values()
        shares = [mean(share) for share in zip(*languages)]
        best = shares.index(max(shares))
        text = cell("Translations are closest in an LLM's middle layers")
        assert text == f"layer {best} of {len(shares) - 1} (Gemma 3 270M)"


def test_retrieval_at_the_aligned_layer():
    (run,) = runs(GEMMA, strategy="full", seed=2)
    shares = []
    for stage in ("before", "finetuned"):
        languages = run["probe"]["retrieval"][stage].values()
        shares.append(100 * mean(share[run["config"]["layer"]] for share in languages))
    claim = "Alignment makes more translations nearest neighbours"
    assert cell(claim) == "{:.0f}% to {:.0f}% (5 languages, 1 seed)".format(*shares)
    assert len(languages) == 5


def test_transfer_to_aligned_languages():
    pattern = r"([-+]\d+\.\d) (\[.*?\])"
    (massive,) = [row for row in paired_rows("gemma3-270m-massive", "|") if "aligned" in row]
    change, interval = re.findall(pattern, massive)[0]
    claim = "MASSIVE: aligned languages gain"
    assert cell(claim) == f"Persian {change} F1 {interval} (Gemma, 3 seeds)"


def grid(**settings: str) -> int:
    """Return how many runs run_all.sh has, without those that write links."""
    command = ["bash", RESULTS.parent / "run_all.sh", "--dry-run"]
    variables = os.environ | {"PYTHON": sys.executable} | settings
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, env=variables
    ).stdout
    return sum("--write-links" not in line for line in lines.splitlines())


def test_what_the_grids_take():
    text = (RESULTS / "bench/paper-h200.txt").read_text("utf-8")
    total = 0.0
    for part in re.split(r"\n\n", text)[1:4]:
        seconds = {}
        for name, value in re.findall(r"^  (.*?)  +[\d.]+ +([\d.]+)$", part, re.M):
            seconds[name] = float(value)
        adam, align, task = map(seconds.get, ("Adam, fused", "alignment", "fine-tuning"))
        # Of 19 runs of a seed, 9 align before fine-tuning, and 9 in the same updates with it.
        total += 1965 * 5 * (19 * (task + adam) + 9 * (align + adam) + 9 * align)
        steps = 3130 + 24544 + (20228 if part.startswith("xlm-roberta") else 18010)
        total += steps * 5 * (4 * (task + adam) + 3 * (align + adam))
    first, second = grid(METHODS="alignfreeze"), grid(METHODS="mid-align")
    hours = round(total / 3600)
    table = (RESULTS / "bench/README.md").read_text("utf-8")
    shared = round(float(row_of(table, "| all | ").split("|")[4]))
    assert f"none of their {first + second} runs in `run_all.sh` was trained here" in README
    (row,) = re.findall(r"- Row 1: `([^`]*) \./run_all.sh`", README)
    assert (
        grid(**dict(setting.split("=") for setting in row.split())) == 20
    )  # 4 strategies, 5 seeds
    sentence = f"AlignFreeze's {first} would train for [{hours} hours on an H200](results/bench)"
    assert f"{sentence} by arithmetic, perhaps {shared} if ten ran at a time." in README


# ---- Everything ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder, start, title",
    [
        (E5, "| e5-small | before, dictionary, layer -2 ", E5),
        (FIVE_SEEDS, "| e5-small | before, dictionary ", FIVE_SEEDS),
    ],
)
def test_paired_intervals_are_those_of_the_report(folder, start, title):
    text = section(title)
    *changes, difference = intervals_of(report(folder).split("Paired by seed:")[1], start)
    assert line("change, paired", "", *changes[:3]) in text
    assert difference in text[text.index("**Answer.**") :]


def test_hours_and_minutes():
    text, total, number = section("Provenance"), 0, 0
    for folder in FOLDERS:
        hours = sum(sum(run["seconds"].values()) for run in records(folder)) / 3600
        start = line(f"`{folder}`", str(len(records(folder))), f"{hours:.1f}")
        assert f"{start} " in text
        total, number = total + hours, number + len(records(folder))
    assert line("all", str(number), f"{total:.1f}") in text
    minutes = [sum(run["seconds"].values()) / 60 for run in runs(E5)]
    assert f"one took {min(minutes):.0f} minutes and another {max(minutes):.0f}" in text
    minutes = [sum(run["seconds"].values()) / 60 for run in runs(FIVE_SEEDS)]
    assert f"A run on the H200 took {min(minutes):.1f} to {max(minutes):.1f} minutes" in text


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_commits_hold_the_scripts_of_the_records(folder):
    row = row_of(TEXT[TEXT.index("## Provenance") :], f"| `{folder}` ")
    hashes = set()
    for commit in row.split("|")[4].split():
        command = ["git", "-C", RESULTS, "show", f"{commit}:alignfreeze.py"]
        script = subprocess.run(command, capture_output=True)
        if script.returncode:
            pytest.skip("this copy has no git history")
        hashes.add(hashlib.sha256(script.stdout).hexdigest())
    assert hashes == {run["versions"]["alignfreeze.py"] for run in records(folder)}


def test_lines_and_cells_are_short():
    lines = TEXT.splitlines()
    cells = [cell.strip() for line in lines if line[:1] == "|" for cell in line.split("|")]
    assert max(map(len, lines)) <= 120 and max(map(len, cells)) <= 60


def test_every_figure_that_is_shown_is_in_the_tree():
    shown = set(re.findall(r"\]\((figures/[^)]+)\)", TEXT))
    files = {path.relative_to(RESULTS).as_posix() for path in (RESULTS / "figures").iterdir()}
    assert shown and shown <= files


TOY_SEEDS = {  # folder: seeds of the first and of the second method
    "toy-world": ({31, 42, 66, 23, 17}, {11, 12, 13, 14, 15}),
    "toy-world-others": ({6, 7, 8, 9, 10}, {6, 7, 8, 9, 10}),
    "toy-world-torch-2.11": ({31, 42, 66, 23, 17}, {11, 12, 13, 14, 15}),
    "toy-world-torch-2.14": ({31, 42, 66, 23, 17}, {11, 12, 13, 14, 15}),
    "toy-world-avx2": ({31, 42, 66}, {11, 12, 13}),  # the seeds of `./run_all.sh toy`
}


@functools.cache
def toy_tables(folder: str) -> list[str]:
    """Return the lines that end `./run_all.sh toy`, with single blanks."""
    command = [sys.executable, RESULTS / "toy_tables.py", RESULTS / folder]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [" ".join(line.split()) for line in output.splitlines()]


def test_the_folders_of_the_toy_world():
    assert set(TOY_SEEDS) == {name for name in FOLDERS if name.startswith("toy-world")}


@pytest.mark.parametrize("folder", TOY_SEEDS)
def test_the_toy_world(folder):
    """The tables and sentences of `./run_all.sh toy`, for the seeds that were not tuned on."""
    seeds = tuple({run["seed"] for run in runs(folder, model=m)} for m in ("bert", "llama"))
    assert seeds == TOY_SEEDS[folder]
    lines = toy_tables(folder)
    shown = [line for line in lines if re.search(r"\d", line) and not line.startswith("All scores")]
    assert len(shown) > 5
    if folder == "toy-world-avx2":
        assert numbers_of_the_toy_world(folder) + "." in section(folder)
        shown = []
    for line in shown:
        assert line in section("toy-world")
    version = folder.partition("-torch-")[2] or "2.13"
    for run in runs(folder):
        assert run["versions"]["torch"].startswith(f"{version}.") and run["threads"] == 1


@pytest.mark.parametrize("folder", ["toy-world-torch-2.11", "toy-world-torch-2.14"])
def test_the_toy_world_does_not_depend_on_the_version_of_torch(folder):
    scores = [
        {(run["model"], run["strategy"], run["seed"]): run["scores"] for run in runs(name)}
        for name in ("toy-world", folder)
    ]
    assert len(scores[0]) == 30 and scores[0] == scores[1]


@pytest.mark.parametrize("folder", ["toy-world", "toy-world-others"])
def test_the_toy_world_shows_its_effects_in_every_seed(folder):
    words, sentences = (
        {(run["strategy"], run["seed"]): run["scores"] for run in runs(folder, model=model)}
        for model in ("bert", "llama")
    )
    for seed in TOY_SEEDS[folder][0]:
        base, full, front = (
            words[name, seed]["qac"]["accuracy"] for name in ("baseline", "full", "front")
        )
        assert full < base and full < front
    falls = 0  # of `qac` by aligned sentences
    for seed in TOY_SEEDS[folder][1]:
        gains = [
            sentences["full", seed][code]["f1"] - sentences["baseline", seed][code]["f1"]
            for code in ("qab", "qac")
        ]
        assert sum(gains) > 0
        falls += gains[1] < 0
    if folder == "toy-world-others":
        assert falls == 2 and "(`qac` falls in two of them)" in section("toy-world")


def test_the_toy_world_in_the_readme():
    text = " ".join(toy_tables("toy-world"))
    gain, harm = re.search(
        r"helps the close languages (\S+) and harms .*? one (\S+)\.", text
    ).groups()
    kept, left = re.search(r"keeps (\d+%) of the gain and (\d+%) of the harm", text).groups()
    (others,) = re.findall(r"helps the languages without labels \((\S+) F1\)", text)
    assert f"helps two close languages ({gain[1:-1]} points) and harms a distant one" in README
    assert f"wrong dictionary {harm}; front-freezing keeps {kept} of the gain" in README
    assert f"{left} of the harm." in README
    assert f"languages without labels gain {others} F1 (five seeds;" in README
    numbers = numbers_of_the_toy_world("toy-world-others").replace(" and", ",")
    assert f"settings: {numbers}." in README


def numbers_of_the_toy_world(folder: str) -> str:
    """Return gain, harm, share of the gain and of the harm that are left, and gain in F1."""
    text = " ".join(toy_tables(folder))
    gain, harm = re.search(r"close languages \((\S+)\) and harms .*? one \((\S+)\)", text).groups()
    kept, left = re.search(r"keeps (\d+%) of the gain and (\d+%) of the harm", text).groups()
    (others,) = re.findall(r"without labels \((\S+) F1\)", text)
    return f"{gain}, {harm}, {kept}, {left} and {others}"
