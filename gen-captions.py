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
images failed or --review found faults; 2 wrong usage or settings; 3 stopped
(key, quota, server, disk); 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
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
    from collections.abc import AsyncIterator
    from types import FrameType

    from httpx2 import AsyncClient, Response
    from openai import AsyncOpenAI
    from PIL import Image, ImageFile
    from tenacity import AsyncRetrying, RetryCallState

    Clients = tuple[AsyncOpenAI, AsyncClient]  # the SDK's, and the HTTP client below it

__version__ = "0.2.0"

log = logging.getLogger("gen-captions")

# --------------------------------------------------------------------------------------------- Text


def printable(text: str) -> str:
    """Return the text with control characters escaped, so that no terminal obeys them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, limit: int = 300) -> str:
    """Return the text as one line. A text that is too long loses its middle."""
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
NO_KEY = r"|(?:sk-)?your-(?:api-)?key\S*"  # blank, or the placeholder of an example


class SettingsError(Exception):
    """The settings do not work. Nothing was touched; exit code 2."""


class Reader(NamedTuple):
    """How the text of a setting is read."""

    read: Callable[[str], Any]  # ValueError, TypeError or LookupError means: not allowed
    metavar: str
    allowed: str


def number(low: float, high: float) -> Reader:
    """Return the reader of a number within these bounds. It is whole where `low` is an int."""

    def read(text: str) -> float:
        value = type(low)(text)
        if not low <= value <= high:  # also false for nan
            raise ValueError
        return value

    whole = "whole " if isinstance(low, int) else ""
    return Reader(read, "N", f"a {whole}number from {low:,g} to {high:,.0f}")


def like(pattern: str, metavar: str, allowed: str) -> Reader:
    """Return the reader of a text that fits a pattern. The pattern's group is the value."""

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
    """Return a server's address without the path that each request adds."""
    url = text.rstrip("/").removesuffix("/chat/completions")
    parts = urlsplit(url)
    is_whole = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    # beside @, ? and # there is mostly a key
    if not is_whole or not url.isprintable() or re.search("[@?#]", url):
        raise ValueError
    return url


A_FOLDER = Reader(Path, "FOLDER", "a folder")
A_FILE = like(r"(.+)", "FILE", "a file")
A_PAGE = like(r"(?i)(.+\.html?)", "FILE", "a file whose name ends in .html")
# no caption and no image can have such a name, so none is written over
A_REPORT = like(r"(?i)(-|.+\.jsonl)", "FILE", "a file whose name ends in .jsonl")
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
LOG_LEVELS = ("debug", "info", "warning", "error")


def row(variable: str, help: str, reader: Reader | None, default: Any = None, **more: Any) -> Any:
    """Return the dataclass field of one setting. Its name is its flag.

    `variable` may be blank. A setting without a reader is a switch. `more` is for argparse.
    """
    metadata = {"row": (variable, help, reader, more)}
    return field(default=default, repr=reader is not A_KEY, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a user can set: flags, variables, help, .env.example and docs come from here."""

    image_dir: Path | None = row("", "IMAGES: a folder, with its sub-folders", A_FOLDER)
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
    reasoning_effort: str | None = row("GETCAP_REASONING_EFFORT", "reasoning; else none", A_TEXT)
    temperature: float | None = row("GETCAP_TEMPERATURE", "else the model's own", number(0.0, 2))
    extra_body: dict[str, Any] | None = row("GETCAP_EXTRA_BODY", "JSON for each request", AN_OBJECT)

    max_cost: float | None = row("GETCAP_MAX_COST", "most dollars of a run", number(1e-4, 1e6))
    price: str | None = row("GETCAP_PRICE", "dollars for a million tokens in and out", A_PRICE)
    service_tier: str | None = row(
        "GETCAP_SERVICE_TIER", "flex: half price, slower", one_of("default", "flex")
    )

    thread_pool: int = row("GETCAP_THREAD_POOL", "workers; 10, or 2 for localhost", number(1, 1000))
    throttle_submission_rate: float | None = row(
        "GETCAP_THROTTLE_SUBMISSION_RATE", "most requests a second", number(1e-3, 1e4)
    )
    throttle_retries: int = row("GETCAP_THROTTLE_RETRIES", "retries per image", number(0, 100), 10)
    throttle_backoff_factor: float = row(
        "GETCAP_THROTTLE_BACKOFF_FACTOR", "base of exponential backoff", number(1e-3, 60), 2.0
    )
    timeout: float = row("GETCAP_TIMEOUT", "seconds for an answer; 120, or 900", number(1e-3, 1e5))

    batch: bool = row("", "OpenAI's Batch API: half price, within a day", None, False)
    batch_export: Path | None = row("", "write batch files there, and stop", A_FOLDER)
    batch_import: list[str] | None = row("", "read such files' answers", A_FILE, nargs="+")

    review: str | bool | None = row("", "find faults in captions", A_PAGE, nargs="?", const=True)
    fix_encoding: bool = row("", "make all texts UTF-8, and repair their letters", None, False)
    encoding: str | None = row("", "with --fix-encoding: what the other files are", AN_ENCODING)
    undo: bool = row("", "take the last --overwrite or --fix-encoding back", None, False)

    dry_run: bool = row("", "only say what would be done, and what it costs", None, False)
    report: str | None = row("", "write each outcome as a line of JSON; - is stdout", A_REPORT)
    log_level: str = row("GETCAP_LOG_LEVEL", "log level", one_of(*LOG_LEVELS), "info")

    @property
    def host(self) -> str:
        """The server's name, with its port."""
        return urlsplit(self.base_url).netloc


GROUPS = {  # the titles in --help, each by the first setting below it
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
        flags = ["--help", *(flag_of(row[0]) for row in rows())]
        raise name_unknown(unknown[0].partition("=")[0], flags)
    if unknown:
        said = "only one folder of images can stand alone; a name with blanks needs quotes"
        raise SettingsError(f"{re.sub(KEY_START, '…', unknown[0])}: {said}")
    chosen = vars(found)
    chosen["image_dir"] = chosen.pop("images") or chosen["image_dir"]
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
        elif name or is_broken:  # neither blank nor a comment
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
    caption_sha256: str = ""  # of the file that was written
    answer: str = ""  # past the gate, before cut and trigger: another trigger costs nothing


class Finding(NamedTuple):
    """Something that is wrong with one file."""

    kind: str
    path: str
    detail: str = ""


class Job(NamedTuple):
    """An image and where its caption goes. Paths are text: 100,000 of them are light."""

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
    lines: tuple[str, ...] = ()  # the recipe in words, and where each part comes from


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
    """Nothing more can succeed, so the run ends. Answers that are on their way are kept."""


class FailImage(Exception):  # noqa: N818
    """This image fails. With `retry_after_s`, another try may succeed after that time."""

    def __init__(self, reason: str, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s


# -------------------------------------------------------------------------------------------- Files

# without O_NONBLOCK, opening a pipe waits for its writer; Windows has no such flag
READ_ONLY = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
BLANKS = b" \t\r\n\v\f\0\xef\xbb\xbf"  # with the BOM, and the NUL bytes that a crash can leave
LARGEST_FILE = 256 << 20
LOCKED_BYTE = (1 << 31) - 2  # behind the end of any journal; the last that msvcrt can lock


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that stand for these values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_file(path: str) -> bytes:
    """Return a file's bytes. Raises OSError, also for a pipe, a device and a giant file."""
    with FileIO(os.open(path, READ_ONLY)) as file:  # with fewer system calls than open()
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
    except (FileNotFoundError, NotADirectoryError):
        return False
    with FileIO(handle):  # it closes the handle
        start = os.read(handle, 4096)  # takes half the time of reading all
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

            os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)  # a locked byte cannot be read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # on Windows the latter
        os.close(handle)
        raise StopRun(f"{path}: another run is at work there; wait for its end") from None
    except OSError:
        log.debug("%s: cannot be locked", path)  # some network folders have no locks
    return handle


def follow_link(path: str) -> str:
    """Return a path, or the one that a link there leads to."""
    return os.path.realpath(path) if os.path.islink(path) else path


def temporary_of(path: str) -> str:
    """Return the name under which a file is written first. Trainers pass over such names."""
    folder, name = os.path.split(follow_link(path))
    return os.path.join(folder, f".gc-{fingerprint(os.fsencode(name).hex())}")


def write_whole(
    path: str, data: bytes, may_replace: Callable[[], bool] = lambda: True, *, sync: bool = True
) -> bool:
    """Write a file, or what a link names, whole or not at all. Raises OSError.

    Returns False, and changes nothing, where it may not replace the file. With `sync` the bytes
    are on the disk first. The file's permissions stay; a new file gets the ordinary ones.
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
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(temporary, path)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


# ------------------------------------------------------------------------------------------ Journal

STATE_FOLDER = ".gen-captions"  # trainers pass over it
KEPT, UNDONE, RESTORED = "replaced-", "undone-", "restored-"  # folders of originals
OPEN = ".open"  # ends the name of such a folder until its run has ended
STARTED = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")  # in the names of such folders


def parse_entry(line: bytes) -> tuple[str, Entry] | None:
    """Return the file and the entry of a journal's line, None for a torn one."""
    try:
        found = json.loads(line)
        values = {item.name: found[item.name] for item in dataclasses.fields(Entry)}
        return str(found["file"]), Entry(**values)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


class Journal:
    """What was asked, paid for and written, as lines of JSON. It knows which files are ours."""

    def __init__(self, root: str | Path, kept: str = KEPT) -> None:
        self._root = str(root)
        self.folder = os.path.join(root, STATE_FOLDER)
        self.path = os.path.join(self.folder, "journal.jsonl")
        self.batch_folder = os.path.join(self.folder, "batch")  # of the parts that wait
        self._kept = kept
        self._kept_folder = ""
        self._handle = -1
        self._made: list[Path] = []  # folders, the deepest first
        self._lock = threading.Lock()

    @functools.cached_property
    def history(self) -> dict[str, list[Entry]]:
        """The entries of each file, oldest first. Raises SettingsError."""
        found: dict[str, list[Entry]] = defaultdict(list)
        for file, entry in self._entries():
            found[file].append(entry)
        return found

    def past(self, path: str) -> Sequence[Entry]:
        """Return what is known of a file, oldest first."""
        return self.history.get(name_below(self._root, path), ())

    def count_outdated(self, recipe: Recipe) -> Counter[str]:
        """Return how many captions of ours another prompt or trigger made, by which."""
        made: dict[str, tuple[str, str]] = {}  # not `history`: 100,000 answers are heavy
        for file, entry in self._entries():
            if entry.outcome == "captioned" and file.endswith(f".{recipe.caption_ext}"):
                which = "" if entry.recipe == recipe.identity else "another prompt"
                if entry.trigger != recipe.trigger:
                    which = f"trigger {entry.trigger or 'none'} (now {recipe.trigger or 'none'})"
                made[os.path.join(self._root, file)] = which, entry.caption_sha256
        outdated = {path: found for path, found in made.items() if found[0]}
        return Counter(which for path, (which, sha) in outdated.items() if is_file_with(path, sha))

    def open(self) -> None:
        """Get ready to write. Raises StopRun where another run writes, or nobody can."""
        try:
            place = Path(self.folder).absolute()
            self._made = [path for path in (place, *place.parents) if not path.is_dir()]
            os.makedirs(self.folder, exist_ok=True)
            self._handle = open_locked(self.path)
            # this run goes on in the folder of a killed one, so that one --undo takes both back
            killed = Path(self.folder).glob(f"{self._kept}*{OPEN}")
            new = os.path.join(self.folder, f"{self._kept}{STARTED}{OPEN}")
            self._kept_folder = str(next(killed, new))
            self.__dict__.pop("history", None)  # another run may have written meanwhile
        except OSError as error:
            said = f"{self.folder}: cannot be written: {error.strerror}; nothing was asked"
            raise StopRun(said) from error

    def append(self, path: str, entry: Entry, **more: Any) -> None:
        """Write one entry to the disk, with `more` for people who read it. Raises OSError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        values = {"time": now, "file": name_below(self._root, path), **more}
        # the line break comes first, so that a line torn by a crash does not spoil this one
        data = b"\n" + json.dumps(values | dataclasses.asdict(entry)).encode()
        with self._lock:
            while data:  # a disk that gets full takes only a part
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)

    def write(self, path: str, data: bytes, entry: Entry, replaces: str = "", **more: Any) -> bool:
        """Write a file's journal line, then the file, whole. Raises OSError.

        It may replace a blank file, or the one with the SHA-256 `replaces`, which is kept. Any
        other file is left alone; returns False. A new file is not synced: its line has its text.
        """
        digest = hashlib.sha256(data).hexdigest()

        def may_replace() -> bool:
            # a kill from here on leaves the line and the temporary file, and Plan finds both
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
        """Give a file that will be replaced a second name, else copy it. Raises OSError."""
        # no *.txt finds a name with "~"
        kept = os.path.join(self._kept_folder, name_below(self._root, path) + "~")
        if os.path.exists(kept):  # a killed run has kept the original
            if hash_file(path) in {entry.caption_sha256 for entry in self.past(path)}:
                return
            os.replace(kept, f"{kept}.older")  # somebody changed the file since
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
        with contextlib.suppress(OSError):  # it is not there where nothing was kept
            os.rename(self._kept_folder, self._kept_folder.removesuffix(OPEN))
        is_empty = not os.fstat(self._handle).st_size
        with contextlib.suppress(OSError):
            if is_empty:
                os.unlink(self.path)
                for folder in self._made:
                    os.rmdir(folder)
        os.close(self._handle)
        self._handle = -1

    def _entries(self) -> Iterator[tuple[str, Entry]]:
        try:
            with open(os.open(self.path, READ_ONLY), "rb") as lines:
                yield from filter(None, map(parse_entry, lines))
        except FileNotFoundError:
            return
        except OSError as error:
            raise SettingsError(f"{self.path}: cannot be read: {error.strerror}") from None


# --------------------------------------------------------------------------------------------- Plan

KINDS = {  # of files, by how their names end; the first that fits counts
    "mask": ("-masklabel.png",),  # OneTrainer's, of the image beside it
    "image": IMAGE_SUFFIXES,
    "video": (".mp4", ".avi", ".mov", ".webm", ".mkv", ".wmv", ".m4v", ".flv"),
    "other format": (".jpe", ".jp2", ".jxl", ".tga", ".psd", ".svg"),
}


def caption_key(image: str) -> str:
    """Return what is the same for two images of a folder that would share a caption file."""
    # Windows and macOS pass over letter case, and macOS decomposes names
    return unicodedata.normalize("NFC", os.path.splitext(image)[0]).casefold()


def walk_folders(
    root: str, trouble: list[OSError], seen: set[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder that is not in `seen`, links followed, with its visible files, sorted."""
    for folder, folders, names in os.walk(root, onerror=trouble.append, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        # as ai-toolkit does: toolkit/data_loader.py
        folders[:] = [name for name in folders if name[0] != "." and name != "_controls"]
        # real folders before links, so that an image goes by its name without a link
        folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        yield folder, sorted(name for name in names if name[0] != ".")


def walk_images(image_dir: Path, caption_dir: Path | None, ext: str) -> Iterator[Job | Outcome]:
    """Yield each image below a folder, sorted, or why it gets no caption."""
    root, trouble = str(image_dir), list[OSError]()
    for folder, names in walk_folders(root, trouble, set()):
        target = os.path.join(caption_dir or root, name_below(root, os.path.join(folder, "")))
        images: list[str] = []
        for name in names:
            fitting = (kind for kind, ends in KINDS.items() if name.lower().endswith(ends))
            kind = next(fitting, "")
            if kind == "image":
                images.append(name)
            elif kind:
                yield Outcome(os.path.join(folder, name), "skipped", kind)
        keys = sorted(map(caption_key, images))
        shared = {key for key, other in itertools.pairwise(keys) if key == other}
        for name in images:
            path = os.path.join(folder, name)
            caption = f"{target}{os.path.splitext(name)[0]}.{ext}"
            if caption_key(name) in shared:
                said = f"another image would use {caption} too; rename one of them"
                yield Outcome(path, "failed", "shared caption file", said)
            else:
                yield Job(path, caption)
    for problem in trouble:
        said = f"{problem.strerror}; check its permissions"
        yield Outcome(str(problem.filename), "failed", "unreadable folder", said)


def find_known(job: Job, journal: Journal, recipe: Recipe) -> list[Entry]:
    """Return the entries for this very image and this recipe, oldest first."""
    past = [entry for entry in journal.past(job.caption) if entry.recipe == recipe.identity]
    return [entry for entry in past if is_file_with(job.image, entry.image_sha256)]


def judge_caption_file(job: Job, journal: Journal, recipe: Recipe) -> Job | Outcome:
    """Decide with --overwrite what to do about an image that has a caption."""
    image, caption = job.image, job.caption
    past = [entry for entry in journal.past(caption) if entry.outcome == "captioned"]
    ours = (entry for entry in reversed(past) if is_file_with(caption, entry.caption_sha256))
    entry = next(ours, None)
    if entry is None:
        why = "changed by you" if past else "not made by gen-captions"
        return Outcome(image, "skipped", why, caption=caption)
    known = find_known(job, journal, recipe)
    is_current = entry in known
    if is_current and entry.trigger == recipe.trigger:
        return Outcome(image, "skipped", "up to date", caption=caption)
    last = {item.outcome: item for item in known}
    if "refused" in last and not is_current:  # the caption that is there is better than none
        return Outcome(image, "skipped", "refused before", caption=caption)
    # an answer to this prompt, from before another prompt or before a crash, is paid for
    answered = entry if is_current else last.get("captioned")
    return Job(image, caption, entry, answered.answer if answered else "")


def judge_job(job: Job, journal: Journal, recipe: Recipe, *, overwrite: bool) -> Job | Outcome:
    """Decide what to do about an image, by its caption and the journal."""
    image, caption = job.image, job.caption
    try:
        is_there = has_caption(caption)
    except OSError as error:
        return Outcome(image, "failed", "unreadable caption", f"{caption}: {error.strerror}")
    if is_there and overwrite:
        return judge_caption_file(job, journal, recipe)
    if is_there:
        return Outcome(image, "skipped", "has a caption", caption=caption)
    last = {entry.outcome: entry for entry in find_known(job, journal, recipe)}
    if "refused" in last:
        said = "with these settings; caption it by hand, or change model or prompt"
        return Outcome(image, "failed", "refused before", said)
    # a crash leaves a blank file or a temporary one, and the answer is paid for; without either,
    # somebody deleted the caption to have it made anew
    entry = last.get("captioned", Entry())
    is_left = is_file_with(temporary_of(caption), entry.caption_sha256)
    was_lost = is_left or os.path.exists(caption)
    return Job(image, caption, answer=entry.answer if was_lost else "")


def check_folder(flag: str, path: Path) -> None:
    """Raise a SettingsError where no folder is."""
    if not path.is_dir():
        why = "is no folder" if os.path.lexists(path) else "there is no such folder"
        raise SettingsError(f"{flag}: {path}: {why}")


def check_folders(settings: Settings) -> Path:
    """Return the image folder. Raises SettingsError where a setting names no folder."""
    if settings.image_dir is None:
        raise SettingsError(
            "Which images? Type: gen-captions ./images (or gen-captions --review ./images)\n"
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

MEDIUM = " End with the medium, such as photo, drawing or 3D render."
PROMPTS = {
    "prose": f"""\
Write one caption for this image, for training an image generator: plain English prose, one \
paragraph, at most {{words}} words, fewer for a simple image.
Start with the main subject and its action. Continue with clothing or materials and their \
colours, other objects, where things are, the setting, the lighting, the shot type and camera \
angle.{MEDIUM}
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
# what it was trained on: https://github.com/fpgaminer/joycaption
JOYCAPTION_PROMPT = "Write a long descriptive caption for this image in a formal tone."
USUAL_WORDS = {"prose": 90, "short": 35, "tags": 60}  # only asked for; --max-words also cuts
UNSAID = "Leave these unsaid, they are already known: {exclude}."
PLACEHOLDER = r"\{(name|folder|caption|exclude)\}"  # other braces stay as they are
TRAINERS_MARK = "[trigger]"  # ai-toolkit fills it in, or deletes it where no trigger is set
JOB_SUFFIXES = (".yaml", ".yml", ".json", ".jsonc")
# "job:" begins a line, perhaps behind a BOM, or follows a brace or a comma, perhaps in quotes
IS_JOB = rb"(?m)^[^\w\s#-]*job[\"']?\s*:|[{,\"]\s*job\"?\s*:"
# of JSON; strings are found too, so that what looks like a comment in them stays
COMMENT = r'(?s)("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/'


def build_prompt(style: str, max_words: int | None, exclude: Sequence[str], own: str) -> str:
    """Return the prompt with its placeholders: the user's own, else the style's."""
    if own:
        rules = [f"Use at most {max_words} words."] if max_words else []
        rules += [UNSAID] if exclude and "{exclude}" not in own else []
        return "\n".join([own, *rules])
    prompt = PROMPTS[style].replace("{words}", str(max_words or USUAL_WORDS[style]))
    if exclude:  # perhaps the medium too
        prompt = prompt.replace(MEDIUM, "").replace("\nOutput", f"\n{UNSAID}\nOutput")
    return prompt


class Dataset(NamedTuple):
    """One dataset of an ai-toolkit job file, as the trainer reads it."""

    file: str
    folder: str  # blank for a process without datasets
    trigger: str
    caption_ext: str
    is_reg: bool
    architecture: str  # of the model that is trained


def read_job(config: Mapping[str, Any], file: str) -> Iterator[Dataset]:
    """Yield the datasets of a job, with ai-toolkit's defaults (toolkit/config_modules.py)."""

    def text(key: str, *values: Any) -> str:
        value = next((value for value in values if value is not None), "")
        if not isinstance(value, str):
            raise SettingsError(f"{file}: {key}: YAML reads it as {value!r}; put it in quotes")
        return value.replace("[name]", str(config.get("name")))

    for process in config["process"]:
        model = process.get("model") or {}
        for found in process.get("datasets") or [{}]:
            folder = text("folder_path", found.get("dataset_path"), found.get("folder_path"))
            trigger = text("trigger_word", found.get("trigger_word"), process.get("trigger_word"))
            yield Dataset(
                file=file,
                folder=folder and os.path.realpath(os.path.expandvars(folder)),
                trigger=trigger.strip(),
                caption_ext=text("caption_ext", found.get("caption_ext")).lstrip(".") or "txt",
                is_reg=found.get("is_reg") is True,
                architecture=f"{model.get('arch') or ''} {model.get('name_or_path') or ''}".strip(),
            )


def read_job_file(path: Path) -> list[Dataset]:
    """Return the datasets of a job file, none of another file. Raises SettingsError."""
    # other files may be broken, or take seconds to parse; UTF-16 has a NUL beside each letter
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
        return list(read_job(found["config"], str(path)))
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = mark.line + 1 if mark else getattr(e, "lineno", 0)
        where = f"{path}, line {line}" if line else str(path)
        said = shorten(f"{type(e).__name__}: {getattr(e, 'problem', None) or e}", 200)
        raise SettingsError(f"{where}: this job file cannot be read: {said}") from None


def read_datasets(place: Path) -> list[Dataset]:
    """Return the datasets of the job files in a folder, or of one file. Raises SettingsError."""
    # not those in sub-folders: ai-toolkit's own has dozens of examples
    found = [place] if place.is_file() else sorted(place.iterdir())
    paths = [path for path in found if path.suffix.lower() in JOB_SUFFIXES and path.is_file()]
    datasets = [item for path in paths for item in read_job_file(path)]
    if place.is_file() and not datasets:
        raise SettingsError(f"--config-dir: {place}: is no ai-toolkit job file")
    return datasets


def decide_trigger(
    word: str | None, matching: Sequence[Dataset], datasets: Sequence[Dataset]
) -> tuple[str, str, str]:
    """Return what opens the captions, the word that it stands for, and where it comes from."""
    if matching and all(item.is_reg for item in matching):  # the trainer takes triggers out there
        return "", "", f"{matching[0].file} says that this is a regularisation set (is_reg)"
    if word:
        return word, "" if word == TRAINERS_MARK else word, "--trigger or GETCAP_TRIGGER"
    for item in matching or datasets:
        if item.trigger and not item.is_reg:
            return TRAINERS_MARK, item.trigger, f"{item.file}, trigger_word {item.trigger}"
    return "", "", "--trigger WORD sets one"


def decide_extension(settings: Settings, matching: Sequence[Dataset]) -> tuple[str, str]:
    """Return the extension of the captions and where it comes from. Raises SettingsError."""
    if settings.caption_ext:
        return settings.caption_ext, "--caption-ext or GETCAP_CAPTION_EXT"
    for item in matching:
        if not (settings.review and item.caption_ext == "json"):  # find_unread names that
            ext = read_value(f"{item.file}: caption_ext", AN_EXTENSION, item.caption_ext)
            return ext, item.file
    return "txt", "the default"


def find_unread(settings: Settings, ext: str, matching: Sequence[Dataset]) -> Iterator[Finding]:
    """Yield why the trainer would not read the captions as they are."""
    caption_dir, image_dir = settings.caption_dir, settings.image_dir or ""
    is_elsewhere = caption_dir and os.path.realpath(caption_dir) != os.path.realpath(image_dir)
    for item in matching:
        if is_elsewhere:
            said = "the trainer looks beside the images; leave --caption-dir out"
            yield Finding("captions elsewhere", item.file, said)
        if item.caption_ext == "json":
            said = "the trainer takes each .json file whole; this tool does not look at those"
            yield Finding("captions in JSON", item.file, said)
        elif item.caption_ext != ext:
            said = f"the trainer reads captions that end in {item.caption_ext}"
            yield Finding("extension not read", item.file, said)


def read_own(folder: Path | None, name: str) -> str:
    """Return the text of a file in the config folder, blank when there is none."""
    return read_text(folder / name).strip() if folder and (folder / name).exists() else ""


def choose_prompt(settings: Settings, folder: Path | None) -> tuple[str, str]:
    """Return the prompt and where it comes from. It is blank for the built-in one."""
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
    datasets = read_datasets(place) if place else []
    places = {os.path.realpath(path) for path in (settings.image_dir, settings.caption_dir) if path}
    matching = [item for item in datasets if item.folder in places]
    trigger, word, trigger_source = decide_trigger(settings.trigger, matching, datasets)
    ext, ext_source = decide_extension(settings, matching)
    own, prompt_source = choose_prompt(settings, folder)
    if "{trigger}" in own:
        said = "the model is not told the trigger, it is put in front of each caption"
        raise SettingsError(f"{prompt_source}: take {{trigger}} out; {said}")
    terms = re.split(r"[,\n]", read_own(folder, "exclude.txt"))
    exclude = tuple(filter(None, (" ".join(term.split()) for term in terms)))
    prompt = build_prompt(settings.style, settings.max_words, exclude, own)
    words = f", at most {settings.max_words} words" if settings.max_words else ""
    lines = [
        f"Model: {settings.model} at {settings.host}",
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
        architecture=matching[0].architecture if matching else "",
        # a job file may name one folder several times, for several resolutions
        findings=tuple(dict.fromkeys(find_unread(settings, ext, matching))),
        lines=tuple(lines),
    )


# ------------------------------------------------------------------------------------------- Pixels

JPEG_QUALITY = 90
LEAST_SIDE = 32  # Qwen-VL servers fail on less: https://github.com/ollama/ollama/issues/13113
MOST_PIXELS = 90_000_000  # they must fit in memory; a JPEG may have twice as many: it shrinks early
# no video, and no EPS, which runs another program
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
ORIENTATION = 0x0112  # of EXIF
# EXIF orientation: Image.Transpose; ImageOps.exif_transpose fails where another tag is broken
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
Size = tuple[int, int]


def load_pillow() -> None:
    """Import Pillow and its formats before threads need them; HEIC where it is installed."""
    from PIL import Image, PngImagePlugin

    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # open_image has its own limit
    PngImagePlugin.MAX_TEXT_CHUNK = LARGEST_FILE  # profiles and prompts may be over 1 MB
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
    """Raise a FailImage for any error of a decoder."""
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
        file.seek(4)
        said = "it is empty, cut short, or in a format that is not read; save it as JPEG"
        if file.read(4) == b"ftyp":  # an iPhone's HEIC begins so
            said = "HEIC needs the package pillow-heif; better save it as JPEG: trainers read that"
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


def fit(size: Size, max_side: int) -> Size:
    """Return a size shrunk to its longest side, but with no side below LEAST_SIDE."""
    scale = min(1.0, max_side / max(size))
    width, height = (max(LEAST_SIDE, round(side * scale)) for side in size)
    return width, height


def is_ready(image: ImageFile.ImageFile, data: bytes, max_side: int) -> bool:
    """Return whether a file is an upright RGB JPEG that fits and is not cut short."""
    is_plain = (image.format, image.mode, read_orientation(image)) == ("JPEG", "RGB", 1)
    # phones write more behind the end mark, and thumbnails with one of their own before the pixels
    start = max(image.fp.tell() if image.fp else 0, len(data) - 1024)
    return is_plain and fit(image.size, max_side) == image.size and b"\xff\xd9" in data[start:]


@name_damage()
def prepare_image(data: bytes, max_side: int) -> tuple[bytes, Size]:
    """Return an image as an upright RGB JPEG that fits, and its size. Raises FailImage."""
    from PIL import Image

    image = open_image(BytesIO(data))
    if is_ready(image, data, max_side):
        return data, image.size
    # a JPEG is decoded at 1/2, 1/4 or 1/8 where that is at most 1/32 too small: 4032 x 3024
    # becomes 1008 x 756, as many patches of 32 pixels as 1024 x 768 (benchmarks/README.md)
    image.draft("RGB", fit(image.size, max_side - max_side // 32))
    image.decodermaxblock = len(data)  # in one block: after each, it waits for other threads
    image.load()  # a TIFF turns itself upright here and forgets its orientation
    turn = TURNS.get(read_orientation(image))
    # a gap of 1.5 looks like none, and is quicker where nothing was drafted
    size = fit(image.size, max_side)
    small = to_rgb(image).resize(size, Image.Resampling.LANCZOS, reducing_gap=1.5)
    if turn is not None:
        small = small.transpose(Image.Transpose(turn))
    output = BytesIO()
    small.save(output, "JPEG", quality=JPEG_QUALITY)
    return output.getvalue(), small.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as trainers see it: transparent pixels in their hidden colour."""
    if image.mode.startswith("I"):  # 16 bits: Pillow would make 255 of all that is larger
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


# -------------------------------------------------------------------------------- Trigger and style

SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\b(?:Mr|Ms|Dr|St))[.!?][\"”’')]*(?:\s+(?=[\"“(]?[A-Z0-9])|\Z)|[。！？]"
)
TAG_END = re.compile(r",\s*|\Z")


def tidy_tags(text: str) -> str:
    """Return tags as trainers read them: lower case, each once, with spaces for underscores."""
    plain = text.lower().replace("_", " ")
    tags = (" ".join(tag.strip(" .").split()) for tag in re.split(r"[,;，、\n]", plain))
    return ", ".join(dict.fromkeys(filter(None, tags)))


def cut_caption(text: str, style: str, most: float = math.inf) -> str:
    """Return the whole sentences, or tags, in the first `most` words; blank where none is whole."""
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
    """Find the trigger at the start of a text; the group is the punctuation behind it."""
    word = re.escape(recipe.trigger_word).replace("_", "[_ ]")
    spelt = r"\[ ?(?:trigger|name) ?\]" + (f"|{word}" if word else "")
    return re.match(rf"(?i)[\"“*]*(?:{spelt})(?!\w|['’]s\b)([\"”*\s,.:;–-]*)", text)


def place_trigger(text: str, recipe: Recipe) -> str:
    """Return the text with the trigger in front, once; blank where there is nothing else."""
    # the model is not told the word, but the user's own prompt may have it
    opening, is_tags = find_opening(text, recipe), recipe.style == "tags"
    bare = text[opening.end() :] if opening else text
    if not recipe.trigger or not bare:
        return bare[:1].upper() + bare[1:] if opening and not is_tags else bare
    if not is_tags and re.match("(?:An?|The|Two|Three) ", bare):
        bare = bare[0].lower() + bare[1:]
    # "ohwx stands", but "ohwx, a man"; no comma where ai-toolkit may delete its mark
    is_joined = recipe.trigger == TRAINERS_MARK or (opening and not opening[1].strip())
    return f"{recipe.trigger}{' ' if is_joined and not is_tags else ', '}{bare}"


def finish_caption(answer: str, recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """Return the caption made of an answer, and notes about it. Raises FailImage."""
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

Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request: an answer or an error."""

    status: int = 200  # 0: nothing came back
    content: str = ""
    finish_reason: str = ""
    has_reasoning: bool = False
    usage: Usage | None = None  # None: the server did not count
    tier: str = ""  # the service tier that it was billed as
    error: str = ""  # for people; blank for an answer
    raw: str = ""  # the body of an error, for rules
    retry_after_s: float = 0.0
    is_free: bool = False  # nobody bills it


def first_parameters(settings: Settings) -> Parameters:
    """Return the parameters of a request, as long as the server rejects none."""
    # else each image is written to a prompt cache, which costs more and which nobody reads:
    # https://developers.openai.com/api/docs/guides/prompt-caching
    is_new = re.match(r"gpt-(?:5\.[6-9]|[6-9]|\d\d)", settings.model)
    has_cache = is_new and f".{settings.host}".endswith(".api.openai.com")
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
    # the image is joined in: dumping it takes twice as long
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
    """Return the tokens that a server counts, None where the counts are missing or absurd."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    prompt, answer, total = (dig(found, name) for name in names)
    for count in (prompt, answer):
        if not isinstance(count, int | float) or not 0 <= count < 10**9:
            return None
    if isinstance(total, int | float) and total < 10**9:
        answer = max(answer, total - prompt)  # some bill thoughts and count them only here
    return Usage(int(prompt), int(answer)) if prompt else None


def parse_body(text: str) -> Any:
    """Return the JSON of a body, None when there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    # some servers stream though nobody asked: join the events to one completion
    content, finish, error, usage = "", None, None, None
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line.removeprefix("data:"))
            delta = dig(event, "choices", 0, "delta", "content")
            content += delta if isinstance(delta, str) else ""
            finish = dig(event, "choices", 0, "finish_reason") or finish
            error = dig(event, "error") or error
            usage = dig(event, "usage") or usage
    if not finish and not error:  # cut short
        return None
    choice = {"message": {"content": content}, "finish_reason": finish}
    return {"choices": [choice], "error": error, "usage": usage}


def read_answer(body: Any) -> Reply | None:
    """Return the answer that a completion holds, None where there is none."""
    message, finish = dig(body, "choices", 0, "message"), dig(body, "choices", 0, "finish_reason")
    if not isinstance(message, dict) and not finish:
        return None
    content, refusal = dig(message, "content"), dig(message, "refusal")
    # some answer in parts: thoughts, then text
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [dig(part, "text") for part in parts if dig(part, "type") == "text"]
    thoughts = (  # Ollama and vLLM; LM Studio and llama.cpp; OpenAI
        dig(message, "reasoning")
        or dig(message, "reasoning_content")
        or dig(body, "usage", "completion_tokens_details", "reasoning_tokens")
    )
    return Reply(
        content=str(refusal or "".join(text for text in texts if isinstance(text, str))),
        finish_reason="refusal" if refusal else str(finish or ""),
        has_reasoning=bool(thoughts) or len(texts) < len(parts),
        usage=read_usage(dig(body, "usage")),
        tier=str(dig(body, "service_tier") or "")[:40],
    )


def parse_reply(
    status: int, text: str, headers: Mapping[str, str] = {}, now_s: float = 0.0
) -> Reply:
    """Return what came back, answer or error; `now_s` is the time as an epoch."""
    body = parse_body(text)
    named = dig(body, "choices", 0, "error") or dig(body, "error") or dig(body, 0, "error")
    answer = read_answer(body)
    if answer and not named and 200 <= status < 300:
        return answer
    raw, usage = text[:4000], read_usage(dig(body, "usage"))
    words = describe_error(raw)
    # a gateway may give up while the model goes on, and is billed
    is_free = not usage and (400 <= status < 502 or status == 503)
    code = str(dig(named, "code"))
    if status == 200 and code.isdecimal() and 400 <= int(code) < 600:
        status = int(code)  # OpenRouter's late errors come under HTTP 200
    wait_s = read_wait(headers, raw, named, now_s)
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
    """Return the seconds of "7", "12ms", "6m0s" or "2 minutes"; 0 for dates and epochs."""
    if not re.match(r"\d{1,7}(?!\d)", text):
        return 0.0
    scale = {"h": 3600.0, "m": 60.0, "ms": 0.001}
    parts = re.findall(r"(\d{1,7}(?:\.\d+)?) ?(ms|[hms]?)", text)
    return sum(float(number) * scale.get(unit, 1.0) for number, unit in parts)


# Google's "retryDelay": "26s"; OpenAI's "Please try again in 7m12s"
WAIT = r"(?i)(?:retry.?(?:delay|after|in)|(?:try again|resets?) (?:in|after))\W{1,5}(\d[\d.hms ]*)"


def read_wait(headers: Mapping[str, str], raw: str, error: Any, now_s: float) -> float:
    """Return the seconds that a server asks to wait, wherever it says so, else 0."""
    for said in (headers.get("retry-after", ""), *re.findall(WAIT, raw)):
        if wait_s := parse_duration(said):
            return wait_s
    # OpenRouter's is the time when the limit ends, in milliseconds
    reset = str(dig(error, "metadata", "headers", "X-RateLimit-Reset"))
    if now_s and reset.isdecimal():
        return max(0.0, int(reset[:13]) / 1000 - now_s)
    return 0.0


def read_limit(headers: Mapping[str, str], unit: str) -> tuple[float, float, float] | None:
    """Return a limit: its size, what is left of it, the seconds until it is full, 0 if unsaid."""
    # https://platform.openai.com/docs/guides/rate-limits
    words = ("limit", "remaining", "reset")
    most, left, reset = (headers.get(f"x-ratelimit-{word}-{unit}", "") for word in words)
    if not (re.fullmatch(r"[1-9]\d{0,14}", most) and re.fullmatch(r"\d{1,15}", left)):
        return None
    return int(most), int(left), parse_duration(reset)


ALWAYS, AT_FIRST = "always", "at first"  # the run ends; only if the server has not answered yet
MONEY = "the account has no money left or is at its limit; see its billing page"
KEY = "OPENAI_API_KEY: the server does not take this key"
PLACE = "OPENAI_BASE_URL or GETCAP_MODEL: the server has no such thing; most URLs end in /v1"
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
    "|guideline|inspection|inappropriate|sensitive word|sensitive content|sensitivecontent"
    "|sensitive info|moderat|flagged as|flagged by|flagged for|safety|unsafe|nsfw"
    "|invalid prompt|high risk|prohibited content|敏感|不安全"
)
ERRORS = (
    # how the status may begin; phrases, with blanks for "_" and "-"; when the run ends, or else
    # why the image fails; what helps
    ("0", "cannot connect", AT_FIRST, "check the network, and OPENAI_BASE_URL"),
    ("400 403 429", NO_MONEY, ALWAYS, MONEY),
    ("429", "per day|perday|daily|monthly", ALWAYS, "the limit of this account is used up"),
    ("401", "", ALWAYS, KEY),
    ("402", "", ALWAYS, MONEY),
    ("4 500", TOO_LARGE, "image too large", SMALLER),
    ("200 400 403 404", "<html|<!doctype", AT_FIRST, f"{PLACE}; a web page came back"),
    ("400 404 422 5", NO_VISION, AT_FIRST, "GETCAP_MODEL: set a model that takes images"),
    ("400", "model not|valid model|invalid model|no models loaded", AT_FIRST, PLACE),
    ("400 403 422 451 500", POLICY, "refused", BY_HAND),
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
    """Return what an error means, blank where only its status counts, and what helps."""
    said = f"{reply.raw} {reply.error}".lower().replace("_", " ").replace("-", " ")
    for statuses, phrases, meaning, advice in ERRORS:
        if str(reply.status).startswith(tuple(statuses.split())) and has_phrase(said, phrases):
            return meaning, advice
    return "", ""


def is_answered(reply: Reply) -> bool:
    """Return whether the server has looked at the image: a refusal is an answer."""
    return not reply.error or find_meaning(reply)[0] == "refused"


def is_rejected(reply: Reply) -> bool:
    """Return whether the server rejects the request for no reason that we know."""
    return reply.status in {400, 422} and not find_meaning(reply)[0]


def judge_error(reply: Reply, *, has_answered: bool = True) -> StopRun | FailImage:
    """Return what an error means: the end of the run, of this image, or another try."""
    status, wait_s = reply.status, reply.retry_after_s
    meaning, advice = find_meaning(reply)
    if meaning == AT_FIRST:
        meaning, advice = ("", "") if has_answered else (ALWAYS, advice)
    if meaning == ALWAYS or wait_s > LONGEST_WAIT_S:
        shown = f"{reply.error} (HTTP {status})" if status else reply.error
        return StopRun(f"{advice}: {shown}" if advice else shown)
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
    end = text[-1000:].encode()  # what repeats itself compresses well
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
    has_thoughts_only = not text and (thoughts or reply.has_reasoning)
    reason = next((name for name, phrases in ENDINGS if has_phrase(finish, phrases)), "")
    if not reason and (has_thoughts_only or re.match(THOUGHT_START, said)):
        reason = "reasoning only"
    reason = reason or find_fault(text)
    if not reason and has_phrase(finish, CUT_OFF):
        text = text.rpartition(",")[0] if style == "tags" else cut_caption(text, style)
        reason = "" if text else "cut off"
    if not reason:
        return text
    words = shorten(text or reply.finish_reason, 120).rstrip(".")
    again_s = 0.0 if reason == "broken answer" else None
    said = f"{words}; {ADVICE[reason]}" if words else ADVICE[reason]
    raise FailImage(reason, said, retry_after_s=again_s)


# -------------------------------------------------------------------------------------------- Money

# The first row that fits the model's name: tokens for 32 x 32 pixels, and the most for an image.
# Some models count tiles: they are put down at four, as for 1024 x 1024.
# https://developers.openai.com/api/docs/guides/images-vision; where bills disagree, as billed.
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
    return len(text.encode()) // 4 + 12  # as in English, and for the message around it


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


def describe_cost(settings: Settings, usage: Usage) -> str:
    """Return what a run will cost, about."""
    said = f"{usage.prompt + usage.answer:,} tokens with {settings.model}"
    if settings.local:
        return f"{said}: no cost but this machine's time"
    tier = "batch" if settings.batch or settings.batch_export else settings.service_tier or ""
    cost = find_cost(settings, usage, tier)
    if cost is None:
        return f"{said}; the price at {settings.host} is not known, --price IN/OUT says it"
    return f"{said}: about {show_dollars(cost)}"


class Bill:
    """What the answers of a run cost, and what requests on their way may cost."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tier = settings.service_tier or ""
        self.usage = Usage()
        self.spent = 0.0  # with answers that were lost or not counted, at their worst
        self.lost = 0  # such answers
        self.held = 0.0  # for requests on their way
        self._dearest = 0.0  # answer so far: counts and tiers may differ from the estimate

    @property
    def has_price(self) -> bool:
        """Whether the price is known. The first look-up takes a moment."""
        return find_cost(self._settings, Usage(), self._tier) is not None

    def hold(self, expected: Usage, longest: int, tier: str = "") -> float:
        """Count a request at its worst, and return its dollars. Raises StopRun over the budget."""
        usage = Usage(2 * expected.prompt, longest)  # a prompt may take more than is thought
        worst = find_cost(self._settings, usage, tier or self._tier) or 0.0
        worst = max(worst, self._dearest)
        most = self._settings.max_cost
        if most is not None and self.spent + self.held + worst > most:
            sums = map(show_dollars, (most, self.spent, self.held, worst))
            said = "--max-cost {}: {} spent, up to {} on the way, the next could take {}"
            raise StopRun(said.format(*sums))
        self.held += worst
        return worst

    def settle(self, held: float, reply: Reply, tier: str = "") -> float:
        """Count what came back instead of what was held; return its dollars."""
        self.held -= held
        if reply.is_free:
            return 0.0
        cost = held
        if reply.usage:
            billed_as = tier or reply.tier or self._tier
            cost = find_cost(self._settings, reply.usage, billed_as) or 0.0
            self.usage += reply.usage
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

LONGEST_NAP_S = 1.0  # then look again: an answer may have changed the limits
LONG_WAIT_S = 60.0  # a wait that a user wonders about
RESERVE_S = 0.1  # of refill is kept back: requests overtake each other
SLOWER, FASTER = 1.1, 0.98  # times the interval: after a pause, after a good answer
DUST_S = 1e-6  # a rounding error


class Stop:
    """Whether and why the run ends early. It wakes all who wait."""

    def __init__(self) -> None:
        self.cause: StopRun | signal.Signals | None = None
        self.in_flight = 0  # requests
        self._event = asyncio.Event()

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
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        self.check()


class Bucket:
    """How many requests or tokens a server still takes: as it said, less what was sent since."""

    def __init__(self) -> None:
        self.taken = 0.0  # by all requests so far
        self._most = self._level = self._rate = math.inf  # until the server names a limit
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
        """Take over the limit that an answer shows, less what was sent after its request."""
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
        self._now = asyncio.get_running_loop().time
        self._stop = stop
        self._cap_s = 1 / rate if rate else 0.0  # between two requests
        self._interval_s = 0.0  # the same, after 429s of a server that says nothing of its limits
        self._requests, self._tokens = Bucket(), Bucket()
        self._tokens_each = 0.0  # of a request, on average
        self._sent_at = 0.0
        self._good: deque[float] = deque(maxlen=100)  # when the last good answers came
        self.failures = 0  # requests without a good answer, in a row
        self._first_429_at = math.inf  # since the last good answer
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

    def learn(self, ticket: Ticket, reply: Reply, headers: Mapping[str, str]) -> None:
        """Correct the pace by what came back."""
        now, usage = self._now(), reply.usage
        self.failures += 1
        if not reply.error:
            self._good.append(now)
            self._interval_s *= FASTER
            self._first_429_at = math.inf
            self.failures = 0
        if usage:
            tokens = usage.prompt + usage.answer
            self._tokens_each += (tokens - self._tokens_each) * (0.1 if self._tokens_each else 1)
            self._tokens.take(tokens - ticket.tokens)
        buckets = self._requests, self._tokens
        limits = [read_limit(headers, unit) for unit in ("requests", "tokens")]
        for bucket, limit, taken in zip(buckets, limits, ticket.taken, strict=True):
            if limit:
                bucket.learn(limit, taken, now)
        if reply.status == 429 and not any(limits):
            self._slow_down(ticket, reply.retry_after_s)

    def _slow_down(self, ticket: Ticket, retry_after_s: float) -> None:
        """Pause all workers at the second 429 in a row; the first slows its own request."""
        # what was sent before the first one came met the same limit
        if ticket.sent_at >= self._first_429_at:
            self._not_before = max(self._not_before, self._now() + retry_after_s)
            if self._good:
                took_s = self._first_429_at - self._good[0]
                self._interval_s = SLOWER * took_s / len(self._good)
        self._first_429_at = min(self._first_429_at, self._now())

    def _wait_s(self, now: float) -> float:
        wait_s = max(
            self._sent_at + max(self._cap_s, self._interval_s) - now,
            self._not_before - now,
            self._requests.wait_s(1, now),
            self._tokens.wait_s(self._tokens_each, now),
        )
        if wait_s > LONG_WAIT_S and now > self._said_until:
            self._said_until = now + wait_s
            log.warning("The limits leave no room for %.0f s; Ctrl-C loses nothing.", wait_s)
        return wait_s


# ---------------------------------------------------------------------------------------------- Ask

MOST_IN_A_ROW = 10
SAME_ERRORS = 3  # of a server that has not answered yet: such errors do not pass
LONGEST_BACKOFF_S = 30.0


def open_clients(settings: Settings) -> Clients:
    """Return the SDK's client, and the HTTP client below it. Raises StopRun for a bad proxy."""
    from openai import AsyncOpenAI, DefaultAioHttpClient, Timeout

    # requests leave no cycles behind; looking for some took a tenth of all CPU time
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
    except Exception as error:  # each library under the SDK has its own
        said = "no connection can be set up; check HTTPS_PROXY and SSL_CERT_FILE"
        raise StopRun(f"{said}: {shorten(str(error), 120)}") from error
    return sdk, http


def hide_key(reply: Reply, settings: Settings) -> Reply:
    """Return a reply without the key, which some servers repeat."""
    key = settings.api_key
    if len(key) < 6 or key.isalpha():  # "ollama" is a word, and no secret
        return reply
    names = ("content", "error", "raw")
    texts = {name: getattr(reply, name).replace(key, "[key]") for name in names}
    return dataclasses.replace(reply, **texts)


def read_response(response: Response, settings: Settings) -> Reply:
    """Return what an HTTP response holds."""
    text = response.content.decode("utf-8-sig", "replace")  # as JSON is, whatever a header says
    reply = parse_reply(response.status_code, text, response.headers, now_s=time.time())
    return hide_key(reply, settings)


def describe_failure(error: Exception, settings: Settings) -> Reply:
    """Return what went wrong with a request. Raises the error if it is of no known kind."""
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
    if not is_unsent and not isinstance(cause, httpx2.RequestError | aiohttp.ClientError):
        raise error
    unreached = aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError
    is_free = is_unsent or isinstance(cause.__cause__, unreached)
    said = "cannot connect to" if is_free else "lost the connection to"
    why = getattr(cause.__cause__, "os_error", cause)  # else aiohttp names the server once more
    words = f"{said} {settings.host}: {str(why) or type(why).__name__}"
    return hide_key(Reply(0, error=shorten(words, 200), is_free=is_free), settings)


def keep_trying(settings: Settings, stop: Stop, throttle: Throttle) -> AsyncRetrying:
    """Return the layer of retries, for a function that takes a Question."""
    import tenacity

    factor, retries = settings.throttle_backoff_factor, settings.throttle_retries
    spread = tenacity.wait_random(0, factor / 2)  # so that the workers do not come back as a herd

    def may_pass(error: BaseException) -> bool:
        return isinstance(error, FailImage) and error.retry_after_s is not None

    def wait(state: RetryCallState) -> float:
        error: Any = state.outcome and state.outcome.exception()
        # grows only while no image gets an answer
        step = min(state.attempt_number, throttle.failures or 1)
        backoff_s = min(LONGEST_BACKOFF_S, factor / 2 * max(1.0, factor) ** (step - 1))
        return max(float(error.retry_after_s), backoff_s + spread(state))

    def log_wait(state: RetryCallState) -> None:
        path, error = state.args[0].job.image, state.outcome and state.outcome.exception()
        said = "%s: %s; retry %d of %d in %.1f s"
        log.warning(said, path, error, state.attempt_number, retries, state.upcoming_sleep)

    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(may_pass),
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
    """Asks for captions, for all workers: what one answer teaches counts for all."""

    def __init__(
        self, clients: Clients, settings: Settings, recipe: Recipe, bill: Bill, stop: Stop
    ) -> None:
        sdk, self._http = clients
        self._bill = bill
        # the SDK's post takes as long for a request as all the rest of a run
        self._url = f"{settings.base_url}/chat/completions"
        headers = sdk.auth_headers | sdk.default_headers  # OPENAI_CUSTOM_HEADERS counts
        self._headers = {name: text for name, text in headers.items() if isinstance(text, str)}
        self._settings = settings
        self._stop = stop
        self._style = recipe.style
        self._throttle = Throttle(settings.throttle_submission_rate, stop)
        self._has_warned = False
        self._errors: Counter[str] = Counter()  # before the server has answered
        self._in_a_row: deque[str] = deque(maxlen=MOST_IN_A_ROW)  # reasons of failures
        self._attempt_often = keep_trying(settings, stop, self._throttle).wraps(self._attempt)
        self.parameters = first_parameters(settings)
        self.has_answered = False  # then key, model and address are right
        self.is_settled = False  # then the parameters are, too

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
                raise StopRun(f"{MOST_IN_A_ROW} images in a row ended in {error}") from error
            raise
        self._in_a_row.clear()
        return answer

    async def _attempt(self, question: Question) -> str:
        """Ask once, and judge what comes back."""
        reply = await self._send_and_adapt(question)
        self.has_answered |= is_answered(reply)
        try:
            return judge_reply(reply, self._style, has_answered=self.has_answered)
        except FailImage as error:
            self._errors[str(error)] += 1
            may_pass = self.has_answered or reply.status not in {200, 500}
            if not may_pass and self._errors[str(error)] == SAME_ERRORS:
                raise StopRun(str(error)) from error
            raise

    async def _send_and_adapt(self, question: Question) -> Reply:
        """Send a question; where our own defaults are rejected, send it without them."""
        first = await self._send(question, self.parameters)
        if self.is_settled or not is_rejected(first):
            self.is_settled |= is_answered(first)
            return first
        for parameters in other_parameters(self._settings, self.parameters):
            reply = await self._send(question, parameters)
            if is_rejected(reply):
                continue
            if is_answered(reply) and self.has_answered:  # the first such image may be odd
                gone = ", ".join(self.parameters.keys() - parameters)
                log.warning("The server rejects %s; not sent any more: %s", gone, first.error)
                self.parameters, self.is_settled = parameters, True
            return reply
        return first

    async def _send(self, question: Question, parameters: Parameters) -> Reply:
        """Send one request and count what came back."""
        ticket = await self._throttle.turn()
        reply = Reply(0)
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
        self._throttle.learn(ticket, reply, headers)
        if not reply.error:
            log.debug("%s: %s", path, reply.content)
        # text models answer too: https://github.com/if-ai/ComfyUI-IF_AI_tools/issues/13
        is_text = reply.usage and reply.usage.prompt <= text_tokens(question.prompt)
        if is_text and not self._has_warned:
            self._has_warned = True
            log.warning("%s: perhaps no image was seen: the text alone has so many tokens", path)
        return reply

    async def _post(self, body: bytes) -> tuple[Reply, Mapping[str, str]]:
        """Return what came back, however it came, and its headers."""
        settings = self._settings
        try:
            async with asyncio.timeout(settings.timeout):  # the HTTP client's is for each read
                response = await self._http.post(self._url, content=body, headers=self._headers)
            return read_response(response, settings), response.headers
        except Exception as error:
            return describe_failure(error, settings), {}


# ------------------------------------------------------------------------------------------- Report

NOTED = {  # what the summary says behind the number of captions that have a note
    "excluded words": "with excluded words",
    "cut": "cut at --max-words",
    "too long": "longer than --max-words",
    "same answer": "identical to another",
}


class Report:
    """What became of each image or file: the counts, the summary, the exit code."""

    def __init__(self, stream: IO[str] | None = None, bill: Bill | None = None) -> None:
        self.bill = bill
        self.counts = defaultdict[str, Counter[str]](Counter)  # of each kind, by reason
        self.notes = Counter[str]()
        self.left = 0  # images that are still to be done
        self.outdated = Counter[str]()  # captions, by what other prompt or trigger made them
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
        if self.stream:
            values = outcome._replace(notes=notes)._asdict()
            self._write_line({"outcome": values.pop("kind"), **values})

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
        for which, number in self.outdated.items():
            captions = "caption was" if number == 1 else "captions were"
            lines.append(f"{number:,} {captions} made with {which}; --overwrite updates them.")
        lines.append(self._last_line())
        if self.ended_by:
            is_interrupted = isinstance(self.ended_by, signal.Signals)
            run = "Run" if is_interrupted else "Once that is mended, run"
            lines.append(f"Stopped. {run} the same command to continue.")
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
            print(json.dumps(line, default=str), file=self.stream, flush=True)
        except OSError as error:
            self.stream = None
            self.counts["failed"]["report not written"] += 1
            said = "cannot be written any further: %s; the run goes on"
            log.error(f"--report: {said}", error.strerror)  # noqa: TRY400


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
    """Show how far a run is, on a terminal as a bar. Yields the function that counts one more."""
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

PAGES = (  # encodings of old files; of similar ones the commonest first
    "cp1252 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 cp1257 cp1258 iso8859-2 iso8859-5 "
    "iso8859-7 koi8-r koi8-u cp866 cp874 gb18030 big5hkscs cp932 euc_jis_2004 cp949 "
    "utf-16-le utf-16-be"
).split()
SAMPLE_BYTES = 1 << 14  # enough to judge a file by
# most old files are cp1252, so it gets a bonus, then a factor
CP1252_BONUS, CP1252_FACTOR = 0.008, 1.3
NOT_CP1252 = "[ÐÝÞðýþ]|[ãõ](?![oes])"  # mostly Turkish, Baltic or Romanian
CLEAR_LEAD = 1.3  # how many times the best reading outweighs other languages
FEW_LETTERS = 5  # fewer letters of another script prove nothing
FOREIGN_LETTER = "[\u0370-\u1fff\u3040-\uffff]"
CONTROL = "[\x00-\x08\x0e-\x1f\x7f-\x9f]"
CASED = [*map(chr, range(0xC0, 0x530))]  # Latin, Greek, Cyrillic
SMALL, CAPITAL = "".join(filter(str.islower, CASED)), "".join(filter(str.isupper, CASED))
ODD = (  # what a wrong encoding makes of a text
    r"[^\w\s!-~¡£€¥§©«®°±´·»¿×÷‐-›№™\u0e00-\u0e7f\u3000-\u303f\uff01-\uff65]"  # a rare sign
    r"|[^\W\d_][¡-©«¬¯±´¶¸¼-¿×÷‚„†-•‹€]"  # after a word, what stands before one
    f"|[a-z{SMALL}][{CAPITAL}]"  # a capital after a small letter
    "|[A-Za-zÀ-ɏ][Ͱ-ۿ]|[Ͱ-ۿ][A-Za-zÀ-ɏ]"  # two scripts in one word
)
STRAY = "[\udc80-\udcff]"  # a byte that is not UTF-8, as surrogateescape shows it
AS_CP1252 = {0xDC00 + byte: bytes([byte]).decode("cp1252", "replace") for byte in range(128, 256)}
VALID = "[^\x00-\x7f\udc80-\udcff]"
TOUCHING = f"{VALID}{STRAY}|{STRAY}{VALID}"
CUT_SHORT = "[^\udc80-\udcff]*[\udcc2-\udcf4][\udc80-\udcbf]{0,2}"  # ends within a letter
# UTF-8 that was read as cp1252: the first byte of a letter, and those that must follow it.
# ftfy sees only such texts: it also "repairs" CAFÉ³, “Â” and 10 Å².
MORE = f"[\x80-\xbf{bytes(range(0x80, 0xA0)).decode('cp1252', 'ignore')}]"
DAMAGE = (
    "(?=[\x80-\x9fÂ-Þà-ô])(?:[\x80-\x9f]"  # to look at one letter first is five times as fast
    f"|(?<![A-ZÀ-Þ])[ÂÃ](?![“”‘’]){MORE}"
    f"|(?<=[a-zà-ÿ])[Ä-Þ]{MORE}"
    f"|(?:[Ä-Þ]{MORE}){{2}}"
    f"|[à-ô]{MORE}{{2}})"
)
LOOK_AT_IT = "look at it in an editor"


@dataclass(frozen=True, slots=True)
class Decoding:
    """What a file's bytes are."""

    kind: str  # "right", "unclear", "no text", or what was repaired: "cp1251", "BOM, mojibake"
    text: str = ""  # as it should be
    why: str = ""  # why there is no text, and what the user can do


NO_TEXT = Decoding("no text", why=f"zero or control bytes; {LOOK_AT_IT}")


class Reading(NamedTuple):
    """The beginning of a file, read with one of PAGES."""

    weight: float  # the likelier, the larger
    page: str
    language: str
    text: str
    is_weak: bool  # too odd or too short to rely on


def decode_text(data: bytes, encoding: str | None = None, *, letters: bool = True) -> Decoding:
    """Return what the bytes are; `encoding` is for those that are not UTF-8 and have no BOM."""
    if data.isascii() and b"\0" not in data:  # most captions, in a tenth of the time
        return Decoding("right", data.decode())
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
    """Return the bytes as text; UTF-8 has a blank kind."""
    body = data.removeprefix(codecs.BOM_UTF8)
    kind, codec = "BOM" if body != data else "", "utf-8"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        kind, codec = "UTF-16", "utf-16"
    text = decode(body, codec)
    if text is None and codec == "utf-8":
        if not encoding:
            return guess(body)
        kind, text = encoding, decode(body, encoding)
    if text is None:
        return Decoding("unclear", why=f"not all of it is {kind}; {LOOK_AT_IT}")
    if not text and b"\0" in data:
        return NO_TEXT
    return Decoding(kind, text)


def decode(data: bytes, codec: str) -> str | None:
    """Return the text without the zero bytes that a crash leaves; None if there is none."""
    try:
        text = data.decode(codec).rstrip("\0")
        text.encode()  # unicode_escape can make half characters
    except UnicodeError:
        return None
    return None if "\0" in text else text


def guess(data: bytes) -> Decoding:
    """Return the likeliest text of bytes that are not UTF-8."""
    text = data.decode("utf-8", "surrogateescape")
    valid = len(re.findall(VALID, text))
    if valid and b"\0" not in data:
        if mended := mend_strays(text):
            return Decoding("stray bytes", mended)
        if valid >= len(re.findall(STRAY, text)):
            return Decoding("unclear", why=f"mostly UTF-8, but not all of it; {LOOK_AT_IT}")
    bare = data.rstrip(b"\0")
    ranked = rank(data) or ([] if b"\0" in bare else rank(bare))
    whole = decode(data, ranked[0].page) if ranked else None
    if whole is None:
        return NO_TEXT
    best, *others = ranked
    rivals = [other for other in others if other.language != best.language]
    if not best.is_weak and not any(rival.weight * CLEAR_LEAD > best.weight for rival in rivals):
        return Decoding(best.page, whole)
    said = [f'as {row.page} it reads "{shorten(row.text, 80)}"' for row in (best, *rivals[:1])]
    said.append(f"if the first is right, run again with --encoding {best.page}")
    return Decoding("unclear", why="; ".join(said))


def mend_strays(text: str) -> str:
    """Return UTF-8 with its stray bytes read as cp1252, blank where that cannot be."""
    others = re.sub(VALID, " ", text).translate(AS_CP1252)  # valid UTF-8 is never odd
    if re.fullmatch(CUT_SHORT, text) or re.search(TOUCHING, text) or re.search(ODD, others):
        return ""
    return text.translate(AS_CP1252)


def rank(data: bytes) -> list[Reading]:
    """Return how the beginning of a file may be read, the likeliest first."""
    sample = data[:SAMPLE_BYTES]
    found: dict[str, Reading] = {}
    for row in sorted(detect(sample), key=lambda row: PAGES.index(row["encoding"])):
        if reading := weigh(sample, row):
            # where pages give the same text, the commonest is named
            first = found.setdefault(reading.text, reading)
            found[reading.text] = max(first, first._replace(weight=reading.weight))
    return sorted(found.values(), reverse=True)


def detect(sample: bytes) -> list[dict[str, Any]]:
    """Return chardet's rows: encoding, language, confidence."""
    import chardet

    if b"\0" not in sample:
        sample = b" " + sample  # chardet takes "BMW, café" for a bitmap
    rows = chardet.detect_all(
        sample, ignore_threshold=True, compat_names=False, include_encodings=PAGES
    )
    return [dict(row) for row in rows if row["encoding"]]


def weigh(sample: bytes, row: Mapping[str, Any]) -> Reading | None:
    """Return the sample as one of chardet's rows reads it, None if that gives no text."""
    page = row["encoding"]
    try:
        text = codecs.getincrementaldecoder(page)().decode(sample)  # which may end within a letter
    except UnicodeError:
        return None
    if re.search(CONTROL, text):
        return None
    letters = re.sub("[\x00-\x7f]", "", text)
    if letters.isupper():  # chardet knows few capitals
        small = detect(text.lower().encode(page, "ignore"))
        row = next((other for other in small if other["encoding"] == page), row)
    is_odd = len(re.findall(ODD, text)) * 20 > len(letters)
    is_short = 0 < len(re.findall(FOREIGN_LETTER, letters)) < FEW_LETTERS
    weight = row["confidence"] / (1 + is_odd) / (1 + is_short)
    if page == "cp1252" and not re.search(NOT_CP1252, text):
        weight = (weight + CP1252_BONUS) * CP1252_FACTOR
    return Reading(weight, page, row["language"] or page, text, is_odd or is_short)


def mend_letters(text: str) -> str | None:
    """Repair UTF-8 that was read as cp1252; return None where letters are lost."""
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
    """Yield (root, path) of each text below the roots, and of each unreadable folder."""
    seen = set[str]()
    for root in roots:
        trouble = list[OSError]()
        for folder, names in walk_folders(str(root), trouble, seen):  # one root may lie in another
            for name in names:
                if name.lower().endswith(suffixes):
                    yield root, os.path.join(folder, name)
        yield from ((root, str(problem.filename)) for problem in trouble)


def find_roots(settings: Settings, flag: str) -> list[Path]:
    """Return the folders that a command works on. Raises SettingsError."""
    places = (settings.caption_dir or settings.image_dir, settings.config_dir)
    roots = {place.resolve(): place for place in places if place}
    if not roots:
        raise SettingsError(f"{flag}: which folder? Type: gen-captions {flag} ./images")
    for root in roots.values():
        check_folder(flag, root)
    return list(roots.values())


def describe_change(data: bytes, text: str) -> str:
    """Return the words that a repair changes, before and after."""
    before = data.decode("utf-8", "backslashreplace")
    pairs = zip(before.split(), text.split(), strict=False)
    changed = [f"{old} → {new}" for old, new in pairs if old != new and "\0" not in old]
    return shorten(", ".join(changed) or text)


def look_at_text(path: str, settings: Settings) -> tuple[Outcome, bytes, str]:
    """Return what to do about a file, its bytes and its right text."""
    try:
        data, mode = read_file(path), os.stat(path).st_mode
    except OSError as error:
        return Outcome(path, "failed", "unreadable file", str(error.strerror)), b"", ""
    is_config = path.lower().endswith(CONFIG_SUFFIXES)
    found = decode_text(data, settings.encoding, letters=not is_config)
    kind = "planned" if settings.dry_run else "repaired"
    outcome = Outcome(path, kind, found.kind)
    if found.kind == "right":
        outcome = Outcome(path, "skipped", "already right")
    elif found.why:
        outcome = Outcome(path, "failed", found.kind, found.why)
    elif not mode & 0o222:  # it would be replaced
        outcome = Outcome(path, "failed", "read-only file", "make it writable, then run again")
    return outcome, data, found.text


def repair_text(outcome: Outcome, data: bytes, text: str, journal: Journal) -> Outcome:
    """Write the repaired text, unless somebody changed the file since."""
    path, digest = outcome.path, hashlib.sha256(data).hexdigest()
    try:
        if not journal.write(path, text.encode(), Entry("repaired"), replaces=digest):
            return Outcome(path, "failed", "changed meanwhile", "run again")
    except OSError as error:
        return Outcome(path, "failed", "not written", str(error.strerror))
    log.info("%s: repaired: %s", path, outcome.reason)
    return outcome


def run_repair(settings: Settings, roots: Sequence[Path], report: Report) -> None:
    """Make every text UTF-8. Raises StopRun where originals cannot be kept."""
    suffixes = (*CAPTION_SUFFIXES, *CONFIG_SUFFIXES, f".{settings.caption_ext or 'txt'}".lower())
    journals: dict[Path, Journal] = {}
    with contextlib.ExitStack() as stack, show_progress(None, "text", report) as update:
        for root, path in walk_texts(roots, suffixes):
            update()
            outcome, data, text = look_at_text(path, settings)
            if outcome.kind == "planned":
                say(f"{path}: {outcome.reason}: {describe_change(data, text)}")
            if outcome.kind != "repaired":
                report.record(outcome)
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
UNSEEN = ("captions elsewhere", "extension not read")
FROM_A_MODEL = ("refused", "error text", "reasoning only", "looping", "empty")
RENEW = "delete it and run again, or write it by hand"
FINDINGS = {  # gravest first: how grave each is, what it does, what to do about it
    "unreadable file": (STOPS, "check its permissions"),
    "unreadable folder": (STOPS, "check its permissions"),
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
    "trigger missing": (WRONG, "add it: --trigger WORD --overwrite costs nothing, or by hand"),
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
GREENEST = 0.64  # between sRGB's green (0.60) and that of Display P3 (0.67), Adobe RGB (0.70)
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
            sample.add("very short", sample.caption, f"half have {middle} words or more")
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
        path = sample.image or sample.caption or sample.findings[0].path
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

LOCAL_MODELS = {  # the repository at Hugging Face, and the commit
    "small": ("Qwen/Qwen3-VL-2B-Instruct-GGUF", "52d6c8ffea26cc873ac5ad116f8631268d7eb503"),
    "medium": ("Qwen/Qwen3-VL-4B-Instruct-GGUF", "1cd86afb9a95c410a6038ab3b40d8b578c892266"),
    "large": ("Qwen/Qwen3-VL-8B-Instruct-GGUF", "f982a07559d4a2f6c8744d840bf6fccab30eea96"),
    "joycaption": (
        "concedo/llama-joycaption-beta-one-hf-llava-mmproj-gguf:Q4_K",
        "acfe6bf78ae4e411cd5c7c8f4a71ba01f26a5b97",
    ),
}
LOCAL_SERVERS = {"Ollama": 11434, "LM Studio": 1234, "llama.cpp": 8080, "vLLM": 8000}
IMAGE_TOKENS = 3328  # the most for one image: InternVL makes up to 13 tiles of 256
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

    return [
        f"{name}: --base-url http://127.0.0.1:{port}/v1 --model {shorten(' or '.join(models))}"
        for name, port in LOCAL_SERVERS.items()
        if (models := [shlex.quote(model) for model in list_models(port)])
    ]


def check_local(model: str) -> None:
    """Raise SettingsError if packages or the model's file are missing."""
    from importlib.util import find_spec

    if model.endswith(".gguf") and not os.path.isfile(model):
        raise SettingsError(f"--local: {model}: no such file")
    if not all(map(find_spec, ("xllamacpp", "huggingface_hub"))):
        said = "install gen-captions with its extra: pip install '.[local]'"
        raise SettingsError(f"--local: packages are missing; {said}")


def choose_files(paths: Iterable[str], quant: str) -> tuple[str, str]:
    """Return the model whose name contains `quant`, and its projector. Raises ValueError."""
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

    with contextlib.suppress(OSError, ValueError):  # a model in the cache needs no request
        folder = snapshot_download(repo, revision=commit, local_files_only=True)
        return choose_files(map(str, Path(folder).rglob("*")), quant)
    found = HfApi().model_info(repo, revision=commit, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    files = choose_files(sizes, quant)
    gigabytes = sum(sizes[file] for file in files) / 1e9
    log.info("downloading %.2f GB from %s: %s, %s", gigabytes, constants.ENDPOINT, *files)
    model, projector = (hf_hub_download(repo, file, revision=commit) for file in files)
    return model, projector


def find_model(model: str) -> tuple[str, str]:
    """Return the paths of a local model and its projector. Raises StopRun."""
    is_file, hub = model.endswith(".gguf"), os.environ.get("HF_ENDPOINT", "huggingface.co")
    task = f"read {model}" if is_file else f"download the model {model} from {hub}"
    try:
        if is_file:
            beside = map(str, Path(model).parent.iterdir())
            return choose_files(beside, os.path.basename(model))
        name, commit = LOCAL_MODELS.get(model, (model, "main"))
        repo, _, quant = name.partition(":")
        return find_at_hub(repo, quant or "Q4_K_M", commit)  # llama.cpp's default too
    except Exception as error:  # the hub, the network and the disk raise many types
        why = shorten(str(error) or type(error).__name__)
        raise StopRun(f"--local: cannot {task}: {why}") from error


def serve_model() -> None:
    """Serve the model, in a process that ends with the one that started it."""

    def end_with_parent() -> None:
        os.read(0, 1)  # returns when the parent ends, which holds the other end
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if sys.platform == "linux":  # while llama.cpp loads a model, no Python thread runs
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.hostnames, params.port = ["127.0.0.1"], 0
    files, key, slots, tokens = json.loads(os.environ["GEN_CAPTIONS_ENGINE"])
    params.model.path, params.mmproj.path = files
    params.api_keys = [key]
    params.n_parallel, params.n_ctx = slots, slots * tokens
    # waiting threads are busy, so one processor stays free
    threads = max(1, count_processors() - 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.image_max_tokens = IMAGE_TOKENS
    params.enable_reasoning = 0
    params.cache_ram_mib = 0  # no cache of prompts: each image is asked about once
    params.verbosity = 1  # errors
    # Qwen's values; its models loop without them: https://github.com/QwenLM/Qwen3-VL/issues/1611
    sampling = params.sampling
    sampling.temp, sampling.top_p, sampling.top_k = 0.7, 0.8, 20
    sampling.penalty_present = 1.5
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        time.sleep(1)  # a thread of llama.cpp still writes the reason
        sys.exit(1)
    print(server.listening_address, flush=True)
    threading.Event().wait()


def describe_end(process: subprocess.Popen[str]) -> str:
    """Wait for the engine's end; return what to say about it."""
    said = "see above; if nothing is said there, take a smaller model"
    return f"--local: the engine ended with code {process.wait()}; {said}"


@contextlib.contextmanager
def open_engine(
    settings: Settings, prompt: str
) -> Iterator[tuple[Settings, subprocess.Popen[str]]]:
    """Yield the settings that lead to the engine, and its process. Raises StopRun."""
    files, key = find_model(str(settings.local)), os.urandom(16).hex()
    log.info("loading %s with %s", *files)
    prompt_tokens = 1024 + len(prompt.encode()) // 2  # at most, with the model's own words
    tokens = IMAGE_TOKENS + prompt_tokens + settings.max_tokens
    options = json.dumps([files, key, settings.thread_pool, tokens])
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", "-c", BE_ENGINE, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GEN_CAPTIONS_ENGINE": options},
        start_new_session=True,  # the first Ctrl-C does not end it
    ) as process:
        address = process.stdout.readline().strip() if process.stdout else ""
        if not address:
            raise StopRun(describe_end(process))
        yield dataclasses.replace(settings, base_url=f"{address}/v1", api_key=key), process


async def end_with(process: subprocess.Popen[str], stop: Stop) -> None:
    """End the run when the engine ends."""
    with contextlib.suppress(StopRun):  # sleep raises it when the run ends first
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
    engine: subprocess.Popen[str] | None = None  # of --local

    def name(self, job: Job) -> str:
        """Return an image's path below the image folder."""
        return name_below(self.image_dir, job.image)


def plan_run(run: Run, parts: Iterable[Part]) -> Iterator[Job | Outcome]:
    """Yield what to do about each image. Raises SettingsError if there is none."""
    settings, recipe = run.settings, run.recipe
    waiting = {name for part in parts for name in part.images}
    left = settings.limit or math.inf
    left -= len(waiting) if settings.batch else 0
    is_empty = True
    for found in walk_images(run.image_dir, settings.caption_dir, recipe.caption_ext):
        if isinstance(found, Outcome):
            is_empty &= found.kind == "skipped"  # a video, for example
            yield found
            continue
        is_empty = False
        item = judge_job(found, run.journal, recipe, overwrite=settings.overwrite)
        why = ""
        if isinstance(item, Job) and run.name(item) in waiting:
            why = "" if settings.batch and not settings.dry_run else "waits in a batch"
        elif isinstance(item, Job):
            left -= 1
            why = "" if left >= 0 else "over --limit"
        yield Outcome(found.image, "skipped", why, caption=found.caption) if why else item
    if is_empty:
        looked = f"looked for {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}"
        raise SettingsError(f"--image-dir: {run.image_dir}: no images there or below; {looked}")


def collect_jobs(run: Run, plan: Iterable[Job | Outcome]) -> list[Job]:
    """Return a plan's jobs, those that failed before last; record the rest."""
    jobs: list[Job] = []
    failed: list[Job] = []
    for item in plan:
        if isinstance(item, Outcome):
            run.report.record(item)
            continue
        past = run.journal.past(item.caption)
        if past and past[-1].outcome == "failed":
            failed.append(item)
        else:
            jobs.append(item)
    return jobs + failed


def check_writable(jobs: Iterable[Job]) -> None:
    """Raise StopRun, before anything is paid, where captions cannot be saved."""
    for folder in sorted({os.path.dirname(job.caption) for job in jobs}):
        place = os.path.abspath(folder)
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
            raise StopRun(f"{folder}: cannot save captions there: {place} is no folder to write to")


def check_key(settings: Settings) -> None:
    """Raise a SettingsError where a key is missing."""
    if settings.local:
        check_local(settings.local)
    if is_this_machine(settings.base_url) or not re.fullmatch(NO_KEY, settings.api_key):
        return
    state = "still the example" if settings.api_key else "not set"
    lines = [
        f"OPENAI_API_KEY is {state}. Put the line OPENAI_API_KEY=sk-... into a file .env here.",
        "Keys: https://platform.openai.com/api-keys. Without one: gen-captions --local ./images",
        "Ollama and others: --base-url http://localhost:11434/v1 --model NAME",
    ]
    if os.environ.get("OPENAI_API_BASE") and settings.base_url == OPENAI_URL:
        lines.append("OPENAI_API_BASE is set; this tool reads OPENAI_BASE_URL.")
    if os.path.exists(".env.txt") and not os.path.exists(".env"):
        lines.append(".env.txt is there; rename it to .env.")
    raise SettingsError("\n".join([*lines, *describe_local_servers()]))


@contextlib.contextmanager
def end_on_signals(stop: Stop) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run in order, the second at once."""
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
BUSY_S = 0.02  # before a thread hands back what it has done: that takes as long as an image


def read_words(path: str) -> str:
    """Return a caption file's text in one line, blank if it is not UTF-8."""
    try:
        return " ".join(read_file(path).decode("utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        return ""


def make_prompt(recipe: Recipe, job: Job) -> str:
    """Return the prompt for one image, its placeholders filled in."""
    caption, folder = "", os.path.dirname(os.path.abspath(job.image))
    if "{caption}" in recipe.prompt:  # or the tags in a .txt, if captions end in .caption
        caption = read_words(job.caption) or read_words(os.path.splitext(job.image)[0] + ".txt")
    values = {
        "name": os.path.splitext(os.path.basename(job.image))[0],
        "folder": os.path.basename(folder),
        "caption": caption,
        "exclude": ", ".join(recipe.exclude),
    }
    prompt = re.sub(PLACEHOLDER, lambda found: values[found[1]], recipe.prompt)
    return prompt.encode(errors="replace").decode()  # a file's name may hold bytes of no letter


def expect(settings: Settings, recipe: Recipe, job: Job) -> Usage:
    """Return about what an image will take, by its header. Raises FailImage."""
    try:
        with open(os.open(job.image, READ_ONLY), "rb") as file, name_damage():
            size = fit(open_image(file).size, settings.max_side)
    except OSError as error:
        raise FailImage("unreadable file", str(error.strerror)) from error
    return estimate(settings, make_prompt(recipe, job), size)


def load_question(run: Run, job: Job, pixels: bool) -> Question:
    """Return the question about an image. Runs in a thread. Raises FailImage."""
    settings, recipe = run.settings, run.recipe
    try:
        data = read_file(job.image)
    except OSError as error:
        raise FailImage("unreadable file", str(error.strerror)) from error
    entry = Entry(
        outcome="captioned",
        recipe=recipe.identity,
        trigger=recipe.trigger,
        image_sha256=hashlib.sha256(data).hexdigest(),
    )
    question = Question(job, make_prompt(recipe, job), entry)
    if pixels and not job.answer:
        jpeg, size = prepare_image(data, settings.max_side)
        question.jpeg = b64encode(jpeg)
        question.expected = estimate(settings, question.prompt, size)
    return question


def for_people(run: Run, question: Question) -> dict[str, Any]:
    """Return what the journal says of an image besides, and nobody but people reads."""
    return {
        "image": question.job.image,
        "model": run.settings.model,
        "usd": round(question.dollars, 8),  # 0 where the price is not known
        "prompt_tokens": question.usage.prompt,
        "answer_tokens": question.usage.answer,
    }


def keep_caption(run: Run, question: Question, answer: str) -> Outcome:
    """Write an answer's caption. Runs in a thread. Raises StopRun."""
    job = question.job
    replaces = job.replaces.caption_sha256 if job.replaces else ""
    text, notes = finish_caption(answer, run.recipe)
    entry = dataclasses.replace(question.entry, answer=answer)
    data, more = f"{text}\n".encode(), for_people(run, question)
    try:
        is_written = run.journal.write(job.caption, data, entry, replaces, **more)
    except OSError as error:
        # each answer that is paid for is shown, also those after the first that is not saved
        log.log(logging.ERROR, "%s: not saved; the answer was: %s", job.caption, text)
        raise StopRun(f"{job.caption}: cannot save captions: {error.strerror}") from error
    if not is_written:
        why = "changed meanwhile" if job.replaces else "captioned meanwhile"
        return Outcome(job.image, "skipped", why, caption=job.caption)
    return Outcome(job.image, "captioned", detail=text, caption=job.caption, notes=notes)


def keep_failure(run: Run, question: Question, reason: str) -> None:
    """Tell the journal of an image without a caption. Runs in a thread."""
    outcome = "refused" if reason == "refused" else "failed"
    entry, more = dataclasses.replace(question.entry, outcome=outcome), for_people(run, question)
    with contextlib.suppress(OSError):  # then it is asked again next time
        run.journal.append(question.job.caption, entry, reason=reason, **more)


class Threads:
    """Does blocking work in a few threads, which hand back all results of a moment at once."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._waiting: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()
        self._tasks = set[Any]()  # one for each thread at work

    def do(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Return what a function will return, or raise."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((future, functools.partial(function, *arguments)))
        if len(self._tasks) < self._number:
            self._tasks.add(asyncio.create_task(self._keep_busy()))
        return future

    async def _keep_busy(self) -> None:
        """Keep one thread busy while any work waits."""
        from aiofiles.os import wrap

        while self._waiting:
            done = await wrap(self._work)()
            while done:
                future, settle, result = done.pop(0)
                if not future.cancelled():
                    settle(result)
                del future, settle, result  # an error holds this frame, and its image: no cycle
        self._tasks.discard(asyncio.current_task())

    def _work(self) -> list[tuple[asyncio.Future[Any], Callable[[Any], None], Any]]:
        """Do what waits, for a moment; return how to settle it."""
        done: list[tuple[asyncio.Future[Any], Callable[[Any], None], Any]] = []
        end = time.monotonic() + BUSY_S
        with contextlib.suppress(IndexError):  # nothing waits
            while time.monotonic() < end:
                future, function = self._waiting.popleft()
                try:
                    done.append((future, future.set_result, function()))
                except Exception as error:
                    done.append((future, future.set_exception, error))
                del future, function
        return done


class Captioner:
    """Takes one image from file to caption: load, ask, keep. Without `pixels` none is sent."""

    def __init__(
        self, run: Run, asker: Asker | Answers | None = None, *, pixels: bool = True
    ) -> None:
        load_pillow()
        self._run = run
        self._asker = asker
        self._pixels = pixels
        # one more than processors, as threads wait for each other; still more only take memory
        self._decoders = Threads(count_processors() + 1)
        self._writer = Threads(1)

    async def load(self, job: Job) -> Question:
        """Return the question about an image. Raises FailImage."""
        question: Question = await self._decoders.do(load_question, self._run, job, self._pixels)
        return question

    async def caption(self, job: Job) -> Outcome:
        """Caption one image. Raises FailImage or StopRun."""
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
        except asyncio.CancelledError:  # what is written counts
            outcome = await task
        return outcome

    async def _ask(self, question: Question) -> str:
        """Return an answer, the better of two if the first has excluded words."""
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
            except StopRun as cause:  # the first answer is paid for
                self._run.stop.set(cause)
        return answer


async def handle_all(
    run: Run,
    jobs: Iterable[Job],
    handle: Callable[[Job], Awaitable[Outcome | None]],
    workers: int,
) -> None:
    """Handle each job in a worker; here alone exceptions become outcomes."""
    queue = iter(jobs)  # shared, so that a job is made when a worker is free

    async def work() -> None:
        for job in queue:
            if run.stop.cause is not None:
                return
            try:
                outcome = await handle(job)
            except FailImage as error:
                outcome = Outcome(job.image, "failed", error.reason, error.detail)
            except StopRun as cause:
                run.stop.set(cause)
                return
            except Exception as error:  # not even a fault of ours may end the run
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


async def ask_first(run: Run, asker: Asker, jobs: Iterator[Job]) -> None:
    """Caption one image after another until we know what the server takes."""
    caption = Captioner(run, asker).caption
    while not asker.is_settled and (job := next(jobs, None)):
        await handle_all(run, [job], caption, 1)
        run.stop.check()


async def caption_images(run: Run, jobs: list[Job]) -> None:
    """Caption images one by one. When our own engine ends, the run ends."""
    queue, clients = iter(jobs), open_clients(run.settings)
    async with clients[0]:
        watch = asyncio.create_task(end_with(run.engine, run.stop)) if run.engine else None
        asker = Asker(clients, run.settings, run.recipe, run.bill, run.stop)
        await ask_first(run, asker, queue)
        await handle_all(run, queue, Captioner(run, asker).caption, run.settings.thread_pool)
        if watch:
            watch.cancel()


async def carry_out(
    run: Run, jobs: list[Job], work: Callable[[Run, list[Job]], Awaitable[None]]
) -> None:
    """Do the work of a run, and show its progress."""
    report, stop = run.report, run.stop
    with show_progress(report.left, "image", report) as report.update, end_on_signals(stop):
        log.info("%s", ". ".join(run.recipe.lines))
        try:
            known = (job for job in jobs if job.answer)
            await handle_all(run, known, Captioner(run).caption, run.settings.thread_pool)
            await work(run, [job for job in jobs if not job.answer])
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
REASONERS = r"(?:.*/)?(?:gpt-(?:[5-9]|\d\d)|o\d)"  # OpenAI's newer models


@dataclass(slots=True)
class Part:
    """A batch: which images it asks about, and its ids at the server."""

    path: str  # of the file that holds all this
    made_with: str
    parameters: Parameters  # that the server takes
    images: list[str] = field(default_factory=list)  # names below the image folder
    size: int = 0  # of the requests, in bytes
    usd: float = 0.0  # what the answers may cost
    file_id: str = ""
    batch_id: str = ""

    @property
    def requests_path(self) -> str:
        """The path of the requests, until they are uploaded."""
        return f"{self.path}l"

    def save(self) -> None:
        """Keep it for the next run. Raises OSError."""
        write_whole(self.path, json.dumps(dataclasses.asdict(self)).encode())


def load_parts(journal: Journal) -> list[Part]:
    """Return the parts that wait, oldest first. Raises SettingsError."""
    parts = []
    for path in sorted(map(str, Path(journal.batch_folder).glob("*.json"))):
        try:
            parts.append(Part(**json.loads(read_file(path)) | {"path": path}))
        except (OSError, ValueError, TypeError):
            raise SettingsError(f"{path}: cannot be read; delete it to give it up") from None
    return parts


def made_with(run: Run) -> str:
    """Return what must be the same when answers are collected."""
    image_dir = os.path.realpath(run.image_dir)
    return fingerprint(run.recipe.identity, run.settings.overwrite, image_dir)


def line_id(run: Run, question: Question) -> str:
    """Return the id of an image's request: its name, bytes, prompt and recipe."""
    entry = question.entry
    name = run.name(question.job)
    return f"gc-{fingerprint(name, entry.image_sha256, entry.recipe, question.prompt)}"


def write_line(run: Run, part: Part, question: Question) -> None:
    """Add the request of an image to a part. Raises StopRun."""
    head = json.dumps({"custom_id": line_id(run, question), "method": "POST", "url": ENDPOINT})
    body = build_request(run.settings.model, question.prompt, part.parameters, question.jpeg)
    try:
        with open(part.requests_path, "ab") as file:
            file.write(head.removesuffix("}").encode() + b', "body": ' + body + b"}\n")
            part.size = file.tell()
    except OSError as error:
        raise StopRun(f"{part.requests_path}: cannot be written: {error.strerror}") from error
    part.images.append(run.name(question.job))


def parse_result(line: bytes) -> tuple[str, Reply]:
    """Return a result's id and reply. Raises ValueError or TypeError."""
    found = json.loads(line)
    custom_id, response, error = (dig(found, name) for name in ("custom_id", "response", "error"))
    if not isinstance(custom_id, str) or "body" in found:  # a request has a body
        raise ValueError
    # some versions of vLLM give the completion itself
    body = response if dig(response, "choices") else dig(response, "body")
    status = dig(response, "status_code") or (200 if body else 0)
    return custom_id, parse_reply(status, json.dumps(body or {"error": error}))


class Answers:
    """The answers in files of results; takes the place of an Asker."""

    def __init__(self, run: Run, files: Iterable[bytes]) -> None:
        self._run = run
        self._captioner = Captioner(run, self, pixels=False)
        self._replies: dict[str, Reply] = {}
        self.torn = 0  # lines that are no results
        self.missing = 0  # images without an answer
        lines = (line for data in files for line in data.splitlines())
        for line in filter(bytes.strip, lines):
            try:
                custom_id, reply = parse_result(line)
            except (ValueError, TypeError, RecursionError):
                self.torn += 1
                continue
            known = self._replies.get(custom_id)
            # without a status it was never asked: the batch expired
            if reply.status and (not known or known.error):
                self._replies[custom_id] = reply

    async def caption(self, job: Job) -> Outcome | None:
        """Caption an image that has an answer. Raises FailImage."""
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
    """Write requests into files; yield each part. Raises StopRun, last, over --max-cost."""
    captioner, queue, too_dear = Captioner(run), iter(jobs), list[StopRun]()
    parameters.pop("service_tier", None)  # the Batch API is a tier of its own

    def take(part: Part, first: Job) -> Iterator[Job]:
        for job in itertools.islice(itertools.chain([first], queue), PART_LINES):
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

    for number, first in enumerate(queue, 1):
        part = Part(f"{path}{number:03}.json", made_with(run), parameters)
        await handle_all(run, take(part, first), functools.partial(add, part), count_processors())
        run.stop.check()
        if part.images:
            yield part
        if too_dear:
            raise too_dear[0]


class Batches:
    """Captions images by a Batch API: takes each part through upload, create, look, collect."""

    def __init__(
        self, run: Run, sdk: AsyncOpenAI, asker: Asker, parts: list[Part], jobs: list[Job]
    ) -> None:
        self._run = run
        self._sdk = sdk
        self._asker = asker
        self._parts = parts
        self._jobs = {run.name(job): job for job in jobs}
        self._parameters = parts[0].parameters if parts else None
        self._failures = 0  # in a row
        self._has_room = True  # for another batch, at the server
        self._left_by: StopRun | None = None  # why images are left

    async def work(self) -> None:
        """Collect what waits, send the other images, and wait for all. Raises StopRun."""
        waiting = {name for part in self._parts for name in part.images}
        await self._advance()
        await self._send([job for name, job in self._jobs.items() if name not in waiting])
        pause_s = 0.5
        while self._parts:
            await self._run.stop.sleep(pause_s)
            pause_s = min(60.0, 1.5 * pause_s)
            await self._advance()
        if self._left_by:
            raise self._left_by

    async def _send(self, jobs: Sequence[Job]) -> None:
        """Put images into parts; the first is asked at once if no part has parameters."""
        run, queue = self._run, iter(jobs)
        if self._parameters is None:  # a wrong key is known now and not tomorrow
            await ask_first(run, self._asker, queue)
            self._parameters = self._asker.parameters
        path = os.path.join(run.journal.batch_folder, f"{time.time_ns()}-")
        try:
            async for part in write_parts(run, queue, path, self._parameters):
                self._parts.append(part)
                await self._advance()
        except StopRun as cause:
            run.stop.check()
            self._left_by = cause

    async def _advance(self) -> None:
        """Take one step with each part."""
        for part in list(self._parts):
            self._run.stop.check()
            try:
                await self._step(part)
                self._failures = 0
            except Exception as error:
                self._judge(part, error)

    def _judge(self, part: Part, error: Exception) -> None:
        """Try again, leave the part to the next run, or end this run."""
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
        """Leave a part to the next run."""
        log.error("%s: %s; run again, or delete it to give it up", part.path, said)
        self._parts.remove(part)
        self._left_by = StopRun("--batch: not all images were answered")

    async def _step(self, part: Part) -> None:
        client = self._sdk
        if not part.file_id:
            with FileIO(part.requests_path) as file:  # the SDK would read a path whole
                part.file_id = (await client.files.create(file=file, purpose="batch")).id
            part.save()
            os.unlink(part.requests_path)
        elif part.batch_id:
            batch = await client.batches.retrieve(part.batch_id)
            if batch.status in {"completed", "failed", "expired", "cancelled"}:
                await self._collect(part, batch)
        elif self._has_room or not any(other.batch_id for other in self._parts):
            await self._create(part)

    async def _create(self, part: Part) -> None:
        """Create a part's batch, unless a try did whose answer was lost."""
        batches = self._sdk.batches
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
        found = [(await self._sdk.files.content(name)).content for name in files]
        answers = Answers(run, found)
        jobs = [job for name in part.images if (job := self._jobs.get(name))]
        await handle_all(run, jobs, answers.caption, run.settings.thread_pool)
        if run.stop.cause is not None:
            return
        # such answers are paid for
        if answers.torn or (batch.status == "completed" and not any(found)):
            self._leave(part, "not all answers can be read")
            return
        if answers.missing:
            said = f"{answers.missing} of {len(jobs)} images were not answered ({batch.status})"
            self._left_by = StopRun(f"--batch: {said}")
        await self._forget(part, files)

    async def _retreat(self, part: Part, batch: Any) -> None:
        """Wait with a batch that found no room; end the run for another."""
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
        """Remove a part here, and its files there, where they stay for weeks."""
        os.unlink(part.path)
        self._parts.remove(part)
        self._run.bill.held -= part.usd
        self._has_room = True
        for name in (part.file_id, *files):
            with contextlib.suppress(Exception):  # nothing depends on it
                await self._sdk.files.delete(name)


async def send_batches(run: Run, jobs: list[Job]) -> None:
    """Caption images by a Batch API, also those that wait."""
    folder, parts = run.journal.batch_folder, load_parts(run.journal)
    if any(part.made_with != made_with(run) for part in parts):
        said = "a batch with other settings waits; the same command goes on"
        raise SettingsError(f"{folder}: {said}, or delete the folder to give it up")
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):  # of a run that was killed before the upload
        if name.endswith(".jsonl"):
            os.unlink(os.path.join(folder, name))
    run.bill.held = sum(part.usd for part in parts)
    clients = open_clients(run.settings)
    asker = Asker(clients, run.settings, run.recipe, run.bill, run.stop)
    async with clients[0] as sdk:
        await Batches(run, sdk, asker, parts, jobs).work()


async def export_lines(run: Run, jobs: list[Job]) -> None:
    """Write requests into files, for any engine."""
    settings, folder = run.settings, str(run.settings.batch_export)
    try:
        os.makedirs(folder)
    except OSError as error:
        raise SettingsError(f"--batch-export: {folder}: {error.strerror}") from None
    parameters = first_parameters(settings)
    if not re.match(REASONERS, settings.model):  # no answer can teach us: what all engines know
        parameters = [parameters, *other_parameters(settings, parameters)][-1]
    async for _ in write_parts(run, jobs, os.path.join(folder, "part-"), parameters, "exported"):
        pass


async def import_results(run: Run, jobs: list[Job]) -> None:
    """Make captions of the answers in files of results."""
    try:
        answers = Answers(run, map(read_file, run.settings.batch_import or ()))
    except OSError as error:
        raise SettingsError(f"--batch-import: {error.filename}: {error.strerror}") from None
    if answers.torn:
        log.warning("--batch-import: lines that are torn or no results: %d", answers.torn)
    await handle_all(run, jobs, answers.caption, run.settings.thread_pool)
    run.stop.check()
    if answers.missing:
        said = f"{answers.missing} of {len(jobs)} images have no answer there"
        if answers.missing == len(jobs):
            said += "; prompt, model, style or images are not those of the export"
        log.error("--batch-import: %s", said)
        run.report.counts["failed"]["no answer"] += answers.missing
        run.report.left -= answers.missing


# --------------------------------------------------------------------------------------------- Undo


def restore(kept: str, path: str, journal: Journal, *, dry_run: bool) -> str:
    """Put an original back, unless somebody changed the file since; return what happened."""
    ours = {entry.caption_sha256: entry for entry in journal.past(path)}
    try:
        now = hash_file(path) if has_caption(path) else ""
        if now and now not in ours:
            return "changed by you since, left alone"
        if dry_run:
            return "would be restored"
        if now:
            journal.keep(path)
        write_whole(path, read_file(kept))
        shutil.copystat(kept, path)
        if entry := ours.get(hash_file(kept)):  # the last line of a file says how it was made
            journal.append(path, entry)
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
    say(f"{counted or 'Nothing to restore'}. The files are kept in {folder}")
    return not states["not restored"]


# ----------------------------------------------------------------------------------------- Commands

CAPTIONING = {  # "" is captioning one by one
    "": caption_images,
    "batch": send_batches,
    "batch_export": export_lines,
    "batch_import": import_results,
}
OTHERS = ("fix_encoding", "review", "undo")
ONLY_FOR = {  # flags that have an effect on some commands only
    "local": ("",),
    "limit": CAPTIONING,
    "overwrite": CAPTIONING,
    "report": (*CAPTIONING, "fix_encoding", "review"),
    "encoding": ("fix_encoding",),
}


def choose_command(settings: Settings) -> str:
    """Return the command, blank for captioning one by one. Raises SettingsError."""
    chosen = [name for name in (*CAPTIONING, *OTHERS) if name and getattr(settings, name)]
    if len(chosen) > 1:
        raise SettingsError(f"{' and '.join(map(flag_of, chosen))}: take one of them")
    command = chosen[0] if chosen else ""
    for name, commands in ONLY_FOR.items():
        if getattr(settings, name) and command not in commands:
            other = flag_of(command) if command else "captioning"
            raise SettingsError(f"{flag_of(name)}: has no effect on {other}; leave it out")
    return command


def run_and_report(settings: Settings, bill: Bill | None, work: Callable[[Report], None]) -> int:
    """Do a command's work, print its summary, and return the exit code."""
    with open_report(settings.report) as stream:
        report = Report(stream, bill)
        try:
            with contextlib.redirect_stdout(sys.stderr if stream is sys.stdout else sys.stdout):
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
    """Record a plan that has nothing to do; return False for a plan that has."""
    outcomes = Counter[Outcome]()
    for item in plan:
        if isinstance(item, Job):
            return False
        is_read = report.stream or item.kind == "failed"  # 100,000 paths take much memory
        outcomes[item if is_read else item._replace(path="", caption="")] += 1
    for outcome in outcomes.elements():
        report.record(outcome)
    return True


def caption_all(run: Run, command: str) -> None:
    """Caption the images of a run whose journal is locked."""
    jobs = collect_jobs(run, plan_run(run, load_parts(run.journal)))
    run.report.left = len(jobs)
    check_writable(jobs)
    with contextlib.ExitStack() as stack, contextlib.suppress(asyncio.CancelledError):
        if run.settings.local and any(not job.answer for job in jobs):
            opened = stack.enter_context(open_engine(run.settings, run.recipe.prompt))
            run = dataclasses.replace(run, settings=opened[0], engine=opened[1])
        asyncio.run(carry_out(run, jobs, CAPTIONING[command]))


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
        for finding in recipe.findings:
            log.warning("%s: %s", finding.path, finding.detail)
        if not settings.overwrite:
            report.outdated = journal.count_outdated(recipe)
        parts = load_parts(journal)
        plan = plan_run(run, parts)
        if settings.dry_run:
            show_plan(run, plan)
            return
        is_waiting = settings.batch and parts
        if not is_waiting and record_done(plan, report):
            return
        if command in {"", "batch"}:
            check_key(settings)
        with contextlib.closing(journal):
            journal.open()
            caption_all(run, command)

    return run_and_report(settings, bill, work)


def show_plan(run: Run, plan: Iterable[Job | Outcome]) -> None:
    """Print what a run would do, and what it would cost; of images only the headers are read."""
    load_pillow()
    settings, recipe, record = run.settings, run.recipe, run.report.record
    most = math.inf if settings.log_level == "debug" else 3
    total, planned = Usage(), 0
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
        except FailImage as error:
            record(Outcome(item.image, "failed", error.reason, error.detail))
            continue
        record(Outcome(item.image, "planned", how, caption=item.caption))
        planned += 1
        if planned <= most:
            say(f"{item.image} -> {item.caption}")
    if planned > most:
        say(f"and {planned - most:,} more; -v lists all")
    for line in recipe.lines:
        say(line)
    if settings.log_level == "debug":
        print(recipe.prompt)
    if total.prompt:
        say(describe_cost(settings, total))


def write_page(page: str, title: str, samples: Sequence[Sample]) -> None:
    """Write the page of a set. Raises SettingsError."""
    path = os.path.realpath(page)
    try:
        if has_caption(path) and not read_file(path).startswith(PAGE_MARK):
            raise SettingsError(f"--review: {page}: is no page of this tool; name another file")
        write_whole(path, build_page(title, samples, os.path.dirname(path)))
    except OSError as error:
        raise SettingsError(f"--review: {page}: cannot be written: {error.strerror}") from None


def run_review(settings: Settings) -> int:
    """Say what is wrong with a set, and show it on a page; return the exit code."""
    image_dir, recipe = check_folders(settings), read_recipe(settings)
    if not recipe.trigger:  # perhaps it was forgotten, now or in one of the runs
        known = Journal(settings.caption_dir or image_dir).history.values()
        words = (past[-1].trigger for past in known)
        word = next((word for word in words if word not in {"", TRAINERS_MARK}), "")
        recipe = dataclasses.replace(recipe, trigger=word, trigger_word=word)
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


def run_command(settings: Settings) -> int:
    """Carry out what the settings ask for; return the exit code."""
    command = choose_command(settings)
    if command == "undo":
        return run_undo(settings)
    if command == "review":
        return run_review(settings)
    if command == "fix_encoding":
        roots = find_roots(settings, "--fix-encoding")
        return run_and_report(settings, None, lambda report: run_repair(settings, roots, report))
    return run_captions(settings, command)


# --------------------------------------------------------------------------------------------- Main


class LogFormatter(logging.Formatter):
    """Time, worker, level and message in one line, in colour on a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line without its traceback."""
        record.worker = name_worker()
        record.message = printable(record.message)
        line = super().formatMessage(record)
        is_plain = record.levelno < logging.WARNING or os.environ.get("NO_COLOR")
        if is_plain or not sys.stderr.isatty():
            return line
        red, yellow, plain = "\x1b[31m", "\x1b[33m", "\x1b[0m"
        return f"{red if record.levelno >= logging.ERROR else yellow}{line}{plain}"


def name_worker() -> str:
    """Return the name of the worker that logs."""
    with contextlib.suppress(RuntimeError):  # no loop runs
        task = asyncio.current_task()
        if task and task.get_name().startswith("worker-"):
            return task.get_name()
    return "main"


def set_up_logging(settings: Settings) -> None:
    """Send this tool's log to stderr; libraries keep theirs."""
    handler = logging.StreamHandler(sys.stderr)
    form = "%(asctime)s %(worker)-9s %(levelname)-7s %(message)s"
    handler.setFormatter(LogFormatter(form, "%H:%M:%S"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(settings.log_level.upper())


def drop_output() -> None:
    """Drop what the streams cannot take: Python's own end would fail at it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the one place where errors become exit codes."""
    handle_signals(interrupt)
    code = 0
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.reconfigure(errors="backslashreplace")  # a console may know fewer characters
        # what was closed by who started us (`>&-`) goes nowhere
        sys.stdout, sys.stderr = sys.stdout or StringIO(), sys.stderr or StringIO()
        settings = read_settings(sys.argv[1:] if argv is None else argv)
        set_up_logging(settings)
        code = run_command(settings)
        print(end="", flush=True)
    except (SettingsError, StopRun) as error:
        lines = map(printable, str(error).split("\n"))
        print("gen-captions: " + "\n".join(lines), file=sys.stderr)
        code = 3 if isinstance(error, StopRun) else 2
    except ModuleNotFoundError as error:
        said = f"{error.name} is not installed; type: pip install -r requirements.txt"
        print(f"gen-captions: {said}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output has seen enough (`| head`)
        pass
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
