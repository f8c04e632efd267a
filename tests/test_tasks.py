"""Tests of the classification tasks: what an encoder reads, its loss, and its scores."""

import itertools
import json
import math
import os
import random
import re
import string
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import toy_world
from tokenizers import normalizers
from transformers import AutoTokenizer, XLMRobertaTokenizer

import alignfreeze as af

ARCHITECTURES = ("distilbert", "bert", "xlmr")
METRICS = {"udpos": ["accuracy"], "wikiann": ["f1"], "xnli": ["accuracy"]}
METRICS["xquad"] = ["f1", "em", "f1_authors", "em_authors"]
NER_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tokenizer(request, world):
    tokenizer = AutoTokenizer.from_pretrained(world / "models" / request.param)
    tokenizer.architecture = request.param
    return tokenizer


def load(data: Path, task: str, language: str, split: str = "test") -> list[dict]:
    return list(af.TASKS[task].load(language, split, af.Settings(task=task, data_dir=data)))


def is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def ids_alone(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- Named entities


def repaired(tags: list[str]) -> list[str]:
    """Repair tags as the authors do, in two passes.

    The first turns an I without an entity before it into a B. The second gives all words of an
    entity the type of its last word.
    """
    tags = list(tags)
    for i, tag in enumerate(tags):
        if tag[0] == "I" and (i == 0 or tags[i - 1] == "O"):
            tags[i] = "B" + tag[1:]
    for i in reversed(range(len(tags) - 1)):
        if tags[i] != "O" and tags[i + 1][0] == "I":
            tags[i] = tags[i][0] + tags[i + 1][1:]
    return tags


def test_the_repairs_of_predictions_by_hand():
    predicted = "I-PER I-LOC O B-ORG I-ORG B-PER"
    assert " ".join(repaired(predicted.split())) == "B-LOC I-LOC O B-ORG I-ORG B-PER"
    assert repaired("B-PER I-ORG I-LOC I-LOC".split()) == "B-LOC I-LOC I-LOC I-LOC".split()
    tags = np.array([NER_TAGS.index(tag) for tag in predicted.split()])
    org, per = (3, 4, 2), (5, 5, 1)
    assert af.entities(tags, repair=True) == {(0, 1, 3), org, per}
    assert af.entities(tags, repair=False) == {(0, 0, 1), (1, 1, 3), org, per}


def in_windows(
    rng: random.Random, number: int, gold: list[int], predicted: list[int]
) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield a sentence as features and logits, split anywhere, with subwords without a label."""
    parts, rows = [], []
    for gold_tag, tag in zip(gold, predicted):
        rows += [(af.IGNORE, rng.randrange(7))] * rng.choice((0, 0, 1)) + [(gold_tag, tag)]
        if rng.random() < 0.15:
            parts, rows = [*parts, rows], []
    noise = np.random.default_rng(number)
    for part in [*parts, rows]:
        labels, tags = np.array([(af.IGNORE, 1), *part, (af.IGNORE, 2)]).T
        logits = noise.random((len(tags), 7))
        logits[np.arange(len(tags)), tags] += 1
        yield {"example": number, "input_ids": labels, "labels": labels}, logits


def test_the_score_of_entities_is_that_of_seqeval_in_wikiann_for_repaired_predictions():
    metrics = pytest.importorskip("seqeval.metrics")
    rng, seen = random.Random(0), set()
    for _ in range(1000):
        sentences = []
        for _ in range(rng.randint(1, 4)):
            size, few = rng.randint(1, 9), rng.sample(range(7), rng.randint(1, 7))
            gold = rng.choices(few, k=size)
            wrong = rng.choice((0, 0.2, 1))
            sentences.append(
                (gold, [rng.choice(few) if rng.random() < wrong else tag for tag in gold])
            )
            if rng.random() < 0.1:
                nothing = [0] * size
                sentences[-1] = rng.choice([(nothing, gold), (gold, nothing), (nothing, nothing)])
        names = [[[NER_TAGS[tag] for tag in side] for side in sentence] for sentence in sentences]
        gold, predicted = [g for g, _ in names], [repaired(p) for _, p in names]
        expected = metrics.f1_score(gold, predicted, zero_division=0)
        pairs = [pair for k, (g, p) in enumerate(sentences) for pair in in_windows(rng, k, g, p)]
        features, logits = zip(*pairs)
        scores = af.TASKS["wikiann"].score(names, list(features), list(logits))
        assert scores == {"f1": pytest.approx(expected, abs=1e-12)}
        seen.add(round(expected, 3))
    assert {0, 1} < seen
    assert len(seen) > 50


# ---- Scores of answers

SOME = (
    "a an The cat cats. the.cat ... — _ A1 an-the 'a' don't İ naïve 北京 。 кот Кот القط हिन्दी ไทย"
)
SOME = [*SOME.split(), "¿que?", "a²", "a\u0301", "\u00a0", "", "\t", "\u200d", "đã\u0300"]
SOME.append(unicodedata.normalize("NFD", "à Án thế"))


def official_tokens(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def official(prediction: str, references: list[str]) -> tuple[float, float]:
    """Return F1 and exact match as SQuAD 1.1 defines them."""
    f1, em = [], []
    for reference in references:
        left, right = official_tokens(prediction), official_tokens(reference)
        em.append(float(" ".join(left) == " ".join(right)))
        same, rest = 0, list(right)
        for token in left:
            if token in rest:
                rest.remove(token)
                same += 1
        f1.append(0.0)
        if same:
            precision, recall = same / len(left), same / len(right)
            f1[-1] = 2 * precision * recall / (precision + recall)
    return max(f1), max(em)


def authors(prediction: str, reference: str, language: str) -> tuple[float, float]:
    """Return the authors' measures; in their F1, a repeated word is shared only once."""
    left, right = official_tokens(prediction), official_tokens(reference)
    shared = [token for token in {*left} if token in right]
    precision = len(shared) / len(left) if left else 0
    recall = len(shared) / len(right) if right else 0
    if not left and not right:
        precision = recall = 1
    same = prediction == reference
    if language == "en":
        same = official_tokens(prediction) == official_tokens(reference)
    return 2 * precision * recall / max(1, precision + recall), float(same)


def random_answers(count: int) -> Iterator[tuple[str, list[str], str]]:
    """Yield (prediction, references, language)."""
    rng = random.Random(1)
    for _ in range(count):
        few = rng.sample(SOME, 5)
        texts = []
        for _ in range(rng.randint(2, 5)):
            texts.append(rng.choice(("", " ", " ")).join(rng.choices(few, k=rng.randint(0, 6))))
        yield texts[0], texts[1:], rng.choice(("en", "de", "zh", "hi"))


def test_the_scores_of_answers_are_the_official_ones_and_those_of_the_authors():
    seen = {metric: set() for metric in METRICS["xquad"]}
    for prediction, references, language in random_answers(3000):
        found = af.compare_answers(prediction, references, language)
        expected = (
            *official(prediction, references),
            *authors(prediction, references[0], language),
        )
        answers = prediction, references, language
        assert list(found.values()) == pytest.approx(expected, abs=1e-12), answers
        assert list(found) == METRICS["xquad"]
        for metric, value in found.items():
            seen[metric].add(value)
    assert all({0, 1} <= values for values in seen.values())
    assert len(seen["f1"]) > 10


def test_the_official_scores_are_those_of_torchmetrics():
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    for prediction, references, language in random_answers(500):
        if not all(map(af.normalise_answer, [prediction, *references])):
            continue  # for two empty answers, F1 is 0 in SQuAD 1.1, and 1 in torchmetrics
        answers = {"text": references, "answer_start": [0] * len(references)}
        theirs = squad({"prediction_text": prediction, "id": "1"}, {"answers": answers, "id": "1"})
        found = af.compare_answers(prediction, references, language)
        assert found["f1"] == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6)
        assert found["em"] == pytest.approx(float(theirs["exact_match"]) / 100, abs=1e-6)


def test_scores_of_answers_by_hand():
    scores = af.compare_answers("the to be to be", ["To be, to be!"], "de")
    assert scores["f1_authors"] == 0.5  # P = R = 2 / 4
    scores = af.compare_answers("the", ["a", "b"], "en")
    assert scores == {"f1": 0, "em": 1, "f1_authors": 1, "em_authors": 1}


def softmax(row: list[float]) -> list[float]:
    exponents = [math.exp(value) for value in row]
    return [value / sum(exponents) for value in exponents]


def test_the_answer_is_the_most_probable_span_of_all_windows():
    """No character occurs twice in a context, so that different spans have different texts."""
    rng, noise, windows_that_win = random.Random(2), np.random.default_rng(2), set()
    for _ in range(100):
        examples, features, logits = [], [], []
        for number in range(rng.randint(1, 3)):
            cuts = sorted({0, *rng.sample(range(1, 150), rng.randint(1, 99)), 150})
            context = "".join(map(chr, range(0x4E00, 0x4E00 + 150)))
            spans = list(itertools.pairwise(cuts))
            best, size = (0, "", 0), rng.randint(5, 70)
            for window, begin in enumerate(range(0, len(spans), max(1, size - 4))):
                offsets = [(-1, -1)] * rng.randint(1, 5) + spans[begin : begin + size] + [(-1, -1)]
                padding = rng.choice((0, 3))
                row = noise.normal(size=(2, len(offsets) + padding))
                row[:, 0] += rng.choice((0, 5))  # position 0: the window does not have the answer
                places = [0, *(k for k, (start, _) in enumerate(offsets) if start >= 0)]
                starts, ends = (dict(zip(places, softmax(side[places].tolist()))) for side in row)
                for i, j in itertools.product(places[1:], repeat=2):
                    if 0 <= j - i < 15 and starts[i] * ends[j] > best[0]:
                        best = starts[i] * ends[j], context[offsets[i][0] : offsets[j][1]], window
                arrays = {"input_ids": np.zeros(len(offsets), int), "labels": np.array([0, 0])}
                features.append({"example": number, "offsets": np.array(offsets), **arrays})
                logits.append(row)
            examples.append(
                {"language": "zh", "context": context, "texts": [best[1]], "starts": [0]}
            )
            windows_that_win.add(best[2])
        order = rng.sample(range(len(features)), len(features))
        scores = af.score_answers(
            examples, [features[k] for k in order], [logits[k] for k in order]
        )
        assert scores == dict.fromkeys(METRICS["xquad"], 1.0)
    assert len(windows_that_win) > 3


# ---- Answers with accents

NORMALISERS = {  # of BERT without case, mDeBERTa, and XLM-R
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "NFC": normalizers.NFC(),
    "NFKC": normalizers.NFKC(),
    "none": None,
}
ANSWERS = [  # all end in a combining mark
    ("fr", "il aime le cafe\u0301 au lait", "cafe\u0301"),
    ("fr", "il aime le cafe\u0301", "le cafe\u0301"),
    ("vi", unicodedata.normalize("NFD", "vị vua của thế giới"), "thế"),
    ("hi", "वह हिन्दी में लिखती है", "हिन्दी में"),
    ("he", "הוא אמר שָׁלוֹמֹ לכולם", "שָׁלוֹמֹ"),
    ("th", "คนที่รักเธอ มี อะไร", "มี"),
]


def tokenizer_of_letters(normaliser: str):
    """Return a tokenizer of single letters with XLM-R's words; marks may be subwords too."""
    letters = sorted({*"".join(context for _, context, _ in ANSWERS), *"éếạủớếị▁"} - {" "})
    pieces = [(piece, -1.0) for piece in ["<s>", "<pad>", "</s>", "<unk>", *letters]]
    tokenizer = XLMRobertaTokenizer([*pieces, ("<mask>", -1.0)])
    if NORMALISERS[normaliser]:
        tokenizer.backend_tokenizer.normalizer = NORMALISERS[normaliser]
    return tokenizer


def question_about(language: str, context: str, answer: str) -> dict:
    answer = answer if answer in context else unicodedata.normalize("NFD", answer)
    return {"question": "le", "context": context, "language": language, "texts": [answer],
            "starts": [context.index(answer)]}  # fmt: skip


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("language, context, answer", ANSWERS)
def test_an_answer_that_ends_in_an_accent_is_learned_and_found_with_its_accent(
    language, context, answer, normaliser
):
    """Normalisation may remove the accent, so that no subword spans it."""
    example = question_about(language, context, answer)
    assert is_mark(example["texts"][0][-1])
    (feature,) = af.encode_questions(tokenizer_of_letters(normaliser), [example], 96, True)
    assert feature["labels"].all() and not feature["cut"]
    logits = 30 * np.eye(len(feature["input_ids"]))[feature["labels"]]
    scores = af.score_answers([example], [feature], [logits])
    assert scores == pytest.approx(dict.fromkeys(METRICS["xquad"], 1.0))


@pytest.mark.parametrize(
    "text, start, end, expected",
    [
        ("cafe\u0301 noir", 0, 4, "cafe\u0301"),
        ("cafe\u0301 noir", 0, 5, "cafe\u0301"),
        ("cafe\u0301", 0, 4, "cafe\u0301"),
        ("a\u0301\u0302 b", 0, 1, "a\u0301\u0302"),
        ("un cafe noir", 2, 7, "cafe"),  # blanks at its ends are left out
        ("หนี้", 0, 2, "หนี้"),
    ],
)
def test_the_text_of_an_answer_has_its_last_accent(text, start, end, expected):
    example = {"context": text, "texts": [expected], "language": "fr"}
    feature = {"example": 0, "offsets": np.array([[-1, -1], [start, end]])}  # one subword
    scores = af.score_answers([example], [feature], [np.zeros((2, 2))])
    assert scores["em_authors"] == 1.0  # the strings are equal


@pytest.mark.parametrize("language, context, answer", ANSWERS)
def test_the_last_label_is_the_subword_that_spans_the_end_of_the_answer(language, context, answer):
    """As in the library's example of question answering, where the accent is a subword."""
    example, tokenizer = question_about(language, context, answer), tokenizer_of_letters("none")
    (feature,) = af.encode_questions(tokenizer, [example], 96, True)
    last = example["starts"][0] + len(example["texts"][0]) - 1
    encoding = tokenizer(example["question"], context)
    assert feature["labels"][1] == encoding.char_to_token(0, last, 1)


# ---- Questions and the windows of their contexts


def check_windows(tokenizer, examples: list[dict], max_length: int) -> int:
    """Compare all windows with the question and the context, which are tokenised alone.

    Returns the number of examples of which a window has the whole answer.
    """
    features, held = af.encode_questions(tokenizer, examples, max_length, True), set()
    ends = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    for number, example in enumerate(examples):
        context, windows = example["context"], [f for f in features if f["example"] == number]
        alone = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
        expected = list(zip(alone["input_ids"], alone["offset_mapping"]))
        question, place = ids_alone(tokenizer, example["question"])[: max_length // 2], 0
        start = example["starts"][0]
        last = start + len(example["texts"][0]) - 1
        for window in windows:
            ids, offsets = window["input_ids"], window["offsets"]
            first_label, last_label = window["labels"]
            assert len(ids) == len(offsets) <= max_length
            inside = offsets[:, 0] >= 0
            assert [i for i in ids[~inside].tolist() if i not in ends] == question
            here = [
                (i, tuple(span)) for i, span in zip(ids[inside].tolist(), offsets[inside].tolist())
            ]
            assert here == expected[place : place + len(here)]
            place += len(here)
            if place < len(expected):
                assert len(ids) == max_length
                place -= min(af.TRAIN_STRIDE, max_length // 2 - 8)
            holds = [[k for k, (_, (a, b)) in enumerate(here) if a <= c < b] for c in (start, last)]
            if not all(holds):
                assert (first_label, last_label) == (0, 0)
                continue
            assert first_label <= last_label
            assert offsets[first_label, 0] <= start < offsets[first_label, 1]
            assert offsets[last_label, 0] <= last < offsets[last_label, 1]
            assert example["texts"][0] in context[offsets[first_label, 0] : offsets[last_label, 1]]
            held.add(number)
        assert place == len(expected)  # the windows cover the context
    assert [f["example"] for f in features] == sorted(f["example"] for f in features)
    return len(held)


@pytest.mark.parametrize("max_length", [24, 37, 96])
def test_the_windows_have_the_whole_context_and_the_answer(tokenizer, world, max_length):
    for language in ("en", "qac"):
        examples = load(world / "data", "xquad", language)[:40]
        held = check_windows(tokenizer, examples, max_length)
        assert held == len(examples) or max_length < 40
        assert held > 20


@pytest.mark.parametrize("max_length", [24, 128])
def test_overlong_questions_are_cut_off_and_empty_ones_are_read(tokenizer, world, max_length):
    examples = load(world / "data", "xquad", "en")[:8]
    for k, example in enumerate(examples):
        example["question"] = ("", "   ", example["question"] * 30, "Xyzzy, " * 40)[k % 4]
    check_windows(tokenizer, examples, max_length)
    features = af.encode_questions(tokenizer, examples, max_length, True)
    assert all(feature["cut"] for feature in features if feature["example"] % 4 > 1)


def test_a_question_of_characters_with_many_subwords_leaves_room_for_the_context(tokenizer, world):
    """Normalisation spells out some characters, so that a question may be cut off inside one."""
    (example,) = load(world / "data", "xquad", "en")[:1]
    for k in range(20):
        example["question"] = "a " * k + "ﷺ½" * 20
        features = af.encode_questions(tokenizer, [example], 24, True)
        for feature in features:
            assert len(feature["input_ids"]) <= 24
            assert (feature["offsets"] >= 0).any()


@pytest.mark.parametrize("training, overlap", [(True, 32), (False, 128)])
def test_windows_share_32_subwords_in_training_and_128_in_tests(training, overlap):
    """The labels are those of the first answer."""
    context = " ".join(tiny.WORDS * 60)
    starts = [context.index("chien", 2000), context.index("dog")]
    example = {"question": "le chat", "context": context, "texts": ["chien", "dog"]}
    example |= {"starts": starts, "language": "en"}
    tokenizer = tiny.make_tokenizer()
    features = af.encode_questions(tokenizer, [example], 384, training)
    spans = []
    for feature in features:
        inside = feature["offsets"][feature["offsets"][:, 0] >= 0]
        spans.append({*map(tuple, inside.tolist())})
        if feature["labels"].any():
            ends = feature["offsets"][feature["labels"]].tolist()
            assert ends == [[starts[0], starts[0] + len("chien")]] * 2
    assert {len(one & other) for one, other in itertools.pairwise(spans)} == {overlap}
    assert len(spans) > 2 and any(feature["labels"].any() for feature in features)


DATA = os.environ.get("ALIGNFREEZE_DATA")


@pytest.mark.skipif(not DATA, reason="needs a folder of real data in ALIGNFREEZE_DATA")
@pytest.mark.parametrize("language", ["en", "de", "ar", "th", "zh"])
@pytest.mark.parametrize("architecture", ["bert", "xlmr"])
def test_the_windows_of_real_questions_have_the_whole_context_and_the_answer(
    architecture, language
):
    examples = load(Path(DATA), "xquad", language)[:200]
    texts = sorted({example[side] for example in examples for side in ("question", "context")})
    tokenizer = toy_world.build_tokenizer(architecture, texts)
    assert check_windows(tokenizer, examples, 96) >= 0.98 * len(examples)


# ---- Sentence pairs


@pytest.mark.parametrize("max_length", [12, 96])
def test_sentence_pairs_are_encoded_as_the_tokenizer_encodes_each_pair(
    tokenizer, world, max_length
):
    examples = load(world / "data", "xnli", "qab")[:100]
    ends = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    features, cut = list(af.encode_sentences(tokenizer, examples, max_length, False)), 0
    for number, (example, feature) in enumerate(zip(examples, features, strict=True)):
        pair = tokenizer(example["premise"], example["hypothesis"])
        sides = [ids_alone(tokenizer, example[side]) for side in ("premise", "hypothesis")]
        ids = feature["input_ids"].tolist()
        assert (feature["example"], feature["labels"].tolist()) == (number, [example["label"]])
        assert ("token_type_ids" in feature) == (tokenizer.architecture == "bert")
        if len(pair["input_ids"]) <= max_length:
            assert ids == pair["input_ids"]
            assert feature.get("token_type_ids", np.array([])).tolist() == pair.get(
                "token_type_ids", []
            )
        else:
            assert len(ids) == max_length
            kept = [i for i in ids if i not in ends]
            splits = [(kept[:k], kept[k:]) for k in range(len(kept) + 1)]
            fits = [
                (p, h) for p, h in splits if p == sides[0][: len(p)] and h == sides[1][: len(h)]
            ]
            sizes = [sorted((len(p), min(len(h), len(sides[1])))) for p, h in fits]
            shorter = min(map(len, sides))  # the longer one was cut off
            assert any(b - a <= 1 or a == shorter for a, b in sizes)
            cut += 1
    assert (cut > 10) == (max_length == 12)


# ---- Perfect logits


@pytest.mark.parametrize("language", ["en", "qaa"])
@pytest.mark.parametrize("task", METRICS)
def test_perfect_logits_are_scored_as_perfect(tokenizer, world, task, language):
    row = af.TASKS[task]
    examples = load(world / "data", task, language)[:60]
    features, logits = list(row.encode(tokenizer, examples, 128, True)), []
    for feature in features:
        if task == "xquad":
            logits.append(np.eye(len(feature["input_ids"]))[feature["labels"]] * 30)
        else:
            one_hot = np.eye(row.labels)[np.maximum(feature["labels"], 0)]
            logits.append(one_hot[0] if task == "xnli" else one_hot)
    scores = row.score(examples, features, logits)
    assert list(scores) == METRICS[task]
    expected = dict.fromkeys(scores, 1.0)
    if task == "xquad":
        texts = [example["texts"][0] for example in examples]
        totals = [authors(text, text, language) for text in texts]
        expected["f1_authors"], expected["em_authors"] = np.mean(totals, axis=0)
    assert scores == pytest.approx(expected)


def test_the_accuracy_is_the_share_of_all_labels_however_long_their_sentences_are():
    rng, features, logits, hits = np.random.default_rng(6), [], [], []
    for _ in range(40):
        labels = rng.choice([af.IGNORE, 0, 1, 2], rng.integers(1, 20))
        rows = rng.random((len(labels) + rng.integers(0, 3), 3))  # the last ones are padding
        features, logits = [*features, {"labels": labels}], [*logits, rows]
        for label, row in zip(labels.tolist(), rows.tolist()):
            if label != af.IGNORE:
                hits.append(row.index(max(row)) == label)
    assert af.score_accuracy([], features, logits) == {"accuracy": pytest.approx(mean(hits))}


def test_each_feature_of_a_large_set_names_its_example():
    """A thousand examples are encoded at a time."""
    words = tiny.WORDS[:5]
    examples = [{"tokens": words[: 1 + k % 5], "tags": [k % 18] * (1 + k % 5)} for k in range(2300)]
    features = af.encode(af.TASKS["udpos"], tiny.make_tokenizer(), examples, 5, True)
    assert len(features) > len(examples)  # some have two windows
    found = [[] for _ in examples]
    for feature in features:
        labels = feature["labels"]
        found[feature["example"]] += labels[labels != af.IGNORE].tolist()
    assert found == [example["tags"] for example in examples]


# ---- Whole runs

FLAGS = """--languages qaa --realign-languages qaa qab --epochs 1 --realign-steps 2 --limit-train 64
--limit-test 10 --device cpu"""


@pytest.mark.parametrize("architecture, task", [
    ("distilbert", "udpos"), ("distilbert", "xquad"), ("bert", "xnli"), ("bert", "wikiann"),
    ("xlmr", "udpos"), ("xlmr", "xquad"),
])  # fmt: skip
def test_a_whole_run_with_each_architecture_and_each_task(world, tmp_path, architecture, task):
    argv = ["--model", str(world / "models" / architecture), "--task", task, *FLAGS.split()]
    assert af.main([*argv, "--data-dir", str(world / "data"), "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text("utf-8"))
    assert record["task"] == task
    assert list(record["scores"]) == ["en", "qaa"]
    for scores in record["scores"].values():
        assert list(scores) == METRICS[task]
        assert all(0 <= value <= 1 for value in scores.values())


# ---- Loss and evaluation of a model


def load_model(world: Path, architecture: str, task: str) -> torch.nn.Module:
    torch.manual_seed(0)
    head, labels = af.TASKS[task].head, af.TASKS[task].labels
    return head.from_pretrained(world / "models" / architecture, num_labels=labels).double().eval()


def inputs_of(feature: dict) -> dict[str, torch.Tensor]:
    """Return the inputs of a model that reads one example alone, without padding."""
    names = [name for name in ("input_ids", "token_type_ids") if name in feature]
    return {name: torch.tensor(feature[name])[None] for name in names}


@pytest.mark.parametrize("task", METRICS)
def test_the_loss_of_a_batch_is_the_mean_over_the_labels_of_its_examples(tokenizer, world, task):
    """The reference is the library, which reads each example alone, without padding."""
    model = load_model(world, tokenizer.architecture, task)
    examples = load(world / "data", task, "en")[:12]
    features = list(af.TASKS[task].encode(tokenizer, examples, 48, True))[:19]
    assert len({len(feature["input_ids"]) for feature in features}) > 2
    losses, count = 0.0, 0
    for feature in features:
        inputs, labels = inputs_of(feature), torch.tensor(feature["labels"])[None]
        if task == "xquad":
            start, end = labels.T
            loss = model(**inputs, start_positions=start, end_positions=end).loss
        else:
            loss = model(**inputs, labels=labels).loss
        size = int((labels != af.IGNORE).sum())
        losses, count = losses + loss * size, count + size
    expected = losses / count
    gradient = tiny.gradient_of(expected, model)
    ours = af.task_loss(model, af.task_batch(features, tokenizer.pad_token_id))
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
    tiny.assert_same(tiny.gradient_of(ours, model), gradient, 1e-5)


@pytest.mark.parametrize("task", METRICS)
def test_an_evaluation_scores_what_the_model_predicts_for_each_example_alone(
    tokenizer, world, task
):
    """The scores do not depend on batches, padding, or the order of the examples by length."""
    model = load_model(world, tokenizer.architecture, task)
    model.train()  # an evaluation turns dropout off
    examples = load(world / "data", task, "qab")[:40]
    features = list(af.TASKS[task].encode(tokenizer, examples, 64, False))
    results = []

    def score(scored_examples, scored_features, outputs):
        assert scored_examples is examples
        assert scored_features is features
        results.extend(outputs)
        return {"score": 0.12345678}

    row = af.TASKS[task]._replace(score=score)
    scores = af.evaluate(model, tokenizer, row, examples, features, af.Settings())
    assert scores == {"score": 0.123457}
    assert len(results) == len(features) > 32  # more than a batch
    for feature, found in zip(features, results):
        with torch.inference_mode():
            output = model(**inputs_of(feature))
        if task == "xquad":
            expected = torch.stack([output.start_logits[0], output.end_logits[0]])
            assert np.isneginf(found[:, len(feature["input_ids"]) :]).all()  # padding
            found = found[:, : len(feature["input_ids"])]
        else:
            expected = output.logits[0]
            found = found[: len(expected)]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_evaluation_of_outputs_that_are_not_numbers_is_an_error(world):
    model = load_model(world, "bert", "udpos")
    model.classifier.bias.data.fill_(torch.nan)
    tokenizer = AutoTokenizer.from_pretrained(world / "models/bert")
    examples = load(world / "data", "udpos", "en")[:2]
    features = list(af.TASKS["udpos"].encode(tokenizer, examples, 64, False))
    with pytest.raises(af.UserError, match="NaN"):
        af.evaluate(model, tokenizer, af.TASKS["udpos"], examples, features, af.Settings())


def test_the_loss_of_a_batch_without_a_label_is_zero(world):
    """Such a window comes from the inside of a word that is longer than the window."""
    model = load_model(world, "bert", "udpos").float()
    ids = np.arange(5, 15)
    unlabelled = {"input_ids": ids, "labels": np.full(10, af.IGNORE)}
    labelled = {"input_ids": ids, "labels": np.where(ids % 2, af.IGNORE, 3)}
    assert af.task_loss(model, af.task_batch([unlabelled], 0)).item() == 0
    logits = model(torch.tensor(ids)[None]).logits[0]
    expected = F.cross_entropy(logits[ids % 2 == 0], torch.full((5,), 3))
    for batch in ([labelled], [unlabelled, labelled]):
        torch.testing.assert_close(af.task_loss(model, af.task_batch(batch, 0)), expected)
