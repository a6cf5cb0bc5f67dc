"""The server under load: status codes, percentiles, memory; and requests that wait together against one by one.

Usage: python benchmarks/serving.py FOLDER [--clients 64] [--seconds 120] [--tokens 32]
FOLDER is a stage's folder or a model's. Only the loopback address is used.
"""

import argparse
import asyncio
import collections
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

QUESTIONS = ["感冒了应该注意什么？", "高血压的人能喝咖啡吗？", "孩子发烧怎么办？", "头痛三天了，要去医院吗？"]


def body(number: int, tokens: int) -> dict[str, object]:
    question = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
    return {"messages": question, "max_tokens": tokens, "temperature": 0, "stream": False}


def memory(pid: int) -> float:
    """Resident memory of a process in MB."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


async def load(url: str, pid: int, clients: int, seconds: float, tokens: int) -> None:
    """Clients that each ask again as soon as they are answered; after a 429 they wait as long as it says."""
    statuses: collections.Counter[int] = collections.Counter()
    times: list[float] = []
    sizes: list[float] = []
    end = time.monotonic() + seconds

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            answer = await client.post(f"{url}/v1/chat/completions", json=body(number, tokens))
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                times.append(time.monotonic() - began)
            elif answer.status_code == 429:
                await asyncio.sleep(min(float(answer.headers["retry-after"]), 2))

    async def watch() -> None:
        while time.monotonic() < end:
            sizes.append(memory(pid))
            await asyncio.sleep(1)

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=clients)) as client:
        await asyncio.gather(watch(), *(ask(client, number) for number in range(clients)))
    parts = statistics.quantiles(times, n=100)
    print(f"{clients} clients, {seconds:g} s, {tokens} tokens each: {dict(statuses)}")
    print(
        f"answers/s {len(times) / seconds:.1f}; seconds p50 {parts[49]:.2f}, p95 {parts[94]:.2f}, p99 {parts[98]:.2f}"
    )
    tenth = max(1, len(sizes) // 10)
    first, last = statistics.mean(sizes[tenth : 2 * tenth]), statistics.mean(sizes[-tenth:])
    print(f"resident memory: {first:.0f} MB early, {last:.0f} MB at the end, {max(sizes):.0f} MB at most")


async def together(url: str, tokens: int, count: int = 8, rounds: int = 3) -> None:
    """`count` requests at once against one after the other, in turn."""
    ratios = []
    async with httpx.AsyncClient(timeout=300) as client:

        async def ask(number: int) -> None:
            (await client.post(f"{url}/v1/chat/completions", json=body(number, tokens))).raise_for_status()

        await ask(0)
        for _ in range(rounds):
            began = time.monotonic()
            for number in range(count):
                await ask(number)
            alone = time.monotonic() - began
            began = time.monotonic()
            await asyncio.gather(*(ask(number) for number in range(count)))
            ratios.append(alone / (time.monotonic() - began))
    ratio = statistics.median(ratios)
    print(f"{count} requests of {tokens} tokens, together against one by one: {ratio:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    words = [sys.executable, "-m", "pipeline.cli", "serve", given.folder, "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ)
    try:
        url = re.search(r"http://[\d.:]+", server.stdout.readline())[0]
        asyncio.run(together(url, given.tokens))
        asyncio.run(load(url, server.pid, given.clients, given.seconds, given.tokens))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
