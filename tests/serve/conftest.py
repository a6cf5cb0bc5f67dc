"""A tiny model behind a real server on the loopback address."""

import asyncio
import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def engine(tiny):
    """An untrained Llama whose template writes tools; its answers are noise, always the same."""
    from stages.model.generation import load_engine

    return load_engine([str(tiny("llama", template="qwen"))])


@pytest.fixture(scope="session")
def served(engine):
    """Serve engines with settings of `build_app`; a context that gives `url`, `port` and `worker`."""
    import uvicorn

    from pipeline.serve.app import build_app

    @contextlib.contextmanager
    def run(engines=None, **settings):
        app = build_app(engines or {"tiny": engine}, **settings)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2))
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
            thread.start()
            deadline = time.monotonic() + 30
            while not server.started and time.monotonic() < deadline:
                time.sleep(0.02)
            port = listening.getsockname()[1]
            try:
                yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port)
            finally:
                server.should_exit = True
                thread.join(30)
        assert not thread.is_alive()

    return run
