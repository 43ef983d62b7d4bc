"""Text tokens from logits and uniform numbers."""

import torch

from model.nucleus import sample_tokens


def test_nucleus_sampling_is_the_inverse_of_the_cumulative() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    logits = probs.log()

    def pick(u: float, temperature: float = 1.0, top_p: float = 1.0) -> float:
        return sample_tokens(logits, torch.tensor([u]), temperature, top_p).item()

    assert [pick(u) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.89, 0.91, 1 - 1e-9)] == [1, 1, 3, 3, 2, 2, 0, 0]
    assert [pick(u, top_p=0.7) for u in (0.0, 0.66, 0.67, 1 - 1e-9)] == [1, 1, 3, 3]
    assert [pick(u, top_p=1e-6) for u in (0.0, 0.999)] == [1, 1]
    assert pick(0.999, temperature=0) == 1
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = sample_tokens(logits.expand(100_000, -1), u, 2.0, 1.0).bincount() / 100_000
    assert torch.allclose(counts, (probs[0].sqrt() / probs.sqrt().sum()).to(counts.dtype), atol=1e-4)


def test_sorting_the_likeliest_tokens_first_changes_no_token() -> None:
    """Whether they decide, or others do: from flat to peaked, with equal values, and at both ends of the cumulative."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.5, 2.0, 10.0):
        logits = (torch.randn(200, 300, generator=generator) * scale).bfloat16().float()  # many are equal
        logits[:, 7] = -torch.inf
        uniforms = torch.rand(200, generator=generator)
        uniforms[:2] = torch.tensor([0.0, 1 - 1e-7])
        for top_p in (1.0, 0.9):
            whole = sample_tokens(logits, uniforms, 1.0, top_p, head=300)
            for head in (1, 8, 64):
                assert torch.equal(sample_tokens(logits, uniforms, 1.0, top_p, head), whole), (scale, top_p, head)
