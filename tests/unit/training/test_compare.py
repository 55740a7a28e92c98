import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from zo_fakes import LABELS, SIZE, pretrain_into

from services.protocol.errors import UpstreamUnreachable
from training import compare
from training.comparison import bench, config, methods, plots, runs
from training.comparison.claims import locked
from training.comparison.methods import Method
from training.data.datasets import ImageSet, Splits
from training.measure.results import read_rows

URL = ["--victim-url", "http://victim"]
QUICK = {"batch": 8, "validation_images": 4, "validate_every": 50}
TABLE = {
    "none": Method("bare"),
    "noise": Method("bare"),
    "blur": Method("preprocessor", "blur"),
    "ae": Method("autoencoder", "denoiser+autoencoder"),
    "mse": Method("pretrained", "denoiser"),
    "zo-ds": Method("learned", settings={"sanitizer": "denoiser", "directions": 4, **QUICK}),
    "zo-ae-ds": Method("learned", settings={"sanitizer": "denoiser+autoencoder", "directions": 4, **QUICK}),
    "fo-ds": Method("learned", settings={"sanitizer": "denoiser", "estimator": "exact", **QUICK}),
}


def image_set(count: int, seed: int) -> ImageSet:
    """Images that are brighter on one side, which is their label, with a texture."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 + 0.1 * torch.rand(count, 1, SIZE, SIZE, generator=generator)
    labels = torch.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        image[..., label * SIZE // 2 : (label + 1) * SIZE // 2] += 0.15 * torch.rand((), generator=generator)
    return ImageSet(images, labels, tuple(map(str, range(count))))


SPLITS = Splits("halves", tuple(LABELS), image_set(60, 0), image_set(20, 1), image_set(20, 2), "f" * 64)


class Victim:
    """Compares the two sides, counts what it receives, and can fail after so many images."""

    def __init__(self) -> None:
        self.received = 0
        self.fails_after: int | None = None
        self.slope = 30.0
        self.artifact: object = None
        self.up = True
        self.options: list[dict[str, object]] = []

    @contextmanager
    def connect(self, urls, **options):
        self.options.append(options)
        yield self

    def __call__(self, images: Tensor) -> Tensor:
        if self.fails_after is not None and self.received + len(images) > self.fails_after:
            self.up = False
            raise UpstreamUnreachable("the victim cannot be reached: gone")
        self.received += len(images)
        difference = (images[..., : SIZE // 2] - images[..., SIZE // 2 :]).mean((1, 2, 3))
        return (self.slope * torch.stack([difference, -difference], dim=1)).softmax(1)

    def describe(self, image: Tensor) -> dict[str, object]:
        self.received += 1
        answer: dict[str, object] = {"label": "left", "labels": LABELS, "probabilities": []}
        return answer if self.artifact is None else {**answer, "artifact": self.artifact}

    def ready(self) -> bool:
        return self.up


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return pretrain_into(tmp_path_factory.mktemp("pretrained"), SPLITS, steps=10)


@pytest.fixture
def victim() -> Victim:
    return Victim()


@pytest.fixture
def pictures() -> None:
    """Asked for by the tests that look at the PNGs."""


@pytest.fixture
def run(victim, pretrained, tmp_path, monkeypatch, request):
    monkeypatch.setattr(bench, "load_data", lambda *_, **__: SPLITS)
    for module in (bench, config, methods, plots, runs):
        monkeypatch.setattr(module, "METHODS", TABLE)
    monkeypatch.setattr(plots, "_DPI", 40)
    if "pictures" not in request.fixturenames:  # they take most of the time
        for name in ("plot_certified", "plot_queries"):
            monkeypatch.setattr(plots, name, lambda *_: None)
    monkeypatch.setattr(bench, "in_process", lambda *_: victim.connect([]))

    def compared(names: str, *more: str, where: list[str] = URL, out: str = "out") -> int:
        small = ["--n0", "10", "--n", "40", "--limit", "6", "--radii", "0,0.1", "--alpha", "0.01", "--device", "cpu"]
        fixed = ["--pretrained", str(pretrained), "--budgets", "600", "--methods", names, "--out", str(tmp_path / out)]
        try:
            return compare.main([*where, *small, *fixed, *more], connect=victim.connect)
        except SystemExit as refused:
            return refused.code

    return compared


def lines(path: Path) -> list[dict[str, object]]:
    """The lines of a file of certificates, without their times."""
    texts = path.read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in texts]


def test_the_summary_has_every_run_the_means_and_the_leads(run, pictures, tmp_path, capsys):
    assert run("none,noise,blur,ae,mse,zo-ds", "--seeds", "0,1") == 0
    out = tmp_path / "out"
    rows = {
        (row.defense, row.metric, row.epsilon, row.seed, row.queries): row for row in read_rows(out / "results.json")
    }
    learned = [key for key in rows if key[0] == "zo-ds" and key[1] == "certified_accuracy" and key[2] == 0.1]
    assert [key[3] for key in learned] == [0, 1]
    assert all(0 < key[4] <= 600 for key in learned)
    means = [row for row in rows.values() if row.defense == "zo-ds" and row.metric == "mean_certified_accuracy"]
    assert [row.epsilon for row in means] == [0.0, 0.1]
    at_01 = [rows[key].value for key in learned]
    assert means[1].value == pytest.approx(sum(at_01) / 2)
    assert means[1].low <= means[1].value <= means[1].high
    leads = [row for row in rows.values() if row.metric == "certified_accuracy_minus_mse" and row.defense == "zo-ds"]
    mse = rows["mse", "certified_accuracy", 0.1, 0, 0].value
    assert leads[1].value == pytest.approx(means[1].value - mse)
    assert {row.metric for row in rows.values() if row.defense == "none"} == {
        "accuracy",
        "mean_accuracy",
        "accuracy_minus_mse",
    }
    assert {row.n for row in rows.values()} == {6}

    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    head, _, *cells = [line for line in table.splitlines() if line.startswith("|")]
    names = [part.strip() for part in head.strip("|").split("|")]
    assert names[:5] == ["method", "queries", "white box", "seeds", "clean"]
    assert names[5:] == ["certified r=0", "certified r=0.1", "r=0 minus mse", "r=0.1 minus mse"]
    assert [line.split("|")[1].strip() for line in cells] == ["none", "noise", "blur", "ae", "mse", "zo-ds"]
    assert [line.split("|")[4].strip() for line in cells] == ["1", "1", "1", "1", "1", "2"]
    assert "victim over HTTP" in table
    assert "Stopped early" in table
    assert "0.1 = 1.59/255" in table
    for name in ("certified.png", "queries.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 3000


def test_given_again_it_only_looks_whether_the_victim_is_the_same(run, victim, tmp_path):
    assert run("noise,zo-ds") == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    victim.received = 0
    assert run("noise,zo-ds") == 0
    assert victim.received == 1 + 6
    assert (tmp_path / "out" / "results.json").read_bytes() == before


# While mse is certified, while zo-ds is trained, and while zo-ds is certified.
@pytest.mark.parametrize("after", [240, 500, 1650])
def test_interrupted_anywhere_it_ends_as_the_unbroken_one(run, victim, tmp_path, after, capsys):
    assert run("zo-ds,mse", "--budgets", "1200", out="unbroken") == 0
    assert victim.received > 1650
    victim.received = 0
    victim.fails_after = after
    assert run("zo-ds,mse", "--budgets", "1200") == 2
    told = capsys.readouterr().err
    assert "gone" in told
    assert ("start it, and give the same command again" in told) == (after == 500)  # it was zo_fit that failed
    victim.fails_after, victim.up = None, True
    assert run("zo-ds,mse", "--budgets", "1200") == 0
    assert lines(tmp_path / "out/certify/mse/0-0.jsonl") == lines(tmp_path / "unbroken/certify/mse/0-0.jsonl")
    assert len(lines(tmp_path / "out/certify/zo-ds/1200-0.jsonl")) == 1 + 6
    assert "Unfinished" not in (tmp_path / "out" / "table.md").read_text()


def test_a_run_that_cannot_be_learned_does_not_keep_the_others_from_it(run, tmp_path, capsys):
    assert run("zo-ds,noise,zo-ae-ds", "--budgets", "70") == 2
    captured = capsys.readouterr()
    assert "not learned, for the reasons above: zo-ds/70-0, zo-ae-ds/70-0" in captured.err
    assert "noise" in (tmp_path / "out" / "table.md").read_text()


def test_two_commands_share_one_folder(run, tmp_path):
    assert run("noise,zo-ds", "--seeds", "1") == 0
    assert run("mse,zo-ds", "--seeds", "0", "--budgets", "600,650") == 0
    table = (tmp_path / "out" / "table.md").read_text()
    found = [[cell.strip() for cell in line.split("|")[1:5]] for line in table.splitlines()[4:8]]
    assert [(cells[0], cells[3]) for cells in found] == [("noise", "1"), ("mse", "1"), ("zo-ds", "2"), ("zo-ds", "1")]
    assert not list(tmp_path.rglob("*.saving*"))


def test_a_run_that_another_process_is_at_is_left_to_it(run, tmp_path, caplog):
    caplog.set_level("INFO")
    with locked(tmp_path / "out" / "locks" / "mse-0-0.lock", wait=False) as mine:
        assert mine
        assert run("noise,mse") == 0
    assert "mse/0-0: another process is at it" in caplog.text
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| noise" in table
    assert "| mse" not in table


def test_an_unfinished_run_is_told_and_not_in_the_table(run, tmp_path):
    assert run("noise,mse") == 0
    path = tmp_path / "out/certify/mse/0-0.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert compare.main(["--summary", "--radii", "0", "--out", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Unfinished: mse/0-0: 5 of 6 images." in table
    assert "| mse" not in table


def test_white_boxes_are_refused_at_a_url(run, victim, capsys):
    assert run("noise,fo-ds") == 2
    assert "fo-ds needs the victim's gradient, which no URL gives: use --victim DIR" in capsys.readouterr().err
    assert victim.received == 0


def test_white_boxes_run_in_process_by_steps_and_are_marked(run, tmp_path):
    assert run("mse,fo-ds", "--fo-steps", "2", where=["--victim", "weights"]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| fo-ds")]
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["2 steps", "white box"]
    assert "victim in process" in table
    assert (tmp_path / "out/fo-ds/2steps-0/manifest.json").exists()


def test_the_default_is_all_that_the_victim_permits(run, capsys):
    assert compare.main([*URL, "--pretrained", "p", "--dry-run", "--out", "none"]) == 0
    names = {line.split("/")[0] for line in capsys.readouterr().out.splitlines()}
    assert names == {name for name in TABLE if name != "fo-ds"}


def test_a_dry_run_tells_how_far_the_runs_are_and_does_nothing(run, victim, tmp_path, capsys):
    assert run("none,noise,zo-ds", "--dry-run") == 0
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()] == [["to", "do"]] * 3
    assert not (tmp_path / "out").exists()
    assert run("none,noise,zo-ds") == 0
    capsys.readouterr()
    assert run("none,noise,zo-ds,mse", "--dry-run") == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in told] == ["done", "done", "do", "done"]
    assert told[3].split() == ["zo-ds/600-0", "600", "queries", "done"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n", "50"], "n was 40, is 50"),
        (["--seed", "3"], "seed was 0, is 3"),
        (["--no-stop-early"], "stop_early was True, is False"),
        (["--limit", "5"], "images was 6, is 5"),
        (["--split", "validation"], "split was test, is validation"),
    ],
)
def test_runs_of_other_settings_are_not_mixed(run, capsys, more, message):
    assert run("noise") == 0
    assert run("noise", *more) == 2
    assert message in capsys.readouterr().err


def test_more_images_continue_what_is_there(run, victim, tmp_path):
    assert run("noise,mse") == 0
    assert run("noise", "--limit", "8") == 0
    assert len(lines(tmp_path / "out/certify/noise/0-0.jsonl")) == 1 + 8
    assert "Unfinished: mse/0-0: 6 of 8 images." in (tmp_path / "out" / "table.md").read_text()


def test_certificates_of_another_artifact_are_not_taken_for_those_of_the_run(run, tmp_path, capsys):
    assert run("zo-ds") == 0
    for path in (tmp_path / "out/certify/zo-ds").iterdir():
        artifact = json.loads((tmp_path / "out/zo-ds/600-0/manifest.json").read_text())["id"]
        path.write_text(path.read_text().replace(artifact, "older"))
    assert run("zo-ds") == 2
    assert "artifact was older, is" in capsys.readouterr().err


def test_another_victim_is_refused(run, victim, capsys):
    assert run("noise") == 0
    victim.slope = -30.0
    assert run("noise") == 2
    assert "are of another victim" in capsys.readouterr().err


def test_a_gateway_is_no_victim(run, victim, capsys):
    victim.artifact = {"id": "f00d", "queries_spent": 3}
    assert run("noise") == 2
    assert "name the bare victim" in capsys.readouterr().err


def test_a_run_that_was_learned_otherwise_is_refused(run, monkeypatch, capsys):
    assert run("zo-ds") == 0
    other = replace(TABLE["zo-ds"], settings={**TABLE["zo-ds"].settings, "learning_rate": 0.01})
    for module in (bench, config, methods, plots, runs):
        monkeypatch.setattr(module, "METHODS", {**TABLE, "zo-ds": other})
    assert run("zo-ds") == 2
    assert "learning_rate was 3e-05, is 0.01" in capsys.readouterr().err


def test_settings_that_mean_nothing_are_told_before_anything_runs(run, victim, monkeypatch, capsys):
    for module in (bench, config, methods, plots, runs):
        monkeypatch.setattr(module, "METHODS", {**TABLE, "new": Method("learned", settings={"rank": 3})})
    assert run("noise,new") == 2
    assert "--rank means nothing without --subspace dct" in capsys.readouterr().err
    assert victim.received == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --victim-url URL, or --victim DIR"),
        ([*URL, "--victim", "d"], "either --victim-url URL, or --victim DIR"),
        ([*URL, "--methods", "mse"], "name them with --pretrained"),
        (["--summary"], "holds no comparison"),
    ],
)
def test_what_is_missing_is_told(run, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as refused:
        sys.exit(compare.main([*arguments, "--out", str(tmp_path)]))
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_comparison_and_training_ask_one_client_of_the_victim(run, victim, tmp_path):
    mapping = tmp_path / "victim.toml"
    mapping.write_text('labels = ["left", "right"]')
    assert run("zo-ds", "--victim-mapping", str(mapping), "--wire", "image") == 0
    (options,) = victim.options
    assert options["wire"] == "image"
    assert options["mapping"].labels == ("left", "right")


def test_an_unknown_method_is_refused_with_the_names_of_all(capsys):
    with pytest.raises(SystemExit):
        compare.main([*URL, "--methods", "nose"])
    assert "unknown: nose; there are none, noise, jpeg" in capsys.readouterr().err
