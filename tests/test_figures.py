"""figures.py on figures with a known verdict, and demo.sh in seconds: mechanics, not claims."""
import json
import os
import signal
import subprocess
import time

import figures
import pytest
import torch
import tour
from conftest import ROOT
from PIL import Image

import losses
from runtime import BadInput
from train_tokenizer import fingerprint, load_tokenizer


def seeds(*pairs, name="l1"):
    """Runs in which all figures are 1, but `name` at alpha 0 and alpha 1, a pair a seed."""
    keys = {row[0] for row in figures.ROWS} | {row[0] + "_2" for row in figures.PHASES}
    blank = dict.fromkeys(keys, 1.0) | {"same_codes": True}
    return [{0.0: blank | {name: low}, 1.0: blank | {name: high}} for low, high in pairs]


def test_verdicts_need_all_seeds_and_three_of_them():
    assert figures.verdict([1, 2, 3], [2, 3, 4], "higher") == "reproduced"
    assert figures.verdict([1, 2, 3], [2, 3, 4], "lower") == "opposite"
    assert figures.verdict([1, 2, 3], [2, 3, 2], "higher") == "inconclusive"
    assert figures.verdict([1, 2, 3], [1, 2, 3], "lower") == "inconclusive"  # equal is neither
    assert figures.verdict([1, 2], [2, 3], "higher") == "2 of 2: inconclusive"
    assert figures.verdict([1], [2], "") == ""


def test_the_tables_hold_means_spreads_and_verdicts():
    text = figures.tables(seeds((0.05, 0.1), (0.06, 0.12), (0.07, 0.14)))
    line = next(line for line in text.splitlines() if line.startswith("| L1 of reconstructions (images"))
    assert line.endswith("| 0.060 ± 0.010 | 0.120 ± 0.020 | higher | reproduced |")
    line = next(line for line in text.splitlines() if line.startswith("| L1 of reconstructions | 1 "))
    assert "| 0.120 ± 0.020 | 1.000 ± 0.000 | lower | opposite |" in line
    assert "bitwise unchanged" in text
    runs = seeds((0.05, 0.1))
    runs[0][1.0]["same_codes"] = False
    assert "CHANGED" in figures.tables(runs)
    with pytest.raises(BadInput, match="no alpha in common"):
        figures.tables([{0.0: {}}, {1.0: {}}])


def test_fidelity_against_its_definition():
    torch.manual_seed(0)
    classifier = losses.SmallVGG([8, 8, 16, 16, 16], 10).eval()
    x, error = torch.rand(4, 3, 16, 16) - 0.5, torch.zeros(4, 3, 16, 16)
    error[:, :, ::2] = 0.2  # averages to 0.1 over each block

    def tokenizer(part):
        return part + error, None, None
    found = figures.fidelity(tokenizer, classifier, x)
    assert found["l1"] == pytest.approx(0.1, rel=1e-5)
    assert found["colour"] == pytest.approx(0.1, rel=1e-5)
    assert found["psnr"] == pytest.approx(-10 * torch.tensor(0.1 ** 2 / 2).log10().item(), rel=1e-5)
    a, b = (classifier(image, ("logit",))["logit"] for image in (x + error, x))
    assert found["logit"] == pytest.approx(((a - b).square().sum() / b.square().sum()).item(), rel=1e-4)


def test_ablation_rows_stand_beside_the_papers(tmp_path):
    for name in ("entropy", "none"):
        for folder in ("phase1", "ar"):
            (tmp_path / name / folder).mkdir(parents=True)
        lines = [{"step": step, "split": "val", "l1": l1, "loss": loss, "H": loss + 1}
                 for step, l1, loss in ((1, 0.1, 5.0), (2, 0.08, 4.5), (3, 0.07, 4.75))]
        for folder in ("phase1", "ar"):
            (tmp_path / name / folder / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in lines))
        (tmp_path / name / "phase1.json").write_text('{"FD": 2.5, "usage": 0.5}')
        (tmp_path / name / "ar1.json").write_text('{"FD": 12.5}')
    text = figures.ablation_tables(tmp_path)
    assert "| entropy | 0.070 | 2.50 | 50.0 | 4.50 (5.50) | 12.50 | 3.45 | 16.97 |" in text
    assert "| no regularisation | 0.070 | 2.50 | 50.0 | 4.50 (5.50) | 12.50 | 4.07 | 17.19 |" in text
    assert "K-means" not in text  # was not run


def test_block_and_dilated_attention_connect_all_in_two_steps():
    block, dilated = tour.attended(False), tour.attended(True)
    assert block.sum() == dilated.sum() == 16 and (block & dilated).sum() == 1  # the query
    assert block[4:8, 8:12].all() and dilated[1::4, 1::4].all()


def test_bad_input_is_one_sentence(script, tmp_path):
    with pytest.raises(BadInput, match="nothing to do"):
        script("figures")
    with pytest.raises(BadInput, match="holds no folders alpha0"):
        figures.alphas(tmp_path)
    (tmp_path / "alpha1").mkdir()
    with pytest.raises(BadInput, match="phase1.json can't be read"):
        figures.read_json(tmp_path / "alpha1" / "phase1.json")
    with pytest.raises(BadInput, match="holds no validation"):
        figures.lowest(tmp_path / "alpha1" / "ar")
    assert figures.alphas(tmp_path) == {1.0: tmp_path / "alpha1"}


@pytest.mark.timeout(900)  # some sixty processes, most of whose time is the import of torch
def test_demo_stops_goes_on_and_ends_with_the_table(tmp_path, script):
    # every process of the demonstration draws 300 + 60 pictures instead of 20,000 + 2,000
    (tmp_path / "sitecustomize.py").write_text("from miniature.shapes import Shapes\n"
                                               "Shapes.SIZES = {'train': 300, 'val': 60}\n")
    out = tmp_path / "demo"
    env = os.environ | {"DEMO_OUT": str(out), "DEMO_STEPS": "10", "DEMO_SAMPLES": "20", "CUDA_VISIBLE_DEVICES": "",
                        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    start, options = ["bash", str(ROOT / "miniature" / "demo.sh")], {"env": env, "cwd": tmp_path, "text": True}
    demo = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    while not (out / "alpha0" / "phase1" / "metrics.jsonl").exists():
        assert demo.poll() is None, demo.stdout.read()
        time.sleep(0.2)
    demo.send_signal(signal.SIGTERM)
    text = demo.communicate(timeout=120)[0]  # ends when its last child has
    assert demo.returncode == 130, text
    assert not (out / "table.md").exists()

    done = subprocess.run(start, capture_output=True, timeout=400, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1: inconclusive" in done.stdout or "0 of 1: inconclusive" in done.stdout
    assert "bitwise unchanged" in (out / "table.md").read_text()
    assert done.stdout.count("bitwise unchanged") == 2 and "| 3 seed(s) | alpha 0" in done.stdout  # docs/miniature.md's
    measured = json.loads((out / "table.json").read_text())[0]
    assert sorted(measured["alphas"]) == ["0.0", "1.0"] and "DEMO_SEED=0 DEMO_STEPS=10 " in measured["command"]
    for name, rows in (("view.png", 7), ("samples.png", 4), ("phases.png", 8)):
        with Image.open(out / name) as image:
            assert image.size == (200 + 10 * 100, rows * 100)
    # nothing is left to do, and nothing is done again
    before = {p: p.stat().st_mtime_ns for p in out.rglob("ckpt.pt")}
    assert len(before) == 10
    subprocess.run(start, check=True, capture_output=True, timeout=400, **options)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    one, two = (fingerprint(load_tokenizer(out / "alpha1" / phase / "ckpt.pt")) for phase in ("phase1", "phase2"))
    assert one == two
    weights = tmp_path / "weights"
    script("export", out / "alpha1", "--out", weights)
    assert fingerprint(load_tokenizer(weights / "tokenizer.pt")) == torch.load(weights / "ar.pt")["tokenizer"]
    assert sum(path.stat().st_size for path in weights.iterdir()) < 6e6
    assert str(out).encode() not in b"".join(path.read_bytes() for path in weights.iterdir())
    for kind in ("ar", "nar"):
        script("sample", "--prior", weights / f"{kind}.pt", "--tokenizer", weights / "tokenizer.pt", "--n", 2, "--out",
               tmp_path / kind)
    script("tour", out, "--out", tmp_path / "tour")
    for name, frames, rows in (("codes", 10, 3), ("alpha", 10, 3), ("phases", 10, 3), ("teacher_forced", 10, 4),
                               ("ar", 8, 3), ("nar", 12, 3)):
        with Image.open(tmp_path / "tour" / f"{name}.png") as image:
            assert image.size == (200 + frames * 100, rows * 100)
