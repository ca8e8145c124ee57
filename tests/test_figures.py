"""figures.py on figures with a known verdict, and the demonstration in small: no claims."""
import json
import os
import signal
import subprocess
import time

import figures
import pytest
import torch
import tour
from conftest import ROOT, environment, load
from PIL import Image

import vq


def seeds(*pairs, name="l1"):
    """Runs in which all figures are 1, but `name` at alpha 0 and alpha 1, a pair a seed."""
    keys = {row[0] for row in figures.ROWS} | {
        row[0] + end for row in (*figures.PHASES, *figures.METHOD) for end in ("", "_2")}
    blank = dict.fromkeys(keys, 1.0) | {"same_codes": True, "explained": 10.0}
    return [{0.0: blank | {name: low}, 1.0: blank | {name: high}} for low, high in pairs]


def test_verdicts_need_all_seeds_and_three_of_them():
    assert figures.verdict([1, 2, 3], [2, 3, 4], "higher") == "reproduced"
    assert figures.verdict([1, 2, 3], [2, 3, 4], "lower") == "opposite"
    assert figures.verdict([1, 2, 3], [2, 3, 2], "higher") == "inconclusive"
    assert figures.verdict([1, 2, 3], [1, 2, 3], "lower") == "inconclusive"  # equal is neither
    assert figures.verdict([1, 2], [2, 3], "higher") == "2 of 2: inconclusive"
    assert figures.verdict([1, 2, 3], [2, 3, 4], "higher", apart=1.1) == "inconclusive"
    assert figures.verdict([1], [2], "") == ""


def test_the_tables_hold_means_spreads_verdicts_and_conditions():
    text = figures.tables(seeds((0.05, 0.1), (0.06, 0.12), (0.07, 0.14))).splitlines()
    assert any(line.startswith("| L1 of") and line.endswith(
        "| 0.060 ± 0.010 | 0.120 ± 0.020 | higher | reproduced |") for line in text)
    assert any(line.startswith("| L1 of") and line.endswith(
        "| 1 | 0.120 ± 0.020 | 1.000 ± 0.000 | lower | opposite |") for line in text)
    runs = seeds((5.0, 2.5), (2.0, 4.0), name="ratio")
    runs[0][1.0]["same_codes"] = False
    runs[1][1.0] |= {"sem": 0.5, "explained": 16.0}
    text = figures.tables(runs)
    assert "CHANGED" in text
    held = [line.split(": ")[-1] for line in text.splitlines() if line.startswith("- condition")]
    assert held == [f"{n} of 2 seed(s)" for n in (1, 0, 1, 0, 1)]


def test_what_the_parts_explain_and_their_inception_score():
    shares = [figures.explained(f"shapes:clutter={c}", 16, 300, 100) for c in (0, 0.5, 1)]
    assert 1 > shares[0] > 0.6 > shares[1] > shares[2] > 0
    kinds = torch.tensor([6, 6, 6, 6, 6, 6, 6])

    def network(x, layers):  # surely tells the first part by the first pixel, of the others nothing
        told = torch.zeros(len(x), int(kinds.sum()))
        told[range(len(x)), ((x[:, 0, 0, 0] + 1) * 127.5).round().long()] = 100
        return {"logit": told}
    images = torch.arange(6, dtype=torch.uint8).repeat(50).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
    assert figures.score(images.numpy(), network) == pytest.approx((6 + 6 * 1) / 7, rel=1e-3)


def test_ablation_rows_stand_beside_the_papers(tmp_path):
    for name in ("entropy", "plain"):
        for folder in ("phase1", "ar"):
            (tmp_path / name / folder).mkdir(parents=True)
            rows = ((1, 0.1, 5.0), (2, 0.08, 4.5), (3, 0.07, 4.75))
            (tmp_path / name / folder / "metrics.jsonl").write_text("".join(
                json.dumps({"step": step, "split": "val", "l1": l1, "loss": loss, "H": loss + 1})
                + "\n" for step, l1, loss in rows))
        (tmp_path / name / "phase1.json").write_text('{"FD": 2.5, "usage": 0.5}')
        (tmp_path / name / "ar1.json").write_text('{"FD": 12.5}')
    text = figures.ablation_tables([tmp_path])
    found = "0.070 | 2.50 | 50.0 | 4.50 (5.50) | 12.50"
    assert f"| entropy | {found} | 3.45 | 16.97 |" in text
    assert f"| no regularisation | {found} | 4.07 | 17.19 |" in text
    assert "K-means" not in text  # was not run
    text = figures.ablation_tables([tmp_path, tmp_path])  # two seeds
    assert "| entropy | 0.070, 0.070 | 2.50, 2.50 | 50.0, 50.0 | 4.50 (5.50), 4.50 (5.50)" in text


def test_block_and_dilated_attention_connect_all_in_two_steps():
    block, dilated = tour.attended(False), tour.attended(True)
    assert block.sum() == dilated.sum() == 16 and (block & dilated).sum() == 1  # the query
    assert block[4:8, 8:12].all() and dilated[1::4, 1::4].all()


def test_demo_stops_goes_on_and_ends_with_the_table(tmp_path, script):
    # every process of the demonstration draws 90 + 30 pictures
    (tmp_path / "sitecustomize.py").write_text("from miniature.shapes import Shapes\n"
                                               "Shapes.SIZES = {'train': 90, 'val': 30}\n")
    out = tmp_path / "demo"
    env = environment(DEMO_OUT=str(out), DEMO_STEPS="8", DEMO_SAMPLES="10", DEMO_ALPHAS="1",
                      CUDA_VISIBLE_DEVICES="", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    start = ["bash", str(ROOT / "miniature" / "demo.sh")]
    options = {"env": env, "cwd": tmp_path, "text": True}
    demo = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, **options)
    while not (out / "start" / "metrics.jsonl").exists():
        assert demo.poll() is None, demo.stdout.read()
        time.sleep(0.1)
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: the script, and what it started
    text = demo.communicate()[0]  # ends when its last child has
    assert demo.returncode == 130 and (out / "start" / "ckpt.pt").exists(), text
    assert not (out / "table.md").exists()

    done = subprocess.run(start, capture_output=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    options["env"] = env | {"DEMO_CLUTTER": "1"}
    other = subprocess.run(start, capture_output=True, **options)
    assert other.returncode == 1 and "DEMO_CLUTTER=0.25" in other.stderr
    assert "bitwise unchanged" in (out / "table.md").read_text()
    measured = json.loads((out / "table.json").read_text())[0]
    assert [*measured["alphas"]] == ["1.0"] and "DEMO_STEPS=8 " in measured["command"]
    of_both, values = figures.gains(out)[1.0], measured["alphas"]["1.0"]
    assert of_both == {name: values[name] for name, _, _ in figures.GAINS}
    for name, rows in (("view", 4), ("method", 4), ("samples", 2), ("phases", 2)):
        with Image.open(out / f"{name}.png") as image:
            assert image.size == (170 + 10 * 100, rows * 100)
    weights = tmp_path / "weights"
    weights.mkdir()
    script("export", out / "alpha1", "--out", weights)
    tokenizer = vq.load_tokenizer(weights / "tokenizer.pt")[0]
    assert vq.fingerprint(tokenizer) == load(weights / "ar.pt")["tokenizer"]
    assert str(out).encode() not in b"".join(path.read_bytes() for path in weights.iterdir())
    script("sample", "--prior", weights / "nar.pt", "--tokenizer", weights / "tokenizer.pt",
           "--count", 2, "--out", tmp_path / "nar", "--device", "cpu")
