"""Runs without --data-dir, against a local server that stands in for the hub and other hosts.

The server has every data set in the layout and the columns of its real repository, filled with
sentences of the toy world, and a tiny encoder under the id of XLM-R. The libraries read addresses
and cache folders from the environment when they are imported. Therefore one separate process does a
list of runs: it points the module's two addresses of plain files to the server, and then calls
`main`. The data sets of tasks that generate text are replaced by single rows.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest

import alignfreeze as af

ROOT = Path(af.__file__).parent
MODEL = "FacebookAI/xlm-roberta-base"
COMMIT, NEWER_COMMIT = "c0ffee" + 34 * "0", "decaf" + 35 * "0"
CLASSIFICATION = [name for name, task in af.TASKS.items() if not task.new_tokens]
REPEATED = ("udpos", "xquad")  # tasks that are run a second time, without the server
# language on the server: language of the toy world
LANGUAGES = {"en": "en", "de": "qaa", "fr": "qab", "es": "qaa", "ru": "qac"}

# ---- The content of the server -------------------------------------------------------------------


def class_label(names: str) -> dict:
    numbered = {str(number): name for number, name in enumerate(names.split())}
    return {"class_label": {"names": numbered}}


TEXT, TEXTS = {"dtype": "string"}, {"sequence": "string"}
ANSWER_COLUMNS = [{"name": "text", "dtype": "string"}, {"name": "answer_start", "dtype": "int32"}]
XQUAD = {"id": TEXT, "context": TEXT, "question": TEXT, "answers": {"sequence": ANSWER_COLUMNS}}
NER = {"sequence": class_label("O B-PER I-PER B-ORG I-ORG B-LOC I-LOC")}
NLI = {"dtype": class_label("entailment neutral contradiction")}
DATA_SETS = {  # id: (pattern of the configurations, splits, columns as a card describes them)
    "Helsinki-NLP/opus-100": ("{0}-{1}", "test train validation", {"translation": {}}),
    "unimelb-nlp/wikiann": (
        "{2}",
        "validation test train",
        {"tokens": TEXTS, "ner_tags": NER, "langs": TEXTS, "spans": TEXTS},
    ),
    "facebook/xnli": (
        "{2}",
        "train test validation",
        {"premise": TEXT, "hypothesis": TEXT, "label": NLI},
    ),
    "rajpurkar/squad": ("plain_text", "train validation", XQUAD | {"title": TEXT}),
    "google/xquad": ("xquad.{2}", "validation", XQUAD),
}
WRONG_NAMES = {  # of the columns in Spanish, so that the expected column is missing
    "translation": "text",
    "ner_tags": "tag_numbers",
    "label": "gold_label",
    "answers": "answer",
}


def rows_of(world: Path, name: str, language: str, split: str) -> list[dict]:
    """Return some rows of a data set, in its columns."""
    code = LANGUAGES[language]
    if name == "Helsinki-NLP/opus-100":
        text = (world / f"data/parallel/en-{code}.tsv").read_text("utf-8")
        lines = text.splitlines()
        # The splits must differ, as equal files would be downloaded once.
        lines = {"test": lines[:20], "validation": lines[20:40], "train": lines[40:]}[split]
        pairs = [line.split("\t") for line in lines]
        return [{"translation": {"en": english, language: other}} for english, other in pairs]
    task = "xquad" if "squad" in name else name.split("/")[1]
    part = "train" if split == "train" and language == "en" else "test"
    text = (world / "data" / task / code / f"{part}.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()[:200]]
    for row in rows:
        if name == "unimelb-nlp/wikiann":
            row |= {"langs": [language] * len(row["tokens"]), "spans": []}
        elif name == "rajpurkar/squad":
            row["title"] = "Toys"
    return rows


def write_data_set(world: Path, folder: Path, name: str) -> None:
    """Write a repository: a parquet file for each configuration and split, and their card."""
    pattern, splits, columns = DATA_SETS[name]
    card: dict[str, list] = {"dataset_info": [], "configs": []}
    languages = list(LANGUAGES)
    if name == "rajpurkar/squad":
        languages = ["en"]
    elif name == "Helsinki-NLP/opus-100":
        languages.remove("en")
    for language in languages:
        pair = sorted(("en", language))
        config, names = pattern.format(*pair, language), WRONG_NAMES if language == "es" else {}
        types = dict(columns)
        if "translation" in types:
            types["translation"] = {"dtype": {"translation": {"languages": pair}}}
        features = [{"name": names.get(column, column), **kind} for column, kind in types.items()]
        schema = datasets.Features._from_yaml_list(features)
        sizes, files = [], []
        for split in splits.split():
            rows = rows_of(world, name, language, split)
            rows = [{names.get(key, key): value for key, value in row.items()} for row in rows]
            path = folder / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows, schema).to_parquet(path)
            size = {"num_bytes": path.stat().st_size, "num_examples": len(rows)}
            sizes.append({"name": split, **size})
            files.append({"split": split, "path": f"{config}/{split}-*"})
        card["dataset_info"].append({"config_name": config, "features": features, "splits": sizes})
        card["configs"].append({"config_name": config, "data_files": files})
    text = f"---\n{json.dumps(card)}\n---\n# A data set\n"  # JSON is valid YAML
    (folder / "README.md").write_text(text, "utf-8")


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    """Return the folder that is served.

    Arabic is missing everywhere, Spanish lacks a column, and Russian downloads break off.
    """
    folder = tmp_path_factory.mktemp("served")
    datasets.disable_progress_bars()
    for name in DATA_SETS:
        write_data_set(world, folder / "datasets" / name, name)
    datasets.enable_progress_bars()
    shutil.copytree(world / "models/xlmr", folder / "models" / MODEL)
    for language, code in LANGUAGES.items():
        treebank = af.TREEBANKS[language]
        target = folder / f"UD_{treebank}/r2.7"
        target.mkdir(parents=True, exist_ok=True)
        for path in (world / "data/udpos" / code).iterdir():
            name = f"{language}_{treebank.split('-')[1].lower()}-ud-{path.name}"
            shutil.copy(path, target / name)
        if code != "en":
            shutil.copy(world / f"data/dictionary/en-{code}.txt", folder / f"en-{language}.txt")
    return folder


# ---- The server ----------------------------------------------------------------------------------

RUSSIAN = re.compile(r"[/.-]ru[/._-]")
ADDRESS = re.compile(
    r"/(api/)?(datasets/|models/)?([\w.-]+/[\w.-]+?)(?:/(resolve|tree|revision)/(\w+)/?(.*))?"
)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: /<id>/resolve/<revision>/<path>, and listings under /api.

    Large files, and those of the other hosts, are at /files/<path>.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.server.requests.append((self.command, path))
        if path == "/":
            return self.answer(200)
        if path.startswith("/files/"):
            return self.send_file(self.server.folder / path.removeprefix("/files/"))
        if re.match(r"(/api/models)?/xlm-roberta-base\b", path):  # the model's former id
            return self.answer(307, Location=self.path.replace("xlm-roberta-base", MODEL, 1))
        api, kind, name, verb, _, inner = ADDRESS.fullmatch(path).groups(default="")
        top = self.server.folder / (kind or "models") / name
        if not top.is_dir():  # the hub does not reveal whether a repository is private
            self.answer(401, b'{"error": "Invalid username or password."}')
        elif verb == "tree" and (top / inner).is_dir():
            is_recursive = "recursive=true" in query
            paths = (top / inner).rglob("*") if is_recursive else (top / inner).iterdir()
            self.send_json([self.entry(path, top) for path in sorted(paths)])
        elif api and verb != "tree":
            names = [str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()]
            siblings = [{"rfilename": name} for name in names]
            self.send_json({"id": name, "sha": self.server.commit, "siblings": siblings})
        else:
            self.send_file(top / inner, large=(".parquet", ".safetensors"))

    do_HEAD = do_GET

    def entry(self, path: Path, top: Path) -> dict:
        kind = "directory" if path.is_dir() else "file"
        name, size = str(path.relative_to(top)), path.stat().st_size
        return {"type": kind, "path": name, "size": size, "oid": self.server.commit}

    def send_file(self, path: Path, large: tuple[str, ...] = ()):
        if not path.is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit}
            return self.answer(404, b"Entry not found", **headers)
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.commit}
        if path.suffix in large:  # another host has these
            url = f"http://{self.headers['Host']}/files/{path.relative_to(self.server.folder)}"
            linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            return self.answer(302, Location=url, **headers | linked)
        self.answer(200, content, **headers)

    def send_json(self, value: object):
        self.answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = bool(RUSSIAN.search(self.path))
        if self.command == "GET":
            is_broken = self.close_connection and status == 200
            self.wfile.write(content[: len(content) // 2] if is_broken else content)

    def log_message(self, *args):
        pass


def serve(folder: Path, commit: str = COMMIT) -> http.server.ThreadingHTTPServer:
    """Start a server; its list `requests` holds (method, path) of each request.

    commit: of the main branch of all repositories.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.commit, server.requests = folder, commit, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def close(server: http.server.ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


# ---- The runs ------------------------------------------------------------------------------------

DRIVER = """
import json, sys, time
root, host, runs = sys.argv[1:4]
sys.path.insert(0, root)
import alignfreeze
alignfreeze.UD_URL = host + "/files/UD_{}/r2.7/{}_{}-ud-{}.conllu"
alignfreeze.MUSE_URL = host + "/files/{}-{}.txt"
if "hasty" in sys.argv[4:]:  # the libraries wait half a minute before they retry a broken download
    time.sleep = lambda seconds: None
for argv in json.loads(runs):
    code = alignfreeze.main(argv)
    for stream in sys.stdout, sys.stderr:
        print(end=f"<{code}>", file=stream, flush=True)
"""
FLAGS = """--model xlm-roberta-base --device cpu --languages de --realign-languages de fr
--realign-steps 3 --epochs 1 --limit-train 32 --limit-test 16""".split()


class Result(NamedTuple):
    """The outcome of a command line."""

    code: int
    out: str
    err: str


def only_record(folder: Path) -> dict:
    """Return the record of a folder that has just one."""
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text("utf-8"))


def assert_refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one line with these parts, before training."""
    assert result.code == 2, result.out
    assert result.err.startswith("alignfreeze: ") and result.err.count("\n") == 1
    for part in parts:
        assert part in result.err
    assert not re.search(r"^(realign|fine-tune)\b", result.out, re.MULTILINE)


def without(flags: list[str], others: list[str]) -> list[str]:
    """Return the flags, with their values, that are not among the others."""
    kept, is_kept = [], True
    for word in flags:
        is_kept = word not in others if word.startswith("--") else is_kept
        kept += [word] * is_kept
    return kept


def run(server, caches: Path, runs: dict[str, list], *options: str, **more: str) -> dict:
    """Do runs, {name: more flags}, in one process; their records go to `caches / name`.

    Returns {name: Result}.
    """
    host = f"http://127.0.0.1:{server.server_port}"
    environment = {
        "HF_ENDPOINT": host, "HF_HOME": f"{caches}/hub", "XDG_CACHE_HOME": f"{caches}/plain",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0", "no_proxy": "*", "NO_PROXY": "*",
    }  # fmt: skip
    argvs = []
    for name, flags in runs.items():
        argvs.append([*without(FLAGS, flags), "--out", str(caches / name), *flags])
    command = [sys.executable, "-c", DRIVER, str(ROOT), host, json.dumps(argvs), *options]
    pipes = {"capture_output": True, "text": True}
    process = subprocess.run(command, env=os.environ | environment | more, timeout=300, **pipes)
    assert process.returncode == 0, process.stderr
    outs, errs = (re.split(r"<(\d+)>", text) for text in (process.stdout, process.stderr))
    results = zip(runs, outs[1::2], outs[::2], errs[::2])
    return {name: Result(int(code), out, err) for name, code, out, err in results}


@pytest.fixture(scope="module")
def online(folder, tmp_path_factory):
    """Run all tasks with a server; return (results, records, the server, folder of caches)."""
    caches, server = tmp_path_factory.mktemp("whole"), serve(folder)
    results = run(server, caches, {task: ["--task", task] for task in CLASSIFICATION})
    close(server)
    records = {}
    for task, result in results.items():
        if result.code == 0:
            records[task] = only_record(caches / task)
    return results, records, server, caches


@pytest.fixture(scope="module")
def offline(online):
    """Repeat some tasks after the server was closed; also start a run whose record exists."""
    _, _, server, caches = online
    runs = {f"{task} again": ["--task", task] for task in REPEATED}
    runs["existing record"] = ["--out", str(caches / "udpos")]
    return run(server, caches, runs, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_a_whole_run_takes_model_and_data_from_the_hub(online, task):
    results, records, *_ = online
    assert results[task].code == 0 and results[task].err == ""
    assert list(records[task]["scores"]) == ["en", "de"]
    assert records[task]["model"] == "xlm-roberta-base"
    assert list(records[task]["pairs"]) == ["de", "fr"]


def test_parallel_text_is_downloaded_once_for_all_tasks(online):
    _, _, server, _ = online
    urls = [
        path for method, path in server.requests if method == "GET" and path.startswith("/files/")
    ]
    names = [path.split("opus-100/")[1] for path in urls if "opus-100/" in path]
    assert len(names) == len(set(names))
    assert {"de-en/train-00000-of-00001.parquet", "en-fr/train-00000-of-00001.parquet"} <= {*names}
    assert {name.split("/")[0] for name in names} == {"de-en", "en-fr"}


@pytest.mark.parametrize("task", REPEATED)
def test_a_second_run_needs_no_network(online, offline, task):
    _, records, _, caches = online
    result = offline[f"{task} again"]
    assert result.code == 0 and result.err == ""
    record = only_record(caches / f"{task} again")
    assert record | {"seconds": None} == records[task] | {"seconds": None}


def test_the_record_of_a_model_of_the_hub_is_found_again_without_a_network(offline):
    result = offline["existing record"]
    assert result.code == 0 and result.err == ""
    assert "nothing to do" in result.out and "fine-tune" not in result.out


# ---- Missing and broken data ---------------------------------------------------------------------

CONFIGURATIONS = {
    "wikiann": "unimelb-nlp/wikiann {}",
    "xnli": "facebook/xnli {}",
    "xquad": "google/xquad xquad.{}",
}
FAULTS = {  # name: (more flags, what the message names); LINKS and MODEL stand for paths
    "udpos, test in ar": (["--languages", "ar"], "UD_Arabic-PADT"),
    "udpos, test in ru": (["--languages", "ru"], "UD_Russian-GSD"),
    "dictionary of ar": (["--realign-languages", "ar"], "en-ar.txt"),
    "dictionary of ru": (["--realign-languages", "ru"], "en-ru.txt"),
}
for _task, _name in CONFIGURATIONS.items():
    for _code in ("ar", "es", "ru"):
        _flags = ["--task", _task, "--languages", _code]
        FAULTS[f"{_task}, test in {_code}"] = _flags, _name.format(_code)
for _code, _pair in {"ar": "ar-en", "es": "en-es", "ru": "en-ru"}.items():
    _flags = ["--realign-languages", _code, "--aligner", "LINKS"]
    FAULTS[f"parallel text of {_code}"] = _flags, f"opus-100 {_pair}"
NOTHING_SERVED = {
    "wikiann": (["--task", "wikiann", "--model", "MODEL"], "unimelb-nlp/wikiann en"),
    "xnli": (["--task", "xnli", "--model", "MODEL"], "facebook/xnli en"),
    "xquad": (["--task", "xquad", "--model", "MODEL"], "rajpurkar/squad"),
    "model": (["--model", "toy/no-such-model"], "--model toy/no-such-model"),
}


@pytest.fixture(scope="module")
def failed_runs(world, folder, online, offline, tmp_path_factory) -> dict[str, tuple]:
    """Return {name: (result, folder for the record)}.

    The first server has a newer commit of everything, and the caches are those of earlier runs; the
    second server has nothing.
    """
    links, empty = tmp_path_factory.mktemp("links"), tmp_path_factory.mktemp("empty")
    for code in ("ar", "es", "ru"):
        (links / f"en-{code}.txt").write_text("0-0\n")
    paths = {"LINKS": str(links), "MODEL": str(world / "models/xlmr")}
    *_, caches = online
    runs = {name: [paths.get(flag, flag) for flag in flags] for name, (flags, _) in FAULTS.items()}
    runs["newer commit"] = ["--out", str(caches / "udpos")]
    results = {}
    server = serve(folder, NEWER_COMMIT)
    for name, result in run(server, caches, runs, "hasty").items():
        results[name] = result, caches / name
    close(server)
    runs = {}
    for name, (flags, _) in NOTHING_SERVED.items():
        runs[name] = [paths.get(flag, flag) for flag in flags]
    server = serve(empty)
    for name, result in run(server, empty, runs, "hasty").items():
        results[name] = result, empty / name
    close(server)
    return results


@pytest.mark.parametrize("case", FAULTS | NOTHING_SERVED)
def test_missing_or_broken_data_are_named_in_one_line(failed_runs, case):
    """Arabic is missing, Spanish lacks a column, and Russian downloads break off."""
    result, out = failed_runs[case]
    _, name = (FAULTS | NOTHING_SERVED)[case]
    assert_refused(result, name)
    assert not list(out.glob("*.json"))


def test_a_record_made_with_another_commit_of_the_model_is_refused(online, failed_runs):
    _, records, _, caches = online
    result, _ = failed_runs["newer commit"]
    assert_refused(result, "other data or weights", "--overwrite")
    assert only_record(caches / "udpos") == records["udpos"]


def test_a_plain_file_is_downloaded_once_and_a_broken_download_leaves_nothing(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(af, "CACHE", tmp_path)
    server = serve(folder)
    host = f"http://127.0.0.1:{server.server_port}/files"
    for _ in range(2):
        content = af.fetch(f"{host}/en-de.txt").read_bytes()
        assert content == (folder / "en-de.txt").read_bytes()
    assert len(server.requests) == 1
    before = sorted(tmp_path.iterdir())
    for name in ("en-ru.txt", "en-ar.txt"):  # the first breaks off, the second does not exist
        with pytest.raises(af.UserError, match=rf"{host}/{name}.*download"):
            af.fetch(f"{host}/{name}")
    assert sorted(tmp_path.iterdir()) == before
    close(server)


# ---- Arguments of load_dataset, and the rows it returns ------------------------------------------


@pytest.mark.parametrize("part, split", [("train", "train"), ("dev", "validation")])
@pytest.mark.parametrize("language, config", [("de", "de-en"), ("fr", "en-fr")])
def test_parallel_text_of_the_hub_has_english_first(monkeypatch, language, config, part, split):
    requests = []
    rows = [{"translation": {language: f"other {k}", "en": f"line {k}"}} for k in range(5)]
    monkeypatch.setattr(datasets, "load_dataset", lambda **hub: requests.append(hub) or rows)
    text = af.ParallelText(language, af.Settings(unit="sentence", limit_links=3), part)
    assert list(text.lines()) == [(f"line {k}", f"other {k}") for k in range(3)]
    assert requests == [{"path": "Helsinki-NLP/opus-100", "name": config, "split": split}]
    rows[1]["translation"]["en"] = None
    with pytest.raises(af.UserError, match=rf"opus-100 {config} {split}, row 1: no column 'en'"):
        list(text.lines())


def test_a_text_of_the_hub_is_read_again_when_it_ends(monkeypatch):
    rows = [{"translation": {"en": f"line {k}", "de": f"Zeile {k}"}} for k in range(4)]
    monkeypatch.setattr(datasets, "load_dataset", lambda **hub: rows)
    stream = af.ParallelText("de", af.Settings(unit="sentence")).stream()
    for reading in (1, 2, 3):
        pairs = [next(stream) for _ in rows]
        assert {pair.reading for pair in pairs} == {reading}
        expected = [(row["translation"]["en"], row["translation"]["de"]) for row in rows]
        assert sorted((pair.source, pair.target) for pair in pairs) == expected


SENTENCE = {"en": "Good day", "de": "Guten Tag", "cs": "Dobrý den"}
CONVERTED = "refs/convert/parquet"
GENERATION = [  # task, language, split, arguments of load_dataset, a row, its target
    (
        "massive", "de", "valid",
        {"path": "AmazonScience/massive", "revision": CONVERTED, "split": "validation",
         "data_files": {"validation": "de-DE/validation/0000.parquet"}},
        {"utt": "weck mich um fünf uhr", "annot_utt": "weck mich um [time : fünf uhr]"},
        "time: fünf uhr",
    ),
    (
        "uner", "zh", "test",
        {"path": "BramVanroy/universal_ner", "name": "zh_gsd", "split": "test"},
        {"tokens": ["他", "在", "北", "京"], "ner_tags": [0, 0, 5, 6]},
        '{"Results": [{"TypeName": "LOC", "Text": "北京"}]}',
    ),
    (
        "translation", "en-de", "train",
        {"path": "haoranxu/ALMA-Human-Parallel", "name": "de-en", "split": "train"},
        {"translation": SENTENCE},
        SENTENCE["de"],
    ),
    (
        "translation", "de-en", "valid",
        {"path": "haoranxu/ALMA-Human-Parallel", "name": "de-en", "split": "validation"},
        {"translation": SENTENCE},
        SENTENCE["en"],
    ),
    (
        "translation", "en-de", "test",
        {"path": "haoranxu/WMT23-Test", "name": "en-de", "split": "test"},
        {"en-de": SENTENCE},
        SENTENCE["de"],
    ),
    (  # WMT23 has no test from Czech; the one into Czech is reversed
        "translation", "cs-en", "test",
        {"path": "haoranxu/WMT23-Test", "name": "en-cs", "split": "test"},
        {"en-cs": SENTENCE},
        SENTENCE["en"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("task, language, split, hub, row, target", GENERATION)
def test_generation_data_of_the_hub(monkeypatch, task, language, split, hub, row, target):
    requests = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **hub: requests.append(hub) or [row])
    settings = af.Settings(task=task)
    (example,) = af.TASKS[task].load(language, split, settings)
    assert requests == [hub]
    assert example["target"] == target
    monkeypatch.setattr(datasets, "load_dataset", lambda **hub: [{"other": 1}])
    with pytest.raises(af.UserError, match="row 0: no column"):
        list(af.TASKS[task].load(language, split, settings))


def test_questions_to_train_on_are_english_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # the hub is not even asked
    with pytest.raises(af.UserError, match=r"xquad de: .* only in English"):
        list(af.TASKS["xquad"].load("de", "train", af.Settings(task="xquad")))


MISSING = [("udpos", "qax"), ("xsid", "de"), ("massive", "gsw"), ("uner", "ja")]


@pytest.mark.parametrize("task, language", [*MISSING, ("translation", "de")])
def test_a_language_without_data_on_the_hub_is_refused(monkeypatch, task, language):
    monkeypatch.setattr(datasets, "load_dataset", None)  # the hub is not even asked
    with pytest.raises(af.UserError, match=language):
        list(af.TASKS[task].load(language, "test", af.Settings(task=task)))
