"""Review: each finding where it should be and silent where not; the page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gen_captions as gc
from conftest import TOOL, ImageMaker, Server, Tool

TRIGGER = gc.Trigger("[trigger]", "ohwx", "job.yaml")
RECIPE = gc.Recipe("Caption it.", "built in", "", "", trigger=TRIGGER, exclude=("blue eyes",), architecture="sdxl")
HEALTHY = [
    "[trigger], a man in a red coat stands in a park. Soft light from the left.",
    "ohwx, a woman holds a sign that reads “Sorry, I can’t”.",
    "[trigger] cat on a wall",
    "ohwx, portrait, smiling, outdoors",
    "ohwx, a cat on a mat. It purrs 😊",
    "ohwx",
    "ohwx, 1girl, solo, outdoors,",
    "ohwx, a room with the lights turned on",
    "ohwx, ein Kind zieht seine Jacke an",
    "ohwx, a woman at a window. She looks out",
    "ohwx, The picture frame shows signs of wear. It hangs on a wall.",
    "ohwx, 1girl, long_hair, ^_^, looking_at_viewer",
    "ohwx, a photo of a man by J. R. Smith",
    "ohwx, a page that reads “Error: file not found”. The paper is yellow.",
    "ohwx, sorry-looking dog in the rain",
    "[trigger], a café at night, its sign in red neon, seen from across the street.",
    "[trigger], a poster in the style of 5 * 3 and a_b_c.",
    "ohwx, a girl who smiles :(",
    'ohwx, a 6" nail on a board',
    "ohwx, This photo booth shows signs of age.",
    "“ohwx” is written on a wall behind ohwx.",
    "ohwxの猫が座っている。",
    'ohwx, a 12" vinyl record titled "Blue Train" against a crate.',
    'ohwx, a 3½" floppy disk on a keyboard.',
    "ohwx, a smiling boy showing the big fish he is holding",
    "ohwx, a chart that shows how tall the buildings are",
    "ohwx, a sad cat :-( on a wall",
    'ohwx, ein Schild: „Kein Eintritt" hängt an der Tür.',
    "ohwx can't help but smile at the camera.",
    "ohwx man standing in a kitchen. He wears a blue apron. Warm morning light from the left, candid photo, 35mm, natural skin texture",
    "ohwx, คน\u200bเดิน\u200bใน\u200bสวน",
]
WORDS = [  # a caption, the kinds that are found in it
    ("[trigger], I'm sorry, I cannot help with that.", ["refused"]),
    ("Error: CUDA out of memory", ["error text", "trigger missing"]),
    ("ohwx, <think>The user wants a caption.</think> A man.", ["reasoning"]),
    ("[trigger], The user wants a caption of this image.", ["reasoning"]),
    ("ohwx, This image shows a man in a park.", ["opening"]),
    ("[trigger], The photograph depicts a man.", ["opening"]),
    ("[trigger], In this image, a man stands in a park.", ["opening"]),
    ("[trigger], An image of a man in a park.", ["opening"]),
    ("[trigger], The image appears to show a man.", ["opening"]),
    ("[trigger], Here is a caption for the image: A man in a park.", ["opening"]),
    ("[trigger], a **man** in a park.", ["markup"]),
    ("[trigger], a man in a park. He looks to the", ["cut off"]),
    ("[trigger], a man in a park. He looks at a bird. It flies over the", ["cut off"]),
    (
        "[trigger], a man in a park. " + "He looks at a bird on the wall beside him. " * 2 + "It is brown with white",
        ["cut off"],
    ),
    ("ohwx, a man. " + "A bird sits on a wall and sings. " * 6, ["looping"]),
    ("a man in a park.", ["trigger missing"]),
    ("[trigger], ohwx stands in a park.", ["trigger twice"]),
    ("ohwx, ohwx and his dog.", ["trigger twice"]),
    ("Ohwx, a man in a park.", ["trigger in another case"]),
    ("[Trigger] a man.", ["trigger in another case"]),
    ("a man with ohwxing hair.", ["trigger in a word"]),
    ("[trigger], a man with Blue  eyes.", ["excluded words"]),
    ("[trigger], " + ", ".join(f"a thing number {n}" for n in range(30)) + ".", ["too long"]),
    ("ohwx, In the picture we can see a man.", ["opening"]),
    ("ohwx, The scene depicts a man in a park.", ["opening"]),
    ("ohwx, We see a man in a park.", ["opening"]),
    ("ohwx, Title: a man in a park.", ["opening"]),
    ("ohwx, This is an image of a man.", ["opening"]),
    ("ohwx, The image you sent depicts a man.", ["opening"]),
    ("ohwx, arafed man in a park", ["opening"]),
    ("ohwx, <p>A man in a park.</p>", ["markup"]),
    ("ohwx, a man\u00ad in\u202e a park.", ["invisible characters"]),
    ("ohwx, a man in a park while", ["cut off"]),
    ("ohwx, a man who looks at his", ["cut off"]),
    ("ohwx, I can see a man in a park.", ["opening"]),
    ("ohwx, The image contains a man.", ["opening"]),
    ("ohwx, This appears to be a photo of a man.", ["opening"]),
    ("ohwx, Das Bild zeigt einen Mann.", ["opening"]),
    ("ohwx, 这张图片展示了一个男人。", ["opening"]),
    ('ohwx, a sign that reads "OPEN', ["cut off"]),
    ("ohwx, a man in a park (with a dog", ["cut off"]),
    ("ohwx, 男の人が公園に立っている。彼は赤いコートを着ていて、手に大きな傘を持っている。背景には古い", ["cut off"]),
    ("", []),
]


def kinds(found: list[tuple[str, str]]) -> list[str]:
    return [kind for kind, _ in found]


@pytest.mark.parametrize("text", HEALTHY)
def test_a_healthy_caption_has_no_findings(text: str) -> None:
    assert gc.judge_caption(text, RECIPE) == []


@pytest.mark.parametrize(("text", "expected"), WORDS)
def test_what_is_wrong_with_the_words_is_found(text: str, expected: list[str]) -> None:
    if text:
        assert kinds(gc.judge_caption(text, RECIPE)) == expected


@pytest.mark.parametrize("text", ["一只小明坐在墙上", "小明在公园里。", "[trigger]，在公园里。"])
def test_a_trigger_in_a_script_without_blanks_needs_none_around_it(text: str) -> None:
    recipe = gc.Recipe("", "", "", "", trigger=gc.Trigger("[trigger]", "小明", "job.yaml"))
    assert gc.judge_caption(text, recipe) == []


def test_without_a_trigger_none_is_missed() -> None:
    assert gc.judge_caption("a man in a park.", gc.Recipe("", "", "", "")) == []


BYTES = [
    (b"a caf\xc3\xa9\n", []),
    (b"a caf\xe9 in the rain, seen from the street\n", ["not UTF-8"]),
    (b"it\x92s a man\n", ["not UTF-8"]),
    (b"\xef\xbb\xbfa man\n", ["BOM"]),
    ("a man’s coat".encode("utf-16"), ["not UTF-8"]),
    ("a man\x92s coat".encode(), ["C1 controls"]),
    ("a cafÃ© in the rain".encode(), ["mojibake"]),
    (b"a man\na dog\n", ["several lines"]),
    (b"a man\n\n", []),
    ("a caf\ufffd in the rain".encode(), ["damaged letters"]),
    (b"\x81\x8d\x8f\x90\x9d", ["not UTF-8"]),
    (b"a caf? in Z?rich\n", ["damaged letters"]),
    (b"is it a man? no, a dog\n", []),
    (b"a page of example.org/watch?v=abc\n", []),
]


@pytest.mark.parametrize(("data", "expected"), BYTES)
def test_what_is_wrong_with_the_bytes_is_found(data: bytes, expected: list[str]) -> None:
    assert kinds(gc.read_caption(data)[1]) == expected


NAMES = [
    ("a.jpg", "JPEG", []),
    ("a.JPEG", "MPO", []),
    ("a.webp", "WEBP", []),
    ("a.png", "JPEG", ["wrong suffix"]),
    ("a.gif", "GIF", ["format not read"]),
    ("a.heic", "HEIF", ["format not read"]),
    ("a.bmp", "PNG", ["format not read", "wrong suffix"]),
]


@pytest.mark.parametrize(("name", "image_format", "expected"), NAMES)
def test_what_is_wrong_with_an_images_name_is_found(name: str, image_format: str, expected: list[str]) -> None:
    assert kinds(gc.judge_name(name, image_format)) == expected


def found_in_set(*samples: Any) -> list[list[str]]:
    gc.judge_set(samples)
    return [[finding.kind for finding in sample.findings] for sample in samples]


def sample(image: str, text: str = "") -> Any:
    return gc.Sample(image, image + ".txt", text)


def test_captions_alike_are_found_but_for_the_first() -> None:
    assert found_in_set(sample("a", "A  man."), sample("b", "A dog."), sample("c", "a man.")) == [
        [], [], ["identical captions"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ("一只猫坐在墙上", ["wrong script"]),
        ("A man holds a 猫 and a 狗 today", ["wrong script"]),
        ("Кошка сидит на стене", ["wrong script"]),
        ("\u0410 man in a park", ["wrong script"]),
        ("A man holds a sign that reads “猫と犬”.", []),
        ("A café in Zürich, 5 µm", []),
        ("An equation with α and β on a board, 10 Ω", []),
        ("A street sign reads '渋谷駅' in white.", []),
        ("A mosque wall with the word الله in gold", []),
        ("1, 2, 3", []),
        ("A 女孩 in a park", ["wrong script"]),
    ],
)
def test_another_script_than_in_the_rest_is_found(odd: str, expected: list[str]) -> None:
    rest = [sample(f"{n}", f"A man number {n}.") for n in range(4)]
    assert found_in_set(*rest, sample("z", odd))[-1] == expected


def test_a_set_in_another_language_is_not_odd() -> None:
    texts = ["一只猫坐在墙上", "一只狗在公园里 LED", "男人穿着红色外套", "A man in a park"]
    assert found_in_set(*(sample(str(n), text) for n, text in enumerate(texts))) == [[], [], [], ["wrong script"]]


def test_a_japanese_set_is_of_one_script() -> None:
    texts = ["人々がコーヒーを飲む", "ラーメンの店", "猫がﾃﾚﾋﾞを見る", "夜の街、ネオン"]
    assert found_in_set(*(sample(str(n), text) for n, text in enumerate(texts))) == [[], [], [], []]


def test_names_that_an_upload_would_merge_are_found() -> None:
    assert found_in_set(sample("x/東京.png"), sample("x/大阪.png"), sample("y/京都.png"), sample("x/a-1.png")) == [
        [], ["merged names"], [], []
    ]  # fmt: skip


LIMITS = [
    ("sdxl", 75), ("sd1", 75), ("flux", 512), ("flex2", 512), ("wan22_14b", 512), ("qwen_image_edit", 512),
    ("hidream", 128), ("lumina2", 256), ("ponyDiffusionV6XL.safetensors", 75), ("PixArt-Sigma-XL", 300),
    ("PixArt-XL", 120), ("stable-diffusion-3.5-large", None), ("v1-5-pruned", 75), ("NoobAI-v1", 75), ("ltx2", 1024), ("something else", None), ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "limit"), LIMITS)
def test_a_models_limit_is_known_by_its_name(architecture: str, limit: int | None) -> None:
    assert gc.token_limit(architecture) == limit


MODELS = [
    ({"name_or_path": "black-forest-labs/FLUX.1-dev", "is_flux": True}, "flux"),
    ({"name_or_path": "stabilityai/x", "is_xl": True}, "sdxl"),
    ({"name_or_path": "Qwen/Qwen-Image", "arch": "qwen_image"}, "qwen_image"),
    ({"name_or_path": r"C:\models\pony.safetensors"}, "pony.safetensors"),
    ({}, ""),
    ("flux", ""),
]


@pytest.mark.parametrize(("model", "architecture"), MODELS)
def test_the_job_file_says_which_model_is_trained(model: Any, architecture: str) -> None:
    assert gc.read_architecture(model) == architecture


def test_what_a_set_silently_teaches_is_found_and_grammar_is_not() -> None:
    texts = [f"a man with blue eyes number {n} in the {place}" for n, place in enumerate(["park", "rain"] * 10)]
    phrases = dict(gc.find_phrases(texts))
    assert phrases["man with blue eyes number"] == 1.0
    assert "in the" not in phrases
    assert not [phrase for phrase in phrases if phrase in {"blue eyes", "with blue"}]  # parts of the longer one


def test_a_few_captions_teach_nothing_yet() -> None:
    assert gc.find_phrases(["a man in a park"] * 4) == []


@pytest.fixture
def faulty(tool: Tool, make_image: ImageMaker) -> Path:
    """A set with one fault of each kind that only files have."""
    for name in ("fine.jpg", "bare.jpg", "blank.png", "two.jpg", "two.png", "odd.webp", "old.bmp", "wrong.png"):
        make_image(name)
    folder = tool.folder / "images"
    (folder / "broken.jpg").write_bytes(b"no picture")
    shutil.copy(folder / "fine.jpg", folder / "wrong.png")
    for name in ("fine", "broken", "old", "wrong"):
        (folder / f"{name}.txt").write_text(f"ohwx, a {name} picture of a house.\n", encoding="utf-8")
    (folder / "blank.txt").write_text(" \n", encoding="utf-8")
    (folder / "odd.caption").write_text("ohwx, a house.", encoding="utf-8")
    (folder / "lonely.txt").write_text("ohwx, a house on a hill.\n", encoding="utf-8")
    return folder


def review(tool: Tool, *arguments: str, code: int = 1) -> dict[str, list[str]]:
    """Return the files of each kind of finding."""
    tool("--review", "--image-dir", "images", "--trigger", "ohwx", "--report", "findings.jsonl", *arguments, code=code)
    lines = (tool.folder / "findings.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for line in map(json.loads, lines):
        assert line["outcome"] == "finding"
        found.setdefault(line["kind"], []).append(Path(line["path"]).name)
    return found


@pytest.mark.usefixtures("faulty")
def test_what_is_wrong_with_the_files_is_found(tool: Tool, server: Server) -> None:
    assert review(tool) == {
        "no caption": ["bare.jpg"],
        "blank caption": ["blank.png"],
        "not an image": ["broken.jpg"],
        "another extension": ["odd.caption"],
        "format not read": ["old.bmp"],
        "shared caption file": ["two.jpg", "two.png"],
        "wrong suffix": ["wrong.png"],
        "caption without an image": ["lonely.txt"],
    }
    assert server.stats()["requests"] == 0


def test_what_no_header_tells_is_found(tool: Tool, make_image: ImageMaker) -> None:
    for name in ("half.jpg", "half.png"):
        whole = make_image(name, size=(640, 480)).read_bytes()
        (tool.folder / "images" / name).write_bytes(whole[: len(whole) // 2])
    padded = make_image("padded.jpg")
    padded.write_bytes(padded.read_bytes() + bytes(5000))  # as phones do
    make_image("other.jpg").rename(tool.folder / "images" / "other.jfif")
    for name in ("half", "padded", "README"):
        (tool.folder / "images" / f"{name}.txt").write_text(f"ohwx, the {name} of a house.\n", encoding="utf-8")
    assert review(tool) == {
        "shared caption file": ["half.jpg", "half.png"],
        "damaged image": ["half.jpg", "half.png"],
        "format not read": ["other.jfif"],
    }


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_captions_behind_a_link_have_their_image(tool: Tool, make_image: ImageMaker) -> None:
    make_image("z/a.jpg")
    (tool.folder / "images" / "a").symlink_to("z")
    tool("--image-dir", "images", "--trigger", "ohwx")
    assert review(tool, code=0) == {}


def test_an_empty_page_is_filled(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    (tool.folder / "page.html").touch()
    review(tool, "--review", "page.html")
    assert "a.jpg" in (tool.folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("faulty")
def test_a_reader_that_has_seen_enough_changes_neither_code_nor_page(tool: Tool) -> None:
    command = [sys.executable, str(TOOL), "--review", "--image-dir", "images"]
    process = subprocess.Popen(command, cwd=tool.folder, env=tool.environment, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert (tool.folder / "images" / "review.html").stat().st_size > 10_000


@pytest.mark.skipif(os.name == "nt", reason="limits of a process")
def test_a_page_that_does_not_fit_is_named_and_the_findings_are_not_lost(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    command = f"ulimit -f 1; exec {sys.executable} {TOOL} --review --image-dir images"  # blocks of 512 or 1,024 bytes
    done = subprocess.run(
        ["sh", "-c", command], check=False, cwd=tool.folder, env=tool.environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "No caption (1)" in done.stdout
    assert "--review: images/review.html: cannot be written: " in done.stderr
    assert not (tool.folder / "images" / "review.html").exists()


@pytest.mark.usefixtures("faulty")
def test_each_finding_says_what_it_does_and_what_to_do(tool: Tool) -> None:
    out = tool("--review", "--image-dir", "images", "--trigger", "ohwx", code=1, OPENAI_API_KEY="").stdout
    assert (
        "No caption (1): is trained with the trigger alone, or stops the training; run this without --review.\n" in out
    )
    assert "    images/bare.jpg\n" in out.replace("\\", "/")
    assert "Findings 9; all is shown in " in out


def test_a_set_that_is_right_is_code_0_and_nothing_of_it_changes(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    tool("--image-dir", "images", "--trigger", "ohwx")
    before = {path: path.read_bytes() for path in tool.folder.rglob("*") if path.is_file()}
    assert review(tool, code=0) == {}
    after = {path: path.read_bytes() for path in tool.folder.rglob("*") if path.is_file()}
    new = {path.name for path in after.keys() - before.keys()}
    assert new == {"review.html", "findings.jsonl"}
    assert before.items() <= after.items()
    assert review(tool, code=0) == {}  # our page is replaced


JOB = """job: extension
config:
  name: x
  process:
    - {{type: sd_trainer, trigger_word: ohwx, model: {{arch: sdxl}}, datasets: [{{folder_path: {folder}, caption_ext: {ext}}}]}}
"""


def write_job(tool: Tool, ext: str) -> None:
    (tool.folder / "config").mkdir()
    job = JOB.format(folder=json.dumps(str(tool.folder / "images")), ext=ext)
    (tool.folder / "config" / "job.yaml").write_text(job, encoding="utf-8")


def test_captions_where_the_trainer_does_not_look_are_found(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    write_job(tool, "txt")
    tool("--image-dir", "images", "--caption-dir", "captions", "--trigger", "ohwx")
    assert review(tool, "--caption-dir", "captions", code=0) == {}
    found = review(tool, "--caption-dir", "captions", "--config-dir", "config")
    assert found == {"captions elsewhere": ["job.yaml"]}


def test_an_extension_that_the_job_file_does_not_read_is_found(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    write_job(tool, "caption")
    tool("--image-dir", "images", "--caption-ext", "txt", "--trigger", "ohwx")
    assert review(tool, "--config-dir", "config", "--caption-ext", "txt") == {"extension not read": ["job.yaml"]}
    assert review(tool, "--config-dir", "config") == {"another extension": ["a.txt"]}


def test_the_limit_of_the_model_in_the_job_file_counts(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    write_job(tool, "txt")
    text = "ohwx, " + ", ".join(f"a thing called {n}" for n in range(40)) + ".\n"
    (tool.folder / "images" / "a.txt").write_text(text, encoding="utf-8")
    assert review(tool, code=0) == {}
    assert review(tool, "--config-dir", "config") == {"too long": ["a.txt"]}


def test_a_page_that_is_somebody_elses_is_not_replaced(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    page = tool.folder / "images" / "review.html"
    page.write_text("<!doctype html><title>mine</title>", encoding="utf-8")
    err = tool("--review", "--image-dir", "images", code=2).stderr
    assert "--review: images" in err
    assert "name another file" in err
    assert page.read_text(encoding="utf-8").endswith("mine</title>")
    tool("--review", "other.html", "--image-dir", "images", code=1)
    assert (tool.folder / "other.html").exists()


def test_a_job_file_about_another_folder_does_not_judge_this_one(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    (tool.folder / "config").mkdir()
    job = JOB.format(folder='"/data/elsewhere"', ext="txt")
    (tool.folder / "config" / "job.yaml").write_text(job, encoding="utf-8")
    text = "ohwx, " + ", ".join(f"a thing called {n}" for n in range(40)) + ".\n"
    (tool.folder / "images" / "a.txt").write_text(text, encoding="utf-8")
    assert review(tool, "--config-dir", "config", code=0) == {}


def test_the_caption_of_a_video_is_not_without_an_image(tool: Tool, make_image: ImageMaker) -> None:
    path = make_image("a.jpg")
    for name in ("a.txt", "b.txt"):
        path.with_name(name).write_text(f"ohwx, a house called {name[0]}.\n", encoding="utf-8")
    path.with_name("b.mp4").touch()
    assert review(tool, code=0) == {}


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_pipe_as_page_is_refused_without_waiting(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    os.mkfifo(tool.folder / "p.html")
    assert "--review: p.html" in tool("--review", "p.html", "--image-dir", "images", code=2).stderr


@pytest.mark.parametrize("target", ["notes.txt", "nowhere/page.html"])
def test_a_page_that_cannot_be_is_a_usage_error(tool: Tool, make_image: ImageMaker, target: str) -> None:
    make_image("a.jpg")
    assert "--review: " in tool("--review", target, "--image-dir", "images", code=2).stderr


COMBINATIONS = [
    (["--undo"], "--undo and --review: take one of them"),
    (["--fix-encoding"], "--fix-encoding and --review: take one of them"),
    (["--limit", "3"], "--limit: belongs to captioning"),
    (["--overwrite"], "--overwrite: belongs to captioning"),
    (["--caption-dir", "nowhere"], "--caption-dir: nowhere: there is no such folder"),
]


@pytest.mark.parametrize(("flags", "said"), COMBINATIONS)
def test_what_does_not_go_with_a_review_is_a_usage_error(
    tool: Tool, make_image: ImageMaker, flags: list[str], said: str
) -> None:
    make_image("a.jpg")
    assert said in tool("--review", "--image-dir", "images", *flags, code=2).stderr


def test_page_and_report_are_two_files(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    tool("--image-dir", "images", "--review", "a.html", "--report", "./a.html", code=2)
    assert not (tool.folder / "a.html").exists()


def test_a_dry_review_writes_no_page(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    assert tool("--review", "-n", "--image-dir", "images", code=1).stdout.endswith("\nFindings 1\n")
    assert not (tool.folder / "images" / "review.html").exists()


def test_what_the_journal_knows_is_shown(tool: Tool, make_image: ImageMaker) -> None:
    for name in ("a.jpg", "b.jpg"):
        make_image(name)
    tool("--image-dir", "images", "--price", "0.1", "0.5", "--model", "gpt-test")
    caption = tool.folder / "images" / "b.txt"
    caption.write_text(caption.read_text(encoding="utf-8").replace("Stand-in", "By hand"), encoding="utf-8")
    out = tool("--review", "--image-dir", "images").stdout
    assert "1 edited by hand since they were made; $0.0003 spent on them" in out
    facts = [row["facts"] for row in page_data(tool.folder / "images" / "review.html")["samples"]]
    assert facts[0].endswith("tokens · gpt-test · $0.0001")
    assert facts[1].endswith("· edited since")


HOSTILE = [
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\"> <b>bold</b>",
    "مرحبا بالعالم on a sign \u202ereversed\u202c, 👩‍👩‍👧 family",
    "{{style}} {data} %s ${x} `y`",
]


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_asks_for_nothing_outside(tool: Tool, make_image: ImageMaker) -> None:
    make_image("a #1?.jpg")
    (tool.folder / "images" / "a #1?.txt").write_text(HOSTILE[0], encoding="utf-8")
    tool("--review", "--image-dir", "images", code=0)
    page = tool.folder / "images" / "review.html"
    text = page.read_text(encoding="utf-8")
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == 2
    row = page_data(page)["samples"][0]
    assert (row["href"], row["text"]) == ("./a%20%231%3F.jpg", HOSTILE[0])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium that loads from disk."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright, to test the page")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium), so the page was not tested")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.name != "nt" else [])
        yield running
        running.close()


def open_page(browser: Any, path: Path) -> tuple[Any, list[str]]:
    """Return the open page, and what it complained about or asked for elsewhere."""
    page, trouble = browser.new_page(), []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else trouble.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.getElementById('count').value")
    return page, trouble


def test_hostile_captions_are_text_and_run_nothing(tool: Tool, make_image: ImageMaker, browser: Any) -> None:
    for number, text in enumerate(HOSTILE):
        make_image(f"{number} ü#%.jpg")
        (tool.folder / "images" / f"{number} ü#%.txt").write_text(text, encoding="utf-8")
    tool("--review", "--image-dir", "images", code=1)
    page, trouble = open_page(browser, tool.folder / "images" / "review.html")
    assert page.locator("#sheet .caption").all_text_contents() == HOSTILE
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth === 64)")
    assert "run" not in page.title().split()
    assert trouble == []


def test_ten_thousand_captions_load_filter_search_and_sort(tmp_path: Path, browser: Any) -> None:
    samples = [
        gc.Sample(f"{tmp_path}/{n}.jpg", f"{tmp_path}/{n}.txt", f"A man with {n} birds." + " More." * (n % 7))
        for n in range(10_000)
    ]
    samples[7].find("refused", "no")
    page_file = tmp_path / "review.html"
    page_file.write_text(gc.build_page("set", samples, [], [("a man", 1.0)], str(tmp_path)), encoding="utf-8")
    started = time.monotonic()
    page, _ = open_page(browser, page_file)
    assert time.monotonic() - started < 10  # benchmarks/README.md has the figure; this only catches what hangs
    count = page.locator("#count")
    assert count.inner_text() == "10000 of 10000 shown"
    page.get_by_role("button", name="refused 1").click()
    assert count.inner_text() == "1 of 10000 shown"
    assert "a refusal is trained" in page.locator("#advice").inner_text()
    page.get_by_role("button", name="refused 1").click()
    page.get_by_role("searchbox").fill("With 1234 BIRDS")
    assert page.locator("#sheet .caption").all_text_contents() == [samples[1234].text]
    page.get_by_role("button", name="a man 100%").click()
    assert count.inner_text() == "10000 of 10000 shown"
    page.get_by_role("searchbox").fill("")
    page.get_by_role("combobox").select_option("longest")
    assert page.locator("#sheet .name").first.text_content() == "6.jpg"


def test_the_page_is_right_in_the_dark_and_on_a_phone(tmp_path: Path, browser: Any) -> None:
    samples = [gc.Sample("a.jpg", "a.txt", "A man. " * 40), gc.Sample("b.jpg", "b.txt", "x" * 400)]
    page_file = tmp_path / "review.html"
    page_file.write_text(gc.build_page("set", samples, [], [], str(tmp_path)), encoding="utf-8")
    page, _ = open_page(browser, page_file)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
