"""A patch discriminator and its losses: the GAN part of the VAE's loss.

PatchGAN (Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", 70x70) scores every
patch of a picture as real or generated. Ours: group norm where the original has batch norm, because the statistics of a
batch would depend on how many ranks share it. Only through the norm's statistics does a score see beyond its patch.
"""

from torch import Tensor, nn
from torch.nn import functional

SMALLEST_PICTURE = 24  # pixels a side: three halvings and two 4x4 convolutions leave one score
CHANNELS_PER_GROUP = 16  # Wu & He 2018, "Group Normalization", table 3


class PatchDiscriminator(nn.Module):
    """Three strided 4x4 convolutions and two of stride 1; the receptive field of a score is 70x70 pixels."""

    def __init__(self, channels: int = 64) -> None:
        """Build it with `channels` after the first layer, a multiple of 8; weights from torch's global generator."""
        super().__init__()
        assert channels % 8 == 0, channels  # 2 * channels make whole groups
        layers: list[nn.Module] = [_convolution(3, channels, stride=2, bias=True), nn.LeakyReLU(0.2)]
        for width, stride in ((channels, 2), (2 * channels, 2), (4 * channels, 1)):
            layers += [
                _convolution(width, 2 * width, stride, bias=False),  # the norm has one
                nn.GroupNorm(2 * width // CHANNELS_PER_GROUP, 2 * width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, _convolution(8 * channels, 1, stride=1, bias=True))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [N, 3, H, W] in [-1, 1] to scores [N, 1, H/8 - 2, W/8 - 2]: positive means real."""
        return self.layers(pixels)


def hinge_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return the discriminator's loss (Lim & Ye 2017), the mean over real and fake: 1 for scores of 0, 0 where all are
    on their side by a margin of 1.
    """
    return 0.5 * (functional.relu(1 - real_scores).mean() + functional.relu(1 + fake_scores).mean())


def generator_loss(fake_scores: Tensor) -> Tensor:
    """Return the generator's loss: minus the mean score."""
    return -fake_scores.mean()


def _convolution(inputs: int, outputs: int, stride: int, bias: bool) -> nn.Conv2d:
    """Return a 4x4 convolution with the paper's initial weights, N(0, 0.02)."""
    layer = nn.Conv2d(inputs, outputs, kernel_size=4, stride=stride, padding=1, bias=bias)
    nn.init.normal_(layer.weight, 0, 0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
