"""Tests of tasks that generate text: the data, the prompts, and the scores of the text."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
        found = af.score_slots(examples, outputs)["f1"]
        assert found == pytest.approx(expected, abs=1e-12), (examples, outputs)
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


def test_a_language_without_training_data_is_trained_on_validation_data(data, capsys):
    assert len(load(data, "massive", "en", "train")) == 1
    assert capsys.readouterr().out == ""
    assert len(load(data, "xsid", "en", "train")) == 2
    assert len(load(data, "uner", "en", "train")) == 2
    output = capsys.readouterr().out
    assert "valid.jsonl instead" in output
    assert "dev.jsonl instead" in output
    assert len(load(data, "uner", "en", "valid")) == 2


def test_a_row_of_massive_on_the_hub_has_its_slots_in_the_text():
    row = {"annot_utt": "wake me at [time : five am] [date : this week]"}
    slots = [{"type": "time", "value": "five am"}, {"type": "date", "value": "this week"}]
    assert af.read_slots("here", row, "en") == ("wake me at five am this week", slots)


def test_translations_into_chinese_are_scored_in_characters():
    pytest.importorskip("sacrebleu")
    example = {"language": "en-zh", "target": "今天天气很好"}
    scores = af.score_translation([example], [], ["今天天气很好"])
    assert scores == {"bleu": pytest.approx(1), "chrf": pytest.approx(1)}
    assert 0.4 < af.score_translation([example], [], ["今天天气很坏"])["bleu"] < 1


def test_a_part_of_sacrebleu_that_is_missing_is_a_users_error(monkeypatch):
    pytest.importorskip("sacrebleu")
    for direction in ("en-de", "en-zh"):
        af.score_translation([{"language": direction, "target": "a"}], [], ["a"])
    monkeypatch.setitem(af.BLEU_TOKENIZERS, "ja", "no-such")
    with pytest.raises(af.UserError, match=r"en-ja.*pip install"):
        af.score_translation([{"language": "en-ja", "target": "a"}], [], ["a"])


DATA = os.environ.get("ALIGNFREEZE_DATA")


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
