"""The loop of `zo_fit`: what a step does, what a validation measures, and what a checkpoint holds."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from defense.errors import BudgetExhausted, DefenseError
from defense.estimators import Estimator
from defense.objectives import denoising_loss, inject_gradient
from defense.sanitizer import Sanitizer
from defense.victims import MeteredVictim
from training.command.team import ALONE, Team
from training.fit.checkpoint import Checkpoint, optimizer_tensors, prefixed, restore_optimizer, state_copy, under
from training.fit.config import FitConfig
from training.fit.loss import loss_behind_border
from training.fit.noise import with_noise
from training.fit.student import Student
from training.fit.validation import CleanTargets, Validation, Validator

logger = logging.getLogger(__name__)

_WARM_UP_CHUNK = 1024  # images asked for between checkpoints, before the first step


@dataclass
class Trainer:
    """Zeroth-order training of a sanitizer in front of a black box (Zhang et al. 2022, algorithm 1).

    Attributes:
        sanitizer: What is trained; its decoder is frozen.
        victim: The metered black box, already probed.
        images: (N, C, H, W) training images, without labels.
        validation_images: (M, C, H, W).
        folder: Where checkpoints go.
        run_state: JSON values of the run, kept in checkpoints.
        student: Learns from all answers, for estimators with a surrogate.
        team: The processes that share the work, each with all of the above; the first one writes.
    """

    sanitizer: Sanitizer
    victim: MeteredVictim
    estimator: Estimator
    images: Tensor
    validation_images: Tensor
    config: FitConfig
    folder: Path
    run_state: dict[str, Any]
    student: Student | None = None
    team: Team = ALONE
    step: int = 0
    history: list[Validation] = field(default_factory=list)
    best: Validation | None = None

    def __post_init__(self) -> None:
        """Builds what can be derived."""
        self.sanitizer.freeze_decoder()
        self._device = next(self.sanitizer.parameters()).device
        self._parameters = [p for p in self.sanitizer.parameters() if p.requires_grad]
        self._optimizer = torch.optim.Adam(self._parameters, self.config.learning_rate)
        self._generator = torch.Generator().manual_seed(self.config.seed)
        decay = self.config.averaging
        self._averaged: AveragedModel | None = None
        if decay:
            self._averaged = AveragedModel(self.sanitizer, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
            self._averaged.n_averaged.fill_(1)  # the average begins at the pre-trained state, not after the first step
        self._best_state = state_copy(self.sanitizer)
        self._may_drop_reconstruction = self.config.sanitizer == "auto" and self.sanitizer.autoencoder is not None
        self._targets = CleanTargets(self.victim, self.images, "targets", self._device, self._observe)
        self._validator = Validator(
            self.victim, self.validation_images, self.config.sigma, self.config.seed, self._device
        )

    def fit(self, on_step: Callable[[float], None]) -> str:
        """Trains until the steps are done or the budget holds no further step and its validation; returns why it ended.

        `on_step` is called after each step with its mean stability loss. On errors the last checkpoint is kept.

        Raises:
            BudgetExhausted: The budget did not hold a single step.
            ServiceError: The victim is unavailable.
            InvalidAnswer: The victim's answer is invalid.
            DefenseError: A gradient was not finite.
        """
        try:
            if not self.history:
                self._require_budget(beforehand=self._validator.cost + self._validation_cost)
                self._validate()  # the pre-trained state is the first candidate
                self.save_checkpoint()
            if self.config.steps is None or self.step < self.config.steps:
                self._warm_up()
            while self.config.steps is None or self.step < self.config.steps:
                self._require_budget()
                on_step(self.train_step())
                if self.step % self.config.validate_every == 0:
                    self._validate()
                if self.step % self.config.checkpoint_every == 0:
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

    def best_sanitizer(self) -> tuple[Sanitizer, Validation]:
        """The best validated state, with or without the reconstruction; `fit` or `restore` has validated one."""
        assert self.best is not None
        served = Sanitizer(self.sanitizer.config).to(self._device)
        served.load_state_dict(self._best_state)
        return served if self.best.reconstruction else served.denoiser_alone(), self.best

    def save_checkpoint(self) -> None:
        """Writes all that `restore` needs."""
        if not self.team.is_first:
            return
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
                **({} if self._averaged is None else prefixed("averaged", self._averaged.state_dict())),
                **prefixed("best", self._best_state),
                **({} if self.student is None else prefixed("surrogate", self.student.save())),
                **prefixed("optimizer", optimizer_tensors(self._optimizer)),
                "generator": self._generator.get_state(),
                "targets": self._targets.known,
                "validation_targets": self._validator.targets.known,
            },
        ).save(self.folder)

    def forget_surrogate(self) -> None:
        """Removes the surrogate, its answers and its part of the checkpoint."""
        if self.student is not None:
            student, self.student = self.student, None
            self.save_checkpoint()  # first, so that no checkpoint names answers that are gone
            student.delete()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to a checkpoint; the ledger is the caller's to restore."""
        self.step = checkpoint.state["step"]
        self.history = [Validation(**entry) for entry in checkpoint.state["history"]]
        self.best = None if checkpoint.state["best"] is None else Validation(**checkpoint.state["best"])
        self.sanitizer.load_state_dict(under("sanitizer", checkpoint.tensors))
        self._best_state = {name: tensor.to(self._device) for name, tensor in under("best", checkpoint.tensors).items()}
        if self._averaged is not None:
            self._averaged.load_state_dict(under("averaged", checkpoint.tensors))
        restore_optimizer(self._optimizer, under("optimizer", checkpoint.tensors))
        kept = under("surrogate", checkpoint.tensors)
        if self.student is not None and kept:
            self.student.restore(kept)
        elif self.student is not None:
            self.student.delete()  # what a kill left of one that was forgotten
        self._generator.set_state(checkpoint.tensors["generator"])
        self._targets.known = checkpoint.tensors["targets"]
        self._validator.targets.known = checkpoint.tensors["validation_targets"]

    def _require_budget(self, beforehand: int = 0) -> None:
        """Ends training while the budget holds the last validation, after `beforehand` images asked before the step."""
        ledger = self.victim.ledger
        a_step = self.config.batch * (1 + self.estimator.evaluations(self.sanitizer.border_dimension))
        needed = (beforehand + a_step + self._validation_cost) * self.victim.queries_per_image
        if ledger.remaining is not None and ledger.remaining < needed:
            raise BudgetExhausted(
                f"{ledger.total} of {ledger.max_queries} queries are spent, and a step with its validation may need "
                f"{needed}: raise --max-queries, or lower --batch, --directions, --warm-up or --validation-images"
            )

    @property
    def _validation_cost(self) -> int:
        return self._validator.cost * (2 if self._may_drop_reconstruction else 1)

    def _warm_up(self) -> None:
        """Asks and trains what the surrogate needs before the next step, continuing after a kill.

        A finished run that continues has forgotten its surrogate, and pays for another.
        """
        if self.student is None or self.student.trained:
            return
        surrogate, settings = self.student.surrogate, self.student.surrogate.settings
        self._require_budget(beforehand=settings.warm_up - min(settings.warm_up, len(surrogate.values)))
        self.sanitizer.eval()
        while len(surrogate.values) < settings.warm_up:
            size = min(_WARM_UP_CHUNK, settings.warm_up - len(surrogate.values))
            index = torch.randint(len(self.images), (size,), generator=self._generator)
            with torch.no_grad():
                images = self.sanitizer(self._noisy(self.images[index].to(self._device)))
            self._observe(images, self.victim.query(images, "surrogate"))
            self.save_checkpoint()
        divergence = surrogate.learn(settings.warm_up_steps, from_scratch=True)
        self.student.trained = True
        self.save_checkpoint()
        logger.info("the surrogate knows %d answers; divergence %.3f nats", len(surrogate.values), divergence)

    def _observe(self, images: Tensor, scores: Tensor) -> None:
        if self.student is not None:
            assert self.victim.kind is not None  # probed
            self.student.surrogate.observe(images, scores, self.victim.kind)

    def train_step(self) -> float:
        """One optimiser step; returns the mean stability loss of its batch before it."""
        index = torch.randint(len(self.images), (self.config.batch,), generator=self._generator)
        self._targets.of(index)
        index = torch.cat([index, self._targets.sample_known(self.config.extra, self._generator)])
        clean = self.images[index].to(self._device)
        targets = self._targets.of(index)
        self.sanitizer.train()
        own = self.team.share(len(clean))
        own_points = self.sanitizer.encode(self._noisy(clean)[own])
        points = self.team.gather(own_points.detach())
        surrogate = None if self.student is None else self.student.surrogate
        loss = loss_behind_border(targets, self.sanitizer, self.victim, surrogate)
        estimate = self.estimator(points, loss, self._generator)
        objective = inject_gradient(own_points, estimate.gradient[own])
        if self.config.mse_weight:
            error = denoising_loss(self.sanitizer.decode(own_points), clean[own]).mean()
            objective = objective + self.config.mse_weight * error
        self._optimizer.zero_grad()
        (objective * (len(own_points) / len(clean))).backward()
        self.team.sum_gradients(self._parameters)
        self.team.same_statistics(self.sanitizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip)
        if not torch.isfinite(norm):
            raise DefenseError(
                f"the gradient of step {self.step + 1} is not finite, and was not applied: "
                "lower --learning-rate or --mse-weight, or raise --mu"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step, self.victim.ledger)
        self._optimizer.step()
        if self._averaged is not None:
            self._averaged.update_parameters(self.sanitizer)
        if surrogate is not None:
            surrogate.learn(surrogate.settings.steps)
        self.step += 1
        return estimate.loss.nanmean().item()

    def _noisy(self, clean: Tensor) -> Tensor:
        return with_noise(clean, self.config.sigma, self._generator, self.config.less_noise)

    def _validate(self) -> None:
        served = self.sanitizer if self._averaged is None else cast(Sanitizer, self._averaged.module)
        candidates = [served]
        if self._may_drop_reconstruction:
            candidates.append(served.denoiser_alone().to(self._device))
        for candidate in candidates:
            found = self._validator.measure(candidate, self.step)
            self.history.append(found)
            if found.better_than(self.best):
                self.best = found
                self._best_state = state_copy(served)
