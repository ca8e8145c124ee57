"""The component files by themselves; the tokenizer against slow references and counts."""
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Code, same
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import losses
import train_tokenizer
import transformer
import vq
from losses import load_vgg
from transformer import load_prior
from vq import BlockAttention, VQModel, fingerprint, kmeans, load_tokenizer

NAMES = ["vq", "factorized"]  # "kmeans" is the class of "vq"


def small(seed=0, **options):
    torch.manual_seed(seed)
    return VQModel(channels=(16, 32), z_dim=8, codebook_size=32, **options)


def spread_codes(name="vq", K=32, z_dim=8, **options):
    torch.manual_seed(0)
    q = vq.QUANTIZERS[name](K, z_dim, **options)
    nn.init.normal_(q.codebook)
    return q, torch.randn(2, z_dim, 4, 4)


def after_docstring(module, count, **names):
    """All names of a module after the `count` lines of code in its docstring."""
    shown = re.findall(r"^    (\w[\w, ]* = .+)", module.__doc__, re.M)
    assert len(shown) == count
    names = vars(module) | names
    exec("\n".join(shown), names)
    return names


def test_components_stand_alone_and_do_what_their_docstrings_show():
    for module in (vq, losses, transformer):
        source = Path(module.__file__).read_text()
        imported = re.findall(r"^ *(?:import|from) (\w+)", source, re.M)
        assert len(imported) > 3 and not {*imported} & {path.stem for path in ROOT.iterdir()}
    with FakeTensorMode():  # the paper's size, without its arithmetic
        x, x_hat = torch.empty(2, 2, 3, 256, 256)
        found = after_docstring(vq, 3, x=x)
        assert found["x_hat"].shape == x.shape and found["indices"].shape == (2, 16, 16)
        assert found["terms"]["vq"].shape == ()
        found = after_docstring(losses, 4, x=x, x_hat=x_hat, load_vgg=lambda _: losses.VGG16())
        assert found["loss"].shape == found["loss_d"].shape == ()
        assert set(found["layers"]) == {"relu5_3", "logit"}
    for kind in ("ar", "nar"):
        model = transformer.Transformer(kind, "tiny", 16, 4, num_classes=3)
        found = after_docstring(transformer, 3, model=model, labels=torch.tensor([0, 2]),
                                indices=torch.zeros(2, 4).long())
        assert found["total"] > 0 and 2 <= found["count"] <= 8
        assert model.eval().generate(64, torch.arange(64) % 3, decode_steps=4).shape == (64, 4)


def test_loaders_reject_other_files_and_run_no_code(tmp_path, vgg, tokenizer, prior, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {load_tokenizer: tokenizer, load_prior: prior, load_vgg: vgg}
    for load, good in files.items():
        state, net = torch.load(good, weights_only=True), load(good)
        net = net if load is load_vgg else net[0]
        assert same(dict(net.state_dict()), dict(state["model"])) and not net.training
        assert load is load_prior or not any(p.requires_grad for p in net.parameters())
        others = [torch.load(path, weights_only=True) for path in files.values() if path != good]
        for part in ("config", "model"):  # of before a renaming
            others.append(state | {part: state[part] | {"old_name": torch.ones(1)}})
        bad = Path(f"not_for_{load.__name__}.pt")
        for content in (None, b"not one", [1, 2], {"a": 1}, *others, state | {"args": Code()}):
            if isinstance(content, bytes):
                bad.write_bytes(content)
            elif content:  # else there is no such file
                torch.save(content, bad)
            with pytest.raises(SystemExit) as ended:
                load(bad)
            sentence = ended.value.code
            assert str(bad) in sentence and "running.md" in sentence and "\n" not in sentence
            assert not Path("ran").exists()


@pytest.mark.parametrize("name", NAMES)
def test_fingerprint_is_of_encoder_and_codebook(name):
    model, first = small(quantizer=name), fingerprint(small(quantizer=name))
    with torch.no_grad():
        for other in (model.decoder.stem.bias, *model.quantizer.buffers()):
            other += 1
        assert fingerprint(model) == first
        for part, p in [*model.encoder.named_parameters(), *model.quantizer.named_parameters()]:
            p.flatten()[0] += 1e-4
            assert fingerprint(model) != first, part
            first = fingerprint(model)


# -------------------------------------------------------------------------- encoder, decoder

def test_parameter_counts_are_the_papers_and_printed(capsys):
    vq.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("M")]
    counts = {words[-1]: words[-2] for words in rows[10:]}
    assert counts == {"54.5M": "54.52M", "57.9M": "57.94M", "61.4M": "61.36M", "70.0M": "69.87M"}


@pytest.mark.parametrize("size", [(8, 8), (8, 6), (6, 8), (5, 5)])
@pytest.mark.parametrize("dilated", [False, True])
def test_attention_is_full_attention_masked_to_its_groups(size, dilated):
    torch.manual_seed(0)
    layer, x, p = BlockAttention(16, dilated), torch.randn(2, 16, *size), vq.block_side(*size)
    nn.init.normal_(layer.out.weight)
    row, column = torch.cartesian_prod(*map(torch.arange, size)).T
    group = 8 * (row % p) + column % p if dilated else 8 * (row // p) + column // p
    qkv = layer.qkv(layer.norm(x).flatten(2).mT).unflatten(-1, (3, layer.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (2, heads, positions, d)
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).where(group == group[:, None], -torch.inf)
    y = layer.out((weights.softmax(-1) @ v).transpose(1, 2).flatten(2)).mT
    assert torch.allclose(layer(x), x + y.reshape(x.shape), atol=1e-5)


def test_sides_of_blocks_heads_and_groups():
    assert [vq.block_side(s, s) for s in (16, 32, 64, 128, 256)] == [4, 8, 8, 16, 16]
    assert [vq.block_side(s, s) for s in (8, 6, 5, 24, 20, 1)] == [4, 2, 1, 8, 4, 1]
    assert [BlockAttention(c, False).heads for c in (128, 256, 512)] == [4, 4, 8]
    assert [vq.norm(c).num_groups for c in (512, 128, 48, 16)] == [32, 32, 12, 4]


def test_shortcut_takes_the_blocks_input():
    torch.manual_seed(0)
    block = vq.ResBlock(16, 32)
    x = torch.randn(1, 16, 4, 4)
    h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    assert torch.allclose(block(x), h + block.shortcut(x))


# --------------------------------------------------------------------------------- quantizer

def test_distances_are_precise_far_from_the_origin():
    q, z = spread_codes()
    rows, codes = z.permute(0, 2, 3, 1).flatten(0, 2), q.codebook.detach().clone()
    slow = torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    for far, digits in ((0, 1e-5), (300, 1e-2)):
        q.codebook.data = codes + far
        assert torch.allclose(q.distances(rows + far), slow, atol=digits)


@pytest.mark.parametrize("name", NAMES)
def test_all_quantizers_keep_the_contract(name):
    """What Quantizer's docstring promises."""
    q, z = spread_codes(name, beta=0.5, gamma=0.25)
    z_q, indices, terms = q(z.requires_grad_())
    assert z_q.shape == z.shape and indices.shape == (2, 4, 4) and len(indices.unique()) > 4
    assert torch.allclose(q.embed(indices), z_q, atol=1e-5)
    entropy = 0.25 * (math.log(32) - terms["soft_entropy"])
    total = terms["codebook"] + 0.5 * terms["commitment"] + entropy
    assert terms["vq"].item() == pytest.approx(total.item(), rel=1e-5)
    for value, moves_codes in ((z_q.square().sum(), False), (terms["vq"], True)):
        grads = torch.autograd.grad(value, (z, q.codebook), retain_graph=True, allow_unused=True)
        assert grads[0].any() and (grads[1] is not None) == moves_codes


@pytest.mark.parametrize("name", NAMES)
def test_all_quantizers_are_fp32_under_autocast(name):
    q, z = spread_codes(name, K=256)
    q.eval()

    def results(z):
        z_q, indices, terms = q(z)
        return {"z_q": z_q, "indices": indices, "embed": q.embed(indices), **terms}
    plain = results(z.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(z.bfloat16())
    assert [part for part in plain if not torch.equal(plain[part], cast[part])] == []
    assert cast["z_q"].dtype == cast["embed"].dtype == torch.float32


def test_factorized_codes_and_features_lie_on_the_sphere():
    q, z = spread_codes("factorized", K=64, z_dim=16)
    assert q.codebook_vectors().shape == (64, 32)
    assert torch.allclose(q.codebook_vectors().norm(dim=1), torch.ones(64), atol=1e-6)
    rows = F.normalize(q.down(z.permute(0, 2, 3, 1).flatten(0, 2)), dim=1)
    z_q, indices, terms = q(z)
    cosine_similarity = rows @ q.codebook_vectors().T
    assert torch.equal(indices.flatten(), cosine_similarity.argmax(1))
    mse = F.mse_loss(rows, q.codebook_vectors()[indices.flatten()]).item()
    assert terms["codebook"].item() == pytest.approx(mse, rel=1e-5) == terms["commitment"].item()
    assert torch.allclose(z_q, q.up(q.codebook_vectors()[indices]).permute(0, 3, 1, 2), atol=1e-5)


def test_kmeans_finds_clusters():
    torch.manual_seed(0)
    centres = torch.randn(3, 4) * 10
    points = centres.repeat_interleave(50, 0) + 0.01 * torch.randn(150, 4)
    points = torch.cat([points, torch.full((5, 4), math.nan)])[torch.randperm(155)]
    errors = [torch.cdist(kmeans(points, 3, seed), centres).min(0).values for seed in range(20)]
    assert min(map(max, errors)) < 0.1  # at least one of several initializations finds all three
    assert torch.equal(kmeans(points, 3, seed=1), kmeans(points, 3, seed=1))
    few = points[:6]
    many = kmeans(few, 8, seed=0)  # codes without a point are put on random points
    assert many.shape == (8, 4) and (many[:, None] == few).all(-1).any(1).all()


def test_the_codebook_becomes_kmeans_of_the_last_encoder_outputs():
    model, x = VQModel((16,), 4, "kmeans", 8), torch.rand(70, 3, 16, 16)
    args = SimpleNamespace(dtype="fp32", codebook_size=8)
    train_tokenizer.kmeans_codebook(model, x, args)
    rows = model.encoder(x).detach().permute(0, 2, 3, 1).flatten(0, 2)  # 17,920
    found = model.quantizer.codebook.clone()
    assert torch.equal(found, kmeans(rows[-16_384:], 8))
    train_tokenizer.kmeans_codebook(model, x * math.nan, args)  # nothing to cluster
    assert torch.equal(model.quantizer.codebook, found)
