"""Train the tokenizer, SeQ-GAN (Secs. 3.3 and 3.4). The defaults are Table 9's ImageNet columns.

    torchrun --nproc_per_node=8 train_tokenizer.py --data imagenet/train --val imagenet/val
    torchrun --nproc_per_node=8 train_tokenizer.py --phase 2    # starts from phase 1's result

Phase 1 (semantic compression) trains encoder, codebook and decoder with the semantic-enhanced
perceptual loss, alpha 1. Phase 2 (details preservation) freezes encoder and codebook, adds
attention to the decoder and finetunes it with alpha 0.
"""
import argparse
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import losses
import runtime
import vq

# Table 9, ImageNet. The paper gives phase 2's learning rate as 5e-4 in Sec. 4.1 and as 5e-5 here;
# we follow the table, which is otherwise consistent.
DEFAULTS = {  # phase 1, phase 2
    "iters": (500_000, 200_000),
    "batch_size": (256, 128),
    "lr": (1e-4, 5e-5),
    "alpha": (1.0, 0.0),
    "attention": (0, 1),
    "init": (None, "runs/tokenizer/ckpt.pt"),
    "out": ("runs/tokenizer", "runs/phase2"),
}
BETAS = {1: (0.9, 0.99), 2: (0.5, 0.9)}  # Adam's, Table 9
ARCH_FLAGS = ("channels", "z_dim", "quantizer", "codebook_size", "attention", "extra_blocks",
              "commitment_weight", "entropy_weight")
# The flags that are copied from the checkpoint of --init
INHERITED_FLAGS = (*ARCH_FLAGS, "data", "val", "crop", "image_size", "disc_channels", "vgg",
                   "l1_weight", "perceptual_weight", "adv_weight", "r1_weight")
PRINTED_METRICS = ("loss", "l1", "perceptual", "L_low", "L_sem", "commitment", "soft_entropy",
                   "code_deviation", "real_logit", "fake_logit", "skipped", "psnr", "usage",
                   "perplexity")
R1_EVERY = 16  # steps; the penalty is scaled by it (StyleGAN2's lazy regularization)
KMEANS_STEPS = range(0, 30_001, 2_000)  # Table 5 does not give the schedule. This is VQFR's.


def build_parser():
    """The flags, with the defaults of phase 1."""
    parser = runtime.parser(__doc__)
    runtime.add_training_flags(parser)
    add, size = parser.add_argument, runtime.positive_int
    number, weight = runtime.at_least(0), runtime.at_least(0, float)
    add("--phase", type=int, choices=(1, 2), default=1,
        help="1: semantic compression, 2: details preservation, with the defaults "
             + " ".join(f"--{name} {values[1]}" for name, values in DEFAULTS.items()))
    add("--init", help="tokenizer to start from; default: none, phase 2: runs/tokenizer/ckpt.pt")
    add("--lr_end", type=weight,
        help="learning rate at the end of the cosine decay; default: half of --lr, phase 2: --lr")
    add("--channels", type=size, nargs="+", default=[128, 128, 256, 256, 512],
        help="channels of each level; each level but the first halves the image")
    add("--z_dim", type=size, default=256, help="dimension of a code, n_z")
    add("--quantizer", choices=vq.QUANTIZERS, default="vq", help="vq, or an alternative of Table 5")
    add("--codebook_size", type=size, help="number of codes K; default: 1024, factorized: 8192")
    add("--attention", type=number, help="pairs of block and dilated attention per decoder level")
    add("--extra_blocks", type=number, default=0, help="added residual blocks per decoder level")
    add("--alpha", type=float, help="semantic ratio of Eq. 4, from 0 (details) to 1 (semantics)")
    add("--perceptual_layers", nargs="+", choices=losses.LAYERS,
        help="compare these layers, each with weight 1 (Table 6); default: the layers of --alpha")
    add("--vgg", default="imagenet", help="perceptual network: imagenet (downloaded), a copy of "
        "torchvision's VGG16 weights, or a checkpoint of miniature/train_vgg.py")
    # Eq. 2 adds its terms 1:1:1. The adversarial weight of 0.1 is MaskGIT's and ViT-VQGAN's.
    add("--l1_weight", type=weight, default=1.0, help="weight of the loss |x - x_hat|")
    add("--perceptual_weight", type=weight, default=1.0, help="weight of the perceptual loss")
    add("--adv_weight", type=weight, default=0.1, help="weight of the adversarial loss; 0: off")
    add("--commitment_weight", type=weight, default=0.25, help="weight of the commitment term")
    add("--entropy_weight", type=weight,
        help="weight of the entropy term; default: 0.01, kmeans and factorized: 0")
    add("--vq_warmup", type=number, default=0, help="steps of training without quantization, after "
        "which K-means initializes the codebook (ours, for short runs)")
    add("--disc_warmup", type=number, default=20_000, help="steps over which the adversarial "
        "weight rises from 0; 0 if --init has a discriminator")
    add("--disc_channels", type=size, nargs=2, default=[128, 512],
        help="base and maximum number of channels of the discriminator")
    add("--r1_weight", type=weight, default=10.0, help="weight of the R1 penalty")
    add("--grad_checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory, more time")
    parser.set_defaults(**{name: values[0] for name, values in DEFAULTS.items()})
    return parser


def parse():
    """Precedence: the defaults, then the checkpoint's flags, then the command line's."""
    given, defaults = runtime.parse_flags(build_parser())
    if given.get("phase") == 2:
        defaults |= {name: values[1] for name, values in DEFAULTS.items()}
    saved = runtime.resumed_flags(given, defaults, "tokenizer")
    if not saved and (init := given.get("init", defaults["init"])):
        state = runtime.load_checkpoint(init, "tokenizer", mmap=True)
        saved = {name: state["args"][name] for name in INHERITED_FLAGS if name in state["args"]}
        # Phase 2 adds attention, unless phase 1 has it already (Table 1).
        saved["attention"] = max(saved["attention"], defaults["attention"])
        if "data" in given:
            saved.pop("val", None)
        if "disc" in state:  # it needs no warm-up
            saved["disc_warmup"] = 0
    args = argparse.Namespace(**defaults | saved | given)

    if args.codebook_size is None:
        args.codebook_size = 8192 if args.quantizer == "factorized" else 1024
    if args.entropy_weight is None:
        args.entropy_weight = 0.01 if args.quantizer == "vq" else 0.0
    f = 2 ** (len(args.channels) - 1)
    if not 0 <= args.alpha <= 1:
        raise SystemExit(f"--alpha {args.alpha} is not in [0, 1]")
    if args.image_size % f:
        raise SystemExit(f"--image_size {args.image_size} must be divisible by {f}, the "
                         f"downsampling factor of --channels")
    if args.vq_warmup and (args.init or args.quantizer != "vq"):
        raise SystemExit("--vq_warmup needs --quantizer vq and no --init")
    return args


# ---------------------------------------------------------------------------------- the losses

class Networks(NamedTuple):
    model: vq.VQModel
    disc: losses.Discriminator  # None without an adversarial loss
    perceptual: losses.PerceptualLoss


def encode(model, x, args):
    """z_q, indices, terms. Phase 2's frozen encoder runs in fp32 (TF32 on a GPU), because priors
    are trained on fp32 codes. A bf16 encoder changes about 1 % of them."""
    if args.phase == 1:
        return model.encode(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), runtime.tf32():
        return model.encode(x)


def adversarial_weight(step, args):
    """The weight rises linearly from 0, because an untrained discriminator degrades the images."""
    return args.adv_weight * min(1, step / args.disc_warmup if args.disc_warmup else 1)


def tokenizer_loss(networks, x, step, args):
    """Eq. 2 for a micro-batch x (b, 3, S, S) in [-1, 1] -> the loss, x_hat, and a dict of terms."""
    model, disc, perceptual = networks
    adv_weight = adversarial_weight(step, args) if disc else 0
    with runtime.autocast(x.device, args.dtype):
        if step >= args.vq_warmup:
            z_q, _, terms = encode(model, x, args)
        else:
            z_q, terms = model.encoder(x), {}
        x_hat = model.decode(z_q)
        per, layers = perceptual(x_hat, x)  # Eq. 4
        fake_logits = disc(x_hat) if adv_weight else None
    l1 = F.l1_loss(x_hat, x)
    loss = args.l1_weight * l1 + args.perceptual_weight * per
    if args.phase == 1 and terms:
        loss = loss + terms["vq"]  # codebook, commitment, entropy
    if adv_weight:
        terms["adversarial"] = losses.generator_loss(fake_logits)
        loss = loss + adv_weight * terms["adversarial"]
    return loss, x_hat, terms | layers | {"loss": loss, "l1": l1, "perceptual": per}


def discriminator_loss(disc, x, x_hat, args):
    """The discriminator's loss on images and reconstructions, and a dict of values to log."""
    with runtime.autocast(x.device, args.dtype):
        real_logits, fake_logits = disc(x), disc(x_hat)
    loss = losses.discriminator_loss(real_logits, fake_logits)
    return loss, {"disc": loss, "real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}


def backward_r1(disc, x, weight):
    """Backward pass of weight * R1 -> R1. It takes eight images at a time, which bounds the memory
    and keeps the groups of four of minibatch_stddev."""
    total = torch.zeros((), device=x.device)
    for part in x.split(8):
        # fp32; TF32 is precise enough for a penalty. `.forward` bypasses the compiled module.
        with runtime.tf32():
            r1 = losses.r1_penalty(disc.forward, part) * len(part) / len(x)
            (weight * r1).backward()
        total += r1.detach()
    return total


# ---------------------------------------------------------------------------------- validation

def validate(networks, val, run, args, device):
    """Means over at most 5,000 validation images, and usage and perplexity of their codes."""
    model, _, perceptual = networks
    names = ["l1", "psnr", "perceptual", *losses.LAYERS]
    total = torch.zeros(len(names) + 1, device=device)
    histogram = torch.zeros(args.codebook_size, device=device)
    images = data.EvalImages(val, args.image_size)
    batches = data.eval_loader(images, runtime.micro_batch_size(args), 0, device, 5000)
    for batch, _ in data.until_unreadable(batches, run):
        x = data.to_float(batch, device)
        with runtime.eval_mode(model, device, args.dtype):
            z_q, indices, _ = encode(model, x, args)
            x_hat = model.decode(z_q)
            loss, layers = perceptual(x_hat, x, losses.LAYERS)
        values = [*vq.l1_and_psnr(x_hat, x), loss, *layers.values(), loss.new_ones(())]
        total += torch.stack(values).float() * len(x)
        histogram += torch.bincount(indices.flatten(), minlength=args.codebook_size)
    for tensor in (total, histogram):
        runtime.all_reduce_sum(tensor)
    means = dict(zip(names, (total / total[-1]).tolist()))
    # Eq. 4's two sums do not depend on alpha, so they compare runs of any alpha.
    means["L_low"] = sum(means[layer] for layer in losses.LOW_LAYERS)
    means["L_sem"] = sum(means[layer] for layer in losses.SEM_LAYERS)
    usage, perplexity, H = vq.usage_and_perplexity(histogram)
    if usage < 0.5 * min(1, histogram.sum() / args.codebook_size):
        runtime.print0(f"warning: only {100 * usage:.1f} % of the codes are used on the validation "
                       f"set (a soft-usage entropy near ln K does not rule this out)")
    return means | {"usage": usage, "perplexity": perplexity, "code_entropy": H}


def save_reconstructions(path, model, val, args, device):
    """Up to 32 validation images, each above its reconstruction."""
    images = data.EvalImages(val, args.image_size)
    x = torch.stack([images[i][0] for i in data.evenly_spaced(len(val), 32)])
    x = data.to_float(x, device)
    with runtime.eval_mode(model, device, args.dtype):
        x_hat = model.decode(encode(model, x, args)[0])
    data.save_grid(path, [("input", data.to_uint8(x)), ("reconstruction", data.to_uint8(x_hat))])


# ------------------------------------------------------------------------------------ training

def kmeans_codebook(model, x, args):
    """Replace the codebook by K-means of the encoder's outputs on x: the last 16,384 vectors (64
    images of 256 x 256) of all processes."""
    with runtime.eval_mode(model, x.device, args.dtype):
        z = model.encoder(x).float().permute(0, 2, 3, 1).flatten(0, 2)
    z = vq.all_gather_rows(z)[-16_384:]
    if z.isfinite().all(1).any():
        model.quantizer.codebook.data.copy_(vq.kmeans(z, args.codebook_size))
        runtime.broadcast(model.quantizer.codebook.data)  # CPUs may round differently


def build_models(args, device, init=None):
    """Tokenizer and discriminator (None if adv_weight is 0), with the weights of `init`."""
    torch.manual_seed(args.seed)
    model = vq.VQModel(**{name: getattr(args, name) for name in ARCH_FLAGS},
                       grad_checkpointing=args.grad_checkpointing)
    disc = losses.Discriminator(args.image_size, args.disc_channels) if args.adv_weight else None
    if init:
        state = runtime.load_checkpoint(init, "tokenizer")
        attention = tuple(f"{name}." for name, part in model.named_modules()
                          if isinstance(part, vq.BlockAttention))
        new = {name: value for name, value in model.state_dict().items()
               if name.startswith(attention)}  # new attention layers keep their zero output
        try:
            model.load_state_dict(new | state["model"])
            if disc and "disc" in state:  # an untrained discriminator degrades the images
                disc.load_state_dict(state["disc"])
        except RuntimeError as error:
            raise SystemExit(f"{init} does not fit --image_size or the flags of the architecture"
                             ) from error
    if args.phase == 2:  # priors trained on phase 1's codes stay valid
        model.encoder.requires_grad_(False)
        model.quantizer.requires_grad_(False)
    if disc:
        disc.requires_grad_(False)  # except in its own step
        disc.to(device, memory_format=torch.channels_last)
    return model.to(device, memory_format=torch.channels_last), disc


def main():
    args = parse()
    device, compiled = runtime.setup(args)
    runtime.micro_batch_size(args)  # checks that the batch is divisible
    run = runtime.Run(args, "tokenizer", PRINTED_METRICS)
    source, val = data.open_data(args)
    vgg = runtime.main_first(lambda: losses.load_vgg(args.vgg))
    perceptual = losses.PerceptualLoss(vgg, args.alpha, args.perceptual_layers).to(device)
    model, disc = build_models(args, device, None if run.ckpt.exists() else args.init)
    networks = Networks(model, disc, perceptual)

    lr_end = args.lr_end
    if lr_end is None:
        lr_end = args.lr / 2 if args.phase == 1 else args.lr
    kmeans_steps = [args.vq_warmup] if args.vq_warmup else []
    if args.quantizer == "kmeans" and not args.init:  # the codebook of --init is kept
        kmeans_steps = KMEANS_STEPS
    # The paper gives one set of Adam's parameters. Both networks use it.
    trained = model if args.phase == 1 else model.decoder
    opts = [torch.optim.Adam(net.parameters(), betas=BETAS[args.phase], fused=True)
            for net in (trained, disc) if net]
    parts = {"model": model, "opt": opts[0]}
    if disc:
        parts |= {"disc": disc, "opt_disc": opts[1]}
    constants = {"config": model.config, "content": data.content_hash(source)}
    start, state = run.resume(constants, **parts)
    if args.phase == 1 and start and start == state["args"]["iters"] < args.iters:
        runtime.print0(f"note: training continues a finished run. Its priors and its phase 2 will "
                       f"not fit the new weights: keep a copy of {run.ckpt} for them")
    if compiled:  # not the quantizer, which is fp32 and has a collective inside
        for part in (model.encoder, model.decoder, perceptual.net, *([disc] if disc else [])):
            part.compile(dynamic=False)

    stream = data.TrainImages(source, args.image_size, args.crop, args.seed)
    batches = data.until_unreadable(data.train_loader(stream, args, start, device), run)
    averages = runtime.Averages()
    model.train()
    # Fetched one step ahead: if no image can be read, run.error is set before the step begins.
    micro_batches = list(islice(batches, args.grad_accum))
    for step in range(start, args.iters + 1):
        run.stop_if_requested(step)
        if run.validation_is_due(step):
            values = validate(networks, val, run, args, device)
            run.log(step, "val", **values)
            if runtime.is_main() and not run.error:
                path = run.out / "samples" / f"{step:07}.png"
                save_reconstructions(path, model, val, args, device)
            run.validated = step
            run.save(step, loss=values["perceptual"])
        if step == args.iters:
            break

        xs = [data.to_float(x, device) for x, _ in micro_batches]  # (b, 3, S, S) in [-1, 1]
        if step in kmeans_steps:
            kmeans_codebook(model, xs[0], args)

        # The tokenizer. Averaging over micro-batches equals the large batch, except for the entropy
        # term, whose soft usage is a mean over one micro-batch (of all processes).
        x_hats = []
        for x in xs:
            loss, x_hat, terms = tokenizer_loss(networks, x, step, args)
            (loss / args.grad_accum).backward()
            x_hats.append(x_hat.detach())
            averages.add(**terms)

        # The discriminator, on the same images and reconstructions
        if disc:
            disc.requires_grad_(True)
            for x, x_hat in zip(xs, x_hats):
                loss, terms = discriminator_loss(disc, x, x_hat, args)
                (loss / args.grad_accum).backward()
                averages.add(**terms)
                if args.r1_weight and step % R1_EVERY == 0:
                    weight = args.r1_weight / 2 * R1_EVERY / args.grad_accum
                    averages.add(r1=backward_r1(disc, x, weight))
            disc.requires_grad_(False)

        lr = runtime.cosine(step, args.iters, args.lr, lr_end)
        norms = run.step(opts, lr)
        if run.due(step + 1, args.log_every):
            values = averages.pop() | dict(zip(("grad_norm", "grad_norm_disc"), norms))
            run.log(step + 1, "train", lr=lr, adv_weight=adversarial_weight(step, args),
                    skipped=run.skipped, **values)
        micro_batches = list(islice(batches, args.grad_accum))


if __name__ == "__main__":
    runtime.launch(main)
