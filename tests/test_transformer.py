"""The prior: counts, cache, causality, samplers, MaskGIT, and a Markov source of known entropy."""
import math
import runpy

import numpy as np
import pytest
import torch
from conftest import same
from scipy import stats

import transformer
from transformer import Transformer, maskgit, sample, sample_mask


@pytest.fixture(autouse=True)
def small(monkeypatch):  # in another order than the others: sizes are read by name
    monkeypatch.setitem(transformer.SIZES, "test", {"width": 32, "blocks": 2, "heads": 2})
    monkeypatch.setitem(transformer.SIZES, "world", {"blocks": 2, "heads": 4, "width": 64})


def build(kind, K=13, N=9, num_classes=5, size="test", **options):
    """A model in eval mode. Its weights are far from the initialization: every part matters."""
    torch.manual_seed(0)
    model = Transformer(kind, size, K, N, num_classes, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def codes(model, batch):
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(model.num_classes, (batch,), generator=g) if model.num_classes else None
    return torch.randint(model.codebook_size, (batch, model.length), generator=g), labels


def moves(model, s, labels, j):
    """Which rows of logits of the first sequence change with its code j."""
    changed = s.clone()
    changed[0, j] = (s[0, j] + 1) % model.codebook_size
    return ((model(changed, labels) - model(s, labels)).abs().amax(-1)[0] > 1e-4).tolist()


def test_parameter_counts_are_the_papers_and_printed(capsys):
    runpy.run_path(transformer.__file__, run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("%")]
    assert [row[-3] for row in rows] == ["172M", "172M", "305M", "305M", "171M", "171M"]
    for *_, ours, paper, error, _ in rows:
        assert abs(float(ours[:-1]) / float(paper[:-1]) - 1) < 0.003 and abs(float(error)) < 0.3


def test_mask_and_null_class_are_rows_of_their_own_and_the_head_is_tied():
    ar, nar, null = build("ar"), build("nar"), build("nar", null_class=True)
    assert len(ar.tok_emb.weight) == 13 and len(nar.tok_emb.weight) == 14 and nar.mask_id == 13
    assert len(nar.cls_emb.weight) == 5 and len(null.cls_emb.weight) == 6
    s, labels = codes(nar, 3)
    before = nar(s, labels)
    nar.tok_emb.weight.data[13] += 1  # no code is masked, and the mask is no answer
    assert torch.equal(nar(s, labels), before)
    assert not torch.allclose(nar(s.masked_fill(s == s[0, 0], 13), labels), before)
    s[s == 4] = 0
    before = ar(s, labels)
    ar.tok_emb.weight.data[4] += 1  # a code that is not read changes only its own logit
    assert (ar(s, labels) != before).any(0).any(0).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_what_a_position_sees_and_which_code_it_predicts(kind):
    model, ar = build(kind), kind == "ar"
    s, labels = codes(model, 1)
    for j in range(9):
        assert moves(model, s, labels, j) == [i > j or not ar for i in range(9)]
    change = model(s, (labels + 1) % 5) - model(s, labels)
    assert (change.abs().amax(-1) > 1e-4).all()  # every position sees the class
    for block in model.blocks:
        for layer in (block.proj, block.fc2):
            layer.weight.data.zero_()
            layer.bias.data.zero_()
    for j in range(9 - ar):  # what is left predicts a code from one embedding: AR s_(i-1), NAR s_i
        assert moves(model, s, labels, j) == [i == j + ar for i in range(9)]
    with pytest.raises(ValueError, match="labels"):
        build(kind, num_classes=0)(s, labels)


@pytest.mark.parametrize("mode, classes", [("fp32", 0), ("fp32", 5), ("autocast", 5), ("bf16", 5)])
def test_cache_equals_the_full_forward(mode, classes):
    model = build("ar", N=16, num_classes=classes)
    s, labels = codes(model, 3)
    exact = model(s, labels)
    if mode == "bf16":
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        full = model(s, labels)
        cache, x, rows = model.new_cache(3), model._class_embedding(labels, 3), []
        for i in range(16):
            rows.append(model.decode_position(x, torch.tensor([i]), cache))
            x = model.tok_emb(s[:, i])[:, None]
    assert full.dtype == rows[0].dtype == torch.float32
    if mode == "autocast":  # and the logits are computed in fp32
        assert (full != full.bfloat16()).float().mean() > 0.9
    assert cache.dtype == (torch.float32 if mode == "fp32" else torch.bfloat16)
    error = (torch.stack(rows, 1) - full).abs().max()
    assert error < (1e-5 if mode == "fp32" else 0.02) * exact.abs().max()
    assert (full - exact).abs().max() < 0.05 * exact.abs().max()


def test_step_is_one_graph_for_all_positions_without_a_device_sync():
    model, seen = build("ar"), []
    torch._dynamo.reset()
    step = torch.compile(model.decode_position, fullgraph=True, dynamic=False,
                         backend=lambda graph, inputs: seen.append(graph.code) or graph.forward)
    cache, slots, x = model.new_cache(2), torch.arange(9), torch.randn(2, 1, 32)
    with torch.no_grad():
        for i in range(9):
            step(x, slots[i:i + 1], cache)
    assert len(seen) == 1 and ".item(" not in seen[0]


def test_dropout_is_on_in_training_only():
    model = build("ar", dropout=0.5)
    s, labels = codes(model, 2)
    assert torch.equal(model(s, labels), model(s, labels))
    model.train()
    for part in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        part.p = 0.0
    assert not torch.equal(model(s, labels), model(s, labels))  # the attention weights' own


def test_weight_decay_is_on_the_matrices_of_the_linear_layers_only():
    model = build("nar", null_class=True)
    decay, rest = model.param_groups(1e-2)
    assert decay["weight_decay"] == 1e-2 and rest["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in decay["params"]} == {
        f"blocks.{b}.{part}.weight" for b in range(2) for part in ("qkv", "proj", "fc1", "fc2")}
    assert len(decay["params"]) + len(rest["params"]) == len(names)


# ---------------------------------------------------------------- training

def test_masks_follow_the_cosine_and_are_never_empty():
    N, n = 16, 20000
    u = torch.rand(n, N + 1, generator=torch.Generator().manual_seed(0))
    mask = sample_mask(u[:, 0], u[:, 1:])
    # P(ceil(N cos(pi r / 2)) <= m) = 1 - (2 / pi) arccos(m / N)
    cdf = 1 - 2 / math.pi * np.arccos(np.arange(N + 1) / N)
    seen = np.bincount(mask.sum(1).numpy(), minlength=N + 1)
    assert seen[0] == 0 and stats.chisquare(seen[1:], n * np.diff(cdf)).pvalue > 1e-3
    fraction = mask.float().mean(0)
    assert (fraction / fraction.mean() - 1).abs().max() < 0.03  # no position is preferred
    assert sample_mask(torch.tensor([0.0, 1 - 2**-24]), u[:2, 1:]).sum(1).tolist() == [N, 1]


def test_corruption_masks_codes_and_drops_labels_row_by_row():
    model, n = build("nar", num_classes=2, null_class=True), 4000
    u = torch.rand(n, 11, generator=torch.Generator().manual_seed(0))
    s, labels = codes(model, n)
    whole = tokens, dropped, mask = model.make_inputs(s, labels, u, label_dropout=0.1)
    assert torch.equal(tokens, s.masked_fill(mask, 13)) and mask.any(1).all() and not mask.all()
    null = dropped == 2
    assert torch.equal(dropped[~null], labels[~null])
    assert stats.binomtest(int(null.sum()), n, 0.1).pvalue > 1e-3
    sizes = mask.sum(1)  # the same whether the label is dropped or not
    assert stats.ks_2samp(sizes[null], sizes[~null]).pvalue > 1e-3
    for rows in (slice(0, 5), slice(5, 6), slice(6, None, 7)):  # any split gives the same
        part = model.make_inputs(s[rows], labels[rows], u[rows], 0.1)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole))
    assert torch.equal(model.make_inputs(s, labels, u)[1], labels)  # off by default
    assert same(build("ar").make_inputs(s, labels, u), (s, labels, torch.ones_like(mask)))


# ---------------------------------------------------------------- samplers

LOGITS = np.array([1.0, -2, 0.5, 3, 2.5, -1, 0, 2.5, 1.5, -30, 0.2])  # with a tie


def expected(temperature, top_k, top_p):
    """The distribution that `sample` draws from."""
    p = np.exp(LOGITS / temperature)
    order = np.argsort(-p, kind="stable")
    p[order[top_k or len(p):]] = 0
    p /= p.sum()
    p[order[p[order].cumsum() - p[order] >= top_p]] = 0  # what the more probable codes hold
    return p / p.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.92),
    (1.0, 0, 0.5), (1.0, 0, 1e-6), (0.7, 8, 0.9), (3.0, 5, 0.7), (1.0, 11, 1.0)])
def test_samples_have_the_known_distribution(temperature, top_k, top_p):
    n, want = 100_000, expected(temperature, top_k, top_p)
    torch.manual_seed(5)
    logits = torch.tensor(LOGITS).float().expand(20, n // 20, -1)
    got = sample(logits, temperature, top_k, top_p)
    assert got.shape == (20, n // 20) and got.dtype == torch.int64
    seen = np.bincount(got.flatten().numpy(), minlength=11)
    likely = want * n > 5  # often enough for Pearson's chi-square
    assert not seen[want == 0].any() and seen[~likely].sum() < 30
    scaled = want[likely] / want[likely].sum() * seen[likely].sum()
    assert likely.sum() == 1 or stats.chisquare(seen[likely], scaled).pvalue > 1e-3


def test_a_code_of_zero_probability_is_never_sampled(monkeypatch):
    u = torch.cartesian_prod(*[torch.tensor([0.0, 1 - 2**-24])] * 11)  # (2048, 11): the ends
    monkeypatch.setattr(torch, "rand_like", lambda like: u.to(like.dtype))
    assert transformer.gumbel(u).isfinite().all()
    for allowed in ([0], [10], [3, 4], [0, 10], list(range(0, 11, 2))):
        logits = torch.full((2048, 11), -torch.inf)
        logits[:, allowed] = torch.arange(len(allowed)) / 5
        assert set(sample(logits).tolist()) == set(allowed)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_generate_equals_a_slow_reference(kind, cfg_scale):
    """AR: the whole prefix for every code. NAR: `maskgit` from all masked."""
    model = build(kind, null_class=True)
    labels, null = torch.tensor([1, 4, 2]), torch.full((3,), 5)
    torch.manual_seed(3)
    got = model.generate(3, labels, temperature=0.8, top_k=9, top_p=0.9, cfg_scale=cfg_scale,
                         decode_steps=5, choice_temperature=2.0)
    torch.manual_seed(3)

    def guided(s):
        return cfg_scale * model(s, labels) - (cfg_scale - 1) * model(s, null)
    with torch.no_grad():
        want = torch.full((3, 9), 13 * (kind == "nar"))
        if kind == "nar":
            want = maskgit(want, guided, 5, 13, 0.8, 2.0)
        for i in range(9 * (kind == "ar")):
            want[:, i] = sample(guided(want)[:, i], 0.8, 9, 0.9)
    assert got.dtype == torch.int64 and torch.equal(got, want)


# ---------------------------------------------------------------- MaskGIT

def slow_maskgit(tokens, logits_fn, uniforms, mask_id, temperature, choice_temperature):
    """One image, one code at a time. uniforms: for each step (N, K) and (N,) numbers."""
    N, T, start = len(tokens), len(uniforms), tokens.count(mask_id)
    for t, (u, choice) in enumerate(uniforms):
        logits = logits_fn(tokens) / temperature
        masked, ids, confidence = tokens.count(mask_id), list(tokens), [math.inf] * N
        ratio = (t + 1) / T
        for i in (i for i in range(N) if tokens[i] == mask_id):
            noisy = [logits[i][k] - math.log(-math.log(u[i][k])) for k in range(mask_id)]
            ids[i] = noisy.index(max(noisy))
            log_p = logits[i][ids[i]] - math.log(np.exp(logits[i].astype(float)).sum())
            gumbel = -math.log(-math.log(choice[i]))
            confidence[i] = log_p + choice_temperature * (1 - ratio) * gumbel
        if t == T - 1:
            return ids
        length = max(1, min(masked - 1, math.floor(start * math.cos(math.pi * ratio / 2))))
        tokens = ids
        for i in sorted(range(N), key=lambda i: confidence[i])[:length]:
            tokens[i] = mask_id if confidence[i] < math.inf else tokens[i]


@pytest.mark.parametrize("T, temperature, choice", [(1, 1.0, 0.45), (3, 1.0, 0.0),
                                                    (6, 1.0, 0.45), (16, 0.7, 4.5),
                                                    (25, 1.0, 2.0)])
def test_maskgit_equals_a_slow_reference(T, temperature, choice):
    model = build("nar", K=11, N=16, num_classes=0)
    start = torch.full((5, 16), 11)
    start[3, ::3] = start[4] = 2  # some codes of the last two are known, or all
    torch.manual_seed(T)
    uniforms = [(torch.rand(5, 16, 11).tolist(), torch.rand(5, 16).tolist()) for _ in range(T)]
    torch.manual_seed(T)
    with torch.no_grad():
        got = maskgit(start, model, T, 11, temperature, choice)
        for j in range(5):
            want = slow_maskgit(start[j].tolist(), lambda s: model(torch.tensor([s]))[0].numpy(),
                                [(u[j], c[j]) for u, c in uniforms], 11, temperature, choice)
            assert got[j].tolist() == want


# ---------------------------------------------------------------- a known world

K, N = 4, 8
P = np.random.default_rng(0).dirichlet(np.full(K, 0.3), (2, K))  # of a class and a code: the next


def draw(rng, n, classes):
    """Classes (n,), and codes (n, N) of their Markov chains. The first code is uniform."""
    c, s = rng.integers(classes, size=n), rng.integers(K, size=(n, N))
    for i in range(1, N):
        past = rng.random((n, 1)) > P[c, s[:, i - 1]].cumsum(-1)
        s[:, i] = past.sum(-1).clip(max=K - 1)
    return torch.from_numpy(c), torch.from_numpy(s)


def exact(kind, c, s, mask):
    """p(s_i | c, s_<i) of all codes, NAR p(s_i | c, unmasked codes) of the masked ones."""
    if kind == "ar":
        return np.c_[np.full(len(s), 1 / K), P[c[:, None], s[:, :-1], s[:, 1:]]]
    seen = np.where(mask[..., None], 1.0, np.eye(K)[s])
    a, b = np.full((len(s), N, K), 1 / K), np.ones((len(s), N, K))  # the forward-backward algorithm
    for i in range(1, N):
        a[:, i] = np.einsum("nk,nkl->nl", a[:, i - 1] * seen[:, i - 1], P[c])
    for i in range(N - 2, -1, -1):
        b[:, i] = np.einsum("nkl,nl->nk", P[c], b[:, i + 1] * seen[:, i + 1])
    p = a * b / (a * b).sum(-1, keepdims=True)
    return np.take_along_axis(p, s[..., None], -1)[..., 0][mask]


@pytest.mark.parametrize("kind, classes, steps", [("ar", 2, 150), ("nar", 1, 320)])
def test_a_prior_learns_a_markov_source_to_its_entropy(kind, classes, steps):
    """The training steps are those of transformer.py's docstring."""
    torch.manual_seed(0)
    model, rng = Transformer(kind, "world", K, N, classes, dropout=0.0), np.random.default_rng(1)
    optimizer = torch.optim.AdamW(model.param_groups(), betas=(0.9, 0.96))

    def loss(n):
        c, s = draw(rng, n, classes)
        tokens, labels, mask = model.make_inputs(s, c, torch.rand(n, N + 2))
        total, count = model.loss(model(tokens, labels), s, mask)
        return total / count, c.numpy(), s.numpy(), mask.numpy()

    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, t / 20, 2 - 2 * t / steps)
        optimizer.zero_grad()
        loss(128)[0].backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        value, *drawn = loss(4000)
    assert 0.99 < value.item() / -np.log(exact(kind, *drawn)).mean() < 1.03
