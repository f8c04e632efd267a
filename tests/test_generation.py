"""Tasks whose answer is generated text: what a model reads and learns, and how the text is scored."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import alignfreeze as af

score_names = af.TASKS["uner"].score

# ------------------------------------------------------------------------------------------------- scores of slots

TYPES = ("time", "date", "place_name", "song")
WORDS = {
    "en": "wake Wake me ME up at five a.m. in Paris : paris ; none x".split(),
    "ja": ["東", "京", "は", "New", "york", "5", "時", "駅", "の", ":"],
}


def random_example(rng: random.Random, language: str) -> dict:
    """A text of few different words, some of them in slots, which may be neighbours of one type."""
    words = rng.choices(rng.sample(WORDS[language], rng.randint(2, 6)), k=rng.randint(1, 9))
    space = " " if language == "en" else ""
    if language == "ja":  # two words of ASCII side by side would be one
        words = [b for a, b in zip(["は", *words], words) if not (a.isascii() and b.isascii())]
    slots, at = [], 0
    while at < len(words):
        size = rng.randint(1, 3)
        value = space.join(words[at : at + size])
        if rng.random() < 0.4:
            slots.append(
                {
                    "type": rng.choice(TYPES[:2]),
                    "value": value,
                    "at": at,
                    "size": len(words[at : at + size]),
                }
            )
        at += size
    return {"language": language, "text": space.join(words), "slots": slots, "words": words}


def in_order(example: dict) -> bool:
    """Whether each value's first place behind the last slot is the one that it was drawn at."""
    at = 0
    for slot in example["slots"]:
        words = example["words"]
        places = [
            k
            for k in range(at, len(words))
            if words[k : k + slot["size"]] == words[slot["at"] :][: slot["size"]]
        ]
        if not places or places[0] != slot["at"]:
            return False
        at = slot["at"] + slot["size"]
    return True


def random_output(rng: random.Random, example: dict) -> str:
    """The right answer, or one with phrases of other places and types, phrases from nowhere, and malformed parts."""
    space = " " if example["language"] == "en" else ""
    parts = [f"{slot['type']}: {slot['value']}" for slot in example["slots"]]
    if rng.random() < 0.7:
        parts = [part for part in parts if rng.random() < 0.7]
        for _ in range(rng.randint(0, 3)):
            phrase = space.join(rng.choices(example["words"], k=rng.randint(1, 2)))
            phrase = rng.choice((phrase, phrase.upper(), phrase.lower(), "nowhere", ""))
            parts.insert(rng.randint(0, len(parts)), f"{rng.choice(TYPES)}: {phrase}")
        if rng.random() < 0.2:
            parts.insert(
                rng.randint(0, len(parts)),
                rng.choice(("time", "time five", "time: five: six", "", "none")),
            )
    output = "; ".join(parts) or rng.choice(("None", "none", "NONE", "", "time:five"))
    return rng.choice(("", " ", "\n")) + output + rng.choice(("", " ", "\ntime: five", "\n\nInput: x"))


def slow_tags(example: dict, output: str) -> list[str | None]:
    """Of each word, the type that the last part of the output gives to it."""
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
    """Runs of equal types."""
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


def test_slots_are_scored_as_a_slow_reader_of_the_rules_does():
    seen, checked = set(), 0
    for examples, outputs in random_corpora(4000):
        same = size = 0
        for example, output in zip(examples, outputs):
            gold, found = slow_slots(gold_of(example)), slow_slots(slow_tags(example, output))
            same, size = same + len(gold & found), size + len(gold) + len(found)
        expected = 2 * same / size if size else 0
        assert af.score_slots(examples, outputs)["f1"] == pytest.approx(expected, abs=1e-12), (
            examples,
            outputs,
        )
        seen.add(round(expected, 3))
        checked += len(examples)
    assert {0, 1} < seen and len(seen) > 30 and checked > 3000


def test_slots_are_scored_as_seqeval_does():
    metrics = pytest.importorskip("seqeval.metrics")

    def bio(tags: list[str | None]) -> list[str]:
        before = [None, *tags[:-1]]
        return [
            "O" if tag is None else f"{'I' if tag == last else 'B'}-{tag}"
            for last, tag in zip(before, tags)
        ]

    for examples, outputs in random_corpora(300):
        gold = [bio(gold_of(example)) for example in examples]
        found = [bio(slow_tags(*pair)) for pair in zip(examples, outputs)]
        expected = metrics.f1_score(gold, found, zero_division=0)
        assert af.score_slots(examples, outputs)["f1"] == pytest.approx(expected, abs=1e-12)


def score(text: str, slots: str, output: str, language: str = "en") -> tuple[float, float]:
    pairs = [dict(zip(("type", "value"), part.split(": "))) for part in slots.split("; ") if part]
    example = {"language": language, "text": text, "slots": pairs}
    return tuple(af.score_slots([example], [output]).values())


@pytest.mark.parametrize("text, slots, output, expected", [
    ("wake me at five am", "time: five am", "time: five am", (1, 1)),
    ("wake me at five am", "time: five am", "TIME: five am", (0, 0)),  # the type's case counts,
    ("wake me at five am", "time: five am", "time: Five AM", (1, 0)),  # the value's only in the strict measure
    ("wake me at five am", "time: five am", "time: five am; date: today", (1, 2 / 3)),  # found nowhere: free
    ("five to five", "time: five", "time: five", (2 / 3, 1)),  # every occurrence is tagged
    ("five am", "time: five; time: am", "time: five am", (1, 0)),  # neighbours of one type are one slot
    ("five am", "date: five; time: am", "time: five am; date: five", (1, 0.5)),  # the later part wins
    ("nine five", "time: nine", "NONE", (0, 0)),
    ("at 5 o'clock", "time: 5 o'clock", " time: 5 o'clock \nmore", (1, 1)),
    ("the cat at", "place: at", "place: at", (1, 1)),  # whole words first
])  # fmt: skip
def test_scores_of_slots_by_hand(text, slots, output, expected):
    assert score(text, slots, output) == pytest.approx(expected)


def test_japanese_and_chinese_are_counted_in_characters_but_ascii_whole():
    assert af.slot_words("明日New Yorkの5時", "ja") == ["明", "日", "New", "York", "の", "5", "時"]
    assert score(
        "预订在Thurmont9点的位子", "place: Thurmont; time: 9点", "place: Thurmont; time: 9点", "zh"
    ) == (1, 1)
    assert score("明日の朝", "date: 明日", "date: 明", "ja") == (0, 0)


def test_outputs_that_fit_no_format_are_counted():
    outputs = [
        "None",
        "time: five",
        "time: five; date: x",
        "time",
        "",
        "time: a: b",
        "time: x; ",
        "none\nx",
        "a:b",
    ]
    examples = [{"language": "en", "text": "five", "slots": []}] * len(outputs)
    assert af.score_commands(examples, [], outputs)["malformed"] == 4
    in_json = [
        '{"Results": []}',
        '{"TypeName": "PER", "Text": "Ann"}',
        "Ann",
        '{"TypeName": "X", "Text": "A"}',
    ]
    assert score_names(examples[:4], [], in_json)["malformed"] == 2


def test_names_in_json_are_read_by_their_pattern():
    slots = [("PER", 'Ann "Bo" Lee'), ("ORG", "ACME"), ("LOC", "Rome")]
    slots = [{"type": kind, "value": value} for kind, value in slots]
    example = {"language": "en", "text": 'Ann "Bo" Lee of ACME in Rome', "slots": slots}
    results = [{"TypeName": slot["type"], "Text": slot["value"]} for slot in slots]
    perfect = {"f1": 1, "f1_strict": 1, "malformed": 0}
    assert score_names([example], [], [json.dumps({"Results": results})]) == perfect
    assert (
        score_names([example], [], ["Here: " + json.dumps({"Results": results}, indent=2)[:-3]])
        == perfect
    )
    assert score_names([example], [], [json.dumps({"Results": results[:1]})])["f1"] == 0.5
    assert score_names([example], [], ["nothing"]) == {"f1": 0, "f1_strict": 0, "malformed": 1}


# --------------------------------------------------------------------------------------------------------- loading


def put(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8"
    )


def load(data: Path, task: str, language: str, split: str = "test") -> list[dict]:
    return list(af.TASKS[task].load(language, split, SimpleNamespace(task=task, data_dir=data)))


@pytest.fixture
def data(tmp_path) -> Path:
    time = {"text": "wake me at five am on friday", "slots": [{"type": "time", "value": "five am"},
                                                              {"type": "date", "value": "friday"}]}  # fmt: skip
    for task in ("massive", "xsid"):
        for split in ("valid", "test"):
            put(tmp_path / task / "en" / f"{split}.jsonl", [time, {"text": "stop", "slots": []}])
    put(tmp_path / "massive/en/train.jsonl", [time])
    for split in ("dev", "test"):
        tagged = {"tokens": ["Ann", "Lee", "left", "Rome"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]}
        put(tmp_path / "uner/en" / f"{split}.jsonl", [tagged, {"tokens": ["Hm"], "tags": ["O"]}])
    put(tmp_path / "uner/zh/test.jsonl", [{"tokens": ["他", "在", "北京"], "tags": ["O", "O", "B-LOC"]}])
    put(tmp_path / "translation/en-de/test.tsv", ["Good day\tGuten Tag", "Yes\tJa"])
    return tmp_path


@pytest.mark.parametrize("task, language, targets", [
    ("massive", "en", ["time: five am; date: friday", "None"]),
    ("xsid", "en", ["time: five am; date: friday", "None"]),
    ("uner", "en", ['{"Results": [{"TypeName": "PER", "Text": "Ann Lee"}, {"TypeName": "LOC", "Text": "Rome"}]}',
                    '{"Results": []}']),
    ("uner", "zh", ['{"Results": [{"TypeName": "LOC", "Text": "北京"}]}']),
    ("translation", "en-de", ["Guten Tag", "Ja"]),
    ("translation", "de-en", ["Good day", "Yes"]),  # the other direction, turned round
])  # fmt: skip
def test_examples_have_an_instruction_an_input_and_a_target_that_scores_1(data, task, language, targets):
    if task == "translation":
        pytest.importorskip("sacrebleu")
    examples = load(data, task, language)
    assert [example["target"] for example in examples] == targets
    assert all(
        example["system"] and example["user"] and len(example["system"].split()) <= 30
        for example in examples
    )
    scores = af.TASKS[task].score(examples, [], targets)
    assert scores.pop("malformed", 0) == 0
    worst = af.TASKS[task].score(examples, [], ["?"] * len(targets))
    for metric in scores:
        assert scores[metric] == pytest.approx(1) or (metric, len(targets)) == (
            "bleu",
            2,
        )  # no four words in a row
        assert worst[metric] < 0.1


def test_a_language_without_training_data_is_trained_on_validation_data(data, capsys):
    assert len(load(data, "massive", "en", "train")) == 1
    assert capsys.readouterr().out == ""
    assert len(load(data, "xsid", "en", "train")) == 2
    assert len(load(data, "uner", "en", "train")) == 2
    assert capsys.readouterr().out.count("taken instead") == 2
    assert len(load(data, "uner", "en", "valid")) == 2


def test_massive_of_the_hub_is_parsed():
    row = {"annot_utt": "wake me at [time : five am] [date : this week]"}
    assert af.read_slots("here", row, "en") == ("wake me at five am this week", [
        {"type": "time", "value": "five am"}, {"type": "date", "value": "this week"}])  # fmt: skip


def test_translations_into_chinese_are_scored_in_characters():
    pytest.importorskip("sacrebleu")
    example = {"language": "en-zh", "target": "今天天气很好"}
    scores = af.score_translation([example], [], ["今天天气很好"])
    assert scores == {"bleu": pytest.approx(1), "chrf": pytest.approx(1)}
    assert 0.4 < af.score_translation([example], [], ["今天天气很坏"])["bleu"] < 1


def test_what_sacrebleu_lacks_is_said_before_training(monkeypatch):
    pytest.importorskip("sacrebleu")
    for direction in ("en-de", "en-zh"):
        af.score_translation([{"language": direction, "target": "a"}], [], ["a"])
    monkeypatch.setitem(af.BLEU_TOKENIZERS, "ja", "no-such")
    with pytest.raises(af.UserError, match=r"en-ja.*pip install"):
        af.score_translation([{"language": "en-ja", "target": "a"}], [], ["a"])


DATA = os.environ.get("ALIGNFREEZE_DATA")


@pytest.mark.skipif(
    not DATA, reason="ALIGNFREEZE_DATA names no folder with real massive/, xsid/ and uner/ to read"
)
@pytest.mark.parametrize("task, language", [("massive", "fa"), ("xsid", "ja"), ("xsid", "zh"), ("xsid", "ar"),
                                            ("uner", "en"), ("uner", "zh")])  # fmt: skip
def test_perfect_outputs_of_real_data_score_nearly_1(task, language):
    """Not quite 1: a value that stands in several places is tagged in all, and ": " in a value splits it."""
    examples = load(Path(DATA), task, language)
    outputs = [example["target"] for example in examples]
    scores = af.TASKS[task].score(examples, [], outputs)
    scores.pop("malformed", None)
    assert all(value > 0.99 for value in scores.values())


# --------------------------------------------------------------------------------------------------------- prompts

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<e>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|answer|>{% endif %}"


def decoder_tokenizer(begin: bool, chat: bool, side: str = "right") -> PreTrainedTokenizerFast:
    """Bytes and a few merges, as of Llama 3 (`begin`, begin-of-text in front) or Qwen (no such token)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<b>", "<e>", "<p>", "<|system|>", "<|user|>", "<|answer|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        ["wake me at five am: time", "Input: x\nOutput: time: five am"], trainer
    )
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<b> $A", special_tokens=[("<b>", 0)]
        )
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
        assert ids[:size] == test[number]["input_ids"].tolist()  # tokenised apart
        assert labels == [af.IGNORE] * (size - 1) + ids[size:] + [af.IGNORE]
        assert [feature["example"] for feature in train] == [0, 1]
        assert not train[number]["cut"] and not test[number]["cut"]


@pytest.mark.parametrize("chat", [True, False])
def test_overlong_prompts_are_cut_and_said_to_be(data, chat):
    tokenizer, examples = decoder_tokenizer(True, chat), load(data, "massive", "en")
    (whole, _), (prompt, _) = (
        af.encode_prompts(tokenizer, examples, 2048, training) for training in (True, False)
    )
    size, total = len(prompt["input_ids"]), len(whole["input_ids"])
    for length in (size - 2, size, size + 3, total - 1, total, total + 1):
        feature = next(af.encode_prompts(tokenizer, examples, length, True))
        assert feature["input_ids"].tolist() == whole["input_ids"][:length].tolist()
        known = whole["labels"][: length - 1].tolist() + [af.IGNORE]
        assert feature["labels"].tolist() == known[:total]
        assert len(feature["labels"]) == len(feature["input_ids"])
        assert feature["cut"] == (length < total)


def test_a_chat_template_that_takes_no_system_message_is_a_users_error(data):
    tokenizer = decoder_tokenizer(True, True)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(af.UserError, match="chat template"):
        list(af.encode_prompts(tokenizer, load(data, "massive", "en"), 64, True))
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(af.UserError, match="chat template leaves nothing"):
        list(af.encode_prompts(tokenizer, load(data, "massive", "en"), 64, True))


def test_rows_of_tasks_that_generate():
    for name in ("massive", "xsid", "uner", "translation"):
        row = af.TASKS[name]
        assert row.new_tokens > 0 and row.labels == 0 and row.max_length == row.test_length == 2048
        assert not set(row.sources) & set(row.targets)
    assert all(
        row.new_tokens == 0 and list(row.sources) == ["en"] for row in af.TASKS.values() if row.labels
    )
