#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai[aiohttp]>=3.50,<4", "python-dotenv>=1.0,<2", "aiofiles>=24.1", "tenacity>=9,<10",
#   "pillow>=12,<14", "tqdm>=4.66,<5", "pyyaml>=6,<7", "ftfy>=6.3,<7", "chardet>=7.7,<8",
#   "genai-prices>=0.2.3,<0.3",
# ]
# ///
"""Caption a folder of images for training, with any server that speaks OpenAI's API.

    python gen-captions.py --image-dir ./images --caption-dir ./captions --config-dir ./config

Read this file from top to bottom; each section uses only sections above it:

    Text               one line that any terminal can show
    Settings           one table of settings; flag > environment > .env > default
    Data               what the sections hand to each other
    Files              read files; write them whole or not at all
    Journal            what was paid for, and what was replaced; the one writer
    Plan               which images need a caption, and where it goes
    Recipe             what the config folder says about the captions
    Pixels             any image file -> a small upright JPEG
    Trigger and style  make the answer the caption that the training wants
    Request and reply  build the question; judge the answer
    Money              what a request will cost, and what it did
    Throttle           the pace of all workers
    Ask                one request, its retries, what the server taught us
    Report             counts, progress, summary, exit code; Ctrl-C
    Encoding           what a file's bytes are, and what they should be
    Repair             --fix-encoding
    Review             what is wrong with a set as the trainer will see it; the page
    Local model        a model on this machine, its download and its server
    Run                what the parts of a run share; how it ends
    Caption            one image from file to caption: load, ask, keep
    Batch              requests as files, for OpenAI's Batch API or any engine
    Undo               what was replaced put back
    Commands           one function a command
    Main               errors become exit codes

A flag wins over the environment, that over .env, that over the default. The
key is read from OPENAI_API_KEY. Exit codes: 0 done or nothing to do; 1 some
images failed; 2 wrong usage or settings; 3 stopped (key, quota, server, disk);
130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import ntpath
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
import zlib
from base64 import b64encode
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO, FileIO, StringIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, NoReturn
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:  # imported where they are needed: --help and usage errors must not wait
    from asyncio import Event, Future
    from collections.abc import AsyncIterator
    from types import FrameType

    from httpx2 import AsyncClient, Response
    from openai import AsyncOpenAI
    from PIL import Image, ImageFile
    from tenacity import AsyncRetrying, RetryCallState

__version__ = "0.2.0"

log = logging.getLogger("gen-captions")

# --------------------------------------------------------------------------------------------- Text


def printable(text: str) -> str:
    """Return the text with all that a terminal would act on escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, limit: int = 300) -> str:
    """Return the text as one line; of a long one the middle goes."""
    line = printable(" ".join(text.split()))
    if len(line) <= limit:
        return line
    half = (limit - 3) // 2
    return f"{line[:half]} … {line[-half:]}"


def say(text: str) -> None:
    """Print a line of results."""
    print(printable(text))


# ----------------------------------------------------------------------------------------- Settings

OPENAI_URL = "https://api.openai.com/v1"
LOCAL_URL = "http://127.0.0.1/v1"  # until the engine has a port
TIMEOUT_S, SLOW_TIMEOUT_S = 120, 900  # flex waits for room; a processor alone takes a minute
IMAGE_SUFFIXES = tuple(".jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif".split())
KEY_START = r"(?<![\w-])(?:sk-|gsk_|AIza|xai-|hf_)[\w-]{8,}"  # how keys begin
NO_KEY = r"|(?:sk-)?your-(?:api-)?key\S*"  # blank, or what examples have in its place


class SettingsError(Exception):
    """What the user asks for cannot be done. Nothing was touched; exit code 2."""


class Reader(NamedTuple):
    """How the text of a setting is read."""

    read: Callable[[str], Any]  # raises ValueError, TypeError, LookupError: not allowed
    metavar: str
    allowed: str


def number(low: float, high: float) -> Reader:
    """Return the reader of a number within both bounds, a whole one where `low` is an int."""

    def read(text: str) -> float:
        value = type(low)(text)
        if not low <= value <= high:  # also false for nan
            raise ValueError
        return value

    whole = "whole " if isinstance(low, int) else ""
    return Reader(read, "N", f"a {whole}number from {low:g} to {high:g}")


def like(pattern: str, metavar: str, allowed: str) -> Reader:
    """Return the reader of a text that fits a pattern, whose group is the value."""

    def read(text: str) -> str:
        found = re.fullmatch(pattern, text)
        if not found:
            raise ValueError
        return found[1]

    return Reader(read, metavar, allowed)


def one_of(*names: str) -> Reader:
    """Return the reader of one name out of a few, in any letter case."""
    return Reader(lambda text: names[names.index(text.lower())], "NAME", " or ".join(names))


def read_url(text: str) -> str:
    """Return a server's address without what requests add to it."""
    url = text.strip("\"'").rstrip("/").removesuffix("/chat/completions")
    parts = urlsplit(url)
    has_more = parts.username is not None or parts.query or parts.fragment  # mostly a key
    is_whole = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    if has_more or not is_whole or not url.isprintable():
        raise ValueError
    return url


A_FOLDER = Reader(Path, "FOLDER", "a folder")
A_FILE = like(r"(.+)", "FILE", "a file")
A_TEXT = like(r"(?s)(.+)", "TEXT", "some text")
A_KEY = like(r"[\"'“”‘’]*([!-~]*?)[\"'“”‘’]*", "KEY", "a key of ASCII characters without blanks")
A_URL = Reader(read_url, "URL", "a URL such as http://localhost:11434/v1, without user or query")
A_PRICE = like(r"(\d*\.?\d+/\d*\.?\d+)", "IN/OUT", "dollars for a million tokens: 0.1/0.5")
AN_OBJECT = Reader(lambda text: {**json.loads(text)}, "JSON", 'a JSON object like {"top_k": 20}')
NOT_CAPTIONS = "jsonl?" + "".join(IMAGE_SUFFIXES).replace(".", "|")  # trainers read them otherwise
AN_EXTENSION = like(
    rf"(?i)\.?((?!(?:{NOT_CAPTIONS})$)[\w-]{{1,16}})",
    "EXT",
    "letters and digits, not json, not an image's",
)
AN_ENCODING = Reader(
    lambda name: " ".encode(name) and name, "NAME", "a text encoding such as cp1251 or shift_jis"
)
A_TRIGGER = like(r"((?=.*\w)[ -~\w]{1,100}?)[ ,;:]*", "WORD", "a word or a few")
A_MODEL = like(
    r"(.+\.gguf|small|medium|large|joycaption|[\w.-]+/[\w.-]+(?::[\w.-]+)?)",
    "MODEL",
    "small, medium, large, joycaption, FILE.gguf, or owner/name:quant at Hugging Face",
)


def file_like(pattern: str, allowed: str) -> Reader:
    """Return the reader of a file's name that can be no caption's and no image's."""
    return like(rf"(?i)({pattern})", "FILE", f"a file whose name ends in {allowed}")


def row(variable: str, help: str, reader: Reader | None, default: Any = None, **more: Any) -> Any:
    """Return the dataclass field of one setting; `more` is for argparse.

    Its flag is its name; `variable` may be blank. Without a reader it is a switch.
    """
    metadata = {"row": (variable, help, reader, more)}
    return field(default=default, repr=reader is not A_KEY, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a user can set: flags, variables, help, .env.example and docs come from here."""

    image_dir: Path | None = row("", "folder of images, with its sub-folders", A_FOLDER)
    caption_dir: Path | None = row("", "folder for captions; else beside the images", A_FOLDER)
    config_dir: Path | None = row(
        "", "folder with ai-toolkit job files, prompt.txt, exclude.txt; or one job file", A_FOLDER
    )
    trigger: str | None = row("GETCAP_TRIGGER", "opens each caption; else a job file's", A_TRIGGER)
    style: str = row(
        "GETCAP_STYLE", "prose, short (a sentence), tags", one_of("prose", "short", "tags"), "prose"
    )
    max_words: int | None = row("GETCAP_MAX_WORDS", "most words of a caption", number(1, 9999))
    prompt: str | None = row("GETCAP_PROMPT", "your own prompt; else prompt.txt's", A_TEXT)
    caption_ext: str | None = row(
        "GETCAP_CAPTION_EXT", "extension of captions; else a job file's, else txt", AN_EXTENSION
    )
    overwrite: bool = row("", "update captions that you have not changed since", None, False)
    limit: int | None = row("", "caption at most this many images", number(1, 10**9))

    api_key: str = row("OPENAI_API_KEY", "key of the server", A_KEY, "")  # others see flags
    base_url: str = row("OPENAI_BASE_URL", "server with OpenAI's API", A_URL, OPENAI_URL)
    model: str = row("GETCAP_MODEL", "vision model", A_TEXT, "gpt-6-luna")
    local: str | None = row(
        "", "a model on this machine: small, medium, large ...", A_MODEL, nargs="?", const="small"
    )
    max_side: int = row("GETCAP_MAX_SIDE", "longest side in pixels", number(32, 8192), 1024)
    max_tokens: int = row("GETCAP_MAX_TOKENS", "longest answer in tokens", number(1, 10**5), 300)
    reasoning_effort: str | None = row(
        "GETCAP_REASONING_EFFORT", "reasoning, paid like an answer; else none", A_TEXT
    )
    temperature: float | None = row(
        "GETCAP_TEMPERATURE", "randomness; else the model's own", number(0.0, 2)
    )
    extra_body: dict[str, Any] | None = row(
        "GETCAP_EXTRA_BODY", "JSON object that each request carries too", AN_OBJECT
    )

    max_cost: float | None = row("GETCAP_MAX_COST", "most dollars of a run", number(1e-4, 1e6))
    price: str | None = row("GETCAP_PRICE", "dollars for a million tokens in and out", A_PRICE)
    service_tier: str | None = row(
        "GETCAP_SERVICE_TIER", "flex: half price, slower", one_of("default", "flex")
    )

    thread_pool: int = row(
        "GETCAP_THREAD_POOL", "concurrent workers; 10, or 2 on this machine", number(1, 1000)
    )
    throttle_submission_rate: float | None = row(
        "GETCAP_THROTTLE_SUBMISSION_RATE", "most requests a second", number(1e-3, 1e4)
    )
    throttle_retries: int = row("GETCAP_THROTTLE_RETRIES", "retries per image", number(0, 100), 10)
    throttle_backoff_factor: float = row(
        "GETCAP_THROTTLE_BACKOFF_FACTOR", "base of exponential backoff", number(1e-3, 60), 2.0
    )
    timeout: float = row(
        "GETCAP_TIMEOUT", "seconds to wait for an answer; 120, or 900 if slow", number(1e-3, 1e5)
    )

    batch: bool = row("", "OpenAI's Batch API: half price, within a day", None, False)
    batch_export: Path | None = row("", "write batch files there, and stop", A_FOLDER)
    batch_import: list[str] | None = row("", "read such files' answers", A_FILE, nargs="+")

    review: str | bool | None = row(
        "", "find faults in captions", file_like(r".+\.html?", ".html"), nargs="?", const=True
    )
    fix_encoding: bool = row("", "make all texts UTF-8, and repair their letters", None, False)
    encoding: str | None = row("", "with --fix-encoding: what the other files are", AN_ENCODING)
    undo: bool = row("", "take the last --overwrite or --fix-encoding back", None, False)

    dry_run: bool = row("", "only say what would be done, and what it costs", None, False)
    report: str | None = row(
        "", "write each outcome as a line of JSON; - is stdout", file_like(r"-|.+\.jsonl", ".jsonl")
    )
    log_level: str = row(
        "GETCAP_LOG_LEVEL", "how much is said", one_of("debug", "info", "warning", "error"), "info"
    )

    @property
    def host(self) -> str:
        """The server's name, with its port."""
        return urlsplit(self.base_url).netloc


GROUPS = {  # by the first setting of each
    "image_dir": "folders",
    "trigger": "captions",
    "api_key": "model",
    "max_cost": "cost",
    "thread_pool": "speed",
    "batch": "large sets",
    "review": "other jobs",
    "dry_run": "what it says",
}
FIRST_WEEK = (  # what -h shows
    *("image_dir", "caption_dir", "config_dir", "trigger", "style", "overwrite", "limit"),
    *("base_url", "model", "local", "max_cost", "review", "fix_encoding", "undo", "dry_run"),
)
INTRODUCTION = """\
Caption a folder of images for training. Captions that exist are left alone.

examples:
  gen-captions ./images                with OpenAI; the key is in OPENAI_API_KEY
  gen-captions --local ./images        with a model on this machine, no key
  gen-captions -n ./images             only say what it would do and cost
  gen-captions --review ./images       find what is wrong with the captions"""
NEXT = "Captions go beside the images. --help shows all flags, and the variables."


def rows() -> Iterator[tuple[str, Any, str, str, Reader | None, dict[str, Any]]]:
    """Yield the table: each setting's name, default, variable, help, reader, and more."""
    for item in dataclasses.fields(Settings):
        yield (item.name, item.default, *item.metadata["row"])


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse with the exit left to main; a key in the wrong place is not repeated."""

    def error(self, message: str) -> NoReturn:
        """Raise a SettingsError."""
        raise SettingsError(f"{re.sub(KEY_START, '…', message)} (-h shows the flags)")


def read_value(source: str, reader: Reader, text: str) -> Any:
    """Return a setting's value. Raises a SettingsError that says what is allowed."""
    text, is_key = text.strip(), reader is A_KEY
    with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
        # blank: the shell's variable behind a flag was empty
        if text and (is_key or not re.match(KEY_START, text)):
            return reader.read(text)
    is_hidden = is_key or re.search(rf"{KEY_START}|://[^/]*@", text)
    shown = "the value" if is_hidden else f'"{shorten(text, 80)}"'
    raise SettingsError(f"{source}: {shown} is not allowed; allowed: {reader.allowed}")


def build_parser(environ: Mapping[str, str], *, short: bool = False) -> Parser:
    """Return the command line; variables are the defaults of their flags."""
    parser = Parser(
        prog="gen-captions",
        usage="gen-captions IMAGES [options]",
        description=INTRODUCTION,
        epilog=NEXT if short else (__doc__ or "").rpartition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    a_folder = functools.partial(read_value, "IMAGES", A_FOLDER)
    parser.add_argument("images", type=a_folder, nargs="?", help=argparse.SUPPRESS)
    group: Any = parser
    for name, default, variable, help, reader, more in rows():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        value = f"={default}" if default else ""
        note = f" [{variable}{value}]" if variable and not short else ""
        shown = help + note if not short or name in FIRST_WEEK else argparse.SUPPRESS
        flags = ["-n"] * (name == "dry_run") + [flag_of(name)]
        if reader is None:
            group.add_argument(*flags, action="store_true", help=shown)
            continue
        given = environ.get(variable, "").strip() or default
        if reader is A_KEY:  # never a flag: others see those
            parser.set_defaults(api_key=read_value(variable, reader, given) if given else "")
            continue
        source = f"{flags[0]} ({variable})" if variable else flags[0]
        kind = functools.partial(read_value, source, reader)
        own = {"type": kind, "metavar": reader.metavar, "default": given, "help": shown}
        group.add_argument(*flags, **own, **more)
    level: dict[str, Any] = {"dest": "log_level", "action": "store_const"}
    help = "say more: each request and answer"
    group.add_argument("-v", "--verbose", const="debug", help=help, **level)
    help = "say only what is wrong, and the summary"
    group.add_argument("-q", "--quiet", const="warning", help=help, **level)
    version = f"gen-captions {__version__}"
    group.add_argument("-V", "--version", action="version", version=version)
    group.add_argument("-h", "--help", action="help", help="-h is short, --help shows all")
    return parser


def put_folder_first(argv: Sequence[str]) -> list[str]:
    """Return the command line so that `--local ./images` does what it looks like."""
    flag = ""
    for index, word in enumerate(argv):
        if word.startswith("-"):
            flag = word
        elif flag in {"--local", "--review", "--batch-import"} and os.path.isdir(word):
            return [word, *argv[:index], *argv[index + 1 :]]
    return list(argv)


def name_unknown(word: str, known: Iterable[str]) -> SettingsError:
    """Return the error for a mistyped flag or variable."""
    import difflib

    meant = difflib.get_close_matches(word, known, 1)
    hint = f"did you mean {meant[0]}?" if meant else "--help shows all"
    return SettingsError(f"{re.sub(KEY_START, '…', word)}: there is no such setting; {hint}")


def resolve_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Return the settings. Raises SettingsError; --help and --version exit."""
    variables = [row[2] for row in rows()]
    for name in environ:
        if name.upper().startswith("GETCAP_") and name not in variables:  # mistyped is lost
            raise name_unknown(name, variables)
    parser = build_parser(environ, short="-h" in argv)
    found, unknown = parser.parse_known_args(put_folder_first(argv))
    if unknown and unknown[0].startswith("-"):
        raise name_unknown(unknown[0].partition("=")[0], [flag_of(row[0]) for row in rows()])
    if unknown:
        said = "what is this? Only one folder of images can stand alone"
        raise SettingsError(f"{re.sub(KEY_START, '…', unknown[0])}: {said}")
    chosen = vars(found)
    images = chosen.pop("images")
    if images and chosen["image_dir"]:
        raise SettingsError(f"{images}: the image folder is given twice, also as --image-dir")
    chosen["image_dir"] = chosen["image_dir"] or images
    if local := chosen["local"]:
        if {"--model", "--base-url"} & {word.partition("=")[0] for word in argv}:
            raise SettingsError("--local: names its model itself; leave --model, --base-url out")
        chosen |= {"model": local, "base_url": LOCAL_URL, "api_key": ""}
        chosen |= {"service_tier": None, "max_cost": None}
    is_slow = local or chosen["service_tier"] == "flex"
    chosen["timeout"] = chosen["timeout"] or (SLOW_TIMEOUT_S if is_slow else TIMEOUT_S)
    is_here = is_this_machine(chosen["base_url"])
    chosen["thread_pool"] = chosen["thread_pool"] or (2 if is_here else 10)
    return Settings(**chosen)


def is_this_machine(url: str) -> bool:
    """Return whether the server runs on this machine."""
    host = urlsplit(url).hostname or ""
    return bool(re.fullmatch(r"127\.[\d.]+|(?:.*\.)?localhost|::1|0\.0\.0\.0", host))


def is_openai(url: str) -> bool:
    """Return whether the server is OpenAI's own."""
    return f".{urlsplit(url).hostname}".endswith(".api.openai.com")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without its BOM. Raises SettingsError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    if "\0" in text:  # PowerShell 5.1 writes UTF-16 for `echo X > .env`
        raise SettingsError(f"{path}: is not saved as UTF-8; save it again as UTF-8")
    return text


def read_env_file(path: Path) -> dict[str, str]:
    """Return the variables of a .env file. Raises SettingsError where a setting would be lost."""
    from dotenv.parser import parse_stream

    found: dict[str, str] = {}
    for name, value, original, is_broken in parse_stream(StringIO(read_text(path))):
        if name and name.isidentifier() and value is not None:
            found[name] = value
        elif name or is_broken:  # no comment
            words = original.string.lstrip()
            line = original.line + original.string.removesuffix(words).count("\n")
            said = f"{path}, line {line}: cannot be read; write NAME=value"
            if re.search("GETCAP_|OPENAI_", words):
                raise SettingsError(said)
            if is_broken:
                log.warning(said)
    return found


def read_settings(argv: Sequence[str]) -> Settings:
    """Return the settings of this process. Raises SettingsError; --help and --version exit."""
    shell = {name: value for name, value in os.environ.items() if value.strip()}
    places = (Path(".env"), Path(__file__).resolve().with_name(".env"))
    path = next((place for place in places if place.is_file()), None)
    return resolve_settings(argv, (read_env_file(path) if path else {}) | shell)


# --------------------------------------------------------------------------------------------- Data


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal: what became of an image or a file, and what it cost."""

    outcome: str = ""  # captioned, refused, failed, repaired
    recipe: str = ""  # the identity of the Recipe that it was made with
    trigger: str = ""  # what the caption opens with
    image_sha256: str = ""
    image_mtime_ns: int = 0
    caption_sha256: str = ""  # of the file that was written
    answer: str = ""  # past the gate, before cut and trigger: another trigger costs nothing
    model: str = ""
    usd: float = 0.0  # 0 where the price is not known
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Finding(NamedTuple):
    """Something that is wrong with one file."""

    kind: str
    path: str
    detail: str = ""


class Job(NamedTuple):
    """An image that needs a caption. Paths are text: 100,000 of them are light."""

    image: str
    caption: str
    replaces: Entry | None = None  # our caption that stands there, out of date
    answer: str = ""  # known already: nothing need be asked


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the captions of this run are made from, and where that comes from."""

    prompt: str  # with {name} {folder} {caption} {exclude} to be filled in for each image
    identity: str  # fingerprint of all that makes a caption, but for its image and its trigger
    style: str = "prose"
    max_words: int | None = None
    exclude: tuple[str, ...] = ()
    trigger: str = ""  # what opens each caption
    trigger_word: str = ""  # the word that it stands for
    caption_ext: str = "txt"
    architecture: str = ""  # of the model that is trained
    findings: tuple[Finding, ...] = ()  # what the user should know about the config folder
    lines: tuple[str, ...] = ()  # the recipe as understood, and where each part comes from


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as the server counts them."""

    prompt: int = 0
    answer: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.answer + other.answer)


class Outcome(NamedTuple):
    """What became of one image or one file."""

    path: str
    kind: str  # captioned, repaired, planned, exported, skipped, failed
    reason: str = ""  # one of a few names
    detail: str = ""  # what to do about it; of a caption, its text
    caption: str = ""  # the caption's file
    notes: tuple[str, ...] = ()  # what is worth a look


class StopRun(Exception):  # noqa: N818 - it is what happens, like StopIteration
    """Nothing further can succeed. What is on its way is kept."""


class FailImage(Exception):  # noqa: N818
    """This image fails; unless `retry_after_s` is None, another try may succeed after it."""

    def __init__(self, reason: str, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s


# -------------------------------------------------------------------------------------------- Files

# a pipe would wait for its writer without O_NONBLOCK, which Windows has not
READ_ONLY = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
BLANKS = b" \t\r\n\v\f\0\xef\xbb\xbf"  # with the BOM, and the NUL bytes that a crash can leave
LARGEST_FILE = 256 << 20
UNREAD = (1 << 31) - 2  # a place that no journal reaches, and the last that msvcrt can lock


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that stand for these values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_file(path: str) -> bytes:
    """Return a file's bytes. Raises OSError, also for a pipe, which would wait, and a giant."""
    with FileIO(os.open(path, READ_ONLY)) as file:  # each system call of a thread has a price
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is a folder, a pipe or a device", path)
        if status.st_size > LARGEST_FILE:
            raise OSError(errno.EFBIG, f"is over {LARGEST_FILE >> 20} MiB", path)
        return file.readall()


def has_caption(path: str) -> bool:
    """Return whether a file holds anything but blanks. Raises OSError."""
    try:
        handle = os.open(path, READ_ONLY)
    except (FileNotFoundError, NotADirectoryError):  # the latter is said when its folder is made
        return False
    with FileIO(handle):  # which closes it
        start = os.read(handle, 4096)  # in half the time of all
    return bool(start.strip(BLANKS) or (len(start) == 4096 and read_file(path).strip(BLANKS)))


def hash_file(path: str) -> str:
    """Return a file's SHA-256 in hex. Raises OSError."""
    return hashlib.sha256(read_file(path)).hexdigest()


def is_file_with(path: str, digest: str) -> bool:
    """Return whether a file can be read and has this SHA-256."""
    try:
        return hash_file(path) == digest
    except OSError:
        return False


def name_below(root: str | Path, path: str) -> str:
    """Return a path as seen from a folder that it lies in, with slashes."""
    return path.removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def open_locked(path: str) -> int:
    """Return the descriptor of a file to append to. Raises OSError; StopRun if it is locked."""
    handle = os.open(path, APPEND, 0o666)
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, UNREAD, os.SEEK_SET)  # what is locked nobody else can read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EAGAIN, errno.EDEADLK}:
            os.close(handle)
            raise StopRun(f"{path}: another run is at work there; wait for its end") from None
        log.debug("%s: cannot be locked", path)  # some network folders have no locks
    return handle


def follow_link(path: str) -> str:
    """Return a path, or the one that a link there leads to."""
    return os.path.realpath(path) if os.path.islink(path) else path


def temporary_of(path: str) -> str:
    """Return the name under which a file is written, the same each time; trainers pass over it."""
    folder, name = os.path.split(follow_link(path))
    return os.path.join(folder, f".gc-{fingerprint(os.fsencode(name).hex())}")


def write_whole(
    path: str, data: bytes, may_replace: Callable[[], bool] = lambda: True, *, sync: bool = True
) -> bool:
    """Write a file, or what a link names, whole or not at all. Raises OSError.

    Returns False, and changes nothing, where it may not replace what stands there. With `sync`
    the bytes are on the disk before. Permissions stay, else they are what the umask gives.
    """
    path, temporary = follow_link(path), temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if not may_replace():
            return False
        with contextlib.suppress(FileNotFoundError, PermissionError, AttributeError):
            before = os.stat(path)
            os.chmod(temporary, stat.S_IMODE(before.st_mode))
            os.chown(temporary, before.st_uid, before.st_gid)  # Windows has no owners
        os.replace(temporary, path)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


# ------------------------------------------------------------------------------------------ Journal

STATE_FOLDER = ".gen-captions"  # trainers pass over it
KEPT, UNDONE, RESTORED = "replaced-", "undone-", "restored-"  # folders of originals
OPEN = ".open"  # behind the name of such a folder until its run has ended
STARTED = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")  # in the names of such folders
CAPTIONED = re.compile(  # of a journal line: the file, the recipe, the trigger, the caption's hash
    rb'"file": ("(?:[^"\\]|\\.)*").*"outcome": "captioned", "recipe": "(\w*)", '
    rb'"trigger": ("(?:[^"\\]|\\.)*").*"caption_sha256": "(\w+)"'
)


def parse_entry(line: bytes) -> tuple[str, Entry] | None:
    """Return the file and the entry of a journal's line, None for a torn one."""
    try:
        found = json.loads(line)
        values = {item.name: found[item.name] for item in dataclasses.fields(Entry)}
        return str(found["file"]), Entry(**values)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


class Journal:
    """What was asked, paid for and written, as lines of JSON; it tells our files from others."""

    def __init__(self, root: str | Path, kept: str = KEPT) -> None:
        self._root = str(root)
        self.folder = os.path.join(root, STATE_FOLDER)
        self.path = os.path.join(self.folder, "journal.jsonl")
        self._kept = kept
        self._kept_folder = ""
        self._handle = -1
        self._made: list[str] = []  # folders, the deepest first
        self._lock = threading.Lock()

    @functools.cached_property
    def history(self) -> dict[str, list[Entry]]:
        """The entries of each file, oldest first. Raises SettingsError."""
        found: dict[str, list[Entry]] = {}
        for line in self._lines():
            if parsed := parse_entry(line):
                found.setdefault(parsed[0], []).append(parsed[1])
        return found

    def past(self, path: str) -> Sequence[Entry]:
        """Return what is known of a file, oldest first."""
        return self.history.get(name_below(self._root, path), ())

    def count_outdated(self, recipe: Recipe) -> int:
        """Return how many captions stand as we wrote them, with another recipe or trigger."""
        known = recipe.identity.encode(), json.dumps(recipe.trigger).encode()
        outdated: dict[bytes, bytes] = {}
        for line in self._lines():
            if found := CAPTIONED.search(line):
                file, *made_with, digest = found.groups()
                if tuple(made_with) == known:
                    outdated.pop(file, None)
                else:
                    outdated[file] = digest
        paths = {os.path.join(self._root, json.loads(file)): sha for file, sha in outdated.items()}
        return sum(is_file_with(path, digest.decode()) for path, digest in paths.items())

    def open(self) -> None:
        """Get ready to write. Raises StopRun where that cannot be, or another run writes."""
        try:
            place = os.path.abspath(self.folder)
            while not os.path.isdir(place):
                self._made.append(place)
                place = os.path.dirname(place)
            os.makedirs(self.folder, exist_ok=True)
            self._handle = open_locked(self.path)
            # a killed run's folder is gone on with, so that one --undo takes both back
            ours = (name for name in os.listdir(self.folder) if name.startswith(self._kept))
            killed = (name for name in ours if name.endswith(OPEN))
            name = next(killed, f"{self._kept}{STARTED}{OPEN}")
            self._kept_folder = os.path.join(self.folder, name)
            self.__dict__.pop("history", None)  # another run may have written meanwhile
        except OSError as error:
            said = f"{self.folder}: cannot be written: {error.strerror}; nothing was asked"
            raise StopRun(said) from error

    def append(self, path: str, entry: Entry, **more: Any) -> None:
        """Write one entry, and more that is worth knowing, to the disk. Raises OSError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        values = {"time": now, "file": name_below(self._root, path), **more}
        # the line break comes first, so that a line torn by a crash takes no other along
        data = b"\n" + json.dumps(values | dataclasses.asdict(entry)).encode()
        with self._lock:
            while data:  # a full disk takes a part first
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)

    def write(self, path: str, data: bytes, entry: Entry, replaces: str = "", **more: Any) -> bool:
        """Write a file whole, after its line; what it replaces is kept. Raises OSError.

        Returns False, and leaves the file alone, where anything but blanks or what has the
        SHA-256 `replaces` stands there. A new file is not synced: its line is on the disk.
        """
        digest = hashlib.sha256(data).hexdigest()

        def may_replace() -> bool:
            # a kill from here on leaves the line and the temporary file: Plan finds the answer
            self.append(path, dataclasses.replace(entry, caption_sha256=digest), **more)
            if not has_caption(path):
                return True
            is_ours = is_file_with(path, replaces)
            if is_ours:
                self.keep(path)
            return is_ours

        folder = os.path.dirname(follow_link(path))
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
        return write_whole(path, data, may_replace, sync=bool(replaces))

    def keep(self, path: str) -> None:
        """Give a file that is about to be replaced a second name, else copy it. Raises OSError."""
        # with "~" no *.txt finds it
        kept = os.path.join(self._kept_folder, name_below(self._root, path) + "~")
        if os.path.exists(kept):  # a killed run kept it before, as it was at first
            if hash_file(path) in {entry.caption_sha256 for entry in self.past(path)}:
                return
            os.replace(kept, f"{kept}.older")  # somebody changed it since
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        try:
            os.link(follow_link(path), kept)
        except OSError:
            write_whole(kept, read_file(path))
            shutil.copystat(path, kept)

    def close(self) -> None:
        """Let go of the file and its lock; leave no empty folders."""
        if self._handle < 0:
            return
        with contextlib.suppress(OSError):  # mostly since nothing was kept
            os.rename(self._kept_folder, self._kept_folder.removesuffix(OPEN))
        is_empty = not os.fstat(self._handle).st_size
        with contextlib.suppress(OSError):
            if is_empty:
                os.unlink(self.path)
                for folder in self._made:
                    os.rmdir(folder)
        os.close(self._handle)
        self._handle = -1

    def _lines(self) -> Iterator[bytes]:
        try:
            with open(os.open(self.path, READ_ONLY), "rb") as file:
                yield from file
        except FileNotFoundError:
            return
        except OSError as error:
            raise SettingsError(f"{self.path}: cannot be read: {error.strerror}") from None


# --------------------------------------------------------------------------------------------- Plan

MASK = "-masklabel.png"  # OneTrainer's, of the image beside it
OTHER_SUFFIXES = {  # what lies beside images and is not captioned, by what it is
    **dict.fromkeys((".mp4", ".avi", ".mov", ".webm", ".mkv", ".wmv", ".m4v", ".flv"), "video"),
    **dict.fromkeys((".jpe", ".jp2", ".jxl", ".tga", ".psd", ".svg"), "other format"),
    MASK: "mask",
}


class Pair(NamedTuple):
    """An image, the place of its caption, and whether anything but blanks stands there."""

    image: str
    caption: str
    has_caption: bool


def find_clashes(names: Iterable[str]) -> dict[str, str]:
    """Return each image name of a folder that shares its caption file, and with which other.

    Names are compared without letter case (Windows, macOS) and in NFC (macOS decomposes them).
    """
    first: dict[str, str] = {}
    clashes: dict[str, str] = {}
    for name in names:
        stem = unicodedata.normalize("NFC", os.path.splitext(name)[0]).casefold()
        other = first.setdefault(stem, name)
        if other != name:
            clashes[name] = other
            clashes.setdefault(other, name)
    return clashes


def walk_folders(root: str, trouble: list[OSError]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder once, links followed, with its visible files; `trouble` gets the rest."""
    seen = set[tuple[int, int]]()
    for folder, folders, names in os.walk(root, onerror=trouble.append, followlinks=True):
        status = os.stat(folder)
        place = status.st_dev, status.st_ino
        if place in seen and status.st_ino:  # some network folders number nothing
            folders.clear()
            continue
        seen.add(place)
        # as ai-toolkit does: toolkit/data_loader.py
        folders[:] = [name for name in folders if name[0] != "." and name != "_controls"]
        # real folders before links, so that a name without a link is the one that counts
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        yield folder, sorted(name for name in names if name[0] != ".")


def sort_names(folder: str, names: Iterable[str]) -> tuple[list[str], list[Outcome]]:
    """Return a folder's images to caption, and what else is worth a word."""
    images: list[str] = []
    skipped: list[Outcome] = []
    for name in names:
        lower = name.lower()
        suffix = MASK if lower.endswith(MASK) else os.path.splitext(lower)[1]
        if suffix in IMAGE_SUFFIXES:
            images.append(name)
        elif suffix in OTHER_SUFFIXES:
            what = OTHER_SUFFIXES[suffix]
            skipped.append(Outcome(os.path.join(folder, name), "skipped", what))
    return images, skipped


def walk_images(image_dir: Path, caption_dir: Path | None, ext: str) -> Iterator[Pair | Outcome]:
    """Yield each image below a folder, or what is in its way, sorted."""
    root, trouble = str(image_dir), list[OSError]()
    for folder, names in walk_folders(root, trouble):
        images, skipped = sort_names(folder, names)
        yield from skipped
        below = name_below(root, os.path.join(folder, ""))
        target = os.path.join(caption_dir or root, below)
        clashes = find_clashes(images)
        for name in images:
            image = os.path.join(folder, name)
            caption = f"{target}{os.path.splitext(name)[0]}.{ext}"
            if other := clashes.get(name):
                said = f"{other} would use it too; rename one of them"
                yield Outcome(image, "failed", "shared caption file", said)
                continue
            try:
                yield Pair(image, caption, has_caption(caption))
            except OSError as error:
                said = f"{caption}: {error.strerror}"
                yield Outcome(image, "failed", "unreadable caption", said)
    for problem in trouble:
        said = f"{problem.strerror}; check its permissions"
        yield Outcome(str(problem.filename), "failed", "unreadable folder", said)


def is_same_image(path: str, entry: Entry) -> bool:
    """Return whether an entry was made from this very image, by its time or its bytes."""
    with contextlib.suppress(OSError):  # the run will say what is wrong with it
        if os.stat(path).st_mtime_ns == entry.image_mtime_ns:
            return True
    return is_file_with(path, entry.image_sha256)


def find_known(pair: Pair, journal: Journal, recipe: Recipe) -> dict[str, Entry]:
    """Return the last entry of each outcome for this very image and this recipe."""
    return {
        entry.outcome: entry
        for entry in journal.past(pair.caption)
        if entry.recipe == recipe.identity and is_file_with(pair.image, entry.image_sha256)
    }


def judge_caption_file(pair: Pair, journal: Journal, recipe: Recipe) -> Job | Outcome:
    """Decide about an image whose caption stands there, with --overwrite."""
    image, caption, _ = pair
    past = [entry for entry in journal.past(caption) if entry.outcome == "captioned"]
    ours = (entry for entry in reversed(past) if is_file_with(caption, entry.caption_sha256))
    entry = next(ours, None)
    if entry is None:
        why = "changed by you" if past else "not made by gen-captions"
        return Outcome(image, "skipped", why, caption=caption)
    known = find_known(pair, journal, recipe)
    is_current = entry.recipe == recipe.identity and is_same_image(image, entry)
    if is_current and entry.trigger == recipe.trigger:
        return Outcome(image, "skipped", "up to date", caption=caption)
    if "refused" in known and not is_current:  # what stands there is the better caption
        return Outcome(image, "skipped", "refused before", caption=caption)
    # this prompt was answered before another was tried, or before a crash: it is paid for
    answered = entry if is_current else known.get("captioned")
    return Job(image, caption, entry, answered.answer if answered else "")


def judge_pair(pair: Pair, journal: Journal, recipe: Recipe, *, overwrite: bool) -> Job | Outcome:
    """Decide what is to be done about an image, by its caption and the journal."""
    image, caption, is_there = pair
    if is_there and overwrite:
        return judge_caption_file(pair, journal, recipe)
    if is_there:
        return Outcome(image, "skipped", "has a caption", caption=caption)
    known = find_known(pair, journal, recipe)
    if "refused" in known:
        said = "with these settings; caption it by hand, or change model or prompt"
        return Outcome(image, "failed", "refused before", said)
    # a crash leaves a blank file or a temporary one, and the answer is paid for; who wants a
    # caption made anew deletes its file
    entry = known.get("captioned", Entry())
    is_left = is_file_with(temporary_of(caption), entry.caption_sha256)
    was_lost = is_left or os.path.exists(caption)
    return Job(image, caption, answer=entry.answer if was_lost else "")


def check_folder(flag: str, path: Path) -> None:
    """Raise the SettingsError for a folder that is none."""
    if not path.is_dir():
        why = "is no folder" if os.path.lexists(path) else "there is no such folder"
        raise SettingsError(f"{flag}: {path}: {why}")


def check_folders(settings: Settings) -> Path:
    """Return the image folder. Raises SettingsError for a folder that is none."""
    if settings.image_dir is None:
        raise SettingsError(
            "Which images? Type: gen-captions ./images\n"
            "With a model on this machine: gen-captions --local ./images\n"
            "All else: gen-captions -h"
        )
    check_folder("--image-dir", settings.image_dir)
    if settings.caption_dir and os.path.lexists(settings.caption_dir):
        check_folder("--caption-dir", settings.caption_dir)
    if settings.config_dir and not settings.config_dir.is_file():
        check_folder("--config-dir", settings.config_dir)
    return settings.image_dir


# ------------------------------------------------------------------------------------------- Recipe

PROMPTS = {
    "prose": """\
Write one caption for this image, for training an image generator: plain English prose, one \
paragraph, at most {words} words, fewer for a simple image.
Start with the main subject and its action. Continue with clothing or materials and their \
colours, other objects, where things are, the setting, the lighting, the shot type and camera \
angle.{medium}
Write definite facts, one exact word per colour, material and pose. Count up to five; beyond \
that write "many". Left and right are the viewer's. Describe people by visible attributes. Copy \
large readable text exactly, in double quotes. Skip whatever is unclear or absent.
Output only the caption.""",
    "short": """\
Describe this image in one plain English sentence of at most {words} words: the main subject and \
its action first, then colours and clothing or material, the setting, the shot type. Use only \
what is clearly visible.
Output only the sentence.""",
    "tags": """\
Write tags for this image: one line, lowercase, separated by commas, at most {words} words in \
all, tags of one to three words, each once.
Order: number and kind of subjects, clothing, pose, expression, framing, objects, setting, \
lighting.
Tag only what is clearly visible.
Output only the tags.""",
}
MEDIUM = " End with the medium, such as photo, drawing or 3D render."
# what it was trained on: https://github.com/fpgaminer/joycaption
JOYCAPTION_PROMPT = "Write a long descriptive caption for this image in a formal tone."
USUAL_WORDS = {"prose": 90, "short": 35, "tags": 60}  # asked for; only --max-words is held to
UNSAID = "Leave these unsaid, they are already known: {exclude}."
PLACEHOLDER = r"\{(name|folder|caption|exclude)\}"  # other braces stay as they are
TRAINERS_MARK = "[trigger]"  # ai-toolkit fills it in, or deletes it where no trigger is set
JOB_SUFFIXES = (".yaml", ".yml", ".json", ".jsonc")
# where a line starts, perhaps with a BOM; in braces; in quotes
IS_JOB = rb"(?m)^[^\w\s#-]*job[\"']?\s*:|[{,\"]\s*job\"?\s*:"
COMMENT = r'(?s)("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/'  # in .jsonc; strings stay


def fill_prompt(recipe: Recipe, image: str, caption: str) -> str:
    """Return the prompt for one image; `caption` is what its file says so far."""
    values = {
        "name": os.path.splitext(os.path.basename(image))[0],
        "folder": os.path.basename(os.path.dirname(os.path.abspath(image))),
        "caption": caption,
        "exclude": ", ".join(recipe.exclude),
    }
    prompt = re.sub(PLACEHOLDER, lambda found: values[found[1]], recipe.prompt)
    return prompt.encode(errors="replace").decode()  # a name may hold bytes that are no text


def build_prompt(style: str, max_words: int | None, exclude: Sequence[str], own: str) -> str:
    """Return the prompt with its placeholders: the user's own, else the style's."""
    if own:
        rules = [f"Use at most {max_words} words."] if max_words else []
        rules += [UNSAID] if exclude and "{exclude}" not in own else []
        return "\n".join([own, *rules])
    # the medium may be what is to be left unsaid
    prompt = PROMPTS[style].replace("{medium}", "" if exclude else MEDIUM)
    *lines, last = prompt.replace("{words}", str(max_words or USUAL_WORDS[style])).split("\n")
    return "\n".join([*lines, *[UNSAID] * bool(exclude), last])


class Dataset(NamedTuple):
    """One dataset of an ai-toolkit job file, as the trainer reads it."""

    file: str
    folder: str  # blank for a process without datasets
    trigger: str
    caption_ext: str
    is_reg: bool
    architecture: str  # of the model that is trained


def read_job(config: Mapping[str, Any], file: str, findings: list[Finding]) -> Iterator[Dataset]:
    """Yield the datasets of a job, with ai-toolkit's defaults (toolkit/config_modules.py)."""

    def text(key: str, *values: Any) -> str:
        value = next((value for value in values if value is not None), "")
        if isinstance(value, str):
            return value.replace("[name]", str(config.get("name")))
        said = f"{key}: YAML reads it as {value!r}; put it in quotes"
        findings.append(Finding("no text", file, said))
        return ""

    for process in config["process"]:
        model = process.get("model") or {}
        for found in process.get("datasets") or [{}]:
            folder = text("folder_path", found.get("dataset_path"), found.get("folder_path"))
            trigger = text("trigger_word", found.get("trigger_word"), process.get("trigger_word"))
            yield Dataset(
                file=file,
                folder=os.path.expandvars(folder),
                trigger=trigger.strip(),
                caption_ext=text("caption_ext", found.get("caption_ext")).lstrip(".") or "txt",
                is_reg=found.get("is_reg") is True,
                architecture=f"{model.get('arch') or ''} {model.get('name_or_path') or ''}".strip(),
            )


def read_job_file(path: Path, findings: list[Finding]) -> list[Dataset]:
    """Return the datasets of a job file, none of other files. Raises SettingsError."""
    try:
        if not re.search(IS_JOB, path.read_bytes().replace(b"\0", b"")):
            return []
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    import yaml

    text = read_text(path)
    try:
        if path.suffix.lower().startswith(".json"):
            # lines stay lines, so that an error names the right one
            plain = re.sub(COMMENT, lambda part: part[1] or "\n" * part[0].count("\n"), text)
            found = json.loads(plain)
        else:
            found = yaml.safe_load(text)
        if not isinstance(found, dict) or "job" not in found:
            return []
        return list(read_job(found["config"], str(path), findings))
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = mark.line + 1 if mark else getattr(e, "lineno", 0)
        where = f"{path}, line {line}" if line else str(path)
        said = shorten(f"{type(e).__name__}: {getattr(e, 'problem', None) or e}", 200)
        raise SettingsError(f"{where}: this job file cannot be read: {said}") from None


def list_job_files(place: Path) -> list[Path]:
    """Return what may be job files: the file itself, or those in a folder. Raises OSError."""
    if place.is_file():
        return [place]
    # not those in sub-folders: ai-toolkit's own has dozens of examples
    names = sorted(name for name in os.listdir(place) if name.lower().endswith(JOB_SUFFIXES))
    paths = [place / name for name in names if name[0] != "." or name == ".job_config.json"]
    return [path for path in paths if path.is_file()]


def last_part(path: str) -> str:
    """Return the last name of a path of any system, in one letter case."""
    return ntpath.basename(path.rstrip("\\/")).casefold()


def match_datasets(datasets: Sequence[Dataset], places: Sequence[str]) -> list[Dataset]:
    """Return the datasets at one of these real paths, else of the same last name elsewhere."""
    named = [item for item in datasets if item.folder]
    exact = [item for item in named if os.path.realpath(item.folder) in places]
    names = {last_part(place) for place in places}
    # not on this machine: the training runs on another
    elsewhere = [item for item in named if not os.path.exists(item.folder)]
    return exact or [item for item in elsewhere if last_part(item.folder) in names]


def decide_trigger(
    word: str | None, matching: Sequence[Dataset], datasets: Sequence[Dataset]
) -> tuple[str, str, str]:
    """Return what opens the captions, the word that it stands for, and where it comes from."""
    # the trainer replaces triggers there
    if matching and all(item.is_reg for item in matching):
        return "", "", f"{matching[0].file} says that this is a regularisation set (is_reg)"
    if word:
        return word, "" if word == TRAINERS_MARK else word, "--trigger or GETCAP_TRIGGER"
    for item in matching or datasets:
        if item.trigger and not item.is_reg:
            return TRAINERS_MARK, item.trigger, f"{item.file}, trigger_word {item.trigger}"
    return "", "", "no job file sets one"


def decide_extension(ext: str | None, matching: Sequence[Dataset]) -> tuple[str, str]:
    """Return the extension of the captions and where it comes from. Raises SettingsError."""
    if ext:
        return ext, "--caption-ext or GETCAP_CAPTION_EXT"
    files = {item.caption_ext: item.file for item in matching}
    if len(files) > 1:
        said = ", ".join(f"{name} in {file}" for name, file in files.items())
        raise SettingsError(f"--caption-ext (GETCAP_CAPTION_EXT): say which; job files have {said}")
    for name, file in files.items():
        return read_value(f"{file}: caption_ext", AN_EXTENSION, name), file
    return "txt", "the default"


def find_unread(settings: Settings, trigger: str, item: Dataset) -> Iterator[Finding]:
    """Yield why the trainer would not read the captions as they are."""
    caption_dir, image_dir = settings.caption_dir, settings.image_dir or ""
    if caption_dir and os.path.realpath(caption_dir) != os.path.realpath(image_dir):
        said = "the trainer looks beside the images; leave --caption-dir out"
        yield Finding("captions elsewhere", item.file, said)
    if settings.caption_ext and settings.caption_ext != item.caption_ext:
        said = f"the trainer reads captions that end in {item.caption_ext}"
        yield Finding("extension not read", item.file, said)
    if trigger not in {"", TRAINERS_MARK} and item.trigger not in trigger:
        said = f"the trainer puts its trigger_word {item.trigger} in front too"
        yield Finding("other trigger", item.file, said)


def read_own(folder: Path | None, name: str) -> str:
    """Return the text of a file in the config folder, blank when there is none."""
    return read_text(folder / name).strip() if folder and (folder / name).exists() else ""


def check_prompt(prompt: str, source: str) -> list[Finding]:
    """Return the placeholders of a prompt that are none. Raises SettingsError for {trigger}."""
    if "{trigger}" in prompt:
        said = "the model is not told the trigger, it is put in front of each caption"
        raise SettingsError(f"{source}: take {{trigger}} out; {said}")
    unknown = re.findall(r"\{\w+\}", re.sub(PLACEHOLDER, "", prompt))
    return [Finding("no placeholder", source, f"{name} stays as it is") for name in unknown]


def choose_prompt(settings: Settings, folder: Path | None) -> tuple[str, str]:
    """Return the user's prompt and where it comes from; a blank one is the built-in one."""
    if settings.prompt:
        return settings.prompt, "--prompt or GETCAP_PROMPT"
    if own := read_own(folder, "prompt.txt"):
        return own, f"{folder}/prompt.txt"
    if settings.local == "joycaption" and settings.style == "prose":
        return JOYCAPTION_PROMPT, "what joycaption was trained on"
    return "", "built in"


def read_recipe(settings: Settings) -> Recipe:
    """Return the recipe by the settings and the config folder. Raises SettingsError."""
    place = settings.config_dir
    folder = place.parent if place and place.is_file() else place
    findings: list[Finding] = []
    datasets: list[Dataset] = []
    for path in list_job_files(place) if place else ():
        datasets += read_job_file(path, findings)
    if place != folder and not datasets:
        raise SettingsError(f"--config-dir: {place}: is no ai-toolkit job file")
    places = (settings.image_dir, settings.caption_dir)
    matching = match_datasets(datasets, [os.path.realpath(path) for path in places if path])
    trigger, word, trigger_source = decide_trigger(settings.trigger, matching, datasets)
    in_json = [item for item in matching if settings.review and item.caption_ext == "json"]
    said = "the trainer takes the whole text of each .json file, which is not looked at here"
    findings += [Finding("captions in JSON", item.file, said) for item in in_json]
    in_text = [item for item in matching if item not in in_json]
    ext, ext_source = decide_extension(settings.caption_ext, in_text)
    own, prompt_source = choose_prompt(settings, folder)
    terms = re.split(r"[,\n]", read_own(folder, "exclude.txt"))
    exclude = tuple(filter(None, (" ".join(term.split()) for term in terms)))
    prompt = build_prompt(settings.style, settings.max_words, exclude, own)
    findings += check_prompt(prompt, prompt_source)
    if matching:
        findings += find_unread(settings, trigger, matching[0])
    words = f", at most {settings.max_words} words" if settings.max_words else ""
    lines = [
        f"Style: {settings.style}{words}",
        f"Trigger: {trigger or 'none'} ({trigger_source})",
        f"Extension: {ext} ({ext_source})",
        f"Prompt: {prompt_source}",
    ]
    if exclude:
        lines.append(f"Left unsaid: {', '.join(exclude)} (exclude.txt)")
    return Recipe(
        prompt=prompt,
        identity=fingerprint(settings.model, prompt, exclude, settings.style),
        style=settings.style,
        max_words=settings.max_words,
        exclude=exclude,
        trigger=trigger,
        trigger_word=word,
        caption_ext=ext,
        architecture=next((item.architecture for item in matching), ""),
        findings=tuple(dict.fromkeys(findings)),  # a dataset may stand there for each resolution
        lines=tuple(lines),
    )


# ------------------------------------------------------------------------------------------- Pixels

JPEG_QUALITY = 90
LEAST_SIDE = 32  # Qwen-VL servers fail on less: https://github.com/ollama/ollama/issues/13113
MOST_PIXELS = 90_000_000  # to hold in memory; a JPEG may have twice as many, as it is shrunk early
# read by content; nothing that runs another program (EPS does), no video
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
ORIENTATION = 0x0112  # of EXIF
# Image.Transpose by EXIF orientation; ImageOps.exif_transpose also fails on broken neighbours
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
Size = tuple[int, int]


def load_pillow() -> None:
    """Import Pillow and its formats before threads need them; HEIC where it is installed."""
    from PIL import Image, PngImagePlugin

    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # open_image has the limit
    PngImagePlugin.MAX_TEXT_CHUNK = LARGEST_FILE  # profiles and prompts of over 1 MB are fine
    PngImagePlugin.MAX_TEXT_MEMORY = LARGEST_FILE
    warnings.filterwarnings("ignore", module=r"PIL\.")  # this file judges what Pillow warns about
    with contextlib.suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]

        pillow_heif.register_heif_opener()


def count_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def name_damage() -> Iterator[None]:
    """Turn whatever a decoder stumbles over into a FailImage."""
    try:
        yield
    except FailImage:
        raise
    except Exception as error:
        said = shorten(str(error) or repr(error), 120)
        raise FailImage("damaged image", f"{said}; open it in a viewer, save it again") from error


def open_image(file: IO[bytes]) -> ImageFile.ImageFile:
    """Return the image in a file, its pixels not decoded yet. Raises FailImage."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        heic = "" if "HEIF" in Image.OPEN else "; HEIC needs pip install pillow-heif"
        said = f"it holds none of {', '.join(FORMATS)}, or is cut short; convert it{heic}"
        raise FailImage("not an image", said) from None
    most = MOST_PIXELS * (2 if image.format in {"JPEG", "MPO"} else 1)
    if math.prod(image.size) > most:
        said = f"{image.width} x {image.height} does not fit in memory; shrink it first"
        raise FailImage("too many pixels", said)
    return image


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) without one."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # the picture itself may be fine
        return 1


def fit(size: Size, side: int) -> Size:
    """Return a size shrunk to at most `side` on its longest side."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def widen(size: Size) -> Size:
    """Return a size stretched to what models take at least."""
    return max(LEAST_SIDE, size[0]), max(LEAST_SIDE, size[1])


@name_damage()
def measure_image(file: IO[bytes], max_side: int) -> Size:
    """Return about the size that an image will be sent in. Raises FailImage."""
    return widen(fit(open_image(file).size, max_side))


def is_ready(image: ImageFile.ImageFile, data: bytes, max_side: int) -> bool:
    """Return whether a file is an upright RGB JPEG that fits, with its end in place."""
    is_plain = (image.format, image.mode, read_orientation(image)) == ("JPEG", "RGB", 1)
    if not is_plain or max(image.size) > max_side or min(image.size) < LEAST_SIDE:
        return False
    start = image.fp.tell() if image.fp else 0
    return data.rfind(b"\xff\xd9", max(start, len(data) - 1024)) != -1


@name_damage()
def prepare_image(data: bytes, max_side: int) -> tuple[bytes, Size]:
    """Return an image as an upright RGB JPEG that fits, and its size. Raises FailImage."""
    from PIL import Image

    image = open_image(BytesIO(data))
    if is_ready(image, data, max_side):
        return data, image.size
    # a JPEG is decoded at the least of 1/2, 1/4, 1/8 that is at most 1/32 too small: 4032 x 3024
    # becomes 1008 x 756, as many patches of 32 pixels as 1024 x 768 (benchmarks/README.md)
    image.draft("RGB", fit(image.size, max_side - max_side // 32))
    image.decodermaxblock = len(data)  # all at once: between blocks it waits for other threads
    image.load()  # TIFF turns itself upright here, and forgets its orientation
    turn = TURNS.get(read_orientation(image))
    small = to_rgb(image)
    # nearer to a full LANCZOS than Pillow's default, and quicker where nothing was drafted
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=1.5)
    if min(small.size) < LEAST_SIDE:
        small = small.resize(widen(small.size))
    if turn is not None:
        small = small.transpose(Image.Transpose(turn))
    output = BytesIO()
    small.save(output, "JPEG", quality=JPEG_QUALITY)
    return output.getvalue(), small.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as trainers see it: transparent pixels in their hidden colour."""
    # of 16 bits the high ones count; Pillow would cut the values off at 255
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


# -------------------------------------------------------------------------------- Trigger and style

SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\b(?:Mr|Ms|Dr|St))[.!?][\"”’')]*(?:\s+(?=[\"“(]?[A-Z0-9])|\Z)|[。！？]"
)
TAG_END = re.compile(r",\s*|\Z")


def tidy_tags(text: str) -> str:
    """Return tags as trainers read them: lower case, each once, with spaces for underscores."""
    tags = (" ".join(tag.strip(" .").split()) for tag in re.split(r"[,;，、\n]", text.lower()))
    # as in sd-scripts: ^_^ is a face
    plain = (tag.replace("_", " ") if len(tag) > 3 else tag for tag in tags if tag)
    return ", ".join(dict.fromkeys(plain))


def cut_caption(text: str, style: str, most: float = math.inf) -> str:
    """Return the whole sentences, or tags, of at most `most` words; blank where none is whole."""
    kept = ""
    for end in (TAG_END if style == "tags" else SENTENCE_END).finditer(text):
        start = text[: end.end()]
        if len(start.split()) > most:
            break
        if start.count('"') % 2 == 0:  # no quotation is cut in two
            kept = start
    return kept.strip().rstrip(",")


def find_excluded(text: str, exclude: Sequence[str]) -> list[str]:
    """Return which excluded words a text mentions, as whole words in any letter case."""
    return [term for term in exclude if re.search(rf"(?i)(?<!\w){re.escape(term)}(?!\w)", text)]


def find_opening(text: str, recipe: Recipe) -> re.Match[str] | None:
    """Return the trigger that a text opens with, and what stands behind it as the group."""
    word = re.escape(recipe.trigger_word).replace("_", "[_ ]")
    spelt = r"\[ ?(?:trigger|name) ?\]" + (f"|{word}" if word else "")
    return re.match(rf"(?i)[\"“*]*(?:{spelt})(?!\w|['’]s\b)([\"”*\s,.:;–-]*)", text)


def place_trigger(text: str, recipe: Recipe) -> str:
    """Return a caption that opens with the trigger; blank where there was nothing else."""
    # the model is not told the word, but the user's own prompt may have it
    opening, is_tags = find_opening(text, recipe), recipe.style == "tags"
    bare = text[opening.end() :] if opening else text
    if not recipe.trigger or not bare:
        return bare[:1].upper() + bare[1:] if opening and not is_tags else bare
    if not is_tags and re.match("(?:An?|The|Two|Three) ", bare):
        bare = bare[0].lower() + bare[1:]
    # "ohwx stands", but "ohwx, a man"; where ai-toolkit deletes its mark a comma would stay behind
    is_joined = recipe.trigger == TRAINERS_MARK or (opening and not opening[1].strip())
    return f"{recipe.trigger}{' ' if is_joined and not is_tags else ', '}{bare}"


def finish_caption(answer: str, recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """Return the caption that an answer comes to, and what is worth a look. Raises FailImage."""
    notes: list[str] = []
    text = answer
    if recipe.max_words and len(answer.split()) > recipe.max_words:
        text = cut_caption(answer, recipe.style, recipe.max_words) or answer
        notes.append("too long" if text == answer else "cut")
    if find_excluded(text, recipe.exclude):
        notes.append("excluded words")
    placed = place_trigger(text, recipe)
    if not placed:
        raise FailImage("empty", "the answer holds nothing but the trigger; change the prompt")
    return placed, tuple(notes)


# -------------------------------------------------------------------------------- Request and reply

DATA_URL = "data:image/jpeg;base64,"
NEWER_LIMIT, OLDER_LIMIT = "max_completion_tokens", "max_tokens"  # OpenAI's name, and others'
OUR_DEFAULTS = {"reasoning_effort", "prompt_cache_options"}  # unless the user sets them
LONGEST_WAIT_S = 600.0  # a server that asks for more ends the run
LONGEST_SAID_S = 30 * 86_400.0  # more is no time to wait

Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request: an answer or an error."""

    status: int = 200  # 0: nothing came back
    content: str = ""
    finish_reason: str = ""
    refusal: str = ""
    has_reasoning: bool = False
    usage: Usage | None = None  # None: the server did not count
    tier: str = ""  # the service tier that it was billed as
    error: str = ""  # for people; blank for an answer
    raw: str = ""  # the body of an error, for rules
    retry_after_s: float = 0.0
    is_free: bool = False  # nobody bills it


def first_parameters(settings: Settings) -> Parameters:
    """Return what a request carries beside the model and the message."""
    # else each image is written to a prompt cache, at a higher price, that nobody will read:
    # https://developers.openai.com/api/docs/guides/prompt-caching
    is_new = re.match(r"gpt-(?:5\.[6-9]|[6-9]|\d\d)", settings.model)
    has_cache = is_new and is_openai(settings.base_url)
    parameters: Parameters = {
        NEWER_LIMIT: settings.max_tokens,
        "reasoning_effort": settings.reasoning_effort or "none",
        "temperature": settings.temperature,
        "service_tier": settings.service_tier,
        "prompt_cache_options": {"mode": "explicit"} if has_cache else None,
        **(settings.extra_body or {}),  # a null in it takes a parameter out
    }
    return {name: value for name, value in parameters.items() if value is not None}


def other_parameters(settings: Settings, sent: Parameters) -> list[Parameters]:
    """Return what to send instead, in turn, when a server rejects these parameters."""
    # our own defaults go first, then the token limit gets its other name; what the user set stays
    ours = OUR_DEFAULTS - set(settings.extra_body or {})
    if settings.reasoning_effort:
        ours.discard("reasoning_effort")
    plain = {name: value for name, value in sent.items() if name not in ours}
    names = {NEWER_LIMIT: OLDER_LIMIT}
    renamed = {names.get(name, name): value for name, value in plain.items()}
    return [other for other, before in ((plain, sent), (renamed, plain)) if other != before]


def build_request(model: str, prompt: str, parameters: Parameters, image: bytes) -> bytes:
    """Return the JSON body of a chat completion; `image` is a JPEG in base64."""
    # https://platform.openai.com/docs/api-reference/chat/create
    url = {"type": "image_url", "image_url": {"url": DATA_URL}}
    # some templates know no role but "user" (Gemma, Mistral), so there is no system message
    message = {"role": "user", "content": [{"type": "text", "text": prompt}, url]}
    body = json.dumps({"model": model, **parameters, "messages": [message]}).encode()
    # the image is joined in: to dump it costs twice as much
    head, mark, tail = body.rpartition(DATA_URL.encode())
    return b"".join((head, mark, image, tail))


def dig(found: Any, *path: str | int) -> Any:
    """Return what lies at a path in parsed JSON, None where the path ends early."""
    with contextlib.suppress(LookupError, TypeError):
        for step in path:
            found = found[step]
        return found
    return None


def read_usage(found: Any) -> Usage | None:
    """Return the tokens that a server counts, None unless they can be."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    prompt, answer, total = (dig(found, name) for name in names)
    for count in (prompt, answer):
        if not isinstance(count, int | float) or not 0 <= count < 10**9:
            return None
    if isinstance(total, int | float) and total < 10**9:
        answer = max(answer, total - prompt)  # some leave thoughts out here, and bill them
    return Usage(int(prompt), int(answer)) if prompt else None


def parse_body(text: str) -> Any:
    """Return the JSON of a body, None when there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    # some servers stream though nobody asked: their events come to one completion
    events: list[Any] = []
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            events.append(json.loads(line.removeprefix("data:")))

    def last(*path: str | int) -> Any:
        return next(filter(None, (dig(event, *path) for event in reversed(events))), None)

    message: dict[str, str] = {}
    for name in ("content", "reasoning", "reasoning_content"):
        parts = (dig(event, "choices", 0, "delta", name) for event in events)
        message[name] = "".join(part for part in parts if isinstance(part, str))
    finish, error = last("choices", 0, "finish_reason"), last("error")
    if not finish and not error:  # cut short
        return None
    choice = {"message": message, "finish_reason": finish}
    return {"choices": [choice], "error": error, "usage": last("usage")}


def read_answer(body: Any) -> Reply | None:
    """Return the answer that a completion holds, None where there is none."""
    message, finish = dig(body, "choices", 0, "message"), dig(body, "choices", 0, "finish_reason")
    if not isinstance(message, dict) and not finish:
        return None
    content = dig(message, "content")
    # some answer in parts: thoughts, then text
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [dig(part, "text") for part in parts if dig(part, "type") in ("text", "output_text")]
    thoughts = (  # Ollama and vLLM; LM Studio and llama.cpp; OpenAI
        dig(message, "reasoning")
        or dig(message, "reasoning_content")
        or dig(body, "usage", "completion_tokens_details", "reasoning_tokens")
    )
    return Reply(
        content="".join(text for text in texts if isinstance(text, str)),
        finish_reason=str(finish or ""),
        refusal=str(dig(message, "refusal") or ""),
        has_reasoning=bool(thoughts) or len(texts) < len(parts),
        usage=read_usage(dig(body, "usage")),
        tier=str(dig(body, "service_tier") or "")[:40],
    )


def parse_reply(
    status: int, text: str, headers: Mapping[str, str] = {}, now_s: float = 0.0
) -> Reply:
    """Return what came back, whatever it is; `now_s` is the time as an epoch."""
    body = parse_body(text)
    named = dig(body, "choices", 0, "error") or dig(body, "error") or dig(body, 0, "error")
    answer = read_answer(body)
    if answer and not named and 200 <= status < 300:
        return answer
    # rules look at the first 4,000 characters
    raw, usage = text[:4000], read_usage(dig(body, "usage") or dig(named, "usage"))
    words = describe_error(raw)
    # a gateway that gave up waiting may stand before a model that did not
    is_free = not usage and (400 <= status < 502 or status == 503)
    code = str(dig(named, "code"))
    if status == 200 and code.isdecimal() and 400 <= int(code) < 600:
        status = int(code)  # OpenRouter's late errors come under HTTP 200
    wait_s = min(LONGEST_SAID_S, read_wait(headers, raw, named, now_s))
    if now_s and wait_s > 60:
        end = datetime.fromtimestamp(now_s + wait_s, UTC).astimezone()
        words += f"; it asks to wait until {end:%d %B %H:%M}"
    return Reply(status, usage=usage, error=words, raw=raw, retry_after_s=wait_s, is_free=is_free)


SAID = r'"(?:message|error|detail|raw)"\s*:\s*"((?:[^"\\]|\\.)+)"'
TAG = r"</?[a-zA-Z]\w*(?:\s[^<>]*)?/?>"  # of HTML, and of templates such as <answer>


def describe_error(raw: str) -> str:
    """Return what an error says: JSON however nested, a web page, plain text."""
    words = "; ".join(dict.fromkeys(re.findall(SAID, raw)))
    with contextlib.suppress(ValueError):
        words = json.loads(f'"{words}"', strict=False)
    return shorten(re.sub(TAG, " ", words or raw)) or "an error without a message"


def parse_duration(text: str) -> float:
    """Return the seconds of "7", "12ms", "6m0s" or "2 minutes"; 0 for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?) ?(ms|[hms]?)", text) if text[:1].isdecimal() else []
    scale = {"h": 3600.0, "m": 60.0, "ms": 0.001}
    return sum(float(number) * scale.get(unit, 1.0) for number, unit in parts)


# Google's "retryDelay": "26s"; OpenAI's "Please try again in 7m12s"
WAIT = r"(?i)(?:retry.?(?:delay|after|in)|(?:try again|resets?) (?:in|after))\W{1,5}(\d[\d.hms ]*)"


def read_wait(headers: Mapping[str, str], raw: str, error: Any, now_s: float) -> float:
    """Return the seconds that a server asks to wait, wherever it says so, else 0."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if wait_s := parse_duration(headers.get(name, "")):
            return wait_s * scale
    if said := re.search(WAIT, raw):
        return parse_duration(said[1])
    # OpenRouter's is the time when the limit ends, in milliseconds
    reset = str(dig(error, "metadata", "headers", "X-RateLimit-Reset"))
    if now_s and reset.isdecimal():
        return max(0.0, int(reset[:13]) / 1000 - now_s)
    return 0.0


def read_limit(headers: Mapping[str, str], unit: str) -> tuple[float, float, float] | None:
    """Return a server's limit of requests or tokens: all, what is left, seconds to all, or 0."""
    # https://platform.openai.com/docs/guides/rate-limits
    words = ("limit", "remaining", "reset")
    most, left, reset = (headers.get(f"x-ratelimit-{word}-{unit}", "") for word in words)
    if not (re.fullmatch(r"[1-9]\d{0,14}", most) and re.fullmatch(r"\d{1,15}", left)):
        return None
    reset_s = parse_duration(reset)
    return int(most), int(left), reset_s if reset_s < LONGEST_SAID_S else 0.0  # it is an epoch


ALWAYS, AT_FIRST = "always", "at first"  # the run ends; so too unless the server has answered
MONEY = "the account has no money left or is at its limit; see its billing page"
KEY = "OPENAI_API_KEY: the server that OPENAI_BASE_URL names does not take this key"
PLACE = "OPENAI_BASE_URL or GETCAP_MODEL: there is no such thing; the URL mostly ends in /v1"
SMALLER = "lower GETCAP_MAX_SIDE, or give the server a larger context"
BY_HAND = "caption it by hand or with another model"
# "quota" and "billing" alone mean nothing: Gemini's limit a minute speaks of them too
NO_MONEY = (
    "insufficient quota|insufficient balance|insufficient credit|insufficient fund|credit balance"
    "|balance is insufficient|spend limit|usage limit exceeded|key limit|billing hard|arrear"
    "|余额不足|欠费"
)
NO_VISION = (
    "image input|images are not supported|image url is only|variant `image url|support image"
    "|support vision|a multimodal|support multimodal|mmproj|content must be a string"
)
TOO_LARGE = "usage size|patches|too large|too long|context size|context length|context window"
# of OpenAI, Azure, DashScope, Volcengine, Gemini, xAI, Moonshot, DeepSeek, OpenRouter
POLICY = (
    "content policy|content filter|content manag|content exists risk|usage polic|policyviolation"
    "|guideline|inspection|inappropriate|sensitive word|sensitive content|sensitive info|moderat"
    "|flagged as|flagged by|flagged for|safety|unsafe|nsfw"
    "|invalid prompt|high risk|prohibited content|敏感|不安全"
)
ERRORS = (
    # how the status begins; phrases, with blanks for "_" and "-"; what they mean, or else why
    # the image fails; what helps
    ("0", "cannot connect", AT_FIRST, "OPENAI_BASE_URL: see that the server runs"),
    ("400 403 429", NO_MONEY, ALWAYS, MONEY),
    ("429", "per day|perday|daily|monthly", ALWAYS, "the limit of this account is used up"),
    ("401", "", ALWAYS, KEY),
    ("402", "", ALWAYS, MONEY),
    ("4 500", TOO_LARGE, "image too large", SMALLER),
    ("200 400 403 404", "<html|<!doctype", AT_FIRST, f"{PLACE}; a web page came back"),
    ("400 404 422 5", NO_VISION, AT_FIRST, "GETCAP_MODEL: set a model that takes images"),
    ("400", "model not|valid model|invalid model|no models loaded", AT_FIRST, PLACE),
    ("400 403 422 451", POLICY, "refused", BY_HAND),
    ("5", "sensitivecontent|prohibited content", "refused", BY_HAND),
    ("400", "api key", AT_FIRST, KEY),
    ("403", "", AT_FIRST, "OPENAI_API_KEY: this key may not do this, or not in this country"),
    ("404 405", "", AT_FIRST, PLACE),
    ("3", "", AT_FIRST, "OPENAI_BASE_URL: set the URL that the server sends requests to"),
    ("200 5", "endpoint|not found", "", PLACE),
    ("200 5", "memory|cuda", "", "take a smaller model, or lower GETCAP_MAX_SIDE"),
)


def has_phrase(said: str, phrases: str) -> bool:
    """Return whether one of some phrases, separated by |, is said."""
    return any(phrase in said for phrase in phrases.split("|"))


def find_meaning(reply: Reply) -> tuple[str, str]:
    """Return what an error means, blank where its status says it, and what helps."""
    said = f"{reply.raw} {reply.error}".lower().replace("_", " ").replace("-", " ")
    for statuses, phrases, meaning, advice in ERRORS:
        if str(reply.status).startswith(tuple(statuses.split())) and has_phrase(said, phrases):
            return meaning, advice
    return "", ""


def is_answered(reply: Reply) -> bool:
    """Return whether the server has looked at the image: a refusal is an answer."""
    return not reply.error or find_meaning(reply)[0] == "refused"


def is_rejected(reply: Reply) -> bool:
    """Return whether the server takes no such request, and nothing else explains that."""
    return reply.status in {400, 422} and not find_meaning(reply)[0]


def judge_error(reply: Reply, *, has_answered: bool = True) -> StopRun | FailImage:
    """Return what an error means: the end of the run, of this image, or another try."""
    status, wait_s = reply.status, reply.retry_after_s
    meaning, advice = find_meaning(reply)
    is_end = meaning == ALWAYS or (meaning == AT_FIRST and not has_answered)
    if is_end or wait_s > LONGEST_WAIT_S:
        shown = f"{reply.error} (HTTP {status})" if status else reply.error
        return StopRun(f"{advice}: {shown}" if advice else shown)
    if meaning == AT_FIRST:
        meaning = advice = ""
    words = f"{reply.error}; {advice}" if advice else reply.error
    if meaning:
        return FailImage(meaning, words)
    reason = {0: "no answer", 200: "broken answer"}.get(status, f"HTTP {status}")
    may_pass = status in {0, 200, 408, 409, 425, 429} or status >= 500
    return FailImage(reason, words, retry_after_s=wait_s if may_pass else None)


# of Qwen, Magistral, Kimi, Cohere, Gemma, gpt-oss
THOUGHT_START = r"(?i)\s*[<\[◁]\|?(?:start_|begin_of_|\w+:)?(?:think|thought|reason|channel)"
THOUGHT_END = (
    r"(?i)[<\[◁](?:/(?:\w+:)?|\|end_(?:of_)?)(?:think|thought|reason)\w*\|?[>\]▷]"
    r"|<channel\|>|final<\|message\|>"
)
TURN_END = r"<\|?(?:im_end|end(?:_?of_?(?:text|turn))?|eo[tsm]\w*|/s|return)\|?>|<turn\|>"
# of a template, with bars or without, and the role that follows
MARK = r"<(?:\|[^<>|]{1,40}\|?|[^<>|]{1,40}\||start_of_turn|s)>(?:(?:assistant|model)\n)?"
INVISIBLE = r"[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u202a-\u202e\u2060\ufeff\ud800-\udfff]"
ABOUT = "(?:captions?|descriptions?|prompts?|tags|sentence|alt text)"
CLEANING = (
    (MARK, " "),
    (INVISIBLE, ""),
    (TAG, " "),
    (r"(?m)^[ \t]*(?:```\w*[ \t]*$|(?:#{1,6}|[-*•>])[ \t]+)", ""),  # fences, heads of lines
    (r"\*\*(\S[^*\n]{0,300})\*\*", r"\1"),
    (  # "Sure! Here is a caption:", "Caption 1:"
        r"(?i)\A\s*(?:(?:sure|certainly|of course)[!.,:]\s+)?"
        rf"(?:here(?: is| are|['’]s)\b[^.:\n]{{0,80}}\b{ABOUT}\b[^.:\n]{{0,80}}[:\n]"
        rf"|(?:(?:image|final|detailed|short) )?{ABOUT}(?: \d)?\s*[:\n]|answer:)?\s*",
        "",
    ),
    (  # "Let me know if I can help!"
        r"(?is)(?<=[.!?\"”])\s+(?:let me know|feel free|would you like|i hope th|if you['’]d like)"
        r"[^\"“”]*\Z",
        "",
    ),
)


def clean_caption(content: str, style: str = "prose") -> str:
    """Return the caption in an answer, without thoughts, marks and talk, in one line."""
    from html import unescape

    turns = re.split(TURN_END, re.split(THOUGHT_END, content)[-1])
    text = next(filter(str.strip, turns), "")
    for _ in range(2):  # an opening in quotes, quotes after an opening
        for pattern, instead in CLEANING:
            text = re.sub(pattern, instead, text)
        text = text.strip()
        first, inner, last = text[:1], text[1:-1], text[-1:]
        if first + last in {'""', "“”", "''", "``"} and not {first, last} & {*inner}:
            text = inner.strip()
    lines = (" ".join(line.split()) for line in unescape(text).splitlines())
    return tidy_tags("\n".join(lines)) if style == "tags" else " ".join(filter(None, lines))


# A refusal speaks of itself or of the request, where a caption speaks of the picture.
HELP = (
    "(?:assist|help|comply|describ|identif|process|provid|caption|generat|transcri|extract|analy"
    "|determin|recogni|view|see|read|access|creat)"
)
IMAGE = r"\b(?:image|photo|picture|file|attachment)s?\b"
SENT = "(?:(?:attach|provid|upload|shar|includ|receiv|load|display|process|retriev)|come through)"
SPEAKS_OF_ITSELF = (  # anywhere but in quotation marks
    rf"\bI\b[^.,;!?]{{0,25}}(?:not|n['’]t|unable|need)(?: be)?(?: able)?(?: to)?(?: \w+ly)? {HELP}"
    rf"|\bI (?:\w+ )?(?:decline|refuse|apologi)|\b(?:for me to|can I) {HELP}"
    r"|\bmy (?:apologies|content|guideline|polic|programming)"
    r"|\b[Aa]s an? (?:[\w-]+ ){0,2}(?:AI|model|assistant)\b.{0,40}\bI\b"
)
# in lower case but for the first letter: titles that are read in a picture have capitals
REFUSALS = (
    r"[iI](?:['’]?(?:m|d|ll|ve))? (?!(?:can )?see\b|(?:cannot|can['’]t) believe\b|love\b)[a-z]",
    r"sorry(?:[,.!]? (?:but|I|this|that|the|not?)\b|\.|$)",
    rf"(?:unable|not able|cannot|can['’]t) (?:to )?{HELP}.{{0,12}}(?:{IMAGE}|this|descri)",
    rf"(?:please|could you|can you).{{0,9}} (?:provid|upload|attach|share|send).{{0,40}}{IMAGE}",
    rf"(?:there\b.{{0,30}})?(?:no|not|n['’]t)\b[^.]{{0,30}}{IMAGE}[^.]{{0,40}}\b"
    "(?:(?:attach|provid|upload|shar|receiv)ed|came through|(?:the|this|your)"
    " (?:prompt|message|conversation))",
    rf"(?:the|this|your)(?: \w+)? (?:{IMAGE}|message|content|request)(?: you \w+)? "
    rf"(?:(?:(?:was|is|has|could|did) ?(?:not|n['’]t)|cannot)(?: be| been)? {SENT}"
    "|(?:may |appears to )?(?:be |is |was )?(?:violat|inappropriate|not appropriate|blocked"
    r"|rejected|unavailable|missing(?! \w)))",
    "(?:很|非常)?抱歉|作为.{0,9}(?:AI|智能|模型)|对不起，|對不起，|我(?:无法|無法|不能)|未收到",
    "es tut mir leid|leider kann ich|(?:je suis )?désolée?, |lo siento|desculpe|mi dispiace"
    "|申し訳|죄송하지만",
)
PREAMBLE = (
    r"(?:(?:hello|hi|hmm|oh|okay|unfortunately|[iI]t (?:seems|looks like|appears))\b[,.!]? "
    "(?:that )?){0,2}"
)
REFUSED = f"{PREAMBLE}(?:{'|'.join(REFUSALS)})"
THOUGHTS = (  # without any marks
    r"(?i)(?:(?:okay|ok|alright|hmm|so|first|now)[, ]+)*(?:the user (?:wants|asks|is|has|prov|upl)"
    r"|(?:i|we) (?:need|have|should)(?: to)? (?:write|caption|describe|look|analy|create)"
    r"|my task|let(?:['’]s| me) (?:see[.:]|look at|start|analy))|thinking process:"
)
ERROR_TEXT = (
    r"(?i)\W*(?:error\b[^.]{0,30}:|error\]|traceback \(|an (?:\w+ )?error (?:has )?occurred"
    r"|(?:\d{3} )?(?:internal server error|bad gateway|service unavailable|not found)\W*\Z"
    r"|rate limit exceeded|request (?:timed out|failed)|(?-i:\w+Error: )|<[!?])"
)
FAULTS = (("reasoning only", THOUGHTS), ("refused", REFUSED), ("error text", ERROR_TEXT))
NOTHING = {"", "null", "none", "n/a", "undefined", "nan", "image", "no image", "caption"}
LOOP_RATIO = 3.5  # loops that models wrote are at 5 and above, 5,400 published captions below 3.2
ENDINGS = (  # what a finish reason means; phrases are separated by |
    ("refused", "filter|safety|prohibited|recitation|sensitive|refus|block"),
    ("broken answer", "error|abort|timeout|cancel|insufficient"),
)
CUT_OFF = "length|max|context"
ADVICE = {  # what helps against each reason
    "refused": BY_HAND,
    "broken answer": "the server broke off",
    "looping": "try GETCAP_TEMPERATURE=0.7 or another model",
    "reasoning only": "set GETCAP_REASONING_EFFORT=none, raise GETCAP_MAX_TOKENS, or set"
    """ GETCAP_EXTRA_BODY='{"chat_template_kwargs": {"enable_thinking": false}}'""",
    "error text": "look at the server",
    "empty": f"run again, or {BY_HAND}",
    "cut off": "raise GETCAP_MAX_TOKENS, or ask for less",
}


def find_fault(text: str) -> str:
    """Return why a text is no caption, one of ADVICE; blank for a caption."""
    end = text[-1000:].encode()  # who says the same over and over leaves little to compress
    # a window of 1 KB is set up four times as fast as the usual one
    if len(end) > LOOP_RATIO * len(zlib.compress(end, wbits=10)):
        return "looping"
    start = text.lstrip("[(")
    start = start[:1].lower() + start[1:]
    for reason, pattern in FAULTS:
        if re.match(pattern, start):
            return reason
    unquoted = " ".join(text.replace("“", '"').replace("”", '"').split('"')[::2])
    if re.search(SPEAKS_OF_ITSELF, unquoted):
        return "refused"
    if text[:1] in {"{", "["} and text[-1] in "}]" and '"' in text:
        return "error text"
    is_blank = text.lower().strip(" .[]<>{}") in NOTHING or not any(map(str.isalnum, text))
    return "empty" if is_blank else ""


def judge_reply(reply: Reply, style: str = "prose", *, has_answered: bool = True) -> str:
    """Return the caption that an answer holds. Raises FailImage or StopRun where it has none."""
    if reply.error:
        raise judge_error(reply, has_answered=has_answered)
    text, finish = clean_caption(reply.content, style), reply.finish_reason.lower()
    *thoughts, said = re.split(THOUGHT_END, reply.content)
    reason = next((name for name, phrases in ENDINGS if has_phrase(finish, phrases)), "")
    if reply.refusal:
        reason = "refused"
    is_thought_only = not text and (thoughts or reply.has_reasoning)
    if not reason and (is_thought_only or re.match(THOUGHT_START, said)):
        reason = "reasoning only"
    reason = reason or find_fault(text)
    if not reason and has_phrase(finish, CUT_OFF):
        # what is whole of it serves
        text = text.rpartition(",")[0] if style == "tags" else cut_caption(text, style)
        reason = "" if text else "cut off"
    if not reason:
        return text
    words = shorten(reply.refusal or text or reply.finish_reason, 120)
    again_s = 0.0 if reason == "broken answer" else None
    said = "; ".join(filter(None, (words.rstrip("."), ADVICE[reason])))
    raise FailImage(reason, said, retry_after_s=again_s)


# -------------------------------------------------------------------------------------------- Money

# What an image takes: so many tokens for 32 x 32 pixels, up to so many; the first row that fits
# the model's name counts. Models that count tiles are put down at the four of 1024 pixels.
# https://developers.openai.com/api/docs/guides/images-vision; what was billed where it disagrees.
TOKENS_AN_IMAGE = (
    (r"gpt-4o-mini", math.inf, 25_501),
    (r"gpt-4\.1-mini", 1.62, 2488),
    (r"gpt-4|chatgpt", math.inf, 765),
    (r"gpt-5(?=-20|$)|o3", math.inf, 630),
    (r"gpt-5(?:\.[0-4]|-)", 1.2, 3000),
    (r"gpt-", 1.2, math.inf),
    (r"", 1.0, math.inf),  # Qwen3-VL's; a guess for all others
)
TOKENS_A_WORD = 1.3


def image_tokens(model: str, size: Size) -> int:
    """Return about how many tokens an image of this size is for a model."""
    name = re.sub(r"^ft:", "", model.rpartition("/")[2])
    each, most = next(row[1:] for row in TOKENS_AN_IMAGE if re.match(row[0], name))
    patches = math.ceil(size[0] / 32) * math.ceil(size[1] / 32)
    return math.ceil(min(each * patches, most))


def text_tokens(text: str) -> int:
    """Return about how many tokens a prompt is."""
    return len(text.encode()) // 4 + 12  # in English; and a message's frame


def estimate(settings: Settings, prompt: str, size: Size) -> Usage:
    """Return about what one image will take."""
    words = settings.max_words or USUAL_WORDS[settings.style]
    answer = min(settings.max_tokens, round(words * TOKENS_A_WORD))
    if settings.reasoning_effort not in {None, "none", "minimal"}:
        answer = settings.max_tokens  # thoughts are paid for like an answer
    return Usage(image_tokens(settings.model, size) + text_tokens(prompt), answer)


@functools.cache
def find_rates(
    model: str, base_url: str, price: str | None, tier: str
) -> tuple[float, float] | None:
    """Return the dollars of a million tokens in and out, where they are known."""
    if price:
        dollars = price.split("/")
        return float(dollars[0]), float(dollars[1])
    if is_this_machine(base_url):
        return None
    from genai_prices import Usage as Counts
    from genai_prices import calc_price

    context: Any = {"processing" if tier == "batch" else "service_tier": tier} if tier else None
    try:
        tokens_in, tokens_out = (
            calc_price(counts, model, provider_api_url=base_url, price_context=context).total_price
            for counts in (Counts(input_tokens=1000), Counts(output_tokens=1000))
        )
    except (LookupError, ValueError):
        return None
    return float(tokens_in) * 1000, float(tokens_out) * 1000


def find_cost(settings: Settings, usage: Usage, tier: str) -> float | None:
    """Return the dollars of a request, where its price is known; tiers are flex and batch."""
    rates = find_rates(settings.model, settings.base_url, settings.price, tier)
    return rates and (usage.prompt * rates[0] + usage.answer * rates[1]) / 1e6


def show_dollars(amount: float) -> str:
    """Return an amount of money, a small one to a hundredth of a cent."""
    return f"${amount:,.2f}" if amount >= 10 else f"${amount:.4f}"


def describe_cost(settings: Settings, images: int, usage: Usage) -> str:
    """Return what a run is thought to cost."""
    said = f"{usage.prompt + usage.answer:,} tokens for {images:,} images with {settings.model}"
    if settings.local:
        return f"{said}: no cost but this machine's time"
    tier = "batch" if settings.batch or settings.batch_export else settings.service_tier or ""
    cost = find_cost(settings, usage, tier)
    if cost is None:
        return f"{said}; the price at {settings.host} is not known, --price IN/OUT says it"
    said += f": about {show_dollars(cost)}"
    others = {name: find_cost(settings, usage, name) or cost for name in ("flex", "batch")}
    cheaper = [f"{name} {show_dollars(other)}" for name, other in others.items() if other < cost]
    if cheaper:
        said += f" ({', '.join(cheaper)})"
    if settings.max_cost and cost > settings.max_cost:
        said += f"; --max-cost {show_dollars(settings.max_cost)} ends it before"
    return said


class Bill:
    """What the answers of a run cost, and those on their way may cost."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tier = settings.service_tier or ""
        self.usage = Usage()
        self.spent = 0.0  # with answers that were lost or not counted, at their worst
        self.lost = 0  # such answers
        self._held = 0.0  # for requests on their way
        self._dearest = 0.0  # of all answers: counts and tiers may be other than thought

    @functools.cached_property
    def has_price(self) -> bool:
        """Whether the price is known; to look it up takes a moment."""
        return find_cost(self._settings, Usage(), self._tier) is not None

    def hold(self, expected: Usage, longest: int, tier: str = "") -> float:
        """Count a request at its worst, and return its dollars. Raises StopRun over the budget."""
        usage = Usage(2 * expected.prompt, longest)  # a prompt may take more than is thought
        dearest = 0.0 if tier else self._dearest
        worst = max(find_cost(self._settings, usage, tier or self._tier) or 0.0, dearest)
        most = self._settings.max_cost
        if most is not None and self.spent + self._held + worst > most:
            sums = map(show_dollars, (most, self.spent, self._held, worst))
            said = "--max-cost {}: {} spent, up to {} on the way, the next could take {}"
            raise StopRun(said.format(*sums))
        self._held += worst
        return worst

    def hold_again(self, dollars: float) -> None:
        """Count what an earlier run has sent and nobody has settled."""
        self._held += dollars

    def settle(self, held: float, reply: Reply | None, tier: str = "") -> float:
        """Count what came back instead of what was held; return its dollars."""
        self._held -= held
        if reply and reply.is_free:
            return 0.0
        cost, usage = held, reply.usage if reply else None
        if reply and usage:
            billed_as = tier or reply.tier or self._tier
            cost = find_cost(self._settings, usage, billed_as) or 0.0
            self.usage += usage
        else:
            self.lost += 1
        self._dearest = max(self._dearest, cost)
        self.spent += cost
        return cost

    def __str__(self) -> str:
        """The bill as the summary says it, blank where nothing was asked."""
        tokens = self.usage.prompt + self.usage.answer
        if not tokens and not self.lost:
            return ""
        said = f"{tokens:,} tokens"
        if self.has_price:
            said += f", {'at most ' if self.lost else ''}{show_dollars(self.spent)}"
        if self.lost:
            said += f" (answers lost or not counted: {self.lost:,})"
        return said


# ----------------------------------------------------------------------------------------- Throttle

LONGEST_NAP_S = 1.0  # who waits looks again: an answer may have changed what there is to wait for
LONG_WAIT_S = 60.0  # a wait that a user wonders about
RESERVE_S = 0.1  # of a limit's refill stays in it: requests do not arrive in the order they leave
SLOWER, FASTER = 1.1, 0.98  # times the interval, after a pause and after a good answer
DUST_S = 1e-6


class Stop:
    """Whether and why the run ends early. Who waits is woken and gives up."""

    def __init__(self) -> None:
        self.cause: StopRun | signal.Signals | None = None
        self.in_flight = 0  # requests

    @functools.cached_property
    def _event(self) -> Event:
        import asyncio  # where nothing is to be done, this takes longer than all else

        return asyncio.Event()

    def set(self, cause: StopRun | signal.Signals) -> None:
        """End the run and say why; the first cause counts."""
        if self.cause is not None:
            return
        self.cause = cause
        self._event.set()
        if isinstance(cause, StopRun):
            log.error("%s", cause)
            return
        answers = "answer" if self.in_flight == 1 else "answers"
        waiting = f"; waiting for {self.in_flight} {answers}" if self.in_flight else ""
        log.warning("Stopping%s. Ctrl-C again quits now.", waiting)

    def check(self) -> None:
        """Raise StopRun when the run ends."""
        if self.cause is not None:
            raise StopRun("the run ends")

    async def sleep(self, seconds: float) -> None:
        """Wait; raises StopRun as soon as the run ends."""
        import asyncio

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        self.check()


class Bucket:
    """What a server still takes, of requests or tokens: its word, less what was sent since.

    It fills steadily, and is without limit until the server speaks.
    """

    def __init__(self) -> None:
        self.taken = 0.0  # by all requests so far
        self._most = self._level = self._rate = math.inf
        self._at = 0.0

    def wait_s(self, cost: float, now: float) -> float:
        """Return the seconds until there is room."""
        if self._rate == math.inf:
            return 0.0
        self._level = min(self._most, self._level + self._rate * (now - self._at))
        self._at = now
        wanted = min(cost + RESERVE_S * self._rate, self._most)
        return max(0.0, wanted - self._level) / self._rate

    def take(self, cost: float) -> None:
        """Count a request that is being sent."""
        cost = min(cost, self._most)
        self.taken += cost
        self._level -= cost

    def learn(self, limit: tuple[float, float, float], taken: float, now: float) -> None:
        """Believe an answer, but for what was sent since its request left."""
        most, left, reset_s = limit
        # whatever the limit's period, the missing part comes back in the time to reset
        if reset_s and most - left >= min(10, most / 2):
            self._rate = (most - left) / reset_s
        elif self._most != most:
            self._rate = most / 60
        self._most, self._level, self._at = most, left - (self.taken - taken), now


class Ticket(NamedTuple):
    """One request, and what the throttle must know when its answer comes."""

    sent_at: float
    tokens: float  # what it was expected to take
    taken: tuple[float, float]  # of requests and tokens, itself included


class Throttle:
    """The pace of all workers: a hard cap, the server's own limits, a pause after 429s."""

    def __init__(self, rate: float | None, stop: Stop) -> None:
        import asyncio

        self._now = asyncio.get_running_loop().time
        self._stop = stop
        self._cap_s = 1 / rate if rate else 0.0  # between two requests
        self._interval_s = 0.0  # the same, after 429s of a server that says nothing of its limits
        self._requests, self._tokens = Bucket(), Bucket()
        self._tokens_each = 0.0  # of a request, as the answers so far say
        self._sent_at = 0.0
        self._good: deque[float] = deque(maxlen=100)  # when the last good answers came
        self.failures = 0  # requests without a good answer, in a row
        self._refused_at = math.inf  # when a 429 came that no good answer has followed
        self._not_before = self._said_until = 0.0
        self._queue = asyncio.Lock()

    async def turn(self) -> Ticket:
        """Wait until a request may be sent. Raises StopRun when the run ends."""
        async with self._queue:
            self._stop.check()
            while (wait_s := self._wait_s(self._now())) > DUST_S:
                await self._stop.sleep(min(wait_s, LONGEST_NAP_S))
            self._sent_at = self._now()
            self._requests.take(1)
            self._tokens.take(self._tokens_each)
            taken = self._requests.taken, self._tokens.taken
            return Ticket(self._sent_at, self._tokens_each, taken)

    def learn(self, ticket: Ticket, reply: Reply, headers: Mapping[str, str]) -> bool:
        """Correct the pace by what came back; return whether its headers show limits."""
        now, usage = self._now(), reply.usage
        self.failures += 1
        if not reply.error:
            self._good.append(now)
            self._interval_s *= FASTER
            self._refused_at = math.inf
            self.failures = 0
        if usage:
            tokens = usage.prompt + usage.answer
            self._tokens_each += (tokens - self._tokens_each) * (0.1 if self._tokens_each else 1)
            self._tokens.take(tokens - ticket.tokens)
        has_limits = False
        buckets = (self._requests, "requests"), (self._tokens, "tokens")
        for (bucket, unit), taken in zip(buckets, ticket.taken, strict=True):
            if limit := read_limit(headers, unit):
                bucket.learn(limit, taken, now)
                has_limits = True
        return has_limits

    def slow_down(self, ticket: Ticket, retry_after_s: float) -> None:
        """Take note of a 429 of a server that shows no limits.

        The first slows its own request, the second in a row all. What was sent before the first
        came met the same limit.
        """
        if ticket.sent_at >= self._refused_at:
            self._not_before = max(self._not_before, self._now() + retry_after_s)
            if self._good:
                took_s = self._refused_at - self._good[0]
                self._interval_s = SLOWER * took_s / len(self._good)
        self._refused_at = min(self._refused_at, self._now())

    def _wait_s(self, now: float) -> float:
        wait_s = max(
            self._sent_at + max(self._cap_s, self._interval_s) - now,
            self._not_before - now,
            self._requests.wait_s(1, now),
            self._tokens.wait_s(self._tokens_each, now),
        )
        if wait_s > LONG_WAIT_S and now > self._said_until:
            self._said_until = now + wait_s
            log.warning(
                "The limits leave no room for %.0f s. Waiting; Ctrl-C loses nothing.", wait_s
            )
        return wait_s


# ---------------------------------------------------------------------------------------------- Ask

MOST_IN_A_ROW = 10
SAME_ERRORS = 3  # of a server that has not answered yet: such errors do not pass
LONGEST_BACKOFF_S = 30.0


class Connection(NamedTuple):
    """The SDK's client, and the HTTP client below it."""

    sdk: AsyncOpenAI
    http: AsyncClient


def open_connection(settings: Settings) -> Connection:
    """Return a way to the server. Raises StopRun where HTTPS_PROXY or the like is wrong."""
    from openai import AsyncOpenAI, DefaultAioHttpClient, Timeout

    # requests leave no cycles behind; to look for some took a tenth of all CPU time
    gc.set_threshold(20_000, 50, 50)
    try:
        is_here = settings.base_url.startswith("http:") and is_this_machine(settings.base_url)
        # twice as fast as the SDK's other one; no proxy lies on the way to this machine itself
        timeout = Timeout(settings.timeout, connect=min(15.0, settings.timeout))
        http = DefaultAioHttpClient(follow_redirects=False, trust_env=not is_here, timeout=timeout)
        sdk = AsyncOpenAI(
            api_key=settings.api_key or "none",
            base_url=settings.base_url,
            max_retries=0,  # there is one layer of them, ours
            timeout=timeout,
            http_client=http,
        )
        return Connection(sdk, http)
    except Exception as error:  # each library under the SDK has its own
        said = "no connection can be set up; check HTTPS_PROXY and SSL_CERT_FILE"
        raise StopRun(f"{said}: {shorten(str(error), 120)}") from error


def hide_key(reply: Reply, settings: Settings) -> Reply:
    """Return a reply without the key, which some servers repeat."""
    key = settings.api_key
    if len(key) < 6 or key.isalpha():  # "ollama" is no secret, and a word
        return reply
    names = ("content", "refusal", "error", "raw")
    texts = {name: getattr(reply, name).replace(key, "[key]") for name in names}
    return dataclasses.replace(reply, **texts)


def read_response(response: Response, settings: Settings) -> Reply:
    """Return what an HTTP response holds."""
    text = response.content.decode("utf-8-sig", "replace")  # as JSON is, whatever a header says
    reply = parse_reply(response.status_code, text, response.headers, now_s=time.time())
    return hide_key(reply, settings)


def describe_failure(error: Exception, settings: Settings) -> Reply:
    """Return what went wrong with a request; raises again what is of another kind."""
    import aiohttp
    import httpx2
    import openai

    if isinstance(error, openai.APIStatusError):
        return read_response(error.response, settings)
    if isinstance(error, TimeoutError):
        return Reply(0, error=f"none came within {settings.timeout:g} s (GETCAP_TIMEOUT)")
    cause = error.__cause__ or error if isinstance(error, openai.APIConnectionError) else error
    # an address or header that cannot be sent is a ValueError or TypeError
    is_unsent = isinstance(cause, ValueError | TypeError)
    if not is_unsent and not isinstance(cause, httpx2.TransportError | aiohttp.ClientError):
        raise error
    unreached = aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError
    is_free = is_unsent or isinstance(cause.__cause__, unreached)
    said = "cannot connect to" if is_free else "lost the connection to"
    why = getattr(cause.__cause__, "os_error", cause)  # else aiohttp names the server once more
    words = f"{said} {settings.host}: {str(why) or type(why).__name__}"
    return hide_key(Reply(0, error=shorten(words, 200), is_free=is_free), settings)


def keep_trying(settings: Settings, stop: Stop, throttle: Throttle) -> AsyncRetrying:
    """Return the layer of retries, for a function that takes a Question.

    The waits of an image grow only while no image gets an answer.
    """
    import tenacity

    factor, retries = settings.throttle_backoff_factor, settings.throttle_retries
    spread = tenacity.wait_random(0, factor / 2)  # so that the workers do not come back as a herd

    def failure(state: RetryCallState) -> Any:
        return state.outcome and state.outcome.exception()

    def wait(state: RetryCallState) -> float:
        asked_s: float = failure(state).retry_after_s
        step = min(state.attempt_number, throttle.failures or 1)
        backoff_s = min(LONGEST_BACKOFF_S, factor / 2 * max(1.0, factor) ** (step - 1))
        return max(asked_s, backoff_s + spread(state))

    def log_wait(state: RetryCallState) -> None:
        path, number, pause_s = state.args[0].job.image, state.attempt_number, state.upcoming_sleep
        said = "%s: %s; retry %d of %d in %.1f s"
        log.warning(said, path, failure(state), number, retries, pause_s)

    return tenacity.AsyncRetrying(
        retry=lambda state: getattr(failure(state), "retry_after_s", None) is not None,
        wait=wait,
        stop=tenacity.stop_after_attempt(retries + 1),
        sleep=stop.sleep,
        before_sleep=log_wait,
        reraise=True,
    )


@dataclass(slots=True)
class Question:
    """One image on its way to a caption, and what it has cost so far."""

    job: Job
    prompt: str
    entry: Entry  # what the journal will say of it
    jpeg: bytes = b""  # in base64
    expected: Usage = Usage()
    usage: Usage = Usage()
    dollars: float = 0.0


class Asker:
    """Asks for captions, for all workers: what one answer taught counts for all.

    `has_answered` says that key, model and address are right; `is_settled`, that the parameters
    are.
    """

    def __init__(
        self, connection: Connection, settings: Settings, recipe: Recipe, bill: Bill, stop: Stop
    ) -> None:
        self._bill = bill
        self._http = connection.http
        # the SDK's post takes as long for a request as all the rest of a run
        self._url = f"{settings.base_url}/chat/completions"
        headers = connection.sdk.default_headers | connection.sdk.auth_headers
        self._headers = {name: text for name, text in headers.items() if isinstance(text, str)}
        self._settings = settings
        self._stop = stop
        self._style = recipe.style
        self._throttle = Throttle(settings.throttle_submission_rate, stop)
        self._warned = set[str]()
        self._errors: Counter[str] = Counter()  # before the server has answered
        self._in_a_row: deque[str] = deque(maxlen=MOST_IN_A_ROW)  # reasons of failures
        self._was_rejected = False  # the last request with our own defaults
        self._attempt_often = keep_trying(settings, stop, self._throttle).wraps(self._attempt)
        self.parameters = first_parameters(settings)
        self.has_answered = self.is_settled = False

    async def ask(self, question: Question) -> str:
        """Return the answer, past the gate. Raises FailImage or StopRun."""
        try:
            answer: str = await self._attempt_often(question)
        except FailImage as error:
            is_used_up = error.retry_after_s is not None and self._settings.throttle_retries > 0
            if is_used_up and not self.has_answered:  # the first image's retries are the run's
                raise StopRun(str(error)) from error
            if error.reason != "refused":
                self._in_a_row.append(error.reason)
            if self._in_a_row.count(error.reason) == MOST_IN_A_ROW:
                said = f"{MOST_IN_A_ROW} images in a row ended in {error}"
                raise StopRun(said) from error
            raise
        self._in_a_row.clear()
        return answer

    async def _attempt(self, question: Question) -> str:
        """Ask once, or with other parameters where our defaults are rejected."""
        reply = await self._send(question, self.parameters)
        if is_rejected(reply) and not self.is_settled:
            reply = await self._try_others(question, reply)
        elif is_answered(reply):
            self.has_answered = self.is_settled = True
        try:
            return judge_reply(reply, self._style, has_answered=self.has_answered)
        except FailImage as error:
            self._errors[str(error)] += 1
            may_pass = self.has_answered or reply.status not in {200, 500}
            if not may_pass and self._errors[str(error)] == SAME_ERRORS:
                raise StopRun(str(error)) from error
            raise

    async def _try_others(self, question: Question, rejected: Reply) -> Reply:
        """Ask about the same image without what nobody asked for; rejected twice, it is dropped."""
        for parameters in other_parameters(self._settings, self.parameters):
            reply = await self._send(question, parameters)
            if is_rejected(reply):
                continue
            if is_answered(reply):
                self.has_answered = True
                if self._was_rejected:
                    gone = ", ".join(self.parameters.keys() - parameters)
                    said = "The server rejects %s; not sent any more: %s"
                    log.warning(said, gone, rejected.error)
                    self.parameters = parameters
                    self.is_settled = True
                self._was_rejected = True
            return reply
        return rejected

    async def _send(self, question: Question, parameters: Parameters) -> Reply:
        """Send one request and count what came back."""
        ticket = await self._throttle.turn()
        reply: Reply | None = None
        limits = self._settings.max_tokens, parameters.get(NEWER_LIMIT), parameters.get(OLDER_LIMIT)
        longest = max(limit for limit in limits if isinstance(limit, int))
        held = self._bill.hold(question.expected, longest)
        path = question.job.image
        log.debug("%s: asking: %s", path, question.prompt)
        self._stop.in_flight += 1
        try:
            model = self._settings.model
            body = build_request(model, question.prompt, parameters, question.jpeg)
            reply, headers = await self._post(body)
        finally:
            self._stop.in_flight -= 1
            question.dollars += self._bill.settle(held, reply)
        question.usage += reply.usage or Usage()
        has_limits = self._throttle.learn(ticket, reply, headers)
        # flex without room is no limit of ours:
        # https://developers.openai.com/api/docs/guides/flex-processing
        if reply.status == 429 and not has_limits and "resource_unavailable" not in reply.raw:
            self._throttle.slow_down(ticket, reply.retry_after_s)
        if not reply.error:
            log.debug("%s: %s", path, reply.content)
            self._warn(reply, question)
        return reply

    async def _post(self, body: bytes) -> tuple[Reply, Mapping[str, str]]:
        """Return what came back, however it came, and its headers."""
        import asyncio

        settings = self._settings
        try:
            async with asyncio.timeout(settings.timeout):  # the HTTP client's is for each read
                response = await self._http.post(self._url, content=body, headers=self._headers)
            return read_response(response, settings), response.headers
        except Exception as error:
            return describe_failure(error, settings), {}

    def _warn(self, reply: Reply, question: Question) -> None:
        """Say once what is odd about an answer and may cost too much."""
        asked, path = self._settings.service_tier, question.job.image
        odd = {}
        if reply.usage and reply.usage.prompt <= text_tokens(question.prompt):
            odd["image"] = f"{path}: perhaps no image was seen: the text alone has so many tokens"
        if asked and reply.tier not in {"", asked}:
            odd["tier"] = f"GETCAP_SERVICE_TIER: {asked} was asked for, {reply.tier} is billed"
        for kind in odd.keys() - self._warned:
            self._warned.add(kind)
            log.warning("%s", odd[kind])


# ------------------------------------------------------------------------------------------- Report

NOTED = {  # what the summary says behind the number of captions that have a note
    "excluded words": "with excluded words",
    "cut": "cut at --max-words",
    "too long": "longer than --max-words",
    "same answer": "with an identical answer",
}


class Report:
    """What became of each image or file: the counts, the summary, the exit code."""

    def __init__(self, stream: IO[str] | None = None, bill: Bill | None = None) -> None:
        self.bill = bill
        self.counts = defaultdict[str, Counter[str]](Counter)  # of each kind, by reason
        self.notes = Counter[str]()
        self.left = 0  # images that are still to be done
        self.outdated = 0  # captions made with another prompt
        self.ended_by: StopRun | signal.Signals | None = None
        self.update: Callable[[], None] = lambda: None  # moves the progress bar by one image
        self._failures: list[Outcome] = []
        self._answers = set[int]()
        self._started = time.monotonic()
        self.stream = stream

    def record(self, outcome: Outcome) -> None:
        """Count one outcome and report it; a failure is told at once."""
        self.counts[outcome.kind][outcome.reason] += 1
        notes = outcome.notes
        if outcome.kind == "captioned":
            if not self._answers and sys.stderr.isatty():  # so that a bad prompt is seen at once
                log.info("%s: %s", outcome.path, outcome.detail)
            answer = hash(outcome.detail)
            if answer in self._answers:
                notes += ("same answer",)
            self._answers.add(answer)
        for note in notes:
            self.notes[note] += 1
            if self.notes[note] == 1:  # the summary counts the others
                log.warning("%s: %s", outcome.path, NOTED[note])
        if outcome.kind == "failed":
            self._failures.append(outcome)
            log.error("%s: %s: %s", outcome.path, outcome.reason, outcome.detail)
        self._write_line(describe_outcome(outcome._replace(notes=notes)))

    @property
    def exit_code(self) -> int:
        """128 + the signal; 3 stopped; 1 some failed; 0."""
        if isinstance(self.ended_by, signal.Signals):
            return 128 + self.ended_by
        if self.ended_by:
            return 3
        return int(bool(self.counts["failed"]))

    def tally(self) -> str:
        """Return the counts and their reasons."""
        parts = []
        for kind in ("captioned", "repaired", "planned", "exported", "failed", "skipped"):
            reasons = self.counts[kind]
            named = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
            if len(reasons) == 1:
                named = "".join(reasons)
            if reasons:
                parts.append(f"{reasons.total():,} {kind}" + (f" ({named})" if named else ""))
        if self.left:
            parts.append(f"{self.left:,} not done yet")
        return ", ".join(parts)

    def summary(self) -> str:
        """Return the last lines of a run."""
        far = self._failures[:-20]  # the others can still be seen above
        lines = [f"{outcome.path}: {outcome.reason}" for outcome in far[:30]]
        if len(far) > 30:
            lines.append(f"and {len(far) - 30:,} more; --report FILE lists all")
        if self.notes:
            counted = [f"{number:,} {NOTED[note]}" for note, number in self.notes.items()]
            lines.append(f"Worth a look: {', '.join(counted)}.")
        if self.outdated:
            were, them = ("captions were", "them") if self.outdated > 1 else ("caption was", "it")
            said = f"{self.outdated:,} {were} made with another prompt or trigger"
            lines.append(f"{said}; --overwrite updates {them}.")
        lines.append(self._last_line())
        if self.ended_by is not None:
            lines.append("Stopped. Run the same command to continue.")
        return "\n".join(map(printable, lines))

    def _last_line(self) -> str:
        bill = f" {self.bill}." if self.bill and str(self.bill) else ""
        kinds = [kind for kind, reasons in self.counts.items() if reasons]
        if kinds == ["skipped"] and not (self.left or bill):
            skipped = self.counts["skipped"]
            if [*skipped] == ["has a caption"] and skipped.total() > 1:
                return f"Nothing to do: all {skipped.total():,} images have captions."
            return f"Nothing to do: {self.tally()}."
        seconds = time.monotonic() - self._started
        return f"{self.tally() or 'Nothing done'} in {seconds:.1f} s.{bill}"

    def close(self) -> None:
        """Write the last line of the report file."""
        if not self.stream:
            return
        line: dict[str, Any] = {"outcome": "summary", "left": self.left, "noted": self.notes}
        line |= {kind: self.counts[kind].total() for kind in ("captioned", "repaired")}
        line |= {kind: self.counts[kind] for kind in ("skipped", "failed")}
        line["seconds"] = round(time.monotonic() - self._started, 3)
        if self.bill:
            usage = self.bill.usage
            line |= {"prompt_tokens": usage.prompt, "answer_tokens": usage.answer}
            line |= {"usd": round(self.bill.spent, 8) if self.bill.has_price else None}
        line["stopped"] = getattr(self.ended_by, "name", self.ended_by)
        self._write_line({**line, "exit_code": self.exit_code})

    def _write_line(self, line: dict[str, Any]) -> None:
        try:
            if self.stream:
                # as ASCII, since a name may be no valid text
                self.stream.write(json.dumps(line, default=str) + "\n")
                self.stream.flush()
        except OSError as error:
            self.stream = None
            self.counts["failed"]["report not written"] += 1
            said = "cannot be written any further: %s; the run goes on"
            log.error(f"--report: {said}", error.strerror)  # noqa: TRY400


def describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as a line of the report file."""
    what = "file" if outcome.kind == "repaired" else "image"
    line: dict[str, Any] = {"outcome": outcome.kind, what: outcome.path}
    if outcome.caption:
        line["file"] = outcome.caption
    if outcome.kind == "captioned":
        return line | {"caption": outcome.detail, "notes": outcome.notes}
    return line | {"reason": outcome.reason, "detail": outcome.detail}


def open_report(target: str | None) -> contextlib.AbstractContextManager[IO[str] | None]:
    """Return the stream that --report names, if any. Raises SettingsError."""
    if not target or target == "-":
        return contextlib.nullcontext(sys.stdout if target else None)
    try:
        begins = read_file(target)[:12] if os.path.isfile(target) else b""
        if begins not in {b"", b'{"outcome": '}:
            said = "is there already, and is no report of this tool; name another file"
            raise SettingsError(f"--report: {target}: {said}")
        return open(target, "w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise SettingsError(f"--report: {target}: cannot be written: {error.strerror}") from None


BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}"
QUIET_S = 30.0  # between two lines of progress where no terminal shows the bar


@contextlib.contextmanager
def show_progress(total: int | None, unit: str, report: Report) -> Iterator[Callable[[], None]]:
    """Show how far a run is, on a terminal as a bar; yield the function that counts one more."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bar = tqdm(
        total=total,
        unit=f" {unit}s",
        bar_format=BAR if total else None,
        file=sys.stderr,
        disable=None if log.isEnabledFor(logging.INFO) else True,  # None: unless on a terminal
        dynamic_ncols=True,
        leave=False,
    )
    done, said_at = 0, time.monotonic()

    def update() -> None:
        nonlocal done, said_at
        done += 1
        if not bar.disable:
            failed = report.counts["failed"].total()
            bar.set_postfix_str(f"{failed:,} failed" if failed else "", refresh=False)
            bar.update()
        elif time.monotonic() - said_at >= QUIET_S:
            said_at = time.monotonic()
            log.info("%d of %s %ss", done, total or "?", unit)

    with bar, logging_redirect_tqdm([log]) if not bar.disable else contextlib.nullcontext():
        yield update


def handle_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set what Ctrl-C and SIGTERM do; Windows has no loop.add_signal_handler."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore Ctrl-C and SIGTERM, so that nothing disturbs the end."""
    handle_signals(lambda _number, _frame: None)  # Python complains if SIG_IGN meets one on its way
    handle_signals(signal.SIG_IGN)


def interrupt(number: int, _frame: FrameType | None = None) -> None:
    """Raise KeyboardInterrupt with the signal's number; ignore all signals after it."""
    ignore_signals()
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Make signals wait until a file is written and counted."""
    came: list[int] = []
    handle_signals(lambda number, _: came.append(number))
    try:
        yield
    finally:
        handle_signals(interrupt)
    if came:
        interrupt(came[0])


# ----------------------------------------------------------------------------------------- Encoding

BOMS = (
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16", "utf-16"),
    (codecs.BOM_UTF8, "BOM", "utf-8-sig"),
    (b"", "", "utf-8"),
)
CODE_PAGES = (  # what old files are saved in, by Python's names
    "cp1252 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 cp1257 cp1258 iso8859-2 iso8859-5 "
    "iso8859-7 koi8-r koi8-u cp866 cp874 gb18030 big5hkscs cp932 euc_jis_2004 cp949 "
    "utf-16-le utf-16-be"
).split()
ENOUGH = 1 << 14  # bytes to judge by
HOME = 1.3  # cp1252 is the commonest: its weight counts so many times
A_BIT = 0.008  # what it weighs where chardet gives no weight to any reading
NOT_HOME = "[ÐÝÞðýþ]|[ãõ](?![oes])"  # in cp1252; more often Turkish, Baltic, Romanian
DOUBT = 1.3  # a reading is unclear if it weighs less than this times one in another language
FEW_LETTERS = 5  # fewer letters of another script than these prove nothing
FOREIGN_LETTER = "[\u0370-\u1fff\u3040-\uffff]"
CONTROL = "[\x00-\x08\x0e-\x1f\x7f-\x9f]"
CASED = [*map(chr, range(0xC0, 0x530))]  # Latin, Greek, Cyrillic
SMALL, CAPITAL = "".join(filter(str.islower, CASED)), "".join(filter(str.isupper, CASED))
ODD = (  # what a text looks like in the wrong page
    r"[^\w\s!-~¡£€¥§©«®°±´·»¿×÷‐-›№™\u0e00-\u0e7f\u3000-\u303f\uff01-\uff65]"  # a rare sign
    r"|[^\W\d_][¡-©«¬¯±´¶¸¼-¿×÷‚„†-•‹€]"  # right behind a word, a sign that opens one
    f"|[a-z{SMALL}][{CAPITAL}]"  # a capital after a small letter
    "|[A-Za-zÀ-ɏ][Ͱ-ۿ]|[Ͱ-ۿ][A-Za-zÀ-ɏ]"  # two scripts in a word
)
STRAY = "[\udc80-\udcff]"  # a byte that is not UTF-8, as Python's surrogateescape has it
AS_CP1252 = {0xDC00 + byte: bytes([byte]).decode("cp1252", "replace") for byte in range(128, 256)}
VALID = "[^\x00-\x7f\udc80-\udcff]"
TOUCHING = f"{VALID}{STRAY}|{STRAY}{VALID}"
CUT_SHORT = "[^\udc80-\udcff]*[\udcc2-\udcf4][\udc80-\udcbf]{0,2}"  # half a letter at the end
# UTF-8 that was read as cp1252: a first byte, and as many more as it asks for. ftfy sees only
# texts that have such a run, because it takes CAFÉ³, “Â” and 10 Å² for damage too.
MORE = f"[\x80-\xbf{bytes(range(0x80, 0xA0)).decode('cp1252', 'ignore')}]"
DAMAGE = (
    "[\x80-\x9f]"
    f"|(?<![A-ZÀ-Þ])[ÂÃ](?![“”‘’]){MORE}"
    f"|(?<=[a-zà-ÿ])[Ä-Þ]{MORE}"
    f"|(?:[Ä-Þ]{MORE}){{2}}"
    f"|[à-ô]{MORE}{{2}}"
)
LOOK_AT_IT = "look at it in an editor"


@dataclass(frozen=True, slots=True)
class Decoding:
    """What a file's bytes are."""

    kind: str  # "right", "unclear", "no text", or what was repaired: "cp1251", "BOM, mojibake"
    text: str = ""  # as it should be
    why: str = ""  # the reason that it is unclear or no text, and what the user can do


NO_TEXT = Decoding("no text", why=f"zero or control bytes; {LOOK_AT_IT}")


class Reading(NamedTuple):
    """The beginning of a file, read in one of CODE_PAGES."""

    weight: float
    page: str
    language: str
    text: str
    is_weak: bool  # too odd or too short to rely on


def decode_text(data: bytes, encoding: str | None = None, *, letters: bool = True) -> Decoding:
    """Return what the bytes are.

    `encoding` is used for bytes that are not UTF-8 and have no BOM. Without `letters`, letters
    that an earlier conversion damaged stay as they are.
    """
    found = read_bytes(data, encoding)
    if found.why:
        return found
    before = found.text.lstrip("\ufeff")
    text = mend_letters(before) if letters else before
    if text is None:
        return Decoding("unclear", why=f"letters were lost in an earlier conversion; {LOOK_AT_IT}")
    kinds = ", ".join(filter(None, (found.kind, "mojibake" if text != before else "")))
    return Decoding(kinds or ("zero bytes" if data.endswith(b"\0") else "right"), text)


def read_bytes(data: bytes, encoding: str | None) -> Decoding:
    """Return the text that the bytes hold, damage included; the kind is blank for UTF-8."""
    kind, codec = next(row[1:] for row in BOMS if data.startswith(row[0]))
    text = decode(data, codec)
    if text is None and codec.startswith("utf-8"):
        body = data.removeprefix(codecs.BOM_UTF8)
        if not encoding:
            return guess(body)
        kind, text = encoding, decode(body, encoding)
    if text is None:
        return Decoding("unclear", why=f"not all of it is {kind}; {LOOK_AT_IT}")
    if not text and b"\0" in data:
        return NO_TEXT
    return Decoding(kind, text)


def decode(data: bytes, codec: str) -> str | None:
    """Return the text without the zero bytes that a crash leaves, None if it is no text."""
    try:
        text = data.decode(codec).rstrip("\0")
        text.encode()  # unicode_escape can make half characters
    except UnicodeError:
        return None
    return None if "\0" in text else text


def guess(data: bytes) -> Decoding:
    """Return the text of bytes that are not UTF-8."""
    text = data.decode("utf-8", "surrogateescape")  # a stray byte becomes half a surrogate
    valid = len(re.findall(VALID, text))
    if valid and "\0" not in text:
        if mended := mend_strays(text):
            return Decoding("stray bytes", mended)
        if valid >= len(re.findall(STRAY, text)):
            return Decoding("unclear", why=f"mostly UTF-8, but not all of it; {LOOK_AT_IT}")
    ranked = rank(data) or rank(data.rstrip(b"\0"))
    whole = decode(data, ranked[0].page) if ranked else None
    if whole is None:
        return NO_TEXT
    best, *others = ranked
    rivals = [other for other in others if other.language != best.language]
    if not best.is_weak and not any(rival.weight * DOUBT > best.weight for rival in rivals):
        return Decoding(best.page, whole)
    said = [f'as {row.page} it reads "{shorten(row.text, 80)}"' for row in (best, *rivals[:1])]
    said.append(f"if the first is right, run again with --encoding {best.page}")
    return Decoding("unclear", why="; ".join(said))


def mend_strays(text: str) -> str:
    """Return UTF-8 with its stray bytes read as cp1252, blank when they are something else."""
    others = re.sub(VALID, " ", text).translate(AS_CP1252)  # what is UTF-8 can be any language
    is_else = re.fullmatch(CUT_SHORT, text) or re.search(TOUCHING, text) or re.search(ODD, others)
    return "" if is_else else text.translate(AS_CP1252)


def rank(data: bytes) -> list[Reading]:
    """Return the readings of the beginning of a file, the likeliest first, each text once."""
    beginning = data[:ENOUGH]
    readings = sorted(filter(None, (weigh(beginning, row) for row in detect(beginning))))
    return sorted({reading.text: reading for reading in readings}.values(), reverse=True)


def detect(beginning: bytes) -> list[dict[str, Any]]:
    """Return chardet's rows: encoding, language, confidence."""
    import chardet

    if b"\0" not in beginning:
        beginning = b" " + beginning  # else "BMW" makes it a bitmap
    rows = chardet.detect_all(
        beginning, ignore_threshold=True, compat_names=False, include_encodings=CODE_PAGES
    )
    return [dict(row) for row in rows if row["encoding"]]


def weigh(beginning: bytes, row: Mapping[str, Any]) -> Reading | None:
    """Return the reading of one of chardet's rows with its weight, None when it is no text."""
    page = row["encoding"]
    try:
        text = codecs.getincrementaldecoder(page)().decode(beginning)  # its end may cut a letter
    except UnicodeError:
        return None
    if re.search(CONTROL, text):
        return None
    letters = re.sub("[\x00-\x7f]", "", text)
    if letters.isupper():  # chardet hardly knows capitals
        small = detect(text.lower().encode(page, "ignore"))
        row = next((other for other in small if other["encoding"] == page), row)
    is_odd = len(re.findall(ODD, text)) * 20 > len(letters)
    is_short = 0 < len(re.findall(FOREIGN_LETTER, letters)) < FEW_LETTERS
    weight = row["confidence"] / (1 + is_odd) / (1 + is_short)
    if page == "cp1252" and not re.search(NOT_HOME, text):
        weight = (weight + A_BIT) * HOME
    return Reading(weight, page, row["language"] or page, text, is_odd or is_short)


def mend_letters(text: str) -> str | None:
    """Return the text with UTF-8 that was misread as cp1252 repaired, None if letters are lost."""
    if not re.search(DAMAGE, text):
        return text
    import ftfy

    mended = ftfy.fix_encoding(text).lstrip("\ufeff")
    is_lost = re.search("[\x80-\x9f]", mended) or mended.count("\ufffd") > text.count("\ufffd")
    return None if is_lost else mended


# ------------------------------------------------------------------------------------------- Repair

CAPTION_SUFFIXES = (".txt", ".caption")
CONFIG_SUFFIXES = (".yaml", ".yml", ".json", ".jsonl", ".toml")


def walk_texts(roots: Iterable[Path], suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Yield each text below the roots, and each folder that cannot be read, with its root."""
    seen = set[str]()
    for root in roots:
        trouble = list[OSError]()
        for folder, names in walk_folders(str(root), trouble):
            real = os.path.realpath(folder)
            if real in seen:  # one root lies in another
                continue
            seen.add(real)
            for name in names:
                if name.lower().endswith(suffixes):
                    yield root, os.path.join(folder, name)
        yield from ((root, str(problem.filename)) for problem in trouble)


def find_roots(settings: Settings, flag: str) -> list[Path]:
    """Return the folders that a command works on. Raises SettingsError."""
    places = (settings.caption_dir or settings.image_dir, settings.config_dir)
    roots = [place for place in places if place]
    if not roots:
        raise SettingsError(f"{flag}: which folder? Type: gen-captions {flag} ./images")
    for root in roots:
        check_folder(flag, root)
    return roots


def describe_change(data: bytes, text: str) -> str:
    """Return the words that a repair changes, each before and after."""
    before = data.decode("utf-8", "backslashreplace")
    pairs = zip(before.split(), text.split(), strict=False)
    changed = [f"{old} → {new}" for old, new in pairs if old != new and "\0" not in old]
    return shorten(", ".join(changed) or text)


def look_at_text(path: str, settings: Settings) -> tuple[Outcome, bytes, str]:
    """Return what should become of a text, its bytes, and the text as it should be."""
    try:
        data, mode = read_file(path), os.stat(path).st_mode
    except OSError as error:
        return Outcome(path, "failed", "unreadable file", str(error.strerror)), b"", ""
    is_config = path.lower().endswith(CONFIG_SUFFIXES)
    found = decode_text(data, settings.encoding, letters=not is_config)
    outcome = Outcome(path, "repaired", found.kind)
    if found.kind == "right":
        outcome = Outcome(path, "skipped", "already right")
    elif found.why:
        outcome = Outcome(path, "failed", found.kind, found.why)
    elif not mode & 0o222:  # replacing it would work, but its owner protected it
        outcome = Outcome(path, "failed", "read-only file", "make it writable, then run again")
    return outcome, data, found.text


def repair_text(outcome: Outcome, data: bytes, text: str, journal: Journal) -> Outcome:
    """Write a text as it should be, unless somebody changed the file meanwhile."""
    path, digest = outcome.path, hashlib.sha256(data).hexdigest()
    try:
        if not journal.write(path, text.encode(), Entry("repaired"), replaces=digest):
            return Outcome(path, "failed", "changed meanwhile", "run again")
    except OSError as error:
        return Outcome(path, "failed", "not written", str(error.strerror))
    log.info("%s: repaired: %s", path, outcome.reason)
    return outcome


def run_repair(settings: Settings, roots: Sequence[Path], report: Report) -> None:
    """Make every text below the roots UTF-8. Raises StopRun where originals cannot be kept."""
    suffixes = (*CAPTION_SUFFIXES, *CONFIG_SUFFIXES, f".{settings.caption_ext or 'txt'}".lower())
    journals: dict[Path, Journal] = {}
    with contextlib.ExitStack() as stack, show_progress(None, "text", report) as update:
        for root, path in walk_texts(roots, suffixes):
            update()
            outcome, data, text = look_at_text(path, settings)
            if outcome.kind != "repaired":
                report.record(outcome)
                continue
            if settings.dry_run:
                say(f"{path}: {outcome.reason}: {describe_change(data, text)}")
                report.record(outcome._replace(kind="planned"))
                continue
            if root not in journals:
                journals[root] = stack.enter_context(contextlib.closing(Journal(root)))
                journals[root].open()
                log.info("%s: keeps the originals; --undo restores them", journals[root].folder)
            with hold_signals():
                report.record(repair_text(outcome, data, text, journals[root]))


# ------------------------------------------------------------------------------------------- Review

STOPS, WRONG, MINOR = range(3)  # how grave a finding is
GRAVITIES = (  # said of one, and of several
    ("stops the training", "stop the training"),
    ("is trained wrong", "are trained wrong"),
    ("is worth a look", "are worth a look"),
)
UNREADABLE = ("unreadable file", "unreadable caption", "unreadable folder")
UNSEEN = ("captions elsewhere", "extension not read")
FROM_A_MODEL = ("refused", "error text", "reasoning only", "looping", "empty")
RENEW = "delete it and run again, or write it by hand"
FINDINGS = {  # gravest first: how grave each is, what it does, what to do about it
    **dict.fromkeys(UNREADABLE, (STOPS, "check its permissions")),
    "not an image": (STOPS, "save it anew, or take it out"),
    "damaged image": (STOPS, "its end cannot be decoded; save it anew, or take it out"),
    "not UTF-8": (STOPS, "the training ends when it is read; run --fix-encoding"),
    **dict.fromkeys(UNSEEN, (WRONG, "the trainer reads none of the captions")),
    "another extension": (WRONG, "the trainer does not read it; rename it"),
    "no caption": (WRONG, "it is trained without words; run this without --review"),
    "shared caption file": (WRONG, "images are trained with the same words"),
    "format not read": (WRONG, "ai-toolkit passes over it; save it as JPEG or PNG"),
    **dict.fromkeys(FROM_A_MODEL, (WRONG, f"it is trained as a caption; {RENEW}")),
    "cut off": (WRONG, f"half a sentence is trained; {RENEW}"),
    "generator syntax": (WRONG, "a generator's settings are trained; delete them"),
    "untidy": (WRONG, "marks, lines or talk are trained; write it as shown"),
    "damaged letters": (WRONG, "nonsense is trained; run --fix-encoding, or write it anew"),
    "excluded words": (WRONG, "the trait is bound to these words; take them out"),
    "trigger missing": (WRONG, "only ai-toolkit adds it; put it in front"),
    "too long": (MINOR, "its end may not be read; shorten it, or take --max-words"),
    "very short": (MINOR, "the others say more; see whether it is whole"),
    "identical captions": (MINOR, "see whether the images are alike too"),
    "identical images": (MINOR, "it is trained twice; take one out"),
    "shown otherwise": (MINOR, "viewers show more than is trained; save it as 8-bit sRGB"),
}
OTHER_FINDING = (MINOR, "see whether you meant that")
TRAINED_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # ai-toolkit, toolkit/data_loader.py
GENERATOR_SYNTAX = (
    r"\bNegative prompt:|\bSteps: \d+, Sampler:"  # AUTOMATIC1111 saves them beside images
    r"|<(?:lora|lyco|hypernet):[^<>]+>"
    r"|\{[^{}]*\|[^{}]*\}"  # {red|blue}: it chooses one
)
ESCAPES = r"(?:\\u[0-9a-fA-F]{4})+"
HALF = r"(?:[.!?]\s|[。！？]).*[^\W\d_],?$"  # only the last of several sentences has no end
WORD = r"[\u3040-\u9fff]|[^\s\u3040-\u9fff]+"  # Chinese and Japanese put no blanks between words
PAIR = r"(?=\b([\w'’-]+ [\w'’-]+))"  # two words without a comma between them
READS = {  # tokens of a caption, by a model's name in a job file
    r"(?i)sdxl|sd_?xl|sd_?1|v1-5|pony|illustrious|noob": 75,  # CLIP's 77 with its two marks
    r"(?i)hidream": 128,
}
GREENEST = 0.64  # of sRGB (0.60) and its like; Display P3 has 0.67, Adobe RGB 0.70
MANY = 0.2  # of the captions
SMALL_WORDS = (  # they do not tell what the captions have in common
    r"\b(?:an?|the|and|or|of|in|on|at|to|with|from|by|for|as|is|are|has|its?|his|her|he|she)\b"
)
Faults = Iterator[tuple[str, str]]  # the kind and the detail of each finding


@dataclass(slots=True)
class Sample:
    """An image and its caption, as a trainer reads them. What is missing is blank."""

    image: str = ""
    caption: str = ""
    digest: str = ""  # of the image, once it was read
    text: str = ""  # the caption as it stands on the disk
    clean: str = ""  # as it should read, without its trigger; blank where it is no caption
    repair: str = ""  # as it should read, trigger included; blank where it reads so already
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, path: str, detail: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, path, detail))


def count_words(text: str) -> int:
    """Return how many words a text has."""
    return len(re.findall(WORD, text))


def judge_text(sample: Sample, data: bytes, recipe: Recipe) -> Faults:
    """Yield what is wrong with a caption file. Raises FailImage where it holds no caption."""
    sample.text = data.decode("utf-8", "replace").strip()
    if not data.strip(BLANKS):
        yield "no caption", "the file is blank"
        return
    found = decode_text(data)
    if found.kind != "right":
        is_utf8 = decode(data, "utf-8") is not None
        yield "damaged letters" if is_utf8 else "not UTF-8", found.why or found.kind
    if found.text:
        yield from judge_caption(sample, found.text.strip(), recipe)


def judge_caption(sample: Sample, text: str, recipe: Recipe) -> Faults:
    """Yield what is wrong with a caption, by the gate that answers pass. Raises FailImage."""
    lines = text.replace("\n", ", ") if recipe.style == "tags" else text
    whole = judge_reply(Reply(content=lines))  # as prose: tags may have underscores
    opening = find_opening(whole, recipe)
    bare = whole[opening.end() :] if opening else whole
    if not bare:  # people train with the trigger alone
        return
    clean = judge_reply(Reply(content=bare))
    if syntax := re.search(GENERATOR_SYNTAX, text):
        yield "generator syntax", shorten(syntax[0], 80)
        return
    sample.clean = re.sub(ESCAPES, lambda found: str(json.loads(f'"{found[0]}"')), clean)
    repair = whole.removesuffix(bare) + sample.clean
    plain = re.sub(r"[^\S\n]+", " ", text.replace("\u200b", ""))  # Thai words hold U+200B
    if repair != plain:
        yield "untidy", f"would read: {shorten(repair, 80)}"
    if repair != plain or text != sample.text:
        sample.repair = repair
    if "\ufffd" in text:
        yield "damaged letters", "some were lost in an earlier conversion"
    yield from judge_words(text, recipe)


def judge_words(text: str, recipe: Recipe) -> Faults:
    """Yield the words that a caption lacks, has against the recipe, or has too many of."""
    word = recipe.trigger_word or recipe.trigger
    # as ai-toolkit finds it: toolkit/prompt_utils.py; letter case counts
    spelt = rf"\[(?:trigger|name)\]|(?<![a-zA-Z0-9]){re.escape(word)}(?![a-zA-Z0-9])"
    if word and not re.search(spelt, text):
        yield "trigger missing", f"{word}, in exactly this spelling"
    if excluded := find_excluded(text, recipe.exclude):
        yield "excluded words", ", ".join(excluded)
    tokens = round(TOKENS_A_WORD * count_words(text))
    for name, most in READS.items():
        if re.search(name, recipe.architecture) and tokens > most:
            yield "too long", f"about {tokens} tokens; {recipe.architecture} reads {most}"


def judge_image(sample: Sample, data: bytes, _: Recipe) -> Faults:
    """Yield what is wrong with an image. Raises FailImage where it cannot be decoded."""
    from PIL import ImageCms

    sample.digest = hashlib.sha256(data).hexdigest()
    suffix = os.path.splitext(sample.image)[1].lower()
    if suffix not in TRAINED_SUFFIXES:
        yield "format not read", suffix
        return
    with name_damage():
        image = open_image(BytesIO(data))
        image.draft("RGB", (1, 1))  # a JPEG is decoded small, and to its end all the same
        image.load()
    # trainers take convert("RGB") of it
    if image.mode.startswith("I"):
        yield "shown otherwise", "16 bits: what is not black is trained white"
    if image.has_transparency_data and image.convert("RGBA").getextrema()[-1] != (255, 255):
        yield "shown otherwise", "transparent in parts: the colours hidden there are trained"
    with contextlib.suppress(OSError, TypeError):  # no profile, or not one of three colours
        profile = ImageCms.ImageCmsProfile(BytesIO(image.info.get("icc_profile", b""))).profile
        if profile.green_primary and profile.green_primary[1][1] > GREENEST:
            yield "shown otherwise", "colours beyond sRGB: they are trained paler"


def look_at(sample: Sample, recipe: Recipe) -> None:
    """Add what is wrong with a caption or an image by itself."""
    for path, judge in ((sample.caption, judge_text), (sample.image, judge_image)):
        try:
            for kind, detail in judge(sample, read_file(path), recipe) if path else ():
                sample.add(kind, path, detail)
        except OSError as error:
            sample.add("unreadable file", path, str(error.strerror))
        except FailImage as error:  # the advice at the end of its detail is for a run
            sample.add(error.reason, path, error.detail.rpartition("; ")[0] or error.detail)


def collect_samples(settings: Settings, image_dir: Path, recipe: Recipe) -> Iterator[Sample]:
    """Yield each image with its caption."""
    root, dot_ext = settings.caption_dir or image_dir, f".{recipe.caption_ext}"
    for item in walk_images(image_dir, settings.caption_dir, recipe.caption_ext):
        path, reason = item[0], item.reason if isinstance(item, Outcome) else ""
        if reason in {"video", "mask"}:
            continue
        sample = Sample(path if os.path.isfile(path) else "")
        if isinstance(item, Outcome) and item.kind == "failed":
            sample.add(reason, path, item.detail)
        if reason in {"", "shared caption file"}:
            stem = os.path.splitext(os.path.join(root, name_below(image_dir, path)))[0]
            beside = [stem + ext for ext in (dot_ext, *CAPTION_SUFFIXES)]
            sample.caption = next(filter(os.path.exists, beside), "")
            if not sample.caption:
                sample.add("no caption", path)
            elif sample.caption != beside[0]:
                sample.add("another extension", sample.caption, f"{dot_ext} is read")
        yield sample


def judge_set(samples: Sequence[Sample]) -> None:
    """Add what is wrong with a sample when it is compared with the others."""
    first: dict[tuple[str, str], str] = {}
    for sample in samples:
        for kind, content, path in (
            ("identical images", sample.digest, sample.image),
            ("identical captions", sample.clean.casefold(), sample.caption),
        ):
            if content and first.setdefault((kind, content), path) != path:
                sample.add(kind, path, f"the same as {first[kind, content]}")
    captioned = [sample for sample in samples if sample.clean]
    lengths = sorted(count_words(sample.clean) for sample in captioned)
    middle = lengths[len(lengths) // 2] if lengths else 0
    for sample in captioned:
        if count_words(sample.clean) * 5 < middle:
            sample.add(
                "very short", sample.caption, f"half of the captions have {middle} words or more"
            )
    halves = [sample for sample in captioned if re.search(HALF, sample.clean)]
    # other tools cut sentences in two: https://github.com/MNeMoNiCuZ/joy-caption-batch/issues/12
    # where most captions end with a stop, one without was cut
    for sample in halves if len(halves) <= MANY * len(captioned) else ():
        sample.add("cut off", sample.caption, f"…{sample.clean[-40:]}")


def review_set(settings: Settings, image_dir: Path, recipe: Recipe) -> list[Sample]:
    """Return the samples of a set with what is wrong with them."""
    from concurrent.futures import ThreadPoolExecutor

    load_pillow()
    samples = list(collect_samples(settings, image_dir, recipe))
    with (
        show_progress(len(samples), "image", Report()) as update,
        ThreadPoolExecutor(count_processors()) as pool,
    ):
        for _ in pool.map(look_at, samples, itertools.repeat(recipe)):
            update()
    judge_set(samples)
    return [*(Sample(findings=[finding]) for finding in recipe.findings), *samples]


def find_phrases(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the commonest pairs of words, and in how many of the captions they stand."""
    counts = Counter[str]()
    for text in texts:
        pairs = set(re.findall(PAIR, text.casefold()))
        counts.update(pair for pair in pairs if not re.search(SMALL_WORDS, pair))
    least = max(5, MANY * len(texts))
    common = [(pair, number) for pair, number in counts.most_common(20) if number >= least]
    return [(pair, f"{number / len(texts):.0%}") for pair, number in common]


def list_kinds(findings: Iterable[Finding]) -> list[tuple[str, int, int, str]]:
    """Return the kinds of findings, gravest first: name, number, gravity, advice."""
    counts = Counter(finding.kind for finding in findings)
    kinds = [kind for kind in {**FINDINGS, **counts} if kind in counts]
    return [(kind, counts[kind], *FINDINGS.get(kind, OTHER_FINDING)) for kind in kinds]


def describe_verdict(findings: Sequence[Finding]) -> str:
    """Return the findings in one sentence."""
    if not findings:
        return "Nothing wrong found."
    counts = Counter(FINDINGS.get(finding.kind, OTHER_FINDING)[0] for finding in findings)
    said = [
        f"{number:,} {GRAVITIES[gravity][number > 1]}" for gravity, number in sorted(counts.items())
    ]
    return f"{len(findings):,} finding{'s' * (len(findings) > 1)}: {', '.join(said)}."


def describe_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the findings as lines, by gravity and kind."""
    for gravity, kinds in itertools.groupby(list_kinds(findings), lambda row: row[2]):
        yield f"{GRAVITIES[gravity][0].capitalize()}:"
        for kind, number, _, advice in kinds:
            yield f"  {kind} ({number:,}): {advice}."
            for finding in findings:
                if finding.kind == kind:
                    yield f"    {finding.path}: {finding.detail}".rstrip(": ")


PAGE_MARK = b"<!doctype html><!-- gen-captions --review -->"  # only pages of ours are replaced
# The script makes each node that holds a text, so a caption is text and runs nothing.
PAGE = """
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file:;
 style-src 'nonce-@nonce'; script-src 'nonce-@nonce'; base-uri 'none'">
<title>Review</title><style nonce="@nonce">
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 9%, Canvas) }
.g0 { --tint: light-dark(#b3261e, #ff9a90) }
.g1 { --tint: light-dark(#8a5300, #f2b562) }
.g2 { --tint: light-dark(#2a5d9f, #93bdf5) }
body { margin: 0 auto; max-width: 100rem; padding: 1.5rem clamp(1rem, 3vw, 2.5rem);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.4rem; line-height: 1.3 }
h2, summary { margin: 0 0 .5rem; font-size: 1rem; font-weight: 600 }
header, section, details { margin-bottom: 1.5rem } p { margin: .4rem 0 }
small, output, button span { opacity: .7 } b { color: var(--tint) }
button, input, select { font: inherit; color: inherit; background: Canvas;
  border: 1px solid var(--tint, var(--line)); border-radius: .5rem; padding: .2rem .6rem }
button, summary { cursor: pointer }
[aria-pressed=true] { background: var(--tint); color: Canvas }
.chips, nav, .two { display: flex; flex-wrap: wrap; gap: .4rem }
.two { gap: 0 3rem } section { flex: 1 20rem }
#bars { display: flex; align-items: end; gap: 2px; height: 5rem }
i { flex: 1; background: CanvasText; opacity: .45 }
nav { position: sticky; top: 0; z-index: 1; align-items: center; padding: .6rem 0;
  background: Canvas }
input { flex: 1 12rem }
ul { display: grid; gap: 1rem; align-items: start; margin: 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)) }
li { border: 1px solid var(--line); border-radius: .6rem; overflow: clip }
li a { display: grid; place-content: center; min-height: 4rem; background: var(--line) }
img { width: 100%; height: 15rem; object-fit: contain }
li div { padding: .5rem .9rem } [dir] { white-space: pre-wrap }
[dir] button { padding: 0; border: 0; text-decoration: underline }
.finding { padding: .2rem .5rem; border-left: 3px solid var(--tint); background: var(--line) }
</style>
<header><small id="title"></small><h1 id="verdict"></h1></header>
<main><details id="found"><summary>Findings</summary><p id="legend"></p>
<div id="kinds" class="chips"></div><p id="advice" role="status"></p></details>
<div class="two"><section><h2>Words in a caption</h2>
<div id="bars" role="img" aria-labelledby="axis"></div><small id="axis"></small></section>
<section><h2>Common phrases</h2><div id="phrases" class="chips"></div></section></div>
<nav><input id="search" type="search" aria-label="Search" placeholder="Search names and captions">
<select id="order" aria-label="Order"><option>Gravest first<option>By name</select>
<output id="count"></output></nav><ul id="cards"></ul><div id="end"></div></main>
<script type="application/json" id="data">@data</script><script nonce="@nonce">
const get = id => document.getElementById(id), data = JSON.parse(get("data").textContent)
const { samples, kinds, lengths } = data, chosen = new Set(), signs = "✕▲●"
let shown = [], drawn = 0
function make(tag, props, ...children) {
  const node = Object.assign(document.createElement(tag), props)
  node.append(...children)
  return node
}
function chip(text, number, press) {
  return make("button", { onclick: press }, text + " ", make("span", {}, number))
}
function fold(text) {
  const cut = text.length > 320 ? Math.max(text.lastIndexOf(" ", 280), 99) : text.length
  const rest = make("span", { hidden: true }, text.slice(cut)), more = make("button", {}, "more")
  more.onclick = () => { more.textContent = (rest.hidden = !rest.hidden) ? "more" : "less" }
  return make("p", { dir: "auto" }, text.slice(0, cut), ...cut < text.length ? [rest, more] : [])
}
function draw([title, href, text, repair, findings]) {
  const body = make("div", {}, make("small", {}, title))
  if (text) body.append(fold(text))
  if (repair) body.append(make("small", {}, "Repaired:"), fold(repair))
  for (const [kind, detail] of findings) {
    const gravity = kinds[kind][1], name = make("b", {}, signs[gravity] + " " + kind)
    body.append(make("p", { className: "finding g" + gravity }, name, detail && ": " + detail))
  }
  if (!href) return make("li", {}, body)
  const image = make("img", { src: href, alt: "Open " + title, loading: "lazy" })
  image.onerror = () => image.replaceWith("This browser cannot show it.")
  return make("li", {}, make("a", { href, target: "_blank" }, image), body)
}
const rank = ([, , , , findings]) => Math.min(...findings.map(([kind]) => kinds[kind][1]), 3)
function show() {
  const sought = get("search").value.toLowerCase()
  shown = samples.filter(([title, , text, , findings]) =>
    `${title} ${text}`.toLowerCase().includes(sought)
    && (!chosen.size || findings.some(([kind]) => chosen.has(kind))))
  if (!get("order").selectedIndex) shown.sort((one, other) => rank(one) - rank(other))
  get("count").value = `${shown.length} of ${samples.length} shown`
  get("cards").replaceChildren()
  drawn = 0
  drawMore()
}
function drawMore() { get("cards").append(...shown.slice(drawn, drawn += 60).map(draw)) }
document.title = "Review of " + (get("title").textContent = data.title)
get("verdict").textContent = data.verdict
data.gravities.forEach((said, n) => get("legend").append(
  make("b", { className: "g" + n }, `${signs[n]} ${said} \\u2003`)))
for (const [kind, [number, gravity]] of Object.entries(kinds)) {
  const button = chip(`${signs[gravity]} ${kind}`, number, () => {
    button.ariaPressed = !chosen.delete(kind) && !!chosen.add(kind)
    get("advice").textContent = [...chosen].map(each => `${each}: ${kinds[each][2]}.`).join(" ")
    show()
  })
  Object.assign(button, { ariaPressed: false, className: "g" + gravity })
  get("kinds").append(button)
}
for (const [phrase, share] of data.phrases) get("phrases").append(chip(phrase, share, () => {
  get("search").value = phrase
  show()
}))
const most = lengths[Math.floor(lengths.length * .95)] || 0, step = Math.ceil((most + 1) / 24)
const bars = Array(Math.floor(most / step) + 1).fill(0)
for (const words of lengths) bars[Math.floor(Math.min(words, most) / step)]++
for (const number of bars) {
  const bar = make("i", { title: number })
  bar.style.height = 100 * number / Math.max(...bars) + "%"
  get("bars").append(bar)
}
get("axis").textContent = `0 to ${most}, and more in the last bar; ${lengths.length} captions`
get("found").open = innerWidth > 640
get("search").oninput = get("order").onchange = show
new IntersectionObserver(([end]) => end.isIntersecting && drawMore(), { rootMargin: "999px" })
  .observe(get("end"))
show()
</script>
"""


def build_page(title: str, samples: Sequence[Sample], folder: str) -> bytes:
    """Return the page of a set, with links that work in a folder."""
    findings = [finding for sample in samples for finding in sample.findings]
    rows = []
    for sample in samples:
        path = sample.image or sample.findings[0].path
        name = os.path.relpath(path, folder).replace(os.sep, "/")
        href = quote(os.fsencode(name)) if sample.digest else ""
        found = [(kind, printable(detail)) for kind, _, detail in sample.findings]
        rows.append((printable(name), href, sample.text, sample.repair, found))
    data = {
        "title": title,
        "verdict": describe_verdict(findings),
        "gravities": [one for one, _ in GRAVITIES],
        "kinds": {kind: rest for kind, *rest in list_kinds(findings)},
        "lengths": sorted(count_words(sample.text) for sample in samples if sample.text),
        "phrases": find_phrases([sample.clean for sample in samples if sample.clean]),
        "samples": rows,
    }
    text = json.dumps(data).replace("<", "\\u003c")  # a caption may hold </script>
    page = PAGE.replace("@nonce", fingerprint(text)).replace("@data", text)
    return PAGE_MARK + page.encode()


# -------------------------------------------------------------------------------------- Local model


LOCAL_MODELS = {  # the name at Hugging Face, and the commit that docs/local-models.md describes
    "small": ("Qwen/Qwen3-VL-2B-Instruct-GGUF", "52d6c8ffea26cc873ac5ad116f8631268d7eb503"),
    "medium": ("Qwen/Qwen3-VL-4B-Instruct-GGUF", "1cd86afb9a95c410a6038ab3b40d8b578c892266"),
    "large": ("Qwen/Qwen3-VL-8B-Instruct-GGUF", "f982a07559d4a2f6c8744d840bf6fccab30eea96"),
    "joycaption": (
        "concedo/llama-joycaption-beta-one-hf-llava-mmproj-gguf:Q4_K",
        "acfe6bf78ae4e411cd5c7c8f4a71ba01f26a5b97",
    ),
}
LOCAL_SERVERS = {"Ollama": 11434, "LM Studio": 1234, "llama.cpp": 8080, "vLLM": 8000}
IMAGE_TOKENS = 3328  # 13 tiles of 256, the most that InternVL makes; all models are held to it
BE_ENGINE = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='engine')['serve_model']()"


def list_models(port: int) -> list[str]:
    """Return the models of the server at a port of this machine."""
    from http.client import HTTPConnection  # asks no proxy, follows no redirection

    connection = HTTPConnection("127.0.0.1", port, timeout=0.5)
    # anything may listen there
    with contextlib.closing(connection), contextlib.suppress(Exception):
        connection.request("GET", "/v1/models")
        listed = json.loads(connection.getresponse().read(1 << 20))
        return [str(model["id"]) for model in listed["data"]]
    return []


def describe_local_servers() -> list[str]:
    """Return how to use each model server that runs on this machine."""
    import shlex

    lines = []
    for name, port in LOCAL_SERVERS.items():
        if models := list_models(port):
            first, *others = map(shlex.quote, models)
            choice = f" (or {shorten(', '.join(others))})" if others else ""
            lines.append(f"{name}: --base-url http://127.0.0.1:{port}/v1 --model {first}{choice}")
    return lines


def check_local(model: str) -> None:
    """Raise SettingsError if a package or file that a local model needs is not there."""
    from importlib.util import find_spec

    if model.endswith(".gguf") and not os.path.isfile(model):
        raise SettingsError(f"--local: {model}: no such file")
    needed = ("xllamacpp", "huggingface_hub")
    if missing := " and ".join(name for name in needed if find_spec(name) is None):
        raise SettingsError(f"--local: needs {missing}: pip install -r requirements-local.txt")


def choose_files(paths: Iterable[str], quant: str) -> tuple[str, str]:
    """Return the model of a quantization and its projector. Raises ValueError."""
    from difflib import get_close_matches

    ggufs = {os.path.basename(path): path for path in sorted(paths) if path.endswith(".gguf")}
    projectors = [name for name in ggufs if "mmproj" in name.lower()]
    models = [name for name in ggufs if quant.lower() in name.lower() and name not in projectors]
    if not models or not projectors:
        found = ", ".join(ggufs) or "none"
        raise ValueError(f"no {quant} model with its mmproj file; GGUF files there: {found}")
    model = min(models, key=len)  # Q4_K is in Q4_K_M too
    (projector,) = get_close_matches(model, projectors, n=1, cutoff=0)
    return ggufs[model], ggufs[projector]


def find_at_hub(repo: str, quant: str, commit: str) -> tuple[str, str]:
    """Return the paths of a model and its projector in the hub's cache, downloaded once."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    with contextlib.suppress(OSError, ValueError):  # no request is made for what is there
        folder = snapshot_download(repo, revision=commit, local_files_only=True)
        return choose_files(map(str, Path(folder).rglob("*")), quant)
    found = HfApi().model_info(repo, revision=commit, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    files = choose_files(sizes, quant)
    gigabytes = sum(map(sizes.__getitem__, files)) / 1e9
    log.info("downloading %.2f GB from %s: %s, %s", gigabytes, constants.ENDPOINT, *files)
    model, projector = (hf_hub_download(repo, file, revision=commit) for file in files)
    return model, projector


def find_model(model: str) -> tuple[str, str]:
    """Return the paths of a local model and its projector. Raises StopRun."""
    try:
        if model.endswith(".gguf"):
            beside = map(str, Path(model).parent.iterdir())
            return choose_files(beside, os.path.basename(model))
        name, commit = LOCAL_MODELS.get(model, (model, "main"))
        repo, _, quant = name.partition(":")
        return find_at_hub(repo, quant or "Q4_K_M", commit)  # the usual one, also for llama.cpp
    except Exception as error:  # the hub's own kinds, those of its connection, and the disk's
        why = shorten(str(error) or type(error).__name__)
        raise StopRun(f"--local: cannot get {model}: {why}") from error


def serve_model() -> None:
    """Be the engine: a process that ends with the one that started it."""

    def end_with_parent() -> None:
        os.read(0, 1)  # standard input ends when nobody holds its other end
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.platform == "linux":  # the thread does not run while a model is loaded
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import xllamacpp

    options = json.loads(os.environ["GEN_CAPTIONS_ENGINE"])
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = options["files"]
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [options["key"]]
    params.n_parallel, params.n_ctx = options["slots"], options["context"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.image_max_tokens = IMAGE_TOKENS
    params.enable_reasoning = 0
    params.cache_ram_mib = 0  # it would keep prompts, but each image is asked about once
    params.verbosity = 1  # errors
    # Qwen's own values; its models loop without: https://github.com/QwenLM/Qwen3-VL/issues/1611
    sampling = params.sampling
    sampling.temp, sampling.top_p, sampling.top_k = 0.7, 0.8, 20
    sampling.penalty_present = 1.5
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        time.sleep(1)  # a thread of llama.cpp is still writing why
        sys.exit(1)
    print(server.listening_address, flush=True)
    threading.Event().wait()


def describe_end(process: subprocess.Popen[str]) -> str:
    """Return how the engine ended; it has said why itself."""
    if (code := process.wait()) == -9:
        return "--local: the engine was killed; where memory is short, take a smaller model"
    return f"--local: the engine ended with code {code}; what it said is above"


@contextlib.contextmanager
def open_engine(
    settings: Settings, prompt: str
) -> Iterator[tuple[Settings, subprocess.Popen[str]]]:
    """Yield the settings with the engine's address, and its process. Raises StopRun."""
    files, key, slots = find_model(str(settings.local)), os.urandom(16).hex(), settings.thread_pool
    log.info("loading %s with %s", *files)
    prompt_tokens = 1024 + len(prompt.encode()) // 2  # at most, the model's own words included
    options = {
        "files": files,
        "key": key,
        "slots": slots,
        "context": slots * (IMAGE_TOKENS + prompt_tokens + settings.max_tokens),
        # threads wait for each other busily; beside others, one for each processor is very slow
        "threads": max(1, count_processors() - 1),
    }
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", "-c", BE_ENGINE, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GEN_CAPTIONS_ENGINE": json.dumps(options)},
        start_new_session=True,  # the first Ctrl-C ends neither it nor the answers on their way
    ) as process:
        address = process.stdout.readline().strip() if process.stdout else ""
        if not address:
            raise StopRun(describe_end(process))
        yield dataclasses.replace(settings, base_url=f"{address}/v1", api_key=key), process


async def end_with(process: subprocess.Popen[str], stop: Stop) -> None:
    """End the run when the engine ends."""
    with contextlib.suppress(StopRun):  # from the nap, when the run ends first
        while process.poll() is None:
            await stop.sleep(0.1)
        stop.set(StopRun(describe_end(process)))


# ---------------------------------------------------------------------------------------------- Run


@dataclass(frozen=True, slots=True)
class Run:
    """What the parts of a run share."""

    settings: Settings
    image_dir: Path
    recipe: Recipe
    journal: Journal
    report: Report
    bill: Bill
    stop: Stop

    def name(self, job: Job) -> str:
        """Return an image's path below the image folder."""
        return name_below(self.image_dir, job.image)


def plan_run(run: Run, waiting: set[str]) -> Iterator[Job | Outcome]:
    """Yield what is to be done about each image; `waiting` are those that batches have.

    Raises SettingsError where there is no image.
    """
    settings, recipe = run.settings, run.recipe
    left = settings.limit or math.inf
    left -= len(waiting) if settings.batch else 0
    is_empty = True
    for pair in walk_images(run.image_dir, settings.caption_dir, recipe.caption_ext):
        is_empty &= isinstance(pair, Outcome) and pair.kind == "skipped"
        if isinstance(pair, Outcome):
            yield pair
            continue
        item = judge_pair(pair, run.journal, recipe, overwrite=settings.overwrite)
        if isinstance(item, Outcome):
            yield item
            continue
        if run.name(item) in waiting:
            why = "" if settings.batch and not settings.dry_run else "waits in a batch"
        else:
            left -= 1
            why = "" if left >= 0 else "over --limit"
        yield Outcome(item.image, "skipped", why, caption=item.caption) if why else item
    if is_empty:
        looked = f"looked for {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}"
        said = f"no images there or below; {looked}"
        raise SettingsError(f"--image-dir: {run.image_dir}: {said}")


def collect_jobs(run: Run, plan: Iterable[Job | Outcome]) -> list[Job]:
    """Return the jobs of a plan, those that failed before last; the report gets the rest."""
    jobs: list[Job] = []
    for item in plan:
        if isinstance(item, Job):
            jobs.append(item)
        else:
            run.report.record(item)
    past = run.journal.past
    jobs.sort(key=lambda job: [entry.outcome for entry in past(job.caption)[-1:]] == ["failed"])
    return jobs


def check_writable(jobs: Iterable[Job]) -> None:
    """Raise StopRun, before anything is paid, where captions could not be kept."""
    for folder in sorted({os.path.dirname(job.caption) for job in jobs}):
        place = os.path.abspath(folder)
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
            said = f"{place} is no folder that may be written to"
            raise StopRun(f"{folder}: cannot save captions there: {said}")


def check_key(settings: Settings) -> None:
    """Raise the SettingsError that shows the ways on where a key is needed."""
    if settings.local:
        check_local(settings.local)
    if is_this_machine(settings.base_url) or not re.fullmatch(NO_KEY, settings.api_key):
        return
    lines = [
        "OPENAI_API_KEY is not set. Put a key from https://platform.openai.com/api-keys into .env.",
        "Without a key: gen-captions --local ./images captions with a model on this machine.",
        "Ollama and others: --base-url http://localhost:11434/v1 --model NAME",
    ]
    if os.environ.get("OPENAI_API_BASE") and settings.base_url == OPENAI_URL:
        lines.append("OPENAI_API_BASE is set; this tool reads OPENAI_BASE_URL.")
    if os.path.exists(".env.txt") and not os.path.exists(".env"):
        lines.append(".env.txt is there; rename it to .env.")
    raise SettingsError("\n".join([*lines, *describe_local_servers()]))


def log_findings(run: Run) -> None:
    """Say once what is worth knowing before anything is sent."""
    for _, path, detail in run.recipe.findings:
        log.warning("%s: %s", path, detail)
    url = run.settings.base_url
    if url.startswith("http://") and not is_this_machine(url):
        said = "OPENAI_BASE_URL is plain http: others can read key and images on the way to %s"
        log.warning(said, run.settings.host)


@contextlib.contextmanager
def end_on_signals(stop: Stop) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run in order, and the second cancel it."""
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task

    def cancel(_number: int, _frame: FrameType | None) -> None:
        handle_signals(interrupt)
        loop.call_soon_threadsafe(task.cancel)

    def end(number: int, _frame: FrameType | None) -> None:
        handle_signals(cancel)
        loop.call_soon_threadsafe(stop.set, signal.Signals(number))

    handle_signals(end)
    try:
        yield
    finally:
        handle_signals(interrupt)


# ------------------------------------------------------------------------------------------ Caption

NOT_ANSWERED = "not answered"  # in a batch
HANDOVER_S = 0.02  # between two of them


def read_words(path: str) -> str:
    """Return what a caption file says in one line, blank for no UTF-8."""
    try:
        return " ".join(read_file(path).decode("utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        return ""


def make_prompt(recipe: Recipe, job: Job) -> str:
    """Return the prompt for one image."""
    hint = ""
    if "{caption}" in recipe.prompt:  # or the tags beside it, where captions end in .caption
        hint = read_words(job.caption) or read_words(os.path.splitext(job.image)[0] + ".txt")
    return fill_prompt(recipe, job.image, hint)


def expect(settings: Settings, recipe: Recipe, job: Job) -> Usage:
    """Return about what an image will take, by its header. Raises FailImage."""
    try:
        with open(os.open(job.image, READ_ONLY), "rb") as file:
            size = measure_image(file, settings.max_side)
    except OSError as error:
        raise FailImage("unreadable file", str(error.strerror)) from error
    return estimate(settings, make_prompt(recipe, job), size)


def load_question(run: Run, job: Job, pixels: bool) -> Question:
    """Return what is to be asked about an image. Runs in a thread. Raises FailImage."""
    settings, recipe = run.settings, run.recipe
    try:
        changed_ns = os.stat(job.image).st_mtime_ns
        data = read_file(job.image)
    except OSError as error:
        raise FailImage("unreadable file", str(error.strerror)) from error
    entry = Entry(
        outcome="captioned",
        recipe=recipe.identity,
        trigger=recipe.trigger,
        image_sha256=hashlib.sha256(data).hexdigest(),
        image_mtime_ns=changed_ns,
        model=settings.model,
    )
    question = Question(job, make_prompt(recipe, job), entry)
    if pixels and not job.answer:
        jpeg, size = prepare_image(data, settings.max_side)
        question.jpeg = b64encode(jpeg)
        question.expected = estimate(settings, question.prompt, size)
    return question


def finish_entry(question: Question, **changes: Any) -> Entry:
    """Return the journal's entry of an image, with what it cost."""
    return dataclasses.replace(
        question.entry,
        usd=round(question.dollars, 8),
        prompt_tokens=question.usage.prompt,
        answer_tokens=question.usage.answer,
        **changes,
    )


def keep_caption(run: Run, question: Question, answer: str) -> Outcome:
    """Write the caption that an answer comes to. Runs in a thread. Raises FailImage, StopRun."""
    job = question.job
    replaces = job.replaces.caption_sha256 if job.replaces else ""
    text, notes = finish_caption(answer, run.recipe)
    entry = finish_entry(question, answer=answer)
    try:
        is_written = run.journal.write(
            job.caption, f"{text}\n".encode(), entry, replaces=replaces, image=job.image
        )
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FailImage("not written", f"{error.strerror}; the answer was: {text}") from error
        # each answer that is paid for is shown, also those after the first that is not saved
        log.log(logging.ERROR, "%s: not saved; the answer was: %s", job.caption, text)
        raise StopRun(f"{job.caption}: cannot save captions: {error.strerror}") from error
    if not is_written:
        why = "changed meanwhile" if job.replaces else "captioned meanwhile"
        return Outcome(job.image, "skipped", why, caption=job.caption)
    return Outcome(job.image, "captioned", detail=text, caption=job.caption, notes=notes)


def keep_failure(run: Run, question: Question, reason: str) -> None:
    """Write the journal's line of an image without a caption. Runs in a thread."""
    entry = finish_entry(question, outcome="refused" if reason == "refused" else "failed")
    with contextlib.suppress(OSError):  # then it is asked again next time
        run.journal.append(question.job.caption, entry, image=question.job.image, reason=reason)


class Threads:
    """Does blocking work in a few threads.

    A hand-over between threads costs as much as a small image, so a thread goes on for a moment
    with what waits before it hands back what is done.
    """

    def __init__(self, number: int) -> None:
        self._idle = number
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._tasks = set[Any]()  # the loop itself would forget them

    async def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function returns, or raise what it raises."""
        import asyncio

        future = asyncio.get_running_loop().create_future()
        self._waiting.append((future, functools.partial(function, *arguments)))
        if self._idle:
            self._idle -= 1
            self._tasks.add(asyncio.create_task(self._keep_busy()))
        return await future

    async def _keep_busy(self) -> None:
        """Keep one thread busy while anything waits."""
        from aiofiles.os import wrap

        while self._waiting:
            for future, result in await wrap(self._do_some)():
                if future.cancelled():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._idle += 1

    def _do_some(self) -> list[tuple[Future[Any], Any]]:
        done: list[tuple[Future[Any], Any]] = []
        end = time.monotonic() + HANDOVER_S
        with contextlib.suppress(IndexError):  # nothing waits
            while time.monotonic() < end:
                future, function = self._waiting.popleft()
                try:
                    done.append((future, function()))
                except Exception as error:
                    done.append((future, error))
        return done


class Captioner:
    """Takes one image from file to caption: load, ask, keep.

    Without an asker it only loads; without `pixels` the image was asked about before.
    """

    def __init__(
        self, run: Run, asker: Asker | Answers | None = None, *, pixels: bool = True
    ) -> None:
        load_pillow()
        self._run = run
        self._asker = asker
        self._pixels = pixels
        # one more than there are processors, since threads wait for each other now and then;
        # with more of them only memory would grow
        self._decoders = Threads(count_processors() + 1)
        self._writer = Threads(1)

    async def load(self, job: Job) -> Question:
        """Return what is to be asked about an image. Raises FailImage."""
        question: Question = await self._decoders.do(load_question, self._run, job, self._pixels)
        return question

    async def caption(self, job: Job) -> Outcome:
        """Caption one image. Raises FailImage or StopRun, after the journal's line of that."""
        import asyncio

        run = self._run
        question = await self.load(job)
        try:
            answer = job.answer or await self._ask(question)
        except (FailImage, StopRun) as error:
            reason = error.reason if isinstance(error, FailImage) else "stopped"
            if reason not in {"stopped", NOT_ANSWERED} or question.usage.prompt:
                await self._writer.do(keep_failure, run, question, reason)
            raise
        task = asyncio.ensure_future(self._writer.do(keep_caption, run, question, answer))
        try:
            outcome: Outcome = await asyncio.shield(task)
        except asyncio.CancelledError:  # what is written is counted
            outcome = await task
        return outcome

    async def _ask(self, question: Question) -> str:
        """Return an answer; of one with excluded words, the better of two."""
        assert self._asker
        exclude = self._run.recipe.exclude
        answer = await self._asker.ask(question)
        if found := find_excluded(answer, exclude):
            question.prompt += f"\nLeave these words out: {', '.join(found)}."
            try:
                second = await self._asker.ask(question)
                answer = min(second, answer, key=lambda text: len(find_excluded(text, exclude)))
            except FailImage as error:
                log.debug("%s: %s; the first answer is kept", question.job.image, error)
            except StopRun as cause:  # the first answer is paid for, and serves
                self._run.stop.set(cause)
        return answer


async def handle_all(
    run: Run,
    jobs: Iterable[Job],
    handle: Callable[[Job], Awaitable[Outcome | None]],
    workers: int,
) -> None:
    """Handle each job in one of N workers; the one place where exceptions become outcomes.

    The workers share the iterator, so a job is made when one is free.
    """
    import asyncio

    queue = iter(jobs)

    async def work() -> None:
        for job in queue:
            if run.stop.cause is not None:
                return
            try:
                outcome = await handle(job)
            except FailImage as error:
                later = "" if error.retry_after_s is None else "; run again later"
                outcome = Outcome(job.image, "failed", error.reason, error.detail + later)
            except StopRun as cause:
                run.stop.set(cause)
                return
            except Exception as error:  # a fault of this program must not end the run either
                log.debug("%s: unexpected", job.image, exc_info=True)
                said = f"{error!r}; please report it, with -v"
                outcome = Outcome(job.image, "failed", "unexpected", said)
            if outcome:
                run.report.record(outcome)
                run.report.update()
                run.report.left -= 1

    async with asyncio.TaskGroup() as group:
        for number in range(workers):
            group.create_task(work(), name=f"worker-{number + 1}")


async def keep_known(run: Run, jobs: Sequence[Job]) -> Iterator[Job]:
    """Caption the images whose answers are known, and return the others."""
    known = [job for job in jobs if job.answer]
    await handle_all(run, known, Captioner(run).caption, run.settings.thread_pool)
    return iter([job for job in jobs if not job.answer])


async def ask_first(run: Run, asker: Asker, jobs: Iterator[Job]) -> None:
    """Caption one image after another until the server has answered as it will."""
    caption = Captioner(run, asker).caption
    while not asker.is_settled and (job := next(jobs, None)):
        await handle_all(run, [job], caption, 1)
        run.stop.check()


async def caption_images(
    run: Run, jobs: Sequence[Job], engine: subprocess.Popen[str] | None
) -> None:
    """Caption images one by one; where our own engine is asked, its end is the run's."""
    import asyncio

    check_writable(jobs)
    connection = open_connection(run.settings)
    async with connection.sdk:
        watch = asyncio.create_task(end_with(engine, run.stop)) if engine else None
        asker = Asker(connection, run.settings, run.recipe, run.bill, run.stop)
        queue = await keep_known(run, jobs)
        await ask_first(run, asker, queue)
        await handle_all(run, queue, Captioner(run, asker).caption, run.settings.thread_pool)
        if watch:
            watch.cancel()


async def carry_out(run: Run, work: Callable[[], Awaitable[None]]) -> None:
    """Do the work of a run, its progress shown."""
    report, stop = run.report, run.stop
    with show_progress(report.left, "image", report) as report.update, end_on_signals(stop):
        log.info("%s", ". ".join(run.recipe.lines))
        try:
            await work()
        except StopRun as cause:
            stop.set(cause)
        except OSError as error:
            stop.set(StopRun(f"{error.filename or STATE_FOLDER}: {error.strerror}"))
        finally:
            report.ended_by = stop.cause


# -------------------------------------------------------------------------------------------- Batch

# lines and results: https://platform.openai.com/docs/api-reference/batch
ENDPOINT: Final = "/v1/chat/completions"
PART_BYTES = 170_000_000  # OpenAI takes 200 MB
PART_LINES = 2000  # an engine may write nothing before its last answer
NO_ROOM = "(?i)token_limit|enqueued"  # https://github.com/openai/openai-python/issues/2084
REASONERS = r"(?:.*/)?(?:gpt-(?:[5-9]|\d\d)|o\d)"


@dataclass(slots=True)
class Part:
    """A file of requests, and what the server calls it and its batch, once it does."""

    path: str
    made_with: str
    parameters: Parameters  # that the server takes
    images: list[str] = field(default_factory=list)  # names below the image folder
    size: int = 0  # of its requests, in bytes
    usd: float = 0.0  # what the answers may cost
    file_id: str = ""
    batch_id: str = ""

    @property
    def lines(self) -> str:
        """The path of its requests."""
        return f"{self.path}l"

    def save(self) -> None:
        """Keep what is known, also for the next run. Raises OSError."""
        write_whole(self.path, json.dumps(dataclasses.asdict(self)).encode())


def batch_folder(journal: Journal) -> str:
    """Return the folder of the parts that wait."""
    return os.path.join(journal.folder, "batch")


def load_parts(journal: Journal) -> list[Part]:
    """Return the parts that wait, oldest first. Raises SettingsError."""
    parts = []
    for path in sorted(map(str, Path(batch_folder(journal)).glob("*.json"))):
        try:
            parts.append(Part(**json.loads(read_file(path)) | {"path": path}))
        except (OSError, ValueError, TypeError):
            raise SettingsError(f"{path}: cannot be read; delete it to give it up") from None
    return parts


def waiting_images(parts: Iterable[Part]) -> set[str]:
    """Return the names of the images in parts."""
    return {name for part in parts for name in part.images}


def made_with(run: Run) -> str:
    """Return what must be the same when a batch is collected."""
    image_dir = os.path.realpath(run.image_dir)
    return fingerprint(run.recipe.identity, run.settings.overwrite, image_dir)


def line_id(run: Run, question: Question) -> str:
    """Return the id of an image's line, of these bytes, this prompt and recipe."""
    entry = question.entry
    name = run.name(question.job)
    return f"gc-{fingerprint(name, entry.image_sha256, entry.recipe, question.prompt)}"


def write_line(run: Run, part: Part, question: Question) -> None:
    """Add the request of an image to a part. Raises StopRun."""
    head = json.dumps({"custom_id": line_id(run, question), "method": "POST", "url": ENDPOINT})
    body = build_request(run.settings.model, question.prompt, part.parameters, question.jpeg)
    try:
        with open(part.lines, "ab") as file:
            file.write(head.removesuffix("}").encode() + b', "body": ' + body + b"}\n")
            part.size = file.tell()
    except OSError as error:
        raise StopRun(f"{part.lines}: cannot be written: {error.strerror}") from error
    part.images.append(run.name(question.job))


def parse_result(line: bytes) -> tuple[str, Reply]:
    """Return the id of a result and what came back. Raises ValueError, TypeError for no result."""
    found = json.loads(line)
    custom_id, response, error = (dig(found, name) for name in ("custom_id", "response", "error"))
    if not isinstance(custom_id, str) or "body" in found:  # the latter is a request
        raise ValueError
    # some versions of vLLM give the completion itself
    body = response if dig(response, "choices") else dig(response, "body")
    status = dig(response, "status_code") or (200 if body else 0)
    return custom_id, parse_reply(status, json.dumps(body or {"error": error}))


class Answers:
    """The answers in results, in any order; stands where an Asker does."""

    def __init__(self, run: Run, files: Iterable[bytes]) -> None:
        self._run = run
        self._captioner = Captioner(run, self, pixels=False)
        self._replies: dict[str, Reply] = {}
        self.torn = 0  # lines that are no results
        self.used = 0
        self.missing = 0  # images without an answer
        lines = (line for data in files for line in data.splitlines())
        for line in filter(bytes.strip, lines):
            try:
                custom_id, reply = parse_result(line)
            except (ValueError, TypeError, RecursionError):
                self.torn += 1
                continue
            known = self._replies.get(custom_id)
            # without a status it was never asked: the batch has expired
            if reply.status and (not known or known.error):
                self._replies[custom_id] = reply

    async def caption(self, job: Job) -> Outcome | None:
        """Caption an image, if it has an answer. Raises FailImage."""
        try:
            return await self._captioner.caption(job)
        except FailImage as error:
            if error.reason != NOT_ANSWERED:
                raise
            self.missing += 1
            return None

    async def ask(self, question: Question) -> str:
        """Return the answer, past the gate. Raises FailImage."""
        reply = self._replies.pop(line_id(self._run, question), None)
        if reply is None:
            raise FailImage(NOT_ANSWERED, "")
        self.used += 1
        if reply.usage:
            question.usage = reply.usage
            question.dollars = self._run.bill.settle(0.0, reply, "batch")
        try:
            return judge_reply(reply, self._run.recipe.style)
        except StopRun as cause:  # the other images have answers of their own
            raise FailImage("rejected", str(cause)) from None


async def write_parts(
    run: Run, jobs: Iterable[Job], path: str, parameters: Parameters, kind: str = ""
) -> AsyncIterator[Part]:
    """Write the requests of images into files; yield each part when it is written.

    `kind` is the images' outcome, if any. Raises StopRun, after the last part where --max-cost
    leaves images out.
    """
    captioner, queue, too_dear = Captioner(run), iter(jobs), list[StopRun]()
    parameters.pop("service_tier", None)  # a batch is a tier of its own

    def take(part: Part) -> Iterator[Job]:
        for job in itertools.islice(queue, PART_LINES):
            yield job
            if too_dear or part.size >= PART_BYTES:
                return

    async def add(part: Part, job: Job) -> Outcome | None:
        question = await captioner.load(job)
        try:
            part.usd += run.bill.hold(question.expected, run.settings.max_tokens, "batch")
        except StopRun as cause:
            too_dear.append(cause)
            return None
        write_line(run, part, question)
        return Outcome(job.image, kind) if kind else None

    for number in itertools.count(1):
        part = Part(f"{path}{number:03}.json", made_with(run), parameters)
        await handle_all(run, take(part), functools.partial(add, part), count_processors())
        run.stop.check()
        if part.images:
            yield part
        if too_dear:
            raise too_dear[0]
        if not part.images:
            return


class Batches:
    """Captions images by a Batch API.

    Each part goes one step further, again and again: upload, create, look, collect.
    """

    def __init__(
        self, run: Run, connection: Connection, parts: list[Part], jobs: list[Job]
    ) -> None:
        self._run = run
        self._connection = connection
        self._client = connection.sdk
        self._parts = parts
        self._jobs = {run.name(job): job for job in jobs}
        self._parameters = parts[0].parameters if parts else None
        self._failures = 0  # in a row
        self._has_room = True  # for another batch
        self._ended_by: StopRun | None = None  # why images are left

    async def work(self) -> None:
        """Collect what waits, send the other images, and wait for all. Raises StopRun."""
        waiting = waiting_images(self._parts)  # before any is forgotten
        await self._advance()
        await self._send([job for name, job in self._jobs.items() if name not in waiting])
        pause_s = 0.5
        while self._parts:
            await self._run.stop.sleep(pause_s)
            pause_s = min(60.0, 1.5 * pause_s)
            await self._advance()
        if self._ended_by:
            raise self._ended_by

    async def _send(self, jobs: Sequence[Job]) -> None:
        """Put images into parts; the first is asked at once if no part has parameters."""
        run = self._run
        queue = await keep_known(run, jobs)
        if self._parameters is None:  # a wrong key is known now and not tomorrow
            asker = Asker(self._connection, run.settings, run.recipe, run.bill, run.stop)
            await ask_first(run, asker, queue)
            self._parameters = asker.parameters
        path = os.path.join(batch_folder(run.journal), f"{time.time_ns()}-")
        try:
            async for part in write_parts(run, queue, path, self._parameters):
                self._parts.append(part)
                await self._advance()
        except StopRun as cause:
            run.stop.check()
            self._ended_by = cause

    async def _advance(self) -> None:
        for part in list(self._parts):
            self._run.stop.check()
            try:
                await self._step(part)
                self._failures = 0
            except Exception as error:
                self._judge(part, error)

    def _judge(self, part: Part, error: Exception) -> None:
        """Leave a step for the next round, its part for the next run, or end the run."""
        run = self._run
        try:
            cause = judge_error(describe_failure(error, run.settings))
        except OSError:  # of our own files
            raise
        except Exception:  # the SDK takes a web page for an object
            cause = FailImage("broken answer", repr(error), retry_after_s=0.0)
        self._failures += 1
        if isinstance(cause, StopRun):
            run.stop.set(cause)
        elif cause.retry_after_s is not None and self._failures <= run.settings.throttle_retries:
            log.warning("--batch: %s; trying again", cause)
        elif part.batch_id:
            self._leave(part, str(cause))
        else:
            run.stop.set(StopRun(f"--batch: no batch can be made: {cause}"))

    def _leave(self, part: Part, said: str) -> None:
        log.error("%s: %s; run again, or delete it to give it up", part.path, said)
        self._parts.remove(part)
        self._ended_by = StopRun("--batch: not all images were answered")

    async def _step(self, part: Part) -> None:
        client = self._client
        if not part.file_id:
            with FileIO(part.lines) as file:  # a path the SDK would read whole
                part.file_id = (await client.files.create(file=file, purpose="batch")).id
            part.save()
            os.unlink(part.lines)
        elif part.batch_id:
            batch = await client.batches.retrieve(part.batch_id)
            if batch.status in {"completed", "failed", "expired", "cancelled"}:
                await self._collect(part, batch)
        elif self._has_room or not any(other.batch_id for other in self._parts):
            await self._create(part)

    async def _create(self, part: Part) -> None:
        """Have a batch made of a file, unless it was, and the answer lost."""
        batches = self._client.batches
        newest = await batches.list(limit=100)
        found = (one for one in newest.data if one.input_file_id == part.file_id)
        batch = next((one for one in found if one.status != "failed"), None)
        batch = batch or await batches.create(
            input_file_id=part.file_id, endpoint=ENDPOINT, completion_window="24h"
        )
        part.batch_id = batch.id
        part.save()
        log.info("batch %s has %d images; Ctrl-C loses nothing", batch.id, len(part.images))

    async def _collect(self, part: Part, batch: Any) -> None:
        if batch.status == "failed":
            await self._retreat(part, batch)
            return
        run = self._run
        files = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        found = [(await self._client.files.content(name)).content for name in files]
        answers = Answers(run, found)
        jobs = [job for name in part.images if (job := self._jobs.get(name))]
        await handle_all(run, jobs, answers.caption, run.settings.thread_pool)
        if run.stop.cause is not None:
            return
        if answers.torn or (batch.status == "completed" and not any(found)):  # they are paid for
            self._leave(part, "not all answers can be read")
            return
        if answers.missing:
            said = f"{answers.missing} of {len(jobs)} images were not answered ({batch.status})"
            self._ended_by = StopRun(f"--batch: {said}")
        await self._forget(part, files)

    async def _retreat(self, part: Part, batch: Any) -> None:
        """Try a batch later that found no room; end the run for another that failed."""
        reply = parse_reply(400, json.dumps({"error": batch.to_dict().get("errors")}))
        if not re.search(NO_ROOM, reply.raw):
            await self._forget(part, [])
            self._run.stop.set(StopRun(f"--batch: the server rejects it: {reply.error}"))
            return
        log.warning("batch %s: no room yet; trying later: %s", part.batch_id, reply.error)
        part.batch_id = ""
        part.save()
        self._has_room = False

    async def _forget(self, part: Part, files: Sequence[str]) -> None:
        """Remove a part here, and its files there, where they would stay for weeks."""
        os.unlink(part.path)
        self._parts.remove(part)
        self._run.bill.hold_again(-part.usd)
        self._has_room = True
        for name in (part.file_id, *files):
            with contextlib.suppress(Exception):  # nothing depends on it
                await self._client.files.delete(name)


async def send_batches(run: Run, jobs: list[Job], parts: list[Part]) -> None:
    """Caption images by a Batch API, and those whose parts wait."""
    folder = batch_folder(run.journal)
    if any(part.made_with != made_with(run) for part in parts):
        said = "a batch with other settings waits; the same command goes on"
        raise SettingsError(f"{folder}: {said}, or delete the folder to give it up")
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):  # of a run that was killed before the upload
        if name.endswith(".jsonl"):
            os.unlink(os.path.join(folder, name))
    check_writable(jobs)
    run.bill.hold_again(sum(part.usd for part in parts))
    connection = open_connection(run.settings)
    async with connection.sdk:
        await Batches(run, connection, parts, jobs).work()


async def export_lines(run: Run, jobs: list[Job]) -> None:
    """Write the requests of images into files, for any engine that takes them."""
    settings, folder = run.settings, str(run.settings.batch_export)
    try:
        os.makedirs(folder)
    except OSError as error:
        raise SettingsError(f"--batch-export: {folder}: {error.strerror}") from None
    parameters = first_parameters(settings)
    if not re.match(REASONERS, settings.model):  # no answer can teach us: what all engines know
        parameters = [parameters, *other_parameters(settings, parameters)][-1]
    new = (job for job in jobs if not job.answer)
    async for _ in write_parts(run, new, os.path.join(folder, "part-"), parameters, "exported"):
        pass


async def import_results(run: Run, jobs: list[Job]) -> None:
    """Make captions of the answers in files of results."""
    try:
        answers = Answers(run, map(read_file, run.settings.batch_import or ()))
    except OSError as error:
        raise SettingsError(f"--batch-import: {error.filename}: {error.strerror}") from None
    if answers.torn:
        log.warning("--batch-import: lines that are torn or no results: %d", answers.torn)
    check_writable(jobs)
    await handle_all(run, jobs, answers.caption, run.settings.thread_pool)
    run.stop.check()
    if answers.missing:
        said = f"--batch-import: {answers.missing} of {len(jobs)} images have no answer there"
        differ = "prompt, model, style or images are not those of the export"
        raise StopRun(said if answers.used else f"{said}; {differ}")


# --------------------------------------------------------------------------------------------- Undo


def restore(kept: str, path: str, journal: Journal, *, dry_run: bool) -> str:
    """Put an original back if nobody changed the file since; return what became of it."""
    try:
        now = hash_file(path) if has_caption(path) else ""
        if now and now not in {entry.caption_sha256 for entry in journal.past(path)}:
            return "changed by you since, left alone"
        if dry_run:
            return "would be restored"
        if now:
            journal.keep(path)
        data = read_file(kept)
        write_whole(path, data)
        shutil.copystat(kept, path)
        digest = hashlib.sha256(data).hexdigest()
        made = [entry for entry in journal.past(path)[:-1] if entry.caption_sha256 == digest]
        if made:  # the last line of a file says what it was made with
            journal.append(path, dataclasses.replace(made[-1], usd=0.0))
    except OSError as error:
        return f"not restored: {error.strerror}"
    return "restored"


def undo_below(folder: Path, *, dry_run: bool) -> bool:
    """Put back what a run kept; return whether all could be."""
    root = folder.parent.parent
    journal, states = Journal(root, kept=UNDONE), Counter[str]()
    if not dry_run:
        journal.open()
    with contextlib.closing(journal):
        for kept in sorted(path for path in folder.rglob("*~") if path.is_file()):
            path = os.path.join(root, kept.relative_to(folder)).removesuffix("~")
            state = restore(str(kept), path, journal, dry_run=dry_run)
            states[state.partition(":")[0]] += 1
            say(f"{path}: {state}")
    if not dry_run and not states["not restored"]:
        name = folder.name.replace(KEPT, RESTORED).removesuffix(OPEN)
        folder = folder.rename(folder.with_name(name))
    counted = ", ".join(f"{number:,} {state}" for state, number in states.items())
    say(f"{counted or 'Nothing to restore'}. The originals are in {folder}")
    return not states["not restored"]


# ----------------------------------------------------------------------------------------- Commands

CAPTIONING = ("batch", "batch_export", "batch_import")
COMMANDS = (*CAPTIONING, "fix_encoding", "review", "undo")
ONLY_FOR = {  # commands that a flag says something to; "" is captioning one by one
    "local": ("",),
    "limit": ("", *CAPTIONING),
    "overwrite": ("", *CAPTIONING),
    "report": ("", *CAPTIONING, "fix_encoding", "review"),
    "encoding": ("fix_encoding",),
}


def choose_command(settings: Settings) -> str:
    """Return the command, blank for captioning one by one. Raises SettingsError."""
    chosen = [name for name in COMMANDS if getattr(settings, name)]
    if len(chosen) > 1:
        raise SettingsError(f"{' and '.join(map(flag_of, chosen))}: take one of them")
    command = chosen[0] if chosen else ""
    for name, commands in ONLY_FOR.items():
        if getattr(settings, name) and command not in commands:
            other = flag_of(command) if command else "captioning"
            raise SettingsError(f"{flag_of(name)}: says nothing to {other}; leave it out")
    return command


def report_on(settings: Settings, bill: Bill | None, work: Callable[[Report], None]) -> int:
    """Do the work of a command, print its summary, and return the exit code."""
    with open_report(settings.report) as stream:
        report = Report(stream, bill)
        try:
            work(report)
        except StopRun as cause:
            report.ended_by = cause
            log.error("%s", cause)  # noqa: TRY400
        except KeyboardInterrupt as error:
            report.ended_by = signal.Signals(error.args[0])
        ignore_signals()  # all that is left is to say what was done
        report.close()
        with contextlib.suppress(OSError):  # nobody reads it
            print(report.summary(), file=sys.stderr)
    return report.exit_code


def record_done(plan: Iterable[Job | Outcome], report: Report) -> bool:
    """Record a plan in which nothing is to be done; return False where something is."""
    outcomes = Counter[Outcome]()
    for item in plan:
        if isinstance(item, Job):
            return False
        # 100,000 paths that nobody reads are heavy
        is_read = report.stream or item.kind == "failed"
        outcomes[item if is_read else item._replace(path="", caption="")] += 1
    for outcome in outcomes.elements():
        report.record(outcome)
    return True


def caption_all(run: Run, command: str) -> None:
    """Caption the images of a run whose journal is locked."""
    import asyncio

    parts = load_parts(run.journal)
    jobs = collect_jobs(run, plan_run(run, waiting_images(parts)))
    run.report.left, engine = len(jobs), None
    with contextlib.ExitStack() as stack, contextlib.suppress(asyncio.CancelledError):
        if run.settings.local and any(not job.answer for job in jobs):
            opened = stack.enter_context(open_engine(run.settings, run.recipe.prompt))
            run, engine = dataclasses.replace(run, settings=opened[0]), opened[1]
        works: dict[str, Callable[[], Awaitable[None]]] = {
            "": lambda: caption_images(run, jobs, engine),
            "batch": lambda: send_batches(run, jobs, parts),
            "batch_export": lambda: export_lines(run, jobs),
            "batch_import": lambda: import_results(run, jobs),
        }
        asyncio.run(carry_out(run, works[command]))


def run_captions(settings: Settings, command: str) -> int:
    """Caption what has no caption yet, or with --overwrite what is out of date."""
    image_dir = check_folders(settings)
    journal = Journal(settings.caption_dir or image_dir)
    recipe = read_recipe(settings)
    bill = Bill(settings)
    if settings.max_cost and not bill.has_price:
        said = f"the price of {settings.model} at {settings.host} is not known"
        raise SettingsError(f"--max-cost: {said}; --price IN/OUT says it")

    def work(report: Report) -> None:
        run = Run(settings, image_dir, recipe, journal, report, bill, Stop())
        if not settings.overwrite:
            report.outdated = journal.count_outdated(recipe)
        parts = load_parts(journal)
        plan = plan_run(run, waiting_images(parts))
        if settings.dry_run:
            show_plan(run, plan)
            return
        is_waiting = bool(settings.batch and parts)
        if not is_waiting and record_done(plan, report):
            return
        if command in {"", "batch"}:
            check_key(settings)
        log_findings(run)
        with contextlib.closing(journal):
            journal.open()
            caption_all(run, command)

    return report_on(settings, bill, work)


def show_plan(run: Run, plan: Iterable[Job | Outcome]) -> None:
    """Print what a run would do, and what it would cost; of images only the headers are read."""
    load_pillow()
    log_findings(run)
    settings, recipe, record = run.settings, run.recipe, run.report.record
    most = math.inf if settings.log_level == "debug" else 3
    total, asked, examples = Usage(), 0, list[str]()
    for item in plan:
        if isinstance(item, Outcome):
            record(item)
            continue
        how = "to update" if item.replaces else "to caption"
        try:
            if item.answer:
                how += " at no cost"
            else:
                total += expect(settings, recipe, item)
                asked += 1
        except FailImage as error:
            record(Outcome(item.image, "failed", error.reason, error.detail))
            continue
        record(Outcome(item.image, "planned", how, caption=item.caption))
        if len(examples) < most:
            examples.append(f"{item.image} -> {item.caption}")
    for example in examples:
        say(example)
    if more := run.report.counts["planned"].total() - len(examples):
        say(f"and {more:,} more; -v lists all")
    for line in recipe.lines:
        say(line)
    if settings.log_level == "debug":
        print(recipe.prompt)
    if asked:
        twice = "; an answer with an excluded word is asked for once more" if recipe.exclude else ""
        say(describe_cost(settings, asked, total) + twice)


def write_page(page: str, title: str, samples: Sequence[Sample]) -> None:
    """Write the page of a set. Raises SettingsError."""
    path = os.path.realpath(page)

    def is_ours() -> bool:
        return not os.path.exists(path) or read_file(path)[: len(PAGE_MARK)] in {b"", PAGE_MARK}

    try:
        if write_whole(path, build_page(title, samples, os.path.dirname(path)), is_ours):
            return
        said = "is no page of this tool; name another file"
    except OSError as error:
        said = f"cannot be written: {error.strerror}"
    raise SettingsError(f"--review: {page}: {said}")


def run_review(settings: Settings) -> int:
    """Say what is wrong with a set, and show it on a page; return the exit code."""
    image_dir, recipe = check_folders(settings), read_recipe(settings)
    samples = review_set(settings, image_dir, recipe)
    if not samples:
        raise SettingsError(f"--image-dir: {image_dir}: no images there or below")
    findings = [finding for sample in samples for finding in sample.findings]
    with open_report(settings.report) as stream:
        for finding in findings if stream else ():
            gravity = GRAVITIES[FINDINGS.get(finding.kind, OTHER_FINDING)[0]][0]
            values = {"outcome": "finding", "gravity": gravity, **finding._asdict()}
            print(json.dumps(values), file=stream)
    show = log.debug if settings.report == "-" else say
    for line in (*describe_findings(findings), describe_verdict(findings)):
        show(line)
    if not settings.dry_run:
        page = str((settings.caption_dir or image_dir) / "review.html")
        page = page if settings.review is True else str(settings.review)
        write_page(page, image_dir.resolve().name, samples)
        show(f"All is shown in {page}")
    return int(any(gravity < MINOR for _, _, gravity, _ in list_kinds(findings)))


def run_undo(settings: Settings) -> int:
    """Put back what the last run replaced; return the exit code."""
    roots = find_roots(settings, "--undo")
    runs = [folder for root in roots for folder in (root / STATE_FOLDER).glob(f"{KEPT}*")]
    last = max((folder.name.removesuffix(OPEN) for folder in runs), default="")
    if not last:
        say("Nothing to restore.")
    undone = [
        undo_below(folder, dry_run=settings.dry_run)
        for folder in runs
        if folder.name.removesuffix(OPEN) == last
    ]
    return int(not all(undone))


def run(settings: Settings) -> int:
    """Carry out what the settings ask for; return the exit code."""
    command = choose_command(settings)
    if command == "undo":
        return run_undo(settings)
    if command == "review":
        return run_review(settings)
    if command == "fix_encoding":
        roots = find_roots(settings, "--fix-encoding")
        return report_on(settings, None, lambda report: run_repair(settings, roots, report))
    return run_captions(settings, command)


# --------------------------------------------------------------------------------------------- Main


class LogFormatter(logging.Formatter):
    """Log lines with time, worker and level, on one line each; in colour on a terminal."""

    def __init__(self, *, has_colour: bool) -> None:
        super().__init__("%(asctime)s %(worker)-9s %(levelname)-7s %(message)s", "%H:%M:%S")
        self._has_colour = has_colour

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line without its traceback."""
        record.worker = name_worker()
        record.message = printable(record.message)
        line = super().formatMessage(record)
        if not self._has_colour or record.levelno < logging.WARNING:
            return line
        red, yellow, plain = "\x1b[31m", "\x1b[33m", "\x1b[0m"
        return f"{red if record.levelno >= logging.ERROR else yellow}{line}{plain}"


def name_worker() -> str:
    """Return the name of the worker that is at work."""
    import asyncio

    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs
        return "main"
    name = task.get_name() if task else "main"
    return name if name.startswith("worker-") else "main"


def set_up_logging(settings: Settings) -> None:
    """Send this tool's log to stderr; libraries keep theirs."""
    handler = logging.StreamHandler(sys.stderr)
    has_colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(LogFormatter(has_colour=has_colour))
    log.handlers, log.propagate = [handler], False
    log.setLevel(settings.log_level.upper())


def drop_output() -> None:
    """Forget what the streams cannot take: Python's own end would fail at it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the one place where errors become exit codes."""
    handle_signals(interrupt)
    code = 2
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.reconfigure(errors="backslashreplace")  # a console may know fewer characters
        # what was closed by who started us (`>&-`) goes nowhere
        sys.stdout, sys.stderr = sys.stdout or StringIO(), sys.stderr or StringIO()
        settings = read_settings(sys.argv[1:] if argv is None else argv)
        set_up_logging(settings)
        code = run(settings)
        print(end="", flush=True)
    except (SettingsError, StopRun) as error:
        lines = map(printable, str(error).split("\n"))
        print("gen-captions: " + "\n".join(lines), file=sys.stderr)
        code = 3 if isinstance(error, StopRun) else 2
    except ModuleNotFoundError as error:
        said = f"{error.name} is not installed; type: pip install -r requirements.txt"
        print(f"gen-captions: {said}", file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has seen enough (`| head`)
        code = 0
    except OSError as error:
        log.log(logging.ERROR, "%s: %s", error.filename or "standard output", error.strerror)
        code = 1
    except KeyboardInterrupt as error:
        code = 128 + int(error.args[0])
    ignore_signals()
    drop_output()
    return code


if __name__ == "__main__":
    sys.exit(main())
