"""The script computes every architecture as the library does, or refuses it in one clear error.

The expected values come from slow and obvious computations with the library alone: one sentence at
a time, without padding, with all hidden states and all logits. Nothing here is trained or
downloaded; `architectures.py` makes the models and the tokenizers.
"""

import datetime
import functools
import json
import re
import tempfile
from pathlib import Path

import architectures
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from architectures import DECODERS, ENCODERS, LAYERS, SENTENCES

import alignfreeze as af

ALL = [*ENCODERS, *DECODERS]
SEVERAL_STREAMS = "Gemma 3n text"  # four hidden states for each subword
FOLDER = tempfile.TemporaryDirectory(prefix="alignfreeze-architectures-")
CPU = torch.device("cpu")
transformers.utils.logging.disable_progress_bar()
# A model's own generation_config may ask for this, but no answer may depend on it.
SAMPLING = {
    "do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.7, "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1, "min_new_tokens": 5, "renormalize_logits": True,
}  # fmt: skip


@functools.cache
def folder_of(name: str) -> str:
    """Return the folder of a saved model."""
    folder = architectures.save(name, Path(FOLDER.name) / name)
    if name in DECODERS:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | SAMPLING))
    return str(folder)


def settings_of(name: str, **changed) -> af.Settings:
    task = "massive" if name in DECODERS else "udpos"
    return af.Settings(**{"model": folder_of(name), "task": task} | changed)


@functools.cache
def tokenizer_of(name: str):
    return af.load_tokenizer(folder_of(name), generates=name in DECODERS)[0]


def build(name: str, **changed):
    """Return the model of a run, as the script loads it."""
    return af.build_model(settings_of(name, **changed), tokenizer_of(name), CPU).eval()


@functools.cache
def model_of(name: str):
    """Return a model that no test may change."""
    return build(name)


def id_rows(name: str, lengths=(9, 3, 12, 5, 7, 2, 11, 4, 8, 6)) -> list[np.ndarray]:
    """Return rows of subword ids of uneven length, more than the groups of `by_length`."""
    random, tokenizer = np.random.default_rng(4), tokenizer_of(name)
    special = set(tokenizer.all_special_ids)
    ids = [number for number in range(len(tokenizer)) if number not in special]
    return [random.choice(ids, length) for length in lengths]


def one_by_one(model, rows: list[np.ndarray], **options) -> list:
    """Return the outputs of the library for each row, without padding."""
    return [model(input_ids=torch.tensor(row[None]), **options) for row in rows]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = expected.abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1, largest))


# ---- Words and subwords


def is_blank(token: str) -> bool:
    return token in ("▁", "Ġ")


def is_unigram(tokenizer) -> bool:
    return type(tokenizer.backend_tokenizer.model).__name__ == "Unigram"


@pytest.mark.parametrize("name", ALL)
def test_the_subwords_of_a_list_of_words_are_those_of_the_text(name):
    """A beginning of the text tells which subwords belong to its last word."""
    tokenizer = tokenizer_of(name)
    windows = af.encode_words(tokenizer, SENTENCES, 200)
    for words, window in zip(SENTENCES, windows):
        texts = [" ".join(words[: k + 1]) for k in range(len(words))]
        whole = tokenizer(texts[-1])["input_ids"]
        inner = tokenizer(texts[-1], add_special_tokens=False)["input_ids"]
        start = next(k for k in range(len(whole)) if whole[k : k + len(inner)] == inner)
        numbers = [-1] * start
        for k, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids == inner[: len(ids)]
            numbers += [k] * (start + len(ids) - len(numbers))
        numbers += [-1] * (len(whole) - len(numbers))
        expected, seen = [], {-1}
        tokens = tokenizer.convert_ids_to_tokens(whole)
        for k, (number, token) in enumerate(zip(numbers, tokens)):
            is_lone = number >= 0 and is_blank(token) and number in numbers[k + 1 :]
            if is_lone and is_unigram(tokenizer):  # as the authors do with XLM-R
                continue
            expected.append((whole[k], number, not is_lone and number not in seen))
            seen |= set() if is_lone else {number}
        assert list(zip(*map(np.ndarray.tolist, window[1:]))) == expected
        assert sum(window.first) == len(words)


@pytest.mark.parametrize("name", ["mmBERT", "EuroBERT", "Llama 2", "Llama 3", "Qwen 3", "Gemma 3"])
def test_numbers_keep_the_blanks_before_them(name):
    """Without them, two numbers would be read as one."""
    tokenizer = tokenizer_of(name)
    sentences = [["a", "5", "35", "."], ["a", "535", "."]]
    two, one = af.encode_words(tokenizer, sentences, 96)
    for words, window in zip(sentences, (two, one)):
        assert window.ids.tolist() == tokenizer(" ".join(words))["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(window.ids[window.first])
        assert [token.lstrip("▁Ġ")[0] for token in tokens] == [word[0] for word in words]
    assert two.ids.tolist() != one.ids.tolist()


@pytest.mark.parametrize("name", ["BERT", "XLM-R", "mmBERT", "Llama 3", "Gemma 3"])
def test_a_tokenizer_that_cuts_and_pads_by_default_does_neither_here(name, tmp_path):
    """The tokenizer files of sentence encoders ask for both."""
    plain = tokenizer_of(name)
    for path in Path(folder_of(name)).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": plain.pad_token_id, "pad_type_id": 0, "pad_token": plain.pad_token,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.truncation
    tokenizer, _ = af.load_tokenizer(str(tmp_path), generates=name in DECODERS)
    windows = zip(*(af.encode_words(one, SENTENCES, 60) for one in (tokenizer, plain)))
    for found, expected in windows:
        assert all(np.array_equal(a, b) for a, b in zip(found, expected))
    pairs = [af.Pair("fr", "a cat", " ".join(words)) for words in SENTENCES]
    found, expected = (af.encode_texts(one, pairs, 9) for one in (tokenizer, plain))
    for key, tensor in expected.inputs.items():
        assert torch.equal(found.inputs[key], tensor)


@pytest.mark.parametrize("name", ["XLM-R", "Llama 3"])
def test_a_long_text_loses_its_end_whatever_side_its_tokenizer_prefers(name, tmp_path):
    tokenizer = tokenizer_of(name)
    for path in Path(folder_of(name)).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation_side": "left"}))
    other, _ = af.load_tokenizer(str(tmp_path), generates=name in DECODERS)
    pairs = [af.Pair("fr", "a cat", " ".join(words)) for words in SENTENCES]
    found, expected = (af.encode_texts(one, pairs, 9) for one in (other, tokenizer))
    assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])


@pytest.mark.parametrize("missing", [0, 1])
def test_a_token_that_no_text_needs_may_be_without_an_embedding(missing, tmp_path):
    """The tokenizer of Gemma 3 has one for images, which the models of text alone do not know."""
    tokenizer = architectures.gemma()
    size = {"vocab_size": len(tokenizer) - missing}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    config = architectures.configuration("gemma3_text", architectures.GEMMA | size, tokenizer)
    if missing:
        message = f"ids up to .*, but the model has {size['vocab_size']} embeddings"
        refused_when_loaded(config, tokenizer, True, message, tmp_path)
    else:
        config.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        af.load_tokenizer(str(tmp_path), generates=True)


# ---- Hidden states


ALIGNED = [name for name in ALL if name != SEVERAL_STREAMS]


@pytest.mark.parametrize("name", ALIGNED)
@torch.no_grad()
def test_hidden_states_are_the_librarys_at_every_layer(name):
    encoder, rows = model_of(name).base_model, id_rows(name)
    outputs = one_by_one(encoder, rows, output_hidden_states=True)
    batch = af.pad_inputs(rows, tokenizer_of(name).pad_token_id, "cpu")
    for layer in range(-LAYERS - 1, LAYERS + 1):
        together = af.run_to_layer(encoder, batch, layer)
        grouped = af.hidden_state(encoder, batch, layer)
        assert together.shape == grouped.shape == (len(rows), 12, 32)
        for k, output in enumerate(outputs):
            expected = output.hidden_states[layer][0]
            assert_close(together[k, : len(expected)], expected)
            assert_close(grouped[k, : len(expected)], expected)


@pytest.mark.parametrize("name", ALIGNED)
@torch.no_grad()
def test_no_layer_above_is_computed(name):
    encoder, rows = model_of(name).base_model, id_rows(name)
    batch = af.pad_inputs(rows, tokenizer_of(name).pad_token_id, "cpu")
    computed, hooks = set(), []
    for k, layer in enumerate(af.transformer_layers(encoder)):
        hook = layer.register_forward_hook(lambda *_, number=k: computed.add(number))
        hooks.append(hook)
    for number in range(LAYERS + 1):
        computed.clear()
        af.hidden_state(encoder, batch, number)
        assert computed == set(range(number))
    for hook in hooks:
        hook.remove()


# ---- Logits and losses


def features_of(name: str, kind: str) -> list[dict]:
    """Return features of uneven length, as the tasks make them."""
    random, rows, features = np.random.default_rng(5), id_rows(name), []
    texts = [" ".join(words) for words in SENTENCES]
    if kind == "sentence":
        sides = zip(texts, reversed(texts))
        examples = [{"premise": a, "hypothesis": b, "label": len(a) % 3} for a, b in sides]
        return af.encode(af.TASKS["xnli"], tokenizer_of(name), examples, 90, True)
    if kind == "answer":
        examples = [{"question": "a cat ?", "context": text} for text in texts]
        for example in examples:
            example |= {"texts": [example["context"].split()[-1]]}
            example |= {"starts": [example["context"].rindex(example["texts"][0])]}
        return af.encode(af.TASKS["xquad"], tokenizer_of(name), examples, 90, True)
    for row in rows:
        labels = np.where(random.random(len(row)) < 0.7, random.integers(0, 3, len(row)), af.IGNORE)
        labels[0] = 1
        if kind == "text":
            labels = np.append(row[1:], af.IGNORE)
            labels[: len(row) // 3] = af.IGNORE
        features.append({"input_ids": row, "labels": labels})
    return features


def library_loss(model, feature: dict, kind: str) -> tuple[float, int]:
    """Return the library's loss of one example, and the number of its labels."""
    labels = torch.tensor(feature["labels"][None])
    count = int((labels != af.IGNORE).sum())
    if kind == "answer":
        options = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    elif kind == "sentence":
        options = {"labels": labels[:, 0]}
    else:
        options = {"labels": labels}
    if kind == "text":  # the library moves the labels itself
        options["labels"] = torch.cat([torch.tensor([[af.IGNORE]]), labels[:, :-1]], dim=1)
    return one_by_one(model, [feature["input_ids"]], **types_of(feature), **options)[0].loss, count


def types_of(feature: dict) -> dict[str, torch.Tensor]:
    """Return the `token_type_ids` of a feature, if its tokenizer makes them."""
    return {k: torch.tensor(v[None]) for k, v in feature.items() if k == "token_type_ids"}


def assert_loss_and_gradient(model, features: list[dict], kind: str, pad_id: int) -> None:
    """Compare a padded batch with the library's mean over examples, weighted by their labels."""
    total, labels = 0.0, 0
    for feature in features:
        loss, count = library_loss(model, feature, kind)
        total, labels = total + loss * count, labels + count
    model.zero_grad()
    (total / labels).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = af.task_loss(model, af.task_batch(features, pad_id))
    assert_close(found, total / labels)
    found.backward()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-4
    for name, parameter in model.named_parameters():
        if name in expected or parameter.grad is not None:
            assert (parameter.grad - expected[name]).abs().max() < 2e-4 * largest, name
    model.zero_grad()


@pytest.mark.parametrize(
    "task, kind", [("udpos", "word"), ("xnli", "sentence"), ("xquad", "answer")]
)
@pytest.mark.parametrize("name", ENCODERS)
def test_a_classifier_has_the_librarys_loss_gradient_and_logits(name, task, kind):
    pad_id = tokenizer_of(name).pad_token_id
    if task == "xquad" and name == "EuroBERT":  # the library has no such head
        with pytest.raises(af.UserError, match=r"--model .*EuroBERT.*cannot be loaded"):
            build(name, task=task)
        return
    model, features = build(name, task=task), features_of(name, kind)
    architectures.randomise(model)
    assert_loss_and_gradient(model, features, kind, pad_id)
    batch = af.task_batch(features, pad_id)
    del batch["labels"]
    logits = af.task_logits(model, batch)
    for k, feature in enumerate(features):
        length = len(feature["input_ids"])
        output = one_by_one(model, [feature["input_ids"]], **types_of(feature))[0]
        if kind == "word":
            assert_close(logits[k, :length], output.logits[0])
        elif kind == "sentence":
            assert_close(logits[k], output.logits[0])
        else:
            assert_close(logits[k, 0, :length], output.start_logits[0])
            assert_close(logits[k, 1, :length], output.end_logits[0])
            assert (logits[k, :, length:] == -torch.inf).all()


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_librarys_loss_and_gradient(name):
    features = features_of(name, "text")
    assert_loss_and_gradient(build(name), features, "text", tokenizer_of(name).pad_token_id)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_logits_at_chosen_positions_are_the_librarys(name):
    model, rows = model_of(name), id_rows(name)
    batch = af.pad_inputs(rows, tokenizer_of(name).pad_token_id, "cpu")
    where = (batch["attention_mask"] == 1) & (torch.arange(12) % 3 == 1)
    logits = [output.logits[0] for output in one_by_one(model, rows)]
    expected = torch.cat([row[np.arange(len(row)) % 3 == 1] for row in logits])
    assert_close(af.token_logits(model, batch, where), expected)


# ---- Generated text


def continuation(model, ids: np.ndarray, count: int, ends: set[int]) -> list[int]:
    """Return the likeliest token, again and again, by a full pass over the whole text."""
    written = list(ids)
    while len(written) < len(ids) + count:
        written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
        if written[-1] in ends:
            break
    return written[len(ids) :]


def slow_answers(name: str, model, prompts: list, count: int, ends: set[int]) -> list[str]:
    answers = [continuation(model, ids, count, ends) for ids in prompts]
    return tokenizer_of(name).batch_decode(answers, skip_special_tokens=True)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_generation_is_greedy_whatever_the_models_configuration_asks_for(name):
    """Padding on the left changes nothing, and a long prompt shortens no other answer."""
    tokenizer, model = tokenizer_of(name), model_of(name)
    ends = {tokenizer.eos_token_id}
    prompts = id_rows(name, (5, 1, 9, 12))
    expected = slow_answers(name, model, prompts, 12, ends)
    assert af.generate(model, tokenizer, prompts, 12) == expected
    prompts = id_rows(name, (295, 7))
    long, short = prompts
    expected = slow_answers(name, model, [long], 5, ends)
    expected += slow_answers(name, model, [short], 12, ends)
    assert af.generate(model, tokenizer, prompts, 12) == expected


@pytest.mark.parametrize("name", ["Llama 3", "Gemma 3", "Qwen 2.5"])
@torch.no_grad()
def test_generation_ends_at_every_end_token(name, tmp_path):
    """The tokenizer names one end token; the model's generation_config may name others."""
    prompts, tokenizer, model = id_rows(name, (5, 3, 9)), tokenizer_of(name), model_of(name)
    answers = [continuation(model, ids, 12, set()) for ids in prompts]
    own, first, second = answers[0][3], answers[1][5], answers[2][7]
    for path in Path(folder_of(name)).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "generation_config.json"
    config = json.loads(path.read_text()) | {"eos_token_id": [first, second]}
    path.write_text(json.dumps(config))
    tokenizer = af.load_tokenizer(str(tmp_path), generates=True)[0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(own)
    settings = af.Settings(model=str(tmp_path), task="massive")
    changed = af.build_model(settings, tokenizer, CPU).eval()
    lengths, texts = [], []
    for ids in prompts:
        expected = continuation(model, ids, 12, {own, first, second})
        lengths.append(len(expected))
        assert expected.pop() in (own, first, second)
        texts.append(tokenizer.decode(expected, skip_special_tokens=True))
        assert af.generate(changed, tokenizer, [ids], 12) == texts[-1:]
    assert max(lengths) < 12
    assert af.generate(changed, tokenizer, prompts, 12) == texts


@pytest.mark.parametrize("name", DECODERS)
def test_outputs_that_are_not_numbers_are_refused_in_generation(name):
    model = build(name)
    own = model.generation_config
    af.transformer_layers(model.base_model)[0].apply(spoil)
    with pytest.raises(af.UserError, match="not numbers"):
        af.generate(model, tokenizer_of(name), id_rows(name, (4, 6)), 3)
    assert model.generation_config is own


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_that_are_not_numbers_are_refused_in_evaluation(name):
    model, features = build(name), features_of(name, "word")
    af.transformer_layers(model.base_model)[0].apply(spoil)
    options = tokenizer_of(name), af.TASKS["udpos"], [], features, settings_of(name)
    with pytest.raises(af.UserError, match="not numbers"):
        af.evaluate(model, *options)


def spoil(module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data.fill_(torch.nan)


@pytest.mark.parametrize("name", DECODERS)
def test_text_is_decoded_as_it_was_encoded(name):
    tokenizer = tokenizer_of(name)
    for words in SENTENCES:
        text = " ".join(words).replace("e\u0301", "é")  # the normaliser may compose it
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.batch_decode([ids], skip_special_tokens=True)[0].strip() == text


@pytest.mark.parametrize("name", ["XLM-R", "Llama 3", "Qwen 2.5"])
def test_generated_text_keeps_its_blanks_whatever_the_tokenizers_files_say(name, monkeypatch):
    """The library removes blanks before punctuation if they ask for it, but not with BPE."""
    tokenizer, model = tokenizer_of(name), model_of("Llama 3")
    monkeypatch.setattr(tokenizer, "clean_up_tokenization_spaces", True)
    text = "a b , a . b"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, ids], 1))
    assert af.generate(model, tokenizer, [np.array([5, 6])], 20)[0].strip() == text
    cleaned = tokenizer.batch_decode(ids)[0].strip()
    assert (cleaned != text) == (name == "XLM-R")


# ---- Adapters and frozen layers


@pytest.mark.parametrize("name", ALL)
def test_adapters_have_the_outputs_and_gradients_of_peft(name):
    peft = pytest.importorskip("peft")
    try:
        model, base = build(name, lora=3, lora_alpha=7.0), build(name)
    except af.UserError as error:
        assert name == "Falcon-H1" and "--lora" in str(error)
        return
    if name in ENCODERS:
        model, base = model.base_model, base.base_model
    adapters = {key: p for key, p in model.named_parameters() if ".lora_" in key}
    torch.manual_seed(6)
    for parameter in adapters.values():
        parameter.data = torch.randn_like(parameter) / 4
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in adapters})
    linear = [key for key, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    assert set(modules) <= set(linear)
    for number in range(LAYERS):  # in every layer
        assert any(f".{number}." in f".{module}" for module in modules)
    config = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.0, target_modules=modules)
    other = peft.get_peft_model(base, config).eval()
    copies = {}
    for key, parameter in other.named_parameters():
        if ".lora_" in key:
            short = key.removeprefix("base_model.model.").replace(".default", "")
            copies[short] = parameter
            parameter.data = adapters[short].data.clone()
    assert copies.keys() == adapters.keys()
    for row in id_rows(name, (7, 4)):
        outputs = []
        for computed in (model, other):
            output = computed(input_ids=torch.tensor(row[None]))
            outputs.append(output[0])
            output[0].square().mean().backward()
        assert_close(outputs[0], outputs[1])
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == adapters.keys()
    largest = max(p.grad.abs().max().item() for p in copies.values() if p.grad is not None)
    assert largest > 1e-3
    for key, copy in copies.items():
        if copy.grad is not None or adapters[key].grad is not None:
            assert (adapters[key].grad - copy.grad).abs().max() < 2e-4 * largest, key


EMBEDDINGS = {  # how the names of the parameters begin that make the input of the first layer
    "deberta-v2": "deberta.embeddings.", "distilbert": "distilbert.embeddings.",
    "bert": "bert.embeddings.", "xlm-roberta": "roberta.embeddings.",
    "xlm-roberta-xl": "roberta.embeddings.", "roberta": "roberta.embeddings.",
    "rembert": "rembert.embeddings.", "modernbert": "model.embeddings.",
    "modernbert-decoder": "model.embeddings.",
}  # fmt: skip


@pytest.mark.parametrize("spec, numbers", [("front", {0, 1}), ("back", {2, 3}), ("emb,1", {1})])
@pytest.mark.parametrize("name", ALL)
def test_the_layers_that_are_named_are_frozen_and_no_others(name, spec, numbers):
    model = build(name)
    start = EMBEDDINGS.get(model.config.model_type, "model.embed_tokens.")
    expected = set()
    for key, _ in model.named_parameters():
        layer = re.search(r"\.layers?\.(\d+)\.", key)
        if layer and int(layer[1]) in numbers:
            expected.add(key)
        if "emb" in spec and key.startswith(start):
            expected.add(key)
    assert set(af.freeze(model, spec)) == expected
    assert any(key.startswith(start) for key in expected) == ("emb" in spec)


# ---- The probe


@pytest.mark.parametrize("name", [name for name in ALL if name != SEVERAL_STREAMS])
def test_every_hidden_state_is_probed(name):
    pairs = [af.Pair("fr", "a cat", "la Ελλάδα"), af.Pair("fr", "the dog sees", "xã hội")]
    settings = settings_of(name, unit="sentence")
    results = af.retrieval(model_of(name), tokenizer_of(name), pairs, settings)
    assert {len(shares) for shares in results.values()} == {LAYERS + 1}


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba"])
def test_states_that_are_numbered_in_another_way_are_not_probed(model_type, tmp_path):
    options = {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1}
    settings = save_other(model_type, options, architectures.gpt_neox(), tmp_path)
    tokenizer, _ = af.load_tokenizer(settings.model, generates=True)
    model = af.build_model(settings, tokenizer, CPU).eval()
    pairs = [af.Pair("fr", "a cat", "la Ελλάδα"), af.Pair("fr", "the dog sees", "xã hội")]
    batch = af.encode_texts(tokenizer, pairs, 96)
    states = model.base_model(**batch.inputs, output_hidden_states=True).hidden_states
    assert not torch.equal(states[0], model.get_input_embeddings()(batch.inputs["input_ids"]))
    with pytest.raises(af.UserError, match="leave out --probe"):
        af.retrieval(model, tokenizer, pairs, settings)


# ---- What is refused


def refused_when_loaded(config, tokenizer, generates: bool, message: str, folder: Path) -> None:
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(af.UserError, match=f"--model {re.escape(str(folder))}: .*{message}"):
        af.load_tokenizer(str(folder), generates=generates)


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3n", "gemma4", "qwen2_5_vl", "mistral3"])
@pytest.mark.parametrize("generates", [True, False])
def test_a_multimodal_model_is_refused(model_type, generates, tmp_path):
    config = transformers.AutoConfig.for_model(model_type)
    refused_when_loaded(config, architectures.gemma(), generates, "multimodal", tmp_path)


@pytest.mark.parametrize(
    "model_type, generates",
    [("mt5", True), ("mbart", True), ("mbart", False), ("bert", True), ("xlm-roberta", True),
     ("modernbert", True), ("llama", False), ("modernbert-decoder", False), ("gpt2", False)],
)  # fmt: skip
def test_a_model_of_the_wrong_kind_is_refused(model_type, generates, tmp_path):
    config = transformers.AutoConfig.for_model(model_type)
    needed = "a decoder-only model" if generates else "an encoder"
    refused_when_loaded(config, architectures.xlmr(), generates, needed, tmp_path)


@pytest.mark.parametrize(
    "model_type, looks_ahead",
    [("gemma3_text", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False}),
     ("bert-generation", {})],
)  # fmt: skip
def test_a_decoder_that_looks_ahead_is_refused(model_type, looks_ahead, tmp_path):
    """The library alone: the last token changes the hidden state of the first one."""
    tokenizer = architectures.gemma()
    config = architectures.configuration(model_type, architectures.GROUPED | looks_ahead, tokenizer)
    assert influence_of_the_last_token(config) > 1e-4
    refused_when_loaded(config, tokenizer, True, "does not look ahead", tmp_path)


def influence_of_the_last_token(config) -> float:
    """Return how much the last token of three changes the hidden state of the first."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([[10, 11, 12], [10, 11, 13]])).last_hidden_state
    return (rows[0, 0] - rows[1, 0]).abs().max().item()


def test_an_encoder_without_attention_is_refused(tmp_path):
    """On a CPU, the library's MRA computes none: it needs kernels for a GPU."""
    tokenizer = architectures.bert()
    config = architectures.configuration("mra", {}, tokenizer)
    assert influence_of_the_last_token(config) == 0
    assert influence_of_the_last_token(architectures.configuration("bert", {}, tokenizer)) > 1e-4
    refused_when_loaded(config, tokenizer, False, "no attention", tmp_path)


def test_an_encoder_with_modules_for_each_language_is_refused(tmp_path):
    """The library's X-MOD computes a text of any language by the modules of its default one."""
    options = {"languages": ["en_XX", "ar_AR"], "default_language": "en_XX"}
    tokenizer = architectures.bert()
    config = architectures.configuration("xmod", options, tokenizer)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    row = torch.tensor([[10, 11, 12]])
    with torch.no_grad():
        states = [model(row, lang_ids=torch.tensor([k])).last_hidden_state for k in (0, 1)]
        assert torch.equal(model(row).last_hidden_state, states[0])
    assert (states[0] - states[1]).abs().max() > 1e-4
    refused_when_loaded(config, tokenizer, False, "one language's modules", tmp_path)


def test_text_is_split_as_the_tokenizer_s_file_says(tmp_path, capsys):
    """The library's class for GPT-2 splits text in its own way, whatever the file says."""
    config = architectures.configuration("gpt2", {}, architectures.gpt_neox())
    config.vocab_size += 100
    config.save_pretrained(tmp_path)
    backend = architectures.byte_level(["<|endoftext|>", "<|pad|>"], architectures.LLAMA)
    state = json.loads(backend.to_str())["model"]
    merges = [("2", "0"), ("20", "2"), ("202", "3"), *map(tuple, state["merges"])]
    vocabulary = state["vocab"] | {one + two: len(state["vocab"]) + k
                                   for k, (one, two) in enumerate(merges[:3])}  # fmt: skip
    backend.model = tokenizers.models.BPE(vocabulary, merges)
    ends = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    architectures.general(backend, "$A", **ends).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    written = json.loads(path.read_bytes()) | {"tokenizer_class": "GPT2Tokenizer"}
    path.write_text(json.dumps(written))
    text = "in 2023 650841823"
    expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] != expected
    tokenizer, _ = af.load_tokenizer(str(tmp_path), generates=True)
    assert tokenizer(text)["input_ids"] == expected
    assert "as tokenizer.json says, unlike GPT2Tokenizer" in capsys.readouterr().out


def test_the_first_word_of_a_text_begins_as_tokenizer_json_says(tmp_path, capsys):
    """Here, the file puts a blank before it, and the class of the library does not."""
    plain = architectures.roberta_with_prefix()
    path = tmp_path / "tokenizer_config.json"
    architectures.configuration("roberta", {}, plain).save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    written = json.loads(path.read_bytes()) | {"tokenizer_class": "RobertaTokenizer"}
    written.pop("add_prefix_space", None)
    path.write_text(json.dumps(written))
    text = "the cat"
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = file.encode(text, add_special_tokens=False).tokens
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).tokenize(text) != expected
    tokenizer, _ = af.load_tokenizer(str(tmp_path))
    assert tokenizer.tokenize(text) == expected
    assert "as tokenizer.json says, unlike RobertaTokenizer" in capsys.readouterr().out


@pytest.mark.parametrize("reader", ["BertTokenizer", "PreTrainedTokenizerFast"])
def test_the_second_sentence_has_the_second_segment_whatever_class_reads_it(tmp_path, reader):
    """The general class of the library knows no segments, unless the files name them."""
    for path in Path(folder_of("BERT")).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "tokenizer_config.json"
    content = json.loads(path.read_bytes()) | {"tokenizer_class": reader}
    content.pop("model_input_names", None)
    path.write_text(json.dumps(content))
    tokenizer, _ = af.load_tokenizer(str(tmp_path))
    rows = [{"premise": "a cat", "hypothesis": "the dog", "label": 0}]
    (feature,) = af.encode_sentences(tokenizer, rows, 96, True)
    second = tokenizer("the dog", add_special_tokens=False)["input_ids"]
    expected = [0] * (len(feature["input_ids"]) - len(second) - 1) + [1] * (len(second) + 1)
    assert feature["token_type_ids"].tolist() == expected


@pytest.mark.parametrize("name", ["XLM-R", "XLM-R, no class", "mmBERT", "EuroBERT"])
def test_models_whose_tokenizer_names_no_segments_get_none(name):
    rows = [{"premise": "a cat", "hypothesis": "the dog", "label": 0}]
    (feature,) = af.encode_sentences(tokenizer_of(name), rows, 96, True)
    assert "token_type_ids" not in feature


MIXTURES = {  # model type: (its configuration, name of a fused tensor of its experts)
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "experts.down_proj",
    ),
    "jetmoe": ({"num_local_experts": 4, "kv_channels": 8}, "mlp.output_linear.weight"),
}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_tensors_without_adapters_are_counted_and_named(model_type, tmp_path, capsys):
    """Those are the fused experts of a mixture, and what chooses among them."""
    options, fused = MIXTURES[model_type]
    options = architectures.GROUPED | options
    settings = save_other(model_type, options, architectures.qwen(), tmp_path)
    tokenizer, _ = af.load_tokenizer(settings.model, generates=True)
    settings.lora = 2
    model = af.build_model(settings, tokenizer, CPU)
    adapted = [m for m in model.modules() if isinstance(m, af.LoraLinear)]
    adapters = {id(p) for m in adapted for p in m.parameters()}
    left = [
        name
        for name, weight in af.transformer_layers(model.base_model).named_parameters()
        if weight.ndim > 1 and id(weight) not in adapters
    ]
    assert any(fused in name for name in left)
    line = f"--lora: {len(left)} tensors of the layers get no adapters, such as {left[-1]}\n"
    assert line in capsys.readouterr().out


def test_a_model_whose_matrices_all_get_adapters_is_silent(capsys):
    settings = settings_of("Qwen 3", unit="sentence", lora=2)
    af.build_model(settings, tokenizer_of("Qwen 3"), CPU)
    assert "get no adapters" not in capsys.readouterr().out


def test_the_library_s_warning_about_a_tokenizer_of_mistral_is_printed(tmp_path, capsys):
    """It is about local tokenizers of more than 100,000 subwords, saved by an earlier version."""
    backend = architectures.byte_level(["<s>", "</s>", "<unk>"], architectures.GPT2)
    state = json.loads(backend.to_str())["model"]
    vocabulary = state["vocab"] | {f"rest{k}": len(state["vocab"]) + k for k in range(100_000)}
    backend.model = tokenizers.models.BPE(vocabulary, [*map(tuple, state["merges"])])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    architectures.general(backend, "<s> $A", **ends).save_pretrained(tmp_path)
    config = transformers.AutoConfig.for_model("mistral", vocab_size=len(vocabulary))
    for version, is_suspect in (("4.50.0", True), ("5.0.0", False)):
        config.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        written = json.loads(path.read_bytes()) | {"transformers_version": version}
        path.write_text(json.dumps(written))
        af.load_tokenizer(str(tmp_path), generates=True)
        assert ("it may split text wrongly" in capsys.readouterr().out) == is_suspect


def test_a_model_with_adapters_in_its_folder_is_refused(tmp_path):
    settings = save_other("llama", {}, architectures.gemma(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(af.UserError, match=r"holds adapters, too; .* by --adapter"):
        realign(settings)


def save_other(model_type: str, options: dict, tokenizer, folder: Path) -> af.Settings:
    """Write a model without a row in the tables; return the settings of a run with it."""
    config = architectures.configuration(model_type, options, tokenizer)
    generates = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and model_type != "xlm"
    kind = "CausalLM" if generates else "MaskedLM"
    getattr(transformers, f"AutoModelFor{kind}").from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    task, unit = ("massive", "sentence") if generates else ("udpos", "word")
    return af.Settings(model=str(folder), task=task, unit=unit, realign_batch_size=2)


def realign(settings: af.Settings) -> None:
    """Load a model and align two sentence pairs, as a run does."""
    generates = settings.task == "massive"
    tokenizer, _ = af.load_tokenizer(settings.model, generates=generates)
    model = af.build_model(settings, tokenizer, CPU)
    pairs = [af.Pair("fr", ["a", "cat"], ["la", "Ελλάδα"], [(0, 0), (1, 1)])] * 2
    if settings.unit == "sentence":
        pairs = [af.Pair("fr", "a cat", "la Ελλάδα"), af.Pair("fr", "the dog sees", "xã hội")]
    af.realign(model, tokenizer, pairs, 1, settings)


@pytest.mark.parametrize("model_type", ["xlm", "flaubert"])
def test_layers_in_parallel_lists_are_refused_instead_of_half_frozen(model_type, tmp_path):
    options = {"emb_dim": 32, "n_layers": LAYERS, "n_heads": 2, "is_encoder": True}
    settings = save_other(model_type, options, architectures.bert(), tmp_path)
    with pytest.raises(af.UserError, match="parallel lists"):
        realign(settings)


def test_layers_that_share_one_set_of_weights_are_refused(tmp_path):
    settings = save_other("albert", {"embedding_size": 24}, architectures.xlmr(), tmp_path)
    with pytest.raises(af.UserError, match="no list of its 4 layers"):
        realign(settings)


def test_checkpointing_is_refused_where_the_library_has_none(tmp_path):
    settings = save_other("mpnet", {}, architectures.xlmr(), tmp_path)
    settings.checkpointing = True
    with pytest.raises(af.UserError, match="--checkpointing: not possible"):
        realign(settings)


@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_several_hidden_states_for_each_subword_are_refused(layer):
    name = SEVERAL_STREAMS
    settings = settings_of(name, unit="sentence", realign_batch_size=2, layer=layer)
    with pytest.raises(af.UserError, match="several hidden states"):
        realign(settings)


def needs(model_type: str) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers does not have {model_type}")


def test_concatenated_hidden_states_are_refused(tmp_path):
    needs("qwen4_exp_text")
    options = architectures.GROUPED | {"hc_count": 2, "hc_lowrank": 8, "moe_intermediate_size": 8}
    options |= {"num_experts": 2, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 8}
    options |= {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "indexer_head_dim": 16}
    options |= dict.fromkeys(("indexer_n_heads", "indexer_kv_heads"), 1)
    options |= {"indexer_budget": 4, "indexer_compress_ratio": 2}
    settings = save_other("qwen4_exp_text", options, architectures.gemma(), tmp_path)
    settings.layer = 1
    with pytest.raises(af.UserError, match="several hidden states"):
        realign(settings)


def test_the_probe_refuses_several_hidden_states():
    settings = settings_of(SEVERAL_STREAMS, unit="sentence")
    tokenizer, _ = af.load_tokenizer(settings.model, generates=True)
    model = af.build_model(settings, tokenizer, CPU)
    with pytest.raises(af.UserError, match="for each subword: it cannot be aligned or probed"):
        af.retrieval(model, tokenizer, [af.Pair("fr", "a cat", "la Ελλάδα")], settings)


def test_the_probe_refuses_layers_that_run_twice(tmp_path):
    """The library alone: it returns more hidden states than layers."""
    needs("dory")
    loops = {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 2}
    settings = save_other("dory", architectures.GROUPED | loops, architectures.gemma(), tmp_path)
    tokenizer, _ = af.load_tokenizer(settings.model, generates=True)
    model = af.build_model(settings, tokenizer, CPU)
    output = model.base_model(torch.tensor([[10, 11]]), output_hidden_states=True)
    assert len(output.hidden_states) > LAYERS + 1
    pairs = [af.Pair("fr", "a cat", "la Ελλάδα"), af.Pair("fr", "the dog sees", "xã hội")]
    with pytest.raises(af.UserError, match="numbers its hidden states in another way"):
        af.retrieval(model, tokenizer, pairs, settings)


DEEPSEEK = architectures.GROUPED | {"q_lora_rank": 12, "qk_rope_head_dim": 8, "n_group": 1}
DEEPSEEK |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NEEDED = {  # model type: what its configuration adds to that of the others
    "convbert": {"embedding_size": 16},
    "deepseek_v4": DEEPSEEK,
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16},
    "recurrent_gemma": architectures.GROUPED,
    "xlstm": {"hidden_size": 128, "num_heads": 2},
}


WITH_A_CACHE = {  # generation alone depends on padding: the cache holds it, or positions count it
    "minimax": architectures.GROUPED
    | {"num_local_experts": 2, "head_dim": 8}
    | {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "trocr": {},
}


@pytest.mark.parametrize("model_type", WITH_A_CACHE)
def test_models_whose_answers_depend_on_padding_are_refused(model_type, tmp_path):
    """The library alone: a padded prompt gets other logits for the tokens that follow."""
    tokenizer = architectures.gpt_neox()
    config = architectures.configuration(model_type, WITH_A_CACHE[model_type], tokenizer)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    architectures.randomise(model)
    row, padding = torch.arange(10, 16), torch.full((7,), tokenizer.pad_token_id)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(row)])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    alone = model.generate(row[None], **options)
    padded = torch.cat([padding, row])[None]
    padded = model.generate(padded, attention_mask=mask[None], **options)
    difference = torch.stack(alone.logits) - torch.stack(padded.logits)
    assert difference.abs().max() > 1e-2
    message = f"padding changes the results of {model_type}"
    refused_when_loaded(config, tokenizer, True, message, tmp_path)


@pytest.mark.parametrize("model_type", sorted({*af.IGNORE_THE_MASK} - {*WITH_A_CACHE}))
def test_models_whose_results_depend_on_padding_are_refused(model_type, tmp_path):
    """The library alone: a row gets other hidden states if it is padded, though it is masked."""
    tokenizer = architectures.gpt_neox()
    config = architectures.configuration(model_type, NEEDED.get(model_type, {}), tokenizer)
    generates = type(config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    architectures.randomise(model)
    row, padding = torch.arange(10, 16), torch.full((7,), tokenizer.pad_token_id)
    parts = [padding, row] if generates else [row, padding]  # on the left for answers
    mask = [torch.zeros_like(padding), torch.ones_like(row)][:: 1 if generates else -1]
    with torch.no_grad():
        alone = model(input_ids=row[None]).last_hidden_state[0]
        padded = model(input_ids=torch.cat(parts)[None], attention_mask=torch.cat(mask)[None])
    inside = padded.last_hidden_state[0][torch.cat(mask) == 1]
    assert (inside - alone).abs().max() > 1e-2
    message = f"padding changes the results of {model_type}"
    refused_when_loaded(config, tokenizer, generates, message, tmp_path)


def test_adapters_are_refused_where_no_layer_takes_them(tmp_path):
    """The weights of GPT-2 are not in linear layers."""
    options = {"n_embd": 32, "n_layer": LAYERS, "n_head": 2, "n_positions": 300}
    settings = save_other("gpt2", options, architectures.gpt_neox(), tmp_path)
    realign(settings)
    settings.lora = 4
    with pytest.raises(af.UserError, match="--lora"):
        realign(settings)
    adapted = af.build_model(settings_of("Llama 3", lora=2), tokenizer_of("Llama 3"), CPU)
    with pytest.raises(af.UserError, match="--lora"):  # a cell of a notebook that runs twice
        af.add_lora(adapted, 2, 16, 0.0)


def test_weights_of_layers_that_the_configuration_leaves_out_are_named(tmp_path, capsys):
    settings = save_other("bert", {}, architectures.bert(), tmp_path)
    af.load_model(settings.model)
    assert "does not use" not in capsys.readouterr().out  # the head of a masked language model
    config = json.loads((tmp_path / "config.json").read_bytes())
    config["num_hidden_layers"] -= 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    af.load_model(settings.model)
    first = f"bert.encoder.layer.{LAYERS - 1}."
    line = f"does not use 16 tensors of layers in its files, such as {first}"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", ["XLM-R", "ModernBERT", "Llama 3", "Cohere 2"])
def test_other_architectures_align_in_the_same_way(name):
    """The errors above come from the architectures, not from the way in which they are run."""
    unit = "sentence" if name in DECODERS else "word"
    realign(settings_of(name, unit=unit, realign_batch_size=2))


# ---- Chat templates

LOOP = "{% for message in messages %}"
CHATML = LOOP + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
CHATML_TURN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_THOUGHT = (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
LLAMA_31 = (
    "{{ bos_token }}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "{{ messages[0].content | trim }}<|eot_id|>{% for message in messages[1:] %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}"
    "<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
SMOLLM = (
    "<|im_start|>system\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
    "Reasoning Mode: {{ '/no_think' if enable_thinking is false else '/think' }}\n"
    "{{ messages[0].content.strip() }}<|im_end|>\n<|im_start|>user\n{{ messages[1].content }}"
    "<|im_end|>\n{{ '<|im_start|>assistant\n' }}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + LOOP
    + "<start_of_turn>{{ message.role }}\n{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}{{ '<start_of_turn>model\n' }}"
)  # fmt: skip
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    + LOOP + "<start_of_turn>{{ message.role }}\n{{ first if loop.first else '' }}"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}{{ '<start_of_turn>model\n' }}"
)  # fmt: skip
PHI_3 = (
    "{{ bos_token }}" + LOOP + "{% if message.role == 'user' %}<|user|>\n{{ message.content }}"
    "<|end|>\n<|assistant|>\n{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}" + LOOP + "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "[INST] {{ message.content }} [/INST]{% endfor %}"
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
TURNS = "<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\nUSER<|im_end|>\n"
TURNS += "<|im_start|>assistant\n"
TURNS_TODAY = TURNS.replace("SYSTEM", "Today Date: 26 July 2024\nReasoning Mode: /no_think\nSYSTEM")
GEMMA_TURNS = "<bos><start_of_turn>user\nSYSTEM\n\nUSER<end_of_turn>\n<start_of_turn>model\n"
LLAMA_TURNS = "<|begin_of_text|>" + HEADER.format("system") + "Today Date: 26 Jul 2024\n\nSYSTEM"
LLAMA_TURNS += "<|eot_id|>" + HEADER.format("user") + "USER<|eot_id|>" + HEADER.format("assistant")
PROMPTS = {  # kind: (a model with such a tokenizer, template, prompt)
    "system and user": ("Qwen 2.5", CHATML + CHATML_TURN, TURNS),
    "thinking": ("Qwen 3", CHATML + CHATML_TURN + NO_THOUGHT, f"{TURNS}<think>\n\n</think>\n\n"),
    "thinks anyway": (
        "Qwen 3", CHATML + CHATML_TURN + "<think>\n", f"{TURNS}<think>\n\n</think>\n\n"
    ),
    "date_string": ("Llama 3", LLAMA_31, LLAMA_TURNS),
    "strftime_now": ("SmolLM3", SMOLLM, TURNS_TODAY),
    "refuses a system message": ("Gemma 2", GEMMA_2, GEMMA_TURNS),
    "merges both": ("Gemma 3", GEMMA_3, GEMMA_TURNS),
    "drops the system message": (
        "Phi-3", PHI_3, "<s><|user|>\nSYSTEM\n\nUSER<|end|>\n<|assistant|>\n"
    ),
    "roles must alternate": ("Mistral", MISTRAL, "<s>[INST] SYSTEM\n\nUSER [/INST]"),
}  # fmt: skip


@pytest.fixture
def with_template(monkeypatch):
    """Return a function that sets the chat template of a model's tokenizer for one test."""

    def change(name: str, template: str | None):
        monkeypatch.setattr(tokenizer_of(name), "chat_template", template)
        return tokenizer_of(name)

    return change


def set_today(monkeypatch, year: int) -> None:
    class Calendar(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, 1, 2)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Calendar)


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_has_the_instruction_and_the_text_on_every_day(kind, with_template, monkeypatch):
    """A model that could think does not, and today's date never enters."""
    name, template, expected = PROMPTS[kind]
    tokenizer = with_template(name, template)
    system, user = "List\n- the slots: {a}.", 'a {{ cat }} \'n "dog" <b> & ไทย'
    expected = expected.replace("SYSTEM", system).replace("USER", user)
    for year in (2023, 2031):
        set_today(monkeypatch, year)
        assert af.render_prompt(tokenizer, system, user) == expected


@pytest.mark.parametrize("call", ["('%Y')", '( "%Y" )', "(format='%Y')", '( format = "%Y")'])
def test_todays_date_does_not_enter_however_a_template_asks_for_it(
    call, with_template, monkeypatch
):
    set_today(monkeypatch, 2031)
    tokenizer = with_template("SmolLM3", f"{CHATML}{{{{ strftime_now{call} }}}}")
    prompt = af.render_prompt(tokenizer, "SYSTEM", "USER")
    assert prompt.endswith("2024") and "2031" not in prompt


def test_the_calendar_of_the_test_above_is_the_librarys(with_template, monkeypatch):
    set_today(monkeypatch, 2031)
    tokenizer = with_template("SmolLM3", "{{ strftime_now('%Y') }}")
    message = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "2031"


@pytest.mark.parametrize("kind", PROMPTS)
def test_blanks_around_a_text_may_be_trimmed(kind, with_template):
    tokenizer = with_template(*PROMPTS[kind][:2])
    plain = af.render_prompt(tokenizer, "List the slots.", "a cat")
    blank = af.render_prompt(tokenizer, " List the slots.\n", " a cat\n")
    assert re.sub(r"\s+", "", blank) == re.sub(r"\s+", "", plain)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message.content", "'...'"),
        "{{ raise_exception('no') }}",
        "{{ messages[5].content.x }}",
        "{% broken",
        LOOP + "{{ message.content | upper }}{% endfor %}",
    ],
)
def test_a_template_without_the_text_of_the_user_is_refused(template, with_template):
    tokenizer = with_template("Qwen 2.5", template)
    with pytest.raises(af.UserError, match="--model: the chat template"):
        af.render_prompt(tokenizer, "List the slots.", "a cat")


def test_a_template_of_the_first_message_alone_gets_both_texts_in_it(with_template):
    tokenizer = with_template("Qwen 2.5", "{{ messages[0].content }}")
    assert af.render_prompt(tokenizer, "List.", "a cat") == "List.\n\na cat"


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_subwords_of_a_prompt_are_the_librarys(kind, with_template):
    """The beginning of the text is there once; the answer and the end follow in training."""
    name, template, expected = PROMPTS[kind]
    tokenizer = with_template(name, template)
    example = {"system": "List the slots.", "user": "a cat", "target": "date: today"}
    text = expected.replace("SYSTEM", example["system"]).replace("USER", example["user"])
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(example["target"], add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    (test,) = af.encode_prompts(tokenizer, [example], 500, training=False)
    (train,) = af.encode_prompts(tokenizer, [example], 500, training=True)
    assert test["input_ids"].tolist() == prompt
    assert train["input_ids"].tolist() == prompt + answer
    assert train["labels"].tolist() == [af.IGNORE] * (len(prompt) - 1) + [*answer, af.IGNORE]
    assert prompt.count(tokenizer.bos_token_id) == text.count(tokenizer.bos_token or "no token")


@pytest.mark.parametrize("name", DECODERS)
def test_without_a_template_a_prompt_begins_like_any_text(name, with_template):
    tokenizer = with_template(name, None)
    example = {"system": "List the slots.", "user": "a cat", "target": "date: today"}
    (test,) = af.encode_prompts(tokenizer, [example], 500, training=False)
    text = "List the slots.\n\nInput: a cat\nOutput:"
    assert test["input_ids"].tolist() == tokenizer(text)["input_ids"]
    (train,) = af.encode_prompts(tokenizer, [example], 500, training=True)
    *ids, end = train["input_ids"].tolist()
    assert end == tokenizer.eos_token_id
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert re.sub(" +", " ", decoded) == text + " date: today"


def test_a_prompt_keeps_all_tokens_that_begin_a_text():
    """GLM-4 puts two tokens in front of a text."""
    special = ["[gMASK]", "<sop>", "<|endoftext|>"]
    backend = architectures.byte_level(special, architectures.LLAMA)
    ends = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = architectures.general(backend, "[gMASK] <sop> $A", **ends)
    example = {"system": "List the slots.", "user": "a cat", "target": "date: today"}
    (test,) = af.encode_prompts(tokenizer, [example], 500, training=False)
    assert (
        test["input_ids"].tolist()
        == tokenizer("List the slots.\n\nInput: a cat\nOutput:")["input_ids"]
    )
    assert tokenizer.convert_ids_to_tokens(test["input_ids"][:2]) == special[:2]
