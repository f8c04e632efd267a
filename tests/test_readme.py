"""What the README shows is what there is: lines of the script, an example that runs, settings, published numbers."""

import csv
import re
import statistics
from collections import defaultdict
from pathlib import Path

import alignfreeze as af

ROOT = Path(af.__file__).parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)\n```", README, re.S)


def test_it_is_short_enough():
    assert README.count("\n") <= 220


def test_the_loss_and_the_freezing_are_the_lines_of_the_script():
    script = Path(af.__file__).read_text("utf-8")
    for block, name in zip(BLOCKS, ("contrastive_loss", "freeze")):
        function = script[script.index(f"def {name}(") :]
        assert block in function[: function.index("\n\n\n")]


def test_the_example_of_a_library_runs(world, capsys):
    name = '"bert-base-multilingual-cased"'
    (example,) = (block for block in BLOCKS if "import alignfreeze" in block)
    assert name in example
    exec(example.replace(name, repr(str(world / "models/bert"))), {})
    assert "accuracy" in capsys.readouterr().out


def test_the_settings_are_those_of_the_script():
    seen = set()
    for flags, *columns in re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| ([^|]*) \|$", README, re.M):
        names = [flag.strip("` -").replace("-", "_") for flag in flags.split(",")]
        if not set(names) <= set(af.SETTINGS):
            continue
        for k, column in enumerate(columns):
            assert column.split(", ") == [str(af.SETTINGS[name][k]) for name in names]
        seen.update(names)
    assert seen == set(af.SETTINGS)


def test_the_published_pos_scores_are_those_of_the_file():
    scores = defaultdict(lambda: defaultdict(list))
    with open(ROOT / "results/paper.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (
                row["task"] == "udpos"
                and row["schedule"] in ("before", "none")
                and row["language"] != "en"
            ):
                scores[row["model"], row["aligner"], row["strategy"]][row["language"]].append(
                    float(row["value"])
                )
    short = {
        "distilmBERT": "distilbert-base-multilingual-cased",
        "mBERT": "bert-base-multilingual-cased",
    }
    short["XLM-R"] = "xlm-roberta-base"
    rows = re.findall(
        r"^\| (distilmBERT|mBERT|XLM-R) \| (\w+) \| ([\d.]+) \| (.*) \| ([+-]\d+) \|$", README, re.M
    )
    assert len(rows) == 9
    for model, aligner, baseline, others, more in rows:
        base = next(v for (m, _, s), v in scores.items() if m == short[model] and s == "baseline")
        mean = statistics.mean(map(statistics.mean, base.values()))
        assert baseline == f"{percent(mean):.1f}"
        ups = {}
        for strategy, cell in zip(("full", "front", "back"), others.split(" | ")):
            own = scores[short[model], aligner, strategy]
            up, down = 0, 0
            for language, values in own.items():
                change = statistics.mean(values) - statistics.mean(base[language])
                limit = max(statistics.stdev(values), statistics.stdev(base[language]))
                up, down = up + (change > limit), down + (-change > limit)
            mean = statistics.mean(map(statistics.mean, own.values()))
            assert cell == f"{percent(mean):.1f} {up}/{down}"
            ups[strategy] = up
        assert more == f"{ups['front'] - ups['full']:+d}"


def percent(value: float) -> float:
    return value if value > 1 else 100 * value
