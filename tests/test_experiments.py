"""The figures of results/README.md are those of the records, recomputed here one by one."""

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
STRATEGIES = ("baseline", "full", "front", "back")
GROUPS = (
    "tr da ja lt no",
    "de-ba de-muc gsw id nl",
    "en de it zh ar",
)  # aligned, other transfer, supervised


def section(what: str) -> str:
    """What is told of a folder, or under a heading, in one line."""
    heads = (f"`{what}`", f"{what}\n")
    (found,) = (
        part
        for part in TEXT.split("\n## ")
        if heads[0] in part.splitlines()[0] or part.startswith(heads[1])
    )
    return " ".join(found.split())


def runs(folder: str, **wanted: str) -> list[dict]:
    found = [json.loads(path.read_text("utf-8")) for path in sorted((RESULTS / folder).glob("*.json"))]
    return [run for run in found if all(run[key] == value for key, value in wanted.items())]


def points(run: dict, languages: list[str] | None = None) -> dict[str, float]:
    """The main metric of each language, in percent; of all that the task was not learned in, unless named."""
    learned = run["config"].get("train_languages") or ["en"]
    main = {code: 100 * next(iter(metrics.values())) for code, metrics in run["scores"].items()}
    return {code: main[code] for code in languages or set(main) - set(learned)}


def average(run: dict, languages: list[str] | None = None) -> float:
    return mean(points(run, languages).values())


def by_strategy(folder: str, **wanted: str) -> dict[str, dict[int, dict]]:
    found = defaultdict(dict)
    for run in runs(folder, **wanted):
        found[run["strategy"]][run["seed"]] = run
    return found


def test_every_folder_of_records_is_told_of():
    assert all(section(path.name) for path in RESULTS.iterdir() if [*path.glob("*.json")])


def compared(run: dict, base: dict) -> str:
    """A run's average, and how many languages are above and below another's."""
    found, start = points(run), points(base)
    up = sum(found[code] > start[code] for code in found)
    down = sum(found[code] < start[code] for code in found)
    return f"{run['strategy']} {mean(found.values()):.1f} ({up} up, {down} down)"


def test_786_steps():
    words = section("e5-small-34-languages")
    sentences = section("Words against sentences on that encoder")
    bases = by_strategy("e5-small-34-languages", strategy="baseline")["baseline"]
    for seed, base in bases.items():
        assert f"seed {seed}: baseline {average(base):.1f}" in words
    for run in runs("e5-small-34-languages"):
        assert run["steps"]["finetune"] == 786
        if run["strategy"] != "baseline":
            unit, layer = run["config"].get("unit") or "word", run["config"]["layer"]
            assert (unit, layer) in (("word", -2), ("sentence", 7), ("word", 7))
            text = words if (unit, layer) == ("word", -2) else sentences
            assert compared(run, bases[run["seed"]]) in text


E5, GEMMA = "e5-small-34-languages", "gemma3-270m-xsid"


def test_languages_up_and_down_by_the_rule_of_one_deviation():
    command = [sys.executable, RESULTS / "report.py", RESULTS / E5]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = report.split("Paired by seed:")[0].splitlines()
    counts = []  # of sentences, of words: (up, down) of full, front, back
    for row in ("| e5-small | before  ", "| e5-small | before, dictionary "):
        (line,) = (line for line in table if line.startswith(row))
        counts.append([(int(up), int(down)) for up, down in re.findall(r"(\d+)/(\d+)", line)])
    (full, front), (by_full, by_front, by_back) = counts
    sentences = section("Words against sentences on that encoder")
    assert (
        f"{front[0]} are up and {front[1]} down with front, {full[0]} up and {full[1]} down with full"
        in sentences
    )
    assert not any(down for _, down in counts[1])
    told = f"{by_full[0]} languages are up with full, {by_front[0]} with front, {by_back[0]} with back"
    assert f"{told}, and none is down" in section(E5)
    readme = (RESULTS.parent / "README.md").read_text("utf-8")
    assert f"three seeds on a CPU alike, {by_front[0]} and {by_full[0]} up" in readme
    assert f"{front[0]} up and {front[1]} down, {full[0]} up and {full[1]} down" in readme


def test_five_seeds_on_a_gpu():
    text, found = section("e5-small-five-seeds"), by_strategy("e5-small-five-seeds")
    averages, minutes, apart = [], [], []
    for strategy in STRATEGIES:
        seeds = found[strategy]
        values = [average(run) for run in seeds.values()]
        assert set(seeds) == {31, 42, 66, 23, 17}
        assert {(run["device"], run["steps"]["finetune"]) for run in seeds.values()} == {
            ("NVIDIA H200", 786)
        }
        averages.append(f"{strategy} {mean(values):.1f} ± {stdev(values):.1f}")
        minutes += [sum(run["seconds"].values()) / 60 for run in seeds.values()]
        for run in runs(E5, strategy=strategy):
            if run["config"]["layer"] in (None, -2):
                apart.append(abs(average(run) - average(seeds[run["seed"]])))
    assert ", ".join(averages) in text
    assert ", ".join(averages[:3]) in (RESULTS.parent / "README.md").read_text("utf-8")
    assert f"{min(minutes):.1f} to {max(minutes):.1f} minutes a run" in text
    assert f"The {len(apart)} averages" in text
    assert f"at most {max(apart):.2f}, by {mean(apart):.2f} in the mean" in text
    command = [sys.executable, RESULTS / "report.py", RESULTS / "e5-small-five-seeds"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    by_rule, paired = (
        line for line in report.splitlines() if line.startswith("| e5-small | before, dict")
    )
    full, front, back = re.findall(r"(\d+)/0", by_rule)
    assert f"{full}, {front} and {back} languages are up and none is down" in text
    *gains, below = re.findall(r"(\d+)/(\d+)", paired)
    assert [down for _, down in gains] == ["0"] * 3
    assert "{}, {} and {} are up".format(*(up for up, _ in gains)) in text
    assert f"front is below full in {below[1]}" in text
    readme = (RESULTS.parent / "README.md").read_text("utf-8")
    assert f"languages up {front} by front, {full} by full, none down" in readme


def test_languages_that_gain_and_lose_by_sentences():
    bases = by_strategy(E5, strategy="baseline")["baseline"]
    found = {name: by_strategy(E5, strategy=name, aligner="none")[name] for name in ("front", "full")}
    up, down = [], []
    for seed, base in sorted(bases.items()):
        counts = {
            name: re.findall(r"\d+ up|\d+ down", compared(of[seed], base)) for name, of in found.items()
        }
        up.append(" against ".join(counts[name][0][:-3] for name in ("front", "full")))
        down.append(" against ".join(counts[name][1][:-5] for name in ("front", "full")))
    text = section("Words against sentences on that encoder")
    assert f"in each seed ({', '.join(up)}), and fewer lose ({', '.join(down)})" in text
    assert f"in each seed ({', '.join(up)})" in (RESULTS.parent / "README.md").read_text("utf-8")


@pytest.mark.parametrize("folder, wanted, start", [
    (E5, {"strategy": "baseline", "seed": 66}, "words, seed 66: "),
    (E5, {"strategy": "full", "seed": 66, "aligner": "dictionary"}, "words, seed 66: "),
    (E5, {"strategy": "front", "seed": 66, "aligner": "dictionary"}, "words, seed 66: "),
    (E5, {"strategy": "full", "seed": 31, "aligner": "none"}, "sentences, seed 31: "),
    (E5, {"strategy": "front", "seed": 31, "aligner": "none"}, "sentences, seed 31: "),
    (E5, {"strategy": "full", "seed": 42, "aligner": "none"}, "sentences, seed 42: "),
    (E5, {"strategy": "front", "seed": 42, "aligner": "none"}, "sentences, seed 42: "),
    (E5, {"strategy": "full", "seed": 66, "aligner": "none"}, "sentences, seed 66: "),
    (E5, {"strategy": "front", "seed": 66, "aligner": "none"}, "sentences, seed 66: "),
    (GEMMA, {"strategy": "baseline", "seed": 2}, "Result"),
    (GEMMA, {"strategy": "full", "seed": 2}, "Result"),
])  # fmt: skip
def test_probes_of_stages(folder, wanted, start):
    title, layers = "What the stages do to the layers", (0, 4, 7, 11, 12)
    head = wanted["strategy"]
    if folder == GEMMA:
        title, layers = "What alternation does to the layers of Gemma 3", (0, 9, 11, 12, 18)
        head = "alternating" if head == "full" else "the task alone"
    (run,) = runs(folder, **wanted)
    told = []
    for stage, found in run["probe"]["retrieval"].items():
        shares = (f"{100 * mean(share[k] for share in found.values()):.0f}" for k in layers)
        told.append(f"{stage} {' '.join(shares)}")
    text = section(title)
    assert f"{head}: {', '.join(told)}" in text[text.index(start) :]


def test_languages_that_gain_by_words_or_by_sentences():
    text = section("Words against sentences on that encoder")
    (base,) = runs(E5, strategy="baseline", seed=31)
    for code, name in (("he", "Hebrew"), ("ar", "Arabic")):
        gains = []
        for aligner in ("none", "dictionary"):  # sentences, words
            (run,) = runs(E5, strategy="full", seed=31, aligner=aligner)
            gains.append(average(run, [code]) - average(base, [code]))
        assert "{} by {:.1f} and {:.1f}".format(name, *gains) in text


def test_hours():
    folders = [path.name for path in RESULTS.iterdir() if [*path.glob("*.json")]]
    hours = {name: sum(sum(run["seconds"].values()) for run in runs(name)) / 3600 for name in folders}
    text = section("Hours")
    assert f"took {sum(hours.values()):.1f} hours" in text
    assert f"786 steps {hours['e5-small-34-languages']:.1f} and" in text
    assert f"xSID {hours['gemma3-270m-xsid']:.1f}." in text


@pytest.mark.parametrize("folder", ["e5-small-udpos", "e5-small-udpos-fp32"])
def test_300_steps(folder):
    for strategy, seeds in by_strategy(folder).items():
        values = [average(run) for run in seeds.values()]
        assert len(values) == 3
        assert f"{strategy} {mean(values):.1f} ± {stdev(values):.1f}" in section("e5-small-udpos")


@pytest.mark.parametrize("head, wanted", [
    ("by fast_align", {"task": "udpos", "aligner": "fastalign"}),
    ("by awesome", {"task": "udpos", "aligner": "awesome"}),
    ("during", {"task": "udpos", "schedule": "during"}),
    ("NER 54.6;", {"task": "wikiann"}),
    ("NLI 52.0;", {"task": "xnli"}),
])  # fmt: skip
def test_200_steps(head, wanted):
    (base,) = by_strategy("e5-small-200-steps", task=wanted["task"])["baseline"].values()
    found = by_strategy("e5-small-200-steps", **wanted)
    others = ", ".join(f"{average(*found[name].values()):.1f}" for name in STRATEGIES[1:])
    assert f"{head} {others}" in section("e5-small-200-steps")
    assert f" {average(base):.1f};" in section("e5-small-200-steps")


@pytest.mark.parametrize("folder, kind, head, layers", [
    ("gemma3-270m-probe", "retrieval", {"no": "no:", "yes": "yes:"}, (0, 9, 11, 12, 18)),
    ("e5-small-probe", "retrieval", {"yes": "by cosine"}, (0, 4, 7, 9, 12)),
    ("e5-small-probe", "margin", {"yes": "by margin"}, (0, 4, 7, 9, 12)),
])  # fmt: skip
def test_probes(folder, kind, head, layers):
    for run in runs(folder):
        shares = run["probe"][kind]["before"].values()
        told = ", ".join(f"{k} {100 * mean(share[k] for share in shares):.0f}%" for k in layers)
        assert f"{head[run['config']['pool_first']]} {told}" in section(folder)


def test_adapters_alone_in_turn_and_merged():
    for folder in ("gemma3-270m-xsid", "gemma3-270m-merged", "gemma3-270m-merged-validation"):
        for run in runs(folder):
            told = ", ".join(f"{average(run, group.split()):.1f}" for group in GROUPS)
            assert re.search(rf"(?<![\d.]){re.escape(told)}(?!\d)", section(folder)), told


def test_massive():
    text = section("gemma3-270m-massive")
    for run in runs("gemma3-270m-massive"):
        persian, english = (average(run, [code]) for code in ("fa", "en"))
        head = "alternating" if run["strategy"] == "full" else "baseline"
        assert f"{head} {persian:.1f}, {english:.1f}" in text


@pytest.mark.parametrize("folder, row, title", [
    (E5, "e5-small | before, dictionary ", E5),
    (E5, "e5-small | before  ", "Words against sentences on that encoder"),
    ("e5-small-five-seeds", "e5-small | before, dictionary ", "e5-small-five-seeds"),
    (GEMMA, "gemma3-270m | alternate, accumulate 1, layer 11 ", GEMMA),
    ("gemma3-270m-massive", "gemma3-270m | alternate ", "gemma3-270m-massive"),
])  # fmt: skip
def test_paired_intervals_are_those_of_the_report(folder, row, title):
    command = [sys.executable, RESULTS / "report.py", RESULTS / folder]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paired = report.split("Paired by seed:")[1].split("###")[0]
    lines = [line for line in paired.splitlines() if row in line]
    intervals = [
        found
        for line in lines
        for found in re.findall(r"[-+]\d+\.\d \[[-+]\d+\.\d, [-+]\d+\.\d\]", line)
    ]
    assert intervals and all(interval in section(title) for interval in intervals)


def test_tasks_that_were_run_once():
    for run in runs("gemma3-270m-tasks"):
        metric = next(iter(next(iter(run["scores"].values()))))
        assert f"{run['task']}, {metric}: {average(run):.1f}" in section("gemma3-270m-tasks")


def test_the_toy_world():
    text = section("toy-world")
    for strategy, seeds in by_strategy("toy-world", model="bert", task="udpos").items():
        assert f"{strategy} {average(*seeds.values()):.1f}" in text
    found = by_strategy("toy-world", model="llama")
    for seed, run in found["baseline"].items():
        assert f"{average(run):.1f} to {average(found['full'][seed]):.1f}" in text
