"""Train the tokenizer, SeQ-GAN (Secs. 3.3 and 3.4). The defaults are Table 9's ImageNet column.

    python train_tokenizer.py --vgg runs/vgg/ckpt.pt --image_size 32 --channels 16 32 64 --z_dim 32 \\
           --codebook_size 256 --disc_channels 16 64 --batch_size 16 --lr 1.5e-3 --vq_start 100 --iters 1000 --workers 0
    torchrun --nproc_per_node=8 train_tokenizer.py --alpha 1 --data /data/imagenet/train --val /data/imagenet/val
    torchrun --nproc_per_node=8 train_tokenizer.py --phase 2 --init runs/tokenizer/ckpt.pt --out runs/phase2 \\
             --data /data/imagenet/train --val /data/imagenet/val

Phase 1 learns encoder, codebook and decoder with the semantic-enhanced perceptual loss (alpha = 1): semantic
compression. Phase 2 fixes encoder and codebook, adds attention to the decoder and finetunes it with alpha = 0: details
preservation. docs/settings.md has the command of every column of Table 9.
"""
import copy
import hashlib

import torch
import torch.nn.functional as F
import torchvision

import data
import losses
import runtime
import vq
from codebooks import CODEBOOKS, KMeans, kmeans
from runtime import BadInput

# What differs between the phases; each is a flag too. Paper: phase 2's learning rate is 5e-4 in Sec. 4.1 and 5e-5 in
# Table 9, FFHQ's iterations are 500k and 300k: we take the table's, whose other numbers check out.
PHASE = {1: dict(iters=500_000, batch_size=256, lr=1e-4, betas=[0.9, 0.99], alpha=1.0, decoder_attention=0,
                 init="", out="runs/tokenizer"),
         2: dict(iters=200_000, batch_size=128, lr=5e-5, betas=[0.5, 0.9], alpha=0.0, decoder_attention=1,
                 init="runs/tokenizer/ckpt.pt", out="runs/phase2")}
# The networks' shape: with --init it is the checkpoint's, and a flag that says otherwise is refused.
SHAPE = dict(channels=[128, 128, 256, 256, 512], z_dim=256, codebook="entropy", codebook_size=1024, image_size=256,
             decoder_extra_blocks=0, disc_channels=[128, 512])
SHOWN = "loss", "l1", "perceptual", "commitment", "H", "real_logit", "fake_logit"  # of the log, in a progress line


def parse():
    parser = runtime.Parser(__doc__)
    runtime.add_training_flags(parser, out=None, iters=None, batch_size=None, lr=None)
    add = parser.add_argument
    add("--phase", type=int, choices=[1, 2], default=1, help="1: semantic compression, 2: details preservation")
    add("--init", help="tokenizer checkpoint to start from: in phase 2 runs/tokenizer/ckpt.pt, in phase 1 none (LSUN)")
    add("--lr_end", type=runtime.rate, help="end of the cosine decay: half of --lr, in phase 2 all of it")
    add("--betas", type=runtime.decay, nargs=2, help="Adam's, of tokenizer and discriminator")
    add("--crop", choices=data.CROPS, default="random", help="random: ImageNet, resized: FFHQ, center: LSUN")
    add("--val_n", type=runtime.count, default=0, help="validate on N of the validation images (0: all)")
    add("--image_size", type=runtime.positive, help="side of the images, 256")
    add("--channels", type=runtime.positive, nargs="+", help="one width per level, each level halves; f = 2^(levels-1)")
    add("--z_dim", type=runtime.positive, help="dimensions of a code, n_z = 256")
    add("--codebook", choices=CODEBOOKS, help="entropy is the paper's, the others are Table 5's")
    add("--codebook_size", type=runtime.number(int, 2, 65536), help="K: 1024; 8192 for factorized")
    add("--decoder_attention", type=runtime.count, help="block + dilated attention pairs a level: 0, in phase 2: 1")
    add("--decoder_extra_blocks", type=runtime.count, help="residual blocks added a level (Table 1's Conv x2 has 2)")
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
    add("--disc_lr", type=runtime.rate, help="the discriminator's learning rate; default: the tokenizer's")
    add("--r1", type=runtime.weight, default=10.0, help="weight of the R1 penalty")
    add("--r1_every", type=runtime.positive, default=16, help="steps between two R1 penalties, each scaled by it")
    add("--ema", type=runtime.decay, default=0.0, help="decay of a weight average (0: none)")
    add("--recompute", action="store_true", help="compute activations twice instead of keeping them: less memory")
    args = parser.parse_args()
    if args.perceptual_layers and args.alpha is not None:
        raise BadInput("--alpha and --perceptual_layers are two ways to weigh the layers: give one of them")
    for name, value in PHASE[args.phase].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.vq_start and (args.init or args.codebook in ("kmeans", "factorized")):
        raise BadInput("--vq_start goes with --codebook entropy or none, and not with --init")
    if args.ema and args.codebook == "kmeans":
        raise BadInput("--ema does not go with --codebook kmeans: re-clustering permutes the codes that it averages")
    args.disc_lr = args.disc_lr or args.lr
    if args.lr_end is None:
        args.lr_end = args.lr / 2 if args.phase == 1 else args.lr
    if args.perceptual_layers:
        args.alpha = None
    return args


def resolve_shape(args):
    """Fill the flags of the networks' shape from --init's checkpoint, or from the paper. Returns the checkpoint."""
    init = runtime.load_file(args.init, "tokenizer") if args.init else None
    shape = SHAPE | ({"codebook_size": 8192} if args.codebook == "factorized" else {})
    for name in SHAPE:
        given, value = getattr(args, name), init["args"][name] if init else shape[name]
        if init and given not in (None, value) and (name != "disc_channels" or init["disc"]):
            raise BadInput(f"--{name} {given} is not the shape of --init {args.init}, which has {value}: leave the "
                           f"flag out")
        setattr(args, name, value if given is None else given)
    if args.disc_ramp is None:  # a discriminator that comes with the checkpoint is warm
        args.disc_ramp = 0 if init and init["disc"] else 20_000
    data.check_image_size(args.image_size, 2 ** (len(args.channels) - 1))
    return init


# ---------------------------------------------------------------------------------------- networks from files

def build(config):
    """The VQModel of a checkpoint's config."""
    return vq.VQModel(**config | {"quantizer": CODEBOOKS[config["quantizer"]]})


def load_tokenizer(path, device="cpu"):
    """The tokenizer of a checkpoint, in eval mode and frozen; its averaged weights if it has them. `.args` are the
    flags that it was trained with, `.image_size` is one of them."""
    state = runtime.load_file(path, "tokenizer")
    with runtime.explain(f"{path} does not fit this code: ", Exception):
        model = build(state["config"])
        model.load_state_dict(state["ema"] or state["model"])
        model.args, model.image_size = state["args"], state["args"]["image_size"]
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def fingerprint(model):
    """sha256 of all that decides an image's codes: encoder and codebook. Phase 2 leaves it as it was."""
    digest = hashlib.sha256()
    for part in (model.encoder, model.quantizer):
        for name, p in sorted(part.named_parameters()):
            digest.update(name.encode() + p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_vgg(spec):
    """The frozen network that --vgg names: "imagenet" (downloaded by torchvision, hash checked), a local copy of that
    file, or a checkpoint of train_vgg.py. Weights are loaded strictly; there is no fall-back."""
    weights = torchvision.models.VGG16_Weights.IMAGENET1K_V1
    name = weights.url.split("/")[-1]  # vgg16-397923af.pth: the digits are the first of its sha256
    if spec == "imagenet":
        with runtime.explain(f"the VGG16 weights could not be downloaded, fetch {weights.url} on another machine and "
                             f"name the copy with --vgg FILE: ", (OSError, RuntimeError)):
            state = runtime.main_first(lambda: weights.get_state_dict(progress=True, check_hash=True))
    else:
        state = runtime.load_file(spec)
    with runtime.explain(f"--vgg {spec} is neither a copy of {name} nor a checkpoint of train_vgg.py: ", Exception):
        if "kind" in state:
            state = runtime.load_file(spec, "vgg")
            net = losses.SmallVGG(**state["config"])
            net.load_state_dict(state["model"])
        else:
            net = losses.VGG16()
            net.load_state_dict(state)
            if spec != "imagenet" and runtime.sha256(spec) not in name:
                print(f"note: {spec} has VGG16's layout, but is not torchvision's {name}", flush=True)
    return net.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------- the steps

def tokenizer_step(model, disc, perceptual, xs, args, adv_weight, quantize, averages):
    """Forward and backward pass of the tokenizer on micro-batches xs, each (b, 3, S, S) in [-1, 1]. Returns their
    reconstructions, detached; the terms go to `averages`."""
    x_hats = []
    if disc:
        disc.requires_grad_(False)
    for x in xs:
        with runtime.autocast(x.device, args.dtype):
            if args.phase == 2:
                z_q, _, q = encode_fixed(model, x)
                x_hat = model.decode(z_q)
            elif quantize:
                x_hat, _, q = model(x)
            else:  # --vq_start: a plain autoencoder
                x_hat, q = model.decode(model.encoder(x)), {"vq": x.new_zeros(())}
            per, layers = perceptual(x_hat, x)  # Eq. 4
            fake_logits = disc(x_hat) if adv_weight else None
        l1 = F.l1_loss(x_hat.float(), x)
        loss = args.l1_weight * l1 + args.perceptual_weight * per  # Eq. 2, with the weights of the flags
        if args.phase == 1:
            loss = loss + args.vq_weight * q["vq"]
        if adv_weight:
            adv = losses.generator_loss(fake_logits)
            loss = loss + adv_weight * adv
            averages.add(adversarial=adv)
        # The mean over micro-batches equals the large batch, but for the entropy term: its soft usage is a mean over
        # the positions of one micro-batch (of all processes).
        (loss / len(xs)).backward()
        x_hats.append(x_hat.detach())
        averages.add(loss=loss, l1=l1, perceptual=per, **layers, **q)
    return x_hats


def discriminator_step(disc, xs, x_hats, args, penalise, averages):
    """Forward and backward pass of the discriminator on the same images and their reconstructions."""
    disc.requires_grad_(True)
    for x, x_hat in zip(xs, x_hats):
        with runtime.autocast(x.device, args.dtype):
            real_logits, fake_logits = disc(x), disc(x_hat)
        loss = losses.discriminator_loss(real_logits, fake_logits)
        averages.add(disc=loss, real_logit=real_logits.mean(), fake_logit=fake_logits.mean())
        (loss / len(xs)).backward()
        if penalise:
            # In fp32, on a GPU TF32: a penalty does not need more digits. `forward` goes round the compiled version,
            # which has no second derivative.
            with runtime.tf32():
                x = x.requires_grad_()
                r1 = losses.r1_penalty(disc.forward(x), x)
                (args.r1 / 2 * args.r1_every * r1 / len(xs)).backward()
            averages.add(r1=r1)


@torch.no_grad()
def encode_fixed(model, x):
    """Phase 2's codes, from the fixed encoder in fp32 (on a GPU TF32): priors learn fp32 codes, and of a bf16 encoder's
    one in a hundred is another."""
    with torch.autocast(x.device.type, enabled=False), runtime.tf32():
        return model.encode(x)


@torch.no_grad()
def update_average(ema, model, decay):
    """--ema: weights decay * average + (1 - decay) * new. The first step's are taken as they are, with decay 0."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for average, new in zip(ema.buffers(), model.buffers()):
        average.copy_(new)


@torch.no_grad()
def start_codes(model, x, args):
    """--vq_start: the codes begin as K-means of the encoder's outputs on x (of all processes)."""
    with runtime.autocast(x.device, args.dtype):
        z = model.encoder(x).float().permute(0, 2, 3, 1).flatten(0, 2)
    z = runtime.gather_rows(z)
    model.quantizer.codebook.copy_(kmeans(z[z.isfinite().all(1)], model.quantizer.K, seed=0))


@torch.no_grad()
def validate(model, perceptual, loader, full, device, args, picture, bad):
    """Means over the validation set (batches of `full` images and a last one), usage and perplexity of the codes;
    inputs over reconstructions go to `picture`."""
    model.eval()
    names = ["l1", "psnr", "perceptual", *perceptual.weights]
    total, histogram = torch.zeros(len(names) + 1, device=device), torch.zeros(model.quantizer.K, device=device)
    for images, _, index in loader:
        bad(index)
        x = data.to_float(images[index < 0], device)
        if not len(x):
            continue
        # A last batch of another size runs uncompiled: it is not worth a graph of its own.
        stance = "default" if len(images) == len(x) == full else "force_eager"
        with runtime.autocast(device, args.dtype), torch.compiler.set_stance(stance):
            z_q, indices, _ = encode_fixed(model, x) if args.phase == 2 else model.encode(x)
            x_hat = model.decode(z_q)
            loss, layers = perceptual(x_hat, x)
        x_hat = x_hat.float().clamp(-1, 1)
        if runtime.is_main() and not total[-1]:
            n = min(32, len(x)) // 8 * 8 or len(x)  # eight inputs, below them their reconstructions, and so on
            pairs = [part for pair in zip(x[:n].split(8), x_hat[:n].split(8)) for part in pair]
            data.save_grid(picture, torch.cat(pairs), min(8, n))
        psnr = -10 * ((x_hat - x) / 2).square().mean((1, 2, 3)).clamp(min=1e-10).log10()  # of values in [0, 1]
        values = [(x_hat - x).abs().mean(), psnr.mean(), loss, *layers.values(), loss.new_ones(())]
        total += torch.stack(values).float() * len(x)
        histogram += torch.bincount(indices.flatten(), minlength=model.quantizer.K)
    model.train()
    means = dict(zip(names, (runtime.sum_over_processes(total) / total[-1]).tolist()))
    usage, perplexity, H = vq.usage_and_perplexity(runtime.sum_over_processes(histogram))
    return means | {"usage": usage, "perplexity": perplexity, "code_entropy": H}


def main():
    args = parse()
    device = runtime.setup(args)
    b = runtime.micro_batch(args)
    run = runtime.Run(args, "tokenizer")
    init = resolve_shape(args)
    source, val = data.open_data(args, init and init["args"])
    vgg = load_vgg(args.vgg)
    if args.image_size < 2 ** vgg.halvings:
        raise BadInput(f"--image_size {args.image_size} is too small for the network of --vgg {args.vgg}, which halves "
                       f"it {vgg.halvings} times: use {2 ** vgg.halvings} at least")
    perceptual = losses.PerceptualLoss(vgg, args.alpha or 0.0, args.perceptual_layers).to(device)

    # ---- models: the same start on every process
    torch.manual_seed(args.seed)
    config = dict(channels=args.channels, z_dim=args.z_dim, codebook_size=args.codebook_size, quantizer=args.codebook,
                  attention=args.decoder_attention, extra_blocks=args.decoder_extra_blocks, beta=args.beta,
                  gamma=args.gamma)
    with runtime.explain():
        model = build(config).to(device, memory_format=torch.channels_last)
    disc = losses.Discriminator(args.image_size, args.disc_channels) if args.adv_weight else None
    if disc:
        disc.to(device, memory_format=torch.channels_last)
    if init:  # strictly; only attention that the checkpoint's decoder lacks keeps its zero start
        fresh = {f"{name}.{key}": value for name, part in model.named_modules()
                 if isinstance(part, vq.BlockAttention) for key, value in part.state_dict().items()}
        with runtime.explain(f"--init {args.init} does not fit: ", Exception):
            model.load_state_dict(fresh | (init["ema"] or init["model"]))
            if disc and init["disc"]:  # a cold discriminator ruins images: phase 1's goes on
                disc.load_state_dict(init["disc"])
    model.quantizer.mean = runtime.mean_over_processes
    if isinstance(model.quantizer, KMeans):
        model.quantizer.gather = runtime.gather_rows
        model.quantizer.EVERY *= args.accum
        model.quantizer.UNTIL *= args.accum
    model.encoder.recompute = model.decoder.recompute = args.recompute
    if args.phase == 2:  # encoder and codebook are fixed: a prior trained on phase 1's codes fits phase 2
        model.encoder.requires_grad_(False)
        model.quantizer.requires_grad_(False)
    ema = copy.deepcopy(model) if args.ema else None

    # ---- optimizers. Paper: one line for both networks; the discriminator gets the generator's.
    trained = model.decoder if args.phase == 2 else model
    opt_g = torch.optim.Adam(trained.parameters(), args.lr, args.betas, fused=True)
    opt_d = torch.optim.Adam(disc.parameters(), args.lr, args.betas, fused=True) if disc else None
    parts = dict(model=model, opt_g=opt_g, disc=disc, opt_d=opt_d, ema=ema)  # a checkpoint holds their state
    state = run.resume(**parts)
    start = state["step"] if state else 0
    del init, state  # a gigabyte at the paper's size
    if args.compile:  # parts, not the whole: the quantizer (fp32, a collective inside) stays as it is
        for part in (model.encoder, model.decoder, perceptual.net, *([disc] if disc else [])):
            part.compile(dynamic=False)  # else a validation's batch size makes all later steps run with dynamic shapes

    dataset = data.TrainImages(source, args.image_size, args.crop, args.seed)
    batches = iter(data.train_loader(dataset, args, start, device))
    full = min(64, b)  # more images at once than 64 are too many for the attention decoder's kernels
    val_loader = data.eval_loader(data.EvalImages(val, args.image_size), full, min(args.workers, 2), device,
                                  args.val_n)
    bad, bad_val, averages = data.Bad(source), data.Bad(val), runtime.Averages()
    guard_g, guard_d = runtime.Guard(device), runtime.Guard(device)

    def save(step):
        run.save(step, config=config, **{name: part and part.state_dict() for name, part in parts.items()})

    def evaluate(step):
        picture = run.out / "samples" / f"{step:07}.png"
        values = validate(ema or model, perceptual, val_loader, full, device, args, picture, bad_val)
        values = run.log(step, "val", **values)
        run.progress(step, **{"val " + k: values[k] for k in ("l1", "psnr", "perceptual", "usage", "perplexity")})
        if values["usage"] < 0.5 and runtime.is_main():
            print(f"warning: only {100 * values['usage']:.1f} % of the codes are used on the validation set "
                  f"(H near ln K does not show it)", flush=True)

    model.train()
    run.progress(start)
    if run.missed(start):
        evaluate(start)

    for step in range(start, args.iters):
        lr = runtime.cosine(step, args.iters, args.lr, args.lr_end)
        adv_weight = args.adv_weight * losses.ramp(step, args.disc_start, args.disc_ramp)
        xs = []
        for _ in range(args.accum):
            images, _, index = next(batches)
            bad(index)
            xs.append(data.to_float(images, device))  # (b, 3, S, S) in [-1, 1]
        if args.phase == 2 and step == start and device.type == "cuda":  # on all processes: encode has a collective
            changed = (encode_fixed(model, xs[0])[1] != model.encode(xs[0])[1]).float().mean()
            if runtime.is_main():
                print(f"{100 * changed:.2f} % of the codes differ between TF32 and fp32", flush=True)
        if step and step == args.vq_start:
            start_codes(model, xs[0], args)

        x_hats = tokenizer_step(model, disc, perceptual, xs, args, adv_weight, step >= args.vq_start, averages)
        averages.add(grad_norm=guard_g.step(opt_g, lr))
        if ema:
            update_average(ema, model, args.ema if step > args.vq_start else 0)  # starts anew with K-means' codes
        if disc:
            discriminator_step(disc, xs, x_hats, args, args.r1 and step % args.r1_every == 0, averages)
            averages.add(grad_norm_d=guard_d.step(opt_d, lr * args.disc_lr / args.lr))

        done, broken = step + 1, False
        if run.due(done, args.log_every):
            (skipped, broken), (skipped_d, broken_d) = guard_g.check(), guard_d.check()
            broken = broken or broken_d
            values = run.log(done, "train", lr=lr, adv_weight=adv_weight, skipped=skipped, skipped_d=skipped_d,
                             **averages.means())
            run.progress(done, **{name: values[name] for name in SHOWN if name in values})
        if run.after_step(done, broken, save, evaluate):
            return


if __name__ == "__main__":
    runtime.run(main)
