#!/usr/bin/env python3
"""Speed and memory of gen-captions.py, each figure beside an ideal or a baseline of the same run.

    python benchmarks/bench.py [throughput] [photos] [export] [done] [help] [fix] [pace]

Linux only (it reads the kernel's account of each finished process). The server is tests/vision_server.py on the same
processors, so ratios count, not absolute figures.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TOOL = [sys.executable, str(ROOT / "gen-captions.py")]
FLOOR = [sys.executable, str(ROOT / "benchmarks" / "sdk_floor.py")]


@dataclass
class Cost:
    """What one finished process took."""

    wall_s: float
    cpu_s: float
    peak_mib: float
    exit_code: int


# A small process in between: a child's peak counts what its parent held when it was started.
LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
wall = time.perf_counter() - started
print(json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, child.returncode]))
"""


def measure(command: list[str], **environment: str) -> Cost:
    """Run a command to its end."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command],
        env={**os.environ, "OPENAI_API_KEY": "none", **environment},
        stdout=subprocess.PIPE,
        cwd=tempfile.gettempdir(),
        check=True,
    )
    return Cost(*json.loads(done.stdout))


def median(run: Callable[[], Cost], times: int = 5) -> Cost:
    """Return the run with the median wall time."""
    return sorted((run() for _ in range(times)), key=lambda cost: cost.wall_s)[times // 2]


class Server:
    """tests/vision_server.py, images not decoded."""

    def __init__(self, latency: float) -> None:
        command = [sys.executable, str(ROOT / "tests" / "vision_server.py"), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        self.latency = latency

    def __enter__(self) -> Server:
        self.reset()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def put(self, address: str, **fields: Any) -> None:
        """Send a request to one of the server's own addresses."""
        url = self.url.removesuffix("/v1") + address
        urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(fields).encode(), method="PUT")
        ).close()

    def reset(self, **script: Any) -> None:
        """Count from zero."""
        self.put("/script", **{"latency": self.latency, "check": False, **script})

    def stats(self) -> dict[str, Any]:
        """Return what was seen since then."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/stats") as response:
            return dict(json.load(response))

    def cpu_s(self) -> float:
        """Return the CPU seconds that the server has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rate(self) -> float:
        """Return the requests a second between the first and the last tenth of them, so that start-up is left out."""
        arrivals: list[float] = self.stats()["arrivals"]
        first, last = len(arrivals) // 10, len(arrivals) * 9 // 10
        return (last - first) / (arrivals[last] - arrivals[first])


def jpeg(size: tuple[int, int], quality: int) -> bytes:
    """Return a photo-like JPEG: smooth shapes and grain."""
    noise = Image.effect_noise((size[0] // 4, size[1] // 4), 60).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = Image.effect_noise(size, 18)
    output = io.BytesIO()
    Image.merge("RGB", (noise, Image.blend(noise, grain, 0.5), grain)).save(
        output, "JPEG", quality=quality
    )
    return output.getvalue()


def fill(folder: Path, number: int, data: bytes) -> Path:
    """Return a folder of that many copies, each with a number behind its end, so that none is a twin."""
    folder.mkdir(parents=True)
    for index in range(number):
        (folder / f"{index:06}.jpg").write_bytes(data + b"%06d" % index)
    return folder


def throughput(folder: Path) -> dict[str, Any]:
    """3,000 images of 60 KB that go out as they are, 200 workers, 200 ms an answer; three floors in alternating rounds.

    The tool writes into a new folder each time: ext4 is slow to make files where many were deleted just before.
    """
    number, workers, latency = 3000, 200, 0.2
    data = jpeg((512, 384), 78)
    images, one = fill(folder / "images", number, data), fill(folder / "one", 1, data)
    floors = {"SDK": "default", "SDK on aiohttp": "aiohttp", "aiohttp": "raw"}
    commands = {name: [*FLOOR, way, str(workers)] for name, way in floors.items()}
    commands["tool"] = [*TOOL, "--thread-pool", str(workers), "--caption-dir", "OUT", "--image-dir"]
    rounds: list[dict[str, tuple[float, float]]] = []
    with Server(latency) as server:
        for _ in range(3):
            rounds.append({})
            for name, command in commands.items():
                costs = []
                for source in (one, images):
                    server.reset()
                    out = tempfile.mkdtemp(dir=folder)
                    words = [out if word == "OUT" else word for word in command]
                    costs.append(measure([*words, str(source)], OPENAI_BASE_URL=server.url))
                    assert costs[-1].exit_code == 0
                start_up, cost = costs
                rate = (number - 1) / (cost.wall_s - start_up.wall_s)
                rounds[-1][name] = rate, 1000 * (cost.cpu_s - start_up.cpu_s) / (number - 1)

    found: dict[str, Any] = {"ideal images/s": workers / latency}
    for which, unit in enumerate(("images/s", "CPU ms/image")):
        for name in commands:
            found[f"{name}: {unit}"] = round(
                statistics.median(costs[name][which] for costs in rounds), 2
            )
        for name in (
            floors
        ):  # each round's own ratio: what else the machine does changes from round to round
            ratios = (costs["tool"][which] / costs[name][which] for costs in rounds)
            found[f"tool / {name}: {unit}"] = round(statistics.median(ratios), 2)
    return found


# What the tool does with the pixels of a photo, by itself.
PILLOW = """
import io, sys, time
from PIL import Image
with open(sys.argv[1], "rb") as file:
    data = file.read()
before, started = time.process_time(), time.perf_counter()
for _ in range(number := int(sys.argv[2])):
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // 4, image.height // 4))
    image.thumbnail((1024, 1024), Image.Resampling.LANCZOS, reducing_gap=1.5)
    image.save(io.BytesIO(), "JPEG", quality=90)
print(number / (time.perf_counter() - started), (time.process_time() - before) / number)
"""


def pillow_alone(photo: Path) -> tuple[float, float]:
    """Return the photos a second that Pillow makes ready on all processors at once, and its CPU seconds for one."""
    command = [sys.executable, "-c", PILLOW, str(photo), "40"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(os.cpu_count() or 1)
    ]
    found = [[float(word) for word in process.communicate()[0].split()] for process in running]
    return sum(rate for rate, _ in found), statistics.mean(cpu_s for _, cpu_s in found)


def photos(folder: Path) -> dict[str, Any]:
    """200 photos of a phone's and of a camera's size, 50 workers; the rate beside Pillow's own, median of 3."""
    return {
        f"{width} x {height}": photos_of(folder, (width, height))
        for width, height in ((4032, 3024), (6000, 4000))
    }


def photos_of(folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Return the figures for one size; Pillow alone is measured before and after each run of the tool."""
    number, data = 200, jpeg(size, 80)
    images = fill(folder / f"{size[0]}", number, data)
    one = fill(folder / f"{size[0]}-one", 1, data)
    command = [*TOOL, "--thread-pool", "50", "--caption-dir", str(folder / "out"), "--image-dir"]
    shares, rates, cpu_s, costs = [], [], [], []
    with Server(0.2) as server:
        server.reset(check=True)
        start_up = measure([*command, str(one)], OPENAI_BASE_URL=server.url)
        sent = server.stats()["images"][0]
        before = pillow_alone(one / "000000.jpg")
        for _ in range(3):
            shutil.rmtree(folder / "out", ignore_errors=True)
            server.reset()
            served = server.cpu_s()
            cost = measure([*command, str(images)], OPENAI_BASE_URL=server.url)
            assert cost.exit_code == 0
            served = server.cpu_s() - served
            after = pillow_alone(one / "000000.jpg")
            rates.append(server.rate())
            shares.append(2 * rates[-1] / (before[0] + after[0]))
            cpu_s.append(
                (
                    (before[1] + after[1]) / 2,
                    (cost.cpu_s - start_up.cpu_s) / number,
                    served / number,
                )
            )
            costs.append(cost)
            before = after
    pillow, tool, stand_in = (
        round(1000 * statistics.median(figures), 1) for figures in zip(*cpu_s, strict=True)
    )
    shutil.rmtree(folder / "out")
    return {
        "original KB": len(data) // 1000,
        "sent KB": sent[3] // 1000,
        "sent size": sent[1:3],
        "peak MiB": round(max(cost.peak_mib for cost in costs)),
        "images/s": round(statistics.median(rates), 1),
        "images/s / Pillow on all processors": round(statistics.median(shares), 2),
        "Pillow CPU ms/image": pillow,
        "tool CPU ms/image": tool,
        "server CPU ms/image": stand_in,
    }


def export(folder: Path) -> dict[str, Any]:
    """--batch-export: 200 photos beside Pillow alone, median of 3; memory with 100 and with 10,000 small images."""
    photo = jpeg((4032, 3024), 80)
    images, one = fill(folder / "images", 200, photo), fill(folder / "one", 1, photo)
    shares, rates = [], []
    command = [*TOOL, "--batch-export", str(folder / "out"), "--image-dir"]

    def run(source: Path) -> Cost:
        shutil.rmtree(folder / "out", ignore_errors=True)
        cost = measure([*command, str(source)])
        assert cost.exit_code == 0
        return cost

    start_up = run(one)
    before = pillow_alone(one / "000000.jpg")
    for _ in range(3):
        rates.append(199 / (run(images).wall_s - start_up.wall_s))
        after = pillow_alone(one / "000000.jpg")
        shares.append(2 * rates[-1] / (before[0] + after[0]))
        before = after
    small = jpeg((512, 384), 78)
    few, many = run(fill(folder / "few", 100, small)), run(fill(folder / "many", 10_000, small))
    return {
        "images/s": round(statistics.median(rates), 1),
        "images/s / Pillow on all processors": round(statistics.median(shares), 2),
        "small images/s": round(9900 / (many.wall_s - few.wall_s)),
        "peak MiB of 10,000": round(many.peak_mib),
        "peak MiB of 100": round(few.peak_mib),
    }


def done(folder: Path) -> dict[str, Any]:
    """100,000 images that all have captions, beside one scandir pass."""
    images = folder / "images"
    images.mkdir()
    for index in range(100_000):
        (images / f"{index:06}.jpg").touch()
        (images / f"{index:06}.txt").write_text(
            "A grey cat sits on a blue mat in front of a window. " * 6, encoding="utf-8"
        )
    tool = median(lambda: measure([*TOOL, "--image-dir", str(images)]))
    code = f"import os; print(sum(e.is_file() for e in os.scandir({str(images)!r})))"
    scan = median(lambda: measure([sys.executable, "-c", code]))
    few = folder / "few"
    few.mkdir()
    empty = measure([*TOOL, "--image-dir", str(few)])
    return {
        "tool s": round(tool.wall_s, 2),
        "scandir s": round(scan.wall_s, 2),
        "tool peak MiB": round(tool.peak_mib),
        "tool peak MiB with no images": round(empty.peak_mib),
    }


def help(_folder: Path) -> dict[str, Any]:
    """--help beside an empty program with the same two imports."""
    shown = median(lambda: measure([*TOOL, "--help"]), 15)
    empty = median(lambda: measure([sys.executable, "-c", "import argparse, asyncio"]), 15)
    return {
        "--help ms": round(1000 * shown.wall_s),
        "import argparse, asyncio ms": round(1000 * empty.wall_s),
    }


REFUSED = {"status": 429, "headers": {"Retry-After": "1"}, "body": {"error": {"message": "no"}}}
PACES: dict[str, tuple[int, dict[str, Any]]] = {  # workers, what the server does
    "a": (100, {"requests_per_minute": 3000}),
    "b": (100, {"requests_per_minute": 6000, "tokens_per_minute": 3_660_000}),
    "c": (100, {"requests_per_minute": 3000}),
    "d": (100, {"faults": 0.2}),
    "e": (20, {"faults": 0.1, "fault": REFUSED}),
}


def pace(folder: Path) -> dict[str, Any]:
    """1,000 images, limits that the tool is not told of: lost images, refused requests, the rate.

    100 workers: (a) 3,000 requests a minute; (b) 3,660,000 tokens a minute, which bind first at
    50 requests a second; (c) 3,000 requests, halved after 6 s and whole again after 14 s; (d) no
    limit, every fifth request fails in one of seven ways. 20 workers: (e) no limit, one request
    in ten is refused at random and asks to wait a second.
    """
    images = fill(folder / "images", 1000, jpeg((64, 48), 60))
    found: dict[str, Any] = {}
    for name, (workers, script) in PACES.items():
        out = folder / f"out-{name}"
        command = [*TOOL, "--thread-pool", str(workers), "--caption-dir", str(out)]
        with Server(0.2) as server:
            server.reset(**script)
            changes = []
            if name == "c":
                for after_s, limit in ((6, 1500), (14, 3000)):
                    put = threading.Timer(after_s, server.put, ["/limits"], {"requests": limit})
                    changes.append(put)
            for change in changes:
                change.start()
            measure([*command, "--image-dir", str(images)], OPENAI_BASE_URL=server.url)
            stats, rate = server.stats(), server.rate()
        took = stats["arrivals"][-1]  # since the server began to count
        good = len(list(out.glob("*.txt")))
        figures: dict[str, Any] = {"lost": 1000 - good, "s": round(took, 1)}
        figures["refused"] = stats["statuses"].get("429", 0)
        if name in "abc":  # the server begins with a second's worth
            allowed = 50 + 50 * took - (25 * 8 if name == "c" else 0)
            figures["share of the allowed rate"] = round(1000 / allowed, 3)
        if name == "e":
            answered = rate * good / len(stats["arrivals"])
            figures["share of the full rate"] = round(answered / (workers / 0.2), 2)
            figures["with the last images' waits"] = round(good / took / (workers / 0.2), 2)
        found[name] = figures
    return found


PLAIN_LOOP = """
import os, sys
for entry in sorted(os.scandir(sys.argv[1]), key=lambda entry: entry.name):
    with open(entry.path, "rb") as file:
        file.read().decode()
"""
SENTENCES = (
    "A grey cat sits on a blue mat in front of a window, looking at a bird outside.",
    "Une femme âgée, coiffée d’un béret, boit un café crème à la terrasse d’un bistrot.",
    "Ein Mädchen mit grüner Mütze läuft über die verschneite Straße, “warm” und fröhlich.",
    "一个穿红裙子的女孩站在草地上，手里拿着一只黄色的气球。",
)


def fix(folder: Path) -> dict[str, Any]:
    """--fix-encoding on 100,000 healthy captions in four languages, beside a plain loop that reads and decodes them."""
    captions = folder / "captions"
    captions.mkdir()
    for index in range(100_000):
        (captions / f"{index:06}.txt").write_text(SENTENCES[index % 4] * 4 + "\n", encoding="utf-8")
    ratios, tools = [], []
    for _ in range(5):
        tool = measure([*TOOL, "--fix-encoding", "--caption-dir", str(captions)])
        plain = measure([sys.executable, "-c", PLAIN_LOOP, str(captions)])
        assert tool.exit_code == 0
        tools.append(tool)
        ratios.append(tool.wall_s / plain.wall_s)
    middle = sorted(tools, key=lambda cost: cost.wall_s)[2]
    few = measure([*TOOL, "--fix-encoding", "--caption-dir", tempfile.mkdtemp(dir=folder)])
    return {
        "files/s": round(100_000 / middle.wall_s),
        "tool / plain loop": round(statistics.median(ratios), 2),
        "peak MiB": round(middle.peak_mib),
        "peak MiB with no files": round(few.peak_mib),
    }


def main() -> int:
    """Run the benchmarks named, or all, and print a line of JSON for each."""
    names = sys.argv[1:] or ["throughput", "photos", "export", "done", "help", "fix", "pace"]
    for benchmark in (throughput, photos, export, done, help, fix, pace):
        if benchmark.__name__ in names:
            with tempfile.TemporaryDirectory() as folder:
                print(
                    json.dumps({"benchmark": benchmark.__name__, **benchmark(Path(folder))}),
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
