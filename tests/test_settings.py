"""Settings: one table; flag > environment > .env > default; a bad value names itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gen_captions as gc
from conftest import KEY, TOOL, ImageMaker, Server, Tool, captions

KEYS = f"{KEY} AIzaSyD-0123456789abcdefghi gsk_0123456789abcdefghij hf_0123456789abcdef".split()


def resolve(*argv: str, **environ: str) -> gc.Settings:
    return gc.resolve_settings(argv, environ)


def refuse(*argv: str, **environ: str) -> str:
    """Return what is said where the settings are refused."""
    with pytest.raises(gc.SettingsError) as error:
        resolve(*argv, **environ)
    return str(error.value)


# ------------------------------------------------------------------------------------- precedence


def test_a_flag_wins_over_the_environment_which_wins_over_dotenv_which_wins_over_the_default(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    make_image("a.jpg", size=(200, 100))
    dotenv = "GETCAP_MODEL='file' # mine\nGETCAP_MAX_SIDE=32\nGETCAP_MAX_TOKENS=50\n"
    (tool.folder / ".env").write_text(dotenv, encoding="utf-8-sig")
    tool.environment.update(GETCAP_MODEL="shell", GETCAP_MAX_TOKENS="70", GETCAP_MAX_SIDE="")
    tool("images", "--model", "flag")
    (body,), (image,) = server.stats()["bodies"], server.stats()["images"]
    assert (body["model"], body["max_completion_tokens"], image[1]) == ("flag", 70, 32)
    assert body["reasoning_effort"] == "none"


def test_a_flag_left_blank_is_an_error_since_a_shell_variable_was_empty() -> None:
    for value in ("", "  "):
        assert refuse("--caption-dir", value).startswith("--caption-dir: ")
    assert resolve(GETCAP_MODEL=" ").model == "gpt-6-luna"  # while a blank variable is none


def test_a_server_on_this_machine_gets_two_workers_and_what_is_slow_more_time_unless_told() -> None:
    here = {"OPENAI_BASE_URL": "http://localhost:1234/v1"}
    assert [resolve().thread_pool, resolve(**here).thread_pool] == [10, 2]
    assert resolve("--thread-pool", "7", **here).thread_pool == 7
    slow = ("--local",), ("--service-tier", "flex"), ("--local", "--timeout", "5")
    assert [resolve().timeout, *(resolve(*argv).timeout for argv in slow)] == [120, 900, 900, 5]


def test_local_takes_the_place_of_the_server_in_dotenv_but_not_of_one_in_the_same_command() -> None:
    other = {"OPENAI_BASE_URL": "http://localhost:11434/v1/", "GETCAP_MODEL": "x"}
    local = resolve("--local", OPENAI_API_KEY=KEY, **other)
    assert (local.model, local.api_key) == ("small", "")
    assert gc.is_this_machine(local.base_url)
    for flag in ("--model", "--base-url"):
        assert "--local" in refuse("--local", "small", flag, "http://x/v1")


# -------------------------------------------------------------------------------------- bad values

BAD_VALUES = [
    ("GETCAP_THREAD_POOL", "ten", "whole number from 1"),
    ("GETCAP_THREAD_POOL", "2.5", "whole number from 1"),
    ("GETCAP_THROTTLE_SUBMISSION_RATE", "nan", "number from 0.001"),
    ("GETCAP_THROTTLE_RETRIES", "-1", "from 0"),
    ("GETCAP_THROTTLE_BACKOFF_FACTOR", "inf", "from 0.001"),
    ("GETCAP_LOG_LEVEL", "LOUD", "debug or info"),
    ("GETCAP_TEMPERATURE", "3", "from 0 to 2"),
    ("GETCAP_PRICE", "1.2.3/4", "0.1/0.5"),
    ("GETCAP_EXTRA_BODY", "[" * 100_000, "JSON object"),
    ("GETCAP_CAPTION_EXT", ".JSONL", "not json"),
    ("GETCAP_CAPTION_EXT", "jpg", "not an image"),
    ("GETCAP_CAPTION_EXT", "../txt", "letters"),
    ("GETCAP_TRIGGER", "...", "a word"),
    ("OPENAI_BASE_URL", "localhost:11434", "http"),
    ("OPENAI_BASE_URL", "http://x:99999/v1", "http"),
]


@pytest.mark.parametrize(("variable", "value", "allowed"), BAD_VALUES)
def test_a_bad_value_names_setting_value_and_what_is_allowed(
    variable: str, value: str, allowed: str
) -> None:
    said = refuse(**{variable: value})
    assert all(part in said for part in (variable, value[:9], allowed))
    assert len(said) < 300


def test_a_bad_value_ends_the_process_with_2_and_one_line(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    make_image("a.jpg")
    done = tool("images", "--thread-pool", "ten", code=2)
    allowed = "allowed: a whole number from 1 to 1,000"
    said = f'--thread-pool (GETCAP_THREAD_POOL): "ten" is not allowed; {allowed}'
    assert (done.stdout, done.stderr) == ("", f"gen-captions: {said}\n")
    assert server.stats()["requests"] == 0
    assert captions(tool.folder) == {}


@pytest.mark.parametrize("name", ["GETCAP_MAXSIDE", "getcap_model", "GETCAP_QQQQQQQQQ"])
def test_a_mistyped_variable_is_an_error_that_names_it(name: str) -> None:
    meant = "did you mean GETCAP_MAX_SIDE?" if "MAXSIDE" in name else "--help shows all"
    assert refuse(**{name: "1"}) == f"{name}: there is no such setting; {meant}"


def test_a_url_loses_the_endpoints_own_path_and_shows_its_port() -> None:
    settings = resolve(OPENAI_BASE_URL="https://host:8/v1/chat/completions/")
    assert (settings.base_url, settings.host) == ("https://host:8/v1", "host:8")


# ------------------------------------------------------------------------------------------- .env

BROKEN = [
    'GETCAP_MAX_COST="0.00001',
    "GETCAP_MAX_COST 0.00001",
    "GETCAP_MAX_COST: 0.00001",
    "GETCAP_MAX_COST",
    "set GETCAP_MAX_COST=0.00001",
    "$env:GETCAP_MAX_COST='0.00001'",
    "GETCAP_MAX_COST=1\nGETCAP_MAX_COST='0.00001",
    "- OPENAI_BASE_URL=http://x/v1",
]


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_line_with_a_setting_is_named_before_anything_is_asked(
    tool: Tool, make_image: ImageMaker, server: Server, words: str
) -> None:
    make_image("a.jpg")
    (tool.folder / ".env").write_text(f"# mine\n\n\n{words}\nA=b\n", encoding="utf-8")
    line = 4 + words.count("\n")
    assert f"gen-captions: .env, line {line}: cannot be read" in tool("images", code=2).stderr
    assert server.stats()["requests"] == 0


def test_any_other_broken_line_is_a_warning(
    tool: Tool, make_image: ImageMaker, server: Server
) -> None:
    make_image("a.jpg")
    dotenv = '# GETCAP_MODEL "x\nfoo bar\nGETCAP_PROMPT="Say:\nGETCAP_MODEL=y\n"\nA.B=c\nBARE\n'
    (tool.folder / ".env").write_text(dotenv, encoding="utf-8")
    err = tool("images").stderr
    assert re.findall(r"\.env, line (\d+): cannot be read", err) == ["2"]
    (body,) = server.stats()["bodies"]
    assert body["messages"][0]["content"][0]["text"] == "Say:\nGETCAP_MODEL=y"
    assert body["model"] == "gpt-6-luna"


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-16-le"])
def test_a_dotenv_in_another_encoding_is_an_error_that_says_how_to_save_it(
    tmp_path: Path, encoding: str
) -> None:
    (tmp_path / ".env").write_text("A=caf\u00e9\n", encoding=encoding)
    with pytest.raises(gc.SettingsError, match=r"\.env: is not saved as UTF-8; save it again"):
        gc.read_env_file(tmp_path / ".env")


# ----------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize("pasted", [f" {KEY}\n", f'"{KEY}"', f"'{KEY}'\n", f"“{KEY}”"])
def test_quotes_and_line_ends_around_a_key_are_stripped(pasted: str) -> None:
    assert resolve(OPENAI_API_KEY=pasted).api_key == KEY


def test_the_key_is_shown_neither_where_it_is_broken_nor_in_the_settings_text() -> None:
    assert KEY not in repr(resolve(OPENAI_API_KEY=KEY))
    said = refuse(OPENAI_API_KEY="secret–dash")
    assert said.startswith("OPENAI_API_KEY: the value is not allowed")
    assert "secret" not in said


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@x/v1", f"https://x/v1?api_key={KEY}", f"http://x:{KEY}/v1"]
)
def test_a_key_inside_the_url_is_refused_and_not_shown(url: str) -> None:
    said = refuse(OPENAI_BASE_URL=url)
    assert "OPENAI_BASE_URL): the value is not allowed" in said
    assert KEY not in said


@pytest.mark.parametrize("key", KEYS)
def test_a_key_put_in_the_wrong_place_is_not_shown(key: str) -> None:
    for _, _, variable, _, reader, _ in gc.rows():
        if reader and variable and reader is not gc.A_KEY:
            said = refuse(**{variable: key})
            assert variable in said
            assert key not in said
    for words in ("--api-key {}", "--api-key={}", "--dry-run={}", "{}", "images {}", "--local {}"):
        assert key not in refuse(*words.format(key).split())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model", "fancyfeast/llama-joycaption-beta-one-hf-llava"),
        ("--model", "@cf/meta/llama-3.2-11b-vision-instruct"),
        ("--model", "hf.co/unsloth/Qwen3-VL-8B-Instruct-GGUF:Q4_K_M"),
        ("--trigger", "@ohwx"),
        ("--trigger", "sks-person-in-a-long-red-coat"),
        ("--trigger", "a" * 60),
    ],
)
def test_an_ordinary_name_is_no_key_however_long(flag: str, value: str) -> None:
    assert getattr(resolve(flag, value), flag[2:]) == value


# ------------------------------------------------------------------------------ the first contact


def test_a_folder_may_stand_alone(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    tool("images", "--caption-dir", "out")
    assert list(captions(tool.folder)) == ["out/a.txt"]


def test_a_bare_call_says_in_three_lines_what_to_type(tool: Tool) -> None:
    lines = tool(code=2).stderr.splitlines()
    ways = ("gen-captions ./images", "--local", "gen-captions -h")
    assert all(way in line for way, line in zip(ways, lines, strict=True))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["images", "--overwrte"], "--overwrte: there is no such setting; did you mean --overw"),
        (["--image", "images"], "did you mean --image-dir?"),
        (["images", "--caption_dir=out"], "--caption_dir: there is no such setting; did you mean"),
        (["images", "-z"], "-z: there is no such setting; --help shows all"),
        (["images", "more"], "more: only one folder"),
        (["images", "--limit"], "--limit: expected one argument"),
    ],
)
def test_what_is_mistyped_is_named_with_what_was_probably_meant(
    tool: Tool, argv: list[str], said: str
) -> None:
    (tool.folder / "images").mkdir()
    assert said in tool(*argv, code=2).stderr


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--local", "images"], "local", "small"),
        (["--local", "large", "images"], "local", "large"),
        (["--review", "images"], "review", True),
        (["--review", "page.html", "images"], "review", "page.html"),
        (["--batch-import", "a", "b", "images"], "batch_import", ["a", "b"]),
        (["-n", "--local", "images", "--limit", "1"], "local", "small"),
        (["images", "--local"], "local", "small"),
    ],
)
def test_a_folder_behind_an_optional_value_is_the_image_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], name: str, value: object
) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = resolve(*argv)
    assert (settings.image_dir, getattr(settings, name)) == (Path("images"), value)


def test_the_last_of_verbose_and_quiet_counts() -> None:
    assert resolve("-v").log_level == "debug"
    assert resolve("-v", "-q").log_level == "warning"
    assert resolve("-q", GETCAP_LOG_LEVEL="DEBUG").log_level == "warning"


def test_the_version_goes_to_stdout(tool: Tool) -> None:
    assert tool("-V").stdout == f"gen-captions {gc.__version__}\n"


def test_the_short_help_fits_on_a_screen_and_shows_the_first_week(tool: Tool) -> None:
    lines = tool("-h", COLUMNS="80").stdout.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("  gen-captions ") for line in lines) == 4
    for flag in ("--trigger", "--local", "--overwrite", "--review", "--fix-encoding", "--undo"):
        assert f"  {flag}" in "\n".join(lines)


def test_the_long_help_shows_every_flag_in_a_named_group_with_its_variable(tool: Tool) -> None:
    shown = tool("--help", COLUMNS="80").stdout
    assert shown.count("\n") <= 90
    assert max(map(len, shown.splitlines())) <= 80
    words = re.split(r"[\s\[\]=,]+", shown)
    for name, _, variable, *_ in gc.rows():
        assert variable in {"", f"GETCAP_{name.upper()}", f"OPENAI_{name.upper()}"}
        assert not variable or variable in words
        assert (gc.flag_of(name) in words) == (name != "api_key")
    for group in gc.GROUPS.values():
        assert f"\n{group}:\n" in shown


# ---------------------------------------------------------------------------------- without a key


@pytest.mark.parametrize("key", ["", "  ", "sk-your-key", "your-api-key-here"])
def test_a_missing_key_is_told_in_three_short_lines_with_three_ways_on(
    tool: Tool, make_image: ImageMaker, key: str
) -> None:
    make_image("a.jpg")
    done = tool("images", code=2, OPENAI_API_KEY=key, OPENAI_BASE_URL="http://192.168.1.5/v1")
    lines = done.stderr.splitlines()
    for word, line in zip(("OPENAI_API_KEY", "--local", "--base-url"), lines[:3], strict=True):
        assert word in line
    assert max(map(len, lines[:3])) <= 110
    assert not (tool.folder / "images" / ".gen-captions").exists()


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]/v1"])
def test_a_server_on_this_machine_needs_no_key(url: str) -> None:
    gc.check_key(resolve(OPENAI_BASE_URL=url))


def test_what_other_tools_read_and_windows_hides_is_named_beside_a_missing_key(
    tool: Tool, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    (tool.folder / ".env").rename(tool.folder / ".env.txt")
    elsewhere = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": "", "OPENAI_API_BASE": "http://x/v1"}
    err = tool("images", code=2, **elsewhere).stderr
    assert "OPENAI_API_BASE is set; this tool reads OPENAI_BASE_URL" in err
    assert ".env.txt is there; rename it to .env" in err


@pytest.mark.parametrize(
    "words", ["--help", "-h", "-V", "--timeout x", "--overwrte", "", "--fix-encoding", "--undo"]
)
def test_usage_errors_and_help_do_not_wait_for_heavy_imports(tmp_path: Path, words: str) -> None:
    heavy = {"openai", "httpx2", "PIL", "tenacity", "aiofiles", "tqdm", "yaml", "ftfy"}
    command = [sys.executable, "-X", "importtime", str(TOOL), *words.split()]
    environment = {"PATH": os.environ["PATH"], "SYSTEMROOT": os.environ.get("SYSTEMROOT", "")}
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode in {0, 2}
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert heavy.isdisjoint(imported)
