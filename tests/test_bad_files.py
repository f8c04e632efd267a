"""Bad input files: an error of one line names the file and the line, before anything is trained."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

import alignfreeze as af

WORD = "1\tAnn\t_\tPROPN\t_\t_\t_\t_\t_\t_"
COMMAND = {"text": "wake me at five", "slots": [{"type": "time", "value": "five"}]}
ROWS = {
    "wikiann": {"tokens": ["Ann", "left"], "ner_tags": [1, 0]},
    "xnli": {"premise": "A cat.", "hypothesis": "A dog.", "label": 2},
    "xquad": {
        "question": "Who?", "context": "The cat.",
        "answers": {"text": ["cat"], "answer_start": [4]},
    },
    "massive": COMMAND,
    "xsid": COMMAND,
    "uner": {"tokens": ["Ann", "left"], "tags": ["B-PER", "O"]},
}  # fmt: skip
FILES = {name: (f"{name}/xx/test.jsonl", json.dumps(row)) for name, row in ROWS.items()}
FILES |= {
    "udpos": ("udpos/xx/test.conllu", WORD),
    "translation": ("translation/en-xx/test.tsv", "A cat.\tEin Kater."),
    "parallel": ("parallel/en-xx.tsv", "A cat.\tEin Kater."),
    "dictionary": ("dictionary/en-xx.txt", "cat Kater"),
    "links": ("links/en-xx.txt", "0-0 1-1"),
}  # kind: (its file in --data-dir, a good line)


def read(data: Path, kind: str) -> list:
    """Read the file of a kind to its end."""
    settings = af.Settings(task=kind, data_dir=data)
    if kind == "parallel":
        return list(af.parallel_lines("xx", settings, "train"))
    if kind == "dictionary":
        return list(af.read_dictionary("xx", data)[0])
    if kind == "links":  # of a text with as many lines, each sentence of which has 9 words
        path = data / FILES[kind][0]
        count = path.read_bytes().count(b"\n") if path.is_file() else 0
        text = SimpleNamespace(language="xx", part="train", settings=af.Settings())
        text.lines = lambda: itertools.repeat(("", ""), count)
        text.words = lambda line: (["cat"] * 9, ["Kater"] * 9)
        return af.read_links(data / "links", text)
    return list(af.TASKS[kind].load("en-xx" if kind == "translation" else "xx", "test", settings))


def put(data: Path, kind: str, content: str) -> Path:
    path = data / FILES[kind][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


# ---- Every reader: lines that do not have the format ---------------------------------------------


def bad_lines() -> Iterator[tuple[str, str]]:
    """Yield (kind, a line that does not have the format of this kind)."""

    def changed(kind: str, **columns) -> tuple[str, str]:
        return kind, json.dumps(ROWS[kind] | columns)

    for kind, row in ROWS.items():
        for line in ("{", "", "[]", "3", "null", '"text"', "{}", "not json", "{'a': 1}"):
            yield kind, line
        for name in row:
            yield kind, json.dumps({key: value for key, value in row.items() if key != name})
            for value in (None, {}, 1.5):
                yield changed(kind, **{name: value})
    for kind, word in {"xnli": "dog", "wikiann": "Ann", "massive": "wake", "uner": "Ann"}.items():
        yield kind, json.dumps(ROWS[kind]).replace(word, r"\ud800")  # half of a surrogate pair
    for first in (7, -1, "1", 1.0, None, [1], True):
        yield changed("wikiann", ner_tags=[first, 0])
    for tags in ([1], [1, 0, 0], []):
        yield changed("wikiann", ner_tags=tags)
    yield changed("wikiann", tokens=[], ner_tags=[])
    for first in ("PER", 1, None, ["O"]):
        yield changed("uner", tags=[first, "O"])
    for tags in (["B-PER"], ["B-PER", "O", "O"], "BO", []):
        yield changed("uner", tags=tags)
    for kind in ("wikiann", "uner"):
        for tokens in (["Ann", 3], ["Ann"], "An", []):
            yield changed(kind, tokens=tokens)
    for label in (3, -1, "0", 1.0, [1], True):
        yield changed("xnli", label=label)
    for start in (3, -4, "4", 4.0, 99, True):
        yield changed("xquad", answers={"text": ["cat"], "answer_start": [start]})
    for texts in ([], ["cat", "The"], [""], [7], [None], "cat"):
        yield changed("xquad", answers={"text": texts, "answer_start": [4]})
    for answers in ({"text": [], "answer_start": []}, {"text": ["cat"]}, "cat", []):
        yield changed("xquad", answers=answers)
    time = {"type": "time", "value": "five"}
    for slots in ([3], ["time"], [{}], [{"type": "time"}], [time | {"type": 1}], [time, time]):
        yield changed("massive", slots=slots)
    for value in ("", "six"):
        yield changed("xsid", slots=[time | {"value": value}])
    for line in ("1\tdog", WORD.replace("\t", " "), WORD + "\t_", "1.2.3" + WORD[1:], "one" + WORD):
        yield "udpos", line
    for line in (WORD.replace("Ann", ""), WORD.replace("PROPN", ""), WORD.replace("PROPN", "NN")):
        yield "udpos", line
    for kind in ("parallel", "translation"):
        for line in ("A dog .", "", "A dog .\tEin Hund .\tUn chien ."):
            yield kind, line
    for line in ("dog", "the big dog", ""):
        yield "dictionary", line
    for line in ("0", "0-", "0-1-2", "a-b", "0–1", "-1-0", "0-0,1-1", "0:0", "0-9999999999", "0-9"):
        yield "links", line


BAD_LINES = list(bad_lines())


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_line_between_good_lines_is_named(tmp_path, kind):
    good = FILES[kind][1]
    put(tmp_path, kind, f"{good}\n")
    assert len(read(tmp_path, kind)) == 1
    lines = [line for which, line in BAD_LINES if which == kind]
    assert len(lines) >= 3
    for line in lines:
        path = put(tmp_path, kind, f"{good}\n{line}\n{good}\n")
        with pytest.raises(af.UserError, match=rf"{re.escape(str(path))}:2: ") as error:
            read(tmp_path, kind)
        assert "\n" not in str(error.value), line
        assert len(str(error.value).replace(str(path), "")) < 250, line


NOT_TEXT: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "latin-1": lambda path: path.write_bytes("café\tcafé\n".encode("latin-1")),
    "utf-16": lambda path: path.write_bytes("cat Kater\n".encode("utf-16")),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,  # reading it would wait without end
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a broken link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_a_path_that_is_not_a_text_file_is_named(tmp_path, case):
    for kind, (name, _) in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        NOT_TEXT[case](path)
        with pytest.raises(af.UserError, match=re.escape(str(path))) as error:
            read(tmp_path, kind)
        assert "\n" not in str(error.value)


def test_a_treebank_without_a_sentence_is_named(tmp_path):
    path = put(tmp_path, "udpos", "# newdoc\n\n\n")
    with pytest.raises(af.UserError, match=f"{path}: .*no sentence"):
        read(tmp_path, "udpos")


@pytest.mark.parametrize("kind", FILES)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, kind):
    first = FILES[kind][1]
    second = first.replace("1\t", "2\t")  # a treebank numbers its words
    put(tmp_path, kind, f"{first}\n{second}\n")
    expected = read(tmp_path, kind)
    put(tmp_path, kind, f"\ufeff{first}\r\n{second}\r\n")
    assert read(tmp_path, kind) == expected


def memory(name: str) -> int:
    """Return a line of /proc/self/status, such as VmRSS or its peak VmHWM, in KB."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)[1])


def reset_peak() -> int:
    """Forget the peaks of earlier tests, which could hide that of this one; return what is used."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system does not let a process reset its peak of memory")
    return memory("VmRSS")


@pytest.mark.parametrize("kind", ["wikiann", "xnli", "xquad"])
def test_a_very_long_line_takes_little_memory(world, tmp_path, kind):
    words = ["some", "words", "cat"] * 20_000
    text = " ".join(words)
    answers = {"text": ["cat"], "answer_start": [11]}
    row = {
        "wikiann": {"tokens": words, "ner_tags": [0] * len(words)},
        "xnli": {"premise": text, "hypothesis": text, "label": 0},
        "xquad": {"question": text, "context": text, "answers": answers},
    }[kind]
    put(tmp_path, kind, json.dumps(row))
    tokenizer = AutoTokenizer.from_pretrained(world / "models/bert")
    before = reset_peak()
    features = list(af.TASKS[kind].encode(tokenizer, read(tmp_path, kind), 96, True))
    assert features and all(len(feature["input_ids"]) <= 96 for feature in features)
    assert memory("VmHWM") - before < 500_000  # KB


# ---- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def broken(world, tmp_path) -> Path:
    """The toy world's data as links to its files; a test may replace the links."""
    data = tmp_path / "data"
    for source in (world / "data").rglob("*.*"):
        target = data / source.relative_to(world / "data")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    return data


CASES = {  # (task, file, its content, line that is named); None: no file
    "training data": ("xnli", "xnli/en/train.jsonl", '{"premise": 1}\n', 1),
    "test data": ("wikiann", "wikiann/qaa/test.jsonl", json.dumps(ROWS["wikiann"]) + "\n{}\n", 2),
    "treebank": ("udpos", "udpos/qaa/test.conllu", "1\tAnn\n", 1),
    "answers": ("xquad", "xquad/qaa/test.jsonl", "[]\n", 1),
    "parallel text": ("udpos", "parallel/en-qaa.tsv", "a\tb\nno tab\n", 2),
    "dictionary": ("udpos", "dictionary/en-qaa.txt", "one two three\n", 1),
    "missing": ("udpos", "udpos/qaa/test.conllu", None, None),
    "a pipe": ("udpos", "parallel/en-qaa.tsv", os.mkfifo, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_before_training(world, broken, tmp_path, capsys, case):
    task, name, content, line = CASES[case]
    path = broken / name
    path.unlink()
    if callable(content):
        content(path)
    elif content is not None:
        path.write_text(content)
    argv = ["--model", world / "models/bert", "--data-dir", broken, "--out", tmp_path / "out"]
    argv += f"--task {task} --languages qaa --realign-languages qaa --epochs 1".split()
    argv += "--realign-steps 2 --device cpu --limit-train 64 --limit-test 10".split()
    assert af.main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("alignfreeze: ") and err.count("\n") == 1
    assert (f"{path}:{line}:" if line else str(path)) in err
    assert not re.search(r"^(realign|fine-tune)\b", out + err, re.MULTILINE)
    assert not list((tmp_path / "out").glob("**/*.json"))


def test_a_name_that_is_not_utf_8_is_shown_in_any_locale(world, tmp_path):
    data = os.fsencode(tmp_path) + b"/caf\xe9"
    argv = [sys.executable, af.__file__, "--model", str(world / "models/bert"), "--data-dir", data]
    argv += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(argv, env=os.environ | {"LC_ALL": "C"}, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert rb"caf\udce9/udpos/en/train.conllu" in done.stderr
