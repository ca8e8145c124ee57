"""What the tokenizer is trained against: the semantic-enhanced perceptual loss (Sec. 3.3.1, Eq. 4) and a StyleGAN2
discriminator (Sec. 6.1: "the style-based discriminator [34]"). Images are float (B, 3, H, W) in [-1, 1].

    perceptual = PerceptualLoss(VGG16(), alpha=1)     # load torchvision's weights into VGG16 first
    loss, shares = perceptual(x_hat, x)               # Eq. 4, and each layer's share
    disc = Discriminator(256)
    loss_d = discriminator_loss(disc(x), disc(x_hat.detach()))
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

LOW = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")  # L_per^low: details
SEM = ("relu5_3", "logit")  # L_per^sem: semantics
LAYERS = (*LOW, "logit")


# --------------------------------------------------------------------------------------- perceptual networks
# One interface: net(x, layers) -> {layer: features}, computed no further than the last layer asked for; `halvings`,
# how often it halves the image; `mean_square`, what the loss divides each of LAYERS by. Another network that gives its
# layers the names in LAYERS can stand in for these two.

class VGG16(nn.Module):
    """torchvision's VGG16, giving its post-ReLU features and its logits (before the softmax)."""

    halvings = 5
    ENDS = dict(zip(LOW, (4, 9, 16, 23, 30)))  # features[:ENDS[l]] ends with the ReLU l

    def __init__(self):
        super().__init__()
        net = torchvision.models.vgg16(weights=None)
        self.features, self.avgpool, self.classifier = net.features, net.avgpool, net.classifier
        # torchvision's statistics are for [0, 1]; images here are in [-1, 1].
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", (2 * mean - 1).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", (2 * std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("mean_square", torch.ones(len(LAYERS)), persistent=False)  # used raw

    def forward(self, x, layers):
        out, start, h = {}, 0, (x - self.mean) / self.std
        for layer, end in self.ENDS.items():
            h, start = self.features[start:end](h), end  # (B, C_l, H_l, W_l)
            if layer in layers:
                out[layer] = h
            if len(out) == len(layers):
                return out
        # The whole image, not resized: 8 x 8 features of a 256 x 256 image are pooled to the classifier's 7 x 7.
        return out | {"logit": self.classifier(self.avgpool(self.features[start:](h)).flatten(1))}  # (B, 1000)


class SmallVGG(nn.Module):
    """A VGG-shaped classifier for small pictures (miniature/train_vgg.py): five stages of two conv-BN-ReLU, pooling
    after the first three only, so that the last stage keeps some space; its stages have the names of VGG16's."""

    halvings = 3

    def __init__(self, widths, classes):
        super().__init__()
        self.config = dict(widths=list(widths), classes=classes)
        self.stages, c = nn.ModuleList(), 3
        for width in widths:
            convs = [layer for c_in in (c, width) for layer in
                     (nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())]
            self.stages.append(nn.Sequential(*convs))
            c = width
        self.classifier = nn.Linear(c, classes)
        # Mean square of each layer on real images, set by train_vgg.py: the loss divides by it (see PerceptualLoss).
        self.register_buffer("mean_square", torch.ones(len(LAYERS)))

    def forward(self, x, layers):
        """`layers` may have `penultimate` (B, widths[-1]), too."""
        out, h = {}, x
        for i, (layer, stage) in enumerate(zip(LOW, self.stages)):
            h = stage(F.max_pool2d(h, 2) if 1 <= i <= 3 else h)
            if layer in layers:
                out[layer] = h
            if len(out) == len(layers):
                return out
        out["penultimate"] = h.mean((2, 3))
        out["logit"] = self.classifier(out["penultimate"])
        return {layer: out[layer] for layer in layers}


class PerceptualLoss(nn.Module):
    """Eq. 4: L_per^alpha = alpha L_per^sem + (1 - alpha) L_per^low, each a sum over layers of the mean squared
    difference of features. alpha in [0, 1]; `layers` (Table 6) overrides it: those layers, each with weight 1.

    Paper: "perceptual loss [65]" is LPIPS, but the formula in 3.3.1 is plain VGG features, and LPIPS has no weights
    for logits: we follow the formula. The ImageNet VGG16 is used raw. The layers of a train_vgg.py network are divided
    by their mean square on real images: its raw logits would outweigh all else thirty times."""

    def __init__(self, net, alpha=1.0, layers=None):
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        weights = {l: alpha * (l in SEM) + (1 - alpha) * (l in LOW) for l in LAYERS}  # Eq. 4
        if layers:
            weights = {l: float(l in layers) for l in LAYERS}
        self.weights = {l: w for l, w in weights.items() if w}  # no work for layers that weigh nothing

    def train(self, mode=True):
        return super().train(False)  # VGG's dropout must stay off, whoever calls train()

    def forward(self, x_hat, x):
        """Reconstructions and inputs -> the loss, and its share of each layer (unweighted, detached)."""
        with torch.no_grad():
            target = self.net(x, self.weights)
        features = self.net(x_hat, self.weights)
        scale = dict(zip(LAYERS, self.net.mean_square))
        terms = {l: F.mse_loss(features[l].float(), target[l].float()) / scale[l] for l in self.weights}
        return sum(self.weights[l] * term for l, term in terms.items()), {l: t.detach() for l, t in terms.items()}


# ------------------------------------------------------------------------------------------ discriminator

class Convolve(torch.autograd.Function):
    """F.conv2d, or with `shape` its transpose: gradient of its output -> gradient of its input, which has that shape.
    The derivatives of both are this function and one weight gradient, and nothing else.

    PyTorch's second derivative of a convolution, which R1 needs, also forms the gradient through the weight gradient:
    convolutions whose kernel is a whole feature map. Here no weight gradient is formed while a graph of the gradient
    is made (create_graph), which R1's inner derivative, that of the image alone, does not need."""

    @staticmethod
    def forward(ctx, x, w, shape, stride, padding, groups):
        ctx.save_for_backward(x, w)
        ctx.shape, ctx.options = shape, (stride, padding, groups)
        if shape is None:
            return F.conv2d(x, w, None, stride, padding, 1, groups)
        cut = [shape[i] - ((x.shape[i] - 1) * stride - 2 * padding + w.shape[i]) for i in (2, 3)]
        y = F.conv_transpose2d(x, w, None, stride, padding, cut, groups)
        # torch.nn.grad.conv2d_input would give back channels first, and each layer would pay for two changes of layout
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return y.contiguous(memory_format=torch.channels_last) if channels_last else y

    @staticmethod
    def backward(ctx, grad):
        (x, w), (stride, padding, groups), grad_x, grad_w = ctx.saved_tensors, ctx.options, None, None
        if ctx.needs_input_grad[0]:
            grad_x = Convolve.apply(grad, w, x.shape if ctx.shape is None else None, stride, padding, groups)
        if ctx.needs_input_grad[1] and not torch.is_grad_enabled():
            image, out = (x, grad) if ctx.shape is None else (grad, x)
            grad_w = torch.nn.grad.conv2d_weight(image, w.shape, out, stride, padding, 1, groups)
        return grad_x, grad_w, None, None, None, None


def conv2d(x, w, stride=1, padding=0, groups=1):
    """F.conv2d by `Convolve`; under autocast in its type, as F.conv2d. In a compiled graph F.conv2d itself: R1, which
    needs more, runs eagerly."""
    if torch.compiler.is_compiling():
        return F.conv2d(x, w, None, stride, padding, 1, groups)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return Convolve.apply(x.to(dtype), w.to(dtype), None, stride, padding, groups)


class EqualConv(nn.Module):
    """Convolution with equalised learning rate: weights N(0, 1), scaled by 1/sqrt(fan-in) when used."""

    conv2d = staticmethod(conv2d)

    def __init__(self, c_in, c_out, side, stride=1, padding=0, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, side, side))
        self.bias = nn.Parameter(torch.zeros(c_out, 1, 1)) if bias else None
        self.scale, self.stride, self.padding = 1 / math.sqrt(c_in * side * side), stride, padding

    def forward(self, x):
        h = self.conv2d(x, self.weight * self.scale, self.stride, self.padding)
        return h if self.bias is None else h + self.bias.to(h.dtype)


class EqualLinear(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(c_out, c_in)), nn.Parameter(torch.zeros(c_out))
        self.scale = 1 / math.sqrt(c_in)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


def lrelu(x):
    return F.leaky_relu(x, 0.2) * math.sqrt(2)  # the gain keeps the variance


class Blur(nn.Module):
    """[1, 3, 3, 1] in both directions, normalised."""

    conv2d = staticmethod(conv2d)

    def __init__(self, channels, padding, stride=1):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", (row[:, None] * row).expand(channels, 1, 4, 4).contiguous(), persistent=False)
        self.padding, self.stride = padding, stride

    def forward(self, x):
        return self.conv2d(x, self.kernel, self.stride, self.padding, groups=x.shape[1])


class DiscriminatorBlock(nn.Module):
    """Halves the image: conv 3x3; blur, conv 3x3 with stride 2; a skip with blur and 1x1; their sum / sqrt 2."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv1 = EqualConv(c_in, c_in, 3, padding=1)
        self.blur, self.conv2 = Blur(c_in, padding=2), EqualConv(c_in, c_out, 3, stride=2)
        # The skip's stride is taken in the blur already: the 1x1 would throw the other positions away.
        self.skip = nn.Sequential(Blur(c_in, padding=1, stride=2), EqualConv(c_in, c_out, 1, bias=False))

    def forward(self, x):
        h = lrelu(self.conv2(self.blur(lrelu(self.conv1(x)))))
        return (h + self.skip(x)) / math.sqrt(2)


def minibatch_stddev(x, group=4):
    """Append one channel: the standard deviation over groups of `group` consecutive images, averaged over all else.

    Any batch size: the last group may be smaller. Consecutive images, so that processes whose share is a multiple of
    4 compute what a single process would. (B, C, H, W) -> (B, C + 1, H, W)"""
    std = [(y.var(0, unbiased=False) + 1e-8).sqrt().mean().to(x.dtype).expand(len(y), 1, *x.shape[2:])
           for y in x.float().split(group)]
    return torch.cat([x, torch.cat(std)], 1)


class Discriminator(nn.Module):
    """StyleGAN2's residual discriminator: images (B, 3, S, S) in [-1, 1] -> logits (B,), high for real.

    channels: at full resolution, and at most; they double as the resolution halves. The defaults at 256 x 256 are
    StyleGAN2's with channel multiplier 2: 128, 256, 512, 512, ..., 28.9M parameters."""

    def __init__(self, image_size=256, channels=(128, 512)):
        super().__init__()
        c, most = channels
        self.stem = EqualConv(3, c, 1)
        self.blocks, size = nn.ModuleList(), image_size
        while size >= 8:
            self.blocks.append(DiscriminatorBlock(c, min(2 * c, most)))
            c, size = min(2 * c, most), size // 2
        self.conv = EqualConv(c + 1, c, 3, padding=1)
        self.linear, self.logit = EqualLinear(c * size * size, c), EqualLinear(c, 1)

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


def r1_penalty(real_logits, real):
    """Mean squared norm of dD(x)/dx over the batch; `real` must require grad. Weighted by 10 / 2 in StyleGAN2."""
    grad, = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()


def ramp(step, start, length):
    """Share of the adversarial weight in force: 0 until `start`, then linearly up to 1 over `length` steps."""
    return min(max((step - start) / length, 0.0), 1.0) if length else float(step >= start)
