"""Text of any length and alphabet is one line within its width."""

import pytest

from vae_ray.run_files import captions
from vae_ray.run_files.captions import Caption, without_middle


def test_a_text_that_fits_is_unchanged() -> None:
    assert Caption("photos · samples, z ~ p(z) · epoch 3", width=300).text == "photos · samples, z ~ p(z) · epoch 3"


@pytest.mark.parametrize("text", ["x" * 300, "W · " * 80, "ends in a very/long/path" * 20, "é" * 500])
@pytest.mark.parametrize("width", [0, 5, 31, 240, 700])
def test_no_caption_is_wider_than_its_place(text: str, width: int) -> None:
    caption = Caption(text, width=width)
    assert caption.width() <= max(width, caption.font.getlength("…"))


def test_the_longest_part_of_a_title_is_shortened_and_keeps_its_ends() -> None:
    text = Caption(f"/home/{'directory/' * 30}photos · samples, z ~ p(z) · epoch 3", width=400).text
    path, *others = text.split(" · ")
    assert others == ["samples, z ~ p(z)", "epoch 3"]
    assert path.startswith("/home/dir")
    assert path.endswith("ory/photos")
    assert path.count("…") == 1


def test_a_caption_is_as_long_as_fits() -> None:
    whole = "abcdefghij" * 10
    caption = Caption(whole, width=200)
    longer = without_middle(whole, len(caption.text) + 1)
    assert caption.width() <= 200 < caption.font.getlength(longer)


@pytest.mark.parametrize(
    ("length", "expected"), [(1, "…"), (2, "a…"), (3, "a…g"), (4, "ab…g"), (6, "abc…fg"), (7, "abcdefg")]
)
def test_the_middle_is_left_out(length: int, expected: str) -> None:
    assert without_middle("abcdefg", length) == expected


def test_names_of_files_that_break_lines_or_are_no_unicode_are_drawn() -> None:
    assert Caption("two\nlines\t\udcff", width=300).text == "two?lines??"


def test_letters_that_no_font_has_lose_their_accents_or_become_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "SYSTEM_FONTS", ())
    assert Caption("Käse été 猫 · 3", width=300).text == "Kase ete ? · 3"
