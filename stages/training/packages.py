"""Packages and GPUs that settings under `trainer:` need, asked before anything is loaded.

Which optimizer needs which package is read from the source of the installed transformers, so no name is missed.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from stages.model.device import has_gpu
from stages.runtime import aside
from stages.runtime.errors import Problem
from stages.runtime.interfaces import source

OWN = ("torch", "transformers")  # packages that are always there
INSTALLED_AS = {"optimi": "torch-optimi", "flash_attn_interface": "flash-attn-3", "azureml": "azureml-core"}
"""Module → the name that pip knows, where that is not the name of the module."""
TRACKERS = {"azure_ml": "azureml", "flyte": "flytekit", "tensorboard": "tensorboard tensorboardX"}
"""Trackers whose name is not that of their module; one of several modules is enough."""
BUILT_IN = ("all", "none", "kubeflow")  # values of `report_to` that name no package
ATTENTION = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}
"""Values of `attn_implementation` → the module that has the kernel."""
ON_GPUS_ONLY = ("galore_adamw_8bit", "galore_adamw_8bit_layerwise", "adalomo")
"""Optimizers that have no CPU version (tried with galore-torch 1.0 and lomo-optim 0.1.1).

bitsandbytes has one for all of its optimizers, paged or not, since 0.50.
"""
QUANTIZED = {"load_in_4bit": "nf4", "load_in_8bit": "int8", "quantization_config": "nf4"}
"""Settings under `model_init_kwargs` → the value of `quantized_base` for them."""


def needed(trainer: Mapping[str, Any], quantized_base: str | None) -> set[str]:
    """Packages that the training libraries import for some settings alone."""
    found = {"bitsandbytes"} if quantized_base else set()
    optimizer = optimizer_packages().get(str(trainer["optim"])) if "optim" in trainer else None
    if optimizer is None:
        return found
    own = optimizer in aside.OPTIONAL
    return found | {optimizer} | (set() if own else {*aside.OPTIONAL})  # such a package may import any of them


def check(trainer: Mapping[str, Any]) -> list[Problem]:
    """Settings that need a package that is not installed, or a GPU that is not there."""
    optimizer, reports = str(trainer.get("optim")), trainer.get("report_to")
    problems = _lacking("optim", optimizer, optimizer_packages().get(optimizer, ""))
    for name in reports if isinstance(reports, list) else [reports]:
        if isinstance(name, str) and name not in BUILT_IN:
            problems += _lacking("report_to", name, TRACKERS.get(name, name))
    if trainer.get("use_liger_kernel"):
        problems += _lacking("use_liger_kernel", "use_liger_kernel", "liger_kernel", gpu="Triton kernels")
    if optimizer in ON_GPUS_ONLY:
        problems += _without_gpu("optim", optimizer)
    if trainer.get("activation_offloading"):  # TRL asks for an accelerator, of which there is none
        problems += _without_gpu("activation_offloading", "activation_offloading")
    if trainer.get("fp16"):
        problems += _without_gpu("fp16", "fp16", "write `bf16: true`, or remove it")
    return problems + _check_model_settings(trainer.get("model_init_kwargs") or {})


def _check_model_settings(settings: Mapping[str, Any]) -> list[Problem]:
    """Settings with which the model is loaded."""
    problems: list[Problem] = []
    for name, method in QUANTIZED.items():
        if settings.get(name):
            text = f"the base is quantized before it is loaded; write `quantized_base: {method}` in the stage instead"
            problems.append((f"trainer.model_init_kwargs.{name}", f"`{name}`: {text}"))
    kernel = str(settings.get("attn_implementation")).rpartition("|")[2]
    if kernel in ATTENTION:
        problems += _lacking("model_init_kwargs.attn_implementation", kernel, ATTENTION[kernel], gpu="kernels")
    elif "/" in kernel:
        problems += _lacking("model_init_kwargs.attn_implementation", kernel, "kernels")
    if settings.get("use_kernels"):
        problems += _lacking("model_init_kwargs.use_kernels", "use_kernels", "kernels")
    return problems


def _lacking(setting: str, word: str, modules: str, gpu: str = "") -> list[Problem]:
    """The problem where none of some modules, with blanks between them, is installed, or no GPU is there."""
    names = modules.split()
    if names and not any(find_spec(name) is not None for name in names):
        package = INSTALLED_AS.get(names[0], names[0].replace("_", "-"))
        text = f"`{word}` needs a package; `pip install {package}`, or remove it"
        return [(f"trainer.{setting}", text)]
    return _without_gpu(setting, word) if gpu else []


def _without_gpu(setting: str, word: str, advice: str = "remove it") -> list[Problem]:
    if has_gpu():
        return []
    return [(f"trainer.{setting}", f"`{word}` needs a GPU, and torch finds none here; {advice}")]


# Optimizers, from the source of transformers


@cache
def optimizer_packages() -> dict[str, str]:
    """Name of an optimizer → the module that transformers imports for it; only those that need one."""
    found = {}
    for name, function in _handlers().items():
        modules = [node.module or "" for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
        others = [module.partition(".")[0] for module in modules if module.partition(".")[0] not in OWN]
        if others:
            found[name] = others[0]
    return found


@cache
def optimizer_arguments() -> dict[str, frozenset[str] | None]:
    """Name of an optimizer → the keys of `optim_args` that transformers reads for it; None where it takes any key."""
    return {name: _arguments(function) for name, function in _handlers().items()}


def _arguments(function: ast.FunctionDef) -> frozenset[str] | None:
    text = ast.unparse(function)
    if re.search(r"= ctx\.optim_args$", text, re.M):
        return None  # it passes all of them on
    loops = re.findall(r"for key in \((.*)\):\n +if key in ctx\.optim_args", text)
    read = r"optim_args(?:\.get\(|\.pop\(|\[)'(\w+)'|'(\w+)' in ctx\.optim_args"
    named = [word for pair in re.findall(read, text) for word in pair if word]
    return frozenset([*named, *re.findall(r"'(\w+)'", " ".join(loops))])


@cache
def _handlers() -> dict[str, ast.FunctionDef]:
    """Name of an optimizer → the function in transformers that builds it; empty for another layout of its source."""
    tree = ast.parse(source("transformers", "trainer_optimizer.py"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    tables = {ast.unparse(target): value for target, value in _assigned(tree)}
    values = dict(re.findall(r'^    ([A-Z]\w*) = "(\w+)"', source("transformers", "training_args.py"), re.M))
    found = {}
    table = tables.get("_OPTIMIZER_HANDLERS")
    for key, value in zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else ():
        names, handler = (ast.unparse(key), value) if key is not None else ("", value)
        if isinstance(value, ast.Call):  # **dict.fromkeys(NAMES, handler)
            names, handler = ast.unparse(tables.get(ast.unparse(value.args[0]), value)), value.args[1]
        for word in re.findall(r"OptimizerNames\.(\w+)", names):
            if word in values and ast.unparse(handler) in functions:
                found[values[word]] = functions[ast.unparse(handler)]
    return found


def _assigned(tree: ast.Module) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The variables of a module and their values."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value
