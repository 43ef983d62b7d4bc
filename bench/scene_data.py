"""The demo's scenes, encoded in each way that a benchmark trains on."""

from collections.abc import Collection
from pathlib import Path

from bench.programs import Command, program, run_once

# Settings of train.pretrain by space. A picture has 3,072 numbers, its latents 256: as much of it is seen at
# sqrt(3072 / 256) times the noise.
SPACES = {
    "pixels": ("vae=pixels", "model.latent_channels=3", "model.patch_size=8", "diffusion.shift=3.5"),
    "latents": ("vae={folder}/vae",),
}
ALL, FEW = "[{folder}/scenes/train]", "[{folder}/scenes/train/00000.tar]"  # 12,000 and 2,000 pictures
THREE = "caption_keys={{captions: 1}}"
# Encoded folder -> what is encoded, and how.
DATA = {
    "pixels": (f"inputs={ALL}", "vae=pixels"),
    "latents": (f"inputs={ALL}", "vae={folder}/vae"),
    "latents-three": (f"inputs={ALL}", "vae={folder}/vae", THREE),
    "few": (f"inputs={FEW}", "vae={folder}/vae"),
    "few-three": (f"inputs={FEW}", "vae={folder}/vae", THREE),
}
SMOKE_SCENES = ("num_train=400", "shard_size=100", "num_text=200", "num_text_heldout=40", "num_heldout_two_shapes=8")


def prepare(folder: Path, data: Collection[str], *, ranks: int, smoke: bool) -> None:
    """Make in `folder` what trainings on these keys of DATA need, each part once; `ranks` train the VAE."""
    run_once(stages(folder, data, ranks=ranks, smoke=smoke), folder / "logs")


def stages(folder: Path, data: Collection[str], *, ranks: int, smoke: bool) -> dict[str, Command]:
    """Return the commands that make the data, by name, in order."""
    need = {*data, *map(space_of, data)}
    scenes, tokenizer = folder / "scenes", folder / "tokenizer.model"
    found: dict[str, Command] = {}
    found["scenes"] = (*program("scenes"), f"output={scenes}", *(SMOKE_SCENES if smoke else ()))
    inputs = f"inputs=[{scenes}/train,{scenes}/text]"
    found["tokenizer"] = (*program("tokenizer"), inputs, f"output={tokenizer}")
    if need != {"pixels"}:
        short = ("optim.steps=8", "optim.warmup_steps=2") if smoke else ()
        folders = (f"inputs=[{scenes}/train]", f"heldout=[{scenes}/heldout]", f"output={folder}/vae")
        found["vae"] = (*program("vae", ranks), *folders, *short)
    encode, encoded = (*program("encode"), f"tokenizer={tokenizer}"), folder / "encoded"
    for name in (name for name in DATA if name in need):
        settings = [setting.format(folder=folder) for setting in DATA[name]]
        if name not in SPACES:
            settings.append(f"stats_from={encoded}/{space_of(name)}")
        found[f"encode {name}"] = (*encode, *settings, f"output={encoded}/{name}")
    for name in (name for name in SPACES if name in need):
        settings = [f"inputs=[{scenes}/heldout]", DATA[name][1].format(folder=folder), f"stats_from={encoded}/{name}"]
        found[f"encode {name} heldout"] = (*encode, *settings, f"output={encoded}/{name}-heldout")
    for name in ("text", "text_heldout"):
        found[f"encode {name}"] = (*encode, "vae=null", f"inputs=[{scenes}/{name}]", f"output={encoded}/{name}")
    return found


def space_of(data: str) -> str:
    """Return the key of SPACES that a key of DATA is encoded in."""
    return data if data in SPACES else "latents"
