"""Work in several processes of one machine, none of which outlives the one that began it."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded now: little is safe after a fork


def end_with_parent() -> None:
    """On Linux, have the kernel end this process when the one that started it is gone (kill -9 of a runner)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> dict[str, int | None]:
    """The most bytes that were resident at one time in this process, or in a child of it that has ended (`host`), and
    that this process's torch kept on GPUs (`gpu`; None without one)."""
    scale = 1 if sys.platform == "darwin" else 1024
    used = [resource.getrusage(who).ru_maxrss * scale for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    status = Path("/proc/self/status")  # after a fork, getrusage's figure begins with the parent's
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    used[0] = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), used[0])
    torch: Any = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    kept = sum(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count()))) if on_gpu else None
    return {"host": max(used), "gpu": kept}


def parallel_map(work: Callable[[Item], Made], items: Iterable[Item], processes: int, few: int = 0) -> Iterator[Made]:
    """`work` of each item, in order; at most some items are under way at one time, however many there are.

    `few` items are not worth another process: they are worked on in this one, as all are with one process or on a
    system that cannot fork. `work` may be a closure: it is inherited. Items and results are pickled.

    Raises:
        MemoryError: one of the processes was ended from outside.
    """
    items = iter(items)
    begun = list(islice(items, few + 1))
    if processes == 1 or len(begun) <= few or not hasattr(os, "fork"):
        yield from map(work, chain(begun, items))
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    waiting: deque[Future[Made]] = deque()
    try:
        with ProcessPoolExecutor(processes, get_context("fork"), _begin, (work,)) as pool:
            for item in chain(begun, items):
                waiting.append(pool.submit(_do, item))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise MemoryError("a process was ended from outside, as the kernel does when memory runs out") from None


_work: Callable[[Any], Any] = NotImplemented


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process
    _work = work


def _do(item: Any) -> Any:
    return _work(item)


def in_fresh_process(module: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """What a module of ours answers to a request in a process of its own, where nothing of this one can help.

    The module is run with `python -m` and calls `answer_request`.

    Raises:
        RuntimeError: the process failed; the message has the last lines of its stderr.
    """
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-m", module],
        input=json.dumps(request).encode(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    if done.returncode:
        said = "\n".join(done.stderr.decode(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"a fresh process could not use {request['model']} (exit code {done.returncode}):\n{said}")
    return dict(json.loads(done.stdout))


def answer_request(respond: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read one request from stdin and write the answer to stdout, both JSON; what libraries print goes to stderr."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.read())
    with answers:
        json.dump(respond(request), answers, ensure_ascii=False)
