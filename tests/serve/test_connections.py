"""Clients that send slowly or hold many connections: bounded, answered, and in nobody's way."""

import json
import socket
import time
import urllib.request

import pytest

pytestmark = pytest.mark.train
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def connected(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def whole(connection):
    """All that the server sends until it closes: the status and the message of the error."""
    parts = []
    while part := connection.recv(65_536):
        parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    return head.split(b" ")[1].decode(), json.loads(body)["error"]["message"]


def healthy(server):
    return json.load(urllib.request.urlopen(f"{server.url}/health", timeout=10))["status"]


def test_a_head_that_comes_one_byte_at_a_time_is_ended(served):
    late = ("408", "the head of the request did not arrive within 1 s")
    with served(head_seconds=1.0) as server, connected(server.port) as slow, connected(server.port) as silent:
        began = time.monotonic()
        for byte in HEAD:
            try:
                slow.sendall(bytes([byte]))
            except OSError:  # closed by the server
                break
            time.sleep(0.2)
        assert time.monotonic() - began < 0.2 * len(HEAD), "the whole head was taken"
        assert healthy(server) == "ok"
        assert whole(silent) == late
        # A second request on the same connection is bounded as the first one is.
        with connected(server.port) as kept:
            kept.sendall(HEAD + b"\r\n")
            assert kept.recv(65_536).startswith(b"HTTP/1.1 200")
            kept.sendall(HEAD[:10])
            assert whole(kept) == late


def test_an_answer_may_take_longer_than_the_head(served):
    body = json.dumps({"model": "tiny", "max_tokens": 200, "messages": [{"role": "user", "content": "头痛"}]}).encode()
    with served(head_seconds=0.2) as server:
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions", body, {"content-type": "application/json"}
        )
        began = time.monotonic()
        assert json.load(urllib.request.urlopen(request, timeout=120))["usage"]["completion_tokens"] == 200
        assert time.monotonic() - began > 0.2


def test_one_connection_too_many_is_told_so(served):
    with served(connections=3) as server:
        held = [connected(server.port) for _ in range(3)]
        time.sleep(0.2)
        with connected(server.port) as fourth:
            assert whole(fourth) == ("429", "3 connections are open; try again later")
        held.pop().close()
        time.sleep(0.2)
        assert healthy(server) == "ok"
        for connection in held:
            connection.close()
