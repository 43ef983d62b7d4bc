"""Repeat an ablation of the paper at the demo's size: train each variant once and score it on held-out scenes.

usage: python -m bench.ablation attention [--steps 50] [--prompts 20] [--ranks 2]

  attention   bidirectional against causal inside images (the paper's table 5)
  patch_size  side of a token's patch, in latent pixels (table 6)
  patches     linear against U-Net (tables 6 and 7)
  noise_cap   timesteps of images before their caption, capped at half or not (table 8)

Reads the data of `make demo` and writes runs/demo/ablation; the same command resumes there. The last line is one JSON
object. The defaults take minutes on two cores; telling the variants apart takes `--steps 1500 --prompts 200`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from data.strict_json import loads
from train.streams import open_streams

HERE = Path(__file__).resolve().parent.parent
CONFIGS, DEMO = HERE / "configs" / "demo", Path("runs/demo")
UNET = (
    "model.patches=unet",
    "model.timestep_after_patches=false",
    "model.unet.blocks=2",
    "model.unet.timestep_width=64",
)
# One latent cell per token: it says little alone, so what a token may see of its image matters more.
FINE = ("model.patch_size=1", "data.sequence_length=256", "data.lanes=16", "micro_batch_size=8")
ABLATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"bidirectional": FINE, "causal": (*FINE, "model.image_attention=causal")},
    "patch_size": {str(size): (f"model.patch_size={size}",) for size in (1, 2, 4)},
    "patches": {"linear": (), "unet": (*UNET, "model.unet.channels=[24,48]")},
    "noise_cap": {
        "500": ("diffusion.before_caption_max_timestep=500",),
        "none": ("diffusion.before_caption_max_timestep=null",),
    },
}


def run_variant(name: str, switches: tuple[str, ...], options: argparse.Namespace) -> dict:
    """Train and evaluate one variant with the real programs; return its scores."""
    folder = DEMO / "ablation" / f"{name}-{options.steps}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    short = (f"optim.steps={options.steps}", "preview.interval_steps=null", "log.wandb=disabled")
    train = ("train.pretrain", f"config={CONFIGS}/pretrain.yaml", f"run_dir={folder}", "checkpoint.keep_last=1")
    score = (
        "train.evaluate",
        f"config={CONFIGS}/evaluate.yaml",
        f"checkpoint={folder}",
        f"output={folder}/scores",
        f"max_prompts={options.prompts}",
    )
    for command in ((*train, *short, *switches), score):
        print(f"$ torchrun --nproc-per-node {options.ranks} -m {shlex.join(command)}", file=sys.stderr, flush=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(HERE)}
        subprocess.run([*launcher, "-m", *command], check=True, stdout=sys.stderr, env=environment)
    scores = loads((folder / "scores" / "evaluation.json").read_text(encoding="utf-8"))
    return {key: scores[key] for key in ("scores", "heldout")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", choices=ABLATIONS)
    parser.add_argument("--steps", type=int, default=50, help="updates per variant (50)")
    parser.add_argument("--prompts", type=int, default=20, help="scenes to score of each split (20)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    options = parser.parse_args()
    if not (DEMO / "latents" / "text_heldout" / "manifest.json").is_file():
        print(f"bench.ablation: {DEMO} holds no encoded scenes; run `make demo` first", file=sys.stderr)
        return 2
    variants = {
        variant: run_variant(f"{options.ablation}-{variant}", switches, options)
        for variant, switches in ABLATIONS[options.ablation].items()
    }
    print(json.dumps({"bench": "ablation", **vars(options), "variants": variants}))
    return 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
