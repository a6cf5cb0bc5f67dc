"""One question answered by the first, the tuned and the 4-bit model of a finished run; asked once, then remembered."""

import json
import multiprocessing
from pathlib import Path

from pipeline.plan.step import Plan, Step
from pipeline.run.process import warm
from pipeline.run.worker import to_log
from pipeline.saves import artifact
from pipeline.saves.artifact import LOG

FILE = "answers.json"
TOKENS = 64  # enough to see whether it answers; a full answer is what `chat` is for


def ask_question(plan: Plan) -> dict[str, str]:
    """Model name → answer; empty without a `question` in the config or when the models are not chat models."""
    question = plan.pipeline.question
    models = _models(plan)
    if not question or not models:
        return {}
    file = plan.saves / plan.pipeline.name / FILE
    key = {"question": question, "models": {name: _identity(plan, step) for name, step in models.items()}}
    known = _read(file)
    if known.get("key") == key:
        return dict(known["answers"])
    answers = {name: recorded for name, step in models.items() if (recorded := _recorded(step, question)) is not None}
    missing = {name: _folders(plan, step) for name, step in models.items() if name not in answers}
    generated = _in_child(missing, question, file.parent)
    answers |= generated or dict.fromkeys(missing, f"(no answer; the log is {file.parent / LOG})")
    answers = {name: answers[name] for name in models if name in answers}
    if generated or not missing:
        file.write_text(json.dumps({"key": key, "answers": answers}, ensure_ascii=False, indent=1), encoding="utf-8")
    return answers


def _models(plan: Plan) -> dict[str, Step | None]:
    """The first model (None: one that no stage made), the last one in full precision, and the quantized one."""
    made = [step for step in _modelled(plan) if step.entry.bits is None]
    quantized = [step for step in _modelled(plan) if step.entry.bits is not None]
    trained = [step for step in made if step.entry.start is not None]
    if not trained:
        return {}
    first = made[0] if made[0].entry.start is None else None
    models: dict[str, Step | None] = {"the first model": first, f"after {trained[-1].name}": trained[-1]}
    for step in quantized[-1:]:
        models[f"in {step.entry.bits} bits"] = step
    return models


def _modelled(plan: Plan) -> list[Step]:
    """The steps that leave a model."""
    return [step for step in plan.steps if step.entry.leaves_model]


def _identity(plan: Plan, step: Step | None) -> str:
    return step.fingerprint if step is not None else _modelled(plan)[0].identities["model"]


def _folders(plan: Plan, step: Step | None) -> list[str]:
    return step.produces if step is not None else list(_modelled(plan)[0].inputs.model)


def _recorded(step: Step | None, question: str) -> str | None:
    """What `quantize` was answered when it tried its own result."""
    metrics = ((artifact.read(step.folder) or {}) if step else {}).get("metrics", {})
    return metrics.get("answer") if metrics.get("question") == question else None


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _in_child(models: dict[str, list[str]], question: str, folder: Path) -> dict[str, str]:
    """Generate in a forked process; empty when that fails."""
    if not models:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    warm(folder / LOG)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_generate, args=(models, question, str(folder), theirs))
    child.start()
    theirs.close()
    try:
        answers: dict[str, str] = ours.recv()
    except EOFError:  # it died; its log says why, and the next run asks again
        answers = {}
    child.join()
    return answers


def _generate(
    models: dict[str, list[str]], question: str, folder: str, pipe: "multiprocessing.connection.Connection"
) -> None:
    from stages.model.generation import load_engine

    to_log(Path(folder, LOG))
    messages = [{"role": "user", "content": question}]
    answers = {name: load_engine(folders).answer(messages, TOKENS) for name, folders in models.items()}
    pipe.send(answers)
