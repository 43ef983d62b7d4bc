"""A run is refused, warned or given more recomputation by what its ranks' memory holds, on every rank alike (P10)."""

from dataclasses import replace

import pytest
import torch

from tests.ranks import run_ranks
from train.distributed.parallelize import ParallelConfig
from train.distributed.ranks import Ranks
from train.planning import fit
from train.planning.estimate import largest_batches_of
from train.planning.fit import LEVELS, agree_on_memory, check_memory, choose_level, rehearse_levels
from train.planning.rehearsal import Rehearsal, rehearse
from train.pretrain_config import PretrainConfig

VOCAB, RANKS, GRIDS, CPU = 500, 2, [(8, 8)], torch.device("cpu")


def _config(**parallel: str) -> PretrainConfig:
    config = PretrainConfig(run_dir="", micro_batch_size=2, parallel=ParallelConfig(**parallel))
    trunk = replace(config.model.transformer, width=64, layers=2, heads=2)
    data = replace(config.data, lanes=4, sequence_length=256, tokenizer="")
    return replace(config, model=replace(config.model, transformer=trunk), data=data)


def _rehearsed(config: PretrainConfig) -> Rehearsal:
    return rehearse(config, VOCAB, RANKS, largest_batches_of(config, RANKS, GRIDS), cuda=False)


def _agreed(ranks: Ranks, cases: list[tuple[list[int], dict[str, Rehearsal]]]) -> list[tuple[str, list[str]]]:
    """Return what is decided by the memory of each rank and rank 0's rehearsals."""
    decided = []
    for memory, found in cases:
        fit.memory_of = lambda _, memory=memory: memory[ranks.rank]  # of machines not here; in this process alone
        config, lines = agree_on_memory(_config(), found if ranks.is_first else {}, ranks)
        decided.append((config.parallel.activation_checkpointing, lines))
    return decided


def test_auto_is_the_same_on_every_rank_and_fits_the_least_memory_of_any() -> None:
    """Rank 0 rehearses before the ranks meet, only until one fits its own memory."""
    of_level = {level: _rehearsed(_config(activation_checkpointing=level)) for level in LEVELS}
    peaks = {level: int(sum(rehearsal.peak.values())) for level, rehearsal in of_level.items()}
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    for number, level in enumerate(LEVELS, start=1):
        found = rehearse_levels(_config(), peaks[level], lambda c: of_level[c.parallel.activation_checkpointing])
        assert list(found) == list(LEVELS[:number])
        decided, why = choose_level(_config(), found, peaks[level])
        assert decided == _config(activation_checkpointing=level) and f"{peaks[level] / 2**30:.2f} of" in why
    assert choose_level(_config(activation_checkpointing="full"), {}, 0)[0] == _config(activation_checkpointing="full")

    only_none = {"none": of_level["none"]}
    cases = {  # by the memory of each rank
        "none": ([peaks["none"], peaks["none"]], only_none),
        "selective": ([peaks["none"], peaks["selective"]], only_none),
        "full": ([peaks["selective"], peaks["full"] - 1], of_level),
    }
    first, second = run_ranks(_agreed, RANKS, list(cases.values()))
    assert first == second and [level for level, _ in first] == list(cases)
    assert all(lines[0].startswith(f"activation checkpointing: {level} (") for level, lines in first)
    assert [len(lines) for _, lines in first] == [1, 1, 2]
    assert first[2][1][1].startswith("warning: the largest step is estimated at")


def test_a_cpu_far_from_its_limit_rehearses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "rehearse", lambda *_, **__: pytest.fail("a rehearsal"))
    monkeypatch.setattr(fit, "memory_of", lambda _: 2**40)
    assert check_memory(_config(), VOCAB, RANKS, GRIDS, CPU, first=True) == {}
    decided, why = choose_level(_config(), {}, 2**40)
    assert decided == _config(activation_checkpointing="none") and "by a rough count" in why


def test_states_that_cannot_fit_are_refused_and_a_peak_that_may_not_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = _config(activation_checkpointing="full")
    states = int(sum(rehearse(config, VOCAB, RANKS, [], cuda=False).states.values()))
    monkeypatch.setattr(fit, "memory_of", lambda _: states)
    found = check_memory(config, VOCAB, RANKS, GRIDS, CPU, first=True)
    assert list(found) == ["full"]
    assert "estimated at" in fit.warning_unless_peak_fits(found["full"], states)
    assert fit.warning_unless_peak_fits(found["full"], 2**30) is None
    assert check_memory(config, VOCAB, RANKS, GRIDS, CPU, first=False) == {}, "other ranks look at the states alone"
    monkeypatch.setattr(fit, "memory_of", lambda _: states - 1)
    with pytest.raises(ValueError, match=r"a rank's states take .* more than .* use more ranks than 2"):
        check_memory(config, VOCAB, RANKS, GRIDS, CPU, first=False)
