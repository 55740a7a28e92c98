"""What a request may ask for beside its images, and its possible answers, for the code and the OpenAPI document."""

from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import Depends, Query, Request

from services.admission import Admission
from services.gateway.config import Mode
from services.gateway.responses import EVIDENCE_HEADER
from services.keys import KeySent
from services.protocol.errors import Overloaded
from services.protocol.openapi import error_responses
from services.protocol.requests import discard_body
from services.protocol.responses import RESPONSES

_WORDS: Final = {
    400: "what was sent is malformed, does not fit the model, or asks for a mode or an n that is not offered",
    401: "the API key, or the admin token where that is asked for, is missing or another one",
    404: "no such model or version",
    409: "another version is being loaded, or the version did not pass its self-test",
    413: "the body, or the image in it, is too large",
    415: "a media type or content encoding that is not spoken here",
    429: "too much work is waiting, the key's budget of victim queries does not hold the request, or the key has sent "
    "many near-identical images",
    500: "an error inside the gateway; nothing of the image was forwarded unsanitized",
    501: "a part of the Open Inference Protocol that is not implemented",
    502: "the model behind the gateway cannot be reached, or gave no valid answer",
    503: "the model behind the gateway is not available",
    504: "the model behind the gateway did not answer in time, or the time that the request has is over",
}
_OPERATORS: Final = (409,)  # what only an operator may be answered


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What these statuses mean, for the OpenAPI document."""
    return error_responses({status: _WORDS[status] for status in statuses})


PREDICT_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        **RESPONSES[200],
        "description": (
            f"{RESPONSES[200]['description']} The JSON to an image has `evidence` (the mode, the victim queries "
            "spent and, with `smooth` and `certify`, sigma, n, alpha, the votes and the radius) and `artifact` too; "
            "the same are parameters of a tensor answer. Under `smooth` and `certify` `probabilities` are shares of "
            "votes, `label` is null where the gateway abstains, and a mask is grey there and comes with `abstention`, "
            "the abstaining pixels alone; tensors come with the outputs `label` (-1: abstained) and, certified, "
            "`radius` and `radius_linf`."
        ),
        "headers": {
            "X-Artifact-Id": {"description": "the sanitizer that was used", "schema": {"type": "string"}},
            EVIDENCE_HEADER: {"description": "the numbers of the evidence, in JSON", "schema": {"type": "string"}},
        },
    },
    **errors(*(status for status in _WORDS if status not in _OPERATORS)),
}
"""Everything that a question may be answered."""


ModeSent = Annotated[
    Mode | None, Query(description="how the answer is found, among what is configured; without it, the first mode")
]
"""A mode in the query."""


@dataclass(frozen=True)
class Options:
    """What a request asks for beside its images.

    Attributes:
        mode: None: the first mode offered.
        n: noisy copies; None: as many as are configured.
        dry_run: whether only to quote the cost.
        key: the client's key, if any.
    """

    mode: Mode | None
    n: int | None
    dry_run: bool
    key: str | None


async def options(
    mode: ModeSent = None,
    n: Annotated[
        int | None, Query(ge=1, description="noisy copies in smooth and certify, up to what is configured")
    ] = None,
    dry_run: Annotated[
        bool, Query(description="say what the answer would cost in victim queries, and spend none")
    ] = False,
    *,
    key: KeySent,
) -> Options:
    """Reads it from the query and the headers."""
    return Options(mode, n, dry_run, key)


OptionsSent = Annotated[Options, Depends(options)]
"""An argument that is read so."""


async def require_room(request: Request, queue: Admission, images: int) -> None:
    """Raises Overloaded if the queue has no room for the images, once the body has come and before it is read."""
    try:
        queue.check(images)
    except Overloaded:
        await discard_body(request)
        raise
