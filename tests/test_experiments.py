"""The figures of results/README.md are those of the records, recomputed here one by one."""

import json
import re
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


def section(folder: str) -> str:
    """What is told of a folder, in one line."""
    (found,) = (part for part in TEXT.split("\n## ") if f"`{folder}`" in part.splitlines()[0])
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


def test_784_steps():
    found, text = by_strategy("e5-small-34-languages"), section("e5-small-34-languages")
    for seed, base in found["baseline"].items():
        assert f"seed {seed}: baseline {average(base):.1f}" in text
        for strategy in STRATEGIES[1:]:
            if seed in found[strategy]:
                run, start = points(found[strategy][seed]), points(base)
                up, down = (
                    sum(sign * (run[code] - start[code]) > 0 for code in run) for sign in (1, -1)
                )
                assert f"{strategy} {mean(run.values()):.1f} ({up} up, {down} down)" in text
    assert {run["steps"]["finetune"] for run in runs("e5-small-34-languages")} == {786}


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
    for folder in ("gemma3-270m-xsid", "gemma3-270m-merged"):
        for run in runs(folder):
            told = ", ".join(f"{average(run, group.split()):.1f}" for group in GROUPS)
            assert re.search(rf"(?<![\d.]){re.escape(told)}(?!\d)", section(folder)), told


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
