"""The bits of a row do not depend on the rows beside it, and rows that are not asked for do not run (P12)."""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from model.cache import KVCache, NextTokens
from model.cached_model import CachedModel
from model.linear import HAS_ONEDNN, Linear
from tests.test_sampler import CHANNELS, tiny_model

GRID, PATCHES, ROWS = (6, 2), 3, 6  # an odd number of patches


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's kernels divide work among threads, at places that depend on its size."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_multiples_of_8_rows_give_a_row_the_same_bits(threads: int, dtype: torch.dtype) -> None:
    """What `CachedModel._padding` builds on; not so for 1 to 7 rows."""
    for inputs, outputs in ((16, 48), (128, 384), (704, 256), (768, 3000), (704, 4), (4, 256)):  # the last as LoRA's
        generator = torch.Generator().manual_seed(inputs)
        x = torch.randn(520, inputs, generator=generator).to(dtype)
        weight, bias = torch.randn(outputs, inputs, generator=generator).to(dtype), torch.ones(outputs, dtype=dtype)
        for given in (None, bias):
            all_rows = F.linear(x, weight, given)
            for rows in (8, 16, 24, 40, 64, 128, 520):
                assert torch.equal(F.linear(x[-rows:], weight, given), all_rows[-rows:]), (inputs, outputs, rows)


@pytest.mark.skipif(not HAS_ONEDNN, reason="another torch, whose products are all MKL's")
def test_onednns_products_of_two_rows_or_more_give_a_row_the_same_bits_and_equal_torchs(threads: int) -> None:
    for inputs, outputs in ((16, 48), (128, 384), (704, 256), (768, 3000), (704, 4), (4, 256)):  # the last as LoRA's
        generator = torch.Generator().manual_seed(inputs)
        x, layer = torch.randn(65, inputs, generator=generator), Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.normal_(generator=generator)
            all_rows = layer(x)
            assert torch.allclose(all_rows, F.linear(x, layer.weight), rtol=1e-4, atol=1e-4)
            for rows in (2, 3, 5, 8, 17, 64):
                assert torch.equal(layer(x[-rows:]), all_rows[-rows:]), (inputs, outputs, rows)


def test_attention_gives_a_row_the_same_bits_whichever_thread_computes_it(threads: int) -> None:
    """Of one token (a decoding step), an odd and an even number."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(layers=1, rows=9, capacity=512, kv_heads=4, head_dim=64)
    cache.keys.normal_(generator=generator)
    cache.values.normal_(generator=generator)
    for count in (1, 7, 8):
        cache.lengths = [400] * 9
        q, k = (torch.randn(9, count, 4, 64, generator=generator) for _ in range(2))
        together = NextTokens([(cache, range(9))], count, causal=True).attend(0, q.transpose(1, 2), k, k)
        for rows in ([0], [4], [8], [2, 3, 4, 5]):
            part = NextTokens([(cache, rows)], count, causal=True)
            assert torch.equal(part.attend(0, q[rows].transpose(1, 2), k[rows], k[rows]), together[rows]), (count, rows)


def grow(patches: str, rows: list[int], asked: list[int], seed: int = 0) -> dict[int, list[torch.Tensor]]:
    """Let `rows` of different contents grow side by side in several ways; return what each of those `asked` gave."""
    model = tiny_model(seed, patches)
    cached = CachedModel(model, len(rows), 90, 16, PATCHES, [1, 3], batch=len(rows))
    results: dict[int, list[torch.Tensor]] = {row: [] for row in rows}

    def keep(chosen: list[int], values: torch.Tensor) -> None:
        for place, value in zip(chosen, values, strict=True):
            results[rows[place]].append(value)

    def latents(row: int, number: int) -> torch.Tensor:
        return torch.randn(CHANNELS, *GRID, generator=torch.Generator().manual_seed(10 * row + number))

    for _ in range(5):  # up to 70 tokens: spans of 64 and 128
        pieces = {place: [5 + (row + i) % 7 for i in range(1 + row * 13 // 5)] for place, row in enumerate(rows)}
        cached.append_text(pieces, 16)
    everyone = list(range(len(rows)))
    leaving = [place for place in everyone if rows[place] not in asked]
    for number, chosen in enumerate([everyone, *([p for p in everyone if p not in leaving[:n]] for n in range(1, 9))]):
        keep(chosen, cached.logits(chosen))
        cached.append_text({place: [5 + number % 7] for place in chosen}, 1)
        for part in cached.chunks(chosen, PATCHES):
            predict = cached.denoiser(part, GRID, guidance=2.5)
            for is_guided in (False, True):
                keep(part, predict(torch.stack([latents(rows[p], number) for p in part]), 500, is_guided))
        if number == 4:
            cached.append_images({place: latents(rows[place], 99) for place in chosen})
            cached.append_text({place: [4] for place in chosen}, 1)
    return {row: results[row] for row in asked}


@pytest.mark.parametrize("patches", ["linear", "unet"])
def test_a_row_has_the_same_bits_beside_any_rows_at_any_place(patches: str) -> None:
    """Alone, among 6 that leave one by one, and among others in another order."""
    mine = 3
    wanted = grow(patches, [mine], [mine])[mine]
    for rows in ([0, 1, 2, 3, 4, 5], [5, 3, 0, 4, 2], [3, 1], [2, 4, 3]):
        found = grow(patches, rows, [mine])[mine]
        assert len(found) == len(wanted) == 27
        for i, (ours, alone) in enumerate(zip(found, wanted, strict=True)):
            assert torch.equal(ours, alone), (rows, i)


def test_only_the_rows_that_are_asked_for_run_and_each_attends_to_its_own_length() -> None:
    """On a CPU, padded to an even number of rows (or 8, without oneDNN); images to a multiple of 8 tokens."""
    model, grid = tiny_model(), (4, 4)  # 4 patches
    cached = CachedModel(model, ROWS, 200, 16, 4, [1, 3], batch=ROWS)
    shapes, attended = [], []
    model.transformer.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    real = F.scaled_dot_product_attention

    def recording(q: torch.Tensor, k: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        attended.append((len(k), k.shape[2]))
        return real(q, k, *args, **options)

    for _ in range(5):
        cached.append_text({row: [5] * (16 if row in (1, 4) else 1) for row in range(ROWS)}, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", recording)
        for rows in ([0, 1, 2, 3, 4, 5], [1, 3], [4]):
            shapes.clear()
            attended.clear()
            cached.append_text({row: [6] for row in rows}, 1)
            multiple = 2 if HAS_ONEDNN else 8
            assert shapes == [(-(-len(rows) // multiple) * multiple, 1)]
            longer = len([row for row in rows if row in (1, 4)])
            layer = [(longer, 128), (len(rows) - longer, 64)][: 1 + (len(rows) > longer)]
            assert attended == layer * 2, "the long rows in one call, the short ones in another"
            (part,) = cached.chunks(rows, 4)
            predict = cached.denoiser(part, grid, guidance=2.0)
            shapes.clear()
            predict(torch.zeros(len(rows), CHANNELS, *grid), 10, True)
            predict(torch.zeros(len(rows), CHANNELS, *grid), 10, False)
            assert shapes == [(2 * len(rows), 4), (len(rows) + len(rows) % 2, 4)]
    ran: list[str] = []
    for name, module in model.patches.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: ran.append(name))
    cached.append_images({0: torch.zeros(CHANNELS, *grid)})
    of_given = ran.copy()
    ran.clear()
    model.embed_images(torch.zeros(1, CHANNELS, *grid), torch.zeros(1))
    assert ran and of_given == ran, "nothing of what predicts"


def test_rows_keep_their_contents_wherever_they_are_moved() -> None:
    model = tiny_model()
    cached = CachedModel(model, ROWS, 300, 16, 4, None, batch=ROWS)
    generator, lengths = torch.Generator().manual_seed(0), [0] * ROWS
    single = [CachedModel(model, 1, 300, 16, 4, None, batch=1) for _ in range(ROWS)]
    for _ in range(25):
        order = torch.randperm(ROWS, generator=generator).tolist()
        rows = order[: int(torch.randint(1, ROWS + 1, (), generator=generator))]
        pieces = {row: torch.randint(5, 12, (1 + (5 * row) % 16,), generator=generator).tolist() for row in rows}
        cached.append_text(pieces, 16)
        for row, piece in pieces.items():
            single[row].append_text({0: piece}, 16)
            lengths[row] += len(piece)
    assert [cached.length(row) for row in range(ROWS)] == lengths
    assert sorted(cached._slots) == list(range(ROWS)) and len(set(lengths)) == ROWS
    for rows in itertools.combinations(range(ROWS), 2):
        for row, logits in zip(rows, cached.logits(rows), strict=True):
            assert torch.equal(logits, single[row].logits([0])[0])


def test_on_cuda_every_forward_of_a_kind_has_the_shape_of_a_full_batch() -> None:
    """There bits, and compiled graphs, are those of one shape. The rule only: no GPU is needed."""
    cached = CachedModel(tiny_model(), 3, 64, 16, 4, [1, 3], batch=50)
    cached.device = torch.device("cuda")
    assert [rows + cached._padding(rows, 1) for rows in (1, 3, 50)] == [50] * 3
    assert [rows + cached._padding(rows, 256) for rows in (1, 3, 8)] == [8] * 3, "not 50: a large batch runs in parts"
    assert [2 * rows + cached._padding(rows, 256, 2) for rows in (1, 8)] == [16] * 2
