"""Train a transformer on a tokenizer's codes (Sec. 3.1.2). Defaults: Table 10, ImageNet.

    python train_prior.py --size tiny --batch_size 64 --lr 1e-3 --iters 1000    # a laptop
    torchrun --nproc_per_node=8 train_prior.py --kind nar --size large --views 10    # eight GPUs

All processes first encode the data set, several augmented views per image, into a code cache.
Training reads only the cache.
"""
import argparse
import fcntl
import hashlib
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import data
import runtime
import vq
from transformer import SIZES, Transformer

# Table 10, ImageNet: "exponential, end_lr 5e-6, start_iter 80,000" and "linear, end_lr 0,
# start_iter 50,000". Here they are fractions of --lr and --iters, so that short runs decay as well.
DEFAULTS = {"lr_end": {"ar": 5e-6 / 1e-4, "nar": 0.0},
            "decay_start": {"ar": 80_000 / 1_500_000, "nar": 50_000 / 1_500_000}}


def parse():
    parser = runtime.parser(__doc__)
    runtime.add_training_flags(parser, out="runs/prior", iters=1_500_000, batch_size=256, lr=1e-4)
    add = parser.add_argument
    add("--tokenizer", default="runs/tokenizer/ckpt.pt",
        help="checkpoint of train_tokenizer.py, of either phase")
    add("--kind", choices=("ar", "nar"), default="ar", help="autoregressive, or masked (MaskGIT)")
    add("--size", choices=SIZES, default="base", help="size (Table 8); tiny is ours, for a CPU")
    add("--num_classes", type=runtime.at_least(0),
        help="0: unconditional; default: the number of classes in the data")
    add("--dropout", type=runtime.at_least(0, float), default=0.1, help="dropout rate (Table 8)")
    add("--label_dropout", type=runtime.at_least(0, float), default=0.0,
        help="fraction of labels replaced by the null class, for guidance; the paper uses none")
    add("--lr_end", type=runtime.at_least(0, float),
        help="learning rate at the last step; default: ar --lr / 20, nar 0")
    add("--decay_start", type=runtime.at_least(0),
        help="step at which the decay begins; default: ar --iters * 80/1500, nar --iters * 50/1500")
    add("--views", type=runtime.positive_int,
        help="augmented views per image; default: 4, with --crop center 1")
    add("--code_cache", help="folder of the code cache; default: codes/ in --out")
    given, defaults = runtime.parse_flags(parser)

    # Flags of the command line override those of the checkpoint, which override the defaults. A
    # new prior takes data, crop and image size from its tokenizer.
    saved = runtime.resumed_flags(given, defaults, "prior")
    if not saved:
        path = given.get("tokenizer", defaults["tokenizer"])
        state = runtime.load_checkpoint(path, "tokenizer", mmap=True)
        saved = {name: state["args"][name] for name in ("data", "val", "crop", "image_size")}
        if "data" in given:
            saved.pop("val", None)
    args = argparse.Namespace(**defaults | saved | given)

    if args.views is None:
        args.views = 1 if args.crop == "center" else 4
    if args.kind == "ar" and args.lr_end == 0:
        raise SystemExit("--lr_end 0 with --kind ar: an exponential decay needs --lr_end > 0")
    return args


# --------------------------------------------------------------------------------- the code cache

class AugmentedViews(data.TrainImages):
    """Item j * views + v: view v of image j, augmented as in training."""

    def __init__(self, source, size, crop, views):
        super().__init__(source, size, crop, seed=0)  # not --seed: all seeds share a cache
        self.views = views

    def __len__(self):
        return len(self.source) * self.views

    def __getitem__(self, row):
        return self.view(row // self.views, row)


def build_code_cache(folder, views, model, fingerprint, args):
    """Encode all views with all processes -> a memory-mapped array of records with `codes` (N,)
    and `label`, in the order of the views.

    Process 0 appends the rows to one file, in order: the file's size tells how far an interrupted
    run came. The name is a hash of all that the codes depend on (fingerprint: the model's), so a
    stale cache is never used."""
    K, N, b = model.quantizer.codebook_size, (views.size // model.f) ** 2, 32
    row_type = np.dtype([("codes", np.uint16 if K < 2 ** 16 else np.uint32, N),
                         ("label", np.int32)])
    device = next(model.parameters()).device
    depends_on = (fingerprint, data.content_hash(views.source), views.crop, views.views, views.size)
    name = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    path, total, file = Path(f"{folder}-{name}.bin"), len(views), None
    done = 0  # rows in the file: process 0 counts, a maximum over processes sends the count
    if runtime.is_main():
        with runtime.report_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")
        fcntl.lockf(file, fcntl.LOCK_EX)  # waits for another run that encodes the same
        done = file.seek(0, 2) // row_type.itemsize
        if done < total:  # restart at a multiple of 32: only equal batches round alike
            done = done // b * b
            file.truncate(done * row_type.itemsize)
    done = int(runtime.all_reduce_max(done))

    # Process i % world_size encodes batch i, so gathering in rank order keeps the order. The last
    # batches repeat the last view.
    world_size, progress = runtime.world_size(), runtime.Progress(total, done, every=10)
    count = math.ceil((total - done) / (b * world_size)) * world_size
    rows = np.minimum(np.arange(done, done + count * b), total - 1).reshape(count, b)
    mine = rows[runtime.rank()::world_size].tolist()
    for images, labels in data.loader(views, mine, args.workers, device):
        with torch.no_grad():  # in fp32, because bf16 would change about 1 % of the codes
            codes = model.encode(data.to_float(images, device))[1].flatten(1)
        codes, labels = (vq.all_gather_rows(t).cpu().numpy() for t in (codes, labels.to(device)))
        done += len(codes)
        if file:
            records = np.empty(len(codes), row_type)
            records["codes"], records["label"] = codes, labels
            with runtime.report_full_disk(path):
                file.write(records[:len(codes) - max(0, done - total)].tobytes())
                file.flush()
        progress.show(f"encoding to {path}", done)
    if file:
        file.close()
    runtime.barrier()
    return np.memmap(path, row_type, "r")


@lru_cache(1)
def epoch_order(seed, epoch, images, views):
    """Rows of the cache in the order of an epoch, one view of each image."""
    rng = np.random.default_rng([seed, epoch, 2])
    return rng.permutation(images) * views + rng.integers(views, size=images)


def load_codes(cache, rows, args, device):
    """Rows of the cache -> indices (B, N), labels (B,) or None, both int64 on the device."""
    records = cache[rows]
    indices, labels = (torch.from_numpy(records[name].astype(np.int64))
                       for name in ("codes", "label"))
    if device.type == "cuda":  # a copy from pinned memory does not wait for the GPU
        indices, labels = indices.pin_memory(), labels.pin_memory()
    indices, labels = (t.to(device, non_blocking=True) for t in (indices, labels))
    return indices, labels if args.num_classes else None


# --------------------------------------------------------------------------------------- training

def learning_rate(step, args):
    """Table 10: constant until `decay_start`, then a decay to `lr_end` at the last step. AR decays
    exponentially, NAR linearly."""
    start, end = args.decay_start, args.lr_end
    start = round(DEFAULTS["decay_start"][args.kind] * args.iters) if start is None else start
    end = DEFAULTS["lr_end"][args.kind] * args.lr if end is None else end
    t = max(0.0, (step - start) / max(1, args.iters - start))
    if args.kind == "ar":
        return args.lr * (end / args.lr) ** t
    return args.lr + (end - args.lr) * t


def prior_step(model, micro_batches, args):
    """Forward and backward pass on micro-batches of (indices, tokens, labels, mask). Returns this
    process's part of the loss."""
    # Masks differ in size. The loss is the mean over the masked tokens of the global batch.
    count = sum(mask.sum() for *_, mask in micro_batches).float()
    count = runtime.all_reduce_sum(count) / runtime.world_size()
    total = 0
    for indices, tokens, labels, mask in micro_batches:
        with runtime.autocast(indices.device, args.dtype):
            loss, _ = model.loss(model(tokens, labels), indices, mask)
        (loss / count).backward()
        total += loss.detach() / count
    return total


def context_masks(kind, mask):
    """Split `mask` (B, N) into predicted tokens with little context and with much. AR: the first
    position, and the second half. NAR: where less than a quarter of the other codes is known, and
    where more than three quarters are."""
    if kind == "ar":
        position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return mask & (position == 0), mask & (position >= mask.shape[1] // 2)
    known = (~mask).float().sum(1, keepdim=True) / max(1, mask.shape[1] - 1)
    return mask & (known < 0.25), mask & (known > 0.75)


def validate(model, cache, args, device):
    """Loss in nats per predicted token on at most 5,000 images: of all tokens, and of those with
    little and with much context. The masks are the same in each validation."""
    chosen = data.evenly_spaced(len(cache), 5000)
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.rand(len(chosen), model.length + 2, generator=generator)
    total = torch.zeros(3, 2, dtype=torch.float64)
    for first in range(runtime.rank() * 64, len(chosen), runtime.world_size() * 64):
        indices, labels = load_codes(cache, chosen[first:first + 64], args, device)
        u = noise[first:first + 64].to(device)
        with runtime.eval_mode(model, device, args.dtype):
            tokens, labels, mask = model.make_inputs(indices, labels, u)
            logits = model(tokens, labels)
            sums = [torch.stack(model.loss(logits, indices, m))
                    for m in (mask, *context_masks(model.kind, mask))]
        total += torch.stack(sums).cpu().double()
    total, count = runtime.all_reduce_sum(total).T
    names = "loss", "loss_little_context", "loss_much_context"
    return dict(zip(names, (total / count).tolist()))


def main():
    args = parse()
    device, compiled = runtime.setup(args)
    runtime.micro_batch_size(args)  # checks that the batch is divisible
    run = runtime.Run(args, "prior", shown=("loss", "loss_little_context", "loss_much_context",
                                            "unigram_entropy", "skipped"))
    tokenizer, saved = vq.load_tokenizer(args.tokenizer, device)
    if args.image_size != saved["args"]["image_size"]:
        raise SystemExit(f"--image_size {args.image_size}, but {args.tokenizer} was trained at "
                         f"{saved['args']['image_size']}")
    source, val = data.open_data(args, labels=args.num_classes != 0)
    C = len(source.classes)
    args.num_classes = C if args.num_classes is None else args.num_classes
    if args.num_classes not in (0, C):
        raise SystemExit(f"--num_classes {args.num_classes}, but the data have {C} classes")
    if args.label_dropout and not args.num_classes:
        raise SystemExit("--label_dropout needs classes")

    # Secs. 4.2 and 4.3 say Adam, Table 10 AdamW. We follow the table, which is more specific.
    torch.manual_seed(args.seed)
    K, grid = tokenizer.quantizer.codebook_size, args.image_size // tokenizer.f
    model = Transformer(args.kind, args.size, K, grid ** 2, args.num_classes, args.dropout,
                        null_class=args.label_dropout > 0).to(device)
    opt = torch.optim.AdamW(model.param_groups(weight_decay=1e-2), betas=(0.9, 0.96), fused=True)
    fingerprint = vq.fingerprint(tokenizer)
    constants = {"config": model.config, "tokenizer": fingerprint, "grid": grid,
                 "classes": list(source.classes), "content": data.content_hash(source)}
    start, state = run.resume(constants, model=model, opt=opt)
    if state.get("tokenizer", fingerprint) != fingerprint:
        raise SystemExit(f"{args.tokenizer} is not the tokenizer that {args.out} was trained on: "
                         f"pass that one, or start a new prior with another --out")

    if compiled:
        tokenizer.encoder.compile(dynamic=False)
        model.compile(dynamic=False)
    folder = Path(args.code_cache or run.out / "codes")
    train_views = AugmentedViews(source, args.image_size, args.crop, args.views)
    val_views = AugmentedViews(val, args.image_size, "center", 1)
    cache = build_code_cache(folder / "train", train_views, tokenizer, fingerprint, args)
    val_cache = build_code_cache(folder / "val", val_views, tokenizer, fingerprint, args)
    # The entropy of the codes is the loss of a prior that ignores context, position and class.
    codes = cache[data.evenly_spaced(len(cache), 20_000)]["codes"].astype(np.int64)
    H = vq.usage_and_perplexity(torch.from_numpy(codes).flatten().bincount(minlength=K))[2]
    runtime.print0(f"{len(cache)} rows of {grid ** 2} codes; unigram entropy {H:.3f}, ln K "
                   f"{math.log(K):.3f} nats per token")
    del tokenizer, saved

    averages, images = runtime.Averages(), len(source)
    model.train()
    for step in range(start, args.iters + 1):
        run.stop_if_requested(step)
        if run.validation_is_due(step):
            values = validate(model, val_cache, args, device)
            run.log(step, "val", **values, unigram_entropy=H,
                    entropy_minus_loss=H - values["loss"])
            little, much = values["loss_little_context"], values["loss_much_context"]
            if args.kind == "nar" and step >= args.iters / 2 and much > little - 0.05:
                runtime.print0("warning: the prior ignores the other codes (docs/running.md)")
            run.validated = step
            # FFHQ's AR prior overfits, so the best state is kept.
            if values["loss"] < run.best and not run.skipped_in_a_row:
                run.best = values["loss"]
                run.save(step, run.out / "best.pt")
            run.save(step, loss=values["loss"])
        if step == args.iters:
            break

        # Noise is drawn for the global batch; a process takes its rows. Dropout is per process.
        generator = torch.Generator().manual_seed(runtime.mix_seeds(args.seed, step))
        noise = torch.rand(args.batch_size, grid ** 2 + 2, generator=generator)
        torch.manual_seed(runtime.mix_seeds(args.seed, step, runtime.rank()))
        micro_batches = []
        for a in range(args.grad_accum):
            mine = data.micro_batch_indices(args, step, a)
            rows = [epoch_order(args.seed, n // images, images, args.views)[n % images]
                    for n in mine]
            indices, labels = load_codes(cache, rows, args, device)
            first = mine.start - step * args.batch_size
            u = noise[first:first + len(mine)].to(device, non_blocking=True)
            inputs = model.make_inputs(indices, labels, u, args.label_dropout)
            micro_batches.append((indices, *inputs))
        averages.add(loss=prior_step(model, micro_batches, args))
        lr = learning_rate(step, args)
        norm, = run.step([opt], lr)
        if run.due(step + 1, args.log_every):
            run.log(step + 1, "train", lr=lr, grad_norm=norm, skipped=run.skipped,
                    **averages.pop())


if __name__ == "__main__":
    runtime.launch(main)
