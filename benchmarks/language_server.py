"""The JSON Schema of a config, tried with the YAML language server that editors use.

    npm install yaml-language-server
    PYTHONPATH=. python benchmarks/language_server.py node_modules/yaml-language-server/out/server/src/server.js

The server is given every config of `configs/` and the file with eight mistakes of `tests/config/test_schema.py`. It
must have nothing to say about the first and name the eight keys of the second. Exits with 1 if it does not.
"""

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 120
KEYS = ("template", "modell", "hiden_size", "loraalpha", "learning_rate", "packing", "sftt", "lerning_rate")


class Server:
    """A language server on the other end of two pipes."""

    def __init__(self, script: str) -> None:
        self.process = subprocess.Popen(["node", script, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ids = itertools.count(1)
        self.answers: dict[int, Any] = {}
        self.found: dict[str, list[dict[str, Any]]] = {}
        """Path of a file → what the server says about it."""
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Write one message of JSON-RPC."""
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self.process.stdin.flush()

    def _listen(self) -> None:
        out = self.process.stdout
        assert out is not None
        while head := out.readline():
            length = int(head.rpartition(b":")[2])
            while out.readline().strip():
                pass
            self._take(json.loads(out.read(length)))

    def _take(self, message: dict[str, Any]) -> None:
        if message.get("method") == "textDocument/publishDiagnostics":
            params = message["params"]
            self.found[params["uri"].removeprefix("file://")] = params["diagnostics"]
        elif "method" in message and "id" in message:  # the server asks for its settings
            items = message.get("params", {}).get("items", [])
            settings = [{"validate": True, "yamlVersion": "1.2"} if one["section"] == "yaml" else {} for one in items]
            self.send({"id": message["id"], "result": settings})
        elif "id" in message:
            self.answers[message["id"]] = message.get("result")

    def ask(self, method: str, params: dict[str, Any]) -> Any:
        """The answer to a request."""
        number = next(self.ids)
        self.send({"id": number, "method": method, "params": params})
        self.wait(lambda: number in self.answers)
        return self.answers[number]

    def wait(self, done: Any) -> None:
        """Wait until something is so, at most `SECONDS`."""
        end = time.monotonic() + SECONDS
        while not done():
            if time.monotonic() > end:
                raise TimeoutError("the language server does not answer")
            time.sleep(0.1)

    def say(self, files: dict[Path, str]) -> dict[Path, list[tuple[int, str, str]]]:
        """Open files; for each what the server says: line, the word there, message."""
        root = {"processId": None, "rootUri": f"file://{ROOT}", "capabilities": {"workspace": {"configuration": True}}}
        self.ask("initialize", root)
        self.send({"method": "initialized", "params": {}})
        for path, text in files.items():
            document = {"uri": f"file://{path}", "languageId": "yaml", "version": 1, "text": text}
            self.send({"method": "textDocument/didOpen", "params": {"textDocument": document}})
        self.wait(lambda: all(str(path) in self.found for path in files))
        time.sleep(5)  # a schema that is still read answers again
        said = {}
        for path, text in files.items():
            lines = text.splitlines()
            said[path] = [
                (one["range"]["start"]["line"] + 1, _word(lines, one["range"]["start"]), one["message"].splitlines()[0])
                for one in self.found[str(path)]
            ]
        self.process.kill()
        return said


def _word(lines: list[str], place: dict[str, int]) -> str:
    """The key at a place, or the one before the value at a place."""
    line, at = lines[place["line"]], place["character"]
    if match := re.match(r"\w+(?=:)", line[at:]):
        return match[0]
    return re.findall(r"(\w+):", line[:at])[-1]


def main(script: str) -> int:
    """Print what the server says; 1 if it is not what is expected."""
    source = (ROOT / "tests" / "config" / "test_schema.py").read_text(encoding="utf-8")
    schema = ROOT / "configs" / "schema.json"
    mistakes = f"# yaml-language-server: $schema={schema}\n" + source.split('MISTAKES = """\\\n')[1].split('"""')[0]
    files = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))}
    wrong = ROOT / "mistakes.yaml"  # only its name is used
    said = Server(script).say({**files, wrong: mistakes})
    for path, found in said.items():
        print(f"{path.relative_to(ROOT)}: {len(found)}")
        for line, word, message in found:
            print(f"  {line}: {word}: {message[:100]}")
    words = sorted(word for _, word, _ in said[wrong])
    return int(any(said[path] for path in files) or words != sorted(KEYS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
