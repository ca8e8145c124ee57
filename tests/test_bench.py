"""bench.py, check.py and first_hour.sh at small sizes."""
import itertools
import json
import shutil
import subprocess

import bench
import check
import pytest
import torch
from conftest import ROOT, environment

import losses


def test_every_part_prints_its_rows(monkeypatch, script, tmp_path):
    words = ("--image_size 16 --channels 16 16 --z_dim 8 --codebook_size 16 --disc_channels 8 8 "
             "--data shapes")
    monkeypatch.setattr(bench, "SIZES", {"small": (words, ("tiny",))})
    monkeypatch.setattr(losses, "VGG16", lambda: losses.SmallVGG([8] * 5, [6]))
    monkeypatch.setattr(bench, "measure", lambda call, *_: (call(), (0.5, 0.0))[1])  # one call
    script("bench", "--parts", *bench.PARTS, "naive", "--batch_size", 4, "--device", "cpu",
           "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    names = [row["name"].strip() for row in rows]
    assert len({*names}) == len(names) == 2 + 3 + 4 + 1 + 5 + 2
    assert all(row["ms"] == 500 and row["images_per_s"] == 8 for row in rows)
    flops = {name: row["tflop_per_image"] for name, row in zip(names, rows)}
    in_groups, at_once = [flops[name] for name in names if name.startswith("R1, ")][:2]
    assert in_groups == pytest.approx(at_once) and in_groups > 0


def test_check_reports_a_device_with_other_results(monkeypatch, script, rejected):
    monkeypatch.setattr(losses, "VGG16", lambda: losses.SmallVGG([8] * 5, [6]))
    monkeypatch.setattr(check, "CHANNELS", (16, 16))
    monkeypatch.setattr(check, "DISC_CHANNELS", (8, 8))
    monkeypatch.setattr(check, "SIDE", 16)
    script("check", "--device", "cpu")
    to, calls = torch.nn.Module.to, itertools.count()

    def scaled(self, *args, **kwargs):  # the first weight of each copy is 1 % larger than before
        next(self.parameters()).data.mul_(1 + 0.01 * next(calls))
        return to(self, *args, **kwargs)
    monkeypatch.setattr(torch.nn.Module, "to", scaled)
    assert "AR prior, fp32, eager" in rejected("check", "--device", "cpu")


def test_first_hour_does_not_repeat_a_finished_part(vgg, tmp_path):
    shutil.copy(vgg, tmp_path / "vgg.pt")
    env = environment(SMALL="1", OUT=str(tmp_path), PARTS="resume")
    run = ["bash", str(ROOT / "benchmarks" / "first_hour.sh")]
    first = subprocess.run(run, env=env, capture_output=True, text=True)
    assert (tmp_path / "resume.done").exists(), first.stdout + first.stderr
    second = subprocess.run(run, env=env, capture_output=True, text=True)
    assert "resume" not in second.stdout
