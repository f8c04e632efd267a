"""Files that are missing, malformed or no files at all: one line that names file and line, and nothing is trained."""

import itertools
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

import alignfreeze as af

# kind: (the file in --data-dir, good lines)
WORD = "1\tAnn\t_\tPROPN\t_\t_\t_\t_\t_\t_"
ROWS = {
    "wikiann": {"tokens": ["Ann", "left"], "ner_tags": [1, 0]},
    "xnli": {"premise": "A cat.", "hypothesis": "A dog.", "label": 2},
    "xquad": {
        "question": "Who?",
        "context": "The cat.",
        "answers": {"text": ["cat"], "answer_start": [4]},
    },
    "massive": {"text": "wake me at five", "slots": [{"type": "time", "value": "five"}]},
    "xsid": {"text": "wake me at five", "slots": [{"type": "time", "value": "five"}]},
    "uner": {"tokens": ["Ann", "left"], "tags": ["B-PER", "O"]},
}
FILES = {name: (f"{name}/xx/test.jsonl", json.dumps(row)) for name, row in ROWS.items()}
FILES |= {
    "udpos": ("udpos/xx/test.conllu", WORD),
    "translation": ("translation/en-xx/test.tsv", "A cat.\tEin Kater."),
    "parallel": ("parallel/en-xx.tsv", "A cat.\tEin Kater."),
    "dictionary": ("dictionary/en-xx.txt", "cat Kater"),
    "links": ("links/en-xx.txt", "0-0 1-1"),
}


def read(data: Path, kind: str) -> list:
    """All that is in the file of a kind."""
    if kind == "parallel":
        return list(af.parallel_text("xx", data))
    if kind == "dictionary":
        return list(af.read_dictionary("xx", data)[0])
    if kind == "links":
        anything = itertools.repeat((range(10**10), range(10**10)))
        return af.read_pharaoh(data / FILES[kind][0], anything, False, None)
    args = SimpleNamespace(data_dir=data, task=kind, syntactic_words=False)
    return list(af.TASKS[kind].load("en-xx" if kind == "translation" else "xx", "test", args))


def put(data: Path, kind: str, content: bytes) -> Path:
    path = data / FILES[kind][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def changed(kind: str, **columns: object) -> dict:
    return {**ROWS[kind], **columns}


def bad_lines() -> Iterator[tuple[str, str]]:
    """(kind, a line that is not one of it)."""
    for kind, row in ROWS.items():
        for line in ("{", "", "[]", "3", "null", '"text"', "{}", "not json", "{'a': 1}"):
            yield kind, line
        for name in row:
            yield kind, json.dumps({k: v for k, v in row.items() if k != name})
            for value in (None, {}, 1.5):
                yield kind, json.dumps(changed(kind, **{name: value}))
    for kind, word in {"xnli": "dog", "wikiann": "Ann", "massive": "wake", "uner": "Ann"}.items():
        yield kind, json.dumps(ROWS[kind]).replace(word, r"\ud800")  # half of a pair of surrogates
    for tags in (
        [7, 0],
        [-1, 0],
        [1],
        [1, 0, 0],
        ["1", 0],
        [],
        [1.0, 0],
        [None, 0],
        [[1], 0],
        [True, 0],
    ):
        yield "wikiann", json.dumps(changed("wikiann", ner_tags=tags))
    for tags in (
        ["B-PER"],
        ["B-PER", "O", "O"],
        ["PER", "O"],
        [1, 0],
        [None, "O"],
        [["O"], "O"],
        "BO",
        [],
    ):
        yield "uner", json.dumps(changed("uner", tags=tags))
    for kind in ("wikiann", "uner"):
        for tokens in (["Ann", 3], ["Ann"], "An", []):
            yield kind, json.dumps(changed(kind, tokens=tokens))
    yield "wikiann", json.dumps({"tokens": [], "ner_tags": []})
    for label in (3, -1, "0", 1.0, [1], True):
        yield "xnli", json.dumps(changed("xnli", label=label))
    for texts, starts in [
        (["cat"], [3]), (["cat"], [-4]), ([], []), (["cat", "The"], [4]), ([""], [4]), ("cat", 4), (["cat"], ["4"]),
        ([7], [4]), ([None], [4]), (["cat"], [4.0]), (["cat"], [99]), (["cat"], [True]),
    ]:  # fmt: skip
        yield "xquad", json.dumps(changed("xquad", answers={"text": texts, "answer_start": starts}))
    for answers in ({"text": ["cat"]}, "cat", [], None):
        yield "xquad", json.dumps(changed("xquad", answers=answers))
    for slots in ([3], ["time"], [{}], [{"type": "time"}], [{"type": 1, "value": "five"}], [{"type": "t", "value": ""}],
                  [{"type": "time", "value": "six"}], [ROWS["xsid"]["slots"][0]] * 2):  # fmt: skip
        yield "massive", json.dumps(changed("massive", slots=slots))
    for kind in ("massive", "xsid"):
        yield kind, json.dumps({"annot_utt": 3})  # the hub's column
    for tags in ([99, 0], [-1, 0], [True, 0], [1.0, 0], [[1], 0], [1], [], None, 3, {}):
        yield "uner", json.dumps({"tokens": ["Ann", "left"], "ner_tags": tags})
    yield "uner", json.dumps({"text": "Ann left", "entities": [{"type": "PER", "value": "Bo"}]})
    for line in ("1\tdog", WORD.replace("\t", " "), WORD + "\t_", WORD.replace("1", "one", 1), WORD.replace("Ann", ""),
                 WORD.replace("PROPN", "THING"), WORD.replace("PROPN", ""), "1.2.3" + WORD[1:]):  # fmt: skip
        yield "udpos", line
    for kind in ("parallel", "translation"):
        for line in ("A dog .", "", "A dog .\tEin Hund .\tUn chien ."):
            yield kind, line
    for line in ("dog", "the big dog", ""):
        yield "dictionary", line
    for line in ("0", "0-", "0-1-2", "a-b", "0–1", "-1-0", "0-0,1-1", "0:0", "0-9999999999"):
        yield "links", line


BAD = list(bad_lines())


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_line_is_named_by_file_and_line_in_one_line(tmp_path, kind):
    """Behind a good line, and in front of one."""
    good = FILES[kind][1]
    put(tmp_path, kind, f"{good}\n".encode())
    assert len(read(tmp_path, kind)) == 1
    lines = [line for which, line in BAD if which == kind]
    assert len(lines) >= 3
    for line in lines:
        path = put(tmp_path, kind, f"{good}\n{line}\n{good}\n".encode())
        with pytest.raises(af.UserError, match=rf"{re.escape(str(path))}:2: ") as error:
            read(tmp_path, kind)
        assert "\n" not in str(error.value), line
        assert len(str(error.value).replace(str(path), "")) < 250, line


def fifo(path: Path) -> None:
    os.mkfifo(path)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "latin-1": lambda path: path.write_bytes("café\tcafé\n".encode("latin-1")),
    "utf-16": lambda path: path.write_bytes("cat Kater\n".encode("utf-16")),
    "a folder": lambda path: path.mkdir(),
    "a pipe": fifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_of_text_is_named_and_not_waited_for(tmp_path, what):
    for kind, (name, _) in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        NO_FILES[what](path)
        with pytest.raises(af.UserError, match=re.escape(str(path))) as error:
            read(tmp_path, kind)
        assert "\n" not in str(error.value)


def test_a_treebank_without_a_sentence_is_named(tmp_path):
    path = put(tmp_path, "udpos", b"# newdoc\n\n\n")
    with pytest.raises(af.UserError, match=f"{path}: no sentence"):
        read(tmp_path, "udpos")


@pytest.mark.parametrize("kind", FILES)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, kind):
    good = FILES[kind][1]
    put(tmp_path, kind, f"{good}\n{good}\n".encode())
    expected = read(tmp_path, kind)
    put(tmp_path, kind, f"\ufeff{good}\r\n{good}\r\n".encode())
    assert read(tmp_path, kind) == expected


@pytest.mark.parametrize("kind", ["wikiann", "xnli", "xquad"])
def test_a_very_long_line_takes_time_and_memory_in_proportion(world, tmp_path, kind):
    words = ["some", "words", "cat"] * 20_000
    text = " ".join(words)
    row = {
        "wikiann": {"tokens": words, "ner_tags": [0] * len(words)},
        "xnli": {"premise": text, "hypothesis": text, "label": 0},
        "xquad": {"question": text, "context": text, "answers": {"text": ["cat"], "answer_start": [11]}},
    }[kind]
    put(tmp_path, kind, json.dumps(row).encode())
    tokenizer = AutoTokenizer.from_pretrained(world / "models/bert")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    features = list(af.TASKS[kind].encode(tokenizer, read(tmp_path, kind), 96, True))
    assert features and all(len(feature["input_ids"]) <= 96 for feature in features)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


# ---------------------------------------------------------------------------------------------- through the program


@pytest.fixture
def broken(world, tmp_path) -> Path:
    """The toy world's data, whose files are links and may be replaced."""
    data = tmp_path / "data"
    for source in (world / "data").rglob("*.*"):
        target = data / source.relative_to(world / "data")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    return data


CASES = {  # what is run, the file, its new content or None, the line that is named
    "training data": ("xnli", "xnli/en/train.jsonl", '{"premise": 1}\n', 1),
    "test data": ("wikiann", "wikiann/qaa/test.jsonl", json.dumps(ROWS["wikiann"]) + "\n{}\n", 2),
    "treebank": ("udpos", "udpos/qaa/test.conllu", "1\tAnn\n", 1),
    "answers": ("xquad", "xquad/qaa/test.jsonl", "[]\n", 1),
    "parallel text": ("udpos", "parallel/en-qaa.tsv", "a\tb\nno tab\n", 2),
    "dictionary": ("udpos", "dictionary/en-qaa.txt", "one two three\n", 1),
    "missing": ("udpos", "udpos/qaa/test.conllu", None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_before_any_training(world, broken, tmp_path, capsys, case):
    task, name, content, line = CASES[case]
    path = broken / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    argv = [
        "--model",
        world / "models/bert",
        "--data-dir",
        broken,
        "--task",
        task,
        "--out",
        tmp_path / "out",
    ]
    argv += "--languages qaa --realign-languages qaa --epochs 1 --realign-steps 2 --device cpu".split()
    assert af.main([*map(str, argv), "--limit-train", "64", "--limit-test", "10"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("alignfreeze: ") and err.count("\n") == 1
    assert f"{path}:{line}:" in err if line else str(path) in err
    assert not re.search(r"^(realign|fine-tune)\b", out + err, re.MULTILINE)
    assert not list((tmp_path / "out").glob("**/*.json"))


def test_a_folder_of_any_name_can_be_named_in_an_error(world, tmp_path):
    """Without a traceback, in the plainest of locales."""
    data = os.fsencode(tmp_path) + b"/caf\xe9"
    argv = [sys.executable, af.__file__, "--model", str(world / "models/bert"), "--data-dir", data]
    argv += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(argv, env=os.environ | {"LC_ALL": "C"}, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and rb"caf\udce9/udpos/en/train.conllu" in done.stderr
