"""A model and a question in; its answer out: what a stranger would get.

`ask` does it in a fresh process, so that nothing of the stage that wrote the folder can help. That process is
`python -m stages.model.generation [FOLDER …] < request.json > answer.json`, and all but the model may be left out:

request: `{"model": [base, adapter, …], "messages": […], "max_new_tokens": 128}`
answer:  `{"answer": …, "missing": […]}`
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, str]]
Answer = dict[str, Any]


def ask(model: Sequence[str], messages: Messages = (), *, max_new_tokens: int = 128) -> Answer:
    """Load the model in a fresh process and answer there.

    Returns:
        `answer`: None without messages. `missing`: names of weights that the folder lacks, which transformers then
        makes up.
    """
    request = {"model": list(model), "messages": messages, "max_new_tokens": max_new_tokens}
    return fresh("stages.model.generation", request)


def fresh(module: str, request: Mapping[str, Any]) -> Answer:
    """What a module of ours answers to a request, in a process of its own."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request).encode(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    if done.returncode:
        said = "\n".join(done.stderr.decode(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"a fresh process could not use {request['model']} (exit code {done.returncode}):\n{said}")
    return dict(json.loads(done.stdout))


def respond(request: Mapping[str, Any]) -> Answer:
    """The answer to one request, in this process."""
    model, missing = load(request["model"])
    messages = request.get("messages")
    text = generate(model, request["model"][-1], messages, request.get("max_new_tokens", 128)) if messages else None
    return {"answer": text, "missing": missing}


def load(folders: Sequence[str]) -> tuple[Any, list[str]]:
    """The model ready to answer, on a GPU if there is one, and the names of weights that its folder lacks."""
    import torch

    on_gpu = torch.cuda.is_available()
    if len(folders) > 1:
        from stages.model.folder import load_model

        chain = load_model(folders, dtype="auto")
        return chain.to("cuda" if on_gpu else "cpu"), []
    from transformers import AutoModelForCausalLM

    settings = {"device_map": "auto"} if on_gpu else _without_compiling(Path(folders[0]))
    model, info = AutoModelForCausalLM.from_pretrained(
        folders[0], local_files_only=True, trust_remote_code=False, output_loading_info=True, **settings
    )
    model.eval()
    return model, sorted(info["missing_keys"])


def _without_compiling(folder: Path) -> dict[str, Any]:
    """On a CPU, GPTQModel would compile a kernel for minutes; its plain one gives the same numbers.

    That one unpacks the weights for every token, unless told to keep what it has unpacked.
    """
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    if quantization.get("quant_method") != "gptq":
        return {}
    import torch._dynamo.config
    from transformers import GPTQConfig

    os.environ.setdefault("GPTQ_TORCH_CACHE_WEIGHTS", "1")
    torch._dynamo.config.disable = True
    return {"quantization_config": GPTQConfig(bits=quantization["bits"], backend="torch")}


def generate(model: Any, folder: str, messages: Messages, max_new_tokens: int) -> str:
    """The likeliest answer to a conversation; without a chat template, what follows its last message."""
    import torch
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(messages[-1]["content"], return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def serve_one(respond: Callable[[dict[str, Any]], Answer]) -> None:
    """Read a request, write the answer; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    text = sys.stdin.read()
    request = json.loads(text) if text.strip() else {}
    with answers:
        json.dump(respond(request), answers, ensure_ascii=False)


if __name__ == "__main__":
    serve_one(lambda request: respond(request | ({"model": sys.argv[1:]} if sys.argv[1:] else {})))
