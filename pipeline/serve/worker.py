"""The thread that holds the models: requests wait in a bounded queue, and equal ones are generated as one batch."""

import collections
import contextvars
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.model.live import Answer, Sampling, generate

if TYPE_CHECKING:
    from stages.model.generation import Engine


class QueueFull(Exception):
    """More requests wait than the queue holds; `seconds` is how long to wait before the next try."""

    def __init__(self, seconds: int) -> None:
        super().__init__()
        self.seconds = seconds


@dataclass
class Job:
    """The answers to one request."""

    model: str
    answers: Sequence[Answer]
    sampling: Sampling
    on_end: Callable[[Exception | None], None]
    """Called from the worker's thread when all answers have ended, or with the error that ended them."""
    since: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """End the answers: at once while they wait, at the next token while they are generated."""
        for answer in self.answers:
            answer.cancel()

    @property
    def ended(self) -> bool:
        return all(answer.reason is not None for answer in self.answers)


class Worker:
    """Generates answers in a thread of its own, one batch after the other."""

    def __init__(self, engines: Mapping[str, "Engine"], *, queue: int, batch: int, tokens: int) -> None:
        """
        Args:
            queue: requests that may wait.
            batch: answers that are generated together.
            tokens: prompts and answers of a batch, in tokens.
        """
        self.engines = engines
        self.queue, self.batch, self.tokens = queue, batch, tokens
        self.running = 0
        """Answers in the batch that is being generated."""
        self._waiting: collections.deque[Job] = collections.deque()
        self._now: Sequence[Job] = ()
        self._changed = threading.Condition()
        self._seconds = 1.0  # of a batch, a running mean
        self._ended = False
        # Settings of torch that belong to a context, such as dynamo's `disable`, hold in the thread too.
        work = functools.partial(contextvars.copy_context().run, self._work)
        self._thread = threading.Thread(target=work, name="worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a request into the queue.

        Raises:
            QueueFull: the queue is full.
        """
        self.drop_cancelled()
        with self._changed:
            if len(self._waiting) >= self.queue:
                raise QueueFull(self._wait())
            self._waiting.append(job)
            self._changed.notify()

    def drop_cancelled(self) -> None:
        """Remove cancelled requests from the queue and report their end, whatever is being generated."""
        with self._changed:
            self._waiting = collections.deque(waiting for waiting in self._waiting if not self._dropped(waiting))

    def stop(self, seconds: float = 10) -> None:
        """Cancel the requests that wait or are being generated, and wait until the thread has ended."""
        with self._changed:
            self._ended = True
            for job in (*self._waiting, *self._now):
                job.cancel()
            self._changed.notify()
        self._thread.join(seconds)

    def _wait(self) -> int:
        """After how many seconds a place in the queue is likely."""
        return max(1, min(60, round(self._seconds * (1 + len(self._waiting) / self.batch))))

    @staticmethod
    def _dropped(job: Job) -> bool:
        """Whether a waiting request was cancelled; its end is reported."""
        if job.ended:
            job.on_end(None)
        return job.ended

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                jobs = self._now = self._next()
                if not jobs and self._ended:
                    return
            if jobs:
                self._generate(jobs)

    def _next(self) -> list[Job]:
        """The first waiting request and all others that can be generated with it; cancelled ones are dropped."""
        waiting = [job for job in self._waiting if not self._dropped(job)]
        if not waiting:
            self._waiting.clear()
            return []
        first, chosen, rest = waiting[0], [], []
        count, width, longest = 0, 0, 0
        for job in waiting:
            wide = max(width, *(len(answer.prompt) for answer in job.answers))
            most = max(longest, *(answer.max_tokens for answer in job.answers))
            size = count + len(job.answers)
            fits = size <= self.batch and size * (wide + most) <= self.tokens
            if job is first or (fits and self._together(first, job)):
                chosen.append(job)
                count, width, longest = size, wide, most
            else:
                rest.append(job)
        self._waiting = collections.deque(rest)
        return chosen

    @staticmethod
    def _together(first: Job, other: Job) -> bool:
        """Whether two requests can be one batch; a seed must give the same answer whoever else asks."""
        same = first.model == other.model and first.sampling == other.sampling
        return same and (first.sampling.seed is None or first.sampling.temperature == 0)

    def _generate(self, jobs: Sequence[Job]) -> None:
        began, error = time.monotonic(), None
        answers = [answer for job in jobs for answer in job.answers]
        self.running = len(answers)
        try:
            generate(self.engines[jobs[0].model], answers, jobs[0].sampling)
        except Exception as caught:  # the request gets the error; the thread goes on with the next one
            error = caught
        self.running = 0
        self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - began)
        for job in jobs:
            job.on_end(error)
