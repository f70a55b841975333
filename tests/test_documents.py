"""README, .env.example, requirements and --help say the same as the table of settings."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

import gen_captions as gc
from conftest import ROOT, TOOL, Server, Tool, captions

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = [(item, spec) for item, spec in gc.specs() if spec.variable]


def shown(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def requirements(name: str) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return {line for line in lines if line}


def test_the_readme_table_is_the_table_of_settings() -> None:
    rows = re.findall(r"^\| `((?:OPENAI|GETCAP)_\w+)` \| (.+?) \| (.+?) \| (.+) \|$", README, re.MULTILINE)
    expected = []
    for item, spec in SETTINGS:
        flag = "none: others could see it" if spec.kind is gc.SECRET else f"`{gc.flag_name(item.name)}`"
        default = "none" if item.default in {None, ""} else f"`{shown(item.default)}`"
        expected.append((spec.variable, flag, default, spec.help))
    assert sorted(rows) == sorted(expected)


def test_env_example_has_every_variable_with_its_meaning_and_default() -> None:
    text = (ROOT / ".env.example").read_text(encoding="ascii")
    for item, spec in SETTINGS:
        value = gc.KEY_PLACEHOLDER if spec.kind is gc.SECRET else "" if item.default is None else shown(item.default)
        mark = "" if spec.kind is gc.SECRET else "# "
        assert f"# {spec.help}\n{mark}{spec.variable}={value}\n" in text
    assert len(re.findall(r"^(?:# )?[A-Z_]+=", text, re.MULTILINE)) == len(SETTINGS)


def test_env_example_with_a_key_put_in_is_a_valid_dotenv(tool: Tool) -> None:
    text = (ROOT / ".env.example").read_text(encoding="ascii").replace("\n# GETCAP", "\nGETCAP")
    (tool.folder / ".env").write_text(text, encoding="ascii")
    (tool.folder / "images").mkdir()
    tool("-n", "--image-dir", "images")


def test_the_script_block_says_what_requirements_txt_says() -> None:
    block = re.search(r"^# /// script\n(.*?)^# ///$", TOOL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block
    script = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    assert set(script["dependencies"]) == requirements("requirements.txt")
    assert script["requires-python"] == ">=3.11"


def test_the_readme_explains_every_message_it_lists() -> None:
    source = TOOL.read_text(encoding="utf-8")
    listed = re.search(r"\| Message \|.*?\n\n", README, re.DOTALL)
    assert listed
    for row in re.findall(r"^\| (`.+?) \|", listed[0], re.MULTILINE):
        for message in re.findall(r"`(.+?)`", row):
            words = message.replace("OPENAI_API_KEY is not set", "not set").replace("10 images", "images")
            assert re.sub(r"HTTP \d+", "HTTP {", words) in source, message


def test_every_failure_that_the_gate_names_is_explained_in_the_readme() -> None:
    for reason in re.findall(r'(?:FailImage|CutOff|Failed)\((?:\w+, )?"([^"]+)"', TOOL.read_text(encoding="utf-8")):
        known = reason in README or reason in {
            "error text", "unexpected", "unreadable file", "unreadable folder", "unreadable caption",
            "not a file", "name too long", "not written", "report not written", "image too large", "caption folder",
                "asked once",
        }  # fmt: skip
        assert known, reason


def test_the_changelog_knows_the_version() -> None:
    assert f"## {gc.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_examples_are_captioned_and_their_origin_is_stated(tool: Tool, server: Server) -> None:
    tool(
        "--image-dir",
        ROOT / "examples" / "images",
        "--caption-dir",
        "out",
        "--config-dir",
        ROOT / "examples" / "config",
    )
    assert sorted(captions(tool.folder / "out")) == ["cat.txt", "coffee.txt", "night/rocket.txt", "shapes.txt"]
    assert server.stats()["wrong"] == []
    origin = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples" / "images").rglob("*.*"):
        assert path.relative_to(ROOT / "examples").as_posix() in origin


@pytest.mark.parametrize("arguments", [["--image-dir", str(ROOT / "examples" / "images"), "--caption-dir", "out"]])
def test_the_stand_in_server_runs_a_command_and_ends_with_it(tool: Tool, arguments: list[str]) -> None:
    command = [sys.executable, str(ROOT / "tests" / "vision_server.py"), "--", sys.executable, str(TOOL), *arguments]
    done = subprocess.run(command, cwd=tool.folder, env=tool.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(text.startswith("Stand-in for a caption") for text in captions(tool.folder / "out").values())
