"""Train a small VGG-shaped classifier: a perceptual network for data far from ImageNet, and for the miniature.

    python miniature/train_vgg.py --data shapes --labels fine --out runs/vgg        # a minute or two on a CPU
    python miniature/train_vgg.py --data /data/birds/train --val /data/birds/val --image_size 64 --out runs/vgg

Its ckpt.pt goes to `train_tokenizer.py --vgg` and to `fid.py --features`. Blur, noise and gain in training keep its
features from depending on single pixels. One process: it is small.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

sys.path.append(str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402
from runtime import BadInput  # noqa: E402


def parse():
    parser = runtime.Parser(__doc__)
    runtime.add_training_flags(parser, out="runs/vgg", iters=1500, batch_size=64, lr=2e-3)
    add = parser.add_argument
    add("--image_size", type=runtime.positive, default=64, help="side of the images, a multiple of 8")
    add("--crop", choices=data.CROPS, default="random", help="training crop (data.py)")
    add("--widths", type=runtime.positive, nargs=5, default=[16, 32, 64, 96, 128], help="channels of the five stages")
    add("--labels", choices=["class", "fine"], default="class", help="fine: shapes' object x colour family, 60 labels")
    parser.set_defaults(log_every=100, eval_every=500, save_every=500)
    return parser.parse_args()


def perturb(x, generator):
    """Blur half of the batch, scale the contrast, add noise: x (B, 3, S, S) in [-1, 1] -> the same shape."""
    uniform = lambda: torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)  # noqa: E731
    blurred = TF.gaussian_blur(x, [3, 3], [1.0, 1.0])
    x = torch.where(uniform() < 0.5, x, blurred)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return x * (0.8 + 0.4 * uniform()) + noise * 0.5 * uniform()


@torch.no_grad()
def validate(net, loader, device, bad):
    """Cross-entropy and accuracy on the validation set."""
    net.eval()
    loss = correct = n = 0
    for images, labels, index in loader:
        bad(index)
        labels = labels[index < 0].to(device)
        logits = net(data.to_float(images[index < 0], device), ("logit",))["logit"]
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
        n += len(labels)
    net.train()
    return {"loss": loss / n, "accuracy": correct / n}


@torch.no_grad()
def measure_scale(net, loader, device):
    """Mean square of each layer on training images, which the perceptual loss divides by."""
    net.eval()
    squares = [[f.square().mean() for f in net(data.to_float(images[index < 0], device), losses.LAYERS).values()]
               for images, _, index in loader if (index < 0).any()]
    net.mean_square.copy_(torch.tensor(squares).mean(0))
    net.train()


def main():
    args = parse()
    device = runtime.setup(args)
    if runtime.world() > 1:
        raise BadInput("train_vgg.py runs in one process: start it with python, not torchrun")
    if runtime.micro_batch(args) == 1:
        raise BadInput("a batch of one: batch norm needs two images a micro-batch at least, raise --batch_size")
    run = runtime.Run(args, "vgg")
    data.check_image_size(args.image_size, 8)
    source, val = data.open_data(args)
    if not source.classes or tuple(source.classes) != tuple(val.classes):
        raise BadInput(f"--data {args.data} has no classes, or --val has others: a classifier needs a folder of class "
                       f"folders, or shapes")
    fine = args.labels == "fine"
    if fine and args.data != "shapes":
        raise BadInput("--labels fine is for --data shapes, whose colours are known")
    labels = {"classes": list(source.classes), "fine": source.COLOURS if fine else 1}
    if fine:
        source.fine = val.fine = True
    torch.manual_seed(args.seed)
    net = losses.SmallVGG(args.widths, len(labels["classes"]) * labels["fine"])
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    guard, averages, start = runtime.Guard(device), runtime.Averages(), 0
    if state := run.resume(model=net, optimizer=optimizer):
        start = state["step"]
    if args.compile:
        net.compile()

    batches = iter(data.train_loader(data.TrainImages(source, args.image_size, args.crop, args.seed), args, start,
                                     device))
    scale_loader = data.eval_loader(data.EvalImages(source, args.image_size), 64, 0, device, 1024)
    val_loader = data.eval_loader(data.EvalImages(val, args.image_size), 200, min(args.workers, 2), device)
    bad, bad_val = data.Bad(source), data.Bad(val)

    def save(step):
        measure_scale(net, scale_loader, device)  # a stopped run's file, too, must fit the loss
        run.save(step, model=net.state_dict(), optimizer=optimizer.state_dict(), config=net.config, labels=labels)

    def evaluate(step):
        run.progress(step, **run.log(step, "val", **validate(net, val_loader, device, bad_val)))

    run.progress(start)
    if run.missed(start):
        evaluate(start)
    for step in range(start, args.iters):
        for a in range(args.accum):
            x, y, index = next(batches)
            bad(index)
            x, y = data.to_float(x, device), y.to(device, non_blocking=True)
            generator = torch.Generator().manual_seed((args.seed * args.iters + step) * args.accum + a)
            with runtime.autocast(device, args.dtype):
                logits = net(perturb(x, generator), ("logit",))["logit"]
            loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
            (loss / args.accum).backward()
            averages.add(loss=loss)
        guard.step(optimizer, runtime.cosine(step, args.iters, args.lr, 0))

        done = step + 1
        if run.due(done, args.log_every):
            run.progress(done, **run.log(done, "train", **averages.means()))
            if guard.check()[1]:  # nothing is saved: the statistics of batch norm have seen the bad steps
                raise BadInput(f"{guard.PATIENCE} steps in a row had non-finite gradients: lower --lr")
        if run.after_step(done, False, save, evaluate):
            return


if __name__ == "__main__":
    runtime.run(main)
