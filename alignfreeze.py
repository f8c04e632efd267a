#!/usr/bin/env python3
"""Cross-lingual transfer by aligning hidden states: two published methods in one file.

AlignFreeze (Bakos et al., NAACL 2025, https://arxiv.org/abs/2502.12959). A multilingual encoder is
fine-tuned on English and tested in other languages. Before fine-tuning, it is *realigned*: in
translated sentences, a contrastive loss pulls each word towards its translation. This helps some
languages and harms others; to limit the harm, half of the layers are frozen during realignment.

Middle-layer alignment (Liu and Niehues, ACL 2025, https://arxiv.org/abs/2502.14830). A decoder-only
language model learns a task in a few languages, with low-rank adapters (LoRA). Batches of the task
alternate with batches of translations. The same loss pulls a sentence and its translation
together; here, the vector of a sentence is the mean of its hidden states at one middle layer.

    python alignfreeze.py --model xlm-roberta-base --task udpos --strategy front --seed 31
    python alignfreeze.py --method mid-align --task massive

Sections 1 to 3 are the core of both methods: AlignFreeze is `realign`, then `finetune`;
middle-layer alignment is `add_lora`, then `finetune` with the schedule `alternate`. A *link* is a
pair of words that translate each other; a *baseline* learns the task without alignment.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import unicodedata
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import regex
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch import Tensor, nn
from tqdm import tqdm

# ---- 1. Settings ---------------------------------------------------------------------------------


def setting(default, help: str):
    """Return a field of `Settings`, which is also a flag of the command line."""
    metadata = {"help": f"{help} (default: %(default)s)"}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


Decay = Literal["constant", "constant_with_warmup", "linear", "inverse_sqrt"]


@dataclasses.dataclass
class Settings:
    """All settings of a run. The defaults are AlignFreeze's for PoS; `parse_args` knows others."""

    # What to run.
    method: Literal["alignfreeze", "mid-align"] = setting("alignfreeze", "sets the other defaults")
    model: str = setting("distilbert-base-multilingual-cased", "hub id or folder")
    task: str = setting("udpos", "udpos, wikiann, xnli, xquad, massive, xsid, uner or translation")
    strategy: str = setting("front", "freeze front, back, 0-2; full: nothing; baseline: unaligned")
    schedule: Literal["before", "during", "alternate"] = setting(
        "before", "align before fine-tuning, in the same updates, or in turn with it")  # fmt: skip
    seed: int = setting(31, "AlignFreeze's five seeds are 31 42 66 23 17")
    train_languages: list[str] = setting(lambda: ["en"], "languages with labels")
    languages: list[str] = setting(lambda: [*TARGETS], "test languages besides those with labels")
    realign_languages: list[str] = setting(lambda: [*TARGETS], "languages to align with English")
    # Alignment. Name a new setting in OF_ALIGNMENT, too: the record of a baseline has none of them.
    unit: Literal["word", "sentence"] = setting("word", "what one vector stands for")
    layer: int = setting(-2, "hidden state to align: 0 is the embeddings, -1 the last")
    temperature: float = setting(0.1, "of the contrastive loss")
    aligner: str = setting("dictionary", "dictionary, a folder of links, or see --write-links")
    aligner_model: str = setting("bert-base-multilingual-cased", "encoder for --aligner awesome")
    aligner_layer: int = setting(8, "which of its hidden states to compare")
    pool_first: bool = setting(True, "include the first token in the mean of a sentence")
    realign_steps: int | None = setting(None, "updates with `before`; default: as in fine-tuning")
    realign_batch_size: int = setting(16, "sentence pairs in a batch")
    realign_max_length: int = setting(96, "subwords of a sentence, special tokens included")
    realign_lr: float = setting(2e-5, "peak learning rate with `before`")
    realign_decay: Decay = setting("constant", "schedule of that learning rate")
    # Fine-tuning.
    epochs: int = setting(5, "passes over the examples of the task")
    batch_size: int = setting(32, "examples in a batch")
    accumulate: int = setting(1, "batches in an update; `alternate` counts those of pairs, too")
    lr: float = setting(2e-5, "peak learning rate")
    decay: Decay = setting("linear", "schedule of the learning rate after warm-up")
    warmup: float = setting(0.1, "share of the updates in which the rate rises; >1: it never peaks")
    clip: float = setting(0.0, "maximum norm of the gradient; 0: no clipping")
    max_length: int = setting(96, "subwords of a training example, special tokens included")
    precision: Literal["fp32", "bf16"] | None = setting(None, "bf16 if fast and no --adapter")
    lora: int = setting(0, "rank of the adapters; 0: no adapters, all weights train")
    lora_alpha: float = setting(16.0, "scales the adapters by alpha / rank")
    lora_dropout: float = setting(0.1, "dropout in front of the adapters")
    adapter: list[str] = setting(list, "DIR or DIR=WEIGHT: adapters to merge into the model first")
    validate: int | None = setting(None, "check every N updates, keep the best, stop after 5 worse")
    checkpointing: bool = setting(False, "compute activations twice to save memory")
    # Data and output.
    data_dir: Path | None = setting(None, "folder of local data; by default, data are downloaded")
    limit_train: int | None = setting(None, "train and validate on the first N of each language")
    limit_test: int | None = setting(None, "test on the first N examples of each language")
    limit_links: int = setting(100_000, "align the first N sentence pairs of each language")
    device: str | None = setting(None, "cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    save_model: Path | None = setting(None, "new folder for the realigned encoder, LLM or adapters")
    probe: bool = setting(False, "also measure retrieval of translations at every layer")
    write_links: Path | None = setting(None, "write links (fastalign, awesome, ...) here, and stop")
    out: Path = setting(Path("results/runs"), "folder for the record")
    overwrite: bool = setting(False, "replace a record that exists")


PRESETS = {  # defaults; a flag comes first, then the task (TASKS), model, method and `Settings`
    "--method mid-align": {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct", "task": "massive",
        "strategy": "full", "schedule": "alternate", "unit": "sentence", "layer": 16,
        "realign_batch_size": 32, "realign_max_length": 2048, "lora": 8, "accumulate": 4,
        "lr": 5e-4, "decay": "inverse_sqrt", "warmup": 0.03, "clip": 1.0, "seed": 1,
        "realign_lr": 5e-4, "realign_decay": "inverse_sqrt",  # for --schedule before
    },
    "xlm-roberta-base": {"lr": 7.5e-6, "realign_lr": 7.5e-6},
    "Qwen2.5-7B-Instruct": {"temperature": 1.5},  # appendix D.1
}  # fmt: skip


# ---- 2. The methods ------------------------------------------------------------------------------


def contrastive_loss(
    vectors: Tensor, queries: Tensor, targets: Tensor, temperature: float = 0.1,
    candidates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Pull every query towards its target, and away from the other candidates; return a scalar.

        mean over (q, t) of  -log [ exp(v_q . v_t / tau) / sum over c of exp(v_q . v_c / tau) ]

    v: the vectors, scaled to unit length; (N, d). tau: the temperature. queries, targets: (Q,)
    indices of vectors. candidates: (C,) indices; None: all vectors but the query itself.

    Words: both words of a link are queries, and all words of the batch are candidates ("strong
    alignment", Wu and Dredze 2020, https://arxiv.org/abs/2010.02537). Sentences: the translations
    are queries, and the English sentences are candidates.
    """
    vectors = F.normalize(vectors, dim=-1)
    similarity = vectors[queries] @ vectors.T / temperature  # (Q, N)
    similarity = similarity.scatter(1, queries[:, None], -math.inf)  # not the query itself
    if candidates is not None:
        is_candidate = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        is_candidate[candidates] = True
        similarity = similarity.masked_fill(~is_candidate, -math.inf)
    total = F.cross_entropy(similarity, targets, reduction="sum")
    return total / max(len(queries), 1)  # a batch may have no link


class UserError(Exception):
    """Invalid input: what is wrong, where, and what to do. The script exits with status 2."""


def require(condition, location, message: str) -> None:
    """Raise UserError("location: message") unless the condition holds."""
    if not condition:
        raise UserError(f"{location}: {message}")


def parameters_of_layers(model: nn.Module, spec: str) -> set[nn.Parameter]:
    """Return the parameters that `spec` freezes; with LoRA, only the adapters among them.

    `front` freezes the lower half of the layers, `back` the upper half, `full` (full realignment),
    `none` and `baseline` no layer, `emb,0-2,11` the embeddings and four layers, counted from 0.
    Halves leave out the embeddings, as in the authors' code. Raises UserError for another name.
    """
    encoder, parameters = model.base_model, set()
    layers = transformer_layers(encoder)
    for part in layer_numbers(spec, len(layers)):
        module = embeddings(encoder) if part == "emb" else layers[part]
        parameters.update(module.parameters())
    return {parameter for parameter in parameters if parameter.requires_grad}


@contextmanager
def frozen(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Freeze these parameters during a `with` block; `optimize` does so around alignment."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class LoraLinear(nn.Module):
    """W x + scale * B A x; A and B train (Hu et al. 2022, https://arxiv.org/abs/2106.09685)."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = base_layer
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        with base_layer.weight.device:
            self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)  # at first, the output is that of W alone

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))  # W may be in bfloat16
        return self.base_layer(x) + (self.scale * self.lora_B(low)).to(x.dtype)


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float) -> list[str]:
    """Freeze the pretrained weights, and add adapters to all linear modules of the layers.

    The experts of a mixture are fused tensors instead of linear modules: they get no adapters.
    Returns the names of the parameters that train: the adapters, and the new head of a classifier.
    """
    pretrained = model.base_model if is_classifier(model) else model  # a classifier's head is new
    pretrained.requires_grad_(False)
    for layer in transformer_layers(model.base_model):
        for name, module in linear_modules(layer):
            layer.set_submodule(name, LoraLinear(module, rank, alpha, dropout))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def hidden_state(encoder: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """Return `hidden_states[layer]`, (B, T, d), numbered as in transformers.

    With 12 layers, 0 is the embeddings, -2 or 11 the input of the last layer, -1 or 12 its output.
    No layer above it is computed or trained. Rows of similar length are computed together.
    """
    length = inputs["input_ids"].shape[1]
    order, states = [], []
    for rows, group in by_length(encoder, inputs):
        hidden = run_to_layer(encoder, group, layer)
        states.append(F.pad(hidden, (0, 0, 0, length - hidden.shape[1])))
        order.append(rows)
    return torch.cat(states)[torch.cat(order).argsort()]


class PairBatch(NamedTuple):
    """B sentence pairs as tensors: first the B English sentences, then their B translations.

    Words, B = 1:

        position    0      1    2    3       4      5    6     7        (positions: 1 2 5 6)
        subword     [CLS]  a    cat  [SEP]   [CLS]  un   chat  [SEP]
        vector             0    1                   2    3
        link        cat - chat, used in both directions: queries 1 3, targets 3 1

    Sentences, B = 2: vector k is sentence k; queries 2 3, targets 0 1, candidates 0 1.
    """

    inputs: dict[str, Tensor]  # input_ids and attention_mask, (2B, T)
    positions: Tensor | None  # (N,) first subword of each word, flattened; None: whole sentences
    queries: Tensor  # (Q,) vectors that have a link
    targets: Tensor  # (Q,) vectors of their translations
    candidates: Tensor | None  # (C,) vectors a query is compared with; None: all others
    pairs: list[Pair]  # the text: (language, English, translation, links)
    cut: list[int]  # (B,) for the record: links (whole sentences: 1) lost at the maximum length


def vectors_of(hidden: Tensor, batch: PairBatch, pool_first: bool = True) -> Tensor:
    """Return (N, d): the first subword of each word, or the mean of each sentence.

    hidden: (2B, T, d). pool_first: whether the mean counts the first position of a sentence.
    """
    if batch.positions is not None:
        return hidden.flatten(0, 1)[batch.positions]
    mask = batch.inputs["attention_mask"]
    if not pool_first:  # drop the first token: it attracts most attention, and is an outlier
        mask = mask * (mask.cumsum(1) > 1)
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return (hidden.float() * weights[:, :, None]).sum(1)


def projection_head(hidden_size: int, unit: str) -> nn.Module:
    """Return a head for words, 128 dimensions, discarded after training; identity for sentences."""
    if unit == "sentence":
        return nn.Identity()
    hidden = nn.Linear(hidden_size, hidden_size, bias=False)
    return nn.Sequential(hidden, nn.ReLU(), nn.Linear(hidden_size, 128, bias=False))


def alignment_loss(encoder, projection, batch: PairBatch, settings: Settings) -> Tensor:
    """Return the contrastive loss of a batch of sentence pairs at one layer of the encoder."""
    hidden = hidden_state(encoder, batch.inputs, settings.layer)  # (2B, T, d)
    require(hidden.requires_grad, f"--layer {settings.layer}", "nothing below it trains")
    vectors = projection(vectors_of(hidden, batch, settings.pool_first)).float()  # (N, d)
    queries, targets = batch.queries, batch.targets
    with torch.autocast(vectors.device.type, enabled=False):  # cosines near 1 need float32
        return contrastive_loss(vectors, queries, targets, settings.temperature, batch.candidates)


def realign(model, tokenizer, pairs: Iterable[Pair], steps: int, settings: Settings) -> tuple:
    """Align the encoder of a model in place, before it learns a task.

    The layers named by `settings.strategy` stay frozen. pairs: a list of `Pair`s, repeated as often
    as needed, or an iterator. Returns ({"align": [mean of 20 losses, ...]}, {language: counts}).
    Raises UserError for a baseline, and if an iterator ends before the last update.
    """
    require(settings.strategy != "baseline", "realign", "a baseline is not aligned; leave it out")
    aligned = pair_batches(tokenizer, pairs, settings, model.device)
    settings = dataclasses.replace(settings, lr=settings.realign_lr, decay=settings.realign_decay)
    return optimize("realign", model, zip(itertools.repeat(None), aligned), steps, settings)


def scheduled(schedule: str, task: Iterable, aligned: Iterable) -> Iterator[tuple]:
    """Yield (examples, translations): batches E1, E2, ... of the task, T1, T2, ... of pairs.

    none, before  (E1, None), (E2, None), ...  a baseline, or `realign` has aligned the model
    during        (E1, T1), (E2, T2), ...
    alternate     (E1, None), (None, T1), (E2, None), (None, T2), ...
    """
    if schedule in ("none", "before"):
        aligned = itertools.repeat(None)
    for examples, translations in zip(task, aligned):
        if schedule == "alternate":
            yield examples, None
            yield None, translations
        else:
            yield examples, translations


def finetune(model, tokenizer, features: list[dict], settings: Settings, pairs=(), stop=None):
    """Train a model on a task in place, and align it at the same time if the schedule says so.

    features: from `task.encode`. pairs: as in `realign`; ignored by a baseline and with `before`.
    stop: called after every update; true ends training. Returns what `optimize` returns.
    """
    schedule = "none" if settings.strategy == "baseline" else settings.schedule
    examples = task_batches(tokenizer, features, settings, model.device)
    translations = pair_batches(tokenizer, pairs, settings, model.device)
    batches = scheduled(schedule, examples, translations)
    steps = finetune_steps(len(features), settings)  # twice as many with `alternate`
    return optimize("fine-tune", model, batches, steps, settings, stop)


# ---- 3. Training and testing ---------------------------------------------------------------------


def optimize(stage: str, model, batches: Iterator, steps: int, settings: Settings, stop=None):
    """The training loop of both methods: make `steps` Adam updates to the model, in place.

    batches: as `scheduled` yields them; an update takes `settings.accumulate` of them. Alignment
    does not train the layers named by `settings.strategy`. stop: called after every update; true
    ends training. Returns ({"task" or "align": [mean of 20 losses, ...]}, {language: pair counts}).
    """
    torch.manual_seed(settings.seed)
    projection = projection_head(model.config.hidden_size, settings.unit).to(model.device)
    frozen_layers = parameters_of_layers(model, settings.strategy)  # alignment does not train them
    parameters = [p for p in [*model.parameters(), *projection.parameters()] if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, settings.lr, fused=True)
    rate = learning_rate_schedule(optimizer, settings, steps)
    log = TrainingLog(stage, steps)
    rank, world = processes()
    model.train()
    numbered = prefetched(itertools.islice(enumerate(batches), steps * settings.accumulate))
    for step in progress(range(1, steps + 1), stage):
        group = list(itertools.islice(numbered, settings.accumulate))  # the batches of an update
        log.begin_update(step, group)  # raises UserError if no batch is left, or for NaN
        optimizer.zero_grad()
        for number, (examples, translations) in group[rank::world]:  # this process's share
            torch.manual_seed((settings.seed + 1_000_003 * number) % 2**32)  # for dropout
            if examples:
                with autocast(model.device, settings.precision):
                    loss = task_loss(model, examples)
                (loss / len(group)).backward()
                log.losses.append((number, "task", loss.detach()))
            if translations:
                weight = 0.1 if examples else 1.0  # 0.1 with `during`, as in the authors' code
                with frozen(frozen_layers):  # in backward too: --checkpointing runs layers again
                    with autocast(model.device, settings.precision):
                        loss = alignment_loss(model.base_model, projection, translations, settings)
                    (weight * loss / len(group)).backward()
                log.losses.append((number, "align", loss.detach()))
        sum_gradients(parameters)
        if settings.clip:
            nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        rate.step()
        if stop and stop(step):
            break
    model.eval()
    return log.result()


def task_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy over the labels of a batch.

    batch: the model's inputs, (B, T), and "labels": (B, T) for words and for generated text, (B, 1)
    for sentences, (B, 2) for the first and last position of an answer; `IGNORE` for no label.
    """
    total = 0.0
    for _, inputs in by_length(model, batch):  # groups of rows, to save padding
        labels = inputs.pop("labels")
        if is_classifier(model):
            logits = task_logits(model, inputs).flatten(0, -2)  # a row for each label
        else:  # the labels are shifted already: each is the token that follows its position
            logits = token_logits(model, inputs, labels != IGNORE)
            labels = labels[labels != IGNORE]
        logits, labels = logits.float(), labels.flatten()
        total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (batch["labels"] != IGNORE).sum().clamp(min=1)


def evaluate(model, tokenizer, task: Task, examples: list, features: list, settings: Settings):
    """Return {metric: 0 to 1}. `task.encode` made one or more features of each example."""
    outputs: list = [None] * len(features)  # logits or generated text, one for each feature
    order = sorted(range(len(features)), key=lambda k: len(features[k]["input_ids"]))  # by length
    size = 128 if task.new_tokens and model.device.type != "cpu" else 32  # to keep a GPU busy
    with autocast(model.device, settings.precision):
        for chunk in in_chunks(order, size):
            results = predict(model, tokenizer, task, [features[k] for k in chunk])
            for k, result in zip(chunk, results):
                outputs[k] = result
    scores = task.score(examples, features, outputs)
    return {metric: round(value, 6) for metric, value in scores.items()}


# ---- 4. Models: layers, hidden states, logits, generated text ------------------------------------

IGNORE = -100  # the label of a position that has none


def freeze(model: nn.Module, spec: str) -> list[str]:
    """Freeze the layers named by `spec` for good; return the names of the parameters it froze.

    This is for notebooks and other scripts; this script itself freezes layers while it aligns.
    """
    parameters = parameters_of_layers(model, spec)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter in parameters]


def layer_numbers(spec: str, depth: int) -> set[int | str]:
    """Return the layers that `spec` names: numbers, and "emb". Raises UserError for others."""
    half, numbers = depth // 2, set()
    groups = {"front": range(half), "back": range(half, depth), "emb": ["emb"]}  # named schemes
    if spec in ("none", "full", "baseline"):
        return numbers
    for part in spec.split(","):
        span = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if span:
            first, last = int(span[1]), int(span[2] or span[1])
            message = f"layers are numbered from 0 to {depth - 1}, the lower one first"
            require(first <= last < depth, f"--strategy {spec}", message)
            numbers.update(range(first, last + 1))
        else:
            names = f"{', '.join(groups)} or numbers (emb,0-2,11); alone: none, full, baseline"
            require(part in groups, f"--strategy {spec}", f"cannot use '{part}'; give {names}")
            has_halves = depth > 1 or part == "emb"
            require(has_halves, f"--strategy {spec}", "one layer cannot be halved")
            numbers.update(groups[part])
    return numbers


def transformer_layers(encoder: nn.Module) -> nn.ModuleList:
    """Find the list of transformer layers of an encoder or decoder by its structure.

    Raises UserError if there is none, or if several lists hold the parts of each layer.
    """
    depth = getattr(encoder.config, "num_hidden_layers", None)
    for module in encoder.modules():  # from the outside to the inside
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        lists = [layers for layers in lists if len(layers) == depth]
        if len(lists) == 1 and len(set(map(type, lists[0]))) == 1:
            return lists[0]
        message = "keeps the parts of its layers in parallel lists; choose another model"
        require(len(lists) < 2, type(encoder).__name__, message)
    raise UserError(f"{type(encoder).__name__}: found no list of its {depth} layers to freeze")


def linear_modules(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return (name, module) of each linear module. Raises UserError if the layer cannot be adapted.

    That is the case if it has no linear module, has adapters already, or is a layer of Mamba, whose
    fused kernels would bypass them.
    """
    linear = [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]
    is_refused = any(isinstance(m, LoraLinear) or hasattr(m, "A_log") for m in layer.modules())
    message = "not possible: its layers have no plain linear modules, or have adapters already"
    require(linear and not is_refused, "--lora", message)
    return linear


def embeddings(encoder: nn.Module) -> nn.Module:
    """Return the module that holds the word embeddings, and most often those of positions.

    Left out: positions of GPT-2 and OPT, relative ones of DeBERTa and MPNet, and the projection of
    a small ELECTRA and RemBERT.
    """
    words, layers = encoder.get_input_embeddings(), transformer_layers(encoder)
    for module in encoder.children():
        if words in module.modules() and layers not in module.modules():
            return module
    return words


def is_classifier(model: nn.Module) -> bool:
    """Return whether a model has a task's classifier instead of a language model's head."""
    return model.get_output_embeddings() is None


def autocast(device: torch.device, precision: str | None) -> torch.autocast:
    """Return a context in which matrix products are in bfloat16, if `precision` is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def by_length(model, batch: dict[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Split a batch into 8 groups of rows of similar length; yield (row numbers, tensors).

    This saves half of the time, as hardly any padding is computed, and changes no result (but what
    dropout draws). On a GPU a pass takes the same time however short the rows are: one group.
    """
    lengths = batch["attention_mask"].sum(1)
    if lengths.device.type != "cpu":
        yield torch.arange(len(lengths), device=lengths.device), dict(batch)
        return
    order = lengths.argsort(stable=True)
    # Look up the embeddings once: the gradient of each look-up is as large as the vocabulary.
    table = model.get_input_embeddings()
    embedded = table(batch["input_ids"][order])  # (B, T, d)
    for rows, vectors in zip(order.chunk(8), embedded.chunk(8)):
        longest = int(lengths[rows[-1]])
        group = {name: tensor[rows, :longest] for name, tensor in batch.items()}
        # A hook inserts them, because some models count positions differently with `inputs_embeds`.
        with table.register_forward_hook(replace_by(vectors[:, :longest])):
            yield rows, group


def replace_by(vectors: Tensor) -> Callable:
    """Return a hook that replaces a module's output, unless a model has padded it (Longformer)."""
    return lambda module, inputs, output: vectors if output.shape == vectors.shape else output


def run_to_layer(encoder: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """Return `hidden_states[layer]`; a hook ends the forward pass there, by an exception."""
    layers = transformer_layers(encoder)
    depth = len(layers)
    message = f"the hidden states of this model are {-depth - 1} to {depth}"
    require(-depth - 1 <= layer <= depth, f"layer {layer}", message)

    class LayerReached(Exception): ...

    def stop(module, args, kwargs):
        layer_input = args[0] if args else kwargs["hidden_states"]
        raise LayerReached(layer_input)

    if layer in (-1, depth):
        hidden = encoder(**inputs).last_hidden_state
    else:
        hidden = None
        with layers[layer % (depth + 1)].register_forward_pre_hook(stop, with_kwargs=True):
            try:
                encoder(**inputs)
            except LayerReached as reached:
                (hidden,) = reached.args
        require(hidden is not None, type(encoder).__name__, "a hook cannot reach its layers")
    message = "has several hidden states for each subword: it cannot be aligned or probed"
    is_one = hidden.ndim == 3 and hidden.shape[2] <= encoder.config.hidden_size
    require(is_one, type(encoder).__name__, message)
    return hidden


def task_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of a classifier.

    (B, T, classes) for words, (B, classes) for sentences, (B, 2, T) for the ends of an answer.
    """
    output = model(**inputs)
    if "logits" in output:
        return output.logits
    ends = torch.stack([output.start_logits, output.end_logits], dim=1)
    return ends.masked_fill(inputs["attention_mask"][:, None] == 0, -math.inf)


@torch.no_grad()
def predict(model, tokenizer, task: Task, features: list[dict]) -> Sequence:
    """Return generated texts, or the logits of a classifier, shaped as in `task_logits`."""
    model.eval()
    if task.new_tokens:
        prompts = [feature["input_ids"] for feature in features]
        return generate(model, tokenizer, prompts, task.new_tokens)
    batch = task_batch(features, tokenizer.pad_token_id, model.device)
    del batch["labels"]
    logits = task_logits(model, batch).float().cpu().numpy()
    require(not np.isnan(logits).any(), "evaluation", "the model's outputs are not numbers (NaN)")
    return logits


def token_logits(model: nn.Module, inputs: dict[str, Tensor], where: Tensor) -> Tensor:
    """Return the logits of a language model, (positions, vocabulary), at the positions `where`.

    where: (B, T), boolean. A hook hands these positions alone to the model's head, because the
    logits of all positions are large; scaling and the like stay those of the model.
    """
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, hidden: (hidden[0][where],)):
        return model(**inputs).logits


def generate(model, tokenizer, prompts: list[np.ndarray], new_tokens: int) -> list[str]:
    """Return the text that the model writes after each prompt, by greedy decoding.

    An answer ends at any of the model's end tokens. Raises UserError for NaN.
    """
    longest = max(map(len, prompts))
    room = max(1, tokenizer.model_max_length - longest)
    if room < new_tokens and len(prompts) > 1:  # a long prompt must not shorten other answers
        return [generate(model, tokenizer, [ids], new_tokens)[0] for ids in prompts]
    inputs = pad_inputs(prompts, tokenizer.pad_token_id, model.device, side="left")

    def require_numbers(head, hidden):
        require(not hidden[0].isnan().any(), "generation", "hidden states are not numbers (NaN)")
        return (hidden[0].contiguous(),)  # of a view with gaps, a frozen head would be copied

    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = sorted({tokenizer.eos_token_id, *ends} - {None})
    # A model's own configuration may sample, or penalise repetition, which copies need.
    options = {"do_sample": False, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = transformers.GenerationConfig(**options)
    try:
        with model.get_output_embeddings().register_forward_pre_hook(require_numbers):
            ids = model.generate(**inputs, max_new_tokens=min(new_tokens, room))
    finally:
        model.generation_config = config  # --save-model writes it
    answers = []
    for row in ids[:, longest:].tolist():  # the decoder would keep ends not flagged as special
        answers.append(list(itertools.takewhile(lambda token: token not in ends, row)))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.batch_decode(answers, **options)


# ---- 5. The training loop: processes, learning rate, log -----------------------------------------


def processes() -> tuple[int, int]:
    """Return (number of this process, how many processes train one model); torchrun starts them."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(value) -> list:
    """Return the values of all processes, that of process 0 first."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add up the gradients of all processes, some of which may have none for a parameter."""
    if processes()[1] == 1:
        return
    has_gradient = gather_objects([parameter.grad is not None for parameter in parameters])
    trained = list(itertools.compress(parameters, np.any(has_gradient, axis=0)))
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = nn.utils.parameters_to_vector(parameter.grad for parameter in trained)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat, (parameter.grad for parameter in trained))


def finetune_steps(examples: int, settings: Settings) -> int:
    """Return the number of updates of fine-tuning; with `alternate`, those of alignment count."""
    batches = settings.epochs * math.ceil(examples / settings.batch_size)
    if settings.schedule == "alternate" and settings.strategy != "baseline":
        batches *= 2
    return math.ceil(batches / settings.accumulate)


def learning_rate_schedule(optimizer, settings: Settings, steps: int):
    """Return the schedule of the learning rate; warm-up is rounded as each paper's authors do."""
    warmup = settings.warmup * steps
    warmup = math.ceil(warmup) if settings.decay == "inverse_sqrt" else int(warmup + 1e-9)
    return transformers.get_scheduler(settings.decay, optimizer, warmup, steps)


def say(line: str) -> None:
    """Print a line at once, in the first process only."""
    if processes()[0] == 0:
        print(line, flush=True)


def progress(items: Iterable, stage: str) -> tqdm:
    """Return a progress bar; disabled when stderr is not a terminal."""
    disable = True if processes()[0] > 0 else None  # None: only if stderr is not a terminal
    return tqdm(items, stage, leave=False, disable=disable)


def prefetched(items: Iterator, count: int = 8) -> Iterator:
    """Yield the items, up to `count` of which a thread makes in advance. No item may be None."""
    pool = ThreadPoolExecutor(1)
    coming = deque(pool.submit(next, items, None) for _ in range(count))
    try:
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item
    finally:  # after an error or Ctrl-C, wait for one item only
        pool.shutdown(cancel_futures=True)


def in_chunks(items: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` items; the last list may be shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


class TrainingLog:
    """The losses of a stage of training, and counts of the pairs that it aligns."""

    def __init__(self, stage: str, steps: int):
        self.stage, self.steps, self.step, self.start_time = stage, steps, 0, time.time()
        self.losses: list[tuple[int, str, Tensor]] = []  # (number of the batch, name, scalar)
        self.aligned: dict[str, Counter] = {}  # by language

    def begin_update(self, step: int, group: list) -> None:
        """Begin an update with these batches. Raises UserError if there are none, or for NaN."""
        require(group, self.stage, f"no pairs after {step - 1} of {self.steps} steps; give more")
        if self.step % 20 == 0:  # look for NaN in the last losses; seldom, as this waits for a GPU
            loss_curves(self.stage, self.losses[-20:])
        self.step = step
        for batch in [translations for _, (_, translations) in group if translations]:
            for pair, cut in zip(batch.pairs, batch.cut):
                counts = self.aligned.setdefault(pair.language, Counter())
                words = max(0, len(pair.links) - cut)  # 0 with sentences
                counts.update(sentences=1, words=words, cut=cut, skipped=pair.skipped)
                counts["readings"] = pair.reading

    def result(self) -> tuple[dict, dict]:
        curves = loss_curves(self.stage, self.losses)
        line = f"{self.stage}: {self.step} steps"
        for name, curve in curves.items():
            line += f", {name} loss {curve[0]:.3f}"
            line += f" -> {curve[-1]:.3f}" if len(curve) > 1 else ""
        say(f"{line}, {time.time() - self.start_time:.1f} s")
        return curves, self.aligned


def loss_curves(stage: str, losses: list[tuple[int, str, Tensor]]) -> dict[str, list[float]]:
    """Return {name: mean of every 20 losses} over all processes. Raises UserError for NaN."""
    values = torch.stack([loss for *_, loss in losses]).float().tolist() if losses else []
    local = [(number, name, value) for (number, name, _), value in zip(losses, values)]
    curves = defaultdict(list)
    for _, name, value in sorted(itertools.chain(*gather_objects(local))):
        require(math.isfinite(value), stage, f"the loss is {value}; lower the learning rate")
        curves[name].append(value)
    for name, values in curves.items():
        curves[name] = [round(float(np.mean(part)), 6) for part in in_chunks(values, 20)]
    return dict(curves)


# ---- 6. Batches ----------------------------------------------------------------------------------

Links = list[tuple[int, int]]  # [(index of an English word, index of its translation), ...]


class Pair(NamedTuple):
    """An English sentence and its translation, as text, or as words with one-to-one links."""

    language: str  # of the translation
    source: list[str] | str
    target: list[str] | str
    links: Links = ()
    skipped: int = 0  # unusable pairs between the previous pair and this one
    reading: int = 1  # 2 when the text of this language is read for the second time, and so on


class Window(NamedTuple):
    """A stretch of a tokenised sentence, special tokens included. All arrays are (T,)."""

    sentence: int  # which sentence it comes from
    ids: np.ndarray  # subword ids
    words: np.ndarray  # index of the word that each subword belongs to; -1 for special tokens
    first: np.ndarray  # whether a subword is the first visible one of its word


def pair_batches(tokenizer, pairs: Iterable[Pair], settings, device="cpu") -> Iterator[PairBatch]:
    """Yield full batches of pairs; an incomplete last one is dropped. A list repeats without end.

    Raises UserError if the pairs are not of the unit that is aligned.
    """
    encode = encode_pairs if settings.unit == "word" else encode_texts
    kind = list if settings.unit == "word" else str
    size = settings.realign_batch_size
    is_list = isinstance(pairs, Sequence)
    is_short = is_list and 0 < len(pairs) < size  # a batch would hold the same pair twice
    require(not is_short, "sentence pairs", f"fewer than realign_batch_size, {size}")
    pairs = itertools.cycle(pairs) if is_list else iter(pairs)
    while len(chunk := list(itertools.islice(pairs, size))) == size:
        kinds = {type(side) for pair in chunk for side in (pair.source, pair.target)}
        message = f"with the unit {settings.unit}, both sides must be a {kind.__name__}"
        require(kinds == {kind}, "sentence pairs", message)
        yield encode(tokenizer, chunk, settings.realign_max_length, device)


def encode_pairs(tokenizer, pairs: list[Pair], max_length: int, device="cpu") -> PairBatch:
    """Turn pairs of linked words into a batch; cut sentences off at `max_length` subwords."""
    sentences = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    windows = encode_words(tokenizer, sentences, max_length)
    vector_of: dict[tuple[int, int], int] = {}  # (sentence, word): number of its position below
    for window in windows:
        for word in window.words[window.first].tolist():
            vector_of[window.sentence, word] = len(vector_of)
    linked, cut = [], []
    for k, pair in enumerate(pairs):
        n, m = len(pair.source), len(pair.target)
        fits = all(0 <= i < n and 0 <= j < m for i, j in pair.links)
        require(fits, "sentence pairs", f"a link of pair {k} points beyond its {n} and {m} words")
        links = [((k, i), (k + len(pairs), j)) for i, j in pair.links]
        links_left = [(s, t) for s, t in links if s in vector_of and t in vector_of]
        kept = [(vector_of[s], vector_of[t]) for s, t in links_left]
        cut.append(len(links) - len(kept))
        linked += kept
    inputs = pad_inputs([window.ids for window in windows], tokenizer.pad_token_id, device)
    is_first = pad([window.first for window in windows], False)  # (2B, T)
    positions = is_first.flatten().nonzero().squeeze(1).to(device)
    source, target = torch.tensor(linked, dtype=torch.long, device=device).reshape(-1, 2).T
    queries, targets = torch.cat([source, target]), torch.cat([target, source])
    return PairBatch(inputs, positions, queries, targets, None, pairs, cut)


def encode_texts(tokenizer, pairs: list[Pair], max_length: int, device="cpu") -> PairBatch:
    """Turn pairs of sentences into a batch, as plain text without a chat template."""
    texts = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    is_cut = [bool(text.overflowing) for text in encoded.encodings]
    cut = [int(a or b) for a, b in zip(is_cut, is_cut[len(pairs) :])]
    rows = encoded["input_ids"]
    ids = [np.array(row or [tokenizer.pad_token_id]) for row in rows]  # a text may lack subwords
    inputs = pad_inputs(ids, tokenizer.pad_token_id, device)
    english, other = torch.arange(len(texts), device=device).chunk(2)
    return PairBatch(inputs, None, other, english, english, pairs, cut)


def encode_words(tokenizer, sentences: list, max_length: int, windows=False) -> list[Window]:
    """Tokenise sentences that are lists of words, into at most `max_length` subwords each.

    The subwords are those of the words joined by blanks. The first *visible* one represents a word:
    XLM-R's tokenizer can put a lone `▁` in front (`▁ ，`), which the authors' code deletes, too.
    What does not fit is cut off, or goes into further windows if `windows` is true.
    """
    backend = tokenizer.backend_tokenizer
    frame = tokenizer("a a", return_special_tokens_mask=True)  # <s> ▁a ▁a </s>; ends truncation
    marks = [token[0] for token in frame.tokens() if token[0] in "▁Ġ"]  # signs for a blank
    lone_mark = backend.token_to_id(marks[0]) if marks else None
    is_unigram = type(backend.model).__name__ == "Unigram"  # such as XLM-R's
    text_at = np.flatnonzero(np.array(frame["special_tokens_mask"]) == 0)
    start, _, end = np.split(np.array(frame["input_ids"]), [text_at[0], text_at[-1] + 1])
    around = len(start), len(end)  # numbers of special tokens
    room = max_length - sum(around)
    result = []
    texts = [" ".join(words) for words in sentences]
    for k, encoding in enumerate(backend.encode_batch(texts, add_special_tokens=False)):
        ids = np.array(encoding.ids, dtype=np.int64)
        words = words_at(sentences[k], encoding.offsets)
        is_last = np.diff(words, append=-1) != 0  # last subword of its word
        is_visible = (ids != lone_mark) | is_last  # keep a mark that is a whole word
        first = np.zeros_like(is_visible)
        first[is_visible] = np.diff(words[is_visible], prepend=-1) != 0  # first of its word
        if is_unigram:  # BPE keeps it: Gemma's has it in front of every number (▁ 5, ▁ 1 0)
            ids, words, first = ids[is_visible], words[is_visible], first[is_visible]
        for at in range(0, max(len(ids), 1) if windows else 1, room):
            part = slice(at, at + room)
            framed_ids = np.concatenate([start, ids[part], end])
            framed_words = np.pad(words[part], around, constant_values=-1)
            framed_first = np.pad(first[part], around)
            result.append(Window(k, framed_ids, framed_words, framed_first))
    return result


def words_at(words: list[str], spans: list[tuple[int, int]]) -> np.ndarray:
    """Return the word that holds the last character of each span (start, end), (T,)."""
    ends = np.cumsum([len(word) + 1 for word in words]) - 1  # of each word in the joined text
    last = [max(start, end - 1) for start, end in spans]
    return np.searchsorted(ends[:-1], last, side="right")  # a blank counts for the next word


def task_batches(tokenizer, features: list[dict], settings, device="cpu") -> Iterator[dict]:
    """Yield batches of a task's examples, shuffled anew in every epoch."""
    order = random.Random(settings.seed)
    for _ in range(settings.epochs):
        shuffled_features = order.sample(features, len(features))
        for chunk in in_chunks(shuffled_features, settings.batch_size):
            yield task_batch(chunk, tokenizer.pad_token_id, device)


def task_batch(features: list[dict], pad_id: int, device="cpu") -> dict[str, Tensor]:
    """Stack features into a batch: the inputs of the model, (B, T), and their "labels"."""
    batch = pad_inputs([feature["input_ids"] for feature in features], pad_id, device)
    if "token_type_ids" in features[0]:
        batch["token_type_ids"] = pad([row["token_type_ids"] for row in features], 0).to(device)
    batch["labels"] = pad([feature["labels"] for feature in features], IGNORE).to(device)
    return batch


def pad_inputs(ids: list[np.ndarray], pad_id: int, device, side="right") -> dict[str, Tensor]:
    """Return the `input_ids` and `attention_mask` of tokenised sentences, (B, T)."""
    mask = pad([np.ones_like(row) for row in ids], 0, side)
    return {"input_ids": pad(ids, pad_id, side).to(device), "attention_mask": mask.to(device)}


def pad(rows: Iterable[np.ndarray], value: int, side="right") -> Tensor:
    """Stack (T,) arrays into a tensor, (B, longest T), filled up with `value` on one side."""
    rows = [torch.from_numpy(row) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


# ---- 7. Text -> words -> links -------------------------------------------------------------------

UNSPACED_LANGUAGES = ("zh", "ja", "th")  # written without blanks
LONG_CODES = {  # ISO 639-3 codes of languages that the tables below name by two letters
    "zho": "zh", "cmn": "zh", "yue": "zh", "jpn": "ja", "kor": "ko", "tha": "th", "lao": "lo",
    "khm": "km", "mya": "my", "bod": "bo", "dzo": "dz",
}  # fmt: skip
UNSPACED = r"(?!\d)[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}ー]"  # a character of their scripts
WORD = regex.compile(r"[\w\p{M}]+|[^\w\p{M}\s]+")  # a combining mark belongs to its word (Hindi)
RUN = regex.compile(rf"(?:{UNSPACED}\p{{M}}*)+|(?:(?!{UNSPACED})[\w\p{{M}}])+|[^\w\p{{M}}\s]+")
LONGEST_WORD = 32  # characters of the longest word that is looked up; marks do not count
Words = tuple[list[str], list[str]]  # source words, target words of a sentence pair


class ParallelText:
    """English text with its translation into one language, and the means to link their words.

    part: "train", or "dev" for --probe, whose words the dictionary links. Local files are read to
    their end here, so that errors in them are found before training.
    """

    def __init__(self, language: str, settings: Settings, part: str = "train"):
        self.language, self.settings, self.part = language, settings, part
        self.forward: Dictionary = {}
        self.backward: Dictionary = {}  # its keys are also the vocabulary for `split_words`
        self.links: list[Links] | None = None  # of each line, if they come from a folder
        self.utterances: list[tuple[str, str]] = []  # of MASSIVE: read once, because they are few
        is_word = settings.unit == "word"
        by_dictionary = settings.aligner == "dictionary" or part == "dev"
        is_unspaced = base_language(language) in UNSPACED_LANGUAGES
        if is_word and (by_dictionary or is_unspaced):
            self.forward, self.backward = read_dictionary(language, settings.data_dir)
        if is_word and part == "train" and settings.aligner not in ALIGNERS:
            self.links = read_links(Path(settings.aligner), self)
        elif settings.data_dir:
            for _ in self.lines():  # raises the errors of all lines
                pass

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield (English, translation)."""
        lines = self.utterances or parallel_lines(self.language, self.settings, self.part)
        if self.settings.task == "massive":
            lines = self.utterances = list(lines)
        limit = self.settings.limit_links if self.links is None else len(self.links)
        return itertools.islice(lines, limit)

    def words(self, line: tuple[str, str]) -> Words:
        """Split both sides of a line into words."""
        source, target = line
        return split_words(source, SOURCE), split_words(target, self.language, self.backward)

    def pair(self, number: int, line: tuple[str, str]) -> Pair:
        """Return a line, which is the `number`-th of the text from 0, as a pair with its links."""
        if self.settings.unit == "sentence":
            return Pair(self.language, *line)
        source, target = self.words(line)
        if self.links is None:
            links = dictionary_links(source, target, self.forward, self.backward)
        else:
            links = self.links[number]
        return Pair(self.language, source, target, one_to_one(links, source, target))

    def stream(self) -> Iterator[Pair]:
        """Yield pairs without end, shuffled anew in each reading of the text.

        Pairs that are not usable are skipped and counted. Raises UserError if all are skipped.
        """
        skipped = 0
        for reading in itertools.count(1):
            is_empty = True
            seed = f"{self.settings.seed} {self.language} {reading}"
            for number, line in shuffled(enumerate(self.lines()), seed):
                pair = self.pair(number, line)
                if is_usable(pair):
                    yield pair._replace(skipped=skipped, reading=reading)
                    skipped, is_empty = 0, False
                else:
                    skipped += 1
            message = "no sentence pair has both sides or a link; check texts, dictionary and links"
            require(not is_empty, f"{SOURCE}-{self.language}", message)


def is_usable(pair: Pair) -> bool:
    """Return whether a pair of words has a link, or both sentences of a pair have text."""
    is_text = isinstance(pair.source, str)
    return bool(pair.source.strip() and pair.target.strip() if is_text else pair.links)


def parallel_lines(language: str, settings: Settings, part: str) -> Iterator[tuple[str, str]]:
    """Yield (English, translation) from `parallel/en-XX.tsv` of --data-dir, or from OPUS-100.

    The task `massive` uses its own utterances. The part "dev" is `en-XX.dev.tsv`, or the
    validation split of OPUS-100 or MASSIVE.
    """
    if settings.task == "massive":
        yield from utterance_pairs(language, "valid" if part == "dev" else "train", settings)
        return
    if settings.data_dir:
        name = f"{SOURCE}-{language}{'.dev' if part == 'dev' else ''}.tsv"
        yield from read_tsv(settings.data_dir / "parallel" / name)
        return
    hub = {"path": "Helsinki-NLP/opus-100", "name": "-".join(sorted((SOURCE, language)))}
    hub["split"] = "validation" if part == "dev" else "train"
    for location, row in read_rows(settings, language, part, hub, translation=dict):
        yield tuple(typed_columns(location, row["translation"], **{SOURCE: str, language: str}))


def shuffled(items: Iterable, seed: str, size: int = 10_000) -> Iterator:
    """Shuffle a stream through a buffer of `size` items."""
    rng, items = random.Random(seed), iter(items)
    buffer = list(itertools.islice(items, size))
    for item in items:
        k = rng.randrange(size)
        yield buffer[k]
        buffer[k] = item
    rng.shuffle(buffer)
    yield from buffer


def nfc(text: str) -> str:
    """Return text in Unicode form NFC, in which dictionaries and texts are compared."""
    return unicodedata.normalize("NFC", text)


def base_language(code: str) -> str:
    """Return the language of a code: `zh` of `zh-TW`, `zh_Hans` and `zho_Hans`."""
    code = re.split("[-_]", code.lower())[0]
    return LONG_CODES.get(code, code)


def split_words(text: str, lang: str, vocabulary: Collection[str] = ()) -> list[str]:
    """Split text into runs of word characters or of other characters.

    Word characters are letters, digits, marks, and joiners such as the half-space of Persian.
    Chinese, Japanese and Thai are written without blanks: they are split by greedy longest match
    against `vocabulary` (a set or dict), else into characters; a mark stays with its character.
    """
    if base_language(lang) not in UNSPACED_LANGUAGES:
        return WORD.findall(text)
    words = []
    for run in RUN.findall(text):
        rest = regex.findall(r".\p{M}*", run) if regex.match(UNSPACED, run) else [run]
        while rest:
            size = min(len(rest), LONGEST_WORD)
            while size > 1 and nfc("".join(rest[:size])) not in vocabulary:
                size -= 1
            words.append("".join(rest[:size]))
            del rest[:size]
    return words


def one_to_one(links: Links, source: list[str], target: list[str]) -> Links:
    """Return the links whose words have no other link and are not identical strings, sorted."""
    links = set(links)
    sources = Counter(i for i, _ in links)
    targets = Counter(j for _, j in links)
    kept = [(i, j) for i, j in links if sources[i] == targets[j] == 1]
    return sorted((i, j) for i, j in kept if source[i] != target[j])


# ---- 8. Word aligners ----------------------------------------------------------------------------

Dictionary = dict[str, set[str]]  # word -> its translations
ALIGNERS = ("dictionary", "fastalign", "awesome", "none")  # none: only split into words
MUSE_URL = "https://dl.fbaipublicfiles.com/arrival/dictionaries/{}-{}.txt"
PHARAOH = re.compile(r"(\d{1,9}-\d{1,9}(\s+|$))*")
NULL_PROBABILITY = 0.08  # prior probability that a word translates nothing
DIRICHLET_ALPHA = 0.01  # sparse prior on the translation probabilities (fast_align -v)
FIRST_TENSION = 4.0  # how strongly links are drawn to the diagonal at first (fast_align -d -o)
EM_ITERATIONS = 5  # four that train, and one that reads off the links


def dictionary_links(source: list, target: list, forward: dict, backward: dict) -> Links:
    """Link words by a bilingual dictionary, only where nothing is ambiguous (Gaschi et al. 2023).

    As in the authors' code, capitals count: a dictionary in small letters does not link `Hund`.
    (i, j) is a link if `j` is the only position in the target sentence of a translation of
    `source[i]` (`forward`), and `i` the only position in the source sentence of a translation of
    `target[j]` (`backward`).
    """
    source, target = [*map(nfc, source)], [*map(nfc, target)]
    source_positions, target_positions = positions_of(source), positions_of(target)
    links = []
    for i, word in enumerate(source):
        j = only_position(forward.get(word, ()), target_positions)
        if j is not None and only_position(backward.get(target[j], ()), source_positions) == i:
            links.append((i, j))
    return links


def only_position(words: Iterable[str], positions: dict[str, int | None]) -> int | None:
    """Return the only position of these words in a sentence; None if there are none or several."""
    occurrences = [positions[word] for word in words if word in positions]
    return occurrences[0] if len(occurrences) == 1 else None


def positions_of(words: list[str]) -> dict[str, int | None]:
    """Return {word: its position in the sentence, or None if it has several}."""
    counts = Counter(words)
    return {word: k if counts[word] == 1 else None for k, word in enumerate(words)}


def read_dictionary(language: str, data_dir: Path | None) -> tuple[Dictionary, Dictionary]:
    """Read a MUSE dictionary; return it from English to `language`, and inverted.

    Raises UserError for a line of a local file that does not hold two words. In a downloaded file,
    such lines are counted and skipped.
    """
    if data_dir:
        path = data_dir / "dictionary" / f"{SOURCE}-{language}.txt"
    else:
        path = fetch(MUSE_URL.format(SOURCE, base_language(language)))
    forward, backward, skipped = defaultdict(set), defaultdict(set), 0
    for number, line in read_lines(path):
        words = nfc(line).split()
        if len(words) != 2:
            require(not data_dir, f"{path}:{number}", f"expected two words, found {len(words)}")
            skipped += 1
        elif words[0] != words[1]:  # the authors drop these before they look for ambiguity
            forward[words[0]].add(words[1])
            backward[words[1]].add(words[0])
    if skipped:
        say(f"{path.name}: skipped {skipped} lines that do not hold two words")
    return forward, backward


def tokenised(words: Words) -> str:
    """Join two lists of words to `a cat ||| un chat`, the format that other word aligners read."""
    return " ".join(words[0]) + " ||| " + " ".join(words[1])


def read_links(folder: Path, text: ParallelText) -> list[Links]:
    """Read the links of each line of a text, in Pharaoh format (`0-0 1-2`), English first.

    The numbers count the words that `split_words` makes. If the folder holds `en-XX.words.txt`, its
    lines are compared with these. Raises UserError if the links do not belong to the text.
    """
    path = folder / f"{SOURCE}-{text.language}.txt"
    words_path = path.with_suffix(".words.txt")
    stored_words = read_lines(words_path) if words_path.exists() else itertools.repeat((0, None))
    lines, links = text.lines(), []
    for number, line in itertools.islice(read_lines(path), text.settings.limit_links):
        location, sides = f"{path}:{number}", next(lines, None)
        require(sides, location, f"the text has only {number - 1} lines; were other texts aligned?")
        message = f"expected links such as '0-0 1-2', found {line[:60]!r}"
        require(PHARAOH.fullmatch(line.strip()), location, message)
        words = text.words(sides)
        _, expected = next(stored_words, (0, ""))
        message = "these are not the words of the text; align it again, in another folder"
        require(expected in (None, tokenised(words)), f"{words_path}:{number}", message)
        links.append([tuple(map(int, link.split("-"))) for link in line.split()])
        fits = all(i < len(words[0]) and j < len(words[1]) for i, j in links[-1])
        message = f"a link points beyond {len(words[0])} English or {len(words[1])} other words"
        require(fits, location, message)
    message = f"has {len(links)} lines, but the text has more; align it anew, or set --limit-links"
    require(next(lines, None) is None, path, message)
    return links


def write_links(settings: Settings) -> None:
    """--write-links: align the text of every language, and write its words and links.

    `en-XX.words.txt` holds the words, `en-XX.txt` their links in Pharaoh format (unless the aligner
    is `none`), and `en-XX.json` how they were made. Raises UserError if other files stand there.
    """
    validate_settings(settings)
    origin: dict[str, Any] = {"aligner": settings.aligner}
    if settings.aligner == "awesome":
        name, layer = settings.aligner_model, settings.aligner_layer
        tokenizer, _ = load_tokenizer(name, "--aligner-model")
        origin |= {"model": model_identity(name), "layer": layer}
        encoder = load_model(name, flag="--aligner-model").eval().to(set_up_device(settings.device))
    for language in settings.realign_languages:
        path, start = settings.write_links / f"{SOURCE}-{language}.txt", time.time()
        words_path, origin_path = path.with_suffix(".words.txt"), path.with_suffix(".json")
        text = ParallelText(language, settings)
        words = [text.words(line) for line in text.lines()]
        content = "".join(tokenised(pair) + "\n" for pair in words).encode()
        origin["words"] = hashlib.sha256(content).hexdigest()
        stored = json.dumps(origin, indent=1).encode()
        if origin_path.is_file() and origin_path.read_bytes() == stored:
            say(f"{path.with_suffix('')}.* exist: nothing to do")
            continue
        is_free = not any(map(os.path.lexists, (path, words_path, origin_path)))
        require(is_free, path, "is incomplete or of another text or aligner; choose another folder")
        if settings.aligner == "fastalign":
            links = fast_align([[w.lower() for w in side] for side in pair] for pair in words)
        elif settings.aligner == "awesome":
            chunks = in_chunks(words, 32)
            parts = (awesome_links(encoder, tokenizer, chunk, layer) for chunk in chunks)
            links = itertools.chain.from_iterable(parts)
        if settings.aligner != "none":
            lines = [" ".join(f"{i}-{j}" for i, j in row) + "\n" for row in links]
            write_whole(path, "".join(lines).encode())
        write_whole(words_path, content)
        write_whole(origin_path, stored)  # last: it marks the others as complete
        say(f"{path.name}: {len(words)} sentence pairs, {time.time() - start:.1f} s")


def fast_align(pairs: Iterable[Words]) -> list[Links]:
    """Return the sorted links (source index, target index) of each sentence pair.

    Reparameterised IBM model 2 (Dyer, Chahuneau and Smith, NAACL 2013), as `fast_align -d -o -v`
    computes it, then with `-r` as well, then `atools -c grow-diag-final-and`. A pair with an empty
    side has no link.
    """
    ids = defaultdict(itertools.count().__next__)  # a new word gets the next id; NULL has 0
    codes = []  # of each pair, (n + 1, m + 1): the ids of a source and a target word in one integer
    for source, target in pairs:
        if not source or not target:
            source = target = []
        source_ids = np.array([ids[word] for word in (None, *source)])
        target_ids = np.array([ids[word] for word in (None, *target)])
        codes.append((source_ids[:, None] << 32) | target_ids)
    if len(ids) < 2:  # there are no words
        return [[] for _ in codes]
    shapes = [code.shape for code in codes]
    codes = np.concatenate(codes, axis=None)
    entries, table = pd.factorize(codes)  # numbers of entries in the t-table, and their codes
    ends = np.cumsum([n * m for n, m in shapes])
    parts = np.split(entries.astype(np.int32), ends[:-1])
    grids = [part.reshape(shape) for part, shape in zip(parts, shapes)]
    words = table >> 32, table & (2**32 - 1)  # source and target ids of each entry
    forward = train_and_link([grid[:, 1:] for grid in grids], *words)
    reverse = train_and_link([grid.T[:, 1:] for grid in grids], *words[::-1])
    return [grow_diag_final_and(*both) for both in zip(forward, reverse)]


def train_and_link(grids: list, source_word: np.ndarray, target_word: np.ndarray) -> list:
    """Fit p(target | source) by EM; return which source word explains each target word of a pair.

    grids: for each pair, the t-table entry of each word pair, (n + 1, m). source_word, target_word:
    the word ids of each entry. Returns a list of m indices for each pair; -1 is NULL.
    """
    tension, t_table = FIRST_TENSION, np.ones(len(source_word))
    shapes = Counter(grid.shape for grid in grids)
    far = {}  # distance from the diagonal |i/n - j/m|, of i = 1 .. n and j = 0 .. m; (n, m + 1)
    for shape in shapes:
        n, m = shape[0] - 1, shape[1]
        far[shape] = np.abs(np.arange(1, n + 1)[:, None] / n - np.arange(m + 1) / max(m, 1))
    for iteration in range(EM_ITERATIONS):
        priors = {}  # probability that NULL or source word i explains target word j; (n + 1, m)
        for shape in shapes:
            near = np.exp(-tension * far[shape][:, 1:])  # j = 1 .. m
            null = np.full(shape[1], NULL_PROBABILITY)
            priors[shape] = np.vstack([null, near * ((1 - NULL_PROBABILITY) / near.sum(0))])
        joint = (t_table[grid] * priors[grid.shape] for grid in grids)
        if iteration == EM_ITERATIONS - 1:
            return [(scores.argmax(0) - 1).tolist() for scores in joint]
        counts, observed = np.zeros(len(source_word)), 0.0
        for grid, posterior in zip(grids, joint):
            posterior /= posterior.sum(0)
            np.add.at(counts, grid.ravel(), posterior.ravel())
            # In this sum alone, fast_align counts target positions from 0: j = 0 .. m - 1.
            observed += np.vdot(posterior[1:], far[grid.shape][:, :-1])
        if iteration > 0:
            tension = fit_tension(shapes, far, observed, tension)
        counts += DIRICHLET_ALPHA  # then variational Bayes: exp(digamma(count) - digamma(total))
        counts[target_word == 0] = 0.0  # NULL explains words but is never explained
        totals = torch.from_numpy(np.bincount(source_word, counts)).digamma().numpy()
        t_table = np.exp(torch.from_numpy(counts).digamma().numpy() - totals[source_word])


def fit_tension(shapes: Counter, far: dict, observed: float, tension: float) -> float:
    """Take eight gradient steps to the tension whose prior expects the observed distance."""
    words = sum(count * m for (_, m), count in shapes.items())
    for _ in range(8):
        expected = 0.0
        for shape, count in shapes.items():
            distances = far[shape][:, 1:]
            weighted = (np.exp(-tension * distances) * distances).sum(0)
            normaliser = exchanged_normaliser(shape[0] - 1, shape[1], tension)
            expected += count * (weighted / normaliser).sum()
        tension += 20 * (expected - observed) / words  # step and bounds are fast_align's
        tension = min(max(tension, 0.1), 14.0)
    return tension


def exchanged_normaliser(n: int, m: int, tension: float) -> np.ndarray:
    """Return the sum of the weights over i, (m,); like fast_align's C++, it exchanges n and m."""
    i = np.arange(1, m + 1)
    floor = i * m // n
    ratio = math.exp(-tension / max(m, 1))
    top = (m - floor) % 2**32  # negative beyond the diagonal, but the C++ program has it unsigned
    above = np.exp(-tension * np.abs((floor + 1) / m - i / n)) * (1 - ratio**top)
    below = np.exp(-tension * np.abs(floor / m - i / n)) * (1 - ratio**floor)
    return (above + below) / (1 - ratio)


def grow_diag_final_and(forward: list[int], reverse: list[int]) -> Links:
    """Merge the links of both directions (Koehn, Och and Marcu 2003); return them sorted.

    Keep the links that both directions found. Add neighbours (in 8 directions) of kept links, if
    one of the two words is still unlinked, until there are none. Then add forward links, and after
    these reverse links, between two unlinked words.
    """
    forward = {(i, j) for j, i in enumerate(forward) if i >= 0}
    reverse = {(i, j) for i, j in enumerate(reverse) if j >= 0}
    kept, sources, targets = set(), set(), set()

    def keep(i: int, j: int) -> None:
        kept.add((i, j))
        sources.add(i)
        targets.add(j)

    for link in forward & reverse:
        keep(*link)
    size = -1
    while size < len(kept):
        size = len(kept)
        for i, j in sorted((forward | reverse) - kept):
            is_near = any((i + a, j + b) in kept for a in (-1, 0, 1) for b in (-1, 0, 1))
            if is_near and (i not in sources or j not in targets):
                keep(i, j)
    for i, j in [*sorted(forward), *sorted(reverse)]:
        if i not in sources and j not in targets:
            keep(i, j)
    return sorted(kept)


@torch.inference_mode()
def awesome_links(encoder, tokenizer, pairs: list, layer=8, threshold=1e-3) -> list[Links]:
    """Link words by an encoder (Dou and Neubig 2021, https://arxiv.org/abs/2101.08231).

    Two subwords are linked if the softmax of their dot product at `layer` exceeds `threshold` both
    over the source's subwords and over the target's; two words, if any of their subwords are.
    """
    links: list[Links] = [[] for _ in pairs]
    sentences = [source for source, _ in pairs] + [target for _, target in pairs]
    windows = encode_words(tokenizer, sentences, tokenizer.model_max_length)
    ids = [window.ids for window in windows]
    inputs = pad_inputs(ids, tokenizer.pad_token_id, encoder.device)
    hidden = hidden_state(encoder, inputs, layer).float()
    source, target = hidden.chunk(2)  # (B, T, d)
    source_word, target_word = pad([window.words for window in windows], -1).chunk(2)  # (B, T)
    outside = (source_word < 0)[:, :, None] | (target_word < 0)[:, None]  # padding, special tokens
    similarity = (source @ target.mT).masked_fill(outside.to(source.device), -math.inf)  # (B, T, T)
    linked = (similarity.softmax(1) > threshold) & (similarity.softmax(2) > threshold)
    pair, s, t = linked.nonzero().cpu().T
    rows = torch.stack([pair, source_word[pair, s], target_word[pair, t]], dim=1)
    for k, i, j in rows.unique(dim=0).tolist():
        links[k].append((i, j))
    return links


# ---- 9. Tasks ------------------------------------------------------------------------------------
# A task is a row of TASKS, at the end of this section, and three functions:
# load(language, split, settings): return the examples, a list or an iterator of dicts.
# encode(tokenizer, examples, max_length, training): return features, dicts of the arrays
#     `input_ids` and `labels`, the index of the `example`, and whether a part of it was `cut` off.
# score(examples, features, outputs): return {metric: value}, the main metric first. outputs: the
#     logits of each feature, or the text that was generated for each example.

TREEBANKS = {  # language: UD treebank. English is to train on, the other 34 to test on and to align
    "en": "English-EWT", "af": "Afrikaans-AfriBooms", "ar": "Arabic-PADT", "bg": "Bulgarian-BTB",
    "ca": "Catalan-AnCora", "cs": "Czech-PDT", "da": "Danish-DDT", "de": "German-GSD",
    "el": "Greek-GDT", "es": "Spanish-GSD", "fa": "Persian-PerDT", "fi": "Finnish-PUD",
    "fr": "French-GSD", "he": "Hebrew-HTB", "hi": "Hindi-HDTB", "hu": "Hungarian-Szeged",
    "it": "Italian-ISDT", "ja": "Japanese-GSD", "ko": "Korean-GSD", "lt": "Lithuanian-ALKSNIS",
    "lv": "Latvian-LVTB", "no": "Norwegian-Bokmaal", "pl": "Polish-PDB", "pt": "Portuguese-GSD",
    "ro": "Romanian-RRT", "ru": "Russian-GSD", "sk": "Slovak-SNK", "sl": "Slovenian-SSJ",
    "sv": "Swedish-PUD", "ta": "Tamil-TTB", "th": "Thai-PUD", "tr": "Turkish-PUD",
    "uk": "Ukrainian-IU", "vi": "Vietnamese-VTB", "zh": "Chinese-GSD",
}  # fmt: skip
SOURCE, *TARGETS = TREEBANKS
Tokens = transformers.AutoModelForTokenClassification
Sentences = transformers.AutoModelForSequenceClassification
Answers = transformers.AutoModelForQuestionAnswering
Generator = transformers.AutoModelForCausalLM
UD_URL = "https://raw.githubusercontent.com/UniversalDependencies/UD_{}/r2.7/{}_{}-ud-{}.conllu"
UPOS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X _".split()
NER_TAGS = "O B-PER I-PER B-ORG I-ORG B-LOC I-LOC".split()
TRAIN_STRIDE, TEST_STRIDE = 32, 128  # subwords of its context that a question's windows share
ANSWER_LENGTH = 15  # subwords that an answer may have


def load_udpos(language: str, split: str, settings) -> list[dict]:
    """Load the sentences of a UD treebank (https://universaldependencies.org/format).

    As in the authors' code, the range of a multi-word token (`3-4 du _`), with the tag `_`, and an
    empty node (`8.1`) are words too; that makes 18 tags.
    """
    if settings.data_dir:
        path = settings.data_dir / "udpos" / language / f"{split}.conllu"
    else:
        treebank = TREEBANKS.get(language)
        require(treebank, f"udpos {language}", f"no treebank; choose from {' '.join(TREEBANKS)}")
        path = fetch(UD_URL.format(treebank, language, treebank.split("-")[1].lower(), split))
    examples, tokens, tags, last = [], [], [], 0
    columns = f"ID, FORM, LEMMA, UPOS ({' '.join(UPOS)}) and 6 more"
    for number, line in itertools.chain(read_lines(path), [("end", "")]):
        if not line.strip():
            if tokens:
                examples.append({"tokens": tokens, "tags": tags})
            tokens, tags, last = [], [], 0
        elif not line.startswith("#"):
            fields = line.split("\t")
            is_row = len(fields) == 10 and fields[1] and fields[3] in UPOS
            is_next = re.fullmatch(rf"{last + 1}(-\d+)?|{last}\.\d+", fields[0])
            message = f"expected CoNLL-U, word {last + 1} or a blank line: {columns}"
            require(is_row and is_next, f"{path}:{number}", f"{message}; found {line[:40]!r}")
            last += fields[0].isdecimal()  # not 3-4 or 8.1
            tokens.append(fields[1])
            tags.append(UPOS.index(fields[3]))
    require(examples, path, "the file has no sentence")
    return examples


def load_wikiann(language: str, split: str, settings) -> Iterator[dict]:
    """Load the sentences of WikiANN (https://huggingface.co/datasets/unimelb-nlp/wikiann)."""
    hub = {"path": "unimelb-nlp/wikiann", "name": language, "split": split}
    for where, row in read_rows(settings, language, split, hub):
        yield tagged_words(where, row)


def tagged_words(where: str, row: dict) -> dict[str, list]:
    """Return the `tokens` of a row, and the numbers of their `tags` in NER_TAGS.

    A row has names in the column `tags` or numbers in the column `ner_tags`.
    """
    column = "tags" if "tags" in row else "ner_tags"
    names = NER_TAGS if "tags" in row else list(range(len(NER_TAGS)))
    tokens, tags = typed_columns(where, row, tokens=list, **{column: list})
    is_valid = len(tokens) == len(tags) and {str} == set(map(type, tokens))
    is_valid = is_valid and all(type(tag) is type(names[0]) and tag in names for tag in tags)
    require(is_valid, where, f"{len(tokens)} words need {column} in {names}: {str(tags)[:60]}")
    return {"tokens": tokens, "tags": [names.index(tag) for tag in tags]}


def encode_tokens(tokenizer, examples: list, max_length: int, training: bool) -> Iterator[dict]:
    """Label the first visible subword of each word; split long sentences into windows."""
    sentences, seen = [example["tokens"] for example in examples], Counter()
    windows = encode_words(tokenizer, sentences, max_length, windows=True)
    for window in windows:
        seen[window.sentence] += window.first.sum()
    for window in windows:
        tags = np.array(examples[window.sentence]["tags"])
        labels = np.where(window.first, tags[window.words], IGNORE)
        cut = seen[window.sentence] < len(tags)  # a word may be invisible to the tokenizer
        yield {"example": window.sentence, "input_ids": window.ids, "labels": labels, "cut": cut}


def score_accuracy(examples: list, features: list[dict], logits: list) -> dict[str, float]:
    """Return the share of correct labels, of words (PoS) or of sentence pairs (NLI)."""
    labels = np.concatenate([feature["labels"] for feature in features])
    predictions = np.concatenate([*map(predicted_labels, features, logits)])
    return {"accuracy": float((predictions == labels)[labels != IGNORE].mean())}


def predicted_labels(feature: dict, logits: np.ndarray) -> np.ndarray:
    """Return (T,) or (1,), like the labels. logits: (T or longer, classes) or (classes,)."""
    return logits.argmax(-1).reshape(-1)[: len(feature["labels"])]


def entities(tags: np.ndarray, repair: bool = False) -> set[tuple[int, int, int]]:
    """Return (first word, last word, type) of each entity; tag 0 is O, 2k - 1 is B-k, 2k is I-k.

    An I without an entity before it begins one. An I of another type begins one as well (as in
    conlleval), or, with `repair`, changes the type of the entity (the authors repair predictions).
    """
    kind = (tags + 1) // 2
    before = np.append(0, kind[:-1])
    begins = (before == 0) if repair else (before != kind)  # an I that begins an entity
    start = (tags % 2 == 1) | ((tags > 0) & begins)
    end = (kind > 0) & np.append(start[1:] | (kind[1:] == 0), True)
    return set(zip(np.flatnonzero(start), np.flatnonzero(end), kind[end]))


def f1(gold: Iterable, predicted: Iterable) -> float:
    """Return the harmonic mean of precision and recall of items, which may repeat; 0 for none."""
    gold, predicted = Counter(gold), Counter(predicted)
    return 2 * (gold & predicted).total() / max(gold.total() + predicted.total(), 1)


def score_entities(examples: list, features: list[dict], logits: list) -> dict[str, float]:
    """Return the F1 of whole entities (https://aclanthology.org/W03-0419), predictions repaired."""
    gold, predicted, sentence = [], [], None
    for feature, row in zip(features, logits):
        words = feature["labels"] != IGNORE
        gap = [] if feature["example"] == sentence else [0]  # an O between sentences
        gold += [gap, feature["labels"][words]]
        predicted += [gap, predicted_labels(feature, row)[words]]
        sentence = feature["example"]
    gold = entities(np.concatenate(gold).astype(int))
    predicted = entities(np.concatenate(predicted).astype(int), repair=True)
    return {"f1": f1(gold, predicted)}


def load_xnli(language: str, split: str, settings) -> Iterator[dict]:
    """Load sentence pairs of XNLI (https://aclanthology.org/D18-1269); train on MultiNLI."""
    hub = {"path": "facebook/xnli", "name": language, "split": split}
    columns = {"premise": str, "hypothesis": str, "label": int}
    for where, row in read_rows(settings, language, split, hub, **columns):
        message = "expected a label 0 (entailment), 1 (neutral) or 2 (contradiction)"
        require(row["label"] in range(3), where, f"{message}; found {row['label']}")
        yield row


def encode_sentences(tokenizer, examples: list, max_length: int, training: bool) -> Iterator[dict]:
    """Encode both sentences as one input; cut off the longer one until both fit."""
    limit = 50 * max_length  # characters, because truncation takes quadratic memory
    texts = [[example[side][:limit] for example in examples] for side in ("premise", "hypothesis")]
    options = {"truncation": "longest_first", "return_attention_mask": False}
    encoded = tokenizer(*texts, max_length=max_length, **options)
    for k, example in enumerate(examples):
        feature = {name: np.array(encoded[name][k]) for name in encoded}
        cut = bool(encoded.encodings[k].overflowing)
        yield feature | {"example": k, "labels": np.array([example["label"]]), "cut": cut}


def load_xquad(language: str, split: str, settings) -> Iterator[dict]:
    """Load questions of XQuAD (https://huggingface.co/datasets/google/xquad); train on SQuAD."""
    hub = {"path": "google/xquad", "name": f"xquad.{language}", "split": "validation"}
    if split == "train":
        message = "the hub has training questions only in English; use --data-dir"
        require(settings.data_dir or language == SOURCE, f"xquad {language}", message)
        hub = {"path": "rajpurkar/squad", "name": "plain_text", "split": split}
    columns = {"question": str, "context": str, "answers": dict}
    for where, row in read_rows(settings, language, split, hub, **columns):
        texts, starts = typed_columns(where, row.pop("answers"), text=list, answer_start=list)
        is_valid = len(texts) == len(starts) > 0
        for text, start in zip(texts, starts):
            has_types = type(text) is str and type(start) is int and text and start >= 0
            is_valid = is_valid and has_types and row["context"].startswith(text, start)
        require(is_valid, where, f"no answer {str(texts)[:60]} at {str(starts)[:30]} in context")
        yield row | {"language": language, "texts": texts, "starts": starts}


def encode_questions(tokenizer, examples: list, max_length: int, training: bool) -> list[dict]:
    """Encode a question, cut off at half of `max_length`, with each window of its context.

    labels: from `answer_labels`. offsets: (T, 2), the characters of the context that a subword
    spans; else -1 and -1.
    """
    questions = [example["question"] for example in examples]
    options = {"truncation": True, "max_length": max_length // 2, "add_special_tokens": False}
    overflow = [question.overflowing for question in tokenizer(questions, **options).encodings]
    for k, parts in enumerate(overflow):
        if parts:
            end = parts[0].offsets[0][0]  # the first character that does not fit
            questions[k] = questions[k][:end]
    contexts = [example["context"] for example in examples]
    stride = min(TRAIN_STRIDE if training else TEST_STRIDE, max_length // 2 - 8)
    options = {"truncation": "only_second", "max_length": max_length, "stride": stride}
    options |= {"return_overflowing_tokens": True, "return_attention_mask": False}
    encoded = tokenizer(questions, contexts, **options)
    features = []
    for k, number in enumerate(encoded.pop("overflow_to_sample_mapping")):
        in_context = np.array(encoded.sequence_ids(k)) == 1
        offsets = np.where(in_context[:, None], encoded.encodings[k].offsets, -1).astype(np.int32)
        labels = answer_labels(examples[number], offsets)
        feature = {name: np.array(encoded[name][k]) for name in encoded}
        features.append(feature | {"example": number, "offsets": offsets, "labels": labels})
    answered = {feature["example"] for feature in features if feature["labels"].any()}
    for feature in features:
        number = feature["example"]
        feature["cut"] = bool(overflow[number]) or (training and number not in answered)
    return features


def answer_labels(example: dict, offsets: np.ndarray) -> np.ndarray:
    """Return the first and last subword of the first answer; 0 and 0 if the window lacks a part."""
    start, text = example["starts"][0], example["texts"][0]
    end = start + len(text)
    visible_end = start + len(regex.sub(r"\p{M}+$", "", text))  # an accent may have no subword
    subwords = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))  # of the answer
    is_whole = len(subwords) and offsets[subwords[0], 0] <= start
    is_whole = is_whole and visible_end <= offsets[subwords[-1], 1]
    return subwords[[0, -1]] if is_whole else np.array([0, 0])


def normalise_answer(text: str) -> list[str]:
    """Return words in lower case, without punctuation and articles, as SQuAD's evaluation does."""
    text = re.sub(r"[!-/:-@[-`{-~]", "", text.lower())  # ASCII without letters, digits and blank
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def compare_answers(prediction: str, references: list[str], language: str) -> dict[str, float]:
    """Return F1 and exact match, by SQuAD's measure (the best reference) and by the authors'.

    The authors use the first reference alone. They count each common word once, but divide by the
    lengths of the lists; F1 is 2PR / max(1, P + R). Raw strings must be equal, except in English.
    """
    words = normalise_answer(prediction)
    gold = [normalise_answer(reference) for reference in references]
    same = len(set(words) & set(gold[0]))
    precision, recall = same / max(len(words), 1), same / max(len(gold[0]), 1)
    authors = 2 * precision * recall / max(1, precision + recall) if words or gold[0] else 1.0
    raw = float(words == gold[0] if language == SOURCE else prediction == references[0])
    best = max(f1(words, reference) for reference in gold)
    return {"f1": best, "em": float(words in gold), "f1_authors": authors, "em_authors": raw}


def score_answers(examples: list, features: list[dict], logits: list) -> dict[str, float]:
    """Compare the most probable answer of all windows with the references.

    The score of an answer is the product of the probabilities of its ends: the softmax over the
    window's context and its first position (no answer), as in the pipeline of transformers.
    """
    highest, answers = [-math.inf] * len(examples), [""] * len(examples)
    for feature, ends in zip(features, logits):  # ends: (2, T or longer)
        offsets, number = feature["offsets"], feature["example"]
        in_context = offsets[:, 0] >= 0
        position = np.arange(len(offsets))
        ends = np.where(in_context | (position == 0), ends[:, : len(offsets)], -math.inf)
        start, end = ends - np.logaddexp.reduce(ends, axis=1, keepdims=True)
        length = position - position[:, None] + 1  # of the answer from start to end, (T, T)
        allowed = (length > 0) & (length <= ANSWER_LENGTH) & in_context & in_context[:, None]
        score = np.where(allowed, start[:, None] + end, -math.inf)
        first, last = divmod(score.argmax(), len(offsets))
        if score[first, last] <= highest[number]:
            continue
        highest[number] = score[first, last]
        context = examples[number]["context"]
        stop = regex.compile(r"\p{M}*").match(context, offsets[last, 1]).end()  # with its accents
        answers[number] = context[offsets[first, 0] : stop].strip()
    totals = Counter()
    for example, answer in zip(examples, answers):
        totals.update(compare_answers(answer, example["texts"], example["language"]))
    return {metric: total / len(examples) for metric, total in totals.items()}


# Tasks that generate text. An example has `system` (an instruction), `user` and `target`.

LOCALES = """af-ZA am-ET ar-SA az-AZ bn-BD ca-ES cy-GB da-DK de-DE el-GR en-US es-ES fa-IR fi-FI
fr-FR he-IL hi-IN hu-HU hy-AM id-ID is-IS it-IT ja-JP jv-ID ka-GE km-KH kn-IN ko-KR lv-LV ml-IN
mn-MN ms-MY my-MM nb-NO nl-NL pl-PL pt-PT ro-RO ru-RU sl-SL sq-AL sv-SE sw-KE ta-IN te-IN th-TH
tl-PH tr-TR ur-PK vi-VN zh-CN""".split()  # of MASSIVE, without a second Chinese one, zh-TW
UNER = "da_ddt en_ewt hr_set pt_bosque sk_snk sr_set sv_talbanken zh_gsd".split()  # treebanks
NAMES = {
    "cs": "Czech", "de": "German", "en": "English", "he": "Hebrew", "is": "Icelandic",
    "ja": "Japanese", "ru": "Russian", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip
CHARACTERS = ("ja", "zh")  # languages whose slots are counted in characters
BLEU_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}  # the authors use 13a for all
BLEU_TOKENIZERS |= dict.fromkeys("th lo km my bo dz".split(), "char")  # written without blanks
CODE = r"[a-z]{2,3}(?:[-_][A-Z]\w*)?"  # a language, perhaps with a region or a script
ASK_SLOTS = """\
List what the command mentions as `type: value`, in the command's own words and order,
separated by `; `. Answer None if it mentions nothing."""
ASK_NAMES = """Find the persons (PER), organisations (ORG) and places (LOC) that the text names.
Answer in JSON: {"Results": [{"TypeName": type, "Text": name}]}"""
DATE = time.strptime("26 Jul 2024", "%d %b %Y")  # chat templates get it as the date of today
ASK_TODAY = r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)"""  # in a chat template
PLAIN = "{{ messages[0].content }}\n\nInput: {{ messages[1].content }}\nOutput:"  # chat template
ASK_TRANSLATION = "Translate the text from {} into {}. Answer with the translation alone."


def load_slots(language: str, split: str, settings) -> Iterator[dict]:
    """Load commands with slots (MASSIVE, xSID), or texts with names (Universal NER).

    Local data without a training file are trained on their validation file, and cannot validate.
    https://arxiv.org/abs/2204.08582, https://arxiv.org/abs/2311.09122
    """
    file = split
    folder = settings.data_dir and settings.data_dir / settings.task / language
    if folder and split != "test" and not (folder / "train.jsonl").exists():
        message = "without train.jsonl, its validation file is for training; leave out --validate"
        require(split == "train", f"{settings.task} {language}", message)
        say(f"{settings.task} {language}: no train.jsonl; training on its validation file")
        file = "valid"
    for where, row in slot_rows(language, file, settings):
        text, slots = read_slots(where, row, language)
        example = {"language": language, "system": ASK_SLOTS, "text": text, "user": text}
        example["slots"] = slots
        answer = "; ".join(f"{slot['type']}: {slot['value']}" for slot in slots)
        example["target"] = answer or "None"
        if settings.task == "uner":
            results = [{"TypeName": slot["type"], "Text": slot["value"]} for slot in slots]
            example["system"] = ASK_NAMES
            example["target"] = json.dumps({"Results": results}, ensure_ascii=False)
            is_known = {slot["type"] for slot in slots} <= {"PER", "ORG", "LOC"}
            require(is_known, where, "expected names of the types PER, ORG and LOC")
        if split != "train":
            tag_slots(example, where)  # raises an error if an example cannot be scored
        yield example


def slot_rows(language: str, split: str, settings) -> Iterator:
    """Yield (location, row) of a split with slots, from --data-dir or the hub."""
    task, hub = settings.task, {}
    if settings.data_dir:
        split = "dev" if (task, split) == ("uner", "valid") else split
    else:
        configurations = {"massive": LOCALES, "uner": UNER}.get(task, [])
        name = {name[:2]: name for name in configurations}.get(language)
        message = f"the hub has {' '.join(configurations) or 'none'}; use --data-dir"
        require(name, f"{task} {language}", message)
        part = split.replace("valid", "validation")
        hub = {"path": "BramVanroy/universal_ner", "name": name, "split": part}
        if task == "massive":  # the hub's conversion, as the data set itself is a script
            hub = {"path": "AmazonScience/massive", "revision": "refs/convert/parquet"}
            hub |= {"data_files": {part: f"{name}/{part}/0000.parquet"}, "split": part}
    yield from read_rows(settings, language, split, hub)


def utterance_pairs(language: str, split: str, settings) -> Iterator[tuple[str, str]]:
    """Yield (English, translation) of MASSIVE by `id`, shuffled: its files are sorted by domain."""
    english, other = {}, {}
    for code, texts in ((SOURCE, english), (language, other)):
        for where, row in slot_rows(code, split, settings):
            key = str(row.get("id"))
            message = "needs a unique 'id', which its translations share"
            require("id" in row and key not in texts, where, message)
            texts[key], _ = read_slots(where, row, code)
    translated = [(english[key], text) for key, text in other.items() if key in english]
    yield from random.Random(language).sample(translated, len(translated))


def read_slots(where: str, row: dict, language: str) -> tuple[str, list[dict]]:
    """Return the text and the slots of a row of MASSIVE, of tagged words, or of local data."""
    if "annot_utt" in row:  # MASSIVE on the hub
        text, annotated = typed_columns(where, row, utt=str, annot_utt=str)
        text, pairs = annotated_slots(where, text, annotated)
    elif "slots" in row:
        text, slots = typed_columns(where, row, text=str, slots=list)
        pairs = [typed_columns(where, slot, type=str, value=str) for slot in slots]
    else:
        tokens, tags = tagged_words(where, row).values()
        text, pairs = join_words(tokens, language), []
        for first, last, kind in sorted(entities(np.array(tags))):
            name = NER_TAGS[2 * kind].removeprefix("I-")
            pairs.append((name, join_words(tokens[first : last + 1], language)))
    return text, [{"type": kind, "value": value} for kind, value in pairs]


def join_words(words: list[str], language: str) -> str:
    """Join words to a text. In Chinese and Japanese, only Latin words have blanks between them."""
    text = " ".join(words)
    if base_language(language) in CHARACTERS:
        text = regex.sub(r"(?<![\p{Latin}\p{M}\d]) | (?![\p{Latin}\d])", "", text)
    return text


def annotated_slots(where: str, text: str, annotated: str) -> tuple[str, list[tuple[str, str]]]:
    """Return a text of MASSIVE and its slots, (type, value), from `wake me at [time : five am]`.

    In Chinese and Japanese, only the annotation has blanks around a slot; the text must not show
    where the slots are. If it differs in more than blanks, the annotated words replace it.
    """
    parts = re.split(r"\[([^][:]+) : ([^][]*\S[^][]*)\]", annotated)  # text, type, value, text, ...
    kinds = [kind.strip() for kind in parts[1::3]]
    del parts[1::3]  # text, value, text, value, ..., text
    plain = "".join(parts)
    require(not {"[", "]"} & {*plain}, where, f"unclosed or empty slot in {annotated[:60]!r}")
    text = text if "".join(text.split()) == "".join(plain.split()) else plain
    visible = [k for k, character in enumerate(text) if not character.isspace()]
    ends = np.cumsum([len("".join(part.split())) for part in parts])  # in visible characters
    spans = zip(ends[0::2], ends[1::2])  # a value begins where the text before it ends
    values = [text[visible[start] : visible[end - 1] + 1] for start, end in spans]
    return text, [*zip(kinds, values)]


def load_translation(language: str, split: str, settings) -> Iterator[dict]:
    """Load a direction such as `en-de`, English into German; trains on ALMA, tests on WMT23.

    A direction without data of its own uses those of the opposite direction.
    ALMA: https://arxiv.org/abs/2309.11674
    """
    source, target = sides_of(language)
    back, pairs = f"{target}-{source}", []
    if settings.data_dir:
        folder, file = settings.data_dir / "translation", f"{split}.tsv"
        if (folder / back / file).exists() and not (folder / language / file).exists():
            pairs = [sides[::-1] for sides in read_tsv(folder / back / file)]
        else:
            pairs = read_tsv(folder / language / file)
    else:
        name = "en-cs" if language == "cs-en" else language  # of WMT23
        hub = {"path": "haoranxu/WMT23-Test", "name": name, "split": split}
        if split != "test":
            name, config = "translation", language if target == "en" else back
            split = split.replace("valid", "validation")
            hub = {"path": "haoranxu/ALMA-Human-Parallel", "name": config, "split": split}
        for where, row in read_rows(settings, language, split, hub, **{name: dict}):
            pairs.append(typed_columns(where, row[name], **{source: str, target: str}))
    names = [NAMES.get(base_language(code), code) for code in (source, target)]
    system = ASK_TRANSLATION.format(*names)
    for text, translation in pairs:
        yield {"language": language, "system": system, "user": text, "target": translation}


def render_prompt(tokenizer, system: str, user: str) -> str:
    """Return a prompt by the model's chat template, or by `PLAIN` if it has none.

    If the template drops or refuses the system message, the instruction is put in front of the
    user's text. A fixed date replaces today's. Raises UserError if a part is still missing.
    """
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    template = tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN
    template = re.sub(ASK_TODAY, lambda call: repr(time.strftime(call[2], DATE)), template)
    options |= {"date_string": "26 Jul 2024", "chat_template": template}
    both = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    merged = [{"role": "user", "content": f"{system}\n\n{user}"}]
    for messages in (both, merged):
        try:
            prompt = tokenizer.apply_chat_template(messages, **options)
        except Exception:  # templates raise errors of several types
            continue
        if system.strip() in prompt and user.strip() in prompt:
            thinks = prompt.rstrip().endswith("<think>")  # whatever `enable_thinking` says
            return prompt.rstrip() + "\n\n</think>\n\n" if thinks else prompt
    raise UserError("--model: the chat template drops the instruction or the text of the user")


def encode_prompts(tokenizer, examples: list, max_length: int, training: bool) -> Iterator[dict]:
    """Encode a prompt; to train, the target and the end token follow.

    labels: (T,), shifted by one: for the ids P P T end they are - T end -, where - is `IGNORE`.
    """
    end, chat = tokenizer.eos_token_id, tokenizer.chat_template
    needs_blank = not chat and tokenizer.tokenize("a")[0][0] != "▁"  # Llama 2's adds one itself
    require(end is not None, "--model", "the tokenizer has no end-of-text token")
    prompts = [render_prompt(tokenizer, row["system"], row["user"]) for row in examples]
    targets = [" " + row["target"] if needs_blank else row["target"] for row in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    target_ids = tokenizer(targets, add_special_tokens=False)["input_ids"]
    frame = tokenizer("a", return_special_tokens_mask=True)  # perhaps after begin-of-text tokens
    begin = [] if chat else frame["input_ids"][: frame["special_tokens_mask"].index(0)]
    for k, (prompt, target) in enumerate(zip(prompt_ids, target_ids)):
        start = begin + prompt
        ids = start + target + [end] if training else start
        kept = np.array(ids[:max_length])
        labels = np.append(kept[1:], IGNORE)  # nothing follows the last one
        labels[: len(start) - 1] = IGNORE
        yield {"example": k, "input_ids": kept, "labels": labels, "cut": len(ids) > max_length}


def slot_words(text: str, language: str) -> list[str]:
    """Split text into words; in Japanese and Chinese, into characters and runs of ASCII."""
    text = nfc(text)  # Qwen's tokenizer reads prompts in this form, so answers have it, too
    by_character = base_language(language) in CHARACTERS
    return re.findall(r"[!-~]+|\S", text) if by_character else text.split()


def tag_slots(example: dict, where: str = "") -> list[tuple[str, str | None]]:
    """Return (word, type of its slot or None). Raises UserError if the text lacks a slot."""
    parts, at, text = [], 0, example["text"]
    for slot in example["slots"]:
        value = slot["value"]
        start = f" {text} ".find(f" {value} ", at)  # between blanks
        if start < 0 or base_language(example["language"]) in CHARACTERS:
            start = text.find(value, at)
        message = f"the text does not have the slot '{value[:60]}' in this order"
        require(value.strip() == value != "" and start >= 0, where, message)
        parts += [(text[at:start], None), (value, slot["type"])]
        at = start + len(value)
    tagged = []
    for part, kind in [*parts, (text[at:], None)]:
        tagged += [(word, kind) for word in slot_words(part, example["language"])]
    return tagged


def parse_slots(output: str) -> list[list[str]]:
    """Return [type, value] of each part of the first line `type: value; ...`."""
    line = output.strip().split("\n")[0].strip()
    return [] if line.lower() == "none" else [part.split(": ") for part in line.split("; ")]


def is_unreadable(example: dict) -> bool:
    """Return whether `parse_slots` misreads the correct answer."""
    slots = [[slot["type"], slot["value"]] for slot in example.get("slots", ())]
    return example.get("system") == ASK_SLOTS and parse_slots(example["target"]) != slots


def parse_json(output: str) -> list[tuple[str, ...]]:
    """Return (type, value) of each name in the form of `ASK_NAMES`: all LOC, then PER, then ORG."""
    names = []
    pattern = r'"TypeName"\s*:\s*"(LOC|PER|ORG)"\s*,\s*"Text"\s*:\s*("(?:[^"\\]|\\.)*")'
    for kind, value in re.findall(pattern, output):
        try:
            names.append((kind, json.loads(value, strict=False)))
        except ValueError:  # an escape that JSON does not have
            names.append((kind, re.sub(r"\\(.)", r"\1", value[1:-1])))
    return sorted(names, key=lambda name: ("LOC", "PER", "ORG").index(name[0]))


def score_commands(examples: list, features: list, outputs: list[str]) -> dict[str, float]:
    """Return the scores of `score_slots`; names are answered in JSON."""
    parse = parse_json if examples[0]["system"] == ASK_NAMES else parse_slots
    return score_slots(examples, outputs, parse)


def score_slots(examples: list, outputs: list, parse: Callable = parse_slots) -> dict[str, float]:
    """Return F1 over all examples: of (type, place) as MASSIVE counts, and of (type, value).

    For `f1`, a value tags every place where its words occur, in any case, and overwrites earlier
    tags. A value whose words do not occur is no false positive. Neighbours of a type are one slot.
    """
    gold_tags, predicted_tags, gold_values, predicted_values = [], [], [], []
    for k, (example, output) in enumerate(zip(examples, outputs)):
        tagged = tag_slots(example)
        lower, tags = [word.lower() for word, _ in tagged], [None] * len(tagged)
        slots = [part for part in parse(output) if len(part) == 2]
        for kind, value in slots:
            phrase = [word.lower() for word in slot_words(value, example["language"])]
            for start in range(len(lower) - len(phrase) + 1):
                if lower[start : start + len(phrase)] == phrase:
                    tags[start : start + len(phrase)] = [kind] * len(phrase)
        gold_tags += [None, *(kind for _, kind in tagged)]  # None between examples
        predicted_tags += [None, *tags]
        gold_values += [(k, slot["type"], nfc(slot["value"])) for slot in example["slots"]]
        predicted_values += [(k, kind, nfc(value)) for kind, value in slots]
    types, _ = pd.factorize(np.array(gold_tags + predicted_tags, dtype=object))  # None: -1
    gold, predicted = np.split(2 * (types + 1), 2)  # the tag I of each type
    return {
        "f1": f1(entities(gold), entities(predicted)),
        "f1_strict": f1(gold_values, predicted_values),
    }


def score_translation(examples: list, features: list, outputs: list[str]) -> dict[str, float]:
    """Return BLEU and chrF, 0 to 1. Raises UserError if sacrebleu is missing."""
    direction = examples[0]["language"]
    with as_user_error(f"{direction}: BLEU needs `pip install 'sacrebleu[ja,ko]'`"):
        from sacrebleu.metrics import BLEU, CHRF  # https://github.com/mjpost/sacrebleu

        metrics = {"bleu": BLEU(tokenize=bleu_tokenizer(direction)), "chrf": CHRF()}
    lines = [nfc(output.strip()) for output in outputs]
    texts = [[nfc(example["target"]) for example in examples]]
    return {name: metric.corpus_score(lines, texts).score / 100 for name, metric in metrics.items()}


def bleu_tokenizer(direction: str) -> str:
    """Return sacrebleu's name of the tokenizer for the target language of a direction."""
    return BLEU_TOKENIZERS.get(base_language(sides_of(direction)[1]), "13a")


def sides_of(direction: str) -> tuple[str, str]:
    """Return (source, target) of a direction such as `en-de` or `en-zh-TW`."""
    match = re.fullmatch(f"({CODE})-({CODE})", direction)
    require(match, "--task translation", f"'{direction}' is not a direction such as en-de")
    return match[1], match[2]


class Task(NamedTuple):
    """A row of TASKS."""

    head: type  # the class of transformers that has the head of the task
    load: Callable
    encode: Callable
    score: Callable
    languages: list[str]  # the paper's target languages
    train_languages: Sequence[str] = ("en",)
    realign_languages: Sequence[str] = TARGETS
    limit_links: int = 100_000  # lines of OPUS-100; no run of the first paper needs more
    labels: int = 0  # of a classifier
    epochs: int = 5
    max_length: int = 96  # subwords in training, special tokens included
    test_length: int = 128  # subwords in evaluation
    new_tokens: int = 0  # most subwords of an answer; 0: the task is a classification


SPLITS = ("train", "valid", "dev", "test")  # names of local files
NLI_TARGETS = "ar bg de el es fr hi ru th tr vi zh".split()
QA_TARGETS = "ar de el es hi ro ru th tr vi zh".split()
# The second paper names en and zh (with labels), cy and jv (without); we chose the others.
# Each: languages without labels, of which the first are aligned; then those with labels.
MASSIVE = "cy jv sw az af bn fa hi hy id ja ka ko th tr".split(), "en ar es ru zh".split()
XSID = "tr da ja lt no de-ba de-muc gsw id nl".split(), "en de it zh ar".split()
NAMED = "da hr sk sr".split(), "en pt sv zh".split()
UNSEEN = "en-he he-en en-ja ja-en en-uk uk-en".split()  # directions of translation
SEEN = "en-cs cs-en en-de de-en en-is is-en en-ru ru-en en-zh zh-en".split()
WITHOUT_VALIDATION = ("en-is", "is-en")  # on the hub
LONG = {"max_length": 2048, "test_length": 2048, "new_tokens": 128}
TASKS = {
    "udpos": Task(Tokens, load_udpos, encode_tokens, score_accuracy, TARGETS, labels=18),
    "wikiann": Task(Tokens, load_wikiann, encode_tokens, score_entities, TARGETS, labels=7),
    "xnli": Task(Sentences, load_xnli, encode_sentences, score_accuracy, NLI_TARGETS,
                 labels=3, epochs=2, test_length=256),
    "xquad": Task(Answers, load_xquad, encode_questions, score_answers, QA_TARGETS,
                  labels=2, epochs=2, test_length=384),
    "massive": Task(Generator, load_slots, encode_prompts, score_commands,
                    *MASSIVE, MASSIVE[0][:5], limit_links=500, **LONG),
    "xsid": Task(Generator, load_slots, encode_prompts, score_commands,
                 *XSID, XSID[0][:5], **LONG),
    "uner": Task(Generator, load_slots, encode_prompts, score_commands,
                 *NAMED, NAMED[0], **LONG | {"new_tokens": 512}),
    "translation": Task(Generator, load_translation, encode_prompts, score_translation,
                        UNSEEN, SEEN, ["he", "ja", "uk"], **LONG | {"new_tokens": 512}),
}  # fmt: skip


# ---- 10. Files: local data, the hub, downloads ---------------------------------------------------

NO_NETWORK = "check the language and the network, or use --data-dir"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "alignfreeze")


@contextmanager
def as_user_error(problem: str) -> Iterator[None]:
    """Turn any error of a library in this context into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{problem} ({reason})") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line). Raises UserError unless the file is UTF-8 and not empty."""
    message = "file not found; see 'Local data' in the README for the expected layout"
    require(path.is_file(), path, message)
    number = 0
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"  # it may have a byte order mark
                yield number, line.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file") from None
    require(number, path, "the file is empty")


def read_tsv(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (text, translation). Raises UserError for a line without exactly one tab."""
    for number, line in read_lines(path):
        sides = tuple(line.split("\t"))
        message = f"expected 'text TAB translation', found {len(sides) - 1} tabs"
        require(len(sides) == 2, f"{path}:{number}", message)
        require(line.strip(), f"{path}:{number}", "both sides are empty; remove the line")
        yield sides


def read_rows(settings, language: str, split: str, hub: dict, **kinds: type) -> Iterator:
    """Yield (location, row) of local data or of the hub, with the columns `kinds` if any are named.

    hub: arguments of `datasets.load_dataset`.
    """
    if settings.data_dir:
        path = settings.data_dir / settings.task / language / f"{split}.jsonl"
        rows = ((f"{path}:{number}", line) for number, line in read_lines(path))
    else:
        name = f"{hub['path']} {hub.get('name', language)} {hub['split']}"
        with as_user_error(f"{name}: cannot be loaded from the hub; {NO_NETWORK}"):
            table = datasets.load_dataset(**hub)
        rows = ((f"{name}, row {number}", row) for number, row in enumerate(table))
    for where, row in rows:
        if settings.data_dir:
            with as_user_error(f"{where}: is not valid JSON"):
                row = json.loads(row)
                json.dumps(row, ensure_ascii=False).encode()  # fails for a lone surrogate "\\ud800"
        typed_columns(where, row, **kinds)
        yield where, {name: row[name] for name in kinds or row}


def typed_columns(where: str, row, **kinds: type) -> list:
    """Return the values of columns. Raises UserError if one is missing or of another type."""
    require(type(row) is dict, where, f"expected named columns, found {str(row)[:60]!r}")
    for name, kind in kinds.items():
        require(type(row.get(name)) is kind, where, f"no column '{name}' of type {kind.__name__}")
    return [row[name] for name in kinds]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, even if other processes write it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{os.urandom(8).hex()}"
    with as_user_error(f"{path}: cannot be written"):
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def fetch(url: str) -> Path:
    """Download a file once, and return its path in the cache. Raises UserError if that fails."""
    path = CACHE / regex.sub(r"^\w+://|[^\w.-]+", "_", url).strip("_")
    if not path.exists():
        with as_user_error(f"{url}: cannot be downloaded; {NO_NETWORK}"):
            write_whole(path, urllib.request.urlopen(url, timeout=60).read())
    return path


# ---- 11. One run: validate, load, align, fine-tune, evaluate, write the record -------------------

SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # at start, as it may be edited
RECORD_KEYS = ("model", "task", "strategy", "schedule", "aligner", "seed")  # they name a record
NOT_RECORDED = """out overwrite device save_model write_links aligner_model aligner_layer""".split()
OF_ALIGNMENT = """unit layer temperature pool_first realign_languages realign_steps limit_links
realign_batch_size realign_max_length realign_lr realign_decay""".split()
MAY_BE_ZERO = ("seed", "clip", "warmup", "lora", "lora_dropout", "epochs", "aligner_layer")
NOT_PLAIN = """use_dora use_rslora rank_pattern alpha_pattern alora_invocation_tokens lora_bias
layer_replication use_qalora target_parameters""".split()  # settings of PEFT
MODEL_FILES = """config.json generation_config.json tokenizer* *_tokens*.json vocab.* merges.txt
*.safetensors *.safetensors.index.json pytorch_model* *.model *.jinja""".split()
IGNORE_THE_MASK = """convbert deepseek_v4 fnet minimax mobilebert nystromformer recurrent_gemma rwkv
trocr xlstm yoso""".split()  # in the library, padding changes the results of these architectures
SAMPLE = " in 2023, 650841823 don't 中文字 हिन्दी ﬁ  a"  # no capitals: BERT's flags decide on them
PROBE_PAIRS = 100  # sentence pairs of each language that --probe compares


def run(settings: Settings) -> Path:
    """Do one run and write its record; return the path. A run whose record exists is skipped."""
    device = set_up_device(settings.device)
    precision = gather_objects(fast_precision(device))[0]
    if settings.adapter:  # in bfloat16, small changes of the merged weights would be rounded off
        precision = "fp32"
    settings = dataclasses.replace(settings, precision=settings.precision or precision)
    validate_settings(settings)
    tokenizer, config = load_tokenizer(settings.model, generates=is_generative(settings))
    longest, default = tokenizer.model_max_length, default_settings(settings)
    for name in ("max_length", "realign_max_length"):  # some models read less than the default
        if getattr(settings, name) == getattr(default, name) > longest:
            settings = dataclasses.replace(settings, **{name: longest})
    validate_for_model(settings, config, longest)
    path = settings.out / f"{record_name(settings)}.json"
    content = content_hash(settings)
    if is_done(path, settings, content):
        return path
    seconds: dict[str, float] = {}
    with timed(seconds, "model"):
        model = build_model(settings, tokenizer, device)
    with timed(seconds, "data"):
        training, validation, tests = load_data(settings, tokenizer)
        try_evaluation(settings, model, tokenizer, tests)
    with timed(seconds, "pairs"):
        pairs, probe_sets = load_pairs(settings)
    results = train(settings, model, tokenizer, training, validation, pairs, probe_sets, seconds)
    with timed(seconds, "evaluate"):
        scores = evaluate_all(settings, model, tokenizer, tests)
    results |= {"scores": scores, "config": settings_of_run(settings), "content": content}
    if settings.task == "translation":
        results["bleu_tokenizers"] = {code: bleu_tokenizer(code) for code in tests}
    write_record(path, results | {"seconds": seconds}, device)
    return path


def train(
    settings: Settings, model, tokenizer, features: list, validation: list,
    pairs: Iterator[Pair], probe_sets: dict[str, list[Pair]], seconds: dict[str, float],
) -> dict:  # fmt: skip
    """Align and fine-tune a model in the order of the schedule; return a part of the record."""
    updates = finetune_steps(len(features), settings)
    message = f"{settings.validate}: fine-tuning has {updates} updates; validate more often"
    require((settings.validate or 0) <= updates, "--validate", message)
    steps, losses, aligned, best, probed = {"finetune": updates}, {}, {}, {}, {}
    measure(probed, "before", settings, model, tokenizer, probe_sets)
    if settings.strategy != "baseline" and settings.schedule == "before":
        steps["realign"] = settings.realign_steps or updates
        with timed(seconds, "realign"):
            losses, aligned = realign(model, tokenizer, pairs, steps["realign"], settings)
        measure(probed, "realigned", settings, model, tokenizer, probe_sets)
    if settings.save_model and not is_generative(settings):
        save_model(settings, model, tokenizer)
    if settings.epochs:
        stop = keep_best(settings, model, tokenizer, validation, best) if validation else None
        with timed(seconds, "finetune"):
            curves, seen = finetune(model, tokenizer, features, settings, pairs, stop)
        losses, aligned = losses | curves, aligned | seen
        if best:
            steps["finetune"] = best.pop("updates")  # fewer, if it stopped early
            model.load_state_dict(best.pop("weights"), strict=False)
            say(f"validation: kept the weights after {best['step']} updates, {best['loss']:.4f}")
        measure(probed, "finetuned", settings, model, tokenizer, probe_sets)
    elif not is_generative(settings):
        say("--epochs 0: the scores are those of a classifier that was not trained here")
    if settings.save_model and is_generative(settings):
        save_model(settings, model, tokenizer)
    results = {"steps": steps, "losses": losses, "pairs": aligned}
    optional = {"validation": best, "probe": probed}
    return results | {key: value for key, value in optional.items() if value}


def evaluate_all(settings: Settings, model, tokenizer, tests: dict) -> dict[str, dict]:
    """Return {language: its scores}. Several processes share out the languages."""
    task, scores = TASKS[settings.task], {}
    rank, world = processes()
    for code in progress(list(tests)[rank::world], "evaluate"):
        scores[code] = evaluate(model, tokenizer, task, *tests[code], settings)
    parts = gather_objects(scores)
    return {code: parts[k % world][code] for k, code in enumerate(tests)}


def try_evaluation(settings: Settings, model, tokenizer, tests: dict) -> None:
    """Evaluate two examples, so that errors of a test are found before training."""
    task = TASKS[settings.task]
    task = task._replace(new_tokens=min(task.new_tokens, 2))
    examples, features = next(iter(tests.values()))
    features = [feature for feature in features if feature["example"] < 2]
    with as_user_error(f"--model {settings.model}: two test examples cannot be evaluated"):
        evaluate(model, tokenizer, task, examples[:2], features, settings)


def keep_best(settings: Settings, model, tokenizer, features: list, best: dict) -> Callable:
    """Return the `stop` of a training that validates: true after five checks without a lower loss.

    A check, every `settings.validate` updates, computes the loss of the validation examples. `best`
    holds the lowest loss and the weights that had it.
    """
    features = sorted(features, key=lambda feature: len(feature["input_ids"]))
    chunks = in_chunks(features, settings.batch_size)
    batches = [task_batch(chunk, tokenizer.pad_token_id, model.device) for chunk in chunks]
    labels = [int((batch["labels"] != IGNORE).sum()) for batch in batches]
    best |= {"loss": math.inf, "step": 0, "losses": []}

    def stop(step: int) -> bool:
        best["updates"] = step
        if step % settings.validate:
            return False
        model.eval()
        with torch.no_grad(), autocast(model.device, settings.precision):
            losses = [task_loss(model, batch).item() for batch in batches]
        model.train()
        loss = float(np.average(losses, weights=labels))
        require(math.isfinite(loss), "validation", f"the loss is {loss}; lower the learning rate")
        best["losses"].append(round(loss, 6))
        if loss < best["loss"]:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            best["weights"] = {name: parameter.detach().clone() for name, parameter in trained}
            best["loss"], best["step"] = loss, step
        return step >= best["step"] + 5 * settings.validate

    return stop


def set_up_device(name: str | None) -> torch.device:
    """Return the device of that name, or a GPU if there is one; make its algorithms deterministic.

    The processes of torchrun meet here, and each takes the GPU of its number.
    """
    with as_user_error(f"--device {name}: not available on this machine"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and (device.index is None or dist.is_torchelastic_launched()):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # saves 1,200 launches a step
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape of a batch
        torch.backends.cuda.matmul.allow_tf32 = True  # the default when the authors ran their code
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        with as_user_error("torchrun: the processes cannot connect"):
            dist.init_process_group(backend, timeout=pd.Timedelta(days=1))  # tests differ in size
    return device


def fast_precision(device: torch.device) -> str:
    """Return bf16 if the hardware multiplies matrices faster in it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"


def is_generative(settings: Settings) -> bool:
    """Return whether the model of a task generates text."""
    return TASKS[settings.task].new_tokens > 0


def default_settings(settings: Settings) -> Settings:
    """Return the defaults of a method, model and task."""
    chosen = [f"--{name}={getattr(settings, name)}" for name in ("method", "model", "task")]
    return parse_args(chosen)


def settings_of_run(settings: Settings) -> dict:
    """Return the settings that determine a result, as the record shows them; paths by their name.

    The settings of the alignment do not count for a baseline, unless it probes.
    """
    values = dataclasses.asdict(settings)
    for name in NOT_RECORDED:
        del values[name]
    if settings.strategy == "baseline":
        values["schedule"] = "none"
        if not settings.probe:
            values |= dict.fromkeys(OF_ALIGNMENT) | {"aligner": "none"}
    if settings.unit == "sentence":
        values["aligner"] = "none"
    for name in ("model", "aligner", "data_dir"):
        values[name] = values[name] and Path(os.path.abspath(values[name])).name
    adapters = map(parse_adapter, settings.adapter)
    values["adapter"] = [f"{Path(os.path.abspath(name)).name}={w:g}" for name, w in adapters]
    return values


def record_name(settings: Settings) -> str:
    """Return `<model>_<task>_<strategy>_<schedule>_<aligner>_<seed>`.

    Six digits follow, a hash of the settings that are not defaults, if there are any.
    """
    values = settings_of_run(settings)
    defaults = dataclasses.asdict(default_settings(settings)) | {"precision": "fp32"}
    defaults["method"] = "mid-align" if is_generative(settings) else "alignfreeze"  # not hashed
    changed = {}
    for key, value in values.items():
        if key not in RECORD_KEYS and value not in (None, defaults[key]):
            changed[key] = value
    digits = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6]
    name = "_".join(str(values[key]) for key in RECORD_KEYS) + (f"-{digits}" if changed else "")
    require(len(os.fsencode(name)) <= 235, name, "the name is too long; rename the model's folder")
    return name


def content_hash(settings: Settings) -> str:
    """Return a hash of the model, the adapters, the links, and the local files of all languages."""
    identities = [model_identity(settings.model)]
    for name, _ in map(parse_adapter, settings.adapter):
        identities.append(hash_files(adapter_folder(name).glob("adapter_*")))
    paths, codes = [], {*settings.train_languages, *settings.languages}
    aligns = settings.strategy != "baseline" or settings.probe
    if aligns and settings.task == "massive":  # it aligns its own texts
        codes |= {SOURCE, *settings.realign_languages}
    if settings.task == "translation":  # the opposite direction may be read
        codes |= {"-".join(reversed(sides_of(code))) for code in codes}
    if settings.data_dir:
        for folder in [settings.data_dir / settings.task / code for code in codes]:
            paths += [path for path in folder.glob("*.*") if path.stem in SPLITS]
    if aligns:
        for code in settings.realign_languages:
            if settings.unit == "word" and settings.aligner not in ALIGNERS:
                paths.append(Path(settings.aligner) / f"{SOURCE}-{code}.txt")
            if settings.data_dir:
                paths += settings.data_dir.glob(f"parallel/{SOURCE}-{code}.*tsv")
                paths.append(settings.data_dir / "dictionary" / f"{SOURCE}-{code}.txt")
    identities.append(hash_files(path for path in paths if path.exists()))
    return hashlib.sha256(" ".join(identities).encode()).hexdigest()[:16]


def model_identity(name: str) -> str:
    """Return a hash of the files of a local model, or the id and the commit of one on the hub."""
    if not Path(name).is_dir():
        path = Path(transformers.utils.cached_file(name, transformers.utils.CONFIG_NAME))
        return f"{name}@{path.parent.name}"
    return hash_files(path for pattern in MODEL_FILES for path in Path(name).glob(pattern))


def hash_files(paths: Iterable[Path]) -> str:
    """Return a hash of files: their contents, names and folders. Raises UserError for a pipe."""
    digest = hashlib.sha256()
    named = {os.fsencode("/".join(path.absolute().parts[-2:])): path for path in paths}
    for name, path in sorted(named.items()):
        require(path.is_file(), path, "is not a regular file; remove it")
        digest.update(name + f" {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def is_done(path: Path, settings: Settings, content: str) -> bool:
    """Return whether the record of this run exists. Raises UserError if it is another file."""
    if settings.overwrite or not gather_objects(os.path.lexists(path))[0]:
        return False
    with as_user_error(f"{path}: is not a record of a run; move it away, or add --overwrite"):
        require(path.is_file(), path, "is not a regular file; move it away")
        record = json.loads(path.read_bytes())
        stored, revision = dict(record["config"]), record["versions"]["alignfreeze.py"]
    expected = json.loads(json.dumps(settings_of_run(settings)))
    default = default_settings(settings)
    for key in expected.keys() - stored.keys():  # newer than the record, which had the default
        stored[key] = expected[key] if getattr(settings, key) == getattr(default, key) else None
    changed = [key for key in expected if stored[key] != expected[key]]
    advice = "choose another --out, or add --overwrite"
    require(not changed, path, f"has other settings ({', '.join(changed)}); {advice}")
    is_same = record.get("content") == content
    require(is_same, path, f"was made from other data or weights; {advice}")
    require(not settings.save_model, path, "exists: no model would be saved; add --overwrite")
    note = "" if revision == SCRIPT else "; another revision of alignfreeze.py made it"
    say(f"{path} exists: nothing to do (--overwrite repeats the run){note}")
    return True


def validate_settings(settings: Settings) -> None:
    """Validate the flags that need no model, before anything is loaded. Raises UserError."""
    for name, value in vars(settings).items():
        if type(value) in (int, float) and name != "layer":
            lowest = "0 or more" if name in MAY_BE_ZERO else "more than 0"
            in_range = 0 < value < 2**32 or (value == 0 and name in MAY_BE_ZERO)
            require(in_range, flag_of(name), f"{value} must be {lowest} and less than 2^32")
    require(settings.lora_dropout < 1, "--lora-dropout", "must be less than 1")
    validate_effects(settings)
    validate_alignment(settings)
    world = processes()[1]
    message = f"an update has {settings.accumulate} batches to share out; raise --accumulate"
    require(world <= settings.accumulate, f"torchrun, {world} processes", message)
    validate_languages(settings)
    validate_output(settings)


def validate_effects(settings: Settings) -> None:
    """Raise UserError for a flag that has no effect with these settings."""
    defaults, task = default_settings(settings), TASKS[settings.task]
    is_aligned, is_word = settings.strategy != "baseline", settings.unit == "word"
    before = not is_aligned or settings.schedule == "before"  # a baseline accepts these flags
    decays = {settings.decay} | ({settings.realign_decay} if before and is_aligned else set())
    has_warmup = settings.warmup or "inverse_sqrt" not in decays
    require(has_warmup, "--warmup 0", "with inverse_sqrt, the rate would hardly fall; give more")
    for names, has_effect, other in [
        ("realign_steps realign_lr realign_decay", before, "--schedule before"),
        ("save_model", before or task.new_tokens, "--schedule before"),
        ("aligner", is_word, "--unit word"),
        ("pool_first", not is_word, "--unit sentence"),
        ("lora_alpha lora_dropout", settings.lora, "--lora"),
        ("aligner_model aligner_layer", settings.write_links, "--write-links"),
        ("adapter validate", task.new_tokens, "a task that generates text"),
        ("validate", settings.epochs, "fine-tuning (--epochs)"),
        ("warmup", decays != {"constant"} or not settings.warmup, "another --decay"),
    ]:
        for name in names.split():
            is_default = getattr(settings, name) == getattr(defaults, name)
            require(has_effect or is_default, flag_of(name), f"has no effect without {other}")


def validate_alignment(settings: Settings) -> None:
    """Raise UserError if nothing could be aligned with these settings."""
    is_aligned, is_word = settings.strategy != "baseline", settings.unit == "word"
    has_negatives = is_word or settings.realign_batch_size > 1
    message = "one sentence pair has no other sentence to be compared with; use 2 or more"
    require(has_negatives or not is_aligned, "--realign-batch-size 1", message)
    aligner, writers = settings.aligner, ALIGNERS[1:]
    if settings.write_links:
        message = f"needs --unit word and --aligner {', '.join(writers)}"
        require(is_word and aligner in writers, "--write-links", message)
    elif is_aligned and is_word and aligner != "dictionary":
        is_folder = aligner not in writers and Path(aligner).is_dir()
        is_named = Path(os.path.abspath(aligner)).name in ("dictionary", "none")  # in a record
        message = "must be dictionary, or a folder from --write-links not named dictionary or none"
        require(is_folder and not is_named, f"--aligner {aligner}", message)
    has_steps = settings.epochs or settings.realign_steps or not is_aligned
    require(has_steps, "--epochs 0", "to align only, give --schedule before and --realign-steps")


def validate_languages(settings: Settings) -> None:
    """Raise UserError for an invalid language code, or for one that cannot be scored."""
    for name in ("languages", "train_languages", "realign_languages"):
        for code in getattr(settings, name):
            is_code = regex.fullmatch(r"[\w-]+", code)
            require(is_code, flag_of(name), f"'{code}' is not a language code")
    is_other = SOURCE not in settings.realign_languages
    require(is_other, "--realign-languages", f"'{SOURCE}' is aligned with all of them; omit it")
    if settings.task == "translation":  # sacrebleu may lack a tokenizer
        for direction in [*settings.train_languages, *settings.languages]:
            score_translation([{"language": direction, "target": "a"}], [], ["a"])


def validate_output(settings: Settings) -> None:
    """Make the folders to write to. Raises UserError if they cannot be written to."""
    path, links = settings.save_model, settings.write_links
    folders = {"--write-links": links} if links else {"--out": settings.out}
    folders |= {"--save-model": path.parent} if path else {}
    for flag, folder in folders.items():
        with as_user_error(f"{flag} {folder}: cannot be written to; choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    if path:
        is_new = not os.path.lexists(path) and len(os.fsencode(path.name)) <= 240
        require(is_new, f"--save-model {path}", "exists, or has too long a name; name a new folder")


def validate_for_model(settings: Settings, config, longest: int) -> None:
    """Raise UserError for flags that do not fit a model that reads `longest` subwords."""
    depth, layer, spec = config.num_hidden_layers, settings.layer, settings.strategy
    shortest = 40 if settings.task == "xquad" else 8
    message = f"{settings.max_length} must be {shortest} to {longest} subwords with this model"
    require(shortest <= settings.max_length <= longest, "--max-length", message)
    frozen_parts = layer_numbers(spec, depth)
    if spec == "baseline" and not settings.probe:
        return
    message = f"the hidden states of this model are {-depth - 1} to {depth}"
    require(-depth - 1 <= layer <= depth, f"--layer {layer}", message)
    message = f"{settings.realign_max_length} must be 8 to {longest} subwords with this model"
    require(8 <= settings.realign_max_length <= longest, "--realign-max-length", message)
    trainable = {*range(layer % (depth + 1))}  # what alignment can train
    trainable |= set() if settings.lora else {"emb"}  # the embeddings get no adapters
    message = f"nothing below --layer {layer} trains; align a higher one, or freeze fewer"
    require(spec == "baseline" or trainable - frozen_parts, f"--strategy {spec}", message)
    freezes = spec in ("full", "baseline") or trainable & frozen_parts
    message = f"freezes nothing that alignment trains (below --layer {layer}); use full"
    require(freezes, f"--strategy {spec}", message)


def load_tokenizer(name: str, flag: str = "--model", generates: bool = False) -> tuple[Any, Any]:
    """Load the tokenizer and the configuration of a model.

    generates: whether a decoder is needed instead of an encoder. A Unigram composes text first
    (NFC). Raises UserError if the model cannot be used, before anything is computed.
    """
    flag = f"{flag} {name}"
    with as_user_error(f"{flag}: cannot be loaded; give a hub id or a folder of a model"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = read_tokenizer(name, flag)
        has_adapter = transformers.utils.find_adapter_config_file(name) is not None
        message = "holds adapters, too; remove adapter_config.json, or give them by --adapter"
        require(not has_adapter, flag, message)
        validate_architecture(config, generates, flag)
        has_words = tokenizer.is_fast and len(tokenizer) > len(tokenizer.all_special_ids)
        require(has_words, flag, "has no fast tokenizer with words; are files missing?")
        tokenizer.truncation_side = "right"
        segments = tokenizer("a", "a", return_token_type_ids=True)["token_type_ids"]
        if 0 < max(segments) < getattr(config, "type_vocab_size", 0):  # a general class omits them
            tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        if tokenizer.pad_token_id is None and generates:
            tokenizer.pad_token = tokenizer.eos_token
        backend = tokenizer.backend_tokenizer
        if type(backend.model).__name__ == "Unigram":  # else it drops accents of decomposed text:
            steps = [normalizers.NFC(), backend.normalizer]  # huggingface/tokenizers/issues/2116
            backend.normalizer = normalizers.Sequence([*filter(None, steps)])
        validate_tokenizer(tokenizer, config.vocab_size, flag)
        positions = getattr(config, "max_position_embeddings", None) or math.inf
        if "roberta" in config.model_type:
            positions -= 2  # RoBERTa counts positions from 2
        tokenizer.model_max_length = longest = min(tokenizer.model_max_length, positions)
        message = "has no layer, or reads fewer than 8 subwords; see its configuration"
        require(longest >= 8 and config.num_hidden_layers > 0, flag, message)
    return tokenizer, config


def read_tokenizer(name: str, flag: str):
    """Load a tokenizer that splits text as its file `tokenizer.json` says.

    Several classes of the library split digits and the like in their own way, whatever the file
    says: https://github.com/huggingface/transformers/issues/45920
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    exact_class = transformers.PreTrainedTokenizerFast
    options = {"_raise_exceptions_for_missing_entries": False}
    has_file = transformers.utils.cached_file(name, "tokenizer.json", **options)
    if has_file and type(tokenizer) is not exact_class:
        exact = exact_class.from_pretrained(name)
        marks = tokenizer.all_special_tokens[:1]
        samples = [SAMPLE, SAMPLE.lstrip(), *(f"{mark}a" for mark in marks)]  # three beginnings
        if [*map(exact.tokenize, samples)] != [*map(tokenizer.tokenize, samples)]:
            say(f"{flag}: splits text as tokenizer.json says, unlike {type(tokenizer).__name__}")
            return exact
    return tokenizer


def validate_architecture(config, generates: bool, flag: str) -> None:
    """Raise UserError unless the script can compute this kind of model, and the task needs it."""
    is_text = config.is_encoder_decoder or config.get_text_config() is config
    require(is_text, flag, "is a multimodal model; give a model of text alone")
    is_masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    is_encoder = is_masked and not getattr(config, "is_decoder", False)
    is_decoder = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not is_masked
    looks_ahead = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    looks_ahead |= config.model_type == "bert-generation" and not config.is_decoder
    is_decoder = is_decoder and getattr(config, "is_causal", True) and not looks_ahead
    needed = "a decoder-only model that does not look ahead" if generates else "an encoder"
    message = f"{config.model_type} does not fit this task, which needs {needed}"
    fits = is_decoder if generates else is_encoder
    require(fits and not config.is_encoder_decoder, flag, message)
    message = f"padding changes the results of {config.model_type}; choose another model"
    require(config.model_type not in IGNORE_THE_MASK, flag, message)
    require(config.model_type != "mra", flag, "mra computes no attention without its CUDA kernels")
    require(config.model_type != "xmod", flag, "X-MOD would use one language's modules for all")


def validate_tokenizer(tokenizer, size: int, flag: str) -> None:
    """Raise UserError if a tokenizer cannot be that of a model with `size` embeddings."""
    if getattr(tokenizer.backend_tokenizer, "fix_mistral_regex", None) is False:
        say(f"{flag}: the library warns that it may split text wrongly (see fix_mistral_regex)")
    kind = type(tokenizer.backend_tokenizer.model).__name__
    unknown = [tokenizer.unk_token_id in tokenizer(text)["input_ids"] for text in ("ﬁ", "fi")]
    if kind == "Unigram" and unknown == [True, False]:  # DeBERTa's, made from spm.model
        say(f"{flag}: the tokenizer does not normalise text: 'ﬁ' is unknown, 'fi' is known")
    reads_all = kind == "BPE" or tokenizer.unk_token_id is not None  # BPE: of bytes
    is_complete = reads_all and tokenizer.pad_token_id is not None
    require(is_complete, flag, "the tokenizer has no token for padding or for unknown words")
    vocab = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    is_cased = any(re.match("##[A-Z]", subword) for subword in vocab)  # WordPiece
    is_lowered = tokenizer.tokenize("A") == tokenizer.tokenize("a")
    message = 'lower-cases text, but its vocabulary does not; set "do_lower_case" to false'
    require(not (is_cased and is_lowered), flag, message)
    ends = [*tokenizer("a")["input_ids"], tokenizer.pad_token_id, tokenizer.eos_token_id or 0]
    highest = max(*vocab.values(), *ends)  # added tokens, such as of images, may lie above
    message = f"the tokenizer produces ids up to {highest}, but the model has {size} embeddings"
    require(highest < size, flag, message)


def load_model(name: str, head=transformers.AutoModel, flag="--model", **options) -> nn.Module:
    """Load a pretrained model, in float32 by default.

    Raises UserError if the files lack weights other than those of a pooler or of a new head.
    """
    flag, options = f"{flag} {name}", {"dtype": torch.float32} | options
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options["trust_remote_code"] = False
    with as_user_error(f"{flag}: its weights cannot be loaded"):
        model, info = head.from_pretrained(name, **options)
    has_new_head = head not in (transformers.AutoModel, Generator)
    prefix = f"{model.base_model_prefix}." if has_new_head else ""
    unused = [key for key in info["unexpected_keys"] if re.search(r"\.\d+\.", key)]
    if unused:
        tensors = f"{len(unused)} tensors of layers in its files, such as {unused[0]}"
        say(f"{flag}: the model that config.json describes does not use {tensors}")
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    absent = {*info["missing_keys"], *mismatched}
    of_encoder = {key for key in absent if key.startswith(prefix)}
    poolers = {key for key in of_encoder if "pooler" in key}
    missing = sorted(of_encoder - poolers)
    require(not missing, flag, f"its files lack {len(missing)} tensors, such as {missing[:1]}")
    if poolers and has_new_head:
        say(f"{flag}: has no pooler; a random one is added, which --lora does not train")
    if mismatched:
        say(f"{flag}: tensors of another size are replaced by random ones: {', '.join(mismatched)}")
    elif has_new_head and absent == of_encoder:
        say(f"{flag}: its own classifier is used; the order of its labels must be this task's")
    return model


def build_model(settings: Settings, tokenizer, device: torch.device) -> nn.Module:
    """Load the model of a run, with the head of its task; merge adapters, and add new ones."""
    torch.manual_seed(settings.seed)  # for the initial weights of the classifier and the adapters
    task = TASKS[settings.task]
    options = {} if task.new_tokens else {"num_labels": task.labels}
    if settings.lora and settings.precision == "bf16":  # frozen weights need no higher precision
        options["dtype"] = torch.bfloat16
    model = load_model(settings.model, task.head, **options).to(device)
    for name, weight in map(parse_adapter, settings.adapter):
        merge_adapter(model, name, weight)
    if settings.lora:
        names = add_lora(model, settings.lora, settings.lora_alpha, settings.lora_dropout)
        for name in names:  # a classifier is among them
            model.get_parameter(name).data = model.get_parameter(name).data.float()
        count = model.num_parameters(only_trainable=True)
        say(f"adapters of rank {settings.lora}: {count / 1e6:.2f}M parameters train")
        layers = transformer_layers(model.base_model).named_parameters()
        rest = [n for n, p in layers if p.ndim > 1 and not re.search("base_layer|lora_", n)]
        if rest:
            say(f"--lora: {len(rest)} tensors of the layers get no adapters, such as {rest[-1]}")
    if settings.checkpointing:
        with as_user_error("--checkpointing: not possible with this model"):
            model.activation_checkpointing_enable({"use_reentrant": False})
    size = f"{model.num_parameters() / 1e6:.1f}M parameters on {device}"
    say(f"{settings.model}: {size}; strategy {settings.strategy}, learning rate {settings.lr:g}")
    return model


def parse_adapter(text: str) -> tuple[str, float]:
    """Return (folder or hub id, weight) of `NAME` or `NAME=WEIGHT`; the weight is 1 by default."""
    name, _, weight = text.rpartition("=")
    if name and not Path(text).is_dir():  # a folder may be called `r=8`
        with suppress(ValueError):
            return name, float(weight)
    return text, 1.0


def adapter_folder(name: str) -> Path:
    """Return the folder of an adapter, downloaded if it is on the hub."""
    if Path(name).is_dir():
        return Path(name)
    with as_user_error(f"--adapter {name}: cannot be loaded; give a hub id or a folder"):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns="adapter_*"))


def merge_adapter(model: nn.Module, name: str, weight: float) -> None:
    """Add `weight` x scale x B A to the weights of the model, from a folder in PEFT's format.

    Raises UserError if the folder does not hold plain LoRA adapters of this model.
    """
    flag, folder = f"--adapter {name}", adapter_folder(name)
    with as_user_error(f"{flag}: cannot be read"):
        config = json.loads((folder / "adapter_config.json").read_bytes())
        tensors = load_file(folder / "adapter_model.safetensors")
        unsupported = [key for key in NOT_PLAIN if config.get(key)]
        if config.get("init_lora_weights") not in (None, True, False, "gaussian"):
            unsupported.append("init_lora_weights")  # PiSSA and OLoRA change the base weights
        is_plain = config.get("peft_type") == "LORA" and not unsupported
        require(is_plain, flag, f"not plain LoRA adapters: {config.get('peft_type')} {unsupported}")
        rank, scale = config["r"], config["lora_alpha"] / config["r"]
    require(math.isfinite(weight), flag, f"its weight {weight} is not a number")
    names = {key.rsplit(".lora_", 1)[0] for key in tensors}
    paired = tensors.keys() == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    require(names and paired, flag, "its tensors are not pairs of lora_A.weight and lora_B.weight")
    modules = dict(model.named_modules())
    for key in sorted(names):
        low, high = (tensors[f"{key}.lora_{part}.weight"].float() for part in "AB")
        name = key.removeprefix("base_model.model.")
        layer = modules.get(name)
        fits = isinstance(layer, nn.Linear) and low.shape == (rank, layer.in_features)
        fits = fits and high.shape == (layer.out_features, rank)
        require(fits, flag, f"this model has no linear layer {name} of that size and rank")
        is_tied = layer.weight is model.get_input_embeddings().weight
        require(not is_tied, flag, "changes the head, which is tied to the embeddings")
        layer.weight.data += weight * scale * (high @ low).to(layer.weight.device)  # in float32
    rounding = ", rounded to bfloat16" if layer.weight.dtype == torch.bfloat16 else ""
    base = config.get("base_model_name_or_path") or "an unknown model"
    say(f"{flag}: merged with weight {weight:g}{rounding}; made for {base}")


def save_model(settings: Settings, model: nn.Module, tokenizer) -> None:
    """Write a folder, whole or absent: adapters in PEFT's format, or a model for --model."""
    if processes()[0] > 0:  # only one process writes
        return
    path, is_decoder = settings.save_model, is_generative(settings)
    trained = model if is_decoder else model.base_model
    is_finite = all(parameter.isfinite().all() for parameter in trained.parameters())
    require(is_finite, "--save-model", "the weights are not finite; lower the learning rate")
    problem = f"--save-model {path}: cannot be written"
    with as_user_error(problem), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        folder = Path(scratch) / "model"
        if settings.lora:
            folder.mkdir()
            weights = trained.state_dict(prefix="base_model.model.")
            tensors = {name: weight for name, weight in weights.items() if ".lora_" in name}
            config = {
                "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False,
                "task_type": "CAUSAL_LM" if is_decoder else "FEATURE_EXTRACTION",
                "r": settings.lora, "lora_alpha": settings.lora_alpha,
                "lora_dropout": settings.lora_dropout, "inference_mode": True,
                "target_modules": sorted({name.split(".")[-3] for name in tensors}),
                "base_model_name_or_path": Path(os.path.abspath(settings.model)).name,
            }  # fmt: skip
            save_file(tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        else:
            trained.save_pretrained(folder)
            tokenizer.backend_tokenizer.no_truncation()  # which the last batch has set
            tokenizer.save_pretrained(folder)
        os.replace(folder, path)
    before = "".join(f"{adapter} " for adapter in settings.adapter)
    needs_both = before and settings.lora  # else the merged adapters are part of what is saved
    say(f"--save-model: {path}" + (f"; use it as --adapter {before}{path}" if needs_both else ""))


def load_data(settings: Settings, tokenizer) -> tuple[list, list, dict]:
    """Return (training features, validation features, {language: (examples, features)} to test)."""
    task, tests = TASKS[settings.task], {}
    training = load_features(settings, tokenizer, "train") if settings.epochs else []
    validation = load_features(settings, tokenizer, "valid") if settings.validate else []
    length = min(task.test_length, tokenizer.model_max_length)
    codes = dict.fromkeys([*settings.train_languages, *settings.languages])
    for code, examples in load_examples(settings, "test", codes).items():
        name = f"{settings.task}, {code}"
        tests[code] = examples, encode(task, tokenizer, examples, length, False, name)
    return training, validation, tests


def load_features(settings: Settings, tokenizer, split: str) -> list[dict]:
    """Return the features of a split, of all languages that have labels."""
    parts = load_examples(settings, split, settings.train_languages)
    examples, name = [*itertools.chain(*parts.values())], f"{settings.task}, {split}"
    return encode(TASKS[settings.task], tokenizer, examples, settings.max_length, True, name)


def load_examples(settings: Settings, split: str, codes: Iterable[str]) -> dict[str, list[dict]]:
    """Return {language: its examples of a split, up to the limit}, and say how many they are."""
    examples, name, unreadable = {}, f"{settings.task}, {split}", 0
    limit = settings.limit_test if split == "test" else settings.limit_train
    for code in codes:
        if split == "valid" and code in WITHOUT_VALIDATION and not settings.data_dir:
            say(f"{name}: {code} has no validation examples")
            continue
        examples[code] = list(TASKS[settings.task].load(code, split, settings))[:limit]
        unreadable += sum(map(is_unreadable, examples[code]))
    say(f"{name}: " + ", ".join(f"{code} {len(part)}" for code, part in examples.items()))
    if unreadable:
        message = "answers cannot be read back: a slot holds '; ', ': ' or a line break"
        say(f"{name}: {unreadable} {message}")
    return examples


def encode(task: Task, tokenizer, examples: list, max_length: int, training: bool, name="data"):
    """Return the features of examples; raise UserError if there is nothing to learn or score."""
    features = []
    for start in range(0, len(examples), 1000):  # in parts, as tokenizers return large objects
        part = task.encode(tokenizer, examples[start : start + 1000], max_length, training)
        features += [feature | {"example": start + feature["example"]} for feature in part]
    if training or not task.new_tokens:
        has_label = any((feature["labels"] != IGNORE).any() for feature in features)
        require(has_label, name, "there is nothing to learn or to score")
    cut = len({feature["example"] for feature in features if feature["cut"]})
    if cut:
        say(f"{name}: {cut} examples lose a part (too long, or a word without a subword)")
    return features


def load_pairs(settings: Settings) -> tuple[Iterator[Pair], dict[str, list[Pair]]]:
    """Return endless sentence pairs, all languages in turn, and {language: pairs} for the probe."""
    streams, probe_sets = [], {}
    for code in settings.realign_languages:
        if settings.strategy != "baseline":
            streams.append(ParallelText(code, settings).stream())
        if settings.probe:
            probe_sets[code] = probe_pairs(ParallelText(code, settings, "dev"))
    pairs = itertools.chain.from_iterable(zip(*streams))
    first = list(itertools.islice(pairs, len(streams)))  # now, to raise errors before training
    return itertools.chain(first, pairs), probe_sets


def measure(results: dict, stage: str, settings, model, tokenizer, probe_sets: dict) -> None:
    """Add the `retrieval` of each language after a stage to results[kind][stage][language]."""
    for code, pairs in probe_sets.items():
        for kind, shares in retrieval(model, tokenizer, pairs, settings).items():
            results.setdefault(kind, {}).setdefault(stage, {})[code] = shares


@torch.inference_mode()
def retrieval(model: nn.Module, tokenizer, pairs: list[Pair], settings: Settings) -> dict:
    """Return {"retrieval": [for each of hidden_states: 0 to 1]}; for sentences also "margin".

    That is how often the nearest vector is the linked one, in both directions, among all linked
    words or all sentences of the pairs. "retrieval" compares by cosine; "margin" by the cosine
    divided by the mean cosine of both sides to their 4 nearest neighbours (Artetxe and Schwenk
    2019, https://arxiv.org/abs/1811.01136). Raises UserError if no linked word is left.
    """
    encode_batch = encode_pairs if settings.unit == "word" else encode_texts
    length = settings.realign_max_length
    batch = encode_batch(tokenizer, pairs, length, model.device)
    size = len(batch.queries) // (2 if settings.unit == "word" else 1)  # words: both directions
    require(size, f"--probe, {pairs[0].language}", f"no linked word within {length} subwords")
    model.eval()
    states = []  # of each part of the batch, its hidden states
    for start in range(0, 2 * len(pairs), 32):
        part = {name: tensor[start : start + 32] for name, tensor in batch.inputs.items()}
        states.append(model.base_model(**part, output_hidden_states=True).hidden_states)
        embedded = run_to_layer(model.base_model, part, 0)  # Mamba leaves it out of its states
        is_first = torch.equal(embedded[:, 0], states[-1][0][:, 0])
        is_complete = len(states[-1]) == model.config.num_hidden_layers + 1
        message = "numbers its hidden states in another way; leave out --probe"
        require(is_first and is_complete, type(model).__name__, message)
    results = defaultdict(list)
    for layer in zip(*states):
        vectors = vectors_of(torch.cat(layer), batch, settings.pool_first).cpu()
        vectors = F.normalize(vectors.double(), dim=-1)  # a GPU would round float32 to TF32
        cosine = vectors[batch.queries[:size].cpu()] @ vectors[batch.targets[:size].cpu()].T
        results["retrieval"].append(share_retrieved(cosine))
        if settings.unit == "sentence":
            near = min(4, size)
            rows = cosine.topk(near, dim=1).values.mean(1)
            columns = cosine.topk(near, dim=0).values.mean(0)
            results["margin"].append(share_retrieved(2 * cosine / (rows[:, None] + columns)))
    return results


def share_retrieved(similarity: Tensor) -> float:
    """Return how often row k is most similar to column k, and column k to row k."""
    k = torch.arange(len(similarity), device=similarity.device)
    hits = torch.cat([similarity.argmax(0) == k, similarity.argmax(1) == k])
    return round(hits.float().mean().item(), 6)


def probe_pairs(text: ParallelText) -> list[Pair]:
    """Return the first linked pairs of a text; every word keeps only its first link."""
    linked, chosen = set(), []
    for number, line in enumerate(text.lines()):
        pair = text.pair(number, line)
        links = []
        for i, j in pair.links:
            words = {(SOURCE, pair.source[i]), (pair.language, pair.target[j])}
            if not words & linked:
                links.append((i, j))
                linked |= words
        if is_usable(pair._replace(links=links)):
            chosen.append(pair._replace(links=links))
        if len(chosen) == PROBE_PAIRS:
            break
    require(chosen, f"--probe, {text.language}", "no line has a link; check the dictionary")
    return chosen


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that is spent in this context to the seconds of a stage."""
    start = time.time()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.time() - start, 1)


def write_record(path: Path, results: dict, device: torch.device) -> None:
    """Write the JSON file of a run (settings, scores, losses, versions) and print the scores."""
    if processes()[0] > 0:  # only one process writes
        return
    record = {key: results["config"][key] for key in RECORD_KEYS} | results
    record["versions"] = {"python": sys.version.split()[0], "alignfreeze.py": SCRIPT}
    for library in (torch, transformers, datasets):
        record["versions"][library.__name__] = library.__version__
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    record |= {"threads": torch.get_num_threads(), "processes": processes()[1]}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text.encode("utf-8", "backslashreplace"))
    if results["pairs"]:
        say(f"\naligned\n{pd.DataFrame(results['pairs']).T.to_string()}")
    table = pd.DataFrame(results["scores"]).T * 100
    targets = table.drop(index=results["config"]["train_languages"])
    if len(targets):
        table.loc["average"] = targets.mean()
    say(f"\npercent\n{table.to_string(float_format='%.1f')}")
    say(f"(average: of the languages without labels)\n\nrecord: {path}")


# ---- 12. Command line ----------------------------------------------------------------------------


class Parser(transformers.HfArgumentParser):
    """A parser whose errors are a UserError."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def parse_args(argv: list[str] | None = None) -> Settings:
    """Return the settings of a command line. Method, model and task choose the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    formatter = argparse.RawDescriptionHelpFormatter  # keeps the line breaks of the docstring
    parser = Parser(Settings, description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.usage = "%(prog)s [flags]"  # a list of all of them would hide the description
    words = [word for word in argv if word not in ("-h", "--help")]
    method = parser.parse_known_args(words)[0].method  # first: it sets the default model
    parser.set_defaults(**PRESETS.get(f"--method {method}", {}))
    chosen = parser.parse_known_args(words)[0]
    require(chosen.task in TASKS, f"--task {chosen.task}", f"choose from {', '.join(TASKS)}")
    task = TASKS[chosen.task]
    name = Path(os.path.abspath(chosen.model)).name  # also of `--model .`
    parser.set_defaults(**PRESETS.get(name, {}))
    defaults = {name: value for name, value in task._asdict().items() if hasattr(chosen, name)}
    parser.set_defaults(**defaults)  # the fields of the task that are settings
    for action in parser._actions:
        count = sum(word.split("=")[0] in action.option_strings for word in argv)
        message = "given twice; list all its values after one flag"
        require(count < 2 or action.nargs != "+", action.option_strings[-1], message)
        if "--no-pool-first" in action.option_strings:  # its help would be that of --pool-first
            action.help = argparse.SUPPRESS
        action.option_strings = action.option_strings[-1:]  # --help shows the spelling with "-"
    settings = Settings(**vars(parser.parse_args(argv)))
    for name in ("languages", "train_languages", "realign_languages"):
        setattr(settings, name, list(dict.fromkeys(getattr(settings, name))))
    return settings


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Return 0, 2 for a user's error, or 130 when interrupted."""
    for library in (transformers.utils, huggingface_hub.utils, datasets.utils):
        library.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the terminal may not be able to show a name
            stream.reconfigure(errors="backslashreplace")
    try:
        settings = parse_args(argv)
        if settings.write_links:
            write_links(settings)
        else:
            run(settings)
        return 0
    except (UserError, OSError) as error:  # OSError: a full disk, for example
        if int(os.environ.get("RANK") or 0):  # let the first process print its error first
            time.sleep(3)
        print("alignfreeze:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alignfreeze: interrupted; no record was written", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if dist.is_initialized():  # another process failed, most likely; torchrun ends this one
            time.sleep(5)
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise
        print("alignfreeze: out of memory; lower the batch sizes or lengths", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():  # gloo's threads can crash the interpreter while it ends:
        sys.stdout.flush()  # https://github.com/pytorch/pytorch/pull/179291
        os._exit(code)
    sys.exit(code)
