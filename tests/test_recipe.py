"""Recipe: the prompt, and where it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

import gen_captions as gc


def recipe(config: Path | None, prompt: str | None = None) -> gc.Recipe:
    return gc.read_recipe(gc.Settings(config_dir=config, prompt=prompt))


def test_the_built_in_prompt_serves_when_nothing_else_is_said(tmp_path: Path) -> None:
    assert recipe(None) == recipe(tmp_path) == recipe(tmp_path / "missing") == gc.Recipe(gc.DEFAULT_PROMPT, "built in")


def test_prompt_txt_comes_before_the_built_in_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes("\ufeff\r\nSay “what” you see.\r\n\r\n".encode())
    assert recipe(tmp_path) == gc.Recipe("Say “what” you see.", "prompt.txt")


def test_the_setting_comes_before_prompt_txt_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("file", encoding="utf-8")
    assert recipe(tmp_path, "mine") == gc.Recipe("mine", "--prompt or GETCAP_PROMPT, not prompt.txt")
    assert recipe(None, "mine") == gc.Recipe("mine", "--prompt or GETCAP_PROMPT")


@pytest.mark.parametrize(
    ("data", "said"),
    [(b" \n", "is blank"), (b"caf\xe9", "is not saved as UTF-8"), ("x".encode("utf-16"), "is not saved as UTF-8")],
)
def test_a_prompt_file_that_cannot_be_used_is_an_error_that_names_it(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "prompt.txt").write_bytes(data)
    with pytest.raises(gc.SettingsError, match=said) as error:
        recipe(tmp_path)
    assert "prompt.txt" in str(error.value)


def test_the_built_in_prompt_asks_for_one_paragraph_and_nothing_else() -> None:
    assert "one paragraph" in gc.DEFAULT_PROMPT
    assert gc.DEFAULT_PROMPT.endswith("Output only the caption.")
    assert len(gc.DEFAULT_PROMPT.split()) < 140
