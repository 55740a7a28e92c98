"""Convolutional parts that the denoisers and the autoencoder share."""

from torch import Tensor, nn
from torch.nn import functional as F

FOLD = 4
"""Images are folded by this factor before any convolution: each FOLD x FOLD block of pixels becomes channels."""


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions of `width` features beside the identity (He et al. 2016, without batch norm)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N, width, H, W) to the same shape."""
        changed: Tensor = features + self.body(features)
        return changed


class FoldedUNet(nn.Module):
    """A two-scale U-Net on pixel-unshuffled images, as FFDNet works on (Zhang et al. 2018).

    Folding divides the cost of every convolution by FOLD squared and multiplies its reach by FOLD. No batch norm:
    training and serving compute the same. Before training it answers zeros. `width` is doubled at the second scale.
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(inputs * FOLD**2, width, 3, padding=1), ResidualBlock(width))
        self.inner = nn.Sequential(
            nn.Conv2d(width, 2 * width, 2, stride=2),
            ResidualBlock(2 * width),
            ResidualBlock(2 * width),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2),
        )
        self.block = ResidualBlock(width)
        self.tail = nn.Conv2d(width, outputs * FOLD**2, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type] # the layer has a bias

    def forward(self, images: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H, W), any H and W."""
        height, width = images.shape[-2:]
        features = self.head(F.pixel_unshuffle(pad_to_multiple(images, 2 * FOLD), FOLD))
        features = self.block(features + self.inner(features))
        return F.pixel_shuffle(self.tail(features), FOLD)[..., :height, :width]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeats the last row and column until both sides of (N, C, H, W) images are divisible by `multiple`."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
