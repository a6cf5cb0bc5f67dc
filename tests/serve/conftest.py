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
    """An untrained Llama whose template writes tools; its answers are readable noise, always the same.

    Its generation config suppresses the tokens that are special, or that are not whole characters.
    """
    from stages.model.generation import load_engine

    loaded = load_engine([str(tiny("llama", template="qwen"))])
    texts = [loaded.tokenizer.decode([token], skip_special_tokens=True) for token in range(len(loaded.tokenizer))]
    unreadable = [
        token for token, text in enumerate(texts) if not text.strip() or not text.isprintable() or "\ufffd" in text
    ]
    loaded.model.generation_config.suppress_tokens = unreadable
    return loaded


@pytest.fixture(scope="session")
def served(engine):
    """Serve engines with settings of `build_app`; a context that gives `url`, `port` and `worker`."""
    import uvicorn

    from pipeline.serve.app import build_app
    from pipeline.serve.connections import bounded

    @contextlib.contextmanager
    def run(engines=None, head_seconds=30.0, connections=400, **settings):
        app = build_app(engines or {"tiny": engine}, **settings)
        kind = bounded(head_seconds, connections)
        server = uvicorn.Server(uvicorn.Config(app, http=kind, log_config=None, timeout_graceful_shutdown=2))
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
