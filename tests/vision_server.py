#!/usr/bin/env python3
"""A vision API on loopback: a real HTTP server that speaks OpenAI's chat completions.

    python tests/vision_server.py --port 8008
    python tests/vision_server.py -- python gen-captions.py --image-dir examples/images

The second form runs a command against a server of its own, and ends with it. The server looks at every image it gets (that it decodes, that its type is the one named, how large it is) and answers with a
stand-in: a sentence about the image's size and main colour, no caption. Tests and benchmarks drive it by flags, or
while it runs by requests to two addresses of its own:

    PUT /script   what the next requests meet; starts the counts anew (see Script)
    PUT /limits   other limits a minute, by unit; the counts go on
    PUT /batch    another `batch` of the script; the counts go on
    PUT /release  let the answers go that the script holds
    GET /stats    what was seen so far (see Stats)

A step of the script is a JSON object; all its keys are optional:

    status, headers, body       answer with these; a body that is no text is sent as JSON
    content, finish_reason, message, usage   change these parts of an ordinary answer
    fault                       reset | slow | cut | hang | no choices | html, in place of an answer
    latency                     seconds before the answer

It takes batches too (/v1/files, /v1/batches): a batch is answered line by line as requests are, by the same script, and
goes through OpenAI's statuses in time. `batch` in the script says what else happens to it (see Script).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from aiohttp import web
from PIL import Image

FAULTS = ("429", "500", "503", "reset", "slow", "cut", "no choices")
USAGE = {"prompt_tokens": 1200, "completion_tokens": 20, "total_tokens": 1220}
COLOURS = {
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "red": (200, 40, 40),
    "green": (40, 160, 40), "blue": (40, 60, 200), "yellow": (220, 210, 50), "brown": (130, 90, 50),
}  # fmt: skip


@dataclass
class Script:
    """What the server does; every field can be set by PUT /script."""

    steps: list[dict[str, Any]] = field(
        default_factory=list
    )  # one for each of the next requests, in turn
    then: dict[str, Any] = field(default_factory=dict)  # for every request after them
    latency: float = 0.0  # seconds before each answer
    hold_after: int | None = None  # answers after so many requests wait for PUT /release
    faults: float = 0.0  # share of requests that meet one of FAULTS, the same ones each time
    fault: dict[str, Any] = field(
        default_factory=dict
    )  # the step that they meet, instead of FAULTS in turn
    key: str = ""  # the only key that is let in
    rejects: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # parameter: the body of a 400 for requests with it
    model: str = ""  # the only model there is
    requests_per_minute: float = (
        0.0  # the x-ratelimit headers tell; over it there is a 429 with Retry-After
    )
    tokens_per_minute: float = 0.0  # the same, counted by the usage of each answer
    check: bool = True  # whether images are decoded
    shutdown_date: str | None = None  # of every model, at GET /v1/models/NAME
    # errors (with which it fails), expires_after (lines), most_lines (of all that are at work), hold (while it is true),
    # live (the error of all other requests), without (a key of the batch), half (of its files), output (instead of what there is), fail (METHOD PATH: how many of these requests fail first, and with which status, 0 for
    # none), lose (the same after it was done), hang and hang_after (such requests)
    batch: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stats:
    """What was seen: GET /stats."""

    requests: int = 0
    in_flight: int = 0
    peak_in_flight: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # what was wrong with requests
    images: list[list[Any]] = field(
        default_factory=list
    )  # format, width, height, bytes of the last 1,000
    bodies: list[dict[str, Any]] = field(
        default_factory=list
    )  # the last 100 bodies, images left out
    arrivals: list[float] = field(default_factory=list)  # seconds since the script was set
    uploads: list[list[str]] = field(default_factory=list)  # the ids in each file
    batches: list[str] = field(default_factory=list)  # the file of each batch that was made
    deleted: list[str] = field(default_factory=list)  # files
    calls: list[str] = field(default_factory=list)  # of files and batches


class Bucket:
    """A rate limit as OpenAI keeps it: refilled steadily, a minute's worth at most."""

    def __init__(
        self, unit: str, per_minute: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.unit = unit
        self.clock = clock
        self.per_minute = per_minute
        self.left = per_minute / 60  # one second's worth: the limit shows from the start
        self.at = clock()

    def refill(self) -> None:
        """Add what has come back since the last look."""
        now = self.clock()
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now

    def wait_s(self, cost: float) -> float:
        """Return the seconds until there is room for this cost."""
        self.refill()
        return max(0.0, (cost - self.left) * 60 / self.per_minute)

    def headers(self) -> dict[str, str]:
        """Return the x-ratelimit headers."""
        self.refill()
        reset_ms = (self.per_minute - self.left) * 60_000 / self.per_minute
        return {
            f"x-ratelimit-limit-{self.unit}": f"{self.per_minute:.0f}",
            f"x-ratelimit-remaining-{self.unit}": f"{max(0, int(self.left))}",
            f"x-ratelimit-reset-{self.unit}": f"{reset_ms:.0f}ms",
        }


def describe(image: Image.Image) -> str:
    """Return the stand-in for a caption."""
    pixel = image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    name = min(
        COLOURS,
        key=lambda name: sum((a - b) ** 2 for a, b in zip(pixel, COLOURS[name], strict=True)),
    )
    return (
        f"Stand-in for a caption: a mostly {name} picture, {image.width} by {image.height} pixels."
    )


def look_at(url: str) -> tuple[list[Any], str]:
    """Return what a data URL holds (format, width, height, bytes) and the stand-in; ValueError when it is no image."""
    head, _, data = url.partition(",")
    raw = base64.b64decode(data, validate=True)
    image = Image.open(io.BytesIO(raw))
    image.load()
    if head != f"data:image/{str(image.format).lower()};base64":
        raise ValueError(f"{head} holds a {image.format}")
    return [image.format, image.width, image.height, len(raw)], describe(image)


def find_image(body: dict[str, Any]) -> str:
    """Return the data URL of a request, blank when it has none."""
    parts = [
        part
        for message in body.get("messages", [])
        for part in message["content"]
        if isinstance(part, dict)
    ]
    return next(
        (str(part["image_url"]["url"]) for part in parts if part.get("type") == "image_url"), ""
    )


class VisionServer:
    """The server's state and handlers."""

    def __init__(self, script: Script) -> None:
        self.use(script)

    def use(self, script: Script) -> None:
        """Follow a new script from its start, with all counts at zero."""
        self.script = script
        self.stats = Stats()
        self.steps = iter(script.steps)
        self.random = random.Random(7)
        limits = {"requests": script.requests_per_minute, "tokens": script.tokens_per_minute}
        self.buckets = [
            Bucket(unit, per_minute) for unit, per_minute in limits.items() if per_minute
        ]
        self.fault_kinds = itertools.cycle(FAULTS)
        self.started = time.monotonic()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.failing: dict[str, int] = {}

    async def set_script(self, request: web.Request) -> web.Response:
        """PUT /script."""
        self.use(Script(**await request.json()))
        return web.json_response({})

    async def set_limits(self, request: web.Request) -> web.Response:
        """PUT /limits: change the limits a minute, by unit, while all else goes on."""
        limits = await request.json()
        for bucket in self.buckets:
            bucket.refill()
            bucket.per_minute = limits.get(bucket.unit, bucket.per_minute)
        return web.json_response({})

    async def set_batch(self, request: web.Request) -> web.Response:
        """PUT /batch: change what happens to batches, while all else goes on."""
        self.script.batch = await request.json()
        return web.json_response({})

    async def release(self, _request: web.Request) -> web.Response:
        """PUT /release: hold no answers any more."""
        self.script.hold_after = None
        return web.json_response({})

    async def get_stats(self, _request: web.Request) -> web.Response:
        """GET /stats."""
        return web.json_response(asdict(self.stats))

    async def get_model(self, request: web.Request) -> web.Response:
        """GET /v1/models/NAME."""
        model = {
            "id": request.match_info["model"],
            "object": "model",
            "created": 0,
            "owned_by": "stand-in",
        }
        return web.json_response({**model, "shutdown_date": self.script.shutdown_date})

    async def interfere(self, request: web.Request, *, done: bool = False) -> None:
        """Fail a request as the script wants, before it is done or after."""
        name = f"{request.method} {request.path.split('/')[2]}"
        self.stats.calls.append(f"{name}{' done' if done else ''}")
        while self.script.batch.get("hang_after" if done else "hang") == name:  # noqa: ASYNC110 - until a request changes it
            await asyncio.sleep(0.02)
        often, status = self.script.batch.get("lose" if done else "fail", {}).get(name, (0, 500))
        seen = self.failing[f"{done} {name}"] = self.failing.get(f"{done} {name}", 0) + 1
        if seen <= often:
            if not status and request.transport:
                request.transport.abort()
            error = {"error": {"message": "interference", "code": "interference"}}
            raise web_error(status or 500, error)

    async def upload(self, request: web.Request) -> web.Response:
        """POST /v1/files."""
        await self.interfere(request)
        form = await request.post()
        upload = form["file"]
        assert isinstance(upload, web.FileField)
        if form["purpose"] != "batch":
            self.stats.wrong.append(f"purpose {form['purpose']!s}")
        name = f"file-{len(self.stats.uploads) + 1}"
        self.files[name] = upload.file.read()
        lines = self.files[name].splitlines()
        self.stats.uploads.append([json.loads(line)["custom_id"] for line in lines])
        await self.interfere(request, done=True)
        return web.json_response(
            {
                "id": name,
                "object": "file",
                "bytes": len(self.files[name]),
                "created_at": int(time.time()),
                "filename": upload.filename,
                "purpose": "batch",
                "status": "processed",
            }
        )

    async def send_file(self, request: web.Request) -> web.Response:
        """GET /v1/files/ID/content."""
        await self.interfere(request)
        name = request.match_info["id"]
        if "output" in self.script.batch:
            return web.Response(
                text=self.script.batch["output"], content_type="application/octet-stream"
            )
        if name not in self.files:
            return web.json_response(
                {"error": {"message": f"No such File object: {name}"}}, status=404
            )
        if self.script.batch.get("half"):
            return web.Response(
                body=self.files[name][: len(self.files[name]) // 2],
                content_type="application/x-jsonl",
            )
        return web.Response(body=self.files[name], content_type="application/octet-stream")

    async def delete_file(self, request: web.Request) -> web.Response:
        """DELETE /v1/files/ID."""
        name = request.match_info["id"]
        self.files.pop(name, None)
        self.stats.deleted.append(name)
        return web.json_response({"id": name, "object": "file", "deleted": True})

    async def create_batch(self, request: web.Request) -> web.Response:
        """POST /v1/batches."""
        await self.interfere(request)
        body = await request.json()
        name = f"batch-{len(self.stats.batches) + 1}"
        self.stats.batches.append(body["input_file_id"])
        now = int(time.time())
        self.batches[name] = {
            "id": name, "object": "batch", "endpoint": body["endpoint"], "completion_window": "24h",
            "input_file_id": body["input_file_id"], "status": "validating", "created_at": now,
            "output_file_id": None, "error_file_id": None, "errors": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }  # fmt: skip
        asyncio.get_running_loop().create_task(
            self.work(self.batches[name], request)
        ).add_done_callback(print_failure)
        await self.interfere(request, done=True)
        return web.json_response(self.batches[name])

    async def get_batch(self, request: web.Request) -> web.Response:
        """GET /v1/batches/ID."""
        await self.interfere(request)
        name = request.match_info["id"]
        if name not in self.batches:
            return web.json_response(
                {"error": {"message": f"No batch found with id '{name}'."}}, status=404
            )
        hidden = {self.script.batch.get("without"): None}
        return web.json_response(
            {**self.batches[name], **{key: None for key in hidden if key in self.batches[name]}}
        )

    async def list_batches(self, request: web.Request) -> web.Response:
        """GET /v1/batches, the newest first, two on a page."""
        found = [*reversed(self.batches.values())]
        names = [batch["id"] for batch in found]
        start = names.index(request.query["after"]) + 1 if "after" in request.query else 0
        page = found[start : start + 2]
        return web.json_response(
            {"object": "list", "data": page, "has_more": start + 2 < len(found)}
        )

    async def work(self, batch: dict[str, Any], request: web.Request) -> None:
        """Take a batch through its statuses."""
        wishes, files = self.script.batch, self.files
        lines = files[batch["input_file_id"]].splitlines()
        await asyncio.sleep(0.05)
        waiting = sum(
            b["request_counts"]["total"]
            for b in self.batches.values()
            if b["status"] == "in_progress"
        )
        if errors := wishes.get("errors"):
            batch.update(status="failed", errors={"object": "list", "data": errors})
            return
        if waiting + len(lines) > wishes.get("most_lines", 10**9):
            message = "Enqueued token limit reached for stand-in. Please try again once some in_progress batches have been completed."
            error = {
                "code": "token_limit_exceeded",
                "message": message,
                "param": None,
                "line": None,
            }
            batch.update(status="failed", errors={"object": "list", "data": [error]})
            return
        counts = batch["request_counts"]
        counts["total"] = len(lines)
        batch["status"] = "in_progress"
        outputs: list[str] = []
        errors = []
        for number, line in enumerate(lines):
            expired = number >= wishes.get("expires_after", 10**9)
            result, good = await self.answer_line(json.loads(line), request, expired=expired)
            (outputs if good else errors).append(json.dumps(result))
            counts["completed" if good else "failed"] += 1
        while self.script.batch.get("hold"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        if self.files is not files:  # another test has begun
            return
        self.random.shuffle(outputs)  # their order is not kept
        for kind, found in (("output_file_id", outputs), ("error_file_id", errors)):
            if found:
                batch[kind] = f"file-{kind[:3]}-{batch['id']}"
                files[batch[kind]] = ("\n".join(found) + "\n").encode()
        batch["status"] = wishes.get(
            "ends", "expired" if "expires_after" in wishes else "completed"
        )

    async def answer_line(
        self, line: dict[str, Any], request: web.Request, *, expired: bool
    ) -> tuple[dict[str, Any], bool]:
        """Return the result of a line of a batch, and whether it belongs into the output."""
        result = {
            "id": f"batch_req_{line['custom_id']}",
            "custom_id": line["custom_id"],
            "response": None,
            "error": None,
        }
        if expired:
            message = "This request could not be executed before the completion window expired."
            return {**result, "error": {"code": "batch_expired", "message": message}}, False
        self.stats.requests += 1
        response = self.refuse(request, line["body"]) or await self.answer_body(
            request, line["body"]
        )
        assert isinstance(response, web.Response)
        body = json.loads(response.text or "null")
        result["response"] = {"status_code": response.status, "request_id": "req", "body": body}
        return result, response.status == 200

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        stats = self.stats
        stats.requests += 1
        stats.arrivals.append(round(time.monotonic() - self.started, 4))
        stats.in_flight += 1
        stats.peak_in_flight = max(stats.peak_in_flight, stats.in_flight)
        try:
            response = await self.answer(request)
            status = str(response.status)
            stats.statuses[status] = stats.statuses.get(status, 0) + 1
            return response
        finally:
            stats.in_flight -= 1

    def next_step(self) -> dict[str, Any]:
        """Return what this request meets."""
        step = next(self.steps, self.script.then)
        if not step and self.random.random() < self.script.faults:
            kind = next(self.fault_kinds)
            return self.script.fault or (
                {"status": int(kind), "body": {"error": {"message": "at random"}}}
                if kind.isdigit()
                else {"fault": kind}
            )
        return step

    def refuse(self, request: web.Request, body: dict[str, Any]) -> web.Response | None:
        """Return the error of a request that the script does not let in."""
        script = self.script
        if script.key and request.headers.get("Authorization") != f"Bearer {script.key}":
            error = {
                "message": "Incorrect API key provided: " + request.headers["Authorization"][7:],
                "code": "invalid_api_key",
            }
            return web.json_response({"error": error}, status=401)
        if script.model and body.get("model") != script.model:
            message = (
                f"The model `{body.get('model')}` does not exist or you do not have access to it."
            )
            return web.json_response(
                {"error": {"message": message, "code": "model_not_found"}}, status=404
            )
        for parameter, error_body in script.rejects.items():
            if parameter in body and error_body.get("only", body[parameter]) == body[parameter]:
                return web.json_response(error_body, status=400)
        costs = {"requests": 1, "tokens": USAGE["total_tokens"]}
        wait_s = max((bucket.wait_s(costs[bucket.unit]) for bucket in self.buckets), default=0.0)
        if wait_s:
            error = {"message": "Rate limit reached", "code": "rate_limit_exceeded"}
            headers = {**self.limit_headers(), "Retry-After": f"{wait_s:.3f}"}
            return web.json_response({"error": error}, status=429, headers=headers)
        for bucket in self.buckets:
            bucket.left -= costs[bucket.unit]
        return None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Return what the script, or else the image, asks for."""
        body = json.loads(await request.read())
        if error := self.script.batch.get("live"):
            return web.json_response(error, status=429)
        return self.refuse(request, body) or await self.answer_body(request, body)

    async def answer_body(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Return what the script, or else the image, asks for."""
        script, number = self.script, self.stats.requests
        url = find_image(body)
        self.note(body)
        step = self.next_step()
        await asyncio.sleep(step.get("latency", self.script.latency))
        while script.hold_after is not None and number > script.hold_after:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if "fault" in step:
            return await self.fail(request, step["fault"])
        if "status" in step or "body" in step:
            text = step.get("body", "")
            text = text if isinstance(text, str) else json.dumps(text)
            return web.Response(
                status=step.get("status", 200), text=text, headers=step.get("headers")
            )
        content = f"Stand-in for a caption, number {self.stats.requests}."
        asks_for_tags = any(
            str(part.get("text")).startswith("Write tags")
            for part in body["messages"][0]["content"]
        )
        if self.script.check:
            try:
                seen, content = await asyncio.to_thread(look_at, url)
                if asks_for_tags:
                    content = (
                        content.removesuffix(".").replace(": a mostly", ",").replace(" by ", ", ")
                    )
                self.stats.images = [*self.stats.images[-999:], seen]
            except Exception as error:  # whatever a broken image leads to is what we want to know
                self.stats.wrong.append(f"{type(error).__name__}: {error}")
        return web.json_response(self.completion(body, content, step), headers=self.limit_headers())

    def limit_headers(self) -> dict[str, str]:
        """Return the x-ratelimit headers of all limits."""
        return {name: value for bucket in self.buckets for name, value in bucket.headers().items()}

    def note(self, body: dict[str, Any]) -> None:
        """Keep a body for those who ask, its image left out."""
        for message in body["messages"]:
            message["content"] = [
                part for part in message["content"] if part.get("type") != "image_url"
            ]
        self.stats.bodies = [*self.stats.bodies[-99:], body]

    def completion(
        self, body: dict[str, Any], content: str, step: dict[str, Any]
    ) -> dict[str, Any]:
        """Return an ordinary answer, changed by the step."""
        message = {
            "role": "assistant",
            "content": step.get("content", content),
            **step.get("message", {}),
        }
        return {
            "id": f"chatcmpl-{self.stats.requests}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.get("model"),
            "choices": [
                {"index": 0, "message": message, "finish_reason": step.get("finish_reason", "stop")}
            ],
            "usage": step.get("usage", USAGE),
            "service_tier": body.get("service_tier", "default"),
        }

    async def fail(self, request: web.Request, fault: str) -> web.StreamResponse:
        """Break off in one of the ways that servers do."""
        whole = json.dumps(self.completion({}, "cut", {})).encode()
        if fault in {"no choices", "html"}:
            text = (
                '{"choices": []}'
                if fault == "no choices"
                else "<!DOCTYPE html><title>Welcome</title><p>Portal"
            )
            return web.Response(
                text=text, content_type="application/json" if fault == "no choices" else "text/html"
            )
        if fault == "cut":
            return web.Response(body=whole[: len(whole) // 2], content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if fault == "slow":
            await response.prepare(request)
            for byte in whole:
                await response.write(bytes([byte]))
                await asyncio.sleep(0.05)
        elif fault == "hang":
            await asyncio.sleep(3600)
        elif request.transport:  # reset
            request.transport.abort()
        return response


def print_failure(task: asyncio.Task[None]) -> None:
    """Say what went wrong with a batch."""
    if not task.cancelled() and task.exception():
        print(repr(task.exception()), file=sys.stderr)


def web_error(status: int, body: dict[str, Any]) -> web.HTTPException:
    """Return an error to be raised."""
    error = web.HTTPInternalServerError(text=json.dumps(body), content_type="application/json")
    error.set_status(status)
    return error


def build_app(script: Script) -> web.Application:
    """Return the application."""
    server = VisionServer(script)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/chat/completions", server.complete)
    app.router.add_get("/v1/models/{model}", server.get_model)
    app.router.add_post("/v1/files", server.upload)
    app.router.add_get("/v1/files/{id}/content", server.send_file)
    app.router.add_delete("/v1/files/{id}", server.delete_file)
    app.router.add_post("/v1/batches", server.create_batch)
    app.router.add_get("/v1/batches", server.list_batches)
    app.router.add_get("/v1/batches/{id}", server.get_batch)
    app.router.add_put("/script", server.set_script)
    app.router.add_put("/limits", server.set_limits)
    app.router.add_put("/batch", server.set_batch)
    app.router.add_put("/release", server.release)
    app.router.add_get("/stats", server.get_stats)
    return app


async def serve(app: web.Application, port: int, command: list[str]) -> int:
    """Serve on loopback until the command ends, or for ever without one; the first line on stdout is the base URL."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    print(url, flush=True, file=sys.stderr if command else sys.stdout)
    if not command:
        await asyncio.Event().wait()
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, "OPENAI_BASE_URL": url}
    )
    return await process.wait()


def main() -> int:
    """Run the server by itself."""
    parser = argparse.ArgumentParser(
        description="a vision API on loopback, for trying and testing; see the docstring"
    )
    parser.add_argument(
        "--port", type=int, help="0 is any free one; the first line printed tells; default 8008"
    )
    parser.add_argument("--latency", type=float, default=0.2, help="seconds before each answer")
    parser.add_argument(
        "--faults", type=float, default=0.0, help="share of requests that fail in one of many ways"
    )
    parser.add_argument(
        "--requests-per-minute", type=float, default=0.0, help="rate limit; 0: none"
    )
    parser.add_argument(
        "command",
        nargs="*",
        help="after --: a command to run against this server, on any free port",
    )
    arguments = parser.parse_args()
    port = (0 if arguments.command else 8008) if arguments.port is None else arguments.port
    script = Script(
        latency=arguments.latency,
        faults=arguments.faults,
        requests_per_minute=arguments.requests_per_minute,
    )
    try:
        return asyncio.run(serve(build_app(script), port, arguments.command))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
