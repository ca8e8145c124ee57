"""figures.py on numbers with a known verdict, and demo.sh: its stages in small, without claims."""
import json
import os
import signal
import subprocess
import sys
import time

import figures
import pytest
import torch
import tour
from conftest import ROOT, environment, load
from PIL import Image

import vq
from miniature.shapes import Shapes
from transformer import Transformer


def seeds(*pairs, name="l1"):
    """Runs in which all numbers are 1, but `name` at alpha 0 and alpha 1: one pair per seed."""
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
    runs[1][1.0] |= {"sem": 0.5, "explained": 16.0, "nar_context": 0.5}
    text = figures.tables(runs)
    assert "CHANGED" in text
    held = [line.split(": ")[-1] for line in text.splitlines() if line.startswith("- condition")]
    assert held == [f"{n} of 2 seed(s)" for n in (1, 0, 1, 0, 1, 1)]


def test_what_the_parts_explain_and_their_inception_score(monkeypatch):
    monkeypatch.setattr(Shapes, "SIZES", {"val": 400})
    explained = [figures.explained(f"shapes:clutter={c}", 16, 300, 100) for c in (0, 0.5, 1)]
    assert 1 > explained[0] > 0.6 > explained[1] > explained[2] > 0
    kinds = torch.tensor([6, 6, 6, 6, 6, 6, 6])

    def network(x, layers):  # classifies the first part by the first pixel, the others not at all
        logits = torch.zeros(len(x), int(kinds.sum()))
        logits[range(len(x)), ((x[:, 0, 0, 0] + 1) * 127.5).round().long()] = 100
        return {"logit": logits}
    images = torch.arange(6, dtype=torch.uint8).repeat(50).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
    assert figures.score(images.numpy(), network) == pytest.approx((6 + 6 * 1) / 7, rel=1e-3)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_losses_by_context(kind):
    """AR: their mean is the loss. NAR: the first one is the loss when all codes are masked."""
    prior = Transformer(kind, "tiny", 16, 4, num_classes=3).eval()
    torch.nn.init.normal_(prior.tok_emb.weight)
    s, labels = torch.randint(16, (5, 4)), torch.arange(5) % 3
    found = figures.losses_by_context(prior, s, labels)
    tokens = s if kind == "ar" else torch.full_like(s, prior.mask_id)
    total, count = prior.loss(prior(tokens, labels), s, torch.ones_like(s))
    loss = sum(found) / 4 if kind == "ar" else found[0]
    assert len(found) == 4 and loss == pytest.approx((total / count).item(), rel=1e-5)


def test_ablation_rows_stand_beside_the_papers(tmp_path):
    for name in ("entropy", "plain"):
        for folder in ("phase1", "ar"):
            (tmp_path / name / folder).mkdir(parents=True)
            rows = ((1, 0.1, 5.0), (2, 0.08, 4.5), (3, 0.07, 4.75))
            (tmp_path / name / folder / "metrics.jsonl").write_text("".join(
                json.dumps({"step": step, "split": "val", "l1": l1, "loss": loss,
                            "unigram_entropy": loss + 1}) + "\n" for step, l1, loss in rows))
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


# A `python` that only notes the stages of demo.sh. The stage $STOP waits for a signal.
NOTE = """#!/bin/bash
case "$1" in -*) exec {python} "$@" ;; esac
echo "$@" >> $LOG
[[ "$*" == *"$STOP" ]] || exit 0
trap 'kill $!; echo saved >> $LOG; exit 143' TERM
sleep 99 > /dev/null 2>&1 & wait
"""


def test_demo_stops_resumes_and_ends_with_the_table(tmp_path, script, monkeypatch):
    """Its stages run in this process."""
    out, log, python = tmp_path / "demo", tmp_path / "log", tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(NOTE.format(python=sys.executable))
    python.chmod(0o755)
    env = environment(DEMO_OUT=str(out), DEMO_STEPS="4", DEMO_PRIORS="10", DEMO_SAMPLES="10",
                      DEMO_ALPHAS="1", LOG=str(log), STOP="nothing")
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
    monkeypatch.setattr(figures, "explained", lambda spec: 0.1)
    for words in map(str.split, log.read_text().splitlines()):
        name = words[0].split("/")[-1].removesuffix(".py")
        script(name, *words[1:], *["--device", "cpu"] * (name != "figures"))
    assert demo().wait() == 0  # what runs again resumes, and is finished
    assert all("--resume" in line or "figures.py" in line for line in log.read_text().splitlines())
    process = demo(DEMO_CLUTTER="0")
    assert "DEMO_CLUTTER=1" in process.communicate()[0] and process.returncode == 1

    assert "bitwise unchanged" in (out / "table.md").read_text()
    measured = json.loads((out / "table.json").read_text())[0]
    assert [*measured["alphas"]] == ["1.0"] and "DEMO_STEPS=4 " in measured["command"]
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
