"""What accelerate and DeepSpeed are told, and which process is said to have ended first."""

import os
import socket

import pytest

from pipeline.config.pipeline import Launch
from pipeline.errors import StageFailed
from pipeline.run.launch import Launched, Place, configs, first_ended


def settings(gpu=True, **launch):
    return configs(Launch(**launch), gpu=gpu)


def test_the_settings_are_those_of_all_machines_and_name_none_of_them():
    found = settings(processes=4, machines=2, rank=1, rendezvous="10.0.0.1:29500")
    assert found == settings(processes=4, machines=2, rank=0, rendezvous="node0:1")
    assert list(found) == ["launch.json"]
    assert (found["launch.json"]["num_processes"], found["launch.json"]["num_machines"]) == (8, 2)
    assert found["launch.json"]["distributed_type"] == "MULTI_GPU"


@pytest.mark.parametrize(
    ("launch", "zero"),
    [
        ({"strategy": "zero2"}, {"stage": 2}),
        ({"strategy": "zero2", "offload": "optimizer"}, {"stage": 2, "offload_optimizer": "cpu"}),
        ({"strategy": "zero3"}, {"stage": 3}),
        ({"strategy": "zero3", "offload": "optimizer"}, {"stage": 3, "offload_optimizer": "cpu"}),
        (
            {"strategy": "zero3", "offload": "parameters"},
            {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        ),
    ],
)
def test_deepspeed_divides_and_offloads_what_is_asked_for(launch, zero):
    found = settings(processes=2, **launch)
    assert found["launch.json"]["distributed_type"] == "DEEPSPEED"
    made = found["deepspeed.json"]["zero_optimization"]
    offloads = {name: value["device"] for name, value in made.items() if name.startswith("offload")}
    assert {"stage": made["stage"], **offloads} == zero


@pytest.mark.parametrize("offload", [None, "parameters"])
def test_fsdp_is_version_2_and_offloads_only_what_is_asked_for(offload):
    found = settings(processes=2, strategy="fsdp2", offload=offload)["launch.json"]
    assert found["distributed_type"] == "FSDP"
    assert found["fsdp_config"]["fsdp_version"] == 2
    assert found["fsdp_config"]["fsdp_offload_params"] is (offload is not None)


def test_a_port_that_another_program_uses_is_named_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch = Launch(machines=2, rank=0, rendezvous=f"127.0.0.1:{port}")
        with pytest.raises(StageFailed) as refused:
            Launched(launch, tmp_path, Place(0, "127.0.0.1", port))
    assert str(refused.value) == (
        f"`launch.rendezvous`: port {port} cannot be used here (Address already in use); end the program that uses it, "
        "or choose another port"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def environment_of(tmp_path, monkeypatch):
    """Start the launcher, which only shows its environment; returns that."""

    def call(launch):
        program = tmp_path / "python"
        program.write_text("#!/bin/sh\nenv\n")
        program.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(program))
        launched = Launched(launch, tmp_path)
        launched.wait(30)
        assert launched.exit_code() == 0
        return dict(line.partition("=")[::2] for line in (tmp_path / "log.txt").read_text().splitlines())

    return call


def test_a_launcher_around_the_run_does_not_set_options_of_ours(environment_of, monkeypatch):
    names = ["PET_NNODES", "PET_NODE_RANK", "PET_NPROC_PER_NODE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MINE"]
    for name in names:
        monkeypatch.setenv(name, "2")
    found = environment_of(Launch(processes=2))
    assert [name for name in names if name in found] == ["MINE"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux gives a process some of the cores")
def test_the_processes_divide_the_cores_that_the_run_may_use(environment_of, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert environment_of(Launch(processes=1))["OMP_NUM_THREADS"] == "1"
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(
    ("codes", "first", "expected"),
    [
        ({1: -9}, 1, 1),
        ({0: 1, 1: -9}, 0, 1),  # the first process only saw that the other was silent
        ({0: 1, 1: -15}, 0, 0),  # torchrun ended the other
        ({0: 1, 1: 1}, 1, 1),
        ({0: -11, 1: -9}, 1, 1),
    ],
)
def test_the_process_that_a_signal_ended_is_the_cause(codes, first, expected):
    assert first_ended(codes, first) == expected
