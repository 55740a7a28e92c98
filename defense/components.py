"""Principal components of a set of images: what a linear denoiser and a linear autoencoder are made of."""

import torch
from torch import Tensor, nn


class PrincipalComponents(nn.Module):
    """Mean, `count` leading principal directions and variances of (C, H, W) images, from unlabelled ones."""

    mean: Tensor
    basis: Tensor
    variance: Tensor

    def __init__(self, shape: tuple[int, int, int], count: int) -> None:
        super().__init__()
        dimension = torch.Size(shape).numel()
        if not 1 <= count <= dimension:
            raise ValueError(f"the number of components must be between 1 and {dimension}, got {count}")
        self.shape = shape
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("basis", torch.zeros(count, dimension))
        self.register_buffer("variance", torch.zeros(count))

    @torch.no_grad()
    def fit(self, images: Tensor, generator: torch.Generator) -> None:
        """Fits by randomised range finding with power iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4).

        Raises ValueError unless there are more images (N, C, H, W) than components.
        """
        count, dimension = self.basis.shape
        if len(images) <= count:
            raise ValueError(f"{count} principal components need more than {count} images, got {len(images)}")
        flat = images.flatten(1).to(self.mean.device)
        mean = flat.mean(0)
        centred = flat - mean
        sketch = min(count + 16, len(images), dimension)
        span = centred @ torch.randn(dimension, sketch, generator=generator).to(flat.device)
        for _ in range(4):
            span = torch.linalg.qr(centred @ (centred.T @ span)).Q
        _, singular, basis = torch.linalg.svd(span.T @ centred, full_matrices=False)
        self.mean.copy_(mean)
        self.basis.copy_(basis[:count])
        self.variance.copy_(singular[:count].square() / len(images))

    def project(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images to their (N, k) coefficients."""
        return (images.flatten(1) - self.mean) @ self.basis.T

    def expand(self, coefficients: Tensor) -> Tensor:
        """(N, k) coefficients to (N, C, H, W) images."""
        flat: Tensor = self.mean + coefficients @ self.basis
        return flat.view(-1, *self.shape)
