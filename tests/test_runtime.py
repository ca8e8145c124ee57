"""Files that survive, steps that are skipped, runs that go on, flags that are refused or shown."""
import argparse
import ast
import math
import re
import signal
import sys

import pytest
import torch
from conftest import ROOT, lines, same

import runtime

SCRIPTS = {path.stem: path for folder in (ROOT, ROOT / "miniature", ROOT / "benchmarks")
           for path in sorted(folder.glob("*.py")) if "runtime.parser(" in path.read_text()}


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """flags("--lr", 1): the flags of a script that trains; batch_size can't change in a run."""
    def call(*words, more=()):
        parser = runtime.parser("A script.")
        runtime.add_training_flags(parser, out=str(tmp_path / "run"), iters=10, batch_size=4, lr=.1)
        for flag in more:
            parser.add_argument(flag, default=1)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        given, found = runtime.read_flags(parser)
        saved = runtime.resumed_flags(found | given, given, "vgg", fixed=("batch_size",))
        return argparse.Namespace(**found | saved | given)
    return call


@pytest.fixture
def run(flags, monkeypatch):
    """run("--lr", 1): the Run of such a script, resumed, but without its hands on signals."""
    def call(*words, **parts):
        found = runtime.Run(flags(*words), "vgg", shown=("loss",))
        found.resume(**parts)
        return found
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)
    return call


# ------------------------------------------------------------------------------------- run folders

@pytest.mark.parametrize("error, ending", [
    (OSError(28, "No space left on device"), SystemExit), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, error, ending):
    path = tmp_path / "new" / "ckpt.pt"
    runtime.save_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new")
        file.flush()
        raise error
    with pytest.raises(ending) as ended:
        runtime.save_file(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]
    assert ending is KeyboardInterrupt or all(
        word in ended.value.code for word in (str(path), "No space", "MiB"))


def test_a_run_forgets_what_it_logged_after_its_checkpoint(run):
    run().log(9, "train", loss=0)  # killed before its first checkpoint: nothing to go on from
    one, net = run(), torch.nn.Linear(2, 2)
    assert one.saved == 0 and one.metrics.read_text() == ""
    for step in (1, 2, 3):
        one.log(step, "train", loss=float("nan") if step == 2 else 1 / 3)
    one.log(2, "val", loss=torch.tensor(1.0))
    one.save(2, one.ckpt, model=net.state_dict())
    with open(one.metrics, "a") as file:
        file.write('{"step": 2, "spl')  # killed in the middle of a line
    other = torch.nn.Linear(2, 2)
    two = run("--resume", model=other)  # a NaN is null: JSON has none
    assert same(net.state_dict(), other.state_dict()) and two.saved == 2
    assert lines(two.out, "train") == [{"step": 1, "split": "train", "loss": 0.333333},
                                       {"step": 2, "split": "train", "loss": None}]
    assert two.lines == lines(two.out, "train") + lines(two.out, "val")


def test_a_signal_to_any_process_stops_all(run, monkeypatch):
    one = run()
    assert not one.stopping()
    monkeypatch.setattr(runtime, "largest_over_processes", lambda mine: max(mine, 143))
    assert one.stopping()
    with pytest.raises(SystemExit, match="143"):
        one.leave()


def test_what_comes_while_a_signal_is_served_is_the_same_request(monkeypatch):
    """Only a Ctrl-C, seconds later, ends at once."""
    now = [100.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)
    request = runtime.Request()
    for number, seconds in ((signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGTERM, 60)):
        now[0] += seconds
        request.come(number, None)
        assert request.number == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        request.come(signal.SIGINT, None)


def test_process_0_knows_the_lowest_loss(run, monkeypatch):
    one = run()
    assert one.lowest() == math.inf
    one.lines = [{"step": n, "split": "val", "loss": loss} for n, loss in enumerate((3, None, 2.5))]
    assert one.lowest() == 2.5
    monkeypatch.setattr(runtime, "is_main", lambda: False)
    monkeypatch.setattr(runtime, "largest_over_processes", lambda mine: max(mine, -1.5))
    assert one.lowest() == 1.5


def test_tensorboard_gets_the_same_values(run):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    one = run("--tensorboard")
    one.log(3, "val", loss=1.5, psnr=20)
    events = board.EventAccumulator(str(one.out)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(3, 1.5)]


def test_progress_lines_show_rate_and_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: now[0])
    progress = runtime.Progress(3600)
    for now[0], done in ((9, 1), (11, 11), (21, 16), (22, 20)):
        progress.show("samples", done, images=2, every_s=10)
    progress = runtime.Progress(10, done=2)
    for now[0], done in ((24, 6), (25, 6), (26, 11)):  # two processes may count one too many
        progress.show("step", done)
    numbers = re.findall(r"[\d.:]+", capsys.readouterr().out)
    assert numbers == ["2.0", "0:59:49", "1.0", "1:18:24", "2.0", "0:00:02", "4.0", "0:00:00"]


# ------------------------------------------------------------------------------------------- flags

def test_a_run_goes_on_with_its_flags(flags, run, capsys):
    one = run("--lr", 0.5, "--crop", "center", "--accum", 2)
    one.args.gone = 3  # a flag that the script no longer has
    one.save(3, one.ckpt)
    del one.args.gone
    with pytest.raises(SystemExit, match="already holds a run"):
        flags("--lr", 0.5)
    capsys.readouterr()
    goes_on = vars(flags("--resume", more=["--new"]))  # one that the checkpoint does not know
    assert goes_on == vars(one.args) | {"resume": True, "new": 1}
    assert capsys.readouterr().out == ""
    args = flags("--resume", "--iters", 20, "--lr", 0.25, "--batch_size", 4)
    assert (args.iters, args.lr, args.accum, args.crop) == (20, 0.25, 2, "center")
    longer, rate = capsys.readouterr().out.splitlines()
    assert "--iters" in longer and "stretched" in longer
    assert all(word in rate for word in ("--lr", "0.5", "0.25"))
    with pytest.raises(SystemExit, match="--batch_size 4.* 8"):
        flags("--resume", "--batch_size", 8)
    with pytest.raises(SystemExit, match="step 3.*--iters 2"):
        flags("--resume", "--iters", 2)
    with pytest.raises(SystemExit):
        flags("--resume", "--iter", 20)  # no flag, and no short form of one
    args = flags("--resume", "--out", one.out.parent / "none", "--batch_size", 8)  # nothing there
    assert (args.batch_size, args.accum) == (8, 1)


@pytest.fixture
def parser_of(script, monkeypatch):
    """parser_of("sample"): the parser of a script, as it is when it meets the command line."""
    def catch(parser, *_):
        raise InterruptedError(parser)

    def call(name):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError) as caught:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
            script(name)
        return caught.value.args[0]
    return call


def names_read(path):
    """What a file reads of args, and the words in its functions and LAYOUT (getattr's)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value).split(".")[-1] in ("args", "given"):
                yield node.attr
        layout = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYOUT"
        if isinstance(node, ast.FunctionDef) or layout:
            yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read_and_explained(name, parser_of, monkeypatch):
    parser = parser_of(name)
    read = {word for path in (SCRIPTS[name], ROOT / "runtime.py", ROOT / "data.py")
            for word in names_read(path)}
    monkeypatch.setenv("COLUMNS", "1000")
    text, actions = parser.format_help(), parser._actions[1:]  # the first is --help
    assert not parser.allow_abbrev
    for action in actions:
        assert action.help and action.dest in read, f"--{action.dest}"
        if action.default not in (None, ""):
            assert f"{action.help} (default: {action.default})" in text, f"--{action.dest}"


@pytest.mark.parametrize("name, words, shown", [
    *((name, [], "--help") for name in SCRIPTS),
    ("train_tokenizer", ["--phase", 2], "'lr': 5e-05")])
def test_help_is_shown_whatever_is_there(name, words, shown, script, parser_of, monkeypatch,
                                         tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    out = parser_of(name).get_default("out")
    for _ in range(2):  # in an empty folder; beside a file that is no run of anything
        with pytest.raises(SystemExit) as ended:
            script(name, *words, "--help")
        assert ended.value.code in (0, None) and shown in capsys.readouterr().out
        runtime.save_file(f"{out}/ckpt.pt", lambda file: file.write(b"x"))


# ---------------------------------------------------------------------- steps, numbers, processes

def test_a_step_with_a_gradient_that_is_not_finite_is_skipped():
    nets = [torch.nn.Linear(3, 1, bias=False) for _ in range(2)]
    adams = [torch.optim.Adam(net.parameters(), 9.0, fused=True) for net in nets]
    optimizers = runtime.Optimizers(argparse.Namespace(ckpt="ckpt.pt", saved=7), *adams)

    def take(*gradients, lr=0.1):
        """The norms, and how far each network's weights and Adam's averages moved."""
        def state():
            return [t.mean().item() for net, o in zip(nets, adams)
                    for t in (net.weight, o.state[net.weight].get("exp_avg", net.weight))]
        for net, gradient in zip(nets, gradients):
            net.weight.grad = torch.full((1, 3), gradient)
        before, norms = state(), optimizers.step(lr)
        assert all(net.weight.grad is None for net in nets)
        return norms, [b - a for a, b in zip(before, state())]

    for lr in (0.25, 0.5):  # with steady gradients a step of Adam's is as long as the rate
        norms, moved = take(1.0, -2.0, lr=lr)
        assert norms == pytest.approx([3 ** 0.5, 2 * 3 ** 0.5])
        assert moved[::2] == pytest.approx([-lr, lr], rel=1e-4)
    for n in range(19):  # of either network: both are left as they were
        assert take(*[(float("nan"), 1.0), (1.0, float("inf"))][n % 2])[1] == [0, 0, 0, 0]
    assert (optimizers.skipped, optimizers.in_a_row) == (19, 19)
    assert all(take(1.0, 1.0)[1]) and (optimizers.skipped, optimizers.in_a_row) == (19, 0)
    for saved, sentence in ((7, "ckpt.pt holds step 7: go on"), (0, "not there yet: start again")):
        optimizers.run.saved = saved
        with pytest.raises(SystemExit, match=sentence):
            for _ in range(40):
                take(1.0, float("nan"))
        optimizers.in_a_row = 0


def test_averages_are_over_steps_and_processes_without_nan(monkeypatch):
    averages = runtime.Averages()
    for step, loss in enumerate((1.0, float("nan"), 4.0, 4.0)):
        averages.add(loss=torch.tensor(loss, requires_grad=True))
        if step % 2:
            averages.add(r1=torch.tensor(step, dtype=torch.bfloat16))  # not at every step
    assert averages.means() == {"loss": 3, "r1": 2}
    averages.add(b=torch.tensor(2.0), a=torch.tensor(1.0))  # since the last call
    monkeypatch.setattr(runtime, "world", lambda: 2)
    monkeypatch.setattr(runtime, "sum_over_processes", lambda mine: mine + torch.tensor([5., 6.]))
    assert averages.means() == {"a": 3, "b": 4}


def test_cosine():
    assert [runtime.cosine(s, 100, 1.0, 0.5) for s in (0, 50, 100)] == pytest.approx([1, .75, .5])


def test_setup_on_a_cpu(monkeypatch, capsys):
    for part in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(part, "is_available", lambda: False)
    for chosen, word in ((None, "eager"), (True, "compiled")):
        args = argparse.Namespace(device="auto", compile=chosen, dtype="bf16", batch_size=8,
                                  accum=2)
        assert runtime.setup(args) == (torch.device("cpu"), bool(chosen))
        assert args.compile is chosen  # as it was asked for: a run may go on elsewhere
        words = capsys.readouterr().out.strip().split(", ")
        assert "no GPU" in words[0] and words[1:4] == ["bf16", word, "1 process"]
        assert "4 images" in words[4]


@pytest.mark.parametrize("lacking", ["compiler", "Python.h"])
def test_where_nothing_can_be_compiled_runs_are_eager(lacking, monkeypatch, tmp_path, capsys):
    if lacking == "compiler":
        monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(runtime.sysconfig, "get_path", lambda name: str(tmp_path))
    assert lacking in runtime.missing_for_compile("cpu")
    with pytest.raises(SystemExit, match=f"--compile.*{lacking}"):
        runtime.setup(argparse.Namespace(device="cpu", compile=True))
    for part in ("is_available", "get_device_name", "set_device"):  # where it was not asked for
        monkeypatch.setattr(torch.cuda, part, lambda *_: "a GPU")
    args = argparse.Namespace(device="cuda", compile=None)
    _, compiled = runtime.setup(args)
    one, two = capsys.readouterr().out.splitlines()
    assert not compiled and lacking in one and "a GPU" in two and "eager" in two


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_goes_first(monkeypatch, first):
    order = []
    monkeypatch.setattr(runtime, "barrier", lambda: order.append("barrier"))
    monkeypatch.setattr(runtime, "is_main", lambda: first)
    assert runtime.main_first(lambda: order.append("call") or 5) == 5
    assert order == (["call", "barrier"] if first else ["barrier", "call"])


def test_errors_keep_their_traceback_and_sentences_are_alone(monkeypatch, capsys):
    def fail():
        return {}["eight"]
    with pytest.raises(KeyError):
        runtime.launch(fail)
    codes = []
    monkeypatch.setattr(runtime, "world", lambda: 2)
    monkeypatch.setattr(runtime, "barrier", lambda: None)
    monkeypatch.setattr(runtime.os, "_exit", codes.append)
    for main in (fail, lambda: sys.exit("one sentence"), lambda: None):
        runtime.launch(main)
    trace, sentence = capsys.readouterr().err.rstrip().rsplit("\n", 1)
    assert "in fail" in trace and "KeyError: 'eight'" in trace and sentence == "one sentence"
    assert codes == [1, 1, 0]
