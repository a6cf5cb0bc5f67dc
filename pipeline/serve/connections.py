"""uvicorn's connections with two bounds that uvicorn has not: how long the head of a request may take, and how many.

A client that sends its head one byte a second would hold a connection for hours, and enough of them every file that a
process may open. A connection without a whole head after `seconds` is told so and closed; one too many gets 429.
"""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.serve.guard import error_body

SECONDS = 15.0
"""How long the head of a request may take to arrive."""
MOST = 400
"""Connections at the same time; a process may open 1,024 files on most machines."""


def bounded(seconds: float = SECONDS, most: int = MOST) -> type[H11Protocol]:
    """The class of a connection, for `uvicorn.Config(http=…)`."""

    class Connection(H11Protocol):
        """A connection that is closed where a head comes too slowly, or where there are too many."""

        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                self._end(429, f"{most} connections are open; try again later")
            else:
                self._time()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _time(self) -> None:
            """Start the clock where a head is under way, stop it where it is whole."""
            if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
                self._stop()
            elif self.late is None:
                text = f"the head of the request did not arrive within {seconds:g} s"
                self.late = self.loop.call_later(seconds, self._end, 408, text)

        def _stop(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

        def _end(self, status: int, message: str) -> None:
            """Answer in OpenAI's form, below uvicorn, which knows of no request yet, and close."""
            body = json.dumps(error_body(status, message)).encode()
            retry = "retry-after: 1\r\n" if status == 429 else ""
            head = f"HTTP/1.1 {status} {'Too Many Requests' if retry else 'Request Timeout'}\r\n{retry}"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self._stop()
            self.transport.write(head.encode() + body)
            self.transport.close()

    return Connection
