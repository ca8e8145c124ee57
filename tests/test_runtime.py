"""Files that survive, steps that are skipped, runs that resume, flags that are refused."""
import argparse
import io
import json
import os
import signal

import numpy as np
import pytest
import torch

import runtime
from runtime import BadInput


@pytest.fixture(autouse=True)
def handlers():
    """A Run handles signals from `resume` on: not beyond the test."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def arguments(tmp_path, **more):
    return argparse.Namespace(**({"out": str(tmp_path / "run"), "resume": False, "tensorboard": False, "iters": 10,
                                  "batch_size": 4, "lr": 0.1, "save_every": 4, "eval_every": 6} | more))


# ---------------------------------------------------------------------------------------------------- files

def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "ckpt.pt"
    runtime.save_file(path, lambda file: file.write(b"old"))

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")
    with pytest.raises(BadInput, match="No space left.*previous file is intact"):
        runtime.save_file(path, full)
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]
    with pytest.raises(BadInput, match="No space left.*no part of it is left"):
        runtime.save_file(tmp_path / "other", full)
    assert not list(tmp_path.glob("other*"))


def test_a_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    runtime.save_file(path, lambda file: file.write(b"old"))

    def die(file):
        file.write(b"new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        runtime.save_file(path, die)
    assert path.read_bytes() == b"old"
    runtime.save_file(path, lambda file: file.write(b"newer"))  # what the kill left is in nobody's way
    assert path.read_bytes() == b"newer" and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_checkpoints_are_plain_and_checked(tmp_path):
    run = runtime.Run(arguments(tmp_path), "tokenizer")
    run.save(3, model={"w": torch.ones(2)})
    state = torch.load(run.ckpt, weights_only=True)
    assert state["step"] == 3 and state["args"]["lr"] == 0.1
    with pytest.raises(BadInput, match="holds a tokenizer checkpoint, but a prior"):
        runtime.load_file(run.ckpt, "prior")
    assert torch.equal(runtime.load_file(run.ckpt, "tokenizer")["model"]["w"], torch.ones(2))
    whole = run.ckpt.read_bytes()
    changed = bytearray(whole)
    changed[whole.index(torch.ones(2).numpy().tobytes())] ^= 1  # torch.load itself reads this without a word
    for damaged in (whole[:len(whole) // 2], b"", b"text", changed):
        (tmp_path / "bad.pt").write_bytes(damaged)
        with pytest.raises(BadInput, match="bad.pt is damaged"):
            runtime.load_file(tmp_path / "bad.pt", "tokenizer")
    torch.save([1, 2], tmp_path / "foreign.pt")
    with pytest.raises(BadInput, match="something else"):
        runtime.load_file(tmp_path / "foreign.pt", "tokenizer")
    assert runtime.load_file(tmp_path / "foreign.pt") == [1, 2]  # no kind is asked for: VGG16's own file
    with pytest.raises(BadInput, match="no such file"):
        runtime.load_file(tmp_path / "none.pt", "tokenizer")


class Code:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_runs_code(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "prior", "model": Code()}, "code.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInput, match="damaged or holds no weights"):
        runtime.load_file("code.pt", "prior")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("shape, dtype", [
    ((7, 3), np.uint16), ((7,), np.int32), ((7, 2, 2, 3), np.uint8), ((0, 5), np.float32)])
def test_write_npy_is_what_numpy_writes(shape, dtype):
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    one, two = io.BytesIO(), io.BytesIO()
    np.save(one, array)
    parts = (np.asfortranarray(part.astype(np.float64)) for part in (array[:3], array[3:3], array[3:]))
    runtime.write_npy(two, shape, dtype, parts)
    assert one.getvalue() == two.getvalue()


def test_chunks_are_shared_out_and_what_is_there_is_done(tmp_path, monkeypatch):
    chunks = runtime.chunks(tmp_path / "part", 2500, 100)
    assert [i for _, rows in chunks for i in rows] == [*range(2500)] and chunks[-1][1] == range(2400, 2500)
    assert [len(rows) for _, rows in runtime.chunks(tmp_path, 250, 100)] == [100, 100, 50]
    assert runtime.chunks(tmp_path, 0, 100) == []
    files = [file for file, _ in chunks]
    assert files == sorted(files) and len({*files}) == 25 and files[0].parent == tmp_path / "part"
    assert runtime.pending(chunks) == chunks
    for i in (0, 7, 24):
        runtime.save_file(files[i], lambda file: file.write(b"x"))
    (tmp_path / "part" / (files[3].name + ".tmp")).write_bytes(b"x")  # what a kill leaves of a file
    left = [chunk for i, chunk in enumerate(chunks) if i not in (0, 7, 24)]
    assert runtime.pending(chunks) == left
    shares = []
    for rank in range(3):
        monkeypatch.setattr(runtime, "world", lambda: 3)
        monkeypatch.setattr(runtime, "rank", lambda rank=rank: rank)
        shares += runtime.pending(chunks)
    assert sorted(shares, key=lambda chunk: chunk[1].start) == left


# --------------------------------------------------------------------------------------------- run folders

def test_a_used_folder_is_refused_and_resumed(tmp_path):
    run = runtime.Run(arguments(tmp_path), "tokenizer")
    assert not run.out.exists() and run.resume() is None  # nothing is written before
    for step in (1, 2, 3):
        run.log(step, "train", loss=float("nan") if step == 2 else 0.5)
    run.log(2, "val", loss=1)
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "spl')  # killed in the middle of a line
    w = torch.nn.Linear(2, 2)
    run.save(2, model=w.state_dict(), config={})
    with pytest.raises(BadInput, match="already holds a run"):
        runtime.Run(arguments(tmp_path), "tokenizer")
    with pytest.raises(BadInput, match=r"made with batch_size 4, not 8"):
        runtime.Run(arguments(tmp_path, resume=True, batch_size=8), "tokenizer").resume()
    with pytest.raises(BadInput, match="holds a tokenizer checkpoint"):
        runtime.Run(arguments(tmp_path, resume=True), "prior").resume()
    with pytest.raises(BadInput, match="does not fit the flags.*size mismatch") as error:
        runtime.Run(arguments(tmp_path, resume=True), "tokenizer").resume(model=torch.nn.Linear(2, 3))
    assert "\n" not in str(error.value)
    again = runtime.Run(arguments(tmp_path, resume=True, lr=0.2), "tokenizer")  # another rate is allowed
    model = torch.nn.Linear(2, 2)
    assert again.resume(model=model, disc=None)["step"] == 2 and torch.equal(model.weight, w.weight)
    lines = [json.loads(line) for line in again.metrics.read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(1, "train"), (2, "train"), (2, "val")]
    assert lines[1]["loss"] is None and lines == again.lines


def test_a_new_run_forgets_the_lines_of_one_without_a_checkpoint(tmp_path):
    run = runtime.Run(arguments(tmp_path), "vgg")
    run.resume()
    run.log(1, "train", loss=1)
    run = runtime.Run(arguments(tmp_path), "vgg")  # killed before its first checkpoint: nothing to overwrite
    assert run.resume() is None and run.metrics.read_text() == ""


def test_a_validation_that_a_kill_prevented_is_missed(tmp_path):
    run = runtime.Run(arguments(tmp_path, resume=True), "vgg")
    run.resume()
    assert not run.missed(0)  # a fresh run has missed none
    for step in (4, 6, 10):  # saved; no validation, one every six, at the end
        run.save(step, model={})
        run.resume()
        assert bool(run.missed(step)) == (step != 4)
    run.log(6, "val", loss=1)
    run.log(10, "train", loss=1)
    run.resume()
    assert not run.missed(6) and run.missed(10)
    run.log(10, "val", loss=1)
    run.resume()
    assert not run.missed(10)


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_after_a_step_comes_saving_then_leaving_then_validating(tmp_path, capsys, number):
    run, calls = runtime.Run(arguments(tmp_path), "vgg"), []
    run.resume()
    if number:
        os.kill(os.getpid(), number)

    def after(step, broken=False):
        del calls[:]
        ended = run.after_step(step, broken, lambda step: calls.append(("save", step)),
                               lambda step: calls.append(("evaluate", step)))
        assert type(ended) is bool
        return ended, [name for name, at in calls if at == step]
    if number:  # whatever is due: a validation waits for the next start
        assert [after(step) for step in (3, 4, 6, 10)] == [(True, ["save"])] * 4
        assert "holds step 10, continue with --resume" in capsys.readouterr().out
    else:
        assert [after(step)[1] for step in (1, 4, 6, 10)] == [[], ["save"], ["evaluate"], ["save", "evaluate"]]
        assert not after(10)[0] and after(12) == (False, ["save", "evaluate"]) and capsys.readouterr().out == ""
    with pytest.raises(BadInput, match="20 steps in a row.*last good state"):
        after(6, broken=True)
    assert calls == [("save", 6)]


def test_all_processes_stop_at_the_same_step(tmp_path, monkeypatch):
    def all_reduce(tensor):  # another process has a signal
        tensor += 15
    run = runtime.Run(arguments(tmp_path), "vgg")
    run.resume()
    monkeypatch.setattr(runtime, "world", lambda: 2)
    monkeypatch.setattr(runtime.dist, "all_reduce", all_reduce)
    saved = []
    assert run.after_step(3, False, saved.append, None) and saved == [3]


# ------------------------------------------------------------------------------------------ steps and numbers

def test_guard_skips_non_finite_steps():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([w], 0.1, fused=True)
    guard = runtime.Guard(torch.device("cpu"))

    def step(value):
        w.grad = torch.full((3,), value)
        norm = guard.step(optimizer, 0.1)
        assert w.grad is None
        return norm.item()
    assert step(1.0) == pytest.approx(3 ** 0.5)
    kept, moments = w.detach().clone(), optimizer.state[w]["exp_avg"].clone()
    for value in (float("nan"), float("inf")) * 9:
        step(value)
        assert torch.equal(w, kept) and torch.equal(optimizer.state[w]["exp_avg"], moments)
        assert optimizer.state[w]["step"] == 1
    assert guard.check() == (18, False)
    step(1.0)
    assert not torch.equal(w, kept)
    for _ in range(20):
        step(float("nan"))
    step(1.0)
    assert guard.check() == (38, True)


def test_guard_steps_at_the_rate_it_is_given():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([{"params": [a]}, {"params": [b]}], 9.0, fused=True)
    guard = runtime.Guard(torch.device("cpu"))
    for lr in (0.25, 0.5):
        before = a.item(), b.item()
        a.grad, b.grad = torch.ones(1), -torch.ones(1)
        guard.step(optimizer, lr)  # a step of Adam's is as long as the rate where gradients stay the same
        assert (before[0] - a.item(), b.item() - before[1]) == pytest.approx((lr, lr), rel=1e-4)


def test_averages_leave_out_what_is_not_finite():
    averages = runtime.Averages()
    for step, loss in enumerate((1.0, float("nan"), 4.0, float("-inf"), 4.0)):
        averages.add(loss=torch.tensor(loss), bad=torch.tensor(float("inf")))
        if step % 2:
            averages.add(r1=torch.tensor(step, dtype=torch.bfloat16, requires_grad=True))  # not at every step
    means = averages.means()
    assert means.pop("loss") == 3 and means.pop("r1") == 2 and np.isnan(means.pop("bad")) and not means
    averages.add(loss=torch.tensor(7.0))
    assert averages.means() == {"loss": 7}  # since the last call


def test_averages_are_of_all_processes(monkeypatch):
    averages = runtime.Averages()
    averages.add(b=torch.tensor(2.0), a=torch.tensor(1.0))
    averages.add(a=torch.tensor(4.0))
    others = [torch.tensor([10.0, 6.0]), torch.tensor([3.0, 1.0])]  # sums and counts of another process, a and b
    monkeypatch.setattr(runtime, "sum_over_processes", lambda mine: mine + others.pop(0))
    assert averages.means() == {"a": 3, "b": 4}


def test_fused_adam_pairs_weights_and_gradients_in_channels_last():
    torch.manual_seed(0)
    a = torch.nn.Conv2d(4, 6, 3)
    b = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 4, 8, 8)
    for net, fused in ((a, False), (b, True)):
        optimizer = torch.optim.Adam(net.parameters(), 0.01, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            net(x if net is a else x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
            optimizer.step()
    assert torch.allclose(a.weight, b.weight, atol=1e-5)


def test_cosine():
    assert [runtime.cosine(s, 100, 1.0, 0.5) for s in (0, 50, 100)] == pytest.approx([1.0, 0.75, 0.5])


def test_progress_lines_show_speed_and_time_left(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: now[0])
    progress = runtime.Progress(3600, "samples")
    for seconds, n in ((9, 1), (2, 10), (10, 5), (1, 4)):  # a line after more than ten seconds
        now[0] += seconds
        progress(n)
    assert capsys.readouterr().out == ("samples: 11/3600 | 1.0/s, 59:49 left\n"
                                       "samples: 20/3600 | 0.8/s, 1:05:38 left\n")
    run = runtime.Run(arguments(tmp_path), "vgg")
    for seconds, step, values in ((0, 2, {}), (8, 6, {"loss": 0.12345}), (5, 6, {"val loss": 1}), (1, 8, {})):
        now[0] += seconds
        run.progress(step, **values)
    assert capsys.readouterr().out.splitlines() == [
        "step 2/10 | ", "step 6/10 | loss 0.1235 | 2.0 images/s, 00:08 left", "step 6/10 | val loss 1",
        "step 8/10 |  | 8.0 images/s, 00:04 left"]


# ---------------------------------------------------------------------------------------- flags and processes

@pytest.mark.parametrize("words, message", [
    (["--iters", "0"], "at least 1"), (["--iters", "x"], "invalid int value"), (["--lr", "-1"], "above 0"),
    (["--iters", "1.5"], "invalid int value"), (["--lr", "0"], "above 0"), (["--seed", "-1"], "at least 0"),
    (["--lr", "nan"], "above 0"), (["--lr", "inf"], "--lr"), (["--lr", "x"], "invalid float value"),
    (["--itres", "5"], "unrecognized"), (["--iter", "5"], "unrecognized"), (["--device", "tpu"], "invalid choice"),
    (["--lr"], "expected one argument"), (["stray"], "unrecognized")])
def test_flags_are_checked(words, message):
    parser = runtime.Parser("x")
    runtime.add_training_flags(parser, out="o", iters=1, batch_size=1, lr=1.0)
    with pytest.raises(BadInput, match=message) as error:
        parser.parse_args(words)
    assert "\n" not in str(error.value) and words[0] in str(error.value)
    args = parser.parse_args(["--iters", "7", "--lr", "1e-3", "--seed", "0"])
    assert (args.iters, args.lr, args.seed, args.batch_size, args.out) == (7, 1e-3, 0, 1, "o")


@pytest.mark.parametrize("make, good, bad", [
    ((int, 2, 5), ["2", "5"], ["1", "6", "-3"]), ((int, 0), ["0", "12345678"], ["-1"]),
    ((float, 0, 1), ["0", "1", "0.5", "1e-9"], ["-0.1", "1.01", "nan", "inf"]),
    ((float, 0), ["0", "1e300"], ["-1e-9", "inf", "-inf", "nan", "1e400"])])
def test_numbers_within_their_bounds(make, good, bad):
    parse = runtime.number(*make)
    assert [parse(text) for text in good] == [make[0](text) for text in good]
    assert all(type(parse(text)) is make[0] for text in good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not"):
            parse(text)
    above = runtime.number(*make, above=True)
    with pytest.raises(argparse.ArgumentTypeError, match=f"{make[1]} is not above {make[1]}"):
        above(str(make[1]))
    assert above(good[1]) == make[0](good[1])


def test_explained_errors_are_one_sentence():
    with pytest.raises(BadInput, match="^a.pt: the last line$"), runtime.explain("a.pt: "):
        raise ValueError("Error(s):\n\tthe last line\n")
    with pytest.raises(KeyError), runtime.explain("a.pt: "):  # not what was expected: our own fault
        raise KeyError("x")
    with pytest.raises(BadInput, match="^a.pt: RuntimeError$"), runtime.explain("a.pt: ", Exception):
        raise RuntimeError
    with pytest.raises(BadInput, match="^as it is$"), runtime.explain("a.pt: ", Exception):
        raise BadInput("as it is")


def test_setup_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for part in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(part, "is_available", lambda: False)
    for chosen, compiled in ((None, False), (True, True)):
        args = argparse.Namespace(device="auto", compile=chosen)
        assert runtime.setup(args) == torch.device("cpu") and args.compile is compiled
    with pytest.raises(BadInput, match="--device cuda: this machine has none"):
        runtime.setup(argparse.Namespace(device="cuda"))
    assert runtime.world() == 1 and runtime.is_main()


def test_the_first_process_goes_first(monkeypatch):
    order = []
    monkeypatch.setattr(runtime, "barrier", lambda: order.append("barrier"))
    assert runtime.main_first(lambda: order.append("call") or 5) == 5
    monkeypatch.setattr(runtime, "is_main", lambda: False)
    assert runtime.main_first(lambda: order.append("call") or 5) == 5
    assert order == ["call", "barrier", "barrier", "call"]
