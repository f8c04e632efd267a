"""Tests of tasks that generate text: the data, the prompts, and the scores of the text."""

import itertools
import json
import os
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import alignfreeze as af

# ---- Scores of slots

TYPES = ("time", "date", "place_name", "song")
WORDS = {
    "en": "wake Wake me ME up at five a.m. in Paris : paris ; none x".split(),
    "ja": ["東", "京", "は", "New", "york", "5", "時", "駅", "の", ":"],
}


def random_example(rng: random.Random, language: str) -> dict:
    """Return a text with slots; words repeat, and neighbouring slots can have one type."""
    words = rng.choices(rng.sample(WORDS[language], rng.randint(2, 6)), k=rng.randint(1, 9))
    space = " " if language == "en" else ""
    if language == "ja":  # two words of ASCII side by side would be one
        words = [b for a, b in zip(["は", *words], words) if not (a.isascii() and b.isascii())]
    slots, at = [], 0
    while at < len(words):
        size = rng.randint(1, 3)
        value = space.join(words[at : at + size])
        if rng.random() < 0.4:
            slot = {"type": rng.choice(TYPES[:2]), "value": value}
            slots.append(slot | {"at": at, "size": len(words[at : at + size])})
        at += size
    return {"language": language, "text": space.join(words), "slots": slots, "words": words}


def in_order(example: dict) -> bool:
    """Return whether each value first occurs after the slot before it where it was drawn."""
    words, at = example["words"], 0
    for slot in example["slots"]:
        value, first = words[slot["at"] :][: slot["size"]], at
        while words[first : first + slot["size"]] != value:
            first += 1
        if first != slot["at"]:
            return False
        at = slot["at"] + slot["size"]
    return True


def random_output(rng: random.Random, example: dict) -> str:
    """Return the right answer, or one with missing, wrong, invented and malformed parts."""
    space = " " if example["language"] == "en" else ""
    parts = [f"{slot['type']}: {slot['value']}" for slot in example["slots"]]
    if rng.random() < 0.7:
        parts = [part for part in parts if rng.random() < 0.7]
        for _ in range(rng.randint(0, 3)):
            phrase = space.join(rng.choices(example["words"], k=rng.randint(1, 2)))
            phrase = rng.choice((phrase, phrase.upper(), phrase.lower(), "nowhere", ""))
            parts.insert(rng.randint(0, len(parts)), f"{rng.choice(TYPES)}: {phrase}")
        if rng.random() < 0.2:
            malformed = rng.choice(("time", "time five", "time: five: six", "", "none"))
            parts.insert(rng.randint(0, len(parts)), malformed)
    output = "; ".join(parts) or rng.choice(("None", "none", "NONE", "", "time:five"))
    return (
        rng.choice(("", " ", "\n")) + output + rng.choice(("", " ", "\ntime: five", "\n\nInput: x"))
    )


def slow_tags(example: dict, output: str) -> list[str | None]:
    """Return for each word the type that the last matching part of the output gives it."""
    line = output.strip().split("\n")[0].strip()
    tags = [None] * len(example["words"])
    if line.lower() == "none":
        return tags
    for part in line.split("; "):
        pieces = part.split(": ")
        if len(pieces) != 2:
            continue
        phrase = pieces[1].split() if example["language"] == "en" else japanese(pieces[1])
        phrase = [word.lower() for word in phrase]
        for place in range(len(tags)):
            here = [word.lower() for word in example["words"][place : place + len(phrase)]]
            if here == phrase and phrase:
                for k in range(place, place + len(phrase)):
                    tags[k] = pieces[0]
    return tags


def japanese(text: str) -> list[str]:
    """Split text into characters, but keep runs of ASCII whole."""
    words, chunk = [], ""
    for character in text + "。":
        if character.isascii() and not character.isspace():
            chunk += character
        else:
            words += [chunk] if chunk else []
            words += [] if character.isspace() else [character]
            chunk = ""
    return words[:-1]


def slow_slots(tags: list[str | None]) -> set[tuple]:
    """Return (type, first word, end) of each run of equal types."""
    found, k = set(), 0
    while k < len(tags):
        end = k
        while end < len(tags) and tags[end] == tags[k]:
            end += 1
        if tags[k] is not None:
            found.add((tags[k], k, end))
        k = end
    return found


def slow_strict(examples: list[dict], outputs: list[str]) -> float:
    """Return F1 of (type, value), each of which is found once in its own example."""
    same = size = 0
    for example, output in zip(examples, outputs):
        left = [[slot["type"], slot["value"]] for slot in example["slots"]]
        line = output.strip().split("\n")[0].strip()
        parts = [] if line.lower() == "none" else [part.split(": ") for part in line.split("; ")]
        parts = [part for part in parts if len(part) == 2]
        size += len(left) + len(parts)
        for part in parts:
            if part in left:
                left.remove(part)
                same += 1
    return 2 * same / size if size else 0


def gold_of(example: dict) -> list[str | None]:
    tags = [None] * len(example["words"])
    for slot in example["slots"]:
        tags[slot["at"] : slot["at"] + slot["size"]] = [slot["type"]] * slot["size"]
    return tags


def random_corpora(count: int):
    rng = random.Random(5)
    for _ in range(count):
        language = rng.choice(("en", "ja"))
        examples = [random_example(rng, language) for _ in range(rng.randint(1, 4))]
        examples = [example for example in examples if in_order(example)]
        if examples:
            yield examples, [random_output(rng, example) for example in examples]


def test_the_score_of_slots_is_that_of_a_slow_implementation():
    seen, checked = set(), 0
    for examples, outputs in random_corpora(3000):
        same = size = 0
        for example, output in zip(examples, outputs):
            gold, found = slow_slots(gold_of(example)), slow_slots(slow_tags(example, output))
            same, size = same + len(gold & found), size + len(gold) + len(found)
        expected = 2 * same / size if size else 0
        scores = {"f1": expected, "f1_strict": slow_strict(examples, outputs)}
        found = af.score_slots(examples, outputs)
        assert found == pytest.approx(scores, abs=1e-12), (examples, outputs)
        seen.add(round(expected, 3))
        checked += len(examples)
    assert {0, 1} < seen
    assert len(seen) > 30
    assert checked > 2500


def test_the_score_of_slots_is_that_of_seqeval():
    metrics = pytest.importorskip("seqeval.metrics")

    def bio(tags: list[str | None]) -> list[str]:
        names = []
        for last, tag in zip([None, *tags[:-1]], tags):
            prefix = "I" if tag == last else "B"
            names.append("O" if tag is None else f"{prefix}-{tag}")
        return names

    for examples, outputs in random_corpora(300):
        gold = [bio(gold_of(example)) for example in examples]
        found = [bio(slow_tags(*pair)) for pair in zip(examples, outputs)]
        expected = metrics.f1_score(gold, found, zero_division=0)
        assert af.score_slots(examples, outputs)["f1"] == pytest.approx(expected, abs=1e-12)


def score(text: str, slots: str, output: str, language: str = "en") -> tuple[float, float]:
    pairs = [dict(zip(("type", "value"), part.split(": "))) for part in slots.split("; ") if part]
    example = {"language": language, "text": text, "slots": pairs}
    scores = af.score_slots([example], [output])
    return scores["f1"], scores["f1_strict"]


@pytest.mark.parametrize("text, slots, output, expected", [
    ("wake me at five am", "time: five am", "time: five am", (1, 1)),
    ("wake me at five am", "time: five am", "TIME: five am", (0, 0)),  # the case of a type counts;
    ("wake me at five am", "time: five am", "time: Five AM", (1, 0)),  # of a value in `f1_strict`
    # A value that the text does not have costs nothing in `f1`.
    ("wake me at five am", "time: five am", "time: five am; date: today", (1, 2 / 3)),
    ("five to five", "time: five", "time: five", (2 / 3, 1)),  # every occurrence is tagged
    ("five am", "time: five; time: am", "time: five am", (1, 0)),  # neighbours of one type merge
    ("five am", "date: five; time: am", "time: five am; date: five", (1, 0.5)),  # the last one wins
    ("nine five", "time: nine", "NONE", (0, 0)),
    ("at 5 o'clock", "time: 5 o'clock", " time: 5 o'clock \nmore", (1, 1)),
    ("the cat at", "place: at", "place: at", (1, 1)),  # whole words first
])  # fmt: skip
def test_scores_of_slots_by_hand(text, slots, output, expected):
    assert score(text, slots, output) == pytest.approx(expected)


def test_japanese_and_chinese_are_counted_in_characters_but_ascii_whole():
    assert af.slot_words("明日New Yorkの5時", "ja") == ["明", "日", "New", "York", "の", "5", "時"]
    slots = "place: Thurmont; time: 9点"
    assert score("预订在Thurmont9点的位子", slots, slots, "zh") == (1, 1)
    assert score("明日の朝", "date: 明日", "date: 明", "ja") == (0, 0)


@pytest.mark.parametrize("variety, language", [
    ("zh-TW", "zh"), ("zh_Hans", "zh"), ("ja-JP", "ja"), ("en-GB", "en"), ("ar_EG", "ar"),
])  # fmt: skip
def test_slots_of_a_variety_are_counted_as_those_of_its_language(variety, language):
    text = "预订在Thurmont9点的 位子 now"
    assert af.slot_words(text, variety) == af.slot_words(text, language)
    for slots, output in [("time: 9点", "time: 9点"), ("time: 9点", "time: 9点的"), ("", "x: 位")]:
        if language in ("zh", "ja") or not slots:
            found = score(text, slots, output, variety)
            assert found == score(text, slots, output, language)
    # In Chinese, a value is its first occurrence; in English, its first one as whole words.
    example = {"text": "今天 天 now", "slots": [{"type": "x", "value": "天"}], "language": variety}
    before = "今" if language in ("zh", "ja") else "今天"
    words = [word for word, _ in af.tag_slots(example)]
    tags = [kind for _, kind in af.tag_slots(example)]
    assert words[: tags.index("x")] == [before]
    # In Chinese, a wrong slot within a word costs; in English, it occurs nowhere.
    cost = score("明日の朝 now", "time: now", "time: now; date: 明日", variety)[0]
    assert cost == pytest.approx(2 / 3 if language in ("zh", "ja") else 1)


@pytest.mark.parametrize(
    "output", ["None", "none\ntime: five", "", "time", "time: five: x", "time:five"]
)
def test_an_output_in_another_format_names_no_slot(output):
    assert score("five", "", output) == (0, 0)
    assert score("at five", "time: five", output) == (0, 0)
    assert score("at five", "time: five", f"{output}; time: five") == (
        (0, 0) if "\n" in output else (1, 1)
    )


def test_names_are_read_from_json_by_a_pattern():
    """Text around the JSON, or a missing end, does no harm."""
    slots = [("PER", 'Ann "Bo" Lee'), ("ORG", "ACME"), ("LOC", "Rome")]
    slots = [{"type": kind, "value": value} for kind, value in slots]
    example = {"language": "en", "text": 'Ann "Bo" Lee of ACME in Rome', "slots": slots}
    example["system"] = af.ASK_NAMES
    results = [{"TypeName": slot["type"], "Text": slot["value"]} for slot in slots]
    for output, expected in [
        (json.dumps({"Results": results}), {"f1": 1, "f1_strict": 1}),
        ("Here: " + json.dumps({"Results": results}, indent=2)[:-3], {"f1": 1, "f1_strict": 1}),
        (json.dumps({"Results": results[:1]}), {"f1": 0.5, "f1_strict": 0.5}),
        ("nothing", {"f1": 0, "f1_strict": 0}),
        ("PER: ACME", {"f1": 0, "f1_strict": 0}),
    ]:
        assert af.TASKS["uner"].score([example], [], [output]) == expected


def test_names_within_the_name_of_an_organisation_are_part_of_it():
    """All places are tagged first, then persons, then organisations, in whatever order they are."""
    slots = [("ORG", "Bank of Rome"), ("PER", "Ann Rome"), ("LOC", "Rome")]
    example = {"language": "en", "text": "Bank of Rome sent Ann Rome to Rome"}
    example |= {"slots": [{"type": kind, "value": value} for kind, value in slots]}
    example["system"] = af.ASK_NAMES
    for order in itertools.permutations(slots):
        results = [{"TypeName": kind, "Text": value} for kind, value in order]
        output = json.dumps({"Results": results})
        assert af.parse_json(output) == [slots[2], slots[1], slots[0]]
        assert af.score_commands([example], [], [output]) == {"f1": 1, "f1_strict": 1}


# ---- Loading


def put(path: Path, rows: list) -> None:
    """Write a file of one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")


def load(data: Path, task: str, language: str, split: str = "test") -> list[dict]:
    return list(af.TASKS[task].load(language, split, af.Settings(task=task, data_dir=data)))


@pytest.fixture
def data(tmp_path) -> Path:
    slots = [{"type": "time", "value": "five am"}, {"type": "date", "value": "friday"}]
    time = {"text": "wake me at five am on friday", "slots": slots}
    for task in ("massive", "xsid"):
        for split in ("valid", "test"):
            put(tmp_path / task / "en" / f"{split}.jsonl", [time, {"text": "stop", "slots": []}])
    put(tmp_path / "massive/en/train.jsonl", [time])
    for split in ("dev", "test"):
        tagged = {
            "tokens": ["Ann", "Lee", "left", "Rome"],
            "tags": ["B-PER", "I-PER", "O", "B-LOC"],
        }
        put(tmp_path / "uner/en" / f"{split}.jsonl", [tagged, {"tokens": ["Hm"], "tags": ["O"]}])
    tagged = {"tokens": ["他", "在", "北京"], "tags": ["O", "O", "B-LOC"]}
    put(tmp_path / "uner/zh/test.jsonl", [tagged])
    put(tmp_path / "translation/en-de/test.tsv", ["Good day\tGuten Tag", "Yes\tJa"])
    return tmp_path


ANN = '{"TypeName": "PER", "Text": "Ann Lee"}'
ROME = '{"TypeName": "LOC", "Text": "Rome"}'


@pytest.mark.parametrize("task, language, targets", [
    ("massive", "en", ["time: five am; date: friday", "None"]),
    ("xsid", "en", ["time: five am; date: friday", "None"]),
    ("uner", "en", [f'{{"Results": [{ANN}, {ROME}]}}', '{"Results": []}']),
    ("uner", "zh", ['{"Results": [{"TypeName": "LOC", "Text": "北京"}]}']),
    ("translation", "en-de", ["Guten Tag", "Ja"]),
    ("translation", "de-en", ["Good day", "Yes"]),  # from the file of the other direction
])  # fmt: skip
def test_an_example_has_an_instruction_and_a_target_that_scores_1(data, task, language, targets):
    if task == "translation":
        pytest.importorskip("sacrebleu")
    examples = load(data, task, language)
    assert [example["target"] for example in examples] == targets
    for example in examples:
        assert example["user"]
        assert 0 < len(example["system"].split()) <= 30
    best = af.TASKS[task].score(examples, [], targets)
    worst = af.TASKS[task].score(examples, [], ["?"] * len(targets))
    for metric in best:
        if metric != "bleu":  # needs four words in a row
            assert best[metric] == pytest.approx(1)
        assert worst[metric] < 0.1


def test_a_direction_of_translation_with_data_of_its_own_uses_these(data):
    put(data / "translation/de-en/test.tsv", ["Hallo\tHello"])
    assert [example["target"] for example in load(data, "translation", "de-en")] == ["Hello"]
    assert [example["target"] for example in load(data, "translation", "en-de")] == [
        "Guten Tag",
        "Ja",
    ]


@pytest.mark.parametrize("direction, source, target", [
    ("en-de", "English", "German"), ("de-en", "German", "English"), ("cs-is", "Czech", "Icelandic"),
    ("en-zh-TW", "English", "Chinese"), ("he-ja", "Hebrew", "Japanese"),
    ("uk-ru", "Ukrainian", "Russian"), ("en-xx", "English", "xx"),
])  # fmt: skip
def test_a_translation_is_asked_for_in_its_direction(data, direction, source, target):
    if direction not in ("en-de", "de-en"):
        put(data / f"translation/{direction}/test.tsv", ["one\tuno"])
    examples = load(data, "translation", direction)
    for example in examples:
        assert example["system"].startswith(f"Translate the text from {source} into {target}.")
    if direction == "de-en":  # from the file of the other direction
        assert [example["user"] for example in examples] == ["Guten Tag", "Ja"]


def test_training_validation_and_tests_have_their_own_files_lengths_limits_and_prompts(monkeypatch):
    def load(language, split, settings):
        return [{"language": language, "split": split} for _ in range(9)]

    def encode(tokenizer, examples, max_length, training):
        for k, example in enumerate(examples):
            labels = {"labels": np.array([1]), "cut": False, "example": k}
            yield example | labels | {"length": max_length, "training": training}

    def found(features: list[dict]) -> Counter:
        names = ("language", "split", "length", "training")
        return Counter(tuple(feature[name] for name in names) for feature in features)

    task = af.Task(None, load, encode, None, [], max_length=80, test_length=70, new_tokens=4)
    monkeypatch.setitem(af.TASKS, "writing", task)
    settings = af.Settings(task="writing", train_languages=["en", "fr"], languages=["de"])
    settings.limit_train, settings.limit_test, settings.max_length = 2, 3, 50
    settings.validate = 1
    for longest, length in ((99, 70), (60, 60)):
        tokenizer = SimpleNamespace(model_max_length=longest)
        training, validation, tests = af.load_data(settings, tokenizer)
        assert found(training) == {(code, "train", 50, True): 2 for code in ("en", "fr")}
        assert found(validation) == {(code, "valid", 50, True): 2 for code in ("en", "fr")}
        assert list(tests) == ["en", "fr", "de"]
        for code, (examples, features) in tests.items():
            assert found(features) == {(code, "test", length, False): 3} and len(examples) == 3


def test_a_language_without_training_data_is_trained_on_validation_data(data, capsys):
    assert len(load(data, "massive", "en", "train")) == 1
    assert capsys.readouterr().out == ""
    assert len(load(data, "xsid", "en", "train")) == 2
    assert len(load(data, "uner", "en", "train")) == 2
    output = capsys.readouterr().out
    assert "xsid en: no train.jsonl; training on its validation file" in output
    assert "uner en: no train.jsonl; training on its validation file" in output


@pytest.mark.parametrize("file", ["train", "valid"])
def test_slots_to_train_on_may_stand_in_another_order_than_in_the_text(tmp_path, file):
    slots = [{"type": "time", "value": "five"}, {"type": "person", "value": "me"}]
    put(tmp_path / f"xsid/en/{file}.jsonl", [{"text": "wake me at five", "slots": slots}])
    (example,) = load(tmp_path, "xsid", "en", "train")
    assert example["target"] == "time: five; person: me"


def test_examples_of_training_do_not_validate(data, capsys):
    assert len(load(data, "massive", "en", "valid")) > 0
    assert capsys.readouterr().out == ""
    for task in ("xsid", "uner"):
        with pytest.raises(af.UserError, match=f"{task} en: without train.jsonl"):
            load(data, task, "en", "valid")


def test_utterances_of_different_files_are_not_taken_for_translations(data):
    """Numbers of rows may start again in each file."""
    english = [{"text": "wake me", "slots": [], "id": 1}]
    persian = [{"text": "tea", "slots": [], "id": 1}]
    put(data / "massive/en/train.jsonl", english)
    put(data / "massive/fa/valid.jsonl", persian)
    settings = af.Settings(task="massive", data_dir=data)
    with pytest.raises(af.UserError, match=r"massive/fa/train\.jsonl: file not found"):
        [*af.utterance_pairs("fa", "train", settings)]
    put(data / "massive/fa/train.jsonl", persian)
    assert [*af.utterance_pairs("fa", "train", settings)] == [("wake me", "tea")]


@pytest.mark.parametrize("language, text, annotated, slots", [
    ("en", "wake me at five am this week", "wake me at [time : five am] [date : this week]",
     [("time", "five am"), ("date", "this week")]),
    ("zh", "这周五点叫我起床", "[date : 这周] [time : 五点] 叫我起床",
     [("date", "这周"), ("time", "五点")]),
    ("zh", "明天去New York吧", "[date : 明天] 去 [place_name : New York] 吧",
     [("date", "明天"), ("place_name", "New York")]),
    ("zh", "播放周杰伦", "播放 [artist_name : 周 杰伦]", [("artist_name", "周杰伦")]),
    ("ja", "五時に", "[time : 五時] に", [("time", "五時")]),
    ("en", "a  b c", "a [time : b c]", [("time", "b c")]),
    ("en", "stop", "stop", []),
])  # fmt: skip
def test_a_text_of_massive_on_the_hub_does_not_show_where_its_slots_are(
    language, text, annotated, slots
):
    """In Chinese and Japanese, the annotation has blanks around the slots."""
    row = {"utt": text, "annot_utt": annotated}
    read, found = af.read_slots("here", row, language)
    assert read == text
    assert found == [{"type": kind, "value": value} for kind, value in slots]
    af.tag_slots({"text": read, "slots": found, "language": language})  # finds them in the text


@pytest.mark.parametrize("language, tokens, tags, text, name", [
    ("zh", "她 是 Amy Love 的 朋友 。", "O O B I O O O", "她是Amy Love的朋友。", "Amy Love"),
    ("zh", "他 在 José María 公司", "O O B I O", "他在José María公司", "José María"),
    ("zh", "約 3.33 m 長 ， 1990 年", "O O O O O B I", "約3.33 m長，1990年", "1990年"),
    ("ja", "東京 タワー だ", "B I O", "東京タワーだ", "東京タワー"),
    ("en", "She is Amy Love .", "O O B I O", "She is Amy Love .", "Amy Love"),
])  # fmt: skip
def test_tagged_words_are_joined_as_their_language_is_written(language, tokens, tags, text, name):
    """Without blanks in Chinese and Japanese, but not between two Latin words."""
    tags = [{"O": "O"}.get(tag, f"{tag}-PER") for tag in tags.split()]
    read, slots = af.read_slots("here", {"tokens": tokens.split(), "tags": tags}, language)
    assert read == text and slots == [{"type": "PER", "value": name}]
    af.tag_slots({"text": read, "slots": slots, "language": language})  # finds it in the text


def test_a_text_of_massive_that_is_not_its_annotated_text_is_not_used():
    row = {"utt": "wake me at 5 am", "annot_utt": "wake me at [time : five am]"}
    assert af.read_slots("here", row, "en")[0] == "wake me at five am"


@pytest.mark.parametrize("annotated", [
    "wake me at [time : five am",
    "wake me at time : five am]",
    "wake [me at [time : five am]",
    "wake me at [five am]",
    "wake me at [time : ]",
])  # fmt: skip
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_slot_that_is_not_closed_is_an_error_that_names_its_line(tmp_path, annotated, split):
    text = "wake me at five am"
    good = {"utt": text, "annot_utt": "wake me at [time : five am]"}
    put(tmp_path / f"massive/en/{split}.jsonl", [good, {"utt": text, "annot_utt": annotated}])
    with pytest.raises(af.UserError, match=rf"{split}\.jsonl:2: .*unclosed"):
        load(tmp_path, "massive", "en", split)


@pytest.mark.parametrize("value", ["am ", " am", "", "am\n", "five  am", "pm", "am five"])
def test_a_slot_that_no_answer_can_match_is_an_error_that_names_its_line(tmp_path, value):
    good = {"text": "at five am", "slots": [{"type": "time", "value": "five am"}]}
    bad = {"text": "at five am  now", "slots": [{"type": "time", "value": value}]}
    put(tmp_path / "massive/en/test.jsonl", [good, bad])
    with pytest.raises(af.UserError, match=r"test\.jsonl:2: "):
        load(tmp_path, "massive", "en")


@pytest.mark.parametrize("kind", ["MISC", "per", "OTH", ""])
def test_a_name_of_another_type_than_person_organisation_or_place_is_an_error(tmp_path, kind):
    """The pattern that reads the answers knows only these."""
    good = {"text": "Ann of ACME", "slots": [{"type": "PER", "value": "Ann"}]}
    bad = {"text": "Ann of ACME", "slots": [{"type": kind, "value": "Ann"}]}
    put(tmp_path / "uner/en/test.jsonl", [good, bad])
    with pytest.raises(af.UserError, match=r"test\.jsonl:2: .*PER"):
        load(tmp_path, "uner", "en")
    put(tmp_path / "uner/en/test.jsonl", [good])
    (example,) = load(tmp_path, "uner", "en")
    assert af.score_commands([example], [], [example["target"]]) == {"f1": 1, "f1_strict": 1}


@pytest.mark.parametrize("ascii_only", [False, True])
def test_names_are_read_however_json_writes_them(ascii_only):
    names = [("PER", 'André "Dédé" Roux'), ("PER", "日本\ttab"), ("ORG", "a\\b/c")]
    results = [{"TypeName": kind, "Text": value} for kind, value in names]
    assert af.parse_json(json.dumps({"Results": results}, ensure_ascii=ascii_only)) == names


def test_a_name_with_an_escape_that_json_lacks_is_read_without_it():
    assert af.parse_json(r'[{"TypeName": "LOC", "Text": "St\. Ives\q"}]') == [("LOC", "St. Ivesq")]


def load_and_count(data: Path, capsys, split: str, **options) -> tuple[list[dict], int]:
    """Return English examples, and how many of their answers are said to be misread."""
    settings = af.Settings(task="massive", data_dir=data, **options)
    examples = af.load_examples(settings, split, ["en"])["en"]
    output = capsys.readouterr().out
    assert f"massive, {split}: en {len(examples)}\n" in output
    numbers = re.findall(rf"massive, {split}: (\d+) answers cannot be read", output)
    return examples, int(numbers[0]) if numbers else 0


def scores_of_targets(examples: list[dict]) -> list[float]:
    """Return the strict score of each example that has slots, with its own target as the answer."""
    scored = [[example, example["target"]] for example in examples if example["slots"]]
    return [af.score_slots([example], [target])["f1_strict"] for example, target in scored]


def test_values_that_contain_the_signs_of_the_format_are_counted_and_said(tmp_path, capsys):
    rng, rows = random.Random(7), []
    for _ in range(300):
        values = ["".join(rng.choices("ab:; ", k=rng.randint(1, 6))).strip() or "a" for _ in "12"]
        slots = [{"type": "time", "value": value} for value in values]
        rows.append({"text": " | ".join(values), "slots": slots[: rng.randint(0, 2)]})
    put(tmp_path / "massive/en/train.jsonl", rows)
    put(tmp_path / "massive/en/test.jsonl", [rows[0] | {"slots": []}])
    assert load_and_count(tmp_path, capsys, "test")[1] == 0
    for limit, least in ((None, 30), (100, 5)):
        examples, count = load_and_count(tmp_path, capsys, "train", limit_train=limit)
        assert len(examples) == (limit or 300)
        assert count == sum(value < 1 for value in scores_of_targets(examples)) > least


@pytest.mark.parametrize("kind, value", [
    ("time", "five\nam"), ("time: of day", "five"), ("date; time", "five"),
])  # fmt: skip
def test_other_slots_that_the_format_cannot_express_are_counted_and_said(
    tmp_path, capsys, kind, value
):
    slots = [{"type": kind, "value": value}, {"type": "date", "value": "now"}]
    put(tmp_path / "massive/en/test.jsonl", [{"text": f"{value} now", "slots": slots}])
    examples, count = load_and_count(tmp_path, capsys, "test")
    assert scores_of_targets(examples) != [1]
    assert count == 1


def test_the_languages_of_a_split_share_a_line_and_a_count(data, capsys):
    slots = [{"type": "time", "value": "five; six"}]
    for code in ("de", "fr"):
        put(data / f"massive/{code}/test.jsonl", [{"text": "five; six", "slots": slots}] * 2)
    af.load_examples(af.Settings(task="massive", data_dir=data), "test", ["de", "en", "fr"])
    assert capsys.readouterr().out.splitlines() == [
        "massive, test: de 2, en 2, fr 2",
        "massive, test: 4 answers cannot be read back: a slot holds '; ', ': ' or a line break",
    ]


@pytest.mark.parametrize("language, value", [
    ("bn", "\u09b8\u09ae\u09df"),  # NFC takes this letter apart, though it is the usual form
    ("hi", "\u0938\u095c\u0915"),
    ("vi", "ti\u00ea\u0301ng"), ("ja", "\u30d5\u3099\u30e9"), ("fr", "E\u0301te\u0301"),
    ("xx", "J\u030cA"),  # composed in small letters alone
])  # fmt: skip
def test_an_answer_is_right_in_whatever_form_a_tokenizer_writes_its_accents(language, value):
    """Qwen's tokenizer reads prompts and targets in the form NFC, Llama's as they are."""
    slots = [{"type": "date", "value": value}]
    example = {"language": language, "text": f"ab {value} ba", "slots": slots}
    if language == "ja":
        example["text"] = f"ab{value}ba"
    for form in ("NFC", "NFD"):
        written = unicodedata.normalize(form, f"date: {value}")
        for answer in (written, f"date: {value}"):
            assert af.score_slots([example], [answer]) == {"f1": 1, "f1_strict": 1}
    wrong = af.score_slots([example], [f"date: {value}x"])
    assert wrong == {"f1": 0, "f1_strict": 0}


def test_translations_are_compared_in_one_form():
    pytest.importorskip("sacrebleu")
    text = "\u0938\u095c\u0915 \u092a\u0930 \u0917\u093e\u095c\u0940 \u0939\u0948"
    for form in ("NFC", "NFD"):
        answer = unicodedata.normalize(form, text)
        assert answer != text
        scores = af.score_translation([{"language": "en-hi", "target": text}], [], [answer])
        assert scores == {"bleu": pytest.approx(1), "chrf": pytest.approx(1)}


def test_translations_into_chinese_are_scored_in_characters():
    pytest.importorskip("sacrebleu")
    example = {"language": "en-zh", "target": "今天天气很好"}
    scores = af.score_translation([example], [], ["今天天气很好"])
    assert scores == {"bleu": pytest.approx(1), "chrf": pytest.approx(1)}
    assert 0.4 < af.score_translation([example], [], ["今天天气很坏"])["bleu"] < 1


@pytest.mark.parametrize("direction, source, target", [
    ("en-de", "en", "de"), ("en-zh-TW", "en", "zh-TW"), ("zh-TW-en", "zh-TW", "en"),
    ("zh_Hans-zh_Hant", "zh_Hans", "zh_Hant"), ("pt-BR-pt-PT", "pt-BR", "pt-PT"),
    ("en-ast", "en", "ast"),
])  # fmt: skip
def test_a_direction_names_two_languages_perhaps_with_regions(direction, source, target):
    assert af.sides_of(direction) == (source, target)


@pytest.mark.parametrize("direction", ["en", "en-", "-de", "en-de-", "en-TW", "EN-DE", "en_de", ""])
def test_another_name_of_a_direction_is_an_error(direction):
    with pytest.raises(af.UserError, match="direction"):
        af.sides_of(direction)


@pytest.mark.parametrize("target, expected", [
    ("de", "13a"), ("en-GB", "13a"), ("pt_BR", "13a"), ("zh", "zh"), ("zh-TW", "zh"),
    ("zh_Hans", "zh"), ("ja", "ja-mecab"), ("ja-JP", "ja-mecab"), ("ko", "ko-mecab"),
    ("ko-KR", "ko-mecab"), ("th", "char"), ("th-TH", "char"), ("lo", "char"), ("km", "char"),
    ("my", "char"), ("bo", "char"), ("dz", "char"),
    ("zho_Hans", "zh"), ("cmn", "zh"), ("jpn_Jpan", "ja-mecab"), ("kor_Hang", "ko-mecab"),
    ("tha_Thai", "char"), ("deu_Latn", "13a"),
])  # fmt: skip
def test_bleu_splits_a_translation_as_its_language_needs(target, expected):
    """The scores are those of sacrebleu with the tokenizer of this name."""
    sacrebleu = pytest.importorskip("sacrebleu")
    assert af.bleu_tokenizer(f"en-{target}") == expected
    assert af.bleu_tokenizer(f"{target}-en") == "13a"
    if expected == "ja-mecab":
        pytest.importorskip("MeCab")
    if expected == "ko-mecab":
        pytest.importorskip("mecab_ko")
    references = ["今天天气很好，我们去公园。", "ฉันรักเธอมากที่สุดในโลก", "We met Ann, Bo and Li ."]
    outputs = ["今天天气很好，我们去学校。", "ฉันรักเธอมากในโลกนี้", "We met Ann and Bo , today."]
    examples = [{"language": f"en-{target}", "target": reference} for reference in references]
    scores = af.score_translation(examples, [], outputs)
    bleu = sacrebleu.corpus_bleu(outputs, [references], tokenize=expected).score
    assert scores["bleu"] == pytest.approx(bleu / 100)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(outputs, [references]).score / 100)
    other = sacrebleu.corpus_bleu(outputs, [references], tokenize="13a").score
    assert (bleu == other) == (expected == "13a")


def test_the_whole_translation_is_scored_not_its_first_line():
    sacrebleu = pytest.importorskip("sacrebleu")
    reference = "The cat sat on the mat. It slept all day."
    example = {"language": "de-en", "target": reference}
    whole = af.score_translation([example], [], ["The cat sat on the mat.\nIt slept all day.\n"])
    assert whole["bleu"] == pytest.approx(1)
    for output in ("The cat sat on the mat.\nBut nobody saw it.", "\n\nThe cat\n\nsat on it."):
        expected = sacrebleu.corpus_bleu([output.strip()], [[reference]]).score / 100
        found = af.score_translation([example], [], [output])["bleu"]
        assert found == pytest.approx(expected)
        assert found < whole["bleu"]


def test_the_tokenizers_of_bleu_stand_in_the_record(data, world, tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    short = af.TASKS["translation"]._replace(new_tokens=2)
    monkeypatch.setitem(af.TASKS, "translation", short)
    put(data / "translation/en-zh-TW/test.tsv", ["Good day\t你好", "Yes\t是"])
    argv = ["--task", "translation", "--method", "mid-align", "--strategy", "baseline"]
    argv += ["--train-languages", "en-de", "--languages", "en-zh-TW", "--epochs", "0"]
    argv += ["--model", str(world / "models/llama"), "--data-dir", str(data), "--device", "cpu"]
    argv += ["--max-length", "256", "--out", str(tmp_path / "runs"), "--limit-test", "1"]
    assert af.main(argv) == 0
    (path,) = (tmp_path / "runs").glob("*.json")
    record = json.loads(path.read_text("utf-8"))
    assert record["bleu_tokenizers"] == {"en-de": "13a", "en-zh-TW": "zh"}
    assert list(record["scores"]) == ["en-de", "en-zh-TW"]


def test_translation_is_aligned_with_local_text(data, world, tmp_path, monkeypatch):
    pytest.importorskip("sacrebleu")
    short = af.TASKS["translation"]._replace(new_tokens=2)
    monkeypatch.setitem(af.TASKS, "translation", short)
    put(data / "translation/en-de/train.tsv", ["Good day\tGuten Tag", "Yes\tJa"])
    put(data / "parallel/en-de.tsv", ["Good day\tGuten Tag", "Yes\tJa"])
    argv = ["--task", "translation", "--method", "mid-align", "--layer", "1", "--epochs", "1"]
    argv += ["--train-languages", "en-de", "--languages", "de-en", "--realign-languages", "de"]
    argv += ["--model", str(world / "models/llama"), "--data-dir", str(data), "--device", "cpu"]
    argv += ["--max-length", "256", "--realign-max-length", "64", "--realign-batch-size", "2"]
    assert af.main([*argv, "--out", str(tmp_path / "runs")]) == 0
    (path,) = (tmp_path / "runs").glob("*.json")
    record = json.loads(path.read_text("utf-8"))
    assert set(record["losses"]) == {"task", "align"} and set(record["pairs"]) == {"de"}


def test_directions_without_validation_data_on_the_hub_are_left_out_and_named(
    data, monkeypatch, capsys
):
    tokenizer, asked = decoder_tokenizer(True, True), []

    def load_dataset(path, name, split):
        asked.append((name, split))
        source, target = name.split("-")
        return [{"translation": {source: "Góðan dag", target: "Good day"}}]

    monkeypatch.setattr(af.datasets, "load_dataset", load_dataset)
    directions = ["en-de", "is-en", "de-en", "en-is"]
    settings = af.Settings(task="translation", train_languages=directions, max_length=256)
    assert len(af.load_features(settings, tokenizer, "valid")) == 2
    assert asked == [("de-en", "validation")] * 2
    output = capsys.readouterr().out
    assert "is-en has no validation" in output and "en-is has no validation" in output
    assert len(af.load_features(settings, tokenizer, "train")) == 4
    assert asked[2:] == [(name, "train") for name in ("de-en", "is-en", "de-en", "is-en")]
    settings.data_dir = data  # local data have what they have
    for direction in ("en-de", "is-en"):
        put(data / f"translation/{direction}/valid.tsv", ["Já\tYes"])
    assert len(af.load_features(settings, tokenizer, "valid")) == 4


def test_a_part_of_sacrebleu_that_is_missing_is_a_users_error(monkeypatch):
    pytest.importorskip("sacrebleu")
    for direction in ("en-de", "en-zh"):
        af.score_translation([{"language": direction, "target": "a"}], [], ["a"])
    monkeypatch.setitem(af.BLEU_TOKENIZERS, "ja", "no-such")
    with pytest.raises(af.UserError, match=r"en-ja.*pip install"):
        af.score_translation([{"language": "en-ja", "target": "a"}], [], ["a"])


# ---- Languages that are aligned, and their text


@pytest.mark.parametrize("task, languages", [
    ("massive", "cy jv sw az af"), ("xsid", "tr da ja lt no"), ("uner", "da hr sk sr"),
    ("translation", "he ja uk"),
])  # fmt: skip
def test_the_second_method_aligns_languages_of_its_task_that_have_no_labels(task, languages):
    settings = af.parse_args(["--method", "mid-align", "--task", task])
    assert settings.realign_languages == languages.split()
    assert settings.limit_links == (500 if task == "massive" else 100_000)
    tested = {side for code in settings.languages for side in code.split("-")}
    trained = {side for code in settings.train_languages for side in code.split("-")}
    if task != "xsid":  # whose codes may have a hyphen
        assert set(settings.realign_languages) <= tested - trained
    assert set(settings.realign_languages) <= {*settings.languages, *tested}


def test_the_second_method_aligns_the_languages_of_massive_if_no_task_is_named():
    settings = af.parse_args(["--method", "mid-align"])
    assert settings.realign_languages == "cy jv sw az af".split()


@pytest.mark.parametrize("task", ["udpos", "wikiann", "xnli", "xquad"])
def test_the_first_method_aligns_34_languages_with_every_task(task):
    settings = af.parse_args(["--task", task])
    assert len(settings.realign_languages) == 34 and settings.limit_links == 100_000
    assert settings.realign_languages == af.parse_args([]).realign_languages


def utterances(language: str, ids: list, form: str = "local") -> list[dict]:
    """Return rows of MASSIVE, of local data or of the hub, whose texts name their `id`."""
    rows = []
    for number in ids:
        row = {"id": number, "locale": language, "text": f"{language} {number} now"}
        row["slots"] = [{"type": "date", "value": "now"}]
        hub = {"id": number, "utt": row["text"], "annot_utt": f"{language} {number} [date : now]"}
        rows.append(row if form == "local" else hub)
    return rows


ENGLISH, WELSH = ["3", "1", "4", "15", "9"], ["9", "2", "3", "6", "1"]
JOINED = [(f"en {number} now", f"cy {number} now") for number in ("9", "3", "1")]


def test_parallel_text_of_massive_are_its_training_utterances_joined_by_id(tmp_path):
    for part, shift in (("train", 0), ("valid", 100)):
        for language, ids in (("en", ENGLISH), ("cy", WELSH)):
            shifted = [str(int(number) + shift) for number in ids]
            put(tmp_path / f"massive/{language}/{part}.jsonl", utterances(language, shifted))
    put(tmp_path / "parallel/en-cy.tsv", ["other text\ttestun arall"])  # is not read
    settings = af.parse_args(["--method", "mid-align", "--data-dir", str(tmp_path)])
    assert sorted(af.ParallelText("cy", settings).lines()) == sorted(JOINED)
    dev = af.ParallelText("cy", settings, "dev").lines()
    assert sorted(dev) == [(f"en {n} now", f"cy {n} now") for n in ("101", "103", "109")]
    settings.task = "xsid"
    text = [("other text", "testun arall")]
    assert list(af.ParallelText("cy", settings).lines()) == text


def test_parallel_text_of_massive_may_come_from_the_hub(monkeypatch):
    """Its rows have the slots within the text, and numbers or strings as `id`."""
    asked = []

    def load_dataset(path, revision, data_files, split):
        (file,) = data_files.values()
        asked.append((path, revision, file, split))
        ids = [*map(int, ENGLISH)] if file.startswith("en-US") else WELSH
        return utterances("en" if file.startswith("en-US") else "cy", ids, "hub")

    monkeypatch.setattr(af.datasets, "load_dataset", load_dataset)
    settings = af.parse_args(["--method", "mid-align"])
    for part in ("train", "dev"):
        text = af.ParallelText("cy", settings, part)
        first = list(text.lines())
        assert sorted(first) == sorted(JOINED)
        assert list(text.lines()) == first  # the hub is asked once
    source = "AmazonScience/massive", "refs/convert/parquet"
    assert asked == [
        (*source, f"{locale}/{part}/0000.parquet", part)
        for part in ("train", "validation")
        for locale in ("en-US", "cy-GB")
    ]


@pytest.mark.parametrize("problem", ["no id", "the id of another line"])
@pytest.mark.parametrize("language", ["en", "cy"])
def test_utterances_without_an_id_are_an_error_that_names_their_line(tmp_path, language, problem):
    for code in ("en", "cy"):
        rows = utterances(code, ENGLISH)
        if code == language:
            del rows[2]["id"]
            rows[2] |= {"id": rows[1]["id"]} if problem == "the id of another line" else {}
        put(tmp_path / f"massive/{code}/train.jsonl", rows)
    settings = af.Settings(task="massive", unit="sentence", data_dir=tmp_path)
    with pytest.raises(af.UserError, match=rf"{language}/train\.jsonl:3: .*'id'"):
        af.ParallelText("cy", settings)


def massive_of_11514_utterances(folder, codes):
    """Write as many utterances as MASSIVE has for training; they are numbered from 0."""
    for code in codes:
        put(folder / f"massive/{code}/train.jsonl", utterances(code, [*map(str, range(11_514))]))


def test_how_often_batches_of_massive_hold_an_english_sentence_twice(tmp_path):
    settings = af.parse_args(["--method", "mid-align", "--data-dir", str(tmp_path)])
    massive_of_11514_utterances(tmp_path, ["en", *settings.realign_languages])
    batches = af.in_chunks(af.load_pairs(settings)[0], settings.realign_batch_size)
    english = [{pair.source for pair in batch} for batch in itertools.islice(batches, 1000)]
    twice = sum(len(sentences) < settings.realign_batch_size for sentences in english)
    assert 25 < twice < 55  # of 1,000; if all five languages had the same 500, it would be 550
    text = Path(af.__file__).with_name("results").joinpath("differences.md").read_text("utf-8")
    assert "MASSIVE: about one batch in 25 has such a sentence" in " ".join(text.split())


def test_500_utterances_from_all_of_massive_are_aligned_by_default(tmp_path):
    """They are other ones in each language, and the same in each run."""
    massive_of_11514_utterances(tmp_path, ("en", "cy", "sw"))
    argv = ["--method", "mid-align", "--data-dir", str(tmp_path), "--realign-languages"]
    pairs = list(itertools.islice(af.load_pairs(af.parse_args([*argv, "cy"]))[0], 1000))
    chosen = {(pair.source, pair.target) for pair in pairs[:500]}
    assert len(chosen) == 500 and chosen == {(pair.source, pair.target) for pair in pairs[500:]}
    assert all(english[2:] == welsh[2:] for english, welsh in chosen)  # translations, by number
    numbers = [int(english.split()[1]) for english, _ in chosen]
    tenths = Counter(number * 10 // 11_514 for number in numbers)
    assert all(tenths[k] > 25 for k in range(10))  # the text is sorted by domain
    other_seed = af.parse_args([*argv, "cy", "--seed", "7"])
    assert set(af.ParallelText("cy", other_seed).lines()) == chosen
    english = {line[0] for line in af.ParallelText("sw", af.parse_args([*argv, "sw"])).lines()}
    assert len(english) == 500 and len(english & {line[0] for line in chosen}) < 60
    more = af.ParallelText("cy", af.parse_args([*argv, "cy", "--limit-links", "550"]))
    assert chosen < set(more.lines()) and len(list(more.lines())) == 550


def test_all_utterances_of_the_toy_world_are_parallel(world):
    argv = ["--method", "mid-align", "--data-dir", str(world / "data"), "--limit-links", "1000"]
    texts = {}
    for code in ("en", "qaa"):
        lines = (world / f"data/massive/{code}/train.jsonl").read_text("utf-8").splitlines()
        texts[code] = [json.loads(line)["text"] for line in lines]
    found = af.ParallelText("qaa", af.parse_args(argv)).lines()
    assert sorted(found) == sorted(zip(texts["en"], texts["qaa"], strict=True))


DATA = os.environ.get("ALIGNFREEZE_DATA")


@pytest.mark.skipif(not DATA, reason="needs a folder of real data in ALIGNFREEZE_DATA")
def test_real_utterances_of_massive_are_joined_as_pandas_joins_them():
    folder = Path(DATA) / "massive"
    tables = [
        pd.read_json(folder / f"{c}/valid.jsonl", lines=True, dtype=False) for c in ("fa", "en")
    ]
    joined = tables[0].merge(tables[1], on="id", suffixes=("", "_en"))
    settings = af.Settings(task="massive", unit="sentence", data_dir=Path(DATA))
    found = list(af.ParallelText("fa", settings, "dev").lines())
    assert sorted(found) == sorted(zip(joined["text_en"], joined["text"]))
    assert len(found) > 2000


@pytest.mark.skipif(not DATA, reason="needs a folder of real data in ALIGNFREEZE_DATA")
@pytest.mark.parametrize("task, language, variety", [
    ("xsid", "zh", "zh-TW"), ("xsid", "ja", "ja-JP"), ("uner", "zh", "zh_Hant"),
])  # fmt: skip
def test_real_data_of_a_variety_are_scored_as_those_of_its_language(
    tmp_path, task, language, variety
):
    (tmp_path / task).mkdir()
    (tmp_path / task / variety).symlink_to(Path(DATA) / task / language)
    examples, other = load(Path(DATA), task, language)[:300], load(tmp_path, task, variety)[:300]
    assert [row["text"] for row in examples] == [row["text"] for row in other]
    outputs = [example["target"] for example in examples]
    for k in range(1, len(outputs), 3):  # wrong extra slots, which must cost
        wrong = examples[k]["text"][2:4].strip()
        outputs[k] = f"wrong: {wrong}" if task == "xsid" else outputs[k - 1]
    scores = af.score_commands(examples, [], outputs)
    assert af.score_commands(other, [], outputs) == scores
    assert 0.3 < scores["f1"] < 0.95


@pytest.mark.skipif(not DATA, reason="needs a folder of real data in ALIGNFREEZE_DATA")
@pytest.mark.parametrize("task, language", [
    ("massive", "fa"), ("xsid", "ja"), ("xsid", "zh"), ("xsid", "ar"),
    ("uner", "en"), ("uner", "zh"),
])  # fmt: skip
def test_the_targets_of_real_data_score_nearly_1(task, language):
    """A value that occurs in several places is tagged in all; ": " in a value splits it."""
    examples = load(Path(DATA), task, language)
    outputs = [example["target"] for example in examples]
    scores = af.TASKS[task].score(examples, [], outputs)
    assert all(value > 0.99 for value in scores.values())


# ---- Prompts

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<e>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|answer|>{% endif %}"


def decoder_tokenizer(begin: bool, chat: bool, side: str = "right") -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, with a begin-of-text token (Llama 3) or without one (Qwen)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<b>", "<e>", "<p>", "<|system|>", "<|user|>", "<|answer|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    texts = ["wake me at five am: time", "Input: x\nOutput: time: five am"]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        special_tokens = [("<b>", 0)]
        options = {"single": "<b> $A", "special_tokens": special_tokens}
        tokenizer.post_processor = processors.TemplateProcessing(**options)
    names = {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<p>", "padding_side": side}
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    result.add_special_tokens({"additional_special_tokens": special[3:]})
    result.chat_template = TEMPLATE if chat else None
    return result


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_is_followed_by_the_target_and_the_end_token(data, begin, chat, side):
    tokenizer, examples = decoder_tokenizer(begin, chat, side), load(data, "massive", "en")
    train = list(af.encode_prompts(tokenizer, examples, 2048, True))
    test = list(af.encode_prompts(tokenizer, examples, 2048, False))
    for number, example in enumerate(examples):
        if chat:
            prompt = f"<|system|>{example['system']}<e><|user|>{example['user']}<e><|answer|>"
            target = example["target"]
        else:
            prompt = f"{example['system']}\n\nInput: {example['user']}\nOutput:"
            prompt, target = "<b>" * begin + prompt, " " + example["target"]
        ids, labels = (train[number][name].tolist() for name in ("input_ids", "labels"))
        assert tokenizer.decode(ids) == f"{prompt}{target}<e>"
        assert tokenizer.decode(test[number]["input_ids"]) == prompt
        size = len(test[number]["input_ids"])
        assert test[number]["labels"].tolist() == [af.IGNORE] * size
        assert test[number]["labels"].dtype == train[number]["labels"].dtype == np.int64
        assert ids[:size] == test[number]["input_ids"].tolist()
        assert labels == [af.IGNORE] * (size - 1) + ids[size:] + [af.IGNORE]
        assert [feature["example"] for feature in train] == [0, 1]
        assert not train[number]["cut"] and not test[number]["cut"]


@pytest.mark.parametrize("normaliser", [None, normalizers.Prepend("▁")])
def test_the_target_has_the_subwords_that_it_has_behind_the_prompt(data, normaliser):
    """The tokenizers of Llama 2 and Mistral put a blank in front of every text."""
    characters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ`:;,.0123456789\n"]
    ids = {token: number for number, token in enumerate(["<e>", "<u>", *characters, "▁t", "▁N"])}
    backend = Tokenizer(models.BPE(ids, [("▁", "t"), ("▁", "N")], unk_token="<u>"))
    blanks = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normaliser, blanks]) if normaliser else blanks
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="<u>")
    examples = load(data, "massive", "en")
    rows = list(af.encode_prompts(tokenizer, examples, 2048, True))
    for row, example in zip(rows, examples, strict=True):
        prompt = af.render_prompt(tokenizer, example["system"], example["user"])
        text = f"{prompt} {example['target']}"
        assert row["input_ids"].tolist() == [*tokenizer(text)["input_ids"], 0]


@pytest.mark.parametrize("chat", [True, False])
def test_an_overlong_prompt_is_cut_off_and_marked_as_cut(data, chat):
    tokenizer, examples = decoder_tokenizer(True, chat), load(data, "massive", "en")
    whole, _ = af.encode_prompts(tokenizer, examples, 2048, True)
    prompt, _ = af.encode_prompts(tokenizer, examples, 2048, False)
    size, total = len(prompt["input_ids"]), len(whole["input_ids"])
    for length in (size - 2, size, size + 3, total - 1, total, total + 1):
        feature = next(af.encode_prompts(tokenizer, examples, length, True))
        assert feature["input_ids"].tolist() == whole["input_ids"][:length].tolist()
        expected = whole["labels"][: length - 1].tolist() + [af.IGNORE]
        assert feature["labels"].tolist() == expected[:total]
        assert len(feature["labels"]) == len(feature["input_ids"])
        assert feature["cut"] == (length < total)


def test_a_chat_template_that_refuses_the_messages_is_a_users_error(data):
    tokenizer = decoder_tokenizer(True, True)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(af.UserError, match="chat template"):
        list(af.encode_prompts(tokenizer, load(data, "massive", "en"), 64, True))
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(af.UserError, match="chat template drops"):
        list(af.encode_prompts(tokenizer, load(data, "massive", "en"), 64, True))


def test_the_tasks_that_generate_text_train_and_test_in_different_languages():
    for task in (task for task in af.TASKS.values() if task.new_tokens):
        assert task.labels == 0
        assert task.max_length == task.test_length == 2048
        assert not set(task.train_languages) & set(task.languages)
    classifications = [task for task in af.TASKS.values() if not task.new_tokens]
    assert len(classifications) == 4
    assert all(task.labels and list(task.train_languages) == ["en"] for task in classifications)


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [32, 32, 32, 32, 2]), ("cuda", [128, 2])])
def test_a_gpu_generates_128_answers_at_a_time(device, sizes, monkeypatch):
    seen = []

    def generate(model, tokenizer, prompts, new_tokens):
        seen.append(len(prompts))
        return [f"answer {len(prompt)}" for prompt in prompts]

    monkeypatch.setattr(af, "generate", generate)
    model = SimpleNamespace(eval=lambda: None, device=torch.device(device))
    features = [{"input_ids": np.zeros(k % 50)} for k in range(130)]
    outputs = []
    task = af.TASKS["massive"]._replace(score=lambda *given: outputs.extend(given[2]) or {})
    af.evaluate(model, None, task, features, features, af.Settings(precision="fp32"))
    assert seen == sizes
    assert outputs == [f"answer {k % 50}" for k in range(130)]
