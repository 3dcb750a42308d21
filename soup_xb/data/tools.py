"""How a chat template takes tools: found out by rendering a probe, and refused where it leaves them out.

Templates differ in what they ask for. transformers documents arguments as objects, some templates join them as JSON
text; some write a call only where the content is null. A template that was not made for tools says nothing
about it: it leaves declarations, calls or answers out, and a model would learn to call what it was never shown.
"""

from __future__ import annotations

import json
from functools import lru_cache

from attrs import evolve, frozen

from soup_xb.core.errors import ModelError
from soup_xb.core.rows.examples import ChatExample, Message, ToolCall
from soup_xb.data.chat_template import ChatTemplate, RenderError
from soup_xb.data.tool_spelling import ToolSpelling

# In the order of preference.
_SPELLINGS = (
    ToolSpelling(),
    ToolSpelling(arguments_as_text=True),
    ToolSpelling(null_content=True),
    ToolSpelling(arguments_as_text=True, null_content=True),
)
# Nine letters and digits: what Mistral's templates want of an id.
_ID = "probe0001"
_NAME, _KEY, _VALUE, _ANSWER = "find_qzxv", "qzkey", "qzvalue", "qzanswer"
_TOOL = json.dumps(
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "Find it.",
            "parameters": {
                "type": "object",
                "properties": {_KEY: {"type": "string", "description": "What to find."}},
                "required": [_KEY],
            },
        },
    }
)
_ASKED = Message("user", "Find it.")
_CALLED = (
    _ASKED,
    Message("assistant", "", (ToolCall(_NAME, json.dumps({_KEY: _VALUE}), _ID),)),
    Message("tool", _ANSWER, name=_NAME, call_id=_ID),
    Message("assistant", "There."),
)


@frozen
class _Found:
    """What a template shows of tools; `refusal` is what it said to the conversation with a call."""

    declares: bool
    answers: bool
    spelling: ToolSpelling | None
    refusal: str


def with_tools(template: ChatTemplate, example: ChatExample) -> ChatTemplate:
    """The template with the spelling of calls that it shows.

    Raises ModelError where it leaves out what the example holds of tools.
    """
    found = _probed(template)
    calls = any(message.calls for message in example.messages)
    left_out = [
        what
        for what, needed, shown in (
            ("the declared `tools`", bool(example.tools), found.declares),
            ("an assistant's `tool_calls`", calls, found.spelling is not None),
            ("what a tool answered", calls and _is_answered(example), found.answers),
        )
        if needed and not shown
    ]
    if left_out:
        said = f" (it says: {found.refusal})" if found.refusal else ""
        raise ModelError(
            "template-without-tools",
            f"the chat template does not show {' nor '.join(left_out)}{said}, which {example.source} holds",
            where=template.where,
            help="give a chat template that writes tools as `data.chat_template`, or take a base that was taught to "
            "call them.",
        )
    return evolve(template, spelling=found.spelling or ToolSpelling())


def _is_answered(example: ChatExample) -> bool:
    return any(message.role == "tool" for message in example.messages)


@lru_cache(maxsize=8)
def _probed(template: ChatTemplate) -> _Found:
    bare = _rendering(template, (_ASKED,), tools=())[0]
    declared, refusal = _rendering(template, (_ASKED,))
    spelling, answers = None, False
    for one in _SPELLINGS:
        text, refused = _rendering(evolve(template, spelling=one), _CALLED)
        if one is _SPELLINGS[0]:
            refusal = refusal or refused
        # The declaration names the function and its argument too, so the call counts where only it can stand.
        called = text[len(declared) :] if text.startswith(declared) else text
        if _shows_call(called):
            spelling, answers, refusal = one, _ANSWER in called, ""
            break
    return _Found(_NAME in declared and declared != bare, answers, spelling, refusal)


def _rendering(
    template: ChatTemplate, messages: tuple[Message, ...], tools: tuple[str, ...] = (_TOOL,)
) -> tuple[str, str]:
    """The text, or why the template refuses."""
    try:
        return template.render(messages, tools=tools), ""
    except RenderError as error:
        return "", str(error)


def _shows_call(text: str) -> bool:
    """Whether name, key and value of the call are there, and not as Python's or doubly quoted text."""
    if _NAME not in text or _VALUE not in text:
        return False
    return _KEY in text and f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text
