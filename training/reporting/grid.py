"""The picture of an attack and of what the sanitizer makes of it: a row an image, a column a stage."""

import io
from collections.abc import Sequence
from typing import Final

import matplotlib as mpl
import torch
from torch import Tensor, nn

mpl.use("Agg")  # files only; there may be no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from defense.attacks import craft
from training.data.datasets import ImageSet
from training.measure.segmentation import dice
from training.victim.in_process import InProcessVictim

_AMPLIFIED: Final = 0.5  # what the largest change is drawn as, either side of grey
_TRUTH, _ANSWER = "#009E73", "#D55E00"  # of Okabe and Ito: told apart by people with the common colour blindnesses
_DPI: Final = 110


def draw_grid(
    victim: InProcessVictim,
    sanitizer: nn.Module,
    chosen: ImageSet,
    *,
    labels: Sequence[str],
    title: str,
    epsilon: float,
    amplify: float,
    seed: int,
) -> bytes:
    """Attacks images with PGD on the bare victim, sanitizes them, and draws all stages and answers as a PNG.

    Args:
        victim: The bare victim.
        sanitizer: On the same device.
        chosen: The images.
        labels: Names of the classes.
        title: What the images are.
        epsilon: L-inf size of the attack, in units of [0,1].
        amplify: Factor by which the sanitizer's changes are drawn larger.
        seed: Of the attack.
    """
    images = chosen.images.to(victim.device)
    attacked = craft("pgd", victim.model, images, chosen.labels.to(victim.device), epsilon, seed=seed)
    with torch.no_grad():
        sanitized = sanitizer(attacked)
        answers = [victim(shown).argmax(1).cpu() for shown in (images, attacked, sanitized)]
    perturbation, change = (attacked - images).cpu(), (sanitized - attacked).cpu()
    pictures = {
        "image": chosen.images,
        f"perturbation × {_AMPLIFIED / epsilon:.0f}": 0.5 + _AMPLIFIED / epsilon * perturbation,
        f"attacked, {255 * epsilon:g}/255": attacked.cpu(),
        "sanitized": sanitized.cpu(),
        f"changed by it × {amplify:g}": 0.5 + amplify * change,
    }
    heads = ("answer, clean", "answer, attacked", "answer, sanitized")
    count = len(chosen)
    columns = len(pictures) + len(heads)
    size = (1.75 * columns, 1.95 * count + 0.6)
    figure, panels = plt.subplots(count, columns, figsize=size, squeeze=False, layout="constrained")
    for row in range(count):
        for axes, batch in zip(panels[row], pictures.values(), strict=False):
            _show(axes, batch[row])
        for axes, answer in zip(panels[row][len(pictures) :], answers, strict=True):
            _show(axes, chosen.images[row], faded=True)
            _answer(axes, answer[row], chosen.labels[row], labels)
    for axes, head in zip(panels[0], (*pictures, *heads), strict=True):
        axes.set_title(head, fontsize=8)
    outlines = "; the truth is outlined solid and green, the answer dashed and red" if chosen.labels.ndim > 1 else ""
    figure.suptitle(f"{title}: PGD on the bare victim{outlines}", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    plt.close(figure)
    return picture.getvalue()


def _show(axes: Axes, image: Tensor, *, faded: bool = False) -> None:
    pixels = image.clamp(0, 1).movedim(0, 2).numpy()
    if faded:
        pixels = 0.5 + 0.5 * pixels
    grey = pixels.shape[2] == 1
    axes.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _answer(axes: Axes, answer: Tensor, truth: Tensor, labels: Sequence[str]) -> None:
    """Writes the class under a picture, or draws the outlines of both masks into it."""
    if truth.ndim == 0:
        right = answer == truth
        axes.set_xlabel(labels[int(answer)], fontsize=8, color=_TRUTH if right else _ANSWER)
        return
    for mask, colour, style in ((truth, _TRUTH, "solid"), (answer, _ANSWER, "dashed")):
        inside = (mask > 0).float()
        if 0 < inside.mean() < 1:
            axes.contour(inside.numpy(), levels=[0.5], colors=colour, linestyles=style, linewidths=1.3)
    axes.set_xlabel(f"Dice {dice(answer[None], truth[None]).item():.2f}", fontsize=8)
