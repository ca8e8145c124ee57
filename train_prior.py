"""Train a transformer on a tokenizer's codes (Sec. 3.1.2). The defaults are Table 10's ImageNet column.

    python train_prior.py --tokenizer runs/tokenizer/ckpt.pt --classes 10 --size tiny --views 1 --batch_size 16 \\
           --lr 2e-3 --iters 1000 --workers 0                                          # a CPU, after README's "laptop"
    torchrun --nproc_per_node=8 train_prior.py --tokenizer runs/tokenizer/ckpt.pt --kind nar --size large \\
             --data /data/imagenet/train --val /data/imagenet/val

First every image is encoded once (several crops and flips of each) into codes/ in the run folder, by all processes;
then training reads only that. docs/settings.md has the command of every column of Table 10.
"""
import copy
import hashlib
import itertools
import json
import math
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import data
import runtime
import vq
from runtime import BadInput
from train_tokenizer import fingerprint, load_tokenizer, update_average
from transformer import SIZES, Transformer

# Table 10. Paper: "exponential, end_lr 5e-6, start_iter 80,000" and "linear, end_lr 0, start_iter 50,000".
# decay_start is their share of 1,500,000 steps: with 80,000 itself the rate of a shorter run would never decay.
KIND = {"ar": dict(lr_end=5e-6, decay_start=80 / 1500), "nar": dict(lr_end=0.0, decay_start=50 / 1500)}


def parse():
    parser = runtime.Parser(__doc__)
    runtime.add_training_flags(parser, out="runs/prior", iters=1_500_000, batch_size=256, lr=1e-4)
    add = parser.add_argument
    add("--tokenizer", default="runs/tokenizer/ckpt.pt", help="checkpoint of train_tokenizer.py, of either phase")
    add("--kind", choices=["ar", "nar"], default="ar", help="autoregressive, or masked (MaskGIT)")
    add("--size", choices=list(SIZES), default="base", help="Table 8; tiny is ours, for a CPU")
    add("--classes", type=runtime.count, help="default: as many as the data have; 0: unconditional")
    add("--dropout", type=runtime.decay, default=0.1, help="Table 8")
    add("--label_dropout", type=runtime.decay, default=0.0,
        help="share of labels replaced by the null class, for guidance; the paper uses none")
    add("--lr_end", type=runtime.weight, help="learning rate at the last step: 5e-6 for ar, 0 for nar")
    add("--decay_start", type=runtime.count, help="step at which the decay begins: 80/1500 of --iters, for nar 50/1500")
    add("--betas", type=runtime.decay, nargs=2, default=[0.9, 0.96], help="AdamW's")
    add("--weight_decay", type=runtime.weight, default=1e-2, help="none on biases, norms, embeddings")
    add("--ema", type=runtime.decay, default=0.0, help="decay of a weight average (0: none)")
    add("--crop", choices=data.CROPS, default="random", help="random: ImageNet, resized: FFHQ, center: LSUN")
    add("--views", type=runtime.positive, help="crops and flips encoded per image: 4; with --crop center: 1")
    add("--codes", default="", help="folder of the code cache, to share it between runs; default: codes/ in --out")
    args = parser.parse_args()
    if args.lr_end is None:
        args.lr_end = KIND[args.kind]["lr_end"]
    if args.decay_start is None:
        args.decay_start = round(args.iters * KIND[args.kind]["decay_start"])
    if args.views is None:
        args.views = 1 if args.crop == "center" else 4
    if args.crop == "center" and args.views > 1:
        raise BadInput(f"--views {args.views}: --crop center gives one view of an image, the same every time")
    if args.kind == "ar" and not args.lr_end:
        raise BadInput("--lr_end 0: the exponential decay of --kind ar never comes to 0, give a small number")
    return args


# ------------------------------------------------------------------------------------------- the code cache

CHUNK = 4096  # rows a file: what a kill can cost a process


class Views(data.TrainImages):
    """Row j * views + v: view v of image j, (uint8 (3, S, S), label, -1 or an unreadable image's index)."""

    def __init__(self, source, size, crop, views):
        super().__init__(source, size, crop, seed=0)  # not --seed: seeds share a cache
        self.views = views

    def __getitem__(self, row):
        return self.view(row // self.views, row)


def encode_dataset(folder, source, model, crop, views, args, device):
    """Codes of all views of all images: (rows, N) uint16 and labels (rows,) int32, memory-mapped.

    They lie in a folder named after all that they depend on, so those of another tokenizer or data set are never taken.
    Chunks are shared out over the processes; those that a killed run has finished are skipped."""
    dataset = Views(source, args.image_size, crop, views)
    shape = len(source) * views, (args.image_size // model.f) ** 2  # (rows, N)
    made_of = [fingerprint(model), source.signature(), shape[0], crop, views, args.image_size]
    folder = Path(f"{folder}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}")
    if not (folder / "codes.npy").exists():
        chunks = runtime.chunks(folder / "chunks", shape[0], CHUNK)
        todo, bad = runtime.pending(chunks), data.Bad(source)
        progress = runtime.Progress(sum(len(rows) for _, rows in todo), f"encoding to {folder}")
        split = [[rows[i:i + 32] for i in range(0, len(rows), 32)] for _, rows in todo]
        batches = iter(data.loader(dataset, list(itertools.chain(*split)), args.workers, device))
        for (file, _), parts in zip(todo, split):
            codes, labels = [], []
            for _, (images, y, index) in zip(parts, batches):
                bad(index)
                with torch.no_grad():  # fp32: in bf16 one code in a hundred is another, and the other tools use fp32
                    codes.append(model.encode(data.to_float(images, device))[1].flatten(1).int())
                labels.append(y)
                progress(len(y))
            arrays = {"codes": torch.cat(codes).cpu().numpy().astype(np.uint16),
                      "labels": torch.cat(labels).numpy().astype(np.int32)}
            runtime.save_file(file, lambda f, arrays=arrays: np.savez(f, **arrays))
        runtime.barrier()
        if runtime.is_main():
            labels = np.concatenate([np.load(file)["labels"] for file, _ in chunks])
            runtime.save_file(folder / "labels.npy", lambda f: np.save(f, labels))
            parts = (np.load(file)["codes"] for file, _ in chunks)
            # last: it says that all is there
            runtime.save_file(folder / "codes.npy", lambda f: runtime.write_npy(f, shape, np.uint16, parts))
            shutil.rmtree(folder / "chunks")
        runtime.barrier()
    return np.load(folder / "codes.npy", mmap_mode="r"), np.load(folder / "labels.npy")


@lru_cache(1)
def epoch_rows(seed, epoch, images, views):
    """Rows of the cache in the order of an epoch, one view of each image: a function of seed and epoch alone."""
    rng = np.random.default_rng([seed, epoch, 2])
    return rng.permutation(images) * views + rng.integers(views, size=images)


def fetch(cache, rows, args, device):
    """Rows of the cache -> indices (B, N), labels (B,) or None, both int64 on the device."""
    indices, labels = (torch.from_numpy(array[rows].astype(np.int64)) for array in cache)
    if device.type == "cuda":  # from pinned memory the copy is asynchronous: else the host waits for all queued work
        indices, labels = indices.pin_memory(), labels.pin_memory()
    return indices.to(device, non_blocking=True), labels.to(device, non_blocking=True) if args.classes else None


def unigram_entropy(codes, K, rows=20_000):
    """Entropy in nats of the codes of up to `rows` rows spread over the cache: what a prior without context reaches."""
    some = codes[data.spread(len(codes), min(rows, len(codes)))]
    return vq.usage_and_perplexity(torch.bincount(torch.from_numpy(some.astype(np.int64)).flatten(), minlength=K))[2]


# -------------------------------------------------------------------------------------------------- training

def learning_rate(step, args):
    """Table 10: constant until `decay_start`; then AR exponentially to lr_end at the last step, NAR linearly."""
    t = max(0.0, (step - args.decay_start) / max(1, args.iters - args.decay_start))
    if args.kind == "ar":
        return args.lr * (args.lr_end / args.lr) ** t
    return args.lr + (args.lr_end - args.lr) * t


def prior_step(model, micro_batches, args):
    """Forward and backward pass on micro-batches of (indices, tokens, labels, mask). Returns this process's share of
    the loss."""
    # Masks differ in size: the mean is over the masked tokens of the global batch, whichever process holds them.
    count = runtime.sum_over_processes(sum(mask.sum() for *_, mask in micro_batches).float()) / runtime.world()
    total = 0
    for indices, tokens, labels, mask in micro_batches:
        with runtime.autocast(indices.device, args.dtype):
            loss, _ = model.loss(model(tokens, labels), indices, mask)
        (loss / count).backward()
        total += loss.detach() / count
    return total


@torch.no_grad()
def validate(model, cache, args, device):
    """Validation loss in nats per token (NAR: per masked token, the same masks every time)."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for first in range(runtime.rank() * 64, len(cache[0]), runtime.world() * 64):
        rows = np.arange(first, min(first + 64, len(cache[0])))
        indices, labels = fetch(cache, rows, args, device)
        with runtime.autocast(device, args.dtype):
            tokens, labels, mask = model.corrupt(indices, labels, rows, seed=args.seed + 1)
            loss, count = model.loss(model(tokens, labels), indices, mask)
        total += torch.stack([loss, count]).cpu().double()
    model.train()
    loss, count = runtime.sum_over_processes(total).tolist()
    return loss / count


def main():
    args = parse()
    device = runtime.setup(args)
    b = runtime.micro_batch(args)
    run = runtime.Run(args, "prior")
    tokenizer = load_tokenizer(args.tokenizer, device)
    args.image_size, args.fingerprint, K = tokenizer.image_size, fingerprint(tokenizer), tokenizer.quantizer.K
    source, val = data.open_data(args, tokenizer.args)
    if args.classes not in (None, 0, len(source.classes)):
        raise BadInput(f"--data {args.data} has {len(source.classes)} classes, --classes says {args.classes}: leave "
                       f"the flag out, or give 0")
    args.classes = len(source.classes) if args.classes is None else args.classes
    if args.label_dropout and not args.classes:
        raise BadInput("--label_dropout needs classes: it drops the label")
    if args.classes and tuple(val.classes) != tuple(source.classes):
        raise BadInput(f"--val {args.val} has other classes than --data {args.data}")
    if args.compile:
        tokenizer.encoder.compile(dynamic=False)
    folder = Path(args.codes or run.out / "codes")
    cache = encode_dataset(folder / "train", source, tokenizer, args.crop, args.views, args, device)
    val_cache = encode_dataset(folder / "val", val, tokenizer, "center", 1, args, device)
    (rows, N), images, grid = cache[0].shape, len(cache[0]) // args.views, args.image_size // tokenizer.f
    del tokenizer

    # ---- model and optimizer. Paper: Adam in Secs. 4.2 and 4.3, AdamW in Table 10: the table is the more specific.
    torch.manual_seed(args.seed)
    with runtime.explain():
        model = Transformer(args.kind, args.size, K, N, args.classes, args.dropout, bool(args.label_dropout)).to(device)
    optimizer = torch.optim.AdamW(model.param_groups(args.weight_decay), args.lr, args.betas, fused=True)
    ema = copy.deepcopy(model) if args.ema else None
    guard, averages = runtime.Guard(device), runtime.Averages()
    state = run.resume(model=model, optimizer=optimizer, ema=ema)
    start = state["step"] if state else 0
    best = min((v["loss"] for v in run.lines if v["split"] == "val" and v["loss"] is not None), default=math.inf)
    H = unigram_entropy(cache[0], K)
    if runtime.is_main():
        print(f"{rows} rows of {N} codes, {len(val_cache[0])} for validation; "
              f"ln K {math.log(K):.3f}, unigram entropy {H:.3f} nats a token", flush=True)
    if args.compile:
        model.compile(dynamic=False)

    def save(step, path=None):
        run.save(step, path, config=model.config, model=model.state_dict(), optimizer=optimizer.state_dict(),
                 ema=ema and ema.state_dict(), tokenizer=args.fingerprint, grid=grid, classes=list(source.classes))

    def evaluate(step):
        nonlocal best
        loss = float(f"{validate(ema or model, val_cache, args, device):.6g}")
        if loss < best:  # FFHQ's AR prior overfits: the best is kept beside the last
            best = loss
            save(step, run.out / "best.pt")
        run.progress(step, **run.log(step, "val", loss=loss, lnK=math.log(K), H=H, H_minus_loss=H - loss))

    model.train()
    run.progress(start)
    if run.missed(start):
        evaluate(start)

    for step in range(start, args.iters):
        # Dropout is a function of (seed, step, process): a resumed run needs no saved generator.
        sequence = np.random.SeedSequence([args.seed, step, runtime.rank()])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
        micro_batches = []
        for a in range(args.accum):
            first = step * args.batch_size + (a * runtime.world() + runtime.rank()) * b
            positions = range(first, first + b)  # of the endless stream, as data.TrainImages has it for images
            indices, labels = fetch(cache, [epoch_rows(args.seed, n // images, images, args.views)[n % images]
                                            for n in positions], args, device)
            micro_batches.append((indices, *model.corrupt(indices, labels, positions, args.seed, args.label_dropout)))
        averages.add(loss=prior_step(model, micro_batches, args))
        averages.add(grad_norm=guard.step(optimizer, learning_rate(step, args)))
        if ema:
            update_average(ema, model, args.ema if step else 0)

        done, broken = step + 1, False
        if run.due(done, args.log_every):
            skipped, broken = guard.check()
            run.progress(done, **run.log(done, "train", lr=learning_rate(step, args), skipped=skipped,
                                         **averages.means()))
        if run.after_step(done, broken, save, evaluate):
            return


if __name__ == "__main__":
    runtime.run(main)
