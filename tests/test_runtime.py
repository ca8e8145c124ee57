"""runtime.py: files that are replaced as a whole, run folders, flags, steps, how a script ends."""
import argparse
import math
import multiprocessing
import os
import re
import resource
import signal
import sys

import pytest
import torch
import train_vgg
from conftest import ROOT, lines, same

import data
import runtime
import sample
import train_tokenizer
from miniature.shapes import Shapes

SCRIPTS = {path.stem: path for folder in (ROOT, ROOT / "miniature", ROOT / "benchmarks")
           for path in sorted(folder.glob("*.py")) if "runtime.parser(" in path.read_text()}


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """flags("--lr", 1): the flags of train_vgg.py."""
    def call(*words):
        words = ["train_vgg.py", "--out", tmp_path / "run", "--iters", 10, *words]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        return train_vgg.parse()
    return call


@pytest.fixture
def run(flags, monkeypatch):
    """run("--lr", 1): the Run of such flags, resumed. It handles no signals."""
    def call(*words, **parts):
        found = runtime.Run(flags(*words), "vgg", shown=("loss",))
        net = torch.nn.Linear(2, 2)
        found.resumed = found.resume({"content": "1234", "extra": "kept"},
                                     **{"model": net} | parts)
        return found
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)
    return call


# ------------------------------------------------------------------------------------- run folders

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(),
                                   RuntimeError("[enforce fail] PytorchStreamWriter: No space")])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, error):
    path = tmp_path / "new" / "ckpt.pt"
    runtime.save_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        file.flush()
        raise error
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        runtime.save_file(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]
    if not isinstance(error, KeyboardInterrupt):
        assert str(path) in ended.value.code and "No space" in ended.value.code


def test_a_run_resumes_from_its_checkpoint_and_forgets_later_log_lines(run, capsys):
    run().log(0, "train", loss=0)  # killed before its first checkpoint
    net, other = torch.nn.Linear(99, 99), torch.nn.Linear(99, 99)
    one = run("--resume", model=net)
    assert one.resumed == (0, {}) and one.metrics.read_text() == ""
    for step in (1, 2, 3):
        one.log(step, "train", loss=float("nan") if step == 2 else 1 / 3)
    one.best, one.validated, one.skipped = 1.5, 2, 7
    one.save(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # as a full disk
    with pytest.raises(SystemExit, match="cannot write .*ckpt.pt"):
        one.save(3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with open(one.metrics, "a") as file:
        file.write('{"step": 2, "spl')  # killed in the middle of a line
    two = run("--resume", "--eval_every", 1, model=other)
    step, state = two.resumed
    assert (step, two.saved, two.best, two.validated, two.skipped) == (2, 2, 1.5, 2, 7)
    assert same(net.state_dict(), other.state_dict()) and state["extra"] == "kept"
    assert not two.validation_is_due(2) and two.validation_is_due(3)
    assert lines(two.out, "train") == [{"step": 1, "split": "train", "loss": 0.333333},
                                       {"step": 2, "split": "train", "loss": None}]
    other.bias.data[0] = math.nan
    two.save(3)
    assert "step 3 not saved" in capsys.readouterr().out and two.saved == 2


def test_processes_start_from_the_state_of_process_0(run, monkeypatch):
    net = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(net.parameters(), fused=True)
    net(torch.ones(1, 2)).sum().backward()
    adam.step()
    run(model=net, opt=adam).save(3)
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    monkeypatch.setattr(runtime, "all_reduce_max", float)
    monkeypatch.setattr(runtime.dist, "broadcast", lambda tensor, source: tensor.fill_(7 + source))
    run("--resume", model=net, opt=adam)
    tensors = [*net.state_dict().values(), *(t for s in adam.state.values() for t in s.values())]
    assert len(tensors) == 8 and all((tensor == 7).all() for tensor in tensors)


def test_a_signal_to_any_process_waits_while_steps_are_skipped(run, monkeypatch):
    one = run()
    monkeypatch.setattr(runtime, "all_reduce_max", lambda mine: max(mine, 143))
    one.skipped_in_a_row = 1
    one.stop_if_requested(4)  # there is nothing to save after a skipped step
    one.skipped_in_a_row = 0
    with pytest.raises(SystemExit, match="143"):
        one.stop_if_requested(5)
    assert one.saved == 5


def test_later_signals_belong_to_the_first_request(flags, monkeypatch):
    """Only a second Ctrl-C, seconds later, exits at once. nohup ignores SIGHUP."""
    now = [100.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    for action, number in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
        signal.signal(signal.SIGHUP, action)
        one = runtime.Run(flags(), "vgg", shown=())
        one.stop_if_requested(0)
        signal.raise_signal(signal.SIGHUP)
        assert one.signal == number
    for number, seconds in ((signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGTERM, 60)):
        now[0] += seconds
        signal.raise_signal(number)
        assert one.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_tensorboard_gets_the_same_values(run):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    one = run("--tensorboard")
    one.log(3, "val", loss=1.5, psnr=20)
    events = board.EventAccumulator(str(one.out)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(3, 1.5)]


# ------------------------------------------------------------------------------------------- flags

def test_a_run_resumes_with_its_flags_and_notes_what_changes(flags, run, tmp_path, capsys,
                                                                monkeypatch):
    one = run("--lr", 0.5, "--crop", "center", "--grad_accum", 2, "--resume")
    one.args.gone = 3  # a flag that the script no longer has
    del one.args.seed  # one that it did not have yet
    one.save(3)
    capsys.readouterr()
    assert vars(flags("--resume")) == vars(one.args) | {"seed": 0}
    assert capsys.readouterr().out == ""
    args = flags("--resume", "--iters", 20, "--lr", 0.25, "--grad_accum", 2)
    assert (args.iters, args.lr, args.grad_accum, args.crop) == (20, 0.25, 2, "center")
    iters, lr = capsys.readouterr().out.splitlines()
    assert re.search("--iters.* 10.* 20", iters) and re.search("--lr.* 0.5.* 0.25", lr)
    args = flags("--resume", "--out", tmp_path / "none", "--lr", 0.5)  # a new run
    assert (args.lr, args.grad_accum) == (0.5, 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename("runs/vgg")  # resumes where it is, not where it was
    monkeypatch.setattr(sys, "argv", ["train_vgg.py", "--resume"])  # with the default --out
    args = train_vgg.parse()
    assert (args.lr, args.out) == (0.5, "runs/vgg")


def test_a_closed_terminal_does_not_end_a_run(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w", buffering=1))
    runtime.print0("step 1")
    assert sys.stdout.name == os.devnull


# Flags that can't be 0 either, unless it is their default.
POSITIVE = set("iters batch_size grad_accum log_every eval_every image_size lr z_dim codebook_size "
               "channels views count temperature top_p decode_steps sigma".split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_explained_and_rejects_wrong_numbers(name, script, monkeypatch,
                                                                    capsys):
    tables = *sample.DEFAULTS.values(), train_tokenizer.ARCH_FLAGS  # read by getattr
    read = {flag for table in tables for flag in table}
    for path in (SCRIPTS[name], ROOT / "runtime.py", ROOT / "data.py"):
        text = path.read_text()
        read |= {*re.findall(r"\bargs\.(\w+)", text),
                 *re.findall(r'(?:given|vars\(args\))\.get\("(\w+)"', text)}
    parser, made = runtime.parser, []
    monkeypatch.setattr(runtime, "parser", lambda doc: made.append(parser(doc)) or made[-1])
    with pytest.raises(SystemExit, match="0"):
        script(name, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert name == "data" or "then cpu (default: auto)" in text  # --device
    assert name != "train_tokenizer" or "--lr 5e-05" in text  # of phase 2
    for flag in made[0]._actions[1:]:  # the first is --help
        assert flag.dest in read and flag.help, flag
        if flag.type and name != "bench" and flag.dest not in ("phase", "alpha"):
            wrong = ["-1", "nan", "inf", "x"]
            wrong += ["0"] * (flag.dest in POSITIVE and flag.default != 0)
            for number in wrong:
                with pytest.raises((ValueError, argparse.ArgumentTypeError)):
                    print(flag.dest, number, flag.type(number))


# ---------------------------------------------------------------------- steps, numbers, processes

def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(run):
    nets = [torch.nn.Linear(3, 1, bias=False) for _ in range(2)]
    adams = [torch.optim.Adam(net.parameters(), 9.0, fused=True) for net in nets]
    one = run()
    for n, gradients in enumerate(((1.0, -2.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 1.0))):
        before = [net.weight.clone() for net in nets]
        for net, gradient in zip(nets, gradients):
            net.weight.grad = torch.full((1, 3), gradient)
        norms = one.step(adams, 0.25)
        moved = [(net.weight - weight).mean().item() for net, weight in zip(nets, before)]
        assert all(net.weight.grad is None for net in nets)
        if n == 0:  # Adam's first step is as long as the learning rate
            assert norms == pytest.approx([3 ** 0.5, 2 * 3 ** 0.5])
            assert moved == pytest.approx([-0.25, 0.25], rel=1e-4)
        assert all(moved) if n in (0, 3) else moved == [0, 0]  # both or none
        assert (one.skipped, one.skipped_in_a_row) == ((0, 0), (1, 1), (2, 2), (2, 0))[n]


def test_averages_are_over_steps_without_nan():
    averages = runtime.Averages()
    for loss in (1.0, math.nan, 4.0, 4.0):
        averages.add(loss=torch.tensor(loss, requires_grad=True))
    averages.add(r1=torch.tensor(2, dtype=torch.bfloat16))  # not at every step
    assert averages.pop() == {"loss": 3, "r1": 2}
    averages.add(loss=torch.tensor(2.0))  # since the last call
    assert averages.pop() == {"loss": 2}


def test_cosine_and_eval_mode():
    assert [runtime.cosine(s, 100, 1.0, 0.5) for s in (0, 50, 100)] == pytest.approx([1, .75, .5])
    net = torch.nn.Linear(2, 2)
    for training in (True, False):
        net.train(training)
        with runtime.eval_mode(net, torch.device("cpu"), "bf16"):
            y = net(torch.ones(1, 2))
            assert not net.training and not y.requires_grad and y.dtype == torch.bfloat16
        assert net.training is training and net(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("compiled, threads, shown", [(None, 2, "eager"), (True, 1, "compiled")])
def test_setup_on_a_cpu(monkeypatch, capsys, compiled, threads, shown):
    """One thread per process, unless OMP_NUM_THREADS says otherwise."""
    for part in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(part, "is_available", lambda: False)
    if threads == 1:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    args = argparse.Namespace(device="auto", compile=compiled, dtype="bf16")
    torch.set_num_threads(2)
    assert runtime.setup(args) == (torch.device("cpu"), bool(compiled))
    assert torch.get_num_threads() == threads
    assert args.compile is compiled  # a run may resume on another device
    words = capsys.readouterr().out.strip().split(", ")
    assert words[0] == "cpu" and words[2:] == ["bf16", shown, "1 process(es)"]
    torch.set_num_threads(1)


def test_how_a_script_ends(monkeypatch, capsys):
    """In one process and in two. An error keeps its traceback; a sentence and Ctrl-C are one line.
    No data worker is left."""
    def fail():
        return {}["eight"]

    def interrupt():
        raise KeyboardInterrupt

    loader = data.loader(data.EvalImages(Shapes(), 16), [[0]] * 9, 1, torch.device("cpu"))
    batches, codes = iter(loader), []
    next(batches)
    worker, = multiprocessing.active_children()
    monkeypatch.setattr(runtime, "barrier", lambda: None)
    monkeypatch.setattr(runtime.os, "_exit", codes.append)
    for main, alone, in_two, last in (
            (fail, "eight", 1, "KeyError: 'eight'"), (interrupt, 130, 130, "interrupted"),
            (lambda: sys.exit("no"), "no", 1, "no"), (lambda: None, 0, 0, "")):
        with pytest.raises(KeyError if main is fail else SystemExit) as ended:
            runtime.launch(main)
        assert ended.value.args == (alone,)
        assert capsys.readouterr().err == ("interrupted\n" if main is interrupt else "")
        with monkeypatch.context() as two:
            two.setattr(runtime, "world_size", lambda: 2)
            runtime.launch(main)
        assert codes.pop() == in_two
        assert capsys.readouterr().err.rstrip().split("\n")[-1] == last
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL
