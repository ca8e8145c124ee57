"""Train a transformer on a tokenizer's codes (Sec. 3.1.2). The defaults are Table 10's ImageNet column.

    python train_prior.py --tokenizer runs/tokenizer/ckpt.pt --data shapes --classes 10 --size tiny      # anywhere
    torchrun --nproc_per_node=8 train_prior.py --tokenizer runs/tokenizer/ckpt.pt --kind nar --size large \\
             --data /data/imagenet/train --val /data/imagenet/val

First every image is encoded once (several crops and flips of each) into codes/ in the run folder, by all processes;
then training reads only that. README.md has the command line of every column of Table 10.
"""
import math
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

import data
import runtime
import vq
from runtime import BadInput
from transformer import SIZES, Transformer

CHUNK = 256  # rows of the code cache that are encoded, written and marked as done together
# Table 10. Paper: "exponential, end_lr 5e-6, start_iter 80,000" and "linear, end_lr 0, start_iter 50,000".
KIND = {"ar": dict(lr_end=5e-6, decay_start=80_000), "nar": dict(lr_end=0.0, decay_start=50_000)}


def parse():
    parser = runtime.Parser(__doc__)
    runtime.add_training_flags(parser, out="runs/prior", iters=1_500_000, batch_size=256, lr=1e-4)
    add = parser.add_argument
    add("--tokenizer", required=True, help="checkpoint of train_tokenizer.py, of either phase")
    add("--kind", choices=["ar", "nar"], default="ar", help="autoregressive, or masked (MaskGIT)")
    add("--size", choices=list(SIZES), default="base", help="Table 8; tiny is ours, for a CPU")
    add("--classes", type=runtime.count, default=1000, help="number of classes; 0: unconditional")
    add("--dropout", type=runtime.bounded(float, 0, 0.99), default=0.1, help="Table 8")
    add("--label_dropout", type=runtime.bounded(float, 0, 0.99), default=0.0,
        help="share of labels replaced by the null class, for guidance; the paper uses none")
    add("--lr_end", type=runtime.weight, help="learning rate at the last step: 5e-6 for ar, 0 for nar")
    add("--decay_start", type=runtime.count, help="step at which the decay begins: 80000 for ar, 50000 for nar")
    add("--betas", type=runtime.bounded(float, 0, 0.999999), nargs=2, default=[0.9, 0.96], help="AdamW's")
    add("--weight_decay", type=runtime.weight, default=1e-2, help="none on biases, norms, embeddings")
    add("--ema", type=runtime.bounded(float, 0, 0.999999), default=0.0, help="decay of a weight average (0: none)")
    add("--crop", choices=data.CROPS, default="random", help="random: ImageNet, resized: FFHQ, center: LSUN")
    add("--views", type=runtime.positive, help="crops and flips encoded per image: 4; with --crop center: 1")
    add("--codes", default="", help="folder of the code cache, to share it between runs; default: codes/ in --out")
    args = parser.parse_args()
    for name, value in KIND[args.kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.views is None:
        args.views = 1 if args.crop == "center" else 4
    if args.crop == "center" and args.views > 1:
        raise BadInput(f"--views {args.views}: --crop center gives one view of an image, the same every time")
    if args.kind == "ar" and not args.lr_end:
        raise BadInput("--lr_end 0: the exponential decay of --kind ar never comes to 0, give a small number")
    return args


# ------------------------------------------------------------------------------------------- the code cache

class Views(Dataset):
    """Row j * views + v: view v of image chosen[j], (uint8 (3, S, S), label, -1 or an unreadable image's index)."""

    def __init__(self, source, size, crop, views, seed, n=0):
        self.images, self.views = data.TrainImages(source, size, crop, seed), views
        self.chosen = data.choose(len(source), n)

    def __len__(self):
        return len(self.chosen) * self.views

    def __getitem__(self, row):
        return self.images.view(int(self.chosen[row // self.views]), row)


def encode_dataset(folder, source, model, tokenizer, args, crop, views, n, device):
    """Codes of all views of all (n: of n) images: folder/codes.bin (uint16 memmap, (rows, N)) and labels.bin (int32).
    Chunks of rows are shared out over the processes; those that a killed run has finished are skipped, and a cache
    made of another tokenizer or data set is refused. Returns (codes, labels)."""
    N = (args.image_size // model.f) ** 2
    dataset = Views(source, args.image_size, crop, views, seed=0, n=n)  # not --seed: seeds may share a cache
    rows = len(dataset)
    meta = {"tokenizer": tokenizer, "data": source.signature(), "rows": rows, "views": views, "crop": crop,
            "image_size": args.image_size, "tokens": N, "K": model.quantizer.K}
    cache = runtime.Rows(folder, meta, CHUNK, codes=((rows, N), np.uint16), labels=((rows,), np.int32))
    codes, labels = cache.arrays.values()
    if todo := cache.todo():
        progress, bad = runtime.Progress(len(todo) * CHUNK, f"encoding to {folder}"), data.Bad(source)

        def encoded():
            for chunk, (images, y, index) in zip(todo, data.loader(dataset, todo, args.workers, device)):
                bad(index)
                with torch.no_grad():  # fp32: in bf16 one code in a hundred is another, and the other tools use fp32
                    indices = torch.cat([model.encode(part)[1] for part in data.to_float(images, device).split(32)])
                yield chunk, y, runtime.download(indices.flatten(1))

        for chunk, y, indices in runtime.one_behind(encoded()):
            codes[chunk.start:chunk.stop] = indices().astype(np.uint16)
            labels[chunk.start:chunk.stop] = y.numpy()
            cache.mark(chunk)
            progress(len(chunk))
    cache.close()
    return codes, labels


class Codes:
    """Batches from the cache: a function of seed, step and position, as data.TrainImages is for images."""

    def __init__(self, codes, labels, views, args, device):
        self.codes, self.labels, self.views, self.args, self.device = codes, labels, views, args, device
        self.images, self.epoch = len(codes) // views, -1

    def __call__(self, positions):
        """Positions of the endless stream -> indices (B, N), labels (B,), both int64 on the device."""
        rows = []
        for n in positions:
            epoch, j = divmod(n, self.images)
            if epoch != self.epoch:
                self.epoch, rng = epoch, np.random.default_rng([self.args.seed, epoch, 2])
                self.order = rng.permutation(self.images)
                self.view = rng.integers(self.views, size=self.images)
            rows.append(self.order[j] * self.views + self.view[j])
        return self.rows(np.array(rows))

    def rows(self, rows):
        indices = torch.from_numpy(self.codes[rows].astype(np.int64))
        labels = torch.from_numpy(self.labels[rows].astype(np.int64)) if self.args.classes else None
        return runtime.upload(indices, self.device), runtime.upload(labels, self.device) if self.args.classes else None


def unigram_entropy(codes, K, rows=20_000):
    """Entropy in nats of the codes of up to `rows` rows spread over the cache: what a prior without context reaches."""
    some = codes[np.unique(np.linspace(0, len(codes) - 1, min(rows, len(codes))).astype(int))]
    return vq.usage_and_perplexity(torch.bincount(torch.from_numpy(some.astype(np.int64)).flatten(), minlength=K))[2]


def learning_rate(step, args):
    """Table 10: constant until `decay_start`; then AR exponentially to lr_end at the last step, NAR linearly."""
    t = max(0.0, (step - args.decay_start) / max(1, args.iters - args.decay_start))
    if args.kind == "ar" and args.lr_end:
        return args.lr * (args.lr_end / args.lr) ** t
    return args.lr + (args.lr_end - args.lr) * t


@torch.no_grad()
def validate(model, codes, args, device):
    """Validation loss in nats per token (NAR: per masked token, the same masks every time)."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for first in range(runtime.rank() * 64, len(codes.codes), runtime.world() * 64):
        rows = np.arange(first, min(first + 64, len(codes.codes)))
        indices, labels = codes.rows(rows)
        with runtime.autocast(device, args.dtype):
            tokens, labels, mask = model.corrupt(indices, labels, rows, seed=args.seed + 1)
            loss, count = model.loss(model(tokens, labels), indices, mask)
        total += torch.stack([loss, count]).cpu().double()
    model.train()
    loss, count = runtime.sum_over_processes(total).tolist()
    return loss / count


def main():
    args = parse()
    device = runtime.setup(args.device)
    b = runtime.micro_batch(args)
    runtime.check_out(args)
    tokenizer = vq.load_tokenizer(args.tokenizer, device)
    args.image_size = tokenizer.image_size
    fingerprint = vq.fingerprint(tokenizer)
    if tokenizer.quantizer.K > 65536:
        raise BadInput(f"{args.tokenizer} has {tokenizer.quantizer.K} codes: a code cache holds 65536 at most")
    source, val = data.open_source(args.data), data.open_source(args.val or args.data, "val")
    if args.classes and len(source.classes) > args.classes:
        raise BadInput(f"--data {args.data} has {len(source.classes)} classes, more than --classes {args.classes}")
    if args.classes and (not source.classes or tuple(val.classes) != tuple(source.classes)):
        raise BadInput(f"--data {args.data} has no classes, or --val {args.val} has others: use --classes 0, or "
                       f"folders of class folders")
    if args.label_dropout and not args.classes:
        raise BadInput("--label_dropout needs classes: it drops the label")
    data.check_size(source, args.image_size, args.data)
    run = runtime.Run(args, "prior")
    if args.compile or (args.compile is None and device.type == "cuda"):
        tokenizer.encoder.compile()
    folder = Path(args.codes or run.out / "codes")
    val_n = 0
    if not args.val and args.data != "shapes":
        val_n = 5000
        if runtime.is_main():
            print("no --val: the validation loss is of some training images, and shows no overfitting", flush=True)
    codes, val_codes = (
        Codes(*encode_dataset(folder / name, images, tokenizer, fingerprint, args, crop, views, n, device),
              views, args, device)
        for name, images, crop, views, n in (("train", source, args.crop, args.views, 0),
                                             ("val", val, "center", 1, val_n)))
    K, N, h = tokenizer.quantizer.K, codes.codes.shape[1], args.image_size // tokenizer.f
    for cache in (codes, val_codes):
        y = cache.labels
        if cache.codes.max() >= K or args.classes and not 0 <= y.min() <= y.max() < args.classes:
            raise BadInput(f"{folder} holds codes or labels out of range (K {K}, {args.classes} classes): remove it")
    del tokenizer

    # ---- model and optimizer. Paper: Adam in Secs. 4.2 and 4.3, AdamW in Table 10: the table is the more specific.
    torch.manual_seed(args.seed)
    with runtime.refusing():
        model = Transformer(args.kind, args.size, K, N, args.classes, args.dropout, bool(args.label_dropout)).to(device)
    optimizer = torch.optim.AdamW(model.param_groups(args.weight_decay), args.lr, args.betas, fused=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    guard, start, best = runtime.Guard(device), 0, float("inf")
    if state := run.resume(model=model, optimizer=optimizer, ema_state=ema):
        start, best = state["step"], state["best"]
    H = unigram_entropy(codes.codes, K)
    if runtime.is_main():
        print(f"{len(codes.codes)} rows of {N} codes, {len(val_codes.codes)} for validation; "
              f"ln K {math.log(K):.3f}, unigram entropy {H:.3f} nats a token", flush=True)

    def save(step, path=None):
        run.save(step, path, config=model.config, model=model.state_dict(), optimizer=optimizer.state_dict(),
                 ema=ema.module.state_dict() if ema else None, ema_state=ema.state_dict() if ema else None,
                 best=best, tokenizer=fingerprint, grid=h, classes=list(source.classes))

    if args.compile or (args.compile is None and device.type == "cuda"):
        model.compile()
    model.train()
    run.progress(start)
    total, counted = torch.zeros((), device=device), 0

    for step in range(start, args.iters):
        runtime.seed_step(args.seed, step)  # dropout
        micro = []
        for a in range(args.accum):
            first = step * args.batch_size + (a * runtime.world() + runtime.rank()) * b
            indices, labels = codes(range(first, first + b))
            micro.append((indices, *model.corrupt(indices, labels, range(first, first + b), args.seed,
                                                  args.label_dropout)))
        # Masks differ in size: the mean is over the masked tokens of the global batch, whoever holds them.
        count = runtime.sum_over_processes(sum(mask.sum() for *_, mask in micro).float()) / runtime.world()
        for indices, tokens, labels, mask in micro:
            with runtime.autocast(device, args.dtype):
                loss, _ = model.loss(model(tokens, labels), indices, mask)
            (loss / count).backward()
            total += loss.detach() / count
        counted += 1
        runtime.set_lr(optimizer, learning_rate(step, args))
        guard.step(optimizer)
        if ema:
            ema.update_parameters(model)

        done = step + 1
        if done % args.log_every == 0 or done == args.iters:
            mean = runtime.sum_over_processes(total / counted) / runtime.world()
            total, counted, (skipped, broken) = torch.zeros((), device=device), 0, guard.check()
            values = run.log(done, "train", loss=mean, lr=learning_rate(step, args), skipped=skipped)
            run.progress(done, **values)
            if broken:
                save(done)
                raise run.broken()
        if done % args.eval_every == 0 or done == args.iters:
            loss = validate(ema.module if ema else model, val_codes, args, device)
            run.progress(done, **run.log(done, "val", loss=loss, lnK=math.log(K), H=H, H_minus_loss=H - loss))
            if loss < best:  # FFHQ's AR prior overfits: the best is kept beside the last
                best = loss
                save(done, run.out / "best.pt")
        stop = run.stopping()
        if stop or done % args.save_every == 0 or done == args.iters:
            save(done)
        if stop:
            run.stopped(done)
            return


if __name__ == "__main__":
    runtime.run(main)
