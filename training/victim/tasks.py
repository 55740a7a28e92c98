"""What a victim is trained for: the loss, the augmentation and the score that go with its task."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.augmentation import augment, augment_frames
from training.data.config import Task
from training.data.datasets import ImageSet
from training.data.lesions import small_lesions
from training.measure.segmentation import dice, iou

_SCORING_BATCH: Final = 256


class Score(ABC):
    """How a model does on a set of images."""

    @property
    @abstractmethod
    def rank(self) -> tuple[float, float]:
        """What to select a model by; the larger is the better one."""

    @abstractmethod
    def __str__(self) -> str:
        """A few words for the log."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """JSON values for the report."""

    @abstractmethod
    def table(self) -> str:
        """Lines for people."""


class VictimTask(ABC):
    """How to train and to score a victim.

    Attributes:
        labels: Names of the K classes.
        batch: Images a step.
        epochs: Default passes over the training images.
        width: Default width of the network.
        depth: Default depth of the network; None where there is no choice.
        libraries: Whose versions decide a result, beside those of every verb.
    """

    batch: ClassVar[int]
    epochs: ClassVar[int]
    width: ClassVar[float]
    depth: ClassVar[str | None] = None
    libraries: ClassVar[tuple[str, ...]] = ()

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.labels = labels

    @abstractmethod
    def augment(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Varies training images (N,C,H,W) in [0,1], and their labels with them."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean training loss of logits (N,K,*P) against labels (N,*P)."""

    @abstractmethod
    def score(self, model: nn.Module, data: ImageSet, device: torch.device) -> Score:
        """Answers every image, with the model in evaluation mode."""


@dataclass(frozen=True)
class ClassificationScore(Score):
    """How a classifier does: mean cross-entropy `loss` in nats; (K,) images `correct` and in all (`count`) by class."""

    labels: tuple[str, ...]
    loss: float
    correct: tuple[int, ...]
    count: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of images classified rightly."""
        return sum(self.correct) / sum(self.count)

    @property
    def rank(self) -> tuple[float, float]:
        """Accuracy, and of several with the same one the lower loss."""
        return self.accuracy, -self.loss

    def __str__(self) -> str:
        """Loss and accuracy."""
        return f"loss {self.loss:.3f}, accuracy {100 * self.accuracy:.1f}%"

    def report(self) -> dict[str, Any]:
        """The keys accuracy, loss, count, and classes: of each, by its name, accuracy, correct and count."""
        classes = {
            label: {"accuracy": correct / count, "correct": correct, "count": count}
            for label, correct, count in zip(self.labels, self.correct, self.count, strict=True)
        }
        return {"accuracy": self.accuracy, "loss": self.loss, "count": sum(self.count), "classes": classes}

    def table(self) -> str:
        """A line a class, and one for all."""
        width = max(map(len, self.labels))
        rows = [*zip(self.labels, self.correct, self.count, strict=True), ("test", sum(self.correct), sum(self.count))]
        return "\n".join(
            f"{label:<{width}}  {100 * correct / count:5.1f}%  ({correct} of {count})" for label, correct, count in rows
        )


class Classification(VictimTask):
    """A class for each image: cross-entropy, and accuracy."""

    batch = 64
    epochs = 30
    width = 0.125
    depth = "vgg11"

    def augment(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As `training.data.augmentation.augment` does; labels (N,) stay as they are."""
        return augment(images, generator), labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits (N,K) in nats."""
        return F.cross_entropy(logits, labels)

    def score(self, model: nn.Module, data: ImageSet, device: torch.device) -> ClassificationScore:
        """Classifies every image."""
        logits = _logits(model, data.images, device)
        classes = len(self.labels)
        right = data.labels[logits.argmax(1) == data.labels]
        correct = torch.bincount(right, minlength=classes).tolist()
        count = torch.bincount(data.labels, minlength=classes).tolist()
        return ClassificationScore(self.labels, self.loss(logits, data.labels).item(), tuple(correct), tuple(count))


@dataclass(frozen=True)
class SegmentationScore(Score):
    """How a segmenter does: mean training loss, and (N,) Dice, IoU, and whether each lesion is small."""

    loss: float
    dice: Tensor
    iou: Tensor
    small: Tensor

    @property
    def rank(self) -> tuple[float, float]:
        """Mean Dice, and of several with the same one the lower loss."""
        return self.dice.mean().item(), -self.loss

    def __str__(self) -> str:
        """Loss and mean Dice."""
        return f"loss {self.loss:.3f}, Dice {self.dice.mean():.3f}"

    def report(self) -> dict[str, Any]:
        """Loss, dice and iou (means), median_dice and count of all images; small_lesions has the last four.

        Scores are of the foreground and in [0,1]; None without images.
        """
        return {
            "loss": self.loss,
            **self._summary(torch.ones_like(self.small)),
            "small_lesions": self._summary(self.small),
        }

    def table(self) -> str:
        """A line for the small lesions, and one for all images."""
        rows = [("small lesions", self._summary(self.small)), ("test", self._summary(torch.ones_like(self.small)))]
        return "\n".join(
            f"{title:<13}  Dice {row['dice']:.3f}  IoU {row['iou']:.3f}  median Dice {row['median_dice']:.3f}"
            f"  ({row['count']} images)"
            for title, row in rows
            if row["count"]
        )

    def _summary(self, chosen: Tensor) -> dict[str, float | int | None]:
        scores, overlaps = self.dice[chosen].double(), self.iou[chosen].double()
        if not len(scores):
            return {"dice": None, "iou": None, "median_dice": None, "count": 0}
        return {
            "dice": scores.mean().item(),
            "iou": overlaps.mean().item(),
            "median_dice": scores.quantile(0.5).item(),
            "count": len(scores),
        }


class Segmentation(VictimTask):
    """A class for each pixel: soft Dice and cross-entropy, and the Dice of the answers."""

    batch = 16
    epochs = 40
    width = 0.25
    libraries = ("monai",)

    def __init__(self, labels: tuple[str, ...]) -> None:
        super().__init__(labels)
        from monai.losses import DiceCELoss  # takes seconds, which a classifier need not wait

        # For two classes with logits (0, l), cross-entropy over softmax is binary cross-entropy with logit l.
        self._loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)

    def augment(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As `training.data.augmentation.augment_frames` does."""
        return augment_frames(images, labels, generator)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Soft Dice loss of the foreground, image by image, plus cross-entropy of all pixels in nats."""
        loss: Tensor = self._loss(logits, labels.unsqueeze(1))
        return loss

    def score(self, model: nn.Module, data: ImageSet, device: torch.device) -> SegmentationScore:
        """Segments every image."""
        logits = _logits(model, data.images, device)
        answers = logits.argmax(1)
        loss = self.loss(logits, data.labels).item()
        return SegmentationScore(
            loss, dice(answers, data.labels), iou(answers, data.labels), small_lesions(data.labels)
        )


TASKS: Final[dict[Task, type[VictimTask]]] = {"classification": Classification, "segmentation": Segmentation}
"""How to train for each task."""


@torch.inference_mode()
def _logits(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    model.eval()
    return torch.cat([model(batch.to(device)).float().cpu() for batch in images.split(_SCORING_BATCH)])
