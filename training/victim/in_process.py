"""A victim in this process, for comparisons on one machine; its gradient serves the white-box upper bounds only."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from defense.files import replace_file
from services.hospital.model import load_victim
from services.protocol.client import Endpoint
from training.command.errors import UserError
from training.data.datasets import Splits
from training.measure.endpoints import CHUNK
from training.victim.files import data_fingerprint

logger = logging.getLogger(__name__)

_PROBES = 8  # images by whose scores a victim is known again
_SAME_SCORES = 0.02  # probabilities of one and the same model differ by less, in process and over HTTP


class InProcessVictim:
    """What the hospital serves, as an `Endpoint`; differentiable in the images, never in the weights.

    `model` maps (N,C,H,W) in [0,1] to logits (N,K) or (N,K,H,W), in evaluation mode.
    """

    def __init__(self, model: nn.Module, labels: tuple[str, ...], device: torch.device) -> None:
        self.model = model.requires_grad_(False).to(device)
        self._labels = list(labels)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        """(N,C,H,W) float32 -> (N,K) or (N,K,H,W) float32 probabilities, as `services.hospital.app` computes them."""
        parts = images.to(self.device, torch.float32).split(CHUNK)
        scores = [self.model(part.clamp(0, 1)).float().softmax(dim=1) for part in parts]
        return torch.cat(scores).to(images.device)

    @torch.no_grad()
    def describe(self, image: Tensor) -> dict[str, object]:
        """One image (C,H,W) -> the JSON answer; a segmenter's is without the picture of the mask."""
        probabilities = self(image[None])[0]
        if probabilities.dim() > 1:
            share = (probabilities.argmax(0) != 0).double().mean().item()
            return {"labels": list(self._labels), "lesion_fraction": share}
        return {
            "label": self._labels[int(probabilities.argmax())],
            "labels": list(self._labels),
            "probabilities": probabilities.tolist(),
        }

    def ready(self) -> bool:
        """It is: it was loaded."""
        return True


@contextmanager
def in_process(folder: Path, device: torch.device, splits: Splits) -> Iterator[InProcessVictim]:
    """Loads the victim that `training.victim_fit` wrote in a folder; warns if it was trained on other splits.

    Raises:
        VictimFileError: There is no victim.
        UserError: It takes other images than those of `splits`.
    """
    model, config = load_victim(folder)
    if tuple(splits.test.images.shape[1:]) != (config.channels, *config.size):
        raise UserError(f"{folder} takes other images: use --size {config.size[0]} --channels {config.channels}")
    if data_fingerprint(folder) not in (None, splits.fingerprint):
        logger.warning(
            "%s was trained on other images or another split of them: it may have seen images of this test split; "
            "use its --data, --split-seed and --published-test",
            folder,
        )
    yield InProcessVictim(model, config.labels, device)


def refuse_another_victim(path: Path, endpoint: Endpoint, images: Tensor) -> None:
    """Keeps the victim's scores on the first images in a file; UserError if they differ from those kept before."""
    with torch.no_grad():
        scores = endpoint(images[:_PROBES]).cpu()
    if not path.exists():
        replace_file(path, json.dumps(scores.tolist()).encode())
    before = torch.tensor(json.loads(path.read_bytes()))[: len(scores)]
    now = scores[: len(before)]
    if before.shape != now.shape or (before - now).abs().max() > _SAME_SCORES:
        raise UserError(f"the runs in {path.parent} are of another victim: use that one, or another --out")
