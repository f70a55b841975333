"""Files: captions appear whole or not at all; what a dead run left is told from what is alive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import gen_captions as gc


def test_a_caption_is_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert gc.write_caption(str(path), gc.encode_caption("Ein Café."))
    assert path.read_bytes() == "Ein Café.\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("before", [b"", b"\n", b"\xef\xbb\xbf \n"])
def test_a_blank_caption_is_replaced(tmp_path: Path, before: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(before)
    assert gc.write_caption(str(tmp_path / "a.txt"), b"new\n")
    assert (tmp_path / "a.txt").read_bytes() == b"new\n"


def test_a_caption_that_stands_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"mine")
    assert not gc.write_caption(str(tmp_path / "a.txt"), b"new\n")
    assert (tmp_path / "a.txt").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_caption_that_cannot_be_written_raises_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        gc.write_caption(str(tmp_path / "missing" / "a.txt"), b"new\n")
    assert os.listdir(tmp_path) == []


def test_the_temporary_name_does_not_grow_with_the_captions_name(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".txt")
    assert gc.write_caption(str(path), b"new\n")
    assert path.exists()


@pytest.mark.parametrize(
    ("writer", "age_s", "abandoned"),
    [
        ("this one-1", 5, True),
        ("parent-1", 5, False),
        ("parent-1", 61, True),
        ("4194999-1", 5, os.name != "nt"),
        ("99999999999999999999-1", 5, False),
        ("notes", 999, False),
        ("1-1.txt", 999, False),
    ],
)
def test_a_temporary_file_is_abandoned_when_its_writer_is_gone(writer: str, age_s: float, abandoned: bool) -> None:
    name = ".gc-" + writer.replace("this one", str(os.getpid())).replace("parent", str(os.getppid()))
    assert gc.is_abandoned(name, 1000.0, 1000.0 + age_s) is abandoned


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(gc.FailImage, match="not a file"):
        gc.read_image(str(tmp_path / "a.jpg"))


def test_a_missing_image_is_a_named_failure(tmp_path: Path) -> None:
    with pytest.raises(gc.FailImage, match="unreadable file: No such file"):
        gc.read_image(str(tmp_path / "a.jpg"))
