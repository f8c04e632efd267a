"""Middle-layer alignment: sentences as mean vectors, low-rank adapters, tasks and alignment in turn.

What the library or PEFT computes as well is compared with theirs.
"""

import itertools
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForTokenClassification

import alignfreeze as af
from alignfreeze import Alignment, LoraLinear, Training, add_lora, finetune, realign

MODELS = [*tiny.DECODERS, "bert"]
SENTENCES = Alignment(unit="sentence", layer=2, batch_size=4)
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj query key value dense".split()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer("<s> $A")


@pytest.fixture
def peft(monkeypatch):
    """The library, which looks for nothing on the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def writing(monkeypatch):
    """A task that generates, of this name."""
    task = af.Task(af.Generator, None, None, None, [], new_tokens=4)
    monkeypatch.setitem(af.TASKS, "writing", task)


# ---- a sentence is the mean of its hidden states


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sentence_is_the_mean_of_the_librarys_hidden_states(architecture, side):
    """Of every layer; the library reads each sentence alone, without padding."""
    model = tiny.build(architecture, torch.float64, 0.2).base_model.eval()
    tokenizer, pairs = tiny.make_tokenizer("<s> $A", side), tiny.text_pairs(6)
    texts = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    expected = []
    for text in texts:
        ids = torch.tensor([[0, *map(tiny.VOCABULARY.index, text.split())]])
        expected.append(model(ids, output_hidden_states=True).hidden_states)
    for pool_first in (True, False):
        how = SENTENCES._replace(pool_first=pool_first)
        batch = af.encode_texts(tokenizer, pairs, how, buckets=3)
        for layer in range(-1, tiny.LAYERS + 1):
            hidden = [
                af.hidden_state(model, part, layer) for part in af.with_embeddings(model, batch.inputs)
            ]
            found = af.vectors_of(hidden, batch, how)
            means = torch.stack([states[layer][0, 1 - pool_first :].mean(0) for states in expected])
            torch.testing.assert_close(found.double(), means, atol=2e-6, rtol=1e-5)
        assert torch.equal(batch.queries, torch.arange(6, 12))  # the other language
        assert torch.equal(batch.targets, torch.arange(6)) and torch.equal(
            batch.candidates, batch.targets
        )


def test_a_sentence_of_nothing_but_its_first_position_is_no_division_by_zero(tokenizer):
    pairs = [af.Pair("de", "", "le chat"), af.Pair("de", "the", "chat")]
    batch = af.encode_texts(tokenizer, pairs, SENTENCES)
    model = tiny.build("llama").base_model
    hidden = [af.hidden_state(model, part, 2) for part in batch.inputs]
    empty = af.vectors_of(hidden, batch, SENTENCES._replace(pool_first=False))[0]
    assert torch.equal(empty, torch.zeros(tiny.HIDDEN))


def test_a_sentence_without_any_subword_is_a_lone_token_for_padding():
    tokenizer = tiny.make_tokenizer("$A")
    batch = af.encode_texts(
        tokenizer, [af.Pair("de", "", "le chat"), af.Pair("de", "the", "")], SENTENCES
    )
    assert batch.inputs[0]["input_ids"][0].tolist() == [tokenizer.pad_token_id, tokenizer.pad_token_id]
    assert batch.inputs[0]["attention_mask"].sum(1).tolist() == [1, 1, 1, 2]


def test_sentence_alignment_changes_no_layer_above_and_nothing_frozen(tokenizer):
    for architecture in MODELS:
        model = tiny.build(architecture)
        before = tiny.weights(model)
        how = SENTENCES._replace(frozen="0")
        losses, seen = realign(model, tokenizer, tiny.text_pairs(), 5, how, Training(lr=1e-2))
        parts = {next(filter(str.isdigit, name.split(".")), "emb") for name in tiny.moved(before, model)}
        assert parts == {"emb", "1"}
        assert seen["de"]["sentences"] + seen["fr"]["sentences"] == 20 and list(losses) == ["realign"]


def test_alignment_brings_sentences_together(tokenizer):
    model, pairs = tiny.build("llama", spread=0.1), tiny.text_pairs(8)
    how = SENTENCES._replace(batch_size=8, pool_first=False)
    found = lambda: af.retrieval(model, tokenizer, pairs, how)["retrieval"][2]  # noqa: E731
    before = found()
    realign(model, tokenizer, pairs, 40, how, Training(lr=1e-2))
    assert before < 0.6 and found() == 1


@pytest.mark.parametrize("unit", ["word", "sentence"])
@pytest.mark.parametrize("frozen, layer", [("emb,front", 2), ("emb,0-3", 4), ("emb", 0)])
def test_where_nothing_below_the_layer_trains_nothing_is_aligned(frozen, layer, unit, tokenizer):
    """With words a projection would train, and be thrown away."""
    how = SENTENCES._replace(frozen=frozen, layer=layer, unit=unit)
    pairs = tiny.word_pairs() if unit == "word" else tiny.text_pairs()
    model = tiny.build("bert")
    with pytest.raises(af.UserError, match=f"nothing (below layer {layer} )?trains"):
        realign(model, tokenizer, pairs, 1, how)
    options = {"schedule": "alternate", "pairs": pairs, "how": how, "batch_size": 4}
    with pytest.raises(af.UserError, match=f"nothing below layer {layer} trains"):
        finetune(model, tokenizer, tiny.tagged(8), 1, Training(), **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_everything_frozen_is_a_users_error(tokenizer):
    model = tiny.build("llama")
    model.requires_grad_(False)
    with pytest.raises(af.UserError, match="nothing trains"):
        realign(model, tokenizer, tiny.text_pairs(), 1, SENTENCES)


@pytest.mark.parametrize(
    "flags, refused",
    [
        ("--strategy emb,front --layer 2", True),
        ("--strategy emb,front --layer 3", False),
        ("--strategy front --layer 2", False),  # the embeddings train
        ("--strategy front --layer 2 --lora 2", True),  # with adapters they do not
        ("--strategy back --layer 2 --lora 2", False),
        ("--strategy full --layer 0 --lora 2", True),
        ("--strategy baseline --layer 0 --lora 2", False),
    ],
)
def test_such_a_run_is_refused_before_anything_is_computed(flags, refused, tmp_path):
    args = af.parse_args(["--data-dir", str(tmp_path), "--out", str(tmp_path), *flags.split()])
    af.settle(args)
    try:
        af.check_flags(args, tiny.CONFIGS["bert"], 512)
        problem = ""
    except af.UserError as error:
        problem = str(error)
    assert ("nothing below --layer" in problem) == refused


# ---- low-rank adapters


def with_adapters(
    architecture: str, dtype=torch.float64, seed: int = 1, dropout: float = 0.0
) -> nn.Module:
    """A model whose adapters, of rank 3 and alpha 6, are no longer zero."""
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
    linear = 0  # of the blocks
    for module in af.transformer_layers(tiny.build(architecture).base_model).modules():
        linear += isinstance(module, nn.Linear)
    assert len(adapters) == 2 * linear
    head = {name for name in trained if ".lora_" not in name}
    inside = {name for name, _ in model.base_model.named_parameters(model.base_model_prefix)}
    assert not head & inside
    assert bool(head) == (architecture not in tiny.DECODERS)


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


def test_adapters_that_are_wider_than_the_weights_keep_the_dtype_of_the_hidden_states():
    """In bf16 the base has half the bits; the adapters, like PEFT's, are fp32."""
    model = tiny.build("llama", torch.bfloat16)
    add_lora(model, 3, 6.0, 0.0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**random_inputs()).logits.dtype == torch.bfloat16


def test_what_trains_is_fp32_and_what_stays_is_bf16(world):
    """The classifier of an encoder too: a rate of 2e-5 does not move a bf16 weight."""
    flags = ["--model", str(world / "models/bert"), "--lora", "2", "--precision", "bf16"]
    args = af.parse_args([*flags, "--device", "cpu"])
    tokenizer, _ = af.load_tokenizer(args.model)
    model = af.build_model(args, tokenizer)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    stays = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert (trained, stays) == ({torch.float32}, {torch.bfloat16})
    training = Training(lr=1e-3, precision="bf16")
    features = tiny.tagged(8)
    before = tiny.weights(model)
    finetune(model, tokenizer, features, 1, training, batch_size=4)
    assert tiny.moved(before, model) == {name for name, p in model.named_parameters() if p.requires_grad}
    found = af.evaluate(model, tokenizer, af.TASKS["udpos"], [], features, precision="bf16")
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("schedule", ["before", "alternate", "during"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_no_weight_of_the_base_moves_in_training(architecture, schedule, tokenizer):
    model = with_adapters(architecture, torch.float32, dropout=0.1)
    features = tiny.written(9) if architecture == "llama" else tiny.tagged(9)
    before = tiny.weights(model)
    training = Training(lr=1e-2, clip=1.0)
    if schedule == "before":
        realign(model, tokenizer, tiny.text_pairs(), 3, SENTENCES, training)
        below = {name for name in before if ".lora_" in name and (".0." in name or ".1." in name)}
        assert tiny.moved(before, model) == below
    options = {"schedule": schedule, "pairs": tiny.text_pairs(), "how": SENTENCES, "batch_size": 4}
    finetune(model, tokenizer, features, 1, training, **options)
    expected = {name for name in before if ".lora_" in name or name.startswith("classifier")}
    assert tiny.moved(before, model) == expected


def test_frozen_adapters_stay_and_train_again_afterwards(tokenizer):
    model = with_adapters("llama", torch.float32)
    before, trained = tiny.weights(model), {n for n, p in model.named_parameters() if p.requires_grad}
    how = SENTENCES._replace(frozen="emb,1")
    realign(model, tokenizer, tiny.text_pairs(), 2, how, Training(lr=1e-2))
    moved = tiny.moved(before, model)
    assert moved and all(".layers.0." in name and ".lora_" in name for name in moved)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def save(model: nn.Module, folder: Path, tokenizer) -> None:
    """As a run with --save-model does it."""
    task = "udpos" if isinstance(model, BertForTokenClassification) else "writing"
    argv = ["--model", "base", "--task", task, "--lora", "3", "--lora-alpha", "6", "--lora-dropout", "0"]
    af.save_model(af.parse_args([*argv, "--save-model", str(folder)]), model, tokenizer)


@pytest.mark.parametrize("architecture", MODELS)
def test_peft_loads_what_is_written_and_what_peft_writes_is_merged(
    architecture, tmp_path, tokenizer, peft
):
    """Of an encoder, as without adapters, what is written is the encoder alone, without its classifier."""
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


def test_a_merged_weight_has_the_scaled_product_added(tmp_path, tokenizer):
    model, merged = with_adapters("llama", torch.float32), tiny.build("llama", spread=0.1)
    save(model, tmp_path / "a", tokenizer)
    af.merge_adapter(merged, tmp_path / "a", 0.25)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            change = 0.25 * 6 / 3 * module.lora_B.weight @ module.lora_A.weight
            expected = module.base_layer.weight + change
            torch.testing.assert_close(merged.get_submodule(name).weight, expected)


def test_adapters_merged_with_weights_are_pefts_weighted_sum_of_their_products(
    tmp_path, tokenizer, peft
):
    for seed in (1, 2):
        save(with_adapters("llama", torch.float32, seed), tmp_path / str(seed), tokenizer)
    base = tiny.build("llama", spread=0.1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "1", adapter_name="1")
    theirs.load_adapter(tmp_path / "2", adapter_name="2")
    theirs.add_weighted_adapter(["1", "2"], [0.7, 0.4], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    theirs = theirs.merge_and_unload()
    ours = tiny.build("llama", spread=0.1)
    before = tiny.weights(ours)
    for seed, weight in ((1, 0.7), (2, 0.4)):
        af.merge_adapter(ours, tmp_path / str(seed), weight)
    assert len(tiny.moved(before, ours)) == 7 * tiny.LAYERS
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "not plain low-rank adapters .*use_dora"),
        ({"use_rslora": True}, "not plain low-rank adapters"),
        ({"rank_pattern": {"q_proj": 2}}, "not plain low-rank adapters"),
        ({"peft_type": "LOHA"}, "not plain low-rank adapters .*LOHA"),
    ],
)
def test_adapters_of_another_kind_are_refused(change, message, tmp_path, tokenizer):
    folder = tmp_path / "a"
    save(with_adapters("llama", torch.float32), folder, tokenizer)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(af.UserError, match=message):
        af.merge_adapter(tiny.build("llama"), folder, 1.0)


@pytest.mark.parametrize("change", [{"r": 0}, {"r": "3"}, {"r": None}, {"lora_alpha": None}, {"r": 7}])
def test_adapters_of_no_scale_or_another_rank_are_refused(change, tmp_path, tokenizer):
    save(with_adapters("llama", torch.float32), tmp_path / "a", tokenizer)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(af.UserError, match=r"--adapter .*(cannot be read|no linear layer)"):
        af.merge_adapter(tiny.build("llama"), tmp_path / "a", 1.0)
    path.write_text("[]", "utf-8")
    with pytest.raises(af.UserError, match="cannot be read"):
        af.merge_adapter(tiny.build("llama"), tmp_path / "a", 1.0)


def test_tensors_that_are_no_pairs_beside_linear_layers_are_refused(tmp_path, tokenizer):
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
        with pytest.raises(af.UserError, match=r"--adapter .*(not all pairs|no linear layer)"):
            af.merge_adapter(tiny.build("llama"), tmp_path / "a", 1.0)


def test_adapters_of_another_model_are_refused(tmp_path, tokenizer):
    save(with_adapters("llama", torch.float32), tmp_path / "a", tokenizer)
    for other in (tiny.build("bert"), tiny.build("llama", intermediate_size=64)):
        with pytest.raises(af.UserError, match=r"this model has no linear layer model\.layers\.0"):
            af.merge_adapter(other, tmp_path / "a", 1.0)
    with pytest.raises(af.UserError, match="cannot be read"):
        af.merge_adapter(tiny.build("llama"), tmp_path / "missing", 1.0)


# ---- the task's loss, at the targets only


@pytest.mark.parametrize("architecture", tiny.DECODERS)
@pytest.mark.parametrize("parts", [1, 3])
def test_the_loss_of_the_targets_is_the_librarys(architecture, parts):
    model, features = tiny.build(architecture, torch.float64, 0.2), tiny.written(7)
    whole = af.task_batch(features, 1)
    (inputs,), (labels,) = whole.inputs, whole.labels
    shifted = F.pad(labels, (1, 0), value=af.IGNORE)[:, :-1]  # the library shifts them back
    loss = model(**inputs, labels=shifted).loss
    expected = loss.item(), tiny.gradient_of(loss, model)
    loss = af.task_loss(model, af.task_batch(features, 1, parts))
    assert loss.item() == pytest.approx(expected[0], abs=1e-6)
    tiny.assert_same(tiny.gradient_of(loss, model), expected[1], 1e-6)
    wanted = labels != af.IGNORE
    logits = af.token_logits(model, inputs, wanted)
    torch.testing.assert_close(logits, model(**inputs).logits[wanted])


def test_logits_are_capped_as_the_library_does():
    model = tiny.build("gemma3", spread=0.5, final_logit_softcapping=2.0).eval()
    inputs = random_inputs()
    expected = model(**inputs).logits
    assert 1 < expected.abs().max() < 2
    torch.testing.assert_close(
        af.token_logits(model, inputs, inputs["input_ids"] > 0), expected.flatten(0, 1)
    )


# ---- tasks and alignment in turn


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("frozen", ["none", "0"])
@pytest.mark.parametrize("adapters", [False, True])
def test_an_update_has_the_mean_gradient_of_task_and_alignment_in_turn(
    accumulate, frozen, adapters, tokenizer, monkeypatch
):
    model = with_adapters("llama") if adapters else tiny.build("llama", torch.float64, 0.1)
    features, pairs = tiny.written(20), tiny.text_pairs(10)
    how, training = SENTENCES._replace(frozen=frozen), Training(lr=0.0, accumulate=accumulate)
    gradients = []
    task = af.task_batches(tokenizer, features, 1, 4, training.seed, "cpu")
    for examples, sentences in zip(task, af.alignment_batches(tokenizer, pairs, how)):
        gradients.append(tiny.gradient_of(af.task_loss(model, examples), model))
        loss = af.alignment_loss(model.base_model, nn.Identity(), sentences, how)
        aligned = tiny.gradient_of(loss, model)
        for name in aligned:
            if frozen == "0" and ".layers.0." in name:
                aligned[name].zero_()
        gradients.append(aligned)
    expected = []
    for start in range(0, 10, accumulate):
        group = gradients[start : start + accumulate]
        expected.append({name: sum(one[name] for one in group) / len(group) for name in group[0]})

    order = []
    for name in ("task_loss", "alignment_loss"):
        real = getattr(af, name)
        monkeypatch.setattr(af, name, lambda *a, n=name, f=real: order.append(n.split("_")[0]) or f(*a))
    options = {"batch_size": 4, "schedule": "alternate", "pairs": pairs, "how": how}
    with tiny.updates(model) as found:
        losses, seen = finetune(model, tokenizer, features, 1, training, **options)
    assert order == ["task", "alignment"] * 5
    assert list(losses) == ["task", "align"] and seen["de"]["sentences"] == 10
    assert len(found) == len(expected) == {1: 10, 4: 3}[accumulate]
    for one, other in zip(found, expected):
        tiny.assert_same(one, other, 1e-6)


def test_alternating_repeats_with_its_seed_and_draws_anew_with_another(tokenizer):
    curves = []
    for seed in (1, 1, 2):
        model = with_adapters("qwen2", torch.float32, dropout=0.2)
        torch.manual_seed(len(curves))  # whatever was drawn before
        options = {
            "batch_size": 4,
            "schedule": "alternate",
            "pairs": tiny.text_pairs(),
            "how": SENTENCES,
        }
        training = Training(lr=1e-2, seed=seed)
        curves.append(finetune(model, tokenizer, tiny.written(9), 2, training, **options)[0])
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize("schedule", ["before", "alternate"])
def test_checkpointing_computes_the_same_gradients(schedule, tokenizer):
    runs = []
    for checkpointing in (False, True):
        model = with_adapters("llama", torch.float64)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        options = {"batch_size": 4, "schedule": schedule, "pairs": tiny.text_pairs(), "how": SENTENCES}
        with tiny.updates(model) as found:
            realign(model, tokenizer, tiny.text_pairs(), 1, SENTENCES, Training(lr=0.0))
            finetune(model, tokenizer, tiny.written(8), 1, Training(lr=0.0), **options)
        runs.append(found)
    assert len(runs[0]) == {"before": 3, "alternate": 5}[schedule]
    for one, other in zip(*runs):
        tiny.assert_same(one, other, 1e-6)


# ---- the weights of the lowest validation loss


def checks(**more) -> Namespace:
    return Namespace(**{"validate": 2, "batch_size": 3, "precision": "fp32"} | more)


def test_the_validation_loss_is_the_mean_over_all_target_tokens(tokenizer):
    """Without dropout, which goes on afterwards."""
    model, features, best = with_adapters("llama", torch.float32, dropout=0.5), tiny.written(7), {}
    stop = af.keep_best(checks(validate=1), model.train(), tokenizer, features, best)
    assert not stop(1) and model.training
    model.eval()
    total = count = 0
    for row in features:
        logits = model(torch.tensor(row["input_ids"])[None]).logits[0]
        total += F.cross_entropy(logits, torch.tensor(row["labels"]), reduction="sum").item()
        count += (row["labels"] != af.IGNORE).sum()
    assert best["loss"] == pytest.approx(total / count, abs=1e-5)


def test_the_weights_of_the_lowest_validation_loss_are_kept_and_five_checks_without_stop(
    tokenizer, monkeypatch
):
    losses = [3.0, 2.0, 2.5, 2.0, 2.6, 2.2, 2.9, 1.0]
    model, best, asked = with_adapters("llama", torch.float32), {}, iter(losses)
    features = tiny.written(3)  # one batch
    stop = af.keep_best(checks(), model, tokenizer, features, best)
    monkeypatch.setattr(af, "task_loss", lambda *_: torch.tensor(next(asked)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    base, kept = tiny.weights(model), None
    for step in itertools.count(1):
        with torch.no_grad():
            for name in trained:
                model.get_parameter(name).add_(0.01)
        if step == 4:
            kept = tiny.weights(model)
        if stop(step):
            break
    assert step == 14 and best["losses"] == losses[:7]
    af.load_best(model, best)
    assert (best["loss"], best["step"]) == (2.0, 4) and "weights" not in best
    assert json.dumps(best)  # it goes into the record
    assert tiny.moved(kept, model) == set() and tiny.moved(base, model) == set(trained)


def test_a_validation_loss_that_is_not_finite_ends_the_training(tokenizer, monkeypatch):
    stop = af.keep_best(checks(), tiny.build("llama"), tokenizer, tiny.written(3), {})
    monkeypatch.setattr(af, "task_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(af.UserError, match="validation: the loss is nan"):
        stop(2)


def test_training_stops_when_validation_gets_no_better_and_keeps_the_best(tokenizer):
    """At a rate that is far too high, training only makes it worse."""
    model, best = tiny.build("llama", spread=0.1), {}
    stop = af.keep_best(checks(validate=1), model, tokenizer, tiny.written(6), best)
    training = Training(lr=0.5, decay="constant")
    finetune(model, tokenizer, tiny.written(40), 5, training, batch_size=4, stop=stop)
    assert len(best["losses"]) == best["step"] + 5 < 50
    expected = best["loss"]
    assert expected == pytest.approx(min(best["losses"]), abs=1e-6)
    af.load_best(model, best)
    again = {}
    af.keep_best(checks(validate=1), model, tokenizer, tiny.written(6), again)(1)
    assert again["loss"] == pytest.approx(expected, abs=1e-6)


# ---- generation


@pytest.mark.parametrize("architecture", tiny.DECODERS)
@pytest.mark.parametrize("adapters", [False, True])
def test_generated_text_is_the_likeliest_token_again_and_again(architecture, adapters):
    """A loop of full forward passes over each prompt alone; prompts of one batch differ in length."""
    tokenizer = tiny.make_tokenizer("<s> $A", "right")
    model = tiny.build(architecture, spread=0.5)
    if adapters:
        model = with_adapters(architecture, torch.float32)
    model.eval()
    model.generation_config.update(
        do_sample=True, temperature=3.0, top_k=2, num_beams=2
    )  # a model's own
    prompts = [row["input_ids"][: k + 1] for k, row in enumerate(tiny.written(6))]
    expected, ended = [], 0
    for prompt in prompts:
        ids = prompt.tolist()
        for _ in range(12):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == model.config.eos_token_id:
                ended += 1
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert af.generate(model, tokenizer, prompts, 12) == expected
    assert len({len(prompt) for prompt in prompts}) > 3 and len(set(expected)) > 2


def test_generation_ends_at_the_end_token():
    """Every answer ends at once when that token is always the likeliest."""
    tokenizer, model = tiny.make_tokenizer("<s> $A"), tiny.build("llama").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.model.norm.weight.zero_()
    model.config.eos_token_id = model.generation_config.eos_token_id = 0  # the first of equal logits
    assert af.generate(model, tokenizer, [np.array([0, 5, 6]), np.array([0, 7])], 5) == ["", ""]


def test_no_more_is_generated_than_the_model_reads():
    """Where positions are learned, there are no more of them."""
    tokenizer, model = tiny.make_tokenizer("<s> $A"), tiny.build("llama", spread=0.5).eval()
    model.generation_config.eos_token_id = None
    prompts, written = [np.array([0, 5, 6])], []
    for longest in (3, 4, 5, 99):
        tokenizer.model_max_length = longest
        written.append(len(af.generate(model, tokenizer, prompts, 3)[0].split()))
    assert written == [1, 1, 2, 3]


def test_a_batch_of_examples_is_evaluated_in_their_order(tokenizer, monkeypatch):
    """Prompts are generated sorted by length, and scored in the order that they came in."""
    model, features, scored = tiny.build("llama", spread=0.5), tiny.written(7), []
    task = Namespace(new_tokens=4, score=lambda *given: scored.append(given[2]) or {"f1": 0.5})
    rows = [{"input_ids": row["input_ids"][:-2]} for row in features]
    found = af.evaluate(model, tokenizer, task, features, rows, batch_size=3)
    assert found == {"f1": 0.5}
    assert scored[0] == [af.generate(model, tokenizer, [row["input_ids"]], 4)[0] for row in rows]


def test_a_frozen_head_is_not_copied_for_every_prompt():
    """A matrix product of a view with gaps would expand the head to (prompts, hidden, vocabulary)."""
    tokenizer, model = tiny.make_tokenizer("<s> $A"), tiny.build("llama").eval().requires_grad_(False)
    prompts = [row["input_ids"] for row in tiny.written(6)]
    head = model.get_output_embeddings().weight
    with torch.profiler.profile(record_shapes=True) as profile, torch.inference_mode():
        af.generate(model, tokenizer, prompts, 3)
    products = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert not [shapes for shapes in products if len(head) in shapes[1]]
