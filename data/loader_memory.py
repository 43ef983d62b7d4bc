"""How much host memory a rank's loader may take: documents pending and read ahead, batches packed ahead.

An upper bound from the manifests, printed at start, so that a node too small is noticed at once and not after hours.
A shuffle block holds positions, never contents.
"""

from data.dataset import DataConfig, DataSet
from data.documents import CELL_BYTES
from data.lanes import lanes_of_rank

INDEX_BYTES = 56  # a record with one image, in an index
TOKEN_BYTES = 48  # a token of a packed row
DRAW_BYTES = 4  # a number of noise or posterior noise


def loader_bytes(data: DataSet, config: DataConfig, world_size: int) -> dict[str, int]:
    """Return the most bytes that the loader of the rank with the most lanes, and its workers, hold, by purpose."""
    lanes = max(len(lanes_of_rank(rank, world_size, config.lanes)) for rank in (0, world_size - 1))
    length, patch_size = config.sequence_length, data.settings.patch_size
    channels = data.latent_spec.channels if data.latent_spec is not None else 0
    stored, drawn = CELL_BYTES[data.kind], (2 if data.kind == "moments" else 1) * DRAW_BYTES  # of a channel of a cell
    cells = max((h * w for h, w in data.grids), default=0)
    # The most latent cells in a sequence: nothing but images.
    row_cells = min(cells, 1) * length * patch_size**2
    row = length * TOKEN_BYTES + row_cells * channels * stored
    batch = lanes * (length * TOKEN_BYTES + row_cells * channels * (stored + drawn) * 4 // 3)  # padded
    entries = [entry for source in data.sources for entry in source.manifest.shards]
    document = 4 * max(entry.largest_record for entry in entries)  # a token takes 4 bytes there, 16 laid out
    longest_index = INDEX_BYTES * max(entry.records for entry in entries)
    # Batches: ready, in use by the trainer, waiting for the queue, being collated (twice: rows and noise). Workers
    # hold as many steps of rows and one more in the making, each copied when it is sent.
    batches, rows = config.prefetch_steps + 4, 2 * (config.prefetch_steps + 1) if config.num_workers else 0
    ahead = [s.read_ahead for s in data.sources if s.manifest.store.is_remote and not config.cache_dir]
    return {
        "pending documents": lanes * config.look_ahead * document,
        "read ahead": lanes * sum(ahead) * document,
        "packed ahead": batches * batch + rows * lanes * row,
        "indices": (2 * lanes + 16) * longest_index * len(data.sources),
        "shuffle blocks": 2 * lanes * config.shuffle_block * 8 * len(data.sources),
    }
