"""The probe measures each layer: on word pairs that were never realigned on, and without a trace in the scores."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

import alignfreeze as af

FLAGS = "--languages qaa --realign-languages qaa qab --limit-train 64 --limit-test 10 --epochs 1 --lr 1e-3 --device cpu"


def run(world: Path, out: Path, *more: str) -> dict:
    """The record of a short toy run."""
    argv = ["--model", str(world / "models/xlmr"), "--data-dir", str(world / "data"), *FLAGS.split(), *more]
    assert af.main([*argv, "--realign-lr", "1e-3", "--out", str(out), "--overwrite"]) == 0
    (path,) = out.glob("*.json")
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def model(world):
    return AutoModelForTokenClassification.from_pretrained(world / "models/xlmr", num_labels=18)


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "models/xlmr", add_prefix_space=True)


def streams(world: Path) -> dict:
    return {lang: af.linked_pairs(lang, "dictionary", world / "data", 31) for lang in ("qaa", "qab")}


def words(pair: af.Pair) -> tuple:
    return tuple(pair.source), tuple(pair.target)


# ------------------------------------------------------------------------------------------ held-out pairs


def test_realignment_gets_the_same_pairs_as_without_a_probe_and_the_probe_gets_none_of_them(world):
    first, rest = af.hold_out(streams(world), 50)
    for lang, stream in streams(world).items():
        same = list(itertools.islice(stream, 50))
        assert list(first[lang]) == same
        assert rest[lang] and not {words(pair) for pair in rest[lang]} & {words(pair) for pair in same}


def test_each_held_out_word_has_one_link(world):
    _, rest = af.hold_out(streams(world), 50)
    for pairs in rest.values():
        for side in (0, 1):
            linked = [pair[1 + side][link[side]] for pair in pairs for link in pair.links]
            assert len(linked) > 50 and len(set(linked)) == len(linked)


def test_a_word_twice_in_a_sentence_is_held_out_once():
    pair = af.Pair("de", ["bank", "a", "bank"], ["Bank", "ein", "Ufer"], [(0, 0), (1, 1), (2, 2)])
    _, rest = af.hold_out({"de": iter([pair])}, 0)
    assert rest["de"][0].links == [(0, 0), (1, 1)]


def test_words_that_are_all_cut_off_are_an_error(model, tokenizer):
    pair = af.Pair("de", ["a"] * 30 + ["end"], ["b"] * 30 + ["Ende"], [(30, 30)])
    with pytest.raises(af.UserError, match="--probe: no linked word of de lies within 8 subwords"):
        af.retrieval(model, tokenizer, [pair], 8)


def test_repeated_sentences_and_further_readings_are_not_held_out():
    pairs = [af.Pair("de", ["word", str(k)], ["Wort", str(k)], [(0, 0)]) for k in range(8)]
    again = [pair._replace(reading=2) for pair in pairs]
    _, rest = af.hold_out({"de": iter([*pairs[:5], *pairs[:5], *pairs[5:], *again])}, 5)
    assert [pair.source[1] for pair in rest["de"]] == ["5"]  # `word` is linked once; 0 to 4 were seen
    with pytest.raises(af.UserError, match="--probe: realignment reads all linked pairs of en-de"):
        af.hold_out({"de": iter([*pairs, *again])}, 8)


# ---------------------------------------------------------------------------------------------- retrieval, drift


def slow_retrieval(model, tokenizer, pairs: list[af.Pair], layer: int) -> float:
    """Sentence by sentence and word by word: is the nearest word of the other side the one that it is linked to?"""
    vectors = ([], [])
    for pair in pairs:
        for side, sentence in enumerate((pair.source, pair.target)):
            (window,) = af.encode_words(tokenizer, [sentence], 96)
            with torch.inference_mode():
                output = model.base_model(torch.tensor(window.ids)[None], output_hidden_states=True)
            for link in pair.links:
                place = next(k for k, word in enumerate(window.words) if window.first[k] and word == link[side])
                vectors[side].append(output.hidden_states[layer][0, place].double())
    hits = 0
    for ours, theirs in (vectors, vectors[::-1]):
        for k, vector in enumerate(ours):
            near = [torch.cosine_similarity(vector, other, dim=0).item() for other in theirs]
            hits += near.index(max(near)) == k
    return hits / 2 / len(vectors[0])


def test_retrieval_is_the_share_of_nearest_neighbours_that_are_linked(world, model, tokenizer):
    pairs = list(itertools.islice(streams(world)["qab"], 40))
    _, rest = af.hold_out({"qab": iter(pairs)}, 30)
    found = af.retrieval(model, tokenizer, rest["qab"])
    assert len(found) == model.config.num_hidden_layers + 1
    assert found == [
        pytest.approx(slow_retrieval(model.eval(), tokenizer, rest["qab"], k), abs=1e-6) for k in range(len(found))
    ]


def test_a_sentence_and_itself_are_retrieved_perfectly(model, tokenizer):
    sentence = "one two three four five six".split()
    pair = af.Pair("en", sentence, sentence, [(k, k) for k in range(6)])
    assert af.retrieval(model, tokenizer, [pair])[1:] == [1.0] * model.config.num_hidden_layers


def test_drift_is_the_norm_of_the_change_relative_to_that_of_the_weights(world):
    model = AutoModelForTokenClassification.from_pretrained(world / "models/bert", num_labels=2)
    before = af.layer_weights(model)
    assert set(af.drift(before, model).values()) == {0.0}
    with torch.no_grad():
        for parameter in af.transformer_layers(model.base_model)[1].parameters():
            parameter.mul_(1.25)
        for parameter in af.embeddings(model.base_model).parameters():
            parameter.neg_()
    found = af.drift(before, model)
    others = {name: 0.0 for name in found if name not in ("emb", "1")}
    assert found == {"emb": pytest.approx(2.0), "1": pytest.approx(0.25), **others}


# -------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("schedule", ["before", "during"])
def test_a_probe_changes_no_score(world, tmp_path, schedule):
    plain = run(world, tmp_path / "plain", "--schedule", schedule)
    probed = run(world, tmp_path / "probed", "--schedule", schedule, "--probe")
    assert {key: plain[key] for key in ("scores", "pairs", "steps")} == {
        key: probed[key] for key in ("scores", "pairs", "steps")
    }
    assert "probe" not in plain and "probe" not in plain["seconds"]
    stages = ["before", "realigned", "finetuned"] if schedule == "before" else ["before", "finetuned"]
    layers = ["emb", "0", "1", "2", "3"]
    for name, by_stage in probed["probe"].items():
        assert list(by_stage) == stages[name == "drift" :]  # nothing has moved before
        for found in by_stage.values():
            assert list(found) == (["qaa", "qab"] if name == "retrieval" else layers)
    assert all(len(shares) == len(layers) for shares in probed["probe"]["retrieval"]["before"].values())


FROZEN = {"full": "", "front": "0 1", "back": "2 3", "emb,1": "emb 1"}


@pytest.mark.parametrize("strategy", FROZEN)
def test_frozen_layers_have_drift_zero_after_realignment_and_all_layers_move_in_fine_tuning(world, tmp_path, strategy):
    found = run(world, tmp_path, "--strategy", strategy, "--layer", "-1", "--probe")["probe"]["drift"]
    assert {layer for layer, moved in found["realigned"].items() if moved == 0} == set(FROZEN[strategy].split())
    assert all(found["finetuned"].values())


def test_a_baseline_is_probed_on_the_same_word_pairs(world, tmp_path):
    baseline = run(world, tmp_path / "baseline", "--strategy", "baseline", "--probe")
    front = run(world, tmp_path / "front", "--probe")
    assert baseline["probe"]["retrieval"]["before"] == front["probe"]["retrieval"]["before"]
    assert list(baseline["probe"]["retrieval"]) == ["before", "finetuned"]
    assert baseline["aligner"] == "none" and baseline["pairs"] == {}
    assert baseline["scores"] == run(world, tmp_path / "plain", "--strategy", "baseline")["scores"]


def test_a_text_that_realignment_uses_up_ends_the_run_before_training(world, tmp_path, capsys):
    argv = ["--model", str(world / "models/xlmr"), "--data-dir", str(world / "data"), *FLAGS.split(), "--probe"]
    assert af.main([*argv, "--realign-steps", "900", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert (
        "en-qaa" in err and len(err.splitlines()) == 1 and "realign," not in out and not list(tmp_path.glob("*.json"))
    )
