"""The report: one file that asks nobody for anything, with what was measured and what was not."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from toy_defense import publish

from training import report
from training.measure.results import Row, write_rows


def row(
    attack: str, epsilon: float | None, defense: str, value: float, metric: str = "accuracy", norm: str = "linf"
) -> Row:
    return Row(
        dataset="toy",
        task="classification",
        split="test",
        attack=attack,
        norm="none" if attack == "none" else norm,
        epsilon=epsilon,
        defense=defense,
        metric=metric,
        value=value,
        n=40,
        queries=0,
        seed=0,
        low=value - 0.05,
        high=value + 0.05,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    publish(tmp_path / "toy" / "ours")
    history = [{"step": step, "queries": 100 * step, "agreement": 0.5 + step / 10, "loss": 1.0} for step in range(3)]
    (tmp_path / "toy" / "ours" / "history.json").write_text(json.dumps(history))
    return tmp_path / "toy"


def written(folder: Path, *more: str) -> str:
    assert report.main([str(folder), "--results", str(folder / "results.json"), *more]) == 0
    return (folder / "report.html").read_text()


class Outline(HTMLParser):
    """Checks that every tag is closed, and notes where the file points."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.points: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)
        self.points += [value or "" for name, value in attributes if name in {"src", "href"}]
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_that_was_measured_is_in_one_file_that_asks_for_nothing(folder: Path) -> None:
    rows = [row("none", None, name, 0.9) for name in ("none", "ours")]
    rows += [row("pgd", size / 255, name, 0.5 - size / 20) for size in (1, 4) for name in ("none", "ours")]
    rows += [row("adaptive", 4 / 255, "ours", 0.123)]
    rows += [row("certificate", radius, "ours", 0.6 - radius, "certified_accuracy", "l2") for radius in (0.0, 0.25)]
    write_rows(folder / "results.json", rows)
    page = written(folder)
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert all(point.startswith("data:") for point in outline.points)
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r'src="data:[^"]*"', "", page))
    assert len(outline.images) == 3  # L-infinity, certified, learning
    assert all(one["alt"] for one in outline.images)
    for told in (
        "12.3",
        "7.3 to 17.3",
        "linf 4/255",
        "all that were tried",
        "What is not covered",
        "Clinical use",
        "noise level",
    ):
        assert told in page
    assert "Not measured" not in page


def test_figures_are_svg_that_can_be_read(folder: Path) -> None:
    write_rows(folder / "results.json", [row("none", None, "none", 0.9), row("pgd", 4 / 255, "none", 0.1)])
    drawn = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", written(folder))
    assert drawn
    for one in drawn:
        assert ElementTree.fromstring(base64.b64decode(one)).tag.endswith("svg")


def test_what_was_not_measured_is_said(folder: Path) -> None:
    page = written(folder)
    assert page.count("Not measured.") == 3
    assert "training.certify" in page


def test_other_data_and_tasks_stay_out(folder: Path) -> None:
    other = row("none", None, "stranger", 0.9)
    write_rows(folder / "results.json", [Row(**{**vars(other), "dataset": "elsewhere"})])
    assert "stranger" not in written(folder)


def test_names_cannot_become_markup(folder: Path) -> None:
    write_rows(folder / "results.json", [row("none", None, "<script>alert(1)</script>", 0.9)])
    assert "<script>" not in written(folder)


def test_a_folder_without_an_artifact_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "holds no artifact" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_the_ladder_says_who_attacks_and_stands_in_the_order_of_what_they_know(folder: Path) -> None:
    rows = [row("none", None, "ours", 0.9), row("pgd", 1 / 255, "ours", 0.8), row("adaptive-pgd", 1 / 255, "ours", 0.3)]
    rows += [row("outsider-square", 1 / 255, "ours", 0.7), row("corruption-blur", 2.0, "ours", 0.6, norm="severity")]
    rows += [row("adaptive", 1 / 255, "ours", 0.2), row("outsider", 1 / 255, "ours", 0.65)]
    rows += [row("adaptive-ddn", None, "ours", 0.321, "median_l2", "l2")]
    write_rows(folder / "results.json", rows)
    page = written(folder)
    names = re.findall(r'<th scope="row">([^<]+?) <small>', page)
    assert names == [
        "clean",
        "oblivious: pgd",
        "all that were tried, worst case",
        "outsider, worst case",
        "outsider: square",
        "insider: pgd",
    ]
    assert "<summary>Each attack by itself</summary>" in page
    assert '<th scope="row">blur</th><td>60.0</td>' in page
    assert '<th scope="row">insider: ddn</th><td>0.321</td>' in page
    pictures = [base64.b64decode(one).decode() for one in re.findall(r"image/svg\+xml;base64,([^\"]+)", page)]
    assert any("outsider, worst case" in one and "all attacks, worst case" in one for one in pictures)
