"""Conversations: they become tokens through the tokenizer's own chat template, in training as in
use."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from nextlat.errors import NextLatError, first_line

Message = dict[str, Any]
ASSISTANT = "assistant"
MARK = re.compile(r"{%-?\s*generation\b")  # of what the assistant says, in a template


def conversation(value: Sequence[Any], where: str) -> list[Message]:
    """A list of messages as templates take it: without the empty columns that records of one table
    have.

    Raises:
        NextLatError: a message without a role.
    """
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise NextLatError(
                f"message {number} of {where} has no role: give a list of messages, each with role "
                "and content, or choose another task.column."
            )
    return [{key: x for key, x in message.items() if x is not None} for message in value]


def chat_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of what a user says first, up to where the assistant answers.

    Raises:
        NextLatError: the tokenizer has no template, or one that cannot render this.
    """
    rendered = _render(tokenizer, [{"role": "user", "content": text}], prompt=True)
    ids: list[int] = tokenizer(rendered, add_special_tokens=False).input_ids
    return ids


def encode_chats(
    tokenizer: Any, conversations: Sequence[list[Message]], *, assistant_only: bool
) -> Iterator[tuple[list[int], list[bool] | None]]:
    """The tokens of conversations, as `apply_chat_template` gives them.

    Args:
        tokenizer: with a chat template.
        conversations: as `conversation` gives them.
        assistant_only: whether to find out which tokens the assistant says, the one that ends its
            turn among them: those that the template marks ({% generation %}), or else what it
            adds to the conversation so far.

    Returns:
        For each, its tokens, and whether each is the assistant's (None unless asked).

    Raises:
        NextLatError: there is no template, it cannot render one of them, or the turns of the
            assistant cannot be told in what it renders, or are none.
    """
    texts = [_render(tokenizer, messages) for messages in conversations]
    marked = assistant_only and MARK.search(tokenizer.get_chat_template())
    quiet = {"add_special_tokens": False, "verbose": False}
    encoded = tokenizer(texts, return_offsets_mapping=assistant_only, **quiet)
    for i, messages in enumerate(conversations):
        ids, said = encoded["input_ids"][i], None
        if marked:
            rendered = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, said = rendered["input_ids"], [mask == 1 for mask in rendered["assistant_masks"]]
        elif assistant_only:
            spans = _turns(tokenizer, messages, texts[i])
            offsets = encoded["offset_mapping"][i]
            said = [any(a < stop and start < b for start, stop in spans) for a, b in offsets]
        if said is not None and not any(said):
            raise NextLatError(
                f"{_named(messages)} has no turn of the assistant to learn from "
                "(task.assistant_only): leave it out."
            )
        yield ids, said


def _turns(tokenizer: Any, messages: list[Message], text: str) -> list[tuple[int, int]]:
    """Start and end in a rendered text of what the assistant says."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before = _render(tokenizer, messages[:i], prompt=True)
            # White space after the token that ends the turn is the template's.
            after = _render(tokenizer, messages[: i + 1]).rstrip()
            if not (text.startswith(after) and after.startswith(before.rstrip())):
                raise NextLatError(
                    "the chat template renders the start of a conversation otherwise than the rest "
                    f"(as in {_named(messages)}), so that the turns of the assistant cannot be "
                    "told: mark them in it by {% generation %}, or leave out task.assistant_only."
                )
            spans.append((len(before), len(after)))
    return spans


def _render(tokenizer: Any, messages: list[Message], *, prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise NextLatError(
            "the text is a conversation, and the tokenizer has no chat template: give one that has "
            "(task.tokenizer), or set chat_template in it and save it."
        )
    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # whatever a template or jinja raises
        raise NextLatError(
            f"the chat template cannot render {_named(messages)} ({first_line(error)}): mend or "
            "leave out the conversation, or change the template."
        ) from error
    return rendered


def _named(messages: list[Message]) -> str:
    content = str(messages[0].get("content", "")) if messages else ""
    return f"the conversation that begins with {content[:40]!r}"
