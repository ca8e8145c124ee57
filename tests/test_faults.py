"""What happens to a run of days, and what people type: kills, full disks, broken files and numbers, wrong flags.

The long versions of these trials are in trials.py."""
import contextlib
import errno
import gc
import importlib
import io
import json
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
from conftest import ROOT
from PIL import EpsImagePlugin, Image
from test_prior import PRIOR, save_tokenizer
from test_train_tokenizer import TINY, WEIGHTS, lines, same

import data
import fid
import runtime
import sample
import train_tokenizer
import vq
from runtime import BadInput

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "runtime.Parser(" in path.read_text())
NEEDED = {"train_prior": ["--tokenizer", "T"], "fid": ["--real", "A"]}  # flags that must be there
VGG = ["--image_size", 16, "--widths", *[8] * 5, "--batch_size", 8, "--workers", 0, "--iters", 6, "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(data.Shapes, "SIZES", {"train": 60, "val": 12})


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer.pt")


@pytest.fixture
def stop(script, capsys):
    """stop("sample", "--n", 0): the one line on stderr with which the script ends, by exit code 2."""
    def call(name, *words):
        with pytest.raises(SystemExit) as ended:
            runtime.run(lambda: script(name, *words))
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
        del ended
        gc.collect()  # what the script held goes with its frames, as it does when a process ends: its locks, too
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

class Caught(Exception):
    pass


def parser_of(name, monkeypatch):
    """The parser that a script makes."""
    def catch(self, words=None):
        raise Caught(self)
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Parser, "parse_args", catch)
        patch.setattr(sys, "argv", [f"{name}.py"])
        patch.setattr(os, "cpu_count", lambda: 64)
        module = importlib.import_module(name)
        with pytest.raises(Caught) as caught:
            module.main()
    return caught.value.args[0]


def flags(parser):
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_has_a_help_text(name, monkeypatch):
    text = (ROOT / f"{name}.py").read_text()  # and what it imports, where some of the shared flags are read
    files = [ROOT / f"{module}.py" for module in re.findall(r"^(?:import|from) (\w+)", text, re.M)]
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
        wrong = [] if action.nargs == 0 else [""]
        if action.type or action.choices:
            wrong += ["x", "nan", "inf", "-1", "1e400", "-0.5"]
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
        with pytest.raises(BadInput, match="empty"):
            parser.parse_args([*NEEDED.get(name, []), f"{flag}="])
    assert "unrecognized" in stop(name, *NEEDED.get(name, []), "--resme")
    assert not list(tmp_path.iterdir())  # before any work


def test_flags_that_contradict_are_refused(stop, tmp_path, monkeypatch, vgg):
    monkeypatch.chdir(tmp_path)
    prior = ["train_prior", "--tokenizer", "T"]
    draw = ["sample", "--prior", "P", "--tokenizer", "T"]
    for words, text in [
            (["train_tokenizer", "--alpha", 1, "--perceptual_layers", "logit"], "two ways"),
            (["train_tokenizer", "--phase", 2, "--init", "x", "--beta", 1], "--beta: phase 2 has no VQ loss"),
            (["train_tokenizer", "--codebook", "none", "--gamma", 1], "no entropy term"),
            (["train_tokenizer", "--image_size", 4, "--channels", 16, "--vgg", vgg], "too small for the network"),
            (["train_vgg", "--batch_size", 1], "batch of one"),
            (["train_vgg", "--batch_size", 4, "--accum", 4], "batch of one"),
            ([*prior, "--crop", "center", "--views", 2], "one view"), ([*prior, "--lr_end", 0], "never comes to 0"),
            (["train_prior", "--tokenizer", ""], "is empty"),
            ([*draw, "--noise", "shapes"], "give one of"), ([*draw, "--sigma", 1], "--sigma has no part in --prior"),
            ([*draw, "--runs", "a:b"], "belong together"),
            (["sample", "--noise", "shapes", "--tokenizer", "T", "--png"], "--png has no part in --noise"),
            (["data", "--data", tmp_path, "--split", "val"], "--split is for shapes"),
            (["fid", "--real", "A", "--fake", ""], "is empty")]:
        assert text in stop(*words), words
    np.savez("a.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez("b.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(BadInput, match="both statistics"):
        fid.main(["--real", "a.npz", "--fake", "b.npz", "--n", "5"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def readme_defaults():
    """README's table of flags: first column -> {flag: the words of its default}."""
    section = (ROOT / "README.md").read_text().split("## Flags and defaults")[1].split("\n## ")[0]
    rows = [row.strip("| ").split("|") for row in section.splitlines() if row.startswith("| ")]
    return {name.replace("`", "").strip(): {words.split()[0][2:]: words.split()[1:] for words in text.split("`")
                                            if words.startswith("--")} for name, text in rows}


@pytest.mark.parametrize("name, row, words", [
    *[(name, f"{name}.py", []) for name in SCRIPTS],
    ("train_tokenizer", "with --phase 2", ["--phase", "2"]), ("train_prior", "with --kind nar", ["--kind", "nar"])])
def test_the_readme_has_every_flag_with_its_default(name, row, words, monkeypatch):
    table, parser = readme_defaults(), parser_of(name, monkeypatch)
    actions = {action.dest: action for action in flags(parser)}
    told, defaults = table[row], {dest: action.default for dest, action in actions.items()}
    if name.startswith("train"):  # the script fills in what depends on other flags
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *NEEDED.get(name, []), *words])
        args = importlib.import_module(name).parse()
        if name == "train_tokenizer" and not words:
            train_tokenizer.settle_shape(args)
        defaults = vars(args)
    if not words:  # those with words have what differs
        told = {**(table["all that train"] if name.startswith("train") else {}), **told}
        assert told.keys() == defaults.keys()
    for dest, value in told.items():
        if not value:  # off, not given, or there is none
            assert not defaults[dest] or actions[dest].required, dest
        elif defaults[dest] is None:  # known only when the checkpoint is: as the help text says
            assert f"default {value[0]}" in actions[dest].help, dest
        else:
            assert vars(parser.parse_args([*NEEDED.get(name, []), f"--{dest}", *value]))[dest] == defaults[dest], dest


# ------------------------------------------------------------------------------------------------------- the disk

def test_a_disk_that_fills_up_leaves_the_last_good_state(stop, disk, script, tokenizer, vgg, tmp_path, monkeypatch):
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
    assert "could not make room" in stop(*words)
    disk()
    script(*words)
    words = ["sample", "--prior", tmp_path / "p/ckpt.pt", "--tokenizer", tokenizer, "--n", 4, "--device", "cpu",
             "--out", tmp_path / "s"]
    disk(1000)
    assert "could not make room" in stop(*words)
    disk(4 * 16 * 16 * 3)  # room for the samples, none for the npz
    assert "could not write" in stop(*words)
    disk()
    monkeypatch.setattr(sample.Transformer, "generate", None)  # they are all there: none is drawn again
    script(*words)
    assert np.load(tmp_path / "s/samples.npz")["arr_0"].std((1, 2, 3)).min() > 0 and not (tmp_path / "s/part").exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS")
def test_room_is_really_made(tmp_path):
    runtime.Rows(tmp_path, {}, 4, codes=((1000, 1000), np.uint16)).close()
    assert (tmp_path / "codes.bin").stat().st_blocks * 512 >= 2_000_000  # a sparse file would be a bus error later


def test_a_line_is_logged_whole_or_not(disk, tmp_path):
    run = runtime.Run(runtime.argparse.Namespace(out=str(tmp_path), resume=False, tensorboard=False), "vgg")
    run.log(1, "train", loss=1)
    disk(run.metrics.stat().st_size + 20)
    with pytest.raises(BadInput, match="could not write .*metrics.jsonl"):
        run.log(2, "train", loss=1)
    disk()
    run.log(3, "train", loss=1)
    assert [v["step"] for v in lines(tmp_path, "train")] == [1, 3]


def test_a_damaged_log_does_not_keep_a_run_from_going_on(tmp_path, capsys):
    args = runtime.argparse.Namespace(out=str(tmp_path), resume=True, tensorboard=False)
    run = runtime.Run(args, "vgg")
    run.save(2, model={}, config={}, labels={})
    good, late = b'{"step": 1, "split": "train"}\n', b'{"step": 3, "split": "val"}\n'
    run.metrics.write_bytes(good + b'\0\0\0\xff}\n[1]\n{"step": 2}\n' + late)
    run.resume()
    assert run.logged == {(1, "train")} and lines(tmp_path, "train") == [{"step": 1, "split": "train"}]
    assert "3 damaged line(s)" in capsys.readouterr().out


def test_a_file_in_the_folders_place(stop, tokenizer, vgg, tmp_path, script):
    (tmp_path / "file").write_text("")
    script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "p")
    draw = ["sample", "--prior", tmp_path / "p/ckpt.pt", "--tokenizer", tokenizer, "--n", 2, "--device", "cpu"]
    for words in (["train_tokenizer", *TINY, "--vgg", vgg, "--out"], ["train_vgg", *VGG, "--out"],
                  ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--out"],
                  ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "q", "--codes"],
                  [*draw, "--out"], ["data", "--image_size", 8, "--workers", 0, "--n", 2, "--preview"],
                  ["data", "--image_size", 8, "--workers", 0, "--n", 2, "--preview", tmp_path / "x.png", "--out"]):
        error = stop(*words, tmp_path / "file/x")
        assert "file" in error and ("Not a directory" in error or "File exists" in error), error


def test_a_folder_that_may_not_be_read(tmp_path, photos, monkeypatch):
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("dogs"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(BadInput, match="dogs can't be read .Permission denied"):
        data.Folder(photos)
    monkeypatch.setattr(runtime.os, "replace", lambda *names: deny("dogs"))
    with pytest.raises(BadInput, match="Permission denied.*nothing was there before"):
        runtime.save_file(tmp_path / "a", lambda file: file.write(b"x"))


@pytest.mark.parametrize("error, text", [
    (OSError(errno.ENOSPC, "No space left on device", "a.png"), "No space left on device: 'a.png': mend the disk"),
    (MemoryError("Unable to allocate 9 TiB"), "Unable to allocate 9 TiB: give it more memory"),
    (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory.: give it"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "(pid 7) is killed"),
    (OSError("Caught OSError in worker.\nTraceback (most recent ...):\nOSError: [Errno 5] I/O"), "OSError: [Errno 5]")])
def test_faults_of_the_machine_are_one_sentence(stop, monkeypatch, error, text):
    def fail():
        raise error
    monkeypatch.setattr(data, "main", fail)
    assert text in stop("data")


def test_our_own_faults_show_their_traceback(monkeypatch):
    def fail():
        raise RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size mismatch"):
        runtime.run(fail)


def test_a_killed_data_worker_ends_the_run(stop, tmp_path, vgg, monkeypatch):
    load, main = data.Shapes.load, os.getpid()

    def die(self, i, at_least=0):
        if os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, i, at_least)
    monkeypatch.setattr(data.Shapes, "load", die)
    words = ["train_tokenizer", *TINY, "--vgg", vgg, "--workers", 1, "--out", tmp_path / "run"]
    assert "DataLoader worker" in stop(*words)


def test_memory_that_no_machine_has(stop, tmp_path, vgg):
    words = ["train_tokenizer", *TINY, "--vgg", vgg, "--out", tmp_path / "run", "--z_dim", 2**31 - 1]
    assert "memory" in stop(*words)


# ------------------------------------------------------------------------------------------------------- the lock

def test_a_lock_does_not_live_on_in_a_forked_child(tmp_path):
    held = runtime.lock(tmp_path)
    ready, started = os.pipe()
    child = os.fork()
    if not child:
        os.write(started, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)  # the child has run what it runs after a fork
    try:
        with pytest.raises(BadInput, match="in use by another run"):
            runtime.lock(tmp_path)
        held.close()  # as when the run is killed, and its data workers do not know it yet
        runtime.lock(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_runs_into_one_folder(stop, script, tokenizer, vgg, tmp_path):
    out = tmp_path / "run"
    script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "p")
    draw = ["sample", "--prior", tmp_path / "p/ckpt.pt", "--tokenizer", tokenizer, "--n", 2, "--device", "cpu"]
    with runtime.lock(out), runtime.lock(tmp_path / "codes/train"):
        for words in (["train_tokenizer", *TINY, "--vgg", vgg, "--out", out], ["train_vgg", *VGG, "--out", out],
                      ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", out], [*draw, "--out", out],
                      ["train_prior", *PRIOR, "--tokenizer", tokenizer, "--codes", tmp_path / "codes", "--out",
                       tmp_path / "other"]):
            assert "in use by another run" in stop(*words)
        assert [p.name for p in out.iterdir()] == ["lock"]
    script(*draw, "--out", out)
    assert "already holds samples" in stop(*draw, "--out", out)


# ---------------------------------------------------------------------------------------------------- going on

def test_samples_go_on_after_a_kill(script, stop, tokenizer, tmp_path, monkeypatch):
    script("train_prior", *PRIOR, "--tokenizer", tokenizer, "--out", tmp_path / "p")
    draw = ["sample", "--prior", tmp_path / "p/ckpt.pt", "--tokenizer", tokenizer, "--n", 7, "--batch_size", 2,
            "--device", "cpu", "--png"]
    script(*draw, "--out", tmp_path / "whole")
    generate, calls = sample.Transformer.generate, []

    def die(self, ids, *args, **options):
        calls.append(ids[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, ids, *args, **options)
    monkeypatch.setattr(sample.Transformer, "generate", die)
    with pytest.raises(KeyboardInterrupt):
        script(*draw, "--out", tmp_path / "cut")
    assert "begun with another `seed` (0, not 1)" in stop(*draw, "--seed", 1, "--out", tmp_path / "cut")
    script(*draw, "--out", tmp_path / "cut")
    assert calls == [0, 2, 4, 2, 4, 6]  # the second batch was drawn, but not yet written
    a, b = (np.load(tmp_path / out / "samples.npz") for out in ("whole", "cut"))
    assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"])
    assert len(list((tmp_path / "cut/png").iterdir())) == 7


def test_a_validation_that_a_kill_prevented_is_made_up_for(script, vgg, tmp_path, monkeypatch):
    words = ["train_tokenizer", *TINY, "--vgg", vgg, "--save_every", 2, "--eval_every", 2, "--resume", "--out"]
    script(*words, tmp_path / "whole")
    validate = train_tokenizer.validate
    for step in (4, 6):  # killed twice: at a validation in the middle, and at the last one
        def die(*args, step=step):
            if args[5].name == f"{step:07}.png":
                raise KeyboardInterrupt
            return validate(*args)
        monkeypatch.setattr(train_tokenizer, "validate", die)
        with pytest.raises(KeyboardInterrupt):
            script(*words, tmp_path / "cut")
    monkeypatch.setattr(train_tokenizer, "validate", validate)
    script(*words, tmp_path / "cut")
    assert lines(tmp_path / "whole", "val") == lines(tmp_path / "cut", "val")
    one, two = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True) for out in ("whole", "cut"))
    assert all(same(one[key], two[key]) for key in WEIGHTS)


def test_kills_at_random_moments():
    """The long trial's first kills: all that trains, the code cache and the samples end as if undisturbed."""
    words = [sys.executable, ROOT / "tests/trials.py", "--kills", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^kill", done.stdout, re.M)) == 6


def test_damaged_and_made_up_files(tmp_path):
    """The long trial's first ones: cut, changed bits, wrong kinds, code in pickles, absurd shapes."""
    try:
        rows = list(trials.fuzz(3, tmp_path / "fuzz", random.Random(0)))
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert len(rows) == 21
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
    run = runtime.Run(runtime.argparse.Namespace(out=str(tmp_path), resume=True, tensorboard=False), "vgg")
    monkeypatch.setattr(runtime, "gather_rows", lambda step: torch.tensor([-1, 4]))
    with pytest.raises(BadInput, match="a disk that all machines share"):
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
    assert "note: 1 file(s) or folder(s)" in (out := capsys.readouterr().out) and "photo.jfif" in out
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
    with pytest.raises(BadInput, match="unreadable image .*: a metric skips none"):
        images = fid.Images(str(tmp_path / "odd"), 1)
        [images.read(j) for j in range(len(images))]


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
            data.draw(i, i % 10, 40).save(file, "PNG")
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
    perturb, calls = __import__("train_vgg").perturb, []

    def poison(x, generator):
        calls.append(1)
        return perturb(x, generator) * (float("inf") if len(calls) == 3 else 1)
    monkeypatch.setattr("train_vgg.perturb", poison)
    with pytest.raises(BadInput, match="not finite after step 4"):
        script(*words)
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert state["step"] == 2 and all(v.isfinite().all() for v in state["model"].values())
    monkeypatch.setattr("train_vgg.perturb", perturb)
    script(*words, "--resume")
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["loss"] > 0


def test_constant_images_one_empty_class_and_batches_of_one(script, vgg, tmp_path, capsys):
    for name in ("black", "grey", "none"):
        (tmp_path / "flat" / name).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"flat/black/{i}.png")
        Image.new("L", (16, 16), 128).save(tmp_path / f"flat/grey/{i}.png")
    one = ["--batch_size", 1, "--data", tmp_path / "flat", "--val", tmp_path / "flat"]
    script("train_tokenizer", *TINY, "--vgg", vgg, *one, "--out", tmp_path / "tokenizer")
    out = capsys.readouterr().out
    assert "none/" in out and "warning: only" in out  # the empty class; a codebook of which next to nothing is used
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
