"""The JSON Schema (draft 2020-12) of a config: every stage, and every setting of TRL, PEFT and GPTQModel.

Editors that know YAML complete and check with it. It accepts what `validate` accepts; what needs the data, the models
or two settings together is left to `validate`.
"""

import ast
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from pipeline.config.checker import NAME
from pipeline.config.library_names import MANAGED
from pipeline.config.pipeline import Card, Launch
from pipeline.config.settings import json_type, settings
from pipeline.config.shorthand import at_top
from stages import Model, Stage, find, kinds
from stages.chat.template import template_names
from stages.data.source import Source
from stages.measuring.gates import Gate
from stages.model.references import Role

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

_NAME = "^" + NAME.pattern.removesuffix(r"\Z") + "$"
_NAMES: Schema = {"type": "array", "items": {"type": "string"}}
_NAME_OR_NAMES: Schema = {"anyOf": [{"type": "string"}, _NAMES]}
_WEIGHTS: Schema = {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}
_MIXTURE: Schema = {"anyOf": [*_NAME_OR_NAMES["anyOf"], _WEIGHTS]}
_BY_ROLE: Mapping[Role, Schema] = {
    Role.START: _NAME_OR_NAMES,
    Role.MIXTURE: _MIXTURE,
    Role.SOURCES: _NAME_OR_NAMES,
    Role.NAMED: _MIXTURE,
    Role.PROMPTS: _NAME_OR_NAMES,
    Role.COMPARED: {"anyOf": [*_NAME_OR_NAMES["anyOf"], {"type": "object"}]},
}
"""What a user writes where the config of a stage holds models or data; other roles take a name."""


def schema() -> Schema:
    """The schema of a whole file."""
    definitions: dict[str, Schema] = {}
    for kind in kinds():
        definitions[kind] = _stage(find(kind), definitions)
    definitions["source"] = _source(definitions)
    top = {
        "model": {**_NAME_OR_NAMES, "description": "A folder, NAME@COMMIT on the Hub, or a base and its adapters."},
        "template": _template(),
        "data": {
            "type": "object",
            "description": "Data sets by name.",
            "patternProperties": {_NAME: {"$ref": "#/$defs/source"}},
            "additionalProperties": False,
        },
        "stages": _stages(definitions),
        "launch": _model(Launch, definitions),
        "seed": {"type": "integer", "description": "Of every random draw."},
        "question": {"type": "string", "description": "Asked of the models at the end of a run."},
        "card": _model(Card, definitions),
    }
    for kind, setting in at_top().items():
        plain = definitions[kind]["properties"][setting]
        top[kind] = {"anyOf": [plain, {"$ref": f"#/$defs/{kind}"}]}
    return {
        "$schema": DIALECT,
        "title": "Stagewise",
        "type": "object",
        "properties": top,
        "patternProperties": {"^x-": True},
        "additionalProperties": False,
        "required": ["stages"],
        "$defs": definitions,
    }


def _template() -> Schema:
    return {
        "anyOf": [{"enum": [*template_names(), None]}, {"type": "string", "pattern": r"\.(jinja|json)$"}],
        "description": "The chat template: a built-in one, a .jinja file or a prompt-template .json file.",
    }


def _stages(definitions: Mapping[str, Schema]) -> Schema:
    """A stage by the name of its kind, or by any name with `use`."""
    by_use = [
        {"if": {"properties": {"use": {"const": kind}}, "required": ["use"]}, "then": {"$ref": f"#/$defs/{kind}"}}
        for kind in kinds()
    ]
    named = {
        kind: {
            "type": "object" if definitions[kind]["required"] else ["object", "null"],
            "if": {"type": "object", "required": ["use"]},
            "then": {"allOf": by_use},
            "else": {"$ref": f"#/$defs/{kind}"},
        }
        for kind in kinds()
    }
    other = {
        "type": "object",
        "required": ["use"],
        "properties": {"use": {"enum": list(kinds())}},
        "allOf": by_use,
    }
    return {"type": "object", "description": "In order.", "properties": named, "additionalProperties": other}


def _stage(stage: Stage[Any], definitions: dict[str, Schema]) -> Schema:
    """The settings of a kind of stage, as a user writes them."""
    found = _model(stage.config, definitions)
    properties = found["properties"]
    for path, role in stage.roles.items():
        _place(properties, path, _BY_ROLE.get(role, {"type": "string"}), definitions)
    for key, reference in stage.settings.items():
        described = properties[key].get("description", "")
        properties[key] = {**_library(reference, definitions), "description": described}
    if "template" in properties:
        properties["template"] = _template()
    if "gates" in properties:
        properties["gates"] = {"type": "array", "items": _model(Gate, definitions)}
    properties["use"] = {"enum": list(kinds()), "description": "The kind, where the name of the stage is another."}
    properties["launch"] = {"$ref": "#/$defs/Launch"} if stage.parallel is not None else False
    _model(Launch, definitions)
    if isinstance(stage.leaves, Model):
        properties["evaluate"] = {"description": "An evaluation right after this stage."}
    found.pop("type")  # a stage without settings may be empty
    found["required"] = [name for name in found.get("required", []) if name not in _filled(stage)]
    return found


def _filled(stage: Stage[Any]) -> set[str]:
    """Settings that come from the stage above or from the top of the file where they are not written."""
    return {path[0] for path, role in stage.roles.items() if role in (Role.START, Role.COMPARED)} | {"template", "seed"}


def _place(properties: Schema, path: tuple[str, ...], value: Schema, definitions: dict[str, Schema]) -> None:
    """Put what a user writes in place of what the stage gets."""
    first, *rest = path
    described = {key: text for key, text in properties.get(first, {}).items() if key == "description"}
    if not rest:
        properties[first] = {**value, **described}
        return
    inner = properties[first]
    options = [inner, *inner.get("anyOf", [])]
    reference = next(option["$ref"] for option in options if "$ref" in option).rpartition("/")[2]
    _place(definitions[reference]["properties"], tuple(rest), value, definitions)


def _source(definitions: dict[str, Schema]) -> Schema:
    """A data set as it is written: cleaning steps may be names alone, or `{name: settings}`."""
    found = _model(Source, definitions)
    found["properties"].pop("others", None)
    steps = {"anyOf": [{"type": "string"}, {"type": "object"}]}
    found["properties"]["clean"] = {"type": "array", "items": steps}
    return found


def _model(kind: type[BaseModel], definitions: dict[str, Schema]) -> Schema:
    """The schema of a pydantic model; its parts go to `definitions`, and docstrings of fields become help."""
    found = kind.model_json_schema(ref_template="#/$defs/{model}")
    inner = found.pop("$defs", {})
    if "$ref" in found:  # a model that holds itself
        found = inner[kind.__name__]
    definitions |= {name: part for name, part in inner.items() if name not in definitions}
    helps = _field_docs(kind)
    for name, part in found.get("properties", {}).items():
        part.pop("title", None)
        if name in helps:
            part["description"] = helps[name]
    definitions.setdefault(kind.__name__, found)
    return found


def _field_docs(kind: type[BaseModel]) -> dict[str, str]:
    """Field → the docstring below it, of a class and of those that it is made from."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not (issubclass(one, BaseModel) and one is not BaseModel):
            continue
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(one))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
                continue
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _library(reference: str, definitions: dict[str, Schema]) -> Schema:
    """The settings of a class of a library, from its source; those that the pipeline sets are left out."""
    owner = reference.partition(":")[2]
    if owner not in definitions:
        managed = MANAGED.get(owner, {})
        known = {name: one for name, one in settings(reference).items() if name not in managed}
        definitions[owner] = {
            "properties": {name: _setting(owner, one) for name, one in known.items()},
            "additionalProperties": False,
        }
    return {"type": ["object", "null"], "$ref": f"#/$defs/{owner}"}


def _setting(owner: str, one: Any) -> Schema:
    default = {"description": f"default: {one.default}"} if one.default else {}
    return {**json_type(owner, one), **default}
