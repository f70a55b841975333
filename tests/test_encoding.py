"""The decision of --fix-encoding: bytes in, decision out. The cases are in cases/*.json."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gen_captions as gc

CASES = Path(__file__).with_name("cases")
UNTOUCHED = {"unclear", "no text"}

Case = dict[str, Any]


def read_cases() -> list[tuple[str, Case]]:
    """Return each case with its name."""
    files = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(CASES.glob("*.json"))
    }
    return [(f"{topic}: {case['name']}", case) for topic, cases in files.items() for case in cases]


def case_bytes(case: Case) -> bytes:
    """Return the bytes of a case's file."""
    if "bytes" in case:
        return str(case["bytes"]).encode("latin-1")
    return str(case.get("found", case.get("text"))).encode(case.get("in", "utf-8"))


def judge_case(case: Case) -> str:
    """Return "right", "unclear" or "wrong": what the decision on a case is."""
    data = case_bytes(case)
    found = gc.decode_text(data)
    if "expect" in case:
        return "right" if found.kind == case["expect"] else "wrong"
    if found.kind in UNTOUCHED:
        return "unclear"
    is_healthy = data == str(case["text"]).encode()
    is_right = found.text == case["text"] and (found.kind == "right") == is_healthy
    return "right" if is_right else "wrong"


@pytest.mark.parametrize(("name", "case"), read_cases())
def test_a_case_is_decided_as_it_says(name: str, case: Case) -> None:
    allowed = {"right", "unclear"} if case.get("may_be_unclear") else {"right"}
    is_known = "known_failure" in case  # an improvement is to be noticed
    assert (judge_case(case) in allowed) != is_known, name


def test_all_that_is_repaired_is_right_the_second_time() -> None:
    for name, case in read_cases():
        first = gc.decode_text(case_bytes(case))
        if first.kind not in UNTOUCHED:
            assert gc.decode_text(first.text.encode()) == gc.Decoding("right", first.text), name


def test_elsewhere_than_in_western_text_unclear_beats_wrong_ten_to_one() -> None:
    judged = [judge_case(case) for _, case in read_cases() if case.get("may_be_unclear")]
    assert judged.count("unclear") >= 10 * judged.count("wrong")
    assert judged.count("right") >= 0.8 * len(judged)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"a cat", "right"),
        (b"\xef\xbb\xbfa cat", "BOM"),
        ("a cat".encode("utf-16"), "UTF-16"),
        ("a cat".encode("utf-32"), "unclear"),
        (b"it\x92s", "cp1252"),
        (b"caf\xe9", "cp1252"),
        (b"BMW, caf\xe9", "cp1252"),  # like the beginning of a bitmap
        ("“été” ".encode() + b"it\x92s", "stray bytes"),
        ("cafÃ©".encode(), "mojibake"),
        ("it\x92s".encode(), "mojibake"),
        (b"\xef\xbb\xbf" + "cafÃ©".encode(), "BOM, mojibake"),
        ("un café".encode() + b"\0\0\0", "zero bytes"),
        ("un café".encode("cp1252") + b"\0\0\0", "cp1252"),
        ("一只橘猫趴在窗台上，窗外下着雨".encode("gb18030"), "gb18030"),
        ("窓辺で眠るオレンジ色の猫、外は雨".encode("cp932"), "cp932"),
        ("ДЕВУШКА НА МОСТУ".encode("cp1251"), "cp1251"),
    ],
)
def test_the_kind_says_what_was_repaired(data: bytes, kind: str) -> None:
    assert gc.decode_text(data).kind == kind


def test_what_is_unclear_is_named_with_two_readings_and_the_flag_that_settles_it() -> None:
    data = "草地".encode("gb18030")
    found = gc.decode_text(data)
    assert found.kind == "unclear"
    readings = re.findall(r'as (\S+) it reads "(.*?)"', found.why)
    assert len(readings) == 2
    assert all(text == data.decode(page) for page, text in readings)
    assert found.why.endswith(f"run again with --encoding {readings[0][0]}")


def test_without_letters_the_bytes_become_utf8_and_damage_stays() -> None:
    found = gc.decode_text("cafÃ© it\x92s".encode("utf-16"), letters=False)
    assert found == gc.Decoding("UTF-16", "cafÃ© it\x92s")
    assert gc.decode_text("cafÃ©".encode(), letters=False).kind == "right"


# ------------------------------------------------------------------------------------ --encoding


def test_the_encoding_named_is_used_for_what_is_neither_utf8_nor_has_a_bom() -> None:
    assert gc.decode_text("кот".encode("cp1251"), "cp1251") == gc.Decoding("cp1251", "кот")
    assert gc.decode_text("drugorzędne".encode("cp1250"), "cp1250").text == "drugorzędne"
    assert gc.decode_text("草地上\n".encode("utf-16-le"), "utf-16-le").text == "草地上\n"
    assert gc.decode_text("un café".encode(), "cp1251") == gc.Decoding("right", "un café")
    assert gc.decode_text("кот".encode("utf-16"), "cp1252").text == "кот"
    misread = gc.decode_text("cafÃ© d’été".encode("cp1252"), "cp1252")
    assert misread == gc.Decoding("cp1252, mojibake", "café d’été")


@pytest.mark.parametrize(
    ("data", "encoding"),
    [(b"caf\xe9", "ascii"), (b"\\ud800 \xff", "unicode_escape"), (b"\x89PNG\0\0\0\r", "cp1251")],
    ids=["not all of it", "half characters", "no text"],
)
def test_what_the_encoding_named_does_not_fit_is_left_alone(data: bytes, encoding: str) -> None:
    found = gc.decode_text(data, encoding)
    assert (found.kind, found.text) == ("unclear", "")
    assert f"not all of it is {encoding}" in found.why


# ------------------------------------------------------------------------------------ properties

LETTERS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"),
        st.sampled_from("abc \n\r\t.,’“”«»…–—ÃÂâäéèçñßÐÎÞŁžřąкотРСҐїα猫가ｶ😀\u200d\u00a0°€™©²"),
    )
)
UTF8 = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"


def may_be_damaged(text: str) -> bool:
    """Return whether a text has C1 controls, or what reads as UTF-8 seen through cp1252."""
    seen = [c.encode("cp1252", "ignore") or c.encode("latin-1", "ignore") or b"\n" for c in text]
    return bool(re.search("[\x80-\x9f]", text) or re.search(UTF8, b"".join(seen)))


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(LETTERS)
def test_text_without_damage_comes_through_untouched(text: str) -> None:
    assume(not may_be_damaged(text))
    assert gc.decode_text(text.encode()) == gc.Decoding("right", text)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=60), LETTERS.map(str.encode)))
def test_any_repair_run_twice_equals_once(data: bytes) -> None:
    first = gc.decode_text(data)
    if first.kind not in UNTOUCHED:
        assert gc.decode_text(first.text.encode()) == gc.Decoding("right", first.text)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.binary(max_size=60),
    st.sampled_from([None, "cp1251", "shift_jis", "gb18030", "utf-16", "utf-16-le", "cp037"]),
)
def test_no_bytes_and_no_encoding_named_raise(data: bytes, encoding: str | None) -> None:
    found = gc.decode_text(data, encoding)
    assert (found.kind in UNTOUCHED) == bool(found.why)


@pytest.mark.parametrize(
    "data",
    [b"\xbfa " * 100_000 + b"?", bytes(range(128, 256)) * 20_000, "Ã© ".encode() * 100_000],
    ids=["marks", "bytes", "mojibake"],
)
def test_long_files_are_decided_in_time(data: bytes) -> None:
    started = time.monotonic()
    gc.decode_text(data)
    assert time.monotonic() - started < 20  # it was minutes
