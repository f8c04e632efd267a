"""The word aligners against slow implementations of the same models, gold alignments, and their own stored links."""

import itertools
import math
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import alignfreeze as af
from alignfreeze import awesome_links, fast_align, grow_diag_final_and, split_words

DATA = os.environ.get("ALIGNFREEZE_DATA")
real_data = pytest.mark.skipif(
    not DATA, reason="ALIGNFREEZE_DATA names no folder with real parallel/ and goldalign/ to measure on"
)

# Alignment error rate of the C++ fast_align + atools, trained on the gold sentences and then parallel/en-XX.tsv
# (ja: on the gold sentences alone, for the sentences of en-ja.tsv are not split into words).
CPP_ERROR_RATE = {"fr": 0.234, "es": 0.296, "ru": 0.322, "hu": 0.558}
CPP_ERROR_RATE |= {"bg": 0.357, "it": 0.318, "sl": 0.396, "ja": 0.715}
# Log-likelihood of the gold sentences alone in the last iteration, English to XX and XX to English, as the PyPI
# package systran-align 3.5.0 prints it, which is built from the C++ source: generate_alignment_probabilities(...,
# iterations=5, favor_diagonal=True, beam_threshold=-1000, optimize_tension=True, variational_bayes=True).
CPP_LIKELIHOOD = {"ru": (-1992.34, -2410.18), "hu": (-3864.12, -4801.89), "bg": (-4757.64, -4519.39)}
CPP_LIKELIHOOD |= {"es": (-5075.87, -4487.36), "it": (-5656.36, -4567.91), "sl": (-4247.57, -4526.08)}
# With e5-small at layer 7, at most.
AWESOME_ERROR_RATE = {"fr": 0.19, "es": 0.21, "ru": 0.26, "hu": 0.38, "ja": 0.75}

# --------------------------------------------------------------------------------------------------------- fast_align


def slow_digamma(x):
    shift = 0.0
    while x < 20:
        shift, x = shift - 1 / x, x + 1
    return shift + math.log(x) - 1 / (2 * x) - 1 / (12 * x**2) + 1 / (120 * x**4) - 1 / (252 * x**6)


def feature(i, j, m, n):
    return -abs(j / n - i / m)


def series(a, g, ratio, step, terms):
    """Sum of terms (a + k step) g ratio^k, k = 0, 1 .. in closed form: arithmetico-geometric."""
    last, after = a + step * (terms - 1), g * ratio**terms
    return (last * after - a * g) / (ratio - 1) - step * (after - g * ratio) / (ratio - 1) ** 2


def around_the_diagonal(i, m, n):
    """(first position, how many positions) above and below the diagonal; the program counts without a sign."""
    floor = int(i * n / m)
    return [(j, terms) for j, terms in ((floor + 1, (n - floor) & 0xFFFFFFFF), (floor, floor)) if terms]


def closed_z(i, m, n, tension):
    """The sum of exp(tension * feature) over source positions, target position i of m (Dyer et al. 2013)."""
    ratio = math.exp(-tension / n)
    return sum(
        math.exp(tension * feature(i, j, m, n)) * (1 - ratio**terms) / (1 - ratio)
        for j, terms in around_the_diagonal(i, m, n)
    )


def closed_dlogz(i, m, n, tension):
    """The derivative of log Z by the tension as the program computes it: over a Z of exchanged lengths."""
    total = 0.0
    for j, terms in around_the_diagonal(i, m, n):
        near = feature(i, j, m, n)
        total += series(near, math.exp(tension * near), math.exp(-tension / n), -1 / n, terms)
    return total / closed_z(i, n, m, tension)


def slow_model(pairs, likelihoods=None):
    """Links (pair number, source index, target index) of p(target | source), word by word, as the program.

    likelihoods: a list, to which the text's log-likelihood is added that the links are read off with.
    """
    pairs = [(number, ["NULL", *s], t) for number, (s, t) in enumerate(pairs) if s and t]
    tension, t_table = 4.0, None
    shapes = Counter((len(target), len(source) - 1) for _, source, target in pairs)
    words = sum(len(target) for _, _, target in pairs)

    def scores(source, target, j):  # [p(a_j = i) t(target_j | source_i) for i = 0 .. n], j from 1
        n, m = len(source) - 1, len(target)
        norm = 0.92 / closed_z(j, m, n, tension)
        prior = [0.08, *(math.exp(tension * feature(j, i, m, n)) * norm for i in range(1, n + 1))]
        return [p * (t_table[e][target[j - 1]] if t_table else 1.0) for p, e in zip(prior, source)]

    for iteration in range(4):
        counts, observed = defaultdict(lambda: defaultdict(float)), 0.0
        for _, source, target in pairs:
            n, m = len(source) - 1, len(target)
            for j in range(1, m + 1):
                joint = scores(source, target, j)
                total = sum(joint)
                for i, word in enumerate(source):
                    counts[word][target[j - 1]] += joint[i] / total
                    observed += joint[i] / total * feature(j - 1, i, m, n) if i else 0.0
        for _ in range(8 if iteration else 0):
            expected = sum(
                count * closed_dlogz(j, m, n, tension)
                for (m, n), count in shapes.items()
                for j in range(1, m + 1)
            )
            tension = min(max(tension + 20 * (observed - expected) / words, 0.1), 14.0)
        t_table = {}
        for word, row in counts.items():
            total = slow_digamma(sum(c + 0.01 for c in row.values()))
            t_table[word] = {f: math.exp(slow_digamma(c + 0.01) - total) for f, c in row.items()}
    links, likelihood = set(), 0.0
    for number, source, target in pairs:
        for j in range(1, len(target) + 1):
            joint = scores(source, target, j)
            likelihood += math.log(sum(joint))
            best = max(range(len(joint)), key=lambda i: (joint[i], -i))
            if best:
                links.add((number, best - 1, j - 1))
    if likelihoods is not None:
        likelihoods.append(likelihood)
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


def slow_fast_align(pairs, likelihoods=None):
    forward = slow_model(pairs, likelihoods)
    reverse = {(number, i, j) for number, j, i in slow_model([(t, s) for s, t in pairs], likelihoods)}
    per_pair = [
        [{(i, j) for k, i, j in links if k == number} for links in (forward, reverse)]
        for number in range(len(pairs))
    ]
    return [sorted(slow_grow_diag_final_and(*both)) for both in per_pair]


def invented_corpus(seed, size=120):
    """Sentences of invented words; translations swap neighbours, drop, double and repeat words."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(size):
        source = [f"s{int(rng.paretovariate(0.5)) % 60}" for _ in range(rng.randint(1, 12))]
        target = [
            w.replace("s", "t") for w in source for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 2)))
        ] or ["t0"]
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


def assert_same_links(pairs):
    """Returns the numbers of the pairs that were compared."""
    clear = [number for number, pair in enumerate(pairs) if not has_tie(*pair)]
    fast, slow = fast_align(pairs), slow_fast_align(pairs)
    assert [fast[number] for number in clear] == [slow[number] for number in clear]
    return clear


@pytest.mark.parametrize("seed", range(3))
def test_links_are_those_of_the_slow_implementation(seed):
    pairs = invented_corpus(seed)
    clear = assert_same_links(pairs)
    assert (
        len(clear) > 60
        and sum(len(set(pairs[number][0])) < len(pairs[number][0]) for number in clear) > 10
    )


@pytest.mark.parametrize("language", ["qaa", "qac"])
def test_links_of_the_toy_world_are_those_of_the_slow_implementation(world, language):
    text = itertools.islice(af.parallel_text(language, world / "data"), 100)
    pairs = [(split_words(line[0], "en"), split_words(line[1], language)) for line in text]
    assert len(assert_same_links(pairs)) > 50


@pytest.mark.parametrize("tension", [0.1, 4.0, 14.0])
def test_the_normaliser_is_that_of_exchanged_lengths(tension):
    """Where the target is the longer side, a length below zero wraps around: then it is no sum of positions."""
    for n, m in itertools.product((1, 2, 3, 7, 40), repeat=2):
        found = af.exchanged_normaliser(n, m, tension)
        assert found == pytest.approx([closed_z(i, n, m, tension) for i in range(1, m + 1)], rel=1e-9)
        if m <= n:
            sums = [
                sum(math.exp(-tension * abs(j / m - i / n)) for j in range(1, m + 1))
                for i in range(1, m + 1)
            ]
            assert found == pytest.approx(sums, rel=1e-9)


def test_symmetrisation_follows_the_sequential_order():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n, m = rng.integers(1, 12, 2)
        forward, reverse = rng.integers(-1, n, m).tolist(), rng.integers(-1, m, n).tolist()
        both = (
            {(i, j) for j, i in enumerate(forward) if i >= 0},
            {(i, j) for i, j in enumerate(reverse) if j >= 0},
        )
        assert grow_diag_final_and(forward, reverse) == sorted(slow_grow_diag_final_and(*both))


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
    text = itertools.islice(af.parallel_text("qab", world / "data"), 40)
    return [(split_words(line[0], "en"), split_words(line[1], "qab")) for line in text]


def slow_awesome(model, tokenizer, source, target, layer, threshold):
    """One sentence pair alone, by the library's hidden states, subword by subword."""
    sides = []
    for words in (source, target):
        encoded = tokenizer(words, is_split_into_words=True)
        subwords = list(zip(encoded.tokens(), encoded["input_ids"], encoded.word_ids()))
        lone = [
            k
            for k, (token, _, word) in enumerate(subwords[:-1])
            if token == "▁" and word == subwords[k + 1][2]
        ]
        subwords = [subword for k, subword in enumerate(subwords) if k not in lone]
        with torch.inference_mode():
            output = model(torch.tensor([[id for _, id, _ in subwords]]), output_hidden_states=True)
        states = output.hidden_states[layer][0].double()
        sides.append(
            [(word, state) for (_, _, word), state in zip(subwords, states) if word is not None]
        )
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


# ------------------------------------------------------------------------------------- in a run: stored and read again


def first_pairs(data, aligner, count=60, **options):
    link, text = af.linker("qaa", str(aligner), data, limit=100, **options)
    return list(itertools.islice(af.linked_pairs("qaa", link, text, 31), count))


@pytest.mark.parametrize("aligner", ["dictionary", "fastalign", "awesome"])
def test_stored_links_are_a_line_for_each_sentence_pair_and_give_the_same_pairs_again(
    world, tmp_path, monkeypatch, aligner
):
    model = AutoModel.from_pretrained(world / "models/bert", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "models/bert")

    def awesome(pairs):
        return awesome_links(model, tokenizer, pairs, 1, 0.05)

    monkeypatch.setattr(af, "load_awesome", lambda *_: awesome)
    argv = f"--aligner {aligner} --limit-links 100 --realign-languages qaa --device cpu".split()
    argv += ["--data-dir", str(world / "data"), "--write-links", str(tmp_path)]
    assert af.main(argv) == 0
    anything = itertools.repeat((range(999), range(999)))
    stored = af.read_pharaoh(tmp_path / "en-qaa.txt", anything, False, None)
    link, text = af.linker("qaa", aligner, world / "data", limit=100, awesome=awesome)
    assert [pair.links for pair in link(list(text()))] == stored
    assert len(stored) == 100
    assert first_pairs(world / "data", tmp_path) == first_pairs(world / "data", aligner, awesome=awesome)


def seen_by_fast_align(monkeypatch):
    """A list that gets the sentence pairs from which fast_align learns."""
    seen = []

    def align(pairs):
        seen.extend(pairs)
        return fast_align(seen)

    monkeypatch.setattr(af, "fast_align", align)
    return seen


def test_the_case_of_letters_does_not_matter_to_fast_align_in_a_run(world, monkeypatch):
    seen = seen_by_fast_align(monkeypatch)
    pairs = first_pairs(world / "data", "fastalign")
    assert not any(word != word.lower() for pair in seen for words in pair for word in words)
    assert any(word != word.lower() for pair in pairs for word in pair.source)


def test_fast_align_learns_the_links_of_dev_text_from_training_text_too(data, monkeypatch):
    lines = (data / "parallel/en-qaa.tsv").read_text("utf-8").splitlines(keepends=True)
    (data / "parallel/en-qaa.dev.tsv").write_text("".join(lines[:3]), "utf-8")
    seen = seen_by_fast_align(monkeypatch)
    link, text = af.linker("qaa", "fastalign", data, limit=20, part="dev")
    assert len(seen) == 3 + 20 and seen[:3] == seen[3:6]
    assert [pair.links for pair in link(list(text()))] == fast_align(seen)[:3]


# --------------------------------------------------------------------------------------------------- gold alignments


def error_rate(found, gold):
    """Alignment error rate (Och and Ney 2003) of links [set] against [(sure, possible)]."""
    hits = sum(len(links & sure) + len(links & possible) for links, (sure, possible) in zip(found, gold))
    return 1 - hits / sum(len(links) + len(sure) for links, (sure, _) in zip(found, gold))


@pytest.mark.parametrize("language, most", [("qaa", 0.05), ("qab", 0.25), ("qac", 0.25)])
def test_fast_align_finds_the_gold_links_of_the_toy_world(world, language, most):
    (path,) = (world / "data/goldalign").glob(f"en-{language}*")
    gold, pairs = read_gold(path)
    found = [set(links) for links in fast_align(pairs)]
    assert error_rate(found, gold) <= most


def read_gold(path):
    """[(sure links, possible links)], and the sentence pairs, lower-cased."""
    gold, pairs = [], []
    for line in path.read_text("utf-8").splitlines():
        source, target, links = line.split("\t")
        sure = {tuple(map(int, link.split("-"))) for link in links.split() if "-" in link}
        gold.append(
            (sure, sure | {tuple(map(int, link.split("p"))) for link in links.split() if "p" in link})
        )
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
@pytest.mark.parametrize("language", CPP_LIKELIHOOD)
def test_links_are_read_off_the_scores_of_the_cpp_program(language):
    """The slow implementation has the program's log-likelihoods, to all digits, and the links are its links."""
    _, pairs = read_gold(next(Path(DATA, "goldalign").glob(f"en-{language}.*.tsv")))
    likelihoods = []
    expected = slow_fast_align(pairs, likelihoods)
    assert likelihoods == pytest.approx(CPP_LIKELIHOOD[language], abs=0.006)
    found = fast_align(pairs)
    assert sum(a != b for a, b in zip(found, expected)) <= 1  # two scores may be equal but for rounding


@real_data
@pytest.mark.skipif(
    "ALIGNFREEZE_E5" not in os.environ,
    reason="ALIGNFREEZE_E5 names no folder with multilingual-e5-small",
)
@pytest.mark.parametrize("language", AWESOME_ERROR_RATE)
def test_alignment_error_rate_of_a_real_encoder(language):
    path = next(Path(DATA, "goldalign").glob(f"en-{language}.*.tsv"))
    gold, _ = read_gold(path)
    tokenizer, _ = af.load_tokenizer(os.environ["ALIGNFREEZE_E5"])
    model = AutoModel.from_pretrained(os.environ["ALIGNFREEZE_E5"], dtype=torch.float32).eval()
    lines = path.read_text("utf-8").splitlines()[:150]
    pairs = [
        (source.split(), target.split()) for source, target, _ in (line.split("\t") for line in lines)
    ]
    found = [set(links) for links in awesome_links(model, tokenizer, pairs, layer=7)]
    assert error_rate(found, gold) <= AWESOME_ERROR_RATE[language]
