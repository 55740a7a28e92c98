"""The attacker who has a key to the gateway and nothing else: what its answers give away within a budget of queries."""

import logging

import torch
from torch import Tensor

from defense.attacks import craft, holds
from defense.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from defense.query_attacks import Inquiry, SpentError, hop_skip_jump, square
from defense.surrogates import Surrogate, SurrogateSettings
from services.protocol.client import Endpoint
from services.protocol.errors import Overloaded
from training.command.errors import UserError
from training.measure.scoring import main_score

logger = logging.getLogger(__name__)

_REQUEST = 64  # images that are asked about together
_OWN_NOISE = 0.1  # largest standard deviation of what is added to the student's images: it is to know what is near them


class Outsider:
    """Black-box attacks on a gateway, which see its answers only.

    Where the gateway refuses (429: its budget, or a suspected attack), that attack ends for all of its images and
    counts with what it had found; the next one tries again. An attacker that sends image by image, waits, or
    has several keys may get further.

    Args:
        endpoint: The gateway.
        images: (N,C,H,W) float32 in [0,1], on the CPU.
        labels: (N,) true classes or (N,H,W) true masks.
        own: (M,C,H,W) unlabelled images of the kind, to teach the student.
        queries: At most so many an image for each run of an attack.
        student_queries: Queries for the student; 0: no student.
        student_steps: Its optimiser steps.
        steps: Of PGD on the student.
        seed: Of all that is random.
        device: Where the student learns.

    Attributes:
        spent: Answered queries by purpose.
        refused: The gateway's last refusal; None without one.

    Raises:
        UserError: The gateway does not answer even the unchanged images.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        images: Tensor,
        labels: Tensor,
        own: Tensor,
        *,
        queries: int,
        student_queries: int,
        student_steps: int,
        steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.spent: dict[str, int] = {}
        self.refused: str | None = None
        self._endpoint, self._images, self._labels, self._own = endpoint, images, labels, own
        self._queries, self._steps, self._seed, self._device = queries, steps, seed, device
        self._student_queries, self._student_steps = student_queries, student_steps
        self._student: Surrogate | None = None
        self._tried_to_teach = False
        self._walked: Inquiry | None = None
        self._squared = torch.ones(len(images), dtype=torch.float64)  # a change that is small enough for a smaller size
        try:
            self._clean = self._ask("clean", images)
        except SpentError as error:
            raise UserError(f"the gateway refuses to answer the first {len(images)} images: {self.refused}") from error

    def clean(self) -> Tensor:
        """(N,) scores of the images as they are."""
        return self._scored(self._clean)

    def attacked(self, norm: str, epsilon: float) -> dict[str, Tensor]:
        """(N,) scores under every attack of one size, by its name.

        `square` reads scores, `hopskipjump` decisions, `student` is PGD on a student taught by the gateway. Sizes of
        `square` must rise from call to call, as an image lost at one counts as lost at larger ones.
        """
        found: dict[str, Tensor] = {}
        if norm == "linf":
            self._square(epsilon)
            found["square"] = torch.minimum(self._squared, self.clean())
        else:
            found["hopskipjump"] = torch.minimum(self._hop_skip_jump().least(within=epsilon).double(), self.clean())
        if (student := self._taught()) is not None:
            name = "pgd" if norm == "linf" else "pgd-l2"
            images, labels = self._images.to(self._device), self._labels.to(self._device)
            steps, seed = self._steps, self._seed
            crafted = craft(name, student.network.eval(), images, labels, epsilon, steps=steps, seed=seed).cpu()
            try:
                found["student"] = self._scored(self._ask("transfer", crafted))
            except SpentError:
                found["student"] = self.clean()
        return found

    def smallest(self) -> Tensor:
        """The (M,) L2 norms that HopSkipJump finds on the images that are answered rightly; inf: none was found."""
        return self._hop_skip_jump().nearest()[~self._lost()]

    def corrupted(self) -> dict[tuple[str, int], Tensor]:
        """(N,) scores of the images after every corruption, by its kind and severity, as far as there are answers."""
        found: dict[tuple[str, int], Tensor] = {}
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                try:
                    answers = self._ask("corruptions", corrupt(name, self._images, severity, self._seed))
                except SpentError:
                    return found
                found[name, severity] = self._scored(answers)
        return found

    def _square(self, epsilon: float) -> None:
        masks = self._labels.ndim > 1
        inquiry = self._inquiry("square")
        left = None if masks else (torch.minimum(self._squared, self.clean()) > 0).nonzero().squeeze(1)
        square(inquiry, epsilon, chosen=left, to_the_end=masks, seed=self._seed)
        self._squared = torch.minimum(self._squared, inquiry.least().double())

    def _hop_skip_jump(self) -> Inquiry:
        if self._walked is None:
            self._walked = self._inquiry("hopskipjump")
            starts, known = self._starts()
            hop_skip_jump(self._walked, starts, chosen=(known & ~self._lost()).nonzero().squeeze(1), seed=self._seed)
        return self._walked

    def _starts(self) -> tuple[Tensor, Tensor]:
        """For each image the nearest one that does not get its answer, and whether there is one."""
        distances = torch.cdist(self._images.flatten(1), self._images.flatten(1))
        everyone = range(len(self._images))
        answers = self._clean.argmax(1)
        held = torch.stack([holds(answers, self._labels[index].expand_as(self._labels)) for index in everyone])
        distances[held] = float("inf")
        nearest = distances.min(1)
        return self._images[nearest.indices], nearest.values.isfinite()

    def _lost(self) -> Tensor:
        """(N,) whether the clean image is already misclassified."""
        return ~holds(self._clean.argmax(1), self._labels)

    def _taught(self) -> Surrogate | None:
        """The student; None without queries for it."""
        if not self._tried_to_teach and self._student_queries:
            self._tried_to_teach = True
            generator = torch.Generator().manual_seed(self._seed)
            index = torch.randint(len(self._own), (self._student_queries,), generator=generator)
            noise = torch.randn((len(index), *self._own.shape[1:]), generator=generator)
            levels = _OWN_NOISE * torch.rand(len(index), generator=generator).view(-1, 1, 1, 1)
            shown = (self._own[index] + levels * noise).clamp(0, 1)
            try:
                answers = self._ask("student", shown)
            except SpentError:
                return None
            shape = (int(shown.shape[1]), int(shown.shape[2]), int(shown.shape[3]))
            classes, positions = answers.shape[1], tuple(answers.shape[2:])
            self._student = Surrogate(shape, classes, SurrogateSettings(), self._seed, self._device, positions)
            self._student.observe(shown, answers, "probabilities")
            logger.info("teaching a student with %d answers, in %d steps", len(shown), self._student_steps)
            divergence = self._student.learn(self._student_steps, from_scratch=True)
            logger.info("the student was taught; divergence %.3f nats", divergence)
        return self._student

    def _inquiry(self, purpose: str) -> Inquiry:
        return Inquiry(lambda images: self._ask(purpose, images), self._images, self._labels, self._queries)

    def _ask(self, purpose: str, images: Tensor) -> Tensor:
        """The gateway's probabilities; SpentError if it refuses."""
        answers = []
        for part in images.split(_REQUEST):
            try:
                answers.append(self._endpoint(part))
            except Overloaded as error:
                self.refused = error.message
                raise SpentError from error
            self.spent[purpose] = self.spent.get(purpose, 0) + len(part)
        return torch.cat(answers)

    def _scored(self, answers: Tensor) -> Tensor:
        return main_score(answers.argmax(1), self._labels)
