"""A model and a question in; its answer, and its perplexity on given tokens, out: what a stranger would get.

`ask` does it in a fresh process, so that nothing of the stage that wrote the folder can help. That process is
`python -m stages._generate [FOLDER …] < request.json > answer.json`, and all but the model may be left out:

request: `{"model": [base, adapter, …], "messages": […], "max_new_tokens": 128, "texts": [[ids], …]}`
answer:  `{"answer": …, "perplexity": …, "tokens": …, "missing": […]}`
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, str]]
Answer = dict[str, Any]
CHUNK = 256  # positions whose float32 logits are in memory at once; a row of 250,000 logits takes 1 MB


def ask(
    model: Sequence[str],
    messages: Messages = (),
    *,
    max_new_tokens: int = 128,
    texts: Sequence[Sequence[int]] = (),
) -> Answer:
    """Load the model in a fresh process and answer there.

    Returns:
        `answer`: None without messages. `perplexity` and `tokens`: None and 0 without texts. `missing`: names
        of weights that the folder lacks, which transformers then makes up.
    """
    request = {"model": list(model), "messages": messages, "max_new_tokens": max_new_tokens, "texts": texts}
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "stages._generate"],
        input=json.dumps(request).encode(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    if done.returncode:
        said = "\n".join(done.stderr.decode(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"a fresh process could not use {list(model)} (exit code {done.returncode}):\n{said}")
    return dict(json.loads(done.stdout))


def respond(request: Mapping[str, Any]) -> Answer:
    """The answer to one request, in this process."""
    model, missing = load(request["model"])
    told = perplexity(model, request.get("texts") or [])
    messages = request.get("messages")
    text = generate(model, request["model"][-1], messages, request.get("max_new_tokens", 128)) if messages else None
    return {"answer": text, "perplexity": told[0] if told[1] else None, "tokens": told[1], "missing": missing}


def load(folders: Sequence[str]) -> tuple[Any, list[str]]:
    """The model ready to answer, on a GPU if there is one, and the names of weights that its folder lacks."""
    import torch

    on_gpu = torch.cuda.is_available()
    if len(folders) > 1:
        from stages import _model

        chain = _model.load(folders, dtype="auto")
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


def perplexity(model: Any, texts: Iterable[Sequence[int]]) -> tuple[float, int]:
    """exp of the mean loss over all tokens but each row's first, and how many tokens that is."""
    import torch

    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([text], device=model.device)
        with torch.inference_mode():
            logits, targets = model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:]
            for start in range(0, len(targets), CHUNK):
                part = slice(start, start + CHUNK)
                loss = torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="sum")
                total += float(loss)
        count += len(targets)
    mean = total / max(count, 1)
    return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan, count


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


def main() -> None:
    """Read the request, write the answer; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    text = sys.stdin.read()
    request = json.loads(text) if text.strip() else {}
    if sys.argv[1:]:
        request["model"] = sys.argv[1:]
    with answers:
        json.dump(respond(request), answers, ensure_ascii=False)


if __name__ == "__main__":
    main()
