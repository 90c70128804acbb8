"""Names of tools for the engines: ASCII names for those in other letters, and back. Pure.

OpenAI's API takes only `[a-zA-Z0-9_-]`, and the engines' chat templates, tool parsers and grammars
are made for that. A Korean name is romanised, so that the model can still read it, and the
description begins with the name itself.
"""

import re
import unicodedata

from msgspec import structs

from gateway.chat.message import Message
from gateway.chat.request import Chat
from gateway.chat.tools import AllowedTools, Choice, ChosenFunction, Tool

MAX_NAME = 64
_is_plain = re.compile(r"[a-zA-Z0-9_.-]{1,64}").fullmatch
_not_plain = re.compile(r"[^a-zA-Z0-9_.-]+").sub

# Hangul syllables are composed of an initial, a vowel and a final (Unicode 3.12), and romanised by
# the letter (Revised Romanization of Korean).
_FIRST_SYLLABLE, _LAST_SYLLABLE = 0xAC00, 0xD7A3
_INITIALS = (
    "g", "kk", "n", "d", "tt", "r", "m", "b", "pp", "s", "ss", "", "j", "jj", "ch", "k", "t", "p", "h",
)  # fmt: skip
_VOWELS = (
    "a", "ae", "ya", "yae", "eo", "e", "yeo", "ye", "o", "wa", "wae", "oe", "yo", "u", "wo", "we", "wi", "yu", "eu",
    "ui", "i",
)  # fmt: skip
_FINALS = (
    "", "k", "k", "k", "n", "n", "n", "t", "l", "k", "m", "l", "l", "l", "p", "l", "m", "p", "p", "t", "t", "ng", "t",
    "t", "k", "t", "p", "t",
)  # fmt: skip


def engine_names(chat: Chat) -> dict[str, str]:
    """Return the engines' names of those tools that have another one, by the client's name."""
    taken = {tool.function.name for tool in chat.tools or ()}
    names: dict[str, str] = {}
    for tool in chat.tools or ():
        name = tool.function.name
        if _is_plain(name) is None:
            names[name] = free = _free_name(_ascii(name), taken)
            taken.add(free)
    return names


def client_names(chat: Chat) -> dict[str, str]:
    """Return the reverse of `engine_names`."""
    return {name: original for original, name in engine_names(chat).items()}


def with_engine_names(chat: Chat) -> Chat:
    """Return `chat` with names of tools that every engine takes."""
    names = engine_names(chat)
    if not names:
        return chat
    choice = chat.tool_choice
    if isinstance(choice, Choice):
        choice = Choice(_renamed_choice(choice.function, names))
    elif isinstance(choice, AllowedTools):
        allowed = [
            structs.replace(tool, function=_renamed_choice(tool.function, names)) for tool in choice.allowed_tools.tools
        ]
        choice = AllowedTools(structs.replace(choice.allowed_tools, tools=allowed))
    return structs.replace(
        chat,
        tools=[_renamed(tool, names) for tool in chat.tools or ()],
        tool_choice=choice,
        messages=[_with_renamed_calls(message, names) if message.tool_calls else message for message in chat.messages],
    )


def _renamed_choice(function: ChosenFunction, names: dict[str, str]) -> ChosenFunction:
    return ChosenFunction(names.get(function.name, function.name))


def _renamed(tool: Tool, names: dict[str, str]) -> Tool:
    function = tool.function
    if function.name not in names:
        return tool
    description = f"{function.name}: {function.description}" if function.description else function.name
    return structs.replace(tool, function=structs.replace(function, name=names[function.name], description=description))


def _with_renamed_calls(message: Message, names: dict[str, str]) -> Message:
    calls = [
        structs.replace(
            call, function=structs.replace(call.function, name=names.get(call.function.name, call.function.name))
        )
        for call in message.tool_calls or ()
    ]
    return structs.replace(message, tool_calls=calls)


def _ascii(name: str) -> str:
    """Return a readable ASCII form of `name`, not empty."""
    parts = [_letters(char) for char in unicodedata.normalize("NFC", name)]
    return _not_plain("_", "".join(parts)).strip("_") or "tool"


def _letters(char: str) -> str:
    code = ord(char)
    if code < 0x80:
        return char
    if _FIRST_SYLLABLE <= code <= _LAST_SYLLABLE:
        rest, final = divmod(code - _FIRST_SYLLABLE, len(_FINALS))
        initial, vowel = divmod(rest, len(_VOWELS))
        return _INITIALS[initial] + _VOWELS[vowel] + _FINALS[final]
    plain = unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
    return plain or f"u{code:x}"


def _free_name(name: str, taken: set[str]) -> str:
    found, number = name[:MAX_NAME], 1
    while found in taken:
        number += 1
        suffix = f"_{number}"
        found = name[: MAX_NAME - len(suffix)] + suffix
    return found
