"""Tools and tool calls in the form that chat templates take: OpenAI's, but arguments are an object, not JSON text.

A tool is `{"type": "function", "function": {"name", "description", "parameters"}}`, a call is
`{"type": "function", "function": {"name", "arguments"}}`.
"""

import json
from typing import Any

from stages.data.formats._values import encodable, listed, parsed, text, type_in_words
from stages.data.row import FileRow, Message, Messages, Row, RowError, Tools

_CALL = '`{"name": …, "arguments": {…}}`'
_TOOL = '`{"name": …, "description": …, "parameters": {…}}`'
_NO_PARAMETERS = {"type": "object", "properties": {}}


def with_tools(row: FileRow, normalised: Row) -> Row:
    """The normalised row with the tools that the file's row declares."""
    tools = _declared(row.get("tools"))
    return {**normalised, "tools": tools} if tools else normalised


def _declared(value: object) -> Tools:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    tools = parsed(value, "`tools`", f"a list of {_TOOL}") if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise RowError(f"`tools` is {type_in_words(tools)}; it must be a list of {_TOOL}")
    return [_tool(tool, f"tool {number} of `tools`") for number, tool in enumerate(tools, 1)]


def _tool(value: object, name: str) -> dict[str, Any]:
    tool = parsed(value, name, _TOOL) if isinstance(value, str) else value
    if not isinstance(tool, dict):
        raise RowError(f"{name} is {type_in_words(tool)}; it must be {_TOOL}")
    if tool.get("type", "function") != "function":
        raise RowError(f"{name} has the type {listed([str(tool['type'])])}; only a `function` can be called")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"{name} has no `name`; it must be {_TOOL}")
    schema = function.get("parameters")
    if schema is not None and not isinstance(schema, dict):
        raise RowError(
            f"the `parameters` of {name} are {type_in_words(schema)}; they must be a JSON schema, which is an object"
        )
    rest = {key: value for key, value in function.items() if key not in ("type", "parameters") and value is not None}
    return _encodable({"type": "function", "function": {**rest, "parameters": schema or _NO_PARAMETERS}}, name)


def calls(value: object, name: str) -> list[dict[str, Any]]:
    """The tool calls of a message: the value is one call or a list, as objects or as JSON text.

    A call keeps its `id`, with which an output names it, until `in_order_of_calls`. Raises RowError.
    """
    given = parsed(value, f"{name} is a tool call that", _CALL) if isinstance(value, str) else value
    items = given if isinstance(given, list) else [given]
    if not items:
        raise RowError(f"{name} is a tool call without a call; it must be {_CALL}")
    return [_call(item, name) for item in items]


def _call(value: object, name: str) -> dict[str, Any]:
    function = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(function, dict):
        raise RowError(f"{name} is a tool call that is {type_in_words(function)}; it must be {_CALL}")
    tool, arguments = function.get("name"), function.get("arguments")
    if not isinstance(tool, str) or not tool.strip():
        raise RowError(f"{name} is a tool call without `name`; it must be {_CALL}")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{name} calls {listed([tool])} with arguments, whose text", _CALL)
    if not isinstance(arguments, dict):
        raise RowError(
            f"{name} calls {listed([tool])} with arguments that are {type_in_words(arguments)}; it must be {_CALL}"
        )
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    identity = {"id": value["id"]} if isinstance(value, dict) and isinstance(value.get("id"), str) else {}
    return _encodable(identity | call, name)


def in_order_of_calls(messages: Messages, name: str) -> Messages:
    """The messages with the outputs of tools in the order of the calls that they name, and without the names.

    Raises:
        RowError: an output names a call that the messages before it do not make.
    """
    if max(map(len, messages)) == 2:  # most conversations: only roles and contents
        return messages
    found: Messages = []
    asked: list[str] = []  # the calls that the next outputs answer
    outputs: list[tuple[int, Message]] = []
    for number, message in enumerate(messages, 1):
        answers = message.get("tool_call_id")
        if message["role"] == "tool" and answers is not None and asked:
            if answers not in asked:
                raise RowError(f"message {number} of `{name}` answers the call {listed([answers])}, which is not made")
            outputs.append((asked.index(answers), message))
            continue
        found += [output for _, output in sorted(outputs, key=lambda placed: placed[0])]
        outputs = []
        if "tool_calls" in message:
            before = asked if found and "tool_calls" in found[-1] else []
            asked = [*before, *(call["id"] for call in message["tool_calls"] if "id" in call)]
        found.append(message)
    found += [output for _, output in sorted(outputs, key=lambda placed: placed[0])]
    return [_without_names(message) for message in found]


def _without_names(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key != "tool_call_id"}
    if "tool_calls" in kept:
        kept["tool_calls"] = [{key: value for key, value in call.items() if key != "id"} for call in kept["tool_calls"]]
    return kept


def output(value: object, name: str) -> str:
    """A tool's output as text, which may be empty; an object or a list becomes its JSON. Raises RowError."""
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    return encodable(value, name) if isinstance(value, str) else text(value, name)


def _encodable(value: dict[str, Any], name: str) -> dict[str, Any]:
    encodable(json.dumps(value, ensure_ascii=False), name)
    return value
