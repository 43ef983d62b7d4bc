"""Sampling that is watched: what is seen on the way, and rows that leave, which change no bits of the others (P12)."""

import pytest
import torch

from model.diffusion import DiffusionConfig
from model.draws import DrawsOfSamples, SeededDraws
from model.sampler import Prompt, generate
from tests.test_sampler import FLOW, GRID, MIXED, SPECIAL, settings, text, tiny_model


def test_who_watches_sees_each_rows_estimate_and_changes_no_bits():
    """The last estimate of a deterministic sampler is the picture; samples keep their own seeds in one batch (P12)."""
    model, seen = tiny_model(), []
    prompts = [Prompt((text(5),), draw=True, index=i) for i in range(3)]
    config, draws = settings(max_new_tokens=0), DrawsOfSamples([(4, 0), (0, 7), (4, 1)])
    rest = (config, DiffusionConfig(), SPECIAL, GRID)
    outputs = generate(model, prompts, *rest, draws, watch=lambda *step: seen.append(step))
    assert [step for _, step, _ in seen] == [1, 2, 3, 4] and all(set(rows) == {0, 1, 2} for rows, *_ in seen)
    rows, _, x0 = seen[-1]
    assert all(torch.equal(x0[place], outputs[row][0]) for place, row in enumerate(rows))
    assert not torch.allclose(seen[0][2], x0, atol=1e-3)
    alone = [Prompt((text(5),), draw=True, index=i) for i in (0, 1)]
    of_seed = generate(model, alone, *rest, SeededDraws(4))
    assert torch.equal(of_seed[0][0], outputs[0][0]) and torch.equal(of_seed[1][0], outputs[2][0])


@pytest.mark.parametrize(("sampler", "guided"), [("ddpm", 2.5), ("dpm++", 1.0), ("heun", 2.5)])
def test_rows_that_leave_run_no_more_and_change_no_bits_of_the_others(sampler: str, guided: float) -> None:
    """In the middle of a picture, where rows are of two lengths and so of two attention calls."""
    model = tiny_model()
    prompts = [Prompt((text(*[5 + i % 6] * (1 + 70 * (i % 2))),), draw=True, index=i) for i in range(6)]
    config = settings(sampler=sampler, guidance=guided, steps=5, max_new_tokens=2, max_images=1, max_length=None)
    rest = (config, FLOW if sampler == "heun" else DiffusionConfig(), SPECIAL, GRID, SeededDraws(3))
    expected = generate(model, prompts, *rest)
    seen: list[tuple[int, set[int]]] = []
    gone: set[int] = set()

    def leave(indices, step, x0) -> None:
        seen.append((step, set(indices)))
        assert len(x0) == len(indices)
        gone.update({2: {0, 3}, 4: {1}}.get(step, set()))

    outputs = generate(model, prompts, *rest, watch=leave, left=lambda index: index in gone)
    everyone = set(range(6))
    assert seen == [(step, everyone - {0: set(), 1: {0, 3}}.get(step > 2)) for step in (1, 2, 3, 4)] + [(5, {2, 4, 5})]
    assert [len(outputs[i]) for i in (0, 1, 3)] == [0, 0, 0]
    for i in (2, 4, 5):
        assert all(torch.equal(*pair) for pair in zip(outputs[i], expected[i], strict=True)), i


def test_all_may_leave_and_a_row_may_leave_while_it_writes() -> None:
    model, steps, tokens = tiny_model(), [], []
    rest = (settings(temperature=2.0), DiffusionConfig(), SPECIAL, GRID, SeededDraws(0))
    pictures = [Prompt((text(5),), draw=True, index=i) for i in range(2)]
    watch = {"watch": lambda indices, step, x0: steps.append(step), "left": lambda index: len(steps) == 2}
    outputs = generate(model, pictures, *rest, **watch)
    assert steps == [1, 2] and outputs == [[], []]
    expected = generate(model, MIXED, *rest)
    outputs = generate(model, MIXED, *rest, tokens.append, left=lambda index: index == 0 and len(tokens) > 2)
    assert sum(tokens) == pytest.approx(len(MIXED))
    assert [str(pair[0]) != str(pair[1]) for pair in zip(outputs, expected, strict=True)] == [True, *[False] * 4]
