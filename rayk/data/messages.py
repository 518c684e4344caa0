"""Read chat messages and tool schemas in the forms of public data sets, and return them in the form of chat templates.

Messages are {role, content} as in OpenAI's and TRL's formats, or {from, value} as in ShareGPT's.
"""

from collections.abc import Mapping
from typing import Any

from rayk.data.json_text import parse_json
from rayk.errors import InputError

Message = dict[str, Any]

SHAREGPT_FIELD = "conversations"
"""The field with the messages of ShareGPT's rows."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "function_call": "assistant",
    "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
_TEXT_KINDS = ("text", "input_text", "output_text")


def parse_messages(value: Any, where: str, field: str) -> list[Message]:
    """Return the messages of a row's field, which may be the JSON text of a list, without null entries.

    Roles have the names in `ROLES`, `content` is text, arguments of tool calls are objects. A message may have a
    `weight` of 0 or 1.

    Raises:
        InputError: `value` is not a list of such messages.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # as in tables
        value = parse_json(value, f"{where}: field '{field}'")
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where}: '{field}' must be a list of at least one message with role and content.")
    return [parse_message(message, f"{where}: message {i} of '{field}'") for i, message in enumerate(value, start=1)]


def parse_message(message: Any, where: str) -> Message:
    """Return one message; see `parse_messages`."""
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is a {type(message).__name__}, not an object with role and content.")
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given and "from" in given:
        given = {"role": given.pop("from"), "content": given.pop("value", None)} | given
        if given["role"] == "function_call":
            given |= {"content": None, "tool_calls": parse_json(_text(given["content"], where), where)}
    role = given.get("role")
    if not isinstance(role, str) or _OTHER_NAMES.get(role, role) not in ROLES:
        has = (
            f"the role {role!r}" if "role" in given else f"no role (it has: {', '.join(map(str, given)) or 'nothing'})"
        )
        raise InputError(
            f"{where} has {has}; the roles are {', '.join(ROLES)}, and other names of them: {', '.join(_OTHER_NAMES)}."
        )
    given["role"] = _OTHER_NAMES.get(role, role)
    if "function_call" in given:  # OpenAI's form before there were tools
        given["tool_calls"] = given.pop("function_call")
    calls = _tool_calls(given.pop("tool_calls", None), where)
    if calls and given["role"] != "assistant":
        raise InputError(f"{where} calls a tool, but its role is '{role}'; only the assistant calls tools.")
    content = given.get("content")
    given["content"] = "" if content is None and calls else _text(content, where)
    if given.get("weight", 1) not in (0, 1):
        raise InputError(f"{where} has the weight {given['weight']!r}; give 0 (not trained on) or 1.")
    return given | ({"tool_calls": calls} if calls else {})


def _text(content: Any, where: str) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}, part {i}") for i, part in enumerate(content, start=1))
    if not isinstance(content, str):
        raise InputError(f"{where} has no content that is text; give its content as a string.")
    check_unicode(content, where)
    return content


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InputError(f"{where} is a {type(part).__name__}; give parts such as {{type: text, text: …}}.")
    kind = part.get("type") or next((key for key, value in part.items() if value is not None), "nothing")
    if kind not in _TEXT_KINDS:
        raise InputError(f"{where} is of type '{kind}', but only text is trained on; remove the part or the row.")
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where} has no text; correct the row.")
    return part["text"]


def _tool_calls(value: Any, where: str) -> list[Message]:
    calls = parse_json(value, where) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, Mapping) else calls or []
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where} has tool_calls that are a {type(calls).__name__}; give a list of calls.")
    return [_tool_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls, start=1)]


def _tool_call(call: Any, where: str) -> Message:
    """Return a call as {type, function: {name, arguments}}, with its `id` if it has one."""
    bare = isinstance(call, Mapping) and "function" not in call
    function = call if bare else call["function"] if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{where} has no function with a name; give {{function: {{name, arguments}}}}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # chat templates write arguments as JSON, so a text would be encoded a second time
        arguments = parse_json(arguments, f"{where}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping | None):
        raise InputError(f"{where} has arguments that are a {type(arguments).__name__}; give an object.")
    rest = {} if bare else {key: value for key, value in call.items() if value is not None}
    return {"type": "function"} | rest | {"function": {"name": function["name"], "arguments": dict(arguments or {})}}


def parse_tools(value: Any, where: str, setting: str) -> list[dict[str, Any]] | None:
    """Return the schemas of a row's tools as {type, function: {name, …}}; None if there are none.

    Args:
        value: a list of schemas or the JSON text of one; a schema without `function` is that of the function.
        where: the field in words ("train.jsonl, line 17: field 'tools'").
        setting: the setting with the name of the field.

    Raises:
        InputError: the value has another form.
    """
    fix = f"correct the row, or set {setting} to null if the field has no tool schemas"
    if isinstance(value, str):
        value = parse_json(value, where, f"; {fix}") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} is a {type(value).__name__}, not a list of tool schemas; {fix}.")
    schemas = []
    for i, tool in enumerate(value, start=1):
        if isinstance(tool, str):
            tool = parse_json(tool, f"{where}, tool {i}", f"; {fix}")
        bare = isinstance(tool, Mapping) and "function" not in tool
        schema = {"type": "function", "function": tool} if bare else tool
        function = schema.get("function") if isinstance(schema, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(f"{where}, tool {i} has no function with a name; {fix}.")
        schemas.append({"type": "function"} | dict(schema))
    return schemas


def check_unicode(text: str, where: str) -> None:
    """Raise InputError if a text contains half a Unicode character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} contains half a Unicode character (a lone surrogate); correct the row.") from error
