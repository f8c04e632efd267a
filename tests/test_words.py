"""Text becomes words, words become links, and languages become one endless stream of pairs.

These tests show how text is split into words, which words a dictionary links, how links are read
from files, and in which order the sentence pairs of a run come.
"""

import functools
import itertools
import os
import random
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import alignfreeze as af

# ---- words


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
        # in other languages, Chinese characters are word characters like any other
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
        # greedy: not 北京 + 大学生
        ("zh", "北京大学生", ["北京", "北京大学", "大学生"], ["北京大学", "生"]),
        ("ja", "私は学生です", ["学生", "です"], ["私", "は", "学生", "です"]),
        ("ja", "コーヒーを飲む", ["コーヒー", "飲む"], ["コーヒー", "を", "飲む"]),
        ("th", "ฉันรักเธอ", ["ฉัน", "รัก", "เธอ"], ["ฉัน", "รัก", "เธอ"]),
        # unknown characters of these scripts one by one
        ("zh", "你好世界", [], ["你", "好", "世", "界"]),
        ("zh", "你好世界", ["世"], ["你", "好", "世", "界"]),
        ("ja", "ラーメン", [], ["ラ", "ー", "メ", "ン"]),
        # a mark stays with its base, even if the base alone is in the vocabulary
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
        # punctuation and blanks end a match, as they end a word in any language
        ("zh", "你好，世界！！", ["你好", "世界", "好，世"], ["你好", "，", "世界", "！！"]),
        ("zh", "大 学", ["大学", "大 学"], ["大", "学"]),
        ("th", "ไป... Google", ["ไป"], ["ไป", "...", "Google"]),
        ("ja", "", ["私"], []),
    ],
)
def test_chinese_japanese_and_thai_are_cut_by_longest_match(lang, text, vocabulary, words):
    assert af.split_words(text, lang, vocabulary) == words
    assert af.split_words(text, lang, frozenset(vocabulary)) == words


@pytest.mark.parametrize(
    "language, base",
    [
        *[("zh-TW", "zh"), ("zh_Hans", "zh"), ("ja-JP", "ja"), ("th_TH", "th"), ("ZH", "zh")],
        *[("zho_Hans", "zh"), ("jpn_Jpan", "ja"), ("tha_Thai", "th")],
    ],
)
def test_a_region_or_a_script_does_not_change_how_a_language_is_split(language, base):
    text, vocabulary = "我喜欢北京大学 ฉันรักเธอ 私は学生です", {"北京", "北京大学", "รัก", "学生"}
    words = af.split_words(text, language, vocabulary)
    assert words == af.split_words(text, base, vocabulary)
    assert "北京大学" in words and "学" not in words
    assert af.split_words(text, "bg-TH", vocabulary) == text.split()


UNSPACED_NAMES = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI CHARACTER")


def is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def slow_split(text: str, lang: str, vocabulary) -> list[str]:
    """Find the kind of each character with its marks, and then the end of each run."""
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


CLUSTERS = "a Z é e\u0301 9 _ ж . ! ， — हि न् மி 日 本 か か\u3099 コ ー ก กิ ที่ น ๒ ๕".split()
CLUSTERS.append(" ")
UNSPACED = [one for one in CLUSTERS if unicodedata.name(one[0]).startswith(UNSPACED_NAMES)]


@pytest.mark.parametrize("lang", ["en", "hi", "zh", "ja", "th"])
def test_splitting_agrees_with_a_slow_implementation_of_the_rule(lang):
    rng = random.Random(lang)
    matched = 0
    for _ in range(400):
        text = "".join(rng.choices(CLUSTERS, k=rng.randint(0, 25)))
        vocabulary = {"".join(rng.choices(UNSPACED, k=rng.randint(1, 4))) for _ in range(60)}
        vocabulary |= {"か", "ก", *(unicodedata.normalize("NFC", word) for word in vocabulary)}
        expected = slow_split(text, lang, vocabulary)
        assert af.split_words(text, lang, vocabulary) == expected, (text, vocabulary)
        matched += any(len(word) > 2 and word in vocabulary for word in expected)
    assert matched > 50 or lang in ("en", "hi")  # the vocabulary makes a difference


@pytest.mark.parametrize("lang", ["en", "zh", "ja", "th"])
def test_splitting_loses_nothing_but_spaces_and_starts_no_word_with_a_mark(lang):
    rng = random.Random(lang)
    for _ in range(200):
        text = "".join(rng.choices(CLUSTERS, k=20))
        words = af.split_words(text, lang, {"日本", "กิน", "かか"})
        assert "".join(words) == text.replace(" ", "")
        assert not any(is_mark(word[0]) for word in words)


# ---- links


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
    source, target = "the red cat OK".split(), "le chat rouge OK".split()
    assert af.one_to_one(links, source, target) == expected


def test_one_to_one_agrees_with_a_comparison_of_all_links():
    rng, kept = random.Random(0), 0
    for _ in range(500):
        source, target = (rng.choices("abcdef", k=rng.randint(1, 9)) for _ in range(2))
        count = rng.randint(0, 7)
        links = [(rng.randrange(len(source)), rng.randrange(len(target))) for _ in range(count)]
        expected = []
        for i, j in itertools.product(range(len(source)), range(len(target))):
            shares_a_word = any((i == k) != (j == m) for k, m in links)
            if (i, j) in links and not shares_a_word and source[i] != target[j]:
                expected.append((i, j))
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
        ("tomcat cat", "Kater", []),  # `tomcat` translates it, although `forward` lacks `tomcat`
        ("tomcat", "Kater", []),  # a link needs an entry in `forward`
        ("dog", "Hund", [(0, 0)]),
        ("big", "groß", []),  # a link needs an entry in `backward`
        ("great big", "groß", []),  # the only word that translates `groß` is `great`
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
    """Check the three conditions of the method for each word of one side with each of the other."""
    links = []
    for i, j in itertools.product(range(len(source)), range(len(target))):
        translations = {word for word in target if word in forward.get(source[i], ())}
        occurrences = [k for k in range(len(target)) if target[k] == target[j]]
        translators = [k for k in range(len(source)) if source[k] in backward.get(target[j], ())]
        if translations == {target[j]} and occurrences == [j] and translators == [i]:
            links.append((i, j))
    return links


def dictionaries(entries: list[tuple[str, str]]) -> tuple[dict, dict]:
    """Return a dictionary from English, and the same entries inverted."""
    forward, backward = {}, {}
    for english, other in entries:
        forward.setdefault(english, set()).add(other)
        backward.setdefault(other, set()).add(english)
    return forward, backward


@pytest.mark.parametrize("inverted", [True, False])
def test_dictionary_links_agree_with_a_slow_check_of_the_three_conditions(inverted):
    """`inverted`: whether both dictionaries hold the same entries, as in a run."""
    rng, linked = random.Random(1), 0
    english, other = list("abcdefgh"), list("ABCDEFGH")

    def entries(count: int) -> list[tuple[str, str]]:
        return [(rng.choice(english), rng.choice(other)) for _ in range(count)]

    for _ in range(3000):
        there = entries(rng.randint(0, 12))
        back = there if inverted else there[:6] + entries(6)
        forward, backward = dictionaries(there)[0], dictionaries(back)[1]
        source = rng.choices(english, k=rng.randint(0, 8))
        target = rng.choices(other, k=rng.randint(0, 8))
        expected = slow_dictionary_links(source, target, forward, backward)
        assert af.dictionary_links(source, target, forward, backward) == expected
        assert af.one_to_one(expected, source, target) == expected  # they are one-to-one already
        linked += len(expected)
    assert linked > 200


WORDS_OF_A_LONG_LINE = 9000


@pytest.mark.parametrize("different", [WORDS_OF_A_LONG_LINE, 3000, 1])
def test_the_time_of_dictionary_links_grows_linearly_with_the_sentence(different):
    """A line of 9,000 words takes less than half a second, even if words are repeated often.

    To compare all pairs of words takes several seconds. different: how many words are different.
    """
    numbers = [k % different for k in range(WORDS_OF_A_LONG_LINE)]
    forward, backward = dictionaries([(f"word{k}", f"wort{k}") for k in range(different)])
    source, target = [f"word{k}" for k in numbers], [f"wort{k}" for k in reversed(numbers)]
    start = time.process_time()
    links = af.dictionary_links(source, target, forward, backward)
    assert time.process_time() - start < 0.5
    reverse = [(k, WORDS_OF_A_LONG_LINE - 1 - k) for k in range(WORDS_OF_A_LONG_LINE)]
    assert links == (reverse if different == WORDS_OF_A_LONG_LINE else [])


def test_linking_words_adds_no_word_to_a_dictionary(tmp_path):
    write(tmp_path / "dictionary/en-de.txt", "cat Katze")
    forward, backward = af.read_dictionary("de", tmp_path)
    af.dictionary_links(["cat", "dog"], ["Katze", "Hund"], forward, backward)
    assert (dict(forward), dict(backward)) == ({"cat": {"Katze"}}, {"Katze": {"cat"}})


# ---- files


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_dictionary_is_read_and_inverted(tmp_path):
    write(tmp_path / "dictionary/en-de.txt", "cat Katze", "cat Kater", "tomcat Kater", "dog\tHund")
    forward, backward = af.read_dictionary("de", tmp_path)
    assert forward == {"cat": {"Katze", "Kater"}, "tomcat": {"Kater"}, "dog": {"Hund"}}
    assert backward == {"Katze": {"cat"}, "Kater": {"cat", "tomcat"}, "Hund": {"dog"}}


def test_identical_entries_are_dropped_before_words_are_compared(tmp_path):
    """`piano piano` would make `piano Klavier` ambiguous in a sentence that has both."""
    write(tmp_path / "dictionary/en-de.txt", "piano piano", "piano Klavier", "wing wing")
    forward, backward = af.read_dictionary("de", tmp_path)
    assert (forward, backward) == ({"piano": {"Klavier"}}, {"Klavier": {"piano"}})
    source, target = "a piano".split(), "Klavier oder piano".split()
    assert af.dictionary_links(source, target, forward, backward) == [(1, 0)]


def test_links_of_a_dictionary_with_identical_entries_are_those_without_them(tmp_path):
    rng, linked = random.Random(2), 0
    for _ in range(200):
        entries = [(rng.choice("abcdef"), rng.choice("abcdefXYZ")) for _ in range(12)]
        write(tmp_path / "dictionary/en-de.txt", *map(" ".join, entries))
        slow = dictionaries([(a, b) for a, b in entries if a != b])
        source, target = rng.choices("abcdef", k=5), rng.choices("abcdefXYZ", k=5)
        expected = slow_dictionary_links(source, target, *slow)
        found = af.dictionary_links(source, target, *af.read_dictionary("de", tmp_path))
        assert found == expected
        linked += len(expected)
    assert linked > 50


@pytest.mark.parametrize("form_of_text", ["NFC", "NFD"])
@pytest.mark.parametrize("form_of_entries", ["NFC", "NFD"])
@pytest.mark.parametrize("language, other", [("fr", "café"), ("vi", "thế"), ("ko", "학생")])
def test_letters_with_accents_are_linked_however_they_are_encoded(
    tmp_path, language, other, form_of_text, form_of_entries
):
    """A letter with an accent can be one character (NFC) or several (NFD)."""
    text, entry = (unicodedata.normalize(form, other) for form in (form_of_text, form_of_entries))
    assert (text == entry) == (form_of_text == form_of_entries)
    write(tmp_path / f"dictionary/en-{language}.txt", f"naïve {entry}")
    for english in ("naïve", "nai\u0308ve"):
        write(tmp_path / f"parallel/en-{language}.tsv", f"so {english}\t{text} .")
        (pair,) = take(1, language, "dictionary", tmp_path, 31)
        assert pair == (language, ["so", english], [text, "."], [(1, 0)], 0, 1)


def test_japanese_words_are_found_however_they_are_encoded(tmp_path):
    text = unicodedata.normalize("NFD", "これはギター")
    write(tmp_path / "dictionary/en-ja.txt", "guitar ギター")
    write(tmp_path / "parallel/en-ja.tsv", f"a guitar\t{text}")
    (pair,) = take(1, "ja", "dictionary", tmp_path, 31)
    assert pair.links == [(1, len(pair.target) - 1)]
    assert "".join(pair.target) == text


@pytest.mark.parametrize("language", ["zh-TW", "zh_Hant"])
def test_the_dictionary_of_a_variety_is_its_own(tmp_path, language):
    write(tmp_path / f"dictionary/en-{language}.txt", "love 喜欢")
    write(tmp_path / f"parallel/en-{language}.tsv", "I love you\t我喜欢你")
    write(tmp_path / f"links/en-{language}.txt", "0-0 1-1 2-2")
    links = [(0, 0), (1, 1), (2, 2)]
    for aligner, expected in [("dictionary", links[1:2]), (str(tmp_path / "links"), links)]:
        (pair,) = take(1, language, aligner, tmp_path, 31)
        assert (pair.target, pair.links) == (["我", "喜欢", "你"], expected)


def test_the_dictionary_of_a_variety_is_downloaded_as_that_of_its_language(tmp_path, monkeypatch):
    path, urls = write(tmp_path / "en-zh.txt", "love 喜欢", "you 你"), []
    monkeypatch.setattr(af, "fetch", lambda url: urls.append(url) or path)
    assert af.read_dictionary("zh-TW", None)[0] == {"love": {"喜欢"}, "you": {"你"}}
    af.read_dictionary("de", None)
    folder = "https://dl.fbaipublicfiles.com/arrival/dictionaries/"
    assert urls == [f"{folder}en-zh.txt", f"{folder}en-de.txt"]


def parallel_text(
    language: str, folder: Path, part: str = "train", **changed: Any
) -> af.ParallelText:
    return af.ParallelText(language, af.Settings(data_dir=folder, **changed), part)


def test_parallel_text_is_read_line_by_line_in_order(tmp_path):
    lines = ["A cat .\tEine Katze .", "Yes\t", "Two words\tzwei Wörter"]
    path = write(tmp_path / "parallel/en-de.tsv", *lines)
    write(tmp_path / "parallel/en-de.dev.tsv", "Other\tAnderes")
    write(tmp_path / "dictionary/en-de.txt", "cat Katze")
    text = [("A cat .", "Eine Katze ."), ("Yes", ""), ("Two words", "zwei Wörter")]
    assert list(parallel_text("de", tmp_path).lines()) == text
    assert list(parallel_text("de", tmp_path, limit_links=2).lines()) == text[:2]
    assert list(parallel_text("de", tmp_path, "dev").lines()) == [("Other", "Anderes")]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert list(parallel_text("de", tmp_path).lines()) == text


def test_a_wrong_line_of_local_text_is_found_before_the_first_pair_is_needed(tmp_path):
    write(tmp_path / "dictionary/en-de.txt", "cat Katze")
    write(tmp_path / "parallel/en-de.tsv", *["cat\tKatze"] * 50, "no tab", "cat\tKatze")
    with pytest.raises(af.UserError, match=r"en-de\.tsv:51:"):
        parallel_text("de", tmp_path)
    parallel_text("de", tmp_path, limit_links=50)  # line 51 is not read


@pytest.mark.parametrize("line", ["\t", " \t ", "\u3000\t"])
def test_a_line_that_is_empty_on_both_sides_is_an_error_that_names_it(tmp_path, line):
    write(tmp_path / "dictionary/en-de.txt", "cat Katze")
    write(tmp_path / "parallel/en-de.tsv", "cat\tKatze", line, "cat\tKatze")
    with pytest.raises(af.UserError, match=r"en-de\.tsv:2: .*empty"):
        parallel_text("de", tmp_path)
    path = write(tmp_path / "translation/en-de/test.tsv", "cat\tKatze", line)
    with pytest.raises(af.UserError, match=r"test\.tsv:2: .*empty"):
        list(af.load_translation("en-de", "test", af.Settings(data_dir=tmp_path)))
    write(path, "cat\t", "\tKatze")  # one side may be empty
    assert len(list(af.read_tsv(path))) == 2


# ---- links in files


@pytest.fixture
def linked(tmp_path) -> Path:
    """A text of four lines in data/, and a folder links/ that is still empty."""
    lines = ["a b c\td e f", "x\t", "g h\ti j k l", "m n o\tp q"]
    write(tmp_path / "data/parallel/en-de.tsv", *lines)
    (tmp_path / "links").mkdir()
    return tmp_path


def read(folder: Path, **changed: Any) -> list[af.Links] | None:
    return parallel_text("de", folder / "data", aligner=str(folder / "links"), **changed).links


LINES = ["0-0 1-2", "", "0-3 1-0", " 2-1  0-0 "]
LINKS = [[(0, 0), (1, 2)], [], [(0, 3), (1, 0)], [(2, 1), (0, 0)]]
STORED_WORDS = ["a b c ||| d e f", "x ||| ", "g h ||| i j k l", "m n o ||| p q"]


def test_links_are_read_in_pharaoh_format_one_sentence_pair_a_line(linked):
    write(linked / "links/en-de.txt", *LINES)
    assert read(linked) == LINKS
    assert read(linked, limit_links=2) == LINKS[:2]


def test_the_text_must_have_as_many_lines_as_the_links(linked):
    path = write(linked / "links/en-de.txt", *LINES, "0-0")
    with pytest.raises(af.UserError, match=r"en-de\.txt:5: the text has only 4 "):
        read(linked)
    assert read(linked, limit_links=4) == LINKS
    write(path, *LINES[:3])
    with pytest.raises(af.UserError, match=r"en-de\.txt: has 3 lines, but the text has more"):
        read(linked)
    assert read(linked, limit_links=3) == LINKS[:3]


@pytest.mark.parametrize("wrong", ["0-0 1", "0", "0:0", "0-0,1-1", "-1-0", "a-b", "1-2-3", "0p0"])
def test_a_line_that_holds_no_links_is_an_error_that_names_it(linked, wrong):
    write(linked / "links/en-de.txt", *LINES[:2], wrong, LINES[3])
    with pytest.raises(af.UserError, match=r"en-de\.txt:3: expected links"):
        read(linked)


@pytest.mark.parametrize("wrong", ["2-0", "0-4", "0-0 999999999-0"])
def test_a_link_beyond_the_words_of_its_line_is_an_error_that_names_it(linked, wrong):
    write(linked / "links/en-de.txt", *LINES[:2], wrong, LINES[3])
    with pytest.raises(af.UserError, match=r"en-de\.txt:3: .*beyond 2 English or 4 other"):
        read(linked)


def test_words_that_are_stored_with_the_links_may_be_absent_but_must_be_those_of_the_text(linked):
    write(linked / "links/en-de.txt", *LINES)
    path = write(linked / "links/en-de.words.txt", *STORED_WORDS)
    assert read(linked) == LINKS
    for number, words in enumerate(STORED_WORDS):
        for wrong in (words.upper() + "x", words.replace(" ||| ", " "), ""):
            write(path, *STORED_WORDS[:number], wrong, *STORED_WORDS[number + 1 :])
            with pytest.raises(af.UserError, match=rf"en-de\.words\.txt:{number + 1}: .*words"):
                read(linked)
            if number:  # the lines before this one are right
                assert read(linked, limit_links=number) == LINKS[:number]
    write(path, *STORED_WORDS[:3])
    with pytest.raises(af.UserError, match=r"en-de\.words\.txt:4: "):
        read(linked)


def test_a_change_of_the_text_that_keeps_its_length_is_noticed_by_the_stored_words(linked):
    write(linked / "links/en-de.txt", *LINES)
    write(linked / "links/en-de.words.txt", *STORED_WORDS)
    path = linked / "data/parallel/en-de.tsv"
    write(path, *path.read_text("utf-8").replace("j k l", "j k x").splitlines())
    with pytest.raises(af.UserError, match=r"en-de\.words\.txt:3: "):
        read(linked)


def test_a_folder_without_the_links_of_a_language_is_an_error_that_names_the_file(linked):
    write(linked / "links/en-fr.txt", *LINES)
    with pytest.raises(af.UserError, match=r"links/en-de\.txt: file not found"):
        read(linked)


def test_links_of_a_part_of_a_text_from_the_hub_are_used_for_that_part_alone(tmp_path, monkeypatch):
    """Without the limit, a run would repeat that part, although its record names a longer text."""
    table = [{"translation": {"en": f"cat {k}", "de": f"{k} Katze"}} for k in range(30)]
    monkeypatch.setattr(af.datasets, "load_dataset", lambda **_: table)
    write(tmp_path / "en-de.txt", *["0-1"] * 10)
    with pytest.raises(af.UserError, match=r"en-de\.txt: has 10 lines, .* or set --limit-links"):
        af.ParallelText("de", af.Settings(aligner=str(tmp_path), limit_links=11))
    for count in (10, 4):
        text = af.ParallelText("de", af.Settings(aligner=str(tmp_path), limit_links=count))
        assert list(text.lines()) == [(f"cat {k}", f"{k} Katze") for k in range(count)]
        pairs = list(itertools.islice(text.stream(), 2 * count))
        assert sorted(int(pair.source[1]) for pair in pairs[:count]) == list(range(count))
        assert [pair.reading for pair in pairs] == [1] * count + [2] * count


def test_links_of_a_longer_text_than_that_of_the_hub_are_an_error(tmp_path, monkeypatch):
    table = [{"translation": {"en": "cat", "de": "die Katze"}}] * 3
    monkeypatch.setattr(af.datasets, "load_dataset", lambda **_: table)
    write(tmp_path / "en-de.txt", *["0-1"] * 5)
    with pytest.raises(af.UserError, match=r"en-de\.txt:4: the text has only 3 "):
        af.ParallelText("de", af.Settings(aligner=str(tmp_path)))
    assert af.ParallelText("de", af.Settings(aligner=str(tmp_path), limit_links=3)).links


# ---- shuffle


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
        list(itertools.islice(af.shuffled(itertools.count(), str(seed), 8), 2))
        for seed in range(200)
    ]
    assert {first for first, _ in firsts} == set(range(8))
    assert {second for _, second in firsts} == set(range(9))


def test_shuffling_reads_no_further_than_its_buffer():
    source = itertools.count()
    next(af.shuffled(source, "seed", 50))
    assert next(source) == 51


# ---- endless pairs

LINKED, UNLINKED = 12, 5  # sentence pairs of the text below


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Two languages; the dictionary links 12 sentence pairs of each, and does not link 5."""
    for lang in ("de", "fi"):
        numbers = range(LINKED)
        entries = [f"word{k} {lang}{k}" for k in numbers]
        write(tmp_path / f"dictionary/en-{lang}.txt", *entries, "same same")
        lines = [f"say word{k} OK\tOK {lang}{k} !" for k in numbers]
        lines += ["same\tsame"] * 2 + ["none\tkeins"] * 3
        random.Random(lang).shuffle(lines)
        write(tmp_path / f"parallel/en-{lang}.tsv", *lines)
    return tmp_path


def stream(lang: str, aligner: str, folder: Path | None, seed: int) -> Iterator[af.Pair]:
    settings = af.Settings(aligner=aligner, data_dir=folder, seed=seed)
    return af.ParallelText(lang, settings).stream()


def take(count: int, *args) -> list[af.Pair]:
    return list(itertools.islice(stream(*args), count))


def test_a_pair_holds_the_words_and_links_of_its_sentences(data_dir):
    for pair in take(LINKED, "de", "dictionary", data_dir, 31):
        number = pair.source[1].removeprefix("word")
        source, target = f"say word{number} OK".split(), f"OK de{number} !".split()
        assert pair[:4] == ("de", source, target, [(1, 1)])


@pytest.mark.parametrize("seed", [31, 42])
def test_every_reading_holds_each_linked_pair_once_in_another_order(data_dir, seed):
    pairs = take(3 * LINKED, "de", "dictionary", data_dir, seed)
    assert [pair.reading for pair in pairs] == [1] * LINKED + [2] * LINKED + [3] * LINKED
    words = [pair.source[1] for pair in pairs]
    orders = [words[start : start + LINKED] for start in (0, LINKED, 2 * LINKED)]
    assert all(sorted(order) == sorted(f"word{k}" for k in range(LINKED)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_sentence_pairs_without_a_link_are_skipped_and_counted(data_dir):
    for readings in range(1, 5):
        pairs = take(readings * LINKED, "de", "dictionary", data_dir, 31)
        skipped = sum(pair.skipped for pair in pairs)
        # some may follow the last pair
        assert (readings - 1) * UNLINKED <= skipped <= readings * UNLINKED
    write(data_dir / "parallel/en-de.tsv", "nothing\tnichts", "word1\tde1", "nothing\tnichts")
    pairs = take(200, "de", "dictionary", data_dir, 31)
    assert pairs[0].skipped in (0, 1, 2)
    # up to two that follow the linked pair, and up to two that precede it in the next reading
    assert {pair.skipped for pair in pairs[1:]} == {0, 1, 2, 3, 4}
    assert 2 * 199 <= sum(pair.skipped for pair in pairs) <= 2 * 200


def test_the_same_seed_gives_the_same_pairs_and_another_seed_another_order(data_dir):
    pairs = take(40, "de", "dictionary", data_dir, 31)
    assert take(40, "de", "dictionary", data_dir, 31) == pairs
    assert take(40, "de", "dictionary", data_dir, 42) != pairs
    assert [p.source for p in take(40, "fi", "dictionary", data_dir, 31)] != [
        p.source for p in pairs
    ]


def test_whole_sentences_need_no_links_and_none_of_them_is_skipped(data_dir):
    count = LINKED + UNLINKED
    settings = af.Settings(unit="sentence", data_dir=data_dir)
    pairs = list(itertools.islice(af.ParallelText("de", settings).stream(), 2 * count))
    assert [pair.reading for pair in pairs] == [1] * count + [2] * count
    lines = (data_dir / "parallel/en-de.tsv").read_text("utf-8").splitlines()
    for reading in (pairs[:count], pairs[count:]):
        assert sorted(f"{pair.source}\t{pair.target}" for pair in reading) == sorted(lines)
    assert {(tuple(pair.links), pair.skipped) for pair in pairs} == {((), 0)}


def test_sentences_without_a_translation_are_passed_over_and_counted(data_dir):
    write(data_dir / "parallel/en-de.tsv", "a\tb", "only English\t", "\tnur Deutsch", " \tx")
    settings = af.Settings(unit="sentence", data_dir=data_dir)
    pairs = list(itertools.islice(af.ParallelText("de", settings).stream(), 10))
    assert {(pair.source, pair.target) for pair in pairs} == {("a", "b")}
    assert sum(pair.skipped for pair in pairs[1:-1]) + pairs[0].skipped >= 3 * 8


def of_all(data_dir: Path, *languages: str) -> Iterator[af.Pair]:
    """Return the pairs of a run, of several languages."""
    flags = ["--data-dir", str(data_dir), "--seed", "31", "--realign-languages", *languages]
    return af.load_pairs(af.parse_args(flags))[0]


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


def test_the_same_text_has_another_order_in_each_language(data_dir):
    """Otherwise a batch could hold one English sentence several times, as in MASSIVE."""
    for name in ("dictionary/en-{}.txt", "parallel/en-{}.tsv"):
        lines = (data_dir / name.format("fi")).read_text("utf-8").splitlines()
        write(data_dir / name.format("sv"), *lines)
    orders = []
    for code in ("fi", "sv"):
        orders.append([pair.source for pair in take(LINKED, code, "dictionary", data_dir, 31)])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_pairs_are_linked_only_when_they_are_needed(data_dir, monkeypatch):
    write(data_dir / "parallel/en-de.tsv", *["word1\tde1"] * 2000)
    calls, align = [], af.dictionary_links
    monkeypatch.setattr(af, "dictionary_links", lambda *args: calls.append(1) or align(*args))
    pairs = stream("de", "dictionary", data_dir, 31)
    assert not calls
    list(itertools.islice(pairs, 100))
    assert len(calls) == 100


def test_a_text_is_read_no_further_than_the_buffer_and_what_is_used(data_dir, monkeypatch):
    numbers = itertools.count()
    text = lambda *_: ((f"word1 {k}", "de1") for k in numbers)  # noqa: E731
    settings = af.Settings(data_dir=data_dir)
    pairs = af.ParallelText("de", settings)
    monkeypatch.setattr(af, "parallel_lines", text)
    assert len(list(itertools.islice(pairs.stream(), 100))) == 100
    assert next(numbers) <= 10_000 + 101


def test_links_from_files_stay_with_their_line_in_a_shuffled_text(data_dir, tmp_path):
    lines = [f"a b c {k}\tx y z {k}" for k in range(9)]
    links = [f"{k % 3}-{k // 3}" for k in range(9)]
    write(data_dir / "parallel/en-de.tsv", *lines)
    folder = write(tmp_path / "links/en-de.txt", *links).parent
    for pair in take(27, "de", str(folder), data_dir, 31):
        number = int(pair.source[3])
        assert pair.target[3] == str(number)
        assert pair.links == [(number % 3, number // 3)]


def test_links_from_files_must_be_one_to_one_between_different_strings_too(data_dir, tmp_path):
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


@pytest.mark.parametrize("aligner", ["dictionary", "folder"])
def test_a_text_without_any_link_is_an_error_instead_of_an_endless_search(data_dir, aligner):
    write(data_dir / "parallel/en-de.tsv", "none\tkeins", "same\tsame")
    folder = write(data_dir / "links/en-de.txt", "", "0-0").parent
    aligner = str(folder) if aligner == "folder" else aligner
    with pytest.raises(af.UserError, match="en-de: no sentence pair has both sides or a link"):
        next(stream("de", aligner, data_dir, 31))


# ---- real data

DATA = os.environ.get("ALIGNFREEZE_DATA")
real_data = pytest.mark.skipif(
    not DATA,
    reason="ALIGNFREEZE_DATA does not name a folder with real dictionary/, parallel/, goldalign/",
)
dictionary = functools.cache(lambda lang: af.read_dictionary(lang, Path(DATA)))
FLOORS = {  # lowest precision and recall of the dictionary on gold word alignments
    "fr": (0.96, 0.28), "es": (0.98, 0.26), "ru": (0.96, 0.18), "hu": (0.91, 0.15),
    "bg": (0.92, 0.18), "it": (0.97, 0.21), "sl": (0.97, 0.13),
}  # fmt: skip


@real_data
@pytest.mark.parametrize("lang", FLOORS)
def test_dictionary_links_reach_their_precision_and_recall_on_gold_alignments(lang):
    forward, backward = dictionary(lang)
    (path,) = (Path(DATA) / "goldalign").glob(f"en-{lang}.*.tsv")
    counts = Counter()
    for line in path.read_text("utf-8").splitlines():
        source, target, gold = line.split("\t")
        source, target = source.split(), target.split()
        sure = {tuple(map(int, link.split("-"))) for link in gold.split() if "-" in link}
        possible = {tuple(map(int, link.split("p"))) for link in gold.split() if "p" in link} | sure
        found = af.dictionary_links(source, target, forward, backward)
        links = set(af.one_to_one(found, source, target))
        counts.update(links=len(links), right=len(links & possible))
        counts.update(sure=len(sure), found=len(links & sure))
    precision, recall = counts["right"] / counts["links"], counts["found"] / counts["sure"]
    assert round(precision, 2) >= FLOORS[lang][0]
    assert round(recall, 2) >= FLOORS[lang][1]


def link_rate(lang: str, splitter) -> float:
    """Return the share of the first 1,000 sentence pairs in which the dictionary links words."""
    forward, backward = dictionary(lang)
    settings, count = af.Settings(data_dir=Path(DATA)), 0
    for english, other in itertools.islice(af.parallel_lines(lang, settings, "train"), 1000):
        source, target = af.split_words(english, "en"), splitter(other, backward)
        links = af.dictionary_links(source, target, forward, backward)
        count += bool(af.one_to_one(links, source, target))
    return count / 1000


RATES = dict.fromkeys("bg de el fa fr hi lv sk".split(), 0.90)
RATES |= {"zh": 0.70, "ja": 0.80, "th": 0.85}


@real_data
@pytest.mark.parametrize("lang", RATES)
def test_the_dictionary_links_most_sentence_pairs(lang):
    rate = link_rate(lang, lambda text, vocabulary: af.split_words(text, lang, vocabulary))
    assert rate >= RATES[lang]


@real_data
@pytest.mark.parametrize("decomposed", ["text", "dictionary"])
@pytest.mark.parametrize("lang", ["vi", "fr", "el"])
def test_a_decomposed_text_or_dictionary_loses_no_link(tmp_path, lang, decomposed):
    forward, backward = dictionary(lang)
    form_of_text = "NFC"
    if decomposed == "text":
        form_of_text = "NFD"
    else:
        entries = (Path(DATA) / f"dictionary/en-{lang}.txt").read_text("utf-8")
        write(tmp_path / f"dictionary/en-{lang}.txt", unicodedata.normalize("NFD", entries)[:-1])
        forward, backward = af.read_dictionary(lang, tmp_path)
    settings, accents = af.Settings(data_dir=Path(DATA)), 0
    for english, other in itertools.islice(af.parallel_lines(lang, settings, "train"), 300):
        links = []
        for form, *words in [("NFC", *dictionary(lang)), (form_of_text, forward, backward)]:
            target = af.split_words(unicodedata.normalize(form, other), lang)
            source = af.split_words(unicodedata.normalize(form, english), "en")
            links.append(af.dictionary_links(source, target, *words))
        assert links[0] == links[1]
        forms = [{unicodedata.normalize(f, target[j]) for f in ("NFC", "NFD")} for _, j in links[0]]
        accents += sum(len(form) == 2 for form in forms)
    assert accents > 100


@real_data
@pytest.mark.parametrize("lang", ["zh", "ja", "th"])
def test_without_longest_match_hardly_any_sentence_pair_is_linked(lang):
    assert link_rate(lang, lambda text, vocabulary: af.split_words(text, "en")) <= 0.15
