import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from measuring_fakes import GATEWAY_URL, Brightness, FakeEndpoint, bare, connecting, gateway, splits
from torch import Tensor

from defense.smoothing import ABSTAIN
from training import certify
from training.certificates.certification import certify_class
from training.certificates.files import ClassLine, Settings, read_output
from training.certificates.summary import certified_score
from training.measure.results import read_rows


@pytest.fixture(autouse=True)
def _toy_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "load_data", lambda *_, **__: splits())


def run(folder: Path, *more: str, endpoint: FakeEndpoint | None = None) -> int:
    argv = [
        "--url",
        GATEWAY_URL,
        "--name",
        "zo",
        "--out",
        str(folder / "zo.jsonl"),
        "--results",
        str(folder / "r.json"),
    ]
    small = ["--n0", "10", "--n", "200", "--sigma", "0.1", "--radii", "0,0.1,0.3"]
    return certify.main([*argv, *small, *more], connect=connecting(gateway=endpoint or gateway()))


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "zo.jsonl").read_text().splitlines()]


def without_time(lines: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_writes_the_settings_and_a_line_an_image(tmp_path: Path) -> None:
    assert run(tmp_path, "--limit", "4") == 0
    settings, *lines = lines_of(tmp_path)
    assert (settings["name"], settings["artifact"], settings["sigma"], settings["n"]) == ("zo", "f00d", 0.1, 200)
    assert settings["fingerprint"] == "abc"
    assert len(lines) == 4
    for line in lines:
        assert line["name"] == f"image-{line['index']}"
        assert line["queries"] == 210
        assert line["correct"] == (line["prediction"] == line["label"])
        assert line["linf_radius_255"] == pytest.approx(255 * float(str(line["radius"])) / 4)


def test_radius_is_that_of_all_hits_where_the_classifier_never_errs(tmp_path: Path) -> None:
    run(tmp_path, "--sigma", "0.02", "--limit", "2", endpoint=FakeEndpoint(Brightness(), tolerance=1.0))
    reach = 0.02 * NormalDist().inv_cdf(0.001 ** (1 / 200))
    assert [line["radius"] for line in lines_of(tmp_path)[1:]] == pytest.approx([reach, reach])


def test_images_have_noise_of_their_own_whichever_others_are_certified(tmp_path: Path) -> None:
    few, all_of_them = tmp_path / "few", tmp_path / "all"
    run(few, "--limit", "3")
    run(all_of_them)
    by_index = {line["index"]: line for line in without_time(lines_of(all_of_them)[1:])}
    assert all(by_index[line["index"]] == line for line in without_time(lines_of(few)[1:]))


def test_interrupted_run_goes_on_where_it_was_and_ends_the_same(tmp_path: Path) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    endpoint = gateway()
    endpoint.fail_after = 1 + 3 * 210  # describe, then three images
    assert run(broken, endpoint=endpoint) == 130
    assert len(lines_of(broken)) == 1 + 3
    with (broken / "zo.jsonl").open("a") as file:
        file.write('{"index": 7, "na')  # killed while it wrote
    resumed = gateway()
    assert run(broken, endpoint=resumed) == 0
    assert resumed.images == 1 + 9 * 210
    run(whole)
    assert without_time(lines_of(broken)) == without_time(lines_of(whole))


def test_a_file_whose_very_first_line_was_cut_begins_anew(tmp_path: Path) -> None:
    run(tmp_path)
    whole = (tmp_path / "zo.jsonl").read_bytes()
    (tmp_path / "zo.jsonl").write_bytes(whole[:40])
    assert run(tmp_path) == 0
    assert without_time(lines_of(tmp_path)) == without_time([json.loads(line) for line in whole.splitlines()])


def test_larger_limit_continues_a_smaller_one(tmp_path: Path) -> None:
    run(tmp_path, "--limit", "2")
    more = gateway()
    assert run(tmp_path, "--limit", "5", endpoint=more) == 0
    assert more.images == 1 + 3 * 210
    assert read_rows(tmp_path / "r.json")[0].n == 5


@pytest.mark.parametrize(
    ("more", "message"), [(["--sigma", "0.2"], "sigma was 0.1, is 0.2"), (["--n", "300"], "n was 200, is 300")]
)
def test_other_settings_are_a_clear_error_and_the_file_stays(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--limit", "1")
    before = (tmp_path / "zo.jsonl").read_bytes()
    assert run(tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "zo.jsonl").read_bytes() == before


def test_another_artifact_under_the_same_name_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--limit", "1")
    assert run(tmp_path, endpoint=bare()) == 2
    assert "artifact was f00d, is None" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["mine", "mine\n", '{"name": "zo"}\n', "\n"])
def test_file_of_something_else_is_a_clear_error_and_stays(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zo.jsonl").write_text(content)
    assert run(tmp_path) == 2
    assert "no output of this command" in capsys.readouterr().err
    assert (tmp_path / "zo.jsonl").read_text() == content


def test_prints_certified_accuracy_with_the_linf_equivalent_and_adds_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    out = capsys.readouterr().out
    assert "L2 radius  L-inf /255  certified %" in out
    assert "0.1       6.375" in out  # 0.1 / sqrt(16) * 255
    rows = read_rows(tmp_path / "r.json")
    assert [row.epsilon for row in rows] == [0.0, 0.1, 0.3]
    assert {(row.attack, row.norm, row.metric) for row in rows} == {("certificate", "l2", "certified_accuracy")}
    assert {(row.defense, row.queries, row.n, row.dataset) for row in rows} == {("zo", 4321, 12, "toy")}
    assert rows[2].value == 0.0


def test_says_which_radii_can_never_be_certified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, "--sigma", "0.25", "--n", "1000", "--radii", "0.5,0.75", "--limit", "1")
    assert "can certify is 0.616" in capsys.readouterr().out
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "never certified, however robust: radius 0.75; raise --n"
    ]


class Undecided(FakeEndpoint):
    """Answers right with a chance that the image decides, from nearly never to nearly always."""

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        texture = images[:, :, 0, 0] - images[:, :, 0, 1]
        chance = NormalDist().cdf(float(texture.mean())) if len(images) > 1 else 1.0
        right = texture[:, 0] - texture.mean() < 0.14 * NormalDist().inv_cdf(min(0.999, chance))
        return torch.stack([right.float(), 1 - right.float()], dim=1)


@pytest.mark.parametrize("endpoint", [bare, gateway, lambda: Undecided(Brightness())])
@pytest.mark.parametrize("sigma", ["0.1", "0.5"])
def test_stopping_early_certifies_nothing_that_was_not_certified_without_it(
    endpoint: Callable[[], FakeEndpoint], sigma: str, tmp_path: Path
) -> None:
    whole, early = tmp_path / "whole", tmp_path / "early"
    whole_endpoint, early_endpoint = endpoint(), endpoint()
    run(whole, "--sigma", sigma, endpoint=whole_endpoint)
    run(early, "--sigma", sigma, "--stop-early", endpoint=early_endpoint)
    pairs = list(zip(without_time(lines_of(whole)[1:]), without_time(lines_of(early)[1:]), strict=True))
    for before, now in pairs:
        if now["queries"] == 10:
            assert (now["prediction"], now["radius"], now["correct"]) == (ABSTAIN, 0.0, False)
        else:
            assert now == before  # the noise of those that go on is the same
    spent = sum(int(str(now["queries"])) for _, now in pairs)
    assert early_endpoint.images == 1 + spent <= whole_endpoint.images


def test_stopping_early_spares_the_images_whose_selection_misses_the_class(tmp_path: Path) -> None:
    wrong = FakeEndpoint(Brightness(threshold=9.0))  # always "dark"
    run(tmp_path, "--stop-early", endpoint=wrong)
    settings, *lines = lines_of(tmp_path)
    assert settings["stop_early"] is True
    assert {(line["label"], line["queries"], line["correct"]) for line in lines} == {(0, 210, True), (1, 10, False)}


@pytest.mark.parametrize(("hits", "queries"), [(4, 10), (5, 30), (10, 30)])
def test_stopping_early_wants_half_of_the_selection(hits: int, queries: int) -> None:
    labels = torch.cat([torch.zeros(hits), 1 + torch.arange(10.0 - hits)]).long()  # no other class has more than one

    def classifier(images: Tensor) -> Tensor:
        return torch.eye(11)[labels if len(images) == 10 else torch.zeros(len(images)).long()]

    noise = {"sigma": 1.0, "n0": 10, "n": 20, "alpha": 0.1, "seed": 0, "stop_early": True}
    settings = Settings("zo", None, "toy", "f", "test", (1, 2, 2), **noise)
    certificate = certify_class(classifier, torch.zeros(1, 2, 2), 0, 0, settings, batch=100)
    assert certificate.samples == queries
    assert certificate.label == (0 if queries == 30 else ABSTAIN)


def test_a_file_from_before_stopping_early_is_continued(tmp_path: Path) -> None:
    run(tmp_path, "--limit", "3")
    header, *lines = (tmp_path / "zo.jsonl").read_text().splitlines()
    old = {key: value for key, value in json.loads(header).items() if key != "stop_early"}
    (tmp_path / "zo.jsonl").write_text("\n".join([json.dumps(old), *lines]) + "\n")
    endpoint = gateway()
    assert run(tmp_path, "--limit", "4", endpoint=endpoint) == 0
    assert endpoint.images == 1 + 210


def test_reading_while_another_process_writes_leaves_the_file_alone(tmp_path: Path) -> None:
    assert read_output(tmp_path / "none.jsonl") == {}
    run(tmp_path, "--limit", "3")
    path = tmp_path / "zo.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    assert len(read_output(path)) == 2
    assert path.read_bytes() == before


def line(prediction: int, radius: float) -> ClassLine:
    return ClassLine(
        index=0,
        name="",
        label=1,
        prediction=prediction,
        radius=radius,
        linf_radius_255=0.0,
        correct=prediction == 1,
        queries=0,
        seconds=0.0,
    )


def test_abstained_and_wrong_images_are_never_certified() -> None:
    lines = [line(1, 0.5), line(1, 0.2), line(ABSTAIN, 0.0), line(0, 0.9)]
    shares = [certified_score(lines, radius, seed=0)[0] for radius in (0.0, 0.2, 0.3, 0.6)]
    assert shares == [0.5, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("more", [["--alpha", "1"], ["--sigma", "0"], ["--n", "0"], ["--name", "a/b"]])
def test_malformed_arguments_exit_with_code_2(more: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *more)
    assert stopped.value.code == 2
