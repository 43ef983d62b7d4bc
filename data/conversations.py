"""LLaVA's form of a conversation -> messages: turns of {"from", "value"}, with <image> where each picture stands.

Or turns of {"role", "content"}, as chat templates take them.
"""

from collections.abc import Sequence
from typing import Any

from data.chat import Message, Speaker
from data.shards import BadRecord
from data.words import is_text

MAX_TURNS = 1000  # chat templates may search all turns for each
IMAGE = "<image>"  # stands for a picture
_SPEAKERS: dict[str, Speaker] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_conversation(turns: Any, pictures: Sequence[bytes], where: str) -> tuple[tuple[Message[bytes], ...], bool]:
    """Return the messages, and whether the pictures had no placeholders and were put first.

    Line breaks beside a placeholder are dropped, as pictures have borders of their own. Pictures that no turn mentions
    at all begin the user's first turn. Raises BadRecord for any other difference, an unknown speaker, an empty turn,
    and where the assistant says nothing.
    """
    texts = _turns(turns, where)
    placeholders = sum(text.count(IMAGE) for _, text in texts)
    if placeholders > len(pictures):
        raise BadRecord("placeholder without an image", where, f"{placeholders} <image>, {len(pictures)} images")
    users = [i for i, (speaker, _) in enumerate(texts) if speaker == "user"]
    if (placeholders and placeholders < len(pictures)) or (pictures and not placeholders and not users):
        raise BadRecord("image without a placeholder", where, f"{placeholders} <image>, {len(pictures)} images")
    if not any(speaker == "assistant" for speaker, _ in texts):
        raise BadRecord("no assistant turn", where, f"{len(texts)} turns")
    left, messages = iter(pictures), []
    for i, (speaker, text) in enumerate(texts):
        first, *others = text.split(IMAGE)
        parts: list[str | bytes] = [*pictures] if not placeholders and pictures and i == users[0] else []
        parts.append(first.rstrip("\n") if others else first)
        for number, other in enumerate(others, start=1):
            parts += [next(left), other.lstrip("\n") if number == len(others) else other.strip("\n")]
        messages.append(Message(speaker, tuple(part for part in parts if isinstance(part, bytes) or part.strip())))
    return tuple(messages), bool(pictures) and not placeholders


def _turns(turns: Any, where: str) -> list[tuple[Speaker, str]]:
    if not isinstance(turns, list) or not turns:
        raise BadRecord("undecodable conversation", where, "expected a list of turns, each with from and value")
    if len(turns) > MAX_TURNS:
        raise BadRecord("too many turns", where, f"{len(turns)}, expected at most {MAX_TURNS}")
    texts: list[tuple[Speaker, str]] = []
    for turn in turns:
        said = turn if isinstance(turn, dict) else {}
        speaker, text = said.get("from", said.get("role")), said.get("value", said.get("content"))
        if not isinstance(speaker, str) or not isinstance(text, str) or not is_text(text):
            raise BadRecord("undecodable conversation", where, f"{repr(turn)[:80]}: expected from and value, both text")
        if speaker.lower() not in _SPEAKERS:
            raise BadRecord("unknown speaker", where, f"{speaker[:80]!r}, expected one of {', '.join(_SPEAKERS)}")
        if not text.strip():
            raise BadRecord("empty turn", where, f"turn {len(texts) + 1}, of {speaker}")
        texts.append((_SPEAKERS[speaker.lower()], text.strip()))
    return texts
