"""Work in several processes of one machine. A process ends with the process that started it."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stages.runtime.errors import ProcessKilled

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

Item = TypeVar("Item")
Output = TypeVar("Output")

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: after a fork loading is not safe


def end_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent ends, even by kill -9. Does nothing outside Linux.

    `parent`: the process that started this one. If it has ended before this call, this process ends now.
    """
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> dict[str, int | None]:
    """The peak memory in bytes: `host`, resident in this process or in an ended child; `gpu`, reserved by torch.

    `gpu` is None without a GPU.
    """
    scale = 1 if sys.platform == "darwin" else 1024
    used = [resource.getrusage(who).ru_maxrss * scale for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    status = Path("/proc/self/status")  # after a fork its peak starts again; that of getrusage starts with the parent's
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    used[0] = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), used[0])
    torch: Any = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    reserved = sum(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count()))) if on_gpu else None
    return {"host": max(used), "gpu": reserved}


def parallel_map(
    work: Callable[[Item], Output], items: Iterable[Item], processes: int, few: int = 0
) -> Iterator[Output]:
    """The results of `work` for each item, in order. Only a few items are in memory at a time, however many there are.

    The work is done in this process if there are at most `few` items, if `processes` is 1, or if the system cannot
    fork. `work` may be a closure, because the processes are forked. Items and results are pickled.

    Raises:
        ProcessKilled: a process was killed.
    """
    items = iter(items)
    first = list(islice(items, few + 1))
    if processes == 1 or len(first) <= few or not hasattr(os, "fork"):
        yield from map(work, chain(first, items))
        return
    waiting: deque[Future[Output]] = deque()
    with _forked(work, processes) as pool:
        for item in chain(first, items):
            waiting.append(pool.submit(_apply, item))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_fork(work: Callable[[], Output]) -> Output:
    """The result of `work`, which is done in a forked process: what it opens and what it sets is gone afterwards.

    The result, and an error of `work`, are pickled. Where the system cannot fork, the work is done in this process.

    Raises:
        ProcessKilled: the process was killed.
    """
    if not hasattr(os, "fork"):
        return work()
    with _forked(lambda _: work(), 1) as pool:
        result: Output = pool.submit(_apply, None).result()
        return result


@contextmanager
def _forked(work: Callable[[Any], Any], processes: int) -> Iterator["ProcessPoolExecutor"]:
    """Forked processes that do some work for each item that is submitted."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    try:
        with ProcessPoolExecutor(processes, get_context("fork"), _start, (work,)) as pool:
            yield pool
    except BrokenProcessPool:
        raise ProcessKilled("a process was killed, as the kernel does when memory runs out") from None


_work: Callable[[Any], Any] = NotImplemented


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process already
    _work = work


def _apply(item: Any) -> Any:
    return _work(item)


def in_fresh_process(module: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of one of our modules to a request, from a new process that shares no state with this one.

    The module is run with `python -m` and calls `answer_request`. Request and answer are JSON.

    Raises:
        RuntimeError: the process failed. The message has the last lines of its stderr.
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
        lines = "\n".join(done.stderr.decode(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"a fresh process could not use {request['model']} (exit code {done.returncode}):\n{lines}")
    return dict(json.loads(done.stdout))


def answer_request(respond: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read one request from stdin and write its answer to stdout, both JSON. What libraries print goes to stderr."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.read())
    with answers:
        json.dump(respond(request), answers, ensure_ascii=False)
