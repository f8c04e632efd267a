#!/usr/bin/env python3
"""Two methods that carry a task to other languages by aligning hidden states, in one file.

AlignFreeze (Bakos et al., NAACL 2025, https://arxiv.org/abs/2502.12959). A multilingual encoder is
fine-tuned on English and tested in other languages. Before that it is *realigned* on translated
sentences: a contrastive loss pulls words together that a dictionary (or an aligner) links. Some
languages gain, others lose; half of the layers are frozen in this stage, to keep only the gain.

Middle-layer alignment (Liu and Niehues, ACL 2025, https://arxiv.org/abs/2502.14830). A decoder-only
language model learns a task in a few languages, by low-rank adapters. Batches of the task alternate
with batches of translated sentences, which the same contrastive loss pulls together: one vector is
now the mean state of a whole sentence, in a middle layer.

    python alignfreeze.py --model xlm-roberta-base --task udpos --strategy front --seed 31
    python alignfreeze.py --method mid-align --task massive

They differ in what one vector is (a word, a sentence), at which layer, in which schedule, and in
what is frozen. AlignFreeze calls `realign`, then `finetune`; the other `add_lora`, then `finetune`
with schedule `alternate`. These are sections 1 and 2, which sections 3 to 9 serve.
"""

from __future__ import annotations

import argparse
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
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import regex
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as distributed
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# ---- 1. The methods -----------------------------------------------------------------------------

SETTINGS = {  # name: (alignfreeze, mid-align); overridden by MODEL_SETTINGS, and both by flags
    "model": ("distilbert-base-multilingual-cased", "meta-llama/Meta-Llama-3-8B-Instruct"),
    "task": ("udpos", "massive"),
    "strategy": ("front", "full"),  # aligning freezes the lower half / nothing; `baseline`: none is done
    "schedule": ("before", "alternate"),  # align before the task, in turn with it, or `during` it
    "unit": ("word", "sentence"),  # what one vector is
    "layer": (-2, 16),  # index into hidden_states (0: embeddings); layers above it are not aligned
    "temperature": (0.1, 0.1),
    "realign_batch_size": (16, 32),  # sentence pairs
    "realign_max_length": (96, 2048),  # subwords of a sentence, special tokens included
    "lora": (0, 8),  # rank of adapters beside frozen weights (alpha 16, dropout 0.1); 0: none
    "batch_size": (32, 32),  # examples of the task
    "accumulate": (1, 4),  # batches of one update; with `alternate` 4 are task, align, task, align
    "lr": (2e-5, 5e-4),
    "decay": ("linear", "inverse_sqrt"),  # of the learning rate in fine-tuning
    "realign_decay": ("constant", "inverse_sqrt"),  # and in an alignment `before` it
    "warmup": (0.1, 0.03),  # share of the updates in which the rate rises; not for a constant rate
    "clip": (0.0, 1.0),  # largest norm of the gradient; 0: no clipping
    "seed": (31, 1),
}
# Published exceptions; the keys are what follows the last `/` of a model's name.
MODEL_SETTINGS = {"xlm-roberta-base": {"lr": 7.5e-6}, "Qwen2.5-7B-Instruct": {"temperature": 1.5}}


def contrastive_loss(
    vectors: Tensor, queries: Tensor, targets: Tensor, temperature: float = 0.1,
    candidates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Pull every query towards its target, and away from the other candidates; a scalar.

        mean over (q, t) of -log  exp(V_q . V_t / tau) / sum over candidates c of exp(V_q . V_c / tau)

    vectors: (N, d), of words or sentences; V are these at unit length, tau is the temperature.
    queries, targets: (Q,) indices into `vectors`. candidates: (C,) indices; None: all vectors. No
    vector is compared with itself. With words, both linked words are queries, and all words are
    candidates (the "strong" alignment of Wu and Dredze 2020, https://arxiv.org/abs/2010.02537); with
    sentences, the other language's are queries, and the English ones candidates.
    """
    vectors = F.normalize(vectors, dim=-1)
    similarity = vectors[queries] @ vectors.T / temperature  # (Q, N)
    similarity = similarity.scatter(1, queries[:, None], -math.inf)
    if candidates is not None:
        allowed = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        allowed[candidates] = True
        similarity = similarity.masked_fill(~allowed, -math.inf)
    return F.cross_entropy(similarity, targets, reduction="sum") / max(len(queries), 1)  # no links


def freeze(model: nn.Module, spec: str) -> list[str]:
    """Freeze the layers that `spec` names; return the names of the parameters that no longer train.

    This is AlignFreeze. `front` is the lower half of the layers, `back` the rest; `full` and `none`
    freeze nothing (`full`: all is aligned); or a list such as `0-5`, `emb,0-2,11`, `emb,front`. As in
    the authors' code, embeddings train unless `emb` is named. UserError if a spec does not fit.
    """
    layers = transformer_layers(model.base_model)
    parts = [layers[k] for k in frozen_layers(spec, len(layers))]
    if "emb" in spec.split(","):
        parts.append(embeddings(model.base_model))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in parts:
        part.requires_grad_(False)
    return [name for name in trained if not model.get_parameter(name).requires_grad]


@contextmanager
def frozen(model: nn.Module, spec: str) -> Iterator[list[str]]:
    """In here the layers that `spec` names do not train; afterwards they do, after an error too."""
    names = freeze(model, spec)
    try:
        yield names
    finally:
        for name in names:
            model.get_parameter(name).requires_grad = True


class LoraLinear(nn.Module):
    """W x + scale * B A x: W stays, A and B train (Hu et al. 2022, https://arxiv.org/abs/2106.09685)."""

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer, self.scale = base_layer, alpha / rank
        self.dropout = nn.Dropout(dropout)
        with base_layer.weight.device:  # on the GPU, say, if W is there
            self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)  # so that nothing changes at first

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))
        return self.base_layer(x) + (self.scale * self.lora_B(low)).to(x.dtype)


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float) -> list[str]:
    """Freeze what is pretrained, and put adapters beside the linear layers of all blocks. Returns
    the names of what trains: the adapters, and a classifier's head, which is new."""
    pretrained = model.base_model if is_classifier(model) else model
    pretrained.requires_grad_(False)
    for layer in transformer_layers(model.base_model):
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, LoraLinear(module, rank, alpha, dropout))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def hidden_state(encoder: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """`hidden_states[layer]`, (B, T, hidden): k is what enters layer k; -1 is what leaves the last
    layer, -2 what enters it. The pass ends there: no layer above is computed or trained."""
    layers = transformer_layers(encoder)
    depth = len(layers)
    check(-depth - 1 <= layer <= depth, f"layer {layer}", f"hidden states are {-depth - 1} to {depth}")
    layer %= depth + 1
    if layer == depth:
        return encoder(**inputs).last_hidden_state
    with pass_ends_at(layers[layer]) as received:  # a hook keeps its input, then raises, and is caught
        encoder(**inputs)
    return received[0]


class Alignment(NamedTuple):
    """What is one vector, at which layer, with what frozen. Defaults: AlignFreeze, none frozen."""

    frozen: str = "none"  # layers that do not train meanwhile, see `freeze`
    unit: str = "word"
    layer: int = -2
    temperature: float = 0.1
    batch_size: int = 16
    max_length: int = 96
    pool_first: bool = True  # whether the first position, begin-of-text, counts in a mean
    gather: bool = False  # sentences: take candidates from all GPUs; words always do


class Training(NamedTuple):
    """How one stage is trained."""

    lr: float = 2e-5
    decay: str = "constant"
    warmup: float = 0.1
    accumulate: int = 1
    clip: float = 0.0
    precision: str = "fp32"
    seed: int = 31


class Batch(NamedTuple):
    """B sentence pairs as tensors: 2B sentences, in buckets of similar length, to save padding.

    Words: `[CLS] a cat [SEP]` and `[CLS] un chat [SEP]`, one bucket, laid flat: positions 0 to 7.
    Vectors 0 1 2 3 are a, cat, un, chat: places 1 2 5 6. A link cat - chat: queries 1 3, targets 3 1.
    Sentences, B = 2: vectors 0 1 are English, 2 3 their translations: queries 2 3, targets 0 1,
    candidates 0 1; buckets sort by length, and `places` undoes that. Several processes share out
    the sentences; vectors are then numbered through all of them.
    """

    inputs: list[dict[str, Tensor]]  # of each bucket ids and mask, (its sentences, longest T)
    places: Tensor  # (N,) indices into all buckets laid flat: a word's first subword, or a sentence
    queries: Tensor  # (Q,) numbers of vectors: words that have a link, or sentences not in English
    targets: Tensor  # (Q,) their translations
    candidates: Tensor | None  # (C,) the English sentences; None for words: all
    counts: list[int]  # N of every process whose vectors are joined; a single one: no joining
    # What follows is for counting, and for losses of your own.
    sentences: list[int]  # for each row of `inputs`: k for the English side of pair k, else B + k
    cut: list[int]  # for each pair, how many links were lost, as a word lies beyond `max_length`
    pairs: list[Pair]  # what was encoded: language, both sides, their links


def vectors_of(hidden: list[Tensor], batch: Batch, how: Alignment) -> Tensor:
    """(N, hidden): of a word the state of its first subword, of a sentence the mean of its states.
    hidden: of each bucket, (its sentences, T, hidden)."""
    if how.unit == "word":
        return torch.cat([states.flatten(0, 1) for states in hidden])[batch.places]
    means = []
    for states, inputs in zip(hidden, batch.inputs):
        inside = inputs["attention_mask"]
        if not how.pool_first:
            inside = inside * (inside.cumsum(1) > 1)  # drop the first real position
        weights = inside / inside.sum(1, keepdim=True).clamp(min=1)
        means.append((states.float() * weights[:, :, None]).sum(1))
    return torch.cat(means)[batch.places]  # from the order of buckets to that of the vectors


def projection_head(hidden: int, unit: str = "word") -> nn.Module:
    """Maps words to 128 dimensions, to compare them; dropped later. Sentences stay as they are."""
    if unit == "sentence":
        return nn.Identity()
    first, second = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, 128, bias=False)
    return nn.Sequential(first, nn.ReLU(), second)


def alignment_loss(encoder: nn.Module, projection: nn.Module, batch: Batch, how: Alignment) -> Tensor:
    """The loss of one batch of sentence pairs: hidden states of one layer -> vectors -> loss."""
    hidden = hidden_in_buckets(encoder, batch.inputs, how.layer)  # `hidden_state` of each one
    check(hidden[0].requires_grad, "alignment", f"nothing below layer {how.layer} trains; freeze less")
    vectors = projection(vectors_of(hidden, batch, how)).float()  # (N, d)
    vectors = from_all_processes(vectors, batch.counts)  # if `counts` has several
    return contrastive_loss(vectors, batch.queries, batch.targets, how.temperature, batch.candidates)


def realign(
    model: nn.Module, tokenizer, pairs: Iterable[Pair], steps: int, how: Alignment = Alignment(),
    training: Training = Training(),
) -> tuple[dict, dict]:  # fmt: skip
    """Align a model's encoder (`base_model`) in place: `steps` updates, layers of `how.frozen` frozen.
    pairs: a list, gone through repeatedly, or a stream; UserError if it ends early. Returns the
    loss curve, and what was seen of each language."""
    torch.manual_seed(training.seed)
    encoder, seen = model.base_model.train(), {}
    projection = projection_head(encoder.config.hidden_size, how.unit).to(model.device)

    def loss(batch: Batch) -> tuple[str, Tensor]:
        tally(seen, batch)
        return "realign", alignment_loss(encoder, projection, batch, how)

    batches = alignment_batches(tokenizer, pairs, how, model.device)
    with frozen(model, how.frozen) as names:
        stage = f"realign, {len(names)} of its tensors frozen"
        return optimize(stage, [encoder, projection], batches, loss, steps, training), seen


def scheduled(schedule: str, task: Iterator, aligned: Iterator) -> Iterator[tuple]:
    """In order (name of the loss, batch of the task or None, batch of translations or None)."""
    if schedule == "before":  # alignment is over
        aligned = itertools.repeat(None)
    for examples, translations in zip(task, aligned):
        if schedule == "alternate":
            yield "task", examples, None
            yield "align", None, translations
        else:  # before, during
            yield "finetune", examples, translations


def finetune(
    model: nn.Module, tokenizer, features: list[dict], epochs: int,
    training: Training = Training(decay="linear"), *, batch_size: int = 32, schedule: str = "before",
    pairs: Iterable[Pair] | None = None, how: Alignment = Alignment(), stop: Callable | None = None,
) -> tuple[dict, dict]:  # fmt: skip
    """Train a model on a task in place, on the features that the task's `encode` made.

    schedule: `before`, the task alone, in all layers (`realign` came earlier); `during`, each batch with
    one of `pairs`, whose loss weighs 0.1; `alternate`, a batch of the task, then one of `pairs`. The
    loss of pairs does not train the layers of `how.frozen`. stop: see `optimize`.
    """
    projection = projection_head(model.config.hidden_size, how.unit).to(model.device)  # for pairs
    torch.manual_seed(training.seed)  # so that dropout does not depend on what the projection drew
    model.train()
    seen: dict = {}
    weight = 0.1 if schedule == "during" else 1.0

    def loss(batch: tuple) -> tuple[str, Tensor]:
        name, examples, translations = batch
        total = task_loss(model, examples) if examples else 0.0
        if translations:
            tally(seen, translations)
            # Autograd notes in the forward pass what trains; `backward`, after this, obeys it.
            with frozen(model, how.frozen):
                total = total + weight * alignment_loss(model.base_model, projection, translations, how)
        return name, total

    task = task_batches(tokenizer, features, epochs, batch_size, training.seed, model.device)
    aligned = alignment_batches(tokenizer, pairs, how, model.device)  # not begun if `before`
    batches = scheduled(schedule, task, aligned)
    steps = finetune_steps(len(features), epochs, batch_size, schedule, training.accumulate)
    return optimize("fine-tune", [model, projection], batches, loss, steps, training, stop), seen


# ---- 2. Training and testing --------------------------------------------------------------------


def optimize(
    stage: str, modules: list[nn.Module], batches: Iterator, loss: Callable,
    steps: int, training: Training, stop: Callable[[int], bool] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """The training loop: `steps` updates of Adam; {name of a loss: its mean over every 20 batches}.

    loss: of a batch, (name, scalar). Several processes share out every batch and average gradients.
    stop: asked after every update whether to end; must leave the model as it was, in training mode.
    UserError if a loss is not finite (seen every 20 updates and at the end), or batches are too few.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    check(parameters, stage, "nothing trains; freeze fewer layers")
    optimizer = torch.optim.Adam(parameters, training.lr, fused=True)
    rate = transformers.get_scheduler(training.decay, optimizer, warmup_steps(training, steps), steps)
    rank, _ = processes()
    if rank > 0:  # the weights were drawn alike, but dropout is to differ
        torch.manual_seed(training.seed + 1000 * rank)
    bar = by_update(stage, batches, steps, training.accumulate)  # ends after `steps` lists of batches
    losses, start, step = defaultdict(list), time.time(), 0
    for step, group in enumerate(bar, 1):
        for batch in group:
            with autocast(parameters[0].device, training.precision):
                name, value = loss(batch)
            (value / len(group)).backward()
            losses[name].append(value.detach())
        average_gradients(parameters)
        if training.clip:
            nn.utils.clip_grad_norm_(parameters, training.clip)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 20 == 0:  # are they finite? Seldom asked, as reading them waits for the GPU
            means = {key: finite_mean(stage, values[-20:]) for key, values in losses.items()}
            bar.set_postfix(means)
        if stop and stop(step):
            steps = step  # ended on purpose
            break
    check(step == steps, stage, f"the batches end after {step} of {steps} steps; give more pairs")
    return loss_curves(f"{stage}: {step} steps", losses, time.time() - start)


def task_loss(model: nn.Module, batch: TaskBatch) -> Tensor:
    """Mean cross-entropy over a batch's labels: tags, classes, both ends of answers, or tokens."""
    logits, labels = logits_and_labels(model, batch)  # (L, classes), (L,)
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / batch.count  # count: labels of all processes / number of processes


@torch.inference_mode()
def evaluate(
    model: nn.Module, tokenizer, task: Task, examples: list[dict], features: list[dict], *,
    precision: str = "fp32", batch_size: int = 32,
) -> dict[str, float]:  # fmt: skip
    """Scores of a model, {metric: 0 to 1}. `task.encode` made of each example one or more features."""
    model.eval()
    outputs: list = [None] * len(features)  # logits, or a generated text, for each of the features
    order = sorted(range(len(features)), key=lambda k: len(features[k]["input_ids"]))
    for chunk in in_chunks(iter(order), batch_size):
        rows = [features[k] for k in chunk]
        with autocast(model.device, precision):
            if task.new_tokens:  # it generates
                found = generate(model, tokenizer, [row["input_ids"] for row in rows], task.new_tokens)
            else:
                batch = task_batch(rows, tokenizer.pad_token_id, device=model.device)  # one bucket
                found = task_logits(model, batch.inputs[0]).float().cpu().numpy()
                check(not np.isnan(found).any(), "evaluate", "the model's outputs are no numbers")
        for k, output in zip(chunk, found):
            outputs[k] = output
    scores = task.score(examples, features, outputs)
    return {metric: round(value, 6) for metric, value in scores.items()}


# ---- 3. What the methods lean on: layers, processes, batches -------------------------------------

IGNORE = -100  # the label of positions that have none
Links = list[tuple[int, int]]  # (index of a source word, index of a target word)
BUCKETS = {"cpu": 8}  # of similar length, in a batch; on a GPU padding costs less than launches


def frozen_layers(spec: str, depth: int) -> list[int]:
    """The numbers of the layers, of `depth` in all, that a spec names. UserError if there is none."""
    half, numbers = depth // 2, set()
    named = {"front": range(half), "back": range(half, depth), "none": [], "full": [], "emb": []}
    for part in spec.split(","):
        where, span = f"cannot freeze '{part}'", regex.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if span:
            low, high = int(span[1]), int(span[2] or span[1])
            check(low <= high < depth, where, f"the model has layers 0 to {depth - 1}")
            numbers.update(range(low, high + 1))
        else:
            check(part in named, where, "use front, back, or a list such as emb,0-2,11")
            check(half or part not in ("front", "back"), where, f"{depth} layer has no halves")
            numbers.update(named[part])
    return sorted(numbers)


def transformer_layers(encoder: nn.Module) -> nn.ModuleList:
    """The list of transformer layers of an encoder or decoder, found by its structure."""
    depth = getattr(encoder.config, "num_hidden_layers", None)
    for module in encoder.modules():  # from the outside to the inside
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            if len(set(map(type, module))) == 1:
                return module
    raise UserError(f"{type(encoder).__name__} has no list of {depth} layers of its own to freeze")


def embeddings(encoder: nn.Module) -> nn.Module:
    """What turns subword ids into the first layer's input: the part that holds the word embeddings."""
    words, layers = encoder.get_input_embeddings(), transformer_layers(encoder)
    for part in encoder.children():
        if words in part.modules() and layers not in part.modules():
            return part
    return words


@contextmanager
def pass_ends_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """In here a forward pass ends where this module begins; its input is then in the list."""
    found: list[Tensor] = []

    class Reached(Exception): ...

    def stop(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])
        raise Reached

    with suppress(Reached), module.register_forward_pre_hook(stop, with_kwargs=True):
        yield found


def finetune_steps(examples: int, epochs: int, batch_size: int, schedule: str, accumulate: int) -> int:
    """How many updates fine-tuning takes; with `alternate`, batches of sentence pairs count as well."""
    batches = epochs * math.ceil(examples / batch_size)
    if schedule == "alternate":
        batches *= 2
    return math.ceil(batches / accumulate)


def warmup_steps(training: Training, steps: int) -> int:
    """In how many of the updates the rate rises; as the authors of each method round it."""
    share = training.warmup * steps
    if training.decay == "inverse_sqrt":
        return math.ceil(share)
    return int(share + 1e-9)  # as 0.29 * 100 is less than 29


def is_classifier(model: nn.Module) -> bool:
    """Whether a model has the head of a task to classify, and not a language model's."""
    return model.get_output_embeddings() is None


def logits_and_labels(model, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Logits (labels, classes) of a batch, and its labels (labels,), some of them perhaps `IGNORE`."""
    logits, labels = [], []  # of each bucket
    for inputs, wanted in zip(with_embeddings(model, batch.inputs), batch.labels):
        if is_classifier(model):
            logits.append(task_logits(model, inputs).flatten(0, -2))
            labels.append(wanted.flatten())
        else:  # at each position, the label is the token that follows
            logits.append(token_logits(model, inputs, wanted != IGNORE))
            labels.append(wanted[wanted != IGNORE])
    # The classes of an answer's ends are the positions: as many as its bucket is long.
    width = max(rows.shape[-1] for rows in logits)
    logits = [F.pad(rows, (0, width - rows.shape[-1]), value=-math.inf) for rows in logits]
    return torch.cat(logits), torch.cat(labels)


def hidden_in_buckets(encoder, buckets: list[dict], layer: int) -> list[Tensor]:
    """`hidden_state` of each bucket."""
    return [hidden_state(encoder, inputs, layer) for inputs in with_embeddings(encoder, buckets)]


def task_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B, T, labels) for words, (B, labels) for sentences, (B, 2, T) for the two ends of an answer."""
    output = model(**inputs)
    if "logits" in output:
        return output.logits
    ends = torch.stack([output.start_logits, output.end_logits], dim=1)
    return ends.masked_fill(inputs["attention_mask"][:, None] == 0, -math.inf)


def token_logits(model: nn.Module, inputs: dict[str, Tensor], wanted: Tensor) -> Tensor:
    """A language model's logits, (wanted positions, vocabulary): nowhere else, it can be 262,144 words."""
    hidden = model.base_model(**inputs).last_hidden_state
    logits = model.get_output_embeddings()(hidden[wanted])
    cap = getattr(model.config, "final_logit_softcapping", None)  # of Gemma 2
    return cap * torch.tanh(logits / cap) if cap else logits


def generate(model, tokenizer, prompts: list[np.ndarray], new_tokens: int) -> list[str]:
    """What the model writes behind each prompt: the likeliest token, again and again, until it ends."""
    inputs = pad_inputs([ids[::-1].copy() for ids in prompts], tokenizer.pad_token_id, model.device)
    inputs = {name: rows.flip(1) for name, rows in inputs.items()}  # padded on the left
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    model.generation_config.update(**greedy)
    # the last position alone is a view with gaps: a frozen head would be copied for every prompt
    whole = model.get_output_embeddings().register_forward_pre_hook(lambda _, x: (x[0].contiguous(),))
    new_tokens = min(new_tokens, max(1, tokenizer.model_max_length - inputs["input_ids"].shape[1]))
    with whole:
        ids = model.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """In here matrix products are in bfloat16, if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16")


def processes() -> tuple[int, int]:
    """(Number of this process, how many train one model together): torchrun's, else 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(value) -> list:
    """The values that all processes have; the first is that of process 0."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients, summed as one flat vector."""
    if processes()[1] == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients)
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / processes()[1], gradients)


def from_all_processes(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes, (sum of `counts`, d), in their order; gradients flow back to all."""
    if len(counts) == 1:
        return rows
    padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))  # each process sends as many
    parts = distributed.all_gather(padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def say(line: str) -> None:
    """Print a line, once for all processes, so that it reaches a log file at once."""
    if processes()[0] == 0:
        print(line, flush=True)


def progress(items: Iterable, stage: str, total: int | None = None) -> tqdm:
    """A bar for a person who watches, and for a log file nothing."""
    return tqdm(items, stage, total, leave=False, disable=None if processes()[0] == 0 else True)


def prefetched(items: Iterator, count: int = 8) -> Iterator:
    """The same items, up to `count` of them made by a thread beforehand; None is no item."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(count))
        try:
            while (item := coming.popleft().result()) is not None:
                coming.append(pool.submit(next, items, None))
                yield item
        finally:  # after an error or Ctrl-C, wait for one batch, not for all of them
            pool.shutdown(cancel_futures=True)


def by_update(stage: str, batches: Iterator, steps: int, accumulate: int) -> tqdm:
    """A bar over lists of `accumulate` batches, one for each of the steps, made by a thread beforehand."""
    needed = prefetched(itertools.islice(batches, steps * accumulate))
    return progress(in_chunks(needed, accumulate), stage, steps)


def finite_mean(stage: str, losses: list[Tensor]) -> float:
    """The mean of some losses. UserError if it is not finite."""
    value = torch.stack(losses).float().mean().item()
    check(math.isfinite(value), stage, f"the loss is {value}; lower the learning rate")
    return value


def loss_curves(done: str, losses: dict[str, list[Tensor]], seconds: float) -> dict[str, list[float]]:
    """{name of a loss: its mean over every 20 batches and all processes}; says how each one changed."""
    curves, told = {}, []
    for name, values in losses.items():
        means = [finite_mean(done, values[k : k + 20]) for k in range(0, len(values), 20)]
        curves[name] = np.mean(gather_objects(means), axis=0).round(6).tolist()
        first, last = curves[name][0], curves[name][-1]
        told.append(f"{name} loss {first:.3f}" + (f" -> {last:.3f}" if len(means) > 1 else ""))
    say(f"{done}, {', '.join(told)}, {seconds:.1f} s")
    return curves


class Pair(NamedTuple):
    """A sentence pair; for words, both sides are lists of them, and links are one-to-one."""

    language: str  # of the target side; the source side is English
    source: list[str] | str
    target: list[str] | str
    links: Links = ()  # (index in source, index in target)
    skipped: int = 0  # pairs of this language that had no link, passed over since the last one
    reading: int = 1  # 2 when this language's text is being read for the second time, and so on


class TaskBatch(NamedTuple):
    """Examples of a task, or a process's share of them, in buckets of similar length."""

    inputs: list[dict[str, Tensor]]  # of each bucket, what the model reads, (its examples, longest T)
    labels: list[Tensor]  # of each bucket, (its examples, T) or (its examples, labels of an example)
    count: Tensor  # how many labels a process has in the mean over all of them; a scalar


class Window(NamedTuple):
    """A stretch of a tokenised sentence, special tokens included. All arrays are (T,)."""

    sentence: int  # which sentence it comes from
    ids: np.ndarray  # subword ids
    words: np.ndarray  # the index of the word that each subword belongs to, -1 for special tokens
    first: np.ndarray  # whether it is the first visible subword of its word, which represents the word


def alignment_batches(tokenizer, pairs: Iterable[Pair], how: Alignment, device="cpu") -> Iterator[Batch]:
    """One batch of sentence pairs after the other. A list of pairs is gone through again and again."""
    encode = encode_pairs if how.unit == "word" else encode_texts
    buckets = BUCKETS.get(torch.device(device).type, 1)
    pairs = itertools.cycle(pairs) if isinstance(pairs, Sequence) else iter(pairs)
    while len(chunk := list(itertools.islice(pairs, how.batch_size))) == how.batch_size:
        yield encode(tokenizer, chunk, how, buckets, device, processes())


def encode_pairs(tokenizer, pairs: list[Pair], how, buckets=1, device="cpu", process=(0, 1)) -> Batch:
    """Turn pairs of linked words into one batch; sentences are cut off at `how.max_length` subwords.

    process: (k, n) puts only the k-th of n equal shares of the sentences into the batch.
    """
    k, n = process
    sentences = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    windows = encode_words(tokenizer, sentences, how.max_length)
    number: dict[tuple[int, int], int] = {}  # (sentence, word) -> its number among all words
    shares, counts = [], []
    for p in range(n):
        shares.append(in_buckets(windows, buckets, lambda window: len(window.ids), (p, n)))
        for window in itertools.chain(*shares[p]):
            for word in window.words[window.first].tolist():
                number[window.sentence, word] = len(number)
        counts.append(len(number) - sum(counts))
    linked, cut = [], []
    for p, pair in enumerate(pairs):
        before = len(linked)
        for i, j in pair.links:
            source, target = (p, i), (p + len(pairs), j)
            if source in number and target in number:
                linked.append((number[source], number[target]))
        cut.append(len(pair.links) - (len(linked) - before))
    own = shares[k]
    inputs = [pad_inputs([w.ids for w in group], tokenizer.pad_token_id, device) for group in own]
    first = torch.cat([pad([w.first for w in group], False).flatten() for group in own])
    rows = first.nonzero().squeeze(1).to(device)
    order = [window.sentence for window in itertools.chain(*own)]
    source, target = torch.tensor(linked, dtype=torch.long, device=device).reshape(-1, 2).T
    queries, targets = torch.cat([source, target]), torch.cat([target, source])
    return Batch(inputs, rows, queries, targets, None, counts, order, cut, pairs)


def encode_texts(tokenizer, pairs: list[Pair], how, buckets=1, device="cpu", process=(0, 1)) -> Batch:
    """As `encode_pairs`, of plain text without a template. The candidates are the sentences of this
    process, or with `how.gather` of all of them."""
    (k, n), size = process, len(pairs)
    texts = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    own = [*range(k, size, n), *range(size + k, 2 * size, n)]  # sentences; both sides of a pair
    encoded = tokenizer([texts[s] for s in own], truncation=True, max_length=how.max_length)
    ids = {}
    for s, row in zip(own, encoded["input_ids"]):
        ids[s] = np.array(row or [tokenizer.pad_token_id])  # a text may have no subword
    parts = in_buckets(own, buckets, lambda s: len(ids[s]))
    inputs = [pad_inputs([ids[s] for s in part], tokenizer.pad_token_id, device) for part in parts]
    order = list(itertools.chain(*parts))
    rows = torch.tensor(order).argsort().to(device)  # vectors are numbered in the order of `own`
    counts = [2 * len(pairs[p::n]) for p in range(n)] if how.gather else [len(own)]
    halves = [part.chunk(2) for part in torch.arange(sum(counts), device=device).split(counts)]
    english, other = (torch.cat(side) for side in zip(*halves))
    return Batch(inputs, rows, other, english, english, counts, order, [0] * size, pairs)


def encode_words(tokenizer, sentences: list[list[str]], max_length: int, windows=False) -> list[Window]:
    """Tokenise sentences that are lists of words, into at most `max_length` subwords each.

    XLM-R's tokenizer can put a lone `▁` in front of a word (`▁ ，`). The authors delete it, so that the
    first *visible* subword represents the word. With `windows`, what does not fit goes on in further
    windows; without, it is cut off.
    """
    alone = tokenizer(["a"], is_split_into_words=True)  # special tokens such as [CLS] on both sides
    start, _, end = np.split(np.array(alone["input_ids"]), alone.word_to_tokens(0))
    mark = alone.tokens()[len(start)][0]  # of what is in between, perhaps a blank: `▁` or `Ġ`
    blank = tokenizer.convert_tokens_to_ids(mark) if mark in "▁Ġ" else None
    edges, room = (len(start), len(end)), max_length - len(start) - len(end)
    options = {"add_special_tokens": False, "return_attention_mask": False}
    encoded = tokenizer(sentences, is_split_into_words=True, **options)
    result = []
    for k, ids in enumerate(encoded["input_ids"]):
        ids = np.array(ids, dtype=np.int64)
        words = np.array(encoded.word_ids(k), dtype=np.int64)
        lone = (ids == blank) & (words == np.append(words[1:], -1))  # more of its word is behind it
        ids, words = ids[~lone], words[~lone]
        first = np.diff(words, prepend=-1) != 0
        for at in range(0, max(len(ids), 1) if windows else 1, room):
            part = slice(at, at + room)
            inside = np.pad(words[part], edges, constant_values=-1)
            shown = np.pad(first[part], edges)
            result.append(Window(k, np.concatenate([start, ids[part], end]), inside, shown))
    return result


def task_batches(tokenizer, features: list, epochs: int, size: int, seed: int, device) -> Iterator:
    """One batch of `size` examples after the other, which every epoch shuffles anew."""
    order, buckets = random.Random(seed), BUCKETS.get(torch.device(device).type, 1)
    for _ in range(epochs):
        for batch in in_chunks(iter(order.sample(features, len(features))), size):
            yield task_batch(batch, tokenizer.pad_token_id, buckets, device, processes())


def task_batch(batch: list[dict], pad_id: int, buckets=1, device="cpu", process=(0, 1)) -> TaskBatch:
    """Put features into one batch; process: (k, n) takes only the k-th of n equal shares of them."""
    count = sum(int((feature["labels"] != IGNORE).sum()) for feature in batch)
    unlabelled = batch[0] | {"labels": np.full_like(batch[0]["labels"], IGNORE)}
    batch = batch + [unlabelled] * (process[1] - len(batch))  # for processes that get no example
    inputs, labels = [], []
    for group in in_buckets(batch, buckets, lambda row: len(row["input_ids"]), process):
        read = pad_inputs([row["input_ids"] for row in group], pad_id, device)
        if "token_type_ids" in group[0]:
            read["token_type_ids"] = pad([row["token_type_ids"] for row in group], 0).to(device)
        inputs.append(read)
        labels.append(pad([row["labels"] for row in group], IGNORE).to(device))
    return TaskBatch(inputs, labels, torch.tensor(max(1, count) / process[1], device=device))


def pad_inputs(ids: list[np.ndarray], pad_id: int, device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, T), of B tokenised sentences."""
    # The library looks into it, a wait on a GPU; not into a 4-D one, but that ends sliding windows.
    mask = pad([np.ones_like(row) for row in ids], 0)
    return {"input_ids": pad(ids, pad_id).to(device), "attention_mask": mask.to(device)}


def pad(rows: Iterable[np.ndarray], value: int) -> Tensor:
    """Stack (T,) arrays into a (B, longest T) tensor, filled up with `value`."""
    rows = [torch.from_numpy(row) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def with_embeddings(model, buckets: list[dict]) -> Iterator[dict]:
    """`inputs_embeds` for `input_ids`, by one look-up: its gradient is as large as the vocabulary."""
    shapes = [bucket["input_ids"].shape for bucket in buckets]
    ids = torch.cat([bucket["input_ids"].flatten() for bucket in buckets])
    rows = model.get_input_embeddings()(ids).split([shape.numel() for shape in shapes])
    for bucket, shape, vectors in zip(buckets, shapes, rows):
        yield bucket | {"input_ids": None, "inputs_embeds": vectors.view(*shape, -1)}


def in_buckets(items: list, buckets: int, length: Callable, process=(0, 1)) -> list[list]:
    """Split a batch into buckets of equal size and similar length: hardly any padding is computed.
    process: (k, n) takes only the k-th of n equal shares, each with short and long items."""
    own = sorted(items, key=length)[process[0] :: process[1]]
    return list(in_chunks(iter(own), math.ceil(len(own) / buckets)))


def in_chunks(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one of what is left."""
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def tally(seen: dict[str, Counter], batch: Batch) -> None:
    """Count what is in a batch, by language."""
    for pair, cut in zip(batch.pairs, batch.cut):
        counts = seen.setdefault(pair.language, Counter())
        counts.update(sentences=1, words=len(pair.links) - cut, cut=cut, skipped=pair.skipped)
        counts["readings"] = pair.reading  # how often its text was begun


# ---- 4. Text -> linked words ----------------------------------------------------------------------------------------

UNSPACED_LANGUAGES = ("zh", "ja", "th")
UNSPACED = r"(?!\d)[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}ー]"  # a character of their scripts
WORD = regex.compile(r"[\w\p{M}]+|[^\w\p{M}\s]+")  # marks belong to their word, or Hindi falls apart
RUN = regex.compile(rf"(?:{UNSPACED}\p{{M}}*)+|(?:(?!{UNSPACED})[\w\p{{M}}])+|[^\w\p{{M}}\s]+")
LONGEST_WORD = 32  # characters, marks not counted, that longest match looks ahead
OPUS = "Helsinki-NLP/opus-100"
OPUS_LINES = 100_000  # that are read of a language's million; no run of the paper's reads more


def linked_pairs(language: str, link: Callable, text: Callable, seed: int) -> Iterator[Pair]:
    """Endless sentence pairs, of what `linker` returned for the language; words with one-to-one links.

    Each reading of the text is shuffled anew. Words without a link are passed over, and their sentence
    pairs counted. UserError if the whole text has no link.
    """
    skipped = 0
    for reading in itertools.count(1):
        found = False
        for lines in in_chunks(shuffled(text(), f"{seed} {language} {reading}"), 32):
            for pair in link(lines):
                links = one_to_one(pair.links, pair.source, pair.target)
                if links or isinstance(pair.source, str):
                    yield pair._replace(links=links, skipped=skipped, reading=reading)
                    found, skipped = True, 0
                else:
                    skipped += 1
        check(found, f"{SOURCE}-{language}", "no sentence pair of the whole text gets a link")


def one_to_one(links: Links, source: list[str], target: list[str]) -> Links:
    """The links whose two words have no other link; of these, none between identical strings."""
    links = set(links)
    sources = Counter(i for i, _ in links)
    targets = Counter(j for _, j in links)
    return sorted((i, j) for i, j in links if sources[i] == targets[j] == 1 and source[i] != target[j])


def shuffled(items: Iterable, seed: str, size: int = 10_000) -> Iterator:
    """Shuffle a stream through a buffer of `size` items, as the authors do."""
    rng, items = random.Random(seed), iter(items)
    buffer = list(itertools.islice(items, size))
    for item in items:
        k = rng.randrange(size)
        yield buffer[k]
        buffer[k] = item
    rng.shuffle(buffer)
    yield from buffer


def split_words(text: str, lang: str, vocabulary: Collection[str] = ()) -> list[str]:
    """Split into runs of word characters (letters, digits, marks), and of other visible characters.

    Chinese, Japanese and Thai write no spaces: they are cut by greedy longest match against
    `vocabulary` (a set or dict), else character by character; a mark stays with its character.
    """
    if lang not in UNSPACED_LANGUAGES:
        return WORD.findall(text)
    words = []
    for run in RUN.findall(text):
        rest = regex.findall(r".\p{M}*", run) if regex.match(UNSPACED, run) else [run]
        while rest:
            size = min(len(rest), LONGEST_WORD)
            while size > 1 and "".join(rest[:size]) not in vocabulary:
                size -= 1
            words.append("".join(rest[:size]))
            del rest[:size]
    return words


def parallel_text(language: str, data_dir: Path | None, part="train") -> Iterator[tuple[str, str]]:
    """(English, translation) of each line of `parallel/en-XX.tsv` in --data-dir, or of OPUS-100. The
    part `dev`, for the probe, is `parallel/en-XX.dev.tsv`, or the validation split."""
    if not data_dir:
        yield from streamed_text(language, "validation" if part == "dev" else "train")
        return
    path = data_dir / "parallel" / Path(links_file(language, part)).with_suffix(".tsv")
    for number, line in read_lines(path):
        sides = tuple(line.split("\t"))
        found = f"found {len(sides) - 1} tabs"
        check(len(sides) == 2, f"{path}:{number}", f"expected 'English TAB translation', {found}")
        yield sides


def streamed_text(language: str, split: str, block: int = 10_000) -> Iterator[tuple[str, str]]:
    """The first lines of OPUS-100, downloaded as they are read, in blocks that stay on disk."""
    config = "-".join(sorted((SOURCE, language)))
    where, stream = f"{OPUS} {config}", None
    for start in range(0, OPUS_LINES, block):
        path = CACHE / "opus-100" / config / f"{split}-{start}.json"
        if path.exists():
            stream = None  # it is not at the next block
        else:
            with as_user_error(f"cannot read {where}; {NO_NETWORK}"):
                if stream is None:
                    rows = datasets.load_dataset(OPUS, config, split=split, streaming=True)
                    stream = iter(rows.skip(start))
                text = []
                for row in itertools.islice(stream, block):
                    (sides,) = typed_columns(where, row, translation=dict)
                    text.append(typed_columns(where, sides, **{SOURCE: str, language: str}))
            write_whole(path, json.dumps(text, ensure_ascii=False).encode())
        text = json.loads(path.read_bytes())
        yield from map(tuple, text)
        if len(text) < block:
            return


# ---- 5. Word aligners -----------------------------------------------------------------------------------------------

Dictionary = dict[str, set[str]]  # word -> its translations
Words = tuple[list[str], list[str]]  # source words, target words of a sentence pair
ALIGNERS = ("dictionary", "fastalign", "awesome")
MUSE_URL = "https://dl.fbaipublicfiles.com/arrival/dictionaries/{}-{}.txt"
NULL_PROBABILITY = 0.08  # prior probability that a word translates nothing
DIRICHLET_ALPHA = 0.01  # sparse prior on the translation probabilities (fast_align -v)
FIRST_TENSION = 4.0  # how strongly links are drawn to the diagonal, before that is fitted (-d -o)
PHARAOH = regex.compile(r"(\d{1,9}-\d{1,9}(\s+|$))*")
EM_ITERATIONS = 5  # four that train, and one that reads off the links


def linker(
    language: str, aligner: str, data_dir: Path | None = None, *, limit: int | None = None, part: str = "train",
    awesome: Callable | None = None,
) -> tuple[Callable[[list], list[Pair]], Callable[[], Iterator]]:  # fmt: skip
    """(`link`, which splits lines into words and links these; `text`, which gives all the lines).

    aligner: `dictionary`; `awesome`, with the function that links pairs of word lists; `fastalign`,
    which learns from the whole text now; a folder of Pharaoh files; or `none`, for whole sentences.
    Local text is read to its end here, so that what is malformed is found before training.
    """
    forward, backward = {}, {}
    if aligner == "dictionary" or (language in UNSPACED_LANGUAGES and aligner != "none"):
        forward, backward = read_dictionary(language, data_dir)
    stored: Iterable[Links | None] = itertools.repeat(None)  # of each line, where known beforehand

    def lines(part: str) -> Iterator[tuple[str, str]]:
        return itertools.islice(parallel_text(language, data_dir, part), limit)

    def words(line: tuple[str, str]) -> Words:
        return split_words(line[0], SOURCE), split_words(line[1], language, backward)

    def link(chunk: list[tuple[Links | None, tuple[str, str]]]) -> list[Pair]:
        if aligner == "none":
            return [Pair(language, *line) for _, line in chunk]
        links, pairs = [known for known, _ in chunk], [words(line) for _, line in chunk]
        if aligner == "dictionary":
            links = [dictionary_links(*pair, forward, backward) for pair in pairs]
        if aligner == "awesome":
            links = awesome(pairs)
        return [Pair(language, *pair, found) for pair, found in zip(pairs, links)]

    if aligner == "fastalign":
        learnt = map(words, itertools.chain(lines(part), lines("train") if part == "dev" else []))
        stored = fast_align(tuple([word.lower() for word in side] for side in pair) for pair in learnt)
    elif aligner not in (*ALIGNERS, "none"):
        path = Path(aligner) / links_file(language, part)
        stored = read_pharaoh(path, map(words, lines(part)), bool(data_dir), limit)
    elif data_dir:
        deque(lines(part), maxlen=0)  # read to the end: what is malformed is found before training
    return link, lambda: zip(stored, lines(part))


def dictionary_links(source: list, target: list, forward: Dictionary, backward: Dictionary) -> Links:
    """Link words by a bilingual dictionary, only where nothing is ambiguous (Gaschi et al. 2023).

    (i, j) is a link if `j` is the only place in the target sentence of a translation of `source[i]`
    (`forward`), and `i` the only place in the source sentence of one of `target[j]` (`backward`).
    """
    links = []
    for i, word in enumerate(source):
        translations = forward.get(word, ())
        found = [j for j, other in enumerate(target) if other in translations]
        if len(found) == 1:
            back = backward.get(target[found[0]], ())
            if [k for k, other in enumerate(source) if other in back] == [i]:
                links.append((i, found[0]))
    return links


def read_dictionary(language: str, data_dir: Path | None) -> tuple[Dictionary, Dictionary]:
    """A MUSE dictionary, English to `language`, and turned round. UserError for what is no entry."""
    name, skipped = f"{SOURCE}-{language}.txt", 0
    path = data_dir / "dictionary" / name if data_dir else fetch(MUSE_URL.format(SOURCE, language))
    forward, backward = defaultdict(set), defaultdict(set)
    for number, line in read_lines(path):
        words = line.split()
        if len(words) == 2:
            forward[words[0]].add(words[1])
            backward[words[1]].add(words[0])
        elif data_dir:
            raise UserError(f"{path}:{number}: expected 'word translation', found {len(words)} words")
        else:
            skipped += 1
    if skipped:
        say(f"dictionary {name}: {skipped} lines without exactly two words are skipped")
    return forward, backward


def fast_align(pairs: Iterable[Words]) -> list[Links]:
    """Sorted links (source index, target index) of each sentence pair; none if a side is empty.

    Reparameterised IBM model 2 (Dyer, Chahuneau and Smith, NAACL 2013), as `fast_align -d -o -v`,
    then again with `-r`, then `atools -c grow-diag-final-and`.
    """
    ids = defaultdict(itertools.count().__next__)  # a new word gets the next id; the NULL word has 0
    codes = []  # of each pair, (n + 1, m + 1): the ids of a source and a target word in one integer
    for source, target in pairs:
        if not source or not target:
            source = target = []
        rows = np.array([ids[word] for word in (None, *source)])
        codes.append(rows[:, None] << 32 | [ids[word] for word in (None, *target)])
    if len(ids) < 2:  # no words at all
        return [[] for _ in codes]
    shapes = [code.shape for code in codes]
    codes = np.concatenate(codes, axis=None)
    places, table = pd.factorize(codes)  # where in the t-table, and what stands there
    ends = np.cumsum([n * m for n, m in shapes])
    parts = np.split(places.astype(np.int32), ends[:-1])
    grids = [part.reshape(shape) for part, shape in zip(parts, shapes)]
    words = table >> 32, table & (2**32 - 1)
    forward = train_and_link([grid[:, 1:] for grid in grids], *words)
    reverse = train_and_link([grid.T[:, 1:] for grid in grids], *words[::-1])
    return [grow_diag_final_and(*both) for both in zip(forward, reverse)]


def train_and_link(grids: list, source_word: np.ndarray, target_word: np.ndarray) -> list[list[int]]:
    """Fit p(target | source) by EM; which source word explains each target word of a pair, -1: NULL.

    grids: of each pair, (n + 1, m) places in the t-table, with the ids of the words at each place.
    """
    tension, t_table = FIRST_TENSION, np.ones(len(source_word))
    shapes = Counter(grid.shape for grid in grids)
    far = {}  # |i/n - j/m|, of i = 1 .. n and j = 0 .. m: how far from the diagonal; (n, m + 1)
    for shape in shapes:
        n, m = shape[0] - 1, shape[1]
        far[shape] = np.abs(np.arange(1, n + 1)[:, None] / n - np.arange(m + 1) / max(m, 1))
    for iteration in range(EM_ITERATIONS):
        priors = {}  # that a target word comes from NULL, or from a source position; (n + 1, m)
        for shape in shapes:
            near = np.exp(-tension * far[shape][:, 1:])
            null = np.full(shape[1], NULL_PROBABILITY)
            priors[shape] = np.vstack([null, near * ((1 - NULL_PROBABILITY) / near.sum(0))])
        joint = (t_table[grid] * priors[grid.shape] for grid in grids)
        if iteration == EM_ITERATIONS - 1:
            return [(scores.argmax(0) - 1).tolist() for scores in joint]
        counts, observed = np.zeros(len(source_word)), 0.0
        for grid, posterior in zip(grids, joint):
            posterior /= posterior.sum(0)
            np.add.at(counts, grid.ravel(), posterior.ravel())
            # Like fast_align we count target positions from 0 here, from 1 elsewhere.
            observed += np.vdot(posterior[1:], far[grid.shape][:, :-1])
        if iteration > 0:
            tension = fit_tension(shapes, far, observed, tension)
        counts += DIRICHLET_ALPHA  # then variational Bayes: exp(digamma(count) - digamma(total))
        counts[target_word == 0] = 0.0  # NULL explains words but is never explained
        totals = torch.from_numpy(np.bincount(source_word, counts)).digamma().numpy()
        t_table = np.exp(torch.from_numpy(counts).digamma().numpy() - totals[source_word])


def fit_tension(shapes: Counter, far: dict, observed: float, tension: float) -> float:
    """Eight gradient steps towards the tension that makes the prior expect the observed distance."""
    words = sum(count * m for (_, m), count in shapes.items())
    for _ in range(8):
        expected = 0.0
        for shape, count in shapes.items():
            distances = far[shape][:, 1:]
            weighted = (np.exp(-tension * distances) * distances).sum(0)
            normaliser = exchanged_normaliser(shape[0] - 1, shape[1], tension)
            expected += count * (weighted / normaliser).sum()
        tension = min(max(tension + 20 * (expected - observed) / words, 0.1), 14.0)
    return tension


def exchanged_normaliser(n: int, m: int, tension: float) -> np.ndarray:
    """The Z that fast_align has in the derivative of log Z, (m,): n and m are exchanged, by a slip."""
    i = np.arange(1, m + 1)
    floor = i * m // n
    ratio = math.exp(-tension / max(m, 1))
    top = (m - floor) % 2**32  # a second slip: negative beyond the diagonal, but unsigned there
    above = np.exp(-tension * np.abs((floor + 1) / m - i / n)) * (1 - ratio**top)
    below = np.exp(-tension * np.abs(floor / m - i / n)) * (1 - ratio**floor)
    return (above + below) / (1 - ratio)


def grow_diag_final_and(forward: list[int], reverse: list[int]) -> Links:
    """Merge both directions' links of a sentence pair (Koehn, Och and Marcu 2003); sorted.

    Keep what both found; add, again and again, neighbours (8 directions) of kept links if one of the
    words is still unlinked; then forward, then reverse links between two unlinked words.
    """
    forward = {(i, j) for j, i in enumerate(forward) if i >= 0}
    reverse = {(i, j) for i, j in enumerate(reverse) if j >= 0}
    kept = forward & reverse
    sources, targets = {i for i, _ in kept}, {j for _, j in kept}
    for candidates, fewest in ((forward | reverse, 1), (forward, 2), (reverse, 2)):
        before = -1
        while before < len(kept):
            before = len(kept)
            for i, j in sorted(candidates - kept):
                unlinked = (i not in sources) + (j not in targets)
                near = any((i + a, j + b) in kept for a in (-1, 0, 1) for b in (-1, 0, 1))
                if unlinked >= fewest and (near or fewest == 2):
                    kept.add((i, j))
                    sources.add(i)
                    targets.add(j)
    return sorted(kept)


@torch.inference_mode()
def awesome_links(
    encoder: nn.Module, tokenizer, pairs: list[Words], layer: int = 8, threshold: float = 1e-3
) -> list[Links]:
    """Links of pairs of word lists by an encoder (Dou and Neubig 2021, arXiv 2101.08231).

    Two subwords are linked where the softmax of their dot product at `layer` exceeds `threshold` both
    over the source's subwords and over the target's; two words where any of their subwords are.
    """
    links: list[Links] = [[] for _ in pairs]
    if not pairs:
        return links
    sentences = [source for source, _ in pairs] + [target for _, target in pairs]
    windows = encode_words(tokenizer, sentences, tokenizer.model_max_length)
    hidden: list = [None] * len(windows)  # of each sentence, without padding: (T, hidden)
    for group in in_buckets(windows, math.ceil(len(windows) / 16), lambda window: len(window.ids)):
        inputs = pad_inputs([window.ids for window in group], tokenizer.pad_token_id, encoder.device)
        for window, states in zip(group, hidden_state(encoder, inputs, layer).float()):
            hidden[window.sentence] = states[: len(window.ids)]
    source, target = nn.utils.rnn.pad_sequence(hidden, batch_first=True).chunk(2)  # (B, T, hidden)
    source_word, target_word = pad([window.words for window in windows], -1).chunk(2)  # (B, T)
    outside = (source_word < 0)[:, :, None] | (target_word < 0)[:, None]  # padding, special tokens
    similarity = (source @ target.mT).masked_fill(outside.to(source.device), -math.inf)  # (B, T, T)
    linked = (similarity.softmax(1) > threshold) & (similarity.softmax(2) > threshold)
    pair, s, t = linked.nonzero().cpu().T
    found = torch.stack([pair, source_word[pair, s], target_word[pair, t]], dim=1).unique(dim=0)
    for k, i, j in found.tolist():
        links[k].append((i, j))
    return links


def links_file(language: str, part: str = "train") -> str:
    """The name of a language's file in a folder of links."""
    return f"{SOURCE}-{language}{'.dev' if part == 'dev' else ''}.txt"


def read_pharaoh(path: Path, pairs: Iterator[Words], whole: bool, limit: int | None) -> list[Links]:
    """The links of each line, `0-0 1-2 ...`, English first. UserError if they do not fit the pairs."""
    links = []
    for number, line in itertools.islice(read_lines(path), limit):
        where, words = f"{path}:{number}", next(pairs, None)
        fine = PHARAOH.fullmatch(line.strip())
        check(fine, where, f"expected links such as '0-0 1-2', found {line[:60]!r}")
        check(words, where, f"the text has {number - 1} sentence pairs; are the links of another?")
        links.append([tuple(map(int, link.split("-"))) for link in line.split()])
        n, m = map(len, words)
        inside = all(i < n and j < m for i, j in links[-1])
        check(inside, where, f"a link points outside {n} and {m} words")
    ended = not whole or next(pairs, None) is None  # whole: all pairs must have a line
    check(ended, path, f"{len(links)} lines of links, but the text goes on; align all of it")
    return links


# ---- 6. Tasks: a new one is three functions here and a row in TASKS -------------------------------------------------
# load(language, split, args) -> examples, a list or an iterator of dicts
# encode(tokenizer, examples, max_length, training) -> features, dicts: arrays `input_ids` and
#     `labels`, the index of the `example` that they come from, and whether that is `cut`
# score(examples, features, outputs) -> {metric: value}, the main metric first; outputs: logits of
#     each feature, or the text that was generated for each example

TREEBANKS = {  # language: UD treebank; English to train on, the other 34 to test (and realign) on
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


def load_udpos(language: str, split: str, args) -> list[dict]:
    """Sentences of a UD treebank, from CoNLL-U (https://universaldependencies.org/format).

    As in the authors' code, a multi-word range (`3-4 du _`) is a token of its own with tag `_`, 18
    tags in all; --syntactic-words leaves it out, and 17 remain. Empty nodes (`8.1`) are no tokens.
    """
    if args.data_dir:
        path = args.data_dir / "udpos" / language / f"{split}.conllu"
    else:
        treebank = TREEBANKS[language]
        path = fetch(UD_URL.format(treebank, language, treebank.split("-")[1].lower(), split))
    examples = [{"tokens": [], "tags": []}]
    known = f"expected CoNLL-U: ID, FORM, LEMMA, UPOS ({' '.join(UPOS)}) and 6 more columns"
    for number, line in read_lines(path):
        if not line.strip():
            examples.append({"tokens": [], "tags": []})
        elif not line.startswith("#"):
            fields = line.split("\t")
            fine = len(fields) == 10 and re.fullmatch(r"\d+([-.]\d+)?", fields[0]) and fields[1]
            check(fine and fields[3] in UPOS, f"{path}:{number}", f"{known}; found {line[:40]!r}")
            token, word, _, tag = fields[:4]
            if "." not in token and not ("-" in token and args.syntactic_words):
                examples[-1]["tokens"].append(word)
                examples[-1]["tags"].append(UPOS.index(tag))
    examples = [example for example in examples if example["tokens"]]
    check(examples, path, "no sentence in this file")
    return examples


def load_wikiann(language: str, split: str, args) -> Iterator[dict]:
    """Sentences of WikiANN (https://huggingface.co/datasets/unimelb-nlp/wikiann)."""
    hub = {"path": "unimelb-nlp/wikiann", "name": language, "split": split}
    for where, row in read_rows(args, language, split, hub):
        yield tagged_words(where, row)


def tagged_words(where: str, row: dict) -> dict[str, list]:
    """`tokens`, and numbers as `tags`, of a row with names in `tags` or numbers in `ner_tags`."""
    column, known = ("tags", NER_TAGS) if "tags" in row else ("ner_tags", [*range(len(NER_TAGS))])
    tokens, tags = typed_columns(where, row, tokens=list, **{column: list})
    fine = len(tokens) == len(tags) and {str} == set(map(type, tokens))
    fine = fine and all(type(tag) is type(known[0]) and tag in known for tag in tags)
    check(fine, where, f"expected words, each with one of {column} {known}; found {str(tags)[:60]}")
    return {"tokens": tokens, "tags": [known.index(tag) for tag in tags]}


def encode_tokens(tokenizer, examples: list, max_length: int, training: bool) -> Iterator[dict]:
    """A word's first visible subword carries its tag; long sentences go on in more windows."""
    sentences, seen = [example["tokens"] for example in examples], Counter()
    windows = encode_words(tokenizer, sentences, max_length, windows=True)
    for window in windows:
        seen[window.sentence] += window.first.sum()
    for window in windows:
        tags = np.array(examples[window.sentence]["tags"])
        labels = np.where(window.first, tags[window.words], IGNORE)
        cut = seen[window.sentence] < len(tags)  # a word of invisible characters has no subword
        yield {"example": window.sentence, "input_ids": window.ids, "labels": labels, "cut": cut}


def score_accuracy(examples: list, features: list[dict], logits: list) -> dict[str, float]:
    """The share of labels that are predicted: of words (PoS), or of sentence pairs (NLI)."""
    labels = np.concatenate([feature["labels"] for feature in features])
    predictions = np.concatenate([*map(predicted_labels, features, logits)])
    return {"accuracy": float((predictions == labels)[labels != IGNORE].mean())}


def predicted_labels(feature: dict, logits: np.ndarray) -> np.ndarray:
    """(T,) or (1,), as the labels. logits: (T or longer, labels) or (labels,)."""
    return logits.argmax(-1).reshape(-1)[: len(feature["labels"])]


def entities(tags: np.ndarray, repair: bool = False) -> set[tuple[int, int, int]]:
    """(first word, last word, type) of the entities in tags: 0 is O, 2k - 1 B and 2k I of type k.

    An I that follows no entity begins one; so does an I of another type, as in conlleval, or else,
    with `repair`, as the authors do to predictions, it changes the type of what it goes on with.
    """
    kind = (tags + 1) // 2
    before = np.append(0, kind[:-1])
    start = (tags % 2 == 1) | ((tags > 0) & ((before == 0) if repair else (before != kind)))
    end = (kind > 0) & np.append(start[1:] | (kind[1:] == 0), True)
    return set(zip(np.flatnonzero(start), np.flatnonzero(end), kind[end]))


def f1(gold: Iterable, predicted: Iterable) -> float:
    """Twice as many as both hold, over how many each holds; 0 if there are none at all."""
    gold, predicted = Counter(gold), Counter(predicted)
    return 2 * (gold & predicted).total() / max(gold.total() + predicted.total(), 1)


def score_entities(examples: list, features: list[dict], logits: list) -> dict[str, float]:
    """F1 of whole entities, over all sentences together (https://aclanthology.org/W03-0419)."""
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


def load_xnli(language: str, split: str, args) -> Iterator[dict]:
    """Sentence pairs of XNLI (https://aclanthology.org/D18-1269); to train, MultiNLI."""
    hub = {"path": "facebook/xnli", "name": language, "split": split}
    known = "0 (entailment), 1 (neutral) or 2 (contradiction)"
    for where, row in read_rows(args, language, split, hub, premise=str, hypothesis=str, label=int):
        check(row["label"] in range(3), where, f"label {row['label']}; expected {known}")
        yield row


def encode_sentences(tokenizer, examples: list, max_length: int, training: bool) -> Iterator[dict]:
    """Sentence pairs in one input; the longer one is cut off until both fit."""
    limit = 50 * max_length  # characters; what is cut off both sides takes memory quadratically
    texts = [[example[side][:limit] for example in examples] for side in ("premise", "hypothesis")]
    options = {"truncation": "longest_first", "return_attention_mask": False}
    encoded = tokenizer(*texts, max_length=max_length, **options)
    for k, example in enumerate(examples):
        feature = {name: np.array(encoded[name][k]) for name in encoded}
        cut = bool(encoded.encodings[k].overflowing)
        yield feature | {"example": k, "labels": np.array([example["label"]]), "cut": cut}


def load_xquad(language: str, split: str, args) -> Iterator[dict]:
    """Questions of XQuAD (https://huggingface.co/datasets/google/xquad); to train, SQuAD."""
    hub = {"path": "google/xquad", "name": f"xquad.{language}", "split": "validation"}
    if split == "train":
        hub = {"path": "rajpurkar/squad", "name": "plain_text", "split": split}
    for where, row in read_rows(args, language, split, hub, question=str, context=str, answers=dict):
        texts, starts = typed_columns(where, row.pop("answers"), text=list, answer_start=list)
        fine = len(texts) == len(starts) > 0
        for text, start in zip(texts, starts):
            typed = type(text) is str and type(start) is int and text and start >= 0
            fine = fine and typed and row["context"].startswith(text, start)
        check(fine, where, f"answers {str(texts)[:60]} not in the context at {str(starts)[:30]}")
        yield row | {"language": language, "texts": texts, "starts": starts}


def encode_questions(tokenizer, examples: list, max_length: int, training: bool) -> list[dict]:
    """A question, cut off at half of `max_length`, with every window of its context.

    labels: the first answer's first and last subword; 0 and 0 where a window does not hold all of it.
    offsets: (T, 2), where in the context every subword begins and ends, or -1 and -1.
    """
    questions, beyond = [example["question"] for example in examples], []
    options = {"truncation": True, "max_length": max_length // 2, "add_special_tokens": False}
    for k, question in enumerate(tokenizer(questions, **options).encodings):
        beyond.append(bool(question.overflowing))
        if question.overflowing:
            questions[k] = questions[k][: question.overflowing[0].offsets[0][0]]
    stride = min(TRAIN_STRIDE if training else TEST_STRIDE, max_length // 2 - 8)
    encoded = tokenizer(
        questions, [example["context"] for example in examples], truncation="only_second",
        max_length=max_length, stride=stride, return_overflowing_tokens=True, return_attention_mask=False,
    )  # fmt: skip
    features = []
    for k, number in enumerate(encoded.pop("overflow_to_sample_mapping")):
        in_context = np.array(encoded.sequence_ids(k)) == 1
        offsets = np.where(in_context[:, None], encoded.encodings[k].offsets, -1).astype(np.int32)
        start = examples[number]["starts"][0]
        end = start + len(examples[number]["texts"][0])
        answer = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))  # its subwords
        whole = len(answer) and offsets[answer[0], 0] <= start and end <= offsets[answer[-1], 1]
        labels = answer[[0, -1]] if whole else np.array([0, 0])
        feature = {name: np.array(encoded[name][k]) for name in encoded}
        features.append(feature | {"example": number, "labels": labels, "offsets": offsets})
    answered = {feature["example"] for feature in features if feature["labels"].any()}
    for feature in features:
        number = feature["example"]
        feature["cut"] = beyond[number] or (training and number not in answered)
    return features


def normalise_answer(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles, as in SQuAD's evaluation."""
    text = re.sub(r"[!-/:-@[-`{-~]", "", text.lower())  # ASCII that is no letter and no digit
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def compare_answers(prediction: str, references: list[str], language: str) -> dict[str, float]:
    """F1 of words and exact match: official (SQuAD, the best of all references), and the authors'.

    Theirs: the first reference only; words in common as sets, but precision and recall of lists;
    2PR / max(1, P + R); exact match of raw strings except in English.
    """
    words = normalise_answer(prediction)
    known = [normalise_answer(reference) for reference in references]
    same = len(set(words) & set(known[0]))
    precision, recall = same / max(len(words), 1), same / max(len(known[0]), 1)
    authors = 2 * precision * recall / max(1, precision + recall) if words or known[0] else 1.0
    raw = float(words == known[0] if language == SOURCE else prediction == references[0])
    best = max(f1(words, reference) for reference in known)
    return {"f1": best, "em": float(words in known), "f1_authors": authors, "em_authors": raw}


def score_answers(examples: list, features: list[dict], logits: list) -> dict[str, float]:
    """The answer of the highest product of its ends' probabilities in any window, against the gold.

    Softmax over a window's context and its first place (no answer), as in transformers' pipeline.
    """
    best = [(-math.inf, "")] * len(examples)
    for feature, ends in zip(features, logits):  # ends: (2, T or longer)
        offsets, number = feature["offsets"], feature["example"]
        in_context = offsets[:, 0] >= 0
        place = np.arange(len(offsets))
        ends = np.where(in_context | (place == 0), ends[:, : len(offsets)], -math.inf)
        start, end = ends - np.logaddexp.reduce(ends, axis=1, keepdims=True)
        length = place - place[:, None] + 1  # of the answer from start to end, (T, T)
        allowed = (length > 0) & (length <= ANSWER_LENGTH) & in_context & in_context[:, None]
        score = np.where(allowed, start[:, None] + end, -math.inf)
        first, last = divmod(score.argmax(), len(offsets))
        answer = examples[number]["context"][offsets[first, 0] : offsets[last, 1]].strip()
        best[number] = max(best[number], (float(score[first, last]), answer))
    scores = []
    for example, (_, answer) in zip(examples, best):
        scores.append(compare_answers(answer, example["texts"], example["language"]))
    return {metric: sum(score[metric] for score in scores) / len(scores) for metric in scores[0]}


# Tasks that generate: examples hold `system` (an instruction), `user` and `target` (the answer).

LOCALES = """af-ZA ar-SA az-AZ bn-BD cy-GB da-DK de-DE el-GR en-US es-ES fa-IR fi-FI fr-FR he-IL
hi-IN hu-HU hy-AM id-ID it-IT ja-JP jv-ID ka-GE ko-KR lv-LV nl-NL pl-PL pt-PT ru-RU sw-KE th-TH
tr-TR zh-CN""".split()
UNER = "da_ddt en_ewt hr_set pt_bosque sk_snk sr_set sv_talbanken zh_gsd".split()  # treebanks
NAMES = {
    "cs": "Czech", "de": "German", "en": "English", "he": "Hebrew", "is": "Icelandic",
    "ja": "Japanese", "ru": "Russian", "uk": "Ukrainian", "zh": "Chinese",
}  # fmt: skip
CHARACTERS = ("ja", "zh")  # languages whose slots are counted in characters
BLEU_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab"}  # 13a for others; the authors take it for all
ASK_SLOTS = """List what the command mentions as `type: value`, in the command's own words and order,
separated by `; `. Answer None if it mentions nothing."""
ASK_NAMES = """Find the persons (PER), organisations (ORG) and places (LOC) that the text names.
Answer in JSON: {"Results": [{"TypeName": type, "Text": name}]}"""
PLAIN = "{{ messages[0].content }}\n\nInput: {{ messages[1].content }}\nOutput:"  # a template
ASK_TRANSLATION = "Translate the text from {} into {}. Answer with the translation alone."


def load_slots(language: str, split: str, args) -> Iterator[dict]:
    """Commands with slots, of MASSIVE (https://arxiv.org/abs/2204.08582) or xSID, or texts with
    names, of Universal NER (https://arxiv.org/abs/2311.09122). Where a language has no file to
    train on, it is trained on that for validation.
    """
    task, hub = args.task, {}
    if args.data_dir:
        validation = "dev" if task == "uner" else "valid"
        if split == "train" and not (args.data_dir / task / language / "train.jsonl").exists():
            say(f"{task} {language}: no train.jsonl, {validation}.jsonl is taken instead")
            split = "valid"
        split = split.replace("valid", validation)
    else:
        sets = {"massive": LOCALES, "uner": UNER}.get(task, [])
        name = {name[:2]: name for name in sets}.get(language)
        check(name, f"{task} {language}", f"the hub has {' '.join(sets) or 'none'}; use --data-dir")
        part = split.replace("valid", "validation")
        hub = {"path": "BramVanroy/universal_ner", "name": name, "split": part}
        if task == "massive":  # the hub's conversion; it also has a script
            hub = {"path": "AmazonScience/massive", "revision": "refs/convert/parquet"}
            hub |= {"data_files": {part: f"{name}/{part}/0000.parquet"}, "split": part}
    for where, row in read_rows(args, language, split, hub):
        text, slots = read_slots(where, row, language)
        example = {"language": language, "system": ASK_SLOTS, "text": text, "user": text, "slots": slots}
        example["target"] = "; ".join(f"{slot['type']}: {slot['value']}" for slot in slots) or "None"
        if task == "uner":
            results = [{"TypeName": slot["type"], "Text": slot["value"]} for slot in slots]
            example["system"] = ASK_NAMES
            example["target"] = json.dumps({"Results": results}, ensure_ascii=False)
        if split != "train":
            tag_slots(example, where)  # raises an error for what could not be scored
        yield example


def read_slots(where: str, row: dict, language: str) -> tuple[str, list[dict]]:
    """Text and slots of a row: `text` and `slots` or `entities`, `tokens` and tags, `annot_utt`."""
    pairs = []
    if "annot_utt" in row:  # `wake me at [time : five am]`
        slot = r"\[([^][:]+) : ([^][]*)\]"
        (said,) = typed_columns(where, row, annot_utt=str)
        text = re.sub(slot, r"\2", said)
        pairs = [(kind.strip(), value.strip()) for kind, value in re.findall(slot, said)]
    elif "tokens" in row and "slots" not in row:
        tokens, tags = tagged_words(where, row).values()
        space = "" if language in CHARACTERS else " "
        text = space.join(tokens)
        for first, last, kind in sorted(entities(np.array(tags))):
            name = NER_TAGS[2 * kind].removeprefix("I-")
            pairs.append((name, space.join(tokens[first : last + 1])))
    else:
        column = "entities" if "entities" in row else "slots"
        text, slots = typed_columns(where, row, text=str, **{column: list})
        pairs = [typed_columns(where, slot, type=str, value=str) for slot in slots]
    return text, [{"type": kind, "value": value} for kind, value in pairs]


def load_translation(language: str, split: str, args) -> Iterator[dict]:
    """`en-de`: English into German. ALMA (https://arxiv.org/abs/2309.11674); to test, WMT23.

    Where a direction has no data of its own, those of the other one are turned round.
    """
    source, _, target = language.partition("-")
    check(target, "--task translation", f"'{language}' is no direction such as en-de")
    back, pairs = f"{target}-{source}", []
    if args.data_dir:
        files = [args.data_dir / "translation" / name / f"{split}.tsv" for name in (language, back)]
        turned = files[1].exists() and not files[0].exists()
        for number, line in read_lines(files[turned]):
            sides = line.split("\t")
            check(len(sides) == 2, f"{files[turned]}:{number}", "expected 'source TAB translation'")
            pairs.append(sides[::-1] if turned else sides)
    else:
        name = "en-cs" if language == "cs-en" else language  # of WMT23
        hub = {"path": "haoranxu/WMT23-Test", "name": name, "split": split}
        if split != "test":
            name, config = "translation", language if target == "en" else back
            split = split.replace("valid", "validation")
            hub = {"path": "haoranxu/ALMA-Human-Parallel", "name": config, "split": split}
        for where, row in read_rows(args, language, split, hub, **{name: dict}):
            pairs.append(typed_columns(where, row[name], **{source: str, target: str}))
    system = ASK_TRANSLATION.format(NAMES.get(source, source), NAMES.get(target, target))
    for text, translation in pairs:
        yield {"language": language, "system": system, "user": text, "target": translation}


def encode_prompts(tokenizer, examples: list, max_length: int, training: bool) -> Iterator[dict]:
    """A prompt by the chat template, or by `PLAIN`; to train, the target and the end token follow.

    labels: (T,), at each place the id that *follows*, if it is of the target or the end token.
    """
    end, chat, prompts = tokenizer.eos_token_id, tokenizer.chat_template, []
    check(end is not None, "--model", "its tokenizer has no end-of-text token")
    options = {"tokenize": False, "add_generation_prompt": True}
    options["chat_template"] = None if chat else PLAIN
    for example in examples:
        messages = [{"role": role, "content": example[role]} for role in ("system", "user")]
        with as_user_error("--model: its chat template takes no system message with a user's"):
            prompts.append(tokenizer.apply_chat_template(messages, **options))
        check(prompts[-1], "--model", "its chat template leaves nothing of a message")
    targets = [example["target"] if chat else " " + example["target"] for example in examples]
    encoded = [tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, targets)]
    first = tokenizer("a")["input_ids"][:1]  # perhaps a begin-of-text token, as templates have it
    begin = [] if chat or first[0] not in tokenizer.all_special_ids else first
    for k, (prompt, target) in enumerate(zip(*encoded)):
        start = begin + prompt
        ids = start + target + [end] if training else start
        kept = np.array(ids[:max_length])
        labels = np.append(kept[1:], IGNORE)  # nothing follows the last one
        labels[: len(start) - 1] = IGNORE
        yield {"example": k, "input_ids": kept, "labels": labels, "cut": len(ids) > max_length}


def slot_words(text: str, language: str) -> list[str]:
    """What slots are counted in: words; in ja and zh characters, where ASCII stays whole."""
    return re.findall(r"[!-~]+|\S", text) if language in CHARACTERS else text.split()


def tag_slots(example: dict, where: str = "") -> list[tuple[str, str | None]]:
    """(word, type of the slot that it is in) of the text. UserError if a slot is not there."""
    parts, at, text = [], 0, example["text"]
    for slot in example["slots"]:
        value, start = slot["value"], f" {text} ".find(f" {slot['value']} ", at)
        if start < 0 or example["language"] in CHARACTERS:
            start = text.find(value, at)
        check(value and start >= 0, where, f"slot '{value[:60]}' does not follow in the text")
        parts += [(text[at:start], None), (value, slot["type"])]
        at = start + len(value)
    tagged = []
    for part, kind in [*parts, (text[at:], None)]:
        tagged += [(word, kind) for word in slot_words(part, example["language"])]
    return tagged


def parse_slots(output: str) -> list[list[str]]:
    """[type, value] of each part of the first line `type: value; ...`, or what else a part is."""
    line = output.strip().split("\n")[0].strip()
    return [] if line.lower() == "none" else [part.split(": ") for part in line.split("; ")]


def parse_json(output: str) -> list[tuple[str, ...]]:
    """(type, value) of what has the form of `ASK_NAMES`; first all LOC, then PER, then ORG."""
    pattern = r'"TypeName"\s*:\s*"(LOC|PER|ORG)"\s*,\s*"Text"\s*:\s*"((?:[^"\\]|\\.)*)"'
    found = [(kind, re.sub(r"\\(.)", r"\1", value)) for kind, value in re.findall(pattern, output)]
    if not found and not re.search(r'"Results"\s*:\s*\[\s*\]', output):
        return [(output,)]  # fits no format
    return sorted(found, key=lambda slot: ("LOC", "PER", "ORG").index(slot[0]))


def score_commands(examples: list, features: list, outputs: list, parse=parse_slots) -> dict:
    """`score_slots`, and how many outputs are not (type, value) in all parts."""
    malformed = sum(any(len(part) != 2 for part in parse(output)) for output in outputs)
    return score_slots(examples, outputs, parse) | {"malformed": malformed}


def score_slots(examples: list, outputs: list, parse: Callable = parse_slots) -> dict[str, float]:
    """F1 over all examples: `f1` of (type, place), as MASSIVE counts, `f1_strict` of (type, value).

    A value tags every place where its words stand, in any case, over what was tagged before;
    one that stands nowhere costs only the miss. Neighbours of one type are one slot.
    """
    gold_tags, found_tags, gold_values, found_values = [], [], [], []
    for k, (example, output) in enumerate(zip(examples, outputs)):
        tagged = tag_slots(example)
        lower, found = [word.lower() for word, _ in tagged], [None] * len(tagged)
        slots = [part for part in parse(output) if len(part) == 2]
        for kind, value in slots:
            phrase = slot_words(value.lower(), example["language"])
            for start in range(len(lower) - len(phrase) + 1):
                if lower[start : start + len(phrase)] == phrase:
                    found[start : start + len(phrase)] = [kind] * len(phrase)
        gold_tags += [None, *(kind for _, kind in tagged)]  # None between examples
        found_tags += [None, *found]
        gold_values += [(k, slot["type"], slot["value"]) for slot in example["slots"]]
        found_values += [(k, *slot) for slot in slots]
    types, _ = pd.factorize(np.array(gold_tags + found_tags, dtype=object))  # None: -1
    gold, found = np.split(2 * (types + 1), 2)  # the tag I of each type
    return {"f1": f1(entities(gold), entities(found)), "f1_strict": f1(gold_values, found_values)}


def score_translation(examples: list, features: list, outputs: list[str]) -> dict[str, float]:
    """BLEU and chrF of the outputs' first lines, 0 to 1. UserError if sacrebleu lacks anything."""
    direction = examples[0]["language"]
    tokenizer = BLEU_TOKENIZERS.get(direction.split("-")[-1], "13a")
    with as_user_error(f"{direction}: BLEU needs `pip install 'sacrebleu[ja]'`"):
        from sacrebleu.metrics import BLEU, CHRF  # https://github.com/mjpost/sacrebleu

        metrics = {"bleu": BLEU(tokenize=tokenizer), "chrf": CHRF()}
    lines = [output.strip().split("\n")[0] for output in outputs]
    texts = [[example["target"] for example in examples]]
    return {name: metric.corpus_score(lines, texts).score / 100 for name, metric in metrics.items()}


class Task(NamedTuple):
    head: type  # the transformers class: an encoder and a classifier, or a model that generates
    load: Callable
    encode: Callable
    score: Callable
    targets: list[str]  # the paper's target languages
    sources: Sequence[str] = (SOURCE,)  # and those with labels
    labels: int = 0  # of the classifier
    epochs: int = 5
    max_length: int = 96  # subwords in training, special tokens included
    test_length: int = 128  # and in evaluation
    new_tokens: int = 0  # subwords that are generated at most; 0: it is a task to classify


NLI_TARGETS = "ar bg de el es fr hi ru th tr vi zh".split()
QA_TARGETS = "ar de el es hi ro ru th tr vi zh".split()
# Of the second paper's languages en, zh (labelled), cy and jv (not) are known: we chose the rest.
MASSIVE = "cy jv sw az af bn fa hi hy id ja ka ko th tr".split(), "en ar es ru zh".split()
XSID = "da de-ba de-muc gsw id ja lt nl no tr".split(), "en de it zh ar".split()
NAMED = "da hr sk sr".split(), "en pt sv zh".split()
UNSEEN = "en-he he-en en-ja ja-en en-uk uk-en".split()  # directions of translation
SEEN = "en-cs cs-en en-de de-en en-is is-en en-ru ru-en en-zh zh-en".split()
LONG = {"max_length": 2048, "test_length": 2048, "new_tokens": 128}
TASKS = {
    "udpos": Task(Tokens, load_udpos, encode_tokens, score_accuracy, TARGETS, labels=18),
    "wikiann": Task(Tokens, load_wikiann, encode_tokens, score_entities, TARGETS, labels=7),
    "xnli": Task(Sentences, load_xnli, encode_sentences, score_accuracy, NLI_TARGETS,
                 labels=3, epochs=2, test_length=256),
    "xquad": Task(Answers, load_xquad, encode_questions, score_answers, QA_TARGETS,
                  labels=2, epochs=2, test_length=384),
    "massive": Task(Generator, load_slots, encode_prompts, score_commands, *MASSIVE, **LONG),
    "xsid": Task(Generator, load_slots, encode_prompts, score_commands, *XSID, **LONG),
    "uner": Task(Generator, load_slots, encode_prompts, lambda *given: score_commands(*given, parse_json),
                 *NAMED, **LONG),
    "translation": Task(Generator, load_translation, encode_prompts, score_translation,
                        UNSEEN, SEEN, **LONG | {"new_tokens": 512}),
}  # fmt: skip


# ---- 7. Files: --data-dir, the hub, downloads ------------------------------------------------------------------------

NO_NETWORK = "check the language and the network, or use --data-dir"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignfreeze"


class UserError(Exception):
    """What is wrong with the input, where, and what to do; `main` prints it in one line, returns 2."""


@contextmanager
def as_user_error(problem: str) -> Iterator[None]:
    """Whatever a library raises in here (the hub's raise dozens of types) becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{problem} ({why})") from None


def check(fine, where, problem: str) -> None:
    """UserError, which says where, unless all is fine."""
    if not fine:
        raise UserError(f"{where}: {problem}")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of UTF-8 text. UserError if it is none (a pipe, say), or empty."""
    check(path.is_file(), path, "is no file; the README says which files --data-dir must hold")
    number = 0
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")  # -sig: a byte order mark
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file") from None
    check(number, path, "the file is empty")


def read_rows(args, language: str, split: str, hub: dict, **kinds: type) -> Iterator:
    """(where it stands, row) of --data-dir or the hub; only the columns `kinds`, if any are named."""
    if args.data_dir:
        path = args.data_dir / args.task / language / f"{split}.jsonl"
        rows = ((f"{path}:{number}", line) for number, line in read_lines(path))
    else:
        name = f"{hub['path']} {hub.get('name', language)} {hub['split']}"
        with as_user_error(f"cannot load {name} from the hub; {NO_NETWORK}"):
            table = datasets.load_dataset(**hub)
        rows = ((f"{name}, row {number}", row) for number, row in enumerate(table))
    for where, row in rows:
        if args.data_dir:
            with as_user_error(f"{where}: not a line of JSON in whole characters"):
                row = json.loads(row)
                json.dumps(row, ensure_ascii=False).encode()  # fails for half a pair: "\\ud800"
        columns = typed_columns(where, row, **kinds)
        yield where, dict(zip(kinds, columns)) if kinds else row


def typed_columns(where: str, row, **kinds: type) -> list:
    """The values of these columns. UserError if one is missing or of another type (True is no int)."""
    check(type(row) is dict, where, f"expected named columns, found {str(row)[:60]!r}")
    for name, kind in kinds.items():
        check(type(row.get(name)) is kind, where, f"no column '{name}' of type {kind.__name__}")
    return [row[name] for name in kinds]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is whole or absent, whoever else writes it, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{os.urandom(8).hex()}"
    with as_user_error(f"cannot write {path}"):
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def fetch(url: str) -> Path:
    """Download a plain file once; later runs read it from the cache. UserError if that fails."""
    path = CACHE / regex.sub(r"^\w+://|[^\w.-]+", "_", url).strip("_")
    if not path.exists():
        with as_user_error(f"cannot download {url}; {NO_NETWORK}"):
            write_whole(path, urllib.request.urlopen(url, timeout=60).read())  # all of it, or an error
    return path


# ---- 8. One run: check everything, align, fine-tune, evaluate, write the record ------------------

SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # now: it may be edited while this runs
RECORD_KEYS = ("model", "task", "strategy", "schedule", "aligner", "seed")  # what names a run
PROBE_PAIRS = 100  # sentence pairs of each language that --probe looks at


def run(args) -> Path:
    """Do one run and write its record; return its path. One whose record exists is not repeated."""
    settle(args)
    path = args.out / f"{record_name(args)}.json"
    check(len(os.fsencode(path.name)) <= 240, path.name, "too long; rename the model's folder")
    if is_done(args, path):
        return path
    seconds: dict[str, float] = {}
    tokenizer, config = load_tokenizer(args.model, generates=TASKS[args.task].new_tokens > 0)
    for name in ("max_length", "realign_max_length"):  # a default may be more than a small model reads
        if getattr(args, name) == args.defaults[name]:
            setattr(args, name, min(args.defaults[name], tokenizer.model_max_length))
    check_flags(args, config, tokenizer.model_max_length)
    with timed(seconds, "model"):
        model = build_model(args, tokenizer)
        awesome = load_awesome(args) if args.aligner == "awesome" else None
    with timed(seconds, "data"):
        training, validation, tests = load_data(args, tokenizer)
    with timed(seconds, "pairs"):
        pairs, probed = load_pairs(args, awesome)
    results = train(args, model, tokenizer, training, validation, pairs, probed, seconds)
    with timed(seconds, "evaluate"):
        scores = evaluate_all(args, model, tokenizer, tests)
    malformed = {code: values.pop("malformed", None) for code, values in scores.items()}
    if any(count is not None for count in malformed.values()):
        results["malformed"] = malformed
    results = {"scores": scores, "config": settings_of(args), "seconds": seconds} | results
    write_record(path, results, args.device)
    return path


def train(
    args, model: nn.Module, tokenizer, features: list, validation: list,
    pairs: Iterator[Pair], probed: dict[str, list[Pair]], seconds: dict[str, float],
) -> dict:  # fmt: skip
    """Align and fine-tune a model in the order of --schedule; what the record says of it."""
    how = Alignment(  # a baseline aligns nothing, and so freezes nothing
        args.strategy, args.unit, args.layer, args.temperature, args.realign_batch_size,
        args.realign_max_length, args.pool_first == "yes", args.gather,
    )  # fmt: skip
    training = Training(*(getattr(args, name) for name in Training._fields))
    updates = finetune_steps(len(features), args.epochs, args.batch_size, args.schedule, args.accumulate)
    enough = (args.validate or 0) <= updates
    check(enough, "--validate", f"fine-tuning has {updates} updates; check more often")
    steps, losses, seen, best = {"finetune": updates}, {}, {}, {}
    measure, found = probing(model, tokenizer, probed, how, seconds)
    if args.schedule == "during":
        steps["realign"] = updates
    if args.schedule == "before":
        steps["realign"] = args.realign_steps or updates
        alone = training._replace(lr=args.realign_lr, decay=args.realign_decay)
        with timed(seconds, "realign"):
            losses, seen = realign(model, tokenizer, pairs, steps["realign"], how, alone)
        measure("realigned")
    generates = TASKS[args.task].new_tokens > 0
    if args.save_model and not generates:
        save_model(args, model, tokenizer)
    if args.epochs:
        stop = keep_best(args, model, tokenizer, validation, best) if args.validate else None
        with timed(seconds, "finetune"):
            curves, also = finetune(
                model, tokenizer, features, args.epochs, training, batch_size=args.batch_size, stop=stop,
                schedule="before" if args.schedule == "none" else args.schedule, pairs=pairs, how=how,
            )  # fmt: skip
        losses, seen = losses | curves, seen | also
        load_best(model, best)
        measure("finetuned")
    if args.save_model and generates:
        save_model(args, model, tokenizer)
    results = {"steps": steps, "losses": losses, "pairs": seen, "validation": best, "probe": found}
    return {key: value for key, value in results.items() if value or key in ("losses", "pairs")}


def evaluate_all(args, model: nn.Module, tokenizer, tests: dict) -> dict:
    """{language: its scores}. With several processes, each takes some of the languages."""
    task, own = TASKS[args.task], {}
    k, n = processes()
    for code in progress(list(tests)[k::n], "evaluate"):
        own[code] = evaluate(model, tokenizer, task, *tests[code], precision=args.precision)
    scores = gather_objects(own)
    return {code: scores[number % n][code] for number, code in enumerate(tests)}


def keep_best(args, model: nn.Module, tokenizer, features: list, best: dict) -> Callable:
    """What stops a training after five checks, one every --validate updates, without a lower loss on the
    validation examples; `best` then holds the lowest loss, and its weights."""
    features = sorted(features, key=lambda row: len(row["input_ids"]))
    chunks = in_chunks(iter(features), args.batch_size)
    batches = [task_batch(chunk, tokenizer.pad_token_id, device=model.device) for chunk in chunks]
    labels = sum(int(batch.count) for batch in batches)
    best |= {"loss": math.inf, "step": 0, "losses": []}

    def stop(step: int) -> bool:
        if step % args.validate:
            return False
        model.eval()
        with torch.no_grad(), autocast(model.device, args.precision):
            total = sum(task_loss(model, batch).item() * int(batch.count) for batch in batches)
        model.train()
        loss = finite_mean("validation", [torch.tensor(total / labels)])
        best["losses"].append(round(loss, 6))
        if loss < best["loss"]:
            best.update(loss=loss, step=step, weights={})
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    best["weights"][name] = parameter.detach().clone()
        return step >= best["step"] + 5 * args.validate

    return stop


def load_best(model: nn.Module, best: dict) -> None:
    """Give the model the weights of the best check; `best` then is what the record says of it."""
    if best:
        model.load_state_dict(best.pop("weights"), strict=False)
        say(f"validation: loss {best['loss']:.4f} after {best['step']} updates, whose weights are kept")


def set_up_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is; on a GPU, with deterministic algorithms. Where
    torchrun started several processes, they meet here, and each takes the GPU of its number."""
    with as_user_error(f"--device {name}: not to be had here"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and (device.index is None or dist.is_torchelastic_launched()):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # 1,200 launches a step, for nothing
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape of a batch
        torch.backends.cuda.matmul.allow_tf32 = True  # as it was when the authors ran their code
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        with as_user_error("torchrun: the processes cannot meet"):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def fast_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies matrices faster so, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"


def settle(args) -> None:
    """Fill in what depends on the machine; empty the settings that do not matter for this run, so that
    one baseline serves all aligners. UserError for a flag that was given but does not matter."""
    args.device = set_up_device(args.device)
    args.precision = args.precision or gather_objects(fast_precision(args.device))[0]
    aligned, words = args.strategy != "baseline", args.unit == "word"
    before = aligned and args.schedule == "before"
    compared = aligned or args.probe  # words or sentences are, with their translations
    for name, used, where in [
        ("realign_steps", before, "an alignment before the task"),
        ("aligner_model", args.aligner == "awesome", "--aligner awesome"),
        ("aligner", words, "--unit word"),
        ("gather", not words, "--unit sentence"),
        ("pool_first", not words, "--unit sentence"),
        ("syntactic_words", args.task == "udpos", "--task udpos"),
    ]:
        fine = used or getattr(args, name) == args.defaults[name]
        check(fine, f"--{name.replace('_', '-')}", f"only with {where}")
    args.schedule = args.schedule if aligned else "none"
    args.aligner = args.aligner if compared and words else "none"
    for names, used in [
        ("lora_alpha lora_dropout", args.lora),
        ("realign_steps realign_lr realign_decay", before),  # else those of fine-tuning
        ("realign_batch_size temperature gather", aligned),
        ("unit layer pool_first realign_languages realign_max_length limit_links", compared),
        ("aligner_model aligner_layer", args.aligner == "awesome"),
    ]:
        if not used:
            vars(args).update(dict.fromkeys(names.split()))


def settings_of(args) -> dict:
    """The settings as a record shows them: of a path the last part, and not where things go."""
    elsewhere = ("out", "overwrite", "device", "save_model", "write_links", "defaults")
    values = {key: value for key, value in vars(args).items() if key not in elsewhere}
    for key in ("model", "aligner", "aligner_model", "data_dir"):
        values[key] = values[key] and Path(os.path.abspath(values[key])).name
    values["adapter"] = [f"{folder.absolute().name}={weight}" for folder, weight in args.adapter]
    return values | {"fingerprint": fingerprint(args)}


def fingerprint(args) -> str:
    """Eight digits of the names and sizes of local files that a run reads."""
    folders = [Path(name) for name in (args.model, args.aligner, args.aligner_model) if name]
    folders += [folder for folder, _ in args.adapter]
    if args.data_dir:
        folders += [args.data_dir / name for name in ("parallel", "dictionary", args.task)]
    sizes = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            check(path.is_file() or path.is_dir() or not path.exists(), path, "is no regular file")
            if path.is_file():
                sizes.append([str(path.relative_to(folder)), path.stat().st_size])
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:8] if sizes else ""


def record_name(args) -> str:
    """`<model>_<task>_<strategy>_<schedule>_<aligner>_<seed>`, and six digits for other settings."""
    values = settings_of(args)
    name = "_".join(str(values[key]) for key in RECORD_KEYS)
    changed = {}
    for key, value in values.items():
        if key in args.defaults and key not in RECORD_KEYS and value not in (None, args.defaults[key]):
            changed[key] = value
    digits = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6]
    return f"{name}-{digits}" if changed else name


def is_done(args, path: Path) -> bool:
    """Whether a run's record is there and whole; says so. UserError if it is of other data."""
    check(path.is_file() or not path.exists(), path, "a folder or no plain file; move it away")
    if args.overwrite or not gather_objects(path.exists())[0]:
        return False
    try:
        record = json.loads(path.read_bytes())
        revision = record["versions"]["alignfreeze.py"]
        made_of = record["config"].get("fingerprint", fingerprint(args))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        say(f"{path} is no whole record of a run: the run is done again")
        return False
    check(made_of == fingerprint(args), path, "made of other files of the same names; change --out")
    check(not args.save_model, path, "exists; add --overwrite, or nothing is trained or stored")
    other = "" if revision == SCRIPT else "; ANOTHER REVISION of alignfreeze.py made it"
    say(f"{path} exists: nothing to do (--overwrite repeats the run){other}")
    return True


def check_flags(args, config, longest: int) -> None:
    """Whatever can be known to be wrong before any data is read. UserError."""
    depth, task = config.num_hidden_layers, TASKS[args.task]
    aligned = args.strategy != "baseline"
    paired, words = aligned or args.probe, args.unit == "word"
    shortest = 40 if args.task == "xquad" else 8
    freezes = frozen_layers(args.strategy if aligned else "none", depth)
    most = 2 * args.realign_batch_size if aligned else args.batch_size
    below = set(range((args.layer or 0) % (depth + 1)))  # layers that get a gradient of alignment
    stuck = below <= set(freezes) and ("emb" in args.strategy.split(",") or args.lora > 0)
    for wrong, problem in [
        (paired and not -depth - 1 <= args.layer <= depth,
         f"--layer {args.layer}: this model has hidden states {-depth - 1} to {depth}"),
        (aligned and stuck, f"--strategy {args.strategy}: nothing below --layer {args.layer} trains"),
        (paired and not 8 <= args.realign_max_length <= longest,
         f"--realign-max-length {args.realign_max_length}: must be 8 to {longest} subwords"),
        (paired and words and args.aligner not in ALIGNERS and not Path(args.aligner).is_dir(),
         f"--aligner {args.aligner}: neither {', '.join(ALIGNERS)} nor a folder of links"),
        (not shortest <= args.max_length <= longest,
         f"--max-length {args.max_length}: must be {shortest} to {longest} subwords with this model"),
        (processes()[1] > most, f"{processes()[1]} processes, but a batch is of {most}: start fewer"),
        (aligned and not words and not args.gather and args.realign_batch_size % processes()[1],
         f"--realign-batch-size {args.realign_batch_size}: no multiple of {processes()[1]} processes"),
        (args.checkpointing and freezes and args.schedule in ("during", "alternate"),
         f"--checkpointing: not with layers frozen in --schedule {args.schedule}"),
        ((args.adapter or args.validate) and not task.new_tokens,
         "--adapter, --validate: only for a task that generates"),
        (not args.epochs and (args.validate or (aligned and not args.realign_steps)),
         "--epochs 0: not with --validate; to align, give --schedule before and --realign-steps"),
        (args.save_model and args.schedule in ("during", "alternate") and not task.new_tokens,
         f"--save-model: with --schedule {args.schedule}, no encoder is realigned before fine-tuning"),
    ]:  # fmt: skip
        if wrong:
            raise UserError(problem)
    check_languages(args)
    check_folder("--out", args.out)
    if args.save_model:
        check_folder("--save-model", args.save_model.parent)
        fine = not os.path.lexists(args.save_model) and len(os.fsencode(args.save_model.name)) <= 240
        check(fine, f"--save-model {args.save_model}", "exists, or too long; name a new directory")


def check_languages(args) -> None:
    """UserError for a code that is none, that the hub has no data of, or that cannot be scored."""
    for name in ("languages", "train_languages", "realign_languages"):
        flag = f"--{name.replace('_', '-')}"
        for code in getattr(args, name) or []:
            check(regex.fullmatch(r"[\w-]+", code), flag, f"'{code}' is no language code")
            needs = name == "realign_languages" or args.task == "udpos"
            there = args.data_dir or not needs or code in TREEBANKS
            check(there, flag, f"no '{code}' on the hub; take some of {' '.join(TREEBANKS)}")
    if args.task == "translation":  # what sacrebleu lacks is said now, not after training
        for direction in [*args.train_languages, *args.languages]:
            score_translation([{"language": direction, "target": "a"}], [], ["a"])


def check_folder(flag: str, folder: Path) -> None:
    """Make a folder. UserError if nothing can be written there."""
    with as_user_error(f"{flag} {folder}: cannot write there; choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def load_tokenizer(name: str, flag: str = "--model", generates: bool = False) -> tuple[Any, Any]:
    """(tokenizer, config) of a model. UserError, before anything is computed, if it is of no use."""
    flag = f"{flag} {name}"
    with as_user_error(f"{flag}: no hub id and no local directory that loads"):
        config = transformers.AutoConfig.from_pretrained(name)
        config = config if config.is_encoder_decoder else config.get_text_config()
        options = {} if generates else {"add_prefix_space": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
        tokenizer("a")  # fails if its settings are of odd types
    encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    decoder = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not encoder
    fine = decoder if generates else encoder and not getattr(config, "is_decoder", False)
    fine = fine and not config.is_encoder_decoder
    wanted = "a decoder-only language model" if generates else "an encoder such as xlm-roberta-base"
    check(fine, flag, f"{config.model_type} is not what this task takes; give {wanted}")
    fine = tokenizer.is_fast and len(tokenizer) > len(tokenizer.all_special_ids)
    check(fine, flag, "has no fast tokenizer with words; are its files missing?")
    if tokenizer.pad_token_id is None and generates:
        tokenizer.pad_token = tokenizer.eos_token
    whole = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"  # of bytes: knows every word
    fine = tokenizer.pad_token_id is not None and (whole or tokenizer.unk_token_id is not None)
    check(fine, flag, "its tokenizer has no token for padding or for unknown words")
    highest = max(tokenizer.vocab_size - 1, tokenizer.pad_token_id, *tokenizer("a")["input_ids"])
    fine = highest < config.vocab_size
    check(fine, flag, f"its tokenizer has ids to {highest}, the model {config.vocab_size}")
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    positions -= 2 * ("roberta" in config.model_type)  # RoBERTa counts positions from 2
    tokenizer.model_max_length = longest = min(tokenizer.model_max_length, positions)
    fine = longest >= 8 and config.num_hidden_layers > 0
    check(fine, flag, "has no layer, or reads fewer than 8 subwords; see its config and tokenizer")
    return tokenizer, config


def load_model(name: str, head=transformers.AutoModel, flag="--model", **options) -> nn.Module:
    """A pretrained model. UserError if weights are missing, but for the task's head or a pooler."""
    flag, options = f"{flag} {name}", {"dtype": torch.float32} | options
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with as_user_error(f"{flag}: cannot load its weights"):
        model, found = head.from_pretrained(name, **options)
    prefix = "" if head in (transformers.AutoModel, Generator) else f"{model.base_model_prefix}."
    misfit = [key for key, *_ in found["mismatched_keys"]]
    lacking = [key for key in [*found["missing_keys"], *misfit] if key.startswith(prefix)]
    lacking = [key for key in lacking if "pooler" not in key]
    first = min(lacking, default="")
    check(not lacking, flag, f"its files lack {len(lacking)} tensors of the model, {first} first")
    if misfit:
        say(f"{flag}: a classifier of another size is left out ({', '.join(misfit)})")
    surplus = [key for key in found["unexpected_keys"] if regex.search(r"layers?\.\d+\.", key)]
    if surplus:
        say(f"{flag}: {len(surplus)} tensors of surplus layers are left out, {min(surplus)} first")
    return model


def build_model(args, tokenizer) -> nn.Module:
    """The model of a run, with its task's head, its adapters merged and new ones added."""
    torch.manual_seed(args.seed)  # for the first weights of the classifier and of adapters
    task = TASKS[args.task]
    options = {} if task.new_tokens else {"num_labels": task.labels}
    if args.lora and args.precision == "bf16":  # the weights that stay need no more
        options["dtype"] = torch.bfloat16
    model = load_model(args.model, task.head, **options).to(args.device)
    for folder, weight in args.adapter:
        merge_adapter(model, folder, weight)
    if args.lora:
        for name in add_lora(model, args.lora, args.lora_alpha, args.lora_dropout):  # a classifier too
            model.get_parameter(name).data = model.get_parameter(name).data.float()
        count = model.num_parameters(only_trainable=True)
        say(f"adapters of rank {args.lora}: {count / 1e6:.2f}M parameters train")
    if args.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with as_user_error(f"--model {args.model}: this architecture does not run here"):
        try_out(args, model.eval(), tokenizer)
    size = f"{model.num_parameters() / 1e6:.1f}M parameters on {args.device}"
    say(f"{args.model}: {size}; strategy {args.strategy}")
    return model


@torch.no_grad()
def try_out(args, model: nn.Module, tokenizer) -> None:
    """Pass the longest text that may come through the model, as training and tests will."""
    task = TASKS[args.task]
    longest = max(args.max_length, task.test_length, args.realign_max_length or 0)
    ids = np.resize(tokenizer("a b")["input_ids"], min(longest, tokenizer.model_max_length))
    inputs = pad_inputs([ids], tokenizer.pad_token_id, model.device)
    kinds = tokenizer("a", "b").get("token_type_ids")
    if kinds and task.head in (Sentences, Answers):
        inputs["token_type_ids"] = torch.full_like(inputs["input_ids"], max(kinds))
    with autocast(model.device, args.precision):
        (inputs,) = with_embeddings(model, [inputs])
        for layer in (-2, -1):
            finite = hidden_state(model.base_model, inputs, layer).isfinite().all()
            check(finite, f"--model {args.model}", "its weights, or an --adapter's, give no numbers")
        generate(model, tokenizer, [ids[:8]] * 2, 2) if task.new_tokens else task_logits(model, inputs)


def merge_adapter(model: nn.Module, folder: Path, weight: float) -> None:
    """Add `weight` x scale x B A, of a folder in PEFT's format, to the weights beside them."""
    flag = f"--adapter {folder}"
    with as_user_error(f"{flag}: cannot be read"):
        config = json.loads((folder / "adapter_config.json").read_bytes())
        tensors = load_file(folder / "adapter_model.safetensors")
        odd = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
        odd = [key for key in odd if config.get(key)]
        plain = config.get("peft_type") == "LORA" and not odd
        check(plain, flag, f"not plain low-rank adapters ({config.get('peft_type')} {odd})")
        rank, scale = config["r"], config["lora_alpha"] / config["r"]
    names = {key.rsplit(".lora_", 1)[0] for key in tensors}
    paired = tensors.keys() == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    check(names and paired, flag, "its tensors are not all pairs of lora_A.weight and lora_B.weight")
    modules = dict(model.named_modules())
    for key in sorted(names):
        low, high = (tensors[f"{key}.lora_{part}.weight"].float() for part in "AB")
        name = key.removeprefix("base_model.model.")
        layer = modules.get(name)
        fits = isinstance(layer, nn.Linear) and low.shape == (rank, layer.in_features)
        fits = fits and high.shape == (layer.out_features, rank)
        check(fits, flag, f"this model has no linear layer {name} of that size and rank")
        layer.weight.data += weight * scale * (high @ low).to(layer.weight.device)  # summed in float32
    say(f"{flag}: merged with weight {weight:g}")


def save_model(args, model: nn.Module, tokenizer) -> None:
    """Write a folder, whole or absent: adapters in PEFT's format, or a model that --model takes."""
    if processes()[0] > 0:  # one of them writes
        return
    generates = TASKS[args.task].new_tokens > 0
    trained = model if generates else model.base_model
    problem = f"--save-model {args.save_model}: cannot be written"
    with as_user_error(problem), tempfile.TemporaryDirectory(dir=args.save_model.parent) as scratch:
        folder = Path(scratch) / "model"
        if args.lora:
            folder.mkdir()
            weights = trained.state_dict(prefix="base_model.model.")
            tensors = {name: weight for name, weight in weights.items() if ".lora_" in name}
            config = {
                "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
                "task_type": "CAUSAL_LM" if generates else "FEATURE_EXTRACTION",
                "r": args.lora, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout,
                "target_modules": sorted({name.split(".")[-3] for name in tensors}),
                "base_model_name_or_path": settings_of(args)["model"],
            }  # fmt: skip
            save_file(tensors, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        else:
            trained.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        os.replace(folder, args.save_model)
    say(f"--save-model: {args.save_model}")


def load_data(args, tokenizer) -> tuple[list, list, dict]:
    """(features to train, to validate, {language: (examples, features) to test}), all checked."""
    task, tests = TASKS[args.task], {}

    def features(split: str) -> list[dict]:
        examples = []
        for code in args.train_languages:
            part = list(task.load(code, split, args))[: args.limit_train]
            say(f"{args.task}, {split}: {code} {len(part)} examples")
            examples += part
        return encode(task, tokenizer, examples, args.max_length, True, f"{args.task}, {split}")

    training = features("train") if args.epochs else []
    validation = features("valid") if args.validate else []
    length = min(task.test_length, tokenizer.model_max_length)
    for code in dict.fromkeys([*args.train_languages, *args.languages]):
        examples = list(task.load(code, "test", args))[: args.limit_test]
        name = f"{args.task}, {code}"
        tests[code] = examples, encode(task, tokenizer, examples, length, False, name)
    counts = [f"{code} {len(examples)}" for code, (examples, _) in tests.items()]
    say(f"test examples: {', '.join(counts)}")
    return training, validation, tests


def encode(
    task: Task, tokenizer, examples: list[dict], max_length: int, training: bool, name: str = "data"
) -> list[dict]:
    """The task's features of a set of examples. UserError if there is nothing to learn or to score."""
    features = []
    for start in range(0, len(examples), 1000):  # tokenizers return large objects
        part = task.encode(tokenizer, examples[start : start + 1000], max_length, training)
        features += [feature | {"example": start + feature["example"]} for feature in part]
    if training or not task.new_tokens:
        labelled = any((feature["labels"] != IGNORE).any() for feature in features)
        check(labelled, name, "nothing to learn or to score in this data")
    cut = len({feature["example"] for feature in features if feature["cut"]})
    if cut:
        say(f"{name}: {cut} examples are not seen whole (cut off, or without a subword)")
    return features


def load_pairs(args, awesome: Callable | None) -> tuple[Iterator[Pair], dict]:
    """(endless sentence pairs, all languages in turn; {language: [pairs for the probe]}), checked."""
    streams, probed = [], {}
    options = {"limit": args.limit_links, "awesome": awesome}
    for code in args.realign_languages or []:
        if args.strategy != "baseline":
            text = linker(code, args.aligner, args.data_dir, **options)
            stream = linked_pairs(code, *text, args.seed)
            streams.append(itertools.chain([next(stream)], stream))  # the first now, for its errors
        if args.probe:
            dev = linker(code, args.aligner, args.data_dir, part="dev", **options)
            probed[code] = probe_pairs(code, *dev)
    return itertools.chain.from_iterable(zip(*streams)), probed


def load_awesome(args) -> Callable[[list], list[Links]]:
    """The function that links pairs of word lists by the encoder of --aligner-model. In float32 whatever
    --precision says: leaving autocast in the thread that makes batches would empty the cache of the
    training step beside it, and its sums would depend on the moment."""
    tokenizer, config = load_tokenizer(args.aligner_model, "--aligner-model")
    layer, depth = args.aligner_layer, config.num_hidden_layers
    check(0 <= layer <= depth, f"--aligner-layer {layer}", f"must be 0 to {depth}")
    encoder = load_model(args.aligner_model, flag="--aligner-model").to(args.device).eval()
    return lambda pairs: awesome_links(encoder, tokenizer, pairs, layer)


def store_links(args) -> None:
    """--write-links: align the text of every language, write its links, and train nothing."""
    settle(args)
    wanted = f"needs --aligner {', '.join(ALIGNERS)}, not {args.aligner}"
    check(args.aligner in ALIGNERS, "--write-links", wanted)
    check_languages(args)
    check_folder("--write-links", args.write_links)
    awesome = load_awesome(args) if args.aligner == "awesome" else None
    parts = ("train", "dev") if args.probe else ("train",)
    for code, part in itertools.product(args.realign_languages, parts):
        path = args.write_links / links_file(code, part)
        if path.exists() and not args.overwrite:
            say(f"{path} exists: nothing to do (--overwrite aligns again)")
            continue
        start, lines = time.time(), []
        options = {"limit": args.limit_links, "part": part, "awesome": awesome}
        link, text = linker(code, args.aligner, args.data_dir, **options)
        for chunk in in_chunks(text(), 32):
            for pair in link(chunk):
                lines.append(" ".join(f"{i}-{j}" for i, j in pair.links) + "\n")
        write_whole(path, "".join(lines).encode())
        say(f"{path.name}: {len(lines)} sentence pairs aligned in {time.time() - start:.1f} s")


def probing(model: nn.Module, tokenizer, pairs: dict, how: Alignment, seconds: dict) -> tuple:
    """(`measure`, to be called after each stage of training; what it finds): of each layer `retrieval`,
    see there, and `drift`, the norm of the change of its weights since `before`, relative to their norm
    then. `before` is measured here; without pairs (no --probe) nothing is."""
    start, found = {}, defaultdict(lambda: defaultdict(dict))
    parts = {"emb": embeddings(model.base_model)}
    parts |= {str(k): layer for k, layer in enumerate(transformer_layers(model.base_model))}

    def measure(stage: str) -> None:
        with timed(seconds, "probe"):
            for code, chosen in pairs.items():
                for kind, shares in retrieval(model, tokenizer, chosen, how).items():
                    found[kind][stage][code] = shares
            for name, part in parts.items():
                weights = nn.utils.parameters_to_vector(part.parameters()).detach().float().cpu()
                before = start.setdefault(name, weights)
                if stage != "before":
                    change = (weights - before).norm() / before.norm().clamp(min=1e-12)
                    found["drift"][stage][name] = round(change.item(), 6)

    if not pairs:
        return lambda stage: None, found
    measure("before")
    return measure, found


@torch.inference_mode()
def retrieval(model: nn.Module, tokenizer, pairs: list[Pair], how: Alignment) -> dict:
    """For each of the hidden states, how often the nearest word or sentence is the one linked to it.

    Among all linked words of the pairs, or all sentences, in both directions, the embeddings' output
    first. `retrieval`: by cosine; for sentences also `margin`: by cosine over the mean cosine of both
    sides to their 4 nearest (Artetxe and Schwenk 2019, https://arxiv.org/abs/1811.01136).
    """
    buckets, found = math.ceil(len(pairs) / 16), defaultdict(list)
    encode = encode_pairs if how.unit == "word" else encode_texts
    batch = encode(tokenizer, pairs, how, buckets, model.device)
    size = len(batch.queries) // (2 if how.unit == "word" else 1)  # words: half is reversed
    check(size, "--probe", f"no linked word of {pairs[0].language} within {how.max_length} subwords")
    model.eval()
    outputs = [model.base_model(**bucket, output_hidden_states=True) for bucket in batch.inputs]
    states = [output.hidden_states for output in outputs]
    for layer in zip(*states):  # (sentences, T, hidden) of each bucket
        vectors = F.normalize(vectors_of(layer, batch, how).float(), dim=-1)
        cosine = vectors[batch.queries[:size]] @ vectors[batch.targets[:size]].T
        found["retrieval"].append(nearest_right(cosine))
        if how.unit == "sentence":
            near = min(4, size)
            around = cosine.topk(near, 1).values.mean(1)[:, None] + cosine.topk(near, 0).values.mean(0)
            found["margin"].append(nearest_right(2 * cosine / around))
    return found


def nearest_right(similarity: Tensor) -> float:
    """How often the k-th of one side is the most similar to the k-th of the other, both ways."""
    place = torch.arange(len(similarity), device=similarity.device)
    right = torch.cat([similarity.argmax(0) == place, similarity.argmax(1) == place])
    return round(right.float().mean().item(), 6)


def probe_pairs(language: str, link: Callable, text: Callable) -> list[Pair]:
    """The first linked pairs of the lines for the probe; each word keeps only its first link."""
    linked, chosen = set(), []
    for pair in link(list(text())):
        links = []
        for i, j in one_to_one(pair.links, pair.source, pair.target):
            words = {(SOURCE, pair.source[i]), (language, pair.target[j])}
            if not words & linked:
                links.append((i, j))
                linked |= words
        if (links or isinstance(pair.source, str)) and len(chosen) < PROBE_PAIRS:
            chosen.append(pair._replace(links=links))
    check(chosen, "--probe", f"no line of the {language} text for it gets a link from the aligner")
    return chosen


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that is spent in here to the seconds of a stage."""
    start = time.time()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.time() - start, 1)


def write_record(path: Path, results: dict, device: torch.device) -> None:
    """One JSON file for one run: what was run, with what, how long, the scores. No path in it."""
    if processes()[0] > 0:  # one of them writes
        return
    record = {key: results["config"][key] for key in RECORD_KEYS} | results
    record["versions"] = {"python": sys.version.split()[0], "alignfreeze.py": SCRIPT}
    for library in (torch, transformers, datasets):
        record["versions"][library.__name__] = library.__version__
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    record |= {"threads": torch.get_num_threads(), "processes": processes()[1]}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text.encode("utf-8", "backslashreplace"))
    say_pairs(results["pairs"])
    table = pd.DataFrame(results["scores"]).T * 100
    targets = table.drop(index=results["config"]["train_languages"])
    if len(targets):
        table.loc["average"] = targets.mean()
    say(f"\npercent\n{table.to_string(float_format='%.1f')}")
    say(f"(the average is over {len(targets)} languages, without those that the task was learned in)\n")
    say(f"record: {path}")


def say_pairs(seen: dict[str, Counter]) -> None:
    """What was aligned, and what was passed over."""
    if not seen:
        return
    total = sum(seen.values(), Counter())
    say(f"aligned {total['sentences']} sentence pairs with {total['words']} word pairs")
    if total["words"]:
        cut = f"{total['cut']} cut-off word pairs"
        say(f"passed over: {total['skipped']} sentence pairs without a link, {cut}")
    for code, counts in seen.items():
        if counts["readings"] > 1:
            say(f"{SOURCE}-{code}: text shorter than the training, begun {counts['readings']} times")


# ---- 9. Command line -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def number(kind: type, low: float | None = None, high: float = 2**31) -> Callable[[str], Any]:
    """The type of a flag: a number from `low` on, or more than 0, and less than `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > 0 if low is None else value >= low) or not value < high:
            limit = "more than 0" if low is None else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text}: must be {limit} and less than {high}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def adapter(text: str) -> tuple[Path, float]:
    """The type of --adapter: a folder, and `=WEIGHT` behind it if that is not 1."""
    folder, _, weight = text.rpartition("=")
    try:
        return (Path(folder), number(float, -(2**31))(weight)) if folder else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


METHODS = ("alignfreeze", "mid-align")
NATURAL, BATCH = number(int, 1), number(int, 1, 10_001)
RATE, SHARE = number(float), number(float, 0, 1)
DECAYS = ("constant", "constant_with_warmup", "linear", "inverse_sqrt")
FLAGS = {  # group: rows of (flag, type, what it is for); a tuple is a choice, bool a switch, a list takes many
    "what to run": [
        ("strategy", str, "baseline, full, front, back, or layers to freeze as in emb,0-2"),
        ("schedule", ("before", "during", "alternate"), "align before the task, with it, or in turn with it"),
        ("seed", number(int, 0, 2**32), "the first paper's are 31 42 66 23 17"),
        ("train-languages", [str], "that the task is learned in (default: the paper's)"),
        ("languages", [str], "that it is tested in as well (default: the paper's)"),
        ("realign-languages", [str], "aligned with English (default: the first paper's 34)"),
    ],
    "alignment": [
        ("unit", ("word", "sentence"), "what one vector is"),
        ("layer", int, "index into hidden_states; -1 is the last layer"),
        ("temperature", RATE, "of the contrastive loss"),
        ("aligner", str, "of words: dictionary, fastalign, awesome, or a folder of Pharaoh files"),
        ("aligner-model", str, "encoder for --aligner awesome"),
        ("aligner-layer", int, "its hidden states that are compared"),
        ("pool-first", ("yes", "no"), "whether begin-of-text counts in a sentence's mean"),
        ("gather", bool, "compare with the sentences of all processes"),
        ("realign-steps", NATURAL, "updates, --schedule before (default: as many as the task takes)"),
        ("realign-batch-size", BATCH, "sentence pairs in a batch"),
        ("realign-max-length", NATURAL, "subwords of a sentence"),
        ("realign-lr", RATE, "highest learning rate, --schedule before"),
        ("realign-decay", DECAYS, "of that rate"),
    ],
    "training": [
        ("epochs", number(int, 0), "of the task"),
        ("batch-size", BATCH, "examples in a batch"),
        ("accumulate", BATCH, "batches that make one update"),
        ("lr", RATE, "highest learning rate of the task"),
        ("decay", DECAYS, "of that rate, after warm-up"),
        ("warmup", number(float, 0), "share of the updates in which it rises; more than 1: it never arrives"),
        ("clip", number(float, 0), "largest norm of the gradient; 0: any"),
        ("max-length", NATURAL, "subwords of an example"),
        ("precision", ("fp32", "bf16"), "of matrix products (default: bf16 where it is fast)"),
        ("lora", number(int, 0, 10_001), "rank of low-rank adapters; 0: none, all weights train"),
        ("lora-alpha", RATE, "their scale is alpha / rank"),
        ("lora-dropout", SHARE, "in front of them"),
        ("adapter", [adapter], "folders of adapters to merge into the model first; =WEIGHT behind one scales it"),
        ("validate", NATURAL, "every so many updates look at the validation loss, and keep the best weights"),
        ("checkpointing", bool, "compute activations twice, to hold fewer"),
    ],
    "data and output": [
        ("data-dir", Path, "local files instead of the hub; the README shows the layout"),
        ("syntactic-words", bool, "udpos: the standard 17 tags, no multi-word ranges"),
        ("limit-train", NATURAL, "only so many training examples of a language"),
        ("limit-test", NATURAL, "only so many test examples of a language"),
        ("limit-links", NATURAL, "only so many lines of parallel text"),
        ("device", str, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)"),
        ("save-model", Path, "new folder: the realigned encoder; of a language model, what was trained"),
        ("probe", bool, "also measure every layer: retrieval, and how far its weights moved"),
        ("write-links", Path, "align the text, store its links as Pharaoh files, and stop"),
        ("out", Path, "folder for the record"),
        ("overwrite", bool, "repeat a run whose record, or links that, exist"),
    ],
}  # fmt: skip
DEFAULTS = {  # of both methods
    "realign_languages": TARGETS, "aligner": "dictionary", "aligner_layer": 8, "pool_first": "yes", "lora_alpha": 16.0,
    "aligner_model": "bert-base-multilingual-cased", "lora_dropout": 0.1, "adapter": [], "limit_links": OPUS_LINES,
    "out": Path("results/runs"),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, each with its default. Method, model and task, which set others, come first."""
    default = "(default: %(default)s)"
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument(
        "--method", default=METHODS[0], choices=METHODS, help=f"sets those below {default}"
    )
    method = first.parse_known_args(argv)[0].method
    defaults = DEFAULTS | {name: values[METHODS.index(method)] for name, values in SETTINGS.items()}
    first.add_argument("--model", default=defaults["model"], help=f"hub id or folder {default}")
    first.add_argument(
        "--task", default=defaults["task"], choices=TASKS, help=f"what is learned {default}"
    )
    known = first.parse_known_args(argv)[0]
    task = TASKS[known.task]
    defaults |= MODEL_SETTINGS.get(Path(known.model).name, {})
    defaults |= {"realign_lr": defaults["lr"], "epochs": task.epochs, "max_length": task.max_length}
    defaults |= {"train_languages": [*task.sources], "languages": [*task.targets]}
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, parents=[first], allow_abbrev=False)
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, kind, purpose in rows:
            options = {"help": purpose, "default": defaults.get(flag.replace("-", "_"))}
            if options["default"] is not None and not isinstance(options["default"], list):
                options["help"] += f" {default}"
            if kind is bool:
                options |= {"action": "store_true", "default": False}
            elif isinstance(kind, tuple):
                options["choices"] = kind
            else:
                options["metavar"] = flag.split("-")[-1].upper()
                options |= {"type": kind[0], "nargs": "+"} if isinstance(kind, list) else {"type": kind}
            group.add_argument(f"--{flag}", **options)
    args = parser.parse_args(argv)
    for flag in ("languages", "train_languages", "realign_languages"):
        setattr(args, flag, list(dict.fromkeys(getattr(args, flag))))
    args.defaults = vars(parser.parse_args([])) | {"precision": "fp32"}
    args.defaults["method"] = METHODS[task.new_tokens > 0]  # the other one is named in the record's name
    return args


def main(argv: list[str] | None = None) -> int:
    """0, or 2 for a user's error, which is printed in one line, or 130 when interrupted."""
    for library in (transformers.utils, huggingface_hub.utils, datasets.utils):
        library.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = 3
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse_args(argv)
        if args.write_links:
            store_links(args)
        else:
            run(args)
        return 0
    except (UserError, OSError) as error:  # OSError: a full disk, say
        if int(os.environ.get("RANK", 0)):  # torchrun ends this process if another one failed before
            time.sleep(3)
        print("alignfreeze:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alignfreeze: interrupted; no record was written", file=sys.stderr)
        return 130
    except RuntimeError:
        if dist.is_initialized():  # another process failed, most likely, and torchrun ends this one
            time.sleep(5)
        raise


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():  # gloo's threads can crash the interpreter while it ends:
        sys.stdout.flush()  # https://github.com/pytorch/pytorch/pull/179291
        os._exit(code)
    sys.exit(code)
