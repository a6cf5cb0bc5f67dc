"""Tools and their calls in the form that chat templates take: Hugging Face's, which is OpenAI's with objects.

A tool is `{"type": "function", "function": {"name", "description", "parameters"}}`, a call is
`{"type": "function", "function": {"name", "arguments"}}` with arguments as an object.
"""

import json
from typing import Any

from stages.data.formats._values import kind, listed, text, whole
from stages.data.row import Row, RowError

_CALL = '`{"name": …, "arguments": {…}}`'
_TOOL = '`{"name": …, "description": …, "parameters": {…}}`'


def with_tools(row: Row, made: Row) -> Row:
    """The normalised row with the tools that its file's row declares."""
    tools = _declared(row.get("tools"))
    return {**made, "tools": tools} if tools else made


def _declared(value: object) -> list[Row]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    found = _parsed(value, "`tools`", f"a list of {_TOOL}") if isinstance(value, str) else value
    if not isinstance(found, list):
        raise RowError(f"`tools` is {kind(found)}; it must be a list of {_TOOL}")
    return [_tool(tool, f"tool {number} of `tools`") for number, tool in enumerate(found, 1)]


def _tool(value: object, at: str) -> Row:
    tool = _parsed(value, at, _TOOL) if isinstance(value, str) else value
    if not isinstance(tool, dict):
        raise RowError(f"{at} is {kind(tool)}; it must be {_TOOL}")
    if tool.get("type", "function") != "function":
        raise RowError(f"{at} has the type {listed([str(tool['type'])])}; only a `function` can be called")
    inner = tool.get("function", tool)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise RowError(f"{at} has no `name`; it must be {_TOOL}")
    schema = inner.get("parameters")
    if schema is not None and not isinstance(schema, dict):
        raise RowError(f"the `parameters` of {at} are {kind(schema)}; they must be a JSON schema, which is an object")
    described = {key: value for key, value in inner.items() if key not in ("type", "parameters") and value is not None}
    return _whole({"type": "function", "function": {**described, "parameters": schema or _NO_PARAMETERS}}, at)


_NO_PARAMETERS = {"type": "object", "properties": {}}


def calls(value: object, at: str) -> list[Row]:
    """One call or several: objects, or the JSON text of them."""
    found = _parsed(value, f"{at} is a tool call that", _CALL) if isinstance(value, str) else value
    items = found if isinstance(found, list) else [found]
    if not items:
        raise RowError(f"{at} is a tool call without a call; it must be {_CALL}")
    return [_call(item, at) for item in items]


def _call(value: object, at: str) -> Row:
    inner = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(inner, dict):
        raise RowError(f"{at} is a tool call that is {kind(inner)}; it must be {_CALL}")
    name, arguments = inner.get("name"), inner.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{at} is a tool call without `name`; it must be {_CALL}")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{at} calls {listed([name])} with arguments, whose text", _CALL)
    if not isinstance(arguments, dict):
        raise RowError(f"{at} calls {listed([name])} with arguments that are {kind(arguments)}; it must be {_CALL}")
    return _whole({"type": "function", "function": {"name": name, "arguments": arguments}}, at)


def output(value: object, at: str) -> str:
    """What a tool gave back, as text; it may be empty."""
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    return whole(value, at) if isinstance(value, str) else text(value, at)


def _parsed(value: str, name: str, wanted: str) -> Any:
    try:
        return json.loads(value, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        why = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    except RecursionError:
        why = "nested too deeply"
    except ValueError as error:
        why = "a number has too many digits" if "digits" in str(error) else str(error)
    verb = "is" if name.endswith(("that", "text")) else "is text that is"
    raise RowError(f"{name} {verb} not valid JSON ({why}); it must be {wanted}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _whole(made: Row, at: str) -> Row:
    whole(json.dumps(made, ensure_ascii=False), at)
    return made
