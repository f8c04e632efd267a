"""Test the report: recompute its tables in plain Python, and give it bad input."""

import csv
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
np = pytest.importorskip("numpy")
pytest.importorskip("pandas")
import records
import report

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "results" / "paper.csv"
STRATEGIES = ("baseline", "full", "front", "back")
MODELS = ("distilbert-base-multilingual-cased", "bert-base-multilingual-cased", "xlm-roberta-base")
TASKS = {"udpos": "PoS", "wikiann": "NER", "xnli": "NLI", "xquad": "QA"}
METRICS = {"accuracy": "accuracy", "f1": "F1", "em": "EM"}
ADVICE = "the report has no figures: install matplotlib (pip install matplotlib)\n"


def record(strategy="full", seed=31, scores=None, **fields) -> dict:
    """Return a record as alignfreeze.py writes it; config={...} adds settings."""
    alone = strategy == "baseline"
    config = {
        "strategy": strategy,
        "seed": seed,
        "method": "alignfreeze",
        "lr": 5e-5,
        "data_dir": f"o{seed}",
    }
    config |= {
        "realign_steps": None if alone else 300,
        "layer": None if alone else -2,
        "limit_test": None,
    }
    one = {
        "model": "e5-small",
        "task": "udpos",
        "strategy": strategy,
        "schedule": "none" if alone else "before",
    }
    one |= {
        "aligner": "none" if alone else "dictionary",
        "seed": seed,
        "config": config | fields.pop("config", {}),
    }
    scores = scores or {"en": 0.9, "de": 0.8, "fr": 0.7}
    return one | {"scores": {lang: {"accuracy": value} for lang, value in scores.items()}} | fields


def write(folder: Path, *records: dict) -> Path:
    """Write records to files of a folder. Returns the folder."""
    folder.mkdir(exist_ok=True)
    for one in records:
        (folder / f"{len(list(folder.iterdir()))}.json").write_text(json.dumps(one), "utf-8")
    return folder


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Return the tables of a Markdown text as {heading: rows}, each row a {column: cell}."""
    found, above, head = defaultdict(list), "", None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| "):
            head = None
            if line.startswith("### "):
                above = line[4:]
            elif line.startswith("Paired by"):
                above += ", paired"
        elif head is None:
            head = cells
        elif set("".join(cells)) != {"-"}:
            found[above].append(dict(zip(head, cells, strict=True)))
    return found


def main(capsys, *arguments) -> tuple[int, str, str]:
    """Run the report. Returns its exit code, stdout and stderr."""
    try:
        code = report.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture(scope="module")
def published() -> dict:
    """Return all tables of the report on paper.csv alone."""
    command = [sys.executable, "results/report.py", "results/paper.csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert not done.stderr
    return tables(done.stdout.decode())


@pytest.fixture(scope="module")
def scores() -> dict:
    """Return the paper's scores in points.

    They are {(model, task, metric, schedule, aligner, strategy): {seed: {language: points}}}.
    """
    found = defaultdict(lambda: defaultdict(dict))
    for line in csv.DictReader(PAPER.read_text("utf-8").splitlines()):
        key = tuple(
            line[field] for field in ("model", "task", "metric", "schedule", "aligner", "strategy")
        )
        found[key][int(line["seed"])][line["language"]] = 100 * float(line["value"])
    return found


def average(run: dict) -> float:
    """Return the mean over the languages of a run except English."""
    return mean(value for language, value in run.items() if language != "en")


def expected(values: list[float], base: list[float]) -> str:
    """Return the table cell of some scores, one for each seed."""
    change = mean(values) - mean(base)
    beyond = abs(change) > max(stdev(values), stdev(base))
    sign = ("▲" if change > 0 else "▼") if beyond else "·"
    return f"{mean(values):.1f} ± {stdev(values):.1f} {change:+.1f} {sign}".replace(
        "-0.0 ", "+0.0 "
    )


# --- the published numbers


def test_the_published_pos_averages_and_languages_up_and_down(published):
    rows = {(row["model"], row["runs"]): row for row in published["PoS accuracy"]}
    distilbert = "73.8 ± 0.6, 77.7 ± 0.3 30/0, 77.3 ± 0.2 32/0, 77.5 ± 0.1 29/0, +2"
    bert = "77.0 ± 0.6, 79.6 ± 0.4 29/0, 79.2 ± 0.2 30/0, 79.3 ± 0.4 26/0, +1"
    xlmr = "80.9 ± 0.1, 81.3 ± 0.1 9/1, 81.7 ± 0.2 16/0, 80.9 ± 0.2 5/5, +7"
    for model, cells in zip(MODELS, (distilbert, bert, xlmr)):
        row = rows[model, "before, dictionary"]
        shown = [re.sub(r" [+-]\d+\.\d [▲▼·]", "", row[strategy]) for strategy in STRATEGIES]
        assert ", ".join([*shown, row["up, front - full"]]) == cells
    assert sum(runs.startswith("before") for _, runs in rows) == 9 and len(rows) == 18


def test_where_front_freezing_helps_fewer_languages_than_full_realignment(published):
    fewer = {
        (row["model"], row["runs"])
        for row in published["PoS accuracy"]
        if row["up, front - full"][0] == "-"
    }
    assert ("bert-base-multilingual-cased", "before, awesome") in fewer
    assert ("distilbert-base-multilingual-cased", "during, dictionary") in fewer
    assert ("xlm-roberta-base", "before, dictionary") not in fewer


def test_every_cell_of_the_paper_recomputed(published, scores):
    checked = 0
    for (model, task, metric, schedule, aligner, strategy), runs in scores.items():
        if strategy == "baseline":
            continue
        base = scores[model, task, metric, "none", "none", "baseline"]
        row, title = f"{schedule}, {aligner}", f"{TASKS[task]} {METRICS[metric]}"
        cells = {line["language"]: line[strategy] for line in published[f"{title}, {model}, {row}"]}
        marks = ""
        for language in runs[31]:
            cell = expected(
                [run[language] for run in runs.values()], [run[language] for run in base.values()]
            )
            assert cells[language] == cell
            marks += cell[-1] if language != "en" else ""
            checked += 1
        cell = expected(
            [average(run) for run in runs.values()], [average(run) for run in base.values()]
        )
        cell += f" {marks.count('▲')}/{marks.count('▼')}"
        lines = [line for line in published[title] if (line["model"], line["runs"]) == (model, row)]
        assert [line[strategy] for line in lines] == [cell] and cells["average"] == cell
    assert checked > 2000


def test_paper_csv_is_complete_and_plain():
    lines = PAPER.read_text("utf-8").splitlines()
    assert lines[0] == "model,task,strategy,schedule,aligner,seed,language,metric,value"
    assert len(lines) == 13246 and not any("#" in line or ",," in line for line in lines)


# --- how sure


def student_p(t: float, freedom: int) -> float:
    """Return the two-sided p-value by integrating the density of Student's t from 0 to t."""
    log = (
        math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    )
    step = abs(t) / 20_000
    inside = sum(
        (1 + ((i + 0.5) * step) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(20_000)
    )
    return 1 - 2 * math.exp(log) * step * inside


def test_the_tail_of_students_t_is_the_tabulated_one():
    table = {
        (12.706, 1): 0.05,
        (4.303, 2): 0.05,
        (2.776, 4): 0.05,
        (4.604, 4): 0.01,
        (8.610, 4): 0.001,
    }
    table |= {(2.228, 10): 0.05, (0.0, 4): 1.0}
    for (t, freedom), p in table.items():
        assert report.t_tail(np.array([t, -t]), freedom) == pytest.approx([p, p], rel=2e-3)
    assert report.t_tail(np.array([np.inf]), 4)[0] < 1e-12
    special = pytest.importorskip("scipy.stats")
    t = np.array([0.1, 1, 3, 10, 100, 1000])
    for freedom in (1, 2, 4, 9, 30):
        assert report.t_tail(t, freedom) == pytest.approx(
            2 * special.t.sf(t, freedom), rel=1e-4, abs=1e-14
        )


def up_down_after_holm(pairs: dict[str, list[float]]) -> str:
    """Count languages up/down by paired t-tests, following Holm's procedure step by step."""
    tests = []
    for values in pairs.values():
        t = mean(values) / (stdev(values) / math.sqrt(len(values)))
        tests.append((student_p(t, len(values) - 1), mean(values)))
    up = down = 0
    for step, (p, change) in enumerate(sorted(tests)):
        if p * (len(tests) - step) >= 0.05:
            break
        up, down = up + (change > 0), down + (change < 0)
    return f"{up}/{down}"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "one, other",
    [("full", "baseline"), ("front", "baseline"), ("back", "baseline"), ("front", "full")],
)
def test_paired_differences_and_holm_recomputed(published, scores, model, one, other):
    place = {"baseline": ("none", "none")}
    here = scores[model, "udpos", "accuracy", "before", "dictionary", one]
    there = scores[model, "udpos", "accuracy", *place.get(other, ("before", "dictionary")), other]
    pairs = {}
    for language in sorted(here[31].keys() - {"en"}):  # in one order, or the draws below vary
        pairs[language] = [here[seed][language] - there[seed][language] for seed in here]
    rows = published["PoS accuracy, paired"]
    row = next(row for row in rows if (row["model"], row["runs"]) == (model, "before, dictionary"))
    change, interval, counts = re.fullmatch(
        r"(\S+) \[(.*)\] (.*)", row[one if other == "baseline" else f"{one} - {other}"]
    ).groups()
    assert float(change) == pytest.approx(mean(map(mean, pairs.values())), abs=0.0501)
    assert counts == up_down_after_holm(pairs)
    rng, draws = random.Random(1), []
    seeds, languages = range(len(here)), list(pairs)
    for _ in range(2000):
        drawn = rng.choices(seeds, k=len(here))
        draws.append(
            mean(
                mean(pairs[language][i] for i in drawn)
                for language in rng.choices(languages, k=len(languages))
            )
        )
    draws.sort()
    low, high = map(float, interval.split(", "))
    # The tolerance is half a tenth for rounding, and three standard errors of 0.07 each.
    assert (low, high) == pytest.approx((draws[49], draws[1949]), abs=0.26)


def test_the_interval_is_that_of_all_resamples_when_they_can_be_counted():
    pairs = np.random.default_rng(1).normal(size=(3, 3))
    resamples = [list(one) for one in itertools.product(range(3), repeat=3)]
    means = sorted(pairs[seeds][:, drawn].mean() for seeds in resamples for drawn in resamples)
    limits = [means[math.ceil(q * len(means)) - 1] for q in (0.025, 0.975)]
    assert report.bootstrap_interval(pairs) == pytest.approx(limits, abs=2e-3)


@pytest.mark.parametrize("seeds, languages", [(5, 34), (3, 5), (8, 12), (2, 1)])
def test_the_interval_is_the_limit_of_many_draws(seeds, languages):
    rng = np.random.default_rng(2)
    pairs = rng.normal(size=(seeds, languages)) + rng.normal(size=languages)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), 200_000) / n for n in pairs.shape]
    means = (drawn[0] @ pairs * drawn[1]).sum(axis=1)
    interval = report.bootstrap_interval(pairs)
    assert interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
    if seeds <= 6:  # a finer grid gives the same digits
        assert interval == pytest.approx(report.bootstrap_interval(pairs, 2**16), abs=2e-3)


def test_an_interval_next_to_zero_has_the_sign_of_its_limit(published):
    row = next(
        row
        for row in published["PoS accuracy, paired"]
        if (row["model"], row["runs"]) == (MODELS[0], "before, dictionary")
    )
    assert row["front - full"] == "-0.4 [-0.8, +0.0] 1/5"


def test_the_abstracts_seven_languages_do_not_survive_pairing(published):
    row = next(
        r
        for r in published["PoS accuracy, paired"]
        if (r["model"], r["runs"]) == ("xlm-roberta-base", "before, dictionary")
    )
    assert row["full"].endswith(" 1/0") and row["front"].endswith(" 0/0")


def test_pairing_takes_the_seed_out(tmp_path, capsys):
    runs = []
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        for strategy, gain in (("baseline", 0), ("full", 0.01 + seed / 1e4)):
            runs.append(
                record(
                    strategy, seed, {"en": 0.5, "de": 0.4 + shift + gain, "fr": 0.3 + shift + gain}
                )
            )
    _, out, _ = main(capsys, write(tmp_path, *runs))
    found = tables(out)
    assert found["PoS accuracy"][0]["full"].endswith("· 0/0")
    assert found["PoS accuracy, paired"][0]["full"] == "+1.0 [+1.0, +1.0] 2/0"


def test_a_change_is_that_of_seeds_that_the_baseline_has_too(tmp_path, capsys):
    for seed, score in ((31, 0.5), (42, 0.9)):
        write(tmp_path, record("baseline", seed, {"de": score}))
    write(tmp_path, record("front", 31, {"de": 0.6}))
    (row,) = tables(main(capsys, tmp_path)[1])["PoS accuracy"]
    assert row["front"].startswith("60.0 +10.0")


def test_the_scores_of_a_baseline_do_not_depend_on_what_was_probed(tmp_path, capsys):
    probed = {
        "config": {"unit": "word", "layer": -2},
        "probe": {"retrieval": {"before": {"de": [0.25, 0.5]}}},
    }
    sentences = {"config": {"unit": "sentence", "layer": 7}, "aligner": "none"}
    runs = [
        record("baseline", 1),
        record("baseline", 2, scores={"en": 0.9, "de": 0.6, "fr": 0.5}, **probed),
    ]
    runs += [record("full", seed, **sentences) for seed in (1, 2)]
    _, text, _ = main(capsys, write(tmp_path / "a", *runs))
    (row,) = tables(text)["PoS accuracy"]
    assert row["baseline"] == "65.0 ± 14.1" and row["seeds"] == "2"
    words = [
        head for head, found in tables(text).items() if "retrieval" in head and "full" in found[0]
    ]
    assert not words


def test_one_seed_gets_neither_deviation_nor_interval(tmp_path, capsys):
    folder = write(
        tmp_path, record("baseline"), record("full", scores={"en": 0.9, "de": 0.9, "fr": 0.7})
    )
    _, out, _ = main(capsys, folder)
    body = out.split("## ", 1)[1]
    assert "80.0 +5.0" in body  # the average of 90 and 70, against 75
    assert not re.search("[±▲▼·]|Paired|deviation", body)


# --- records


def test_random_records_recomputed(tmp_path, capsys):
    rng, runs = random.Random(0), {}
    for strategy in ("baseline", "emb,0-2"):
        for seed in (1, 2, 3):
            runs[strategy, seed] = {language: rng.random() for language in ("en", "de", "fr", "zh")}
    write(tmp_path, *(record(strategy, seed, scores) for (strategy, seed), scores in runs.items()))
    code, out, _ = main(capsys, tmp_path)
    rows = {
        row["language"]: row for row in tables(out)["PoS accuracy, e5-small, before, dictionary"]
    }
    assert code == 0 and list(rows) == ["en", "de", "fr", "zh", "average"]
    for language in rows:
        values = defaultdict(list)
        for (strategy, _), run in runs.items():
            values[strategy].append(
                100 * (average(run) if language == "average" else run[language])
            )
        assert (
            rows[language]["baseline"]
            == f"{mean(values['baseline']):.1f} ± {stdev(values['baseline']):.1f}"
        )
        assert rows[language]["emb,0-2"].startswith(expected(values["emb,0-2"], values["baseline"]))


def test_settings_stand_below_the_folder_once_and_then_what_differs(tmp_path, capsys):
    folder = write(
        tmp_path,
        record("baseline"),
        record(),
        record(config={"realign_steps": 100}, scores={"de": 0.5}),
    )
    write(
        folder,
        record("front", config={"data_dir": "other", "checkpointing": True}),
        record("back", config={"lr": 1e-5}),
    )
    _, out, err = main(capsys, folder)
    rows = {row["runs"]: row for row in tables(out)["PoS accuracy"]}
    (line,) = (line for line in out.splitlines() if line.startswith("Settings of all runs:"))
    assert " layer -2, " in line and " method alignfreeze, " in line and "lr " not in line
    own = []
    for lr, n in (("1e-05", 300), ("5e-05", 100), ("5e-05", 300)):
        own.append(f"before, dictionary, lr {lr}, realign_steps {n}")
    assert sorted(rows) == own
    assert out.count("realign_steps 100") == 2  # in the row and in the heading of its languages
    runs = "runs of e5-small, udpos, before, dictionary"
    assert err == f"{runs} differ in lr, realign_steps: they are separate rows\n"
    cells = [tuple(row[strategy] for strategy in STRATEGIES) for row in rows.values()]
    assert ("75.0", "75.0 +0.0", "75.0 +0.0", "-") in cells
    assert ("-", "-", "-", "75.0") in cells  # with another learning rate: no baseline of its own


def test_settings_that_are_too_long_for_a_row_are_numbered(tmp_path, capsys):
    runs = [record(config={"adapter": [letter * 40]}) for letter in "ab"]
    text = main(capsys, write(tmp_path, *runs))[1]
    rows = [row["runs"] for row in tables(text)["PoS accuracy"]]
    assert rows == ["before, dictionary, settings 1", "before, dictionary, settings 2"]
    for number, letter in enumerate("ab", 1):
        line = f"* e5-small; PoS; before, dictionary, settings {number}: adapter {letter * 40}."
        assert line in text.splitlines()


def test_a_folder_of_one_setting_has_short_rows_and_no_complaint(tmp_path, capsys):
    _, out, err = main(capsys, write(tmp_path, record("baseline"), record(), record("front")))
    assert [row["runs"] for row in tables(out)["PoS accuracy"]] == ["before, dictionary"]
    (line,) = (line for line in out.splitlines() if line.startswith("Settings of all runs:"))
    assert " lr 5e-05, " in line and " realign_steps 300, " in line and not err


def test_a_flag_that_an_earlier_revision_lacked_makes_no_row_of_its_own(tmp_path, capsys):
    """Runs without the setting `unit` count as runs on words once others are on sentences."""
    for seed, config in [(31, {}), (42, {"unit": "word"})]:
        for strategy in ("baseline", "full"):
            write(tmp_path, record(strategy, seed, config=config))
    code, text, complaints = main(capsys, tmp_path)
    assert (code, complaints) == (0, "")
    (row,) = tables(text)["PoS accuracy"]
    assert row["seeds"] == "2"
    write(tmp_path, record("full", 66, config={"unit": "sentence"}))
    rows = tables(main(capsys, tmp_path)[1])["PoS accuracy"]
    assert [row["runs"] for row in rows] == [
        "before, dictionary, unit sentence",
        "before, dictionary, unit word",
    ]


def test_what_an_earlier_revision_did_counts_as_a_setting(tmp_path, capsys):
    """It had 10% of warm-up, so its baseline is none for runs with 80%."""
    for seed in (1, 2):
        write(tmp_path, record("baseline", seed), record("full", seed, config={"warmup": 0.8}))
    rows = tables(main(capsys, tmp_path)[1])["PoS accuracy"]
    assert all("-" in (row.get("baseline", "-"), row.get("full", "-")) for row in rows)


def test_runs_that_keep_their_best_weights_are_compared_however_often_they_look(tmp_path, capsys):
    """With 200 updates, a baseline has seen 800 batches of its task, and an aligned run 400."""
    second = {"method": "mid-align", "validate": 200, "accumulate": 4, "train_languages": ["en"]}
    validation = {"losses": [1.0], "loss": 1.0, "step": 200}
    for seed in (1, 2):
        for strategy, score in (("baseline", 0.5), ("full", 0.6)):
            one = record(strategy, seed, {"fr": score}, config=second, validation=validation)
            write(tmp_path, one | {"schedule": "none" if strategy == "baseline" else "alternate"})
    found = tables(main(capsys, tmp_path)[1])
    (row,) = found["PoS accuracy"]
    assert row["full"].split()[:4] == ["60.0", "±", "0.0", "+10.0"]
    (row,) = found["PoS accuracy, paired"]
    assert row["full"].startswith("+10.0 [+10.0, +10.0]")


def test_seeds_that_a_strategy_lacks_are_told(tmp_path, capsys):
    for seed in (1, 2, 3):
        write(tmp_path, record("baseline", seed), record("full", seed))
    write(tmp_path, record("front", 1))
    found = tables(main(capsys, tmp_path)[1])
    assert found["PoS accuracy"][0]["seeds"] == found["PoS accuracy, paired"][0]["seeds"] == "1-3"


def test_averages_use_only_languages_that_all_runs_have(tmp_path, capsys):
    folder = write(
        tmp_path, *(record(strategy, seed) for strategy in ("baseline", "full") for seed in (1, 2))
    )
    write(folder, record("front", 1, scores={"en": 0.9, "de": 0.6}))
    _, out, _ = main(capsys, folder)
    (row,) = tables(out)["PoS accuracy"]
    assert row["baseline"] == "80.0 ± 0.0" and row["languages"] == "1"  # German alone


def test_a_record_read_twice_counts_once_and_a_contradiction_is_named(tmp_path, capsys):
    folder = write(tmp_path, record(seed=1), record(seed=2))
    _, once, _ = main(capsys, folder)
    _, twice, err = main(capsys, folder, folder)
    assert once == twice and not err
    write(folder, record(seed=1, scores={"de": 0.1}))
    _, out, err = main(capsys, folder)
    assert out == once and err.count("\n") == 1 and "scores differ" in err and "2.json" in err


def test_files_of_a_folder_make_one_table_and_folders_one_each(tmp_path, capsys):
    folder = write(tmp_path / "a", record("baseline"), record())
    _, out, _ = main(capsys, folder / "0.json", folder / "1.json")
    assert len(tables(out)["PoS accuracy"]) == 1
    _, out, _ = main(capsys, folder, write(tmp_path / "b", record()))
    assert re.findall("^## (.*)$", out, re.M) == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_own_runs_stand_beside_the_published(tmp_path, capsys, scores):
    names = ("xlm-roberta-base", "xquad")
    for strategy in STRATEGIES:
        place = ("none", "none") if strategy == "baseline" else ("before", "dictionary")
        for seed, run in scores[*names, "f1", *place, strategy].items():
            own = {
                language: {"f1": 0.5, "f1_authors": value / 100} for language, value in run.items()
            }
            write(tmp_path, record(strategy, seed, model=names[0], task=names[1]) | {"scores": own})
    _, out, err = main(capsys, tmp_path)
    mine, paper = tables(out)["QA F1 of the authors"]
    assert not err and (mine["runs"], paper["runs"]) == (
        "before, dictionary",
        "before, dictionary, published",
    )
    assert [mine[strategy] for strategy in STRATEGIES] == [
        paper[strategy] for strategy in STRATEGIES
    ]
    assert len(tables(out)["QA F1"]) == 1  # the official measure has nothing published


# --- the second method


def aligned(strategy, seed, scores, **fields) -> dict:
    """Return a record of the second method: two supervised languages, one aligned, two others."""
    config = {
        "method": "mid-align",
        "unit": None,
        "layer": None,
        "train_languages": ["en", "de"],
        "realign_steps": None,
    }
    if strategy == "full":
        config |= {"unit": "sentence", "layer": 2, "realign_languages": ["tr"]}
    fields |= {
        "schedule": "none" if strategy == "baseline" else "alternate",
        "aligner": "none",
        "config": config,
    }
    return record(strategy, seed, scores, task="xsid", **fields)


def test_the_second_method_has_an_average_for_each_group_of_languages(tmp_path, capsys):
    rng, runs = random.Random(3), {}
    for strategy in ("baseline", "full"):
        for seed in (1, 2):
            runs[strategy, seed] = {
                language: rng.random() for language in ("en", "de", "tr", "it", "zh")
            }
    write(tmp_path, *(aligned(strategy, seed, scores) for (strategy, seed), scores in runs.items()))
    _, out, err = main(capsys, tmp_path)
    rows = {row["languages"]: row for row in tables(out)["xSID accuracy"]}
    groups = {"2 supervised": ("en", "de"), "1 aligned": ("tr",), "2 other transfer": ("it", "zh")}
    assert not err and rows.keys() == groups.keys()
    for name, languages in groups.items():
        values = defaultdict(list)
        for (strategy, _), run in runs.items():
            values[strategy].append(100 * mean(run[language] for language in languages))
        assert rows[name]["full"].startswith(expected(values["full"], values["baseline"]))
    assert len(tables(out)["xSID accuracy, e5-small, alternate"]) == 5 + 3


# --- losses and the probe


STAGES = ("before", "realigned", "finetuned")
WORDS = {
    "retrieval": {
        stage: {"de": [0.1, 0.2 + i / 10, 0.5], "fr": [0.3, 0.4, 0.7]}
        for i, stage in enumerate(STAGES)
    },
    "drift": {
        "realigned": {"emb": 0.001, "0": 0.0, "1": 0.02},
        "finetuned": {"emb": 0.3, "0": 0.1, "1": 0.2},
    },
}
SENTENCES = WORDS | {"margin": WORDS["retrieval"]}
LOSSES = {"realign": [3.0, 2.5, 1.25], "finetune": [0.9, 0.4]}


def test_losses_and_layers_are_tables(tmp_path, capsys):
    front = [record("front", seed, probe=WORDS, losses=LOSSES) for seed in (1, 2)]
    _, out, _ = main(
        capsys, write(tmp_path, record("baseline", losses={"finetune": [1.0, 0.5]}), *front)
    )
    found = tables(out)
    losses = {row["stage"]: row for row in found["Loss, PoS, e5-small, before, dictionary"]}
    first, last = "realign, step 20", "finetune, step 40"
    assert losses[first] == {"stage": first, "baseline": "-", "front": "3"}
    assert losses["realign, step 60"]["front"] == "1.25"
    assert losses[last] == {"stage": last, "baseline": "0.5", "front": "0.4"}
    layers = {
        row["stage"]: row["front"]
        for row in found["Retrieval by cosine, PoS, e5-small, before, dictionary"]
    }
    assert len(layers) == 9
    assert layers["before training, layer 0"] == "20"
    assert layers["after fine-tuning, layer 2"] == "60"
    drift = {
        row["stage"]: row["front"]
        for row in found["Change of weights, PoS, e5-small, before, dictionary"]
    }
    assert drift["after alignment, layer 0"] == "0.1"
    assert drift["after alignment, layer 1"] == "0"
    assert drift["after fine-tuning, layer 2"] == "20"


@pytest.mark.parametrize(
    "schedule, accumulate, updates, last",
    [("before", 1, 47, 47), ("before", 4, 15, 60), ("alternate", 2, 47, 47), ("during", 1, 60, 60)],
)
def test_the_last_loss_stands_at_the_last_step(schedule, accumulate, updates, last):
    """A step is a batch; of batches that alternate, half are of the task."""
    run = {"schedule": schedule, "steps": {"finetune": updates}}
    run["config"] = {"accumulate": accumulate}
    assert records.loss_steps(run, "task", 3) == [20, 40, last]


@pytest.mark.parametrize("name", ["align", "realign"])  # the second by earlier revisions
def test_the_last_loss_of_realignment_stands_at_its_last_step(name):
    run = {"schedule": "before", "steps": {"finetune": 20, "realign": 47}}
    run["config"] = {"accumulate": 1}
    assert records.loss_steps(run, name, 3) == [20, 40, 47]


def test_a_record_with_more_realignment_than_fine_tuning_is_read(tmp_path, capsys):
    losses = {"align": [3.0, 2.0, 1.0], "task": [0.5]}
    run = record(losses=losses, steps={"finetune": 20, "realign": 60})
    report.main([str(write(tmp_path / "runs", run))])
    out, err = capsys.readouterr()
    assert "left out" not in err and "70" in out


@pytest.mark.parametrize("flag, value", [("limit_train", 100), ("lora", 8), ("warmup", 0.1)])
def test_a_baseline_without_a_setting_is_not_compared_with_runs_that_have_it(tmp_path, flag, value):
    off = None if flag == "limit_train" else 0
    runs = [record("baseline", config={flag: off}), record(config={flag: value})]
    runs += [record("front", config={flag: off, "weak": True})]
    folder = write(tmp_path / "runs", *runs)
    data = records.load(records.read(folder), published=False)
    strategies = data.groupby("row").strategy.agg(lambda names: " ".join(sorted(set(names))))
    assert sorted(strategies) == ["baseline front", "full"]


def test_a_baseline_that_probes_serves_runs_with_another_rate_of_alignment(tmp_path):
    runs = [record("baseline", config={"realign_lr": 2e-5, "temperature": 0.1})]
    runs += [record(config={"realign_lr": 1e-4, "temperature": 1.5})]
    data = records.load(records.read(write(tmp_path / "runs", *runs)), published=False)
    assert set(data.strategy) == {"baseline", "full"} and data.row.nunique() == 1


def test_a_folder_that_does_not_exist_is_named(tmp_path, capsys):
    code, _, err = main(capsys, tmp_path / "runs")
    assert code == 2 and f"{tmp_path / 'runs'} does not exist; name a folder" in err


def test_a_loss_is_shown_up_to_the_step_that_all_seeds_reached(tmp_path, capsys):
    """Of a run that stopped later, the mean would jump to the loss of that run alone."""
    runs = []
    for seed, losses in [(1, [0.9, 0.5, 0.7]), (2, [0.7, 0.3])]:
        for strategy in ("baseline", "full"):
            run = aligned(strategy, seed, {"tr": 0.5})
            run |= {"validation": {"losses": losses}}
            run["config"] |= {"validate": 10 if strategy == "full" else 5, "accumulate": 2}
            runs.append(run)
    _, out, _ = main(capsys, write(tmp_path / "runs", *runs))
    assert tables(out)["Validation loss, xSID, e5-small, alternate"] == [
        {"stage": "validation, step 10", "baseline": "0.8", "full": "0.8"},
        {"stage": "validation, step 20", "baseline": "0.4", "full": "0.4"},
    ]


def test_a_run_is_compared_with_the_baseline_that_validated_like_it(tmp_path, capsys):
    """Of the same batches of the task, an alternating run has twice as many updates."""
    runs = []
    for strategy, validate, f1 in [
        ("baseline", 5, 0.5),
        ("baseline", None, 0.4),
        ("full", 10, 0.6),
    ]:
        runs.append(aligned(strategy, 1, {"tr": f1}))
        runs[-1]["config"] |= {"validate": validate, "accumulate": 2}
    code, out, err = main(capsys, write(tmp_path / "runs", *runs))
    assert code == 0 and "left out" not in err and "+10.0" in out and "+20.0" not in out
    runs[-1]["config"]["validate"] = None
    code, out, err = main(capsys, write(tmp_path / "others", *runs))
    assert code == 0 and "left out" not in err and "+20.0" in out and "+10.0" not in out


def test_a_baseline_without_checkpointing_serves_runs_with_it(tmp_path, capsys):
    runs = [aligned("baseline", 1, {"tr": 0.5}), aligned("full", 1, {"tr": 0.6})]
    runs[1]["config"]["checkpointing"] = True
    runs[0]["config"]["checkpointing"] = False
    assert "+10.0" in main(capsys, write(tmp_path / "runs", *runs))[1]


def test_validation_losses_stand_at_the_batches_of_the_task(tmp_path, capsys):
    """A run that alternates validates half as often by updates, and as often by batches."""
    runs = []
    for strategy, validate, losses in [("baseline", 5, [1.5, 0.75, 0.8]), ("full", 10, [1.6, 0.7])]:
        run = aligned(strategy, 1, None, validation={"loss": 0.7, "step": 10, "losses": losses})
        run["config"] |= {"validate": validate, "accumulate": 2}
        runs.append(run)
    code, out, err = main(capsys, write(tmp_path / "runs", *runs))
    rows = tables(out)["Validation loss, xSID, e5-small, alternate"]
    assert (code, err) == (0, "")
    assert rows == [
        {"stage": "validation, step 10", "baseline": "1.5", "full": "1.6"},
        {"stage": "validation, step 20", "baseline": "0.75", "full": "0.7"},
        {"stage": "validation, step 30", "baseline": "0.8", "full": "-"},
    ]
    (axes,) = drawn(tmp_path / "runs")["runs-xsid-alternate-validation.svg"].axes
    points = {line.get_label(): [*zip(*line.get_data())] for line in axes.lines}
    assert points["baseline"] == [(10, 1.5), (20, 0.75), (30, 0.8)]


def test_records_of_few_values_make_tables_too(tmp_path, capsys):
    runs = [record("front", scores={"en": 0.9}, losses={"finetune": [0.9, 0.4]})]
    runs += [record("full", scores={"en": 0.9, "de": 0.5}), record("back", scores={"fr": 0.5})]
    code, out, err = main(capsys, write(tmp_path / "none-in-common", *runs))
    assert (code, err) == (0, "") and "PoS accuracy" not in tables(out)
    code, out, err = main(capsys, write(tmp_path / "source-only", runs[0]))
    losses = tables(out)["Loss, PoS, e5-small, before, dictionary"]
    assert (code, err) == (0, "") and [row["front"] for row in losses] == ["0.9", "0.4"]


def drawn(folder: Path) -> dict:
    """Return the figures of a folder as {file: figure}."""
    pytest.importorskip("matplotlib")
    import figures

    made, data = {}, records.load(records.read(folder), published=True)
    figures.draw(str(folder), data, report.summarise, report.markdown, made)
    return made


def test_figures_are_named_and_titled_by_what_they_show(tmp_path):
    runs = [record(s, n, probe=WORDS, losses=LOSSES) for s in STRATEGIES for n in (1, 2)]
    runs += [record("baseline", 1, config={"lr": 1 / 3})]
    runs += [record("full", 1, config={"lr": 1 / 3}, aligner="a" * 50)]
    made = drawn(write(tmp_path / "runs", *runs))
    assert {
        "runs-pos-before-dictionary-accuracy.svg",
        "runs-pos-before-dictionary-loss.svg",
    } <= made.keys()
    assert f"runs-pos-before-{'a' * 50}-accuracy.svg" in made  # not cut
    title = made["runs-pos-before-dictionary-accuracy.svg"].get_suptitle()
    assert title.startswith("PoS accuracy, e5-small: change by realignment, 2 seeds\n")
    assert title.endswith("; bars: the larger standard deviation")
    layers = made["runs-pos-before-dictionary-retrieval.svg"].axes
    assert (
        len({axes.get_ylim() for axes in layers}) == len({axes.get_xlim() for axes in layers}) == 1
    )
    assert [axes.get_title() for axes in layers] == ["after alignment", "after fine-tuning"]
    lines = [line.get_label() for line in layers[0].lines if line.get_linestyle() == ":"]
    assert lines == ["before training"]  # is the same for all strategies


def columns_of(figure) -> list[str]:
    return [tick.get_text() for tick in figure.axes[0].get_xticklabels()]


def test_languages_are_ordered_by_the_baseline_of_the_model_shown_and_the_mean_follows(tmp_path):
    scores = {"a": {"en": 0.9, "de": 0.4, "fr": 0.7}, "b": {"en": 0.9, "de": 0.8, "fr": 0.7}}
    runs = [record(s, 1, v, model=model) for model, v in scores.items() for s in STRATEGIES]
    made = drawn(write(tmp_path / "runs", *runs))
    of_a, of_b = (made[f"runs-{model}-pos-before-dictionary-accuracy.svg"] for model in "ab")
    assert columns_of(of_a) == ["de\n40", "fr\n70", "mean\n55"]
    assert columns_of(of_b) == ["fr\n70", "de\n80", "mean\n75"]


def test_languages_that_are_not_aligned_have_an_average_and_a_place_of_their_own(tmp_path, capsys):
    scores = {"en": 0.9, "de": 0.5, "fr": 0.7, "tr": 0.6}
    runs = []
    for strategy, aligned_languages in (("baseline", None), ("full", ["de", "fr"])):
        config = {"realign_languages": aligned_languages}
        runs.append(record(strategy, 1, scores, config=config))
    text = main(capsys, write(tmp_path / "runs", *runs))[1]
    rows = {row["languages"]: row["full"] for row in tables(text)["PoS accuracy"]}
    assert rows == {"2": "60.0 +0.0", "1 not aligned": "60.0 +0.0"}
    (figure,) = drawn(tmp_path / "runs").values()
    assert columns_of(figure) == ["de\n50", "fr\n70", "mean\n60", "tr\n60"]
    assert {text.get_text() for text in figure.axes[0].texts} == {"average", "not aligned"}


def test_a_figure_of_one_seed_has_no_bars_and_no_word_of_deviation(tmp_path):
    (figure,) = drawn(write(tmp_path, record("baseline"), record())).values()
    assert "deviation" not in figure.get_suptitle()
    (points,) = figure.axes[0].containers
    assert not points.has_yerr and points.lines[0].get_marker() == "o"


def test_sentences_have_a_line_for_each_language_a_bold_mean_and_the_aligned_layer(tmp_path):
    runs = [aligned("full", seed, None, probe=SENTENCES) for seed in (1, 2)]
    made = drawn(write(tmp_path / "runs", *runs))
    figure = made["runs-xsid-alternate-margin.svg"]
    stages = ["before training", "full, after alignment", "full, after fine-tuning"]
    assert [axes.get_title() for axes in figure.axes] == stages
    *lines, mark = figure.axes[0].lines
    assert [round(line.get_ydata()[-1]) for line in lines] == [50, 70, 60]
    assert lines[2].get_linewidth() > lines[0].get_linewidth() and list(mark.get_xdata()) == [2, 2]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    languages = ["de, supervised", "fr, other transfer"]
    assert names == [*languages, "mean", "before training"]


def test_what_did_not_change_is_not_drawn(tmp_path):
    """A model that was only probed has no panel after fine-tuning; one loss makes no curve."""
    same = dict.fromkeys(("before", "finetuned"), WORDS["retrieval"]["before"])
    still = {"finetuned": {"emb": 0.0, "0": 0.0}}
    probe = {"retrieval": same, "drift": still}
    runs = [record("baseline", 1, probe=probe, losses={"finetune": [0.5]})]
    ((name, figure),) = drawn(write(tmp_path / "runs", *runs)).items()
    assert name == "runs-pos-baseline-retrieval.svg"
    assert [axes.get_title() for axes in figure.axes] == ["before training"]


def test_what_was_probed_before_training_is_drawn_once(tmp_path):
    runs = [aligned(s, 1, None, probe=SENTENCES) for s in ("baseline", "full")]
    titles = []
    for axes in drawn(write(tmp_path / "runs", *runs))["runs-xsid-alternate-margin.svg"].axes:
        titles.append(axes.get_title())
    assert titles.count("before training") == 1 and len(titles) == 5


def test_a_strategy_has_one_color_in_all_panels_and_the_baselines_loss_stands_beside_the_tasks(
    tmp_path,
):
    runs = [record("baseline", losses={"finetune": [1.0, 0.5]})]
    runs += [record(s, losses=LOSSES) for s in ("full", "emb,0-2")]
    figure = drawn(write(tmp_path / "word", *runs))["word-pos-before-dictionary-loss.svg"]
    colors = defaultdict(set)
    for axes in figure.axes:
        for line in axes.lines:
            colors[line.get_label()].add(line.get_color())
    assert len(colors) == 3 == len(set.union(*colors.values()))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["baseline", "full", "emb,0-2"]
    runs = [aligned("baseline", 1, None, losses={"finetune": [1.0, 0.5]})]
    runs += [aligned("full", 1, None, losses={"task": [1.1, 0.6], "align": [2.0, 0.1]})]
    figure = drawn(write(tmp_path / "sentence", *runs))["sentence-xsid-alternate-loss.svg"]
    lines = {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figure.axes}
    assert lines == {"task": ["baseline", "full"], "align": ["full"]}


def test_the_figure_of_xlm_r_shows_the_published_changes(scores, monkeypatch):
    pytest.importorskip("matplotlib")
    import figures

    made = {}
    monkeypatch.setattr(figures, "save", lambda folder, figures, mark: made.update(figures))
    figures.main()
    (axes,) = made["xlm-r-front-against-full.svg"].axes
    *languages, last = [tick.get_text() for tick in axes.get_xticklabels()]
    changes = {}
    for strategy in ("baseline", "full", "front"):
        place = ("none", "none") if strategy == "baseline" else ("before", "dictionary")
        seeds = scores["xlm-roberta-base", "udpos", "accuracy", *place, strategy].values()
        changes[strategy] = np.array([mean(run[one] for run in seeds) for one in languages])
    shown = {line.get_label().split(":")[0]: line.get_ydata() for line in axes.lines}
    for strategy, name in (("full", "full realignment"), ("front", "front-freezing")):
        change = changes[strategy] - changes["baseline"]
        assert shown[name] == pytest.approx([*change, change.mean()])
    assert len(languages) == 34 and last == "mean"
    assert list(shown["full realignment"][:-1]) == sorted(shown["full realignment"][:-1])
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"full realignment: 9 up, 1 down", "front-freezing: 16 up, 0 down"}


# --- bad input, and files


HEADER = "model,task,strategy,schedule,aligner,seed,language,metric,value\n"
BAD = {
    "half.json": '{"model": "e5-small", "task"',
    "list.json": "[1, 2]",
    "foreign.json": '{"name": "package", "scores": 3}',
    "percent.json": json.dumps(record(scores={"de": 86.0})),
    "nan.json": json.dumps(record(scores={"de": float("nan")})),
    "text.json": json.dumps(record(scores={"de": "0.5"})),
    "true.json": json.dumps(record(scores={"de": True})),
    "mixed.json": json.dumps(record(scores={"de": 0.5, "fr": True})),
    "seed.json": json.dumps(record() | {"seed": "31"}),
    "surrogate.json": json.dumps(record(model="\ud800")),
    "empty.json": "",
    "nothing.json": "{}",
    "deep.json": "[" * 100_000,
    "bytes.json": b"\xff\xfe\x00",
    "probe.json": json.dumps(record(probe={"retrieval": {"before": {"de": 3}}})),
    "loss.json": json.dumps(record(losses={"realign": ["high"]})),
    "none.csv": "a,b\n1,2\n",
    "value.csv": HEADER + "m,t,full,before,x,1,de,f1,0,85\n",
    "short.csv": HEADER + "m,t,full,before,x,1,de,f1\n",
    "word.csv": HEADER + "m,t,full,before,x,one,de,f1,0.5\n",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_the_rest_reported(name, tmp_path, capsys):
    folder = write(tmp_path / "runs", record())
    bad = folder / name
    bad.write_bytes(BAD[name] if isinstance(BAD[name], bytes) else BAD[name].encode())
    alone = name.endswith(".csv")  # not read as part of a folder
    code, out, err = main(capsys, folder, *[bad] * alone)
    assert "PoS accuracy" in out and name in err.splitlines()[0] and "Traceback" not in err
    assert (code, err.count("\n")) == ((2, 2) if alone else (0, 1))


MARKUP = "<b>*a*</b> `c` [d](e) |f| _g_ h_i \\ $j$ &amp; ~k~"
ESCAPED = r"\<b\>\*a\*\</b\> \`c\` \[d\](e) \|f\| \_g\_ h_i \\ \$j\$ \&amp; \~k\~"


def test_markup_in_records_is_escaped(tmp_path, capsys):
    runs = []
    for strategy in ("baseline", "full", "<i>"):
        for adapter in ("none", "<script>|"):
            fields = {"model": MARKUP, "config": {"adapter": [adapter]}}
            runs.append(record(strategy, scores={"d|e": 0.5, "fr": 0.7}, **fields))
    code, out, err = main(capsys, write(tmp_path / "runs *", *runs))
    assert (code, err.count("\n")) == (0, 1)
    assert f"| {ESCAPED} |" in out and r"d\|e" in out and r"| \<i\> " in out
    assert r"adapter \<script\>\|" in out and r"/runs \*" in out
    for plain in (MARKUP, "<script>", "<i>", "d|e"):
        assert plain not in out
    rows = [line for line in out.splitlines() if line.startswith((r"| d\|e ", "| fr "))]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1  # `d|e` is one cell


def test_markup_in_records_is_escaped_beside_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [record(one, model="$a_b$ ![c](d)") for one in ("baseline", "full")]
    _, out, err = main(capsys, write(tmp_path, *runs), "--write", tmp_path / "report.md")
    assert not err and r"![PoS accuracy, \$a_b\$ !\[c\](d): change" in out


def test_control_characters_in_records_are_shown_as_escapes(tmp_path, capsys):
    folder = write(tmp_path, record(model="\x1b[31m\nred\u202e"), record(config={"lr": "\r1"}))
    folder = folder.rename(tmp_path.with_name(f"{tmp_path.name}\x1b"))
    (folder / "half\n\x1b.json").write_text("{", "utf-8")
    write(folder, record(seed=1, model="\x07"), record(seed=1, model="\x07", scores={"de": 0.1}))
    _, out, err = main(capsys, folder)
    assert r"| \\x1b\[31m\\nred\\u202e |" in out and r"lr \\r1" in out
    assert r"half\n\x1b.json" in err and "scores differ" in err
    assert all(line.isprintable() for line in (out + err).splitlines())


def test_nothing_to_report_is_a_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        code, out, err = main(capsys, path)
        assert (code, out, err.count("\n")) == (2, "", 1) and path.name in err
    code, out, err = main(capsys, write(tmp_path / "runs", record()), tmp_path / "missing")
    assert code == 2 and "PoS accuracy" in out and "missing" in err


def test_only_write_touches_the_disk_and_it_writes_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [record(s, n, probe=WORDS, losses=LOSSES) for s in STRATEGIES for n in (1, 2)]
    folder, written = write(tmp_path / "runs", *runs), []
    command = [sys.executable, str(ROOT / "results/report.py"), str(folder)]
    for where in ("a", "b"):
        here = tmp_path / where
        here.mkdir()
        if where == "a":
            silent = subprocess.run(command, cwd=here, capture_output=True, check=True)
            assert not list(here.iterdir())
        done = subprocess.run(
            [*command, "--write", "README.md"], cwd=here, capture_output=True, check=True
        )
        assert (
            re.sub(rb"!\[.*\n\n?", b"", done.stdout).strip() == silent.stdout.strip()
            and not done.stderr
        )
        text = (here / "README.md").read_text("utf-8")
        assert text.startswith("# Made by `python ") and "--write README.md" in text.splitlines()[0]
        links = re.findall(r"\]\(figures/([\w.-]+\.svg)\)", text)
        assert (
            sorted(links) == sorted(path.name for path in (here / "figures").iterdir())
            and len(links) == 4
        )
        written.append([text, *((here / "figures" / link).read_bytes() for link in links)])
    assert written[0] == written[1]


def test_figures_of_earlier_reports_are_removed_and_nothing_else(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    one, two = (write(tmp_path / name, record("baseline"), record()) for name in ("one", "two"))
    figures = tmp_path / "figures"
    main(capsys, one, two, "--write", tmp_path / "a.md")
    main(capsys, two, "--write", tmp_path / "b.md")
    (figures / "mine.svg").write_text("<svg/>")
    assert len(list(figures.iterdir())) == 3
    main(capsys, one, "--write", tmp_path / "a.md")
    assert len(list(figures.iterdir())) == 3  # b.md shows the other
    main(capsys, one, "--write", tmp_path / "b.md")
    assert {path.name for path in figures.iterdir()} == {
        "mine.svg",
        "one-pos-before-dictionary-accuracy.svg",
    }


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    code, _, err = main(
        capsys,
        write(tmp_path / "runs", record("baseline"), record()),
        "--write",
        tmp_path / "README.md",
    )
    assert (code, err) == (0, ADVICE)
    assert (
        "![" not in (tmp_path / "README.md").read_text("utf-8")
        and not (tmp_path / "figures").exists()
    )


@pytest.mark.parametrize("matplotlib", [True, False])
def test_a_report_that_cannot_be_written_is_one_error(tmp_path, capsys, monkeypatch, matplotlib):
    if not matplotlib:
        monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    code, _, err = main(
        capsys, write(tmp_path / "runs", record()), "--write", tmp_path / "no" / "README.md"
    )
    assert code == 2 and "cannot write" in err and err.count("\n") == 1


def test_only_earlier_reports_are_overwritten(tmp_path, capsys):
    runs = write(tmp_path / "runs", record())
    page = tmp_path / "README.md"
    for _ in range(2):
        assert main(capsys, runs, "--write", page)[0] == 0
    mine, empty, folder = tmp_path / "mine.md", tmp_path / "empty.md", tmp_path / "folder"
    mine.write_text("# Mine\n\n" + page.read_text("utf-8"), "utf-8")
    empty.touch()
    folder.mkdir()
    before = mine.read_bytes()
    for path in (mine, empty, folder, Path("/dev/null")):
        code, out, err = main(capsys, runs, "--write", path)
        assert (code, out, err.count("\n")) == (2, "", 1) and f"cannot write {path}" in err
    assert mine.read_bytes() == before and not empty.read_bytes() and Path("/dev/null").exists()


def test_a_report_is_complete_or_unchanged(tmp_path, capsys, monkeypatch):
    runs, page = write(tmp_path / "runs", record()), tmp_path / "README.md"
    main(capsys, runs, "--write", page)
    before = page.read_bytes()
    write(runs, record(seed=42))

    def fail(*_):
        raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr(Path, "replace", fail)
    code, _, err = main(capsys, runs, "--write", page)
    assert code == 2 and "No space left" in err and page.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "README.md", "figures"}
