"""The least that can be done for the same work: read, base64, ask; no pixels, no retries, no captions written.

python benchmarks/sdk_floor.py default|aiohttp|raw WORKERS FOLDER, with OPENAI_BASE_URL set: the OpenAI SDK on its
default transport or on its aiohttp one, or aiohttp by itself with a body that is joined instead of dumped.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
from openai import AsyncOpenAI, DefaultAioHttpClient

BODY = (
    b'{"model": "gpt-6-luna", "messages": [{"role": "user", "content": ['
    b'{"type": "text", "text": "Describe this image."}, '
    b'{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,IMAGE"}}]}]}'
)
Ask = Callable[[bytes], Awaitable[object]]


async def ask_all(ask: Ask, workers: int, paths: Iterator[Path]) -> None:
    """Ask for a caption of each image."""

    async def work() -> None:
        for path in paths:
            await ask(base64.b64encode(path.read_bytes()))

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())


async def ask_by_sdk(url: str, workers: int, paths: Iterator[Path], *, transport: str) -> None:
    """Ask with chat.completions.create."""
    http_client = DefaultAioHttpClient() if transport == "aiohttp" else None
    async with AsyncOpenAI(
        api_key="none", base_url=url, max_retries=0, http_client=http_client
    ) as client:

        async def ask(image: bytes) -> object:
            return await client.chat.completions.create(
                model="gpt-6-luna",
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Describe this image."},
                            {
                                "type": "image_url",
                                "image_url": {"url": f"data:image/jpeg;base64,{image.decode()}"},
                            },
                        ],
                    }
                ],
            )

        await ask_all(ask, workers, paths)


async def ask_by_aiohttp(url: str, workers: int, paths: Iterator[Path]) -> None:
    """Ask without the SDK."""
    head, _, tail = BODY.partition(b"IMAGE")
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, headers={"Content-Type": "application/json"}
    ) as session:

        async def ask(image: bytes) -> object:
            async with session.post(
                f"{url}/chat/completions", data=b"".join((head, image, tail))
            ) as response:
                return await response.json()

        await ask_all(ask, workers, paths)


def main() -> None:
    """Ask in the way that is named first."""
    way, workers, folder = sys.argv[1:]
    url, paths = os.environ["OPENAI_BASE_URL"], iter(sorted(Path(folder).iterdir()))
    if way == "raw":
        asyncio.run(ask_by_aiohttp(url, int(workers), paths))
    else:
        asyncio.run(ask_by_sdk(url, int(workers), paths, transport=way))


if __name__ == "__main__":
    main()
