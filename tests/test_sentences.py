"""Tests of middle-layer alignment: sentence vectors, adapters, schedules, validation, generation.

Where transformers or PEFT compute the same, their results are the reference.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForTokenClassification

import alignfreeze as af
from alignfreeze import LoraLinear, Settings, add_lora, finetune, realign

MODELS = [*tiny.DECODERS, "bert"]
SENTENCES = Settings(
    unit="sentence", layer=2, strategy="full", schedule="alternate", epochs=1, lr=1e-2,
    realign_lr=1e-2, batch_size=4, realign_batch_size=4,
)  # fmt: skip
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj query key value dense".split()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer("<s> $A")


@pytest.fixture
def peft(monkeypatch):
    """Return the module `peft`, which may not use the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def writing(monkeypatch):
    """Add a task that generates text, called `writing`."""
    task = af.Task(af.Generator, None, None, None, [], new_tokens=4)
    monkeypatch.setitem(af.TASKS, "writing", task)


# ---- The vector of a sentence is the mean of its hidden states


@pytest.mark.parametrize("architecture", MODELS)
def test_a_sentence_vector_is_the_mean_of_the_hidden_states(architecture, tokenizer):
    """The reference is the library, which reads each sentence alone, without padding."""
    model = tiny.build(architecture, torch.float64, 0.2).base_model.eval()
    pairs = tiny.text_pairs(6)
    states = [states_of(model, text) for text in texts_of(pairs)]
    batch = af.encode_texts(tokenizer, pairs, 96)
    assert torch.equal(batch.queries, torch.arange(6, 12))  # the translations
    assert torch.equal(batch.targets, torch.arange(6))
    assert torch.equal(batch.candidates, torch.arange(6))
    for pool_first in (True, False):
        for layer in range(-1, tiny.LAYERS + 1):
            hidden = af.hidden_state(model, batch.inputs, layer)
            vectors = af.vectors_of(hidden, batch, pool_first)
            means = torch.stack([state[layer][1 - pool_first :].mean(0) for state in states])
            torch.testing.assert_close(vectors.double(), means, atol=2e-6, rtol=1e-5)


def texts_of(pairs: list[af.Pair]) -> list[str]:
    return [pair.source for pair in pairs] + [pair.target for pair in pairs]


def states_of(encoder: nn.Module, words: str | list[str]) -> list[torch.Tensor]:
    """Return `hidden_states`, (T, d) each, of one sentence after the token `<s>`."""
    words = words.split() if isinstance(words, str) else words
    ids = torch.tensor([[0, *map(tiny.VOCABULARY.index, words)]])
    return [state[0] for state in encoder(ids, output_hidden_states=True).hidden_states]


def test_a_sentence_of_the_first_position_alone_has_a_zero_vector(tokenizer):
    """Without the first position there is nothing to average; this must not divide by zero."""
    pairs = [af.Pair("de", "", "le chat"), af.Pair("de", "the", "chat")]
    batch = af.encode_texts(tokenizer, pairs, 96)
    hidden = af.hidden_state(tiny.build("llama").base_model, batch.inputs, 2)
    vectors = af.vectors_of(hidden, batch, pool_first=False)
    assert torch.equal(vectors[0], torch.zeros(tiny.HIDDEN))
    assert all(vectors[1:].abs().sum(1) > 0)


def test_a_sentence_without_a_subword_becomes_a_padding_token():
    tokenizer = tiny.make_tokenizer("$A")
    pairs = [af.Pair("de", "", "le chat"), af.Pair("de", "the", "")]
    inputs = af.encode_texts(tokenizer, pairs, 96).inputs
    assert inputs["input_ids"][0].tolist() == [tokenizer.pad_token_id] * 2
    assert inputs["attention_mask"].sum(1).tolist() == [1, 1, 2, 1]


def test_a_long_sentence_is_cut_off(tokenizer):
    pairs = [af.Pair("de", "the cat sees a dog", "le chat"), af.Pair("de", "the dog", "le chat")]
    batch = af.encode_texts(tokenizer, pairs, 4)
    expected = [["<s>", "the", "cat", "sees"], ["<s>", "le", "chat", "<pad>"]]
    rows = batch.inputs["input_ids"][::2].tolist()
    assert [[tiny.VOCABULARY[i] for i in row] for row in rows] == expected
    assert batch.cut == [1, 0]
    settings = replace(SENTENCES, realign_max_length=4, realign_batch_size=2)
    _, aligned = realign(tiny.build("llama"), tokenizer, itertools.cycle(pairs), 3, settings)
    assert aligned["de"] == {"sentences": 6, "words": 0, "cut": 3, "skipped": 0, "readings": 1}


def test_sentence_alignment_changes_no_layer_above_and_no_frozen_layer(tokenizer):
    for architecture in MODELS:
        model = tiny.build(architecture)
        before = tiny.weights(model)
        settings = replace(SENTENCES, strategy="0")
        curves, aligned = realign(model, tokenizer, tiny.text_pairs(), 5, settings)
        moved = tiny.moved(before, model)
        assert {next(filter(str.isdigit, name.split(".")), "emb") for name in moved} == {"emb", "1"}
        assert aligned["de"]["sentences"] + aligned["fr"]["sentences"] == 20
        assert list(curves) == ["align"]


def test_alignment_brings_translated_sentences_together(tokenizer):
    model, pairs = tiny.build("llama", spread=0.1), tiny.text_pairs(8)
    settings = replace(SENTENCES, realign_batch_size=8, pool_first=False)
    before = af.retrieval(model, tokenizer, pairs, settings)["retrieval"][2]
    realign(model, tokenizer, pairs, 40, settings)
    assert before < 0.6
    assert af.retrieval(model, tokenizer, pairs, settings)["retrieval"][2] == 1


@pytest.mark.parametrize("unit", ["word", "sentence"])
@pytest.mark.parametrize("strategy, layer", [("emb,front", 2), ("emb,0-3", 4), ("emb", 0)])
def test_alignment_is_refused_if_nothing_below_the_layer_trains(strategy, layer, unit, tokenizer):
    """With words, only the projection would train, which is dropped afterwards."""
    settings = replace(SENTENCES, strategy=strategy, layer=layer, unit=unit)
    pairs = tiny.word_pairs() if unit == "word" else tiny.text_pairs()
    model = tiny.build("bert")
    with pytest.raises(af.UserError, match=f"layer {layer}: nothing below it trains"):
        realign(model, tokenizer, pairs, 1, settings)
    with pytest.raises(af.UserError, match=f"layer {layer}: nothing below it trains"):
        finetune(model, tokenizer, tiny.tagged(8), settings, pairs)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "flags, is_refused",
    [
        ("--strategy emb,front --layer 2", True),
        ("--strategy emb,front --layer 3", False),
        ("--strategy emb,0-3 --layer -1", True),
        ("--strategy front --layer 2", False),  # the embeddings train
        ("--strategy front --layer 2 --lora 2", True),  # with adapters they do not
        ("--strategy back --layer 2 --lora 2", False),
        ("--strategy full --layer 0 --lora 2", True),
        ("--strategy baseline --layer 0 --lora 2", False),
    ],
)
def test_such_a_run_is_refused_before_the_model_is_loaded(flags, is_refused):
    settings, message = af.parse_args(flags.split()), ""
    try:
        af.validate_for_model(settings, tiny.CONFIGS["bert"], 512)
    except af.UserError as error:
        message = str(error)
    assert ("nothing below --layer" in message) == is_refused


# ---- Low-rank adapters


def with_adapters(
    architecture: str, dtype=torch.float64, seed: int = 1, dropout: float = 0.0
) -> nn.Module:
    """Return a model with random adapters of rank 3 and alpha 6."""
    model = tiny.build(architecture, dtype, 0.1)
    add_lora(model, 3, 6.0, dropout)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.to(dtype)
            nn.init.normal_(module.lora_A.weight, std=0.3)
            nn.init.normal_(module.lora_B.weight, std=0.3)
    return model


def random_inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("architecture", [*MODELS, "distilbert", "modernbert"])
def test_adapters_change_nothing_at_first_and_only_they_train(architecture):
    model = tiny.build(architecture).eval()
    expected = model(**random_inputs()).logits
    trained = add_lora(model, 3, 6.0, 0.5)
    assert torch.equal(model(**random_inputs()).logits, expected)
    assert set(trained) == {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = [name for name in trained if ".lora_" in name]
    blocks = af.transformer_layers(tiny.build(architecture).base_model)
    linear = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
    assert len(adapters) == 2 * len(linear)
    head = {name for name in trained if ".lora_" not in name}
    inside = {name for name, _ in model.base_model.named_parameters(model.base_model_prefix)}
    assert not head & inside
    assert bool(head) == (architecture not in tiny.DECODERS)


def test_dropout_is_in_front_of_the_adapter_alone():
    torch.manual_seed(0)
    module, x = LoraLinear(nn.Linear(6, 5), 3, 6.0, 0.5), torch.randn(4, 6)
    nn.init.normal_(module.lora_B.weight)
    torch.manual_seed(1)
    found = module.train()(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    assert not torch.equal(dropped, x)
    change = 6 / 3 * dropped @ module.lora_A.weight.T @ module.lora_B.weight.T
    torch.testing.assert_close(found, module.base_layer(x) + change)


@pytest.mark.parametrize("architecture", MODELS)
def test_adapters_have_the_outputs_and_gradients_of_peft(architecture, peft):
    ours, theirs = with_adapters(architecture), tiny.build(architecture, torch.float64, 0.1)
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=LINEAR)
    theirs = peft.get_peft_model(theirs, config).double()
    modules = dict(ours.named_modules())
    pairs = []
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            path, part = name.removeprefix("base_model.model.").split(".lora_")
            own = getattr(modules[path], f"lora_{part[0]}").weight
            parameter.data.copy_(own)
            pairs.append((own, parameter))
    assert len(pairs) == len([name for name, _ in ours.named_parameters() if ".lora_" in name])
    found, expected = (model(**random_inputs()).logits for model in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    for logits in (found, expected):
        (logits**2).sum().backward()
    for own, other in pairs:
        assert own.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, other.grad, atol=1e-9, rtol=1e-6)


def test_adapters_in_float32_keep_the_type_of_the_hidden_states():
    """The base may be in bf16; the adapters, like PEFT's, are in float32."""
    model = tiny.build("llama", torch.bfloat16)
    add_lora(model, 3, 6.0, 0.0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**random_inputs()).logits.dtype == torch.bfloat16


def test_what_trains_is_in_float32_and_the_frozen_base_in_bf16(world):
    """The classifier trains too: a learning rate of 2e-5 does not move a weight in bf16."""
    folder = str(world / "models/bert")
    settings = Settings(model=folder, strategy="baseline", lora=2, precision="bf16", lr=1e-3)
    settings = replace(settings, epochs=1, batch_size=4)
    tokenizer, _ = af.load_tokenizer(settings.model)
    model = af.build_model(settings, tokenizer, torch.device("cpu"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before, features = tiny.weights(model), tiny.tagged(8)
    assert {before[name].dtype for name in trained} == {torch.float32}
    assert {before[name].dtype for name in before.keys() - trained} == {torch.bfloat16}
    finetune(model, tokenizer, features, settings)
    assert tiny.moved(before, model) == trained
    scores = af.evaluate(model, tokenizer, af.TASKS["udpos"], [], features, settings)
    assert 0 <= scores["accuracy"] <= 1


def test_a_model_in_bf16_is_loaded_in_float32_and_each_seed_has_a_classifier_of_its_own(
    tmp_path, tokenizer
):
    tiny.build("bert", torch.bfloat16).base_model.save_pretrained(tmp_path)
    classifiers = []
    for k, seed in enumerate((31, 31, 42)):
        torch.manual_seed(k)  # what was drawn before must not matter
        settings = Settings(model=str(tmp_path), seed=seed, lora=2, lora_dropout=0.3)
        model = af.build_model(settings, tokenizer, torch.device("cpu"))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        adapters = [module for module in model.modules() if isinstance(module, LoraLinear)]
        assert {module.dropout.p for module in adapters} == {0.3}
        classifiers.append(model.classifier.weight)
    assert torch.equal(classifiers[0], classifiers[1])
    assert not torch.equal(classifiers[0], classifiers[2])


@pytest.mark.parametrize("schedule", ["before", "alternate", "during"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_no_weight_of_the_base_moves_in_training(architecture, schedule, tokenizer):
    model = with_adapters(architecture, torch.float32, dropout=0.1)
    features = tiny.written(9) if architecture == "llama" else tiny.tagged(9)
    before = tiny.weights(model)
    adapters = {name for name in before if ".lora_" in name}
    settings = replace(SENTENCES, schedule=schedule, clip=1.0)
    if schedule == "before":
        realign(model, tokenizer, tiny.text_pairs(), 3, settings)
        below = {name for name in adapters if ".0." in name or ".1." in name}
        assert tiny.moved(before, model) == below
    finetune(model, tokenizer, features, settings, tiny.text_pairs())
    head = {name for name in before if name.startswith("classifier")}
    assert tiny.moved(before, model) == adapters | head


def test_frozen_adapters_stay_and_train_again_afterwards(tokenizer):
    model = with_adapters("llama", torch.float32)
    before, trained = (
        tiny.weights(model),
        {n for n, p in model.named_parameters() if p.requires_grad},
    )
    realign(model, tokenizer, tiny.text_pairs(), 2, replace(SENTENCES, strategy="emb,1"))
    moved = tiny.moved(before, model)
    assert moved == {name for name in trained if ".layers.0." in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def save(model: nn.Module, folder: Path, tokenizer) -> None:
    """Write the adapters of a model, as a run with --save-model does."""
    task = "udpos" if isinstance(model, BertForTokenClassification) else "writing"
    settings = Settings(model="base", task=task, lora=3, lora_alpha=6.0, lora_dropout=0.0)
    af.save_model(replace(settings, save_model=folder), model, tokenizer)


@pytest.mark.parametrize("architecture", MODELS)
def test_peft_loads_what_is_written_and_what_peft_writes_is_merged(
    architecture, tmp_path, tokenizer, peft
):
    """Of a classifier, only the encoder is written, with or without adapters."""
    whole = lambda model: model if architecture in tiny.DECODERS else model.base_model  # noqa: E731
    model, inputs = with_adapters(architecture, torch.float32).eval(), random_inputs()
    expected = whole(model)(**inputs)[0]
    save(model, tmp_path / "ours", tokenizer)
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in (tmp_path / "ours/adapter_config.json").read_text("utf-8")
    base = whole(tiny.build(architecture, spread=0.1).eval())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(**inputs)[0], expected, atol=1e-5, rtol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        merged = whole(tiny.build(architecture, spread=0.1).eval())
        af.merge_adapter(merged, tmp_path / folder, 1.0)
        torch.testing.assert_close(merged(**inputs)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_weight_of_an_adapter_is_not_taken_from_the_name_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert af.parse_adapter("runs/r=8") == ("runs/r", 8)
    (tmp_path / "runs/r=8").mkdir(parents=True)
    assert af.parse_adapter("runs/r=8") == ("runs/r=8", 1)
    assert af.parse_adapter("runs/r=8=0.5") == ("runs/r=8", 0.5)


def test_a_merged_weight_has_the_scaled_product_added(tmp_path, tokenizer):
    model, merged = with_adapters("llama", torch.float32), tiny.build("llama", spread=0.1)
    save(model, tmp_path / "a", tokenizer)
    af.merge_adapter(merged, tmp_path / "a", 0.25)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            change = 0.25 * 6 / 3 * module.lora_B.weight @ module.lora_A.weight
            expected = module.base_layer.weight + change
            torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_several_merged_adapters_are_the_weighted_sum_that_peft_computes(tmp_path, tokenizer, peft):
    for seed in (1, 2):
        save(with_adapters("llama", torch.float32, seed), tmp_path / str(seed), tokenizer)
    base = tiny.build("llama", spread=0.1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "1", adapter_name="1")
    theirs.load_adapter(tmp_path / "2", adapter_name="2")
    theirs.add_weighted_adapter(["1", "2"], [0.7, 0.4], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    theirs = theirs.merge_and_unload()
    ours = tiny.build("llama", spread=0.1)
    ours.save_pretrained(tmp_path / "base")
    before = tiny.weights(ours)
    settings = Settings(model=str(tmp_path / "base"), task="writing")
    settings.adapter = [f"{tmp_path}/1=0.7", f"{tmp_path}/2=0.4"]
    ours = af.build_model(settings, tokenizer, torch.device("cpu"))
    assert len(tiny.moved(before, ours)) == 7 * tiny.LAYERS
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "not plain LoRA adapters: .*use_dora"),
        ({"use_rslora": True}, "not plain LoRA adapters"),
        ({"rank_pattern": {"q_proj": 2}}, "not plain LoRA adapters"),
        ({"peft_type": "LOHA"}, "not plain LoRA adapters: .*LOHA"),
    ],
)
def test_adapters_of_another_kind_are_refused(change, message, tmp_path, tokenizer):
    folder = tmp_path / "a"
    save(with_adapters("llama", torch.float32), folder, tokenizer)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(af.UserError, match=message):
        af.merge_adapter(tiny.build("llama"), folder, 1.0)


@pytest.mark.parametrize(
    "change", [{"r": 0}, {"r": "3"}, {"r": None}, {"lora_alpha": None}, {"r": 7}]
)
def test_adapters_without_a_scale_or_of_another_rank_are_refused(change, tmp_path, tokenizer):
    save(with_adapters("llama", torch.float32), tmp_path / "a", tokenizer)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(af.UserError, match=r"--adapter .*(cannot be read|no linear layer)"):
        af.merge_adapter(tiny.build("llama"), tmp_path / "a", 1.0)
    path.write_text("[]", "utf-8")
    with pytest.raises(af.UserError, match="cannot be read"):
        af.merge_adapter(tiny.build("llama"), tmp_path / "a", 1.0)


def test_tensors_other_than_pairs_for_linear_layers_are_refused(tmp_path, tokenizer):
    """A head, biases or embeddings that were saved with the adapters cannot be merged."""
    save(with_adapters("llama", torch.float32), tmp_path / "a", tokenizer)
    path = tmp_path / "a" / "adapter_model.safetensors"
    good = load_file(path)
    first, base = min(good), "base_model.model."
    other = {
        f"{base}lm_head.weight": torch.zeros(2, 2),
        f"{base}model.norm.lora_A.weight": torch.zeros(2, 2),
    }
    block = {key.replace(".q_proj", ""): value for key, value in good.items()}
    lone = {key: value for key, value in good.items() if key != first}
    flat = good | {first: torch.zeros(3)}
    for tensors in (*(good | {key: value} for key, value in other.items()), block, lone, flat, {}):
        save_file(tensors, path)
        with pytest.raises(af.UserError, match=r"--adapter .*(are not pairs|no linear layer)"):
            af.merge_adapter(tiny.build("llama"), tmp_path / "a", 1.0)


def test_adapters_of_another_model_are_refused(tmp_path, tokenizer):
    save(with_adapters("llama", torch.float32), tmp_path / "a", tokenizer)
    for other in (tiny.build("bert"), tiny.build("llama", intermediate_size=64)):
        with pytest.raises(af.UserError, match=r"this model has no linear layer model\.layers\.0"):
            af.merge_adapter(other, tmp_path / "a", 1.0)
    with pytest.raises(af.UserError, match="cannot be loaded"):
        af.merge_adapter(tiny.build("llama"), tmp_path / "missing", 1.0)


# ---- The loss of generated text


@pytest.mark.parametrize("architecture", tiny.DECODERS)
def test_the_loss_of_generated_text_is_that_of_the_library(architecture):
    model, features = tiny.build(architecture, torch.float64, 0.2), tiny.written(19)
    batch = af.task_batch(features, 1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    shifted = F.pad(labels, (1, 0), value=af.IGNORE)[:, :-1]  # the library shifts them back
    loss = model(**inputs, labels=shifted).loss
    expected = tiny.gradient_of(loss, model)
    ours = af.task_loss(model, batch)
    assert ours.item() == pytest.approx(loss.item(), abs=1e-6)
    tiny.assert_same(tiny.gradient_of(ours, model), expected, 1e-6)
    logits = af.token_logits(model, inputs, labels != af.IGNORE)
    torch.testing.assert_close(logits, model(**inputs).logits[labels != af.IGNORE])


def test_logits_are_capped_as_the_library_does():
    model = tiny.build("gemma3", spread=0.5, final_logit_softcapping=2.0).eval()
    inputs = random_inputs()
    expected = model(**inputs).logits.flatten(0, 1)
    assert 1 < expected.abs().max() < 2
    everywhere = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    torch.testing.assert_close(af.token_logits(model, inputs, everywhere), expected)


# ---- The gradient of one update, in each schedule


def slow_task_loss(model: nn.Module, features: list[dict]) -> torch.Tensor:
    """Return the mean cross-entropy over the labels; the model reads each example alone."""
    losses = []
    for feature in features:
        logits = model(torch.tensor(feature["input_ids"])[None]).logits[0]
        for position, label in enumerate(feature["labels"].tolist()):
            if label != af.IGNORE:
                losses.append(-logits[position].log_softmax(0)[label])
    return sum(losses) / len(losses)


def slow_alignment_loss(model: nn.Module, pairs: list[af.Pair], settings: Settings) -> torch.Tensor:
    """Return the contrastive loss, query by query; the model reads each sentence alone."""
    states = [[], []]  # of the English sentences and of their translations, at the layer
    for pair in pairs:
        states[0].append(states_of(model.base_model, pair.source)[settings.layer])
        states[1].append(states_of(model.base_model, pair.target)[settings.layer])
    if settings.unit == "sentence":
        english, other = ([state.mean(0) for state in side] for side in states)
        queries = [(other[k], english[k], english) for k in range(len(pairs))]
    else:
        words = [word for side in states for state in side for word in state[1:]]
        queries = []
        for k, pair in enumerate(pairs):
            for i, j in pair.links:
                ends = states[0][k][1 + i], states[1][k][1 + j]
                for query, target in (ends, ends[::-1]):
                    others = [word for word in words if not torch.equal(word, query)]
                    queries.append((query, target, others))
    losses = []
    for query, target, candidates in queries:
        similar = lambda other: F.cosine_similarity(query, other, 0) / settings.temperature  # noqa: B023, E731
        total = sum(similar(candidate).exp() for candidate in candidates)
        losses.append(-(similar(target).exp() / total).log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("schedule", ["alternate", "during"])
@pytest.mark.parametrize("unit", ["word", "sentence"])
def test_the_gradient_of_an_update_is_the_mean_of_its_micro_batches(
    unit, schedule, accumulate, tokenizer, monkeypatch
):
    """It is the mean of the gradients of its micro-batches; the alignment has none in layer 0.

    `alternate`: the micro-batches are of the task and of the alignment in turn. `during`: each has
    the gradient of the task plus 0.1 times that of the alignment.
    """
    monkeypatch.setattr(af, "projection_head", lambda *_: nn.Identity())
    settings = replace(SENTENCES, strategy="0", schedule=schedule, unit=unit, lr=0.0)
    settings = replace(settings, accumulate=accumulate, epochs=4, realign_batch_size=2)
    model = tiny.build("bert", torch.float64, 0.1) if unit == "word" else with_adapters("llama")
    features = tiny.tagged(4) if unit == "word" else tiny.written(4)  # in one batch
    pairs = distinct_words() if unit == "word" else tiny.text_pairs(8)
    task = tiny.gradient_of(slow_task_loss(model, features), model)
    micro_batches = []
    for start in range(0, 8, 2):
        loss = slow_alignment_loss(model, pairs[start : start + 2], settings)
        aligned = tiny.gradient_of(loss, model)
        for name in aligned:
            if ".layers.0." in name or ".layer.0." in name:
                aligned[name].zero_()
        if schedule == "alternate":
            micro_batches += [task, aligned]
        else:
            micro_batches.append({name: task[name] + 0.1 * aligned[name] for name in task})
    expected = []
    for start in range(0, len(micro_batches), accumulate):
        group = micro_batches[start : start + accumulate]
        expected.append({name: sum(part[name] for part in group) / accumulate for name in task})

    with tiny.updates(model) as updates:
        curves, aligned = finetune(model, tokenizer, features, settings, pairs)
    assert set(curves) == {"task", "align"}
    assert sum(counts["sentences"] for counts in aligned.values()) == 8
    assert len(updates) == len(expected)
    for update, gradient in zip(updates, expected):
        tiny.assert_same(update, gradient, 1e-5)


def distinct_words() -> list[af.Pair]:
    """Return eight pairs of linked words, none of which occurs twice in a batch of two pairs."""
    english, french = tiny.WORDS[:8], tiny.WORDS[8:]
    pairs = []
    for k in range(4):
        pairs.append(af.Pair("fr", english[:4], french[: 3 + k % 2], [(k % 3, 0), (3, 2)]))
        pairs.append(af.Pair("fr", english[4:], french[4:], [(0, 1), (1, k % 2 * 3), (2, 2)]))
    return pairs


def test_an_incomplete_last_update_is_the_mean_of_its_own_micro_batches(tokenizer):
    """Ten micro-batches, four to an update: the third update has two of them."""
    model, features = tiny.build("llama", torch.float64, 0.1), tiny.written(4)
    settings = replace(SENTENCES, epochs=5, accumulate=4, lr=0.0, layer=1)
    pairs = tiny.text_pairs(4)  # the same in every batch
    task = tiny.gradient_of(slow_task_loss(model, features), model)
    aligned = tiny.gradient_of(slow_alignment_loss(model, pairs, settings), model)
    mean = {name: (task[name] + aligned[name]) / 2 for name in task}
    with tiny.updates(model) as updates:
        finetune(model, tokenizer, features, settings, pairs)
    assert len(updates) == 3
    for update in updates:
        tiny.assert_same(update, mean, 1e-5)


def test_the_order_of_batches_in_each_schedule():
    order = [("a", None), (None, "x"), ("b", None), (None, "y")]
    assert list(af.scheduled("alternate", "ab", "xy")) == order
    assert list(af.scheduled("during", "ab", "xy")) == [("a", "x"), ("b", "y")]
    assert list(af.scheduled("before", "ab", "")) == [("a", None), ("b", None)]
    assert list(af.scheduled("none", "ab", "")) == [("a", None), ("b", None)]


@pytest.mark.parametrize("schedule", ["during", "alternate"])
def test_processes_share_out_the_gradient_of_an_update(schedule, tokenizer, monkeypatch):
    """Their gradients add up to that of one process, dropout included."""
    settings = replace(SENTENCES, schedule=schedule, accumulate=4, lr=0.0)
    monkeypatch.setattr(af, "sum_gradients", lambda parameters: None)
    monkeypatch.setattr(af, "gather_objects", lambda value: [value])
    gradients = []
    for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3)):
        monkeypatch.setattr(af, "processes", lambda rank=rank, world=world: (rank, world))
        model = with_adapters("llama", dropout=0.3)
        with tiny.updates(model) as updates:
            finetune(model, tokenizer, tiny.written(16), settings, tiny.text_pairs())
        gradients.append(updates)
    one, *others = gradients
    assert len(one) == {"during": 1, "alternate": 2}[schedule]
    for expected, *shares in zip(one, *others):
        total = {name: sum(share[name] for share in shares) for name in expected}
        tiny.assert_same(total, expected, 1e-9)


@pytest.mark.parametrize("schedule, steps", [("during", 2), ("alternate", 4)])
def test_too_few_sentence_pairs_are_an_error(schedule, steps, tokenizer):
    settings = replace(SENTENCES, schedule=schedule, epochs=2, accumulate=2)
    pairs = iter(tiny.text_pairs(8))  # two batches; the task has four
    model, features = tiny.build("llama"), tiny.written(8)
    with pytest.raises(af.UserError, match=f"no pairs after .* of {steps} steps"):
        finetune(model, tokenizer, features, settings, pairs)


def test_alternating_repeats_with_its_seed_and_not_with_another(tokenizer):
    curves = []
    for seed in (1, 1, 2):
        model = with_adapters("qwen2", torch.float32, dropout=0.2)
        torch.manual_seed(len(curves))  # what was drawn before must not matter
        settings = replace(SENTENCES, seed=seed)
        curves.append(finetune(model, tokenizer, tiny.written(9), settings, tiny.text_pairs())[0])
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize("schedule", ["before", "during", "alternate"])
@pytest.mark.parametrize(
    "architecture, strategy", [("llama", "0"), ("llama with adapters", "1"), ("bert", "emb,1")]
)
def test_checkpointing_changes_no_gradient(architecture, strategy, schedule, tokenizer):
    """Neither of the task nor of the alignment, which freezes layers that are computed twice."""
    settings = replace(SENTENCES, schedule=schedule, strategy=strategy, lr=0.0, accumulate=2)
    features = tiny.tagged(8) if architecture == "bert" else tiny.written(8)
    runs, passes = [], []
    for checkpointing in (False, True):
        if "adapters" in architecture:
            model = with_adapters("llama")
        else:
            model = tiny.build(architecture, torch.float64, 0.1)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        linear, calls = first_linear(model, 1), []
        linear.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with tiny.updates(model) as updates:
            if schedule == "before":
                realign(model, tokenizer, tiny.text_pairs(), 1, settings)
            finetune(model, tokenizer, features, settings, tiny.text_pairs())
        runs.append(updates)
        passes.append(len(calls))
    assert passes[1] == 2 * passes[0]
    assert len(runs[0]) == len(runs[1]) == {"before": 2, "during": 1, "alternate": 2}[schedule]
    for plain, checkpointed in zip(*runs):
        tiny.assert_same(checkpointed, plain, 1e-9)


def first_linear(model: nn.Module, layer: int) -> nn.Linear:
    modules = af.transformer_layers(model.base_model)[layer].modules()
    return next(module for module in modules if isinstance(module, nn.Linear))


# ---- The weights of the lowest validation loss

CHECKS = replace(SENTENCES, strategy="baseline", task="writing", validate=2, batch_size=3)


def test_the_validation_loss_is_the_mean_over_all_labels(tokenizer):
    """Dropout is off meanwhile, and on again in the training that follows."""
    model, features, best = with_adapters("llama", torch.float32, dropout=0.5), tiny.written(7), {}
    stop = af.keep_best(replace(CHECKS, validate=1), model.train(), tokenizer, features, best)
    assert not stop(1)
    assert model.training
    expected = slow_task_loss(model.eval(), features).item()
    assert best["loss"] == pytest.approx(expected, abs=1e-5)


def test_five_checks_without_a_lower_loss_end_the_training_and_the_best_weights_are_kept(
    tokenizer, monkeypatch
):
    losses = [3.0, 2.0, 2.5, 2.0, 2.6, 2.2, 2.9, 1.0]
    model, best, upcoming = with_adapters("llama", torch.float32), {}, iter(losses)
    stop = af.keep_best(CHECKS, model, tokenizer, tiny.written(3), best)  # one batch
    monkeypatch.setattr(af, "task_loss", lambda *_: torch.tensor(next(upcoming)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    weights_of = {}
    for step in itertools.count(1):
        with torch.no_grad():
            for name in trained:
                model.get_parameter(name).add_(0.01)
        weights_of[step] = tiny.weights(model)
        if stop(step):
            break
    assert step == 14
    assert (best["loss"], best["step"], best["losses"]) == (2.0, 4, losses[:7])
    assert best["weights"].keys() == set(trained)  # the base needs no copy
    for name, weight in best["weights"].items():
        assert torch.equal(weight, weights_of[4][name])


def test_a_validation_loss_that_is_not_finite_is_an_error(tokenizer, monkeypatch):
    stop = af.keep_best(CHECKS, tiny.build("llama"), tokenizer, tiny.written(3), {})
    monkeypatch.setattr(af, "task_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(af.UserError, match="validation: the loss is nan"):
        stop(2)


def test_training_ends_early_and_returns_to_the_best_weights_and_saves_them(tokenizer, tmp_path):
    """The learning rate is far too high, so that training only makes the model worse."""
    model, validation = tiny.build("llama", spread=0.1), tiny.written(6)
    settings = replace(CHECKS, validate=1, epochs=5, batch_size=4, lr=0.5, decay="constant")
    settings.save_model, before = tmp_path / "best", tiny.weights(model)
    data = tiny.written(40), validation, iter(()), {}
    results = af.train(settings, model, tokenizer, *data, {})
    best = results["validation"]
    assert len(best["losses"]) == best["step"] + 5 < 50
    assert best["loss"] == pytest.approx(min(best["losses"]), abs=1e-6)
    assert slow_task_loss(model.eval(), validation).item() == pytest.approx(best["loss"], abs=1e-5)
    assert json.dumps(results)  # nothing is left that a record cannot hold
    saved = load_file(tmp_path / "best/model.safetensors")
    assert saved.keys() == before.keys() == tiny.moved(before, model)
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in saved.items())


# ---- Generation


@pytest.mark.parametrize("architecture", tiny.DECODERS)
@pytest.mark.parametrize("adapters", [False, True])
def test_generated_text_consists_of_the_most_probable_tokens(architecture, adapters):
    """The reference is a loop of full forward passes over each prompt alone."""
    tokenizer = tiny.make_tokenizer("<s> $A", "right")
    model = tiny.build(architecture, spread=0.5)
    if adapters:
        model = with_adapters(architecture, torch.float32)
    model.eval()
    own = model.generation_config
    own.update(do_sample=True, temperature=3.0, top_k=2, num_beams=2)
    prompts = [row["input_ids"][: k + 1] for k, row in enumerate(tiny.written(6))]
    expected = []
    for prompt in prompts:
        ids = prompt.tolist()
        for _ in range(12):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == model.config.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert af.generate(model, tokenizer, prompts, 12) == expected
    assert model.generation_config is own and own.do_sample  # --save-model writes it
    assert len({len(prompt) for prompt in prompts}) > 3 and len(set(expected)) > 2


def test_generation_ends_at_the_end_token():
    """Here this token is always the most probable one."""
    tokenizer, model = tiny.make_tokenizer("<s> $A"), tiny.build("llama").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.model.norm.weight.zero_()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    prompts = [np.array([0, 5, 6]), np.array([0, 7])]
    for end, count in ((3, 5), (0, 1)):  # 0 is the first of equal logits
        model.config.eos_token_id = model.generation_config.eos_token_id = end
        passes.clear()
        assert af.generate(model, tokenizer, prompts, 5) == ["", ""]
        assert len(passes) == count


def test_no_more_is_generated_than_the_model_reads():
    """If positions are learned, there is no vector for a further one."""
    tokenizer, model = tiny.make_tokenizer("<s> $A"), tiny.build("llama", spread=0.5).eval()
    model.generation_config.eos_token_id = None
    prompts, written = [np.array([0, 5, 6])], []
    for longest in (3, 4, 5, 99):
        tokenizer.model_max_length = longest
        written.append(len(af.generate(model, tokenizer, prompts, 3)[0].split()))
    assert written == [1, 1, 2, 3]


def test_generated_text_is_scored_in_the_order_of_the_examples(tokenizer, monkeypatch):
    """It is generated in batches of similar length."""
    features, scored, batches = tiny.written(80), [], []

    def echo(model, tokenizer, prompts, new_tokens):
        batches.append([len(prompt) for prompt in prompts])
        return [str(prompt.tolist()) for prompt in prompts]

    def score(examples, features, outputs):
        scored.append(outputs)
        return {"f1": 0.5}

    monkeypatch.setattr(af, "generate", echo)
    task = SimpleNamespace(new_tokens=4, score=score)
    model = tiny.build("llama")
    assert af.evaluate(model, tokenizer, task, features, features, CHECKS) == {"f1": 0.5}
    assert scored == [[str(row["input_ids"].tolist()) for row in features]]
    assert len(batches) > 1
    assert list(itertools.chain(*batches)) == sorted(len(row["input_ids"]) for row in features)


def test_a_frozen_head_is_not_copied_for_every_prompt():
    """A product with a view that has gaps would copy it, (prompts, hidden, vocabulary)."""
    tokenizer, model = (
        tiny.make_tokenizer("<s> $A"),
        tiny.build("llama").eval().requires_grad_(False),
    )
    prompts = [row["input_ids"] for row in tiny.written(6)]
    head = model.get_output_embeddings().weight
    with torch.profiler.profile(record_shapes=True) as profile, torch.inference_mode():
        af.generate(model, tokenizer, prompts, 3)
    products = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert not [shapes for shapes in products if len(head) in shapes[1]]
