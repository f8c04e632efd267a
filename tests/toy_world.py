"""A small invented world in the project's real formats: data for four tasks, and three tiny pretrained encoders.

    python tests/toy_world.py toy                                   toy/data, and toy/models/{distilbert,bert,xlmr}
    python tests/toy_world.py toy --models xlmr --seed 1            another world, with one encoder
    python tests/toy_world.py toy --only-data                       no encoders: a few seconds
    python tests/toy_world.py toy --pretrain-steps 0                encoders with random weights

One grammar writes sentences as trees whose leaves are words of no language. Each language puts the parts of every tree
in its own order (`ORDERS`) and gives every leaf its own form (`word_form`), so translations, word links, tags and
answers are gold:

    en    a small English
    qaa   the order of English, its words enciphered letter by letter
    qab   its own words, the object before the verb, the adjective after the noun, articles fused with prepositions
    qac   its own words in another script, the verb last, suffixes for case, tense and number, no articles

Names, digits, punctuation and some loanwords are the same everywhere. The encoders learn by masked language modelling,
from sentences written separately for each language (never from translations), for a fixed number of steps. The same
seed gives the same files. The world lets the project run, teach and test itself without a network; it says nothing
about real languages.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LANGUAGES = ("en", "qaa", "qab", "qac")
SIZES = {
    "udpos": (1500, 200),
    "wikiann": (1500, 200),
    "xnli": (3000, 200),
    "xquad": (1000, 150),
}  # training, test
GENERATION_SIZES = {"train": 800, "valid": 100, "test": 200}
PARALLEL_SIZE, DEV_SIZE, TEXT_SIZE = 2000, 100, 5000  # sentences per language
NER_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")

# -------------------------------------------------------------------------------------------------------------- lexicon
# In every line the commonest word comes first. An irregular form follows its slash. Words such as "cook", "watch" and
# "saw" stand in two lines: the part of speech of an English word cannot always be looked up.

NOUNS = {  # hypernym: hyponyms
    "animal": "dog cat horse bird sheep/sheep cow wolf/wolves fox bear mouse/mice",
    "person": "teacher doctor child/children farmer woman/women man/men cook guard judge painter",
    "food": "apple cake egg loaf/loaves pie plum pear onion",
    "tool": "hammer knife/knives rope saw ladder lamp watch brush",
    "building": "house school church tower bridge barn mill castle",
    "place": "garden village forest river market valley harbour island",
}
VERBS = {  # class of the object ("" for none): verbs
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
MANNER, TIME = (
    "slowly quickly gladly often alone carefully",
    {"past": "yesterday recently", "present": "today now"},
)
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

# ------------------------------------------------------------------------------------------------------------ languages

ORDERS = {  # kind of tree: language: its parts from left to right; a language without an entry has the order of English
    "sentence": {"en": "first comma link second stop"},
    "clause": {
        "en": "ask do time subject aux not verb object that content degree quality manner tool place stop",
        "qab": "time subject object ask aux not verb that content quality degree manner tool place stop",
        "qac": "subject time place tool object manner ask degree quality verb aux not that content stop",
    },
    "phrase": {
        "en": "adposition determiner number adjective noun head tail",
        "qab": "adposition determiner number noun adjective head tail",
        "qac": "number adjective noun head tail determiner adposition",
    },
}
DROPPED = {
    "qab": {"do"},
    "qac": {"do", "be", "a", "the", "in", "from", "with"},
}  # lemmas that a language has no word for
SUFFIXES = {  # feature or role: suffix, in the order in which they are added
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
LOANS = 0.3  # the share of nouns, verbs and adjectives that each language borrows from English


@dataclass(
    eq=False, slots=True
)  # compared by identity: a leaf is one word of one sentence, in whichever language
class Leaf:
    lemma: str  # the English lemma, a name, digits, or punctuation
    upos: str
    features: str = ""  # "plural" of a noun, "past singular" of a verb ...
    entity: str = "O"


@dataclass(eq=False, slots=True)
class Tree:
    kind: str  # a key of ORDERS
    parts: dict[str, Leaf | Tree]

    def but(self, **changes: Leaf | Tree | None) -> Tree:
        """A copy with other parts; None takes a part away."""
        return Tree(self.kind, {slot: part for slot, part in {**self.parts, **changes}.items() if part})


class Token(NamedTuple):
    form: str
    words: list[tuple[str, Leaf]]  # two in a multi-word token such as "cannot" = "can" + "not"


@dataclass
class World:
    """What a seed decides: the words of the invented languages, and the names."""

    rng: random.Random
    irregular: dict[str, str] = field(default_factory=dict)  # English lemma -> its one irregular form
    cipher: dict[int, int] = field(default_factory=dict)  # of qaa, for str.translate
    stems: dict[tuple[str, str, str], str] = field(
        default_factory=dict
    )  # (language, lemma, part of speech) -> stem
    names: dict[str, list[str]] = field(default_factory=dict)
    forms: dict[tuple, str] = field(default_factory=dict)  # what word_form has answered before


def make_world(seed: int) -> World:
    rng = random.Random(seed)
    world = World(rng)
    for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz"):
        world.cipher |= str.maketrans(letters, "".join(rng.sample(letters, len(letters))))
    lines = [("NOUN", f"{hypernym} {line}") for hypernym, line in NOUNS.items()]
    lines += (
        [("VERB", line) for line in VERBS.values()]
        + [("ADJ", ADJECTIVES)]
        + list(FUNCTION_WORDS.items())
    )
    entries = {
        (*entry.partition("/")[::2], upos): None for upos, line in lines for entry in line.split()
    }
    world.irregular = {lemma + upos: form for lemma, form, upos in entries if form}
    for language in LANGUAGES[1:]:
        used: set[str] = set()
        for lemma, _, upos in entries:
            content = upos in ("NOUN", "VERB", "ADJ")
            if content and rng.random() < LOANS:
                world.stems[language, lemma, upos] = lemma
            elif language in SYLLABLES:
                size = rng.choice((2, 2, 3)) if content else 1
                world.stems[language, lemma, upos] = new_stem(rng, language, size, used)
    for kind, count in {"first": 20, "last": 20, "city": 15}.items():
        world.names[kind] = [new_stem(rng, "qab", 2, set()).title() for _ in range(count)]
    return world


def new_stem(rng: random.Random, language: str, syllables: int, used: set[str]) -> str:
    """An invented stem. One in twenty is used already, so that every language has homographs of its own."""
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
    """The form of a leaf in a role ("object", an adposition, "base" after an auxiliary); "" if a language drops it."""
    if leaf.upos in ("PROPN", "PUNCT") or leaf.lemma.isdigit():
        return leaf.lemma
    key = (language, leaf.lemma, leaf.upos, leaf.features, role)
    if key not in world.forms:
        stem, script = world.stems.get(key[:3]), SCRIPTS.get(language, {})
        if leaf.lemma in DROPPED.get(language, ()):
            form = ""
        elif language in SUFFIXES:
            features = {*leaf.features.split(), role} if leaf.upos in ("NOUN", "PRON", "VERB") else set()
            suffixes = "".join(
                suffix for feature, suffix in SUFFIXES[language].items() if feature in features
            )
            form = (stem if stem == leaf.lemma else stem.translate(script)) + suffixes.translate(script)
        else:
            form = english_form(world, leaf, role)
            form = form.translate(world.cipher) if language == "qaa" and not stem else form
        world.forms[key] = form
    return world.forms[key]


def in_order(language: str, tree: Tree, role: str = "") -> Iterator[tuple[Leaf, str]]:
    """The leaves of a tree in the language's order, each with its role."""
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
    """A tree as the tokens of a language, with a capital in front where the script has capitals."""
    words = [(word_form(world, language, leaf, role), leaf) for leaf, role in in_order(language, tree)]
    words = [(form, leaf) for form, leaf in words if form]
    if language not in SCRIPTS:
        words[0] = (words[0][0][0].upper() + words[0][0][1:], words[0][1])
    tokens: list[Token] = []
    for form, leaf in words:
        before, last = tokens[-1].words[-1] if tokens else ("", Leaf("", ""))
        if language == "en" and last.lemma == "a" and form[0] in "aeiou":
            tokens[-1] = Token(before + "n", [(before + "n", last)])
        if language in ("en", "qaa") and (last.lemma, leaf.lemma) == ("can", "not"):
            tokens[-1] = Token(before + form, [(before, last), (form, leaf)])
        elif language == "qab" and (last.upos, leaf.lemma) == ("ADP", "the"):  # as German im = in + dem
            tokens[-1] = Token(before + form[-1], [(before, last), (form, leaf)])
        else:
            tokens.append(Token(form, [(form, leaf)]))
    return tokens


def as_text(tokens: list[Token]) -> str:
    return "".join(
        ("" if token.words[0][1].upos == "PUNCT" else " ") + token.form for token in tokens
    ).lstrip()


def gold_links(source: list[Token], target: list[Token]) -> list[tuple[int, int]]:
    """One-to-one links: both tokens are the same leaf, and nothing else."""
    where = {token.words[0][1]: j for j, token in enumerate(target) if len(token.words) == 1}
    heads = [(i, token.words[0][1]) for i, token in enumerate(source) if len(token.words) == 1]
    return [(i, where[leaf]) for i, leaf in heads if leaf in where]


# -------------------------------------------------------------------------------------------------------------- grammar


def pick(world: World, line: str | list[str]) -> str:
    """A word of a line, the first ones more often: it takes rare words to need subwords."""
    words = line.split() if isinstance(line, str) else line
    return words[int(len(words) * world.rng.random() ** 3)].partition("/")[0]


def named(world: World, kind: str) -> Tree:
    """A person, a place, or a company that is named after one of them: only its second word tells."""
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
    rng = world.rng
    plural = rng.random() < 0.3
    parts = {
        "noun": Leaf(pick(world, f"{NOUNS[kind]} {kind}"), "NOUN", "plural" if plural else "singular")
    }
    if plural and not definite and rng.random() < 0.4:
        parts["number"] = Leaf(
            rng.choice((str(rng.randint(2, 99)), pick(world, FUNCTION_WORDS["NUM"]))), "NUM"
        )
    else:
        determiners = "the" if definite else "the some these" if plural else "the a this every that"
        parts["determiner"] = Leaf(pick(world, determiners), "DET")
    if rng.random() < 0.4:
        parts["adjective"] = Leaf(pick(world, ADJECTIVES), "ADJ")
    return Tree("phrase", parts)


def adjunct(world: World, slot: str, tense: str) -> Tree | Leaf:
    """Something for the slot aux, manner, time, tool or place."""
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
    lemma = pick(world, "he she they we")
    return Leaf(lemma, "PRON", "singular" if lemma in ("he", "she") else "plural")


def clause(world: World, plain: bool = False, inner: bool = False) -> Tree:
    """A clause. A plain one (NLI, QA) is affirmative, about people, and definite; an inner one has no clause in it."""
    rng, tense = world.rng, world.rng.choice(("past", "past", "present"))
    if rng.random() < 0.6:
        subject = noun_phrase(world, "person" if plain else rng.choice(("person", "animal")), plain)
    elif plain or rng.random() < 0.5:
        subject = named(world, "PER" if plain else rng.choice(("PER", "ORG")))
    else:
        subject = pronoun(world)
    agreement = (
        subject if isinstance(subject, Leaf) else subject.parts.get("noun") or subject.parts["head"]
    )
    features, parts = f"{tense} {agreement.features}", {"subject": subject}
    kind = rng.choice(
        [kind for kind in (*VERBS, "be", "be") if kind != "clause" or not (plain or inner)]
    )
    if kind == "be":
        parts |= {"aux": Leaf("be", "AUX", features), "quality": Leaf(pick(world, ADJECTIVES), "ADJ")}
        parts |= {"degree": Leaf("very", "ADV")} if rng.random() < 0.4 else {}
    else:
        parts["verb"] = Leaf(pick(world, VERBS[kind]), "VERB", features)
        for slot, chance in {
            "manner": 0.2,
            "time": 0.2,
            "place": 0.4,
            "tool": 0.1,
            "aux": 0 if plain else 0.2,
        }.items():
            if rng.random() < chance and kind != "clause":
                parts[slot] = adjunct(world, slot, tense)
    if kind == "clause":
        parts |= {"that": Leaf("that", "SCONJ"), "content": clause(world, inner=True)}
    elif kind == "person" and rng.random() < 0.6:
        parts["object"] = named(world, "PER") if plain or rng.random() < 0.5 else pronoun(world)
    elif kind in NOUNS:
        parts["object"] = noun_phrase(world, kind, plain)
    return negated(Tree("clause", parts)) if not plain and rng.random() < 0.15 else Tree("clause", parts)


def negated(tree: Tree) -> Tree:
    """The contrary of a clause. English needs an auxiliary for it ("did not see")."""
    aux = tree.parts.get("aux") or Leaf("do", "AUX", tree.parts["verb"].features)
    return tree.but(aux=aux, **{"not": Leaf("not", "PART")})


def sentence(world: World, first: Tree | None = None) -> Tree:
    """The given clause with a full stop, or a new one, or two with a conjunction between them."""
    parts = {"first": first or clause(world), "stop": Leaf(".", "PUNCT")}
    if not first and world.rng.random() < 0.2:
        upos = world.rng.choice(("CCONJ", "SCONJ"))
        link = Leaf(world.rng.choice(FUNCTION_WORDS[upos].split()[:2]), upos)
        parts |= {"link": link, "second": clause(world, inner=True)}
        parts |= {"comma": Leaf(",", "PUNCT")} if upos == "CCONJ" else {}
    return Tree("sentence", parts)


# ---------------------------------------------------------------------------------------------------------------- tasks


def hypotheses(world: World, premise: Tree, label: int) -> Iterator[Tree]:
    """What follows (0: less, or a hypernym), what may be (1: more), or what cannot be (2: a negation, an antonym)."""
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
            more = Leaf("very", "ADV") if be else adjunct(world, slot, parts["verb"].features.split()[0])
            yield premise.but(**{slot: more})
        for slot, phrase in (pair for pair in nouns if "adjective" not in pair[1].parts):
            yield premise.but(**{slot: phrase.but(adjective=Leaf(pick(world, ADJECTIVES), "ADJ"))})
    else:
        yield negated(premise)
        for pair in (pair.split("/") for pair in OPPOSITES.split()):
            if parts[head].lemma in pair:
                other = pair[1 - pair.index(parts[head].lemma)]
                yield premise.but(**{head: Leaf(other, parts[head].upos, parts[head].features)})


def nli_example(world: World) -> dict:
    label, choices = world.rng.randrange(3), []
    while not choices:
        premise = clause(world, plain=True)
        choices = list(hypotheses(world, premise, label))
    premise, hypothesis = sentence(world, premise), sentence(world, world.rng.choice(choices))
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def qa_example(world: World) -> dict:
    """Clauses in the past with different verbs, and a question about one part of one of them."""
    clauses, length = {}, world.rng.randint(3, 8)
    while len(clauses) < length:
        tree = clause(world, plain=True)
        if "verb" in tree.parts and tree.parts["verb"].features.startswith("past"):
            clauses.setdefault(tree.parts["verb"].lemma, tree)
    asked = world.rng.choice(list(clauses.values()))
    slot = world.rng.choice([slot for slot in ("subject", "object", "place") if slot in asked.parts])
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


def slot_example(world: World) -> dict:
    """A command or a statement, without a stop, and the type of every part of it that is a slot."""
    tree = clause(world, inner=True)
    if "verb" in tree.parts and world.rng.random() < 0.6:
        time = adjunct(world, "time", "present") if "time" in tree.parts else None
        verb = Leaf(tree.parts["verb"].lemma, "VERB")
        tree = tree.but(subject=None, aux=None, do=None, verb=verb, time=time)
    types = {slot: slot_type(slot, part) for slot, part in tree.parts.items()}
    return {"tree": tree, "types": {slot: kind for slot, kind in types.items() if kind}}


def slot_type(slot: str, part: Leaf | Tree) -> str:
    """What a part of a clause is about; "" if it is no slot, as verbs and pronouns."""
    if slot == "time":
        return "time"
    if isinstance(part, Leaf):
        return ""
    if "head" in part.parts:
        return ENTITY_SLOTS[part.parts["head"].entity[2:]]
    return HYPERNYMS[part.parts["noun"].lemma]


def person_example(world: World) -> dict:
    """A command or a statement, without a stop; its slot is a person, whose type is what is done to them.

    A model has to understand the verb, which differs from language to language, and to copy the name, which does not.
    """
    tree = clause(world, inner=True)
    if world.rng.random() < 0.9:  # else mostly a clause without a slot
        verbs = VERBS["person"].replace("/", " ").split()
        while "verb" not in tree.parts or tree.parts["verb"].lemma not in verbs:
            tree = clause(world, inner=True)
        tree = tree.but(object=Tree("phrase", {"head": named(world, "PER").parts["head"]}))
    if "verb" in tree.parts and world.rng.random() < 0.6:
        time = adjunct(world, "time", "present") if "time" in tree.parts else None
        verb = Leaf(tree.parts["verb"].lemma, "VERB")
        tree = tree.but(subject=None, aux=None, do=None, verb=verb, time=time)
    name = isinstance(tree.parts.get("object"), Tree) and "head" in tree.parts["object"].parts
    return {"tree": tree, "types": {"object": tree.parts["verb"].lemma} if name else {}}


# ----------------------------------------------------------------------------------------------------------------- data


def conllu(world: World, language: str, tree: Tree) -> str:
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
    tokens = render(world, language, tree)
    tags = [NER_TAGS.index(words[0][1].entity) for _, words in tokens]
    return json.dumps({"tokens": [form for form, _ in tokens], "ner_tags": tags}, ensure_ascii=False)


def nli_line(world: World, language: str, example: dict) -> str:
    texts = {side: as_text(render(world, language, example[side])) for side in ("premise", "hypothesis")}
    return json.dumps({**texts, "label": example["label"]}, ensure_ascii=False)


def qa_line(world: World, language: str, example: dict) -> str:
    inside, context, answers = {leaf for leaf, _ in in_order("en", example["answer"])}, "", {}
    for tree in example["context"]:
        tokens = render(world, language, tree)
        chosen = [
            i for i, (_, words) in enumerate(tokens) if words[0][1] in inside
        ]  # neighbours in every language
        context += " " if context else ""
        if chosen:
            start = len(context) + len(as_text(tokens[: chosen[0]])) + (chosen[0] > 0)
            answers = {"text": [as_text(tokens[chosen[0] : chosen[-1] + 1])], "answer_start": [start]}
        context += as_text(tokens)
    line = {
        "question": as_text(render(world, language, example["question"])),
        "context": context,
        "answers": answers,
    }
    return json.dumps({"id": str(example["id"]), **line}, ensure_ascii=False)


def text_line(world: World, language: str, tree: Tree) -> str:
    return as_text(render(world, language, tree))


def uner_line(world: World, language: str, tree: Tree) -> str:
    tokens = render(world, language, tree)
    tags = [words[0][1].entity for _, words in tokens]
    return json.dumps({"tokens": [form for form, _ in tokens], "tags": tags}, ensure_ascii=False)


def slot_line(world: World, language: str, example: dict) -> str:
    tokens, found = render(world, language, example["tree"]), {}
    for slot, kind in example["types"].items():
        part = example["tree"].parts[slot]
        leaves = {part} if isinstance(part, Leaf) else {leaf for leaf, _ in in_order("en", part)}
        chosen = [
            i for i, (_, words) in enumerate(tokens) if words[0][1] in leaves
        ]  # neighbours in every language
        found[chosen[0]] = {"type": kind, "value": as_text(tokens[chosen[0] : chosen[-1] + 1])}
    slots = [found[start] for start in sorted(found)]
    return json.dumps({"text": as_text(tokens), "slots": slots}, ensure_ascii=False)


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_pairs(path: Path, sources: list[str], targets: list[str]) -> None:
    write(path, [f"{source}\t{target}" for source, target in zip(sources, targets, strict=True)])


def write_parallel(world: World, data: Path, language: str) -> None:
    """Translations, their gold links, and a dictionary: the lexicon that the links show, a tenth of it left out."""
    text, gold, lexicon = [], [], {}
    for tree in [sentence(world) for _ in range(PARALLEL_SIZE)]:
        source, target = render(world, "en", tree), render(world, language, tree)
        links = gold_links(source, target)
        text.append(f"{as_text(source)}\t{as_text(target)}")
        columns = (
            [token.form for token in source],
            [token.form for token in target],
            [f"{i}-{j}" for i, j in links],
        )
        gold.append("\t".join(map(" ".join, columns)))
        pairs = [(source[i], target[j]) for i, j in links if source[i].form.isalpha()]
        lexicon |= {
            (s.form.lower(), t.form.lower()): None for s, t in pairs if s.words[0][1].upos != "PROPN"
        }
    write(data / f"parallel/en-{language}.tsv", text)
    write(data / f"goldalign/en-{language}.tsv", gold)
    entries = [" ".join(pair) for pair in lexicon if world.rng.random() < 0.9]
    write(data / f"dictionary/en-{language}.txt", sorted(entries))
    for _ in lexicon:
        world.rng.random()  # keeps what is written next as it was when a dictionary for the way back was drawn here


TASKS = {  # task: (file extension, an item of the grammar, the item in a file)
    "udpos": ("conllu", sentence, conllu),
    "wikiann": ("jsonl", sentence, ner_line),
    "xnli": ("jsonl", nli_example, nli_line),
    "xquad": ("jsonl", qa_example, qa_line),
}
GENERATION_TASKS = {  # task: the same without the extension
    "xsid": (person_example, slot_line),
    "massive": (slot_example, slot_line),
    "uner": (sentence, uner_line),
}


def build_data(folder: str | Path, seed: int = 0) -> list[str]:
    """Write `folder/data`. Returns the sentences that models are pretrained on: every language, no translations."""
    world, data = make_world(seed), Path(folder) / "data"
    for language in LANGUAGES[1:]:
        write_parallel(world, data, language)
    for task, (extension, item, line) in TASKS.items():
        for split, size in zip(("train", "test"), SIZES[task], strict=True):
            items = [item(world) for _ in range(size)]
            if task == "xquad":
                items = [{"id": f"{split}-{number}", **example} for number, example in enumerate(items)]
            for language in (
                LANGUAGES if split == "test" else LANGUAGES[:1]
            ):  # test sets are translations of each other
                write(
                    data / task / language / f"{split}.{extension}",
                    [line(world, language, item) for item in items],
                )
    texts = [
        as_text(render(world, language, sentence(world)))
        for language in LANGUAGES
        for _ in range(TEXT_SIZE)
    ]
    write_generation_data(world, data, seed)
    return texts


def write_generation_data(world: World, data: Path, seed: int) -> None:
    """Data of the method for generators, each from dice of its own. All are translations of each other."""
    for task, (item, line) in GENERATION_TASKS.items():
        world.rng, used = random.Random(f"{task} {seed}"), set()
        for split, size in GENERATION_SIZES.items():
            items = fresh(world, item, line, size, used)
            name = "dev" if (task, split) == ("uner", "valid") else split
            for language in LANGUAGES:
                write(
                    data / task / language / f"{name}.jsonl",
                    [line(world, language, item) for item in items],
                )
    world.rng = random.Random(f"translation {seed}")
    used = {
        line.split("\t")[0]
        for path in data.glob("parallel/*.tsv")
        for line in path.read_text("utf-8").split("\n")
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
    """New items of the grammar whose English lines are not in `used`, and then are."""
    items = []
    while len(items) < size:
        new = item(world)
        english = line(world, "en", new)
        if english not in used:
            items.append(new)
            used.add(english)
    return items


# --------------------------------------------------------------------------------------------------------------- models

ENCODERS = ("distilbert", "bert", "xlmr")
ARCHITECTURES = (*ENCODERS, "llama")
LAYERS, HIDDEN, HEADS, VOCABULARY, MAX_LENGTH = 4, 96, 4, 1100, 512
STEPS, TOKENS_PER_BATCH, LEARNING_RATE = (
    2000,
    640,
    1.5e-3,
)  # small batches: here it is the number of steps that counts
DECODER_HIDDEN, DECODER_VOCABULARY = 128, 1500


def unigram(texts: list[str], special: list[str]):
    """Unigram as XLM-R's. Its trainer scores the rarest letters differently from run to run: here they are equal."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFKC(), decoders.Metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=VOCABULARY, **options))
    scores = {
        piece: round(score, 3) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]
    }
    floor = min(score for piece, score in scores.items() if len(piece) > 1)
    scores = {piece: max(score, floor) for piece, score in scores.items()}
    pieces = special + sorted(scores.keys() - {*special}, key=lambda piece: (-scores[piece], piece))
    tokenizer.model = models.Unigram(
        [(piece, scores[piece]) for piece in pieces], special.index("<unk>")
    )
    return tokenizer


def wordpiece(texts: list[str], special: list[str]):
    """WordPiece as BERT's, cased. Its own trainer breaks ties at random, so the pieces come from byte pairs."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pairs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    words = {word for text in texts for word, _ in pairs.pre_tokenizer.pre_tokenize_str(text)}
    splits = [pairs.encode(word) for word in words]
    pieces = {"##" * (i > 0) + piece for split in splits for i, piece in enumerate(split.tokens)}
    pieces |= {mark + letter for letter in {*"".join(words)} for mark in ("", "##")}
    vocabulary = {piece: index for index, piece in enumerate([*special, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.decoder = (
        normalizers.BertNormalizer(lowercase=False),
        decoders.WordPiece(),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def byte_pairs(texts: list[str], special: list[str]):
    """Byte pairs as Llama 3's: every text has its subwords, and none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer, bytes_ = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_, decoders.ByteLevel()
    options = {
        "special_tokens": special,
        "initial_alphabet": sorted(bytes_.alphabet()),
        "show_progress": False,
    }
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=DECODER_VOCABULARY, **options))
    return tokenizer


def build_decoder_tokenizer(texts: list[str]):
    """A tokenizer that puts its first token in front of every text, and nothing behind it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    begin, end, pad, unknown = special = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|unk|>"]
    tokenizer = byte_pairs(texts, special)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B:1",
        special_tokens=[(begin, special.index(begin))],
    )
    names = {"bos_token": begin, "eos_token": end, "pad_token": pad, "unk_token": unknown}
    names |= {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": MAX_LENGTH}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build_tokenizer(architecture: str, texts: list[str]):
    """A tokenizer of the architecture's kind, with its special tokens, trained on the texts."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if architecture == "xlmr":
        begin, pad, end, unknown, mask = special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer, pair = unigram(texts, special), "<s> $A </s> </s> $B </s>"
    else:
        pad, unknown, begin, end, mask = special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer, pair = wordpiece(texts, special), "[CLS] $A [SEP] $B:1 [SEP]:1"
    ends = [(token, special.index(token)) for token in (begin, end)]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}", pair=pair, special_tokens=ends
    )
    names = {
        "bos_token": begin,
        "cls_token": begin,
        "eos_token": end,
        "sep_token": end,
        "unk_token": unknown,
    }
    names |= {"pad_token": pad, "mask_token": mask, "model_max_length": MAX_LENGTH}
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (architecture == "bert")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def build_encoder(architecture: str, tokenizer):
    """An encoder with random weights: larger than the usual 0.02, for it is narrow, and smaller where a layer adds."""
    from transformers import AutoModel, BertConfig, DistilBertConfig, XLMRobertaConfig

    shared = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.065,
    }
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {
        "intermediate_size": 2 * HIDDEN,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if architecture == "distilbert":
        sizes = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * HIDDEN}
        config = DistilBertConfig(**shared, **sizes, dropout=0.0, attention_dropout=0.0)
    elif architecture == "bert":
        config = BertConfig(**shared, **sizes)
    else:  # XLM-R counts positions from pad_token_id + 1
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = XLMRobertaConfig(
            **shared, **sizes, **ends, max_position_embeddings=MAX_LENGTH + 2, type_vocab_size=1
        )
    encoder = AutoModel.from_config(config)
    for name, weight in encoder.named_parameters():
        if name.endswith(("output.dense.weight", "out_lin.weight", "lin2.weight")):
            weight.data *= 0.25
    return encoder


def build_decoder(tokenizer):
    """A Llama with random weights, two query heads to a head of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": DECODER_HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2 * DECODER_HIDDEN,
    }
    sizes |= {
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": MAX_LENGTH,
    }
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ends = {name: getattr(tokenizer, name) for name in names}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **sizes,
        **ends,
        initializer_range=0.05,
        rope_theta=1e4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def batches(sequences: list[list[int]], pad: int, rng: random.Random) -> Iterator:
    """Endless batches (B, T) of about TOKENS_PER_BATCH subwords, each of sequences of similar lengths."""
    import torch

    while True:
        pool = sorted(
            rng.sample(sequences, len(sequences)), key=len
        )  # a stable sort: equal lengths stay shuffled
        spans, end = [], 0
        while end < len(pool):
            spans.append((end, end := end + max(1, TOKENS_PER_BATCH // len(pool[end]))))
        for span in rng.sample(spans, len(spans)):
            rows = [torch.tensor(sequence) for sequence in pool[slice(*span)]]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def pretrain(model, head, losses: Iterator, steps: int) -> float:
    """Minimise the losses, one a step. Returns the mean of the last 50."""
    import torch

    optimizer = torch.optim.AdamW(
        [*model.parameters(), *head.parameters()], lr=LEARNING_RATE, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    last = []
    for _ in range(steps):
        loss = next(losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = [*last[-49:], loss.item()]
    return sum(last) / len(last)


def build_head():
    """What stands between an encoder and its output layer while it is pretrained, and is thrown away afterwards."""
    from torch import nn

    return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN))


def masked_losses(encoder, head, tokenizer, texts: list[str], seed: int) -> Iterator:
    """Masked language modelling: of 15% of the subwords, 80% masked, 10% replaced, 10% kept."""
    import torch

    vocabulary = encoder.get_input_embeddings().weight  # (V, HIDDEN): the output layer too
    special = torch.tensor(tokenizer.all_special_ids)
    for ids in batches(tokenizer(texts)["input_ids"], tokenizer.pad_token_id, random.Random(seed)):
        chosen, dice = (torch.rand(ids.shape) < 0.15) & ~torch.isin(ids, special), torch.rand(ids.shape)
        noise = torch.randint(len(special), len(tokenizer), ids.shape)
        inputs = ids.masked_fill(chosen & (dice < 0.8), tokenizer.mask_token_id)
        inputs = torch.where(chosen & (dice >= 0.9), noise, inputs)
        mask = (ids != tokenizer.pad_token_id).long()
        states = encoder(inputs, attention_mask=mask).last_hidden_state  # (B, T, HIDDEN)
        yield torch.nn.functional.cross_entropy(head(states[chosen]) @ vocabulary.T, ids[chosen])


def next_token_losses(decoder, tokenizer, texts: list[str], seed: int) -> Iterator:
    """Language modelling from left to right, over documents."""
    rng = random.Random(seed)
    documents = [text + tokenizer.eos_token for text in documents_of(texts, rng)]
    for ids in batches(tokenizer(documents)["input_ids"], tokenizer.pad_token_id, rng):
        mask = (ids != tokenizer.pad_token_id).long()
        yield decoder(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def documents_of(texts: list[str], rng: random.Random) -> list[str]:
    """Each text with others of its language, one of them repeated: what teaches a model to copy."""
    return texts


def build_model(
    folder: str | Path, architecture: str, texts: list[str], steps: int = STEPS, seed: int = 0
) -> Path:
    """Write `folder/models/<architecture>`: a tokenizer and a pretrained model (0 steps: random weights)."""
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
    loss = f", loss {pretrain(model, head, losses, steps):.2f}" if steps else ""
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    print(
        f"{architecture}: {steps} steps of language modelling{loss}, {time.time() - start:.0f} s",
        flush=True,
    )
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="A small invented world: data for four tasks, and tiny pretrained encoders."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where data/ and models/ go")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world (default 0)")
    parser.add_argument("--only-data", action="store_true", help="no encoders")
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        default=STEPS,
        metavar="N",
        help=f"for each encoder (default {STEPS})",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        metavar="NAME",
        help=" ".join(ARCHITECTURES),
    )
    args = parser.parse_args(argv)
    if args.pretrain_steps < 0:
        parser.error("--pretrain-steps must not be negative")
    start = time.time()
    texts = build_data(args.folder, args.seed)
    print(f"data: {', '.join(LANGUAGES)}, {time.time() - start:.0f} s", flush=True)
    for architecture in [] if args.only_data else args.models:
        build_model(args.folder, architecture, texts, args.pretrain_steps, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
