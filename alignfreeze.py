#!/usr/bin/env python3
"""AlignFreeze: realign a multilingual encoder on word pairs while half of its layers are frozen. The whole method.

A multilingual encoder is fine-tuned on English and tested in other languages. Before that it is *realigned*: words that
translate each other, found in parallel text by a word aligner, are pulled together by a contrastive loss. Realignment
helps some languages and harms others; freezing half of the layers meanwhile (`requires_grad = False`) keeps most of the
gain and avoids most of the harm. All layers train again in fine-tuning.

    python alignfreeze.py --model xlm-roberta-base --task udpos --strategy front --aligner dictionary --seed 31
    python alignfreeze.py --model distilbert-base-multilingual-cased --strategy emb,0-2 --languages ar de --epochs 1
    python alignfreeze.py --model ./my-encoder --data-dir ./my-data --languages de --realign-languages de fr
    torchrun --nproc_per_node 4 alignfreeze.py --model xlm-roberta-base --task xnli

Read from top to bottom: tables, word pairs, realignment (the heart: `contrastive_loss` and `freeze`), tasks,
fine-tuning and evaluation, one run, command line. In a first reading, skip `fast_align` with what it calls, and what is
for several processes (`gather`) or kept on disk for later runs (`remembered`, `fingerprint` to `restore`).

Paper: Bakos, Gaschi, Guzmán, More, Li, Lee. AlignFreeze: Navigating the Impact of Realignment on the Layers of
Multilingual Models Across Diverse Languages. NAACL 2025. https://arxiv.org/abs/2502.12959
Realignment: Gaschi, Cerda, Rastin, Toussaint. Exploring the Relationship between Alignment and Cross-lingual
Transfer in Multilingual Transformers. Findings of ACL 2023. https://arxiv.org/abs/2306.02790
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import string
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import regex
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers import AutoModelForQuestionAnswering as Answers
from transformers import AutoModelForSequenceClassification as Sentences
from transformers import AutoModelForTokenClassification as Tokens
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

# ---- 1. Tables: what the paper varies (its sections 3 and 4, and appendix A) -----------------------------------------

DEFAULT_LR = 2e-5  # the learning rate of both stages, for encoders that are not in the next line
MODELS = {"distilbert-base-multilingual-cased": 2e-5, "bert-base-multilingual-cased": 2e-5, "xlm-roberta-base": 7.5e-6}

TREEBANKS = {  # language: Universal Dependencies treebank; English to train, the other 34 to test (and to realign)
    "en": "English-EWT", "af": "Afrikaans-AfriBooms", "ar": "Arabic-PADT", "bg": "Bulgarian-BTB",
    "ca": "Catalan-AnCora", "cs": "Czech-PDT", "da": "Danish-DDT", "de": "German-GSD", "el": "Greek-GDT",
    "es": "Spanish-GSD", "fa": "Persian-PerDT", "fi": "Finnish-PUD", "fr": "French-GSD", "he": "Hebrew-HTB",
    "hi": "Hindi-HDTB", "hu": "Hungarian-Szeged", "it": "Italian-ISDT", "ja": "Japanese-GSD", "ko": "Korean-GSD",
    "lt": "Lithuanian-ALKSNIS", "lv": "Latvian-LVTB", "no": "Norwegian-Bokmaal", "pl": "Polish-PDB",
    "pt": "Portuguese-GSD", "ro": "Romanian-RRT", "ru": "Russian-GSD", "sk": "Slovak-SNK", "sl": "Slovenian-SSJ",
    "sv": "Swedish-PUD", "ta": "Tamil-TTB", "th": "Thai-PUD", "tr": "Turkish-PUD", "uk": "Ukrainian-IU",
    "vi": "Vietnamese-VTB", "zh": "Chinese-GSD",
}  # fmt: skip
SOURCE, *TARGETS = TREEBANKS  # English, and the 34 languages that the paper realigns with and tests on

TOKEN_ID = re.compile(r"\d+([-.]\d+)?")  # in CoNLL-U: `3`, a range such as `3-4`, or an empty node such as `8.1`
UPOS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X _".split()  # `_`: `3-4` ranges

ALIGNERS = ("dictionary", "fastalign", "awesome")

OPUS, OPUS_LINES = "Helsinki-NLP/opus-100", 100_000  # of a million lines a language, more than any run reads
MUSE_URL = "https://dl.fbaipublicfiles.com/arrival/dictionaries/{}-{}.txt"
UD_URL = "https://raw.githubusercontent.com/UniversalDependencies/UD_{}/r2.7/{}_{}-ud-{}.conllu"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignfreeze"

SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # read now, as it may be edited while this runs
PARTS = {"cpu": 8}  # in how many parts of similar length a batch is computed; on a GPU padding costs less than launches
REALIGNMENT_WEIGHT = 0.1  # of its loss beside the task's, schedule `during`
KEEP_SECONDS = 600  # how often --realign-cache writes down where realignment is
PROBE_PAIRS = 100  # sentence pairs of each language that --probe keeps apart
RECORD_KEYS = ("model", "task", "strategy", "schedule", "aligner", "seed")  # what names a run
ANSWER_LENGTH = 30  # subwords that an answer may have, as in the library's example for SQuAD
IGNORE = -100  # the label of positions that have none, as in cross_entropy's ignore_index


class UserError(Exception):
    """What is wrong with the input, where, and what to do, in one line; `main` prints it and returns 2."""


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Whatever a library raises in here (the hub's raise dozens of types) becomes a UserError of one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{problem} ({' '.join(str(error).split())[:200] or type(error).__name__})") from None


def processes() -> tuple[int, int]:
    """(Number of this process, how many train one model together): those that torchrun started, else 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agreed(value: Any) -> Any:
    """The value that process 0 has, in all of them."""
    return everywhere(value)[0]


def everywhere(value: Any) -> list:
    """The values that all processes have."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def say(line: str) -> None:
    """Print a line, once for all processes, so that it reaches a log file at once."""
    if processes()[0] == 0:
        print(line, flush=True)


# ---- 2. Word pairs: text -> words -> links (paper, section 2 and appendix A) -----------------------------------------


class Pair(NamedTuple):
    """A sentence pair whose words are linked: `links` holds (index in source, index in target), one-to-one."""

    language: str  # of the target side; the source side is English
    source: list[str]
    target: list[str]
    links: Links
    skipped: int = 0  # sentence pairs of this language passed over since the last one, for want of a link
    reading: int = 1  # 2 when this language's text is being read for the second time, and so on


Links = list[tuple[int, int]]  # (index of a source word, index of a target word)
Dictionary = dict[str, set[str]]  # word -> its translations

UNSPACED_LANGUAGES = ("zh", "ja", "th")
UNSPACED = r"(?!\d)[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}ー]"  # characters of the scripts that write no spaces
WORD = regex.compile(r"[\w\p{M}]+|[^\w\p{M}\s]+")  # marks belong to their word, or Hindi and Tamil fall apart
RUN = regex.compile(rf"(?:{UNSPACED}\p{{M}}*)+|(?:(?!{UNSPACED})[\w\p{{M}}])+|[^\w\p{{M}}\s]+")
LONGEST_WORD = 32  # characters, marks not counted, that longest match looks ahead


def split_words(text: str, lang: str, vocabulary: Collection[str] = ()) -> list[str]:
    """Split a sentence into words: runs of word characters (letters, digits, marks), or of other visible characters.

    Chinese, Japanese and Thai (`zh ja th`) write no spaces: there, greedy longest match against `vocabulary` (fastest
    as a frozenset), unknown characters of those scripts one by one, words in other scripts and numbers whole.
    """
    if lang not in UNSPACED_LANGUAGES:
        return WORD.findall(text)
    words, vocabulary = [], frozenset(vocabulary)
    for run in RUN.findall(text):
        words += longest_match(run, vocabulary) if regex.match(UNSPACED, run) else [run]
    return words


def longest_match(run: str, vocabulary: frozenset[str]) -> list[str]:
    """Cut a run of characters into the longest words of `vocabulary` from the left; a mark stays with its character."""
    words, characters = [], regex.findall(r".\p{M}*", run)
    while characters:
        sizes = range(min(len(characters), LONGEST_WORD), 1, -1)
        size = next((k for k in sizes if "".join(characters[:k]) in vocabulary), 1)
        words.append("".join(characters[:size]))
        del characters[:size]
    return words


def one_to_one(links: Links, source: list[str], target: list[str]) -> Links:
    """Keep the links whose two words have no other link; of these, drop links between identical strings."""
    links = set(links)
    sources, targets = Counter(i for i, _ in links), Counter(j for _, j in links)
    return sorted((i, j) for i, j in links if sources[i] == targets[j] == 1 and source[i] != target[j])


def dictionary_links(source: list[str], target: list[str], forward: Dictionary, backward: Dictionary) -> Links:
    """Link words by a bilingual dictionary, as Gaschi et al. (2023) do: only where nothing is ambiguous. Case counts.

    `source[i]` and `target[j]` are linked when exactly one of the distinct words of the target sentence translates
    `source[i]` (`forward`), it occurs there once, and `i` is the only position of the source sentence whose word
    translates it (`backward`).
    """
    links, places = [], Counter(target)
    for i, word in enumerate(source):
        found = forward.get(word, set()) & places.keys()
        if len(found) == 1:
            (translation,) = found
            back = backward.get(translation, ())
            if places[translation] == 1 and [k for k, other in enumerate(source) if other in back] == [i]:
                links.append((i, target.index(translation)))
    return links


NULL_PROBABILITY = 0.08  # prior probability that a word translates nothing
DIRICHLET_ALPHA = 0.01  # sparse prior on the translation probabilities (fast_align -v)
FIRST_TENSION = 4.0  # how strongly links are drawn to the diagonal, before that is fitted (fast_align -d -o)
EM_ITERATIONS = 5  # four that train, and one that reads off the links


def fast_align(pairs: list[tuple[list[str], list[str]]]) -> list[list[tuple[int, int]]]:
    """Sorted links (source index, target index) of each pair (source words, target words); none if a side is empty.

    Reparameterised IBM model 2 (Dyer, Chahuneau and Smith, NAACL 2013), as `fast_align -d -o -v`, then again with `-r`,
    then `atools -c grow-diag-final-and`: one model explains the target words by the source words, a second one the
    source words by the target words, and their links are merged.
    """
    shapes = defaultdict(list)  # pairs with the same n source and m target words share arrays: no padding, no masks
    for number, (source, target) in enumerate(pairs):
        shapes[len(source), len(target)].append(number)
    sizes = {(n, m): max(1, 2**17 // ((n + 1) * (m + 1))) for n, m in shapes if n and m}  # pairs in a batch
    batches = [shapes[s][k : k + size] for s, size in sizes.items() for k in range(0, len(shapes[s]), size)]

    grids, source_word, target_word = number_word_pairs(pairs, batches)
    forward = train_and_link(grids, source_word, target_word)
    reverse = train_and_link([grid.swapaxes(1, 2) for grid in grids], target_word, source_word)
    del grids  # most of the memory
    links = [[] for _ in pairs]
    for k in range(0, len(batches), 128):
        part = slice(k, k + 128)
        for number, found in zip(itertools.chain(*batches[part]), merge(forward[part], reverse[part])):
            links[number] = found
    return links


def number_word_pairs(pairs, batches):
    """Give each (source word, target word) that ever shares a sentence pair a number, its place in the t-table.

    Returns per batch a grid (B, n + 1, m + 1) int32 of these numbers, where row 0 and column 0 are the NULL word, and
    the source word and the target word behind each number, (numbers,) int32, with NULL = 0. Serves both directions.
    """
    ids = defaultdict(itertools.count().__next__)  # a new word gets the next id; the first one is None, the NULL word

    def word_ids(batch, side):  # (B, length + 1)
        words = itertools.chain.from_iterable((None, *pairs[number][side]) for number in batch)
        return np.fromiter(map(ids.__getitem__, words), np.int64).reshape(len(batch), -1)

    def codes(batch):  # (B, n + 1, m + 1): two ids in one integer
        return word_ids(batch, 0)[:, :, None] << 32 | word_ids(batch, 1)[:, None, :]

    table = np.zeros(0, np.int64)
    for k in range(0, len(batches), 128):  # in blocks: all codes at once would be the largest array by far
        block = np.sort(np.concatenate([codes(batch) for batch in batches[k : k + 128]], axis=None))
        table = np.sort(np.concatenate([table, block]), kind="stable")  # merges two sorted runs in linear time
        table = table[np.diff(table, prepend=-1) > 0]
    grids = [np.searchsorted(table, codes(batch)).astype(np.int32) for batch in batches]
    return grids, (table >> 32).astype(np.int32), table.astype(np.int32)


def train_and_link(grids, source_word, target_word):
    """Fit p(target | source) by EM; per batch, the source index that explains each target word, (B, m), -1 for NULL."""
    tension, t_table = FIRST_TENSION, np.ones(len(source_word))
    distances = [distance(grid.shape[1] - 1, grid.shape[2] - 1) for grid in grids]

    def joint(grid, far):  # p(target word, the position it comes from), (B, n + 1, m)
        return t_table[grid[:, :, 1:]] * alignment_prior(far, tension)

    for iteration in range(EM_ITERATIONS - 1):
        counts, observed = np.zeros(len(source_word)), 0.0
        for grid, far in zip(grids, distances):
            posterior = joint(grid, far)
            posterior /= posterior.sum(1, keepdims=True)
            np.add.at(counts, grid[:, :, 1:].ravel(), posterior.ravel())
            # Like fast_align we count target positions from 0 here, from 1 elsewhere: it makes the tension what it is.
            observed += np.vdot(posterior[:, 1:].sum(0), distance(*far.shape, first=0))
        if iteration > 0:
            tension = fit_tension([len(grid) for grid in grids], distances, observed, tension)
        # The M step of variational Bayes, in place: p(target | source) = exp(digamma(count) - digamma(total)).
        counts += DIRICHLET_ALPHA
        counts[target_word == 0] = 0.0  # NULL explains words but is never explained
        totals = torch.from_numpy(np.bincount(source_word, counts)).digamma().numpy()
        torch.from_numpy(counts).digamma_()
        counts -= totals[source_word]
        t_table = np.exp(counts, out=counts)
    return [joint(grid, far).argmax(1) - 1 for grid, far in zip(grids, distances)]


def distance(n, m, first=1):
    """|i/n - j/m|, how far source position i of n and target position j of m are from the diagonal, (n, m)."""
    return np.abs(np.arange(1, n + 1)[:, None] / n - np.arange(first, m + first) / m)


def alignment_prior(far, tension):
    """Prior probability that each target word comes from NULL or from each source position, (n + 1, m)."""
    near = np.exp(-tension * far)
    return np.vstack([np.full(far.shape[1], NULL_PROBABILITY), near * ((1 - NULL_PROBABILITY) / near.sum(0))])


def fit_tension(sizes, distances, observed, tension):
    """Eight gradient steps towards the tension whose prior expects the distance from the diagonal that was observed."""
    words = sum(size * far.shape[1] for size, far in zip(sizes, distances))
    for _ in range(8):
        expected = 0.0
        for size, far in zip(sizes, distances):
            near = np.exp(-tension * far)
            expected += size * ((near * far).sum(0) / near.sum(0)).sum()
        tension = min(max(tension + 20 * (expected - observed) / max(words, 1), 0.1), 14.0)
    return tension


def merge(forward, reverse):
    """Merge the links of both directions; returns the sorted links of every sentence pair of the batches."""
    found, pairs = [], 0
    for f, r in zip(forward, reverse):
        f, r = f[:, None] == np.arange(r.shape[1])[:, None], r[:, :, None] == np.arange(f.shape[1])  # (B, n, m)
        b, i, j = np.nonzero(f | r)
        found.append(np.stack([pairs + b, i, j, f[b, i, j], r[b, i, j]]))
        pairs += len(f)
    pair, i, j, f, r = np.concatenate(found, axis=1)
    kept = grow_diag_final_and(pair, i, j, f > 0, r > 0)
    links = list(zip(i[kept].tolist(), j[kept].tolist()))
    return [links[a:b] for a, b in itertools.pairwise(np.searchsorted(pair[kept], np.arange(pairs + 1)))]


def grow_diag_final_and(pair, i, j, forward, reverse):
    """Which links to keep, (L,) bool, of those found in either direction, sorted by sentence pair, source i, target j.

    Keep what both directions found; add, again and again, neighbours (8 directions) of kept links if one of the two
    words is still unlinked; then forward, then reverse links between two unlinked words. Each link kept bears on the
    next, so within a sentence pair links take turns in sorted order; all sentence pairs take their turns together.
    """
    width = max(i.max(initial=0), j.max(initial=0)) + 2  # so that no link is a neighbour of another row's end
    code = (pair * width + i) * width + j
    words = np.stack([2 * pair * width + i, (2 * pair + 1) * width + j])  # (2, L): numbers of the words that it links
    around = code[:, None] + [a * width + b for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]  # (L, 8)
    place = np.searchsorted(code, around)
    neighbours = np.where(np.append(code, -1)[place] == around, place, -1)  # -1: none, the False at the end of `kept`
    kept = np.append(forward & reverse, False)
    linked = np.zeros(words.max(initial=0) + 1, bool)
    linked[words[:, kept[:-1]]] = True
    for candidates, barred in ((forward | reverse, np.all), (forward, np.any), (reverse, np.any)):
        waiting, before = np.flatnonzero(candidates & ~kept[:-1]), -1
        while len(waiting) != before:
            before = len(waiting)
            rank = np.arange(before) - np.searchsorted(pair[waiting], pair[waiting])
            for link in np.split(waiting[rank.argsort(kind="stable")], np.bincount(rank).cumsum()[:-1]):
                link = link[~barred(linked[words[:, link]], axis=0)]
                if barred is np.all:
                    link = link[kept[neighbours[link]].any(1)]
                kept[link] = linked[words[:, link]] = True
            waiting = waiting[~barred(linked[words[:, waiting]], axis=0)]
    return kept[:-1]


def remembered(align: Callable[[list], list[Links]], folder: Path) -> Callable[[list], list[Links]]:
    """The same aligner, which keeps on disk what it computes, and computes nothing that is there.

    For whole lists of pairs, as links can depend on what is aligned together. Every process adds a file of its own.
    """
    known, own = {}, []  # {key: links as JSON}; this process's file, once there is something to write
    for path in folder.glob("*.txt"):
        with explained(f"{path}: cannot be read; delete it"):
            lines = path.read_text("utf-8").splitlines(keepends=True)
            known |= dict(line.split(" ", 1) for line in lines if line.endswith("\n"))  # or it was killed in the line

    def links(pairs: list[tuple[list[str], list[str]]]) -> list[Links]:
        key = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        if key not in known:
            if not own:
                folder.mkdir(parents=True, exist_ok=True)
                own.append(tempfile.NamedTemporaryFile("w", dir=folder, suffix=".txt", delete=False))
                os.chmod(own[0].name, 0o644)
            known[key] = json.dumps(align(pairs))
            print(key, known[key], file=own[0], flush=True)
        return [[(i, j) for i, j in found] for found in json.loads(known[key])]

    return links


@torch.inference_mode()
def awesome_links(
    encoder: nn.Module, tokenizer: Any, pairs: list[tuple[list[str], list[str]]], layer: int = 8, threshold=1e-3
) -> list[Links]:
    """Links of pairs of word lists by the hidden states of an encoder (Dou and Neubig 2021, arXiv 2101.08231).

    Two subwords are linked where the softmax of their dot product exceeds `threshold` both over the subwords of the
    source and over those of the target; two words where any of their subwords are. Long sentences are cut off.
    """
    if not pairs:
        return []
    sentences = [source for source, _ in pairs] + [target for _, target in pairs]
    windows = encode_words(tokenizer, sentences, tokenizer.model_max_length)
    hidden = [None] * len(windows)  # of each sentence, without special tokens: (T, hidden)
    for group in by_length(windows, math.ceil(len(windows) / 16), lambda window: len(window.ids)):
        inputs = pad_inputs([window.ids for window in group], tokenizer.pad_token_id, encoder.device)
        for window, states in zip(group, hidden_state(encoder, inputs, layer).float()):
            hidden[window.sentence] = states[np.flatnonzero(window.words >= 0)]
    words = [window.words[window.words >= 0] for window in windows]
    half = len(pairs)
    source_word, target_word = pad(words[:half], -1), pad(words[half:], -1)  # (B, S), (B, T)
    source, target = (nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (hidden[:half], hidden[half:]))
    outside = ((source_word < 0)[:, :, None] | (target_word < 0)[:, None]).to(source.device)
    similarity = (source @ target.mT).masked_fill(outside, -math.inf)  # (B, S, T)
    linked = (similarity.softmax(1) > threshold) & (similarity.softmax(2) > threshold)
    pair, s, t = linked.nonzero().cpu().T
    links = [[] for _ in pairs]
    for k, i, j in torch.stack([pair, source_word[pair, s], target_word[pair, t]], dim=1).unique(dim=0).tolist():
        links[k].append((i, j))
    return links


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a UTF-8 file. UserError if it is missing, empty or not UTF-8."""
    try:
        with open(path, "rb") as lines:
            number = 0
            for number, line in enumerate(lines, 1):
                yield number, line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the README says which files --data-dir must hold") from None
    if number == 0:
        raise UserError(f"{path}: the file is empty")


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which is whole or absent, whoever else writes it and whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_whole(path: Path, content: bytes) -> None:
    """Write all of a file, or nothing."""
    with whole(path) as file:
        file.write(content)


def fetch(url: str) -> Path:
    """Download a plain file once; later runs read it from the cache. UserError when it cannot be had."""
    path = CACHE / regex.sub(r"^\w+://|[^\w.-]+", "_", url).strip("_")
    if not path.exists():
        with explained(f"cannot download {url}; check the language and the network, or use --data-dir"):
            write_whole(path, urllib.request.urlopen(url, timeout=60).read())  # read() raises if the connection breaks
    return path


def parallel_text(language: str, data_dir: Path | None) -> Iterator[tuple[str, str]]:
    """(English sentence, translation) line by line: `parallel/en-XX.tsv` of --data-dir, or OPUS-100 from the hub."""
    if data_dir:
        path = data_dir / "parallel" / f"{SOURCE}-{language}.tsv"
        for number, line in read_lines(path):
            if line.count("\t") != 1:
                raise UserError(f"{path}:{number}: expected 'English TAB translation', found {line.count(chr(9))} tabs")
            yield tuple(line.split("\t"))
    else:
        yield from streamed_text(language)


def streamed_text(language: str, block: int = 10_000) -> Iterator[tuple[str, str]]:
    """The first lines of OPUS-100, downloaded as they are read, in blocks that later runs find on disk."""
    config, stream, at = "-".join(sorted((SOURCE, language))), None, None  # `at`: the stream's next line
    for start in range(0, OPUS_LINES, block):
        path = CACHE / "opus-100" / config / f"{start}.json"
        if not path.exists():
            with explained(f"cannot read {OPUS} {config}; check the language and the network, or use --data-dir"):
                if at != start:
                    stream = iter(datasets.load_dataset(OPUS, config, split="train", streaming=True).skip(start))
                rows, at, where = itertools.islice(stream, block), start + block, f"{OPUS} {config}"
                rows = [columns(where, row, translation=dict)[0] for row in rows]
                text = [columns(where, row, **{SOURCE: str, language: str}) for row in rows]
            write_whole(path, json.dumps(text, ensure_ascii=False).encode())
        text = json.loads(path.read_bytes())
        yield from map(tuple, text)
        if len(text) < block:
            return


def read_dictionary(language: str, data_dir: Path | None) -> tuple[Dictionary, Dictionary]:
    """MUSE dictionaries, English to `language` and back; without a file for the way back, the first is turned round."""
    tables = {}
    for a, b in ((SOURCE, language), (language, SOURCE)):
        path = data_dir / "dictionary" / f"{a}-{b}.txt" if data_dir else fetch(MUSE_URL.format(a, b))
        if a == language and not path.exists():
            continue
        table = tables[a] = defaultdict(set)
        for number, line in read_lines(path):
            words = line.split()
            if len(words) != 2:
                raise UserError(f"{path}:{number}: expected 'word translation', found {len(words)} words")
            table[words[0]].add(words[1])
    if language not in tables:
        tables[language] = defaultdict(set)
        for word, translation in ((w, t) for w, translations in tables[SOURCE].items() for t in translations):
            tables[language][translation].add(word)
    return tables[SOURCE], tables[language]


def read_pharaoh(path: Path) -> list[str]:
    """Links of one sentence pair a line in Pharaoh format, `0-0 1-2 ...`, English first, positions from 0."""
    lines = []
    for number, line in read_lines(path):
        if not regex.fullmatch(r"(\d{1,9}-\d{1,9}(\s+|$))*", line.strip()):
            raise UserError(f"{path}:{number}: expected links such as '0-0 1-2', found {line[:60]!r}")
        lines.append(line)
    return lines


def shuffled(items: Iterable, seed: str, size: int = 10_000) -> Iterator:
    """Shuffle a stream through a buffer of `size` items, as the authors do."""
    rng, items = random.Random(seed), iter(items)
    buffer = list(itertools.islice(items, size))
    for item in items:
        k = rng.randrange(size)
        item, buffer[k] = buffer[k], item
        yield item
    rng.shuffle(buffer)
    yield from buffer


def stored_links(path: Path, lines: list[str], number: int, source: list[str], target: list[str]) -> Links:
    """The links of one sentence pair, from the lines of a Pharaoh file. UserError if they cannot be of this pair."""
    if number >= len(lines):
        raise UserError(f"{path}: {number} lines of links, but the parallel text goes on; align all of it")
    links = [tuple(map(int, link.split("-"))) for link in lines[number].split()]
    if any(i >= len(source) or j >= len(target) for i, j in links):
        raise UserError(f"{path}:{number + 1}: a link points outside {len(source)} and {len(target)} words")
    return links


def linked_pairs(
    language: str, aligner: str, data_dir: Path | None, seed: int, awesome: Callable | None = None,
    folder: Path | None = None,
) -> Iterator[Pair]:  # fmt: skip
    """Endless linked sentence pairs of English and `language`, shuffled by `seed`, aligned as they are asked for.

    aligner: `dictionary`; `awesome`, with the function that links a list of (source words, target words); `fastalign`,
    which learns from the whole text, once, and keeps its links in the cache; or a folder of Pharaoh files. folder:
    where to store the links of the whole text. Local files are read to their end here, before the first pair, so that
    a malformed line is found before training.
    """
    name, stored = f"{SOURCE}-{language}.txt", None if aligner in ALIGNERS else Path(aligner)
    forward, backward = {}, {}
    if aligner == "dictionary" or language in UNSPACED_LANGUAGES:
        forward, backward = read_dictionary(language, data_dir)
    vocabulary = frozenset().union(*forward.values()) if language in UNSPACED_LANGUAGES else frozenset()

    def text() -> Iterator[tuple[int, tuple[str, str]]]:
        return enumerate(parallel_text(language, data_dir))

    def align(lines: list[tuple[int, tuple[str, str]]]) -> list[tuple[list[str], list[str], Links]]:
        pairs = ((split_words(s, SOURCE), split_words(t, language, vocabulary)) for _, (s, t) in lines)
        pairs = list(map(lower_case, pairs) if aligner == "fastalign" and not stored else pairs)
        if stored:
            links = [stored_links(stored / name, known, number, *pair) for (number, _), pair in zip(lines, pairs)]
        elif aligner == "dictionary":
            links = [dictionary_links(*pair, forward, backward) for pair in pairs]
        else:
            links = awesome(pairs) if aligner == "awesome" else fast_align(pairs)
        return [(*pair, found) for pair, found in zip(pairs, links)]

    if aligner == "fastalign" and not folder:
        key = json.dumps([list(text()), sorted(vocabulary), SCRIPT])
        folder = CACHE / "fastalign" / hashlib.sha256(key.encode()).hexdigest()[:16]
        stored = folder if (folder / name).exists() else None
    if folder and not stored:
        write_links(folder / name, [list(text())] if aligner == "fastalign" else in_chunks(text()), align)
        stored = folder
    known = read_pharaoh(stored / name) if stored else []
    if data_dir:
        for number, line in text():
            if aligner not in ALIGNERS:  # links from elsewhere; those just stored fit
                align([(number, line)])
        if len(known) > number + 1:
            problem = f"{len(known)} lines of links for {number + 1} sentence pairs; are they of another text?"
            raise UserError(f"{stored / name}: {problem}")
    pairs = endless_pairs(language, text, align, seed)
    return itertools.chain([next(pairs)], pairs)  # the first pair is made now, for the error it may raise


def lower_case(pair: tuple[list[str], list[str]]) -> tuple[list[str], list[str]]:
    """Both sentences in lower case; equal words share their memory, of which a whole text needs much."""
    return tuple([sys.intern(word.lower()) for word in words] for words in pair)


def write_links(path: Path, chunks: Iterable[list], align: Callable) -> None:
    """Align a whole text, and store its links in Pharaoh format."""
    start = time.time()
    lines = [" ".join(f"{i}-{j}" for i, j in links) for chunk in chunks for *_, links in align(chunk)]
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())
    say(f"{path.name}: {len(lines)} sentence pairs aligned in {time.time() - start:.1f} s")


def in_chunks(items: Iterator, size: int = 32) -> Iterator[list]:
    """Lists of `size` items, the last one of what is left."""
    return iter(lambda: list(itertools.islice(items, size)), [])


def endless_pairs(language: str, text: Callable[[], Iterator], align: Callable, seed: int) -> Iterator[Pair]:
    """The linked sentence pairs of a text, which is shuffled and read again whenever it ends."""
    skipped = 0
    for reading in itertools.count(1):
        linked = 0
        for chunk in in_chunks(shuffled(text(), f"{seed} {language} {reading}")):
            for source, target, links in align(chunk):
                if links := one_to_one(links, source, target):
                    yield Pair(language, source, target, links, skipped, reading)
                    linked, skipped = linked + 1, 0
                else:
                    skipped += 1
        if not linked:
            raise UserError(f"{SOURCE}-{language}: no sentence pair of the whole text gets a link from the aligner")


def interleave(streams: list[Iterator[Pair]]) -> Iterator[Pair]:
    """One pair of each language in turn."""
    return itertools.chain.from_iterable(zip(*streams))


# ---- 3. Realignment: pull the words of each pair together while some layers are frozen (paper, section 2) ------------


class Window(NamedTuple):
    """A stretch of a tokenised sentence, special tokens included: the input of the encoder. All arrays are (T,)."""

    sentence: int  # which sentence it comes from
    ids: np.ndarray  # subword ids
    words: np.ndarray  # the index of the word that each subword belongs to, -1 for special tokens
    first: np.ndarray  # whether it is the first visible subword of its word, which represents the word


def encode_words(tokenizer, sentences: list[list[str]], max_length: int, windows: bool = False) -> list[Window]:
    """Tokenise sentences that are lists of words; at most `max_length` subwords, special tokens included.

    XLM-R's tokenizer can put a lone `▁` in front of a word (`▁ ，`). The authors delete it, so that the first *visible*
    subword represents the word. With `windows`, what does not fit goes on in further windows; without, it is cut off.
    """
    probe = tokenizer(["a"], is_split_into_words=True, return_special_tokens_mask=True)
    special = np.array(probe["special_tokens_mask"], bool)
    start, end = np.split(np.array(probe["input_ids"])[special], [special.argmin()])  # such as [CLS] and [SEP]
    mark = probe.tokens()[special.argmin()][0]  # what this tokenizer writes for a blank: XLM-R ▁, byte-level BPE Ġ
    blank = tokenizer.convert_tokens_to_ids(mark) if mark in "▁Ġ" else None
    edges = [(start, end)] + [(np.full(len(start), value), np.full(len(end), value)) for value in (-1, False)]
    room = max_length - len(start) - len(end)
    encoded = tokenizer(sentences, is_split_into_words=True, add_special_tokens=False, return_attention_mask=False)
    result = []
    for k, ids in enumerate(encoded["input_ids"]):
        ids, words = np.array(ids, dtype=np.int64), np.array(encoded.word_ids(k), dtype=np.int64)
        lone = (ids == blank) & (words == np.append(words[1:], -1))  # a blank with more of its word behind it
        ids, words = ids[~lone], words[~lone]
        rows = ids, words, np.diff(words, prepend=-1) != 0
        for at in range(0, max(len(ids), 1) if windows else 1, room):
            parts = [np.concatenate([left, row[at : at + room], right]) for row, (left, right) in zip(rows, edges)]
            result.append(Window(k, *parts))
    return result


def pad(rows: Iterable[np.ndarray], value: int) -> Tensor:
    """Stack (T,) arrays into a (B, longest T) tensor, filled up with `value`."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)


def pad_inputs(ids: list[np.ndarray], pad_id: int, device: Any) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, T), of B tokenised sentences."""
    lengths = torch.tensor([len(row) for row in ids])
    mask = (torch.arange(lengths.max()) < lengths[:, None]).long()
    return to_device({"input_ids": pad(ids, pad_id), "attention_mask": mask}, device)


def to_device(tensors: dict[str, Tensor], device: Any) -> dict[str, Tensor]:
    """Copies on the device, without waiting for it."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def by_length(items: list, parts: int, length: Callable[[Any], int]) -> list[list]:
    """Split a batch into parts of equal size and similar length, so that hardly any padding is computed."""
    items, size = sorted(items, key=length), math.ceil(len(items) / parts)
    return [items[start : start + size] for start in range(0, len(items), size)]


def shared_out(items: list, parts: int, count: int, length: Callable[[Any], int]) -> list[list[list]]:
    """Split a batch among `count` processes, each with short and long items, and every share by length into parts."""
    items = sorted(items, key=length)
    return [by_length(items[k::count], parts, length) for k in range(count)]


def ahead(items: Iterator, count: int = 8) -> Iterator:
    """The same items, up to `count` of them made by a thread beforehand, so that a training step need not wait.

    None is no item.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(count))
        try:
            while (item := coming.popleft().result()) is not None:
                coming.append(pool.submit(next, items, None))
                yield item
        finally:  # after an error or Ctrl-C, wait for one batch, not for all of them
            pool.shutdown(cancel_futures=True)


def embed(model: nn.Module, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Look up the word embeddings of all parts at once: each look-up costs a gradient as large as the vocabulary."""
    shapes = [part["input_ids"].shape for part in parts]
    vectors = model.get_input_embeddings()(torch.cat([part["input_ids"].flatten() for part in parts]))
    split = [v.view(*shape, -1) for v, shape in zip(vectors.split([shape.numel() for shape in shapes]), shapes)]
    return [{**part, "input_ids": None, "inputs_embeds": v} for part, v in zip(parts, split)]


class Batch(NamedTuple):
    """B sentence pairs for the encoder: 2B sentences, or a process's share of them, in parts of similar length."""

    inputs: list[dict[str, Tensor]]  # of each part, input_ids and attention_mask, (its sentences, its longest T)
    words: Tensor  # (N,) where the N words of its sentences are: positions in its parts flattened, one after the other
    counts: list[int]  # N in each process; the words of all, one process after the other, are numbered from 0
    queries: Tensor  # (Q,) numbers of words: every linked word, of either side,
    targets: Tensor  # (Q,) and the word that it is linked to
    cut: list[int]  # for each sentence pair, how many links were lost because a word lay behind `max_length` subwords
    pairs: list[Pair]  # what was encoded, all B of them


def encode_pairs(
    tokenizer, pairs: list[Pair], max_length: int = 96, parts: int = 1, device: Any = "cpu", process: tuple = (0, 1)
) -> Batch:
    """Turn linked sentence pairs into one batch; a sentence of more than `max_length` subwords is cut off there.

    process: (k, n) puts only the k-th of n equal shares of the sentences into the batch; loss and links are of all.
    """
    sentences, (k, n) = [pair.source for pair in pairs] + [pair.target for pair in pairs], process
    shares = shared_out(encode_words(tokenizer, sentences, max_length), parts, n, lambda window: len(window.ids))
    inputs = [pad_inputs([window.ids for window in group], tokenizer.pad_token_id, device) for group in shares[k]]
    first = torch.cat([pad([window.first for window in group], False).flatten() for group in shares[k]])
    shares = [list(itertools.chain(*share)) for share in shares]
    windows = list(itertools.chain(*shares))
    word = np.concatenate([window.words[window.first] for window in windows])  # of all processes
    sentence = np.repeat([window.sentence for window in windows], [window.first.sum() for window in windows])
    row = torch.full((len(sentences), max(map(len, sentences))), -1)  # (sentence, word) -> its number, -1 if cut off
    row[sentence, word] = torch.arange(len(word))
    pair = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(pair.links) for pair in pairs]))
    i, j = torch.tensor([link for pair in pairs for link in pair.links]).T
    source, target = row[pair, i], row[pair + len(pairs), j]
    kept = (source >= 0) & (target >= 0)
    cut = torch.bincount(pair[~kept], minlength=len(pairs)).tolist()
    source, target = source[kept], target[kept]
    indices = {"words": first.nonzero().squeeze(1)}
    indices |= {"queries": torch.cat([source, target]), "targets": torch.cat([target, source])}
    counts = [sum(int(window.first.sum()) for window in share) for share in shares]
    return Batch(inputs, **to_device(indices, device), counts=counts, cut=cut, pairs=pairs)


def contrastive_loss(words: Tensor, queries: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    """The "strong" alignment loss of Wu and Dredze (2020, https://arxiv.org/abs/2010.02537); a scalar.

        mean over queries (q, t) of  -log  exp(W_q . W_t / tau)  /  sum over w != q of exp(W_q . W_w / tau)

    words: (N, d) projected vectors of all words of the batch, of both languages, linked or not; W are these at unit
    length, and tau is the temperature. queries, targets: (Q,) indices into `words`. All other words are negatives.
    """
    words = F.normalize(words, dim=-1)
    similarity = words[queries] @ words.T / temperature  # (Q, N)
    similarity = similarity.scatter(1, queries[:, None], -math.inf)  # a word is not compared with itself
    return F.cross_entropy(similarity, targets, reduction="sum") / max(len(queries), 1)


def transformer_layers(encoder: nn.Module) -> nn.ModuleList:
    """The list of transformer layers of any encoder, found by its structure. UserError when there is none."""
    depth = getattr(encoder.config, "num_hidden_layers", None)
    for module in encoder.modules():  # from the outside to the inside
        if isinstance(module, nn.ModuleList) and len(module) == depth and len(set(map(type, module))) == 1:
            return module
    kind = type(encoder).__name__
    raise UserError(f"{kind} has no list of {depth} transformer layers of its own each: cannot freeze layers of it")


def embeddings(encoder: nn.Module) -> nn.Module:
    """Everything that turns subword ids into the first layer's input: the part that holds the word embeddings."""
    words, layers = encoder.get_input_embeddings(), transformer_layers(encoder)
    return next((p for p in encoder.children() if words in p.modules() and layers not in p.modules()), words)


def parse_spec(spec: str, depth: int) -> tuple[set[int], bool]:
    """(layers from 0, whether the embeddings too) that `none`, `full`, `front`, `back` or `emb,0-2,11` freezes."""
    half = depth // 2
    spec = {"front": f"0-{half - 1}", "back": f"{half}-{depth - 1}"}.get(spec, spec)
    frozen = set()
    for part in [] if spec in ("none", "full") else spec.split(","):
        if match := regex.fullmatch(r"(\d+)(?:-(\d+))?", part):
            low, high = int(match[1]), int(match[2] or match[1])
            if not low <= high < depth:
                raise UserError(f"layers '{part}' to freeze: this encoder has layers 0 to {depth - 1}")
            frozen.update(range(low, high + 1))
        elif part != "emb":
            raise UserError(f"cannot freeze '{part}': use front, back, or a list such as 0-5 or emb,0-2,11")
    return frozen, "emb" in spec.split(",")


def freeze(model: nn.Module, spec: str) -> list[str]:
    """Freeze the layers that `spec` names (see `parse_spec`); return the names of the parameters that no longer train.

    This is AlignFreeze. `front` is the lower half of the layers, `back` the upper half; as in the authors' code, the
    embeddings keep training unless `emb` is named.
    """
    encoder = model.base_model
    layers = transformer_layers(encoder)
    numbers, with_embeddings = parse_spec(spec, len(layers))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in [layers[k] for k in numbers] + [embeddings(encoder)] * with_embeddings:
        for parameter in part.parameters():
            parameter.requires_grad = False
    return [name for name in trained if not model.get_parameter(name).requires_grad]


def hidden_state(encoder: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """`hidden_states[layer]` of the encoder, (B, T, hidden): 0 is the embeddings' output, -1 the last layer's.

    No layer above it is computed: `hidden_states[k]` is the input of layer k, and the forward pass ends there.
    """
    layers = transformer_layers(encoder)
    layer %= len(layers) + 1
    if layer == len(layers):
        return encoder(**inputs).last_hidden_state

    class Reached(Exception): ...

    def stop(module, args, kwargs):
        raise Reached(args[0] if args else kwargs["hidden_states"])

    handle = layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        encoder(**inputs)
    except Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()


def realignment_loss(encoder, projection, batch: Batch, layer: int = -2, temperature: float = 0.1) -> Tensor:
    """The loss of one batch of sentence pairs: hidden states of one layer -> vectors of words -> contrastive loss."""
    hidden = [hidden_state(encoder, part, layer).flatten(0, 1) for part in embed(encoder, batch.inputs)]
    words = projection(torch.cat(hidden)[batch.words]).float()  # (subwords, hidden) -> (N, 128)
    return contrastive_loss(gather(words, batch.counts), batch.queries, batch.targets, temperature)


def gather(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes, (sum of `counts`, d); gradients flow to this process's own, (N, d).

    That is enough: every process computes the loss of the whole batch, and so has all of its own rows' gradient.
    """
    if len(counts) == 1:
        return rows
    padded = F.pad(rows.detach(), (0, 0, 0, max(counts) - len(rows)))
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    parts[processes()[0]] = rows
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


def projection_head(hidden: int, size: int = 128) -> nn.Module:
    """Maps hidden states to the space where words are compared; trained with the encoder, thrown away afterwards."""
    return nn.Sequential(nn.Linear(hidden, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, size, bias=False))


def realignment_batches(
    tokenizer: Any, pairs: Iterator[Pair], batch_size: int = 16, max_length: int = 96, device: Any = "cpu"
) -> Iterator[Batch]:
    """One batch of sentence pairs after the other, on its device."""
    parts = PARTS.get(torch.device(device).type, 1)
    for chunk in in_chunks(pairs, batch_size):
        yield encode_pairs(tokenizer, chunk, max_length, parts, device, processes())


def tally(seen: dict[str, Counter], batch: Batch) -> None:
    """Count what is in a batch, by language."""
    for pair, cut in zip(batch.pairs, batch.cut):
        counts = seen.setdefault(pair.language, Counter())
        counts.update(sentences=1, words=len(pair.links) - cut, cut=cut, skipped=pair.skipped)
        counts["readings"] = pair.reading  # how often its text was begun


def realign(
    model: nn.Module, tokenizer: Any, pairs: Iterator[Pair], *, steps: int, spec: str = "none", lr: float = DEFAULT_LR,
    seed: int = 31, batch_size: int = 16, max_length: int = 96, layer: int = -2, temperature: float = 0.1,
    precision: str = "fp32", state: dict | None = None, keep: Callable | None = None,
) -> dict[str, Counter]:  # fmt: skip
    """Realign an encoder in place: `steps` batches of sentence pairs, the layers that `spec` names frozen meanwhile.

    model: an encoder, or a model with one inside (`base_model`); only the encoder changes. Adam at a constant learning
    rate. layer: which of the hidden states is realigned, as in the authors' code the output of the layer before the
    last. state: what `load_state` found, to go on from there. keep: called now and then and at the end, as `save_state`
    is, without the folder. Returns what was seen of each language. UserError when the loss is not finite.
    """
    torch.manual_seed(seed + 1000 * processes()[0])  # processes differ in their dropout, not in their weights
    encoder, state = model.base_model.train(), state or {"step": 0, "seen": {}}
    done, seen = state["step"], {language: Counter(counts) for language, counts in state["seen"].items()}
    projection = projection_head(encoder.config.hidden_size).to(model.device)
    frozen = freeze(encoder, spec)
    if getattr(encoder, "pooler", None):  # some tasks add one; with and without, gradients are to be summed alike
        encoder.pooler.requires_grad_(False)

    def loss(batch: Batch) -> Tensor:
        tally(seen, batch)
        return realignment_loss(encoder, projection, batch, layer, temperature)

    still = sum(encoder.get_parameter(name).numel() for name in frozen) / encoder.num_parameters()
    stage, objective = (
        f"realign, {still:.0%} of the parameters frozen",
        Objective(loss, [encoder, projection], precision),
    )
    pairs = itertools.islice(pairs, done * batch_size, None)
    batches = realignment_batches(tokenizer, pairs, batch_size, max_length, model.device)
    descend(stage, objective, batches, steps, lr, state=state, keep=partial(keep, seen) if keep else None)
    encoder.requires_grad_(True)  # every layer trains again in fine-tuning
    return seen


def shielded_loss(model: nn.Module, projection: nn.Module, spec: str, seen: dict[str, Counter], **settings) -> Callable:
    """A realignment loss whose gradient does not reach the layers that `spec` names; any other loss still trains them.

    For realignment during fine-tuning: the layers are frozen while the graph of this loss is built, and then only.
    """

    def loss(batch: Batch) -> Tensor:
        tally(seen, batch)
        freeze(model, spec)
        value = realignment_loss(model.base_model, projection, batch, **settings)
        model.requires_grad_(True)
        return value

    return loss


class Objective(nn.Module):
    """A loss of a batch, together with the modules that it trains: what DistributedDataParallel wraps."""

    def __init__(self, loss: Callable[[Any], Tensor], modules: list[nn.Module], precision: str = "fp32"):
        super().__init__()
        self.loss, self.trained, self.precision = loss, nn.ModuleList(modules), precision

    def forward(self, batch: Any) -> Tensor:
        device = next(self.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.loss(batch)


def parallel(objective: Objective) -> nn.Module:
    """The same loss, whose gradients are averaged over all processes; they begin with the weights of process 0."""
    if processes()[1] == 1:
        return objective
    return DistributedDataParallel(objective, find_unused_parameters=True, forward_sync_buffers=False)


def descend(
    stage: str, objective: Objective, batches: Iterator, steps: int, lr: float, decay: bool = False,
    state: dict | None = None, keep: Callable | None = None,
) -> None:  # fmt: skip
    """One step of Adam for each batch, at a constant learning rate, or with 10% of warm-up and a linear decay to 0.

    With several processes, each computes its share of a batch, and their gradients are averaged. Shows a bar with loss
    and time left when a person watches, and a line at the end. Losses stay on their device: only every 20 steps are
    they waited for. UserError when they are not finite. state, keep: see `realign`.
    """
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps) if decay else None
    compute, losses, done, start = parallel(objective), [], 0, time.time()
    if state and (done := state["step"]):
        say(f"{stage}: goes on after step {done} of {steps}, which an earlier run took")
        restore(objective, optimizer, state)
    if done == steps:
        return
    last_kept = start

    def mean(part: list[Tensor]) -> float:
        value = torch.stack(part).float().mean().item()
        if not math.isfinite(value):
            raise UserError(f"{stage}: the loss is {value} by step {done + len(losses)}; lower the learning rate")
        return value

    bar = progress(ahead(itertools.islice(batches, steps - done)), stage, steps - done)
    for batch in bar:
        loss = compute(batch)
        (loss * processes()[1]).backward()  # of which DistributedDataParallel takes the mean
        optimizer.step()
        if schedule:
            schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if len(losses) % 20 == 0:
            bar.set_postfix(loss=f"{mean(losses[-20:]):.3f}")
            if keep and agreed(time.time() - last_kept > KEEP_SECONDS):
                keep(objective, optimizer, done + len(losses), last=False)
                last_kept = time.time()
    change = f"loss {mean(losses[:20]):.3f} -> {mean(losses[-20:]):.3f}"
    say(f"{stage}: {len(losses)} steps, {change}, {time.time() - start:.1f} s")
    if keep:
        keep(objective, optimizer, steps, last=True)


def progress(items: Iterable, stage: str, total: int | None = None) -> tqdm:
    """A bar for a person who watches, and for a log file nothing."""
    return tqdm(items, stage, total, leave=False, disable=None if processes()[0] == 0 else True)


def fingerprint(model: nn.Module, tokenizer: Any, *settings: Any) -> str:
    """A name for what an encoder becomes or computes here, with these settings and this script, whatever the task."""
    words = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None}  # left over from the last call
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("id2label", "label2id", "_name_or_path")}
    here = [SCRIPT, torch.__version__, transformers.__version__, device_name(model.device), torch.get_num_threads()]
    here += [processes()[1], tokenizer.model_max_length, config, words]
    key = hashlib.sha256(json.dumps([*settings, *here], default=str).encode())
    for name, weights in model.base_model.state_dict().items():
        if not name.startswith("pooler."):  # which only some tasks add
            key.update(weights.cpu().contiguous().numpy())
    return key.hexdigest()[:16]


def load_state(folder: Path, steps: int) -> dict:
    """Where the realignment of this folder is after `steps` steps, or the latest state from which it can get there."""
    earlier = {int(path.stem.split("-")[1]): path for path in folder.glob("resume-*.pt")}
    exact, earlier = folder / f"step-{steps}.pt", [earlier[step] for step in sorted(earlier) if step <= steps]
    path = agreed(exact if exact.exists() else earlier[-1] if earlier else None)
    with explained(f"{path}: cannot be read; start again if another run has just replaced it, else delete it"):
        return torch.load(path, "cpu", weights_only=True) if path else {}


def save_state(folder: Path, seen: dict, objective: Objective, optimizer: Any, step: int, last: bool) -> None:
    """Write down where a realignment is: `step-N.pt` at its end, and `resume-N.pt`, of which only the farthest is kept.

    The first holds the weights that have moved, the second all that later steps depend on.
    """
    trained = {name: p for name, p in objective.named_parameters() if p in optimizer.state}
    state = {"step": step, "seen": {language: dict(counts) for language, counts in seen.items()}}
    state["weights"] = {name: p.detach() for name, p in trained.items()}
    numbers = [module.get_rng_state() for module in (torch, torch.cuda)[: 1 + torch.cuda.is_initialized()]]
    more = {"adam": {name: optimizer.state[p] for name, p in trained.items()}, "random": everywhere(numbers)}
    earlier = {path: int(path.stem.split("-")[1]) for path in folder.glob("resume-*.pt")}
    if processes()[0] > 0:  # one of them writes
        return
    try:
        if last:
            with whole(folder / f"step-{step}.pt") as file:
                torch.save(state, file)
        if step > max(earlier.values(), default=0):
            with whole(folder / f"resume-{step}.pt") as file:
                torch.save(state | more, file)
            for path in earlier:
                path.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other; the run does not need the cache
        say(f"--realign-cache: step {step} is not kept ({' '.join(str(error.__context__ or error).split())})")


def restore(objective: Objective, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put weights, optimiser and random numbers back to where they were, and empty the state."""
    for name, weights in state["weights"].items():
        parameter = objective.get_parameter(name)
        parameter.data.copy_(weights)
        for key, value in state["adam"][name].items() if "adam" in state else []:
            optimizer.state[parameter][key] = value.to(parameter.device)
    if "random" in state:
        for module, numbers in zip((torch, torch.cuda), state["random"][processes()[0]]):
            module.set_rng_state(numbers)
    state.clear()  # gigabytes


def hold_out(streams: dict[str, Iterator[Pair]], used: int) -> tuple[dict, dict[str, list[Pair]]]:
    """For the probe: ({language: its first `used` pairs, as a stream again}, {language: pairs that follow}).

    Those that follow are of the first reading of the text and not among the first ones: never realigned on. Of their
    links, each word keeps only its first. UserError if a text has none of them.
    """
    first, rest = {}, {}
    for language, stream in streams.items():
        pairs, linked, rest[language] = list(itertools.islice(stream, used + PROBE_PAIRS)), set(), []
        first[language], known = iter(pairs[:used]), {(*pair.source, "", *pair.target) for pair in pairs[:used]}
        for pair in pairs[used:]:
            links = []
            for i, j in pair.links if pair.reading == 1 and (*pair.source, "", *pair.target) not in known else []:
                words = {(SOURCE, pair.source[i]), (language, pair.target[j])}
                if not words & linked:
                    links.append((i, j))
                    linked |= words
            rest[language] += [pair._replace(links=links)] * bool(links)
        if not rest[language]:
            raise UserError(f"--probe: realignment reads all linked pairs of {SOURCE}-{language}; take fewer steps")
    return first, rest


@torch.inference_mode()
def retrieval(model: nn.Module, tokenizer: Any, pairs: list[Pair], max_length: int = 96) -> list[float]:
    """For each of the hidden states, how often the nearest word of the other language is the one that it is linked to.

    Among all linked words of the pairs, by cosine, in both directions; the embeddings' output comes first.
    """
    batch = encode_pairs(tokenizer, pairs, max_length, math.ceil(len(pairs) / 16), model.device)
    encoder, half, shares = model.base_model.eval(), len(batch.queries) // 2, []
    if not half:
        raise UserError(f"--probe: no linked word of {pairs[0].language} lies within {max_length} subwords")
    parts = [encoder(**part, output_hidden_states=True).hidden_states for part in batch.inputs]
    for states in zip(*parts):  # of one layer: (sentences, T, hidden) of each part
        words = F.normalize(torch.cat([part.flatten(0, 1) for part in states])[batch.words].float(), dim=-1)
        similarity = words[batch.queries[:half]] @ words[batch.targets[:half]].T  # (linked words, linked words)
        place = torch.arange(half, device=similarity.device)
        right = torch.cat([similarity.argmax(0) == place, similarity.argmax(1) == place])
        shares.append(round(right.float().mean().item(), 6))
    return shares


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights of the embeddings (`emb`) and of each layer (`0`, `1`, ...), one vector each."""
    layers = transformer_layers(model.base_model)
    parts = {"emb": embeddings(model.base_model)} | {str(k): layer for k, layer in enumerate(layers)}
    return {name: torch.cat([p.detach().flatten() for p in part.parameters()]).cpu() for name, part in parts.items()}


def drift(start: dict[str, Tensor], model: nn.Module) -> dict[str, float]:
    """How far the weights of each layer moved: Frobenius norm of the change, relative to that of the weights before."""
    now = layer_weights(model)
    return {name: round(((now[name] - weights).norm() / weights.norm()).item(), 6) for name, weights in start.items()}


# ---- 4. Tasks: a new one is three functions here and a row in TASKS -----------------------------------------------
# load(language, split, args)                        -> examples, a list of dicts
# encode(tokenizer, examples, max_length, training)  -> features: arrays `input_ids` and `labels`; `example`, the index
#                                                       of the example that they come from; `cut`, if not all of it is
# score(examples, features, logits)                  -> {metric: value}, the task's main metric first


def read_rows(folder: str, language: str, split: str, args, *hub: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) of a data set: JSON lines of --data-dir, or name, configuration and split of the hub."""
    if args.data_dir:
        path = args.data_dir / folder / language / f"{split}.jsonl"
        for number, line in read_lines(path):
            with explained(f"{path}:{number}: not a line of JSON in whole characters"):
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # fails for half a surrogate pair such as "\\ud800"
            yield f"{path}:{number}", row
    else:
        name = " ".join(hub)
        with explained(f"cannot load {name} from the hub; check language and network, or use --data-dir"):
            rows = datasets.load_dataset(*hub[:2], split=hub[2])
        for number, row in enumerate(rows):
            yield f"{name}, row {number}", row


def columns(where: str, row: Any, **kinds: type) -> list:
    """The values of these columns. UserError if one is missing or of another type."""
    for name, kind in kinds.items():
        if type(row) is not dict or type(row.get(name)) is not kind:  # not isinstance, for which True is an int
            raise UserError(f"{where}: no column '{name}' of type {kind.__name__}")
    return [row[name] for name in kinds]


def load_udpos(language: str, split: str, args: argparse.Namespace) -> list[dict]:
    """Sentences of a Universal Dependencies treebank, words and tags from CoNLL-U (https://universaldependencies.org).

    As in the authors' code, a multi-word range (`3-4 du _`) is a token of its own with tag `_`, 18 tags in all; with
    --syntactic-words it is left out, and the 17 tags of the standard measure remain. Empty nodes (`8.1`) are no tokens.
    """
    if args.data_dir:
        path = args.data_dir / "udpos" / language / f"{split}.conllu"
    else:
        treebank = TREEBANKS[language]
        path = fetch(UD_URL.format(treebank, language, treebank.split("-")[1].lower(), split))
    examples, tokens, tags = [], [], []
    for number, line in itertools.chain(read_lines(path), [(0, "")]):
        if not line.strip():
            if tokens:
                examples.append({"tokens": tokens, "tags": tags})
            tokens, tags = [], []
        elif not line.startswith("#"):
            fields = line.split("\t")
            if len(fields) != 10 or not TOKEN_ID.fullmatch(fields[0]) or not fields[1]:
                raise UserError(f"{path}:{number}: not a CoNLL-U line of ID, FORM and 8 more columns: {line[:60]!r}")
            if "." in fields[0] or ("-" in fields[0] and args.syntactic_words):
                continue
            if fields[3] not in UPOS:
                raise UserError(f"{path}:{number}: '{fields[3]}' is not one of the UPOS tags {' '.join(UPOS)}")
            tokens.append(fields[1])
            tags.append(UPOS.index(fields[3]))
    if not examples:
        raise UserError(f"{path}: no sentence in this file")
    return examples


def load_wikiann(language: str, split: str, args: argparse.Namespace) -> list[dict]:
    """Sentences of WikiANN (https://huggingface.co/datasets/unimelb-nlp/wikiann). Chinese is split by character."""
    examples = []
    for where, row in read_rows("wikiann", language, split, args, "unimelb-nlp/wikiann", language, split):
        tokens, tags = columns(where, row, tokens=list, ner_tags=list)
        if len(tokens) != len(tags) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise UserError(f"{where}: {len(tokens)} tokens with {len(tags)} tags; expected as many words as tags")
        if wrong := [tag for tag in tags if type(tag) is not int or tag not in range(7)]:
            raise UserError(f"{where}: '{wrong[0]}' is not one of the tags 0 to 6 (O, B-PER, I-PER, B-ORG ... I-LOC)")
        examples.append({"tokens": tokens, "tags": tags})
    return examples


def encode_tokens(tokenizer, examples: list[dict], max_length: int, training: bool) -> list[dict]:
    """Token classification: a word's first visible subword carries its tag; long sentences go on in more windows."""
    features, seen = [], Counter()
    for window in encode_words(tokenizer, [example["tokens"] for example in examples], max_length, windows=True):
        labels = np.where(window.first, np.array(examples[window.sentence]["tags"])[window.words], IGNORE)
        features.append({"example": window.sentence, "input_ids": window.ids, "labels": labels})
        seen[window.sentence] += window.first.sum()
    for feature in features:  # a word of invisible characters only has no subword, and is not scored
        feature["cut"] = seen[feature["example"]] < len(examples[feature["example"]]["tokens"])
    return features


def score_accuracy(examples: list[dict], features: list[dict], logits: list[np.ndarray]) -> dict[str, float]:
    """The share of labels that are predicted: of words (PoS tagging), or of sentence pairs (NLI)."""
    labels = np.concatenate([feature["labels"] for feature in features])
    predictions = np.concatenate([row.argmax(-1).reshape(-1) for row in logits])
    return {"accuracy": float((predictions == labels)[labels != IGNORE].mean())}


def entities(tags: np.ndarray, repair: bool) -> set[tuple[int, int, int]]:
    """(first word, last word, type) of the entities in a row of tags (0 is O, 2k - 1 is B and 2k I of type k).

    An I that follows no entity begins one; so does an I of another type, as in conlleval, or else with `repair`, which
    the authors do to predictions, it changes the type of the entity that it goes on with.
    """
    kind = (tags + 1) // 2
    before = np.append(0, kind[:-1])
    start = (tags % 2 == 1) | ((tags > 0) & ((before == 0) if repair else (before != kind)))
    end = (kind > 0) & np.append(start[1:] | (kind[1:] == 0), True)
    return set(zip(np.flatnonzero(start), np.flatnonzero(end), kind[end]))


def score_entities(examples: list[dict], features: list[dict], logits: list[np.ndarray]) -> dict[str, float]:
    """F1 of whole entities, over all sentences together (https://aclanthology.org/W03-0419, and `entities`)."""
    gold, predicted = [], []
    for at, (feature, row) in enumerate(zip(features, logits)):
        words = feature["labels"] != IGNORE
        gap = [0] * (at == 0 or feature["example"] != features[at - 1]["example"])  # an O between sentences
        gold += [gap, feature["labels"][words]]
        predicted += [gap, row.argmax(-1)[words]]
    gold = entities(np.concatenate(gold).astype(int), repair=False)
    predicted = entities(np.concatenate(predicted).astype(int), repair=True)
    return {"f1": 2 * len(gold & predicted) / max(len(gold) + len(predicted), 1)}


def load_xnli(language: str, split: str, args: argparse.Namespace) -> list[dict]:
    """Sentence pairs of XNLI (https://huggingface.co/datasets/facebook/xnli); the English training set is MultiNLI."""
    examples = []
    for where, row in read_rows("xnli", language, split, args, "facebook/xnli", language, split):
        premise, hypothesis, label = columns(where, row, premise=str, hypothesis=str, label=int)
        if label not in range(3):
            raise UserError(f"{where}: label {label}; expected 0 (entailment), 1 (neutral) or 2 (contradiction)")
        examples.append({"premise": premise, "hypothesis": hypothesis, "label": label})
    return examples


def encode_sentences(tokenizer, examples: list[dict], max_length: int, training: bool) -> list[dict]:
    """Sentence pairs in one input; the longer one is cut off until both fit."""
    texts = [[example[side] for example in examples] for side in ("premise", "hypothesis")]
    encoded = tokenizer(*texts, truncation="longest_first", max_length=max_length, return_attention_mask=False)
    features = []
    for k, example in enumerate(examples):
        arrays = {name: np.array(encoded[name][k]) for name in encoded}
        cut = bool(encoded.encodings[k].overflowing)
        features.append({"example": k, **arrays, "labels": np.array([example["label"]]), "cut": cut})
    return features


def load_xquad(language: str, split: str, args: argparse.Namespace) -> list[dict]:
    """Questions of SQuAD (training) and XQuAD (https://huggingface.co/datasets/google/xquad), answered in a context."""
    hub = "google/xquad", f"xquad.{language}", "validation"
    if split == "train":
        hub = "rajpurkar/squad", "plain_text", "train"
    examples = []
    for where, row in read_rows("xquad", language, split, args, *hub):
        question, context, answers = columns(where, row, question=str, context=str, answers=dict)
        texts, starts = columns(where, answers, text=list, answer_start=list)
        typed = all(type(text) is str for text in texts) and all(type(start) is int for start in starts)
        if not typed or not texts or len(texts) != len(starts) or not all(
            start >= 0 and context[start : start + len(text)] == text != "" for text, start in zip(texts, starts)
        ):  # fmt: skip
            raise UserError(f"{where}: answers {str(texts)[:60]} are not in the context at {str(starts)[:30]}")
        examples.append(
            {"language": language, "question": question, "context": context, "texts": texts, "starts": starts}
        )
    return examples


def encode_questions(tokenizer, examples: list[dict], max_length: int, training: bool) -> list[dict]:
    """A question with every window of its context, which overlap by a quarter of `max_length` (32 of 128 subwords).

    `labels` are the first and the last subword of the first answer, 0 and 0 where the window does not hold all of it.
    `offsets`, (T, 2), say where in the context every subword begins and ends, -1 for all others.
    """
    questions, contexts = ([example[name] for example in examples] for name in ("question", "context"))
    options = {"truncation": True, "max_length": max_length // 2, "add_special_tokens": False}
    kept = tokenizer(questions, **options)
    dropped = [encoding.overflowing and encoding.overflowing[0].offsets[0][0] for encoding in kept.encodings]
    questions = [q[:start] if start else q for q, start in zip(questions, dropped)]  # overlong ones are cut
    encoded = tokenizer(
        questions, contexts, truncation="only_second", max_length=max_length, stride=max_length // 4,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_attention_mask=False,
    )  # fmt: skip
    windows, features = encoded.pop("overflow_to_sample_mapping"), []
    offset_mapping = encoded.pop("offset_mapping")
    for k, example in enumerate(windows):
        inside = np.array([part == 1 for part in encoded.sequence_ids(k)])
        offsets = np.where(inside[:, None], np.array(offset_mapping[k]), -1).astype(np.int32)
        start = examples[example]["starts"][0]
        end = start + len(examples[example]["texts"][0])
        first, last = (np.flatnonzero((offsets[:, 0] <= at) & (at < offsets[:, 1])) for at in (start, end - 1))
        labels = np.array([first[0], last[-1]] if len(first) and len(last) else [0, 0])
        arrays = {name: np.array(encoded[name][k]) for name in encoded}
        features.append({"example": example, **arrays, "labels": labels, "offsets": offsets})
    answered = {feature["example"] for feature in features if feature["labels"].any()}
    for feature in features:
        feature["cut"] = bool(dropped[feature["example"]]) or (training and feature["example"] not in answered)
    return features


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and surplus blanks, as in SQuAD's evaluation."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def compare_answers(prediction: str, references: list[str], language: str) -> dict[str, float]:
    """F1 of words and exact match, official (Rajpurkar et al. 2016: the best of all references), and as the authors do:

    the first reference only, F1 of sets of words, 2PR / max(1, P + R), exact match of raw strings except in English.
    """
    words = normalise_answer(prediction).split()
    f1, em = [], []
    for reference in map(normalise_answer, references):
        same = sum((Counter(words) & Counter(reference.split())).values())
        f1.append(2 * same / max(len(words) + len(reference.split()), 1))
        em.append(float(words == reference.split()))
    first = set(normalise_answer(references[0]).split())
    precision, recall = (len(first & set(words)) / max(len(side), 1) for side in (set(words), first))
    authors = 2 * precision * recall / max(1, precision + recall)
    raw = em[0] if language == SOURCE else float(prediction == references[0])
    return {"f1": max(f1), "em": max(em), "f1_authors": authors, "em_authors": raw}


def score_answers(examples: list[dict], features: list[dict], logits: list[np.ndarray]) -> dict[str, float]:
    """The best answer of all windows, the highest sum of its two ends' logits, compared with the gold answers."""
    best = [(-math.inf, "")] * len(examples)
    for feature, ends in zip(features, logits):  # ends: (2, T or longer)
        offsets, example = feature["offsets"], examples[feature["example"]]
        start, end = np.where(offsets[:, 0] >= 0, ends[:, : len(offsets)], -math.inf)
        allowed = np.triu(np.tri(len(offsets), k=ANSWER_LENGTH - 1))  # the end not before the start, nor far behind it
        score = np.where(allowed, start[:, None] + end, -math.inf)
        first, last = divmod(score.argmax(), len(offsets))
        answer = example["context"][offsets[first, 0] : offsets[last, 1]].strip()
        best[feature["example"]] = max(best[feature["example"]], (float(score[first, last]), answer))
    scores = [compare_answers(text, e["texts"], e["language"]) for e, (_, text) in zip(examples, best)]
    return {metric: sum(score[metric] for score in scores) / len(scores) for metric in scores[0]}


class Task(NamedTuple):  # a row of TASKS
    head: type  # the transformers class: an encoder and a classifier
    labels: int  # how many
    targets: list[str]  # the paper's target languages
    epochs: int
    max_length: int  # subwords in training, special tokens included
    test_length: int  # and in evaluation
    load: Callable
    encode: Callable
    score: Callable


NLI_TARGETS, QA_TARGETS = "ar bg de el es fr hi ru th tr vi zh".split(), "ar de el es hi ro ru th tr vi zh".split()
TASKS = {
    "udpos": Task(Tokens, 18, TARGETS, 5, 96, 128, load_udpos, encode_tokens, score_accuracy),
    "wikiann": Task(Tokens, 7, TARGETS, 5, 96, 128, load_wikiann, encode_tokens, score_entities),
    "xnli": Task(Sentences, 3, NLI_TARGETS, 2, 96, 256, load_xnli, encode_sentences, score_accuracy),
    "xquad": Task(Answers, 2, QA_TARGETS, 5, 128, 128, load_xquad, encode_questions, score_answers),
}


# ---- 5. Fine-tuning on English, evaluation in every language (paper, appendix A) -------------------------------------


def collate(features: list[dict], pad_id: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """(what the encoder reads, (B, T) tensors; labels, (B, T) or (B, labels of an example)) of a batch of features."""
    inputs = pad_inputs([feature["input_ids"] for feature in features], pad_id, device)
    more = {"labels": pad([feature["labels"] for feature in features], IGNORE)}
    if "token_type_ids" in features[0]:
        more["token_type_ids"] = pad([feature["token_type_ids"] for feature in features], 0)
    inputs |= to_device(more, device)
    return inputs, inputs.pop("labels")


def task_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(B, T, labels) for token classification, (B, labels) for sentences, (B, 2, T) for the two ends of an answer."""
    output = model(**inputs)
    if "logits" in output:
        return output.logits
    ends = torch.stack([output.start_logits, output.end_logits], dim=1)
    return ends.masked_fill(inputs["attention_mask"][:, None] == 0, -math.inf)


def finetune(
    model: nn.Module, features: list[dict], pad_id: int, *, epochs: int, batch_size: int = 32, lr: float = DEFAULT_LR,
    precision: str = "fp32", seed: int = 31, realignment: tuple[nn.Module, Iterator[Batch], Callable] | None = None,
) -> int:  # fmt: skip
    """Fine-tune all layers of the model in place; return the number of steps.

    Adam; the learning rate rises linearly over the first 10% of the steps, then falls linearly to 0. realignment, for
    the schedule `during`: a projection to train as well, batches of sentence pairs, and the loss of such a batch, which
    is added with a weight of 0.1.
    """
    torch.manual_seed(seed + 1000 * processes()[0])
    model.train()
    projection, pairs, realignment_loss = realignment or (nn.Identity(), itertools.repeat(None), None)

    def loss(batch: tuple) -> Tensor:
        examples, pairs = batch
        total = task_loss(model, examples)
        return total + REALIGNMENT_WEIGHT * realignment_loss(pairs) if realignment else total

    batches = zip(task_batches(features, pad_id, epochs, batch_size, seed, model.device), pairs)
    steps = epochs * math.ceil(len(features) / batch_size)
    descend("fine-tune", Objective(loss, [model, projection], precision), batches, steps, lr, decay=True)
    return steps


def task_batches(features: list, pad_id: int, epochs: int, size: int, seed: int, device: Any) -> Iterator[tuple]:
    """One batch of `size` examples after the other, which every epoch shuffles anew, on their device."""
    order = random.Random(seed)
    for _ in range(epochs):
        for batch in in_chunks(iter(order.sample(features, len(features))), size):
            yield task_batch(batch, pad_id, PARTS.get(torch.device(device).type, 1), device, processes())


def task_batch(batch: list[dict], pad_id: int, parts: int = 1, device: Any = "cpu", process: tuple = (0, 1)) -> tuple:
    """([(inputs, labels) of each part, as `collate` makes them], how many labels all of the batch has).

    process: (k, n) takes only the k-th of n equal shares of the examples. Where there are fewer examples than
    processes, some get an example without labels.
    """
    k, n = process
    labels = torch.tensor(max(1, sum((feature["labels"] != IGNORE).sum() for feature in batch)))  # 0 in a long word
    batch = batch + [batch[0] | {"labels": np.full_like(batch[0]["labels"], IGNORE)}] * (n - len(batch))
    groups = shared_out(batch, parts, n, lambda feature: len(feature["input_ids"]))[k]
    return [collate(group, pad_id, device) for group in groups], labels.to(device, non_blocking=True)


def task_loss(model: nn.Module, batch: tuple[list[tuple[dict, Tensor]], Tensor]) -> Tensor:
    """The mean cross-entropy over all labels of a batch, as `task_batch` makes it."""
    inputs, labels = zip(*batch[0])
    logits = [task_logits(model, part).flatten(0, -2) for part in embed(model, inputs)]
    width = max(part.shape[-1] for part in logits)  # differs between parts where the labels are places in the text
    logits = torch.cat([F.pad(part, (0, width - part.shape[-1]), value=-math.inf) for part in logits]).float()
    labels = torch.cat([part.flatten() for part in labels])
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    if processes()[1] > 1:
        total = loss.detach().clone()
        dist.all_reduce(total)
        loss = total + (loss - loss.detach())
    return loss / batch[1]


@torch.inference_mode()
def evaluate(model, task: Task, examples: list, features: list[dict], pad_id: int, precision="fp32", size=32) -> dict:
    """Scores of the model on the examples of one language: {metric: value between 0 and 1}."""
    model.eval()
    logits: list = [None] * len(features)  # of each feature, without padding: (T, labels), (labels,) or (2, T)
    order = sorted(range(len(features)), key=lambda k: len(features[k]["input_ids"]))
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        inputs, _ = collate([features[k] for k in chunk], pad_id, model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = task_logits(model, inputs).float().cpu().numpy()
        if np.isnan(output).any():
            raise UserError("evaluate: the model predicts no numbers; try a lower learning rate")
        for k, row in zip(chunk, output):
            logits[k] = row[: len(features[k]["labels"])] if row.ndim == 2 else row
    return {metric: round(value, 6) for metric, value in task.score(examples, features, logits).items()}


def evaluate_all(model: nn.Module, task: Task, tests: dict[str, tuple[list, list]], *settings) -> dict[str, dict]:
    """{language: its scores}. With several processes, each takes some of the languages."""
    k, n = processes()
    own = {code: evaluate(model, task, *tests[code], *settings) for code in progress(list(tests)[k::n], "evaluate")}
    scores = everywhere(own)
    return {code: scores[number % n][code] for number, code in enumerate(tests)}


# ---- 6. One run: check everything, realign, fine-tune, evaluate, write the record ------------------------------------


def load_tokenizer(name: str, flag: str = "--model") -> tuple[Any, Any]:
    """(tokenizer, config) of an encoder. UserError, before anything is computed, for a model that cannot be used."""
    with explained(f"{flag} {name}: no hub id and no local directory that loads"):
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        kind = "a sequence-to-sequence model" if config.is_encoder_decoder else "not an encoder of text"
        raise UserError(f"{flag} {name}: {config.model_type} is {kind}; take an encoder such as xlm-roberta-base")
    if not tokenizer.is_fast or tokenizer.pad_token_id is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{flag} {name}: has no fast tokenizer with words and a padding token; are its files missing?")
    positions = getattr(config, "max_position_embeddings", math.inf) - 2 * ("roberta" in config.model_type)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)  # RoBERTa counts positions from 2
    return tokenizer, config


def resolve(args: argparse.Namespace) -> dict:
    """Fill in the paper's value wherever a flag was not given; return what differs from it, for the record's name."""
    task, lr = TASKS[args.task], MODELS.get(Path(args.model).name, DEFAULT_LR)
    paper = {"data_dir": None, "limit_train": None, "limit_test": None, "languages": task.targets, "precision": "fp32"}
    paper |= {"max_length": task.max_length, "epochs": task.epochs, "batch_size": 32, "lr": lr, "probe": False}
    paper |= {"syntactic_words": False}
    realignment = {"realign_languages": TARGETS, "realign_steps": None, "realign_batch_size": 16, "realign_lr": lr}
    realignment |= {"realign_max_length": 96, "layer": -2, "temperature": 0.1}
    realignment |= {"aligner_model": "bert-base-multilingual-cased", "aligner_layer": 8}
    args.probe = args.probe and args.aligner  # whose word pairs it measures
    unused = []  # settings that do not matter for this run
    if args.strategy == "baseline" and not args.probe:  # one baseline serves all of them
        unused += realignment
    if args.schedule == "during":  # steps and learning rate are those of fine-tuning
        unused += ["realign_steps", "realign_lr"]
    if args.aligner != "awesome":
        unused += ["aligner_model", "aligner_layer"]
    if args.strategy == "baseline":
        args.aligner = args.schedule = "none"
    vars(args).update(dict.fromkeys(unused))
    paper |= {name: value for name, value in realignment.items() if name not in unused}
    for name, value in paper.items():
        given = getattr(args, name)
        setattr(args, name, value if given is None else list(dict.fromkeys(given)) if type(given) is list else given)
    return {name: getattr(args, name) for name, value in paper.items() if getattr(args, name) != value}


def shown(args: argparse.Namespace) -> dict:
    """The settings as a record shows them: of a path only the last part, and nothing of where things go."""
    paths = ("model", "aligner", "aligner_model", "data_dir", "probe")
    elsewhere = ("out", "overwrite", "device", "save_model", "write_links", "realign_cache")
    values = {key: value for key, value in vars(args).items() if key not in elsewhere}
    return {key: Path(value).absolute().name if key in paths and value else value for key, value in values.items()}


def record_name(args: argparse.Namespace, changed: dict) -> str:
    """`<model>_<task>_<strategy>_<schedule>_<aligner>_<seed>`, and whatever differs from the paper's settings."""
    values = {key: "-".join(value) if isinstance(value, list) else str(value) for key, value in shown(args).items()}
    parts = [values[key] for key in RECORD_KEYS] + [f"{key.replace('_', '-')}={values[key]}" for key in changed]
    name = "_".join(parts)
    if len(name) > 200:  # file systems allow 255
        name = f"{name[:180]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def check_flags(args: argparse.Namespace, aligner: str, config: Any, longest: int) -> None:
    """Whatever can be known to be wrong before any data is read. UserError."""
    depth, shortest = getattr(config, "num_hidden_layers", 0), 24 if args.task == "xquad" else 8
    parse_spec("none" if args.strategy == "baseline" else args.strategy, depth)
    if args.realign_languages:  # word pairs are used
        if not -depth - 1 <= args.layer <= depth:
            raise UserError(f"--layer {args.layer}: this encoder has hidden states {-depth - 1} to {depth}")
        if not 8 <= args.realign_max_length <= longest:
            raise UserError(f"--realign-max-length {args.realign_max_length}: must be 8 to {longest} subwords")
        if aligner not in ALIGNERS and (not Path(aligner).is_dir() or Path(aligner).name in ALIGNERS):
            raise UserError(
                f"--aligner {aligner}: neither {', '.join(ALIGNERS)} nor a folder of Pharaoh files of another name"
            )
        if aligner not in ALIGNERS and args.write_links:
            raise UserError(f"--write-links: the links of {aligner} are stored already")
    elif args.write_links:
        raise UserError("--write-links: a baseline without --probe aligns no text; take another --strategy")
    if not shortest <= args.max_length <= longest:
        raise UserError(f"--max-length {args.max_length}: must be {shortest} to {longest} subwords with this encoder")
    if processes()[1] > (most := 2 * args.realign_batch_size if args.realign_languages else args.batch_size):
        raise UserError(f"{processes()[1]} processes, but a batch is of {most} sentences: start fewer with torchrun")
    for flag in ("languages", "realign_languages"):
        unknown = [code for code in getattr(args, flag) or [] if code not in TREEBANKS]
        if malformed := [code for code in unknown if not regex.fullmatch(r"[\w-]+", code)]:
            raise UserError(f"--{flag.replace('_', '-')}: '{malformed[0]}' is no language code")
        if unknown and not args.data_dir and (flag != "languages" or args.task == "udpos"):  # else the hub knows
            known = " ".join(TREEBANKS)
            raise UserError(f"--{flag.replace('_', '-')}: no '{unknown[0]}' on the hub; take some of {known}")
    if args.realign_cache and args.schedule != "before":
        raise UserError("--realign-cache: this run does not realign before fine-tuning; leave it out")
    if args.save_model and args.schedule == "during":
        raise UserError("--save-model: with --schedule during, no encoder is realigned before fine-tuning")
    if args.save_model and args.save_model.exists():
        raise UserError(f"--save-model {args.save_model}: exists already; name a new directory")
    saved, links = args.save_model, args.write_links
    for flag, path, folder in (
        ("--out", args.out, args.out), ("--write-links", links, links), ("--save-model", saved, saved and saved.parent),
        ("--realign-cache", args.realign_cache, args.realign_cache),
    ):  # fmt: skip
        with explained(f"{flag} {path}: cannot write there; choose another folder"):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()


def word_pairs(args: argparse.Namespace, aligner: str, device: torch.device) -> dict[str, Iterator[Pair]]:
    """{language: its endless linked sentence pairs}. With `awesome`, the encoder that aligns is loaded here."""
    align = None
    if aligner == "awesome":
        tokenizer, config = load_tokenizer(args.aligner_model, "--aligner-model")
        if not 0 <= args.aligner_layer <= config.num_hidden_layers:
            raise UserError(f"--aligner-layer {args.aligner_layer}: this encoder has 0 to {config.num_hidden_layers}")
        with explained(f"--aligner-model {args.aligner_model}: cannot load its weights"):
            encoder = AutoModel.from_pretrained(args.aligner_model, dtype=torch.float32).to(device).eval()

        def align(pairs: list[tuple[list[str], list[str]]]) -> list[Links]:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                return awesome_links(encoder, tokenizer, pairs, args.aligner_layer)

        key = fingerprint(encoder, tokenizer, args.aligner_layer, args.precision)
        align = remembered(align, CACHE / "awesome" / key)

    settings = (aligner, args.data_dir, args.seed, align, args.write_links)
    return {language: linked_pairs(language, *settings) for language in args.realign_languages}


def look_for_hub() -> None:
    """Without a connection, have the libraries read their caches at once, and not after minutes of retries."""
    try:
        address = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(address, timeout=20).close()
    except urllib.error.HTTPError:  # it answers
        pass
    except Exception as error:  # no network, no such host, no hub, ...
        say(f"{huggingface_hub.constants.ENDPOINT} is not reached ({error}): what is in the caches will do, or fail")
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is; on a GPU, with deterministic algorithms.

    Where torchrun started several processes, they meet here, and each takes the GPU of its number on this machine.
    """
    with explained(f"--device {name}: not to be had here"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and (device.index is None or dist.is_torchelastic_launched()):
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device).item()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        with explained("torchrun: the processes cannot meet"):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def device_name(device: torch.device) -> str:
    """What computes, as far as results depend on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def fast_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies matrices faster so (same scores: see the README), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if features.get("amx_bf16") or features.get("avx512_bf16") else "fp32"


def save_encoder(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write the realigned encoder as a directory that --model takes; whole or absent."""
    if processes()[0] > 0:  # one of them writes
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.base_model.save_pretrained(f"{scratch}/model")
        tokenizer.save_pretrained(f"{scratch}/model")
        os.replace(f"{scratch}/model", folder)


def encode(task: Task, tokenizer, examples: list[dict], max_length: int, training: bool) -> list[dict]:
    """The task's features of all examples, 1,000 at a time: tokenizers return objects that need much memory."""
    features = []
    for start in range(0, len(examples), 1000):
        part = task.encode(tokenizer, examples[start : start + 1000], max_length, training)
        features += [feature | {"example": start + feature["example"]} for feature in part]
    return features


def load_data(args: argparse.Namespace, tokenizer) -> tuple[list[dict], dict[str, tuple[list, list]]]:
    """(English training features, {language: (test examples, their features)}), read and checked to the end."""
    task, tests = TASKS[args.task], {}
    train = task.load(SOURCE, "train", args)[: args.limit_train]
    features = encode(task, tokenizer, train, args.max_length, True)
    for code in [SOURCE] + [code for code in args.languages if code != SOURCE]:
        examples = task.load(code, "test", args)[: args.limit_test]
        length = min(task.test_length, tokenizer.model_max_length)
        tests[code] = examples, encode(task, tokenizer, examples, length, False)
    say(f"{args.task}: {len(train)} English training examples in {len(features)} windows")
    say("test examples: " + ", ".join(f"{code} {len(examples)}" for code, (examples, _) in tests.items()))
    for name, rows in [("training", features), *((code, rows) for code, (_, rows) in tests.items())]:
        if not any((row["labels"] != IGNORE).any() for row in rows):
            raise UserError(
                f"{args.task}, {name}: nothing to {'learn' if name == 'training' else 'score'} in this data"
            )
        if cut := len({row["example"] for row in rows if row["cut"]}):
            say(f"{name}: {cut} examples are not seen whole (cut off, or words or answers of no subword)")
    return features, tests


def run(args: argparse.Namespace) -> Path:
    """Do one run and write its record; return the record's path. A run whose record exists is not repeated."""
    device = choose_device(args.device)
    args.precision = args.precision or agreed(fast_precision(device))
    aligner, changed = args.aligner, resolve(args)
    path = args.out / f"{record_name(args, changed)}.json"
    if agreed(path.exists()) and not args.overwrite:
        if args.save_model or args.write_links:
            raise UserError(f"{path} exists: add --overwrite, without which nothing is trained or stored again")
        say(f"{path} exists: nothing to do (--overwrite repeats the run)")
        return path
    if not (args.data_dir and all(Path(model).is_dir() for model in (args.model, args.aligner_model or args.model))):
        look_for_hub()
    task = TASKS[args.task]
    tokenizer, config = load_tokenizer(args.model)
    check_flags(args, aligner, config, tokenizer.model_max_length)
    seconds, pairs, held_out = {}, None, {}
    gc.disable()  # what comes now are millions of small objects that stay: no use looking for garbage among them
    with timed(seconds, "data"):
        features, tests = load_data(args, tokenizer)
    steps = {"finetune": args.epochs * math.ceil(len(features) / args.batch_size)}
    if args.strategy != "baseline" or args.probe:
        with timed(seconds, "pairs"):
            streams, count = word_pairs(args, aligner, device), args.realign_steps or steps["finetune"]
            if args.probe:
                used = math.ceil(count * args.realign_batch_size / len(streams))
                streams, held_out = hold_out(streams, used)
            pairs = interleave(list(streams.values()))
    if args.strategy != "baseline":
        steps["realign"] = count
    gc.freeze()
    gc.enable()
    torch.manual_seed(args.seed)  # for the first weights of the classifier
    with timed(seconds, "model"), explained(f"--model {args.model}: cannot load its weights"):
        model = task.head.from_pretrained(args.model, num_labels=task.labels, dtype=torch.float32).to(device)
    say(f"{args.model}: {model.num_parameters() / 1e6:.1f}M parameters on {device}; strategy {args.strategy}")

    seen, probed = train(args, model, tokenizer, features, pairs, held_out, steps, seconds)
    with timed(seconds, "evaluate"):
        scores = evaluate_all(model, task, tests, tokenizer.pad_token_id, args.precision)
    if processes()[0] > 0:  # one of them writes
        return path
    results = {"scores": scores, "config": shown(args), "steps": steps, "seconds": seconds, "pairs": seen}
    write_record(path, results | ({"probe": probed} if args.probe else {}), device)
    say_pairs(seen)
    say_scores(scores)
    say(f"record: {path}")
    return path


def train(args, model, tokenizer, features, pairs, held_out: dict, steps: dict, seconds: dict) -> tuple[dict, dict]:
    """Realign and fine-tune the model, before or during; (what was seen of each language, what --probe measured)."""
    weights, probed = layer_weights(model) if args.probe else {}, {"retrieval": {}, "drift": {}}

    def probe(stage: str) -> None:
        with timed(seconds, "probe"):
            lengths = {"max_length": args.realign_max_length}
            found = {code: retrieval(model, tokenizer, chosen, **lengths) for code, chosen in held_out.items()}
            probed["retrieval"][stage] = found
            if stage != "before":
                probed["drift"][stage] = drift(weights, model)

    if args.probe:
        probe("before")
    seen, realignment = {}, None
    if args.schedule == "before":
        with timed(seconds, "realign"):
            cache = trajectory(args, model, tokenizer) if args.realign_cache else None
            state = load_state(cache, steps["realign"]) if cache else {}
            steps |= {"realign_reused": state["step"]} if state else {}
            seen = realign(
                model, tokenizer, pairs, steps=steps["realign"], spec=args.strategy, lr=args.realign_lr, seed=args.seed,
                batch_size=args.realign_batch_size, max_length=args.realign_max_length, layer=args.layer,
                temperature=args.temperature, precision=args.precision, state=state,
                keep=partial(save_state, cache) if cache else None,
            )  # fmt: skip
        if args.probe:
            probe("realigned")
    elif args.schedule == "during":
        projection = projection_head(model.config.hidden_size).to(model.device)
        sizes = (args.realign_batch_size, args.realign_max_length)
        batches = realignment_batches(tokenizer, pairs, *sizes, model.device)
        loss = shielded_loss(model, projection, args.strategy, seen, layer=args.layer, temperature=args.temperature)
        realignment = (projection, batches, loss)
    if args.save_model:
        save_encoder(model, tokenizer, args.save_model)
    with timed(seconds, "finetune"):
        finetune(
            model, features, tokenizer.pad_token_id, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
            precision=args.precision, seed=args.seed, realignment=realignment,
        )  # fmt: skip
    if args.probe:
        probe("finetuned")
    return seen, probed


def trajectory(args: argparse.Namespace, model: nn.Module, tokenizer: Any) -> Path:
    """The folder in --realign-cache of all runs that realign alike, for however many steps and whatever task."""
    names = ("strategy", "seed", "layer", "temperature", "precision", "aligner", "aligner_model", "aligner_layer")
    names += ("realign_languages", "realign_batch_size", "realign_lr", "realign_max_length")
    files = [Path(args.aligner) / f"{SOURCE}-{code}.txt" for code in args.realign_languages]
    files += sorted(Path(args.aligner_model or "").glob("*.*")) if args.aligner == "awesome" else []
    for code in args.realign_languages if args.data_dir else []:
        files.append(args.data_dir / "parallel" / f"{SOURCE}-{code}.tsv")
        files += [args.data_dir / "dictionary" / f"{a}-{b}.txt" for a, b in ((SOURCE, code), (code, SOURCE))]
    files = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in files]
    settings = [str(getattr(args, name)) for name in names] + [bool(args.write_links)]  # links of a text in its order
    return args.realign_cache / fingerprint(model, tokenizer, settings, files)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that is spent in here to the seconds of a stage."""
    start = time.time()
    yield
    seconds[stage] = round(seconds.get(stage, 0.0) + time.time() - start, 1)


def write_record(path: Path, results: dict, device: torch.device) -> None:
    """One JSON file for one run: what was run, with what, for how long, and the scores. No path in it."""
    record = {key: results["config"][key] for key in RECORD_KEYS} | results
    record["versions"] = {library.__name__: library.__version__ for library in (torch, transformers, datasets)}
    record["versions"] |= {"python": sys.version.split()[0], "alignfreeze.py": SCRIPT}
    record["processes"] = processes()[1]
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    write_whole(path, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def say_pairs(seen: dict[str, dict[str, int]]) -> None:
    """What realignment saw, and what it passed over."""
    if not seen:
        return
    total = {key: sum(counts[key] for counts in seen.values()) for key in ("sentences", "words", "cut", "skipped")}
    say("realigned on {sentences} sentence pairs with {words} word pairs".format(**total))
    say("passed over: {skipped} sentence pairs without a link, {cut} word pairs behind --max-length".format(**total))
    for code, counts in seen.items():
        if counts["readings"] > 1:
            say(f"{SOURCE}-{code}: parallel text shorter than the training, begun {counts['readings']} times")


def say_scores(scores: dict[str, dict[str, float]]) -> None:
    """The table at the end of a run: a line for each language, then the average over target languages."""
    targets = [values for code, values in scores.items() if code != SOURCE]
    average = {metric: sum(values[metric] for values in targets) / max(len(targets), 1) for metric in scores[SOURCE]}
    say(f"\n{'percent':10}" + "".join(f"{metric:>12}" for metric in average))
    for code, values in [*scores.items(), *([("average", average)] if targets else [])]:
        say(f"{code:10}" + "".join(f"{100 * value:12.1f}" for value in values.values()))
    say(f"(the average is over the {len(targets)} target languages, without English)\n")


# ---- 7. Command line -------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Those whose default depends on task and model are None here, until `resolve` fills in the paper's."""

    def error(message: str):  # argparse's own would print the whole usage in front of it
        raise UserError(f"{message} (--help lists the flags)")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    # fmt: off
    add = parser.add_argument_group("what to run").add_argument
    add("--model", default=next(iter(MODELS)), metavar="ID|DIR", help="encoder (default: %(default)s)")
    add("--task", default="udpos", choices=TASKS, help="default: %(default)s")
    add("--strategy", default="front", help="baseline, full, front, back, or layers as in emb,0-2 (default: front)")
    add("--schedule", default="before", choices=["before", "during"], help="realign before (default) or in fine-tuning")
    add("--aligner", default="dictionary", help="dictionary (default), fastalign, awesome, or a DIR of Pharaoh files")
    add("--seed", type=int, default=31, help="the paper's are 31 42 66 23 17 (default: %(default)s)")
    add("--languages", nargs="+", metavar="XX", help="targets, besides English (default: the paper's)")
    add("--realign-languages", nargs="+", metavar="XX", help="to realign with English (default: the paper's 34)")
    add = parser.add_argument_group("hyper-parameters").add_argument
    add("--epochs", type=int, help="of fine-tuning (default: 5; xnli 2)")
    add("--batch-size", type=int, help="examples in a fine-tuning step (default: 32)")
    add("--lr", type=float, help="highest learning rate of fine-tuning (default: 2e-5; xlm-roberta-base 7.5e-6)")
    add("--realign-steps", type=int, help="default: as many as fine-tuning takes")
    add("--realign-batch-size", type=int, help="sentence pairs in a realignment step (default: 16)")
    add("--realign-lr", type=float, help="constant rate of realignment (default: 2e-5; xlm-roberta-base 7.5e-6)")
    add("--layer", type=int, help="hidden states to realign; -1 is the last layer (default: -2, as the authors)")
    add("--temperature", type=float, help="of the contrastive loss (default: 0.1)")
    add("--realign-max-length", type=int, help="subwords of a sentence in realignment (default: 96)")
    add("--aligner-model", metavar="ID|DIR", help="encoder for --aligner awesome (default: multilingual BERT)")
    add("--aligner-layer", type=int, help="its hidden states that are compared (default: 8)")
    add("--max-length", type=int, help="subwords of an example in fine-tuning (default: 96; xquad 128)")
    add("--precision", choices=["fp32", "bf16"], help="of matrix products (default: bf16 where fast; the paper: fp32)")
    add("--syntactic-words", action="store_true", help="udpos: the standard 17 tags, multi-word ranges left out")
    add = parser.add_argument_group("data and output").add_argument
    add("--data-dir", type=Path, metavar="DIR", help="local files instead of the hub; the README shows the layout")
    add("--limit-train", type=int, metavar="N", help="only the first N training examples, for a quick look")
    add("--limit-test", type=int, metavar="N", help="only the first N test examples of a language, for a quick look")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--save-model", type=Path, metavar="DIR", help="a new folder for the realigned encoder, before fine-tuning")
    add("--realign-cache", type=Path, metavar="DIR", help="states of realignment, kept for runs that realign alike")
    add("--probe", action="store_true", help="also measure every layer: word retrieval, and how far its weights moved")
    add("--write-links", type=Path, metavar="DIR", help="align all the text and store it, in Pharaoh files en-XX.txt")
    add("--out", type=Path, default=Path("results/runs"), metavar="DIR", help="for the record (default: %(default)s)")
    add("--overwrite", action="store_true", help="repeat a run whose record exists")
    # fmt: on
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        limit = 2**31 if type(value) is int else math.inf
        if type(value) in (int, float) and name not in ("seed", "layer", "aligner_layer") and not 0 < value < limit:
            parser.error(f"--{name.replace('_', '-')} {value}: must be more than 0 and less than {limit}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: must be 0 to {2**32 - 1}")
    return args


def main(argv: list[str] | None = None) -> int:
    """0, or 2 for a user's error, which is printed in one line, or 130 when interrupted."""
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = 3
    try:
        run(parse_args(argv))
        return 0
    except (UserError, OSError) as error:  # OSError: a full disk, say
        where = f" (process {processes()[0]})" if processes()[0] else ""
        print(f"alignfreeze{where}:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alignfreeze: interrupted; no record was written", file=sys.stderr)
        return 130
    finally:
        gc.enable()


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():  # gloo's threads would live on, and can crash the interpreter while it ends:
        sys.stdout.flush()  # https://github.com/pytorch/pytorch/pull/179291
        os._exit(code)
    sys.exit(code)
