"""The contrastive loss, the hidden states it compares, the layers it freezes, and the training.

These are AlignFreeze. The loss is compared with a double loop over vectors; hidden states, logits,
losses and gradients with those of the library, for every architecture.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import mean

import pytest
import tiny
import torch
from torch import nn

import alignfreeze as af
from alignfreeze import Settings, contrastive_loss, finetune, freeze, realign

ARCHITECTURES = list(tiny.ENCODERS)
SETTINGS = Settings(realign_batch_size=4, batch_size=4, epochs=1, realign_lr=1e-3, lr=1e-3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


# ---- the loss


def loss_by_loops(vectors, queries, targets, temperature, candidates):
    """Compute the formula vector by vector."""
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
        cases = [(*both, None), (one, other, other), (one, other, mixed)]
        cases.append((one, other, torch.cat([other, rest])))
        for queries, targets, candidates in cases:
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


def test_the_loss_of_two_words_is_zero_and_of_equal_words_the_log_of_the_number_of_candidates():
    two = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    pair = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert contrastive_loss(two, *pair).item() == 0
    nine = two[:1].repeat(9, 1)
    assert contrastive_loss(nine, *pair).item() == pytest.approx(math.log(8), abs=1e-12)


def test_the_loss_depends_on_directions_and_not_on_lengths():
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    links = torch.tensor([0, 1]), torch.tensor([3, 4])
    scale = torch.tensor([[1.0], [2], [3], [0.5], [7], [0.1]], dtype=torch.float64)
    longer = contrastive_loss(vectors * scale, *links).item()
    assert longer == pytest.approx(contrastive_loss(vectors, *links).item(), abs=1e-12)


def test_without_a_link_the_loss_and_its_gradient_are_zero():
    vectors, none = torch.randn(4, 3, requires_grad=True), torch.empty(0, dtype=torch.long)
    loss = contrastive_loss(vectors, none, none)
    loss.backward()
    assert loss.item() == 0 and vectors.grad.abs().sum() == 0


# ---- hidden states, logits and losses, in groups of similar length


@pytest.mark.parametrize("architecture", tiny.ALL_CONFIGS)
def test_hidden_states_are_those_of_the_library_and_no_layer_above_is_computed(
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
        assert torch.equal(af.run_to_layer(encoder, inputs, layer), expected[layer])
        assert computed == list(range(layer % len(expected)))
    for layer in (-len(expected) - 1, len(expected)):
        with pytest.raises(af.UserError, match=f"layer {layer}: .* -5 to 4"):
            af.run_to_layer(encoder, inputs, layer)


def ungrouped(model: nn.Module, batch: dict) -> Iterator[tuple]:
    """Stand in for `by_length`: all rows are one group."""
    yield torch.arange(len(batch["input_ids"])), dict(batch)


def pair_batch(tokenizer, unit: str) -> af.PairBatch:
    """Return a batch of five sentence pairs of uneven length."""
    pairs = tiny.word_pairs() if unit == "word" else tiny.text_pairs()
    return next(af.pair_batches(tokenizer, pairs, Settings(unit=unit, realign_batch_size=5)))


@pytest.mark.parametrize("architecture", tiny.ALL_CONFIGS)
def test_hidden_states_in_groups_are_those_of_the_whole_batch(architecture, tokenizer, monkeypatch):
    encoder = tiny.build(architecture, torch.float64, 0.2).base_model
    inputs = pair_batch(tokenizer, "word").inputs
    is_text = inputs["attention_mask"] == 1
    assert len(list(af.by_length(encoder, inputs))) > 1 and not is_text.all()
    expected = encoder(**inputs, output_hidden_states=True).hidden_states
    for grouping in (af.by_length, ungrouped):
        monkeypatch.setattr(af, "by_length", grouping)
        for layer in range(-len(expected), len(expected)):
            hidden = af.hidden_state(encoder, inputs, layer)
            assert hidden.shape == expected[layer].shape
            difference = (hidden - expected[layer])[is_text].abs().max()
            assert difference <= 1e-5 * expected[layer].abs().max()


def slow_alignment_loss(encoder, projection, batch: af.PairBatch, settings: Settings):
    """Return the loss of the whole batch in one pass of the library, query by query."""
    hidden = encoder(**batch.inputs, output_hidden_states=True).hidden_states[settings.layer]
    if batch.positions is None:
        lengths = batch.inputs["attention_mask"].sum(1)
        vectors = [row[:length].mean(0) for row, length in zip(hidden, lengths)]
    else:
        vectors = hidden.flatten(0, 1)[batch.positions]
    vectors = [projection(vector) for vector in vectors]
    losses = []
    for q, t in zip(batch.queries.tolist(), batch.targets.tolist()):
        candidates = range(len(vectors)) if batch.candidates is None else batch.candidates.tolist()
        similarity = {c: torch.cosine_similarity(vectors[q], vectors[c], 0) for c in candidates}
        terms = [(value / settings.temperature).exp() for c, value in similarity.items() if c != q]
        losses.append(sum(terms).log() - similarity[t] / settings.temperature)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_the_loss_is_in_float32_also_where_the_model_computes_in_bf16(tokenizer, monkeypatch, unit):
    """A cosine near 1 has steps of .004 in bf16, which is .04 at the temperature 0.1."""
    seen, loss_of = [], contrastive_loss
    monkeypatch.setattr(af, "contrastive_loss", lambda *args: seen.append(args) or loss_of(*args))
    model, batch = tiny.build("bert"), pair_batch(tokenizer, unit)
    projection = af.projection_head(model.config.hidden_size, unit)
    with torch.autocast("cpu", torch.bfloat16):
        loss = af.alignment_loss(model.base_model, projection, batch, Settings(unit=unit))
        in_bf16 = loss_of(*seen[0])
    expected = loss_by_loops(*seen[0])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert in_bf16.item() != pytest.approx(expected, rel=1e-5)  # so the test would see it


@pytest.mark.parametrize("unit", ["word", "sentence"])
@pytest.mark.parametrize("architecture", tiny.ALL_CONFIGS)
def test_the_alignment_loss_in_groups_has_the_gradient_of_the_whole_batch(
    architecture, unit, tokenizer, monkeypatch
):
    model = tiny.build(architecture, torch.float64, 0.2)
    settings = Settings(unit=unit, layer=3 if unit == "word" else -1, temperature=0.5)
    projection = af.projection_head(tiny.HIDDEN, unit).double()
    arguments = model.base_model, projection, pair_batch(tokenizer, unit), settings
    loss = slow_alignment_loss(*arguments)
    expected = tiny.gradient_of(loss, model)
    for grouping in (af.by_length, ungrouped):
        monkeypatch.setattr(af, "by_length", grouping)
        found = af.alignment_loss(*arguments)
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        tiny.assert_same(tiny.gradient_of(found, model), expected, 1e-5)


@pytest.mark.parametrize(
    "unit, layer, strategy, pool_first",
    [("word", -2, "emb,1", True), ("sentence", 2, "front", True), ("sentence", 2, "front", False)],
)
def test_the_loss_of_a_batch_is_that_of_its_sentences_one_by_one(
    unit, layer, strategy, pool_first, tokenizer
):
    """The library reads each sentence alone; its words, or their mean, are taken by hand."""
    model = tiny.build("xlm-roberta", torch.float64, 0.3)
    pairs = tiny.word_pairs() if unit == "word" else tiny.text_pairs()
    settings = Settings(strategy=strategy, unit=unit, layer=layer, temperature=0.4)
    settings.pool_first = pool_first
    projection, vectors = af.projection_head(tiny.HIDDEN, unit).double(), {}
    for k, pair in enumerate(pairs):
        for side, words in enumerate((pair.source, pair.target)):
            text = words if unit == "sentence" else " ".join(words)
            inputs = tokenizer([text], return_tensors="pt", return_token_type_ids=False)
            states = model.base_model(**inputs, output_hidden_states=True).hidden_states[layer][0]
            sentence = states[1 - pool_first :].mean(0)
            for place, vector in enumerate(states[1:-1] if unit == "word" else [sentence]):
                vectors[side, k, place] = projection(vector)
    number = {key: n for n, key in enumerate(vectors)}
    linked = []
    for k, pair in enumerate(pairs):
        linked += [(number[0, k, i], number[1, k, j]) for i, j in pair.links or [(0, 0)]]
    source, target = torch.tensor(linked).T
    if unit == "word":
        links = torch.cat([source, target]), torch.cat([target, source]), 0.4, None
    else:
        links = target, source, 0.4, source
    expected = loss_by_loops(torch.stack(list(vectors.values())), *links)
    batch = pair_batch(tokenizer, unit)
    found = af.alignment_loss(model.base_model, projection, batch, settings).item()
    assert found == pytest.approx(expected, abs=2e-6)


def test_words_are_projected_by_two_matrices_with_a_relu_between_them_to_128_numbers():
    projection = af.projection_head(tiny.HIDDEN, "word")
    first, second = projection.parameters()  # without biases
    vectors = torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = (vectors @ first.T).clamp(min=0) @ second.T
    assert (first.shape, expected.shape) == ((tiny.HIDDEN, tiny.HIDDEN), (5, 128))
    torch.testing.assert_close(projection(vectors), expected)
    assert torch.equal(af.projection_head(tiny.HIDDEN, "sentence")(vectors), vectors)


@pytest.mark.parametrize("architecture", tiny.ALL_CONFIGS)
def test_the_task_in_groups_has_the_logits_loss_and_gradient_of_the_whole_batch(
    architecture, monkeypatch
):
    model = tiny.build(architecture, torch.float64, 0.2)
    batch = af.task_batch(tiny.features_for(architecture, 10), 1)
    labels = batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    is_classifier = architecture in tiny.ALL_ENCODERS
    # The library moves the labels of a language model by one position; ours are moved already.
    output = model(**inputs, labels=labels if is_classifier else labels.roll(1, 1))
    expected = tiny.gradient_of(output.loss, model)
    for grouping in (af.by_length, ungrouped):
        monkeypatch.setattr(af, "by_length", grouping)
        count = 0
        for rows, group in af.by_length(model, batch):
            has_label = group.pop("labels") != af.IGNORE
            if is_classifier:
                logits = af.task_logits(model, group)[has_label]
            else:
                logits = af.token_logits(model, group, has_label)
            library = output.logits[rows][labels[rows] != af.IGNORE]
            torch.testing.assert_close(logits, library, rtol=1e-5, atol=1e-5)
            count += len(logits)
        assert count == (labels != af.IGNORE).sum()
        loss = af.task_loss(model, batch)
        assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
        tiny.assert_same(tiny.gradient_of(loss, model), expected, 1e-5)


# ---- freezing


def part_of(name: str) -> str:
    """Return `emb`, the number of a layer, or `head` for all that follows the layers."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    if numbers:
        return numbers[0]
    return "emb" if "embeddings" in name or "embed_tokens" in name else "head"


SPECS = {
    "none": "", "full": "", "front": "0 1", "back": "2 3", "0-2": "0 1 2", "3": "3",
    "emb,1": "emb 1", "emb,front": "emb 0 1", "front,back": "0 1 2 3", "emb,0-1,3": "emb 0 1 3",
}  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_frozen_layer_is_bit_identical_after_realignment_and_all_others_move(spec, tokenizer):
    for architecture in ARCHITECTURES if spec == "front" else ["bert", "distilbert"]:
        model = tiny.build(architecture)
        before = tiny.weights(model)
        settings = replace(SETTINGS, strategy=spec, layer=-1)
        realign(model, tokenizer, tiny.word_pairs(), 2, settings)
        fixed = {*SPECS[spec].split(), "head"}
        expected = {name for name in before if part_of(name) not in fixed or "final_norm" in name}
        assert tiny.moved(before, model) == expected
        assert all(parameter.requires_grad for parameter in model.parameters())

        before = tiny.weights(model)
        finetune(model, tokenizer, tiny.tagged(20), settings)
        assert tiny.moved(before, model) == set(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligning_the_layer_before_the_last_leaves_the_last_layer_alone(architecture, tokenizer):
    model = tiny.build(architecture)
    before = tiny.weights(model)
    realign(model, tokenizer, tiny.word_pairs(), 2, replace(SETTINGS, strategy="full", layer=-2))
    assert {part_of(name) for name in tiny.moved(before, model)} == {"emb", "0", "1", "2"}


@pytest.mark.parametrize("architecture", tiny.ALL_CONFIGS)
def test_freeze_returns_the_names_of_what_it_froze(architecture):
    model = tiny.build(architecture)
    names = freeze(model, "back")
    assert set(names) == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {part_of(name) for name in names} == {"2", "3"}
    assert freeze(model, "back") == []  # nothing is left to freeze
    assert {part_of(name) for name in freeze(model, "emb,front")} == {"emb", "0", "1"}


def test_only_what_trained_before_trains_again_afterwards_even_after_an_error(tokenizer):
    model = tiny.build("bert")
    freeze(model, "0")
    parameters = af.parameters_of_layers(model, "front")
    frozen_parts = lambda: {part_of(n) for n, p in model.named_parameters() if not p.requires_grad}  # noqa: E731
    with pytest.raises(ZeroDivisionError), af.frozen(parameters):
        assert frozen_parts() == {"0", "1"}
        raise ZeroDivisionError
    assert frozen_parts() == {"0"}
    model = tiny.build("bert")
    settings = replace(SETTINGS, strategy="emb,0-2")
    with pytest.raises(af.UserError, match="nothing below it trains"):
        realign(model, tokenizer, tiny.word_pairs(), 3, settings)
    assert frozen_parts() == set()


@pytest.mark.parametrize("spec", ["4", "0-4", "3-1", "x", "-1", "0,,x", "emb0", "front 1", ""])
def test_a_spec_that_names_no_layer_is_an_error(spec):
    with pytest.raises(af.UserError, match=f"--strategy {spec}: "):
        freeze(tiny.build("bert"), spec)


def test_one_layer_has_no_halves_but_can_be_named():
    for spec in ("front", "back", "emb,front"):
        with pytest.raises(af.UserError, match=f"--strategy {spec}: .*halved"):
            af.layer_numbers(spec, 1)
    assert af.layer_numbers("emb,0", 1) == {"emb", 0}
    assert [af.layer_numbers(spec, 5) for spec in ("front", "back")] == [{0, 1}, {2, 3, 4}]


def test_an_encoder_without_a_list_of_layers_is_an_error():
    model = nn.Linear(2, 2)
    model.config = tiny.CONFIGS["bert"]
    with pytest.raises(af.UserError, match="no list of its 4 layers"):
        af.transformer_layers(model)


# ---- training


def test_realignment_brings_translations_together(tokenizer):
    links = [(i, 7 - i) for i in range(8)]  # in reverse order, so that positions do not help
    model, pair = tiny.build("bert"), af.Pair("fr", tiny.WORDS[:8], tiny.WORDS[:7:-1], links)

    def found() -> float:
        return af.retrieval(model, tokenizer, [pair], Settings())["retrieval"][-2]

    before = found()
    settings = replace(SETTINGS, strategy="full", realign_lr=2e-3)
    curves, aligned = realign(model, tokenizer, itertools.repeat(pair), 60, settings)
    assert before < 0.5 and found() == 1
    assert list(curves) == ["align"] and len(curves["align"]) == 3  # means of 20
    assert curves["align"][-1] < curves["align"][0]
    assert aligned["fr"] == {"sentences": 240, "words": 1920, "cut": 0, "skipped": 0, "readings": 1}


def test_a_baseline_is_not_realigned(tokenizer):
    """A notebook that loops over strategies would train it as `full`."""
    model = tiny.build("bert")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(af.UserError, match="realign: a baseline is not aligned; leave it out"):
        realign(model, tokenizer, tiny.word_pairs(), 1, replace(SETTINGS, strategy="baseline"))
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_the_same_seed_trains_the_same_way_and_another_seed_differently(tokenizer):
    results = []
    for seed in (31, 31, 42):
        model = tiny.build("xlm-roberta", hidden_dropout_prob=0.1)
        torch.manual_seed(len(results))  # what was drawn before must not matter
        settings = replace(SETTINGS, schedule="during", seed=seed)
        pairs = tiny.word_pairs()
        first_curves, aligned = realign(model, tokenizer, pairs, 3, settings)
        curves, _ = finetune(model, tokenizer, tiny.tagged(9), settings, pairs)
        results.append(((first_curves, curves), aligned, tiny.weights(model)))
    first, again, other = results
    assert first[:2] == again[:2] and first[0] != other[0]
    assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])


def test_each_seed_has_a_projection_of_its_own(tokenizer):
    """Nothing else depends on it here: there is no dropout, and a list of pairs keeps its order."""
    curves = []
    for seed in (31, 31, 42):
        settings = replace(SETTINGS, seed=seed)
        curves.append(realign(tiny.build("bert"), tokenizer, tiny.word_pairs(), 1, settings)[0])
    assert curves[0] == curves[1] != curves[2]


def test_training_turns_dropout_on(tokenizer, monkeypatch):
    """It is off in a model that was loaded from files, or evaluated; and again afterwards."""
    modes = []
    for name in ("task_loss", "alignment_loss"):

        def watched(model, *rest, loss=getattr(af, name)):
            modes.append(model.training)
            return loss(model, *rest)

        monkeypatch.setattr(af, name, watched)
    models = [tiny.build("bert").eval() for _ in range(2)]
    realign(models[0], tokenizer, tiny.word_pairs(), 1, SETTINGS)
    settings = replace(SETTINGS, schedule="during")
    finetune(models[1], tokenizer, tiny.tagged(4), settings, tiny.word_pairs())
    assert modes == [True] * 3
    assert not any(module.training for model in models for module in model.modules())


def test_gradients_from_before_the_training_do_not_count(tokenizer):
    """In a notebook, a cell that was interrupted leaves them behind."""
    results = []
    for is_interrupted in (False, True):
        model = tiny.build("bert")
        if is_interrupted:
            model(**tokenizer("the cat", return_tensors="pt")).logits.sum().backward()
        realign(model, tokenizer, tiny.word_pairs(), 2, SETTINGS)
        results.append(tiny.weights(model))
    tiny.assert_same(*results, tolerance=0)


def test_a_list_of_pairs_fills_a_batch(tokenizer):
    """A batch that held a pair twice would pull a word away from its own translation."""
    pairs = tiny.word_pairs()
    settings = replace(SETTINGS, realign_batch_size=len(pairs) + 1)
    with pytest.raises(af.UserError, match="fewer than realign_batch_size, 6"):
        realign(tiny.build("bert"), tokenizer, pairs, 1, settings)
    realign(tiny.build("bert"), tokenizer, iter(pairs * 2), 1, settings)  # a stream may repeat


@pytest.mark.parametrize("link", [(8, 0), (0, 8), (-1, 0)])
def test_a_link_beyond_the_words_is_an_error(link, tokenizer):
    """Such as one that counts words from 1."""
    (pair,) = tiny.word_pairs()[:1]
    pair = pair._replace(links=[*pair.links, link])
    with pytest.raises(af.UserError, match="a link of pair 0 points beyond its 8 and 8 words"):
        af.encode_pairs(tokenizer, [pair], 96)


def test_dropout_differs_between_seeds_and_between_batches(tokenizer, monkeypatch):
    """torch takes 64 bits of a seed; the generator of a CPU uses 32 of them."""
    masks, task_loss = [], af.task_loss

    def watched(model, batch):
        masks.append(torch.rand(8).tolist())  # what dropout would draw
        return task_loss(model, batch)

    monkeypatch.setattr(af, "task_loss", watched)
    for seed in (31, 42):
        settings = replace(SETTINGS, seed=seed, epochs=2)
        finetune(tiny.build("bert"), tokenizer, tiny.tagged(9), settings)
    assert len(masks) == 12 and len({tuple(mask) for mask in masks}) == 12


@pytest.mark.parametrize("spec", ["full", "front", "back", "emb,1"])
@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_during_fine_tuning_frozen_layers_have_the_gradient_of_the_task_alone(
    spec, unit, tokenizer
):
    """All other layers have it plus 0.1 times that of the alignment, in every update."""
    dtype, tolerance = (torch.float32, 1e-5) if unit == "word" else (torch.float64, 1e-6)
    model, features = tiny.build("bert", dtype), tiny.tagged(9)
    pairs = tiny.word_pairs() if unit == "word" else tiny.text_pairs()
    settings = replace(SETTINGS, strategy=spec, unit=unit, schedule="during", epochs=2, lr=0.0)
    torch.manual_seed(settings.seed)
    projection = af.projection_head(tiny.HIDDEN, unit)
    expected = []
    task = af.task_batches(tokenizer, features, settings)
    for examples, sentences in zip(task, af.pair_batches(tokenizer, pairs, settings)):
        gradient = tiny.gradient_of(af.task_loss(model, examples), model)
        aligned = af.alignment_loss(model.base_model, projection, sentences, settings)
        for name, part in tiny.gradient_of(aligned, model).items():
            if part_of(name) not in SPECS[spec].split():
                gradient[name] += 0.1 * part
        expected.append(gradient)
    with tiny.updates(model) as found:
        curves, _ = finetune(model, tokenizer, features, settings, pairs)
    assert len(found) == len(expected) == 6 and set(curves) == {"task", "align"}
    for one, other in zip(found, expected):
        tiny.assert_same(one, other, tolerance)


def test_updates_are_those_of_adam_without_weight_decay(tokenizer):
    """Kingma and Ba 2015, algorithm 1, with their defaults."""
    model, settings = tiny.build("bert", torch.float64), replace(SETTINGS, decay="constant")
    expected = tiny.weights(model)
    with tiny.updates(model) as gradients:
        finetune(model, tokenizer, tiny.tagged(9), settings)
    assert len(gradients) == 3
    for name, weight in expected.items():
        m = v = torch.zeros_like(weight)
        for t, gradient in enumerate((update[name] for update in gradients), 1):
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            weight -= 1e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(model.get_parameter(name).data, weight, rtol=0, atol=1e-8)


def test_a_curve_is_the_means_of_20_losses_each(tokenizer, monkeypatch):
    losses, task_loss = [], af.task_loss

    def watched(model, batch):
        loss = task_loss(model, batch)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(af, "task_loss", watched)
    settings = replace(SETTINGS, epochs=5, batch_size=2)
    curves, _ = finetune(tiny.build("distilbert"), tokenizer, tiny.tagged(20), settings)
    expected = [mean(losses[start : start + 20]) for start in (0, 20, 40)]
    assert len(losses) == 50 and curves == {"task": pytest.approx(expected, abs=1e-6)}


def rates_of(monkeypatch, **changes) -> list[float]:
    """Return the learning rate at each of 50 updates of fine-tuning, as a share of its peak."""
    rates, step = [], torch.optim.Adam.step

    def watched(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    model, tokenizer = tiny.build("distilbert"), tiny.make_tokenizer()
    settings = replace(SETTINGS, epochs=5, batch_size=2, **changes)
    finetune(model, tokenizer, tiny.tagged(20), settings)
    return [rate / 1e-3 for rate in rates]


def test_the_learning_rate_warms_up_and_falls(monkeypatch):
    linear = rates_of(monkeypatch, decay="linear")
    assert linear == pytest.approx([min(k / 5, (50 - k) / 45) for k in range(50)])
    linear = rates_of(monkeypatch, decay="linear", warmup=0.13)  # 6.5 updates, so 6
    assert linear == pytest.approx([min(k / 6, (50 - k) / 44) for k in range(50)])
    linear = rates_of(monkeypatch, decay="linear", warmup=0.58)  # 0.58 * 50 is below 29 in Python
    assert linear == pytest.approx([min(k / 29, (50 - k) / 21) for k in range(50)])
    root = rates_of(monkeypatch, decay="inverse_sqrt", warmup=0.03)  # 1.5 updates, so 2
    assert root == pytest.approx([min(k / 2, math.sqrt(2 / max(k, 1))) for k in range(50)])
    constant = rates_of(monkeypatch, decay="constant")
    assert constant == pytest.approx([1.0] * 50)


def test_the_learning_rate_can_stay_at_its_peak_or_end_before_it(monkeypatch):
    stays = rates_of(monkeypatch, decay="constant_with_warmup", warmup=0.8)
    assert stays == pytest.approx([min(k / 40, 1.0) for k in range(50)])
    rises = rates_of(monkeypatch, decay="constant_with_warmup", warmup=1.6)
    assert rises == pytest.approx([k / 80 for k in range(50)])


def test_realignment_has_a_learning_rate_and_a_schedule_of_its_own(monkeypatch, tokenizer):
    rates, step = [], torch.optim.Adam.step
    watched = lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    settings = replace(SETTINGS, realign_lr=3e-3, lr=1e-3, realign_decay="constant", warmup=0.5)
    realign(tiny.build("distilbert"), tokenizer, tiny.word_pairs(), 4, settings)
    assert rates == pytest.approx([3e-3] * 4)
    finetune(tiny.build("distilbert"), tokenizer, tiny.tagged(16), settings)
    assert rates[4:] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_the_gradient_is_clipped_at_its_norm(tokenizer):
    model = tiny.build("bert")
    with tiny.updates(model) as taken:
        finetune(model, tokenizer, tiny.tagged(4), replace(SETTINGS, clip=0.01))
    found = torch.cat([gradient.flatten() for gradient in taken[0].values()])
    assert found.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_training_ends_when_stop_returns_true(tokenizer):
    model, asked = tiny.build("bert"), []
    stop = lambda step: asked.append(step) or step == 3  # noqa: E731
    with tiny.updates(model) as taken:
        finetune(model, tokenizer, tiny.tagged(40), SETTINGS, stop=stop)
    assert asked == [1, 2, 3] and len(taken) == 3


def test_a_list_of_pairs_is_repeated_and_an_iterator_must_be_long_enough(tokenizer):
    pairs = tiny.word_pairs()
    _, aligned = realign(tiny.build("bert"), tokenizer, pairs, 5, SETTINGS)
    assert {code: counts["sentences"] for code, counts in aligned.items()} == {"fr": 12, "de": 8}
    realign(tiny.build("bert"), tokenizer, iter(pairs * 4), 5, SETTINGS)
    for few, steps in ((iter(pairs * 4), 5), ([], 0)):
        with pytest.raises(af.UserError, match=f"no pairs after {steps} of 6 steps"):
            realign(tiny.build("bert"), tokenizer, few, 6, SETTINGS)
    settings = replace(SETTINGS, schedule="during")
    with pytest.raises(af.UserError, match="no pairs after 1 of 10 steps"):
        finetune(tiny.build("bert"), tokenizer, tiny.tagged(40), settings, iter(pairs))


def test_skipped_pairs_and_readings_are_counted_by_language(tokenizer):
    one, two, *_ = tiny.word_pairs()
    pairs = [one._replace(skipped=2), two, one._replace(skipped=3, reading=2)]
    pairs.append(two._replace(language="de", skipped=1, reading=4))
    _, aligned = realign(tiny.build("bert"), tokenizer, pairs, 1, SETTINGS)
    counts = {code: (one["skipped"], one["readings"]) for code, one in aligned.items()}
    assert counts == {"fr": (5, 2), "de": (1, 4)}


def test_pairs_of_text_and_of_words_are_not_mistaken_for_each_other(tokenizer):
    """A text would pass for a list of letters, and a list of words for several texts."""
    for unit, pair in (("word", tiny.text_pairs()[0]), ("sentence", tiny.word_pairs()[0])):
        settings = replace(SETTINGS, unit=unit, realign_batch_size=2)
        with pytest.raises(af.UserError, match=f"with the unit {unit}, both sides must be"):
            realign(tiny.build("bert"), tokenizer, [pair] * 2, 1, settings)


def test_an_error_in_the_pairs_reaches_the_caller(tokenizer):
    def broken():
        yield from tiny.word_pairs()
        raise af.UserError("line 6 is broken")

    with pytest.raises(af.UserError, match="line 6 is broken"):
        realign(tiny.build("bert"), tokenizer, broken(), 6, SETTINGS)


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer):
    model = tiny.build("bert")
    nn.init.constant_(model.base_model.get_input_embeddings().weight, math.nan)
    with pytest.raises(af.UserError, match="loss is nan"):
        realign(model, tokenizer, tiny.word_pairs(), 20, SETTINGS)
    with pytest.raises(af.UserError, match="loss is nan"):
        finetune(model, tokenizer, tiny.tagged(4), SETTINGS)
