"""The tokenizer against slow references: counts, Eq. 1, the loss terms, attention, codebooks."""
import math

import pytest
import torch
import torch.nn.functional as F

import vq
from vq import BlockAttention, Quantizer, VQModel


def small(**options):
    torch.manual_seed(0)
    return VQModel(channels=(16, 32), z_dim=8, codebook_size=32, **options)


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
    q = Quantizer("none", 16, 4)
    torch.nn.init.normal_(q.codebook)
    z = torch.randn(2, 4, 3, 3)
    z_q, indices, _ = q(z)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                d = [sum((z[b, :, i, j] - code) ** 2).item() for code in q.codebook]
                assert indices[b, i, j] == d.index(min(d))
                assert torch.allclose(z_q[b, :, i, j], q.codebook[indices[b, i, j]], atol=1e-6)
    assert torch.allclose(q.distances(z[0].flatten(1).T)[5, 3], (z[0].flatten(1).T[5] - q.codebook[3]).square().sum())


def test_distances_keep_their_digits_far_from_the_origin():
    q = Quantizer("none", 64, 8)
    torch.manual_seed(0)
    torch.nn.init.normal_(q.codebook)
    z = torch.randn(200, 8)
    near = q.distances(z)
    with torch.no_grad():
        q.codebook += 300
    assert torch.allclose(q.distances(z + 300), near, atol=1e-2)
    assert torch.equal(q.distances(z + 300).argmin(1), near.argmin(1))


def test_quantizer_is_fp32_under_autocast():
    q = Quantizer("entropy", 256, 16)
    torch.manual_seed(0)
    torch.nn.init.normal_(q.codebook)
    z = torch.randn(4, 16, 8, 8)
    plain = q(z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = q(z)
    assert torch.equal(plain[1], cast[1]) and cast[0].dtype == torch.float32
    assert plain[2]["vq"] == cast[2]["vq"]


def test_straight_through_gradient():
    q = Quantizer("none", 16, 4)
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
    q = Quantizer("none", 16, 4, beta=0.25)
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
    q = Quantizer("entropy", 5, 3, gamma=0.01)
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
    q = Quantizer("entropy", 32, 4)
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


@pytest.mark.parametrize("codebook", vq.CODEBOOKS)
def test_codes_decode_to_the_reconstruction(codebook):
    model = small(codebook=codebook).eval()
    x = torch.randn(2, 3, 16, 16)
    x_hat, indices, _ = model(x)
    assert x_hat.shape == x.shape and indices.shape == (2, 8, 8) and indices.dtype == torch.int64
    assert torch.allclose(model.decode_indices(indices), x_hat, atol=1e-5)
    rebuilt = VQModel(**model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt.eval()(x)[0], x_hat)


def test_factorized_codes_lie_on_the_sphere():
    q = Quantizer("factorized", 64, 16)
    assert q.codes().shape == (64, 32)
    assert torch.allclose(q.codes().norm(dim=1), torch.ones(64), atol=1e-6)


def test_kmeans_finds_clusters():
    torch.manual_seed(0)
    centres = torch.randn(3, 4) * 10
    points = (centres.repeat_interleave(50, 0) + 0.01 * torch.randn(150, 4))[torch.randperm(150)]
    best = min(torch.cdist(vq.kmeans(points, 3, 10, torch.Generator().manual_seed(s)), centres).min(0).values.max()
               for s in range(20))
    assert best < 0.1  # of several starts one at least finds all three
    many = vq.kmeans(points[:5], 8, 3, torch.Generator().manual_seed(0))  # fewer points than codes
    assert many.shape == (8, 4) and many.isfinite().all()


def test_kmeans_codebook_is_set_from_encoder_outputs(monkeypatch):
    torch.manual_seed(0)
    q = Quantizer("kmeans", 8, 4)
    before = q.codebook.clone()
    for _ in range(3):
        q(torch.randn(2, 4, 4, 4) + 5)
    assert not torch.equal(q.codebook, before) and q.codebook.mean() > 4
    assert len(torch.unique(q(torch.randn(8, 4, 4, 4) + 5)[1])) == 8
    monkeypatch.setattr(q, "KMEANS_EVERY", 4)
    codes = [q.codebook.clone()]
    for _ in range(10):
        q(torch.randn(2, 4, 4, 4) + 5)
        codes.append(q.codebook.clone())
    assert sum(not torch.equal(a, b) for a, b in zip(codes, codes[1:])) == 3  # steps 4, 8, 12


def test_the_short_start_bypasses_then_sets_the_codes():
    q = Quantizer("entropy", 8, 4)
    z, before = torch.randn(4, 4, 4, 4), q.codebook.detach().clone()
    q.start = "bypass"
    z_q, indices, losses = q(z)
    assert torch.equal(z_q, z) and indices is None and losses["vq"] == 0
    assert torch.equal(q.codebook, before)
    assert q.eval()(z)[1].shape == (4, 4, 4)  # validation quantizes all the same
    q.train().start = "kmeans"
    q(torch.full_like(z, torch.nan))  # a bad step is no start
    assert torch.equal(q.codebook, before) and q.start == "kmeans"
    points = z.permute(0, 2, 3, 1).reshape(-1, 4)
    q(z)
    assert torch.equal(q.codebook, vq.kmeans(points, 8, q.KMEANS_ROUNDS, torch.Generator().manual_seed(0)))
    assert q.start == "" and len(q(z)[1].unique()) == 8


def test_kmeans_leaves_fixed_codes_and_bad_rows_alone(monkeypatch):
    torch.manual_seed(0)
    q = Quantizer("kmeans", 8, 4)
    q.requires_grad_(False)  # phase 2
    before = q.codebook.clone()
    for _ in range(5):
        q(torch.randn(2, 4, 4, 4))
    assert torch.equal(q.codebook, before)
    q.requires_grad_(True)
    for i in range(5):
        q(torch.full((2, 4, 4, 4), float("nan")) if i == 0 else torch.randn(2, 4, 4, 4))
    assert q.codebook.isfinite().all() and not torch.equal(q.codebook, before)


@pytest.mark.parametrize("width, groups", [(128, 32), (512, 32), (16, 4), (48, 12), (144, 24)])
def test_groups_divide_the_width(width, groups):
    assert vq.norm(width).num_groups == groups


def test_usage_and_perplexity():
    usage, perplexity, H = vq.usage_and_perplexity(torch.tensor([5, 5, 0, 0]))
    assert (usage, perplexity, H) == pytest.approx((0.5, 2.0, math.log(2)))


def test_fingerprint_is_of_encoder_and_codebook():
    model, first = small(), vq.fingerprint(small())
    with torch.no_grad():
        model.decoder.stem.bias += 1
        assert vq.fingerprint(model) == first
        model.quantizer.codebook[0, 0] += 1e-6
        assert vq.fingerprint(model) != first


@pytest.mark.parametrize("options", [dict(channels=(20, 32)), dict(codebook="magic")])
def test_bad_shapes_are_refused(options):
    with pytest.raises(ValueError, match="multiple of 16|none of"):
        VQModel(**options)
