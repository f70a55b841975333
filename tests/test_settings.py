"""Settings: one table; flag > environment > .env > default; bad values name themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

import gen_captions as gc
from conftest import KEY, ImageMaker, Server, Tool


def resolve(flags: Mapping[str, str] = MappingProxyType({}), **environ: str) -> gc.Settings:
    return gc.resolve_settings({"verbose": False, "quiet": False, **flags}, environ, {})


def test_defaults_are_those_of_the_table() -> None:
    settings = resolve()
    assert (settings.model, settings.thread_pool, settings.throttle_retries) == ("gpt-6-luna", 10, 10)
    assert (settings.max_side, settings.max_tokens, settings.reasoning_effort) == (1024, 300, "none")


def test_a_flag_wins_over_the_environment_which_wins_over_dotenv() -> None:
    flags = {"verbose": False, "quiet": False, "model": "flag"}
    dotenv = {"GETCAP_MODEL": "file", "GETCAP_MAX_SIDE": "64", "GETCAP_TIMEOUT": "7"}
    settings = gc.resolve_settings(flags, {"GETCAP_MODEL": "shell", "GETCAP_MAX_SIDE": "128"}, dotenv)
    assert (settings.model, settings.max_side, settings.timeout) == ("flag", 128, 7.0)


def test_a_variable_left_blank_counts_as_unset() -> None:
    assert resolve(GETCAP_MODEL=" ").model == "gpt-6-luna"


@pytest.mark.parametrize(("name", "near"), [("GETCAP_MAXSIDE", "GETCAP_MAX_SIDE"), ("GETCAP_QQQQQQQQQ", "see --help")])
def test_a_mistyped_variable_is_an_error_that_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(gc.SettingsError, match=f"{name}: there is no such setting; .*{near}"):
        gc.resolve_settings({"verbose": False, "quiet": False}, {}, {name: "1"})


def test_a_flag_left_blank_is_an_error_since_a_shell_variable_was_empty() -> None:
    with pytest.raises(gc.SettingsError, match="--caption-dir: is blank"):
        resolve({"caption_dir": ""})


BAD_VALUES = [
    ("GETCAP_THREAD_POOL", "ten", "whole number from 1"),
    ("GETCAP_THREAD_POOL", "0", "whole number from 1"),
    ("GETCAP_THREAD_POOL", "-3", "whole number from 1"),
    ("GETCAP_THREAD_POOL", "2.5", "whole number from 1"),
    ("GETCAP_THROTTLE_SUBMISSION_RATE", "0", "above 0"),
    ("GETCAP_THROTTLE_SUBMISSION_RATE", "nan", "above 0"),
    ("GETCAP_THROTTLE_RETRIES", "-1", "from 0"),
    ("GETCAP_THROTTLE_BACKOFF_FACTOR", "0", "above 0"),
    ("GETCAP_THROTTLE_BACKOFF_FACTOR", "inf", "above 0"),
    ("GETCAP_LOG_LEVEL", "LOUD", "DEBUG, INFO"),
    ("GETCAP_MAX_SIDE", "0", "from 32"),
    ("GETCAP_MAX_TOKENS", "many", "from 1"),
    ("GETCAP_TIMEOUT", "0", "above 0"),
    ("GETCAP_TEMPERATURE", "3", "from 0 and up to 2"),
    ("GETCAP_CAPTION_EXT", "json", "not json"),
    ("GETCAP_CAPTION_EXT", ".JSONL", "not json"),
    ("GETCAP_CAPTION_EXT", "jpg", "not an image"),
    ("GETCAP_CAPTION_EXT", "../txt", "letters"),
    ("OPENAI_BASE_URL", "localhost:11434", "http"),
    ("OPENAI_BASE_URL", "ftp://x/v1", "http"),
    ("OPENAI_BASE_URL", "http://x:99999/v1", "http"),
]


@pytest.mark.parametrize(("variable", "value", "allowed"), BAD_VALUES)
def test_a_bad_value_names_setting_value_and_what_is_allowed(variable: str, value: str, allowed: str) -> None:
    with pytest.raises(gc.SettingsError) as error:
        gc.resolve_settings({"verbose": False, "quiet": False}, {variable: value}, {})
    assert all(part in str(error.value) for part in (variable, value, allowed))


def test_a_bad_value_ends_the_process_with_2_and_one_line(tool: Tool, make_image: ImageMaker, server: Server) -> None:
    make_image("a.jpg")
    done = tool("--image-dir", "images", "--thread-pool", "ten", code=2)
    assert done.stderr == (
        'gen-captions: --thread-pool: "ten" is not allowed; allowed: a whole number from 1 to 1000\n'
    )
    assert done.stdout == ""
    assert server.stats()["requests"] == 0
    assert not list(tool.folder.rglob("*.txt"))


def test_two_workers_suffice_for_a_server_on_this_machine_unless_told() -> None:
    assert resolve(OPENAI_BASE_URL="http://localhost:1234/v1").thread_pool == 2
    assert resolve(OPENAI_BASE_URL="http://127.0.0.1:1234/v1", GETCAP_THREAD_POOL="7").thread_pool == 7


@pytest.mark.parametrize("pasted", [f" {KEY}\n", f'"{KEY}"', f"'{KEY}'\n", f"“{KEY}”", f"\ufeff{KEY}".strip("\ufeff")])
def test_quotes_and_line_ends_around_a_key_are_stripped(pasted: str) -> None:
    assert resolve(OPENAI_API_KEY=pasted).api_key == KEY


def test_a_key_with_a_broken_character_is_an_error_that_does_not_show_it() -> None:
    with pytest.raises(gc.SettingsError, match="OPENAI_API_KEY: the value is not allowed") as error:
        resolve(OPENAI_API_KEY="sk-secret–dash")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["", "  ", gc.KEY_PLACEHOLDER])
def test_a_missing_key_is_an_error_that_names_three_ways_on(key: str) -> None:
    with pytest.raises(gc.SettingsError, match=r"(?s)OPENAI_API_KEY.*OPENAI_BASE_URL.*this machine"):
        gc.check_key(resolve(OPENAI_API_KEY=key))


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://127.0.0.2/v1", "http://[::1]:8000/v1"])
def test_a_server_on_this_machine_needs_no_key(url: str) -> None:
    gc.check_key(resolve(OPENAI_BASE_URL=url))


def test_a_server_elsewhere_needs_a_key() -> None:
    with pytest.raises(gc.SettingsError):
        gc.check_key(resolve(OPENAI_BASE_URL="http://192.168.1.5:8000/v1"))


def test_the_endpoints_own_path_is_cut_from_the_url() -> None:
    assert resolve(OPENAI_BASE_URL="http://x/v1/chat/completions/").base_url == "http://x/v1"


def test_the_key_stays_out_of_the_settings_text() -> None:
    assert KEY not in repr(resolve(OPENAI_API_KEY=KEY))


def test_a_key_pasted_as_a_flag_is_not_repeated(tool: Tool) -> None:
    assert "unrecognized" in tool("--api-key", KEY, code=2).stderr


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@127.0.0.1:1/v1", f"https://x/v1?api_key={KEY}", f"http://x:{KEY}/v1"]
)
def test_a_key_inside_the_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(gc.SettingsError, match="OPENAI_BASE_URL: the value is not allowed") as error:
        resolve(OPENAI_BASE_URL=url)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("key", [KEY, "AIzaSyD-0123456789abcdefghijklmnop", "gsk_0123456789abcdefghij"])
def test_a_key_put_in_the_wrong_place_is_not_shown(key: str) -> None:
    for item, spec in gc.specs():
        if spec.variable and item.name not in {"api_key", "prompt", "reasoning_effort"}:
            with pytest.raises(gc.SettingsError, match=spec.variable) as error:
                gc.resolve_settings({"verbose": False, "quiet": False}, {spec.variable: key}, {})
            assert key not in str(error.value)
    for arguments in (["--api-key", key], [f"--api-key={key}"], [key], [f"--dry-run={key}"]):
        with pytest.raises(gc.SettingsError) as error:
            gc.build_parser().parse_args(arguments)
        assert key not in str(error.value)


def test_the_host_is_shown_with_its_port() -> None:
    assert resolve(OPENAI_BASE_URL="https://host:8/v1").host == "host:8"


def test_dotenv_is_read_from_the_current_folder(tool: Tool, make_image: ImageMaker, server: Server) -> None:
    make_image("a.jpg")
    (tool.folder / ".env").write_text('GETCAP_MODEL="from-file" # my model\nGETCAP_MAX_SIDE=32\n', encoding="utf-8-sig")
    tool("--image-dir", "images")
    stats = server.stats()
    assert stats["bodies"][0]["model"] == "from-file"
    assert stats["images"][0][1] == 32


@pytest.mark.parametrize(
    "data",
    ["OPENAI_API_KEY=x\n".encode("utf-16"), "GETCAP_PROMPT=caf\u00e9\n".encode("cp1252"), "A=x\n".encode("utf-16-le")],
    ids=["utf-16", "cp1252", "utf-16 without BOM"],
)
def test_a_dotenv_in_another_encoding_is_an_error_that_says_how_to_save_it(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".env").write_bytes(data)
    with pytest.raises(gc.SettingsError, match=r"\.env: is not saved as UTF-8.*Notepad"):
        gc.read_dotenv([tmp_path])


def test_the_first_dotenv_counts(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".env").write_text("GETCAP_MODEL=b\n", encoding="utf-8")
    assert gc.read_dotenv([tmp_path, tmp_path / "b"]) == {"GETCAP_MODEL": "b"}
    (tmp_path / ".env").write_text("GETCAP_MODEL=a\n", encoding="utf-8")
    assert gc.read_dotenv([tmp_path, tmp_path / "b"]) == {"GETCAP_MODEL": "a"}


def test_plain_http_to_another_machine_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    gc.log.propagate = True
    recipe = gc.Recipe("p", "built in", "", "")
    gc.log_remarks(resolve(OPENAI_BASE_URL="http://192.168.1.5/v1"), recipe)
    assert "plain http" in caplog.text
    caplog.clear()
    gc.log_remarks(resolve(OPENAI_BASE_URL="http://127.0.0.1/v1"), recipe)
    assert "plain http" not in caplog.text


def test_flags_are_not_abbreviated(tool: Tool) -> None:
    assert "unrecognized" in tool("--image", "images", code=2).stderr


def test_verbose_and_quiet_exclude_each_other(tool: Tool) -> None:
    assert "take one" in tool("-v", "-q", "--image-dir", "x", code=2).stderr


def test_version_and_help_go_to_stdout(tool: Tool) -> None:
    assert tool("-V").stdout == f"gen-captions {gc.__version__}\n"
    shown = tool("--help").stdout
    for item, spec in gc.specs():
        assert spec.variable in shown
        assert (gc.flag_name(item.name) in shown) == (item.name != "api_key")


def test_variables_are_named_after_their_settings() -> None:
    for item, spec in gc.specs():
        assert spec.variable in {"", f"GETCAP_{item.name.upper()}", f"OPENAI_{item.name.upper()}"}


def test_usage_errors_and_help_do_not_wait_for_heavy_imports(tool: Tool) -> None:
    for arguments, code in (
        (["--help"], 0),
        (["-V"], 0),
        (["--timeout", "x"], 2),
        (["--fix-encoding"], 2),
        (["--undo"], 2),
    ):
        process = tool(*arguments, code=code, PYTHONPROFILEIMPORTTIME="1")
        imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if "import time" in line}
        assert imported.isdisjoint({"openai", "httpx2", "PIL", "tenacity", "aiofiles", "tqdm", "asyncio"})
