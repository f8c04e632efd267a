"""Tiny models with random weights, a tokenizer of a few words, and what training does to them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RemBertConfig,
    XLMRobertaConfig,
)

import alignfreeze as af

WORDS = "the cat dog sees a big old house le chat chien voit une grande vieille maison".split()
VOCABULARY = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
LAYERS, HIDDEN = 4, 32
SIZE = {"vocab_size": len(VOCABULARY), "hidden_size": HIDDEN, "intermediate_size": 48}
SIZE |= {"num_attention_heads": 2, "num_hidden_layers": LAYERS, "max_position_embeddings": 64}
SIZE |= {"pad_token_id": 1}
ENDS = {"bos_token_id": 0, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS = {
    "distilbert": DistilBertConfig(
        vocab_size=len(VOCABULARY), dim=HIDDEN, hidden_dim=48, n_heads=2, n_layers=LAYERS,
        pad_token_id=1, max_position_embeddings=64, num_labels=3, dropout=0.0,
        attention_dropout=0.0,
    ),
    "bert": BertConfig(**SIZE, **NO_DROPOUT, num_labels=3),
    "xlm-roberta": XLMRobertaConfig(**SIZE, **ENDS, **NO_DROPOUT, num_labels=3),
    "modernbert": ModernBertConfig(**SIZE, **ENDS, cls_token_id=0, sep_token_id=2, num_labels=3),
}  # fmt: skip
HEADS = {"num_key_value_heads": 1, "head_dim": 16}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
DECODERS = {
    "llama": LlamaConfig(**SIZE, **ENDS, **HEADS),
    "qwen2": Qwen2Config(**SIZE, **ENDS, num_key_value_heads=1),
    "gemma3": Gemma3TextConfig(**SIZE, **ENDS, **HEADS, **SLIDING, query_pre_attn_scalar=16),
}
CONFIGS = ENCODERS | DECODERS
MORE_ENCODERS = {  # for tests of what depends on the architecture alone
    "mdeberta": DebertaV2Config(
        **SIZE, **NO_DROPOUT, num_labels=3, type_vocab_size=0, relative_attention=True,
        position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False,
    ),
    "rembert": RemBertConfig(
        **SIZE, **ENDS, **NO_DROPOUT, num_labels=3, input_embedding_size=24,
        classifier_dropout_prob=0.0,
    ),
}  # fmt: skip
MORE_DECODERS = {
    "qwen3": Qwen3Config(**SIZE, **ENDS, **HEADS),
    "mistral": MistralConfig(**SIZE, **ENDS, **HEADS, sliding_window=4),
    "olmo2": Olmo2Config(**SIZE, **ENDS, num_key_value_heads=1),
    "phi3": Phi3Config(**SIZE, **ENDS, num_key_value_heads=1),
}
ALL_ENCODERS = ENCODERS | MORE_ENCODERS
ALL_CONFIGS = ALL_ENCODERS | DECODERS | MORE_DECODERS


def build(
    architecture: str, dtype: torch.dtype = torch.float32, spread: float = 0.0, **changed: Any
) -> nn.Module:
    """Return a token classifier or a language model, without dropout unless `changed` sets it.

    spread: standard deviation of the weights; a large one tells words further apart.
    """
    torch.manual_seed(0)
    is_encoder = architecture in ALL_ENCODERS
    head = AutoModelForTokenClassification if is_encoder else AutoModelForCausalLM
    config = copy.deepcopy(ALL_CONFIGS[architecture])
    config.update(changed)
    model = head.from_config(config).to(dtype)
    if spread:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=spread)
    return model


def make_tokenizer(ends: str = "<s> $A </s>", side: str = "right") -> PreTrainedTokenizerFast:
    """Return a tokenizer whose subwords are words; ends: the special tokens of a sentence."""
    ids = {word: k for k, word in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(token, VOCABULARY.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=ends, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", cls_token="<s>", sep_token="</s>", padding_side=side,
    )  # fmt: skip


def word_pairs() -> list[af.Pair]:
    """Return five pairs of linked lists of words, of uneven length."""
    english, french = WORDS[:8], WORDS[8:]
    links = [(0, 0), (1, 1), (2, 2), (3, 3), (5, 5), (7, 7)]
    pairs = [af.Pair("fr", english, french, links)]
    pairs.append(af.Pair("fr", english[:4], french[:4], links[:4]))
    pairs.append(af.Pair("fr", english[1:3] * 9, french[1:3], [(0, 0), (1, 1)]))
    pairs.append(af.Pair("de", english[::-1], french, [(7, 0), (6, 1), (2, 5)]))
    return [*pairs, af.Pair("de", english[7:], french[7:], [(0, 0)])]


def text_pairs(count: int = 5) -> list[af.Pair]:
    """Return sentence pairs as plain text, of one to nine words."""
    random, pairs = np.random.default_rng(1), []
    for k in range(count):
        english, other = (random.choice(WORDS, random.integers(1, 10)) for _ in range(2))
        pairs.append(af.Pair("fr" if k % 2 else "de", " ".join(english), " ".join(other)))
    return pairs


def tagged(count: int, labels: int = 3) -> list[dict]:
    """Return features of a token task, of uneven length; half of the labels are missing."""
    random, features = np.random.default_rng(2), []
    for _ in range(count):
        ids = random.integers(4, len(VOCABULARY), random.integers(3, 12))
        targets = np.where(random.random(len(ids)) < 0.5, ids % labels, af.IGNORE)
        targets[-1] = ids[-1] % labels
        features.append({"input_ids": ids, "labels": targets})
    return features


def written(count: int) -> list[dict]:
    """Return features of a task that generates text: a prompt without labels, then the answer."""
    random, features = np.random.default_rng(3), []
    for _ in range(count):
        prompt = random.integers(4, len(VOCABULARY), random.integers(1, 7))
        answer = np.append(random.integers(4, len(VOCABULARY), random.integers(1, 5)), 2)
        ids = np.concatenate([[0], prompt, answer])
        labels = np.append(ids[1:], af.IGNORE)
        labels[: len(prompt)] = af.IGNORE
        features.append({"input_ids": ids, "labels": labels})
    return features


def features_for(architecture: str, count: int) -> list[dict]:
    """Return features of a task for this architecture."""
    return tagged(count) if architecture in ALL_ENCODERS else written(count)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict, model: nn.Module) -> set[str]:
    """Return the names of the parameters that differ from those before."""
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def gradient_of(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradient of a loss in every parameter; 0 where there is none."""
    model.zero_grad()
    loss.backward()
    gradient = gradients(model)
    model.zero_grad()
    return gradient


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the gradients of all parameters; 0 where there is none."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return found


@contextmanager
def updates(model: nn.Module) -> Iterator[list[dict]]:
    """Collect in a list the gradients, by name, that each update of Adam uses."""
    taken, step = [], torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        taken.append(gradients(model))
        return step(self, *args, **kwargs)

    torch.optim.Adam.step = watched
    try:
        yield taken
    finally:
        torch.optim.Adam.step = step


def assert_same(found: dict, expected: dict, tolerance: float) -> None:
    """Assert that tensors are equal, up to a share of the largest value of all of them."""
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    assert largest > 1e-6
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max().item() <= tolerance * largest, name
