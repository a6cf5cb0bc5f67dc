"""`doctor` looks at the machine and the packages, and names a cure for what is wrong."""

import importlib.metadata
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipeline.cli import main
from pipeline.tools import doctor


@pytest.fixture
def hub(monkeypatch):
    """A small Hub on the loopback address, which answers 403 to everything."""

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(403)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield address
    server.shutdown()


def found(name):
    return {finding.what: finding for finding in doctor.examine(name)}


def test_this_environment_is_right(project, hub, capsys):
    assert main(["doctor", "--json"]) == 0
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["packages"]["state"] == "ok"
    assert f"trl {importlib.metadata.version('trl')}" in findings["packages"]["text"]
    assert findings["file system"]["state"] == "ok"
    assert findings["Hub"] == {
        "what": "Hub",
        "state": "ok",
        "text": f"{hub} answers, without a token (HF_TOKEN), so gated models stay closed",
        "cure": "",
    }


def test_a_wrong_version_a_missing_package_and_one_that_clashes(project, hub, monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name):
        changed = {"trl": "0.9.6", "auto-gptq": "0.7.1"}
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    install = "`pip install -c constraints.txt -e .` in the project's folder"
    assert f"wrong trl: 0.9.6 is installed; stagewise needs trl<2,>=1.16; {install}" in lines
    assert f"wrong peft: is not installed; {install}" in lines
    why = "it does not load with transformers 5, and GPTQModel takes its place: `pip uninstall auto-gptq`"
    assert f"wrong auto-gptq: 0.7.1 is installed; {why}" in lines


def test_a_hub_that_cannot_be_reached_is_a_note(project, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    finding = found(tmp_path)["Hub"]
    assert finding.state == "note"
    assert finding.text.startswith("http://127.0.0.1:9 cannot be reached (")
    assert finding.cure == "name folders in place of Hub names, or a mirror in HF_ENDPOINT"


def test_what_answers_and_is_no_hub_is_a_note(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", address := f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example.org ESMTP\r\n")

        threading.Thread(target=answer, daemon=True).start()
        finding = found(tmp_path)["Hub"]
    assert (finding.state, finding.text) == (
        "note",
        f"{address} cannot be reached (its answer is not HTTP: BadStatusLine)",
    )


def test_a_driver_that_hangs_is_wrong_and_no_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    monkeypatch.setattr(doctor, "_WAIT", 0.01)
    finding = found(tmp_path)["GPU"]
    assert (finding.state, finding.text) == ("wrong", "the driver has one, and torch does not answer within 0.01 s")


def test_a_folder_that_cannot_be_written_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *given: (_ for _ in ()).throw(OSError(37, "No locks available")))
    finding = found(tmp_path)["file system"]
    assert (finding.state, finding.text) == ("wrong", f"{tmp_path}: No locks available")


def test_a_missing_compiler_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CC", "no-such-compiler")
    finding = found(tmp_path)["C compiler `no-such-compiler`"]
    assert (finding.state, finding.cure) == ("note", "on Debian and Ubuntu: `apt install build-essential`")
    for empty in ("", "  "):
        monkeypatch.setenv("CC", empty)
        assert "memory" in found(tmp_path)
    monkeypatch.setenv("CC", "sh -c")  # a compiler with its options
    assert not [what for what in found(tmp_path) if what.startswith("C compiler")]
