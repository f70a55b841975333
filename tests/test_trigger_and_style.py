"""Trigger and style: each caption opens with the trigger once, and is cut only where it may be."""

from __future__ import annotations

import re
from typing import Any

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions

MARK = "[trigger]"


def recipe(trigger: str = MARK, word: str = "ohwx", **more: Any) -> gc.Recipe:
    return gc.Recipe("p", "i", trigger=trigger, trigger_word=word, **more)


def place(text: str, trigger: str = MARK, word: str = "ohwx", style: str = "prose") -> str:
    return str(gc.place_trigger(text, recipe(trigger, word, style=style)))


def replay(caption: str, trigger: str | None) -> str:
    """Return the text that ai-toolkit trains on, as in its toolkit/prompt_utils.py."""
    text = caption.replace("[trigger]", trigger or "").replace("[name]", trigger or "")
    if trigger and trigger not in text:
        text = f"{trigger} {text}"
    return text.strip()


# ---------------------------------------------------------------------------------------- trigger

SENTENCES = [
    ("A man in a red coat stands.", "[trigger] a man in a red coat stands."),
    ("Two dogs and a man.", "[trigger] two dogs and a man."),
    ("ohwx, a man in a red coat, stands.", "[trigger] a man in a red coat, stands."),
    ("Ohwx stands in a park.", "[trigger] stands in a park."),
    ("[Trigger] stands in a park.", "[trigger] stands in a park."),
    ("[ trigger ], a man.", "[trigger] a man."),
    ("[name]: a man.", "[trigger] a man."),
    ('"ohwx" stands in a park.', "[trigger] stands in a park."),
    ("**ohwx** stands in a park.", "[trigger] stands in a park."),
    ("“ohwx,” a man.", "[trigger] a man."),
    ("ohwx - A man.", "[trigger] a man."),
    # no grammar is rewritten
    ("A photo of ohwx riding a bike.", "[trigger] a photo of ohwx riding a bike."),
    ("ohwx's bike leans on a wall.", "[trigger] ohwx's bike leans on a wall."),
    ("ohwxville at dawn.", "[trigger] ohwxville at dawn."),
    ('A sign reads "I love ohwx" in red.', '[trigger] a sign reads "I love ohwx" in red.'),
]


@pytest.mark.parametrize(("said", "written"), SENTENCES)
def test_an_opening_with_the_trigger_goes_and_the_mark_stands_in_front(
    said: str, written: str
) -> None:
    assert place(said) == written


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("A man stands.", "ohwx, a man stands."),
        ("ohwx stands.", "ohwx stands."),
        ("Ohwx, a man, stands.", "ohwx, a man, stands."),
        ("[trigger] stands.", "ohwx stands."),
    ],
)
def test_a_word_of_the_users_own_is_written_out(said: str, written: str) -> None:
    assert place(said, "ohwx") == written


@pytest.mark.parametrize(
    ("said", "trigger"),
    [
        ("A man in a red coat stands.", "ohwx"),
        ("she asks a question", "sks"),  # the trainer looks for the word anywhere
        ("Ohwx man", "ohwx"),
        ("[Trigger] man", "ohwx"),
        ("1,000 birds", "ohwx"),
        ("A man, seen from behind.", None),  # the trainer deletes the mark
    ],
)
def test_the_trainer_reads_the_trigger_once_at_the_start_or_not_at_all(
    said: str, trigger: str | None
) -> None:
    trained = replay(place(said, word=trigger or "ohwx"), trigger)
    assert re.match(rf"{trigger} \w" if trigger else r"a man, seen", trained)
    assert len(re.findall(rf"(?i)\b{trigger}\b", trained)) == bool(trigger)
    assert "[" not in trained


@pytest.mark.parametrize("said", ["[trigger] a man stands.", "[Trigger], a man stands."])
def test_without_a_trigger_its_marks_go(said: str) -> None:
    assert place(said, "", "") == "A man stands."


@pytest.mark.parametrize(
    ("said", "trigger", "written"),
    [
        ("1girl, red hair", MARK, "[trigger], 1girl, red hair"),
        ("ohwx, 1girl", MARK, "[trigger], 1girl"),
        ("[trigger], 1girl", "ohwx", "ohwx, 1girl"),
        ("[trigger], 1girl", "", "1girl"),
    ],
)
def test_among_tags_the_trigger_is_the_first_tag(said: str, trigger: str, written: str) -> None:
    assert place(said, trigger, style="tags") == written


def test_a_trigger_with_underscores_is_found_among_tidied_tags() -> None:
    assert place("my style, 1girl", "my_style", "my_style", "tags") == "my_style, 1girl"


@pytest.mark.parametrize("said", ["ohwx", "[trigger].", '"ohwx"'])
def test_nothing_but_the_trigger_is_no_caption(said: str) -> None:
    with pytest.raises(gc.FailImage, match="empty: the answer holds nothing but the trigger"):
        gc.finish_caption(said, recipe())


def test_captions_open_with_the_mark_of_the_job_file_and_the_model_is_not_told_its_word(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(3):
        make_image(f"{number}.jpg")
    (tool.folder / "config").mkdir()
    process = "{trigger_word: ohwx, datasets: [{folder_path: images}]}"
    job = f"job: extension\nconfig: {{name: x, process: [{process}]}}"
    (tool.folder / "config" / "job.yaml").write_text(job, encoding="utf-8")
    said = ("A man.", "ohwx, a dog.", "[Trigger] cat.")
    server.script(steps=[{"content": text} for text in said])
    tool("images", "--config-dir", "config", "--thread-pool", "1")
    written = ["[trigger] a man.\n", "[trigger] a dog.\n", "[trigger] cat.\n"]
    assert list(captions(tool.folder / "images").values()) == written
    assert "ohwx" not in str(server.stats()["bodies"])


def test_another_trigger_takes_the_place_of_the_one_before_for_nothing(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    server.script(steps=[{"content": "A man stands."}], then={"status": 500})
    for argument, caption in (
        (["--trigger", "ohwx"], "ohwx, a man stands.\n"),
        (["--trigger", "[trigger]"], "[trigger] a man stands.\n"),
        ([], "A man stands.\n"),
        (["--trigger", "sks"], "sks, a man stands.\n"),
    ):
        tool("images", "--overwrite", *argument)
        assert captions(tool.folder) == {"images/a.txt": caption}
    assert server.stats()["requests"] == 1
    assert "ohwx" not in str(server.stats()["bodies"])


# --------------------------------------------------------------------------------------- the style


@pytest.mark.parametrize(
    ("said", "tidy"),
    [
        ("1girl, Red_Hair, red hair,  smile.", "1girl, red hair, smile"),
        (r"fate \(series\), a；b;c", r"fate \(series\), a；b, c"),
        ("a,, b, ,c", "a, b, c"),
        ("一个女孩，红发、微笑", "一个女孩, 红发, 微笑"),
    ],
)
def test_tags_are_separated_unique_lower_case_and_without_underscores(said: str, tidy: str) -> None:
    assert gc.tidy_tags(said) == tidy


def test_tags_that_come_one_a_line_become_one_line(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    server.script(then={"content": "- 1girl\n- red_hair\n- Red hair\n- smile"})
    tool("images", "--style", "tags")
    assert captions(tool.folder / "images") == {"a.txt": "1girl, red hair, smile\n"}


# ------------------------------------------------------------------------------------------ length


@pytest.mark.parametrize(
    ("text", "style", "most", "cut"),
    [
        ("A man sits. A dog runs. A cat sleeps.", "prose", 6, "A man sits. A dog runs."),
        ("A man sits! Really? Yes.", "prose", 4, "A man sits! Really?"),
        ("A man sits in a park", "prose", 3, ""),
        ("A man in St. Paul with Mr. Smith sits. He smiles.", "prose", 8, ""),
        (
            "J. R. Tolkien sits at 3.50 a seat. He reads.",
            "prose",
            9,
            "J. R. Tolkien sits at 3.50 a seat.",
        ),
        (
            'A sign says "Stop. Look. Listen." in red. A dog.',
            "prose",
            9,
            'A sign says "Stop. Look. Listen." in red.',
        ),
        ('A dog. A sign says "Stop. Look. Listen." in red.', "prose", 7, "A dog."),
        ("At 5 p.m. people wait. A bus comes.", "prose", 5, "At 5 p.m. people wait."),
        ("他坐着。她站着。", "prose", 9, "他坐着。她站着。"),
        ("red hair, blue dress, smile, tree", "tags", 4, "red hair, blue dress"),
        ("red hair, blue dress", "tags", 4, "red hair, blue dress"),
    ],
)
def test_a_caption_is_cut_where_a_reader_sees_an_end(
    text: str, style: str, most: int, cut: str
) -> None:
    assert gc.cut_caption(text, style, most) == cut


LONG = "A man sits on a bench. A dog runs by. The sun is low over the hills."
NO_END = "word " * 9 + "end."


@pytest.mark.parametrize(
    ("answer", "caption", "noted"),
    [
        (LONG, "A man sits on a bench.", "1 cut at --max-words"),
        (NO_END, NO_END, "1 longer than --max-words"),
        ("A man sits.", "A man sits.", ""),
    ],
)
def test_length_is_asked_for_then_cut_and_never_paid_for_twice(
    tool: Tool, server: Server, make_image: ImageMaker, answer: str, caption: str, noted: str
) -> None:
    make_image("a.jpg")
    server.script(steps=[{"content": answer}], then={"status": 500})
    err = tool("images", "--max-words", "8").stderr
    assert captions(tool.folder) == {"images/a.txt": caption + "\n"}
    assert ("Worth a look" in err) == bool(noted)
    assert noted in err
    (body,) = server.stats()["bodies"]
    assert "at most 8 words" in body["messages"][0]["content"][0]["text"]


# ---------------------------------------------------------------------------------- excluded words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A girl with blue eyes.", ["blue eyes"]),
        ("Blue Eyes, (red)", ["blue eyes", "red"]),
        ("blueeyes, redder, predawn", []),
        ("A C++ book", ["c++"]),
    ],
)
def test_excluded_words_are_found_as_whole_words_in_any_case(text: str, found: list[str]) -> None:
    assert gc.find_excluded(text, ["blue eyes", "red", "c++"]) == found


BAD, GOOD = "A girl with blue eyes and freckles.", "A girl."


@pytest.mark.parametrize(
    ("second", "caption", "code"),
    [
        ({"content": GOOD}, GOOD, 0),
        ({"content": "A girl with freckles."}, "A girl with freckles.", 0),
        ({"content": BAD}, BAD, 0),
        ({"content": "I'm sorry, I can't help with that."}, BAD, 0),
        ({"status": 400, "body": "no"}, BAD, 0),
        (
            {"status": 402, "body": "no credit"},
            BAD,
            3,
        ),  # the run ends, but what is paid for is kept
    ],
)
def test_excluded_words_are_asked_about_once_more_and_the_better_answer_is_kept(
    tool: Tool,
    server: Server,
    make_image: ImageMaker,
    second: dict[str, Any],
    caption: str,
    code: int,
) -> None:
    make_image("a.jpg")
    (tool.folder / "config").mkdir()
    exclude = "blue eyes, freckles , red   hair\ntall\n"
    (tool.folder / "config" / "exclude.txt").write_text(exclude, encoding="utf-8")
    server.script(steps=[{"content": BAD}, second], then={"status": 500})
    err = tool("images", "--config-dir", "config", code=code).stderr
    asked = [body["messages"][0]["content"][0]["text"] for body in server.stats()["bodies"]]
    assert len(asked) == 2
    assert "already known: blue eyes, freckles, red hair, tall." in asked[0]
    assert asked[1].endswith("\nLeave these words out: blue eyes, freckles.")
    assert captions(tool.folder / "images") == {"a.txt": caption + "\n"}
    assert ("1 with excluded words" in err) == (caption != GOOD)
