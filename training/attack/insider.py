"""The attacker who has everything: the artifact, the victim's weights, and what the noise is."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from defense.adaptive import Defended, Smoothed
from defense.attacks import craft, minimum_norms
from defense.auto_pgd import auto_pgd
from training.measure.endpoints import CHUNK
from training.measure.scoring import main_score


class Insider:
    """White-box attacks in this process on the victim, behind the sanitizer if there is one.

    Args:
        victim: Returns logits.
        sanitizer: In front of it; None: the bare victim.
        images: (N,C,H,W) float32 in [0,1], on the device of both.
        labels: (N,) true classes or (N,H,W) true masks, there too.
        sigma: Of the noise, if copies vote.
        votes: How many copies vote; 0: one pass without noise.
        eot: Copies over which a gradient is averaged.
        steps: Of PGD.
        seed: Of random starts and noise.
    """

    def __init__(
        self,
        victim: nn.Module,
        sanitizer: nn.Module | None,
        images: Tensor,
        labels: Tensor,
        *,
        sigma: float,
        votes: int,
        eot: int,
        steps: int,
        seed: int,
    ) -> None:
        self._images, self._labels = images, labels
        self._sigma, self._votes, self._steps, self._seed = sigma, votes, steps, seed
        self._batch = 16 if votes else 128  # every noisy copy takes memory
        self._pipeline = Defended(sanitizer or nn.Identity(), victim).eval()

        def averaged(model: nn.Module) -> nn.Module:
            return (Smoothed(model, sigma, eot) if votes else model).eval()

        self._models: Mapping[str, nn.Module] = {"exact": averaged(self._pipeline)}
        if sanitizer is not None:
            through = Defended(sanitizer, victim, identity_backward=True)
            self._models = {**self._models, "bpda": averaged(through), "transfer": victim}

    def clean(self) -> Tensor:
        """(N,) scores of the images as they are."""
        return self._scored(self._images)

    def attacked(self, norm: str, epsilon: float) -> dict[str, Tensor]:
        """(N,) scores under every attack of one size, by its name.

        `pgd` follows the exact gradient, `pgd-twice` restarts with twice the steps, `pgd-bpda` differentiates the
        sanitizer as the identity, `pgd-transfer` attacks the bare victim; `apgd` adapts its step size.
        """
        plans = {"pgd": ("exact", self._steps, self._seed), "pgd-twice": ("exact", 2 * self._steps, self._seed + 1)}
        plans |= {f"pgd-{name}": (name, self._steps, self._seed) for name in self._models if name != "exact"}
        made = {
            name: self._craft("pgd" if norm == "linf" else "pgd-l2", model, epsilon, steps, seed)
            for name, (model, steps, seed) in plans.items()
        }
        if epsilon:
            made["apgd"] = auto_pgd(
                norm,
                self._models["exact"],
                self._images,
                self._labels,
                epsilon,
                steps=self._steps,
                seed=self._seed,
                batch=self._batch,
            )
        if norm == "linf":
            made["fgsm"] = self._craft("fgsm", "exact", epsilon, 1, self._seed)
        return {name: self._scored(images) for name, images in made.items()}

    def smallest(self) -> Tensor | None:
        """The (M,) L2 norms that DDN finds on the correctly answered images.

        None if copies vote: a random answer has no smallest change.
        """
        if self._votes:
            return None
        crafted = self._craft("ddn", "exact", None, None, self._seed)
        norms = minimum_norms(self._models["exact"], self._images, crafted, self._labels).cpu()
        return norms[norms > 0]

    def _craft(self, attack: str, model: str, epsilon: float | None, steps: int | None, seed: int) -> Tensor:
        shown, batch = self._models[model], self._batch
        return craft(attack, shown, self._images, self._labels, epsilon, steps=steps, seed=seed, batch=batch)

    def _scored(self, images: Tensor) -> Tensor:
        return main_score(self._answers(images), self._labels).cpu()

    @torch.no_grad()
    def _answers(self, images: Tensor) -> Tensor:
        if not self._votes:
            return torch.cat([self._pipeline(part).argmax(1) for part in images.split(CHUNK)])
        source = torch.Generator().manual_seed(self._seed)
        counts = torch.zeros((), dtype=torch.int64, device=images.device)
        for _ in range(self._votes):
            noisy = images + self._sigma * torch.randn(images.shape, generator=source).to(images.device)
            scores = torch.cat([self._pipeline(part) for part in noisy.split(CHUNK)])
            counts = counts + nn.functional.one_hot(scores.argmax(1), scores.shape[1])
        return counts.argmax(-1)
