"""The prior: a transformer that learns p(s|c) over the N codes of an image (Sec. 3.1.2, Table 8).

    python transformer.py        # parameter counts beside the paper's

AR and NAR "share the same architecture, except that the AR transformer has the causal mask on
attention" (Sec. 6.1). B images, N codes per image, K codes in the codebook, width d.

    AR    reads [c, s_1 .. s_(N-1)]    predicts s_i from c and s_<i             samples code by code
    NAR   reads [c, s_m]               predicts masked s_i from c and the rest  samples in T steps

The prefix c is the class embedding, without classes one learned vector. A training step is

    u = torch.rand(len(indices), model.length + 2)
    tokens, labels, mask = model.make_inputs(indices, labels, u)
    total, count = model.loss(model(tokens, labels), indices, mask)  # Eq. 3 is total / count

and `model.eval().generate(64, labels)` samples the codes of 64 images.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {  # Table 8; the hidden width of the MLP is 4d
    "base": {"blocks": 24, "heads": 16, "width": 768},
    "large": {"blocks": 24, "heads": 16, "width": 1024},
    "tiny": {"blocks": 4, "heads": 4, "width": 128},  # ours, for a CPU
}


class Block(nn.Module):
    """Pre-LN attention and MLP, each with a residual: x (B, L, d) -> (B, L, d).

    The paper specifies only the sizes and "dropout 0.1". The places of the dropout (embedding,
    attention weights, both residual branches), GELU, and biases everywhere are GPT-2's."""

    def __init__(self, d, heads, dropout, causal):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, 4 * d)
        self.fc2 = nn.Linear(4 * d, d)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, cache=None, pos=None, attn_mask=None):
        B, L, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d / heads)
        if cache is None:
            p = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        else:  # L = 1: write this position's key and value, attend to the positions up to it
            cache[0].index_copy_(2, pos, k)
            cache[1].index_copy_(2, pos, v)
            y = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=attn_mask)
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(B, L, d)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class Transformer(nn.Module):
    """A prior over sequences of `length` = N codes.

    kind: "ar" or "nar". size: a key of SIZES. codebook_size: K. num_classes: 0 is unconditional.
    null_class adds an embedding for "no class", for guidance. It is off by default: the paper
    "exclude[s] the classifier-free guidance" (Sec. 6.1)."""

    def __init__(self, kind, size="base", codebook_size=1024, length=256, num_classes=1000,
                 dropout=0.1, null_class=False):
        super().__init__()
        self.config = {"kind": kind, "size": size, "codebook_size": codebook_size,
                       "length": length, "num_classes": num_classes, "dropout": dropout,
                       "null_class": null_class}
        self.kind, self.length, self.num_classes = kind, length, num_classes
        self.codebook_size = self.mask_id = codebook_size  # NAR's mask token is code K
        self.heads, d = SIZES[size]["heads"], SIZES[size]["width"]
        nar, blocks = kind == "nar", SIZES[size]["blocks"]
        self.tok_emb = nn.Embedding(codebook_size + nar, d)  # the head shares the first K rows
        self.pos_emb = nn.Embedding(length + nar, d)  # position 0 is the prefix; AR never reads s_N
        self.cls_emb = nn.Embedding(max(num_classes, 1) + null_class, d)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d, self.heads, dropout, not nar) for _ in range(blocks))
        self.norm = nn.LayerNorm(d)
        # The paper does not specify the initialization. This is GPT-2's: the projections of the
        # residual branches are scaled by 1 / sqrt(2 * blocks).
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * blocks) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def param_groups(self, weight_decay=1e-2):
        """AdamW's groups. Table 10 gives weight_decay 1e-2, but not for which weights. Here it is
        for the matrices of linear layers, not for biases, norms, embeddings and the tied head."""
        decay = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        others = [p for p in self.parameters() if all(p is not w for w in decay)]
        return [{"params": decay, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0}]

    def forward(self, indices, labels=None):
        """Logits of each position: indices (B, N) int64, labels (B,) int64 -> (B, N, K) float32.

        AR: row i depends on s_<i and the label; its argmax is the view of Sec. 3.2.
        NAR: masked codes are `mask_id` = K. The label `num_classes` is the null class."""
        x = self.tok_emb(indices[:, :-1] if self.kind == "ar" else indices)
        c = self._class_embedding(labels, len(indices))  # (B, 1, d)
        x = torch.cat([c, x], 1)  # (B, N, d), NAR (B, N+1, d)
        x = self.drop(x + self.pos_emb.weight)
        for block in self.blocks:
            x = block(x)
        return self._head(x if self.kind == "ar" else x[:, 1:])  # NAR: drop the prefix

    def _class_embedding(self, labels, batch):
        if bool(self.num_classes) != (labels is not None):
            raise ValueError(f"labels: needed by a prior with classes only; num_classes is "
                             f"{self.num_classes}")
        if labels is None:
            labels = torch.zeros(batch, dtype=torch.long, device=self.cls_emb.weight.device)
        return self.cls_emb(labels)[:, None]  # (B, 1, d)

    def _head(self, x):
        with torch.autocast(x.device.type, enabled=False):  # bf16 logits near 8 are 0.06 apart
            weight = self.tok_emb.weight[:self.codebook_size]
            return F.linear(self.norm(x).float(), weight.float())

    def make_inputs(self, indices, labels, u, label_dropout=0.0):
        """The input of a training step -> tokens (B, N), labels, mask (B, N) bool of the codes to
        predict. All randomness comes from u (B, N + 2), uniform in [0, 1).

        NAR: a random mask turns s into s_m. AR: tokens are the indices; each is predicted.
        A label becomes the null class with probability `label_dropout`."""
        if label_dropout:
            labels = torch.where(u[:, 0] < label_dropout, self.num_classes, labels)
        if self.kind == "ar":
            return indices, labels, torch.ones_like(indices, dtype=torch.bool)
        mask = sample_mask(u[:, 1], u[:, 2:])
        return indices.masked_fill(mask, self.mask_id), labels, mask

    def loss(self, logits, indices, mask):
        """Eq. 3 -> (total, count): nats summed over the predicted codes, and their number.

        Masks differ in size, so add up both over micro-batches and processes before dividing. In
        training mode NAR's targets are smoothed by 0.1, as in MaskGIT; the paper does not say."""
        smoothing = 0.1 if self.kind == "nar" and self.training else 0.0
        nll = F.cross_entropy(logits.float().flatten(0, 1), indices.flatten(), reduction="none",
                              label_smoothing=smoothing)
        return (nll * mask.flatten()).sum(), mask.sum()  # Eq. 3

    # ---------------------------------------------------------------- sampling

    def new_cache(self, batch):
        """Keys and values for `decode_position`: (blocks, 2, batch, heads, N, d / heads)."""
        w, device = self.tok_emb.weight, self.tok_emb.weight.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else w.dtype
        shape = len(self.blocks), 2, batch, self.heads, self.length, w.shape[1] // self.heads
        return torch.zeros(shape, device=w.device, dtype=dtype)

    def decode_position(self, x, pos, cache):
        """One position of the AR model: embedding x (B, 1, d), pos (1,) int64 -> logits (B, K).
        Fills the cache. Shapes are fixed, and nothing is read back to the host."""
        x = x + self.pos_emb(pos)
        attn_mask = (torch.arange(self.length, device=x.device) <= pos)[None]  # (1, N)
        for block, kv in zip(self.blocks, cache):
            x = block(x, kv, pos, attn_mask)
        return self._head(x)[:, 0]

    @torch.no_grad()
    def generate(self, batch, labels=None, *, temperature=1.0, top_k=0, top_p=1.0, cfg_scale=1.0,
                 decode_steps=12, choice_temperature=0.45):
        """Sample codes -> (batch, N) int64 in [0, K), with torch's default generator.

        labels: (batch,) int64 in [0, num_classes), None for an unconditional model.
        temperature: divides the logits, > 0.
        top_k, top_p: AR. Keep the k most probable codes (0: all), then the smallest set of them
            with cumulative probability >= p. Table 10: top_p 0.92 on ImageNet, else 0.98.
        cfg_scale: classifier-free guidance s >= 1, logits l_null + s (l_c - l_null); 1 is off.
        decode_steps: NAR. Decoding steps T in [1, N]; 12 in Tables 3 and 4.
        choice_temperature: NAR, >= 0, see `maskgit`. Table 10: 0.45 on ImageNet, else 0.65."""
        N, device, n_copies = self.length, self.tok_emb.weight.device, 1 + (cfg_scale > 1)
        if n_copies == 2:  # the second half of the batch sees the same codes and no class
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])

        def apply_cfg(logits):
            l_c, *l_null = logits.chunk(n_copies)
            return l_c + (cfg_scale - 1) * (l_c - l_null[0]) if l_null else l_c

        if self.kind == "nar":
            tokens = torch.full((batch, N), self.mask_id, device=device)
            return maskgit(tokens, lambda s: apply_cfg(self(s.repeat(n_copies, 1), labels)),
                           decode_steps, self.mask_id, temperature, choice_temperature)

        x = self._class_embedding(labels, batch)  # (batch, 1, d), with guidance (2 batch, 1, d)
        cache, pos = self.new_cache(len(x)), torch.zeros(1, dtype=torch.long, device=device)
        s = torch.zeros(batch, N, dtype=torch.long, device=device)

        def next_code():
            logits = apply_cfg(self.decode_position(x, pos, cache))
            code = sample(logits, temperature, top_k, top_p)  # (batch,)
            s.index_copy_(1, pos, code[:, None])
            x.copy_(self.tok_emb(code.repeat(n_copies))[:, None])  # the next position's input
            pos.add_(1)

        if device.type == "cuda":  # the same function, faster
            next_code = CUDAGraph(next_code)
        for _ in range(N):
            next_code()
        return s


class CUDAGraph:
    """A function that is recorded at its fourth call and replayed from then on: launching a few
    hundred small kernels one by one takes longer than running them. All state of `call` must stay
    on the device at fixed addresses."""

    stream = None  # one for all graphs, because cuBLAS allocates a 32 MiB workspace per stream

    def __init__(self, call):
        self.call, self.calls = call, 0
        CUDAGraph.stream = CUDAGraph.stream or torch.cuda.Stream()

    def __call__(self):
        self.calls += 1
        if self.calls < 4:
            # Warm-up calls initialize libraries and let autocast cache its bf16 weights. The graph
            # reads that cache, so it must be used within the same `with autocast`.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.call()
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.calls == 4:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):  # recorded, not run
                self.call()
        self.graph.replay()


def sample_mask(r, noise):
    """MaskGIT's training mask: r (B,), noise (B, N), uniform in [0, 1) -> (B, N) bool.

    The paper says "a random mask". MaskGIT masks the fraction cos(pi r / 2), at least one code. We
    round up, so that the fully masked input, with which sampling starts, occurs in training."""
    count = (noise.shape[1] * torch.cos(math.pi / 2 * r)).ceil().clamp(min=1)  # (B,)
    return rank_within_row(noise) < count[:, None]


def rank_within_row(values):
    """Rank of each value within its row (0: the smallest)."""
    return values.argsort(dim=-1, stable=True).argsort(-1)


def gumbel(like):
    """Gumbel noise: argmax(logits + noise) is a sample of softmax(logits)."""
    u = torch.rand_like(like).clamp(min=1e-20)
    return -torch.log(-torch.log(u))


def sample(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Sample softmax(logits / temperature), cut to top_k, then to top_p: (..., K) -> (...)."""
    logits = logits.float() / temperature
    if top_k or top_p < 1:
        p, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        if top_k:
            p[..., top_k:] = 0
        above = p.cumsum(-1) - p  # probability of all more probable codes; 0 for the first
        p = p.masked_fill(above >= top_p * p.sum(-1, keepdim=True), 0)
        out = torch.zeros_like(p).scatter(-1, order, p) == 0
        logits = logits.masked_fill(out, -torch.inf)
    return (logits + gumbel(logits)).argmax(-1)


def maskgit(tokens, logits_fn, T, mask_id, temperature=1.0, choice_temperature=0.45):
    """MaskGIT's parallel decoding in T steps: fills the masked tokens, keeps the known ones.

    tokens (B, N) int64, `mask_id` where unknown; logits_fn: such tokens -> logits (B, N, K).
    Returns (B, N) int64 in [0, K).

    A step samples every unknown code, then masks the least confident ones again: n cos(pi/2
    (t+1)/T) of n that were unknown at the start. Confidence is log p plus Gumbel noise, whose scale
    `choice_temperature` decays to 0. Table 10 has one "sampling temperature", 0.45. We interpret it
    as the choice temperature, which MaskGIT sets to 4.5, and leave `temperature`, of the logits,
    at 1. Sweep both before you quote a number."""
    n = (tokens == mask_id).sum(-1, keepdim=True)  # (B, 1)
    for t in range(T):
        unknown = tokens == mask_id
        logits = logits_fn(tokens).float()
        ids = torch.where(unknown, sample(logits, temperature), tokens)
        if t == T - 1:
            return ids  # the last step must not mask again
        ratio = (t + 1) / T
        log_p = (logits / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        confidence = log_p + choice_temperature * (1 - ratio) * gumbel(log_p)
        confidence = confidence.masked_fill(~unknown, torch.inf)
        length = (n * math.cos(math.pi / 2 * ratio)).floor()
        length = torch.minimum(length, unknown.sum(-1, keepdim=True) - 1).clamp(min=1)
        tokens = ids.masked_fill((rank_within_row(confidence) < length) & unknown, mask_id)


def load_prior(path, device="cpu"):
    """A checkpoint of train_prior.py -> the model in eval mode, and the whole checkpoint."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["component"] != "prior":
            raise ValueError(f"it holds a {state['component']}")
        model = Transformer(**state["config"])
        model.load_state_dict(state["model"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise SystemExit(f"{path} is not a checkpoint of train_prior.py ({reason}). "
                         f"docs/running.md converts old ones") from error
    # Not frozen: autocast caches bf16 copies only of weights that require gradients.
    return model.eval().to(device), state


if __name__ == "__main__":
    print("model                 parameters   paper    differs by")
    for size, classes, paper in [("base", 1000, 172), ("large", 1000, 305), ("base", 0, 171)]:
        for kind in ("ar", "nar"):
            with torch.device("meta"):
                model = Transformer(kind, size, num_classes=classes)
            ours = sum(p.numel() for p in model.parameters()) / 1e6
            name = f"{kind.upper()} {size}" + ("" if classes else ", no classes")
            print(f"{name:21} {ours:9.2f}M  {paper:5}M  {100 * ours / paper - 100:+9.2f} %")
