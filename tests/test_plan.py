"""Plan: which images need a caption, where it goes, what is in the way."""

from __future__ import annotations

import os
import sys
import unicodedata
from pathlib import Path

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions

POSIX = pytest.mark.skipif(os.name == "nt", reason="names and files that Windows does not have")


def plan(images: Path, target: Path | None = None, ext: str = "txt") -> list[gc.Job | gc.Skipped | gc.Failed]:
    return list(gc.plan_folder(images, target, ext))


def names_to_caption(images: Path, target: Path | None = None) -> list[str]:
    return [os.path.relpath(item.image, images) for item in plan(images, target) if isinstance(item, gc.Job)]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_images_are_found_by_suffix_in_any_case_and_sorted_folder_by_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.webp", "c.txt", "z/1.AvIf", "z/y/2.tiff", "m/3.heic", "movie.mp4", "noext")
    assert names_to_caption(tmp_path) == ["a.webp", "b.JPG", "m/3.heic", "z/1.AvIf", "z/y/2.tiff"]


def test_hidden_names_and_controls_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, ".a.jpg", ".git/b.jpg", "_controls/c.jpg", "d.jpg", ".gen-captions/e.jpg")
    assert names_to_caption(tmp_path) == ["d.jpg"]


def test_captions_mirror_the_sub_folders(tmp_path: Path) -> None:
    touch(tmp_path / "images", "x/y/a.jpg")
    job = gc.Job(str(tmp_path / "images/x/y/a.jpg"), str(tmp_path / "out/x/y/a.caption"))
    assert plan(tmp_path / "images", tmp_path / "out", "caption") == [job]


def test_captions_lie_beside_the_images_without_a_caption_folder(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.b.jpg")
    assert plan(tmp_path) == [gc.Job(str(tmp_path / "x/a.b.jpg"), str(tmp_path / "x/a.b.txt"))]


@pytest.mark.parametrize("text", ["a cat", "\n\n x", "\u00a0é", " " * 9000 + "x"])
def test_an_image_with_a_caption_is_skipped(tmp_path: Path, text: str) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert plan(tmp_path) == [gc.Skipped(str(tmp_path / "a.jpg"), "has a caption", str(tmp_path / "a.txt"))]


@pytest.mark.parametrize("data", [b"", b" \r\n\t\n", b"\xef\xbb\xbf\n", b"\0" * 50, b" " * 10_000])
def test_a_caption_of_blanks_counts_as_missing(tmp_path: Path, data: bytes) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(data)
    assert names_to_caption(tmp_path) == ["a.jpg"]


@pytest.mark.parametrize(
    ("names", "clashing"),
    [
        (["a.jpg", "a.png"], {"a.jpg", "a.png"}),
        (["a.jpg", "a.png", "a.webp", "b.jpg"], {"a.jpg", "a.png", "a.webp"}),
        (["Photo.jpg", "photo.png"], {"Photo.jpg", "photo.png"}),
        (["Ärger.jpg", "ärger.jpg"], {"Ärger.jpg", "ärger.jpg"}),
        (["caf\u00e9.jpg", unicodedata.normalize("NFD", "caf\u00e9.png")], {"caf\u00e9.jpg", "cafe\u0301.png"}),
        (["a.jpg", "b.jpg", "a.b.jpg", "a.b.c.jpg"], set()),
    ],
)
def test_images_that_would_share_a_caption_are_found(names: list[str], clashing: set[str]) -> None:
    assert set(gc.find_clashes(names)) == clashing


def test_images_of_one_stem_are_both_named_and_the_rest_goes_on(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    for name in ("a.jpg", "a.png", "b.jpg", "sub/a.jpg"):
        make_image(name)
    err = tool("--image-dir", "images", code=1).stderr
    assert "images/a.jpg: shared caption file: a.png would use it too: rename one" in err
    assert "images/a.png: shared caption file: a.jpg would use it too: rename one" in err
    assert sorted(captions(tool.folder)) == ["images/b.txt", "images/sub/a.txt"]
    assert server.stats()["requests"] == 2


def test_a_folder_with_an_images_name_is_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg/a.jpg")
    assert names_to_caption(tmp_path) == ["x.jpg/a.jpg"]


@POSIX
def test_links_that_form_a_loop_end_and_each_image_is_found_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.jpg")
    (tmp_path / "aa").symlink_to(tmp_path)
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "ab").symlink_to(tmp_path / "real")
    assert names_to_caption(tmp_path) == ["real/a.jpg"]


@POSIX
def test_links_to_other_folders_and_to_images_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.jpg", "images/b.jpg")
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "c.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    assert names_to_caption(tmp_path / "images") == ["b.jpg", "c.jpg", "link/a.jpg"]


@POSIX
def test_what_looks_like_an_image_and_is_no_file_is_a_named_failure(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe.png")
    failed = [item for item in plan(tmp_path) if isinstance(item, gc.Failed)]
    assert [(os.path.basename(item.path), item.reason) for item in failed] == [
        ("gone.jpg", "not a file"),
        ("pipe.png", "not a file"),
        ("self.jpg", "not a file"),
    ]


@POSIX
def test_a_caption_path_that_is_a_pipe_or_a_folder_does_not_hang(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").mkdir()
    assert [type(item) for item in plan(tmp_path)] == [gc.Failed, gc.Failed]


NAMES = ["with space.jpg", "line\nbreak.jpg", "🐈‍⬛.jpg", "n" * 250 + ".jpg", "-dash.jpg", "'\"$;.jpg"]


@POSIX
def test_names_of_every_kind_are_captioned_and_print_safely(tool: Tool, make_image: ImageMaker) -> None:
    for name in NAMES:
        make_image(name)
    source = make_image("plain.jpg")
    broken = os.fsdecode(b"byte\xff\xfe.jpg")
    os.link(source, source.parent / broken)
    plan_lines = [line for line in tool("-n", "--image-dir", "images").stdout.splitlines() if "to caption ->" in line]
    assert len(plan_lines) == len(NAMES) + 2
    tool("-v", "--image-dir", "images", "--caption-dir", "out", "--report", "report.jsonl")
    assert len(list((tool.folder / "out").glob("*.txt"))) == len(NAMES) + 2
    assert os.path.exists(tool.folder / "out" / os.fsdecode(b"byte\xff\xfe.txt"))


def test_a_caption_name_that_no_file_system_takes_fails_before_it_is_paid_for(tmp_path: Path) -> None:
    touch(tmp_path, "n" * 250 + ".jpg")
    (failed,) = plan(tmp_path, ext="caption")
    assert isinstance(failed, gc.Failed)
    assert failed.reason == "name too long"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image-dir", "nowhere"], "--image-dir: nowhere: there is no such folder"),
        ([], "--image-dir: is missing"),
        (["--image-dir", "file"], "--image-dir: file: is not a folder that can be read"),
        (["--image-dir", "images", "--caption-dir", "file"], "--caption-dir: file: is not a folder"),
        (["--image-dir", "images", "--config-dir", "file"], "--config-dir: file: is not a folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_an_error_that_names_it(tool: Tool, arguments: list[str], said: str) -> None:
    (tool.folder / "file").touch()
    (tool.folder / "images").mkdir()
    assert said in tool(*arguments, code=2).stderr


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_sub_folder_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    touch(tmp_path, "shut/a.jpg", "b.jpg")
    (tmp_path / "shut").chmod(0)
    try:
        kinds = [type(item) for item in plan(tmp_path)]
    finally:
        (tmp_path / "shut").chmod(0o700)
    assert kinds == [gc.Job, gc.Failed]


def test_a_folder_without_images_is_nothing_to_do(tool: Tool) -> None:
    (tool.folder / "images").mkdir()
    done = tool("--image-dir", "images")
    assert "no images below images" in done.stderr


def test_dry_run_says_what_and_why_and_does_nothing(tool: Tool, make_image: ImageMaker, server: Server) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "d.png"):
        make_image(name)
    (tool.folder / "images" / "b.txt").write_text("mine", encoding="utf-8")
    before = sorted(os.walk(tool.folder))
    out = tool(
        "-n", "--image-dir", "images", "--caption-dir", "images", "--limit", "1", code=1, OPENAI_API_KEY=""
    ).stdout
    lines = [line.replace(os.sep, "/") for line in out.splitlines()]
    assert lines[0] == "Style: prose"  # the recipe goes before; tests/test_recipe.py
    assert lines[-7:-1] == [
        "images/a.jpg: to caption -> images/a.txt",
        "images/b.jpg: skipped: has a caption",
        "images/c.jpg: left by --limit -> images/c.txt",
        "images/d.jpg: shared caption file: d.png would use it too: rename one of them",
        "images/d.png: shared caption file: d.jpg would use it too: rename one of them",
        "To caption 1, skipped 1, left by --limit 1, cannot be captioned 2",
    ]
    assert sorted(os.walk(tool.folder)) == before
    assert server.stats()["requests"] == 0


def test_limit_captions_that_many_and_the_next_run_goes_on(tool: Tool, make_image: ImageMaker) -> None:
    for number in range(5):
        make_image(f"{number}.jpg")
    assert "left for the next run 3" in tool("--image-dir", "images", "--limit", "2").stderr
    assert sorted(captions(tool.folder)) == ["images/0.txt", "images/1.txt"]
    tool("--image-dir", "images")
    assert len(captions(tool.folder)) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="head")
def test_a_reader_that_goes_away_is_no_error(tool: Tool, make_image: ImageMaker) -> None:
    for number in range(200):
        make_image(f"{number:0200}.jpg", size=(1, 1))
    process = tool.start("-n", "-q", "--image-dir", "images")
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, "")
