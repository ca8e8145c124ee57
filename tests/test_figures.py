"""figures.py on numbers with a known verdict, and the stages of demo.sh at a tiny size."""
import json
import os
import signal
import subprocess
import sys
import time

import figures
import numpy as np
import pytest
import torch
from conftest import COMMON, PRIOR, ROOT, TINY, environment, load

import vq
from miniature.shapes import KINDS, Shapes
from transformer import Transformer


def seeds(*pairs, key="l1"):
    """Runs in which every number is 1, except `key` at alpha 0 and alpha 1: one pair per seed."""
    keys = {row[0] for row in figures.ROWS} | {
        key + suffix for key in (*figures.PHASES, *figures.METHOD) for suffix in ("", "_2")}
    ones = dict.fromkeys(keys, 1.0) | {"same_codes": True, "variance_explained": 1.0}
    return [{0.0: ones | {key: low}, 1.0: ones | {key: high}} for low, high in pairs]


def test_verdicts_need_all_seeds_and_three_of_them():
    assert figures.verdict([1, 2, 3], [2, 3, 4], "higher") == "reproduced"
    assert figures.verdict([1, 2, 3], [2, 3, 4], "lower") == "opposite"
    assert figures.verdict([1, 2, 3], [2, 3, 2], "higher") == "inconclusive"
    assert figures.verdict([1, 2, 3], [1, 2, 3], "lower") == "inconclusive"  # equal is neither
    assert figures.verdict([1, 2], [2, 3], "higher") == "2 of 2: inconclusive"
    assert figures.verdict([1, 2, 3], [2, 3, 4], "higher", noise=1.1) == "inconclusive"
    assert figures.verdict([1], [2], "") == ""


def test_the_tables_have_means_spreads_verdicts_and_conditions():
    text = figures.tables(seeds((0.05, 0.1), (0.06, 0.12), (0.07, 0.14)))
    assert "L1 of reconstructions | 0.060 ± 0.010 | 0.120 ± 0.020 | higher | reproduced |" in text
    assert "L1 of reconstructions | 1 | 0.120 ± 0.020 | 1.000 ± 0.000 | lower | opposite |" in text
    runs = seeds((5.0, 2.5), (2.0, 4.0), key="fd_ratio")
    runs[0][1.0]["same_codes"] = False
    runs[1][1.0] |= {"L_sem": 0.5, "nar_context": 0.5}
    text = figures.tables(runs)
    assert "CHANGED" in text and text.count("difference between two priors") == 6
    del runs[1][0.0]["nar_fd_2_range"]  # a run without a second prior
    assert figures.tables(runs).count("difference between two priors") == 5
    held = [line.split(": ")[-1] for line in text.splitlines() if line.startswith("- condition")]
    assert held == [f"{n} of 2 seed(s)" for n in (1, 0, 1, 0, 0, 1)]


def test_the_parts_explain_the_less_of_the_pixels_the_more_clutter_there_is(monkeypatch):
    """shapes.py names the fractions of the variance that a linear regression explains."""
    monkeypatch.setattr(Shapes, "SIZES", {"val": 400})
    explained = [figures.variance_explained(*figures.held_out(
        {"data": f"shapes:clutter={c}", "image_size": 16})) for c in (0, 0.5, 1)]
    assert 1 > explained[0] > 0.6 > explained[1] > explained[2] > 0


def test_the_inception_score_over_the_parts():
    def network(x, layers):  # classifies the first part by the first pixel, the others not at all
        logits = torch.zeros(len(x), sum(KINDS))
        logits[range(len(x)), ((x[:, 0, 0, 0] + 1) * 127.5).round().long()] = 100
        return {"logit": logits}
    images = torch.arange(6, dtype=torch.uint8).repeat(50).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
    score = figures.inception_score(images.numpy(), network)
    assert score == pytest.approx((6 + 6 * 1) / 7, rel=1e-3)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_losses_by_context(kind):
    """AR: their mean is the loss. NAR: the first one is the loss if all codes are masked."""
    prior = Transformer(kind, "tiny", 16, 4, num_classes=3).eval()
    torch.nn.init.normal_(prior.tok_emb.weight)
    s, labels = torch.randint(16, (5, 4)), torch.arange(5) % 3
    by_context = figures.losses_by_context(prior, s, labels)
    tokens = s if kind == "ar" else torch.full_like(s, prior.mask_id)
    total, count = prior.loss(prior(tokens, labels), s, torch.ones_like(s))
    loss = sum(by_context) / 4 if kind == "ar" else by_context[0]
    assert len(by_context) == 4 and loss == pytest.approx((total / count).item(), rel=1e-5)


def log(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_ablation_rows_stand_beside_the_papers(tmp_path):
    for name in ("entropy", "plain"):
        for run in ("phase1", "ar"):
            log(tmp_path / name / run, *(
                {"step": step, "split": "val", "l1": l1, "loss": loss, "unigram_entropy": loss + 1}
                for step, l1, loss in ((1, 0.1, 5.0), (2, 0.08, 4.5), (3, 0.07, 4.75))))
        (tmp_path / name / "phase1.json").write_text('{"FD": 2.5, "usage": 0.5}')
        (tmp_path / name / "ar1.json").write_text('{"FD": 12.5}')
    text = figures.ablation_tables([tmp_path])
    numbers = "0.070 | 2.50 | 50.0 | 4.50 (5.50) | 12.50"
    assert f"| entropy | {numbers} | 3.45 | 16.97 |" in text
    assert f"| no regularization | {numbers} | 4.07 | 17.19 |" in text
    assert "K-means" not in text  # was not run
    assert "| entropy | 0.070, 0.070 | 2.50, 2.50 |" in figures.ablation_tables([tmp_path] * 2)


def test_clutter_compares_runs_that_have_only_ar_priors(tmp_path, script, vgg, monkeypatch):
    """A seed without the second prior, and one with it: its value is the mean of both."""
    monkeypatch.setattr(figures, "inception_score", lambda images, network: images.mean().item())
    losses = {(0.5, 0): (4.5, 4.0), (0.5, 1): (4.75, 4.5), (0, 1): (3.0, 3.5)}  # alpha 0, alpha 1
    for (clutter, seed), pair in losses.items():
        run = tmp_path / f"{clutter} {seed}"
        flags = {"data": f"shapes:clutter={clutter}", "seed": seed}
        for name, state in (("start", {"args": flags}), ("classifier", load(vgg))):
            (run / name).mkdir(parents=True)
            torch.save(state, run / name / "ckpt.pt")
        for alpha, loss in enumerate(pair):
            folder = run / f"alpha{alpha}"
            for i, prior in enumerate(["ar", "ar_second"][:seed + 1]):
                log(folder / prior, {"step": 1, "split": "val", "loss": loss + i / 4,
                                     "unigram_entropy": 5.0 + alpha})
                for phase in (1, 2):
                    (folder / f"{prior}{phase}").mkdir()
                    np.savez(folder / f"{prior}{phase}/samples.npz", np.full((2, 4, 4, 3), phase))
                    (folder / f"{prior}{phase}.json").write_text(
                        json.dumps({"FD": (loss + i) / phase, "accuracy": 0.5}))
    script("figures", "--clutter", *sorted(tmp_path.glob("*.5 *")), tmp_path / "0 1", "--out",
           tmp_path / "out")
    text = (tmp_path / "out/clutter.md").read_text()
    assert text.count("\n| 0 (1) |") == text.count("\n| 0.5 (0, 1) |") == 5
    for row in ("0.5 (0, 1) | AR: validation loss, nats per token | 4.688 ± 0.265 | 4.312 ± 0.442 "
                "| -0.500, -0.250", "0 (1) | FD of AR samples, phase 2 | 1.75 | 2.00 | +0.25"):
        assert f"\n| {row} |\n" in text
    measured = json.loads((tmp_path / "out/clutter.json").read_text())
    assert [(run["clutter"], run["seed"]) for run in measured] == [(0, 1), (0.5, 0), (0.5, 1)]
    assert measured[1]["alphas"]["1.0"]["ar_score_2"] == 2


def test_training_curves_are_drawn_by_unit(script, vgg, tokenizer, tmp_path, monkeypatch):
    """The tokenizer's loss and entropy are not on the axes of the prior's."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    saved = []
    monkeypatch.setattr(figures, "save_plot", lambda figure, path: saved.append(figure))
    script("train_tokenizer", *TINY, "--vgg", vgg, "--out", "tok")
    script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", "prior")
    script("train_vgg", *COMMON, "--image_size", 16, "--widths", *"44444", "--out", "net")
    script("figures", "--curves", "tok", "prior", "net")
    axes = {axis.get_title(): axis for axis in saved[0].axes if axis.lines}
    for title, labels in {
            "tokenizer: loss (Eq. 2)": {"tok train"}, "prior: loss": {"prior train", "prior val"},
            "classifier: loss": {"net train", "net val"}, "L_low (Eq. 4)": {"tok val"},
            "entropy of the soft code usage": {"tok train"},
            "unigram entropy of the codes": {"prior val"},
            "discriminator": {"tok train real_logit", "tok train fake_logit"}}.items():
        assert {line.get_label() for line in axes[title].lines} == labels
    assert axes["PSNR"].get_ylabel() == "dB"


# A `python` that only logs the stages of demo.sh. The stage $STOP waits for a signal.
NOTE = """#!/bin/bash
case "$1" in -*) exec {python} "$@" ;; esac
echo "$@" >> $LOG
[[ "$*" == *"$STOP" ]] || exit 0
trap 'kill $!; echo saved >> $LOG; exit 143' TERM
sleep 99 > /dev/null 2>&1 & wait
"""


def test_demo_stops_resumes_and_ends_with_the_table(tmp_path, script, monkeypatch):
    """The stages that it logged run in this process."""
    out, log, python = tmp_path / "demo", tmp_path / "log", tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(NOTE.format(python=sys.executable))
    python.chmod(0o755)
    env = environment(DEMO_OUT=str(out), DEMO_STEPS="4", DEMO_PRIORS="10", DEMO_SAMPLES="10",
                      DEMO_ALPHAS="1", DEMO_SECOND="1", LOG=str(log), STOP="nothing")
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"

    def demo(**variables):
        log.write_text("")
        # bash can't trap a SIGINT that was ignored when it started, as in a background job
        return subprocess.Popen(["bash", ROOT / "miniature/demo.sh"], env=env | variables,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process = demo(STOP="demo/start")
    while "demo/start" not in log.read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the script, and what it started
    text = process.communicate()[0]  # ends when its last child has
    assert process.returncode == 130 and log.read_text().endswith("demo/start\nsaved\n"), text

    process = demo()
    text = process.communicate()[0]
    assert process.returncode == 0, text
    monkeypatch.setattr(figures, "HELD_OUT", 12)
    for words in map(str.split, log.read_text().splitlines()):
        name = words[0].split("/")[-1].removesuffix(".py")
        script(name, *words[1:], *["--device", "cpu"] * (name != "figures"))
    assert demo().wait() == 0  # what runs again resumes, and is finished
    assert all("--resume" in line or "figures.py" in line for line in log.read_text().splitlines())
    assert demo(DEMO_CLUTTER="0").wait() == 1  # the folder holds another run

    assert "bitwise unchanged" in (out / "table.md").read_text()
    measured = json.loads((out / "table.json").read_text())[0]
    assert [*measured["alphas"]] == ["1.0"] and "DEMO_STEPS=4 " in measured["command"]
    compared = figures.measure_clutter(out)["alphas"][1.0]
    assert compared.items() <= measured["alphas"]["1.0"].items() and "ar_fd_range" in compared
    assert {path.stem for path in out.glob("*.png")} >= {"view", "method", "samples", "phases"}
    weights = tmp_path / "weights"
    script("export", out / "alpha1", "--out", weights)
    tokenizer = vq.load_tokenizer(weights / "tokenizer.pt")[0]
    for name in ("ar.pt", "nar.pt"):
        assert vq.fingerprint(tokenizer) == load(weights / name)["tokenizer"]
    assert str(out).encode() not in b"".join(path.read_bytes() for path in weights.iterdir())
