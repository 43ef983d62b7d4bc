"""LPIPS equals its definition, spelt out slowly; a file that is not VGG16 is refused by the names of its tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.perceptual import SMALLEST_PICTURE, Lpips, load_lpips

# torchvision's configuration "D", up to relu5_3, and the places of the taps in its list of layers.
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
TAPS = (3, 8, 15, 22, 29)


def random_weights(heads: bool = True) -> dict[str, Tensor]:
    """Return tensors of VGG16's names, shapes and scale, and heads (not negative, as LPIPS's are)."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index, layer in enumerate(vgg16()):
        if isinstance(layer, nn.Conv2d):
            scale = (2 / (9 * layer.in_channels)) ** 0.5
            tensors[f"features.{index}.weight"] = torch.randn(layer.weight.shape, generator=generator) * scale
            tensors[f"features.{index}.bias"] = torch.randn(layer.bias.shape, generator=generator) * 0.1
    for tap, channels in enumerate((64, 128, 256, 512, 512)):
        if heads:
            tensors[f"lin{tap}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    return tensors


def vgg16() -> nn.Sequential:
    """Return torchvision's list of layers, on the meta device."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1, device="meta"), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def slow_distance(tensors: dict[str, Tensor], first: Tensor, second: Tensor) -> float:
    """Zhang et al. 2018, equation 1, of two pictures [3, H, W]: place by place, in float64."""
    network = vgg16()
    features = {k.removeprefix("features."): v.double() for k, v in tensors.items() if k.startswith("features.")}
    network.load_state_dict(features, assign=True)
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    x, y = ((picture.double() - shift) / scale for picture in (first, second))
    distance, tap = 0.0, 0
    for index, layer in enumerate(network):
        x, y = layer(x[None])[0], layer(y[None])[0]
        if index in TAPS:
            head = tensors.get(f"lin{tap}.model.1.weight", torch.ones(len(x))).double().flatten()
            _, height, width = x.shape
            for row in range(height):
                for column in range(width):
                    one, other = x[:, row, column], y[:, row, column]
                    difference = one / (one.norm() + 1e-10) - other / (other.norm() + 1e-10)
                    distance += (head * difference**2).sum().item() / (height * width)
            tap += 1
    return distance


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(random_weights(), path)
    return path


@pytest.fixture(scope="module")
def lpips(weights_file: Path) -> Lpips:
    return load_lpips(weights_file)


def pictures(count: int, side: int = 32, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("heads", [True, False])
@torch.no_grad()
def test_the_distance_is_the_definition_place_by_place(tmp_path: Path, heads: bool) -> None:
    tensors = random_weights(heads)
    save_file(tensors | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.safetensors")
    lpips = load_lpips(tmp_path / "vgg16.safetensors")
    assert lpips.has_heads == heads
    first, second = pictures(2), pictures(2, seed=2)
    first[1, :, :20] = 0.3  # flat, as drawings are
    expected = [slow_distance(tensors, one, other) for one, other in zip(first, second, strict=True)]
    torch.testing.assert_close(lpips(first, second), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_identical_pictures_are_at_no_distance_and_others_are_apart_alike_from_both_sides(lpips: Lpips) -> None:
    first, second = pictures(2), pictures(2, seed=2)
    assert lpips(first, first.clone()).tolist() == [0.0, 0.0]
    there, back = lpips(first, second), lpips(second, first)
    assert there.shape == (2,) and (there > 0).all()
    torch.testing.assert_close(there, back)


def test_a_closer_picture_is_less_distant(lpips: Lpips) -> None:
    first, noise = pictures(1), pictures(1, seed=2)
    distances = [lpips(first, first.lerp(noise, share)).item() for share in (0.05, 0.2, 0.8)]
    assert distances == sorted(distances)


def test_gradient_reaches_the_reconstruction_and_leads_to_the_picture(lpips: Lpips) -> None:
    picture = pictures(1)
    reconstruction = (picture + 0.3 * pictures(1, seed=2)).requires_grad_()
    before = lpips(picture, reconstruction)
    before.sum().backward()
    assert torch.isfinite(reconstruction.grad).all() and (reconstruction.grad != 0).float().mean() > 0.9
    with torch.no_grad():
        step = 0.01 * reconstruction.grad / reconstruction.grad.abs().max()
        assert lpips(picture, reconstruction - step) < before


def test_where_no_feature_fires_the_gradient_is_zero_not_nan(weights_file: Path) -> None:
    lpips = load_lpips(weights_file)
    for name, tensor in lpips.named_buffers():
        if name.startswith("bias"):
            tensor.fill_(-100.0)
    reconstruction = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(torch.ones(1, 3, 16, 16), reconstruction).sum().backward()
    assert (reconstruction.grad == 0).all()


def test_the_network_is_frozen_and_has_nothing_to_save(lpips: Lpips) -> None:
    assert not list(lpips.parameters()) and not lpips.state_dict()


def test_the_smallest_picture_leaves_one_cell_at_the_last_tap(lpips: Lpips) -> None:
    assert [tuple(tap.shape[2:]) for tap in lpips.features(pictures(1, SMALLEST_PICTURE))] == [
        (16, 16), (8, 8), (4, 4), (2, 2), (1, 1)
    ]  # fmt: skip
    with pytest.raises(RuntimeError):
        lpips.features(pictures(1, SMALLEST_PICTURE - 1))


def test_weights_of_half_precision_are_taken(tmp_path: Path, lpips: Lpips) -> None:
    save_file({name: tensor.half() for name, tensor in random_weights().items()}, tmp_path / "half.safetensors")
    half = load_lpips(tmp_path / "half.safetensors")
    first, second = pictures(1), pictures(1, seed=2)
    torch.testing.assert_close(half(first, second), lpips(first, second), rtol=1e-2, atol=0)


def test_a_file_that_is_not_vgg16_is_refused_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    whole, path = random_weights(), tmp_path / "vgg16.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no such file; make it with the snippet in model\.perceptual"):
        load_lpips(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_lpips(path)
    nan = torch.full((64,), torch.nan)
    cases = [
        ({"features.12.bias": None}, r"features\.12\.bias is missing"),
        ({"features.0.weight": torch.zeros(64, 1, 3, 3)}, r"features\.0\.weight is .*\[64, 1, 3, 3\], not float \[64"),
        ({"features.2.bias": nan.int()}, r"features\.2\.bias is torch\.int32 \[64\], not float"),
        ({"features.2.bias": nan}, r"features\.2\.bias is not finite"),
        ({"lin3.model.1.weight": None}, r"all or none of LPIPS's five heads: lin3\.model\.1\.weight is missing"),
        ({"lin0.model.1.weight": torch.zeros(64)}, r"lin0\.model\.1\.weight is .*\[64\], not float \[1, 64, 1, 1\]"),
        ({"features.28.weight": None, "features.28.bias": None}, r"features\.28\.weight is missing; features\.28\.b"),
    ]
    for changes, message in cases:
        save_file({k: v for k, v in (whole | changes).items() if v is not None}, path)
        with pytest.raises(ValueError, match=message):
            load_lpips(path)
