"""What a run needs, counted on the real model without memory for it (meta device)."""

import torch

from model.transfusion import Transfusion, TransfusionConfig

# Which parameters count as what, by the start of their names.
PARTS = {"text_embedding": "embeddings", "transformer": "blocks", "patches": "patches", "text_head": "heads"}


def parameters(config: TransfusionConfig, vocab_size: int) -> dict[str, int]:
    """Return the number of parameters: `total`, `embeddings`, `blocks` (final norm included), `patches`, `heads`.

    The noise head is the second half of `patches`; `heads` is the text head.
    """
    with torch.device("meta"):
        model = Transfusion(config, vocab_size)
    counts = dict.fromkeys(("total", *PARTS.values()), 0)
    for name, parameter in model.named_parameters():
        counts[PARTS[name.split(".")[0]]] += parameter.numel()
        counts["total"] += parameter.numel()
    return counts
