"""The tokenizer against slow references: counts, Eq. 1, the loss terms, attention, codebooks."""
import importlib.util
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FOLDERS, ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vq
from codebooks import CODEBOOKS, Factorized, KMeans, Plain, kmeans
from train_tokenizer import fingerprint
from vq import BlockAttention, Quantizer, VQModel


def small(seed=0, **options):
    torch.manual_seed(seed)
    return VQModel(channels=(16, 32), z_dim=8, codebook_size=32, **options)


# ------------------------------------------------------------------------------------------ the files by themselves

def alone(name, folder, monkeypatch):
    """The module of a copy of `name`.py in an empty folder, where no file of the project can be imported; and the lines
    of code in its docstring."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() not in FOLDERS])
    for path in (path for folder in FOLDERS for path in folder.glob("*.py")):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location(name, shutil.copy(ROOT / f"{name}.py", folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [f"{name}.py"]
    return module, "\n".join(re.findall(r"^    (\w[\w, ]* = .+)", module.__doc__, re.M))


def test_vq_stands_alone_and_does_what_its_docstring_shows(tmp_path, monkeypatch):
    module, lines = alone("vq", tmp_path, monkeypatch)
    assert lines.count("\n") == 2
    with FakeTensorMode():  # the paper's size, without its arithmetic
        names = {"x": torch.empty(2, 3, 256, 256)}
        exec(lines, vars(module), names)
    assert names["x_hat"].shape == (2, 3, 256, 256) and names["indices"].shape == (2, 16, 16)
    assert names["losses"]["vq"].shape == ()


def test_losses_stand_alone_and_do_what_their_docstring_shows(tmp_path, monkeypatch):
    module, lines = alone("losses", tmp_path, monkeypatch)
    assert lines.count("\n") == 3
    # another network in VGG16's place, and small images: the same calls in less time
    x, x_hat = torch.rand(2, 2, 3, 16, 16)
    names = {"VGG16": lambda: module.SmallVGG([8] * 5, 10), "x": x, "x_hat": x_hat}
    exec(lines.replace("256", "16"), vars(module) | names, names)
    assert names["loss"] > 0 and set(names["shares"]) == {"relu5_3", "logit"} and names["loss_d"] > 0


def test_transformer_stands_alone_and_does_what_its_docstring_shows(tmp_path, monkeypatch):
    module, lines = alone("transformer", tmp_path, monkeypatch)
    assert lines.count("\n") == 1
    for kind in ("ar", "nar"):
        model = module.Transformer(kind, "tiny", 16, 4, classes=3)
        names = {"model": model, "indices": torch.zeros(2, 4, dtype=torch.long), "labels": torch.tensor([0, 2]),
                 "samples": range(2), "seed": 0}
        exec(lines, vars(module), names)
        assert names["total"] > 0 and 2 <= names["count"] <= 8
        assert model.eval().generate(range(64), labels=torch.arange(64) % 3, steps=4).shape == (64, 4)


# ------------------------------------------------------------------------------------------------- vq.py's parts


@pytest.mark.parametrize("options, paper", [({}, 54.5), (dict(attention=1), 57.9), (dict(attention=2), 61.4),
                                            (dict(extra_blocks=2), 70.0)])
def test_parameter_counts_are_the_papers(options, paper):
    with torch.device("meta"):
        assert vq.count(VQModel(**options)) == pytest.approx(paper, rel=0.002)


def test_the_layer_table_prints_the_counts(capsys):
    vq.main()
    out = capsys.readouterr().out
    assert all(f"{n:.2f}" in out for n in (54.52, 57.94, 61.36, 69.87))


def test_distances_and_nearest_code_against_a_loop():
    torch.manual_seed(0)
    q = Quantizer(16, 4)
    torch.nn.init.normal_(q.codebook)
    z = torch.randn(2, 4, 3, 3)
    z_q, indices, _ = q(z)
    assert torch.equal(q.nearest(z.permute(0, 2, 3, 1).flatten(0, 2)), indices.flatten())
    for b in range(2):
        for i in range(3):
            for j in range(3):
                d = [sum((z[b, :, i, j] - code) ** 2).item() for code in q.codebook]
                assert indices[b, i, j] == d.index(min(d))
                assert torch.allclose(z_q[b, :, i, j], q.codebook[indices[b, i, j]], atol=1e-6)
    assert torch.allclose(q.distances(z[0].flatten(1).T)[5, 3], (z[0].flatten(1).T[5] - q.codebook[3]).square().sum())


def test_distances_keep_their_digits_far_from_the_origin():
    q = Quantizer(64, 8)
    torch.manual_seed(0)
    torch.nn.init.normal_(q.codebook)
    z = torch.randn(200, 8)
    near = q.distances(z)
    with torch.no_grad():
        q.codebook += 300
    assert torch.allclose(q.distances(z + 300), near, atol=1e-2)
    assert torch.equal(q.distances(z + 300).argmin(1), near.argmin(1))


def test_straight_through_gradient():
    q = Plain(16, 4)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    g = torch.randn(2, 4, 3, 3)
    (q(z)[0] * g).sum().backward()
    assert torch.equal(z.grad, g) and q.codebook.grad is None


@pytest.mark.parametrize("term, moved", [("codebook", {"codes"}), ("commitment", {"encoder"}),
                                         ("H", {"codes", "encoder"})])
def test_which_tensor_each_term_moves(term, moved):
    model = small()
    model.quantizer.codebook.data *= 30
    _, _, losses = model.encode(torch.randn(2, 3, 8, 8))
    losses[term].backward()
    parts = {"codes": [model.quantizer.codebook], "encoder": model.encoder.parameters(),
             "decoder": model.decoder.parameters()}
    assert {n for n, ps in parts.items() if any(p.grad is not None and p.grad.abs().sum() > 0 for p in ps)} == moved


def test_beta_is_on_the_commitment_term():
    q = Plain(16, 4, beta=0.25)
    z = torch.randn(2, 4, 3, 3)
    z_q, _, losses = q(z)
    mse = F.mse_loss(z_q, z)
    assert losses["codebook"].item() == pytest.approx(mse.item(), rel=1e-5) == losses["commitment"].item()
    assert losses["vq"].item() == pytest.approx(1.25 * mse.item(), rel=1e-5)
    z.requires_grad_()
    q(z)[2]["vq"].backward()  # the encoder feels beta, the codebook feels 1
    assert torch.allclose(z.grad, 0.25 * 2 * (z - z_q).detach() / z.numel(), atol=1e-7)


def test_entropy_term_against_a_loop_and_its_sign():
    torch.manual_seed(0)
    q = Quantizer(5, 3, gamma=0.01)
    torch.nn.init.normal_(q.codebook)
    z = torch.randn(1, 3, 2, 2)
    rows = [z[0, :, i, j] for i in range(2) for j in range(2)]
    soft = []
    for row in rows:
        e = [math.exp(-sum((row - c) ** 2)) for c in q.codebook.detach()]
        soft.append([v / sum(e) for v in e])
    usage = [sum(column) / 4 for column in zip(*soft)]
    H = -sum(u * math.log(u) for u in usage)
    losses = q(z)[2]
    assert losses["H"].item() == pytest.approx(H, rel=1e-5)
    base = losses["codebook"] + 0.25 * losses["commitment"]
    assert (losses["vq"] - base).item() == pytest.approx(0.01 * (math.log(5) - H), rel=1e-3)


def test_the_entropy_term_alone_raises_the_entropy():
    torch.manual_seed(0)
    q = Quantizer(32, 4)
    z = torch.randn(8, 4, 4, 4)
    q.codebook.data.normal_(std=2)
    first = q(z)[2]["H"].item()
    optimizer = torch.optim.Adam(q.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        losses = q(z)[2]
        (losses["vq"] - losses["codebook"] - 0.25 * losses["commitment"]).backward()
        optimizer.step()
    assert q(z)[2]["H"].item() > first + 0.1


def attend_by_loops(layer, x, p, dilated):
    b, c, h, w = x.shape
    t = layer.norm(x)
    qkv = layer.qkv(t.permute(0, 2, 3, 1))  # (b, h, w, 3c)
    out, d = torch.zeros(b, h, w, c), c // layer.heads
    for n in range(b):
        for i in range(h):
            for j in range(w):
                group = [(k, m) for k in range(h) for m in range(w)
                         if ((k % p, m % p) == (i % p, j % p) if dilated else (k // p, m // p) == (i // p, j // p))]
                for a in range(layer.heads):
                    s = slice(a * d, (a + 1) * d)
                    q = qkv[n, i, j, :c][s]
                    keys = torch.stack([qkv[n, k, m, c:2 * c][s] for k, m in group])
                    values = torch.stack([qkv[n, k, m, 2 * c:][s] for k, m in group])
                    out[n, i, j, s] = (keys @ q / math.sqrt(d)).softmax(0) @ values
    return x + layer.out(out).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [8, 6, 5])
@pytest.mark.parametrize("dilated", [False, True])
def test_attention_against_loops(size, dilated):
    torch.manual_seed(0)
    layer = BlockAttention(16, dilated)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 16, size, size)
    slow = attend_by_loops(layer, x, vq.block_side(size, size), dilated)
    assert torch.allclose(layer(x), slow, atol=1e-5)


def test_block_sides():
    assert [vq.block_side(s, s) for s in (16, 32, 64, 128, 256)] == [4, 8, 8, 16, 16]
    assert [vq.block_side(s, s) for s in (8, 6, 5, 24, 20, 1)] == [4, 2, 1, 8, 4, 1]


def test_heads():
    assert [BlockAttention(c, False).heads for c in (128, 256, 512)] == [4, 4, 8]  # of 32, 64, 64 channels


def test_attention_starts_as_the_identity():
    phase1, phase2 = small(), small(attention=1)
    state = phase1.state_dict()
    phase2.load_state_dict({k: state.get(k, v) for k, v in phase2.state_dict().items()})
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(phase1(x)[0], phase2(x)[0])


def test_shortcut_takes_the_blocks_input():
    torch.manual_seed(0)
    block = vq.ResBlock(16, 32)
    x = torch.randn(1, 16, 4, 4)
    h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    assert torch.allclose(block(x), h + block.shortcut(x))


@pytest.mark.parametrize("codebook", CODEBOOKS.values())
def test_codes_decode_to_the_reconstruction(codebook):
    model = small(quantizer=codebook).eval()
    x = torch.randn(2, 3, 16, 16)
    x_hat, indices, _ = model(x)
    assert x_hat.shape == x.shape and indices.shape == (2, 8, 8) and indices.dtype == torch.int64
    assert torch.allclose(model.decode_indices(indices), x_hat, atol=1e-5)
    rebuilt = small(seed=1, quantizer=codebook).eval()
    assert not torch.equal(rebuilt(x)[0], x_hat)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(x)[0], x_hat)


@pytest.mark.parametrize("width, groups", [(128, 32), (512, 32), (16, 4), (48, 12), (144, 24)])
def test_groups_divide_the_width(width, groups):
    assert vq.norm(width).num_groups == groups


def test_usage_and_perplexity():
    usage, perplexity, H = vq.usage_and_perplexity(torch.tensor([5, 5, 0, 0]))
    assert (usage, perplexity, H) == pytest.approx((0.5, 2.0, math.log(2)))


@pytest.mark.parametrize("codebook", CODEBOOKS.values())
def test_fingerprint_is_of_encoder_and_codebook(codebook):
    model, first = small(quantizer=codebook), fingerprint(small(quantizer=codebook))
    with torch.no_grad():
        model.decoder.stem.bias += 1
        for buffer in model.quantizer.buffers():  # K-means' memory
            buffer += 1
        assert fingerprint(model) == first
        for name, p in [*model.encoder.named_parameters(), *model.quantizer.named_parameters()]:
            p.flatten()[0] += 1e-4
            assert fingerprint(model) != first, name
            first = fingerprint(model)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        VQModel(channels=(20, 32))


# ------------------------------------------------------------------------------------------------- codebooks

def quantizer(codebook, K=32, z_dim=8, **options):
    torch.manual_seed(0)
    q = codebook(K, z_dim, **options)
    nn.init.normal_(q.codebook)
    return q, torch.randn(2, z_dim, 4, 4)


@pytest.mark.parametrize("codebook", CODEBOOKS.values())
def test_all_codebooks_keep_the_contract(codebook):
    """What Quantizer's docstring promises."""
    q, z = quantizer(codebook, beta=0.5, gamma=0.25)
    assert q.K == 32
    indices = q.nearest(q.codes().detach())  # every code is nearest to itself
    assert indices.dtype == torch.int64 and torch.equal(indices, torch.arange(32))
    assert q.embed(torch.randint(32, (3, 4, 5))).shape == (3, 8, 4, 5)
    z_q, indices, losses = q(z)
    assert z_q.shape == z.shape and indices.shape == (2, 4, 4) and indices.dtype == torch.int64
    assert ((0 <= indices) & (indices < 32)).all() and len(indices.unique()) > 4
    assert torch.allclose(q.embed(indices), z_q, atol=1e-5)
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    gamma = 0.25 if codebook is Quantizer else 0  # the entropy term is the paper's alone
    total = losses["codebook"] + 0.5 * losses["commitment"] + gamma * (math.log(32) - losses["H"])
    assert losses["vq"].item() == pytest.approx(total.item(), rel=1e-5)
    z.requires_grad_()
    for trained in (False, True):  # by z_q, straight through; by the losses
        z.grad = None
        z_q, _, losses = q(z)
        (losses["vq"] if trained else z_q.square().sum()).backward()
        assert z.grad.abs().sum() > 0 and (q.codebook.grad is not None) == trained
    q.eval()
    again = q(z)
    assert all(torch.equal(a, b) for a, b in zip(again[:2], q(z)[:2]))
    other = codebook(32, 8)
    other.load_state_dict(q.state_dict())
    assert torch.equal(other.eval()(z)[0], again[0])


@pytest.mark.parametrize("codebook", CODEBOOKS.values())
def test_all_codebooks_are_fp32_under_autocast(codebook):
    q, z = quantizer(codebook, K=256)
    q.eval()
    rows = torch.randn(500, q.codes().shape[1])

    def results():
        z_q, indices, losses = q(z)
        return {"z_q": z_q, "indices": indices, **losses, "nearest": q.nearest(rows), "embed": q.embed(indices)}
    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        cast = results()
    assert [name for name in plain if not torch.equal(plain[name], cast[name])] == []
    assert cast["z_q"].dtype == cast["embed"].dtype == torch.float32


@pytest.mark.parametrize("codebook", CODEBOOKS.values())
def test_the_soft_usage_passes_through_mean_in_training(codebook):
    q, z = quantizer(codebook)
    calls, one = [], q(z)[2]["H"]

    def mean(usage):  # two processes, the other one with uniform usage
        calls.append(usage)
        return (usage + 1 / 32) / 2
    q.mean = mean
    H = q(z)[2]["H"]
    usage, = calls
    assert usage.shape == (32,) and usage.sum().item() == pytest.approx(1, rel=1e-5) and usage.requires_grad
    assert one.item() == pytest.approx(-(usage * usage.log()).sum().item(), rel=1e-4)
    both = (usage + 1 / 32) / 2
    assert H.item() == pytest.approx(-(both * both.log()).sum().item(), rel=1e-5)
    q.eval()(z)
    assert len(calls) == 1  # in a validation the processes don't arrive together


class Signs(nn.Module):
    """Somebody's own quantizer, with the contract and no more: the signs of the first dimensions are the code."""

    def __init__(self, K, z_dim, beta, gamma):
        super().__init__()
        self.K, self.bits, self.beta = K, K.bit_length() - 1, beta
        self.up = nn.Linear(self.bits, z_dim)

    def nearest(self, z):
        return (z > 0).long() @ 2 ** torch.arange(self.bits)

    def embed(self, indices):
        signs = indices[..., None] >> torch.arange(self.bits) & 1
        return self.up(2.0 * signs - 1).permute(0, 3, 1, 2)

    def forward(self, z_hat):
        z = z_hat.permute(0, 2, 3, 1)[..., :self.bits]
        indices = self.nearest(z)
        commitment = (z - z.sign().detach()).square().mean()
        z_q = self.up(z + (z.sign() - z).detach()).permute(0, 3, 1, 2)
        return z_q, indices, {"commitment": commitment, "vq": self.beta * commitment}


def test_a_quantizer_of_ones_own_stands_in():
    model = small(quantizer=Signs)
    x = torch.randn(2, 3, 16, 16)
    x_hat, indices, losses = model(x)
    assert torch.allclose(model.decode_indices(indices), x_hat, atol=1e-5) and len(indices.unique()) > 4
    (x_hat.mean() + losses["vq"]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_factorized_codes_lie_on_the_sphere():
    q, z = quantizer(Factorized, K=64, z_dim=16)
    assert q.codes().shape == (64, 32)
    assert torch.allclose(q.codes().norm(dim=1), torch.ones(64), atol=1e-6)
    rows = F.normalize(q.down(z.permute(0, 2, 3, 1).flatten(0, 2)), dim=1)  # and so do the features
    _, indices, losses = q(z)
    assert torch.equal(q.nearest(rows), indices.flatten())
    mse = F.mse_loss(rows, q.codes()[indices.flatten()]).item()
    assert losses["codebook"].item() == pytest.approx(mse, rel=1e-5) == losses["commitment"].item()
    assert torch.equal(q.nearest(rows), (rows @ q.codes().T).argmax(1))  # on the sphere, nearest is most alike


def test_kmeans_finds_clusters():
    torch.manual_seed(0)
    centres = torch.randn(3, 4) * 10
    points = (centres.repeat_interleave(50, 0) + 0.01 * torch.randn(150, 4))[torch.randperm(150)]
    best = min(torch.cdist(kmeans(points, 3, seed), centres).min(0).values.max() for seed in range(20))
    assert best < 0.1  # of several starts one at least finds all three
    assert torch.equal(kmeans(points, 3, seed=1), kmeans(points, 3, seed=1))  # no global random state
    many = kmeans(points[:5], 8, seed=0)  # fewer points than codes
    assert many.shape == (8, 4) and many.isfinite().all()


def test_kmeans_codebook_is_set_from_encoder_outputs(monkeypatch):
    torch.manual_seed(0)
    q = KMeans(8, 4)
    before = q.codebook.clone()
    for _ in range(3):
        q(torch.randn(2, 4, 4, 4) + 5)
    assert not torch.equal(q.codebook, before) and q.codebook.mean() > 4
    assert len(torch.unique(q(torch.randn(8, 4, 4, 4) + 5)[1])) == 8
    monkeypatch.setattr(q, "EVERY", 4)
    monkeypatch.setattr(q, "UNTIL", 12)
    codes = [q.codebook.clone()]
    for _ in range(16):
        q(torch.randn(2, 4, 4, 4) + 5)
        codes.append(q.codebook.clone())
    changed = [step for step, (a, b) in enumerate(zip(codes, codes[1:]), 4) if not torch.equal(a, b)]
    assert changed == [4, 8, 12]  # not at 16


def test_kmeans_keeps_the_newest_rows_of_all_processes(monkeypatch):
    monkeypatch.setattr(KMeans, "RESERVOIR", 40)
    q = KMeans(4, 1)
    q.gather = lambda rows: torch.cat([rows, rows + 1000])  # two processes
    z = torch.arange(44.0)
    for part in z.split(4):
        q(part.view(1, 1, 2, 2))
    newest = torch.cat([z[-20:], z[-20:] + 1000])
    assert torch.equal(q.reservoir.flatten().sort().values, newest)
    q(z.view(1, 1, 4, 11))  # more at once than there is room for
    assert torch.equal(q.reservoir.flatten().sort().values, z[-40:] + 1000)
    monkeypatch.setattr(q, "EVERY", int(q.steps))
    q(z[:4].view(1, 1, 2, 2))
    assert torch.equal(q.codebook, kmeans(q.reservoir, 4, seed=q.EVERY))


def test_kmeans_leaves_fixed_codes_and_bad_rows_alone():
    torch.manual_seed(0)
    q = KMeans(8, 4)
    q.requires_grad_(False)  # phase 2
    before = q.codebook.clone()
    for _ in range(5):
        q(torch.randn(2, 4, 4, 4))
    assert torch.equal(q.codebook, before)
    q.requires_grad_(True)
    q.eval()
    for _ in range(5):
        q(torch.randn(2, 4, 4, 4))
    assert torch.equal(q.codebook, before)
    q.train()
    for i in range(5):
        q(torch.full((2, 4, 4, 4), float("nan")) if i == 0 else torch.randn(2, 4, 4, 4))
    assert q.codebook.isfinite().all() and not torch.equal(q.codebook, before)
