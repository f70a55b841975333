"""Review: each finding where it should be and silent where not; the page in a real browser."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageCms

import gen_captions as gc
from conftest import ImageMaker, Tool, snapshot

SDXL = gc.Recipe("", "", "prose", None, ("blue eyes",), "[trigger]", "ohwx", architecture="sdxl")
TAGS = gc.Recipe("", "", "tags")
HEALTHY = [
    "[trigger] a man in a red coat stands in a park. Soft light from the left.",
    "ohwx, a woman holds a sign that reads “Sorry, I can’t”.",
    "ohwx, portrait, smiling, outdoors,",
    "ohwx",
    "ohwx, 1girl, long_hair, ^_^, looking_at_viewer",
    'ohwx, a 6" nail on a board',
    "ohwxの猫が座っている。",
    "a photo of ohwx  man by the sea",
    "ohwx, คน\u200bเดิน\u200bใน\u200bสวน",
    "ohwx, a sheet of paper with the formula {x} and a | b",
]
FAULTS = [  # what a caption file holds, and what is found in it
    ("[trigger] I'm sorry, I cannot help with that.", "refused"),
    ("ohwx, a man. " + "A bird sits on a wall and sings. " * 30, "looping"),
    ("ohwx, Here is a caption for the image: A man in a park.", "untidy"),
    ("ohwx, a man\u00ad in\u202e a park.", "untidy"),
    ("ohwx, a man\r\n\r\nin a park.", "untidy"),
    ("ohwx, <lora:name:0.8> a {red|blue} coat", "generator syntax"),
    ("ohwx, a man\nNegative prompt: blurry\nSteps: 20, Sampler: Euler", "generator syntax"),
    ("ohwx, a caf\ufffd in the rain", "damaged letters"),
    ("ohwx, a cafÃ© in the rain", "damaged letters"),
    ("\ufeffohwx, a man", "damaged letters"),
    ("ohwx, a man’s coat".encode("utf-16"), "not UTF-8"),
    (b"\x81\x8d\x8f\x90\x9d\x00\x01", "not UTF-8"),
    ("a man in a park.", "trigger missing"),
    ("Ohwx, a man in a park.", "trigger missing"),
    ("ohwx, a man with Blue eyes.", "excluded words"),
    ("ohwx, " + " ".join(f"{n * n} birds, {n * 7} cats." for n in range(30)), "too long"),
    (" \n\0", "no caption"),
]
REPAIRS = {
    "ohwx, **A man**\nin a park.": "ohwx, A man in a park.",
    "ohwx, a caf\udce9 in the rain, from a street": "ohwx, a café in the rain, from a street",
    "ohwx, it\\u2019s \\ud83d\\ude00": "ohwx, it’s 😀",
    "1girl, long_hair\nsolo": "1girl, long_hair, solo",
}


def kinds(sample: Any) -> list[str]:
    return [finding.kind for finding in sample.findings]


def look_at(path: Path, data: str | bytes, recipe: Any = SDXL) -> Any:
    path.write_bytes(data if isinstance(data, bytes) else os.fsencode(data))
    sample = gc.Sample(**{"caption" if path.suffix == ".txt" else "image": str(path)})
    gc.look_at(sample, recipe)
    return sample


@pytest.mark.parametrize("text", HEALTHY)
def test_a_healthy_caption_has_no_findings(tmp_path: Path, text: str) -> None:
    sample = look_at(tmp_path / "a.txt", text)
    gc.judge_set([sample])
    assert (kinds(sample), sample.repair) == ([], "")


@pytest.mark.parametrize(("data", "expected"), FAULTS)
def test_what_is_wrong_with_a_caption_is_found(tmp_path: Path, data: Any, expected: str) -> None:
    assert kinds(look_at(tmp_path / "a.txt", data)) == [expected]


@pytest.mark.parametrize(("text", "repair"), REPAIRS.items())
def test_the_repair_stands_beside_what_is_there(tmp_path: Path, text: str, repair: str) -> None:
    sample = look_at(tmp_path / "a.txt", text, SDXL if "ohwx" in text else TAGS)
    assert (len(sample.findings), sample.repair) == (1, repair)
    assert sample.text == os.fsencode(text).decode(errors="replace")


def wide_profile() -> bytes:  # sRGB with the green of Display P3
    place = struct.unpack(">I", SRGB[SRGB.index(b"gXYZ") + 4 :][:4])[0] + 8
    green = struct.pack(">iii", *(round(value * 65536) for value in (0.292, 0.692, 0.042)))
    return SRGB[:place] + green + SRGB[place + 12 :]


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
IMAGES: list[tuple[str, str, str, dict[str, Any], list[str]]] = [
    ("jpg", "RGB", "JPEG", {"icc_profile": SRGB}, []),
    ("JPG", "L", "MPO", {}, []),
    ("png", "RGBA", "PNG", {}, []),  # opaque
    ("png", "RGB", "PNG", {"icc_profile": b"broken"}, []),
    ("png", "RGB", "PNG", {"transparency": (255, 255, 255)}, ["shown otherwise"]),
    ("png", "P", "PNG", {"transparency": 0}, ["shown otherwise"]),
    ("png", "I;16", "PNG", {}, ["shown otherwise"]),
    ("jpg", "RGB", "JPEG", {"icc_profile": wide_profile()}, ["shown otherwise"]),
]


@pytest.mark.parametrize(("suffix", "mode", "kind", "options", "expected"), IMAGES)
def test_what_is_wrong_with_an_image_is_found(
    tmp_path: Path, suffix: str, mode: str, kind: str, options: Any, expected: list[str]
) -> None:
    file = io.BytesIO()
    Image.new(mode, (64, 48), "white").save(file, kind, **options)
    assert kinds(look_at(tmp_path / f"a.{suffix}", file.getvalue())) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_cut_off_half_way_is_found(tmp_path: Path, kind: str) -> None:
    file, path = io.BytesIO(), tmp_path / f"a.{kind.lower()}"
    Image.effect_noise((400, 300), 60).convert("RGB").save(file, kind)
    data = file.getvalue()
    assert kinds(look_at(path, data + bytes(5000))) == []  # as phones do
    assert kinds(look_at(path, data[: len(data) // 2])) in (["damaged image"], ["not an image"])


WRITTEN = "A man in a red coat number {n}. He walks through a park in the rain with a dog."
SETS = [  # how ten captions are written, another one, and what is found in that
    (WRITTEN, "A woman at a window", []),
    (WRITTEN, "A woman at a window. She looks out", ["cut off"]),
    (WRITTEN, "Cat.", ["very short"]),
    (WRITTEN, WRITTEN.format(n=3).upper(), ["identical captions"]),
    ("A man. Photo {n} in the rain", "A woman. Photo by the sea", []),
]


@pytest.mark.parametrize(("written", "text", "expected"), SETS)
def test_what_shows_beside_others_is_found(written: str, text: str, expected: list[str]) -> None:
    texts = [*(written.format(n=n) for n in range(10)), text]
    samples = [gc.Sample(caption=f"{n}.txt", clean=text) for n, text in enumerate(texts)]
    gc.judge_set(samples)
    assert [kinds(sample) for sample in samples] == [[]] * 10 + [expected]


def test_what_most_captions_say_is_found_and_grammar_is_not() -> None:
    texts = [
        f"A man with blue eyes, {n} trees in the {'park' if n % 2 else 'rain'}" for n in range(20)
    ]
    assert gc.find_phrases(texts) == [("blue eyes", "100%")]


def review(tool: Tool, *arguments: str, code: int = 1) -> dict[str, list[str]]:
    """Return the files of each kind of finding, as --report has them."""
    out = tool("--review", "images", "--report", "report.jsonl", *arguments, code=code).stdout
    found: dict[str, list[str]] = {}
    for line in map(json.loads, (tool.folder / "report.jsonl").read_text("utf-8").splitlines()):
        assert line["outcome"] == "finding"
        assert f"{line['gravity'].capitalize()}:\n" in out
        found.setdefault(line["kind"], []).append(Path(line["path"]).name)
    return found


@pytest.fixture
def faulty(tool: Tool, make_image: ImageMaker) -> Path:
    for name in ("fine.jpg", "bare.jpg", "blank.png", "two.jpg", "two.png", "odd.webp", "old.bmp"):
        make_image(name)
    folder = tool.folder / "images"
    shutil.copy(folder / "fine.jpg", folder / "twin.jpg")
    for name in ("broken.jpg", "film.mp4", "layers.psd"):
        (folder / name).write_text(name, encoding="utf-8")
    for name in ("fine", "broken", "old", "twin", "two", "layers"):
        (folder / f"{name}.txt").write_text(f"ohwx, a {name} house.\n", encoding="utf-8")
    (folder / "blank.txt").write_text(" \n", encoding="utf-8")
    (folder / "odd.caption").write_text("ohwx, a house.", encoding="utf-8")
    return folder


def test_faults_of_files_are_found_and_stay(tool: Tool, faulty: Path) -> None:
    before = snapshot(faulty)
    assert review(tool, "--trigger", "ohwx", "-n") == {
        "not an image": ["broken.jpg"],
        "no caption": ["bare.jpg", "blank.txt"],
        "another extension": ["odd.caption"],
        "shared caption file": ["two.jpg", "two.png"],
        "format not read": ["layers.psd", "old.bmp"],
        "identical images": ["twin.jpg"],
    }
    assert snapshot(faulty) == before  # -n writes no page either
    review(tool, "--review", "page.html")
    assert (snapshot(faulty), (tool.folder / "page.html").exists()) == (before, True)


def test_a_trigger_that_one_run_forgot_is_found_without_naming_it(
    tool: Tool, make_image: ImageMaker
) -> None:
    make_image("with.jpg")
    tool("images", "--trigger", "ohwx")
    make_image("without.jpg", colour=(0, 99, 0))
    done = tool("images")
    assert "1 caption was made with trigger ohwx (now none); --overwrite updates" in done.stderr
    assert review(tool)["trigger missing"] == ["without.txt"]


@pytest.mark.usefixtures("faulty")
def test_the_findings_are_printed_gravest_first_with_what_to_do(tool: Tool) -> None:
    done = tool("--review", "images", "--trigger", "ohwx", code=1, OPENAI_API_KEY="")
    out = done.stdout.replace("\\", "/")
    heads = [line for line in out.splitlines()[:-2] if line[0] != " "]
    assert heads == ["Stops the training:", "Is trained wrong:", "Is worth a look:"]
    assert "  another extension (1): the trainer does not read it; rename it.\n" in out
    assert "    images/odd.caption: .txt is read\n" in out
    verdict = "9 findings: 1 stops the training, 7 are trained wrong, 1 is worth a look."
    assert out.endswith(f"{verdict}\nAll is shown in images/review.html\n")
    assert verdict in (tool.folder / "images" / "review.html").read_text(encoding="utf-8")


def test_a_look_is_code_0_and_only_our_page_is_replaced(tool: Tool, make_image: ImageMaker) -> None:
    path = make_image("a.jpg")
    tool("images")
    assert tool("--review", "images").stdout.startswith("Nothing wrong found.\n")
    shutil.copy(path, path.with_name("twin.jpg"))
    path.with_name("twin.txt").write_text(
        "A grey house stands beside a wide river under a dark sky.", encoding="utf-8"
    )
    assert review(tool, code=0) == {"identical images": ["twin.jpg"]}
    page = path.with_name("review.html")
    page.write_text("<!doctype html><title>mine</title>", encoding="utf-8")
    done = tool("--review", "images", code=2)
    assert "no page of this tool; name another file" in done.stderr
    assert "identical images (1)" in done.stdout
    assert page.read_text(encoding="utf-8").endswith("mine</title>")
    assert "cannot be written" in tool("--review", "no/page.html", "images", code=2).stderr


def test_the_job_file_says_what_is_read(tool: Tool, make_image: ImageMaker) -> None:
    path = make_image("a.jpg")
    words = "It is number " + ", ".join(f"{n**5:x}" for n in range(20, 120))
    path.with_suffix(".txt").write_text(f"ohwx, {words}\n", encoding="utf-8")

    def found(ext: str, *arguments: str, code: int = 1) -> dict[str, list[str]]:
        dataset = {"folder_path": str(path.parent), "caption_ext": ext}
        process = {"trigger_word": "ohwx", "model": {"arch": "hidream"}, "datasets": [dataset]}
        job = {"job": "extension", "config": {"name": "x", "process": [process]}}
        (tool.folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        found = review(tool, "--config-dir", "job.json", *arguments, code=code)
        assert found.pop("too long") == ["a.txt"]
        return found

    assert found("caption") == {"another extension": ["a.txt"]}
    assert found("caption", "--caption-ext", "txt") == {"extension not read": ["job.json"]}
    assert found("json", code=0) == {"captions in JSON": ["job.json"]}
    path.with_suffix(".txt").rename(tool.folder / "a.txt")
    assert found("txt", "--caption-dir", ".") == {"captions elsewhere": ["job.json"]}


HOSTILE = [
    "ohwx, </script><script>document.title='run'</script>",
    "ohwx, <img src=x onerror=\"document.title='run'\"> <b>bold</b>",
    "ohwx, مرحبا بالعالم on a sign, @data @nonce {{style}} ${x} `y`",
]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is not tested")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def open_page(browser: Any, path: Path) -> tuple[Any, list[str]]:
    page, trouble = browser.new_page(), []  # what it complains about or asks for elsewhere
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith("file:") else trouble.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.getElementById('count').value")
    return page, trouble


def test_hostile_captions_run_nothing(tool: Tool, make_image: ImageMaker, browser: Any) -> None:
    for number, text in enumerate(HOSTILE):
        path = make_image(f"{number} ü#%.jpg")
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    make_image("a.tiff")
    tool("--review", "images", code=1)
    page, trouble = open_page(browser, tool.folder / "images" / "review.html")
    cards = page.locator("li").all_text_contents()
    assert all(any(text in card for card in cards) for text in HOSTILE)
    page.wait_for_function("[...document.images].every(image => image.naturalWidth === 64)")
    assert page.get_by_text("This browser cannot show it.").count() == 1
    assert page.title() == "Review of images"
    assert trouble == []


def test_ten_thousand_captions_and_a_phone_in_the_dark(tmp_path: Path, browser: Any) -> None:
    texts = [f"A man with {n} birds." + " Many trees." * (n % 90) for n in range(10_000)]
    samples = [gc.Sample(f"{tmp_path}/{n}.jpg", text=s, clean=s) for n, s in enumerate(texts)]
    samples[7].add("refused", "7.txt", "no")
    (tmp_path / "a.html").write_bytes(gc.build_page("set", samples, str(tmp_path)))
    page, trouble = open_page(browser, tmp_path / "a.html")
    count, cards = page.locator("#count"), page.locator("li")
    first = cards.first.locator("small").first
    assert (first.inner_text(), count.inner_text()) == ("7.jpg", "10000 of 10000 shown")
    page.get_by_role("combobox").select_option("By name")
    assert first.inner_text() == "0.jpg"
    chip = page.get_by_role("button", name="refused 1")
    chip.press("Enter")
    assert count.inner_text() == "1 of 10000 shown"
    assert "it is trained as a caption" in page.get_by_role("status").first.inner_text()
    chip.press("Enter")
    page.get_by_role("searchbox").fill("With 8999 BIRDS")
    page.get_by_role("button", name="more", exact=True).press("Enter")
    assert cards.inner_text().count("Many trees.") == 8999 % 90
    page.get_by_role("button", name="many trees").click()
    assert page.get_by_role("searchbox").input_value() == "many trees"
    back = "getComputedStyle(document.querySelector('nav')).backgroundColor"
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 700})
    page.reload()
    assert page.evaluate(back) != "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not chip.is_visible()  # folded
    assert trouble == []
