"""Settings of the gateway."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from defense.segmentation_smoothing import TAU
from services.gateway.compilers import RuntimeName
from services.protocol.client import WireName
from services.server import ServiceSettings

Detection = Literal["off", "report", "slow", "refuse"]
"""What is done about many near-identical images of one client: see `services.gateway.detection`."""

Mode = Literal["sanitize", "smooth", "certify"]
"""How an answer is found: see `services.gateway.modes`."""


class GatewaySettings(ServiceSettings):
    """Serves a learned sanitizer in front of a victim: same requests, same answers.

    Flags may also be given as environment variables: GATEWAY_ARTIFACT, GATEWAY_PORT and so on.
    """

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", cli_prog_name="python -m services.gateway")

    artifact: Path = Field(
        description="directory of the sanitizer, as training.zo_fit wrote it, or one of numbered versions: 1/, 2/, ..."
    )
    artifact_version: str | None = Field(
        None, pattern=r"^[1-9][0-9]{0,8}$", description="the version to begin with; by default the newest"
    )
    victim_url: Annotated[tuple[str, ...], NoDecode] = Field(
        min_length=1,
        description="the victim's URL, or that of a model of an Open Inference Protocol server (.../v2/models/NAME); "
        "repeat it (or separate by commas) for replicas; dns+http://... takes every address of the name as one",
    )
    victim_mapping: Path | None = Field(
        None, description="file that says what the URL does not: headers, labels, or how an image is sent"
    )
    wire: WireName = Field(
        "tensor", description="how images travel to the victim: float32 tensors, or one 8-bit PNG a request"
    )
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    model_name: str = Field("defended", min_length=1, description="name of the model under /v2/models")
    timeout_s: float = Field(60.0, gt=0, description="seconds to wait for the victim before answering 504")
    forward_batch: int = Field(256, ge=1, description="most images in one request to the victim")
    runtime: RuntimeName = Field(
        "auto",
        description="what computes the sanitizer: auto (of those installed the fastest that agrees with torch), torch, "
        "onnxruntime or openvino (pip install 'zo-gateway[runtimes]')",
    )
    in_flight: int = Field(16, ge=1, description="most requests to the victim at once")

    modes: Annotated[tuple[Mode, ...], NoDecode] = Field(
        ("sanitize",),
        min_length=1,
        description="what requests may choose by ?mode=, separated by commas: sanitize, smooth, certify; "
        "the first is for those that choose none",
    )
    sigma: float | None = Field(
        None, gt=0, description="standard deviation of the noise in smooth and certify; by default the artifact's"
    )
    smooth_n: int = Field(100, ge=1, description="noisy copies of an image in smooth, the most that ?n= may ask for")
    certify_n0: int = Field(100, ge=1, description="noisy copies of an image that choose the class in certify")
    certify_n: int = Field(
        1000, ge=1, description="further copies that certify the class, the most that ?n= may ask for"
    )
    alpha: float = Field(0.001, gt=0, lt=1, description="probability that an answer of smooth or certify is wrong")
    tau: float = Field(
        TAU, ge=0.5, lt=1, description="least probability under noise of a pixel's class in a certified mask"
    )
    chunk: int = Field(256, ge=1, description="most noisy copies of one request in work at once")
    max_copies: int = Field(
        65536, ge=1, description="noisy copies still to be answered beyond which smooth and certify are answered 429"
    )

    budget: int | None = Field(
        None, ge=1, description="victim queries that each client key may cause before it is answered 429"
    )
    budget_window_s: float | None = Field(
        None, gt=0, description="seconds after which a budget is full again; by default it never is"
    )
    usage: bool = Field(
        False,
        description="serve GET /queries, what every client has spent, for the operator: to who sends the admin token, "
        "where there is one",
    )
    shadow: bool = Field(
        False, description="ask the victim about the raw images too, and count how often its answer differs"
    )
    shadow_dice: float = Field(0.8, ge=0, le=1, description="Dice of two masks below which they count as different")

    detection: Detection = Field(
        "report",
        description="attacks by queries send many near-identical images: count and log them (report), "
        "also delay (slow) or refuse what follows, or do not look (off)",
    )
    detection_near: int = Field(
        25, ge=2, description="different images near one another, of one key, from which on they look like an attack"
    )
    detection_radius: float = Field(
        0.04, gt=0, lt=1, description="how near: root mean square difference of 16 x 16 thumbnails in [0,1]"
    )
    detection_window_s: float = Field(3600.0, gt=0, description="seconds after which near images are counted anew")
    detection_delay_s: float = Field(1.0, ge=0, le=60, description="how long slow lets a request wait, in seconds")

    page: bool = Field(True, description="serve a page for people at /: what the gateway does to an image and answers")
    page_samples: Path | None = Field(
        None, description="folder of images to pick from on the page; NAME.attacked.png are shown as attacks"
    )
    page_compare: bool = Field(
        False, description="let the page ask the model about the raw image too, one query more, to show the difference"
    )

    self_test: Path | None = Field(
        None, description="folder of images that a new version is tried on before it answers, beside built-in ones"
    )
    self_test_agreement: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of them that the model has to answer as it does without the sanitizer (masks: shadow_dice)",
    )
    admin_token: SecretStr | None = Field(
        None,
        min_length=16,
        description="serve /v2/repository (list, load, roll back) to who sends it as a bearer token; best given as "
        "the environment variable, which no list of processes shows",
    )

    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="serve metrics for Prometheus at this port of the same host; by default nowhere",
    )

    @field_validator("victim_url", "modes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Splits flags and variables, which are single strings."""
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
