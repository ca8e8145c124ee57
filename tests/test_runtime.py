"""Files that survive, steps that are skipped, flags that are refused."""
import argparse
import fcntl
import json

import pytest
import torch

import runtime
from runtime import BadInput


def arguments(tmp_path, **more):
    return argparse.Namespace(**({"out": str(tmp_path / "run"), "resume": False, "tensorboard": False, "iters": 10,
                                  "batch_size": 4, "lr": 0.1} | more))


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    runtime.save_file(path, lambda file: file.write(b"old"))

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")
    with pytest.raises(BadInput, match="No space left.*previous file is intact"):
        runtime.save_file(path, full)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_checkpoints_are_plain_and_checked(tmp_path):
    run = runtime.Run(arguments(tmp_path), "tokenizer")
    run.save(3, model={"w": torch.ones(2)})
    state = torch.load(run.ckpt, weights_only=True)
    assert state["step"] == 3 and state["args"]["lr"] == 0.1
    with pytest.raises(BadInput, match="holds a tokenizer checkpoint, but a prior"):
        runtime.load_checkpoint(run.ckpt, "prior")
    whole = run.ckpt.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"text"):
        (tmp_path / "bad.pt").write_bytes(damaged)
        with pytest.raises(BadInput, match="damaged or not a checkpoint"):
            runtime.load_checkpoint(tmp_path / "bad.pt", "tokenizer")
    torch.save([1, 2], tmp_path / "foreign.pt")
    with pytest.raises(BadInput, match="something else"):
        runtime.load_checkpoint(tmp_path / "foreign.pt", "tokenizer")


def test_a_used_folder_is_refused_and_resumed(tmp_path):
    run = runtime.Run(arguments(tmp_path), "tokenizer")
    for step in (1, 2, 3):
        run.log(step, "train", loss=float("nan") if step == 2 else 0.5)
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "spl')  # killed in the middle of a line
    run.save(2, model={}, config={})
    with pytest.raises(BadInput, match="already holds a run"):
        runtime.check_out(arguments(tmp_path))
    with pytest.raises(BadInput, match="in use by another run"):
        runtime.Run(arguments(tmp_path, resume=True), "tokenizer")
    fcntl.flock(run.lock, fcntl.LOCK_UN)
    other = runtime.Run(arguments(tmp_path, resume=True, batch_size=8), "tokenizer")
    with pytest.raises(BadInput, match=r"made with --batch_size 4, not 8"):
        other.resume()
    fcntl.flock(other.lock, fcntl.LOCK_UN)
    again = runtime.Run(arguments(tmp_path, resume=True, lr=0.2), "tokenizer")  # another rate is allowed
    assert again.resume()["step"] == 2
    lines = [json.loads(line) for line in again.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["loss"] is None


def test_guard_skips_non_finite_steps():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([w], 0.1, fused=True)
    guard = runtime.Guard(torch.device("cpu"))

    def step(value):
        w.grad = torch.full((3,), value)
        guard.step(optimizer)
    step(1.0)
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


@pytest.mark.parametrize("words, message", [
    (["--iters", "0"], "at least 1"), (["--iters", "x"], "not a whole number"), (["--lr", "-1"], "above 0"),
    (["--lr", "nan"], "outside"), (["--itres", "5"], "unrecognized"), (["--iter", "5"], "unrecognized"),
    (["--device", "tpu"], "invalid choice")])
def test_flags_are_checked(words, message):
    parser = runtime.Parser("x")
    runtime.add_training_flags(parser, out="o", iters=1, batch_size=1, lr=1.0)
    with pytest.raises(BadInput, match=message):
        parser.parse_args(words)


def test_cosine_and_durations():
    assert [runtime.cosine(s, 100, 1.0, 0.5) for s in (0, 50, 100)] == pytest.approx([1.0, 0.75, 0.5])
    assert [runtime.duration(s) for s in (59, 61, 7265)] == ["0:59", "1:01", "2:01:05"]
