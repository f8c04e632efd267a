"""The command line: what a run leaves behind, that it survives, and that whatever is wrong ends in one clear line."""

import contextlib
import io
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

import alignfreeze

SCRIPT = Path(alignfreeze.__file__)
ARCHITECTURES = ("distilbert", "bert", "xlmr")
STRATEGIES = ("baseline", "full", "front", "back", "emb,0-1")
# flags that say where things go: not part of the result
PLACES = {"out", "overwrite", "device", "save_model", "write_links", "realign_cache"}
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
    return [
        *("--model", str(world / "models" / model), "--data-dir", str(data or world / "data"), "--device", "cpu"),
        *("--languages", *LANGUAGES, "--realign-languages", *LANGUAGES, "--epochs", "1", "--batch-size", str(BATCH)),
        *("--realign-steps", str(STEPS), "--limit-train", str(EXAMPLES), "--limit-test", "20"),
        *("--precision", "fp32", *map(str, more)),
    ]


def start(argv: list, out: Path, script: Path = SCRIPT, **environment: str) -> subprocess.Popen:
    """The program as a process of its own."""
    command = [sys.executable, script, *argv, "--out", out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([*map(str, command)], env=os.environ | environment, **pipes)


def finish(process: subprocess.Popen, seconds: float = 120) -> Result:
    out, err = process.communicate(timeout=seconds)
    return Result(process.returncode, out, err)


@pytest.fixture
def cli(capsys, tmp_path):
    """Call `main` in this process with records going to a folder of the test's own; returns Result."""

    def call(argv: list[str], out: Path = tmp_path / "out") -> Result:
        capsys.readouterr()
        code = alignfreeze.main([*map(str, argv), "--out", str(out)])
        return Result(code, *capsys.readouterr())

    return call


def qaa(world: Path, data: Path, *more: object) -> list[str]:
    return flags(world, "bert", *more, "--languages", "qaa", "--realign-languages", "qaa", data=data)


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
    """The table at the end of a run: {language, or "average": percent}."""
    heading = re.search(r"^\w+ +accuracy$", text, re.MULTILINE)
    rows = re.findall(r"^(\S+) +([\d.]+)$", text[heading.end() :], re.MULTILINE)
    return {code: float(score) for code, score in rows}


def assert_refused(result: Result, *named: str, folder: Path | None = None) -> None:
    """Exit code 2 and one line that names what is wrong; nothing trained, no record."""
    assert result.code == 2
    assert_one_line(result.err, *named)
    assert not STAGE.search(result.out), "refused only after training"
    assert folder is None or not list(folder.glob("*.json"))


def assert_one_line(err: str, *named: str) -> None:
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    for name in named:
        assert name in err


# ---------------------------------------------------------------------------- what a run leaves behind


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_a_run_prints_its_table_and_writes_its_record(world, cli, tmp_path, model, strategy):
    began = time.time()
    result = cli(flags(world, model, "--strategy", strategy, "--seed", 42))
    took = time.time() - began
    assert result.code == 0 and result.err == ""
    name, record = next(iter(records(tmp_path / "out").items()))

    alone = strategy == "baseline"
    schedule, aligner = ("none", "none") if alone else ("before", "dictionary")
    assert name.startswith(f"{model}_udpos_{strategy}_{schedule}_{aligner}_42_")
    assert str(tmp_path / "out" / name) in result.out

    identity = {"model": model, "task": "udpos", "strategy": strategy, "schedule": schedule, "aligner": aligner}
    identity |= {"seed": 42}
    rest = {"scores", "config", "steps", "seconds", "pairs", "versions", "device", "processes"}
    assert set(record) == identity.keys() | rest
    assert {key: record[key] for key in identity} == identity

    config = record["config"]
    assert set(config) == set(vars(alignfreeze.parse_args([]))) - PLACES
    expected = {"languages": LANGUAGES, "epochs": 1, "batch_size": BATCH, "lr": 2e-5, "max_length": 96}
    expected |= {"precision": "fp32", "data_dir": "data", "limit_train": EXAMPLES, "limit_test": 20, **identity}
    realignment = {"realign_languages": LANGUAGES, "realign_steps": STEPS, "realign_batch_size": 16, "realign_lr": 2e-5}
    realignment |= {"layer": -2, "temperature": 0.1, "realign_max_length": 96}
    expected |= dict.fromkeys(realignment) if alone else realignment
    unused = dict.fromkeys(["aligner_model", "aligner_layer"])
    assert config == {"syntactic_words": False, "probe": False} | unused | expected

    assert list(record["scores"]) == ["en", *LANGUAGES]
    assert all(0 <= metrics["accuracy"] <= 1 and len(metrics) == 1 for metrics in record["scores"].values())
    assert record["steps"] == {"finetune": math.ceil(EXAMPLES / BATCH)} | ({} if alone else {"realign": STEPS})
    stages = {"data", "model", "finetune", "evaluate"} | (set() if alone else {"pairs", "realign"})
    assert set(record["seconds"]) == stages
    assert 0 < sum(record["seconds"].values()) < took + 0.1 * len(stages)
    assert set(record["pairs"]) == (set() if alone else set(LANGUAGES))
    for counts in record["pairs"].values():
        assert counts["sentences"] == STEPS * 16 / len(LANGUAGES) and counts["words"] > counts["sentences"]
    versions = {"python", "torch", "transformers", "datasets", "alignfreeze.py"}
    assert set(record["versions"]) == versions and re.fullmatch("[0-9a-f]{64}", record["versions"]["alignfreeze.py"])
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"] == "cpu" and record["processes"] == 1
    assert not [text for text in strings(record) if os.sep in text or str(tmp_path) in text]

    scores = {code: 100 * metrics["accuracy"] for code, metrics in record["scores"].items()}
    scores["average"] = sum(scores[code] for code in LANGUAGES) / len(LANGUAGES)  # without English
    assert table(result.out) == {code: pytest.approx(score, abs=0.051) for code, score in scores.items()}
    assert bool(re.search("^realign", result.out, re.MULTILINE)) == (not alone)


def test_a_record_does_not_say_where_its_aligner_model_and_data_lay(world, cli, tmp_path):
    links = tmp_path / "somewhere" / "links"
    write_links(world / "data", links, "qaa")
    argv = flags(world, "bert", "--aligner", links, "--realign-languages", "qaa")
    assert cli([arg + "/" if arg.endswith("bert") else arg for arg in argv]).code == 0
    record = only_record(tmp_path / "out")
    assert (record["aligner"], record["model"], record["config"]["data_dir"]) == ("links", "bert", "data")
    assert "somewhere" not in json.dumps(record)


def test_a_run_without_targets_scores_english_only(world, cli, tmp_path):
    result = cli(flags(world, "bert", "--strategy", "baseline", "--languages", "en"))
    assert result.code == 0 and set(table(result.out)) == set(only_record(tmp_path / "out")["scores"]) == {"en"}


def test_a_process_of_its_own_says_nothing_but_its_lines(world, cli, tmp_path):
    result = finish(start(flags(world), tmp_path / "out"))
    assert result.code == 0 and result.err == ""
    stages = "udpos: ", ".*parameters on cpu", "realign", "fine-tune", "en +[0-9]", "average +[0-9]", "record: "
    places = [re.search(f"^{stage}", result.out, re.MULTILINE).start() for stage in stages]
    assert places == sorted(places)
    assert cli(flags(world), tmp_path / "again").code == 0  # and its record is what this process computes
    assert but_seconds(only_record(tmp_path / "out")) == but_seconds(only_record(tmp_path / "again"))


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        alignfreeze.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name in vars(alignfreeze.parse_args([])):
        assert f"--{name.replace('_', '-')}" in text


# ------------------------------------------------------------------------------ defaults, names, seeds


def resolved(*argv: object):
    """(flags with the paper's values filled in, name of the record)."""
    args = alignfreeze.parse_args([*map(str, argv)])
    return args, alignfreeze.record_name(args, alignfreeze.resolve(args))


def record_names(*commands: str) -> list[str]:
    return [resolved(*command.split())[1] for command in commands]


@pytest.mark.parametrize(
    "model, lr",
    [
        ("distilbert-base-multilingual-cased", 2e-5),
        ("bert-base-multilingual-cased", 2e-5),
        ("xlm-roberta-base", 7.5e-6),
        ("some/other-encoder", 2e-5),
    ],
)
def test_absent_flags_mean_the_papers_settings(model, lr):
    args, name = resolved("--model", model)
    paper = {"task": "udpos", "strategy": "front", "schedule": "before", "aligner": "dictionary", "seed": 31}
    paper |= {"epochs": 5, "batch_size": 32, "lr": lr, "max_length": 96, "precision": "fp32", "syntactic_words": False}
    paper |= {"realign_steps": None, "realign_batch_size": 16, "realign_lr": lr, "layer": -2, "temperature": 0.1}
    paper |= {"data_dir": None, "limit_train": None, "limit_test": None}
    assert {key: getattr(args, key) for key in paper} == paper
    assert name == f"{Path(model).name}_udpos_front_before_dictionary_31"


def test_absent_languages_mean_the_papers_34():
    args, _ = resolved()
    codes = "af ar bg ca cs da de el es fa fi fr he hi hu it ja ko lt lv no pl pt ro ru sk sl sv ta th tr uk vi zh"
    assert sorted(args.languages) == sorted(args.realign_languages) == codes.split()


def test_realignment_takes_as_many_steps_as_fine_tuning_unless_told(world, cli, tmp_path):
    argv = flags(world, "bert", "--epochs", 2)
    at = argv.index("--realign-steps")
    assert cli(argv[:at] + argv[at + 2 :]).code == 0
    assert only_record(tmp_path / "out")["steps"] == {"finetune": 4, "realign": 4}


DIFFERENT = (
    "", "--seed 42", "--model bert-base-multilingual-cased", "--strategy full", "--strategy back",
    "--strategy baseline", "--strategy baseline --seed 42", "--strategy baseline --epochs 1",
    "--strategy baseline --languages de",
    "--strategy 0-2", "--strategy emb,0-2", "--strategy 0,2", "--aligner links", "--aligner other-links",
    "--languages de", "--languages de fr", "--realign-languages de", "--realign-languages de fr",
    "--languages de --realign-languages de", "--epochs 1", "--epochs 2", "--batch-size 16", "--realign-batch-size 32",
    "--batch-size 16 --realign-batch-size 32", "--lr 1e-4", "--realign-lr 1e-4", "--lr 1e-4 --realign-lr 1e-5",
    "--realign-steps 100", "--realign-steps 1000", "--layer -1", "--layer 4", "--temperature 0.2", "--max-length 64",
    "--precision bf16", "--syntactic-words", "--data-dir here", "--data-dir there", "--limit-train 100",
    "--limit-test 100", "--limit-train 10 --limit-test 100",
)  # fmt: skip


def test_two_different_runs_never_share_a_record():
    names = dict(zip(DIFFERENT, record_names(*DIFFERENT)))
    assert len(set(names.values())) == len(DIFFERENT)


def test_long_names_fit_a_file_system_and_stay_different():
    codes = " ".join(alignfreeze.TARGETS[:-1])
    long = [f"--languages {codes} --realign-languages {codes} --epochs {n}" for n in (1, 2, 3)]
    names = record_names(*long)
    assert len(set(names)) == 3 and max(len(name.encode()) for name in names) <= 250


def test_the_papers_value_written_out_is_the_same_run():
    spelled = "--epochs 5 --batch-size 32 --lr 2e-5 --layer -2 --temperature 0.1 --max-length 96 --precision fp32"
    assert len(set(record_names("", spelled, "--realign-lr 2e-5", "--realign-batch-size 16"))) == 1


def test_where_a_run_goes_does_not_change_its_name():
    assert (
        len(
            set(
                record_names(
                    "", "--out elsewhere", "--device cpu", "--overwrite", "--save-model encoder", "--realign-cache here"
                )
            )
        )
        == 1
    )


REALIGNMENT = ("--schedule before", "--aligner links", "--realign-languages de", "--realign-steps 9", "--layer -1",
               "--realign-batch-size 8", "--realign-lr 1e-4", "--temperature 0.2")  # fmt: skip


def test_a_baseline_has_one_record_whatever_the_realignment_flags():
    (name,) = set(record_names(*(f"--strategy baseline {flag}" for flag in ("", *REALIGNMENT))))
    assert name == "distilbert-base-multilingual-cased_udpos_baseline_none_none_31"


def test_a_baseline_needs_no_parallel_text_and_no_dictionary(world, cli, data, tmp_path):
    shutil.rmtree(data / "parallel")
    shutil.rmtree(data / "dictionary")
    argv = qaa(world, data, "--strategy", "baseline", "--aligner", "nowhere", "--layer", 99)
    assert cli(argv).code == 0
    assert "exists" in cli([*argv, "--realign-steps", 7]).out and len(records(tmp_path / "out")) == 1


@pytest.mark.parametrize("strategy", ["baseline", "front"])
def test_a_seed_decides_everything_but_the_time(world, cli, tmp_path, strategy):
    found = {}
    for folder, seed in (("first", 31), ("second", 31), ("third", 42)):
        assert cli(flags(world, "xlmr", "--strategy", strategy, "--seed", seed), tmp_path / folder).code == 0
        found[folder] = but_seconds(only_record(tmp_path / folder))
    assert found["first"] == found["second"]
    assert found["first"]["scores"] != found["third"]["scores"]


# ------------------------------------------------------------------------------------------- surviving


def test_a_run_whose_record_exists_is_skipped_unless_told(world, cli, tmp_path):
    argv = flags(world)
    cli(argv)
    (path,) = (tmp_path / "out").glob("*.json")
    before = path.read_text("utf-8")
    path.write_text("mine", "utf-8")
    again = cli(argv)
    assert again.code == 0 and path.name in again.out and "exists" in again.out and not STAGE.search(again.out)
    assert path.read_text("utf-8") == "mine"
    assert cli([*argv, "--overwrite"]).code == 0
    assert but_seconds(json.loads(path.read_text("utf-8"))) == but_seconds(json.loads(before))


def test_a_killed_run_leaves_no_record_and_the_next_start_completes_it(world, cli, tmp_path):
    argv, out = flags(world, "bert", "--limit-train", 400), tmp_path / "out"
    process = start(argv, out)
    for line in process.stdout:
        if line.startswith("realign"):  # fine-tuning begins
            break
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert not list(out.iterdir())
    assert cli(argv).code == 0 and "average" in table(cli([*argv, "--overwrite"]).out)
    assert len(records(out)) == 1


def test_a_run_killed_while_it_writes_its_record_leaves_none(world, cli, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", killed)
        cli(flags(world))
    assert not records(tmp_path / "out")
    assert cli(flags(world)).code == 0 and len(records(tmp_path / "out")) == 1


def test_an_interrupted_run_says_so_in_one_line(world, cli, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(alignfreeze, "finetune", interrupted)
    result = cli(flags(world, "bert", "--strategy", "baseline"))
    assert result.code == 130 and not records(tmp_path / "out")
    assert_one_line(result.err, "interrupted")


def test_two_processes_may_write_into_one_folder(world, tmp_path):
    """At the same time, and even the same record."""
    out = tmp_path / "out"
    results = [finish(process) for process in [start(flags(world), out) for _ in range(2)]]
    assert [(result.code, result.err) for result in results] == [(0, "")] * 2
    assert [path.name for path in out.iterdir()] == list(records(out)) and len(
        records(out)
    ) == 1  # nothing else is left


# ------------------------------------------------------------------------------------- the saved model


def layer_of(name: str) -> str:
    """The layer that a parameter of a BERT belongs to: "0", "1" ..., or "embeddings", "pooler"."""
    found = re.search(r"layer\.(\d+)\.", name)
    return found[1] if found else name.split(".")[0]


def test_the_saved_encoder_is_the_realigned_one_and_loads_as_a_model(world, cli, tmp_path):
    folder = tmp_path / "new" / "encoder"
    assert cli(flags(world, "bert", "--strategy", "front", "--save-model", folder)).code == 0
    before, after = (
        transformers.AutoModel.from_pretrained(path).state_dict() for path in (world / "models" / "bert", folder)
    )
    assert set(before) >= set(after) and not [name for name in after if "classifier" in name]
    moved = {layer_of(name) for name in after if not torch.equal(before[name], after[name])}
    depth = transformers.AutoConfig.from_pretrained(folder).num_hidden_layers
    between = {str(layer) for layer in range(depth // 2, depth - 1)}  # not frozen, and below the realigned state
    assert moved - {"pooler"} == {"embeddings"} | between
    argv = flags(world, "bert", "--strategy", "baseline")
    argv[1] = str(folder)
    assert cli(argv).code == 0
    assert {record["model"] for record in records(tmp_path / "out").values()} == {"bert", "encoder"}


@pytest.mark.parametrize("place", ["here", "file/encoder"])
def test_a_place_where_the_encoder_cannot_go_is_refused_before_training(world, cli, tmp_path, place):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "kept").touch()
    (tmp_path / "file").touch()
    result = cli(flags(world, "bert", "--save-model", tmp_path / place))
    assert_refused(result, str(tmp_path / place), folder=tmp_path / "out")
    assert (tmp_path / "here" / "kept").exists()


# ---------------------------------------------------------------------------------------- broken files

FILES = ("udpos/en/train.conllu", "udpos/en/test.conllu", "udpos/qaa/test.conllu", "parallel/en-qaa.tsv",
         "dictionary/en-qaa.txt", "dictionary/qaa-en.txt")  # fmt: skip
WORD = b"1\tdog\tdog\tNOUN\t_\t_\t_\t_\t_\t_"
MALFORMED = {
    "CoNLL-U: two columns": ("udpos/en/train.conllu", b"1\tdog"),
    "CoNLL-U: spaces for tabs": ("udpos/en/train.conllu", WORD.replace(b"\t", b" ")),
    "CoNLL-U: one column too many": ("udpos/en/train.conllu", WORD + b"\t_"),
    "CoNLL-U: no number": ("udpos/qaa/test.conllu", WORD.replace(b"1", b"one", 1)),
    "CoNLL-U: no form": ("udpos/en/test.conllu", WORD.replace(b"dog", b"", 1)),
    "CoNLL-U: unknown tag": ("udpos/qaa/test.conllu", WORD.replace(b"NOUN", b"THING")),
    "dictionary: one word": ("dictionary/en-qaa.txt", b"dog"),
    "dictionary: three words": ("dictionary/qaa-en.txt", b"the big dog"),
    "dictionary: blank line": ("dictionary/en-qaa.txt", b""),
    "parallel: no tab": ("parallel/en-qaa.tsv", b"A dog sleeps ."),
    "parallel: two tabs": ("parallel/en-qaa.tsv", b"A dog sleeps .\tEin Hund .\tUn chien ."),
    "parallel: blank line": ("parallel/en-qaa.tsv", b""),
    **{f"{name}: not UTF-8": (name, b"caf\xe9\tcaf\xe9") for name in FILES},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named_by_file_and_line(world, cli, data, tmp_path, case):
    name, line = MALFORMED[case]
    lines = (data / name).read_bytes().split(b"\n")
    lines[2] = line  # the first word of a CoNLL-U file stands in its third line
    (data / name).write_bytes(b"\n".join(lines))
    assert_refused(cli(qaa(world, data)), f"{data / name}:3:", folder=tmp_path / "out")


@pytest.mark.parametrize("name", FILES)
def test_an_empty_file_is_named(world, cli, data, tmp_path, name):
    (data / name).write_bytes(b"")
    assert_refused(cli(qaa(world, data)), str(data / name), "empty", folder=tmp_path / "out")


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_missing_file_is_named(world, cli, data, tmp_path, name):
    (data / name).unlink()
    assert_refused(cli(qaa(world, data)), str(data / name), "No such file", folder=tmp_path / "out")


def test_the_dictionary_of_the_way_back_may_be_missing(world, cli, data):
    (data / "dictionary/qaa-en.txt").unlink()
    assert cli(qaa(world, data)).code == 0


def test_a_treebank_without_a_sentence_is_named(world, cli, data, tmp_path):
    (data / "udpos/qaa/test.conllu").write_bytes(b"# newdoc\n\n\n")
    assert_refused(cli(qaa(world, data)), str(data / "udpos/qaa/test.conllu"), folder=tmp_path / "out")


def test_a_dictionary_that_links_nothing_is_named_by_its_language(world, cli, data, tmp_path):
    (data / "dictionary/en-qaa.txt").write_bytes(b"no such\n")
    (data / "dictionary/qaa-en.txt").write_bytes(b"such no\n")
    assert_refused(cli(qaa(world, data)), "en-qaa", folder=tmp_path / "out")


def test_a_data_folder_that_does_not_exist_is_named(world, cli, tmp_path):
    result = cli(flags(world, data=tmp_path / "nowhere"))
    assert_refused(result, str(tmp_path / "nowhere"), folder=tmp_path / "out")


# ------------------------------------------------------------------------------ links from other files


def write_links(data: Path, folder: Path, language: str, line: str = "0-0") -> Path:
    """Pharaoh links, the same line for every pair of the parallel text."""
    folder.mkdir(parents=True)
    count = len((data / f"parallel/en-{language}.tsv").read_bytes().splitlines())
    (folder / f"en-{language}.txt").write_text(f"{line}\n" * count, "utf-8")
    return folder / f"en-{language}.txt"


@pytest.mark.parametrize("line", ["0", "0-", "0-0 1", "a-b", "0-0,1-1", "0--1", "0-0 | 1-1", "-1-0"])
def test_a_bad_pharaoh_line_is_named(world, cli, data, tmp_path, line):
    path = write_links(data, tmp_path / "links", "qaa")
    path.write_text(path.read_text("utf-8").replace("0-0", line, 1), "utf-8")
    assert_refused(cli(qaa(world, data, "--aligner", path.parent)), f"{path}:1:", folder=tmp_path / "out")


@pytest.mark.parametrize("change", [lambda text: text[4:], lambda text: text + "0-0\n"], ids=["too few", "too many"])
def test_links_must_be_as_many_as_sentence_pairs(world, cli, data, tmp_path, change):
    path = write_links(data, tmp_path / "links", "qaa")
    path.write_text(change(path.read_text("utf-8")), "utf-8")
    assert_refused(cli(qaa(world, data, "--aligner", path.parent)), str(path), folder=tmp_path / "out")


@pytest.mark.parametrize("link", ["0-99", "99-0"])
def test_a_link_outside_its_sentence_pair_is_named(world, cli, data, tmp_path, link):
    path = write_links(data, tmp_path / "links", "qaa")
    path.write_text(path.read_text("utf-8")[:-4] + f"{link}\n", "utf-8")
    assert_refused(cli(qaa(world, data, "--aligner", path.parent)), f"{path}:30:", folder=tmp_path / "out")


def test_a_link_outside_its_sentence_pair_is_found_before_training_wherever_it_stands(world, cli, tmp_path):
    path = write_links(world / "data", tmp_path / "links", "qaa")
    lines = path.read_text("utf-8").splitlines()
    for number in range(100, len(lines)):  # shuffled, the first bad line comes some steps after the first pair
        lines[number] = "99-99"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    argv = flags(world, "bert", "--realign-languages", "qaa", "--aligner", path.parent)
    assert_refused(cli(argv), f"{path}:", folder=tmp_path / "out")


def test_missing_links_are_named(world, cli, data, tmp_path):
    assert_refused(cli(qaa(world, data, "--aligner", "giza")), "--aligner giza", folder=tmp_path / "out")
    path = tmp_path / "links" / "en-qaa.txt"
    path.parent.mkdir()
    assert_refused(cli(qaa(world, data, "--aligner", path.parent)), str(path), folder=tmp_path / "out")


# ---------------------------------------------------------------------- other schedules and aligners


def test_realignment_during_fine_tuning_takes_its_steps(world, cli, tmp_path):
    argv = flags(world, "bert", "--schedule", "during", "--limit-train", 100)
    assert cli(argv).code == 0
    record = only_record(tmp_path / "out")
    assert record["schedule"] == "during" and record["steps"] == {"finetune": 4, "realign": 4}
    assert sum(counts["sentences"] for counts in record["pairs"].values()) == 4 * 16
    assert record["config"]["realign_steps"] is record["config"]["realign_lr"] is None  # those of fine-tuning
    assert cli([*argv, "--realign-steps", "9", "--overwrite"]).code == 0
    assert but_seconds(only_record(tmp_path / "out")) == but_seconds(record)


@pytest.mark.parametrize("aligner", ["fastalign", "awesome"])
def test_an_aligner_leaves_its_name_and_settings_in_the_record_and_its_links_where_they_are_wanted(
    world, cli, tmp_path, aligner
):
    links = tmp_path / "links" / "stored"
    more = ("--aligner", aligner, "--aligner-model", world / "models/bert", "--aligner-layer", 1)
    assert cli(flags(world, "xlmr", *more)).code == 0
    record = only_record(tmp_path / "out")
    settings = ("bert", 1) if aligner == "awesome" else (None, None)
    assert (record["config"]["aligner_model"], record["config"]["aligner_layer"]) == settings
    assert record["aligner"] == aligner and str(tmp_path) not in str(strings(record))
    argv = flags(world, "xlmr", *more, "--write-links", links, "--overwrite")
    assert cli(argv).code == 0
    assert but_seconds(only_record(tmp_path / "out")) == but_seconds(record)
    assert sorted(path.name for path in links.iterdir()) == ["en-qaa.txt", "en-qab.txt"]
    assert cli(flags(world, "xlmr", "--aligner", links), tmp_path / "again").code == 0
    again = only_record(tmp_path / "again")
    assert (again["scores"], again["pairs"]) == (record["scores"], record["pairs"])


@pytest.mark.parametrize("name", ["fastalign", "dictionary", "awesome"])
def test_links_may_be_stored_in_a_folder_of_any_name(world, cli, tmp_path, name):
    argv = flags(world, "bert", "--aligner", "fastalign")
    assert cli([*argv, "--write-links", tmp_path / "elsewhere" / name]).code == 0
    stored = only_record(tmp_path / "out")
    assert cli([*argv, "--overwrite"]).code == 0
    assert but_seconds(only_record(tmp_path / "out")) == but_seconds(stored)


@pytest.mark.parametrize("flag", ["--save-model", "--write-links"])
def test_a_record_that_exists_does_not_silently_forgo_what_else_is_asked_for(world, cli, tmp_path, flag):
    assert cli(flags(world)).code == 0
    assert_refused(cli([*flags(world), flag, tmp_path / "asked"]), "--overwrite")
    assert cli([*flags(world), flag, tmp_path / "asked", "--overwrite"]).code == 0 and (tmp_path / "asked").is_dir()


def test_a_message_of_several_lines_is_printed_as_one(world, cli, tmp_path):
    assert_refused(cli(["--model", "no\nsuch", *flags(world)[2:]]), "--model no such")


@pytest.mark.parametrize("endpoint", ["foo", "http://127.0.0.1:9"])
def test_a_hub_that_is_not_there_is_no_traceback(world, tmp_path, endpoint):
    argv = ["--model", "no-such-model", *flags(world)[2:]]
    process = start(argv, tmp_path / "out", HF_ENDPOINT=endpoint)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert_one_line(err, "--model no-such-model")


def test_a_test_set_without_a_word_that_the_tokenizer_sees_is_named(world, cli, data, tmp_path):
    (data / "udpos/qaa/test.conllu").write_text("1\t\u200b\t_\tX\t_\t_\t_\t_\t_\t_\n\n", "utf-8")
    assert_refused(cli(qaa(world, data)), "qaa", "nothing to score", folder=tmp_path / "out")


# ------------------------------------------------------------------------------------------- bad flags


@pytest.mark.parametrize("flag", ["--languages", "--realign-languages"])
def test_an_unknown_language_is_named(world, cli, tmp_path, flag):
    """With --data-dir by the file that it would have; without, before anything is downloaded, by the flag."""
    folder = "udpos/qax" if flag == "--languages" else "qax"
    assert_refused(cli(flags(world, "bert", flag, "qaa", "qax")), folder, folder=tmp_path / "out")
    hub = ["--model", world / "models/bert", flag, "de", "qax"]
    assert_refused(cli(hub), flag, "'qax'", folder=tmp_path / "out")


BAD_FLAGS = {
    "--strategy front,back": "front", "--strategy nonsense": "nonsense", "--strategy 99": "has layers 0 to ",
    "--strategy 0-99": "has layers 0 to ", "--strategy 3-1": "3-1", "--strategy emb,99": "99", "--strategy -1": "-1",
    "--strategy 1.5": "1.5", "--strategy a/b": "a/b", "--strategy=": "freeze", "--strategy=,": "freeze",
    "--strategy 1,,2": "freeze",
    "--layer 99": "--layer 99", "--layer -99": "--layer -99", "--layer first": "--layer",
    "--bogus": "--bogus", "--task pos": "--task", "--schedule after": "--schedule", "--languages": "--languages",
    "--precision fp16": "--precision", "--seed x": "--seed", "--seed 99999999999999999999999": "--seed",
    "--device nonsense": "--device", "--device cuda:99": "--device", "--model": "--model", "surplus": "surplus",
    "--max-length 2": "--max-length", "--max-length 9999": "--max-length", "--task xquad --max-length 16": "24 to",
    "--realign-max-length 2": "--realign-max-length", "--realign-max-length 9999": "--realign-max-length",
    "--aligner giza": "--aligner giza", "--aligner awesome --aligner-model nowhere": "--aligner-model nowhere",
    "--aligner-layer x": "--aligner-layer", "--aligner-layer 99 --aligner awesome": "--aligner-layer 99",
    "--aligner-layer -1 --aligner awesome": "--aligner-layer -1",
    "--aligner fastalign/": "another name", "--aligner . --write-links here": "--write-links", "--device meta": "meta",
    "--languages ../udpos/qaa": "no language code", "--realign-steps 99999999999999999999": "--realign-steps",
    "--schedule during --save-model here": "--save-model", "--strategy baseline --write-links here": "--write-links",
    **{f"--{name} {value}": f"--{name}" for value in ("0", "-1") for name in (
        "epochs", "batch-size", "realign-steps", "realign-batch-size", "lr", "realign-lr", "temperature", "max-length",
        "limit-train", "limit-test")},
    **{f"--{name} {value}": f"--{name}" for value in ("nan", "inf") for name in ("lr", "realign-lr", "temperature")},
    **{f"--{name} 1.5": f"--{name}" for name in ("epochs", "batch-size", "realign-steps", "limit-test")},
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_a_bad_flag_is_named(world, cli, tmp_path, monkeypatch, bad):
    (tmp_path / "fastalign").mkdir()
    monkeypatch.chdir(tmp_path)
    argv = [*flags(world, "bert", "--aligner-model", world / "models/bert"), *bad.split()]
    assert_refused(cli(argv), BAD_FLAGS[bad], folder=tmp_path / "out")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_out_folder_that_cannot_be_written_is_named(world, cli, tmp_path, out):
    (tmp_path / "file").touch()
    assert_refused(cli(flags(world), tmp_path / out), "--out", str(tmp_path / out))


@pytest.mark.parametrize("flag, stage", [("--temperature=1e-40", "realign"), ("--realign-lr=1e30", "realign"),
                                         ("--lr=1e30", "fine-tune")])  # fmt: skip
def test_a_loss_that_is_not_finite_ends_the_run(world, cli, tmp_path, flag, stage):
    result = cli(flags(world, "bert", flag, "--limit-train", 100))
    assert result.code == 2 and not records(tmp_path / "out")
    assert_one_line(result.err, stage, "nan")


def test_weights_that_are_not_finite_after_the_last_step_are_no_result(world, cli, tmp_path):
    """A single step: its loss is finite, what it leaves is not."""
    result = cli(flags(world, "bert", "--strategy", "baseline", "--lr", "1e38", "--limit-train", 8))
    assert result.code == 2 and not records(tmp_path / "out")
    assert_one_line(result.err)


# ------------------------------------------------------------------------------------------ bad models


def tiny(kind: str):
    """A random model of a few thousand weights that is no encoder for this program."""
    if kind == "gpt2":
        return transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=2000))
    if kind == "llama":
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=2000, **size))
    if kind == "t5":
        return transformers.T5Model(transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    sides = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return transformers.BartModel(transformers.BartConfig(
        vocab_size=2000, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, **sides
    ))  # fmt: skip


def with_model(world: Path, model: Path | str) -> list[str]:
    argv = flags(world)
    argv[1] = str(model)
    return argv


@pytest.mark.parametrize(
    "kind, named", [("gpt2", "gpt2"), ("llama", "llama"), ("t5", "sequence-to-sequence"), ("bart", "sequence-to-seq")]
)
def test_a_decoder_or_a_sequence_to_sequence_model_is_refused(world, cli, tmp_path, kind, named):
    folder = tmp_path / kind
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        tiny(kind).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(world / "models/bert").save_pretrained(folder)
    assert_refused(cli(with_model(world, folder)), "--model", str(folder), named, folder=tmp_path / "out")


def copy_model(world: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(world / "models" / "bert", folder, ignore=shutil.ignore_patterns(*without))
    return folder


def test_a_model_without_a_fast_tokenizer_is_refused(world, cli, tmp_path):
    folder = copy_model(world, tmp_path / "slow", "tokenizer*", "special_tokens*")
    transformers.CanineTokenizer().save_pretrained(folder)  # written in Python: there is no other
    assert_refused(cli(with_model(world, folder)), "--model", str(folder), "fast tokenizer", folder=tmp_path / "out")


@pytest.mark.parametrize("without", ["config.json", "tokenizer*", "model.safetensors", "*"])
def test_a_model_folder_that_lacks_a_file_is_refused(world, cli, tmp_path, without):
    folder = copy_model(world, tmp_path / "lacking", without)
    assert_refused(cli(with_model(world, folder)), "--model", str(folder), folder=tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_with_a_broken_file_is_refused(world, cli, tmp_path, name):
    folder = copy_model(world, tmp_path / "broken")
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    assert_refused(cli(with_model(world, folder)), "--model", str(folder), folder=tmp_path / "out")


def test_a_model_folder_that_does_not_exist_is_refused(world, cli, tmp_path):
    assert_refused(
        cli(with_model(world, tmp_path / "none")), "--model", str(tmp_path / "none"), folder=tmp_path / "out"
    )


# ------------------------------------------------------------------------------------------ no network

NOWHERE = "http://127.0.0.1:9"  # refuses every connection
PROXIES = {
    name: NOWHERE for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper())
}
NO_NETWORK = {"HF_ENDPOINT": NOWHERE, "no_proxy": "", "NO_PROXY": "", **PROXIES}
CUT_OFF = {  # what is to be downloaded: (--model, are the plain files there?, environment, what the line names)
    "model, told to stay offline": ("xlm-roberta-base", False, {"HF_HUB_OFFLINE": "1"}, "--model xlm-roberta-base"),
    "model": ("xlm-roberta-base", False, {}, "--model xlm-roberta-base"),
    "treebank": ("toy", False, {}, "UD_English-EWT"),
    "parallel text, told to stay offline": ("toy", True, {"HF_HUB_OFFLINE": "1"}, "opus-100"),
    "parallel text": ("toy", True, {}, "opus-100"),
}
WITH_FILES = """
import sys
sys.path.insert(0, {root!r})
import alignfreeze
files = {{".conllu": {conllu!r}, "-de.txt": {forward!r}, "-en.txt": {backward!r}}}
alignfreeze.fetch = lambda url: alignfreeze.Path(next(path for end, path in files.items() if url.endswith(end)))
sys.exit(alignfreeze.main())
"""


@pytest.fixture(scope="module", autouse=True)
def cut_off(request, world, tmp_path_factory):
    """Processes without a network or --data-dir, started with the first test, for their attempts take time."""
    if not any("network" in item.name for item in request.session.items):
        yield {}
        return
    folder, data = tmp_path_factory.mktemp("cut-off"), world / "data"
    files = {"conllu": data / "udpos/en/test.conllu", "forward": data / "dictionary/en-qaa.txt"}
    files |= {"root": SCRIPT.parent, "backward": data / "dictionary/qaa-en.txt"}
    (folder / "with_files.py").write_text(WITH_FILES.format(**{key: str(path) for key, path in files.items()}), "utf-8")
    started = {}
    for case, (model, has_files, environment, _) in CUT_OFF.items():
        argv = ["--model", world / "models/bert" if model == "toy" else model, "--limit-test", 5, "--limit-train", 5]
        argv += ["--languages", "de", "--realign-languages", "de"]
        caches = {name: str(folder / "cache") for name in ("HF_HOME", "XDG_CACHE_HOME")}
        script = folder / "with_files.py" if has_files else SCRIPT
        started[case] = start(argv, folder / "out", script, **NO_NETWORK | caches | environment), time.time()
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("case", CUT_OFF)
def test_without_a_network_a_run_ends_within_a_minute_in_one_line(cut_off, case):
    process, began = cut_off[case]
    result = finish(process, max(1, began + 60 - time.time()))
    assert_refused(result, CUT_OFF[case][-1])
