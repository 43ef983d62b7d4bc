"""CIDEr equals pycocoevalcap's on equal tokens; tokens are those that the treebank's conventions give."""

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from train.evaluation.cider import cider, tokens_of
from train.evaluation.scores import bootstrap

WORDS = ("a", "the", "red", "blue", "dog", "cat", "sits", "runs", "on", "in", "grass", "water", "two", "three")


def _corpus(items: int, seed: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Return candidates and 1 to 5 references each, some equal to their candidate, some candidates empty."""
    random = np.random.default_rng(seed)

    def text(low: int) -> list[str]:
        return random.choice(WORDS, random.integers(low, 14)).tolist()

    references = [[text(1) for _ in range(random.integers(1, 6))] for _ in range(items)]
    candidates = [text(0) if i % 3 else of_item[0] for i, of_item in enumerate(references)]
    return candidates, references


@pytest.mark.parametrize("items", [1, 2, 60])
def test_scores_are_pycocoevalcaps_for_every_item(items: int) -> None:
    candidates, references = _corpus(items, items)
    truth = {i: [" ".join(tokens) for tokens in of_item] for i, of_item in enumerate(references)}
    mean, expected = Cider().compute_score(truth, {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)})
    found = cider(candidates, references)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.mean() == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert items != 1 or found == 0, "a corpus of one has no idf"
    assert items != 60 or (found.max() > 3 and found.min() == 0)


def test_the_best_caption_is_the_reference_itself_and_its_interval_holds_the_mean() -> None:
    candidates, references = _corpus(60, 7)
    same = cider([of_item[0] for of_item in references], [of_item[:1] for of_item in references])
    assert same.max() == pytest.approx(10) and same.min() > 2.4  # shorter than four tokens: fewer orders
    score = bootstrap(cider(candidates, references))
    assert score.low < score.value < score.high and score.items == 60


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
        ("The dog's bowl isn't full; it can't be!", "the dog 's bowl is n't full it ca n't be"),
        ('Two dogs\' "new" toys -- and black-and-white cats...', "two dogs new toys and black-and-white cats"),
        ("They'll say we've 1,000 cakes at 10:30", "they 'll say we 've 1,000 cakes at 10:30"),
        (
            "A (red) sign of Mr. Smith in the U.S. at 5 o'clock",
            "a -lrb- red -rrb- sign of mr. smith in the u.s. at 5 o'clock",
        ),
        ("I cannot, gonna try & pay $5 for 50%", "i can not gon na try & pay $ 5 for 50 %"),
        ("A 2nd café’s 747 jet", "a 2nd café 's 747 jet"),
        ("  \n ", ""),
    ],
)
def test_tokens_follow_the_treebank(caption: str, expected: str) -> None:
    assert tokens_of(caption) == expected.split()
