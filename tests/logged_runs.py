"""Run folders with the rows of a long run, without the run: what a report has to read."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

BINS = ("-6..-4", "-4..-2", "-2..0", "0..2", "2..4", "4..6")
PARTS = ("embeddings", "trunk", "trunk_image", "patches", "heads")
CONFIG = (
    "optim:\n  steps: {steps}\n  clip_norm: 1.0\n  learning_rate: {rate}\ndata:\n  sources:\n    pairs: {{weight: 1}}\n"
)
START = 1.7e9  # seconds since 1970
STEP_S = 1.25


def logged_run(folder: Path, rows: int, every: int = 10, seed: int = 0, rate: float = 3e-4) -> Path:
    """Write the rows, held-out rows and config of a run of `rows` * `every` steps on two sources, all healthy."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    lines = []
    for i, noise in enumerate(random.normal(1, 0.02, rows).tolist(), start=1):
        lines.append(logged_row(i, i / rows, every, noise))
        if i % max(rows // 50, 1) == 0:
            lines.append(held_out_row(i * every, i / rows, noise))
    write_rows(folder / "metrics.jsonl", lines)
    (folder / "config.yaml").write_text(CONFIG.format(steps=rows * every, rate=rate))
    (folder / "attempt.json").write_text(json.dumps({"attempt": 1, "token": "t", "pid": 1, "host": "node0"}))
    return folder


def logged_row(i: int, share: float, every: int, noise: float) -> dict[str, Any]:
    """Return a row with every name of docs/metrics.md that training logs; `share` of the run is done."""
    step, loss = i * every, (2 + 4 * math.exp(-20 * share) - 0.3 * share) * noise
    image, fall = (0.2 + math.exp(-9 * share)) * noise, 0.4 + 0.6 * math.exp(-8 * share)
    row = {
        "step": step,
        "tokens_seen": step * 10_000,
        "images_seen": step * 30,
        "rollbacks": 0,
        "interval_steps": every,
    }
    row |= {"text_loss": loss, "image_loss": image, "x0_error": fall / 2, "perplexity": math.exp(loss)}
    row |= {f"x0_error/{name}": fall * noise * 0.35**k for k, name in enumerate(BINS)}
    row |= {"tokens_per_s": 8000 * noise, "images_per_s": 24 * noise, "step_s": STEP_S, "padding_share": 0.02}
    row |= {
        "idle_row_share": 0.0,
        "data_stall_share": 0.004,
        "checkpoint_stall_share": 0.001,
        "evaluation_share": 0.002,
    }
    row |= {"model_tflops_per_s_per_rank": 400.0, "mfu": 0.4 * noise, "hfu": 0.44 * noise, "mfu_bagel": 0.38 * noise}
    row |= {
        "attention_imbalance": 1.05,
        "slowest_rank": i % 3,
        "slowest_host": f"node{i % 3}",
        "slowest_lag_share": 0.01,
    }
    row |= {"host_memory_gib": 20.0, "device_memory_gib": 60.0, "grad_norm": 0.5 * noise, "skipped_documents": 0}
    row |= {
        "epoch_min": 0,
        "epoch_mean": share,
        "epoch_max": 1,
        "time": START + step * STEP_S,
        "loss": loss + 5 * image,
    }
    row |= {"learning_rate": 3e-4 * (1 - 0.9 * share), "skipped_updates": 0, "stop_s": 40.0}
    row |= {"text_tokens": 4000 * every, "image_tokens": 6000 * every}
    for name, factor in (("pairs", 0.9), ("texts", 1.1)):
        row |= {
            f"text_loss/{name}": loss * factor,
            f"perplexity/{name}": math.exp(loss * factor),
            f"epoch/{name}": share,
        }
        row |= {f"tokens/{name}": 5000 * every, f"documents/{name}": 30 * every, f"images/{name}": 30 * every}
        row |= {f"image_loss/{name}": image}
    row |= {"image_loss_by_order/caption_first": image * 0.95, "image_loss_by_order/image_first": image * 1.1}
    row |= {f"grad_norm/{part}": 0.1 * (k + 1) * noise for k, part in enumerate(PARTS)}
    return row | {f"update_ratio/{part}": 1e-3 * (k + 1) * noise for k, part in enumerate(PARTS)}


def held_out_row(step: int, share: float, noise: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step}
    loss, fall = 2.2 + 4 * math.exp(-20 * share) - 0.3 * share, 0.4 + 0.6 * math.exp(-8 * share)
    for prefix, factor in (("heldout/pairs", 1.0), ("heldout_ema/pairs", 0.97)):
        kinds = {"text_loss": loss, "image_loss": fall, "captioning_loss": loss / 2, "x0_error": fall / 2}
        row |= {f"{prefix}/{kind}": value * factor for kind, value in kinds.items()}
        row |= {f"{prefix}/perplexity": math.exp(loss * factor)}
        row |= {f"{prefix}/x0_error/{name}": fall * factor * noise * 0.35**k for k, name in enumerate(BINS)}
    return row


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
