"""The toy world is what it says: gold by construction, the same for the same seed, readable by the project."""

import json
import re
from pathlib import Path

import pytest
import toy_world

import alignfreeze as af

TARGETS = [code for code in toy_world.LANGUAGES if code != "en"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy_world.build_data(folder)
    return folder / "data"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_world_and_another_seed_another(data, tmp_path):
    for seed in (0, 1):
        toy_world.build_data(tmp_path / str(seed), seed)
    assert files(tmp_path / "0" / "data") == files(data)
    assert files(tmp_path / "1" / "data") != files(data)


@pytest.mark.parametrize("language", TARGETS)
def test_gold_links_belong_to_the_parallel_text(data, language):
    text = list(af.parallel_text(language, data))
    gold = [line.split("\t") for _, line in af.read_lines(data / "goldalign" / f"en-{language}.tsv")]
    assert len(text) == len(gold)
    for (english, translation), (source, target, links) in zip(text, gold):
        assert source.split() == af.split_words(english, "en")
        assert target.split() == af.split_words(translation, language)
        pairs = [tuple(map(int, link.split("-"))) for link in links.split()]
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)  # one-to-one
        assert all(i < len(source.split()) and j < len(target.split()) for i, j in pairs)


@pytest.mark.parametrize("language", TARGETS)
def test_the_dictionary_aligner_finds_gold_links(data, language):
    forward, backward = af.read_dictionary(language, data)
    found = right = 0
    for _, line in af.read_lines(data / "goldalign" / f"en-{language}.tsv"):
        source, target, gold = (column.split() for column in line.split("\t"))
        links = af.one_to_one(af.dictionary_links(source, target, forward, backward), source, target)
        found += len(links)
        right += len(set(links) & {tuple(map(int, link.split("-"))) for link in gold})
    assert found > 2000 and right / found > 0.95


@pytest.mark.parametrize("language", toy_world.LANGUAGES)
def test_treebanks_load_and_some_words_are_in_ranges(data, language):
    args = af.parse_args(["--data-dir", str(data)])
    sentences = af.load_udpos(language, "test", args)
    standard = af.load_udpos(language, "test", af.parse_args(["--data-dir", str(data), "--syntactic-words"]))
    tags = {af.UPOS[tag] for sentence in sentences for tag in sentence["tags"]}
    assert len(sentences) == len(standard) == toy_world.SIZES["udpos"][1]
    assert {"NOUN", "VERB", "PROPN", "PUNCT"} <= tags
    if "_" in tags:
        assert sum(map(len, (s["tags"] for s in sentences))) > sum(map(len, (s["tags"] for s in standard)))
    assert language != "en" or "_" in tags


@pytest.mark.parametrize("language", toy_world.LANGUAGES)
def test_answers_stand_where_they_are_said_to(data, language):
    for _, line in af.read_lines(data / "xquad" / language / "test.jsonl"):
        example = json.loads(line)
        for text, start in zip(example["answers"]["text"], example["answers"]["answer_start"]):
            assert text and example["context"][start : start + len(text)] == text


@pytest.mark.parametrize("language", toy_world.LANGUAGES)
def test_entities_are_well_formed_and_labels_are_in_range(data, language):
    for _, line in af.read_lines(data / "wikiann" / language / "test.jsonl"):
        example = json.loads(line)
        tags = " ".join(toy_world.NER_TAGS[tag] for tag in example["ner_tags"])
        assert len(example["tokens"]) == len(example["ner_tags"])
        assert re.fullmatch(r"((O|B-(\w+)( I-\3)*)( |$))*", tags)
    labels = [json.loads(line)["label"] for _, line in af.read_lines(data / "xnli" / language / "test.jsonl")]
    assert set(labels) == {0, 1, 2}
