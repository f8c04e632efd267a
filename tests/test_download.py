"""Without --data-dir: plain files come over the network once, parallel text is streamed as far as it is read."""

import http.server
import itertools
import threading

import datasets
import pytest

import alignfreeze as af

CONLLU = "1\tHello\t_\tINTJ\t_\t_\t_\t_\t_\t_\n2\t!\t_\tPUNCT\t_\t_\t_\t_\t_\t_\n\n"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server whose files the test sets; it notes what is asked for. The cache is empty."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content, length = files.get(self.path, (None, 0))
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{web.server_port}"
    monkeypatch.setattr(af, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(af, "UD_URL", host + "/UD_{}/r2.7/{}_{}-ud-{}.conllu")
    monkeypatch.setattr(af, "MUSE_URL", host + "/{}-{}.txt")

    def put(path: str, text: str, length: int | None = None) -> None:
        content = text.encode()
        files[path] = content, len(content) if length is None else length

    yield put, asked
    web.shutdown()


def no_data_dir():
    return af.parse_args([])


def test_a_treebank_is_downloaded_once_from_its_repository_at_release_2_7(server):
    put, asked = server
    put("/UD_English-EWT/r2.7/en_ewt-ud-train.conllu", CONLLU)
    put("/UD_Norwegian-Bokmaal/r2.7/no_bokmaal-ud-test.conllu", CONLLU)
    for _ in range(2):
        assert af.load_udpos("en", "train", no_data_dir())[0]["tokens"] == ["Hello", "!"]
        assert len(af.load_udpos("no", "test", no_data_dir())) == 1
    assert len(asked) == 2


def test_dictionaries_are_downloaded_in_both_directions(server):
    put, _ = server
    put("/en-de.txt", "cat Katze\n")
    put("/de-en.txt", "Katze cat\nKatze pussycat\n")
    assert af.read_dictionary("de", None) == ({"cat": {"Katze"}}, {"Katze": {"cat", "pussycat"}})


def test_a_missing_file_is_one_line_that_names_its_address(server):
    with pytest.raises(af.UserError, match=r"cannot download http://127.*/en-de.txt.*404") as error:
        af.read_dictionary("de", None)
    assert "\n" not in str(error.value)


def test_a_download_that_breaks_off_is_an_error_and_leaves_nothing_behind(server):
    put, _ = server
    put("/en-de.txt", "cat Katze\n", length=1000)
    with pytest.raises(af.UserError, match="cannot download"):
        af.read_dictionary("de", None)
    assert not list(af.CACHE.glob("*")) if af.CACHE.exists() else True
    put("/en-de.txt", "cat Katze\n")
    put("/de-en.txt", "Katze cat\n")
    assert af.read_dictionary("de", None)[0] == {"cat": {"Katze"}}  # the next try starts anew


@pytest.fixture
def opus(tmp_path, monkeypatch):
    """A stand-in for OPUS-100 on the hub, in its columns, that counts the lines that are read from it."""
    read, loads = [], []

    def rows():
        for k in range(45):
            read.append(k)
            yield {"translation": {"en": f"the line {k}", "de": f"die Zeile {k}"}}

    def load_dataset(name, config, split, streaming):
        loads.append((name, config, split, streaming))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(af, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return read, loads


TEXT = [(f"the line {k}", f"die Zeile {k}") for k in range(45)]


def test_parallel_text_is_streamed_only_as_far_as_it_is_read(opus):
    read, loads = opus
    assert list(itertools.islice(af.streamed_text("de", block=10), 12)) == TEXT[:12]
    assert loads == [("Helsinki-NLP/opus-100", "de-en", "train", True)]
    assert max(read) < 25  # two blocks of ten, and what the library reads ahead


def test_what_was_streamed_is_read_from_disk_the_next_time(opus):
    read, loads = opus
    assert list(af.streamed_text("de", block=10)) == TEXT
    del read[:], loads[:]
    assert list(af.streamed_text("de", block=10)) == TEXT
    assert not read and not loads


@pytest.mark.parametrize("missing", [0, 20, 40])
def test_a_block_missing_on_disk_is_fetched_from_its_place(opus, missing):
    list(af.streamed_text("de", block=10))
    (af.CACHE / "opus-100" / "de-en" / f"{missing}.json").unlink()
    assert list(af.streamed_text("de", block=10)) == TEXT


def test_a_block_that_another_process_fetched_meanwhile_is_used(opus):
    stream = af.streamed_text("de", block=10)
    assert list(itertools.islice(stream, 5)) == TEXT[:5]
    list(af.streamed_text("de", block=10))  # the other process
    (af.CACHE / "opus-100" / "de-en" / "20.json").unlink()
    assert list(stream) == TEXT[5:]


def test_a_stream_that_breaks_is_one_line(opus, monkeypatch):
    def broken(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(af.UserError, match=r"cannot read Helsinki-NLP/opus-100 de-en.*no network"):
        next(af.streamed_text("de"))
