"""Train the tokenizer, SeQ-GAN (Secs. 3.3 and 3.4). The defaults are Table 9's ImageNet column.

    python train_tokenizer.py --data photos --vgg runs/vgg/ckpt.pt --image_size 32 --iters 1000 \\
           --channels 16 32 64 --z_dim 32 --codebook_size 256 --disc_channels 16 64 \\
           --batch_size 16 --lr 1.5e-3 --vq_start 100 --disc_ramp 500         # a laptop
    torchrun --nproc_per_node=8 train_tokenizer.py --alpha 1 --data imagenet/train \\
             --val imagenet/val                                               # eight GPUs
    torchrun --nproc_per_node=8 train_tokenizer.py --phase 2    # on what the last command made

Phase 1 learns encoder, codebook and decoder with the semantic-enhanced perceptual loss (alpha 1):
semantic compression. Phase 2 fixes encoder and codebook, adds attention to the decoder and
finetunes it with alpha 0: details preservation.
"""
import argparse

import torch
import torch.nn.functional as F

import data
import losses
import runtime
import vq

# What the second phase changes. Paper: its learning rate is 5e-4 in Sec. 4.1 and 5e-5 in Table 9,
# FFHQ's phase 1 has 500k and 300k steps: we take the table, whose other numbers check out.
PHASE_2 = dict(iters=200_000, batch_size=128, lr=5e-5, alpha=0.0, attention=1,
               init="runs/tokenizer/ckpt.pt", out="runs/phase2")
# The tokenizer's layout; what --init hands on; what can't change while a run goes on.
LAYOUT = ("channels", "z_dim", "quantizer", "codebook_size", "attention", "extra_blocks")
INHERITED = (*LAYOUT, "beta", "gamma", "data", "val", "crop", "image_size", "disc_channels", "vgg",
             "l1_weight", "perceptual_weight", "adv_weight", "r1")
FIXED = (*LAYOUT, "phase", "seed", "batch_size", "image_size", "crop", "disc_channels")
SHOWN = ("loss", "l1", "perceptual", "commitment", "H", "code_deviation", "real_logit",
         "fake_logit", "skipped", "psnr", "usage", "perplexity")


def parse():
    parser = runtime.parser(__doc__)
    runtime.add_training_flags(parser, out="runs/tokenizer", iters=500_000, batch_size=256, lr=1e-4)
    add = parser.add_argument
    add("--phase", type=int, choices=(1, 2), default=1, help="1: semantic compression; "
        f"2: details, with other defaults: {PHASE_2}")
    add("--init", help="tokenizer to start from; phase 2 needs one")
    add("--lr_end", type=float, help="end of the cosine decay; default: half of --lr, in phase 2 "
        "all of it")
    add("--channels", type=int, nargs="+", default=[128, 128, 256, 256, 512],
        help="a width per level, each level halves the image")
    add("--z_dim", type=int, default=256, help="dimensions of a code, n_z")
    add("--quantizer", choices=vq.QUANTIZERS, default="vq", help="the others are Table 5's")
    add("--codebook_size", type=int, default=1024, help="K")
    add("--attention", type=int, default=0, help="block + dilated attention pairs a decoder level")
    add("--extra_blocks", type=int, default=0, help="residual blocks added a level (Table 1: 2)")
    add("--alpha", type=float, default=1.0, help="semantic ratio of Eq. 4, in [0, 1]")
    add("--perceptual_layers", nargs="+", choices=losses.LAYERS,
        help="Table 6: these, weight 1 each, instead of alpha")
    add("--vgg", default="imagenet", help="imagenet, a copy of torchvision's file, or a checkpoint "
        "of miniature/train_vgg.py")
    # Paper: Eq. 2 adds the terms 1:1:1. 0.1 is what its peers give this discriminator.
    add("--l1_weight", type=float, default=1.0, help="weight of |x - x_hat|")
    add("--perceptual_weight", type=float, default=1.0, help="weight of the perceptual loss")
    add("--adv_weight", type=float, default=0.1, help="weight of the adversarial loss; 0: none")
    add("--beta", type=float, default=0.25, help="weight of the commitment term")
    add("--gamma", type=float, default=0.01, help="weight of the entropy term")
    # Ours, for short runs: codes from U(-1/K, 1/K) take hundreds of steps to spread.
    add("--vq_start", type=int, default=0,
        help="steps without quantization, then codes begin at K-means of the encoder's outputs")
    add("--disc_ramp", type=int, default=20_000,
        help="steps over which --adv_weight rises from 0; default for the discriminator of --init: "
             "0")
    add("--disc_channels", type=int, nargs=2, default=[128, 512], help="at full size, at most")
    add("--r1", type=float, default=10.0, help="weight of the R1 penalty")
    add("--recompute", action="store_true", help="less memory, more time: activations twice")
    given, flags = runtime.read_flags(parser)

    # Defaults that depend on other flags
    if given.get("phase") == 2:
        flags |= PHASE_2
    if given.get("quantizer", "vq") != "vq":  # as in Table 5
        flags["gamma"] = 0.0
    if given.get("quantizer") == "factorized":
        flags["codebook_size"] = 8192

    # The checkpoint that the run goes on with, or starts from
    now = flags | given
    saved = runtime.resumed_flags(now, given, "tokenizer", FIXED)
    if now["init"] and not saved:
        state = runtime.read_checkpoint(now["init"], "tokenizer", mmap=True)
        saved = runtime.inherited_flags(state["args"], INHERITED, given)
        saved["attention"] = max(saved["attention"], flags["attention"])
        if "disc" in state:  # it goes on
            saved["disc_ramp"] = 0
    args = argparse.Namespace(**flags | saved | given)

    if not 0 <= args.alpha <= 1:
        raise SystemExit(f"--alpha {args.alpha} is not in [0, 1]")
    if args.image_size % 2 ** (len(args.channels) - 1):
        raise SystemExit(f"--image_size {args.image_size} is not a multiple of "
                         f"{2 ** (len(args.channels) - 1)}, by which --channels reduce it")
    if args.vq_start and (args.init or args.quantizer != "vq"):
        raise SystemExit("--vq_start goes with --quantizer vq, and without --init")
    return args


# ----------------------------------------------------------------------------------- the steps

def tokenizer_step(model, disc, perceptual, xs, args, adv_weight, quantize, averages):
    """Forward and backward pass of the tokenizer on micro-batches xs, each (b, 3, S, S) in [-1, 1].
    Returns their reconstructions, detached; the terms go to `averages`."""
    x_hats = []
    if disc:
        disc.requires_grad_(False)
    for x in xs:
        with runtime.autocast(x.device, args.dtype):
            if quantize:
                z_q, _, terms = encode(model, x, args)
            else:  # --vq_start: a plain autoencoder
                z_q, terms = model.encoder(x), {}
            x_hat = model.decode(z_q)
            per, layers = perceptual(x_hat, x)  # Eq. 4
            fake_logits = disc(x_hat) if adv_weight else None
        l1 = F.l1_loss(x_hat, x)
        loss = args.l1_weight * l1 + args.perceptual_weight * per  # Eq. 2, and below
        if args.phase == 1 and quantize:
            loss = loss + terms["vq"]
        if adv_weight:
            adversarial = losses.generator_loss(fake_logits)
            loss = loss + adv_weight * adversarial
            averages.add(adversarial=adversarial)
        # The mean over micro-batches equals the large batch, but for the entropy term: its soft
        # usage is a mean over the positions of one micro-batch (of all processes).
        (loss / len(xs)).backward()
        x_hats.append(x_hat.detach())
        averages.add(loss=loss, l1=l1, perceptual=per, **layers, **terms)
    return x_hats


R1_EVERY = 16  # steps; the penalty is scaled by it (StyleGAN2's lazy regularisation)


def discriminator_step(disc, xs, x_hats, args, penalise, averages):
    """Forward and backward pass of the discriminator on the same images and reconstructions."""
    disc.requires_grad_(True)
    for x, x_hat in zip(xs, x_hats):
        with runtime.autocast(x.device, args.dtype):
            real_logits, fake_logits = disc(x), disc(x_hat)
        loss = losses.discriminator_loss(real_logits, fake_logits)
        averages.add(disc=loss, real_logit=real_logits.mean(), fake_logit=fake_logits.mean())
        (loss / len(xs)).backward()
        # In fp32, on a GPU TF32: a penalty does not need more digits. Eight images at a time, which
        # bounds the memory and leaves the groups of the minibatch standard deviation whole.
        total = 0
        for part in x.split(8) if penalise else ():
            with runtime.tf32():  # `forward` goes round the compiled version
                r1 = losses.r1_penalty(disc.forward, part) * len(part) / len(x)
                (args.r1 / 2 * R1_EVERY * r1 / len(xs)).backward()
            total = total + r1.detach()
        if penalise:
            averages.add(r1=total)


def encode(model, x, args):
    """z_q, indices, terms. Phase 2's fixed encoder runs in fp32 (on a GPU TF32): priors learn fp32
    codes, and of a bf16 encoder's one in a hundred is another."""
    if args.phase == 1:
        return model.encode(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), runtime.tf32():
        return model.encode(x)


@torch.no_grad()
def start_codes(model, x, args):
    """--vq_start: the codes begin as K-means of the encoder's outputs on x (of all processes)."""
    with runtime.autocast(x.device, args.dtype):
        z = model.encoder(x).float().permute(0, 2, 3, 1).flatten(0, 2)
    codes = vq.kmeans(runtime.gather_rows(z), args.codebook_size, seed=0)
    model.quantizer.codebook.copy_(codes)


def validate(model, perceptual, batches, full, device, args, unreadable):
    """Means over the validation set, usage and perplexity of the codes. `batches` have `full`
    images and a last one fewer."""
    names = ["l1", "psnr", "perceptual", *perceptual.weights]
    total = torch.zeros(len(names) + 1, device=device)
    histogram = torch.zeros(args.codebook_size, device=device)
    for images, _, reasons in batches:
        unreadable.note(reasons)
        x = data.to_float(images[[not reason for reason in reasons]], device)
        if not len(x):
            continue
        # A last batch of another size runs uncompiled: it is not worth a graph of its own.
        with runtime.evaluating(model, device, args.dtype, eager=len(x) != full):
            z_q, indices, _ = encode(model, x, args)
            x_hat = model.decode(z_q)
            loss, layers = perceptual(x_hat, x)
        x_hat = x_hat.clamp(-1, 1)
        mse = ((x_hat - x) / 2).square().mean((1, 2, 3))  # of values in [0, 1]
        psnr = -10 * mse.clamp(min=1e-10).log10()
        values = [(x_hat - x).abs().mean(), psnr.mean(), loss, *layers.values(), loss.new_ones(())]
        total += torch.stack(values).float() * len(x)
        histogram += torch.bincount(indices.flatten(), minlength=args.codebook_size)
    means = dict(zip(names, (runtime.sum_over_processes(total) / total[-1]).tolist()))
    usage, perplexity, H = vq.usage_and_perplexity(runtime.sum_over_processes(histogram))
    return means | {"usage": usage, "perplexity": perplexity, "code_entropy": H}


def save_picture(path, model, val, device, args):
    """Eight images, spread over the set, below them their reconstructions, and so on."""
    images = data.EvalImages(val, args.image_size)
    x = torch.stack([images[i][0] for i in data.spread(len(val), 32)])
    x = data.to_float(x, device)
    with runtime.evaluating(model, device, args.dtype, eager=True):
        x_hat = model.decode(encode(model, x, args)[0])
    columns = min(8, len(x))
    x, x_hat = (F.pad(data.to_uint8(t), (0, 0) * 3 + (0, -len(t) % columns), value=255)
                for t in (x, x_hat))
    rows = zip(x.split(columns), x_hat.split(columns))
    data.save_grid(path, torch.cat([row for pair in rows for row in pair]), columns)


# ------------------------------------------------------------------------------------ training

def build(args, device, init=""):
    """Tokenizer and discriminator (None if it weighs nothing), with the weights of `init`."""
    torch.manual_seed(args.seed)
    config = {name: getattr(args, name) for name in (*LAYOUT, "beta", "gamma")}
    model = vq.VQModel(**config)
    disc = losses.Discriminator(args.image_size, args.disc_channels) if args.adv_weight else None
    if init:
        state = runtime.read_checkpoint(init, "tokenizer")
        missing, unexpected = model.load_state_dict(state["model"], strict=False)
        new = tuple(f"{name}." for name, part in model.named_modules()
                    if isinstance(part, vq.BlockAttention))  # these may keep their zero start
        if strange := [*unexpected, *(name for name in missing if not name.startswith(new))]:
            raise SystemExit(f"{init} does not fit these flags: {strange[0]}")
        if disc and "disc" in state:  # a cold discriminator ruins images: phase 1's goes on
            disc.load_state_dict(state["disc"])
    model.quantizer.mean_over_processes = runtime.mean_over_processes
    model.quantizer.gather_rows = runtime.gather_rows
    model.encoder.recompute = model.decoder.recompute = args.recompute
    if args.phase == 2:  # fixed: a prior trained on phase 1's codes fits phase 2
        model.encoder.requires_grad_(False)
        model.quantizer.requires_grad_(False)
    if disc:
        disc.to(device, memory_format=torch.channels_last)
    return model.to(device, memory_format=torch.channels_last), disc, config


def main():
    args = parse()
    device, compiled = runtime.setup(args)
    b = runtime.micro_batch(args)
    run = runtime.Run(args, "tokenizer", SHOWN)
    source, val = data.open_data(args)
    vgg = runtime.main_first(lambda: losses.load_vgg(args.vgg))
    perceptual = losses.PerceptualLoss(vgg, args.alpha, args.perceptual_layers).to(device)
    # A run that goes on has weights of its own.
    model, disc, config = build(args, device, "" if run.ckpt.exists() else args.init)

    lr_end = args.lr_end
    if lr_end is None:
        lr_end = args.lr / 2 if args.phase == 1 else args.lr
    # Paper: one line for both networks' optimizers, so the discriminator gets the tokenizer's.
    betas = (0.9, 0.99) if args.phase == 1 else (0.5, 0.9)  # Table 9
    trained = model if args.phase == 1 else model.decoder
    opts = [torch.optim.Adam(net.parameters(), betas=betas, fused=True)
            for net in (trained, disc) if net]
    parts = {"model": model, "opt": opts[0]}
    if disc:
        parts |= {"disc": disc, "opt_disc": opts[1]}
    start = run.resume(**parts)
    if compiled:  # parts: the quantizer (fp32, a collective inside) stays as it is
        for part in (model.encoder, model.decoder, perceptual.net, *([disc] if disc else [])):
            part.compile(dynamic=False)  # else validation makes all later steps dynamic

    stream = data.TrainImages(source, args.image_size, args.crop, args.seed)
    batches = iter(data.train_loader(stream, args, start, device))
    val_batches = data.eval_loader(data.EvalImages(val, args.image_size), b,
                                   min(args.workers, 2), device, 5000)
    unreadable, averages = data.Unreadable(source), runtime.Averages()
    unreadable_val, optimizers = data.Unreadable(val), runtime.Optimizers(run, *opts)

    def save(step):
        with runtime.evaluating(model, device, args.dtype, eager=True):
            x_hat, *_ = model(xs[0])
        if optimizers.sound(step, x_hat):
            state = {name: part.state_dict() for name, part in parts.items()}
            run.save(step, run.ckpt, config=config, **state)

    def evaluate(step):
        values = validate(model, perceptual, val_batches, b, device, args, unreadable_val)
        if runtime.is_main():
            save_picture(run.out / "samples" / f"{step:07}.png", model, val, device, args)
        run.log(step, "val", **values)
        positions = min(len(val), 5000) * (args.image_size // model.f) ** 2
        reachable = min(1, positions / args.codebook_size)
        if values["usage"] < 0.5 * reachable and runtime.is_main():
            print(f"warning: only {100 * values['usage']:.1f} % of the codes are used on the "
                  f"validation set (H near ln K does not show it)", flush=True)

    model.train()
    if run.missed(start):
        evaluate(start)
    for step in range(start, args.iters):
        lr = runtime.cosine(step, args.iters, args.lr, lr_end)
        adv_weight = args.adv_weight
        if step < args.disc_ramp:
            adv_weight *= step / args.disc_ramp
        xs = []
        for _ in range(args.accum):
            images, _, reasons = next(batches)
            unreadable.note(reasons)
            xs.append(data.to_float(images, device))  # (b, 3, S, S) in [-1, 1]
        if step and step == args.vq_start:
            start_codes(model, xs[0], args)

        quantize = step >= args.vq_start
        x_hats = tokenizer_step(model, disc, perceptual, xs, args, adv_weight, quantize, averages)
        if disc:
            penalise = args.r1 and step % R1_EVERY == 0
            discriminator_step(disc, xs, x_hats, args, penalise, averages)
        norms = optimizers.step(lr)

        done = step + 1
        if run.due(done, args.log_every):
            values = averages.means() | dict(zip(("grad_norm", "grad_norm_disc"), norms))
            run.log(done, "train", lr=lr, adv_weight=adv_weight, skipped=optimizers.skipped,
                    **values)
        stop, due = run.stopping(unreadable.too_many()), run.due(done, args.eval_every)
        if stop and not optimizers.in_a_row:  # else after the next step that is not skipped
            save(done)
            run.leave()
        if due:
            save(done)
            evaluate(done)


if __name__ == "__main__":
    runtime.launch(main)
