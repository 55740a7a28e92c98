"""The sanitizer: what is learned in front of the black box, and what the gateway serves."""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from defense.autoencoders import Autoencoder, AutoencoderName, build_autoencoder
from defense.denoisers import DenoiserName, build_denoiser

PositiveInt = Annotated[int, Field(ge=1)]


class ImageShape(BaseModel):
    """What an image is: (channels, height, width), float32, and the range of its values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: Literal[1, 3]
    height: PositiveInt
    width: PositiveInt
    range: tuple[Literal[0], Literal[1]] = (0, 1)

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width


class SanitizerConfig(BaseModel):
    """Enough to build a sanitizer: the shape of its images and the names of its parts.

    Attributes:
        components: Principal components of the denoiser's Wiener filter; ignored by denoisers without one.
        autoencoder: None: the sanitizer is the denoiser alone.
        code: Numbers in the autoencoder's code; ignored without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: ImageShape
    denoiser: DenoiserName = "wiener-unet"
    components: PositiveInt = 192
    autoencoder: AutoencoderName | None = "linear"
    code: PositiveInt = 256


class Sanitizer(nn.Module):
    """A denoiser, then optionally an autoencoder, cut in two where the black box begins.

    `encode` is trained by exact back-propagation; `decode`, the clamp included, counts as part of the black box
    (ZO-AE-DS). Without an autoencoder the black box begins at the denoised image (ZO-DS).
    """

    def __init__(self, config: SanitizerConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.input.dimensions
        self.denoiser = build_denoiser(config.denoiser, shape, config.components)
        self.autoencoder: Autoencoder | None = (
            None if config.autoencoder is None else build_autoencoder(config.autoencoder, shape, config.code)
        )

    @property
    def border_dimension(self) -> int:
        """d, the numbers at the border of the black box: of the code, or else of the image."""
        if self.autoencoder is not None:
            return self.autoencoder.code_dimension
        return torch.Size(self.config.input.dimensions).numel()

    def encode(self, images: Tensor) -> Tensor:
        """(N, C, H, W) finite images of any range to the points z at the border of the black box, (N, *shape of z)."""
        denoised: Tensor = self.denoiser(images)
        return denoised if self.autoencoder is None else self.autoencoder.encode(denoised)

    def decode(self, points: Tensor) -> Tensor:
        """Points z to (N, C, H, W) images in [0, 1]."""
        images = points if self.autoencoder is None else self.autoencoder.decode(points)
        return images.clamp(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Sanitizes (N, C, H, W) finite images of any range; the result lies in [0, 1]."""
        return self.decode(self.encode(images))

    def denoiser_alone(self) -> "Sanitizer":
        """The same denoiser, its parameters shared, without the reconstruction."""
        alone = Sanitizer(self.config.model_copy(update={"autoencoder": None}))
        alone.denoiser = self.denoiser
        return alone

    def freeze_decoder(self) -> None:
        """Stops training whatever lies behind the border."""
        if self.autoencoder is not None:
            for parameter in self.autoencoder.decoder_parameters():
                parameter.requires_grad_(False)
