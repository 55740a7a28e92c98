"""Autoencoders that move the black box's border from the image to a low-dimensional code (ZO-AE-DS)."""

from typing import Literal

import torch
from torch import Tensor, nn

from defense.components import PrincipalComponents
from defense.layers import FOLD, FoldedUNet, ResidualBlock, pad_to_multiple

AutoencoderName = Literal["linear", "conv"]

_CELL = 2 * FOLD


class Autoencoder(nn.Module):
    """Base of all autoencoders: an encoder, a decoder, and a code of `code_shape` between them."""

    def __init__(self, shape: tuple[int, int, int], code_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.code_shape = code_shape

    @property
    def code_dimension(self) -> int:
        """d, the numbers in one image's code."""
        return torch.Size(self.code_shape).numel()

    def encode(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images to (N, *code_shape) codes."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """(N, *code_shape) codes to (N, C, H, W) images, not clamped."""
        raise NotImplementedError

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters that stay frozen when the decoder is part of the black box."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructs (N, C, H, W) images."""
        return self.decode(self.encode(images))


class LinearAutoencoder(Autoencoder):
    """Principal components as a code of d = `code` numbers, refined at the decoder by a small folded U-Net.

    The best linear autoencoder has a closed form: this one is good after seconds where images are aligned. The encoder
    starts at the whitened components, so that one step mu means the same along every number of the code.
    """

    def __init__(self, shape: tuple[int, int, int], code: int, width: int = 16) -> None:
        super().__init__(shape, (code,))
        self.components = PrincipalComponents(shape, code)
        self.encoder = nn.Linear(torch.Size(shape).numel(), code)
        self.refine = FoldedUNet(shape[0], shape[0], width)

    def fit_components(self, images: Tensor, generator: torch.Generator) -> None:
        """Sets components and encoder from (N, C, H, W) images, in closed form; raises ValueError on too few."""
        self.components.fit(images, generator)
        with torch.no_grad():
            whitened = self.components.basis / self._deviation.unsqueeze(1)
            self.encoder.weight.copy_(whitened)
            self.encoder.bias.copy_(-whitened @ self.components.mean)

    @property
    def _deviation(self) -> Tensor:
        return self.components.variance.clamp_min(1e-12).sqrt()

    def encode(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images to (N, d) codes."""
        code: Tensor = self.encoder(images.flatten(1))
        return code

    def decode(self, codes: Tensor) -> Tensor:
        """(N, d) codes to (N, C, H, W) images, not clamped."""
        images = self.components.expand(codes * self._deviation)
        refined: Tensor = images + self.refine(images)
        return refined

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The U-Net's parameters; the components are never trained."""
        return list(self.refine.parameters())


class ConvAutoencoder(Autoencoder):
    """A convolutional autoencoder with a spatial code, in which each cell stands for its own window of the image.

    `code`, d, is rounded up to whole channels for each of the ceil(H/8) x ceil(W/8) cells.
    """

    def __init__(self, shape: tuple[int, int, int], code: int, width: int = 48) -> None:
        channels, height, breadth = shape
        cells = (-(-height // _CELL), -(-breadth // _CELL))
        code_channels = -(-code // (cells[0] * cells[1]))
        super().__init__(shape, (code_channels, *cells))
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(FOLD),
            nn.Conv2d(channels * FOLD**2, width, 3, padding=1),
            ResidualBlock(width),
            nn.Conv2d(width, 2 * width, 2, stride=2),
            ResidualBlock(2 * width),
            ResidualBlock(2 * width),
            nn.Conv2d(2 * width, code_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(code_channels, 2 * width, 3, padding=1),
            ResidualBlock(2 * width),
            ResidualBlock(2 * width),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2),
            ResidualBlock(width),
            nn.Conv2d(width, channels * FOLD**2, 3, padding=1),
            nn.PixelShuffle(FOLD),
        )

    def encode(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images to (N, channels, cells, cells) codes."""
        code: Tensor = self.encoder(pad_to_multiple(images, _CELL))
        return code

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to (N, C, H, W) images, not clamped."""
        images: Tensor = self.decoder(codes)
        return images[..., : self.shape[1], : self.shape[2]]

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The decoder's parameters."""
        return list(self.decoder.parameters())


def build_autoencoder(name: AutoencoderName, shape: tuple[int, int, int], code: int) -> Autoencoder:
    """Makes an autoencoder for (C, H, W) images by name: "linear" for aligned ones, "conv" for all.

    Raises ValueError unless the code, d numbers, is smaller than the image.
    """
    if not 1 <= code < torch.Size(shape).numel():
        raise ValueError(f"the code must hold fewer numbers than the image ({torch.Size(shape).numel()}), got {code}")
    return LinearAutoencoder(shape, code) if name == "linear" else ConvAutoencoder(shape, code)
