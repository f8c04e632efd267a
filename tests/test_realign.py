"""The loss is right, and freezing is right: the two things that AlignFreeze consists of."""

import itertools
import math

import pytest
import tiny
import torch
from torch import nn

import alignfreeze as af
from alignfreeze import Alignment, Training, contrastive_loss, encode_pairs, finetune, freeze, realign

ARCHITECTURES = list(tiny.ENCODERS)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


# ---- the loss


def loss_by_loops(vectors, queries, targets, temperature, candidates):
    """The formula, vector by vector."""
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in vectors.tolist()]
    total = 0.0
    for q, t in zip(queries.tolist(), targets.tolist()):
        exponents = {}
        for c in range(len(unit)) if candidates is None else candidates.tolist():
            if c != q:
                exponents[c] = sum(x * y for x, y in zip(unit[q], unit[c])) / temperature
        total -= exponents[t] - math.log(sum(map(math.exp, exponents.values())))
    return total / len(queries)


@pytest.mark.parametrize("seed", range(10))
def test_the_loss_equals_a_double_loop_over_vectors(seed):
    rng = torch.Generator().manual_seed(seed)
    n, d = (int(torch.randint(low, high, (), generator=rng)) for low, high in ((3, 60), (2, 20)))
    vectors = torch.randn(n, d, generator=rng, dtype=torch.float64) * 3
    mixed = torch.randperm(n, generator=rng)
    one, other, rest = mixed.tensor_split([n // 3 or 1, 2 * (n // 3 or 1)])
    both = torch.cat([one, other]), torch.cat([other, one])
    for temperature in (0.1, 1.5):
        for queries, targets, candidates in [(*both, None), (one, other, other), (one, other, mixed),
                                             (one, other, torch.cat([other, rest]))]:  # fmt: skip
            expected = loss_by_loops(vectors, queries, targets, temperature, candidates)
            found = contrastive_loss(vectors, queries, targets, temperature, candidates)
            assert abs(found.item() - expected) < 1e-9


@pytest.mark.parametrize("candidates", [None, torch.tensor([3, 5, 6, 2])])
def test_the_gradient_of_the_loss_is_right(candidates):
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(7, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    queries, targets = torch.tensor([0, 1, 4, 5]), torch.tensor([3, 5, 6, 2])
    loss = lambda v: contrastive_loss(v, queries, targets, 0.5, candidates)  # noqa: E731
    assert torch.autograd.gradcheck(loss, vectors)


def test_the_loss_of_two_words_is_zero_and_of_equal_words_the_log_of_their_number():
    two = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    pair = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert contrastive_loss(two, *pair).item() == 0
    assert contrastive_loss(two[:1].repeat(9, 1), *pair).item() == pytest.approx(math.log(8), abs=1e-12)


def test_the_loss_looks_at_directions_not_at_lengths():
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    links = torch.tensor([0, 1]), torch.tensor([3, 4])
    scale = torch.tensor([[1.0], [2], [3], [0.5], [7], [0.1]], dtype=torch.float64)
    longer = contrastive_loss(vectors * scale, *links).item()
    assert longer == pytest.approx(contrastive_loss(vectors, *links).item(), abs=1e-12)


def test_a_batch_whose_links_were_all_cut_off_has_no_loss_and_no_gradient():
    vectors, none = torch.randn(4, 3, requires_grad=True), torch.empty(0, dtype=torch.long)
    loss = contrastive_loss(vectors, none, none)
    loss.backward()
    assert loss.item() == 0 and vectors.grad.abs().sum() == 0


# ---- the layer that is realigned


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_hidden_states_are_those_of_the_whole_model_and_no_layer_above_is_computed(
    architecture, tokenizer
):
    encoder, computed = tiny.build(architecture).base_model.eval(), []
    for k, layer in enumerate(af.transformer_layers(encoder)):
        layer.register_forward_hook(lambda *_, k=k: computed.append(k))
    inputs = tokenizer(["the cat sees a dog", "le chat"], padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = encoder(**inputs, output_hidden_states=True).hidden_states
    assert len(expected) == tiny.LAYERS + 1
    for layer in range(-len(expected), len(expected)):
        computed.clear()
        assert torch.equal(af.hidden_state(encoder, inputs, layer), expected[layer])
        assert computed == list(range(layer % len(expected)))
    for layer in (-len(expected) - 1, len(expected)):
        with pytest.raises(af.UserError, match=f"layer {layer}: hidden states are -5 to 4"):
            af.hidden_state(encoder, inputs, layer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_in_buckets_has_the_loss_and_the_gradient_of_the_whole_batch(architecture, tokenizer):
    model = tiny.build(architecture, torch.float64)
    projection, results = af.projection_head(tiny.HIDDEN).double(), []
    for buckets in (1, 3, 8):
        batch = encode_pairs(tokenizer, tiny.word_pairs(), Alignment(), buckets)
        loss = af.alignment_loss(model.base_model, projection, batch, Alignment())
        results.append((loss.item(), tiny.gradient_of(loss, model)))
    for loss, gradient in results[1:]:
        assert abs(loss - results[0][0]) < 1e-6
        tiny.assert_same(gradient, results[0][1], 1e-5)


@pytest.mark.parametrize("unit, layer, frozen", [("word", -2, "emb,1"), ("sentence", 2, "front")])
def test_the_loss_of_a_batch_is_that_of_its_sentences_one_by_one(unit, layer, frozen):
    """Every sentence alone through the library's model, its words or its mean taken by hand."""
    model, tokenizer = tiny.build("xlm-roberta", torch.float64, 0.3), tiny.make_tokenizer()
    pairs = tiny.word_pairs() if unit == "word" else tiny.text_pairs()
    how = Alignment(frozen, unit, layer, 0.4)
    projection, vectors = af.projection_head(tiny.HIDDEN, unit).double(), {}
    for k, pair in enumerate(pairs):
        for side, words in enumerate((pair.source, pair.target)):
            text = words if unit == "sentence" else " ".join(words)
            inputs = tokenizer([text], return_tensors="pt", return_token_type_ids=False)
            states = model.base_model(**inputs, output_hidden_states=True).hidden_states[layer][0]
            for place, vector in enumerate(states[1:-1] if unit == "word" else [states.mean(0)]):
                vectors[side, k, place] = projection(vector)
    number = {key: n for n, key in enumerate(vectors)}
    linked = []
    for k, pair in enumerate(pairs):
        linked += [(number[0, k, i], number[1, k, j]) for i, j in pair.links or [(0, 0)]]
    source, target = torch.tensor(linked).T
    both = (torch.cat([source, target]), torch.cat([target, source]))
    chosen = (*both, 0.4) if unit == "word" else (target, source, 0.4, source)
    expected = loss_by_loops(torch.stack(list(vectors.values())), *chosen, *[None] * (unit == "word"))
    (batch,) = itertools.islice(af.alignment_batches(tokenizer, pairs, how._replace(batch_size=5)), 1)
    assert abs(af.alignment_loss(model.base_model, projection, batch, how).item() - expected) < 2e-6


# ---- freezing


def part_of(name: str) -> str:
    """`emb`, a layer's number, or `head`: all behind the layers."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    if numbers:
        return numbers[0]
    return "emb" if "embeddings" in name or "embed_tokens" in name else "head"


SPECS = {
    "none": "", "full": "", "front": "0 1", "back": "2 3", "0-2": "0 1 2", "3": "3", "emb,1": "emb 1",
    "emb,front": "emb 0 1", "front,back": "0 1 2 3", "emb,0-1,3": "emb 0 1 3",
}  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_frozen_layer_is_bit_identical_after_realignment_and_every_other_moves(spec, tokenizer):
    for architecture in ARCHITECTURES if spec == "front" else ["bert", "distilbert"]:
        model = tiny.build(architecture)
        before = tiny.weights(model)
        how = Alignment(spec, layer=-1, batch_size=4)
        realign(model, tokenizer, tiny.word_pairs(), 2, how, Training(lr=1e-3))
        still = {*SPECS[spec].split(), "head"}
        expected = {name for name in before if part_of(name) not in still or "final_norm" in name}
        assert tiny.moved(before, model) == expected
        assert all(parameter.requires_grad for parameter in model.parameters())  # all train again

        before = tiny.weights(model)
        finetune(model, tokenizer, tiny.tagged(20), 2, Training(lr=1e-3), batch_size=4)
        assert tiny.moved(before, model) == set(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_realigning_the_layer_before_the_last_leaves_the_last_layer_alone(architecture, tokenizer):
    model = tiny.build(architecture)
    before = tiny.weights(model)
    realign(model, tokenizer, tiny.word_pairs(), 2, Alignment(batch_size=4), Training(lr=1e-3))
    assert {part_of(name) for name in tiny.moved(before, model)} == {"emb", "0", "1", "2"}


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_freeze_returns_the_names_of_what_it_froze(architecture):
    model = tiny.build(architecture)
    names = freeze(model, "back")
    assert set(names) == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {part_of(name) for name in names} == {"2", "3"}
    assert freeze(model, "back") == []  # nothing more to turn off
    assert {part_of(name) for name in freeze(model, "emb,front")} == {"emb", "0", "1"}


def test_what_was_frozen_before_stays_frozen_afterwards_and_an_error_leaves_no_layer_frozen(tokenizer):
    model = tiny.build("bert")
    freeze(model, "0")
    with pytest.raises(ZeroDivisionError), af.frozen(model, "front") as names:
        assert {part_of(name) for name in names} == {"1"}
        raise ZeroDivisionError
    found = {part_of(name) for name, p in model.named_parameters() if not p.requires_grad}
    assert found == {"0"}
    model = tiny.build("bert")
    with pytest.raises(af.UserError, match="the batches end after 1 of 3 steps"):
        realign(model, tokenizer, iter(tiny.word_pairs()), 3, Alignment("front", batch_size=4))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("spec", ["4", "0-4", "3-1", "x", "-1", "0,,x", "emb0", "front 1", ""])
def test_a_spec_that_names_no_layer_is_a_users_error(spec):
    with pytest.raises(af.UserError, match="cannot freeze"):
        freeze(tiny.build("bert"), spec)


def test_one_layer_has_no_halves_but_is_a_layer():
    for spec in ("front", "back", "emb,front"):
        with pytest.raises(af.UserError, match=r"cannot freeze '(front|back)': 1 layer has no halves"):
            af.frozen_layers(spec, 1)
    assert af.frozen_layers("emb,0", 1) == [0]
    assert [af.frozen_layers(spec, 5) for spec in ("front", "back")] == [[0, 1], [2, 3, 4]]


def test_an_encoder_without_a_list_of_layers_is_a_users_error():
    model = nn.Linear(2, 2)
    model.config = tiny.CONFIGS["bert"]
    with pytest.raises(af.UserError, match="no list of 4 layers"):
        af.transformer_layers(model)


# ---- training


def test_realignment_brings_translations_together(tokenizer):
    links = [(i, 7 - i) for i in range(8)]  # the other way round, so that places are no help
    model, pair = tiny.build("bert"), af.Pair("fr", tiny.WORDS[:8], tiny.WORDS[:7:-1], links)

    def found() -> float:
        return af.retrieval(model, tokenizer, [pair], Alignment())["retrieval"][-2]

    before = found()
    how, training = Alignment(batch_size=4), Training(lr=2e-3)
    losses, seen = realign(model, tokenizer, itertools.repeat(pair), 60, how, training)
    assert before < 0.5 and found() == 1
    assert len(losses["realign"]) == 3 and losses["realign"][-1] < losses["realign"][0]  # means of 20
    assert seen["fr"] == {"sentences": 240, "words": 1920, "cut": 0, "skipped": 0, "readings": 1}


def test_the_same_seed_trains_the_same_way_and_another_seed_differently(tokenizer):
    results = []
    for seed in (31, 31, 42):
        model = tiny.build("xlm-roberta", hidden_dropout_prob=0.1)
        training = Training(lr=1e-3, seed=seed)
        how = Alignment(batch_size=4)
        curve, seen = realign(model, tokenizer, tiny.word_pairs(), 3, how, training)
        options = {"schedule": "during", "pairs": tiny.word_pairs(), "how": how, "batch_size": 4}
        later, _ = finetune(model, tokenizer, tiny.tagged(9), 1, training, **options)
        results.append((curve | later, seen, tiny.weights(model)))
    first, again, other = results
    assert first[:2] == again[:2] and first[0] != other[0]
    assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])


@pytest.mark.parametrize("spec", ["none", "front", "back", "emb,1"])
@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_during_fine_tuning_frozen_layers_get_the_gradient_of_the_task_alone(spec, unit, tokenizer):
    """The task's gradient, plus 0.1 x the alignment's outside of the frozen layers; of every update."""
    dtype, tolerance = (torch.float32, 1e-5) if unit == "word" else (torch.float64, 1e-6)
    model, features = tiny.build("bert", dtype), tiny.tagged(9)
    pairs = tiny.word_pairs() if unit == "word" else tiny.text_pairs()
    how, training = Alignment(spec, unit, batch_size=4), Training(lr=0.0)
    torch.manual_seed(7)
    projection = af.projection_head(tiny.HIDDEN, unit)
    expected = []
    task = af.task_batches(tokenizer, features, 2, 4, training.seed, "cpu")
    for examples, sentences in zip(task, af.alignment_batches(tokenizer, pairs, how)):
        gradient = tiny.gradient_of(af.task_loss(model, examples), model)
        aligned = af.alignment_loss(model.base_model, projection, sentences, how)
        for name, part in tiny.gradient_of(aligned, model).items():
            if part_of(name) not in SPECS[spec].split():
                gradient[name] += 0.1 * part
        expected.append(gradient)
    torch.manual_seed(7)
    options = {"batch_size": 4, "schedule": "during", "pairs": pairs, "how": how}
    with tiny.updates(model) as found:
        losses, _ = finetune(model, tokenizer, features, 2, training, **options)
    assert len(found) == len(expected) == 6 and list(losses) == ["finetune"]
    for one, other in zip(found, expected):
        tiny.assert_same(one, other, tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_task_loss_in_buckets_is_the_librarys_loss_of_the_whole_batch(architecture):
    model, batch = tiny.build(architecture, torch.float64), tiny.tagged(10)
    whole = af.task_batch(batch, 1)
    loss = model(**whole.inputs[0], labels=whole.labels[0]).loss
    expected = loss.item(), tiny.gradient_of(loss, model)
    for buckets in (1, 3, 10):
        loss = af.task_loss(model, af.task_batch(batch, 1, buckets))
        assert loss.item() == pytest.approx(expected[0], abs=1e-6)
        tiny.assert_same(tiny.gradient_of(loss, model), expected[1], 1e-5)


def rates_of(monkeypatch, **training) -> list[float]:
    """The learning rate at each of the 50 updates of a fine-tuning."""
    rates, step = [], torch.optim.Adam.step

    def watched(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    model, tokenizer = tiny.build("distilbert"), tiny.make_tokenizer()
    finetune(model, tokenizer, tiny.tagged(20), 5, Training(lr=1e-3, **training), batch_size=2)
    return [rate / 1e-3 for rate in rates]


def test_the_learning_rate_warms_up_and_falls(monkeypatch):
    linear = rates_of(monkeypatch, decay="linear")
    assert linear == pytest.approx([min(k / 5, (50 - k) / 45) for k in range(50)])
    root = rates_of(monkeypatch, decay="inverse_sqrt", warmup=0.03)  # 1.5 updates, so 2
    assert root == pytest.approx([min(k / 2, math.sqrt(2 / max(k, 1))) for k in range(50)])
    constant = rates_of(monkeypatch, decay="constant")
    assert constant == pytest.approx([1.0] * 50)


def test_the_learning_rate_of_the_authors_default_flags_stays_or_never_arrives(monkeypatch):
    stays = rates_of(monkeypatch, decay="constant_with_warmup", warmup=0.8)
    assert stays == pytest.approx([min(k / 40, 1.0) for k in range(50)])
    rises = rates_of(monkeypatch, decay="constant_with_warmup", warmup=1.6)
    assert rises == pytest.approx([k / 80 for k in range(50)])


def test_the_gradient_is_clipped_at_its_norm(tokenizer):
    model, found = tiny.build("bert"), []
    with tiny.updates(model) as taken:
        finetune(model, tokenizer, tiny.tagged(4), 1, Training(clip=0.01), batch_size=4)
    found = torch.cat([gradient.flatten() for gradient in taken[0].values()])
    assert found.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_training_that_is_asked_to_stop_stops(tokenizer):
    model, asked = tiny.build("bert"), []
    stop = lambda step: asked.append(step) or step == 3  # noqa: E731
    losses, _ = finetune(model, tokenizer, tiny.tagged(40), 1, Training(), batch_size=4, stop=stop)
    assert asked == [1, 2, 3] and len(losses["finetune"]) == 1


def test_a_list_of_pairs_is_gone_through_again_and_a_stream_must_be_long_enough(tokenizer):
    pairs, how = tiny.word_pairs(), Alignment(batch_size=4)
    _, seen = realign(tiny.build("bert"), tokenizer, pairs, 5, how)
    assert {code: counts["sentences"] for code, counts in seen.items()} == {"fr": 12, "de": 8}
    realign(tiny.build("bert"), tokenizer, iter(pairs * 4), 5, how)
    for few in (iter(pairs * 4), []):
        with pytest.raises(
            af.UserError, match=r"the batches end after [50] of 6 steps; give more pairs"
        ):
            realign(tiny.build("bert"), tokenizer, few, 6, how)
    options = {"schedule": "during", "pairs": iter(pairs), "how": how, "batch_size": 4}
    with pytest.raises(af.UserError, match="the batches end after 1 of 10 steps"):
        finetune(tiny.build("bert"), tokenizer, tiny.tagged(40), 1, Training(), **options)


def test_an_error_in_the_pairs_reaches_the_caller(tokenizer):
    def broken():
        yield from tiny.word_pairs()
        raise af.UserError("line 6 is broken")

    with pytest.raises(af.UserError, match="line 6 is broken"):
        realign(tiny.build("bert"), tokenizer, broken(), 6, Alignment(batch_size=4))


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer):
    model = tiny.build("bert")
    nn.init.constant_(model.base_model.get_input_embeddings().weight, math.nan)
    with pytest.raises(af.UserError, match="loss is nan"):
        realign(model, tokenizer, tiny.word_pairs(), 20, Alignment(batch_size=4))
    with pytest.raises(af.UserError, match="loss is nan"):
        finetune(model, tokenizer, tiny.tagged(4), 1, Training(), batch_size=4)
