"""Rows of 32,768 tokens: packed, masked by blocks, trained on; nothing of size S x S but the CPU's dense mask."""

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from bench.step import backward, sharded_model
from data.dataset import open_data
from data.documents import Document, ImageSegment, TextSegment
from data.layout import lay_out
from data.loader import Loader
from data.packing import PackedSequence, pack
from data.tokenizer import SpecialIds, Tokenizer
from model.attention import allowed, block_mask
from model.transformer import TransformerConfig
from model.transfusion import TransfusionConfig
from tests.ranks import run_ranks
from tests.sources import data_config, make_source, pairs, texts
from train.distributed.parallelize import ParallelConfig
from train.distributed.ranks import Ranks

S = 32_768
SPECIAL = SpecialIds(pad=0, bos=1, eos=2, boi=4, eoi=5)
SECONDS = 5.0


def _long_row(seed: int) -> PackedSequence:
    """Texts of up to 6,000 tokens, images of 64 to 1,024 patches before and after their captions, some padding."""
    rng = np.random.default_rng(seed)
    pieces, space = [], S - 100
    while True:
        segments = []
        for _ in range(rng.integers(1, 4)):
            side = 2 * int(rng.choice([8, 16, 32]))
            image = ImageSegment(np.zeros((4, side, side), np.float16), before_caption=bool(rng.random() < 0.5))
            segments += [TextSegment(rng.integers(6, 90, rng.integers(1, 2000))), image]
        piece = lay_out(Document(tuple(segments)), SPECIAL, 2)
        if len(piece) > space:
            return pack(pieces, S, SPECIAL.pad)
        pieces.append(piece)
        space -= len(piece)


def _row_of(mask: BlockMask, q: int) -> torch.Tensor:
    """Return bool [S], what query `q` of the first row sees, from the block lists alone."""
    block = mask.BLOCK_SIZE[0]
    seen, keys = torch.zeros(S, dtype=torch.bool), torch.arange(S).view(-1, block)
    zero, query = torch.tensor(0), torch.tensor(q)
    for index in mask.kv_indices[0, 0, q // block, : mask.kv_num_blocks[0, 0, q // block]]:
        seen[keys[index]] = mask.mask_mod(zero, zero, query, keys[index])
    for index in mask.full_kv_indices[0, 0, q // block, : mask.full_kv_num_blocks[0, 0, q // block]]:
        seen[keys[index]] = True
    return seen


def test_a_row_of_32k_tokens_is_packed_and_masked_by_the_rule() -> None:
    """P2: 200 queries, each against all keys; at image borders, at the ends of blocks, in padding and anywhere."""
    start = time.process_time()
    row = _long_row(0)
    ids = tuple(torch.from_numpy(a)[None] for a in (row.document_ids, row.image_ids, row.visible_until))
    mask = block_mask(*ids)
    (document_ids, image_ids, visible_until), keys = (a[0] for a in ids), torch.arange(S)
    borders = torch.nonzero(image_ids[1:] != image_ids[:-1]).flatten()[:40]
    anywhere = torch.randint(S, (100,), generator=torch.Generator().manual_seed(1))
    queries = torch.cat([borders, borders + 1, torch.tensor([0, 127, 128, S - 100, S - 1]), anywhere])
    for q in queries.tolist():
        expected = allowed(
            torch.tensor(q), keys, (document_ids[q], image_ids[q]), (document_ids, image_ids), visible_until
        )
        assert torch.equal(_row_of(mask, q), expected), q
    assert len(row.images) > 10 and row.document_ids.max() > 3
    blocks = (S // 128) ** 2
    assert int(mask.kv_num_blocks.sum()) < 0.1 * blocks and int(mask.full_kv_num_blocks.sum()) > 0
    assert time.process_time() - start < SECONDS


def _long_step(ranks: Ranks, folder: Path, tokenizer: Tokenizer) -> tuple[float, int, float, float]:
    """Return the loss of one step on one row, its tokens, the norm of its gradients and the GiB it took."""
    settings = data_config(tokenizer, {"long": folder}, lanes=1, sequence_length=S)
    data = open_data(settings, 0, 2)
    trunk = TransformerConfig(width=16, layers=1, heads=1, ffn_multiple_of=8)
    config = ParallelConfig(dtype="float32", activation_checkpointing="selective")
    model = sharded_model(
        TransfusionConfig(transformer=trunk, latent_channels=2), data.tokenizer.vocab_size, ranks, config
    )
    loader = Loader(data, settings, rank=0, world_size=1, micro_batch_size=1)
    batch = loader.next(60)
    loader.close()
    counts = {"targets": batch.num_text_targets, "images": batch.num_images}
    loss = backward(model, batch.micro_batches, ranks, config, spec=data.latent_spec, **counts)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor()
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return loss.item(), batch.num_tokens, norm.item(), peak_gib


@pytest.mark.slow
def test_a_step_of_32k_tokens_runs_on_a_cpu(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """P14: in 6.4 GiB, 4 of them for the dense mask [S, S] in float32; no scores are kept."""
    documents = [*texts(20, lengths=(2000, 4000)), *pairs(60, grids=[(32, 32)])]
    folder = make_source(tmp_path / "data", tokenizer, documents)
    ((loss, tokens, norm, peak_gib),) = run_ranks(_long_step, 1, folder, tokenizer, timeout_s=280)
    assert tokens > 0.8 * S and 0 < norm < float("inf")
    assert peak_gib < 7
    assert 5 < loss < 12, "text near log(vocabulary), pictures near lambda times one"
