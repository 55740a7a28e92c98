"""What a run of `zo_fit` asks the victim besides its steps: its answers on clean images, and how good a state is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.objectives import agreement, stability_loss
from defense.sanitizer import Sanitizer
from defense.victims import MeteredVictim

_CHUNK = 2048  # images sanitized and sent at once: bounds the memory
_UNKNOWN = -1


@dataclass(frozen=True)
class Validation:
    """What a validation found after a step, on noisy images of the validation split.

    Attributes:
        queries: Spent until then.
        agreement: Share of images on which the victim's answer behind the sanitizer equals that on the clean image; of
            masks the mean Dice of the two.
        loss: Mean stability loss.
        reconstruction: Whether the images passed through the autoencoder.
    """

    step: int
    queries: int
    agreement: float
    loss: float
    reconstruction: bool

    def better_than(self, other: "Validation | None") -> bool:
        """Whether the loss is lower: unlike the agreement it is hardly ever a tie, and noise moves it less."""
        return other is None or self.loss < other.loss


class CleanTargets:
    """The victim's argmax on clean images (N, C, H, W), each asked for once in a run.

    `known` is (N,) or (N, H, W) int16 on the CPU, -1 where the victim was not asked yet. Queries are booked under
    `purpose`; `on_answers` is called with images and scores after each request.
    """

    def __init__(
        self,
        victim: MeteredVictim,
        images: Tensor,
        purpose: str,
        device: torch.device,
        on_answers: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        assert victim.positions is not None  # probed
        self.known = torch.full((len(images), *victim.positions), _UNKNOWN, dtype=torch.int16)
        self._victim = victim
        self._images = images
        self._purpose = purpose
        self._device = device
        self._on_answers = on_answers

    def sample_known(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) indices of images whose targets are known, at random, with replacement."""
        known = self._is_known.nonzero().squeeze(1)
        return known[torch.randint(len(known), (count,), generator=generator)] if count else known[:0]

    def of(self, index: Tensor) -> Tensor:
        """The targets of the images at (M,) indices, (M,) or (M, H, W) int64; asks for those that are not known."""
        missing = index[~self._is_known[index]].unique()
        for some in missing.split(_CHUNK) if len(missing) else ():
            images = self._images[some].to(self._device)
            scores = self._victim.query(images, self._purpose)
            self.known[some] = scores.argmax(1).to("cpu", torch.int16)
            if self._on_answers is not None:
                self._on_answers(images, scores)
        return self.known[index].to(self._device, torch.int64)

    @property
    def _is_known(self) -> Tensor:
        return self.known.flatten(1)[:, 0] != _UNKNOWN if self.known.ndim > 1 else self.known != _UNKNOWN


class Validator:
    """Measures a sanitizer on noisy validation images (M, C, H, W), with the same noise each time."""

    def __init__(self, victim: MeteredVictim, images: Tensor, sigma: float, seed: int, device: torch.device) -> None:
        self.targets = CleanTargets(victim, images, "validation targets", device)
        self._victim = victim
        self._images = images
        self._sigma = sigma
        self._seed = seed
        self._device = device

    @property
    def cost(self) -> int:
        """Images that a measurement asks about, once the targets are known."""
        return len(self._images)

    @torch.no_grad()
    def measure(self, sanitizer: Sanitizer, step: int) -> Validation:
        """Asks the victim about the sanitized images; `step` is only noted."""
        kind = self._victim.kind
        assert kind is not None  # probed
        targets = self.targets.of(torch.arange(len(self._images)))
        was_training = sanitizer.training
        sanitizer.eval()
        noise = torch.Generator().manual_seed(self._seed)
        scores = []
        for clean in self._images.split(_CHUNK):
            noisy = clean + self._sigma * torch.randn(clean.shape, generator=noise)
            scores.append(self._victim.query(sanitizer(noisy.to(self._device)), "validation"))
        sanitizer.train(was_training)
        answers = torch.cat(scores)
        return Validation(
            step=step,
            queries=self._victim.ledger.total,
            agreement=agreement(answers.argmax(1), targets).mean().item(),
            loss=stability_loss(answers, targets, kind).mean().item(),
            reconstruction=sanitizer.autoencoder is not None,
        )
