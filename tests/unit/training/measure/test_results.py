import json
from dataclasses import replace
from pathlib import Path

import pytest

from training.command.errors import UserError
from training.measure.intervals import bootstrap_interval
from training.measure.results import Row, align, format_table, measured_row, read_rows, replace_rows, write_rows

ROW = Row(
    dataset="phantom",
    task="classification",
    split="test",
    attack="pgd",
    norm="linf",
    epsilon=4 / 255,
    defense="none",
    metric="accuracy",
    value=0.125,
    n=200,
    queries=0,
    seed=0,
    low=0.1,
    high=0.15,
)
CLEAN = replace(ROW, attack="none", norm="none", epsilon=None, value=0.97)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_rows(path, [CLEAN, ROW])
    assert read_rows(path) == [CLEAN, ROW]


def test_file_is_a_json_array_of_objects_with_the_fields_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_rows(path, [ROW])
    (entry,) = json.loads(path.read_text())
    assert list(entry)[:12] == (
        "dataset task split attack norm epsilon defence metric value n queries seed".split()  # noqa: SIM905
    )
    assert entry["value"] == 0.125


def test_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "results.json") == []


def test_row_replaces_the_older_one_of_the_same_identity(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_rows(path, [ROW, CLEAN])
    newer = replace(ROW, value=0.5, n=10, low=None, high=None)
    write_rows(path, [newer])
    assert sorted(read_rows(path), key=lambda row: row.attack) == [CLEAN, newer]


@pytest.mark.parametrize(
    "change", [{"defense": "zo"}, {"epsilon": 0.5}, {"seed": 1}, {"queries": 5}, {"metric": "median_l2"}]
)
def test_row_of_another_identity_is_added(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_rows(path, [ROW])
    write_rows(path, [replace(ROW, **change)])
    assert len(read_rows(path)) == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "{}",
        '[{"dataset": "phantom"}]',
        '["row"]',
        json.dumps([{**ROW.__dict__, "more": 1}]),
        json.dumps([{**ROW.__dict__, "n": "many"}]),
        json.dumps([{**ROW.__dict__, "value": float("nan")}]),
    ],
)
def test_malformed_file_is_a_user_error_and_stays_untouched(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"results\.json is not a results file") as caught:
        write_rows(path, [ROW])
    assert "\n" not in str(caught.value)
    assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_rows(path, [ROW])

    def full_disk(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("defense.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_rows(path, [CLEAN])
    assert read_rows(path) == [ROW]
    assert list(tmp_path.iterdir()) == [path]


def test_rows_are_replaced_whatever_was_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("not json")
    replace_rows(path, [ROW])
    replace_rows(path, [CLEAN])
    assert read_rows(path) == [CLEAN]


def test_row_of_hits_is_their_share_with_its_interval() -> None:
    hits = [True, True, False, True] * 10
    common = {"dataset": "d", "task": "classification", "split": "test", "defense": "x", "queries": 3, "seed": 2}
    row = measured_row(hits, **common, metric="certified_accuracy", attack="certificate", norm="l2", epsilon=0.25)
    assert (row.attack, row.norm, row.epsilon, row.metric) == ("certificate", "l2", 0.25, "certified_accuracy")
    assert (row.value, row.n, row.queries, row.seed) == (0.75, 40, 3, 2)
    assert (row.low, row.high) == bootstrap_interval([float(hit) for hit in hits], seed=2)
    clean = measured_row(hits, **common, metric="accuracy")
    assert (clean.attack, clean.norm, clean.epsilon, clean.metric) == ("none", "none", None, "accuracy")


def test_table_has_one_line_a_defense_and_one_column_an_attack_and_size() -> None:
    ddn = {"attack": "ddn", "norm": "l2", "epsilon": None}
    rows = [
        ROW,
        CLEAN,
        replace(ROW, defense="zo-ae-ds", value=0.7, queries=80_000),
        replace(CLEAN, defense="zo-ae-ds", value=1.0, queries=80_000),
        replace(ROW, attack="pgd-l2", norm="l2", epsilon=0.5, value=0.0),
        replace(ROW, **ddn, value=0.25),
        replace(ROW, **ddn, metric="median_l2", value=0.2105),
        replace(ROW, **ddn, metric="median_l2_scaled", defense="zo-ae-ds", queries=80_000, value=None),
        replace(ROW, attack="certificate", norm="l2", epsilon=0.25, metric="certified_accuracy", value=0.5),
    ]
    assert format_table(rows).splitlines() == [
        "defense   clean    pgd  pgd-l2   ddn        ddn               ddn  certified  queries",
        "              %  4/255     0.5     %  median l2  median l2 scaled     r=0.25    spent",
        "none       97.0   12.5     0.0  25.0      0.210                 -       50.0        0",
        "zo-ae-ds  100.0   70.0       -     -          -               inf          -   80,000",
    ]


def test_table_of_several_seeds_says_which() -> None:
    lines = format_table([CLEAN, replace(CLEAN, seed=1, value=0.5)]).splitlines()
    assert lines[2:] == ["none     phantom test, 0   97.0        0", "none     phantom test, 1   50.0        0"]


def test_align_pads_to_the_widest_cell() -> None:
    assert align([("a", "1"), ("bcd", "234")]) == "a      1\nbcd  234"
    assert align([("a", "1"), ("bcd", "234")], left=0) == "  a    1\nbcd  234"
