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
import train_tokenizer
from miniature.shapes import Shapes


@pytest.fixture
def compiled(script, tmp_path, monkeypatch):
    """compiled("train_prior", ...): trains and validates as on a GPU, but the compiler returns
    graphs as they are. A bool for each graph: whether it is for all batch sizes, which is slower.
    """
    graphs, compile_ = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph

    def train(*words):
        script(*words, "--iters", 4, "--eval_every", 2, "--compile", "--dtype", "bf16",
               "--out", tmp_path / "run")
        return graphs
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **more: compile_(self, backend=backend, **more))
    monkeypatch.setattr(Shapes, "SIZES", {"train": 60, "val": 70})
    yield train
    torch._dynamo.reset()


@pytest.mark.parametrize("phase", [1, 2])
def test_graphs_of_a_tokenizer(vgg, tokenizer, compiled, monkeypatch, phase):
    monkeypatch.setattr(train_tokenizer, "R1_EVERY", 2)
    words = [*TINY, "--vgg", vgg, "--batch_size", 66, "--phase", phase]
    words += ["--init", tokenizer] if phase == 2 else []
    # Encoder and decoder, VGG and the discriminator twice each: with and without gradients of
    # their inputs and weights. Phase 2 decodes 64 images and 2. Validation compiles nothing.
    assert compiled("train_tokenizer", *words) == [False] * (6 if phase == 1 else 7)


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_graphs_of_a_prior(tokenizer, compiled, kind):
    words = [*PRIOR, "--tokenizer", tokenizer, "--kind", kind]
    assert compiled("train_prior", *words) == [False] * 2  # encoding 32 images, training


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


def watched(call):
    """What call(disc, x) does on 32 images of 256 x 256, on fake tensors."""
    with FakeTensorMode(), Watch() as seen:
        call(losses.Discriminator(256), torch.empty(32, 3, 256, 256))
    return seen


def test_r1_has_no_feature_map_for_a_kernel_and_adds_nothing_to_the_peak_of_a_step():
    def step(disc, x):
        args = SimpleNamespace(dtype="bf16")
        train_tokenizer.discriminator_loss(disc, x, x, args)[0].backward()

    def step_with_r1(disc, x):
        step(disc, x)
        train_tokenizer.backward_r1(disc, x, 80.0)
    without, with_r1 = watched(step), watched(step_with_r1)
    assert len(with_r1.kernels) > 200 and max(max(shape[2:]) for shape in with_r1.kernels) == 4
    assert with_r1.peak == without.peak > 1e9
