"""The configuration of `training.compare`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from defense.preprocessors import PREPROCESSORS
from services.settings import Commas, Repeated
from training.certificates.config import COMPARED_N, COMPARED_RADII, CertificateConfig
from training.command.config import DeviceConfig
from training.comparison.methods import METHODS, known_method
from training.comparison.runs import Run, plan
from training.data.config import DataConfig
from training.fit.config import RunConfig
from training.fit.pretraining import SANITIZERS
from training.victim.config import VotesConfig, WireConfig

_UNBOUNDED = 10**9  # queries: a white box has no budget
MethodName = Annotated[str, AfterValidator(known_method)]


class CompareConfig(VotesConfig, WireConfig, CertificateConfig, DataConfig, DeviceConfig):
    """Compares defenses at equal numbers of victim queries, and prints and plots what they certify."""

    class_n: ClassVar[int] = COMPARED_N
    class_radii: ClassVar[tuple[float, ...]] = COMPARED_RADII

    victim_url: Repeated[str] = Field((), description="the black box, as zo_fit has it; repeat it for replicas")
    victim: Path | None = Field(
        None, description="the victim's folder instead: it runs in this process; white-box methods need it"
    )
    pretrained: Path | None = Field(None, description="what training.pretrain wrote")
    methods: Commas[MethodName] = Field(
        (), description=f"comma-separated, of {', '.join(METHODS)} (all that the victim permits)"
    )
    budgets: Commas[PositiveInt] = Field((40_000,), description="comma-separated victim queries a run")
    seeds: Commas[int] = Field((0,), description="comma-separated seeds of the training")
    fo_steps: PositiveInt = Field(800, description="steps of the white-box methods")
    reference: MethodName = Field("mse", description="what the others are compared with")
    split: Literal["test", "validation"] = Field("test", description="images to measure on")
    limit: PositiveInt = Field(300, description="at most so many of them, stratified")
    stop_early: bool = Field(True, description="spend the n samples also where the n0 samples show no hope")
    out: Path = Field(Path("artifacts/compare"), description="everything goes below it")
    dry_run: bool = Field(False, description="print the runs and how far they are; do nothing")
    summary: bool = Field(False, description="only make the summary of what is finished in OUT")

    @property
    def runs(self) -> list[Run]:
        """What is compared."""
        names = self.methods or [name for name in METHODS if self.victim or not METHODS[name].white_box]
        return plan(names, sorted(self.budgets), self.seeds, self.fo_steps)

    @model_validator(mode="after")
    def _refuse_impossible(self) -> Self:
        """Raises ValueError for what would otherwise fail only after hours."""
        if self.summary:
            return self
        if (self.victim is None) == (not self.victim_url):
            raise ValueError("name the victim: either --victim-url URL, or --victim DIR")
        methods = {run.method: METHODS[run.method] for run in self.runs}
        white = sorted(name for name, method in methods.items() if method.white_box)
        if white and not self.victim:
            raise ValueError(f"{', '.join(white)} needs the victim's gradient, which no URL gives: use --victim DIR")
        parts = {method.part for method in methods.values()} - {"", *PREPROCESSORS}
        if any(method.kind == "learned" for method in methods.values()):
            parts |= set(SANITIZERS)
        if parts and self.pretrained is None:
            raise ValueError(
                "these methods start from pre-trained parts: make some with training.pretrain, and name them "
                "with --pretrained"
            )
        for run in self.runs:
            if METHODS[run.method].kind == "learned":
                self.learning(run)
        return self

    def learning(self, run: Run, *, resume: bool = False) -> RunConfig:
        """The `zo_fit` of a learned run; ValidationError if the method's settings do not fit the others."""
        shared = self.model_dump(
            include={
                *DataConfig.model_fields,
                *DeviceConfig.model_fields,
                *WireConfig.model_fields,
                *VotesConfig.model_fields,
                "sigma",
                "pretrained",
            }
        )
        bound = {"max_queries": _UNBOUNDED, "steps": run.steps} if run.steps else {"max_queries": run.budget}
        fixed = {
            **shared,
            **bound,
            "victim_url": self.victim_url or (f"in-process:{self.victim}",),
            "seed": run.seed,
            "out": self.out / run.place,
            "resume": resume,
        }
        return RunConfig(**{**METHODS[run.method].settings, **fixed})
