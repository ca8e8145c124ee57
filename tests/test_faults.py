"""What happens to a run of days, and what people type: kills, several processes, unreadable data,
numbers that are not finite, mistakes on the command line. Each promise to a user has a test."""
import fcntl
import importlib
import itertools
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import COMMON, PRIOR, ROOT, TINY, command, launch, lines, load, run_scripts, same
from PIL import Image

import data
import fid
import runtime
from miniature.shapes import Shapes

VGG = [*COMMON, "--image_size", 16, "--widths", 8, 8, 8, 8, 8]
# Forks of a process that has imported all this start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_faults"])


@pytest.fixture
def words(vgg, tokenizer):
    """The command line of a run of each kind."""
    phase_1 = ["train_tokenizer", *TINY, "--vgg", vgg]
    return {"phase 1": [*phase_1, "--vq_warmup", 3], "train_vgg": ["train_vgg", *VGG],
            "phase 2": [*phase_1, "--phase", 2, "--init", tokenizer],
            "kmeans": [*phase_1, "--quantizer", "kmeans"],
            "train_prior": ["train_prior", *PRIOR, "--kind", "nar", "--tokenizer", tokenizer]}


@pytest.fixture
def at_step(monkeypatch):
    """at_step(call): from now on call(n, optimizers) precedes the n-th optimizer step."""
    step, count = runtime.Run.step, itertools.count(1)

    def arrange(call):
        monkeypatch.setattr(runtime.Run, "step", lambda run, optimizers, lr: (
            call(next(count), optimizers), step(run, optimizers, lr))[1])
    return arrange


# ------------------------------------------------------------ kills, signals and several processes

def assert_same_runs(one, two):
    for path in one.glob("*.pt"):
        assert same(load(path) | {"args": 0}, load(two / path.name) | {"args": 0}), path
    for split in ("train", "val"):
        assert lines(one, split) == lines(two, split)


@pytest.mark.parametrize("kind", ["phase 1", "phase 2", "kmeans", "train_prior", "train_vgg"])
def test_a_run_resumes_exactly_after_a_signal(kind, words, script, signal_at, tmp_path):
    often = [*words[kind], "--eval_every", 2, "--resume"]
    script(*often, "--out", tmp_path / "whole")
    often += ["--out", tmp_path / "cut"]
    for step, workers in ((3, 1), (4, 0)):  # between two validations; before one
        signal_at(step)
        with pytest.raises(SystemExit, match="143"):
            script(*often, "--workers", workers)
        assert load(tmp_path / "cut/ckpt.pt")["step"] == step
    signal_at(None)
    script(*often)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def work(words, kill_at):
    """In a process of its own: run a script. It is killed when the checkpoint of step `kill_at` is
    written, but has not replaced the last one."""
    Shapes.SIZES, replace = {"train": 60, "val": 12}, os.replace

    def replace_or_die(source, target):
        if str(target).endswith("ckpt.pt") and load(source)["step"] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace, sys.argv = replace_or_die, words
    runtime.launch(importlib.import_module(words[0]).main)


@pytest.mark.parametrize("kind", ["phase 1", "train_prior"])
def test_a_run_resumes_exactly_after_sigkill(kind, words, script, monkeypatch, tmp_path):
    often = [*words[kind], "--eval_every", 2, "--resume"]
    script(*often, "--out", tmp_path / "whole")
    often += ["--out", tmp_path / "cut"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    for kill_at in (2, 4, None):  # None: at any moment
        process = FORKS.Process(target=work, args=([*map(str, often)], kill_at))
        process.start()
        if kill_at is None:
            time.sleep(random.uniform(0, 2))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL or not kill_at
        assert load(tmp_path / "cut/ckpt.pt")["step"] >= (kill_at or 4) - 2
    script(*often)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def descendants(pid):
    """Process numbers of a process, its children, and theirs."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *itertools.chain(*map(descendants, map(int, children)))]


@pytest.mark.parametrize("processes, number", [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_every_process_is_one_request(processes, number, vgg, tmp_path):
    """A script in a terminal that traps Ctrl-C and passes it on; torchrun under Slurm. There are
    data workers; afterwards no process is left."""
    words = [*TINY, "--vgg", vgg, "--iters", 10**6, "--eval_every", 10**6, "--workers", 1,
             "--out", tmp_path / "run"]
    line = shlex.join(command(["train_tokenizer.py", *words], processes))
    script = f"{line} & child=$!; trap 'kill -TERM $child' INT TERM; wait $child; wait $child"
    shell = subprocess.Popen(["bash", "-c", script], start_new_session=True, cwd=tmp_path)
    while len(runtime.read_metrics(tmp_path / "run/metrics.jsonl")) < 3:
        assert shell.poll() is None
        time.sleep(0.1)
    everyone = descendants(shell.pid)
    assert len(everyone) >= (6 if processes else 3)
    for pid in reversed(everyone):  # the shell last: its SIGTERM must not overtake
        os.kill(pid, number)
    assert shell.wait(timeout=300) == (1 if processes else 128 + number)
    assert load(tmp_path / "run/ckpt.pt")["step"] == lines(tmp_path / "run", "train")[-1]["step"]
    while any(Path(f"/proc/{pid}").exists() for pid in everyone):  # else pytest's timeout
        time.sleep(0.2)


FAIL = """
def fail(self, index, n, view=data.TrainImages.view):
    assert runtime.rank() == 0 or "fails" not in sys.argv[-1], "mine"
    return view(self, index, n)
data.TrainImages.view = fail
"""


def test_two_processes_compute_what_one_computes(script, vgg, tmp_path):
    """In both phases. Adam's first steps (g / |g|) amplify rounding, hence a small learning rate.
    Then an error in a data worker of one process ends both."""
    runs = [["train_tokenizer", *TINY, "--vgg", vgg, "--entropy_weight", 10, "--vq_warmup", 2,
             "--lr", 1e-5],
            ["train_tokenizer", *COMMON, "--phase", 2, "--init", tmp_path / "one0/ckpt.pt",
             "--lr", 1e-5]]
    for i, words in enumerate(runs):
        script(*words, "--out", tmp_path / f"one{i}")
    two = [[*words, "--out", tmp_path / f"two{i}"] for i, words in enumerate(runs)]
    two += [[*runs[0], "--workers", 1, "--out", tmp_path / "fails"]]
    done = run_scripts(tmp_path, two, FAIL, check=False)
    assert done.returncode and "AssertionError: mine" in done.stderr, done.stderr
    for one, two in ((tmp_path / f"one{i}", tmp_path / f"two{i}") for i in (0, 1)):
        for split, count in (("train", 6), ("val", 3)):
            a, b = lines(one, split), lines(two, split)
            assert len(a) == len(b) == count
            for x, y in zip(a, b):
                assert x | {"split": 0} == pytest.approx(y | {"split": 0}, rel=1e-4, abs=1e-6)
        a, b = load(one / "ckpt.pt"), load(two / "ckpt.pt")
        for part in ("opt", "opt_disc"):  # the gradients, averaged over steps
            for x, y in zip(a[part]["state"].values(), b[part]["state"].values(), strict=True):
                x, y = x["exp_avg"], y["exp_avg"]
                assert torch.allclose(x, y, rtol=1e-3, atol=1e-3 * x.abs().max()), part
        assert all(torch.allclose(x, b["model"][k], atol=1e-5) for k, x in a["model"].items())


def test_two_runs_can_not_have_one_folder(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        done = launch(["miniature/train_vgg.py", *VGG, "--out", tmp_path], check=False)
    assert done.returncode == 1 and "another process trains in" in done.stderr


# ------------------------------------------------------------ bad data, numbers that are not finite

@pytest.mark.parametrize("kind, workers, folder", [
    ("phase 1", 1, "train"), ("train_vgg", 0, "train"), ("phase 1", 0, "val"),
    ("train_vgg", 0, "val")])
def test_a_run_whose_data_vanish_is_saved_and_ends(kind, workers, folder, words, rejected, at_step,
                                                   many_photos, tmp_path):
    many_photos.rename(tmp_path / "train")
    shutil.copytree(tmp_path / "train", tmp_path / "val")

    def vanish(n, _):
        for path in (tmp_path / folder).rglob("*.png") if n == 3 else ():
            path.write_bytes(b"")
    at_step(vanish)
    sentence = rejected(*words[kind], "--data", tmp_path / "train", "--val", tmp_path / "val",
                        "--iters", 99, "--eval_every", 5, "--workers", workers,
                        "--out", tmp_path / "run")
    assert "no image can be read" in sentence
    last = lines(tmp_path / "run", "train")[-1]["step"]
    assert load(tmp_path / "run/ckpt.pt")["step"] == last < 99


def test_bad_steps_are_skipped_and_twenty_in_a_row_end_the_run(words, script, at_step, capsys,
                                                               tmp_path):
    def poison(n, optimizers):
        if n in (3, 4, *range(7, 99)):
            optimizers[-1].param_groups[0]["params"][0].grad[0] = math.nan
    at_step(poison)
    with pytest.raises(SystemExit, match="20 steps in a row.* 6.*--lr"):
        script(*words["phase 1"], "--eval_every", 1, "--iters", 30, "--out", tmp_path / "run")
    not_saved = re.findall(r"step (\d+) not saved", capsys.readouterr().out)
    assert [*map(int, not_saved)] == [3, 4, *range(7, 26)]
    state = load(tmp_path / "run/ckpt.pt")
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())
    skipped = [line["skipped"] for line in lines(tmp_path / "run", "train")]
    assert skipped == [0, 0, 1, 2, 2, 2, *range(3, 22)]


@pytest.mark.parametrize("kind", ["phase 1", "train_prior", "train_vgg"])
def test_a_state_whose_validation_loss_is_not_finite_is_not_saved(kind, words, script, monkeypatch,
                                                                  capsys, tmp_path):
    """One finite step at a learning rate of 1e20; after it no gradient is finite."""
    module = importlib.import_module(words[kind][0])
    place = (module, "learning_rate") if kind == "train_prior" else (runtime, "cosine")
    monkeypatch.setattr(*place, lambda step, *_: 1e20 if step == 5 else 1e-4)
    words = [*words[kind], "--eval_every", 2, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit, match="20 steps.*step 4"):
        script(*words, "--iters", 30)
    assert "step 6 not saved" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="step 6 not saved.* 4"):  # nor as the last one
        script(*words, "--iters", 6, "--resume")
    state = load(tmp_path / "run/ckpt.pt")
    assert state["step"] == 4 and all(v.abs().max() < 100 for v in state["model"].values())


# ------------------------------------------------------------------------------- what people type

def test_a_mistake_is_one_sentence_before_any_work(words, rejected, tokenizer, vgg, prior, tmp_path,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # no network
    monkeypatch.setattr(data.TrainImages, "view", None)  # no image is read for training
    monkeypatch.setattr(fid.SmallVGGFeatures, "forward", None)  # nor measured
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.pt").write_bytes(tokenizer.read_bytes()[:2000])
    os.link(prior, tmp_path / "ckpt.pt")
    for width, name in enumerate((
            "flat/a.png", "one/x/a.png", "sizes/a.png", "sizes/b.png", "stray/a.png",
            "stray/x/a.png", "splits/Valid/a.png", "splits/TRAINING/a.png"), 9):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 16)).save(tmp_path / name)
    words["sample"] = ["sample", "--tokenizer", tokenizer, "--prior", prior, "--device", "cpu"]
    words = {kind: [*line, "--out", "fresh"] for kind, line in words.items()}
    words["fid"], words["fid judge"] = ["fid"], ["fid", "--feature_net", vgg, "--device", "cpu"]
    training = {"--data none": "none", "--data empty": "empty", "--data cut.pt": "cut.pt",
                "--data lsun:none": "lsun:none", "--data torchvision:ImageFolder": "ImageFolder",
                "--data stray": "stray (x", "--data flat": "flat --val",  # too few to hold out
                "--data splits": "--data splits/TRAINING --val splits/Valid",  # not classes
                "--batch_size 7 --grad_accum 2": "--batch_size 7 --grad_accum 2"}
    for kind, mistakes in {  # what is typed, and words of the sentence
            "phase 1": training | {
                "--alpha 1.5": "--alpha 1.5 [0, 1]", "--image_size 17": "--image_size 17 by 2",
                "--vq_warmup 2 --quantizer kmeans": "--vq_warmup",
                "--vgg none.pt": "none.pt https://",
                "--vgg imagenet": "https:// --vgg", f"--vgg {tokenizer}": "train_vgg.py",
                "--data shapes:clutter=2": "clutter [0, 1]", "--resume --out .": "ckpt.pt prior"},
            "phase 2": training | {
                "--alpha -0.1": "--alpha -0.1 [0, 1]", "--init none.pt": "none.pt tokenizer.py",
                "--init cut.pt": "cut.pt tokenizer.py", f"--init {prior}": "prior.pt tokenizer.py",
                "--z_dim 4": "tokenizer.pt architecture"},
            "train_prior": training | {
                f"--tokenizer {vgg}": "ckpt.pt tokenizer.py", "--kind ar --lr_end 0": "--lr_end",
                "--image_size 32": "--image_size 32 16", "--num_classes 3": "--num_classes 3 6",
                "--num_classes 0 --label_dropout 0.1": "--label_dropout"},
            "train_vgg": training | {
                "--data flat --val flat": "flat classes", "--data one --val one": "one classes",
                "--resume --out .": "ckpt.pt prior"},  # the run of another script
            "sample": {"--prior none.pt": "none.pt prior.py", "--labels 6": "--labels 6 0 to 5"},
            "fid": {"--real one": "https:// --feature_net"},
            "fid judge": {
                "--real sizes --workers 1": "b.png --image_size", "--real none": "none",
                "--real sizes --fake none.npz": "none.npz", "--real sizes --fake none": "none",
                "--real one --tokenizer none.pt": "none.pt",
                "--real one --feature_net none.pt": "none.pt"}}.items():
        for mistake, key_words in mistakes.items():
            sentence = rejected(*words[kind], *mistake.split())
            assert all(word in sentence for word in key_words.split()), (mistake, sentence)
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    assert "one process" in rejected(*words["train_vgg"])
    assert not (tmp_path / "fresh/ckpt.pt").exists()


@pytest.mark.parametrize("kind, first, change", [
    ("phase 1", ["--adv_weight", 0], ["--adv_weight", 0.1]),
    ("train_vgg", [], ["--widths", *"44444"]), ("train_prior", [], ["--label_dropout", 0.1])])
def test_a_run_is_neither_overwritten_nor_resumed_as_another_one(kind, first, change, words, script,
                                                                 rejected, tmp_path):
    path, words = tmp_path / "run/ckpt.pt", [*words[kind], "--out", tmp_path / "run"]
    script(*words, *first, "--iters", 1)
    before = {each: each.read_bytes() for each in path.parent.rglob("*") if each.is_file()}
    assert "already holds a run" in rejected(*words, "--seed", 1)
    assert "ckpt.pt does not fit" in rejected(*words, *change, "--resume")
    assert {each: each.read_bytes() for each in path.parent.rglob("*") if each.is_file()} == before
    for content in (before[path][:9000], b"", b"something else"):
        path.write_bytes(content)
        assert "ckpt.pt is not a checkpoint" in rejected(*words, "--resume")
