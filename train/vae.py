"""Train a VAE (diffusers' AutoencoderKL) on the pictures of raw image-text shards.

Writes `output` in diffusers' layout (config.json, safetensors weights) with metrics.jsonl and, last, vae.json:
settings, reconstruction error, seconds. All pictures are decoded once and kept in memory. Under torchrun each rank
takes its share of every batch. Killed or interrupted, the same command resumes from the last saved state and ends with
the same weights; a finished output is reused.
"""

import math
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.inputs import expand
from data.pictures import decode_picture, to_unit
from data.raw import TAR, picture_of
from data.remote import file_version, is_remote, shown
from data.shards import BadRecord, BadRecords, read_shard
from data.storage import local_copy
from model.autoencoders import vae_hash
from model.latent_space import to_raw
from model.perceptual import load_lpips
from model.vae import decode, kl_nats, moments
from train.config import load_config, run_program
from train.console import plural, say
from train.distributed.agreement import facts_of
from train.distributed.launcher import report_to_torchrun
from train.distributed.ranks import DIED, Ranks, init_ranks, last_words
from train.distributed.signals import StopKind, StopSignal
from train.output_folder import OutputFolder
from train.vae_training import Diverged, VaeTrainConfig, VaeTraining, say_once

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

CONFIG = VaeTrainConfig
GROUP = True  # its ranks form one process group
OWN = ("inputs", "heldout", "output", "device", "loss.lpips_weights")  # may differ between ranks; contents may not
# Settings that decide how the VAE is trained, not what comes out.
HOW = ("output", "log_interval_steps", "state_interval_steps", "device", "timeout_minutes")


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    files = expand(config.inputs, (TAR,))
    heldout_files = expand(config.heldout, (TAR,)) if config.heldout else []
    lpips, contents = None, {"data": f"{_crc32(files):08x}-{_crc32(heldout_files):08x}"}
    if config.loss.lpips_weight > 0:
        assert config.loss.lpips_weights is not None  # VaeLossConfig requires it
        lpips = load_lpips(config.loss.lpips_weights)
        contents["lpips"] = f"{_crc32([config.loss.lpips_weights]):08x}"
    facts = {**facts_of(config, OWN), **contents}
    ranks = init_ranks(timeout_s=60 * config.timeout_minutes, device=config.device, facts=facts)
    if config.batch_size < ranks.world_size:
        raise ValueError(
            f"batch_size={config.batch_size}: expected at least one picture for each of {ranks.world_size} ranks"
        )
    settings = {name: value for name, value in asdict(config).items() if name not in HOW} | contents
    settings = ranks.on_first(lambda: settings)  # input paths may differ between ranks
    if lpips is not None:
        heads = "with its linear heads" if lpips.has_heads else "without heads: every channel weighs 1"
        say_once(ranks, f"LPIPS from {config.loss.lpips_weights}, {heads}")
    output = OutputFolder(config.output, "train.vae", "vae.json", settings)
    if ranks.on_first(output.is_complete):
        say_once(ranks, f"{output.path} is complete for these settings; reusing it")
        ranks.close()
        return None

    pictures = load_pictures(files, config, ranks)
    heldout = load_pictures(heldout_files, config, ranks) if heldout_files else None
    training = VaeTraining(config, output, ranks, lpips)
    status, words = None, None
    with StopSignal() as stop, last_words(ranks, lambda: f"step {training.step}"):
        try:
            stopped = training.run(pictures, stop)
            if stopped == StopKind.NONE:
                ranks.on_first(lambda: finish(training, pictures, heldout))
            else:
                words = f"stopped and saved at step {training.step}; the same command resumes from here"
                status = stopped.exit_code
        except Diverged as error:
            words, status = str(error), DIED
        if words is not None:
            report_to_torchrun(f"train.vae: {words}")
            say_once(ranks, words)
    ranks.close()
    return status


def finish(training: VaeTraining, pictures: np.ndarray, heldout: np.ndarray | None) -> None:
    """Measure the VAE, save it, and rename the partial folder into place; rank 0 only."""
    config, output = training.config, training.output
    measured = pictures[:512] if heldout is None else heldout
    summary = {
        "hash": vae_hash(training.vae),
        "steps": training.step,
        "seconds": round(training.seconds, 1),
        "pictures": len(pictures),
        "measured_on": f"{len(measured)} {'training' if heldout is None else 'held-out'} pictures",
        **measure(training.vae, measured, config, training.ranks.device),
    }
    training.vae.save_pretrained(output.partial, safe_serialization=True)
    training.metrics.close()
    (output.partial / "state.pt").unlink(missing_ok=True)
    output.commit(summary)
    say(f"train.vae: wrote {output.path}: " + ", ".join(f"{name} {value}" for name, value in summary.items()))


def load_pictures(files: list[str], config: VaeTrainConfig, ranks: Ranks) -> np.ndarray:
    """Decode the first `max_pictures` pictures of the shards, uint8 [N, H, W, 3]; skip and name what is bad."""
    bad = BadRecords(config.max_bad_fraction, max_failed_files=config.max_failed_files)
    pictures: list[np.ndarray] = []
    full = False
    for source in files:
        with local_copy(source) as path:
            for record in read_shard(path, bad, shown(source)):
                if full := len(pictures) == config.max_pictures:
                    break
                try:
                    where = f"{shown(source)}/{record['__key__'].decode(errors='replace')}"
                    pictures.append(decode_picture(picture_of(record, where), [(config.resolution,) * 2], where))
                except BadRecord as error:
                    bad.add(error)
                    bad.check()
        if full:
            break
    for remark in [*(f"skipped {name}" for name in bad.names), *bad.remarks()]:
        say_once(ranks, remark)
    bad.check(final=True)
    if not pictures:
        names = ", ".join(map(shown, files))
        raise ValueError(f"no pictures in {names}: expected records with .jpg, .png or .webp")
    limit = f" (max_pictures={config.max_pictures}: the rest is not read)" if full else ""
    say_once(ranks, f"{len(pictures)} pictures at {config.resolution} pixels from {plural(len(files), 'shard')}{limit}")
    return np.stack(pictures)


@torch.no_grad()
def measure(vae: "AutoencoderKL", pictures: np.ndarray, config: VaeTrainConfig, device: torch.device) -> dict[str, Any]:
    """Return what the VAE costs: errors of pixels in [-1, 1] through the mean and through a sampled latent, the
    KL in nats a picture, and the latents' deviation with the share of their variance that is posterior noise.
    """
    vae.eval()
    rng = np.random.default_rng(config.seed)
    errors, kl = np.zeros(3), 0.0
    first = second = noise_variance = torch.zeros((), device=device)  # sums over pictures, by channel
    for start in range(0, len(pictures), config.batch_size):
        pixels = torch.from_numpy(to_unit(pictures[start : start + config.batch_size])).to(device)
        encoded = moments(vae, pixels)
        mean, logvar = encoded.chunk(2, dim=1)
        noise = torch.from_numpy(rng.standard_normal(tuple(mean.shape), dtype=np.float32)).to(device)
        through_mean = decode(vae, mean).clamp(-1, 1) - pixels
        through_sample = decode(vae, to_raw(encoded, noise)).clamp(-1, 1) - pixels
        parts = through_mean.abs(), through_mean.square(), through_sample.square()
        errors += np.array([part.mean(dim=(1, 2, 3)).sum().item() for part in parts])
        kl += kl_nats(encoded).item()
        first = first + mean.mean(dim=(2, 3)).sum(0)
        second = second + (mean.square() + logvar.exp()).mean(dim=(2, 3)).sum(0)
        noise_variance = noise_variance + logvar.exp().mean(dim=(2, 3)).sum(0)
    count = len(pictures)
    absolute, squared, squared_sampled = errors / count
    variance = second / count - (first / count).square()
    return {
        "absolute_error": round(absolute, 5),
        "psnr_db": round(10 * math.log10(4 / squared), 2),
        "psnr_sampled_db": round(10 * math.log10(4 / squared_sampled), 2),
        "kl_nats": round(kl / count, 1),
        "latent_std": [round(value, 3) for value in variance.sqrt().tolist()],
        "noise_share": [round(value, 3) for value in (noise_variance / count / variance).tolist()],
    }


def _crc32(files: list[str]) -> int:
    """Identify the files' contents (for URLs, their versions): redrawn shards are not the old ones."""
    value = 0
    for name in files:
        if is_remote(name):
            value = zlib.crc32(repr(file_version(name)).encode(), value)
            continue
        with local_copy(name) as path, path.open("rb") as file:
            while block := file.read(1 << 24):
                value = zlib.crc32(block, value)
    return value


if __name__ == "__main__":
    run_program(main, lasting=True)
