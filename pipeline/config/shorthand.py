"""Shorthand in a config, written out: `evaluate: …` in a stage and `add_tokens: …` at the top become stages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.config.problems import Problems
from stages import Model, Report, find, kinds
from stages.model.references import Role


def kind_of(name: str, raw: Any) -> str:
    """The kind of a stage as it is written: `use`, else its name."""
    return str(raw.get("use", name)) if isinstance(raw, dict) else name


def at_top() -> dict[str, str]:
    """Kinds of stage that are written at the top of a file, and the setting of each that a plain value stands for."""
    found = {kind: find(kind).at_top for kind in kinds()}
    return {kind: setting for kind, setting in found.items() if setting is not None}


def place_top(root: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The document with a stage for each kind that is written at the top.

    The stage comes before the first stage that starts from a model. It starts from the model at the top, and what it
    leaves takes the place of that model.
    """
    placed = dict(root)
    for kind, setting in at_top().items():
        written, given = placed.get("stages"), root.get(kind)
        if given is None or not isinstance(written, dict):
            continue
        if kind in written:
            problems.at_key(
                (kind,), f"`{kind}` becomes the stage `{kind}`, which is here already; remove one of the two"
            )
            continue
        problems.document.move((kind,), ("stages", kind))
        if not isinstance(given, dict):
            problems.document.move((kind,), ("stages", kind, setting))
        stage = dict(given) if isinstance(given, dict) else {setting: given}
        names = list(written)
        first = names[: bool(names) and _makes_model(names[0], written[names[0]])]
        # Its tokenizer lacks the marks of the template at the top, which later stages install.
        before = {name: {"template": None, **(written[name] or {})} for name in first}
        model = placed.get("model")
        if model is not None and not before and "model" not in stage:
            stage["model"], placed["model"] = model, f"${kind}"
            problems.document.move(("model",), ("stages", kind, "model"))
        placed["stages"] = before | {kind: stage} | {name: raw for name, raw in written.items() if name not in before}
    return placed


def _makes_model(name: str, raw: Any) -> bool:
    """Whether a stage leaves a model that starts from no other model."""
    use = kind_of(name, raw or {})
    return use in kinds() and isinstance(find(use).leaves, Model) and find(use).setting(Role.START) is None


def write_out(root: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The stages of a document with each report that stands inside a stage as a stage right below it.

    `evaluate: …` in a stage that leaves a model is such a report; it compares what the stage leaves with what it starts
    from. The places of its settings in the document are noted under the new stage, too.
    """
    written = root.get("stages")
    if not isinstance(written, dict):
        return {}
    reports = [kind for kind in kinds() if isinstance(find(kind).leaves, Report)]
    placed: dict[str, Any] = {}
    models = ["base"] if isinstance(root.get("model"), str) else []
    for name, raw in written.items():
        placed[name] = raw
        use = kind_of(name, raw)
        if use not in kinds() or not isinstance(find(use).leaves, Model):
            continue
        for report in reports if isinstance(raw, dict) else ():
            if report in raw:
                placed[name] = {key: value for key, value in placed[name].items() if key != report}
                below = f"{name}_{report}"
                if below in written:
                    text = f"stage `{name}`: its `{report}` becomes the stage `{below}`, which is here already"
                    problems.at_key(("stages", name, report), text)
                placed[below] = _report(report, name, raw, models, problems)
                problems.document.move(("stages", name, report), ("stages", below))
                if not isinstance(raw[report], dict):
                    problems.document.move(("stages", name, report), ("stages", below, "data"))
        models.append(name)
    return placed


def _report(kind: str, name: str, raw: Mapping[str, Any], models: Sequence[str], problems: Problems) -> dict[str, Any]:
    """The settings of the report after a stage."""
    given, model = raw[kind], raw.get("model")
    start = list(models[-1:]) if model is None else [one for one in models if model == f"${one}"]
    if not isinstance(given, str | list | dict):
        text = f"stage `{name}`: `{kind}` names held-out data, such as `{kind}: consult_held`, or has settings"
        problems.at_value(("stages", name, kind), text)
        given = {"prompts": ["?"]}
    settings = given if isinstance(given, dict) else {"data": given}
    compare = find(kind).setting(Role.COMPARED) or "compare"
    return {"use": kind, compare: [*start, name], **settings}


class Above:
    """The stages above a stage, by what they leave. A stage of an unknown kind may leave anything."""

    def __init__(self, written: Mapping[str, Any]) -> None:
        self.written = written

    def names(self, stage: str, wanted: Callable[[Any], bool] = lambda leaves: True) -> list[str]:
        """The names of the stages above, in order; with `wanted`, of those whose `leaves` it accepts."""
        names = list(self.written)
        above = names[: names.index(stage)]
        uses = {name: kind_of(name, self.written[name] or {}) for name in above}
        return [name for name, use in uses.items() if use not in kinds() or wanted(find(use).leaves)]

    def leaving(self, stage: str, kind: type) -> list[str]:
        """The stages above that leave something of a kind."""
        return self.names(stage, lambda leaves: isinstance(leaves, kind))

    def models(self, stage: str) -> list[str]:
        """The stages above that leave a model. A stage starts from the last of them."""
        return self.leaving(stage, Model)

    def is_below(self, name: str, stage: str) -> bool:
        """Whether there is a stage of this name that is not above."""
        return name in self.written and name not in self.names(stage)
