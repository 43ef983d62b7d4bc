"""Latents to tokens and back."""

import pytest
import torch

from model.patches import LinearPatches, patchify, timestep_features, unpatchify


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("h,w", [(4, 4), (4, 12), (8, 4)])
def test_unpatchify_undoes_patchify(patch_size, h, w):
    latents = torch.randn(3, 5, h, w)
    patches = patchify(latents, patch_size)
    assert patches.shape == (3, h * w // patch_size**2, patch_size**2 * 5)
    assert torch.equal(unpatchify(patches, patch_size, h, w), latents)


def test_patches_run_row_by_row():
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    patches = patchify(latents, 2)
    expected = [
        latents[0, :, i : i + 2, j : j + 2].permute(1, 2, 0).flatten() for i in range(0, 4, 2) for j in range(0, 6, 2)
    ]
    assert torch.equal(patches[0], torch.stack(expected))


def test_timestep_features_are_sines_of_a_geometric_series():
    features = timestep_features(torch.tensor([0, 7, 999]), dim=8)
    for row, t in zip(features, (0, 7, 999), strict=True):
        angles = torch.tensor([t * 10000.0 ** (-i / 4) for i in range(4)])
        assert torch.allclose(row, torch.cat((angles.cos(), angles.sin())), atol=1e-4)


def test_all_timesteps_have_distinct_features():
    features = timestep_features(torch.arange(1000))
    distance = torch.cdist(features, features) + torch.eye(1000) * 9
    assert distance.min() > 0.1


@torch.no_grad()
def test_linear_patches_add_the_timestep_to_every_patch_then_project():
    torch.manual_seed(0)
    patcher = LinearPatches(width=12, latent_channels=3, patch_size=2)
    latents, timesteps = torch.randn(2, 3, 4, 4), torch.tensor([3, 700])
    tokens, skips = patcher.encode(latents, timesteps)
    assert skips is None
    for n in range(2):
        embedding = patcher.timestep(timesteps[n : n + 1])[0]
        for i, patch in enumerate(patchify(latents, 2)[n]):
            assert torch.allclose(tokens[n, i], patcher.to_width(patch + embedding), atol=1e-6)
    assert patcher.decode(tokens, skips, timesteps, 4, 4).shape == latents.shape


@torch.no_grad()
def test_timestep_after_adds_it_in_the_width_of_the_trunk():
    torch.manual_seed(0)
    patcher = LinearPatches(width=12, latent_channels=3, patch_size=2, timestep_after=True)
    latents, timesteps = torch.randn(2, 3, 4, 4), torch.tensor([3, 700])
    tokens, _ = patcher.encode(latents, timesteps)
    expected = patcher.to_width(patchify(latents, 2)) + patcher.timestep(timesteps)[:, None]
    assert torch.allclose(tokens, expected, atol=1e-6)


def test_linear_patches_are_under_half_a_percent_of_7b():
    with torch.device("meta"):
        patcher = LinearPatches(width=4096, latent_channels=8, patch_size=8)
    assert sum(parameter.numel() for parameter in patcher.parameters()) < 0.005 * 7e9
