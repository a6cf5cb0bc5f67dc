"""Figures of a running server in the text form of Prometheus."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.serve.answering import Reply
from pipeline.serve.worker import Worker

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Requests, tokens, and how long answers take, counted from the start of the server."""

    def __init__(self, worker: Worker) -> None:
        self._all = CollectorRegistry()
        self._requests = Counter(
            "stagewise_requests", "Requests by route and status.", ["route", "status"], registry=self._all
        )
        self._tokens = Counter("stagewise_tokens", "Tokens by kind.", ["kind"], registry=self._all)
        self._seconds = Histogram(
            "stagewise_answer_seconds", "From a request to its last token.", registry=self._all, buckets=_SECONDS
        )
        waiting = Gauge("stagewise_waiting_requests", "Requests in the queue.", registry=self._all)
        waiting.set_function(lambda: worker.waiting)
        running = Gauge("stagewise_running_answers", "Answers in the running batch.", registry=self._all)
        running.set_function(lambda: worker.running)

    def request(self, route: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()

    def answered(self, reply: Reply) -> None:
        """Count the tokens and the time of a request."""
        self._tokens.labels("prompt").inc(reply.usage["prompt_tokens"])
        self._tokens.labels("completion").inc(reply.usage["completion_tokens"])
        self._seconds.observe(time.monotonic() - reply.job.since)

    def text(self) -> str:
        """All figures."""
        return generate_latest(self._all).decode()
