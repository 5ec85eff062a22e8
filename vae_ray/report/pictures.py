"""Pictures inside a page, in a bounded number of bytes."""

from __future__ import annotations

import base64
import io
import math

from PIL import Image

PICTURE_KINDS = ("samples", "reconstructions", "traversals", "groups")
"""What a run draws after each epoch; the last of models with several latent groups only."""
TOTAL_BYTES = 8_000_000
"""Of all pictures of a page, which a browser has to decode before it shows the page."""
SMALLEST_LIMIT, LARGEST_LIMIT = 16_000, 250_000
"""Of one picture. With a thousand trials a page becomes larger rather than its pictures illegible."""
JPEG_QUALITY = 85


def limit_of(num_pictures: int) -> int:
    """Bytes that each of `num_pictures` may take."""
    return min(max(SMALLEST_LIMIT, TOTAL_BYTES // max(1, num_pictures)), LARGEST_LIMIT)


def data_uri(png: bytes, *, limit: int) -> str | None:
    """A PNG file as it is, if it has at most `limit` bytes; else as a JPEG that has, made smaller where it must be.

    None for a file that has to be changed and cannot be read: one that was written to a full disk.
    """
    if len(png) <= limit:
        return _uri("png", png)
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            picture.load()
            return _uri("jpeg", _jpeg(picture, limit))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # as Pillow reports damage
        return None


def _jpeg(picture: Image.Image, limit: int) -> bytes:
    size = picture.size
    while True:
        buffer = io.BytesIO()
        smaller = picture.resize(size, Image.Resampling.LANCZOS) if size != picture.size else picture
        smaller.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        content = buffer.getvalue()
        if len(content) <= limit:
            return content
        scale = 0.95 * math.sqrt(limit / len(content))  # bytes grow with the area, roughly
        size = (max(1, int(size[0] * scale)), max(1, int(size[1] * scale)))


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
