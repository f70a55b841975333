"""--fix-encoding as a user runs it: what is broken is repaired, nothing else is touched, all of it can be undone."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import gen_captions as gc
from conftest import TOOL, Tool, snapshot, wait_for

POSIX = pytest.mark.skipif(os.name == "nt", reason="links, pipes and signals that Windows has not")
BROKEN = b"it\x92s a dog\r\n  caf\xe9 \n\n"
MENDED = "it’s a dog\r\n  café \n\n".encode()


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder, long ago."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        os.utime(folder / name, ns=(10**18, 10**18 + 7))


def fix(tool: Tool, *arguments: str | Path, code: int = 0) -> str:
    """Repair the folder c; return what was said on stderr, with slashes."""
    done = tool("--fix-encoding", "--caption-dir", "c", *arguments, code=code, OPENAI_API_KEY="")
    return done.stderr.replace("\\", "/")


def read(folder: Path, pattern: str = "*.*") -> dict[str, bytes]:
    """Return the texts below a folder."""
    return {name: seen[0] for name, seen in snapshot(folder, pattern).items() if name[0] != "."}


def test_both_folders_become_utf8_and_what_is_right_is_not_touched(tool: Tool) -> None:
    healthy = {"a.txt": "“café” naïve Ã 猫 ﬁ Ｆ\r\n".encode(), "b.txt": b"", "notes.md": BROKEN}
    write(tool.folder / "c", healthy | {".hidden.txt": BROKEN})
    before = snapshot(tool.folder / "c")
    write(tool.folder / "c", {"sub/d.TXT": BROKEN, "e.caption": b"\xef\xbb\xbfa cat"})
    configs = {"job.yaml": b"name: caf\xe9 # it\x92s\n", "x.toml": b"a = 'caf\xe9'\n"}
    write(tool.folder / "k", configs | {"y.json": '"cafÃ©"'.encode("utf-16")})
    err = fix(tool, "--config-dir", "k")
    after = snapshot(tool.folder / "c")
    assert {name: after[name] for name in before} == before
    assert (after["sub/d.TXT"][0], after["e.caption"][0]) == (MENDED, b"a cat")
    texts = [data.decode() for data in read(tool.folder / "k").values()]
    assert texts == ["name: café # it’s\n", "a = 'café'\n", '"cafÃ©"']  # configs keep their letters
    assert "5 repaired (3 cp1252, 1 BOM, 1 UTF-16), 2 skipped (already right) in " in err
    assert "c/sub/d.TXT: repaired: cp1252" in err
    before = snapshot(tool.folder)
    assert "Nothing to do: 4 skipped (already right)." in fix(tool)
    assert snapshot(tool.folder) == before


def test_dry_run_shows_the_words_and_writes_nothing(tool: Tool) -> None:
    files = {"a.txt": BROKEN, "b.txt": "cafÃ©".encode(), "d.txt": "a cat".encode("utf-16")}
    write(tool.folder / "c", files)
    before = snapshot(tool.folder)
    done = tool("-n", "--fix-encoding", "--caption-dir", "c")
    assert done.stdout.replace(os.sep, "/").replace("//", "/").splitlines() == [
        r"c/a.txt: cp1252: it\x92s → it’s, caf\xe9 → café".replace(os.sep, "/"),
        "c/b.txt: mojibake: cafÃ© → café",
        "c/d.txt: UTF-16: a cat",
    ]
    assert "3 planned (1 cp1252, 1 mojibake, 1 UTF-16) in " in done.stderr
    assert snapshot(tool.folder) == before


def test_what_is_unclear_is_left_alone_and_named_with_what_settles_it(tool: Tool) -> None:
    data = "草地".encode("gb18030")
    write(tool.folder / "c", {"a.txt": data, "b.txt": b"\0\0\0", "d.txt": b"a cat\0\0"})
    err = fix(tool, code=1)
    assert 'c/a.txt: unclear: as gb18030 it reads "草地"; as ' in err
    assert "if the first is right, run again with --encoding gb18030" in err
    assert "c/b.txt: no text: zero or control bytes; look at it in an editor" in err
    assert "1 repaired (zero bytes), 2 failed (1 unclear, 1 no text)" in err
    assert read(tool.folder / "c") == {"a.txt": data, "b.txt": b"\0\0\0", "d.txt": b"a cat"}
    (tool.folder / "c" / "b.txt").unlink()
    fix(tool, "--encoding", "GB18030")
    assert (tool.folder / "c" / "a.txt").read_text(encoding="utf-8") == "草地"


def test_undo_restores_bytes_times_and_permissions_in_both_folders(tool: Tool) -> None:
    for name in ("c", "k"):
        write(tool.folder / name, {"a.txt": BROKEN, "sub/b.yaml": b"a: caf\xe9\n", "z.txt": b"x"})
        (tool.folder / name / "a.txt").chmod(0o640)
    before = [snapshot(tool.folder / name, "*.*") for name in ("c", "k")]
    err = fix(tool, "--config-dir", "k")
    assert "c/.gen-captions: keeps the originals; --undo restores them" in err
    assert stat.S_IMODE((tool.folder / "c" / "a.txt").stat().st_mode) == 0o640
    out = tool("--undo", "--caption-dir", "c", "--config-dir", "k").stdout
    assert out.count("2 restored. The files are kept in ") == 2
    for name, seen in zip(("c", "k"), before, strict=True):
        after = snapshot(tool.folder / name, "*.*")
        assert {path: after[path] for path in seen} == seen


def test_one_folder_for_both_is_repaired_and_restored_once(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN})
    assert "1 repaired (cp1252) in " in fix(tool, "--config-dir", tool.folder / "c")
    out = tool("--undo", "--caption-dir", "c", "--config-dir", "c").stdout
    assert out.count("1 restored. ") == 1
    assert read(tool.folder / "c") == {"a.txt": BROKEN}


@POSIX
@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGINT], [signal.SIGINT] * 2])
def test_an_end_in_mid_run_leaves_whole_files_true_counts_and_one_undo(
    tool: Tool, signals: list[signal.Signals]
) -> None:
    files = {f"{number:04}.txt": b"n\xe9 %d " % number + BROKEN for number in range(150)}
    write(tool.folder / "c", files)
    process = tool.start("--fix-encoding", "--caption-dir", "c")
    wait_for(lambda: (tool.folder / "c" / "0030.txt").read_bytes() != files["0030.txt"])
    for number in signals:
        process.send_signal(number)
    err = process.communicate()[1]
    found = read(tool.folder / "c", "[0-9]*.txt")
    repaired = [name for name in files if found[name] != files[name]]
    assert 0 < len(repaired) < len(files)
    assert all(found[name] == files[name].decode("cp1252").encode() for name in repaired)
    if signal.SIGINT in signals:
        assert process.returncode == 130
        assert re.search(rf"^{len(repaired)} repaired ", err, re.MULTILINE)
    else:
        fix(tool)  # goes on, and takes the killed run's originals over
    tool("--undo", "--caption-dir", "c")
    assert read(tool.folder / "c", "[0-9]*.txt") == files


@POSIX
def test_links_stay_links_and_a_folder_within_the_other_is_walked_once(tool: Tool) -> None:
    write(tool.folder / "elsewhere", {"b.txt": BROKEN, "d/e.txt": BROKEN})
    write(tool.folder / "c", {"a.txt": BROKEN, "k/job.yaml": b"a: caf\xe9\n"})
    for name, target in {"in.txt": "a.txt", "out.txt": "../elsewhere/b.txt", "loop": "."}.items():
        (tool.folder / "c" / name).symlink_to(target)
    (tool.folder / "c" / "out").symlink_to("../elsewhere/d")
    assert "4 repaired (cp1252), 1 skipped" in fix(tool, "--config-dir", "c/k")
    assert {os.readlink(tool.folder / "c" / name) for name in ("in.txt", "loop")} == {"a.txt", "."}
    assert read(tool.folder / "elsewhere") == {"b.txt": MENDED, "d/e.txt": MENDED}
    tool("--undo", "--caption-dir", "c")
    assert read(tool.folder / "elsewhere") == {"b.txt": BROKEN, "d/e.txt": BROKEN}


@POSIX
def test_what_cannot_be_repaired_is_named_and_the_rest_goes_on(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, "read-only.txt": BROKEN, "z.txt": BROKEN})
    (tool.folder / "c" / "read-only.txt").chmod(0o444)
    for name, target in {"gone.txt": "nowhere", "loop.txt": "loop.txt"}.items():
        (tool.folder / "c" / name).symlink_to(target)
    os.mkfifo(tool.folder / "c" / "pipe.txt")
    with (tool.folder / "c" / "giant.txt").open("wb") as file:
        file.truncate(gc.LARGEST_FILE + 1)
    err = fix(tool, code=1)
    assert "c/read-only.txt: read-only file: make it writable, then run again" in err
    assert "c/gone.txt: unreadable file: No such file or directory" in err
    assert "c/loop.txt: unreadable file: Too many levels of symbolic links" in err
    assert "c/pipe.txt: unreadable file: is a folder, a pipe or a device" in err
    assert "c/giant.txt: unreadable file: is over 256 MiB" in err
    assert (tool.folder / "c" / "read-only.txt").read_bytes() == BROKEN
    assert (tool.folder / "c" / "z.txt").read_bytes() == MENDED


def test_ctrl_c_twice_waits_until_what_is_written_is_counted() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    is_counted = False
    try:
        with pytest.raises(KeyboardInterrupt), gc.hold_signals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            is_counted = True
        assert is_counted
        signal.raise_signal(signal.SIGINT)  # the end is not disturbed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_file_that_changes_between_look_and_repair_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"edited meanwhile"})
    journal = gc.Journal(tmp_path)
    journal.open()
    looked = gc.Outcome(str(tmp_path / "a.txt"), "repaired", "cp1252")
    outcome = gc.repair_text(looked, BROKEN, MENDED.decode(), journal)
    journal.close()
    assert (outcome.kind, outcome.reason) == ("failed", "changed meanwhile")
    assert (tmp_path / "a.txt").read_bytes() == b"edited meanwhile"


def test_originals_that_cannot_be_kept_stop_before_the_first_change(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, ".gen-captions": b"a file"})
    assert "c/.gen-captions: cannot be written: " in fix(tool, code=3)
    assert (tool.folder / "c" / "a.txt").read_bytes() == BROKEN


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fix-encoding"], "--fix-encoding: which folder?"),
        (["--fix-encoding", "--caption-dir", "no"], "--fix-encoding: no: there is no such folder"),
        (["--fix-encoding", "c", "--encoding", "klingon"], '--encoding: "klingon" is not allowed'),
        (["--fix-encoding", "c", "--encoding", "base64"], '--encoding: "base64" is not allowed'),
        (["--fix-encoding", "--undo", "--caption-dir", "c"], "take one of them"),
        (["--encoding", "cp1252", "--image-dir", "c"], "--encoding: has no effect on captioning"),
    ],
)
def test_usage_errors_name_the_flag(tool: Tool, arguments: list[str], said: str) -> None:
    (tool.folder / "c").mkdir()
    assert said in tool(*arguments, code=2).stderr


def test_the_report_and_the_journal_have_a_line_for_each_repair(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, "b.txt": b"x"})
    out = tool("--fix-encoding", "--caption-dir", "c", "--report", "-").stdout
    lines = [json.loads(line) for line in out.splitlines()]
    path = os.path.join("c", "a.txt")
    assert lines[0] == {
        "outcome": "repaired",
        "path": path,
        "reason": "cp1252",
        "detail": "",
        "caption": "",
        "notes": [],
    }
    assert lines[-1]["repaired"] == 1
    (entry,) = gc.Journal(tool.folder / "c").past(str(tool.folder / path))
    assert entry.outcome == "repaired"
    assert entry.caption_sha256 == gc.hash_file(str(tool.folder / path))


def test_healthy_files_need_no_heavy_import(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": "un café".encode()})
    python = [sys.executable, "-X", "importtime", str(TOOL)]  # a forked process has them already
    command = [*python, "--fix-encoding", "--caption-dir", str(tool.folder / "c")]
    err = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "| argparse" in err
    heavy = r"\| *(openai|PIL|tenacity|aiofiles|ftfy|chardet|yaml)$"
    assert not re.search(heavy, err, re.MULTILINE)
