"""The README agrees with the script and the results: quoted code, the example, numbers."""

import csv
import dataclasses
import re
import statistics
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import alignfreeze as af

ROOT = Path(af.__file__).parent
SCRIPT = Path(af.__file__).read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)\n```", README, re.S)
EXAMPLES = [block for block in BLOCKS if "import alignfreeze" in block]
QUOTED = [block for block in BLOCKS if block not in EXAMPLES]
METHODS = ("alignfreeze", "mid-align")


def body_of(name: str) -> str:
    """Return a function of the script as text."""
    start = SCRIPT.index(f"def {name}(")
    return SCRIPT[start : SCRIPT.index("\n\n\n", start)]


def test_it_is_short_enough():
    assert README.count("\n") <= 220


@pytest.mark.parametrize("block", QUOTED)
def test_quoted_code_stands_in_the_script(block):
    assert f"{block}\n" in SCRIPT


@pytest.mark.parametrize("name", ["contrastive_loss", "freeze"])
def test_the_loss_and_the_freezing_are_quoted(name):
    assert any(block in body_of(name) for block in QUOTED)


def test_functions_that_the_readme_names_exist():
    rows = re.findall(r"^\| \d+\. [^|]*\| ([^|]*) \|$", README, re.M)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) > 10
    assert [name for name in names if not hasattr(af, name)] == []


def test_flags_that_the_readme_names_exist():
    flags = set(re.findall(r"`(--[a-z-]+)", README))
    assert len(flags) > 10
    settings = {af.flag_of(field.name) for field in dataclasses.fields(af.Settings)}
    assert flags - settings <= {"--help", "--write"}  # the latter is a flag of report.py


def copy_of_weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_example_of_a_library_runs_and_freezes(world, capsys, monkeypatch):
    """The example, with a tiny local model instead of one of the hub, uses the strategy `front`."""
    hub_id = '"bert-base-multilingual-cased"'
    (example,) = EXAMPLES
    assert hub_id in example
    weights = []  # before and after the alignment, and at the end
    original = af.realign

    def realign(model, *args):
        weights.append(copy_of_weights(model))
        original(model, *args)
        weights.append(copy_of_weights(model))

    monkeypatch.setattr(af, "realign", realign)
    variables: dict = {}
    exec(example.replace(hub_id, repr(str(world / "models/bert"))), variables)
    score = re.search(r"'accuracy': ([\d.]+)", capsys.readouterr().out)
    assert 0 <= float(score[1]) <= 1
    weights.append(copy_of_weights(variables["model"]))
    before, aligned, finetuned = weights
    half = variables["model"].config.num_hidden_layers // 2
    for name in before:
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        if layer:
            is_frozen = int(layer[1]) < half
            assert not is_frozen or torch.equal(before[name], aligned[name])
    first = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(aligned[first], finetuned[first])
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(before[embeddings], aligned[embeddings])


def test_the_table_of_defaults_is_that_of_the_script():
    defaults = [af.parse_args(["--method", method]) for method in METHODS]
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*) \| ([^|]*) \|$", README, re.M)
    in_table = set()
    for flags, *columns in rows:
        names = [flag.strip("` -").replace("-", "_") for flag in flags.split(",")]
        for settings, column in zip(defaults, columns):
            assert column.split(", ") == [str(getattr(settings, name)) for name in names]
        in_table.update(names)
    assert in_table >= set(af.PRESETS["mid-align"])


def test_the_defaults_of_single_models_are_those_of_the_script():
    for model in set(af.PRESETS) - set(METHODS):
        for name, value in af.PRESETS[model].items():
            assert f"`{model}`" in README
            flag = re.search(f"`{af.flag_of(name)} ([^` ]+)`", README)
            assert float(flag[1]) == value


# ---- Published scores ----------------------------------------------------------------------------

MODELS = {
    "distilmBERT": "distilbert-base-multilingual-cased",
    "mBERT": "bert-base-multilingual-cased",
    "XLM-R": "xlm-roberta-base",
}


def published() -> dict[tuple, dict[str, list[float]]]:
    """Return the PoS scores: {(model, aligner, strategy): {language: scores of all seeds}}."""
    scores = defaultdict(lambda: defaultdict(list))
    with open(ROOT / "results/paper.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            is_before = row["schedule"] in ("before", "none")
            if row["task"] == "udpos" and is_before and row["language"] != "en":
                key = row["model"], row["aligner"], row["strategy"]
                scores[key][row["language"]].append(float(row["value"]))
    return scores


def average(languages: dict[str, list[float]]) -> float:
    """Return the mean over languages of the mean over seeds, in percent."""
    value = statistics.mean(map(statistics.mean, languages.values()))
    return value if value > 1 else 100 * value


def ups_and_downs(languages: dict, baseline: dict) -> tuple[int, int]:
    """Return how many languages are up, and down, by more than the larger standard deviation."""
    up, down = 0, 0
    for language, values in languages.items():
        change = statistics.mean(values) - statistics.mean(baseline[language])
        limit = max(statistics.stdev(values), statistics.stdev(baseline[language]))
        up += change > limit
        down += -change > limit
    return up, down


def test_the_published_pos_scores_are_those_of_the_file():
    scores = published()
    baselines = {key[0]: value for key, value in scores.items() if key[2] == "baseline"}
    name, number = "(distilmBERT|mBERT|XLM-R)", r"([\d.]+)"
    row = rf"^\| {name} \| (\w+) \| {number} \| (.*) \| ([+-]\d+) \|$"
    rows = re.findall(row, README, re.M)
    assert len(rows) == 9
    for model, aligner, start, cells, difference in rows:
        baseline = baselines[MODELS[model]]
        assert start == f"{average(baseline):.1f}"
        ups = {}
        for strategy, cell in zip(("full", "front", "back"), cells.split(" | "), strict=True):
            languages = scores[MODELS[model], aligner, strategy]
            ups[strategy], down = ups_and_downs(languages, baseline)
            assert cell == f"{average(languages):.1f} {ups[strategy]}/{down}"
        assert difference == f"{ups['front'] - ups['full']:+d}"
