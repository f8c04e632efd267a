"""The word aligners against obvious implementations of the same models, gold alignments, and their own stored links."""

import itertools
import math
import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import alignfreeze as af
from alignfreeze import awesome_links, fast_align, grow_diag_final_and, linked_pairs, remembered, split_words

DATA = os.environ.get("ALIGNFREEZE_DATA")
real_data = pytest.mark.skipif(
    not DATA, reason="ALIGNFREEZE_DATA names no folder with real parallel/ and goldalign/ to measure on"
)

# Alignment error rate of the C++ fast_align + atools, trained on the gold sentences and then parallel/en-XX.tsv
# (ja: on the gold sentences alone, for the sentences of en-ja.tsv are not split into words).
CPP_ERROR_RATE = {
    "fr": 0.234,
    "es": 0.296,
    "ru": 0.322,
    "hu": 0.558,
    "bg": 0.357,
    "it": 0.318,
    "sl": 0.396,
    "ja": 0.715,
}
AWESOME_ERROR_RATE = {"fr": 0.19, "es": 0.21, "ru": 0.26, "hu": 0.38, "ja": 0.75}  # with e5-small at layer 7, at most

# --------------------------------------------------------------------------------------------------------- fast_align


def slow_digamma(x):
    shift = 0.0
    while x < 20:
        shift, x = shift - 1 / x, x + 1
    return shift + math.log(x) - 1 / (2 * x) - 1 / (12 * x**2) + 1 / (120 * x**4) - 1 / (252 * x**6)


def slow_model(pairs):
    """Links (pair number, source index, target index) of p(target | source), word by word as the paper says it."""
    pairs = [(number, ["NULL", *s], t) for number, (s, t) in enumerate(pairs) if s and t]
    tension, t_table = 4.0, None

    def scores(source, target, j):  # [p(a_j = i) t(target_j | source_i) for i = 0 .. n], j from 1
        n, m = len(source) - 1, len(target)
        near = [math.exp(-tension * abs(i / n - j / m)) for i in range(1, n + 1)]
        prior = [0.08, *(0.92 * x / sum(near) for x in near)]
        return [p * (t_table[e][target[j - 1]] if t_table else 1.0) for p, e in zip(prior, source)]

    for iteration in range(4):
        counts, observed, expected_at = defaultdict(lambda: defaultdict(float)), 0.0, []
        for _, source, target in pairs:
            n, m = len(source) - 1, len(target)
            for j in range(1, m + 1):
                joint = scores(source, target, j)
                for i, word in enumerate(source):
                    posterior = joint[i] / sum(joint)
                    counts[word][target[j - 1]] += posterior
                    observed += posterior * abs(i / n - (j - 1) / m) if i else 0.0
                expected_at.append((n, [abs(i / n - j / m) for i in range(1, n + 1)]))
        for _ in range(8 if iteration else 0):
            expected = 0.0
            for _, far in expected_at:
                near = [math.exp(-tension * d) for d in far]
                expected += sum(w * d for w, d in zip(near, far)) / sum(near)
            tension = min(max(tension + 20 * (expected - observed) / len(expected_at), 0.1), 14.0)
        t_table = {}
        for word, row in counts.items():
            total = slow_digamma(sum(c + 0.01 for c in row.values()))
            t_table[word] = {f: math.exp(slow_digamma(c + 0.01) - total) for f, c in row.items()}
    links = set()
    for number, source, target in pairs:
        for j in range(1, len(target) + 1):
            joint = scores(source, target, j)
            best = max(range(len(joint)), key=lambda i: (joint[i], -i))
            if best:
                links.add((number, best - 1, j - 1))
    return links


def slow_grow_diag_final_and(forward, reverse):
    """One sentence pair at a time, one link at a time, as atools: sets of (source index, target index)."""
    links = forward & reverse

    def unlinked(link):
        return link[0] not in {i for i, _ in links}, link[1] not in {j for _, j in links}

    grown = True
    while grown:
        grown = False
        for i, j in sorted((forward | reverse) - links):
            near = any((i + a, j + b) in links for a in (-1, 0, 1) for b in (-1, 0, 1))
            if near and any(unlinked((i, j))):
                links.add((i, j))
                grown = True
    for direction in (forward, reverse):
        for link in sorted(direction):
            if all(unlinked(link)):
                links.add(link)
    return links


def slow_fast_align(pairs):
    forward = slow_model(pairs)
    reverse = {(number, i, j) for number, j, i in slow_model([(t, s) for s, t in pairs])}
    per_pair = [
        [{(i, j) for k, i, j in links if k == number} for links in (forward, reverse)] for number in range(len(pairs))
    ]
    return [sorted(slow_grow_diag_final_and(*both)) for both in per_pair]


def invented_corpus(seed, size=200):
    """Sentences of invented words; translations swap neighbours, drop, double and repeat words."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(size):
        source = [f"s{int(rng.paretovariate(0.5)) % 60}" for _ in range(rng.randint(1, 12))]
        target = [w.replace("s", "t") for w in source for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 2)))] or ["t0"]
        for k in range(len(target) - 1):
            if rng.random() < 0.2:
                target[k : k + 2] = target[k + 1], target[k]
        pairs.append((source, target))
    return pairs


def has_tie(source, target):
    """A word twice in one sentence, equally far from the diagonal for some word of the other: rounding decides."""
    return any(
        one[i - 1] == one[k - 1] and (i + k) * len(other) == 2 * j * len(one)
        for one, other in ((source, target), (target, source))
        for i in range(1, len(one) + 1)
        for k in range(i + 1, len(one) + 1)
        for j in range(1, len(other) + 1)
    )


@pytest.mark.parametrize("seed", range(3))
def test_links_are_those_of_the_obvious_implementation(seed):
    pairs = invented_corpus(seed)
    clear = [number for number, pair in enumerate(pairs) if not has_tie(*pair)]
    fast, slow = fast_align(pairs), slow_fast_align(pairs)
    assert [fast[number] for number in clear] == [slow[number] for number in clear]
    assert len(clear) > 100 and sum(len(set(pairs[number][0])) < len(pairs[number][0]) for number in clear) > 20


def test_symmetrisation_follows_the_sequential_order():
    rng = np.random.default_rng(0)
    matrices = [rng.random((2, *rng.integers(1, 12, 2))) < rng.choice([0.1, 0.2, 0.5]) for _ in range(500)]
    pair, i, j, forward, reverse = np.concatenate(
        [
            np.array([(p, i, j, *both[:, i, j]) for i, j in np.argwhere(both.any(0))], int).reshape(-1, 5)
            for p, both in enumerate(matrices)
        ]
    ).T
    kept = grow_diag_final_and(pair, i, j, forward > 0, reverse > 0)
    for number, both in enumerate(matrices):
        expected = slow_grow_diag_final_and(
            *({tuple(map(int, link)) for link in np.argwhere(matrix)} for matrix in both)
        )
        mine = kept & (pair == number)
        assert set(zip(i[mine].tolist(), j[mine].tolist())) == expected


def test_two_runs_give_the_same_links():
    pairs = invented_corpus(5)
    assert fast_align(pairs) == fast_align(pairs)


def test_empty_inputs_have_no_links():
    assert fast_align([]) == []
    assert fast_align([([], []), (["a"], []), ([], ["b"])]) == [[], [], []]


def test_empty_pairs_do_not_change_the_others():
    pairs = invented_corpus(6)
    with_empty = [pair for p in pairs for pair in (p, ([], p[1]))]
    assert fast_align(with_empty)[::2] == fast_align(pairs)
    assert not any(fast_align(with_empty)[1::2])


def test_one_word_sentences():
    words = [(["dog"], ["chien"]), (["cat"], ["chat"]), (["dog"], ["chien"])]
    assert fast_align(words) == [[(0, 0)]] * 3 == slow_fast_align(words)


def test_repeated_words_link_along_the_diagonal():
    sentence = (["the", "dog", "and", "the", "cat"], ["le", "chien", "et", "le", "chat"])
    others = [(["the"], ["le"]), (["dog"], ["chien"]), (["and"], ["et"]), (["cat"], ["chat"])] * 3
    assert fast_align([sentence, *others])[0] == [(k, k) for k in range(5)]


def test_many_pairs_of_one_shape_are_split_into_batches_without_a_trace():
    """130,000 cells a batch: 6,000 pairs of 6 x 6 words need several batches."""
    rng = random.Random(0)
    pairs = [
        ([f"s{w}" for w in ws], [f"t{w}" for w in ws]) for ws in (rng.choices(range(50), k=6) for _ in range(6000))
    ]
    links = fast_align(pairs)
    assert sum(found == [(k, k) for k in range(6)] for found in links) > 5500
    assert all({s[i][1:] == t[j][1:] for i, j in found} == {True} for (s, t), found in zip(pairs, links))


# ------------------------------------------------------------------------------------------------------ awesome-align


@pytest.fixture(scope="module", params=["distilbert", "bert", "xlmr"])
def encoder(world, request):
    """An encoder whose hidden states differ enough to link some words and not others, and its tokenizer."""
    folder = world / "models" / request.param
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.get_input_embeddings().parameters():
            parameter.mul_(20)
    return model, AutoTokenizer.from_pretrained(folder, add_prefix_space=True)


@pytest.fixture(scope="module")
def sentences(world):
    """Sentence pairs of the toy world as words, of lengths that differ."""
    text = af.parallel_text("qab", world / "data")
    return [(split_words(s, "en"), split_words(t, "qab")) for s, t in itertools.islice(text, 40)]


def slow_awesome(model, tokenizer, source, target, layer, threshold):
    """One sentence pair alone, by the library's hidden states, subword by subword."""
    sides = []
    for words in (source, target):
        encoded = tokenizer(words, is_split_into_words=True)
        subwords = list(zip(encoded.tokens(), encoded["input_ids"], encoded.word_ids()))
        lone = [k for k, (token, _, word) in enumerate(subwords[:-1]) if token == "▁" and word == subwords[k + 1][2]]
        subwords = [subword for k, subword in enumerate(subwords) if k not in lone]
        with torch.inference_mode():
            output = model(torch.tensor([[id for _, id, _ in subwords]]), output_hidden_states=True)
        states = output.hidden_states[layer][0].double()
        sides.append([(word, state) for (_, _, word), state in zip(subwords, states) if word is not None])
    links = set()
    for i, x in sides[0]:
        for j, y in sides[1]:
            score = math.exp(x @ y)
            over_target = score / sum(math.exp(x @ other) for _, other in sides[1])
            over_source = score / sum(math.exp(other @ y) for _, other in sides[0])
            if over_target > threshold and over_source > threshold:
                links.add((i, j))
    return sorted(links)


@pytest.mark.parametrize("layer, threshold", [(1, 1e-3), (2, 0.02), (0, 0.2)])
def test_links_are_where_the_softmax_is_high_in_both_directions(encoder, sentences, layer, threshold):
    found = awesome_links(*encoder, sentences, layer, threshold)
    expected = [slow_awesome(*encoder, *pair, layer, threshold) for pair in sentences]
    assert found == expected
    words = sum(len(source) * len(target) for source, target in sentences)
    assert 0 < sum(map(len, found)) < words  # some words are linked, and some are not


def test_a_sentence_pair_gets_the_same_links_alone_and_among_others(encoder, sentences):
    together = awesome_links(*encoder, sentences, 1, 0.05)
    assert together == [awesome_links(*encoder, [pair], 1, 0.05)[0] for pair in sentences]


def test_empty_sentences_have_no_awesome_links(encoder):
    assert awesome_links(*encoder, [], 1) == []
    assert awesome_links(*encoder, [([], []), (["a"], []), ([], ["b"])], 1) == [[], [], []]


def test_words_that_the_encoder_has_no_room_for_have_no_links(encoder, sentences):
    model, tokenizer = encoder
    limit = tokenizer.model_max_length
    long = [word for source, _ in sentences * 20 for word in source]
    ((*links,),) = awesome_links(model, tokenizer, [(long, ["word"])], 1, 0.0)
    assert 0 < len(links) < min(limit, len(long)) and max(i for i, _ in links) < limit


# ------------------------------------------------------------------------------------- in a run: stored and reused


def first_pairs(world, aligner, *more, count=60):
    return list(itertools.islice(linked_pairs("qaa", str(aligner), world / "data", 31, *more), count))


@pytest.mark.parametrize("aligner", ["dictionary", "fastalign", "awesome"])
def test_stored_links_are_a_line_for_each_sentence_pair_and_give_the_same_pairs_again(world, tmp_path, aligner):
    """Whether the whole text is aligned first (--write-links), or what is needed when it is needed."""
    model = AutoModel.from_pretrained(world / "models/bert", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "models/bert")

    def awesome(pairs):
        return awesome_links(model, tokenizer, pairs, 1, 0.05)

    pairs = first_pairs(world, aligner, awesome, tmp_path)
    lines = (tmp_path / "en-qaa.txt").read_text("utf-8").splitlines()
    assert len(lines) == len(list(af.parallel_text("qaa", world / "data")))
    assert first_pairs(world, aligner, awesome) == first_pairs(world, tmp_path) == pairs


def test_fast_align_learns_from_a_text_once(world, monkeypatch, tmp_path):
    monkeypatch.setattr(af, "CACHE", tmp_path)
    pairs = first_pairs(world, "fastalign")
    monkeypatch.setattr(af, "fast_align", lambda pairs: pytest.fail("the links were in the cache"))
    assert first_pairs(world, "fastalign") == pairs


def test_the_case_of_letters_does_not_matter_to_fast_align_in_a_run(world, monkeypatch, tmp_path):
    monkeypatch.setattr(af, "CACHE", tmp_path)
    seen = []
    monkeypatch.setattr(af, "fast_align", lambda pairs: seen.extend(pairs) or fast_align(pairs))
    pairs = first_pairs(world, "fastalign")
    assert not any(word != word.lower() for pair in seen for words in pair for word in words)
    assert any(word != word.lower() for pair in pairs for word in pair.source)


def error_rate(found, gold):
    """Alignment error rate (Och and Ney 2003) of links [set] against [(sure, possible)]."""
    hits = sum(len(links & sure) + len(links & possible) for links, (sure, possible) in zip(found, gold))
    return 1 - hits / sum(len(links) + len(sure) for links, (sure, _) in zip(found, gold))


@pytest.mark.parametrize("language, most", [("qaa", 0.05), ("qab", 0.25), ("qac", 0.25)])
def test_fast_align_finds_the_gold_links_of_the_toy_world(world, language, most):
    (path,) = (world / "data/goldalign").glob(f"en-{language}*")
    gold, pairs = read_gold(path)
    assert error_rate([set(links) for links in fast_align(pairs)], gold) <= most


def read_gold(path):
    """[(sure links, possible links)], and the sentence pairs, lower-cased."""
    gold, pairs = [], []
    for line in path.read_text("utf-8").splitlines():
        source, target, links = line.split("\t")
        sure = {tuple(map(int, link.split("-"))) for link in links.split() if "-" in link}
        gold.append((sure, sure | {tuple(map(int, link.split("p"))) for link in links.split() if "p" in link}))
        pairs.append((source.lower().split(), target.lower().split()))
    return gold, pairs


@real_data
@pytest.mark.parametrize("language", CPP_ERROR_RATE)
def test_alignment_error_rate_is_that_of_the_cpp_program(language):
    gold, pairs = read_gold(next(Path(DATA, "goldalign").glob(f"en-{language}.*.tsv")))
    if language != "ja":
        text = af.parallel_text(language, Path(DATA))
        pairs += [(split_words(s.lower(), "en"), split_words(t.lower(), language)) for s, t in text]
    found = [set(links) for links in fast_align(pairs)[: len(gold)]]
    assert error_rate(found, gold) == pytest.approx(CPP_ERROR_RATE[language], abs=0.01)


@real_data
@pytest.mark.skipif(
    "ALIGNFREEZE_E5" not in os.environ, reason="ALIGNFREEZE_E5 names no folder with multilingual-e5-small"
)
@pytest.mark.parametrize("language", AWESOME_ERROR_RATE)
def test_alignment_error_rate_of_a_real_encoder(language):
    gold, pairs = read_gold(next(Path(DATA, "goldalign").glob(f"en-{language}.*.tsv")))
    tokenizer, _ = af.load_tokenizer(os.environ["ALIGNFREEZE_E5"])
    model = AutoModel.from_pretrained(os.environ["ALIGNFREEZE_E5"], dtype=torch.float32).eval()
    cased = [line.split("\t")[:2] for line in Path(DATA).glob(f"goldalign/en-{language}.*.tsv").__next__().open()][:150]
    pairs = [(source.split(), target.split()) for source, target in cased]
    found = [set(links) for links in awesome_links(model, tokenizer, pairs, layer=7)]
    assert error_rate(found, gold) <= AWESOME_ERROR_RATE[language]


# ------------------------------------------------------------------------------------------------- links kept on disk


def test_links_are_computed_once_for_all_processes_and_torn_lines_are_computed_again(tmp_path):
    calls = []

    def align(pairs):
        calls.append(len(pairs))
        return [[(k, 0) for k in range(len(source))] for source, _ in pairs]

    one, two = ([(["a", "b"], ["c"]), (["d"], ["é"])], [(["a", "b"], ["c"])])
    for _ in range(2):  # two processes, one after the other
        links = remembered(align, tmp_path / "links")
        assert links(one) == links(one) == [[(0, 0), (1, 0)], [(0, 0)]]
        assert links(two) == [[(0, 0), (1, 0)]]
    assert calls == [2, 1]
    (path,) = (tmp_path / "links").iterdir()
    path.write_text(path.read_text("utf-8")[:-2], "utf-8")  # killed while it wrote the second line
    calls.clear()
    links = remembered(align, tmp_path / "links")
    assert (links(one), calls) == ([[(0, 0), (1, 0)], [(0, 0)]], [])
    assert (links(two), calls) == ([[(0, 0), (1, 0)]], [1])
    assert len(list((tmp_path / "links").iterdir())) == 2  # a process writes to a file of its own
