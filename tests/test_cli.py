"""The command line: what a run leaves behind, that it survives, and that whatever is wrong ends in one clear line."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import alignfreeze

SCRIPT = Path(alignfreeze.__file__)
ARCHITECTURES = ("distilbert", "bert", "xlmr")
STRATEGIES = {"distilbert": "emb,0-1", "bert": "front", "xlmr": "baseline"}
PLACES = {
    "out",
    "overwrite",
    "device",
    "save_model",
    "write_links",
}  # where things go: no part of the result
STAGE = re.compile(r"^(realign|fine-tune)\b", re.MULTILINE)  # how the line of a training stage begins
LANGUAGES = ["qaa", "qab"]
STEPS, EXAMPLES, BATCH = 2, 40, 32


class Result(NamedTuple):
    """What a start of the program came to."""

    code: int
    out: str
    err: str


def flags(world: Path, model: str = "bert", *more: object, data: Path | None = None) -> list[str]:
    """The command line of a toy run of a second; a flag in `more` overrides the one here."""
    more = [*map(str, more)]
    steps = [] if {"baseline", "during", "alternate"} & {*more} else ["--realign-steps", str(STEPS)]
    return [
        *("--model", str(world / "models" / model), "--data-dir", str(data or world / "data")),
        *("--device", "cpu", "--languages", *LANGUAGES, "--realign-languages", *LANGUAGES),
        *("--epochs", "1", "--batch-size", str(BATCH), *steps, "--limit-train", str(EXAMPLES)),
        *("--limit-test", "20", "--limit-links", "300", "--precision", "fp32", *more),
    ]


def start(argv: list, out: Path, script: Path = SCRIPT, **environment: str) -> subprocess.Popen:
    """The program as a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    command = [sys.executable, script, *argv, "--out", out]
    return subprocess.Popen([*map(str, command)], env=os.environ | environment, text=True, **pipes)


def finish(process: subprocess.Popen, seconds: float = 120) -> Result:
    out, err = process.communicate(timeout=seconds)
    return Result(process.returncode, out, err)


@pytest.fixture
def cli(capsys, tmp_path):
    """Call `main` in this process with records going to a folder of the test's own; returns Result."""

    def call(argv: list, out: Path = tmp_path / "out") -> Result:
        capsys.readouterr()
        code = alignfreeze.main([*map(str, argv), "--out", str(out)])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def untouched(monkeypatch):
    """In a test with this, neither weights nor data may be read."""

    def read(*_, **__):
        raise AssertionError("read before the flags were checked")

    for name in ("load_model", "load_data", "read_lines", "realign", "finetune"):
        monkeypatch.setattr(alignfreeze, name, read)


def records(folder: Path) -> dict[str, dict]:
    """The records of a folder by file name; every one must be whole."""
    return {path.name: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


def only_record(folder: Path) -> dict:
    (record,) = records(folder).values()
    return record


def but_seconds(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "seconds"}


def strings(value: object) -> list[str]:
    """Every string in a record, keys included."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def table(text: str) -> dict[str, float]:
    """The table at the end of a run: {language, or "average": percent of the first metric}."""
    heading = re.search(r"^percent\n.*$", text, re.MULTILINE)
    rows = re.findall(r"^(\S+) +([\d.]+)\b", text[heading.end() :], re.MULTILINE)
    return {code: float(score) for code, score in rows}


def assert_refused(result: Result, *named: str, folder: Path | None = None) -> None:
    """Exit code 2 and one line that names what is wrong; nothing trained, no record."""
    assert result.code == 2
    assert_one_line(result.err, *named)
    assert not STAGE.search(result.out), "refused only after training"
    assert folder is None or not list(folder.glob("*.json"))


def assert_one_line(err: str, *named: str) -> None:
    assert err.startswith("alignfreeze:") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    for name in named:
        assert name in err, err


# ---------------------------------------------------------------------------- what a run leaves behind


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_a_run_prints_its_table_and_writes_its_record(world, cli, tmp_path, model):
    began, strategy = time.time(), STRATEGIES[model]
    result = cli(flags(world, model, "--strategy", strategy, "--seed", 42))
    took = time.time() - began
    assert result.code == 0 and result.err == ""
    name, record = next(iter(records(tmp_path / "out").items()))

    alone = strategy == "baseline"
    schedule, aligner = ("none", "none") if alone else ("before", "dictionary")
    assert re.fullmatch(f"{model}_udpos_{strategy}_{schedule}_{aligner}_42-[0-9a-f]{{6}}.json", name)
    assert f"record: {tmp_path / 'out' / name}\n" in result.out

    identity = {"model": model, "task": "udpos", "strategy": strategy, "schedule": schedule}
    identity |= {"aligner": aligner, "seed": 42}
    rest = {"scores", "config", "steps", "seconds", "losses", "pairs", "versions", "device"}
    assert set(record) == identity.keys() | rest | {"threads", "processes"}
    assert {key: record[key] for key in identity} == identity

    config = record["config"]
    assert set(config) == set(vars(alignfreeze.parse_args([]))) - PLACES - {"defaults"} | {"fingerprint"}
    expected = {"languages": LANGUAGES, "epochs": 1, "batch_size": BATCH, "lr": 2e-5, "max_length": 96}
    expected |= {"precision": "fp32", "data_dir": "data", "limit_train": EXAMPLES, "limit_test": 20}
    expected |= {"method": "alignfreeze", "adapter": [], "train_languages": ["en"], **identity}
    paired = {
        "realign_languages": LANGUAGES,
        "realign_steps": STEPS,
        "realign_batch_size": 16,
        "layer": -2,
    }
    paired |= {"realign_lr": 2e-5, "temperature": 0.1, "realign_max_length": 96, "unit": "word"}
    expected |= dict.fromkeys(paired) if alone else paired
    expected |= dict.fromkeys(("aligner_model", "aligner_layer", "lora_alpha", "lora_dropout"))
    assert {key: config[key] for key in expected} == expected
    assert re.fullmatch("[0-9a-f]{8}", config["fingerprint"])

    assert list(record["scores"]) == ["en", *LANGUAGES]
    assert all(0 <= score["accuracy"] <= 1 and len(score) == 1 for score in record["scores"].values())
    updates = math.ceil(EXAMPLES / BATCH)
    assert record["steps"] == {"finetune": updates} | ({} if alone else {"realign": STEPS})
    assert set(record["losses"]) == {"finetune"} | (set() if alone else {"realign"})
    stages = {"data", "model", "pairs", "finetune", "evaluate"} | (set() if alone else {"realign"})
    assert set(record["seconds"]) == stages
    assert 0 <= sum(record["seconds"].values()) < took + 0.1 * len(stages)
    assert set(record["pairs"]) == (set() if alone else set(LANGUAGES))
    for counts in record["pairs"].values():
        assert counts["words"] > counts["sentences"] == STEPS * 16 / len(LANGUAGES)
    assert set(record["versions"]) == {"python", "torch", "transformers", "datasets", "alignfreeze.py"}
    assert record["versions"]["alignfreeze.py"] == alignfreeze.SCRIPT
    assert (record["device"], record["processes"]) == ("cpu", 1)
    assert record["threads"] == torch.get_num_threads()
    assert not [text for text in strings(record) if os.sep in text]

    scores = {code: 100 * metrics["accuracy"] for code, metrics in record["scores"].items()}
    scores["average"] = sum(scores[code] for code in LANGUAGES) / len(LANGUAGES)  # without English
    assert table(result.out) == {code: pytest.approx(score, abs=0.051) for code, score in scores.items()}
    assert bool(re.search("^realign", result.out, re.MULTILINE)) == (not alone)
    assert ("aligned 32 sentence pairs with" in result.out) == (not alone)


def test_a_run_without_targets_scores_english_only(world, cli, tmp_path):
    result = cli(flags(world, "bert", "--strategy", "baseline", "--languages", "en"))
    scores = only_record(tmp_path / "out")["scores"]
    assert result.code == 0 and set(scores) == {"en"} == set(table(result.out))


def test_realignment_takes_as_many_steps_as_fine_tuning_unless_told(world, cli, tmp_path):
    argv = flags(world, "bert", "--epochs", 2)
    at = argv.index("--realign-steps")
    assert cli(argv[:at] + argv[at + 2 :]).code == 0
    assert only_record(tmp_path / "out")["steps"] == {"finetune": 4, "realign": 4}


@pytest.mark.parametrize("schedule, sentences", [("during", 2 * 16), ("alternate", 2 * 16)])
def test_the_other_schedules_take_the_steps_of_fine_tuning(world, cli, tmp_path, schedule, sentences):
    assert cli(flags(world, "bert", "--schedule", schedule)).code == 0
    record = only_record(tmp_path / "out")
    alternates = schedule == "alternate"
    assert record["steps"] == ({"finetune": 4} if alternates else {"finetune": 2, "realign": 2})
    assert set(record["losses"]) == ({"task", "align"} if alternates else {"finetune"})
    assert sum(counts["sentences"] for counts in record["pairs"].values()) == sentences
    assert record["config"]["realign_steps"] is record["config"]["realign_lr"] is None


def test_a_seed_decides_everything_but_the_time(world, cli, tmp_path):
    found = {}
    for folder, seed in (("first", 31), ("second", 31), ("third", 42)):
        assert cli(flags(world, "xlmr", "--seed", seed), tmp_path / folder).code == 0
        found[folder] = but_seconds(only_record(tmp_path / folder))
    assert found["first"] == found["second"]
    assert found["first"]["losses"] != found["third"]["losses"]


# ------------------------------------------------------------------------------- help and defaults


def shown_help(capsys, *argv: str) -> dict[str, str]:
    """{flag: what the help says of it}, blanks left out, for lines are broken anywhere."""
    with pytest.raises(SystemExit) as end:
        alignfreeze.main([*argv, "--help"])
    assert end.value.code == 0
    entries = re.split(r"\n  --", capsys.readouterr().out.split("options:")[1])[1:]
    return {re.match(r"[a-z-]+", entry)[0]: "".join(entry.split()) for entry in entries}


def test_help_lists_every_flag_with_its_default(capsys):
    said, args = shown_help(capsys), vars(alignfreeze.parse_args([]))
    assert set(said) == {name.replace("_", "-") for name in args} - {"defaults"}
    assert set(said) == {row[0] for rows in alignfreeze.FLAGS.values() for row in rows} | {
        "method",
        "model",
        "task",
    }
    for flag, entry in said.items():
        value = args[flag.replace("-", "_")]
        if value not in (None, False, []) and not isinstance(value, list):
            assert f"(default:{value})" in entry, flag


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--task xnli", {"epochs": 2, "max-length": 96, "lr": "2e-05"}),
        ("--model xlm-roberta-base", {"lr": "7.5e-06", "realign-lr": "7.5e-06"}),
        (
            "--method mid-align",
            {"lora": 8, "lr": 0.0005, "task": "massive", "unit": "sentence", "layer": 16},
        ),
        ("--method mid-align --model Qwen/Qwen2.5-7B-Instruct", {"temperature": 1.5}),
    ],
)
def test_help_shows_the_defaults_of_what_is_chosen(capsys, argv, expected):
    said = shown_help(capsys, *argv.split())
    for flag, value in expected.items():
        assert f"(default:{value})" in said[flag]


FIRST = {"task": "udpos", "strategy": "front", "schedule": "before", "aligner": "dictionary", "seed": 31}
FIRST |= {
    "epochs": 5,
    "batch_size": 32,
    "lr": 2e-5,
    "max_length": 96,
    "syntactic_words": False,
    "lora": 0,
}
FIRST |= {"realign_steps": None, "realign_batch_size": 16, "layer": -2, "temperature": 0.1, "clip": 0.0}
FIRST |= {"unit": "word", "warmup": 0.1, "accumulate": 1, "decay": "linear", "realign_decay": "constant"}
SECOND = {"task": "massive", "strategy": "full", "schedule": "alternate", "unit": "sentence", "lora": 8}
SECOND |= {
    "lora_alpha": 16,
    "layer": 16,
    "lr": 5e-4,
    "batch_size": 32,
    "accumulate": 4,
    "seed": 1,
    "epochs": 5,
}
SECOND |= {
    "realign_batch_size": 32,
    "warmup": 0.03,
    "clip": 1.0,
    "temperature": 0.1,
    "decay": "inverse_sqrt",
}


@pytest.mark.parametrize(
    "argv, paper",
    [
        ("", FIRST | {"model": "distilbert-base-multilingual-cased"}),
        ("--model bert-base-multilingual-cased", FIRST),
        ("--model some/other-encoder", FIRST),
        ("--model FacebookAI/xlm-roberta-base", FIRST | {"lr": 7.5e-6, "realign_lr": 7.5e-6}),
        ("--task xnli", FIRST | {"task": "xnli", "epochs": 2}),
        ("--method mid-align", SECOND | {"model": "meta-llama/Meta-Llama-3-8B-Instruct"}),
        ("--method mid-align --model Qwen/Qwen2.5-7B-Instruct", SECOND | {"temperature": 1.5}),
    ],
)
def test_absent_flags_mean_the_papers_settings(argv, paper):
    args = alignfreeze.parse_args(argv.split())
    assert {key: getattr(args, key) for key in paper} == paper


def test_absent_languages_mean_the_papers_34():
    args = alignfreeze.parse_args([])
    codes = "af ar bg ca cs da de el es fa fi fr he hi hu it ja ko lt lv no pl pt ro ru sk sl sv ta th tr uk vi zh"
    assert sorted(args.languages) == sorted(args.realign_languages) == codes.split()


# ------------------------------------------------------------------------------------ names of records


@pytest.fixture
def name_of(monkeypatch):
    """The name of a command's record on a machine without fast bf16."""
    monkeypatch.setattr(alignfreeze, "fast_precision", lambda _: "fp32")

    def name(command: str) -> str:
        args = alignfreeze.parse_args(command.split())
        alignfreeze.settle(args)
        return alignfreeze.record_name(args)

    return name


def test_a_name_without_digits_is_a_run_of_nothing_but_defaults(name_of):
    plain = {
        "": "distilbert-base-multilingual-cased_udpos_front_before_dictionary_31",
        "--model FacebookAI/xlm-roberta-base --seed 42": "xlm-roberta-base_udpos_front_before_dictionary_42",
        "--task xnli --strategy emb,0-2": "distilbert-base-multilingual-cased_xnli_emb,0-2_before_dictionary_31",
        "--strategy baseline": "distilbert-base-multilingual-cased_udpos_baseline_none_none_31",
        "--epochs 5 --lr 2e-5 --precision fp32": "distilbert-base-multilingual-cased_udpos_front_before_dictionary_31",
        "--method mid-align": "Meta-Llama-3-8B-Instruct_massive_full_alternate_none_1",
        "--method mid-align --strategy baseline": "Meta-Llama-3-8B-Instruct_massive_baseline_none_none_1",
    }
    assert {command: name_of(command) for command in plain} == plain
    assert re.fullmatch(r"distilbert.*_31-[0-9a-f]{6}", name_of("--epochs 3"))


def other_value(kind: object, default: object) -> str:
    """A value of a flag that is not its default."""
    if isinstance(kind, tuple):
        return next(choice for choice in reversed(kind) if choice != default)
    if kind is str or kind is Path or isinstance(kind, list):
        return "other"
    for text in ("7", "0.25"):
        try:
            kind(text)
            return text
        except (ValueError, alignfreeze.argparse.ArgumentTypeError):
            pass
    raise AssertionError(kind)


BASES = ("--aligner awesome", "--method mid-align --strategy front", "--method mid-align --schedule before",
         "--strategy baseline", "--method mid-align --strategy baseline --probe", "--unit sentence",
         "--schedule alternate", "--model meta-llama/Meta-Llama-3-8B-Instruct --task massive --seed 1",
         "--model meta-llama/Meta-Llama-3-8B-Instruct --task massive --seed 1 --strategy baseline",
         "--method mid-align --strategy baseline --model m --task udpos --seed 31",
         "--strategy baseline --model m")  # fmt: skip


def test_two_different_runs_never_share_a_record(name_of):
    """Of each base, a run with each flag changed: whenever what `settle` leaves differs, the name does."""
    seen, flags_changed = {}, set()
    for base in ("", *BASES):
        defaults = vars(alignfreeze.parse_args(base.split()))
        for rows in alignfreeze.FLAGS.values():
            for flag, kind, _ in [("", bool, ""), *rows]:
                key = flag.replace("-", "_")
                value = "" if kind is bool else other_value(kind, defaults[key])
                command = f"{base} --{flag} {value}" if flag else base
                try:
                    args = alignfreeze.parse_args(command.split())
                    alignfreeze.settle(args)
                except alignfreeze.UserError:
                    continue  # a flag without effect here
                settings = json.dumps(alignfreeze.settings_of(args), sort_keys=True, default=str)
                other = seen.setdefault(alignfreeze.record_name(args), (settings, command))
                assert other[0] == settings, f"{command} and {other[1]} share a record"
                if settings != seen[name_of(base)][0]:
                    flags_changed.add(key)
    every = {row[0].replace("-", "_") for rows in alignfreeze.FLAGS.values() for row in rows}
    assert flags_changed == every - PLACES


def test_where_a_run_goes_and_what_does_not_matter_leave_its_name(name_of):
    for places in (
        "--out elsewhere",
        "--device cpu",
        "--overwrite",
        "--save-model encoder",
        "--write-links here",
    ):
        assert name_of(places) == name_of("")
    for unused in ("--schedule during", "--aligner links", "--realign-languages de", "--layer -1",
                   "--realign-batch-size 8", "--realign-lr 1e-4", "--temperature 0.2"):  # fmt: skip
        assert name_of(f"--strategy baseline {unused}") == name_of("--strategy baseline")


def test_long_names_fit_a_file_system_and_stay_different(name_of):
    codes = " ".join(alignfreeze.TARGETS[:-1])
    names = [name_of(f"--languages {codes} --realign-languages {codes} --epochs {n}") for n in (1, 2, 3)]
    assert len(set(names)) == 3 and max(len(name.encode()) for name in names) <= 250


# ------------------------------------------------------------------------------------------- surviving


def baseline(world: Path, *more: object, **options) -> list[str]:
    return flags(world, "bert", "--strategy", "baseline", "--languages", "qaa", *more, **options)


def test_a_run_whose_record_exists_is_skipped_unless_told(world, cli, tmp_path, monkeypatch):
    argv = baseline(world)
    cli(argv)
    (path,) = (tmp_path / "out").glob("*.json")
    before = json.loads(path.read_text("utf-8"))
    with monkeypatch.context() as patch:
        patch.setattr(alignfreeze, "build_model", None)
        again = cli(argv)
        assert again.code == 0 and f"{path} exists: nothing to do" in again.out
        assert "ANOTHER REVISION" not in again.out
        patch.setattr(alignfreeze, "SCRIPT", "0" * 64)
        assert "ANOTHER REVISION of alignfreeze.py made it" in cli(argv).out
    assert_refused(cli([*argv, "--save-model", tmp_path / "asked"]), "--overwrite")
    path.write_text(json.dumps(before | {"scores": "mine"}), "utf-8")
    assert "exists" in cli(argv).out and only_record(tmp_path / "out")["scores"] == "mine"
    assert cli([*argv, "--overwrite"]).code == 0
    assert but_seconds(only_record(tmp_path / "out")) == but_seconds(before)


@pytest.mark.parametrize("name", ["udpos/en/train.conllu", "parallel/en-qaa.tsv"])
def test_other_files_of_the_same_names_are_refused(world, cli, data, tmp_path, name):
    argv = baseline(world, data=data)
    assert cli(argv).code == 0
    (path,) = (tmp_path / "out").glob("*.json")
    kept = path.read_bytes()
    with (data / name).open("a") as file:
        file.write("\n")
    result = cli(argv)
    assert_refused(result, str(path), "other files of the same names")
    assert path.read_bytes() == kept


def test_a_file_that_is_no_whole_record_is_said_and_the_run_done_again(world, cli, tmp_path):
    argv = baseline(world)
    cli(argv)
    (path,) = (tmp_path / "out").glob("*.json")
    whole = path.read_bytes()
    for content in (b"", whole[:400], b"[1]", b'{"scores": {}}', b"\xff\xfe"):
        path.write_bytes(content)
        result = cli(argv)
        assert (
            result.code == 0
            and f"{path} is no whole record of a run: the run is done again" in result.out
        )
        assert but_seconds(only_record(tmp_path / "out")) == but_seconds(json.loads(whole))
    path.write_bytes(b"[" * 100_000)  # deeper than can be read
    assert cli(argv).code == 0
    path.unlink()
    os.mkfifo(path)  # and would be waited for
    assert_refused(cli(argv), str(path), "no plain file")
    path.unlink()
    path.mkdir()
    assert_refused(cli(argv), str(path), "a folder")


def test_a_killed_run_leaves_no_record_and_the_next_start_completes_it(world, cli, tmp_path):
    argv, out = flags(world, "bert", "--limit-train", 600), tmp_path / "out"
    process = start(argv, out)
    for line in process.stdout:
        if line.startswith("realign"):  # fine-tuning begins
            break
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert not list(out.iterdir())
    assert cli(argv).code == 0 and len(records(out)) == 1


def test_a_run_killed_while_it_writes_its_record_leaves_none(world, cli, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        cli(baseline(world))
    assert not list((tmp_path / "out").iterdir())


def test_a_record_that_cannot_be_written_is_named_and_leaves_nothing(world, cli, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = cli(baseline(world))
    assert result.code == 2 and not list((tmp_path / "out").iterdir())
    assert_one_line(result.err, f"cannot write {tmp_path / 'out'}", "No space left")


def test_an_interrupted_run_says_so_in_one_line(world, cli, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(alignfreeze, "finetune", interrupted)
    result = cli(baseline(world))
    assert result.code == 130 and not records(tmp_path / "out")
    assert_one_line(result.err, "interrupted")


def test_two_processes_may_write_one_record_and_say_nothing_but_their_lines(world, cli, tmp_path):
    out = tmp_path / "out"
    results = [finish(process) for process in [start(flags(world), out) for _ in range(2)]]
    assert [(result.code, result.err) for result in results] == [(0, "")] * 2
    assert [path.name for path in out.iterdir()] == list(records(out)) and len(records(out)) == 1
    stages = (
        ".*parameters on cpu",
        "udpos, train: en 40",
        "realign",
        "fine-tune",
        "en +[0-9]",
        "average +[0-9]",
    )
    places = [
        re.search(f"^{stage}", results[0].out, re.MULTILINE).start() for stage in (*stages, "record: ")
    ]
    assert places == sorted(places)
    assert cli(flags(world), tmp_path / "again").code == 0  # and its record is what a process computes
    assert but_seconds(only_record(out)) == but_seconds(only_record(tmp_path / "again"))


def test_names_that_the_locale_cannot_show_are_no_traceback(world, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9"))
    shutil.copytree(world / "models/bert", odd)
    argv = baseline(world)
    argv[1] = str(odd)
    result = finish(start(argv, Path(f"{odd}-out"), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert result.code in (0, 2) and "Traceback" not in result.err
    if result.code:
        assert_one_line(result.err, "caf")


# ------------------------------------------------------------------------- the saved encoder, the links


def layer_of(name: str) -> str:
    """The layer that a parameter of a BERT belongs to: "0", "1" ..., or "embeddings", "pooler"."""
    found = re.search(r"layer\.(\d+)\.", name)
    return found[1] if found else name.split(".")[0]


def test_the_saved_encoder_is_the_realigned_one_and_loads_as_a_model(world, cli, tmp_path):
    folder = tmp_path / "new" / "encoder"
    assert cli(flags(world, "bert", "--strategy", "front", "--save-model", folder)).code == 0
    paths = world / "models/bert", folder
    before, after = (transformers.AutoModel.from_pretrained(path).state_dict() for path in paths)
    assert set(before) >= set(after) and not [name for name in after if "classifier" in name]
    moved = {layer_of(name) for name in after if not torch.equal(before[name], after[name])}
    depth = transformers.AutoConfig.from_pretrained(folder).num_hidden_layers
    between = {
        str(layer) for layer in range(depth // 2, depth - 1)
    }  # not frozen, below the aligned state
    assert moved - {"pooler"} == {"embeddings"} | between
    argv = baseline(world)
    argv[1] = str(folder)
    assert cli(argv).code == 0
    assert {record["model"] for record in records(tmp_path / "out").values()} == {"bert", "encoder"}


@pytest.mark.parametrize("place", ["here", "file/encoder", "out", "s" * 300, "new/.."])
def test_a_place_where_the_encoder_cannot_go_is_refused(world, cli, tmp_path, untouched, place):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "kept").touch()
    (tmp_path / "file").touch()
    result = cli(flags(world, "bert", "--save-model", tmp_path / place))
    assert_refused(result, f"--save-model {tmp_path / place.split('/')[0]}", folder=tmp_path / "out")
    assert (tmp_path / "here" / "kept").exists()


@pytest.mark.parametrize("aligner", ["dictionary", "fastalign", "awesome"])
def test_stored_links_give_the_same_pairs_again(world, cli, tmp_path, aligner):
    more = ("--aligner", aligner, "--limit-links", 60)
    if aligner == "awesome":
        more += ("--aligner-model", world / "models/bert", "--aligner-layer", 1)
    links = tmp_path / "links" / "stored"
    result = cli(flags(world, "xlmr", *more, "--write-links", links))
    assert result.code == 0 and "en-qab.txt: 60 sentence pairs aligned" in result.out
    assert sorted(path.name for path in links.iterdir()) == ["en-qaa.txt", "en-qab.txt"]
    assert not (tmp_path / "out").exists(), "only the links are wanted"
    data = tmp_path / "somewhere" / "data"  # as many lines of text as links
    shutil.copytree(world / "data", data)
    for path in (data / "parallel").glob("en-*.tsv"):
        path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:60]), "utf-8")
    assert cli(flags(world, "xlmr", *more, data=data), tmp_path / "first").code == 0
    assert cli(flags(world, "xlmr", "--aligner", f"{links}/", data=data), tmp_path / "again").code == 0
    first, again = only_record(tmp_path / "first"), only_record(tmp_path / "again")
    for key in ("scores", "pairs", "losses"):
        assert again[key] == first[key]
    assert (again["aligner"], again["config"]["data_dir"]) == ("stored", "data")
    assert first["config"]["aligner_model"] == ("bert" if aligner == "awesome" else None)
    assert "somewhere" not in json.dumps([first, again])


def test_links_of_the_whole_text_serve_a_part_of_it(world, cli, tmp_path):
    links = tmp_path / "links"
    argv = flags(world, "bert", "--languages", "qaa", "--realign-languages", "qaa")
    assert cli([*argv, "--limit-links", 9999, "--write-links", links]).code == 0
    assert cli([*argv, "--limit-links", 60, "--aligner", links]).code == 0
    with (links / "en-qaa.txt").open("a") as file:
        file.write("0-0\n")
    assert_refused(cli([*argv, "--limit-links", 9999, "--aligner", links]), "are the links of another?")


def test_links_that_exist_are_not_written_again_unless_told(world, cli, tmp_path):
    folder = tmp_path / "links"
    argv = flags(world, "bert", "--limit-links", 20, "--write-links", folder)
    assert cli(argv).code == 0
    written = (folder / "en-qab.txt").read_text("utf-8")
    (folder / "en-qab.txt").write_text("my notes\n", "utf-8")
    again = cli(argv)
    assert again.code == 0 and f"{folder / 'en-qab.txt'} exists: nothing to do" in again.out
    assert (folder / "en-qab.txt").read_text("utf-8") == "my notes\n"
    assert cli([*argv, "--overwrite"]).code == 0
    assert (folder / "en-qab.txt").read_text("utf-8") == written


# ------------------------------------------------------------------------------------------- bad flags


def bad_values() -> dict[str, str]:
    """For every flag: no value, and one of the wrong kind; {command: what the line names}."""
    cases = {}
    for rows in alignfreeze.FLAGS.values():
        for flag, kind, _ in rows:
            if kind is bool:
                cases[f"--{flag}=x"] = f"--{flag}"
                continue
            cases[f"--{flag}"] = f"--{flag}"
            if isinstance(kind, tuple):
                cases[f"--{flag} nonsense"] = f"--{flag}"
            elif kind is not str and kind is not Path and not isinstance(kind, list):
                values = ["x", "1e99"] + (
                    [] if kind is int else ["-1", "nan", "inf", "99999999999999999999"]
                )
                if kind is not int and kind.__name__ == "whole number":
                    values.append("1.5")
                cases |= {f"--{flag} {value}": f"--{flag}" for value in values}
    zero = ("batch-size", "realign-steps", "realign-batch-size", "lr", "realign-lr", "temperature", "max-length",
            "limit-train", "limit-test", "limit-links", "accumulate", "validate", "lora-alpha")  # fmt: skip
    return cases | {f"--{flag} 0": f"--{flag}" for flag in zero}


WITHOUT_EFFECT = {
    "--strategy baseline --realign-steps 9": "--realign-steps: only with",
    "--schedule during --realign-steps 9": "--realign-steps: only with",
    "--aligner fastalign --aligner-model nowhere": "--aligner-model: only with",
    "--unit sentence --aligner fastalign": "--aligner: only with",
    "--gather": "--gather: only with", "--pool-first no": "--pool-first: only with",
    "--task xnli --syntactic-words": "--syntactic-words: only with",
}  # fmt: skip
BAD_FLAGS = bad_values() | WITHOUT_EFFECT | {
    "--strategy front,back,x": "'x'", "--strategy nonsense": "nonsense", "--strategy 99": "has layers 0 to ",
    "--strategy 0-99": "has layers 0 to ", "--strategy 3-1": "3-1", "--strategy emb,99": "99", "--strategy -1": "-1",
    "--strategy 1.5": "1.5", "--strategy a/b": "a/b", "--strategy=": "freeze", "--strategy=,": "freeze",
    "--strategy 1,,2": "freeze", "--layer 99": "--layer 99", "--layer -99": "--layer -99",
    "--bogus": "--bogus", "--task pos": "--task", "--method other": "--method", "--model": "--model",
    "surplus": "surplus", "--learning-rate 1": "--learning-rate", "--realign-step 1": "--realign-step",
    "--device nonsense": "--device", "--device cuda:99": "--device", "--device meta": "meta",
    "--max-length 2": "--max-length", "--max-length 9999": "--max-length", "--task xquad --max-length 16": "40 to",
    "--realign-max-length 2": "--realign-max-length", "--realign-max-length 9999": "--realign-max-length",
    "--aligner giza": "--aligner giza",
    "--write-links here --aligner .": "--write-links", "--languages ../udpos/qaa": "no language code",
    "--train-languages a/b": "no language code", "--realign-languages a/b": "no language code",
    "--schedule during --save-model here": "--save-model: with --schedule during",
    "--schedule alternate --save-model here": "--save-model: with --schedule alternate",
    "--adapter here": "--adapter", "--validate 5": "--validate",
    "--epochs 0 --schedule during": "--epochs 0", "--checkpointing --schedule during": "--checkpointing",
    "--write-links here --strategy baseline": "--write-links", "--batch-size 99999": "--batch-size",
    "--accumulate 10001": "--accumulate", "--lora 10001": "--lora", "--adapter here=nan": "--adapter",
    "--adapter here=1e999": "--adapter",
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_a_bad_flag_is_named(world, cli, tmp_path, monkeypatch, untouched, bad):
    (tmp_path / "fastalign").mkdir()
    monkeypatch.chdir(tmp_path)
    words = bad.split()
    without_steps = {"baseline", "during", "alternate"}
    argv = [*flags(world, "bert", *(without_steps & {*words})), *words]
    argv = [word for word in argv[: -len(words)] if word not in without_steps] + words
    if "--epochs 0" in bad and "--schedule" not in bad:
        argv.remove("--realign-steps")
    assert_refused(cli(argv), BAD_FLAGS[bad], folder=tmp_path / "out")


@pytest.mark.parametrize("flag", ["--languages", "--realign-languages", "--train-languages"])
def test_a_language_that_the_hub_has_not_is_named(world, cli, tmp_path, untouched, flag):
    argv = ["--model", world / "models/bert", flag, "de", "qax"]
    assert_refused(cli(argv), flag, "'qax'", folder=tmp_path / "out")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_out_folder_that_cannot_be_written_is_named(world, cli, tmp_path, untouched, out):
    (tmp_path / "file").touch()
    assert_refused(cli(flags(world), tmp_path / out), "--out", str(tmp_path / out))


def test_an_aligner_that_cannot_be_is_named(world, cli, tmp_path):
    argv = flags(world, "bert", "--aligner", "awesome", "--aligner-model")
    nowhere = tmp_path / "nowhere"
    assert_refused(cli([*argv, nowhere]), f"--aligner-model {nowhere}", folder=tmp_path / "out")
    for layer in (99, -1):
        result = cli([*argv, world / "models/bert", "--aligner-layer", layer])
        assert_refused(result, f"--aligner-layer {layer}", folder=tmp_path / "out")


@pytest.mark.parametrize("schedule, stage", [("before", "realign"), ("during", "fine-tune")])
def test_a_loss_that_is_not_finite_ends_the_run(world, cli, tmp_path, schedule, stage):
    result = cli(flags(world, "bert", "--temperature", "1e-40", "--schedule", schedule))
    assert result.code == 2 and not records(tmp_path / "out")
    assert_one_line(result.err, stage, "the loss is nan")


@pytest.mark.parametrize("kept", ["", "a b"])
def test_weights_that_are_not_finite_are_no_result(world, cli, tmp_path, kept):
    """Found before training where any text would meet them, else by the outputs."""
    folder = copy_model(world, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    words = "embeddings.word_embeddings.weight"
    known = transformers.AutoTokenizer.from_pretrained(folder)(kept)["input_ids"] if kept else []
    others = [row for row in range(len(tensors[words])) if row not in known]
    tensors[words][others] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    argv = baseline(world, "--epochs", 0)
    argv[1] = str(folder)
    named = "evaluate: the model's outputs are no numbers" if kept else f"--model {folder}: its weights"
    assert_refused(cli(argv), named, folder=tmp_path / "out")


# ---------------------------------------------------------------------------------------------- models


def with_model(world: Path, model: Path | str) -> list[str]:
    argv = flags(world)
    argv[1] = str(model)
    return argv


def copy_model(world: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(world / "models/bert", folder, ignore=shutil.ignore_patterns(*without))
    return folder


def configure(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")
    return folder


LACKING = {  # what happened to the weights: (what is left of {name: tensor}, changes of the configuration)
    "a layer missing": (lambda key: None if ".layer.2." in key else key, {}),
    "all names foreign": (lambda key: f"foreign.{key}", {}),
    "no word embeddings": (lambda key: None if "word_embeddings" in key else key, {}),
    "more layers in the configuration": (lambda key: key, {"num_hidden_layers": 6}),
    "no tensor": (lambda key: None, {}),
    "one tensor missing": (lambda key: None if key.endswith("layer.1.output.dense.bias") else key, {}),
    "another size": (lambda key: key, {"intermediate_size": 64}),
}


@pytest.mark.parametrize("case", LACKING)
def test_a_checkpoint_that_lacks_weights_of_the_encoder_is_refused(world, cli, tmp_path, case):
    rename, changes = LACKING[case]
    folder = configure(copy_model(world, tmp_path / "lacking"), **changes)
    tensors = load_file(folder / "model.safetensors")
    left = {rename(key): value for key, value in tensors.items() if rename(key)}
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    result = cli(with_model(world, folder))
    assert_refused(result, f"--model {folder}: ", folder=tmp_path / "out")
    found = re.search(r"lack (\d+) tensors of the model, (\S+) first", result.err)
    layer = sum(".layer.2." in key for key in tensors)
    count = {
        "a layer missing": layer,
        "more layers in the configuration": 2 * layer,
        "no word embeddings": 1,
    }
    count |= {"one tensor missing": 1, "another size": 3 * 4}
    pooler = sum("pooler" in key for key in tensors)
    assert int(found[1]) == count.get(case, len(tensors) - pooler)
    assert found[2].startswith("bert.e")


def test_what_is_left_out_of_a_checkpoint_is_said(world, cli, tmp_path):
    folder = configure(copy_model(world, tmp_path / "deep"), num_hidden_layers=3)
    result = cli(with_model(world, folder))
    assert result.code == 0 and "16 tensors of surplus layers are left out" in result.out
    folder = tmp_path / "tagger"
    tagger = transformers.AutoModelForTokenClassification.from_pretrained(
        world / "models/bert", num_labels=5
    )
    shutil.copytree(world / "models/bert", folder)
    tagger.save_pretrained(folder)
    result = cli(with_model(world, folder))
    said = re.search(r"a classifier of another size is left out \((.*)\)", result.out)
    assert result.code == 0 and result.err == ""
    assert {*said[1].split(", ")} == {"classifier.bias", "classifier.weight"}


@pytest.mark.parametrize("changes, named", [({"vocab_size": 50}, "its tokenizer has ids to"),
                                            ({"num_hidden_layers": -1}, "has no layer"),
                                            ({"max_position_embeddings": 7}, "fewer than 8 subwords"),
                                            ({"is_decoder": True}, "is not what this task takes")])  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(world, cli, tmp_path, untouched, changes, named):
    folder = configure(copy_model(world, tmp_path / "odd"), **changes)
    assert_refused(cli(with_model(world, folder)), f"--model {folder}", named, folder=tmp_path / "out")


@pytest.mark.parametrize("longest", ["many", [512], -5, 7])
def test_a_tokenizer_whose_length_is_none_is_refused(world, cli, tmp_path, untouched, longest):
    folder = copy_model(world, tmp_path / "odd")
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text("utf-8")) | {"model_max_length": longest}), "utf-8"
    )
    assert_refused(cli(with_model(world, folder)), f"--model {folder}", folder=tmp_path / "out")


def test_a_pipe_in_a_model_folder_is_not_waited_for(world, cli, tmp_path, untouched):
    folder = copy_model(world, tmp_path / "odd", "config.json")
    os.mkfifo(folder / "config.json")
    assert_refused(cli(with_model(world, folder)), str(folder / "config.json"), folder=tmp_path / "out")


@pytest.mark.parametrize("without", ["config.json", "tokenizer*", "model.safetensors", "*"])
def test_a_model_folder_that_lacks_a_file_is_refused(world, cli, tmp_path, without):
    folder = copy_model(world, tmp_path / "lacking", without)
    assert_refused(cli(with_model(world, folder)), "--model", str(folder), folder=tmp_path / "out")


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_with_a_broken_file_is_refused(world, cli, tmp_path, name, size):
    folder = copy_model(world, tmp_path / "broken")
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    assert_refused(cli(with_model(world, folder)), "--model", str(folder), folder=tmp_path / "out")


def test_a_model_without_a_fast_tokenizer_is_refused(world, cli, tmp_path):
    folder = copy_model(world, tmp_path / "slow", "tokenizer*", "special_tokens*")
    transformers.CanineTokenizer().save_pretrained(folder)  # written in Python: there is no other
    assert_refused(
        cli(with_model(world, folder)), "--model", str(folder), "fast tokenizer", folder=tmp_path / "out"
    )


def test_a_model_that_does_not_exist_is_refused_in_one_line(world, cli, tmp_path):
    folder = tmp_path / "none"
    assert_refused(cli(with_model(world, folder)), "--model", str(folder), folder=tmp_path / "out")
    assert_refused(cli(with_model(world, "no\nsuch")), "--model no such", folder=tmp_path / "out")


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LAYERS = {f"{side}_layers": 2 for side in ("encoder", "decoder")}
HEADS = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
OTHERS = {  # small random models of other kinds: options of the configuration, what the refusal names ("": it runs)
    "albert": (SIZES | {"embedding_size": 8}, "no list of 2 layers"),
    "squeezebert": (SIZES | {"embedding_size": 16, "q_groups": 1, "k_groups": 1, "v_groups": 1,
                             "post_attention_groups": 1, "intermediate_groups": 1, "output_groups": 1},
                    "does not run here"),
    "ibert": (SIZES, "does not run here"),
    "nystromformer": (SIZES | {"num_landmarks": 4, "segment_means_seq_len": 512}, "does not run here"),
    "deberta-v2": (SIZES | {"relative_attention": True, "position_buckets": 8}, ""),
    "electra": (SIZES | {"embedding_size": 8}, ""),
    "mpnet": (SIZES, ""),
    "roformer": (SIZES | {"embedding_size": 16}, ""),
    "modernbert": (SIZES | {"global_attn_every_n_layers": 1}, ""),
    "xlm": ({"emb_dim": 16, "n_layers": 2, "n_heads": 2}, ""),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, "gpt2"),
    "llama": (SIZES, "llama"),
    "t5": ({"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}, "t5"),
    "bart": ({"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, **LAYERS, **HEADS}, "bart"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_run_or_are_refused_in_one_line(world, cli, tmp_path, kind):
    options, named = OTHERS[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "models/bert")
    shared = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = transformers.AutoConfig.for_model(kind, **shared, **options)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    result = cli(with_model(world, tmp_path / kind))
    if named:
        assert_refused(result, "--model" if kind != "albert" else "", named, folder=tmp_path / "out")
    else:
        assert result.code == 0 and len(records(tmp_path / "out")) == 1, result.err


# --------------------------------------------------------------------------------- the second method


@pytest.fixture(scope="module")
def llama(world, tmp_path_factory) -> Path:
    """The world's language model, or one of random weights made here, with a byte tokenizer of the toy text."""
    if (world / "models/llama").is_dir():
        return world / "models/llama"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = (world / "data/parallel/en-qaa.tsv").read_text("utf-8").splitlines()[:500]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<end>"], "initial_alphabet": letters, "show_progress": False}
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, **options))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), **SIZES, eos_token_id=tokenizer.eos_token_id
    )
    folder = tmp_path_factory.mktemp("language-model") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def slots(world, llama, tmp_path, monkeypatch) -> list:
    """The command line of a run of the second method, on commands with slots made of the toy text."""
    short = alignfreeze.TASKS["xsid"]._replace(new_tokens=8)
    monkeypatch.setitem(alignfreeze.TASKS, "xsid", short)
    data = tmp_path / "data"
    (data / "parallel").mkdir(parents=True)
    lines = (world / "data/parallel/en-qaa.tsv").read_text("utf-8").splitlines()[:80]
    (data / "parallel/en-qaa.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    for side, code in enumerate(("en", "qaa")):
        rows = []
        for line in lines[:24]:
            text = line.split("\t")[side]
            rows.append(
                json.dumps({"text": text, "slots": [{"type": "first", "value": text.split()[0]}]})
            )
        (data / "xsid" / code).mkdir(parents=True)
        for split, part in (("train", rows), ("valid", rows[:6]), ("test", rows[:4])):
            (data / "xsid" / code / f"{split}.jsonl").write_text("\n".join(part) + "\n", "utf-8")
    return ["--method", "mid-align", "--task", "xsid", "--model", llama, "--data-dir", data, "--device", "cpu",
            "--precision", "fp32", "--train-languages", "en", "--languages", "qaa", "--realign-languages", "qaa",
            "--epochs", 1, "--batch-size", 4, "--accumulate", 2, "--realign-batch-size", 4, "--layer", 1, "--lora", 2,
            "--max-length", 512]  # fmt: skip


@pytest.mark.parametrize("strategy", ["baseline", "full"])
def test_the_second_method_learns_slots_by_adapters(slots, cli, tmp_path, strategy):
    result = cli([*slots, "--strategy", strategy])
    assert result.code == 0 and result.err == ""
    (name,), record = records(tmp_path / "out"), only_record(tmp_path / "out")
    alone = strategy == "baseline"
    schedule = "none" if alone else "alternate"
    assert re.fullmatch(rf"llama_xsid_{strategy}_{schedule}_none_1-[0-9a-f]{{6}}\.json", name)
    assert "adapters of rank 2" in result.out
    assert list(record["scores"]) == ["en", "qaa"]
    assert all("f1" in scores for scores in record["scores"].values())
    assert record["steps"] == {
        "finetune": 3 if alone else 6
    }  # 24 examples in fours, two of these an update
    assert set(record["losses"]) == ({"finetune"} if alone else {"task", "align"})
    assert record["pairs"] == ({} if alone else {"qaa": record["pairs"]["qaa"]})
    assert alone or record["pairs"]["qaa"]["sentences"] == 24
    assert record["config"]["lora_alpha"] == 16 and record["config"]["method"] == "mid-align"


def test_a_language_model_is_scored_as_it_is_and_with_saved_adapters(slots, cli, tmp_path):
    folder = tmp_path / "adapters"
    assert cli([*slots, "--save-model", folder], tmp_path / "trained").code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["r"] == 2
    plain = [*slots, "--epochs", 0, "--strategy", "baseline"]
    assert cli(plain).code == 0
    assert only_record(tmp_path / "out")["steps"] == {"finetune": 0}
    assert "fine-tune" not in (result := cli([*plain, "--adapter", f"{folder}=0.5"])).out
    assert result.code == 0 and "merged with weight 0.5" in result.out
    assert len(records(tmp_path / "out")) == 2
    merged = [record["config"]["adapter"] for record in records(tmp_path / "out").values()]
    assert sorted(merged) == [[], ["adapters=0.5"]]
    assert_refused(cli([*plain, "--adapter", tmp_path / "data"]), f"--adapter {tmp_path / 'data'}")


def test_what_would_fail_when_text_is_generated_is_found_before_training(slots, llama, cli, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(llama, folder)
    (folder / "generation_config.json").write_text('{"repetition_penalty": -1.0}', "utf-8")
    result = cli([*slots, "--model", folder])
    assert_refused(result, f"--model {folder}", "does not run here", folder=tmp_path / "out")


def test_what_sacrebleu_lacks_for_a_language_to_train_on_is_found_before(
    slots, cli, tmp_path, monkeypatch
):
    pytest.importorskip("sacrebleu")
    monkeypatch.setitem(alignfreeze.BLEU_TOKENIZERS, "qaa", "no-such")
    argv = [*slots, "--task", "translation", "--train-languages", "en-qaa", "--languages", "qaa-en"]
    assert_refused(cli(argv), "en-qaa", "pip install", folder=tmp_path / "out")


def test_validation_keeps_the_best_weights(slots, cli, tmp_path):
    result = cli([*slots, "--validate", 2])
    assert result.code == 0 and "xsid, valid: en 6 examples" in result.out
    found = only_record(tmp_path / "out")["validation"]
    assert len(found["losses"]) == 3 and found["step"] in (2, 4, 6)
    assert found["loss"] == pytest.approx(min(found["losses"]), abs=1e-5)
    refused = cli([*slots, "--validate", 99])
    assert refused.code == 2
    assert_one_line(refused.err, "--validate: fine-tuning has 6 updates")
