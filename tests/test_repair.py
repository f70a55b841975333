"""--fix-encoding as a user runs it: what is broken is repaired, nothing else is touched, all of it can be undone."""

from __future__ import annotations

import json
import os
import stat
import time
import zipfile
from pathlib import Path

import pytest

import gen_captions as gc
from conftest import Tool

POSIX = pytest.mark.skipif(os.name == "nt", reason="links, pipes and permissions that Windows does not have")
BROKEN = b"it\x92s a dog\r\n  caf\xe9 \n\n"
MENDED = "it’s a dog\r\n  café \n\n".encode()


def write(folder: Path, files: dict[str, bytes]) -> dict[str, tuple[bytes, int]]:
    """Write files below a folder, a day old, and return their snapshot."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        os.utime(folder / name, ns=(10**18, 10**18 + 7))
    return snapshot(folder)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return bytes and time of each file below a folder, those of the tool aside."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".gen-captions" not in path.parts)
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(paths)}


def fix(tool: Tool, *arguments: str | Path, code: int = 0) -> str:
    return tool("--fix-encoding", "--caption-dir", "c", *arguments, code=code, OPENAI_API_KEY="").stderr


def test_both_folders_are_repaired_and_what_is_right_is_not_touched(tool: Tool) -> None:
    healthy = {"a.txt": "“café” naïve Ã 猫 ﬁ Ｆ\r\n".encode(), "b.txt": b"", "notes.md": BROKEN, ".hidden.txt": BROKEN}
    before = write(tool.folder / "c", {**healthy, "sub/d.TXT": BROKEN, "e.caption": b"\xef\xbb\xbfa cat"})
    write(
        tool.folder / "k", {"job.yaml": b"name: caf\xe9 # it\x92s\n", "x.toml": b"a = 'caf\xe9'\n", "y.json": b'"\xe9"'}
    )
    err = fix(tool, "--config-dir", "k")
    after = snapshot(tool.folder / "c")
    assert {name: after[name] for name in healthy} == {name: before[name] for name in healthy}
    assert after["sub/d.TXT"][0] == MENDED
    assert after["e.caption"][0] == b"a cat"
    assert [data.decode() for data, _ in snapshot(tool.folder / "k").values()] == [
        "name: café # it’s\n",
        "a = 'café'\n",
        '"é"',
    ]
    assert "Repaired 5 (cp1252 4, BOM 1), skipped 2 (already right 2), failed 0; " in err
    assert "c/sub/d.TXT: repaired: cp1252" in err.replace("\\", "/")


def test_the_second_run_changes_nothing(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN})
    fix(tool)
    before = snapshot(tool.folder)
    assert "Repaired 0, skipped 1 (already right 1)" in fix(tool)
    assert snapshot(tool.folder) == before


def test_dry_run_shows_the_passages_and_writes_nothing(tool: Tool) -> None:
    before = write(tool.folder / "c", {"a.txt": BROKEN, "b.txt": "cafÃ©".encode(), "d.txt": "a cat".encode("utf-16")})
    done = tool("-n", "--fix-encoding", "--caption-dir", "c")
    assert done.stdout.replace(os.sep, "/").splitlines() == [
        "c/a.txt: cp1252",
        r"    - it\x92s a dog".replace(os.sep, "/"),
        "    + it’s a dog",
        r"    - caf\xe9".replace(os.sep, "/"),
        "    + café",
        "c/b.txt: mojibake",
        "    - cafÃ©",
        "    + café",
        "c/d.txt: UTF-16",
        "    = a cat",
    ]
    assert snapshot(tool.folder / "c") == before
    assert sorted(os.listdir(tool.folder)) == [".env", "c"]


def test_what_is_unclear_is_left_alone_and_named_with_guesses_that_encoding_settles(tool: Tool) -> None:
    data = "草地上的女孩和猫".encode("gb18030")
    before = write(tool.folder / "c", {"a.txt": data, "b.txt": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"})
    err = fix(tool, code=1)
    assert "c/a.txt: unclear: " in err.replace("\\", "/")
    assert 'as gb18030 it reads "草地上的女孩和猫"' in err
    assert "c/b.txt: no text: zero or control bytes; look at it in an editor" in err.replace("\\", "/")
    assert "failed 2 (unclear 1, no text 1)" in err
    assert snapshot(tool.folder / "c") == before
    (tool.folder / "c" / "b.txt").unlink()
    fix(tool, "--encoding", "GB18030")
    assert (tool.folder / "c" / "a.txt").read_text(encoding="utf-8") == "草地上的女孩和猫"


def test_a_config_file_that_would_mean_something_else_is_left_alone_and_named(tool: Tool) -> None:
    before = write(tool.folder / "c", {"a.yaml": "cafÃ©: 1\ncafé: 2\n".encode(), "b.yaml": "t: cafÃ©\n".encode()})
    assert "c/a.yaml: unclear: its repair would change what the file means" in fix(tool, code=1).replace("\\", "/")
    after = snapshot(tool.folder / "c")
    assert after["a.yaml"] == before["a.yaml"]
    assert after["b.yaml"][0] == "t: café\n".encode()


def test_undo_restores_bytes_and_times_in_both_folders(tool: Tool) -> None:
    for name in ("c", "k"):
        write(tool.folder / name, {"a.txt": BROKEN, "sub/b.yaml": b"a: caf\xe9\n", "right.txt": b"x"})
    before = {name: snapshot(tool.folder / name) for name in ("c", "k")}
    err = fix(tool, "--config-dir", "k").replace("\\", "/")
    assert "the originals are in c/.gen-captions/replaced-" in err
    assert "the originals are in k/.gen-captions/replaced-" in err
    assert {name: snapshot(tool.folder / name) for name in ("c", "k")} != before
    out = tool("--undo", "--caption-dir", "c", "--config-dir", "k").stdout
    assert out.count("Put back 2 of 2; all originals are in ") == 2
    assert {name: snapshot(tool.folder / name) for name in ("c", "k")} == before


def test_undo_takes_back_the_last_run_only(tool: Tool) -> None:
    write(tool.folder / "k", {"a.txt": BROKEN})
    tool("--fix-encoding", "--config-dir", "k")
    write(tool.folder / "c", {"a.txt": BROKEN})
    fix(tool, "--config-dir", "k")
    tool("--undo", "--caption-dir", "c", "--config-dir", "k")
    assert (tool.folder / "c" / "a.txt").read_bytes() == BROKEN
    assert (tool.folder / "k" / "a.txt").read_bytes() == MENDED


@POSIX
def test_kill_9_in_mid_run_leaves_whole_files_and_undo_restores_all(tool: Tool) -> None:
    files = {f"{number:04}.txt": b"n\xe9 %d " % number + BROKEN for number in range(1500)}
    before = write(tool.folder / "c", files)
    process = tool.start("--fix-encoding", "--caption-dir", "c")
    while (tool.folder / "c" / "0030.txt").read_bytes() == files["0030.txt"]:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    texts = {name: data for name, (data, _) in snapshot(tool.folder / "c").items() if not name.startswith(".gc-")}
    repaired = [name for name in files if texts[name] != files[name]]
    assert 0 < len(repaired) < len(files)
    assert all(texts[name] == files[name].decode("cp1252").encode() for name in repaired)
    tool("--undo", "--caption-dir", "c")
    after = {name: seen for name, seen in snapshot(tool.folder / "c").items() if not name.startswith(".gc-")}
    assert after == before


def test_originals_are_in_one_zip_before_the_first_change(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, "sub/é.txt": BROKEN, "right.txt": b"x"})
    fix(tool)
    (kept,) = (tool.folder / "c" / ".gen-captions").glob("*.zip")
    with zipfile.ZipFile(kept) as archive:
        assert archive.namelist() == ["a.txt", "sub/é.txt", ".index.json"]
        assert archive.read("sub/é.txt") == BROKEN
    assert list((tool.folder / "c").rglob(".gc-*")) == []


@POSIX
def test_permissions_and_owner_are_kept(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN})
    (tool.folder / "c" / "a.txt").chmod(0o640)
    if os.geteuid() == 0:
        os.chown(tool.folder / "c" / "a.txt", 1234, 1235)
    before = (tool.folder / "c" / "a.txt").stat()
    fix(tool)
    after = (tool.folder / "c" / "a.txt").stat()
    assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid) == (0o640, before.st_uid, before.st_gid)


@POSIX
def test_a_link_stays_a_link_and_one_that_leads_out_is_said(tool: Tool) -> None:
    write(tool.folder / "elsewhere", {"b.txt": BROKEN, "d/e.txt": BROKEN})
    write(tool.folder / "c", {"a.txt": BROKEN})
    (tool.folder / "c" / "in.txt").symlink_to("a.txt")
    (tool.folder / "c" / "out.txt").symlink_to(tool.folder / "elsewhere" / "b.txt")
    (tool.folder / "c" / "out").symlink_to(tool.folder / "elsewhere" / "d")
    (tool.folder / "c" / "loop").symlink_to(".")
    err = fix(tool)
    assert (tool.folder / "c" / "out.txt").is_symlink()
    assert (tool.folder / "c" / "in.txt").is_symlink()
    assert (tool.folder / "elsewhere" / "b.txt").read_bytes() == MENDED
    assert (tool.folder / "elsewhere" / "d" / "e.txt").read_bytes() == MENDED
    assert err.count("out of the folder, and repaired there") == 2
    tool("--undo", "--caption-dir", "c")
    assert (tool.folder / "elsewhere" / "b.txt").read_bytes() == BROKEN
    assert (tool.folder / "c" / "a.txt").read_bytes() == BROKEN
    assert (tool.folder / "c" / "in.txt").is_symlink()


@POSIX
def test_what_cannot_be_repaired_is_named_and_the_rest_goes_on(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, "read-only.txt": BROKEN})
    (tool.folder / "c" / "read-only.txt").chmod(0o444)
    (tool.folder / "c" / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tool.folder / "c" / "pipe.txt")
    with (tool.folder / "c" / "giant.txt").open("wb") as file:
        file.truncate(65 << 20)
    err = fix(tool, code=1)
    assert "c/read-only.txt: read-only file: make it writable, then run again" in err
    assert "c/gone.txt: unreadable file: No such file or directory" in err
    assert "c/pipe.txt: unreadable file: is no file that can be read" in err
    assert "c/giant.txt: unreadable file: is over 64 MB" in err
    assert (tool.folder / "c" / "read-only.txt").read_bytes() == BROKEN
    assert (tool.folder / "c" / "a.txt").read_bytes() == MENDED


def test_a_file_that_changes_between_look_and_repair_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"another caf\xe9")
    damage = gc.Damage(str(tmp_path), str(tmp_path / "a.txt"), gc.hash_file(__file__))
    found = gc.repair_file(damage, gc.Journal(tmp_path), None)
    assert (found.reason, (tmp_path / "a.txt").read_bytes()) == ("changed by now", b"another caf\xe9")


@POSIX
def test_originals_that_cannot_be_kept_stop_before_the_first_change(tool: Tool) -> None:
    before = write(tool.folder / "c", {"a.txt": BROKEN})
    (tool.folder / "c" / ".gen-captions").write_text("a file", encoding="utf-8")
    assert "c/.gen-captions: the originals cannot be kept there" in fix(tool, code=3)
    assert snapshot(tool.folder / "c")["a.txt"] == before["a.txt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fix-encoding"], "--fix-encoding: name a folder that exists with --caption-dir, --config-dir, or both"),
        (["--fix-encoding", "--config-dir", "no"], "--fix-encoding: name a folder that exists"),
        (["--fix-encoding", "--caption-dir", "no"], "--caption-dir: no: there is no such folder"),
        (["--fix-encoding", "--caption-dir", "c", "--encoding", "klingon"], '--encoding: "klingon" is not allowed'),
        (["--fix-encoding", "--caption-dir", "c", "--encoding", "base64"], '--encoding: "base64" is not allowed'),
        (["--fix-encoding", "--undo", "--caption-dir", "c"], "take one of them"),
        (["--fix-encoding", "--overwrite", "--caption-dir", "c"], "--overwrite: belongs to captioning"),
        (["--encoding", "cp1252", "--image-dir", "c"], "--encoding: belongs to --fix-encoding"),
    ],
)
def test_usage_errors_name_the_flag(tool: Tool, arguments: list[str], said: str) -> None:
    (tool.folder / "c").mkdir()
    assert said in tool(*arguments, code=2).stderr


def test_the_report_has_a_line_for_each_repair(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, "b.txt": b"x"})
    lines = [
        json.loads(line) for line in tool("--fix-encoding", "--caption-dir", "c", "--report", "-").stdout.splitlines()
    ]
    assert lines[0] == {"outcome": "repaired", "file": os.path.join("c", "a.txt"), "kind": "cp1252"}
    assert lines[1]["repaired"] == {"cp1252": 1}


def test_healthy_files_need_no_heavy_import(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": "un café".encode()})
    process = tool("--fix-encoding", "--caption-dir", "c", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if "import time" in line}
    assert imported.isdisjoint(
        {"openai", "httpx2", "PIL", "tenacity", "aiofiles", "ftfy", "charset_normalizer", "yaml"}
    )


def test_a_repaired_caption_is_not_taken_for_ours(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN})
    fix(tool)
    (entry,) = gc.Journal(tool.folder / "c").past(str(tool.folder / "c" / "a.txt"))
    assert (entry.outcome, entry.caption_sha256) == ("repaired", gc.hash_file(str(tool.folder / "c" / "a.txt")))


@POSIX
def test_a_link_to_itself_and_a_file_that_vanishes_do_not_stop_the_rest(tool: Tool, tmp_path: Path) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, "sub/b.txt": BROKEN})
    (tool.folder / "c" / "loop.txt").symlink_to("loop.txt")
    (tool.folder / "c" / "loop").symlink_to("loop")
    err = fix(tool, code=1)
    assert "c/loop.txt: unreadable file: Too many levels of symbolic links" in err
    assert "Repaired 2" in err
    (tmp_path / "there.txt").write_bytes(b"x")
    kept = gc.keep_originals(str(tmp_path), [str(tmp_path / "gone.txt"), str(tmp_path / "there.txt")], gc.KEPT, "t")
    with zipfile.ZipFile(kept) as archive:
        assert archive.namelist() == ["there.txt", ".index.json"]


def test_yaml_of_a_few_lines_that_stand_for_billions_is_no_trouble(tool: Tool) -> None:
    lines = ['a0: &a0 ["x", "cafÃ©"]', *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    write(tool.folder / "c", {"a.yaml": "\n".join(lines).encode()})
    assert "Repaired 1 (mojibake 1)" in fix(tool)


@pytest.mark.parametrize("data", [b"\xbfa " * 100_000 + b"?", bytes(range(128, 256)) * 20_000], ids=["marks", "bytes"])
def test_long_files_without_sense_are_decided_in_time(data: bytes) -> None:
    started = time.monotonic()
    gc.decode_text(data)
    assert time.monotonic() - started < 20  # it was minutes


@POSIX
def test_what_is_in_the_way_of_an_undo_is_named_and_the_rest_goes_on(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, "b.txt": BROKEN, "sub/c.txt": BROKEN})
    fix(tool)
    (tool.folder / "c" / "b.txt").unlink()
    (tool.folder / "c" / "b.txt").mkdir()
    (tool.folder / "c" / "sub" / "c.txt").unlink()
    (tool.folder / "c" / "sub").rmdir()
    out = tool("--undo", "--caption-dir", "c").stdout
    assert "c/b.txt: no file any more, left alone" in out
    assert "Put back 2 of 3" in out
    assert (tool.folder / "c" / "sub" / "c.txt").read_bytes() == BROKEN


def test_a_damaged_zip_gives_back_what_is_whole(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN * 99, "b.txt": BROKEN})
    fix(tool)
    (kept,) = (tool.folder / "c" / ".gen-captions").glob("*.zip")
    data = bytearray(kept.read_bytes())
    data[45:55] = b"X" * 10
    kept.write_bytes(data)
    done = tool("--undo", "--caption-dir", "c", code=1)
    assert "c/a.txt: not put back: " in done.stdout.replace("\\", "/")
    assert "1 files were not put back; mend that, then run --undo again" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tool.folder / "c" / "b.txt").read_bytes() == BROKEN


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only the superuser can give files away")
def test_undo_keeps_the_owner(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN})
    os.chown(tool.folder / "c" / "a.txt", 1234, 1235)
    fix(tool)
    tool("--undo", "--caption-dir", "c")
    status = (tool.folder / "c" / "a.txt").stat()
    assert (status.st_uid, status.st_gid) == (1234, 1235)


@POSIX
def test_a_dead_runs_temporary_file_is_cleaned_up(tool: Tool) -> None:
    write(tool.folder / "c", {"a.txt": BROKEN, ".gc-4194999-7": b"half"})
    fix(tool)
    assert not (tool.folder / "c" / ".gc-4194999-7").exists()


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_undo_in_a_folder_that_cannot_be_used_is_an_error(tool: Tool, name: str) -> None:
    (tool.folder / "file").touch()
    assert f"--caption-dir: {name}: " in tool("--undo", "--caption-dir", name, code=2).stderr
