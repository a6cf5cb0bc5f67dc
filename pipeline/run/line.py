"""A line between the runners of two machines: JSON objects, one a line of text, over TCP.

Over it the machines agree that all of them are there and mean the same, and say what they do. What the training
computes goes over connections of torch. The kernel closes a line however its runner ends, so a closed line is a lost
machine. A machine that vanishes from the network is noticed after about half a minute, by the keepalive of TCP.
"""

import contextlib
import fcntl
import json
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

from pipeline.errors import StageFailed

LONGEST = 2**20
"""Bytes of a message; a program of another kind that connects is not read further."""
# Seconds without an answer, seconds between questions, questions, milliseconds that sent bytes may stay unconfirmed.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
_SIOCGIFADDR = 0x8915


class Line:
    """One end of a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.closed = False
        """Whether the other end is gone; its last messages may still be waiting in `new`."""
        self._begun = b""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if (option := vars(socket).get(name)) is not None:  # not every system has each of them
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    @property
    def address(self) -> str:
        """The address of this machine on the line."""
        return str(self.socket.getsockname()[0])

    def send(self, kind: str, **values: Any) -> None:
        """Send a message; nothing happens when the other end is gone, and what it sent before can still be read."""
        content = json.dumps({"kind": kind, **values}).encode() + b"\n"
        try:
            self.socket.setblocking(True)
            self.socket.settimeout(30)
            self.socket.sendall(content)
        except OSError:
            with contextlib.suppress(OSError):  # a part of the message may be sent: nothing can follow it
                self.socket.shutdown(socket.SHUT_WR)
        finally:
            self.socket.setblocking(False)

    def new(self) -> list[dict[str, Any]]:
        """The messages that have come since the last call."""
        found = self._begun
        while not self.closed and len(found) <= LONGEST:
            try:
                chunk = self.socket.recv(2**16)
            except BlockingIOError:
                break
            except OSError:
                chunk = b""
            self.closed = not chunk
            found += chunk
        *whole, self._begun = found.split(b"\n")
        if len(self._begun) > LONGEST:
            self.closed = True
        return [message for message in map(_message, whole) if message]

    def wait(self, seconds: float) -> None:
        """Wait until something comes, at most some seconds."""
        if not self.closed:
            select.select([self.socket], [], [], seconds)

    def next(self, seconds: float) -> dict[str, Any]:
        """The next message, which is alone on the line; empty if none comes in time."""
        end = time.monotonic() + seconds
        while not (found := self.new()) and not self.closed and (left := end - time.monotonic()) > 0:
            self.wait(left)
        return found[0] if found else {}

    def close(self) -> None:
        self.closed = True
        self.socket.close()


def _message(text: bytes) -> dict[str, Any]:
    """A message; empty for what is none, as when a program of another kind has connected."""
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(text)
        if isinstance(message, dict) and isinstance(message.get("kind"), str):
            return message
    return {}


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that takes lines on every address of this machine; to accept one takes 0.2 s at most.

    Raises:
        StageFailed: another program listens on the port.
        TimeoutError: from `accept`, when none came.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        text = f"`launch.rendezvous`: port {port} cannot be used here ({os.strerror(error.errno or 0)})"
        raise StageFailed(f"{text}; end the program that uses it, or choose another port") from None
    with server:
        server.settimeout(0.2)
        yield server


def free_port() -> int:
    """A port that nothing listens on now."""
    with listening(0) as server:
        return int(server.getsockname()[1])


def interface_of(address: str) -> str | None:
    """The network interface of this machine with an address, such as `eth0`; None if it cannot be found."""
    address = address.removeprefix("::ffff:").partition("%")[0]
    for _, name in socket.if_nameindex() if sys.platform == "linux" else ():
        if address in _addresses(name):
            return name
    return None


def _addresses(name: str) -> Iterator[str]:
    """The first IPv4 address and all IPv6 addresses of an interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        yield socket.inet_ntop(socket.AF_INET, found[20:24])
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as file:
        for words in map(str.split, file):
            if words[-1] == name:
                yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0]))


def token() -> str:
    """Text that nobody can guess."""
    return secrets.token_hex(16)
