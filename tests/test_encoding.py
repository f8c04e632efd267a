"""Words become subwords, and subwords become batches.

These tests show which subword represents a word, what is cut off, and what a batch holds. There are
four kinds of tokenizer: that of XLM-R (Unigram, `▁` for a blank, `<s> ... </s>`), that of BERT
(WordPiece, `[CLS] ... [SEP]`), that of RoBERTa (byte-level BPE, `Ġ` for a blank, also in front of
the first word), and that of ModernBERT and Llama 3 (the same without a blank in front). For cases
written by hand, the list of their subwords is below, so that a reader can see how a word is split.
For random sentences, they are trained on a little text.
"""

import functools
import itertools
import os
import random
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build
from tokenizers import (
    Encoding,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    BertTokenizer,
    DebertaV2Tokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

import alignfreeze as af

# ---- tokenizers

TEXT = """the cat sat on the mat , the cats sat on the mats . unbelievable ! walking and talking ,
believe it or not the dog walks , the dogs walked . a believable talk on a walk . 你好，世界。
我喜欢北京，你好。 北京，世界，你喜欢。 xã hội học sinh xã hội .
हिन्दी में लिखें हिन्दी में । தமிழ் மொழி . le chat était là , l'été .
die Katze sitzt da ."""
SPECIAL = {"xlmr": ["<s>", "<pad>", "</s>", "<unk>"], "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]}
SPECIAL["roberta"] = SPECIAL["modernbert"] = SPECIAL["xlmr"]
PIECES = {
    "xlmr": "▁ ▁the ▁cat s ▁un believ able ▁xã ▁hội ， _ של Ġ orġ",
    "bert": "the cat ##s un ##believ ##able xã hội ， _ של Ġ ##orġ",
    "roberta": "Ġ t h e c a s ï ¼ Į Ġt Ġth Ġthe Ġc Ġca Ġcat",
    "modernbert": "Ġ t h e c a s ï ¼ Į Ġt Ġth Ġthe Ġc Ġca Ġcat ca cat",
}
MERGES = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]
MERGES = {"roberta": MERGES, "modernbert": [*MERGES, ("c", "a"), ("ca", "t")]}


def wrapped(kind: str, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer as transformers loads it, with the special tokens of its kind."""
    if kind == "bert":
        pad, unk, start, end = SPECIAL[kind]
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        start, pad, end, unk = SPECIAL[kind]
        is_xlmr = kind == "xlmr"
        bytes_of_text = pre_tokenizers.ByteLevel(add_prefix_space=kind == "roberta")
        backend.pre_tokenizer = pre_tokenizers.Metaspace() if is_xlmr else bytes_of_text
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, cls_token=start, eos_token=end, sep_token=end,
        pad_token=pad, unk_token=unk,
    )  # fmt: skip


def with_special_tokens(kind: str, backend: Tokenizer) -> Tokenizer:
    start, end = ("[CLS]", "[SEP]") if kind == "bert" else ("<s>", "</s>")
    ids = [(token, backend.token_to_id(token)) for token in (start, end)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=ids
    )
    return backend


def listed(kind: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that knows exactly the subwords of PIECES."""
    vocabulary = SPECIAL[kind] + PIECES[kind].split()
    ids = {piece: k for k, piece in enumerate(vocabulary)}
    if kind == "xlmr":
        model = models.Unigram(
            [(piece, -1.0) for piece in vocabulary], unk_id=ids["<unk>"], byte_fallback=False
        )
    elif kind == "bert":
        model = models.WordPiece(ids, unk_token="[UNK]")
    else:
        model = models.BPE(ids, MERGES[kind])
    return wrapped(kind, with_special_tokens(kind, Tokenizer(model)))


def trained(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that is trained on TEXT."""
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
    wrapped(kind, backend)  # sets its pre-tokenizer
    backend.train_from_iterator(TEXT.split("\n"), trainer)
    return wrapped(kind, with_special_tokens(kind, backend))


@pytest.fixture(scope="module")
def by_hand() -> dict[str, PreTrainedTokenizerFast]:
    return {kind: listed(kind) for kind in SPECIAL}


@pytest.fixture(scope="module", params=["xlmr", "bert", "roberta"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return trained(request.param)


def show(tokenizer, window: af.Window) -> str:
    """Return each subword of a window, `:` and its word, and `*` if it represents that word."""
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
        # no blank in front of the first word, but in front of every other one
        ("modernbert", ["cats", "the", "cat"], "<s> cat:0* s:0 Ġthe:1* Ġcat:2* </s>"),
        ("modernbert", ["cat", "，"], "<s> cat:0* Ġ:1 ï:1* ¼:1 Į:1 </s>"),
        ("modernbert", ["，", "cat"], "<s> ï:0* ¼:0 Į:0 Ġcat:1* </s>"),
        ("modernbert", ["the cat", "cat"], "<s> t:0* h:0 e:0 Ġcat:0 Ġcat:1* </s>"),
        ("xlmr", ["unbelievable"], "<s> ▁un:0* believ:0 able:0 </s>"),
        ("bert", ["unbelievable", "，"], "[CLS] un:0* ##believ:0 ##able:0 ，:1* [SEP]"),
        ("xlmr", ["cat", "cat"], "<s> ▁cat:0* ▁cat:1* </s>"),
        ("xlmr", [], "<s> </s>"),
        ("bert", [], "[CLS] [SEP]"),
        # a lone blank in front of a word is removed, except by BPE, where numbers have it
        ("xlmr", ["，"], "<s> ，:0* </s>"),
        ("xlmr", ["cats", "，", "cat"], "<s> ▁cat:0* s:0 ，:1* ▁cat:2* </s>"),
        ("xlmr", ["▁▁，", "cat"], "<s> ，:0* ▁cat:1* </s>"),
        ("roberta", ["，", "cat"], "<s> Ġ:0 ï:0* ¼:0 Į:0 Ġcat:1* </s>"),
        ("roberta", ["cat", "a"], "<s> Ġcat:0* Ġ:1 a:1* </s>"),
        # it is kept if the word has no other subword
        ("xlmr", ["▁"], "<s> ▁:0* </s>"),
        ("xlmr", [" ", "cat"], "<s> ▁:0* ▁cat:1* </s>"),
        ("xlmr", ["▁", "，"], "<s> ▁:0* ，:1* </s>"),
        ("xlmr", ["▁", "▁"], "<s> ▁:0* ▁:1* </s>"),
        ("roberta", [" ", "cat", " "], "<s> Ġ:0* Ġcat:1* Ġ:2 Ġ:2* </s>"),
        # an unknown word is one unknown subword, which represents the word
        ("xlmr", ["☃", "cat"], "<s> <unk>:0* ▁cat:1* </s>"),
        ("bert", ["☃", "cat"], "[CLS] [UNK]:0* cat:1* [SEP]"),
        # a Vietnamese form with a space in it is one word, as is a Hebrew form with clitic marks
        ("xlmr", ["xã hội", "cat"], "<s> ▁xã:0* ▁hội:0 ▁cat:1* </s>"),
        ("bert", ["xã hội", "cat"], "[CLS] xã:0* hội:0 cat:1* [SEP]"),
        ("roberta", ["the cat", "cat"], "<s> Ġthe:0* Ġcat:0 Ġcat:1* </s>"),
        ("xlmr", ["_של_", "cat"], "<s> _:0* של:0 _:0 ▁cat:1* </s>"),
        ("bert", ["_של_", "_"], "[CLS] _:0* של:0 _:0 _:1* [SEP]"),
        # the Maltese letter `Ġ` is not a blank for a tokenizer that marks blanks differently
        ("xlmr", ["Ġorġ"], "<s> Ġ:0* orġ:0 </s>"),
        ("bert", ["Ġorġ"], "[CLS] Ġ:0* ##orġ:0 [SEP]"),
    ],
)
def test_the_first_visible_subword_represents_a_word(by_hand, kind, words, expected):
    for windows in (False, True):
        (window,) = af.encode_words(by_hand[kind], [words], 96, windows)
        assert show(by_hand[kind], window) == expected


THREE = ["the", "cats", "unbelievable"]


@pytest.mark.parametrize(
    "kind, words, max_length, expected",
    [
        ("xlmr", THREE, 8, "<s> ▁the:0* ▁cat:1* s:1 ▁un:2* believ:2 able:2 </s>"),
        ("xlmr", THREE, 7, "<s> ▁the:0* ▁cat:1* s:1 ▁un:2* believ:2 </s>"),
        ("xlmr", THREE, 6, "<s> ▁the:0* ▁cat:1* s:1 ▁un:2* </s>"),
        ("xlmr", THREE, 5, "<s> ▁the:0* ▁cat:1* s:1 </s>"),
        ("xlmr", THREE, 4, "<s> ▁the:0* ▁cat:1* </s>"),
        ("xlmr", THREE, 3, "<s> ▁the:0* </s>"),
        ("bert", THREE, 6, "[CLS] the:0* cat:1* ##s:1 un:2* [SEP]"),
        ("roberta", ["the", "cats", "cats"], 5, "<s> Ġthe:0* Ġcat:1* s:1 </s>"),
        # a removed blank takes no room
        ("xlmr", ["，", "，", "，"], 5, "<s> ，:0* ，:1* ，:2* </s>"),
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
        # a window may end within a word, or between two words
        ("xlmr", 6, ["<s> ▁the:0* ▁cat:1* s:1 ▁un:2* </s>", "<s> believ:2 able:2 </s>"]),
        ("xlmr", 5, ["<s> ▁the:0* ▁cat:1* s:1 </s>", "<s> ▁un:2* believ:2 able:2 </s>"]),
        (
            "xlmr",
            4,
            ["<s> ▁the:0* ▁cat:1* </s>", "<s> s:1 ▁un:2* </s>", "<s> believ:2 able:2 </s>"],
        ),
        ("bert", 6, ["[CLS] the:0* cat:1* ##s:1 un:2* [SEP]", "[CLS] ##believ:2 ##able:2 [SEP]"]),
    ],
)
def test_what_does_not_fit_goes_into_further_windows(by_hand, kind, max_length, expected):
    sentences = [["the"], THREE, [], ["cat"]]
    windows = af.encode_words(by_hand[kind], sentences, max_length, windows=True)
    assert [show(by_hand[kind], window) for window in windows if window.sentence == 1] == expected
    assert [window.sentence for window in windows] == [0] + [1] * len(expected) + [2, 3]


def test_only_the_first_visible_subword_of_a_word_has_its_tag(by_hand):
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

WORDS = TEXT.split() + "北京 ， 。 ☃ ☃☃ catwalk unmatched Z _ ▁ été 世界，".split() + ["xã hội"]


def random_sentence(rng: random.Random, longest: int = 30) -> list[str]:
    return rng.choices(WORDS, k=rng.randint(1, longest))


def encode_alone(tokenizer, word: str) -> Encoding:
    backend = tokenizer.backend_tokenizer
    return backend.encode([word], is_pretokenized=True, add_special_tokens=False)


def visible_subwords(tokenizer, word: str) -> list[int]:
    """Return the ids of a word that is tokenised alone, without a blank in front of others."""
    encoding = encode_alone(tokenizer, word)
    last = len(encoding.ids) - 1
    return [
        i
        for k, (i, token) in enumerate(zip(encoding.ids, encoding.tokens))
        if k == last or token not in "▁Ġ"
    ]


def subwords_of(tokenizer, word: str) -> list[tuple[int, bool]]:
    """Return (id, whether it represents the word) of what is left of a word; BPE keeps blanks."""
    encoding, rows, is_represented = encode_alone(tokenizer, word), [], False
    for k, (i, token) in enumerate(zip(encoding.ids, encoding.tokens)):
        is_lone = k < len(encoding.ids) - 1 and token in "▁Ġ"
        if not is_lone or not is_unigram(tokenizer):
            rows.append((i, not is_lone and not is_represented))
            is_represented |= not is_lone
    return rows


def is_unigram(tokenizer) -> bool:
    return type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"


def ends(tokenizer) -> tuple[int, int]:
    return tokenizer.cls_token_id, tokenizer.sep_token_id


def test_a_trained_tokenizer_does_put_lone_blanks_in_front_of_words(tokenizer):
    tokens = [encode_alone(tokenizer, word) for word in WORDS]
    lone = {word for word, one in zip(WORDS, tokens) if len(one) > 1 and one.tokens[0] in "▁Ġ"}
    assert bool(lone) == (ends(tokenizer) != (2, 3))  # 2, 3: [CLS], [SEP]
    assert any(len(visible_subwords(tokenizer, word)) > 2 for word in WORDS)


BLANK_BEFORE = {"add_prefix_space": True}
LIBRARY = {  # of the models that the README names: class of transformers and options
    "BERT": (BertTokenizer, {}),
    "BERT, cased": (BertTokenizer, {"do_lower_case": False}),
    "XLM-R": (XLMRobertaTokenizer, {}),
    "mDeBERTa": (DebertaV2Tokenizer, {}),
    "RoBERTa": (RobertaTokenizer, BLANK_BEFORE),
    "ModernBERT": (RobertaTokenizer, {}),
    "mmBERT, Gemma": (GemmaTokenizer, {}),
    "Llama 2": (LlamaTokenizer, {}),
    "Qwen, Llama 3": (Qwen2Tokenizer, {}),
}


@functools.cache
def library_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """Return the library's tokenizer of a model, trained on TEXT word by word."""
    kind, options = LIBRARY[model]
    words = [[word, f" {word}"] for word in TEXT.split()]
    special = {"pad_token": "<pad>", "unk_token": "<unk>"} if kind is Qwen2Tokenizer else {}
    tokenizer = kind(**options, **special)
    return tokenizer.train_new_from_iterator(words, vocab_size=450, show_progress=False)


@pytest.mark.parametrize("model", LIBRARY)
def test_the_subwords_of_words_are_those_of_the_text_with_blanks_between_them(model):
    """What the text of one more word adds to its subwords are the subwords of this word.

    A blank alone, if other subwords of its word follow, does not represent it. Unigram omits it.
    """
    tokenizer, rng = library_tokenizer(model), random.Random(model)
    start_and_end, vocabulary = tokenizer.encode(""), tokenizer.get_vocab()
    blanks, seen = {vocabulary.get("▁"), vocabulary.get("Ġ")}, Counter()
    words = [word for word in WORDS if word != "▁"]  # some tokenizers cannot tell it from a blank
    if model == "Llama 2":  # which knows all bytes, unlike this one, which leaves unknown ones out
        words = [word for word in words if set(word) <= set(TEXT)]
    sentences = [rng.choices(words, k=rng.randint(1, 12)) for _ in range(40)]
    windows = af.encode_words(tokenizer, sentences, 512)
    for sentence, window in zip(sentences, windows, strict=True):
        before, expected = [], []
        for k in range(len(sentence)):
            text = " ".join(sentence[: k + 1])
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids[: len(before)] == before
            added, before = ids[len(before) :], ids
            visible = [n for n, i in enumerate(added, 1) if n == len(added) or i not in blanks]
            kept = [*enumerate(added, 1)]
            if is_unigram(tokenizer):
                kept = [(n, i) for n, i in kept if n in visible]
            expected += [(i, k, n == visible[0]) for n, i in kept]
            seen.update(blanks=len(added) - len(visible), several=len(visible) > 1)
        rows = list(zip(window.ids.tolist(), window.words.tolist(), window.first.tolist()))
        assert [row for row in rows if row[1] >= 0] == expected
        assert [i for i, k, first in rows if k < 0 and not first] == start_and_end
    assert seen["several"] > 20
    assert bool(seen["blanks"]) == (model not in ("BERT", "BERT, cased"))


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
        for part in parts:
            assert not part.first[[0, -1]].any() and (part.words[[0, -1]] == -1).all()
        subwords = [
            (i, k, is_first)
            for k, word in enumerate(sentence)
            for i, is_first in subwords_of(tokenizer, word)
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
    firsts = [
        next(window for window in windows if window.sentence == k) for k in range(len(sentences))
    ]
    cut = af.encode_words(tokenizer, sentences, max_length)
    assert [show(tokenizer, window) for window in cut] == [
        show(tokenizer, window) for window in firsts
    ]
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


def slow_sentence(tokenizer, words: list[str], max_length: int) -> tuple[list[int], list[int]]:
    """Return a sentence's ids, and where each word that is not cut off starts."""
    ids, starts = [], []
    for word in words:
        subwords = subwords_of(tokenizer, word)
        starts.append(len(ids) + 1 + [is_first for _, is_first in subwords].index(True))
        ids += [i for i, _ in subwords]
    start, end = ends(tokenizer)
    room = max_length - 2
    return [start, *ids[:room], end], [at for at in starts if at <= room]


@pytest.mark.parametrize("max_length", [8, 96])
def test_queries_and_targets_are_the_first_visible_subwords_of_linked_words(tokenizer, max_length):
    rng, seen = random.Random(max_length), Counter()
    for size in (2, 16):
        pairs = random_pairs(rng, size)
        batch = af.encode_pairs(tokenizer, pairs, max_length)
        sentences = [pair.source for pair in pairs] + [pair.target for pair in pairs]
        slow = [slow_sentence(tokenizer, words, max_length) for words in sentences]

        # row k of the inputs is sentence k, padded at its end
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.shape == mask.shape == (2 * size, max(len(row) for row, _ in slow))
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
        for row, inside, (expected_ids, _) in zip(ids, mask, slow):
            assert inside.tolist() == [1] * len(expected_ids) + [0] * (len(row) - len(expected_ids))
            assert row[: len(expected_ids)].tolist() == expected_ids

        # every word that is not cut off has a vector, in the order of the text, linked or not
        places = [divmod(position, ids.shape[1]) for position in batch.positions.tolist()]
        assert places == [(k, at) for k, (_, starts) in enumerate(slow) for at in starts]

        # both words of every link are queries
        expected, cut = [], [0] * size
        for k, pair in enumerate(pairs):
            for i, j in pair.links:
                source, target = slow[k][1], slow[k + size][1]
                if i < len(source) and j < len(target):
                    expected.append(((k, source[i]), (k + size, target[j])))
                else:
                    cut[k] += 1
        queries, targets = batch.queries.tolist(), batch.targets.tolist()
        links = [(places[query], places[target]) for query, target in zip(queries, targets)]
        assert links == expected + [(target, source) for source, target in expected]
        assert batch.cut == cut and batch.candidates is None and batch.pairs == pairs
        seen.update(kept=len(expected), cut=sum(cut))
    assert seen["kept"] > 5 and (seen["cut"] > 10 or max_length == 96)


def test_the_vectors_of_a_pair_of_two_words_are_those_of_the_example_in_the_docstring(by_hand):
    """`PairBatch` explains its fields by one pair of two English and two other words."""
    pair = af.Pair("xx", ["the", "cat"], ["un", "hội"], [(1, 1)])
    batch = af.encode_pairs(by_hand["bert"], [pair], 96)
    tokens = by_hand["bert"].convert_ids_to_tokens(batch.inputs["input_ids"].flatten())
    assert tokens == "[CLS] the cat [SEP] [CLS] un hội [SEP]".split()
    assert batch.positions.tolist() == [1, 2, 5, 6]
    assert (batch.queries.tolist(), batch.targets.tolist()) == ([1, 3], [3, 1])


def test_a_link_never_points_into_another_sentence_pair(by_hand):
    pairs = [af.Pair("xx", ["the", "cat"], ["cats", "the"], [(0, 1), (1, 0)])]
    pairs += [af.Pair("xx", ["cat"], ["the", "the", "the", "，"], [(0, 3)])]
    batch = af.encode_pairs(by_hand["xlmr"], pairs, 96)
    ids = batch.inputs["input_ids"].flatten()[batch.positions]
    tokens = np.array(by_hand["xlmr"].convert_ids_to_tokens(ids))
    links = sorted(zip(tokens[batch.queries].tolist(), tokens[batch.targets].tolist()))
    expected = [("▁the", "▁the")] * 2 + [("▁cat", "▁cat")] * 2 + [("▁cat", "，"), ("，", "▁cat")]
    assert links == sorted(expected) and len(tokens) == 9


def test_links_of_words_that_are_cut_off_are_dropped_and_counted(by_hand):
    unlinked = af.Pair("xx", ["cats", "cat"], ["the", "unbelievable", "cat"], [(1, 2)])
    half = af.Pair("xx", ["the", "cat", "cats"], ["cat", "the"], [(0, 1), (2, 0)])
    room_for_three = 5
    batch = af.encode_pairs(by_hand["bert"], [unlinked, half, unlinked], room_for_three)
    assert batch.cut == [1, 0, 1]  # the last subword that fits in `half` is the first one of `cats`
    assert len(batch.queries) == len(batch.targets) == 4
    batch = af.encode_pairs(by_hand["bert"], [unlinked], room_for_three)
    assert (batch.cut, len(batch.positions)) == ([1], 4)
    assert (batch.queries.tolist(), batch.targets.tolist()) == ([], [])


# ---- sentence pairs


def random_texts(rng: random.Random, count: int) -> list[af.Pair]:
    sentence = lambda: " ".join(random_sentence(rng, 12))  # noqa: E731
    return [af.Pair("xx", sentence(), sentence()) for _ in range(count)]


def test_each_translation_is_compared_with_all_english_sentences(tokenizer):
    pairs, max_length = random_texts(random.Random(0), 7), 16
    batch = af.encode_texts(tokenizer, pairs, max_length)
    texts = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    lengths = []
    for row, mask, text in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], texts):
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        assert row[: len(ids)].tolist() == ids
        assert mask.tolist() == [1] * len(ids) + [0] * (len(row) - len(ids))
        lengths.append(len(ids))
    assert min(lengths) < max(lengths) == max_length
    assert batch.positions is None
    assert batch.queries.tolist() == [7, 8, 9, 10, 11, 12, 13]
    assert batch.targets.tolist() == batch.candidates.tolist() == [0, 1, 2, 3, 4, 5, 6]
    whole = [len(ids) > max_length for ids in tokenizer(texts)["input_ids"]]
    cut = [int(source or target) for source, target in zip(whole[:7], whole[7:])]
    assert (batch.cut, batch.pairs) == (cut, pairs) and {0, 1} == {*cut}


@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_batches_of_a_list_repeat_it_without_end_and_those_of_an_iterator_end(tokenizer, unit):
    rng = random.Random(5)
    pairs = random_pairs(rng, 5) if unit == "word" else random_texts(rng, 5)
    settings = af.Settings(unit=unit, realign_batch_size=2, realign_max_length=9)
    batches = list(itertools.islice(af.pair_batches(tokenizer, pairs, settings), 10))
    assert [pair for batch in batches for pair in batch.pairs] == pairs * 4
    assert max(batch.inputs["input_ids"].shape[1] for batch in batches) == 9
    encode = af.encode_pairs if unit == "word" else af.encode_texts
    for batch, chunk in zip(batches, ([0, 1], [2, 3], [4, 0])):
        expected = encode(tokenizer, [pairs[k] for k in chunk], 9)
        assert torch.equal(batch.inputs["input_ids"], expected.inputs["input_ids"])
        assert torch.equal(batch.targets, expected.targets)
    whole = list(af.pair_batches(tokenizer, iter(pairs), settings))
    assert [batch.pairs for batch in whole] == [pairs[:2], pairs[2:4]]  # none with a single pair


@pytest.mark.parametrize("drops_accents", [True, False])
def test_a_unigram_tokenizer_reads_decomposed_text_as_composed_text(tmp_path, drops_accents):
    """Its own normaliser drops accents that are not composed, as XLM-R's does."""
    pieces = [*SPECIAL["xlmr"], *"\u2581the\u1ebf\uac00"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=3))
    if drops_accents:
        backend.normalizer = normalizers.Replace(Regex(r"\p{M}|[\u1100-\u11ff]"), "")
    wrapped("xlmr", with_special_tokens("xlmr", backend)).save_pretrained(tmp_path)
    XLMRobertaConfig(vocab_size=len(pieces), num_hidden_layers=2).save_pretrained(tmp_path)
    tokenizer, _ = af.load_tokenizer(str(tmp_path))
    composed = ["the", "t\u1ebf", "\uac00t"]
    decomposed = [unicodedata.normalize("NFD", word) for word in composed]
    assert decomposed != composed
    read = []
    for words in (composed, decomposed):
        text = " ".join(words)
        (window,) = af.encode_words(tokenizer, [words], 20)
        assert window.words[window.first].tolist() == [0, 1, 2]
        pair = af.encode_texts(tokenizer, [af.Pair("vi", "the", text)], 20)
        (nli,) = af.encode_sentences(
            tokenizer, [{"premise": "the", "hypothesis": text, "label": 0}], 20, True
        )
        answer = {"texts": words[1:2], "starts": [text.index(words[1])]}
        (qa,) = af.encode_questions(
            tokenizer, [{"question": text, "context": text, **answer}], 60, True
        )
        inputs = [window.ids, pair.inputs["input_ids"][1], nli["input_ids"], qa["input_ids"]]
        read.append([list(map(int, row)) for row in [*inputs, qa["labels"]]])
    assert read[0] == read[1]
    assert tokenizer.convert_ids_to_tokens(read[0][0][1:-1])[-3:] == ["\u1ebf", "\uac00", "t"]


@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC()])
def test_a_tokenizer_without_the_normaliser_of_its_vocabulary_is_named(normalizer, capsys):
    """The library builds DeBERTa's so from `spm.model`: its table of characters gets lost."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *"\u2581fi"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    if normalizer:
        backend.normalizer = normalizer
    tokenizer = wrapped("xlmr", with_special_tokens("xlmr", backend))
    af.validate_tokenizer(tokenizer, 7, "--model here")
    says = "--model here: the tokenizer does not normalise text" in capsys.readouterr().out
    assert says == (normalizer is None)


# ---- groups of similar length


def rows_of_length(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of random sentences with these numbers of subwords."""
    rng = np.random.default_rng(seed)
    return af.pad_inputs([rng.integers(4, 19, length) for length in lengths], 1, "cpu")


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 32, 33])
def test_a_batch_is_split_into_at_most_eight_groups_of_similar_length(count):
    model = build("bert")
    lengths = random.Random(count).choices(range(3, 50), k=count)
    batch = rows_of_length(lengths) | {"labels": torch.arange(count)[:, None]}
    groups = list(af.by_length(model, batch))
    numbers = torch.cat([rows for rows, _ in groups]).tolist()
    assert len(groups) <= 8 and sorted(numbers) == list(range(count))
    for (rows, _), (longer, _) in itertools.pairwise(groups):
        assert max(lengths[k] for k in rows) <= min(lengths[k] for k in longer)
        assert len(longer) <= len(rows)
    for rows, group in groups:
        longest = max(lengths[k] for k in rows)  # the group is padded to its own longest row
        ids = batch["input_ids"][rows, :longest]
        assert torch.equal(group["input_ids"], ids)
        assert torch.equal(group["attention_mask"], batch["attention_mask"][rows, :longest])
        assert group["labels"].flatten().tolist() == rows.tolist()
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}  # the batch is unchanged
    assert all(len(tensor) == count for tensor in batch.values())


def test_groups_hold_little_padding():
    batch = rows_of_length(random.Random(0).choices(range(5, 64), k=32))
    subwords = batch["attention_mask"].sum().item()
    masks = [group["attention_mask"] for _, group in af.by_length(build("bert"), batch)]
    assert batch["attention_mask"].numel() > 1.5 * subwords
    assert sum(mask.numel() for mask in masks) < 1.1 * subwords


def test_the_embeddings_are_looked_up_once_for_all_groups():
    model, calls = build("bert"), []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    groups = list(af.by_length(model, rows_of_length([*range(3, 19)])))
    assert (len(groups), len(calls)) == (8, 1)


@pytest.mark.parametrize("architecture", ["distilbert", "bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("layer", [-1, 2, 0])
def test_hidden_states_in_groups_are_those_of_each_sentence_alone(architecture, layer):
    encoder = build(architecture, spread=0.3).base_model.eval()
    lengths = [9, 3, 14, 3, 7, 20, 11, 5, 8, 6]
    batch = rows_of_length(lengths)
    with torch.no_grad():
        hidden = af.hidden_state(encoder, batch, layer)
        assert hidden.shape == (10, 20, 32)
        for k, length in enumerate(lengths):
            ids = batch["input_ids"][k : k + 1, :length]
            alone = encoder(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
            torch.testing.assert_close(hidden[k, :length], alone, rtol=1e-4, atol=1e-4)


# ---- batches of a task


def feature(ids: list[int], labels: list[int], **more: list[int]) -> dict:
    return {
        name: np.array(row) for name, row in {"input_ids": ids, "labels": labels, **more}.items()
    }


def test_features_of_a_batch_are_padded_at_their_end():
    """The mask keeps a real subword that has the id of the padding."""
    batch = af.task_batch([feature([5, 9, 9], [1, af.IGNORE, 2]), feature([8], [3])], 9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 9, 9], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[1, af.IGNORE, 2], [3, af.IGNORE, af.IGNORE]],
    }


def test_segments_are_padded_and_an_example_of_any_length_can_have_one_label():
    rows = [feature([8, 4], [0], token_type_ids=[0, 1])]
    rows.append(feature([5, 6, 7], [2], token_type_ids=[0, 1, 1]))
    batch = af.task_batch(rows, 9)
    assert batch["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert batch["labels"].tolist() == [[0], [2]]


def test_every_epoch_shuffles_the_examples_anew(tokenizer):
    rows = [feature([k + 4], [k]) for k in range(10)]

    def labels(seed: int) -> list[list[int]]:
        settings = af.Settings(epochs=2, batch_size=4, seed=seed)
        batches = af.task_batches(tokenizer, rows, settings)
        return [batch["labels"].flatten().tolist() for batch in batches]

    batches = labels(31)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = ([*itertools.chain(*epoch)] for epoch in (batches[:3], batches[3:]))
    assert first != second and sorted(first) == sorted(second) == list(range(10))
    assert labels(31) == batches and labels(42) != batches


# ---- CoNLL-U


def conllu(*rows: str) -> str:
    """Return rows `ID|FORM|UPOS` as lines of ten columns, and other rows unchanged."""
    lines = []
    for row in rows:
        if row.count("|") == 2:
            number, form, tag = row.split("|")
            row = "\t".join([number, form, "_", tag] + ["_"] * 6)
        lines.append(row)
    return "\n".join(lines) + "\n"


def load(tmp_path: Path, content: str) -> list[tuple[list[str], list[str]]]:
    """Return the tokens and the names of the tags of each sentence."""
    path = tmp_path / "udpos/fr/test.conllu"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    examples = af.load_udpos("fr", "test", af.Settings(data_dir=tmp_path))
    return [(example["tokens"], [af.UPOS[tag] for tag in example["tags"]]) for example in examples]


def test_the_tags_are_the_17_of_universal_dependencies_and_the_one_of_ranges():
    names = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X _"
    assert sorted(af.UPOS) == sorted(names.split())
    assert af.TASKS["udpos"].labels == 18


def test_multi_word_ranges_are_tokens_with_a_tag_of_their_own(tmp_path):
    rows = "1|Il|PRON 2|parle|VERB 3-4|du|_ 3|de|ADP 4|le|DET 5|chat|NOUN".split()
    text = conllu("# text = Il parle du chat", *rows)
    tokens, tags = "Il parle du de le chat".split(), "PRON VERB _ ADP DET NOUN".split()
    assert load(tmp_path, text) == [(tokens, tags)]


def test_empty_nodes_are_words_as_in_the_data_of_the_authors(tmp_path):
    rows = "0.1|zero|PRON 1|Sue|PROPN 2|likes|VERB 2.1|likes|VERB 2.2|not|_ 3|tea|NOUN".split()
    tokens, tags = "zero Sue likes likes not tea".split(), "PRON PROPN VERB VERB _ NOUN".split()
    assert load(tmp_path, conllu(*rows)) == [(tokens, tags)]
    rows = "1|Sue|PROPN 2-3|du|_ 2|de|ADP 3|le|DET 3.1|chat|NOUN".split()
    tokens, tags = "Sue du de le chat".split(), "PROPN _ ADP DET NOUN".split()
    assert load(tmp_path, conllu(*rows)) == [(tokens, tags)]


FORMS = ["xã hội", "_", "_של_", "#", "#tag", "▁", "3-4", "a\u00a0b", "e\u0301"]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_kept_as_it_is(tmp_path, form):
    assert load(tmp_path, conllu(f"1|{form}|X", "2|x|NOUN")) == [([form, "x"], ["X", "NOUN"])]


@pytest.mark.parametrize(
    "content",
    [
        conllu("1|a|X", "2|b|X", "", "1|c|X", ""),
        conllu("1|a|X", "2|b|X", "", "", "", "1|c|X"),  # three blank lines, and none at the end
        conllu(
            "", "# a comment", "1|a|X", "# tabs\there", "2|b|X", "  ", "# alone", "", "1|c|X", ""
        ),
        conllu("1|a|X", "2|b|X", "", "1|c|X").rstrip("\n"),
        conllu("1|a|X", "2|b|X", "", "1|c|X", "").replace("\n", "\r\n"),
    ],
)
def test_blank_lines_end_sentences_and_comments_are_skipped(tmp_path, content):
    assert [tokens for tokens, _ in load(tmp_path, content)] == [["a", "b"], ["c"]]


WRONG = ["2\tb\tX", "2 b _ X _ _ _ _ _ _", "x|b|X", "2|b|WORD", "2|b|noun", "2||X", "-2|b|X"]


@pytest.mark.parametrize("row", [*WRONG, "not a line"])
def test_a_malformed_line_is_an_error_that_names_file_and_line(tmp_path, row):
    with pytest.raises(af.UserError, match=r"test\.conllu:3:") as error:
        load(tmp_path, conllu("# comment", "1|a|X", row, "", "1|c|X"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rows, line",
    [
        ("1|a|X 2|b|X 1|c|X 2|d|X", 3),  # the blank line between two sentences is missing
        ("1|a|X 1|b|X", 2),
        ("1|a|X 3|b|X", 2),
        ("2|a|X", 1),
        ("0|a|X", 1),
        ("1|a|X 2|b|X 2.1|e|X 1-2|c|_ 1|d|X 2|e|X", 4),
        ("1|a|X 2.1|b|X", 2),
        ("2-3|ab|_", 1),
        ("2|a|X 2-1|ab|_", 1),
    ],
)
@pytest.mark.parametrize("end", ["", "\n1\tnext\t_\tX\t_\t_\t_\t_\t_\t_\n"])
def test_ids_that_do_not_follow_each_other_are_errors_that_name_the_line(tmp_path, rows, line, end):
    with pytest.raises(af.UserError, match=rf"test\.conllu:{line}: "):
        load(tmp_path, conllu(*rows.split()) + end)


DATA = os.environ.get("ALIGNFREEZE_DATA")


@pytest.mark.skipif(not DATA, reason="needs a folder of real data in ALIGNFREEZE_DATA")
@pytest.mark.parametrize("language", ["ar", "cs", "en", "he", "ta", "tr", "vi"])
def test_every_line_of_a_real_treebank_is_a_word(language):
    expected = [[]]
    lines = (Path(DATA) / f"udpos/{language}/test.conllu").read_text("utf-8").split("\n")
    for line in lines:
        if not line:
            expected.append([])
        elif line[0] != "#":
            _, form, _, tag = line.split("\t")[:4]
            expected[-1].append((form, tag))
    examples = af.load_udpos(language, "test", af.Settings(data_dir=Path(DATA)))
    found = [[(w, af.UPOS[t]) for w, t in zip(*example.values())] for example in examples]
    assert found == [sentence for sentence in expected if sentence]


def test_a_file_without_a_sentence_is_an_error(tmp_path):
    with pytest.raises(af.UserError, match=r"test\.conllu"):
        load(tmp_path, "# nothing but a comment\n\n")


def test_ranges_and_forms_with_spaces_are_kept_from_the_treebank_to_the_labels(tmp_path, by_hand):
    rows = ["1-2|_של_|_", "1|cats|NOUN", "2|，|PUNCT", "2.1|cat|NOUN", "3|xã hội|NOUN"]
    noun, punctuation, in_range = (af.UPOS.index(tag) for tag in ("NOUN", "PUNCT", "_"))
    load(tmp_path, conllu(*rows))
    examples = af.load_udpos("fr", "test", af.Settings(data_dir=tmp_path))
    (feature,) = af.encode_tokens(by_hand["xlmr"], examples, 128, False)
    tokens = by_hand["xlmr"].convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["<s>", "_", "של", "_", "▁cat", "s", "，", "▁cat", "▁xã", "▁hội", "</s>"]
    x = af.IGNORE
    labels = [x, in_range, x, x, noun, x, punctuation, noun, noun, x, x]
    assert feature["labels"].tolist() == labels
