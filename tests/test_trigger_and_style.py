"""Trigger and style: every caption opens with the trigger once, has the style asked for, and is cut where it may be."""

from __future__ import annotations

import re
import time

import pytest

import gen_captions as gc
from conftest import ImageMaker, Server, Tool, captions


def recipe(
    put: str = "[trigger]", word: str = "ohwx", style: str = "prose", max_words: int | None = None, *exclude: str
) -> gc.Recipe:
    return gc.Recipe("p", "test", "q", "i", style, max_words, exclude, gc.Trigger(put, word, "test"))


def place(text: str, put: str = "[trigger]", word: str = "ohwx", style: str = "prose", *, told: bool = True) -> str:
    return str(gc.place_trigger(text, recipe(put, word, style), told=told))


def replay(caption: str, trigger: str | None, *, is_reg: bool = False) -> str:
    """Return the text that ai-toolkit trains on, as its documentation in toolkit/prompt_utils.py has it."""
    text = caption.replace("[trigger]", trigger or "").replace("[name]", trigger or "")
    if trigger and trigger.strip() and trigger not in text and not is_reg:
        text = f"{trigger} {text}"
    return ",".join(text.split(",")).strip()


# ------------------------------------------------------------------------------------------------- trigger

SENTENCES = [
    ("A man in a red coat stands.", "[trigger] a man in a red coat stands."),
    ("ohwx, a man in a red coat, stands.", "[trigger], a man in a red coat, stands."),
    ("ohwx stands in a park.", "[trigger] stands in a park."),
    ("Ohwx stands in a park.", "[trigger] stands in a park."),
    ("[Trigger] stands in a park.", "[trigger] stands in a park."),
    ("[ trigger ], a man.", "[trigger], a man."),
    ('"ohwx" stands in a park.', "[trigger] stands in a park."),
    ("**ohwx** stands in a park.", "[trigger] stands in a park."),
    ("“ohwx,” a man.", "[trigger], a man."),
    ("ohwx: a man.", "[trigger]: a man."),
    ("The ohwx stands in a park.", "[trigger] stands in a park."),
    ("ohwx ohwx man.", "[trigger] man."),
    ("A photo of ohwx riding a bike.", "[trigger] a photo of the subject riding a bike."),
    ("A man rides ohwx's bike.", "[trigger] a man rides the subject's bike."),
    ("A man named ohwx stands.", "[trigger] a man stands."),
    ("A man (ohwx) stands.", "[trigger] a man stands."),
    ("A man, ohwx, stands.", "[trigger] a man stands."),
    ("A young ohwx stands.", "[trigger] a young subject stands."),
    ("A red ohwx car stands in a street.", "[trigger] a red car stands in a street."),
    ("An ohwx-style painting of a lake.", "[trigger] a painting of a lake."),
    ("A painting in the style of ohwx.", "[trigger] a painting."),
    ("A painting in ohwx style.", "[trigger] a painting."),
    ("A portrait of an ohwx man.", "[trigger] a portrait of a man."),
    ("A portrait of a ohwx old man.", "[trigger] a portrait of an old man."),
    ("A park where the ohwx is standing.", "[trigger] a park where the subject is standing."),
    ("A man sits. Ohwx smiles.", "[trigger] a man sits. The subject smiles."),
    ("A dog runs beside [trigger].", "[trigger] a dog runs beside the subject."),
    ("A sign, a form with [name] on it.", "[trigger] a sign, a form with the subject on it."),
    ("Two dogs and a man.", "[trigger] two dogs and a man."),
    ("Birds over ohwxville.", "[trigger] Birds over ohwxville."),
]


@pytest.mark.parametrize(("said", "written"), SENTENCES)
def test_what_the_model_wrote_of_the_trigger_is_tidied_to_a_sentence(said: str, written: str) -> None:
    assert place(said).replace("[trigger],", "[trigger]").replace("[trigger]:", "[trigger]") == written.replace(
        "[trigger],", "[trigger]"
    ).replace("[trigger]:", "[trigger]")


@pytest.mark.parametrize("said", [said for said, _ in SENTENCES if "ohwxville" not in said])
@pytest.mark.parametrize("trigger", ["ohwx", "Ohwx", None])
def test_the_trainer_finds_the_trigger_once_at_the_start_or_not_at_all(said: str, trigger: str | None) -> None:
    trained = replay(place(said), trigger)
    if trigger:
        assert trained.startswith(f"{trigger} ")
        assert trained.lower().count("ohwx") == 1
    else:
        assert re.match(r"\w", trained)
        assert "ohwx" not in trained.lower()
    assert "[" not in trained


@pytest.mark.parametrize(
    ("said", "trigger"),
    [
        ("a man, red coat, 1,000 birds", "ohwx"),
        ("she asks a question", "sks"),
        ("Ohwx man", "ohwx"),
        ("[Trigger] man", "ohwx"),
    ],
)
def test_the_traps_of_the_trainers_rules_are_avoided(said: str, trigger: str) -> None:
    trained = replay(place(said, word=trigger), trigger)
    assert trained.startswith(f"{trigger} ")
    assert len(re.findall(rf"(?i)\b{trigger}\b", trained)) == 1
    assert "[" not in trained


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


@pytest.mark.parametrize("told", [True, False])
def test_a_made_up_word_means_the_trigger_whether_the_prompt_named_it_or_not(told: bool) -> None:
    assert place("A photo of ohwx on a mat.", told=told) == "[trigger] a photo of the subject on a mat."


def test_an_ordinary_word_that_the_prompt_did_not_name_is_left_in_the_sentence() -> None:
    assert place("A tabby cat sits on a cat tree.", word="cat", told=False) == (
        "[trigger] a tabby cat sits on a cat tree."
    )


def test_what_can_be_read_in_the_picture_stays_as_it_is() -> None:
    said = 'A sign reads "I love ohwx" in red.'
    assert place(said) == '[trigger] a sign reads "I love ohwx" in red.'


def test_a_trigger_with_underscores_is_found_among_tidied_tags() -> None:
    assert place("my style, 1girl", "my_style", "my_style", "tags") == "my_style, 1girl"


@pytest.mark.parametrize(
    "text", ["A man " + "`" * 50_000, "a" * 50_000, '"' * 50_000], ids=["marks", "letters", "quotes"]
)
def test_a_long_text_without_sense_is_no_trouble(text: str) -> None:
    started = time.monotonic()
    place(text)
    gc.find_hiding("ohwx", text)
    assert time.monotonic() - started < 10  # it was minutes


@pytest.mark.parametrize("said", ["[trigger] a man stands.", "[Trigger], a man stands.", "A man stands."])
def test_without_a_trigger_its_marks_go(said: str) -> None:
    assert place(said, "", "") == "A man stands."


@pytest.mark.parametrize("said", ["ohwx", "[trigger].", '"ohwx"'])
def test_nothing_but_the_trigger_is_no_caption(said: str) -> None:
    assert place(said) == ""


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("1girl, red hair", "[trigger], 1girl, red hair"),
        ("ohwx, 1girl, red hair", "[trigger], 1girl, red hair"),
        ("1girl, ohwx, red hair", "[trigger], 1girl, red hair"),
        ("1girl, [trigger], ohwx man", "[trigger], 1girl, man"),
        ("1girl, portrait of ohwx, ohwx's hat, (ohwx)", "[trigger], 1girl"),
    ],
)
def test_among_tags_the_trigger_is_a_tag_of_its_own(said: str, written: str) -> None:
    assert place(said, style="tags") == written


def test_another_trigger_takes_the_place_of_the_one_before() -> None:
    old = "ohwx, a man stands."
    assert gc.swap_trigger(old, "ohwx", recipe("[trigger]", "sks")) == "[trigger] a man stands."
    assert gc.swap_trigger("[trigger] a man stands.", "[trigger]", recipe("sks", "sks")) == "sks, a man stands."
    assert gc.swap_trigger(old, "ohwx", recipe("", "")) == "A man stands."
    assert gc.swap_trigger("A man stands.", "", recipe("sks", "sks")) == "sks, a man stands."


def test_a_trigger_that_hides_in_a_word_is_found() -> None:
    assert gc.find_hiding("sks", "she asks a question") == "asks"
    assert gc.find_hiding("sks", "sks man, Sksy") == ""


def test_a_trigger_that_hides_in_a_word_is_warned_about_once(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(3):
        make_image(f"{number}.jpg")
    server.script(then={"content": "She asks a question."})
    err = tool("--image-dir", "images", "--trigger", "sks").stderr
    assert err.count('the trigger sks hides in "asks"') == 1


def test_captions_open_with_the_mark_that_the_job_file_makes_known(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    for number in range(3):
        make_image(f"{number}.jpg")
    (tool.folder / "config").mkdir()
    job = "job: extension\nconfig: {name: x, process: [{trigger_word: ohwx, datasets: [{folder_path: images}]}]}"
    (tool.folder / "config" / "job.yaml").write_text(job, encoding="utf-8")
    server.script(steps=[{"content": "A man."}, {"content": "ohwx, a dog."}, {"content": "[Trigger] cat."}])
    tool("--image-dir", "images", "--config-dir", "config", "--thread-pool", "1")
    assert list(captions(tool.folder / "images").values()) == [
        "[trigger] a man.\n",
        "[trigger] a dog.\n",
        "[trigger] cat.\n",
    ]


# --------------------------------------------------------------------------------------- style and length


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A man. A dog.", 2),
        ("A man in St. Paul with Mr. Smith.", 1),
        ("J. R. Tolkien at 4 p.m. sits.", 1),
        ('A sign says "Stop. Look. Listen." in red.', 1),
        ("A man! Really? Yes.", 3),
        ("Price 3.50 is shown.", 1),
        ("A poster of Prof. Dumbledore at 5 p.m. Sunday, e.g. Nike logos.", 1),
        ("他坐着。她站着。", 2),
        ("No end", 1),
    ],
)
def test_sentences_end_where_a_reader_sees_an_end(text: str, number: int) -> None:
    pieces = gc.split_text(text, gc.SENTENCE_END)
    assert len(pieces) == number
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("said", "tidy"),
    [
        ("1girl, Red_Hair, red hair,  smile.", "1girl, Red Hair, smile"),
        ("^_^, o_o, long_hair", "^_^, o_o, long hair"),
        (r"fate \(series\), a；b", "fate (series), a；b"),
        ("a,, b, ,c", "a, b, c"),
        ("one two", "one two"),
    ],
)
def test_tags_are_separated_unique_and_without_underscores(said: str, tidy: str) -> None:
    assert gc.tidy_tags(said.replace("；", ";")) == tidy.replace("；", ", ")


@pytest.mark.parametrize(
    ("text", "style", "max_words", "kinds"),
    [
        ("one two three four", "prose", 3, ["too long"]),
        ("one two three", "prose", 3, []),
        ("one two three " * 99, "prose", None, []),
        ("A man. A dog.", "short", None, ["too long"]),
        ("A man sits.", "short", None, []),
        ("A man sits on a bench in a park.", "tags", None, ["no tags"]),
        ("a man, a bench, a park", "tags", None, []),
        ("a man, a bench, a park", "tags", 4, ["too long"]),
    ],
)
def test_what_breaks_a_rule_is_found(text: str, style: str, max_words: int | None, kinds: list[str]) -> None:
    assert [kind for kind, _ in gc.find_faults(text, recipe(style=style, max_words=max_words))] == kinds


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A girl with blue eyes.", ["blue eyes"]),
        ("Blue  Eyes, (red)", ["blue eyes", "red"]),
        ("blueeyes, redder, predawn", []),
    ],
)
def test_excluded_words_are_found_as_whole_words_in_any_case(text: str, found: list[str]) -> None:
    assert gc.find_excluded(text, ["blue eyes", "red"]) == found


@pytest.mark.parametrize(
    ("text", "style", "max_words", "cut"),
    [
        ("A man sits. A dog runs. A cat sleeps.", "prose", 6, "A man sits. A dog runs."),
        ("A man sits in a park, near a dog, under a tree.", "prose", 9, "A man sits in a park, near a dog."),
        ("A man sits in a park", "prose", 3, "A man sits in a park"),
        ("In a park, a man in a red coat stands", "prose", 6, "In a park, a man in a red coat stands"),
        ("A man (tall, thin, and old) sits.", "prose", 4, "A man (tall, thin, and old) sits."),
        ('He says "one, two, three" loudly, then leaves.', "prose", 6, 'He says "one, two, three" loudly.'),
        ("A man sits. A dog runs.", "short", None, "A man sits."),
        ("red hair, blue dress, smile, tree", "tags", 4, "red hair, blue dress"),
        ("A man sits.", "prose", 6, "A man sits."),
    ],
)
def test_a_caption_is_cut_after_a_sentence_a_tag_or_a_clause(
    text: str, style: str, max_words: int | None, cut: str
) -> None:
    assert gc.cut_caption(text, recipe(style=style, max_words=max_words)) == cut


LONG = "A man sits on a bench. A dog runs by. The sun is low over the hills."
SHORT = "A man sits on a bench."


@pytest.mark.parametrize(
    ("answers", "caption", "noted"),
    [
        ([LONG, SHORT], SHORT, ""),
        ([LONG, LONG], SHORT, "images/a.jpg: cut: from 17 words to 6"),
        ([LONG, "I'm sorry, I can't help with that."], SHORT, "images/a.jpg: cut: from 17 words to 6"),
        (["word " * 9 + "end."] * 2, "word " * 9 + "end.", "images/a.jpg: too long: it has 10 words"),
    ],
)
def test_a_caption_that_is_too_long_is_asked_for_once_more_then_cut(
    tool: Tool, server: Server, make_image: ImageMaker, answers: list[str], caption: str, noted: str
) -> None:
    make_image("a.jpg")
    server.script(steps=[{"content": answer} for answer in answers], then={"status": 500})
    err = tool("--image-dir", "images", "--max-words", "8").stderr.replace("\\", "/")
    assert captions(tool.folder) == {"images/a.txt": caption + "\n"}
    assert noted in err
    assert ("to look at 1" in err) == bool(noted)
    bodies = server.stats()["bodies"]
    assert len(bodies) == 2
    assert "words where at most 8 are wanted." in bodies[1]["messages"][0]["content"][0]["text"]


def test_an_excluded_word_is_named_in_one_more_try_then_written_and_reported(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    (tool.folder / "config").mkdir()
    (tool.folder / "config" / "exclude.txt").write_text("blue eyes\nfreckles\n", encoding="utf-8")
    server.script(then={"content": "A girl with blue eyes."})
    err = tool("--image-dir", "images", "--config-dir", "config").stderr
    first, second = (body["messages"][0]["content"][0]["text"] for body in server.stats()["bodies"])
    assert "already known: blue eyes, freckles." in first
    assert second.endswith("it mentions what must stay unsaid: blue eyes.")
    assert captions(tool.folder / "images") == {"a.txt": "A girl with blue eyes.\n"}
    assert "to look at 1 (excluded words 1)" in err


def test_the_first_answer_is_kept_when_the_account_runs_dry_on_the_second(
    tool: Tool, server: Server, make_image: ImageMaker
) -> None:
    make_image("a.jpg")
    make_image("b.jpg")
    server.script(steps=[{"content": LONG}], then={"status": 402, "body": "no credit"})
    tool("--image-dir", "images", "--max-words", "8", "--thread-pool", "1", code=3)
    assert captions(tool.folder) == {"images/a.txt": SHORT + "\n"}
    assert server.stats()["requests"] == 2


def test_tags_that_come_one_a_line_become_one_line_of_tags(tool: Tool, server: Server, make_image: ImageMaker) -> None:
    make_image("a.jpg")
    server.script(then={"content": "- 1girl\n- red_hair\n- Red hair\n- smile"})
    tool("--image-dir", "images", "--style", "tags")
    assert captions(tool.folder / "images") == {"a.txt": "1girl, red hair, smile\n"}
