"""Tiny models made on the spot and rows of this project's own data: no network, no GPU, no luck."""

import gc
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import fresh
import planned
import pytest
import typer.main
from fake_hub import FakeHub

from pipeline.run import process
from stages import init
from stages.chat.template import template_text
from stages.data.source import Source
from stages.model.folder import carried_files, load_model
from stages.model.inputs import Inputs
from stages.training import loop

# A shell that starts the tests in the background ignores these signals for them, and tests send them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

process.PRELOAD.append("warm")  # so that each stage of a run in a test takes a second less
# The commands are built once: they differ only by this variable, which tests of shell completion set.
SHELLS = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"
get_command = cache(lambda app, _, build=typer.main.get_command: build(app))
typer.main.get_command = lambda app: get_command(app, os.environ.get(SHELLS))

DATA = Path(__file__).parent.parent / "data"
FILES = {"alpaca": "med_qa.json", "text": "med_book.jsonl", "preference": "med_prefer.jsonl"}
# A few steps at a rate that shows; a checkpoint or recomputed activations would only cost time.
QUICK = {
    "learning_rate": 1e-2,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "max_length": 512,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture(autouse=True)
def _without_estimates(request, monkeypatch):
    """Plans are made without estimates, whose process loads torch, but for the tests that use `estimates_computed`."""
    if "estimates_computed" not in request.fixturenames:
        monkeypatch.setattr("pipeline.plan.estimate.estimates", lambda *_: {})


@pytest.fixture(scope="module")
def estimates_computed():
    """Plans are made with estimates."""


# Files that take minutes: they come first, so that none of two processes waits for the other at the end.
LONG = (
    "run/test_faults.py",
    "training/test_resume.py",
    "run/test_launch.py",
    "training/test_sharing.py",
    "run/test_run.py",
    "stages/test_quantize.py",
    "training/test_kto.py",
    "training/test_reward.py",
    "training/test_needs.py",
    "stages/test_gates_run.py",
)


def pytest_collection_modifyitems(items):
    names = {item.path: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}
    items.sort(key=lambda item: LONG.index(names[item.path]) if names[item.path] in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(request, monkeypatch):
    """Files of tests without torch need not outlast a power cut; a descriptor that is not open is still an error."""
    if "train" not in request.keywords:
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect():
    """The garbage collector leaves alone what was imported before a module: a trainer collects when it ends."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Call a function in a process like the one that a stage runs in; GPTQModel patches what it imports."""
    process._warm(tmp_path_factory.mktemp("server") / "log.txt")
    forked = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=forked, initializer=fresh.fresh_quality) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return planned.Project(tmp_path, capsys)


@pytest.fixture
def hub(project, monkeypatch):
    """A small Hub on the loopback address, which this process and its children use, with an empty cache."""
    with FakeHub().running() as hub:
        hub.use(monkeypatch, project.folder)
        yield hub


@pytest.fixture(scope="session")
def rows():
    """The first rows of this project's own data, as a stage names them."""

    def source(kind, count):
        return Source(path=str(DATA / FILES[kind]), format=kind, max_samples=count)

    return source


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, rows):
    """The folder of an untrained model, made once a kind; `template` is a built-in name or None."""
    import torch

    torch.set_num_threads(1)  # two threads wait for each other: 4 steps take 7 s instead of 1 s on two busy cores
    made = {}

    def model(architecture, *, tied=True, template="med"):
        key = (architecture, tied, template)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(architecture)
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 600}
            config = init.Config(
                architecture=architecture,
                data=[rows("alpaca", 40), rows("text", 20)],
                tie_word_embeddings=tied,
                template=template and template_text(template),
                **sizes,
            )
            init.run(config, Inputs(), made[key])
        return made[key]

    return model


@pytest.fixture(scope="session")
def train(tmp_path_factory, tiny):
    """Run a training stage in this process; hands out its folder, its metrics and the trainer that it built.

    LoRA of rank 4 unless `lora=None`; `trainer` comes over a few quick steps; `callback` sees every step. Looking for
    installed packages, and writing model cards that no stage keeps, would take a third of such a run.
    """
    from accelerate.utils import imports
    from peft import PeftModel
    from trl.trainer.base_trainer import _BaseTrainer

    is_available = cache(imports._is_package_available)
    gc.freeze()

    def run(stage, model, data, *, out=None, callback=None, trainer=None, **settings):
        folder = out or tmp_path_factory.mktemp("saves") / stage.__name__.rpartition(".")[2]
        folder.mkdir(exist_ok=True)
        settings = {"lora": {"r": 4}, **settings, "trainer": {**QUICK, **(trainer or {})}}
        config = stage.Config(model="base", data=[data], **settings)
        real, seen, handler = loop.train, [], signal.getsignal(signal.SIGTERM)

        def train(built, *arguments):
            seen.append(built)
            if callback:
                built.add_callback(callback)
            return real(built, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train", train)
            patch.setattr(imports, "_is_package_available", is_available)
            patch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)
            patch.setattr(_BaseTrainer, "create_model_card", lambda *_, **__: None)
            try:
                metrics = stage.run(config, Inputs(model=list(map(str, model))), folder)
            finally:
                signal.signal(signal.SIGTERM, handler)  # a stage takes it over
        return SimpleNamespace(out=folder, metrics=metrics, trainer=seen[0])

    return run


@pytest.fixture(scope="session")
def foreign(tmp_path_factory, tiny):
    """The folder of an untrained model of an architecture that `init` does not make: GPT-2, or a mixture of experts."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen3MoeConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 600}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 16,
        "num_key_value_heads": 2,
    }

    @cache
    def model(architecture, tied=True):
        kinds = {"gpt2": (GPT2Config, {}), "qwen3_moe": (Qwen3MoeConfig, experts)}
        kind, own = kinds[architecture]
        folder = tmp_path_factory.mktemp(architecture)
        torch.manual_seed(0)
        config = kind(**sizes, **ids, **own, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for path in carried_files(tiny("llama")):
            if path.name != "generation_config.json":
                shutil.copy(path, folder)
        return folder

    return model


@pytest.fixture(scope="session")
def adapt(tmp_path_factory, tiny):
    """The folder of an adapter on a chain, as training leaves it, with random weights in place of trained ones."""

    def adapter(chain, seed=0, **lora):
        import torch
        from peft import LoraConfig, get_peft_model

        folder = tmp_path_factory.mktemp("adapter")
        torch.manual_seed(seed)
        settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
        model = get_peft_model(load_model(list(map(str, chain))), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        for path in carried_files(chain[-1]):
            shutil.copy(path, folder)
        return folder

    return adapter


@pytest.fixture(scope="session")
def at():
    """A callback that does something with the model when a step is reached."""

    def callback(step, event, action):
        from transformers import TrainerCallback

        def hook(self, args, state, control, **others):
            if state.global_step == step:
                action(others["model"])

        return type("Callback", (TrainerCallback,), {event: hook})()

    return callback


@pytest.fixture(scope="session")
def stop():
    """What the runner does to stop a stage, as an action for `at`."""
    return lambda model: signal.raise_signal(signal.SIGTERM)
