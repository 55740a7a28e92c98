"""Several processes at one run, as `torchrun` starts them.

All hold the same state and take the same decisions in step; they share the work on a batch: encoding,
back-propagation (data parallelism) and sending images to the victim. The result is that of one process up to rounding,
and every process's ledger is that of the run.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from services.device import resolve_device
from services.protocol.client import Endpoint, HTTPVictim
from services.protocol.errors import ServiceError, Unavailable
from training.command.errors import UserError

_PATIENCE: Final = timedelta(hours=2)
"""How long processes wait for one another: pre-training is done by the first alone."""

T = TypeVar("T")


class TeamBroken(UserError):  # noqa: N818 - says what happened
    """Another process of the run is gone, or failed."""


class Team:
    """The processes of a run: the rank of this one from 0, their number, and their group (None for one process)."""

    def __init__(self, rank: int = 0, size: int = 1, objects: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._objects = objects

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device that a setting names; of several GPUs "auto" gives every process on a machine its own."""
        if name == "auto" and self.size > 1 and torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return resolve_device(name)

    def share(self, count: int) -> slice:
        """Which of `count` rows are this process's."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def all(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks; TeamBroken if another process is gone."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _told():
            dist.all_gather_object(values, value, group=self._objects)
        return values

    def told(self, say: Callable[[], T]) -> T:
        """What `say` returns in the first process, in all of them.

        Raises what `say` raised in the first process, and TeamBroken in the others if it failed or is gone.
        """
        found, failed = None, None
        if self.is_first:
            try:
                found = say()
            except Exception as error:
                failed = error
        first = self.all((found, failed is not None))[0]
        if failed is not None:
            raise failed
        if first[1]:
            raise TeamBroken("the first process of this run failed; its message says why")
        value: T = first[0]  # type: ignore[assignment]
        return value

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all processes' shares, on this one's device; (n, ...) here, (N, ...) together."""
        if self.size == 1:
            return own
        return torch.cat(self.all(own.cpu())).to(own.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the gradients of all processes, in each of them."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _told():
            dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def same_statistics(self, module: nn.Module) -> None:
        """Gives all processes the running statistics of the first one's batches, as PyTorch's own wrapper does."""
        if self.size == 1:
            return
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                with _told():
                    for buffer in layer.buffers():
                        dist.broadcast(buffer, 0)


ALONE: Final = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """The team that `torchrun` started this process in, by NCCL with CUDA, else Gloo; `ALONE` without it.

    Processes other than the first log warnings only.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _told():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
        objects = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(objects, dist.ProcessGroup)  # this process belongs to it
    team = Team(dist.get_rank(), size, objects)
    if not team.is_first:
        logging.getLogger().setLevel(logging.WARNING)
    try:
        yield team
    finally:
        dist.destroy_process_group()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TeamBroken(
            "another process of this run is gone: start all of them again, with --resume for what can be continued"
        ) from error


@contextmanager
def shared(victim: Endpoint, team: Team, on_resend: Callable[[int], None]) -> Iterator[Endpoint]:
    """The victim, or in a team the `SharedEndpoint` around it.

    `on_resend` is called with the number of images about to be sent again over HTTP; in a team after they were
    answered, in every process, with the sum over all.
    """
    asked, told = victim, on_resend
    if team.size > 1:
        asked = SharedEndpoint(team, on_resend)
        asked.inner, told = victim, asked.resend
    if not isinstance(victim, HTTPVictim):
        yield asked
        return
    before, victim.on_resend = victim.on_resend, told
    try:
        yield asked
    finally:
        victim.on_resend = before


class SharedEndpoint:
    """An endpoint of which every process of a team asks its share of the images; all get all answers.

    Calls are collective: every process must make them, with the same images. Single requests are made by the first
    process. `inner` is this process's own client, to be set before the first call.
    """

    inner: Endpoint

    def __init__(self, team: Team, on_resend: Callable[[int], None]) -> None:
        self._team, self._on_resend = team, on_resend
        self._resent = 0

    def resend(self, images: int) -> None:
        """To be called by this process's client when it sends images again."""
        self._resent += images

    def __call__(self, images: Tensor) -> Tensor:
        """(N,C,H,W) float32 -> (N,K) or (N,K,H,W) float32 scores.

        Raises:
            ServiceError: The victim failed for this process; `Unavailable` if it failed for another one.
            TeamBroken: Another process is gone.
        """
        self._team.all(None)  # nobody sends before the first process has written down that it will be sent
        own, failed = images[self._team.share(len(images))], None
        scores: Tensor | None = None
        try:
            scores = self.inner(own).cpu() if len(own) else None
        except ServiceError as error:
            failed = error
        resent, self._resent = self._resent, 0
        told = self._team.all((scores, resent, None if failed is None else str(failed)))
        if again := sum(resent for _, resent, _ in told):
            self._on_resend(again)
        if failed is not None:
            raise failed
        for rank, (_, _, message) in enumerate(told):
            if message is not None:
                raise Unavailable(f"process {rank} of this run was not answered: {message}")
        return torch.cat([part for part, _, _ in told if part is not None])

    def describe(self, image: Tensor) -> dict[str, object]:
        """What the victim says of one image (C,H,W)."""
        return self._team.told(lambda: self.inner.describe(image))

    def ready(self) -> bool:
        """Whether the victim says that it is ready."""
        return self._team.told(self.inner.ready)
