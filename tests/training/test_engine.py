"""Engines that share a model between processes: what they are found to be, and whole weights out of their parts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from stages.runtime.errors import StageError
from stages.training import engine
from stages.training.sharing import Sharing

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
# In two processes on gloo: FSDP2 divides a model with an adapter, trains a step, and the first process saves it.
DIVIDED = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from stages.model.folder import load_model
from stages.training import engine
from stages.training.progress import check_finite
from stages.training.sharing import Sharing
from stages.runtime.errors import StageError

base, out, lora = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "lora"
torch.distributed.init_process_group("gloo")
first = torch.distributed.get_rank() == 0
model = load_model([str(base)])
if lora:
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
mesh = init_device_mesh("cpu", (2,))
inner = model.get_base_model() if lora else model
for layer in inner.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
engine.check_engine(model, Sharing(processes=2, strategy="fsdp2"))
try:
    engine.check_engine(model, Sharing(processes=2, strategy="zero3"))
except StageError as error:
    (out / f"refused-{torch.distributed.get_rank()}").write_text(str(error))
optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
ids = torch.arange(32).reshape(2, 16) + 8
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
check_finite(model, 1)
whole = engine.gathered(model, model)
assert (whole is not None) == first
expected = engine.shapes_of(model)
if first:
    model.save_pretrained(out, state_dict=whole)
    engine.check_whole(out, expected)
broken = next(weight for weight in model.parameters() if weight.requires_grad)
if not first:  # in the part of the second process alone
    broken.data.to_local().fill_(float("nan"))
try:
    check_finite(model, 2)
except StageError as error:
    (out / f"nan-{torch.distributed.get_rank()}").write_text(str(error))
torch.distributed.barrier()
"""


def in_two_processes(program: str, *words: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common |= {"PIPELINE_LAUNCHED": '{"processes": 2, "strategy": "fsdp2"}'}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fsdp_2_leaves_the_whole_files_of_one_process(tiny, tmp_path, kind):
    import torch
    from peft import LoraConfig, get_peft_model

    from stages.model.folder import load_model

    in_two_processes(DIVIDED, str(tiny("llama")), str(tmp_path), kind)
    model = load_model([str(tiny("llama"))])
    if kind == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    ids = torch.arange(32).reshape(2, 16) + 8
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "one")
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / name)
    assert one.keys() == two.keys()
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, atol=1e-6, rtol=0)
    said = "`launch` asks for ZeRO-3 of DeepSpeed, and accelerate made it PyTorch's FSDP2; use another `strategy`"
    assert [(tmp_path / f"refused-{rank}").read_text() for rank in range(2)] == [said, said]
    broken = {(tmp_path / f"nan-{rank}").read_text() for rank in range(2)}
    assert len(broken) == 1  # both stop, with the same sentence
    assert "is not finite after step 2" in broken.pop()


def test_an_adapter_without_its_weights_is_refused(tiny, tmp_path):
    """What ZeRO-3 left of an adapter where its parts were not gathered (trl#4416): a file with empty tensors."""
    import torch
    from peft import LoraConfig, get_peft_model

    from stages.model.folder import load_model

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model([str(tiny("llama"))]), lora)
    model.save_pretrained(tmp_path)
    expected, file = engine.shapes_of(model), tmp_path / "adapter_model.safetensors"
    engine.check_whole(tmp_path, expected)
    weights = load_file(file)
    first = next(iter(weights))
    save_file({**weights, first: torch.empty(0)}, file)
    with pytest.raises(StageError, match="weights that were written are not those of the model") as refused:
        engine.check_whole(tmp_path, expected)
    assert f"`{first}` has the shape (0,) and the model has {expected[first]}; run again" in str(refused.value)
    save_file({}, file)
    with pytest.raises(StageError, match="its files have 0 numbers and the model has 1,024; run again"):
        engine.check_whole(tmp_path, expected)


def test_one_process_where_two_are_asked_for_is_an_error():
    import torch

    with pytest.raises(StageError) as refused:
        engine.check_engine(torch.nn.Linear(2, 2), Sharing(processes=2))
    assert str(refused.value) == "`launch` asks for 2 processes, and 1 train; run again"
    engine.check_engine(torch.nn.Linear(2, 2), Sharing())
