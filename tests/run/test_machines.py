"""Several machines: how they meet, what they say when they cannot, and that they train as one machine would."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.config.checker import load_config
from pipeline.errors import ConfigError, GateClosed, StageFailed
from pipeline.plan.placing import build_plan
from pipeline.run.following import _reached, follow_leader
from pipeline.run.leading import Shown, gathered
from pipeline.run.line import Line, free_port, interface_of
from pipeline.run.machines import Here, contents_of, here, machine_name
from pipeline.run.process import Stop
from stages.runtime.errors import Interrupted
from tests.planned import CHAIN
from tests.run.namespaces import ROOT, reached, write_config

NODE = os.uname().nodename
LEADER, OTHER = machine_name(0, NODE), machine_name(1, NODE)


class View:
    """Keeps what it is shown."""

    def __init__(self):
        self.shown = []

    def step(self, step, state):
        self.shown.append((step.name, state))

    def event(self, step, event):
        self.shown.append((step.name, event["text"]))


@pytest.fixture
def meet(project, monkeypatch):
    """Let a leader and followers meet on this machine, each in a thread; returns what each raised and was shown."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # put back afterwards
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")

    def plan(saves="saves", *assignments):
        launch = ["launch.machines=2", "launch.timeout=2s", *assignments]
        return build_plan(load_config(Path("x.yaml"), launch), Path(saves))

    def call(leader=(), follower=(), lead=lambda group, planned: None, port=None, started=("leader", "follower")):
        project.write("x.yaml", CHAIN)
        port = port or free_port()
        found = {}

        def leads():
            planned = plan(*leader)
            launch = planned.steps[1].entry.launch
            with gathered(Here(0, 2, "127.0.0.1", port, launch), planned, views["leader"], Stop()) as group:
                lead(group, planned)

        def follows():
            planned = plan(*follower)
            place = Here(1, 2, "127.0.0.1", port, planned.steps[1].entry.launch)
            follow_leader(place, planned, views["follower"], Stop())

        def kept(name, act):
            try:
                act()
            except Exception as error:
                found[name] = error

        views = {name: View() for name in started}
        acts = {"leader": leads, "follower": follows}
        threads = [threading.Thread(target=kept, args=(name, acts[name])) for name in started]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        return found, views

    return call


def test_machines_that_agree_meet_and_each_sees_what_the_leader_does(meet):
    def lead(group, planned):
        Shown(View(), group).step(planned.steps[0], "running")
        Shown(View(), group).step(planned.steps[0], "ran")

    found, views = meet(lead=lead)
    assert found == {}
    assert views["follower"].shown[1:] == [("init", "running"), ("init", "ran")]
    assert views["leader"].shown[0][1].endswith("for 1 other machine")


def test_machines_that_plan_different_things_end_in_the_same_message(meet):
    found, _ = meet(follower=("saves", "sft.trainer.learning_rate=1e-3"))
    text = (
        f"{LEADER} and {OTHER} disagree on stage `sft`: `trainer.learning_rate` is 5e-05 on the first and 0.001 on the "
        "second; give all machines the same file, options and versions"
    )
    assert {name: (type(error), str(error)) for name, error in found.items()} == {
        "leader": (ConfigError, text),
        "follower": (ConfigError, text),
    }


def test_another_version_of_a_library_is_a_disagreement(meet, monkeypatch):
    def older(planned):
        found = contents_of(planned)
        found["init"]["versions"]["torch"] = "1.0"
        return found

    monkeypatch.setattr("pipeline.run.following.contents_of", older)
    found, _ = meet()
    assert 'disagree on stage `init`: `versions.torch` is "' in str(found["leader"])
    assert str(found["leader"]) == str(found["follower"])


def test_a_saves_folder_that_is_not_shared_is_named_on_both(meet, monkeypatch):
    """The follower ends when it knows; machine 0 waits on, since that may have been a machine of another run."""
    monkeypatch.setattr("pipeline.run.following.DISK", 0.2)
    port = free_port()
    found, _ = meet(follower=("elsewhere",), port=port)
    text = f"{OTHER} does not see in `{{}}` what {LEADER} has written there; "
    text += "`saves` must be on a disk that all machines share"
    late = f"machine 1 of 2, counted from 0, did not come to 127.0.0.1:{port} within 2s; "
    assert str(found["leader"]) == late + text.format("saves")
    assert str(found["follower"]) == text.format("elsewhere")
    assert not list(Path("saves/x/logs").iterdir())


def test_what_machine_0_has_written_may_be_seen_later(meet, monkeypatch):
    """As on NFS, which remembers that a file was not there."""
    looks = []
    is_file = Path.is_file

    def seen_late(path):
        if path.name.startswith("meeting-"):
            looks.append(path)
        return is_file(path) and len(looks) != 1

    monkeypatch.setattr(Path, "is_file", seen_late)
    found, _ = meet()
    assert (found, len(looks)) == ({}, 2)


def test_a_machine_that_still_looks_for_the_folder_ends_with_machine_0(meet):
    found, _ = meet(follower=("elsewhere",))
    assert (type(found["follower"]), str(found["follower"])) == (StageFailed, str(found["leader"]))
    assert str(found["leader"]).startswith("machine 1 of 2, counted from 0, did not come to")


def test_nobody_waits_longer_than_the_timeout(meet):
    port = free_port()
    found, _ = meet(port=port, started=("leader",))
    assert str(found["leader"]) == (
        f"machine 1 of 2, counted from 0, did not come to 127.0.0.1:{port} within 2s; "
        "start the same command there, and look whether that address can be reached from there"
    )
    found, _ = meet(port=port, started=("follower",))
    assert str(found["follower"]) == (
        f"{OTHER} could not reach machine 0 at 127.0.0.1:{port} within 2s (Connection refused); start the same command "
        "there, or correct `launch.rendezvous`"
    )


def test_a_port_that_is_taken_is_named(meet):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        found, _ = meet(port=port, started=("leader",))
    assert str(found["leader"]) == (
        f"`launch.rendezvous`: port {port} cannot be used here (Address already in use); "
        "end the program that uses it, or choose another port"
    )


def test_a_program_of_another_kind_is_sent_away_and_the_machines_meet(meet):
    port = free_port()

    def knock():
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                return stranger.recv(10)
        return None

    thread = threading.Thread(target=knock)
    thread.start()
    found, _ = meet(port=port)
    thread.join()
    assert found == {}


@pytest.fixture
def before_the_follower(monkeypatch):
    """Let some connections reach machine 0 before the follower does, each with a text; keep them open."""
    with contextlib.ExitStack() as opened:

        def call(*texts):
            def reach(*words):
                for text in texts:
                    line = opened.enter_context(contextlib.closing(_reached(*words)))
                    line.socket.sendall(text)
                return _reached(*words)

            monkeypatch.setattr("pipeline.run.following._reached", reach)

        yield call


def greeting(kind="hello", **values):
    return json.dumps({"kind": kind, "rank": 1, "host": "other", "contents": {}, **values}).encode() + b"\n"


STRANGERS = {
    "silent": b"",
    "nested": b"[" * 100_000 + b"\n",
    "no proof": greeting(),
    "wrong proof": greeting(proof="0" * 64),
    "proof not ASCII": greeting(proof="\u00e9" * 64),
    "proof no text": greeting(proof="\ud800"),
    "host no text": greeting(host="\ud800"),
    "other run": greeting("blind"),
    "other rank": greeting("blind", rank=10**4000),
}


def test_strangers_at_the_port_neither_end_nor_delay_the_meeting(meet, before_the_follower):
    before_the_follower(*STRANGERS.values())
    found, views = meet()
    assert found == {}
    assert views["follower"].shown[0][1].startswith("waits for machine 0 at")


@pytest.mark.parametrize(
    "error", [GateClosed("gate failed: x"), StageFailed("stage `pt`: x"), Interrupted("stopped; x")]
)
def test_followers_end_as_the_leader_does(meet, error):
    def lead(group, planned):
        raise error

    found, _ = meet(lead=lead)
    assert found["leader"] is error
    assert (type(found["follower"]), str(found["follower"])) == (type(error), f"{LEADER}: {error}")


def test_a_leader_that_is_lost_is_named(meet):
    def lead(group, planned):
        for follower in group.followers.values():
            follower.line.socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
            follower.line.closed = True

    found, _ = meet(lead=lead)
    assert isinstance(found["follower"], Interrupted)
    assert (
        str(found["follower"]) == f"{LEADER} ended without a word; run the same command on every machine again to go on"
    )


@pytest.fixture
def environment(monkeypatch):
    for name in ("NODE_RANK", "SKYPILOT_NODE_RANK", "SLURM_NODEID", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_environment_says_which_machine_this_is(project, environment):
    project.write("x.yaml", CHAIN)
    planned = build_plan(load_config(Path("x.yaml"), ["launch.machines=2"]), Path("saves"))
    environment.setenv("MASTER_ADDR", "10.0.0.1")
    environment.setenv("MASTER_PORT", "29500")
    for name, value in (("RANK", "0"), ("SLURM_NODEID", "1"), ("NODE_RANK", "0")):  # each before those above it
        environment.setenv(name, value)
        place = here(planned)
        assert (place.rank, place.where) == (int(value), "10.0.0.1:29500")


NAMES = "NODE_RANK, SKYPILOT_NODE_RANK, SLURM_NODEID, PET_NODE_RANK, JOB_COMPLETION_INDEX, RANK"
UNSAID = [
    (
        {},
        f"`launch.rank` is `env`, and none of {NAMES} is set; "
        "set NODE_RANK=0 on the machine that leads, NODE_RANK=1 on the next one, and so on",
    ),
    (
        {"SLURM_NODEID": "2"},
        "`launch.rank` is `env`, and SLURM_NODEID is `2`; with `machines: 2` it wants a number from 0 to 1",
    ),
    (
        {"NODE_RANK": "0", "MASTER_ADDR": "a"},
        "`launch.rendezvous` is `env`, and MASTER_ADDR is `a` and MASTER_PORT is ``; "
        "set them to an address of machine 0, or write `launch: {rendezvous: HOST:PORT}`",
    ),
]


@pytest.mark.parametrize(("variables", "message"), UNSAID)
def test_an_environment_that_does_not_say_it_stops_the_run(project, environment, variables, message):
    for name, value in variables.items():
        environment.setenv(name, value)
    project.write("x.yaml", CHAIN)
    assert cli.main(["run", "x.yaml", "--set", "launch.machines=2"]) == 2
    assert project.capsys.readouterr().err == f"{message}\n"


@pytest.fixture
def line():
    """A line, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = socket.create_connection(server.getsockname())
        with other, contextlib.closing(Line(server.accept()[0])) as line:
            yield line, other


def test_text_that_is_no_message_is_passed_over(line):
    line, other = line
    for text in (
        b"[" * 200_000,
        b'{"kind":' * 50_000,
        b"9" * 5_000,
        b"\xff",
        b"{}",
        b'{"kind": 1}',
        b'{"kind": "hello"}',
    ):
        other.sendall(text + b"\n")
    assert line.next(5) == {"kind": "hello"}


def test_a_message_that_does_not_end_is_not_read_further(line):
    line, other = line

    def send():
        with contextlib.suppress(OSError):
            other.sendall(b"x" * 2 * 2**20)

    thread = threading.Thread(target=send)
    thread.start()
    found, closed = line.next(5), line.closed
    line.close()
    thread.join()
    assert (found, closed) == ({}, True)


def test_what_the_other_end_sent_before_it_was_gone_is_read_after_a_message_could_not_be_sent(line):
    line, other = line
    line.send("step")
    other.sendall(b'{"kind": "failed", "text": "no room"}\n')
    other.close()  # a message was not read, so the kernel resets the connection
    for _ in range(3):
        line.send("step")
    assert line.next(5) == {"kind": "failed", "text": "no room"}
    assert line.new() == []
    assert line.closed


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") == interface_of("::ffff:127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


@pytest.mark.train
def test_a_sigterm_to_every_process_of_a_run_saves_a_checkpoint(tmp_path):
    """As Slurm and systemd send it. No checkpoint was due, so the one that is there was saved because of the signal."""
    words = ["--saves", tmp_path / "saves", "--set", "launch={}", "--set", "sft.trainer.save_steps=1000"]
    command = [sys.executable, "-m", "pipeline.cli", "run", write_config(tmp_path, steps=200), *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        reached(tmp_path / "saves", 3)
        os.killpg(run.pid, signal.SIGTERM)  # the runner, the fork server and the stage
        _, err = run.communicate(timeout=120)
    assert run.returncode == 75
    assert err.rstrip().endswith("of 200; run the same command again to go on")
    assert len(list(tmp_path.glob("saves/sft-*.part/checkpoints/checkpoint-*/complete.json"))) == 1
