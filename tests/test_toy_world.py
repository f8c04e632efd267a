"""Test the toy world: its gold answers, its repeatability, and that the project can read it."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import toy_world
from transformers import AutoModelForCausalLM, AutoTokenizer

import alignfreeze as af

ROOT = Path(af.__file__).parent
TARGETS = [code for code in toy_world.LANGUAGES if code != "en"]
SPLITS = ("train", "valid", "test")


@pytest.fixture
def data(world) -> Path:
    return world / "data"


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in lines(path)]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_world_and_another_seed_another(data, tmp_path):
    """That holds for a folder in which another world was built before, too."""
    worlds = []
    for seed in (1, 0):
        toy_world.build_data(tmp_path, seed)
        worlds.append(files(tmp_path / "data"))
    other, same = worlds
    assert same == files(data)
    assert other.keys() == same.keys()
    assert all(other[name] != same[name] for name in same)


@pytest.mark.parametrize("language", TARGETS)
def test_gold_links_belong_to_the_parallel_text(data, language):
    text = list(af.parallel_lines(language, af.Settings(data_dir=data), "train"))
    gold = [
        line.split("\t") for _, line in af.read_lines(data / "goldalign" / f"en-{language}.tsv")
    ]
    assert len(text) == len(gold)
    for (english, translation), (source, target, links) in zip(text, gold):
        assert source.split() == af.split_words(english, "en")
        assert target.split() == af.split_words(translation, language)
        pairs = [tuple(map(int, link.split("-"))) for link in links.split()]
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)  # one-to-one
        assert all(i < len(source.split()) and j < len(target.split()) for i, j in pairs)


@pytest.mark.parametrize("language", TARGETS)
def test_the_dictionary_aligner_finds_gold_links_except_with_a_wrong_dictionary(data, language):
    forward, backward = af.read_dictionary(language, data)
    found = right = 0
    for _, line in af.read_lines(data / "goldalign" / f"en-{language}.tsv"):
        source, target, gold = (column.split() for column in line.split("\t"))
        links = af.one_to_one(
            af.dictionary_links(source, target, forward, backward), source, target
        )
        found += len(links)
        right += len(set(links) & {tuple(map(int, link.split("-"))) for link in gold})
    is_wrong = language in toy_world.WRONG_DICTIONARIES
    assert found > 1000 and (right / found < 0.4 if is_wrong else right / found > 0.95)


@pytest.mark.parametrize("language", TARGETS)
def test_half_of_the_parallel_text_has_no_name(data, language):
    """Names are capitalised words that do not begin a sentence, the same in both languages."""
    text = [line.split("\t") for line in lines(data / f"parallel/en-{language}.tsv")]
    named = [set(re.findall(r"(?<= )[A-Z]\w+", english)) for english, _ in text]
    assert not any(named[1::2]) and sum(map(bool, named[::2])) > 300


@pytest.mark.parametrize("language", toy_world.LANGUAGES)
def test_treebanks_load_and_some_words_are_in_ranges(data, language):
    sentences = af.load_udpos(language, "test", af.Settings(data_dir=data))
    assert len(sentences) == toy_world.SIZES["udpos"][1]
    tags = {af.UPOS[tag] for sentence in sentences for tag in sentence["tags"]}
    assert {"NOUN", "VERB", "PROPN", "PUNCT"} <= tags
    text = (data / f"udpos/{language}/test.conllu").read_text("utf-8")
    ranges = re.findall(r"^\d+-\d+\t", text, re.MULTILINE)
    assert sum(tag == af.UPOS.index("_") for s in sentences for tag in s["tags"]) == len(ranges)
    assert ranges or language != "en"


@pytest.mark.parametrize("language", toy_world.LANGUAGES)
def test_answers_stand_where_they_are_said_to(data, language):
    for example in rows(data / "xquad" / language / "test.jsonl"):
        for text, start in zip(example["answers"]["text"], example["answers"]["answer_start"]):
            assert text and example["context"][start : start + len(text)] == text


@pytest.mark.parametrize("language", toy_world.LANGUAGES)
def test_entities_are_well_formed_and_labels_are_in_range(data, language):
    wikiann = rows(data / "wikiann" / language / "test.jsonl")
    tagged = [
        (row["tokens"], [toy_world.NER_TAGS[tag] for tag in row["ner_tags"]]) for row in wikiann
    ]
    for split in ("train", "dev", "test"):
        tagged += [
            (row["tokens"], row["tags"])
            for row in rows(data / "uner" / language / f"{split}.jsonl")
        ]
    for tokens, tags in tagged:
        assert len(tokens) == len(tags)
        assert re.fullmatch(r"((O|B-(PER|ORG|LOC)( I-\3)*)( |$))*", " ".join(tags))
    assert {tag for _, tags in tagged for tag in tags} == {*toy_world.NER_TAGS}
    assert {row["label"] for row in rows(data / "xnli" / language / "test.jsonl")} == {0, 1, 2}


def first_place(words: list[str], phrase: list[str], start: int) -> int:
    """Return the first position of the phrase at or after `start`, or -1."""
    places = range(start, len(words) - len(phrase) + 1)
    return next((i for i in places if words[i : i + len(phrase)] == phrase), -1)


@pytest.mark.parametrize("task", ["xsid", "massive"])
@pytest.mark.parametrize("language", toy_world.LANGUAGES)
def test_slots_are_words_of_their_text_in_order(data, task, language):
    examples = [row for split in SPLITS for row in rows(data / task / language / f"{split}.jsonl")]
    for example in examples:
        words, start = example["text"].split(), 0
        for slot in example["slots"]:
            phrase = slot["value"].split()
            place = first_place(words, phrase, start)
            assert phrase and place >= 0, example
            start = place + len(phrase)
    counts = Counter(len(example["slots"]) for example in examples)
    assert counts[0] > 0.03 * len(examples) and len(counts) > (3 if task == "massive" else 1)
    types = {slot["type"] for example in examples for slot in example["slots"]}
    several = {"time", "food", "tool", "person", "place"}
    assert (
        types >= several
        if task == "massive"
        else types == {"meet", "help", "love", "hate", "teach", "judge"}
    )


@pytest.mark.parametrize("language", TARGETS)
def test_rows_of_massive_with_the_same_id_are_translations_of_each_other(data, language):
    """Their names, which are the same in all languages, show it."""
    for split in SPLITS:
        english, other = (rows(data / f"massive/{code}/{split}.jsonl") for code in ("en", language))
        assert [row["id"] for row in english] == [str(k) for k in range(len(english))]
        translations = {row["id"]: row["text"] for row in other}
        assert len(translations) == len(other) == len(english)
        names = 0
        for row in english:
            for name in re.findall(r"(?<= )[A-Z]\w+", row["text"]):
                assert name in translations[row["id"]], row
                names += 1
        assert names > 30


@pytest.mark.parametrize("task", ["xsid", "massive"])
@pytest.mark.parametrize("language", TARGETS)
def test_slots_are_parallel_and_no_command_is_in_two_splits(data, task, language):
    seen = set()
    for split in SPLITS:
        english, other = (rows(data / task / code / f"{split}.jsonl") for code in ("en", language))
        assert len(english) == len(other) == toy_world.GENERATION_SIZES[split]
        for pair in zip(english, other):
            one, two = (sorted(slot["type"] for slot in row["slots"]) for row in pair)
            assert one == two
        texts = {row["text"] for row in english}
        assert len(texts) == len(english) and not texts & seen
        seen |= texts


@pytest.mark.parametrize("language", TARGETS)
def test_translations_go_both_ways_and_none_is_in_the_parallel_text(data, language):
    parallel = {
        line.split("\t")[0] for code in TARGETS for line in lines(data / f"parallel/en-{code}.tsv")
    }
    for split in SPLITS:
        there = [
            line.split("\t") for line in lines(data / f"translation/en-{language}/{split}.tsv")
        ]
        back = [line.split("\t") for line in lines(data / f"translation/{language}-en/{split}.tsv")]
        assert there == [pair[::-1] for pair in back]
        assert len(there) == toy_world.GENERATION_SIZES[split]
        assert not parallel & {english for english, _ in there}
    dev = [line.split("\t") for line in lines(data / f"parallel/en-{language}.dev.tsv")]
    assert len(dev) == toy_world.DEV_SIZE and all(len(pair) == 2 for pair in dev)
    assert not parallel & {english for english, _ in dev}


def test_held_out_pairs_have_the_same_english_in_all_languages(data):
    english = [
        [line.split("\t")[0] for line in lines(data / f"parallel/en-{code}.dev.tsv")]
        for code in TARGETS
    ]
    assert english[0] == english[1] == english[2]


def test_the_decoder_generates_and_its_tokenizer_is_that_of_a_llama(world, data):
    tokenizer = AutoTokenizer.from_pretrained(world / "models/llama")
    decoder = AutoModelForCausalLM.from_pretrained(world / "models/llama")
    for language in toy_world.LANGUAGES:
        text = rows(data / "xsid" / language / "test.jsonl")[0]["text"]
        inputs = tokenizer(text, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        assert ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        output = decoder.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert output.shape[1] > len(ids)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    special = {getattr(tokenizer, name) for name in names}
    assert len(special) == 4 and None not in special


# --- the closing tables of ./run_all.sh toy


def write_records(folder: Path, model: str, task: str, scores: dict[str, list[dict]]) -> None:
    """Write a record for each strategy and seed. scores: {strategy: [{language: percent}]}."""
    for strategy, seeds in scores.items():
        for seed, values in enumerate(seeds):
            run = {"model": model, "task": task, "strategy": strategy, "seed": seed}
            run |= {"schedule": "before", "aligner": "none", "config": {"lr": 1.0}}
            metric = "accuracy" if task == "udpos" else "f1"
            run["scores"] = {code: {metric: value / 100} for code, value in values.items()}
            path = folder / f"{model}_{strategy}_{seed}.json"
            path.write_text(json.dumps(run), "utf-8")


def closing_lines(folder: Path) -> list[str]:
    command = [sys.executable, ROOT / "results/toy_tables.py", folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_toy_tables_of_nothing_say_so(tmp_path):
    command = [sys.executable, ROOT / "results/toy_tables.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "no records in" in result.stderr
    assert "Traceback" not in result.stderr


def test_toy_tables_refuse_two_records_of_one_seed(tmp_path):
    """They may differ in their settings, so that a mean of both would be of neither."""
    write_records(tmp_path, "bert", "udpos", word_scores(-10, -3))
    shutil.copy(tmp_path / "bert_full_0.json", tmp_path / "bert_full_other.json")
    command = [sys.executable, ROOT / "results/toy_tables.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "another record has the same seed" in result.stderr


def test_toy_tables_compare_the_seeds_that_all_strategies_have(tmp_path):
    write_records(tmp_path, "bert", "udpos", word_scores(-10, -3))
    (tmp_path / "bert_front_1.json").unlink()
    assert any("deviation of 1 seeds" in line for line in closing_lines(tmp_path))
    path = tmp_path / "bert_front_0.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"seed": 5}))
    text = "\n".join(closing_lines(tmp_path))
    assert "bert: no seed has runs of all strategies" in text


def word_scores(full: float, front: float) -> dict[str, list[dict]]:
    """Return scores of which the close languages gain 20 by full and 18 by front-freezing."""
    changes = {"baseline": (0, 0), "full": (20, full), "front": (18, front)}
    scores = {}
    for strategy, (close, distant) in changes.items():
        scores[strategy] = []
        for seed in (0, 2):  # the two seeds differ by 2, but their changes do not
            row = {"en": 99, "qaa": 60 + seed + close, "qab": 40 + seed + close}
            scores[strategy].append(row | {"qac": 50 + seed + distant})
    return scores


@pytest.mark.parametrize(
    "full, front, expected",
    [
        (-10, -3, "keeps 90% of the gain and 30% of the harm: the pattern that the paper reports."),
        (-10, -8, "keeps 90% of the gain and 80% of the harm: NOT the pattern"),
        (-10, 4, "keeps 90% of the gain and 0% of the harm: the pattern that the paper reports."),
        (1, 3, "does not harm the distant one (+1.0): nothing to protect."),
    ],
)
def test_the_closing_lines_say_what_the_records_of_words_show(tmp_path, full, front, expected):
    write_records(tmp_path, "bert", "udpos", word_scores(full, front))
    lines = closing_lines(tmp_path)
    text = "\n".join(lines)
    assert expected in text and "llama: there are no records" in text and len(lines) <= 25
    rows = {line.split()[0]: line.split()[-6:] for line in lines if line.count("±") == 2}
    assert rows["baseline"] == ["51.0", "±", "1.4", "51.0", "±", "1.4"]
    assert rows["full,"] == ["+20.0", "±", "0.0", f"{full:+.1f}", "±", "0.0"]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ((8, 2), "helps the languages without labels (+5.0 F1); they gain in 2 of 2 seeds."),
        ((-8, 2), "does NOT help the languages without labels (-3.0 F1); they gain in 1 of 2"),
    ],
)
def test_the_closing_lines_say_what_the_records_of_sentences_show(tmp_path, changes, expected):
    scores = {"baseline": [], "full": []}
    for change in changes:
        row = {"en": 90, "qaa": 80, "qab": 50, "qac": 30}
        scores["baseline"].append(row)
        scores["full"].append(row | {"qab": 50 + change, "qac": 30 + change})
    write_records(tmp_path, "llama", "xsid", scores)
    assert any(expected in line for line in closing_lines(tmp_path))
