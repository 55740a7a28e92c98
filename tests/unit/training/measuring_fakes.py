"""A two-class world in which everything is known in closed form: data, weights, victim and gateway, without sockets."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from services.protocol.client import Endpoint
from training.data.datasets import ImageSet, Splits
from training.measure.endpoints import Connect

LABELS = ("dark", "bright")
SHAPE = (1, 4, 4)
VICTIM_URL, GATEWAY_URL = "http://victim", "http://gateway"


class Brightness(nn.Module):
    """Logits of 'dark' and 'bright': the mean pixel against one half. Smallest L-inf perturbation: |mean - 1/2|."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(20.0))
        self.threshold = threshold

    def forward(self, images: Tensor) -> Tensor:
        score = self.slope * (images.flatten(1).mean(dim=1) - self.threshold)
        return torch.stack([-score, score], dim=1)


class FakeEndpoint:
    """Answers as a service would; `tolerance` is how far a gateway pulls every image back to its own side."""

    def __init__(self, model: nn.Module, tolerance: float = 0.0, artifact: dict[str, object] | None = None) -> None:
        self.model, self.tolerance, self.artifact = model, tolerance, artifact
        self.images = 0
        self.fail_after: int | None = None
        self.up = True

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        if self.fail_after is not None and self.images > self.fail_after:
            raise KeyboardInterrupt
        texture = images[:, :, 0, 0] - images[:, :, 0, 1]  # the images' label in a place that attacks hardly reach
        with torch.no_grad():
            return self.model(images + self.tolerance * texture.sign()[..., None, None]).softmax(dim=1)

    def describe(self, image: Tensor) -> dict[str, object]:
        probabilities = self(image[None])[0]
        answer: dict[str, object] = {"label": LABELS[int(probabilities.argmax())], "labels": list(LABELS)}
        return answer if self.artifact is None else {**answer, "artifact": self.artifact}

    def ready(self) -> bool:
        return self.up


def bare() -> FakeEndpoint:
    return FakeEndpoint(Brightness())


def gateway() -> FakeEndpoint:
    return FakeEndpoint(Brightness(), tolerance=0.05, artifact={"id": "f00d", "queries_spent": 4321, "name": "zo"})


def connecting(**endpoints: FakeEndpoint) -> Connect:
    """A factory of clients: http://victim is the endpoint `victim`, and so on."""

    def connect(url: str) -> AbstractContextManager[Endpoint]:
        return nullcontext(endpoints[url.removeprefix("http://")])

    return connect


def splits(count: int = 12, names: tuple[str, ...] = LABELS) -> Splits:
    """Images 4/255 (L-inf) from the boundary, and with a texture of +-0.2 that tells their class."""
    labels = torch.arange(count) % 2
    sign = labels.float() * 2 - 1
    images = (0.5 + sign * 4 / 255).view(-1, 1, 1, 1).repeat(1, *SHAPE)
    images[:, 0, 0, 0] += 0.2 * sign
    images[:, 0, 0, 1] -= 0.2 * sign
    part = ImageSet(images=images, labels=labels, names=tuple(f"image-{index}" for index in range(count)))
    return Splits(name="toy", labels=names, train=part, validation=part.subset([0, 1]), test=part, fingerprint="abc")


def victim_config(size: tuple[int, int] = (4, 4)) -> SimpleNamespace:
    return SimpleNamespace(labels=LABELS, channels=1, size=size)
