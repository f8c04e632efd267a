"""Text becomes words, words become links, links become an endless and even stream of pairs (method: word pairs)."""

import functools
import itertools
import os
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import alignfreeze as af

# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    "lang, text, words",
    [
        ("en", "Mary had 2 lambs", ["Mary", "had", "2", "lambs"]),
        ("en", "  spaces\tof\u00a0any\u3000kind\n", ["spaces", "of", "any", "kind"]),
        ("en", "", []),
        ("en", " \t", []),
        # a run of other visible characters is one word; it needs no space around it
        ("en", "Wait... what?!", ["Wait", "...", "what", "?!"]),
        ("en", "it's well-known", ["it", "'", "s", "well", "-", "known"]),
        ("en", "a... b . . c", ["a", "...", "b", ".", ".", "c"]),
        ("fr", "«L’été»", ["«", "L", "’", "été", "»"]),
        ("en", "snake_case 3.5 €20", ["snake_case", "3", ".", "5", "€", "20"]),
        # marks belong to their word: Python's `\w` would cut these apart at every vowel sign
        ("hi", "हिन्दी में लिखें।", ["हिन्दी", "में", "लिखें", "।"]),
        ("ta", "தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("ar", "كِتَابٌ، قَلَم", ["كِتَابٌ", "،", "قَلَم"]),
        ("he", "שָׁלוֹם!", ["שָׁלוֹם", "!"]),
        ("fr", "e\u0301te\u0301 ici", ["e\u0301te\u0301", "ici"]),
        # only Chinese, Japanese and Thai need a vocabulary; elsewhere their characters are word characters as any other
        ("en", "I say 你好世界 here", ["I", "say", "你好世界", "here"]),
        ("ko", "나는 학교에 간다.", ["나는", "학교에", "간다", "."]),
    ],
)
def test_words_are_runs_of_word_characters_or_of_other_visible_characters(lang, text, words):
    assert af.split_words(text, lang) == words


@pytest.mark.parametrize(
    "lang, text, vocabulary, words",
    [
        # the longest word of the vocabulary from the left
        ("zh", "我喜欢北京大学", ["喜欢", "北京", "北京大学", "大学"], ["我", "喜欢", "北京大学"]),
        (
            "zh",
            "北京大学生",
            ["北京", "北京大学", "大学生"],
            ["北京大学", "生"],
        ),  # greedy: not 北京 + 大学生
        ("ja", "私は学生です", ["学生", "です"], ["私", "は", "学生", "です"]),
        ("ja", "コーヒーを飲む", ["コーヒー", "飲む"], ["コーヒー", "を", "飲む"]),
        ("th", "ฉันรักเธอ", ["ฉัน", "รัก", "เธอ"], ["ฉัน", "รัก", "เธอ"]),
        # unknown characters of these scripts one by one
        ("zh", "你好世界", [], ["你", "好", "世", "界"]),
        ("zh", "你好世界", ["世"], ["你", "好", "世", "界"]),
        ("ja", "ラーメン", [], ["ラ", "ー", "メ", "ン"]),
        # a mark is never cut from its base, not even for a word of the vocabulary
        ("th", "กิน", [], ["กิ", "น"]),
        ("th", "ที่นี่", ["ท", "ที", "น"], ["ที่", "นี่"]),
        ("ja", "か\u3099か", ["か"], ["か\u3099", "か"]),
        # words in other scripts and numbers stay whole, and end a match
        ("zh", "我用iPhone15拍照", ["拍照"], ["我", "用", "iPhone15", "拍照"]),
        ("zh", "2024年5月", ["年5", "5月"], ["2024", "年", "5", "月"]),
        ("ja", "Tシャツ", ["Tシャツ", "シャツ"], ["T", "シャツ"]),
        ("th", "ปี๒๕๖๓นี้", ["ปี", "นี้"], ["ปี", "๒๕๖๓", "นี้"]),
        ("th", "๒๕ มกราคม 2563", ["มกราคม"], ["๒๕", "มกราคม", "2563"]),
        ("zh", "Жизнь是cafe\u0301", [], ["Жизнь", "是", "cafe\u0301"]),
        # punctuation runs, as in any language; a match does not reach over them or over a space
        ("zh", "你好，世界！！", ["你好", "世界", "好，世"], ["你好", "，", "世界", "！！"]),
        ("zh", "大 学", ["大学", "大 学"], ["大", "学"]),
        ("th", "ไป... Google", ["ไป"], ["ไป", "...", "Google"]),
        ("ja", "", ["私"], []),
    ],
)
def test_chinese_japanese_and_thai_are_cut_by_longest_match(lang, text, vocabulary, words):
    assert af.split_words(text, lang, vocabulary) == words
    assert af.split_words(text, lang, frozenset(vocabulary)) == words


UNSPACED_NAMES = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI CHARACTER")


def is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def slow_split(text: str, lang: str, vocabulary) -> list[str]:
    """The rule read aloud: characters with their marks, one by one; what kind is each, and where does its run end?"""
    clusters = []
    for character in text:
        if is_mark(character) and clusters:
            clusters[-1] += character
        else:
            clusters.append(character)

    def kind(cluster: str) -> str:
        if cluster[0].isspace():
            return "space"
        if lang in ("zh", "ja", "th") and unicodedata.name(cluster[0]).startswith(UNSPACED_NAMES):
            return "unspaced"
        return "word" if cluster[0].isalnum() or cluster[0] == "_" else "other"

    words, start = [], 0
    while start < len(clusters):
        end = start + 1
        while end < len(clusters) and kind(clusters[end]) == kind(clusters[start]):
            end += 1
        if kind(clusters[start]) == "unspaced":
            while end > start + 1 and "".join(clusters[start:end]) not in vocabulary:
                end -= 1
        if kind(clusters[start]) != "space":
            words.append("".join(clusters[start:end]))
        start = end
    return words


CLUSTERS = "a Z é e\u0301 9 _ ж . ! ， — हि न् மி 日 本 か か\u3099 コ ー ก กิ ที่ น ๒ ๕".split() + [" "]
UNSPACED = [cluster for cluster in CLUSTERS if unicodedata.name(cluster[0]).startswith(UNSPACED_NAMES)]


@pytest.mark.parametrize("lang", ["en", "hi", "zh", "ja", "th"])
def test_splitting_agrees_with_the_rule_read_aloud(lang):
    rng = random.Random(lang)
    matched = 0
    for _ in range(400):
        text = "".join(rng.choices(CLUSTERS, k=rng.randint(0, 25)))
        vocabulary = {"".join(rng.choices(UNSPACED, k=rng.randint(1, 4))) for _ in range(60)} | {
            "か",
            "ก",
        }
        expected = slow_split(text, lang, vocabulary)
        assert af.split_words(text, lang, vocabulary) == expected, (text, vocabulary)
        matched += any(len(word) > 2 and word in vocabulary for word in expected)
    assert matched > 50 or lang in ("en", "hi")  # the vocabulary did matter


@pytest.mark.parametrize("lang", ["en", "zh", "ja", "th"])
def test_splitting_loses_nothing_but_spaces_and_starts_no_word_with_a_mark(lang):
    rng = random.Random(lang)
    for _ in range(200):
        text = "".join(rng.choices(CLUSTERS, k=20))
        words = af.split_words(text, lang, {"日本", "กิน", "かか"})
        assert "".join(words) == text.replace(" ", "")
        assert not any(is_mark(word[0]) for word in words)


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    "links, expected",
    [
        ([(0, 0), (1, 2)], [(0, 0), (1, 2)]),
        ([(1, 2), (0, 0)], [(0, 0), (1, 2)]),  # in the order of the source
        ([(0, 0), (0, 1), (1, 2)], [(1, 2)]),  # a source word with two links loses both
        ([(0, 0), (1, 0), (2, 1)], [(2, 1)]),  # so does a target word
        ([(0, 0), (1, 0), (1, 1), (2, 2)], [(2, 2)]),  # (1, 1) goes too: word 1 has another link
        ([(0, 0), (0, 0)], [(0, 0)]),  # the same link twice is one link
        ([(3, 3)], []),  # OK = OK
        ([(2, 3)], [(2, 3)]),
        ([(3, 3), (2, 3)], []),  # the link between identical strings counts as a link of both words
        ([], []),
    ],
)
def test_only_one_to_one_links_between_different_strings_are_kept(links, expected):
    assert af.one_to_one(links, ["the", "red", "cat", "OK"], ["le", "chat", "rouge", "OK"]) == expected


def test_one_to_one_agrees_with_a_comparison_of_all_links():
    rng, kept = random.Random(0), 0
    for _ in range(500):
        source, target = (rng.choices("abcdef", k=rng.randint(1, 9)) for _ in range(2))
        links = [
            (rng.randrange(len(source)), rng.randrange(len(target))) for _ in range(rng.randint(0, 7))
        ]
        expected = [
            (i, j)
            for i in range(len(source))
            for j in range(len(target))
            if (i, j) in links
            and not any((i == k) != (j == m) for k, m in links)  # another link with one of the two words
            and source[i] != target[j]
        ]
        assert af.one_to_one(links, source, target) == expected
        kept += len(expected)
    assert kept > 100


FORWARD = {
    "the": {"der", "die"},
    "cat": {"Katze", "Kater"},
    "dog": {"Hund"},
    "hound": {"Hund"},
    "big": {"groß"},
}
BACKWARD = {
    "der": {"the"},
    "die": {"the"},
    "Katze": {"cat"},
    "Kater": {"cat", "tomcat"},
    "Hund": {"dog", "hound"},
}
BACKWARD |= {"groß": {"great"}}


@pytest.mark.parametrize(
    "source, target, links",
    [
        ("the cat", "die Katze", [(0, 0), (1, 1)]),
        ("cat the", "die Katze", [(0, 1), (1, 0)]),
        ("a cat sleeps", "Katze", [(1, 0)]),
        ("cat", "Katze Kater", []),  # two distinct translations occur
        ("cat", "Katze und Katze", []),  # the translation occurs twice
        ("cat cat", "Katze", []),  # two positions hold a word that translates it
        ("dog hound", "Hund", []),  # also when they hold different words
        ("tomcat cat", "Kater", []),  # `tomcat` translates it, though forward knows nothing of `tomcat`
        ("tomcat", "Kater", []),  # and forward must hold it
        ("dog", "Hund", [(0, 0)]),
        ("big", "groß", []),  # the way back does not hold `big`
        (
            "great big",
            "groß",
            [],
        ),  # the only word that translates `groß` is `great`, which stands elsewhere
        ("Cat", "Katze", []),  # case is not folded
        ("cat", "katze", []),
        ("the", "der die", []),
        ("", "Katze", []),
        ("cat", "", []),
    ],
)
def test_the_dictionary_links_words_only_where_nothing_is_ambiguous(source, target, links):
    assert af.dictionary_links(source.split(), target.split(), FORWARD, BACKWARD) == links


def slow_dictionary_links(source, target, forward, backward):
    """The three conditions of the method, for every word of one side with every word of the other."""
    links = []
    for i, j in itertools.product(range(len(source)), range(len(target))):
        translations = {word for word in target if word in forward.get(source[i], ())}
        occurrences = [k for k in range(len(target)) if target[k] == target[j]]
        translators = [k for k in range(len(source)) if source[k] in backward.get(target[j], ())]
        if translations == {target[j]} and occurrences == [j] and translators == [i]:
            links.append((i, j))
    return links


@pytest.mark.parametrize("turned_round", [True, False])
def test_dictionary_links_agree_with_the_three_conditions_read_aloud(turned_round):
    rng, linked = random.Random(1), 0
    english, other = list("abcdefgh"), list("ABCDEFGH")
    for _ in range(3000):
        entries = [(rng.choice(english), rng.choice(other)) for _ in range(rng.randint(0, 12))]
        back = (
            entries
            if turned_round
            else [(rng.choice(english), rng.choice(other)) for _ in range(6)] + entries[:6]
        )
        forward = {word: {b for a, b in entries if a == word} for word, _ in entries}
        backward = {word: {a for a, b in back if b == word} for _, word in back}
        source, target = (
            rng.choices(english, k=rng.randint(0, 8)),
            rng.choices(other, k=rng.randint(0, 8)),
        )
        expected = slow_dictionary_links(source, target, forward, backward)
        assert af.dictionary_links(source, target, forward, backward) == expected
        assert (
            af.one_to_one(expected, source, target) == expected
        )  # nothing ambiguous: one-to-one already
        linked += len(expected)
    assert linked > 200


def test_looking_for_links_adds_no_word_to_a_dictionary(tmp_path):
    write(tmp_path / "dictionary/en-de.txt", "cat Katze")
    forward, backward = af.read_dictionary("de", tmp_path)
    af.dictionary_links(["cat", "dog"], ["Katze", "Hund"], forward, backward)
    assert (dict(forward), dict(backward)) == ({"cat": {"Katze"}}, {"Katze": {"cat"}})


# ------------------------------------------------------------------------------------------------------------- files


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_dictionary_is_read_and_turned_round(tmp_path):
    write(tmp_path / "dictionary/en-de.txt", "cat Katze", "cat Kater", "tomcat Kater", "dog\tHund")
    forward, backward = af.read_dictionary("de", tmp_path)
    assert forward == {"cat": {"Katze", "Kater"}, "tomcat": {"Kater"}, "dog": {"Hund"}}
    assert backward == {"Katze": {"cat"}, "Kater": {"cat", "tomcat"}, "Hund": {"dog"}}


def test_parallel_text_is_read_line_by_line_in_order(tmp_path):
    write(tmp_path / "parallel/en-de.tsv", "A cat .\tEine Katze .", "Yes\t", "Two words\tzwei Wörter")
    text = [("A cat .", "Eine Katze ."), ("Yes", ""), ("Two words", "zwei Wörter")]
    assert list(af.parallel_text("de", tmp_path)) == text
    write(tmp_path / "parallel/en-de.dev.tsv", "Other\tAnderes")
    assert list(af.parallel_text("de", tmp_path, "dev")) == [("Other", "Anderes")]
    path = tmp_path / "parallel/en-de.tsv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(af.parallel_text("de", tmp_path)) == text


def test_pharaoh_links_are_read_one_sentence_pair_a_line(tmp_path):
    path = write(tmp_path / "en-de.txt", "0-0 1-2", "", "10-3", " 2-1  0-0 ")
    text = [(["word"] * 11, ["Wort"] * 4)] * 5
    links = [[(0, 0), (1, 2)], [], [(10, 3)], [(2, 1), (0, 0)]]
    assert af.read_pharaoh(path, iter(text[:4]), True, None) == links
    assert af.read_pharaoh(path, iter(text), False, None) == links
    assert af.read_pharaoh(path, iter(text[:2]), True, 2) == links[:2]


# ---------------------------------------------------------------------------------------------------------- shuffle


@pytest.mark.parametrize(
    "count, size", [(0, 5), (1, 5), (5, 5), (6, 5), (100, 1), (100, 7), (100, 99), (100, 1000)]
)
def test_shuffling_is_a_permutation_that_depends_on_the_seed_alone(count, size):
    first = list(af.shuffled(range(count), "31 de", size))
    assert sorted(first) == list(range(count))
    assert list(af.shuffled(iter(range(count)), "31 de", size)) == first
    if count == 100 and size > 1:
        others = {tuple(af.shuffled(range(count), f"{seed} de", size)) for seed in range(10)}
        assert len(others | {tuple(first), tuple(range(count))}) == 12


@pytest.mark.parametrize("size", [1, 4, 30])
def test_no_item_overtakes_more_items_than_the_buffer_holds(size):
    earliest = 0
    for seed in range(50):
        for position, item in enumerate(af.shuffled(range(100), str(seed), size)):
            assert position > item - size
            earliest = max(earliest, item - position)
    assert earliest == size - 1  # and the whole buffer is used


def test_the_first_items_out_may_be_any_of_the_buffer():
    firsts = [
        list(itertools.islice(af.shuffled(itertools.count(), str(seed), 8), 2)) for seed in range(200)
    ]
    assert {first for first, _ in firsts} == set(range(8))
    assert {second for _, second in firsts} == set(range(9))


def test_shuffling_reads_no_further_than_its_buffer():
    source = itertools.count()
    next(af.shuffled(source, "seed", 50))
    assert next(source) == 51


# ---------------------------------------------------------------------------------------------------- endless pairs

LINKED, UNLINKED = 12, 5  # sentence pairs of the text below


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Two languages: 12 sentence pairs that the dictionary links, in a single place, and 5 that it does not."""
    for lang in ("de", "fi"):
        numbers = range(LINKED)
        write(
            tmp_path / f"dictionary/en-{lang}.txt", *(f"word{k} {lang}{k}" for k in numbers), "same same"
        )
        lines = (
            [f"say word{k} OK\tOK {lang}{k} !" for k in numbers]
            + ["same\tsame"] * 2
            + ["none\tkeins"] * 3
        )
        random.Random(lang).shuffle(lines)
        write(tmp_path / f"parallel/en-{lang}.tsv", *lines)
    return tmp_path


def stream(lang: str, aligner: str, folder: Path | None, seed: int) -> Iterator[af.Pair]:
    return af.linked_pairs(lang, *af.linker(lang, aligner, folder), seed)


def take(count: int, *args) -> list[af.Pair]:
    return list(itertools.islice(stream(*args), count))


def test_a_pair_holds_the_words_and_links_of_its_sentences(data_dir):
    for pair in take(LINKED, "de", "dictionary", data_dir, 31):
        number = pair.source[1].removeprefix("word")
        assert pair[:4] == ("de", ["say", f"word{number}", "OK"], ["OK", f"de{number}", "!"], [(1, 1)])


@pytest.mark.parametrize("seed", [31, 42])
def test_every_reading_holds_each_linked_pair_once_in_another_order(data_dir, seed):
    pairs = take(3 * LINKED, "de", "dictionary", data_dir, seed)
    assert [pair.reading for pair in pairs] == [1] * LINKED + [2] * LINKED + [3] * LINKED
    orders = [[pair.source[1] for pair in pairs if pair.reading == reading] for reading in (1, 2, 3)]
    assert all(sorted(order) == sorted(f"word{k}" for k in range(LINKED)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_sentence_pairs_without_a_link_are_skipped_and_counted(data_dir):
    for readings in range(1, 5):
        pairs = take(readings * LINKED, "de", "dictionary", data_dir, 31)
        skipped = sum(pair.skipped for pair in pairs)
        assert (
            (readings - 1) * UNLINKED <= skipped <= readings * UNLINKED
        )  # some may follow the last pair
    write(data_dir / "parallel/en-de.tsv", "nothing\tnichts", "word1\tde1", "nothing\tnichts")
    pairs = take(200, "de", "dictionary", data_dir, 31)
    assert pairs[0].skipped in (0, 1, 2)
    # what followed the pair before, and what precedes it
    assert {pair.skipped for pair in pairs[1:]} == {0, 1, 2, 3, 4}
    assert 2 * 199 <= sum(pair.skipped for pair in pairs) <= 2 * 200


def test_the_same_seed_gives_the_same_pairs_and_another_seed_another_order(data_dir):
    pairs = take(40, "de", "dictionary", data_dir, 31)
    assert take(40, "de", "dictionary", data_dir, 31) == pairs
    assert take(40, "de", "dictionary", data_dir, 42) != pairs
    assert [p.source for p in take(40, "fi", "dictionary", data_dir, 31)] != [p.source for p in pairs]


def of_all(data_dir: Path, *languages: str) -> Iterator[af.Pair]:
    """The pairs of a run, of several languages."""
    flags = ["--data-dir", str(data_dir), "--seed", "31", "--realign-languages", *languages]
    return af.load_pairs(af.parse_args(flags), None)[0]


def test_one_pair_of_each_language_is_taken_in_turn(data_dir):
    for folder in ("dictionary/en-{}.txt", "parallel/en-{}.tsv"):
        lines = (data_dir / folder.format("fi")).read_text("utf-8").splitlines()
        write(data_dir / folder.format("sv"), *lines)
    pairs = list(itertools.islice(of_all(data_dir, "de", "fi", "sv"), 40))
    for k, lang in enumerate(("de", "fi", "sv")):
        assert pairs[k::3] == take(len(pairs[k::3]), lang, "dictionary", data_dir, 31)


def test_languages_alternate_evenly_however_long_their_texts(data_dir):
    write(data_dir / "parallel/en-fi.tsv", "word0\tfi0", "word1\tfi1")
    pairs = list(itertools.islice(of_all(data_dir, "de", "fi"), 40))
    assert [pair.language for pair in pairs] == ["de", "fi"] * 20
    assert pairs[-1].reading == 10


def test_pairs_are_aligned_only_when_they_are_needed(data_dir, monkeypatch):
    write(data_dir / "parallel/en-de.tsv", *["word1\tde1"] * 2000)
    aligned, align = [], af.dictionary_links
    monkeypatch.setattr(af, "dictionary_links", lambda *args: aligned.append(1) or align(*args))
    pairs = stream("de", "dictionary", data_dir, 31)
    assert not aligned
    list(itertools.islice(pairs, 100))
    assert 100 <= len(aligned) <= 132


def test_a_stream_from_the_hub_is_read_no_further_than_the_buffer_and_what_is_used(monkeypatch):
    read = itertools.count()
    monkeypatch.setattr(af, "parallel_text", lambda *where: ((f"word {k}", "Wort") for k in read))
    monkeypatch.setattr(
        af, "read_dictionary", lambda language, folder: ({"word": {"Wort"}}, {"Wort": {"word"}})
    )
    assert len(take(100, "de", "dictionary", None, 31)) == 100
    assert next(read) <= 10_000 + 2 * 100


def test_links_of_pharaoh_files_stay_with_their_line(data_dir, tmp_path):
    lines = [f"a b c {k}\tx y z {k}" for k in range(9)]
    links = [f"{k % 3}-{k // 3}" for k in range(9)]
    write(data_dir / "parallel/en-de.tsv", *lines)
    folder = write(tmp_path / "links/en-de.txt", *links).parent
    for pair in take(27, "de", str(folder), data_dir, 31):
        number = int(pair.source[3])
        assert pair.target[3] == str(number)
        assert pair.links == [(number % 3, number // 3)]


def test_links_of_pharaoh_files_are_held_to_the_same_rules(data_dir, tmp_path):
    text = ["the cat\tdie Katze", "the OK\tdas OK", "a cat\tKatze", "none\tkeins"]
    write(data_dir / "parallel/en-de.tsv", *text)
    folder = write(tmp_path / "links/en-de.txt", "0-0 1-1", "0-0 1-1", "0-0 1-0", "").parent
    pairs = take(40, "de", str(folder), data_dir, 31)
    assert {(pair.source[1], tuple(pair.links)) for pair in pairs} == {
        ("cat", ((0, 0), (1, 1))),
        ("OK", ((0, 0),)),
    }
    assert 2 * 19 <= sum(pair.skipped for pair in pairs) <= 2 * 20


@pytest.mark.parametrize("aligner", ["dictionary", "pharaoh"])
def test_thai_words_come_from_the_target_side_of_the_dictionary(tmp_path, aligner):
    write(tmp_path / "dictionary/en-th.txt", "love รัก", "you เธอ")
    write(tmp_path / "parallel/en-th.tsv", "I love you\tฉันรักเธอ")
    write(tmp_path / "links/en-th.txt", "1-2 2-3")
    source = "dictionary" if aligner == "dictionary" else str(tmp_path / "links")
    (pair,) = take(1, "th", source, tmp_path, 31)
    assert pair == ("th", ["I", "love", "you"], ["ฉั", "น", "รัก", "เธอ"], [(1, 2), (2, 3)], 0, 1)


def test_a_text_without_any_link_is_an_error_not_an_endless_search(data_dir):
    write(data_dir / "parallel/en-de.tsv", "none\tkeins", "same\tsame")
    with pytest.raises(af.UserError, match="en-de"):
        next(stream("de", "dictionary", data_dir, 31))


# --------------------------------------------------------------------------------------------------------- real data

DATA = os.environ.get("ALIGNFREEZE_DATA")
real_data = pytest.mark.skipif(
    not DATA,
    reason="ALIGNFREEZE_DATA names no folder with real dictionary/, parallel/ and goldalign/ to measure on",
)
dictionary = functools.cache(lambda lang: af.read_dictionary(lang, Path(DATA)))
FLOORS = {  # precision, recall of the dictionary aligner on gold word alignments, to two decimals
    "fr": (0.96, 0.28), "es": (0.98, 0.26), "ru": (0.96, 0.18), "hu": (0.91, 0.15), "bg": (0.92, 0.18),
    "it": (0.97, 0.21), "sl": (0.97, 0.13),
}  # fmt: skip


@real_data
@pytest.mark.parametrize("lang", FLOORS)
def test_dictionary_links_are_right_and_not_too_few_on_gold_alignments(lang):
    forward, backward = dictionary(lang)
    (path,) = (Path(DATA) / "goldalign").glob(f"en-{lang}.*.tsv")
    counts = Counter()
    for line in path.read_text("utf-8").splitlines():
        source, target, gold = line.split("\t")
        source, target = source.split(), target.split()
        sure = {tuple(map(int, link.split("-"))) for link in gold.split() if "-" in link}
        possible = {tuple(map(int, link.split("p"))) for link in gold.split() if "p" in link} | sure
        links = set(
            af.one_to_one(af.dictionary_links(source, target, forward, backward), source, target)
        )
        counts.update(
            links=len(links), right=len(links & possible), sure=len(sure), found=len(links & sure)
        )
    precision, recall = counts["right"] / counts["links"], counts["found"] / counts["sure"]
    assert round(precision, 2) >= FLOORS[lang][0]
    assert round(recall, 2) >= FLOORS[lang][1]


def link_rate(lang: str, splitter) -> float:
    """The share of the first 1,000 sentence pairs that the dictionary links somewhere."""
    forward, backward = dictionary(lang)
    linked = 0
    for english, other in itertools.islice(af.parallel_text(lang, Path(DATA)), 1000):
        source, target = af.split_words(english, "en"), splitter(other, backward)
        linked += bool(
            af.one_to_one(af.dictionary_links(source, target, forward, backward), source, target)
        )
    return linked / 1000


SPACED = "bg de el fa fr hi lv sk"
RATES = dict.fromkeys(SPACED.split(), 0.90)
RATES |= {"zh": 0.70, "ja": 0.80, "th": 0.85}


@real_data
@pytest.mark.parametrize("lang", RATES)
def test_the_dictionary_links_most_sentence_pairs(lang):
    assert (
        link_rate(lang, lambda text, vocabulary: af.split_words(text, lang, vocabulary)) >= RATES[lang]
    )


@real_data
@pytest.mark.parametrize("lang", ["zh", "ja", "th"])
def test_without_longest_match_hardly_any_sentence_pair_is_linked(lang):
    assert link_rate(lang, lambda text, vocabulary: af.split_words(text, "en")) <= 0.15
