"""The tasks of classification: what an encoder reads of each, and how its answers are scored."""

import itertools
import json
import math
import os
import random
import re
import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_world
from transformers import AutoModelForTokenClassification, AutoTokenizer

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
    args = af.parse_args(["--task", task, "--data-dir", str(data)])
    return list(af.TASKS[task].load(language, split, args))


def ids_alone(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------------------------------------ NER


def repaired(tags: list[str]) -> list[str]:
    """One pass for each of the authors' two repairs: an I that starts an entity, a run of mixed types."""
    tags = list(tags)
    for i, tag in enumerate(tags):
        if tag[0] == "I" and (i == 0 or tags[i - 1] == "O"):
            tags[i] = "B" + tag[1:]
    for i in reversed(range(len(tags) - 1)):
        if tags[i] != "O" and tags[i + 1][0] == "I":
            tags[i] = tags[i][0] + tags[i + 1][1:]
    return tags


def test_the_repairs_of_predictions_by_hand():
    assert (
        repaired("I-PER I-LOC O B-ORG I-ORG B-PER".split()) == "B-LOC I-LOC O B-ORG I-ORG B-PER".split()
    )
    assert repaired("B-PER I-ORG I-LOC I-LOC".split()) == "B-LOC I-LOC I-LOC I-LOC".split()
    assert af.entities(np.array([2, 6, 0, 3, 4, 1]), True) == {(0, 1, 3), (3, 4, 2), (5, 5, 1)}
    assert af.entities(np.array([2, 6, 0, 3, 4, 1]), False) == {
        (0, 0, 1),
        (1, 1, 3),
        (3, 4, 2),
        (5, 5, 1),
    }


def in_windows(
    rng: random.Random, number: int, gold: list[int], predicted: list[int]
) -> list[tuple[dict, np.ndarray]]:
    """A sentence as features and logits, cut anywhere; subwords that carry no tag predict what they like."""
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


def test_the_score_of_entities_is_that_of_seqeval_on_repaired_predictions():
    metrics = pytest.importorskip("seqeval.metrics")
    rng, seen = random.Random(0), set()
    for _ in range(1500):
        sentences = []
        for _ in range(rng.randint(1, 4)):
            size, few = rng.randint(1, 9), rng.sample(range(7), rng.randint(1, 7))
            gold = rng.choices(few, k=size)
            wrong = rng.choice((0, 0.2, 1))
            sentences.append((gold, [rng.choice(few) if rng.random() < wrong else tag for tag in gold]))
            if rng.random() < 0.1:
                sentences[-1] = rng.choice(
                    [([0] * size, gold), (gold, [0] * size), ([0] * size, [0] * size)]
                )
        names = [[[NER_TAGS[tag] for tag in side] for side in sentence] for sentence in sentences]
        gold, predicted = [g for g, _ in names], [repaired(p) for _, p in names]
        expected = metrics.f1_score(gold, predicted, zero_division=0)
        pairs = [pair for k, (g, p) in enumerate(sentences) for pair in in_windows(rng, k, g, p)]
        features, logits = zip(*pairs)
        assert af.score_entities(list(names), list(features), list(logits)) == {
            "f1": pytest.approx(expected, abs=1e-12)
        }
        seen.add(round(expected, 3))
    assert {0, 1} < seen
    assert len(seen) > 50


# ---------------------------------------------------------------------------------------------------- scores of answers

SOME = "a an The cat cats. the.cat ... — _ A1 an-the 'a' don't İ naïve 北京 。 кот Кот القط हिन्दी ไทย ¿que? a²"
SOME = [
    *SOME.split(" "),
    "a\u0301",
    "\u00a0",
    "",
    "\t",
    "\u200d",
    "đã\u0300",
    unicodedata.normalize("NFD", "à Án thế"),
]


def official_tokens(text: str) -> list[str]:
    text = "".join("" if character in string.punctuation else character for character in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def official(prediction: str, references: list[str]) -> tuple[float, float]:
    """(F1, exact match) as SQuAD v1.1 defines them."""
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
    """A repeated word is shared once, but counts as often as it stands there."""
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


def random_answers(count: int):
    rng = random.Random(1)
    for _ in range(count):
        few = rng.sample(SOME, 5)
        texts = [
            rng.choice(("", " ", " ")).join(rng.choices(few, k=rng.randint(0, 6)))
            for _ in range(rng.randint(2, 5))
        ]
        yield texts[0], texts[1:], rng.choice(("en", "de", "zh", "hi"))


def test_scores_of_answers_are_the_official_ones_and_those_of_the_authors():
    seen = {metric: set() for metric in METRICS["xquad"]}
    for prediction, references, language in random_answers(3000):
        found = af.compare_answers(prediction, references, language)
        expected = (*official(prediction, references), *authors(prediction, references[0], language))
        assert list(found.values()) == pytest.approx(expected, abs=1e-12), (
            prediction,
            references,
            language,
        )
        assert list(found) == METRICS["xquad"]
        for metric, value in found.items():
            seen[metric].add(value)
    assert all({0, 1} <= values for values in seen.values())
    assert len(seen["f1"]) > 10


def test_official_scores_are_those_of_torchmetrics():
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    for prediction, references, language in random_answers(500):
        if not all(map(af.normalise_answer, [prediction, *references])):
            continue  # without words SQuAD 1.1 gives an F1 of 0, and torchmetrics, as SQuAD 2.0, 1
        answers = {"text": references, "answer_start": [0] * len(references)}
        theirs = squad({"prediction_text": prediction, "id": "1"}, {"answers": answers, "id": "1"})
        found = af.compare_answers(prediction, references, language)
        assert found["f1"] == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6)
        assert found["em"] == pytest.approx(float(theirs["exact_match"]) / 100, abs=1e-6)


def test_scores_of_answers_by_hand():
    assert (
        af.compare_answers("the to be to be", ["To be, to be!"], "de")["f1_authors"] == 0.5
    )  # P = R = 2 / 4
    assert af.compare_answers("the", ["a", "b"], "en") == {
        "f1": 0,
        "em": 1,
        "f1_authors": 1,
        "em_authors": 1,
    }


def softmax(row: list[float]) -> list[float]:
    exponents = [math.exp(value) for value in row]
    return [value / sum(exponents) for value in exponents]


def test_the_answer_is_the_most_probable_span_of_all_windows():
    """Every character of a context is another one here, so that only the same span has the same text."""
    rng, noise, windows_that_win = random.Random(2), np.random.default_rng(2), set()
    for _ in range(100):
        examples, features, logits = [], [], []
        for number in range(rng.randint(1, 3)):
            cuts = sorted({0, *rng.sample(range(1, 150), rng.randint(1, 99)), 150})
            context, spans = (
                "".join(map(chr, range(0x4E00, 0x4E00 + 150))),
                list(itertools.pairwise(cuts)),
            )
            best, size = (0, "", 0), rng.randint(5, 70)
            for window, begin in enumerate(range(0, len(spans), max(1, size - 4))):
                offsets = [(-1, -1)] * rng.randint(1, 5) + spans[begin : begin + size] + [(-1, -1)]
                row = noise.normal(
                    size=(2, len(offsets) + rng.choice((0, 3)))
                )  # longer: padding of the batch
                row[:, 0] += rng.choice((0, 5))  # the first place: that the answer is not in this window
                places = [0, *(k for k, (start, _) in enumerate(offsets) if start >= 0)]
                starts, ends = (dict(zip(places, softmax(side[places].tolist()))) for side in row)
                for i, j in itertools.product(places[1:], repeat=2):
                    if 0 <= j - i < 15 and starts[i] * ends[j] > best[0]:
                        best = starts[i] * ends[j], context[offsets[i][0] : offsets[j][1]], window
                arrays = {"input_ids": np.zeros(len(offsets), int), "labels": np.array([0, 0])}
                features.append({"example": number, **arrays, "offsets": np.array(offsets)})
                logits.append(row)
            examples.append({"language": "zh", "context": context, "texts": [best[1]], "starts": [0]})
            windows_that_win.add(best[2])
        order = rng.sample(range(len(features)), len(features))
        scores = af.score_answers(examples, [features[k] for k in order], [logits[k] for k in order])
        assert scores == dict.fromkeys(METRICS["xquad"], 1.0)
    assert len(windows_that_win) > 3


# ------------------------------------------------------------------------------------------ questions and their windows


def check_windows(tokenizer, examples: list[dict], max_length: int) -> int:
    """Every window against the question and the context tokenized alone; returns how many examples hold the answer."""
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
            ids, offsets, (first_label, last_label) = (
                window["input_ids"],
                window["offsets"],
                window["labels"],
            )
            assert len(ids) == len(offsets) <= max_length
            inside = offsets[:, 0] >= 0
            assert [i for i in ids[~inside].tolist() if i not in ends] == question
            here = [(i, tuple(span)) for i, span in zip(ids[inside].tolist(), offsets[inside].tolist())]
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
        assert place == len(expected)  # nothing of the context is left out
    assert [f["example"] for f in features] == sorted(f["example"] for f in features)
    return len(held)


@pytest.mark.parametrize("max_length", [24, 37, 96])
def test_windows_of_questions_hold_the_whole_context_and_the_answer(tokenizer, world, max_length):
    for language in ("en", "qac"):
        examples = load(world / "data", "xquad", language)[:40]
        held = check_windows(tokenizer, examples, max_length)
        assert held == len(examples) or max_length < 40
        assert held > 20


@pytest.mark.parametrize("max_length", [24, 128])
def test_overlong_questions_are_cut_and_empty_ones_are_read(tokenizer, world, max_length):
    examples = load(world / "data", "xquad", "en")[:8]
    for k, example in enumerate(examples):
        example["question"] = ("", "   ", example["question"] * 30, "Xyzzy, " * 40)[k % 4]
    check_windows(tokenizer, examples, max_length)
    features = af.encode_questions(tokenizer, examples, max_length, True)
    assert all(feature["cut"] for feature in features if feature["example"] % 4 > 1)


def test_characters_of_many_subwords_do_not_crowd_the_context_out(tokenizer, world):
    """Normalisation spells out some characters: half a window of question may end inside of one."""
    (example,) = load(world / "data", "xquad", "en")[:1]
    for k in range(20):
        example["question"] = "a " * k + "ﷺ½" * 20
        features = af.encode_questions(tokenizer, [example], 24, True)
        assert all(
            len(feature["input_ids"]) <= 24 and (feature["offsets"] >= 0).any() for feature in features
        )


DATA = os.environ.get("ALIGNFREEZE_DATA")


@pytest.mark.skipif(not DATA, reason="ALIGNFREEZE_DATA names no folder with real xquad/ to read")
@pytest.mark.parametrize("language", ["en", "de", "ar", "th", "zh"])
@pytest.mark.parametrize("architecture", ["bert", "xlmr"])
def test_windows_of_real_questions_hold_the_whole_context_and_the_answer(architecture, language):
    examples = load(Path(DATA), "xquad", language)[:200]
    texts = sorted({example[side] for example in examples for side in ("question", "context")})
    tokenizer = toy_world.build_tokenizer(architecture, texts)
    assert check_windows(tokenizer, examples, 96) >= 0.98 * len(examples)


# ------------------------------------------------------------------------------------------------------- sentence pairs


@pytest.mark.parametrize("max_length", [12, 96])
def test_sentence_pairs_are_what_the_tokenizer_makes_of_each_pair(tokenizer, world, max_length):
    examples, ends = (
        load(world / "data", "xnli", "qab")[:100],
        {tokenizer.cls_token_id, tokenizer.sep_token_id},
    )
    features, cut = list(af.encode_sentences(tokenizer, examples, max_length, False)), 0
    for number, (example, feature) in enumerate(zip(examples, features, strict=True)):
        pair = tokenizer(example["premise"], example["hypothesis"])
        sides = [ids_alone(tokenizer, example[side]) for side in ("premise", "hypothesis")]
        ids = feature["input_ids"].tolist()
        assert (feature["example"], feature["labels"].tolist()) == (number, [example["label"]])
        assert ("token_type_ids" in feature) == (tokenizer.architecture == "bert")
        if len(pair["input_ids"]) <= max_length:
            assert ids == pair["input_ids"]
            assert feature.get("token_type_ids", np.array([])).tolist() == pair.get("token_type_ids", [])
        else:
            assert len(ids) == max_length
            kept = [i for i in ids if i not in ends]
            splits = [(kept[:k], kept[k:]) for k in range(len(kept) + 1)]
            fits = [(p, h) for p, h in splits if p == sides[0][: len(p)] and h == sides[1][: len(h)]]
            sizes = [sorted((len(p), min(len(h), len(sides[1])))) for p, h in fits]
            assert any(
                b - a <= 1 or a == min(map(len, sides)) for a, b in sizes
            )  # the longer one was cut
            cut += 1
    assert (cut > 10) == (max_length == 12)


# ------------------------------------------------------------------------------------------------------- perfect logits


@pytest.mark.parametrize("language", ["en", "qaa"])
@pytest.mark.parametrize("task", METRICS)
def test_perfect_logits_are_scored_as_perfect(tokenizer, world, task, language):
    row = af.TASKS[task]
    examples = load(world / "data", task, language)[:60]
    features, logits = list(row.encode(tokenizer, examples, 128, True)), []
    for feature in features:
        if task == "xquad":
            logits.append(np.eye(len(feature["input_ids"]))[feature["labels"]])
        else:
            one_hot = np.eye(row.labels)[np.maximum(feature["labels"], 0)]
            logits.append(one_hot[0] if task == "xnli" else one_hot)
    scores = row.score(examples, features, logits)
    assert list(scores) == METRICS[task]
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))


# ----------------------------------------------------------------------------------------------------------- whole runs


def start(world: Path, out: Path, architecture: str, task: str) -> int:
    argv = ["--model", world / "models" / architecture, "--data-dir", world / "data", "--task", task]
    argv += (
        "--languages qaa --realign-languages qaa qab --epochs 1 --realign-steps 2 --device cpu".split()
    )
    return af.main([*map(str, argv), "--limit-train", "64", "--limit-test", "10", "--out", str(out)])


@pytest.mark.parametrize("task", METRICS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_runs_every_task(world, tmp_path, architecture, task):
    assert start(world, tmp_path, architecture, task) == 0
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text("utf-8"))
    assert record["task"] == task
    assert list(record["scores"]) == ["en", "qaa"]
    for scores in record["scores"].values():
        assert list(scores) == METRICS[task]
        assert all(0 <= value <= 1 for value in scores.values())


@pytest.mark.parametrize("task", METRICS)
def test_the_loss_in_parts_is_that_of_the_whole_batch(tokenizer, world, task):
    row = af.TASKS[task]
    torch.manual_seed(0)
    model = row.head.from_pretrained(
        world / "models" / tokenizer.architecture, num_labels=row.labels
    ).eval()
    batch = list(row.encode(tokenizer, load(world / "data", task, "en")[:12], 48, True))[:16]
    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        loss = af.task_loss(model, af.task_batch(batch, tokenizer.pad_token_id, parts))
        loss.backward()
        assert torch.isfinite(loss)
        gradients.append(
            [loss.detach(), *(p.grad.norm() for p in model.parameters() if p.grad is not None)]
        )
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_a_batch_without_any_label_has_loss_zero_and_others_the_mean(world):
    """As in the inside of a word that is longer than its windows."""
    model = AutoModelForTokenClassification.from_pretrained(world / "models/bert", num_labels=18).eval()
    ids = np.arange(5, 15)
    nothing = {"input_ids": ids, "labels": np.full(10, af.IGNORE)}
    something = {"input_ids": ids, "labels": np.where(ids % 2, af.IGNORE, 3)}
    assert af.task_loss(model, af.task_batch([nothing], 0)).item() == 0
    alone, both = (
        af.task_loss(model, af.task_batch(batch, 0)) for batch in ([something], [nothing, something])
    )
    torch.testing.assert_close(alone, both)
    logits = model(torch.tensor(ids)[None]).logits[0]
    torch.testing.assert_close(
        alone, torch.nn.functional.cross_entropy(logits[ids % 2 == 0], torch.full((5,), 3))
    )
