"""Recipe: what the config folder and the settings make of the prompt, the trigger and the extension."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions


def recipe(config: Path | None, environ: dict[str, str] | None = None, **settings: Any) -> gc.Recipe:
    return gc.read_recipe(gc.Settings(config_dir=config, **settings), environ or {})


def prompt_of(config: Path | None, **settings: Any) -> tuple[str, str]:
    made = recipe(config, **settings)
    return made.prompt, made.prompt_source


# --------------------------------------------------------------------------------------------------- prompt


def test_the_built_in_prompt_serves_when_nothing_else_is_said(tmp_path: Path) -> None:
    assert recipe(None) == recipe(tmp_path) == recipe(tmp_path / "missing")
    assert recipe(None).prompt_source == "built in, prose"
    assert "at most 90 words" in recipe(None).prompt


def test_prompt_txt_comes_before_the_built_in_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("\ufeff\r\nSay “what” you see.\r\n\r\n".encode())
    assert prompt_of(tmp_path) == ("Say “what” you see.", str(tmp_path / "prompt.txt"))


def test_the_setting_comes_before_prompt_txt_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("file", encoding="utf-8")
    assert prompt_of(tmp_path, prompt="mine") == ("mine", "--prompt or GETCAP_PROMPT, not prompt.txt")
    assert prompt_of(None, prompt="mine") == ("mine", "--prompt or GETCAP_PROMPT")


@pytest.mark.parametrize("name", ["prompt.txt", "exclude.txt"])
@pytest.mark.parametrize(
    ("data", "said"),
    [(b" \n", "is blank"), (b"caf\xe9", "is not saved as UTF-8"), ("x".encode("utf-16"), "is not saved as UTF-8")],
)
def test_a_file_of_ours_that_cannot_be_used_is_an_error_that_names_it(
    tmp_path: Path, name: str, data: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(gc.SettingsError, match=said) as error:
        recipe(tmp_path)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("Describe {this}.", "{this} is no placeholder"),
        ("Describe {}.", "{} is no placeholder"),
        ("Describe {0}.", "{0} is no placeholder"),
        ("{name.__class__}", "is no placeholder"),
        ("{name!r}", "{name} is no placeholder"),
        ("{name:>99}", "{name} is no placeholder"),
        ("a } b", "Single '}'"),
        ("a { b", "expected '}'"),
    ],
)
def test_a_brace_that_is_no_placeholder_is_an_error_that_says_what_is_allowed(prompt: str, said: str) -> None:
    with pytest.raises(gc.SettingsError, match=re.escape(said)) as error:
        recipe(None, prompt=prompt)
    assert "allowed: {trigger}, {name}, {folder}, {caption}, {exclude}; literal braces" in str(error.value)


def test_placeholders_are_filled_in_for_each_image_and_braces_can_be_written(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("10_cat/a {b}.jpg")
    (tool.folder / "images" / "10_cat" / "a {b}.txt").write_text("1girl, {smile}\n", encoding="utf-8")
    (tool.folder / "config").mkdir()
    (tool.folder / "config" / "exclude.txt").write_text("blue eyes\n\n  red   hair \n", encoding="utf-8")
    prompt = "{trigger}|{name}|{folder}|{caption}|{exclude}|{{}}"
    arguments = ("--image-dir", "images", "--config-dir", "config", "--caption-ext", "caption")
    tool(*arguments, "--prompt", prompt, "--trigger", "ohwx")
    sent = server.stats()["bodies"][0]["messages"][0]["content"][0]["text"]
    assert sent == "ohwx|a {b}|10_cat|1girl, {smile}|blue eyes, red hair|{}"


def test_rules_that_a_prompt_of_ones_own_lacks_are_put_behind_it(tmp_path: Path) -> None:
    (tmp_path / "exclude.txt").write_text("blue eyes", encoding="utf-8")
    unsaid = "Leave these unsaid, they are already known: {exclude}."
    assert recipe(tmp_path, prompt="Mine.", max_words=40).prompt == f"Mine.\nUse at most 40 words.\n{unsaid}"
    assert recipe(tmp_path, prompt="Mine. Not {exclude}.").prompt == "Mine. Not {exclude}."


@pytest.mark.parametrize(("style", "words"), [("prose", 90), ("short", 35), ("tags", 60)])
def test_each_style_has_a_prompt_that_holds_the_rules(tmp_path: Path, style: str, words: int) -> None:
    (tmp_path / "exclude.txt").write_text("blue eyes", encoding="utf-8")
    assert f"at most {words} words" in recipe(tmp_path, style=style).prompt
    made = recipe(tmp_path, style=style, max_words=17)
    assert "at most 17 words" in made.prompt
    assert "unsaid, they are already known: {exclude}.\nOutput only the" in made.prompt
    assert len(made.prompt.split()) < 150


# ------------------------------------------------------------------------------------------------ job files


def job(*datasets: dict[str, Any], trigger: Any = "ohwx", name: str = "my_lora", kind: str = "sd_trainer") -> str:
    process = {"type": kind, "trigger_word": trigger, "datasets": list(datasets)}
    return json.dumps({"job": "extension", "config": {"name": name, "process": [process]}})


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """An image folder and a config folder."""
    for name in ("images", "config"):
        (tmp_path / name).mkdir()
    return tmp_path / "images", tmp_path / "config"


def read(folders: tuple[Path, Path], text: str, name: str = "job.yaml", **settings: Any) -> gc.Recipe:
    (folders[1] / name).write_text(text, encoding="utf-8")
    return recipe(folders[1], image_dir=folders[0], **settings)


# Of ai-toolkit's shape for four families, the last one as its web UI writes it; each once per resolution or more.
FLUX = """
job: extension
config:
  name: "flux_ch3lsea"
  process:
    - type: sd_trainer
      trigger_word: "ch3lsea"
      datasets:
        - folder_path: "{images}"
          caption_ext: "txt"
          resolution: [512, 768, 1024]
      model: {{name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true}}
"""
SDXL = """
job: extension
config:
  name: sdxl_style
  process:
    - type: 'sd_trainer'
      datasets:
        - folder_path: {images}
          trigger_word: inkw4sh
          caption_ext: caption
        - folder_path: /data/regularisation
          is_reg: true
          caption_ext: txt
      model: {{name_or_path: stabilityai/stable-diffusion-xl-base-1.0, is_xl: true}}
"""
WAN = """
job: extension
config:
  name: wan_motion
  process:
    - type: sd_trainer
      datasets:
        - {{folder_path: '{images}', caption_ext: .txt, num_frames: 40}}
        - {{folder_path: '{images}', caption_ext: txt, num_frames: 1}}
      model: {{name_or_path: Wan-AI/Wan2.1-T2V-14B-Diffusers, arch: wan21}}
"""
QWEN_UI = """
{{"job": "extension", "config": {{"name": "qwen_dog", "process": [{{"type": "diffusion_trainer", "trigger_word": null,
"datasets": [{{"folder_path": "{images}", "mask_path": null, "default_caption": "", "caption_ext": "txt",
"caption_dropout_rate": 0.05, "is_reg": false, "resolution": [512, 768], "trigger_word": null}}],
"model": {{"name_or_path": "Qwen/Qwen-Image", "arch": "qwen_image"}}}}]}},
"meta": {{"name": "[name]", "version": "1.0"}}}}
"""


@pytest.mark.parametrize(
    ("text", "name", "put", "word", "ext"),
    [
        (FLUX, "job.yaml", "[trigger]", "ch3lsea", "txt"),
        (SDXL, "job.yml", "[trigger]", "inkw4sh", "caption"),
        (WAN, "job.yaml", "", "", "txt"),
        (QWEN_UI, "job.json", "", "", "txt"),
    ],
)
def test_job_files_of_each_family_say_trigger_and_extension(
    folders: tuple[Path, Path], text: str, name: str, put: str, word: str, ext: str
) -> None:
    made = read(folders, text.format(images=folders[0]), name)
    assert (made.trigger.put, made.trigger.word, made.caption_ext, made.remarks) == (put, word, ext, ())
    assert name in made.ext_source


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
    made = read(folders, job({"folder_path": str(folders[0]), **dataset}, trigger=process))
    assert made.trigger.put == put


def test_without_a_matching_dataset_any_job_file_with_a_trigger_counts(folders: tuple[Path, Path]) -> None:
    made = read(folders, job({"folder_path": "/data/dogs", "caption_ext": "caption"}))
    assert (made.trigger.put, made.caption_ext) == ("[trigger]", "txt")
    assert made.trigger.source.endswith("no job file names these folders")
    assert read(folders, job(trigger="only_here")).trigger.word == "only_here"


@pytest.mark.parametrize("path", [r"D:\train\IMAGES", "/workspace/images/", "../elsewhere/images"])
def test_a_path_of_another_machine_matches_by_its_last_part_and_that_is_said(
    folders: tuple[Path, Path], path: str
) -> None:
    made = read(folders, job({"folder_path": path, "caption_ext": "caption"}))
    assert made.caption_ext == "caption"
    assert "is not on this machine; taken for the folder of the same name here" in made.remarks[0]


def test_another_folder_of_this_machine_with_the_same_name_does_not_match(folders: tuple[Path, Path]) -> None:
    other = folders[0].parent / "other" / "images"
    other.mkdir(parents=True)
    assert read(folders, job({"folder_path": str(other), "caption_ext": "caption"})).caption_ext == "txt"


def test_paths_are_compared_as_real_paths(folders: tuple[Path, Path]) -> None:
    link = folders[0].parent / "link"
    link.symlink_to(folders[0])
    assert read(folders, job({"folder_path": f"{link}/../link/", "caption_ext": "cap"})).caption_ext == "cap"


def test_dataset_path_wins_over_folder_path(folders: tuple[Path, Path]) -> None:
    dataset = {"folder_path": "/data/x", "dataset_path": str(folders[0]), "caption_ext": "cap"}
    assert read(folders, job(dataset)).caption_ext == "cap"


def test_job_files_that_disagree_on_the_extension_are_both_named_and_a_setting_decides(
    folders: tuple[Path, Path],
) -> None:
    for name, ext in (("a.yaml", "txt"), ("b.yaml", ".caption")):
        (folders[1] / name).write_text(job({"folder_path": str(folders[0]), "caption_ext": ext}), encoding="utf-8")
    with pytest.raises(gc.SettingsError, match=r"GETCAP_CAPTION_EXT.*a\.yaml says txt.*b\.yaml says caption"):
        recipe(folders[1], image_dir=folders[0])
    assert recipe(folders[1], image_dir=folders[0], caption_ext="cap").caption_ext == "cap"


@pytest.mark.parametrize("ext", ["json", "jpg", "t x t"])
def test_an_extension_that_captions_cannot_have_is_an_error_that_names_the_file(
    folders: tuple[Path, Path], ext: str
) -> None:
    with pytest.raises(gc.SettingsError, match=r"job\.yaml: caption_ext"):
        read(folders, job({"folder_path": str(folders[0]), "caption_ext": ext}))


def test_the_old_name_of_the_extension_wins_and_its_missing_dot_is_explained(folders: tuple[Path, Path]) -> None:
    made = read(folders, job({"folder_path": str(folders[0]), "caption_ext": "txt", "caption_type": "cap"}))
    assert made.caption_ext == "cap"
    assert "the trainer adds no dot" in made.remarks[0]


@pytest.mark.parametrize(
    ("yaml", "word", "said"),
    [
        ("trigger_word: no", "", "reads it as yes or no (False); put it in quotes"),
        ("trigger_word: 12:30", "750", "reads it as a number (750); put it in quotes"),
        ("trigger_word: 007", "7", "reads it as a number (7); put it in quotes"),
        ("trigger_word: [trigger]", "", "reads it as a list"),
        ("trigger_word: 2024-01-02", "", "reads it as no text"),
        ("trigger_word: {a: b}", "", "reads it as no text"),
        ("trigger_word: '[name]'", "x", ""),
        ("trigger_word: '${WORD}'", "ohwx", ""),
        ("trigger_word: '${UNSET}'", "${UNSET}", "${UNSET} is not set; ai-toolkit will refuse the file"),
    ],
)
def test_what_yaml_makes_of_a_trigger_is_explained(folders: tuple[Path, Path], yaml: str, word: str, said: str) -> None:
    text = f"job: extension\nconfig:\n  name: x\n  process:\n  - {yaml}\n"
    (folders[1] / "job.yaml").write_text(text, encoding="utf-8")
    made = recipe(folders[1], {"WORD": "ohwx"})
    assert made.trigger.word == word
    assert said in "".join(made.remarks)
    assert bool(made.remarks) == bool(said)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", 'job: x\nconfig: {name: "C:\\data"}', r"line 2, column 20: .*escape.* single quotes"),
        ("a.yml", "a: [1, 2", r"line 1, column 9: "),
        ("a.yaml", "a:\n\t- b", r"line 2, column 1: "),
        ("a.json", '{"a": 1,}', r"line 1, column \d: "),
        ("a.yaml", "a: \x07", "cannot be read as YAML or JSON"),
        ("a.yaml", "a: 2024-13-45", "cannot be read as YAML or JSON"),
        ("a.yaml", "[" * 5000, "cannot be read as YAML or JSON"),
        ("a.json", "[" * 100_000, "cannot be read as YAML or JSON"),
    ],
)
def test_broken_yaml_is_an_error_that_names_file_line_and_column(
    folders: tuple[Path, Path], name: str, text: str, said: str
) -> None:
    with pytest.raises(gc.SettingsError, match=rf"{re.escape(name)}: {said}"):
        read(folders, text, name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("compose.yaml", "services: {web: {image: x}}"),
        ("many.yaml", "a: 1\n---\nb: 2\n"),
        ("mkdocs.yml", "key: !ENV [A, B]"),
        ("list.json", "[1, 2]"),
        ("text.yaml", "only words"),
        ("empty.yaml", ""),
        ("data.json", '{"a.jpg": {"caption": "x"}}'),
        ("odd.yaml", "job: x\nconfig: {process: [1, null, {datasets: 7}, {datasets: [3]}]}"),
        (".hidden.yaml", "a: ["),
        ("notes.txt", "a: ["),
    ],
)
def test_what_is_no_job_file_is_passed_over(folders: tuple[Path, Path], name: str, text: str) -> None:
    assert read(folders, text, name) == recipe(None, image_dir=folders[0])


def test_a_windows_path_in_double_quotes_that_yaml_accepts_is_explained(folders: tuple[Path, Path]) -> None:
    made = read(folders, 'job: x\nconfig: {process: [{datasets: [{folder_path: "C:\\temp"}]}]}')
    assert "holds a control character; a Windows path belongs in single quotes" in made.remarks[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x: !!python/tuple [1]", "line 3: could not determine a constructor"),
        ('folder_path: "C:\\0data"', "cannot be read as a job file: embedded null byte"),
    ],
)
def test_a_job_file_that_cannot_be_read_is_no_other_programs_file(
    folders: tuple[Path, Path], line: str, said: str
) -> None:
    text = f"job: x\nconfig: {{process: [{{datasets: [{{a: 1}}]}}]}}\n{line}\n"
    if "folder_path" in line:
        text = f"job: x\nconfig: {{process: [{{datasets: [{{{line}}}]}}]}}\n"
    with pytest.raises(gc.SettingsError, match=rf"job\.yaml: {said}"):
        read(folders, text)


def test_a_key_is_not_filled_into_a_job_file(folders: tuple[Path, Path]) -> None:
    text = "job: x\nconfig: {process: [{trigger_word: '${OPENAI_API_KEY}'}]}"
    (folders[1] / "job.yaml").write_text(text, encoding="utf-8")
    assert "sk-" not in str(recipe(folders[1], {"OPENAI_API_KEY": "sk-secret-0123"}))


def test_sub_folders_of_the_config_folder_are_not_looked_into(folders: tuple[Path, Path]) -> None:
    (folders[1] / "examples").mkdir()
    assert read(folders, job({"folder_path": str(folders[0])}), "examples/job.yaml").trigger.put == ""


def test_the_examples_job_file_is_understood(tool: Tool) -> None:
    root = Path(gc.__file__).parent
    arguments = ("--image-dir", root / "examples" / "images", "--config-dir", root / "examples" / "config")
    assert "Trigger: [trigger] (" in tool("-n", *arguments).stdout


# --------------------------------------------------------------------------------------------- what is said


def test_dry_run_prints_the_recipe_and_where_each_part_comes_from(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    config = tool.folder / "config"
    config.mkdir()
    (config / "job.yaml").write_text(job({"folder_path": "images", "caption_ext": "cap"}), encoding="utf-8")
    (config / "prompt.txt").write_text("What is it?\nNot {exclude}.", encoding="utf-8")
    (config / "exclude.txt").write_text("blue eyes", encoding="utf-8")
    shown = tool("-n", "--image-dir", "images", "--config-dir", "config", "--max-words", "40").stdout
    assert shown.splitlines()[:9] == [
        "Style: prose, held to 40 words",
        "Trigger: [trigger] (config/job.yaml, trigger_word ohwx)",
        "Caption extension: cap (config/job.yaml)",
        "Left unsaid: blue eyes (exclude.txt)",
        "Prompt (config/prompt.txt):",
        "    What is it?",
        "    Not {exclude}.",
        "    Use at most 40 words.",
        "images/a.jpg: to caption -> images/a.cap",
    ]


def test_captions_that_the_trainer_would_not_find_are_said_once_with_the_two_ways_out(
    tool: Tool, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    (tool.folder / "config").mkdir()
    (tool.folder / "config" / "job.yaml").write_text(job({"folder_path": "images"}), encoding="utf-8")
    arguments = ("--image-dir", "images", "--config-dir", "config")
    said = tool(*arguments, "--caption-dir", "out").stderr
    assert said.count("the trainer looks for captions beside the images, not in out; leave --caption-dir out, or") == 1
    assert "--metadata FILE.json and set dataset_path" in said
    assert "beside the images" not in tool(*arguments, "--caption-dir", "images").stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("Ohwx", "the trigger_word ohwx of .*job.yaml differs only in case, and the trainer would put it in front too"),
        ("sks", "the trigger_word ohwx of .*job.yaml is another word, and the trainer would put it in front too"),
        ("ohwx", ""),
        ("ohwx man", ""),
    ],
)
def test_a_trigger_that_the_trainer_would_add_a_second_time_is_warned_about(
    folders: tuple[Path, Path], word: str, said: str
) -> None:
    made = read(folders, job({"folder_path": str(folders[0])}), trigger=word)
    assert re.search(said, "".join(made.remarks))
    assert bool(made.remarks) == bool(said)


def test_a_missing_config_folder_is_said_in_one_line_and_changes_nothing(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    assert tool("--image-dir", "images", "--config-dir", "nowhere").stderr.count("nowhere") == 1
    assert server.stats()["bodies"][0]["messages"][0]["content"][0]["text"] == recipe(None).prompt


@pytest.mark.parametrize(("excluded", "asked"), [("blue eyes", True), ("watercolour\npainting", False)])
def test_the_medium_is_asked_for_unless_it_must_stay_unsaid(tmp_path: Path, excluded: str, asked: bool) -> None:
    (tmp_path / "exclude.txt").write_text(excluded, encoding="utf-8")
    assert ("End with the medium" in recipe(tmp_path).prompt) == asked


def test_an_extension_that_yaml_takes_for_no_word_is_explained(folders: tuple[Path, Path]) -> None:
    made = read(
        folders, f"job: x\nconfig: {{process: [{{datasets: [{{folder_path: {folders[0]}, caption_ext: no}}]}}]}}"
    )
    assert made.caption_ext == "txt"
    assert "caption_ext: YAML reads it as yes or no (False); put it in quotes" in made.remarks[0]


def test_a_trigger_that_is_an_ordinary_word_is_warned_about(tool: Tool) -> None:
    (tool.folder / "images").mkdir()
    assert "the trigger cat is an ordinary word" in tool("-n", "--image-dir", "images", "--trigger", "cat").stderr


def test_broken_yaml_stops_before_anything_is_asked(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    (tool.folder / "config").mkdir()
    (tool.folder / "config" / "job.yaml").write_text("a: [", encoding="utf-8")
    assert "config/job.yaml: line 1, column" in tool("--image-dir", "images", "--config-dir", "config", code=2).stderr
    assert server.stats()["requests"] == 0
    assert captions(tool.folder) == {}
