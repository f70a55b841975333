"""README, docs, .env.example, requirements and the examples say what the tool does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import gen_captions as gc
from conftest import ROOT, TOOL, Server, Tool, captions

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
SOURCE = TOOL.read_text(encoding="utf-8")


def shown(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line for line in (line.partition("#")[0].strip() for line in lines) if line}


def test_the_pages_are_short_enough_to_be_read() -> None:
    assert README.count("\n") <= 200
    assert README.count("\n") + sum(text.count("\n") for text in DOCS.values()) <= 650


def test_docs_settings_is_the_table_of_settings() -> None:
    listed = re.findall(
        r"^\| (.*?) \| (.*?) \| (.*?) \| (.*) \|$", DOCS["settings.md"], re.MULTILINE
    )
    expected = []
    for name, default, variable, meaning, reader, _ in gc.rows():
        flag = "`-n`, `--dry-run`" if name == "dry_run" else f"`{gc.flag_of(name)}`"
        flag = "none: others could see it" if reader is gc.A_KEY else flag
        value = "" if default in {None, "", False} else f"`{shown(default)}`"
        expected.append((flag, f"`{variable}`" if variable else "", value, meaning))
    assert listed[1:] == expected


def test_the_readme_has_the_six_variables_of_the_first_week() -> None:
    listed = re.findall(r"^\| `([A-Z_]+)` \|", README, re.MULTILINE)
    assert listed == [
        "OPENAI_API_KEY",
        "GETCAP_THREAD_POOL",
        "GETCAP_THROTTLE_SUBMISSION_RATE",
        "GETCAP_THROTTLE_RETRIES",
        "GETCAP_THROTTLE_BACKOFF_FACTOR",
        "GETCAP_LOG_LEVEL",
    ]


def test_env_example_has_every_variable_with_its_meaning_and_default() -> None:
    text = (ROOT / ".env.example").read_text(encoding="ascii")
    variables = [row for row in gc.rows() if row[2]]
    for _, default, variable, meaning, reader, _ in variables:
        is_key = reader is gc.A_KEY
        value = "sk-your-key" if is_key else "" if default is None else shown(default)
        assert f"# {meaning}\n{'' if is_key else '# '}{variable}={value}\n" in text
    assert len(re.findall(r"^(?:# )?[A-Z_]+=", text, re.MULTILINE)) == len(variables)


def test_env_example_with_all_lines_switched_on_is_read(tool: Tool, server: Server) -> None:
    text = (ROOT / ".env.example").read_text(encoding="ascii").replace("\n# GETCAP", "\nGETCAP")
    (tool.folder / ".env").write_text(text, encoding="ascii")
    done = tool("-n", ROOT / "examples" / "images", "--caption-dir", "out")
    assert "4 planned" in done.stderr
    assert server.stats()["requests"] == 0


def test_all_lists_of_requirements_say_the_same() -> None:
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.MULTILINE | re.DOTALL)
    assert block
    script = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(script["dependencies"]) == requirements("requirements.txt")
    assert set(project["dependencies"]) == requirements("requirements.txt")
    local = requirements("requirements-local.txt") - {"--only-binary xllamacpp"}
    assert set(project["optional-dependencies"]["local"]) == local
    assert script["requires-python"] == project["requires-python"] == ">=3.11"


def test_every_message_that_is_explained_is_one_of_the_tool() -> None:
    rows = re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|", DOCS["messages.md"], re.MULTILINE)
    assert rows
    words = " ".join(re.sub(r'"\s*\n\s*f?"', "", SOURCE).split())  # texts that go on in a new line
    for message in re.findall(r"`(.+?)`", " ".join(rows)):
        assert message in words, message


def test_every_file_that_the_pages_link_to_is_there() -> None:
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in DOCS.values())]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (folder / target).exists(), target


def test_the_changelog_knows_the_version() -> None:
    assert f"## {gc.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_examples_are_captioned_and_their_origin_is_stated(tool: Tool, server: Server) -> None:
    images, config = ROOT / "examples" / "images", ROOT / "examples" / "config"
    tool("--image-dir", images, "--caption-dir", "out", "--config-dir", config)
    written = captions(tool.folder / "out")
    assert sorted(written) == ["cat.txt", "coffee.txt", "night/rocket.txt", "shapes.txt"]
    assert server.stats()["wrong"] == []
    origin = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for path in images.rglob("*.*"):
        assert path.relative_to(ROOT / "examples").as_posix() in origin


def test_the_run_that_the_readme_shows_looks_like_a_real_one(tool: Tool) -> None:
    example = re.search(
        r"^\$ gen-captions \./images (.*)\n(.*)\n\$ cat .*\n(.*)$", README, re.MULTILINE
    )
    assert example
    options, summary, caption = example.groups()
    images = ROOT / "examples" / "images"
    done = tool(images, "--caption-dir", "out", "--price", "0.10/0.50", *options.split())
    shape = re.sub(r"[\d,.]+", "1", summary)
    assert re.sub(r"[\d,.]+", "1", done.stderr.splitlines()[-1]) == shape
    assert all(text.startswith(caption[:6]) for text in captions(tool.folder / "out").values())


def test_the_stand_in_server_runs_a_command_and_ends_with_it(tool: Tool) -> None:
    server = [sys.executable, str(ROOT / "tests" / "vision_server.py"), "--"]
    images = str(ROOT / "examples" / "images")
    command = [*server, sys.executable, str(TOOL), images, "--caption-dir", "out"]
    done = subprocess.run(
        command,
        cwd=tool.folder,
        env=tool.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = captions(tool.folder / "out").values()
    assert all(text.startswith("Stand-in for a caption") for text in written)


def test_the_stand_in_server_needs_no_test_tools() -> None:
    source = (ROOT / "tests" / "vision_server.py").read_text(encoding="utf-8")
    needed = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert set(needed) <= {*sys.stdlib_module_names, "aiohttp", "PIL"}
