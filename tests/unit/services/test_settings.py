"""The command line of a model, for services and training alike."""

from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import AliasChoices, Field, PositiveInt, model_validator
from pydantic_settings import CliPositionalArg

from services.settings import Commas, Config, Repeated, Share, read


class Images(Config):
    """The images."""

    data: str = Field("phantom", description="a folder")


class Tool(Images):
    """Does one thing,
    and does it well.

    What stands here is not told.
    """

    folder: CliPositionalArg[Path] = Field(description="where")
    victim_url: Repeated[str] = Field(min_length=1, description="the victim")
    n: PositiveInt | None = Field(None, description="samples", validation_alias=AliasChoices("n", "samples"))
    radii: Commas[Annotated[float, Field(ge=0)]] = Field((0.0, 0.25), description="L2 radii")
    resume: bool = Field(False, description="go on")
    stop_early: bool = Field(True, description="spend all samples")
    sigma: float = Field(0.25, gt=0, description="noise, 68% of it below SIGMA")
    mu: Literal["auto"] | Annotated[float, Field(gt=0)] = Field("auto", description="step")
    rotated: Share = Field(0.0, description="share")
    split: Literal["test", "validation"] = Field("test", description="images")

    @model_validator(mode="after")
    def _needs_radii(self) -> Self:
        if "mu" in self.model_fields_set and not self.radii:
            raise ValueError("--mu means nothing without --radii")
        return self


def tool(*flags: str) -> Tool:
    return read(Tool, ["here", "--victim-url", "http://a", *flags], prog="tool")


def test_what_is_not_typed_has_its_default_and_is_not_set() -> None:
    made = tool()
    assert made == Tool(folder=Path("here"), victim_url=("http://a",))
    assert made.model_fields_set == {"folder", "victim_url"}


def test_flags_are_read_in_kebab_case_and_of_repeated_ones_the_last_counts() -> None:
    made = tool("--sigma", "1", "--sigma=0.5", "--mu", "0.01", "--resume", "--no-stop-early", "--split", "validation")
    assert (made.sigma, made.mu, made.resume, made.stop_early, made.split) == (0.5, 0.01, True, False, "validation")


def test_lists_are_repeated_or_typed_with_commas() -> None:
    assert tool("--victim-url", "http://b").victim_url == ("http://a", "http://b")
    assert tool("--radii", "1", "--radii", "0,0.5,0").radii == (0.0, 0.5)


def test_a_flag_has_two_names_of_two_dashes() -> None:
    assert tool("--n", "3").n == tool("--samples", "3").n == 3
    with pytest.raises(SystemExit):
        tool("-n", "3")


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "data", "SIGMA", "sigma", "SPLIT"):
        monkeypatch.setenv(name, "0.75")
    assert tool() == Tool(folder=Path("here"), victim_url=("http://a",))


def test_the_help_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(Tool, ["--help"], prog="tool")
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith("usage: tool folder --victim-url VICTIM_URL [options] ")
    for part in (
        "Does one thing, and does it well.",
        "The images: --data DATA a folder (default phantom)",
        "--n N, --samples N samples --radii",
        "--radii RADII L2 radii (default 0,0.25)",
        "--resume go on",
        "--no-stop-early spend all samples",
        "noise, 68% of it below SIGMA (default 0.25)",
        "--split {test,validation} images (default test)",
    ):
        assert part in told
    assert "What stands here" not in told


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--sigma", "0"], "--sigma: must be greater than 0"),
        (["--sigma", "nan"], "--sigma: must be a finite number"),
        (["--mu", "-1"], "--mu: must be 'auto', or must be greater than 0"),
        (["--rotated", "1"], "--rotated: must be less than 1"),
        (["--radii", "0,x"], "--radii: must be a valid number, unable to parse string as a number"),
        (["--split", "train"], "--split: must be 'test' or 'validation'"),
        (["--mu", "1", "--radii", ""], "--radii: must be a valid number, unable to parse string as a number"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_that_names_the_flag(
    flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        tool(*flags)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"tool: error: {line}\n"


@pytest.mark.parametrize("argv", [["here"], ["--victim-url", "x"], ["here", "--victim-url", "x", "--sig", "1"]])
def test_missing_unknown_and_abbreviated_flags_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(Tool, argv, prog="tool")
    assert caught.value.code == 2
