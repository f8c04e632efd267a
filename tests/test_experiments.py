"""The numbers in results/README.md, and some in README.md, are recomputed from the records."""

import functools
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
TEXT = (RESULTS / "README.md").read_text("utf-8")
README = (RESULTS.parent / "README.md").read_text("utf-8")
FOLDERS = sorted(path.name for path in RESULTS.iterdir() if [*path.glob("*.json")])
E5, GEMMA, FIVE_SEEDS = "e5-small-34-languages", "gemma3-270m-xsid", "e5-small-five-seeds"
WORDS_OR_SENTENCES = "Words against sentences on that encoder"
STRATEGIES = ("baseline", "full", "front", "back")
# Of xSID: languages aligned with English, other languages without labels, those with labels.
GROUPS = ("tr da ja lt no", "de-ba de-muc gsw id nl", "en de it zh ar")


def section(title: str) -> str:
    """Return the section of a folder, or under a heading, in one line."""
    matches = []
    for part in TEXT.split("\n## "):
        heading = part.splitlines()[0]
        if f"`{title}`" in heading or heading == title:
            matches.append(part)
    (match,) = matches
    return " ".join(match.split())


@functools.cache
def records(folder: str) -> list[dict]:
    paths = sorted((RESULTS / folder).glob("*.json"))
    return [json.loads(path.read_text("utf-8")) for path in paths]


def runs(folder: str, **values: str | int) -> list[dict]:
    """Return the records of a folder that have these values."""
    selected = []
    for run in records(folder):
        if all(run[key] == value for key, value in values.items()):
            selected.append(run)
    return selected


def by_strategy(folder: str, **values: str | int) -> dict[str, dict[int, dict]]:
    """Return {strategy: {seed: record}}."""
    selected = defaultdict(dict)
    for run in runs(folder, **values):
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
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def row_of(table: str, start: str) -> str:
    (row,) = (line for line in table.splitlines() if line.startswith(start))
    return row


def counts_in(row: str) -> list[tuple[int, int]]:
    """Return the (up, down) of each strategy in a row of a table."""
    return [(int(up), int(down)) for up, down in re.findall(r"(\d+)/(\d+)", row)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_of_records_has_a_section(folder):
    assert section(folder)


# ---- AlignFreeze on e5-small ---------------------------------------------------------------------


def test_786_steps():
    words, sentences = section(E5), section(WORDS_OR_SENTENCES)
    bases = by_strategy(E5, strategy="baseline")["baseline"]
    for seed, base in bases.items():
        assert f"seed {seed}: baseline {average(base):.1f}" in words
    for run in runs(E5):
        assert run["steps"]["finetune"] == 786
        if run["strategy"] != "baseline":
            unit, layer = run["config"].get("unit") or "word", run["config"]["layer"]
            assert (unit, layer) in (("word", -2), ("sentence", 7), ("word", 7))
            up, down = ups_and_downs(run, bases[run["seed"]])
            result = f"{run['strategy']} {average(run):.1f} ({up} up, {down} down)"
            assert result in (words if (unit, layer) == ("word", -2) else sentences)


def test_languages_up_and_down_by_one_standard_deviation():
    table = report(E5).split("Paired by seed:")[0]
    sentences = counts_in(row_of(table, "| e5-small | before  "))
    words = counts_in(row_of(table, "| e5-small | before, dictionary "))
    (full_up, full_down), (front_up, front_down) = sentences
    result = f"{front_up} are up and {front_down} down with front, "
    result += f"{full_up} up and {full_down} down with full"
    assert result in section(WORDS_OR_SENTENCES)
    assert f"{front_up} up and {front_down} down, {full_up} up and {full_down} down" in README
    (full, _), (front, _), (back, _) = words
    assert not any(down for _, down in words)
    result = f"{full} languages are up with full, {front} with front, {back} with back"
    assert f"{result}, and none is down" in section(E5)
    assert f"three seeds on a CPU alike, {front} and {full} up" in README


def test_averages_of_five_seeds_on_a_gpu():
    text, selected = section(FIVE_SEEDS), by_strategy(FIVE_SEEDS)
    averages, minutes, differences = [], [], []
    for strategy in STRATEGIES:
        seeds = selected[strategy]
        values = [average(run) for run in seeds.values()]
        assert set(seeds) == {31, 42, 66, 23, 17}
        for run in seeds.values():
            assert (run["device"], run["steps"]["finetune"]) == ("NVIDIA H200", 786)
            minutes.append(sum(run["seconds"].values()) / 60)
        averages.append(f"{strategy} {mean(values):.1f} ± {stdev(values):.1f}")
        for run in runs(E5, strategy=strategy):  # on a CPU
            if run["config"]["layer"] in (None, -2):
                differences.append(abs(average(run) - average(seeds[run["seed"]])))
    assert ", ".join(averages) in text
    assert ", ".join(averages[:3]) in README
    assert f"{min(minutes):.1f} to {max(minutes):.1f} minutes a run" in text
    assert f"The {len(differences)} averages" in text
    assert f"at most {max(differences):.2f}, by {mean(differences):.2f} in the mean" in text


def test_languages_up_and_down_with_five_seeds_on_a_gpu():
    text = section(FIVE_SEEDS)
    by_deviation, paired = report(FIVE_SEEDS).split("Paired by seed:")
    (full, a), (front, b), (back, c) = counts_in(row_of(by_deviation, "| e5-small | before, dict"))
    assert a == b == c == 0
    assert f"{full}, {front} and {back} languages are up and none is down" in text
    assert f"languages up {front} by front, {full} by full, none down" in README
    *gains, (_, below) = counts_in(row_of(paired, "| e5-small | before, dict"))
    assert [down for _, down in gains] == [0, 0, 0]
    assert "{}, {} and {} are up".format(*(up for up, _ in gains)) in text
    assert f"front is below full in {below}" in text


def test_languages_that_gain_and_lose_by_sentences_in_each_seed():
    bases = by_strategy(E5, strategy="baseline")["baseline"]
    front = by_strategy(E5, strategy="front", aligner="none")["front"]
    full = by_strategy(E5, strategy="full", aligner="none")["full"]
    ups, downs = [], []
    for seed, base in sorted(bases.items()):
        front_up, front_down = ups_and_downs(front[seed], base)
        full_up, full_down = ups_and_downs(full[seed], base)
        ups.append(f"{front_up} against {full_up}")
        downs.append(f"{front_down} against {full_down}")
    text = section(WORDS_OR_SENTENCES)
    gain = f"in each seed ({', '.join(ups)})"
    assert f"{gain}, and fewer lose ({', '.join(downs)})" in text
    assert gain in README


def test_languages_that_gain_by_words_or_by_sentences():
    text = section(WORDS_OR_SENTENCES)
    (base,) = runs(E5, strategy="baseline", seed=31)
    for code, name in (("he", "Hebrew"), ("ar", "Arabic")):
        gains = []
        for aligner in ("none", "dictionary"):  # sentences, words
            (run,) = runs(E5, strategy="full", seed=31, aligner=aligner)
            gains.append(average(run, [code]) - average(base, [code]))
        assert "{} by {:.1f} and {:.1f}".format(name, *gains) in text


@pytest.mark.parametrize("folder", ["e5-small-udpos", "e5-small-udpos-fp32"])
def test_300_steps(folder):
    for strategy, seeds in by_strategy(folder).items():
        values = [average(run) for run in seeds.values()]
        assert len(values) == 3
        result = f"{strategy} {mean(values):.1f} ± {stdev(values):.1f}"
        assert result in section("e5-small-udpos")


@pytest.mark.parametrize(
    "start, values",
    [
        ("by fast_align", {"task": "udpos", "aligner": "fastalign"}),
        ("by awesome", {"task": "udpos", "aligner": "awesome"}),
        ("during", {"task": "udpos", "schedule": "during"}),
        ("NER 54.6;", {"task": "wikiann"}),
        ("NLI 52.0;", {"task": "xnli"}),
    ],
)
def test_200_steps(start, values):
    text = section("e5-small-200-steps")
    (base,) = by_strategy("e5-small-200-steps", task=values["task"])["baseline"].values()
    selected, averages = by_strategy("e5-small-200-steps", **values), []
    for strategy in STRATEGIES[1:]:
        (run,) = selected[strategy].values()
        averages.append(f"{average(run):.1f}")
    assert f"{start} {', '.join(averages)}" in text
    assert f" {average(base):.1f};" in text


# ---- Middle-layer alignment on Gemma 3 270M ------------------------------------------------------


@pytest.mark.parametrize("folder", [GEMMA, "gemma3-270m-merged", "gemma3-270m-merged-validation"])
def test_scores_of_the_three_groups_of_languages(folder):
    for run in runs(folder):
        averages = [f"{average(run, group.split()):.1f}" for group in GROUPS]
        result = re.escape(", ".join(averages))
        assert re.search(rf"(?<![\d.]){result}(?!\d)", section(folder)), averages


def test_massive():
    text = section("gemma3-270m-massive")
    for run in runs("gemma3-270m-massive"):
        persian, english = (average(run, [code]) for code in ("fa", "en"))
        start = "alternating" if run["strategy"] == "full" else "baseline"
        assert f"{start} {persian:.1f}, {english:.1f}" in text


def test_tasks_with_one_run():
    for run in runs("gemma3-270m-tasks"):
        metric = next(iter(next(iter(run["scores"].values()))))
        assert f"{run['task']}, {metric}: {average(run):.1f}" in section("gemma3-270m-tasks")


# ---- The probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder, kind, starts, layers",
    [
        ("gemma3-270m-probe", "retrieval", {"no": "no:", "yes": "yes:"}, (0, 9, 11, 12, 18)),
        ("e5-small-probe", "retrieval", {"yes": "by cosine"}, (0, 4, 7, 9, 12)),
        ("e5-small-probe", "margin", {"yes": "by margin"}, (0, 4, 7, 9, 12)),
    ],
)
def test_probes_before_training(folder, kind, starts, layers):
    for run in runs(folder):
        languages = run["probe"][kind]["before"].values()
        shares = [f"{k} {100 * mean(share[k] for share in languages):.0f}%" for k in layers]
        start = starts[run["config"]["pool_first"]]
        assert f"{start} {', '.join(shares)}" in section(folder)


def retrieval_after_each_stage(run: dict, layers: tuple[int, ...]) -> str:
    stages = []
    for stage, languages in run["probe"]["retrieval"].items():
        shares = [f"{100 * mean(share[k] for share in languages.values()):.0f}" for k in layers]
        stages.append(f"{stage} {' '.join(shares)}")
    return ", ".join(stages)


@pytest.mark.parametrize(
    "strategy, seed, unit",
    [
        ("baseline", 66, "words"),
        ("full", 66, "words"),
        ("front", 66, "words"),
        ("full", 31, "sentences"),
        ("front", 31, "sentences"),
        ("full", 42, "sentences"),
        ("front", 42, "sentences"),
        ("full", 66, "sentences"),
        ("front", 66, "sentences"),
    ],
)
def test_probes_after_each_stage_on_e5(strategy, seed, unit):
    values = {"strategy": strategy, "seed": seed}
    if strategy != "baseline":
        values["aligner"] = "dictionary" if unit == "words" else "none"
    (run,) = runs(E5, **values)
    text = section("What the stages do to the layers")
    result = retrieval_after_each_stage(run, (0, 4, 7, 11, 12))
    assert f"{strategy}: {result}" in text[text.index(f"{unit}, seed {seed}: ") :]


@pytest.mark.parametrize(
    "strategy, name", [("baseline", "the task alone"), ("full", "alternating")]
)
def test_probes_after_each_stage_on_gemma(strategy, name):
    (run,) = runs(GEMMA, strategy=strategy, seed=2)
    text = section("What alternation does to the layers of Gemma 3")
    result = retrieval_after_each_stage(run, (0, 9, 11, 12, 18))
    assert f"{name}: {result}" in text[text.index("Result") :]


# ---- Everything ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder, start, title",
    [
        (E5, "| e5-small | before, dictionary ", E5),
        (E5, "| e5-small | before  ", WORDS_OR_SENTENCES),
        (FIVE_SEEDS, "| e5-small | before, dictionary ", FIVE_SEEDS),
        (GEMMA, "| gemma3-270m | alternate, accumulate 1, layer 11 ", GEMMA),
        ("gemma3-270m-massive", "| gemma3-270m | alternate ", "gemma3-270m-massive"),
    ],
)
def test_paired_intervals_are_those_of_the_report(folder, start, title):
    table = report(folder).split("Paired by seed:")[1].split("###")[0]
    rows = [line for line in table.splitlines() if line.startswith(start)]
    pattern = r"[-+]\d+\.\d \[[-+]\d+\.\d, [-+]\d+\.\d\]"
    intervals = [interval for row in rows for interval in re.findall(pattern, row)]
    assert intervals
    assert [interval for interval in intervals if interval not in section(title)] == []


def test_hours():
    hours = {}
    for folder in FOLDERS:
        hours[folder] = sum(sum(run["seconds"].values()) for run in runs(folder)) / 3600
    text = section("Hours")
    assert f"took {sum(hours.values()):.1f} hours" in text
    assert f"786 steps {hours[E5]:.1f} and" in text
    assert f"xSID {hours[GEMMA]:.1f}." in text


def test_the_toy_world():
    text = section("toy-world")
    for strategy, seeds in by_strategy("toy-world", model="bert", task="udpos").items():
        (run,) = seeds.values()
        assert f"{strategy} {average(run):.1f}" in text
    selected = by_strategy("toy-world", model="llama")
    for seed, run in selected["baseline"].items():
        assert f"{average(run):.1f} to {average(selected['full'][seed]):.1f}" in text
