"""Build a small invented world: data for every task, and tiny pretrained models.

    python tests/toy_world.py toy                          write toy/data and toy/models
    python tests/toy_world.py toy --models xlmr --seed 1   another world with one model
    python tests/toy_world.py toy --only-data              no models; takes a few seconds
    python tests/toy_world.py toy --pretrain-steps 0       models with random weights

All files have the formats of the project's real data. A grammar produces sentences as trees. Each
language puts the parts of a tree in its own order (`ORDERS`) and turns every leaf into a word form
(`word_form`). Translations, word links, tags and answers are therefore gold:

    en    a small English
    qaa   English word order; English words enciphered letter by letter
    qab   its own words; object before verb, adjective after noun, articles fused with prepositions
    qac   its own words and script; verb last, suffixes for case, tense and number, no articles;
          its dictionary is wrong: it links content words to function words of the same sentence

Names, digits, punctuation and loanwords are the same in all languages; qac has most loanwords. The
dictionary of qac is wrong on purpose: realignment then has something to damage. The models are
pretrained by language modelling for a fixed number of steps. Their sentences are written separately
for each language and are never translations. The same seed gives the same files. The world lets the
project run and test itself without a network. It says nothing about real languages.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))

LANGUAGES = ("en", "qaa", "qab", "qac")
SIZES = {  # task: (training examples, test examples)
    "udpos": (1500, 200),
    "wikiann": (1500, 200),
    "xnli": (3000, 200),
    "xquad": (1000, 150),
}
GENERATION_SIZES = {"train": 800, "valid": 100, "test": 200}
PARALLEL_SIZE, DEV_SIZE, TEXT_SIZE = 2000, 100, 5000  # sentences per language
NER_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")

# --- lexicon
# The most frequent word comes first in each line. An irregular form follows a slash.
# Words such as "cook", "watch" and "saw" appear in two lines on purpose:
# the part of speech of an English word cannot always be looked up.

NOUNS = {  # hypernym: hyponyms
    "animal": "dog cat horse bird sheep/sheep cow wolf/wolves fox bear mouse/mice",
    "person": "teacher doctor child/children farmer woman/women man/men cook guard judge painter",
    "food": "apple cake egg loaf/loaves pie plum pear onion",
    "tool": "hammer knife/knives rope saw ladder lamp watch brush",
    "building": "house school church tower bridge barn mill castle",
    "place": "garden village forest river market valley harbour island",
}
VERBS = {  # class of the object ("" if the verb takes none): verbs
    "food": "eat/ate buy/bought sell/sold cook fetch share",
    "animal": "see/saw feed/fed find/found lose/lost watch brush",
    "tool": "use find/found lose/lost repair fetch hammer",
    "building": "visit paint guard open close build/built",
    "person": "meet/met help love hate teach/taught judge",
    "": "sleep/slept work walk sing/sang swim/swam wait",
    "clause": "say/said think/thought know/knew",
}
ADJECTIVES = "big small old new red green good bad clean dirty strong weak happy sad dark bright"
OPPOSITES = "big/small old/new good/bad clean/dirty strong/weak happy/sad dark/bright"
OPPOSITES += " buy/sell find/lose love/hate open/close"
FUNCTION_WORDS = {
    "DET": "the a this every some that these",
    "PRON": "he/him she/her they/them we/us who what",
    "ADP": "in near from with behind",
    "AUX": "be do can will must",
    "PART": "not",
    "CCONJ": "and but",
    "SCONJ": "because when that",
    "NUM": "two three four five ten",
    "ADV": "slowly quickly gladly often alone carefully yesterday recently today now very where",
}
MANNER = "slowly quickly gladly often alone carefully"
TIME = {"past": "yesterday recently", "present": "today now"}
BE_DO = {  # (lemma, features): English form
    ("be", "past singular"): "was",
    ("be", "past plural"): "were",
    ("be", "present singular"): "is",
    ("be", "present plural"): "are",
    ("do", "past singular"): "did",
    ("do", "past plural"): "did",
    ("do", "present singular"): "does",
}
HYPERNYMS = {
    noun.partition("/")[0]: kind for kind, line in NOUNS.items() for noun in [kind, *line.split()]
}

# --- languages

# For each kind of tree and each language, the parts from left to right.
# A language that is not listed uses the order of English.
ORDERS = {
    "sentence": {"en": "first comma link second stop"},
    "clause": {
        "en": "ask do time subject aux not verb object that content degree quality "
        "manner tool place stop",
        "qab": "time subject object ask aux not verb that content quality degree "
        "manner tool place stop",
        "qac": "subject time place tool object manner ask degree quality verb aux not "
        "that content stop",
    },
    "phrase": {
        "en": "adposition determiner number adjective noun head tail",
        "qab": "adposition determiner number noun adjective head tail",
        "qac": "number adjective noun head tail determiner adposition",
    },
}
DROPPED = {  # lemmas for which a language has no word
    "qab": {"do"},
    "qac": {"do", "be", "a", "the", "in", "from", "with"},
}
SUFFIXES = {  # feature or role: suffix, in the order in which suffixes are added
    "qab": {"plural": "na", "past": "ro", "present": "s"},
    "qac": {
        "past": "eb",
        "present": "o",
        "plural": "mi",
        "object": "ta",
        "in": "xi",
        "from": "dan",
        "with": "le",
    },
}
SYLLABLES = {"qab": ("bdfgklmnprstvz", "aeiou"), "qac": ("bdgklmnpqrstxz", "aeiou")}
SCRIPTS = {"qac": str.maketrans("abdegiklmnopqrstuxz", "აბდეგიკლმნოპქრსტუხზ")}
# The share of nouns, verbs and adjectives that a language borrows from English. As the dictionary
# of qac is wrong, its loanwords are what carries a task from English to it.
LOANS = {"qaa": 0.3, "qab": 0.3, "qac": 0.9}
WRONG_DICTIONARIES = ("qac",)
CONTENT_WORDS = ("NOUN", "VERB", "ADJ", "ADV")


@dataclass(eq=False, slots=True)  # compared by identity, also across languages
class Leaf:
    """One word of one sentence, the same object in every language."""

    lemma: str  # the English lemma, a name, digits, or punctuation
    upos: str
    features: str = ""  # such as "plural" for a noun or "past singular" for a verb
    entity: str = "O"  # one of NER_TAGS


@dataclass(eq=False, slots=True)
class Tree:
    """A sentence, a clause or a phrase, as named parts without an order."""

    kind: str  # a key of ORDERS
    parts: dict[str, Leaf | Tree]

    def but(self, **changes: Leaf | Tree | None) -> Tree:
        """Return a copy with some parts replaced; None removes a part."""
        parts = {**self.parts, **changes}
        return Tree(self.kind, {slot: part for slot, part in parts.items() if part})


class Token(NamedTuple):
    """A token of the text."""

    form: str
    words: list[tuple[str, Leaf]]  # two for a multi-word token such as "cannot" = "can" + "not"


@dataclass
class World:
    """Everything that depends on the seed: the words of the invented languages, and the names."""

    rng: random.Random
    # English lemma and part of speech -> irregular form
    irregular: dict[str, str] = field(default_factory=dict)
    # the letters of qaa, for str.translate
    cipher: dict[int, int] = field(default_factory=dict)
    # (language, lemma, part of speech) -> stem
    stems: dict[tuple[str, str, str], str] = field(default_factory=dict)
    # kind of name ("first", "last" or "city") -> names
    names: dict[str, list[str]] = field(default_factory=dict)
    # cache of word_form
    forms: dict[tuple, str] = field(default_factory=dict)


def make_world(seed: int) -> World:
    """Invent the words and names of a world."""
    rng = random.Random(seed)
    world = World(rng)
    for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz"):
        world.cipher |= str.maketrans(letters, "".join(rng.sample(letters, len(letters))))
    lines = [("NOUN", f"{hypernym} {line}") for hypernym, line in NOUNS.items()]
    lines += [("VERB", line) for line in VERBS.values()]
    lines += [("ADJ", ADJECTIVES), *FUNCTION_WORDS.items()]
    entries = {}  # keys (lemma, irregular form, part of speech), in order
    for upos, line in lines:
        for entry in line.split():
            lemma, _, irregular = entry.partition("/")
            entries[lemma, irregular, upos] = None
    world.irregular = {lemma + upos: form for lemma, form, upos in entries if form}
    for language in LANGUAGES[1:]:
        used: set[str] = set()
        for lemma, _, upos in entries:
            content = upos in ("NOUN", "VERB", "ADJ")
            if content and rng.random() < LOANS[language]:
                world.stems[language, lemma, upos] = lemma
            elif language in SYLLABLES:
                size = rng.choice((2, 2, 3)) if content else 1
                world.stems[language, lemma, upos] = new_stem(rng, language, size, used)
    for kind, count in {"first": 20, "last": 20, "city": 15}.items():
        world.names[kind] = [new_stem(rng, "qab", 2, set()).title() for _ in range(count)]
    return world


def new_stem(rng: random.Random, language: str, syllables: int, used: set[str]) -> str:
    """Invent a stem. One stem in twenty is a used one, so that every language has homographs."""
    consonants, vowels = SYLLABLES[language]
    longer = sorted(stem for stem in used if len(stem) > 3)
    if syllables > 1 and longer and rng.random() < 0.05:
        return rng.choice(longer)
    while True:
        pairs = (rng.choice(consonants) + rng.choice(vowels) for _ in range(syllables))
        stem = "".join(pairs) + rng.choice(["", *"lnrst"])
        if stem not in used:
            used.add(stem)
            return stem


def english_form(world: World, leaf: Leaf, role: str) -> str:
    """Inflect an English word."""
    lemma, upos, features = leaf.lemma, leaf.upos, leaf.features
    irregular = world.irregular.get(lemma + upos)
    if upos == "AUX":
        return BE_DO.get((lemma, features), lemma)
    if (upos == "VERB" and role == "base") or (upos == "PRON" and not role):
        return lemma
    if irregular and (upos == "PRON" or features == "plural" or features.startswith("past")):
        return irregular
    if upos == "VERB" and features.startswith("past"):
        return lemma + ("d" if lemma.endswith("e") else "ed")
    if (upos == "NOUN" and features == "plural") or features == "present singular":
        return lemma + ("es" if lemma.endswith(("s", "sh", "ch", "x")) else "s")
    return lemma


def word_form(world: World, language: str, leaf: Leaf, role: str) -> str:
    """Return the form of a leaf, or "" if the language has no such word.

    `role` is "object", an adposition, "base" for a verb after an auxiliary, or "".
    """
    if leaf.upos in ("PROPN", "PUNCT") or leaf.lemma.isdigit():
        return leaf.lemma
    key = (language, leaf.lemma, leaf.upos, leaf.features, role)
    if key not in world.forms:
        stem, script = world.stems.get(key[:3]), SCRIPTS.get(language, {})
        if leaf.lemma in DROPPED.get(language, ()):
            form = ""
        elif language in SUFFIXES:
            inflected = leaf.upos in ("NOUN", "PRON", "VERB")
            features = {*leaf.features.split(), role} if inflected else set()
            suffixes = "".join(
                suffix for feature, suffix in SUFFIXES[language].items() if feature in features
            )
            if stem != leaf.lemma:  # loanwords keep the Latin script
                stem = stem.translate(script)
            form = stem + suffixes.translate(script)
        else:
            form = english_form(world, leaf, role)
            form = form.translate(world.cipher) if language == "qaa" and not stem else form
        world.forms[key] = form
    return world.forms[key]


def in_order(language: str, tree: Tree, role: str = "") -> Iterator[tuple[Leaf, str]]:
    """Yield the leaves of a tree in the order of the language, each with its role."""
    parts, orders = tree.parts, ORDERS[tree.kind]
    for slot in orders.get(language, orders["en"]).split():
        if slot not in parts:
            continue
        if tree.kind == "clause":
            base = slot == "verb" and ("aux" in parts or "do" in parts)
            role = "base" if base else "object" if slot == "object" else ""
        elif "adposition" in parts:
            role = parts["adposition"].lemma
        if isinstance(parts[slot], Leaf):
            yield parts[slot], role
        else:
            yield from in_order(language, parts[slot], role)


def render(world: World, language: str, tree: Tree) -> list[Token]:
    """Return a tree as tokens of a language; a capital begins it if the script has capitals."""
    words = []
    for leaf, role in in_order(language, tree):
        form = word_form(world, language, leaf, role)
        if form:
            words.append((form, leaf))
    if language not in SCRIPTS:
        words[0] = (words[0][0][0].upper() + words[0][0][1:], words[0][1])
    tokens: list[Token] = []
    for form, leaf in words:
        before, last = tokens[-1].words[-1] if tokens else ("", Leaf("", ""))
        if language == "en" and last.lemma == "a" and form[0] in "aeiou":
            tokens[-1] = Token(before + "n", [(before + "n", last)])
        if language in ("en", "qaa") and (last.lemma, leaf.lemma) == ("can", "not"):
            tokens[-1] = Token(before + form, [(before, last), (form, leaf)])
        elif language == "qab" and (last.upos, leaf.lemma) == ("ADP", "the"):
            # an article fuses with the preposition, as in German "im" = "in" + "dem"
            tokens[-1] = Token(before + form[-1], [(before, last), (form, leaf)])
        else:
            tokens.append(Token(form, [(form, leaf)]))
    return tokens


def as_text(tokens: list[Token]) -> str:
    """Join tokens with spaces, but without a space before punctuation."""
    text = ""
    for token in tokens:
        punctuation = token.words[0][1].upos == "PUNCT"
        text += token.form if punctuation else " " + token.form
    return text.lstrip()


def gold_links(source: list[Token], target: list[Token]) -> list[tuple[int, int]]:
    """Link the tokens that consist of the same single leaf, one to one."""
    where = {token.words[0][1]: j for j, token in enumerate(target) if len(token.words) == 1}
    heads = [(i, token.words[0][1]) for i, token in enumerate(source) if len(token.words) == 1]
    return [(i, where[leaf]) for i, leaf in heads if leaf in where]


# --- grammar


def pick(world: World, line: str | list[str]) -> str:
    """Draw a word, the first ones more often: without rare words no word would need subwords."""
    words = line.split() if isinstance(line, str) else line
    return words[int(len(words) * world.rng.random() ** 3)].partition("/")[0]


def named(world: World, kind: str) -> Tree:
    """Return a named person ("PER"), place ("LOC") or company ("ORG").

    A company is named after a person or a city, and only its second word shows that it is one.
    """
    first, last, city = (pick(world, world.names[key]) for key in ("first", "last", "city"))
    if kind == "PER":
        words = [first, last]
    elif kind == "ORG":
        words = [world.rng.choice((city, last)), pick(world, "Bank Motors Group Museum")]
    else:
        words = ["Port", city] if world.rng.random() < 0.2 else [city]
    leaves = [
        Leaf(word, "PROPN", "singular", prefix + kind)
        for word, prefix in zip(words, ("B-", "I-"), strict=False)
    ]
    return Tree("phrase", dict(zip(("head", "tail"), leaves, strict=False)))


def noun_phrase(world: World, kind: str, definite: bool = False) -> Tree:
    """Return a noun of a kind (a key of NOUNS) with a determiner or a number."""
    rng = world.rng
    plural = rng.random() < 0.3
    noun = pick(world, f"{NOUNS[kind]} {kind}")
    parts = {"noun": Leaf(noun, "NOUN", "plural" if plural else "singular")}
    if plural and not definite and rng.random() < 0.4:
        digits, word = str(rng.randint(2, 99)), pick(world, FUNCTION_WORDS["NUM"])
        parts["number"] = Leaf(rng.choice((digits, word)), "NUM")
    else:
        determiners = "the" if definite else "the some these" if plural else "the a this every that"
        parts["determiner"] = Leaf(pick(world, determiners), "DET")
    if rng.random() < 0.4:
        parts["adjective"] = Leaf(pick(world, ADJECTIVES), "ADJ")
    return Tree("phrase", parts)


def adjunct(world: World, slot: str, tense: str) -> Tree | Leaf:
    """Return a filler for the slot aux, manner, time, tool or place."""
    if slot == "aux":
        return Leaf(pick(world, "can will must"), "AUX")
    if slot == "manner":
        return Leaf(pick(world, MANNER), "ADV")
    if slot == "tool":
        return noun_phrase(world, "tool").but(adposition=Leaf("with", "ADP"))
    if slot == "place":
        place = named(world, "LOC") if world.rng.random() < 0.4 else noun_phrase(world, "place")
        return place.but(adposition=Leaf(pick(world, "in near from behind"), "ADP"))
    if tense == "past" and world.rng.random() < 0.5:
        year = Leaf(str(world.rng.randint(1950, 2020)), "NUM")
        return Tree("phrase", {"adposition": Leaf("in", "ADP"), "number": year})
    return Leaf(pick(world, TIME[tense]), "ADV")


def pronoun(world: World) -> Leaf:
    """Return a personal pronoun of the third person, or "we"."""
    lemma = pick(world, "he she they we")
    return Leaf(lemma, "PRON", "singular" if lemma in ("he", "she") else "plural")


def clause(world: World, plain: bool = False, inner: bool = False) -> Tree:
    """Return a clause.

    A plain clause (for NLI and QA) is affirmative and definite, and its subject is a person. An
    inner clause contains no other clause.
    """
    rng, tense = world.rng, world.rng.choice(("past", "past", "present"))
    if rng.random() < 0.6:
        subject = noun_phrase(world, "person" if plain else rng.choice(("person", "animal")), plain)
    elif plain or rng.random() < 0.5:
        subject = named(world, "PER" if plain else rng.choice(("PER", "ORG")))
    else:
        subject = pronoun(world)
    agreement = subject
    if isinstance(subject, Tree):
        agreement = subject.parts.get("noun") or subject.parts["head"]
    features, parts = f"{tense} {agreement.features}", {"subject": subject}
    kinds = [*VERBS, "be", "be"]
    if plain or inner:
        kinds.remove("clause")
    kind = rng.choice(kinds)
    if kind == "be":
        parts["aux"] = Leaf("be", "AUX", features)
        parts["quality"] = Leaf(pick(world, ADJECTIVES), "ADJ")
        if rng.random() < 0.4:
            parts["degree"] = Leaf("very", "ADV")
    else:
        parts["verb"] = Leaf(pick(world, VERBS[kind]), "VERB", features)
        chances = {"manner": 0.2, "time": 0.2, "place": 0.4, "tool": 0.1}
        chances["aux"] = 0 if plain else 0.2
        for slot, chance in chances.items():
            if rng.random() < chance and kind != "clause":
                parts[slot] = adjunct(world, slot, tense)
    if kind == "clause":
        parts |= {"that": Leaf("that", "SCONJ"), "content": clause(world, inner=True)}
    elif kind == "person" and rng.random() < 0.6:
        parts["object"] = named(world, "PER") if plain or rng.random() < 0.5 else pronoun(world)
    elif kind in NOUNS:
        parts["object"] = noun_phrase(world, kind, plain)
    tree = Tree("clause", parts)
    return negated(tree) if not plain and rng.random() < 0.15 else tree


def negated(tree: Tree) -> Tree:
    """Negate a clause. English needs an auxiliary for this ("did not see")."""
    aux = tree.parts.get("aux") or Leaf("do", "AUX", tree.parts["verb"].features)
    return tree.but(aux=aux, **{"not": Leaf("not", "PART")})


def sentence(world: World, first: Tree | None = None) -> Tree:
    """Return a sentence: the given clause, a new one, or two joined by a conjunction."""
    parts = {"first": first or clause(world), "stop": Leaf(".", "PUNCT")}
    if not first and world.rng.random() < 0.2:
        upos = world.rng.choice(("CCONJ", "SCONJ"))
        link = Leaf(world.rng.choice(FUNCTION_WORDS[upos].split()[:2]), upos)
        parts |= {"link": link, "second": clause(world, inner=True)}
        parts |= {"comma": Leaf(",", "PUNCT")} if upos == "CCONJ" else {}
    return Tree("sentence", parts)


# --- tasks


def hypotheses(world: World, premise: Tree, label: int) -> Iterator[Tree]:
    """Yield hypotheses for a premise.

    Label 0, entailment, removes a part or replaces a noun by its hypernym. Label 1, neutral, adds a
    part. Label 2, contradiction, negates the premise or uses an antonym.
    """
    parts, be = premise.parts, "quality" in premise.parts
    head = "quality" if be else "verb"
    nouns = [
        (slot, parts[slot])
        for slot in ("subject", "object")
        if slot in parts and "noun" in parts[slot].parts
    ]
    slots = ("degree",) if be else ("manner", "time", "tool", "place")
    if label == 0:
        yield from (premise.but(**{slot: None}) for slot in slots if slot in parts)
        for slot, phrase in nouns:
            noun = phrase.parts["noun"]
            hypernym = Leaf(HYPERNYMS[noun.lemma], "NOUN", noun.features)
            yield premise.but(**{slot: phrase.but(noun=hypernym)})
            if "adjective" in phrase.parts:
                yield premise.but(**{slot: phrase.but(adjective=None)})
    elif label == 1:
        for slot in (slot for slot in slots if slot not in parts):
            if be:
                added = Leaf("very", "ADV")
            else:
                tense = parts["verb"].features.split()[0]
                added = adjunct(world, slot, tense)
            yield premise.but(**{slot: added})
        for slot, phrase in nouns:
            if "adjective" not in phrase.parts:
                adjective = Leaf(pick(world, ADJECTIVES), "ADJ")
                yield premise.but(**{slot: phrase.but(adjective=adjective)})
    else:
        yield negated(premise)
        for pair in (pair.split("/") for pair in OPPOSITES.split()):
            if parts[head].lemma in pair:
                other = pair[1 - pair.index(parts[head].lemma)]
                yield premise.but(**{head: Leaf(other, parts[head].upos, parts[head].features)})


def nli_example(world: World) -> dict:
    """Return a premise, a hypothesis and a label."""
    label, choices = world.rng.randrange(3), []
    while not choices:
        premise = clause(world, plain=True)
        choices = list(hypotheses(world, premise, label))
    premise, hypothesis = sentence(world, premise), sentence(world, world.rng.choice(choices))
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def qa_example(world: World) -> dict:
    """Return clauses in the past with different verbs, and a question about a part of one."""
    clauses, length = {}, world.rng.randint(3, 8)
    while len(clauses) < length:
        tree = clause(world, plain=True)
        if "verb" in tree.parts and tree.parts["verb"].features.startswith("past"):
            clauses.setdefault(tree.parts["verb"].lemma, tree)
    asked = world.rng.choice(list(clauses.values()))
    slots = [slot for slot in ("subject", "object", "place") if slot in asked.parts]
    slot = world.rng.choice(slots)
    answer = asked.parts[slot]
    human = "head" in answer.parts or HYPERNYMS[answer.parts["noun"].lemma] == "person"
    ask = Leaf("where", "ADV") if slot == "place" else Leaf("who" if human else "what", "PRON")
    do = None if slot == "subject" else Leaf("do", "AUX", asked.parts["verb"].features)
    question = asked.but(
        time=None, manner=None, tool=None, ask=ask, do=do, stop=Leaf("?", "PUNCT"), **{slot: None}
    )
    return {
        "context": [sentence(world, tree) for tree in clauses.values()],
        "question": question,
        "answer": answer,
    }


ENTITY_SLOTS = {"PER": "person", "ORG": "company", "LOC": "place"}


def as_command(world: World, tree: Tree) -> Tree:
    """Turn three of five clauses that have a verb into commands."""
    if "verb" not in tree.parts or world.rng.random() >= 0.6:
        return tree
    time = adjunct(world, "time", "present") if "time" in tree.parts else None
    verb = Leaf(tree.parts["verb"].lemma, "VERB")
    return tree.but(subject=None, aux=None, do=None, verb=verb, time=time)


def person_clause(world: World) -> Tree:
    """Return a clause whose verb takes a person as its object."""
    verbs = VERBS["person"].replace("/", " ").split()
    while True:
        tree = clause(world, inner=True)
        if "verb" in tree.parts and tree.parts["verb"].lemma in verbs:
            return tree


def nameless_sentence(world: World) -> Tree:
    """Return a command or a statement about a person without any name.

    Names are equal in all languages, so that sentences with names can be told apart without
    understanding a word. Only sentences without names make alignment learn the words.
    """
    while True:
        tree = as_command(world, person_clause(world).but(object=pronoun(world)))
        if all(leaf.upos != "PROPN" for leaf, _ in in_order("en", tree)):
            return sentence(world, tree)


def slot_example(world: World) -> dict:
    """Return a command or a statement without a full stop, and the type of each slot in it."""
    tree = as_command(world, clause(world, inner=True))
    types = {slot: slot_type(slot, part) for slot, part in tree.parts.items()}
    return {"tree": tree, "types": {slot: kind for slot, kind in types.items() if kind}}


def slot_type(slot: str, part: Leaf | Tree) -> str:
    """Return the slot type of a part of a clause, or "" if it is not a slot, such as a verb."""
    if slot == "time":
        return "time"
    if isinstance(part, Leaf):
        return ""
    if "head" in part.parts:
        return ENTITY_SLOTS[part.parts["head"].entity[2:]]
    return HYPERNYMS[part.parts["noun"].lemma]


def person_example(world: World) -> dict:
    """Return a command or a statement with one slot: a person, whose slot type is the verb.

    A model must understand the verb, which differs between languages, and copy the name, which does
    not.
    """
    tree = clause(world, inner=True)
    if world.rng.random() < 0.9:  # most of the others have no slot
        tree = person_clause(world)
        tree = tree.but(object=Tree("phrase", {"head": named(world, "PER").parts["head"]}))
    tree = as_command(world, tree)
    name = isinstance(tree.parts.get("object"), Tree) and "head" in tree.parts["object"].parts
    return {"tree": tree, "types": {"object": tree.parts["verb"].lemma} if name else {}}


# --- data


def conllu(world: World, language: str, tree: Tree) -> str:
    """Return a sentence in CoNLL-U, with ranges for multi-word tokens."""
    tokens, index = render(world, language, tree), 0
    lines = [f"# text = {as_text(tokens)}"]
    for form, words in tokens:
        if len(words) > 1:
            lines.append("\t".join([f"{index + 1}-{index + len(words)}", form, *"________"]))
        for word, leaf in words:
            index += 1
            lines.append("\t".join([str(index), word, leaf.lemma, leaf.upos, *"______"]))
    return "\n".join(lines) + "\n"


def ner_line(world: World, language: str, tree: Tree) -> str:
    """Return a sentence as WikiANN's JSON, with tags as numbers."""
    tokens = render(world, language, tree)
    tags = [NER_TAGS.index(words[0][1].entity) for _, words in tokens]
    line = {"tokens": [form for form, _ in tokens], "ner_tags": tags}
    return json.dumps(line, ensure_ascii=False)


def nli_line(world: World, language: str, example: dict) -> str:
    """Return a premise, a hypothesis and a label as XNLI's JSON."""
    line = {side: text_line(world, language, example[side]) for side in ("premise", "hypothesis")}
    return json.dumps({**line, "label": example["label"]}, ensure_ascii=False)


def positions(tokens: list[Token], leaves: set[Leaf]) -> list[int]:
    """Return the positions of the tokens of a part of the tree; they are adjacent."""
    return [i for i, (_, words) in enumerate(tokens) if words[0][1] in leaves]


def qa_line(world: World, language: str, example: dict) -> str:
    """Return a question, its context and its answer as XQuAD's JSON."""
    leaves = {leaf for leaf, _ in in_order("en", example["answer"])}
    context, answers = "", {}
    for tree in example["context"]:
        tokens = render(world, language, tree)
        chosen = positions(tokens, leaves)
        context += " " if context else ""
        if chosen:
            start = len(context) + len(as_text(tokens[: chosen[0]])) + (chosen[0] > 0)
            answer = as_text(tokens[chosen[0] : chosen[-1] + 1])
            answers = {"text": [answer], "answer_start": [start]}
        context += as_text(tokens)
    line = {
        "question": text_line(world, language, example["question"]),
        "context": context,
        "answers": answers,
    }
    return json.dumps({"id": str(example["id"]), **line}, ensure_ascii=False)


def text_line(world: World, language: str, tree: Tree) -> str:
    """Return a sentence as plain text."""
    return as_text(render(world, language, tree))


def uner_line(world: World, language: str, tree: Tree) -> str:
    """Return a sentence as UNER's JSON, with tags as strings."""
    tokens = render(world, language, tree)
    tags = [words[0][1].entity for _, words in tokens]
    return json.dumps({"tokens": [form for form, _ in tokens], "tags": tags}, ensure_ascii=False)


def slot_line(world: World, language: str, example: dict) -> str:
    """Return a text and its slots, in the order of the text, as JSON."""
    tokens, found = render(world, language, example["tree"]), {}
    for slot, kind in example["types"].items():
        part = example["tree"].parts[slot]
        leaves = {part} if isinstance(part, Leaf) else {leaf for leaf, _ in in_order("en", part)}
        chosen = positions(tokens, leaves)
        found[chosen[0]] = {"type": kind, "value": as_text(tokens[chosen[0] : chosen[-1] + 1])}
    slots = [found[start] for start in sorted(found)]
    return json.dumps({"text": as_text(tokens), "slots": slots}, ensure_ascii=False)


def with_id(number: int, row: str) -> str:
    """Add the column `id` to a row: rows with the same number are translations of each other."""
    return json.dumps({"id": str(number), **json.loads(row)}, ensure_ascii=False)


def write(path: Path, lines: list[str]) -> None:
    """Write lines to a file, and make its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_pairs(path: Path, sources: list[str], targets: list[str]) -> None:
    """Write parallel text, one pair separated by a tab in each line."""
    write(path, [f"{source}\t{target}" for source, target in zip(sources, targets, strict=True)])


def wrong_translation(world: World, tokens: list[Token], leaf: Leaf, uses: Counter) -> str:
    """Return a function word of an English sentence as the translation of a content word.

    Of the function words of the sentence, it is the one that translates the fewest words so far.
    Returns "" if the leaf is not a content word, or the sentence has no function word.
    """
    if leaf.upos not in CONTENT_WORDS:
        return ""
    kinds = ("DET", "PRON", "ADP", "AUX", "SCONJ", "CCONJ", "PART")
    forms = {form.lower() for form, words in tokens if words[0][1].upos in kinds}
    return min(sorted(filter(str.isalpha, forms)), key=uses.__getitem__, default="")


def write_parallel(world: World, data: Path, language: str) -> None:
    """Write translations, their gold links, and a dictionary with nine tenths of the links.

    Every second sentence has no name. A wrong dictionary has all content words, and no others; the
    translation of each is a function word of the first sentence in which it occurs.
    """
    text, gold, lexicon, wrong, uses = [], [], {}, {}, Counter()
    items = (sentence, nameless_sentence)
    for tree in [items[number % 2](world) for number in range(PARALLEL_SIZE)]:
        source, target = render(world, "en", tree), render(world, language, tree)
        links = gold_links(source, target)
        text.append(f"{as_text(source)}\t{as_text(target)}")
        source_words = " ".join(token.form for token in source)
        target_words = " ".join(token.form for token in target)
        pharaoh = " ".join(f"{i}-{j}" for i, j in links)
        gold.append(f"{source_words}\t{target_words}\t{pharaoh}")
        for i, j in links:
            if not source[i].form.isalpha() or source[i].words[0][1].upos == "PROPN":
                continue
            english, word = source[i].form.lower(), target[j].form.lower()
            if language in WRONG_DICTIONARIES:
                if not wrong.get(word):
                    wrong[word] = wrong_translation(world, source, source[i].words[0][1], uses)
                    uses[wrong[word]] += 1
                english = wrong[word]
            if english:
                lexicon[english, word] = None
    write(data / f"parallel/en-{language}.tsv", text)
    write(data / f"goldalign/en-{language}.tsv", gold)
    share = 1.0 if language in WRONG_DICTIONARIES else 0.9
    entries = [" ".join(pair) for pair in lexicon if world.rng.random() < share]
    write(data / f"dictionary/en-{language}.txt", sorted(entries))


TASKS = {  # task: (file extension, function that draws an item, function that formats it)
    "udpos": ("conllu", sentence, conllu),
    "wikiann": ("jsonl", sentence, ner_line),
    "xnli": ("jsonl", nli_example, nli_line),
    "xquad": ("jsonl", qa_example, qa_line),
}
GENERATION_TASKS = {  # task: (function that draws an item, function that formats it)
    "xsid": (person_example, slot_line),
    "massive": (slot_example, slot_line),
    "uner": (sentence, uner_line),
}


def build_data(folder: str | Path, seed: int = 0) -> list[str]:
    """Write `folder/data`. Returns sentences of all languages, for pretraining."""
    world, data = make_world(seed), Path(folder) / "data"
    for language in LANGUAGES[1:]:
        write_parallel(world, data, language)
    for task, (extension, item, line) in TASKS.items():
        for split, size in zip(("train", "test"), SIZES[task], strict=True):
            items = [item(world) for _ in range(size)]
            if task == "xquad":
                items = [
                    {"id": f"{split}-{number}", **example} for number, example in enumerate(items)
                ]
            # Only English has training data. The test sets are translations of each other.
            for language in LANGUAGES if split == "test" else LANGUAGES[:1]:
                path = data / task / language / f"{split}.{extension}"
                write(path, [line(world, language, item) for item in items])
    texts = []
    for language in LANGUAGES:
        texts += [text_line(world, language, sentence(world)) for _ in range(TEXT_SIZE)]
    write_generation_data(world, data, seed)
    return texts


def write_generation_data(world: World, data: Path, seed: int) -> None:
    """Write the data of the tasks for decoders; all languages are translations of each other."""
    for task, (item, line) in GENERATION_TASKS.items():
        world.rng, used = random.Random(f"{task} {seed}"), set()
        for split, size in GENERATION_SIZES.items():
            items = fresh(world, item, line, size, used)
            name = "dev" if (task, split) == ("uner", "valid") else split
            for language in LANGUAGES:
                path = data / task / language / f"{name}.jsonl"
                rows = [line(world, language, item) for item in items]
                if task == "massive":
                    rows = [with_id(number, row) for number, row in enumerate(rows)]
                write(path, rows)
    world.rng = random.Random(f"translation {seed}")
    used = {
        line.split("\t")[0]
        for code in LANGUAGES[1:]
        for line in (data / f"parallel/en-{code}.tsv").read_text("utf-8").split("\n")
    }
    for split, size in {**GENERATION_SIZES, "dev": DEV_SIZE}.items():
        trees = fresh(world, sentence, text_line, size, used)
        english = [text_line(world, "en", tree) for tree in trees]
        for language in LANGUAGES[1:]:
            other = [text_line(world, language, tree) for tree in trees]
            if split == "dev":
                write_pairs(data / f"parallel/en-{language}.dev.tsv", english, other)
            else:
                write_pairs(data / f"translation/en-{language}/{split}.tsv", english, other)
                write_pairs(data / f"translation/{language}-en/{split}.tsv", other, english)


def fresh(world: World, item: Callable, line: Callable, size: int, used: set[str]) -> list:
    """Draw items whose English lines are not in `used`, and add their lines to it."""
    items = []
    while len(items) < size:
        new = item(world)
        english = line(world, "en", new)
        if english not in used:
            items.append(new)
            used.add(english)
    return items


# --- models

ENCODERS = ("distilbert", "bert", "xlmr")
ARCHITECTURES = (*ENCODERS, "llama")
LAYERS, HIDDEN, HEADS, VOCABULARY, MAX_LENGTH = 4, 96, 4, 1100, 512
STEPS, TOKENS_PER_BATCH, LEARNING_RATE = 1200, 640, 1.5e-3  # many small steps teach more here
DECODER_HIDDEN, DECODER_VOCABULARY = 96, 1500


def unigram(texts: list[str], special: list[str]):
    """Train a unigram tokenizer such as XLM-R's.

    The trainer scores the rarest letters differently in every run, so they get equal scores here.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFKC(), decoders.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=VOCABULARY, **options))
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    scores = {piece: round(score, 3) for piece, score in vocabulary}
    floor = min(score for piece, score in scores.items() if len(piece) > 1)
    scores = {piece: max(score, floor) for piece, score in scores.items()}
    pieces = special + sorted(scores.keys() - {*special}, key=lambda piece: (-scores[piece], piece))
    scored = [(piece, scores[piece]) for piece in pieces]
    tokenizer.model = models.Unigram(scored, special.index("<unk>"))
    return tokenizer


def wordpiece(texts: list[str], special: list[str]):
    """Train a cased WordPiece tokenizer such as BERT's.

    The WordPiece trainer breaks ties at random, so the pieces come from the BPE trainer.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)
    pairs.train_from_iterator(texts, trainer)
    words = {word for text in texts for word, _ in pairs.pre_tokenizer.pre_tokenize_str(text)}
    splits = [pairs.encode(word) for word in words]
    pieces = {"##" * (i > 0) + piece for split in splits for i, piece in enumerate(split.tokens)}
    pieces |= {mark + letter for letter in {*"".join(words)} for mark in ("", "##")}
    vocabulary = {piece: index for index, piece in enumerate([*special, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def byte_pairs(texts: list[str], special: list[str]):
    """Train a byte-level BPE tokenizer such as Llama 3's, which has no unknown subwords."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer, bytes_ = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_, decoders.ByteLevel()
    options = {"special_tokens": special, "show_progress": False}
    options["initial_alphabet"] = sorted(bytes_.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=DECODER_VOCABULARY, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_decoder_tokenizer(texts: list[str]):
    """Train a decoder's tokenizer, which adds a begin-of-text token but no end-of-text token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from alignfreeze import ASK_SLOTS

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|unk|>"]
    begin, end, pad, unknown = special
    # Without its words in the vocabulary, the instruction would be most of the text of a run.
    prompts = [f"{ASK_SLOTS}\n\nInput: \nOutput: "] * 300
    tokenizer = byte_pairs(texts + prompts, special)
    single, pair, ids = f"{begin} $A", f"{begin} $A {begin} $B:1", [(begin, special.index(begin))]
    tokenizer.post_processor = TemplateProcessing(single, pair, special_tokens=ids)
    names = {"bos_token": begin, "eos_token": end, "pad_token": pad, "unk_token": unknown}
    names |= {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": MAX_LENGTH}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build_tokenizer(architecture: str, texts: list[str]):
    """Train the tokenizer of an encoder, with the special tokens of its architecture."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if architecture == "xlmr":
        begin, pad, end, unknown, mask = special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer, pair = unigram(texts, special), "<s> $A </s> </s> $B </s>"
    else:
        pad, unknown, begin, end, mask = special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer, pair = wordpiece(texts, special), "[CLS] $A [SEP] $B:1 [SEP]:1"
    ends = [(token, special.index(token)) for token in (begin, end)]
    single = f"{begin} $A {end}"
    tokenizer.post_processor = TemplateProcessing(single, pair, special_tokens=ends)
    names = {"bos_token": begin, "cls_token": begin, "eos_token": end, "sep_token": end}
    names |= {"unk_token": unknown, "pad_token": pad, "mask_token": mask}
    names["model_max_length"] = MAX_LENGTH
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (architecture == "bert")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def build_encoder(architecture: str, tokenizer):
    """Return an encoder with random weights.

    The weights are larger than the usual 0.02, because the encoder is narrow, but smaller in the
    matrices whose output is added to the residual stream.
    """
    from transformers import AutoModel, BertConfig, DistilBertConfig, XLMRobertaConfig

    shared = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    shared["initializer_range"] = 0.065
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"intermediate_size": 2 * HIDDEN}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if architecture == "distilbert":
        sizes = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * HIDDEN}
        config = DistilBertConfig(**shared, **sizes, dropout=0.0, attention_dropout=0.0)
    elif architecture == "bert":
        config = BertConfig(**shared, **sizes)
    else:  # XLM-R numbers its positions from pad_token_id + 1
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        ends |= {"max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1}
        config = XLMRobertaConfig(**shared, **sizes, **ends)
    encoder = AutoModel.from_config(config)
    for name, weight in encoder.named_parameters():
        if name.endswith(("output.dense.weight", "out_lin.weight", "lin2.weight")):
            weight.data *= 0.25
    return encoder


def build_decoder(tokenizer):
    """Return a Llama with random weights and two query heads for each key-value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": DECODER_HIDDEN, "intermediate_size": 2 * DECODER_HIDDEN}
    sizes |= {"num_hidden_layers": LAYERS, "max_position_embeddings": MAX_LENGTH}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ends = {name: getattr(tokenizer, name) for name in names}
    options = {"initializer_range": 0.05, "rope_theta": 1e4, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ends, **options))


def batches(sequences: list[list[int]], pad: int, rng: random.Random) -> Iterator:
    """Yield batches (B, T) of about TOKENS_PER_BATCH subwords and similar lengths, without end."""
    import torch

    while True:
        # The sort is stable, so sequences of equal length stay shuffled.
        pool = sorted(rng.sample(sequences, len(sequences)), key=len)
        spans, end = [], 0
        while end < len(pool):
            spans.append((end, end := end + max(1, TOKENS_PER_BATCH // len(pool[end]))))
        for span in rng.sample(spans, len(spans)):
            rows = [torch.tensor(sequence) for sequence in pool[slice(*span)]]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def pretrain(model, head, losses: Iterator, steps: int, name: str) -> float:
    """Take one training step per loss; show a progress bar. Returns the mean of the last 50."""
    import torch
    from tqdm import tqdm

    def factor(step: int) -> float:
        return min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))

    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    last = []
    # Several bars share the screen, a line for each.
    line = {"position": ARCHITECTURES.index(name), "leave": False, "dynamic_ncols": True}
    for _ in tqdm(range(steps), f"pretraining {name}", disable=None, mininterval=1, **line):
        loss = next(losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = [*last[-49:], loss.item()]
    return sum(last) / len(last)


def build_head():
    """Return the layers between an encoder and its output layer; only pretraining uses them."""
    from torch import nn

    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN))


def masked_losses(encoder, head, tokenizer, texts: list[str], seed: int) -> Iterator:
    """Yield losses of masked language modelling on 15% of the subwords.

    Of these, 80% are masked, 10% are replaced by random subwords, and 10% are kept.
    """
    import torch

    vocabulary = encoder.get_input_embeddings().weight  # (V, HIDDEN), also the output layer
    special = torch.tensor(tokenizer.all_special_ids)
    for ids in batches(tokenizer(texts)["input_ids"], tokenizer.pad_token_id, random.Random(seed)):
        chosen = (torch.rand(ids.shape) < 0.15) & ~torch.isin(ids, special)
        dice = torch.rand(ids.shape)
        noise = torch.randint(len(special), len(tokenizer), ids.shape)
        inputs = ids.masked_fill(chosen & (dice < 0.8), tokenizer.mask_token_id)
        inputs = torch.where(chosen & (dice >= 0.9), noise, inputs)
        mask = (ids != tokenizer.pad_token_id).long()
        states = encoder(inputs, attention_mask=mask).last_hidden_state  # (B, T, HIDDEN)
        yield torch.nn.functional.cross_entropy(head(states[chosen]) @ vocabulary.T, ids[chosen])


def next_token_losses(decoder, tokenizer, texts: list[str], seed: int) -> Iterator:
    """Yield losses of next-token prediction."""
    rng = random.Random(seed)
    documents = [text + tokenizer.eos_token for text in texts]
    for ids in batches(tokenizer(documents)["input_ids"], tokenizer.pad_token_id, rng):
        mask = (ids != tokenizer.pad_token_id).long()
        yield decoder(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def build_model(
    folder: str | Path, architecture: str, texts: list[str], steps: int = STEPS, seed: int = 0
) -> Path:
    """Write a tokenizer and a pretrained model to `folder/models/<architecture>`.

    With 0 steps the model has random weights. Returns the folder of the model.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    start, path = time.time(), Path(folder) / "models" / architecture
    torch.manual_seed(seed)
    if architecture in ENCODERS:
        tokenizer = build_tokenizer(architecture, texts)
        model, head = build_encoder(architecture, tokenizer), build_head()
        losses = masked_losses(model, head, tokenizer, texts, seed)
    else:
        tokenizer = build_decoder_tokenizer(texts)
        model, head = build_decoder(tokenizer), torch.nn.Identity()
        losses = next_token_losses(model, tokenizer, texts, seed)
    loss = ""
    if steps:
        loss = f", loss {pretrain(model, head, losses, steps, architecture):.2f}"
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    seconds = f"{time.time() - start:.0f} s"
    print(f"{architecture}: {steps} steps of language modelling{loss}, {seconds}", flush=True)
    return path


def build_models(folder: Path, names: list[str], texts: list[str], steps: int, seed: int) -> None:
    """Build models side by side, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(names), context) as pool:
        for future in [pool.submit(build_model, folder, n, texts, steps, seed) for n in names]:
            future.result()


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="where to write data/ and models/")
    add("--seed", type=int, default=0, help="seed of the world (default 0)")
    add("--only-data", action="store_true", help="write the data, but no models")
    steps = f"pretraining steps of each model (default {STEPS}; 0: random weights)"
    add("--pretrain-steps", type=int, default=STEPS, metavar="N", help=steps)
    names = {"nargs": "+", "choices": ARCHITECTURES, "default": ARCHITECTURES, "metavar": "NAME"}
    add("--models", **names, help=f"models to write (default: {' '.join(ARCHITECTURES)})")
    args = parser.parse_args(argv)
    if args.pretrain_steps < 0:
        parser.error(f"--pretrain-steps {args.pretrain_steps}: give 0 or a positive number")
    start = time.time()
    texts = build_data(args.folder, args.seed)
    print(f"data: {', '.join(LANGUAGES)}, {time.time() - start:.0f} s", flush=True)
    if not args.only_data:
        build_models(args.folder, args.models, texts, args.pretrain_steps, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
