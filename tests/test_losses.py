"""Both losses against their definitions; the chunked one in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.losses import chunk_loss_on_cpu, compiled_chunk_loss, linear_cross_entropy, noise_error


def problem(tokens=37, width=16, vocab=29, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) / 4).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.3] = -100
    return hidden, weight, targets


def gradients(total, *inputs):
    return torch.autograd.grad(total * 0.37, inputs)


def test_cross_entropy_equals_its_definition():
    hidden, weight, targets = problem(tokens=9)
    expected = 0.0
    for x, target in zip(hidden.double(), targets.tolist(), strict=True):
        if target >= 0:
            logits = weight.double() @ x
            expected += logits.exp().sum().log() - logits[target]
    total, count, each = linear_cross_entropy(hidden, weight, targets, chunk=4)
    assert abs(total - expected) < 1e-4
    assert count == (targets >= 0).sum()
    assert not each.requires_grad and each[targets < 0].eq(0).all() and each.sum() == pytest.approx(total.item())
    terms = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    assert torch.allclose(each, terms, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 37, 100])
def test_chunks_change_neither_the_sum_nor_the_gradients(chunk):
    hidden, weight, targets = problem()
    total, *_ = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    assert torch.allclose(total, expected, rtol=1e-6)
    for ours, theirs in zip(gradients(total, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_bf16_is_near_f32():
    hidden, weight, targets = problem(dtype=torch.bfloat16)
    total, *_ = linear_cross_entropy(hidden, weight, targets, chunk=8)
    expected = F.cross_entropy(hidden.float() @ weight.float().T, targets, ignore_index=-100, reduction="sum")
    assert total.dtype == torch.float32
    assert abs(total / expected - 1) < 1e-2
    for ours, theirs in zip(gradients(total, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.parametrize("count", [4080, 1_000_003])
def test_the_global_count_scales_bf16_gradients_without_being_rounded(count):
    """1 / count in bf16 is off by up to 0.39 %: a text gradient is the f32 product of sum and scale, rounded once."""
    hidden, weight, targets = problem(tokens=200, dtype=torch.bfloat16)
    total, *_ = linear_cross_entropy(hidden, weight, targets)
    sums = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    for ours, whole in zip(torch.autograd.grad(total / count, (hidden, weight)), sums, strict=True):
        assert torch.equal(ours, (whole.float() / count).bfloat16())
        naive = whole * torch.tensor(1 / count).bfloat16()
        assert not torch.equal(ours, naive) and abs((naive.double() / whole.double()).nanmean() * count - 1) > 1e-3


def test_the_global_count_scales_bf16_image_gradients_without_being_rounded():
    """d (weight / count) mean (p - t)^2 / d p in closed form, rounded once, at a bf16 prediction and an f32 target."""
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(3, 4, 64, 64, generator=generator).bfloat16().requires_grad_()
    target, count = torch.randn(3, 4, 64, 64, generator=generator), 1_000_003
    weight, valid = torch.tensor([0.5, 3.0, 2.0]), torch.tensor([True, True, False])
    total, *_ = noise_error(pred, target, valid, weight)
    (grad,) = torch.autograd.grad(5.0 * (total / count), pred)
    scale = (5.0 / count * weight * valid / 4 / 64**2).double()[:, None, None, None]
    exact = 2 * (pred.detach().double() - target.double()) * scale
    assert torch.allclose(grad.double(), exact, rtol=2**-8, atol=0)
    factor = (grad.double() * exact).sum() / exact.square().sum()
    assert abs(factor - 1) < 3e-4 < 1e-3 < abs(torch.tensor(1 / count).bfloat16().double() * count - 1)


class ProductWidths(TorchDispatchMode):
    """Collects the sizes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket is torch.ops.aten.mm:
            self.sizes |= {size for matrix in args for size in matrix.shape}
        return operator(*args, **(kwargs or {}))


def test_padding_of_the_vocabulary_changes_nothing_but_the_width_of_the_products():
    """Whatever the padding rows hold: they get no probability and a gradient of exactly 0."""
    hidden, weight, targets = problem(vocab=29)
    expected, *_ = linear_cross_entropy(hidden, weight, targets, chunk=16)
    padded = torch.cat([weight.detach(), torch.full((35, 16), 7.0)]).requires_grad_()
    with ProductWidths() as products:
        total, count, _ = linear_cross_entropy(hidden, padded, targets, chunk=16, vocab_size=29)
    assert 64 in products.sizes and 29 not in products.sizes
    assert count == (targets >= 0).sum() and torch.allclose(total, expected, rtol=1e-6)
    ours, theirs = gradients(total, hidden, padded), gradients(expected, hidden, weight)
    assert torch.allclose(ours[0], theirs[0], atol=1e-6) and torch.allclose(ours[1][:29], theirs[1], atol=1e-6)
    assert ours[1][29:].eq(0).all()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_chunks_body_of_gpus_is_that_of_cpus_and_one_graph_for_any_number_of_rows(backend):
    compiled_chunk_loss.cache_clear()
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    with torch.compiler.set_stance(force_backend=counting):
        for rows in (64, 48, 37, 64):
            logits = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).bfloat16()
            targets = torch.randint(0, 90, (rows,), generator=torch.Generator().manual_seed(rows))
            targets[::3] = -100
            ours, grad = compiled_chunk_loss()(logits.clone(), targets, 90, True)
            theirs, expected = chunk_loss_on_cpu(logits.clone(), targets, 90, True)
            assert torch.allclose(ours, theirs, rtol=1e-6) and torch.equal(grad, expected)
            assert grad[:, 90:].eq(0).all() and len(graphs) == 1
        alone, nothing = compiled_chunk_loss()(logits, targets, 90, False)
    assert nothing is None and torch.allclose(alone, ours, rtol=1e-6)
    compiled_chunk_loss.cache_clear()


def test_nothing_to_predict_is_zero_with_zero_gradients():
    hidden, weight, targets = problem()
    total, count, _ = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert total == 0 and count == 0
    assert all(grad.eq(0).all() for grad in gradients(total, hidden, weight))


def test_without_gradients_the_sum_is_the_same():
    hidden, weight, targets = problem()
    with torch.no_grad():
        frozen, *_ = linear_cross_entropy(hidden, weight, targets, chunk=8)
    assert torch.equal(frozen, linear_cross_entropy(hidden, weight, targets, chunk=8)[0].detach())


def test_noise_error_is_a_sum_of_per_image_means_over_valid_images():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 4, 3, 2, 6, generator=generator)
    valid = torch.tensor([True, False, True, False])
    weight = torch.tensor([0.5, 9.0, 2.0, 9.0])
    means = [sum((a - b) ** 2 for a, b in zip(p.flatten(), t.flatten())) / 36 for p, t in zip(pred, target)]  # noqa: B905
    total, count, each = noise_error(pred, target, valid)
    assert torch.allclose(total, means[0] + means[2]) and count == 2 and torch.allclose(each, torch.stack(means))
    weighted, _, same = noise_error(pred, target, valid, weight)
    assert torch.allclose(weighted, 0.5 * means[0] + 2.0 * means[2]) and torch.equal(same, each)


def test_noise_error_sends_no_gradient_to_unused_slots():
    pred = torch.randn(2, 3, 2, 2, requires_grad=True)
    total, *_ = noise_error(pred, torch.randn(2, 3, 2, 2), torch.tensor([True, False]))
    total.backward()
    assert pred.grad[0].ne(0).any() and pred.grad[1].eq(0).all()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch < 2.13 has none")
def test_cross_entropy_equals_torchs_own():
    hidden, weight, targets = problem()
    expected = F.linear_cross_entropy(hidden, weight, targets, ignore_index=-100, reduction="sum")
    total, *_ = linear_cross_entropy(hidden, weight, targets, chunk=8)
    assert torch.allclose(total, expected, rtol=1e-5)
    for ours, theirs in zip(gradients(total, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_gradients_pass_gradcheck_in_f64():
    hidden, weight, targets = problem(tokens=6, width=3, vocab=5, dtype=torch.float64)

    def reference(hidden, weight):
        return F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")

    total, *_ = linear_cross_entropy(hidden, weight, targets, chunk=4)
    for ours, theirs in zip(gradients(total, hidden, weight), gradients(reference(hidden, weight), hidden, weight)):  # noqa: B905
        assert torch.allclose(ours, theirs, atol=1e-5)
