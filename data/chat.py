"""Conversations -> token ids and pictures in order, each with its role: the assistant's are targets, others context.

Where the tokenizer's model has a chat template, transformers renders it (jinja, in its sandbox). It gets a mark in
place of each part of a message, so it cannot trim or search them: a content that spells a special token stays text, the
template's own become ids. An assistant's turn begins where the template's generation prompt ends, and the special token
that ends it is a target. A template that asks for the date always gets the same one, so that the same data has the same
bytes. Any other tokenizer has the plain form: each message of the user or the system is its parts and a line break, an
answer is its parts, and EOS follows it. BOS at the start and EOS at the end are left to packing.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from types import FrameType
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from data.documents import Role
from data.tokenizer import Tokenizer

Speaker = Literal["system", "user", "assistant"]
P = TypeVar("P")  # a picture, of whatever type but str
_MARK = "\ufdd0{}\ufdd1"  # noncharacters, which no template spells
_MARKS = re.compile("\ufdd0([0-9]+)\ufdd1")
MAX_STEPS = 10_000_000  # of a template for a conversation: seconds; searching all turns for each takes a tenth
_FILE = "<template>"  # of jinja's compiled templates, in tracebacks
_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"  # the date in Llama 3's templates

# What Python raises for a template, besides jinja's own errors; RuntimeError: one that calls itself.
_OF_TEMPLATES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)


class EndlessTemplate(ValueError):
    """A chat template that takes too many steps."""


@dataclass(frozen=True)
class Message(Generic[P]):
    speaker: Speaker
    parts: tuple[str | P, ...]


@dataclass(frozen=True)
class _Piece:
    """A part of a conversation as laid out: a text, of a content or the template's own, EOS, or a picture."""

    turn: int  # its message
    role: Role
    what: Any
    kind: Literal["content", "template", "eos", "picture"]


class Chat:
    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def lay_out(self, messages: Sequence[Message[P]]) -> list[tuple[Role, np.ndarray | P]]:
        """Return token ids int64 [len] and pictures, in order, each with its role.

        Raises ValueError for what the template refuses (such as two turns of one speaker), and for an empty answer;
        EndlessTemplate where it takes too many steps.
        """
        pieces = self._pieces(messages)
        if messages[-1].speaker == "assistant":  # what a template writes after the last answer leads nowhere
            while pieces[-1].role == "context" and pieces[-1].kind == "template":
                pieces.pop()
        return self._encoded(pieces)

    def prompt(self, messages: Sequence[Message[P]]) -> list[np.ndarray | P]:
        """Return the same up to where the assistant is to speak; raise ValueError if it has spoken last."""
        if not messages or messages[-1].speaker == "assistant":
            raise ValueError("a prompt ends with a message of the user; expected none of the assistant after it")
        pieces = self._pieces([*messages, Message("assistant", ("answer",))])
        given = next(i for i, p in enumerate(pieces) if p.turn == len(messages) and p.role == "target")
        return [part for _, part in self._encoded(pieces[:given])]

    def _pieces(self, messages: Sequence[Message]) -> list[_Piece]:
        for turn, message in enumerate(messages):
            if all(map(_is_empty, message.parts)):
                raise ValueError(f"message {turn} of the {message.speaker} is empty; expected text or a picture")
        if not messages:
            raise ValueError("a conversation without messages; expected one or more")
        return self._plain(messages) if self._tokenizer.chat is None else self._templated(messages)

    def _plain(self, messages: Sequence[Message]) -> list[_Piece]:
        pieces = []
        for turn, message in enumerate(messages):
            role = _role(message)
            pieces += [_content(turn, role, part) for part in message.parts]
            if role == "context":
                pieces.append(_Piece(turn, role, "\n", "content"))
            elif turn + 1 < len(messages):
                pieces.append(_Piece(turn, role, None, "eos"))
        return pieces

    def _templated(self, messages: Sequence[Message]) -> list[_Piece]:
        parts = [(turn, part) for turn, message in enumerate(messages) for part in message.parts if not _is_empty(part)]
        marks = iter(_MARK.format(i) for i in range(len(parts)))
        rendered = self._render(
            [(m.speaker, "".join(next(marks) for part in m.parts if not _is_empty(part))) for m in messages]
        )
        fragments = _MARKS.split(rendered)  # a fragment, a number, a fragment ...
        found = list(map(int, fragments[1::2]))
        if sorted(found) != list(range(len(parts))):
            raise ValueError("the tokenizer's chat template leaves out or repeats messages; expected each once")
        pieces: list[_Piece] = []
        owners = [-1, *(parts[i][0] for i in found), len(messages)]
        for i, fragment in enumerate(fragments[::2]):
            before, after = owners[i], owners[i + 1]
            answers = [0 <= turn < len(messages) and messages[turn].speaker == "assistant" for turn in (before, after)]
            if before == after:
                cuts = (len(fragment), len(fragment)) if answers[0] else (0, len(fragment))
            else:
                end = self._tokenizer.after_special(fragment) if answers[0] else 0
                lead = self._lead if answers[1] and fragment[end:].endswith(self._lead) else ""
                cuts = end, len(fragment) - len(lead)
            pieces += [
                _Piece(before, "target", fragment[: cuts[0]], "template"),
                _Piece(after, "context", fragment[cuts[0] : cuts[1]], "template"),
                _Piece(after, "target", fragment[cuts[1] :], "template"),
            ]
            if i < len(found):
                turn, part = parts[found[i]]
                pieces.append(_content(turn, _role(messages[turn]), part))
        return [piece for piece in pieces if piece.kind == "picture" or piece.what]

    @cached_property
    def _lead(self) -> str:
        """What the template writes between its generation prompt and an answer, such as a space."""
        asked = ("user", _MARK.format(0))
        prompt = self._render([asked], add_generation_prompt=True)
        whole = self._render([asked, ("assistant", _MARK.format(1))])
        before = whole.partition(_MARK.format(1))[0]
        return before[len(prompt) :] if before.startswith(prompt) else ""

    @cached_property
    def _takes_lists(self) -> bool:
        """Whether the template takes contents as lists of parts alone, as those of models that see pictures may."""
        for lists in (False, True):
            with suppress(ValueError):
                if _MARK.format(0) in self._render([("user", _MARK.format(0))], lists=lists):
                    return lists
        return False

    def _render(
        self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool = False, lists: bool | None = None
    ) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template  # most of a second

        assert self._tokenizer.chat is not None
        template = self._tokenizer.chat["template"]
        if "strftime_now" in template:
            template = _DATE + template
        lists = self._takes_lists if lists is None else lists
        conversation = [
            {"role": speaker, "content": [{"type": "text", "text": content}] if lists else content}
            for speaker, content in messages
        ]
        try:
            with _limited_steps():
                rendered: Any = render_jinja_template(
                    [conversation],
                    chat_template=template,
                    add_generation_prompt=add_generation_prompt,
                    **self._tokenizer.chat["tokens"],
                )
        except EndlessTemplate:
            raise
        except (TemplateError, *_OF_TEMPLATES) as error:
            raise ValueError(f"the tokenizer's chat template refuses the conversation: {str(error)[:300]}") from None
        return str(rendered[0][0])

    def _encoded(self, pieces: Sequence[_Piece]) -> list[tuple[Role, Any]]:
        """Return the pieces as token ids and pictures; texts of one role that meet are one text.

        BOS at the start is left out, and EOS at the end of a target.
        """
        special = self._tokenizer.special
        laid_out: list[tuple[Role, Any]] = []
        before: list[_Piece] = []  # the text that the next one continues
        for (role, is_picture), group in groupby(pieces, lambda piece: (piece.role, piece.kind == "picture")):
            if is_picture:
                laid_out += [(role, piece.what) for piece in group]
                before = []
                continue
            texts = list(group)
            ids, before = self._text(before, texts), texts
            if not laid_out and len(ids) and ids[0] == special.bos:
                ids = ids[1:]
            if texts[-1] is pieces[-1] and role == "target" and len(ids) and ids[-1] == special.eos:
                ids = ids[:-1]
            if len(ids):
                laid_out.append((role, ids))
        return laid_out

    def _text(self, before: Sequence[_Piece], pieces: Sequence[_Piece]) -> np.ndarray:
        """Return the token ids of a text; with a template, as what it adds to the ids of the text before it.

        So they are the ids of both as one text, as transformers has them, unless a token would span their border.
        """
        special = self._tokenizer.special
        if self._tokenizer.chat is None:
            parts = [np.zeros(0, np.int64)]
            for is_end, group in groupby(pieces, lambda piece: piece.kind == "eos"):
                text = "" if is_end else "".join(piece.what for piece in group)
                parts.append(np.array([special.eos]) if is_end else self._tokenizer.encode(text))
            return np.concatenate(parts)
        given, added = ([(piece.what, piece.kind == "template") for piece in some] for some in (before, pieces))
        prefix, ids = self._tokenizer.encode_parsed(given), self._tokenizer.encode_parsed(given + added)
        if not np.array_equal(ids[: len(prefix)], prefix):
            prefix, ids = prefix[:0], self._tokenizer.encode_parsed(added)
        if taken := {special.boi, special.eoi, special.pad} & set(ids.tolist()):
            raise ValueError(f"the tokenizer's chat template spells BOI, EOI or PAD ({taken}); name other tokens")
        return ids[len(prefix) :]


@contextmanager
def _limited_steps() -> Iterator[None]:
    """Raise EndlessTemplate when a template has taken MAX_STEPS in this thread: lines of its code, and calls.

    Not by the clock, so that the same data has the same bytes on any machine.
    """
    steps, before = 0, sys.gettrace()

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise EndlessTemplate(f"the tokenizer's chat template takes more than {MAX_STEPS:,} steps")
        return step if frame.f_code.co_filename == _FILE else None

    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)


def _role(message: Message) -> Role:
    return "target" if message.speaker == "assistant" else "context"


def _is_empty(part: Any) -> bool:
    return isinstance(part, str) and not part


def _content(turn: int, role: Role, part: Any) -> _Piece:
    return _Piece(turn, role, part, "content" if isinstance(part, str) else "picture")
