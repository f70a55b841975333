"""Journal and undo: what was paid for is known, what a person wrote stays, all comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from test_run import POSIX, end_of

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions, snapshot, wait_for

REFUSAL = "I'm sorry, I can't help with that."


def journal(folder: Path) -> list[dict[str, Any]]:
    text = (folder / ".gen-captions" / "journal.jsonl").read_text(encoding="ascii")
    return [json.loads(line) for line in text.splitlines() if line]


def answers(server: Server, *texts: str) -> None:
    """Let the server give these answers, then an error that no test expects."""
    error = {"status": 400, "body": "not expected"}
    server.script(steps=[{"content": text} for text in texts], then=error)


def requests(server: Server) -> int:
    return int(server.stats()["requests"])


def texts(folder: Path) -> list[str]:
    return [text.rstrip("\n") for text in captions(folder).values()]


@pytest.fixture
def three(tool: Tool, server: Server, make_image: ImageMaker) -> Path:
    """Three images, captioned with the first prompt; returns their folder."""
    for name in ("a", "b", "c"):
        make_image(f"{name}.jpg")
    answers(server, "First a.", "First b.", "First c.")
    tool("images", "--thread-pool", "1", "--prompt", "first")
    return tool.folder / "images"


AGAIN = ("images", "--thread-pool", "1", "--overwrite", "--prompt")


# ------------------------------------------------------------------------------- the journal


def test_the_journal_has_a_line_for_each_answer(three: Path) -> None:
    first = journal(three)[0]
    expected = {
        "file": "a.txt",
        "image": os.path.join("images", "a.jpg"),
        "outcome": "captioned",
        "model": "gpt-6-luna",
        "answer": "First a.",
        "prompt_tokens": 1200,
        "answer_tokens": 20,
        "image_sha256": gc.hash_file(str(three / "a.jpg")),
        "caption_sha256": gc.hash_file(str(three / "a.txt")),
    }
    assert {key: first[key] for key in expected} == expected
    assert [line["file"] for line in journal(three)] == ["a.txt", "b.txt", "c.txt"]


TORN = [
    b'\n{"file": "a.txt", "outc',
    b"\0" * 40,
    b"\n[]\n",
    b'{"file": 7}\n',
    b"\n" + b"[" * 99_999,
]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_line_costs_nothing_but_itself(
    tool: Tool, server: Server, three: Path, torn: bytes
) -> None:
    with (three / ".gen-captions" / "journal.jsonl").open("ab") as file:
        file.write(torn)
    (three / "c.txt").unlink()
    answers(server, "Second c.")
    tool("images", "--prompt", "first")
    assert "3 skipped (up to date)" in tool(*AGAIN, "first").stderr
    assert requests(server) == 1


def test_the_line_is_on_the_disk_before_the_caption(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    """A crash between the two never makes our caption look like another's."""
    path = make_image("a.jpg").with_suffix(".txt")
    server.script(hold_after=0)
    process = tool.start("images")
    wait_for(lambda: requests(server))
    path.write_text("mine\n", encoding="utf-8")  # so that the caption is not written
    server.release()
    end_of(process)
    assert [entry["outcome"] for entry in journal(path.parent)] == ["captioned"]


def test_lines_of_many_threads_stay_whole(tmp_path: Path) -> None:
    written = gc.Journal(tmp_path)
    written.open()
    entry = gc.Entry("captioned", answer="x" * 5000)

    def write(worker: int) -> None:
        for number in range(50):
            written.append(str(tmp_path / f"{worker}-{number}.txt"), entry)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written.close()
    found = gc.Journal(tmp_path).history
    assert len(found) == 200
    assert all(entries == [entry] for entries in found.values())


@POSIX
def test_a_journal_that_cannot_be_read_is_one_clear_error(tool: Tool, three: Path) -> None:
    path = three / ".gen-captions" / "journal.jsonl"
    path.unlink()
    path.mkdir()
    err = tool(*AGAIN, "second", code=2).stderr
    assert f"{path.relative_to(tool.folder)}: cannot be read: " in err


# --------------------------------------------------------------------------- what a crash leaves


def test_a_caption_that_a_crash_blanked_is_restored_for_nothing_and_a_missing_one_asked_anew(
    tool: Tool, server: Server, three: Path
) -> None:
    for name, blank in (("a", b""), ("b", b"\0" * 9)):
        (three / f"{name}.txt").write_bytes(blank)
    (three / "c.txt").unlink()
    answers(server, "Second c.")
    plan = tool("-n", "images", "--prompt", "first").stderr
    assert "3 planned (2 to caption at no cost, 1 to caption)" in plan
    tool("images", "--prompt", "first", "--trigger", "ohwx")
    assert texts(three) == ["ohwx, First a.", "ohwx, First b.", "ohwx, Second c."]
    assert requests(server) == 1


@pytest.mark.parametrize("again", [("images", "--prompt"), AGAIN], ids=["new", "update"])
def test_an_answer_is_kept_by_a_kill_between_its_line_and_its_caption(
    tool: Tool, server: Server, three: Path, again: tuple[str, ...]
) -> None:
    first = (three / "a.txt").read_bytes()
    answers(server, "Second a.", "Second b.", "Second c.")
    tool(*AGAIN, "second")
    for path in three.glob("*.txt"):  # as it is before the temporary file takes its name
        path.rename(gc.temporary_of(str(path)))
        if again == AGAIN:
            path.write_bytes(first.replace(b"a", path.stem.encode()))
    answers(server)
    tool(*again, "second")
    assert requests(server) == 0
    assert texts(three) == ["Second a.", "Second b.", "Second c."]
    assert not list(three.glob(".gc-*"))


def test_a_line_is_written_when_its_caption_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, written = str(tmp_path / "a.txt"), gc.Journal(tmp_path)
    written.open()

    def die(*_: object) -> None:
        shutil.copytree(tmp_path, tmp_path / "killed")
        raise OSError

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError):
        written.write(path, b"A cat.\n", gc.Entry("captioned", answer="A cat."))
    killed = tmp_path / "killed"
    left = Path(gc.temporary_of(str(killed / "a.txt")))
    assert [entry["answer"] for entry in journal(killed)] == ["A cat."]
    assert (left.read_bytes(), (killed / "a.txt").exists()) == (b"A cat.\n", False)


def test_a_blank_caption_is_asked_anew_where_prompt_or_image_are_others(
    tool: Tool, server: Server, three: Path, make_image: ImageMaker
) -> None:
    for name in "ab":
        (three / f"{name}.txt").write_bytes(b"\n")
    make_image("b.jpg", colour="blue")
    answers(server, "Second b.", "Third a.")
    tool("images", "--prompt", "first")
    (three / "a.txt").write_bytes(b"\n")
    tool("images", "--prompt", "third")
    assert texts(three) == ["Third a.", "Second b.", "First c."]


# ---------------------------------------------------------------------------------- updating


@pytest.mark.parametrize("change", [["--model", "other"], ["--style", "short"], ["--prompt", "x"]])
def test_overwrite_updates_what_another_recipe_made(
    tool: Tool, server: Server, three: Path, change: list[str]
) -> None:
    answers(server, "Second a.", "Second b.", "Second c.")
    tool(*AGAIN, "first", *change)
    assert texts(three) == ["Second a.", "Second b.", "Second c."]


def test_what_is_up_to_date_is_neither_asked_nor_touched(
    tool: Tool, server: Server, three: Path
) -> None:
    before = snapshot(three)
    answers(server)
    err = tool(*AGAIN, "first", "--max-side", "512").stderr
    assert "Nothing to do: 3 skipped (up to date)." in err
    assert requests(server) == 0
    assert snapshot(three) == before


def test_overwrite_updates_the_caption_of_an_image_that_has_changed_and_of_no_other(
    tool: Tool, server: Server, three: Path, make_image: ImageMaker
) -> None:
    make_image("a.jpg", colour="blue")
    os.utime(three / "b.jpg", (1, 1))  # another time, the same bytes
    answers(server, "Second a.")
    assert "1 captioned, 2 skipped (up to date)" in tool(*AGAIN, "first").stderr
    assert texts(three) == ["Second a.", "First b.", "First c."]


@pytest.mark.parametrize("edited", [b"mine\n", b"First a.", b"First a.\r\n"])
def test_what_a_person_changed_or_another_tool_made_is_never_replaced(
    tool: Tool, server: Server, three: Path, make_image: ImageMaker, edited: bytes
) -> None:
    make_image("d.jpg").with_suffix(".txt").write_bytes(b"another tool's")
    (three / "a.txt").write_bytes(edited)
    before = snapshot(three)
    answers(server, "Second b.", "Second c.")
    err = tool(*AGAIN, "second").stderr
    after = snapshot(three)
    assert after["a.txt"] == before["a.txt"]
    assert after["d.txt"] == before["d.txt"]
    assert "2 captioned, 2 skipped (1 changed by you, 1 not made by gen-captions)" in err


def test_a_caption_changed_or_deleted_while_its_answer_is_on_the_way(
    tool: Tool, server: Server, three: Path
) -> None:
    """The change stays; what was deleted is made anew."""
    server.script(hold_after=0, then={"content": "Second."})
    process = tool.start(*AGAIN[:1], "--overwrite", "--prompt", "second")
    wait_for(lambda: requests(server))
    (three / "a.txt").write_bytes(b"mine")
    (three / "b.txt").unlink()
    server.release()
    assert "1 skipped (changed meanwhile)" in end_of(process)
    assert process.returncode == 0
    assert texts(three) == ["mine", "Second.", "Second."]


def test_another_trigger_costs_nothing(tool: Tool, server: Server, three: Path) -> None:
    answers(server)
    plan = tool("-n", *AGAIN, "first", "--trigger", "ohwx")
    assert "3 planned (to update at no cost)" in plan.stderr
    for trigger, text in (("ohwx", "ohwx, First a."), ("sks", "sks, First a.")):
        tool(*AGAIN, "first", "--trigger", trigger)
        assert texts(three)[0] == text
    tool(*AGAIN, "first")
    assert texts(three) == ["First a.", "First b.", "First c."]
    assert requests(server) == 0


def test_a_plain_run_says_how_many_captions_another_prompt_or_trigger_made(
    tool: Tool, server: Server, three: Path, make_image: ImageMaker
) -> None:
    (three / "a.txt").write_text("by hand", encoding="utf-8")  # is not counted
    said = "2 captions were made with another prompt; --overwrite updates them."
    other = "2 captions were made with trigger none (now ohwx); --overwrite updates them."
    trigger = ("--prompt", "first", "--trigger", "ohwx")
    for changed, line in ((("--prompt", "second"), said), (trigger, other)):
        for n in ((), ("-n",)):
            err = tool("images", *changed, *n).stderr
            assert err.splitlines() == [line, "Nothing to do: all 3 images have captions."]
    assert "another prompt" not in tool("images", "--prompt", "first").stderr
    make_image("d.jpg")  # also where there is something to do
    answers(server, "Second d.")
    assert said in tool("images", "--prompt", "second").stderr
    assert (three / "b.txt").read_text(encoding="utf-8") == "First b.\n"


def test_captions_of_another_extension_are_not_called_outdated(
    tool: Tool, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    tool("images", "--style", "tags", "--caption-ext", "tags")
    assert "another prompt" not in tool("images").stderr


def test_a_caption_whose_new_answer_is_refused_stays(
    tool: Tool, server: Server, three: Path
) -> None:
    server.script(then={"content": REFUSAL})
    tool(*AGAIN, "second", code=1)
    assert texts(three) == ["First a.", "First b.", "First c."]
    assert "3 skipped (refused before)" in tool(*AGAIN, "second").stderr
    assert requests(server) == 3


# ---------------------------------------------------------------------------------- refusals


def test_a_refusal_is_not_asked_again_until_model_prompt_or_image_change(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    server.script(then={"content": REFUSAL})
    tool("images", code=1)
    for more in ((), ("--trigger", "ohwx"), ("-n",)):
        assert "1 failed (refused before)" in tool("images", *more, code=1).stderr
    assert requests(server) == 1
    tool("images", "--model", "another", code=1)
    tool("images", "--prompt", "another", code=1)
    make_image("a.jpg", colour="blue")
    tool("images", code=1)
    assert requests(server) == 4


def test_a_caption_by_hand_settles_a_refusal(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    path = make_image("a.jpg").with_suffix(".txt")
    answers(server, REFUSAL)
    tool("images", code=1)
    path.write_text("mine\n", encoding="utf-8")
    assert "1 skipped (not made by gen-captions)" in tool("images", "--overwrite").stderr


# -------------------------------------------------------------------------------------- undo


def undo(tool: Tool, *arguments: str, code: int = 0) -> str:
    done = tool("--undo", "images", *arguments, code=code, OPENAI_API_KEY="")
    return done.stdout.replace("\\", "/")


def texts_of(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return the captions of a folder as they lie there."""
    return snapshot(folder, "*.txt")


def update(tool: Tool, server: Server, word: str) -> None:
    answers(server, *(f"{word} {name}." for name in "abc"))
    tool(*AGAIN, word)


def test_what_is_replaced_is_kept_as_files_that_no_trainer_finds(
    tool: Tool, server: Server, three: Path
) -> None:
    before = texts_of(three)
    update(tool, server, "Second")
    (kept,) = (three / ".gen-captions").glob("replaced-*")
    assert {f"{name}~": file for name, file in before.items()} == snapshot(kept)
    assert sorted(path.name for path in three.rglob("*.txt")) == ["a.txt", "b.txt", "c.txt"]


@POSIX
def test_where_no_hard_link_can_be_made_a_copy_is_kept(
    tool: Tool, server: Server, three: Path
) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.exists() or elsewhere.stat().st_dev == three.stat().st_dev:
        pytest.skip("no other file system")
    state = elsewhere / f"gen-captions-{os.getpid()}"
    shutil.move(three / ".gen-captions", state)
    try:
        (three / ".gen-captions").symlink_to(state)
        os.utime(three / "a.txt", ns=(10**18, 10**18 + 7))
        before = texts_of(three)
        update(tool, server, "Second")
        undo(tool)
        assert texts_of(three) == before
    finally:
        shutil.rmtree(state)


def test_undo_restores_bytes_times_and_permissions(tool: Tool, server: Server, three: Path) -> None:
    os.utime(three / "a.txt", ns=(10**18, 10**18 + 7))
    (three / "b.txt").chmod(0o600)
    before = texts_of(three)
    update(tool, server, "Second")
    updated = snapshot(tool.folder)
    assert "images/a.txt: would be restored" in undo(tool, "-n")
    assert snapshot(tool.folder) == updated
    assert "\n3 restored." in undo(tool)
    assert texts_of(three) == before
    assert undo(tool) == "Nothing to restore.\n"


def test_what_undo_replaces_is_kept_too_and_still_ours(
    tool: Tool, server: Server, three: Path
) -> None:
    update(tool, server, "Second")
    undo(tool)
    (kept,) = (three / ".gen-captions").glob("undone-*")
    assert (kept / "a.txt~").read_bytes() == b"Second a.\n"
    update(tool, server, "Third")
    assert texts(three) == ["Third a.", "Third b.", "Third c."]


def test_undo_leaves_what_was_changed_since_and_brings_back_what_was_deleted(
    tool: Tool, server: Server, three: Path
) -> None:
    update(tool, server, "Second")
    (three / "a.txt").write_bytes(b"mine")
    (three / "b.txt").unlink()
    assert "images/a.txt: changed by you since, left alone" in undo(tool)
    assert texts(three) == ["mine", "First b.", "First c."]


def test_each_undo_goes_one_run_further_back(tool: Tool, server: Server, three: Path) -> None:
    for word in ("Second", "Third"):
        update(tool, server, word)
    for word in ("Second", "First"):
        undo(tool)
        assert texts(three)[0] == f"{word} a."


def test_undo_without_a_folder_says_which_to_name(tool: Tool) -> None:
    assert "--undo: which folder?" in tool("--undo", code=2).stderr


@pytest.mark.usefixtures("three")
def test_an_overwrite_that_replaced_nothing_leaves_nothing_to_undo(
    tool: Tool, server: Server
) -> None:
    server.script(key="another")
    tool(*AGAIN, "second", code=3)
    assert undo(tool) == "Nothing to restore.\n"


@POSIX
def test_undo_waits_for_no_run_that_is_at_work(tool: Tool, server: Server, three: Path) -> None:
    update(tool, server, "Second")
    server.script(hold_after=0)
    process = tool.start(*AGAIN, "third")
    wait_for(lambda: requests(server))
    err = tool("--undo", "images", code=3).stderr
    assert "another run is at work there" in err
    assert "Traceback" not in err
    process.kill()
    end_of(process)
    undo(tool)
    assert texts(three) == ["First a.", "First b.", "First c."]


# ------------------------------------------------------------------------- kill, and one undo


def kill_while_updating(tool: Tool, server: Server, folder: Path, number: int) -> None:
    """Kill a --overwrite with a third prompt after so many captions were replaced."""
    server.script(hold_after=number, then={"content": "Third."})
    process = tool.start(*AGAIN, "Third")
    wait_for(lambda: requests(server) == number + 1 and texts(folder).count("Third.") == number)
    process.send_signal(signal.SIGKILL)
    end_of(process)


@POSIX
@pytest.mark.parametrize("number", [0, 2])
def test_a_killed_overwrite_does_not_hide_the_run_before_from_undo(
    tool: Tool, server: Server, three: Path, number: int
) -> None:
    update(tool, server, "Second")
    kill_while_updating(tool, server, three, number)
    if number:
        undo(tool)
    assert texts(three) == ["Second a.", "Second b.", "Second c."]
    undo(tool)
    assert texts(three) == ["First a.", "First b.", "First c."]


@POSIX
@pytest.mark.parametrize(("word", "asked"), [("Third", 1), ("Fourth", 3)])
def test_an_update_that_was_killed_goes_on_and_one_undo_takes_it_back(
    tool: Tool, server: Server, three: Path, word: str, asked: int
) -> None:
    before = texts_of(three)
    kill_while_updating(tool, server, three, 2)
    server.script(then={"content": f"{word}."})
    tool(*AGAIN, word)
    assert requests(server) == asked
    assert texts(three) == [f"{word}."] * 3
    undo(tool)
    assert texts_of(three) == before
    assert undo(tool) == "Nothing to restore.\n"


@POSIX
def test_a_set_goes_through_edit_new_prompt_kill_overwrite_and_one_undo_with_every_byte_in_place(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    names = [f"{'sub/' if number % 2 else ''}{number:02}" for number in range(20)]
    for name in names:
        make_image(f"{name}.jpg")
    folder = tool.folder / "images"
    answers(server, *(f"First {name}." for name in names))
    tool("images", "--thread-pool", "1", "--prompt", "first")
    (folder / "sub" / "03.txt").write_bytes(b"by \x92hand\x92")
    (folder / "sub" / "17.txt").write_bytes(b"another tool's\r\n")
    (folder / "04.txt").chmod(0o640)
    first = texts_of(folder)

    server.script(hold_after=5, then={"content": "Second."})
    process = tool.start("images", "--thread-pool", "2", "--overwrite", "--prompt", "second")
    wait_for(lambda: [kept[0] for kept in texts_of(folder).values()].count(b"Second.\n") == 5)
    process.send_signal(signal.SIGKILL)
    end_of(process)
    killed = texts_of(folder)
    assert {data for data, _, _ in killed.values()} == {
        b"Second.\n",
        *(file[0] for name, file in first.items() if killed[name] == file),
    }

    server.script(then={"content": "Second."})
    tool("images", "--overwrite", "--prompt", "second")
    assert requests(server) == 13
    done = texts_of(folder)
    assert {data for data, _, _ in done.values()} == {
        *(b"Second.\n", b"by \x92hand\x92", b"another tool's\r\n")
    }
    assert [done[f"sub/{name}.txt"] == first[f"sub/{name}.txt"] for name in ("03", "17")]
    assert done["04.txt"][2] == first["04.txt"][2]

    assert "18 restored." in undo(tool)
    assert texts_of(folder) == first
    left = {path.name for path in folder.rglob(".*") if path.parent.name != ".gen-captions"}
    assert left == {".gen-captions"}


def test_what_a_person_wrote_after_a_kill_is_kept_too(tool: Tool) -> None:
    captions, journal = tool.folder / "images", tool.folder / "images" / ".gen-captions"
    kept = journal / "replaced-20200101T000000.000000.open"
    kept.mkdir(parents=True)
    (kept / "a.txt~").write_bytes(b"as a killed run found it")
    (captions / "a.txt").write_bytes(b"by hand: caf\xe9, a red cup by the window")
    tool("--fix-encoding", "--caption-dir", "images")
    assert "caf\xe9" in (captions / "a.txt").read_text(encoding="utf-8")
    tool("--undo", "images")
    assert (captions / "a.txt").read_bytes() == b"by hand: caf\xe9, a red cup by the window"


def test_undo_says_in_the_journal_what_stands_now(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.png")
    server.script(steps=[{"content": "First."}, {"content": "Second."}])
    tool("images")
    tool("images", "--overwrite", "--prompt", "Other words.")
    tool("--undo", "images")
    assert "made with another" not in tool("images").stderr
    assert "1 caption was made with another" in tool("images", "--prompt", "Other words.").stderr
    assert "(up to date)" in tool("images", "--overwrite").stderr
