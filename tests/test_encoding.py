"""Words become subwords, and subwords batches: which subword stands for a word, and what does not fit.

Three kinds of tokenizer: of XLM-R (Unigram, `▁` for a blank, `<s> ... </s>`), of BERT (WordPiece, `[CLS] ... [SEP]`)
and of RoBERTa and ModernBERT (byte-level BPE, `Ġ` for a blank). For cases written by hand their subwords are listed
below, so that one sees what a word is cut into; for random sentences they are trained on a little text.
"""

import argparse
import itertools
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import alignfreeze as af

# ---- tokenizers

TEXT = """the cat sat on the mat , the cats sat on the mats . unbelievable ! walking and talking , believe it or not
the dog walks , the dogs walked . a believable talk on a walk . 你好，世界。我喜欢北京，你好。 北京，世界，你喜欢。
xã hội học sinh xã hội . हिन्दी में लिखें हिन्दी में । தமிழ் மொழி . le chat était là , l'été . die Katze sitzt da ."""
SPECIAL = {"xlmr": ["<s>", "<pad>", "</s>", "<unk>"], "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]}
SPECIAL["roberta"] = SPECIAL["xlmr"]
PIECES = {
    "xlmr": "▁ ▁the ▁cat s ▁un believ able ▁xã ▁hội ， _ של Ġ orġ",
    "bert": "the cat ##s un ##believ ##able xã hội ， _ של Ġ ##orġ",
    "roberta": "Ġ t h e c a s ï ¼ Į Ġt Ġth Ġthe Ġc Ġca Ġcat",
}
MERGES = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]


def wrapped(kind: str, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers loads it, with the special tokens of its kind."""
    if kind == "bert":
        pad, unk, start, end = SPECIAL[kind]
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        start, pad, end, unk = SPECIAL[kind]
        roberta = kind == "roberta"
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(True) if roberta else pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, cls_token=start, eos_token=end, sep_token=end, pad_token=pad,
        unk_token=unk,
    )  # fmt: skip


def with_special_tokens(kind: str, backend: Tokenizer) -> Tokenizer:
    start, end = ("[CLS]", "[SEP]") if kind == "bert" else ("<s>", "</s>")
    ids = [(token, backend.token_to_id(token)) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=ids
    )
    return backend


def listed(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer that knows exactly the subwords of PIECES."""
    vocabulary = SPECIAL[kind] + PIECES[kind].split()
    ids = {piece: k for k, piece in enumerate(vocabulary)}
    if kind == "xlmr":
        model = models.Unigram(
            [(piece, -1.0) for piece in vocabulary], unk_id=ids["<unk>"], byte_fallback=False
        )
    elif kind == "bert":
        model = models.WordPiece(ids, unk_token="[UNK]")
    else:
        model = models.BPE(ids, MERGES)
    return wrapped(kind, with_special_tokens(kind, Tokenizer(model)))


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer trained on TEXT."""
    options = {"vocab_size": 150, "special_tokens": SPECIAL[kind], "show_progress": False}
    if kind == "xlmr":
        model, trainer = models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "bert":
        model, trainer = models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**options)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options["vocab_size"] = 330
        model, trainer = models.BPE(), trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    backend = Tokenizer(model)
    wrapped(kind, backend)  # its pre-tokenizer
    backend.train_from_iterator(TEXT.split("\n"), trainer)
    return wrapped(kind, with_special_tokens(kind, backend))


@pytest.fixture(scope="module")
def by_hand() -> dict[str, PreTrainedTokenizerFast]:
    return {kind: listed(kind) for kind in SPECIAL}


@pytest.fixture(scope="module", params=list(SPECIAL))
def tokenizer(request) -> PreTrainedTokenizerFast:
    return trained(request.param)


def show(tokenizer, window: af.Window) -> str:
    """A window in one line: every subword, `:` the word that it belongs to, `*` if it represents that word."""
    assert len(window.ids) == len(window.words) == len(window.first)
    return " ".join(
        token if word == -1 and not first else f"{token}:{word}{'*' * int(first)}"
        for token, word, first in zip(
            tokenizer.convert_ids_to_tokens(window.ids), window.words, window.first
        )
    )


# ---- by hand


@pytest.mark.parametrize(
    "kind, words, expected",
    [
        # the first subword represents the word; special tokens belong to none
        ("xlmr", ["the", "cats"], "<s> ▁the:0* ▁cat:1* s:1 </s>"),
        ("bert", ["the", "cats"], "[CLS] the:0* cat:1* ##s:1 [SEP]"),
        ("roberta", ["the", "cats"], "<s> Ġthe:0* Ġcat:1* s:1 </s>"),
        ("xlmr", ["unbelievable"], "<s> ▁un:0* believ:0 able:0 </s>"),
        ("bert", ["unbelievable", "，"], "[CLS] un:0* ##believ:0 ##able:0 ，:1* [SEP]"),
        ("xlmr", ["cat", "cat"], "<s> ▁cat:0* ▁cat:1* </s>"),
        ("xlmr", [], "<s> </s>"),
        ("bert", [], "[CLS] [SEP]"),
        # a lone blank in front of a word is removed, and the first visible subword represents the word
        ("xlmr", ["，"], "<s> ，:0* </s>"),
        ("xlmr", ["cats", "，", "cat"], "<s> ▁cat:0* s:0 ，:1* ▁cat:2* </s>"),
        ("xlmr", ["▁▁，", "cat"], "<s> ，:0* ▁cat:1* </s>"),
        ("roberta", ["，", "cat"], "<s> ï:0* ¼:0 Į:0 Ġcat:1* </s>"),
        ("roberta", ["cat", "a"], "<s> Ġcat:0* a:1* </s>"),
        # it is kept when it is all there is of a word
        ("xlmr", ["▁"], "<s> ▁:0* </s>"),
        ("xlmr", [" ", "cat"], "<s> ▁:0* ▁cat:1* </s>"),
        ("xlmr", ["▁", "，"], "<s> ▁:0* ，:1* </s>"),
        ("xlmr", ["▁", "▁"], "<s> ▁:0* ▁:1* </s>"),
        ("roberta", [" ", "cat", " "], "<s> Ġ:0* Ġcat:1* Ġ:2* </s>"),
        # what no subword matches is one unknown subword, and represents its word
        ("xlmr", ["☃", "cat"], "<s> <unk>:0* ▁cat:1* </s>"),
        ("bert", ["☃", "cat"], "[CLS] [UNK]:0* cat:1* [SEP]"),
        # a Vietnamese form with a space in it is one word, and so is a Hebrew one with clitic marks
        ("xlmr", ["xã hội", "cat"], "<s> ▁xã:0* ▁hội:0 ▁cat:1* </s>"),
        ("bert", ["xã hội", "cat"], "[CLS] xã:0* hội:0 cat:1* [SEP]"),
        ("roberta", ["the cat", "cat"], "<s> Ġthe:0* Ġcat:0 Ġcat:1* </s>"),
        ("xlmr", ["_של_", "cat"], "<s> _:0* של:0 _:0 ▁cat:1* </s>"),
        ("bert", ["_של_", "_"], "[CLS] _:0* של:0 _:0 _:1* [SEP]"),
        # the Maltese letter `Ġ` is no blank where blanks are written otherwise
        ("xlmr", ["Ġorġ"], "<s> Ġ:0* orġ:0 </s>"),
        ("bert", ["Ġorġ"], "[CLS] Ġ:0* ##orġ:0 [SEP]"),
    ],
)
def test_the_first_visible_subword_represents_a_word(by_hand, kind, words, expected):
    for windows in (False, True):
        (window,) = af.encode_words(by_hand[kind], [words], 96, windows)
        assert show(by_hand[kind], window) == expected


@pytest.mark.parametrize(
    "kind, words, max_length, expected",
    [
        (
            "xlmr",
            ["the", "cats", "unbelievable"],
            8,
            "<s> ▁the:0* ▁cat:1* s:1 ▁un:2* believ:2 able:2 </s>",
        ),
        ("xlmr", ["the", "cats", "unbelievable"], 7, "<s> ▁the:0* ▁cat:1* s:1 ▁un:2* believ:2 </s>"),
        ("xlmr", ["the", "cats", "unbelievable"], 6, "<s> ▁the:0* ▁cat:1* s:1 ▁un:2* </s>"),
        ("xlmr", ["the", "cats", "unbelievable"], 5, "<s> ▁the:0* ▁cat:1* s:1 </s>"),
        ("xlmr", ["the", "cats", "unbelievable"], 4, "<s> ▁the:0* ▁cat:1* </s>"),
        ("xlmr", ["the", "cats", "unbelievable"], 3, "<s> ▁the:0* </s>"),
        ("bert", ["the", "cats", "unbelievable"], 6, "[CLS] the:0* cat:1* ##s:1 un:2* [SEP]"),
        ("roberta", ["the", "cats", "cats"], 5, "<s> Ġthe:0* Ġcat:1* s:1 </s>"),
        ("xlmr", ["，", "，", "，"], 5, "<s> ，:0* ，:1* ，:2* </s>"),  # a removed blank takes no room
        ("xlmr", ["，", "，", "，"], 4, "<s> ，:0* ，:1* </s>"),
    ],
)
def test_a_sentence_is_cut_at_max_length_subwords_special_tokens_included(
    by_hand, kind, words, max_length, expected
):
    (window,) = af.encode_words(by_hand[kind], [words], max_length)
    assert show(by_hand[kind], window) == expected


@pytest.mark.parametrize(
    "kind, max_length, expected",
    [
        ("xlmr", 8, ["<s> ▁the:0* ▁cat:1* s:1 ▁un:2* believ:2 able:2 </s>"]),
        ("xlmr", 7, ["<s> ▁the:0* ▁cat:1* s:1 ▁un:2* believ:2 </s>", "<s> able:2 </s>"]),
        (
            "xlmr",
            6,
            ["<s> ▁the:0* ▁cat:1* s:1 ▁un:2* </s>", "<s> believ:2 able:2 </s>"],
        ),  # a border within a word
        (
            "xlmr",
            5,
            ["<s> ▁the:0* ▁cat:1* s:1 </s>", "<s> ▁un:2* believ:2 able:2 </s>"],
        ),  # one between two
        ("xlmr", 4, ["<s> ▁the:0* ▁cat:1* </s>", "<s> s:1 ▁un:2* </s>", "<s> believ:2 able:2 </s>"]),
        ("bert", 6, ["[CLS] the:0* cat:1* ##s:1 un:2* [SEP]", "[CLS] ##believ:2 ##able:2 [SEP]"]),
    ],
)
def test_what_does_not_fit_goes_on_in_further_windows(by_hand, kind, max_length, expected):
    sentences = [["the"], ["the", "cats", "unbelievable"], [], ["cat"]]
    windows = af.encode_words(by_hand[kind], sentences, max_length, windows=True)
    assert [show(by_hand[kind], window) for window in windows if window.sentence == 1] == expected
    assert [window.sentence for window in windows] == [0] + [1] * len(expected) + [2, 3]


def test_a_tag_stands_on_the_first_visible_subword_and_nowhere_else(by_hand):
    examples = [{"tokens": ["the", "cats", "，", "unbelievable"], "tags": [5, 7, 12, 0]}]
    x = af.IGNORE
    (feature,) = af.encode_tokens(by_hand["xlmr"], examples, 96, True)
    assert by_hand["xlmr"].convert_ids_to_tokens(feature["input_ids"]) == (
        ["<s>", "▁the", "▁cat", "s", "，", "▁un", "believ", "able", "</s>"]
    )
    assert feature["labels"].tolist() == [x, 5, 7, x, 12, 0, x, x, x]
    features = list(af.encode_tokens(by_hand["xlmr"], examples * 2, 8, False))
    assert [feature["labels"].tolist() for feature in features] == [
        [x, 5, 7, x, 12, 0, x, x],
        [x, x, x],
    ] * 2
    assert [feature["example"] for feature in features] == [0, 0, 1, 1]


# ---- random sentences

WORDS = TEXT.split() + [
    "北京",
    "，",
    "。",
    "☃",
    "☃☃",
    "xã hội",
    "catwalk",
    "unmatched",
    "Z",
    "_",
    "▁",
    "été",
    "世界，",
]


def random_sentence(rng: random.Random, longest: int = 30) -> list[str]:
    return rng.choices(WORDS, k=rng.randint(1, longest))


def visible_subwords(tokenizer, word: str) -> list[int]:
    """The ids of one word, tokenised alone; a blank with more of the word behind it is left out."""
    encoding = tokenizer.backend_tokenizer.encode([word], is_pretokenized=True, add_special_tokens=False)
    last = len(encoding.ids) - 1
    return [
        i
        for k, (i, token) in enumerate(zip(encoding.ids, encoding.tokens))
        if k == last or token not in "▁Ġ"
    ]


def ends(tokenizer) -> tuple[int, int]:
    return tokenizer.cls_token_id, tokenizer.sep_token_id


def test_a_trained_tokenizer_does_put_lone_blanks_in_front_of_words(tokenizer):
    tokens = [
        tokenizer.backend_tokenizer.encode([word], is_pretokenized=True, add_special_tokens=False)
        for word in WORDS
    ]
    lone = {word for word, one in zip(WORDS, tokens) if len(one) > 1 and one.tokens[0] in "▁Ġ"}
    assert bool(lone) == (ends(tokenizer) != (2, 3))  # 2, 3: [CLS], [SEP]
    assert any(len(visible_subwords(tokenizer, word)) > 2 for word in WORDS)


@pytest.mark.parametrize("max_length", [3, 7, 96])
def test_windows_lose_no_subword_and_represent_every_word_once(tokenizer, max_length):
    rng = random.Random(max_length)
    sentences = [random_sentence(rng, 60) for _ in range(30)]
    windows = af.encode_words(tokenizer, sentences, max_length, windows=True)
    for number, sentence in enumerate(sentences):
        parts = [window for window in windows if window.sentence == number]
        assert all(len(part.ids) == max_length for part in parts[:-1])
        assert 2 < len(parts[-1].ids) <= max_length
        assert all((part.ids[0], part.ids[-1]) == ends(tokenizer) for part in parts)
        assert all(not part.first[[0, -1]].any() and (part.words[[0, -1]] == -1).all() for part in parts)
        subwords = [
            (i, k, n == 0)
            for k, w in enumerate(sentence)
            for n, i in enumerate(visible_subwords(tokenizer, w))
        ]
        found = [
            row for part in parts for row in zip(part.ids[1:-1], part.words[1:-1], part.first[1:-1])
        ]
        assert found == subwords


@pytest.mark.parametrize("max_length", [3, 12])
def test_without_windows_a_sentence_is_the_first_of_its_windows(tokenizer, max_length):
    rng = random.Random(max_length)
    sentences = [random_sentence(rng) for _ in range(30)]
    windows = af.encode_words(tokenizer, sentences, max_length, windows=True)
    firsts = [next(window for window in windows if window.sentence == k) for k in range(len(sentences))]
    cut = af.encode_words(tokenizer, sentences, max_length)
    assert [show(tokenizer, window) for window in cut] == [show(tokenizer, window) for window in firsts]
    assert [window.sentence for window in cut] == list(range(len(sentences)))


@pytest.mark.parametrize("max_length", [3, 96])
def test_no_word_is_lost_or_labelled_twice_however_long_the_sentence(tokenizer, max_length):
    rng = random.Random(max_length)
    examples = []
    for _ in range(20):
        tokens = random_sentence(rng, 200)
        examples.append({"tokens": tokens, "tags": rng.choices(range(18), k=len(tokens))})
    features = list(af.encode_tokens(tokenizer, examples, max_length, True))
    for number, example in enumerate(examples):
        labelled = []
        for feature in features:
            if feature["example"] == number:
                rows = zip(feature["input_ids"], feature["labels"])
                labelled += [(i, label) for i, label in rows if label != af.IGNORE]
        firsts = [visible_subwords(tokenizer, word)[0] for word in example["tokens"]]
        assert labelled == list(zip(firsts, example["tags"]))


# ---- word pairs


def random_pairs(rng: random.Random, count: int, longest: int = 20) -> list[af.Pair]:
    pairs = []
    for _ in range(count):
        source, target = random_sentence(rng, longest), random_sentence(rng, longest)
        size = rng.randint(1, min(len(source), len(target)))
        links = zip(rng.sample(range(len(source)), size), rng.sample(range(len(target)), size))
        pairs.append(af.Pair("xx", source, target, sorted(links)))
    return pairs


def slow_places(tokenizer, words: list[str], max_length: int) -> tuple[list[int], list[int]]:
    """(A sentence's ids, the position of the first visible subword of each word that is not cut off)."""
    ids, starts = [], []
    for word in words:
        starts.append(len(ids) + 1)
        ids += visible_subwords(tokenizer, word)
    start, end = ends(tokenizer)
    room = max_length - 2
    return [start, *ids[:room], end], [at for at in starts if at <= room]


def places(batches: list[af.Batch]) -> list[tuple[int, int]]:
    """(Sentence, position) of every vector of a batch, which several processes may share."""
    found = []
    for batch in batches:
        numbers, own = iter(batch.sentences), []
        for part in batch.inputs:
            for ids, sentence in zip(part["input_ids"], numbers):
                own += [(sentence, position) for position in range(len(ids))]
        found += [own[row] for row in batch.places.tolist()]
    return found


@pytest.mark.parametrize("buckets, processes", [(1, 1), (3, 1), (8, 1), (2, 2), (8, 3)])
@pytest.mark.parametrize("max_length", [8, 96])
def test_queries_and_targets_are_the_first_visible_subwords_of_linked_words(
    tokenizer, buckets, processes, max_length
):
    rng, seen = random.Random(max_length), Counter()
    for size in (2, 16):
        pairs = random_pairs(rng, size)
        options = [{"process": (k, processes)} for k in range(processes)]
        how = af.Alignment(max_length=max_length)
        batches = [af.encode_pairs(tokenizer, pairs, how, buckets, **one) for one in options]
        sentences = [pair.source for pair in pairs] + [pair.target for pair in pairs]
        read = [slow_places(tokenizer, words, max_length) for words in sentences]

        # every sentence is there once, without a subword too many or too few, in buckets of equal size
        for batch in batches:
            numbers = iter(batch.sentences)
            share = len(batch.sentences)
            assert len(batch.inputs) == math.ceil(share / math.ceil(share / buckets))
            for part in batch.inputs:
                ids, mask = part["input_ids"], part["attention_mask"]
                assert mask.sum(1).max() == ids.shape[1] and (mask.diff(dim=1) <= 0).all()
                assert (ids[mask == 0] == tokenizer.pad_token_id).all()
                for row, inside, sentence in zip(ids, mask.bool(), numbers):
                    assert row[inside].tolist() == read[sentence][0]
        everyone = [sentence for batch in batches for sentence in batch.sentences]
        assert sorted(everyone) == list(range(2 * size))

        # every word that is not cut off has a vector, linked or not
        found = places(batches)
        words = {(k, at) for k, (_, starts) in enumerate(read) for at in starts}
        assert len(found) == len(words) and set(found) == words

        # and both directions of every link are asked for, of all processes alike
        expected, cut = [], []
        for k, pair in enumerate(pairs):
            cut.append(0)
            for i, j in pair.links:
                source, target = read[k][1], read[k + size][1]
                if i < len(source) and j < len(target):
                    expected.append(((k, source[i]), (k + size, target[j])))
                else:
                    cut[k] += 1
        for batch in batches:
            queries = [
                (found[q], found[t]) for q, t in zip(batch.queries.tolist(), batch.targets.tolist())
            ]
            assert queries == expected + [(b, a) for a, b in expected]
            assert batch.cut == cut and batch.candidates is None and batch.pairs == pairs
            assert batch.counts == [len(one.places) for one in batches]
        seen.update(kept=len(expected), cut=sum(cut))
    assert seen["kept"] > 5 and (seen["cut"] > 10 or max_length == 96)


def test_a_link_within_one_sentence_pair_is_never_mixed_up_with_another_pair(by_hand):
    pairs = [af.Pair("xx", ["the", "cat"], ["cats", "the"], [(0, 1), (1, 0)])]
    pairs += [af.Pair("xx", ["cat"], ["the", "the", "the", "，"], [(0, 3)])]
    batch = af.encode_pairs(by_hand["xlmr"], pairs, af.Alignment())
    ids = torch.cat([part["input_ids"].flatten() for part in batch.inputs])[batch.places]
    tokens = np.array(by_hand["xlmr"].convert_ids_to_tokens(ids))
    links = sorted(zip(tokens[batch.queries].tolist(), tokens[batch.targets].tolist()))
    expected = [("▁the", "▁the")] * 2 + [("▁cat", "▁cat")] * 2 + [("▁cat", "，"), ("，", "▁cat")]
    assert links == sorted(expected) and len(tokens) == 9


def test_links_beyond_the_cut_are_dropped_and_counted(by_hand):
    unlinked = af.Pair("xx", ["cats", "cat"], ["the", "unbelievable", "cat"], [(1, 2)])
    half = af.Pair("xx", ["the", "cat", "cats"], ["cat", "the"], [(0, 1), (2, 0)])
    how = af.Alignment(max_length=5)  # room for 3 subwords
    batch = af.encode_pairs(by_hand["bert"], [unlinked, half, unlinked], how)
    assert batch.cut == [1, 0, 1]  # `cats` of the second pair: its first subword is the last that fits
    assert len(batch.queries) == len(batch.targets) == 4
    batch = af.encode_pairs(by_hand["bert"], [unlinked], how)
    assert (batch.cut, len(batch.queries), len(batch.targets), len(batch.places)) == ([1], 0, 0, 4)


# ---- sentence pairs


def random_texts(rng: random.Random, count: int) -> list[af.Pair]:
    sentence = lambda: " ".join(random_sentence(rng, 12))  # noqa: E731
    return [af.Pair("xx", sentence(), sentence()) for _ in range(count)]


@pytest.mark.parametrize("buckets, processes", [(1, 1), (8, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("gather", [True, False])
def test_each_sentence_is_asked_for_its_translation_among_the_english_ones(
    tokenizer, buckets, processes, gather
):
    pairs, max_length = random_texts(random.Random(buckets), 7), 16
    how = af.Alignment(unit="sentence", max_length=max_length, gather=gather)
    everyone, numbered = [], []
    for k in range(processes):
        batch = af.encode_texts(tokenizer, pairs, how, buckets, process=(k, processes))
        sentences = iter(batch.sentences)
        for part in batch.inputs:
            for row, inside, sentence in zip(
                part["input_ids"], part["attention_mask"].bool(), sentences
            ):
                pair = pairs[sentence % 7]
                text = pair.source if sentence < 7 else pair.target
                ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
                assert row[inside].tolist() == ids and len(ids) <= max_length
        everyone += batch.sentences
        numbered.append([batch.sentences[row] for row in batch.places.tolist()])
        assert batch.cut == [0] * 7 and batch.pairs == pairs
    assert sorted(everyone) == list(range(14))  # each sentence once
    for k in range(processes):
        batch = af.encode_texts(tokenizer, pairs, how, buckets, process=(k, processes))
        found = [*itertools.chain(*numbered)] if gather else numbered[k]
        assert batch.counts == ([len(own) for own in numbered] if gather else [len(found)])
        queries, targets = ([found[n] for n in x.tolist()] for x in (batch.queries, batch.targets))
        assert sorted(queries) == sorted(sentence for sentence in found if sentence >= 7)
        assert [query - 7 for query in queries] == targets
        assert sorted(found[n] for n in batch.candidates.tolist()) == sorted(targets)


# ---- buckets and padding


@pytest.mark.parametrize(
    "count, buckets, processes, sizes",
    [
        (8, 1, 1, [[8]]),
        (10, 4, 1, [[3, 3, 3, 1]]),
        (3, 8, 1, [[1, 1, 1]]),
        (9, 8, 1, [[2, 2, 2, 2, 1]]),
        (10, 2, 3, [[2, 2], [2, 1], [2, 1]]),
        (2, 8, 2, [[1], [1]]),
    ],
)
def test_parts_of_a_batch_are_of_equal_size_and_similar_length(count, buckets, processes, sizes):
    lengths = random.Random(count).choices(range(50), k=count)
    items = ["x" * length + str(k) for k, length in enumerate(lengths)]
    shares = [af.in_buckets(items, buckets, len, (k, processes)) for k in range(processes)]
    assert [[len(group) for group in share] for share in shares] == sizes
    assert sorted(item for share in shares for group in share for item in group) == sorted(items)
    for share in shares:
        for shorter, longer in itertools.pairwise(share):
            assert max(map(len, shorter)) <= min(map(len, longer))


def test_eight_parts_hold_hardly_any_padding():
    lengths, padding = random.Random(0).choices(range(5, 96), k=32), {}
    for buckets in (1, 8):
        groups = af.in_buckets(lengths, buckets, int)
        padding[buckets] = sum(max(group) * len(group) - sum(group) for group in groups)
    assert padding[1] > 0.5 * sum(lengths) and padding[8] < 0.1 * sum(lengths)


def feature(ids: list[int], labels: list[int], **more: list[int]) -> dict:
    return {name: np.array(row) for name, row in {"input_ids": ids, "labels": labels, **more}.items()}


def test_features_of_a_batch_are_padded_at_their_end():
    """The shorter one first. A subword that looks like padding is still attended to."""
    batch = af.task_batch([feature([5, 9, 9], [1, af.IGNORE, 2]), feature([8], [3])], 9)
    (inputs,), (labels,) = batch.inputs, batch.labels
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == {
        "input_ids": [[8, 9, 9], [5, 9, 9]],
        "attention_mask": [[1, 0, 0], [1, 1, 1]],
    }
    assert labels.tolist() == [[3, af.IGNORE, af.IGNORE], [1, af.IGNORE, 2]]


def test_segments_and_labels_of_whole_examples_are_padded_too():
    """Sentence pairs have segments, and one label for an example of any length."""
    rows = [
        feature([5, 6, 7], [2], token_type_ids=[0, 1, 1]),
        feature([8, 4], [0], token_type_ids=[0, 1]),
    ]
    batch = af.task_batch(rows, 9)
    (inputs,), (labels,) = batch.inputs, batch.labels
    assert inputs["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert labels.tolist() == [[0], [2]]


@pytest.mark.parametrize("examples, processes", [(5, 1), (5, 2), (2, 3), (1, 2)])
def test_a_batch_of_a_task_is_shared_and_its_labels_counted_once(examples, processes):
    """Who has no example of its own gets one without labels."""
    x = af.IGNORE
    rows = [feature([4 + k] * (2 + k), [k, x] + [x] * k) for k in range(examples)]
    batches = [af.task_batch(rows, 1, 2, process=(k, processes)) for k in range(processes)]
    found = []
    for batch in batches:
        assert batch.count.item() == pytest.approx(examples / processes)
        assert all(
            len(ids["input_ids"]) == len(labels) for ids, labels in zip(batch.inputs, batch.labels)
        )
        for labels in batch.labels:
            found += labels[labels != x].tolist()
    assert sorted(found) == list(range(examples))


def test_every_epoch_shuffles_the_examples_anew(tokenizer):
    rows = [feature([k + 4], [k]) for k in range(10)]
    batches = list(af.task_batches(tokenizer, rows, 2, 4, 31, "cpu"))
    orders = [torch.cat([torch.cat(batch.labels).flatten() for batch in half]).tolist()
              for half in (batches[:3], batches[3:])]  # fmt: skip
    assert len(batches) == 6 and orders[0] != orders[1]
    assert all(sorted(order) == list(range(10)) for order in orders)
    again = list(af.task_batches(tokenizer, rows, 2, 4, 31, "cpu"))
    assert [batch.labels[0].tolist() for batch in again] == [
        batch.labels[0].tolist() for batch in batches
    ]


# ---- CoNLL-U


def conllu(*rows: str) -> str:
    """`ID|FORM|UPOS` as a line of ten columns; anything else as it is."""
    lines = []
    for row in rows:
        if row.count("|") == 2:
            number, form, tag = row.split("|")
            row = "\t".join([number, form, "_", tag] + ["_"] * 6)
        lines.append(row)
    return "\n".join(lines) + "\n"


def load(
    tmp_path: Path, content: str, syntactic_words: bool = False
) -> list[tuple[list[str], list[str]]]:
    """(tokens, names of the tags) of each sentence."""
    path = tmp_path / "udpos/fr/test.conllu"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    args = argparse.Namespace(data_dir=tmp_path, syntactic_words=syntactic_words)
    examples = af.load_udpos("fr", "test", args)
    return [(example["tokens"], [af.UPOS[tag] for tag in example["tags"]]) for example in examples]


def test_the_tags_are_the_17_of_universal_dependencies_and_the_one_of_ranges():
    names = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X _"
    assert sorted(af.UPOS) == sorted(names.split())
    assert af.TASKS["udpos"].labels == 18


def test_multi_word_ranges_are_tokens_with_a_tag_of_their_own_unless_words_are_syntactic(tmp_path):
    rows = "1|Il|PRON 2|parle|VERB 3-4|du|_ 3|de|ADP 4|le|DET 5|chat|NOUN".split()
    text = conllu("# text = Il parle du chat", *rows)
    tokens, tags = "Il parle du de le chat".split(), "PRON VERB _ ADP DET NOUN".split()
    assert load(tmp_path, text) == [(tokens, tags)]
    del tokens[2], tags[2]
    assert load(tmp_path, text, syntactic_words=True) == [(tokens, tags)]


@pytest.mark.parametrize("syntactic_words", [False, True])
def test_empty_nodes_are_no_tokens(tmp_path, syntactic_words):
    rows = ["0.1|zero|PRON", "1|Sue|PROPN", "2|likes|VERB", "2.1|likes|VERB", "3|tea|NOUN", "8.10|x|_"]
    expected = [(["Sue", "likes", "tea"], ["PROPN", "VERB", "NOUN"])]
    assert load(tmp_path, conllu(*rows), syntactic_words) == expected


@pytest.mark.parametrize("form", ["xã hội", "_", "_של_", "#", "#tag", "▁", "3-4", "a\u00a0b", "e\u0301"])
def test_a_form_is_kept_as_it_is(tmp_path, form):
    assert load(tmp_path, conllu(f"1|{form}|X", "2|x|NOUN")) == [([form, "x"], ["X", "NOUN"])]


@pytest.mark.parametrize(
    "content",
    [
        conllu("1|a|X", "2|b|X", "", "1|c|X", ""),
        conllu("1|a|X", "2|b|X", "", "", "", "1|c|X"),  # more blank lines than needed, none at the end
        conllu(
            "", "# a comment", "1|a|X", "# tabs\there", "2|b|X", "  ", "# alone", "", "1|c|X", "", ""
        ),
        conllu("1|a|X", "2|b|X", "", "1|c|X").rstrip("\n"),
        conllu("1|a|X", "2|b|X", "", "1|c|X", "").replace("\n", "\r\n"),
    ],
)
def test_blank_lines_end_sentences_and_comments_are_skipped(tmp_path, content):
    assert [tokens for tokens, _ in load(tmp_path, content)] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    "row",
    ["2\tb\tX", "2 b _ X _ _ _ _ _ _", "x|b|X", "2|b|WORD", "2|b|noun", "2||X", "-2|b|X", "not a line"],
)
def test_a_malformed_line_is_an_error_that_names_file_and_line(tmp_path, row):
    with pytest.raises(af.UserError, match=r"test\.conllu:3:") as error:
        load(tmp_path, conllu("# comment", "1|a|X", row, "", "1|c|X"))
    assert "\n" not in str(error.value)


def test_a_file_without_a_sentence_is_an_error(tmp_path):
    with pytest.raises(af.UserError, match=r"test\.conllu"):
        load(tmp_path, "# nothing but a comment\n\n")


def test_the_way_from_treebank_to_labels_keeps_ranges_and_forms_with_spaces(tmp_path, by_hand):
    rows = ["1-2|_של_|_", "1|cats|NOUN", "2|，|PUNCT", "2.1|cat|NOUN", "3|xã hội|NOUN"]
    noun, punctuation, in_range = (af.UPOS.index(tag) for tag in ("NOUN", "PUNCT", "_"))
    load(tmp_path, conllu(*rows))
    examples = af.load_udpos("fr", "test", argparse.Namespace(data_dir=tmp_path, syntactic_words=False))
    (feature,) = af.encode_tokens(by_hand["xlmr"], examples, 128, False)
    tokens = by_hand["xlmr"].convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["<s>", "_", "של", "_", "▁cat", "s", "，", "▁xã", "▁hội", "</s>"]
    x = af.IGNORE
    assert feature["labels"].tolist() == [x, in_range, x, x, noun, x, punctuation, noun, x, x]
