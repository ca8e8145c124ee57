"""What a GPU will meet, without one: graphs compiled again, kernels of R1, layouts. docs/speed.md has the why."""
from types import SimpleNamespace

import pytest
import torch
from test_prior import PRIOR, save_tokenizer
from test_train_tokenizer import TINY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import runtime


@pytest.fixture
def compiled(monkeypatch):
    """From now on models are compiled by a back end that runs the graph as it is; the list grows with each graph. An
    entry is the number of validations that were over, and "dynamic" a graph for all batch sizes, which is slower."""
    graphs, log, compile_ = [], runtime.Run.log, torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append("dynamic" if any(isinstance(value, torch.SymInt) for value in inputs) else validations)
        return graph

    def watch(self, step, split, **values):
        nonlocal validations
        validations += split == "val"
        return log(self, step, split, **values)
    validations = 0
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: compile_(self, backend=backend, **more))
    monkeypatch.setattr(runtime.Run, "log", watch)
    yield graphs
    torch._dynamo.reset()


LONG = ["--iters", 6, "--eval_every", 2, "--compile", "--batch_size", 4]


@pytest.mark.parametrize("phase", [1, 2])
def test_no_tokenizer_step_is_compiled_after_the_first_validation(script, vgg, tmp_path, compiled, phase):
    words = ["train_tokenizer", *TINY, "--vgg", vgg, *LONG, "--val_n", 11]  # the last batch has three images
    if phase == 2:
        script("train_tokenizer", *TINY, "--vgg", vgg, "--iters", 1, "--out", tmp_path / "one")
        words += ["--phase", 2, "--init", tmp_path / "one/ckpt.pt"]
    script(*words, "--out", tmp_path / "run")
    assert set(compiled) == {phase - 1}  # the run of phase 1 that phase 2 needs has a validation of its own
    # Phase 2 trains and validates with one graph of its encoder, without gradient.
    assert len(compiled) == (8 if phase == 1 else 7), "graphs in pieces, or one of their own for the last batch"


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_no_step_of_a_prior_is_compiled_after_the_first_validation(script, tmp_path, compiled, monkeypatch, kind):
    monkeypatch.setattr("miniature.shapes.Shapes.SIZES", {"train": 60, "val": 70})
    tokenizer = save_tokenizer(tmp_path / "tokenizer.pt")
    script("train_prior", *PRIOR, "--tokenizer", tokenizer, *LONG, "--kind", kind, "--out", tmp_path / "run")
    assert compiled and set(compiled) == {0} and len(compiled) <= 8


class Convolutions(TorchDispatchMode):
    """Records the kernel of each convolution, forward or backward."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.overloadpacket.__name__
        if name in ("convolution", "cudnn_convolution", "conv2d"):
            self.kernels.append(tuple(args[1].shape))
        if name == "convolution_backward":
            self.kernels.append(tuple(args[2].shape))
        return call(*args, **(kwargs or {}))


def test_no_convolution_of_r1_has_a_feature_map_for_a_kernel():
    """At the paper's size, on fake tensors. PyTorch's own second derivative has eleven that do."""
    with FakeTensorMode(), Convolutions() as seen:
        disc, x = losses.Discriminator(), torch.empty(4, 3, 256, 256, requires_grad=True)
        logits = disc(x)
        loss = losses.discriminator_loss(logits, disc(torch.empty(4, 3, 256, 256)))
        (loss + losses.r1_penalty(logits, x)).backward()
    assert len(seen.kernels) > 60 and max(max(shape[2:]) for shape in seen.kernels) <= 4


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="it has no fake tensors of a GPU that is not there")
@pytest.mark.parametrize("groups, side, stride, padding", [(64, 4, 1, 2), (64, 4, 2, 1), (1, 3, 1, 1), (1, 3, 2, 0)])
def test_gradients_stay_channels_last(groups, side, stride, padding):
    """On fake tensors of a GPU, in fp32 and bf16: the blur's and the convolutions' gradient of their input."""
    last, context = torch.channels_last, SimpleNamespace(save_for_backward=lambda *_: None)
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode():
            x = torch.empty(2, 64, 32, 32, device="cuda", dtype=dtype).to(memory_format=last)
            w = torch.empty(64, 64 // groups, side, side, device="cuda", dtype=dtype)
            y = torch.nn.functional.conv2d(x, w, None, stride, padding, 1, groups)
            grad = torch.empty_like(y).to(memory_format=last)
            back = losses.Convolve.forward(context, grad, w, x.shape, stride, padding, groups)
        assert back.shape == x.shape and back.is_contiguous(memory_format=last)


@pytest.mark.parametrize("groups, side, stride, padding", [(4, 4, 1, 2), (4, 4, 2, 1), (1, 3, 1, 1), (1, 3, 2, 0)])
def test_derivatives_of_convolve_are_pytorchs(groups, side, stride, padding):
    """Value, gradient, and the gradient of a function of the gradient, in image and weights."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9, dtype=torch.double, requires_grad=True)
    w = torch.randn(8, 4 // groups, side, side, dtype=torch.double, requires_grad=True)
    found = []
    for conv in (losses.conv2d, lambda x, w, *more: torch.nn.functional.conv2d(x, w, None, *more[:2], 1, more[2])):
        y = conv(x, w, stride, padding, groups).tanh()
        grad, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append([y, grad, *torch.autograd.grad(grad.square().sum() + y.sum(), (x, w))])
    for ours, theirs in zip(*found):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_compiled_discriminator_has_the_same_gradients():
    torch.manual_seed(0)
    disc, x = losses.Discriminator(16, (4, 8)), torch.randn(4, 3, 16, 16)
    found = []
    for call in (disc.forward, torch.compile(disc, backend="aot_eager", dynamic=False)):
        disc.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses.generator_loss(call(x)).backward()
        found.append([p.grad.clone() for p in disc.parameters()])
    assert all(torch.allclose(a, b, rtol=2e-2, atol=1e-4) for a, b in zip(*found))


def test_without_a_compiler_compile_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    args = runtime.argparse.Namespace(device="cpu", compile=True)
    with pytest.raises(runtime.BadInput, match="--no-compile"):
        runtime.setup(args)
