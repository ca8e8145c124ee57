"""What happens to a run of days, and what people type: kills, full disks, broken files and numbers, wrong flags.

The long versions of these trials are in trials.py."""
import argparse
import contextlib
import errno
import importlib
import io
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trials
from conftest import FOLDERS, ROOT, SCRIPTS, parser_of
from PIL import EpsImagePlugin, Image
from test_prior import PRIOR, Killed, save_prior, save_tokenizer
from test_train_tokenizer import TINY, lines, same

import data
import fid
import runtime
import sample
import vq
from miniature.shapes import Shapes, draw
from runtime import BadInput

NEEDED = {"export": ["R"], "tour": ["R"],  # what must be there
          "sweep": ["--sample=x", "--fid=x"]}
VGG = ["--image_size", 16, "--widths", *[8] * 5, "--batch_size", 8, "--workers", 0, "--iters", 6, "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 12})


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer.pt")


@pytest.fixture
def prior(tmp_path, tokenizer):
    return save_prior(tmp_path / "prior.pt", tokenizer)


@pytest.fixture
def stop(script, capsys):
    """stop("sample", "--n", 0): the one line on stderr with which the script ends, by exit code 2."""
    def call(name, *words):
        with pytest.raises(SystemExit) as ended:
            runtime.run(lambda: script(name, *words))
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
        return error
    return call


@pytest.fixture
def disk():
    """disk(1000): from now on no file can grow beyond 1000 bytes; disk() undoes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=soft):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield limit
    limit()


# ------------------------------------------------------------------------------------------------- command lines

def flags(parser):
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_has_a_help_text(name, monkeypatch):
    text = SCRIPTS[name].read_text()  # and what it imports, where some of the shared flags are read
    files = [folder / f"{module}.py" for module in re.findall(r"^(?:import|from) (\w+)", text, re.M)
             for folder in FOLDERS]
    text += "".join(file.read_text() for file in files if file.exists())
    for action in parser_of(name, monkeypatch)._actions[1:]:  # the first is --help
        assert action.help, action.dest
        assert re.search(rf"\bargs\.{action.dest}\b(?! = )", text), f"--{action.dest} is read nowhere"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_refuses_what_it_is_not(name, monkeypatch, stop, tmp_path):
    monkeypatch.chdir(tmp_path)
    parser = parser_of(name, monkeypatch)
    for action in flags(parser):
        flag = action.option_strings[0]
        wrong = ["", "x", "nan", "inf", "-1", "1e400", "-0.5"] if action.type or action.choices else []
        count = action.nargs if isinstance(action.nargs, int) else 1
        for value in ("0.5", "1" * 30) if action.type else ():  # neither is a number that is counted in
            with contextlib.suppress(BadInput):
                taken = vars(parser.parse_args([*NEEDED.get(name, []), flag, *[value] * max(1, count)]))[action.dest]
                assert np.asarray(taken).dtype == float, (flag, value)
        for value in wrong:
            with pytest.raises(BadInput) as error:
                parser.parse_args([*NEEDED.get(name, []), flag, *[value] * max(1, count)])
            assert "\n" not in str(error.value) and flag in str(error.value), (flag, value)
        if action.nargs == 0:
            with pytest.raises(BadInput):
                parser.parse_args([*NEEDED.get(name, []), f"{flag}=1"])
    assert "unrecognized" in stop(name, *NEEDED.get(name, []), "--resme")
    assert not list(tmp_path.iterdir())  # before any work


def test_flags_that_contradict_are_refused(stop, tmp_path, monkeypatch, vgg):
    monkeypatch.chdir(tmp_path)
    prior = ["train_prior", "--tokenizer", "T"]
    draw = ["sample", "--prior", "P", "--tokenizer", "T"]
    for words, text in [
            (["train_tokenizer", "--alpha", 1, "--perceptual_layers", "logit"], "two ways"),
            (["train_tokenizer", "--image_size", 4, "--channels", 16, "--vgg", vgg, "--batch_size", 4], "too small"),
            (["train_vgg", "--batch_size", 1], "batch of one"),
            (["train_vgg", "--batch_size", 4, "--accum", 4], "batch of one"),
            ([*prior, "--crop", "center", "--views", 2], "one view"), ([*prior, "--lr_end", 0], "never comes to 0"),
            ([*draw, "--noise", "shapes"], "give one of"), ([*draw, "--runs", "a:b"], "belong together"),
            (["sample", "--noise", "shapes"], "runs/tokenizer/ckpt.pt: no such file")]:
        assert text in stop(*words), words
    np.savez("a.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez("b.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(BadInput, match="both sides are statistics"):
        fid.main(["--real", "a.npz", "--fake", "b.npz", "--n", "5"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


# ------------------------------------------------------------------------------------------------------- the disk

def test_a_disk_that_fills_up_leaves_the_last_good_state(stop, disk, script, tokenizer, prior, vgg, tmp_path,
                                                         monkeypatch):
    save = runtime.Run.save

    def fill(self, step, *args, **state):
        disk(self.ckpt.stat().st_size // 2 if self.ckpt.exists() else resource.RLIM_INFINITY)
        save(self, step, *args, **state)
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Run, "save", fill)
        for words in (["train_tokenizer", *TINY, "--vgg", vgg], ["train_prior", "--tokenizer", tokenizer, *PRIOR],
                      ["train_vgg", *VGG]):
            out = tmp_path / words[0]
            error = stop(*words, "--save_every", 2, "--eval_every", 99, "--out", out)
            disk()
            assert "could not write" in error and ("full" in error or "large" in error), error
            assert "previous file is intact" in error or "best.pt" in error  # the prior's first one
            assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 2 and not list(out.glob("*.tmp"))

    words = ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "p"]
    disk(1000)
    assert "could not write" in stop(*words) and not list(tmp_path.glob("p/codes/*/chunks/*"))
    disk()
    words = ["sample", "--prior", prior, "--tokenizer", tokenizer, "--n", 40, "--device", "cpu",
             "--out", tmp_path / "s"]
    disk(1000)
    assert "could not write" in stop(*words)
    monkeypatch.setattr(data, "save_grid", lambda *_: None)  # enlarged, it is larger than the samples
    disk(40 * 16 * 16 * 3 + 700)  # room for the samples, none for the npz, which has labels too
    assert "could not write" in (error := stop(*words)) and "samples.npz" in error, error
    assert not (tmp_path / "s/samples.npz").exists()
    disk()
    monkeypatch.setattr(sample.Transformer, "generate", None)  # they are all there: none is drawn again
    script(*words)
    assert np.load(tmp_path / "s/samples.npz")["arr_0"].std((1, 2, 3)).min() > 0 and not list(tmp_path.glob("s/part*"))


def run_of(folder, **more):
    return runtime.Run(argparse.Namespace(out=str(folder), resume=True, tensorboard=False, **more), "vgg")


def test_a_line_is_logged_whole_or_left_out(disk, tmp_path):
    run = run_of(tmp_path)
    run.resume()
    run.log(1, "train", loss=1)
    run.save(2, model={})
    disk(run.metrics.stat().st_size + 20)
    with pytest.raises(OSError, match="File too large"):
        run.log(2, "train", loss=1)
    disk()
    run.log(2, "val", loss=1)  # it goes on nevertheless
    run = run_of(tmp_path)
    run.resume()
    assert lines(tmp_path, "train") == run.lines == [{"step": 1, "split": "train", "loss": 1.0}]


def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path):
    run = run_of(tmp_path)
    run.save(2, model={})
    good, late = b'{"step": 1, "split": "train"}\n', b'{"step": 3, "split": "val"}\n'
    for damage in (b'\0\0\0\xff}\n', b'[1]\n', b'{"step": 2}\n', b'{"step": "2", "split": "val"}\n', b"7\n"):
        run.metrics.write_bytes(good + damage + late)
        run.resume()
        assert run.lines == lines(tmp_path, "train") == [{"step": 1, "split": "train"}]


def test_a_validation_that_is_no_number_is_logged_and_resumed(script, tokenizer, tmp_path, monkeypatch, signal_in):
    words = ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "p", "--eval_every", 1, "--resume"]
    monkeypatch.setattr("train_prior.validate", lambda *args: float("nan"))
    signal_in(3)
    script(*words)
    assert [v["loss"] for v in lines(tmp_path / "p", "val")] == [None, None]  # JSON has no NaN
    monkeypatch.undo()
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 12})
    script(*words)
    assert torch.load(tmp_path / "p/best.pt", weights_only=True)["step"] > 2


def test_a_file_in_the_folders_place(stop, tokenizer, prior, vgg, tmp_path):
    (tmp_path / "file").write_text("")
    draw = ["sample", "--prior", prior, "--tokenizer", tokenizer, "--n", 2, "--device", "cpu"]
    for words in (["train_tokenizer", *TINY, "--vgg", vgg, "--out"], ["train_vgg", *VGG, "--out"],
                  ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--out"],
                  ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "q", "--codes"],
                  [*draw, "--out"], ["data", "--image_size", 8, "--workers", 0, "--n", 2, "--preview"],
                  ["data", "--image_size", 8, "--workers", 0, "--n", 2, "--preview", tmp_path / "x.png", "--out"]):
        error = stop(*words, tmp_path / "file/x")
        assert "file" in error and ("Not a directory" in error or "File exists" in error), error


def test_a_folder_that_may_not_be_read(tmp_path, photos, monkeypatch, stop):
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("dogs"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", deny)
    error = stop("data", "--data", photos)
    assert "Permission denied" in error and "dogs" in error
    monkeypatch.setattr(runtime.os, "replace", lambda *names: deny("dogs"))
    with pytest.raises(BadInput, match="Permission denied.*no part of it is left"):
        runtime.save_file(tmp_path / "a", lambda file: file.write(b"x"))
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize("error, text", [
    (OSError(errno.ENOSPC, "No space left on device", "a.png"), "No space left on device: 'a.png'"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "out of GPU memory: use a smaller batch")])
def test_faults_of_the_machine_are_one_sentence(stop, monkeypatch, error, text):
    def fail():
        raise error
    monkeypatch.setattr(data, "main", fail)
    assert text in stop("data")


def test_a_package_that_is_missing_is_named(stop, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "lmdb" in stop("data", "--data", f"lsun:{tmp_path}")


def test_our_own_faults_show_their_traceback(monkeypatch):
    def fail():
        raise RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size mismatch"):
        runtime.run(fail)


# --------------------------------------------------------------------------------------------------- used folders

def test_what_is_there_is_not_overwritten(stop, script, tokenizer, prior, vgg, tmp_path):
    runs = [["train_tokenizer", *TINY, "--vgg", vgg], ["train_vgg", *VGG], ["train_prior", *PRIOR, "--tokenizer",
                                                                          tokenizer]]
    draw = ["sample", "--prior", prior, "--tokenizer", tokenizer, "--n", 2, "--device", "cpu"]
    for words, text in [*((words, "already holds a run") for words in runs), (draw, "already holds samples")]:
        out = tmp_path / words[0]
        script(*words, "--out", out)
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert text in stop(*words, "--seed", 1, "--out", out)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------------------------------------- going on

@pytest.fixture
def sampling(script, prior, tokenizer, tmp_path, monkeypatch):
    """sampling("--seed", 1, out="a", die=4): draw seven samples, two at a time; killed when it would draw number 4.
    Gives the first samples of the batches that were drawn."""
    generate = sample.Transformer.generate

    def call(*words, out="cut", die=None):
        drawn = []

        def watch(self, ids, *args, **options):
            if die == ids[0]:
                raise Killed
            drawn.append(int(ids[0]))
            return generate(self, ids, *args, **options)
        monkeypatch.setattr(sample.Transformer, "generate", watch)
        with pytest.raises(Killed) if die else contextlib.nullcontext():
            script("sample", "--prior", prior, "--tokenizer", tokenizer, "--n", 7, "--batch_size", 2, "--device", "cpu",
                   "--out", tmp_path / out, *words)
        return drawn
    return call


def test_samples_go_on_after_a_kill(sampling, tmp_path, monkeypatch):
    """Killed between two batches, and at each of the files that they become."""
    sampling("--png", out="whole")
    assert sampling("--png", die=4) == [0, 2]
    first, = (tmp_path / "cut").glob("part-*")
    save_file, rmtree, moments = runtime.save_file, sample.shutil.rmtree, []

    def save(path, write):
        if path.name in moments:
            raise Killed
        save_file(path, write)

    def remove(path):
        if "rmtree" in moments:
            raise Killed
        rmtree(path)
    monkeypatch.setattr(runtime, "save_file", save)
    monkeypatch.setattr(sample.shutil, "rmtree", remove)
    for moment, left in (("grid.png", [4, 6]), ("sampler.json", []), ("samples.npz", []), ("rmtree", [])):
        moments[:] = [moment]
        assert sampling("--png", die=99) == left and first.exists()  # what is there is not drawn again
    moments.clear()
    assert sampling("--png") == [] and not first.exists()
    a, b = (np.load(tmp_path / out / "samples.npz") for out in ("whole", "cut"))
    assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"])
    for name in ("grid.png", "sampler.json", *(f"png/{i:06}.png" for i in range(7))):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_unfinished_samples_of_other_flags_are_not_mixed_in(sampling, tmp_path):
    sampling("--png", die=4)
    with contextlib.suppress(BadInput):  # refused, or drawn beside it
        sampling("--png", "--seed", 1, "--n", 3)
        images = np.load(tmp_path / "cut/samples.npz")["arr_0"]
        assert [np.array_equal(Image.open(file), image) for file, image in zip(
            sorted((tmp_path / "cut/png").iterdir()), images, strict=True)] == [True] * 3
        with pytest.raises(BadInput, match="already holds samples"):
            sampling("--png")
    sampling(out="later", die=4)
    with contextlib.suppress(BadInput):
        sampling("--png", out="later")
        assert len(list((tmp_path / "later/png").iterdir())) == 7


@pytest.mark.parametrize("name", ["train_tokenizer", "train_prior", "train_vgg"])
def test_a_validation_that_was_prevented_is_made_up_for(script, tokenizer, vgg, tmp_path, monkeypatch, signal_in, name):
    """A signal saves and does not wait for a validation; a kill may come in one. The next start makes up for both."""
    words = {"train_tokenizer": [*TINY, "--vgg", vgg], "train_vgg": VGG,
             "train_prior": [*PRIOR, "--tokenizer", tokenizer, "--codes", tmp_path / "codes"]}[name]
    module = importlib.import_module(name)
    validate, calls, allowed = module.validate, [], [99]

    def watch(*args):
        calls.append(1)
        if len(calls) > allowed[0]:
            raise Killed
        return validate(*args)
    monkeypatch.setattr(module, "validate", watch)

    def start(out="cut"):
        calls.clear()
        script(name, *words, "--iters", 6, "--save_every", 2, "--eval_every", 2, "--resume", "--out", tmp_path / out)

    def saved(out="cut"):
        return torch.load(tmp_path / out / "ckpt.pt", weights_only=True)
    start("whole")
    assert len(calls) == 3
    signal_in(2)
    start()
    assert saved()["step"] == 2 and not calls
    signal_in(None)
    for left, step in ((0, 2), (1, 4), (1, 6)):  # killed in the one that is made up for, in the next, in the last
        allowed[0] = left
        with pytest.raises(Killed):
            start()
        assert saved()["step"] == step
    allowed[0] = 99
    start()
    assert len(calls) == 1
    start()
    assert not calls
    assert lines(tmp_path / "whole", "val") == lines(tmp_path / "cut", "val")
    one, two = saved("whole"), saved()
    assert one.keys() == two.keys() and all(same(one[key], two[key]) for key in one if key != "args")


def test_kills_at_random_moments():
    """The long trial's first kills: all that trains, the code cache and the samples end as if undisturbed."""
    words = [sys.executable, ROOT / "tests/trials.py", "--kills", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^kill", done.stdout, re.M)) == 6


def test_damaged_and_made_up_files(tmp_path):
    """The long trial's first ones: cut, changed bits, wrong kinds, parts that do not fit, code in pickles."""
    try:
        rows = list(trials.fuzz(3, tmp_path / "fuzz", random.Random(0)))
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert len(rows) == 15
    for name, _, failures in rows:
        assert not failures, name


# ---------------------------------------------------------------------------------------------------- torchrun

STEADY = ["train_tokenizer.py", *TINY, "--iters", 12, "--lr", 1e-5, "--lr_end", 1e-5, "--save_every", 2,
          "--resume"]


def torchrun(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True, cwd=ROOT, **options)


def test_one_process_refuses_and_the_others_end_without_a_traceback(launch, tmp_path):
    done = launch(["train_tokenizer.py", *TINY, "--vgg", tmp_path / "none.pt", "--out", tmp_path / "run"], 2, False)
    assert done.returncode and "none.pt: no such file" in done.stderr
    assert "[rank" not in done.stderr  # torchrun's mark of a worker's traceback; its own comes always


def read_until(process, start):
    """Read lines up to one that begins with `start` (a string, or a tuple of them)."""
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"{start} never came")


def worker(agent, rank):
    """The process id of torchrun's worker of this rank."""
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("no such worker")


@pytest.fixture(scope="module")
def steady(vgg, tmp_path_factory):
    """Losses of an undisturbed run in one process."""
    out = tmp_path_factory.mktemp("steady")
    subprocess.run(list(map(str, [sys.executable, *STEADY, "--vgg", vgg, "--out", out])), cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    return {v["step"]: v["loss"] for v in lines(out, "train")}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_restarts_the_run_or_ends_it(vgg, tmp_path, steady, monkeypatch):
    """Two processes, --max_restarts 1. The first kill: restarted from the checkpoint. The second: torchrun ends. Then
    one process goes on where two ended."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # or the dead worker's address is met again
    words = [*STEADY, "--vgg", vgg, "--workers", 1, "--out", tmp_path / "run"]
    agent = torchrun("--standalone", "--nproc_per_node", 2, "--max_restarts", 1, *words)
    read_until(agent, "step 3/")
    os.kill(worker(agent, 1), signal.SIGKILL)
    read_until(agent, ("step 2/", "step 4/"))  # where the checkpoint is: 4, if the other one was ahead when it died
    read_until(agent, "step 7/")
    os.kill(worker(agent, 0), signal.SIGKILL)
    assert agent.wait(120) not in (0, None)  # no hang
    assert 4 <= torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] < 12
    subprocess.run(list(map(str, [sys.executable, *words])), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert {v["step"]: v["loss"] for v in lines(tmp_path / "run", "train")} == pytest.approx(steady, rel=1e-5)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_two_nodes_equal_one_and_end_when_one_dies(vgg, tmp_path, steady):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}",
             "--local_addr", "localhost", *STEADY, "--vgg", vgg, "--out", tmp_path / "run"]
    nodes = [torchrun(*words) for _ in range(2)]
    run = tmp_path / "run"
    deadline = time.monotonic() + 200
    while not (run / "ckpt.pt").exists() or len(lines(run, "train")) < 6:
        assert time.monotonic() < deadline and nodes[0].poll() is None
        time.sleep(0.05)
    ranks = [Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split() for node in nodes]
    losses = {v["step"]: v["loss"] for v in lines(run, "train")}
    os.kill(nodes[1].pid, signal.SIGKILL)  # a machine that is gone: torchrun and its worker
    os.kill(int(ranks[1][0]), signal.SIGKILL)
    assert nodes[0].wait(120) not in (0, None) and nodes[1].wait(10)
    assert losses == pytest.approx({step: steady[step] for step in losses}, rel=1e-5)


def test_processes_that_see_different_checkpoints(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    monkeypatch.setattr(runtime, "gather_rows", lambda step: torch.tensor([-1, 4]))
    with pytest.raises(BadInput, match="a disk that they share"):
        run.resume()


# ----------------------------------------------------------------------------------------------------- images

def odd_images(folder):
    """name -> the size under which it must be read, or None where it must be refused by name."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    picture.save(folder / "whole.png")
    raw = (folder / "whole.png").read_bytes()
    picture.save(folder / "named.jpg", "PNG")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (30_000, 3)).save(folder / "wide.png")
    Image.new("L", (3, 30_000)).save(folder / "high.png")
    frames = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(4)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "sixteen.tiff")
    Image.new("1", (9, 9)).save(folder / "bit.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "zeros.png").write_bytes(bytes(500))
    (folder / "cut.png").write_bytes(raw[:len(raw) // 2])
    (folder / "text.jpg").write_text("<html>not found</html>")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (12_000, 10_000)).save(folder / "large.png")
    Image.fromarray(np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)).save(folder / "floats.tiff")
    Image.fromarray(np.full((9, 9), 2**30, np.int32)).save(folder / "thirtytwo.tiff")
    picture.save(folder / "postscript.jpg", "EPS")
    return {"whole.png": (30, 20), "named.jpg": (30, 20), "dot.png": (1, 1), "wide.png": (30_000, 3),
            "high.png": (3, 30_000), "animated.gif": (9, 9), "animated.webp": (9, 9), "sixteen.png": (9, 9),
            "sixteen.tiff": (9, 9), "bit.png": (9, 9), "empty.jpg": None, "zeros.png": None, "cut.png": None,
            "text.jpg": None, "bomb.png": None, "large.png": None, "floats.tiff": None, "thirtytwo.tiff": None,
            "postscript.jpg": None}


def test_odd_images_are_read_or_named_and_counted(tmp_path, capsys, stop, recwarn, monkeypatch):
    programs = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: programs.append(args))
    (tmp_path / "odd").mkdir()
    wanted = odd_images(tmp_path / "odd")
    (tmp_path / "odd/photo.jfif").write_bytes((tmp_path / "odd/whole.png").read_bytes())
    source = data.Folder(tmp_path / "odd")
    assert "note: 1 file(s)" in capsys.readouterr().out
    assert len(source) == len(wanted)
    refused = []
    for i in range(len(source)):
        name = Path(source.name(i)).name
        try:
            image = source.load(i)
            assert image.mode == "RGB" and image.size == wanted[name], name
            for crop in data.CROPS:
                assert data.augment(image, 8, crop, np.random.default_rng(i)).shape == (8, 8, 3)
        except data.Unreadable as error:
            assert wanted[name] is None and name in str(error)
            refused.append(name)
        if name.startswith("sixteen"):
            assert np.asarray(image).max() == 40_000 // 257
        if name.startswith("animated"):
            assert np.asarray(image).max() <= 1  # the first frame
    assert not programs  # PostScript is a language: none of it is run
    assert sorted(refused) == sorted(name for name, size in wanted.items() if size is None)
    bad = data.Bad(source)
    with pytest.raises(BadInput, match="9 of 19 images can't be read"):
        for *_, index in data.train_loader(data.TrainImages(source, 8, "random", 0), type(
                "A", (), dict(batch_size=19, accum=1, iters=1, workers=0)), 0, torch.device("cpu")):
            bad(index)
    (tmp_path / "odd" / os.fsdecode(b"\xff.jpg")).write_bytes(b"")  # a name that is no text, and must be printed
    stop("data", "--data", tmp_path / "odd", "--image_size", 8, "--workers", 0, "--preview", tmp_path / "p.png")
    with pytest.raises(BadInput, match="a metric skips no unreadable image"):
        list(fid.Images(str(tmp_path / "odd"), 1))


def test_a_changed_pixel_of_samples_is_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((40, 16, 16, 3), np.uint8))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    assert not fid.Samples(str(tmp_path / "a.npz")).load(3).getbbox()
    raw[20_000] = 1
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(BadInput, match="arr_0.npy is damaged"):
        fid.Samples(str(tmp_path / "a.npz"))


def test_a_damaged_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    env = lmdb.open(str(tmp_path / "a"), map_size=1 << 24)
    with env.begin(write=True) as transaction:
        for i in range(40):
            file = io.BytesIO()
            draw(i, i % 10, 40).save(file, "PNG")
            transaction.put(f"{i}".encode(), file.getvalue())
    env.close()
    raw = (tmp_path / "a/data.mdb").read_bytes()
    for name, content in (("cut", raw[:len(raw) // 2]), ("empty", b""), ("text", b"x" * 10_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}"):
            data.open_source(f"lsun:{tmp_path / name}")


# ---------------------------------------------------------------------------------------------------- numbers

def test_a_bad_loss_of_a_prior_is_skipped(script, tokenizer, tmp_path, monkeypatch):
    words = ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--save_every", 2, "--out"]
    loss, calls = sample.Transformer.loss, []

    def poison(self, *args):
        total, count = loss(self, *args)
        calls.append(self.training)
        return total * (torch.inf if self.training and calls.count(True) == 2 else 1), count
    monkeypatch.setattr(sample.Transformer, "loss", poison)
    script(*words, tmp_path / "one")
    state = torch.load(tmp_path / "one/ckpt.pt", weights_only=True)
    assert all(v.isfinite().all() for v in state["model"].values())
    assert [v["skipped"] for v in lines(tmp_path / "one", "train")] == [0, 1, 1, 1]


def test_weights_that_are_not_finite_are_never_saved(script, tmp_path, monkeypatch):
    """One bad image batch leaves the weights of train_vgg.py alone, but not the statistics of its batch norm."""
    words = ["train_vgg", *VGG, "--save_every", 2, "--log_every", 1, "--eval_every", 99, "--out", tmp_path / "run"]
    perturb, calls = importlib.import_module("train_vgg").perturb, []

    def poison(x, generator):
        calls.append(1)
        return perturb(x, generator) * (float("inf") if len(calls) == 3 else 1)
    monkeypatch.setattr("train_vgg.perturb", poison)
    with pytest.raises(BadInput, match="not finite"):
        script(*words)
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())
    monkeypatch.setattr("train_vgg.perturb", perturb)
    script(*words, "--resume")
    assert lines(tmp_path / "run", "val")[-1]["loss"] > 0


def test_constant_images_one_empty_class_and_batches_of_one(script, vgg, tmp_path, capsys):
    for name in ("black", "grey", "none"):
        (tmp_path / "flat" / name).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"flat/black/{i}.png")
        Image.new("L", (16, 16), 128).save(tmp_path / f"flat/grey/{i}.png")
    one = ["--batch_size", 1, "--data", tmp_path / "flat", "--val", tmp_path / "flat"]
    script("train_tokenizer", *TINY, "--vgg", vgg, *one, "--out", tmp_path / "tokenizer")
    out = capsys.readouterr().out
    assert "warning: only" in out  # a codebook of which next to nothing is used
    values = [*lines(tmp_path / "tokenizer", "train"), *lines(tmp_path / "tokenizer", "val")]
    assert all(v is not None for line in values for v in line.values())
    script("train_vgg", *VGG, *one, "--batch_size", 2, "--out", tmp_path / "vgg")
    for kind in ("ar", "nar"):
        script("train_prior", *PRIOR, "--tokenizer", tmp_path / "tokenizer/ckpt.pt", *one, "--kind", kind, "--out",
               tmp_path / kind)
        assert all(v["loss"] >= 0 for v in lines(tmp_path / kind, "train"))
        script("sample", "--prior", tmp_path / kind / "ckpt.pt", "--tokenizer", tmp_path / "tokenizer/ckpt.pt",
               "--n", 1, "--device", "cpu", "--out", tmp_path / f"samples-{kind}")
    result = fid.main(["--real", str(tmp_path / "flat"), "--tokenizer", str(tmp_path / "tokenizer/ckpt.pt"),
                       "--features", str(vgg), "--workers", "0", "--device", "cpu"])
    assert result["FD"] >= 0 and result["codes_used"] >= 1


def test_a_codebook_of_which_all_codes_are_dead():
    torch.manual_seed(0)
    model = vq.VQModel(channels=(16, 16), z_dim=8, codebook_size=16)
    model.quantizer.codebook.data.fill_(1e4)  # all the same, and far from everything
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    x_hat, indices, losses = model(x)
    assert (indices == indices[0, 0, 0]).all() and all(value.isfinite() for value in losses.values())
    (x_hat.mean() + losses["vq"]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    usage, perplexity, H = vq.usage_and_perplexity(torch.bincount(indices.flatten(), minlength=16))
    assert (usage, perplexity, H) == (1 / 16, 1.0, 0.0)
