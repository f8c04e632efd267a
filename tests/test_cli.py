"""The command line: what a run writes, when it is skipped or refused, and how errors are shown."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import alignfreeze as af

LANGUAGES = ["qaa", "qab"]
FIELDS = {field.name for field in dataclasses.fields(af.Settings)}
ELSEWHERE = "out overwrite device save_model write_links aligner_model aligner_layer".split()
ALIGNMENT = """unit layer temperature pool_first realign_languages realign_steps limit_links
realign_batch_size realign_max_length realign_lr realign_decay""".split()


class Result(NamedTuple):
    """The outcome of a command line."""

    code: int
    out: str
    err: str
    folder: Path  # of records

    def record(self) -> dict:
        (path,) = self.folder.glob("*.json")
        return json.loads(path.read_bytes())


def flags(world: Path, *words: object, **settings: object) -> list[str]:
    """Return the command line of a run that takes less than a second.

    settings: flags that are added or changed. words: more of the command line, as it is typed.
    """
    chosen = {"model": world / "models/bert", "data_dir": world / "data", "device": "cpu"}
    chosen |= {"languages": LANGUAGES, "realign_languages": LANGUAGES, "precision": "fp32"}
    chosen |= {"epochs": 1, "limit_train": 40, "limit_test": 20, "limit_links": 300} | settings
    if not {"baseline", "during", "alternate", "mid-align"} & {
        *map(str, settings.values()),
        *words,
    }:
        chosen = {"realign_steps": 2} | chosen
    typed = {str(word).split("=")[0] for word in words}
    argv = []
    for name, value in chosen.items():
        if value is not None and af.flag_of(name) not in typed:
            argv += [af.flag_of(name), *map(str, value if isinstance(value, list) else [value])]
    return [*argv, *map(str, words)]


@pytest.fixture
def run(world, capsys, tmp_path):
    """A function that calls `main` with `flags`, and records in a folder of the test."""

    def call(*words: object, out: Path = tmp_path / "out", **settings: object) -> Result:
        capsys.readouterr()
        code = af.main([*flags(world, *words, **settings), "--out", str(out)])
        return Result(code, *capsys.readouterr(), out)

    return call


@pytest.fixture
def model(world, tmp_path) -> Path:
    """A copy of a model, which a test may change."""
    shutil.copytree(world / "models/bert", tmp_path / "models/bert")
    return tmp_path / "models/bert"


@pytest.fixture
def untouched(monkeypatch):
    """Fail if weights or data are read, or if anything is trained."""

    for name in ("load_model", "load_data", "read_lines", "realign", "finetune"):
        monkeypatch.setattr(af, name, None)  # calling it is a TypeError


def assert_refused(result: Result, *parts: str, kept: tuple = (), code: int = 2) -> None:
    """One line with these parts is printed; nothing was trained, and only `kept` is in --out."""
    err = result.err
    assert result.code == code, result.out
    assert err.startswith("alignfreeze:") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert [part for part in parts if part not in err] == [], err
    assert not re.search(r"^(realign|fine-tune)\b", result.out, re.MULTILINE), "trained before"
    assert [*result.folder.glob("*")] == [*kept]


# ---- A run: its record, and errors while it runs -------------------------------------------------

STRATEGIES = [("distilbert", "emb,0-1"), ("bert", "front"), ("xlmr", "baseline")]


@pytest.mark.parametrize("model, strategy", STRATEGIES)
def test_a_run_writes_its_record_and_prints_its_table(world, run, model, strategy):
    result = run(model=world / "models" / model, strategy=strategy, seed=42)
    assert result.code == 0 and result.err == ""
    record, is_baseline = result.record(), strategy == "baseline"
    (name,) = os.listdir(result.folder)
    schedule, aligner = ("none", "none") if is_baseline else ("before", "dictionary")
    assert re.fullmatch(
        f"{model}_udpos_{strategy}_{schedule}_{aligner}_42-[0-9a-f]{{6}}.json", name
    )
    assert f"record: {result.folder / name}\n" in result.out

    identity = {"model": model, "task": "udpos", "strategy": strategy, "schedule": schedule}
    identity |= {"aligner": aligner, "seed": 42}
    rest = "scores config content steps seconds losses pairs versions device threads processes"
    assert set(record) == {*identity, *rest.split()}
    expected = {"languages": LANGUAGES, "epochs": 1, "lr": 2e-5, "precision": "fp32", **identity}
    expected |= {"data_dir": "data", "limit_train": 40, "adapter": [], "train_languages": ["en"]}
    aligned = {"realign_languages": LANGUAGES, "realign_steps": 2, "temperature": 0.1, "layer": -2}
    expected |= dict.fromkeys(ALIGNMENT) if is_baseline else aligned
    assert set(record["config"]) == FIELDS - {*ELSEWHERE}
    assert {key: record["config"][key] for key in expected} == expected
    assert {key: record[key] for key in identity} == identity

    assert list(record["scores"]) == ["en", *LANGUAGES]
    assert all(0 <= score["accuracy"] <= 1 for score in record["scores"].values())
    assert record["steps"] == {"finetune": 2} | ({} if is_baseline else {"realign": 2})
    assert set(record["losses"]) == ({"task"} if is_baseline else {"task", "align"})
    assert set(record["seconds"]) == {*record["steps"], "data", "model", "pairs", "evaluate"}
    assert list(record["pairs"]) == ([] if is_baseline else LANGUAGES)
    for counts in record["pairs"].values():
        assert counts["words"] > counts["sentences"] == 16  # two batches of two languages
    assert set(record["versions"]) > {"python", "torch", "transformers", "alignfreeze.py"}
    assert (record["device"], record["processes"]) == ("cpu", 1)
    assert os.sep not in json.dumps(record), "a path of this machine"

    rows = re.findall(r"^(\w+) +([\d.]+)$", result.out.split("\npercent\n")[1], re.MULTILINE)
    scores = {code: 100 * metrics["accuracy"] for code, metrics in record["scores"].items()}
    scores["average"] = (scores["qaa"] + scores["qab"]) / 2  # without English
    printed = {code: float(score) for code, score in rows}
    assert printed == {code: pytest.approx(score, abs=0.051) for code, score in scores.items()}
    assert ("\naligned\n" in result.out) == (not is_baseline)


STEPS = {"before": {"finetune": 4, "realign": 4}, "during": {"finetune": 4}}
STEPS |= {"alternate": {"finetune": 8}}  # half of these updates align


@pytest.mark.parametrize("schedule", STEPS)
def test_alignment_takes_as_many_steps_as_fine_tuning(run, schedule):
    record = run(schedule=schedule, epochs=2, realign_steps=None).record()
    assert record["steps"] == STEPS[schedule]
    assert set(record["losses"]) == {"task", "align"}
    assert sum(counts["sentences"] for counts in record["pairs"].values()) == 4 * 16


def test_the_same_seed_gives_the_same_record(run, tmp_path):
    result = run(seed=31)
    first = result.record() | {"seconds": 0}
    next(result.folder.iterdir()).write_text("{}")
    assert run("--overwrite", seed=31).record() | {"seconds": 0} == first
    assert run(seed=42, out=tmp_path / "other").record()["losses"] != first["losses"]


def test_two_processes_can_write_the_same_record(world, run, tmp_path):
    command = [sys.executable, af.__file__, *flags(world), "--out", tmp_path / "out"]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[1] for process in started] == ["", ""]
    (path,) = (tmp_path / "out").iterdir()
    other, here = json.loads(path.read_bytes()), run(out=tmp_path / "here").record()
    assert (other["scores"], other["content"]) == (here["scores"], here["content"])


ERRORS = [(KeyboardInterrupt(), 130, "interrupted"), (OSError("disk full"), 2, "disk full")]


@pytest.mark.parametrize("error, code, part", ERRORS)
def test_a_run_that_ends_while_it_writes_leaves_no_file(run, monkeypatch, error, code, part):
    monkeypatch.setattr(os, "replace", Mock(side_effect=error))
    assert_refused(run(strategy="baseline", epochs=0), part, code=code)


# ---- Help, defaults, and names of records --------------------------------------------------------

PAPER1 = """--strategy front --schedule before --aligner dictionary --seed 31 --lora 0 --unit word
--epochs 5 --batch-size 32 --accumulate 1 --lr 2e-5 --decay linear --warmup 0.1 --clip 0 --layer -2
--max-length 96 --realign-batch-size 16 --realign-lr 2e-5 --realign-decay constant
--temperature 0.1"""
PAPER2 = """--task massive --strategy full --schedule alternate --unit sentence --layer 16 --lora 8
--lora-alpha 16 --lr 5e-4 --batch-size 32 --accumulate 4 --seed 1 --epochs 5 --clip 1 --warmup 0.03
--decay inverse_sqrt --realign-batch-size 32 --temperature 0.1"""
CODES = """af ar bg ca cs da de el es fa fi fr he hi hu it ja ko lt lv no pl pt ro ru sk sl sv ta th
tr uk vi zh"""
XLMR, QWEN = "FacebookAI/xlm-roberta-base", "Qwen/Qwen2.5-7B-Instruct"
DEFAULTS = {
    "": f"{PAPER1} --task udpos --languages {CODES} --realign-languages {CODES}",
    f"--model {XLMR}": PAPER1.replace("2e-5", "7.5e-6"),
    "--task xnli": PAPER1.replace("--epochs 5", "--epochs 2"),
    "--method mid-align": f"--model meta-llama/Meta-Llama-3-8B-Instruct {PAPER2}",
    f"--method mid-align --model {QWEN}": f"{PAPER2} --temperature 1.5",
}


@pytest.mark.parametrize("command", DEFAULTS)
def test_the_defaults_are_those_of_the_papers_and_in_the_help(capsys, command):
    argv, paper = command.split(), DEFAULTS[command].split()
    settings = vars(af.parse_args(argv))
    assert settings == vars(af.parse_args([*argv, *paper]))
    with pytest.raises(SystemExit, match=r"^0$"):
        af.main([*argv, "--help"])
    entries = re.split(r"\n  --", capsys.readouterr().out.split("options:")[1])[1:]
    names = [re.match(r"[\w-]+", entry)[0].replace("-", "_") for entry in entries]
    entries = {name: "".join(entry.split()) for name, entry in zip(names, entries)}
    for name in FIELDS - {"method", "model", "task"}:
        is_simple = settings[name] and not isinstance(settings[name], list)
        assert (f"(default:{settings[name]})" if is_simple else "") in entries[name]


def name_of(command: str, **changes: object) -> str:
    return af.record_name(dataclasses.replace(af.parse_args(command.split()), **changes))


NAMES = {
    "": "distilbert-base-multilingual-cased_udpos_front_before_dictionary_31",
    f"--model {XLMR} --seed 42": "xlm-roberta-base_udpos_front_before_dictionary_42",
    "--model m --task xnli --strategy emb,0-2": "m_xnli_emb,0-2_before_dictionary_31",
    "--model m --strategy baseline": "m_udpos_baseline_none_none_31",
    "--model m --epochs 5 --lr 2e-5 --precision fp32": "m_udpos_front_before_dictionary_31",
    "--method mid-align": "Meta-Llama-3-8B-Instruct_massive_full_alternate_none_1",
}


@pytest.mark.parametrize("command", NAMES)
def test_a_name_without_digits_is_a_run_with_default_settings(command):
    assert name_of(command) == NAMES[command]
    assert re.fullmatch(f"{NAMES[command]}-[0-9a-f]{{6}}", name_of(command, batch_size=3))
    with pytest.raises(af.UserError, match="name is too long"):
        name_of(command, model="m" * 240)


BASES = ["", "--strategy baseline", "--strategy baseline --probe", "--unit sentence", "--lora 4"]
BASES += ["--schedule alternate", "--method mid-align", "--method mid-align --strategy front"]
BASES += ["--method mid-align --strategy baseline", "--method mid-align --task udpos --seed 31"]
BASES += ["--model meta-llama/Meta-Llama-3-8B-Instruct --task massive --seed 1 --strategy full"]


def other_value(value: object) -> object:
    """Return a value that differs from this one and has the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "other"] if isinstance(value, list) else "other"


def test_names_are_equal_only_if_all_settings_are():
    """Each setting of each base is changed, apart from method and task, which the bases change."""
    configs, changed = {}, set()
    for base in BASES:
        settings, before = af.parse_args(base.split()), name_of(base)
        for name in FIELDS - {"method", "task"}:
            other = dataclasses.replace(settings, **{name: other_value(getattr(settings, name))})
            other_name, config = af.record_name(other), af.settings_of_run(other)
            assert configs.setdefault(other_name, config) == config, f"{base}, {name}: {other_name}"
            if other_name != before:
                changed.add(name)
                assert base != "--strategy baseline" or name not in ALIGNMENT
    assert changed == FIELDS - {*ELSEWHERE, "method", "task"}


# ---- Records that exist --------------------------------------------------------------------------


class Finished:
    """A finished run on data, links and a model in one folder; from then on no model is built."""

    def __init__(self, run, data: Path, model: Path, monkeypatch):
        links = data.parent / "links"
        links.mkdir()
        (links / "en-qaa.txt").write_text("0-0\n" * 30)
        self.run, self.settings = run, {"model": model, "data_dir": data, "aligner": links}
        self.settings |= {"languages": "qaa", "realign_languages": "qaa"}
        (self.path,) = run(**self.settings).folder.glob("*.json")
        monkeypatch.setattr(af, "build_model", None)

    def again(self, *words: object, **changes: object) -> Result:
        return self.run(*words, **self.settings | changes)

    def assert_found(self, **changes: object) -> None:
        result = self.again(**changes)
        assert result.code == 0 and f"{self.path} exists: nothing to do" in result.out, result.err

    def assert_refused(self, *parts: str) -> None:
        content = self.path.read_bytes()
        assert_refused(self.again(), str(self.path), "--overwrite", *parts, kept=(self.path,))
        assert self.path.read_bytes() == content


@pytest.fixture
def finished(run, data, model, monkeypatch) -> Finished:
    return Finished(run, data, model, monkeypatch)


def test_a_run_whose_record_exists_is_skipped(finished, tmp_path, monkeypatch):
    finished.assert_found()
    refused = finished.again("--save-model", tmp_path / "new")
    assert_refused(refused, str(finished.path), "--overwrite", kept=(finished.path,))
    monkeypatch.setattr(af, "SCRIPT", "0" * 64)
    assert "another revision of alignfreeze.py made it" in finished.again().out


def test_a_setting_that_is_newer_than_a_record_has_its_default_there(finished):
    """Whoever adds a flag to the script keeps the runs that were finished before."""
    record = json.loads(finished.path.read_bytes())
    del record["config"]["temperature"]  # has its default in this run
    finished.path.write_text(json.dumps(record))
    finished.assert_found()
    del record["config"]["limit_train"]  # has another value
    finished.path.write_text(json.dumps(record))
    finished.assert_refused("other settings (limit_train)")


READ = "data/udpos/en/train.conllu data/udpos/en/test.conllu data/udpos/qaa/test.conllu"
READ += " data/parallel/en-qaa.tsv links/en-qaa.txt"
READ += " models/bert/config.json models/bert/tokenizer.json models/bert/model.safetensors"


@pytest.mark.parametrize("name", READ.split())
def test_a_run_on_other_files_of_the_same_names_and_sizes_is_refused(finished, tmp_path, name):
    content = bytearray((tmp_path / name).read_bytes())
    at = -1 if "tensors" in name else content.index(b"\n")
    content[at] = content[at] ^ 1 if "tensors" in name else ord(" ")
    (tmp_path / name).write_bytes(content)
    finished.assert_refused("other data or weights")


FOREIGN = {
    "hidden file": ["models/bert/.DS_Store", "data/udpos/qaa/.DS_Store", "links/.DS_Store"],
    "readme": ["models/bert/README.md", "data/README.md", "data/udpos/qaa/README"],
    "notes": ["models/bert/notes.txt", "data/udpos/notes.txt", "data/parallel/notes/draft.tsv"],
    "language": ["data/udpos/qab/test.conllu", "data/parallel/en-qab.tsv", "links/en-qab.txt"],
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_that_a_run_does_not_read_do_not_matter(finished, tmp_path, case):
    for name in FOREIGN[case]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("not of this run")
    finished.assert_found()


ALL = {"model": "models/bert", "data_dir": "data", "aligner": "links"}
PLACES = [(".", ALL), (".", {"data_dir": "data"}), (".", {"aligner": "links/"})]
PLACES += [("models/bert", {"model": "."}), ("links", {"aligner": "."})]
PLACES += [("data/udpos", {"data_dir": ".."}), ("linked", ALL | {"model": "bert"})]


@pytest.mark.parametrize("place, relative", PLACES)
def test_a_record_is_found_from_another_folder(finished, tmp_path, monkeypatch, place, relative):
    (tmp_path / "linked/bert").mkdir(parents=True)
    for path in (tmp_path / "models/bert").iterdir():  # as in the cache of the hub
        (tmp_path / "linked/bert" / path.name).symlink_to(path)
    for name in ("data", "links"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / name)
    monkeypatch.chdir(tmp_path / place)
    finished.assert_found(**relative)


def test_a_record_under_the_name_of_another_seed_is_refused(finished):
    finished.path = finished.path.rename(str(finished.path).replace("_31-", "_42-"))
    finished.settings["seed"] = 42
    finished.assert_refused("settings", "seed")


@pytest.mark.parametrize("key, value", [("config", {}), ("content", 0)])
def test_a_changed_record_is_refused(finished, key, value):
    record = json.loads(finished.path.read_bytes())
    finished.path.write_text(json.dumps(record | {key: value}))
    finished.assert_refused()
    del record[key]
    finished.path.write_text(json.dumps(record))
    finished.assert_refused()


CONTENTS = [b"", b'{"model": "be', b"[1]", b"\xff\xfe", b"[" * 100_000, os.mkfifo, os.mkdir]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_is_not_a_record_is_refused(finished, content):
    path = finished.path
    path.unlink()
    content(path) if callable(content) else path.write_bytes(content)
    assert_refused(finished.again(), str(path), kept=(path,))
    assert callable(content) or path.read_bytes() == content


def test_the_settings_of_the_alignment_do_not_matter_to_a_baseline(run, data, monkeypatch):
    settings = {"strategy": "baseline", "data_dir": data, "languages": "qaa"}
    assert run(**settings).code == 0
    monkeypatch.setattr(af, "build_model", None)
    (data / "parallel/en-qaa.tsv").unlink()
    settings |= {"schedule": "during", "layer": -1, "temperature": 0.2, "realign_languages": "qab"}
    result = run(**settings, realign_batch_size=8, realign_max_length=32)
    assert result.code == 0 and "nothing to do" in result.out


# ---- --save-model and --write-links --------------------------------------------------------------


def test_the_saved_encoder_is_the_realigned_one_and_can_be_loaded(world, run, tmp_path):
    folder = tmp_path / "new" / "encoder"
    assert run(strategy="front", save_model=folder).code == 0
    before = transformers.AutoModel.from_pretrained(world / "models/bert").state_dict()
    encoder, moved = transformers.AutoModel.from_pretrained(folder), set()
    for name, tensor in encoder.state_dict().items():
        if "pooler" not in name and not torch.equal(before[name], tensor):
            layer = re.search(r"layer\.(\d+)\.", name)
            moved.add(int(layer[1]) if layer else "embeddings")
    depth = encoder.config.num_hidden_layers
    assert moved == {"embeddings", *range(depth // 2, depth - 1)}  # the last one is not aligned
    again = run(model=folder, strategy="baseline", out=tmp_path / "again")
    assert again.record()["model"] == "encoder" and "pooler" not in again.out
    again = run(model=folder, task="xnli", strategy="baseline", out=tmp_path / "xnli")
    assert "encoder: has no pooler; a random one is added" in again.out


def test_the_tokenizer_is_saved_without_the_length_of_the_last_batch(run, tmp_path):
    folder = tmp_path / "encoder"
    assert run(strategy="full", unit="sentence", save_model=folder).code == 0
    assert json.loads((folder / "tokenizer.json").read_text("utf-8"))["truncation"] is None


TAKEN = [("save_model", place) for place in ("folder", "file/encoder", "out", "s" * 300)]


@pytest.mark.parametrize("flag, place", [*TAKEN, ("out", "file"), ("out", "file/below")])
def test_a_place_that_cannot_be_written_to_is_refused(run, tmp_path, untouched, flag, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    result = run(**{flag: tmp_path / place})
    assert_refused(result, f"{af.flag_of(flag)} {tmp_path / place.split('/')[0]}")


@pytest.mark.parametrize("aligner", ["none", "fastalign", "awesome"])
def test_links_are_written_and_then_trained_on(world, run, tmp_path, aligner):
    settings, links = {"aligner": aligner, "limit_links": 60}, tmp_path / "links"
    if aligner == "awesome":
        settings |= {"aligner_model": world / "models/bert", "aligner_layer": 1}
    result = run(write_links=links, **settings)
    assert result.code == 0 and "en-qab.txt: 60 sentence pairs" in result.out
    assert not result.folder.exists(), "no model may be trained"
    endings = ("json", "words.txt") if aligner == "none" else ("json", "txt", "words.txt")
    assert {*os.listdir(links)} == {f"en-{code}.{end}" for code in LANGUAGES for end in endings}
    assert (links / "en-qaa.words.txt").read_text("utf-8").count(" ||| ") == 60
    if aligner == "none":
        return
    trained = run(aligner=links, limit_links=60).record()
    assert trained["aligner"] == "links" and all(trained["pairs"][code] for code in LANGUAGES)


def test_links_serve_a_part_of_their_text_but_not_another_text(run, data, tmp_path):
    path, links = data / "parallel/en-qaa.tsv", tmp_path / "links"
    settings = {"data_dir": data, "languages": "qaa", "realign_languages": "qaa"}
    assert run(**settings, aligner="fastalign", write_links=links).code == 0
    assert run(**settings, aligner=links, limit_links=20).code == 0
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]), "utf-8")
    result = run(**settings, aligner=links, out=tmp_path / "other")
    assert_refused(result, f"{links / 'en-qaa.words.txt'}:2")


def test_links_that_exist_are_kept(world, run, tmp_path):
    links = tmp_path / "links"
    settings = {"limit_links": 20, "aligner": "fastalign", "write_links": links}
    assert run(**settings).code == 0
    content = {path: path.read_bytes() for path in links.iterdir()}
    again = run(**settings)
    assert again.code == 0 and f"{links / 'en-qab'}.* exist: nothing to do" in again.out
    encoder = {"aligner_model": world / "models/bert", "aligner_layer": 1}
    for other in ({"aligner": "awesome"} | encoder, {"limit_links": 21}):
        assert_refused(run(**settings | other), str(links / "en-qaa.txt"), "folder")
    assert {path: path.read_bytes() for path in links.iterdir()} == content
    (links / "en-qaa.json").unlink()  # now nothing says what made the links
    assert_refused(run(**settings), str(links / "en-qaa.txt"), "folder")


BAD_LINKS = {
    "--aligner links": "--aligner",  # has links of its own
    "--method mid-align": "--aligner",  # its sentences have no links
    "--limit-links -1": "--limit-links", "--limit-links 0": "--limit-links",
    "--aligner awesome --aligner-layer 99": "layer 99",
    "--aligner awesome --aligner-layer -1": "--aligner-layer",
    "--aligner awesome --aligner-model ./no/where": "--aligner-model ./no/where",
    "--realign-languages ../udpos": "../udpos", "--write-links file": "file",
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINKS)
def test_links_that_cannot_be_written_are_refused(world, run, tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("links").mkdir()
    for code in LANGUAGES:
        Path(f"links/en-{code}.txt").write_text("\n" * 300)
    encoder = {"aligner_model": world / "models/bert"} if "awesome" in bad else {}
    settings = {"aligner": "fastalign", "write_links": "new"} | encoder
    names = {af.flag_of(name): name for name in settings}
    for flag in set(bad.split()) & set(names):
        del settings[names[flag]]
    assert_refused(run(*bad.split(), **settings), BAD_LINKS[bad])
    assert not Path("new").exists() or not list(Path("new").iterdir())


# ---- Bad flags -----------------------------------------------------------------------------------

TYPES = get_type_hints(af.Settings)
MAY_BE_ZERO = "seed clip warmup lora lora_dropout epochs aligner_layer".split()


@pytest.mark.parametrize("name", TYPES)
def test_a_flag_with_a_bad_value_is_named(run, untouched, name):
    kinds, flag = get_args(TYPES[name]) or (TYPES[name],), af.flag_of(name)
    commands = [f"{flag}=x"] if bool in kinds else [flag]
    if name == "layer":
        commands += ["--layer x"]
    elif int in kinds or float in kinds:
        values = ["x", "-1", "nan", "inf", "1e99", "99999999999999999999"]
        values += [] if name in MAY_BE_ZERO else ["0"]
        commands += [f"{flag} {value}" for value in values + ["1.5"] * (float not in kinds)]
    elif isinstance(kinds[0], str):
        commands += [f"{flag} nonsense"]  # is not one of the choices
    for command in commands:
        assert_refused(run(*command.split()), flag)


BAD_FLAGS = {
    "--strategy front,back,x": "'x'", "--strategy 0-99": "0 to ", "--strategy 3-1": "3-1",
    "--strategy=": "--strategy", "--strategy 1,,2": "--strategy", "--strategy a/b": "a/b",
    "--strategy emb,full --layer 0": "--strategy", "--strategy emb,0-1 --layer 2": "--strategy",
    "--layer 99": "--layer 99", "--layer -99": "--layer -99", "surplus": "surplus",
    "--bogus": "--bogus", "--task pos": "--task", "--realign-step 1": "--realign-step",
    "--model no/such/model": "--model no/such/model", "--aligner giza": "--aligner giza",
    "--device nonsense": "--device", "--device cuda:99": "--device", "--device meta": "--device",
    "--max-length 7": "--max-length", "--task xquad --max-length 16": "--max-length",
    "--realign-max-length 9999": "--realign-max-length", "--aligner fastalign": "--write-links",
    "--languages ../udpos/qaa": "--languages", "--train-languages a/b": "--train-languages",
    "--schedule during --save-model here": "--save-model", "--lora-alpha 4": "--lora-alpha",
    "--epochs 0 --schedule during": "--epochs 0", "--adapter here": "--adapter",
    "--validate 5": "--validate", "--lora-dropout 1 --lora 4": "--lora-dropout",
    "--schedule during --realign-steps 9": "--realign-steps", "--no-pool-first": "--pool-first",
    "--aligner-model nowhere": "--aligner-model", "--aligner-layer 3": "--aligner-layer",
    "--unit sentence --aligner fastalign": "--aligner", "--strategy none": "freezes nothing",
    "--strategy front,baseline": "--strategy", "--strategy full,front": "--strategy",
    "--strategy back --layer 2": "freezes nothing", "--strategy 2,3 --layer 2": "freezes nothing",
    "--realign-languages qaa en": "'en' is aligned with",
    "--strategy emb --lora 4": "freezes nothing", "--decay constant --warmup 0.4": "--warmup",
    "--decay inverse_sqrt --warmup 0": "--warmup 0", "--aligner links/dictionary": "not named",
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_a_bad_flag_is_named(run, tmp_path, monkeypatch, untouched, bad):
    (tmp_path / "fastalign").mkdir()  # is not mistaken for the aligner
    (tmp_path / "links/dictionary").mkdir(parents=True)  # a record would name the aligner
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*bad.split()), BAD_FLAGS[bad])


@pytest.mark.parametrize(
    "flags",
    [
        "--decay constant --warmup 0",
        "--method mid-align --decay linear --warmup 0",  # --realign-decay has no effect there
        "--method mid-align --decay constant --warmup 0",
        "--method mid-align --strategy baseline --decay linear --warmup 0",
    ],
)
def test_no_warm_up_is_accepted_where_no_schedule_needs_it(flags):
    af.validate_effects(af.parse_args(flags.split()))


def test_a_link_to_a_folder_of_links_has_the_name_of_the_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dictionary").mkdir()
    (tmp_path / "mine").symlink_to("dictionary")
    af.validate_alignment(af.parse_args(["--aligner", "mine"]))
    (tmp_path / "none").symlink_to("dictionary")
    with pytest.raises(af.UserError, match="not named dictionary or none"):
        af.validate_alignment(af.parse_args(["--aligner", "./none"]))


def test_the_help_does_not_describe_a_flag_by_its_opposite(capsys):
    with pytest.raises(SystemExit):
        af.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--pool-first" in text and "--no-pool-first" not in text
    assert not af.parse_args(["--unit", "sentence", "--no-pool-first"]).pool_first


def test_the_help_begins_with_the_description_and_spells_each_flag_once(capsys):
    with pytest.raises(SystemExit):
        af.parse_args(["--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {Path(sys.argv[0]).name} [flags]\n\n{af.__doc__[:40]}")
    flags = re.findall(r"^  --[\w-]+", text, re.M)
    assert len(flags) == len(FIELDS) + 1 and "train_languages" not in text  # and --help
    both = [af.parse_args([flag, "de"]) for flag in ("--train_languages", "--train-languages")]
    assert both[0] == both[1]


def test_settings_can_be_changed_without_changing_other_defaults():
    settings = af.Settings()
    settings.languages.remove("fi")
    assert "fi" in settings.realign_languages and "fi" in af.Settings().languages


@pytest.mark.parametrize("task", [*af.TASKS])
def test_the_defaults_of_every_task_pass_the_checks_of_languages(task):
    if task == "translation":
        pytest.importorskip("sacrebleu")
    method = "mid-align" if af.TASKS[task].new_tokens else "alignfreeze"
    settings = af.parse_args(["--method", method, "--task", task])
    if task == "translation":  # not each installation can split Japanese
        settings.languages = ["en-uk"]
    af.validate_languages(settings)


def test_the_defaults_of_a_model_hold_for_its_folder_however_it_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "xlm-roberta-base"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for model in ("FacebookAI/xlm-roberta-base", str(folder), "."):
        assert af.parse_args(["--model", model]).lr == 7.5e-6


def test_a_model_may_have_the_name_of_a_method():
    settings = af.parse_args(["--model", "models/mid-align"])
    assert settings == dataclasses.replace(af.parse_args([]), model="models/mid-align")


# ---- Models that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize("removed", [r"\.layer\.2\.", "word_embeddings", "layer.1.*bias", ""])
def test_a_checkpoint_without_weights_of_the_encoder_is_refused(run, model, removed):
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(removed, name)}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    count = len([name for name in tensors if name not in kept and "pooler" not in name])
    assert_refused(run(model=model), f"--model {model}: ", f"lack {count} tensors")


CONFIGURATIONS = [
    ("num_hidden_layers", 6, "lack 32 tensors"),
    ("intermediate_size", 64, "lack 12 tensors"),
    ("vocab_size", 50, "the model has 50 embeddings"),
    ("num_hidden_layers", -1, "has no layer"),
    ("max_position_embeddings", 7, "fewer than 8 subwords"),
    ("is_decoder", True, "does not fit this task"),
    ("model_max_length", 7, "fewer than 8 subwords"),
    ("model_max_length", "many", "cannot be loaded"),
]


@pytest.mark.parametrize("key, value, part", CONFIGURATIONS)
def test_a_configuration_that_does_not_fit_is_refused(run, model, key, value, part):
    path = model / ("tokenizer_config.json" if key == "model_max_length" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: value}))
    assert_refused(run(model=model), f"--model {model}", part)


@pytest.mark.parametrize("subwords, lowers", [("A ##A", True), ("A ##A", None)])
def test_a_tokenizer_that_lower_cases_a_cased_vocabulary_is_refused(model, subwords, lowers):
    write_bert_tokenizer(model, subwords, lowers)
    with pytest.raises(af.UserError, match=r'lower-cases text, .* set "do_lower_case" to false$'):
        af.load_tokenizer(str(model))


@pytest.mark.parametrize("subwords, lowers", [("A ##A", False), ("", True), ("", None)])
def test_a_tokenizer_has_the_case_of_its_vocabulary(model, subwords, lowers):
    write_bert_tokenizer(model, subwords, lowers)
    tokenizer, _ = af.load_tokenizer(str(model))
    assert tokenizer.tokenize("Aa") == (["A", "##a"] if subwords else ["a", "##a"])


def write_bert_tokenizer(folder: Path, subwords: str, lowers: bool | None) -> None:
    """Write a tokenizer of BERT; None: its files do not say whether it lower-cases text."""
    words = f"[PAD] [UNK] [CLS] [SEP] [MASK] a ##a {subwords}".split()
    vocabulary = {word: k for k, word in enumerate(words)}
    transformers.BertTokenizer(vocabulary, do_lower_case=bool(lowers)).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) | {"do_lower_case": lowers}
    if lowers is None:
        del settings["do_lower_case"]
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("content", ["missing", "empty", "cut", "a pipe"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_with_a_missing_or_broken_file_is_refused(run, model, name, content):
    whole = (model / name).read_bytes()
    (model / name).unlink()
    if content == "a pipe":  # reading it would wait without end
        os.mkfifo(model / name)
    elif content != "missing":
        (model / name).write_bytes(whole[:100] if content == "cut" else b"")
    assert_refused(run(model=model), str(model))


def test_weights_that_are_not_numbers_are_refused(run, model):
    tensors = load_file(model / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"].fill_(float("nan"))
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert_refused(run(model=model, strategy="baseline", epochs=0), "not numbers")


def test_the_classifier_of_another_task_is_not_used(run, model):
    tagger = transformers.AutoModelForTokenClassification
    tagger.from_pretrained(model, num_labels=5).save_pretrained(model)
    result = run(model=model)
    assert result.code == 0 and result.err == ""
    assert re.search(r"another size are replaced by random ones: .*classifier.weight", result.out)
    assert "its own classifier" not in result.out


def test_a_classifier_of_the_same_size_is_named_when_it_is_used(run, model):
    tagger = transformers.AutoModelForTokenClassification
    tagger.from_pretrained(model, num_labels=18).save_pretrained(model)
    result = run(model=model)
    assert "its own classifier is used; the order of its labels must be this task's" in result.out


def test_scores_of_a_classifier_that_was_not_trained_are_named(run):
    note = "--epochs 0: the scores are those of a classifier that was not trained here"
    assert note in run(strategy="baseline", epochs=0).out
    assert note not in run(strategy="baseline").out


@pytest.mark.parametrize("flag", ["model", "aligner"])
def test_a_folder_whose_name_is_not_utf_8_causes_no_traceback(finished, monkeypatch, flag):
    monkeypatch.undo()
    folder = finished.settings[flag]
    result = finished.again(**{flag: folder.rename(os.fsdecode(os.fsencode(folder) + b"\xe9"))})
    if result.code:
        assert_refused(result, kept=(finished.path,))


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "embedding_size": 16}
GROUPS = "q_groups k_groups v_groups post_attention_groups intermediate_groups output_groups"
OTHERS = {  # architecture: (more options of its configuration, part of the error; "": it runs)
    "albert": ({}, "list of its 2 layers"),
    "squeezebert": (dict.fromkeys(GROUPS.split(), 1), "SqueezeBert"),
    "xlm": ({}, "parallel lists"),
    "deberta-v2": ({"relative_attention": True, "position_buckets": 8}, ""),
    "modernbert": ({"global_attn_every_n_layers": 1}, ""),
    "llama": ({}, "llama"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_architecture_runs_or_is_refused(run, model, kind):
    options, part = OTHERS[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    options = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | options
    config = transformers.AutoConfig.for_model(kind, **SIZES, **options)
    transformers.AutoModel.from_config(config).save_pretrained(model)
    result = run(model=model)
    if part:
        assert_refused(result, part)
    else:
        assert result.code == 0 and result.record(), result.err


# ---- What a record is compared with --------------------------------------------------------------

WORDS = "--languages de --realign-languages de"
SLOTS = f"{WORDS} --method mid-align --train-languages en --task"
DIRECTIONS = "--method mid-align --train-languages en-cs --languages en-de --realign-languages de"
MATTERS = {  # file: the flags of a run that reads it
    "data/dictionary/en-de.txt": WORDS, "data/parallel/en-de.dev.tsv": f"{WORDS} --probe",
    "data/parallel/en-de.tsv": f"{WORDS} --strategy baseline --probe",
    "data/xsid/en/valid.jsonl": f"{SLOTS} xsid", "data/uner/en/dev.jsonl": f"{SLOTS} uner",
    "data/translation/de-en/test.tsv": f"{DIRECTIONS} --task translation",
    "model/generation_config.json": WORDS, "model/chat_template.jinja": WORDS,
    "model/special_tokens_map.json": WORDS, "model/added_tokens.json": WORDS,
    "model/tokenizer_config.json": WORDS, "model/model.safetensors.index.json": WORDS,
}  # fmt: skip


@pytest.mark.parametrize("name", MATTERS)
def test_each_file_that_determines_a_result_counts_for_the_record(tmp_path, name):
    for other in MATTERS:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("one\n")
    places = ["--model", str(tmp_path / "model"), "--data-dir", str(tmp_path / "data")]
    settings = af.parse_args([*places, *MATTERS[name].split()])
    before = af.content_hash(settings)
    assert af.content_hash(settings) == before
    (tmp_path / name).write_text("two\n")
    assert af.content_hash(settings) != before


# ---- Middle-layer alignment ----------------------------------------------------------------------


def test_the_texts_that_massive_aligns_count_for_the_record(world, tmp_path):
    data = tmp_path / "data"
    for code in ("en", "qaa"):
        shutil.copytree(world / f"data/xsid/{code}", data / f"massive/{code}")
    argv = ["--method", "mid-align", "--task", "massive", "--model", str(world / "models/llama")]
    argv += ["--data-dir", str(data), "--train-languages", "qab", "--languages", "qab"]
    settings = af.parse_args([*argv, "--realign-languages", "qaa"])
    baseline = dataclasses.replace(settings, strategy="baseline")
    hashes = [(af.content_hash(settings), af.content_hash(baseline))]
    for code in ("en", "qaa"):
        (data / f"massive/{code}/train.jsonl").write_text("{}\n")
        hashes.append((af.content_hash(settings), af.content_hash(baseline)))
    assert len({aligned for aligned, _ in hashes}) == 3
    assert len({alone for _, alone in hashes}) == 1


@pytest.fixture
def slots(world, monkeypatch) -> dict:
    """The settings of a run of middle-layer alignment that takes about a second."""
    monkeypatch.setitem(af.TASKS, "xsid", af.TASKS["xsid"]._replace(new_tokens=8))
    settings = {"method": "mid-align", "task": "xsid", "model": world / "models/llama"}
    settings |= {"train_languages": "en", "languages": "qaa", "realign_languages": "qaa"}
    settings |= {"batch_size": 4, "accumulate": 2, "realign_batch_size": 4, "layer": 1, "lora": 2}
    return settings | {"max_length": 512, "limit_train": 24, "limit_test": 4}


def test_a_language_model_learns_slots_with_adapters(run, slots):
    result = run(**slots, validate=2)
    assert result.code == 0 and result.err == "" and "adapters of rank 2" in result.out
    record, (name,) = result.record(), os.listdir(result.folder)
    assert re.fullmatch(r"llama_xsid_full_alternate_none_1-[0-9a-f]{6}\.json", name)
    assert all("f1" in record["scores"][code] for code in ("en", "qaa"))
    assert record["steps"] == {"finetune": 6}  # of 2 batches; 24 examples make 6, and as many pairs
    assert set(record["losses"]) == {"task", "align"}
    assert record["pairs"]["qaa"]["sentences"] == 24
    best = record["validation"]
    assert len(best["losses"]) == 3 and best["step"] in (2, 4, 6)
    assert best["loss"] == pytest.approx(min(best["losses"]), abs=1e-5)
    refused = run(**slots, validate=99, out=result.folder / "other")
    assert_refused(refused, "--validate", "has 6 updates")


def test_a_run_that_stops_early_records_its_updates(run, slots, monkeypatch):
    task_loss, rising = af.task_loss, itertools.count(1)

    def loss(model, batch):
        return task_loss(model, batch) if model.training else torch.tensor(float(next(rising)))

    monkeypatch.setattr(af, "task_loss", loss)
    result = run(**slots, validate=1, epochs=4)
    record = result.record()
    updates = record["steps"]["finetune"]
    assert updates == len(record["validation"]["losses"]) == record["validation"]["step"] + 5 < 24
    assert f"fine-tune: {updates} steps" in result.out and "updates" not in record["validation"]


def test_adapters_are_merged_in_float32_by_default(run, slots, tmp_path, monkeypatch):
    monkeypatch.setattr(af, "fast_precision", lambda device: "bf16")
    flags = slots | {"strategy": "baseline", "precision": None}
    trained = run(**flags, save_model=tmp_path / "adapters", out=tmp_path / "trained")
    assert trained.record()["config"]["precision"] == "bf16"
    flags |= {"epochs": 0, "adapter": tmp_path / "adapters"}
    merged = run(**flags)
    assert merged.record()["config"]["precision"] == "fp32" and "bfloat16" not in merged.out
    rounded = run(**flags | {"precision": "bf16"}, out=tmp_path / "rounded")
    assert "merged with weight 1, rounded to bfloat16" in rounded.out


def test_saved_adapters_can_be_merged_and_count_for_the_record(run, slots, tmp_path):
    folder = tmp_path / "adapters"
    slots["strategy"] = "baseline"
    trained = run(**slots, save_model=folder, out=tmp_path / "trained").record()
    assert (trained["steps"], set(trained["losses"])) == ({"finetune": 3}, {"task"})
    weights = folder / "adapter_model.safetensors"
    assert sorted(folder.iterdir()) == [folder / "adapter_config.json", weights]
    merged = slots | {"epochs": 0, "adapter": f"{folder}=0.5"}
    result = run(**merged)
    assert result.code == 0 and "merged with weight 0.5; made for llama\n" in result.out
    assert result.record()["config"]["adapter"] == ["adapters=0.5"]
    assert "nothing to do" in run(**merged).out
    more = run(**slots, adapter=folder, save_model=tmp_path / "more", out=tmp_path / "second")
    assert f"use it as --adapter {folder} {tmp_path / 'more'}" in more.out
    whole = slots | {"lora": 0, "lr": 1e-4, "adapter": folder, "save_model": tmp_path / "whole"}
    assert "use it as" not in run(**whole, out=tmp_path / "third").out
    assert (tmp_path / "whole/config.json").exists()
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert_refused(run(**merged), "other data or weights", kept=(*result.folder.glob("*"),))


def test_an_error_of_text_generation_is_found_before_training(run, slots, monkeypatch):
    error = Mock(side_effect=ValueError("no such cache"))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", error)
    assert_refused(run(**slots), f"--model {slots['model']}", "no such cache")
