"""Several captions of a picture: their weights, which of them is drawn, and how long that one is on average.

Captions may be of several *kinds*: the keys that `caption_keys` named when they were encoded. A kind is drawn by weight
among those that the picture has, then one of its captions, each as likely. A kind of weight 0 is never drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


def check_weights(option: str, weights: Mapping[str, float]) -> None:
    """Raise ValueError for weights of kinds of captions that cannot be drawn by; no weights at all are fine."""
    if weights and not (all(weight >= 0 for weight in weights.values()) and 0 < math.fsum(weights.values()) < math.inf):
        raise ValueError(f"{option}={dict(weights)}: expected finite weights, 0 or more, and one above 0")


def weights_in_force(source: str, encoded: Mapping[str, float], given: Mapping[str, float]) -> tuple[float, ...]:
    """Return the weight of each kind of a source's captions: as given for training or, without that, at encoding.

    Raises ValueError for names that the data does not have.
    """
    if not given:
        return tuple(encoded.values())
    option = f"data.sources.{source}.captions={dict(given)}"
    if not encoded:
        raise ValueError(
            f"{option}: this data has no kinds of captions; leave it out, or encode the data again with several "
            "caption_keys, such as caption_keys={caption: 1, long_caption: 2}"
        )
    if unknown := sorted(given.keys() - encoded.keys()):
        raise ValueError(f"{option}: no captions {', '.join(unknown)} in this data; expected some of {list(encoded)}")
    return tuple(float(given.get(name, 0)) for name in encoded)


def drawable(count: int, kinds: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return which of a picture's `count` captions may be drawn; `kinds` [count], or empty for captions of one kind."""
    return [i for i in range(count) if not kinds or weights[kinds[i]] > 0]


def draw_caption(choices: Sequence[int], kinds: Sequence[int], weights: Sequence[float], uniform: float) -> int:
    """Draw one of `choices`, numbers of captions that may be drawn, one or more, by a `uniform` in [0, 1)."""
    if kinds:
        present = sorted({kinds[i] for i in choices})
        place = uniform * math.fsum(weights[kind] for kind in present)
        kind = present[0]
        for following in present[1:]:
            if place < weights[kind]:
                break
            place -= weights[kind]
            kind = following
        choices = [i for i in choices if kinds[i] == kind]
        uniform = place / weights[kind]  # what the choice of a kind left of it; rounding may make it 1
    return choices[min(int(uniform * len(choices)), len(choices) - 1)]


@dataclass
class CaptionTokens:
    """Lengths of the captions of a shard's pictures that may have several, by the kinds that a picture has.

    `sums` holds, for each set of kinds, the tokens of each picture's longest caption, and of each kind the mean of its
    captions, all added over these pictures. Whatever the weights, the mean length of the captions drawn follows.
    """

    sums: dict[tuple[int, ...], list[float]] = field(default_factory=dict)

    def add(self, lengths: Sequence[int], kinds: Sequence[int]) -> None:
        """Count one picture's captions; `kinds` is empty for captions of one kind."""
        by_kind: dict[int, list[int]] = {}
        for length, kind in zip(lengths, kinds or [0] * len(lengths), strict=True):
            by_kind.setdefault(kind, []).append(length)
        present = tuple(sorted(by_kind))
        means = [sum(by_kind[kind]) / len(by_kind[kind]) for kind in present]
        before = self.sums.get(present, [0.0] * (1 + len(means)))
        self.sums[present] = [total + one for total, one in zip(before, [max(lengths), *means], strict=True)]

    def rounded(self) -> dict[str, list[int]]:
        """Return the sums in whole tokens, as a shard's entry keeps them: {"0+1": [longest, kind 0, kind 1]}."""
        return {"+".join(map(str, kinds)): [round(total) for total in self.sums[kinds]] for kinds in sorted(self.sums)}


def not_drawn(tokens: Mapping[str, Sequence[int]], weights: Sequence[float]) -> float:
    """Return how many tokens the captions drawn have less, on average, than the longest ones: of `rounded` sums."""
    less = []
    for names, (longest, *means) in tokens.items():
        shares = [weights[int(kind)] if weights else 1.0 for kind in names.split("+")]
        drawn = math.fsum(share * mean for share, mean in zip(shares, means, strict=True))
        less.append(longest - (drawn / math.fsum(shares) if any(shares) else 0.0))
    return math.fsum(less)
