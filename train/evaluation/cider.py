"""CIDEr-D (Vedantam et al. 2015) as pycocoevalcap computes it, and tokens close to those of its Java tokenizer.

Equal tokens give pycocoevalcap's numbers, with its quirks: the length penalty counts bigrams, and the idf comes from
the references that are scored, so a score depends on the whole set. Papers print 100 times these numbers.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDERS = 4  # n-grams of 1 to 4 tokens
SIGMA = 6.0  # of the penalty on a difference in length
SCALE = 10.0
Tokens = Sequence[str]
NGram = tuple[str, ...]

# What the Penn Treebank's conventions make of lower-case English. docs/evaluation.md says what Stanford's tokenizer,
# which pycocoevalcap runs, does with less usual texts.
_TOKEN = re.compile(
    r"""n't\b | '(?:s|m|d|re|ve|ll)\b
    | (?:[a-z]\.){2,}                                               # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|prof|inc|co|corp|ltd)\.(?=\s) # their full stop is no end of a sentence
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)
    | \d+(?:[.,:]\d+)*(?!\w)
    | o'[a-z]+
    | [^\W\d_]+?(?=n't\b)
    | \w+(?:-\w+)*
    | \S""",
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_DROPPED = frozenset("'`\".?!,:-;…“”‘’–—")  # of which pycocoevalcap keeps none


def tokens_of(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation marks."""
    text = caption.lower().replace("’", "'")
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text) if token not in _DROPPED]


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """Return the score f64 [N] of each candidate against its references, one or more; `SCALE` at best.

    The corpus score is their mean. An interval from these scores takes the idf of this corpus as given.
    """
    assert len(candidates) == len(references) and all(references), "each item has a candidate and references"
    counts = [[_ngrams(tokens) for tokens in of_item] for of_item in references]
    documents = Counter(ngram for of_item in counts for ngram in set().union(*of_item))
    size = math.log(len(references)) if references else 0.0
    scores = []
    for tokens, of_item in zip(candidates, counts, strict=True):
        mine = _Vector(_ngrams(tokens), documents, size)
        likeness = [mine.likeness(_Vector(ngrams, documents, size)) for ngrams in of_item]
        scores.append(SCALE * sum(likeness) / len(likeness))
    return np.array(scores)


def _ngrams(tokens: Tokens) -> Counter[NGram]:
    lengths = range(1, ORDERS + 1)
    return Counter(tuple(tokens[i : i + n]) for n in lengths for i in range(len(tokens) - n + 1))


class _Vector:
    """The tf-idf weights of a text's n-grams, by order."""

    def __init__(self, ngrams: Counter[NGram], documents: Counter[NGram], log_size: float) -> None:
        self.weights: list[dict[NGram, float]] = [{} for _ in range(ORDERS)]
        for ngram, count in ngrams.items():
            self.weights[len(ngram) - 1][ngram] = count * (log_size - math.log(max(1.0, documents[ngram])))
        self.norms = [math.sqrt(sum(weight * weight for weight in of_order.values())) for of_order in self.weights]
        self.length = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)

    def likeness(self, reference: "_Vector") -> float:
        """Return the mean over orders of the clipped cosine, times the penalty on a difference in length."""
        total = 0.0
        orders = zip(self.weights, reference.weights, self.norms, reference.norms, strict=True)
        for mine, theirs, norm, other in orders:
            shared = [(min(weight, theirs[ngram]), theirs[ngram]) for ngram, weight in mine.items() if ngram in theirs]
            if norm and other:
                total += sum(clipped * weight for clipped, weight in shared) / (norm * other)
        return total / ORDERS * math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))
