"""The least that the SDK can do for the same work: read, base64, create; no pixels, no retries, no captions written.

python benchmarks/sdk_floor.py WORKERS FOLDER, with OPENAI_BASE_URL set.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from openai import AsyncOpenAI


async def main(workers: int, paths: Iterator[Path]) -> None:
    """Ask for a caption of each image."""
    client = AsyncOpenAI(api_key="none", base_url=os.environ["OPENAI_BASE_URL"], max_retries=0)

    async def work() -> None:
        for path in paths:
            data = base64.b64encode(path.read_bytes()).decode()
            await client.chat.completions.create(
                model="gpt-6-luna",
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Describe this image."},
                            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
                        ],
                    }
                ],
            )

    async with client, asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), iter(sorted(Path(sys.argv[2]).iterdir()))))
