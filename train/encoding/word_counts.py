"""What an input file's words became: tokens, those unknown to the tokenizer, and pictures by kinds of captions."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from data.raw_document import RawDocument
from data.tokenizer import Tokenizer

GIVEN = "given"  # of a caption, in counts beside the reasons why others are not
EXAMPLES_KEPT = 8  # unknown words kept per input file


@dataclass
class WordCounts:
    """Tokens encoded, how many of them as the unknown piece, a few of its words; and pictures by kinds of captions."""

    tokens: int = 0
    unknown: int = 0
    examples: list[str] = field(default_factory=list)
    # Of each of several kinds of captions: pictures that have it (GIVEN), and those that do not, by reason.
    captions: dict[str, dict[str, int]] = field(default_factory=dict)
    chat: str | None = None  # hash of the chat template, or PLAIN_FORM, of conversations; None: there are none

    def count(self, tokenizer: Tokenizer, token_ids: Iterable[np.ndarray], texts: Iterable[str]) -> None:
        """Count the tokens [len] that texts became."""
        all_ids = np.concatenate([np.zeros(0, np.int64), *token_ids])
        self.tokens += len(all_ids)
        if unknown := int((all_ids == tokenizer.unknown).sum()):
            self.unknown += unknown
            words = (word for text in texts for word in tokenizer.unknown_in(text))
            new = dict.fromkeys(word for word in words if word not in self.examples)
            self.examples += list(new)[: EXAMPLES_KEPT - len(self.examples)]

    def count_captions(self, document: RawDocument, kinds: Iterable[str]) -> None:
        """Count which kinds of captions a picture has."""
        for kind in kinds if document.caption_kinds else ():
            found, of_kind = document.no_captions.get(kind, GIVEN), self.captions.setdefault(kind, {})
            of_kind[found] = of_kind.get(found, 0) + 1
