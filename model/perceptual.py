"""LPIPS: how differently two pictures look to VGG16 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep
Features as a Perceptual Metric").

The weights are a safetensors file that the user makes once (`load_lpips` says how): torchvision, which hosts them, and
the lpips package, which reads them from pickles, are not installed here. Border: pixels f32 [N, 3, H, W] in
[-1, 1] in, one distance a picture out. The network is frozen and has no state of its own to save.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

SMALLEST_PICTURE = 16  # pixels a side: four poolings must leave one cell
# Rows of torchvision's VGG16 up to relu5_3: output channels of each 3x3 convolution; "pool" halves the sides.
LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
INDICES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of its convolutions in torchvision's list of layers
# Of relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3: before each pool and at the end.
TAP_CHANNELS = (64, 128, 256, 512, 512)
# The package's input scaling: ImageNet's mean and deviation, for pixels in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """VGG16's features and, if given, the linear heads: non-persistent buffers, so frozen and never saved."""

    def __init__(self, convolutions: list[tuple[Tensor, Tensor]], heads: list[Tensor] | None) -> None:
        """Take 13 pairs of weight [out, in, 3, 3] and bias [out], and 5 heads [1, C, 1, 1]; None weighs all channels 1
        (the lpips package's `lpips=False`).
        """
        super().__init__()
        self.has_heads = heads is not None
        tensors = {"shift": torch.tensor(SHIFT)[:, None, None], "scale": torch.tensor(SCALE)[:, None, None]}
        for number, (weight, bias) in enumerate(convolutions):
            tensors |= {f"weight{number}": weight, f"bias{number}": bias}
        tensors |= {f"head{number}": head for number, head in enumerate(heads or ())}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the distances f32 [N] of two batches [N, 3, H, W] in [-1, 1]; both may have gradients.

        Per tap: features normalised over channels at each position, squared differences weighted by the head, mean over
        positions; then the sum over the taps (equation 1).
        """
        total = torch.zeros(len(pixels), device=pixels.device)
        for tap, (first, second) in enumerate(zip(self.features(pixels), self.features(reconstruction), strict=True)):
            # `normalize` rather than x / (|x| + 1e-10): where all channels are 0 its gradient is 0, not nan.
            one, other = (functional.normalize(features, dim=1, eps=1e-10) for features in (first, second))
            difference = (one - other).square()
            weighted = functional.conv2d(difference, self.get_buffer(f"head{tap}")) if self.has_heads else difference
            total = total + weighted.sum(dim=1).mean(dim=(1, 2))
        return total

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Return the five taps [N, C, H', W'], finest first."""
        x, taps, number = (pixels.float() - self.get_buffer("shift")) / self.get_buffer("scale"), [], 0
        for layer in LAYERS:
            if layer == "pool":
                taps.append(x)
                x = functional.max_pool2d(x, kernel_size=2)
            else:
                weight, bias = self.get_buffer(f"weight{number}"), self.get_buffer(f"bias{number}")
                x = functional.conv2d(x, weight, bias, padding=1).relu()
                number += 1
        return [*taps, x]


def load_lpips(path: str | Path) -> Lpips:
    """Read VGG16 and, where the file has them, LPIPS's linear heads from a safetensors file, as f32 on CPU.

    Other tensors, such as VGG16's classifier, are ignored. Where torchvision and lpips are installed, this makes the
    file (leave `heads` out for unweighted channels):

        vgg = torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict()
        heads = {k: v for k, v in lpips.LPIPS(net="vgg").state_dict().items() if re.match(r"lin[0-4].model.1", k)}
        safetensors.torch.save_file({k: v for k, v in vgg.items() if k.startswith("features.")} | heads, path)

    Raises FileNotFoundError for a missing file, ValueError naming every tensor that is missing or misshapen.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"lpips_weights={path}: no such file; make it with the snippet in model.perceptual.load_lpips"
        )
    expected: dict[str, tuple[int, ...]] = {}
    widths = [layer for layer in LAYERS if isinstance(layer, int)]
    for index, inputs, outputs in zip(INDICES, (3, *widths), widths, strict=False):
        expected |= {f"features.{index}.weight": (outputs, inputs, 3, 3), f"features.{index}.bias": (outputs,)}
    heads = {f"lin{tap}.model.1.weight": (1, channels, 1, 1) for tap, channels in enumerate(TAP_CHANNELS)}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            expected |= {} if names.isdisjoint(heads) else heads
            found = {name: file.get_tensor(name) for name in expected if name in names}
    except SafetensorError as error:
        raise ValueError(f"lpips_weights={path}: not a safetensors file ({error}); make it again") from None
    wrong = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if tuple(tensor.shape) != expected[name] or not tensor.is_floating_point():
            wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, not float {list(expected[name])}")
        elif not torch.isfinite(tensor).all():
            wrong.append(f"{name} is not finite")
    if wrong:
        raise ValueError(
            f"lpips_weights={path}: expected torchvision's VGG16 (features.N) and all or none of LPIPS's five heads: "
            f"{'; '.join(wrong)}"
        )
    tensors = [tensor.float() for tensor in found.values()]
    features, given_heads = tensors[: 2 * len(INDICES)], tensors[2 * len(INDICES) :]
    return Lpips(list(zip(features[::2], features[1::2], strict=True)), given_heads or None)
