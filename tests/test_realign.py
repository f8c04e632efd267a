"""The loss is right, and freezing is right: the two things that AlignFreeze consists of."""

import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
)

import alignfreeze
from alignfreeze import (
    Pair,
    contrastive_loss,
    encode_pairs,
    finetune,
    freeze,
    hidden_state,
    realign,
    task_batch,
    task_loss,
)

WORDS = "the cat dog sees a big old house le chat chien voit une grande vieille maison".split()
LAYERS = 4
SIZE = {"vocab_size": len(WORDS) + 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
SIZE |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 64, "pad_token_id": 1, "num_labels": 3}
CONFIGS = {
    "distilbert": DistilBertConfig(
        vocab_size=SIZE["vocab_size"], dim=32, hidden_dim=64, n_heads=2, n_layers=LAYERS, pad_token_id=1, num_labels=3
    ),
    "bert": BertConfig(**SIZE),
    "xlm-roberta": XLMRobertaConfig(**SIZE, bos_token_id=0, eos_token_id=2),
    "modernbert": ModernBertConfig(**SIZE, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2),
}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: k for k, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **special)


def build(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForTokenClassification.from_config(CONFIGS[architecture])


def pairs():
    source, target = WORDS[:8], WORDS[8:]
    links = [(0, 0), (1, 1), (2, 2), (3, 3), (5, 5), (7, 7)]
    return itertools.cycle([Pair("fr", source, target, links), Pair("fr", source[:4], target[:4], links[:4])])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict, model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}


# --- the loss --------------------------------------------------------------------------------------------------------


def loss_by_loops(words, queries, targets, temperature):
    """The formula, word by word."""
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in words.tolist()]
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))  # noqa: E731
    total = 0.0
    for q, t in zip(queries.tolist(), targets.tolist()):
        others = [dot(unit[q], unit[w]) / temperature for w in range(len(unit)) if w != q]
        total -= dot(unit[q], unit[t]) / temperature - math.log(sum(map(math.exp, others)))
    return total / len(queries)


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_equals_a_double_loop_over_words(seed):
    rng = torch.Generator().manual_seed(seed)
    n, d = (int(torch.randint(low, high, (), generator=rng)) for low, high in ((3, 60), (2, 20)))
    words = torch.randn(n, d, generator=rng, dtype=torch.float64) * 3
    half = torch.randperm(n, generator=rng)[: 2 * (n // 3 or 1)].reshape(2, -1)
    queries, targets = torch.cat([half[0], half[1]]), torch.cat([half[1], half[0]])
    for temperature in (0.1, 1.0):
        expected = loss_by_loops(words, queries, targets, temperature)
        assert abs(contrastive_loss(words, queries, targets, temperature).item() - expected) < 1e-9


def test_the_gradient_of_the_loss_is_right():
    rng = torch.Generator().manual_seed(0)
    words = torch.randn(7, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    queries, targets = torch.tensor([0, 1, 4, 3, 5, 6]), torch.tensor([3, 5, 6, 0, 1, 4])
    assert torch.autograd.gradcheck(lambda w: contrastive_loss(w, queries, targets), words)


def test_the_loss_of_two_words_is_zero_and_of_equal_words_the_log_of_their_number():
    two = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    pair = torch.tensor([0, 1]), torch.tensor([1, 0])
    assert contrastive_loss(two, *pair).item() == 0
    assert contrastive_loss(two[:1].repeat(9, 1), *pair).item() == pytest.approx(math.log(8), abs=1e-12)


def test_the_loss_looks_at_directions_not_at_lengths():
    words = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    links = torch.tensor([0, 1]), torch.tensor([3, 4])
    scale = torch.tensor([[1.0], [2], [3], [0.5], [7], [0.1]], dtype=torch.float64)
    assert contrastive_loss(words * scale, *links).item() == pytest.approx(
        contrastive_loss(words, *links).item(), abs=1e-12
    )


def test_a_batch_whose_links_were_all_cut_off_has_no_loss_and_no_gradient():
    words, none = torch.randn(4, 3, requires_grad=True), torch.empty(0, dtype=torch.long)
    loss = contrastive_loss(words, none, none)
    loss.backward()
    assert loss.item() == 0 and words.grad.abs().sum() == 0


# --- the layer that is realigned -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("layer", [0, 1, 3, 4, -1, -2, -5])
def test_hidden_states_are_those_of_the_whole_encoder(architecture, layer, tokenizer):
    encoder = build(architecture).base_model.eval()
    inputs = dict(tokenizer(["the cat sees a dog", "le chat"], padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    expected = encoder(**inputs, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(hidden_state(encoder, inputs, layer), expected)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_layers_above_the_realigned_one_are_not_computed(architecture, tokenizer):
    encoder = build(architecture).base_model.eval()
    layers, computed = alignfreeze.transformer_layers(encoder), []
    for k, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, k=k: computed.append(k))
    inputs = dict(tokenizer(["the cat"], return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    hidden_state(encoder, inputs, -2)
    assert computed == [0, 1, 2]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_batch_in_parts_has_the_loss_and_the_gradient_of_the_whole_batch(architecture, tokenizer):
    model = build(architecture).eval()  # no dropout
    encoder, projection = model.base_model, alignfreeze.projection_head(32)
    results = []
    for parts in (1, 3, 8):
        batch = encode_pairs(tokenizer, list(itertools.islice(pairs(), 6)), parts=parts)
        model.zero_grad()
        loss = alignfreeze.realignment_loss(encoder, projection, batch)
        loss.backward()
        results.append((loss, encoder.get_input_embeddings().weight.grad.clone()))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1], atol=1e-6, rtol=1e-4)


# --- freezing --------------------------------------------------------------------------------------------------------


def part_of(name: str) -> str:
    """`emb`, a layer's number, or `head` (and ModernBERT's final norm, which no realigned layer but the last uses)."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else "emb" if "embeddings" in name else "head"


SPECS = {"none": "", "front": "0 1", "back": "2 3", "0-2": "0 1 2", "emb,1": "emb 1", "emb,0-1": "emb 0 1", "3": "3"}


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_frozen_layer_is_bit_identical_after_realignment_and_every_other_moves(architecture, spec, tokenizer):
    model = build(architecture)
    before = weights(model)
    realign(model, tokenizer, pairs(), steps=3, spec=spec, batch_size=4, lr=1e-3, layer=-1)
    expected = {name for name in before if part_of(name) not in (*SPECS[spec].split(), "head") or "final_norm" in name}
    if architecture == "bert" or architecture == "xlm-roberta":
        expected = {name for name in expected if "pooler" not in name}
    # the embeddings' rows of words that do not occur stay; as parameters they move
    assert moved(before, model) == expected
    assert all(parameter.requires_grad for parameter in model.parameters())  # all train again

    before = weights(model)
    ids = torch.tensor([0, *range(4, 12), 2]).numpy()
    finetune(model, [{"input_ids": ids, "labels": ids % 3}] * 20, 1, epochs=2, batch_size=4, lr=1e-3)
    assert moved(before, model) == set(before)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_realigning_the_layer_before_the_last_leaves_the_last_layer_alone(architecture, tokenizer):
    model = build(architecture)
    before = weights(model)
    realign(model, tokenizer, pairs(), steps=2, batch_size=4, lr=1e-3)
    assert {part_of(name) for name in moved(before, model)} == {"emb", "0", "1", "2"}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_front_freezing_as_in_the_authors_code_lets_the_embeddings_move(architecture, tokenizer):
    for spec, embeddings_move in (("front", True), ("emb,0-1", False)):
        model = build(architecture)
        before = weights(model)
        realign(model, tokenizer, pairs(), steps=2, spec=spec, batch_size=4, lr=1e-3)
        assert ("emb" in {part_of(name) for name in moved(before, model)}) == embeddings_move


@pytest.mark.parametrize("spec", ["none", "front", "back", "emb,1"])
def test_realignment_during_fine_tuning_trains_all_layers_but_moves_frozen_ones_by_the_task_alone(spec, tokenizer):
    """The first step of Adam goes by lr x g / (|g| + eps), where g is the task's gradient, plus 0.1 x the realignment's

    gradient outside of the frozen layers: both of them computed here on their own, with nothing frozen.
    """
    torch.manual_seed(0)
    config = BertConfig(**SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = AutoModelForTokenClassification.from_config(config).double()
    projection = alignfreeze.projection_head(32).double()
    ids = torch.tensor([0, *range(4, 12), 2]).numpy()
    batch = [{"input_ids": ids, "labels": ids % 3}] * 4
    chunk = encode_pairs(tokenizer, list(itertools.islice(pairs(), 4)))

    def gradient(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: grad.clone() for name, grad in grads.items()}

    task = gradient(task_loss(model, task_batch(batch, 1)))
    realignment = gradient(alignfreeze.realignment_loss(model.base_model, projection, chunk))
    model.zero_grad()
    projection.zero_grad()
    before, head = weights(model), weights(projection)

    batches = alignfreeze.realignment_batches(tokenizer, pairs(), batch_size=4)
    loss = alignfreeze.shielded_loss(model, projection, spec, {})
    finetune(model, batch, 1, epochs=1, batch_size=4, lr=1e-3, realignment=(projection, batches, loss))
    for name, parameter in model.named_parameters():
        expected = task[name].clone()
        if name in realignment and part_of(name) not in SPECS.get(spec, "emb 1").split():
            expected += 0.1 * realignment[name]
        step = 1e-3 * expected / (expected.abs() + 1e-8)
        clear = expected.abs() > 1e-6  # else rounding decides
        torch.testing.assert_close((before[name] - parameter)[clear], step[clear], atol=2e-5, rtol=0)
    assert len(moved(head, projection)) == 2  # the projection trains too


@pytest.mark.parametrize("architecture", CONFIGS)
def test_freeze_returns_the_names_of_what_it_froze(architecture):
    model = build(architecture)
    names = freeze(model, "back")
    assert set(names) == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {part_of(name) for name in names} == {"2", "3"}
    assert freeze(model, "back") == []  # nothing more to turn off
    assert {part_of(name) for name in freeze(model, "emb")} == {"emb"}


@pytest.mark.parametrize("spec", ["4", "0-4", "3-1", "x", "-1", "0,,x", "front,1", "emb0"])
def test_a_spec_that_names_no_layer_is_a_users_error(spec):
    with pytest.raises(alignfreeze.UserError, match=r"layer|freeze"):
        freeze(build("bert"), spec)


def test_an_encoder_without_a_list_of_layers_is_a_users_error():
    model = nn.Linear(2, 2)
    model.config, model.base_model = CONFIGS["bert"], model
    with pytest.raises(alignfreeze.UserError, match="4 transformer layers"):
        alignfreeze.transformer_layers(model)


# --- training --------------------------------------------------------------------------------------------------------


def test_realignment_brings_translations_together(tokenizer):
    model, links = build("bert"), [(i, 7 - i) for i in range(8)]  # the other way round, so that places are no help
    pair = Pair("fr", WORDS[:8], WORDS[:7:-1], links)
    inputs = dict(tokenizer([" ".join(pair.source), " ".join(pair.target)], return_tensors="pt"))
    inputs.pop("token_type_ids", None)

    def found() -> float:
        source, target = nn.functional.normalize(hidden_state(model.eval().base_model, inputs, -2)[:, 1:-1], dim=-1)
        nearest = (source @ target.T).argmax(1)
        return sum(int(nearest[i] == j) for i, j in links) / len(links)

    before = found()
    realign(model, tokenizer, itertools.repeat(pair), steps=60, batch_size=4, lr=2e-3)
    assert before < 0.5 and found() == 1


def test_the_same_seed_realigns_the_same_way_and_another_seed_differently(tokenizer):
    results = []
    for seed in (31, 31, 42):
        model = build("xlm-roberta")
        realign(model, tokenizer, pairs(), steps=3, batch_size=4, seed=seed)
        results.append(weights(model))
    first, again, other = results
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_micro_batches_sum_to_the_gradient_of_the_batch(architecture):
    model = build(architecture).eval()  # no dropout
    rng = torch.Generator().manual_seed(0)
    lengths = [3, 17, 5, 30, 9, 4, 12, 7, 3, 25]
    batch = []
    for length in lengths:
        ids = torch.randint(4, SIZE["vocab_size"], (length,), generator=rng)
        labels = torch.where(torch.rand(length, generator=rng) < 0.3, alignfreeze.IGNORE, ids % 3)
        batch.append({"input_ids": ids.numpy(), "labels": labels.numpy()})
    ids, labels = (
        nn.utils.rnn.pad_sequence([torch.tensor(f[k]) for f in batch], True, v)
        for k, v in (("input_ids", 1), ("labels", -100))
    )
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss  # the library's own mean over the batch
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for parts in (1, 3, 10):
        model.zero_grad()
        loss = task_loss(model, task_batch(batch, 1, parts))
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


def test_the_learning_rate_warms_up_over_a_tenth_of_the_steps_and_falls_to_zero(monkeypatch):
    rates, model = [], build("bert")
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    ids = torch.tensor([0, 5, 6, 2]).numpy()
    assert finetune(model, [{"input_ids": ids, "labels": ids % 3}] * 40, 1, epochs=5, batch_size=4, lr=1.0) == 50
    expected = [min(k / 5, (50 - k) / 45) for k in range(50)]
    assert rates == pytest.approx(expected)


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer):
    model = build("bert")
    with pytest.raises(alignfreeze.UserError, match="loss is nan"), torch.no_grad():
        model.base_model.get_input_embeddings().weight.fill_(math.nan)
        with torch.enable_grad():
            realign(model, tokenizer, pairs(), steps=20, batch_size=4)
