"""Files: whole or not at all, with the permissions that were there; nothing waits for a pipe."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import gen_captions as gc

POSIX = pytest.mark.skipif(os.name == "nt", reason="permissions and pipes")


def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    for data in (b"one\n", "Ein Café.\n".encode(), b""):
        assert gc.write_whole(str(tmp_path / "a.txt"), data)
        assert (tmp_path / "a.txt").read_bytes() == data
        assert os.listdir(tmp_path) == ["a.txt"]


def test_what_may_not_be_replaced_stays_and_is_asked_about_only_when_all_is_ready(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_bytes(b"mine")
    seen: list[str] = []

    def refuse() -> bool:
        seen.extend(os.listdir(tmp_path))
        return False

    assert not gc.write_whole(str(tmp_path / "a.txt"), b"new\n", refuse)
    assert len(seen) == 2
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"mine"


def test_a_file_that_cannot_be_written_raises_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        gc.write_whole(str(tmp_path / "missing" / "a.txt"), b"new\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        gc.write_whole(str(tmp_path / "folder"), b"new\n")
    assert os.listdir(tmp_path) == ["folder"]


def test_what_a_killed_run_left_is_written_anew_and_goes(tmp_path: Path) -> None:
    path = str(tmp_path / "a.txt")

    def die() -> bool:
        os.link(tmp_path / os.listdir(tmp_path)[0], tmp_path / "kept")
        return False

    gc.write_whole(path, b"torn", die)
    left = f".gc-{gc.fingerprint(b'a.txt'.hex())}"
    (tmp_path / "kept").rename(tmp_path / left)
    assert gc.write_whole(path, b"whole\n")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    assert gc.write_whole(str(tmp_path / ("n" * 251 + ".txt")), b"new\n")


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_permissions_stay_as_they_were_and_are_ordinary_at_first(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.txt"
    (tmp_path / "plain").touch()
    gc.write_whole(str(path), b"one\n")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(mode)
    gc.write_whole(str(path), b"two\n")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a cat", True),
        (b"\n\n x", True),
        ("\u00a0é".encode(), True),
        (b" " * 9000 + b"x", True),
        (b"", False),
        (b" \r\n\t\n", False),
        (b"\xef\xbb\xbf\n", False),
        (b"\0" * 50, False),  # what a power cut can leave
        (b" " * 10_000, False),
    ],
)
def test_a_caption_is_anything_but_blanks(tmp_path: Path, data: bytes, expected: bool) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert gc.has_caption(str(tmp_path / "a.txt")) is expected


def test_where_no_folder_is_there_is_no_caption(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not gc.has_caption(str(tmp_path / "missing" / "a.txt"))
    assert not gc.has_caption(str(tmp_path / "file" / "a.txt"))


@POSIX
def test_a_pipe_a_folder_a_device_and_a_giant_are_errors_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(gc.LARGEST_FILE + 1)
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "giant"):
        with pytest.raises(OSError):
            gc.read_file(str(path))
    for name in ("pipe", "missing", "giant"):
        assert not gc.is_file_with(str(tmp_path / name), "00")


@pytest.mark.parametrize("root", ["/set", "/set/"])
def test_names_below_a_folder_have_slashes_and_no_root(root: str) -> None:
    assert gc.name_below(root, os.path.join(root, "a", "b.jpg")) == "a/b.jpg"
    assert gc.name_below("/set", "/settings/b.jpg") == "/settings/b.jpg"
