"""What the report says must follow from the records: every cell recomputed apart, the paper's numbers, bad input."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import report

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "results" / "paper.csv"


def record(strategy="full", seed=31, scores=None, **fields) -> dict:
    """A record as alignfreeze.py writes it; config={...} adds to the flags."""
    alone = strategy == "baseline"
    config = {"strategy": strategy, "seed": seed, "lr": 5e-5, "realign_steps": 300, "layer": -2, "out": f"o{seed}"}
    one = {"model": "e5-small", "task": "udpos", "strategy": strategy, "schedule": "none" if alone else "before"}
    one |= {"aligner": "none" if alone else "dictionary", "seed": seed, "config": config | fields.pop("config", {})}
    scores = scores or {"en": 0.9, "de": 0.8, "fr": 0.7}
    return one | {"scores": {lang: {"accuracy": value} for lang, value in scores.items()}} | fields


def write(folder: Path, *records: dict) -> Path:
    """The records as files of a folder."""
    folder.mkdir(exist_ok=True)
    for i, one in enumerate(records):
        (folder / f"{len(list(folder.iterdir()))}_{i}.json").write_text(json.dumps(one), "utf-8")
    return folder


def tables(text: str) -> dict[str, dict[tuple[str, str], str]]:
    """Cells of the report: {heading: {(row, column): text}}."""
    found, heading, head = {}, "", None
    for line in text.splitlines():
        if line.startswith("#"):
            section = line[3:] if line.startswith("## ") else heading.split(" > ")[0]
            heading, head = (section if line.startswith("## ") else f"{section} > {line[4:]}"), None
        elif line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if head is None:
                head = cells
            elif not set(cells[0]) <= {"-"} or not cells[0]:
                found.setdefault(heading, {}).update(
                    {(cells[0], h): c for h, c in zip(head[1:], cells[1:], strict=True)}
                )
        else:
            head = None
    return found


@pytest.fixture(scope="module")
def published() -> dict:
    """All tables of the report over paper.csv alone, and its text."""
    done = subprocess.run(
        [sys.executable, "results/report.py", "results/paper.csv"], cwd=ROOT, capture_output=True, check=True
    )
    assert not done.stderr
    text = done.stdout.decode()
    return tables(text) | {"text": text}


def test_the_twelve_published_pos_averages(published):
    expected = {
        "distilbert-base-multilingual-cased": ["73.8 ± 0.6", "77.7 ± 0.3", "77.3 ± 0.2", "77.5 ± 0.1"],
        "bert-base-multilingual-cased": ["77.0 ± 0.6", "79.6 ± 0.4", "79.2 ± 0.2", "79.3 ± 0.4"],
        "xlm-roberta-base": ["80.9 ± 0.1", "81.3 ± 0.1", "81.7 ± 0.2", "80.9 ± 0.2"],
    }
    for model, cells in expected.items():
        table = published[f"Averages > {model}, udpos: accuracy"]
        for strategy, cell in zip(report.STRATEGIES, cells, strict=True):
            assert table["before, dictionary", strategy].startswith(cell), (model, strategy)


def test_the_headline_follows_from_the_file(published):
    table = published["Averages > xlm-roberta-base, udpos: accuracy"]
    assert table["before, dictionary", "full"].endswith(" 9/1")
    assert table["before, dictionary", "front"].endswith(" 16/0")
    line = next(
        li
        for li in published["text"].split("### xlm-roberta-base, udpos: accuracy")[1].splitlines()
        if "- before, dict" in li
    )
    assert "languages up, front against full: +7" in line


def test_every_cell_of_the_paper_recomputed(published):
    pandas = pytest.importorskip("pandas")
    data = pandas.read_csv(PAPER, keep_default_na=False)
    data["value"] *= 100
    runs = ["model", "task", "metric", "schedule", "aligner", "strategy"]
    targets = data[data.language != "en"]
    average = targets.groupby([*runs, "seed"]).value.mean().groupby(level=runs).agg(["mean", "std"])
    cells = data.groupby([*runs, "language"]).value.agg(["mean", "std"])
    checked = 0

    def expected(score, base) -> str:
        change = score["mean"] - base["mean"]
        beyond = abs(change) > max(score["std"], base["std"])
        sign = ("▲" if change > 0 else "▼") if beyond else "·"
        return f"{score['mean']:.1f} ± {score['std']:.1f} {change:+.1f} {sign}".replace("-0.0", "+0.0")

    def same(text: str, wanted: str) -> None:
        nonlocal checked
        assert " ".join(text.split()) == wanted
        checked += 1

    for model, task, metric, schedule, aligner, strategy in average.index:
        if strategy == "baseline":
            continue
        base = (model, task, metric, "none", "none", "baseline")
        this = (model, task, metric, schedule, aligner, strategy)
        label, ups = f"{schedule}, {aligner}", [0, 0]
        table = published[f"Language by language > {model}, {task}, {label}: {metric}"]
        for language in cells.loc[this].index:
            score, start = cells.loc[(*this, language)], cells.loc[(*base, language)]
            same(table[language, strategy], expected(score, start))
            same(table[language, "baseline"], f"{start['mean']:.1f} ± {start['std']:.1f}")
            if language != "en" and abs(score["mean"] - start["mean"]) > max(score["std"], start["std"]):
                ups[int(score["mean"] < start["mean"])] += 1
        wanted = f"{expected(average.loc[this], average.loc[base])} {ups[0]}/{ups[1]}"
        same(table["average", strategy], wanted)
        same(published[f"Averages > {model}, {task}: {metric}"][label, strategy], wanted)
    assert checked > 4000


def test_paper_csv_is_complete_and_plain():
    lines = PAPER.read_text("utf-8").splitlines()
    assert lines[0] == "model,task,strategy,schedule,aligner,seed,language,metric,value"
    assert len(lines) == 13246 and not any("#" in line or ",," in line for line in lines)


def main(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, screen and errors of the report."""
    try:
        code = report.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_random_records_recomputed(tmp_path, capsys):
    numpy = pytest.importorskip("numpy")
    rng = random.Random(0)
    runs = {
        (s, n): {lang: rng.random() for lang in ("en", "de", "fr", "zh")}
        for s in ("baseline", "emb,0-2")
        for n in (1, 2, 3)
    }
    write(tmp_path, *(record(s, n, scores) for (s, n), scores in runs.items()))
    code, out, _ = main(capsys, tmp_path)
    table = tables(out)["Language by language > e5-small, udpos, before, dictionary: accuracy"]
    assert code == 0
    for strategy in ("baseline", "emb,0-2"):
        for lang in ("en", "de", "fr", "zh"):
            values = [100 * runs[strategy, n][lang] for n in (1, 2, 3)]
            assert table[lang, strategy].startswith(f"{numpy.mean(values):.1f} ± {numpy.std(values, ddof=1):.1f}")
        values = [100 * numpy.mean([runs[strategy, n][lang] for lang in ("de", "fr", "zh")]) for n in (1, 2, 3)]
        assert table["average", strategy].startswith(f"{numpy.mean(values):.1f} ± {numpy.std(values, ddof=1):.1f}")


def test_a_change_counts_only_beyond_the_larger_deviation():
    assert report.mark((82.0, 0.5), (81.0, 0.9)) == "▲"
    assert report.mark((80.0, 0.5), (81.0, 0.9)) == "▼"
    assert report.mark((82.0, 0.5), (81.0, 1.0)) == "·" == report.mark((82.0, 1.0), (81.0, 0.5))
    assert report.mark((82.0, None), (81.0, 0.5)) == ""


def test_one_seed_has_no_deviation(tmp_path, capsys):
    _, out, _ = main(
        capsys, write(tmp_path, record("baseline"), record("full", scores={"en": 0.9, "de": 0.9, "fr": 0.7}))
    )
    assert "1 seed: no deviation" in out and "±" not in out.split("###", 1)[1] and "▲" not in out.split("###", 1)[1]
    assert "80.0  +5.0" in out  # the average of 90 and 70, against 75
    assert max(len(line) for line in out.splitlines() if line[:1] == "|") <= 80


def test_other_settings_other_table(tmp_path, capsys):
    quick = {"realign_steps": 100}
    folder = write(tmp_path, record("baseline", config=quick), record(), record(config=quick, scores={"de": 0.5}))
    write(
        folder,
        record("full", 42, config={"lr": 1e-5}),
        record("front", 42, config={"device": "cuda", "overwrite": True}),
    )
    _, out, err = main(capsys, folder)
    table = tables(out)["Averages > e5-small, udpos: accuracy"]
    rows = {row for row, _ in table}
    assert rows == {
        f"before, dictionary, lr {lr}, realign_steps {n}" for lr, n in (("5e-05", 300), ("5e-05", 100), ("1e-05", 300))
    }
    assert (
        table["before, dictionary, lr 5e-05, realign_steps 300", "baseline"] == "75.0"
    )  # whose own realign_steps are idle
    assert table["before, dictionary, lr 5e-05, realign_steps 300", "front"] == "75.0  +0.0"
    assert table["before, dictionary, lr 1e-05, realign_steps 300", "full"] == "75.0" and not err


def test_averages_use_only_languages_that_all_runs_have(tmp_path, capsys):
    folder = write(tmp_path, *(record(s, n) for s in ("baseline", "full") for n in (1, 2)), record("front", 1))
    write(folder, record("front", 2, scores={"en": 0.9, "de": 0.6}), record("back", 1))
    _, out, _ = main(capsys, folder)
    table = tables(out)["Averages > e5-small, udpos: accuracy"]
    assert table["before, dictionary", "baseline"] == "80.0 ± 0.0"  # German alone
    assert "1 of 2 languages in all runs; front lacks 1 of 4 scores; back lacks 2 of 4 scores; 1 seed" in out


def test_a_record_read_twice_counts_once_and_a_contradiction_is_named(tmp_path, capsys):
    folder = write(tmp_path / "a", record(seed=1), record(seed=2))
    _, once, _ = main(capsys, folder)
    _, twice, err = main(capsys, folder, folder)
    assert once == twice and not err
    _, out, err = main(capsys, folder, write(tmp_path / "b", record(seed=1, scores={"de": 0.1})))
    assert out == once and err.count("\n") == 1 and "other scores" in err


BAD = {
    "half.json": '{"model": "e5-small", "task"',
    "list.json": "[1, 2]",
    "foreign.json": '{"name": "package", "scores": 3}',
    "percent.json": json.dumps(record(scores={"de": 86.0})),
    "nan.json": json.dumps(record(scores={"de": float("nan")})),
    "text.json": json.dumps(record(scores={"de": "0.5"})),
    "seed.json": json.dumps(record() | {"seed": "31"}),
    "empty.json": "",
    "deep.json": "[" * 100_000,
    "bytes.json": b"\xff\xfe\x00",
    "probe.json": json.dumps(record() | {"probe": {"retrieval": {"before": {"de": 3}}}}),
    "none.csv": "a,b\n1,2\n",
    "value.csv": "model,task,strategy,schedule,aligner,seed,language,metric,value\nm,t,full,before,x,1,de,f1,0,85\n",
    "short.csv": "model,task,strategy,schedule,aligner,seed,language,metric,value\nm,t,full,before,x,1,de,f1\n",
    "word.csv": "model,task,strategy,schedule,aligner,seed,language,metric,value\nm,t,full,before,x,one,de,f1,0.5\n",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_the_rest_reported(name, tmp_path, capsys):
    folder = write(tmp_path / "runs", record())
    bad = folder / name
    bad.write_bytes(BAD[name] if isinstance(BAD[name], bytes) else BAD[name].encode())
    paths = [folder, bad] if name.endswith(".csv") else [folder]
    code, out, err = main(capsys, *paths)
    assert "e5-small, udpos" in out and name in err.splitlines()[0] and "Traceback" not in err
    assert (code, err.count("\n")) == ((2, 2) if name.endswith(".csv") else (0, 1))
    if name in ("value.csv", "word.csv", "short.csv"):
        assert "line 2" in err


def test_nothing_to_report_is_a_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        code, out, err = main(capsys, path)
        assert (code, out, err.count("\n")) == (2, "", 1) and path.name in err
    code, out, err = main(capsys, write(tmp_path / "runs", record()), tmp_path / "missing")
    assert code == 2 and "e5-small" in out and "missing" in err


def published_runs(strategies, shift, metric="accuracy", task="udpos"):
    """Own records made of the paper's XLM-R runs: its scores plus shift(strategy, language)."""
    for run in merged(report.read(PAPER)).values():
        kept = (
            run["strategy"] in strategies and run["schedule"] != "during" and run["aligner"] in ("none", "dictionary")
        )
        if kept and (run["model"], run["task"]) == ("xlm-roberta-base", task):
            scores = {}
            for (lang, name), value in run["scores"].items():
                if name == metric:
                    scores[lang] = {metric: value + shift(run["strategy"], lang)}
            yield {field: run[field] for field in report.RUN} | {"config": {}, "scores": scores}


def merged(runs):
    """One run of the one-score runs of a CSV file."""
    whole = {}
    for run in runs:
        key = tuple(run[field] for field in report.RUN)
        whole.setdefault(key, run | {"scores": {}})["scores"].update(run["scores"])
    return whole


def test_own_runs_stand_beside_the_published(tmp_path, capsys):
    shift = {"full": 0.01, "front": -0.02}
    write(tmp_path, *published_runs(report.STRATEGIES, lambda strategy, lang: shift.get(strategy, 0.0)))
    _, out, err = main(capsys, tmp_path)
    beside = out.split("## Own and published")[1]
    table = tables(out)["Own and published > xlm-roberta-base, udpos, before, dictionary: accuracy"]
    assert not err and len({row for row, _ in table}) == 36
    assert re.fullmatch(r"82\.\d  \+1\.0 \(\+\d+\.\d sd\)", table["average", "full"])
    assert re.fullmatch(r"79\.\d  -2\.0 \(-\d+\.\d sd\)", table["average", "front"])
    assert table["de", "baseline"].endswith("+0.0 (+0.0 sd)")
    assert "best average: front in the paper, full here (differs)" in beside
    assert "full: 9 up 1 down in the paper" in beside and "front: 16 up 0 down in the paper" in beside


def test_own_f1_of_qa_is_compared_in_the_authors_variant(tmp_path, capsys):
    both = list(published_runs(report.STRATEGIES, lambda strategy, lang: 0.0, "f1", "xquad"))
    _, out, _ = main(capsys, write(tmp_path / "official", *both))
    assert "No f1_authors in the own records" in out
    for one in both:
        one["scores"] = {lang: {"f1": 0.5, "f1_authors": m["f1"]} for lang, m in one["scores"].items()}
    _, out, _ = main(capsys, write(tmp_path / "both", *both))
    table = tables(out)["Own and published > xlm-roberta-base, xquad, before, dictionary: f1"]
    assert set(tables(out)) >= {
        "Averages > xlm-roberta-base, xquad: f1"
    } and "Averages > xlm-roberta-base, xquad: f1_authors" not in tables(out)
    assert len(table) == 13 * 4


PROBE = {
    "retrieval": {
        stage: {"de": [0.1, 0.2, 0.5], "fr": [0.3, 0.4, 0.7]} for stage in ("before", "realigned", "finetuned")
    },
    "drift": {"realigned": {"0": 0.0, "1": 0.02, "emb": 0.001}, "finetuned": {"0": 0.1, "1": 0.2, "emb": 0.3}},
}


def test_the_probe_is_a_table_layer_by_layer(tmp_path, capsys):
    _, out, _ = main(capsys, write(tmp_path, record("baseline"), record("front", probe=PROBE), record("full")))
    found = tables(out)
    name = "Layer by layer > e5-small, udpos, before, dictionary: layers, "
    assert found[f"{name}retrieval before, %"] == {("emb", "front"): "20", ("0", "front"): "30", ("1", "front"): "60"}
    assert found[f"{name}drift realigned, %"] == {("emb", "front"): "0.1", ("0", "front"): "0", ("1", "front"): "2"}
    assert found["Averages > e5-small, udpos: accuracy"]["before, dictionary", "front"] == "75.0  +0.0"
    assert not any("retrieval" in heading for heading in found if heading.startswith("Averages"))


def test_more_than_four_strategies_go_on_in_further_tables(tmp_path, capsys):
    specs = ["baseline", "full", "front", "back", *(f"emb,0-{i}" for i in range(4))]
    _, out, _ = main(capsys, write(tmp_path, *(record(s, n) for s in specs for n in (1, 2))))
    table = tables(out)["Language by language > e5-small, udpos, before, dictionary: accuracy"]
    assert {column for _, column in table} == set(specs)
    assert max(len(line) for line in out.splitlines() if line[:1] == "|") <= 120


def test_only_write_touches_the_disk_and_it_writes_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write(tmp_path / "runs", *(record(s, n, probe=PROBE) for s in report.STRATEGIES for n in (1, 2)))
    for where in ("a", "b"):
        (tmp_path / where).mkdir()
        command = [sys.executable, str(ROOT / "results/report.py"), str(folder)]
        silent = subprocess.run(command, cwd=tmp_path / where, capture_output=True, check=True)
        assert not list((tmp_path / where).iterdir())
        done = subprocess.run([*command, "--write", "README.md"], cwd=tmp_path / where, capture_output=True, check=True)
        assert re.sub(rb"!\[.*\n\n?", b"", done.stdout).strip() == silent.stdout.strip() and not done.stderr
        text = (tmp_path / where / "README.md").read_text("utf-8")
        assert text.startswith("# Made by `python ") and "--write README.md" in text.splitlines()[0]
        links = re.findall(r"\]\((figures/[\w.-]+\.svg)\)", text)
        assert len(links) == 2 and all(
            (tmp_path / where / link).read_text("utf-8").count("<svg") == 1 for link in links
        )
    for link in links:
        assert (tmp_path / "a" / link).read_bytes() == (tmp_path / "b" / link).read_bytes()
    assert (tmp_path / "a/README.md").read_text("utf-8") == (tmp_path / "b/README.md").read_text("utf-8")


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    code, _, err = main(capsys, write(tmp_path / "runs", record()), "--write", tmp_path / "README.md")
    assert code == 0 and err == "no figures without matplotlib: pip install matplotlib\n"
    assert "![" not in (tmp_path / "README.md").read_text("utf-8") and not (tmp_path / "figures").exists()


def test_a_report_that_cannot_be_written_is_one_error(tmp_path, capsys):
    code, _, err = main(capsys, write(tmp_path / "runs", record()), "--write", tmp_path / "no" / "README.md")
    assert code == 2 and "cannot write" in err and "Traceback" not in err
