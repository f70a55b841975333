"""Journal: what was paid for is known, what was edited is left alone, what was replaced can be put back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and locks that Windows does not have")


def journal(folder: Path) -> list[dict[str, Any]]:
    text = (folder / ".gen-captions" / "journal.jsonl").read_text(encoding="ascii")
    return [json.loads(line) for line in text.splitlines()]


def answers(server: Server, *texts: str) -> None:
    """Let the server give these answers, then an error that no test expects."""
    server.script(steps=[{"content": text} for text in texts], then={"status": 400, "body": "not expected"})


def requests(server: Server) -> int:
    return int(server.stats()["requests"])


@pytest.fixture
def three(tool: Tool, server: Server, make_image: ImageMaker) -> Path:
    """Three images, captioned with the first prompt; returns their folder."""
    for name in ("a", "b", "c"):
        make_image(f"{name}.jpg")
    answers(server, "First a.", "First b.", "First c.")
    tool("--image-dir", "images", "--thread-pool", "1", "--prompt", "first")
    return tool.folder / "images"


AGAIN = ("--image-dir", "images", "--thread-pool", "1", "--overwrite", "--prompt")


# ----------------------------------------------------------------------------------------------- the journal


def test_the_journal_has_a_line_for_each_answer(three: Path) -> None:
    first = journal(three)[0]
    status = (three / "a.jpg").stat()
    assert {
        key: first[key] for key in ("caption", "outcome", "model", "attempts", "prompt_tokens", "answer_tokens")
    } == {
        "caption": "a.txt",
        "outcome": "captioned",
        "model": "gpt-6-luna",
        "attempts": 1,
        "prompt_tokens": 1200,
        "answer_tokens": 20,
    }
    assert first["image_sha256"] == gc.hash_file(str(three / "a.jpg"))
    assert first["caption_sha256"] == gc.hash_file(str(three / "a.txt"))
    assert (first["image_size"], first["image_mtime_ns"]) == (status.st_size, status.st_mtime_ns)
    assert len(journal(three)) == 3


@pytest.mark.parametrize("torn", [b'{"caption": "a.txt", "outc', b"\0" * 40, b"[]\n", b'{"caption": 7}\n', b"\n\n"])
def test_a_torn_line_costs_nothing_but_itself(tool: Tool, server: Server, three: Path, torn: bytes) -> None:
    with (three / ".gen-captions" / "journal.jsonl").open("ab") as file:
        file.write(torn)
    (three / "c.txt").unlink()
    answers(server, "Second c.")
    tool("--image-dir", "images", "--prompt", "first")
    assert "up to date 3" in tool(*AGAIN, "first").stderr
    assert requests(server) == 1


def test_the_entry_is_on_the_disk_before_the_caption(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    """A crash between the two then never makes our caption look like another's; here another stands in its place."""
    make_image("a.jpg")
    server.script(latency=0.5)
    process = tool.start("--image-dir", "images")
    while not requests(server):
        time.sleep(0.01)
    (tool.folder / "images" / "a.txt").write_text("mine\n", encoding="utf-8")
    process.communicate(timeout=30)
    assert [entry["outcome"] for entry in journal(tool.folder / "images")] == ["captioned"]


def test_a_line_torn_by_a_full_disk_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    journal = gc.Journal(tmp_path)
    journal.open()
    journal.append(str(tmp_path / "a.txt"), gc.Entry("captioned"))
    os.write(journal._handle, b'{"caption": "b.tx')
    journal._torn = True  # as it is after a write that failed half-way
    journal.append(str(tmp_path / "c.txt"), gc.Entry("captioned"))
    journal.close()
    assert list(gc.Journal(tmp_path).history) == ["a.txt", "c.txt"]


@POSIX
def test_a_second_run_on_the_same_folder_waits_for_the_end_of_the_first(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(4):
        make_image(f"{number}.jpg")
    server.script(latency=0.5)
    first = tool.start("--image-dir", "images", "--thread-pool", "1")
    while not requests(server):
        time.sleep(0.01)
    said = tool("--image-dir", "images", code=3).stderr
    assert "another run is at work there; wait for its end" in said
    assert first.wait(timeout=30) == 0
    first.communicate()
    assert requests(server) == 4


# -------------------------------------------------------------------------------------------------- renewing


def test_overwrite_renews_what_another_prompt_made(tool: Tool, server: Server, three: Path) -> None:
    answers(server, "Second a.", "Second b.", "Second c.")
    tool(*AGAIN, "second")
    assert list(captions(three).values()) == ["Second a.\n", "Second b.\n", "Second c.\n"]


@pytest.mark.parametrize(
    "change",
    [["--model", "other"], ["--style", "short"], ["--max-words", "50"]],
)
def test_overwrite_renews_what_another_recipe_made(tool: Tool, server: Server, three: Path, change: list[str]) -> None:
    answers(server, "Second a.", "Second b.", "Second c.")
    tool(*AGAIN, "first", *change)
    assert list(captions(three).values()) == ["Second a.\n", "Second b.\n", "Second c.\n"]


def test_what_is_up_to_date_is_neither_asked_nor_touched(tool: Tool, server: Server, three: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in three.glob("*.txt")}
    answers(server)
    err = tool(*AGAIN, "first", "--max-side", "512", "--thread-pool", "3").stderr
    assert "skipped 3 (up to date 3)" in err
    assert requests(server) == 0
    assert {path: path.stat().st_mtime_ns for path in three.glob("*.txt")} == before


@pytest.mark.usefixtures("three")
def test_without_overwrite_nothing_is_renewed(tool: Tool, server: Server) -> None:
    answers(server)
    assert "has a caption 3" in tool("--image-dir", "images", "--prompt", "second").stderr
    assert requests(server) == 0


def test_overwrite_renews_the_caption_of_an_image_that_has_changed_and_of_no_other(
    tool: Tool, server: Server, three: Path, make_image: ImageMaker
) -> None:
    make_image("a.jpg", colour="blue")
    os.utime(three / "b.jpg", (1, 1))  # another time, the same bytes
    answers(server, "Second a.")
    assert "Captioned 1, skipped 2 (up to date 2)" in tool(*AGAIN, "first").stderr
    assert (three / "a.txt").read_text(encoding="utf-8") == "Second a.\n"


@pytest.mark.parametrize("edited", [b"mine\n", b"First a.", b"First a.\r\n"])
def test_what_a_person_edited_or_another_tool_made_is_never_replaced(
    tool: Tool, server: Server, three: Path, make_image: ImageMaker, edited: bytes
) -> None:
    (three / "a.txt").write_bytes(edited)
    make_image("d.jpg")
    (three / "d.txt").write_bytes(b"another tool's")
    answers(server, "Second b.", "Second c.")
    err = tool(*AGAIN, "second").stderr
    assert (three / "a.txt").read_bytes() == edited
    assert (three / "d.txt").read_bytes() == b"another tool's"
    assert "edited by hand 1, made elsewhere 1" in err
    assert "delete a caption's file to have it made anew" in err


def test_a_caption_edited_while_its_answer_is_on_the_way_is_left_alone(tool: Tool, server: Server, three: Path) -> None:
    server.script(latency=0.5, then={"content": "Second."})
    process = tool.start(*AGAIN, "second")
    while not requests(server):
        time.sleep(0.01)
    (three / "a.txt").write_bytes(b"mine")
    err = process.communicate(timeout=30)[1]
    assert (three / "a.txt").read_bytes() == b"mine"
    assert "edited by now 1" in err


def test_another_trigger_costs_nothing(tool: Tool, server: Server, three: Path) -> None:
    answers(server)
    assert "images/a.jpg: renew its trigger" in tool("-n", *AGAIN, "first", "--trigger", "ohwx").stdout
    tool(*AGAIN, "first", "--trigger", "ohwx")
    assert (three / "a.txt").read_text(encoding="utf-8") == "ohwx, First a.\n"
    tool(*AGAIN, "first", "--trigger", "sks")
    assert (three / "a.txt").read_text(encoding="utf-8") == "sks, First a.\n"
    tool(*AGAIN, "first")
    assert (three / "a.txt").read_text(encoding="utf-8") == "First a.\n"
    assert requests(server) == 0


def test_a_caption_whose_new_answer_is_refused_stays(tool: Tool, server: Server, three: Path) -> None:
    server.script(then={"content": "I'm sorry, I can't help with that."})
    tool(*AGAIN, "second", code=1)
    assert list(captions(three).values()) == ["First a.\n", "First b.\n", "First c.\n"]


@POSIX
def test_an_interrupted_overwrite_goes_on_where_it_was(tool: Tool, server: Server, three: Path) -> None:
    server.script(latency=0.3, then={"content": "Second."})
    process = tool.start(*AGAIN, "second")
    while "Second.\n" not in captions(three).values():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    renewed = list(captions(three).values()).count("Second.\n")
    server.script(then={"content": "Second."})
    tool(*AGAIN, "second")
    assert set(captions(three).values()) == {"Second.\n"}
    assert requests(server) == 3 - renewed


# -------------------------------------------------------------------------------------------------- refusals


def test_a_refusal_is_not_asked_again_until_model_or_prompt_changes(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    server.script(then={"content": "I'm sorry, I can't help with that."})
    tool("--image-dir", "images", code=1)
    for _ in range(2):
        err = tool("--image-dir", "images", "--trigger", "ohwx", code=1).stderr
        assert "failed 1 (refused before 1)" in err
    assert "refused before" in tool("-n", "--image-dir", "images", code=1).stdout
    assert requests(server) == 1
    tool("--image-dir", "images", "--model", "another", code=1)
    tool("--image-dir", "images", "--prompt", "another", code=1)
    assert requests(server) == 3


def test_a_refused_image_that_changed_is_asked_again(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    server.script(then={"content": "I'm sorry, I can't help with that."})
    tool("--image-dir", "images", code=1)
    make_image("a.jpg", colour="blue")
    tool("--image-dir", "images", code=1)
    assert requests(server) == 2


# ----------------------------------------------------------------------------------------------------- twins


def test_images_with_the_same_bytes_are_asked_once_and_share_the_answer(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    source = make_image("a.jpg")
    for name in ("b.jpg", "c.jpg", "sub/d.jpg"):
        (source.parent / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, source.parent / name)
    answers(server, "A cat.")
    err = tool("--image-dir", "images", "--caption-dir", "out", "--trigger", "ohwx").stderr
    assert set(captions(tool.folder / "out").values()) == {"ohwx, a cat.\n"}
    assert len(captions(tool.folder / "out")) == 4
    assert "to look at" not in err
    shutil.copy(source, source.parent / "later.jpg")
    tool("--image-dir", "images", "--caption-dir", "out", "--trigger", "ohwx")
    assert (tool.folder / "out" / "later.txt").read_text(encoding="utf-8") == "ohwx, a cat.\n"
    assert requests(server) == 1


def test_twins_of_a_refused_image_are_not_asked(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    source = make_image("a.jpg")
    shutil.copy(source, source.parent / "b.jpg")
    answers(server, "I'm sorry, I can't help with that.")
    assert "failed 2 (refused 2)" in tool("--image-dir", "images", code=1).stderr
    assert requests(server) == 1


def test_twins_with_prompts_of_their_own_are_both_asked(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    source = make_image("a.jpg")
    shutil.copy(source, source.parent / "b.jpg")
    answers(server, "A cat.", "A dog.")
    tool("--image-dir", "images", "--prompt", "This is {name}.", "--thread-pool", "1")
    assert list(captions(tool.folder).values()) == ["A cat.\n", "A dog.\n"]


def test_a_twin_whose_caption_was_edited_is_no_help(tool: Tool, server: Server, three: Path) -> None:
    shutil.copy(three / "a.jpg", three / "z.jpg")
    (three / "a.txt").write_text("mine", encoding="utf-8")
    answers(server, "Second z.")
    tool("--image-dir", "images", "--prompt", "first")
    assert (three / "z.txt").read_text(encoding="utf-8") == "Second z.\n"


def test_the_same_answer_for_two_different_images_names_both(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    make_image("b.jpg")
    server.script(then={"content": "A cat."})
    done = tool("--image-dir", "images", "--thread-pool", "1", "--report", "-")
    assert "images/b.jpg: same answer: word for word that of images/a.txt" in done.stderr.replace("\\", "/")
    assert json.loads(done.stdout.splitlines()[1])["notes"][0].startswith("same answer: word for word that of ")
    assert requests(server) == 2


# ------------------------------------------------------------------------------------------------------ undo


def undo(tool: Tool, *arguments: str, code: int = 0) -> str:
    return tool("--undo", "--caption-dir", "images", *arguments, code=code).stdout.replace("\\", "/")


def snapshot(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) for path in folder.glob("*.txt")
    }


def test_undo_puts_back_bytes_times_and_permissions(tool: Tool, server: Server, three: Path) -> None:
    os.utime(three / "a.txt", ns=(10**18, 10**18 + 7))
    (three / "b.txt").chmod(0o600)
    before = snapshot(three)
    answers(server, "Second a.", "Second b.", "Second c.")
    tool(*AGAIN, "second")
    assert "images/a.txt: would be put back" in undo(tool, "-n")
    assert (three / "a.txt").read_bytes() == b"Second a.\n"
    assert "Put back 3 of 3" in undo(tool)
    assert snapshot(three) == before
    assert "there is nothing to put back" in undo(tool)


def test_what_undo_replaces_is_kept_too(tool: Tool, server: Server, three: Path) -> None:
    answers(server, "Second a.", "Second b.", "Second c.")
    tool(*AGAIN, "second")
    undo(tool)
    (kept,) = (three / ".gen-captions").glob("undone-*.zip")
    with zipfile.ZipFile(kept) as archive:
        assert archive.read("a.txt") == b"Second a.\n"
    answers(server, "Third a.", "Third b.", "Third c.")  # what was put back is still known to be ours
    tool(*AGAIN, "third")
    assert (three / "a.txt").read_bytes() == b"Third a.\n"


def test_undo_leaves_what_was_edited_since_and_brings_back_what_was_deleted(
    tool: Tool, server: Server, three: Path
) -> None:
    answers(server, "Second a.", "Second b.", "Second c.")
    tool(*AGAIN, "second")
    (three / "a.txt").write_bytes(b"mine")
    (three / "b.txt").unlink()
    said = undo(tool)
    assert "images/a.txt: edited since, left alone" in said
    assert [(three / name).read_bytes() for name in ("a.txt", "b.txt", "c.txt")] == [
        b"mine",
        b"First b.\n",
        b"First c.\n",
    ]


def test_each_undo_goes_one_run_further_back(tool: Tool, server: Server, three: Path) -> None:
    for word in ("Second", "Third"):
        answers(server, *(f"{word} {name}." for name in "abc"))
        tool(*AGAIN, word)
    undo(tool)
    assert (three / "a.txt").read_bytes() == b"Second a.\n"
    undo(tool)
    assert (three / "a.txt").read_bytes() == b"First a.\n"


@pytest.mark.parametrize("damage", [b"", b"no zip", b"PK\x03\x04"])
def test_a_zip_that_cannot_be_read_is_one_clear_error(tool: Tool, server: Server, three: Path, damage: bytes) -> None:
    answers(server, "Second a.", "Second b.", "Second c.")
    tool(*AGAIN, "second")
    (kept,) = (three / ".gen-captions").glob("replaced-*.zip")
    kept.write_bytes(damage)
    done = tool("--undo", "--caption-dir", "images", code=1)
    assert f"{kept.name}: not all was put back" in done.stderr
    assert "Traceback" not in done.stderr


def test_undo_without_a_folder_says_which_to_name(tool: Tool) -> None:
    assert "--undo: name the folder with --caption-dir" in tool("--undo", code=2).stderr


def test_undo_needs_no_key_and_imports_nothing_heavy(tool: Tool, three: Path) -> None:
    process = tool("--undo", "--caption-dir", three, OPENAI_API_KEY="", PYTHONPROFILEIMPORTTIME="1")
    assert "openai" not in process.stderr


@POSIX
def test_a_set_goes_through_caption_edit_new_prompt_kill_overwrite_and_undo_with_every_byte_in_its_place(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    names = [f"{number:02}" for number in range(20)]
    for name in names:
        make_image(f"{name}.jpg")
    folder = tool.folder / "images"
    answers(server, *(f"First {name}." for name in names))
    tool("--image-dir", "images", "--thread-pool", "1", "--prompt", "first")
    (folder / "03.txt").write_bytes(b"by \x92hand\x92")
    (folder / "17.txt").unlink()
    (folder / "17.txt").write_bytes(b"another tool's\r\n")
    first = snapshot(folder)

    server.script(latency=0.1, then={"content": "Second."})
    process = tool.start("--image-dir", "images", "--thread-pool", "2", "--overwrite", "--prompt", "second")
    while list(captions_but_hand(folder).values()).count(b"Second.\n") < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = snapshot(folder)
    assert {data for data, _, _ in killed.values()} <= {b"Second.\n", *(data for data, _, _ in first.values())}
    renewed = [name for name in killed if killed[name][0] == b"Second.\n"]

    server.script(then={"content": "Second."})
    tool("--image-dir", "images", "--overwrite", "--prompt", "second")
    assert requests(server) == 18 - len(renewed)
    done = snapshot(folder)
    assert {data for data, _, _ in done.values()} == {b"Second.\n", b"by \x92hand\x92", b"another tool's\r\n"}
    assert done["03.txt"] == first["03.txt"]
    assert done["17.txt"] == first["17.txt"]

    undo(tool)
    assert snapshot(folder) == killed
    undo(tool)
    assert snapshot(folder) == first
    assert [path.name for path in folder.iterdir() if path.suffix not in {".txt", ".jpg"}] == [".gen-captions"]


def captions_but_hand(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.txt")}


# -------------------------------------------------------------------------------------------------- metadata


def test_metadata_jsonl_has_every_caption_with_paths_from_its_own_folder(tool: Tool, make_image: ImageMaker) -> None:
    for name in ("a.jpg", "sub/b.jpg", "bad.jpg"):
        make_image(name)
    (tool.folder / "images" / "bad.jpg").write_bytes(b"x")
    (tool.folder / "images" / "a.txt").write_text("\ufeff Ein Café\r\n", encoding="utf-8")
    tool("--image-dir", "images", "--metadata", "images/metadata.jsonl", code=1)
    lines = [json.loads(line) for line in (tool.folder / "images" / "metadata.jsonl").read_text("ascii").splitlines()]
    assert [line["file_name"] for line in lines] == ["a.jpg", "sub/b.jpg"]
    assert lines[0]["text"] == "Ein Café"
    tool("--image-dir", "images", "--metadata", "images/metadata.jsonl", code=1)  # replaces its own


def test_metadata_json_is_what_ai_toolkit_reads(tool: Tool, make_image: ImageMaker) -> None:
    path = make_image("é.jpg")
    (tool.folder / "config").mkdir()
    job = {"job": "x", "config": {"process": [{"trigger_word": "ohwx", "datasets": [{"dataset_path": "all.json"}]}]}}
    (tool.folder / "config" / "job.json").write_text(json.dumps(job), encoding="utf-8")
    tool("--image-dir", "images", "--caption-dir", "out", "--metadata", "all.json", "--config-dir", "config")
    found = json.loads((tool.folder / "all.json").read_text("ascii"))
    assert list(found) == [str(path)]
    assert found[str(path)]["caption"].startswith("[trigger] ")


@pytest.mark.parametrize("name", ["all.json", "all.jsonl"])
def test_metadata_of_a_set_without_captions_is_empty_and_whole(tool: Tool, name: str) -> None:
    (tool.folder / "images").mkdir()
    tool("--image-dir", "images", "--metadata", name)
    assert (tool.folder / name).read_bytes() == (b"{}\n" if name == "all.json" else b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"file_name": "a.jpg", "text": "x", "mine": 1}\n'),
        ("a.jsonl", "mine\n"),
        ("a.json", '{"a.jpg": {"caption": "x", "caption_short": "y"}}'),
        ("a.json", '{"job": "extension"}'),
        ("a.json", "[1]"),
        ("a.jsonl", '{"file_name": "a.jpg", "text": "by hand"}\n'),
        ("a.json", '{"/a.jpg": {"caption": "by hand"}}'),
    ],
)
def test_metadata_replaces_nothing_that_the_tool_did_not_write(
    tool: Tool, server: Server, make_image: ImageMaker, name: str, content: str
) -> None:
    make_image("a.jpg")
    (tool.folder / name).write_text(content, encoding="utf-8")
    err = tool("--image-dir", "images", "--metadata", name, code=2).stderr
    assert f"--metadata: {name}: is there already, and not as this tool wrote it" in err
    assert (tool.folder / name).read_text(encoding="utf-8") == content
    assert requests(server) == 0


@pytest.mark.parametrize("name", ["no/where.json", "images.json"])
def test_metadata_that_cannot_be_written_is_an_error_before_anything_is_asked(
    tool: Tool, server: Server, make_image: ImageMaker, name: str
) -> None:
    make_image("a.jpg")
    (tool.folder / "images.json").mkdir()
    assert f"--metadata: {name}: cannot be written" in tool("--image-dir", "images", "--metadata", name, code=2).stderr
    assert requests(server) == 0


def test_a_caption_that_is_no_utf8_is_left_out_of_the_metadata_and_named(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    (tool.folder / "images" / "a.txt").write_bytes(b"it\x92s")
    assert "images/a.jpg: unreadable caption: images/a.txt is no UTF-8" in (
        tool("--image-dir", "images", "--metadata", "all.json", code=1).stderr.replace("\\", "/")
    )


@POSIX
def test_metadata_is_complete_after_a_run_that_was_interrupted(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(10):
        make_image(f"{number}.jpg")
    server.script(latency=0.3)
    process = tool.start("--image-dir", "images", "--thread-pool", "2", "--metadata", "all.jsonl")
    while not captions(tool.folder):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    lines = (tool.folder / "all.jsonl").read_text("ascii").splitlines()
    assert len(lines) == len(captions(tool.folder)) > 0


def test_metadata_that_was_edited_since_is_left_alone(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    tool("--image-dir", "images", "--metadata", "all.jsonl")
    tool("--image-dir", "images", "--metadata", "all.jsonl")
    with (tool.folder / "all.jsonl").open("a", encoding="utf-8") as file:
        file.write("{}\n")
    assert "not as this tool wrote it" in tool("--image-dir", "images", "--metadata", "all.jsonl", code=2).stderr


def test_metadata_and_report_are_two_files(tool: Tool) -> None:
    (tool.folder / "images").mkdir()
    arguments = ("--metadata", "a.jsonl", "--report", "./a.jsonl")
    assert "a file of its own" in tool("--image-dir", "images", *arguments, code=2).stderr


# ------------------------------------------------------------------------------------- what an attack showed


def test_each_twin_of_a_refused_image_is_remembered(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    source = make_image("a.jpg")
    for name in ("b.jpg", "c.jpg"):
        shutil.copy(source, source.parent / name)
    answers(server, "I'm sorry, I can't help with that.")
    tool("--image-dir", "images", code=1)
    assert "failed 3 (refused before 3)" in tool("--image-dir", "images", code=1).stderr
    assert requests(server) == 1


def test_a_caption_by_hand_settles_a_refusal(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    path = make_image("a.jpg").with_suffix(".txt")
    answers(server, "I'm sorry, I can't help with that.")
    tool("--image-dir", "images", code=1)
    path.write_text("mine\n", encoding="utf-8")
    assert "made elsewhere 1" in tool("--image-dir", "images", "--overwrite").stderr


def test_a_caption_deleted_while_it_is_renewed_is_made_anew(tool: Tool, server: Server, three: Path) -> None:
    server.script(latency=0.5, then={"content": "Second."})
    process = tool.start(*AGAIN, "second")
    while not requests(server):
        time.sleep(0.01)
    (three / "a.txt").unlink()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert (three / "a.txt").read_bytes() == b"Second.\n"


def test_twins_of_earlier_runs_are_no_help_where_each_image_has_its_own_prompt(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    source = make_image("dogs/a.jpg")
    answers(server, "A dog.", "A cat.")
    tool("--image-dir", "images", "--prompt", "These are {folder}.")
    (source.parent.parent / "cats").mkdir()
    shutil.copy(source, source.parent.parent / "cats" / "a.jpg")
    tool("--image-dir", "images", "--prompt", "These are {folder}.")
    assert (source.parent.parent / "cats" / "a.txt").read_bytes() == b"A cat.\n"


@pytest.mark.parametrize("word", ["man", "Art", "photo"])
def test_the_built_in_prompt_names_no_trigger(tool: Tool, server: Server, make_image: ImageMaker, word: str) -> None:
    make_image("a.jpg")
    answers(server, f"Two women and a {word} on a wall.")
    tool("--image-dir", "images", "--trigger", word)
    assert captions(tool.folder)["images/a.txt"] == f"{word}, two women and a {word} on a wall.\n"


def test_a_zip_that_points_out_of_the_folder_writes_nothing_there(tool: Tool) -> None:
    folder = tool.folder / "images" / ".gen-captions"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "replaced-9.zip", "w") as archive:
        archive.writestr("x", b"evil")
        archive.writestr(gc.INDEX, json.dumps([["../evil.txt", 0, 0o644, 0, 0]]))
    assert "lies outside of the folder, left alone" in undo(tool)
    assert not (tool.folder / "evil.txt").exists()


@pytest.mark.parametrize("index", ["5", "[1]", "[[5,0,420]]", '[["a.txt","x",420]]', None])
def test_a_zip_without_sense_is_one_clear_error(tool: Tool, index: str | None) -> None:
    folder = tool.folder / "images" / ".gen-captions"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "replaced-9.zip", "w") as archive:
        archive.writestr("a.txt", b"x")
        if index is not None:
            archive.writestr(gc.INDEX, index)
    done = tool("--undo", "--caption-dir", "images", code=1)
    assert "not all was put back" in done.stderr
    assert "Traceback" not in done.stderr


@POSIX
def test_a_journal_that_is_a_pipe_or_nested_without_end_is_no_trouble(tool: Tool) -> None:
    folder = tool.folder / "images" / ".gen-captions"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "journal.jsonl")
    assert gc.Journal(tool.folder / "images").history == {}
    assert gc.parse_entry(b"[" * 200_000) is None


@pytest.mark.usefixtures("three")
def test_an_overwrite_that_replaced_nothing_leaves_nothing_to_undo(tool: Tool, server: Server) -> None:
    server.script(key="another")
    tool(*AGAIN, "second", code=3)
    assert "there is nothing to put back" in undo(tool)
