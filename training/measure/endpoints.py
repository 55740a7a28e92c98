"""What is measured: clients of a service, what stands before it in this process, and what it says it is."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from services.protocol.client import Endpoint, HTTPVictim
from training.command.errors import UserError

PATIENCE_S = 60.0
"""How long a measurement waits for a service that has gone away, in seconds."""

CHUNK = 128
"""Images that a model in this process takes at once: the activations of more leave the cache."""


class Defended:
    """An endpoint whose images (N,C,H,W) pass through `front` first, in this process, as in a gateway."""

    def __init__(self, front: Callable[[Tensor], Tensor], victim: Endpoint, device: torch.device) -> None:
        self._front, self._victim, self._device = front, victim, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N,C,H,W) float32 -> (N,K) or (N,K,H,W) float32 probabilities, on the device of the images."""
        passed = [self._front(part.to(self._device, memory_format=torch.channels_last)) for part in images.split(CHUNK)]
        return self._victim(torch.cat(passed)).to(images.device)


Connect = Callable[[str], AbstractContextManager[Endpoint]]
"""Makes the client of a URL."""


@dataclass(frozen=True)
class Identity:
    """What an endpoint says it is; a bare victim has no `artifact` id and cost no `queries` to learn."""

    artifact: str | None
    queries: int
    name: str | None = None


def connect(url: str) -> AbstractContextManager[Endpoint]:
    """A client of the service at `url`; it waits out short absences."""
    return HTTPVictim([url], patience_s=PATIENCE_S)


def identify(endpoint: Endpoint, url: str, image: Tensor, labels: Sequence[str]) -> Identity:
    """Asks the service at `url` what it is, with one image (C,H,W) in [0,1] and the data's class names.

    Raises UserError if nothing is ready there, its classes are not the data's, or its answer has an unknown form.
    """
    if not endpoint.ready():
        raise UserError(f"nothing is ready at {url}: start the service, or name the right URL")
    answer = endpoint.describe(image)
    if answer.get("labels") != list(labels):
        raise UserError(
            f"{url} knows the classes {answer.get('labels')}, the data has {list(labels)}: use matching ones "
            "(a --victim-mapping with `labels` names those of a victim that does not)"
        )
    match answer.get("artifact"):
        case None:
            return Identity(artifact=None, queries=0)
        case {"id": str(artifact), "queries_spent": int(queries), "name": str(name)}:
            return Identity(artifact, queries, name)
        case {"id": str(artifact), "queries_spent": int(queries)}:
            return Identity(artifact, queries)
        case unknown:
            raise UserError(f"{url} describes its artifact in an unknown form: {unknown}")
