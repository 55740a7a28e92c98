"""A Python function as a victim."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FunctionVictim:
    """A function as an `Endpoint`, for models that need no service.

    Args:
        function: (N,C,H,W) float32 in [0,1] -> (N,K) or (N,K,H,W) scores.
        labels: Names of the K classes; None: they are numbered.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], labels: Sequence[str] | None = None) -> None:
        self._function = function
        self._labels = None if labels is None else list(labels)

    def __call__(self, images: Tensor) -> Tensor:
        """(N,C,H,W) float32 -> (N,K) or (N,K,H,W) float32 scores, on the device of the images."""
        return self._function(images).to(images.device, torch.float32)

    def describe(self, image: Tensor) -> dict[str, object]:
        """The names of the classes."""
        return {"labels": self._labels or [str(index) for index in range(self(image[None]).shape[1])]}

    def ready(self) -> bool:
        """It is."""
        return True
