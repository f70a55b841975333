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
# ]
# ///
"""Caption a folder of images for training, with OpenAI's vision models or any server that speaks their API.

    python gen-captions.py --image-dir ./images --caption-dir ./captions --config-dir ./config

Read it from top to bottom; each room uses only rooms above it:

    Text               one way to print any name
    Settings           one table of settings; flag > environment > .env > default
    Data               what the rooms hand to each other
    Plan               which images need a caption, and where it goes
    Recipe             what the config folder says about the captions
    Pixels             any image file -> a small upright JPEG
    Request and reply  build the question; judge the answer
    Throttle           the pace of all workers, and how the run ends early
    Ask                the connection, the retries, what the server taught us
    Files              read images, write captions whole or not at all
    Pool               N workers over the jobs
    Report             counts, progress, summary, exit code
    Commands, main     one function a command

Exit codes: 0 all done or nothing to do; 1 some images failed; 2 usage or settings; 3 the run was stopped
(key, quota, endpoint, disk); 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import errno
import ipaddress
import json
import logging
import math
import os
import re
import signal
import stat
import sys
import time
import unicodedata
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO, StringIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:  # imported where they are needed, asyncio too: --help, -n and usage errors must not wait for them
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
    from types import FrameType

    from openai import AsyncOpenAI
    from PIL import Image, ImageFile
    from tenacity import RetryCallState

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
LOCAL_WORKERS = 2  # a server on this machine answers slower the more it is asked at once
IMAGE_SUFFIXES = {
    f".{name}" for name in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
}

WHAT, HOW, PACE = "what to caption", "which model, and what it is asked", "how fast"
SHOW, REPAIR = "what to see", "other work"


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


def parse_caption_ext(text: str) -> str:
    """Return the extension without its dot; an extension that trainers misread or that images have is a ValueError."""
    ext = text.removeprefix(".")
    # ai-toolkit trains on the raw text of .json captions since its commit 41157b46
    taken = {".json", ".jsonl", *IMAGE_SUFFIXES}
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,16}", ext) or f".{ext.lower()}" in taken:
        raise ValueError
    return ext


TEXT = Kind(str, "some text", "TEXT")
FOLDER = Kind(Path, "a folder", "FOLDER")
FILE = Kind(str, "a file, or - for standard output", "FILE")
SWITCH = Kind(bool, "", "")
SECRET = Kind(parse_key, "a key of printable ASCII characters without spaces", "")  # never a flag: others see those
URL = Kind(parse_url, "a URL such as http://localhost:11434/v1, without a user or a query", "URL")
MODEL = Kind(parse_model, "a model's name", "NAME")
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
    config_dir: Path | None = setting(WHAT, FOLDER, "folder whose prompt.txt, if any, is the prompt")
    caption_ext: str = setting(WHAT, EXTENSION, "extension of the caption files", "txt", "GETCAP_CAPTION_EXT")
    limit: int | None = setting(WHAT, whole_number(1, 10**9), "try at most this many images, then stop")

    api_key: str = setting(HOW, SECRET, "key of the server", "", "OPENAI_API_KEY")
    base_url: str = setting(HOW, URL, "server that speaks OpenAI's API", OPENAI_URL, "OPENAI_BASE_URL")
    model: str = setting(HOW, MODEL, "vision model", "gpt-6-luna", "GETCAP_MODEL")
    prompt: str | None = setting(
        HOW, TEXT, "what the model is told; else prompt.txt, else the built-in one", None, "GETCAP_PROMPT"
    )
    max_side: int = setting(HOW, whole_number(32, 8192), "longest side in pixels that is sent", 1024, "GETCAP_MAX_SIDE")
    max_tokens: int = setting(HOW, whole_number(1, 100_000), "longest answer in tokens", 300, "GETCAP_MAX_TOKENS")
    reasoning_effort: str = setting(
        HOW, TEXT, "reasoning, paid like an answer, where the model has it", "none", "GETCAP_REASONING_EFFORT"
    )
    temperature: float | None = setting(
        HOW, decimal(0, 2, low_itself=True), "randomness; the model's own when unset", None, "GETCAP_TEMPERATURE"
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
    timeout: float = setting(PACE, decimal(0, 86_400), "longest wait for an answer in seconds", 120.0, "GETCAP_TIMEOUT")

    dry_run: bool = setting(SHOW, SWITCH, "only say what would be captioned: no connection, no key", False, short="-n")
    report: str | None = setting(SHOW, FILE, "write outcomes as JSON lines, replacing the file; - is stdout")
    verbose: bool = setting(SHOW, SWITCH, "say more (log level DEBUG)", False, short="-v")
    quiet: bool = setting(SHOW, SWITCH, "say only what is wrong, and the summary (WARNING)", False, short="-q")
    log_level: str = setting(
        SHOW, one_of("DEBUG", "INFO", "WARNING", "ERROR"), "how much is said", "INFO", "GETCAP_LOG_LEVEL"
    )

    fix_encoding: bool = setting(REPAIR, SWITCH, "repair the encoding of captions and config files (not yet)", False)

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
    groups = {title: parser.add_argument_group(title) for title in (WHAT, HOW, PACE, SHOW, REPAIR)}
    for item, spec in specs():
        flags = filter(None, (spec.short, flag_name(item.name)))
        default = f"{item.default:g}" if isinstance(item.default, float) else item.default
        note = f" [{spec.variable}{'' if default is None else f', default {default}'}]" if spec.variable else ""
        if spec.kind is SWITCH:
            groups[spec.group].add_argument(*flags, action="store_true", help=spec.help)
        elif spec.kind is not SECRET:
            groups[spec.group].add_argument(*flags, metavar=spec.kind.metavar, help=spec.help + note)
    groups[SHOW].add_argument("-V", "--version", action="version", version=f"gen-captions {__version__}")
    groups[SHOW].add_argument("-h", "--help", action="help", help="show this and stop")
    return parser


def parse_value(source: str, kind: Kind, text: str) -> Any:
    """Return the value of a setting's text, or raise the error that names source, value and what is allowed."""
    try:
        return kind.parse(text.strip())
    except (ValueError, OverflowError):
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
    flags: Mapping[str, str | bool | None], environ: Mapping[str, str], dotenv: Mapping[str, str | None]
) -> Settings:
    """Return the settings by precedence: flag, environment, .env, default. A variable left blank counts as unset."""
    check_names({*environ, *dotenv})
    chosen: dict[str, Any] = {}
    for item, spec in specs():
        flag = flags.get(item.name)
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
    if "thread_pool" not in chosen and is_this_machine(chosen.get("base_url", OPENAI_URL)):
        chosen["thread_pool"] = LOCAL_WORKERS
    if chosen["verbose"] and chosen["quiet"]:
        raise SettingsError("-v and -q: take one of them")
    return Settings(**chosen)


def is_this_machine(url: str) -> bool:
    """Return whether a server at this URL runs on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def check_key(settings: Settings) -> None:
    """Raise the error that shows the ways on when there is no key and the server needs one."""
    if is_this_machine(settings.base_url) or settings.api_key not in {"", KEY_PLACEHOLDER}:
        return
    state = "still the placeholder of .env.example" if settings.api_key else "not set"
    raise SettingsError(
        f"OPENAI_API_KEY is {state}. Put a key from https://platform.openai.com/api-keys into .env or the "
        "environment; or set OPENAI_BASE_URL to another server that speaks OpenAI's API, with its key (any word "
        "where it wants none); or to a server on this machine, which needs no key: http://localhost:11434/v1 is Ollama"
    )


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
class Job:
    """One image that needs a caption. Paths are strings: 100,000 of them are light and keep undecodable bytes."""

    image: str
    caption: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the captions of this run are made from, and where that comes from."""

    prompt: str
    source: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens, as the server counts them."""

    prompt: int = 0
    answer: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.answer + other.answer)


@dataclass(frozen=True, slots=True)
class Written:
    """The caption is on disk."""

    job: Job
    text: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """The image was left alone."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The image, or the folder, got no caption. `reason` is one of a few names; `detail` says what to do."""

    path: str
    reason: str
    detail: str
    by_server: bool = False


Outcome = Written | Skipped | Failed


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


# ---------------------------------------------------------------------------------------------------- Plan

# a pipe would wait for its writer without O_NONBLOCK, which Windows has not, as others have no O_BINARY
READ_ONLY = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
LONGEST_NAME = 255  # bytes, on every common file system
BLANKS = b" \t\r\n\v\f\0"  # with the zero bytes that a power cut can leave
BOM = b"\xef\xbb\xbf"


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


def list_captions(path: str) -> set[str]:
    """Return the names in a caption folder, none when it does not exist yet."""
    try:
        return set(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):  # the latter is said when the folder is to be made
        return set()


def plan_image(name: str, folder: str, target: str, ext: str, captions: set[str]) -> Job | Skipped | Failed:
    """Decide about one image of a folder, given its caption folder's path and names. Both paths end in a separator."""
    file_name = caption_name(name, ext)
    image, caption = folder + name, target + file_name
    if len(file_name) > LONGEST_NAME // 4 and len(os.fsencode(file_name)) > LONGEST_NAME:
        return Failed(image, "name too long", f"its caption file's name would be over {LONGEST_NAME} bytes: rename it")
    if file_name in captions:
        try:
            if has_text(caption):
                return Skipped(image, "has a caption")
        except OSError as error:
            return Failed(image, "unreadable caption", f"{printable(caption)}: {error.strerror}")
    return Job(image, caption)


def plan_folder(image_dir: Path, caption_dir: Path | None, ext: str) -> Iterator[Job | Skipped | Failed]:
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
            captions = list_captions(target) if caption_dir else found.others
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
                yield plan_image(name, folder, target, ext, captions)


def check_folders(settings: Settings) -> Path:
    """Return the image folder, or raise the SettingsError that names the folder that cannot be used."""
    if settings.image_dir is None:
        raise SettingsError("--image-dir: is missing; name the folder of images")
    for name in ("image_dir", "caption_dir", "config_dir"):
        path = getattr(settings, name)
        if path is None or (name != "image_dir" and not os.path.lexists(path)):
            continue
        shown = f"{flag_name(name)}: {printable(str(path))}"
        try:
            os.scandir(path).close()
        except FileNotFoundError:
            raise SettingsError(f"{shown}: there is no such folder") from None
        except OSError as error:
            raise SettingsError(f"{shown}: is not a folder that can be read: {error.strerror}") from None
    return settings.image_dir


# -------------------------------------------------------------------------------------------------- Recipe

DEFAULT_PROMPT = """\
Write one caption for this image, for training an image generator: plain English prose, one paragraph, \
at most 90 words, fewer for a simple image.
Start with the main subject and its action. Continue with clothing or materials and their colours, other objects, \
where things are, the setting, the lighting, the shot type and camera angle. End with the medium, such as photo, \
drawing or 3D render.
Write definite facts, one exact word per colour, material and pose. Count up to five; beyond that write "many". \
Left and right are the viewer's. Describe people by visible attributes. Copy large readable text exactly, in double \
quotes. Skip whatever is unclear or absent.
Output only the caption."""


def read_recipe(settings: Settings) -> Recipe:
    """Return the recipe: GETCAP_PROMPT when it is set, else prompt.txt, else the built-in prompt."""
    path = settings.config_dir / "prompt.txt" if settings.config_dir else None
    from_file = read_text(path).strip() if path and path.exists() else None
    if from_file == "":
        raise SettingsError(f"{printable(str(path))}: is blank; write the prompt into it or delete it")
    if settings.prompt is not None:
        source = "--prompt or GETCAP_PROMPT"
        return Recipe(settings.prompt, f"{source}, not prompt.txt" if from_file else source)
    return Recipe(from_file, "prompt.txt") if from_file else Recipe(DEFAULT_PROMPT, "built in")


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


def prepare_image(data: bytes, max_side: int) -> bytes:
    """Return an image file's bytes as an upright RGB JPEG of at most `max_side` pixels a side; raises FailImage.

    A JPEG that is all of that already is returned as it came.
    """
    if not data:
        raise FailImage("empty file", "the file has no bytes: copy it again")
    try:
        return shrink_image(data, max_side)
    except FailImage:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        raise FailImage(
            "damaged image", f"{shorten(str(error) or repr(error), 120)}: open it in a viewer, save it again"
        ) from error


def shrink_image(data: bytes, max_side: int) -> bytes:
    """Return what prepare_image returns; raises FailImage, and what Pillow raises on damaged files."""
    from PIL import Image

    image = open_image(data)
    if is_ready(image, data, max_side):
        return data
    image.draft("RGB", (max_side, max_side))  # a JPEG is decoded at 1/2, 1/4 or 1/8; other formats ignore it
    image.load()  # TIFF turns itself upright here, and forgets its orientation
    turn = TURNS.get(read_orientation(image))
    small = to_8_bit(image)
    small.thumbnail((max_side, max_side))
    output = BytesIO()
    flatten(small.transpose(Image.Transpose[turn]) if turn else small).save(output, "JPEG", quality=JPEG_QUALITY)
    return output.getvalue()


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) when there is none or the EXIF data are broken."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # whatever a broken EXIF block leads to, the picture itself may be fine
        return 1


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Return the image that these bytes are, its pixels not decoded yet."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and "HEIF" not in Image.OPEN:
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
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # cheapest first
TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")  # the current name, and the one other servers know
LONGEST_WAIT_S = 600.0
LONGEST_RETRY_AFTER_S = 30 * 86_400.0  # whatever a server asks for beyond that
LONGEST_TEXT = 200_000  # characters of an answer, reasoning and all

Parameters = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a completed answer says, whichever server wrote it."""

    content: str
    finish_reason: str
    refusal: str
    has_reasoning: bool
    usage: Usage


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """An error in whichever shape it came. Status 0: there was no answer at all."""

    status: int
    message: str
    code: str = ""
    param: str = ""
    retry_after_s: float = 0.0


def first_parameters(settings: Settings) -> Parameters:
    """Return the parameters that the first request carries, before the server has said what it rejects."""
    tuning = {"reasoning_effort": settings.reasoning_effort, "temperature": settings.temperature}
    parameters: Parameters = {TOKEN_LIMITS[0]: settings.max_tokens, **tuning}
    return {name: value for name, value in parameters.items() if value is not None}


def build_request(model: str, prompt: str, parameters: Parameters, budget: int, image: bytes) -> bytes:
    """Return the JSON body of one chat completion: one user message, text first, then the base64 JPEG.

    Source: https://platform.openai.com/docs/api-reference/chat/create; `budget` multiplies the token limit.
    """
    limits = {name: parameters[name] * budget for name in TOKEN_LIMITS if name in parameters}
    url = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{IMAGE_MARK}"}}
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


def adapt_parameters(sent: Parameters, error: ErrorReply) -> Parameters | None:
    """Return the parameters without the one that the server rejects, None when that is not what the error says.

    The token limit is tried under its other name first, the reasoning effort with the cheapest value on offer.
    """
    said = f"{error.param} {error.message}"
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

    with contextlib.suppress(ValueError, TypeError):
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
        return min(max(0.0, seconds), LONGEST_RETRY_AFTER_S)
    return 0.0


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
    return ErrorReply(status, message, code, str(param or ""), retry_after_s)


def parse_reply(text: str) -> Reply | ErrorReply:
    """Return the answer that came under HTTP 200. Raises TryAgain when it was cut or holds no answer."""
    if text.lstrip()[:1] == "<":
        return ErrorReply(200, f"a web page came back ({parse_error(200, text).message})", "web_page")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise TryAgain("broken answer", "the answer is no whole JSON") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    failed = choice if isinstance(choice, dict) and choice.get("error") else body
    if (failed and isinstance(failed, list)) or (isinstance(failed, dict) and failed.get("error")):
        error = parse_error(500, json.dumps(failed))  # OpenRouter reports late errors so, with the status as code
        status = error.code.split(" ")[0]
        return dataclasses.replace(error, status=int(status) if re.fullmatch(r"[45]\d\d", status) else 500)
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise TryAgain("broken answer", "the answer holds no choices")
    return read_choice(choice, body.get("usage"))


def read_choice(choice: Mapping[str, Any], usage: Any) -> Reply:
    """Return the reply of a completion's first choice."""
    message = choice["message"]
    content = message.get("content")
    if isinstance(content, list):  # some servers answer in parts, as they are asked
        parts = [
            part for part in content if isinstance(part, dict) and part.get("type", "text") in {"text", "output_text"}
        ]
        content = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    usage = usage if isinstance(usage, dict) else {}
    counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
    details = usage.get("completion_tokens_details")
    reasoning = message.get("reasoning") or message.get("reasoning_content")  # Ollama, vLLM; LM Studio, llama.cpp
    return Reply(
        content=content if isinstance(content, str) else "",
        finish_reason=str(choice.get("finish_reason") or ""),
        refusal=str(message.get("refusal") or ""),
        has_reasoning=bool(reasoning or (isinstance(details, dict) and details.get("reasoning_tokens"))),
        usage=Usage(*(n if isinstance(n, int) and 0 <= n < 10**9 else 0 for n in counts)),
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
    if status == 400 and re.search(r"unsupported_(?:parameter|value)", error.code):
        return StopRun(f"the server rejects what is asked: {shown}")
    if error.retry_after_s > LONGEST_WAIT_S:
        back = now + timedelta(seconds=error.retry_after_s)
        return StopRun(f"the server asks to come back after {back.astimezone():%d %B %H:%M}: {shown}; run again then")
    if status in {0, 408, 409, 425, 429} or status >= 500:
        return TryAgain(f"HTTP {status}" if status else "no answer", error.message, error.retry_after_s)
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
    r"(?i)thinking process:|thought the user|the user (?:wants|asks|is asking)|we need to (?:write|caption|describe)"
    r"|(?:okay|ok|got it|alright)[,.] .{0,40}(?:the user|let['’]s)|let me (?:analy|think|look)"
)
TURN_END = r"<\|(?:eot_id|im_end|endoftext|end)\|>|<end_of_turn>|<eos>|</s>|\[/INST\]|<｜end▁of▁sentence｜>"
SPECIAL_TOKENS = r"<\|im_start\|>assistant|<\|\w+\|>|<s>|</?answer>"  # a template's own, <|begin_of_box|> too
FENCE = r"(?s)```[\w-]*\n(.*)\n```"
LINE_MARKS = r"(?m)^(?:#{1,6}|[-*•>]) "
QUOTED = r"(\"[^\"]{0,500}\"|“[^”“]{0,500}”)"
EMPHASIS = r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]{1,300})(?<=[^\s*])\1(?![\w*])"  # around words, not 5 * 3
ABOUT = r"(?:captions?|descriptions?|prompts?|tags|sentence)"
OPENING = (
    r"(?i)(?:(?:sure|certainly|of course|absolutely|okay|ok|great)\b[^\w\n]*\s*)?"
    rf"(?:(?:here(?:\s+is|\s+are|['’]s)|below is)\b[^:.\n]{{0,80}}?\b{ABOUT}\b[^:.\n]{{0,80}}(?::\s*|\n+)"
    rf"|(?:(?:image|photo|suggested|final|training)\s+)?{ABOUT}(?:\s*:\s*|\s*\n+))"
)
CLOSING = (
    r"(?is)(?<=[.!?\"”])\n(?:let me know|feel free|would you like|i hope|hope this"
    r"|if you(?:['’]d| would)? (?:like|want|need))\b.*\Z"
)
INVISIBLE = r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\ud800-\udfff]"  # controls, BOM, half characters
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


def clean_caption(content: str) -> str:
    """Return an answer as one trimmed line: without reasoning, fences, openings, markdown and invisible characters."""
    text = re.split(TURN_END, strip_reasoning(content), maxsplit=1)[0]
    text = re.sub(INVISIBLE, "", re.sub(SPECIAL_TOKENS, "", text))
    text = "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))
    if fenced := re.fullmatch(FENCE, text):
        text = fenced[1]
    text = re.sub(LINE_MARKS, "", text)
    for _ in range(3):  # an opening in quotes, quotes after an opening
        text = unquote(re.sub(CLOSING, "", text).strip())
        # what is quoted is copied from the image, asterisks and all
        parts = re.split(QUOTED, text)
        text = "".join(part if n % 2 else re.sub(EMPHASIS, r"\2", part) for n, part in enumerate(parts))
        if opening := re.match(OPENING, text):
            text = text[opening.end() :]
    return " ".join(text.split())


# What answers instead of captioning, by language. Tried at the start only, since a caption may quote any of these,
# and in lower case but for the first letter: a title may read "I Can't Believe It".
CANNOT = (
    r"(?:can(?:not|['’]?t| not)|couldn['’]?t|won['’]?t|will not|must (?:\w+ )?decline|(?:am|are) (?:not able|unable))"
)
POLITELY = (
    r"(?:(?:unfortunately|apologies|sorry|regrettably|thank you for [^,.]{0,40}"
    r"|i (?:appreciate|understand|aim)[^.]{0,80}?)"
    r"[,.!]? (?:but )?)?"
)
REFUSALS = (
    rf"{POLITELY}(?:i|I|we) {CANNOT}\b",
    rf"{POLITELY}(?:i|I|we)(?:['’](?:m|re)| am| are) (?:unable|not (?:able|allowed|comfortable|going))\b",
    rf"{POLITELY}(?:i|I) (?:apologi[sz]e|do not|don['’]t|(?:have|need) to (?:decline|pass))\b|sorry[.!]?$",
    r"(?:i|we)(?:['’](?:m|re)| am| are) (?:\w+ )?(?:sorry|afraid)(?=[,.!;:]|$| (?:but|i|I|that|about|for|to|we)\b)",
    r"i['’](?:d be happy to|ll have to (?:decline|pass))\b|i['’]m (?:just )?an? (?:\w+ )?(?:AI|model|assistant)\b",
    r"my (?:apologies|guidelines|policy|policies)\b|as an? (?:\w+ ){0,2}(?:ai|AI|(?:language|vision) model)\b",
    r"unable to (?:process|assist|help|describe|comply|fulfil)|your request was rejected|content removed",
    r"this (?:image|content|request) (?:may )?(?:violates?|goes against|contains explicit)|hello! [hH]ow can [iI]",
    r"(?:could you )?(?:please|kindly) (?:provide|upload|attach|share) ",
    r"you have(?:n['’]t| not) (?:provided|attached|uploaded)",
    r"(?:there (?:is|was) )?no image (?:was |is |has been )?(?:provided|attached|uploaded|detected|found)",
    r"(?:the image|it) (?:could not|couldn['’]t|cannot|can['’]t) be (?:loaded|processed|displayed|viewed)",
    r"there (?:does not|doesn['’]t) (?:appear|seem) to be an(?:y)? image",
    r"it (?:seems|looks like|appears)\b.{0,40}\b(?:no image|image (?:was|is|did) ?n)",
    r"(?:es )?tut mir (?:sehr )?leid\b|ich kann\b.{0,60}\bnicht\b|leider (?:kann|darf) ich\b|entschuldigung,",
    r"(?:je suis )?(?:vraiment )?désolée?\b|je ne (?:peux|suis|puis)\b|malheureusement,? je\b",
    r"lo (?:siento|lamento)\b|no puedo\b|lamentablemente,? no\b",
    r"sinto muito\b|desculpe\b|lamento,? mas\b|(?:infelizmente,? )?não posso\b",
    r"mi (?:dispiace|scuso)\b|(?:purtroppo,? )?non posso\b|het spijt me\b|(?:sorry,? )?ik kan\b.{0,60}\bniet\b",
    r"przykro mi\b|przepraszam\b|(?:niestety,? )?nie mogę\b|üzgünüm\b|maalesef\b",
    r"к сожалению\b|извините\b|простите\b|мне (?:очень )?жаль\b|я не могу\b",
    r"(?:很|非常|十分)?(?:抱歉|对不起|對不起)|我?(?:无法|無法)(?:识别|描述|处理|協助|协助)|我(?:无法|無法|不能|没办法)",
    r"作为一个?.{0,6}(?:AI|模型|助手)",
    r"عذر|آسف|لا (?:أستطيع|يمكنني)|क्षमा करें|माफ़|मुझे खेद|xin lỗi|tôi không thể|ขออภัย|ขอโทษ",
    r"maaf,|saya tidak (?:bisa|dapat)\b",
    r"omlouvám se|je mi líto|nemohu\b|(?:jag är )?ledsen,|tyvärr\b|jag kan inte\b",
    r"申し訳|すみません|ごめんなさい|죄송|미안",
)
REFUSAL = "|".join(f"(?:{pattern})" for pattern in REFUSALS)
ERROR_TEXT = (
    r"(?i)\W*(?:(?:\w*error|exception)(?: code)?(?: \d+)?\s*[:\]]|traceback \(|an? (?:\w+ )?error (?:has )?occurred"
    r"|(?:http )?(?:\d{3} )?(?:internal server error|bad gateway|service unavailable|gateway time-?out)"
    r"|error (?:processing|generating|loading) |cuda error|failed to (?:load|process) |request timed out"
    r"|oops\b.{0,20}went wrong|upstream connect error|\[object object\]|too many requests"
    r"|rate limit (?:exceeded|reached))|\{\s*[\"']"
)
WEB_PAGE = r"(?is)(?:<!--.*?-->\s*)?<(?:!doctype|html|head|body|title|center|h1|\?xml)\b|<\?xml"
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
    return bool(re.search(r"(\S{1,20}?)\1{29,}\W*$", text[-700:]))  # scripts without spaces


def judge_reply(reply: Reply) -> str:
    """Return the caption that an answer holds, one clean line; raises FailImage when it is none."""
    if len(reply.content) > LONGEST_TEXT:
        raise FailImage("looping", f"an answer of {len(reply.content):,} characters; take another model")
    text = clean_caption(reply.content)
    by_hand = "caption it by hand or with another model"
    if reply.refusal or re.search(FILTERED, reply.finish_reason) or re.match(REFUSAL, text[:1].lower() + text[1:]):
        said = shorten(reply.refusal or text or "filtered by the server", 120).rstrip(".")
        raise FailImage("refused", f"{said}; {by_hand}")
    if is_looping(text):
        raise FailImage("looping", f"…{shorten(text[-60:])}; try GETCAP_TEMPERATURE=0.7 or another model")
    if re.search(CUT_OFF, reply.finish_reason):
        raise CutOff("cut off", "")
    if re.search(BROKEN_OFF, reply.finish_reason):
        raise TryAgain("broken answer", f"the server broke off ({shorten(reply.finish_reason, 40)})")
    if re.match(WEB_PAGE, text) or re.match(ERROR_TEXT, text):
        raise FailImage("error text", f"{shorten(text, 120)}; look at the server", by_server=True)
    if re.match(THOUGHTS, text):
        raise FailImage("reasoning only", "set GETCAP_REASONING_EFFORT=none, or take another model")
    if not any(c.isalnum() for c in text) or text.lower() in {"null", "none", "n/a", "undefined"}:
        if reply.has_reasoning or re.search(THINKING, reply.content) or "<|channel|>" in reply.content:
            raise FailImage("reasoning only", "set GETCAP_REASONING_EFFORT=none, or raise GETCAP_MAX_TOKENS")
        raise FailImage("empty", f"the answer holds no words; run again, or {by_hand}")
    return text


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

    async def sleep(self, seconds: float) -> None:
        """Wait; raises StopRun as soon as the run ends."""
        import asyncio

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        self.check()


class Throttle:
    """The shared pace of all workers: at most `rate` requests a second, evenly spaced, no burst at the start."""

    def __init__(self, rate: float | None, stop: Stop) -> None:
        self._interval_s = 1 / rate if rate else 0.0
        self._next = 0.0
        self._stop = stop

    async def turn(self) -> None:
        """Wait until the caller may send one request; raises StopRun when the run ends first."""
        self._stop.check()
        if self._interval_s:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + self._interval_s
            if mine > now:
                await self._stop.sleep(mine - now)


# ----------------------------------------------------------------------------------------------------- Ask


def open_client(settings: Settings) -> AsyncOpenAI:
    """Return the SDK's client, with its own retries off: there is one layer of them, ours."""
    from openai import AsyncOpenAI, DefaultAioHttpClient, Timeout

    return AsyncOpenAI(
        api_key=settings.api_key or "none",
        base_url=settings.base_url,
        max_retries=0,
        timeout=Timeout(settings.timeout, connect=min(15.0, settings.timeout)),
        http_client=DefaultAioHttpClient(follow_redirects=False),  # twice as fast as the other; benchmarks/README.md
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


class Asker:
    """Asks for captions, for all workers: retries, and what one answer taught about the server counts for all."""

    def __init__(self, client: AsyncOpenAI, settings: Settings, recipe: Recipe, stop: Stop) -> None:
        import asyncio

        from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

        self.usage = Usage()
        self._client = client
        self._settings = settings
        self._prompt = recipe.prompt
        self._stop = stop
        self._throttle = Throttle(settings.throttle_submission_rate, stop)
        self._parameters = first_parameters(settings)
        self._proven = False  # whether the server has answered: key, model and address are right then
        self._first = asyncio.Lock()
        self._attempt_often = AsyncRetrying(
            retry=retry_if_exception_type(TryAgain),
            wait=self._wait_s,
            stop=stop_after_attempt(settings.throttle_retries + 1),
            sleep=stop.sleep,
            before_sleep=self._log_wait,
            reraise=True,
        ).wraps(self._attempt)

    async def ask(self, path: str, image: bytes) -> str:
        """Return the caption of a base64 JPEG; raises FailImage or StopRun. `path` is for messages.

        Until the server has answered once, one image at a time is asked: what is wrong for all costs one request.
        """
        if not self._proven:
            async with self._first:
                if not self._proven:
                    return await self._ask(path, image)
        return await self._ask(path, image)

    async def _ask(self, path: str, image: bytes) -> str:
        for budget in (1, 2):
            with contextlib.suppress(CutOff):
                return await self._attempt_often(path, image, budget)
        tokens = self._settings.max_tokens
        raise FailImage("cut off", f"also with {2 * tokens} tokens; set GETCAP_MAX_TOKENS={4 * tokens} or ask for less")

    async def _attempt(self, path: str, image: bytes, budget: int) -> str:
        """Ask once; once more for each parameter that the server rejects, of which there are only so many."""
        while True:
            sent = self._parameters
            await self._throttle.turn()
            log.debug("%s: asking, %d KB", printable(path), len(image) // 1000)
            body = build_request(self._settings.model, self._prompt, sent, budget, image)
            answer = self._without_key(await self._post(body))
            if isinstance(answer, Reply):
                self._proven = True
                self.usage += answer.usage
                return judge_reply(answer)
            changed = adapt_parameters(sent, answer)
            if changed is None:
                raise judge_error(answer, datetime.now(UTC), first=not self._proven)
            if self._parameters is sent:  # else another worker has learnt it meanwhile
                self._parameters = changed
                self._log_change(sent, changed, answer.message)

    async def _post(self, body: bytes) -> Reply | ErrorReply:
        """Send one request and return what came back, in whichever shape; raises TryAgain on a torn answer."""
        import asyncio

        import aiohttp
        import openai

        try:
            async with asyncio.timeout(self._settings.timeout):  # the SDK's counts each read anew
                response = await self._client.post(
                    "/chat/completions", cast_to=openai.HttpxBinaryResponseContent, content=body
                )
                return parse_reply(
                    response.content.decode("utf-8-sig", "replace")
                )  # JSON is UTF-8, whatever a header says
        except openai.APIStatusError as error:
            wait_s = parse_retry_after(error.response.headers, datetime.now(UTC))
            return parse_error(error.status_code, error.response.content.decode("utf-8-sig", "replace"), wait_s)
        except (openai.APIConnectionError, aiohttp.ClientError) as error:  # the SDK passes on some of the latter
            return describe_broken_connection(error, self._settings.host)
        except TimeoutError:
            return ErrorReply(0, f"no answer within {self._settings.timeout:g} s (GETCAP_TIMEOUT)")
        except (ValueError, TypeError) as error:  # an address or header that cannot be sent
            return ErrorReply(0, f"cannot ask {self._settings.host}: {shorten(str(error), 120)}", "unreachable")

    def _without_key(self, answer: Reply | ErrorReply) -> Reply | ErrorReply:
        """Return an answer without the key, which some servers repeat in their errors."""
        key = self._settings.api_key
        if len(key) < 6 or key.isalpha():  # "ollama" is no secret, and a word of captions
            return answer
        texts = {f.name: value for f in dataclasses.fields(answer) if isinstance(value := getattr(answer, f.name), str)}
        hidden: dict[str, Any] = {name: value.replace(key, "[key]") for name, value in texts.items()}
        return dataclasses.replace(answer, **hidden)

    def _wait_s(self, state: RetryCallState) -> float:
        import random

        error = state.outcome.exception() if state.outcome else None
        asked_s = error.retry_after_s if isinstance(error, TryAgain) else 0.0
        return backoff_s(state.attempt_number, self._settings.throttle_backoff_factor, asked_s, random.random())

    def _log_wait(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait_s, retries = state.upcoming_sleep, self._settings.throttle_retries
        path = printable(state.args[0])
        log.warning("%s: %s; retry %d of %d in %.1f s", path, error, state.attempt_number, retries, wait_s)

    def _log_change(self, sent: Parameters, changed: Parameters, message: str) -> None:
        before = ", ".join(f"{name}={value}" for name, value in sent.items() if changed.get(name) != value)
        after = ", ".join(f"{name}={value}" for name, value in changed.items() if sent.get(name) != value)
        log.warning("the server rejects %s; sending %s from now on: %s", before, after or "without it", message)


# --------------------------------------------------------------------------------------------------- Files

LARGEST_FILE = 256 * 1024 * 1024
TEMPORARY = ".gc-"  # trainers pass over names that begin with a dot
ONE_FILE = {errno.ENAMETOOLONG, errno.EPERM, errno.EISDIR}  # what is wrong with one caption's place, not with all


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


async def read_image(path: str) -> bytes:
    """Return an image file's bytes; raises FailImage."""
    import aiofiles

    try:
        async with aiofiles.open(path, "rb", opener=open_regular) as file:
            return await file.read()
    except OSError as error:
        raise FailImage("unreadable file", str(error.strerror)) from error


def is_abandoned(name: str, modified: float, now: float) -> bool:
    """Return whether a temporary file was left by a run that died: each lives for milliseconds."""
    owner = re.fullmatch(rf"{re.escape(TEMPORARY)}(\d+)-\w+", name)
    if owner is None:
        return False
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


def prepare_folder(folder: str) -> str:
    """Make a caption folder ready: it exists, can be written to, and holds no temporary file of a dead run.

    Returns what is in the way, blank when nothing is: known before anything is paid for that could not be kept.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        names = os.listdir(folder)
    except OSError as error:
        return error.strerror or str(error)
    for name in names:
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):  # another run may be quicker to clean up
            if name.startswith(TEMPORARY) and is_abandoned(name, os.lstat(path).st_mtime, time.time()):
                os.unlink(path)
    return "" if os.access(folder, os.W_OK | os.X_OK) else "may not be written to"


def has_caption(path: str) -> bool:
    """Return whether a caption stands there, blank ones and none at all aside; one that cannot be read counts."""
    try:
        return has_text(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True


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


def write_caption(path: str, text: str) -> bool:
    """Write a caption whole or not at all: one line, UTF-8, ending in a newline. False when one stands there by now.

    Raises OSError. The name is taken only when the bytes are on the disk; permissions are what the umask gives,
    so that a trainer of another user can read it.
    """
    temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        return put_in_place(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


# ---------------------------------------------------------------------------------------------------- Pool


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
    """What became of each image: owns the counts, the summary and the exit code."""

    def __init__(self, started: float, stream: IO[str] | None = None) -> None:
        self.written = 0
        self.skipped: Counter[str] = Counter()
        self.failed: list[Failed] = []
        self.recorded = 0
        self.left = 0  # images that --limit or an early end leaves for the next run
        self.usage = Usage()
        self.ended_by: StopRun | signal.Signals | None = None
        self._in_a_row: deque[str] = deque(maxlen=MOST_FAILURES_IN_A_ROW)  # reasons
        self._started = started
        self._stream = stream

    def record(self, outcome: Outcome) -> None:
        """Count one outcome, and write it to the report file; what failed is said at once, with what to do about it."""
        self.recorded += 1
        if isinstance(outcome, Skipped):
            self.skipped[outcome.reason] += 1
            return
        if isinstance(outcome, Written):
            self.written += 1
            self._in_a_row.clear()
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
        return 3 if self.ended_by else int(bool(self.failed))

    def tally(self, seconds: float) -> str:
        """Return the counts as one line."""
        reasons = Counter(failure.reason for failure in self.failed)
        parts = [f"Captioned {self.written:,}"]
        for word, counts in (("skipped", self.skipped), ("failed", reasons)):
            listed = ", ".join(f"{reason} {n:,}" for reason, n in counts.most_common())
            parts.append(f"{word} {counts.total():,}" + (f" ({listed})" if listed else ""))
        if self.left:
            parts.append(f"left for the next run {self.left:,}")
        rate = self.written / seconds if seconds else 0.0
        tokens = f"{self.usage.prompt:,} tokens in, {self.usage.answer:,} out"
        return f"{', '.join(parts)}; {tokens}; {seconds:.1f} s, {rate:.1f} a second"

    def summary(self, now: float) -> str:
        """Return the summary: a line for each failure, by reason, and the tally."""
        failures = sorted(self.failed, key=lambda failure: (failure.reason, failure.path))
        lines = [f"{printable(failure.path)}: {failure.reason}" for failure in failures]
        if self.ended_by is not None:
            lines.append("Ended early; the same command goes on where it was.")
        return "\n".join([*lines, self.tally(now - self._started)])

    def close(self, now: float) -> None:
        """Write the last line of the report file."""
        summary: dict[str, Any] = {"outcome": "summary", "captioned": self.written, "skipped": dict(self.skipped)}
        summary |= {"failed": Counter(failure.reason for failure in self.failed), "left": self.left}
        summary |= {"prompt_tokens": self.usage.prompt, "answer_tokens": self.usage.answer}
        stopped = getattr(self.ended_by, "name", None) or (str(self.ended_by) if self.ended_by else None)
        summary |= {"seconds": round(now - self._started, 3), "stopped": stopped, "exit_code": self.exit_code}
        self._write_line(summary)

    def _write_line(self, item: Outcome | dict[str, Any]) -> None:
        if self._stream is None:
            return
        if isinstance(item, Written):
            item = {"outcome": "captioned", "image": item.job.image, "file": item.job.caption, "caption": item.text}
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
def show_progress(total: int, report: Report, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show how far the run is: a bar on a terminal, a line every 30 s or 5 % elsewhere; yields what counts one more."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    bar = tqdm(total=total, unit="image", file=sys.stderr, disable=quiet or None, dynamic_ncols=True)
    failed_before = len(report.failed)
    done, started, said_at = 0, time.monotonic(), time.monotonic()

    def update() -> None:
        nonlocal done, said_at
        done += 1
        failed, tokens = len(report.failed) - failed_before, f"{report.usage.prompt + report.usage.answer:,}"
        bar.set_postfix(failed=failed, tokens=tokens, refresh=False)
        bar.update(1)
        now = time.monotonic()
        if bar.disable and (20 * done // total > 20 * (done - 1) // total or now - said_at >= 30):
            said_at, rate = now, done / max(now - started, 1e-9)
            left = timedelta(seconds=round((total - done) / rate))
            log.info("%d of %d, %d failed, %.1f a second, %s left, %s tokens", done, total, failed, rate, left, tokens)

    with bar, logging_redirect_tqdm([log]) if not bar.disable else contextlib.nullcontext():
        yield update


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


class Captioner:
    """Takes one job from image file to caption file."""

    def __init__(self, settings: Settings, asker: Asker, report: Report, update: Callable[[], None]) -> None:
        import asyncio

        self._settings = settings
        self._asker = asker
        self._report = report
        self._update = update
        # no more images are decoded at once than there are processors: memory would grow, speed would not
        load_pillow()
        self._decoders = asyncio.Semaphore(os.cpu_count() or 1)

    async def handle(self, job: Job) -> None:
        """Caption one image, record the outcome; raises StopRun when the run cannot go on."""
        try:
            outcome = await self._caption(job)
        except FailImage as error:
            later = "; run again later" if isinstance(error, TryAgain) else ""
            outcome = Failed(job.image, error.reason, error.detail + later, error.by_server)
        except StopRun:
            raise
        except Exception as error:  # a fault of this program must not end the run either
            log.debug("%s: unexpected", printable(job.image), exc_info=True)
            detail = f"{type(error).__name__}: {shorten(str(error))}; please report it (-v)"
            outcome = Failed(job.image, "unexpected", detail, by_server=True)
        finally:
            self._report.usage = self._asker.usage
        self._report.record(outcome)
        self._update()
        if reason := self._report.same_failure:
            raise StopRun(
                f"{MOST_FAILURES_IN_A_ROW} images in a row ended in {reason}; look at the server, then run again"
            )

    async def _caption(self, job: Job) -> Outcome:
        import asyncio

        if has_caption(job.caption):
            return Skipped(job.image, "has a caption by now")
        async with self._decoders:
            data = await read_image(job.image)
            image = await asyncio.to_thread(self._encode, data)
            del data
        text = await self._asker.ask(job.image, image)
        try:
            written = await asyncio.to_thread(write_caption, job.caption, text)
        except OSError as error:
            problem = f"{error.strerror}; the answer was: {text}"
            if error.errno in ONE_FILE:
                raise FailImage("not written", problem) from error
            log.error("%s: not written: %s", printable(job.caption), problem)  # noqa: TRY400
            folder = printable(os.path.dirname(job.caption))
            raise StopRun(f"{folder}: captions cannot be written: {error.strerror}; run again after that") from error
        log.debug("%s: %s", printable(job.image), text)
        return Written(job, text) if written else Skipped(job.image, "has a caption by now")

    def _encode(self, data: bytes) -> bytes:
        return base64.b64encode(prepare_image(data, self._settings.max_side))


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


async def caption_images(settings: Settings, recipe: Recipe, jobs: Sequence[Job], report: Report) -> None:
    """Caption the images of a plan; the report has the outcomes, and why the run ended early if it did."""
    stop = Stop()
    before = report.recorded
    with show_progress(len(jobs), report, quiet=log.level > logging.INFO) as update, end_on_signals(stop):
        try:
            async with open_client(settings) as client:
                asker = Asker(client, settings, recipe, stop)
                captioner = Captioner(settings, asker, report, update)
                await run_pool(iter(jobs), captioner.handle, settings.thread_pool, stop)
        except (OSError, ValueError, ImportError) as error:  # the connection's own settings
            detail = f"{type(error).__name__}: {shorten(str(error), 120)}"
            stop.set(StopRun(f"no connection can be set up: {detail}; check HTTPS_PROXY and SSL_CERT_FILE"))
        finally:
            report.ended_by = stop.cause
            report.left += len(jobs) - (report.recorded - before)


def plan_run(settings: Settings, image_dir: Path, report: Report) -> list[Job]:
    """Return the jobs of a run, at most --limit; what is skipped or cannot be captioned goes into the report."""
    jobs: list[Job] = []
    for item in plan_folder(image_dir, settings.caption_dir, settings.caption_ext):
        if not isinstance(item, Job):
            report.record(item)
        elif settings.limit is None or len(jobs) < settings.limit:
            jobs.append(item)
        else:
            report.left += 1
    return jobs


def prepare_folders(jobs: list[Job], report: Report) -> list[Job]:
    """Make all caption folders ready and return the jobs whose captions can be kept; the report has the others."""
    folders = sorted({os.path.dirname(job.caption) for job in jobs})
    problems = {folder: problem for folder in folders if (problem := prepare_folder(folder))}
    if len(problems) == len(folders):
        report.left += len(jobs)
        report.ended_by = StopRun(f"{printable(folders[0])}: captions cannot be kept there: {problems[folders[0]]}")
        log.error("%s", report.ended_by)
        return []
    for job in jobs:
        folder = os.path.dirname(job.caption)
        if folder in problems:
            report.record(Failed(job.image, "caption folder", f"{printable(folder)}: {problems[folder]}"))
    return [job for job in jobs if os.path.dirname(job.caption) not in problems]


def run_captions(settings: Settings, image_dir: Path, recipe: Recipe, report: Report) -> None:
    """Caption what has no caption yet."""
    log_recipe(settings, recipe)
    jobs = plan_run(settings, image_dir, report)
    if not jobs:
        log.info("nothing to caption below %s", printable(str(image_dir)))
        return
    jobs = prepare_folders(jobs, report)
    if not jobs:
        return
    pool = settings.thread_pool
    log.info("to caption: %d, with %s at %s, workers: %d", len(jobs), settings.model, settings.host, pool)
    import asyncio

    with contextlib.suppress(asyncio.CancelledError):  # the second Ctrl-C
        asyncio.run(caption_images(settings, recipe, jobs, report))


def log_recipe(settings: Settings, recipe: Recipe) -> None:
    """Say once what is worth knowing about the settings before anything is sent."""
    if settings.config_dir and not settings.config_dir.exists():
        log.info("%s: does not exist; nothing is read from it", printable(str(settings.config_dir)))
    log.info("prompt: %s", recipe.source)
    log.debug("prompt: %s", shorten(recipe.prompt, 10_000))
    if settings.base_url.startswith("http://") and not is_this_machine(settings.base_url):
        log.warning("OPENAI_BASE_URL is plain http: the key and the images can be read on the way to %s", settings.host)


def show_plan(settings: Settings) -> int:
    """Print what a run would do, one image a line, and return the exit code; open no connection, write nothing."""
    if settings.report:
        raise SettingsError("--report: tells what a run did; --dry-run prints what it would do, and writes nothing")
    image_dir = check_folders(settings)
    log_recipe(settings, read_recipe(settings))
    counts = dict.fromkeys(("to caption", "skipped", "left by --limit", "cannot be captioned"), 0)
    for item in plan_folder(image_dir, settings.caption_dir, settings.caption_ext):
        match item:
            case Job(path, caption):
                kind = "to caption" if counts["to caption"] < (settings.limit or math.inf) else "left by --limit"
                said = f"{kind} -> {printable(caption)}"
            case Skipped(path, reason):
                kind, said = "skipped", f"skipped: {reason}"
            case Failed(path, reason, detail):
                kind, said = "cannot be captioned", f"{reason}: {detail}"
        counts[kind] += 1
        print(f"{printable(path)}: {said}")
    print(", ".join(f"{kind} {number:,}" for kind, number in counts.items()).capitalize())
    return int(counts["cannot be captioned"] > 0)


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


def run(settings: Settings) -> int:
    """Carry out what the settings ask for and return the exit code."""
    if settings.fix_encoding:
        raise SettingsError("--fix-encoding: not yet; it comes with a later version")
    if settings.dry_run:
        return show_plan(settings)
    image_dir = check_folders(settings)
    check_key(settings)
    recipe = read_recipe(settings)
    with open_report(settings.report) as stream:
        report = Report(time.monotonic(), stream)
        try:
            run_captions(settings, image_dir, recipe, report)
        except KeyboardInterrupt as error:  # while the plan is made; later ones are waited out
            report.ended_by = signal.Signals(*error.args or (signal.SIGINT,))
        now = time.monotonic()
        report.close(now)
        with contextlib.suppress(OSError):
            print(report.summary(now), file=sys.stderr)
    return report.exit_code


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
