"""Tests of --probe: how often translations are the nearest neighbours at each layer."""

import itertools
import json
from types import SimpleNamespace

import pytest
import tiny
import torch

import alignfreeze as af
from alignfreeze import Settings

FLAGS = """--languages qaa --realign-languages qaa qab --limit-train 64 --limit-test 10 --epochs 1
--lr 1e-3 --device cpu"""


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """Return a function that makes the record of a short run, once for each choice of flags."""
    records = {}

    def record(*flags: str) -> dict:
        if flags not in records:
            out = tmp_path_factory.mktemp("out")
            argv = ["--model", str(world / "models/xlmr"), "--data-dir", str(world / "data")]
            assert af.main([*argv, *FLAGS.split(), *flags, "--out", str(out)]) == 0
            (path,) = out.glob("*.json")
            records[flags] = json.loads(path.read_text("utf-8"))
        return records[flags]

    return record


# ---- Retrieval


def slow_share(ours: list, theirs: list, margin: bool) -> float:
    """Return how often the most similar vector of the other side is the one of the same number."""
    cosine = [[torch.cosine_similarity(a, b, dim=0).item() for b in theirs] for a in ours]
    similarity = cosine
    if margin:
        rows = [mean_of_nearest(row) for row in cosine]
        columns = [mean_of_nearest(column) for column in zip(*cosine)]
        similarity = []
        for row, near in zip(cosine, rows):
            similarity.append([x / ((near + column) / 2) for x, column in zip(row, columns)])
    hits = 0
    for side in (similarity, list(zip(*similarity))):
        hits += sum(row.index(max(row)) == k for k, row in enumerate(side))
    return hits / 2 / len(ours)


def mean_of_nearest(row: list[float]) -> float:
    return sum(sorted(row)[-4:]) / min(4, len(row))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize(
    "unit, pool_first", [("word", True), ("sentence", True), ("sentence", False)]
)
def test_retrieval_is_the_share_of_links_to_the_nearest_neighbour(architecture, unit, pool_first):
    """Also if the model comes from training, with dropout."""
    dropout = {"bert": "hidden_dropout_prob", "llama": "attention_dropout"}[architecture]
    model = tiny.build(architecture, spread=0.2, **{dropout: 0.5}).eval()
    tokenizer = tiny.make_tokenizer("<s> $A")
    pairs = tiny.word_pairs()[:2] if unit == "word" else tiny.text_pairs(20)
    sides = [[], []]  # of each linked word or sentence, its vector at each layer
    for pair in pairs:
        for side, words in enumerate((pair.source, pair.target)):
            words = words if unit == "word" else words.split()
            ids = torch.tensor([[0, *map(tiny.VOCABULARY.index, words)]])
            with torch.inference_mode():
                states = model.base_model(ids, output_hidden_states=True).hidden_states
            if unit == "sentence":
                sides[side].append([state[0, 1 - pool_first :].mean(0) for state in states])
            else:
                sides[side] += [
                    [state[0, 1 + link[side]] for state in states] for link in pair.links
                ]
    settings = Settings(unit=unit, pool_first=pool_first)
    results = af.retrieval(model.train(), tokenizer, pairs, settings)
    assert list(results) == (["retrieval"] if unit == "word" else ["retrieval", "margin"])
    for kind, shares in results.items():
        expected = []
        for layer in range(tiny.LAYERS + 1):
            ours, theirs = ([vectors[layer] for vectors in side] for side in sides)
            expected.append(slow_share(ours, theirs, kind == "margin"))
        assert shares == pytest.approx(expected, abs=1e-6)
    assert len(set(results["retrieval"])) > 1  # the layers differ


@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_a_text_is_the_nearest_neighbour_of_itself(unit):
    texts = [" ".join(dict.fromkeys(pair.source.split())) for pair in tiny.text_pairs(2)]
    pairs = [af.Pair("de", text, text) for text in texts]
    if unit == "word":
        words = texts[0].split()
        pairs = [af.Pair("de", words, words, [(k, k) for k in range(len(words))])]
    model = tiny.build("bert", spread=0.2)
    results = af.retrieval(model, tiny.make_tokenizer(), pairs, Settings(unit=unit))
    assert all(shares == [1.0] * (tiny.LAYERS + 1) for shares in results.values())


def test_words_of_a_model_in_bf16_are_compared_in_float32():
    """In bf16, cosines near 1 are equal, and the first of equals would be the nearest."""
    model, words = tiny.build("llama", torch.bfloat16), tiny.WORDS[:8]
    noise = torch.randn(len(tiny.VOCABULARY), tiny.HIDDEN)
    with torch.no_grad():  # all words are almost alike
        model.get_input_embeddings().weight.copy_(1 + 0.03 * noise)
    pair = af.Pair("en", words, words, [(k, k) for k in range(8)])
    results = af.retrieval(model, tiny.make_tokenizer(), [pair], Settings())
    assert results["retrieval"][0] == 1.0


def test_it_is_an_error_if_all_linked_words_are_cut_off():
    pair = af.Pair("de", ["the"] * 30 + ["cat"], ["le"] * 30 + ["chat"], [(30, 30)])
    model, tokenizer = tiny.build("bert"), tiny.make_tokenizer()
    with pytest.raises(af.UserError, match="--probe, de: no linked word within 8 subwords"):
        af.retrieval(model, tokenizer, [pair], Settings(realign_max_length=8))


# ---- The pairs of the probe


@pytest.mark.parametrize("aligner", ["dictionary", "fastalign"])
def test_each_word_has_one_link_and_each_pair_has_a_link(aligner, world, tmp_path):
    options = {"data_dir": world / "data", "probe": True, "realign_languages": ["qaa"]}
    if aligner == "fastalign":
        af.write_links(Settings(aligner=aligner, write_links=tmp_path / "links", **options))
        aligner = str(tmp_path / "links")
    text = af.ParallelText("qaa", Settings(aligner=aligner, **options), "dev")
    pairs = af.probe_pairs(text)
    assert 10 < len(pairs) <= af.PROBE_PAIRS
    assert all(pair.links for pair in pairs)
    english = [pair.source[i] for pair in pairs for i, _ in pair.links]
    other = [pair.target[j] for pair in pairs for _, j in pair.links]
    assert len(english) > 30
    assert len(set(english)) == len(set(other)) == len(english)


def stub_text(pair: af.Pair) -> SimpleNamespace:
    """Return a text in which one pair repeats without end."""
    lines = lambda: itertools.repeat(("", ""), 500)  # noqa: E731
    pairs = lambda number, line: pair  # noqa: E731
    return SimpleNamespace(language="de", settings=Settings(), lines=lines, pair=pairs)


def test_a_word_that_occurs_twice_keeps_its_first_link():
    pair = af.Pair("de", ["bank", "a", "bank"], ["Bank", "ein", "Ufer"], [(0, 0), (1, 1), (2, 2)])
    assert [pair.links for pair in af.probe_pairs(stub_text(pair))] == [[(0, 0), (1, 1)]]


def test_the_probe_takes_the_first_hundred_pairs_of_a_text():
    text = stub_text(None)
    text.lines = lambda: ((f"word{k}", f"wort{k}") for k in range(150))
    text.pair = lambda number, line: af.Pair("de", [line[0]], [line[1]], [(0, 0)])
    pairs = af.probe_pairs(text)
    assert [pair.source for pair in pairs] == [[f"word{k}"] for k in range(100)]


def test_a_text_without_a_link_is_an_error():
    with pytest.raises(af.UserError, match="--probe, de: no line has a link"):
        af.probe_pairs(stub_text(af.Pair("de", ["bank"], ["Bank"], [])))


@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_the_probe_reads_a_file_of_its_own(world, unit):
    settings = Settings(data_dir=world / "data", unit=unit, probe=True)
    settings.realign_languages = ["qaa", "qab"]
    _, probe_sets = af.load_pairs(settings)
    assert list(probe_sets) == ["qaa", "qab"]
    for code, pairs in probe_sets.items():
        path = world / "data/parallel" / f"en-{code}.dev.tsv"
        lines = [tuple(line.split("\t")) for line in path.read_text("utf-8").splitlines()]
        if unit == "word":
            lines = [(af.split_words(a, "en"), af.split_words(b, code)) for a, b in lines]
        assert 10 < len(pairs) <= af.PROBE_PAIRS
        assert all((pair.source, pair.target) in lines for pair in pairs)
        assert {pair.language for pair in pairs} == {code}


# ---- In a run


@pytest.mark.parametrize("flags", [(), ("--schedule", "during"), ("--unit", "sentence")])
def test_a_probe_changes_no_result_of_a_run(run, flags):
    plain, probed = run(*flags), run(*flags, "--probe")
    for key in ("scores", "pairs", "steps", "losses"):
        assert plain[key] == probed[key]
    assert "probe" not in plain
    stages = ["before", "finetuned"] if "during" in flags else ["before", "realigned", "finetuned"]
    kinds = ["retrieval", "margin"] if "sentence" in flags else ["retrieval"]
    assert list(probed["probe"]) == kinds
    for by_stage in probed["probe"].values():
        assert list(by_stage) == stages
        for shares in by_stage.values():
            assert list(shares) == ["qaa", "qab"]
            assert all(len(layers) == 5 for layers in shares.values())


def test_a_baseline_is_probed_on_the_same_pairs(run):
    baseline, front = run("--strategy", "baseline", "--probe"), run("--probe")
    assert baseline["probe"]["retrieval"]["before"] == front["probe"]["retrieval"]["before"]
    assert list(baseline["probe"]["retrieval"]) == ["before", "finetuned"]
    assert baseline["pairs"] == {}
    assert baseline["scores"] == run("--strategy", "baseline")["scores"]


def test_a_realignment_changes_no_retrieval_in_frozen_layers(run):
    flags = "--strategy emb,front --realign-steps 10 --realign-lr 1e-2 --lr 1e-2 --epochs 8 --probe"
    flags = flags.split()
    probe = run(*flags)["probe"]["retrieval"]
    for code in ("qaa", "qab"):
        before, realigned = probe["before"][code], probe["realigned"][code]
        assert before[:3] == realigned[:3]  # of the embeddings, and of layers 0 and 1
        assert before[3] != realigned[3]
        assert before[:3] != probe["finetuned"][code][:3]  # all layers train afterwards
