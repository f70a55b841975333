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


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    checked = kind + body
    return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))


def near(pixel: Any, colour: tuple[int, int, int], distance: int = 40) -> bool:
    return all(abs(a - b) <= distance for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG", "CMYK"])
def test_every_format_goes_out_as_jpeg_with_its_colours(kind: str) -> None:
    mode, kind = ("CMYK", "JPEG") if kind == "CMYK" else ("RGB", kind)
    image = sent(encode(picture(mode=mode), kind))
    assert image.size == (60, 40)
    assert near(image.getpixel((5, 20)), RED)
    assert near(image.getpixel((55, 20)), BLUE)


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F"]
)
def test_every_mode_goes_out_as_rgb(mode: str) -> None:
    kinds = {"YCbCr": "JPEG", **dict.fromkeys(("CMYK", "F", "LA", "I", "I;16B"), "TIFF")}
    grey = picture().convert("L").convert("I")
    source = grey.convert(mode) if mode in {"I;16", "I;16B", "I", "F"} else picture(mode=mode)
    assert sent(encode(source, kinds.get(mode, "PNG"))).size == (60, 40)


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")]
)
@pytest.mark.parametrize(("value", "expected"), [(9000, 35), (32768, 128), (65535, 255), (0, 0)])
def test_of_sixteen_bits_the_high_byte_counts(
    mode: str, kind: str, value: int, expected: int
) -> None:
    grey = Image.new("I", (40, 40), value)
    assert near(sent(encode(grey.convert(mode), kind)).getpixel((10, 10)), (expected,) * 3, 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("alpha", [0, 128])
def test_transparent_pixels_go_out_in_their_hidden_colour(kind: str, alpha: int) -> None:
    image = picture()
    image.putalpha(alpha)
    options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert near(sent(encode(image, kind, **options)).getpixel((5, 20)), RED)
    grey = encode(Image.new("LA", (40, 40), (90, alpha)))
    assert near(sent(grey).getpixel((9, 9)), (90, 90, 90), 2)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_keeps_its_colour(kind: str) -> None:
    image = picture().convert("P")
    data = encode(image, kind, transparency=image.getpixel((5, 20)))
    assert near(sent(data).getpixel((5, 20)), RED)


@pytest.mark.parametrize("kind", ["iCCP", "zTXt", "iTXt", "tEXt"])
def test_a_png_with_megabytes_of_profile_or_text_is_read(kind: str) -> None:
    body = bytes(range(1, 128)) * (600_000 if kind == "zTXt" else 20_000)
    packed = zlib.compress(body)
    bodies = {
        "iCCP": b"big\0\0" + packed,
        "zTXt": b"big\0\0" + packed,
        "iTXt": b"big\0\1\0\0\0" + packed,
        "tEXt": b"big\0" + body,
    }
    plain = encode(picture())
    head = 8 + 25  # signature and IHDR
    data = plain[:head] + chunk(kind.encode(), bodies[kind]) + plain[head:]
    assert near(sent(data).getpixel((5, 20)), RED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "red_at"),
    [*enumerate(("left", "right", "right", "left", "top", "top", "bottom", "bottom"), 1)],
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
    [
        ((4400, 3300), (1024, 768)),
        ((3300, 4400), (768, 1024)),
        ((1024, 1024), (1024, 1024)),
        # Qwen-VL servers fail on less than 32: https://github.com/ollama/ollama/issues/13113
        ((6000, 150), (1024, 32)),
        ((150, 6000), (32, 1024)),
        ((305, 30), (305, 32)),
        ((5000, 3), (1024, 32)),
        ((7, 5), (32, 32)),
        ((33, 35), (33, 35)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_longest_side_is_shrunk_to_the_limit_and_a_narrow_picture_stretched(
    size: tuple[int, int], expected: tuple[int, int], kind: str
) -> None:
    data = encode(picture(size), kind)
    image = sent(data)
    width, height = image.size
    assert image.size == expected
    # nothing is padded: the halves still meet in the middle
    assert near(image.getpixel((width // 4, height // 2)), RED, 80)
    assert near(image.getpixel((width - 2, height // 2)), BLUE, 80)
    assert gc.fit(gc.open_image(io.BytesIO(data)).size, 1024) == expected  # as -n counts


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4032, 3024), (1008, 756)),
        ((4000, 3000), (1000, 750)),
        ((3964, 2973), (1024, 768)),  # a quarter is 991: too small
        ((4100, 3075), (1024, 768)),  # a quarter is 1025: too large
        ((6000, 4000), (1024, 683)),
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
    assert 62 <= max(image.size) <= 64 or max(width, height) <= 62
    scale = min(1, max(image.size) / max(width, height))
    for now, before in zip(image.size, (width, height), strict=True):
        assert abs(now - max(32, before * scale)) < 2


def difference(one: Image.Image, other: Image.Image) -> float:
    """Return the root mean square of what two images differ by, all colours together, of 255."""
    by_colour = ImageStat.Stat(ImageChops.difference(one, other)).rms
    return math.sqrt(sum(rms**2 for rms in by_colour) / len(by_colour))


@pytest.mark.parametrize(
    ("kind", "size"), [("JPEG", (4032, 3024)), ("JPEG", (6000, 4000)), ("PNG", (4032, 3024))]
)
def test_a_photo_goes_out_as_a_full_reduction_would_show_it(
    kind: str, size: tuple[int, int]
) -> None:
    cat = Image.open(ROOT / "examples" / "images" / "cat.jpg")
    photo = Image.new("RGB", size)
    for left in range(0, size[0], cat.width):  # side by side: as sharp as a small image is
        for top in range(0, size[1], cat.height):
            photo.paste(cat, (left, top))
    data = encode(photo, kind, **({"quality": 92} if kind == "JPEG" else {"compress_level": 0}))
    now = sent(data)
    full = Image.open(io.BytesIO(data)).resize(now.size, Image.Resampling.LANCZOS)
    as_jpeg = Image.open(io.BytesIO(encode(full, "JPEG", quality=gc.JPEG_QUALITY)))
    loss = difference(as_jpeg, full)  # what any JPEG loses
    assert difference(now, full) < 1.15 * loss


@pytest.mark.parametrize("tail", [b"", b"\0" * 500, b"SEFT trailer of a phone"])
def test_a_jpeg_that_is_right_already_goes_out_as_its_own_bytes(tail: bytes) -> None:
    data = encode(picture(), "JPEG") + tail
    assert gc.prepare_image(data, 1024)[0] is data


@pytest.mark.parametrize(
    "data",
    [
        encode(picture((2000, 40)), "JPEG"),
        encode(picture((300, 30)), "JPEG"),
        encode(picture(mode="L"), "JPEG"),
        encode(picture(mode="CMYK"), "JPEG"),
        encode(picture(), "JPEG") + b"\0" * 5000,
    ],
    ids=["too large", "too narrow", "grey", "cmyk", "end mark far away"],
)
def test_any_other_jpeg_is_made_anew(data: bytes) -> None:
    assert gc.prepare_image(data, 1024)[0] != data


def png_claiming(width: int, height: int) -> bytes:
    """Return a small PNG whose header claims any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 999))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64
NOISE = Image.effect_noise((300, 300), 90).convert("RGB")
FIRST = {"JPEG": 9000, "PNG": 9000, "WEBP": 3000, "TIFF": 9000, "BMP": 9000}  # bytes of each
BAD = {
    "not an image": [
        *(b"", b"nope", b"\0" * 5000, b"<html>no</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a"),
        *(b"\xff\xd8", encode(NOISE, "AVIF")[:3000]),
    ],
    "damaged image": [
        *(encode(NOISE, kind)[:number] for kind, number in FIRST.items()),
        png_claiming(100, 100),
    ],
    "too many pixels": [png_claiming(60_000, 60_000), png_claiming(13_000, 13_000)],
}


@pytest.mark.parametrize(
    ("reason", "data"), [(reason, data) for reason, files in BAD.items() for data in files]
)
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
    with pytest.raises(gc.FailImage, match=r"not an image: HEIC needs the package pillow-heif"):
        gc.prepare_image(HEIC, 1024)


def test_heic_works_when_pillow_heif_is_there() -> None:
    heif = pytest.importorskip("pillow_heif")
    output = io.BytesIO()
    heif.from_pillow(picture((640, 480))).save(output)
    image = sent(output.getvalue())
    assert image.size == (640, 480)
    assert near(image.getpixel((5, 200)), RED)
