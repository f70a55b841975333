#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai[aiohttp]>=3.50,<4",
#   "python-dotenv>=1.0,<2",
#   "aiofiles>=24.1",
#   "tenacity>=9,<10",
#   "pillow>=12,<14",
#   "tqdm>=4.66,<5",
#   "pyyaml>=6,<7",
#   "ftfy>=6.3,<7",
#   "charset-normalizer>=3.4,<4",
#   "genai-prices>=0.2.3,<0.3",
# ]
# ///
"""Caption a folder of images for training, with OpenAI's vision models or any server that speaks their API.

    python gen-captions.py --image-dir ./images --caption-dir ./captions --config-dir ./config

Read it from top to bottom; each room uses only rooms above it:

    Text               one way to print any name
    Settings           one table of settings; flag > environment > .env > default
    Data               what the rooms hand to each other
    Files              read images, write whole or not at all
    Journal            what was paid for, and what was replaced
    Plan               which images need a caption, and where it goes
    Recipe             what the config folder says about the captions
    Pixels             any image file -> a small upright JPEG
    Request and reply  build the question; judge the answer
    Money              what a request will cost, and what it did
    Trigger and style  make the answer the caption that the training wants
    Throttle           the pace of all workers, and how the run ends early
    Ask                the connection, the retries, what the server taught us
    Pool               N workers over the jobs
    Report             counts, progress, summary, exit code
    Batch              requests as files for somebody else's engine, and its results back
    Encoding           what a file's bytes are, and what they should be
    Repair             the walk through captions and config files that need it
    Review             what is wrong with a set as the trainer will see it; the page
    Local model        what can see without a key: servers that run here, files, downloads
    Engine             llama.cpp's server as a process of our own
    Run                what there is to do, and all made ready for it
    Caption            one image from file to caption
    Batch run          parts out, answers in
    Metadata and undo  all captions in one file; what was replaced put back
    Look               the walk through a set for its review
    Commands, main     one function a command

Exit codes: 0 all done or nothing to do; 1 some images failed; 2 usage or settings; 3 the run was stopped
(key, quota, endpoint, disk); 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import dataclasses
import errno
import functools
import hashlib
import ipaddress
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
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from io import BytesIO, StringIO
from pathlib import Path
from string import Formatter
from typing import IO, TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:  # imported where they are needed, asyncio too: --help, -n and usage errors must not wait for them
    import asyncio
    from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
    from decimal import Decimal
    from types import FrameType

    from openai import AsyncOpenAI
    from PIL import Image, ImageFile
    from tenacity import AsyncRetrying, RetryCallState

__version__ = "0.1.0"

log = logging.getLogger("gen-captions")

# ---------------------------------------------------------------------------------------------------- Text


def printable(text: str) -> str:
    """Return the text as one line that any terminal can show: line breaks, control and broken characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, limit: int = 300) -> str:
    """Return the text as one line of at most `limit` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


# ------------------------------------------------------------------------------------------------ Settings

OPENAI_URL = "https://api.openai.com/v1"
KEY_PLACEHOLDER = "your-key-here"  # what .env.example holds
BATCHES = "batch"  # what the folders of batches in the state folder begin with
LOCAL_MODEL = "Qwen/Qwen3-VL-2B-Instruct-GGUF:Q4_K_M"  # Apache 2.0, 1.55 GB with its projector
LOCAL_URL = "http://127.0.0.1/v1"  # until the engine has a port
LOCAL_TIMEOUT_S = 900.0  # without a graphics card an image takes a minute, and more for a large model
LOCAL_WORKERS = 2  # a server on this machine answers slower the more it is asked at once
FLEX_TIMEOUT_S = 900.0  # https://developers.openai.com/api/docs/guides/flex-processing
IMAGE_SUFFIXES = {
    f".{name}" for name in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
}

WHAT, HOW, MONEY, PACE = "what to caption", "which model, and what it is asked", "what it may cost", "how fast"
BATCH, SHOW, REPAIR = "large sets", "what to see", "other work"


class SettingsError(Exception):
    """The user asked for something that cannot be done as it stands; nothing was touched. Exit code 2."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a setting's text becomes its value, and the words for what is allowed."""

    parse: Callable[[str], Any]
    allowed: str
    metavar: str


def whole_number(low: int, high: int) -> Kind:
    """Return the kind of a whole number within both bounds."""

    def parse(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise ValueError
        return number

    return Kind(parse, f"a whole number from {low} to {high}", "N")


def decimal(low: float, high: float, *, low_itself: bool = False) -> Kind:
    """Return the kind of a decimal number above `low` (or equal to it, where that is allowed) and up to `high`."""

    def parse(text: str) -> float:
        number = float(text)
        if not (low < number <= high or (low_itself and number == low)):  # also false for nan
            raise ValueError
        return number

    above = "from" if low_itself else "above"
    return Kind(parse, f"a number {above} {low:g} and up to {high:g}", "N")


def one_of(*names: str) -> Kind:
    """Return the kind of a name out of a few, in any letter case."""
    lower = [name.lower() for name in names]
    return Kind(lambda text: names[lower.index(text.lower())], "one of " + ", ".join(names), "NAME")


def looks_secret(text: str) -> bool:
    """Return whether a key may have been put where it does not belong, so that it is not shown."""
    return bool(re.search(r"(?:sk-|gsk_|AIza|xai-|hf_)\w|[\w-]{32,}|@", text))


def parse_key(text: str) -> str:
    """Return the key without the quotes and line ends that come along when it is copied."""
    key = text.strip().strip("\"'“”‘’").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError
    return key


def parse_url(text: str) -> str:
    """Return the base URL without quotes and without the endpoint's own path."""
    url = text.strip("\"'").rstrip("/").removesuffix("/chat/completions")
    parts = urlsplit(url)
    whole = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0 and url.isprintable()
    if not whole or parts.username is not None or parts.query or parts.fragment:  # a key stands in OPENAI_API_KEY
        raise ValueError
    return url


def parse_model(text: str) -> str:
    """Return the model's name, which is no key."""
    if looks_secret(text):
        raise ValueError
    return text


def is_path(model: str) -> bool:
    """Return whether a local model is a file of the user's, not a repository at Hugging Face."""
    return model.lower().endswith(".gguf")


def parse_local(text: str) -> str:
    """Return a path of a .gguf, or owner/name:quant."""
    name = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[-.](?![-.]))*"
    if not is_path(text) and not re.fullmatch(rf"{name}/{name}(?::[\w.-]+)?", text):
        raise ValueError
    return text


def parse_trigger(text: str) -> str:
    """Return the trigger word, or several words: anything that fits into one line of a caption."""
    if not text.isprintable() or len(text) > 100 or not any(c.isalnum() for c in text) or looks_secret(text):
        raise ValueError
    return text.rstrip(" ,;:")


def parse_metadata(text: str) -> str:
    """Return the path of the file for all captions; its ending says which of two shapes it has."""
    if not text.lower().endswith((".jsonl", ".json")):
        raise ValueError
    return text


def parse_page(text: str) -> str:
    """Return the path of a page."""
    if not text.lower().endswith((".html", ".htm")):
        raise ValueError
    return text


def parse_encoding(text: str) -> str:
    """Return the name of a text encoding; base64 and its like are a ValueError."""
    try:
        "".encode(text)
    except LookupError:
        raise ValueError from None
    return text


def parse_caption_ext(text: str) -> str:
    """Return the extension without its dot; an extension that trainers misread or that images have is a ValueError."""
    ext = text.removeprefix(".")
    # ai-toolkit trains on the raw text of .json captions since its commit 41157b46
    taken = {".json", ".jsonl", *IMAGE_SUFFIXES}
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,16}", ext) or f".{ext.lower()}" in taken:
        raise ValueError
    return ext


def parse_amount(text: str) -> Decimal:
    """Return an amount of dollars, which may be zero."""
    from decimal import Decimal

    digits = text.removeprefix("$")
    if not 0 <= float(digits) <= 1_000_000:
        raise ValueError
    return Decimal(digits)


def parse_limit(text: str) -> Decimal:
    """Return an amount of dollars above zero."""
    amount = parse_amount(text)
    if not amount:
        raise ValueError
    return amount


def parse_price(text: str) -> tuple[Decimal, Decimal]:
    """Return two amounts of dollars."""
    into, out = map(parse_amount, text.split())
    return into, out


def parse_shard(text: str) -> tuple[int, int]:
    """Return which part of a set is meant, counted from 1, and how many parts there are."""
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError
    return number, count


TEXT = Kind(str, "some text", "TEXT")
FOLDER = Kind(Path, "a folder", "FOLDER")
FILE = Kind(str, "a file, or - for standard output", "FILE")
PAGE_FILE = Kind(parse_page, "a file whose name ends in .html", "FILE")
SWITCH = Kind(bool, "", "")
SECRET = Kind(parse_key, "a key of printable ASCII characters without spaces", "")  # never a flag: others see those
URL = Kind(parse_url, "a URL such as http://localhost:11434/v1, without a user or a query", "URL")
MODEL = Kind(parse_model, "a model's name", "NAME")
GGUF = Kind(parse_local, "owner/name or owner/name:quant at Hugging Face, or a path to a .gguf", "MODEL")
STYLE = one_of("prose", "short", "tags")
TRIGGER = Kind(parse_trigger, "a word, or a few, of at most 100 characters", "WORD")
METADATA = Kind(parse_metadata, "a file whose name ends in .jsonl or .json", "FILE")
ENCODING = Kind(parse_encoding, "a name of an encoding that Python knows, such as cp1252, gb18030 or shift_jis", "NAME")
DOLLARS = Kind(parse_limit, "dollars, such as 2.50", "USD")
PRICE = Kind(parse_price, 'two numbers, dollars for a million tokens in and out, such as "0.10 0.50"', "IN OUT")
TIER = one_of("default", "flex")
FILES = Kind(str, "files", "FILE")
SHARD = Kind(parse_shard, "I/N, such as 1/8 to 8/8", "I/N")
EXTENSION = Kind(
    parse_caption_ext, "letters and digits as in txt or caption; not json, not an image's extension", "EXT"
)


@dataclass(frozen=True, slots=True)
class Spec:
    """One row of the table of settings, beside its name and default."""

    group: str
    kind: Kind
    help: str
    variable: str
    short: str


def setting(group: str, kind: Kind, help: str, default: Any = None, variable: str = "", short: str = "") -> Any:
    """Return the dataclass field of one setting. Its flag is its name; without a variable the flag is all it has."""
    spec = Spec(group, kind, help, variable, short)
    return field(default=default, repr=kind is not SECRET, metadata={"spec": spec})


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a user can set: flags, variables, --help, .env.example and the README's table come from here."""

    image_dir: Path | None = setting(WHAT, FOLDER, "folder of images, with its sub-folders")
    caption_dir: Path | None = setting(WHAT, FOLDER, "folder for the captions; beside the images when left out")
    config_dir: Path | None = setting(WHAT, FOLDER, "folder of ai-toolkit job files, prompt.txt and exclude.txt")
    caption_ext: str | None = setting(
        WHAT, EXTENSION, "extension of the caption files; else the job file's, else txt", None, "GETCAP_CAPTION_EXT"
    )
    overwrite: bool = setting(
        WHAT, SWITCH, "renew captions made with another model, prompt, style or trigger, unless edited since", False
    )
    metadata: str | None = setting(WHAT, METADATA, "also keep all captions in one file: .jsonl, or ai-toolkit's .json")
    limit: int | None = setting(WHAT, whole_number(1, 10**9), "try at most this many images, then stop")

    api_key: str = setting(HOW, SECRET, "key of the server", "", "OPENAI_API_KEY")
    base_url: str = setting(HOW, URL, "server that speaks OpenAI's API", OPENAI_URL, "OPENAI_BASE_URL")
    model: str = setting(HOW, MODEL, "vision model", "gpt-6-luna", "GETCAP_MODEL")
    local: str | None = setting(
        HOW, GGUF, "a model on this machine, no key: a .gguf, or owner/name:quant at Hugging Face; else a small one"
    )
    prompt: str | None = setting(
        HOW, TEXT, "what the model is told; else prompt.txt, else the built-in one", None, "GETCAP_PROMPT"
    )
    style: str = setting(HOW, STYLE, "what captions are: prose, short (one sentence) or tags", "prose", "GETCAP_STYLE")
    max_words: int | None = setting(
        HOW, whole_number(1, 10_000), "most words of a caption; unset: as the prompt asks", None, "GETCAP_MAX_WORDS"
    )
    trigger: str | None = setting(
        HOW, TRIGGER, "word that opens each caption; else [trigger] where a job file sets one", None, "GETCAP_TRIGGER"
    )
    max_side: int = setting(HOW, whole_number(32, 8192), "longest side in pixels that is sent", 1024, "GETCAP_MAX_SIDE")
    max_tokens: int = setting(HOW, whole_number(1, 100_000), "longest answer in tokens", 300, "GETCAP_MAX_TOKENS")
    reasoning_effort: str = setting(
        HOW, TEXT, "reasoning, paid like an answer, where the model has it", "none", "GETCAP_REASONING_EFFORT"
    )
    temperature: float | None = setting(
        HOW, decimal(0, 2, low_itself=True), "randomness; the model's own when unset", None, "GETCAP_TEMPERATURE"
    )

    max_cost: Decimal | None = setting(
        MONEY, DOLLARS, "stop before the request that could pass this; no limit when unset", None, "GETCAP_MAX_COST"
    )
    price: tuple[Decimal, Decimal] | None = setting(
        MONEY, PRICE, "dollars for a million tokens in and out, where the price is not known", None, "GETCAP_PRICE"
    )
    service_tier: str | None = setting(
        MONEY, TIER, "flex: half price where the model has it, slower answers", None, "GETCAP_SERVICE_TIER"
    )

    thread_pool: int = setting(
        PACE, whole_number(1, 1000), "workers; 2 when unset and the server is this machine", 10, "GETCAP_THREAD_POOL"
    )
    throttle_submission_rate: float | None = setting(
        PACE, decimal(0, 10_000), "most requests a second; no cap when unset", None, "GETCAP_THROTTLE_SUBMISSION_RATE"
    )
    throttle_retries: int = setting(
        PACE, whole_number(0, 100), "most retries of one image", 10, "GETCAP_THROTTLE_RETRIES"
    )
    throttle_backoff_factor: float = setting(
        PACE, decimal(0, 60), "base of the exponential backoff", 2.0, "GETCAP_THROTTLE_BACKOFF_FACTOR"
    )
    timeout: float = setting(
        PACE,
        decimal(0, 86_400),
        "longest wait for an answer in seconds; 900 with flex or --local",
        120.0,
        "GETCAP_TIMEOUT",
    )

    batch: bool = setting(BATCH, SWITCH, "ask by OpenAI's Batch API: half price, within a day; goes on if ended", False)
    batch_export: Path | None = setting(BATCH, FOLDER, "write the requests as batch files into this folder, and stop")
    batch_import: tuple[str, ...] | None = setting(
        BATCH, FILES, "write the captions that such files were answered with"
    )
    batch_megabytes: float = setting(
        BATCH, decimal(0, 200), "most megabytes of a batch file", 190.0, "GETCAP_BATCH_MEGABYTES"
    )
    image_ref: str = setting(
        BATCH,
        one_of("data", "file"),
        "images in batch files: data, or file, for an engine that reads this disk",
        "data",
    )
    shard: tuple[int, int] | None = setting(
        BATCH, SHARD, "only part I of N of the images, for machines that share a set"
    )

    dry_run: bool = setting(
        SHOW,
        SWITCH,
        "only say what would be captioned, and what it would cost: no connection, no key",
        False,
        short="-n",
    )
    report: str | None = setting(SHOW, FILE, "write outcomes as JSON lines, replacing the file; - is stdout")
    verbose: bool = setting(SHOW, SWITCH, "say more (log level DEBUG)", False, short="-v")
    quiet: bool = setting(SHOW, SWITCH, "say only what is wrong, and the summary (WARNING)", False, short="-q")
    log_level: str = setting(
        SHOW, one_of("DEBUG", "INFO", "WARNING", "ERROR"), "how much is said", "INFO", "GETCAP_LOG_LEVEL"
    )

    fix_encoding: bool = setting(
        REPAIR, SWITCH, "make captions and config files UTF-8, and repair their letters", False
    )
    encoding: str | None = setting(REPAIR, ENCODING, "with --fix-encoding: what the files are that are not UTF-8")
    review: str | bool = setting(
        REPAIR,
        PAGE_FILE,
        "find what is wrong with the captions, and show all on a page; beside them when left out",
        False,
    )
    undo: bool = setting(REPAIR, SWITCH, "put back what the last --overwrite or --fix-encoding replaced", False)

    @property
    def tier(self) -> str | None:
        """The price that answers are asked for at; None is the ordinary one."""
        return "batch" if self.batch or self.batch_export or self.batch_import else self.service_tier

    @property
    def journal_name(self) -> str:
        """The name of this run's journal: machines that share a set have one each."""
        return "journal-{}-of-{}".format(*self.shard) if self.shard else "journal"

    @property
    def engine_log(self) -> str:
        """The name of the log of this run's local engine, beside the journal."""
        return self.journal_name.replace("journal", "engine") + ".log"

    @property
    def batch_name(self) -> str:
        """The name of the folder of this run's batches, beside the journal."""
        return self.journal_name.replace("journal", BATCHES)

    @property
    def host(self) -> str:
        """The server's name and port, without what a URL may carry in secret."""
        parts = urlsplit(self.base_url)
        return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def specs() -> Iterator[tuple[dataclasses.Field[Any], Spec]]:
    """Yield each row of the table of settings."""
    for item in dataclasses.fields(Settings):
        yield item, item.metadata["spec"]


def flag_name(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse with the exit left to main, and without the values of unknown flags, which may be keys."""

    def error(self, message: str) -> Any:
        raise SettingsError(re.sub(r"explicit argument .*", "value", printable(message)) + " (see --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            self.error("unrecognized: " + (" ".join(flags) or "a word that belongs to no flag"))
        return found, unknown


def build_parser() -> Parser:
    """Return the command line of the table of settings."""
    parser = Parser(
        prog="gen-captions.py",
        usage="gen-captions.py --image-dir FOLDER [--caption-dir FOLDER] [--config-dir FOLDER] [options]",
        description="Caption a folder of images for training. Captions that exist and are not blank are left alone.",
        epilog="Each variable may stand in the environment or in a file .env; a flag wins. The key is read from "
        "OPENAI_API_KEY. Exit codes: 0 done, 1 some images failed, 2 usage or settings, 3 stopped, 130 interrupted, "
        "143 terminated.",
        allow_abbrev=False,
        add_help=False,
    )
    groups = {title: parser.add_argument_group(title) for title in (WHAT, HOW, MONEY, PACE, BATCH, SHOW, REPAIR)}
    for item, spec in specs():
        flags = filter(None, (spec.short, flag_name(item.name)))
        default = f"{item.default:g}" if isinstance(item.default, float) else item.default
        note = f" [{spec.variable}{'' if default is None else f', default {default}'}]" if spec.variable else ""
        if spec.kind is SWITCH:
            groups[spec.group].add_argument(*flags, action="store_true", help=spec.help)
        elif spec.kind is not SECRET:
            words = spec.kind.metavar.split()
            values: dict[str, Any] = {"nargs": len(words), "metavar": tuple(words)} if len(words) > 1 else {}
            values |= {"nargs": "?", "const": True} if spec.kind in {PAGE_FILE, GGUF} else {}
            values |= {"nargs": "+"} if spec.kind is FILES else {}
            groups[spec.group].add_argument(*flags, **{"metavar": words[0], **values}, help=spec.help + note)
    groups[SHOW].add_argument("-V", "--version", action="version", version=f"gen-captions {__version__}")
    groups[SHOW].add_argument("-h", "--help", action="help", help="show this and stop")
    return parser


def parse_value(source: str, kind: Kind, text: str) -> Any:
    """Return the value of a setting's text, or raise the error that names source, value and what is allowed."""
    try:
        return kind.parse(text.strip())
    except (ValueError, ArithmeticError):  # the latter is Decimal's
        shown = "the value" if kind is SECRET or looks_secret(text) else f'"{shorten(text, 80)}"'
        raise SettingsError(f"{source}: {shown} is not allowed; allowed: {kind.allowed}") from None


def check_names(names: Iterable[str]) -> None:
    """Raise the error for a variable that looks like ours and is none: a setting mistyped is a setting lost."""
    known = {spec.variable for _, spec in specs()}
    for name in sorted(names):
        if name.startswith("GETCAP_") and name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise SettingsError(f"{printable(name)}: there is no such setting; {hint}")


def resolve_settings(
    flags: Mapping[str, str | bool | list[str] | None], environ: Mapping[str, str], dotenv: Mapping[str, str | None]
) -> Settings:
    """Return the settings by precedence: flag, environment, .env, default. A variable left blank counts as unset."""
    check_names({*environ, *dotenv})
    chosen: dict[str, Any] = {}
    for item, spec in specs():
        flag = flags.get(item.name)
        if isinstance(flag, list) and spec.kind is FILES:
            chosen[item.name] = tuple(flag)
            continue
        flag = " ".join(flag) if isinstance(flag, list) else flag
        sources = [(flag_name(item.name), flag), (spec.variable, environ.get(spec.variable))]
        sources.append((f"{spec.variable} in .env", dotenv.get(spec.variable)))
        if isinstance(flag, str) and not flag.strip():
            raise SettingsError(f"{flag_name(item.name)}: is blank; allowed: {spec.kind.allowed}")
        for source, text in sources:
            if isinstance(text, bool):
                chosen[item.name] = text
            elif text and text.strip():
                chosen[item.name] = parse_value(source, spec.kind, text)
                break
    if chosen.get("local"):
        chosen = {"timeout": LOCAL_TIMEOUT_S, **chosen, **choose_local(chosen["local"], flags)}
    if "thread_pool" not in chosen and is_this_machine(chosen.get("base_url", OPENAI_URL)):
        chosen["thread_pool"] = LOCAL_WORKERS
    if "timeout" not in chosen and chosen.get("service_tier") == "flex":
        chosen["timeout"] = FLEX_TIMEOUT_S
    if chosen["verbose"] and chosen["quiet"]:
        raise SettingsError("-v and -q: take one of them")
    return Settings(**chosen)


def choose_local(local: str | bool, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that --local implies, whatever variables say of another server."""
    for name in ("model", "base_url", "service_tier", "price", "max_cost"):
        if flags.get(name):
            raise SettingsError(f"--local and {flag_name(name)}: take one of them")
    local = LOCAL_MODEL if local is True else str(local)
    name = os.path.basename(local).removesuffix(".gguf") if is_path(local) else local
    server = {"local": local, "model": name, "base_url": LOCAL_URL, "api_key": ""}
    return server | dict.fromkeys(("service_tier", "price", "max_cost"))


def is_this_machine(url: str) -> bool:
    """Return whether a server at this URL runs on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def is_openai(url: str) -> bool:
    """Return whether the server at this URL is OpenAI itself."""
    return bool(re.search(r"(?:^|\.)api\.openai\.com$", urlsplit(url).hostname or ""))


def read_text(path: Path) -> str:
    """Return a text file of the user's, without BOM; raises the SettingsError that says what is wrong with it."""
    shown = printable(str(path))
    try:
        if path.exists() and not path.is_file():
            raise SettingsError(f"{shown}: is no file")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise SettingsError(f"{shown}: cannot be read: {error.strerror}") from None
    if "\0" in text:  # PowerShell 5.1 writes UTF-16 for `echo X > .env`, older editors the local code page
        raise SettingsError(
            f"{shown}: is not saved as UTF-8. Save it again as UTF-8: in Notepad with 'Save as' and Encoding UTF-8; "
            "in PowerShell with Set-Content -Encoding utf8"
        )
    return text


def read_dotenv(folders: Sequence[str | Path]) -> dict[str, str | None]:
    """Return what the first `.env` in these folders says. Raises SettingsError."""
    path = next(filter(os.path.isfile, (os.path.join(folder, ".env") for folder in folders)), None)
    if path is None:
        return {}
    from dotenv import dotenv_values

    return dotenv_values(stream=StringIO(read_text(Path(path))), interpolate=False)


def read_settings(argv: Sequence[str] | None) -> Settings:
    """Return the settings of this process. Raises SettingsError; --help and --version exit."""
    flags = vars(build_parser().parse_args(argv))
    return resolve_settings(flags, os.environ, read_dotenv(["", Path(__file__).resolve().parent]))


# ---------------------------------------------------------------------------------------------------- Data


@dataclass(frozen=True, slots=True)
class Entry:
    """What the journal says of one image: what was asked, of which bytes, and what became of it."""

    outcome: str = ""  # captioned, refused, failed, repaired, metadata
    question: str = ""  # fingerprint of model and prompt: what a refusal answers
    recipe: str = ""  # fingerprint of those and the style: what a caption is made from, but for its trigger
    trigger: str = ""
    image_sha256: str = ""
    image_size: int = 0
    image_mtime_ns: int = 0
    caption_sha256: str = ""
    model: str = ""
    usd: float = 0.0  # 0 where the price is not known
    result_id: str = ""  # what a batch calls the answer: it may be read twice, and costs once


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with one file, or with the set: its kind is mostly one of FINDINGS."""

    kind: str
    path: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One image that needs a caption. Paths are strings: 100,000 of them are light and keep undecodable bytes."""

    image: str
    caption: str
    replaces: Entry | None = None  # the caption of ours that stands there
    trigger_only: bool = False  # nothing but its trigger is out of date, so that nothing need be asked


@dataclass(frozen=True, slots=True)
class Trigger:
    """What opens each caption, and the word that it stands for, blank when there is none."""

    put: str = ""
    word: str = ""
    source: str = "no job file sets one"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the captions of this run are made from, and where that comes from."""

    prompt: str  # with {trigger} {name} {folder} {caption} {exclude} to be filled in for each image
    prompt_source: str
    question: str  # see Entry
    identity: str  # fingerprint of all that a caption is made from, but for its trigger
    style: str = "prose"
    max_words: int | None = None
    exclude: tuple[str, ...] = ()
    trigger: Trigger = Trigger()
    caption_ext: str = "txt"
    ext_source: str = "the default"
    is_own_prompt: bool = False  # the user's: only that can name the trigger
    architecture: str = ""  # of the model that is trained
    remarks: tuple[str, ...] = ()  # what the user should know about the config folder
    findings: tuple[Finding, ...] = ()  # why the trainer would not read the captions


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as the server counts them."""

    prompt: int = 0
    answer: int = 0
    cached: int = 0  # of the prompt, read from a cache at a lower price
    cache_writes: int = 0  # of the prompt, written to one at a higher price
    is_whole: bool = True  # whether the server said all of it in numbers that can be

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt,
            self.answer + other.answer,
            self.cached + other.cached,
            self.cache_writes + other.cache_writes,
            self.is_whole and other.is_whole,
        )


@dataclass(frozen=True, slots=True)
class Written:
    """The caption is on disk. Each note is its kind and its detail: something to look at."""

    job: Job
    text: str
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Repaired:
    """The file is UTF-8 now; the kind says what it was."""

    path: str
    kind: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """The image was left alone."""

    path: str
    reason: str
    caption: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The image, or the folder, got no caption. `reason` is one of a few names; `detail` says what to do."""

    path: str
    reason: str
    detail: str
    by_server: bool = False


Outcome = Written | Repaired | Skipped | Failed


class StopRun(Exception):  # noqa: N818 - it is what happens, like StopIteration
    """Nothing further can succeed: no new request is sent, what is in flight is kept."""


class FailImage(Exception):  # noqa: N818
    """This image fails; the rest goes on."""

    def __init__(self, reason: str, detail: str, *, by_server: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.by_server = by_server


class TryAgain(FailImage):
    """This image fails unless a later try succeeds; the server may have named the shortest wait."""

    def __init__(self, reason: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason, detail, by_server=True)
        self.retry_after_s = retry_after_s


class CutOff(FailImage):
    """The answer met the token limit before its end."""


# --------------------------------------------------------------------------------------------------- Files

# a pipe would wait for its writer without O_NONBLOCK, which Windows has not, as others have no O_BINARY
READ_ONLY = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
BLANKS = b" \t\r\n\v\f\0"  # with the zero bytes that a power cut can leave
BOM = b"\xef\xbb\xbf"
LARGEST_FILE = 256 * 1024 * 1024
TEMPORARY = ".gc-"  # trainers pass over names that begin with a dot
OTHER_MACHINE_S = 3600.0  # after which a temporary file of another machine is nobody's: clocks differ
ONE_FILE = {errno.ENAMETOOLONG, errno.EPERM, errno.EISDIR}  # what is wrong with one caption's place, not with all


def has_text(path: str) -> bool:
    """Return whether the file holds anything but blanks. Raises OSError when it is missing or cannot be read."""
    handle = os.open(path, READ_ONLY)
    try:
        if os.read(handle, 4096).removeprefix(BOM).strip(BLANKS):
            return True
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is no file", path)
        return any(chunk.strip(BLANKS) for chunk in iter(lambda: os.read(handle, 65536), b""))
    finally:
        os.close(handle)


def open_regular(path: str, flags: int) -> int:
    """Open a file for reading; a pipe or device, which would wait for ever, is a FailImage, so is a giant."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST_FILE:
        return handle
    os.close(handle)
    if stat.S_ISREG(status.st_mode):
        raise FailImage("file too large", f"{status.st_size >> 20} MiB, at most {LARGEST_FILE >> 20}: shrink it first")
    raise FailImage("not a file", "a pipe or a device: take it out")


def read_image(path: str) -> tuple[bytes, int]:
    """Return an image file's bytes and the time of its last change in ns; raises FailImage."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        raise FailImage("unreadable file", str(error.strerror)) from error


@functools.cache
def this_machine() -> str:
    """Return a few letters that stand for this machine among those that share a folder."""
    import socket

    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def is_abandoned(name: str, modified: float, now: float) -> bool:
    """Return whether a temporary file was left by a run that died: each lives for milliseconds."""
    owner = re.fullmatch(rf"{re.escape(TEMPORARY)}(\d+)-(?:(\w+)-)?\w+", name)
    if owner is None:
        return False
    if owner[2] and owner[2] != this_machine():
        return now - modified > OTHER_MACHINE_S
    if now - modified > 60:
        return True
    if os.name == "nt":  # there os.kill ends the process it asks about
        return False
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    # a container's processes have the same number each time
    return int(owner[1]) == os.getpid() and now - modified > 2


def remove_abandoned(folder: str, names: Iterable[str] | None = None) -> None:
    """Remove the temporary files of dead runs from a folder, whose names may be known already."""
    with contextlib.suppress(OSError):
        names = os.listdir(folder or ".") if names is None else names
    for name in names or ():
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):  # another run may be quicker to clean up
            if name.startswith(TEMPORARY) and is_abandoned(name, os.lstat(path).st_mtime, time.time()):
                os.unlink(path)


def prepare_folder(folder: str) -> str:
    """Make a caption folder ready: it exists, can be written to, and holds no temporary file of a dead run.

    Returns what is in the way, blank when nothing is: known before anything is paid for that could not be kept.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        names = os.listdir(folder)
    except OSError as error:
        return error.strerror or str(error)
    remove_abandoned(folder, names)
    return "" if os.access(folder, os.W_OK | os.X_OK) else "may not be written to"


def list_names(path: str) -> set[str]:
    """Return the names in a folder, none when it does not exist yet. Raises OSError."""
    try:
        return set(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):  # the latter is said when the folder is to be made
        return set()


def has_caption(path: str) -> bool:
    """Return whether a caption stands there, blank ones and none at all aside; one that cannot be read counts."""
    try:
        return has_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def open_locked(path: str, *, shared: bool = False) -> int:
    """Return the descriptor of a file that is appended to, by this run only. Raises OSError; StopRun if another has it.

    Others may have it too where the lock is shared.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    with contextlib.suppress(ImportError):  # Windows has no fcntl; some network folders have no locks
        import fcntl

        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise StopRun(f"{printable(path)}: another run is at work there; wait for its end") from None
        except OSError:
            log.debug("%s: cannot be locked", printable(path))
    return handle


def hash_file(path: str) -> str:
    """Return a file's SHA-256 in hex. Raises OSError."""
    with open(path, "rb", opener=lambda name, _: os.open(name, READ_ONLY)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: str, fill: Callable[[IO[bytes]], Any], place: Callable[[str, str], Any] = os.replace) -> Any:
    """Write a file whole or not at all: `fill` writes it under another name, `place` gives it its own. Raises OSError.

    The name is taken only when the bytes are on the disk; permissions are what the umask gives, so that a trainer of
    another user can read it. Returns what `place` returns.
    """
    temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY}{os.getpid()}-{this_machine()}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        return place(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def put_in_place(temporary: str, path: str) -> bool:
    """Give a whole file its name; False when a caption has come to stand there. Raises OSError."""
    try:
        os.link(temporary, path)  # unlike a rename it never replaces anything
    except OSError as error:  # a blank caption stands there, or the file system has no hard links
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT}:
            raise
    else:
        return True
    if has_caption(path):
        return False
    os.replace(temporary, path)
    return True


def put_instead(temporary: str, path: str) -> None:
    """Replace a file by a whole one, which gets its permissions and its owner. Raises OSError."""
    status = os.stat(path)
    os.chmod(temporary, stat.S_IMODE(status.st_mode))
    with contextlib.suppress(OSError, AttributeError):  # only the superuser may give files away; Windows has no owners
        os.chown(temporary, status.st_uid, status.st_gid)
    os.replace(temporary, path)


def name_below(root: str | Path, path: str) -> str:
    """Return a path as seen from a folder that it lies in, with slashes."""
    return path.removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def path_below(root: str | Path, name: str) -> str:
    """Return the path that has such a name below a folder."""
    return os.path.join(root, *name.split("/"))


def encode_caption(text: str) -> bytes:
    """Return a caption file's bytes: one line of UTF-8 without BOM, ended by a newline."""
    return text.encode() + b"\n"


def hash_text(text: str) -> str:
    """Return the SHA-256 in hex of a caption's file."""
    return hashlib.sha256(encode_caption(text)).hexdigest()


def write_caption(path: str, data: bytes, replaces: str = "") -> bool:
    """Write a caption whole or not at all. Raises OSError.

    False when another caption than the one with the SHA-256 `replaces` stands there by now: it is left alone.
    """

    def place(temporary: str, path: str) -> bool:
        if not replaces or not os.path.exists(path):  # deleted by now, to have it made anew
            return put_in_place(temporary, path)
        if hash_file(path) != replaces:
            return False
        put_instead(temporary, path)
        return True

    return bool(write_whole(os.path.realpath(path) if replaces else path, lambda file: file.write(data), place))


# ------------------------------------------------------------------------------------------------- Journal

STATE_FOLDER = ".gen-captions"  # trainers pass over it
KEPT, UNDONE, RESTORED = "replaced", "undone", "restored"  # zips of originals, by what became of them
LATEST = 512 * 1024  # bytes at the journal's end
ASKED = rb'(?m)^\{"time": "([^"]{25})".*"attempts": [1-9]'  # when an answer's line was written
PAUSE_S = 60.0  # between two runs, not two answers
INDEX = ".index.json"  # no kept file is called so: hidden names are passed over


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that stand for these values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def parse_entry(line: bytes) -> tuple[str, Entry] | None:
    """Return the caption's name and the entry of a journal line, None for a line that a crash has torn."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("caption"), str):
        return None
    values = {item.name: found.get(item.name, item.default) for item in dataclasses.fields(Entry)}
    if not all(isinstance(value, str | int | float) for value in values.values()):
        return None
    # most lines share these, and 100,000 of them are held
    same = {name: sys.intern(str(values[name])) for name in ("outcome", "question", "recipe", "trigger", "model")}
    return found["caption"], Entry(**{**values, **same})


class Journal:
    """What was asked and paid for: lines of JSON in `.gen-captions` of the caption folder, only ever added to.

    It tells our captions from those that a person edited or another tool made. Machines that share a set write a
    journal each, and read all.
    """

    def __init__(self, root: str | Path, name: str = "journal") -> None:
        self.folder = os.path.join(root, STATE_FOLDER)
        self._root = os.path.join(root, "")
        self._path = os.path.join(self.folder, f"{name}.jsonl")
        self._handle = self._whole = -1
        self._lock = threading.Lock()
        self._torn = False  # whether the last line may lack its end
        self._read = -1  # bytes of this journal, when its history was read

    @functools.cached_property
    def history(self) -> dict[str, list[Entry]]:
        """The entries of each caption, oldest first, as they were when first asked for. Raises SettingsError."""
        found: dict[str, list[Entry]] = {}
        shown = self.folder
        self._read = self._size()
        try:
            names = [name for name in list_names(self.folder) if re.fullmatch(r"journal[\w-]*\.jsonl", name)]
            paths = [os.path.join(self.folder, name) for name in names]
            for path in sorted(paths, key=os.path.getmtime):
                shown = path
                with open(path, "rb", opener=lambda path, _: os.open(path, READ_ONLY)) as file:
                    for caption, entry in filter(None, map(parse_entry, file)):
                        found.setdefault(caption, []).append(entry)
        except OSError as error:
            raise SettingsError(f"{printable(shown)}: cannot be read: {error.strerror}") from None
        return found

    def _size(self) -> int:
        try:
            return os.path.getsize(self._path)
        except OSError:
            return 0

    def name(self, caption: str) -> str:
        """Return the name that a caption has in the journal: its path below the caption folder."""
        return name_below(self._root, caption)

    def path(self, name: str) -> str:
        """Return the caption's path by its name in the journal."""
        return path_below(self._root, name)

    def past(self, caption: str) -> Sequence[Entry]:
        """Return what is known of a caption, oldest first."""
        return self.history.get(self.name(caption), ()) if self.history else ()

    def open(self, *, as_read: bool = False) -> None:
        """Get ready to write. Raises OSError, and StopRun when another run writes, or has since `history` was read."""
        os.makedirs(self.folder, exist_ok=True)
        whole = os.path.join(self.folder, "journal.jsonl")
        if self._path != whole:  # parts of a set may be at work beside each other, and not beside a run of it all
            self._whole = open_locked(whole, shared=True)
        self._handle = open_locked(self._path)
        size = os.fstat(self._handle).st_size
        if as_read and self._read not in {-1, size}:
            raise StopRun(f"{printable(self._path)}: another run wrote there since this one looked; run again")
        os.lseek(self._handle, max(0, size - 1), os.SEEK_SET)
        self._torn = size > 0 and os.read(self._handle, 1) != b"\n"  # by a crash

    def append(self, caption: str, entry: Entry, **more: Any) -> None:
        """Write one entry, and what else is worth knowing of it, to the disk. Raises OSError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": now, "caption": self.name(caption), **more, **dataclasses.asdict(entry)}
        data = json.dumps(line).encode() + b"\n"
        with self._lock:
            data = b"\n" * self._torn + data
            self._torn = True
            while data:  # a full disk takes a part first
                data = data[os.write(self._handle, data) :]
            self._torn = False
        os.fsync(self._handle)

    def pace(self) -> float:
        """Return how many images a second were answered when the journal was last at work, 0 when that is not known."""
        try:
            with open(self._path, "rb", opener=lambda path, _: os.open(path, READ_ONLY)) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - LATEST))
                stamps = [datetime.fromisoformat(found.decode()) for found in re.findall(ASKED, file.read())]
        except (OSError, ValueError):
            return 0.0
        stamps.reverse()
        gaps = [(later - earlier).total_seconds() for later, earlier in itertools.pairwise(stamps)]
        busy_s = list(itertools.takewhile(lambda gap: 0 <= gap < PAUSE_S, gaps))
        return len(busy_s) / sum(busy_s) if sum(busy_s) else 0.0

    def close(self) -> None:
        """Let go of the file and its lock."""
        for handle in (self._handle, self._whole):
            if handle >= 0:
                os.close(handle)
        self._handle = self._whole = -1


def new_stamp() -> str:
    """Return the name that the zips of one run share: its time, so that the last is the greatest."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")


def keep_originals(root: str, paths: Iterable[str], kind: str, stamp: str) -> str:
    """Keep the bytes, times and permissions of files below `root` in one zip, and return its path. Raises OSError."""
    import zipfile

    index: list[Any] = []

    def fill(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                try:
                    status, data = os.stat(path), Path(path).read_bytes()
                except FileNotFoundError:  # whoever is to replace it will name it
                    continue
                name = os.path.relpath(path, root).replace(os.sep, "/")
                member = zipfile.ZipInfo(name.encode("utf-8", "backslashreplace").decode())
                archive.writestr(member, data, zipfile.ZIP_DEFLATED)
                index.append([name, status.st_mtime_ns, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid])
            archive.writestr(INDEX, json.dumps(index))

    target = os.path.join(root, STATE_FOLDER, f"{kind}-{stamp}.zip")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    write_whole(target, fill)
    return target


def newest_originals(root: str) -> str:
    """Return the zip of originals that the last run kept below `root`, blank when there is none."""
    folder = os.path.join(root, STATE_FOLDER)
    try:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise SettingsError(f"{printable(folder)}: cannot be read: {error.strerror}") from None
    newest = max((name for name in names if name.startswith(f"{KEPT}-") and name.endswith(".zip")), default="")
    return newest and os.path.join(folder, newest)


# ---------------------------------------------------------------------------------------------------- Plan

LONGEST_NAME = 255  # bytes, on every common file system


def caption_name(image_name: str, ext: str) -> str:
    """Return the caption's file name, found as ai-toolkit finds it: the image's stem and the extension."""
    return f"{image_name[: image_name.rindex('.')]}.{ext}"


def find_clashes(names: Iterable[str]) -> dict[str, str]:
    """Return each image name of one folder that shares its caption file with another, and that other name.

    Stems are compared without letter case (Windows, macOS) and in NFC (macOS stores names decomposed).
    """
    first: dict[str, str] = {}
    clashes: dict[str, str] = {}
    for name in names:
        stem = name[: name.rindex(".")]
        key = stem.lower() if stem.isascii() else unicodedata.normalize("NFC", stem).casefold()
        other = first.setdefault(key, name)
        if other is not name:
            clashes[name] = other
            clashes.setdefault(other, name)
    return clashes


@dataclass(frozen=True, slots=True)
class Listing:
    """The names in one folder, by what they are; `broken` look like images and are no files."""

    images: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)


def list_folder(path: str) -> Listing:
    """Return what is in a folder, without hidden names. Raises OSError."""
    found = Listing()
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == "." or name == "_controls":  # ai-toolkit passes over both
                continue
            is_image = name[name.rfind(".") :].lower() in IMAGE_SUFFIXES
            try:
                if entry.is_dir():
                    (found.links if entry.is_symlink() else found.folders).append(name)
                elif is_image:
                    (found.images if entry.is_file() else found.broken).append(name)
            except OSError:  # a link that leads to itself
                if is_image:
                    found.broken.append(name)
            if not is_image:
                found.others.add(name)
    for names in (found.images, found.broken, found.folders, found.links):
        names.sort()
    return found


def keep_existing(image: str, caption: str, has_caption: bool) -> Job | Skipped | Failed:
    """Decide about an image without looking at what is known of it: a caption that exists is left alone."""
    return Skipped(image, "has a caption", caption) if has_caption else Job(image, caption)


def is_same_image(path: str, entry: Entry) -> bool:
    """Return whether the file holds the bytes that the entry was made from; those of an unchanged file are not read."""
    try:
        status = os.stat(path)
        if (status.st_size, status.st_mtime_ns) == (entry.image_size, entry.image_mtime_ns):
            return True
        return status.st_size == entry.image_size and hash_file(path) == entry.image_sha256
    except OSError:
        return False  # the run will say what is wrong with it


def judge_image(
    image: str, caption: str, has_caption: bool, *, journal: Journal, recipe: Recipe, overwrite: bool
) -> Job | Skipped | Failed:
    """Decide about an image by what the journal knows of it.

    What was refused is not asked again with the same model and prompt. With `overwrite`, a caption that we wrote and
    nobody touched since is renewed when its recipe or its image has changed. Raises OSError.
    """
    if has_caption and not overwrite:
        return keep_existing(image, caption, has_caption)
    past = journal.past(caption)
    entry, trigger_only = None, False
    if has_caption:
        ours = [found for found in past if found.outcome == "captioned"]
        now = hash_file(caption)
        entry = next((found for found in reversed(ours) if found.caption_sha256 == now), None)
        if entry is None:
            return Skipped(image, "edited by hand" if ours else "made elsewhere", caption)
        trigger_only = entry.recipe == recipe.identity and is_same_image(image, entry)
        if trigger_only and entry.trigger == recipe.trigger.put:
            return Skipped(image, "up to date", caption)
    refused = next((found for found in past if found.outcome == "refused" and found.question == recipe.question), None)
    if refused and not trigger_only and is_same_image(image, refused):
        detail = "with this model and prompt; caption it by hand, or change one of them"
        return Failed(image, "refused before", detail)
    return Job(image, caption, entry, trigger_only)


Judge = Callable[[str, str, bool], Job | Skipped | Failed]


def plan_image(name: str, folder: str, target: str, ext: str, names: set[str], judge: Judge) -> Job | Skipped | Failed:
    """Decide about one image of a folder, given its caption folder's path and names. Both paths end in a separator."""
    file_name = caption_name(name, ext)
    image, caption = folder + name, target + file_name
    if len(file_name) > LONGEST_NAME // 4 and len(os.fsencode(file_name)) > LONGEST_NAME:
        return Failed(image, "name too long", f"its caption file's name would be over {LONGEST_NAME} bytes: rename it")
    try:
        return judge(image, caption, file_name in names and has_text(caption))
    except OSError as error:
        return Failed(image, "unreadable caption", f"{printable(caption)}: {error.strerror}")


def plan_folder(
    image_dir: Path, caption_dir: Path | None, ext: str, judge: Judge = keep_existing
) -> Iterator[Job | Skipped | Failed]:
    """Yield what is to be done with each image below `image_dir`, folder by folder, each folder sorted.

    Only one folder's names are held at a time. Real folders come before links to folders, and none is entered
    twice, so loops end and an image is found under its real name.
    """
    waiting, seen = deque([""]), set()
    while waiting:
        relative = waiting.popleft()
        folder = os.path.join(image_dir, relative, "")
        target = os.path.join(caption_dir or image_dir, relative, "")
        try:
            status = os.stat(folder)
            if status.st_ino and (status.st_dev, status.st_ino) in seen:  # some network folders number nothing
                continue
            seen.add((status.st_dev, status.st_ino))
            found = list_folder(folder)
            captions = list_names(target) if caption_dir else found.others
        except OSError as error:
            yield Failed(folder, "unreadable folder", f"{error.strerror}: check its permissions")
            continue
        waiting.extendleft(os.path.join(relative, name) for name in reversed(found.folders))
        waiting.extend(os.path.join(relative, name) for name in found.links)
        for name in found.broken:
            yield Failed(folder + name, "not a file", "a link that leads nowhere, a pipe or a device")
        clashes = find_clashes(found.images)
        for name in found.images:
            if other := clashes.get(name):
                detail = f"{printable(other)} would use it too: rename one of them"
                yield Failed(folder + name, "shared caption file", detail)
            else:
                yield plan_image(name, folder, target, ext, captions, judge)


def check_folder(name: str, path: Path) -> None:
    """Raise the SettingsError that names a folder that cannot be used, and the setting it comes from."""
    shown = f"{flag_name(name)}: {printable(str(path))}"
    try:
        os.scandir(path).close()
    except FileNotFoundError:
        raise SettingsError(f"{shown}: there is no such folder") from None
    except OSError as error:
        raise SettingsError(f"{shown}: is not a folder that can be read: {error.strerror}") from None


def check_folders(settings: Settings) -> Path:
    """Return the image folder, or raise the SettingsError that names the folder that cannot be used."""
    if settings.image_dir is None:
        raise SettingsError("--image-dir: is missing; name the folder of images")
    for name in ("image_dir", "caption_dir", "config_dir"):
        path = getattr(settings, name)
        if path is not None and (name == "image_dir" or os.path.lexists(path)):
            check_folder(name, path)
    return settings.image_dir


# -------------------------------------------------------------------------------------------------- Recipe

PROMPTS = {
    "prose": """\
Write one caption for this image, for training an image generator: plain English prose, one paragraph, \
at most {words} words, fewer for a simple image.
Start with the main subject and its action. Continue with clothing or materials and their colours, other objects, \
where things are, the setting, the lighting, the shot type and camera angle.{medium}
Write definite facts, one exact word per colour, material and pose. Count up to five; beyond that write "many". \
Left and right are the viewer's. Describe people by visible attributes. Copy large readable text exactly, in double \
quotes. Skip whatever is unclear or absent.
Output only the caption.""",
    "short": """\
Describe this image in one plain English sentence of at most {words} words: the main subject and its action first, \
then colours and clothing or material, the setting, the shot type. Use only what is clearly visible.
Output only the sentence.""",
    "tags": """\
Write tags for this image: one line, lowercase, separated by commas, at most {words} words in all, tags of one to \
three words, each once.
Order: number and kind of subjects, clothing, pose, expression, framing, objects, setting, lighting.
Tag only what is clearly visible.
Output only the tags.""",
}
MEDIUM = " End with the medium, such as photo, drawing or 3D render."  # not where that must stay unsaid
MEDIA = r"(?i)photo|draw|paint|illustrat|render|style|watercolo|\bart\b|anime|cartoon|sketch|comic"
USUAL_WORDS = {"prose": 90, "short": 35, "tags": 60}  # what the prompts ask for; only --max-words is held to
UNSAID = "Leave these unsaid, they are already known: {exclude}."
PLACEHOLDERS = ("trigger", "name", "folder", "caption", "exclude")
TRAINERS_MARK = "[trigger]"  # ai-toolkit fills it in, or deletes it where no trigger is set
LARGEST_JOB_FILE = 4 * 1024 * 1024  # whatever is larger is data


@dataclass(frozen=True, slots=True)
class Dataset:
    """One dataset of an ai-toolkit job file, as the trainer reads it; of a process without any, its trigger alone."""

    file: str
    folder: str = ""
    trigger: str = ""
    caption_ext: str = "txt"
    is_reg: bool = False
    architecture: str = ""  # of the model that is trained


def placeholders(template: str, source: str) -> set[str]:
    """Return which placeholders a prompt uses. Raises the SettingsError that names one that is none."""
    allowed = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    advice = f"allowed: {allowed}; literal braces are written {{{{ and }}}}"
    try:
        fields = [found[1:] for found in Formatter().parse(template) if found[1] is not None]
    except ValueError as error:
        raise SettingsError(f"{source}: {error}; {advice}") from None
    for name, spec, conversion in fields:
        if name not in PLACEHOLDERS or spec or conversion:
            raise SettingsError(f"{source}: {{{shorten(str(name), 40)}}} is no placeholder; {advice}")
    return {str(name) for name, _, _ in fields}


def fill_prompt(recipe: Recipe, image: str, caption: str) -> str:
    """Return the prompt for one image. `caption` is what its caption file says so far."""
    return recipe.prompt.format(
        trigger=recipe.trigger.word,
        name=os.path.splitext(os.path.basename(image))[0],
        folder=os.path.basename(os.path.dirname(os.path.abspath(image))),
        caption=caption,
        exclude=", ".join(recipe.exclude),
    )


def build_prompt(style: str, max_words: int | None, exclude: Sequence[str], own: str | None, source: str) -> str:
    """Return the prompt with its placeholders: the user's own or the style's, with the rules that it lacks."""
    medium = "" if re.search(MEDIA, " ".join(exclude)) else MEDIUM
    words = str(max_words or USUAL_WORDS[style])
    template = own or PROMPTS[style].replace("{words}", words).replace("{medium}", medium)
    *lines, last = template.split("\n")
    rules = [f"Use at most {max_words} words."] if own and max_words else []
    rules += [UNSAID] if exclude and "exclude" not in placeholders(template, source) else []
    return "\n".join([*lines, last, *rules] if own else [*lines, *rules, last])


def as_text(value: Any, where: str, remarks: list[str]) -> str:
    """Return a YAML value as text; what YAML 1.1 made of a word without quotes is remarked on."""
    if value is None or isinstance(value, str):
        if value and not value.isprintable():
            remarks.append(f"{where}: holds a control character; a Windows path belongs in single quotes")
        return value or ""
    kind = {bool: "yes or no", int: "a number", float: "a number", list: "a list"}.get(type(value), "no text")
    shown = f" ({shorten(str(value), 40)})" if isinstance(value, bool | int | float) else ""
    remarks.append(f"{where}: YAML reads it as {kind}{shown}; put it in quotes")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""


def read_architecture(model: Any) -> str:
    """Return the name of the model that a process trains, as its job file has it: arch, an old flag, or the path."""
    if not isinstance(model, dict):
        return ""
    flags = (flag.removeprefix("is_").replace("xl", "sdxl") for flag in ("is_xl", "is_flux") if model.get(flag) is True)
    path = str(model.get("name_or_path") or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
    return str(model.get("arch") or next(flags, path))


def read_dataset(found: Mapping[str, Any], inherited: Any, file: str, name: str, remarks: list[str]) -> Dataset:
    """Return a dataset of a job file, with the defaults of ai-toolkit's DatasetConfig (toolkit/config_modules.py)."""

    def text(key: str, value: Any) -> str:
        return as_text(value, f"{file}: {key}", remarks).replace("[name]", name)

    word = found.get("trigger_word")
    path = found.get("dataset_path") or found.get("folder_path")
    old_ext = found.get("caption_type")  # wins, and gets no dot
    ext = text("caption_ext", found.get("caption_ext")) or "txt"
    if old_ext is not None:
        ext = text("caption_type", old_ext)
        if not ext.startswith("."):
            remarks.append(f'{file}: caption_type: the trainer adds no dot to it; write caption_ext: "{ext}" instead')
    return Dataset(
        file=file,
        folder=text("folder_path", path),
        trigger=text("trigger_word", inherited if word is None else word).strip(),
        caption_ext=ext,
        is_reg=found.get("is_reg") is True,
    )


def read_job(document: Any, file: str, remarks: list[str]) -> list[Dataset]:
    """Return the datasets of a parsed job file, none when it is something else."""
    config = document.get("config") if isinstance(document, dict) and "job" in document else None
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(processes, list):
        return []
    name = config["name"] if isinstance(config.get("name"), str) else ""
    datasets: list[Dataset] = []
    for process in filter(lambda item: isinstance(item, dict), processes):
        word = process.get("trigger_word")
        own = process.get("datasets")
        own = [found for found in own if isinstance(found, dict)] if isinstance(own, list) else []
        read = [read_dataset(found, word, file, name, remarks) for found in own or [{}]]
        architecture = read_architecture(process.get("model"))
        datasets += [dataclasses.replace(dataset, architecture=architecture) for dataset in read]
    return datasets


def parse_documents(text: str, file: str) -> list[Any]:
    """Return what a YAML or JSON file holds. Raises the SettingsError that names file, line and column."""
    import yaml

    try:
        if file.lower().endswith(".json"):
            return [json.loads(text)]
        return list(yaml.safe_load_all(text))
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except yaml.constructor.ConstructorError as error:
        if not re.search(r"(?m)^[\"']?job[\"']?\s*:", text):  # another program's file, with tags of its own
            return []
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SettingsError(f"{file}: {where}{shorten(error.problem or 'an unknown tag', 120)}") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, shorten(error.problem or "broken YAML", 120)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        advice = "; a Windows path belongs in single quotes" if "escape" in problem else ""
        raise SettingsError(f"{file}: {where}{problem}{advice}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # characters, dates, depths that cannot be
        raise SettingsError(f"{file}: cannot be read as YAML or JSON: {shorten(str(error), 160)}") from None


def fill_variables(text: str, environ: Mapping[str, str], file: str, remarks: list[str]) -> str:
    """Return a job file's text with `${NAME}` filled in, in comments too, as ai-toolkit does before it parses."""

    def value(match: re.Match[str]) -> str:
        if re.search(r"(?i)key|token|secret|passw", match[1]):
            return match[0]  # nothing that is read here needs a secret
        if match[1] not in environ:
            remarks.append(f"{file}: ${{{match[1]}}} is not set; ai-toolkit will refuse the file")
        return environ.get(match[1], match[0])

    return re.sub(r"\$\{([^}\n]+)\}", value, text)


def read_job_files(folder: Path, environ: Mapping[str, str]) -> tuple[list[Dataset], list[str]]:
    """Return the datasets of all job files in a folder, and what to remark on. Raises SettingsError.

    Sub-folders are not looked into: ai-toolkit's own has dozens of example files.
    """
    datasets: list[Dataset] = []
    remarks: list[str] = []
    for name in sorted(os.listdir(folder)):
        path = folder / name
        is_ours = name[0] != "." and name.lower().endswith((".yaml", ".yml", ".json")) and path.is_file()
        if is_ours and path.stat().st_size <= LARGEST_JOB_FILE:
            shown = printable(str(path))
            said: list[str] = []
            text = fill_variables(read_text(path), environ, shown, said)
            try:
                found = [item for document in parse_documents(text, shown) for item in read_job(document, shown, said)]
                for item in found:
                    os.path.realpath(item.folder)
            except (ValueError, RecursionError, MemoryError) as error:  # digits, characters, depths that cannot be
                raise SettingsError(f"{shown}: cannot be read as a job file: {shorten(str(error), 120)}") from None
            datasets += found
            remarks += said if found else []
    return datasets, list(dict.fromkeys(remarks))  # one dataset may stand there for each resolution


def last_part(path: str) -> str:
    """Return the last name of a path of any system, in one letter case."""
    return (re.split(r"[\\/]+", path.rstrip("\\/")) or [""])[-1].casefold()


def match_datasets(datasets: Sequence[Dataset], places: Sequence[str]) -> tuple[list[Dataset], bool]:
    """Return the datasets that lie at one of these real paths; else those of another machine with their last names.

    The flag says that it was the last names that agreed.
    """
    exact = [item for item in datasets if item.folder and os.path.realpath(item.folder) in places]
    if exact:
        return exact, False
    names = {last_part(place) for place in places}
    elsewhere = [item for item in datasets if item.folder and not os.path.exists(item.folder)]
    return [item for item in elsewhere if last_part(item.folder) in names], True


def decide_trigger(word: str | None, matching: Sequence[Dataset], datasets: Sequence[Dataset]) -> Trigger:
    """Return what opens the captions: the user's word, else the mark that ai-toolkit fills in where a job file has one.

    A regularisation set gets none: the trainer replaces triggers there.
    """
    if matching and all(item.is_reg for item in matching):
        return Trigger(source=f"{matching[0].file} says that this is a regularisation set (is_reg)")
    if word:
        return Trigger(word, "" if word == TRAINERS_MARK else word, "--trigger or GETCAP_TRIGGER")
    job = next((item for item in matching or datasets if item.trigger and not item.is_reg), None)
    if job is None:
        return Trigger()
    elsewhere = "" if matching else "; no job file names these folders"
    return Trigger(TRAINERS_MARK, job.trigger, f"{job.file}, trigger_word {shorten(job.trigger, 100)}{elsewhere}")


def remark_on_trigger(trigger: Trigger, matching: Sequence[Dataset]) -> list[str]:
    """Return what the trainer of the job files would do to captions that open with the user's word."""
    words = dict.fromkeys(item.trigger for item in matching if item.trigger)
    if trigger.put == TRAINERS_MARK and len(words) > 1:
        return [
            f"{matching[0].file}: these folders have {len(words)} trigger words ({', '.join(words)}); the first counts"
        ]
    if trigger.put in {"", TRAINERS_MARK}:
        return []
    remarks: list[str] = []
    for item in matching:
        if item.trigger and item.trigger not in trigger.put:
            same = item.trigger.casefold() == trigger.put.casefold()
            how = "differs only in case" if same else "is another word"
            said = f"the trigger {trigger.put}: the trigger_word {item.trigger} of {item.file} {how}"
            remarks.append(f"{said}, and the trainer would put it in front too; leave --trigger out, or use that word")
    return remarks[:1]


def decide_extension(ext: str | None, matching: Sequence[Dataset]) -> tuple[str, str]:
    """Return the extension of the captions and where it comes from. Raises SettingsError when job files disagree."""
    if ext:
        return ext, "--caption-ext or GETCAP_CAPTION_EXT"
    found = {item.caption_ext.removeprefix("."): item.file for item in matching}
    if len(found) > 1:
        said = " and ".join(f"{file} says {ext}" for ext, file in found.items())
        raise SettingsError(
            f"--caption-ext (GETCAP_CAPTION_EXT): is not set, and {said}; set it to the one that is meant"
        )
    for name, file in found.items():
        return parse_value(f"{file}: caption_ext (GETCAP_CAPTION_EXT would win)", EXTENSION, name), file
    return "txt", "the default"


def read_own(folder: Path | None, name: str) -> str | None:
    """Return the text of a file of ours in the config folder, None when there is none. Raises SettingsError."""
    path = folder / name if folder else None
    text = read_text(path).strip() if path and path.exists() else None
    if text == "":
        raise SettingsError(f"{printable(str(path))}: is blank; write into it or delete it")
    return text


def choose_prompt(settings: Settings) -> tuple[str | None, str]:
    """Return the user's own prompt, if any, and where the prompt comes from: GETCAP_PROMPT, prompt.txt or built in."""
    from_file = read_own(settings.config_dir, "prompt.txt")
    if settings.prompt is not None:
        source = "--prompt or GETCAP_PROMPT"
        return settings.prompt, f"{source}, not prompt.txt" if from_file else source
    own = printable(str(settings.config_dir / "prompt.txt")) if from_file and settings.config_dir else ""
    return from_file, own or f"built in, {settings.style}"


def find_unread(settings: Settings, matching: Sequence[Dataset]) -> list[Finding]:
    """Return why the trainer of the job files would not read captions that lie elsewhere, or are called otherwise."""
    image_dir, caption_dir, ext = settings.image_dir, settings.caption_dir, settings.caption_ext
    found = []
    if image_dir and caption_dir and os.path.realpath(image_dir) != os.path.realpath(caption_dir):
        detail = (
            f"the trainer looks for captions beside the images, not in {printable(str(caption_dir))}; leave "
            "--caption-dir out, or keep them in one file with --metadata FILE.json and set dataset_path to that"
        )
        beside = (item for item in matching if last_part(item.folder) == last_part(os.path.realpath(image_dir)))
        found += [Finding("captions elsewhere", item.file, detail) for item in beside][:1]
    for item in matching:
        if ext and item.caption_ext.removeprefix(".") != ext:
            detail = f"the trainer reads captions that end in {printable(item.caption_ext)}, not in {ext}"
            return [*found, Finding("extension not read", item.file, detail)]
    return found


def read_recipe(settings: Settings, environ: Mapping[str, str]) -> Recipe:
    """Return the recipe by the settings and the config folder. Raises SettingsError."""
    folder = settings.config_dir if settings.config_dir and settings.config_dir.exists() else None
    datasets, remarks = read_job_files(folder, environ) if folder else ([], [])
    given = (settings.image_dir, settings.caption_dir, settings.metadata)
    matching, by_name = match_datasets(datasets, [os.path.realpath(path) for path in given if path])
    if matching and by_name:
        shown = f"{matching[0].file}: {printable(matching[0].folder)}"
        remarks.append(f"{shown} is not on this machine; taken for the folder of the same name here")
    if settings.review:
        files = (item for item in datasets if item.folder.lower().endswith(".json"))
        remarks += [f"{item.file}: {printable(item.folder)} holds captions of its own; not looked at" for item in files]
    trigger = decide_trigger(settings.trigger, matching, datasets)
    ext, ext_source = decide_extension(settings.caption_ext, matching)
    own, source = choose_prompt(settings)
    excluded = (read_own(folder, "exclude.txt") or "").splitlines()
    exclude = tuple(filter(None, (" ".join(line.split()) for line in excluded)))
    prompt = build_prompt(settings.style, settings.max_words, exclude, own, source)
    used = placeholders(prompt, source)
    if "trigger" in used and not trigger.word:
        remarks.append(f"{source}: {{trigger}} stays blank; no trigger is set")
    told = trigger.word if "trigger" in used else ""
    question = fingerprint(settings.model, prompt, exclude, told)
    return Recipe(
        prompt=prompt,
        prompt_source=source,
        question=question,
        identity=fingerprint(question, settings.style, settings.max_words),
        style=settings.style,
        max_words=settings.max_words,
        exclude=exclude,
        trigger=trigger,
        caption_ext=ext,
        ext_source=ext_source,
        is_own_prompt=own is not None,
        architecture=next((item.architecture for item in matching), ""),
        remarks=(*remarks, *remark_on_trigger(trigger, matching)),
        findings=tuple(find_unread(settings, matching)),
    )


def describe_recipe(recipe: Recipe) -> list[str]:
    """Return the recipe as understood, and where each part comes from: a line each, the prompt last."""
    words = f", held to {recipe.max_words} words" if recipe.max_words else ""
    trigger = f"{recipe.trigger.put or 'none'} ({recipe.trigger.source})"
    excluded = [f"Left unsaid: {printable(', '.join(recipe.exclude))} (exclude.txt)"] if recipe.exclude else []
    return [
        f"Style: {recipe.style}{words}",
        f"Trigger: {printable(trigger)}",
        f"Caption extension: {recipe.caption_ext} ({recipe.ext_source})",
        *excluded,
        f"Prompt ({recipe.prompt_source}):",
        *(f"    {printable(line)}" for line in recipe.prompt.splitlines()),
    ]


# -------------------------------------------------------------------------------------------------- Pixels

JPEG_QUALITY = 90
MOST_PIXELS = 90_000_000  # to hold in memory at once; a JPEG may have twice as many, it is shrunk while it is decoded
# read by content; nothing that runs another program (EPS does), nothing that is no picture to train on
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
# what turns an image upright, by EXIF orientation; ImageOps.exif_transpose also fails on broken neighbours of that tag
TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))


def load_pillow() -> None:
    """Import Pillow and its formats once, before threads need them; HEIC comes along when pillow-heif is there."""
    from PIL import Image

    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # open_image has the limit
    warnings.filterwarnings("ignore", module=r"PIL\.")  # this file judges what Pillow would warn about
    with contextlib.suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]

        pillow_heif.register_heif_opener()


Size = tuple[int, int]


@contextlib.contextmanager
def name_damage() -> Iterator[None]:
    """Turn whatever a decoder stumbles over in a damaged file into a FailImage."""
    try:
        yield
    except FailImage:
        raise
    except Exception as error:
        raise FailImage(
            "damaged image", f"{shorten(str(error) or repr(error), 120)}: open it in a viewer, save it again"
        ) from error


def prepare_image(data: bytes, max_side: int) -> tuple[bytes, Size]:
    """Return an image file's bytes as an upright RGB JPEG of at most `max_side` pixels a side, and its size.

    Raises FailImage. A JPEG that is all of that already is returned as it came.
    """
    with name_damage():
        return shrink_image(data, max_side)


def shrink_image(data: bytes, max_side: int) -> tuple[bytes, Size]:
    """Return what prepare_image returns; raises FailImage, and what Pillow raises on damaged files."""
    from PIL import Image

    image = open_image(BytesIO(data))
    if is_ready(image, data, max_side):
        return data, image.size
    image.draft("RGB", draft_size(image.size, max_side))  # other formats than JPEG ignore it
    image.load()  # TIFF turns itself upright here, and forgets its orientation
    turn = TURNS.get(read_orientation(image))
    small = to_8_bit(image)
    # nearer to a full LANCZOS than Pillow's default (BICUBIC, 2.0), and quicker where nothing was drafted
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=1.5)
    output = BytesIO()
    flatten(small.transpose(Image.Transpose[turn]) if turn else small).save(output, "JPEG", quality=JPEG_QUALITY)
    return output.getvalue(), small.size


def measure_image(file: IO[bytes], max_side: int) -> Size:
    """Return about the size that an image would be sent with, from its header alone; raises FailImage."""
    with name_damage():
        width, height = open_image(file).size
    scale = min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def draft_size(size: Size, max_side: int) -> Size:
    """Return the least size at which a JPEG may be decoded: the size it goes out at, or up to 1/32 less.

    Decoders make 1/2, 1/4 or 1/8 of a JPEG at little cost. A phone's 4032 x 3024 at 1/4 is 1008 x 756: no resizing
    then, and as many patches of 32 pixels as 1024 x 768, by which vision models count.
    https://platform.openai.com/docs/guides/images-vision
    https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.Image.draft
    """
    least, longest = max_side - max_side // 32, max(size)
    return max(1, size[0] * least // longest), max(1, size[1] * least // longest)


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) when there is none or the EXIF data are broken."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # whatever a broken EXIF block leads to, the picture itself may be fine
        return 1


def open_image(file: IO[bytes]) -> ImageFile.ImageFile:
    """Return the image that a file's bytes are, its pixels not decoded yet."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        file.seek(0)
        start = file.read(12)
        if not start:
            raise FailImage("empty file", "the file has no bytes: copy it again") from None
        if start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS and "HEIF" not in Image.OPEN:
            raise FailImage("HEIC without pillow-heif", "pip install pillow-heif, then run again") from None
        detail = f"its content is none of {', '.join(FORMATS)}, or cut short: convert it or take it out"
        raise FailImage("not an image", detail) from None
    if image.width * image.height > MOST_PIXELS * (2 if image.format in {"JPEG", "MPO"} else 1):
        raise FailImage("too many pixels", f"{image.width} x {image.height} does not fit in memory: shrink it first")
    return image


def is_ready(image: ImageFile.ImageFile, data: bytes, max_side: int) -> bool:
    """Return whether a file can go out as its own bytes: a JPEG, upright, RGB, small, its end where it should be."""
    if image.format != "JPEG" or image.mode != "RGB" or max(image.size) > max_side or read_orientation(image) != 1:
        return False
    pixels = image.fp.tell() if image.fp else 0  # the end mark of a thumbnail inside the header does not count
    return data.rfind(b"\xff\xd9", max(pixels, len(data) - 1024)) != -1  # phones pad after the end


def to_8_bit(image: Image.Image) -> Image.Image:
    """Return the image as RGB, RGBA or L, ready to be resized: a palette cannot be, 16 bits would be clipped."""
    if image.mode == "I;16B":  # as microscopes write; few operations know it
        image = image.convert("I")
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
        if not math.isfinite(high - low):
            raise FailImage("damaged image", "it holds values that are no numbers")
        if image.mode != "F":  # 10 and 12 bits come in 16 too
            low, high = 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
        scale = 255 / ((high - low) or 1)
        return image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in {"RGB", "L"} else image.convert("RGB")


def flatten(image: Image.Image) -> Image.Image:
    """Return the image as RGB, what is transparent as white."""
    from PIL import Image

    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


# --------------------------------------------------------------------------------------- Request and reply

IMAGE_MARK = "IMAGE"  # stands in the JSON for the image, which is joined in as bytes: dumping it costs twice as much
DATA_URL = "data:image/jpeg;base64,"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # cheapest first
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")  # the current name, and the one other servers know
LONGEST_WAIT_S = 600.0
LONGEST_RETRY_AFTER_S = 30 * 86_400.0  # whatever a server asks for beyond that
LONGEST_TEXT = 200_000  # characters of an answer, reasoning and all
BROKEN = "broken answer"  # an error's code, and a reason

Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a completed answer says, whichever server wrote it."""

    content: str
    finish_reason: str
    refusal: str
    has_reasoning: bool
    usage: Usage
    tier: str = ""  # the service tier that it was billed as


@dataclass(frozen=True, slots=True)
class Limit:
    """What a server says of one of its limits: how many it takes when whole, how many now, the seconds until whole."""

    most: float
    left: float
    reset_s: float | None


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error in whichever shape it came. Status 0: there was no answer at all."""

    status: int
    message: str
    code: str = ""
    param: str = ""
    retry_after_s: float = 0.0
    usage: Usage = Usage()
    is_answer: bool = False  # it came as an answer does, and may be billed like one


def has_cache_options(settings: Settings) -> bool:
    """Return whether the server's prompt cache can be told what to keep: OpenAI's, for gpt-5.6 and later.

    Source: https://developers.openai.com/api/docs/guides/prompt-caching
    """
    newer = re.match(r"gpt-(?:5\.[6-9]|[6-9]|\d\d)", settings.model)
    return bool(newer) and is_openai(settings.base_url)


def first_parameters(settings: Settings) -> Parameters:
    """Return the parameters that the first request carries, before the server has said what it rejects."""
    parameters: Parameters = {
        TOKEN_LIMITS[0]: settings.max_tokens,
        "reasoning_effort": settings.reasoning_effort,
        "temperature": settings.temperature,
        "service_tier": settings.service_tier,
        # else each image's prompt is written to a cache, at a higher price, that nobody will read
        "prompt_cache_options": {"mode": "explicit"} if has_cache_options(settings) else None,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def build_request(
    model: str, prompt: str, parameters: Parameters, budget: int, image: bytes, start: str = DATA_URL
) -> bytes:
    """Return the JSON body of one chat completion: one user message, text first, then the image's URL.

    Source: https://platform.openai.com/docs/api-reference/chat/create; `budget` multiplies the token limit; `image`
    is what follows the URL's start, for a data URL the JPEG in base64.
    """
    limits = {name: parameters[name] * budget for name in TOKEN_LIMITS if name in parameters}
    url = {"type": "image_url", "image_url": {"url": f"{start}{IMAGE_MARK}"}}
    # some templates know no role but "user" (Gemma, Mistral), so there is no system message
    message = {"role": "user", "content": [{"type": "text", "text": prompt}, url]}
    body = json.dumps({"model": model, **parameters, **limits, "messages": [message]}).encode()
    head, _, tail = body.rpartition(IMAGE_MARK.encode())
    return b"".join((head, image, tail))


# "is too large" is about the image or the context, not about the parameter's existence
REJECTION = (
    r"(?i)unsupported|not supported|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|forbidden"
    r"|invalid (?:value|parameter|argument)|does not (?:support|exist)"
    r"|only the default|must be one of|input should be|supported values"
)


def is_about_tier(error: ErrorReply) -> bool:
    """Return whether the server rejects the service tier."""
    return error.status in {400, 422} and bool(
        re.search(r"service_tier|(?i:service tier|\bflex\b)", f"{error.param} {error.message}")
    )


def adapt_parameters(sent: Parameters, error: ErrorReply) -> Parameters | None:
    """Return the parameters without the one that the server rejects, None when that is not what the error says.

    The token limit is tried under its other name first, the reasoning effort with the cheapest value on offer. The
    service tier is never dropped: who asks for half the price does not want the whole.
    """
    said = f"{error.param} {error.message}"
    if is_about_tier(error):
        return None
    named = (n for n in sent if re.search(rf"(?<!\w){n}(?!\w)", said))
    name = error.param if error.param in sent else next(named, None)
    if name is None and "reasoning_effort" in sent and re.search(r"(?i)\bthink(?:ing)?\b|\breasoning\b", said):
        name = "reasoning_effort"  # Ollama and Gemini call it so
    if name is None or error.status not in {400, 422} or not re.search(REJECTION, f"{error.code} {said}"):
        return None
    rest = {key: value for key, value in sent.items() if key != name}
    if name == TOKEN_LIMITS[0]:
        return {TOKEN_LIMITS[1]: sent[name], **rest}
    if name == "reasoning_effort":
        dearer = EFFORTS[EFFORTS.index(sent[name]) + 1 :] if sent[name] in EFFORTS else EFFORTS[1:]
        offered = [effort for effort in dearer if re.search(rf"['\"`]{effort}['\"`]", said)]
        return {name: offered[0], **rest} if offered else rest  # upwards only, so that it comes to an end
    return rest


def error_text(body: Any) -> str:
    """Return the message of an error body: an object, a list of them, a text, OpenAI's, FastAPI's, OpenRouter's."""
    match body:
        case str():
            return body
        case [first, *_]:
            return error_text(first)
        case dict():
            found = (error_text(body.get(key)) for key in ("error", "message", "detail", "errors", "msg", "title"))
            text = next(filter(None, found), "")
            # OpenRouter wraps the provider's own words
            more = error_text(body["metadata"].get("raw")) if isinstance(body.get("metadata"), dict) else ""
            return f"{text} ({more})" if more and more not in text else text
        case _:
            return ""


def error_object(body: Any) -> dict[str, Any]:
    """Return the object that holds an error's code and param, empty when there is none."""
    match body:
        case [first, *_]:
            return error_object(first)
        case {"error": dict() | list() as inner} | {"detail": list() as inner} | {"message": dict() as inner}:
            return error_object(inner)
        case dict():
            return body
        case _:
            return {}


def parse_retry_after(headers: Mapping[str, str], now: datetime) -> float:
    """Return the seconds that a server asks to wait, 0 when it does not: milliseconds, seconds or an HTTP date.

    Source: https://www.rfc-editor.org/rfc/rfc9110#field.retry-after; retry-after-ms is OpenAI's and Azure's.
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) * scale
            return min(seconds, LONGEST_RETRY_AFTER_S) if seconds > 0 else 0.0
    from email.utils import parsedate_to_datetime

    with contextlib.suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
        return min(max(0.0, seconds), LONGEST_RETRY_AFTER_S)
    return 0.0


GO_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


UNITS = ("requests", "tokens")


def parse_reset(text: str, now: datetime) -> float | None:
    """Return the seconds until a limit is whole again: from a Go duration, seconds or an epoch; None for anything else.

    Source: https://pkg.go.dev/time#ParseDuration; https://platform.openai.com/docs/guides/rate-limits
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|h|m|s)", text)
    if parts and "".join(map("".join, parts)) == text:
        return sum(float(number) * GO_UNITS_S[unit] for number, unit in parts)
    if not re.fullmatch(r"\d+(?:\.\d+)?", text):
        return None
    number = float(text)
    if number < 1e9:
        return number
    return max(0.0, (number / 1000 if number > 1e11 else number) - now.timestamp())


def parse_limits(headers: Mapping[str, str], now: datetime) -> dict[str, Limit]:
    """Return what the x-ratelimit headers say of requests and of tokens; whoever does not limit them says nothing."""
    found = {}
    for unit in UNITS:
        limit, remaining = (headers.get(f"x-ratelimit-{word}-{unit}", "") for word in ("limit", "remaining"))
        with contextlib.suppress(ValueError):
            most, left = float(limit), float(remaining)
            if 1 <= most < math.inf and math.isfinite(left):
                reset_s = parse_reset(headers.get(f"x-ratelimit-reset-{unit}", "").strip(), now)
                reset_s = reset_s if reset_s and reset_s <= LONGEST_RETRY_AFTER_S else None
                found[unit] = Limit(most, max(0.0, left), reset_s)
    return found


def parse_error(status: int, text: str, retry_after_s: float = 0.0) -> ErrorReply:
    """Return the error that a body describes, in whichever shape servers write it: JSON, HTML, plain text, nothing."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        title = re.search(r"(?is)<title[^>]*>(.*?)</title>", text[:4000])
        body = title[1] if title else re.sub(r"<[^>]*>", " ", text[:4000])
    inner = error_object(body)
    code = " ".join(str(inner[key]) for key in ("code", "type", "status") if inner.get(key))
    try:
        message = shorten(error_text(body)) or code or "an error without a message"
    except RecursionError:
        message = "an error too deep to be read"
    where = inner.get("loc")  # FastAPI's path to the parameter
    param = where[-1] if isinstance(where, list) and where else inner.get("param")
    usage = (isinstance(body, dict) and body.get("usage")) or inner.get("usage")
    usage = read_usage(usage) if isinstance(usage, dict) else Usage()
    return ErrorReply(status, message, code, str(param or ""), retry_after_s, usage)


def parse_reply(text: str) -> Reply | ErrorReply:
    """Return the answer that came under HTTP 200; one that was cut or holds no answer is an error, BROKEN by code."""
    if text.lstrip()[:1] == "<":
        return ErrorReply(200, f"a web page came back ({parse_error(200, text).message})", "web_page")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return ErrorReply(200, "the answer is no whole JSON", BROKEN, is_answer=True)
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    usage = body.get("usage") if isinstance(body, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    failed = choice if isinstance(choice, dict) and choice.get("error") else body
    if (failed and isinstance(failed, list)) or (isinstance(failed, dict) and failed.get("error")):
        error = parse_error(500, json.dumps(failed))  # OpenRouter reports late errors so, with the status as code
        status = error.code.split(" ")[0]
        status_code = int(status) if re.fullmatch(r"[45]\d\d", status) else 500
        return dataclasses.replace(error, status=status_code, usage=read_usage(usage), is_answer=True)
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        return ErrorReply(200, "the answer holds no choices", BROKEN, usage=read_usage(usage), is_answer=True)
    return read_choice(choice, usage, body.get("service_tier"))


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """Return the tokens that an answer reports; what is no plausible number counts as zero, and as missing."""
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    counts += [details.get("cached_tokens"), details.get("cache_write_tokens"), usage.get("total_tokens")]
    prompt, answer, cached, cache_writes, total = map(read_count, counts)
    if total and prompt and answer is not None:  # some leave out thoughts elsewhere, and bill them
        answer = max(answer, total - prompt)
    is_whole = bool(prompt) and answer is not None
    return Usage(prompt or 0, answer or 0, cached or 0, cache_writes or 0, is_whole)


def read_count(count: Any) -> int | None:
    """Return a count of tokens, whichever type a server gives it; None when it is none that can be."""
    if isinstance(count, str) and re.fullmatch(r"[0-9]{1,9}", count):
        return int(count)
    return int(count) if isinstance(count, int | float) and 0 <= count < 10**9 else None


def read_choice(choice: Mapping[str, Any], usage: Mapping[str, Any], tier: Any) -> Reply:
    """Return the reply of a completion's first choice."""
    message = choice["message"]
    content = message.get("content")
    if isinstance(content, list):  # some servers answer in parts, as they are asked
        parts = [
            part for part in content if isinstance(part, dict) and part.get("type", "text") in {"text", "output_text"}
        ]
        content = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    details = usage.get("completion_tokens_details")
    reasoning = message.get("reasoning") or message.get("reasoning_content")  # Ollama, vLLM; LM Studio, llama.cpp
    return Reply(
        content=content if isinstance(content, str) else "",
        finish_reason=str(choice.get("finish_reason") or ""),
        refusal=str(message.get("refusal") or ""),
        has_reasoning=bool(reasoning or (isinstance(details, dict) and details.get("reasoning_tokens"))),
        usage=read_usage(usage),
        tier=shorten(tier, 40) if isinstance(tier, str) else "",
    )


# Codes and types, not messages: Gemini's per-minute limit says "exceeded your current quota" too
OUT_OF_MONEY = r"(?i)insufficient_quota|credit_balance|(?:spend|usage)_limit_exceeded|billing"
NO_BALANCE = r"(?i)credit balance is too low|insufficient balance"
POLICY = r"(?i)content_?policy|content_?filter|invalid_prompt|moderation|flagged|safety system"
NO_VISION = (
    r"(?i)image inputs? (?:is|are) not supported|image_url.{0,40}only supported by"
    r"|does(?:n't| not) support (?:image inputs?|images|vision)\b"
    r"|not a multimodal model|support image input|mmproj"
)
NO_MODEL = r"(?i)model_not_found|model .{0,80}(?:not found|not exist)|not a valid model|invalid model|no models? loaded"
NO_KEY = r"(?i)(?:invalid|incorrect|missing|no) api[ _-]?key|api[ _-]?key (?:is )?(?:not valid|invalid|missing)"
TOO_LARGE = r"(?i)maximum usage size|patches|request too large|payload too large"
STOPS = {
    401: "the key was refused; check OPENAI_API_KEY (it goes to the server that OPENAI_BASE_URL names)",
    402: "the account has no credit left; add some, then run again",
    403: "the key may not do this (or not from this country); check its permissions and the model",
    404: "the model or the address does not exist; check GETCAP_MODEL and OPENAI_BASE_URL (it mostly ends in /v1)",
    405: "that address takes no requests; check OPENAI_BASE_URL (it mostly ends in /v1)",
    407: "the proxy wants a password; check HTTPS_PROXY",
    451: "the server may not answer from this country",
}


def judge_error(error: ErrorReply, now: datetime, *, first: bool) -> StopRun | FailImage:
    """Return what an error means: the end of the run, of this image, or another try.

    `first` says that the server has not answered a request of this run yet: what is wrong then is wrong for all.
    Source of the codes: https://platform.openai.com/docs/guides/error-codes
    """
    status, said = error.status, f"{error.code} {error.message}"
    shown = f"{error.message} (HTTP {status})" if status else error.message
    if first and error.code in {"unreachable", "web_page"}:
        return StopRun(f"{error.message}; check OPENAI_BASE_URL and the connection, and that the server runs")
    if status in {400, 404, 500, 501} and re.search(NO_VISION, said):
        return StopRun(f"the model takes no images: {shown}; set GETCAP_MODEL to a vision model")
    if status in {400, 403} and re.search(POLICY, said):
        return FailImage("refused", f"{shown}; caption it by hand or with another model")
    if status in {400, 413, 429} and re.search(TOO_LARGE, said):
        return FailImage("image too large", f"{shown}; lower GETCAP_MAX_SIDE", by_server=True)
    if status in {400, 403, 429} and (re.search(OUT_OF_MONEY, error.code) or re.search(NO_BALANCE, error.message)):
        return StopRun(
            f"the account is out of money or at its limit: {shown}; look at its billing page, then run again"
        )
    if status == 400 and re.search(NO_KEY, said):
        return StopRun(f"{STOPS[401]}: {shown}")
    if 300 <= status < 400:  # following it would send key and images to who knows where
        return StopRun(f"the server sends requests elsewhere; set OPENAI_BASE_URL to the address it means: {shown}")
    if status == 400 and re.search(NO_MODEL, said):
        return StopRun(f"{STOPS[404]}: {shown}")
    if status in STOPS:
        return StopRun(f"{STOPS[status]}: {shown}")
    if is_about_tier(error) or (status == 400 and re.search(r"unsupported_(?:parameter|value)", error.code)):
        advice = "; unset GETCAP_SERVICE_TIER" if is_about_tier(error) else ""
        return StopRun(f"the server rejects what is asked: {shown}{advice}")
    if error.retry_after_s > LONGEST_WAIT_S:
        back = now + timedelta(seconds=error.retry_after_s)
        return StopRun(f"the server asks to come back after {back.astimezone():%d %B %H:%M}: {shown}; run again then")
    if status in {0, 408, 409, 425, 429} or status >= 500 or error.code == BROKEN:
        reason = BROKEN if error.code == BROKEN else f"HTTP {status}" if status else "no answer"
        return TryAgain(reason, error.message, error.retry_after_s)
    reason = "web page" if error.code == "web_page" else f"HTTP {status}"
    return FailImage(reason, f"{error.message}; the server rejects this image or request", by_server=True)


def backoff_s(attempt: int, factor: float, retry_after_s: float, jitter: float) -> float:
    """Return the seconds before the next try: factor^attempt up to a minute, never less than the server asks for.

    `jitter` from 0 to 1 spreads the workers, so that they do not come back as a herd.
    """
    backoff = min(60.0, factor ** min(attempt, 30)) * (0.5 + jitter / 2)
    return max(backoff, retry_after_s + jitter if retry_after_s else 0.0)


# reasoning in the marks of Qwen, DeepSeek, Kimi, Seed; Magistral; Cohere; Ollama's own
THINKING = (
    r"(?i:[<◁]/?(?:think|thinking|thoughts?|reasoning|analysis|seed:think|scratchpad)\s*[>▷])|\[/?THINK\]"
    r"|<\|(?:START|END)_THINKING\|>|<\|(?:begin|end)_of_thought\|>|\.\.\.done thinking\."
)
THINKING_END = r"(?s)(?:.*<\|channel\|>final<\|message\|>|analysis.*assistantfinal)"  # gpt-oss, marks or no marks
THOUGHTS = (  # without any marks
    r"(?i)thinking process:|thought the user|the user (?:wants|asks|is asking|uploaded|(?:has )?provided|sent)\b"
    r"|(?:so,? )?(?:the|my) task is to\b"
    r"|(?:(?:okay|ok|got it|alright|hmm|first|now),? (?:so,? )?)?(?:i|we) (?:need|have|should)(?: to)? "
    r"(?:write|caption|describe|look at|analy|create|produce|generate)"
    r"|(?:okay|ok|got it|alright|hmm)[,.] .{0,40}"
    r"(?:the user(?! (?:manual|interface|guide))|let['’]s (?:see|look|start|tackle|think|analy))"
    r"|let['’]s (?:tackle|analy|see[.,:]|look at|break (?:this|it))|i['’]ll start by\b"
    r"|let me (?:analy|look at|start by|think(?: about| through| step|[.:]))"
)
TURN_END = (
    r"<\|(?:eot_id|im_end|endoftext|end)\|>|<end_of_turn>|<eos>|\[/INST\]|<｜end▁of▁sentence｜>"
    r"|</s>(?=\s*(?:\Z|</?s>|<\||(?i:user|human|assistant)\b))"  # it may be read on a slide
)
SPECIAL_TOKENS = (  # a template's own, <|begin_of_box|> too
    r"<\|im_start\|>assistant|<\|\w+\|>|(?:\A|(?<=assistant)|(?<=>))\s*<s>|</?answer>"
)
FENCE = r"(?s)```[\w-]*\n(.*)\n```"
LINE_MARKS = r"(?m)^(?:#{1,6}|[-*•>]) "
INCH = "[0-9½¼¾⅓⅔⅛⅜⅝⅞'’]"  # before a mark that opens no quotation
QUOTED = (
    rf"((?<!{INCH})\"[^\"]{{0,3000}}\"|„[^„“”\"]{{0,3000}}[“”\"]|“[^”“]{{0,3000}}”|«[^»]{{0,3000}}»|「[^」]{{0,3000}}」"
    r"|『[^』]{0,3000}』|`[^`\n]{1,300}`|(?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w)){1,3000}'(?!\w)"
    r"|‘(?:[^‘’\n]|(?<=\w)’(?=\w)){1,3000}’(?!\w))"
)
MARKUP = (  # marks that a page would not show, and what is left of them
    (r"(?<![\w*])(\*{1,3})(?=[\w\"“'(])([^*\n]{1,300})(?<=[^\s*])\1(?![\w*]|\.\w)", r"\2"),  # not 5 * 3, *.py, *^_^*
    (r"(?<!\w)__(?=\S)([^_\n]{1,300} [^_\n]{1,300})(?<=\S)__(?!\w)", r"\1"),  # not __init__
    (r"!?\[([^\]\n]{0,300})\]\((?:https?:|www\.|[/#.])\S{0,500}\)", r"\1"),
    (
        r"(?is)\A<(p|div|span|text|caption|(?:image_)?description|prompt|output|response|result|final)\b[^<>]{0,100}>(.*)</\1>\Z",
        r"\2",
    ),
    (r"(?i)<(b|i|u|em|strong)>([^<>]{1,300})</\1>", r"\2"),
    (r"(?i)<br ?/?>", " "),
    (r"(?<=[.,;!?\s])\\n|(?<=\w)\\n(?=[A-Z])", " "),  # not C:\new
)
ABOUT = r"(?:captions?|descriptions?|prompts?|tags|sentence)"
OPENING = (
    r"(?i)(?:(?:sure|certainly|of course|absolutely|okay|ok|great)\b[^\w\n]*\s*)?"
    rf"(?:(?:here(?:\s+is|\s+are|['’]s)|below is)\b[^:.\n]{{0,80}}?\b{ABOUT}\b[^:.\n]{{0,80}}(?::\s*|\n+)"
    rf"|(?:(?:image|photo|suggested|final|training|detailed|short|generated)\s+)?{ABOUT}(?: \d)?(?:\s*:\s*|\s*\n+)"
    r"|(?:assistant|answer|response|final answer|alt text)\s*:\s+(?=(?-i:[A-Z\"“])))"
    r"|(?i:(?:sure|certainly|of course|here you go)[!.:])\s+(?=(?-i:[A-Z\"“]))"
)
CLOSING = (
    r"(?is)(?<=[.!?\"”])(?:\n(?:let me know|feel free|would you like (?:me|another|a )|i hope (?:this|that|it|you)"
    r"|hope this|if you(?:['’]d| would)? (?:like|want|need))\b"
    r"|\s+(?:let me know (?:if|what)|feel free to (?:ask (?:me|if|any)|reach out|adjust)"
    r"|(?:i )?hope (?:this|that|it) helps"
    r"|would you like me to|is there anything else you)\b|\s+\(?word count:? ?\d+\W*\Z|\s+\(\d+ words\)\W*\Z).*\Z"
)
# controls, BOM, half characters, soft hyphens, marks of direction
INVISIBLE = r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
QUOTES = {'"': '"', "“": "”", "«": "»", "'": "'", "‘": "’", "「": "」", "`": "`"}


def unquote(text: str) -> str:
    """Return the text without a pair of quotes around all of it; a caption that merely begins with a quote keeps it."""
    close = QUOTES.get(text[:1])
    if close is None or len(text) < 3 or not text.endswith(close):
        return text
    inner = text[1:-1]
    # the next quote inside must open another quotation, or be an apostrophe: else the first one closed before the end
    following = re.search(rf"(?<!\w){re.escape(close)}|{re.escape(close)}(?!\w)", inner)
    opens = following and close != "'" and (following.start() == 0 or inner[following.start() - 1].isspace())
    return text if following and not opens else inner.strip()


def strip_reasoning(text: str) -> str:
    """Return what a model says after its reasoning; blank when it was still at it."""
    if final := re.match(THINKING_END, text):
        return text[final.end() :]
    if "<|channel|>" in text:
        return ""
    start, opened, end = len(text) - len(text.lstrip()), False, 0
    for mark in re.finditer(THINKING, text):
        closes = "/" in mark[0] or "end" in mark[0].lower() or "done" in mark[0]
        # an end without a beginning is the first or last of its line; on a T-shirt it may stand anywhere
        alone = mark.start() == start or "\n" in text[max(0, mark.start() - 1) : mark.end() + 1]
        if closes and (opened or alone):
            end = mark.end()
        opened = opened or (not closes and mark.start() == start)
    return text[end:] if end or not opened else ""


ENTITY = r"&(?:quot|apos|amp|lt|gt|nbsp|#39|#x27);"


def strip_markup(text: str) -> str:
    """Return a text without marks for emphasis, links and line breaks."""
    for pattern, instead in MARKUP:
        text = re.sub(pattern, instead, text)
    return text


def mask_quotes(text: str) -> str:
    """Return a text of the same length in which what is quoted, and so copied from the image, says nothing."""
    return re.sub(QUOTED, lambda found: found[0][0] + "x" * (len(found[0]) - 2) + found[0][-1], text)


def clean_caption(content: str, *, tags: bool = False) -> str:
    """Return an answer as one trimmed line: without reasoning, fences, openings, markup and invisible characters.

    Lines are joined by a blank, those of `tags` by a comma.
    """
    text = re.split(TURN_END, strip_reasoning(content), maxsplit=1)[0]
    text = re.sub(INVISIBLE, "", re.sub(SPECIAL_TOKENS, "", text))
    if re.search(ENTITY, text):
        from html import unescape

        text = unescape(text)
    text = "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))
    if fenced := re.fullmatch(FENCE, text):
        text = fenced[1]
    text = re.sub(LINE_MARKS, "", text)
    for _ in range(3):  # an opening in quotes, quotes after an opening
        before = text
        closing = re.search(CLOSING, mask_quotes(text))
        text = unquote(text[: closing.start() if closing else None].strip())
        # what is quoted is copied from the image, asterisks and all
        parts = re.split(QUOTED, text)
        text = "".join(part if n % 2 else strip_markup(part) for n, part in enumerate(parts)).strip()
        if opening := re.match(OPENING, text):
            text = text[opening.end() :]
        if text == before:
            break
    return " ".join((text.replace("\n", ", ") if tags else text).split())


# What answers instead of captioning, by language. Tried at the start only, since a caption may quote any of these,
# and in lower case but for the first letter: a title may read "I Can't Believe It".
CANNOT = (
    r"(?:can(?:not|['’]?t| not)|couldn['’]?t|won['’]?t|will not|must (?:\w+ )?(?:decline|refuse)"
    r"|(?:am|are) (?:not able|unable))"
)
HELP = (
    "(?:assist|help(?: you)?(?: with|[.,!]|$)|process|describe|identify|comply|fulfil|provide|generate|caption|complete"
    "|discuss|determine|recogni[sz]e)"
)
THE_IMAGE = (
    r"(?:the|this|that|your|any|an?|more|further) (?:\w+ )?"
    r"(?:image|photo|picture|attachment|link|details|information|context)"
)
POLITELY = (
    r"(?:(?:unfortunately|apologies|sorry|regrettably|thank you for [^,.]{0,40}"
    r"|i (?:appreciate|understand|aim)[^.]{0,80}?|(?:for|due to) (?:safety|privacy|policy|legal)[^,.]{0,40}"
    r"|(?:hi|hello|hey|hmm))"
    r"[,.!]? (?:but )?)?"
)
REFUSALS = (
    rf"{POLITELY}(?:i|I) (?:currently )?{CANNOT}\b(?! (?:believe|wait|stop|live|breathe|even|help but)\b)",
    rf"{POLITELY}we {CANNOT} (?:to )?(?:{HELP}|(?:see|view|open) {THE_IMAGE})|(?:while|although) [iI] {CANNOT} {HELP}",
    rf"{POLITELY}(?:i|I|we)(?:['’](?:m|re)| am| are) (?:currently )?"
    r"(?:unable|not (?:able|allowed|comfortable|going))\b",
    rf"{POLITELY}(?:i|I) (?:apologi[sz]e|do not|don['’]t|(?:have|need) to (?:\w+ )?(?:decline|pass))\b|sorry[.!]?$",
    r"(?:i|I)(?:['’]d| would) (?:rather|prefer) not\b|i (?:regret|am programmed|was designed)\b",
    rf"not able to {HELP}|sorry,? (?:but )?{THE_IMAGE}|(?:cannot|can['’]t|could not) {HELP}",
    r".{0,80}\b(?:isn['’]t|is not) something (?:that )?I(?: can|['’]m| am)\b|let['’]s keep our conversation\b",
    r"it(?:['’]s| is) against my (?:guidelines|polic|programming|rules|principles)",
    r"(?:i|we)(?:['’](?:m|re)| am| are) (?:\w+ )?(?:sorry|afraid)"
    r"(?=[,.!;:]|$| (?:but|i|I|that|about|for (?:any|the)|we)\b)",
    r"i['’](?:d be happy to|ll have to (?:decline|pass))\b|i['’]m (?:just )?an? (?:\w+ )?(?:AI|model|assistant)\b",
    r"my (?:guidelines|policy|policies)\b|my apologies(?=[,.!]|$| but\b| for\b)",
    r"as an? (?:[\w-]+ ){0,2}(?:ai|AI|artificial intelligence|(?:language|vision) model)\b[^.]{0,80}?\b(?:I|my)\b",
    rf"unable to (?:(?:assist|comply|help)\b|{HELP} (?:the|this|that|your|any|it)\b)",
    r"content (?:removed|policy violation)",
    r"(?:your )?request (?:was )?(?:rejected|blocked|refused|denied)(?=[.!]|$| (?:by|due|as|because)\b)",
    r"(?:the|this) (?:image |content |request )?(?:may )?"
    r"(?:violates?|goes against|contains explicit (?:content|material|sexual))\b",
    r"this (?:image|content|request) (?:cannot|can['’]t|could not)\b|hello! [hH]ow can [iI]",
    rf"(?:(?:could|can) you )?(?:please|kindly) (?:provide|upload|attach|share) {THE_IMAGE}",
    r"you have(?:n['’]t| not) (?:provided|attached|uploaded)|it seems you forgot to\b",
    r"(?:there (?:is|was|seems to be) )?no image (?:was |is |has been )?(?:provided|attached|uploaded|detected|found"
    r"|available)(?=[.!]|$| (?:in|to|with|for|yet|here)\b)|image not found[.!]?$|the image failed to load",
    r"(?:the image|it) (?:could not|couldn['’]t|cannot|can['’]t) be (?:loaded|processed|displayed|viewed)",
    r"there (?:does not|doesn['’]t) (?:appear|seem) to be an(?:y)? image",
    r"(?:hi|hello|hey)?[!,.]? ?[iI]t (?:seems|looks like|appears)\b"
    r".{0,40}\b(?:no image|image (?:was|is|did)(?:n['’]t| not))",
    r"(?:es )?tut (?:mir|uns) (?:sehr )?leid\b|(?:ich kann|(?:das|dieses bild) kann ich) (?!dich)\b.{0,60}\bnicht\b",
    r"leider (?:kann|darf) ich\b|entschuldigung, (?:aber|ich|das|dies)\b|ich bin nicht in der lage\b|als (?:ki|KI)\b",
    r"(?:je suis )?(?:vraiment )?désolée?(?=[.!]|,? (?:mais|je)\b)|je ne (?:peux|puis|vois) pas|je regrette\b",
    r"je ne suis pas (?:en mesure|capable)|en tant qu['’](?:ia|IA|modèle)\b|malheureusement,? je\b",
    r"il m['’]est impossible\b",
    r"impossible de (?:décrire|traiter)\b|je n['’]ai pas la possibilité\b",
    r"lo (?:siento|lamento)\b|no puedo (?:ayudar|describ|identific|proces|hacer|ver|proporcion|cumpl|asist|respond)",
    r"lamentablemente,? no\b|no es posible (?:describir|procesar)\b|como modelo de lenguaje\b",
    r"disculpa[,.]? (?:pero|no)\b",
    r"sinto muito\b|desculp[ae],? (?:mas|não)\b|lamento,? mas\b|(?:infelizmente,? )?não (?:posso|consigo)\b",
    r"mi (?:dispiace|spiace|scuso)\b|(?:purtroppo,? )?non (?:posso|sono in grado)\b",
    r"het spijt me\b|(?:sorry,? (?:maar )?)?ik kan\b.{0,60}\bniet\b",
    r"przykro mi\b|przepraszam\b|(?:niestety,? )?nie (?:mogę|jestem w stanie)\b|üzgünüm\b|maalesef\b|özür dilerim\b",
    r"к сожалению\b|(?:извините|простите)(?=[,.!]| но\b)|мне (?:очень )?жаль(?=[,.!]? но\b|[.!]|, что\b)",
    r"(?:как языковая модель, )?(?:я )?не могу (?:опис|помо|обраб|опред|распозн|выполн|помог)|на жаль\b",
    r"(?:很|非常|十分)?(?:抱歉|对不起|對不起)(?=[，,。！! ]|我|但|$)|很遗憾，|不好意思，我|您好，我(?:无法|不能)",
    r"(?:我|这张图片我)(?:无法|無法|不能|没办法)",
    r"(?:无法|無法)(?:识别|描述|处理|處理|提供|協助|协助)(?:该|此|这|這|图|圖|您|你|任何)",
    r"作为.{0,4}(?:AI|人工智能|语言模型|大模型)[^。]{0,12}我|请(?:上传|提供)",
    r"(?:أ?عتذر|عذر(?:ا|ًا|اً)(?!ء))|آسف|للأسف|لا (?:أستطيع|يمكنني)|क्षमा करें|माफ़|मुझे खेद",
    r"xin lỗi,|rất tiếc,|tôi không thể|(?:ขออภัย|ขอโทษ)(?=ค|ครับ| |$)|(?:mohon )?maaf,|saya tidak (?:bisa|dapat)\b",
    r"omlouvám se|je mi líto|nemohu\b|(?:jag är )?ledsen,? men\b|tyvärr\b|jag kan inte\b|förlåt,|beklager,|undskyld,",
    r"anteeksi,|sajnálom,|îmi pare rău|λυπάμαι|סליחה,|ببخشید",
    r"申し訳(?:ありません|ございません)|すみません(?=[、。が,]|$)|ごめんなさい(?=[、。,]|$)",
    r"画像が(?:添付|表示)されてい?ません",
    r"(?:この(?:画像|写真)|その|ご?(?:依頼|要望)).{0,30}(?:できません|いたしかねます)|お手伝いできません",
    r"죄송(?:하지만|합니다[.,]|해요)|미안하지만|미안합니다[.,]",
    r"(?:이 )?(?:이미지|사진)를? ?(?:볼|인식할|설명할|처리할) 수 없(?:습니다|어요)|.{0,20}(?:도와|해) ?드릴 수 없",
)
REFUSAL = "|".join(f"(?:{pattern})" for pattern in REFUSALS)
REFUSED_LATER = (  # after some words of a caption
    r"(?<=[.!?] )(?:(?:However|Unfortunately|Note:) ?,? ?)?(?:(?:(?:I['’]m|I am) sorry|Sorry),? (?:but )?I"
    r"(?: can(?:not|['’]?t)\b|(?: am|['’]m) (?:unable|not))|I apologi[sz]e\b"
    rf"|(?:I can(?:not|['’]?t)|I(?: am|['’]m) (?:not able|unable) to) {HELP}|As an AI\b)"
)
ERROR_TEXT = (
    r"(?i)\W{0,20}(?:(?:(?-i:(?:\w[\w.]{0,60})?Error)|error|exception)(?: code)?(?: \d+)?\s*[:\]]"
    r"|(?-i:\w[\w.]{0,60}(?:Error|Exception))\("
    r"|traceback \(|(?:there was )?an? (?:\w+ )?error (?:has )?occurred|there was an error\b"
    r"|(?:http )?(?:\d{3} )?(?:internal server error|bad gateway|service unavailable|gateway time-?out)"
    r"|[45]\d\d (?:not found|forbidden|bad request|unauthorized|request entity)|invalid api key|insufficient balance"
    r"|error (?:processing|generating|loading) |cuda (?:error|out of memory)|(?:failed|unable) to (?:load|process) "
    r"|request (?:timed out|failed)|connection (?:error|refused|reset|timed out)|out of memory|status code:? \d{3}"
    r"|(?:oops\b.{0,20}|something )went wrong|upstream (?:connect error|request timeout)|no healthy upstream"
    r"|(?:network|server) error\b|fetch failed|\[object object\]|<class |['\"]?nonetype|too many requests"
    r"|the model is (?:currently )?overloaded|you exceeded your current quota|please enable javascript"
    r"|(?:api )?(?:rate limit|quota) (?:exceeded|reached)|lorem ipsum)"
)
DATA = (  # JSON and the like
    r"(?s)\s*(?:[{\[]\s*[\"'{\[].*[}\]]|[\"']?(?:caption|description|tags)[\"']?\s*[:=]\s*[\"'\[].*)\W*\Z"
)
PICTURED = (  # a photo of an error
    r"(?i)\b(?:printed|icon|illustration|graphic|drawing|cartoon|layout)\b"
    r"|\b(?:on|in|next to) (?:an?|the) (?:[\w-]+ ){0,3}(?:browser|window|monitor|screen|laptop|phone"
    r"|poster|shirt|hoodie|mockup|machine|display|terminal|tv|macintosh|page|background|field|wall|sign|paper)\b"
)
WEB_PAGE = (
    r"(?is)(?:<!--.*?-->\s*)?(?:<(?:!doctype|title|center|h1|\?xml)\b|<(?:html|head|body)\b[^>]*>(?=\s*$|.*</?\w))"
)
NOTHING = {
    "null", "none", "n/a", "undefined", "nan", "todo", "tbd", "placeholder", "untitled", "caption here",
    "your caption here", "insert caption here", "no caption", "no description available", "image", "{{caption}}",
}  # fmt: skip
CUT_OFF = r"(?i)length|max_?tokens"  # model_length is Mistral's
FILTERED = r"(?i)content_?filter|safety|prohibited|recitation|blocklist"
BROKEN_OFF = r"(?i)error|abort|timeout|cancel"  # OpenRouter's and vLLM's


def is_looping(text: str) -> bool:
    """Return whether the text ends in a phrase said over and over, thrice at least and a dozen words in all.

    A model that loops does not find out again, so the end is where it shows.
    """
    text = re.sub(QUOTED, "", text)  # a blackboard may well say one thing ten times
    words = re.findall(r"\w+", text.casefold())[-180:]
    for size in range(1, len(words) // 3 + 1):
        length = size * max(3, math.ceil(12 / size))
        tail = words[-length:]
        if len(tail) == length and tail == tail[:size] * (length // size):
            return True
    return bool(re.search(r"([^\s_.=*-]\S{0,19}?)\1{29,}\W*$", text[-700:]))  # scripts without spaces


def judge_reply(reply: Reply, *, tags: bool = False) -> str:
    """Return the caption that an answer holds, one clean line; raises FailImage when it is none."""
    if len(reply.content) > LONGEST_TEXT:
        raise FailImage("looping", f"an answer of {len(reply.content):,} characters; take another model")
    text = clean_caption(reply.content, tags=tags)
    by_hand = "caption it by hand or with another model"
    unquoted, start = re.sub(QUOTED, "", text), text.lstrip("[(<*")
    is_refusal = re.match(REFUSAL, start[:1].lower() + start[1:]) or re.search(REFUSED_LATER, unquoted)
    if reply.refusal or re.search(FILTERED, reply.finish_reason) or is_refusal:
        said = shorten(reply.refusal or text or "filtered by the server", 120).rstrip(".")
        raise FailImage("refused", f"{said}; {by_hand}")
    if is_looping(text):
        raise FailImage("looping", f"…{shorten(text[-60:])}; try GETCAP_TEMPERATURE=0.7 or another model")
    if re.search(CUT_OFF, reply.finish_reason):
        raise CutOff("cut off", "")
    if re.search(BROKEN_OFF, reply.finish_reason):
        raise TryAgain(BROKEN, f"the server broke off ({shorten(reply.finish_reason, 40)})")
    is_error = re.match(ERROR_TEXT, text) and not re.search(PICTURED, text)
    if is_error or re.match(WEB_PAGE, text) or re.match(DATA, text):
        raise FailImage("error text", f"{shorten(text, 120)}; look at the server", by_server=True)
    if re.match(THOUGHTS, text) or re.search(THINKING, unquoted):
        raise FailImage("reasoning only", "set GETCAP_REASONING_EFFORT=none, or take another model")
    if not any(c.isalnum() for c in text) or text.lower().strip(" .[]<>") in NOTHING:
        if reply.has_reasoning or re.search(THINKING, reply.content) or "<|channel|>" in reply.content:
            raise FailImage("reasoning only", "set GETCAP_REASONING_EFFORT=none, or raise GETCAP_MAX_TOKENS")
        raise FailImage("empty", f"the answer holds no words; run again, or {by_hand}")
    return text


# --------------------------------------------------------------------------------------------------- Money

# How OpenAI's models count an image whose `detail` is left out; the first that fits a model's name is taken. Source:
# https://developers.openai.com/api/docs/guides/images-vision, and what was billed where its tables disagree.
PATCH_RULES = (  # model, longest side and most patches that the server keeps, tokens a patch
    (r"gpt-6|gpt-5\.[6-9]", math.inf, math.inf, 1.2),
    (r"gpt-5\.5", 6000, 10_000, 1.2),
    (r"gpt-5\.4(?!-mini|-nano)", 2048, 2500, 1.2),
    (r"gpt-5\.\d|gpt-5-mini", 2048, 1536, 1.2),
    (r"gpt-5-nano", 2048, 1536, 1.5),
    (r"gpt-4\.1-mini", 2048, 1536, 1.62),
    (r"gpt-4\.1-nano", 2048, 1536, 2.46),
    (r"o4-mini", 2048, 1536, 1.72),
)
TILE_RULES = (  # model, tokens of any image, of each tile
    (r"gpt-4o-mini", 2833, 5667),
    (r"gpt-4o|gpt-4\.[15]|gpt-4-turbo", 85, 170),
    (r"gpt-5", 70, 140),
    (r"o[13]\b", 75, 150),
)
PATCH, TILE, OTHER_PATCH = 32, 512, 28  # pixels; the last is Qwen2.5-VL's, a guess for whoever has no rule
BYTES_A_TOKEN = 4  # of UTF-8, in English prose
FRAME_TOKENS = 12  # what is put around a message
TOKENS_A_WORD = 1.3
SMALL_IMAGE = 64  # tokens: whether so few were counted does not show
RESERVE = 2  # times the tokens of the largest prompt are held back for the next request
BUDGET_NAP_S = 0.05

Price = Callable[[Usage, str], "Decimal"]


def count_patches(size: Size, longest: float, most: float) -> int:
    """Return how many patches of 32 x 32 pixels the server cuts an image into, after its own shrinking."""
    scale = min(1.0, longest / max(size))
    width, height = (max(1, int(side * scale)) for side in size)
    if math.ceil(width / PATCH) * math.ceil(height / PATCH) > most:
        scale = math.sqrt(PATCH * PATCH * most / (width * height))
        scale *= min(math.floor(side * scale / PATCH) / (side * scale / PATCH) for side in (width, height))
        width, height = int(width * scale), int(height * scale)
    return math.ceil(width / PATCH) * math.ceil(height / PATCH)


def image_tokens(model: str, size: Size) -> int:
    """Return about how many tokens an image of this size is for a model."""
    name = re.sub(r"^(?:ft:|chat)", "", model.rpartition("/")[2])
    for pattern, longest, most, tokens in PATCH_RULES:
        if re.match(pattern, name):
            return math.ceil(count_patches(size, longest, most) * tokens)
    for pattern, base, tile in TILE_RULES:
        if re.match(pattern, name):
            scale = min(1.0, 2048 / max(size))
            scale = min(scale, 768 / min(size))  # never enlarged
            return base + tile * math.prod(math.ceil(side * scale / TILE) for side in size)
    return math.prod(math.ceil(side / OTHER_PATCH) for side in size)


def text_tokens(text: str) -> int:
    """Return about how many tokens a prompt is."""
    return len(text.encode()) // BYTES_A_TOKEN + FRAME_TOKENS


@dataclass(frozen=True, slots=True)
class Expected:
    """About how many tokens one image will take."""

    image: int = 0
    text: int = 0
    answer: int = 0

    @property
    def usage(self) -> Usage:
        """The same as a server counts them."""
        return Usage(self.image + self.text, self.answer)


def estimate(settings: Settings, prompt: str, size: Size) -> Expected:
    """Return about what one image will take, before anything is asked."""
    words = settings.max_words or USUAL_WORDS[settings.style]
    answer = min(settings.max_tokens, round(words * TOKENS_A_WORD))
    if settings.reasoning_effort not in {"none", "minimal"}:  # thoughts are paid for like an answer
        answer = settings.max_tokens
    return Expected(image_tokens(settings.model, size), text_tokens(prompt), answer)


def looks_unseen(usage: Usage, expected: Expected) -> bool:
    """Return whether an answer's tokens are no more than its prompt's text, so that no image may have been counted."""
    return 0 < usage.prompt <= expected.text and expected.image >= SMALL_IMAGE


def find_price(settings: Settings) -> Price | None:
    """Return what tells the dollars of one request by its usage and service tier, None when prices are not known.

    Each request is to be priced by itself: beyond so many tokens the next are dearer, and a run has more than that.
    """
    if settings.price:
        into, out = settings.price
        return lambda usage, _tier: (usage.prompt * into + usage.answer * out) / 1_000_000
    if is_this_machine(settings.base_url):
        return None
    from genai_prices import Usage as Counts
    from genai_prices import calc_price

    @functools.cache
    def rates(tier: str) -> Any:
        key = "processing" if tier == "batch" else "service_tier"
        context: Any = {key: tier} if tier in {"flex", "batch", "priority"} else None
        found = calc_price(Counts(), settings.model, provider_api_url=settings.base_url, price_context=context)
        return found.model_price

    def price(usage: Usage, tier: str) -> Decimal:
        counts = Counts(
            input_tokens=usage.prompt,
            output_tokens=usage.answer,
            cache_read_tokens=min(usage.cached, usage.prompt),
            cache_write_tokens=min(usage.cache_writes, usage.prompt - min(usage.cached, usage.prompt)),
        )
        dollars: Decimal = rates(tier).calc_price(counts)["total_price"]
        return dollars

    try:
        price(Usage(1, 1), "default")
    except (LookupError, ValueError):
        return None
    return price


def show_dollars(amount: Decimal | float) -> str:
    """Return an amount of money, small ones to a hundredth of a cent."""
    return f"${amount:,.2f}" if amount >= 10 else f"${amount:.4f}"


def describe_time(seconds: float) -> str:
    """Return a length of time as a person would say it."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1, seconds):.0f} s"


def describe_cost(settings: Settings, asked: Mapping[Expected, int], pace: float) -> str:
    """Return what a run is thought to cost, from how many images are alike; `pace` is in images a second, 0 unknown."""
    totals = [sum(getattr(one, name) * n for one, n in asked.items()) for name in ("image", "text", "answer")]
    tokens = "about {:,} tokens of images, {:,} of prompts, {:,} of answers".format(*totals)
    price = find_price(settings)
    if settings.local:
        cost = "no cost but your machine's time"
    elif price is None:
        cost = (
            f"the price of {settings.model} at {settings.host} is not known: --price IN OUT (dollars a million tokens)"
        )
    else:
        costs = {t: sum(price(one.usage, t) * n for one, n in asked.items()) for t in ("default", "flex", "batch")}
        tier, most = settings.tier or "default", settings.max_cost
        cheaper = [f"{t} {show_dollars(costs[t])}" for t in ("flex", "batch") if costs[t] < costs[tier]]
        as_tier = "" if tier == "default" else f" as {tier}"
        cost = ", ".join([f"about {show_dollars(costs[tier])}{as_tier}", *cheaper])
        if most and costs[tier] > most:
            cost += f": --max-cost {show_dollars(most)} will end it early"
    pace = min(pace or math.inf, settings.throttle_submission_rate or math.inf)
    images = sum(asked.values())
    time_s = f"; about {describe_time(images / pace)} at {pace:.1f} a second" if pace < math.inf else ""
    return f"To ask {printable(settings.model)} for {images:,}: {tokens}; {cost}{time_s}"


def is_free(error: ErrorReply) -> bool:
    """Return whether a failed request is surely not billed: it was refused, or never arrived.

    A gateway that gave up waiting may stand before a model that did not.
    """
    gateway = error.status in {502, 504} or error.status >= 520
    billed = error.is_answer or error.usage.prompt or error.usage.answer
    return error.code == "unreachable" or (error.status > 0 and not gateway and not billed)


class Bill:
    """What the answers of a run cost so far, what those on their way may cost, and what it was all thought to cost."""

    def __init__(self, price: Price | None = None, most: Decimal | None = None, tier: str | None = None) -> None:
        self.usage = Usage()
        self.spent: Decimal | int = 0
        self.held: Decimal | int = 0  # for what is on its way, or was lost there and may be billed
        self.expected: Decimal | int = 0  # of what has been answered
        self.lost = 0
        self.tiers: Counter[str] = Counter()  # what answers were billed as, where a tier was asked for
        self.has_price = price is not None
        self._price = price
        self._most = most
        self._tier = tier
        self._largest = Usage()
        self._on_their_way = 0
        self._billed_as = {""}  # service tiers: some projects have a dearer one

    def dollars(self, usage: Usage, tier: str = "") -> Decimal | int:
        """Return what a request costs, 0 when prices are not known."""
        return self._price(usage, tier or "default") if self._price else 0

    def allows(self, most: Usage, tier: str = "") -> bool:
        """Return whether the budget allows a request, all that is on its way counted at its worst."""
        return self._most is None or self.spent + self.held + self._worst(most, tier) <= self._most

    def wait_s(self, most: Usage) -> float:
        """Return the seconds until the budget may allow a request; raises StopRun when it cannot any more."""
        if self._most is None or self.allows(most):
            return 0.0
        if self._on_their_way > 0:  # they mostly cost less than is held for them
            return BUDGET_NAP_S
        spent, worst = show_dollars(self.spent + self.held), show_dollars(self._worst(most))
        raise StopRun(
            f"--max-cost {show_dollars(self._most)}: {spent} are spent, and the next request could take {worst}; "
            "raise it, then run again"
        )

    def hold(self, most: Usage, tier: str = "") -> Decimal | int:
        """Count a request as spent at its worst, and return that, to be settled when its answer comes."""
        self._on_their_way += 1
        worst = self._worst(most, tier)
        self.held += worst
        return worst

    def settle(self, held: Decimal | int, answer: Reply | ErrorReply | None, tier: str = "") -> Decimal | int:
        """Count what came back, and return what it cost; what is not known to be free or counted stays held."""
        self._on_their_way -= 1
        usage = answer.usage if answer else Usage(is_whole=False)
        largest = self._largest
        self._largest = Usage(max(largest.prompt, usage.prompt), max(largest.answer, usage.answer))
        if isinstance(answer, ErrorReply) and is_free(answer):
            self.held -= held
            return 0
        tier = (answer.tier if isinstance(answer, Reply) else "") or tier
        cost = self.dollars(usage, tier)  # of a tier that is not said, the whole price
        self._billed_as.add(tier)
        if not usage.is_whole or not usage.prompt:
            self.lost += 1
            self.held += max(cost - held, 0)
            return cost
        self.held -= held
        self.spent += cost
        self.usage += usage
        if self._tier:
            self.tiers[tier or "not said"] += 1
        return cost

    @property
    def so_far(self) -> str:
        """What is spent; where answers were not counted, what that may be at most."""
        return f"at most {show_dollars(self.spent + self.held)}" if self.lost else show_dollars(self.spent)

    def count_expected(self, usage: Usage) -> None:
        """Count what an image that has its first answer now had been thought to take."""
        self.expected += self.dollars(usage, self._tier or "")

    def _worst(self, most: Usage, tier: str = "") -> Decimal | int:
        """Return the most that a request may cost, by what is thought of it and by the largest so far."""
        prompt = RESERVE * max(most.prompt, self._largest.prompt)
        usage = Usage(prompt, max(most.answer, self._largest.answer))
        return max(self.dollars(usage, one) for one in ({tier} if tier else self._billed_as))

    def __str__(self) -> str:
        """The bill as a part of the summary."""
        parts = [f"{self.usage.prompt:,} tokens in, {self.usage.answer:,} out"]
        if self.usage.cache_writes:
            parts.append(f"{self.usage.cache_writes:,} of them written to a cache")
        if self.has_price:
            parts.append(
                self.so_far + (f" with {self.lost:,} answers lost or not counted" if self.lost else self._compare())
            )
        if self.tiers:
            parts.append("billed as " + ", ".join(f"{tier} {number:,}" for tier, number in self.tiers.most_common()))
        return "; ".join(parts)

    def _compare(self) -> str:
        if not self.expected or self._tier == "batch":  # whose images were estimated by an earlier run
            return ""
        off = round(100 * (float(self.spent / self.expected) - 1))
        return f" ({abs(off)} % {'more' if off > 0 else 'less'} than estimated)" if off else " (as estimated)"


# ------------------------------------------------------------------------------------- Trigger and style

# a full stop, but not that of an initial or an abbreviation, and only where a new sentence can begin
SENTENCE_END = (
    r"(?<!\b[A-Z])(?<!\b(?:Mr|Ms|Dr|St|Mt|No|vs|Lt|Co|Jr|Sr))(?<!\b(?:Prof|Capt|Blvd))"
    r"(?<!\b(?:Mrs|etc|Col|Gen|Sgt|Inc|Ltd|Ave|e\.g|i\.e|p\.m|a\.m|U\.S))"
    r"[.!?]+[\"”’')\]]*\s+(?=[\"“(]?[A-Z0-9À-Þ])|[。！？]+[」』”]*"
)
CLAUSE_END = r"[,;]\s+|[，；]"
SHORTEST_CLAUSE = 4  # words: "In a park" says nothing
TAG_END = r"[,;，、]\s*"
LONGEST_TAG = 6  # words
NO_BLANKS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"  # kana, Han, Hangul: written without, or with endings
DETERMINER = r"\b(an?|the|this|that|his|her|their|its|another|one|two|three)"
# what follows a name, and not the first half of one: "the ohwx is", but "the ohwx man"
AFTER_NAME = (
    r"(?:is|are|was|were|has|have|had|in|on|at|with|by|of|to|from|for|and|or|who|that|which|as|near|under|over|behind"
    r"|beside|\w+ing|(?:stand|sit|wear|hold|look|walk|ride|run|lean|pose|face|rest|play|smile|gaze|kneel|appear)s"
    r"|lies)\b"
)


ADJECTIVES = rf"((?: (?!{AFTER_NAME})\w+){{1,2}})"
NEW_SUBJECT = r"(?i)(?:an?|the|two|three|four|five|many|several) "


# a trigger that is one of these names nothing by itself: "a cat" is a cat, unless the prompt calls it so
ORDINARY = (
    r"man|woman|person|people|boy|girl|child|baby|face|hair|eye|eyes|hand|body|portrait|photo|picture|image"
    r"|painting|drawing|illustration|style|art|anime|cartoon|sketch|cat|dog|horse|bird|animal|car|house|building"
    r"|room|street|tree|flower|water|sea|sky|mountain|light|shadow|red|green|blue|yellow|black|white|brown|grey"
    r"|gray|pink|purple|orange|gold|silver|small|large|old|young|dress|shirt|coat|hat"
)


def split_text(text: str, end: str) -> list[str]:
    """Return the pieces of a text, each with the end that a pattern finds; what is quoted is never split."""
    masked = mask_quotes(text)
    ends = [0, *(match.end() for match in re.finditer(end, masked)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends) if a < b]


def count_words(text: str) -> int:
    """Return the number of words, as a person counts them."""
    return len(text.split())


def tidy_tags(text: str) -> str:
    """Return tags as trainers read them: separated by ", ", each once, with spaces for underscores.

    Tags of three characters keep theirs, as in sd-scripts: ^_^ is a face.
    """
    found: dict[str, str] = {}
    for piece in re.split(TAG_END, text):
        tag = " ".join(re.sub(r"\\([()])", r"\1", piece).strip(" .").split())
        tag = tag if len(tag) <= 3 else tag.replace("_", " ")
        if tag:
            found.setdefault(tag.casefold(), tag)
    return ", ".join(found.values())


def whole_word(word: str, spelt: str) -> str:
    """Return the pattern of a word that is no part of a longer one; scripts without blanks know no such bounds."""
    before, after = ("" if re.match(f"[{NO_BLANKS}]", c) else f"[^\\W{NO_BLANKS}]" for c in (word[0], word[-1]))
    return (f"(?<!{before})" if before else "") + spelt + (f"(?!{after})" if after else "")


def find_mention(trigger: Trigger, *, word: bool) -> str:
    """Return the pattern of the trigger in a text: its marks, and its word when that is asked for, quoted or not.

    ai-toolkit reads [name] in a caption as the trigger too (toolkit/prompt_utils.py).
    """
    spelt = re.escape(trigger.word).replace("_", "[_ ]")
    own = f"|{whole_word(trigger.word, spelt)}" if word and trigger.word else ""
    return rf"(?i:[\"“”‘`*]{{0,3}}(?:\[\s?(?:trigger|name)\s?\]{own})(?:[\"“”`*]|['’](?!s\b)){{0,3}})"


def keep_article(match: re.Match[str]) -> str:
    """Return a determiner for the word that follows it now."""
    article, following = match[1], match[2]
    if article.lower() in {"a", "an"}:
        article = article[0] + ("n" if following[0].lower() in "aeiou" else "")
    return f"{article} {following}"


def tidy_mentions(text: str, mention: str) -> str:
    """Return a caption without mentions of the trigger; where the sentence needs one, it is "the subject" now."""
    if not re.search(mention, text):
        return " ".join(text.split())
    quoted: list[str] = []

    def hide(match: re.Match[str]) -> str:
        if re.fullmatch(mention, match[0]):
            return match[0]
        quoted.append(match[0])  # what can be read in the picture stays as it is
        return f"\ue000{len(quoted) - 1}\ue001"

    text = re.sub(QUOTED, hide, text)
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
        (rf"\s*\(\s*{mention}\s*\)", ""),
        (rf"(?i),? (?:named|called|known as|labell?ed(?: as)?|identified as) {mention}", ""),
        (rf"(?i),? (?:(?:in|with) )?(?:the |an? )?style of {mention}(?!['’]s)", ""),
        (rf"(?i),? in (?:the |an? )?{mention}(?:['’]s)? style\b", ""),
        (rf"(?i){DETERMINER} {mention}-styled? (\w+)", keep_article),
        (rf",\s*{mention}\s*,(?=\s+{AFTER_NAME})", ""),
        (rf",\s*{mention}\s*(?=[,.;:!?]|$)", ""),
        (rf"(?i){DETERMINER}{ADJECTIVES} {mention}(?=\s+{AFTER_NAME}|\s*[,.;:!?]|$)", r"\1\2 subject"),
        (rf"(?i){DETERMINER}{ADJECTIVES} {mention}(?= \w)", r"\1\2"),
        (rf"(?i){DETERMINER} {mention}(?=\s+{AFTER_NAME}|\s*[,.;:!?]|['’]s\b|$)", r"\1 subject"),
        (rf"(?i){DETERMINER} {mention} (\w+)", keep_article),
        (r"(?i)\b(an?) (subject)\b", keep_article),
        (rf"(?<=[.!?] ){mention}", "The subject"),
        (mention, "the subject"),
    )
    for pattern, instead in rules:
        text = re.sub(pattern, instead, text)
    text = re.sub("\ue000(\\d+)\ue001", lambda match: quoted[int(match[1])], text)
    return " ".join(text.split())


def is_ordinary(word: str) -> bool:
    """Return whether captions use this word for other things than a trigger."""
    return bool(re.fullmatch(ORDINARY, word.casefold()))


def is_meant(trigger: Trigger, *, told: bool) -> bool:
    """Return whether the trigger's word in a sentence means the trigger: an ordinary word must have been asked for."""
    return told or not is_ordinary(trigger.word)


def strip_trigger(text: str, trigger: Trigger, *, told: bool) -> tuple[str, str]:
    """Return a caption without its trigger, and what shall stand between the two; see place_trigger for `told`."""
    # a comma of ours would be left behind where ai-toolkit deletes its mark
    between = " " if trigger.put == TRAINERS_MARK else ", "
    opening = (
        rf"(?:(?i:an?|the) )?{find_mention(trigger, word=True)}(\s*[,:;.]+[\"”’'*]{{0,3}}\s*|\s*[–—]\s*|\s+-+\s+|\s+|$)"
    )
    while match := re.match(opening, text):
        text = text[match.end() :]
        between = between if match[1].strip() or re.match(NEW_SUBJECT, text) else " "  # "ohwx stands", "ohwx a man"
    return tidy_mentions(text, find_mention(trigger, word=is_meant(trigger, told=told))), between


def place_trigger(text: str, recipe: Recipe, *, told: bool) -> str:
    """Return a caption that opens with the trigger exactly once; blank when there was nothing but the trigger.

    `told` says that the prompt named the trigger's word.
    """
    trigger = recipe.trigger
    if recipe.style == "tags":
        mention = find_mention(trigger, word=is_meant(trigger, told=told))
        # "ohwx man" is a man; of "portrait of ohwx" nothing is left
        tags = (re.sub(rf"^{mention} (?=\w)", "", tag) for tag in text.split(", "))
        bare = ", ".join(tag for tag in tags if not re.search(mention, tag))
        first = rf"{find_mention(trigger, word=True)}(?:, |$)"
        between, bare = ", ", re.sub(rf"^{first}", "", bare)
    else:
        bare, between = strip_trigger(text, trigger, told=told)
    if not bare or not trigger.put:
        return bare if bare == text or recipe.style == "tags" else bare[:1].upper() + bare[1:]
    if recipe.style != "tags" and re.match(NEW_SUBJECT, bare):
        bare = bare[0].lower() + bare[1:]
    return f"{trigger.put}{between}{bare}"


def swap_trigger(text: str, before: str, recipe: Recipe) -> str:
    """Return a caption of ours with another trigger in place of the one that it opens with."""
    if not before or not text.startswith(before):
        return place_trigger(text, recipe, told=False)
    rest = text.removeprefix(before)
    if before == TRAINERS_MARK and not re.match(rf" (?![A-Z]){AFTER_NAME}", rest):  # it stands without a comma
        rest = f", {rest.lstrip(' ,')}"
    marked = TRAINERS_MARK + rest
    return place_trigger(marked, recipe, told=False)


def find_hiding(word: str, text: str) -> str:
    """Return the longer word of a text that contains the trigger, which trainers look for as a plain substring."""
    spelt, letter = re.escape(word), f"[^\\W{NO_BLANKS}]"
    if not word or re.search(f"[{NO_BLANKS}]", word):
        return ""
    inside = re.search(rf"{letter}{{1,30}}{spelt}\w{{0,30}}|{spelt}{letter}{{1,30}}", text)
    return inside[0] if inside else ""


def find_excluded(text: str, exclude: Sequence[str]) -> list[str]:
    """Return which excluded words a text mentions, as whole words in any letter case."""
    patterns = {term: whole_word(term, re.escape(term).replace(r"\ ", r"\s+")) for term in exclude}
    return [term for term, pattern in patterns.items() if re.search(f"(?i){pattern}", text)]


def find_faults(text: str, recipe: Recipe) -> list[tuple[str, str]]:
    """Return how a caption breaks the recipe's rules: each fault's kind, and what is wrong, in words for the model."""
    faults = []
    words = count_words(text)
    sentences = len(split_text(text, SENTENCE_END)) if recipe.style == "short" else 1
    if recipe.max_words and words > recipe.max_words:
        faults.append(("too long", f"it has {words} words where at most {recipe.max_words} are wanted"))
    if sentences > 1:
        faults.append(("too long", f"it has {sentences} sentences where one is wanted"))
    if recipe.style == "tags":
        tags = text.split(", ")
        if len(tags) == 1 or sum(count_words(tag) > LONGEST_TAG for tag in tags) * 4 > len(tags):
            faults.append(("no tags", "it is no list of short tags separated by commas"))
    unsaid = [term for term in recipe.exclude if not find_excluded(recipe.trigger.word, [term])]
    if leaked := find_excluded(text, unsaid):
        faults.append(("excluded words", "it mentions what must stay unsaid: " + ", ".join(leaked)))
    return faults


def cut_caption(text: str, recipe: Recipe) -> str:
    """Return a caption cut to the recipe's length after a sentence, a tag, or where there is neither, a clause.

    A first clause that is too long by itself stays: half of it would be no caption.
    """
    limit = recipe.max_words or math.inf

    def keep(pieces: list[str]) -> str:
        lengths = itertools.accumulate(map(count_words, pieces))
        return "".join(piece for piece, length in zip(pieces, lengths, strict=True) if length <= limit).strip()

    if recipe.style == "tags":
        return keep(split_text(text, TAG_END)).rstrip(",") or text
    sentences = split_text(text, SENTENCE_END)[: 1 if recipe.style == "short" else None]
    if kept := keep(sentences):
        return kept
    clauses = keep(split_text(sentences[0], CLAUSE_END)).rstrip(",;: ")
    whole = clauses.count("(") == clauses.count(")") and count_words(clauses) >= SHORTEST_CLAUSE
    return f"{clauses}." if whole else sentences[0].strip()


# ------------------------------------------------------------------------------------------------ Throttle


class Stop:
    """Whether and why the run ends early. Who waits for anything that costs nothing yet is woken and gives up."""

    def __init__(self) -> None:
        import asyncio

        self.cause: StopRun | signal.Signals | None = None
        self._event = asyncio.Event()

    def set(self, cause: StopRun | signal.Signals) -> None:
        """End the run, and say why; the first cause counts."""
        if self.cause is None:
            self.cause = cause
            self._event.set()
            if isinstance(cause, StopRun):
                log.error("%s (no new requests; what is on its way is waited for)", cause)
            else:
                log.warning("%s: no new requests; what is on its way is waited for, once more ends at once", cause.name)

    def check(self) -> None:
        """Raise StopRun when the run ends."""
        if self.cause is not None:
            raise StopRun("the run ends")

    async def wait_for(self, event: asyncio.Event) -> None:
        """Wait for an event; raises StopRun as soon as the run ends."""
        import asyncio

        if not event.is_set():
            waiting = [asyncio.ensure_future(either.wait()) for either in (event, self._event)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
        self.check()

    async def sleep(self, seconds: float) -> None:
        """Wait; raises StopRun as soon as the run ends."""
        import asyncio

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        self.check()


LONGEST_NAP_S = 1.0  # who waits looks again: an answer may have changed what there is to wait for
LONG_S = 60.0  # a wait that a user wonders about
STEADY_S = 5.0  # a pace is measured over so long
RESERVE_S = 0.1  # of a limit's refill is left in it: requests do not arrive in the order and at the time they leave
FEW_REFUSED = 0.05  # of the answers: some servers say 429 at random, and a real limit soon says it more often
SLOWER, REGAINED = 0.8, 0.05  # of the pace: kept after a 429, won back each second of good answers


class Bucket:
    """What a server still takes, of requests or of tokens: kept by our own count, corrected by the server's word.

    Unlimited until the server speaks. It refills steadily, as OpenAI's does.
    """

    def __init__(self) -> None:
        self.taken = 0.0  # by all requests so far
        self._most = self._level = self._rate = math.inf
        self._at = 0.0

    def wait_s(self, cost: float, now: float) -> float:
        """Return the seconds until there is room for this cost; a cost that is never met waits for a full bucket."""
        self._refill(now)
        missing = min(cost + RESERVE_S * self._rate, self._most) - self._level if self._most < math.inf else 0.0
        return missing / self._rate if missing > 1e-9 else 0.0

    def take(self, cost: float) -> None:
        """Count a request that is being sent; what an absurd count says beyond a full bucket is not believed."""
        cost = min(cost, self._most)
        self.taken += cost
        self._level -= cost

    def learn(self, limit: Limit, sent_at: float, taken: float, now: float) -> None:
        """Correct the level by what an answer says, whose request was sent when `taken` had been taken.

        Some servers count at the request, some at the answer: the truth lies between the two.
        """
        self._refill(now)
        used = limit.most - limit.left
        # whatever the limit's period, the missing part comes back in the time to reset; few say too little
        if limit.reset_s and used >= min(10, limit.most / 2):
            self._rate = used / limit.reset_s
        elif self._most != limit.most:
            self._rate = limit.most / 60
        self._most = limit.most
        at_answer, since = limit.left, self.taken - taken
        at_request = min(limit.most, limit.left + self._rate * (now - sent_at)) - since
        low, high = sorted((at_answer, max(-limit.most, at_request)))
        self._level = min(max(self._level, low), high) if self._level < math.inf else low

    def _refill(self, now: float) -> None:
        if self._rate < math.inf:
            self._level = min(self._most, self._level + self._rate * (now - self._at))
        self._at = now


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to send one request, and what the throttle must know again when its answer comes."""

    sent_at: float
    tokens: float  # what it was expected to take
    taken: tuple[float, float]  # of requests and tokens, itself included
    held: Decimal | int  # dollars that it may cost


class Throttle:
    """The shared pace of all workers: a hard cap, the server's own limits, one pause for all after a 429.

    Requests are sent one after another in the order they came. Who waits holds nothing: its image is ready.
    """

    def __init__(self, rate: float | None, bill: Bill, stop: Stop) -> None:
        import asyncio

        self._bill = bill
        self._interval_s = 1 / rate if rate else 0.0
        self._requests, self._tokens = Bucket(), Bucket()
        self._tokens_each = 0.0  # of a request, as the answers so far say
        self._pace, self._raise = math.inf, 0.0  # requests a second after a 429, and what each second adds to them
        self._good: deque[float] = deque(maxlen=1000)  # when the last answers came, by what they were
        self._refused: deque[float] = deque(maxlen=1000)
        self._next = self._not_before = self._slowed_at = self._raised_at = self._said_until = 0.0
        self._queue = asyncio.Lock()
        self._stop = stop

    async def turn(self, most: Usage) -> Ticket:
        """Wait until the caller may send a request that takes this at most; raises StopRun when the run ends first."""
        async with self._queue:
            self._stop.check()
            while (wait_s := max(self._wait_s(time.monotonic()), self._bill.wait_s(most))) > 0:
                self._say_long(wait_s, time.monotonic())
                await self._stop.sleep(min(wait_s, LONGEST_NAP_S))
            now = time.monotonic()
            self._next = max(now, self._next) + max(self._interval_s, 1 / self._pace)
            self._requests.take(1)
            self._tokens.take(self._tokens_each)
            taken = (self._requests.taken, self._tokens.taken)
            return Ticket(now, self._tokens_each, taken, self._bill.hold(most))

    def learn(self, ticket: Ticket, limits: Mapping[str, Limit], tokens: int | None) -> None:
        """Correct the pace by an answer: by its headers, and when it is a good one by the tokens that it took."""
        now = time.monotonic()
        if tokens is not None:
            self._good.append(now)
            self._tokens_each += (tokens - self._tokens_each) * (0.1 if self._tokens_each else 1)
            self._tokens.take(tokens - ticket.tokens)
            self._pace += self._raise * (now - self._raised_at)
            self._raised_at = now
        for bucket, unit, taken in zip((self._requests, self._tokens), UNITS, ticket.taken, strict=True):
            if unit in limits:
                bucket.learn(limits[unit], ticket.sent_at, taken, now)

    def pause(self, ticket: Ticket, retry_after_s: float) -> None:
        """Let nobody send before the server wants, and slow all down, once for all requests that met the same limit."""
        now = time.monotonic()
        self._not_before = max(self._not_before, now + retry_after_s)
        self._refused.append(now)
        good, refused = ([at for at in times if at > now - STEADY_S] for times in (self._good, self._refused))
        many = len(refused) > FEW_REFUSED * (len(good) + len(refused))
        if many and len(good) > 1 and ticket.sent_at >= self._slowed_at:
            self._slowed_at = self._raised_at = now
            self._pace = min(self._pace, SLOWER * len(good) / (now - good[0]))
            self._raise = REGAINED * self._pace

    def _say_long(self, wait_s: float, now: float) -> None:
        """Say once that nothing is sent for long."""
        if wait_s > LONG_S and now > self._said_until:
            self._said_until = now + wait_s
            log.warning("the limits leave no room for about %s; waiting (Ctrl-C loses nothing)", describe_time(wait_s))

    def _wait_s(self, now: float) -> float:
        return max(
            self._next - now,
            self._not_before - now,
            self._requests.wait_s(1, now),
            self._tokens.wait_s(self._tokens_each, now),
        )


# ----------------------------------------------------------------------------------------------------- Ask


def open_client(settings: Settings) -> AsyncOpenAI:
    """Return the SDK's client, with its own retries off: there is one layer of them, ours."""
    from openai import AsyncOpenAI, DefaultAioHttpClient, Timeout

    is_here = settings.base_url.startswith("http:") and is_this_machine(settings.base_url)
    try:
        # twice as fast as the SDK's other one: benchmarks/README.md; no proxy lies on the way to this machine itself
        transport = DefaultAioHttpClient(follow_redirects=False, trust_env=not is_here)
    except Exception as error:  # of the proxy's address, a kind of its own
        raise ValueError(str(error)) from error
    return AsyncOpenAI(
        api_key=settings.api_key or "none",
        base_url=settings.base_url,
        max_retries=0,
        timeout=Timeout(settings.timeout, connect=min(15.0, settings.timeout)),
        http_client=transport,
    )


def describe_broken_connection(error: BaseException, host: str) -> ErrorReply:
    """Return a connection's error in the system's own words, which lie at the bottom of a chain of exceptions."""
    import aiohttp

    unreachable = False
    while error.__cause__ or error.__context__:
        unreachable |= isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
        error = error.__cause__ or error.__context__ or error
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if "Connect call failed" in words and isinstance(error, OSError) and error.errno:
        words = os.strerror(error.errno)  # asyncio puts its own words over the system's
    if unreachable:
        return ErrorReply(0, f"cannot connect to {host}: {words}", "unreachable")
    return ErrorReply(0, f"the connection to {host} broke: {shorten(words, 120)}")


def describe_failure(error: Exception, settings: Settings) -> ErrorReply:
    """Return what went wrong with a request, in whichever shape the SDK raises it; anything else is raised again."""
    import aiohttp
    import openai

    match error:
        case openai.APIStatusError():
            text = error.response.content.decode("utf-8-sig", "replace")
            return parse_error(error.status_code, text, parse_retry_after(error.response.headers, datetime.now(UTC)))
        case openai.APIConnectionError() | aiohttp.ClientError():  # the SDK passes on some of the latter
            return describe_broken_connection(error, settings.host)
        case TimeoutError():
            return ErrorReply(0, f"no answer within {settings.timeout:g} s (GETCAP_TIMEOUT)")
        case ValueError() | TypeError():  # an address or header that cannot be sent
            return ErrorReply(0, f"cannot ask {settings.host}: {shorten(str(error), 120)}", "unreachable")
    raise error


def keep_trying(settings: Settings, stop: Stop, name: Callable[[RetryCallState], str]) -> AsyncRetrying:
    """Return the one layer of retries: of what raises TryAgain; `name` says what is tried, for the log."""
    import random

    from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

    def wait_s(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked_s = error.retry_after_s if isinstance(error, TryAgain) else 0.0
        return backoff_s(state.attempt_number, settings.throttle_backoff_factor, asked_s, random.random())

    def log_wait(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        number, retries, pause_s = state.attempt_number, settings.throttle_retries, state.upcoming_sleep
        log.warning("%s: %s; retry %d of %d in %.1f s", name(state), error, number, retries, pause_s)

    return AsyncRetrying(
        retry=retry_if_exception_type(TryAgain),
        wait=wait_s,
        stop=stop_after_attempt(settings.throttle_retries + 1),
        sleep=stop.sleep,
        before_sleep=log_wait,
        reraise=True,
    )


@dataclass(slots=True)
class Question:
    """One image on its way to a caption, and what it has cost so far."""

    path: str  # for messages
    prompt: str
    image: bytes  # a JPEG in base64
    expected: Expected
    usage: Usage = Usage()
    dollars: Decimal | int = 0
    attempts: int = 0


def rate_headers(response: Any) -> dict[str, str]:
    """Return the x-ratelimit headers of an SDK's response: from the raw ones, since each look-up walks them all."""
    return {
        name.decode("latin-1").lower(): value.decode("latin-1")
        for name, value in response.headers.raw
        if name[:11].lower() == b"x-ratelimit"
    }


SOON = timedelta(days=90)


async def warn_of_shutdown(client: AsyncOpenAI, model: str, today: date) -> None:
    """Say when OpenAI switches the model off soon; whatever goes wrong here costs the run nothing.

    Source: https://developers.openai.com/api/reference/resources/models/methods/retrieve.md
    """
    with contextlib.suppress(Exception):
        day = date.fromisoformat((await client.models.retrieve(model, timeout=15)).shutdown_date or "")
        if day - today <= SOON:
            log.warning("%s is switched off on %s; GETCAP_MODEL names another", model, day)


class Asker:
    """Asks for captions, for all workers: retries, and what one answer taught about the server counts for all."""

    def __init__(self, client: AsyncOpenAI, settings: Settings, recipe: Recipe, bill: Bill, stop: Stop) -> None:
        import asyncio

        self._bill = bill
        self._client = client
        self._settings = settings
        self._tags = recipe.style == "tags"
        self._stop = stop
        self._throttle = Throttle(settings.throttle_submission_rate, bill, stop)
        self.parameters = first_parameters(settings)
        self.is_proven = False  # whether the server has answered: key, model and address are right then
        self._first = asyncio.Lock()
        self._server_up = asyncio.Event()
        self._server_up.set()
        self._warned = self._warned_of_tier = False
        retrying = keep_trying(settings, stop, lambda state: printable(state.args[0].path))
        self._attempt_often = retrying.wraps(self._attempt)

    async def ask(self, question: Question) -> str:
        """Return the answer, which passed the gate; raises FailImage or StopRun.

        Until the server has answered once, one image at a time is asked: what is wrong for all costs one request.
        """
        if not self.is_proven:
            async with self._first:
                if not self.is_proven:
                    return await self._ask(question)
        return await self._ask(question)

    def follow(self, news: str | StopRun) -> None:
        """Heed what is said of a server of our own: blank while it is down, its new URL, or why the run must end."""
        if isinstance(news, StopRun):
            self._stop.set(news)
        elif news:
            self._client.base_url = news
        if news:
            self._server_up.set()
        else:
            self._server_up.clear()

    async def _ask(self, question: Question) -> str:
        for budget in (1, 2):
            with contextlib.suppress(CutOff):
                return await self._attempt_often(question, budget)
        tokens = self._settings.max_tokens
        raise FailImage("cut off", f"also with {2 * tokens} tokens; set GETCAP_MAX_TOKENS={4 * tokens} or ask for less")

    async def _attempt(self, question: Question, budget: int) -> str:
        """Ask once; once more for each parameter that the server rejects, of which there are only so many."""
        most = Usage(question.expected.usage.prompt, self._settings.max_tokens * budget)
        while True:
            sent = self.parameters
            await self._stop.wait_for(self._server_up)
            ticket = await self._throttle.turn(most)
            log.debug("%s: asking, %d KB", printable(question.path), len(question.image) // 1000)
            question.attempts += 1
            body = build_request(self._settings.model, question.prompt, sent, budget, question.image)
            answer = await self._send(body, ticket, question)
            if isinstance(answer, Reply):
                return judge_reply(answer, tags=self._tags)
            changed = adapt_parameters(sent, answer)
            if self._settings.max_cost and changed is not None and not any(name in changed for name in TOKEN_LIMITS):
                raise StopRun(f"--max-cost cannot be kept: the server takes no limit for its answers: {answer.message}")
            if changed is None:
                error = judge_error(answer, datetime.now(UTC), first=not self.is_proven)
                # flex without room is no limit of ours: https://developers.openai.com/api/docs/guides/flex-processing
                is_limit = answer.status == 429 and "resource_unavailable" not in answer.code
                if is_limit and isinstance(error, TryAgain):
                    self._throttle.pause(ticket, answer.retry_after_s)
                raise error
            if self.parameters is sent:  # else another worker has learnt it meanwhile
                self.parameters = changed
                self._log_change(sent, changed, answer.message)

    async def _send(self, body: bytes, ticket: Ticket, question: Question) -> Reply | ErrorReply:
        """Send one request and count what came back: its limits, its tokens, its cost."""
        received: Reply | ErrorReply | None = None
        try:
            received, headers = await self._post(body)
        finally:
            dollars = self._bill.settle(ticket.held, received)
        answer = self._without_key(received)
        tokens = answer.usage.prompt + answer.usage.answer if isinstance(answer, Reply) else None
        self._throttle.learn(ticket, parse_limits(headers, datetime.now(UTC)), tokens)
        if isinstance(answer, Reply):
            self.is_proven = True
            if answer.usage.is_whole and not question.usage.prompt:
                self._bill.count_expected(question.expected.usage)
            self._warn_of_unseen(answer.usage, question)
            self._warn_of_tier(answer.tier)
        question.usage += answer.usage
        question.dollars += dollars
        return answer

    async def _post(self, body: bytes) -> tuple[Reply | ErrorReply, Mapping[str, str]]:
        """Send one request and return what came back, in whichever shape, and its headers."""
        import asyncio

        import openai

        try:
            async with asyncio.timeout(self._settings.timeout):  # the SDK's counts each read anew
                response = await self._client.post(
                    "/chat/completions", cast_to=openai.HttpxBinaryResponseContent, content=body
                )
                # JSON is UTF-8, whatever a header says
                text = response.content.decode("utf-8-sig", "replace")
                return parse_reply(text), rate_headers(response.response)
        except Exception as error:
            headers = rate_headers(error.response) if isinstance(error, openai.APIStatusError) else {}
            return describe_failure(error, self._settings), headers

    def _warn_of_unseen(self, usage: Usage, question: Question) -> None:
        if not self._warned and looks_unseen(usage, question.expected):
            self._warned = True
            log.warning(
                "%s: perhaps no image was seen: the server counts %d prompt tokens, where the text alone has about %d "
                "and the image about %d; see whether the captions fit the images, and whether %s takes images (some "
                "servers count wrongly)",
                printable(question.path),
                usage.prompt,
                question.expected.text,
                question.expected.image,
                self._settings.model,
            )

    def _warn_of_tier(self, tier: str) -> None:
        asked = self._settings.service_tier
        if asked and tier not in {"", asked} and not self._warned_of_tier:
            self._warned_of_tier = True
            log.warning("GETCAP_SERVICE_TIER: %s was asked for, and the server bills answers as %s", asked, tier)

    def _without_key(self, answer: Reply | ErrorReply) -> Reply | ErrorReply:
        """Return an answer without the key, which some servers repeat in their errors."""
        key = self._settings.api_key
        if len(key) < 6 or key.isalpha():  # "ollama" is no secret, and a word of captions
            return answer
        texts = {f.name: value for f in dataclasses.fields(answer) if isinstance(value := getattr(answer, f.name), str)}
        hidden: dict[str, Any] = {name: value.replace(key, "[key]") for name, value in texts.items()}
        return dataclasses.replace(answer, **hidden)

    def _log_change(self, sent: Parameters, changed: Parameters, message: str) -> None:
        before = ", ".join(f"{name}={value}" for name, value in sent.items() if changed.get(name) != value)
        after = ", ".join(f"{name}={value}" for name, value in changed.items() if sent.get(name) != value)
        log.warning("the server rejects %s; sending %s from now on: %s", before, after or "without it", message)


# ---------------------------------------------------------------------------------------------------- Pool


def count_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def run_pool(jobs: Iterator[Any], handle: Callable[[Any], Awaitable[None]], workers: int, stop: Stop) -> None:
    """Handle each job in one of N workers; they share the iterator, so that a job is made when a worker is free.

    A StopRun from `handle` ends the run: nothing new is begun, what is begun is waited for.
    """
    import asyncio

    async def work() -> None:
        for job in jobs:
            if stop.cause is not None:
                return
            try:
                await handle(job)
            except StopRun as cause:
                stop.set(cause)

    async with asyncio.TaskGroup() as group:
        for number in range(1, workers + 1):
            group.create_task(work(), name=f"worker-{number:02}")


# -------------------------------------------------------------------------------------------------- Report

MOST_FAILURES_IN_A_ROW = 10


class Report:
    """What became of each image, or of each text: owns the counts, the summary and the exit code."""

    def __init__(self, started: float, stream: IO[str] | None = None, *, repairs: str = "") -> None:
        self.written = 0
        self.repaired: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.failed: list[Failed] = []
        self.noted: Counter[str] = Counter()
        self.recorded = 0
        self.left = 0  # images that --limit or an early end leaves for the next run
        self.unanswered = 0  # of these, images that a batch came back without
        self.bill = Bill()
        self.ended_by: StopRun | signal.Signals | None = None
        self._in_a_row: deque[str] = deque(maxlen=MOST_FAILURES_IN_A_ROW)  # reasons
        self._started = started
        self._stream = stream
        self._repairs = repairs  # what is done to texts, when this is a report of those

    def record(self, outcome: Outcome) -> None:
        """Count one outcome, and write it to the report file; what failed is said at once, with what to do about it."""
        self.recorded += 1
        if isinstance(outcome, Skipped):
            self.skipped[outcome.reason] += 1
            return
        if isinstance(outcome, Written):
            self.written += 1
            self._in_a_row.clear()
            for kind, detail in outcome.notes:
                self.noted[kind] += 1
                log.warning("%s: %s: %s", printable(outcome.job.image), kind, detail)
        elif isinstance(outcome, Repaired):
            self.repaired[outcome.kind] += 1
            log.info("%s: repaired: %s", printable(outcome.path), outcome.kind)
        else:
            self.failed.append(outcome)
            log.error("%s: %s: %s", printable(outcome.path), outcome.reason, outcome.detail)
            if outcome.by_server:
                self._in_a_row.append(outcome.reason)
        self._write_line(outcome)

    @property
    def same_failure(self) -> str:
        """The server's error that ended the last ten images, none having succeeded in between; else nothing."""
        full = len(self._in_a_row) == MOST_FAILURES_IN_A_ROW
        return self._in_a_row[0] if full and len(set(self._in_a_row)) == 1 else ""

    @property
    def exit_code(self) -> int:
        """The exit code: 128 + the signal, 3 stopped, 1 some failed, 0."""
        if isinstance(self.ended_by, signal.Signals):
            return 128 + self.ended_by
        return 3 if self.ended_by else int(bool(self.failed or self.unanswered))

    def tally(self, seconds: float) -> str:
        """Return the counts as one line."""
        reasons = Counter(failure.reason for failure in self.failed)
        counts = {self._repairs: self.repaired} if self._repairs else {}
        counts |= {"skipped": self.skipped, "failed": reasons}
        counts |= {"to look at": self.noted} if self.noted else {}
        parts = [] if self._repairs else [f"captioned {self.written:,}"]
        for word, count in counts.items():
            listed = ", ".join(f"{reason} {n:,}" for reason, n in count.most_common())
            parts.append(f"{word} {count.total():,}" + (f" ({listed})" if listed else ""))
        if self.left:
            parts.append(f"left for the next run {self.left:,}")
        done = self.skipped.total() + self.repaired.total() if self._repairs else self.written
        rate = f"{seconds:.1f} s, {done / seconds if seconds else 0:,.1f} a second"
        tokens = "" if self._repairs else f" {self.bill};"
        said = f"{', '.join(parts)};{tokens} {rate}"
        return said[0].upper() + said[1:]

    def summary(self, now: float) -> str:
        """Return the summary: a line for each failure, by reason, and the tally."""
        failures = sorted(self.failed, key=lambda failure: (failure.reason, failure.path))
        lines = [f"{printable(failure.path)}: {failure.reason}" for failure in failures]
        if self.skipped["edited by hand"] + self.skipped["made elsewhere"]:
            lines.append(
                "Captions edited by hand or made elsewhere stay; delete a caption's file to have it made anew."
            )
        if self.ended_by is not None:
            lines.append("Ended early; the same command goes on where it was.")
        return "\n".join([*lines, self.tally(now - self._started)])

    def close(self, now: float) -> None:
        """Write the last line of the report file."""
        summary: dict[str, Any] = {"outcome": "summary", "captioned": self.written, "skipped": dict(self.skipped)}
        summary |= {"failed": Counter(failure.reason for failure in self.failed), "left": self.left}
        summary |= {"noted": dict(self.noted), "repaired": dict(self.repaired)}
        summary |= {"prompt_tokens": self.bill.usage.prompt, "answer_tokens": self.bill.usage.answer}
        summary |= {"usd": round(float(self.bill.spent), 8)} if self.bill.has_price else {}
        summary |= {"usd_at_most": round(float(self.bill.spent + self.bill.held), 8)} if self.bill.has_price else {}
        summary |= {"usd_estimated": round(float(self.bill.expected), 8)} if self.bill.has_price else {}
        summary |= {"service_tiers": dict(self.bill.tiers)} if self.bill.tiers else {}
        stopped = getattr(self.ended_by, "name", None) or (str(self.ended_by) if self.ended_by else None)
        summary |= {"seconds": round(now - self._started, 3), "stopped": stopped, "exit_code": self.exit_code}
        self._write_line(summary)

    def _write_line(self, item: Outcome | dict[str, Any]) -> None:
        if self._stream is None:
            return
        if isinstance(item, Written):
            notes = {"notes": [": ".join(note) for note in item.notes]} if item.notes else {}
            path = {"outcome": "captioned", "image": item.job.image, "file": item.job.caption}
            item = {**path, "caption": item.text, **notes}
        elif isinstance(item, Repaired):
            item = {"outcome": "repaired", "file": item.path, "kind": item.kind}
        elif isinstance(item, Failed):
            item = {"outcome": "failed", "image": item.path, "reason": item.reason, "detail": item.detail}
        try:
            self._stream.write(json.dumps(item) + "\n")  # ASCII: names may hold bytes that are no text
            self._stream.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._stream.close()  # else what is buffered fails once more at the end
            self._stream = None
            self.failed.append(Failed("--report", "report not written", str(error.strerror)))
            log.error("--report: not written any further: %s; the run goes on", error.strerror)  # noqa: TRY400


@contextlib.contextmanager
def show_progress(total: int | None, report: Report, *, unit: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show how far a run is: a bar on a terminal, a line every 30 s or 5 % elsewhere; yields what counts some more."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bar = tqdm(total=total, unit=unit, file=sys.stderr, disable=quiet or None, dynamic_ncols=True)
    failed_before = len(report.failed)
    done, started, said_at = 0, time.monotonic(), time.monotonic()

    def update(number: int = 1) -> None:
        nonlocal done, said_at
        done += number
        failed, usage = len(report.failed) - failed_before, report.bill.usage
        tokens = f"{usage.prompt + usage.answer:,} tokens"
        cost = report.bill.so_far if report.bill.has_price else tokens
        bar.set_postfix_str(f"{failed} failed, {cost}" if total else f"{failed} failed", refresh=False)
        bar.update(number)
        now = time.monotonic()
        if bar.disable and ((total and 20 * done // total > 20 * (done - 1) // total) or now - said_at >= 30):
            said_at, rate = now, done / max(now - started, 1e-9)
            said = f"{done:,}" + (f" of {total:,}" if total else "") + f", {failed} failed, {rate:.1f} a second"
            left = f", {timedelta(seconds=round((total - done) / rate))} left, {cost}" if total else ""
            log.info("%s%s", said, left)

    with bar, logging_redirect_tqdm([log]) if not bar.disable else contextlib.nullcontext():
        yield update


# --------------------------------------------------------------------------------------------------- Batch

ENDPOINT: Final = "/v1/chat/completions"
FIRST_POLL_S, LONGEST_POLL_S, NO_ROOM_S = 0.5, 60.0, 120.0
MOST_PAGES = 20  # of a server's batches that are looked through
FILE_TIMEOUT_S = 3600.0  # to move a file of 200 MB
MOST_LINES = 2000  # of a part: OpenAI takes 50,000, other engines give nothing back before the last is done
LINES, ROWS, STATE = ".jsonl", ".manifest.jsonl", ".json"  # the files of a part
GOING = {"validating", "in_progress", "finalizing", "cancelling"}
ALL = -1  # lines: a part is done with
ENDED = {"completed", "expired", "cancelled", "failed"}  # https://developers.openai.com/api/reference/resources/batches
NOT_REACHED = r"batch_(?:expired|cancelled)"  # lines that nobody looked at
NO_ROOM = r"(?i)token_limit|enqueued"  # https://github.com/openai/openai-python/issues/2084
REASONERS = r"(?:.*/)?(?:gpt-(?:[5-9]|\d\d)|o\d)"


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a batch: which line asks about it, and what that was made from."""

    custom_id: str
    image: str  # below the image folder, with slashes
    image_sha256: str
    image_size: int
    image_mtime_ns: int
    recipe: str


@dataclass(slots=True)
class Part:
    """One file of requests at the server: what it is called there, blank until it is known."""

    path: str  # of its files, without their endings
    lines: int = 0
    input_file_id: str = ""
    batch_id: str = ""
    is_being_created: bool = False  # so that the server may know it already
    held: Decimal | int = 0  # dollars that it may cost
    overwrite: bool = False  # whether captions of ours may be replaced
    try_at: float = 0.0  # when there may be room for it


def batch_parameters(settings: Settings, parameters: Parameters) -> Parameters:
    """Return the parameters of a batch's lines, without what may be unknown: nobody can learn from a rejection there.

    Batches have a price of their own, and only reasoning models know an effort.
    """
    unfit = {"service_tier"}
    if settings.reasoning_effort == "none" and not re.match(REASONERS, settings.model):
        unfit.add("reasoning_effort")
    return {name: value for name, value in parameters.items() if name not in unfit}


def build_line(custom_id: str, body: bytes) -> bytes:
    """Return one line of a batch file. Source: https://platform.openai.com/docs/api-reference/batch/request-input."""
    head = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": None}
    return json.dumps(head).encode().removesuffix(b"null}") + body + b"}\n"


def parse_result(line: bytes) -> tuple[str, Reply | ErrorReply, str] | None:
    """Return which line of a batch a result answers, how, and what the result is called; None for what is none.

    Source: https://platform.openai.com/docs/api-reference/batch/request-output; old versions of vLLM give the
    completion itself as `response`, new ones the failure as `error` without a body.
    """
    try:
        found = json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("custom_id"), str) or "body" in found:
        return None  # the latter is a request
    custom_id = found["custom_id"]
    result_id = f"{custom_id} {found['id']}" if found.get("id") else ""  # an engine may number its results anew
    response, error = found.get("response"), found.get("error")
    response = response if isinstance(response, dict) else {}
    body = response if "choices" in response else response.get("body")
    status = response.get("status_code", 200 if body else 0)
    status = status if isinstance(status, int) else 0
    text = body if isinstance(body, str) else json.dumps(body)
    if body and not error and 200 <= status < 300:
        answer = parse_reply(text)
        answer = dataclasses.replace(answer, tier="batch") if isinstance(answer, Reply) else answer
        return custom_id, answer, result_id
    said = error or body or "no answer"
    return custom_id, parse_error(0 if 200 <= status < 300 else status, json.dumps(said)), result_id


@dataclass(frozen=True, slots=True)
class BatchState:
    """How a batch stands, whichever server says so."""

    status: str
    completed: int  # lines with an answer
    done: int  # those and lines that failed
    files: tuple[tuple[str, str], ...]  # kind and id of what came of it
    errors: tuple[tuple[int, str], ...]  # line, 0 for all, and what is wrong with it


def read_batch(body: Mapping[str, Any]) -> BatchState:
    """Return how a batch stands. Source: https://platform.openai.com/docs/api-reference/batch/object."""
    counts = body.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    completed, failed = (read_count(counts.get(name)) or 0 for name in ("completed", "failed"))
    errors = body.get("errors")
    errors = errors.get("data") if isinstance(errors, dict) else errors
    errors = errors if isinstance(errors, list) else [errors] if errors else []
    said = []
    for error in errors:
        line = error.get("line") if isinstance(error, dict) else 0
        code = f"{error.get('code') or 'error'}: " if isinstance(error, dict) else ""
        said.append((line if isinstance(line, int) else 0, shorten(code + (error_text(error) or "no reason"), 200)))
    files = (("output", body.get("output_file_id")), ("error", body.get("error_file_id")))
    found = tuple((kind, file_id) for kind, file_id in files if isinstance(file_id, str) and file_id)
    return BatchState(str(body.get("status")), completed, completed + failed, found, tuple(said))


def is_not_reached(error: ErrorReply) -> bool:
    """Return whether nobody looked at a line, so that it may be asked again."""
    return bool(re.match(NOT_REACHED, error.code))


def is_in_shard(name: str, number: int, count: int) -> bool:
    """Return whether an image, by its path below the image folder, belongs to a part of the set, on every machine."""
    digest = hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape"))
    return int(digest.hexdigest(), 16) % count == number - 1


def can_be_named(name: str) -> bool:
    """Return whether a file can be called so."""
    try:
        os.fsencode(name)
    except ValueError:
        return False
    return True


def parse_row(line: bytes) -> Row | None:
    """Return the row of a manifest's line, None for one that a crash has torn."""
    try:
        found = json.loads(line)
        row = Row(**{item.name: found[item.name] for item in dataclasses.fields(Row)})
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    texts = (row.custom_id, row.image, row.image_sha256, row.recipe)
    numbers = (row.image_size, row.image_mtime_ns)
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(number, int) for number in numbers):
        return None
    # a manifest from elsewhere must not lead out of the folder, nor to what is no image
    hidden = os.path.isabs(row.image) or any(part[:1] in {"", "."} for part in row.image.split("/"))
    is_name = row.image.lower().endswith(tuple(IMAGE_SUFFIXES)) and "\0" not in row.image
    return row if is_name and not hidden and can_be_named(row.image) else None


def group_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the images of each line, the lines in the order of their file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.custom_id, []).append(row)
    return found


def read_rows(path: str) -> Iterator[Row]:
    """Yield the rows of a manifest. Raises OSError."""
    with open(path, "rb", opener=lambda path, _: os.open(path, READ_ONLY)) as file:
        yield from filter(None, map(parse_row, file))


class PartWriter:
    """Writes lines into parts that servers take, and beside them which images each is about.

    A line that stands in an earlier part is not written again, its image is added to that part's rows.
    """

    def __init__(self, name: Callable[[int], str], manifest: str, most_bytes: float) -> None:
        self._name = name  # of the part with a number
        self._manifest = manifest  # of all parts; blank for one beside each
        self._most_bytes = most_bytes
        self._rows_of: dict[str, str] = {}  # the manifest with a line, by its id
        self._number = self._bytes = 0
        self._part: Part | None = None
        self._file: IO[bytes] | None = None

    def add(self, row: Row, line: bytes) -> Part | None:
        """Write a line and its row; returns the part that is full by now, closed and on the disk. Raises OSError."""
        if known := self._rows_of.get(row.custom_id):
            self._add_row(known, row)
            return None
        part = self._part
        full = part is not None and (self._bytes + len(line) > self._most_bytes or part.lines >= MOST_LINES)
        done = self.finish() if full else None
        if self._part is None or self._file is None:
            self._number += 1
            self._part = Part(self._name(self._number))
            self._file = open(self._part.path + LINES, "xb")  # noqa: SIM115 - until the part is full
        self._file.write(line)
        self._bytes += len(line)
        self._part.lines += 1
        self._rows_of[row.custom_id] = self._manifest or self._part.path + ROWS
        self._add_row(self._rows_of[row.custom_id], row)
        return done

    def has(self, custom_id: str) -> bool:
        """Return whether a line is written already."""
        return custom_id in self._rows_of

    @property
    def part(self) -> Part | None:
        """The part that is being written."""
        return self._part

    def finish(self) -> Part | None:
        """Close the part that is being written, and return it. Raises OSError."""
        done, self._part, self._bytes = self._part, None, 0
        if done:
            with open(self._manifest or done.path + ROWS, "ab") as rows:
                os.fsync(rows.fileno())
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        return done

    def _add_row(self, manifest: str, row: Row) -> None:
        with open(manifest, "ab") as file:
            file.write(json.dumps(dataclasses.asdict(row)).encode() + b"\n")


def save_part(part: Part) -> None:
    """Keep what is known of a part: with this file it exists. Raises OSError."""
    names = ("lines", "input_file_id", "batch_id", "is_being_created", "overwrite")
    state = {**{name: getattr(part, name) for name in names}, "held": str(part.held)}
    write_whole(part.path + STATE, lambda file: file.write(json.dumps(state).encode()))


def load_parts(folder: str) -> list[Part]:
    """Return the parts that are not collected yet. Raises OSError, and SettingsError for what no run has written."""
    from decimal import Decimal

    parts = []
    for name in sorted(name for name in list_names(folder) if name.endswith(STATE)):
        path = os.path.join(folder, name)
        try:
            state = json.loads(Path(path).read_bytes())
            state["held"] = Decimal(state["held"])
            parts.append(Part(path.removesuffix(STATE), **state))
        except FileNotFoundError:  # collected by now
            continue
        except (ValueError, TypeError, LookupError, ArithmeticError):
            raise SettingsError(f"{printable(path)}: is damaged; delete it to give that part of the batch up") from None
    return parts


def remove_part(part: Part) -> None:
    """Remove the files of a part: first what makes it one."""
    for ending in (STATE, LINES, ROWS, *(f".{kind}{LINES}" for kind in ("output", "error"))):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part.path + ending)


def remove_halves(folder: str) -> None:
    """Remove the files of parts that a run had not finished when it died. Raises OSError."""
    names = list_names(folder)
    whole = {name.removesuffix(STATE) for name in names if name.endswith(STATE)}
    for name in names:
        if name.partition(".")[0] not in whole:
            os.unlink(os.path.join(folder, name))


def waiting_rows(folder: str) -> Iterator[Row]:
    """Yield the images of batches that are not collected yet. Raises SettingsError."""
    path = folder
    try:
        for part in load_parts(folder):
            path = part.path + ROWS
            try:
                yield from read_rows(path)
            except FileNotFoundError:
                if os.path.exists(part.path + STATE):  # else it is collected by now
                    raise
    except OSError as error:
        advice = f"; to give that batch up, delete {printable(folder)}"
        raise SettingsError(f"{printable(path)}: cannot be read: {error.strerror}{advice}") from None


def waiting_images(journal: Journal) -> dict[str, str]:
    """Return the images of all batches beside a journal, and the folder of each's batch. Raises SettingsError."""
    try:
        names = [name for name in list_names(journal.folder) if name.startswith(BATCHES)]
    except OSError as error:
        raise SettingsError(f"{printable(journal.folder)}: cannot be read: {error.strerror}") from None
    return {row.image: name for name in names for row in waiting_rows(os.path.join(journal.folder, name))}


# ------------------------------------------------------------------------------------------------ Encoding

BOMS = (  # UTF-32 first: its little-endian mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32", "utf-32-le"),
    (codecs.BOM_UTF32_BE, "UTF-32", "utf-32-be"),
    (codecs.BOM_UTF16_LE, "UTF-16", "utf-16-le"),
    (codecs.BOM_UTF16_BE, "UTF-16", "utf-16-be"),
)
CONTROLS = r"[\x00-\x08\x0e-\x1f\x7f]"  # what no legacy text has
C1 = "[\x80-\x9f]"
C1_IN_DISGUISE = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}

# UTF-8 that was read as cp1252 or Latin-1: a first byte, and as many more as it asks for. Only a text with such a run
# is shown to ftfy, for which each "Ã " is damage.
MORE = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
# These follow a capital in healthy text too: “AMANHÃ”, IRMÃ®, CAFÉ³, 10 Å², Ø½. They take a small letter before it, or
# an Â or Ã that begins a word, which is no word.
QUOTES_AFTER, SIGNS_AFTER = "“”‘’«»‹›–—…", "™®©¹²³¼½¾±ºª§¶•·°¡¿\xa0"
MOJIBAKE = (
    f"[Â-Þ](?:(?![{QUOTES_AFTER}{SIGNS_AFTER}]){MORE}|(?<=[a-zß-ÿ].)[{QUOTES_AFTER}{SIGNS_AFTER}]"
    f"|(?<![^\\W\\d_].)(?<=[ÂÃ])[{SIGNS_AFTER}])|[à-ï]{MORE}{{2}}|[ð-ô]{MORE}{{3}}"
)
# what any damage begins with: with one class at its front, re skips the rest quickly
SUSPICION = f"[\x80-\x9fÂ-ô](?:(?<=[\x80-\x9f])|(?={MORE}))"

# The letters beyond a to z of Western languages: a text with one that is in none of them is not Western.
WESTERN = (
    "àâæçéèêëîïôùûüÿœñöä",  # French, Dutch, and what English borrows
    "äöüßáéíóúñç",  # German, Spanish
    "åäæöøéüàêôóñ",  # Danish, Norwegian, Swedish, Finnish
    "àèéìòù",  # Italian
    "àáâãçéêíóôõúü",  # Portuguese
    "àçèéíïòóúüñ",  # Catalan
    "áæéíðóöúýþ",  # Icelandic
)
HAN, WIDE = "\u3400-\u9fff", "\u3000-\u303f\uff01-\uff5e"  # characters, their punctuation
HOMES = (  # (codecs, the letters of a language they were made for, how many make a vote), the most telling first
    ("cp949", f"가-힣{WIDE}", 6),
    ("cp932 euc_jp", f"ぁ-ヿ{HAN}{WIDE}", 6),
    ("gb18030 big5", f"{HAN}{WIDE}", 6),
    ("cp1251 koi8_r cp866", "а-яё", 6),  # Russian
    ("cp1251 koi8_u", "а-щьюяґєії", 6),  # Ukrainian
    ("cp1253 iso8859_7", "ΐά-ία-ώ", 6),  # Greek; ΰ is rare there, and what cp1251's а becomes
    ("cp1255", "א-ת", 6),  # Hebrew, which else is a Cyrillic text without sense
    ("cp1250 iso8859_2", "ąćęłńóśźż", 3),  # Polish
    ("cp1250 iso8859_2", "áčďéěíňóřšťúůýž", 3),  # Czech
    ("cp1250 iso8859_2", "áéíóöőúüű", 3),  # Hungarian
    ("cp1254", "çğıöşüâîû\u0307", 5),  # Turkish; the last is what lower() makes of İ, besides i
)
VOTERS = [*dict.fromkeys(codec for names, _, _ in HOMES for codec in names.split()), "cp1252"]
NAMES = {
    "gb18030": "GB18030", "big5": "Big5", "cp932": "Shift_JIS", "euc_jp": "EUC-JP", "koi8_r": "KOI8-R",
    "koi8_u": "KOI8-U", "iso8859_2": "ISO-8859-2", "iso8859_7": "ISO-8859-7",
}  # fmt: skip
# where the standards keep what is in daily use: (codec, first code, end)
DAILY = {
    "gb18030": ("gb2312", b"\xb0", b"\xd8"), "big5": ("big5", b"\xa4", b"\xc9"), "cp949": ("euc_kr", b"\xb0", b"\xc9"),
}  # fmt: skip
MARKS = "‘’“”„‚«»‹›¡¿–—…•·€£¥§©®™°²³½¼¾×±ºª´№\xa0"
MISPLACED = (  # marks where none stands, capitals after small letters, two scripts in a word
    r"[^\W\d_](?:[€£¥§©½¼¾±×¿¡„‚‹]|[“”«»®™°²³ºª•][^\W\d_])|[×±][^\W\d_]|©[a-zß-ÿ]|[€£¥§©®™°²³½¼¾×±ºª·•´]{2}|«{2}|»{2}"
    r"|[¿¡„‚‹](?![\w“‘«\"'(])|¿(?![^?]{0,300}\?)|¡(?![^!]{0,300}!)|(?<!\d)[¼½¾]\w{4}|(?<![\dcmt])[²³]"
    r"|[a-zß-öø-ÿąćęłńœšśźżžа-џά-ώ][À-ÖØ-ÞŒŠŽА-ЯЁ-ЏΆ-Ϋ]|[А-ЯЁ-Џ]{2}[а-џ]|(?i:[a-z])[Ͱ-ӿ]|[Ͱ-ӿ](?i:[a-z])"
)
NOT_WESTERN = (  # what other languages' letters become in cp1252, where no Western language has them
    r"(?<!\w)(?![þÞ])[À-ÖØ-öø-ÿœŒ]{2,}(?!\w)"  # Russian: ïðèâåò
    r"|[aeoy]æ|iæ(?!r)|ê[dgkzjwhoayæ]|[it]ê[cp]|ñ(?![aeiouyáéíóúü])|œ(?!u|il|[tds]|no)"  # Polish ć ę ń ś
    r"|è[aeiouyáéíóúýkjhz]|ì\w|[kljvz]ù|[aou]ø"  # Czech č ě ů ř
    r"|(?i:õ(?!e)|[ytznkvg]û)"  # Hungarian ő ű
    r"|(?is:\A(?=.*[ðýþ])(?!.*[áéíóúæ]))"  # Turkish ğ ı ş
    r"|ã(?!o|e|s?\b)|[^\Wçmlhrfsv]ã\b|ç[^\Waouàáâãòóôõùúå]"  # Romanian ă, Latvian ē
)


@dataclass(frozen=True, slots=True)
class Decoding:
    """What a file's bytes are: its text, and what was repaired to get there.

    kind     "right", "unclear", "no text", or what was repaired: "BOM", "UTF-16", "cp1252", "BOM, mojibake" ...
    text     the repaired text; blank when unclear or no text
    found    the text as it was decoded, before letters were repaired; blank when right
    guesses  when unclear or no text, at most two (name for --encoding, the text as it would read)
    why      when unclear or no text, why nothing was done
    """

    kind: str
    text: str = ""
    found: str = ""
    guesses: tuple[tuple[str, str], ...] = ()
    why: str = ""


# how much speaks for it, its codec, the text: the greatest is the best
Reading = tuple[tuple[int, float], str, str]


def decode_text(data: bytes, encoding: str | None = None) -> Decoding:
    """Return what the bytes are; `encoding` says how to read those that are not UTF-8 and have no BOM."""
    text = decode_utf8(data)
    if (
        text is not None
        and text[:1] != "\ufeff"
        and "\0" not in text
        and (text.isascii() or not re.search(SUSPICION, text))
    ):
        return Decoding("right", text)  # first, and at the speed of reading: nearly all files end here
    for bom, kind, codec in BOMS:
        if data.startswith(bom):
            return decode_as(data[len(bom) :], codec, kind)
    body = data.removeprefix(codecs.BOM_UTF8)
    kind = "BOM" if len(body) < len(data) else ""
    if b"\0" in body:
        return decode_controls(body, encoding)
    if text is not None:
        return repair(text, kind)
    return decode_as(body, encoding, encoding) if encoding and not kind else decode_legacy(body, kind)


def decode_utf8(data: bytes) -> str | None:
    """Return the text, None when the bytes are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def decode(data: bytes, codec: str) -> str | None:
    """Return the text, None when the bytes are none in this codec or would not be the same again."""
    try:
        text = data.decode(codec)
        same = text.encode(codec).endswith(data)  # Python's utf-16 writes a BOM
        text.encode()  # unicode_escape can make half characters
    except UnicodeError:
        return None
    return text if same and not re.search(CONTROLS, text) else None


def decode_as(data: bytes, codec: str, kind: str) -> Decoding:
    """Return the decision on bytes whose codec is known, because a BOM or the user says so."""
    text = decode(data, codec)
    return Decoding("unclear", why=f"not all of it is {kind}") if text is None else repair(text, kind)


def decode_controls(data: bytes, encoding: str | None) -> Decoding:
    """Return the decision on bytes with controls among them: UTF-32, UTF-16, or no text."""
    for codec in ("utf-32-le", "utf-32-be"):
        if text := decode(data, codec):
            return repair(text, "UTF-32")
    wide = [(codec, text) for codec in ("utf-16-le", "utf-16-be") if (text := decode(data, codec))]
    for codec, text in wide:
        zeros = data[codec == "utf-16-le" :: 2].count(0)
        # few zeros prove nothing by themselves: b"hello\0" is 敨汬o
        if zeros == data.count(0) and (zeros * 4 >= len(data) or is_at_home(text, "а-яёґєіїά-ώ")):
            return repair(text, "UTF-16")
    if encoding and (text := decode(data, encoding)):
        return repair(text, encoding)
    asian = ("cp949", "cp932", "gb18030", "big5")
    if guesses := tuple(guess for guess in wide if any(telling(guess[1], codec) for codec in asian)):
        return Decoding("unclear", guesses=guesses, why="UTF-16 without a BOM, perhaps")
    return Decoding("no text", why="zero or control bytes")


def decode_legacy(data: bytes, kind: str = "") -> Decoding:
    """Return the decision on bytes that are not UTF-8: Western by its letters, UTF-8 with strays, or by vote."""
    if re.search(CONTROLS, data.decode("latin-1")):
        return decode_controls(data, None)
    western = decode(data, "cp1252")
    if western and is_western(western):
        return repair(western, kind, "cp1252")
    if text := read_strays(data):
        return repair(text, kind, "stray bytes")
    readings = vote(data)
    evidence, codec, best = readings[0] if readings else ((0, 0.0), "", "")
    rivals = [
        weight
        for weight, other, text in readings
        if text != best and (weight >= evidence or (weight[1] >= evidence[1] and is_caps(text, other)))
    ]
    if evidence[0] and not rivals and (text := decode(data, codec)):
        return repair(text, kind, NAMES.get(codec, codec))
    readings.sort(key=lambda reading: is_caps(reading[2], reading[1]), reverse=True)
    texts = {text: codec for _, codec, text in reversed(readings)}
    guesses = tuple((codec, text) for text, codec in reversed(texts.items()))[:2]
    return Decoding("unclear", guesses=guesses, why="the bytes fit more than one encoding, or none well")


def is_at_home(text: str, letters: str) -> bool:
    """Return whether all beyond ASCII is one of these letters, or a mark; and each where it can stand."""
    return not re.search(f"[^\\x00-\\x7f{letters}{MARKS}]", text.lower()) and not re.search(MISPLACED, text)


def is_western(text: str) -> bool:
    """Return whether the text is one of a Western language."""
    return not re.search(NOT_WESTERN, text) and any(is_at_home(text, letters) for letters in WESTERN)


def read_strays(data: bytes) -> str | None:
    """Return UTF-8 with its stray bytes read as cp1252; None when they are many or not Western."""
    text = data.decode("utf-8", "surrogateescape")  # a stray byte becomes half a surrogate
    strays = re.findall("[\udc80-\udcff]", text)
    if len(strays) * 2 > len(re.sub("[\x00-\x7f]", "", text)):
        return None

    def read(stray: re.Match[str]) -> str:
        return bytes([ord(stray[0]) - 0xDC00]).decode("cp1252", "replace")

    # the strays are judged beside any letter or any mark: what is UTF-8 may be of any language
    alone = re.sub("[^\x00-\x7f\udc80-\udcff]", lambda valid: "a" if valid[0].isalpha() else " ", text)
    return re.sub("[\udc80-\udcff]", read, text) if is_western(re.sub("[\udc80-\udcff]", read, alone)) else None


def vote(data: bytes) -> list[Reading]:
    """Return charset-normalizer's readings of the beginning that give the same bytes again, the best first."""
    from charset_normalizer import from_bytes

    sample = re.match(rb"(?s).{1,65536}(?![^ \n])|.{1,65536}", data)  # to a blank: no second byte of a sign is one
    data = sample[0] if sample else data
    matches = from_bytes(data, cp_isolation=VOTERS, preemptive_behaviour=False, enable_fallback=False)
    texts = ((match.coherence, match.encoding, decode(data, match.encoding)) for match in matches)
    readings = [((telling(text, codec), language), codec, text) for language, codec, text in texts if text is not None]
    return sorted(readings, key=lambda reading: reading[0], reverse=True)


def telling(text: str, codec: str) -> int:
    """Return 2 for Hangul or kana, 1 for other letters at home in this codec, 0 for too few or for others."""
    for names, letters, enough in HOMES:
        if codec in names.split() and is_at_home(text, letters) and len(re.findall(f"(?i)[{letters}]", text)) >= enough:
            special = "가" in letters or "ぁ" in letters
            return (1 + special) * (is_usual(text, codec) and ("ぁ" not in letters or bool(re.search("[ぁ-ヺ]", text))))
    return 0


def is_caps(text: str, codec: str) -> bool:
    """Return whether the text may be words in capitals; KOI8-R's small letters are cp1251's capitals, and so on."""
    return not is_usual(text, codec) and telling(text.lower(), codec) > 0


def is_usual(text: str, codec: str) -> bool:
    """Return whether few of the characters are rare ones, or capitals: what another encoding makes of a text."""
    if daily := DAILY.get(codec):
        name, first, end = daily
        signs = re.findall(f"[{HAN}가-힣]", text)
        return sum(not first <= sign.encode(name, "ignore") < end for sign in signs) <= len(signs) / 5
    beyond = re.sub(r"[\x00-\x7f]", "", text)
    return sum(map(str.isupper, beyond)) <= sum(map(str.islower, beyond))


def repair(found: str, *kinds: str) -> Decoding:
    """Return the decision on a decoded text: BOMs dropped, mojibake and C1 controls repaired until none is left."""
    text, before, done = found.lstrip("\ufeff"), None, [kind for kind in kinds if kind]
    while text != before:
        before = text
        for name, mend in (("mojibake", mend_mojibake), ("C1 controls", mend_c1)):
            mended = mend(text).lstrip("\ufeff")
            if mended != text and name not in done:
                done.append(name)
            text = mended
    if re.search(C1, text) or text.count("\ufffd") > found.count("\ufffd"):
        return Decoding("unclear", why="letters were lost in an earlier conversion")
    return Decoding(", ".join(done), text, found) if done else Decoding("right", text)


def mend_mojibake(text: str) -> str:
    """Return the text without UTF-8 that was read as something else."""
    if not re.search(MOJIBAKE, text):
        return text
    import ftfy

    return ftfy.fix_encoding(text)


def mend_c1(text: str) -> str:
    """Return the text with its C1 controls as cp1252 has them, unchanged when it does not have them all."""
    mended = text.translate(C1_IN_DISGUISE)
    return text if re.search(C1, mended) else mended


def same_meaning(found: str, text: str, suffix: str) -> bool:
    """Return whether a YAML, JSON or TOML file says the same after its repair, but for repaired letters.

    True as well for other files, and for one that could not be parsed before.
    """
    before = outline_file(found.lstrip("\ufeff"), suffix)
    return before is None or before == outline_file(text, suffix)


def outline_file(text: str, suffix: str) -> str | None:
    """Return the outline of what a file holds, None when it cannot be parsed or is of another kind."""
    import tomllib

    import yaml

    parsers: dict[str, Any] = {
        ".json": json.loads,
        ".jsonl": lambda lines: [json.loads(line) for line in lines.split("\n") if line.strip()],
        ".toml": tomllib.loads,
    }
    # all scalars as they are written: unknown tags are no obstacle
    parsers[".yaml"] = parsers[".yml"] = lambda documents: list(yaml.load_all(documents, yaml.BaseLoader))
    try:
        return outline(parsers[suffix.lower()](text), {})
    except Exception:  # parsers raise whatever they stumble over
        return None


def outline(value: Any, seen: dict[int, str]) -> str:
    """Return a parsed value's fingerprint, with only the ASCII characters of its strings: the rest may be repaired.

    What YAML's aliases share is looked at once: a few lines can stand for billions.
    """
    if isinstance(value, str):
        return fingerprint("".join(re.findall("[!-~]", value)))
    if not isinstance(value, dict | list):
        return fingerprint(type(value).__name__, repr(value))
    if id(value) not in seen:
        pairs = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        seen[id(value)] = fingerprint(type(value).__name__, *(outline(part, seen) for part in pairs))
    return seen[id(value)]


# -------------------------------------------------------------------------------------------------- Repair

TEXT_SUFFIXES = (".txt", ".caption", ".yaml", ".yml", ".json", ".jsonl", ".toml")
LARGEST_TEXT = 64 * 1000 * 1000
PASSAGE = 30  # characters on either side of a change that are shown
MOST_PASSAGES = 3


@dataclass(frozen=True, slots=True)
class Damage:
    """A file to be repaired, as it was found."""

    root: str
    path: str
    sha256: str


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or leads to one; a link that leads to itself does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def walk_texts(roots: Sequence[str], suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield each text below the roots as (root, path), folder by folder, each folder sorted; no folder twice.

    Hidden names are passed over; a folder that cannot be read is yielded as if it were a text, to be named.
    """
    seen = set()
    for root in roots:
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    found = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda e: e.name)
            except OSError:
                yield root, folder
                continue
            for entry in found:
                if is_folder(entry):
                    waiting.append(entry.path)
                elif entry.name.lower().endswith(suffixes):
                    yield root, entry.path


def read_text_bytes(path: str) -> bytes:
    """Return a text file's bytes. Raises OSError for what is no file, too large, or cannot be read."""
    handle = os.open(path, READ_ONLY)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no file that can be read", path)
        if status.st_size > LARGEST_TEXT:
            raise OSError(errno.EFBIG, f"is over {LARGEST_TEXT // 1_000_000} MB", path)
        data = os.read(handle, status.st_size + 1)
        while more := os.read(handle, 65536) if len(data) != status.st_size else b"":
            data += more
        return data
    finally:
        os.close(handle)


def decode_file(data: bytes, path: str, encoding: str | None) -> Decoding:
    """Return the decision on a file; one whose repair would change what a config file means is unclear."""
    found = decode_text(data, encoding)
    if found.found and not same_meaning(found.found, found.text, os.path.splitext(path)[1]):
        return Decoding("unclear", why="its repair would change what the file means")
    return found


def describe_doubt(found: Decoding) -> str:
    """Return why a file is left alone, and the guesses to choose from."""
    guesses = "; ".join(f'as {encoding} it reads "{shorten(text, 120)}"' for encoding, text in found.guesses)
    advice = f"{guesses}; name what is right with --encoding" if guesses else "look at it in an editor"
    return f"{found.why}; {advice}"


def count_same(one: str, other: str) -> int:
    """Return how many characters two texts have in common from their start."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def find_passages(before: str, after: str) -> list[tuple[str, str]]:
    """Return the passages of two texts that differ, a pair a line, with some characters around them."""
    lines = zip(before.split("\n"), after.split("\n"), strict=False)
    pairs = []
    for old, new in itertools.islice((pair for pair in lines if pair[0] != pair[1]), MOST_PASSAGES):
        start = count_same(old, new)
        end = count_same(old[start:][::-1], new[start:][::-1])
        first = max(0, start - PASSAGE)
        pairs.append((old[first : len(old) - end + PASSAGE], new[first : len(new) - end + PASSAGE]))
    return pairs


def describe_repair(data: bytes, found: Decoding) -> list[str]:
    """Return the changed passages of a file before and after, a line each; bytes that are no UTF-8 as \\x92."""
    before = found.found if decode_utf8(data) is None and b"\0" in data else data.decode("utf-8", "backslashreplace")
    pairs = find_passages(before.removeprefix("\ufeff"), found.text)
    lines = [
        f"    {mark} {shorten(text, 5 * PASSAGE)}" for pair in pairs for mark, text in zip("-+", pair, strict=True)
    ]
    return lines or [f"    = {shorten(found.text, 2 * PASSAGE)}"]


def warn_of_link(path: str, roots: Sequence[str]) -> None:
    """Say that a link leads out of the folders that are repaired."""
    real = os.path.realpath(path)
    inside = (os.path.join(os.path.realpath(root), "") for root in roots)
    if not real.startswith(tuple(inside)):
        log.warning("%s: is at %s, out of the folder, and repaired there", printable(path), printable(real))


def find_damage(settings: Settings, roots: Sequence[str], report: Report) -> Iterator[Damage]:
    """Yield the files that need a repair; what is right, unclear or cannot be read goes into the report."""
    suffixes = (*TEXT_SUFFIXES, f".{settings.caption_ext or 'txt'}".lower())
    with show_progress(None, report, unit="file", quiet=log.level > logging.INFO) as update:
        for number, (root, path) in enumerate(walk_texts(roots, suffixes), 1):
            if number % 100 == 0:
                update(100)
            try:
                data = read_text_bytes(path)
            except OSError as error:
                report.record(Failed(path, "unreadable file", str(error.strerror)))
                continue
            found = decode_file(data, path, settings.encoding)
            if found.kind == "right":
                report.skipped["already right"] += 1
            elif found.kind in {"unclear", "no text"}:
                report.record(Failed(path, found.kind, describe_doubt(found)))
            else:
                warn_of_link(path, roots)
                if settings.dry_run:
                    report.repaired[found.kind] += 1
                    print(f"{printable(path)}: {found.kind}", *describe_repair(data, found), sep="\n")
                yield Damage(root, path, hashlib.sha256(data).hexdigest())


def repair_file(damage: Damage, journal: Journal, encoding: str | None) -> Repaired | Failed:
    """Repair one file, whole or not at all, its permissions and owner kept; the journal knows it first."""
    path = os.path.realpath(damage.path)
    try:
        if not os.stat(path).st_mode & 0o222:  # the superuser could, and should not
            return Failed(damage.path, "read-only file", "make it writable, then run again")
        data = read_text_bytes(path)
        if hashlib.sha256(data).hexdigest() != damage.sha256:
            return Failed(damage.path, "changed by now", "another program is writing it; run again")
        found = decode_file(data, path, encoding)
        repaired = found.text.encode()
        journal.append(damage.path, Entry("repaired", caption_sha256=hashlib.sha256(repaired).hexdigest()))
        write_whole(path, lambda file: file.write(repaired), put_instead)
    except OSError as error:
        return Failed(damage.path, "not written", str(error.strerror))
    return Repaired(damage.path, found.kind)


def repair_roots(settings: Settings) -> list[str]:
    """Return the folders to repair. Raises SettingsError when there is none, or one that cannot be used."""
    roots = []
    captions = "caption_dir" if settings.caption_dir else "image_dir"  # beside the images
    for name in (captions, "config_dir"):
        path = getattr(settings, name)
        if path is not None and (name != "config_dir" or os.path.lexists(path)):
            check_folder(name, path)
            roots.append(str(path))
    if not roots:
        raise SettingsError("--fix-encoding: name a folder that exists with --caption-dir, --config-dir, or both")
    return roots


def run_repair(settings: Settings, roots: Sequence[str], report: Report) -> None:
    """Make every text below the roots UTF-8; the originals of all that is to be changed are kept first."""
    found = {os.path.realpath(damage.path): damage for damage in find_damage(settings, roots, report)}
    damaged = list(found.values())  # a file and links to it are one
    stamp = new_stamp()
    for root in roots if not settings.dry_run else []:
        here = [damage for damage in damaged if damage.root == root]
        if not here:
            continue
        journal = Journal(root)
        try:
            journal.open()
            for folder in {os.path.dirname(damage.path) for damage in here}:
                remove_abandoned(folder)
            kept = keep_originals(root, [damage.path for damage in here], KEPT, stamp)
            for damage in here:
                report.record(repair_file(damage, journal, settings.encoding))
            log.info("the originals are in %s; --undo puts them back", printable(kept))
        except (OSError, StopRun) as error:
            report.ended_by = StopRun(f"{printable(journal.folder)}: the originals cannot be kept there: {error}")
            log.error("%s", report.ended_by)  # noqa: TRY400
        finally:
            journal.close()


# -------------------------------------------------------------------------------------------------- Review

FIX = "repair it with --fix-encoding"
RENEW = "delete the caption and run again, or write it by hand"
FINDINGS = {  # what each does in training, and what to do about it
    "no caption": ("is trained with the trigger alone, or stops the training", "run this without --review"),
    "blank caption": ("counts as none", "run this without --review"),
    "caption without an image": ("is never read", "delete it, or bring its image back"),
    "shared caption file": ("two images are trained with one caption", "rename one of them"),
    "another extension": ("the trainer does not read it and trains without words", "rename it, or set caption_ext"),
    "extension not read": ("the trainer reads other files", "leave --caption-ext out, or set caption_ext"),
    "captions elsewhere": ("the trainer looks beside the images", "move them there, or use --metadata"),
    "format not read": ("ai-toolkit passes over all but jpg, jpeg, png and webp in silence", "convert it"),
    "wrong suffix": ("programs that go by the name mistake it", "rename it"),
    "not an image": ("the trainer stops at it, or passes it over", "open it in a viewer and save it again"),
    "merged names": ("ai-toolkit's upload writes _ for other characters: one replaces the other", "rename one"),
    "not UTF-8": ("ends the training at the moment it is read", FIX),
    "BOM": ("an invisible character opens the caption", FIX),
    "C1 controls": ("invisible characters are trained", FIX),
    "mojibake": ("letters are trained as nonsense", FIX),
    "damaged letters": ("letters lost before are trained as marks", "write them again"),
    "several lines": ("sd-scripts reads the first; SimpleTuner and OneTrainer pick one of them", "join them"),
    "refused": ("a refusal is trained", RENEW),
    "error text": ("an error message is trained", RENEW),
    "invisible characters": ("they are trained and nobody sees them", "delete them"),
    "reasoning": ("a model's thoughts are trained", RENEW),
    "looping": ("a phrase said over and over is trained", RENEW),
    "empty": ("there are no words to train", RENEW),
    "opening": ("words about the picture as a picture teach nothing", "delete them"),
    "markup": ("its marks are trained like words", "delete them"),
    "cut off": ("half a sentence is trained", RENEW),
    "wrong script": ("the text encoder reads another language than in the rest of the set", RENEW),
    "trigger missing": ("ai-toolkit puts it in front, others train without it", "write it, or let --trigger do so"),
    "trigger twice": ("it stands where something else is meant", "leave one"),
    "trigger in another case": ("trainers do not know it again", "write it as in the job file"),
    "trigger in a word": ("ai-toolkit takes that for the trigger, and adds none", "take one that is no part of a word"),
    "excluded words": ("the trait is bound to these words, not to the trigger", "take them out"),
    "no tags": ("tags were asked for", RENEW),
    "too long": ("what stands at its end is not read", "shorten it; --max-words makes shorter ones"),
    "identical captions": ("different images are trained as the same", "see whether the model looked"),
}  # fmt: skip
OTHER_FINDING = ("the trainer stops at it or passes it over", "see to it by hand")
TRAINED_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # ai-toolkit, toolkit/data_loader.py
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".webm", ".mkv", ".wmv", ".m4v", ".flv")
CAPTION_SUFFIXES = (".txt", ".caption", ".tags")
FORMAT_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "GIF": (".gif",),
    "BMP": (".bmp",), "TIFF": (".tif", ".tiff"), "AVIF": (".avif",), "HEIF": (".heic", ".heif"),
}  # fmt: skip
FORMAT_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
OTHER_IMAGES = (".jfif", ".jpe", ".jp2", ".jxl", ".tga", ".psd", ".svg")  # neither captioned nor trained
TOKEN_LIMITS_OF_MODELS = (  # by a job file's arch or name_or_path; CLIP's 77 include two marks
    (r"(?i)sdxl|sd_?xl|sd15|sd_?1|v1-5|stable-diffusion(?!-3)|pony|illustrious|noobai|juggernaut", 75),
    (r"(?i)hidream", 128),
    (r"(?i)pixart.*sigma", 300),
    (r"(?i)pixart", 120),
    (r"(?i)auraflow|lumina|omnigen", 256),
    (r"(?i)ltx", 1024),
    (r"(?i)flux|flex|wan|chroma|kontext|anima|krea|qwen", 512),
)
PICTURE = r"(?:image|photo(?:graph)?|picture|illustration|drawing|painting|screenshot)"
ABOUT_IMAGE = (
    rf"(?i)(?:this|the) (?:\w+ ){{0,2}}{PICTURE}"
    r"(?: (?:(?:you )?(?:sent|shared|provided|uploaded)|you['’]ve \w+|above|below))?(?: (?:appears to|seems to))?"
    r" (?:shows?|depicts?|features?|captures?|presents?|displays?|portrays?|contains?"
    r"|is (?:of|an? (?:photo|image|picture)))\b"
    r"|the scene (?:shows|depicts)\b|(?:in|based on) (?:this|the) (?:image|photo|picture)(?:,| (?:we|you|there)\b)"
    rf"|(?:we|you|i) (?:can )?see\b|(?:title|image|photo)\s*:"
    rf"|(?:this|it|here) (?:is|appears to be) (?:an?|the) {PICTURE}"
    r" (?:of|showing)\b|an image of\b|looking at (?:this|the) (?:image|photo|picture)|arafe?d?\b"
    r"|(?:das|dieses) (?:bild|foto) zeigt|auf (?:dem|diesem) (?:bild|foto)\b|l['’]image (?:montre|représente)"
    r"|(?:sur|dans) (?:cette|l['’]) ?image\b|la imagen muestra|en (?:la|esta) imagen\b|a imagem mostra"
    r"|l['’]immagine mostra"
    r"|на (?:изображении|фото)\b|(?:这张|该|此)?(?:图片|图像|照片)(?:展示|显示|中|描绘)|以下是|この画像"
    r"|이 (?:이미지|사진)"
)
DANGLING = (  # nothing ends with these
    r"\b(?:a|the|of|with|and|or|from|her|his|its|their|while|because|which|that|whose|under|between|into|onto)$"
)
NEVER_CLOSED = rf"(?<![:;='’-])\([^)]*$|(?<!{INCH})\"[^\"]*$|“[^”]*$|「[^」]*$"
FRAGMENTS = 3  # that a list has: photographers' words at the end of a prompt are no sentence
LONG_ENOUGH = 33  # tokens
LOST = r"\ufffd|(?<![\w/?=&.])[A-Za-z]{1,20}\?[a-z]{1,20}(?![\w=/])"  # not watch?v=
BREAKS_LINES = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"  # Thai, Lao, Burmese, Khmer: between words that have no blanks
)
SCRIPTS = {  # the first words of characters' names, by what they are used with
    **dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "IDEOGRAPHIC", "HALFWIDTH"), "CJK"),
    **dict.fromkeys(("FULLWIDTH", "MASCULINE", "FEMININE", "MODIFIER"), "LATIN"),
}
# of another script, how many letters are a name, a sign or a formula; Cyrillic ones look like Latin ones, and are none
FEW_LETTERS = {"CJK": 1, "CYRILLIC": 0, "HANGUL": 4, "ARABIC": 4, "HEBREW": 4, "THAI": 4, "DEVANAGARI": 4, "GREEK": 4}
LONGEST_PHRASE = 5  # words
FEW_PHRASES = 10  # that are printed
TAUGHT = 0.8  # of the captions: a fragment in as many is what the set teaches, whether meant or not
MANY = 0.05
FEW_CAPTIONS = 5  # in which nothing is frequent yet
STOP_WORDS = re.compile(
    r"a|an|the|and|or|of|in|on|at|to|with|from|by|for|as|is|are|was|were|be|been|has|have|had|it|its|this|that|his|her"
    r"|their|they|he|she|who|which|while|there|into|over|under|near|behind|beside|between|up|down|out|off|one|two"
)


@dataclass(slots=True)
class Sample:
    """One image and its caption as a trainer reads them; what there is not, is blank."""

    image: str
    caption: str = ""
    text: str = ""
    findings: list[Finding] = field(default_factory=list)
    is_file: bool = False  # whether there is an image to be shown: a browser would wait for a pipe
    made: Entry | None = None  # what the journal knows of it
    edited: bool = False  # since it was made

    def find(self, kind: str, detail: str = "") -> None:
        """Add a finding, which is named by the caption where there is one."""
        self.findings.append(Finding(kind, self.caption or self.image, detail))


def read_caption(data: bytes) -> tuple[str, list[tuple[str, str]]]:
    """Return what a caption file says, and what is wrong with its bytes and lines: kinds and details."""
    decoding = decode_text(data)
    if decoding.kind == "right" and (lost := re.search(LOST, decoding.text)):
        return decoding.text.strip(), [("damaged letters", lost[0])]
    if decoding.kind in {"unclear", "no text"}:
        text = data.decode("utf-8", "replace")
        return text.strip(), [("damaged letters" if decode_utf8(data) is not None else "not UTF-8", decoding.why)]
    faults = []
    for kind in decoding.kind.split(", ") if decoding.kind != "right" else ():
        faults.append((kind, "") if kind in FINDINGS else ("not UTF-8", f"it is {kind}"))
    text = decoding.text.strip()
    if len(lines := text.splitlines()) > 1:
        faults.append(("several lines", f"{len(lines)} lines"))
    return text, faults


def find_chatter(text: str, recipe: Recipe) -> list[tuple[str, str]]:
    """Return what in a caption is a chat model's and no caption, by the rules that answers are judged by."""
    tags = recipe.style == "tags"
    bare = re.sub(rf"^{find_mention(recipe.trigger, word=True)}[\s,.:]*", "", text)
    if not bare:  # the trigger alone is a caption that people train with
        return []
    try:
        cleaned = judge_reply(Reply(bare, "stop", "", has_reasoning=False, usage=Usage()), tags=tags)
    except FailImage as error:
        return [(error.reason.removesuffix(" only"), shorten(text, 80))]
    if strip_reasoning(bare) != bare:
        return [("reasoning", shorten(text, 80))]
    opening = re.match(OPENING, bare) or re.match(ABOUT_IMAGE, bare)
    faults = [("opening", shorten(opening[0], 80))] if opening else []
    hidden = set(re.findall(INVISIBLE, bare)) - ({"\u200b"} if re.search(BREAKS_LINES, bare) else set())
    if hidden:
        faults.append(("invisible characters", ", ".join(sorted(f"U+{ord(c):04X}" for c in hidden))))
    as_one_line = " ".join((", " if tags else " ").join(re.sub(INVISIBLE, "", bare).splitlines()).split())
    if cleaned != as_one_line and not re.match(OPENING, bare):
        faults.append(("markup", f"would read {shorten(cleaned, 80)}"))
    return faults


def is_cut_off(text: str) -> bool:
    """Return whether a caption ends in mid-sentence: after a word that needs another, or with its last stop missing."""
    if re.search(DANGLING, text) or re.search(NEVER_CLOSED, re.sub(QUOTED, "", text)):
        return True
    # people leave out the last stop of a short caption; a model does not, unless it was stopped
    sentences = split_text(text, SENTENCE_END)
    is_list = len(split_text(sentences[-1], CLAUSE_END)) >= FRAGMENTS if sentences else False
    is_long = caption_tokens(text) >= LONG_ENOUGH and len(sentences) > 1 and not is_list
    return is_long and bool(re.search(r"[^\W\d],?$", text))


def find_trigger_faults(text: str, trigger: Trigger) -> list[tuple[str, str]]:
    """Return what is wrong with the trigger in a caption, by what ai-toolkit does (toolkit/prompt_utils.py)."""
    if not trigger.put:
        return []
    word = f"|{whole_word(trigger.word, re.escape(trigger.word))}" if trigger.word else ""
    # what is quoted is read in the picture
    exact = re.findall(rf"\[(?:trigger|name)\]{word}", re.sub(QUOTED, "", text))
    exact = exact or re.findall(rf"\[(?:trigger|name)\]{word}", text)
    if exact:
        many = len(exact) > 1 and not is_ordinary(trigger.word)
        return [("trigger twice", f"{len(exact)} times")] if many else []
    if loose := re.search(find_mention(trigger, word=True), text):
        return [("trigger in another case", loose[0])]
    if inside := find_hiding(trigger.word, text):
        return [("trigger in a word", f"{trigger.word} in {inside}")]
    return [("trigger missing", trigger.word or trigger.put)]


def caption_tokens(text: str) -> int:
    """Return about how many tokens a caption is for a text encoder."""
    signs = len(re.findall(f"[{NO_BLANKS}]", text))
    return signs + round(TOKENS_A_WORD * count_words(re.sub(f"[{NO_BLANKS}]", "", text)))


def token_limit(architecture: str) -> int | None:
    """Return how many tokens of a caption a model reads, by the name that a job file gives it; None when unknown."""
    return next((limit for pattern, limit in TOKEN_LIMITS_OF_MODELS if re.search(pattern, architecture)), None)


def judge_caption(text: str, recipe: Recipe) -> list[tuple[str, str]]:
    """Return what is wrong with one caption's words: kinds and details."""
    faults = find_chatter(text, recipe)
    is_caption = all(kind in {"opening", "markup"} for kind, _ in faults)
    if is_caption and recipe.style != "tags" and is_cut_off(text):
        faults.append(("cut off", f"…{shorten(text[-40:])}"))
    faults += find_trigger_faults(text, recipe.trigger)
    faults += find_faults(text, recipe)
    limit, tokens = token_limit(recipe.architecture), caption_tokens(text)
    if limit and tokens > limit:
        faults.append(("too long", f"about {tokens} tokens, where {recipe.architecture} reads {limit}"))
    return faults


def judge_name(name: str, image_format: str) -> list[tuple[str, str]]:
    """Return what is wrong with an image's name, by what it holds."""
    suffix = os.path.splitext(name)[1].lower()
    faults = [] if suffix in TRAINED_SUFFIXES else [("format not read", suffix)]
    if suffix not in FORMAT_SUFFIXES.get(image_format, (suffix,)):
        faults.append(("wrong suffix", f"it holds a {image_format}"))
    return faults


def find_scripts(text: str) -> Counter[str]:
    """Return how many letters of each script a caption has; what is quoted is copied from the image."""
    bare = re.sub(QUOTED, "", text)
    names = (unicodedata.name(c, "").split(" ")[0] for c in re.findall(r"[^\x00-\x7f]", bare) if c.isalpha())
    found = Counter(SCRIPTS.get(name, name) for name in names)
    found["LATIN"] += len(re.findall("[A-Za-z]", bare))
    return found


def judge_set(samples: Sequence[Sample]) -> None:
    """Add what shows only beside the rest of the set: captions alike, another script, names that become the same."""
    captioned = [sample for sample in samples if sample.text]
    first: dict[str, Sample] = {}
    for sample in captioned:
        twin = first.setdefault(" ".join(sample.text.casefold().split()), sample)
        if twin is not sample:
            sample.find("identical captions", f"the same as {printable(twin.caption)}")
    scripts = [find_scripts(sample.text) for sample in captioned]
    usual = Counter(max(found, key=found.__getitem__) for found in scripts).most_common(1)
    for sample, found in zip(captioned, scripts, strict=True):
        others = [name for name, n in found.items() if n > FEW_LETTERS.get(name, n) and name != usual[0][0]]
        if found.total() and (others or not found[usual[0][0]]):
            sample.find("wrong script", ", ".join(others).lower() or "latin")
    names: dict[tuple[str, str], str] = {}
    for sample in filter(lambda sample: sample.image, samples):
        folder, name = os.path.split(sample.image)
        other = names.setdefault((folder, re.sub(r"[^a-zA-Z0-9.-]", "_", name)), name)
        if other != name:
            sample.findings.append(Finding("merged names", sample.image, f"with {printable(other)}"))


def count_phrases(texts: Sequence[str], least: int) -> dict[tuple[str, ...], int]:
    """Return in how many texts each phrase of up to five words stands, for those in `least` texts and more."""
    words = [re.findall(r"\w+(?:['’-]\w+)*", text.casefold()) for text in texts]
    found: dict[tuple[str, ...], int] = {}
    for size in range(1, LONGEST_PHRASE + 1):
        counts: Counter[tuple[str, ...]] = Counter()
        for text in words:
            phrases = {tuple(text[n : n + size]) for n in range(len(text) - size + 1)}
            # only what has frequent parts can be frequent itself, which keeps this small
            counts.update(p for p in phrases if size == 1 or (p[:-1] in found and p[1:] in found))
        found |= {phrase: number for phrase, number in counts.items() if number >= least}
    return found


def find_phrases(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Return the phrases that stand in many captions and their shares, the most frequent first, of each the longest."""
    if len(texts) < FEW_CAPTIONS:
        return []
    least = max(3, math.ceil(MANY * len(texts)))
    counts = count_phrases(texts, least)
    telling = {p: n for p, n in counts.items() if not any(map(STOP_WORDS.fullmatch, (p[0], p[-1])))}
    inner: dict[tuple[str, ...], int] = {}  # of each phrase, how often it stands in a longer one
    for phrase, number in telling.items():
        for start, end in itertools.combinations(range(len(phrase) + 1), 2):
            if end - start < len(phrase):
                inner[phrase[start:end]] = max(number, inner.get(phrase[start:end], 0))
    longest = [(p, n) for p, n in telling.items() if n > 1.1 * inner.get(p, 0)]
    longest = [(p, n) for p, n in longest if len(p) > 1 or n >= TAUGHT * len(texts)]
    longest.sort(key=lambda item: (-item[1], item[0]))
    return [(" ".join(phrase), number / len(texts)) for phrase, number in longest]


def explain(kind: str) -> str:
    """Return what a kind of finding does in training, and what to do about it."""
    return "; ".join(FINDINGS.get(kind, OTHER_FINDING)) + "."


def describe_findings(findings: Iterable[Finding]) -> list[str]:
    """Return the findings as lines: of each kind what it does and what to do, then its files."""
    by_kind: dict[str, list[Finding]] = {kind: [] for kind in FINDINGS}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    lines = []
    for kind, found in by_kind.items():
        if found:
            lines.append(f"{kind[0].upper()}{kind[1:]} ({len(found):,}): {explain(kind)}")
            lines += [f"    {printable(f.path)}" + (f": {printable(f.detail)}" if f.detail else "") for f in found]
    return lines


def describe_set(samples: Sequence[Sample], phrases: Sequence[tuple[str, float]]) -> list[str]:
    """Return what the set is as a whole: how long its captions are, and what it teaches whether meant or not."""
    words = sorted(count_words(sample.text) for sample in samples if sample.text)
    images, spent = sum(bool(sample.image) for sample in samples), sum(s.made.usd for s in samples if s.made)
    edited = sum(sample.edited for sample in samples)
    said = [f"Images {images:,}, captions {len(words):,}"]
    said += [f"{words[0]} to {words[-1]} words, {words[len(words) // 2]} in the middle"] if words else []
    said += [f"{edited:,} edited by hand since they were made"] if edited else []
    said += [f"{show_dollars(spent)} spent on them"] if spent else []
    taught = [f'"{phrase}" {share:.0%}' for phrase, share in phrases if share >= TAUGHT]
    often = [f'"{phrase}" {share:.0%}' for phrase, share in phrases if share < TAUGHT][:FEW_PHRASES]
    lines = ["; ".join(said)]
    lines += (
        [f"In nearly every caption, so bound to these words and not to the trigger: {', '.join(taught)}"]
        if taught
        else []
    )
    return lines + ([f"Most frequent phrases: {', '.join(often)}"] if often else [])


PAGE_MARK = "<!doctype html><!-- gen-captions --review -->"  # so that only pages of ours are replaced
PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1a; --faint: #6a6862; --paper: #f6f5f2; --card: #fff; --line: #dddad2;
  --mark: #9c3d12; --markpaper: #fbeee6; --bar: #b9b4a6 }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e7e1; --faint: #a19d93; --paper: #171715; --card: #21201e;
  --line: #38362f; --mark: #f0a27c; --markpaper: #3a251a; --bar: #5d594e } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 110rem; padding: 1.5rem clamp(.75rem, 3vw, 2.5rem); background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1rem; margin: 0 0 .4rem }
header p { margin: .2rem 0 1.2rem; color: var(--faint) }
.overview { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem;
  margin-bottom: 1.5rem }
.bars { display: block; width: 100%; height: 5rem; fill: var(--bar) }
.scale { display: flex; justify-content: space-between; color: var(--faint); font-size: .8rem }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0; padding: 0; list-style: none }
button, input, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; padding: .25rem .6rem }
button { cursor: pointer } button[aria-pressed=true] { background: var(--ink); color: var(--paper) }
button:focus-visible, input:focus-visible, select:focus-visible { outline: 2px solid var(--mark); outline-offset: 1px }
.chips span { color: var(--faint) } button[aria-pressed=true] span { color: inherit }
#advice { min-height: 1.5em; margin: .5rem 0 0; color: var(--mark) }
.tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .6rem; align-items: center;
  padding: .6rem 0; background: var(--paper) }
.tools input { flex: 1 1 14rem } .tools output { color: var(--faint) }
#sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem; margin: 0;
  padding: 0; list-style: none }
#sheet > li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 30rem }
#sheet img { display: block; width: 100%; height: 15rem; object-fit: contain; background: var(--line) }
#sheet a:not([href]) { display: none }
.text { padding: .7rem .8rem } .text > * { margin: 0 0 .4rem; overflow-wrap: anywhere }
.caption { white-space: pre-wrap } .name, .facts { color: var(--faint); font-size: .8rem }
.finding { color: var(--mark); background: var(--markpaper); border-radius: .3rem; padding: .1rem .4rem;
  font-size: .85rem }
"""
PAGE_SCRIPT = """
const { kinds, samples } = JSON.parse(document.getElementById("data").textContent)
const get = id => document.getElementById(id)
const sheet = get("sheet"), card = get("card").content, end = get("end"), chosen = new Set()
let shown = [], drawn = 0

function draw(sample) {
  const item = card.cloneNode(true), put = (name, text) => { item.querySelector(name).textContent = text }
  if (sample.href) {
    item.querySelector("a").href = sample.href
    item.querySelector("img").src = sample.href
    item.querySelector("img").alt = "image " + sample.name
  }
  put(".name", sample.name)
  put(".caption", sample.text)
  put(".facts", sample.facts)
  for (const [kind, detail] of sample.findings) {
    const line = document.createElement("p")
    line.className = "finding"
    line.textContent = kinds[kind].name + (detail ? ": " + detail : "")
    item.querySelector(".text").append(line)
  }
  return item
}
function more() {
  sheet.append(...shown.slice(drawn, drawn + 60).map(draw))
  drawn = Math.min(drawn + 60, shown.length)
}
function refresh() {
  const sought = get("search").value.toLocaleLowerCase(), order = get("order").value
  shown = samples.filter(s => (!chosen.size || s.findings.some(([kind]) => chosen.has(kind)))
    && (s.name + "\\n" + s.text).toLocaleLowerCase().includes(sought))
  if (order === "longest") shown.sort((a, b) => b.words - a.words)
  if (order === "shortest") shown.sort((a, b) => a.words - b.words)
  get("count").value = `${shown.length} of ${samples.length} shown`
  get("advice").textContent = [...chosen].map(kind => `${kinds[kind].name}: ${kinds[kind].advice}`).join(" ")
  sheet.replaceChildren()
  drawn = 0
  more()
}
get("kinds").addEventListener("click", event => {
  const button = event.target.closest("button")
  if (!button) return
  const kind = Number(button.value), on = !chosen.has(kind)
  on ? chosen.add(kind) : chosen.delete(kind)
  button.setAttribute("aria-pressed", on)
  refresh()
})
get("phrases").addEventListener("click", event => {
  const button = event.target.closest("button")
  if (button) { get("search").value = button.value; refresh() }
})
get("search").addEventListener("input", refresh)
get("order").addEventListener("change", refresh)
new IntersectionObserver(seen => seen[0].isIntersecting && more(), { rootMargin: "1500px" }).observe(end)
refresh()
"""
PAGE = """{mark}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title><style>{style}</style></head><body>
<header><h1>{title}</h1><p>{summary}</p></header>
<div class="overview">
<section aria-labelledby="found"><h2 id="found">Findings</h2><ul class="chips" id="kinds">{kinds}</ul>
{notes}<p id="advice" aria-live="polite"></p></section>
<section aria-labelledby="lengths"><h2 id="lengths">Words in a caption</h2>{bars}</section>
<section aria-labelledby="said"><h2 id="said">Phrases and the share of captions with them</h2>
<ul class="chips" id="phrases">{phrases}</ul></section></div>
<main><div class="tools"><input id="search" type="search" placeholder="Search names and captions"
aria-label="Search names and captions"><select id="order" aria-label="Order"><option value="name">By name</option>
<option value="longest">Longest first</option><option value="shortest">Shortest first</option></select>
<output id="count" aria-live="polite"></output></div>
<noscript>This page needs JavaScript, which is all in this file.</noscript>
<ul id="sheet"></ul><div id="end"></div></main>
<template id="card"><li><a target="_blank"><img loading="lazy" decoding="async"></a><div class="text">
<p class="name"></p><p class="caption" dir="auto"></p><p class="facts"></p></div></li></template>
<script type="application/json" id="data">{data}</script><script>{script}</script></body></html>
"""
BARS, MOST_PHRASES = 24, 30


def find_relative(path: str, page_dir: str) -> str:
    """Return the path of a file as seen from a page, with slashes."""
    return os.path.relpath(os.path.abspath(path), os.path.abspath(page_dir)).replace(os.sep, "/")


def describe_origin(sample: Sample) -> str:
    """Return the small facts about a caption: its length, and what the journal knows of it."""
    if not sample.text:
        return ""
    facts = [f"{count_words(sample.text):,} words", f"about {caption_tokens(sample.text):,} tokens"]
    if sample.made:
        facts += filter(None, (sample.made.model, show_dollars(sample.made.usd) if sample.made.usd else ""))
        facts += ["edited since"] * sample.edited
    return " · ".join(facts)


def draw_bars(samples: Iterable[Sample]) -> str:
    """Return the histogram of the captions' lengths in words, as SVG with its scale."""
    words = [count_words(sample.text) for sample in samples if sample.text] or [0]
    low, high = min(words), max(words)
    width = max(1, math.ceil((high - low + 1) / BARS))
    counts = Counter((number - low) // width for number in words)
    most, columns = max(counts.values()), (high - low) // width + 1
    tall = {n: max(1, round(100 * counts[n] / most)) for n in counts}
    bars = "".join(f'<rect x="{n + 0.05}" y="{100 - tall[n]}" width=".9" height="{tall[n]}"/>' for n in sorted(tall))
    label = f"{len(words):,} captions of {low} to {high} words"
    svg = f'<svg class="bars" viewBox="0 0 {columns} 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
    return f'{svg}{bars}</svg><div class="scale"><span>{low}</span><span>{high}</span></div>'


def hash_source(text: str) -> str:
    """Return what a Content Security Policy calls a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def build_rows(samples: Sequence[Sample], kinds: Sequence[str], page_dir: str) -> list[dict[str, Any]]:
    """Return what the page's script shows of each sample."""
    return [
        {
            # percent-encoded, whatever bytes a name has
            "href": "./" + quote(os.fsencode(find_relative(sample.image, page_dir))) if sample.is_file else "",
            "name": printable(find_relative(sample.image or sample.caption, page_dir)),
            "text": sample.text,
            "words": count_words(sample.text),
            "facts": describe_origin(sample),
            "findings": [[kinds.index(finding.kind), printable(finding.detail)] for finding in sample.findings],
        }
        for sample in samples
    ]


def build_page(
    title: str,
    samples: Sequence[Sample],
    findings: Sequence[Finding],
    phrases: Sequence[tuple[str, float]],
    page_dir: str,
) -> str:
    """Return the page: one file that asks for nothing but the images, and in which captions are text that runs nothing.

    `findings` are those of the set as a whole. Source of the policy: https://www.w3.org/TR/CSP3/
    """
    from html import escape

    counts = Counter(finding.kind for sample in samples for finding in sample.findings)
    kinds = sorted(counts, key=[*FINDINGS, *counts].index)
    data = {
        "kinds": [{"name": kind, "advice": explain(kind)} for kind in kinds],
        "samples": build_rows(samples, kinds, page_dir),
    }
    chips = (
        f'<li><button value="{n}" aria-pressed="false">{escape(kind)} <span>{counts[kind]:,}</span></button></li>'
        for n, kind in enumerate(kinds)
    )
    said = (
        f'<li><button value="{escape(phrase)}">{escape(phrase)} <span>{share:.0%}</span></button></li>'
        for phrase, share in phrases[:MOST_PHRASES]
    )
    notes = (f'<p class="finding">{escape(printable(f"{f.kind}: {f.path}: {f.detail}"))}</p>' for f in findings)
    styles, scripts = hash_source(PAGE_STYLE), hash_source(PAGE_SCRIPT)
    return PAGE.format(
        mark=PAGE_MARK,
        policy=f"default-src 'none'; img-src 'self' file:; style-src {styles}; script-src {scripts}; base-uri 'none'",
        title=escape(printable(title)),
        summary=escape(describe_set(samples, [])[0]),
        style=PAGE_STYLE,
        kinds="".join(chips) or "<li>Nothing is wrong with any file.</li>",
        notes="".join(notes),
        bars=draw_bars(samples),
        phrases="".join(said) or "<li>None stands in many captions.</li>",
        data=json.dumps(data).replace("<", "\\u003c"),  # a caption may hold </script>
        script=PAGE_SCRIPT,
    )


# --------------------------------------------------------------------------------------------- Local model

LOCAL_SERVERS = (  # name, URL, where it tells of its models and what they take
    ("Ollama", "http://127.0.0.1:11434", ("/api/tags", "/api/show")),
    ("LM Studio", "http://127.0.0.1:1234", ("/api/v0/models",)),
    ("llama.cpp", "http://127.0.0.1:8080", ("/v1/models", "/props")),
    ("vLLM", "http://127.0.0.1:8000", ("/v1/models",)),
)
LOOK_S = 0.5


def ask_local(url: str, body: dict[str, Any] | None = None, key: str = "") -> dict[str, Any]:
    """Return the JSON object that a server on this machine answers with, empty when there is none."""
    from urllib.request import ProxyHandler, Request, build_opener

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = Request(url, json.dumps(body).encode() if body else None, headers)  # noqa: S310
    try:
        until, text = time.monotonic() + LOOK_S, b""
        with build_opener(ProxyHandler({})).open(request, timeout=LOOK_S) as response:
            while time.monotonic() < until and (chunk := response.read1(1 << 16)):
                text += chunk
        found = json.loads(text)
    except Exception:  # whatever listens there need not speak HTTP
        return {}
    return found if isinstance(found, dict) else {}


def find_vision_model(url: str, paths: Sequence[str]) -> str:
    """Return a model of a server on this machine that takes images, as far as it tells; blank when there is none.

    Sources: https://docs.ollama.com/api; https://lmstudio.ai/docs/developer/rest/endpoints;
    https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
    """
    listed = ask_local(url + paths[0])
    models = listed.get("models") if paths[0] == "/api/tags" else listed.get("data")
    models = [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    for model in models[:20]:
        name = str(model.get("name") or model.get("id") or "")
        match paths[-1]:
            case "/api/show":
                takes_images = "vision" in (ask_local(url + paths[-1], {"model": name}).get("capabilities") or ())
            case "/api/v0/models":
                takes_images = model.get("type") == "vlm"
            case "/props":
                modalities = ask_local(url + paths[-1]).get("modalities")
                takes_images = isinstance(modalities, dict) and modalities.get("vision") is True
            case _:
                takes_images = model.get("owned_by") == "vllm"
        if name and takes_images and not looks_secret(name):
            return printable(name)
    return ""


def describe_local_servers(servers: Sequence[tuple[str, str, Sequence[str]]] = LOCAL_SERVERS) -> str:
    """Return how to use the servers with a vision model that run on this machine, blank when there is none."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(servers)) as pool:
        models = pool.map(find_vision_model, *zip(*((url, paths) for _, url, paths in servers), strict=True))
        found = [(name, url, model) for (name, url, _), model in zip(servers, models, strict=True) if model]
    return "".join(f"; {name} runs here: add --base-url {url}/v1 --model {model}" for name, url, model in found)


# Commits of the repositories that README names, so that what it says of them stays true.
PINNED = {
    "Qwen/Qwen3-VL-2B-Instruct-GGUF": "52d6c8ffea26cc873ac5ad116f8631268d7eb503",
    "Qwen/Qwen3-VL-4B-Instruct-GGUF": "1cd86afb9a95c410a6038ab3b40d8b578c892266",
    "Qwen/Qwen3-VL-8B-Instruct-GGUF": "f982a07559d4a2f6c8744d840bf6fccab30eea96",
    "concedo/llama-joycaption-beta-one-hf-llava-mmproj-gguf": "acfe6bf78ae4e411cd5c7c8f4a71ba01f26a5b97",
}
SHA256 = {  # of the default model; of others the hub says it
    "Qwen3VL-2B-Instruct-Q4_K_M.gguf": "089d75c52f4b7ffc56ba998ffc50aae89fcafc755f9e7208aacca281dca6c2ae",
    "mmproj-Qwen3VL-2B-Instruct-Q8_0.gguf": "f9a68fabba69c3b81e153367b2c7521030b0fa8bb0de400c9599c8e6725f9c82",
}
QUANTS = ("q4_k_m", "q8_0")  # taken when none is named, in this order, as llama.cpp does; else the first by name
PROJECTOR_QUANTS = ("q8_0", "f16", "bf16")  # the same for projectors: Q8_0 is half of F16
GET_ENGINE = "pip install -r requirements-local.txt"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A vision model on disk: llama.cpp wants the model and its image projector (mmproj) as two GGUF files."""

    model: str
    projector: str
    parts: tuple[str, ...] = ()  # of a model that is split; the first is the model


def words_of(name: str) -> set[str]:
    """Return the words of a file's name but for its quantization, in lower case."""
    words = re.split(r"[-._\s]+", os.path.basename(name).lower())
    return {word for word in words if not re.fullmatch(r"b?f\d+|i?q\d|\d|k|[sml]|xl", word)}


def has_quant(name: str, quant: str) -> bool:
    """Return whether a file's name says that it is of this quantization; a blank one is any."""
    return bool(re.search(rf"(?i)(?<![a-z0-9]){re.escape(quant)}(?!_?[a-z0-9])", os.path.basename(name))) or not quant


def is_projector(name: str) -> bool:
    """Return whether a file is an image projector by its name."""
    return "mmproj" in os.path.basename(name).lower() and is_path(name)


def choose_projector(names: Iterable[str], model: str) -> str:
    """Return the projector that shares most words of its name with the model's, of these the best quantization.

    Raises ValueError when there is none.
    """

    def rank(name: str) -> tuple[int, int, str]:
        quant = next((i for i, q in enumerate(PROJECTOR_QUANTS) if has_quant(name, q)), len(PROJECTOR_QUANTS))
        return -len(words_of(name) & words_of(model)), quant, name

    if not (projectors := list(filter(is_projector, names))):
        raise ValueError("it has no mmproj file, and without one a model sees no image")
    return min(projectors, key=rank)


def choose_files(names: Sequence[str], quant: str = "") -> ModelFiles:
    """Return which of these files make a vision model of this quantization; raises ValueError when none do."""
    ggufs = sorted(name for name in names if is_path(name) and not is_projector(name) and "imatrix" not in name.lower())
    models = [name for name in ggufs if not re.search(r"-0*(?:[2-9]|1\d+)\d*-of-\d+\.gguf$", name)]
    if not models:
        raise ValueError("it holds no model in GGUF format")
    fitting = [name for q in ([quant] if quant else [*QUANTS, ""]) for name in models if has_quant(name, q)]
    if not fitting:
        raise ValueError(f"it has no {quant}; it has {', '.join(map(os.path.basename, models))}")
    model = fitting[0]
    stem = re.sub(r"-\d+-of-\d+\.gguf$", "", model)
    count = int(match[1]) if (match := re.search(r"-of-(\d+)\.gguf$", model)) else 1
    parts = [name for name in ggufs if name == model or (count > 1 and re.match(rf"{re.escape(stem)}-\d+-of-", name))]
    if len(parts) < count:
        raise ValueError(f"of the {count} parts of {os.path.basename(model)} it has {len(parts)}")
    return ModelFiles(model, choose_projector(names, model), tuple(parts))


def find_files(path: str) -> ModelFiles:
    """Return a model on this disk, with the projector beside it. Raises SettingsError."""
    shown = f"--local: {printable(path)}"
    folder = os.path.dirname(path)
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, READ_ONLY)) as file:
            is_gguf = file.read(4) == b"GGUF"
        beside = [os.path.join(folder, name) for name in os.listdir(folder or ".")]
    except OSError as error:
        raise SettingsError(f"{shown}: cannot be read: {error.strerror}") from None
    if not is_gguf:
        raise SettingsError(f"{shown}: is no GGUF file")
    if is_projector(path):
        raise SettingsError(f"{shown}: is a projector; name the model that it belongs to")
    try:
        return ModelFiles(path, choose_projector(beside, path))
    except ValueError as error:
        raise SettingsError(f"{shown}: {error}; put it beside the model") from None


def split_name(model: str) -> tuple[str, str]:
    """Return the repository and the quantization of owner/name:quant, the latter blank when it is not named."""
    repo, _, quant = model.partition(":")
    return repo, quant


def find_in_cache(model: str) -> ModelFiles | None:
    """Return a model that the cache of Hugging Face has whole; no connection is opened."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, quant = split_name(model)
    try:
        folder = snapshot_download(repo, revision=PINNED.get(repo), local_files_only=True)
        names = [os.path.join(at, name) for at, _, found in os.walk(folder) for name in found]
        return choose_files([name for name in names if os.path.exists(name)], quant)
    except (LocalEntryNotFoundError, ValueError):
        return None


def make_bar(name: str, step: float = 0.1) -> Callable[..., Any]:
    """Return what makes the bar of a file's download, which says a line at each step where there is no terminal."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """A bar of bytes."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "desc": name}, file=sys.stderr, disable=None, dynamic_ncols=True)
            self._size, self._done = options.get("total") or 0, options.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            """Count bytes."""
            before, self._done = self._done, self._done + (n or 0)
            if self.disable and self._size and self._done / self._size // step > before / self._size // step:
                log.info("%s: %d %% of %.2f GB", name, 100 * self._done / self._size, self._size / 1e9)
            return super().update(n)

    return Bar


def describe_download(settings: Settings) -> str:
    """Return that the model of --local is yet to be downloaded, blank when it is not; no connection is opened."""
    model = settings.local or ""
    if not model or is_path(model) or (has_module("huggingface_hub") and find_in_cache(model)):
        return ""
    return f"{model} is not on this machine yet: the run downloads it first"


def has_module(name: str) -> bool:
    """Return whether an optional package is installed."""
    from importlib.util import find_spec

    return find_spec(name) is not None


def fetch_file(repo: str, revision: str, name: str, size: int, sha256: str, blobs: str) -> str:
    """Bring a file of a repository into the cache, going on where an earlier try broke off, and return its path.

    Raises OSError and StopRun. The hub's own library starts anew after a broken run, and does not look at the hash.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise StopRun(f"{name}: the hub tells no SHA-256 of it, so that it cannot be checked")
    blob = os.path.join(blobs, sha256)
    part = f"{blob}.gen-captions.incomplete"
    if not os.path.exists(blob) or hash_file(blob) != sha256:
        os.makedirs(blobs, exist_ok=True)
        url = hf_hub_url(repo, name, revision=revision)
        with open(open_locked(part), "ab") as stream:
            have, headers = stream.seek(0, os.SEEK_END), build_hf_headers()
            if have > size:  # it cannot be of this file
                have = stream.truncate(0)
            http_get(url, stream, resume_size=have, headers=headers, expected_size=size, tqdm_class=make_bar(name))
        if hash_file(part) != sha256:
            os.unlink(part)
            raise StopRun(f"{name}: what came from {url} is not what its hash says; it is removed, run again")
        os.replace(part, blob)
    path: str = hf_hub_download(repo, name, revision=revision)  # finds the bytes there, and files them for its readers
    return path


def describe_hub(error: Exception, repo: str, endpoint: str) -> str:
    """Return why a model cannot be had, and what to do."""
    import httpx2
    from huggingface_hub import errors

    match error:
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return f"{endpoint} cannot be reached: {shorten(str(error), 120)}; connect, or name a .gguf"
        case errors.GatedRepoError():
            return f"its terms are to be accepted at {endpoint}/{repo}; then put a token into HF_TOKEN"
        case errors.RepositoryNotFoundError():
            return f"{endpoint} has no such repository, or it wants a token in HF_TOKEN"
        case errors.RevisionNotFoundError():
            return f"{endpoint} does not have the commit {PINNED.get(repo)} of it any more"
        case errors.HfHubHTTPError() if error.response.status_code in {401, 403}:
            return f"{endpoint} refuses access: renew the token, of HF_TOKEN or of an earlier login, or unset it"
        case UnicodeError():
            return "HF_TOKEN holds letters that no token has"
        case errors.HfHubHTTPError():
            return f"{endpoint} answers HTTP {error.response.status_code}; run again later"
        case errors.OfflineModeIsEnabled():
            return "it is not in the cache, and HF_HUB_OFFLINE forbids to download it"
        case OSError() if error.errno:
            return f"{printable(str(error.filename or ''))}: {error.strerror}; run again after that"
    words = shorten(str(error) or type(error).__name__, 120)
    return f"the download from {endpoint} broke: {words}; run again, and it goes on where it was"


def fetch_model(model: str) -> ModelFiles:
    """Download a model from Hugging Face into its cache. Raises SettingsError for one that cannot be, StopRun."""
    from huggingface_hub import HfApi, constants

    repo, quant = split_name(model)
    try:
        found = HfApi().model_info(repo, revision=PINNED.get(repo), files_metadata=True)
        try:
            files = choose_files([file.rfilename for file in found.siblings or ()], quant)
        except ValueError as error:
            raise SettingsError(f"--local: {repo}: {error}") from None
        wanted = [file for file in found.siblings or () if file.rfilename in {*files.parts, files.projector}]
        size = sum(file.size or 0 for file in wanted)
        names = printable(" and ".join(file.rfilename for file in wanted))
        where = os.path.join(constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"))
        source = f"{constants.ENDPOINT}/{repo}"
        log.info("downloading once: %s, %.2f GB, from %s to %s", names, size / 1e9, source, printable(where))
        revision, blobs, paths = PINNED.get(repo, "main"), os.path.join(where, "blobs"), {}
        for file in wanted:
            sha256 = SHA256.get(file.rfilename, file.lfs.sha256 if file.lfs else "")
            paths[file.rfilename] = fetch_file(repo, revision, file.rfilename, file.size, sha256, blobs)
        return ModelFiles(paths[files.model], paths[files.projector])
    except (SettingsError, StopRun):
        raise
    except Exception as error:  # the hub's own kinds, those of its connection, and the disk's
        raise StopRun(f"--local: {repo}: {describe_hub(error, repo, constants.ENDPOINT)}") from error


def check_engine(model: str) -> None:
    """Raise the SettingsError that names what is to be installed for a local model, or that its file is no good."""
    if not has_module("xllamacpp") and (os.name == "nt" or not shutil.which("llama-server")):
        raise SettingsError(f"--local: no engine is installed: {GET_ENGINE} (or have a llama-server on the PATH)")
    if is_path(model):
        find_files(model)
    elif not has_module("huggingface_hub"):
        raise SettingsError(f"--local: {model} is at Hugging Face: {GET_ENGINE}; or name a .gguf file")


# -------------------------------------------------------------------------------------------------- Engine

IMAGE_TOKENS = 3328  # 13 tiles of 256, the most that InternVL makes; models of any size are held to it
PROMPT_TOKENS = 1024  # of a model's template, and of what is filled in for an image, beside the prompt's own
# Qwen's own values; its models loop without: https://github.com/QwenLM/Qwen3-VL/issues/1611
SAMPLING = {"temp": 0.7, "top_p": 0.8, "top_k": 20, "penalty_present": 1.5}
PORT_TAKEN = "found its port taken"
PORTS_TRIED = 3
ENDS = (  # what the engine's end and its log say, and what it means
    (r"couldn't bind|address already in use", PORT_TAKEN),
    (
        r"^exit -4$|^exit 3221225501$",
        "needs instructions that this processor does not have: build xllamacpp from source",
    ),
    (r"^exit -9$", "was killed, perhaps for want of memory: take a smaller model, or lower GETCAP_THREAD_POOL"),
    (
        r"bad_alloc|failed to allocate|unable to allocate|out of memory|cannot allocate",
        "had too little memory: take a smaller model, or lower GETCAP_THREAD_POOL",
    ),
    (
        r"unknown model architecture|unknown projector type",
        "does not know this kind of model: pip install -U xllamacpp",
    ),
    (
        r"failed to load (?:clip|multimodal) model",
        "cannot use the mmproj file with this model: take both from one repository",
    ),
    (
        r"failed to load model|error loading model|invalid magic|tensor data",
        "cannot read the model: its file is damaged; one that was downloaded is so anew once it is deleted",
    ),
)
BE_ENGINE = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='engine')['serve_model']()"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine is started with."""

    model: str
    projector: str
    name: str
    port: int
    key: str
    slots: int  # images at a time
    context: int  # tokens, of all slots together
    threads: int


def engine_options(settings: Settings, files: ModelFiles, prompt_bytes: int, processors: int) -> EngineOptions:
    """Return the engine's options but for its port: room for an image, a prompt and an answer for each worker."""
    tokens = IMAGE_TOKENS + PROMPT_TOKENS + prompt_bytes // 2 + 2 * settings.max_tokens
    context = settings.thread_pool * 256 * math.ceil(tokens / 256)
    # threads wait for each other busily: with one for each processor, anything else that runs makes it very slow
    threads = max(1, processors - 1)
    key = os.urandom(16).hex()
    return EngineOptions(files.model, files.projector, settings.model, 0, key, settings.thread_pool, context, threads)


def server_arguments(options: EngineOptions) -> list[str]:
    """Return the command line of a llama-server; its key is in the environment, where others do not see it.

    Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
    """
    numbers: dict[str, float] = {
        "--port": options.port,
        "-np": options.slots,
        "-c": options.context,
        "-t": options.threads,
        "-lv": 2,
    }
    numbers |= {"--image-max-tokens": IMAGE_TOKENS, "--cache-ram": 0, "--reasoning-budget": 0}
    numbers |= dict(zip(("--temp", "--top-p", "--top-k", "--presence-penalty"), SAMPLING.values(), strict=True))
    words = {"-m": options.model, "--mmproj": options.projector, "--alias": options.name, "--host": "127.0.0.1"}
    return ["llama-server", *(str(part) for pair in (words | numbers).items() for part in pair)]


def end_with_parent() -> None:
    """Let the kernel end this process, whatever it does then, when nobody holds the other end of its standard input.

    Loading a model holds the interpreter's lock, so that no thread of Python could see to it; Windows has no such way.
    """
    try:
        import fcntl
        import select
    except ImportError:
        return
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)  # SIGIO, whose default is the end
    if select.select([0], [], [], 0)[0]:  # it was too late for the signal
        os._exit(0)


def serve_model() -> None:
    """Be the engine, in a process of its own: read the options from standard input, serve until that ends."""
    options = EngineOptions(**json.loads(sys.stdin.readline()))
    end_with_parent()
    if not has_module("xllamacpp"):
        os.environ["LLAMA_API_KEY"] = options.key
        os.execvp("llama-server", server_arguments(options))  # noqa: S606, S607
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = options.model, options.projector
    params.model_alias, params.api_keys = {options.name}, [options.key]
    params.hostnames, params.port = ["127.0.0.1"], options.port
    params.n_parallel, params.n_ctx = options.slots, options.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.image_max_tokens = IMAGE_TOKENS
    params.enable_reasoning = 0
    params.cache_ram_mib = 0  # of prompts: each image is asked about once
    params.ui, params.cors_origins = False, ""
    params.verbosity = 2
    for name, value in SAMPLING.items():
        setattr(params.sampling, name, value)
    server = xllamacpp.Server(params)
    sys.stdin.read()  # the end of it comes with our parent's
    del server
    os._exit(0)


def describe_end(code: int, said: str) -> str:
    """Return what an engine's exit code and log say of why it ended, and what to do."""
    text = f"exit {code}\n{said}"
    for pattern, meaning in ENDS:
        if re.search(pattern, text, re.IGNORECASE | re.MULTILINE):
            return meaning
    errors = re.findall(r"^.* E (.+)$|^\w*Error: (.+)$", said, re.MULTILINE)
    last = shorten(next((a or b for a, b in reversed(errors)), ""), 160)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{how}: {last}" if last else how


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Engine:
    """llama.cpp's server as a child process, on a port and with a key that only this run knows."""

    def __init__(self, options: EngineOptions, log_path: str) -> None:
        self._options = options
        self._log_path = log_path
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._leash = -1  # the other end of its standard input: what holds it ends with us
        self._closing = False

    @property
    def url(self) -> str:
        """Where it listens; another one after each start."""
        return f"http://127.0.0.1:{self._options.port}/v1"

    def direct(self, settings: Settings) -> Settings:
        """Return the settings that lead to it."""
        return dataclasses.replace(settings, base_url=self.url, api_key=self._options.key)

    def start(self) -> None:
        """Start it and wait until it answers. Raises StopRun that says why it does not."""
        problem = ""
        for _ in range(PORTS_TRIED):
            self._options = dataclasses.replace(self._options, port=free_port())
            try:
                problem = self._launch()
            except OSError as error:  # of its log, or for want of processes and files
                problem = f"cannot be started: {error.strerror}"
            if problem != PORT_TAKEN:
                break
        if problem:
            raise self._broken(problem)

    def _broken(self, problem: str) -> StopRun:
        files = f"{self._options.model} with {os.path.basename(self._options.projector)}"
        return StopRun(f"the engine {problem} ({printable(files)}); see {printable(self._log_path)}")

    def _launch(self) -> str:
        """Start the process and wait until it answers; return why it does not, or nothing."""
        command = [sys.executable, "-P", "-c", BE_ENGINE, __file__]
        self._drop()
        with open(self._log_path, "ab") as stream:
            self._log_start = stream.tell()
            its_end, self._leash = os.pipe()
            # in a session of its own, since the first Ctrl-C ends neither it nor the answers on their way
            process = subprocess.Popen(command, stdin=its_end, stdout=stream, stderr=stream, start_new_session=True)  # noqa: S603
        os.close(its_end)
        self._process = process
        with contextlib.suppress(BrokenPipeError):
            os.write(self._leash, json.dumps(dataclasses.asdict(self._options)).encode() + b"\n")
        while not (listed := ask_local(f"{self.url}/models", key=self._options.key).get("data")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return describe_end(process.wait(0.1), self._said())
        if "image" not in listed[0].get("architecture", {}).get("input_modalities", ["image"]):
            return "loads the model, and it takes no images; name a vision model"
        return ""

    def _said(self) -> str:
        """Return the end of the log, since the last start at the most; blank when it is gone."""
        try:
            with open(self._log_path, "rb") as file:
                file.seek(max(self._log_start, os.path.getsize(self._log_path) - (1 << 16)))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def watch(self, tell: Callable[[str | StopRun], object]) -> None:
        """From now on start it anew when it ends, once; `tell` hears, in a thread, what Asker.follow wants to hear."""
        threading.Thread(target=self._watch, args=(tell,), daemon=True).start()

    def _watch(self, tell: Callable[[str | StopRun], object]) -> None:
        for attempt in (1, 2):
            code = self._process.wait() if self._process else 0
            if self._closing:
                return
            with contextlib.suppress(RuntimeError):  # who wants to know is gone
                tell("")
                why = describe_end(code, self._said())
                tell(self._start_again(why) if attempt == 1 else self._broken(f"{why}, for the second time"))

    def _start_again(self, why: str) -> str | StopRun:
        log.warning("the engine %s; it is started once more; see %s", why, printable(self._log_path))
        try:
            self.start()
        except StopRun as cause:
            return cause
        return self.url

    def close(self) -> None:
        """End it at once: no answer is waited for any more."""
        self._closing = True
        if self._process:
            self._process.kill()
            self._process.wait()
        self._drop()

    def _drop(self) -> None:
        if self._leash >= 0:
            os.close(self._leash)
        self._leash = -1


@contextlib.contextmanager
def open_engine(settings: Settings, prompt: str, log_path: str) -> Iterator[Engine]:
    """Yield the engine that --local asks for, its model downloaded if need be. Raises SettingsError and StopRun."""
    model = str(settings.local)
    files = find_files(model) if is_path(model) else find_in_cache(model) or fetch_model(model)
    log.info("loading %s with %s", printable(files.model), printable(os.path.basename(files.projector)))
    engine = Engine(engine_options(settings, files, len(prompt.encode()), count_processors()), log_path)
    try:
        with contextlib.suppress(OSError):
            os.unlink(log_path)  # that of the run before has served
        engine.start()
        yield engine
    finally:
        engine.close()


# ----------------------------------------------------------------------------------------------------- Run


def plan_run(settings: Settings, image_dir: Path, recipe: Recipe, journal: Journal) -> Iterator[Job | Skipped | Failed]:
    """Yield what is to be done with each image, by settings, recipe, journal, and the batches on their way."""
    judge = functools.partial(judge_image, journal=journal, recipe=recipe, overwrite=settings.overwrite)
    waiting = waiting_images(journal)
    own = settings.batch_name if settings.batch and not settings.dry_run else ""
    for item in plan_folder(image_dir, settings.caption_dir, recipe.caption_ext, judge):
        path = item.image if isinstance(item, Job) else item.path
        name = name_below(image_dir, path) if waiting or settings.shard else ""
        if settings.shard and not is_in_shard(name, *settings.shard):
            continue
        if not isinstance(item, Job) or name not in waiting:
            yield item
        elif waiting[name] != own:  # which the run waits for
            yield Skipped(item.image, "waits in a batch", item.caption)


def collect_jobs(plan: Iterable[Job | Skipped | Failed], limit: int | None, report: Report) -> list[Job]:
    """Return the jobs of a plan, at most `limit`; what is skipped or cannot be captioned goes into the report."""
    jobs: list[Job] = []
    for item in plan:
        if not isinstance(item, Job):
            report.record(item)
        elif limit is None or len(jobs) < limit:
            jobs.append(item)
        else:
            report.left += 1
    return jobs


def prepare_folders(jobs: list[Job], report: Report) -> list[Job]:
    """Make all caption folders ready and return the jobs whose captions can be kept; the report has the others.

    Raises StopRun when there is no such job.
    """
    folders = sorted({os.path.dirname(job.caption) for job in jobs})
    problems = {folder: problem for folder in folders if (problem := prepare_folder(folder))}
    if folders and len(problems) == len(folders):
        raise StopRun(f"{printable(folders[0])}: captions cannot be kept there: {problems[folders[0]]}")
    for job in jobs:
        folder = os.path.dirname(job.caption)
        if folder in problems:
            report.record(Failed(job.image, "caption folder", f"{printable(folder)}: {problems[folder]}"))
    return [job for job in jobs if os.path.dirname(job.caption) not in problems]


def prepare_run(jobs: list[Job], root: Path, journal: Journal, report: Report) -> tuple[list[Job], str]:
    """Return the jobs whose captions can be kept, and the zip of those to be replaced, if any; the journal is opened.

    Raises StopRun.
    """
    kept = ""
    ready = prepare_folders(jobs, report)
    try:
        journal.open(as_read=True)
        replaced = [job.caption for job in ready if job.replaces]
        if replaced:
            kept = keep_originals(str(root), replaced, KEPT, new_stamp())
            log.info("%d captions to renew are kept in %s; --undo puts them back", len(replaced), printable(kept))
    except OSError as error:
        raise StopRun(f"{printable(journal.folder)}: cannot be written: {error.strerror}") from error
    return ready, kept


def is_untouched(jobs: Iterable[Job]) -> bool:
    """Return whether all captions that were to be replaced are still there as they were."""
    try:
        return all(hash_file(job.caption) == job.replaces.caption_sha256 for job in jobs if job.replaces)
    except OSError:
        return False


def check_key(settings: Settings) -> None:
    """Raise the error that shows the ways on when there is no key and the server needs one."""
    if settings.local:
        check_engine(settings.local)
    if is_this_machine(settings.base_url) or settings.api_key not in {"", KEY_PLACEHOLDER}:
        return
    state = "still the placeholder of .env.example" if settings.api_key else "not set"
    here = describe_local_servers() if settings.base_url == OPENAI_URL else ""
    raise SettingsError(
        f"OPENAI_API_KEY is {state}. Put a key from https://platform.openai.com/api-keys into .env or the "
        "environment; or set OPENAI_BASE_URL to another server that speaks OpenAI's API, with its key (any word "
        "where it wants none); or to a server on this machine, without any: http://localhost:11434/v1 is Ollama; "
        "or take --local, which brings a model of its own" + here
    )


def open_bill(settings: Settings) -> Bill:
    """Return the bill of a run; raises SettingsError for a budget that cannot be kept."""
    price = find_price(settings)
    if settings.max_cost and price is None:
        raise SettingsError(
            f"--max-cost: the price of {settings.model} at {settings.host} is not known; "
            "--price IN OUT says it, in dollars for a million tokens"
        )
    return Bill(price, settings.max_cost, settings.tier)


def log_remarks(settings: Settings, recipe: Recipe) -> None:
    """Say once what is worth knowing about the settings before anything is sent."""
    if settings.config_dir and not settings.config_dir.exists():
        log.warning("%s: does not exist; nothing is read from it", printable(str(settings.config_dir)))
    for remark in (*recipe.remarks, *(f"{finding.path}: {finding.detail}" for finding in recipe.findings)):
        log.warning("%s", remark)
    if is_ordinary(word := recipe.trigger.word):
        log.warning("the trigger %s is an ordinary word; captions use it for other things too", word)
    if settings.base_url.startswith("http://") and not is_this_machine(settings.base_url):
        log.warning("OPENAI_BASE_URL is plain http: the key and the images can be read on the way to %s", settings.host)


@contextlib.contextmanager
def end_on_signals(stop: Stop) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run in order, the second at once."""
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    received: list[int] = []

    def end(number: int) -> None:
        if received and task:
            task.cancel()
        received.append(number)
        stop.set(signal.Signals(number))

    def on_signal(number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(end, number)

    # signal.signal, since Windows has no add_signal_handler
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- Caption


def read_words(path: str) -> str:
    """Return what a caption file says, one line without blanks around it; blank when it says nothing or is no UTF-8."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            return " ".join(file.read().decode("utf-8-sig").split())
    except (OSError, UnicodeDecodeError, FailImage):
        return ""


def make_prompt(recipe: Recipe, job: Job, before: str) -> str:
    """Return the prompt for one image, whose caption file says `before` so far."""
    hint = before or read_words(os.path.splitext(job.image)[0] + ".txt")  # tags, where the captions are .caption
    return fill_prompt(recipe, job.image, hint)


def expect(settings: Settings, recipe: Recipe, job: Job) -> Expected:
    """Return what one image is thought to take, by its header; raises FailImage when it cannot be sent."""
    try:
        with open(job.image, "rb", opener=open_regular) as file:
            size = measure_image(file, settings.max_side)
    except OSError as error:
        raise FailImage("unreadable file", str(error.strerror)) from error
    return estimate(settings, make_prompt(recipe, job, read_words(job.caption)), size)


class Twins:
    """Which images hold the same bytes, so that they are asked once, and which captions are the same, which is odd."""

    def __init__(self, journal: Journal, recipe: Recipe, prompt: str) -> None:
        self._asking: dict[str, asyncio.Event] = {}
        self._known: dict[str, tuple[str, str] | FailImage] = {}  # the caption's path and SHA-256, or the refusal
        self._texts: dict[str, str] = {}  # the first caption file with a text, by its SHA-256
        alike = not placeholders(recipe.prompt, "") & {"name", "folder", "caption"}  # one prompt for all images
        for name, past in journal.history.items() if alike else ():
            last = past[-1]
            if (last.outcome, last.recipe, last.trigger) == ("captioned", recipe.identity, recipe.trigger.put):
                self._known[fingerprint(last.image_sha256, prompt)] = journal.path(name), last.caption_sha256
                self._texts[last.caption_sha256] = journal.path(name)

    async def find(self, key: str) -> str:
        """Return the caption of an image with the same bytes and prompt, blank when the caller is the one to ask.

        Raises the FailImage of a twin that was refused. Who is to ask calls `remember` afterwards.
        """
        while flight := self._asking.get(key):
            await flight.wait()
        known = self._known.get(key)
        if isinstance(known, FailImage):
            raise known
        with contextlib.suppress(OSError):  # deleted since
            if known and hash_file(known[0]) == known[1]:
                return read_words(known[0])
        import asyncio

        self._asking[key] = asyncio.Event()
        return ""

    def remember(self, key: str, known: tuple[str, str] | FailImage | None) -> None:
        """Let those who wait for this answer go on."""
        if known is not None:
            self._known[key] = known
        if flight := self._asking.pop(key, None):
            flight.set()

    def first_with(self, caption_sha256: str, caption: str) -> str:
        """Return the other caption file that was given this text before, blank when there is none."""
        first = self._texts.setdefault(caption_sha256, caption)
        return "" if first == caption else first


def load_image(path: str, max_side: int) -> tuple[tuple[str, int, int], bytes, Size]:
    """Return what the journal keeps of an image (SHA-256, bytes, time), its JPEG in base64, and that one's size.

    Raises FailImage.
    """
    data, changed_ns = read_image(path)
    jpeg, size = prepare_image(data, max_side)
    return (hashlib.sha256(data).hexdigest(), len(data), changed_ns), base64.b64encode(jpeg), size


def look_at_file(path: str, max_side: int) -> tuple[tuple[str, int, int], bytes, Size]:
    """Return what load_image does, of an image that is sent by its path: its header is read and nothing else."""
    data, changed_ns = read_image(path)
    return (hashlib.sha256(data).hexdigest(), len(data), changed_ns), b"", measure_image(BytesIO(data), max_side)


class Answers:
    """Gives each image the answer that a batch brought, once; stands where an Asker does."""

    def __init__(self, settings: Settings, recipe: Recipe, bill: Bill, billed: set[str]) -> None:
        self._settings = settings
        self._bill = bill
        self._tags = recipe.style == "tags"
        self._answers: dict[str, Reply | ErrorReply] = {}
        self._billed = billed  # results that are in the journal by now

    def put(self, path: str, answer: Reply | ErrorReply, result_id: str) -> None:
        """Keep the answer for an image; several images may share one, which costs once."""
        if result_id and result_id in self._billed:
            answer = dataclasses.replace(answer, usage=Usage())
        else:
            self._bill.settle(0, answer, "batch")
        self._billed.add(result_id)
        self._answers[path] = answer

    async def ask(self, question: Question) -> str:
        """Return the answer, which passed the gate; raises FailImage."""
        answer = self._answers.pop(question.path, None)
        if answer is None:
            raise FailImage("asked once", "a batch gives no second answer")
        question.attempts += 1
        question.usage += answer.usage
        question.dollars += self._bill.dollars(answer.usage, "batch")
        if isinstance(answer, ErrorReply):
            error = judge_error(answer, datetime.now(UTC), first=False)
            raise error if isinstance(error, FailImage) else FailImage("rejected", str(error))
        try:
            return judge_reply(answer, tags=self._tags)
        except CutOff as error:
            detail = f"set GETCAP_MAX_TOKENS={2 * self._settings.max_tokens} or ask for less, and have it asked again"
            raise FailImage("cut off", detail) from error


class Captioner:
    """Takes one job from image file to caption file."""

    def __init__(
        self, settings: Settings, recipe: Recipe, asker: Asker | Answers, journal: Journal, report: Report, stop: Stop
    ) -> None:
        import asyncio

        from aiofiles.os import wrap

        self._settings = settings
        self._recipe = recipe
        self._asker = asker
        self._journal = journal
        self._report = report
        self._stop = stop
        self._twins = Twins(journal, recipe, fill_prompt(recipe, "", ""))
        self._warned = False
        # no more images are decoded at once than there are processors: memory would grow, speed would not
        load_pillow()
        self._decoders = asyncio.Semaphore(count_processors())
        # in one thread from the file to base64: each hand-over between threads costs as much as a small image
        load = look_at_file if settings.image_ref == "file" else load_image
        self._load = wrap(functools.partial(load, max_side=settings.max_side))

    async def handle(self, job: Job) -> None:
        """Caption one image, record the outcome; raises StopRun when the run cannot go on."""
        await self.record(job, self._caption(job))

    async def record(self, job: Job, work: Awaitable[Outcome | None]) -> None:
        """Record what becomes of an image, unless that is not known yet; raises StopRun when the run cannot go on."""
        outcome: Outcome | None
        try:
            outcome = await work
        except FailImage as error:
            later = "; run again later" if isinstance(error, TryAgain) else ""
            outcome = Failed(job.image, error.reason, error.detail + later, error.by_server)
        except StopRun:
            raise
        except Exception as error:  # a fault of this program must not end the run either
            log.debug("%s: unexpected", printable(job.image), exc_info=True)
            detail = f"{type(error).__name__}: {shorten(str(error))}; please report it (-v)"
            outcome = Failed(job.image, "unexpected", detail, by_server=True)
        if outcome is None:
            return
        self._report.record(outcome)
        if (reason := self._report.same_failure) and isinstance(self._asker, Asker):  # what is answered costs no more
            raise StopRun(
                f"{MOST_FAILURES_IN_A_ROW} images in a row ended in {reason}; look at the server, then run again"
            )

    async def _caption(self, job: Job) -> Outcome:
        recipe = self._recipe
        if job.replaces is None and has_caption(job.caption):
            return Skipped(job.image, "has a caption by now", job.caption)
        before = read_words(job.caption)
        if job.replaces and job.trigger_only:
            entry = dataclasses.replace(job.replaces, trigger=recipe.trigger.put)
            return await self._keep(job, entry, swap_trigger(before, job.replaces.trigger, recipe))
        entry, question = await self.prepare(job)
        return await self._ask_once(job, entry, question)

    async def prepare(self, job: Job) -> tuple[Entry, Question]:
        """Return the journal's entry of a caption to come, and the question; raises FailImage."""
        async with self._decoders:
            seen, image, size = await self._load(job.image)
        prompt = make_prompt(self._recipe, job, read_words(job.caption))
        return self._entry(*seen), Question(job.image, prompt, image, estimate(self._settings, prompt, size))

    async def take_answer(self, job: Job, row: Row, result_id: str) -> Outcome:
        """Caption an image with the answer that a batch brought; the asker has it."""
        prompt = make_prompt(self._recipe, job, read_words(job.caption))
        entry = self._entry(row.image_sha256, row.image_size, row.image_mtime_ns)
        entry = dataclasses.replace(entry, result_id=result_id)
        return await self._ask_once(job, entry, Question(job.image, prompt, b"", Expected()))

    def _entry(self, image_sha256: str, size: int, mtime_ns: int) -> Entry:
        recipe, model = self._recipe, self._settings.model
        made_from = (recipe.question, recipe.identity, recipe.trigger.put, image_sha256, size, mtime_ns)
        return Entry("captioned", *made_from, model=model)

    async def _ask_once(self, job: Job, entry: Entry, question: Question) -> Outcome:
        """Ask, or share the answer of an image with the same bytes."""
        key = fingerprint(entry.image_sha256, question.prompt)
        known: tuple[str, str] | FailImage | None = None
        try:
            text, notes = await self._find_caption(job, entry, question, key)
            if notes is None:
                return await self._keep(job, entry, text)
            outcome = await self._keep(job, entry, text, notes, question)
            known = (job.caption, hash_text(text)) if isinstance(outcome, Written) else None
        except FailImage as error:
            known = error if error.reason == "refused" else None
            raise
        finally:
            self._twins.remember(key, known)
        return outcome

    async def _find_caption(
        self, job: Job, entry: Entry, question: Question, key: str
    ) -> tuple[str, list[tuple[str, str]] | None]:
        """Return a caption and its notes, none for that of a twin.

        A refusal, and whatever else was paid for and is no caption, gets its line in the journal.
        """
        import asyncio

        try:
            if shared := await self._twins.find(key):
                return shared, None
            return await self._ask_by_the_rules(question)
        except (FailImage, StopRun, asyncio.CancelledError) as error:
            refused = isinstance(error, FailImage) and error.reason == "refused"
            if refused or question.usage.prompt:
                failed = dataclasses.replace(entry, outcome="refused" if refused else "failed")
                with contextlib.suppress(OSError):  # then it is asked again next time
                    await self._write(job, failed, question, None)
            raise

    async def _ask_by_the_rules(self, question: Question) -> tuple[str, list[tuple[str, str]]]:
        """Return a caption that opens with the trigger, and what is to be noted about it; asks twice at the most."""
        recipe, trigger = self._recipe, self._recipe.trigger
        told = recipe.is_own_prompt and bool(re.search(rf"(?i){find_mention(trigger, word=True)}", question.prompt))
        text = await self._ask(question)
        if faults := find_faults(text, recipe):
            wrong = "; ".join(detail for _, detail in faults)
            log.debug("%s: %s; asking once more", printable(question.path), wrong)
            question.prompt += f"\nAn earlier answer was not accepted: {wrong}."
            try:
                second = await self._ask(question)
            except FailImage as error:
                log.debug("%s: %s; the first answer is kept", printable(question.path), error)
            except StopRun as cause:  # the first answer is paid for, and serves
                self._stop.set(cause)
            else:
                text = second if len(find_faults(second, recipe)) <= len(faults) else text
        notes = [fault for fault in find_faults(text, recipe) if fault[0] != "too long"]
        cut = cut_caption(text, recipe) if (recipe.max_words or recipe.style == "short") else text
        if cut != text:
            notes.append(("cut", f"from {count_words(text)} words to {count_words(cut)}"))
        notes += [("too long", fault[1]) for fault in find_faults(cut, recipe) if fault[0] == "too long"]
        self._warn_of_hiding(cut)
        placed = place_trigger(cut, recipe, told=told)
        if not placed:
            raise FailImage("empty", "the answer holds nothing but the trigger; change the prompt")
        return placed, notes

    async def _ask(self, question: Question) -> str:
        text = await self._asker.ask(question)
        return tidy_tags(text) if self._recipe.style == "tags" else text

    def _warn_of_hiding(self, text: str) -> None:
        word = self._recipe.trigger.word
        if not self._warned and (inside := find_hiding(word, text)):
            self._warned = True
            log.warning(
                'the trigger %s hides in "%s", where trainers find it too; take a word that is none', word, inside
            )

    async def _keep(
        self,
        job: Job,
        entry: Entry,
        text: str,
        notes: Sequence[tuple[str, str]] = (),
        question: Question | None = None,
    ) -> Outcome:
        """Write the journal's entry, then the caption; raises FailImage or StopRun when that is not possible."""
        entry = dataclasses.replace(entry, caption_sha256=hash_text(text))
        try:
            written = await self._write(job, entry, question, text)
        except OSError as error:
            problem = f"{error.strerror}; the answer was: {text}"
            if error.errno in ONE_FILE:
                raise FailImage("not written", problem) from error
            log.error("%s: not written: %s", printable(job.caption), problem)  # noqa: TRY400
            folder = printable(os.path.dirname(job.caption))
            raise StopRun(f"{folder}: captions cannot be written: {error.strerror}; run again after that") from error
        log.debug("%s: %s", printable(job.image), text)
        if not written:
            return Skipped(job.image, "edited by now" if job.replaces else "has a caption by now", job.caption)
        if question and (other := self._twins.first_with(entry.caption_sha256, job.caption)):
            notes = [*notes, ("same answer", f"word for word that of {printable(other)}")]
        return Written(job, text, tuple(notes))

    async def _write(self, job: Job, entry: Entry, question: Question | None, text: str | None) -> bool:
        """Write the journal's entry, then the caption if there is one. Raises OSError."""
        import asyncio

        usage, attempts = (question.usage, question.attempts) if question else (Usage(), 0)
        more: dict[str, Any] = {"image": job.image, "attempts": attempts}
        more |= {"prompt_tokens": usage.prompt, "answer_tokens": usage.answer}
        entry = dataclasses.replace(entry, usd=round(float(question.dollars), 8) if question else 0.0)

        def write() -> bool:
            self._journal.append(job.caption, entry, **more)
            replaces = job.replaces.caption_sha256 if job.replaces else ""
            return text is None or write_caption(job.caption, encode_caption(text), replaces)

        return await asyncio.to_thread(write)


async def caption_images(
    settings: Settings,
    _image_dir: Path,
    recipe: Recipe,
    jobs: Sequence[Job],
    journal: Journal,
    report: Report,
    engine: Engine | None = None,
) -> None:
    """Caption the images of a plan; the report has the outcomes, and why the run ended early if it did."""
    import asyncio

    stop = Stop()
    before = report.recorded
    settings = engine.direct(settings) if engine else settings
    with show_progress(len(jobs), report, unit="image", quiet=log.level > logging.INFO) as update, end_on_signals(stop):
        try:
            async with open_client(settings) as client:
                watch = warn_of_shutdown if is_openai(settings.base_url) else None
                aside = watch and asyncio.create_task(watch(client, settings.model, datetime.now(UTC).date()))
                asker = Asker(client, settings, recipe, report.bill, stop)
                captioner = Captioner(settings, recipe, asker, journal, report, stop)
                if engine:
                    loop = asyncio.get_running_loop()
                    engine.watch(lambda news: loop.call_soon_threadsafe(asker.follow, news))

                async def handle(job: Job) -> None:
                    await captioner.handle(job)
                    update(1)

                await run_pool(iter(jobs), handle, settings.thread_pool, stop)
                if aside:
                    aside.cancel()
        except (OSError, ValueError, ImportError) as error:  # the connection's own settings
            detail = f"{type(error).__name__}: {shorten(str(error), 120)}"
            stop.set(StopRun(f"no connection can be set up: {detail}; check HTTPS_PROXY and SSL_CERT_FILE"))
        finally:
            report.ended_by = stop.cause
            report.left += len(jobs) - (report.recorded - before)


# ----------------------------------------------------------------------------------------------- Batch run


class Exporter:
    """Turns images into lines of batch files."""

    def __init__(
        self, settings: Settings, recipe: Recipe, image_dir: Path, captioner: Captioner, bill: Bill, writer: PartWriter
    ) -> None:
        self._settings = settings
        self._recipe = recipe
        self._image_dir = image_dir
        self._captioner = captioner
        self._bill = bill
        self._writer = writer
        self.finish = writer.finish
        self.lines = self.images = 0  # that were written
        self.is_over_budget = False

    async def add(self, job: Job, parameters: Parameters) -> Part | None:
        """Write the line of one image; returns the part that is full by now. What fails is recorded."""
        done: Part | None = None
        if self.is_over_budget:
            return None
        if job.replaces is None and has_caption(job.caption):
            return None  # written since the plan; the next run says so

        async def write() -> None:
            nonlocal done
            done = self._write(job, *await self._captioner.prepare(job), parameters)

        await self._captioner.record(job, write())
        return done

    def _write(self, job: Job, entry: Entry, question: Question, parameters: Parameters) -> Part | None:
        settings, identity = self._settings, self._recipe.identity
        most = Usage(question.expected.usage.prompt, settings.max_tokens)
        custom_id = f"gc-{fingerprint(entry.image_sha256, identity, question.prompt)}"
        is_new = not self._writer.has(custom_id)
        if is_new and not self._bill.allows(most, "batch"):
            self.is_over_budget = True
            return None
        seen = (entry.image_sha256, entry.image_size, entry.image_mtime_ns)
        row = Row(custom_id, name_below(self._image_dir, job.image), *seen, identity)
        start = Path(job.image).resolve().as_uri() if settings.image_ref == "file" else DATA_URL
        chosen = batch_parameters(settings, parameters)
        body = build_request(settings.model, question.prompt, chosen, 1, question.image, start)
        try:
            done = self._writer.add(row, build_line(custom_id, body))
        except OSError as error:
            raise StopRun(f"batch files cannot be written: {error.strerror}; run again after that") from error
        if is_new and self._writer.part:
            self._writer.part.held += self._bill.hold(most, "batch")
        self.lines += is_new
        self.images += 1
        return done


def check_id(found: Any) -> Any:
    """Return what a server made, which has a name; raises TypeError for anything else."""
    if not isinstance(getattr(found, "id", None), str) or not found.id:
        raise TypeError("what came back has no id")
    return found


class Batches:
    """The server's side of batches: files and batches, with the same retries as all else."""

    def __init__(self, client: AsyncOpenAI, settings: Settings, stop: Stop) -> None:
        self._client = client
        self._settings = settings
        self._stop = stop

    async def upload(self, path: str) -> str:
        """Return what the server calls a file that it has been given."""

        async def send() -> Any:
            with open(path, "rb") as file:  # noqa: ASYNC230 - the SDK reads it; a path it would read whole
                return check_id(await self._client.files.create(file=file, purpose="batch", timeout=FILE_TIMEOUT_S))

        return str((await self._call(f"uploading {printable(path)}", send)).id)

    async def create(self, input_file_id: str, *, is_perhaps_there: bool) -> Any:
        """Return the batch of a file; one that the server may have by now is looked for first: none is paid twice."""
        look_first = is_perhaps_there

        async def create() -> Any:
            nonlocal look_first
            if look_first and (found := await self._find(input_file_id)):
                return found
            look_first = True
            return check_id(
                await self._client.batches.create(
                    input_file_id=input_file_id, endpoint=ENDPOINT, completion_window="24h"
                )
            )

        return await self._call("creating a batch", create)

    async def retrieve(self, part: Part) -> dict[str, Any]:
        """Return how a batch stands, in the server's words."""

        async def retrieve() -> dict[str, Any]:
            return (await self._client.batches.retrieve(part.batch_id)).to_dict()

        what = f"looking at batch {part.batch_id} (to give it up, delete {printable(part.path + STATE)})"
        return dict(await self._call(what, retrieve))

    async def download(self, file_id: str, path: str) -> str:
        """Write a file of the server's to a path, and return that."""

        async def receive() -> None:
            content = self._client.files.with_streaming_response.content(file_id, timeout=FILE_TIMEOUT_S)
            async with content as response:
                await response.stream_to_file(path)

        await self._call(f"downloading {file_id}", receive)
        return path

    async def forget(self, file_ids: Iterable[str | None]) -> None:
        """Remove files from the server; they would be kept for weeks, and nothing depends on it."""
        for file_id in filter(None, file_ids):
            with contextlib.suppress(Exception):
                await self._client.files.delete(file_id)

    async def _find(self, input_file_id: str) -> Any:
        page = await self._client.batches.list(limit=100)  # the newest first
        for _ in range(MOST_PAGES):
            if not isinstance(page.data, list):
                raise TypeError("no list of batches came back")
            found = next((batch for batch in page.data if batch.input_file_id == input_file_id), None)
            if found or not page.has_next_page():
                return found
            page = await page.get_next_page()
        return None

    async def _call(self, what: str, request: Callable[[], Awaitable[Any]]) -> Any:
        """Return what a request brings; raises StopRun, of which the state on the disk is none the worse."""

        async def attempt() -> Any:
            self._stop.check()
            try:
                return await request()
            except AttributeError as error:  # the SDK passes on whatever comes, a web page for an object too
                raise TryAgain(BROKEN, "what came back is no such object") from error
            except Exception as error:
                raise judge_error(describe_failure(error, self._settings), datetime.now(UTC), first=False) from error

        try:
            return await keep_trying(self._settings, self._stop, lambda _: what)(attempt)
        except (FailImage, StopRun) as error:
            self._stop.check()
            raise StopRun(f"{what}: {error}; the same command goes on where it was") from error


class Collector:
    """Takes the results of batches to captions: each line to the images that it is about."""

    def __init__(
        self, settings: Settings, recipe: Recipe, image_dir: Path, journal: Journal, report: Report, stop: Stop
    ) -> None:
        self._settings = settings
        self._recipe = recipe
        self._image_dir = image_dir
        self._journal = journal
        self._report = report
        self._stop = stop
        billed = {entry.result_id for past in journal.history.values() for entry in past}
        self._answers = Answers(settings, recipe, report.bill, billed)
        self.torn = 0  # lines that could not be read, of the files last read
        self._seen: set[str] = set()  # lines that have a result in them
        self._captioner = Captioner(settings, recipe, self._answers, journal, report, stop)

    def plan(self, rows: Iterable[Row], *, overwrite: bool, is_report: bool = True) -> dict[str, Job]:
        """Return the jobs of a manifest's rows by image name; what has become wrong is recorded.

        So is what has become needless, unless the plan of the run has done so.
        """
        jobs = {}
        for row in rows:
            item = self._plan_row(row, overwrite=overwrite)
            if isinstance(item, Job):
                jobs[row.image] = item
            elif is_report or isinstance(item, Failed):
                self._report.record(item)
        return jobs

    def _plan_row(self, row: Row, *, overwrite: bool) -> Job | Skipped | Failed:
        image = path_below(self._image_dir, row.image)
        folder, name = os.path.split(path_below(self._settings.caption_dir or self._image_dir, row.image))
        caption = os.path.join(folder, caption_name(name, self._recipe.caption_ext))
        seen = Entry(image_sha256=row.image_sha256, image_size=row.image_size, image_mtime_ns=row.image_mtime_ns)
        if not os.path.isfile(image) or not is_same_image(image, seen):
            return Failed(image, "changed since", "it is not the image that was asked about any more; run again")
        try:
            return judge_image(
                image, caption, has_caption(caption), journal=self._journal, recipe=self._recipe, overwrite=overwrite
            )
        except OSError as error:
            return Failed(image, "unreadable caption", f"{printable(caption)}: {error.strerror}")

    async def collect(self, files: Sequence[str], rows: Iterable[Row], jobs: Mapping[str, Job]) -> tuple[int, int]:
        """Write the captions that result files bring, in any order; where a line was answered twice, success counts.

        Returns how many lines have a result, and how many images have no answer.
        """
        waiting = group_rows(rows)
        failed: dict[str, tuple[ErrorReply, str]] = {}
        lines = set(waiting)
        self._seen = set()

        async def handle(item: tuple[Row, Reply | ErrorReply, str]) -> None:
            row, answer, result_id = item
            if job := jobs.get(row.image):
                self._answers.put(job.image, answer, result_id)
                await self._captioner.record(job, self._captioner.take_answer(job, row, result_id))

        workers = self._settings.thread_pool
        await run_pool(self._read_answers(files, waiting, failed), handle, workers, self._stop)
        errors = ((row, *failed[key]) for key, rows in waiting.items() if key in failed for row in rows)
        await run_pool(errors, handle, workers, self._stop)
        missing = sum(row.image in jobs for key, rows in waiting.items() if key not in failed for row in rows)
        return len(lines & self._seen), missing

    def _read_answers(
        self, files: Sequence[str], waiting: dict[str, list[Row]], failed: dict[str, tuple[ErrorReply, str]]
    ) -> Iterator[tuple[Row, Reply, str]]:
        """Yield each image with its answer; who has one does not wait any more. Errors are kept for the end."""
        known, unknown, self.torn = set(waiting), 0, 0
        for path in files:
            with open(path, "rb") as file:
                for line in filter(bytes.strip, file):
                    result = parse_result(line)
                    if result is None:
                        self.torn += 1
                        continue
                    custom_id, answer, result_id = result
                    unknown += custom_id not in known
                    self._seen.add(custom_id)
                    if isinstance(answer, Reply):
                        for row in waiting.pop(custom_id, ()):
                            yield row, answer, result_id
                    elif not is_not_reached(answer):
                        failed[custom_id] = answer, result_id
        for number, said in ((unknown, "belong to no image of the manifest"), (self.torn, "are torn, or no results")):
            if number:
                log.warning("%s: %d lines %s", printable(", ".join(files)), number, said)


class BatchRun:
    """Takes images to captions by the Batch API: parts are written, sent, waited for and collected.

    Each step is on the disk before the next, so that a run which was ended goes on where it was.
    """

    def __init__(
        self, settings: Settings, recipe: Recipe, image_dir: Path, journal: Journal, report: Report,
        client: AsyncOpenAI, stop: Stop,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._recipe = recipe
        self._image_dir = image_dir
        self._report = report
        self._stop = stop
        self._folder = os.path.join(journal.folder, settings.batch_name)
        self._asker = Asker(client, settings, recipe, report.bill, stop)
        self._captioner = Captioner(settings, recipe, self._asker, journal, report, stop)
        self._stuck: dict[str, StopRun] = {}  # why a part cannot go on in this run
        self._done: dict[str, int] = {}  # lines of each part, and how many in all are shown as done
        self._said = 0
        self._batches = Batches(client, settings, stop)
        self._collector = Collector(settings, recipe, image_dir, journal, report, stop)
        stamp = new_stamp().replace(".", "")
        self._exporter = Exporter(
            settings, recipe, image_dir, self._captioner, report.bill,
            PartWriter(lambda n: os.path.join(self._folder, f"{stamp}-{n:03}"), "", settings.batch_megabytes * 1e6),
        )  # fmt: skip

    async def run(self, jobs: Sequence[Job], update: Callable[[int], None]) -> None:
        """Send the jobs' images and wait for all batches; raises StopRun. `update` counts what the server has done."""
        os.makedirs(self._folder, exist_ok=True)
        remove_halves(self._folder)
        parts = load_parts(self._folder)
        if parts:
            log.info("%d batches of an earlier run are not collected yet", len(parts))
            self._report.bill.held += sum(part.held for part in parts)
            await self._look_at_all(parts, update)  # what is answered is safe, whatever becomes of the others

        async def handle(job: Job) -> None:
            if job.trigger_only:
                await self._captioner.handle(job)
            elif done := await self._exporter.add(job, self._asker.parameters):
                await self._begin(done, parts)

        queue = iter(jobs)
        for job in queue:  # the first is asked at once: what is wrong for all is known before a day has passed
            await self._captioner.handle(job)
            if self._asker.is_proven:
                break
        await run_pool(queue, handle, count_processors(), self._stop)
        last = self._exporter.finish()
        if last and self._stop.cause is None:
            await self._begin(last, parts)
        await self._wait(parts, update)
        if self._exporter.is_over_budget:
            raise StopRun("--max-cost: leaves no room for the other images; raise it, then run again")

    async def _begin(self, part: Part, parts: list[Part]) -> None:
        """Keep a part that is written, and give it to the server; where that fails, the others go on."""
        part.overwrite = self._settings.overwrite
        try:
            save_part(part)
        except OSError as error:
            raise StopRun(f"{printable(self._folder)}: {error.strerror}; run again after that") from error
        parts.append(part)
        await self._try(self._submit(part), part)

    async def _try(self, step: Awaitable[Any], part: Part) -> Any:
        """Return what a step for one part brings; one that cannot be is named, and the part left for the next run."""
        try:
            return await step
        except OSError as error:
            advice = f"to give it up, delete {printable(part.path + STATE)}"
            cause = StopRun(f"{printable(part.path)}: {error.strerror} ({advice})")
        except StopRun as error:
            self._stop.check()
            cause = error
        log.error("%s", cause)
        self._stuck[part.path] = cause
        return None

    async def _submit(self, part: Part) -> None:
        """Give a part to the server; each step that it cannot be asked for twice is on the disk first."""
        if not part.input_file_id:
            part.input_file_id = await self._batches.upload(part.path + LINES)
            save_part(part)
            os.unlink(part.path + LINES)
        is_perhaps_there, part.is_being_created = part.is_being_created, True
        save_part(part)
        batch = await self._batches.create(part.input_file_id, is_perhaps_there=is_perhaps_there)
        part.batch_id, part.is_being_created = batch.id, False
        save_part(part)
        log.info("batch %s: %d images are on their way; Ctrl-C ends the waiting only", batch.id, part.lines)

    async def _wait(self, parts: list[Part], update: Callable[[int], None]) -> None:
        """Look at all batches until they are collected."""
        pause_s = FIRST_POLL_S
        while len(parts) > len(self._stuck):
            collected = await self._look_at_all(parts, update)
            if len(parts) > len(self._stuck):
                pause_s = FIRST_POLL_S if collected else min(LONGEST_POLL_S, 1.5 * pause_s)
                await self._stop.sleep(pause_s)
        for cause in self._stuck.values():
            raise cause

    async def _look_at_all(self, parts: list[Part], update: Callable[[int], None]) -> bool:
        """Look at each batch once; returns whether one was collected, and is no part any more."""
        collected = False
        for part in [part for part in parts if part.path not in self._stuck]:
            if not part.batch_id and time.monotonic() < part.try_at:
                continue
            lines = await self._try(self._look(part), part)
            self._done[part.path] = part.lines if lines == ALL else lines or 0
            if lines == ALL:
                collected = True
                parts.remove(part)
                for other in parts:
                    other.try_at = 0.0  # there may be room now
        if (now := sum(self._done.values())) > self._said:
            update(now - self._said)
            self._said = now
        return collected

    async def _look(self, part: Part) -> int:
        """Look at the batch of a part, submitted now if it was not; returns how many lines are done, ALL when it is."""
        if not part.batch_id:
            await self._submit(part)
        batch = read_batch(await self._batches.retrieve(part))
        if batch.status not in {*ENDED, *GOING}:
            log.warning("batch %s: its status is %s, which is none that is known", part.batch_id, batch.status)
        if batch.status in ENDED and await self._finish(part, batch):
            return ALL
        return batch.done

    async def _finish(self, part: Part, batch: BatchState) -> bool:
        """Collect a batch that has come to its end; returns whether its part is done with."""
        if batch.status == "failed" and not batch.files:
            if not any(re.search(NO_ROOM, error) for _, error in batch.errors):
                await self._batches.forget([part.input_file_id])
            return self._judge_failed(part, batch.errors)
        files = [await self._batches.download(name, f"{part.path}.{kind}{LINES}") for kind, name in batch.files]
        self._report.bill.held -= part.held
        rows = list(read_rows(part.path + ROWS))
        jobs = self._collector.plan(rows, overwrite=part.overwrite, is_report=False)
        if len(prepare_folders([*jobs.values()], self._report)) < len(jobs):  # folders may be gone by now
            raise StopRun(f"batch {part.batch_id}: caption folders cannot be used; mend that, then run again")
        answered, missing = await self._collector.collect(files, rows, jobs)
        self._stop.check()
        expected = min(batch.completed, part.lines) or part.lines
        if answered < min(batch.completed, part.lines) or (files and not answered) or self._collector.torn:
            raise StopRun(  # what is paid for is not thrown away
                f"batch {part.batch_id}: {answered} of {expected} answers can be read; the same command downloads "
                f"them again (to give them up, delete {printable(part.path + STATE)})"
            )
        self._report.unanswered += missing
        if missing:
            log.warning("batch %s is %s: %d images have no result; run again", part.batch_id, batch.status, missing)
        remove_part(part)
        await self._batches.forget([part.input_file_id, *(file_id for _, file_id in batch.files)])
        return True

    def _judge_failed(self, part: Part, errors: Sequence[tuple[int, str]]) -> bool:
        """Decide about a batch that the server did not begin; nothing of it was paid for."""
        said = "; ".join(error for _, error in errors[:3]) or "no reason is given"
        if any(re.search(NO_ROOM, error) for _, error in errors):
            log.warning("batch %s: no room yet, tried again later: %s", part.batch_id, said)
            part.batch_id, part.try_at = "", time.monotonic() + NO_ROOM_S
            save_part(part)
            return False
        rows = list(read_rows(part.path + ROWS))
        lines = list(group_rows(rows).values())
        wrong = {number: error for number, error in errors if 0 < number <= len(lines)}
        for number, error in wrong.items():
            for row in lines[number - 1]:
                detail = f"line {number} of its batch: {error}; mend it or take it out"
                self._report.record(Failed(path_below(self._image_dir, row.image), "rejected", detail))
        remove_part(part)
        if not wrong:
            raise StopRun(f"the server rejects the batch: {said}")
        log.warning("batch %s was rejected for %d of its images; run again for the others", part.batch_id, len(wrong))
        self._report.unanswered += len(rows) - len(wrong)
        return True


async def send_batches(
    settings: Settings, image_dir: Path, recipe: Recipe, jobs: Sequence[Job], journal: Journal, report: Report
) -> None:
    """Caption the images of a plan by the Batch API; the report has the outcomes, and why the run ended early."""
    stop = Stop()
    folder = os.path.join(journal.folder, settings.batch_name)
    before, total = report.recorded, len(jobs) + sum(1 for _ in waiting_rows(folder))
    with show_progress(total, report, unit="image", quiet=log.level > logging.INFO) as update, end_on_signals(stop):
        try:
            async with open_client(settings) as client:
                batch = BatchRun(settings, recipe, image_dir, journal, report, client, stop)
                await batch.run(jobs, update)
        except StopRun as cause:
            stop.set(cause)
        except OSError as error:
            stop.set(StopRun(f"{printable(journal.folder)}: {error.strerror}; run again after that"))
        finally:
            report.ended_by = stop.cause
            report.left += max(0, total - (report.recorded - before))


def check_rows(rows: Iterable[Row], recipe: Recipe, shown: str) -> list[Row]:
    """Return rows of batches; raises SettingsError when they were made with another recipe, which their answers fit."""
    found = list(dict.fromkeys(rows))
    if any(row.recipe != recipe.identity for row in found):
        raise SettingsError(f"{shown}: was made with another model, prompt or style; take the same settings as then")
    return found


def limit_left(settings: Settings, waiting: Sequence[Row]) -> int | None:
    """Return how many more images --limit allows; what is on its way in batches counts."""
    return max(0, settings.limit - len(waiting)) if settings.limit else None


def check_waiting(settings: Settings, journal: Journal, recipe: Recipe) -> list[Row]:
    """Return the images of this run's batches; raises SettingsError when their answers fit other settings."""
    folder = os.path.join(journal.folder, settings.batch_name)
    shown = f"the batch in {printable(folder)} (delete that to give it up)"
    return check_rows(waiting_rows(folder), recipe, shown)


async def export_lines(
    settings: Settings, image_dir: Path, recipe: Recipe, jobs: Sequence[Job], journal: Journal, report: Report
) -> None:
    """Write the images of a plan as batch files, and beside them the manifest that their results are read with."""
    stop, folder = Stop(), str(settings.batch_export)
    with show_progress(len(jobs), report, unit="image", quiet=log.level > logging.INFO) as update, end_on_signals(stop):
        captioner = Captioner(settings, recipe, Answers(settings, recipe, report.bill, set()), journal, report, stop)
        manifest = os.path.join(folder, "manifest.jsonl")
        name = functools.partial("{}/part-{:03}".format, folder)
        writer = PartWriter(name, manifest, settings.batch_megabytes * 1e6)
        exporter = Exporter(settings, recipe, image_dir, captioner, report.bill, writer)

        async def handle(job: Job) -> None:
            if not job.trigger_only:  # a run without this flag renews it for nothing
                await exporter.add(job, first_parameters(settings))
            update(1)

        failed = len(report.failed)
        try:
            await run_pool(iter(jobs), handle, count_processors(), stop)
            exporter.finish()
        except OSError as error:
            stop.set(StopRun(f"{printable(folder)}: cannot be written: {error.strerror}"))
        report.ended_by = stop.cause
        report.skipped["exported"] += exporter.images
        report.left += len(jobs) - exporter.images - (len(report.failed) - failed)
        log.info("%d lines are in %s, with manifest.jsonl beside them", exporter.lines, printable(folder))


def check_export(folder: Path) -> None:
    """Make the folder for batch files; raises SettingsError when it cannot be, or holds some already."""
    shown = f"--batch-export: {printable(str(folder))}"
    try:
        if STATE_FOLDER in folder.resolve().parts:
            raise SettingsError(f"{shown}: is a folder of this tool's own; name another")
        folder.mkdir(parents=True, exist_ok=True)
        if any(name.endswith(LINES) for name in list_names(str(folder))):
            raise SettingsError(f"{shown}: holds batch files already; name an empty folder")
        if not os.access(folder, os.W_OK):
            raise SettingsError(f"{shown}: may not be written to")
    except OSError as error:
        raise SettingsError(f"{shown}: {error.strerror}") from None


def is_manifest(path: str) -> bool:
    """Return whether a file is a manifest, by its first line; raises SettingsError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return parse_row(file.readline()) is not None
    except OSError as error:
        raise SettingsError(f"--batch-import: {printable(path)}: cannot be read: {error.strerror}") from None


def read_manifests(named: Sequence[str], recipe: Recipe) -> tuple[list[str], list[Row]]:
    """Return which of the files named are results, and the rows of the manifests, among them or beside them."""
    manifests = [path for path in named if is_manifest(path)]
    results = [path for path in named if path not in manifests]
    beside = (os.path.join(os.path.dirname(path), "manifest.jsonl") for path in results)
    manifests = list(dict.fromkeys([*manifests, *filter(os.path.isfile, beside)]))
    if not manifests or not results:
        what = "a file of results" if manifests else "manifest.jsonl of the export"
        raise SettingsError(f"--batch-import: {what} is missing; name both, or put the results beside the manifest")
    rows = check_rows(itertools.chain.from_iterable(map(read_rows, manifests)), recipe, printable(manifests[0]))
    return results, rows


async def import_results(
    settings: Settings, image_dir: Path, recipe: Recipe, journal: Journal, report: Report,
    results: Sequence[str], rows: Sequence[Row],
) -> None:  # fmt: skip
    """Take the answers in result files to captions."""
    stop = Stop()
    collector = Collector(settings, recipe, image_dir, journal, report, stop)
    planned = collector.plan(rows, overwrite=settings.overwrite)
    ready, _ = prepare_run([*planned.values()], settings.caption_dir or image_dir, journal, report)
    usable = set(ready)
    jobs = {name: job for name, job in planned.items() if job in usable}
    with end_on_signals(stop):
        before = report.recorded
        _, missing = await collector.collect(results, rows, jobs)
        report.unanswered += missing
        if missing and stop.cause is None:
            log.warning("%d images of the manifest have no result in these files", missing)
        report.ended_by = stop.cause
        report.left += len(jobs) - (report.recorded - before)


# --------------------------------------------------------------------------------------- Metadata and undo


def metadata_name(target: str) -> str:
    """Return the name that a --metadata file has in the journal."""
    return f"metadata {os.path.realpath(target)}"


def check_metadata(target: str, journal: Journal) -> None:
    """Raise the SettingsError for a --metadata file that cannot be written, or holds what this tool has not written."""
    shown = f"--metadata: {printable(target)}"
    folder = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(target):
        raise SettingsError(f"{shown}: cannot be written there; name a file in a folder that exists")
    if not has_caption(target):
        return
    past = journal.history.get(metadata_name(target), ())
    if hash_file(target) not in {entry.caption_sha256 for entry in past}:
        raise SettingsError(
            f"{shown}: is there already, and not as this tool wrote it; move it away or name another file"
        )


def write_metadata(target: str, pairs: Iterable[Skipped], journal: Journal, report: Report) -> None:
    """Write all captions that there are into one file, whole or not at all.

    `.jsonl`: https://huggingface.co/docs/datasets/image_dataset, paths relative to the file; `.json`: ai-toolkit's
    dataset_path, which it opens in the system's encoding, so that all is ASCII.
    """
    lines = target.lower().endswith(".jsonl")
    folder = os.path.dirname(os.path.abspath(target))

    def fill(file: IO[bytes]) -> None:
        start = b"" if lines else b"{\n"
        for item in pairs:
            text = read_words(item.caption)
            if not text:
                detail = f"{printable(item.caption)} is no UTF-8; it is left out of {printable(target)}"
                report.record(Failed(item.path, "unreadable caption", detail))
            elif lines:
                name = os.path.relpath(item.path, folder).replace(os.sep, "/")
                file.write(json.dumps({"file_name": name, "text": text}).encode() + b"\n")
            else:
                pair = json.dumps({os.path.abspath(item.path): {"caption": text}})[1:-1]
                file.write(start + pair.encode())
                start = b",\n"
        file.write(b"" if lines else b"{}\n" if start == b"{\n" else b"\n}\n")

    def place(temporary: str, path: str) -> None:
        journal.open()
        journal.append(metadata_name(path), Entry("metadata", caption_sha256=hash_file(temporary)))
        os.replace(temporary, path)

    try:
        write_whole(os.path.realpath(target), fill, place)
    except StopRun as error:
        report.record(Failed("--metadata", "not written", str(error)))
    except OSError as error:
        report.record(Failed("--metadata", "not written", f"{printable(target)}: {error.strerror}"))
    else:
        log.info("all captions are in %s too", printable(target))
    finally:
        journal.close()


PUT_BACK = "put back"


def judge_original(name: str, path: str, original: bytes, journal: Journal) -> str:
    """Return what is to become of a file whose original is kept, `PUT_BACK` or why it is left alone. Raises OSError."""
    if os.path.isabs(name) or ".." in name.split("/"):  # a set from elsewhere may bring a zip of its own
        return "lies outside of the folder, left alone"
    if not os.path.lexists(path):
        return PUT_BACK
    if not os.path.isfile(path):
        return "no file any more, left alone"
    now = hash_file(path)
    if now == hashlib.sha256(original).hexdigest():
        return "is as it was"
    return PUT_BACK if any(entry.caption_sha256 == now for entry in journal.past(path)) else "edited since, left alone"


def put_back(path: str, data: bytes, changed_ns: int, mode: int, owner: tuple[int, int]) -> None:
    """Put one original back with its time, permissions and owner. Raises OSError."""

    def place(temporary: str, path: str) -> None:
        os.chmod(temporary, mode)
        with contextlib.suppress(OSError, AttributeError):  # as in put_instead
            os.chown(temporary, *owner)
        os.utime(temporary, ns=(changed_ns, changed_ns))
        os.replace(temporary, path)

    real = os.path.realpath(path)
    os.makedirs(os.path.dirname(real), exist_ok=True)
    remove_abandoned(os.path.dirname(real))
    write_whole(real, lambda file: file.write(data), place)


def undo_below(root: str, kept: str, *, dry_run: bool) -> None:
    """Put back what a zip of originals holds, unless it was edited since, and say so for each file.

    Raises StopRun when not all could be done, and whatever a damaged zip leads to.
    """
    import zipfile

    journal, failed = Journal(root), 0
    states: Counter[str] = Counter()
    try:
        with zipfile.ZipFile(kept) as archive:
            index = json.loads(archive.read(INDEX))
            if not dry_run:
                journal.open()
                paths = filter(os.path.isfile, (journal.path(name) for name, *_ in index))
                keep_originals(root, paths, UNDONE, new_stamp())
            for member, (name, changed_ns, mode, *owner) in zip(archive.infolist(), index, strict=False):
                path = journal.path(name)
                try:
                    data = archive.read(member)
                    state = judge_original(name, path, data, journal)
                    if state == PUT_BACK and not dry_run:
                        put_back(path, data, changed_ns, mode, (owner[0], owner[1]))
                except (OSError, zipfile.BadZipFile, zlib.error) as error:
                    state, failed = f"not put back: {error}", failed + 1
                states[state] += 1
                print(f"{printable(path)}: {'would be ' if dry_run and state == PUT_BACK else ''}{state}")
        if failed:
            raise StopRun(f"{failed} files were not put back; mend that, then run --undo again")
        if not dry_run:
            done = os.path.join(journal.folder, os.path.basename(kept).replace(KEPT, RESTORED, 1))
            os.rename(kept, done)
            kept = done
    finally:
        journal.close()
    said = f"{'Would put' if dry_run else 'Put'} back {states[PUT_BACK]:,} of {states.total():,}"
    print(f"{said}; all originals are in {printable(kept)}")


# ---------------------------------------------------------------------------------------------------- Look


def check_page(target: str) -> None:
    """Raise SettingsError for a page that cannot be written, or is somebody else's."""
    shown = f"--review: {printable(target)}"
    try:
        if os.path.lexists(target):
            with open(target, "rb", opener=lambda path, _: os.open(path, READ_ONLY)) as before:  # a pipe would wait
                is_file = stat.S_ISREG(os.fstat(before.fileno()).st_mode)
                is_page = is_file and before.read(len(PAGE_MARK)) in {b"", PAGE_MARK.encode()}
            if not is_page:
                raise SettingsError(f"{shown}: is there already and is no page of this tool; name another file")
        elif not os.access(os.path.dirname(os.path.abspath(target)), os.W_OK):
            raise SettingsError(f"{shown}: cannot be written there; name a file in a folder that exists")
    except OSError as error:
        raise SettingsError(f"{shown}: cannot be written: {error.strerror}") from None


def has_end(file: IO[bytes], mark: bytes) -> bool:
    """Return whether the last bytes of a file hold a mark, and leave the file where it was read."""
    place = file.tell()
    file.seek(max(0, os.fstat(file.fileno()).st_size - 1024))
    end = file.read()
    file.seek(place)
    return mark in end


def look_at_image(sample: Sample) -> None:
    """Add what is wrong with an image's name and header; its pixels are decoded only where its end is missing."""
    try:
        with open(sample.image, "rb", opener=open_regular) as file, name_damage():
            image = open_image(file)
            image_format = image.format or ""
            if (end := FORMAT_ENDS.get(image_format)) and not has_end(file, end):
                image.draft("RGB", (1, 1))
                image.load()
    except OSError as error:
        sample.findings.append(Finding("unreadable file", sample.image, str(error.strerror)))
    except FailImage as error:
        sample.findings.append(Finding(error.reason, sample.image, error.detail))
    else:
        sample.findings += [Finding(kind, sample.image, said) for kind, said in judge_name(sample.image, image_format)]


def look_at_caption(sample: Sample, recipe: Recipe, journal: Journal) -> None:
    """Add what a caption says, what is wrong with it, and what the journal knows of it."""
    try:
        data = read_text_bytes(sample.caption)
    except OSError as error:
        sample.find("unreadable caption", str(error.strerror))
        return
    sample.text, faults = read_caption(data)
    for kind, detail in [*faults, *judge_caption(sample.text, recipe)]:
        sample.find(kind, detail)
    made = [entry for entry in journal.past(sample.caption) if entry.outcome == "captioned"]
    now = hashlib.sha256(data).hexdigest()
    sample.made = next((entry for entry in reversed(made) if entry.caption_sha256 == now), made[-1] if made else None)
    sample.edited = sample.made is not None and sample.made.caption_sha256 != now


def real_stem(path: str) -> str:
    """Return what an image and its caption have in common, whichever links lead to them."""
    folder, name = os.path.split(path)
    return os.path.join(real_folder(folder), os.path.splitext(name)[0])


@functools.lru_cache(1000)
def real_folder(path: str) -> str:
    """Return a folder's real path."""
    return os.path.realpath(path)


def is_note(path: str) -> bool:
    """Return whether a text is for people, or for this tool."""
    return os.path.splitext(os.path.basename(path))[0].lower() in {"prompt", "exclude", "readme", "license", "licence"}


def has_video(stem: str) -> bool:
    """Return whether a video that trainers read lies beside a caption."""
    return any(os.path.exists(stem + suffix) for suffix in VIDEO_SUFFIXES)


def collect_samples(settings: Settings, image_dir: Path, recipe: Recipe, journal: Journal) -> list[Sample]:
    """Return each image with its caption, then captions without an image, each with what is wrong with it alone."""
    root, dot_ext = str(settings.caption_dir or image_dir), f".{recipe.caption_ext}"
    by_stem: dict[str, Sample] = {}
    samples: list[Sample] = []
    for item in plan_folder(image_dir, settings.caption_dir, recipe.caption_ext):
        match item:
            case Failed(path, reason, detail):
                sample = Sample(path)
                sample.find(reason, detail)
            case Skipped(path, _, caption):
                sample = Sample(path, caption)
                look_at_caption(sample, recipe, journal)
            case Job(path, caption):
                sample = Sample(path)
                sample.find("blank caption" if os.path.lexists(caption) else "no caption")
        sample.is_file = os.path.isfile(sample.image)
        if sample.is_file:
            look_at_image(sample)
        samples.append(sample)
        by_stem[real_stem(os.path.join(root, os.path.relpath(sample.image, image_dir)))] = sample
    others = (path for _, path in walk_texts([str(image_dir)], OTHER_IMAGES) if path.lower().endswith(OTHER_IMAGES))
    for path in others:  # else it is a folder that cannot be read
        finding = Finding("format not read", path, os.path.splitext(path)[1])
        samples.append(Sample(path, findings=[finding], is_file=os.path.isfile(path)))
    for _, path in walk_texts([root], (dot_ext.lower(), *CAPTION_SUFFIXES)):
        stem, ext = os.path.splitext(path)
        beside = by_stem.get(real_stem(path))
        if beside is None and ext == dot_ext and not is_note(path) and not has_video(stem):
            alone = Sample("", path)
            alone.find("caption without an image")
            look_at_caption(alone, recipe, journal)
            samples.append(alone)
        elif beside and ext != dot_ext and any(finding.kind == "no caption" for finding in beside.findings):
            beside.findings = [Finding("another extension", path, f"{dot_ext} is read")]
    judge_set(samples)
    return samples


def write_page(
    page: str, root: str, samples: Sequence[Sample], recipe: Recipe, phrases: Sequence[tuple[str, float]]
) -> OSError | None:
    """Write the page of a set; returns why that was not possible."""
    title = os.path.basename(os.path.abspath(root))
    text = build_page(title, samples, recipe.findings, phrases, os.path.dirname(page))
    try:
        write_whole(os.path.realpath(page), lambda file: file.write(text.encode()))
    except OSError as error:
        return error
    return None


# ------------------------------------------------------------------------------------------ Commands, main


def add_worker(record: logging.LogRecord) -> bool:
    """Give a log record the name of the worker it comes from."""
    try:
        task = sys.modules["asyncio"].current_task()
    except (KeyError, RuntimeError):  # before there is an event loop, or in a thread
        task = None
    record.worker = task.get_name() if task and task.get_name().startswith("worker-") else "main"
    return True


def set_up_logging(settings: Settings) -> None:
    """Send this tool's log to stderr, at the level asked for; libraries keep theirs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(worker)-9s %(levelname)-7s %(message)s", "%H:%M:%S"))
    log.handlers, log.filters, log.propagate = [handler], [add_worker], False
    log.setLevel("DEBUG" if settings.verbose else "WARNING" if settings.quiet else settings.log_level)


def run_export(settings: Settings, image_dir: Path, recipe: Recipe, report: Report) -> None:
    """Write batch files for what has no caption yet, or with --overwrite for what is out of date."""
    import asyncio

    log_remarks(settings, recipe)
    journal = Journal(settings.caption_dir or image_dir, settings.journal_name)
    jobs = collect_jobs(plan_run(settings, image_dir, recipe, journal), settings.limit, report)
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(export_lines(settings, image_dir, recipe, jobs, journal, report))


def run_import(settings: Settings, image_dir: Path, recipe: Recipe, report: Report) -> None:
    """Write the captions that batch files were answered with."""
    import asyncio

    log_remarks(settings, recipe)
    results, rows = read_manifests(settings.batch_import or (), recipe)
    journal = Journal(settings.caption_dir or image_dir, settings.journal_name)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(import_results(settings, image_dir, recipe, journal, report, results, rows))
    except StopRun as cause:
        report.ended_by = cause
        log.error("%s", cause)  # noqa: TRY400
    finally:
        journal.close()


def ask_for_all(
    settings: Settings, image_dir: Path, recipe: Recipe, jobs: Sequence[Job], journal: Journal, report: Report
) -> None:
    """Carry out a plan: by batch, or image by image, by an engine of our own where --local wants it. Raises StopRun."""
    import asyncio

    needed = settings.local and any(not job.trigger_only for job in jobs)
    log_path = os.path.join(journal.folder, settings.engine_log)
    with (
        contextlib.suppress(asyncio.CancelledError),  # the second Ctrl-C
        open_engine(settings, recipe.prompt, log_path) if needed else contextlib.nullcontext() as engine,
    ):
        send = send_batches if settings.batch else functools.partial(caption_images, engine=engine)
        asyncio.run(send(settings, image_dir, recipe, jobs, journal, report))


def run_captions(settings: Settings, image_dir: Path, recipe: Recipe, report: Report) -> None:
    """Caption what has no caption yet, or with --overwrite what is out of date."""
    log.info("prompt: %s; trigger: %s", recipe.prompt_source, printable(recipe.trigger.put) or "none")
    log_remarks(settings, recipe)
    root = settings.caption_dir or image_dir
    journal = Journal(root, settings.journal_name)
    waiting = check_waiting(settings, journal, recipe) if settings.batch else []
    limit = limit_left(settings, waiting)
    jobs = collect_jobs(plan_run(settings, image_dir, recipe, journal), limit, report)
    if not jobs and not waiting:
        nothing = "nothing to caption" if report.recorded else "no images"
        log.info("%s below %s", nothing, printable(str(image_dir)))
        return
    ready, kept = jobs, ""
    try:
        ready, kept = prepare_run(jobs, root, journal, report)
        waiting = check_waiting(settings, journal, recipe) if settings.batch else []
        taken = waiting_images(journal)  # another run may have sent some before this one had the journal
        ready = [job for job in ready if name_below(image_dir, job.image) not in taken]
        pool = settings.thread_pool
        model = printable(settings.model)
        log.info("to caption: %d, with %s at %s, workers: %d", len(ready), model, settings.host, pool)
        ask_for_all(settings, image_dir, recipe, ready, journal, report)
    except StopRun as cause:  # before anything was asked
        report.left += len(jobs)
        report.ended_by = cause
        log.error("%s", cause)  # noqa: TRY400
    finally:
        journal.close()
    # --undo shall find the run before; an interrupt does not come here: a caption may be on its way to the disk then
    if kept and not settings.batch and not report.written and is_untouched(ready):
        with contextlib.suppress(OSError):
            os.unlink(kept)


def describe_job(job: Job) -> str:
    """Return what a run would do for an image."""
    how = "renew its trigger" if job.trigger_only else "renew its caption" if job.replaces else "to caption"
    return f"{how} -> {printable(job.caption)}"


def show_plan(settings: Settings) -> int:
    """Print what a run would do, one image a line, and what it would cost; return the exit code.

    Opens no connection and writes nothing; of the images only the headers are read.
    """
    image_dir = check_folders(settings)
    recipe = read_recipe(settings, os.environ)
    journal = Journal(settings.caption_dir or image_dir, settings.journal_name)
    log_remarks(settings, recipe)
    if settings.metadata:
        check_metadata(settings.metadata, journal)
    print("\n".join(describe_recipe(recipe)))
    counts = dict.fromkeys(("to caption", "skipped", "left by --limit", "cannot be captioned"), 0)
    asked: Counter[Expected] = Counter()
    limit = limit_left(settings, check_waiting(settings, journal, recipe) if settings.batch else [])
    load_pillow()
    for planned in plan_run(settings, image_dir, recipe, journal):
        item: Job | Skipped | Failed = planned
        left = limit is not None and counts["to caption"] >= limit
        if isinstance(item, Job) and not item.trigger_only and not left:
            try:
                asked[expect(settings, recipe, item)] += 1
            except FailImage as error:
                item = Failed(item.image, error.reason, error.detail)
        match item:
            case Job(path, caption):
                kind = "left by --limit" if left else "to caption"
                said = f"{kind} -> {printable(caption)}" if left else describe_job(item)
            case Skipped(path, reason):
                kind, said = "skipped", f"skipped: {reason}"
            case Failed(path, reason, detail):
                kind, said = "cannot be captioned", f"{reason}: {detail}"
        counts[kind] += 1
        print(f"{printable(path)}: {said}")
    totals = [f"{kind} {number:,}" for kind, number in counts.items() if number or kind == "to caption"]
    print(", ".join(totals).capitalize())
    if asked:
        print(describe_cost(settings, asked, journal.pace()))
        if download := describe_download(settings):
            print(download)
    return int(counts["cannot be captioned"] > 0)


def run_undo(settings: Settings) -> int:
    """Put back what the last run replaced in the caption folder and the config folder; return the exit code."""
    captions = "caption_dir" if settings.caption_dir else "image_dir"
    roots = {name: path for name in (captions, "config_dir") if (path := getattr(settings, name))}
    if not roots:
        raise SettingsError(
            "--undo: name the folder with --caption-dir (or --image-dir, where that has the captions), --config-dir"
        )
    for name, path in roots.items():
        check_folder(name, path)
    kept = {str(path): newest_originals(str(path)) for path in roots.values()}
    last = max(map(os.path.basename, kept.values()))
    if not last:
        print(f"{printable(', '.join(kept))}: there is nothing to put back")
    code = 0
    for root, path in kept.items():
        if last and os.path.basename(path) == last:  # one run names its zips alike
            try:
                undo_below(root, path, dry_run=settings.dry_run)
            except Exception as error:  # a damaged zip leads to whatever its parts lead to
                code = 1
                log.error("%s: not all was put back: %s", printable(path), error)  # noqa: TRY400
    return code


def run_review(settings: Settings) -> int:
    """Print what is wrong with a set of images and captions, write the page, and return the exit code."""
    image_dir = check_folders(settings)
    root = str(settings.caption_dir or image_dir)
    check_folder("caption_dir" if settings.caption_dir else "image_dir", Path(root))
    page = os.path.join(root, "review.html") if settings.review is True else str(settings.review)
    if not settings.dry_run:
        check_page(page)
    recipe = read_recipe(settings, os.environ)
    for remark in recipe.remarks:
        log.warning("%s", remark)
    log.info("looking at all images and captions below %s", printable(str(image_dir)))
    load_pillow()
    with open_report(settings.report) as stream:
        samples = collect_samples(settings, image_dir, recipe, Journal(root))
        findings = [*recipe.findings, *(finding for sample in samples for finding in sample.findings)]
        mention = find_mention(recipe.trigger, word=True)
        phrases = find_phrases([re.sub(mention, "", sample.text) for sample in samples if sample.text])
        if stream:
            stream.writelines(json.dumps({"outcome": "finding", **dataclasses.asdict(f)}) + "\n" for f in findings)
    failure = write_page(page, root, samples, recipe, phrases) if not settings.dry_run else None
    with contextlib.suppress(BrokenPipeError):  # whoever read enough (`| head`) has changed nothing of what is wrong
        if settings.report != "-":
            print("\n".join([*describe_findings(findings), *describe_set(samples, phrases)]))
            print(f"Findings {len(findings):,}" + ("" if settings.dry_run else f"; all is shown in {printable(page)}"))
            sys.stdout.flush()
    if failure:
        raise SettingsError(f"--review: {printable(page)}: cannot be written: {failure.strerror}")
    return int(bool(findings))


def open_report(target: str | None) -> contextlib.AbstractContextManager[IO[str] | None]:
    """Return the stream that --report names, an earlier report replaced, nothing else; raises SettingsError."""
    if target is None or target == "-":
        return contextlib.nullcontext(sys.stdout if target else None)
    shown = f"--report: {printable(target)}"
    try:
        if os.path.isfile(target) and os.path.getsize(target):
            with open(target, "rb") as before:
                is_report = before.read(12) == b'{"outcome": '
            if not is_report:
                raise SettingsError(f"{shown}: is there already and is no report; name another file")
        return open(target, "w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise SettingsError(f"{shown}: cannot be written: {error.strerror}") from None


CAPTIONS_ONLY = ("local", "limit", "overwrite", "metadata", "shard")

BATCH_FLAGS = ("batch", "batch_export", "batch_import")


def check_command(settings: Settings) -> None:
    """Raise the SettingsError for flags that say nothing to the command they stand beside."""
    others = [flag_name(name) for name in ("fix_encoding", "undo", "review") if getattr(settings, name)]
    commands = others + [flag_name(name) for name in BATCH_FLAGS if getattr(settings, name)]
    if len(commands) > 1:
        raise SettingsError(f"{' and '.join(commands)}: take one of them")
    check_batch(settings)
    for name in CAPTIONS_ONLY:
        if getattr(settings, name) and others:
            raise SettingsError(f"{flag_name(name)}: belongs to captioning, not to {others[0]}")
    files = [path for path in (settings.metadata, settings.report, settings.review) if isinstance(path, str)]
    if len({os.path.realpath(path) for path in files}) < len(files):
        raise SettingsError("--metadata, --report, --review: name a file of its own for each")
    if settings.encoding and not settings.fix_encoding:
        raise SettingsError("--encoding: belongs to --fix-encoding")
    if settings.report and (settings.dry_run or settings.undo):
        raise SettingsError("--report: tells what a run did; --dry-run and --undo print what they would do or did")


def check_batch(settings: Settings) -> None:
    """Raise the SettingsError for flags that do not fit those for large sets."""
    if settings.image_ref == "file" and not settings.batch_export:
        raise SettingsError("--image-ref file: belongs to --batch-export; a server cannot read this disk")
    if settings.service_tier and (settings.batch or settings.batch_export):
        raise SettingsError("--service-tier (GETCAP_SERVICE_TIER): a batch has a price of its own; leave it out")
    if settings.metadata and (settings.shard or settings.batch_export):
        raise SettingsError("--metadata: is for a run with all captions; leave it out here, and write it at the end")
    if settings.local and (settings.batch or settings.batch_export or settings.batch_import):
        raise SettingsError("--local: asks a model on this machine image by image; batch files are for others")
    for name in ("limit", "max_cost", "dry_run"):
        if settings.batch_import and getattr(settings, name):
            raise SettingsError(f"{flag_name(name)}: belongs to asking; --batch-import reads what was answered")


def report_on(settings: Settings, work: Callable[[Report], None]) -> int:
    """Do the work of a command that writes, print its summary, whatever happens, and return the exit code."""
    with open_report(settings.report) as stream:
        repairs = "to repair" if settings.dry_run else "repaired"
        report = Report(time.monotonic(), stream, repairs=repairs if settings.fix_encoding else "")
        try:
            work(report)
        except KeyboardInterrupt as error:  # where nothing is waited for
            report.ended_by = signal.Signals(*error.args or (signal.SIGINT,))
        now = time.monotonic()
        report.close(now)
        with contextlib.suppress(OSError):
            print(report.summary(now), file=sys.stderr)
    return report.exit_code


def run(settings: Settings) -> int:
    """Carry out what the settings ask for and return the exit code."""
    check_command(settings)
    if settings.undo:
        return run_undo(settings)
    if settings.review:
        return run_review(settings)
    if settings.fix_encoding:
        return report_on(settings, functools.partial(run_repair, settings, repair_roots(settings)))
    if settings.dry_run:
        return show_plan(settings)
    image_dir = check_folders(settings)
    caption: Callable[[Settings, Path, Recipe, Report], None] = run_captions
    if settings.batch_export:
        check_export(settings.batch_export)
        caption = run_export
    elif settings.batch_import:
        caption = run_import
    else:
        check_key(settings)
    bill = open_bill(settings)
    recipe = read_recipe(settings, os.environ)
    journal = Journal(settings.caption_dir or image_dir, settings.journal_name)
    if settings.metadata:
        check_metadata(settings.metadata, journal)

    def work(report: Report) -> None:
        report.bill = bill
        try:
            caption(settings, image_dir, recipe, report)
        finally:
            if settings.metadata:
                plan = plan_folder(image_dir, settings.caption_dir, recipe.caption_ext)
                write_metadata(settings.metadata, (item for item in plan if isinstance(item, Skipped)), journal, report)

    return report_on(settings, work)


def interrupt(number: int, _frame: FrameType | None) -> None:
    """Let SIGTERM end what runs as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def flush_output() -> int:
    """Write what is buffered for both streams; return 1 when standard output takes no more, and forget the rest."""
    failed = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError as error:
            failed |= stream is sys.stdout and not isinstance(error, BrokenPipeError)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code; the one place where errors become exit codes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us (`>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        getattr(sys, name).reconfigure(errors="backslashreplace")  # a console may know fewer characters
    signal.signal(signal.SIGTERM, interrupt)
    code = 0
    try:
        settings = read_settings(argv)
        set_up_logging(settings)
        code = run(settings)
    except SettingsError as error:
        code = 2
        with contextlib.suppress(OSError):
            print(f"gen-captions: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has seen enough (`| head`)
        pass
    except OSError as error:
        code = 1
        log.error("standard output: %s", error.strerror)  # noqa: TRY400
    except KeyboardInterrupt as error:
        code = 128 + (error.args or (signal.SIGINT,))[0]
    return max(code, flush_output())


if __name__ == "__main__":
    sys.exit(main())
