"""A finished run in, the answers of its first, its tuned and its quantized model to one question out.

The answers are stored beside the links of the config, so that the question is asked only once.
"""

import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.plan.step import Plan, Step
from pipeline.run.process import fork
from pipeline.run.worker import to_log
from pipeline.saves import artifact
from pipeline.saves.artifact import LOG
from stages import Model
from stages.runtime import aside
from stages.runtime.processes import end_with_parent

FILE = "answers.json"
MAX_TOKENS = 64  # enough to see whether a model answers the question


def ask_question(plan: Plan) -> dict[str, str]:
    """Name of a model → its answer; empty without a `question` or without a stage that starts from a model."""
    question = plan.pipeline.question
    models = _models(plan)
    if not question or not models:
        return {}
    if stored := stored_answers(plan):
        return stored
    file = _file(plan)
    recorded = {name: _answer_in_record(step, question) for name, step in models.items()}
    answers = {name: answer for name, answer in recorded.items() if answer is not None}
    missing = {name: _folders(plan, step) for name, step in models.items() if name not in answers}
    templates = [step.entry.template for step in _model_steps(plan) if step.entry.template is not None]
    generated = _in_child(missing, question, templates[-1] if templates else None, file.parent)
    answers |= generated or dict.fromkeys(missing, f"(no answer; the log is {file.parent / LOG})")
    answers = {name: answers[name] for name in models if name in answers}
    if generated or not missing:
        content = {"key": _key(plan, models), "answers": answers}
        file.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return answers


def stored_answers(plan: Plan) -> dict[str, str]:
    """Name of a model → its answer to the question, as an earlier run stored it; empty if the models have changed."""
    models = _models(plan)
    stored = _read(_file(plan)) if models and plan.pipeline.question else {}
    return dict(stored["answers"]) if stored and stored.get("key") == _key(plan, models) else {}


def _file(plan: Plan) -> Path:
    return plan.saves / plan.pipeline.name / FILE


def _key(plan: Plan, models: Mapping[str, Step | None]) -> dict[str, Any]:
    """What the stored answers are answers to."""
    identities = {name: _identity(plan, step) for name, step in models.items()}
    return {"question": plan.pipeline.question, "models": identities}


def _models(plan: Plan) -> dict[str, Step | None]:
    """Name → step for the first model, the last one in full precision, and the last quantized one.

    The first model is the first one with the tokenizer of the others. Its step is None if no stage made it. The result
    is empty if no stage starts from a model.
    """
    unquantized = [step for step in _model_steps(plan) if step.entry.bits is None]
    quantized = [step for step in _model_steps(plan) if step.entry.bits is not None]
    trained = [step for step in unquantized if step.entry.start is not None]
    if not trained:
        return {}
    extended = [step for step in unquantized if isinstance(step.stage.leaves, Model) and step.stage.leaves.tokenizer]
    made = extended[-1:] or [step for step in unquantized[:1] if step.entry.start is None]
    first = made[0] if made else None
    models: dict[str, Step | None] = {"the first model": first, f"after {trained[-1].name}": trained[-1]}
    for step in quantized[-1:]:
        models[f"in {step.entry.bits} bits"] = step
    return models


def _model_steps(plan: Plan) -> list[Step]:
    """The steps that leave a model."""
    return [step for step in plan.steps if step.entry.leaves_model]


def _identity(plan: Plan, step: Step | None) -> str:
    """What identifies the model of a step; None means the model that the first step starts from."""
    return step.fingerprint if step is not None else _model_steps(plan)[0].identities["model"]


def _folders(plan: Plan, step: Step | None) -> list[str]:
    """The folders of the model of a step; None means the model that the first step starts from."""
    return step.produces if step is not None else list(_model_steps(plan)[0].inputs.model)


def _answer_in_record(step: Step | None, question: str) -> str | None:
    """The answer that `quantize` recorded when it tried the quantized model; None if it asked another question."""
    metrics = ((artifact.read(step.folder) or {}) if step else {}).get("metrics", {})
    return metrics.get("answer") if metrics.get("question") == question else None


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _in_child(models: dict[str, list[str]], question: str, template: str | None, folder: Path) -> dict[str, str]:
    """Generate the answers in a forked process; empty if that fails.

    `template` is for a model that has no chat template: a base before the first stage that installs one.
    """
    if not models:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = fork(folder / LOG, _generate, models, question, template, str(folder), sender)
    sender.close()
    try:
        answers: dict[str, str] = receiver.recv()
    except EOFError:  # the process has died; its log says why, and the next run asks again
        answers = {}
    finally:  # also after Ctrl-C
        child.kill()
        child.join()
    return answers


def _generate(
    models: dict[str, list[str]],
    question: str,
    template: str | None,
    folder: str,
    pipe: "multiprocessing.connection.Connection",
) -> None:
    end_with_parent()
    aside.bring_back(*aside.OPTIONAL)  # one of the models may be quantized
    from stages.model.facts import read_tokenizer
    from stages.model.folder import tokenizer_folder
    from stages.model.generation import load_engine

    to_log(Path(folder, LOG))
    messages = [{"role": "user", "content": question}]
    answers = {}
    for name, folders in models.items():
        own = read_tokenizer(tokenizer_folder(folders))[2]
        answers[name] = load_engine(folders, template if own is None else None).answer(messages, MAX_TOKENS)
    pipe.send(answers)
