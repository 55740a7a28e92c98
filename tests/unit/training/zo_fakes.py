"""A victim without sockets, and images for it, that the tests of `zo_fit` share."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.protocol.errors import UnsupportedMedia, UpstreamUnreachable
from training import pretrain
from training.data.datasets import ImageSet, Splits

SIZE = 16
LABELS = ["left", "right"]


def half_images(count: int, seed: int) -> Tensor:
    """Images that are brighter on one side, with a texture."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 + 0.1 * torch.rand(count, 1, SIZE, SIZE, generator=generator)
    for image in images:
        side = slice(0, SIZE // 2) if torch.rand((), generator=generator) < 0.5 else slice(SIZE // 2, SIZE)
        image[..., side] += 0.05 + 0.15 * torch.rand((), generator=generator)
    return images


def image_set(count: int, seed: int) -> ImageSet:
    # A trainer that looked at the labels would fail on these.
    return ImageSet(half_images(count, seed), torch.full((count,), -99), tuple(map(str, range(count))))


SPLITS = Splits("halves", tuple(LABELS), image_set(60, 0), image_set(20, 1), image_set(20, 2), "f" * 64)


class Endpoint:
    """A victim that compares the two sides, counts what it receives, and can fail after so many images."""

    def __init__(self) -> None:
        self.received = 0
        self.fails_after: int | None = None
        self.answer = None
        self.labels: object = LABELS
        self.refuses_images = False
        self.urls: list[str] = []

    @contextmanager
    def connect(self, urls, **options):
        self.urls, self.options = urls, options
        yield self

    def __call__(self, images: Tensor) -> Tensor:
        if self.fails_after is not None and self.received + len(images) > self.fails_after:
            raise UpstreamUnreachable("the victim at http://victim/predict cannot be reached: gone")
        self.received += len(images)
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        if self.answer is not None:
            return self.answer(images)
        difference = (images[..., : SIZE // 2] - images[..., SIZE // 2 :]).mean((1, 2, 3))
        return torch.stack([30 * difference, -30 * difference], dim=1).softmax(1)

    def describe(self, image: Tensor) -> dict[str, object]:
        self.received += 1
        if self.refuses_images:
            raise UnsupportedMedia("the victim at http://victim/predict answered 415: tensors only")
        return {"label": "left", "labels": self.labels, "probabilities": []}

    def ready(self) -> bool:
        return True


def segment(images: Tensor) -> Tensor:
    """(N, 2, H, W) probabilities: what is brighter than the image's mean."""
    smooth = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    inside = (20 * (smooth - images.mean((1, 2, 3), keepdim=True))).sigmoid()
    return torch.cat([1 - inside, inside], dim=1)


def pretrain_into(folder: Path, splits: Splits, steps: int) -> Path:
    """Pre-trains small parts on these images; returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "load_data", lambda *_, **__: splits)
        code = pretrain.main(["--pretrain-steps", str(steps), "--code", "8", "--size", str(SIZE), "--out", str(folder)])
    assert code == 0
    return folder
