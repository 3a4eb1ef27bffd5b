"""Conversations: chat templates, and weights that mark what the assistant says."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from jaxllm.data.packing import Rows, pack_rows
from jaxllm.data.tokenizers import Tokenizer

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# For tokenizers without chat tokens (base models, the built-in one).
PLAIN = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ m['role'].capitalize() }}: {{ m['content'] }}"
    "{{ eos_token if eos_token and m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def render_text(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    add_generation_prompt: bool = False,
    now: datetime | None = None,
    **variables: Any,
) -> str:
    """The text that a chat template makes of a conversation.

    Args:
      messages: Dictionaries with "role" and "content".
      tokenizer: Gives the template and the special tokens that it names.
      template: A Jinja template instead of the tokenizer's own, for instance `PLAIN`.
      add_generation_prompt: End where the assistant begins to speak.
      now: The time that templates with a date print (default: the present).
      variables: Further names that the template reads (tools, documents ...).

    Raises:
      ValueError: No template, or one that refuses these messages or is malformed.
    """
    template = template or tokenizer.chat_template
    if template is None:
        raise ValueError(
            "this tokenizer has no chat template; give one, "
            "for instance jaxllm.data.chat.PLAIN"
        )
    import jinja2

    specials = {
        f"{name}_token": "" if index is None else tokenizer.token(index)
        for name in ("bos", "eos", "pad")
        for index in [getattr(tokenizer, f"{name}_id")]
    }
    now = now or datetime.now()
    try:
        return _compile(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            strftime_now=now.strftime,
            **specials,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error


def render_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: str | None = None,
    *,
    now: datetime | None = None,
    **variables: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a conversation and the weights of an instruction loss.

    The conversation is rendered once for every turn: up to the point where the
    assistant begins, and up to where it has ended. What lies between is the
    assistant's, the end token included, and gets weight 1; all else 0. A token across
    such a point belongs to what comes after it.

    Returns:
      int32 [n] tokens, float32 [n] weights.

    Raises:
      ValueError: The template writes earlier turns differently once later ones follow
        (the conversation so far is no prefix of the whole), so that no weights exist;
        or as `render_text`.
    """
    now = now or datetime.now()  # one time for all renderings

    def text(count: int, prompt: bool) -> str:
        if count == 0:
            return ""
        part = messages[:count]
        keywords = {"add_generation_prompt": prompt, "now": now, **variables}
        return render_text(part, tokenizer, template, **keywords)

    whole = text(len(messages), False)
    tokens = tokenizer.encode_marked(whole)
    weights = np.zeros(len(tokens), np.float32)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = text(turn, True), text(turn + 1, False)
            for part in (start, end):
                _check_prefix(part, whole, turn)
            span = slice(*(_common(tokenizer, part, tokens) for part in (start, end)))
            weights[span] = 1
    return np.asarray(tokens, np.int32), weights


def pack_chats(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    length: int,
    template: str | None = None,
    *,
    now: datetime | None = None,
) -> Rows:
    """Conversations as packed rows for `Batches`, each whole where it fits.

    A conversation longer than a row is cut at its end.

    Raises:
      ValueError: No conversation with an assistant's word within `length` tokens; or
        as `render_chat`.
    """
    rendered = [render_chat(c, tokenizer, template, now=now) for c in conversations]
    cut = [(tokens[:length], weights[:length]) for tokens, weights in rendered]
    kept = [(tokens, weights) for tokens, weights in cut if weights.any()]
    if not kept:
        raise ValueError(
            f"none of {len(cut)} conversations has an assistant's word within "
            f"{length} tokens"
        )
    tokens, weights = zip(*kept, strict=True)
    pad = tokenizer.pad_id or 0
    return pack_rows(tokens, length, weights=weights, fit="best", pad_id=pad)


def _check_prefix(part: str, whole: str, turn: int) -> None:
    if not whole.startswith(part):
        at = sum(1 for _ in itertools.takewhile(_equal, zip(part, whole)))  # noqa: B905
        raise ValueError(
            f"the chat template rewrites earlier turns: the text up to message {turn} "
            f"is no prefix of the whole conversation, they part at character {at} "
            f"({part[at : at + 30]!r} against {whole[at : at + 30]!r})"
        )


def _common(tokenizer: Tokenizer, part: str, tokens: list[int]) -> int:
    """How many leading tokens the text of a part shares with the whole."""
    own = tokenizer.encode_marked(part)
    return sum(1 for _ in itertools.takewhile(_equal, zip(own, tokens)))  # noqa: B905


def _equal(pair: tuple) -> bool:
    return pair[0] == pair[1]


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    """A template in the sandbox in which `transformers` renders them."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        # Jinja's own filter escapes HTML, which is wrong here.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is malformed: {error}") from error
