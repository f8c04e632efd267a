"""The probe measures each layer: what it knows of translations, how far it moved, without a trace in the scores."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch

import alignfreeze as af
from alignfreeze import Alignment, Training

FLAGS = (
    "--languages qaa --realign-languages qaa qab --limit-train 64 --limit-test 10 --epochs 1 --lr 1e-3"
)
FLAGS += " --realign-lr 1e-3 --device cpu"
LAYERS = ["emb", "0", "1", "2", "3"]


@pytest.fixture(scope="module")
def data(world, tmp_path_factory) -> Path:
    """The toy world's data; where there is no text for the probe, the last lines of the text are."""
    folder = tmp_path_factory.mktemp("probe") / "data"
    shutil.copytree(world / "data", folder)
    for code in ("qaa", "qab"):
        path = folder / f"parallel/en-{code}.tsv"
        if path.with_suffix(".dev.tsv").exists():
            continue
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:-150]), "utf-8")
        path.with_suffix(".dev.tsv").write_text("".join(lines[-150:]), "utf-8")
    return folder


@pytest.fixture(scope="module")
def run(world, data, tmp_path_factory):
    """Makes the record of a short toy run, once for each choice of flags."""
    made = {}

    def record(*more: str) -> dict:
        if more not in made:
            argv = [
                "--model",
                str(world / "models/xlmr"),
                "--data-dir",
                str(data),
                *FLAGS.split(),
                *more,
            ]
            out = tmp_path_factory.mktemp("out")
            assert af.main([*argv, "--out", str(out)]) == 0
            (path,) = out.glob("*.json")
            made[more] = json.loads(path.read_text("utf-8"))
        return made[more]

    return record


# ---- retrieval


def slow_share(ours: list, theirs: list, margin: bool) -> float:
    """Vector by vector: is the most similar one of the other side the one that it is linked to?"""
    cosine = [[torch.cosine_similarity(a, b, dim=0).item() for b in theirs] for a in ours]
    similar = cosine
    if margin:
        near = lambda row: sum(sorted(row)[-4:]) / min(4, len(row))  # noqa: E731
        rows, columns = [near(row) for row in cosine], [near(column) for column in zip(*cosine)]
        similar = [
            [x / ((rows[i] + columns[j]) / 2) for j, x in enumerate(row)] for i, row in enumerate(cosine)
        ]
    hits = sum(row.index(max(row)) == k for k, row in enumerate(similar))
    hits += sum(column.index(max(column)) == k for k, column in enumerate(zip(*similar)))
    return hits / 2 / len(ours)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("unit, pool_first", [("word", True), ("sentence", True), ("sentence", False)])
def test_retrieval_is_the_share_of_nearest_neighbours_that_are_linked(architecture, unit, pool_first):
    model = tiny.build(architecture, spread=0.2).eval()
    tokenizer = tiny.make_tokenizer("<s> $A")
    pairs = tiny.word_pairs()[:2] if unit == "word" else tiny.text_pairs(20)
    sides = ([], [])
    for pair in pairs:
        for vectors, words in zip(sides, (pair.source, pair.target)):
            words = words if unit == "word" else words.split()
            ids = torch.tensor([[0, *map(tiny.VOCABULARY.index, words)]])
            with torch.inference_mode():
                states = model.base_model(ids, output_hidden_states=True).hidden_states
            if unit == "sentence":
                vectors.append([state[0, 1 - pool_first :].mean(0) for state in states])
            else:
                side = 0 if vectors is sides[0] else 1
                vectors += [[state[0, 1 + link[side]] for state in states] for link in pair.links]
    found = af.retrieval(model, tokenizer, pairs, Alignment(unit=unit, pool_first=pool_first))
    assert list(found) == ["retrieval", "margin"][: 1 + (unit == "sentence")]
    for kind, shares in found.items():
        expected = []
        for layer in range(tiny.LAYERS + 1):
            ours, theirs = ([vectors[layer] for vectors in side] for side in sides)
            expected.append(slow_share(ours, theirs, kind == "margin"))
        assert shares == pytest.approx(expected, abs=1e-6)
    assert len(set(found["retrieval"])) > 1  # layers differ


def test_a_sentence_and_itself_are_retrieved_perfectly():
    for unit in ("word", "sentence"):
        pairs = []
        for pair in tiny.text_pairs(2):
            words = list(dict.fromkeys(pair.source.split()))
            links = [(k, k) for k in range(len(words))]
            one = words if unit == "word" else pair.source
            pairs.append(pair._replace(source=one, target=one, links=links))
        model = tiny.build("bert", spread=0.2)
        pairs = pairs[:1] if unit == "word" else pairs
        found = af.retrieval(model, tiny.make_tokenizer(), pairs, Alignment(unit=unit))
        assert all(shares == [1.0] * (tiny.LAYERS + 1) for shares in found.values())


def test_words_of_a_bf16_model_are_compared_in_fp32():
    """In bf16 cosines near 1 are equal, and of equals the first would be the nearest."""
    model, words = tiny.build("llama", torch.bfloat16), tiny.WORDS[:8]
    with torch.no_grad():  # all words almost alike
        model.get_input_embeddings().weight.copy_(
            1 + 0.03 * torch.randn(len(tiny.VOCABULARY), tiny.HIDDEN)
        )
    pair = af.Pair("en", words, words, [(k, k) for k in range(8)])
    assert af.retrieval(model, tiny.make_tokenizer(), [pair], Alignment())["retrieval"][0] == 1.0


def test_words_that_are_all_cut_off_are_an_error():
    pair = af.Pair("de", ["the"] * 30 + ["cat"], ["le"] * 30 + ["chat"], [(30, 30)])
    with pytest.raises(af.UserError, match="--probe: no linked word of de within 8 subwords"):
        af.retrieval(tiny.build("bert"), tiny.make_tokenizer(), [pair], Alignment(max_length=8))


# ---- what is probed, and drift


def test_each_probed_word_has_one_link_and_a_pair_without_one_is_left_out(data):
    for aligner in ("dictionary", "fastalign"):
        pairs = af.probe_pairs("qaa", *af.linker("qaa", aligner, data, part="dev"))
        assert 10 < len(pairs) <= af.PROBE_PAIRS and all(pair.links for pair in pairs)
        for side in (0, 1):
            linked = [pair[1 + side][link[side]] for pair in pairs for link in pair.links]
            assert len(linked) > 30 and len(set(linked)) == len(linked)


def test_a_word_twice_in_a_sentence_is_probed_once_and_no_link_at_all_is_an_error():
    pair = af.Pair("de", ["bank", "a", "bank"], ["Bank", "ein", "Ufer"], [(0, 0), (1, 1), (2, 2)])
    chosen = af.probe_pairs("de", lambda lines: [pair, pair], lambda: iter([]))
    assert [pair.links for pair in chosen] == [[(0, 0), (1, 1)]]
    with pytest.raises(af.UserError, match="--probe: no line of the de text"):
        af.probe_pairs("de", lambda lines: [pair._replace(links=[])], lambda: iter([]))


def test_drift_is_the_norm_of_the_change_relative_to_that_of_the_weights():
    model, tokenizer, seconds = tiny.build("bert"), tiny.make_tokenizer(), {}
    pairs = {"de": tiny.word_pairs()[:2], "fr": tiny.word_pairs()[2:3]}
    measure, found = af.probing(model, tokenizer, pairs, Alignment(), seconds)
    assert list(found) == ["retrieval"]  # nothing has moved before
    measure("same")
    assert found["drift"]["same"] == dict.fromkeys(LAYERS, 0.0)
    with torch.no_grad():
        for parameter in af.transformer_layers(model.base_model)[1].parameters():
            parameter.mul_(1.25)
        for parameter in af.embeddings(model.base_model).parameters():
            parameter.neg_()
    measure("changed")
    expected = dict.fromkeys(LAYERS, 0.0) | {"emb": pytest.approx(2.0), "1": pytest.approx(0.25)}
    assert found["drift"]["changed"] == expected
    assert list(found["retrieval"]) == ["before", "same", "changed"]
    assert list(found["retrieval"]["same"]) == ["de", "fr"]
    assert found["retrieval"]["same"] == found["retrieval"]["before"]
    assert list(seconds) == ["probe"]


def test_drift_of_weights_that_are_all_zero_is_a_number():
    model = tiny.build("bert")
    for parameter in af.transformer_layers(model.base_model)[1].parameters():
        parameter.data.zero_()
    measure, found = af.probing(
        model, tiny.make_tokenizer(), {"de": tiny.word_pairs()[:2]}, Alignment(), {}
    )
    measure("same")
    assert found["drift"]["same"]["1"] == 0.0


def test_adapters_that_train_are_drift_too():
    model, tokenizer = tiny.build("llama"), tiny.make_tokenizer()
    af.add_lora(model, 2, 4.0, 0.0)
    how = Alignment("1", "sentence", 3, batch_size=4)
    measure, found = af.probing(model, tokenizer, {"de": tiny.text_pairs()}, how, {})
    af.realign(model, tokenizer, tiny.text_pairs(), 3, how, Training(lr=1e-2))
    measure("realigned")
    drift = found["drift"]["realigned"]
    assert {name for name, moved in drift.items() if moved} == {"0", "2"}
    assert list(found) == ["retrieval", "margin", "drift"]
    assert all(math.isfinite(moved) for moved in drift.values())


# ---- in a run


@pytest.mark.parametrize("more", [(), ("--schedule", "during"), ("--unit", "sentence")])
def test_a_probe_changes_no_score(run, more):
    plain, probed = run(*more), run(*more, "--probe")
    for key in ("scores", "pairs", "steps", "losses"):
        assert plain[key] == probed[key]
    assert "probe" not in plain and "probe" not in plain["seconds"] and "probe" in probed["seconds"]
    stages = ["before", "finetuned"] if "during" in more else ["before", "realigned", "finetuned"]
    kinds = ["retrieval", "margin", "drift"] if "sentence" in more else ["retrieval", "drift"]
    assert list(probed["probe"]) == kinds
    for kind, by_stage in probed["probe"].items():
        assert list(by_stage) == stages[kind == "drift" :]
        for found in by_stage.values():
            assert list(found) == (LAYERS if kind == "drift" else ["qaa", "qab"])
            assert kind == "drift" or all(len(shares) == len(LAYERS) for shares in found.values())


@pytest.mark.parametrize("strategy, still", [("full", ""), ("front", "0 1"), ("emb,back", "emb 2 3")])
def test_frozen_layers_have_drift_zero_after_realignment_and_all_layers_move_in_fine_tuning(
    run, strategy, still
):
    found = run("--strategy", strategy, "--layer", "-1", "--probe")["probe"]["drift"]
    assert {layer for layer, moved in found["realigned"].items() if moved == 0} == set(still.split())
    assert all(found["finetuned"].values())


def test_a_baseline_is_probed_on_the_same_pairs(run):
    baseline, front = run("--strategy", "baseline", "--probe"), run("--probe")
    assert baseline["probe"]["retrieval"]["before"] == front["probe"]["retrieval"]["before"]
    assert list(baseline["probe"]["retrieval"]) == ["before", "finetuned"]
    assert baseline["pairs"] == {}
    assert baseline["scores"] == run("--strategy", "baseline")["scores"]


@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_what_is_probed_comes_from_a_file_of_its_own(data, unit):
    flags = ["--data-dir", str(data), "--realign-languages", "qaa", "qab", "--unit", unit, "--probe"]
    args = af.parse_args(flags)
    af.settle(args)
    _, probed = af.load_pairs(args, None)
    assert list(probed) == ["qaa", "qab"]
    for code, pairs in probed.items():
        own = list(af.parallel_text(code, data, "dev"))
        if unit == "word":
            own = [
                (af.split_words(english, "en"), af.split_words(other, code)) for english, other in own
            ]
        assert 10 < len(pairs) <= af.PROBE_PAIRS and {pair.language for pair in pairs} == {code}
        assert all((pair.source, pair.target) in own for pair in pairs)
