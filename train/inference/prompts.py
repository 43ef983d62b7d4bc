"""What a model can be asked: the parts of a prompt, and which prompts are refused because they ask for nothing.

`train.sample`, `train.serve`, evaluations and the Pipeline itself check here, each under its own names and as early as
it can. Refusals read "found: expected something; remedy".
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from data.tokenizer import Tokenizer
from model.sampler_config import SamplerConfig

Part = str | np.ndarray  # text, or a picture uint8 [H, W, 3]; in prompts also token ids int64 [len]
# The pictures before a question, the question, and what the system says first, if anything.
Question = tuple[Sequence[np.ndarray], str] | tuple[Sequence[np.ndarray], str, str | None]


SOME_PICTURE = np.zeros((1, 1, 3), np.uint8)  # stands for any where only the length of a prompt matters


def is_picture(part: Part) -> TypeGuard[np.ndarray]:
    return isinstance(part, np.ndarray) and part.ndim == 3


def text_of(parts: Sequence[Part]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


def pictures_of(results: Iterable[Sequence[Part]]) -> list[np.ndarray]:
    return [part for parts in results for part in parts if is_picture(part)]


def require_words(name: str, text: str, meaning: str) -> None:
    """Raise ValueError for a text of blanks, or none at all, where something must be said."""
    if not text.strip():
        raise ValueError(f"{name}={text!r}: expected words, {meaning}; say it in {name}")


def require_question(name: str, question: str, system: str | None = None) -> None:
    """Raise ValueError for a question without words, or for a system that says none."""
    require_words(name, question, "what to answer")
    if system is not None:
        require_words("system", system, "or none of it")


def require_instruction(name: str, instruction: str, num_pictures: int, pictures: str = "pictures") -> None:
    """Raise ValueError for an edit that says nothing or has nothing to change; `pictures` is their option's name."""
    require_words(name, instruction, "what to make of the pictures")
    if not num_pictures:
        raise ValueError(f"{pictures}=[]: expected one or more pictures to change; give them, or draw from words alone")


def require_captions(name: str, prompts: Iterable[Sequence[Part]]) -> None:
    """Raise ValueError for blanks without a picture; an empty text stands for any picture, as without its caption."""
    for prompt in prompts:
        text = text_of(prompt)
        if text and not text.strip() and not any(map(is_picture, prompt)):
            raise ValueError(f'{name}={text!r}: expected words, or "" for any picture; correct {name}')


@dataclass(frozen=True)
class Room:
    """What prompts take of the model's sequence."""

    tokenizer: Tokenizer
    given: int  # patches of a picture in a prompt
    new: int  # patches of one that is drawn
    config: SamplerConfig
    sequence_length: int  # of training

    @property
    def most(self) -> tuple[int, str]:
        """Return how many tokens may be taken, and who says so."""
        if self.config.max_length is not None:
            return self.config.max_length, "which is max_length"
        return self.sequence_length, "as in training"

    def taken(self, prompt: Sequence[Part], draw: bool) -> int:
        """Return the tokens of a prompt with BOS, and BOI and EOI around its pictures.

        Where max_length is given, also those of a picture to `draw` after it, for which a row then has no other room.
        """
        ids = [self.tokenizer.encode(part) if isinstance(part, str) else part for part in prompt]
        after = self.new + 1 if draw and self.config.max_length is not None else 0
        return 1 + sum(self.given + 2 if is_picture(part) else len(part) for part in ids) + after

    def require(self, name: str, prompts: Iterable[tuple[str, Sequence[Part]]], draw: bool) -> None:
        """Raise ValueError for prompts, each with its place, that are too long; `name` is the option that gave them."""
        taken, (most, whose) = [(where, self.taken(prompt, draw)) for where, prompt in prompts], self.most
        if long := [f"{where} takes {tokens:,}" for where, tokens in taken if tokens > most]:
            needed = max(tokens for _, tokens in taken) + (self.new + 1 if draw else self.config.max_new_tokens)
            raise ValueError(
                f"{name}: {len(long)} of {len(taken)} are too long, as {', '.join(long[:3])}: expected at most "
                f"{most:,} tokens, {whose}; shorten them, leave them out, or give max_length={needed}"
            )
