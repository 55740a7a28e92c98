"""The loop of `zo_fit`: what a step does, what a validation measures, and what a checkpoint holds."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense.errors import BudgetExhausted, DefenseError
from defense.estimators import Estimator, Loss
from defense.objectives import denoising_loss, inject_gradient, stability_loss
from defense.sanitizer import Sanitizer
from defense.victims import MeteredVictim
from training.checkpoint import Checkpoint, optimizer_tensors, prefixed, restore_optimizer, state_copy, under

logger = logging.getLogger(__name__)

_CHUNK = 2048  # images decoded and sent at once: bounds the images in memory, not the points they are decoded from


@dataclass(frozen=True)
class FitSettings:
    """What the loop needs to know.

    Attributes:
        sigma: Standard deviation of the noise on the images, in units of the [0, 1] range.
        batch: Images a step.
        learning_rate: Adam's.
        mse_weight: Weight of the mean squared error per pixel beside the stability loss.
        clip: Bound on the norm of all parameters' gradient together.
        steps: At most so many steps; None: until the budget is spent.
        validate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        seed: Of everything random.
    """

    sigma: float
    batch: int
    learning_rate: float
    mse_weight: float
    clip: float
    steps: int | None
    validate_every: int
    checkpoint_every: int
    seed: int


@dataclass(frozen=True)
class Validation:
    """What a validation found, on noisy images of the validation split.

    Attributes:
        step: After how many steps.
        queries: Spent until then.
        agreement: Share of images on which the victim's answer, behind the sanitizer, is its answer on the clean one.
        loss: Mean stability loss, in nats.
    """

    step: int
    queries: int
    agreement: float
    loss: float

    def better_than(self, other: "Validation | None") -> bool:
        """Whether the loss is lower: unlike the agreement it is hardly ever a tie, and noise moves it less."""
        return other is None or self.loss < other.loss


@dataclass
class Trainer:
    """Zeroth-order training of a sanitizer in front of a black box (Zhang et al. 2022, algorithm 1).

    Attributes:
        sanitizer: What is trained; its decoder is frozen.
        victim: The metered black box, probed already.
        estimator: How the gradient at the border of the black box is estimated.
        images: (N, C, H, W) training images, without labels.
        validation_images: (M, C, H, W).
        settings: See there.
        folder: Where checkpoints go.
        run_state: JSON values that belong to the run and that a checkpoint carries along.
    """

    sanitizer: Sanitizer
    victim: MeteredVictim
    estimator: Estimator
    images: Tensor
    validation_images: Tensor
    settings: FitSettings
    folder: Path
    run_state: dict[str, Any]
    step: int = 0
    history: list[Validation] = field(default_factory=list)
    best: Validation | None = None

    def __post_init__(self) -> None:
        """Builds what can be derived."""
        self.sanitizer.freeze_decoder()
        self._device = next(self.sanitizer.parameters()).device
        self._parameters = [p for p in self.sanitizer.parameters() if p.requires_grad]
        self._optimizer = torch.optim.Adam(self._parameters, self.settings.learning_rate)
        self._generator = torch.Generator().manual_seed(self.settings.seed)
        self._best_state = state_copy(self.sanitizer)
        unknown = -1
        self._targets = torch.full((len(self.images),), unknown)
        self._validation_targets = torch.full((len(self.validation_images),), unknown)

    def fit(self, on_step: Callable[[float], None]) -> str:
        """Trains until the steps are done or the budget holds no further step and its validation.

        Args:
            on_step: Called after each step with its mean stability loss.

        Returns:
            Why it ended, in words.

        Raises:
            BudgetExhausted: The budget did not hold a single step.
            ServiceError: The victim stayed away; the last checkpoint holds.
            InvalidAnswer: The victim answered nonsense; the last checkpoint holds.
            DefenseError: A gradient was not finite; the last checkpoint holds.
        """
        try:
            if not self.history:
                self._require_budget(beforehand=2 * len(self.validation_images))
                self._validate()  # the pre-trained state is the first candidate
                self.save_checkpoint()
            while self.settings.steps is None or self.step < self.settings.steps:
                self._require_budget()
                on_step(self.train_step())
                if self.step % self.settings.validate_every == 0:
                    self._validate()
                if self.step % self.settings.checkpoint_every == 0:
                    self.save_checkpoint()
            reason = f"all {self.step} steps are done"
        except BudgetExhausted as error:
            if self.step == 0:
                raise
            reason = str(error)
        if self.history and self.history[-1].step != self.step:
            try:
                self._validate()
            except BudgetExhausted:
                logger.warning("the budget holds no validation of the last state; it cannot be chosen")
        self.save_checkpoint()
        return reason

    def restore_best(self) -> Validation:
        """Puts the best validated state into the sanitizer; `fit` or `restore` has validated one."""
        assert self.best is not None
        self.sanitizer.load_state_dict(self._best_state)
        return self.best

    def save_checkpoint(self) -> None:
        """Writes all that `restore` needs."""
        Checkpoint(
            state={
                **self.run_state,
                "step": self.step,
                "ledger": self.victim.ledger.spent,
                "history": [vars(entry) for entry in self.history],
                "best": None if self.best is None else vars(self.best),
            },
            tensors={
                **prefixed("sanitizer", self.sanitizer.state_dict()),
                **prefixed("best", self._best_state),
                **prefixed("optimizer", optimizer_tensors(self._optimizer)),
                "generator": self._generator.get_state(),
                "targets": self._targets,
                "validation_targets": self._validation_targets,
            },
        ).save(self.folder)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to a checkpoint; the ledger is the caller's to restore."""
        self.step = checkpoint.state["step"]
        self.history = [Validation(**entry) for entry in checkpoint.state["history"]]
        self.best = None if checkpoint.state["best"] is None else Validation(**checkpoint.state["best"])
        self.sanitizer.load_state_dict(under("sanitizer", checkpoint.tensors))
        self._best_state = {name: tensor.to(self._device) for name, tensor in under("best", checkpoint.tensors).items()}
        restore_optimizer(self._optimizer, under("optimizer", checkpoint.tensors))
        self._generator.set_state(checkpoint.tensors["generator"])
        self._targets = checkpoint.tensors["targets"]
        self._validation_targets = checkpoint.tensors["validation_targets"]

    def _require_budget(self, beforehand: int = 0) -> None:
        """Ends training while the budget still holds the validation of its last state.

        Args:
            beforehand: Queries that will be spent before the step.
        """
        ledger = self.victim.ledger
        a_step = self.settings.batch * (1 + self.estimator.evaluations(self.sanitizer.border_dimension))
        needed = beforehand + a_step + len(self.validation_images)
        if ledger.remaining is not None and ledger.remaining < needed:
            raise BudgetExhausted(
                f"{ledger.total} of {ledger.max_queries} queries are spent, and a step with its validation may need "
                f"{needed}: raise --max-queries, or lower --batch, --directions or --validation-images"
            )

    def train_step(self) -> float:
        """One optimiser step; returns the mean stability loss of its batch before it."""
        index = torch.randint(len(self.images), (self.settings.batch,), generator=self._generator)
        clean = self.images[index].to(self._device)
        targets = self._known_targets(self._targets, index, self.images, "targets")
        self.sanitizer.train()
        points = self.sanitizer.encode(self._noisy(clean, self._generator))
        estimate = self.estimator(points, self._loss_behind_border(targets, "training"), self._generator)
        surrogate = inject_gradient(points, estimate.gradient)
        if self.settings.mse_weight:
            error = denoising_loss(self.sanitizer.decode(points), clean).mean()
            surrogate = surrogate + self.settings.mse_weight * error
        self._optimizer.zero_grad()
        surrogate.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.settings.clip)
        if not torch.isfinite(norm):
            raise DefenseError(
                f"the gradient of step {self.step + 1} is not finite, and was not applied: "
                "lower --learning-rate or --mse-weight, or raise --mu"
            )
        self._optimizer.step()
        self.step += 1
        return estimate.loss.mean().item()

    def _loss_behind_border(self, targets: Tensor, purpose: str) -> Loss:
        """The stability loss at the border, where what follows are decoder and victim."""

        def black_box(points: Tensor, owners: Tensor) -> Tensor:
            scores = torch.cat(
                [self.victim.query(self.sanitizer.decode(chunk), purpose) for chunk in points.split(_CHUNK)]
            )
            assert self.victim.kind is not None  # probed
            return stability_loss(scores, targets[owners], self.victim.kind)

        return Loss(black_box)

    def _known_targets(self, cache: Tensor, index: Tensor, images: Tensor, purpose: str) -> Tensor:
        """The victim's argmax on clean images, each asked for once in a run."""
        missing = index[cache[index] < 0].unique()
        if len(missing):
            scores = self.victim.query(images[missing].to(self._device), purpose)
            cache[missing] = scores.argmax(1).cpu()
        return cache[index].to(self._device)

    def _noisy(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return clean + self.settings.sigma * torch.randn(clean.shape, generator=generator).to(clean.device)

    @torch.no_grad()
    def _validate(self) -> None:
        everything = torch.arange(len(self.validation_images))
        targets = self._known_targets(
            self._validation_targets, everything, self.validation_images, "validation targets"
        )
        self.sanitizer.eval()
        noise = torch.Generator().manual_seed(self.settings.seed)  # the same noise each time: states are compared
        scores = []
        for clean in self.validation_images.split(_CHUNK):
            sanitized = self.sanitizer(self._noisy(clean.to(self._device), noise))
            scores.append(self.victim.query(sanitized, "validation"))
        answers = torch.cat(scores)
        assert self.victim.kind is not None  # probed
        found = Validation(
            step=self.step,
            queries=self.victim.ledger.total,
            agreement=(answers.argmax(1) == targets).float().mean().item(),
            loss=stability_loss(answers, targets, self.victim.kind).mean().item(),
        )
        self.history.append(found)
        if found.better_than(self.best):
            self.best = found
            self._best_state = state_copy(self.sanitizer)
