"""Answers with evidence, in the form in which the request asked.

The evidence of an answer to an image is the JSON member `evidence`; to tensors, parameters of the response prefixed
`evidence_`. The header X-Evidence has it too, in JSON, as beside a PNG there is no other place.

To tensors, `smooth` answers with `probabilities`, the shares of the votes, (N,K) or (N,K,H,W), and `label`, INT64 (N)
or (N,H,W), -1 where it abstains; `certify` adds `radius` and `radius_linf`, FP32 (N).
"""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import anyio.to_thread
import numpy as np
import numpy.typing as npt
from fastapi.responses import JSONResponse, Response

from defense.smoothing import ABSTAIN, linf_equivalent
from services.gateway.config import Mode
from services.gateway.modes import Plan
from services.gateway.verdicts import Verdict
from services.protocol import oip
from services.protocol.masks import encode_mask, nearest
from services.protocol.requests import PredictRequest
from services.protocol.responses import Signature, mask_response, tensor_response
from services.upstream import Array

EVIDENCE_HEADER: Final = "X-Evidence"

_Shape = tuple[int, ...]
_Output = tuple[str, Callable[[_Shape], _Shape]]
_SCORES: Final[dict[str, _Output]] = {oip.OUTPUT: ("FP32", lambda scores: scores)}
_LABELS: Final[dict[str, _Output]] = {"label": ("INT64", lambda scores: scores[1:])}
_RADII: Final[dict[str, _Output]] = {name: ("FP32", lambda _scores: ()) for name in ("radius", "radius_linf")}
OUTPUTS: Final[dict[Mode, dict[str, _Output]]] = {
    "sanitize": _SCORES,
    "smooth": {**_SCORES, **_LABELS},
    "certify": {**_SCORES, **_LABELS, **_RADII},
}
"""The output tensors of each mode: the datatype, and the shape for one image by that of its scores, (K) or (K,H,W)."""


@dataclass(frozen=True)
class Evidence:
    """What an answer says of itself: the plan, and the victim queries that the request was charged."""

    plan: Plan
    queries: int

    def on(self, signature: Signature, *, masks: bool = False, **more: Any) -> Signature:
        """The signature with this evidence, and `more` of it, in all forms; lists are in JSON only."""
        told = {**self.plan.terms(masks=masks), **more, "queries": self.queries}
        numbers = {name: value for name, value in told.items() if not isinstance(value, list)}
        return replace(
            signature,
            extra={"evidence": told, **signature.extra},
            parameters={**signature.parameters, **{f"evidence_{name}": value for name, value in numbers.items()}},
            headers={**signature.headers, EVIDENCE_HEADER: json.dumps(numbers)},
        )


async def verdict_response(
    request: PredictRequest, verdict: Verdict, evidence: Evidence, signature: Signature
) -> Response:
    """The answer of the modes `smooth` and `certify`."""
    masks = verdict.labels.ndim == 3
    if request.form == "tensor":
        return tensor_response(request, _tensors(request, verdict), evidence.on(signature, masks=masks))
    certified: dict[str, Any] = {}
    if verdict.radius is not None:
        radius = float(verdict.radius[0])
        certified = {"radius": radius, "radius_linf": linf_equivalent(radius, request.images.shape[1:])}
    if masks:
        return await anyio.to_thread.run_sync(_of_mask, request, verdict, evidence, signature, certified)
    label = int(verdict.labels[0])
    votes = [one[0].tolist() for one in verdict.votes]
    told = {
        "label": None if label == ABSTAIN else signature.labels[label],
        "labels": list(signature.labels),
        "probabilities": verdict.shares[0].tolist(),
    }
    signed = evidence.on(
        signature,
        abstained=label == ABSTAIN,
        **certified,
        **({"votes_n0": votes[0]} if len(votes) > 1 else {}),
        votes=votes[-1],
    )
    return JSONResponse({**told, **signed.extra}, headers=dict(signed.headers))


def quote_response(
    request: PredictRequest, evidence: Evidence, budget: Mapping[str, Any] | None, signature: Signature
) -> Response:
    """What the request would cost, in place of an answer; `budget` is what the client may spend, None any number."""
    signed = evidence.on(signature)
    if request.form == "image":
        told = {"dry_run": True, "images": len(request.images), "budget": budget}
        return JSONResponse({**told, **signed.extra}, headers=dict(signed.headers))
    told = {"dry_run": True, "images": len(request.images)}
    if budget is not None:
        told["budget_left"] = budget["left"]
    # An answer of the protocol that has no outputs.
    return tensor_response(replace(request, outputs={}), {}, replace(signed, parameters={**signed.parameters, **told}))


def _tensors(request: PredictRequest, verdict: Verdict) -> dict[str, npt.NDArray[Any]]:
    tensors: dict[str, npt.NDArray[Any]] = {oip.OUTPUT: verdict.shares, "label": verdict.labels}
    if verdict.radius is not None:
        shape = request.images.shape[1:]
        tensors["radius"] = _rounded_down(verdict.radius)
        tensors["radius_linf"] = _rounded_down(np.array([linf_equivalent(one, shape) for one in verdict.radius]))
    return tensors


def _rounded_down(values: npt.NDArray[np.float64]) -> Array:
    """The largest float32 values not above the given ones, so that rounding never inflates a claim."""
    near = values.astype(np.float32)
    below: Array = np.where(near > values, np.nextafter(near, np.float32(-np.inf)), near)
    return below


def _of_mask(
    request: PredictRequest, verdict: Verdict, evidence: Evidence, signature: Signature, certified: Mapping[str, Any]
) -> Response:
    """A mask at the image's size, with abstentions in a grey of no class, and a second mask of only the abstentions."""
    assert request.size is not None  # it came as an image
    labels = verdict.labels[0]
    classes = nearest(labels.clip(0).astype(np.uint8), request.size)
    abstains = nearest(labels == ABSTAIN, request.size)
    png = encode_mask(classes, verdict.shares.shape[1], abstains=abstains)
    share = np.count_nonzero(abstains) / abstains.size
    signed = evidence.on(signature, masks=True, abstained_fraction=share, **certified)
    abstention = base64.b64encode(encode_mask(abstains.astype(np.uint8), 2)).decode()
    lesion_fraction = np.count_nonzero(classes) / classes.size  # an abstention is no lesion, but neither is it tissue
    return mask_response(
        request, png, lesion_fraction, replace(signed, extra={"abstention": abstention, **signed.extra})
    )
