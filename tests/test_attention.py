"""The mask against a double loop, its block form against its dense twin, RoPE, and the cache."""

import math

import pytest
import torch

from model.attention import additive_mask, apply_rope, attend, block_mask, dense_mask, rotary_tables


def random_layout(length, generator, padding=True, hide=True):
    """Return (document_ids, image_ids, visible_until) int32 [S]: documents of text and images, then padding."""

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    documents, images, until = [], [], []
    document, image = 0, 0
    target = length - draw(0, length // 3) if padding else length
    while len(documents) < target:
        document += 1
        for _ in range(draw(1, 5)):
            is_image = draw(0, 2)
            span = min(draw(1, length // 4 + 2), target - len(documents))
            last = len(documents) + span
            documents += [document] * span
            images += [image if is_image else -1] * span
            hidden = hide and is_image and draw(0, 2)
            until += [draw(last, length + 1) if hidden else length] * span
            image += is_image
    rest = length - len(documents)
    columns = documents + [0] * rest, images + [-1] * rest, until + [length] * rest
    return tuple(torch.tensor(column, dtype=torch.int32) for column in columns)


def random_layouts(rows, length, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    layouts = [random_layout(length, generator, **options) for _ in range(rows)]
    return tuple(torch.stack(columns) for columns in zip(*layouts, strict=True))


def slow_mask(document_ids, image_ids, visible_until):
    rows, length = document_ids.shape
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for b in range(rows):
        document, image, until = document_ids[b].tolist(), image_ids[b].tolist(), visible_until[b].tolist()
        for q in range(length):
            for k in range(length):
                if document[q] != document[k]:
                    continue
                same_image = image[q] >= 0 and image[q] == image[k]
                mask[b, q, k] = same_image or (k <= q and q < until[k])
    return mask


def materialise(mask, length):
    """Return (allowed by the block mask bool [B, S, S], partial and full block counts)."""
    block = mask.BLOCK_SIZE[0]
    rows = mask.kv_num_blocks.shape[0]
    dense = torch.zeros(rows, length, length, dtype=torch.bool)
    index = torch.arange(length)
    kinds = [(mask.kv_num_blocks, mask.kv_indices, False), (mask.full_kv_num_blocks, mask.full_kv_indices, True)]
    seen = [0, 0]
    for counts, indices, full in kinds:
        for b in range(rows):
            for q_block in range(counts.shape[-1]):
                q = index[q_block * block : (q_block + 1) * block]
                for k_block in indices[b, 0, q_block, : counts[b, 0, q_block]].tolist():
                    k = index[k_block * block : (k_block + 1) * block]
                    assert not dense[b, q[0] : q[-1] + 1, k[0] : k[-1] + 1].any(), "block listed twice"
                    inside = mask.mask_mod(torch.tensor(b), torch.tensor(0), q[:, None], k[None, :])
                    dense[b, q[0] : q[-1] + 1, k[0] : k[-1] + 1] = True if full else inside
                    seen[full] += 1
    return dense, seen


@pytest.mark.parametrize("seed", range(4))
def test_dense_mask_equals_a_double_loop(seed):
    layout = random_layouts(3, 48, seed)
    assert torch.equal(dense_mask(*layout)[:, 0], slow_mask(*layout))


def test_every_query_sees_something_even_in_padding():
    layout = random_layouts(4, 64, seed=5)
    assert dense_mask(*layout).any(-1).all()


@pytest.mark.parametrize("length", [64, 100, 257])
@pytest.mark.parametrize("block", [8, 16])
def test_block_mask_agrees_with_its_dense_twin_for_every_pair(length, block):
    for seed in range(6):
        layout = random_layouts(3, length, seed, padding=seed % 2 == 0, hide=seed % 3 > 0)
        dense, _ = materialise(block_mask(*layout, block=block), length)
        assert torch.equal(dense, dense_mask(*layout)[:, 0])


def test_block_mask_holds_on_ids_that_are_in_no_order():
    generator = torch.Generator().manual_seed(0)
    shape = (2, 96)
    document_ids = torch.randint(0, 3, shape, generator=generator, dtype=torch.int32)
    image_ids = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int32)
    visible_until = torch.randint(0, 97, shape, generator=generator, dtype=torch.int32)
    dense, _ = materialise(block_mask(document_ids, image_ids, visible_until, block=16), 96)
    assert torch.equal(dense, dense_mask(document_ids, image_ids, visible_until)[:, 0])


@pytest.mark.parametrize(
    ("length", "image", "block", "full", "partial"),
    [
        (1024, -1, 128, [*range(8)], [1] * 8),  # text: full below the diagonal, skipped above
        (512, 0, 128, [4] * 4, [0] * 4),  # inside one image: full
        (100, -1, 32, [0, 1, 2, 0], [1, 1, 1, 4]),  # a short last block is left to the mask
    ],
)
def test_blocks_of_one_document_are_full_where_that_is_proved(length, image, block, full, partial):
    document_ids = torch.ones(1, length, dtype=torch.int32)
    image_ids, until = torch.full_like(document_ids, image), torch.full_like(document_ids, length)
    mask = block_mask(document_ids, image_ids, until, block=block)
    assert mask.full_kv_num_blocks.flatten().tolist() == full and mask.kv_num_blocks.flatten().tolist() == partial


def test_most_blocks_of_packed_documents_are_proved_empty_or_full():
    layout = random_layouts(2, 2048, seed=1, hide=False)
    _, (partial, full) = materialise(block_mask(*layout), 2048)
    # In each of 16 block rows a handful of blocks is cut by a border; coarse classification would show here.
    assert partial < 2 * 16 * 5
    assert full > 0


def test_flex_attention_over_the_block_mask_equals_sdpa_over_the_dense_one():
    layout = random_layouts(2, 200, seed=2)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, 200, 16, generator=generator)
    k, v = (torch.randn(2, 2, 200, 16, generator=generator) for _ in range(2))
    dense = attend(q, k, v, dense_mask(*layout))
    blocked = attend(q, k, v, block_mask(*layout, block=32))
    assert torch.allclose(dense, blocked, atol=1e-5)


def test_attention_equals_a_softmax_written_out():
    layout = random_layouts(2, 40, seed=4)
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 4, 40, 8, generator=generator)
    k, v = (torch.randn(2, 2, 40, 8, generator=generator) for _ in range(2))
    mask = dense_mask(*layout)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, dim=1)) / math.sqrt(8)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = weights @ v.repeat_interleave(2, dim=1)
    assert torch.allclose(attend(q, k, v, mask), expected, atol=1e-5)


def test_bf16_attention_on_cpu_is_near_f32_in_value_and_gradients():
    layout = random_layouts(2, 40, seed=6)
    generator = torch.Generator().manual_seed(7)
    exact = [torch.randn(2, 4, 40, 16, generator=generator).requires_grad_() for _ in range(3)]
    upstream = torch.randn(2, 4, 40, 16, generator=generator)
    mask = dense_mask(*layout)
    expected = attend(*exact, mask)
    wanted = torch.autograd.grad(expected, exact, upstream)
    for form in (mask, additive_mask(mask, torch.bfloat16)):
        half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
        out = attend(*half, form)
        gradients = torch.autograd.grad(out, half, upstream.bfloat16())
        for ours, theirs in zip((out, *gradients), (expected, *wanted), strict=True):
            assert ours.dtype == torch.bfloat16
            assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_new_masks_of_the_same_shape_do_not_recompile():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    attention = torch.compile(attend, backend=backend, dynamic=False)
    q = torch.randn(2, 2, 64, 8)
    with torch.no_grad():
        for seed in range(3):
            layout = random_layouts(2, 64, seed)
            mask = block_mask(*layout, block=32)
            assert torch.allclose(attention(q, q, q, mask), attend(q, q, q, dense_mask(*layout)), atol=1e-5)
    assert len(graphs) == 1


def test_rope_turns_each_pair_by_its_position_times_its_frequency():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator)
    position_ids = torch.randint(0, 100, (2, 5), generator=generator)
    tables = rotary_tables(position_ids, 8, 10000.0)
    expected = torch.empty_like(x)
    for b in range(2):
        for t in range(5):
            for i in range(4):
                angle = position_ids[b, t] * 10000.0 ** (-2 * i / 8)
                even, odd = x[b, t, :, 2 * i], x[b, t, :, 2 * i + 1]
                expected[b, t, :, 2 * i] = even * angle.cos() - odd * angle.sin()
                expected[b, t, :, 2 * i + 1] = odd * angle.cos() + even * angle.sin()
    assert torch.allclose(apply_rope(x, tables), expected, atol=1e-5)
    tables.turns = None  # the way of CUDA and of compilers
    assert torch.allclose(apply_rope(x, tables), expected, atol=1e-5)


def test_rope_scores_depend_on_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator).expand(1, 6, 1, 16) for _ in range(2))
    positions = torch.arange(6)[None]
    near, far = (rotary_tables(positions + offset, 16, 100.0) for offset in (0, 37))
    scores = [(apply_rope(q, t)[0, :, 0] @ apply_rope(k, t)[0, :, 0].T) for t in (near, far)]
    assert torch.allclose(*scores, atol=1e-4)


def test_rope_2d_leaves_text_alone_and_turns_images_by_row_and_column():
    position_ids = torch.arange(8)[None]
    grid = torch.full((1, 8, 2), -1)
    plain = rotary_tables(position_ids, 16, 100.0)
    text_only = rotary_tables(position_ids, 16, 100.0, grid)
    assert torch.equal(plain.cos, text_only.cos) and torch.equal(plain.sin, text_only.sin)
    grid[0, 2:6] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    angles = torch.atan2(*((t := rotary_tables(position_ids, 16, 100.0, grid)).sin, t.cos))[0, :, 0]
    turn = torch.tensor([100.0 ** (-2 * i / 16) for i in range(8)])
    assert torch.allclose(angles[2:6, 1], torch.tensor([0.0, 0.0, 1.0, 1.0]) * turn[1], atol=1e-6)
    assert torch.allclose(angles[2:6, 3], torch.tensor([0.0, 1.0, 0.0, 1.0]) * turn[3], atol=1e-6)
    assert torch.allclose(angles[2:6, 2], torch.tensor([2.0, 3.0, 4.0, 5.0]) * turn[2], atol=1e-6)


@pytest.mark.gpu
def test_compiled_flex_equals_the_dense_mask_on_cuda_with_gradients():
    layout = tuple(ids.cuda() for ids in random_layouts(2, 640, seed=0))
    q, k, v = (torch.randn(2, 4, 640, 64, device="cuda", requires_grad=True) for _ in range(3))
    outputs, gradients = [], []
    for mask in (dense_mask(*layout), block_mask(*layout)):
        out = attend(q, k, v, mask)
        outputs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert torch.allclose(*outputs, atol=1e-2)
    for dense, flex in zip(*gradients, strict=True):
        assert torch.allclose(dense, flex, atol=5e-2)
