"""Train the tokenizer, SeQ-GAN (Secs. 3.3 and 3.4). The defaults are Table 9's ImageNet column.

    python train_tokenizer.py --data shapes --image_size 64 --channels 32 48 64 96 --batch_size 32      # anywhere
    torchrun --nproc_per_node=8 train_tokenizer.py --data /data/imagenet/train --val /data/imagenet/val --alpha 1
    torchrun --nproc_per_node=8 train_tokenizer.py --phase 2 --init runs/tokenizer/ckpt.pt --out runs/phase2 \\
             --data /data/imagenet/train --val /data/imagenet/val

Phase 1 learns encoder, codebook and decoder with the semantic-enhanced perceptual loss (alpha = 1): semantic
compression. Phase 2 fixes encoder and codebook, adds attention to the decoder and finetunes it with alpha = 0: details
preservation. README.md has the command line of every column of Table 9.
"""
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
import losses
import runtime
import vq
from runtime import BadInput

# What differs between the phases; each is a flag too. Paper: phase 2's learning rate is 5e-4 in Sec. 4.1 and 5e-5 in
# Table 9, FFHQ's iterations are 500k and 300k: we take the table's, whose other numbers check out.
PHASE = {1: dict(iters=500_000, batch_size=256, lr=1e-4, betas=[0.9, 0.99], alpha=1.0,
                 decoder_attention=0),
         2: dict(iters=200_000, batch_size=128, lr=5e-5, betas=[0.5, 0.9], alpha=0.0,
                 decoder_attention=1)}
# The networks' shape: with --init it is the checkpoint's, and a flag that says otherwise is refused.
SHAPE = dict(channels=[128, 128, 256, 256, 512], z_dim=256, codebook="entropy", codebook_size=1024, image_size=256,
             decoder_extra_blocks=0, disc_channels=[128, 512])


def parse():
    parser = runtime.Parser(__doc__)
    runtime.add_training_flags(parser, out="runs/tokenizer", iters=None, batch_size=None, lr=None)
    add = parser.add_argument
    add("--phase", type=int, choices=[1, 2], default=1, help="1: semantic compression, 2: details preservation")
    add("--init", default="", help="tokenizer checkpoint to start from: phase 2 needs it, phase 1 finetunes it (LSUN)")
    add("--lr_end", type=runtime.rate, help="end of the cosine decay: half of --lr, in phase 2 all of it")
    add("--betas", type=runtime.bounded(float, 0, 0.999999), nargs=2, help="Adam's, of tokenizer and discriminator")
    add("--crop", choices=data.CROPS, default="random", help="random: ImageNet, resized: FFHQ, center: LSUN")
    add("--val_n", type=runtime.count, default=0,
        help="validate on N of the validation images (0: all, or 5000 if there is no --val)")
    add("--image_size", type=runtime.side, help="side of the images, 256")
    add("--channels", type=runtime.positive, nargs="+", help="one width per level, each level halves; f = 2^(levels-1)")
    add("--z_dim", type=runtime.positive, help="dimensions of a code, n_z = 256")
    add("--codebook", choices=vq.CODEBOOKS, help="entropy is the paper's, the others are Table 5's")
    add("--codebook_size", type=runtime.bounded(int, 2, 65536), help="K: 1024; 8192 for factorized")
    few = runtime.bounded(int, 0, 16)
    add("--decoder_attention", type=few, help="block + dilated attention pairs a level: 0, in phase 2: 1")
    add("--decoder_extra_blocks", type=few, help="residual blocks added a level (Table 1's Conv x2 has 2)")
    add("--alpha", type=runtime.fraction, help="semantic ratio of Eq. 4: 1, in phase 2: 0")
    add("--perceptual_layers", nargs="+", choices=losses.LAYERS, help="Table 6: these, weight 1 each, instead of alpha")
    add("--vgg", default="imagenet", help="imagenet, a local copy of torchvision's file, or a train_vgg.py checkpoint")
    # Paper: Eq. 2 adds the terms 1:1:1. 0.1 is what its peers give this discriminator.
    add("--l1_weight", type=runtime.weight, default=1.0, help="weight of |x - x_hat|")
    add("--vq_weight", type=runtime.weight, default=1.0, help="weight of codebook + beta commitment + entropy term")
    add("--perceptual_weight", type=runtime.weight, default=1.0, help="weight of the perceptual loss")
    add("--adv_weight", type=runtime.weight, default=0.1, help="weight of the adversarial loss; 0: no discriminator")
    add("--beta", type=runtime.weight, default=0.25, help="weight of the commitment term within the VQ loss")
    add("--gamma", type=runtime.weight, default=0.01, help="weight of the entropy term within the VQ loss")
    # Ours, for short runs: codes from U(-1/K, 1/K) take hundreds of steps to spread, which is nothing in 500,000.
    add("--vq_start", type=runtime.count, default=0, help="steps without quantization; then codes begin at K-means")
    add("--disc_start", type=runtime.count, default=0, help="step at which the adversarial weight begins to rise")
    add("--disc_ramp", type=runtime.count, help="steps over which it rises: 20000; with --init: 0")
    add("--disc_channels", type=runtime.positive, nargs=2, help="at full resolution, at most")
    add("--r1", type=runtime.weight, default=10.0, help="weight of the R1 penalty")
    add("--r1_every", type=runtime.positive, default=16, help="steps between two R1 penalties, each scaled by it")
    add("--ema", type=runtime.bounded(float, 0, 0.999999), default=0.0, help="decay of a weight average (0: none)")
    add("--recompute", action="store_true", help="compute activations twice instead of keeping them: less memory")
    args = parser.parse_args()
    if args.perceptual_layers and args.alpha is not None:
        raise BadInput("--alpha and --perceptual_layers are two ways to weigh the layers: give one of them")
    if args.phase == 2 and (idle := parser.given & {"vq_weight", "beta", "gamma"}):
        raise BadInput(f"--{min(idle)}: phase 2 has no VQ loss, its encoder and codebook are fixed; leave it out")
    if args.codebook not in (None, "entropy") and args.gamma and "gamma" in parser.given:
        raise BadInput(f"--gamma {args.gamma}: --codebook {args.codebook} has no entropy term, leave the flag out")
    for name, value in PHASE[args.phase].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr_end is None:
        args.lr_end = args.lr / 2 if args.phase == 1 else args.lr
    if args.perceptual_layers:
        args.alpha = None
    return args


def settle_shape(args):
    """Fill the shape flags from --init's checkpoint, or from the paper. Returns the checkpoint or None."""
    init, shape = None, dict(SHAPE)
    if args.codebook == "factorized":
        shape["codebook_size"] = 8192
    if args.init:
        init = runtime.load_checkpoint(args.init, "tokenizer")
        with runtime.refusing(args.init):
            has = {**init["args"], **init["config"], "decoder_extra_blocks": init["config"]["extra_blocks"]}
            shape = {name: has[name] for name in SHAPE}
            if not init["disc"] and args.disc_channels:  # a new one may have any
                shape["disc_channels"] = args.disc_channels
            runtime.restore(args.init, lambda: vq.VQModel(**init["config"]), init["ema"] or init["model"])
    elif args.phase == 2:
        raise BadInput("--phase 2 needs --init: the checkpoint of a finished phase 1")
    if args.vq_start and (init or args.codebook == "kmeans"):
        raise BadInput("--vq_start is for a codebook that has no start: not with --init, nor with --codebook kmeans")
    for name, value in shape.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif init and getattr(args, name) != value:
            raise BadInput(f"--{name} {getattr(args, name)} is not the shape of --init {args.init}, which has {value}: "
                           f"leave the flag out")
    if args.disc_ramp is None:  # a discriminator that comes with the checkpoint is warm
        args.disc_ramp = 0 if init and init.get("disc") else 20_000
    data.check_image_size(args.image_size, 2 ** (len(args.channels) - 1))
    return init


def load_init(model, disc, init, args):
    """Weights of --init, strictly; only attention that the checkpoint's decoder lacks keeps its zero start."""
    fresh = {f"{name}.{key}": value for name, part in model.decoder.named_modules(prefix="decoder")
             if isinstance(part, vq.BlockAttention) for key, value in part.state_dict().items()}
    with runtime.refusing(args.init):
        model.load_state_dict(fresh | (init["ema"] or init["model"]))
        if disc and init["disc"]:  # a cold discriminator ruins images: phase 1's goes on
            disc.load_state_dict(init["disc"])


@torch.no_grad()
def validate(model, perceptual, loader, device, args, path, bad):
    """Means over the validation set, usage and perplexity of the codes; saves inputs over reconstructions as `path`."""
    model.eval()
    sums, histogram, n = {}, torch.zeros(model.quantizer.K, device=device), 0
    for images, _, index in loader:
        bad(-1 - index[index < 0])
        if (index < 0).all():
            continue
        x = data.to_float(images[index >= 0], device)
        with runtime.autocast(device, args.dtype):
            x_hat, indices, _ = model(x)
            loss, layers = perceptual(x_hat, x)
        x_hat = x_hat.float().clamp(-1, 1)
        if path and runtime.is_main() and n == 0:
            rows = min(32, len(x)) // 8 or 1  # eight inputs, below them their reconstructions, and so on
            pairs = [part for i in range(rows) for part in (x[8 * i:8 * i + 8], x_hat[8 * i:8 * i + 8])]
            data.save_grid(path, torch.cat(pairs), min(8, len(x)))
        mse = ((x_hat - x) / 2).square().mean((1, 2, 3))  # of values in [0, 1]
        values = {"l1": (x_hat - x).abs().mean(), "psnr": (-10 * mse.clamp(min=1e-10).log10()).mean(),
                  "perceptual": loss, **layers}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.float() * len(x)
        histogram += torch.bincount(indices.flatten(), minlength=model.quantizer.K)
        n += len(x)
    names = ["l1", "psnr", "perceptual", *perceptual.weights]  # a process without a batch must send zeros too
    total = torch.stack([torch.as_tensor(sums.get(k, 0.0), device=device) for k in names]
                        + [torch.tensor(float(n), device=device)])
    total, histogram = runtime.sum_over_processes(total), runtime.sum_over_processes(histogram)
    usage, perplexity, H = vq.usage_and_perplexity(histogram)
    model.train()
    means = dict(zip(names, (total / total[-1]).tolist()))
    return means | {"usage": usage, "perplexity": perplexity, "code_entropy": H}


def main():
    args = parse()
    device = runtime.setup(args.device)
    runtime.micro_batch(args)
    runtime.check_out(args)
    init = settle_shape(args)
    source = data.open_source(args.data)
    val = data.open_source(args.val or args.data, "val")
    data.check_size(source, args.image_size, args.data)
    data.check_size(val, args.image_size, args.val or args.data)
    if not args.val and args.data != "shapes":
        args.val_n = args.val_n or 5000
    if not runtime.is_main():
        runtime.barrier()  # process 0 downloads, the others find the file
    vgg = losses.load_vgg(args.vgg)
    if runtime.is_main():
        runtime.barrier()
    halved = 5 if isinstance(vgg, losses.VGG16) else 3
    if args.image_size < 2 ** halved:
        raise BadInput(f"--image_size {args.image_size} is too small for the network of --vgg {args.vgg}, which halves "
                       f"it {halved} times: use {2 ** halved} at least")
    perceptual = losses.PerceptualLoss(vgg, args.alpha or 0.0, args.perceptual_layers).to(device)

    # ---- models: the same start on every process
    torch.manual_seed(args.seed)
    with runtime.refusing():
        model = vq.VQModel(args.channels, args.z_dim, args.codebook_size, args.codebook, args.decoder_attention,
                           args.decoder_extra_blocks, args.beta, args.gamma)
    disc = losses.Discriminator(args.image_size, args.disc_channels) if args.adv_weight else None
    if init:
        load_init(model, disc, init, args)
    model = model.to(device, memory_format=torch.channels_last)
    model.quantizer.sync, model.quantizer.gather = runtime.mean_over_processes, runtime.gather_rows
    model.quantizer.KMEANS_EVERY *= args.accum
    model.quantizer.KMEANS_UNTIL *= args.accum
    model.encoder.recompute = model.decoder.recompute = args.recompute
    trained = model
    if args.phase == 2:  # encoder and codebook are fixed: a prior trained on phase 1's codes fits phase 2
        model.encoder.requires_grad_(False)
        model.quantizer.requires_grad_(False)
        trained = model.decoder
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True) if args.ema else None

    run = runtime.Run(args, "tokenizer")
    if runtime.is_main() and not args.val and args.data != "shapes":
        print(f"no --val: the validation figures are of {args.val_n} training images", flush=True)

    # ---- optimizers. Paper: one line for both networks; the discriminator gets the generator's.
    opt_g = torch.optim.Adam(trained.parameters(), args.lr, args.betas, fused=True)
    opt_d = None
    if disc:
        disc = disc.to(device, memory_format=torch.channels_last)
        opt_d = torch.optim.Adam(disc.parameters(), args.lr, args.betas, fused=True)
    guard_g, guard_d, start = runtime.Guard(device), runtime.Guard(device), 0
    if state := run.resume(model=model, opt_g=opt_g, disc=disc, opt_d=opt_d, ema_state=ema):
        start = state["step"]
    init = state = None  # a gigabyte at the paper's size

    def save(step):
        run.save(step, config=model.config, model=model.state_dict(), opt_g=opt_g.state_dict(),
                 disc=disc.state_dict() if disc else None, opt_d=opt_d.state_dict() if disc else None,
                 ema=ema.module.state_dict() if ema else None, ema_state=ema.state_dict() if ema else None)

    if args.compile or (args.compile is None and device.type == "cuda"):
        # Parts, not the whole: the quantizer (fp32, a collective inside) stays as it is.
        for part in (model.encoder, model.decoder, perceptual.net, *([disc] if disc else [])):
            part.compile()

    loader = data.train_loader(data.TrainImages(source, args.image_size, args.crop, args.seed), args, start, device)
    val_loader = data.eval_loader(data.EvalImages(val, args.image_size), min(64, args.batch_size),
                                  min(args.workers, 2), device, args.val_n)
    bad, bad_val, batches, sums = data.Bad(source), data.Bad(val), iter(loader), {}

    def note(**terms):
        """Add to the means of the next progress line, without waiting for the device; NaN stays out of them."""
        for name, value in terms.items():
            value, (total, n) = value.detach().float(), sums.get(name, (0, 0))
            sums[name] = total + value.nan_to_num(0, 0, 0), n + value.isfinite()

    def evaluate(done):
        picture = run.out / "samples" / f"{done:07}.png"
        values = validate(ema.module if ema else model, perceptual, val_loader, device, args, picture, bad_val)
        values = run.log(done, "val", **values)
        run.progress(done, **{"val " + k: values[k] for k in ("l1", "psnr", "perceptual", "usage", "perplexity")})
        if values["usage"] < 0.5 and runtime.is_main():
            print(f"warning: only {100 * values['usage']:.1f} % of the codes are used on the validation set "
                  f"(H near ln K does not show it)", flush=True)

    model.train()
    run.progress(start)
    if start and (start % args.eval_every == 0 or start == args.iters) and (start, "val") not in run.logged:
        evaluate(start)  # the run ended between the save and its validation

    for step in range(start, args.iters):
        lr = runtime.cosine(step, args.iters, args.lr, args.lr_end)
        adv_weight = args.adv_weight * losses.ramp(step, args.disc_start, args.disc_ramp)
        pairs = []
        if step < args.vq_start:
            model.quantizer.start = "bypass"
        elif step == args.vq_start and step:
            model.quantizer.start = "kmeans"

        # ---- the tokenizer's step
        if disc:
            disc.requires_grad_(False)
        for _ in range(args.accum):
            x, _, index = next(batches)
            bad(index)
            x = data.to_float(x, device)  # (b, 3, S, S) in [-1, 1]
            with runtime.autocast(device, args.dtype):
                if args.phase == 1:
                    x_hat, _, q = model(x)
                else:
                    with torch.no_grad():
                        z_q, _, q = model.encode(x)
                    x_hat = model.decode(z_q)
                per, layers = perceptual(x_hat, x)  # Eq. 4
                fake_logits = disc(x_hat) if adv_weight else None
            l1 = F.l1_loss(x_hat.float(), x)
            loss = args.l1_weight * l1 + args.perceptual_weight * per  # Eq. 2, with the weights of the flags
            if args.phase == 1:
                loss = loss + args.vq_weight * q["vq"]
            if adv_weight:
                adv = losses.generator_loss(fake_logits)
                loss = loss + adv_weight * adv
                note(adversarial=adv)
            # The mean over micro-batches equals the large batch, but for the entropy term: its soft usage is a mean
            # over the positions of one micro-batch (of all processes).
            (loss / args.accum).backward()
            pairs.append((x, x_hat.detach()))
            note(loss=loss, l1=l1, perceptual=per, **layers, **q)
        runtime.set_lr(opt_g, lr)
        note(grad_norm=guard_g.step(opt_g))
        if ema:
            ema.update_parameters(model)

        # ---- the discriminator's step, on the same images and reconstructions
        if disc:
            disc.requires_grad_(True)
            penalise = args.r1 and step % args.r1_every == 0
            for x, x_hat in pairs:
                if penalise:
                    # R1 in fp32; `forward` goes round the compiled version, which has no second derivative
                    x = x.requires_grad_()
                    real_logits = disc.forward(x)
                else:
                    with runtime.autocast(device, args.dtype):
                        real_logits = disc(x)
                with runtime.autocast(device, args.dtype):
                    fake_logits = disc(x_hat)
                loss_d = losses.discriminator_loss(real_logits, fake_logits)
                note(disc=loss_d, real_logit=real_logits.mean(), fake_logit=fake_logits.mean())
                if penalise:
                    r1 = losses.r1_penalty(real_logits, x)
                    note(r1=r1)
                    loss_d = loss_d + args.r1 / 2 * args.r1_every * r1
                (loss_d / args.accum).backward()
            runtime.set_lr(opt_d, lr)
            guard_d.step(opt_d)

        # ---- what a reader of the run wants to know
        done = step + 1
        if done % args.log_every == 0 or done == args.iters:
            total, n = (runtime.sum_over_processes(torch.stack([torch.as_tensor(sums[name][i], dtype=torch.float32)
                                                                for name in sorted(sums)])) for i in (0, 1))
            means = dict(zip(sorted(sums), (total / n).tolist()))
            (skipped, broken), (skipped_d, broken_d) = guard_g.check(), guard_d.check()
            values = run.log(done, "train", lr=lr, adv_weight=adv_weight, skipped=skipped, skipped_d=skipped_d, **means)
            sums.clear()
            shown = ("loss", "l1", "perceptual", "commitment", "H", "real_logit", "fake_logit")
            run.progress(done, **{name: values[name] for name in shown if name in values},
                         **({"skipped": skipped} if skipped else {}))
            if broken or broken_d:
                save(done)
                raise run.broken()
        stop = run.stopping()
        if stop or done % args.save_every == 0 or done == args.iters:
            save(done)  # before the validation, which may be longer than what a scheduler grants
        if not stop and (done % args.eval_every == 0 or done == args.iters):
            evaluate(done)
        if stop:
            run.stopped(done)
            return


if __name__ == "__main__":
    runtime.run(main)
