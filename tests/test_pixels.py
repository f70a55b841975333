"""Pixels: any image file becomes a small upright RGB JPEG, and a bad one a named failure."""

from __future__ import annotations

import io
import math
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat

import gen_captions as gc
from conftest import ROOT

RED, BLUE = (255, 0, 0), (0, 0, 255)
ORIENTATION = 0x0112


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    output = io.BytesIO()
    image.save(output, kind, **options)
    return output.getvalue()


def picture(size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Image.Image:
    """Return an image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def sent(data: bytes, max_side: int = 1024) -> Image.Image:
    """Return the image that goes out for a file."""
    image = Image.open(io.BytesIO(gc.prepare_image(data, max_side)[0]))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    image.load()
    return image


def near(pixel: Any, colour: tuple[int, int, int], distance: int = 40) -> bool:
    return all(abs(a - b) <= distance for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG"])
def test_every_format_goes_out_as_jpeg_with_its_colours(kind: str) -> None:
    image = sent(encode(picture(), kind))
    assert image.size == (60, 40)
    assert near(image.getpixel((5, 20)), RED)
    assert near(image.getpixel((55, 20)), BLUE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F"])
def test_every_mode_goes_out_as_rgb(mode: str) -> None:
    kind = "TIFF" if mode in {"CMYK", "F", "LA", "I", "I;16B"} else "JPEG" if mode == "YCbCr" else "PNG"
    source = (
        picture().convert("L").convert("I").convert(mode) if mode in {"I;16", "I;16B", "I", "F"} else picture(mode=mode)
    )
    assert sent(encode(source, kind)).size == (60, 40)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = sent(encode(Image.new("I;16", (20, 20), 32768)))
    assert near(image.getpixel((10, 10)), (128, 128, 128), 2)


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    assert near(sent(encode(picture(mode="CMYK"), "JPEG", quality=95)).getpixel((5, 20)), RED)


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))])
def test_what_is_transparent_goes_out_white(mode: str, clear: tuple[int, ...]) -> None:
    assert near(sent(encode(Image.new(mode, (20, 20), clear))).getpixel((9, 9)), (255, 255, 255), 2)


def test_a_transparent_palette_colour_goes_out_white() -> None:
    image = picture().convert("P")
    red = image.getpixel((5, 20))
    assert near(sent(encode(image, "PNG", transparency=red)).getpixel((5, 20)), (255, 255, 255), 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "red_at"),
    [(1, "left"), (2, "right"), (3, "right"), (4, "left"), (5, "top"), (6, "top"), (7, "bottom"), (8, "bottom")],
)
def test_an_image_goes_out_upright(kind: str, orientation: int, red_at: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = sent(encode(picture((80, 40)), kind, exif=exif), 64)
    assert image.size == ((64, 32) if red_at in {"left", "right"} else (32, 64))
    width, height = image.size
    middle = {"left": (3, height // 2), "right": (width - 4, height // 2)}
    middle |= {"top": (width // 2, 3), "bottom": (width // 2, height - 4)}
    assert near(image.getpixel(middle[red_at]), RED)
    assert image.getexif().get(ORIENTATION, 1) == 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "AVIF", "PNG"])
def test_the_first_frame_goes_out(kind: str) -> None:
    frames = [Image.new("RGB", (30, 30), RED), Image.new("RGB", (30, 30), BLUE)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert near(sent(data).getpixel((15, 15)), RED)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((4400, 3300), (1024, 768)), ((3300, 4400), (768, 1024)), ((1024, 1024), (1024, 1024)), ((5000, 3), (1024, 1))],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_longest_side_is_shrunk_to_the_limit(size: tuple[int, int], expected: tuple[int, int], kind: str) -> None:
    assert sent(encode(picture(size), kind)).size == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4032, 3024), (1008, 756)),
        ((3024, 4032), (756, 1008)),
        ((4000, 3000), (1000, 750)),
        ((3968, 2976), (992, 744)),
        ((3964, 2973), (1024, 768)),  # a quarter is 991: too small
        ((4100, 3075), (1024, 768)),  # a quarter is 1025: too large
        ((6000, 4000), (1024, 683)),
        ((8000, 6000), (1000, 750)),
    ],
)
def test_a_jpeg_whose_cheap_decode_is_nearly_the_limit_goes_out_at_that_size(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert sent(encode(picture(size), "JPEG")).size == expected


@settings(deadline=None)
@given(width=st.integers(1, 700), height=st.integers(1, 700))
def test_no_jpeg_goes_out_larger_than_the_limit_or_much_smaller(width: int, height: int) -> None:
    image = sent(encode(Image.new("L", (width, height)), "JPEG"), 64)
    assert 62 <= max(image.size) <= 64 or max(width, height) == max(image.size) < 62
    scale = max(image.size) / max(width, height)
    assert all(abs(now - before * scale) < 2 for now, before in zip(image.size, (width, height), strict=True))


def difference(one: Image.Image, other: Image.Image) -> float:
    """Return the root mean square of what two images differ by, all colours together, of 255."""
    by_colour = ImageStat.Stat(ImageChops.difference(one, other)).rms
    return math.sqrt(sum(rms**2 for rms in by_colour) / len(by_colour))


@pytest.mark.parametrize(("kind", "size"), [("JPEG", (4032, 3024)), ("JPEG", (6000, 4000)), ("PNG", (4032, 3024))])
def test_a_photo_goes_out_as_a_full_reduction_would_show_it(kind: str, size: tuple[int, int]) -> None:
    cat = Image.open(ROOT / "examples" / "images" / "cat.jpg")
    photo = Image.new("RGB", size)
    for left in range(0, size[0], cat.width):  # side by side: as sharp as a small image is
        for top in range(0, size[1], cat.height):
            photo.paste(cat, (left, top))
    data = encode(photo, kind, **({"quality": 92} if kind == "JPEG" else {"compress_level": 0}))
    now = sent(data)
    full = Image.open(io.BytesIO(data)).resize(now.size, Image.Resampling.LANCZOS)
    as_jpeg = Image.open(io.BytesIO(encode(full, "JPEG", quality=gc.JPEG_QUALITY)))
    assert difference(now, full) < 1.15 * difference(as_jpeg, full)  # most of it is what any JPEG loses


def test_a_small_image_is_not_enlarged() -> None:
    assert sent(encode(picture((7, 5)))).size == (7, 5)


@pytest.mark.parametrize("tail", [b"", b"\0" * 500, b"SEFT trailer of a phone"])
def test_a_jpeg_that_is_right_already_goes_out_as_its_own_bytes(tail: bytes) -> None:
    data = encode(picture(), "JPEG") + tail
    assert gc.prepare_image(data, 1024)[0] is data


@pytest.mark.parametrize(
    "data",
    [
        encode(picture((2000, 10)), "JPEG"),
        encode(picture(mode="L"), "JPEG"),
        encode(picture(mode="CMYK"), "JPEG"),
        encode(picture(), "JPEG") + b"\0" * 5000,
    ],
    ids=["too large", "grey", "cmyk", "end mark far away"],
)
def test_any_other_jpeg_is_made_anew(data: bytes) -> None:
    assert gc.prepare_image(data, 1024)[0] != data


def png_claiming(width: int, height: int) -> bytes:
    """Return a small PNG whose header claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64
NOISE = Image.effect_noise((300, 300), 90).convert("RGB")
BAD = {
    "empty file": [b""],
    "not an image": [
        b"nope",
        b"\0" * 5000,
        b"<html>no</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"GIF89a",
        b"\xff\xd8",
        encode(NOISE, "AVIF")[:3000],
    ],
    "damaged image": [
        encode(NOISE, "JPEG")[:9000],
        encode(NOISE, "PNG")[:9000],
        encode(NOISE, "WEBP")[:3000],
        encode(NOISE, "TIFF")[:9000],
        encode(NOISE, "BMP")[:9000],
        png_claiming(100, 100),
    ],
    "too many pixels": [png_claiming(60_000, 60_000), png_claiming(13_000, 13_000)],
}


@pytest.mark.parametrize(("reason", "data"), [(reason, data) for reason, files in BAD.items() for data in files])
def test_a_bad_file_is_a_named_failure(reason: str, data: bytes) -> None:
    with pytest.raises(gc.FailImage) as failure:
        gc.prepare_image(data, 1024)
    assert failure.value.reason == reason


def test_a_bomb_takes_no_memory() -> None:
    tracemalloc.start()
    with pytest.raises(gc.FailImage):
        gc.prepare_image(png_claiming(13_000, 13_000), 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.skipif("HEIF" in Image.OPEN, reason="pillow-heif is installed")
def test_heic_says_what_to_install() -> None:
    with pytest.raises(gc.FailImage, match="HEIC without pillow-heif: pip install pillow-heif"):
        gc.prepare_image(HEIC, 1024)


def test_heic_works_when_pillow_heif_is_there() -> None:
    heif = pytest.importorskip("pillow_heif")
    output = io.BytesIO()
    heif.from_pillow(picture((640, 480))).save(output)
    image = sent(output.getvalue())
    assert image.size == (640, 480)
    assert near(image.getpixel((5, 200)), RED)
