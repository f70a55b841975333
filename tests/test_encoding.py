"""The decision of --fix-encoding: bytes in, decision out. The cases are in cases/*.json."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import gen_captions as gc

CASES = Path(__file__).with_name("cases")
UNTOUCHED = {"unclear", "no text"}

Case = dict[str, Any]


def read_cases() -> dict[str, list[Case]]:
    """Return the cases by the name of their file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(CASES.glob("*.json"))}


def case_bytes(case: Case) -> bytes:
    """Return the bytes of a case."""
    return bytes.fromhex(case["hex"]) if "hex" in case else base64.b64decode(case["base64"])


def judge_case(case: Case) -> str:
    """Return "right", "unclear" or "wrong": what the decision on a case is."""
    found = gc.decode_text(case_bytes(case))
    expected = case.get("expect", "repaired")
    if expected in UNTOUCHED:
        return "right" if found.kind == expected else "unclear" if found.kind in UNTOUCHED else "wrong"
    if found.kind in UNTOUCHED:
        return "unclear"
    as_expected = (found.kind == "right") == (expected == "right") and found.text == case["text"]
    return "right" if as_expected else "wrong"


def count_cases() -> str:
    """Return the table of counts that cases/README.md holds."""
    rows = ["| file | cases | right | left unclear | wrong |", "|---|---|---|---|---|"]
    total: Counter[str] = Counter()
    for name, cases in read_cases().items():
        counts = Counter(map(judge_case, cases))
        total += counts
        rows.append(f"| {name} | {len(cases)} | {counts['right']} | {counts['unclear']} | {counts['wrong']} |")
    rows.append(f"| all | {total.total()} | {total['right']} | {total['unclear']} | {total['wrong']} |")
    return "\n".join(rows)


def case_parameters() -> list[Any]:
    """Return the cases as parameters, those known to fail as strict xfails."""
    return [
        pytest.param(
            case,
            id=f"{name}: {case['name']}",
            marks=[pytest.mark.xfail(reason=case["known_failure"], strict=True)] if "known_failure" in case else [],
        )
        for name, cases in read_cases().items()
        for case in cases
    ]


@pytest.mark.parametrize("case", case_parameters())
def test_a_case_is_decided_as_it_says(case: Case) -> None:
    allowed = {"right", "unclear"} if case.get("may_be_unclear") else {"right"}
    assert judge_case(case) in allowed


@pytest.mark.parametrize("case", [case for cases in read_cases().values() for case in cases], ids=lambda c: c["name"])
def test_a_repaired_case_is_right_the_second_time(case: Case) -> None:
    first = gc.decode_text(case_bytes(case))
    if first.kind not in UNTOUCHED:
        assert gc.decode_text(first.text.encode()) == gc.Decoding("right", first.text)


def test_the_readme_counts_are_true() -> None:
    assert count_cases() in (CASES / "README.md").read_text(encoding="utf-8")


def test_western_sentences_come_out_right_in_99_of_100() -> None:
    counts = Counter(judge_case(case) for case in read_cases()["western"] if " in cp1252, " in case["name"])
    assert counts["right"] >= 0.99 * counts.total()


def test_elsewhere_unclear_beats_wrong_ten_to_one() -> None:
    served = {"central_european", "turkish", "cyrillic", "greek", "chinese", "japanese", "korean"}
    counts = Counter(judge_case(case) for name, cases in read_cases().items() if name in served for case in cases)
    assert counts["unclear"] >= 10 * counts["wrong"]


# ------------------------------------------------------------------------------------------ --encoding


def test_the_encoding_named_is_used_for_a_legacy_file() -> None:
    assert gc.decode_text("кот".encode("cp1251"), "cp1251") == gc.Decoding("cp1251", "кот", "кот")


def test_the_encoding_named_beats_the_western_evidence() -> None:
    assert gc.decode_text("drugorzędne okno".encode("cp1250"), "cp1250").text == "drugorzędne okno"


@pytest.mark.parametrize("text", ["a cat", "un café", "草地上的女孩", ""])
def test_the_encoding_named_does_not_touch_healthy_utf8(text: str) -> None:
    assert gc.decode_text(text.encode(), "cp1251") == gc.Decoding("right", text)


def test_the_encoding_named_does_not_switch_off_the_boms() -> None:
    assert gc.decode_text("кот".encode("utf-8-sig"), "cp1252").text == "кот"
    assert gc.decode_text(b"\xff\xfe" + "кот".encode("utf-16-le"), "cp1252").text == "кот"


def test_a_file_that_the_encoding_named_does_not_fit_is_unclear_and_says_why() -> None:
    found = gc.decode_text(b"caf\xe9", "ascii")
    assert (found.kind, found.text, found.why) == ("unclear", "", "not all of it is ascii")


def test_half_characters_are_never_text() -> None:
    assert gc.decode_text(b"\\ud800 \xff", "unicode_escape").kind == "unclear"


def test_a_binary_file_is_no_text_in_the_encoding_named_either() -> None:
    assert gc.decode_text(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "cp1251").kind == "no text"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_the_encoding_named_reads_utf16_without_a_bom(encoding: str) -> None:
    text = "草地上的女孩和猫\n"
    assert gc.decode_text(text.encode("utf-16-le"), encoding).text == text


def test_mojibake_in_a_file_of_the_encoding_named_is_repaired_too() -> None:
    assert gc.decode_text("cafÃ© d’été".encode("cp1252"), "cp1252") == gc.Decoding(
        "cp1252, mojibake", "café d’été", "cafÃ© d’été"
    )


# --------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"a cat", "right"),
        (b"\xef\xbb\xbfa cat", "BOM"),
        ("a cat".encode("utf-16"), "UTF-16"),
        ("a cat".encode("utf-32"), "UTF-32"),
        (b"it\x92s", "cp1252"),
        ("“été” ".encode() + b"it\x92s", "stray bytes"),
        ("cafÃ©".encode(), "mojibake"),
        (b"\xef\xbb\xbf" + "cafÃ©".encode(), "BOM, mojibake"),
        (b"\xef\xbb\xbfcaf\xe9", "BOM, cp1252"),
        ("it\x92s".encode(), "C1 controls"),
        ("it\x92s cafÃ©".encode(), "mojibake"),
        ("一只橘猫趴在窗台上，窗外下着雨".encode("gb18030"), "GB18030"),
        ("窓辺で眠るオレンジ色の猫、外は雨".encode("shift_jis"), "Shift_JIS"),
        ("девушка стоит на мосту на рассвете, над рекой туман".encode("cp1251"), "cp1251"),
    ],
)
def test_the_kind_says_what_was_repaired(data: bytes, kind: str) -> None:
    assert gc.decode_text(data).kind == kind


def test_an_unclear_file_comes_with_at_most_two_guesses_that_can_be_named() -> None:
    found = gc.decode_text("草地上的女孩和猫".encode("gb18030"))
    assert (found.kind, len(found.guesses)) == ("unclear", 2)
    for encoding, text in found.guesses:
        assert "草地上的女孩和猫".encode("gb18030").decode(encoding) == text


def test_what_was_found_is_the_text_before_letters_were_repaired() -> None:
    assert gc.decode_text("cafÃ©".encode()).found == "cafÃ©"


# ----------------------------------------------------------------------------------------- properties

LETTERS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"),
        st.sampled_from("abc \n\r\t.,’“”«»…–—ÃÂâäéèçñßÐÎÞŁžřąкотРСҐїα猫가ｶ😀\u200d\u00a0°€™©²"),
    )
)


UTF8_BEYOND_ASCII = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"


def as_cp1252(character: str) -> bytes:
    """Return the byte that looks like this character in cp1252, a line break where there is none."""
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1", "ignore") or b"\n"


def may_be_damaged(text: str) -> bool:
    """Return whether a text has C1 controls, or a run that reads as UTF-8 seen through cp1252."""
    seen = b"".join(map(as_cp1252, text))
    return bool(re.search("[\x80-\x9f]", text) or re.search(UTF8_BEYOND_ASCII, seen))


@settings(max_examples=2000, deadline=None, derandomize=True)
@example("naïve Ã")
@given(LETTERS)
def test_text_without_mojibake_and_c1_controls_comes_through_untouched(text: str) -> None:
    assume(not may_be_damaged(text))
    assert gc.decode_text(text.encode()) == gc.Decoding("right", text)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=60), LETTERS.map(str.encode)))
def test_any_repair_run_twice_equals_once(data: bytes) -> None:
    first = gc.decode_text(data)
    if first.kind not in UNTOUCHED:
        assert gc.decode_text(first.text.encode()) == gc.Decoding("right", first.text)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text(st.characters(codec="cp1252", exclude_categories=["Cc"]), max_size=40), st.sampled_from(["\r\n", "\n"]))
def test_line_ends_stay_whatever_is_repaired(text: str, end: str) -> None:
    found = gc.decode_text((f"{text}{end} {end}").encode("cp1252"))
    if found.kind not in UNTOUCHED:
        assert (found.text.count("\r"), found.text.count("\n")) == (2 * (end == "\r\n"), 2)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.sampled_from(["cp1251", "shift_jis", "gb18030", "utf-16-le", "latin-1", "cp037"]))
def test_no_bytes_and_no_encoding_named_raise(data: bytes, encoding: str) -> None:
    assert len(gc.decode_text(data, encoding).guesses) <= 2


# --------------------------------------------------------------------------------------- same meaning


@pytest.mark.parametrize(
    ("found", "text", "suffix"),
    [
        ('{"caption": "cafÃ©"}', '{"caption": "café"}', ".json"),
        ('{"cafÃ©": 1, "b": [true, null, 1.5]}', '{"café": 1, "b": [true, null, 1.5]}', ".json"),
        ('{"a": "\\u00e9 cafÃ©"}', '{"a": "\\u00e9 café"}', ".json"),
        ('{"a": "cafÃ©"}\r\n{"b": 2}\r\n', '{"a": "café"}\r\n{"b": 2}\r\n', ".jsonl"),
        ("a: cafÃ©\nb: [1, 2]\n", "a: café\nb: [1, 2]\n", ".yaml"),
        ("a: 'itâ€™s'\n", "a: 'it’s'\n", ".yml"),
        ("a: wait\x85 what\n", "a: wait… what\n", ".yaml"),
        ("d: 2024-01-01\nt: cafÃ©\n", "d: 2024-01-01\nt: café\n", ".yaml"),
        ("a = 'cafÃ©'\nd = 2024-01-01\n", "a = 'café'\nd = 2024-01-01\n", ".toml"),
        ("\ufeffa: 1\n", "a: 1\n", ".yaml"),
        ('\ufeff{"a": 1}', '{"a": 1}', ".json"),
        ("path: 表示\n", "path: 表示\n", ".yaml"),
    ],
)
def test_repaired_letters_keep_the_meaning(found: str, text: str, suffix: str) -> None:
    assert gc.same_meaning(found, text, suffix)


@pytest.mark.parametrize(
    ("found", "text", "suffix"),
    [
        ("a: x\x85b: y\n", "a: x… b: y\n", ".yaml"),  # U+0085 ends a line in YAML
        ("cafÃ©: 1\ncafé: 2\n", "café: 1\ncafé: 2\n", ".yaml"),  # two keys become one
        ('{"cafÃ©": 1, "café": 2}', '{"café": 1, "café": 2}', ".json"),
        ('{"a": "x"}', '{"a": "x""}', ".json"),
        ('{"a": 1}', '{"a": "1"}', ".json"),
        ("a = 'cafÃ©'\n", "a = 'café\n", ".toml"),
        ("a: 'x'\n", "a: x: y\n", ".YAML"),
        ("a: 1\n", "a: 1.0\n", ".yaml"),
        ("a: [x]\n", "a: x\n", ".yaml"),
    ],
)
def test_another_meaning_is_noticed(found: str, text: str, suffix: str) -> None:
    assert not gc.same_meaning(found, text, suffix)


@pytest.mark.parametrize(
    ("found", "suffix"),
    [("{broken", ".json"), ("a: [", ".yaml"), ("= 1", ".toml"), ("a: it\x92s", ".yaml"), ("[" * 9999, ".json")],
)
def test_a_file_that_could_not_be_parsed_before_may_be_repaired(found: str, suffix: str) -> None:
    assert gc.same_meaning(found, "anything: [", suffix)


@pytest.mark.parametrize("suffix", [".txt", ".caption", ""])
def test_captions_have_no_structure_to_keep(suffix: str) -> None:
    assert gc.same_meaning("a: 1", "[", suffix)
