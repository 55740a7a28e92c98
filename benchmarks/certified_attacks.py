"""Certificates against attacks: does any perturbation inside a certified radius change the smoothed answer?

    python -m benchmarks.certified_attacks --data ../shared/data/brain_mri --victim artifacts/brain_mri/victim \
        --artifact artifacts/brain_mri/zo-ds

Hospital and gateway run as processes. The gateway certifies images (`mode=certify`); an attacker who has the weights of
both, and knows the noise, crafts perturbations of at most the certified radius; the gateway answers the attacked images
by vote (`mode=smooth`). A flip is an answer, not an abstention, that is another class than the certified one; of a
mask, at any of its certified pixels. A certificate is wrong with probability alpha at most, and a vote too.

The attacks follow the gradient of the smoothed model: of the mean of its probabilities over some noisy copies, which
are drawn anew at every step (EOT, Athalye et al., ICML 2018; as SmoothAdv, Salman et al., NeurIPS 2019). PGD in L2 uses
the whole radius; DDN looks for the nearest image with another answer, and is scaled back into the radius. That
the attacks are worth the name, the same at several times the radius shows.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any, Final

import httpx
import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import beta
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import cli
from benchmarks.running import add_image_arguments, add_model_arguments, defended
from defense.adaptive import Smoothed
from defense.artifact import load_artifact
from defense.attacks import craft
from defense.smoothing import ABSTAIN
from services.hospital.model import load_victim
from services.protocol import oip
from training.data.datasets import load_data
from training.measure.results import align
from training.measure.selection import chosen_images

_INSIDE: Final = 0.999  # of the radius: float32 rounds distances too
_LEAST: Final = 1e-12  # keeps the logarithm finite


@dataclass
class Tally:
    """What became of the attacked images of one attack.

    Attributes:
        flips: Images with another answer, of `tries`.
        abstained: Images without one; of masks, the mean share of the certified pixels.
        pixels: Certified pixels that were attacked, and `flipped` of them.
    """

    tries: int = 0
    flips: int = 0
    abstained: float = 0.0
    pixels: int = 0
    flipped: int = 0

    def add(self, certified: npt.NDArray[np.int64], answered: npt.NDArray[np.int64]) -> None:
        """Counts one image: its certified label, () or (H,W), and what was answered under attack."""
        held = certified != ABSTAIN
        lost = held & (answered != ABSTAIN) & (answered != certified)
        self.tries += 1
        self.flips += int(lost.any())
        self.abstained += float((held & (answered == ABSTAIN)).sum() / held.sum())
        self.pixels += int(held.sum())
        self.flipped += int(lost.sum())


def inside(images: Tensor, attacked: Tensor, radius: float) -> Tensor:
    """The attacked images (N,C,H,W), where they are farther than `radius` (L2) pulled back along the straight line."""
    change = attacked - images
    norms = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    near: Tensor = images + change * (_INSIDE * radius / norms.clamp_min(_LEAST)).clamp(max=1)
    return near


def ask(gateway: httpx.Client, image: Tensor, mode: str) -> dict[str, npt.NDArray[Any]]:
    """The outputs of the gateway's answer to one image (C,H,W) in a mode."""
    body, headers = oip.encode_request([oip.Tensor(oip.INPUT, image[None].numpy())])
    response = gateway.post("/predict", params={"mode": mode}, content=body, headers=headers).raise_for_status()
    return oip.decode_response(response.content, oip.header_length(response.headers.get(oip.HEADER)))


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cli.add_data_arguments(parser)
    add_model_arguments(parser)
    add_image_arguments(parser, 50)
    add = parser.add_argument
    add("--n", type=cli.positive_int, default=1000, help="copies that certify, and that vote (default 1000)")
    add("--copies", type=cli.positive_int, default=8, help="noisy copies a step of the attack (default 8)")
    add("--steps", type=cli.positive_int, default=40, help="steps of each attack (default 40)")
    add("--times", type=cli.positive_float, default=4.0, help="the farther radius, in certified ones (default 4)")
    return cli.run(_measure, parser, None)


def _measure(arguments: argparse.Namespace) -> int:
    splits = load_data(cli.data_config(arguments))
    _, chosen = chosen_images(splits, arguments.split, arguments.images, arguments.seed)
    artifact = load_artifact(arguments.artifact)
    model, _ = load_victim(arguments.victim)
    base = nn.Sequential(artifact.sanitizer, model).eval()
    smoothed = Smoothed(base, artifact.manifest.sigma, arguments.copies).eval()
    tallies = {(name, times): Tally() for name in ("pgd-l2", "ddn") for times in (1.0, arguments.times)}
    radii = []
    flags = ["--modes", "certify,smooth", "--certify-n", str(arguments.n), "--smooth-n", str(arguments.n)]
    with defended(arguments, flags) as urls, httpx.Client(base_url=urls.gateway, timeout=600) as client:
        for image in tqdm(chosen.images, "certified_attacks", unit="image"):
            certificate = ask(client, image, "certify")
            certified, radius = certificate["label"][0], float(certificate["radius"][0])
            if radius == 0:
                continue
            radii.append(radius)
            answer = torch.tensor(certificate["probabilities"]).argmax(dim=1)
            for (name, times), tally in tallies.items():
                epsilon = times * radius * _INSIDE if name == "pgd-l2" else None
                found = craft(name, smoothed, image[None], answer, epsilon, steps=arguments.steps, seed=arguments.seed)
                attacked = inside(image[None], found, times * radius)[0]
                tally.add(certified, ask(client, attacked, "smooth")["label"][0])
    masks = chosen.labels.ndim > 1
    print(f"{splits.name}, {arguments.split}: {len(radii)} of {len(chosen)} images certified at n = {arguments.n}")
    if not radii:
        return 0
    print(f"radius: median {np.median(radii):.3f}, largest {max(radii):.3f}")
    head = ["attack", "radii", "tries", "flips", "at most (95%)", "abstained"] + (
        ["pixels", "flipped"] if masks else []
    )
    lines = [head]
    for (name, times), tally in tallies.items():
        most = beta.ppf(0.95, tally.flips + 1, tally.tries - tally.flips) if tally.flips < tally.tries else 1.0
        cells = [
            name,
            f"{times:g}",
            str(tally.tries),
            str(tally.flips),
            f"{most:.3f}",
            f"{tally.abstained / tally.tries:.3f}",
        ]
        lines.append(cells + ([f"{tally.pixels:,}", str(tally.flipped)] if masks else []))
    print(align(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
