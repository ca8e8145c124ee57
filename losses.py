"""Training losses of the tokenizer: the semantic-enhanced perceptual loss (Sec. 3.3.1, Eq. 4) and
a StyleGAN2 discriminator (Sec. 6.1: "the style-based discriminator [34]").

    perceptual = PerceptualLoss(load_vgg("imagenet"), alpha=1)
    loss, layers = perceptual(x_hat, x)               # Eq. 4, and each layer's term
    disc = Discriminator(256)
    loss_d = discriminator_loss(disc(x), disc(x_hat.detach()))

Images are float (B, 3, S, S) in [-1, 1].
"""
import hashlib
import math
import os
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

LOW_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")  # L_per^low: details
SEM_LAYERS = ("relu5_3", "logit")  # L_per^sem: semantics
LAYERS = (*LOW_LAYERS, "logit")
# torch.func.jvp (R1) triggers a deprecation warning inside torch.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


# ------------------------------------------------------------------------- perceptual networks
# A replacement for these two needs net(x, layers) -> {layer: features}, which stops at the last
# requested layer, and a buffer `layer_scale`, by which the loss of each of LAYERS is divided.

class VGG16(nn.Module):
    """torchvision's VGG16: its features after ReLU, and its logits (before the softmax)."""

    # features[:LAYER_END[layer]] ends with the ReLU of that name
    LAYER_END = dict(zip(LOW_LAYERS, (4, 9, 16, 23, 30)))

    def __init__(self):
        super().__init__()
        net = torchvision.models.vgg16(weights=None)
        self.features, self.avgpool, self.classifier = net.features, net.avgpool, net.classifier
        # torchvision's statistics are for [0, 1]; images here are in [-1, 1].
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", (2 * mean - 1).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", (2 * std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("layer_scale", torch.ones(len(LAYERS)), persistent=False)  # no scaling

    def forward(self, x, layers):
        out, start, h = {}, 0, (x - self.mean) / self.std
        for layer, end in self.LAYER_END.items():
            h, start = self.features[start:end](h), end  # (B, C_l, H_l, W_l)
            if layer in layers:
                out[layer] = h
            if len(out) == len(layers):
                return out
        # The image is not resized: 8 x 8 features (at 256 x 256) are pooled to 7 x 7.
        h = self.avgpool(self.features[start:](h))
        return out | {"logit": self.classifier(h.flatten(1))}  # (B, 1000)


class SmallVGG(nn.Module):
    """A VGG-shaped classifier for small images (miniature/train_vgg.py): five stages of two
    conv-BN-ReLU, named as VGG16's. Only the first three are followed by pooling, so that the last
    stage keeps some spatial resolution.

    num_classes_per_head: one number for each classification head. `logit` is the concatenation of
    all heads."""

    def __init__(self, widths, num_classes_per_head):
        super().__init__()
        self.config = dict(widths=list(widths), num_classes_per_head=list(num_classes_per_head))
        self.stages, c = nn.ModuleList(), 3
        for width in widths:
            convs = [nn.Conv2d(c_in, width, 3, padding=1, bias=False) for c_in in (c, width)]
            self.stages.append(nn.Sequential(convs[0], nn.BatchNorm2d(width), nn.ReLU(),
                                             convs[1], nn.BatchNorm2d(width), nn.ReLU()))
            c = width
        self.classifier = nn.Linear(c, sum(num_classes_per_head))
        self.register_buffer("layer_scale", torch.ones(len(LAYERS)))  # set by train_vgg.py

    def forward(self, x, layers):
        out, h = {}, x
        for i, (layer, stage) in enumerate(zip(LOW_LAYERS, self.stages)):
            h = stage(F.max_pool2d(h, 2) if 1 <= i <= 3 else h)
            if layer in layers:
                out[layer] = h
            if len(out) == len(layers):
                return out
        # Centered over the classes: softmax is invariant to an offset, the loss is not.
        parts = self.classifier(h.mean((2, 3))).split(self.config["num_classes_per_head"], 1)
        logits = torch.cat([part - part.mean(1, keepdim=True) for part in parts], 1)
        return out | {"logit": logits}  # (B, sum(num_classes_per_head))


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_published(path, url):
    """Whether `path` is the file of `url`, whose name ends with the first digits of its sha256."""
    return sha256(path).startswith(url.split("-")[-1].removesuffix(".pth"))


def download(url, path, flag):
    """Download `url` to `path` if that file does not exist, then check its sha256. flag: the flag
    that takes a local copy."""
    new = not os.path.exists(path)
    try:
        if new:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
    except Exception as error:
        raise SystemExit(f"cannot download {url} ({type(error).__name__}: {error}). Download it "
                         f"elsewhere and pass the copy as {flag} FILE") from error
    if not is_published(path, url):
        if new:
            os.remove(path)
        raise SystemExit(f"{path} is not the file of {url}: its sha256 differs. Delete it")


def load_vgg(spec):
    """The frozen network that --vgg names: "imagenet" (downloaded, its hash checked), a copy of
    torchvision's file, or a checkpoint of train_vgg.py. There is no fallback."""
    url, path = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url, spec
    if spec == "imagenet":
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        download(url, path, "--vgg")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "features.0.weight" in state:
            net = VGG16()
        else:
            net, state = SmallVGG(**state["config"]), state["model"]
        net.load_state_dict(state)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise SystemExit(f"--vgg {spec} is neither a copy of {url} nor a checkpoint of miniature/"
                         f"train_vgg.py ({reason}). docs/running.md converts old ones") from error
    if isinstance(net, VGG16) and spec != "imagenet" and not is_published(path, url):
        print(f"note: {spec} has VGG16's layout, but is not torchvision's file")
    return net.requires_grad_(False).eval()


class PerceptualLoss(nn.Module):
    """Eq. 4: L_per^alpha = alpha L_per^sem + (1 - alpha) L_per^low, each a sum over layers of the
    mean squared difference of features. alpha in [0, 1]; `layers` (Table 6) overrides it: those
    layers, each with weight 1.

    The paper cites LPIPS ("perceptual loss [65]"), but its formula in 3.3.1 has plain VGG features,
    and LPIPS has no weights for logits. We follow the formula. The layers of the ImageNet VGG16
    are not scaled. Those of a train_vgg.py network are divided by their variance over real images:
    a reconstruction that ignores its input then scores about 1."""

    def __init__(self, net, alpha=1.0, layers=None):
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        weights = {layer: alpha * (layer in SEM_LAYERS) + (1 - alpha) * (layer in LOW_LAYERS)
                   for layer in LAYERS}  # Eq. 4
        if layers:
            weights = {layer: float(layer in layers) for layer in LAYERS}
        self.weights = {layer: w for layer, w in weights.items() if w}  # no work for weight 0

    def train(self, mode=True):
        return super().train(False)  # VGG's dropout must stay off, whoever calls train()

    def forward(self, x_hat, x, layers=None):
        """Reconstructions and inputs -> the loss, and a dict of terms (unweighted, detached) of
        `layers`, default: those that the loss needs."""
        layers = layers or self.weights
        with torch.no_grad():
            target = self.net(x, layers)
        features = self.net(x_hat, layers)
        scale = dict(zip(LAYERS, self.net.layer_scale))
        terms = {layer: F.mse_loss(features[layer].float(), target[layer].float()) / scale[layer]
                 for layer in layers}
        loss = sum(weight * terms[layer] for layer, weight in self.weights.items())
        return loss, {layer: term.detach() for layer, term in terms.items()}


# ------------------------------------------------------------------------------ discriminator

class EqualizedConv2d(nn.Module):
    """Convolution with equalized learning rate: weights N(0, 1), scaled by 1/sqrt(fan-in)."""

    def __init__(self, c_in, c_out, side, stride=1, padding=0, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, side, side))
        self.bias = nn.Parameter(torch.zeros(c_out, 1, 1)) if bias else None
        self.scale, self.stride, self.padding = 1 / math.sqrt(c_in * side * side), stride, padding

    def forward(self, x):
        h = F.conv2d(x, self.weight * self.scale, None, self.stride, self.padding)
        return h if self.bias is None else h + self.bias.to(h.dtype)


class EqualizedLinear(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in))
        self.bias = nn.Parameter(torch.zeros(c_out))
        self.scale = 1 / math.sqrt(c_in)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


def lrelu(x):
    return F.leaky_relu(x, 0.2) * math.sqrt(2)  # the gain keeps the variance


class Blur(nn.Module):
    """[1, 3, 3, 1] in both directions, normalized."""

    def __init__(self, channels, padding, stride=1):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = (row[:, None] * row).expand(channels, 1, 4, 4).contiguous()
        self.register_buffer("kernel", kernel, persistent=False)
        self.padding, self.stride = padding, stride

    def forward(self, x):
        return F.conv2d(x, self.kernel, None, self.stride, self.padding, groups=x.shape[1])


class DiscriminatorBlock(nn.Module):
    """Halves the image: conv 3x3; blur, conv 3x3 of stride 2; plus a skip: blur, 1x1."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = EqualizedConv2d(c_in, c_in, 3, padding=1)
        self.blur, self.conv2 = Blur(c_in, padding=2), EqualizedConv2d(c_in, c_out, 3, stride=2)
        # The skip's stride is taken in the blur: the 1x1 would throw the other positions away.
        self.skip = nn.Sequential(Blur(c_in, padding=1, stride=2),
                                  EqualizedConv2d(c_in, c_out, 1, bias=False))

    def forward(self, x):
        h = lrelu(self.conv2(self.blur(lrelu(self.conv1(x)))))
        return (h + self.skip(x)) / math.sqrt(2)


def minibatch_stddev(x, group=4):
    """Append one channel: the standard deviation over groups of four consecutive images, averaged
    over all else. (B, C, H, W) -> (B, C + 1, H, W), any B: the last group may be smaller.

    With a multiple of 4 images per process, N processes compute exactly what one computes."""
    std = []
    for y in x.float().split(group):
        value = (y.var(0, unbiased=False) + 1e-8).sqrt().mean().to(x.dtype)
        std.append(value.expand(len(y), 1, *x.shape[2:]))
    return torch.cat([x, torch.cat(std)], 1)


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator: images (B, 3, S, S) in [-1, 1] -> logits (B,), high for
    real.

    channels: (base, maximum). They start at base and double with each downsampling. At 256 x 256
    the defaults are StyleGAN2's with channel multiplier 2: 128, 256, 512, 512, ..., 28.9M."""

    def __init__(self, image_size=256, channels=(128, 512)):
        super().__init__()
        c, most = channels
        self.stem = EqualizedConv2d(3, c, 1)
        self.blocks, size = nn.ModuleList(), image_size
        while size >= 8:
            self.blocks.append(DiscriminatorBlock(c, min(2 * c, most)))
            c, size = min(2 * c, most), size // 2
        self.conv = EqualizedConv2d(c + 1, c, 3, padding=1)
        self.linear, self.logit = EqualizedLinear(c * size * size, c), EqualizedLinear(c, 1)

    def forward(self, x):
        h = lrelu(self.stem(x))
        for block in self.blocks:
            h = block(h)  # (B, C, S / 2^i, S / 2^i)
        h = lrelu(self.conv(minibatch_stddev(h)))
        h = lrelu(self.linear(h.flatten(1)))
        return self.logit(h).squeeze(1).float()


def generator_loss(fake_logits):
    """Non-saturating: -log sigmoid(D(x_hat))."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits):
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(disc, x):
    """Mean over the batch of |dD(x)/dx|^2, x (B, 3, S, S), with its gradient in D's weights.

    With g = dD/dx held constant, |g|^2 has the gradient of 2 g . dD/dx: twice the directional
    derivative of D along g, which forward mode computes. PyTorch's double backward would run
    convolutions with kernels as large as a feature map."""
    x = x.detach().requires_grad_()
    grad, = torch.autograd.grad(disc(x).sum(), x)  # g, (B, 3, S, S)
    _, slope = torch.func.jvp(disc, (x.detach(),), (grad,))  # (B,), in sum |g|^2
    return (2 * slope - slope.detach()).mean()
