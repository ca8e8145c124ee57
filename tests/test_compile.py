"""What a GPU will meet, without one: graphs compiled again, kernels and memory of R1."""
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import PRIOR, TINY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
import runtime
import train_tokenizer
from miniature.shapes import Shapes

LONG = ["--iters", 4, "--eval_every", 2, "--compile", "--dtype", "bf16"]  # as on a GPU


@pytest.fixture
def compiled(monkeypatch):
    """From now on models are compiled by a back end that runs the graph as it is. An entry for each
    graph: how many validations were over, or "dynamic" if it is for all batch sizes: slower."""
    graphs, log, compile_, validations = [], runtime.Run.log, torch.nn.Module.compile, 0

    def backend(graph, inputs):
        dynamic = any(isinstance(value, torch.SymInt) for value in inputs)
        graphs.append("dynamic" if dynamic else validations)
        return graph

    def watch(self, step, split, **values):
        nonlocal validations
        validations += split == "val"
        return log(self, step, split, **values)
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **more: compile_(self, backend=backend, **more))
    monkeypatch.setattr(runtime.Run, "log", watch)
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 70})
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("phase", [1, 2])
def test_no_tokenizer_step_is_compiled_after_the_first_validation(
        script, vgg, tokenizer, tmp_path, compiled, monkeypatch, phase):
    monkeypatch.setattr(train_tokenizer, "R1_EVERY", 2)
    words = [*TINY, "--vgg", vgg, *LONG, "--batch_size", 66]
    words += ["--phase", 2, "--init", tokenizer] if phase == 2 else []
    script("train_tokenizer", *words, "--out", tmp_path / "run")
    # Phase 1: encoder, decoder, each with gradients and without; VGG twice, discriminator twice.
    # Phase 2: the encoder without gradients, the decoder for 64 and for 2 images at once.
    assert compiled == [0] * (8 if phase == 1 else 9)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_no_step_of_a_prior_is_compiled_after_the_first_validation(
        script, tokenizer, tmp_path, compiled, kind):
    words = [*PRIOR, "--tokenizer", tokenizer, *LONG, "--kind", kind]
    script("train_prior", *words, "--out", tmp_path / "run")
    # encoding: 32 images; training: 8; validation: 64. Smaller last batches run uncompiled.
    assert compiled == [0] * 3


def test_a_compiled_discriminator_has_the_same_gradients():
    torch.manual_seed(0)
    disc, x, found = losses.Discriminator(16, (4, 8)), torch.randn(4, 3, 16, 16), []
    for call in (disc.forward, torch.compile(disc, backend="aot_eager", dynamic=False)):
        disc.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses.generator_loss(call(x)).backward()
        found.append([p.grad.clone() for p in disc.parameters()])
    assert all(torch.allclose(a, b, rtol=2e-2, atol=1e-4) for a, b in zip(*found))


class Watch(TorchDispatchMode):
    """Records the kernel of each convolution, forward or backward, and the peak of the memory."""
    def __init__(self):
        super().__init__()
        self.kernels, self.storages, self.peak = [], {}, 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        where = {"convolution": 1, "convolution_backward": 2}.get(call.overloadpacket.__name__)
        if where:
            self.kernels.append(args[where].shape)
        out = call(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.storages.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.storages.values()))
        return out


def watched(call, channels=(128, 512)):
    """What call(disc, x) does on 32 images of 256 x 256, on fake tensors."""
    with FakeTensorMode(), Watch() as seen:
        call(losses.Discriminator(256, channels), torch.empty(32, 3, 256, 256))
    return seen


def test_r1_has_no_feature_map_for_a_kernel_and_adds_nothing_to_the_peak_of_a_step():
    def step(penalise):
        args, averages = SimpleNamespace(dtype="bf16", r1=10), runtime.Averages()
        return watched(lambda disc, x: train_tokenizer.discriminator_step(
            disc, [x], [x], args, penalise, averages))

    without, with_r1 = step(False), step(True)
    assert len(with_r1.kernels) > 200 and max(max(shape[2:]) for shape in with_r1.kernels) == 4
    assert with_r1.peak == without.peak > 1e9


def test_r1_takes_no_more_memory_than_pytorchs_second_derivative():
    def second_derivative(disc, x):
        x.requires_grad_()
        grad, = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
        grad.square().sum((1, 2, 3)).mean().backward()
    ours = watched(lambda disc, x: losses.r1_penalty(disc, x).backward(), (8, 32))
    assert 1e8 < ours.peak <= watched(second_derivative, (8, 32)).peak
