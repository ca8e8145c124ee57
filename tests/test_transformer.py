"""The prior: counts, cache, causality, samplers, MaskGIT, and a Markov source whose entropy is known."""
import itertools
import math
import runpy
import time
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

import transformer
from transformer import Transformer, draw_mask, keys, maskgit, mix, sample, uniforms


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(transformer.SIZES, "test", {"blocks": 2, "heads": 2, "width": 32})
    monkeypatch.setitem(transformer.SIZES, "world", {"blocks": 2, "heads": 4, "width": 64})


def build(kind, K=13, N=9, classes=5, size="test", seed=0, **kwargs):
    """A model in eval mode whose weights are far from their start, so that every part of it matters."""
    torch.manual_seed(seed)
    model = Transformer(kind, size, K, N, classes, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def codes(model, batch, seed=1):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(model.classes, (batch,), generator=g) if model.classes else None
    return torch.randint(model.codebook_size, (batch, model.tokens), generator=g), labels


def count(model, *names):
    return sum(p.numel() for n, p in model.named_parameters() if not names or n in names)


# ---------------------------------------------------------------- the model

@pytest.mark.parametrize("kind", ["ar", "nar"])
@pytest.mark.parametrize("size, classes, paper", [
    ("base", 1000, 172e6), ("large", 1000, 305e6), ("base", 0, 171e6)])
def test_parameter_counts_are_the_papers(kind, size, classes, paper):
    with torch.device("meta"):
        model = Transformer(kind, size, classes=classes)
    d, nar = transformer.SIZES[size]["width"], kind == "nar"
    assert abs(count(model) / paper - 1) < 0.003
    assert count(model) == 24 * (12 * d * d + 13 * d) + 2 * d + (1024 + nar + 256 + nar + max(classes, 1)) * d


def test_the_script_prints_the_counts(capsys):
    runpy.run_path(transformer.__file__, run_name="__main__")
    out = capsys.readouterr().out
    assert "171.86M" in out and "304.65M" in out and "171.09M" in out and out.count("\n") == 7
    assert [out.count(f" {paper}M ") for paper in (172, 305, 171)] == [2, 2, 2]


def test_mask_and_null_class_are_rows_of_their_own_and_the_head_is_tied():
    ar, nar = build("ar"), build("nar")
    null = build("nar", null_class=True)
    assert len(ar.code.weight) == 13 and len(nar.code.weight) == 14 and nar.mask_id == 13
    assert len(nar.prefix.weight) == 5 and len(null.prefix.weight) == 6
    s, labels = codes(nar, 3)
    before = nar(s, labels)
    assert before.shape == (3, 9, 13)
    with torch.no_grad():
        nar.code.weight[13] += 1  # no code is masked, and the mask is no answer
    assert torch.equal(nar(s, labels), before)
    assert not torch.allclose(nar(s.masked_fill(s == s[0, 0], 13), labels), before)
    s, labels = codes(ar, 3)
    s[s == 4] = 0
    before = ar(s, labels)
    with torch.no_grad():
        ar.code.weight[4] += 1  # a code that is not read changes its own logit alone
    assert ((ar(s, labels) != before).any(0).any(0).nonzero().flatten() == torch.tensor([4])).all()


def test_config_rebuilds_the_model():
    model = build("nar", null_class=True, dropout=0.2)
    other = Transformer(**model.config).eval()
    other.load_state_dict(model.state_dict())
    s, labels = codes(model, 2)
    assert torch.equal(model(s, labels), other(s, labels)) and other.drop.p == 0.2


def test_ar_sees_the_codes_before_and_nar_both_sides():
    ar, nar = build("ar"), build("nar")
    s, labels = codes(ar, 1)
    for j in range(9):
        changed = s.clone()
        changed[0, j] = (s[0, j] + 1) % 13
        moved = (ar(changed, labels) - ar(s, labels)).abs().amax(-1)[0] > 1e-4
        assert moved.tolist() == [i > j for i in range(9)]
        assert ((nar(changed, labels) - nar(s, labels)).abs().amax(-1)[0] > 1e-4).all()
    for model in ar, nar:  # and every logit sees the class
        assert ((model(s, (labels + 1) % 5) - model(s, labels)).abs().amax(-1)[0] > 1e-4).all()


def test_each_slot_predicts_its_own_code():
    """Without its blocks' output the model predicts each code from one embedding: AR s_(i-1), NAR s_i."""
    for kind, shift in (("ar", 1), ("nar", 0)):
        model = build(kind)
        with torch.no_grad():
            for block in model.blocks:
                for layer in (block.proj, block.fc2):
                    layer.weight.zero_()
                    layer.bias.zero_()
        s, labels = codes(model, 1)
        for j in range(9 - shift):
            changed = s.clone()
            changed[0, j] = (s[0, j] + 1) % 13
            moved = (model(changed, labels) != model(s, labels)).any(-1)[0]
            assert moved.nonzero().flatten().tolist() == [j + shift]


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("mode", ["fp32", "autocast", "bf16"])
def test_cache_equals_the_full_forward(mode, classes):
    model = build("ar", N=16, classes=classes)
    s, labels = codes(model, 3)
    exact = model(s, labels)
    if mode == "bf16":
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        full = model(s, labels)
        cache, x, rows = model.new_cache(3), model._prefix(labels, 3), []
        for i in range(16):
            rows.append(model.step(x, torch.tensor([i]), cache))
            x = model.code(s[:, i])[:, None]
    assert full.dtype == rows[0].dtype == torch.float32
    assert cache.dtype == (torch.float32 if mode == "fp32" else torch.bfloat16)
    error = (torch.stack(rows, 1) - full).abs().amax()
    assert error < 1e-5 * exact.abs().max() if mode == "fp32" else error < 0.02 * exact.abs().max()
    assert (full - exact).abs().max() < 0.05 * exact.abs().max()


def test_logits_are_computed_in_fp32_under_autocast():
    model = build("nar", K=512)
    s, labels = codes(model, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(s, labels)
        assert model.loss(logits, s, s >= 0)[0].dtype == torch.float32
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9  # bf16 logits would not be


def test_step_compiles_once_for_all_slots():
    model = build("ar")
    torch._dynamo.reset()
    seen = []
    step = torch.compile(model.step, fullgraph=True, dynamic=False,  # fullgraph: no value goes to the host
                         backend=lambda graph, inputs: seen.append(1) or graph.forward)
    cache, slots, x = model.new_cache(2), torch.arange(9), torch.randn(2, 1, 32)
    with torch.no_grad():
        for i in range(9):
            step(x, slots[i : i + 1], cache)
    assert len(seen) == 1


def test_dropout_is_on_in_training_alone():
    model = build("ar", dropout=0.5)
    s, labels = codes(model, 2)
    assert torch.equal(model(s, labels), model(s, labels))
    model.train()
    assert not torch.equal(model(s, labels), model(s, labels))
    for part in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        part.p = 0.0
    assert not torch.equal(model(s, labels), model(s, labels))  # the attention weights' own


def test_weight_decay_is_on_the_matrices_of_the_linear_layers_alone():
    model = build("nar", null_class=True)
    decay, rest = model.param_groups(1e-2)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decay["weight_decay"] == 1e-2 and rest["weight_decay"] == 0
    assert {names[id(p)] for p in decay["params"]} == {
        f"blocks.{b}.{part}.weight" for b in range(2) for part in ("qkv", "proj", "fc1", "fc2")}
    assert {"code.weight", "slot.weight", "prefix.weight"} <= {names[id(p)] for p in rest["params"]}
    assert len(decay["params"]) + len(rest["params"]) == len(names)


# ---------------------------------------------------------------- training

def test_loss_against_a_formula_by_hand():
    s = torch.tensor([[0, 2, 1], [1, 1, 0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    log_p = logits.double().numpy() - np.log(np.exp(logits.double().numpy()).sum(-1, keepdims=True))
    picked = [(0, 0, 0), (0, 2, 1), (1, 1, 1)]
    plain = -sum(log_p[i] for i in picked)
    smooth = -sum(0.9 * log_p[i] + 0.1 * log_p[i[:2]].mean() for i in picked)
    for kind, training, want in [("nar", True, smooth), ("nar", False, plain), ("ar", True, plain)]:
        total, n = build(kind, K=4, N=3).train(training).loss(logits, s, mask)
        assert n == 3 and abs(total.item() - want) < 1e-5, (kind, training)


def test_masks_follow_the_cosine_and_never_are_empty():
    N, n = 16, 20000
    u = uniforms(keys(0, range(n), "cpu"), -1, N + 1)
    mask = draw_mask(u[:, 0], u[:, 1:])
    sizes = mask.sum(1)
    # P(ceil(N cos(pi r / 2)) <= m) = 1 - (2 / pi) arccos(m / N)
    cdf = 1 - 2 / math.pi * np.arccos(np.arange(N + 1) / N)
    cdf[-1] = 1
    seen = np.bincount(sizes.numpy(), minlength=N + 1)
    assert seen[0] == 0
    assert stats.chisquare(seen[1:], n * np.diff(cdf)).pvalue > 1e-3
    assert (mask.float().mean(0) / mask.float().mean() - 1).abs().max() < 0.03  # no place is preferred
    ends = draw_mask(torch.tensor([0.0, 1 - 2**-24, 1.0]), u[:3, 1:]).sum(1)
    assert ends.tolist() == [N, 1, 1]


def test_corruption_is_a_function_of_seed_and_sample_number():
    model = build("nar", null_class=True)
    s, labels = codes(model, 8)
    ids = [3, 1, 4, 15, 9, 2, 6, 500]
    whole = model.corrupt(s, labels, ids, seed=7, label_dropout=0.5)
    tokens, dropped, mask = whole
    assert torch.equal(tokens, s.masked_fill(mask, 13)) and mask.any(1).all() and not mask.all()
    assert set(dropped.tolist()) > {5} and torch.equal(dropped[dropped != 5], labels[dropped != 5])
    split = [6, 0, 2], [7, 1], [3, 5, 4]
    parts = [model.corrupt(s[k], labels[k], [ids[j] for j in k], 7, 0.5) for k in split]
    for got, want in zip(zip(*parts), whole):
        assert torch.equal(torch.cat(got), want[[j for k in split for j in k]])
    assert not torch.equal(model.corrupt(s, labels, ids, seed=8)[2], mask)
    assert torch.equal(model.corrupt(s, labels, ids, seed=7)[1], labels)  # label_dropout is off by default
    ar = build("ar")
    tokens, same, mask = ar.corrupt(s, labels, ids)
    assert torch.equal(tokens, s) and torch.equal(same, labels) and mask.all()


def test_labels_are_dropped_at_the_rate_asked_for():
    model, n = build("ar", classes=2, null_class=True), 4000
    s, labels = torch.zeros(n, 9, dtype=torch.long), torch.ones(n, dtype=torch.long)
    _, labels, _ = model.corrupt(s, labels, range(n), label_dropout=0.1)
    assert stats.binomtest(int((labels == 2).sum()), n, 0.1).pvalue > 1e-3


# ---------------------------------------------------------------- random numbers

WORD = 2**64 - 1


def mix64(x):
    """SplitMix64's finaliser as it is published, in Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def uniform64(seed, sample, place, number):
    """keys and uniforms in Python's integers: a multiple of 2^-24."""
    golden = 0x9E3779B97F4A7C15
    key = mix64(mix64(sample + golden & WORD) ^ mix64(seed & WORD))
    return ((mix64(mix64(key + place & WORD) + golden * (number + 1) & WORD) >> 41) + 0.5) / 2**23


def test_mix_is_splitmix64():
    # the first numbers of the published generator, seeded with 1234567
    state = 1234567 + transformer.GOLDEN * torch.arange(1, 6)
    assert [x & WORD for x in mix(state).tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    some = torch.from_numpy(np.random.default_rng(0).integers(-2**63, 2**63, 10_000))
    some[:6] = torch.tensor([0, 1, -1, -2**63, 2**63 - 1, 2**33])
    assert [x & WORD for x in mix(some).tolist()] == [mix64(x & WORD) for x in some.tolist()]


def test_uniforms_equal_a_slow_reference():
    samples = [0, 1, 2, 5, 2**31, 2**40]
    for seed in (0, 1, 2**32 + 7):
        key = keys(seed, samples, "cpu")
        assert key.dtype == torch.int64 and torch.equal(key, keys(seed, np.array(samples), torch.device("cpu")))
        for place in (-1, 0, 1, 255, 100_000):
            u = uniforms(key, place, 7)
            assert u.dtype == torch.float32 and u.tolist() == [
                [uniform64(seed, sample, place, k) for k in range(7)] for sample in samples]
            assert torch.equal(uniforms(key, torch.tensor([place]), 7), u)  # as `generate` has it, on the device
            assert torch.equal(uniforms(key, place, 3), u[:, :3])
            assert torch.equal(torch.cat([uniforms(part, place, 7) for part in key.split([1, 3, 2])]), u)


def test_keys_differ_for_every_seed_and_sample():
    every = torch.cat([keys(seed, range(1000), "cpu") for seed in range(200)])
    assert len(every.unique()) == 200_000


@pytest.mark.parametrize("bits", [0, -1])
def test_uniforms_never_come_to_0_or_1(monkeypatch, bits):
    monkeypatch.setattr(transformer, "mix", lambda x: torch.full_like(x, bits))
    u = uniforms(torch.zeros(1, dtype=torch.long), 0, 1)
    assert 0 < u < 1 and transformer.gumbel(u).isfinite()


def test_uniforms_are_uniform_and_independent():
    """Each number against those next to it: of other seeds, places, samples, of the same place."""
    u = torch.stack([torch.stack([uniforms(keys(seed, range(48), "cpu"), place, 48) for place in range(-1, 47)])
                     for seed in range(5)])  # (5 seeds, 48 places, 48 samples, 48 numbers)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount((u * 2**12).long().flatten().numpy(), minlength=2**12)).pvalue > 1e-3
    moves = [(0, 1, 1, 0), (0, 1, -1, 0), (0, 1, 0, 1), (0, 1, 0, -1), (0, 0, 1, 1), (0, 0, 1, -1), (1, 0, -1, 0)]
    moves += [tuple(lag * (d == dim) for d in range(4)) for dim in range(4) for lag in (1, 2)]
    for move in moves:
        pairs = ((u * 16).long() * 16 + (u.roll(move, (0, 1, 2, 3)) * 16).long()).flatten()
        assert stats.chisquare(np.bincount(pairs.numpy(), minlength=256)).pvalue > 1e-3, move


# ---------------------------------------------------------------- samplers

LOGITS = np.array([1.0, -2, 0.5, 3, 2.5, -1, 0, 2.5, 1.5, -30, 0.2])  # K = 11: no power of two, and a tie


def fits(seen, p):
    """Pearson's chi-square, over the outcomes that are expected five times or more."""
    likely = p * seen.sum() > 5
    assert seen[~likely].sum() < 30
    want = p[likely] / p[likely].sum() * seen[likely].sum()
    return likely.sum() == 1 or stats.chisquare(seen[likely], want).pvalue > 1e-3


def expected(temperature, top_k, top_p):
    """The same distribution, the long way round."""
    p = np.exp(LOGITS / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda k: -p[k])
    if top_k:
        for k in order[top_k:]:
            p[k] = 0
        p /= p.sum()
    held = 0
    for k in order:
        held, p[k] = held + p[k], p[k] if held < top_p else 0
    return p / p.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.92), (1.0, 0, 0.5),
    (1.0, 0, 1e-6), (0.7, 8, 0.9), (3.0, 5, 0.7), (1.0, 11, 1.0)])
def test_samplers_draw_from_the_known_distribution(temperature, top_k, top_p):
    n, want = 100_000, expected(temperature, top_k, top_p)
    u = uniforms(keys(5, range(n), "cpu"), 0, 11)
    got = sample(torch.tensor(LOGITS).float().expand(n, -1), u, temperature, top_k, top_p)
    seen = np.bincount(got.numpy(), minlength=11)
    assert seen.shape == (11,) and not seen[want == 0].any()
    assert fits(seen, want)


def test_a_code_of_zero_probability_is_never_sampled():
    ends = torch.tensor([0.5 / 2**23, 1 - 0.5 / 2**23])  # of `uniforms`
    u = torch.cartesian_prod(*[ends] * 11)  # (2048, 11)
    for allowed in ([0], [10], [7], [3, 4], [0, 10], list(range(0, 11, 2))):
        logits = torch.full((11,), -torch.inf)
        logits[allowed] = torch.randn(len(allowed), generator=torch.Generator().manual_seed(1))
        got = sample(logits.expand(2048, -1), u)
        assert set(got.tolist()) == set(allowed)


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 8, 0.9), (3.0, 3, 1.0), (1.0, 0, 0.5)])
def test_sample_equals_a_slow_reference(temperature, top_k, top_p):
    """The kept code whose logit plus -log(-log u) is the largest, one row at a time."""
    kept = np.flatnonzero(expected(temperature, top_k, top_p))
    u = uniforms(keys(0, range(600), "cpu"), 3, 11)
    got = sample(torch.tensor(LOGITS).float().expand(20, 30, 11), u.view(20, 30, 11), temperature, top_k, top_p)
    assert got.shape == (20, 30) and got.dtype == torch.int64
    for row, code in zip(u.tolist(), got.flatten().tolist()):
        assert code == max(kept, key=lambda k: LOGITS[k] / temperature - math.log(-math.log(row[k])))


def test_rounding_changes_next_to_no_draw():
    """100,000 draws among 1,024 codes from logits that move by 1e-6, as another batch size may move them: each changes
    with a probability near 1e-6. (By inverting the cumulative distribution, about eight would change.)"""
    g, changed = torch.Generator().manual_seed(0), 0
    logits = 2 * torch.randn(2000, 1024, generator=g)
    moved = logits + 1e-6 * torch.rand(2000, 1024, generator=g).sub(0.5).sign()
    for _ in range(50):
        u = torch.rand(2000, 1024, generator=g)
        changed += int((sample(logits, u) != sample(moved, u)).sum())
    assert changed <= 1


def test_ar_samples_have_the_models_own_distribution():
    model, n = build("ar", K=3, N=3, classes=2), 20000
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))  # 27 sequences
    labels = torch.ones(27, dtype=torch.long)
    with torch.no_grad():
        log_p = model(every, labels).log_softmax(-1).gather(-1, every[..., None])
    p = log_p.sum((1, 2)).exp().double().numpy()
    assert abs(p.sum() - 1) < 1e-5
    s = model.generate(range(n), labels=torch.ones(n, dtype=torch.long))
    seen = np.bincount((s @ torch.tensor([9, 3, 1])).numpy(), minlength=27)
    assert (p * n > 5).sum() > 10 and fits(seen, p)


@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_ar_equals_a_slow_reference(cfg):
    """Re-running the whole prefix for every code, guidance written as (1 + w) l_c - w l_null."""
    model = build("ar", null_class=True)
    labels = torch.tensor([1, 4, 2])
    got = model.generate([5, 6, 7], 3, labels, temperature=0.8, top_k=9, top_p=0.9, cfg=cfg)
    key = keys(3, [5, 6, 7], "cpu")
    s = torch.zeros(3, 9, dtype=torch.long)
    with torch.no_grad():
        for i in range(9):
            l_c, l_null = model(s, labels)[:, i], model(s, torch.full((3,), 5))[:, i]
            s[:, i] = sample((1 + cfg) * l_c - cfg * l_null, uniforms(key, i, 13), 0.8, 9, 0.9)
    assert torch.equal(got, s)


def test_guidance_moves_both_kinds_and_is_off_at_zero():
    for kind in ("ar", "nar"):
        model = build(kind, null_class=True)
        labels = torch.arange(5)
        plain = model.generate(range(5), labels=labels, steps=4)
        assert torch.equal(plain, model.generate(range(5), labels=labels, steps=4, cfg=0.0))
        assert not torch.equal(plain, model.generate(range(5), labels=labels, steps=4, cfg=3.0))
        with torch.no_grad():  # the null row is read by guidance alone
            model.prefix.weight[5] += 1
        assert torch.equal(plain, model.generate(range(5), labels=labels, steps=4))
        with torch.no_grad():  # a class like no class leaves nothing to guide
            model.prefix.weight[:] = model.prefix.weight[5]
        unguided = model.generate(range(5), labels=labels, steps=4)
        assert torch.equal(unguided, model.generate(range(5), labels=labels, steps=4, cfg=3.0))


@pytest.mark.parametrize("kind, cfg", [("ar", 0.0), ("nar", 0.0), ("ar", 2.0), ("nar", 2.0)])
def test_sample_i_depends_on_seed_and_i_alone(kind, cfg):
    model = build(kind, K=64, N=16, null_class=True)
    ids = [3, 0, 11, 2**31, 5, 8, 1, 2]
    labels = torch.tensor([i % 5 for i in ids])
    kwargs = {"seed": 9, "steps": 6, "cfg": cfg}
    whole = model.generate(ids, labels=labels, **kwargs)
    assert whole.shape == (8, 16) and whole.dtype == torch.int64 and len(whole.unique(dim=0)) == 8
    for size in (1, 4):
        split = [slice(j, j + size) for j in range(0, 8, size)]
        parts = [model.generate(ids[k], labels=labels[k], **kwargs) for k in split]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(model.generate(ids[::-1], labels=labels.flip(0), **kwargs), whole.flip(0))
    torch.manual_seed(1)  # no global random state is read
    assert torch.equal(model.generate(ids, labels=labels, **kwargs), whole)
    assert not torch.equal(model.generate(ids, labels=labels, **kwargs | {"seed": 10}), whole)


# ---------------------------------------------------------------- MaskGIT

def noise(batch, seed=0):
    """(place, n) -> (batch, n), as `generate` passes it."""
    return partial(uniforms, keys(seed, range(batch), "cpu"))


@pytest.mark.parametrize("T", [1, 2, 8, 12, 16])
def test_maskgit_reveals_what_its_schedule_says(T):
    N, K, seen = 16, 5, []

    def logits_fn(tokens):
        seen.append(tokens == K)
        return torch.zeros(*tokens.shape, K)

    out = maskgit(torch.full((3, N), K), logits_fn, noise(3), T, K)
    assert len(seen) == T and ((0 <= out) & (out < K)).all()  # no mask token is left
    left = torch.stack([m.sum(1) for m in seen] + [torch.zeros(3, dtype=torch.long)])  # (T + 1, 3)
    revealed = -left.diff(dim=0)
    assert (revealed.sum(0) == N).all() and (revealed >= 1).all()
    if T == N:
        assert (revealed == 1).all()
    if T == 8:  # by hand: floor(16 cos(pi t / 16)), at least one fewer each time
        assert left[:, 0].tolist() == [16, 15, 14, 13, 11, 8, 6, 3, 0]
    for before, after in itertools.pairwise(seen):
        assert (after <= before).all()  # what is revealed stays


def test_maskgit_keeps_the_known_codes():
    N, K = 16, 5
    tokens = torch.randint(K, (4, N), generator=torch.Generator().manual_seed(0))
    share = torch.tensor([[0.5], [0.9], [0.0], [2.0]])  # the last image is known throughout
    known = torch.rand(4, N, generator=torch.Generator().manual_seed(1)) < share
    out = maskgit(tokens.masked_fill(~known, K), lambda s: torch.randn(4, N, K), noise(4), 6, K)
    assert torch.equal(out[known], tokens[known]) and (out < K).all()


def test_maskgit_takes_no_random_number_twice():
    places = []

    def count_places(place, n):
        places.append((place, n))
        return uniforms(keys(0, range(2), "cpu"), place, n)
    maskgit(torch.full((2, 9), 5), lambda s: torch.zeros(2, 9, 5), count_places, 4, 5)
    assert sorted(n for _, n in places) == [9] * 3 + [45] * 4  # the last step masks nothing again
    assert len({place for place, _ in places}) == 7 and min(places)[0] >= 0  # -1 is the place of `corrupt`


def slow_maskgit(tokens, logits_fn, noise, T, mask_id, temperature, choice_temperature):
    """One image, one code at a time. noise(place, n): n numbers."""
    tokens, N = list(tokens), len(tokens)
    start = tokens.count(mask_id)
    for t in range(T):
        logits = logits_fn(tokens) / temperature
        u, choice = noise(t, N * mask_id), noise(T + t, N)
        masked, ids, confidence = tokens.count(mask_id), list(tokens), [math.inf] * N
        ratio = (t + 1) / T
        for i in range(N):
            if tokens[i] == mask_id:
                ids[i] = max(range(mask_id), key=lambda k: logits[i][k] - math.log(-math.log(u[i * mask_id + k])))
                log_p = logits[i][ids[i]] - math.log(np.exp(logits[i].astype(float)).sum())
                confidence[i] = log_p - choice_temperature * (1 - ratio) * math.log(-math.log(choice[i]))
        if t == T - 1:
            return ids
        length = max(1, min(masked - 1, math.floor(start * math.cos(math.pi * ratio / 2))))
        tokens = ids
        for i in sorted(range(N), key=lambda i: confidence[i])[:length]:
            tokens[i] = mask_id


@pytest.mark.parametrize("T, temperature, choice", [(6, 1.0, 0.45), (16, 0.7, 4.5), (3, 1.0, 0.0)])
def test_maskgit_equals_a_slow_reference(T, temperature, choice):
    model = build("nar", K=11, N=16, classes=0)
    start = torch.full((5, 16), 11)
    start[3:, ::3] = 2  # the last two with known codes
    with torch.no_grad():
        got = maskgit(start, model, noise(5), T, 11, temperature, choice)
        for j in range(5):
            want = slow_maskgit(start[j].tolist(), lambda s: model(torch.tensor([s]))[0].numpy(),
                                lambda place, n, j=j: noise(5)(place, n)[j].tolist(), T, 11, temperature, choice)
            assert got[j].tolist() == want
        whole = model.generate(range(5), temperature=temperature, choice_temperature=choice, steps=T)
        assert torch.equal(whole[:3], got[:3])  # generate() is this, from all masked


def test_nar_guidance_equals_the_formula():
    model = build("nar", null_class=True)
    labels, null = torch.arange(4), torch.full((4,), 5)
    with torch.no_grad():
        want = maskgit(torch.full((4, 9), 13), lambda s: 3 * model(s, labels) - 2 * model(s, null),
                       noise(4), 5, 13)
    assert torch.equal(model.generate(range(4), labels=labels, steps=5, cfg=2.0), want)


# ---------------------------------------------------------------- a known world

K, N = 4, 8


class Markov:
    """A chain of codes: a uniform first code, then transitions P[c] of the class c."""

    def __init__(self, classes):
        self.P = np.random.default_rng(0).dirichlet(np.full(K, 0.3), (classes, K))
        self.rng = np.random.default_rng(1)

    def draw(self, n):
        c, s = self.rng.integers(len(self.P), size=n), self.rng.integers(K, size=(n, N))
        for i in range(1, N):
            past = self.rng.random((n, 1)) > self.P[c, s[:, i - 1]].cumsum(-1)
            s[:, i] = past.sum(-1).clip(max=K - 1)
        return torch.from_numpy(c), torch.from_numpy(s)

    def entropy(self):
        """Nats a code, from the marginals and the transitions' entropies."""
        pi, h = np.full((len(self.P), K), 1 / K), [math.log(K)]
        for _ in range(1, N):
            h.append(np.mean(-(pi[..., None] * self.P * np.log(self.P)).sum((1, 2))))
            pi = np.einsum("ck,ckl->cl", pi, self.P)
        return np.mean(h)

    def log_p(self, c, s):
        steps = np.log(self.P[c[:, None], s[:, :-1], s[:, 1:]])
        return (steps.sum(1) - math.log(K)).mean() / N

    def masked(self, c, s, mask, right=True):
        """p(s_i | the unmasked codes, c) where masked, by forward-backward; right=False: forward alone."""
        seen = np.where(mask[..., None], 1.0, np.eye(K)[s])
        a, b = np.full((len(s), N, K), 1 / K), np.ones((len(s), N, K))
        for i in range(1, N):
            a[:, i] = np.einsum("nk,nkl->nl", a[:, i - 1] * seen[:, i - 1], self.P[c])
        for i in range(N - 2, -1, -1) if right else ():
            b[:, i] = np.einsum("nkl,nl->nk", self.P[c], b[:, i + 1] * seen[:, i + 1])
        p = a * b / (a * b).sum(-1, keepdims=True)
        return np.take_along_axis(p, s[..., None], -1)[..., 0][mask]


def train(kind, world, steps, batch=128):
    """The training step as train_prior.py runs it -> the model and its validation loss on 4,000 sequences."""
    torch.manual_seed(0)
    classes = len(world.P) if len(world.P) > 1 else 0
    model = Transformer(kind, "world", K, N, classes, dropout=0.0)
    optimizer = torch.optim.AdamW(model.param_groups(), lr=3e-3, betas=(0.9, 0.96))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, t / 20, 2 - 2 * t / steps))
    for t in range(steps):
        c, s = world.draw(batch)
        tokens, labels, mask = model.corrupt(s, c if classes else None, range(t * batch, (t + 1) * batch))
        total, n = model.loss(model(tokens, labels), s, mask)
        optimizer.zero_grad()
        (total / n).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    c, s = world.draw(4000)
    with torch.no_grad():
        tokens, labels, mask = model.corrupt(s, c if classes else None, range(4000), seed=1)
        total, n = model.loss(model(tokens, labels), s, mask)
    return model, (total / n).item(), c.numpy(), s.numpy(), mask.numpy()


def test_ar_learns_a_markov_source_to_its_entropy():
    world = Markov(classes=2)
    model, loss, *_ = train("ar", world, 150)
    entropy = world.entropy()
    print(f"\nAR {loss:.4f}, entropy {entropy:.4f} nats a code")
    assert abs(loss / entropy - 1) < 0.03
    c = torch.arange(2000) % 2  # and its samples are as probable under the source as the source's own
    s = model.generate(range(2000), labels=c)
    assert abs(-world.log_p(c.numpy(), s.numpy()) / entropy - 1) < 0.05
    wrong = world.log_p(1 - c.numpy(), s.numpy())
    assert -wrong > 1.5 * entropy  # the other class's chain finds them improbable


def test_nar_learns_a_markov_source_to_its_bound():
    world = Markov(classes=1)
    _, loss, c, s, mask = train("nar", world, 320)
    p = world.masked(c, s, mask)
    bound, smoothed = -np.log(p).mean(), -np.log(0.9 * p + 0.1 / K).mean()
    left = -np.log(world.masked(c, s, mask, right=False)).mean()
    print(f"\nNAR {loss:.4f}; bound {bound:.4f}, smoothed {smoothed:.4f}, from the left alone {left:.4f}")
    # the optimum for smoothed targets is 0.9 p + 0.1 / K, whose validation loss is a little above the bound
    assert abs(loss / smoothed - 1) < 0.02 and 0.99 < loss / bound < 1.03
    assert loss < left - 0.5 * (left - bound)


# ---------------------------------------------------------------- bad input

def generate(kind="ar", labels=(0, 1), classes=5, null_class=False, steps=4, **kwargs):
    labels = None if labels is None else torch.tensor(labels)
    build(kind, classes=classes, null_class=null_class).generate([0, 1], labels=labels, steps=steps, **kwargs)


def forward(labels, classes=5):
    build("ar", classes=classes)(torch.zeros(2, 9, dtype=torch.long), labels)


@pytest.mark.parametrize("call, words", [
    (lambda: generate(top_k=-1), "top_k is -1"),
    (lambda: generate(top_k=14), "top_k is 14"),
    (lambda: generate("nar", top_k=3), "for AR"),
    (lambda: generate("nar", top_p=0.9), "for AR"),
    (lambda: generate("nar", steps=0), "steps is 0"),
    (lambda: generate("nar", steps=10), "steps is 10"),
    (lambda: generate(labels=(0, 5)), "labels: use 0 to 4"),
    (lambda: generate(labels=(0, 5), null_class=True), "labels: use 0 to 4"),
    (lambda: generate(labels=(-1, 0)), "labels: use 0 to 4"),
    (lambda: generate(labels=None), "labels: pass one of 5 classes"),
    (lambda: generate("nar", labels=None), "labels: pass one of 5 classes"),
    (lambda: generate(classes=0), "none if that is 0"),
    (lambda: generate(cfg=1.0), "null class"),
    (lambda: build("ar").train().generate([0], labels=torch.tensor([0])), "eval()"),
    (lambda: forward(None), "labels: pass one of 5 classes"),
    (lambda: forward(torch.tensor([0, 1]), classes=0), "none if that is 0"),
])
def test_bad_input_is_named_in_one_sentence(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- speed

def test_print_what_the_cache_is_worth(capsys):
    model, batch = build("ar", K=256, N=256, classes=0, size="tiny"), 16

    def rerun(s):  # the prefix and the codes so far -> logits of the next
        x = torch.cat([model._prefix(None, batch), model.code(s)], 1) + model.slot.weight[: s.shape[1] + 1]
        for block in model.blocks:
            x = block(x)
        return model._head(x[:, -1:])[:, 0]

    s = model.generate(range(batch))
    begin = time.perf_counter()
    model.generate(range(batch))
    cached = time.perf_counter() - begin
    key = keys(0, range(batch), "cpu")
    begin = time.perf_counter()
    with torch.no_grad():
        for i in range(4, 256, 8):  # every eighth code stands for eight
            assert torch.equal(sample(rerun(s[:, :i]), uniforms(key, i, 256)), s[:, i])
    rerunning = 8 * (time.perf_counter() - begin)
    with capsys.disabled():
        print(f"\nAR sampling, 256 codes, tiny, batch {batch}: {rerunning:.2f} s re-running the prefix, "
              f"{cached:.2f} s with the cache, {rerunning / cached:.1f} times faster")
