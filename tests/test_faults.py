"""What happens to a run of days, and what people type: kills, several processes, numbers that are
not finite, slips on the command line. A test for each promise of the scripts that train."""
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import COMMON, PRIOR, ROOT, TINY, command, launch, lines, load, same, save_prior
from PIL import Image

import data
import runtime
import vq
from miniature.shapes import Shapes

VGG = [*COMMON, "--image_size", 16, "--widths", 8, 8, 8, 8, 8]
# Forks of a process that has imported all this: a start takes no seconds, and kills hit the work.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_faults"])


@pytest.fixture
def words(vgg, tokenizer):
    """The command line of a run of each kind."""
    phase_1 = ["train_tokenizer", *TINY, "--vgg", vgg]
    return {"phase 1": [*phase_1, "--vq_start", 3], "train_vgg": ["train_vgg", *VGG],
            "phase 2": [*phase_1, "--phase", 2, "--init", tokenizer],
            "kmeans": [*phase_1, "--quantizer", "kmeans"],
            "train_prior": ["train_prior", *PRIOR, "--kind", "nar", "--tokenizer", tokenizer]}


# ------------------------------------------------------------------------------------------- kills

def work(words, step, signals, nohup):
    """In a process of its own: run a script, and send it these signals when it takes `step`."""
    Shapes.SIZES = {"train": 60, "val": 12}
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    steps, take = itertools.count(1), runtime.Optimizers.step

    def take_and_kill(self, *args):
        norms = take(self, *args)
        for number in signals if next(steps) == step else ():
            os.kill(os.getpid(), number)
        return norms
    runtime.Optimizers.step = take_and_kill
    sys.argv = words
    runtime.launch(importlib.import_module(words[0]).main)


@pytest.fixture
def start(monkeypatch):
    def call(words, step=0, signals=(), nohup=False):
        process = FORKS.Process(target=work, args=(list(map(str, words)), step, signals, nohup))
        process.start()
        return process
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    return call


@pytest.mark.parametrize("kind", ["phase 1", "phase 2", "kmeans", "train_prior", "train_vgg"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(kind, words, start, tmp_path):
    often, began = [*words[kind], "--eval_every", 2, "--resume"], time.monotonic()
    whole = start([*often, "--out", tmp_path / "whole"])
    whole.join()
    seconds = time.monotonic() - began
    often += ["--out", tmp_path / "cut"]
    last = signal.SIGHUP if kind == "kmeans" else signal.SIGTERM  # it ends its step, and saves
    stopped = start([*often, "--workers", int(kind == "phase 1")], step=3, signals=[last])
    stopped.join()
    at = 2 if kind == "train_vgg" else 3  # it learns each batch twice
    assert whole.exitcode == 0 and stopped.exitcode == 128 + last
    assert load(tmp_path / "cut/ckpt.pt")["step"] == at
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None):
        process = start(often)
        if number:
            time.sleep(random.uniform(0, seconds / 2))
            (process.kill if number == signal.SIGKILL else process.terminate)()
        process.join()
        assert process.exitcode in ((0, -number, 128 + number) if number else (0,))
        assert load(tmp_path / "cut/ckpt.pt")["step"] >= at  # whole, at any moment
    one, two = (load(tmp_path / out / "ckpt.pt") for out in ("whole", "cut"))
    assert one["step"] == 6 and same(one | {"args": 0}, two | {"args": 0})
    assert lines(tmp_path / "whole", "train") == lines(tmp_path / "cut", "train")


def descendants(pid):
    """Process numbers of a process's children, and theirs."""
    children = (Path(f"/proc/{pid}/task/{pid}/children").read_text() if pid else "").split()
    return [pid, *itertools.chain(*map(descendants, map(int, children)))]


@pytest.mark.parametrize("processes, number", [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_every_process_is_one_request(processes, number, vgg, tmp_path):
    """A script in a terminal that traps Ctrl-C and passes it on; torchrun under Slurm. There are
    data workers; afterwards no process is left."""
    words = [*TINY, "--vgg", vgg, "--iters", 10**6, "--eval_every", 10**6, "--workers", 2,
             "--out", tmp_path / "run"]
    line = shlex.join(command(["train_tokenizer.py", *words], processes))
    script = f"{line} & child=$!; trap 'kill -TERM $child' INT TERM; wait $child; wait $child"
    shell = subprocess.Popen(["bash", "-c", script], start_new_session=True, cwd=tmp_path)
    while len(runtime.read_metrics(tmp_path / "run/metrics.jsonl")) < 2:
        assert shell.poll() is None
        time.sleep(0.2)
    everyone = descendants(shell.pid)
    assert len(everyone) >= (8 if processes else 4)
    for pid in reversed(everyone):  # the shell last: its SIGTERM must not overtake
        os.kill(pid, number)
    assert shell.wait(timeout=300) == (1 if processes else 128 + number)
    assert load(tmp_path / "run/ckpt.pt")["step"] == lines(tmp_path / "run", "train")[-1]["step"]
    for _ in range(300):
        if not any(Path(f"/proc/{pid}").exists() for pid in everyone):
            break
        time.sleep(0.2)
    assert not [pid for pid in everyone if Path(f"/proc/{pid}").exists()]


def test_under_nohup_a_run_goes_on_when_its_terminal_closes(words, start, tmp_path):
    process = start([*words["train_vgg"], "--out", tmp_path / "run"], step=2,
                    signals=[signal.SIGHUP], nohup=True)
    process.join()
    assert process.exitcode == 0 and load(tmp_path / "run/ckpt.pt")["step"] == 6


# ------------------------------------------------------------------------------- several processes

PROBE = """
import importlib, json, sys
sys.path[:0] = json.loads(sys.argv[1])
import runtime
from miniature.shapes import Shapes
Shapes.SIZES = {"train": 60, "val": 12}
def main():
    for sys.argv in json.loads(sys.argv[2]):
        importlib.import_module(sys.argv[0]).main()
        runtime.dist.init_process_group = lambda *_, **__: None  # once
runtime.launch(main)
"""


def test_two_processes_compute_what_one_computes(script, vgg, tmp_path):
    """Both phases; then train_vgg.py refuses two. Adam's first steps (g / |g|) amplify rounding: a
    small rate keeps what follows comparable."""
    runs = [["train_tokenizer", *TINY, "--vgg", vgg, "--gamma", 10, "--vq_start", 2, "--lr", 1e-5],
            ["train_tokenizer", *COMMON, "--phase", 2, "--init", tmp_path / "one0/ckpt.pt",
             "--lr", 1e-5], ["train_vgg", *VGG]]
    for i, words in enumerate(runs):
        script(*words, "--out", tmp_path / f"one{i}")
    words = [[*map(str, words), "--out", f"{tmp_path}/two{i}"] for i, words in enumerate(runs)]
    (tmp_path / "probe.py").write_text(PROBE)
    done = launch([tmp_path / "probe.py", json.dumps(sys.path), json.dumps(words)], 2, check=False)
    assert done.returncode and "train_vgg.py runs in one process" in done.stderr, done.stderr
    for one, two in ((tmp_path / f"one{i}", tmp_path / f"two{i}") for i in (0, 1)):
        for split, count in (("train", 6), ("val", 2)):
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


# -------------------------------------------------------------------------------- how a script ends

FAIL = """
import sys
sys.path[:0] = {path}
import resource, signal
import data, fid, runtime, train_tokenizer, train_prior
from miniature.shapes import Shapes
Shapes.SIZES = {{"train": 60, "val": 12}}
{fault}
runtime.launch({script}.main)
"""
FAULTS = {
    "main": """
def take(self, lr, real=runtime.Optimizers.step):
    if runtime.rank() == runtime.world() - 1:
        raise ArithmeticError("mine")
    return real(self, lr)
runtime.Optimizers.step = take""",
    "worker": """
def to_tensor(array):
    raise ArithmeticError("mine")
data.to_tensor = to_tensor""",
    "save": """
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"""}


@pytest.mark.parametrize("fault, processes", [("main", 0), ("main", 2), ("worker", 0), ("save", 0),
                                              ("save", 2)])
def test_whatever_goes_wrong_a_script_with_data_workers_ends(fault, processes, vgg, tmp_path):
    (tmp_path / "fail.py").write_text(FAIL.format(path=sys.path, fault=FAULTS[fault],
                                                  script="train_tokenizer"))
    words = [*TINY, "--vgg", vgg, "--workers", 2, "--out", tmp_path / "run"]
    done = launch([tmp_path / "fail.py", *words], processes, check=False, timeout=300)
    assert done.returncode and ("mine" in done.stderr or fault == "save"), done.stderr
    if fault == "save":
        assert "ckpt.pt can't be written" in done.stderr and "MiB are free" in done.stderr
        assert not {*tmp_path.glob("run/ckpt*")}


def test_pictures_of_several_sizes_end_a_metric(photos, vgg):
    words = ["--real", photos, "--features", vgg, "--workers", 2, "--device", "cpu"]
    done = launch(["fid.py", *words], check=False, timeout=300)
    assert done.returncode and "size" in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["train_prior", "sample"])
def test_room_for_arrays_is_taken_at_the_start(script, tokenizer, prior, tmp_path):
    (tmp_path / "fail.py").write_text(FAIL.format(path=sys.path, fault=FAULTS["save"],
                                                  script=script).replace("fid", script))
    words = {"train_prior": [*PRIOR, "--tokenizer", tokenizer, "--views", 50],
             "sample": ["--tokenizer", tokenizer, "--prior", prior, "--device", "cpu"]}[script]
    done = launch([tmp_path / "fail.py", *words, "--out", tmp_path / "out"], check=False)
    name = {"train_prior": "codes.npy", "sample": "unfinished.npy"}[script]
    assert done.returncode and f"{name}" in done.stderr and "can't be written" in done.stderr
    assert not {*tmp_path.glob("out/**/*.npy*")} and "Traceback" not in done.stderr


def test_two_runs_can_not_have_one_folder(words, start, refused, tmp_path):
    first = start([*words["train_vgg"], "--iters", 10**6, "--out", tmp_path / "run"])
    while len(runtime.read_metrics(tmp_path / "run/metrics.jsonl")) < 2:
        time.sleep(0.1)
    for more in ([], ["--resume"]):
        sentence = refused(*words["train_vgg"], *more, "--out", tmp_path / "run")
        assert "another process trains in" in sentence
    first.kill()
    first.join()
    second = start([*words["train_vgg"], "--out", tmp_path / "run"])
    second.join()
    assert second.exitcode == 0


def test_an_unreadable_held_out_picture_ends_nothing(script, many_photos, tmp_path, capsys):
    """The 201st, alone in the last batch of a validation."""
    (tmp_path / "val").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "val" / name).mkdir()
        for i in range(100):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"val/{name}/{i:03}.png")
    (tmp_path / "val/dogs/last.png").write_bytes(b"")
    script("train_vgg", *VGG, "--data", many_photos, "--val", tmp_path / "val",
           "--out", tmp_path / "run")
    assert load(tmp_path / "run/ckpt.pt")["step"] == 6 and "last.png" in capsys.readouterr().out
    assert all(line["loss"] > 0 for line in lines(tmp_path / "run", "val"))


def test_too_many_unreadable_pictures_end_training_after_it_is_saved(script, many_photos, vgg,
                                                                     tmp_path):
    for i in range(0, 60, 2):
        (many_photos / f"cats/{i}.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="of 1.. images can't be read"):
        script("train_tokenizer", *TINY, "--vgg", vgg, "--data", many_photos, "--iters", 99,
               "--eval_every", 99, "--out", tmp_path / "run")
    last = lines(tmp_path / "run", "train")[-1]["step"]
    assert load(tmp_path / "run/ckpt.pt")["step"] == last < 99


# ------------------------------------------------------------------------------ on other machines

ALL = """
class Host(torch.Tensor):
    pass


class NoDoubles(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {{}}))
        if function is torch.Tensor.cpu:
            found = found.detach().clone().as_subclass(Host)
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if given and isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            assert any(isinstance(t, Host) or t.dtype == torch.float64 for t in given), function
        return found


def main():
    multiprocessing.set_start_method("forkserver")
    with NoDoubles():
        for sys.argv in {runs}:
            importlib.import_module(sys.argv[0]).main()


if __name__ == "__main__":
    runtime.launch(main)
"""


def test_all_scripts_without_doubles_on_the_device_and_with_workers_by_forkserver(tmp_path):
    """A Mac's GPU has no float64; Python 3.14 starts workers so."""
    small = ["--workers", 1, "--iters", 2]
    runs = [["train_vgg", *VGG, *small, "--out", "vgg"],
            ["train_tokenizer", *TINY, *small, "--vgg", "vgg/ckpt.pt", "--out", "one"],
            ["train_tokenizer", "--phase", 2, *COMMON, *small, "--init", "one/ckpt.pt",
             "--out", "two"],
            ["train_prior", *PRIOR, *small, "--tokenizer", "one/ckpt.pt", "--out", "ar"],
            ["sample", "--prior", "ar/best.pt", "--tokenizer", "two/ckpt.pt", "--count", 4,
             "--device", "cpu", "--out", "samples"],
            ["fid", "--real", "shapes", "--image_size", 16, "--count", 20, "--workers", 1,
             "--fake", "samples/samples.npz", "--features", "vgg/ckpt.pt", "--device", "cpu"]]
    text = FAIL.format(path=sys.path, fault="import importlib, multiprocessing\nimport torch",
                       script="").partition("runtime.launch")[0]
    runs = [[*map(str, words)] for words in runs]
    (tmp_path / "all.py").write_text(text + ALL.format(runs=runs))
    launch([tmp_path / "all.py"], cwd=tmp_path, timeout=600)


# -------------------------------------------------------------------- numbers that are not finite

@pytest.mark.parametrize("kind", ["phase 1", "train_prior"])
def test_bad_steps_are_skipped_and_twenty_in_a_row_end_the_run(kind, words, script, monkeypatch,
                                                              tmp_path):
    steps, saved, take, save = itertools.count(1), [], runtime.Optimizers.step, runtime.Run.save

    def poison(self, *args):
        if next(steps) in (3, 4, *range(7, 99)):
            self.optimizers[-1].param_groups[0]["params"][0].grad[0] = math.nan
        return take(self, *args)

    def spy(self, step, path, **state):
        saved.extend([step] * (path == self.ckpt))
        save(self, step, path, **state)
    monkeypatch.setattr(runtime.Optimizers, "step", poison)
    monkeypatch.setattr(runtime.Run, "save", spy)
    with pytest.raises(SystemExit, match="20 steps in a row.*ckpt.pt holds step 6.*--resume"):
        script(*words[kind], "--eval_every", 1, "--iters", 30, "--out", tmp_path / "run")
    assert saved == [1, 2, 5, 6]  # none while steps are being skipped
    state = load(tmp_path / "run/ckpt.pt")
    assert state["step"] == 6 and all(v.isfinite().all() for v in state["model"].values())
    skipped = [line["skipped"] for line in lines(tmp_path / "run", "train")]
    assert skipped == [0, 0, 1, 2, 2, 2, *range(3, 22)]


@pytest.mark.parametrize("kind", ["phase 1", "train_prior", "train_vgg"])
@pytest.mark.parametrize("at", [4, 5])  # the next step is not due, or it is
def test_an_exploded_update_is_not_saved(kind, at, words, script, monkeypatch, signal_at, capsys,
                                         tmp_path):
    """One step, finite, at a rate of 1e20; after it no gradient is finite."""
    module = importlib.import_module(words[kind][0])
    place = (module, "learning_rate") if kind == "train_prior" else (runtime, "cosine")
    monkeypatch.setattr(*place, lambda step, *_: 1e20 if step == at else 1e-4)
    with pytest.raises(SystemExit, match="holds step 4"):
        script(*words[kind], "--eval_every", 2, "--iters", 30, "--out", tmp_path / "run")
    go_on = [*words[kind], "--eval_every", 2, "--out", tmp_path / "run", "--resume", "--iters"]
    with pytest.raises(SystemExit, match=f"step {at + 1} is not saved.*of step 4"):
        script(*go_on, at + 1)  # nor as the last one
    if kind != "train_vgg":  # which learns each batch twice, the second time in vain
        signal_at(at + 1)  # nor by a signal in that step
        with pytest.raises(SystemExit, match="143"):
            script(*go_on, 30)
        assert f"step {at + 1} is not saved" in capsys.readouterr().out
    state = load(tmp_path / "run/ckpt.pt")
    assert state["step"] == 4 and all(v.abs().max() < 100 for v in state["model"].values())


# ------------------------------------------------------------------------------- what people type

def test_a_slip_is_one_sentence_before_any_work(words, refused, tokenizer, vgg, tmp_path,
                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # no network
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.pt").write_bytes(tokenizer.read_bytes()[:2000])
    (tmp_path / "flat").mkdir()
    (tmp_path / "one/class").mkdir(parents=True)
    for folder in ("flat", "one/class"):
        Image.new("RGB", (16, 16)).save(tmp_path / folder / "a.png")
    prior = save_prior(tmp_path / "ckpt.pt", tokenizer)
    monkeypatch.setattr(data.TrainImages, "view", None)  # no image is read for training
    for kind, slip, key_words in [
            *((kind, ["--data", path], [path]) for kind in words for path in ("none", "empty")),
            *((kind, ["--batch_size", 7, "--accum", 2], ["7", "--accum 2"]) for kind in words),
            *((kind, ["--device", "cuda"], ["--device cuda"]) for kind in words),
            ("phase 1", ["--alpha", 1.5], ["--alpha 1.5", "[0, 1]"]),
            ("phase 2", ["--alpha", -0.1], ["--alpha -0.1", "[0, 1]"]),
            ("phase 1", ["--image_size", 17], ["--image_size 17", "multiple of 2"]),
            ("phase 2", ["--init", "none.pt"], ["none.pt", "train_tokenizer.py"]),
            ("phase 2", ["--init", "cut.pt"], ["cut.pt", "train_tokenizer.py"]),
            ("phase 2", ["--init", prior], ["ckpt.pt", "train_tokenizer.py", "prior"]),
            ("train_prior", ["--tokenizer", vgg], [vgg.name, "train_tokenizer.py", "vgg"]),
            ("phase 1", ["--vgg", "none.pt"], ["none.pt", "https://"]),
            ("phase 1", ["--vgg", "imagenet"], ["imagenet", "https://", "--vgg"]),
            ("phase 1", ["--vgg", tokenizer], ["tokenizer.pt", "train_vgg.py"]),
            ("train_vgg", ["--data", "flat", "--val", "flat"], ["flat", "no classes"]),
            ("train_vgg", ["--data", "one", "--val", "one"], ["one", "no classes"]),
            *((kind, [f"--{flag}", 0], [f"--{flag}", "'0'"]) for kind in ("phase 1", "train_prior")
              for flag in ("lr", "iters", "batch_size", "accum", "log_every", "eval_every")),
            ("train_prior", ["--views", 0], ["--views", "'0'"]),
            ("train_prior", ["--kind", "ar", "--lr_end", 0], ["--lr_end 0", "never ends at 0"]),
            ("train_prior", ["--image_size", 32], ["--image_size 32", "tokenizer.pt", "16"]),
            ("train_prior", ["--classes", 3], ["--classes 3", "6"]),
            ("train_prior", ["--classes", 0, "--label_dropout", 0.1], ["--label_dropout"]),
            ("phase 1", ["--data", "shapes:clutter=2"], ["clutter", "[0, 1]"]),
            ("train_vgg", ["--resume", "--out", "."], ["ckpt.pt", "prior"]),  # of another script
            ("phase 1", ["--resume", "--out", "."], ["ckpt.pt", "prior"])]:
        sentence = refused(*words[kind], "--out", "fresh", *slip)
        assert all(word in sentence for word in key_words), (kind, sentence)


def test_the_sentence_is_all_that_a_command_says(tmp_path):
    done = launch(["miniature/train_vgg.py", "--data", "none"], check=False, cwd=tmp_path)
    assert done.returncode and done.stdout.count("\n") == 1  # the device
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_run_is_not_overwritten(words, script, refused, tmp_path):
    for kind in ("phase 1", "train_prior", "train_vgg"):
        out = tmp_path / kind
        script(*words[kind], "--out", out)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert "already holds a run" in refused(*words[kind], "--seed", 1, "--out", out)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_can_not_go_on_is_one_sentence(words, script, refused, tmp_path, monkeypatch):
    for kind, *flags in (("phase 1", "--adv_weight", 0), ("train_prior",)):
        script(*words[kind], *flags, "--iters", 1, "--out", tmp_path / kind)
    for kind, *flags in (("phase 1", "--adv_weight", 0.1), ("train_prior", "--label_dropout", 0.1)):
        sentence = refused(*words[kind], *flags, "--resume", "--out", tmp_path / kind)
        assert "ckpt.pt does not fit" in sentence, kind
    path = tmp_path / "phase 1/ckpt.pt"
    for content in (path.read_bytes()[:9000], b"", b"something else"):
        path.write_bytes(content)
        assert "ckpt.pt is no checkpoint" in refused(*words["phase 1"], "--resume",
                                                     "--out", tmp_path / "phase 1")
    sentence = refused(*words["phase 1"], "--out", path)  # a file, or read-only
    assert str(path) in sentence and "can't be written" in sentence


def test_an_error_of_ones_own_keeps_its_traceback(words, script, tmp_path, monkeypatch):
    class Mine(vq.Quantizer):
        def forward(self, z_hat):
            return {}["eight"]
    monkeypatch.setitem(vq.QUANTIZERS, "vq", Mine)
    for kind in ("phase 1", "phase 2", "train_prior"):  # also where the tokenizer is only read
        with pytest.raises(KeyError, match="eight") as error:
            script(*words[kind], "--out", tmp_path / kind)
        assert error.traceback[-1].name == "forward"
