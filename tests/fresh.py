"""What `quantize` asks a fresh process, answered by forks of a process in which nothing has happened yet."""

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from stages.runtime.processes import end_with_parent


def fresh_quality() -> None:
    """Let processes that are forked from this one, as it is now, answer what `quantize` asks a fresh process.

    tests/run/test_run.py has runs with a fresh process.
    """
    from stages.measuring import quality

    channel, theirs = multiprocessing.Pipe()
    if os.fork() == 0:
        channel.close()
        _answer_in_forks(theirs, quality.respond)
    theirs.close()

    def ask(module: str, request: Mapping[str, Any]) -> Any:
        assert module == quality.__name__
        channel.send_bytes(json.dumps(request).encode())
        return json.loads(channel.recv_bytes())

    quality.in_fresh_process = ask


def _answer_in_forks(channel: Connection, respond: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each request in a process of its own; a process that fails closes the channel. Never returns."""
    end_with_parent()
    code = 0
    try:
        while code == 0:
            request = json.loads(channel.recv_bytes())
            if (pid := os.fork()) == 0:
                channel.send_bytes(json.dumps(respond(request)).encode())
                os._exit(0)
            code = os.waitpid(pid, 0)[1]
    except EOFError:  # nobody can ask any more
        code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
