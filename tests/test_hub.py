"""Without --data-dir: whole runs of the program against a server that answers as the hub and the plain-file hosts do.

The server has every data set in the layout and the columns of its real repository, with sentences of the toy world in
them, and a tiny encoder under the id of XLM-R. The libraries read addresses and caches from the environment when they
are imported, so a process of its own does a list of runs; it points the two addresses of plain files, which are
constants of the module, to the server, and then calls `main`. Data sets that no run here reads are stood in for.
"""

import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from test_cli import SCRIPT, Result, assert_refused, but_seconds, only_record

import alignfreeze

MODEL, COMMIT = "FacebookAI/xlm-roberta-base", "c0ffee" + 34 * "0"
CLASSIFY = [name for name, task in alignfreeze.TASKS.items() if not task.new_tokens]
AGAIN = ("udpos", "xquad")  # that are run a second time, without the server
WORDS = {
    "en": "en",
    "de": "qaa",
    "fr": "qab",
    "es": "qaa",
    "ru": "qaa",
}  # language on the server: of the toy world

# ---------------------------------------------------------------------------- what the server has


def classes(names: str) -> dict:
    return {"class_label": {"names": {str(number): name for number, name in enumerate(names.split())}}}


TEXT, TEXTS = {"dtype": "string"}, {"sequence": "string"}
ANSWERS = {"sequence": [{"name": "text", "dtype": "string"}, {"name": "answer_start", "dtype": "int32"}]}
XQUAD = {"id": TEXT, "context": TEXT, "question": TEXT, "answers": ANSWERS}
NER = {"sequence": classes("O B-PER I-PER B-ORG I-ORG B-LOC I-LOC")}
NLI = {"dtype": classes("entailment neutral contradiction")}
DATA_SETS = {  # id: (the configuration of a language, its splits, its columns in the words of the repository's card)
    "Helsinki-NLP/opus-100": ("{0}-{1}", "test train validation", {"translation": {}}),
    "unimelb-nlp/wikiann": ("{2}", "validation test train", {"tokens": TEXTS, "ner_tags": NER, "langs": TEXTS,
                                                             "spans": TEXTS}),
    "facebook/xnli": ("{2}", "train test validation", {"premise": TEXT, "hypothesis": TEXT, "label": NLI}),
    "rajpurkar/squad": ("plain_text", "train validation", XQUAD | {"title": TEXT}),
    "google/xquad": ("xquad.{2}", "validation", XQUAD),
}  # fmt: skip
RENAMED = {
    "translation": "text",
    "ner_tags": "tags",
    "label": "gold_label",
    "answers": "answer",
}  # in Spanish


def lines(world: Path, name: str, language: str, split: str) -> list[dict]:
    """Rows of a data set, in its columns."""
    if "opus" in name:
        text = (world / "data/parallel" / f"en-{WORDS[language]}.tsv").read_text("utf-8").splitlines()
        return [{"translation": dict(zip(("en", language), line.split("\t")))} for line in text]
    task = "xquad" if "squad" in name else name.split("/")[1]
    part = "train" if split == "train" and language == "en" else "test"
    text = (
        (world / "data" / task / WORDS[language] / f"{part}.jsonl").read_text("utf-8").splitlines()[:200]
    )
    rows = [json.loads(line) for line in text]
    more = {"wikiann": lambda row: {"langs": [language] * len(row["tokens"]), "spans": []},
            "squad": lambda row: {"title": "Toys"}}.get(name.split("/")[1], lambda row: {})  # fmt: skip
    return [row | more(row) for row in rows]


def write_data_set(world: Path, folder: Path, name: str) -> None:
    """A repository: a parquet file for each configuration and split, and the card that lists them."""
    configuration, splits, columns = DATA_SETS[name]
    card: dict[str, list] = {"dataset_info": [], "configs": []}
    languages = (
        ["en"]
        if name == "rajpurkar/squad"
        else [code for code in WORDS if "opus" not in name or code != "en"]
    )
    for language in languages:
        pair = sorted(("en", language))
        config, names = configuration.format(*pair, language), RENAMED if language == "es" else {}
        types = columns | (
            {"translation": {"dtype": {"translation": {"languages": pair}}}} if "opus" in name else {}
        )
        features = [{"name": names.get(column, column), **kind} for column, kind in types.items()]
        sizes, files = [], []
        for split in splits.split():
            rows = [
                {names.get(k, k): v for k, v in row.items()}
                for row in lines(world, name, language, split)
            ]
            path = folder / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows, datasets.Features._from_yaml_list(features)).to_parquet(
                path
            )
            sizes.append({"name": split, "num_bytes": path.stat().st_size, "num_examples": len(rows)})
            files.append({"split": split, "path": f"{config}/{split}-*"})
        card["dataset_info"].append({"config_name": config, "features": features, "splits": sizes})
        card["configs"].append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(
        f"---\n{json.dumps(card)}\n---\n# A data set\n", "utf-8"
    )  # JSON is YAML too


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    """What is served. Arabic is missing everywhere; Spanish lacks a column; everything Russian breaks off."""
    folder = tmp_path_factory.mktemp("served")
    datasets.disable_progress_bars()
    for name in DATA_SETS:
        write_data_set(world, folder / "datasets" / name, name)
    datasets.enable_progress_bars()
    shutil.copytree(world / "models/xlmr", folder / "models" / MODEL)
    for language, code in WORDS.items():
        treebank = alignfreeze.TREEBANKS[language]
        for path in (world / "data/udpos" / code).iterdir():
            name = f"{language}_{treebank.split('-')[1].lower()}-ud-{path.name}"
            (folder / f"UD_{treebank}/r2.7").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"UD_{treebank}/r2.7" / name)
        if code != "en":
            shutil.copy(world / f"data/dictionary/en-{code}.txt", folder / f"en-{language}.txt")
    return folder


# ------------------------------------------------------------------------------------- the server

RUSSIAN = re.compile(r"[/.-]ru[/._-]")
ADDRESS = re.compile(
    r"/(api/)?(datasets/|models/)?([\w.-]+/[\w.-]+?)(?:/(resolve|tree|revision)/(\w+)/?(.*))?"
)


class Answer(http.server.BaseHTTPRequestHandler):
    """/files/<path> is a file; the rest is the hub's: /<id>/resolve/<revision>/<path>, and listings under /api."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if path == "/":
            return self.answer(200)
        if path.startswith("/files/"):
            return self.file(self.server.folder / path.removeprefix("/files/"))
        if re.match(
            r"(/api/models)?/xlm-roberta-base\b", path
        ):  # the id of old leads to the one of today
            return self.answer(307, Location=self.path.replace("xlm-roberta-base", MODEL, 1))
        api, kind, name, verb, _, inner = ADDRESS.fullmatch(path).groups(default="")
        top = self.server.folder / (kind or "models") / name
        if not top.is_dir():
            self.answer(
                401, b'{"error": "Invalid username or password."}'
            )  # so as not to tell what is private
        elif verb == "tree" and (top / inner).is_dir():
            found = sorted(
                (top / inner).rglob("*") if "recursive=true" in query else (top / inner).iterdir()
            )
            kinds = {True: "directory", False: "file"}
            self.json([{"type": kinds[p.is_dir()], "path": str(p.relative_to(top)), "size": p.stat().st_size,
                        "oid": COMMIT} for p in found])  # fmt: skip
        elif api and verb != "tree":
            found = [str(p.relative_to(top)) for p in top.rglob("*") if p.is_file()]
            self.json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in found]})
        else:
            self.file(top / inner, large=(".parquet", ".safetensors"))

    do_HEAD = do_GET

    def file(self, path: Path, large: tuple[str, ...] = ()):
        if not path.is_file():
            return self.answer(
                404, b"Entry not found", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            )
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if path.suffix in large:  # these lie on another host
            host = f"http://{self.headers['Host']}/files/{path.relative_to(self.server.folder)}"
            linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            return self.answer(302, Location=host, **headers | linked)
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], **headers)
        self.answer(200, content, **headers)

    def json(self, value: object):
        self.answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes = b"", **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = bool(RUSSIAN.search(self.path))
        if self.command == "GET":
            cut = self.close_connection and status in (200, 206)
            self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *args):
        pass


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    """A running server; `asked` holds the requests that came: (method, path, range of bytes)."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    web.folder, web.asked = folder, []
    threading.Thread(target=web.serve_forever, daemon=True).start()
    return web


# --------------------------------------------------------------------------------------- the runs

DRIVER = """
import json, sys, time
root, host, runs = sys.argv[1:4]
sys.path.insert(0, root)
import alignfreeze
alignfreeze.UD_URL = host + "/files/UD_{}/r2.7/{}_{}-ud-{}.conllu"
alignfreeze.MUSE_URL = host + "/files/{}-{}.txt"
if sys.argv[4:]:
    time.sleep = lambda seconds: None  # the libraries wait before they try again: half a minute for each broken file
for argv in json.loads(runs):
    code = alignfreeze.main(argv)
    for stream in sys.stdout, sys.stderr:
        print(end=f"<{code}>", file=stream, flush=True)
"""
FLAGS = "--model xlm-roberta-base --device cpu --languages de --realign-languages de fr --realign-steps 3 --epochs 1"
FLAGS += " --limit-train 32 --limit-test 16 --overwrite"


def run(web, caches: Path, runs: dict[str, list], *hasty: str, **more: str) -> dict[str, Result]:
    """One process does all runs, {name: more flags}, and writes their records to `caches / name`."""
    host = f"http://127.0.0.1:{web.server_port}"
    environment = {"HF_ENDPOINT": host, "HF_HOME": f"{caches}/hub", "XDG_CACHE_HOME": f"{caches}/plain"}
    environment |= {
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }
    environment |= {"no_proxy": "*", "NO_PROXY": "*"} | more
    argvs = [[*FLAGS.split(), *flags, "--out", str(caches / name)] for name, flags in runs.items()]
    command = [sys.executable, "-c", DRIVER, str(SCRIPT.parent), host, json.dumps(argvs), *hasty]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    outs, errs = (re.split(r"<(\d+)>", text) for text in (done.stdout, done.stderr))
    return {
        name: Result(int(code), out, err)
        for name, code, out, err in zip(runs, outs[1::2], outs[::2], errs[::2])
    }


@pytest.fixture(scope="module")
def whole_runs(folder, tmp_path_factory) -> tuple[dict, dict, list, Path]:
    """All tasks with the server, and again after it went away: (results, results again, requests, folder of caches)."""
    caches, web = tmp_path_factory.mktemp("whole"), serve(folder)
    runs = {task: ["--task", task] for task in CLASSIFY}
    first = run(web, caches, runs)
    records = {task: only_record(caches / task) for task in runs if first[task].code == 0}
    web.shutdown()
    web.server_close()
    return (
        first,
        records,
        run(web, caches, {k: runs[k] for k in AGAIN}, HF_HUB_OFFLINE="1"),
        web.asked,
        caches,
    )


@pytest.mark.parametrize("task", CLASSIFY)
def test_a_whole_run_takes_model_and_data_from_the_hub(whole_runs, task):
    results, records, *_ = whole_runs
    assert results[task].code == 0 and results[task].err == ""
    assert list(records[task]["scores"]) == ["en", "de"]
    assert records[task]["model"] == "xlm-roberta-base" and list(records[task]["pairs"]) == ["de", "fr"]


def test_parallel_text_is_read_as_a_stream(whole_runs):
    """In ranges of bytes, of the training files alone, once for all tasks; none is stored as a file of the hub."""
    *_, asked, caches = whole_runs
    spans = [
        (path.split("opus-100/")[1], span)
        for _, path, span in asked
        if re.search("^/files.*opus-100", path)
    ]
    assert {path for path, _ in spans} == {
        f"{pair}/train-00000-of-00001.parquet" for pair in ("de-en", "en-fr")
    }
    assert all(span for _, span in spans) and len(spans) == len(set(spans))
    assert not list(caches.glob("hub/**/*opus*/**/*.parquet"))


@pytest.mark.parametrize("task", AGAIN)
def test_a_second_run_needs_no_network(whole_runs, task):
    _, records, again, _, caches = whole_runs
    assert again[task].code == 0 and again[task].err == ""
    assert but_seconds(only_record(caches / task)) == but_seconds(records[task])


ROWS = {
    "wikiann": "unimelb-nlp/wikiann {}",
    "xnli": "facebook/xnli {}",
    "xquad": "google/xquad xquad.{}",
}
FAULTS = {  # run: (more flags, what the line names)
    **{f"{task}, test in {code}": (["--task", task, "--languages", code], [name.format(code)])
       for task, name in ROWS.items() for code in ("ar", "es", "ru")},
    "udpos, test in ar": (["--languages", "ar"], ["UD_Arabic-PADT"]),
    "udpos, test in ru": (["--languages", "ru"], ["UD_Russian-GSD"]),
    "dictionary of ar": (["--realign-languages", "ar"], ["en-ar.txt"]),
    "dictionary of ru": (["--realign-languages", "ru"], ["en-ru.txt"]),
    **{f"parallel text of {code}": (["--realign-languages", code, "--aligner", "LINKS"], [f"opus-100 {pair}"])
       for code, pair in {"ar": "ar-en", "es": "en-es", "ru": "en-ru"}.items()},
}  # fmt: skip
NOWHERE = {  # nothing is on the server
    "wikiann": (["--task", "wikiann", "--model", "MODEL"], ["unimelb-nlp/wikiann en"]),
    "xnli": (["--task", "xnli", "--model", "MODEL"], ["facebook/xnli en"]),
    "xquad": (["--task", "xquad", "--model", "MODEL"], ["rajpurkar/squad"]),
    "model": (["--model", "toy/no-such-model"], ["--model toy/no-such-model"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def faulty_runs(world, folder, tmp_path_factory) -> dict[str, tuple[Result, Path]]:
    caches = tmp_path_factory.mktemp("faulty")
    for code in ("ar", "es", "ru"):
        (caches / f"en-{code}.txt").write_text("0-0\n")
    paths = {"LINKS": str(caches), "MODEL": str(world / "models/xlmr")}
    results = {}
    for cases, served in ((FAULTS, folder), (NOWHERE, tmp_path_factory.mktemp("nothing"))):
        runs = {name: [paths.get(flag, flag) for flag in flags] for name, (flags, _) in cases.items()}
        done = run(serve(served), caches / served.name, runs, "hasty")
        results |= {name: (done[name], caches / served.name / name) for name in runs}
    return results


@pytest.mark.parametrize("case", FAULTS | NOWHERE)
def test_what_cannot_be_had_is_named_in_one_line(faulty_runs, case):
    """Missing (Arabic, or all of it), without a column (Spanish), broken off (Russian)."""
    result, out = faulty_runs[case]
    assert_refused(result, *(FAULTS | NOWHERE)[case][1], folder=out)
    assert result.err.startswith("alignfreeze: ")


# ------------------------------------------------------------------------------ downloads that are kept


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(alignfreeze, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_plain_file_is_downloaded_once_or_leaves_nothing_behind(cache, folder):
    web = serve(folder)
    host = f"http://127.0.0.1:{web.server_port}/files"
    for _ in range(2):
        assert alignfreeze.fetch(f"{host}/en-de.txt").read_bytes() == (folder / "en-de.txt").read_bytes()
    assert len(web.asked) == 1
    before = sorted(cache.iterdir())
    for name in ("en-ru.txt", "en-ar.txt"):  # breaks off, is not there
        with pytest.raises(alignfreeze.UserError, match=rf"cannot download {host}/{name}"):
            alignfreeze.fetch(f"{host}/{name}")
    assert sorted(cache.iterdir()) == before
    web.shutdown()
    web.server_close()


@pytest.fixture
def opus(cache, monkeypatch):
    """A stand-in for OPUS-100 on the hub that counts the lines that are read from it."""
    read, loads = [], []

    def rows():
        for k in range(45):
            read.append(k)
            yield {"translation": {"en": f"the line {k}", "de": f"die Zeile {k}"}}

    def load_dataset(*args, **options):
        loads.append((*args, options))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return read, loads


TEXT = [(f"the line {k}", f"die Zeile {k}") for k in range(45)]


def stream() -> itertools.chain:
    return alignfreeze.streamed_text("de", "train", block=10)


def test_parallel_text_is_streamed_as_far_as_it_is_read_and_kept(opus):
    read, loads = opus
    assert list(itertools.islice(stream(), 12)) == TEXT[:12]
    assert loads == [("Helsinki-NLP/opus-100", "de-en", {"split": "train", "streaming": True})]
    assert max(read) < 25  # two blocks of ten, and what the library reads ahead
    assert list(stream()) == TEXT
    del read[:], loads[:]
    assert list(stream()) == TEXT
    assert not read and not loads


@pytest.mark.parametrize("missing", [0, 20, 40])
def test_a_block_missing_on_disk_is_fetched_from_its_place(opus, cache, missing):
    list(stream())
    (cache / "opus-100/de-en" / f"train-{missing}.json").unlink()
    assert list(stream()) == TEXT


def test_a_block_that_another_process_fetched_meanwhile_is_used(opus, cache):
    lines = stream()
    assert list(itertools.islice(lines, 5)) == TEXT[:5]
    list(stream())  # the other process
    (cache / "opus-100/de-en/train-20.json").unlink()
    assert list(lines) == TEXT[5:]


# ----------------------------------------------------------------- data of the tasks that generate

PAIR = {"en": "Good day", "de": "Guten Tag", "cs": "Dobrý den"}
HUB = {  # (task, language, split): (what load_dataset is asked for, a row, the target that it makes)
    ("massive", "de", "valid"): (
        {"path": "AmazonScience/massive", "revision": "refs/convert/parquet", "split": "validation",
         "data_files": {"validation": "de-DE/validation/0000.parquet"}},
        {"annot_utt": "weck mich um [time : fünf uhr]", "intent": 3}, "time: fünf uhr"),
    ("uner", "zh", "test"): (
        {"path": "BramVanroy/universal_ner", "name": "zh_gsd", "split": "test"},
        {"tokens": ["他", "在", "北", "京"], "ner_tags": [0, 0, 5, 6]},
        '{"Results": [{"TypeName": "LOC", "Text": "北京"}]}'),
    ("translation", "en-de", "train"): (
        {"path": "haoranxu/ALMA-Human-Parallel", "name": "de-en", "split": "train"}, {"translation": PAIR}, PAIR["de"]),
    ("translation", "de-en", "valid"): (
        {"path": "haoranxu/ALMA-Human-Parallel", "name": "de-en", "split": "validation"},
        {"translation": PAIR}, PAIR["en"]),
    ("translation", "en-de", "test"): (
        {"path": "haoranxu/WMT23-Test", "name": "en-de", "split": "test"}, {"en-de": PAIR}, PAIR["de"]),
    ("translation", "cs-en", "test"): (  # there is no such test: the other one, turned round
        {"path": "haoranxu/WMT23-Test", "name": "en-cs", "split": "test"}, {"en-cs": PAIR}, PAIR["en"]),
}  # fmt: skip


@pytest.mark.parametrize("task, language, split", HUB)
def test_generation_data_of_the_hub(monkeypatch, task, language, split):
    wanted, row, target = HUB[task, language, split]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **options: asked.append(options) or [row])
    args = SimpleNamespace(task=task, data_dir=None)
    (example,) = alignfreeze.TASKS[task].load(language, split, args)
    assert asked == [wanted]
    assert example["target"] == target
    monkeypatch.setattr(datasets, "load_dataset", lambda **options: [{"other": 1}])
    with pytest.raises(alignfreeze.UserError, match="row 0: no column"):
        list(alignfreeze.TASKS[task].load(language, split, args))


@pytest.mark.parametrize(
    "task, language", [("xsid", "de"), ("massive", "gsw"), ("uner", "ja"), ("translation", "de")]
)
def test_generation_data_that_no_hub_has(task, language):
    with pytest.raises(alignfreeze.UserError, match=language):
        list(alignfreeze.TASKS[task].load(language, "test", SimpleNamespace(task=task, data_dir=None)))
