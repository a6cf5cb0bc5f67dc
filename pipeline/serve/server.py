"""Models in, a running server out: `own` is `app.py` under uvicorn, `vllm` is vLLM's own server."""

import contextlib
import errno
import json
import os
import shlex
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.serve import models
from pipeline.serve.guard import is_local
from pipeline.serve.models import Served
from stages.runtime.errors import nearest

KEY = "STAGEWISE_API_KEY"
"""The variable of the environment with the key that requests must bring."""
_PACKAGES = ("uvicorn", "fastapi", "starlette", "prometheus_client")
_BITS, _GROUPS = (4, 8), (-1, 32, 64, 128)  # of GPTQ in vLLM 0.33


def serve(
    served: Sequence[Served],
    *,
    host: str,
    port: int,
    queue: int,
    batch: int,
    bounds: Mapping[str, Any],
    say: Callable[[str], None],
) -> int:
    """Load the models and answer requests until Ctrl-C or SIGTERM; `say` gets the address once there is one.

    Raises:
        ConfigError: the packages of the server are not installed, or an open address has no key.
    """
    key = _key(host)
    try:
        import uvicorn

        from pipeline.serve.app import build_app
        from pipeline.serve.connections import bounded
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise ConfigError([f"`serve` needs {error.name}; install it with `pip install 'stagewise[serve]'`"]) from None
    from pipeline.serve.answering import Limits

    # The address is bound before the models are loaded, which can take minutes.
    with _bound(host, port) as listening, models.loaded(served) as engines:
        app = build_app(engines, limits=Limits(**bounds), queue=queue, batch=batch, key=key)
        config = uvicorn.Config(
            app,
            http=bounded(),
            log_config=_LOGS,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        address = _address(host, listening.getsockname()[1])
        server = _announced(uvicorn.Server(config), address, say)
        with _ended_by_signals():
            server.run([listening])
    return 0 if server.started else 1


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the address, on which nothing listens yet.

    Raises:
        ConfigError: there is no such address on this machine, or another program has the port.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        cure = "choose another `--port`" if error.errno == errno.EADDRINUSE else "choose another `--host` or `--port`"
        raise ConfigError([f"--host {host} --port {port}: the server cannot listen there ({why}); {cure}"]) from None
    return listening


def _address(host: str, port: int) -> str:
    name = host.strip("[]")
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM are the usual end of a server. uvicorn, which handles them, raises them again at its end."""
    before = {one: signal.signal(one, lambda number, frame: None) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _announced(server: Any, address: str, say: Callable[[str], None]) -> Any:
    """The server of uvicorn, which says where it listens once it does."""
    start = server.startup

    async def startup(*given: Any, **more: Any) -> None:
        await start(*given, **more)
        if server.started:
            say(f"{address}/ is the page, {address}/v1 the API; Ctrl-C ends the server")

    server.startup = startup
    return server


def _key(host: str) -> str | None:
    """The key of the environment.

    Raises:
        ConfigError: requests can come from other machines, and there is no key, or a weak one.
    """
    key = os.environ.get(KEY) or None
    if key is not None and (len(key) < 16 or not key.isascii() or not key.isprintable()):
        raise ConfigError([f"{KEY}: a key has 16 or more printable ASCII characters; `openssl rand -hex 24` makes one"])
    if key is None and not is_local(host):
        raise ConfigError(
            [f"--host {host}: other machines can reach this address, so a key is needed; put it into {KEY}"]
        )
    return key


_LOGS: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {
        "stagewise.serve": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        "uvicorn.error": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
    },
}


# vLLM


def start_other(engine: str, served: Sequence[Served], host: str, port: int, say: Callable[[str], None]) -> None:
    """Start vLLM's server in place of this process, or say its command line where vLLM is not installed.

    Raises:
        ConfigError: there is no such engine, or vLLM does not take this folder.
    """
    if engine != "vllm":
        raise ConfigError([f"--engine {engine}: there is no such engine{nearest(engine, ('own', 'vllm'))}"])
    if len(served) > 1:
        raise ConfigError(["--engine vllm: vLLM serves one model; remove `--versus`"])
    words = vllm_command(served[0], host, port)
    key = _key(host)
    program = shutil.which("vllm")
    if program is not None:
        environment = {**os.environ, **({"VLLM_API_KEY": key} if key else {})}
        os.execve(program, [program, *words[1:]], environment)  # this process becomes vLLM
    say(f"vLLM is not installed here; run this where it is{', with its key in VLLM_API_KEY' if key else ''}:")
    say(shlex.join(words))


def vllm_command(served: Served, host: str, port: int) -> list[str]:
    """The command line with which vLLM serves a folder as this project does.

    Raises:
        ConfigError: vLLM does not take the folder: an adapter, or a kind of GPTQ that it lacks.
    """
    if len(served.folders) > 1:
        raise ConfigError(
            [f"--engine vllm: stage `{served.name}` leaves an adapter on another model; add `merge:` and serve that"]
        )
    folder = Path(served.folders[0])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    gptq = config.get("quantization_config") or {}
    wrong = [
        f"`{name}: {gptq[name]}` (vLLM takes {takes})"
        for name, good, takes in (
            ("bits", gptq.get("bits") in _BITS, "4 and 8"),
            ("group_size", gptq.get("group_size") in _GROUPS, "-1, 32, 64 and 128"),
            ("sym", gptq.get("sym", True) is True, "true"),
        )
        if gptq.get("quant_method") == "gptq" and not good
    ]
    if wrong:
        raise ConfigError([f"--engine vllm: vLLM does not take this folder: {', '.join(wrong)}"])
    words = ["vllm", "serve", str(folder.resolve()), "--served-model-name", served.name]
    words += ["--host", host, "--port", str(port)]
    template = folder / "chat_template.jinja"
    return [*words, "--chat-template", str(template.resolve())] if template.is_file() else words
