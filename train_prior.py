"""Train a transformer on a tokenizer's codes (Sec. 3.1.2). Defaults: Table 10's ImageNet column.

    python train_prior.py --size tiny --views 1 --batch_size 16 --lr 2e-3 --iters 1000    # a laptop
    torchrun --nproc_per_node=8 train_prior.py --kind nar --size large --views 10    # eight GPUs

First every image is encoded once (several crops and flips of each) into codes/ in the run folder,
by all processes; then training reads only that.
"""
import argparse
import math
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import data
import runtime
import vq
from transformer import SIZES, Transformer

FIXED = ("seed", "batch_size", "kind", "size", "classes", "views", "crop")  # while a run goes on
SHOWN = ("loss", "H", "H_minus_loss", "skipped")


def parse():
    parser = runtime.parser(__doc__)
    runtime.add_training_flags(parser, out="runs/prior", iters=1_500_000, batch_size=256, lr=1e-4)
    add = parser.add_argument
    add("--tokenizer", default="runs/tokenizer/ckpt.pt",
        help="checkpoint of train_tokenizer.py, of either phase")
    add("--kind", choices=("ar", "nar"), default="ar", help="autoregressive, or masked (MaskGIT)")
    add("--size", choices=SIZES, default="base", help="Table 8; tiny is ours, for a CPU")
    add("--classes", type=int, help="0: unconditional; default: as many as the data have")
    add("--dropout", type=float, default=0.1, help="Table 8")
    add("--label_dropout", type=float, default=0.0,
        help="share of labels replaced by the null class, for guidance; the paper uses none")
    add("--lr_end", type=float, help="learning rate at the last step; default: --lr / 20, nar 0")
    add("--decay_start", type=int,
        help="step at which the decay begins; default: 80/1500 of --iters, nar 50/1500")
    add("--views", type=runtime.at_least_1,
        help="crops and flips per image; default: 4, with --crop center 1")
    add("--codes", help="folder of the code cache, to share it; default: codes/ in --out")
    parser.set_defaults(fingerprint="")  # of the tokenizer: no flag, but kept with them
    given, flags = runtime.read_flags(parser)

    # The run that goes on, or the tokenizer that this one starts from
    now = flags | given
    saved = runtime.resumed_flags(now, given, "prior", FIXED)
    if not saved:
        state = runtime.read_checkpoint(now["tokenizer"], "tokenizer", mmap=True)
        names = "data", "val", "crop", "image_size"
        saved = runtime.inherited_flags(state["args"], names, given)
    args = argparse.Namespace(**flags | saved | given)

    if args.views is None:
        args.views = 1 if args.crop == "center" else 4
    if args.kind == "ar" and args.lr_end == 0:
        raise SystemExit("--lr_end 0 with --kind ar: an exponential decay never ends at 0")
    return args


# --------------------------------------------------------------------------------- the code cache

class Views(data.TrainImages):
    """Row j * views + v: view v of image j, as TrainImages gives it."""

    def __init__(self, source, size, crop, views):
        super().__init__(source, size, crop, seed=0)  # not --seed: seeds share a cache
        self.views = views

    def __getitem__(self, row):
        return self.view(row // self.views, row)


def open_array(path, shape, dtype, fill):
    """A memory-mapped .npy of that shape, made with `fill` everywhere if it is not there."""
    if runtime.is_main() and not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        array = runtime.create_array(temporary, shape, dtype)
        array[:] = fill
        array.flush()
        os.replace(temporary, path)
    runtime.barrier()
    return np.load(path, mmap_mode="r+")


def encode_dataset(folder, source, model, crop, views, args, device):
    """Codes of all views of all images (rows, N) uint16 (of more than 65,535 codes uint32) and
    labels (rows,) int32, memory-mapped.

    They lie in a folder named after all that they depend on, so those of another tokenizer or data
    set are never taken. A stopped run goes on with the rows that are still empty: their codes are
    the largest number of their type."""
    dataset = Views(source, args.image_size, crop, views)
    shape = len(source) * views, (args.image_size // model.f) ** 2  # (rows, N)
    made_of = vq.fingerprint(model), source.signature(), shape, crop, views, args.image_size
    folder = Path(f"{folder}-{data.digest(str(made_of))}")
    dtype = np.uint16 if model.quantizer.codebook_size < 2 ** 16 else np.uint32
    empty = np.iinfo(dtype).max
    codes = open_array(folder / "codes.npy", shape, dtype, empty)
    labels = open_array(folder / "labels.npy", shape[:1], np.int32, 0)
    todo = [range(i, min(i + 32, shape[0])) for i in range(0, shape[0], 32)]

    def unwritten():
        return [rows for rows in todo if (codes[rows.start:rows.stop] == empty).any()]

    todo = unwritten()
    if todo:
        runtime.on_one_machine("encode the data")
    runtime.barrier()  # all have looked before one writes
    mine = todo[runtime.rank()::runtime.world()]
    unreadable, progress = data.Unreadable(source), runtime.Progress(len(todo))
    batches = data.loader(dataset, mine, args.workers, device)
    for n, (rows, (images, y, reasons)) in enumerate(zip(mine, batches), 1):
        unreadable.note(reasons)
        if sentence := unreadable.too_many():
            raise SystemExit(sentence)
        # fp32: in bf16 one code in a hundred is another. No graph for a smaller last batch.
        with runtime.evaluating(model, device, "fp32", eager=len(images) != 32):
            indices = model.encode(data.to_float(images, device))[1].flatten(1)
        labels[rows.start:rows.stop] = y.numpy()
        codes[rows.start:rows.stop] = indices.cpu().numpy()
        progress.show(f"encoding to {folder}", n * runtime.world(), images=32, every_s=10)
    codes.flush()
    labels.flush()
    runtime.barrier()
    if unwritten():
        raise SystemExit(f"{folder} lacks codes that were written: was it changed meanwhile?")
    return codes, labels


@lru_cache(1)
def epoch_rows(seed, epoch, images, views):
    """Rows of the cache in the order of an epoch, one view of each image."""
    rng = np.random.default_rng([seed, epoch, data.ROWS])
    return rng.permutation(images) * views + rng.integers(views, size=images)


def fetch(cache, rows, args, device):
    """Rows of the cache -> indices (B, N), labels (B,) or None, both int64 on the device."""
    indices, labels = (torch.from_numpy(array[rows].astype(np.int64)) for array in cache)
    if device.type == "cuda":  # from pinned memory the copy does not wait for queued work
        indices, labels = indices.pin_memory(), labels.pin_memory()
    indices, labels = (t.to(device, non_blocking=True) for t in (indices, labels))
    return indices, labels if args.classes else None


def unigram_entropy(codes, K):
    """Entropy in nats of the codes of up to 20,000 rows: what a prior without context reaches."""
    some = codes[data.spread(len(codes), 20_000)]
    histogram = torch.bincount(torch.from_numpy(some.astype(np.int64)).flatten(), minlength=K)
    return vq.usage_and_perplexity(histogram)[2]


# --------------------------------------------------------------------------------------- training

def learning_rate(step, args):
    """Constant until `decay_start`; then AR exponentially to `lr_end` at the last step, NAR
    linearly. Paper: "exponential, end_lr 5e-6, start_iter 80,000" and "linear, end_lr 0, start_iter
    50,000" (Table 10); in shorter runs the decay begins at the same share of the steps."""
    end, start = (args.lr / 20, 80 / 1500) if args.kind == "ar" else (0.0, 50 / 1500)
    end = end if args.lr_end is None else args.lr_end
    start = round(start * args.iters) if args.decay_start is None else args.decay_start
    t = max(0.0, (step - start) / max(1, args.iters - start))
    if args.kind == "ar":
        return args.lr * (end / args.lr) ** t
    return args.lr + (end - args.lr) * t


def prior_step(model, micro_batches, args):
    """Forward and backward pass on micro-batches of (indices, tokens, labels, mask). Returns this
    process's share of the loss."""
    # Masks differ in size: the mean is over the masked tokens of the global batch.
    count = sum(mask.sum() for *_, mask in micro_batches).float()
    count = runtime.sum_over_processes(count) / runtime.world()
    total = 0
    for indices, tokens, labels, mask in micro_batches:
        with runtime.autocast(indices.device, args.dtype):
            loss, _ = model.loss(model(tokens, labels), indices, mask)
        (loss / count).backward()
        total += loss.detach() / count
    return total


def validate(model, cache, args, device):
    """Loss in nats per token on at most 5,000 images (NAR: per masked token, always the same)."""
    chosen = data.spread(len(cache[0]), 5000)
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.rand(len(chosen), model.length + 2, generator=generator)
    total = torch.zeros(2, dtype=torch.float64)
    for first in range(runtime.rank() * 64, len(chosen), runtime.world() * 64):
        indices, labels = fetch(cache, chosen[first:first + 64], args, device)
        u = noise[first:first + 64].to(device)
        with runtime.evaluating(model, device, args.dtype, eager=len(indices) != 64):
            tokens, labels, mask = model.corrupt(indices, labels, u)
            loss, count = model.loss(model(tokens, labels), indices, mask)
        total += torch.stack([loss, count]).cpu().double()
    loss, count = runtime.sum_over_processes(total).tolist()
    return loss / count


def main():
    args = parse()
    device, compiled = runtime.setup(args)
    runtime.micro_batch(args)  # refuses what is not divisible
    run = runtime.Run(args, "prior", SHOWN)
    tokenizer, saved = vq.load_tokenizer(args.tokenizer, device)
    if args.image_size != saved["args"]["image_size"]:
        raise SystemExit(f"--image_size {args.image_size}, but {args.tokenizer} was trained at "
                         f"{saved['args']['image_size']}")
    K, fingerprint = tokenizer.quantizer.codebook_size, vq.fingerprint(tokenizer)
    if args.fingerprint not in ("", fingerprint):
        raise SystemExit(f"{args.tokenizer} is not the tokenizer that {args.out} was trained on")
    args.fingerprint = fingerprint
    source, val = data.open_data(args, labels=args.classes != 0)
    if args.classes is None:
        args.classes = len(source.classes)
    if args.classes not in (0, len(source.classes)):
        raise SystemExit(f"--classes {args.classes}, but the data have {len(source.classes)}")
    if args.label_dropout and not args.classes:
        raise SystemExit("--label_dropout needs classes")
    if compiled:
        tokenizer.encoder.compile(dynamic=False)
    folder = Path(args.codes or Path(args.out) / "codes")
    cache = encode_dataset(folder / "train", source, tokenizer, args.crop, args.views, args, device)
    val_cache = encode_dataset(folder / "val", val, tokenizer, "center", 1, args, device)
    (rows, N), images, grid = cache[0].shape, len(source), args.image_size // tokenizer.f
    del tokenizer

    # Paper: Adam in Secs. 4.2 and 4.3, AdamW in Table 10: the table is the more specific.
    torch.manual_seed(args.seed)
    null_class = args.label_dropout > 0
    model = Transformer(args.kind, args.size, K, N, args.classes, args.dropout, null_class)
    model.to(device)
    opt = torch.optim.AdamW(model.param_groups(weight_decay=1e-2), betas=(0.9, 0.96), fused=True)
    start = run.resume(model=model, opt=opt)
    best = run.lowest()
    H = unigram_entropy(cache[0], K)
    if runtime.is_main():
        print(f"{rows} rows of {N} codes, {len(val_cache[0])} for validation; ln K "
              f"{math.log(K):.3f}, unigram entropy {H:.3f} nats a token", flush=True)
    if compiled:
        model.compile(dynamic=False)
    optimizers, averages = runtime.Optimizers(run, opt), runtime.Averages()

    def checkpoint(step, path):
        run.save(step, path, config=model.config, model=model.state_dict(), opt=opt.state_dict(),
                 tokenizer=fingerprint, grid=grid, classes=list(source.classes))

    def save(step):
        _, tokens, labels, _ = micro_batches[0]
        with runtime.evaluating(model, device, args.dtype, eager=True):
            logits = model(tokens, labels)
        if optimizers.sound(step, logits):
            checkpoint(step, run.ckpt)

    def evaluate(step):
        nonlocal best
        loss = validate(model, val_cache, args, device)
        if loss < best:  # FFHQ's AR prior overfits: the best is kept beside the last
            best = loss
            checkpoint(step, run.out / "best.pt")
        run.log(step, "val", loss=loss, lnK=math.log(K), H=H, H_minus_loss=H - loss)

    model.train()
    if run.missed(start):
        evaluate(start)
    for step in range(start, args.iters):
        # Noise of the global batch: each process takes its rows. Dropout is drawn per process.
        generator = torch.Generator().manual_seed(runtime.seed_of(args.seed, step))
        noise = torch.rand(args.batch_size, N + 2, generator=generator)
        torch.manual_seed(runtime.seed_of(args.seed, step, runtime.rank()))
        micro_batches = []
        for a in range(args.accum):
            mine = data.positions(args, step, a)
            chosen = [epoch_rows(args.seed, n // images, images, args.views)[n % images]
                      for n in mine]
            indices, labels = fetch(cache, chosen, args, device)
            first = mine.start - step * args.batch_size
            u = noise[first:first + len(mine)].to(device, non_blocking=True)
            corrupted = model.corrupt(indices, labels, u, args.label_dropout)
            micro_batches.append((indices, *corrupted))
        averages.add(loss=prior_step(model, micro_batches, args))
        lr = learning_rate(step, args)
        norm, = optimizers.step(lr)

        done = step + 1
        if run.due(done, args.log_every):
            run.log(done, "train", lr=lr, grad_norm=norm, skipped=optimizers.skipped,
                    **averages.means())
        stop, due = run.stopping(), run.due(done, args.eval_every)
        if stop and not optimizers.in_a_row:  # else after the next step that is not skipped
            save(done)
            run.leave()
        if due:
            save(done)
            evaluate(done)


if __name__ == "__main__":
    runtime.launch(main)
