"""A small student of the black box, learned from answers that were paid for anyway.

A partial copy of a confidential model: it belongs in the trainer's checkpoint, never in an artifact.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.objectives import ScoreKind, log_probabilities, stability_loss
from defense.student_networks import DenseStudentNetwork, StudentNetwork

_WARM_UP = 50  # steps over which the learning rate rises
_LAST_RATE = 0.15  # of the learning rate: where the first long training ends, and what all later steps get
_RECENT = 512  # answers that count as on policy
_FLOOR = 1e-4  # least probability that the student is asked to answer, so that no answer has infinite weight
_JITTER = 0.02  # noise on the images that it learns from, which smooths its gradient


class Answers:
    """Rows of what the black box answered, oldest first; `columns` map a name to the shape and type of one row."""

    def __init__(self, columns: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._storage = {name: torch.empty(0, *shape, dtype=dtype) for name, (shape, dtype) in columns.items()}
        self._count = 0

    def __len__(self) -> int:
        """How many rows."""
        return self._count

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Adds rows, given as one tensor a column."""
        added = len(next(iter(rows.values())))
        for name, storage in self._storage.items():
            if self._count + added > len(storage):  # room for as much again, so that adding stays cheap
                grown = storage.new_empty(2 * (self._count + added), *storage.shape[1:])
                grown[: self._count] = storage[: self._count]
                self._storage[name] = storage = grown
            storage[self._count : self._count + added] = rows[name].to("cpu", storage.dtype)
        self._count += added

    def rows(self, start: int = 0) -> dict[str, Tensor]:
        """All rows from `start`, one tensor a column; views, not copies."""
        return {name: storage[start : self._count] for name, storage in self._storage.items()}

    def sample(self, count: int, recent: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Half of `count` from all rows, half from the last `recent` ones, with replacement."""
        old = torch.randint(self._count, (count - count // 2,), generator=generator)
        first = max(0, self._count - recent)
        new = torch.randint(first, self._count, (count // 2,), generator=generator)
        chosen = torch.cat([old, new])
        return {name: storage[chosen] for name, storage in self._storage.items()}


@dataclass(frozen=True)
class SurrogateSettings:
    """How a surrogate learns, by AdamW on batches of `batch` answers.

    Attributes:
        warm_up: Answers from which it learns before the first step of the sanitizer.
        warm_up_steps: Its optimiser steps then.
        steps: Its optimiser steps after each step of the sanitizer.
    """

    warm_up: int = 8000
    warm_up_steps: int = 1200
    steps: int = 2
    batch: int = 64
    learning_rate: float = 3e-3


class Surrogate:
    """A student network, all answers that it learns from, and how it learns.

    Images (C, H, W) = `shape` and the probabilities of masks are kept with 8 bits: noise far below what it can learn.
    `seed` is of its first weights and its batches; `positions` are the answers' axes behind the K classes: () or (H,
    W).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        settings: SurrogateSettings,
        seed: int,
        device: torch.device,
        positions: tuple[int, ...] = (),
    ) -> None:
        kind = DenseStudentNetwork if positions else StudentNetwork
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = kind(shape, classes).to(device).to(memory_format=torch.channels_last)
        self.settings = settings
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), settings.learning_rate, weight_decay=1e-2)
        answer = ((classes, *positions), torch.uint8 if positions else torch.float32)
        self.values = Answers({"images": (shape, torch.uint8), "answers": answer})
        self._device = device
        self._dense = bool(positions)

    def observe(self, images: Tensor, scores: Tensor, kind: ScoreKind) -> None:
        """Remembers the black box's (N, K) or (N, K, H, W) scores for (N, C, H, W) images in [0, 1]."""
        answers = log_probabilities(scores, kind, _FLOOR)
        self.values.append(
            {"images": _to_bytes(images), "answers": _to_bytes(answers.exp()) if self._dense else answers}
        )

    def learn(self, steps: int, *, from_scratch: bool = False) -> float:
        """Takes optimiser steps on the answers so far.

        `from_scratch` is the first long training: all answers alike, and a learning rate that rises and decays.
        Otherwise it stays low, and half of every batch are the latest answers. Returned is the mean divergence, in nats
        an answer or a pixel, over the last quarter of the steps; 0 without any.
        """
        self.network.train()
        divergences = []
        for step in range(steps):
            rate = _LAST_RATE
            if from_scratch:
                rate += (1 - _LAST_RATE) * min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * self.settings.learning_rate
            recent = len(self.values) if from_scratch else _RECENT
            divergences.append(self._step(recent))
        self.network.eval()
        last = divergences[-(len(divergences) // 4 + 1) :]
        return sum(last) / len(last) if last else 0.0

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """(N,) stability losses of the student's answers on (N, C, H, W) images, which can be differentiated."""
        self.network.eval()
        return stability_loss(self.network(images.contiguous(memory_format=torch.channels_last)), targets, "logits")

    def _step(self, recent: int) -> float:
        drawn = self.values.sample(self.settings.batch, recent, self.generator)
        jitter = _JITTER * torch.randn(drawn["images"].shape, generator=self.generator)
        images, answers = self._images(drawn) + jitter.to(self._device), self._answers(drawn)
        outputs = self.network(images.contiguous(memory_format=torch.channels_last)).log_softmax(1)
        divergence = F.kl_div(outputs, answers, log_target=True, reduction="none").sum(1).mean()
        self.optimizer.zero_grad()
        divergence.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        return divergence.item()

    def _answers(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities."""
        answers = rows["answers"].to(self._device)
        return log_probabilities(answers.float() / 255, "probabilities", _FLOOR) if self._dense else answers

    def _images(self, rows: Mapping[str, Tensor]) -> Tensor:
        return rows["images"].to(self._device, torch.float32) / 255


def _to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round()
