#!/usr/bin/env python3
"""AlignFreeze: realign a multilingual encoder on word pairs while half of its layers are frozen. The whole method.

A multilingual encoder is fine-tuned on English and tested in other languages. Before that it is *realigned*: words that
translate each other, found in parallel text by a word aligner, are pulled together by a contrastive loss. Realignment
helps some languages and harms others; freezing half of the layers meanwhile (`requires_grad = False`) keeps most of the
gain and avoids most of the harm. All layers train again in fine-tuning.

    python alignfreeze.py --model xlm-roberta-base --task udpos --strategy front --aligner dictionary --seed 31
    python alignfreeze.py --model distilbert-base-multilingual-cased --strategy emb,0-2 --languages ar de --epochs 1
    python alignfreeze.py --model ./my-encoder --data-dir ./my-data --languages de --realign-languages de fr

Read from top to bottom: tables, word pairs, realignment (the heart: `contrastive_loss` and `freeze`), tasks,
fine-tuning and evaluation, one run, command line.

Paper: Bakos, Gaschi, Guzmán, More, Li, Lee. AlignFreeze: Navigating the Impact of Realignment on the Layers of
Multilingual Models Across Diverse Languages. NAACL 2025. https://arxiv.org/abs/2502.12959
Realignment: Gaschi, Cerda, Rastin, Toussaint. Exploring the Relationship between Alignment and Cross-lingual
Transfer in Multilingual Transformers. Findings of ACL 2023. https://arxiv.org/abs/2306.02790
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import regex
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
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

UPOS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X _".split()  # `_`: `3-4` ranges

OPUS = "Helsinki-NLP/opus-100"
MUSE_URL = "https://dl.fbaipublicfiles.com/arrival/dictionaries/{}-{}.txt"
UD_URL = "https://raw.githubusercontent.com/UniversalDependencies/UD_{}/r2.7/{}_{}-ud-{}.conllu"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignfreeze"

PARTS = {"cpu": 8}  # in how many parts of similar length a batch is computed; on a GPU padding costs less than launches
RECORD_KEYS = ("model", "task", "strategy", "schedule", "aligner", "seed")  # what names a run
say = partial(print, flush=True)  # lines that reach a log file at once
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
    words, at = [], 0
    cuts = [
        0,
        *(k for k in range(1, len(run)) if not regex.match(r"\p{M}", run[k])),
        len(run),
    ]  # where a word may begin or end
    while at < len(cuts) - 1:
        ends = range(min(at + LONGEST_WORD, len(cuts) - 1), at, -1)
        end = next((k for k in ends if run[cuts[at] : cuts[k]] in vocabulary), at + 1)
        words.append(run[cuts[at] : cuts[end]])
        at = end
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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, whoever else writes it and whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.", delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def fetch(url: str) -> Path:
    """Download a plain file once; later runs read it from the cache. UserError when it cannot be had."""
    path = CACHE / regex.sub(r"^\w+://|[^\w.-]+", "_", url).strip("_")
    if not path.exists():
        with explained(f"cannot download {url}; check the network, or use --data-dir"):
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
    """OPUS-100, downloaded as it is read, in blocks of lines that later runs find on disk."""
    config, stream, at = "-".join(sorted((SOURCE, language))), None, None  # `at`: the stream's next line
    for start in itertools.count(0, block):
        path = CACHE / "opus-100" / config / f"{start}.json"
        if not path.exists():
            with explained(f"cannot read {OPUS} {config}; check the network, or use --data-dir"):
                if at != start:
                    stream = iter(datasets.load_dataset(OPUS, config, split="train", streaming=True).skip(start))
                rows, at = [row["translation"] for row in itertools.islice(stream, block)], start + block
                text = [(row[SOURCE], row[language]) for row in rows]
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


def read_pharaoh(path: Path) -> list[Links]:
    """Links of one sentence pair a line in Pharaoh format, `0-0 1-2 ...`, English first, positions from 0."""
    links = []
    for number, line in read_lines(path):
        if not regex.fullmatch(r"(\d+-\d+(\s+|$))*", line.strip()):
            raise UserError(f"{path}:{number}: expected links such as '0-0 1-2', found {line[:60]!r}")
        links.append([tuple(map(int, link.split("-"))) for link in line.split()])
    return links


def shuffled(items: Iterable, seed: str, size: int = 10_000) -> Iterator:
    """Shuffle a stream through a buffer of `size` items, as the authors do."""
    rng, buffer = random.Random(seed), []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
        else:
            k = rng.randrange(size)
            item, buffer[k] = buffer[k], item
            yield item
    rng.shuffle(buffer)
    yield from buffer


def stored_links(path: Path, links: list[Links], number: int, source: list[str], target: list[str]) -> Links:
    """The links of one sentence pair, from the lines of a Pharaoh file. UserError if they cannot be of this pair."""
    if number >= len(links):
        raise UserError(f"{path}: {number} lines of links, but the parallel text goes on; align all of it")
    if any(i >= len(source) or j >= len(target) for i, j in links[number]):
        raise UserError(f"{path}:{number + 1}: a link points outside {len(source)} and {len(target)} words")
    return links[number]


def linked_pairs(language: str, aligner: str, data_dir: Path | None, seed: int) -> Iterator[Pair]:
    """Endless linked sentence pairs of English and `language`, shuffled by `seed`, aligned as they are asked for.

    Local files are read to their end here, before the first pair, so that a malformed line is found before training.
    """
    forward, backward = {}, {}
    if aligner == "dictionary" or language in UNSPACED_LANGUAGES:
        forward, backward = read_dictionary(language, data_dir)
    vocabulary = frozenset().union(*forward.values()) if language in UNSPACED_LANGUAGES else frozenset()
    path = Path(aligner) / f"{SOURCE}-{language}.txt"
    links = [] if aligner == "dictionary" else read_pharaoh(path)

    def align(number: int, line: tuple[str, str]) -> tuple[list[str], list[str], Links]:
        source, target = split_words(line[0], SOURCE), split_words(line[1], language, vocabulary)
        if aligner == "dictionary":
            return source, target, dictionary_links(source, target, forward, backward)
        return source, target, stored_links(path, links, number, source, target)

    if data_dir:
        for number, line in enumerate(parallel_text(language, data_dir), 1):
            if links:
                align(number - 1, line)
        if len(links) > number:
            raise UserError(f"{path}: {len(links)} lines of links for {number} sentence pairs; is it of this text?")
    pairs = endless_pairs(language, lambda: parallel_text(language, data_dir), align, seed)
    return itertools.chain([next(pairs)], pairs)  # the first pair is made now, for the error it may raise


def endless_pairs(language: str, text: Callable[[], Iterator], align: Callable, seed: int) -> Iterator[Pair]:
    """The linked sentence pairs of a text, which is shuffled and read again whenever it ends."""
    skipped = 0
    for reading in itertools.count(1):
        linked = 0
        for number, line in shuffled(enumerate(text()), f"{seed} {language} {reading}"):
            source, target, links = align(number, line)
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
    edges, room = (len(start), len(end)), max_length - len(start) - len(end)
    encoded = tokenizer(sentences, is_split_into_words=True, add_special_tokens=False, return_attention_mask=False)
    result = []
    for k, ids in enumerate(encoded["input_ids"]):
        ids, words = np.array(ids, dtype=np.int64), np.array(encoded.word_ids(k), dtype=np.int64)
        lone = (ids == blank) & (words == np.append(words[1:], -1))  # a blank with more of its word behind it
        ids, words = ids[~lone], words[~lone]
        first = np.diff(words, prepend=-1) != 0
        for at in range(0, max(len(ids), 1) if windows else 1, room):
            part = slice(at, at + room)
            inside = np.pad(words[part], edges, constant_values=-1), np.pad(first[part], edges, constant_values=False)
            result.append(Window(k, np.concatenate([start, ids[part], end]), *inside))
    return result


def pad(rows: Iterable[np.ndarray], value: int) -> Tensor:
    """Stack (T,) arrays into a (B, longest T) tensor, filled up with `value`."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)


def pad_inputs(ids: list[np.ndarray], pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, T), of B tokenised sentences."""
    lengths = torch.tensor([len(row) for row in ids])
    return {"input_ids": pad(ids, pad_id), "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long()}


def by_length(items: list, parts: int, length: Callable[[Any], int]) -> list[list]:
    """Split a batch into parts of equal size and similar length, so that hardly any padding is computed."""
    items, size = sorted(items, key=length), math.ceil(len(items) / parts)
    return [items[start : start + size] for start in range(0, len(items), size)]


def embed(model: nn.Module, parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Look up the word embeddings of all parts at once: each look-up costs a gradient as large as the vocabulary."""
    shapes = [part["input_ids"].shape for part in parts]
    vectors = model.get_input_embeddings()(torch.cat([part["input_ids"].flatten() for part in parts]))
    split = [v.view(*shape, -1) for v, shape in zip(vectors.split([shape.numel() for shape in shapes]), shapes)]
    return [{**part, "input_ids": None, "inputs_embeds": v} for part, v in zip(parts, split)]


class Batch(NamedTuple):
    """B sentence pairs, ready for the encoder: 2B sentences, in parts of similar length."""

    inputs: list[dict[str, Tensor]]  # of each part, input_ids and attention_mask, (its sentences, its longest T)
    words: Tensor  # (N,) where the N words of all sentences are: positions in all parts flattened, one after the other
    queries: Tensor  # (Q,) indices into `words`: every linked word, of either side,
    targets: Tensor  # (Q,) and the word that it is linked to
    cut: list[int]  # for each sentence pair, how many links were lost because a word lay behind `max_length` subwords


def encode_pairs(tokenizer, pairs: list[Pair], max_length: int = 96, parts: int = 1, device: Any = "cpu") -> Batch:
    """Turn linked sentence pairs into one batch; a sentence of more than `max_length` subwords is cut off there."""
    sentences = [pair.source for pair in pairs] + [pair.target for pair in pairs]
    groups = by_length(encode_words(tokenizer, sentences, max_length), parts, lambda window: len(window.ids))
    inputs = [pad_inputs([window.ids for window in group], tokenizer.pad_token_id) for group in groups]
    word = [pad([np.where(window.first, window.words, -1) for window in group], -1) for group in groups]
    sentence = [pad([np.full(len(window.ids), window.sentence) for window in group], 0) for group in groups]
    word, sentence = (torch.cat([tensor.flatten() for tensor in part]) for part in (word, sentence))

    places = (word >= 0).nonzero().squeeze(1)  # (N,) the first subword of every word
    row = torch.full((len(sentences), max(map(len, sentences))), -1)  # (sentence, word) -> index into W, -1 if cut off
    row[sentence[places], word[places]] = torch.arange(len(places))
    pair = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(pair.links) for pair in pairs]))
    i, j = torch.tensor([link for pair in pairs for link in pair.links]).T
    source, target = row[pair, i], row[pair + len(pairs), j]
    kept = (source >= 0) & (target >= 0)
    cut = torch.bincount(pair[~kept], minlength=len(pairs)).tolist()
    source, target = source[kept].to(device), target[kept].to(device)
    inputs = [{name: tensor.to(device) for name, tensor in part.items()} for part in inputs]
    return Batch(inputs, places.to(device), torch.cat([source, target]), torch.cat([target, source]), cut)


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
    words = projection(torch.cat(hidden)[batch.words])  # (subwords, hidden) -> (N, 128)
    return contrastive_loss(words.float(), batch.queries, batch.targets, temperature)


def projection_head(hidden: int, size: int = 128) -> nn.Module:
    """Maps hidden states to the space where words are compared; trained with the encoder, thrown away afterwards."""
    return nn.Sequential(nn.Linear(hidden, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, size, bias=False))


def realign(
    model: nn.Module, tokenizer: Any, pairs: Iterator[Pair], *, steps: int, spec: str = "none", batch_size: int = 16,
    lr: float = DEFAULT_LR, layer: int = -2, temperature: float = 0.1, max_length: int = 96, precision: str = "fp32",
    seed: int = 31,
) -> dict[str, Counter]:  # fmt: skip
    """Realign an encoder in place: `steps` batches of sentence pairs, the layers that `spec` names frozen meanwhile.

    model: an encoder, or a model with one inside (`base_model`); only the encoder changes. layer: which of the hidden
    states is realigned, as in the authors' code the output of the layer before the last. Adam at a constant learning
    rate. Returns what was seen of each language. UserError when the loss is not finite.
    """
    torch.manual_seed(seed)
    encoder, device, seen = model.base_model.train(), model.device, {}
    projection = projection_head(encoder.config.hidden_size).to(device)
    frozen = freeze(encoder, spec)
    trained = [p for p in itertools.chain(encoder.parameters(), projection.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr, fused=True)
    still = sum(encoder.get_parameter(name).numel() for name in frozen) / encoder.num_parameters()
    progress = Progress(f"realign, {still:.0%} of the parameters frozen", steps)
    for _ in range(steps):
        chunk = list(itertools.islice(pairs, batch_size))
        batch = encode_pairs(tokenizer, chunk, max_length, PARTS.get(device.type, 1), device)
        for pair, cut in zip(chunk, batch.cut):
            counts = seen.setdefault(pair.language, Counter())
            counts.update(sentences=1, words=len(pair.links) - cut, cut=cut, skipped=pair.skipped)
            counts["readings"] = pair.reading  # how often its text was begun
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = realignment_loss(encoder, projection, batch, layer, temperature)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.update(loss)
    progress.finish()
    encoder.requires_grad_(True)  # every layer trains again in fine-tuning
    return seen


class Progress:
    """A bar with loss and time left when a person watches, a line when the stage ends; stops one that diverges."""

    def __init__(self, stage: str, steps: int):
        self.stage, self.losses, self.start = stage, [], time.time()
        self.bar = tqdm(total=steps, desc=stage, leave=False, disable=None)  # None: silent unless a terminal

    def update(self, loss: Tensor, every: int = 20) -> None:
        """Count a step. The loss stays on its device: only every 20 steps does this wait for its value."""
        self.losses.append(loss.detach())
        self.bar.update()
        if len(self.losses) % every == 0:
            self.bar.set_postfix(loss=f"{self.mean(-every, None):.3f}")

    def mean(self, start: int | None, end: int | None) -> float:
        value = torch.stack(self.losses[start:end]).float().mean().item()
        if not math.isfinite(value):
            raise UserError(f"{self.stage}: the loss is {value} by step {len(self.losses)}; lower the learning rate")
        return value

    def finish(self) -> None:
        self.bar.close()
        change = f"loss {self.mean(None, 20):.3f} -> {self.mean(-20, None):.3f}"
        say(f"{self.stage}: {len(self.losses)} steps, {change}, {time.time() - self.start:.1f} s")


# ---- 4. Tasks: a new one is three functions here and a row in TASKS -----------------------------------------------
# load(language, split, args)                        -> examples, a list of dicts
# encode(tokenizer, examples, max_length, training)  -> features: arrays `input_ids` and `labels`, and `example`, the
#                                                       index of the example that they come from
# score(examples, features, logits)                  -> {metric: value}, the task's main metric first


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
            columns = line.split("\t")
            if len(columns) != 10 or not regex.fullmatch(r"\d+([-.]\d+)?", columns[0]) or not columns[1]:
                raise UserError(f"{path}:{number}: not a CoNLL-U line of ID, FORM and 8 more columns: {line[:60]!r}")
            if "." in columns[0] or ("-" in columns[0] and args.syntactic_words):
                continue
            if columns[3] not in UPOS:
                raise UserError(f"{path}:{number}: '{columns[3]}' is not one of the UPOS tags {' '.join(UPOS)}")
            tokens.append(columns[1])
            tags.append(UPOS.index(columns[3]))
    if not examples:
        raise UserError(f"{path}: no sentence in this file")
    return examples


def encode_tokens(tokenizer, examples: list[dict], max_length: int, training: bool) -> list[dict]:
    """Token classification: a word's first visible subword carries its tag; long sentences go on in more windows."""
    features = []
    for window in encode_words(tokenizer, [example["tokens"] for example in examples], max_length, windows=True):
        labels = np.where(window.first, np.array(examples[window.sentence]["tags"])[window.words], IGNORE)
        features.append({"example": window.sentence, "input_ids": window.ids, "labels": labels})
    return features


def score_accuracy(examples: list[dict], features: list[dict], logits: list[np.ndarray]) -> dict[str, float]:
    """The share of labels that are predicted: of words (PoS tagging), or of sentence pairs (NLI)."""
    labels = np.concatenate([feature["labels"] for feature in features])
    predictions = np.concatenate([row.argmax(-1).reshape(-1) for row in logits])
    return {"accuracy": float((predictions == labels)[labels != IGNORE].mean())}


class Task(NamedTuple):  # a row of TASKS
    head: type  # the transformers class: an encoder and a classifier
    labels: int  # how many
    targets: list[str]  # the paper's target languages
    epochs: int
    test_length: int  # subwords, special tokens included
    load: Callable
    encode: Callable
    score: Callable


TASKS = {
    "udpos": Task(AutoModelForTokenClassification, 18, TARGETS, 5, 128, load_udpos, encode_tokens, score_accuracy),
}


# ---- 5. Fine-tuning on English, evaluation in every language (paper, appendix A) -------------------------------------


def collate(features: list[dict], pad_id: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """(what the encoder reads, (B, T) tensors; labels, (B, T) or (B, labels of an example)) of a batch of features."""
    inputs = pad_inputs([feature["input_ids"] for feature in features], pad_id)
    if "token_type_ids" in features[0]:
        inputs["token_type_ids"] = pad([feature["token_type_ids"] for feature in features], 0)
    labels = pad([feature["labels"] for feature in features], IGNORE)
    return {name: tensor.to(device) for name, tensor in inputs.items()}, labels.to(device)


def task_logits(output) -> Tensor:
    """(B, T, labels) for token classification, (B, labels) for sentences, (B, 2, T) for the two ends of an answer."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], dim=1)


def finetune(
    model: nn.Module, features: list[dict], pad_id: int, *, epochs: int, batch_size: int = 32, lr: float = DEFAULT_LR,
    precision: str = "fp32", seed: int = 31,
) -> int:  # fmt: skip
    """Fine-tune all layers of the model in place; return the number of steps.

    Adam; the learning rate rises linearly over the first 10% of the steps, then falls linearly to 0.
    """
    torch.manual_seed(seed)
    model.train()
    order, steps = random.Random(seed), epochs * math.ceil(len(features) / batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    progress = Progress("fine-tune", steps)
    for _ in range(epochs):
        epoch = order.sample(features, len(features))
        for start in range(0, len(epoch), batch_size):
            batch = epoch[start : start + batch_size]
            loss = task_loss(model, batch, pad_id, PARTS.get(model.device.type, 1), precision)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update(loss)
    progress.finish()
    return steps


def task_loss(model: nn.Module, batch: list[dict], pad_id: int, parts: int = 1, precision: str = "fp32") -> Tensor:
    """The mean cross-entropy over all labels of a batch, computed in `parts` of similar length."""
    groups = by_length(batch, parts, lambda feature: len(feature["input_ids"]))
    inputs, labels = zip(*(collate(group, pad_id, model.device) for group in groups))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = [task_logits(model(**part)).flatten(0, -2) for part in embed(model, inputs)]
    labels = torch.cat([part.flatten() for part in labels])
    return F.cross_entropy(torch.cat(logits).float(), labels, ignore_index=IGNORE)


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
            output = task_logits(model(**inputs)).float().cpu().numpy()
        if not np.isfinite(output).all():
            raise UserError("evaluate: the model predicts no finite numbers; try a lower learning rate")
        for k, row in zip(chunk, output):
            logits[k] = row[: len(features[k]["labels"])] if row.ndim == 2 else row
    return {metric: round(value, 6) for metric, value in task.score(examples, features, logits).items()}


# ---- 6. One run: check everything, realign, fine-tune, evaluate, write the record ------------------------------------


def load_tokenizer(name: str) -> tuple[Any, Any]:
    """(tokenizer, config) of an encoder. UserError, before anything is computed, for a model that cannot be used."""
    with explained(f"--model {name}: no hub id and no local directory that loads"):
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        kind = "a sequence-to-sequence model" if config.is_encoder_decoder else "not an encoder of text"
        raise UserError(f"--model {name}: {config.model_type} is {kind}; take an encoder such as xlm-roberta-base")
    if not tokenizer.is_fast or tokenizer.pad_token_id is None or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"--model {name}: has no fast tokenizer with words and a padding token; are its files missing?")
    return tokenizer, config


def resolve(args: argparse.Namespace) -> dict:
    """Fill in the paper's value wherever a flag was not given; return what differs from it, for the record's name."""
    task, lr = TASKS[args.task], MODELS.get(Path(args.model).name, DEFAULT_LR)
    paper = {"data_dir": None, "limit_train": None, "limit_test": None, "languages": task.targets, "precision": "fp32"}
    paper |= {"max_length": 96, "epochs": task.epochs, "batch_size": 32, "lr": lr, "syntactic_words": False}
    realignment = {"realign_languages": TARGETS, "realign_steps": None, "realign_batch_size": 16, "realign_lr": lr}
    realignment |= {"layer": -2, "temperature": 0.1}
    if args.strategy == "baseline":  # no realignment: its settings do not matter, one baseline serves all of them
        vars(args).update(dict.fromkeys(realignment), aligner="none", schedule="none")
    else:
        paper |= realignment
    for name, value in paper.items():
        given = getattr(args, name)
        setattr(args, name, value if given is None else list(dict.fromkeys(given)) if type(given) is list else given)
    return {name: getattr(args, name) for name, value in paper.items() if getattr(args, name) != value}


def shown(args: argparse.Namespace) -> dict:
    """The settings as a record shows them: of a path only the last part, and nothing of where things go."""
    paths, elsewhere = ("model", "aligner", "data_dir"), ("out", "overwrite", "device", "save_model")
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


def check_flags(args: argparse.Namespace, config: Any, longest: int) -> None:
    """Whatever can be known to be wrong before any data is read. UserError."""
    depth, task = getattr(config, "num_hidden_layers", 0), TASKS[args.task]
    if args.strategy != "baseline":
        parse_spec(args.strategy, depth)
        if not -depth - 1 <= args.layer <= depth:
            raise UserError(f"--layer {args.layer}: this encoder has hidden states {-depth - 1} to {depth}")
    if not 8 <= args.max_length <= longest:
        raise UserError(f"--max-length {args.max_length}: must be 8 to {longest} subwords with this encoder")
    for flag, known in (("languages", [SOURCE, *task.targets]), ("realign_languages", TARGETS)):
        unknown = [code for code in getattr(args, flag) or [] if code not in known]
        if unknown and not args.data_dir:
            raise UserError(f"--{flag.replace('_', '-')}: no '{unknown[0]}' on the hub; take some of {' '.join(known)}")
    if args.save_model and args.save_model.exists():
        raise UserError(f"--save-model {args.save_model}: exists already; name a new directory")
    saved = args.save_model
    for flag, path, folder in ("--out", args.out, args.out), ("--save-model", saved, saved and saved.parent):
        with explained(f"{flag} {path}: cannot write there; choose another folder"):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is; on a GPU, with deterministic algorithms."""
    with explained(f"--device {name}: not to be had here"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def save_encoder(model: nn.Module, tokenizer, folder: Path) -> None:
    """Write the realigned encoder as a directory that --model takes; whole or absent."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.base_model.save_pretrained(f"{scratch}/model")
        tokenizer.save_pretrained(f"{scratch}/model")
        os.replace(f"{scratch}/model", folder)


def load_data(args: argparse.Namespace, tokenizer, longest: int) -> tuple[list[dict], dict[str, tuple[list, list]]]:
    """(English training features, {language: (test examples, their features)}), read and checked to the end."""
    task, tests = TASKS[args.task], {}
    train = task.load(SOURCE, "train", args)[: args.limit_train]
    features = task.encode(tokenizer, train, args.max_length, True)
    for code in [SOURCE] + [code for code in args.languages if code != SOURCE]:
        examples = task.load(code, "test", args)[: args.limit_test]
        tests[code] = examples, task.encode(tokenizer, examples, min(task.test_length, longest), False)
    say(f"{args.task}: {len(train)} English training examples in {len(features)} windows")
    say("test examples: " + ", ".join(f"{code} {len(examples)}" for code, (examples, _) in tests.items()))
    return features, tests


def run(args: argparse.Namespace) -> Path:
    """Do one run and write its record; return the record's path. A run whose record exists is not repeated."""
    changed = resolve(args)
    path = args.out / f"{record_name(args, changed)}.json"
    if path.exists() and not args.overwrite:
        say(f"{path} exists: nothing to do (--overwrite repeats the run)")
        return path
    task, device, realigned = TASKS[args.task], choose_device(args.device), args.strategy != "baseline"
    tokenizer, config = load_tokenizer(args.model)
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
    check_flags(args, config, longest)
    clock = [("", time.time())]  # (stage, when it ended)
    features, tests = load_data(args, tokenizer, longest)
    clock.append(("data", time.time()))
    pairs, seen, steps = None, {}, {"finetune": args.epochs * math.ceil(len(features) / args.batch_size)}
    if realigned:
        steps["realign"] = args.realign_steps or steps["finetune"]
        pairs = interleave([linked_pairs(c, args.aligner, args.data_dir, args.seed) for c in args.realign_languages])
        clock.append(("pairs", time.time()))
    torch.manual_seed(args.seed)  # for the first weights of the classifier
    with explained(f"--model {args.model}: cannot load its weights"):
        model = task.head.from_pretrained(args.model, num_labels=task.labels, dtype=torch.float32).to(device)
    say(f"{args.model}: {model.num_parameters() / 1e6:.1f}M parameters on {device}; strategy {args.strategy}")
    clock.append(("model", time.time()))

    if realigned:
        seen = realign(
            model, tokenizer, pairs, spec=args.strategy, steps=steps["realign"], batch_size=args.realign_batch_size,
            lr=args.realign_lr, layer=args.layer, temperature=args.temperature, max_length=args.max_length,
            precision=args.precision, seed=args.seed,
        )  # fmt: skip
        say_pairs(seen)
        clock.append(("realign", time.time()))
    if args.save_model:
        save_encoder(model, tokenizer, args.save_model)
    finetune(
        model, features, tokenizer.pad_token_id, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
        precision=args.precision, seed=args.seed,
    )  # fmt: skip
    clock.append(("finetune", time.time()))
    scores = {}
    for code, (examples, rows) in tqdm(tests.items(), desc="evaluate", leave=False, disable=None):
        scores[code] = evaluate(model, task, examples, rows, tokenizer.pad_token_id, args.precision)
    clock.append(("evaluate", time.time()))

    seconds = {stage: round(end - start, 1) for (_, start), (stage, end) in itertools.pairwise(clock)}
    write_record(path, args, scores, steps, seconds, seen, device)
    say_scores(scores)
    say(f"record: {path}")
    return path


def write_record(path: Path, args, scores: dict, steps: dict, seconds: dict, seen: dict, device: torch.device) -> None:
    """One JSON file for one run: what was run, with what, for how long, and the scores. No path in it."""
    config, source = shown(args), Path(__file__).read_bytes()
    record = {key: config[key] for key in RECORD_KEYS}
    record |= {"scores": scores, "config": config, "steps": steps, "seconds": seconds, "pairs": seen}
    record["versions"] = {library.__name__: library.__version__ for library in (torch, transformers, datasets)}
    record["versions"] |= {"python": sys.version.split()[0], "alignfreeze.py": hashlib.sha256(source).hexdigest()}
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    write_whole(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def say_pairs(seen: dict[str, dict[str, int]]) -> None:
    """What realignment saw, and what it passed over."""
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
    add("--schedule", default="before", choices=["before"], help="realign before fine-tuning")
    add("--aligner", default="dictionary", help="dictionary (default), or a folder of Pharaoh files en-XX.txt")
    add("--seed", type=int, default=31, help="the paper's are 31 42 66 23 17 (default: %(default)s)")
    add("--languages", nargs="+", metavar="XX", help="targets, besides English (default: the paper's)")
    add("--realign-languages", nargs="+", metavar="XX", help="to realign with English (default: the paper's 34)")
    add = parser.add_argument_group("hyper-parameters").add_argument
    add("--epochs", type=int, help="of fine-tuning (default: 5)")
    add("--batch-size", type=int, help="examples in a fine-tuning step (default: 32)")
    add("--lr", type=float, help="highest learning rate of fine-tuning (default: 2e-5; xlm-roberta-base 7.5e-6)")
    add("--realign-steps", type=int, help="default: as many as fine-tuning takes")
    add("--realign-batch-size", type=int, help="sentence pairs in a realignment step (default: 16)")
    add("--realign-lr", type=float, help="constant rate of realignment (default: 2e-5; xlm-roberta-base 7.5e-6)")
    add("--layer", type=int, help="hidden states to realign; -1 is the last layer (default: -2, as the authors)")
    add("--temperature", type=float, help="of the contrastive loss (default: 0.1)")
    add("--max-length", type=int, help="subwords of a sentence in training (default: 96)")
    add("--precision", choices=["fp32", "bf16"], help="bf16: of matrix products; weights stay float32 (default: fp32)")
    add("--syntactic-words", action="store_true", help="udpos: the standard 17 tags, multi-word ranges left out")
    add = parser.add_argument_group("data and output").add_argument
    add("--data-dir", type=Path, metavar="DIR", help="local files instead of the hub; the README shows the layout")
    add("--limit-train", type=int, metavar="N", help="only the first N training examples, for a quick look")
    add("--limit-test", type=int, metavar="N", help="only the first N test examples of a language, for a quick look")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--save-model", type=Path, metavar="DIR", help="a new folder for the realigned encoder, before fine-tuning")
    add("--out", type=Path, default=Path("results/runs"), metavar="DIR", help="for the record (default: %(default)s)")
    add("--overwrite", action="store_true", help="repeat a run whose record exists")
    # fmt: on
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in ("seed", "layer") and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: must be more than 0")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: must be 0 to {2**32 - 1}")
    return args


def main(argv: list[str] | None = None) -> int:
    """0, or 2 for a user's error, which is printed in one line, or 130 when interrupted."""
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run(parse_args(argv))
        return 0
    except (UserError, OSError) as error:  # OSError: a full disk, say
        print(f"alignfreeze: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alignfreeze: interrupted; no record was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
