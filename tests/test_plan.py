"""Plan: which images need a caption, where it goes, what is in the way."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions

POSIX = pytest.mark.skipif(os.name == "nt", reason="names and files that Windows does not have")


def walk(images: Path, target: Path | None = None, ext: str = "txt") -> list[gc.Job | gc.Outcome]:
    return list(gc.walk_images(images, target, ext))


def bare_images(images: Path) -> list[str]:
    """Return the images without a caption, as seen from their folder."""
    found = [item for item in walk(images) if isinstance(item, gc.Job)]
    return [os.path.relpath(pair.image, images) for pair in found]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# ------------------------------------------------------------------------------- what is captioned


def test_images_are_found_by_suffix_in_any_case_and_sorted_folder_by_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a.webp", "c.txt", "z/1.AvIf", "z/y/2.tiff", "m/3.heic", "noext")
    touch(tmp_path, "d.jfif", "x.jpg/e.gif")
    assert bare_images(tmp_path) == [
        *("a.webp", "b.JPG", "d.jfif", "m/3.heic", "x.jpg/e.gif", "z/1.AvIf", "z/y/2.tiff"),
    ]


def test_hidden_names_and_controls_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, ".a.jpg", ".git/b.jpg", "_controls/c.jpg", "d.jpg", ".gen-captions/e.jpg")
    assert bare_images(tmp_path) == ["d.jpg"]


def test_a_jfif_is_captioned_and_what_is_not_is_counted_and_named_in_one_line(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    jfif = make_image("a.jpg").rename(tool.folder / "images" / "a.jfif")
    shutil.copy(jfif, jfif.with_name("a-masklabel.png"))
    touch(jfif.parent, "b.mp4", "sub/c.MOV", "d.psd", "notes.md")
    err = tool("images", "--report", "report.jsonl").stderr
    (line,) = [line for line in err.splitlines() if "skipped" in line]
    assert "1 captioned" in line
    assert "4 skipped (2 video, 1 mask, 1 other format)" in line
    assert list(captions(tool.folder)) == ["images/a.txt"]
    assert server.stats()["requests"] == 1
    report = (tool.folder / "report.jsonl").read_text(encoding="utf-8").splitlines()
    skipped = [entry for entry in map(json.loads, report) if entry["outcome"] == "skipped"]
    assert {entry["path"]: entry["reason"] for entry in skipped} == {
        "images/a-masklabel.png": "mask",
        "images/b.mp4": "video",
        "images/d.psd": "other format",
        "images/sub/c.MOV": "video",
    }


@pytest.mark.parametrize("flags", [[], ["-n"], ["--overwrite"]])
def test_a_folder_without_images_is_an_error_that_says_where_it_looked(
    tool: Tool, flags: list[str]
) -> None:
    touch(tool.folder, "images/film.mp4", "images/a-masklabel.png", "images/notes.txt")
    err = tool("images", *flags, code=2).stderr
    assert "--image-dir: images: no images there or below; looked for jpg, jpeg, jfif, png" in err
    assert not (tool.folder / "images" / ".gen-captions").exists()


# -------------------------------------------------------------------------- where the caption goes


def test_captions_mirror_the_sub_folders_else_lie_beside_the_images(tmp_path: Path) -> None:
    image = str(touch(tmp_path, "x/y/a.b.jpg") / "x/y/a.b.jpg")
    away, beside = tmp_path / "out/x/y/a.b.caption", tmp_path / "x/y/a.b.txt"
    assert walk(tmp_path, tmp_path / "out", "caption") == [gc.Job(image, str(away))]
    assert walk(tmp_path) == [gc.Job(image, str(beside))]


def test_an_image_with_a_caption_is_left_alone_and_a_blank_one_counts_as_missing(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        make_image(name)
    images = tool.folder / "images"
    (images / "a.txt").write_text("mine", encoding="utf-8")
    (images / "b.txt").write_bytes(b"\xef\xbb\xbf \n")
    assert "2 captioned, 1 skipped (has a caption)" in tool("images").stderr
    assert (images / "a.txt").read_text(encoding="utf-8") == "mine"
    assert server.stats()["requests"] == 2
    assert "Nothing to do: all 3 images have captions." in tool("images").stderr
    assert server.stats()["requests"] == 2


@pytest.mark.parametrize(
    ("image", "caption"),
    [("a.jpg", "a.TXT"), ("Photo.jpg", "photo.txt"), ("cafe\u0301.jpg", "caf\u00e9.txt")],
)
def test_what_the_file_system_opens_is_the_caption_however_its_folder_lists_it(
    tool: Tool, make_image: ImageMaker, server: Server, image: str, caption: str
) -> None:
    """Where a.txt opens a.TXT (macOS, Windows) nothing is asked; elsewhere it is asked once."""
    source = make_image(image)
    (source.parent / caption).write_text("mine", encoding="utf-8")
    opens = source.with_suffix(".txt").exists()
    (pair,) = walk(source.parent)
    assert isinstance(pair, gc.Job)
    assert gc.has_caption(pair.caption) == opens
    tool("images")
    tool("images")
    assert server.stats()["requests"] == (0 if opens else 1)
    assert (source.parent / caption).read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("names", "clashing"),
    [
        (["a.jpg", "a.png"], {"a.jpg", "a.png"}),
        (["a.jpg", "a.png", "a.webp", "b.jpg"], {"a.jpg", "a.png", "a.webp"}),
        (["Ärger.jpg", "ärger.png"], {"Ärger.jpg", "ärger.png"}),
        (["caf\u00e9.jpg", "cafe\u0301.png"], {"caf\u00e9.jpg", "cafe\u0301.png"}),
        (["a.jpg", "b.jpg", "a.b.jpg", "a.b.c.jpg"], set()),
    ],
)
def test_images_that_would_share_a_caption_are_found(
    tmp_path: Path, names: list[str], clashing: set[str]
) -> None:
    found = [item for item in walk(touch(tmp_path, *names)) if isinstance(item, gc.Outcome)]
    assert {os.path.basename(item.path) for item in found} == clashing
    assert {item.reason for item in found} <= {"shared caption file"}


def test_images_of_one_stem_are_both_named_and_the_rest_goes_on(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    for name in ("a.jpg", "a.png", "b.jpg", "sub/a.jpg"):
        make_image(name)
    err = tool("images", code=1).stderr
    for name in ("a.jpg", "a.png"):
        said = "another image would use images/a.txt too; rename one of them"
        assert f"images/{name}: shared caption file: {said}" in err
    assert sorted(captions(tool.folder)) == ["images/b.txt", "images/sub/a.txt"]
    assert server.stats()["requests"] == 2


# ------------------------------------------------------------------------------- what is in the way


@POSIX
def test_links_that_form_a_loop_end_and_each_image_is_found_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.jpg")
    (tmp_path / "aa").symlink_to(tmp_path)
    (tmp_path / "real" / "up").symlink_to(tmp_path)
    (tmp_path / "ab").symlink_to(tmp_path / "real")
    assert bare_images(tmp_path) == ["real/a.jpg"]


@POSIX
def test_links_to_other_folders_and_to_images_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.jpg", "images/b.jpg")
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "c.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    assert bare_images(tmp_path / "images") == ["b.jpg", "c.jpg", "link/a.jpg"]


@POSIX
def test_what_looks_like_an_image_or_a_caption_and_is_none_is_a_named_failure(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    images = make_image("good.jpg").parent
    touch(images, "b.jpg", "c.jpg")
    (images / "gone.jpg").symlink_to("nowhere.jpg")
    (images / "self.jpg").symlink_to("self.jpg")
    (images / "self").symlink_to("self")
    os.mkfifo(images / "pipe.png")
    (images / "b.txt").symlink_to("b.txt")
    (images / "c.txt").mkdir()
    err = tool("images", code=1).stderr
    for name in ("gone.jpg", "self.jpg", "pipe.png"):
        assert f"images/{name}: unreadable file: " in err
    for name in ("b", "c"):
        assert f"images/{name}.jpg: unreadable caption: images/{name}.txt: " in err
    assert [path.name for path in images.glob("*.txt") if path.is_file()] == ["good.txt"]
    assert server.stats()["requests"] == 1


@POSIX
def test_a_name_that_no_file_system_takes_fails_before_it_is_paid_for(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    make_image("n" * 250 + ".jpg")
    assert "File name too long" in tool("images", "--caption-ext", "caption", code=1).stderr
    assert server.stats()["requests"] == 0


NAMES = ["a b.jpg", "line\nbreak.jpg", "🐈‍⬛.jpg", "n" * 250 + ".jpg", "-dash.jpg", "'\"$;.jpg"]


@POSIX
def test_names_of_every_kind_are_captioned_and_print_safely(
    tool: Tool, make_image: ImageMaker
) -> None:
    for name in NAMES:
        make_image(name)
    source = make_image("plain.jpg")
    os.link(source, source.parent / os.fsdecode(b"byte\xff\xfe.jpg"))
    shown = tool("-n", "-v", "images").stdout
    assert sum(" -> " in line for line in shown.splitlines()) == len(NAMES) + 2
    assert "line\\nbreak.jpg" in shown
    tool("-v", "images", "--caption-dir", "out", "--report", "report.jsonl")
    assert len(list((tool.folder / "out").glob("*.txt"))) == len(NAMES) + 2
    assert os.path.exists(tool.folder / "out" / os.fsdecode(b"byte\xff\xfe.txt"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image-dir", "nowhere"], "--image-dir: nowhere: there is no such folder"),
        (["--image-dir", "file"], "--image-dir: file: is no folder"),
        (["images", "--caption-dir", "file"], "--caption-dir: file: is no folder"),
        (["images", "--config-dir", "nowhere"], "--config-dir: nowhere: there is no such folder"),
        (["images", "-n", "--config-dir", "nowhere"], "--config-dir: nowhere: there is no such"),
        (["images", "--overwrite", "--config-dir", "nowhere"], "--config-dir: nowhere: "),
        (["images", "--review", "--config-dir", "nowhere"], "--config-dir: nowhere: "),
        (["--fix-encoding", "--config-dir", "nowhere"], "nowhere: there is no such folder"),
        (["--undo", "--config-dir", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_an_error_that_names_it_and_nothing_is_asked(
    tool: Tool, make_image: ImageMaker, server: Server, arguments: list[str], said: str
) -> None:
    make_image("a.jpg")
    touch(tool.folder, "file")
    assert said in tool(*arguments, code=2).stderr
    assert server.stats()["requests"] == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read all")
def test_an_unreadable_sub_folder_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    touch(tmp_path, "shut/a.jpg", "b.jpg")
    (tmp_path / "shut").chmod(0)
    try:
        pair, failed = walk(tmp_path)
    finally:
        (tmp_path / "shut").chmod(0o700)
    assert isinstance(pair, gc.Job)
    assert isinstance(failed, gc.Outcome)
    assert (failed.reason, failed.path) == ("unreadable folder", str(tmp_path / "shut"))


# ---------------------------------------------------------------------------------- -n and --limit


def test_dry_run_says_what_a_run_would_do_and_touches_nothing(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "d.png", "e.jpg"):
        make_image(name)
    images = tool.folder / "images"
    (images / "b.txt").write_text("mine", encoding="utf-8")
    (images / "c.txt").touch()
    (images / "e.jpg").write_bytes(b"")
    before = sorted(os.walk(tool.folder))
    done = tool("-n", "images", "--limit", "3", code=1, OPENAI_API_KEY="")
    assert sorted(os.walk(tool.folder)) == before
    assert server.stats()["requests"] == 0
    assert [line for line in done.stdout.splitlines() if "->" in line] == [
        "images/a.jpg -> images/a.txt",
        "images/c.jpg -> images/c.txt",
    ]
    counted = "2 planned (to caption), 3 failed (2 shared caption file, 1 not an image)"
    assert counted in done.stderr
    failed = "3 failed (2 shared caption file, 1 not an image), 1 skipped (has a caption)"
    assert f"2 captioned, {failed}" in tool("images", code=1).stderr


def test_dry_run_shows_three_examples_and_verbose_shows_all(
    tool: Tool, make_image: ImageMaker
) -> None:
    for number in range(5):
        make_image(f"{number}.jpg")
    short, long = tool("-n", "images").stdout, tool("-n", "-v", "images").stdout
    assert (short.count(" -> "), long.count(" -> ")) == (3, 5)
    assert "and 2 more; -v lists all" in short


def test_limit_captions_that_many_and_the_next_run_goes_on(
    tool: Tool, make_image: ImageMaker
) -> None:
    for number in range(5):
        make_image(f"{number}.jpg")
    assert "2 captioned, 3 skipped (over --limit)" in tool("images", "--limit", "2").stderr
    assert sorted(captions(tool.folder)) == ["images/0.txt", "images/1.txt"]
    tool("images")
    assert len(captions(tool.folder)) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="head")
def test_a_reader_that_goes_away_is_no_error(tool: Tool, make_image: ImageMaker) -> None:
    for number in range(200):
        make_image(f"{number:0200}.jpg", size=(1, 1))
    process = tool.start("-n", "-v", "images")
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert "Traceback" not in errors
