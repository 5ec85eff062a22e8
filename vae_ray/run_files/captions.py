"""Text in pictures: always one line, never wider than its place, in letters that the font has."""

from __future__ import annotations

import functools
import unicodedata
from bisect import bisect_right

from PIL import ImageFont

FONT_SIZE = 14
SEPARATOR = " · "
SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),
)
"""Looked for, in this order, for text that Pillow's own font lacks letters of: it has those of English only."""


class Caption:
    """One line of text that is at most `width` pixels wide.

    Where it is wider, its longest parts (between ' · ') are shortened in the middle: both the beginning of a path and
    its last name remain. Characters that cannot be drawn in a line (a newline in the name of a file) become '?'; so
    do those that neither Pillow's font nor a font of this machine has. Accents that they lack are left out.
    """

    def __init__(self, text: str, *, width: float, size: int = FONT_SIZE) -> None:
        text = "".join(character if character.isprintable() else "?" for character in text)
        self.font, text = _font_for(text, size)
        self.text = self._shortened(text, width)

    def width(self) -> float:
        """In pixels."""
        return self.font.getlength(self.text)

    def _shortened(self, text: str, width: float) -> str:
        """The longest form of `text` that fits; '…' if none does."""
        if self.font.getlength(text) <= width:
            return text
        parts = text.split(SEPARATOR)
        lengths = range(1, max(len(part) for part in parts) + 1)
        forms = [SEPARATOR.join(without_middle(part, length) for part in parts) for length in lengths]
        num_that_fit = bisect_right(forms, width, key=self.font.getlength)
        return forms[num_that_fit - 1] if num_that_fit else "…"


def without_middle(text: str, length: int) -> str:
    """`text`, or its beginning, '…' and its end: at most `length` characters, which is at least 1."""
    if len(text) <= length:
        return text
    head, tail = length // 2, (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - tail :]}"


def _font_for(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """The first font with every letter of `text`; if there is none, Pillow's own and the text in its letters."""
    own = _own_font(size)
    if text.isascii() or not (lacking := {letter for letter in text if not _has(own, letter)}):
        return own, text
    for name in SYSTEM_FONTS:
        font = _system_font(name, size)
        if font and all(_has(font, letter) for letter in lacking):
            return font, text
    plain = {letter: unicodedata.normalize("NFKD", letter)[0] for letter in lacking}
    return own, "".join(letter if _has(own, letter) else "?" for letter in (plain.get(old, old) for old in text))


@functools.cache
def _own_font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels contain FreeType
    return font


@functools.cache
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)  # by its name, in the system's directories
    except OSError:
        return None


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether the font draws a letter as anything but the box of those that it lacks."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))
