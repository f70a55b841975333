"""Recipe: what settings and config folder make of the prompt, the trigger and the extension."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions

ROOT = Path(gc.__file__).parent


def recipe(config: Path | None = None, *argv: str) -> gc.Recipe:
    places = ["--config-dir", str(config)] if config else []
    return gc.read_recipe(gc.resolve_settings([*places, *argv], {}))


def refuse(config: Path | None = None, *argv: str) -> str:
    """Return what is said where there is no recipe."""
    with pytest.raises(gc.SettingsError) as error:
        recipe(config, *argv)
    return str(error.value)


def told(server: Server) -> str:
    """Return the prompt of the last request."""
    return str(server.stats()["bodies"][-1]["messages"][0]["content"][0]["text"])


# ----------------------------------------------------------------------------------------- prompt


def test_the_setting_comes_before_prompt_txt_and_that_before_the_built_in_prompt(
    tmp_path: Path,
) -> None:
    for made in (recipe(), recipe(tmp_path)):
        assert "Prompt: built in" in made.lines
    (tmp_path / "prompt.txt").write_bytes("\ufeff\r\nSay “what” you see.\r\n\r\n".encode())
    made = recipe(tmp_path)
    assert made.prompt == "Say “what” you see."
    assert f"Prompt: {tmp_path / 'prompt.txt'}" in made.lines
    assert recipe(tmp_path, "--prompt", "mine").prompt == "mine"
    (tmp_path / "prompt.txt").write_text(" \n", encoding="utf-8")
    assert "Prompt: built in" in recipe(tmp_path).lines


@pytest.mark.parametrize("name", ["prompt.txt", "exclude.txt"])
@pytest.mark.parametrize("data", [b"caf\xe9", "x".encode("utf-16")])
def test_a_file_of_ours_that_cannot_be_read_is_an_error_that_names_it(
    tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    assert refuse(tmp_path).startswith(f"{tmp_path / name}: is not saved as UTF-8")


def test_placeholders_are_filled_in_for_each_image_and_other_braces_stay(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("10_cat/a {b}.jpg")
    (tool.folder / "images/10_cat/a {b}.txt").write_text("1girl, {folder}\n", encoding="utf-8")
    (tool.folder / "config").mkdir()
    (tool.folder / "config/exclude.txt").write_text("blue eyes", encoding="utf-8")
    arguments = ("images", "--config-dir", "config", "--caption-ext", "caption")
    prompt = '{name}|{folder}|{caption}|{exclude}|{other} {} {"a": {{1}}} {name.x} } {'
    tool(*arguments, "--prompt", prompt)
    filled = "a {b}|10_cat|1girl, {folder}|blue eyes|"
    assert told(server) == filled + prompt.partition("{exclude}|")[2]


@pytest.mark.parametrize("place", ["--prompt", "GETCAP_PROMPT", "prompt.txt"])
def test_the_trigger_in_a_prompt_is_a_usage_error_that_says_why(
    tool: Tool, server: Server, make_image: ImageMaker, place: str
) -> None:
    make_image("a.jpg")
    prompt = "Call it {trigger}."
    if place == "prompt.txt":
        (tool.folder / place).write_text(prompt, encoding="utf-8")
    flags = [place, prompt] if place == "--prompt" else []
    variables = {place: prompt} if place == "GETCAP_PROMPT" else {}
    err = tool("images", "--config-dir", ".", *flags, code=2, **variables).stderr
    assert place in err
    assert "take {trigger} out; the model is not told the trigger" in err
    assert server.stats()["requests"] == 0


def test_rules_that_a_prompt_of_ones_own_lacks_are_put_behind_it(tmp_path: Path) -> None:
    (tmp_path / "exclude.txt").write_text("blue eyes", encoding="utf-8")
    made = recipe(tmp_path, "--prompt", "Mine.", "--max-words", "40")
    unsaid = "Leave these unsaid, they are already known: {exclude}."
    assert made.prompt == f"Mine.\nUse at most 40 words.\n{unsaid}"
    assert recipe(tmp_path, "--prompt", "Not {exclude}.").prompt == "Not {exclude}."


@pytest.mark.parametrize(("style", "words"), [("prose", 90), ("short", 35), ("tags", 60)])
def test_each_style_has_a_prompt_that_holds_the_rules(
    tmp_path: Path, style: str, words: int
) -> None:
    bare = recipe(None, "--style", style).prompt
    assert f"at most {words} words" in bare
    assert ("End with the medium" in bare) == (style == "prose")
    (tmp_path / "exclude.txt").write_text("blue eyes", encoding="utf-8")
    prompt = recipe(tmp_path, "--style", style, "--max-words", "17").prompt
    assert "at most 17 words" in prompt
    assert "the medium" not in prompt  # it may be what is to be left unsaid
    assert "unsaid, they are already known: {exclude}.\nOutput only the" in prompt
    assert len(prompt.split()) < 150


@pytest.mark.parametrize(
    "text", ["blue eyes, freckles, red hair", "blue eyes\n\n  freckles \r\nred   hair,\n"]
)
def test_lines_and_commas_separate_what_is_excluded(tmp_path: Path, text: str) -> None:
    (tmp_path / "exclude.txt").write_bytes(text.encode())
    assert recipe(tmp_path).exclude == ("blue eyes", "freckles", "red hair")


def test_what_makes_a_caption_is_its_identity_and_the_trigger_is_not(tmp_path: Path) -> None:
    (tmp_path / "exclude.txt").write_text("red", encoding="utf-8")
    argvs = [[], ["--model", "x"], ["--prompt", "x"], ["--style", "tags"], ["--max-words", "9"]]
    identities = {recipe(None, *argv).identity for argv in argvs} | {recipe(tmp_path).identity}
    assert len(identities) == len(argvs) + 1
    assert recipe(None, "--trigger", "ohwx").identity in identities


# -------------------------------------------------------------------------------------- job files


def job(*datasets: dict[str, Any], trigger: Any = "ohwx") -> str:
    process = {"type": "sd_trainer", "trigger_word": trigger, "datasets": list(datasets)}
    return json.dumps({"job": "extension", "config": {"name": "x", "process": [process]}})


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """An image folder and a config folder."""
    for name in ("images", "config"):
        (tmp_path / name).mkdir()
    return tmp_path / "images", tmp_path / "config"


def read(folders: tuple[Path, Path], text: str, name: str = "job.yaml", *argv: str) -> gc.Recipe:
    (folders[1] / name).write_text(text, encoding="utf-8")
    return recipe(folders[1], "--image-dir", str(folders[0]), *argv)


# as ai-toolkit's examples have it, and as its web UI writes it
FLUX = """
job: extension
config:
  name: "flux_ch3lsea"
  process:
    - type: sd_trainer
      trigger_word: "ch3lsea"
      datasets:
        - folder_path: "{images}"
          caption_ext: ".caption"
        - folder_path: "{images}"
          caption_ext: "caption"
          resolution: [512, 768, 1024]
      model: {{name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true}}
"""
QWEN_UI = """
{{"job": "extension", "config": {{"name": "qwen_dog", "process": [{{"type": "diffusion_trainer",
"trigger_word": null, "datasets": [{{"folder_path": "{images}", "mask_path": null,
"default_caption": "", "caption_ext": "txt", "is_reg": false, "trigger_word": null}}],
"model": {{"name_or_path": "Qwen/Qwen-Image", "arch": "qwen_image"}}}}]}},
"meta": {{"name": "[name]", "version": "1.0"}}}}
"""
JSONC = """
// my job
{{"job": "extension", /* of
two lines */ "config": {{"name": "x", "process": [{{"trigger_word": "http://ohwx", "datasets":
[{{"folder_path": "{images}"}}]}}]}}}}
"""
LAST = """{{"config": {{"name": "x", "process": [{{"trigger_word": "ohwx", "datasets":
[{{"folder_path": "{images}"}}]}}]}}, "job": "extension"}}"""


@pytest.mark.parametrize(
    ("text", "name", "expected", "architecture"),
    [
        (FLUX, "job.YML", ("[trigger]", "ch3lsea", "caption"), "black-forest-labs/FLUX.1-dev"),
        ("\ufeff" + FLUX[1:], "bom.yaml", ("[trigger]", "ch3lsea", "caption"), ""),
        (QWEN_UI, ".job_config.json", ("", "", "txt"), "qwen_image Qwen/"),
        (JSONC, "job.jsonc", ("[trigger]", "http://ohwx", "txt"), ""),
        (LAST, "job.json", ("[trigger]", "ohwx", "txt"), ""),
    ],
)
def test_a_job_file_says_trigger_extension_and_model(
    folders: tuple[Path, Path],
    text: str,
    name: str,
    expected: tuple[str, str, str],
    architecture: str,
) -> None:
    made = read(folders, text.format(images=folders[0]), name)
    assert (made.trigger, made.trigger_word, made.caption_ext) == expected
    assert made.architecture.startswith(architecture)
    assert made.findings == ()
    assert f"Extension: {made.caption_ext} ({folders[1] / name})" in made.lines


@pytest.mark.parametrize(
    ("process", "dataset", "put"),
    [
        ("ohwx", {}, "[trigger]"),
        ("ohwx", {"trigger_word": None}, "[trigger]"),
        ("ohwx", {"trigger_word": ""}, ""),
        ("ohwx", {"is_reg": True}, ""),
        (None, {"trigger_word": "sks"}, "[trigger]"),
        (None, {}, ""),
        ("  ", {}, ""),
    ],
)
def test_a_datasets_own_trigger_goes_before_that_of_its_process(
    folders: tuple[Path, Path], process: str | None, dataset: dict[str, Any], put: str
) -> None:
    text = job({"folder_path": str(folders[0]), **dataset}, trigger=process)
    assert read(folders, text).trigger == put


def test_a_regularisation_set_gets_no_trigger_even_where_one_is_given(
    folders: tuple[Path, Path],
) -> None:
    text = job({"folder_path": str(folders[0]), "is_reg": True}, {"folder_path": "/data/dogs"})
    made = read(folders, text, "job.yaml", "--trigger", "ohwx")
    assert (made.trigger, made.trigger_word) == ("", "")
    assert "regularisation set" in " ".join(made.lines)


def test_without_a_matching_dataset_any_job_file_with_a_trigger_counts(
    folders: tuple[Path, Path],
) -> None:
    made = read(folders, job({"folder_path": "/data/dogs", "caption_ext": "caption"}))
    assert (made.trigger, made.trigger_word, made.caption_ext) == ("[trigger]", "ohwx", "txt")


@pytest.mark.parametrize(
    ("path", "ext"),
    [
        ("/workspace/images/", "txt"),  # of another machine
        ("{root}/link/../link/", "cap"),  # as real paths
        ("$HERE/images", "cap"),
        ("{root}/other/images", "txt"),  # another folder of this machine
    ],
)
def test_a_dataset_is_matched_by_its_real_path(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, path: str, ext: str
) -> None:
    root = folders[0].parent
    (root / "link").symlink_to(folders[0])
    (root / "other" / "images").mkdir(parents=True)
    monkeypatch.setenv("HERE", str(root))
    place = path.format(root=root)
    for names in ({"folder_path": place}, {"folder_path": "/x", "dataset_path": place}):
        assert read(folders, job({**names, "caption_ext": "cap"})).caption_ext == ext


def test_of_job_files_that_disagree_on_the_extension_the_first_counts_unless_a_setting_decides(
    folders: tuple[Path, Path],
) -> None:
    for name, ext in (("a.yaml", "txt"), ("b.yaml", ".caption")):
        text = job({"folder_path": str(folders[0]), "caption_ext": ext})
        (folders[1] / name).write_text(text, encoding="utf-8")
    place = ("--image-dir", str(folders[0]))
    for more, file, reads in (
        ((), "b.yaml", "caption"),
        (("--caption-ext", "caption"), "a.yaml", "txt"),
    ):
        (finding,) = recipe(folders[1], *place, *more).findings
        said = f"the trainer reads captions that end in {reads}"
        assert (finding.path, finding.detail) == (str(folders[1] / file), said)


@pytest.mark.parametrize("ext", ["json", "jpg", "t x t"])
def test_an_extension_that_captions_cannot_have_is_an_error_that_names_the_file(
    folders: tuple[Path, Path], ext: str
) -> None:
    with pytest.raises(gc.SettingsError, match=r"job\.yaml: caption_ext: "):
        read(folders, job({"folder_path": str(folders[0]), "caption_ext": ext}))


@pytest.mark.parametrize(
    "line", ["trigger_word: no", "trigger_word: 12:30", "trigger_word: 007", "trigger_word: [a]"]
)
def test_a_trigger_that_yaml_takes_for_no_text_is_an_error_that_explains_it(
    folders: tuple[Path, Path], line: str
) -> None:
    text = f"job: extension\nconfig:\n  name: x\n  process:\n  - {line}\n"
    said = r"job\.yaml: trigger_word: YAML reads it as .*; put it in quotes"
    with pytest.raises(gc.SettingsError, match=said):
        read(folders, text)


def test_name_in_a_trigger_is_the_jobs_and_no_key_is_filled_in(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123")
    assert read(folders, job(trigger="[name]_style")).trigger_word == "x_style"
    assert "sk-" not in str(read(folders, job(trigger="${OPENAI_API_KEY}")))


# ------------------------------------------------------------------- what is ours, and what is not


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.yaml", 'job: x\nconfig: {name: "C:\\data"}', ", line 2"),
        ("a.yml", "job: x\nconfig: [1, 2", ", line 2"),
        ("a.yaml", "job: x\nconfig:\n\t- b", ", line 3"),
        ("a.json", '{"job": 1,\n"config": 2,}', ", line 2"),
        ("a.jsonc", '/*\n\n*/ {"job": 1, // x\n"config": 2,}', ", line 4"),
        ("a.yaml", "job: x\nconfig: 2024-13-45", ""),
        ("a.yaml", "job: x\nconfig: " + "[" * 5000, ""),
        ("a.json", '{"job": ' + "[" * 100_000, ""),
        ("a.yaml", "job: x", ""),
        ("a.yaml", "job: x\nconfig: {process: [{datasets: [7]}]}", ""),
    ],
)
def test_a_broken_job_file_stops_before_anything_is_asked_and_names_file_and_line(
    tool: Tool, server: Server, make_image: ImageMaker, name: str, text: str, line: str
) -> None:
    make_image("a.jpg")
    (tool.folder / "config").mkdir()
    (tool.folder / "config" / name).write_text(text, encoding="utf-8")
    err = tool("images", "--config-dir", "config", code=2).stderr
    assert f"gen-captions: config/{name}{line}: this job file cannot be read: " in err
    assert len(err) < 400
    assert server.stats()["requests"] == 0
    assert captions(tool.folder) == {}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_a_job_file_in_another_encoding_is_an_error_that_says_how_to_save_it(
    folders: tuple[Path, Path], encoding: str
) -> None:
    (folders[1] / "job.yaml").write_bytes("job: café\nconfig: {}\n".encode(encoding))
    assert "job.yaml: is not saved as UTF-8; save it again" in refuse(folders[1])


FOREIGN = {
    "compose.yaml": "services: {web: {image: x}}",
    "many.yaml": "a: 1\n---\nb: 2\n",
    "mkdocs.yml": "key: !ENV [A, B]",
    "broken.yaml": "a: [1, 2",
    "tabs.yml": "a:\n\t- jobs: x\n",
    "latin.yaml": "a: café",
    "deep.json": "[" * 100_000,
    "list.json": '[1, {"job": 2}]',
    "broken.json": '{"a": 1,}',
    "data.json": '{"a.jpg": {"caption": "his job is hard"}}',
    "promtail.yaml": "scrape_configs:\n  - labels:\n      job: varlogs\n      x: !tag y\n",
    "comment.yaml": "# {job: x}\n",
    "text.yaml": "the job: to see",
    "empty.yaml": "",
    "notes.txt": "job: [",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_job_file_is_passed_over(folders: tuple[Path, Path], name: str) -> None:
    (folders[1] / name).write_bytes(FOREIGN[name].encode("cp1252"))
    (folders[1] / "folder.yaml").mkdir()
    (folders[1] / "examples").mkdir()
    (folders[1] / "examples" / "job.yaml").write_text(job(), encoding="utf-8")
    assert recipe(folders[1]) == recipe()


def test_a_large_foreign_file_costs_no_time(folders: tuple[Path, Path]) -> None:
    def seconds() -> float:
        started = time.perf_counter()
        read(folders, job({"folder_path": str(folders[0])}))
        return time.perf_counter() - started

    seconds()  # what is imported once
    alone = min(seconds() for _ in range(3))
    lines = "".join(f"- {{id: {n}, tags: [a, b], text: 'of a {n}'}}\n" for n in range(50_000))
    (folders[1] / "data.yaml").write_text(lines, encoding="utf-8")
    assert len(lines) > 2_000_000
    # to parse it takes some thousand times as long as to read the job file
    assert min(seconds() for _ in range(3)) < 100 * alone


def test_one_file_of_the_config_folder_can_be_named(folders: tuple[Path, Path]) -> None:
    for name in ("ann", "bob"):
        text = job({"folder_path": str(folders[0])}, trigger=name)
        (folders[1] / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folders[1] / "prompt.txt").write_text("Mine.", encoding="utf-8")
    (folders[1] / "broken.yaml").write_text("job: [", encoding="utf-8")
    for name in ("ann", "bob"):
        made = recipe(folders[1] / f"{name}.yaml", "--image-dir", str(folders[0]))
        assert (made.trigger_word, made.prompt) == (name, "Mine.")
    said = f"--config-dir: {folders[1] / 'prompt.txt'}: is no ai-toolkit job file"
    assert refuse(folders[1] / "prompt.txt") == said


def test_the_examples_job_file_is_understood(tool: Tool) -> None:
    config = ROOT / "examples" / "config"
    shown = tool("-n", ROOT / "examples" / "images", "--config-dir", config).stdout
    assert "Trigger: [trigger] (" in shown


# ------------------------------------------------------------------------------------ what is said


def test_dry_run_shows_the_recipe_and_where_each_part_comes_from(
    tool: Tool, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    config = tool.folder / "config"
    config.mkdir()
    text = job({"folder_path": "images", "caption_ext": "cap"})
    (config / "job.yaml").write_text(text, encoding="utf-8")
    (config / "prompt.txt").write_text("What is it?\nNot {exclude}.", encoding="utf-8")
    (config / "exclude.txt").write_text("blue eyes", encoding="utf-8")
    arguments = ("-n", "images", "--config-dir", "config", "--max-words", "40")
    shown = tool(*arguments).stdout
    for line in (
        "images/a.jpg -> images/a.cap",
        "Style: prose, at most 40 words",
        "Trigger: [trigger] (config/job.yaml, trigger_word ohwx)",
        "Extension: cap (config/job.yaml)",
        "Prompt: config/prompt.txt",
        "Left unsaid: blue eyes (exclude.txt)",
    ):
        assert f"{line}\n" in shown
    assert "Not {exclude}.\nUse at most 40 words.\n" in tool("-v", *arguments).stdout


def test_captions_that_the_trainer_would_not_find_are_said_once(
    tool: Tool, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    (tool.folder / "config").mkdir()
    text = job({"folder_path": "images"})
    (tool.folder / "config" / "job.yaml").write_text(text, encoding="utf-8")
    arguments = ("images", "--config-dir", "config")
    said = "the trainer looks beside the images; leave --caption-dir out"
    assert tool(*arguments, "--caption-dir", "out").stderr.count(said) == 1
    assert said not in tool(*arguments, "--caption-dir", "images").stderr
    err = tool(*arguments, "--caption-ext", "cap").stderr
    assert err.count("the trainer reads captions that end in txt") == 1
