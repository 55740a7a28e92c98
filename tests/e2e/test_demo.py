"""The main job at a tiny size: every process real, every stage run, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ARGUMENTS = ["--size", "32", "--epochs", "1", "--pretrain-steps", "4", "--max-queries", "2500", "--limit", "8"]


def demo(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training.demo", "--out", str(out), *ARGUMENTS, *more]
    # A session of its own: all that it starts can be found by it afterwards.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def members(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_the_demo_runs_to_its_table_and_leaves_no_process(tmp_path):
    process = demo(tmp_path)
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["defence"] for row in rows} == {"none", "mse", "zo-ds", "zo-ae-ds"}
    assert {row["attack"] for row in rows} >= {"none", "fgsm", "pgd", "ddn"}
    assert {row["dataset"] for row in rows} == {"phantom"}
    spent = {row["defence"]: row["queries"] for row in rows}
    assert spent["none"] == spent["mse"] == 0
    assert 1000 < spent["zo-ds"] <= 2500
    assert 1000 < spent["zo-ae-ds"] <= 2500
    assert "curl -F file=@" in output
    for name in ("none", "mse", "zo-ds", "zo-ae-ds"):
        assert name in output
    assert members(process.pid) == []


def test_the_demo_on_masks_is_the_same_command(tmp_path):
    process = demo(tmp_path, "--task", "segmentation", "--limit", "4")
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["defence"] for row in rows} == {"none", "mse", "zo-ds", "local"}
    assert {row["attack"] for row in rows} >= {"none", "fgsm", "pgd", "segpgd", "ddn"}
    assert {row["metric"] for row in rows} >= {"dice", "iou"}  # after one epoch there may be no mask to lose by DDN
    assert {row["task"] for row in rows} == {"segmentation"}
    assert "Dice, in %" in output
    assert (tmp_path / "phantom-masks" / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert members(process.pid) == []


def test_a_demo_that_is_told_to_stop_stops_what_it_started(tmp_path):
    process = demo(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:  # the hospital is up when pre-training begins
        if "-m training.pretrain" in line:
            break
    assert len(members(process.pid)) >= 2
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert members(process.pid) == []


def test_a_demo_that_fails_says_which_command_and_stops_what_it_started(tmp_path):
    (tmp_path / "phantom").mkdir()
    (tmp_path / "phantom" / "pretrained").write_text("in the way")
    process = demo(tmp_path)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 2
    assert "this command failed with code 2: python -m training.pretrain" in output
    assert members(process.pid) == []
